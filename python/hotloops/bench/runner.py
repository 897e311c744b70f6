"""Runs workloads on backends: every result is checked against the reference before it is timed, then all backends take
turns, so that what else the machine does meets them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import _config, _dispatch, _threads
from ..kernels import spec
from . import peaks as _peaks
from .workloads import Inputs, Workload

ROUNDS = 7
SETTLE = 0.15  # seconds after a NumPy matrix product, whose threads go on spinning for that long
BATCH = 2e-4  # seconds: what is shorter is timed several calls at once
CACHED = 0.75  # of the last cache: a call that moves fewer bytes finds its arrays there
SCHEMA = 1


@dataclasses.dataclass
class Result:
    """One workload on one backend with so many threads.

    `ms` is the median of `rounds_ms`, each the median of one round; `spread` is half the distance between their quartiles,
    relative to `ms`. `flops` and `bytes` are what the records of the kernels say that the call must do; `share` is the time
    that the measured peaks of this machine allow for it, over `ms` (None where no peak says how fast it could be), and
    `bound` the peak that sets it. `error` is the largest difference from the reference, relative to its largest magnitude;
    `agrees` compares it with what the records allow. `speedup` is against the reference with as many threads.
    """

    name: str
    family: str
    op: str
    shape: str
    backend: str
    threads: int
    ms: float
    spread: float
    rounds_ms: list[float]
    calls: int
    flops: float
    bytes: int
    error: float
    allowed: float
    agrees: bool
    kernels: list[str]
    speedup: float | None = None
    share: float | None = None
    bound: str = ""

    @property
    def rate(self) -> tuple[float, str]:
        """10^9 operations or bytes a second, whichever the peaks make the limit, and their unit."""
        return (self.flops / self.ms / 1e6, "FLOP/s") if self.bound == "compute" else (self.bytes / self.ms / 1e6, "B/s")


@dataclasses.dataclass
class Failure:
    """A workload that did not run."""

    name: str
    family: str
    backend: str
    threads: int
    reason: str


@dataclasses.dataclass
class Report:
    """Everything that a benchmark found; `as_dict` is what the JSON file holds."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    backends: dict[str, str]
    isa: str
    peaks: dict[str, dict[str, Any]]
    results: list[Result]
    failures: list[Failure]
    seconds: float = 0.0
    schema: int = SCHEMA

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Report:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError("this is no results file of hotloops bench, or one of another version")
        results = [Result(**r) for r in data["results"]]
        return Report(**{**data, "results": results, "failures": [Failure(**f) for f in data["failures"]]})

    def find(self, name: str, backend: str, threads: int) -> Result | None:
        return next((r for r in self.results if (r.name, r.backend, r.threads) == (name, backend, threads)), None)


# ---------------------------------------------------------------------------------------------------------- pieces


@contextlib.contextmanager
def blas_threads(n: int) -> Iterator[None]:
    """NumPy's matrix products on n threads inside, where threadpoolctl is there to say so."""
    try:
        import threadpoolctl
    except ImportError:
        yield
        return
    with threadpoolctl.threadpool_limits(n):
        yield


def usable_backends() -> list[str]:
    """The backends that run here, fastest first. A simulated GPU is none: its times mean nothing."""
    names = [name for name in ("cuda", "c", "numba", "reference") if not _dispatch.adapter(name).status()]
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        names.remove("cuda")
    return names


def arrays(result: Any) -> list[np.ndarray]:
    """Every array of a result, on the host, in order."""
    if isinstance(result, tuple | list):
        return [array for part in result for array in arrays(part)]
    if result is None:
        return []
    if _dispatch.adapter("cuda").is_device_array(result):
        cuda = _dispatch.adapter("cuda")
        return [cuda.to_host(cuda.as_device(result))]
    return [np.asarray(result)]


