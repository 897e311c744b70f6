"""How many threads the kernels use, and the threads of the Numba kernels (the C kernels have their own pool)."""

from __future__ import annotations

import _thread
import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator

MAX_THREADS = 256
_wanted = 0
_found = 0  # what `run_ranges` found when nothing was wanted: files of the system say how many, too slow for every call
_idle: list[_Worker] = []
_workers = 0  # idle or not
_lock = threading.Lock()
_listeners: list[Callable[[int], object]] = []


def _from_environment() -> int:
    for name in ("HOTLOOPS_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").split(",")[0].strip()
        if text.isdecimal() and int(text) > 0:
            return int(text)
    return 0


def _from_machine() -> int:
    """The processors this process may run on, and no more than its control group pays for."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:
        count = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, count if quota == math.inf else min(count, math.ceil(quota)))


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _cgroup_quota() -> float:
    """Processors' worth of time that the control group (version 2 or 1) allows; infinity when it sets no limit."""
    quota = math.inf
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _read("/proc/self/cgroup").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":  # version 2: every ancestor may set a limit
                parts = [p for p in path.split("/") if p]
                folders = ["/sys/fs/cgroup/" + "/".join(parts[:k]) for k in range(len(parts), -1, -1)]
                for folder in folders:
                    with contextlib.suppress(OSError):
                        limit, period = _read(f"{folder}/cpu.max").split()
                        if limit != "max":
                            quota = min(quota, int(limit) / int(period))
            elif "cpu" in controllers.split(","):
                for folder in (f"/sys/fs/cgroup/cpu{path}", "/sys/fs/cgroup/cpu"):
                    with contextlib.suppress(OSError):
                        limit_us = int(_read(f"{folder}/cpu.cfs_quota_us"))
                        if limit_us > 0:
                            quota = min(quota, limit_us / int(_read(f"{folder}/cpu.cfs_period_us")))
    return quota


def on_change(listener: Callable[[int], object]) -> None:
    """Calls listener with the number of threads, now and whenever it changes."""
    _listeners.append(listener)
    listener(get_num_threads())


def get_num_threads() -> int:
    """The number of threads that kernels use.

    It comes from `set_num_threads`, else `HOTLOOPS_NUM_THREADS`, else `OMP_NUM_THREADS`, else the processors of the
    affinity mask, limited by the quota of the control group.

    >>> get_num_threads() >= 1
    True
    """
    return _wanted or min(MAX_THREADS, _from_environment() or _from_machine())


def set_num_threads(n: int) -> None:
    """Sets the number of threads that kernels use, for the whole process. Results do not depend on it.

    Parameters
    ----------
    n : int
        At least 1; more than 256 counts as 256.

    Raises
    ------
    TypeError, ValueError
        n is no integer, or below 1.
    """
    global _wanted, _idle, _workers
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"set_num_threads: n must be an integer, {type(n).__name__} came")
    n = n.__index__()
    if n < 1:
        raise ValueError(f"set_num_threads: n must be at least 1, {n} came")
    with _lock:
        _wanted = min(n, MAX_THREADS)
        former, _idle = _idle, []
        _workers -= len(former)
    for worker in former:
        worker.ask(None)
    for listener in _listeners:
        listener(_wanted)


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Context manager: `set_num_threads(n)` inside, the former number after it."""
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


VECTORS = 64  # elements, a multiple of what one round of a compiled loop takes on any instruction set


class _Worker:
    """A thread that waits for work. Two locks hand it over, with less in between than an executor has."""

    def __init__(self) -> None:
        self._asked, self._done = _thread.allocate_lock(), _thread.allocate_lock()
        self._asked.acquire()
        self._done.acquire()
        self._work: Callable[[], object] | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._serve, name="hotloops", daemon=True).start()

    def _serve(self) -> None:
        while self._asked.acquire() and self._work is not None:
            try:
                self._work()
            except BaseException as error:
                self._error = error
            self._work = None  # it holds arrays
            self._done.release()

    def ask(self, work: Callable[[], object] | None) -> None:
        """Begins with this work; None: the thread ends."""
        self._work = work
        self._asked.release()

    def wait(self) -> BaseException | None:
        """Returns when the work is done, with the exception that it ended in. An interrupt waits, too: arrays are in use."""
        interrupt = None
        while True:
            try:
                self._done.acquire()
                break
            except BaseException as error:
                interrupt = error
        failed, self._error = self._error, None
        return failed or interrupt


def _take_workers(n: int) -> list[_Worker]:
    """So many workers, fewer where other callers have them or the system has no thread."""
    global _workers
    with _lock:
        taken = [_idle.pop() for _ in range(min(n, len(_idle)))]
        with contextlib.suppress(RuntimeError):
            while len(taken) < n and _workers < n:
                taken.append(_Worker())
                _workers += 1
        return taken


def run_ranges(work: Callable[[int, int], None], n: int, parallel: bool) -> None:
    """Calls work(begin, end) on ranges that cover [0, n), on several threads when `parallel` says that it pays."""
    global _found, _workers
    _found = _found or get_num_threads()
    threads = min(_wanted or _found, n) if parallel else 1
    if threads <= 1:
        work(0, n)
        return
    workers = _take_workers(threads - 1)
    threads = len(workers) + 1
    # A loop over elements becomes vectors and a tail that may round differently: long ranges begin at whole vectors, so that
    # the tail is the same elements for any number of threads.
    step = VECTORS if n >= VECTORS**2 * threads else 1
    bounds = [n * i // threads // step * step for i in range(threads)] + [n]
    asked: list[_Worker] = []
    try:
        for i, worker in enumerate(workers, 1):
            worker.ask(functools.partial(work, bounds[i], bounds[i + 1]))
            asked.append(worker)
        work(0, bounds[1])
    finally:
        errors = [worker.wait() for worker in asked]
        with _lock:  # after an interrupt nobody knows whether the next one was asked: it is not used again
            _idle.extend(asked)
            _workers -= len(workers) - len(asked)
    for error in errors:
        if error is not None:
            raise error


def _after_fork() -> None:
    global _idle, _workers, _lock
    _idle, _workers, _lock = [], 0, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
