"""The min-max problem of training: what the inner player does to x, what the outer player pays for it.

    min over weights  mean_i loss(model, x_i, perturb(x_i), y_i)

A factory returns a Schedule: progress in [0, 1] -> Objective, so every ramp lives in one place. To add one: the factory
and a line in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
    ramp: float = 0.0,
) -> Schedule:
    """Adversarial training (Madry et al. 2018): the loss on the last iterate of PGD with one random start.

    Args:
        loss: the outer loss, (out, y) -> (N,).
        threat: what the inner player may do; steps, step_size: its PGD, default 10 steps of 2.5 eps / steps.
        score: what PGD climbs, default ``score_of(loss)``. For I-SCE an s in here would change nothing: the gradient's
            direction is the same for every s.
        ramp: the share of training, in [0, 1], over which eps rises from 1% to all of it. Small networks answer the
            same for every image when they meet a large eps (MNIST, 0.2 and more) from the first step.

    The inner attack sees the network in eval mode (batch statistics frozen), the outer loss in train mode.
    """
    if not steps >= 1:
        raise UserError(f"adversarial training needs steps >= 1, got {steps}.")
    if step_size is not None:
        at_least("step_size", step_size, above=True)
    if not 0 <= ramp <= 1:
        raise UserError(f"ramp, the share of training over which eps rises, must lie in [0, 1], got {ramp}.")
    climb = score_of(loss) if score is None else score

    def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return loss(model(x_adv), y)

    def schedule(progress: float) -> Objective:
        share = 1.0 if progress >= ramp else max(progress / ramp, 0.01)
        now, size = replace(threat, eps=share * threat.eps), None if step_size is None else share * step_size

        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            return pgd(model, x, y, now, score=climb, noise=noise, steps=steps, step_size=size, keep="last")

        return Objective(perturb, outer)

    return schedule


OBJECTIVES: dict[str, Callable[..., Schedule]] = {"standard": standard, "adversarial": adversarial}
