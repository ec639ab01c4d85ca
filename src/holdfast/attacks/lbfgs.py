"""Box-constrained L-BFGS: the first attack on neural networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss, negative_margin
from ..noise import Noise
from ..threat import Threat, column
from .base import Model, all_rows, attack, score_and_grad, targeted_score
from .minimal_norm import NearestAdversarial, distance_to_boundary, dot


@attack
def lbfgs(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 20,
    searches: int = 8,
    memory: int = 5,
    target: Tensor | None = None,
) -> Tensor:
    """Box-constrained L-BFGS (Szegedy et al. 2014): minimise c ||delta||_2^2 - score, for the largest c that succeeds.

    Every sample has its own c, curvature and step length. A step that does not decrease the objective is rejected, and
    the next step is a quarter as long. Arguments that are not listed here are those of ``pgd``.

    Args:
        noise: not used.
        steps: steps of L-BFGS for each value of c, >= 1, one gradient each.
        searches: number of values of c, >= 1.
        memory: number of pairs (step, change of the gradient) that estimate the curvature, >= 1.

    Returns:
        x_adv, (N, C, H, W), in the threat. The penalty is the l2 norm's whatever the threat's norm, so the attack is
        weak under linf and l1.

    Raises:
        UserError: where memory < 1.
    """
    if memory < 1:
        raise UserError(f"memory must be >= 1 (number of pairs that estimate the curvature), got {memory}.")
    score_fn, target_fn = targeted_score(score, y, target)
    margin_fn, margin_target_fn = targeted_score(negative_margin, y, target)
    rows = all_rows(y)
    nearest, x_adv = NearestAdversarial(x, y, threat), x
    out, value, grad = score_and_grad(model, x, margin_fn, margin_target_fn(rows))
    nearest.update(x, out.logits)
    distance = distance_to_boundary(value, grad, Threat("l2", 1.0))
    grad = score_and_grad(model, x, score_fn, target_fn(rows))[2]
    c = (grad.flatten(1).norm(dim=1) / (2 * distance)).clamp(1e-12, 1e12)
    lower, upper = torch.zeros_like(c), torch.full_like(c, math.inf)
    for _ in range(searches):
        x_adv, success = _quasi_newton(model, nearest, c, score_fn, target_fn(rows), steps, memory)
        lower, upper = torch.where(success, c, lower), torch.where(success, upper, c)
        between = torch.where(upper.isfinite(), (lower * upper).sqrt(), 4 * c)
        c = torch.where(lower > 0, between, c / 4).clamp(1e-12, 1e12)
    return nearest.in_threat(model, x_adv)


def _quasi_newton(
    model: Model, nearest: NearestAdversarial, c: Tensor, score_fn: Loss, targets: Any, steps: int, memory: int
) -> tuple[Tensor, Tensor]:
    """Projected L-BFGS descent from x on c ||delta||^2 - score: (the last point, whether any point fooled)."""
    x, lo, hi = nearest.base, nearest.threat.lo, nearest.threat.hi

    def objective(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(objective, its gradient, whether the point fools)."""
        out, value, grad = score_and_grad(model, point, score_fn, targets)
        delta = point - x
        value = c * dot(delta, delta) - value.to(x.dtype)
        return value, 2 * column(c, x) * delta - grad, nearest.update(point, out.logits)

    def quasi_newton_direction(grad: Tensor) -> Tensor:
        """Minus the inverse Hessian times the gradient, by the two-loop recursion (Nocedal 1980)."""
        alphas = []
        for s, d, rho in reversed(pairs):
            alphas.append(rho * dot(s, grad))
            grad = grad - column(alphas[-1], x) * d
        grad = column(scale, x) * grad
        for (s, d, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            grad = grad + column(alpha - rho * dot(d, grad), x) * s
        return -grad

    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scale = 1 / (2 * c)  # the inverse curvature of the penalty: exact where the score is linear
    point, length = x, torch.ones_like(c)
    value, grad, success = objective(point)
    for _ in range(steps):
        free = ~(((grad > 0) & (point <= lo)) | ((grad < 0) & (point >= hi)))
        free_grad = grad * free
        direction = quasi_newton_direction(free_grad) * free
        descends = column(dot(direction, free_grad) < 0, x)
        direction = torch.where(descends, direction, -column(scale, x) * free_grad)
        candidate = (point + column(length, x) * direction).nan_to_num(0.0).clamp(lo, hi)
        new_value, new_grad, fools = objective(candidate)
        success = success | fools
        accepted = new_value <= value + 1e-4 * dot(grad, candidate - point)
        s, d = ((b - a) * column(accepted, x) for a, b in ((point, candidate), (grad, new_grad)))
        curvature, square = dot(s, d), dot(d, d)
        positive = curvature > 1e-8 * square.clamp_min(1e-30)  # a pair without positive curvature is ignored
        pairs = [*pairs, (s, d, torch.where(positive, 1 / curvature, 0.0))][-memory:]
        scale = torch.where(positive, curvature / square, scale)
        length = torch.where(accepted, 1.0, length / 4)
        value = torch.where(accepted, new_value, value)
        point, grad = (torch.where(column(accepted, x), b, a) for a, b in ((point, candidate), (grad, new_grad)))
    return point, success
