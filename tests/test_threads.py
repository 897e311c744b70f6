"""The same bits for any number of threads; many Python threads at once; before and after fork; spawn and forkserver."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from cases import all_cases, build
from compare import assert_same_bits
from conftest import host_backends

import hotloops as hl
from hotloops import _dispatch, _threads
from hotloops._backends import numba_cpu
from hotloops.kernels import spec

CASES = all_cases()
FAST = [name for name in host_backends() if name != "reference"]


@pytest.fixture(autouse=True)
def small_calls_have_threads_too(monkeypatch):
    monkeypatch.setattr(numba_cpu, "MIN_BYTES", 0)


def run(name, backend, case, dtype="float32"):
    record = spec.find(name)
    arrays, sizes, scalars = build(record, case, dtype, "normal")
    kernel = _dispatch.adapter(backend).prepare(record, np.dtype(dtype))
    kernel(tuple(arrays), sizes, scalars)
    return [a for a in arrays if a is not None]


def has(name, backend):
    return _dispatch.adapter(backend).prepare(spec.find(name), np.dtype(np.float32)) is not None


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", sorted(CASES))
def test_same_bits_for_any_number_of_threads(name, backend):
    if not has(name, backend):
        pytest.skip(f"no {backend} version")
    for case in CASES[name]:
        with hl.num_threads(1):
            expected = run(name, backend, case)
        for threads in (2, 3, 7):
            with hl.num_threads(threads):
                for a, b in zip(run(name, backend, case), expected, strict=True):
                    assert_same_bits(a, b, f"{name}, case {case.id}, {threads} threads")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", sorted(CASES))
def test_same_bits_wherever_arrays_lie(name, backend):
    """Compilers make two loops of one: of vectors, and another for arrays that lie close to each other."""
    if not has(name, backend):
        pytest.skip(f"no {backend} version")
    record = spec.find(name)
    kernel = _dispatch.adapter(backend).prepare(record, np.dtype(np.float32))
    for case in CASES[name]:
        arrays, sizes, scalars = build(record, case, "float32", "normal")
        there = [i for i, a in enumerate(arrays) if a is not None]
        if sum(arrays[i].nbytes for i in there) > 1 << 15:
            continue
        results = []
        for order, gap in ((there, 4096), (there, 0), (there[::-1], 0)):
            memory = np.empty(sum(arrays[i].nbytes + gap + 16 for i in there) + 64, np.uint8)
            placed, at = [None] * len(arrays), -memory.ctypes.data % 64
            for i in order:
                end = at + arrays[i].nbytes
                placed[i] = memory[at:end].view(arrays[i].dtype).reshape(arrays[i].shape)
                placed[i][...] = arrays[i]
                at = -(-end // 16) * 16 + gap
            kernel(tuple(placed), sizes, scalars)
            results.append([placed[i] for i in there])
        for moved in results[1:]:
            for a, b in zip(moved, results[0], strict=True):
                assert_same_bits(a, b, f"{name}, case {case.id}, other places")


@pytest.mark.parametrize("backend", FAST)
def test_many_python_threads_at_once(backend):
    names = [name for name in sorted(CASES) if has(name, backend)]
    expected = {name: run(name, backend, CASES[name][-1]) for name in names}
    failures = []

    def work(shift):
        try:
            for name in names[shift:] + names[:shift]:
                for a, b in zip(run(name, backend, CASES[name][-1]), expected[name], strict=True):
                    assert_same_bits(a, b, name)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(3 * i % len(names),)) for i in range(6)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not failures, failures[0]


def every_kernel_once(backend):
    for name in sorted(CASES):
        if has(name, backend):
            run(name, backend, CASES[name][-1])


def in_a_fork(backend):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a hang would be the failure: it kills the child
        try:
            every_kernel_once(backend)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("backend", FAST)
def test_after_fork(backend):
    """In a child forked after the parent used its threads, in the child's child, and in the parent afterwards."""
    every_kernel_once(backend)
    in_a_fork(backend)
    every_kernel_once(backend)
    in_a_fork(backend)


