"""The saliency map attack: it changes few pixels, one at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses import Loss
from ..noise import Noise
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, should_drop_fooled, those
from .minimal_norm import scores_and_grads


@attack
def jsma(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 100,
    target: Tensor | None = None,
) -> Tensor:
    """Saliency map attack (Papernot et al. 2016): each step moves the most salient pixel as far as the threat allows.

    With a = dz_t/dx and b = d(sum of the other logits)/dx, a pixel is a candidate where a and b have opposite signs.
    Its saliency is |a b| times the distance that it can move, and it moves in the direction of a. Where no pixel is a
    candidate, the saliency is |a - b / (K - 1)| times that distance. A pixel moves once: by eps under linf, and by
    what is left of the norm budget under l2 and l1. Arguments that are not listed here are those of ``pgd``.

    Args:
        score: not used; the attack reads the logits.
        noise: not used.
        steps: the largest number of pixels that may change, >= 1.
        target: (N,) target classes t; default the likeliest wrong class at each step.

    Returns:
        x_adv, (N, C, H, W), in the threat; at most ``steps`` values of each sample differ from x. The paper moves
        pixels in pairs and in one direction. The attack is greedy and ignores curvature: it is weak under linf, and its
        merit is how few pixels it needs.
    """
    best = MostAdversarial(x, y)
    rows, base, x_adv = best.survivors(), x, x
    unmoved = torch.ones_like(x, dtype=torch.bool).flatten(1)
    for step in range(steps):
        labels, targets = y[rows], None if target is None else target[rows]

        def target_and_rest(logits: Tensor, labels: Tensor = labels, targets: Tensor | None = targets) -> Tensor:
            wrong = logits.detach().scatter(1, labels[:, None], -math.inf).argmax(1) if targets is None else targets
            target_logit = logits.gather(1, wrong[:, None])
            return torch.cat([target_logit, logits.sum(1, keepdim=True) - target_logit], 1)

        logits, _, grads = scores_and_grads(model, x_adv, target_and_rest)
        unbroken = best.update(rows, x_adv, logits)
        if should_drop_fooled(step, x):
            rows, base, x_adv, unmoved, grads = those(unbroken, rows, base, x_adv, unmoved, grads)
            if len(rows) == 0:
                return best.x
        a, b = grads.flatten(2).unbind(1)
        difference = a - b / (logits.shape[1] - 1)
        pixels, start = x_adv.flatten(1), base.flatten(1)
        left = _budget_left(threat, pixels - start)[:, None]
        moves = []
        for direction in (a.sign(), difference.sign()):
            room = torch.where(direction > 0, threat.hi - pixels, pixels - threat.lo)
            moves.append(direction * torch.where(unmoved, torch.minimum(room, left), 0.0))
        opposed = torch.where(a * b < 0, (a * b * moves[0]).abs(), 0.0)
        any_opposed = opposed.amax(1, keepdim=True) > 0
        saliency = torch.where(any_opposed, opposed, (difference * moves[1]).abs())
        pixel = saliency.argmax(1, keepdim=True)
        move = torch.where(any_opposed, moves[0], moves[1]).gather(1, pixel)
        unmoved = unmoved.scatter(1, pixel, False)
        x_adv = threat.project(pixels.scatter_add(1, pixel, move).view_as(x_adv), base)
    best.update(rows, x_adv, predict(model, x_adv).logits)
    return best.x


def _budget_left(threat: Threat, delta: Tensor) -> Tensor:
    """The distance that a pixel which has not moved may move: (N, D) -> (N,)."""
    size = threat.size(delta)
    if threat.norm == "linf":
        return torch.full_like(size, threat.eps)
    if threat.norm == "l1":
        return (threat.eps - size).clamp_min(0.0)
    return (threat.eps**2 - size.square()).clamp_min(0.0).sqrt()
