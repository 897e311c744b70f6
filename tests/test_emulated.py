"""What is special to kernels in an emulator; tests/test_kernels.py has a variant `emulated`."""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from cases import all_cases, build
from compare import assert_same_bits

from hotloops.kernels import spec

if not emulated.COMMAND:
    pytest.skip("no emulated machine (HOTLOOPS_SERVER): `make neon` builds one and runs these tests", allow_module_level=True)

KERNELS = [name for name in sorted(spec.all_kernels()) if emulated.kernel(spec.find(name), np.dtype(np.float32))]


def run(record, case):
    arrays, sizes, scalars = build(record, case, "float32", "normal")
    emulated.prepare(record, np.dtype(np.float32))(arrays, sizes, scalars)
    return [a for a in arrays if a is not None]


@pytest.mark.parametrize("name", KERNELS)
def test_same_bits_for_any_number_of_threads(name):
    record = spec.find(name)
    for case in all_cases()[name]:
        try:
            emulated.set_num_threads(2)
            two = run(record, case)
        finally:
            emulated.set_num_threads(1)
        for a, b in zip(two, run(record, case), strict=True):
            assert_same_bits(a, b, f"{name}, case {case.id}, 2 threads")


def test_the_guard_bites():
    """A kernel told of more rows than there are ends its server; the next call finds another."""
    record = spec.find("softmax")
    x, y = np.ones((1, 5, 1), np.float32), np.zeros((1, 5, 1), np.float32)
    call = emulated.prepare(record, x.dtype)
    with pytest.raises(RuntimeError, match=r"the server ended with status -?[1-9]"):
        call([x, y], {"M": 2, "K": 5, "I": 1}, {})
    call([x, y], {"M": 1, "K": 5, "I": 1}, {})
    np.testing.assert_array_equal(y, np.full_like(y, 0.2))
