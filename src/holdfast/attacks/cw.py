"""The attack of Carlini and Wagner, for l2 and linf."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss, negative_margin
from ..noise import Noise
from ..threat import Threat, column
from .base import Model, all_rows, attack, score_and_grad, targeted_score
from .minimal_norm import INITIAL_TEMPERATURE, Adam, NearestAdversarial, cosine, distance_to_boundary, soft_margin

# The fraction of tanh's range in which a search starts, so that tanh's slope there is not zero. A linf search may start
# a little away from x.
TANH_RANGE = {"linf": 0.9, "l2": 1 - 1e-4}


@attack
def cw(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 100,
    step_size: float = 0.3,
    searches: int = 6,
    confidence: float = 0.0,
    target: Tensor | None = None,
) -> Tensor:
    """Carlini and Wagner 2017: Adam on w, with x_adv = tanh(w) scaled to the box, and a search over the constant.

        l2:    minimise ||delta||^2 + c max(margin + confidence, 0)
        linf:  minimise max(margin + confidence, 0) subject to |delta| <= tau

    l2: c follows a binary search between the constants that failed and those that succeeded. linf: the box is
    intersected with |delta| <= tau; the paper's penalty sum max(|delta| - tau, 0) approximates the same constraint. tau
    is 0.9 times the smallest size found (the paper's rule) until a search fails, then follows a binary search. Each
    linf search starts where the last one ended.

    The distance to the linearised boundary sets the first c and tau. Under l2 it also limits the step of a pixel to
    half of that distance over sqrt(dimension). So the attack depends neither on the scale of the logits nor on that of
    the box. Arguments that are not listed here are those of ``pgd``.

    Args:
        threat: linf or l2.
        score: not used. The attack minimises the margin, with a soft maximum over the wrong classes at first; the
            paper uses the margin throughout.
        noise: not used.
        steps: Adam's steps for each constant, >= 1.
        step_size: Adam's first step size, in w, decaying to a hundredth of it.
        searches: number of constants, >= 1.
        confidence: the lead over the true logit that a wrong logit must have.

    Returns:
        x_adv, (N, C, H, W), in the threat. It costs steps * searches gradients.

    Raises:
        UserError: for the l1 norm.
    """
    if threat.norm == "l1":
        raise UserError("cw is defined for linf and l2, got l1.")
    score_fn, target_fn = targeted_score(negative_margin, y, target)
    targets, nearest, l2 = target_fn(all_rows(y)), NearestAdversarial(x, y, threat), threat.norm == "l2"
    out, value, grad = score_and_grad(model, x, score_fn, targets)
    nearest.update(x, out.logits, value >= confidence)
    distance = distance_to_boundary(value - confidence, grad, threat)
    temperature = INITIAL_TEMPERATURE * value.abs()
    largest_step = column(distance, x) / 2 / x[0].numel() ** 0.5 if l2 else math.inf
    # l2: twice the constant at which the two gradients cancel on the linearised boundary
    c = (4 * distance / grad.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp_max(1e30)
    tau, lower, upper, x_adv = distance, torch.zeros_like(distance), torch.full_like(distance, math.inf), x
    for _ in range(searches):
        low, high = (threat.lo, threat.hi) if l2 else _box_around(x, tau, threat)
        half, middle = (high - low) / 2, (high + low) / 2
        start = ((x if l2 else x_adv) - middle) / half
        limit = TANH_RANGE[threat.norm]
        w = torch.atanh(start * limit if l2 else start.nan_to_num(0.0).clamp(-limit, limit))
        adam, success = Adam(w), torch.zeros_like(y, dtype=torch.bool)
        for step in range(steps + 1):
            tanh_w = w.tanh()
            x_adv = (middle + half * tanh_w).clamp(threat.lo, threat.hi)
            soft = soft_margin(cosine(1.0, 0.0, step / steps) * temperature, target)
            out, _, grad = score_and_grad(model, x_adv, soft, targets)
            value = score_fn(out, targets).detach()
            success |= nearest.update(x_adv, out.logits, value >= confidence)
            slope = -torch.where(column(value < confidence, grad), grad, 0.0)
            if l2:
                slope = 2 * (x_adv - x) + column(c, x) * slope
            dx_dw = half * (1 - tanh_w.square())
            size = (largest_step / dx_dw).clamp_max(step_size)
            w = w - cosine(1.0, 0.01, step / steps) * size * adam(slope * dx_dw)
        if l2:
            upper, lower = torch.where(success, c, upper), torch.where(success, lower, c)
            c = torch.where(upper.isfinite(), (lower + upper) / 2, 10 * c).clamp_max(1e30)
        else:
            upper, lower = nearest.size, torch.where(success, lower, tau)
            between = torch.where(lower > 0, (lower + upper) / 2, 0.9 * upper)
            tau = torch.where(upper.isfinite(), between, 2 * tau)
    return nearest.in_threat(model, x_adv)


def _box_around(x: Tensor, tau: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """The lower and upper bounds of the box intersected with |delta| <= tau."""
    tau = column(tau, x)
    return (x - tau).clamp_min(threat.lo), (x + tau).clamp_max(threat.hi)
