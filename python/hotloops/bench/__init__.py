"""The benchmarks: named workloads on real inputs, run on every backend of this machine beside its measured peaks.

`hotloops bench` is their command. From Python:

    from hotloops import bench
    report = bench.run([bench.workloads()["conv3x3_n8_64x56_64"]])
"""

from .peaks import Peaks, measure
from .runner import Failure, Report, Result, run, usable_backends
from .workloads import Workload, workloads

__all__ = ["Failure", "Peaks", "Report", "Result", "Workload", "measure", "run", "usable_backends", "workloads"]
