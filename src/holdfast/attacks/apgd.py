"""Auto-PGD: projected gradient ascent that sets its own step size, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import Loss
from ..noise import Noise
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, score_and_grad, should_drop_fooled, targeted_score

MOMENTUM = 0.75  # the weight of the new step against the last move
ENOUGH = 0.75  # the share of steps in a period that must have risen


def _periods(steps: int) -> list[int]:
    """The steps after which progress is judged: periods of 22% of the steps, each 3% shorter, never under 6%.

    >>> _periods(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    length, shorter, least = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    ends, end = [], length
    while end < steps:
        ends.append(end)
        length = max(length - shorter, least)
        end += length
    return ends


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
    """Auto-PGD (Croce and Hein 2020): momentum, and a step that is halved where it stopped helping.

    At the end of each period a sample's step is halved, and its best point restored, when the score rose in fewer than
    75% of the period's steps, or when neither step nor best score has changed since the last judgement.

    Args: as for ``pgd``; step_size: the first one, default 2 eps (eps for l1).
    Returns x_adv, (N, C, H, W): each sample's worst point; fooled samples leave the batch.
    """
    first = step_size if step_size is not None else threat.eps * (1 if threat.norm == "l1" else 2)
    climb, goal = targeted_score(score, y, target)
    periods = _periods(steps)
    worst = MostAdversarial(x, y)
    wide = (-1, *[1] * (x.ndim - 1))
    for restart in range(restarts):
        rows = worst.standing()
        if len(rows) == 0:
            break
        x_adv = threat.random_start(x[rows], noise[rows].fold(restart))
        out, value, grad = score_and_grad(model, x_adv, climb, goal(rows))
        stands = worst.see(rows, x_adv, out.logits)
        s = {  # what belongs to each sample still in the batch
            "rows": rows,
            "x": x[rows],
            "now": x_adv,
            "before": x_adv,
            "grad": grad,
            "value": value,
            "best": x_adv,
            "best_grad": grad,
            "best_value": value,
            "judged_value": value,
            "size": torch.full_like(value, first, dtype=x.dtype),
            "rose": torch.zeros_like(value),
            "halved": torch.ones_like(value, dtype=torch.bool),
        }
        since = 0
        for step in range(steps):
            if should_drop_fooled(step, x):
                s = {name: t[stands] for name, t in s.items()}
                if len(s["rows"]) == 0:
                    break
            moved = s["now"] + s["size"].view(wide) * threat.ascent(s["grad"], s["now"])
            if step:
                moved = threat.project(moved, s["x"])
                moved = s["now"] + MOMENTUM * (moved - s["now"]) + (1 - MOMENTUM) * (s["now"] - s["before"])
            s["before"], s["now"] = s["now"], threat.project(moved, s["x"])
            if step == steps - 1:
                worst.see(s["rows"], s["now"], predict(model, s["now"]).logits)
                break
            out, value, s["grad"] = score_and_grad(model, s["now"], climb, goal(s["rows"]))
            stands = worst.see(s["rows"], s["now"], out.logits)
            s["rose"] = s["rose"] + (value > s["value"])
            s["value"] = value
            better = value > s["best_value"]
            s["best_value"] = torch.where(better, value, s["best_value"])
            s["best"] = torch.where(better.view(wide), s["now"], s["best"])
            s["best_grad"] = torch.where(better.view(wide), s["grad"], s["best_grad"])
            since += 1
            if step + 1 in periods:
                stuck = ~s["halved"] & (s["best_value"] <= s["judged_value"])
                halve = (s["rose"] <= ENOUGH * since) | stuck
                s["size"] = torch.where(halve, s["size"] / 2, s["size"])
                s["now"] = torch.where(halve.view(wide), s["best"], s["now"])
                s["grad"] = torch.where(halve.view(wide), s["best_grad"], s["grad"])
                s["value"] = torch.where(halve, s["best_value"], s["value"])
                s["halved"], s["judged_value"] = halve, s["best_value"]
                s["rose"], since = torch.zeros_like(value), 0
    return worst.x
