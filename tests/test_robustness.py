"""Every op, every backend of the host: layouts, element types, `out=`, hostile arguments and shapes."""

from __future__ import annotations

import contextlib
import inspect
import warnings

import numpy as np
import pytest
from calls import CALLS
from compare import assert_same_bits

import hotloops as hl

OPS = sorted(name for name in CALLS if hasattr(hl, name))
EXPECTED_ERRORS = (TypeError, ValueError, MemoryError)  # AxisError is a ValueError


def make(name, dtype=np.float32):
    args, kwargs = CALLS[name](np.random.default_rng(5), dtype)
    return list(args), dict(kwargs)


def leaves(x):
    if isinstance(x, tuple | list):
        return [leaf for v in x for leaf in leaves(v)]
    return [x]


def results(name, args, kwargs):
    return [np.asarray(r) for r in leaves(getattr(hl, name)(*args, **kwargs)) if isinstance(r, np.ndarray | np.generic)]


def float_places(args):
    """Where the float arrays are: an index, or (index, index in a list)."""
    for i, a in enumerate(args):
        if isinstance(a, np.ndarray) and a.dtype.kind == "f":
            yield (i,)
        elif isinstance(a, list | tuple):
            yield from ((i, k) for k, v in enumerate(a) if isinstance(v, np.ndarray) and v.dtype.kind == "f")


def at(args, place):
    return args[place[0]] if len(place) == 1 else args[place[0]][place[1]]


def replaced(args, place, value):
    args = list(args)
    if len(place) == 1:
        args[place[0]] = value
    else:
        inner = list(args[place[0]])
        inner[place[1]] = value
        args[place[0]] = type(args[place[0]])(inner)
    return args


def misaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def spread(a):
    """Every second element of a larger array, along each axis."""
    big = np.full([2 * n for n in a.shape], np.nan, a.dtype)
    view = big[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def frozen(a):
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS = {
    "fortran": lambda a: np.asfortranarray(a),
    "reversed": lambda a: a[tuple(slice(None, None, -1) for _ in a.shape)].copy()[tuple(slice(None, None, -1) for _ in a.shape)],
    "strided": spread,
    "misaligned": misaligned,
    "swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "read_only": frozen,
    "subclass": lambda a: a.view(type("Plain", (np.ndarray,), {})),
}


def test_every_op_has_a_call():
    ops = {name for name, value in vars(hl).items() if hasattr(value, "signature") and not name.startswith("_")}
    assert ops - set(CALLS) == set()


@pytest.mark.parametrize("name", OPS)
def test_layouts(name, host_backend):
    """Any strides, byte order, alignment and read-only flag gives bit for bit the result of the contiguous copy."""
    args, kwargs = make(name)
    expected = results(name, args, kwargs)
    for place in float_places(args):
        for layout, change in LAYOUTS.items():
            changed = change(at(args, place))
            before = changed.copy()
            actual = results(name, replaced(args, place, changed), kwargs)
            for a, e in zip(actual, expected, strict=True):
                assert type(a) is np.ndarray
                assert a.dtype.isnative
                assert_same_bits(a, e, f"{name}, {layout}, argument {place}")
            np.testing.assert_array_equal(changed, before, err_msg=f"{name} wrote into its argument {place}")


@pytest.mark.parametrize("name", OPS)
def test_broadcast_input(name, host_backend):
    """An array of one repeated element (all strides 0) gives the result of its copy."""
    args, kwargs = make(name)
    for place in float_places(args):
        a = at(args, place)
        constant = np.broadcast_to(a.reshape(-1)[:1].reshape((1,) * a.ndim), a.shape)
        for x, e in zip(
            results(name, replaced(args, place, constant), kwargs),
            results(name, replaced(args, place, constant.copy()), kwargs),
            strict=True,
        ):
            assert_same_bits(x, e, f"{name}, argument {place}")


@pytest.mark.parametrize("name", OPS)
def test_results_are_fresh(name, host_backend):
    """No result shares memory with an input, and a second call gives the same bits."""
    args, kwargs = make(name)
    first, second = results(name, args, kwargs), results(name, args, kwargs)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b, name)
        assert a.flags.writeable
        for value in leaves(args):
            assert not (isinstance(value, np.ndarray) and np.may_share_memory(a, value)), name
        assert not np.may_share_memory(a, b) or not a.size


