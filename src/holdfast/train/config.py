"""Settings and result of fit: FitConfig, the schedules of the learning rate, Fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..threat import Threat
from ..user_input import flag, number, of_type, text, whole

MOST_SIGMA = 10.0  # of noise on pixels in [0, 1]: more hides every image
LEAST_FALL = 0.2  # robust accuracy from which training can collapse
MOST_SEED = 2**43  # torch's generator takes 1,000,003 times as much


class CollapseWarning(UserWarning):
    """Robust validation accuracy fell to less than half from one epoch to the next."""


@dataclass(frozen=True)
class FitConfig:
    """Hyperparameters of training.

    Args:
        epochs: passes over the training set, >= 1.
        batch_size: samples per step over all processes, >= 1.
        optimizer: "adam" (AdamW), "sgd" (with Nesterov momentum) or "momentum" (sgd with classical momentum).
        lr: peak learning rate, > 0.
        schedule: of the learning rate: "cosine" to zero, "onecycle" (up for a third, then cosine), "step" (a tenth at
            1/2 and again at 3/4) or "constant".
        weight_decay: >= 0, decoupled for adam; not applied to biases, norms, centers and variances.
        momentum: of sgd and momentum, in [0, 1).
        ema: decay of a moving average of the weights, in [0, 1); the average is what is validated and saved. 0: off.
        pad: random crops after padding by so many pixels, 0 to 16, or to twice the side of larger images.
        flip: random horizontal mirroring.
        noise_sigma: standard deviation, 0 to 10, of Gaussian noise that the network sees on every training image, in
            units of the pixels; 0: none. It is not clipped to the box, and it is the same for x and x_adv: an inner
            attack climbs the loss of the noisy image, and its threat and all bounds are around the image without noise.
            Validation images have none.
        l1: coefficient of the sum of absolute weights that is added to the loss, >= 0; of what weight_decay applies to.
        init: weights before the first step: "default", as the model was built, or "interval", for training on interval
            bounds (``initialise_for_bounds``).
        freeze: globs of names of parameters that stay as they are, such as ("backbone.*",), with the statistics of
            their batch norms; a text holds several with | between.
        precise_batch_norm: statistics of batch norms are those of all training images under the epoch's last weights,
            measured after each epoch without augmentation, in place of the running ones.
        precision: "no" (float32) or "bf16" for the forward passes of training, including the inner attack's.
        seed: of data order, augmentation and noise; at most 2^43 in size.
        checkpoint_seconds: how much work a kill may cost at most, >= 0; 0 saves after every epoch.
        checkpoint: which epoch's weights the model has in the end: "last", or "best" by validation accuracy (robust
            accuracy if fit has a val_threat).

    Raises:
        UserError: a setting is outside its range; the message names it.
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
    noise_sigma: float = 0.0
    l1: float = 0.0
    init: str = "default"
    freeze: tuple[str, ...] = ()
    precise_batch_norm: bool = False
    precision: str = "no"
    seed: int = 0
    checkpoint_seconds: float = 10.0
    checkpoint: str = "last"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("pad", 0)):
            whole(name, getattr(self, name), least)
        whole("seed", self.seed, -MOST_SEED, MOST_SEED)
        flag("flip", self.flip)
        flag("precise_batch_norm", self.precise_batch_norm)
        number("noise_sigma", self.noise_sigma, 0, MOST_SIGMA)
        for name in ("lr", "weight_decay", "momentum", "ema", "l1"):
            number(name, getattr(self, name), 0, above=name == "lr")
        if not (
            isinstance(self.checkpoint_seconds, float) and self.checkpoint_seconds == math.inf
        ):  # never before the end
            number("checkpoint_seconds", self.checkpoint_seconds, 0)
        for name in ("optimizer", "schedule", "init", "precision", "checkpoint"):
            text(name, getattr(self, name))
        object.__setattr__(self, "freeze", _patterns(self.freeze))
        checks = {
            "optimizer": (self.optimizer in ("adam", "sgd", "momentum"), "'adam', 'sgd' or 'momentum'"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "ema": (self.ema < 1, "in [0, 1)"),
            "momentum": (self.momentum < 1, "in [0, 1)"),
            "init": (self.init in ("default", "interval"), "'default' or 'interval'"),
            "precision": (self.precision in ("no", "bf16"), "'no' or 'bf16'"),
            "checkpoint": (self.checkpoint in ("last", "best"), "'last' or 'best'"),
        }
        for name, (valid, expected) in checks.items():
            if not valid:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}.")


