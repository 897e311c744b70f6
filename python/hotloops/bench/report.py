"""What a benchmark found, as a table in the terminal, a comparison with an older file, and the README's section."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .inputs import MissingExtra
from .runner import Report, Result
from .workloads import workloads

LABELS = {"cuda": "CUDA", "c": "C", "numba": "Numba", "reference": "NumPy"}
TITLES = {"conv": "Convolution", "pool": "Pooling", "rnn": "Recurrent layers", "attention": "Attention", "boxes": "Boxes"}
STYLES = {"c": "bold cyan", "numba": "yellow", "cuda": "bold green", "reference": "dim"}
WIDE, MIDDLE = 120, 100  # columns of a terminal for all of the table's columns, and for most
NOISE = 0.05  # a change below this is never reported as one
SECTION = re.compile(r"(<!-- bench:begin.*?-->\n).*?(<!-- bench:end -->)", re.DOTALL)


def label(backend: str) -> str:
    return LABELS.get(backend, backend)


def time_text(ms: float) -> str:
    """Three digits and a unit: "1.23 s", "45.6 µs"."""
    return f"{digits(ms / 1e3)} s" if ms >= 999.5 else f"{digits(ms)} ms" if ms >= 0.9995 else f"{digits(ms * 1e3)} µs"


def digits(value: float, n: int = 3) -> str:
    """The value with n digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = n - 1 - math.floor(math.log10(abs(value)) + 1e-12)
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def rate_text(r: Result) -> str:
    if r.share is None and r.backend != "cuda":
        return "–"
    rate, unit = r.rate
    return f"{digits(rate)} G{unit}" if rate >= 0.9995 else f"{digits(rate * 1e3)} M{unit}"


def share_text(r: Result) -> str:
    return "–" if r.share is None else "<0.1 %" if r.share < 0.001 else f"{100 * r.share:.{0 if r.share >= 0.095 else 1}f} %"


def spread_text(r: Result) -> str:
    return f"{100 * r.spread:.0f} %" if len(r.rounds_ms) > 1 else "–"


def speedup_text(r: Result) -> str:
    return "–" if r.speedup is None else f"{digits(r.speedup, 2 if r.speedup < 100 else 3)}×"


def agreement_text(r: Result) -> str:
    if r.backend == "reference":
        return "–"
    if not r.agrees:
        return f"NO {r.error:.0e}"
    return "exact" if r.error == 0 else f"{r.error:.0e}"


def plural(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def escape(text: str) -> str:
    """The text with nothing in it that rich would take for a style."""
    return text.replace("[", "\\[")


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def backends_of(results: Sequence[Result]) -> list[str]:
    """The backends of the results: those of hotloops, then other libraries, the reference last."""
    names = list(dict.fromkeys(r.backend for r in results))
    own = [n for n in LABELS if n in names and n != "reference"]
    return own + [n for n in names if n not in LABELS] + [n for n in names if n == "reference"]


def families_of(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.family for r in results))


