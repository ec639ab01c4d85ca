"""Training curves from a run's log: loss, accuracies and robust overfitting, as a sentence and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from .. import report, run_folder
from ..errors import UserError
from ..io import decode, parse_json
from ..results import percent
from ..user_input import typed
from .checkpoint import LOG_FILE, LogLine
from .config import best_epoch


@dataclass(frozen=True)
class Curve:
    """The log of one run.

    Attributes:
        name: its loss and seed.
        history: one line per epoch, as fit wrote it.
    """

    name: str
    history: tuple[dict[str, Any], ...]

    @property
    def loss(self) -> list[float]:
        """Training loss by epoch."""
        return [line["loss"] for line in self.history]

    @property
    def val(self) -> list[float | None]:
        """Validation accuracy by epoch, None without validation images."""
        return [line["val"] for line in self.history]

    @property
    def robust(self) -> list[float | None]:
        """Robust validation accuracy by epoch, None where it was not measured."""
        return [line.get("val_robust") for line in self.history]

    @property
    def best(self) -> int | None:
        """The best epoch, counted from 1, by robust validation accuracy, or by accuracy where that was not measured."""
        return best_epoch(self.history)

    @property
    def overfitting(self) -> float | None:
        """Robust overfitting: robust validation accuracy of the best epoch minus the last one's, in [0, 1]."""
        known = [value for value in self.robust if value is not None]
        return None if not known or self.robust[-1] is None else max(known) - self.robust[-1]


@typed
def read(run: str | Path) -> Curve:
    """Read the log of a run folder, finished or not.

    Args:
        run: the folder.

    Returns:
        The curve.

    Raises:
        UserError: the folder has no log, or it cannot be read.
    """
    run = Path(run)
    path = run / LOG_FILE
    if not path.is_file():
        raise UserError(f"{run} has no {LOG_FILE}: give a run folder that `holdfast train` or `compare` wrote to.")
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        lines = [decode(LogLine, parse_json(text), f"line {i}") for i, text in enumerate(texts, 1)]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): is it a log that holdfast wrote?") from None
    if not lines:
        raise UserError(f"{path} is empty: no epoch has ended yet.")
    config = run_folder.read_config(run) if (run / "config.json").is_file() else {}
    seed = config.get("fit", {}).get("seed")
    name = config.get("loss", run.name) + ("" if seed is None else f", seed {seed}")
    objective = config.get("objective", "standard")
    if objective != "standard" and objective not in name:
        name += f", {objective}"
    return Curve(name, tuple(lines))


@typed
def folders(path: str | Path) -> list[Path]:
    """Find the run folders that a path stands for: itself, or those in the output folder of a comparison.

    Args:
        path: a run folder, or an output folder.

    Returns:
        The run folders, sorted.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / LOG_FILE).is_file():
        return [path]
    runs = sorted(file.parent for file in (path / "runs").glob(f"*/{LOG_FILE}"))
    if not runs:
        raise UserError(f"{path} is neither a run folder nor the output of a comparison: it holds no {LOG_FILE}.")
    return runs


@typed
def sentence(curve: Curve) -> str:
    """Describe a curve in one line: epochs, loss, accuracies, and what the best epoch had."""
    epochs = len(curve.loss)
    text = f"{curve.name}: {epochs} epoch{'s' * (epochs != 1)}, loss {curve.loss[-1]:.4g}"
    if curve.val[-1] is not None:
        text += f", validation {percent(curve.val[-1])}%"
    if curve.robust[-1] is None or curve.overfitting is None:
        return text + "."
    text += f", robust validation {percent(curve.robust[-1])}%"
    if curve.overfitting > 0:
        return text + f"; epoch {curve.best} had {percent(curve.robust[-1] + curve.overfitting)}%."
    return text + ", the best of all epochs."


@typed
def figure(curves: Sequence[Curve]) -> Figure:
    """Draw curves: training loss above, validation accuracy below (clean grey, robust blue, a dot at the best epoch).

    Args:
        curves: the runs, each in a line style of its own.

    Returns:
        The figure.
    """
    with report.style():
        chart = Figure(figsize=(report.WIDTH, 4.2), layout="constrained")
        top, bottom = chart.subplots(2, 1, sharex=True, height_ratios=[2, 3])
        for number, curve in enumerate(curves):
            epochs = range(1, len(curve.loss) + 1)
            style = {"linewidth": 1.3, "linestyle": ("-", "--", ":", "-.")[number % 4], "alpha": 0.9}
            top.plot(epochs, curve.loss, color=report.INK, label=curve.name, **style)
            for accuracies, colour in ((curve.val, report.CLEAN), (curve.robust, report.ROBUST)):
                bottom.plot(epochs, [math.nan if v is None else 100 * v for v in accuracies], color=colour, **style)
            if curve.best is not None and curve.robust[curve.best - 1] is not None:
                bottom.plot(curve.best, 100 * float(curve.robust[curve.best - 1] or 0), "o", color=report.ROBUST, ms=5)
        top.set_ylabel("training loss")
        if all(value > 0 for curve in curves for value in curve.loss):
            top.set_yscale("log")
            top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            top.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # plain text, as the names are users'
            top.yaxis.set_minor_formatter(lambda value, _: "")
        if len(curves) <= 8:
            top.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=6.5)
        bottom.set_ylabel("validation accuracy, %")
        shown = [("clean", report.CLEAN), ("robust", report.ROBUST)]
        shown = shown if any(v is not None for curve in curves for v in curve.robust) else shown[:1]
        handles = [Line2D([], [], color=colour, label=name) for name, colour in shown]
        bottom.legend(handles=handles, loc="lower right", frameon=False, ncols=2)
        bottom.set_xlabel("epoch" + " (dot: the best by robust accuracy)" * (len(shown) > 1))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in (top, bottom):
            ax.spines[["right", "top"]].set_visible(False)
            ax.set_axisbelow(True)
            ax.grid(axis="y", color=report.RULE, linewidth=0.6)
    return chart


@typed
def save(curves: Sequence[Curve], folder: str | Path) -> list[Path]:
    """Write curves.svg, curves.png and curves.pdf to a folder.

    Args:
        curves: the runs.
        folder: where to write.

    Returns:
        The paths of the three files.
    """
    return report.write_figure(figure(curves), folder, "curves")
