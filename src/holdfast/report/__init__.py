"""The report: one self-contained HTML file that opens offline, and its figures as files."""

from __future__ import annotations

from .figures import (
    CERTIFIED,
    CLEAN,
    DEAD_ALL,
    DEAD_TRUE,
    INK,
    LOST,
    MUTED,
    PAPER,
    PGD50,
    ROBUST,
    RULE,
    WIDTH,
    axes,
    percent_axis,
    short,
    style,
    write_figure,
)
from .merge import identity, merged
from .naming import named, parse_label
from .panels import draw_eps, fading
from .render import figure, figures, latex_tables, render
from .summary import (
    ClassAccuracy,
    EpsCurve,
    PerClass,
    RegionTable,
    confusion,
    eps_curves,
    finding,
    per_class,
    region_table,
)

__all__ = [
    "CERTIFIED", "CLEAN", "DEAD_ALL", "DEAD_TRUE", "INK", "LOST", "MUTED", "PAPER", "PGD50", "ROBUST", "RULE",
    "WIDTH", "ClassAccuracy", "EpsCurve", "PerClass", "RegionTable", "axes", "confusion", "draw_eps", "eps_curves",
    "fading", "figure", "figures", "finding", "identity", "latex_tables", "merged", "named", "parse_label",
    "per_class", "percent_axis", "region_table", "render", "short", "style", "write_figure",
]  # fmt: skip
