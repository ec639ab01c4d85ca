"""Training: one visible loop. fit(model, train, val, objective, config) -> a run folder; no test data comes in here."""

from __future__ import annotations

from .config import SCHEDULES, FitConfig, Fitted, Progress, best_epoch, claimed
from .judging import accuracy, robust_accuracy
from .loop import fit

__all__ = [
    "SCHEDULES",
    "FitConfig",
    "Fitted",
    "Progress",
    "accuracy",
    "best_epoch",
    "claimed",
    "fit",
    "robust_accuracy",
]
