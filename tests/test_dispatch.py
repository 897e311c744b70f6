"""Who runs: order, what is asked for, what is missing, what is broken; calls that repeat; memory for results."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from compare import assert_same_bits
from conftest import SIMULATED, host_backends

import hotloops as hl
from hotloops import _dispatch, _memory
from hotloops._errors import BackendUnavailableError

X = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
HAVE_C = "c" in host_backends()
COMPILED = [name for name in host_backends() if name != "reference"]
needs_c = pytest.mark.skipif(not HAVE_C, reason="no C kernels here")


def python(code, **environment):
    """Runs code in a fresh process; returns what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HOTLOOPS_")} | environment
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_order():
    assert hl.explain(hl.softmax, X).backend == host_backends()[-1 if host_backends() == ["reference"] else 1]


@pytest.mark.parametrize("name", host_backends())
def test_asked_for(name):
    with hl.backend(name):
        explanation = hl.explain(hl.softmax, X)
        assert explanation.backend == name
        assert "asked for" in str(explanation)
        with hl.backend("reference"):
            assert hl.explain(hl.softmax, X).backend == "reference"
        assert hl.explain(hl.softmax, X).backend == name


def test_choice_belongs_to_the_context():
    seen = {}

    def work():
        seen["backend"] = hl.explain(hl.softmax, X).backend

    with hl.backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen["backend"] == hl.explain(hl.softmax, X).backend


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"no backend 'torch'; there are c, numba, reference, cuda"), hl.backend("torch"):
        pass


@pytest.mark.skipif(not _dispatch.adapter("cuda").status(), reason="there is a GPU or the simulator")
def test_impossible_backend():
    with pytest.raises(BackendUnavailableError, match="cannot run here: "), hl.backend("cuda"):
        pass


def test_no_kernel_for_this_type():
    record = _dispatch.spec.find("softmax")
    with hl.backend("reference"):
        pass
    if HAVE_C:
        assert _dispatch.adapter("c").prepare(record, np.dtype(np.int64)) is None
        with hl.backend("c"), pytest.raises(BackendUnavailableError, match="no kernel softmax for int64"):
            _dispatch.select("softmax", np.dtype(np.int64), "host")
    assert _dispatch.select("softmax", np.dtype(np.int64), "host")[1] == "reference"


def test_environment():
    code = "import numpy as np, hotloops as hl; print(hl.explain(hl.softmax, np.zeros(3)).backend)"
    assert python(code, HOTLOOPS_BACKEND="reference") == "reference"
    failing = """
    import numpy as np, hotloops as hl
    try:
        hl.softmax(np.zeros(3))
    except ValueError as error:
        print(error)
    """
    assert "HOTLOOPS_BACKEND: there is no backend 'fortran'" in python(failing, HOTLOOPS_BACKEND="fortran")


@needs_c
def test_instruction_set_from_the_environment():
    code = "from hotloops import _dispatch; c = _dispatch.adapter('c'); print(c.isa(), *c.isas())"
    best, *all_sets = python(code).split()
    assert best == all_sets[-1]
    for name in all_sets:
        assert python(code, HOTLOOPS_ISA=name).split()[0] == name
    assert python(code, HOTLOOPS_ISA="no-such-set").split()[0] == best


def test_missing_is_silent_and_broken_is_shown():
    missing = """
    import sys, warnings
    warnings.simplefilter("error")
    sys.modules["hotloops._ckernels"] = None
    import hotloops as hl, numpy as np
    assert hl.explain(hl.softmax, np.zeros(3)).backend != "c"
    print(hl.backends()["c"])
    """
    assert "unavailable" in python(missing)
    broken = """
    import sys, types
    class Loader:
        def find_spec(self, name, path, target=None):
            if name == "hotloops._ckernels":
                raise ImportError("undefined symbol: hl_planted")
    sys.meta_path.insert(0, Loader())
    import hotloops as hl, numpy as np
    from hotloops import _dispatch
    assert abs(hl.softmax(np.zeros(4)).sum() - 1) < 1e-12
    print(hl.backends()["c"])
    print(hl.explain(hl.softmax, np.zeros(3)))
    print(_dispatch.adapter("c").broken())
    """
    text = python(broken)
    assert text.count("undefined symbol: hl_planted") >= 3
    assert "Traceback" in text


