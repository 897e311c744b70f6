"""The report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import html
import pathlib
from typing import Any

from . import plots
from .report import (
    TITLES,
    agreement_text,
    backends_of,
    digits,
    failures,
    families_of,
    geometric_mean,
    groups,
    label,
    plural,
    rate_text,
    share_text,
    speedup_text,
    spread_text,
    time_text,
)
from .runner import Report, Result

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0; background: #f8fafc; color: #1e293b; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 30px; margin: 0; letter-spacing: -.02em }
h2 { font-size: 20px; margin: 44px 0 4px; letter-spacing: -.01em }
h3 { font-size: 15px; margin: 0 0 6px }
p { margin: 4px 0 12px; color: #475569; max-width: 80ch }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin: 26px 0 }
.tile, .card { background: #fff; border: 1px solid #e2e8f0; border-radius: 12px; padding: 16px 18px }
.tile b { display: block; font-size: 27px; letter-spacing: -.02em; line-height: 1.25 }
.tile span { color: #64748b; font-size: 13px }
.card { margin: 14px 0; overflow-x: auto }
.card svg { display: block; max-width: 100%; height: auto; margin: 0 auto }
.legend { display: flex; gap: 18px; flex-wrap: wrap; font-size: 13px; color: #475569; margin: 10px 0 }
.legend i, td i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th { text-align: right; font-weight: 600; color: #64748b; padding: 6px 10px; border-bottom: 2px solid #e2e8f0; white-space: nowrap }
td { text-align: right; padding: 4px 10px; font-variant-numeric: tabular-nums; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
tbody { border-bottom: 1px solid #e2e8f0 }
td:first-child { vertical-align: top }
td small { color: #64748b; display: block }
.best { font-weight: 650 }
.wrong { color: #dc2626; font-weight: 650 }
.share { display: inline-block; width: 70px; height: 8px; border-radius: 4px; background: #f1f5f9; margin-left: 8px }
.share { overflow: hidden }
.share u { display: block; height: 100%; border-radius: 4px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; font-size: 13.5px }
dt { color: #64748b } dd { margin: 0 }
footer { margin-top: 40px; color: #94a3b8; font-size: 13px }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>hotloops bench</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def _tile(big: str, small: str) -> str:
    return f'<div class="tile"><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>'


def _tiles(report: Report) -> str:
    results, tiles = report.results, []
    for backend in backends_of(results):
        ratios = [r.speedup for r in results if r.backend == backend and r.speedup]
        if backend != "reference" and ratios:
            tiles.append(
                _tile(
                    f"{digits(geometric_mean(ratios), 2)}×",
                    f"{label(backend)} over NumPy, geometric mean of {plural(len(ratios), 'call')}",
                )
            )
    shares = [r for r in results if r.share is not None]
    if shares:
        best = max(shares, key=lambda r: r.share or 0)
        tiles.append(_tile(share_text(best), f"of this machine's measured peak at best: {best.op}, {label(best.backend)}"))
    checked = [r for r in results if r.backend != "reference"]
    wrong = sum(not r.agrees for r in checked)
    tiles.append(
        _tile(f"{len(checked) - wrong} of {len(checked)}", "results agree with the NumPy reference, checked before they are timed")
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _legend(palette: dict[str, str]) -> str:
    items = (f'<span><i style="background:{colour}"></i>{html.escape(label(b))}</span>' for b, colour in palette.items())
    return f'<div class="legend">{"".join(items)}</div>'


def _row(r: Result, head: str, fastest: bool, colour: str) -> str:
    share = ""
    if r.share is not None:
        share = f'<span class="share"><u style="width:{min(100.0, 100 * r.share):.1f}%;background:{colour}"></u></span>'
    cells = [
        f'<td><i style="background:{colour}"></i>{html.escape(label(r.backend))}</td>',
        f'<td class="{"best" if fastest else ""}">{time_text(r.ms)}</td>',
        f"<td>{'±' if len(r.rounds_ms) > 1 else ''}{spread_text(r)}</td>",
        f"<td>{rate_text(r)}</td>",
        f"<td>{share_text(r)}{share}</td>",
        f"<td>{speedup_text(r)}</td>",
        f'<td class="{"" if r.agrees else "wrong"}">{agreement_text(r)}</td>',
    ]
    return f'<tr title="{html.escape(", ".join(r.kernels))}">{head}{"".join(cells)}</tr>'


def _table(results: list[Result], palette: dict[str, str]) -> str:
    bodies = []
    for group in groups(results):
        fastest = min(group, key=lambda r: r.ms)
        first = f'<td rowspan="{len(group)}">{html.escape(group[0].op)}<small>{html.escape(group[0].shape)}</small></td>'
        rows = (_row(r, first if k == 0 else "", r is fastest, palette[r.backend]) for k, r in enumerate(group))
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    names = ("what, on what", "backend", "time", "", "rate", "of peak", "× NumPy", "differs by")
    return f"<table><thead><tr>{''.join(f'<th>{n}</th>' for n in names)}</tr></thead>{''.join(bodies)}</table>"


def _facts(pairs: dict[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in pairs.items()) + "</dl>"


def render(report: Report) -> str:
    """The page as text."""
    backends = backends_of(report.results)
    palette = plots.colours(backends)
    hardware = report.machine
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in hardware["caches"].items())
    parts = [
        "<h1>hotloops, measured here</h1>",
        f"<p>{html.escape(hardware['cpu'])}, {hardware['processors']} processors · "
        f"{html.escape(report.date[:16].replace('T', ' '))} · float32 · hotloops {html.escape(report.versions['hotloops'])}</p>",
        _tiles(report),
    ]
    for reason, names in failures(report).items():
        parts.append(f'<p class="wrong">did not run: {html.escape(", ".join(names))}<br>{html.escape(reason)}</p>')
    for threads in sorted({r.threads for r in report.results}):
        results = [r for r in report.results if r.threads == threads]
        peaks = report.peaks[str(threads)]
        suffix = f", {plural(threads, 'thread')}"
        parts.append(f"<h2>Times faster than plain NumPy{suffix}</h2>")
        parts.append(
            "<p>Each bar is one call on one backend, on a logarithmic scale, with its factor and time. Left of 1× it is slower.</p>"
        )
        parts.append(_legend({b: c for b, c in palette.items() if b != "reference"}))
        limits = plots.limits(results)
        for family in families_of(results):
            picture = plots.bars([r for r in results if r.family == family], *limits)
            parts.append(f'<div class="card"><h3>{html.escape(TITLES.get(family, family))}</h3>{picture}</div>')
        roof = plots.roofline(results, peaks)
        if roof:
            parts.append(f"<h2>Roofline{suffix}</h2>")
            parts.append(
                "<p>How near each call comes to what this machine can do. The lines are measured here with the same vectors and "
                f"threads ({html.escape(peaks['how'])}): a call under the slope waits for memory or cache, one under the flat part "
                "for arithmetic. Points on one vertical line are the same call on different backends; an algorithm that needs "
                "fewer operations than the definition may pass the roof.</p>"
            )
            parts.append(f'<div class="card">{roof}</div>')
        parts.append(f"<h2>All figures{suffix}</h2>")
        parts.append(
            "<p>Time is the median of rounds in which the backends take turns; ± half the distance of the quartiles. Of peak: the "
            "time that the measured peaks allow for the call's operations and bytes, over the time taken. Differs by: the largest "
            "difference from the reference relative to its largest value.</p>"
        )
        parts.append(f'<div class="card">{_table(results, palette)}</div>')
    parts.append("<h2>This machine</h2>")
    facts = {"processor": f"{hardware['cpu']}, {hardware['processors']} processors", "caches": caches, "system": hardware["system"]}
    for count, peaks in report.peaks.items():
        facts[f"peaks, {plural(int(count), 'thread')}"] = (
            f"{peaks['gflops']:.0f} GFLOP/s, memory {peaks['memory']:.0f} GB/s, cache {peaks['cache']:.0f} GB/s"
        )
    facts |= {f"backend {label(name)}": state for name, state in report.backends.items()}
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    parts.append(f'<div class="card">{_facts(facts)}</div>')
    parts.append(f"<footer>Made by hotloops bench in {report.seconds:.0f} seconds.</footer>")
    return PAGE.format(style=STYLE, body="\n".join(parts))


def save(report: Report, path: str | pathlib.Path) -> None:
    pathlib.Path(path).write_text(render(report))