def _patterns(freeze: Any) -> tuple[str, ...]:
    """Globs of names, from a list of them or a text with | between."""
    listed = freeze.split("|") if isinstance(freeze, str) and freeze else freeze or ()
    of_type("freeze", listed, Sequence)
    patterns = tuple(text("freeze", pattern).strip() for pattern in listed)
    if not all(patterns):
        raise UserError(f"freeze must be names of parameters, with * for any text, got {freeze!r}.")
    return patterns


SCHEDULES: dict[str, Callable[[float], float]] = {  # progress in [0, 1) -> factor on lr
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "onecycle": lambda p: 0.05 + 0.95 * p * 3 if p < 1 / 3 else (1 + math.cos(math.pi * (p - 1 / 3) * 1.5)) / 2,
    "step": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01,
    "constant": lambda p: 1.0,
}


@dataclass(frozen=True)
class Fitted:
    """What fit returns.

    Attributes:
        folder: the run folder, None if none was given.
        history: one log line per epoch.
        seconds: training time, without robust validation (its time is in the log lines).
        best_epoch: the best epoch by validation, counted from 1; None without validation images.
        kept_epoch: the epoch whose weights the model has, as ``FitConfig.checkpoint`` chose it.
    """

    folder: Path | None
    history: tuple[dict[str, Any], ...]
    seconds: float
    best_epoch: int | None
    kept_epoch: int


LATER = {"noise_sigma", "l1", "init", "freeze", "precise_batch_norm"}  # settings that folders of earlier versions lack


def fit_to_json(config: FitConfig) -> dict[str, Any]:
    """The settings as JSON holds them: later ones only where they are used, so that older folders resume.

    >>> "noise_sigma" in fit_to_json(FitConfig()), fit_to_json(FitConfig(noise_sigma=0.25))["noise_sigma"]
    (False, 0.25)
    """
    default = asdict(FitConfig())
    return {key: value for key, value in asdict(config).items() if key not in LATER or value != default[key]}


def expected_config(config: FitConfig, val_threat: Threat | None, about: dict[str, Any] | None) -> dict[str, Any]:
    """Make the content of a run folder's config.json. A run resumes only where it is the same.

    Args:
        config: the hyperparameters.
        val_threat: the threat of robust validation, or None.
        about: further entries, such as how the model is built.

    Returns:
        What JSON can hold.
    """
    return {
        "fit": fit_to_json(config),
        **({} if val_threat is None else {"val_threat": val_threat.describe()}),
        **(about or {}),
    }


def best_epoch(history: Sequence[dict[str, Any]]) -> int | None:
    """Find the epoch with the highest robust validation accuracy, or plain accuracy where that was not measured.

    Args:
        history: one log line per epoch.

    Returns:
        Its number, counted from 1, the earliest of equals; None where no line has an accuracy.

    >>> best_epoch([{"val": 0.7}, {"val": 0.9}, {"val": 0.9}])
    2
    >>> best_epoch([{"val": 0.7, "val_robust": 0.4}, {"val": 0.9, "val_robust": 0.3}])
    1
    """
    accuracies = [line.get("val_robust", line["val"]) for line in history]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return 1 + accuracies.index(max(known)) if known else None


def collapse(history: Sequence[dict[str, Any]]) -> str | None:
    """Say that robust validation accuracy has collapsed in the last epoch: to less than half of the best one's.

    Args:
        history: one log line per epoch. An accuracy below 20% has nowhere to fall from.

    Returns:
        The warning; None where it has not collapsed, or had in the epoch before.

    >>> print(collapse([{"val_robust": 0.5}, {"val_robust": 0.02}])[:88])
    robust validation accuracy collapsed in epoch 2 to 2.0%, from 50.0% in epoch 1 (catastro
    """
    robust = [line.get("val_robust") or 0.0 for line in history]
    best = _fallen(robust)
    if best is None or _fallen(robust[:-1]) is not None:
        return None
    return (
        f"robust validation accuracy collapsed in epoch {len(robust)} to {robust[-1]:.1%}, from {robust[best]:.1%} in "
        f"epoch {best + 1} (catastrophic overfitting): take the weights of the best epoch (checkpoint=best), or more "
        "steps, a smaller step or a lower learning rate."
    )


def _fallen(robust: Sequence[float]) -> int | None:
    """The best epoch, counted from 0, where the last one has less than half of its accuracy."""
    best = max(robust, default=0.0)
    return robust.index(best) if best >= LEAST_FALL and robust[-1] < best / 2 else None
