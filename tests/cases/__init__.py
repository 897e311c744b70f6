"""The inputs of the kernels' tests, one file a family; the benchmarks' inputs are cases too.

A family file holds `CASES = {kernel: [case(...), ...]}`. A case gives the value of every size and every scalar of the
kernel's record by name. An array's elements are drawn for it (normal ones, and in a second run small integers, which make
sums exact), unless the case gives a function (rng, shape, dtype) -> array; `name=None` leaves an optional array out.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import numpy as np

from hotloops.kernels import spec

ELEMENTS = {"i64": np.int64, "u8": np.uint8}
POISON = {"f": np.nan, "i": -77, "u": 77}


@dataclass(frozen=True, eq=False)  # each is itself: results are kept by case
class Case:
    id: str
    values: dict[str, Any]


def case(id: str, **values: Any) -> Case:
    return Case(id, values)


def all_cases() -> dict[str, list[Case]]:
    """Every case by kernel; the family files are found, not listed."""
    found: dict[str, list[Case]] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").CASES
    return found


def build(
    record: spec.Kernel, case: Case, dtype: Any, fill: str, seed: int = 0
) -> tuple[list[Any], dict[str, int], dict[str, Any]]:
    """(arrays, sizes, scalars) of a case; outputs are poisoned, so that an element left unwritten shows."""
    rng = np.random.default_rng([seed, *case.id.encode()])
    missing = [n for n in (*record.dims, *(s.name for s in record.scalars)) if n not in case.values]
    if missing:
        raise KeyError(f"{record.name}, case {case.id}: {', '.join(missing)} not given")
    sizes = {n: case.values[n] for n in record.dims}
    scalars = {s.name: case.values[s.name] for s in record.scalars}
    arrays: list[Any] = []
    for a in record.arrays:
        shape = tuple(int(spec.evaluate(d, sizes)) for d in a.dims)
        element = np.dtype(ELEMENTS.get(a.dtype, dtype))
        given = case.values.get(a.name, ...)
        if given is None:
            arrays.append(None)
        elif given is not ...:
            arrays.append(np.ascontiguousarray(given(rng, shape, element), dtype=element).reshape(shape))
        elif a.role == "out":
            arrays.append(np.full(shape, POISON[element.kind], element))
        elif element.kind == "f" and fill == "normal":
            arrays.append(rng.standard_normal(shape).astype(element))
        else:
            low = -3 if element.kind == "f" else 0
            arrays.append(rng.integers(low, 4, shape).astype(element))
    return arrays, sizes, scalars
