"""What every attack keeps: the model as it was, gradients on x alone, the worst point of each sample, the threat."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss, negative_margin, targeted
from ..outputs import Model, Outputs, as_outputs, fooled, frozen_eval
from ..threat import Threat, column


class MostAdversarial:
    """keep_worst: the worst point seen for each sample, merged over steps, restarts and attacks.

    A fooled sample beats one that stands; among equals the higher negative margin wins. ``see`` takes points for some
    rows and says which of these still stand.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.y = y
        self.x = x.clone()
        self.fooled = torch.zeros_like(y, dtype=torch.bool)
        self.height = torch.full(y.shape, -torch.inf, dtype=x.dtype, device=x.device)

    def see(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        y, x_adv, logits = self.y[rows], x_adv.detach(), logits.detach()
        height = negative_margin(logits, y).to(self.height.dtype)
        now, before = fooled(logits, y), self.fooled[rows]
        better = (now & ~before) | ((now == before) & (height > self.height[rows]))  # NaN compares as False
        self.x[rows] = torch.where(column(better, x_adv), x_adv, self.x[rows])
        self.height[rows] = torch.where(better, height, self.height[rows])
        self.fooled[rows] = now | before
        return ~(now | before)

    def standing(self) -> Tensor:
        """The rows not fooled yet, (M,) int64."""
        return torch.nonzero(~self.fooled)[:, 0]


def attack(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The contract around an attack: it returns x_adv, a point of the threat for every sample, and makes no claim.

    The model is in eval mode with frozen parameters meanwhile and comes back as it was; gradients are on, whatever the
    caller's mode; autocast is off; values that are not finite become x's; the projection has the last word.
    """

    @functools.wraps(function)
    def run(model: Model, x: Tensor, y: Tensor, threat: Threat, **settings: Any) -> Tensor:
        if settings.get("steps", 1) < 1 or settings.get("restarts", 1) < 1:
            raise UserError(f"{function.__name__} needs steps >= 1 and restarts >= 1, got {settings}.")
        if torch.is_inference_mode_enabled():
            raise UserError(
                "attacks need gradients, which inference mode forbids: call them outside it (no_grad is fine)."
            )
        x = x.detach()
        if len(x) == 0:
            return x.clone()
        with frozen_eval(model), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x_adv = function(model, x, y, threat, **settings).detach()
        x_adv = torch.where(x_adv.isfinite(), x_adv, x)
        return threat.project(x_adv, x)

    return run


def targeted_score(score: Loss, y: Tensor, target: Tensor | None) -> tuple[Loss, Callable[[Tensor], Any]]:
    """The score to climb and its target for some rows: y alone, or (y, t) with the score's targeted form."""
    if target is None:
        return score, lambda rows: y[rows]
    return targeted(score), lambda rows: (y[rows], target[rows])


def score_and_grad(model: Model, x_adv: Tensor, score: Loss, goal: Any) -> tuple[Outputs, Tensor, Tensor]:
    """(out, score, d score / d x) at x_adv; a gradient that does not exist is zero, so nothing moves on rubbish."""
    x_adv = x_adv.detach().requires_grad_()
    out = as_outputs(model(x_adv))
    value = score(out, goal)
    if not value.requires_grad:  # the model cut the graph
        return out, value, torch.zeros_like(x_adv)
    (grad,) = torch.autograd.grad(value.sum(), x_adv, allow_unused=True, materialize_grads=True)
    return out, value.detach(), grad.nan_to_num(0.0)


def predict(model: Model, x_adv: Tensor) -> Outputs:
    """The model's answer without a graph."""
    with torch.no_grad():
        return as_outputs(model(x_adv))


def all_rows(y: Tensor) -> Tensor:
    """Every row's number, (N,) int64."""
    return torch.arange(len(y), device=y.device)


def should_drop_fooled(step: int, x: Tensor) -> bool:
    """Whether fooled samples leave the batch after this step: always on the CPU; elsewhere it waits for the device."""
    return x.device.type == "cpu" or step % 5 == 4
