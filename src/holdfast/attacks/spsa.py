"""SPSA: gradient ascent on a gradient that is estimated from finite differences of the score."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss
from ..noise import Noise
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, should_drop_fooled, targeted_score, those
from .minimal_norm import Adam


@attack
def spsa(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 40,
    step_size: float | None = None,
    pairs: int = 32,
    chunk: int = 8,
    width: float = 0.01,
    target: Tensor | None = None,
) -> Tensor:
    """SPSA (Uesato et al. 2018): Adam on a gradient estimated from logits alone.

        g = mean over random signs v of v (score(x_adv + width v) - score(x_adv - width v)) / (2 width)
        linf: x_adv <- project(x_adv + step_size * Adam(g))
        l2:   x_adv <- project(x_adv + step_size * ascent(Adam(g)))
        l1:   x_adv <- project(x_adv + step_size * ascent(Adam's running mean of g))

    The attack starts at x. The model is evaluated at points within ``width`` of the threat, always inside the box.
    Arguments that are not listed here are those of ``pgd``.

    Args:
        steps: number of steps, >= 1.
        step_size: in pixels; default 2.5 eps / steps.
        pairs: pairs of evaluations for each step and sample, >= 1. The error of the estimate grows with
            sqrt(dimension / pairs): the paper uses thousands of pairs a step.
        chunk: pairs that are evaluated together, >= 1, in batches of 2 * chunk * N images.
        width: step of the finite differences, in pixels, > 0.

    Returns:
        x_adv, (N, C, H, W), in the threat.

    Raises:
        UserError: where pairs, chunk or width is not positive.
    """
    if pairs < 1 or chunk < 1 or not width > 0:
        raise UserError(f"pairs, chunk and width must be positive, got {pairs}, {chunk} and {width}.")
    step_size = 2.5 * threat.eps / steps if step_size is None else step_size
    score_fn, target_fn = targeted_score(score, y, target)
    best = MostAdversarial(x, y)
    rows, base, x_adv = best.survivors(), x, x
    adam = Adam(x)
    for step in range(steps):
        unbroken = best.update(rows, x_adv, predict(model, x_adv).logits)
        if should_drop_fooled(step, x):
            rows, base, x_adv, adam.mean, adam.square = those(unbroken, rows, base, x_adv, adam.mean, adam.square)
            if len(rows) == 0:
                return best.x
        grad = torch.zeros_like(x_adv)
        for first in range(0, pairs, chunk):
            count = min(chunk, pairs - first)
            v = noise[rows].fold(step, first).sign((count, *x.shape[1:]), x.dtype)
            probes = (x_adv[:, None] + width * torch.stack([v, -v])).clamp(threat.lo, threat.hi)
            targets = target_fn(rows[:, None].expand(-1, count).flatten().repeat(2))
            value = score_fn(predict(model, probes.flatten(0, 2)), targets).to(x.dtype).view(2, len(rows), count)
            slope = ((value[0] - value[1]) / (2 * width)).nan_to_num(0.0, 0.0, 0.0)
            grad = grad + (v * slope.view(*slope.shape, *[1] * (x.ndim - 1))).sum(1) / pairs
        direction = adam(grad)
        if threat.norm != "linf":
            # Under l1 Adam's normalisation would make all pixels alike, while the step must select the few largest.
            direction = threat.ascent(direction if threat.norm == "l2" else adam.mean, x_adv)
        x_adv = threat.project(x_adv + step_size * direction, base)
    best.update(rows, x_adv, predict(model, x_adv).logits)
    return best.x
