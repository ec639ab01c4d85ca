"""The inner problem: PGD with the settings of adversarial training, and PGD that stops at mistakes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..attacks import Model, pgd
from ..attacks.base import all_rows, attack, score_and_grad, those
from ..errors import UserError, at_least
from ..information.sources import check_fraction, ramp_fraction
from ..losses import Loss
from ..noise import Noise
from ..outputs import batch_norm_mode, fooled
from ..threat import Threat, column
from ..user_input import whole

MOST_STEPS = 10_000  # of an inner attack: more is a slip of the finger, and never ends
MIN_EPS_FRACTION = 0.01  # of eps, at the start of a ramp: a smaller one would leave x as it is


@dataclass(frozen=True)
class InnerAttack:
    """The inner attack: the last iterate of PGD, with the settings of ``adversarial``.

    With ``extra`` it is the attack of ``friendly``.
    """

    threat: Threat
    steps: int
    step_size: float | None
    ramp: float
    factor: float
    batch_norm: str
    random_start: bool = True
    curriculum: float = 0.0
    extra: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"adversarial training needs steps >= 1 and <= {MOST_STEPS:,}, got {self.steps}.")
        if self.step_size is not None:
            at_least("step_size", self.step_size, above=True)
        check_fraction("ramp, the fraction of training over which eps increases,", self.ramp)
        check_fraction("curriculum, the fraction of training over which steps increase,", self.curriculum)
        if self.extra is not None:
            whole("extra", self.extra)
        at_least("factor", self.factor, above=True)
        if self.batch_norm not in ("eval", "train"):
            raise UserError(f"batch_norm of the inner attack must be 'eval' or 'train', got '{self.batch_norm}'.")

    def __call__(self, progress: float, model: Model, x: Tensor, y: Tensor, noise: Noise, *, score: Loss) -> Tensor:
        fraction = self.factor * ramp_fraction(progress, self.ramp, MIN_EPS_FRACTION)
        steps = min(self.steps, 1 + int(self.steps * ramp_fraction(progress, self.curriculum)))
        run = partial(pgd, random_start=self.random_start, iterate="last")
        if self.extra is not None:
            run = partial(friendly_pgd, extra=self.extra)
        with batch_norm_mode(model, self.batch_norm):
            return run(
                model,
                x,
                y,
                replace(self.threat, eps=fraction * self.threat.eps),
                score=score,
                noise=noise,
                steps=steps,
                step_size=None if self.step_size is None else fraction * self.step_size,
            )


@attack
def friendly_pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 10,
    step_size: float | None = None,
    extra: int = 1,
) -> Tensor:
    """PGD in which a sample takes ``extra`` more steps once it is misclassified, and then stays where it is.

    On the CPU samples that stay leave the batch. Elsewhere they are computed along, so that the host never waits.

    Args:
        model: images to logits or Outputs.
        x: (N, C, H, W) in the threat's box.
        y: (N,) int64 labels.
        threat: the norm, the radius and the box.
        score: what the attack maximises.
        noise: the random numbers of these samples.
        steps: the most steps of a sample, >= 1.
        step_size: in pixels; default 2.5 eps / steps.
        extra: steps from misclassified points, >= 0.

    Returns:
        x_adv, (N, C, H, W), in the threat.
    """
    step_size = 2.5 * threat.eps / steps if step_size is None else step_size
    result = threat.random_start(x, noise)
    rows, base, x_adv = all_rows(y), x, result
    left = torch.full_like(y, extra)
    for _ in range(steps):
        out, _, grad = score_and_grad(model, x_adv, score, y[rows])
        broken = fooled(out.logits, y[rows])
        moving = ~broken | (left > 0)
        left = left - broken.to(left.dtype)
        moved = threat.project(threat.ascent(grad, x_adv).mul_(step_size).add_(x_adv), base)
        if x.device.type != "cpu":
            x_adv = result = torch.where(column(moving, x), moved, x_adv)
            continue
        rows, base, x_adv, left = those(moving, rows, base, moved, left)
        if len(rows) == 0:
            break
        result = result.index_copy(0, rows, x_adv)
    return result
