"""Figures drawn by matplotlib: as files, or as SVG that takes its colours from the page."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..io import write_atomic
from ..results import Results, any_certified, heading, percent, rows
from .summary import per_class, runs_of, stage_totals

# Distinct to colour-blind eyes (Okabe and Ito). In HTML each becomes a CSS variable, for dark mode.
INK, MUTED, RULE, PAPER = "#1b1f24", "#5b6570", "#d9dee3", "#fefefe"
CLEAN, PGD50, CERTIFIED, ROBUST, LOST = "#6b7684", "#d98200", "#009e73", "#0072b2", "#f0b27a"
# Accuracies as figures show them: name, colour, marker, its face.
MEASURES = (
    ("clean", CLEAN, "o", PAPER), ("pgd50", PGD50, "D", PGD50), ("certified", CERTIFIED, "s", CERTIFIED),
    ("robust", ROBUST, "o", ROBUST),
)  # fmt: skip
_VARIABLES = {
    INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", CLEAN: "clean", PGD50: "pgd50",
    CERTIFIED: "certified", ROBUST: "robust",
}  # fmt: skip
# float32 keeps 24 bits: 1 - p rounds to 0 for the true logit beyond 24 log 2; exp itself is 0 beyond 150 log 2.
DEAD_TRUE, DEAD_ALL = 24 * math.log(2), 150 * math.log(2)
WIDTH = 5.6


@contextmanager
def style() -> Iterator[None]:
    """A context in which figures are drawn and written: fonts, colours, reproducible SVG."""
    settings: Any = {
        "svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "holdfast", "text.parse_math": False,
        "font.family": "sans-serif", "font.size": 8, "text.color": INK, "axes.labelcolor": MUTED,
        "xtick.color": MUTED, "ytick.color": INK,
        "axes.edgecolor": RULE, "axes.linewidth": 0.8, "axes.facecolor": "none",
    }  # fmt: skip
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser brings its own fonts
        yield


def axes(lines: int, each: float, top: float) -> tuple[Figure, Axes]:
    """A figure with one horizontal band per row, the row's label above its band, so that long names fit a phone.

    Args:
        lines: number of bands.
        each: height of a band in inches.
        top: room above the plot in inches.

    Returns:
        The figure and its axes; band i spans y from i to i + 1, downwards.
    """
    height = lines * each + top + 0.45
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.add_axes((0.12 / WIDTH, 0.4 / height, 1 - 0.3 / WIDTH, lines * each / height))
    ax.set_ylim(lines, 0)
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
    ax.tick_params(axis="x", length=3, width=0.8)
    return figure, ax


def percent_axis(ax: Axes, what: str, most: float = 100) -> None:
    """Make the x axis one of percentages.

    Args:
        ax: the axes.
        what: its label.
        most: right end; beyond 100 there is room for text.
    """
    ax.set_xlim(0, most)
    ax.set_xticks(range(0, 101, 20))
    ax.set_xlabel(what)
    ax.set_axisbelow(True)
    ax.grid(axis="x", color=RULE, linewidth=0.6)


def short(text: str, most: int = 64) -> str:
    """Text on one line, its middle cut out beyond ``most`` characters; what cannot be printed is a question mark.

    >>> short("isce:s=10+adversarial:steps=5", 20)
    'isce:s=10+…l:steps=5'
    """
    text = "".join(c if c.isprintable() else "?" for c in text)
    end = (most - 1) // 2
    return text if len(text) <= most else text[: most - 1 - end] + "…" + text[len(text) - end :]


def two_lines(text: str, most: int = 26) -> str:
    """A name for a narrow panel: on two lines where it is longer than ``most``, broken after a separator.

    >>> two_lines("isce:s=10+adversarial:steps=5,ramp=0.3")
    'isce:s=10+adversarial:\\nsteps=5,ramp=0.3'
    """
    text = short(text, 2 * most - 4)  # lines break before they are full
    ends = [found.end() for found in re.finditer("[-+@,:/ ]+", text) if len(text) - most <= found.end() <= most]
    if len(text) <= most:
        return text
    end = max(ends, default=most)
    return f"{text[:end].rstrip()}\n{text[end:]}"


def draw_accuracy(results: Results) -> Figure:
    """Clean, PGD-50, certified and robust accuracy of each row; a broad bar spans certified to robust."""
    shown = rows(results)
    figure, ax = axes(len(shown), 0.46, 0.3)
    certified = any_certified(shown)
    known = {"certified": certified, "pgd50": any(row.pgd50 for row in shown)}
    markers = [marker for marker in MEASURES if known.get(marker[0], True)]
    for i, row in enumerate(shown):
        at = i + 0.68
        ax.text(0, i + 0.34, short(row.label), va="center", fontweight="bold")
        if row.robust is not None and row.pgd50 is not None:
            ax.plot([100 * row.robust.value, 100 * row.pgd50.value], [at, at], color=RULE, linewidth=4, zorder=1.5)
        if certified and row.robust is not None and row.certified is not None:
            ends = [100 * row.certified.value, 100 * row.robust.value]
            ax.plot(ends, [at, at], color=ROBUST, alpha=0.25, linewidth=7, solid_capstyle="butt", zorder=1.6)
            for end, colour in zip(ends, (CERTIFIED, ROBUST), strict=True):
                ax.plot([end, end], [at - 0.17, at + 0.17], color=colour, linewidth=1.6, zorder=2.5)
        for name, colour, marker, face in markers:
            value = getattr(row, name)
            if value is None:
                if name == "robust":
                    ax.text(0.5, at, "robust: void", va="center", color=MUTED, style="italic")
                continue
            ax.plot([100 * value.low, 100 * value.high], [at, at], color=colour, linewidth=1.4, zorder=2)
            ax.plot([100 * value.value], [at], marker, color=colour, markerfacecolor=face, markersize=5.5,
                    linestyle="none", zorder=3)  # fmt: skip
    percent_axis(ax, "accuracy, %")
    handles = [Line2D([], [], color=c, marker=m, linewidth=1.4, markersize=5, label=heading(n), markerfacecolor=f)
               for n, c, m, f in markers]  # fmt: skip
    legend(ax, handles, len(markers))
    return figure


def legend(ax: Axes, handles: Sequence[Any], columns: int) -> None:
    """Put a legend above a plot, aligned with its left edge."""
    ax.legend(handles=handles, ncols=columns, loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False,
              borderpad=0, handlelength=1.6, columnspacing=1.4, borderaxespad=0.3)  # fmt: skip


def draw_stages(results: Results) -> Figure | None:
    """Share of samples misclassified, broken by each stage, or robust, for each row; None without stages."""
    shown = [(row, stage_totals(results, row)) for row in rows(results) if row.robust is not None]
    shown = [(row, stages) for row, stages in shown if stages]
    if not shown:
        return None
    broken = {stage.name for _, stages in shown for stage in stages if stage.broken}
    names = [name for name in dict.fromkeys(s.name for _, stages in shown for s in stages) if name in broken]
    ramp = mpl.colormaps["YlOrRd"](np.linspace(0.25, 0.95, max(2, len(names))))
    colours = {"misclassified": CLEAN, **{n: to_hex(c) for n, c in zip(names, ramp, strict=False)}, "robust": ROBUST}
    figure, ax = axes(len(shown), 0.5, 0.1 + 0.17 * math.ceil((len(names) + 2) / 3))
    for i, (row, stages) in enumerate(shown):
        n = row.n * len(row.runs)
        wrong = round((1 - row.clean.value) * n)
        parts = {"misclassified": wrong, **{stage.name: stage.broken for stage in stages if stage.broken}}
        parts["robust"] = max(0, n - sum(parts.values()))
        ax.text(0, i + 0.3, short(row.label, 48), va="center", fontweight="bold")
        cost = f"{sum(stage.passes for stage in stages) / n:,.0f} passes per sample"
        ax.text(100, i + 0.3, cost, va="center", ha="right", color=MUTED)
        left = 0.0
        for name, count in parts.items():
            share = 100 * count / n
            ax.barh(i + 0.7, share, 0.42, left=left, color=colours[name], edgecolor=PAPER, linewidth=0.8)
            if share >= 6:
                light = np.dot((0.3, 0.59, 0.11), to_rgb(colours[name])) > 0.55
                ink = "#111111" if light else "#ffffff"
                ax.text(left + share / 2, i + 0.71, f"{share:.0f}", ha="center", va="center", color=ink)
            left += share
    percent_axis(ax, "samples, %")
    legend(ax, [Patch(color=c, label=short(heading(n), 24)) for n, c in colours.items()], 3)
    return figure


def _log(m: Any) -> Any:
    """Linear between -1 and 1, logarithmic beyond: margins are signed and span decades."""
    size = np.abs(m)
    return np.sign(m) * np.where(size <= 1, size, 1 + np.log10(np.maximum(size, 1)))


def draw_margins(results: Results) -> Figure | None:
    """Histograms of the clean margins, and where cross-entropy's float32 gradient is zero; None without samples."""
    columns = []
    for row in rows(results):
        every = [v for r in runs_of(results, row) if r.samples is not None for v in r.samples.margin]
        if finite := [v for v in every if v is not None]:
            columns.append((row, np.array(finite), len(every) - len(finite)))
    if not columns:
        return None
    low = min(-1.0, *(c[1].min() for c in columns))
    high = max(2 * DEAD_ALL, *(c[1].max() for c in columns))
    edges = np.linspace(_log(low), _log(high), 81)
    figure, ax = axes(len(columns), 0.72, 0.2)
    for i, (row, margins, missing) in enumerate(columns):
        heights, _ = np.histogram(_log(margins), edges)
        base, scale = i + 1.0, 0.5 / max(1, heights.max())
        ax.stairs(base - heights * scale, edges, baseline=base, fill=True, color=ROBUST, alpha=0.75, linewidth=0)
        ax.axhline(base, color=RULE, linewidth=0.8)
        some, every_one = (percent((margins > dead).mean()) for dead in (DEAD_TRUE, DEAD_ALL))
        infinite = f", {missing:,} without a finite margin" if missing else ""
        beyond = f"{some}% beyond {DEAD_TRUE:.1f}, {every_one}% beyond {DEAD_ALL:.0f}{infinite}"
        ax.text(edges[0], i + 0.16, short(row.label), va="center", fontweight="bold")
        ax.text(edges[0], i + 0.37, beyond, va="center", color=MUTED, fontsize=7)
    for dead in (DEAD_TRUE, DEAD_ALL):
        ax.axvline(_log(dead), color=PGD50, linewidth=1, linestyle=(0, (4, 2)), zorder=3)
        name = f"{dead:.1f}" if dead < 100 else f"{dead:.0f}"
        ax.text(_log(dead), -0.06, name, ha="center", va="bottom", color=PGD50)
    ticks = [0, *(s * 10.0**k for k in range(12) for s in (-1, 1))]
    ticks = sorted(t for t in ticks if low <= t <= high)
    ax.set_xticks([float(_log(t)) for t in ticks], [f"{t:g}".replace("-", "−") for t in ticks])
    ax.set_xlim(edges[0], edges[-1])
    ax.set_xlabel("clean margin (true logit minus the largest other logit), log scale beyond ±1")
    return figure


