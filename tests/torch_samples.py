"""torch's own sample inputs and error inputs for a function, run through the function of the same name here.

@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torch_samples(dtype):
    check_samples("nn.functional.conv2d", hl.conv2d, dtype, terms=lambda args: args[1][0].size)
    check_errors("nn.functional.conv2d", hl.conv2d)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from compare import assert_oracle

import hotloops as hl

RENAMED = {"dim": "axis", "keepdim": "keepdims"}


def torch_op(name: str) -> Any:
    """torch's description of the function, or a skip where torch is not installed."""
    pytest.importorskip("torch", reason="torch 2.13 is the oracle")
    pytest.importorskip("expecttest", reason="torch's sample inputs need it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return next(op for op in op_db if op.name == name and not op.variant_test_name)


def to_numpy(x: Any) -> Any:
    """Tensors as arrays, everything else as it is."""
    import torch

    if isinstance(x, torch.Tensor):
        return x.detach().resolve_conj().resolve_neg().numpy().copy()
    return type(x)(to_numpy(v) for v in x) if isinstance(x, list | tuple) and not hasattr(x, "_fields") else x


def leaves(x: Any) -> list[Any]:
    return [leaf for v in x for leaf in leaves(v)] if isinstance(x, list | tuple) else [x]


def check_samples(
    name: str,
    function: Callable[..., Any],
    dtype: str,
    *,
    terms: Callable[[list[Any]], float] = lambda args: 64.0,
    gradients: bool = True,
) -> int:
    """Compares values, and gradients by every float input; returns how many samples there were. `terms` says how many
    products a result sums, from the arguments, for the tolerance."""
    op, count = torch_op(name), 0
    import torch

    for sample in op.sample_inputs("cpu", getattr(torch, dtype), requires_grad=gradients):
        tensors = [sample.input, *sample.args]
        expected = op(*tensors, **sample.kwargs)
        args = [to_numpy(t) for t in tensors]
        kwargs = {RENAMED.get(k, k): to_numpy(v) for k, v in sample.kwargs.items()}
        what = f"{name}, {[getattr(a, 'shape', a) for a in args]}, { {k: getattr(v, 'shape', v) for k, v in kwargs.items()} }"
        actual = function(*args, **kwargs)
        for a, e in zip(leaves(actual), leaves(expected), strict=True):
            assert_oracle(a, to_numpy(e), terms=terms(args), what=what)
        if gradients:
            check_gradients(function, tensors, sample.kwargs, args, kwargs, expected, terms(args), what)
        count += 1
    assert count, f"torch has no samples for {name}"
    return count


def check_gradients(
    function: Any,
    tensors: list[Any],
    torch_kwargs: dict[str, Any],
    args: list[Any],
    kwargs: dict[str, Any],
    expected: Any,
    terms: float,
    what: str,
) -> None:
    import torch

    places = [i for i, t in enumerate(tensors) if isinstance(t, torch.Tensor) and t.requires_grad]
    names = [k for k, t in torch_kwargs.items() if isinstance(t, torch.Tensor) and t.requires_grad]
    outputs = [e for e in leaves(expected) if e.requires_grad]
    if not outputs or not places + names:
        return
    generator = np.random.default_rng(0)
    dy = [generator.standard_normal(tuple(e.shape)).astype(to_numpy(e).dtype) for e in outputs]
    wrt = [tensors[i] for i in places] + [torch_kwargs[k] for k in names]
    truth = torch.autograd.grad(outputs, wrt, [torch.from_numpy(np.array(d)) for d in dy], allow_unused=True)

    def call(*values: Any) -> Any:
        full, named = list(args), dict(kwargs)
        for i, v in zip(places, values, strict=False):
            full[i] = v
        for k, v in zip(names, values[len(places) :], strict=True):
            named[RENAMED.get(k, k)] = v
        return function(*full, **named)

    y, pullback = hl.vjp(call, *[args[i] for i in places], *[kwargs[RENAMED.get(k, k)] for k in names])
    given = iter(dy)
    seeds = [next(given) if e.requires_grad else None for e in leaves(expected)]
    pulled = pullback(type(y)(seeds) if isinstance(y, list | tuple) else seeds[0])
    for k, (g, t) in enumerate(zip(pulled, truth, strict=True)):
        t = np.zeros_like(g) if t is None else to_numpy(t)
        assert_oracle(g, t, terms=max(terms, y.size if isinstance(y, np.ndarray) else 64), what=f"{what}: gradient {k}")


def check_errors(name: str, function: Callable[..., Any], allowed: Callable[[str], bool] = lambda text: False) -> int:
    """Every call that torch refuses is refused here with a TypeError or ValueError; `allowed(torch's text)` names what is
    legal here. Returns how many there were."""
    op, count = torch_op(name), 0
    if op.error_inputs_func is None:
        return 0
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        args = [to_numpy(t) for t in (sample.input, *sample.args)]
        kwargs = {RENAMED.get(k, k): to_numpy(v) for k, v in sample.kwargs.items()}
        count += 1
        if allowed(str(error.error_regex)):
            continue
        try:
            function(*args, **kwargs)
        except (TypeError, ValueError):
            continue
        pytest.fail(
            f"{name}: torch refuses {[getattr(a, 'shape', a) for a in args]}, {kwargs} ({error.error_regex}); here it passed"
        )
    return count
