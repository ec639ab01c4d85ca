"""What an evaluation found, as pure data: intervals, paired tests, JSON and tables. No tensors below this line."""

from __future__ import annotations

from .schema import (
    CLOPPER_PEARSON,
    FILE,
    SCHEMA,
    Example,
    Interval,
    Results,
    Run,
    Samples,
    Stage,
    Verdict,
    load,
    save,
    threat_text,
    to_json,
    write_atomic,
)
from .statistics import Drawn, Paired, Remainder, holm, mcnemar, over_seeds, paired_t, proportion, remainder
from .tables import (
    Row,
    any_proved,
    csv,
    doubts,
    latex,
    markdown,
    notebook,
    notebook_counts,
    percent,
    protocols,
    remainder_text,
    robust_text,
    rows,
    table,
)

__all__ = [
    "CLOPPER_PEARSON", "FILE", "SCHEMA", "Drawn", "Example", "Interval", "Paired", "Remainder", "Results", "Row", "Run",
    "Samples", "Stage", "Verdict", "any_proved", "csv", "doubts", "holm", "latex", "load", "markdown", "mcnemar",
    "notebook", "notebook_counts", "over_seeds", "paired_t", "percent", "proportion", "protocols", "remainder",
    "remainder_text", "robust_text", "rows", "save", "table", "threat_text", "to_json", "write_atomic",
]  # fmt: skip
