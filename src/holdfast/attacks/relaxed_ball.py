"""Constraint relaxation: some of the steps are taken in a larger ball, and some in a smaller one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses import Loss, negative_margin, targeted
from ..noise import Noise
from ..threat import LEAST_EPS, Threat
from .base import Model, MostAdversarial, all_rows, attack, predict, score_and_grad, should_drop_fooled, those
from .minimal_norm import target_classes

FIRST, PHASE = 10, 10  # steps that choose the targets, and steps in each ball
CYCLE = 3 * PHASE
CLOSED = 0.5  # of the gap to a target, after two phases; where it is less, the target is given up
LAST = 0.05  # times eps: by how much the ball is relaxed at last
NEAR = 0.05  # of the gap that is left to a target which is worth another start


@attack
def cr(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 150,
    restarts: int = 1,
    target: Tensor | None = None,
) -> Tensor:
    """Constraint relaxation (CR, the attack of the FastAT benchmark, 2026): the ball is widened and narrowed in cycles.

    Ten steps on the score choose the ceil(ln K) likeliest wrong classes. Towards each of them z_t - z_y is ascended in
    cycles of 30 steps: ten in a ball of radius eps + a, ten in the threat, and, after the perturbation was shrunk to
    eps - a and moved at random, ten more. In each cycle a halves, from eps/2 down to eps/20; a step is a/2. A target is
    given up where less than half of the gap z_y - z_t is closed after 20 steps, and started again where 5% of it is
    left; the benchmark's attack has absolute thresholds, which depend on the scale of the logits. Points outside of the
    threat never count. Arguments that are not listed here are those of ``pgd``.

    Args:
        score: of the first ten steps.
        steps: number of steps towards each target, >= 1.
        restarts: number of starts towards each target, >= 1; further ones for those that nearly succeeded.
        target: (N,) target classes, attacked alone.

    Returns:
        x_adv, (N, C, H, W), each sample's most adversarial point. Fooled samples leave the batch.
    """
    best, rows = MostAdversarial(x, y), all_rows(y)
    x_adv = threat.random_start(x, noise)
    for _ in range(FIRST if target is None else 0):
        out, _, grad = score_and_grad(model, x_adv, score, y)
        best.update(rows, x_adv, out.logits)
        x_adv = threat.project(x_adv + threat.eps / 4 * threat.ascent(grad, x_adv), x)
    logits = predict(model, x_adv).logits
    best.update(rows, x_adv, logits)
    count = math.ceil(math.log(logits.shape[1]))
    candidates = target_classes(model, x_adv, y, count, target, "targets")
    for number, candidate in enumerate(candidates.unbind(1)):
        rows = best.survivors()
        for restart in range(restarts):
            if len(rows):
                start = threat.random_start(x[rows], noise[rows].fold(number, restart)) if restart else x_adv[rows]
                rows, near = _towards(
                    model, x, threat, noise.fold(number, restart), rows, start, candidate, best, steps
                )
                if restart + 1 < restarts:
                    (rows,) = those(near, rows)
    return best.x


def _towards(
    model: Model,
    x: Tensor,
    threat: Threat,
    noise: Noise,
    rows: Tensor,
    x_adv: Tensor,
    target: Tensor,
    best: MostAdversarial,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Ascend z_t - z_y of some samples, (M,), from x_adv, (M, ...). Returns those left, and which nearly succeeded."""
    base, score = x[rows], targeted(negative_margin)
    least = gap = torch.full(rows.shape, torch.inf, dtype=x.dtype, device=x.device)
    for step in range(steps):
        cycle, phase = divmod(step // PHASE, CYCLE // PHASE)
        relaxed = max(0.5 ** (cycle + 1), LAST) * threat.eps
        ball = _radius(threat, threat.eps + relaxed) if phase == 0 else threat
        if step % PHASE == 0 and phase == 1:
            x_adv = threat.project(x_adv, base)
        if step % PHASE == 0 and phase == 2:
            shrunk = base + (1 - relaxed / threat.eps) * (x_adv - base)
            moved = _radius(threat, relaxed).random_start(shrunk, noise[rows].fold(cycle))
            x_adv = threat.project(moved, base)
        out, value, grad = score_and_grad(model, x_adv, score, (best.y[rows], target[rows]))
        unbroken = ~best.fooled[rows]
        if phase or step == 0:  # a point of the threat
            unbroken, least = best.update(rows, x_adv, out.logits), torch.minimum(least, -value)
        if step == 0:
            gap = -value
        if step == 2 * PHASE:
            unbroken = unbroken & (least <= (1 - CLOSED) * gap)
        if should_drop_fooled(step, x):
            rows, base, x_adv, grad, least, gap = those(unbroken, rows, base, x_adv, grad, least, gap)
            if len(rows) == 0:
                return rows, rows > 0
        x_adv = ball.project(x_adv + relaxed / 2 * threat.ascent(grad, x_adv), base)
    x_adv = threat.project(x_adv, base)
    unbroken = best.update(rows, x_adv, predict(model, x_adv).logits)
    return rows, unbroken & (least <= NEAR * gap)


def _radius(threat: Threat, eps: float) -> Threat:
    """The threat with another radius."""
    return Threat(threat.norm, max(eps, LEAST_EPS), threat.lo, threat.hi)
