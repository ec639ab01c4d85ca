"""The min-max problem of training: what the inner player does to x, what the outer player pays for it.

    min over weights  mean_i loss(model, x_i, perturb(x_i), y_i)

A factory returns a Schedule: progress in [0, 1] -> Objective, so every ramp lives in one place. To add one: the factory
and a line in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .attacks import Model, pgd
from .errors import UserError, at_least
from .losses import Loss, score_of
from .noise import Noise
from .threat import Threat


def _nothing_around(model: Model) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Objective:
    """One moment of the min-max problem.

    perturb: (model, x, y, noise) -> x_adv; loss: (model, x, x_adv, y) -> (N,) with a graph; around: (model) -> context
    in which loss and its gradient are taken (where the weights stand meanwhile).
    """

    perturb: Callable[[Model, Tensor, Tensor, Noise], Tensor]
    loss: Callable[[Model, Tensor, Tensor, Tensor], Tensor]
    around: Callable[[Model], AbstractContextManager[Any]] = _nothing_around


Schedule = Callable[[float], Objective]


def standard(loss: Loss) -> Schedule:
    """Plain training: the loss on the images as they are.

    Args: loss: (out, y) -> (N,).
    """

    def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return x

    def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return loss(model(x), y)

    objective = Objective(perturb, outer)
    return lambda progress: objective


def adversarial(
    loss: Loss,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    score: Loss | None = None,
) -> Schedule:
    """Adversarial training (Madry et al. 2018): the loss on the last iterate of PGD with one random start.

    Args:
        loss: the outer loss, (out, y) -> (N,).
        threat: what the inner player may do; steps, step_size: its PGD, default 10 steps of 2.5 eps / steps.
        score: what PGD climbs, default ``score_of(loss)``. For I-SCE an s in here would change nothing: the gradient's
            direction is the same for every s.

    The inner attack sees the network in eval mode (batch statistics frozen), the outer loss in train mode.
    """
    if not steps >= 1:
        raise UserError(f"adversarial training needs steps >= 1, got {steps}.")
    if step_size is not None:
        at_least("step_size", step_size, above=True)
    climb = score_of(loss) if score is None else score

    def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return pgd(model, x, y, threat, score=climb, noise=noise, steps=steps, step_size=step_size, keep="last")

    def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return loss(model(x_adv), y)

    objective = Objective(perturb, outer)
    return lambda progress: objective


OBJECTIVES: dict[str, Callable[..., Schedule]] = {"standard": standard, "adversarial": adversarial}