def test_explain_says_why_not():
    text = str(hl.explain(hl.softmax, X))
    assert "softmax" in text
    assert "float32" in text
    assert str(hl.explain(hl.softmax, np.zeros((0, 3)))).startswith("softmax")


# ------------------------------------------------------------------------------------------------- calls that repeat


@needs_c
def test_plan_gives_what_the_long_way_gives():
    strided = np.asfortranarray(X)
    first = hl.softmax(X)
    for _ in range(3):
        np.testing.assert_array_equal(hl.softmax(X), first)
        np.testing.assert_array_equal(hl.softmax(strided), first)
        np.testing.assert_array_equal(hl.softmax(X.astype(X.dtype.newbyteorder())), first)
        np.testing.assert_array_equal(hl.softmax(X, axis=-1), first)
        assert hl.softmax(X.astype(np.float64)).dtype == np.float64
        assert hl.softmax(X.astype(np.float16)).dtype == np.float16
        with pytest.raises(np.exceptions.AxisError):
            hl.softmax(X, 2)
        with pytest.raises(TypeError):
            hl.softmax(X, True)
        with pytest.raises(TypeError):
            hl.softmax(np.ma.masked_array(X))
        with hl.backend("reference"):
            assert hl.explain(hl.softmax, X).backend == "reference"
        assert hl.explain(hl.softmax, X).backend == "c"


@needs_c
def test_repeated_layers_and_attention():
    """The second call of the same shapes takes the plan; the graph never does."""

    def draw(*shape):
        return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)

    x, h, c = draw(3, 2, 4), draw(1, 2, 5), draw(1, 2, 5) + 1
    for kind, gates in (("lstm", 4), ("gru", 3), ("rnn", 1)):
        w = [draw(gates * 5, 4), draw(gates * 5, 5), draw(gates * 5), draw(gates * 5) + 1]
        op, cell = getattr(hl, kind), getattr(hl, f"{kind}_cell")
        for hx, states in (((h, c), (h[0], c[0])), (None, None)):
            if kind != "lstm" and hx:
                hx, states = h, h[0]
            for scale in (1, 2, 3):
                y, _ = op(scale * x, hx, w)
                np.testing.assert_array_equal(y, hl.vjp(lambda v: op(v, hx, w)[0], scale * x)[0])  # noqa: B023
                one = cell(scale * x[0], states, *w)
                np.testing.assert_array_equal(one[0] if kind == "lstm" else one, y[0])
            with pytest.raises(ValueError, match="input"):
                op(x[0, 0], hx, w)
    q, k, v = draw(2, 3, 4), draw(2, 5, 4), draw(2, 5, 6)
    mask = np.ones((3, 5), bool)
    attend = hl.scaled_dot_product_attention
    for key in range(5):
        mask[:, key] = False
        y, scores = attend(q, k, v, mask, return_scores=True)
        np.testing.assert_array_equal(attend(q, k, v, mask), y)
        assert not scores[..., : key + 1].any()
    assert len({attend(q, k, v, None, 0.5).tobytes() for _ in range(8)}) > 4


@needs_c
def test_plans_are_used_and_bounded():
    from hotloops import _plan

    calls = []

    def counted(input, axis=-1):
        calls.append(1)
        return hl.softmax.__wrapped__(input, axis)

    counted.__name__ = "counted"
    op = hl._check.op(counted, repeats=True)
    for _ in range(5):
        op(X)
    assert len(calls) == 1
    for n in range(1, _plan.MAX_PLANS + 5):
        op(np.zeros((1, n), np.float32))
    op(X)
    assert len(calls) == 1 + _plan.MAX_PLANS + 4 + 1


@pytest.mark.parametrize("backend", COMPILED)
def test_calls_with_out_repeat(backend):
    """The short way is taken, where `out` allows it; a result that lies in an input is not."""
    seen = []

    def counted(input, *, out=None):
        seen.append(1)
        return hl.softmax.__wrapped__(input, out=out)

    op = hl._check.op(counted, repeats=True)
    x, room = X.copy(), np.zeros(2 * X.size, np.float32)
    with hl.backend(backend):
        expected = hl.softmax(X)
        op(x, out=x)
        x[...] = X
        for _ in range(3):
            out = np.zeros_like(X)
            assert op(x, out=out) is out
            np.testing.assert_array_equal(out, expected)
        assert len(seen) == 2
        op(x, out=room[1::2].reshape(X.shape, copy=False))
        part = room[3 : 3 + X.size].reshape(X.shape)
        part[...] = X
        op(part, out=room[5 : 5 + X.size].reshape(X.shape))
        np.testing.assert_array_equal(room[5 : 5 + X.size].reshape(X.shape), expected)
        assert len(seen) == 4
        op(X, out=out)
        assert len(seen) == 4


