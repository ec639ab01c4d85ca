"""Auto-PGD: projected gradient ascent with an adaptive step size for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import Loss
from ..noise import Noise
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, score_and_grad, should_drop_fooled, targeted_score, those

MOMENTUM = 0.75  # weight of the new step; the previous move has weight 1 - MOMENTUM
RHO = 0.75  # the step size is halved unless more than this fraction of a period's steps increased the score


def _checkpoints(steps: int) -> list[int]:
    """The steps after which the step size is reconsidered.

    The first period is 22% of the steps. Each further period is 3% of the steps shorter, and at least 6%.

    >>> _checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    period, decrement, shortest = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    checkpoints, end = [], period
    while end < steps:
        checkpoints.append(end)
        period = max(period - decrement, shortest)
        end += period
    return checkpoints


@attack
def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 100,
    step_size: float | None = None,
    restarts: int = 1,
    target: Tensor | None = None,
) -> Tensor:
    """Auto-PGD (Croce and Hein 2020): PGD with momentum and a step size that is halved when progress stalls.

    At each checkpoint a sample's step size is halved, and the sample returns to its best point, in two cases: at most
    75% of the steps since the last checkpoint increased the score; or the step size was not halved at the last
    checkpoint and the best score has not improved since. Arguments that are not listed here are those of ``pgd``.

    Args:
        steps: number of steps, >= 1.
        step_size: the first step size, in pixels; default 2 eps (eps for l1).

    Returns:
        x_adv, (N, C, H, W), each sample's most adversarial point. Fooled samples leave the batch.
    """
    first_step_size = step_size if step_size is not None else threat.eps * (1 if threat.norm == "l1" else 2)
    score_fn, target_fn = targeted_score(score, y, target)
    checkpoints = _checkpoints(steps)
    best = MostAdversarial(x, y)
    wide = (-1, *[1] * (x.ndim - 1))
    for restart in range(restarts):
        rows = best.survivors()
        if len(rows) == 0:
            break
        x_adv = threat.random_start(x[rows], noise[rows].fold(restart))
        out, value, grad = score_and_grad(model, x_adv, score_fn, target_fn(rows))
        unbroken = best.update(rows, x_adv, out.logits)
        s = {  # the state of each sample that is still in the batch; "best" is by the score
            "rows": rows,
            "x": x[rows],
            "x_adv": x_adv,
            "x_previous": x_adv,
            "grad": grad,
            "score": value,
            "x_best": x_adv,
            "grad_best": grad,
            "score_best": value,
            "score_at_checkpoint": value,  # the best score at the last checkpoint
            "step_size": torch.full_like(value, first_step_size, dtype=x.dtype),
            "increases": torch.zeros_like(value),  # steps since the last checkpoint that increased the score
            "halved": torch.ones_like(value, dtype=torch.bool),  # at the last checkpoint
        }
        since = 0
        for step in range(steps):
            if should_drop_fooled(step, x):
                s = dict(zip(s, those(unbroken, *s.values()), strict=True))
                if len(s["rows"]) == 0:
                    break
            moved = s["x_adv"] + s["step_size"].view(wide) * threat.ascent(s["grad"], s["x_adv"])
            if step:
                moved = threat.project(moved, s["x"])
                momentum = (1 - MOMENTUM) * (s["x_adv"] - s["x_previous"])
                moved = s["x_adv"] + MOMENTUM * (moved - s["x_adv"]) + momentum
            s["x_previous"], s["x_adv"] = s["x_adv"], threat.project(moved, s["x"])
            if step == steps - 1:
                best.update(s["rows"], s["x_adv"], predict(model, s["x_adv"]).logits)
                break
            out, value, s["grad"] = score_and_grad(model, s["x_adv"], score_fn, target_fn(s["rows"]))
            unbroken = best.update(s["rows"], s["x_adv"], out.logits)
            s["increases"] = s["increases"] + (value > s["score"])
            s["score"] = value
            better = value > s["score_best"]
            s["score_best"] = torch.where(better, value, s["score_best"])
            s["x_best"] = torch.where(better.view(wide), s["x_adv"], s["x_best"])
            s["grad_best"] = torch.where(better.view(wide), s["grad"], s["grad_best"])
            since += 1
            if step + 1 in checkpoints:
                stalled = ~s["halved"] & (s["score_best"] <= s["score_at_checkpoint"])
                halve = (s["increases"] <= RHO * since) | stalled
                s["step_size"] = torch.where(halve, s["step_size"] / 2, s["step_size"])
                s["x_adv"] = torch.where(halve.view(wide), s["x_best"], s["x_adv"])
                s["grad"] = torch.where(halve.view(wide), s["grad_best"], s["grad"])
                s["score"] = torch.where(halve, s["score_best"], s["score"])
                s["halved"], s["score_at_checkpoint"] = halve, s["score_best"]
                s["increases"], since = torch.zeros_like(value), 0
    return best.x
