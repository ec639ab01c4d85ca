"""Figures with one panel per row: confusion matrices, accuracy over eps, features in two dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..results import Results, corruption_tables, rows
from ..user_input import typed
from .figures import INK, MUTED, PAPER, PGD50, RULE, WIDTH, legend, short, two_lines
from .summary import EpsCurve, class_name, confusion, eps_curves

MOST_CLASSES, MOST_PANELS, MOST_POINTS, ACROSS = 20, 24, 120, 3
# Okabe and Ito's eight, in an order that keeps neighbours apart.
LINES = ("#0072b2", "#d98200", "#009e73", "#cc79a7", "#56b4e9", "#6b7684", "#4a3aa7", "#b8a400")
CLASSES = (*LINES, "#d55e00", "#8c564b")
EACH, MARKERS = 5, "osD^vP*"  # of curves: how many on each; colour and marker together differ up to 56 curves
DASHED = (0, (2.5, 1.6))  # where a curve is in doubt


def panels(count: int, draw: Callable[[int, Axes], None], height: float, across: int = ACROSS) -> Figure:
    """A figure of panels in lines.

    Args:
        count: number of panels.
        draw: called as ``draw(i, ax)`` for each.
        height: height of a line in inches.
        across: panels per line.

    Returns:
        The figure.
    """
    across = min(across, count)
    lines = math.ceil(count / across)
    figure = Figure(figsize=(WIDTH, lines * height), layout="constrained")
    grid = np.atleast_1d(figure.subplots(lines, across, squeeze=False)).ravel()
    for i, ax in enumerate(grid):
        if i < count:
            draw(i, ax)
        else:
            ax.set_axis_off()
    return figure


def draw_confusion(results: Results) -> Figure | None:
    """Confusion matrix under attack of each row, in shares of a class; None without the column or for many classes."""
    every = [(row.label, confusion(results, row)) for row in rows(results)]
    shown = [(label, counts) for label, counts in every if counts][:MOST_PANELS]
    known = results.data.get("classes")
    occurring = [1 + max(pair) for _, counts in shown for pair in counts]
    k = max([0, *occurring, len(known) if isinstance(known, list) else 0])
    if not shown or not 1 < k <= MOST_CLASSES:
        return None
    names, shares = [short(class_name(results, y), 6) for y in range(k)], np.zeros((len(shown), k, k))
    for share, (_, counts) in zip(shares, shown, strict=True):
        for pair, n in counts.items():
            share[pair] = n
        share /= np.maximum(1, share.sum(1, keepdims=True))
        np.fill_diagonal(share, np.nan)
    most = max(0.01, float(np.nanmax(shares)))

    def draw(i: int, ax: Axes) -> None:
        ax.imshow(100 * shares[i], cmap=fading(PGD50), vmin=0, vmax=100 * most)
        step = 1 if k <= 10 else 2
        ax.set_xticks(range(0, k, step), names[::step], fontsize=6, rotation=90 * (k > 10))
        ax.set_yticks(range(0, k, step), names[::step], fontsize=6)
        ax.tick_params(length=0, pad=1)
        ax.set_title(two_lines(shown[i][0]), fontsize=7, fontweight="bold", color=INK)
        if i % ACROSS == 0:
            ax.set_ylabel("class", fontsize=7)
        ax.set_xlabel("prediction", fontsize=7, labelpad=1)
        for spine in ax.spines.values():
            spine.set_color(RULE)

    figure = panels(len(shown), draw, 1.95)
    image = figure.axes[0].images[0]
    bar = figure.colorbar(image, ax=figure.axes, location="top", shrink=0.5, aspect=40, format="%.0f%%")
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)
    return figure


def fading(colour: str) -> Any:
    """A colour map from transparent to a colour, for light and dark pages; NaN is transparent."""
    r, g, b, _ = to_rgba(colour)
    return ListedColormap([(r, g, b, a) for a in np.linspace(0, 1, 64)])


@typed
def draw_corruptions(results: Results) -> Figure | None:
    """Accuracy under each kind of corruption at each severity, a panel for each row, the errors shaded; else None."""
    tables = corruption_tables(results)[:MOST_PANELS]
    if not tables:
        return None

    def draw(i: int, ax: Axes) -> None:
        table = tables[i]
        values = 100 * np.array(list(table.accuracy.values()))
        ax.imshow(100 - values, cmap=fading(PGD50), vmin=0, vmax=140, aspect="auto")  # faint below the numbers
        for (line, column), value in np.ndenumerate(values):
            ax.text(column, line, f"{value:.0f}", ha="center", va="center", fontsize=6, color=INK)
        ax.set_xticks(range(len(table.severities)), [str(severity) for severity in table.severities], fontsize=6)
        names = [kind.replace("_", " ") for kind in table.accuracy] if i % ACROSS == 0 else [""] * len(values)
        ax.set_yticks(range(len(values)), names, fontsize=6)
        ax.tick_params(length=0, pad=1)
        ax.set_title(two_lines(table.label), fontsize=7, fontweight="bold", color=INK)
        ax.set_xlabel("severity", fontsize=7, labelpad=1)
        for spine in ax.spines.values():
            spine.set_color(RULE)

    return panels(len(tables), draw, 0.6 + 0.17 * max(len(table.accuracy) for table in tables))


@typed
def draw_eps(results: Results) -> Figure | None:
    """Robust accuracy over eps, from the smallest perturbation found for each measured sample; a panel for each norm.

    Dots: the robust accuracy at the threat itself, over all samples. Dashed: where the curve is in doubt
    (``eps_curves``). A void row has neither. None without distances.
    """
    norms: dict[str, list[EpsCurve]] = {}
    for curve in eps_curves(results):
        norms.setdefault(results.runs[curve.row.runs[0]].threat["norm"], []).append(curve)
    if not norms:
        return None
    lines = max(map(len, norms.values()))
    columns = 1 if max(len(_with_verdict(curve)) for curves in norms.values() for curve in curves) > 34 else 2
    figure = Figure(figsize=(WIDTH, len(norms) * (2.5 + 0.17 * math.ceil(lines / columns))), layout="constrained")
    for ax, (norm, curves) in zip(figure.subplots(len(norms), 1, squeeze=False)[:, 0], norms.items(), strict=True):
        most = 2 * max(curve.eps for curve in curves)
        handles = []
        for i, curve in enumerate(curves):
            colour, marker = LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
            styles = [_draw_curve(ax, curve, *part, colour) for part in _parts_of(curve, most)]
            handles.append(Line2D([], [], color=colour, label=_with_verdict(curve), linewidth=1.2,
                                  marker=marker, markersize=4, linestyle="-" if "-" in styles else DASHED))  # fmt: skip
            at = [most * (k + (i + 0.5) / len(curves)) / EACH for k in range(EACH)]  # apart from those of other curves
            ax.plot(at, [100 * curve.at(eps) for eps in at], marker, color=colour, markersize=3.5,
                    markerfacecolor=PAPER, markeredgewidth=0.9, zorder=2.5)  # fmt: skip
            if curve.row.robust is not None:
                ax.plot([curve.eps], [100 * curve.row.robust.value], marker, color=colour, markersize=5, zorder=3)
        ax.set_xlim(0, most)
        ax.set_ylim(0, 100)
        ax.set_xlabel(f"eps, {norm}")
        ax.set_ylabel("robust accuracy, %", color=MUTED)
        ax.grid(color=RULE, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        legend(ax, handles, columns)
    return figure


def _with_verdict(curve: EpsCurve) -> str:
    """A curve's name in the legend, with the verdict at its dot."""
    status = curve.row.status
    return short(curve.row.label) + (f", {status} at {curve.eps:.3g}" if status else "")