def groups(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each workload together."""
    found: dict[str, list[Result]] = {}
    for r in results:
        found.setdefault(r.name, []).append(r)
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------- terminal


def import_rich() -> Any:
    try:
        import rich
    except ImportError as error:
        raise MissingExtra("rich", "the table of a benchmark") from error
    return rich


def _bar(share: float | None, width: int = 10) -> str:
    if share is None:
        return ""
    eighths = round(min(share, 1.0) * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def console() -> Any:
    """The terminal; a pipe or a file counts as 120 columns wide, unless COLUMNS says otherwise."""
    import_rich()
    from rich.console import Console

    plain = Console()
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


def table(report: Report, threads: int, width: int) -> Any:
    """The results with so many threads as a rich table; a narrow terminal gets fewer columns."""
    import_rich()
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide, middle = width >= WIDE, width >= MIDDLE
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    view.add_column("what, on what", no_wrap=True, overflow="ellipsis", max_width=36 if wide else 32 if middle else 28)
    view.add_column("backend", no_wrap=True)
    view.add_column("time", justify="right", no_wrap=True)
    if wide:
        view.add_column("±", justify="right", no_wrap=True, style="dim")
    if middle:
        view.add_column("rate", justify="right", no_wrap=True)
    view.add_column("of peak", justify="right", no_wrap=True)
    if wide:
        view.add_column("", no_wrap=True, min_width=10)
    view.add_column("× NumPy", justify="right", no_wrap=True)
    view.add_column("differs by", justify="right", no_wrap=True)
    results = [r for r in report.results if r.threads == threads]
    for family in families_of(results):
        view.add_section()
        view.add_row(Text(TITLES.get(family, family), style="bold magenta"))
        for group in groups([r for r in results if r.family == family]):
            head = [Text("  " + group[0].op, style="bold"), Text("  " + group[0].shape, style="dim")]
            if len(group) == 1:
                head = [Text.assemble(head[0], "\n", head[1])]
            fastest = min(group, key=lambda r: r.ms)
            for k, r in enumerate(group):
                style = STYLES.get(r.backend, "blue")
                cells: list[Any] = [head[k] if k < len(head) else "", Text(label(r.backend), style=style)]
                cells.append(Text(time_text(r.ms), style="bold" if r is fastest else ""))
                if wide:
                    cells.append(spread_text(r))
                if middle:
                    cells.append(rate_text(r))
                cells.append(share_text(r))
                if wide:
                    cells.append(Text(_bar(r.share), style=style.replace("bold ", "")))
                speedup = "dim" if r.backend == "reference" else "green" if (r.speedup or 0) >= 1 else "red"
                cells += [Text(speedup_text(r), style=speedup), Text(agreement_text(r), style="" if r.agrees else "bold red")]
                view.add_row(*cells)
    return view


def print_report(report: Report, console: Any) -> None:
    """Tables, failures and the summary on a rich console."""
    for threads in sorted({r.threads for r in report.results}):
        console.print(f"\n[bold]{report.machine['cpu']}[/], {plural(threads, 'thread')}, float32", highlight=False)
        console.print(table(report, threads, console.width))
    for reason, names in failures(report).items():
        console.print(f"[bold red]did not run[/]: {', '.join(names)}\n    {escape(reason)}", highlight=False)
    for line in summary_lines(report):
        console.print(line, highlight=False)


def failures(report: Report) -> dict[str, list[str]]:
    """The failed workloads by their reason."""
    found: dict[str, list[str]] = {}
    for f in report.failures:
        found.setdefault(f.reason, []).append(f"{f.name} on {label(f.backend)}")
    return found


def summary_lines(report: Report) -> list[str]:
    lines = []
    for threads in sorted({r.threads for r in report.results}):
        results = [r for r in report.results if r.threads == threads]
        peaks = report.peaks[str(threads)]
        lines.append(
            f"[bold]Peaks[/] of this machine with {plural(threads, 'thread')}: "
            f"{peaks['gflops']:.0f} GFLOP/s, memory {peaks['memory']:.0f} GB/s, cache {peaks['cache']:.0f} GB/s "
            f"[dim]({peaks['how']})[/]"
        )
        for backend in [b for b in backends_of(results) if b != "reference"]:
            means = []
            for family in families_of(results):
                ratios = [r.speedup for r in results if (r.family, r.backend) == (family, backend) and r.speedup]
                if ratios:
                    means.append(f"{family} {digits(geometric_mean(ratios), 2)}×")
            if means:
                lines.append(f"[bold]{label(backend)}[/], times faster than NumPy (geometric mean): {', '.join(means)}")
    wrong = [r for r in report.results if not r.agrees]
    count = sum(r.backend != "reference" for r in report.results)
    if wrong:
        lines += [
            f"[bold red]WRONG[/] {r.name} on {label(r.backend)}: off by {r.error:.1e}, {r.allowed:.1e} allowed" for r in wrong
        ]
    elif count:
        lines.append(f"[green]All {count} results agree with the reference.[/]")
    lines.append(
        "[dim]of peak: the time that the measured peaks allow for the operations, or the bytes, over the time taken; "
        "above 100 % by an algorithm that needs fewer operations. differs by: largest difference from the reference, "
        "relative to its largest value.[/]"
    )
    return lines


# ------------------------------------------------------------------------------------------------------------- files


def save(report: Report, path: str | pathlib.Path) -> None:
    pathlib.Path(path).write_text(json.dumps(report.as_dict(), indent=1) + "\n")


def load(path: str | pathlib.Path) -> Report:
    """The report in a JSON file. ValueError where it is none."""
    try:
        return Report.from_dict(json.loads(pathlib.Path(path).read_text()))
    except (json.JSONDecodeError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no results file of hotloops bench: {error}") from error


# ------------------------------------------------------------------------------------------------------- comparison


def changes(old: Report, new: Report) -> list[tuple[Result, Result, float, str]]:
    """(old, new, old time over new time, "faster" | "slower" | "") for each result that both reports have.

    A change is called one only beyond noise: beyond 5 %, and beyond twice the spread of both measurements.
    """
    found = []
    for r in new.results:
        before = old.find(r.name, r.backend, r.threads)
        if before is not None and before.shape == r.shape:
            ratio = before.ms / r.ms
            noise = NOISE + 2 * (before.spread + r.spread)
            word = "" if abs(math.log(ratio)) <= math.log1p(noise) else "faster" if ratio > 1 else "slower"
            found.append((before, r, ratio, word))
    return found


def print_changes(old: Report, new: Report, console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = changes(old, new)
    console.print(f"\n[bold]Compared with[/] {old.date}, hotloops {old.versions['hotloops']}", highlight=False)
    if old.machine["cpu"] != new.machine["cpu"] or old.machine["processors"] != new.machine["processors"]:
        console.print(f"[yellow]another machine: {old.machine['cpu']}, {old.machine['processors']} processors[/]", highlight=False)
    if not found:
        console.print("no workload is in both")
        return
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    view.add_column("workload", no_wrap=True)
    view.add_column("backend", no_wrap=True)
    for name in ("threads", "before", "now", "ratio"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("")
    for before, r, ratio, word in found:
        mark = Text(word, style={"faster": "green", "slower": "bold red"}.get(word, "dim"))
        view.add_row(r.name, label(r.backend), str(r.threads), time_text(before.ms), time_text(r.ms), f"{ratio:.2f}×", mark)
    console.print(view)
    slower, faster = (sum(c[3] == word for c in found) for word in ("slower", "faster"))
    console.print(f"{len(found)} compared: {faster} faster, {slower} slower, the others within noise", highlight=False)


# ------------------------------------------------------------------------------------------------------------ README


def readme_section(report: Report) -> str:
    """The README's "How fast" in Markdown: the quick workloads, from the run with the most threads."""
    threads = max(r.threads for r in report.results)
    results = [r for r in report.results if r.threads == threads]
    quick = {w.name for w in workloads().values() if w.quick}
    results = [r for r in results if r.name in quick] or results
    backends = backends_of(results)
    peaks = report.peaks[str(threads)]
    lines = [
        f"Measured on {report.date[:10]}: {report.machine['cpu']}, {plural(threads, 'thread')}"
        f"{', ' + report.isa if report.isa else ''}, float32, NumPy {report.versions['numpy']}, hotloops "
        f"{report.versions['hotloops']}. This machine's measured peaks: {peaks['gflops']:.0f} GFLOP/s, "
        f"memory {peaks['memory']:.0f} GB/s, cache {peaks['cache']:.0f} GB/s. Every result was checked against the reference "
        "before it was timed.",
        "",
        "| | | " + " | ".join(f"{label(b)}, ms" for b in backends) + " | C, of peak | C, times NumPy |",
        "|---|---|" + "---:|" * (len(backends) + 2),
    ]
    for group in groups(results):
        times = {r.backend: r for r in group}
        cells = [digits(times[b].ms) if b in times else "" for b in backends]
        c = times.get("c")
        cells += [share_text(c), speedup_text(c)] if c else ["", ""]
        lines.append(f"| `{group[0].op}` | {group[0].shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def update_readme(report: Report, path: str | pathlib.Path) -> None:
    """Replaces what stands between the markers bench:begin and bench:end; ValueError where they are missing."""
    file = pathlib.Path(path)
    text = file.read_text()
    if not SECTION.search(text):
        raise ValueError(f"{path} does not hold the markers <!-- bench:begin --> and <!-- bench:end -->")
    section = readme_section(report)
    file.write_text(SECTION.sub(lambda found: f"{found[1]}{section}\n{found[2]}", text, count=1))