@needs_c
def test_prepared_calls_refuse_what_does_not_fit():
    from hotloops._calls import Call

    kept, one = (np.zeros(1),), ((np.empty, (2,), np.dtype(np.float32)),)
    good = {
        "kernel": 0,
        "plan": 0,
        "kept": kept,
        "fail": print,
        "made": one,
        "sources": (0, -2),
        "arguments": 1,
        "returns_tuple": False,
    }
    for wrong in (
        {"made": ()},
        {"sources": (1, -2)},
        {"sources": (0, -3)},
        {"sources": (0,) * 16},
        {"made": ((np.empty, (2,)),)},
        {"made": (1,)},
        {"made": (-1,)},
    ):
        with pytest.raises(ValueError, match="cannot be prepared"):
            Call(**{**good, **wrong})
    for wrong in ({"sources": ("x", -2)}, {"made": None}):
        with pytest.raises(TypeError):
            Call(**{**good, **wrong})
    call = Call(**good)
    for arguments, names in (((), {}), ((1, 2), {}), ((), {"x": 1}), ((1,), {})):
        with pytest.raises(TypeError):
            call(*arguments, **names)
    with pytest.raises(ValueError, match="contiguous"):
        call(np.zeros((4, 4), np.float32)[:, 1])


def test_same_array_twice_does_not_become_a_plan_for_two():
    """The first call reads one array through both arguments; later ones read two."""
    a = np.array([[0, 0, 2, 2], [1, 1, 3, 3]], np.float32)
    b = a + 10
    hl.box_iou(a, a)
    assert not hl.box_iou(a, b).any()
    assert not hl.box_iou(b, a).any()


@pytest.mark.parametrize("name", COMPILED)
def test_same_array_twice_takes_the_short_way_too(name, monkeypatch):
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 7)).astype(np.float32)
    with hl.backend(name):
        expected = hl.scaled_dot_product_attention(x, x, x)
        monkeypatch.setattr(_dispatch, "run", None)  # the long way goes through it
        assert_same_bits(hl.scaled_dot_product_attention(x, x, x), expected, "self-attention")


def draw(rng, *shape):
    return rng.standard_normal(shape, np.float32)


RECORDED = {
    "softmax": (lambda x: hl.softmax(x), [(3, 7)]),
    "log_softmax of columns": (lambda x: hl.log_softmax(x, 0), [(3, 7)]),
    "conv2d": (lambda x, w, b: hl.conv2d(x, w, b, 1, 1), [(2, 3, 9, 8), (4, 3, 3, 3), (4,)]),
    "conv2d with an activation": (lambda x, w: hl.conv2d(x, w, stride=2, activation="silu"), [(2, 3, 9, 8), (4, 3, 3, 3)]),
    "conv1d by its weight": (lambda w: hl.conv1d(np.ones((2, 3, 9), np.float32), w), [(4, 3, 3)]),
    "conv3d by its input": (lambda x: hl.conv3d(x, np.ones((2, 2, 2, 2, 2), np.float32)), [(2, 4, 5, 6)]),
    "linear": (lambda x, w, b: hl.linear(x, w, b, activation="gelu"), [(5, 6), (4, 6), (4,)]),
    "matmul": (lambda a, b: hl.matmul(a, b), [(2, 5, 6), (2, 6, 4)]),
    "max_pool2d": (lambda x: hl.max_pool2d(x, 3, 2, 1), [(2, 3, 9, 8)]),
    "max_pool2d of large windows": (lambda x: hl.max_pool2d(x, 17), [(2, 3, 19, 18)]),
    "max_pool1d with indices": (lambda x: hl.max_pool1d(x, 2, return_indices=True)[0], [(2, 3, 9)]),
    "avg_pool3d": (lambda x: hl.avg_pool3d(x, 2, 1, (1, 0, 1), divisor_override=3), [(2, 4, 5, 6)]),
    "adaptive_avg_pool2d": (lambda x: hl.adaptive_avg_pool2d(x, (2, 3)), [(2, 3, 9, 8)]),
    "attention": (lambda q, k, v: hl.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 3, 5, 8)] * 3),
    "attention with a mask": (
        lambda q, k, v: hl.scaled_dot_product_attention(q, k, v, np.tri(5, 7, 2, dtype=bool)),
        [(2, 5, 8), (2, 7, 8), (2, 7, 8)],
    ),
}


