"""Training: ``fit(model, train, val, objective, config)`` is one visible loop that writes a run folder.

No test data enters here.
"""

from __future__ import annotations

from .config import SCHEDULES, CollapseWarning, FitConfig, Fitted, best_epoch, expected_config, fit_to_json
from .freeze import frozen_names
from .initialise import initialise_for_bounds
from .loop import fit
from .trackers import TRACKERS, Tracking, tracker_names, tracking
from .validation import accuracy, robust_accuracy

__all__ = [
    "SCHEDULES",
    "TRACKERS",
    "CollapseWarning",
    "FitConfig",
    "Fitted",
    "Tracking",
    "accuracy",
    "best_epoch",
    "expected_config",
    "fit",
    "fit_to_json",
    "frozen_names",
    "initialise_for_bounds",
    "robust_accuracy",
    "tracker_names",
    "tracking",
]
