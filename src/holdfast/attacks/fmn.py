"""Fast minimum norm: gradient ascent in a ball of adaptive radius."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss, negative_margin
from ..noise import Noise
from ..threat import Threat, column
from .base import Model, all_rows, attack, predict, score_and_grad, targeted_score
from .minimal_norm import INITIAL_TEMPERATURE, NearestAdversarial, cosine, distance_to_boundary, soft_margin


@attack
def fmn(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 100,
    step_size: float = 1.0,
    shrink: float = 0.05,
    target: Tensor | None = None,
) -> Tensor:
    """Fast minimum norm (Pintor et al. 2021): ascent in a ball that shrinks around fooled points and grows otherwise.

        no fooled point yet:  radius <- ||delta|| + |margin| / ||gradient||_dual
        point fools:          radius <- min((1 - gamma) radius,
                                            max(||delta|| - |margin| / ||gradient||_dual, radius / 2))
        otherwise:            radius <- (1 + gamma) radius

    gamma and the step size decay by a cosine. The paper's ball shrinks by gamma alone, so 50 steps end no nearer than
    0.28 times the first fooled point. Where the gradient at x is saturated (cosine logits), the first estimate is the
    whole box, and that is too far. Arguments that are not listed here are those of ``pgd``.

    Args:
        score: not used. The attack maximises the negative margin, with a soft maximum over the wrong classes at first;
            the paper's attack uses the margin throughout, and finds the nearest boundary less often.
        noise: not used.
        steps: number of steps, >= 1, one gradient each.
        step_size: the first step size relative to the radius (the paper's is in pixels), decaying to a thousandth.
        shrink: the first gamma, in (0, 1), decaying to a fiftieth of it.

    Returns:
        x_adv, (N, C, H, W), in the threat. This is the cheapest of the accurate minimum-norm attacks. Under l1 with few
        steps, the radius changes faster than the few pixels of an l1 step can follow.

    Raises:
        UserError: where shrink is not in (0, 1).
    """
    if not 0 < shrink < 1:
        raise UserError(f"shrink, the first fraction that the radius loses, must lie in (0, 1), got {shrink}.")
    score_fn, target_fn = targeted_score(negative_margin, y, target)
    targets, unit_ball, l2 = target_fn(all_rows(y)), Threat(threat.norm, 1.0, -1e30, 1e30), Threat("l2", 1.0)
    largest_radius = threat.size(torch.maximum(threat.hi - x, x - threat.lo)).clamp_min(1e-12)
    nearest, x_adv, radius = NearestAdversarial(x, y, threat), x, torch.zeros_like(largest_radius)
    temperature = INITIAL_TEMPERATURE * score_fn(predict(model, x), targets).abs()
    for step in range(steps):
        soft = soft_margin(cosine(1.0, 0.0, step / steps) * temperature, target)
        out, _, grad = score_and_grad(model, x_adv, soft, targets)
        value = score_fn(out, targets).detach()
        success = nearest.update(x_adv, out.logits)
        stopped = ((grad > 0) & (x_adv >= threat.hi)) | ((grad < 0) & (x_adv <= threat.lo))  # by the box
        grad = grad.masked_fill(stopped, 0.0)
        gamma = cosine(shrink, shrink / 50, step / steps)
        size, to_boundary = threat.size(x_adv - x), distance_to_boundary(value, grad, threat)
        larger = torch.where(nearest.size.isfinite(), radius * (1 + gamma), size + to_boundary)
        smaller = torch.minimum(radius * (1 - gamma), torch.maximum(size - to_boundary, radius / 2))
        radius = torch.where(success, torch.minimum(smaller, nearest.size), larger)
        radius = torch.minimum(radius.clamp_min(1e-12), largest_radius)
        # The step has the l2 length of the norm's own steepest step: sqrt(dim) for linf, 1 for l2, less for l1.
        length = radius * cosine(step_size, step_size / 1000, step / steps) * l2.size(threat.ascent(grad))
        delta = x_adv + column(length, x) * l2.ascent(grad) - x
        delta = unit_ball.project(delta / column(radius, x), torch.zeros_like(x)) * column(radius, x)
        x_adv = (x + delta).clamp(threat.lo, threat.hi)
    nearest.update(x_adv, predict(model, x_adv).logits)
    return nearest.in_threat(model, x_adv)
