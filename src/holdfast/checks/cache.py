"""The result of an audit on disk, so that a resumed comparison does not repeat it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from ..evaluation import Evaluation, StageCost, add_witnesses
from ..io import load_tensors, save_tensors, understood
from ..results import Finding, RemainingVulnerable
from ..witnesses import Witnesses
from . import Audit

NAME, VERSION = "audit cache", 2


def save_audit(path: Path, key: str, audit: Audit) -> None:
    """Write an audit to a file.

    Args:
        path: of the file.
        key: identifies the model, data and evaluation that the audit belongs to.
        audit: to be written; of its evaluation, only what the audit itself broke.
    """
    evaluation = audit.evaluation
    rows = torch.nonzero(evaluation.broken_by == len(evaluation.stages) - 1)[:, 0]
    witnesses = Witnesses(rows, evaluation.x_adv[rows], evaluation.margin_adv[rows], evaluation.prediction_adv[rows])
    about = {
        "key": key,
        "findings": [asdict(finding) for finding in audit.findings],
        "remaining": asdict(audit.remaining),
        "measures": audit.measures,
        "cost": asdict(audit.cost),
    }
    save_tensors(path, NAME, VERSION, witnesses._asdict(), about)


def load_audit(path: Path, key: str, evaluation: Evaluation) -> Audit | None:
    """Read an audit back.

    Args:
        path: of the file.
        key: as given to ``save_audit``.
        evaluation: the evaluation that was audited.

    Returns:
        The audit; None if the file is missing or has another key.

    Raises:
        UserError: if the file is damaged or of another version.
    """
    if not path.exists():
        return None
    tensors, about = load_tensors(path, NAME, VERSION)
    if about.get("key") != key:
        return None
    with understood(path):
        cost = StageCost(**about["cost"])
        return Audit(
            add_witnesses(evaluation, [Witnesses(**tensors)], cost),
            tuple(Finding.from_dict(finding) for finding in about["findings"]),
            RemainingVulnerable(**about["remaining"]),
            about["measures"],
            cost,
        )
