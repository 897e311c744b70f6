"""Recurrent layers: plain, LSTM and GRU over sequences, and their single steps.

A layer is one walk over the steps (kernels `lstm_sequence`, `gru_sequence`, `rnn_sequence`), and one back; the gradients of
input, weights and biases are then products over all steps at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import _check
from ._check import Call, op

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass
class _Layer:
    """One layer in one direction: its weights, its first state and (of a recorded call) what its gradient needs."""

    w_ih: Any
    w_hh: Any
    b_ih: Any
    b_hh: Any
    peephole: Any
    h0: Any
    c0: Any
    reverse: int
    x: Any = None
    gates: Any = None
    kept: Any = None  # lstm: the cells; gru: `hidden`
    previous: Any = None


@dataclass
class _Run:
    """A checked call: what every layer of it shares."""

    call: Call
    kind: str
    layers: list[_Layer]
    directions: int
    lengths: Any
    options: dict[str, Any]
    T: int
    N: int
    H: int
    batch_first: bool
    unbatched: bool
    biases: int  # bias arrays of a layer: 0 or 2
    output: Any = None  # of a cell, [1, N, H]: its h once more


def _start(kind: str, op: str, a: Any, options: dict[str, Any]) -> _Run:
    """Checks the arguments `a` of a layer call and brings its arrays into one float type."""
    call = Call(op)
    hx, weights, peephole = a.hx, a.weights, getattr(a, "peephole", None)
    directions = 2 if _check.flag(op, "bidirectional", a.bidirectional) else 1
    batch_first = _check.flag(op, "batch_first", a.batch_first)
    if not isinstance(weights, list | tuple) or not weights:
        raise TypeError(
            f"{op}: weights must be a list of arrays (w_ih, w_hh, b_ih, b_hh per layer and direction), {_check.shown(weights)} came"
        )
    if kind == "lstm":
        if hx is not None and not (isinstance(hx, list | tuple) and len(hx) == 2):
            raise TypeError(f"{op}: hx must be None or a pair (h0, c0), {_check.shown(hx)} came")
        h0, c0 = (None, None) if hx is None else hx
        if (h0 is None) != (c0 is None):
            raise TypeError(f"{op}: hx must be None or a pair of arrays (h0, c0), one of them is None")
    else:
        h0, c0 = hx, None
    named = {"input": a.input, "h0": h0, "c0": c0, "peephole": peephole}
    arrays = call.floats(**named, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    x, h0, c0, peephole = arrays[:4]
    flat = arrays[4:]
    for i, w in enumerate(flat):
        if w is None:
            raise TypeError(f"{op}: weights[{i}] must be an array, None came (leave both biases out of every layer)")
    biases = 2 if len(flat) > 2 and flat[2].ndim == 1 else 0
    each = 2 + biases
    layers = len(flat) // (each * directions) if a.num_layers is None else _check.integer(op, "num_layers", a.num_layers, 1)
    if len(flat) != layers * directions * each or not layers:
        raise ValueError(
            f"{op}: weights has {len(flat)} arrays; {max(layers, 1)} layers in {directions} direction(s) with {each} arrays each"
            f" (w_ih, w_hh{', b_ih, b_hh' if biases else ''}) need {max(layers, 1) * directions * each}"
        )
    if x.ndim not in (2, 3):
        raise ValueError(f"{op}: input has the shape {tuple(x.shape)}, [T, N, D] or [T, D] is needed")
    unbatched = x.ndim == 2
    if unbatched:
        x = x.reshape((x.shape[0], 1, x.shape[1]))
    elif batch_first:
        x = call.transposed(x, (1, 0, 2))
    T, N, D = x.shape
    G = _GATES[kind]
    if flat[1].ndim != 2 or flat[1].shape[0] != G * flat[1].shape[1]:
        raise ValueError(f"{op}: weights[1] has the shape {tuple(flat[1].shape)}, [{G}*H, H] is needed for w_hh")
    H = flat[1].shape[1]
    if H == 0:
        raise ValueError(f"{op}: the hidden size of weights[1] is 0, at least 1 is needed")
    count = layers * directions
    states = []
    for name, state in (("h0", h0), ("c0", c0))[: 1 + (kind == "lstm")]:
        shape = (count, H) if unbatched else (count, N, H)
        if state is None:
            states.append(call.zeros((count, N, H)))
        elif tuple(state.shape) != shape:
            raise ValueError(f"{op}: {name} has the shape {tuple(state.shape)}, {shape} is needed")
        else:
            states.append(state.reshape((count, N, H)))
    if peephole is not None:
        if tuple(peephole.shape) not in (((3, H), (1, 3, H)) if count == 1 else ((count, 3, H),)):
            raise ValueError(
                f"{op}: peephole has the shape {tuple(peephole.shape)}, {(3, H) if count == 1 else (count, 3, H)} is needed"
            )
        peephole = peephole.reshape((count, 3, H))
    steps = None
    if a.lengths is not None:
        steps = call.indices("lengths", a.lengths)
        if tuple(steps.shape) != (N,):
            raise ValueError(f"{op}: lengths has the shape {tuple(steps.shape)}, one length per sample, ({N},), is needed")
        for n, length in enumerate(call.get(steps)):
            if not 0 <= length <= T:
                raise ValueError(f"{op}: lengths[{n}] is {length}, 0 to the {T} steps of the input are possible")
    made = []
    for k in range(count):
        w = flat[k * each : (k + 1) * each]
        wanted = [(G * H, D if k < directions else directions * H), (G * H, H), (G * H,), (G * H,)][:each]
        for j, (array, shape) in enumerate(zip(w, wanted, strict=True)):
            if tuple(array.shape) != shape:
                name = ("w_ih", "w_hh", "b_ih", "b_hh")[j]
                raise ValueError(f"{op}: weights[{k * each + j}] ({name}) has the shape {tuple(array.shape)}, {shape} is needed")
        b_ih, b_hh = w[2:] if biases else (None, None)
        layer_peephole = None if peephole is None else peephole[k]
        h0, c0 = (*(s[k] for s in states), None)[:2]
        made.append(_Layer(w[0], w[1], b_ih, b_hh, layer_peephole, h0, c0, k % directions))
    run = _Run(call, kind, made, directions, steps, options, T, N, H, batch_first, unbatched, biases)
    made[0].x = x
    _check.size(op, "the gates", (T, N, G * H), call.compute.itemsize)
    return run


def _forward(run: _Run, training: bool) -> tuple[Any, Any, Any]:
    """(output [T, N, directions H], h_n, c_n); with `training` each layer keeps what its gradient needs."""
    call, T, N, H, G = run.call, run.T, run.N, run.H, _GATES[run.kind]
    h_n = call.empty((len(run.layers), N, H))
    c_n: Any = call.empty((len(run.layers), N, H)) if run.kind == "lstm" else None
    x = run.layers[0].x
    for first in range(0, len(run.layers), run.directions):
        outputs = []
        for k in range(first, first + run.directions):
            layer = run.layers[k]
            y = call.empty((T, N, H))
            gates = call.empty((T, N, G * H)) if training else None
            kept = call.empty((T, N, H)) if training and run.kind != "rnn" else None
            previous = call.empty((T, N, H)) if training else None
            inputs, hidden = (x, layer.w_ih, layer.b_ih, layer.h0), (layer.w_hh, layer.b_hh)
            arrays: tuple[Any, ...]
            if run.kind == "lstm":
                arrays = (*inputs, layer.c0, *hidden, layer.peephole, run.lengths, y, h_n[k], c_n[k], gates, kept, previous)
            elif run.kind == "gru":
                arrays = (*inputs, *hidden, run.lengths, y, h_n[k], gates, kept, previous)
            else:
                arrays = (*inputs, *hidden, run.lengths, y, h_n[k], gates, previous)
            call.run(f"{run.kind}_sequence", *arrays, reverse=layer.reverse, **run.options)
            if training:
                layer.x, layer.gates, layer.kept, layer.previous = x, gates, kept, previous
            outputs.append(y)
        x = outputs[0] if run.directions == 1 else call.joined(outputs)
    return x, h_n, c_n


def _backward(run: _Run, gy: Any, gh_n: Any, gc_n: Any) -> tuple[Any, Any, Any, list[Any], Any]:
    """Gradients of input, h0, c0, the flat list of weights, and the peephole weights."""
    call, T, N, H, G = run.call, run.T, run.N, run.H, _GATES[run.kind]
    rows, count = T * N, len(run.layers)
    gh0, gc0 = call.empty((count, N, H)), call.empty((count, N, H))
    peepholes = None if run.layers[0].peephole is None else call.empty((count, 3, H))
    weights: list[Any] = [None] * (count * (2 + run.biases))
    for first in reversed(range(0, count, run.directions)):
        gx = None
        for k in range(first, first + run.directions):
            layer = run.layers[k]
            direction = k - first
            part = gy if run.directions == 1 else call.part(gy, direction * H, (direction + 1) * H)
            gpre = call.empty((T, N, G * H))
            ghidden = gpre
            if run.kind == "lstm":
                call.run(
                    "lstm_sequence_backward",
                    *(part, gh_n[k], gc_n[k], layer.gates, layer.kept, layer.c0, layer.w_hh, layer.peephole, run.lengths),
                    *(gpre, gh0[k], gc0[k]),
                    reverse=layer.reverse,
                    **run.options,
                )
                if peepholes is not None:
                    call.run("lstm_peephole_grad", gpre, layer.kept, layer.c0, run.lengths, peepholes[k], reverse=layer.reverse)
            elif run.kind == "gru":
                ghidden = call.empty((T, N, G * H))
                call.run(
                    "gru_sequence_backward",
                    *(part, gh_n[k], layer.gates, layer.kept, layer.previous, layer.w_hh, run.lengths),
                    *(gpre, ghidden, gh0[k]),
                    reverse=layer.reverse,
                    **run.options,
                )
            else:
                call.run(
                    "rnn_sequence_backward",
                    *(part, gh_n[k], layer.gates, layer.w_hh, run.lengths, gpre, gh0[k]),
                    reverse=layer.reverse,
                    **run.options,
                )
            D = layer.x.shape[2]
            gpre, ghidden = gpre.reshape((rows, G * H)), ghidden.reshape((rows, G * H))
            gw_ih, gw_hh = call.empty((G * H, D)), call.empty((G * H, H))
            call.run("linear_grad_weight", gpre, layer.x.reshape((rows, D)), gw_ih)
            call.run("linear_grad_weight", ghidden, layer.previous.reshape((rows, H)), gw_hh)
            if run.kind == "gru" and not run.options["reset_after"]:  # the last third was multiplied by r h, not by h
                other = call.empty((G * H, H))
                call.run("linear_grad_weight", ghidden, layer.kept.reshape((rows, H)), other)
                gw_hh[2 * H :] = other[2 * H :]
            at = k * (2 + run.biases)
            weights[at : at + 2] = gw_ih, gw_hh
            if run.biases:
                gb_ih, gb_hh = call.empty((G * H,)), call.empty((G * H,))
                call.run("linear_grad_bias", gpre, gb_ih)
                if run.kind == "gru":
                    call.run("linear_grad_bias", ghidden, gb_hh)
                else:
                    gb_hh[:] = gb_ih  # ghidden is gpre
                weights[at + 2 : at + 4] = gb_ih, gb_hh
            mine = call.empty((T, N, D))
            call.run("linear_grad_input", gpre, layer.w_ih, mine.reshape((rows, D)))
            gx = mine if gx is None else call.added(gx, mine)
        gy = gx
    return gy, gh0, gc0, weights, peepholes


def _output(run: _Run, y: Any) -> Any:
    """[T, N, K] as the caller counts its axes."""
    if run.unbatched:
        return y.reshape((run.T, y.shape[2]))
    return run.call.transposed(y, (1, 0, 2)) if run.batch_first else y


def _state(run: _Run, h: Any) -> Any:
    return h.reshape((h.shape[0], run.H)) if run.unbatched else h


def _sequence(kind: str, a: Any, options: dict[str, Any], training: bool) -> tuple[Any, _Run]:
    run = _start(kind, kind, a, options)
    y, h_n, c_n = _forward(run, training)
    finish = run.call.finish
    h = finish(_state(run, h_n))
    return (finish(_output(run, y)), (h, finish(_state(run, c_n))) if kind == "lstm" else h), run


def _gradient(g: Any, saved: _Run, a: Any) -> tuple[Any, ...]:
    """Gradients by input, hx, weights and peephole."""
    run = saved
    gy, gh = g
    gh, gc = gh if run.kind == "lstm" else (gh, None)
    call, count = run.call, len(run.layers)
    [gy, gh, gc] = call.more_floats(gy=gy, gh=gh, gc=gc)
    if run.unbatched:
        gy = gy.reshape((run.T, 1, gy.shape[1]))
    elif run.batch_first:
        gy = call.transposed(gy, (1, 0, 2))
    states = [None if s is None else s.reshape((count, run.N, run.H)) for s in (gh, gc)]
    gx, gh0, gc0, weights, peepholes = _backward(run, gy, *states)
    gx = _output(run, gx)
    gh0, gc0 = _state(run, gh0), _state(run, gc0)
    if peepholes is not None:
        peepholes = peepholes.reshape(np.shape(a.peephole))
    hx = None if a.hx is None else (gh0, gc0) if run.kind == "lstm" else gh0
    return (gx, hx, weights, peepholes) if run.kind == "lstm" else (gx, hx, weights)


# ---------------------------------------------------------------------------------------------------------- sequences


def _lstm_forward(a: Any, training: bool = True) -> tuple[Any, _Run]:
    """The result of a call of `lstm` with the arguments `a`, and the run with what its gradient needs."""
    clip = 0.0 if a.clip is None else _check.number("lstm", "clip", a.clip, 0.0)
    if a.clip is not None and clip == 0.0:
        raise ValueError("lstm: clip must be more than 0, 0 came")
    return _sequence("lstm", a, {"clip": clip}, training)


def _gru_forward(a: Any, training: bool = True) -> tuple[Any, _Run]:
    return _sequence("gru", a, {"reset_after": int(_check.flag("gru", "reset_after", a.reset_after))}, training)


def _rnn_forward(a: Any, training: bool = True) -> tuple[Any, _Run]:
    relu = _check.one_of("rnn", "nonlinearity", a.nonlinearity, ("tanh", "relu")) == "relu"
    return _sequence("rnn", a, {"relu": int(relu)}, training)


def _call(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """(output, last states ...) of the op `name`. Where that can be, each array becomes an argument of its own: calls that
    repeat are then seen (see `_plan`)."""
    pair, hx, weights = name.startswith("lstm"), arguments["hx"], arguments.get("weights", ())
    states = (hx,) if not pair else (None, None) if hx is None else hx
    if {type(states), type(weights)} <= {tuple, list} and len(states) == 1 + pair and arguments.get("lengths") is None:
        others = (v for n, v in arguments.items() if n not in ("hx", "weights"))
        return _flat_call(name, *others, *states, *weights)
    return _results(name, SimpleNamespace(**arguments))


@op(repeats=True)
def _flat_call(name: str, *flat: Any) -> tuple[Any, ...]:
    names = [n for n in inspect.signature(globals()[name]).parameters if n not in ("hx", "weights")]
    a, rest, count = SimpleNamespace(), flat[len(names) :], 1 + name.startswith("lstm")
    a.__dict__.update(zip(names, flat, strict=False))
    states, a.weights = rest[:count], rest[count:]
    a.hx = None if all(s is None for s in states) else states if count == 2 else states[0]
    return _results(name, a)


def _results(name: str, a: Any) -> tuple[Any, ...]:
    result, run = globals()[f"_{name}_forward"](a, training=False)
    output, states = (run.output, result) if name.endswith("_cell") else result
    return (output, *states) if run.kind == "lstm" else (output, states)


@op
def lstm(
    input: Any,
    hx: Any = None,
    weights: Sequence[Any] = (),
    *,
    num_layers: int | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Any = None,
    peephole: Any = None,
    clip: float | None = None,
) -> Any:
    """The hidden states of a long short-term memory over a sequence, and its last states.

    Parameters
    ----------
    input : float[T, N, D]
        A batch of N sequences of T steps; [N, T, D] with `batch_first`; [T, D] for one sequence.
    hx : (float[L, N, H], float[L, N, H]), optional
        The first hidden and cell states, L = layers times directions; zeros when absent. [L, H] for one sequence.
    weights : list of float arrays
        w_ih[4H, D], w_hh[4H, H], b_ih[4H], b_hh[4H] per layer and direction, gates in the order i f g o; both biases may be
        left out of all of them. From the second layer on D is H times the directions.
    num_layers : int, optional
        Checked against the number of weights.
    bidirectional, batch_first : bool
    lengths : int[N], optional
        How many steps of each sequence count, 0 to T. Outputs past it are 0, the backward direction begins at its last
        step, the last states are those after its last step.
    peephole : float[3, H], optional
        Weights (i, o, f) by which the gates see the cell; [L, 3, H] for more than one layer or direction.
    clip : float, optional
        Limits the arguments of the gates to [-clip, clip].

    Returns
    -------
    output : float[T, N, directions * H]
    (h_n, c_n) : float[L, N, H] each

    Raises
    ------
    TypeError, ValueError
        Shapes, counts or lengths that do not fit; an element type that is no float.

    Notes
    -----
    Source: Hochreiter and Schmidhuber (1997); peepholes: Gers and Schmidhuber (2000), in ONNX's order.

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> x, w = np.ones((5, 2, 3)), [np.ones((16, 3)), np.ones((16, 4)), np.zeros(16), np.zeros(16)]
    >>> output, (h, c) = hl.lstm(x, None, w)
    >>> output.shape, h.shape
    ((5, 2, 4), (1, 2, 4))
    """
    output, *states = _call("lstm", locals())
    return output, tuple(states)


@op
def gru(
    input: Any,
    hx: Any = None,
    weights: Sequence[Any] = (),
    *,
    num_layers: int | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Any = None,
    reset_after: bool = True,
) -> Any:
    """The hidden states of a gated recurrent unit over a sequence, and its last state.

    Parameters
    ----------
    input : float[T, N, D]
        As for `lstm`.
    hx : float[L, N, H], optional
        The first states; zeros when absent.
    weights : list of float arrays
        w_ih[3H, D], w_hh[3H, H], b_ih[3H], b_hh[3H] per layer and direction, gates in the order r z n.
    num_layers, bidirectional, batch_first, lengths
        As for `lstm`.
    reset_after : bool
        True: the reset gate multiplies the product with the state (torch, cuDNN); False: the state before the product.

    Returns
    -------
    output : float[T, N, directions * H]
    h_n : float[L, N, H]

    Raises
    ------
    TypeError, ValueError
        Shapes, counts or lengths that do not fit; an element type that is no float.

    Notes
    -----
    Source: Cho et al. (2014).

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> output, h = hl.gru(np.ones((5, 2, 3)), None, [np.ones((12, 3)), np.ones((12, 4))])
    >>> output.shape
    (5, 2, 4)
    """
    return _call("gru", locals())


@op
def rnn(
    input: Any,
    hx: Any = None,
    weights: Sequence[Any] = (),
    *,
    nonlinearity: str = "tanh",
    num_layers: int | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Any = None,
) -> Any:
    """The hidden states of a plain recurrent layer over a sequence, and its last state.

    Parameters
    ----------
    input : float[T, N, D]
        As for `lstm`.
    hx : float[L, N, H], optional
        The first states; zeros when absent.
    weights : list of float arrays
        w_ih[H, D], w_hh[H, H], b_ih[H], b_hh[H] per layer and direction.
    nonlinearity : {"tanh", "relu"}
    num_layers, bidirectional, batch_first, lengths
        As for `lstm`.

    Returns
    -------
    output : float[T, N, directions * H]
    h_n : float[L, N, H]

    Raises
    ------
    TypeError, ValueError
        Shapes, counts or lengths that do not fit; an element type that is no float.

    Notes
    -----
    Source: Elman (1990).

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> output, h = hl.rnn(np.zeros((5, 2, 3)), None, [np.ones((4, 3)), np.ones((4, 4))])
    >>> output.any()
    np.False_
    """
    return _call("rnn", locals())


# -------------------------------------------------------------------------------------------------------------- cells


def _lstm_cell_forward(a: Any, training: bool = True) -> tuple[Any, _Run]:
    return _cell("lstm", a, {"clip": 0.0}, training)


def _gru_cell_forward(a: Any, training: bool = True) -> tuple[Any, _Run]:
    return _cell("gru", a, {"reset_after": int(_check.flag("gru_cell", "reset_after", a.reset_after))}, training)


def _rnn_cell_forward(a: Any, training: bool = True) -> tuple[Any, _Run]:
    relu = _check.one_of("rnn_cell", "nonlinearity", a.nonlinearity, ("tanh", "relu")) == "relu"
    return _cell("rnn", a, {"relu": int(relu)}, training)


def _cell(kind: str, a: Any, options: dict[str, Any], training: bool) -> tuple[Any, _Run]:
    """A cell is its layer over one step."""
    op, pair, hx = f"{kind}_cell", kind == "lstm", a.hx
    if pair and hx is not None and not (isinstance(hx, list | tuple) and len(hx) == 2):
        raise TypeError(f"{op}: hx must be None or a pair (h, c), {_check.shown(hx)} came")
    if (a.b_ih is None) != (a.b_hh is None):
        raise TypeError(f"{op}: b_ih and b_hh must both be given or both be left out")
    for name in ("w_ih", "w_hh"):
        if getattr(a, name) is None:
            raise TypeError(f"{op}: {name} must be an array, None came")
    if hx is not None:
        hx = tuple(_with_axis(op, "hx", s) for s in hx) if pair else _with_axis(op, "hx", hx)
    layer = SimpleNamespace(
        input=_with_axis(op, "input", a.input),
        hx=hx,
        weights=[a.w_ih, a.w_hh] + ([] if a.b_ih is None else [a.b_ih, a.b_hh]),
        num_layers=1,
        bidirectional=False,
        batch_first=False,
        lengths=None,
    )
    run = _start(kind, op, layer, options)
    run.output, h_n, c_n = _forward(run, training)
    shape = (run.H,) if run.unbatched else (run.N, run.H)
    h = run.call.finish(h_n.reshape(shape))
    return (h, run.call.finish(c_n.reshape(shape))) if pair else h, run


def _with_axis(op: str, name: str, value: Any) -> Any:
    """The array with one more axis in front: one step, or one layer."""
    array = value if _check.is_device(value) else _check.host_array(op, name, value)
    if len(array.shape) not in (1, 2):
        raise ValueError(f"{op}: {name} has the shape {tuple(array.shape)}, [N, size] or [size] is needed")
    return array.reshape((1, *array.shape))


def _cell_gradient(g: Any, saved: _Run, a: Any) -> tuple[Any, ...]:
    run = saved
    gh, gc = g if run.kind == "lstm" else (g, None)
    call = run.call
    [gh, gc] = call.more_floats(gh=gh, gc=gc)
    states = [None if s is None else s.reshape((1, run.N, run.H)) for s in (gh, gc)]
    gx, gh0, gc0, weights, _ = _backward(run, None, *states)
    gx = gx.reshape(np.shape(a.input))
    shape = (run.H,) if run.unbatched else (run.N, run.H)
    gh0, gc0 = gh0.reshape(shape), gc0.reshape(shape)
    hx = None if a.hx is None else (gh0, gc0) if run.kind == "lstm" else gh0
    return (gx, hx, *weights, *([None] * (4 - len(weights))))


@op
def lstm_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """The states of a long short-term memory after one step.

    Parameters
    ----------
    input : float[N, D] or float[D]
    hx : (float[N, H], float[N, H]) or None
        The hidden and the cell state before the step; None: zeros.
    w_ih, w_hh, b_ih, b_hh : float[4H, D], float[4H, H], float[4H], float[4H]
        Gates in the order i f g o; both biases may be absent.

    Returns
    -------
    (h, c) : float[N, H] each

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit; an element type that is no float.

    Notes
    -----
    Source: Hochreiter and Schmidhuber (1997).

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> h, c = hl.lstm_cell(np.zeros((2, 3)), None, np.ones((16, 3)), np.ones((16, 4)))
    >>> h.shape
    (2, 4)
    """
    return _call("lstm_cell", locals())[1:]


@op
def gru_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, *, reset_after: bool = True) -> Any:
    """The state of a gated recurrent unit after one step.

    Parameters
    ----------
    input : float[N, D] or float[D]
    hx : float[N, H] or None
        The state before the step; None: zeros.
    w_ih, w_hh, b_ih, b_hh : float[3H, D], float[3H, H], float[3H], float[3H]
        Gates in the order r z n; both biases may be absent.
    reset_after : bool
        As for `gru`.

    Returns
    -------
    h : float[N, H]

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit; an element type that is no float.

    Notes
    -----
    Source: Cho et al. (2014).

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.gru_cell(np.zeros((2, 3)), None, np.ones((12, 3)), np.ones((12, 4))).shape
    (2, 4)
    """
    return _call("gru_cell", locals())[1]


@op
def rnn_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, *, nonlinearity: str = "tanh") -> Any:
    """The state of a plain recurrent layer after one step: tanh (or ReLU) of x W_ih^T + b_ih + h W_hh^T + b_hh.

    Parameters
    ----------
    input : float[N, D] or float[D]
    hx : float[N, H] or None
        The state before the step; None: zeros.
    w_ih, w_hh, b_ih, b_hh : float[H, D], float[H, H], float[H], float[H]
        Both biases may be absent.
    nonlinearity : {"tanh", "relu"}

    Returns
    -------
    h : float[N, H]

    Raises
    ------
    TypeError, ValueError
        Shapes that do not fit; an element type that is no float.

    Notes
    -----
    Source: Elman (1990).

    Examples
    --------
    >>> import numpy as np, hotloops as hl
    >>> hl.rnn_cell(np.zeros(3), None, np.ones((2, 3)), np.ones((2, 2)), np.zeros(2), np.zeros(2))
    array([0., 0.])
    """
    return _call("rnn_cell", locals())[1]


# -------------------------------------------------------------------------------------------------- orders of the gates


def _reordered(op: str, array: Any, order: tuple[int, ...]) -> np.ndarray:
    """The blocks of the first axis in another order."""
    a = _check.host_array(op, "array", array)
    if a.ndim not in (1, 2) or a.shape[0] % len(order):
        raise ValueError(f"{op}: array has the shape {a.shape}, [{len(order)}*H] or [{len(order)}*H, K] is needed")
    H = a.shape[0] // len(order)
    return np.concatenate([a[k * H : (k + 1) * H] for k in order])


def lstm_gates_to_onnx(array: Any) -> np.ndarray:
    """A weight or bias of an LSTM in ONNX's order of gates (i o f g), from ours and torch's (i f g o).

    Parameters
    ----------
    array : [4H] or [4H, K]

    Returns
    -------
    array of the same shape

    Raises
    ------
    ValueError
        A first axis that is no multiple of 4.

    Examples
    --------
    >>> lstm_gates_to_onnx([1, 2, 3, 4])
    array([1, 4, 2, 3])
    """
    return _reordered("lstm_gates_to_onnx", array, (0, 3, 1, 2))


def lstm_gates_from_onnx(array: Any) -> np.ndarray:
    """A weight or bias of an LSTM in our order of gates (i f g o), from ONNX's (i o f g).

    Parameters
    ----------
    array : [4H] or [4H, K]

    Returns
    -------
    array of the same shape

    Raises
    ------
    ValueError
        A first axis that is no multiple of 4.

    Examples
    --------
    >>> lstm_gates_from_onnx([1, 4, 2, 3])
    array([1, 2, 3, 4])
    """
    return _reordered("lstm_gates_from_onnx", array, (0, 2, 3, 1))


def gru_gates_to_onnx(array: Any) -> np.ndarray:
    """A weight or bias of a GRU in ONNX's order of gates (z r n), from ours and torch's (r z n).

    Parameters
    ----------
    array : [3H] or [3H, K]

    Returns
    -------
    array of the same shape

    Raises
    ------
    ValueError
        A first axis that is no multiple of 3.

    Examples
    --------
    >>> gru_gates_to_onnx([1, 2, 3])
    array([2, 1, 3])
    """
    return _reordered("gru_gates_to_onnx", array, (1, 0, 2))


def gru_gates_from_onnx(array: Any) -> np.ndarray:
    """A weight or bias of a GRU in our order of gates (r z n), from ONNX's (z r n).

    Parameters
    ----------
    array : [3H] or [3H, K]

    Returns
    -------
    array of the same shape

    Raises
    ------
    ValueError
        A first axis that is no multiple of 3.

    Examples
    --------
    >>> gru_gates_from_onnx([2, 1, 3])
    array([1, 2, 3])
    """
    return _reordered("gru_gates_from_onnx", array, (1, 0, 2))
