"""Projected gradient ascent and its relatives: one step, many steps, momentum, random starts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss
from ..noise import Noise
from ..threat import Threat, column
from .base import Model, MostAdversarial, attack, predict, score_and_grad, should_drop_fooled, targeted_score


@attack
def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 50,
    step_size: float | None = None,
    restarts: int = 1,
    target: Tensor | None = None,
    random_start: bool = True,
    momentum: float = 0.0,
    keep: str = "worst",
) -> Tensor:
    """Projected gradient ascent: x <- project(x + step_size * ascent(gradient of the score)).

    Args:
        model: images to logits; x: (N, C, H, W) in the threat's box; y: (N,) int64.
        score: what is climbed, higher is nearer to a mistake: ``score_of(loss)``.
        noise: the samples' own random numbers.
        steps: k >= 1 steps consider k + 1 points.
        step_size: in pixels; default 2.5 eps / steps (Madry et al. 2018).
        restarts: further runs from new random starts, for the samples that still stand.
        target: (N,) classes to steer to; any mistake counts all the same.
        momentum: decay of the summed gradients, each divided by its l1 size (MIM, Dong et al. 2018); 0 is plain.
        keep: "worst" returns each sample's worst point and drops it from the batch once fooled; "last" returns the last
            iterate of every sample unjudged, as adversarial training and the published protocol do.

    Returns x_adv, (N, C, H, W), in the threat.

    >>> from holdfast.losses import negative_margin
    >>> model = lambda x: torch.cat([x.flatten(1), -x.flatten(1)], 1)  # right while x > 0
    >>> x, y = torch.full((1, 1, 1, 1), 0.25), torch.tensor([0])
    >>> noise = Noise(0, torch.arange(1))
    >>> pgd(model, x, y, Threat("linf", 0.5, -1, 1), score=negative_margin, noise=noise, steps=3, random_start=False)
    tensor([[[[-0.1667]]]])
    """
    if keep not in ("worst", "last"):
        raise UserError(f"keep must be 'worst' or 'last', got {keep!r}.")
    if keep == "last" and restarts > 1:
        raise UserError("keep='last' judges nothing, so it cannot choose between restarts: use keep='worst'.")
    size = 2.5 * threat.eps / steps if step_size is None else step_size
    climb, goal = targeted_score(score, y, target)
    worst = MostAdversarial(x, y)
    for restart in range(restarts):
        rows = worst.standing()
        if len(rows) == 0:
            break
        base = x[rows]
        x_adv = threat.random_start(base, noise[rows].fold(restart)) if random_start or restart else base
        velocity = torch.zeros_like(x_adv)
        for step in range(steps):
            out, _, grad = score_and_grad(model, x_adv, climb, goal(rows))
            if keep == "worst":
                stands = worst.see(rows, x_adv, out.logits)
                if should_drop_fooled(step, x):
                    rows, base, x_adv, grad, velocity = (t[stands] for t in (rows, base, x_adv, grad, velocity))
                    if len(rows) == 0:
                        break
            if momentum:
                mean = grad.abs().flatten(1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny)
                velocity = momentum * velocity + grad / column(mean, grad)
                grad = velocity
            x_adv = threat.project(threat.ascent(grad, x_adv).mul_(size).add_(x_adv), base)  # in place: it is ours
        if keep == "last":
            return x_adv
        if len(rows):
            worst.see(rows, x_adv, predict(model, x_adv).logits)
    return worst.x


def fgsm(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, score: Loss, noise: Noise, **settings: object
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al. 2015): one step of eps along the ascent direction from x.

    The better of x and the step is kept. For l2 and l1 the direction is the norm's own.
    """
    settings = {"steps": 1, "step_size": threat.eps, **settings}
    return pgd(model, x, y, threat, score=score, noise=noise, random_start=False, **settings)


def bim(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 10,
    **settings: object,
) -> Tensor:
    """Basic iterative method (Kurakin et al. 2017): small steps from x itself, by default 1.25 eps / steps each."""
    settings = {"step_size": 1.25 * threat.eps / max(steps, 1), **settings}
    return pgd(model, x, y, threat, score=score, noise=noise, steps=steps, random_start=False, **settings)


def mim(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 10,
    **settings: object,
) -> Tensor:
    """Momentum iterative method (Dong et al. 2018): bim with summed l1-normalised gradients, decay 1 by default."""
    settings = {"step_size": 1.25 * threat.eps / max(steps, 1), "momentum": 1.0, **settings}
    return pgd(model, x, y, threat, score=score, noise=noise, steps=steps, random_start=False, **settings)
