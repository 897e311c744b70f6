"""Numba parameter names and the prototypes in hotloops.h agree with the records of the specification."""

from __future__ import annotations

import inspect
import pathlib
import re

import pytest

from hotloops import _dispatch
from hotloops.kernels import spec

HEADER = pathlib.Path(__file__).resolve().parent.parent / "csrc" / "hotloops.h"
KERNELS = sorted(spec.all_kernels().values(), key=lambda record: record.name)


@pytest.mark.parametrize("record", KERNELS, ids=lambda r: r.name)
def test_numba_parameters(record):
    pytest.importorskip("numba")
    names = [*(a.name for a in record.arrays), *(s.name for s in record.scalars)]
    for adapter, first in (("numba", ["begin", "end"]), ("cuda", [])):
        kernel = _dispatch.adapter(adapter).find(record)
        if kernel is not None:
            function = getattr(kernel, "function", kernel)
            assert list(inspect.signature(function).parameters) == first + names, f"{adapter}: {record.name}"


@pytest.mark.parametrize("record", KERNELS, ids=lambda r: r.name)
def test_header(record):
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    plan = re.search(rf"typedef struct \{{([^}}]*)\}} hl_{record.name}_plan;", text)
    if plan is None:
        assert f"hl_{record.name}_f32" not in text
        pytest.skip("no C version")
    fields = [name for part in plan[1].split(";") for name in re.findall(r"\w+", part)[1:]]
    assert fields == [*record.dims, *(s.name for s in record.scalars), *(a.name for a in record.arrays if a.view)]
    for suffix, element in (("f32", "float"), ("f64", "double")):
        arguments = re.search(rf"int hl_{record.name}_{suffix}\(([^)]*)\);", text)[1].split(",")
        assert arguments[0].split() == ["const", f"hl_{record.name}_plan", "*plan"]
        for array, argument in zip(record.arrays, arguments[1:], strict=True):
            kind = {"real": element, "i64": "int64_t", "u8": "uint8_t"}[array.dtype]
            const = "const " if array.role == "in" else ""
            assert " ".join(argument.split()) == f"{const}{kind} *{array.name}"