@pytest.mark.parametrize("name", OPS)
def test_element_types(name, host_backend):
    """float16 comes back as float16, computed in float32; float64 stays float64."""
    half, kwargs = make(name, np.float16)
    if not list(float_places(half)):
        pytest.skip("takes no float array")
    single = [_as_single(a) for a in half]
    for a, e in zip(results(name, half, kwargs), results(name, single, kwargs), strict=True):
        if e.dtype == np.float32:
            assert_same_bits(a, e.astype(np.float16), name)
        else:
            assert_same_bits(a, e, name)
    double, kwargs = make(name, np.float64)
    assert all(r.dtype != np.float32 for r in results(name, double, kwargs))


def _as_single(a):
    if isinstance(a, np.ndarray):
        return a.astype(np.float32) if a.dtype == np.float16 else a
    return type(a)(_as_single(v) for v in a) if isinstance(a, list | tuple) else a


@pytest.mark.parametrize("name", OPS)
def test_refused_kinds(name):
    """Masked arrays, matrices, object, string, complex and date arrays are TypeErrors that name the op."""
    args, kwargs = make(name)
    for place in float_places(args):
        a = at(args, place)
        refused = {
            "masked": np.ma.masked_array(a),
            "object": a.astype(object),
            "string": a.astype(str),
            "complex": a.astype(complex),
            "date": np.zeros(a.shape, "M8[s]"),
            "dict": {"a": 1},
            "text": "abc",
        }
        if a.ndim == 2:
            refused["matrix"] = np.matrix(a)
        for kind, value in refused.items():
            with pytest.raises(TypeError) as caught:
                getattr(hl, name)(*replaced(args, place, value), **kwargs)
            assert name.rstrip("123d") in str(caught.value), f"{kind}: {caught.value}"


WITH_OUT = [name for name in OPS if "out" in inspect.signature(getattr(hl, name)).parameters]


