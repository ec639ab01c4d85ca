"""A bracket as a sentence, as a figure, and as files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .. import report
from ..io import write_atomic
from ..report.figures import RULE
from ..results import percent
from ..user_input import typed
from .accuracy import without_nan
from .result import STATUS, Bracket

COLOURS = {
    "certified": report.CERTIFIED, "robust": report.ROBUST, "unknown": report.CLEAN, "missed": "#a3123a",
    "attacked": report.PGD50, "misclassified": report.LOST,
}  # fmt: skip
WIDTH = 5.6  # inches, as in the report's figures
TINY = 1e-12  # in units of the logits: the smallest number that is divided by


def sentence(bracket: Bracket) -> str:
    """Summarise a bracket: how many samples have each status, how near attacks come to s*, what s of training covers.

    Args:
        bracket: The result of ``holdfast.bracket.bracket``.

    Returns:
        One to three sentences.
    """
    counts = bracket.counts
    parts = [f"{counts[name]} {words.partition(':')[0]}" for name, words in STATUS.items() if counts[name]]
    sentences = [f"Of {len(bracket)} samples " + ", ".join(parts) + "."]
    right, exact = bracket.margin > 0, bracket.s_star
    if exact is not None and bool((right & ~exact.isnan()).any()):
        rows = right & ~exact.isnan()
        reached = (bracket.s_att / exact.clamp_min(TINY))[rows].median()
        sentences.append(f"In the median, attacks reach {percent(float(reached))}% of the worst-case margin drop")
        if bracket.s_cert is not None:
            times = float((bracket.s_cert / exact.clamp_min(TINY))[rows].median())
            sentences[-1] += f", and the certified bound is {times:.2f} times that drop"
        sentences[-1] += "."
    if bracket.trained_s is not None:
        worst, name = (bracket.s_att, "s_att") if exact is None else (exact, "s*")
        known = worst[right & ~worst.isnan()]
        if len(known):
            share = percent(float((bracket.trained_s >= known).double().mean()))
            sentences.append(
                f"Training used s = {bracket.trained_s:g}, which covers {name} of {share}% of the correctly classified "
                "samples."
            )
    return " ".join(sentences)


@typed
def figure(bracket: Bracket, name: str = "") -> Figure:
    """Draw a bracket. Above: s_att, s* and s_cert as curves, each margin as a dot. Below: the share of each status.

    Args:
        bracket: The result of ``holdfast.bracket.bracket``.
        name: The network's name, for the title.

    Returns:
        The matplotlib figure.
    """
    with report.style():
        below = 0.16 * math.ceil(sum(map(bool, bracket.counts.values())) / 2)  # the legend of the shares
        height = 3.96 + below
        canvas = Figure(figsize=(WIDTH, height))
        for draw, low, tall in ((_curves, 0.75 + below, 2.6), (_shares, 0.1 + below, 0.2)):
            draw(canvas.add_axes((0.58 / WIDTH, low / height, 1 - 0.7 / WIDTH, tall / height)), bracket)
        title = f"{name}, {bracket.threat}" if name else str(bracket.threat)
        canvas.text(0.12 / WIDTH, 1 - 0.16 / height, title, fontweight="bold", va="center")
    return canvas


def _curves(ax: Axes, bracket: Bracket) -> None:
    key = bracket.s_att if bracket.s_low is None else bracket.s_low
    order = key.argsort(stable=True)
    at = np.arange(1, len(bracket) + 1)
    margin, att = bracket.margin[order].numpy(), bracket.s_att[order].numpy()
    low, high, cert = (None if c is None else c[order].numpy() for c in (bracket.s_low, bracket.s_high, bracket.s_cert))
    handles = [Line2D([], [], color=report.PGD50, linewidth=1.6, label="s_att, reached by attacks")]
    if cert is not None:
        ax.fill_between(at, att if high is None else high, cert, color=report.CERTIFIED, alpha=0.12, linewidth=0)
        ax.plot(at, cert, color=report.CERTIFIED, linewidth=1.2, zorder=2)
        handles.insert(0, Line2D([], [], color=report.CERTIFIED, linewidth=1.2, label="s_cert, proved by bounds"))
    if low is not None and high is not None:
        ax.fill_between(at, low, high, color=report.INK, alpha=0.25, linewidth=0)
        ax.fill_between(at, att, low, color=report.LOST, linewidth=0)
        ax.plot(at, (low + high) / 2, color=report.INK, linewidth=2.4, zorder=2.2)
        handles.insert(-1, Line2D([], [], color=report.INK, linewidth=2.4, label="s*, exact"))
    ax.plot(at, att, color=report.PGD50, linewidth=0.9, zorder=2.4)
    if bracket.trained_s:
        ax.axhline(bracket.trained_s, color=report.MUTED, linewidth=1, linestyle=(0, (4, 2)), zorder=1.8)
        handles.append(Line2D([], [], color=report.MUTED, linewidth=1, linestyle=(0, (4, 2)),
                              label=f"s = {bracket.trained_s:g} in training"))  # fmt: skip
    tops = [side for side in (margin, att, cert) if side is not None]
    floor = _scale(ax, np.concatenate(tops), float(np.median(att)))
    status = np.array(bracket.status)[order.numpy()]
    size = 18 if len(bracket) <= 150 else 8
    for kind, colour in COLOURS.items():
        here = status == kind
        for rows, mark in ((here & (margin >= floor), "o"), (here & (margin < floor), "v")):  # v: below the axis
            dots: dict[str, Any] = {"s": size, "color": colour, "edgecolors": report.PAPER, "linewidths": 0.5}
            ax.scatter(at[rows], np.maximum(margin[rows], floor), marker=mark, clip_on=False, zorder=3, **dots)
    hollow: dict[str, Any] = {"color": report.MUTED, "markerfacecolor": "none", "linestyle": "none", "markersize": 4}
    handles.append(Line2D([], [], marker="o", label="margin (colours: below)", **hollow))
    if (margin < floor).any():
        handles.append(Line2D([], [], marker="v", label="below the axis", **hollow))
    ax.set_xlim(0, len(bracket) + 1)
    ax.set_xlabel("samples, by worst-case margin drop")
    ax.set_ylabel("logit margin")
    ax.spines[["right", "top"]].set_visible(False)
    ax.tick_params(length=3, width=0.8)
    ax.tick_params(axis="y", which="minor", length=2, width=0.6, color=RULE)
    ax.set_axisbelow(True)
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.legend(handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, borderpad=0,
              handlelength=1.6, columnspacing=1.4, borderaxespad=0.3)  # fmt: skip


def _scale(ax: Axes, values: Any, typical: float) -> float:
    """Make the y axis linear, or logarithmic if bounds are far above typical values; return its lowest value."""
    most = float(values.max())
    if most <= 6 * max(typical, 1e-12):
        low = min(0.0, float(values.min()))
        ax.set_ylim(low - 0.04 * most, 1.04 * most)
        return low
    floor = max(float(values[values > 0].min()) / 1.3, typical / 10)
    ax.set_yscale("log")
    ax.set_ylim(floor, 1.3 * most)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: "")
    return floor


def _shares(ax: Axes, bracket: Bracket) -> None:
    counts, left = bracket.counts, 0.0
    handles = []
    for kind, words in STATUS.items():
        share = 100 * counts[kind] / len(bracket)
        if share:
            ax.barh(0, share, 1.0, left=left, color=COLOURS[kind], edgecolor=report.PAPER, linewidth=0.8)
            handles.append(Patch(color=COLOURS[kind], label=f"{percent(share / 100)}% {words}"))
        left += share
    ax.set_ylim(-0.5, 0.5)
    ax.set_yticks([])
    ax.spines[["left", "right", "top", "bottom"]].set_visible(False)
    ax.set_xlim(0, 100)
    ax.set_xticks([])
    ax.legend(handles=handles, ncols=2, loc="upper left", bbox_to_anchor=(-0.01, -0.15), frameon=False, borderpad=0,
              handlelength=1.2, columnspacing=1.4, borderaxespad=0.3)  # fmt: skip


@typed
def save(bracket: Bracket, folder: str | Path, name: str = "") -> list[Path]:
    """Write bracket.json, bracket.svg, bracket.png and bracket.pdf.

    Args:
        bracket: The result of ``holdfast.bracket.bracket``.
        folder: An existing folder.
        name: The network's name, for the figure's title.

    Returns:
        The four files.
    """
    text = json.dumps(without_nan({**bracket.describe(), "sentence": sentence(bracket)}))
    drawn = report.write_figure(figure(bracket, name), folder, "bracket")
    return [write_atomic(Path(folder) / "bracket.json", text), *drawn]