@pytest.mark.parametrize("op", RECORDED)
@pytest.mark.parametrize("name", COMPILED)
def test_recorded_calls_repeat(name, op, monkeypatch):
    """Results and gradients of calls that were checked before, on the short way, have the bits of the long one."""
    function, shapes = RECORDED[op]
    rng = np.random.default_rng(0)
    first, second = ([draw(rng, *shape) for shape in shapes] for _ in range(2))

    def result_and_gradients(arrays):
        y, pullback = hl.vjp(function, *arrays)
        return [y, *pullback(np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape))]

    with hl.backend(name):
        expected = result_and_gradients(second)  # the long way, where this is the first call of these shapes
        result_and_gradients(first)
        monkeypatch.setattr(_dispatch, "run", None)  # the long way goes through it
        for actual, wanted in zip(result_and_gradients(second), expected, strict=True):
            assert_same_bits(actual, wanted, op)


@pytest.mark.parametrize("name", COMPILED)
def test_gradients_that_kernels_cannot_read_take_the_long_way(name):
    x = draw(np.random.default_rng(1), 1, 2, 6, 8)
    with hl.backend(name):
        for function in (lambda v: hl.max_pool2d(v, 2), lambda v: hl.softmax(v), lambda v: hl.avg_pool2d(v, 2)):
            y, pullback = hl.vjp(function, x)
            same = np.full(y.shape, 2, np.float32)
            for _ in range(2):
                for gradient in (same, np.broadcast_to(np.float32(2), y.shape), np.asfortranarray(same)):
                    assert_same_bits(pullback(gradient)[0], pullback(same)[0], "gradient")


@needs_c
def test_gradients_of_some_arguments_repeat():
    """A plan of all gradients is not taken where some are wanted, nor the other way round."""
    rng = np.random.default_rng(2)
    x, w, b = draw(rng, 2, 3, 7, 6), draw(rng, 4, 3, 3, 3), draw(rng, 4)
    y, pullback = hl.vjp(lambda x, w, b: hl.conv2d(x, w, b), x, w, b)
    g = draw(rng, *y.shape)
    for _ in range(2):
        gx, gw, gb = pullback(g)
        assert_same_bits(hl.vjp(lambda x: hl.conv2d(x, w, b), x)[1](g)[0], gx, "by the input alone")
        assert_same_bits(hl.vjp(lambda w: hl.conv2d(x, w, b), w)[1](g)[0], gw, "by the weight alone")
        assert_same_bits(hl.vjp(lambda b: hl.conv2d(x, w, b), b)[1](g)[0], gb, "by the bias alone")
        for needs in ((True, False, True), (False, True, False)):
            for part, whole, wanted in zip(hl.conv2d_backward(g, x, w, needs=needs), (gx, gw, gb), needs, strict=True):
                assert part is None if not wanted else part.tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", COMPILED)
def test_plans_refuse_layouts_that_kernels_cannot_read(name):
    base = np.random.default_rng(0).standard_normal((4, 20)).astype(np.float32)
    misaligned = np.frombuffer(b"x" + base.tobytes(), np.uint8)[1:].view(np.float32).reshape(base.shape)
    reversed_rows, read_only = base[::-1], base.copy()
    read_only.flags.writeable = False
    with hl.backend(name):
        expected = hl.softmax(base)
        assert not misaligned.flags.aligned
        for x in (misaligned, read_only, np.asfortranarray(base)):
            assert_same_bits(hl.softmax(x), expected, "softmax")
        assert_same_bits(hl.softmax(reversed_rows), expected[::-1], "softmax of rows backwards")


def views(array):
    """The same values in views: of a wider array, backwards, by columns, misaligned."""
    wide = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
    wide[..., 2:-1] = array
    yield wide[..., 2:-1]
    yield np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    yield np.asfortranarray(array)
    yield np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("op", [k for k in RECORDED if not k.startswith("attention")])
