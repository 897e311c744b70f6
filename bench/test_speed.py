"""The workloads of `hotloops bench` under pytest-benchmark: `pytest bench -k "conv3x3 and c"`.

Each is checked against the reference before it is timed. Groups hold one workload on every backend; the extra columns say
what the call had to do.
"""

from __future__ import annotations

import pytest

import hotloops as hl
from hotloops import bench
from hotloops.bench import runner

pytest.importorskip("sklearn")


@pytest.mark.parametrize("backend", bench.usable_backends())
@pytest.mark.parametrize("workload", bench.workloads().values(), ids=lambda workload: workload.name)
def test_speed(benchmark, workload, backend):
    inputs = workload.make()
    with hl.backend("reference"):
        expected, choices = runner.traced(runner.make_call(workload, inputs, "reference"))
    with hl.backend(backend):
        call = runner.make_call(workload, inputs, backend)
        error = runner.difference(runner.arrays(call()), runner.arrays(expected))
        assert error <= runner.allowed_error(choices), f"differs from the reference by {error:.1e} of the largest value"
        benchmark.group = f"{workload.op} {workload.shape()}"
        benchmark.extra_info["gflop"] = sum(c.flops for c in choices) / 1e9
        benchmark.extra_info["megabytes"] = sum(c.bytes for c in choices) / 1e6
        benchmark.extra_info["threads"] = hl.get_num_threads()
        benchmark(call)