@pytest.mark.parametrize("backend", FAST)
def test_fork_before_first_use(backend):
    """In a fresh process that forks before it has called anything."""
    code = f"""
import os, signal, sys
import numpy as np, hotloops as hl
pid = os.fork()
signal.alarm(60)
with hl.backend({backend!r}):
    y = hl.softmax(np.ones((3000, 100), np.float32))
assert abs(y.sum() - 3000) < 1
if pid:
    assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def child(backend):
    with hl.backend(backend):
        return float(hl.softmax(np.ones((3000, 100), np.float32)).sum())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_multiprocessing(backend, method):
    assert child(backend) == pytest.approx(3000)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(child, [backend] * 4, chunksize=1) == pytest.approx([3000.0] * 4)


def test_number_of_threads():
    before = hl.get_num_threads()
    with hl.num_threads(3):
        assert hl.get_num_threads() == 3
    assert hl.get_num_threads() == before
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError), (None, TypeError)):
        with pytest.raises(error, match="set_num_threads"):
            hl.set_num_threads(bad)
    assert hl.get_num_threads() == before


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HOTLOOPS_NUM_THREADS": "3"}, 3),
        ({"HOTLOOPS_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"HOTLOOPS_NUM_THREADS": "0", "OMP_NUM_THREADS": "nonsense"}, None),
        ({"HOTLOOPS_NUM_THREADS": "-4"}, None),
    ],
)
def test_number_of_threads_from_the_environment(variables, expected):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOTLOOPS_NUM_THREADS", "OMP_NUM_THREADS")}
    code = "import hotloops; print(hotloops.get_num_threads())"
    out = subprocess.run([sys.executable, "-c", code], env=environment | variables, capture_output=True, check=True, text=True)
    count = int(out.stdout)
    assert count == expected if expected else 1 <= count <= len(os.sched_getaffinity(0))


@pytest.mark.skipif("c" not in FAST, reason="no C kernels here")
def test_ctrl_c_stops_a_long_call():
    """A KeyboardInterrupt arrives within a call of some seconds, and the next call works."""
    code = """
import os, signal, sys, threading, time
import numpy as np, hotloops as hl
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
x = np.ones((20000, 3000), np.float32)
hl.softmax(x[:10])
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
began = time.monotonic()
try:
    while time.monotonic() - began < 60:
        hl.softmax(x)
except KeyboardInterrupt:
    assert abs(hl.softmax(x[:10]).sum() - 10) < 1e-3
    sys.exit(0)
sys.exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_ranges_that_raise_leave_the_threads_in_order():
    done, others = [], set(threading.enumerate())  # among them workers that another test has interrupted

    def work(begin, end, bad):
        done.append((begin, end))
        if begin == bad:
            raise RuntimeError("range")

    with hl.num_threads(3):
        for bad in (0, 10, 20, None):
            done.clear()
            with pytest.raises(RuntimeError, match="range") if bad is not None else contextlib.nullcontext():
                _threads.run_ranges(functools.partial(work, bad=bad), 30, True)
            assert sorted(done) == [(0, 10), (10, 20), (20, 30)]
        running = [t for t in threading.enumerate() if t.name == "hotloops" and t not in others]
        assert len(running) == 2
    for thread in running:  # another number of threads: those of before end
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_interrupt_between_workers_leaves_the_threads_in_order(monkeypatch, earlier):
    done, asked, ask = [], [], _threads._Worker.ask

    def work(begin, end):
        done.append((begin, end))

    def interrupted(worker, work):
        if len(asked) == earlier:
            raise KeyboardInterrupt
        asked.append(worker)
        ask(worker, work)

    with hl.num_threads(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_threads._Worker, "ask", interrupted)
            _threads.run_ranges(work, 30, True)
        for _ in range(2):
            done.clear()
            _threads.run_ranges(work, 30, True)
            assert sorted(done) == [(0, 10), (10, 20), (20, 30)]
