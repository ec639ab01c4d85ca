"""Training: one visible loop. fit(model, train, val, objective, config) -> a run folder; no test data comes in here."""

from __future__ import annotations

from .config import SCHEDULES, FitConfig, Fitted, Progress, best_epoch, expected_config
from .loop import fit
from .validation import accuracy, robust_accuracy

__all__ = [
    "SCHEDULES",
    "FitConfig",
    "Fitted",
    "Progress",
    "accuracy",
    "best_epoch",
    "expected_config",
    "fit",
    "robust_accuracy",
]