@pytest.mark.parametrize("name", COMPILED)
def test_calls_of_small_views_repeat(name, op, monkeypatch):
    """They have the bits of the call of their copies, by whatever way, and take the short way too."""
    function, shapes = RECORDED[op]
    arrays = [draw(np.random.default_rng(3), *shape) for shape in shapes]
    every = list(zip(*map(views, arrays), strict=True))
    with hl.backend(name):
        expected = [function(*laid) for laid in every]
        for y in expected:
            assert_same_bits(y, function(*arrays), op)
        monkeypatch.setattr(_dispatch, "run", None)  # the long way goes through it
        for laid, y in zip(every, expected, strict=True):
            assert_same_bits(function(*laid), y, op)


@needs_c
def test_views_of_one_array_and_of_the_result():
    """The first call reads one array through both arguments, or writes where it reads; later ones do not."""
    base = np.array([[0, 0, 0, 2, 2, 0], [0, 1, 1, 3, 3, 0]], np.float32)
    a, b = base[:, 1:5], base[:, 1:5] + 10
    hl.box_iou(a, a)
    assert not hl.box_iou(a, b).any()
    for _ in range(2):
        x = draw(np.random.default_rng(4), 6, 6)
        expected = hl.softmax(x.T.copy())
        assert_same_bits(hl.softmax(x.T, out=x), expected, "over its transposed view")


# ------------------------------------------------------------------------------------------------ memory for results


@needs_c
def test_large_results_are_arrays_like_any_other():
    shape = (1 << 10, 300)
    a = _memory.empty(shape, np.dtype(np.float32))
    assert a.shape == shape
    assert a.flags.writeable
    assert a.flags.c_contiguous
    assert a.flags.aligned
    a[...] = 1
    view, address = a[5:7], a.__array_interface__["data"][0]
    del a
    gc.collect()
    b = _memory.empty(shape, np.dtype(np.float32))
    b[...] = 2
    assert (view == 1).all(), "a block went back to the cache while a view of it was alive"
    del view, b
    again = {_memory.empty(shape, np.dtype(np.float32)).__array_interface__["data"][0] for _ in range(3)}
    assert len(again) == 1 or address in again


@needs_c
def test_no_room():
    with pytest.raises(MemoryError):
        _memory.empty((1 << 50,), np.dtype(np.float32))


# ------------------------------------------------------------------------------------------------------- GPU arrays


@pytest.mark.skipif(not SIMULATED, reason="runs in the CUDA simulator (NUMBA_ENABLE_CUDASIM=1) or on a GPU")
def test_device_arrays():
    """What comes from the GPU stays there, and comes back as the same kind."""
    from numba import cuda

    device = cuda.to_device(X)
    result = hl.softmax(device, 1)
    assert type(result) is type(device)
    np.testing.assert_allclose(result.copy_to_host().sum(axis=1), 1, rtol=1e-6)
    assert hl.explain(hl.softmax, device).backend == "cuda"
    with hl.backend("reference"), pytest.raises(BackendUnavailableError, match="on a GPU"):
        hl.softmax(device)
    with hl.backend("cuda"):
        assert type(hl.softmax(X)) is np.ndarray


@needs_c
def test_options_in_arrays_are_no_part_of_a_plan():
    """Arrays that no kernel reads are options: their values decide, in every call."""
    x = np.arange(50, dtype=np.float32).reshape(1, 2, 5, 5)
    w = np.ones((1, 2, 1, 1), np.float32)
    for _ in range(2):
        assert hl.conv2d(x, w, None, np.array([1, 1])).shape == (1, 1, 5, 5)
        assert hl.conv2d(x, w, None, np.array([2, 2])).shape == (1, 1, 3, 3)
        assert hl.max_pool2d(x, np.array([2, 2])).shape == (1, 2, 2, 2)
        assert hl.max_pool2d(x, np.array([5, 5])).shape == (1, 2, 1, 1)
        np.testing.assert_allclose(hl.softmax(X, np.array(0)).sum(axis=0), 1, rtol=1e-6)
        np.testing.assert_allclose(hl.softmax(X, np.array(1)).sum(axis=1), 1, rtol=1e-6)
        with pytest.raises(ValueError, match="stride"):
            hl.conv2d(x, w, None, np.array([0, -1]))
