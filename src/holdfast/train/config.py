"""What fit is told and what it answers: FitConfig, the schedules of the learning rate, Fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..threat import Threat

Progress = Callable[[int, int, dict[str, Any]], None]  # (epochs done, epochs, the epoch's log line)


@dataclass(frozen=True)
class FitConfig:
    """How to fit.

    epochs >= 1; batch_size: over all processes; optimizer: "adam" or "sgd" (Nesterov momentum); lr > 0; schedule:
    "cosine" to zero, "onecycle" (up for a third, then cosine), "step" (a tenth at 1/2 and 3/4), "constant";
    weight_decay: decoupled for adam, on weights alone (not on biases, norms and centers); ema in [0, 1): decay of the
    averaged weights that are kept and judged, 0 is off; pad, flip: augmentation; precision: "no" (float32) or
    "bf16" for the forward passes of training, the inner attack's too; seed: of order, augmentation and noise;
    checkpoint_seconds: how much work a kill may cost, at most; keep: "last" or "best", the weights that the model has
    in the end (best: of the epoch with the highest robust accuracy on val where it is watched, else accuracy on val).
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "cosine"
    weight_decay: float = 0.0
    momentum: float = 0.9
    ema: float = 0.0
    pad: int = 0
    flip: bool = False
    precision: str = "no"
    seed: int = 0
    checkpoint_seconds: float = 10.0
    keep: str = "last"

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, ">= 1"),
            "batch_size": (self.batch_size >= 1, ">= 1"),
            "optimizer": (self.optimizer in ("adam", "sgd"), "'adam' or 'sgd'"),
            "lr": (0 < self.lr < math.inf, "> 0"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "weight_decay": (self.weight_decay >= 0, ">= 0"),
            "ema": (0 <= self.ema < 1, "in [0, 1)"),
            "pad": (self.pad >= 0, ">= 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "checkpoint_seconds": (self.checkpoint_seconds >= 0, ">= 0"),
            "precision": (self.precision in ("no", "bf16"), "'no' or 'bf16'"),
            "keep": (self.keep in ("last", "best"), "'last' or 'best'"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise UserError(f"{name} must be {wanted}, got {getattr(self, name)!r}.")


SCHEDULES: dict[str, Callable[[float], float]] = {  # progress in [0, 1) -> factor on lr
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "onecycle": lambda p: 0.05 + 0.95 * p * 3 if p < 1 / 3 else (1 + math.cos(math.pi * (p - 1 / 3) * 1.5)) / 2,
    "step": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01,
    "constant": lambda p: 1.0,
}


@dataclass(frozen=True)
class Fitted:
    """What fit leaves behind.

    folder: the run folder, None if nothing was to be written; history: one log line per epoch; seconds: of training
    (what watching took is in the lines); best_epoch: the best one, counted from 1, None if there was no val to tell;
    kept_epoch: the one whose weights the model has, ``best_epoch`` or the last, as FitConfig.keep says.
    """

    folder: Path | None
    history: tuple[dict[str, Any], ...]
    seconds: float
    best_epoch: int | None
    kept_epoch: int


def expected_config(config: FitConfig, val_threat: Threat | None, about: dict[str, Any] | None) -> dict[str, Any]:
    """What a run folder's config.json says, and must say again for the run to go on in it."""
    return {
        "fit": asdict(config),
        **({} if val_threat is None else {"val_threat": val_threat.describe()}),
        **(about or {}),
    }


def best_epoch(history: Sequence[dict[str, Any]]) -> int | None:
    """The epoch, counted from 1, with the highest val_robust (where not watched: val); the earliest of equals.

    None where no line has such a figure.

    >>> best_epoch([{"val": 0.7}, {"val": 0.9}, {"val": 0.9}])
    2
    >>> best_epoch([{"val": 0.7, "val_robust": 0.4}, {"val": 0.9, "val_robust": 0.3}])
    1
    """
    figures = [line.get("val_robust", line["val"]) for line in history]
    known = [figure for figure in figures if figure is not None]
    return 1 + figures.index(max(known)) if known else None
