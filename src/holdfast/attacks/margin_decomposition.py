"""Margin decomposition: one term of the margin first, then the whole margin."""

from __future__ import annotations

import math

from torch import Tensor

from ..losses import Loss, negative_margin
from ..noise import Noise
from ..outputs import Outputs, logits_of
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, score_and_grad, should_drop_fooled, targeted_score, those


def _negative_true_logit(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """-z_y."""
    return -logits_of(out).gather(1, y[:, None])[:, 0]


def _target_logit(out: Outputs | Tensor, target: Tensor) -> Tensor:
    """z_t."""
    return logits_of(out).gather(1, target[:, None])[:, 0]


def _largest_other_logit(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j."""
    return logits_of(out).scatter(1, y[:, None], -math.inf).amax(1)


@attack
def md(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 2,
    target: Tensor | None = None,
) -> Tensor:
    """Margin decomposition (Ma et al. 2020): one term of the margin for the first half of the steps, then the margin.

    The gradient of the negative margin is the sum of the gradients of -z_y and of max_{j != y} z_j. Where one of them
    dominates the other (imbalanced gradients), their sum can point away from a mistake. So the first half of a run
    maximises -z_y alone, and in every second restart max_{j != y} z_j alone. Arguments that are not listed here are
    those of ``pgd``.

    Args:
        score: not used.
        steps: number of steps of a run, >= 1.
        step_size: the first step size of each half, in pixels, decaying by a cosine; default 2 eps (eps for l1).
        restarts: number of runs, >= 1; two runs cover both terms.
        target: (N,) target classes; z_t replaces max_{j != y} z_j.

    Returns:
        x_adv, (N, C, H, W), in the threat.
    """
    first_step_size = step_size if step_size is not None else threat.eps * (1 if threat.norm == "l1" else 2)
    score_fn, target_fn = targeted_score(negative_margin, y, target)
    best, half = MostAdversarial(x, y), steps // 2
    for restart in range(restarts):
        rows = best.survivors()
        if len(rows) == 0:
            break
        base = x[rows]
        x_adv = threat.random_start(base, noise[rows].fold(restart))
        for step in range(steps):
            if step >= half:
                out, _, grad = score_and_grad(model, x_adv, score_fn, target_fn(rows))
            elif restart % 2 == 0:
                out, _, grad = score_and_grad(model, x_adv, _negative_true_logit, y[rows])
            elif target is None:
                out, _, grad = score_and_grad(model, x_adv, _largest_other_logit, y[rows])
            else:
                out, _, grad = score_and_grad(model, x_adv, _target_logit, target[rows])
            unbroken = best.update(rows, x_adv, out.logits)
            if should_drop_fooled(step, x):
                rows, base, x_adv, grad = those(unbroken, rows, base, x_adv, grad)
                if len(rows) == 0:
                    break
            fraction = step / half if step < half else (step - half) / (steps - half)
            size = first_step_size * (1 + math.cos(math.pi * fraction)) / 2
            x_adv = threat.project(x_adv + size * threat.ascent(grad, x_adv), base)
        if len(rows):
            best.update(rows, x_adv, predict(model, x_adv).logits)
    return best.x
