"""The pictures of the report, as SVG text: bars per backend, and the roofline."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from .inputs import MissingExtra
from .report import backends_of, digits, groups, label, time_text
from .runner import Result

COLOURS = {"c": "#2563eb", "numba": "#f59e0b", "cuda": "#16a34a", "reference": "#94a3b8"}
OTHERS = ("#a855f7", "#ec4899", "#0891b2", "#84cc16", "#b45309")
MARKERS = {"conv": "o", "pool": "s", "rnn": "^", "attention": "D", "boxes": "v"}
INK, FAINT, GRID = "#1e293b", "#64748b", "#e2e8f0"


def colours(backends: Sequence[str]) -> dict[str, str]:
    others = iter(OTHERS * len(backends))
    return {b: COLOURS.get(b) or next(others) for b in backends}


def import_matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "the HTML report") from error
    return matplotlib


def _figure(width: float, height: float) -> Any:
    matplotlib = import_matplotlib()
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "hotloops"}
    style["font.sans-serif"] = ["DejaVu Sans"]
    matplotlib.rcParams.update(style)
    return matplotlib.figure.Figure(figsize=(width, height))


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def _bare(axes: Any) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=FAINT)


def limits(results: Sequence[Result]) -> tuple[float, float]:
    """The ends of the axis that all the families' bars share."""
    values = [r.speedup for r in results if r.speedup and r.backend != "reference"]
    return min([0.9, *(v * 0.9 for v in values)]), max([2.0, *values])


def bars(results: Sequence[Result], left: float, right: float) -> str:
    """How many times faster than NumPy each workload of one family runs on each backend, with its time at the bar's end."""
    palette, found = colours(backends_of(results)), groups(results)
    rows = sum(r.backend != "reference" for r in results) + 1.1 * len(found)
    figure = _figure(10.4, 0.45 + 0.2 * rows)
    height = figure.get_figheight()
    axes = figure.add_axes((0.27, 0.32 / height, 0.62, 1 - 0.32 / height))
    at = 0.0
    for group in found:
        here = [r for r in group if r.backend != "reference" and r.speedup]
        middle = at + (len(here) - 1) / 2
        for text, offset, colour, size in ((group[0].op, 5.5, INK, 9), (group[0].shape, -5.5, FAINT, 7.5)):
            axes.annotate(
                text,
                (0, middle),
                (-12, offset),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center",
                color=colour,
                fontsize=size,
            )
        for r in here:
            ratio = r.speedup or 1.0
            axes.barh(at, ratio - 1, left=1, height=0.84, color=palette[r.backend], zorder=2)
            text = f"{digits(ratio, 2 if ratio < 100 else 3)}×   {time_text(r.ms)}"
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
            axes.annotate(text, (max(ratio, 1.0), at), color=INK, annotation_clip=False, **place)
            at += 1
        at += 1.1
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(at - 0.9, -0.9)
    axes.axvline(1, color=FAINT, linewidth=1, zorder=3)
    steps = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5) if left <= m * 10.0**e <= right]
    if len(steps) > 9:
        steps = [v for v in steps if math.isclose(math.log10(v) % 1, 0, abs_tol=1e-9)]
    axes.set_xticks(steps, [f"{v:g}×" for v in steps])
    axes.minorticks_off()
    axes.set_yticks([])
    axes.grid(axis="x", color=GRID, zorder=0)
    _bare(axes)
    return _svg(figure)


def roofline(results: Sequence[Result], peaks: dict[str, Any]) -> str:
    """Operations a second over operations per byte, under what the machine can do; empty without such results."""
    shown = [g for g in groups(results) if g[0].flops and g[0].bytes and g[0].share is not None]
    shown = [[r for r in g if r.backend != "cuda"] for g in shown]
    if not shown:
        return ""
    palette = colours(backends_of(results))
    figure = _figure(10.6, 5.4)
    axes = figure.add_axes((0.065, 0.1, 0.6, 0.87))
    intensities = [g[0].flops / g[0].bytes for g in shown]
    speeds = [r.flops / r.ms / 1e6 for g in shown for r in g]
    left, right = min(intensities) / 2, max([20.0, *intensities]) * 1.6
    low, high = min(speeds) / 2, max([peaks["gflops"], *speeds]) * 1.9
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    rise = 5.4 * 0.87 / math.log10(high / low) / (10.6 * 0.6 / math.log10(right / left))  # of a line of slope 1, on paper
    slope = {"rotation": math.degrees(math.atan(rise)), "rotation_mode": "anchor"}
    for level in ("memory", "cache"):
        bandwidth = peaks[level]
        start, knee = max(left, low / bandwidth), peaks["gflops"] / bandwidth
        if start < knee:
            axes.plot([start, knee], [start * bandwidth, peaks["gflops"]], color=FAINT, linewidth=1.4, zorder=1)
            x = (start**2 * knee) ** (1 / 3)
            axes.text(x, x * bandwidth * 1.15, f"{level} {bandwidth:.0f} GB/s", color=FAINT, fontsize=8, **slope)
    knee = peaks["gflops"] / max(peaks["cache"], peaks["memory"])
    axes.plot([min(knee, right), right], [peaks["gflops"]] * 2, color=FAINT, linewidth=1.4, zorder=1)
    axes.text(right, peaks["gflops"] * 1.08, f"multiply-adds {peaks['gflops']:.0f} GFLOP/s", ha="right", color=FAINT, fontsize=8)
    for number, (group, x) in enumerate(zip(shown, intensities, strict=True), 1):
        marker = MARKERS.get(group[0].family, "o")
        ys = [r.flops / r.ms / 1e6 for r in group]
        axes.plot([x, x], [min(ys), max(ys)], color=GRID, linewidth=1.2, zorder=2)
        for r, y in zip(group, ys, strict=True):
            axes.plot(x, y, marker, color=palette[r.backend], markersize=7, markeredgecolor="white", markeredgewidth=0.7, zorder=4)
        axes.annotate(str(number), (x, max(ys)), (0, 6), textcoords="offset points", ha="center", fontsize=7.5, color=INK, zorder=5)
    axes.set_xlabel("operations per byte that must move", color=FAINT)
    axes.set_ylabel("10⁹ operations a second", color=FAINT)
    axes.grid(color=GRID, zorder=0, linewidth=0.7)
    axes.minorticks_off()
    _bare(axes)
    y = 0.96
    for backend in [b for b in backends_of(results) if b != "cuda"]:
        figure.text(0.69, y, "●", color=palette[backend], fontsize=11, va="center")
        figure.text(0.71, y, label(backend), color=INK, va="center")
        y -= 0.042
    y -= 0.012
    step = min(0.042, (y - 0.02) / max(1, len(shown)))
    for number, group in enumerate(shown, 1):
        figure.text(0.705, y, str(number), color=FAINT, fontsize=8, ha="right", va="center")
        figure.text(0.712, y, f"{group[0].op.replace('scaled_dot_product', 'sdp')}", color=INK, fontsize=8, va="center")
        figure.text(0.995, y, group[0].shape, color=FAINT, fontsize=7, va="center", ha="right")
        y -= step
    return _svg(figure)