def draw_classes(results: Results) -> Figure | None:
    """Robust accuracy of each class as a heat map; None without samples."""
    found = per_class(results)
    labels, classes = found.rows, found.classes
    if not classes:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(classes)), layout="constrained")
    ax = figure.add_subplot()
    grid = np.array([[np.nan if v is None else 100 * v for v in one.robust] for one in classes])
    mesh = ax.pcolormesh(grid, cmap="Blues", vmin=0, vmax=100, edgecolors=PAPER, linewidth=1)
    ax.set_xticks(
        [j + 0.5 for j in range(len(labels))], [short(label, 24) for label in labels], rotation=30, ha="right"
    )
    ax.set_yticks([i + 0.5 for i in range(len(classes))], [short(one.name, 24) for one in classes])
    ax.invert_yaxis()
    figure.colorbar(mesh, label="robust accuracy, %")
    return figure


def write_figure(figure: Figure, dir: str | Path, name: str) -> list[Path]:
    """Write a figure as SVG (its text stays text), PNG (300 dpi) and PDF (fonts embedded).

    Args:
        figure: what to write.
        dir: the folder.
        name: file name without suffix.

    Returns:
        The paths of ``name.svg``, ``name.png`` and ``name.pdf``.

    Raises:
        UserError: a file cannot be written.
    """
    written = []
    with style():
        for form, date in (("svg", "Date"), ("png", "Software"), ("pdf", "CreationDate")):
            buffer = BytesIO()  # without its date, so that equal figures are equal files
            figure.savefig(buffer, format=form, dpi=300, facecolor="white", metadata={date: None})
            written.append(write_atomic(Path(dir) / f"{name}.{form}", buffer.getvalue()))
    return written