def _parts_of(curve: EpsCurve, most: float) -> list[tuple[float, float]]:
    """The eps axis cut where a curve begins or ceases to be in doubt."""
    ends = sorted({0.0, most, *(end for part in curve.doubtful for end in part if end < most)})
    out: list[tuple[float, float]] = []
    for low, high in itertools.pairwise(ends):
        alike = out and curve.is_doubtful((sum(out[-1])) / 2) == curve.is_doubtful((low + high) / 2)
        out = [*out[:-1], (out[-1][0], high)] if alike else [*out, (low, high)]
    return out


def _draw_curve(ax: Axes, curve: EpsCurve, low: float, high: float, colour: str) -> str | tuple[int, tuple[float, ...]]:
    """Draw one part of a curve, and return its line style."""
    style = DASHED if curve.is_doubtful((low + high) / 2) else "-"
    at = [low, *(d for d in curve.distances if low < d < high), high]
    ax.step(at, [100 * curve.at(eps) for eps in at], where="post", color=colour, linestyle=style, linewidth=1.2)
    return style


def draw_features(results: Results) -> Figure | None:
    """Clean features joined to their adversarial ones, over the decision regions; None without projections."""
    first = [(row, results.runs[row.runs[0]]) for row in rows(results)]
    shown = [(row, run.projection) for row, run in first if run.projection is not None and row.robust is not None][
        :MOST_PANELS
    ]
    if not shown:
        return None

    def draw(i: int, ax: Axes) -> None:
        row, projection = shown[i]
        grid, s, y = projection.grid, projection.s, np.array(projection.y)[:MOST_POINTS]
        colours = class_colours(projection.classes)
        if grid is not None:
            paint = colours[np.array(grid.prediction)].copy()
            margin = np.array(grid.margin, dtype=float)  # None becomes NaN
            paint[..., 3] = 0.14 if s is None else np.where(margin <= s, 0.5, 0.14)
            box = (grid.across[0], grid.across[-1], grid.up[0], grid.up[-1])
            ax.imshow(paint, origin="lower", extent=box, aspect="auto", interpolation="nearest")
            ax.set_xlim(box[:2])
            ax.set_ylim(box[2:])
        start, end = (
            np.array(points, dtype=float)[:MOST_POINTS] for points in (projection.points, projection.points_adv)
        )
        joined = np.stack([start, end, np.full_like(start, np.nan)], 1).reshape(-1, 2)
        ax.plot(joined[:, 0], joined[:, 1], color=INK, linewidth=0.35, alpha=0.45)
        for k in np.unique(y):
            ax.plot(*start[y == k].T, "o", color=to_hex(colours[k][:3]), markersize=2.4, markeredgewidth=0)
            ax.plot(*end[y == k].T, "x", color=to_hex(colours[k][:3]), markersize=2.6, markeredgewidth=0.7)
        ax.set_title(two_lines(row.label), fontsize=7, fontweight="bold", color=INK)
        ax.set_xticks([])
        ax.set_yticks([])
        if projection.exact:
            ax.set_xlabel("first pixel", fontsize=7)
            ax.set_ylabel("second pixel", fontsize=7)
        elif projection.explained is not None:
            explained = f"{100 * projection.explained:.0f}% of the variance of class centers"
            ax.set_xlabel(explained, fontsize=5.5, labelpad=2)
        for spine in ax.spines.values():
            spine.set_color(RULE)

    return panels(len(shown), draw, 2.1)


def class_colours(count: int) -> np.ndarray:
    """(count, 4) RGBA, one colour for each class: Okabe and Ito's for few classes, a colour map for many."""
    if count <= len(CLASSES):
        return np.array([to_rgba(colour) for colour in CLASSES[:count]])
    return mpl.colormaps["turbo"](np.linspace(0.05, 0.95, count))
