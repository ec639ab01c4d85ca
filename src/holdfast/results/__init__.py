"""Results of an evaluation as pure data: intervals, paired tests, JSON and tables. Nothing here imports torch."""

from __future__ import annotations

from .corruptions import CorruptionTable, corruption_sentence, corruption_tables
from .differences import CLAIM_SEEDS, RowDifference, compare_rows, has_row, p_text, significance
from .export import csv, latex, markdown
from .frame import frame
from .json import FILE, load, save, to_json
from .notebook import notebook, notebook_counts
from .region import (
    Calibration,
    CalibrationBins,
    DecisionGrid,
    Distances,
    EpsCheck,
    FeatureShift,
    Passes,
    Projection,
    RegionMeasures,
    Reliability,
    Spread,
    TwoSample,
    TwoSamplePerClass,
)
from .remaining import (
    PRECISION,
    Remaining,
    RemainingVulnerable,
    SpotCheck,
    remaining_vulnerable,
    sample_size,
    sum_remaining,
)
from .requirements import Outcome, Requirement, check_requirements, check_rows, junit, parse_requirement
from .rows import Row, rows
from .schema import (
    CLOPPER_PEARSON,
    OLDEST,
    PROOF_METHODS,
    SCHEMA,
    CheckResult,
    CleanMeasures,
    Cost,
    Example,
    Finding,
    Interval,
    ProofCost,
    Results,
    Run,
    Samples,
    StageCost,
    Training,
    Verdict,
    threat_text,
    total_cost,
    total_proofs,
)
from .statistics import (
    Paired,
    holm,
    mcnemar,
    over_seeds,
    paired_t,
    proportion,
)
from .terminal import corruption_prints, table
from .text import (
    any_certified,
    attack_columns,
    bracket_text,
    caption,
    caption_notes,
    cells,
    doubts,
    heading,
    other_attacks,
    percent,
    pgd50_heading,
    pgd50_verdict_text,
    precision_text,
    proved_text,
    remaining_text,
    robust_text,
    seconds_text,
    status_text,
)

Results._repr_html_ = notebook  # type: ignore[attr-defined]
Results.frame = frame  # type: ignore[attr-defined]

__all__ = [
    "CLAIM_SEEDS", "CLOPPER_PEARSON", "FILE", "OLDEST", "PRECISION", "PROOF_METHODS", "SCHEMA", "Calibration",
    "CalibrationBins", "CheckResult", "CleanMeasures", "CorruptionTable", "Cost", "DecisionGrid", "Distances",
    "EpsCheck", "Example", "FeatureShift", "Finding", "Interval", "Outcome", "Paired", "Passes", "Projection",
    "ProofCost", "RegionMeasures", "Reliability", "Remaining", "RemainingVulnerable", "Requirement", "Results", "Row",
    "RowDifference", "Run", "Samples", "SpotCheck", "Spread", "StageCost", "Training", "TwoSample", "TwoSamplePerClass",
    "Verdict", "any_certified", "attack_columns", "bracket_text", "caption", "caption_notes", "cells",
    "check_requirements", "check_rows", "compare_rows", "corruption_prints", "corruption_sentence", "corruption_tables",
    "csv", "doubts", "frame", "has_row", "heading", "holm", "junit", "latex", "load", "markdown", "mcnemar", "notebook",
    "notebook_counts", "other_attacks", "over_seeds", "p_text", "paired_t", "parse_requirement", "percent",
    "pgd50_heading", "pgd50_verdict_text", "precision_text", "proportion", "proved_text", "remaining_text",
    "remaining_vulnerable", "robust_text", "rows", "sample_size", "save", "seconds_text", "significance", "status_text",
    "sum_remaining", "table", "threat_text", "to_json", "total_cost", "total_proofs",
]  # fmt: skip  # fmt: skip