@pytest.mark.parametrize("name", WITH_OUT)
def test_out(name, host_backend):
    args, kwargs = make(name)
    op = getattr(hl, name)
    [expected] = results(name, args, kwargs)
    for make_out in (
        lambda: np.full_like(expected, 77),
        lambda: np.full_like(expected, 78),
        lambda: spread(np.full_like(expected, 77)),
        lambda: misaligned(np.full_like(expected, 77)),
        lambda: np.full_like(expected, 79),
    ):
        out = make_out()
        assert op(*args, **kwargs, out=out) is out
        assert_same_bits(out, expected, f"{name}, out=")


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_overlaps_an_input(name, host_backend):
    """The answer is as if it did not, wherever out begins inside the input's memory."""
    args, kwargs = make(name)
    [expected] = results(name, args, kwargs)
    getattr(hl, name)(*args, **kwargs, out=np.empty_like(expected))  # with it the short way of calls that repeat is there
    for place in float_places(args):
        a = at(args, place)
        if a.dtype != expected.dtype:
            continue
        for shift in (0, 1, a.size // 2, -1, -(expected.size // 2)):
            room = np.zeros(a.size + expected.size + abs(shift) + 2, a.dtype)
            start = max(0, -shift)
            source = room[start : start + a.size].reshape(a.shape)
            source[...] = a
            out = room[start + shift : start + shift + expected.size].reshape(expected.shape)
            getattr(hl, name)(*replaced(args, place, source), **kwargs, out=out)
            assert_same_bits(out, expected, f"{name}, argument {place}, shift {shift}")


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_refused(name, host_backend):
    """A wrong out is refused before anything is written, after a right one, too."""
    args, kwargs = make(name)
    op = getattr(hl, name)
    [expected] = results(name, args, kwargs)
    op(*args, **kwargs, out=np.empty_like(expected))
    for bad, error in (
        (np.zeros((*expected.shape, 1), expected.dtype), ValueError),
        (np.zeros(expected.shape, np.complex128), TypeError),
        (np.zeros(expected.shape, np.float16), TypeError),
        (frozen(np.zeros_like(expected)), ValueError),
        (expected.tolist(), TypeError),
        (np.ma.zeros(expected.shape, expected.dtype), TypeError),
    ):
        with pytest.raises(error, match="out"):
            op(*args, **kwargs, out=bad)
        assert not np.any(np.asarray(bad)) or isinstance(bad, list)


HOSTILE = [
    0, 1, -1, 2, 10**30, -(10**30), 2**31 - 1, 2**31, 2**63 - 1, -(2**63), True, 1.5, float("nan"), float("inf"), 1e30, 1e-30,
    "x", "same ", "valid", "", None, (), (1,), (2, -1), (1, 0), (3, 3, 3, 3, 3), [0], ((1, 2), (0, 1)), np.int8(-1),
    np.uint64(2**63), np.array(2), np.array([2, 1]), np.float32(2.5), object(), b"y", 3 + 1j, {}, lambda: 0,
]  # fmt: skip


def survives(name, args, kwargs, what):
    """The call gives a result, or an error of the expected kind whose text is short and names the op or an argument."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            getattr(hl, name)(*args, **kwargs)
        except EXPECTED_ERRORS as error:
            assert str(error), f"{name}: {what}: an error without a text"
            assert len(str(error)) < 1000, f"{name}: {what}: an error text of {len(str(error))} characters"


@pytest.mark.parametrize("name", OPS)
def test_hostile_options(name, host_backend):
    """Every argument that is no array, with every hostile value: an error that says what is wrong, or a result."""
    args, kwargs = make(name)
    names = list(inspect.signature(getattr(hl, name)).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    for parameter in names:
        if parameter == "out" or isinstance(given.get(parameter), np.ndarray | list):
            continue
        for value in HOSTILE:
            survives(name, (), given | {parameter: value}, f"{parameter}={value!r}")


@pytest.mark.parametrize("name", OPS)
def test_hostile_arrays(name, host_backend):
    """Every array argument with other ranks, other sizes, empty, and of extreme values."""
    args, kwargs = make(name)
    for place in float_places(args):
        a = at(args, place)
        rng = np.random.default_rng(0)
        others = [np.zeros(shape, a.dtype) for n in range(6) for shape in ((1,) * n, (2,) * n, (0,) * n)]
        for i in range(a.ndim):
            for n in (0, 1, a.shape[i] - 1, a.shape[i] + 1, 37):
                others.append(np.zeros([*a.shape[:i], n, *a.shape[i + 1 :]], a.dtype))
        others += [np.full_like(a, v) for v in (np.nan, np.inf, -np.inf, 1e38, -1e38, 1e9, 1e-42, 0)]
        others.append(rng.choice(np.array([np.nan, np.inf, -np.inf, 1e38, -1e9, 0, 1e-42], a.dtype), a.shape))
        others += [a.astype(np.float64), a.astype(np.int64), a.astype(bool), a.astype(np.uint8), None, [], [[]], 3.5, [1.0, [2.0]]]
        for other in others:
            survives(name, replaced(args, place, other), kwargs, f"argument {place}: {other!r}"[:200])


@pytest.mark.parametrize("name", OPS)
def test_huge_shapes(name):
    """Arrays of one repeated element with more elements than memory holds: an error, at once, and no crash."""
    args, kwargs = make(name)
    for place in float_places(args):
        a = at(args, place)
        for i in range(a.ndim):
            shape = [*a.shape[:i], 2**45, *a.shape[i + 1 :]]
            with contextlib.suppress(ValueError):  # NumPy itself refuses some
                survives(name, replaced(args, place, np.broadcast_to(a.dtype.type(1), shape)), kwargs, f"argument {place}: {shape}")


def test_denormals_survive():
    """No import and no call changes how the processor treats denormal numbers."""
    tiny = np.full(100, 1e-40, np.float32)
    hl.softmax(tiny)
    assert (tiny * np.float32(1) == tiny).all()
    assert (tiny / np.float32(2) > 0).all()
