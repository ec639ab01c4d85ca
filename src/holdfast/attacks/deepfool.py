"""DeepFool: steps to the nearest linearised decision boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss
from ..noise import Noise
from ..threat import Threat, column
from .base import Model, all_rows, attack, fooled, predict, should_drop_fooled, those
from .minimal_norm import (
    NearestAdversarial,
    distance_to_boundary,
    logit_differences_to,
    scores_and_grads,
    target_classes,
)

NEAR_BOUNDARY = 0.1  # the boundary is near once the step to it is at most this fraction of the perturbation so far


@attack
def deepfool(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 50,
    classes: int = 9,
    overshoot: float = 0.02,
    step_fraction: float = 0.5,
    target: Tensor | None = None,
) -> Tensor:
    """DeepFool (Moosavi-Dezfooli et al. 2016): steps to the nearest linearised boundary until it is crossed.

        r <- r + step_fraction argmin_j ||r_j||,   r_j the smallest step with z_j - z_y + gradient . r_j = 0
        x_adv = x + (1 + overshoot) r

    Steps stay in the box, unlike the paper's. Where the box stops many pixels, a whole step moves the remaining ones so
    far that it ends well beyond a curved boundary (10% to 25% too far on MNIST); this is what ``step_fraction`` is for.
    Arguments that are not listed here are those of ``pgd``.

    Args:
        score: not used; the attack reads the logits.
        noise: not used.
        steps: the largest number of steps, >= 1.
        classes: number of likeliest wrong classes that are compared at each step, >= 1.
        overshoot: the fraction of the perturbation by which x_adv lies beyond the boundary.
        step_fraction: the fraction of the distance to the boundary that a step covers while the boundary is far, in
            (0, 1]; 1 is the paper's step.
        target: (N,) target classes, compared instead.

    Returns:
        x_adv, (N, C, H, W), in the threat. The attack is greedy: it crosses the first boundary that it meets and never
        turns back, so on curved networks FAB finds nearer points.

    Raises:
        UserError: where classes < 1, or step_fraction is not in (0, 1].

    >>> from holdfast.losses import negative_margin
    >>> model = lambda x: torch.cat([x.flatten(1), -x.flatten(1)], 1)  # correct while x > 0
    >>> x, y, threat = torch.full((1, 1, 1, 1), 0.25), torch.tensor([0]), Threat("linf", 0.5, -1, 1)
    >>> deepfool(model, x, y, threat, score=negative_margin, noise=Noise(0, torch.arange(1)), step_fraction=1.0)
    tensor([[[[-0.0050]]]])
    """
    if not 0 < step_fraction <= 1:
        raise UserError(
            f"step_fraction, the fraction of the distance to the boundary that a step covers, must lie in (0, 1], "
            f"got {step_fraction}."
        )
    candidates, rows = target_classes(model, x, y, classes, target, "classes"), all_rows(y)
    nearest, ends = NearestAdversarial(x, y, threat), x.clone()
    base, on_boundary, x_adv = x, x, x  # x_adv is on_boundary with the overshoot; each step starts from it
    for step in range(steps):
        logits, values, grads = scores_and_grads(model, x_adv, logit_differences_to(y[rows], candidates[rows]))
        unbroken = ~fooled(logits, y[rows])
        if should_drop_fooled(step, x):  # a fooled sample stays where it is
            ends[rows] = x_adv
            rows, base, on_boundary, x_adv, values, grads, unbroken = those(
                unbroken, rows, base, on_boundary, x_adv, values, grads, unbroken
            )
            if len(rows) == 0:
                break
        distance = distance_to_boundary(values.flatten(), grads.flatten(0, 1), threat).view_as(values)
        closest, each = distance.argmin(1), all_rows(rows)
        r = threat.to_plane(x_adv, grads[each, closest], -values[each, closest])
        far = threat.size(r) > NEAR_BOUNDARY * threat.size(on_boundary - base)
        r = column(torch.where(far, step_fraction, 1.0) * unbroken, x) * r
        on_boundary = (on_boundary + r).clamp(threat.lo, threat.hi)
        x_adv = (base + (1 + overshoot) * (on_boundary - base)).clamp(threat.lo, threat.hi)
    ends[rows] = x_adv
    nearest.update(ends, predict(model, ends).logits)
    return nearest.in_threat(model, ends)
