"""An audit on disk, so that a stopped comparison asks no check twice."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from ..evaluation import Evaluation, StageCost
from ..io import load_tensors, save_tensors
from ..results import RemainingVulnerable
from . import FOUND, Audit, add_witnesses
from .findings import Finding

RECORD, RECORD_VERSION = "audit record", 1


def save_audit(path: Path, key: str, audit: Audit) -> None:
    """Write what an audit found; key: what it belongs to."""
    rows = torch.nonzero(audit.evaluation.broken_by == len(audit.evaluation.stages) - 2)[:, 0]
    tensors = {"rows": rows, **{name: getattr(audit.evaluation, name)[rows] for name in FOUND}}
    about = {
        "key": key,
        "findings": [finding.to_dict() for finding in audit.findings],
        "remaining": asdict(audit.remaining),
        "measures": audit.measures,
        "cost": asdict(audit.cost),
    }
    save_tensors(path, RECORD, RECORD_VERSION, tensors, about)


def load_audit(path: Path, key: str, evaluation: Evaluation) -> Audit | None:
    """The audit of this evaluation, or None where the file is missing or of something else."""
    if not path.exists():
        return None
    tensors, about = load_tensors(path, RECORD, RECORD_VERSION)
    if about["key"] != key:
        return None
    cost = StageCost(**about["cost"])
    x_adv, margin, prediction = (tensors[name] for name in FOUND)
    return Audit(
        add_witnesses(evaluation, [(tensors["rows"], x_adv, margin, prediction)], cost),
        tuple(Finding.from_dict(finding) for finding in about["findings"]),
        RemainingVulnerable(**about["remaining"]),
        about["measures"],
        cost,
    )
