"""Training as its log tells it: loss and accuracies by epoch, robust overfitting, as a table line and as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .. import report, run_folder
from ..errors import UserError
from ..results import percent
from . import best_epoch
from .checkpoint import LOG_FILE


@dataclass(frozen=True)
class Curve:
    """One run's log. name: its loss and seed; history: a line an epoch, as fit wrote it."""

    name: str
    history: tuple[dict[str, Any], ...]

    @property
    def loss(self) -> list[float]:
        """Of training, an entry an epoch."""
        return [line["loss"] for line in self.history]

    @property
    def val(self) -> list[float | None]:
        """Accuracy on validation images, None without any."""
        return [line["val"] for line in self.history]

    @property
    def robust(self) -> list[float | None]:
        """Robust accuracy on validation images, None where no threat is watched."""
        return [line.get("val_robust") for line in self.history]

    @property
    def best(self) -> int | None:
        """The epoch, counted from 1, with the highest robust accuracy on val, or plain one where none is watched."""
        return best_epoch(self.history)

    @property
    def lost(self) -> float | None:
        """Robust overfitting: the robust validation accuracy of the best epoch minus the last one's, on [0, 1]."""
        known = [value for value in self.robust if value is not None]
        return None if not known or self.robust[-1] is None else max(known) - self.robust[-1]


def read(run: Path) -> Curve:
    """The log of a run folder, finished or not. Raises UserError where there is none."""
    path = run / LOG_FILE
    if not path.is_file():
        raise UserError(f"{run} has no {LOG_FILE}: give a run folder that `holdfast train` or `compare` wrote to.")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): is it a log of holdfast's?") from None
    if not all(isinstance(line, dict) and {"loss", "val"} <= line.keys() for line in lines):
        raise UserError(f"{path} cannot be read: a line without loss and val. Is it a log of holdfast's?")
    if not lines:
        raise UserError(f"{path} is empty: no epoch has ended yet.")
    config = run_folder.read_json(run / "config.json") if (run / "config.json").is_file() else {}
    seed = config.get("fit", {}).get("seed")
    name = config.get("loss", run.name) + ("" if seed is None else f", seed {seed}")
    objective = config.get("objective", "standard")
    if objective != "standard" and objective not in name:
        name += f", {objective}"
    return Curve(name, tuple(lines))


def folders(path: Path) -> list[Path]:
    """The run folders that a path names: itself, or those of a comparison's output.

    Raises UserError where it holds none.
    """
    if (path / LOG_FILE).is_file():
        return [path]
    found = sorted(file.parent for file in (path / "runs").glob(f"*/{LOG_FILE}"))
    if not found:
        raise UserError(f"{path} is neither a run folder nor the output of a comparison: it holds no {LOG_FILE}.")
    return found


def sentence(curve: Curve) -> str:
    """What the curve says, in one line."""
    epochs = len(curve.loss)
    told = f"{curve.name}: {epochs} epoch{'s' * (epochs != 1)}, loss {curve.loss[-1]:.4g}"
    if curve.val[-1] is not None:
        told += f", validation {percent(curve.val[-1])}%"
    if curve.robust[-1] is None or curve.lost is None:
        return told + "."
    told += f", robust validation {percent(curve.robust[-1])}%"
    if curve.lost > 0:
        return told + f"; epoch {curve.best} had {percent(curve.robust[-1] + curve.lost)}%."
    return told + ", the best of all epochs."


def figure(curves: Sequence[Curve]) -> Figure:
    """Above the loss, below validation accuracy: plain in grey, robust in blue, the best epoch marked."""
    with report.style():
        chart = Figure(figsize=(report.WIDTH, 4.2), layout="constrained")
        top, bottom = chart.subplots(2, 1, sharex=True, height_ratios=[2, 3])
        for number, curve in enumerate(curves):
            at = range(1, len(curve.loss) + 1)
            look = {"linewidth": 1.3, "linestyle": ("-", "--", ":", "-.")[number % 4], "alpha": 0.9}
            top.plot(at, curve.loss, color=report.INK, label=curve.name, **look)
            for figures, colour in ((curve.val, report.CLEAN), (curve.robust, report.ROBUST)):
                bottom.plot(at, [math.nan if v is None else 100 * v for v in figures], color=colour, **look)
            if curve.best is not None and curve.robust[curve.best - 1] is not None:
                bottom.plot(curve.best, 100 * float(curve.robust[curve.best - 1] or 0), "o", color=report.ROBUST, ms=5)
        top.set_ylabel("training loss")
        if all(value > 0 for curve in curves for value in curve.loss):
            top.set_yscale("log")
            top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            top.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # no mathematics: names are users' text
            top.yaxis.set_minor_formatter(lambda value, _: "")
        if len(curves) <= 8:
            top.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=6.5)
        bottom.set_ylabel("validation, %: clean grey, robust blue")
        bottom.set_xlabel("epoch (dot: the best by robust accuracy)")
        for ax in (top, bottom):
            ax.spines[["right", "top"]].set_visible(False)
            ax.set_axisbelow(True)
            ax.grid(axis="y", color=report.RULE, linewidth=0.6)
    return chart


def save(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """curves.svg and curves.png in the folder."""
    return report.write_figure(figure(curves), folder, "curves")
