"""Every shared argument check with its message, and the one place where an input is converted or copied.

An op makes one `Call`: it collects the arrays (as contiguous, aligned, native arrays of one float type), allocates the
results, runs kernels, and hands back what the caller expects (the element type that came, `out`, a GPU array).
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _dispatch, _memory, _plan
from ._plan import NO_PLAN, OTHER_TYPES

FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
MAX_BYTES = 2**62


def shown(value: Any) -> str:
    """The value for an error text, at most 80 characters."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}, {value.dtype}"
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else text[:77] + "..."


# ----------------------------------------------------------------------------------------------------------- numbers


def integer(op: str, name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """value as an int in [low, high]. Booleans, floats and strings are TypeErrors."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer, {type(value).__name__} {shown(value)} came")
    try:
        number = value.__index__()
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, {type(value).__name__} {shown(value)} came") from None
    if low is not None and number < low:
        raise ValueError(f"{op}: {name} must be at least {low}, {shown(number)} came")
    if number > (2**63 - 1 if high is None else high):
        raise ValueError(f"{op}: {name} must be at most {2**63 - 1 if high is None else high}, {shown(number)} came")
    return number


def integers(op: str, name: str, value: Any, n: int, low: int | None = None) -> tuple[int, ...]:
    """n ints, from one number (repeated) or a sequence of one or n numbers, as torch takes them."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = tuple(value)
    if isinstance(value, list | tuple):
        if len(value) not in (1, n):
            raise ValueError(f"{op}: {name} must be a number or {n} numbers, {shown(value)} came")
        numbers = tuple(integer(op, name, v, low) for v in value)
        return numbers * n if len(numbers) == 1 and n > 1 else numbers
    return (integer(op, name, value, low),) * n


def number(op: str, name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
    """value as a finite or infinite float in [low, high]; NaN, booleans and strings are errors."""
    if isinstance(value, bool | np.bool_ | str | bytes) or not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be a number, {type(value).__name__} {shown(value)} came")
    try:
        result = float(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be a number, {type(value).__name__} {shown(value)} came") from None
    except OverflowError:
        raise ValueError(f"{op}: {name} is too large for a float, {shown(value)} came") from None
    if math.isnan(result) or (low is not None and result < low) or (high is not None and result > high):
        need = (
            "a number" + (f" of at least {low}" if low is not None else "") + (f" and at most {high}" if high is not None else "")
        )
        raise ValueError(f"{op}: {name} must be {need}, {shown(value)} came")
    return result


def flag(op: str, name: str, value: Any) -> bool:
    """value as a bool; anything but a boolean is a TypeError."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {name} must be True or False, {type(value).__name__} {shown(value)} came")
    return bool(value)


def seed(op: str, rng: Any) -> int:
    """A number below 2^63 from `rng`: a numpy.random.Generator, a seed for one, or None for a random one."""
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(2**63))
    if rng is not None:
        rng = integer(op, "rng", rng, 0) if not isinstance(rng, list | tuple | np.random.SeedSequence) else rng
    try:
        return int(np.random.default_rng(rng).integers(2**63))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: rng must be a numpy.random.Generator or a seed: {error}") from None


def one_of(op: str, name: str, value: Any, options: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, options))}; {shown(value)} came")
    return value


def axis(op: str, value: Any, ndim: int, name: str = "axis") -> int:
    """The axis counted from 0; numpy.exceptions.AxisError when there is no such axis. A 0-d array has the axes 0 and -1."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer, {type(value).__name__} {shown(value)} came")
    number = value.__index__()
    limit = max(ndim, 1)
    if not -limit <= number < limit:
        raise np.exceptions.AxisError(f"{op}: {name} {shown(number)} is out of bounds for an array of {ndim} dimensions")
    return number % limit


def size(op: str, name: str, shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape itself; MemoryError when an array of that shape cannot exist."""
    if all(0 <= n <= sys.maxsize for n in shape) and math.prod(max(n, 1) for n in shape) * itemsize <= MAX_BYTES:
        return tuple(shape)
    raise MemoryError(f"{op}: {name} would have the shape {shown(tuple(shape))}, more than any memory holds")


# ------------------------------------------------------------------------------------------------------------ arrays


def is_device(value: Any) -> bool:
    """True for an array in GPU memory. Costs no import for NumPy arrays, numbers and lists."""
    if isinstance(value, np.ndarray | np.generic | int | float | list | tuple) or value is None:
        return False
    return _dispatch.adapter("cuda").is_device_array(value)


def needed(op: str, **arrays: Any) -> None:
    """TypeError where an array that an op cannot do without is None."""
    for name, value in arrays.items():
        if value is None:
            raise TypeError(f"{op}: {name} must be an array, None came")


def host_array(op: str, name: str, value: Any) -> np.ndarray:
    """value as a plain ndarray; what has no plain numeric elements is a TypeError."""
    if isinstance(value, np.ma.MaskedArray | np.matrix):
        raise TypeError(
            f"{op}: {name} is a {type(value).__name__}, a plain array is needed (its mask or matrix product would be lost)"
        )
    if value is None or isinstance(value, str | bytes | dict | set):
        raise TypeError(f"{op}: {name} must be an array, {type(value).__name__} came")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(f"{op}: {name} cannot be read as an array: {error}") from None
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{op}: {name} has the element type {array.dtype}, numbers are needed")
    return array


def as_type(op: str, name: str, value: Any, dtype: Any) -> Any:
    """The array converted to a float type, which other numbers may be, too; as it is where dtype is None."""
    if dtype is None:
        return value
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{op}: dtype must be float16, float32 or float64, {shown(dtype)} came") from None
    if wanted not in FLOATS:
        raise TypeError(f"{op}: dtype must be float16, float32 or float64, {wanted} came")
    if is_device(value):
        return _dispatch.adapter("cuda").cast(_dispatch.adapter("cuda").as_device(value), wanted)
    return host_array(op, name, value).astype(wanted)


def _lies_in_rows(array: np.ndarray) -> bool:
    """True for a view whose last axis lies side by side, its rows any whole number of elements apart."""
    size = array.itemsize
    return array.ndim > 1 and array.strides[-1] == size and all(n % size == 0 for n in array.strides)


def _contiguous(array: np.ndarray, dtype: np.dtype, view: bool = False) -> np.ndarray:
    """The array itself when kernels can read it as it is, which may be as a view, else one copy."""
    if (
        type(array) is np.ndarray
        and array.dtype == dtype
        and array.dtype.isnative
        and array.flags.aligned
        and (array.flags.c_contiguous or (view and _lies_in_rows(array)))
    ):
        return array
    copy = _memory.empty(array.shape, dtype)
    np.copyto(copy, array, casting="unsafe")
    return copy


class Call:
    """One call of an op: its arrays in one float type, its results, its kernels.

    `dtype` is the element type of the results, `compute` the float type of the kernels (float32 for float16).
    """

    def __init__(self, op: str, out: Any = None):
        self.op, self.out = op, out
        self.space = "host"
        self.once = False  # True: what this call runs with is random, it makes no plan
        self.constants: list[Any] = []
        self.dtype: np.dtype[Any] = np.dtype(np.float64)
        self.compute: np.dtype[Any] = self.dtype
        self._inputs: list[Any] = []
        self._example: Any = None
        self.runs: list[tuple[str, tuple[Any, ...], dict[str, Any]]] | None = None  # its kernels, where a plan is made of them
        log = getattr(_plan.recording, "log", None)
        if log is not None:
            self.runs = []
            log.append(self)

    # -- what comes in

    def floats(self, *, integers: bool = False, kernel: str = "", **named: Any) -> list[Any]:
        """The named arrays, contiguous and in one float type (NumPy's promotion over all of them); None stays None, but the
        first is needed.

        Integers and booleans are a TypeError unless `integers` allows them; they count as float64. `kernel` reads the arrays,
        named in the order of its record: what it takes as a view comes as it lies, where its backend reads views.
        """
        first = next(iter(named))
        if named[first] is None:
            host_array(self.op, first, None)  # raises
        present = {n: v for n, v in named.items() if v is not None}
        on_device = {n for n, v in present.items() if is_device(v)}
        if on_device:
            return self._device_floats(named, present, on_device, integers)
        arrays = {n: host_array(self.op, n, v) for n, v in present.items()}
        self._inputs += arrays.values()
        self._set_type({n: a.dtype for n, a in arrays.items()}, integers)
        views: set[str] = set()
        if kernel and _dispatch.takes_views(kernel, self.compute):
            views = {n for n, a in zip(named, _dispatch.spec.find(kernel).arrays, strict=False) if a.view}
        return [None if v is None else _contiguous(arrays[n], self.compute, n in views) for n, v in named.items()]

    def _set_type(self, dtypes: dict[str, np.dtype], integers: bool) -> None:
        for name, dtype in dtypes.items():
            if dtype.kind != "f" and not integers:
                raise TypeError(f"{self.op}: {name} has the element type {dtype}, float16, float32 or float64 is needed")
        kinds = [d.newbyteorder("=") if d.kind == "f" else np.dtype(np.float64) for d in dtypes.values()]
        self.dtype = np.result_type(*kinds) if kinds else np.dtype(np.float64)
        self.compute = np.dtype(np.float32) if self.dtype == np.float16 else self.dtype

    def _device_floats(self, named: Any, present: Any, on_device: set[str], integers: bool) -> list[Any]:
        hosts = sorted(set(present) - on_device)
        if hosts:
            raise TypeError(f"{self.op}: {', '.join(sorted(on_device))} on a GPU, {', '.join(hosts)} not; move them to one memory")
        cuda = _dispatch.adapter("cuda")
        if cuda.status():
            raise _dispatch.BackendUnavailableError(
                f"{self.op}: the arrays are on a GPU, which cannot be used here: {cuda.status()}"
            )
        self.space, self._example = "cuda", next(iter(present.values()))
        arrays = {n: cuda.as_device(v) for n, v in present.items()}
        self._set_type({n: np.dtype(a.dtype) for n, a in arrays.items()}, integers)
        return [
            None if v is None else arrays[n] if np.dtype(arrays[n].dtype) == self.compute else cuda.cast(arrays[n], self.compute)
            for n, v in named.items()
        ]

    def more_floats(self, **named: Any) -> list[Any]:
        """Further arrays of a call (gradients that come later), in the float type it has; None stays None."""
        if self.space == "cuda":
            cuda = _dispatch.adapter("cuda")
            arrays = [None if v is None else cuda.as_device(v) for v in named.values()]
            return [a if a is None or a.dtype == self.compute else cuda.cast(a, self.compute) for a in arrays]
        return [None if v is None else _contiguous(host_array(self.op, n, v), self.compute) for n, v in named.items()]

    def indices(self, name: str, value: Any) -> Any:
        """An integer array as contiguous int64; a float, a boolean or a value beyond int64 is a TypeError or ValueError."""
        if self.space == "cuda" and is_device(value):
            cuda = _dispatch.adapter("cuda")
            array = cuda.as_device(value)
            if np.dtype(array.dtype).kind not in "iu":
                raise TypeError(f"{self.op}: {name} has the element type {array.dtype}, integers are needed")
            return array if array.dtype == np.int64 else cuda.cast(array, np.dtype(np.int64))
        array = host_array(self.op, name, value)
        if array.size == 0 and not isinstance(value, np.ndarray):
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{self.op}: {name} has the element type {array.dtype}, integers are needed")
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{self.op}: {name} holds {array.max()}, more than an int64 holds")
        self._inputs.append(array)
        array = _contiguous(array, np.dtype(np.int64))
        return self.put(array)

    def booleans(self, name: str, value: Any) -> Any:
        """A boolean array as contiguous uint8 (0 or 1); any other element type is a TypeError."""
        if self.space == "cuda" and is_device(value):
            cuda = _dispatch.adapter("cuda")
            array = cuda.as_device(value)
            if np.dtype(array.dtype).kind != "b":
                raise TypeError(f"{self.op}: {name} has the element type {array.dtype}, booleans are needed")
            return cuda.cast(array, np.dtype(np.uint8))
        array = host_array(self.op, name, value)
        if array.dtype.kind != "b":
            raise TypeError(f"{self.op}: {name} has the element type {array.dtype}, booleans are needed")
        self._inputs.append(array)
        return self.put(_contiguous(array, np.dtype(np.bool_)).view(np.uint8))

    def put(self, array: np.ndarray) -> Any:
        """A small host array made by the op, in the memory of the call's arrays."""
        return _dispatch.adapter("cuda")._cuda().to_device(array) if self.space == "cuda" else array

    def get(self, array: Any) -> np.ndarray:
        """An array of the call as a host array."""
        return array if isinstance(array, np.ndarray) else _dispatch.adapter("cuda").to_host(array)

    # -- what goes out

    def result(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """The array that kernels write the call's one result to: `out` itself where that is possible.

        `dtype` is given for a result that is not of the call's float type (int64 indices).
        """
        final = self.dtype if dtype is None else np.dtype(dtype)
        shape = size(self.op, "the result", shape, final.itemsize)
        work = self.compute if dtype is None else final
        if self.out is None:
            return self.empty(shape, work)
        self._check_out(shape, final)
        out = self.out
        if (
            isinstance(out, np.ndarray)
            and out.dtype == work
            and out.dtype.isnative
            and out.flags.c_contiguous
            and out.flags.aligned
            and not any(np.may_share_memory(out, a) for a in self._inputs)
        ):
            return out.view(np.ndarray)
        return self.empty(shape, work)

    def _check_out(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        out = self.out
        if self.space == "cuda":
            if not is_device(out) or tuple(out.shape) != shape or np.dtype(_dispatch.adapter("cuda").as_device(out).dtype) != dtype:
                raise ValueError(f"{self.op}: out must be a GPU array of shape {shape}, {dtype}")
            return
        if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray | np.matrix):
            raise TypeError(f"{self.op}: out must be an array, {type(out).__name__} came")
        if out.shape != shape:
            raise ValueError(f"{self.op}: out has the shape {out.shape}, {shape} is needed")
        if out.dtype != dtype:
            raise TypeError(f"{self.op}: out has the element type {out.dtype}, {dtype} is needed")
        if not out.flags.writeable:
            raise ValueError(f"{self.op}: output array is read-only")

    def empty(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """A fresh array in the call's memory, of its float type unless `dtype` says otherwise."""
        dtype = self.compute if dtype is None else np.dtype(dtype)
        shape = size(self.op, "an array of the call", shape, dtype.itemsize)
        if self.space == "cuda":
            return _dispatch.adapter("cuda").empty(shape, dtype)
        return _memory.empty(shape, dtype)

    def zeros(self, shape: Sequence[int]) -> Any:
        """An array of zeros in the call's memory and float type, to be read."""
        array = self.put(np.zeros(size(self.op, "an array of the call", shape, self.compute.itemsize), self.compute))
        self.constants.append(array)
        return array

    def transposed(self, array: Any, axes: tuple[int, ...]) -> Any:
        """A contiguous copy with its axes in another order."""
        return self.put(np.ascontiguousarray(self.get(array).transpose(axes)))

    def joined(self, arrays: Sequence[Any]) -> Any:
        """The arrays side by side along their last axis."""
        return self.put(np.concatenate([self.get(a) for a in arrays], axis=-1))

    def part(self, array: Any, begin: int, end: int) -> Any:
        """A contiguous copy of [..., begin:end]."""
        return self.put(np.ascontiguousarray(self.get(array)[..., begin:end]))

    def added(self, a: Any, b: Any) -> Any:
        """a + b of two arrays of the call."""
        return self.put(self.get(a) + self.get(b))

    def whole(self, array: Any) -> Any:
        """An array of the call, in one piece: a view as a copy."""
        return _contiguous(array, array.dtype) if isinstance(array, np.ndarray) else array

    def expand(self, array: Any, shape: Sequence[int]) -> Any:
        """The array broadcast to the shape; a copy where that changes it."""
        if tuple(array.shape) == tuple(shape):
            return array
        size(self.op, "a broadcast array", shape, array.dtype.itemsize)
        return self.put(np.ascontiguousarray(np.broadcast_to(self.get(array), tuple(shape))))

    def collapse(self, array: Any, shape: Sequence[int]) -> Any:
        """The sum over the axes that `expand` added or stretched from that shape."""
        if tuple(array.shape) == tuple(shape):
            return array
        return self.put(np.ascontiguousarray(autograd._unbroadcast(self.get(array), tuple(shape))))

    def run(self, kernel: str, *arrays: Any, **scalars: Any) -> None:
        """Runs one kernel; arrays in the order of its record (None for an absent one), scalars by name."""
        if self.runs is not None:
            self.runs.append((kernel, arrays, scalars))
        _dispatch.run(kernel, arrays, scalars, self.space)

    def finish(self, result: Any) -> Any:
        """The result as the caller expects it: in `out`, in the element type that came, as the array kind that came."""
        if self.space == "cuda":
            cuda = _dispatch.adapter("cuda")
            if self.dtype != self.compute and np.dtype(result.dtype) == self.compute:
                result = cuda.cast(result, self.dtype)
            if self.out is not None:
                cuda.as_device(self.out).copy_to_device(result)
                return self.out
            return cuda.as_kind_of(result, self._example)
        if self.out is not None:
            if (
                not np.may_share_memory(result, self.out)
                or result.__array_interface__["data"] != self.out.__array_interface__["data"]
            ):
                with np.errstate(over="ignore"):
                    self.out[...] = result
            return self.out
        if self.dtype != self.compute and result.dtype == self.compute:
            with np.errstate(over="ignore"):
                return result.astype(self.dtype)
        return result


# --------------------------------------------------------------------------------------------------------------- ops


def _followed(function: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def followed(*args: Any, **kwargs: Any) -> Any:
        return then(*function(*args, **kwargs))

    return followed


def op(function: Any = None, *, repeats: bool = False, strides: bool = False, then: Callable[..., Any] | None = None) -> Any:
    """Marks a public op: where an argument is an `autograd.Variable`, the call is recorded in its graph.

    `repeats` promises that how the op runs depends on its arrays through shapes and element types alone (no look at their
    values, nothing random): calls that repeat then take a short way (see `_plan`). `strides`: but it does depend on how arrays lie
    in memory. `then` makes the op's result of the arrays that the function returns, where that does depend on values.
    """
    if function is None:
        return functools.partial(op, repeats=repeats, strides=strides, then=then)
    patterns: dict[Any, list[tuple[Any, dict[Any, Any]]]] = {}  # by number and names of the arguments: see _plan.keyer
    arrays = function
    if then is not None:
        function = _followed(arrays, then)

    def first_call(args: tuple[Any, ...], kwargs: dict[str, Any], plans: dict[Any, Any], key: Any) -> Any:
        if len(plans) >= _plan.MAX_PLANS:
            plans.clear()
        if not strides:
            out = kwargs.get("out")
            args, kwargs = _plan.in_line(args, out), dict(zip(kwargs, _plan.in_line(kwargs.values(), out), strict=True))
        result, plan = _plan.make(arrays, args, kwargs)
        if plan is not None:
            plans[key] = plan if then is None or plan is NO_PLAN else _followed(plan, then)
        return result if then is None else then(*result)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if repeats:
            values = (*args, *kwargs.values()) if kwargs else args
            form = (len(args), *kwargs) if kwargs else len(args)
            key = OTHER_TYPES
            for keyer, plans in patterns.get(form, ()):  # noqa: B007 - the plans that go with the keyer that fits
                key = keyer(*values)
                if key is not OTHER_TYPES:
                    break
            if key is OTHER_TYPES:
                key, plans = _plan.new_pattern(patterns.setdefault(form, []), values)
            if key is not None:
                plan = plans.get(key)
                if plan is None:
                    return first_call(args, kwargs, plans, key)
                if plan is not NO_PLAN:
                    try:
                        return plan(*values)
                    except ValueError:  # an array that is not contiguous or not aligned: it needs its copy
                        pass
                    if not strides:
                        try:
                            return plan(*_plan.in_line(values, kwargs.get("out")))
                        except ValueError:  # a large one, or one that is written
                            pass
                return function(*args, **kwargs)
        if autograd.any_variable(args, kwargs):
            return autograd.record(call, args, kwargs)
        return function(*args, **kwargs)

    call.signature = inspect.signature(function)  # type: ignore[attr-defined]
    return call


from . import autograd  # noqa: E402 - the two need each other: ops record graphs, the graph holds ops
