"""A setting that takes several values, in otherwise equal rows: accuracies over its value."""

from __future__ import annotations

import re
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..results import Results, Row, heading, rows
from ..user_input import typed
from .figures import INK, MEASURES, MUTED, RULE, short
from .panels import panels

LEAST_VALUES = 3  # of a setting: two are a comparison
_VALUE = re.compile(r"(?<==)[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?(?![\w.])")


@dataclass(frozen=True)
class Sweep:
    """Rows that differ in the number of one setting alone.

    Args:
        name: the spec with "..." for that number, such as "isce:s=...".
        setting: the setting's name.
        threat: the threat of all rows, in words.
        points: (value, row), in increasing order of the value.
    """

    name: str
    setting: str
    threat: str
    points: tuple[tuple[float, Row], ...]


@typed
def sweeps(results: Results) -> list[Sweep]:
    """The settings of which at least three values were measured, in order of first appearance.

    Args:
        results: the runs.

    Returns:
        One Sweep for each; a row may be in several.
    """
    found: dict[tuple[str, str, str], dict[float, Row]] = {}
    for row in rows(results):
        for value in _VALUE.finditer(row.loss):
            name = row.loss[: value.start()] + "..." + row.loss[value.end() :]
            setting = re.split(r"[:,+@]", row.loss[: value.start() - 1])[-1]
            numerator, _, denominator = value[0].partition("/")
            number = float(numerator) / float(denominator or 1)
            found.setdefault((name, setting, row.threat), {}).setdefault(number, row)
    return [
        Sweep(name, setting, threat, tuple(sorted(by_value.items(), key=lambda point: point[0])))
        for (name, setting, threat), by_value in found.items()
        if len(by_value) >= LEAST_VALUES
    ]


@typed
def draw_sweeps(results: Results) -> Figure | None:
    """Clean, PGD-50, certified and robust accuracy over the value of each swept setting; None without one.

    The values stand at equal distances, in order. Bars are the rows' intervals: over seeds, where there are several.
    """
    found = sweeps(results)
    if not found:
        return None
    several = len({sweep.threat for sweep in found}) > 1

    def draw(i: int, ax: Axes) -> None:
        _draw(ax, found[i], several)
        if i == 0:
            handles = [
                Line2D([], [], color=colour, marker=marker, markerfacecolor=face, markersize=4, label=heading(name))
                for name, colour, marker, face in MEASURES
                if any(getattr(row, name) for sweep in found for _, row in sweep.points)
            ]
            ax.figure.legend(handles=handles, ncols=len(handles), loc="outside upper left", frameon=False)

    return panels(len(found), draw, 2.2, across=2)


def _draw(ax: Axes, sweep: Sweep, several: bool) -> None:
    for name, colour, marker, face in MEASURES:
        figures = [(place, getattr(row, name)) for place, (_, row) in enumerate(sweep.points)]
        known = [(place, figure) for place, figure in figures if figure is not None]
        if not known:
            continue
        places = [place for place, _ in known]
        middle = [100 * figure.value for _, figure in known]
        ends = [[100 * (f.value - f.low) for _, f in known], [100 * (f.high - f.value) for _, f in known]]
        ax.errorbar(places, middle, yerr=ends, color=colour, marker=marker, markerfacecolor=face, markersize=4,
                    linewidth=1.2, elinewidth=0.9)  # fmt: skip
    ax.set_xticks(range(len(sweep.points)), [f"{value:g}" for value, _ in sweep.points])
    ax.set_ylim(0, 100)
    ax.set_xlabel(sweep.setting)
    ax.set_ylabel("accuracy, %", color=MUTED)
    title = f"{sweep.name}, {sweep.threat}" if several else sweep.name
    ax.set_title(short(title, 44), fontsize=7, fontweight="bold", color=INK)
    ax.grid(color=RULE, linewidth=0.6, axis="y")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