def inline(draw: Callable[[Results], Figure | None], results: Results, prefix: str) -> Markup | None:
    """The figure as SVG for an HTML page: no header, no namespace, ids of its own, colours from the page.

    Args:
        draw: what draws the figure; it may return None.
        results: its argument.
        prefix: prepended to every id, so that several figures fit on one page.

    Returns:
        Markup, or None where ``draw`` returned None.
    """
    with style():
        figure = draw(results)
        if figure is None:
            return None
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    extra = r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>"
    svg = re.sub(extra, "", svg[svg.index("<svg") :], flags=re.S)
    view = re.search(r'viewBox="([^"]*)"', svg)
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="{view[1] if view else ""}" aria-hidden="true">', svg, count=1)

    def adapt(tag: re.Match[str]) -> str:
        own = re.sub(r'\bid="', f'id="{prefix}', tag[0]).replace("url(#", f"url(#{prefix}")
        own = own.replace('xlink:href="#', f'href="#{prefix}')
        own = re.sub(r"(font: [^;\"']*?\d+(?:\.\d+)?px) [^;\"]*", r"\1 system-ui, sans-serif", own)
        for colour, variable in _VARIABLES.items():
            own = own.replace(f": {colour}", f": var(--{variable})")
        return own

    return Markup(re.sub(r"<[^>]+>", adapt, svg))
