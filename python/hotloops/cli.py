"""The command `hotloops`: what is there, compile ahead, check, measure.

Exit codes: 0 all is well, 1 something failed or is wrong, 2 the command line cannot be understood.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import __version__, _config, _dispatch

SHOWN = 12  # wrong results per backend, the others are counted
FAMILIES = ("conv", "pool", "rnn", "attention", "boxes")


class Problem(Exception):
    """What a command says before it ends with exit code 1."""


class Misuse(Exception):
    """What a command says before it ends with exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the arguments are those of the process when left out. Gives the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except Misuse as error:
        print(f"hotloops {options.command}: {error}", file=sys.stderr)
        return 2
    except (Problem, ImportError, OSError, _dispatch.BackendUnavailableError) as error:
        print(f"hotloops {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hotloops", description="The hot loops of deep learning and vision on NumPy arrays.")
    parser.add_argument("--version", action="version", version=f"hotloops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="backends, instruction set, threads, versions", description=_info.__doc__)
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    warmup = commands.add_parser("warmup", help="compile the Numba kernels ahead", description=_warmup.__doc__)
    warmup.add_argument("families", nargs="*", metavar="FAMILY", help="families of kernels (default: all)")
    warmup.set_defaults(run=_warmup)

    check = commands.add_parser("check", help="quick self-test of the kernels on this machine", description=_check.__doc__)
    check.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    check.add_argument("--json", action="store_true", help="as JSON")
    check.set_defaults(run=_check)

    bench = commands.add_parser("bench", help="measure the families on every backend of this machine", description=_bench.__doc__)
    bench.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    sizes = bench.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="a choice of workloads, one to two minutes (--sizes quick)")
    sizes.add_argument("--sizes", choices=("small", "quick", "full"), default="full", help="which workloads (default: full)")
    bench.add_argument("--only", metavar="PATTERNS", help="workloads by name, such as 'conv3x3*,nms_*' (see --list)")
    bench.add_argument("--threads", metavar="N,...", help="numbers of threads (default: all processors)")
    bench.add_argument("--backends", metavar="NAME,...", help="of cuda, c, numba, reference (default: all that run here)")
    bench.add_argument("--peers", metavar="NAME,...", help="other libraries to time beside them: torch, onnxruntime, openvino")
    bench.add_argument("--seconds", type=float, metavar="S", help="per workload and backend (default: 1; 0.4 with --quick)")
    bench.add_argument("--json", metavar="FILE", default="hotloops-report.json", help="results (default: %(default)s)")
    bench.add_argument("--html", metavar="FILE", default="hotloops-report.html", help="report (default: %(default)s; '' for none)")
    bench.add_argument("--compare", metavar="OLD.json", help="show what changed since those results")
    bench.add_argument("--list", action="store_true", help="list the workloads and stop")
    bench.set_defaults(run=_bench)

    report = commands.add_parser("report", help="show, convert or compare stored results", description=_report.__doc__)
    report.add_argument("file", metavar="RESULTS.json")
    report.add_argument("--html", metavar="FILE", help="write the HTML report")
    report.add_argument("--readme", metavar="README.md", help='rewrite the section "How fast" between its two markers')
    report.add_argument("--compare", metavar="OLD.json", help="show what changed since those results")
    report.set_defaults(run=_report)
    return parser


# ---------------------------------------------------------------------------------------------------------- commands


def _info(options: argparse.Namespace) -> int:
    """Shows the backends and their states, the instruction set, threads, versions, caches and the processor."""
    found = _config.config()
    print(json.dumps(found, indent=2) if options.json else _config.config_text(found))
    return 0


def _warmup(options: argparse.Namespace) -> int:
    """Compiles the Numba kernels for the CPU, so that no later call waits for the compiler; they are kept on disk."""
    with _progress("compiling") as progress:
        try:
            count = _config.warmup(options.families or None, progress=progress)
        except ValueError as error:
            raise Misuse(str(error)) from None
    print(f"{count} kernels compiled")
    return 0


def _check(options: argparse.Namespace) -> int:
    """Runs the workloads of the benchmarks at small sizes on every backend and instruction set of this machine, in float32
    and float64, and compares each result with the reference.
    """
    from .bench import check

    chosen = _chosen(options.families, None)
    with _progress("checking") as progress:
        found = check.run(chosen, progress)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, variant in found["variants"].items():
            wrong = len(variant["wrong"])
            what = "calls ran" if name == "reference" else "results agree with the reference"
            print(f"{name:<12} {variant['right']} {what}" + (f", {wrong} DID NOT" if wrong else ""))
            for line in variant["wrong"][:SHOWN]:
                print(f"    {line}")
            if wrong > SHOWN:
                print(f"    and {wrong - SHOWN} more")
        for name, reason in found["skipped"].items():
            print(f"{name:<12} skipped: {reason}")
        print(f"{len(found['kernels'])} of the {found['known']} kernels ran")
    return 1 if any(variant["wrong"] for variant in found["variants"].values()) else 0