def difference(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference, relative to the largest magnitude expected; infinity for another shape, NaN or integer."""
    if len(actual) != len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape or (a.dtype.kind == "f") != (b.dtype.kind == "f"):
            return float("inf")
        if b.dtype.kind != "f":
            worst = max(worst, 0.0 if np.array_equal(a, b) else float("inf"))
            continue
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        finite = np.isfinite(b)
        largest = float(np.max(np.abs(b), where=finite, initial=0.0))
        distance = float(np.max(np.abs(np.subtract(a, b, where=finite, out=np.zeros_like(b))), initial=0.0))
        worst = max(worst, distance / largest if largest else distance)
    return worst


def traced(call: Callable[[], Any]) -> tuple[Any, tuple[Any, ...]]:
    """(result, the kernels that ran) of one call."""
    token = _dispatch._trace.set([])
    try:
        result = call()
        return result, tuple(_dispatch._trace.get() or ())
    finally:
        _dispatch._trace.reset(token)


def allowed_error(choices: Iterable[Any]) -> float:
    """What the records of these kernels allow between two backends: each may be that far from the truth."""
    return 2 * sum(choice.error + float(np.finfo(choice.dtype).eps) for choice in choices)


def kernels_of(workloads: Iterable[Workload]) -> list[str]:
    """The kernels with a Numba version that these workloads run."""
    names: dict[str, None] = {}
    for workload in workloads:
        with contextlib.suppress(Exception), _dispatch.backend("reference"):  # shown when the workload itself is run
            _, choices = traced(make_call(workload, workload.make(small=True), "reference"))
            names |= dict.fromkeys(c.kernel for c in choices)
    return [name for name in names if _dispatch.adapter("numba").find(spec.find(name)) is not None]


def make_call(workload: Workload, inputs: Inputs, backend: str) -> Callable[[], Any]:
    """The call of a workload on one backend, to be made inside `hl.backend(backend)`; a GPU gets its arrays ahead."""
    import hotloops

    if backend != "cuda":
        return lambda: workload.call(hotloops, inputs)
    cuda = _dispatch.adapter("cuda")._cuda()
    there = {name: cuda.to_device(array) for name, array in inputs.items()}

    def call() -> Any:
        result = workload.call(hotloops, there)
        cuda.synchronize()
        return result

    return call


# ---------------------------------------------------------------------------------------------------------- timing


@dataclasses.dataclass
class _Runner:
    """One backend's turn: how to enter it, what to call, its times."""

    backend: str
    inside: Callable[[], contextlib.AbstractContextManager[Any]]
    call: Callable[[], Any]
    choices: tuple[Any, ...] = ()
    error: float = 0.0
    rounds: int = 0
    samples: int = 1
    batch: int = 1
    times: list[float] = dataclasses.field(default_factory=list)

    def once(self) -> float:
        begin = time.perf_counter()
        for _ in range(self.batch):
            self.call()
        return (time.perf_counter() - begin) / self.batch

    def plan(self, seconds: float) -> None:
        """How many rounds of how many calls fit into the time; a call that alone takes longer is timed twice."""
        with self.inside():
            estimate = self.once()
            if estimate < seconds / 4:
                estimate = self.once()
            if estimate < BATCH:
                self.batch = max(1, int(BATCH / max(estimate, 1e-8)))
                estimate = self.once()
        self.rounds = max(1, min(ROUNDS, int(seconds / estimate)))
        self.samples = max(1, min(1000, int(seconds / self.rounds / (estimate * self.batch)) - 1))
        if self.rounds < ROUNDS:
            self.times.append(estimate)

    def round(self) -> None:
        with self.inside():
            if self.samples > 1:
                self.once()
            self.times.append(statistics.median(self.once() for _ in range(self.samples)))


@dataclasses.dataclass
class _Task:
    """A workload, its inputs, and what the reference makes of them in how many seconds."""

    workload: Workload
    small: bool
    inputs: Inputs
    truth: list[np.ndarray]
    choices: tuple[Any, ...]
    seconds: float

    @property
    def allowed(self) -> float:
        return allowed_error(self.choices)


def _prepare(workload: Workload, small: bool) -> _Task:
    inputs = workload.make(small)
    with _dispatch.backend("reference"):
        begin = time.perf_counter()
        expected, choices = traced(make_call(workload, inputs, "reference"))
        seconds = time.perf_counter() - begin
    return _Task(workload, small, inputs, arrays(expected), choices, seconds)


def _checked(task: _Task, backends: Sequence[str], peers: Sequence[Any], threads: int, note: _Notes) -> list[_Runner]:
    """One runner per backend and peer that can run the workload, its result held against the reference."""
    runners = []
    for backend in [b for b in backends if b != "reference"]:
        note.step(task.workload, backend)
        with note.failures(task.workload, backend, threads), _dispatch.backend(backend):
            call = make_call(task.workload, task.inputs, backend)
            actual, choices = traced(call)
            error = difference(arrays(actual), task.truth)
            runners.append(_Runner(backend, functools.partial(_dispatch.backend, backend), call, choices, error))
    for peer in peers:
        note.step(task.workload, peer.name)
        with note.failures(task.workload, peer.name, threads):
            call = peer.prepare(task.workload, task.inputs, threads)
            if call is not None:
                error = difference(arrays(peer.result(call())), task.truth)
                runners.append(_Runner(peer.name, contextlib.nullcontext, call, error=error))
    if "reference" in backends:
        call = make_call(task.workload, task.inputs, "reference")
        runners.append(_Runner("reference", functools.partial(_dispatch.backend, "reference"), call, task.choices))
    return runners


def _time(task: _Task, runners: Sequence[_Runner], seconds: float, note: _Notes) -> None:
    """Times the runners in turns, without the garbage collector; NumPy alone, after the others, for its spinning threads."""
    time.sleep(SETTLE)  # NumPy has just made the truth
    others = [r for r in runners if r.backend != "reference"]
    for group in (others, [r for r in runners if r.backend == "reference"]):
        for runner in group:
            note.step(task.workload, runner.backend)
            if runner.backend == "reference" and task.seconds > seconds:
                runner.times.append(task.seconds)  # once is enough
            else:
                runner.plan(seconds)
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            for k in range(ROUNDS):
                for runner in [r for r in group if k < r.rounds]:
                    note.step(task.workload, runner.backend)
                    runner.round()
        finally:
            if enabled:
                gc.enable()


def _result(task: _Task, runner: _Runner, threads: int) -> Result:
    ms = statistics.median(runner.times) * 1e3
    spread = 0.0
    if len(runner.times) > 1:
        quarters = statistics.quantiles(runner.times, n=4, method="inclusive")
        spread = (quarters[2] - quarters[0]) / 2 * 1e3 / ms
    kernels = [f"{c.kernel} ({c.algorithm})" if c.algorithm else c.kernel for c in runner.choices]
    return Result(
        name=task.workload.name,
        family=task.workload.family,
        op=task.workload.op,
        shape=task.workload.shape(task.small),
        backend=runner.backend,
        threads=threads,
        ms=ms,
        spread=spread,
        rounds_ms=[t * 1e3 for t in runner.times],
        calls=len(runner.times) * runner.samples * runner.batch,
        flops=sum(c.flops for c in task.choices),
        bytes=sum(c.bytes for c in task.choices),
        error=runner.error,
        allowed=task.allowed,
        agrees=runner.error <= task.allowed,
        kernels=list(dict.fromkeys(kernels)),
    )


class _Notes:
    """Where a run tells how far it is and what failed."""

    def __init__(self, report: Report, progress: Callable[[str, int, int], object] | None, total: int):
        self.report, self.progress, self.total, self.done = report, progress, total, 0

    def step(self, what: Workload | str, backend: str = "") -> None:
        if self.progress is not None:
            text = what if isinstance(what, str) else f"{what.name}, {backend}"
            self.progress(text, self.done, self.total)

    @contextlib.contextmanager
    def failures(self, workload: Workload, backend: str, threads: int) -> Iterator[None]:
        """What raises inside is shown as this workload's failure; the others still run."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.report.failures.append(Failure(workload.name, workload.family, backend, threads, reason))


def run(
    workloads: Sequence[Workload],
    *,
    backends: Sequence[str] | None = None,
    peers: Sequence[Any] = (),
    threads: Sequence[int] | None = None,
    seconds: float = 1.0,
    small: bool = False,
    progress: Callable[[str, int, int], object] | None = None,
) -> Report:
    """Times workloads on backends with each number of threads.

    Parameters
    ----------
    workloads : list of Workload
    backends : list of str, optional
        All that run here when left out. The reference always runs once, as what the others are held against.
    peers : list of peers.Peer
        Other libraries, timed beside them.
    threads : list of int, optional
        The current number when left out.
    seconds : float
        About how long each workload runs on each backend; a call that takes longer is made twice.
    small : bool
        Small sizes, for tests.
    progress : callable, optional
        Called as `progress(what, done, total)`.
    """
    begin = time.perf_counter()
    c = _dispatch.adapter("c")
    backends = usable_backends() if backends is None else backends
    threads = [_threads.get_num_threads()] if threads is None else threads
    report = Report(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=_config.machine(),
        versions=_config.versions() | {p.name: p.version for p in peers},
        backends=_dispatch.backends(),
        isa="" if c.status() else c.isa(),
        peaks={},
        results=[],
        failures=[],
    )
    note = _Notes(report, progress, len(threads) * (len(workloads) + 2))
    if "numba" in backends:
        _config.compile_kernels(
            kernels_of(workloads), ("float32",), lambda name, n, total: note.step(f"compiling {name}, {n} of {total}")
        )
    _measure_peaks(report, threads, note)
    for workload in workloads:
        task = None
        for count in threads:
            with _threads.num_threads(count), blas_threads(count):
                if task is None:
                    note.step(workload, "reference")
                    with note.failures(workload, "reference", count):
                        task = _prepare(workload, small)
                if task is not None:
                    runners = _checked(task, backends, peers, count, note)
                    _time(task, runners, seconds, note)
                    report.results += [_result(task, runner, count) for runner in runners]
            note.done += 1
    _measure_peaks(report, threads, note)  # a machine that was busy before may be idle now: the best of both
    report.results.sort(key=lambda r: r.threads)
    _finish(report, {w.name for w in workloads if w.roofline})
    report.seconds = time.perf_counter() - begin
    return report


def _measure_peaks(report: Report, threads: Sequence[int], note: _Notes) -> None:
    for count in threads:
        note.step(f"peaks of this machine, {count} threads")
        found = _peaks.measure(count).as_dict()
        former = report.peaks.get(str(count), found)
        report.peaks[str(count)] = {k: max(v, former[k]) if isinstance(v, float) else v for k, v in found.items()}
        note.done += 1


def _finish(report: Report, with_roof: set[str]) -> None:
    """What needs all results and the final peaks: times faster than the reference, and shares of the peaks."""
    for r in report.results:
        reference = report.find(r.name, "reference", r.threads)
        r.speedup = reference.ms / r.ms if reference else None
        cached = r.bytes <= CACHED * _peaks.last_cache()
        floor, r.bound = _peaks.floor_ms(report.peaks[str(r.threads)], r.flops, r.bytes, cached)
        if r.name in with_roof and r.backend != "cuda":
            r.share = floor / r.ms
