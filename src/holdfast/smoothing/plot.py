"""A smoothed classifier's accuracy as a figure and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .. import report
from ..io import write_atomic
from ..user_input import typed
from .result import SmoothedAccuracy, confidence_text, sentence

WIDTH, HEIGHT = 5.6, 3.2  # inches, the width as in the report's figures
POINTS = 200  # of the curve


@typed
def figure(found: SmoothedAccuracy, name: str = "") -> Figure:
    """Draw certified accuracy of the smoothed classifier against the l2 radius, and what attacks leave at each radius.

    Args:
        found: The result.
        name: The network's name, for the title.

    Returns:
        The matplotlib figure.
    """
    vote = found.smoothed.vote
    end = max([vote.largest_radius, *found.radii, vote.sigma])
    at = np.linspace(0, end, POINTS)
    certified = [found.certified_accuracy(float(radius)) for radius in at]
    with report.style():
        canvas = Figure(figsize=(WIDTH, HEIGHT))
        ax = canvas.add_axes((0.6 / WIDTH, 0.5 / HEIGHT, 1 - 0.75 / WIDTH, 1 - 1.15 / HEIGHT))
        low, value, high = 100 * np.array([(one.low, one.value, one.high) for one in certified]).T
        ax.fill_between(at, low, high, color=report.CERTIFIED, alpha=0.15, linewidth=0)
        ax.plot(at, value, color=report.CERTIFIED, linewidth=1.6, label="certified, 95% interval over samples")
        for number, radius in enumerate((0.0, *found.radii)):
            one = found.attacked_accuracy(radius)
            ax.plot([radius, radius], [100 * one.low, 100 * one.high], color=report.ROBUST, linewidth=1.2)
            ax.plot([radius], [100 * one.value], "o", color=report.ROBUST, markersize=4.5,
                    label="" if number else "left by attacks")  # fmt: skip
        ax.set_xlim(-0.02 * end, 1.02 * end)
        ax.set_ylim(0, 102)
        ax.set_xlabel("l2 radius")
        ax.set_ylabel("% of samples")
        ax.spines[["right", "top"]].set_visible(False)
        ax.set_axisbelow(True)
        ax.grid(axis="y", color=report.RULE, linewidth=0.6)
        ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, borderpad=0, borderaxespad=0.3)
        title = f"smoothed classifier{f' of {name}' if name else ''}, sigma {vote.sigma:g}"
        canvas.text(0.12 / WIDTH, 1 - 0.16 / HEIGHT, title, fontweight="bold", va="center")
        caption = f"not the network itself; each certificate holds with probability {confidence_text(vote.alpha)}"
        canvas.text(0.12 / WIDTH, 1 - 0.34 / HEIGHT, caption, color=report.MUTED, va="center")
    return canvas


@typed
def save(
    found: SmoothedAccuracy, folder: str | Path, name: str = "", about: dict[str, Any] | None = None
) -> list[Path]:
    """Write smoothing.json, smoothing.svg, smoothing.png and smoothing.pdf.

    Args:
        found: The result.
        folder: An existing folder.
        name: The network's name, for the figure's title.
        about: What else the JSON says, such as network and data.

    Returns:
        The four files.
    """
    text = json.dumps({**(about or {}), **found.describe(), "sentence": sentence(found)})
    drawn = report.write_figure(figure(found, name), folder, "smoothing")
    return [write_atomic(Path(folder) / "smoothing.json", text), *drawn]