def _bench(options: argparse.Namespace) -> int:
    """Times the families on every backend of this machine, each result checked against the NumPy reference before, beside
    the machine's measured peaks. Leaves a table, an HTML report and a JSON file.
    """
    from .bench import html, peers, plots, report, runner

    sizes = "quick" if options.quick else options.sizes
    chosen = _chosen(options.families, options.only, quick=sizes == "quick")
    if options.seconds is not None and not options.seconds > 0:
        raise Misuse("--seconds must be positive")
    if options.list:
        width = max(len(w.name) for w in chosen)
        for w in chosen:
            print(f"{w.name:<{width}}  {w.family:<9}  {'quick' if w.quick else '     '}  {w.op}: {w.shape()}")
        return 0
    console = report.console()
    if options.html:
        plots.import_matplotlib()
    old = _load(options.compare) if options.compare else None
    try:
        beside = peers.find(_names(options.peers))
    except ValueError as error:
        raise Misuse(str(error)) from None
    with _progress("measuring") as progress:
        found = runner.run(
            chosen,
            backends=_backends(options.backends),
            peers=beside,
            threads=_threads(options.threads),
            seconds=options.seconds or (0.05 if sizes == "small" else 0.4 if sizes == "quick" else 1.0),
            small=sizes == "small",
            progress=progress,
        )
    report.print_report(found, console)
    if old is not None:
        report.print_changes(old, found, console)
    if options.json:
        report.save(found, options.json)
        console.print(f"results: [bold]{options.json}[/]", highlight=False)
    if options.html:
        html.save(found, options.html)
        console.print(f"report:  [bold]{options.html}[/]", highlight=False)
    return 1 if found.failures or not all(r.agrees for r in found.results) else 0


def _report(options: argparse.Namespace) -> int:
    """Shows stored results; writes them as HTML or into a README; compares them with older ones."""
    from .bench import html, plots, report

    console = report.console()
    found = _load(options.file)
    if options.html:
        plots.import_matplotlib()
        html.save(found, options.html)
    if options.readme:
        try:
            report.update_readme(found, options.readme)
        except ValueError as error:
            raise Problem(str(error)) from None
    if options.compare:
        report.print_changes(_load(options.compare), found, console)
    if not (options.html or options.readme or options.compare):
        report.print_report(found, console)
    return 0


# ----------------------------------------------------------------------------------------------------------- options


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _chosen(families: Sequence[str], only: str | None, quick: bool = False) -> list[Any]:
    """The workloads of these families, by these patterns."""
    from .bench.workloads import workloads

    for family in families:
        if family not in FAMILIES:
            raise Misuse(f"there is no family {family!r}; there are {', '.join(FAMILIES)}")
    patterns = _names(only) or ["*"]
    found = [
        w
        for w in workloads().values()
        if (not families or w.family in families)
        and any(fnmatch.fnmatchcase(w.name, p) for p in patterns)
        and (w.quick or not quick or only)
    ]
    if not found:
        raise Misuse(f"no workload is called {only}; hotloops bench --list shows them")
    return found


def _threads(text: str | None) -> list[int] | None:
    if text is None:
        return None
    numbers = _names(text)
    if not numbers or not all(n.isdecimal() and 1 <= int(n) <= 256 for n in numbers):
        raise Misuse(f"--threads must be numbers from 1 to 256, {text!r} came")
    return list(dict.fromkeys(map(int, numbers)))


def _backends(text: str | None) -> list[str] | None:
    from .bench import usable_backends

    if text is None:
        return None
    states, usable = _dispatch.backends(), usable_backends()
    for name in _names(text):
        if name not in states:
            raise Misuse(f"there is no backend {name!r}; there are {', '.join(states)}")
        if name not in usable:
            raise Problem(f"backend {name!r} cannot be measured here: {states[name].partition(': ')[2]}")
    return _names(text)


def _load(path: str) -> Any:
    from .bench import report

    try:
        return report.load(path)
    except ValueError as error:
        raise Problem(str(error)) from None


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, where that is a terminal and rich is there; else nothing."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda what, done, total: None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn(f"[bold]{title}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show
