"""What is said to LLVM itself: the product that the other kernels are made of, and which lines of memory are wanted soon.

LLVM makes vectors of an innermost loop; the sums of a product stay in registers only where the loop inside runs over k and
the vectors lie along the loop around it. So that one loop, the register tile, is handed to LLVM as vectors. All the rest is text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..compile import Inline

DEPTH = 256  # of a sweep: what it needs of b, some 32 KiB, stays in the nearest cache for all rows


class _Made(Inline):
    """What `make` makes for a float type when a kernel that calls it is compiled: it needs Numba."""

    def __init__(self, make: Callable[[Any], Any]):
        super().__init__(make)

    def bound(self, dtype: Any, target: str) -> Any:
        if (target, dtype) not in self._bound:
            self._bound[target, dtype] = self.function(dtype)
        return self._bound[target, dtype]


def _registers() -> tuple[int, int]:
    """(vector registers, their bytes) of the processor that Numba compiles for."""
    from llvmlite import binding
    from numba.core import config

    named = config.CPU_FEATURES
    features = binding.get_host_cpu_features().flatten() if named is None and config.CPU_NAME is None else named or ""
    flags = features.split(",")
    if "+avx512f" in flags and "+avx512vl" in flags:
        return 32, 64
    if "+avx2" in flags and "+fma" in flags:
        return 16, 32
    return (32 if binding.get_process_triple().startswith(("aarch64", "arm64")) else 16), 16


def _tile(rows: int, lanes: int, masked: bool) -> Any:
    """c[c_at + i * c_row + n] += the sum over k of a[a_at + i * a_row + k * a_col] b[b_at + k * b_row + n], for i < rows, n < two
    vectors (masked: and n < columns), k < depth."""
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        a, a_at, a_row, a_col, b, b_at, b_row, c, c_at, c_row, columns, depth = values
        kinds = dict(zip("abc", (signature.args[0], signature.args[4], signature.args[7]), strict=True))
        bytes_of = kinds["c"].dtype.bitwidth // 8
        real, index, i32 = context.get_value_type(kinds["c"].dtype), ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(real, lanes)
        fused = ("contract",)

        def number(n: int) -> Any:
            return ir.Constant(index, n)

        def spread(value: Any, kind: Any) -> Any:  # the value in every lane
            none = ir.Constant(kind, ir.Undefined)
            first = builder.insert_element(none, value, ir.Constant(i32, 0))
            return builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(i32, lanes), [0] * lanes))

        def data(kind: Any, array: Any) -> Any:
            return context.make_array(kind)(context, builder, array).data

        def place(base: Any, at: Any, v: int) -> Any:
            return builder.bitcast(builder.gep(base, [builder.add(at, number(v * lanes))]), vector.as_pointer())

        masks: list[Any] = []
        if masked:
            lane = ir.Constant(ir.VectorType(index, lanes), list(range(lanes)))
            for v in range(2):
                left = spread(builder.sub(columns, number(v * lanes)), ir.VectorType(index, lanes))
                masks.append(builder.icmp_signed("<", lane, left))

        def through_mask(name: str, result: Any, *arguments: Any) -> Any:
            kind = ir.FunctionType(result, [x.type for x in arguments])
            name = f"llvm.masked.{name}.v{lanes}f{8 * bytes_of}.p0v{lanes}f{8 * bytes_of}"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)

        def load(base: Any, at: Any, v: int) -> Any:
            where = place(base, at, v)
            if masked:
                zeros = ir.Constant(vector, [0.0] * lanes)
                return through_mask("load", vector, where, ir.Constant(i32, bytes_of), masks[v], zeros)
            value = builder.load(where)
            value.align = bytes_of
            return value

        def store(value: Any, base: Any, at: Any, v: int) -> None:
            where = place(base, at, v)
            if masked:
                through_mask("store", ir.VoidType(), value, where, ir.Constant(i32, bytes_of), masks[v])
            else:
                builder.store(value, where).align = bytes_of

        a_data, b_data, c_data = data(kinds["a"], a), data(kinds["b"], b), data(kinds["c"], c)
        a_rows = [builder.add(a_at, builder.mul(a_row, number(i))) for i in range(rows)]
        c_rows = [builder.add(c_at, builder.mul(c_row, number(i))) for i in range(rows)]
        places = [(i, v) for i in range(rows) for v in range(2)]
        start = {(i, v): load(c_data, c_rows[i], v) for i, v in places}
        before, sweep, after = builder.block, builder.append_basic_block("sweep"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed(">", depth, number(0)), sweep, after)

        builder.position_at_end(sweep)
        k, a_k, b_k = builder.phi(index), builder.phi(index), builder.phi(index)
        sums = {p: builder.phi(vector) for p in places}
        of_b = [load(b_data, b_k, v) for v in range(2)]
        more = {}
        for i in range(rows):
            of_a = spread(builder.load(builder.gep(a_data, [builder.add(a_rows[i], a_k)])), vector)
            for v in range(2):
                more[i, v] = builder.fadd(sums[i, v], builder.fmul(of_a, of_b[v], flags=fused), flags=fused)
        for phi, first, step in ((k, number(0), number(1)), (a_k, number(0), a_col), (b_k, b_at, b_row)):
            phi.add_incoming(first, before)
            phi.add_incoming(builder.add(phi, step), sweep)
        for p in places:
            sums[p].add_incoming(start[p], before)
            sums[p].add_incoming(more[p], sweep)
        builder.cbranch(builder.icmp_signed("<", builder.add(k, number(1)), depth), sweep, after)

        builder.position_at_end(after)
        total = {p: builder.phi(vector) for p in places}
        for p in places:
            total[p].add_incoming(start[p], before)
            total[p].add_incoming(more[p], sweep)
        for i, v in places:
            store(total[i, v], c_data, c_rows[i], v)
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typing: Any, a: Any, a_at: Any, a_row: Any, a_col: Any, b: Any, b_at: Any, b_row: Any, c: Any, c_at: Any, c_row: Any,
        columns: Any, depth: Any,
    ) -> Any:  # fmt: skip
        i = types.int64
        return types.void(a, i, i, i, b, i, i, c, i, i, i, i), build

    return tile


def _sweeps(height: int, lanes: int) -> Any:
    """What add_product does for n < columns, at most two vectors, and for the rows from m on, as many as make tiles of that height;
    returns the first row that is left."""
    import numba

    whole, part = _tile(height, lanes, False), _tile(height, lanes, True)

    @numba.njit(nogil=True)
    def sweeps(
        a: Any, at: int, a_row: int, a_col: int, b: Any, b_at: int, b_row: int, c: Any, c_at: int, c_row: int, m: int, M: int,
        columns: int, depth: int,
    ) -> int:  # fmt: skip
        while m + height <= M:
            if columns == 2 * lanes:
                whole(a, at + m * a_row, a_row, a_col, b, b_at, b_row, c, c_at + m * c_row, c_row, columns, depth)
            else:
                part(a, at + m * a_row, a_row, a_col, b, b_at, b_row, c, c_at + m * c_row, c_row, columns, depth)
            m += height
        return m

    return sweeps


def _make_product(dtype: Any) -> Any:
    """Tiles of eight rows, six where there are 16 registers; of four; what is then left row by row."""
    import numba

    registers, vector = _registers()
    lanes = vector // np.dtype(dtype).itemsize
    many, four, one = (_sweeps(height, lanes) for height in (8 if registers == 32 else 6, 4, 1))

    @numba.njit(nogil=True)
    def add_product(
        a: Any, a_at: int, a_row: int, a_col: int, b: Any, b_at: int, b_row: int, c: Any, c_at: int, c_row: int, M: int, N: int,
        K: int,
    ) -> None:  # fmt: skip
        for k in range(0, K, DEPTH):
            at, depth = a_at + k * a_col, min(DEPTH, K - k)
            for n in range(0, N, 2 * lanes):
                bn, cn, columns = b_at + k * b_row + n, c_at + n, min(2 * lanes, N - n)
                m = many(a, at, a_row, a_col, b, bn, b_row, c, cn, c_row, 0, M, columns, depth)
                m = four(a, at, a_row, a_col, b, bn, b_row, c, cn, c_row, m, M, columns, depth)
                one(a, at, a_row, a_col, b, bn, b_row, c, cn, c_row, m, M, columns, depth)

    return add_product


add_product: Any = _Made(_make_product)
"""c[c_at + m * c_row + n] += the sum over k of a[a_at + m * a_row + k * a_col] b[b_at + k * b_row + n], for m < M, n < N, k < K,
all counted from an array's first element: add_product(a, a_at, a_row, a_col, b, b_at, b_row, c, c_at, c_row, M, N, K). The sum
runs in the order of k, whatever M and N are, from what c holds. c is no part of a or b."""


def _make_fetch(dtype: Any) -> Any:
    from llvmlite import binding, ir
    from numba.core import types
    from numba.extending import intrinsic

    # Intel's own prefetchers end at each page of 4 KiB; others look ahead far enough, and asking them costs more than it brings.
    others = ("zn", "bd", "bt", "amd", "athlon", "opteron", "k8", "generic")
    intel = binding.get_process_triple().startswith("x86") and not binding.get_host_cpu_name().startswith(others)
    ahead = (8 << 10) // np.dtype(dtype).itemsize if intel else 0

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array, at = values
        if ahead:
            data = context.make_array(signature.args[0])(context, builder, array).data
            place = builder.gep(data, [builder.add(at, ir.Constant(at.type, ahead))])
            byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            function = builder.module.declare_intrinsic(
                "llvm.prefetch", (byte,), ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
            )
            how = [ir.Constant(i32, n) for n in (0, 3, 1)]  # to be read, into the nearest cache, data
            builder.call(function, [builder.bitcast(place, byte), *how])
        return context.get_dummy_value()

    @intrinsic
    def fetch(typing: Any, array: Any, at: Any) -> Any:
        return types.void(array, types.int64), build

    return fetch


fetch: Any = _Made(_make_fetch)
"""fetch(array, at): the line of memory some way behind array[at] will be read soon; it may lie behind the array."""
