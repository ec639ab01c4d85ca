"""The figure of a bracket of accuracy: the proved share against time, a part of the curve for each method."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import report
from ..report.figures import RULE
from ..report.panels import LINES
from ..results import PROOF_METHODS, percent, seconds_text
from ..user_input import typed
from .accuracy import AccuracyBracket
from .plot import WIDTH

COLOURS = (*LINES[:5], LINES[6])
MARKS = dict(zip(PROOF_METHODS, zip(COLOURS, "osD^vp", strict=True), strict=True))  # colour and marker of each method
SHORTEST = 1e-3  # seconds: where the axis begins at the latest


@typed
def proof_figure(found: AccuracyBracket, name: str = "") -> Figure | None:
    """Draw the share of samples that is proved against the seconds that proofs took, cheapest proofs first.

    Samples stand in the order of the methods that proved them, and of their own seconds: those of all methods that were
    tried on them. What was spent on samples that were not proved comes last, dotted. The horizontal line is the
    attacked share: no proof reaches beyond it.

    Args:
        found: the result of ``bracket_accuracy``.
        name: the network's name, for the title.

    Returns:
        The matplotlib figure; None where no sample is proved.
    """
    proved = found.proved_by
    if not proved:
        return None
    with report.style():
        height = 2.9 + 0.17 * ((len(proved) + 3) // 2)
        canvas = Figure(figsize=(WIDTH, height), layout="constrained")
        ax = canvas.subplots()
        handles = _curve(ax, found)
        attacked = 100 * found.attacked.value
        handles.append(
            ax.axhline(attacked, color=report.ROBUST, linewidth=1.2, linestyle=(0, (5, 2)), zorder=1.8,
                       label=f"attacked: at most {percent(found.attacked.value)}%")
        )  # fmt: skip
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(lambda value, _: "")
        ax.set_ylim(0, 100)
        ax.set_xlabel("seconds of proofs, all samples together")
        ax.set_ylabel("proved, % of the samples")
        ax.spines[["right", "top"]].set_visible(False)
        ax.tick_params(length=3, width=0.8)
        ax.set_axisbelow(True)
        ax.grid(color=RULE, linewidth=0.6)
        ax.legend(handles=handles, ncols=2, loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, borderpad=0,
                  handlelength=1.8, columnspacing=1.4, borderaxespad=0.3)  # fmt: skip
        title = f"{name}, {found.threat}" if name else str(found.threat)
        canvas.suptitle(title, fontweight="bold", x=0.01, ha="left", fontsize="medium")
    return canvas


def _time(seconds: float) -> str:
    """Seconds as the legend shows them: two digits of a short time."""
    return f"{seconds:.2g} s" if seconds < 1 else seconds_text(seconds)


def _curve(ax: Axes, found: AccuracyBracket) -> list[Any]:
    """Draw the parts of the curve; returns what stands for them in the legend."""
    seconds, n, handles = found.seconds.numpy(), len(found), []
    spent, count, status = 0.0, 0, np.array(found.status)
    at: list[float] = []
    share = [0.0]
    for method in found.proved_by:
        rows = [row for row, by in enumerate(found.by) if by == method and status[row] == "proved"]
        each = np.sort(seconds[rows])
        x = np.maximum(spent + np.cumsum(each), SHORTEST)
        y = 100 * (count + np.arange(1, len(x) + 1)) / n
        colour, mark = MARKS[method]
        begin = ([at[-1]], [share[-1]]) if at else ([x[0]], [0.0])
        label = f"{method}: {len(rows):,} proved, {_time(float(each.sum()))}"
        [line] = ax.step(
            np.concatenate([begin[0], x]), np.concatenate([begin[1], y]), where="post", color=colour, linewidth=1.8,
            marker=mark, markevery=[len(x)], markersize=5, markeredgecolor=report.PAPER, label=label, clip_on=False,
        )  # fmt: skip
        handles.append(line)
        at, share = [float(x[-1])], [float(y[-1])]
        spent, count = spent + float(each.sum()), count + len(rows)
    rest = float(seconds.sum()) - spent
    if rest > 0:
        between = found.counts["between"]
        words = f"not proved ({between:,} between): {_time(rest)}"
        [line] = ax.plot(
            [at[-1], at[-1] + rest], [share[-1]] * 2, color=report.MUTED, linewidth=1.4, linestyle=(0, (1, 1.5)),
            label=words,
        )  # fmt: skip
        handles.append(line)
    return handles
