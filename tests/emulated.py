"""C kernels of another machine, run in an emulator: HOTLOOPS_SERVER is the command that runs tests/server.c there, as in
`qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/csrc/server` (`make neon` does all of it). To the tests it is one more
backend's adapter.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import mmap
import os
import pathlib
import shlex
import struct
import subprocess
import tempfile

import numpy as np

PAGE = 4096  # the server's
COMMAND = shlex.split(os.environ.get("HOTLOOPS_SERVER", ""))
HEADER = pathlib.Path(__file__).resolve().parent.parent / "csrc" / "hotloops.h"
SUFFIX = {np.dtype(np.float32): "f32", np.dtype(np.float64): "f64"}


class Server:
    """The process, and the file that both processes have in memory."""

    def __init__(self):
        self.file = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        path = f"/proc/{os.getpid()}/fd/{self.file.fileno()}"
        self.process = subprocess.Popen([*COMMAND, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)

    def ask(self, line):
        answer = ""
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            server.cache_clear()  # the next call starts another
            raise RuntimeError(f"the server ended with status {self.process.wait()} at {line!r}")
        return int(answer)

    def run(self, symbol, arrays):
        """Calls a kernel with the addresses of copies of these arrays (NULL for None), then takes the copies back."""
        ends = list(itertools.accumulate(0 if a is None else -(-a.nbytes // PAGE) * PAGE for a in arrays))
        places = [(-1, 0) if a is None else (begin, a.nbytes) for a, begin in zip(arrays, [0, *ends[:-1]], strict=True)]
        os.ftruncate(self.file.fileno(), ends[-1])
        with mmap.mmap(self.file.fileno(), ends[-1]) as memory:
            present = [(a, slice(end - a.nbytes, end)) for a, end in zip(arrays, ends, strict=True) if a is not None]
            for a, span in present:
                memory[span] = a.tobytes()
            status = self.ask(" ".join([symbol, *(f"{begin} {size}" for begin, size in places)]))
            for a, span in present:
                a[...] = np.ndarray(a.shape, a.dtype, memory[span])
        return status


@functools.cache
def server():
    return Server()


def set_num_threads(n):
    server().ask(f"threads {n}")


@functools.cache
def _header():
    return HEADER.read_text()


def kernel(record, dtype):
    """The name of the C function, None where there is no such kernel."""
    name = f"hl_{record.name}_{SUFFIX[dtype]}"
    return name if f"int {name}(" in _header() else None


def prepare(record, dtype):
    name = kernel(record, dtype)
    layout = "=" + "q" * len(record.dims) + "".join("q" if s.type == "int" else "d" for s in record.scalars)
    layout += "q" * sum(len(a.dims) - 1 for a in record.arrays if a.view)

    def call(arrays, sizes, scalars):
        fields = (*(sizes[n] for n in record.dims), *(scalars[s.name] for s in record.scalars))
        plan = struct.pack(layout, *fields, *(n for strides in record.strides(arrays) for n in strides))
        status = server().run(name, [np.array(np.frombuffer(plan, np.uint8)), *arrays])
        if status:
            raise RuntimeError(f"{name} returned {status}")

    return call
