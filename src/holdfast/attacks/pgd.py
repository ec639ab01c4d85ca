"""Projected gradient ascent and its relatives: FGSM, BIM, MIM and the least-likely class method."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss
from ..noise import Noise
from ..threat import Threat, column
from ..user_input import typed
from .base import Model, MostAdversarial, attack, predict, score_and_grad, should_drop_fooled, targeted_score, those


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
    iterate: str = "best",
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018).

        x_adv <- project(x_adv + step_size * ascent(gradient of the score))

    Args:
        model: images to logits or Outputs.
        x: (N, C, H, W) in the threat's box.
        y: (N,) int64 labels.
        threat: the norm, the radius and the box.
        score: what the attack maximises, higher is nearer to a mistake: ``score_of(loss)``.
        noise: the random numbers of these samples.
        steps: k >= 1 steps consider k + 1 points.
        step_size: in pixels; default 2.5 eps / steps.
        restarts: number of runs, >= 1, each from a new random start, for the samples that are not fooled yet.
        target: (N,) target classes; any mistake counts as a success all the same.
        random_start: start the first run at a random point of the threat; otherwise at x.
        momentum: decay of the sum of gradients, each divided by the mean of its absolute values (MIM); 0 is plain PGD.
        iterate: "best" returns each sample's most adversarial point, and drops a sample from the batch once it is
            fooled. "last" returns the last iterate of every sample and evaluates none, as adversarial training and the
            usual PGD protocol do.

    Returns:
        x_adv, (N, C, H, W), in the threat.

    Raises:
        UserError: for another ``iterate``, and for "last" with more than one restart.

    >>> from holdfast.losses import negative_margin
    >>> model = lambda x: torch.cat([x.flatten(1), -x.flatten(1)], 1)  # correct while x > 0
    >>> x, y = torch.full((1, 1, 1, 1), 0.25), torch.tensor([0])
    >>> noise = Noise(0, torch.arange(1))
    >>> pgd(model, x, y, Threat("linf", 0.5, -1, 1), score=negative_margin, noise=noise, steps=3, random_start=False)
    tensor([[[[-0.1667]]]])
    """
    if iterate not in ("best", "last"):
        raise UserError(f"iterate must be 'best' or 'last', got {iterate!r}.")
    if iterate == "last" and restarts > 1:
        raise UserError(
            "iterate='last' evaluates no point, so it cannot choose between restarts: use iterate='best' or restarts=1."
        )
    step_size = 2.5 * threat.eps / steps if step_size is None else step_size
    score_fn, target_fn = targeted_score(score, y, target)
    best = MostAdversarial(x, y)
    for restart in range(restarts):
        rows = best.survivors()
        if len(rows) == 0:
            break
        base = x[rows]
        x_adv = threat.random_start(base, noise[rows].fold(restart)) if random_start or restart else base
        velocity = torch.zeros_like(x_adv)
        for step in range(steps):
            out, _, grad = score_and_grad(model, x_adv, score_fn, target_fn(rows))
            if iterate == "best":
                unbroken = best.update(rows, x_adv, out.logits)
                if should_drop_fooled(step, x):
                    rows, base, x_adv, grad, velocity = those(unbroken, rows, base, x_adv, grad, velocity)
                    if len(rows) == 0:
                        break
            if momentum:
                mean = grad.abs().flatten(1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny)
                velocity = momentum * velocity + grad / column(mean, grad)
                grad = velocity
            # In place: ascent returns a tensor of its own.
            x_adv = threat.project(threat.ascent(grad, x_adv).mul_(step_size).add_(x_adv), base)
        if iterate == "last":
            return x_adv
        if len(rows):
            best.update(rows, x_adv, predict(model, x_adv).logits)
    return best.x


@typed
def fgsm(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, score: Loss, noise: Noise, **settings: object
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al. 2015): one step of length eps from x.

    The step follows the threat's own ascent direction (the sign of the gradient for linf). The more adversarial of x
    and the end of the step is returned. The arguments are those of ``pgd``.

    Returns:
        x_adv, (N, C, H, W), in the threat.
    """
    settings = {"steps": 1, "step_size": threat.eps, **settings}
    return pgd(model, x, y, threat, score=score, noise=noise, random_start=False, **settings)


@typed
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
    """Basic iterative method (Kurakin et al. 2017): PGD from x itself.

    The arguments are those of ``pgd``; step_size defaults to 1.25 eps / steps.

    Returns:
        x_adv, (N, C, H, W), in the threat.
    """
    settings = {"step_size": 1.25 * threat.eps / max(steps, 1), **settings}
    return pgd(model, x, y, threat, score=score, noise=noise, steps=steps, random_start=False, **settings)


@typed
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
    """Momentum iterative method (Dong et al. 2018): BIM on the sum of l1-normalised gradients.

    The arguments are those of ``pgd``; step_size defaults to 1.25 eps / steps and momentum to 1.

    Returns:
        x_adv, (N, C, H, W), in the threat.
    """
    settings = {"step_size": 1.25 * threat.eps / max(steps, 1), "momentum": 1.0, **settings}
    return pgd(model, x, y, threat, score=score, noise=noise, steps=steps, random_start=False, **settings)


@attack
def least_likely(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 10,
    target: Tensor | None = None,
    **settings: object,
) -> Tensor:
    """Iterative least-likely class method (Kurakin et al. 2017): targeted BIM on the least likely class.

    Its one-step form is steps=1, step_size=eps. Arguments that are not listed here are those of ``bim``.

    Args:
        target: (N,) target classes instead of the least likely ones.

    Returns:
        x_adv, (N, C, H, W), in the threat. Any mistake counts as a success. The least likely class is the farthest, so
        this is weaker than BIM where the threat is small.
    """
    if target is None:
        target = predict(model, x).logits.scatter(1, y[:, None], math.inf).argmin(1)
    return bim(model, x, y, threat, score=score, noise=noise, steps=steps, target=target, **settings)
