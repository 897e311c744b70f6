"""Weights that do not change: what kernels make of them is kept from call to call."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _memory

# The axes that the weights of an op may have; of recurrent ops those of a list are matrices, and biases of one axis.
_AXES = {
    **{f"conv{n}d": (n + 2,) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": (n + 2,) for n in (1, 2, 3)},
    "linear": (1, 2),
    "matmul": (2,),
}
_LISTS = ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")


class PackedWeight(np.ndarray):
    """A read-only array whose packed forms are kept while it lives; see `prepack`."""

    @property
    def packed_bytes(self) -> int:
        """The memory of the forms that calls have made of it so far."""
        library = _library()
        return library[1].hl_prepacked_bytes(_address(library[0], self)) if library else 0

    # What is computed from it is an array like any other.

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return array[()] if return_scalar else np.asarray(array)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __reduce__(self) -> Any:  # copy and pickle
        return _pack, (np.array(self, subok=False),)


def _library() -> Any:
    from ._backends import c

    ffi, lib, reason, _ = c._load()
    return None if reason else (ffi, lib)


def _address(ffi: Any, array: np.ndarray) -> Any:
    return ffi.cast("void *", array.__array_interface__["data"][0])


def _pack(weight: np.ndarray) -> PackedWeight:
    kept = _memory.empty(weight.shape, weight.dtype.newbyteorder("="))
    np.copyto(kept, weight)
    kept.flags.writeable = False
    library = _library()
    if library and kept.size:
        ffi, lib = library
        address = _address(ffi, kept)
        if lib.hl_prepack(address) != lib.HL_OK:
            raise MemoryError("prepack: no memory")
        owner = kept
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        # Every view of the memory, and so every call that reads it, holds the owner.
        weakref.finalize(owner, lib.hl_unprepack, address).atexit = False
    return kept.view(PackedWeight)


def prepack(op: Callable[..., Any], weight: Any, input_shape: Sequence[int] | None = None, **options: Any) -> Any:
    """The weight of an op as an array that keeps what its kernels make of it, for calls that repeat.

    A kernel brings its weights into an order that suits the processor, or transforms them (Winograd), and forgets that when it
    returns. Of a prepacked weight it is kept: the next call that needs the same form finds it. Pass the result wherever the
    weight goes; results are bit for bit those of the plain weight. It is a copy, and read-only; the forms live as long as it
    does, one for each algorithm and element type that calls use.

    Parameters
    ----------
    op : function
        conv1d to conv3d, conv_transpose1d to conv_transpose3d, linear, matmul (its second factor); lstm, gru, rnn and their
        cells.
    weight : float array, or sequence of them
        As `op` takes it. Recurrent ops take the list of all their weights (w_ih, w_hh, b_ih, b_hh, ...) and get such a list.
    input_shape : tuple of int, optional
        The shape of an input: then what calls on such inputs need is made now, else by the first call.
    **options
        The options of those calls (`stride=2, padding=1`), with `input_shape` only.

    Returns
    -------
    PackedWeight, or list of arrays
        An array, with the attribute `packed_bytes`: the memory of its packed forms. Other backends than C use it as it is.

    Raises
    ------
    TypeError
        `op` is none of those; an element type that is no float; an option that `op` has not.
    ValueError
        A weight with the wrong number of axes; what `op` raises for an input of that shape.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> w = hl.prepack(hl.linear, np.ones((2, 3)))
    >>> hl.linear(np.ones(3), w)
    array([3., 3.])
    """
    from . import _check

    known = (*_AXES, *_LISTS)
    name = getattr(op, "__name__", "")
    if not hasattr(op, "signature") or name not in known:
        raise TypeError(f"prepack: op must be one of hotloops' {', '.join(known)}; {_check.shown(op)} came")
    parameters = op.signature.parameters
    for option in options:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if option not in parameters or parameters[option].kind not in kinds:
            raise TypeError(f"prepack: {name} has no option {option!r}; it has {', '.join(parameters)}")
    if options and input_shape is None:
        raise TypeError(f"prepack: {', '.join(options)} mean nothing without input_shape; pass them to {name}")
    if name in _LISTS:
        if not isinstance(weight, list | tuple) or not weight:
            raise TypeError(f"prepack: weight must be the list of weights that {name} takes, {_check.shown(weight)} came")
        packed: Any = [_one(f"weight[{i}]", w, (1, 2), name) for i, w in enumerate(weight)]
    else:
        packed = _one("weight", weight, _AXES[name], name)
    if input_shape is not None:
        shape = tuple(_check.integer("prepack", "input_shape", n, 0) for n in input_shape)
        example = np.zeros(shape, (packed[0] if isinstance(packed, list) else packed).dtype)
        if name.endswith("_cell"):
            op(example, None, *packed, **options)
        elif name in _LISTS:
            op(example, None, packed, **options)
        else:
            op(example, packed, **options)
    return packed


def _one(what: str, weight: Any, axes: tuple[int, ...], op: str) -> Any:
    from . import _check

    if isinstance(weight, PackedWeight):
        return weight
    if weight is None or _check.is_device(weight):
        raise TypeError(f"prepack: {what} must be an array in host memory, {_check.shown(weight)} came")
    array = _check.host_array("prepack", what, weight)
    if array.dtype.kind != "f":
        raise TypeError(f"prepack: {what} has the element type {array.dtype}, float16, float32 or float64 is needed")
    if array.ndim not in axes:
        need = " or ".join(map(str, axes))
        raise ValueError(f"prepack: {what} has the shape {array.shape}, {need} axes are needed for {op}")
    return array if axes == (1, 2) and op != "linear" and array.ndim == 1 else _pack(array)
