"""Fast adaptive boundary, in its targeted form."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import Loss
from ..noise import Noise
from ..threat import Threat, column
from .base import Model, attack, predict
from .minimal_norm import NearestAdversarial, dot, logit_differences_to, scores_and_grads, target_classes


@attack
def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 40,
    targets: int = 9,
    restarts: int = 1,
    target: Tensor | None = None,
) -> Tensor:
    """Fast adaptive boundary, targeted (FAB-T, Croce and Hein 2020), for each of the likeliest wrong classes.

    A step goes to the linearised boundary of z_t - z_y, with an overshoot of 5%. The result is averaged, with a weight
    alpha <= 0.1, with the point of that boundary that is nearest to x. Where the result fools the model, a tenth of the
    perturbation is taken back. At the end five bisections between x and the nearest adversarial example refine it.
    Arguments that are not listed here are those of ``pgd``.

    Args:
        score: not used; the attack reads the logits.
        steps: number of steps for each target and restart, >= 1.
        targets: number of likeliest wrong classes, >= 1.
        restarts: number of runs, >= 1; the first starts at x, further ones at random points of the threat.
        target: (N,) target classes, attacked instead.

    Returns:
        x_adv, (N, C, H, W), in the threat. It costs steps * targets gradients and twice as many forward passes. It
        relies on the linearisation: where gradients are masked it makes no progress.

    Raises:
        UserError: where targets < 1.
    """
    candidates = target_classes(model, x, y, targets, target, "targets")
    nearest, x_adv = NearestAdversarial(x, y, threat), x
    nearest.update(x, predict(model, x).logits)
    for restart in range(restarts):
        for candidate in candidates.split(1, dim=1):
            x_adv = threat.random_start(x, noise.fold(restart)) if restart else x
            scores_fn = logit_differences_to(y, candidate)
            for _ in range(steps):
                _, values, grads = scores_and_grads(model, x_adv, scores_fn)
                need, grad = -values[:, 0], grads[:, 0]
                from_x_adv = threat.to_plane(x_adv, grad, need)
                from_x = threat.to_plane(x, grad, need + dot(grad, x_adv - x))
                size_x_adv, size_x = threat.size(from_x_adv), threat.size(from_x)
                alpha = column((size_x_adv / (size_x_adv + size_x).clamp_min(1e-12)).clamp(0.0, 0.1), x)
                x_adv = (1 - alpha) * (x_adv + 1.05 * from_x_adv) + alpha * (x + 1.05 * from_x)
                x_adv = x_adv.clamp(threat.lo, threat.hi)
                success = nearest.update(x_adv, predict(model, x_adv).logits)
                x_adv = torch.where(column(success, x), x + 0.9 * (x_adv - x), x_adv)
    inner, outer = x, nearest.x
    for _ in range(5):
        middle = (inner + outer) / 2
        success = column(nearest.update(middle, predict(model, middle).logits), x)
        inner, outer = torch.where(success, inner, middle), torch.where(success, middle, outer)
    return nearest.in_threat(model, x_adv)
