"""The result of an audit on disk, so that a resumed comparison does not repeat it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch

from ..evaluation import Evaluation, StageCost, add_witnesses
from ..io import load_tensors, save_tensors, understood
from ..results import CleanMeasures, Finding, RemainingVulnerable
from ..witnesses import Witnesses
from . import Audit

NAME, VERSION = "audit cache", 2


class StoredAudit(TypedDict):
    """An audit without its evaluation, as files hold it."""

    findings: tuple[Finding, ...]
    remaining: RemainingVulnerable
    measures: CleanMeasures | None
    cost: StageCost


class _About(StoredAudit):
    """What the cache holds beside tensors."""

    key: str


def stored_audit(audit: Audit) -> dict[str, Any]:
    """What ``StoredAudit`` describes, as JSON can hold it."""
    return {
        "findings": [asdict(finding) for finding in audit.findings],
        "remaining": asdict(audit.remaining),
        "measures": None if audit.measures is None else asdict(audit.measures),
        "cost": asdict(audit.cost),
    }


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
    save_tensors(path, NAME, VERSION, witnesses._asdict(), {"key": key, **stored_audit(audit)})


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
    tensors, about = load_tensors(path, NAME, VERSION, _About)
    if about.pop("key") != key:
        return None
    with understood(path):
        return Audit(add_witnesses(evaluation, [Witnesses(**tensors)], about["cost"]), **about)
