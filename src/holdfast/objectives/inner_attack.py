"""The inner problem: PGD with the settings of adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..attacks import Model, pgd
from ..errors import UserError, at_least
from ..information.sources import check_fraction, ramp_fraction
from ..losses import Loss
from ..noise import Noise
from ..outputs import batch_norm_mode
from ..threat import Threat

MOST_STEPS = 10_000  # of an inner attack: more is a slip of the finger, and never ends
MIN_EPS_FRACTION = 0.01  # of eps, at the start of a ramp: a smaller one would leave x as it is


@dataclass(frozen=True)
class InnerAttack:
    """The inner attack: the last iterate of PGD, with the settings of ``adversarial``."""

    threat: Threat
    steps: int
    step_size: float | None
    ramp: float
    factor: float
    batch_norm: str
    random_start: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"adversarial training needs steps >= 1 and <= {MOST_STEPS:,}, got {self.steps}.")
        if self.step_size is not None:
            at_least("step_size", self.step_size, above=True)
        check_fraction("ramp, the fraction of training over which eps increases,", self.ramp)
        at_least("factor", self.factor, above=True)
        if self.batch_norm not in ("eval", "train"):
            raise UserError(f"batch_norm of the inner attack must be 'eval' or 'train', got '{self.batch_norm}'.")

    def __call__(self, progress: float, model: Model, x: Tensor, y: Tensor, noise: Noise, *, score: Loss) -> Tensor:
        fraction = self.factor * ramp_fraction(progress, self.ramp, MIN_EPS_FRACTION)
        with batch_norm_mode(model, self.batch_norm):
            return pgd(
                model,
                x,
                y,
                replace(self.threat, eps=fraction * self.threat.eps),
                score=score,
                noise=noise,
                steps=self.steps,
                step_size=None if self.step_size is None else fraction * self.step_size,
                random_start=self.random_start,
                iterate="last",
            )
