"""The attack contract, and what every attack shares: the model's state, gradients in x alone, the best point found."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss, is_targeted, negative_margin, targeted
from ..outputs import Model, Outputs, Queried, as_outputs, fooled, frozen_eval, out_of_memory, tensor_fault
from ..threat import Threat, column
from ..user_input import check_call


class MostAdversarial:
    """The most adversarial point seen for each sample, over steps, restarts and attacks.

    A fooled point beats one that is classified correctly. Among two fooled points, or two correct ones, the point with
    the higher negative margin wins.

    Attributes:
        x: (N, ...), the most adversarial point of each sample; the clean image until a point was seen.
        fooled: (N,) bool, whether a point seen for this sample fooled the model.
        score: (N,), the negative margin at ``x``; -inf until a point was seen.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.y = y
        self.x = x.clone()
        self.fooled = torch.zeros_like(y, dtype=torch.bool)
        self.score = torch.full(y.shape, -torch.inf, dtype=x.dtype, device=x.device)
        self.is_new = True

    def update(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Take in new points for some samples.

        Args:
            rows: (M,) int64, the samples that the points belong to.
            x_adv: (M, ...), the points.
            logits: (M, K), the model's logits there.

        Returns:
            (M,) bool, which of these samples no point has fooled so far.
        """
        self.is_new = False
        y, x_adv, logits = self.y[rows], x_adv.detach(), logits.detach()
        score = negative_margin(logits, y).to(self.score.dtype)
        now, before = fooled(logits, y), self.fooled[rows]
        better = (now & ~before) | ((now == before) & (score > self.score[rows]))  # NaN compares as False
        self.x[rows] = torch.where(column(better, x_adv), x_adv, self.x[rows])
        self.score[rows] = torch.where(better, score, self.score[rows])
        self.fooled[rows] = now | before
        return ~(now | before)

    def survivors(self) -> Tensor:
        """The rows of the samples that are not fooled yet, (M,) int64."""
        return all_rows(self.y) if self.is_new else torch.nonzero(~self.fooled)[:, 0]


def attack(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The attack contract, as a decorator: an attack returns x_adv, a point of the threat for every sample.

    It makes no claim about success. During the attack the model is in eval mode with frozen parameters, and its state
    is restored afterwards. It is queried on copies of the images, see ``outputs.Queried``. Gradients are enabled
    whatever the caller's mode, and autocast is disabled. In the result, pixels that are not finite are replaced by
    those of x, and the last operation is the projection into the threat.

    Args:
        function: (model, x, y, threat, *, score, noise, ...) -> x_adv.

    Returns:
        The same function under the contract.

    Raises:
        UserError: in the returned function, for arguments of another type or shape, for steps or restarts below 1, for
            a targeted score without target classes, and inside ``torch.inference_mode``.
    """

    @functools.wraps(function)
    def run(model: Model, x: Tensor, y: Tensor, threat: Threat, **settings: Any) -> Tensor:
        if isinstance(y, tuple):
            raise UserError("y must be a tensor of (N,) labels, got a tuple: give target classes as target=.")
        check_call(function, model, x, y, threat, **settings)
        if settings.get("steps", 1) < 1 or settings.get("restarts", 1) < 1:
            raise UserError(f"{function.__name__} needs steps >= 1 and restarts >= 1, got {settings}.")
        for name, tensor in (("x", x), ("y", y), ("target", settings.get("target"))):
            if tensor is not None and tensor_fault(tensor):
                raise UserError(f"{name} is {tensor_fault(tensor)}.")
        for name, labels in (("y", y), ("target", settings.get("target"))):
            if labels is not None and (labels.shape != x.shape[:1] or labels.dtype != torch.int64):
                raise UserError(
                    f"{name} must be ({len(x) if x.ndim else 'N'},) int64 classes, one for each image of x, got "
                    f"{tuple(labels.shape)} {labels.dtype}."
                )
        if not x.is_floating_point():
            raise UserError(f"x must be float images in the threat's box, got {x.dtype}. Divide by 255 first.")
        if settings.get("target") is None and is_targeted(settings.get("score", negative_margin)):
            raise UserError(
                f"{function.__name__} got a targeted score and no target classes: give target=, (N,) classes, or an "
                "untargeted score."
            )
        if torch.is_inference_mode_enabled():
            raise UserError(
                "attacks need gradients, which inference mode forbids: call them outside it (no_grad is fine)."
            )
        x = x.detach()
        if len(x) == 0:
            return x.clone()
        queried = model if isinstance(model, Queried) else Queried(model)
        with frozen_eval(model), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x_adv = function(queried, x, y, threat, **settings).detach()
        x_adv = torch.where(x_adv.isfinite(), x_adv, x)
        return threat.project(x_adv, x)

    return run


def targeted_score(score: Loss, y: Tensor, target: Tensor | None) -> tuple[Loss, Callable[[Tensor], Any]]:
    """The score that an attack maximises, and the second argument of that score for some rows.

    Args:
        score: the untargeted score.
        y: (N,) labels.
        target: (N,) target classes, or None for an untargeted attack.

    Returns:
        (score_fn, target_fn): ``score_fn(out, target_fn(rows))`` is the score of these rows. ``target_fn`` gives the
        labels, or the pair (labels, target classes) for the targeted form of the score.
    """
    if target is None:
        return score, lambda rows: y[rows]
    return targeted(score), lambda rows: (y[rows], target[rows])


def score_and_grad(model: Model, x_adv: Tensor, score: Loss, target: Any) -> tuple[Outputs, Tensor, Tensor]:
    """The model's output, the score and the score's gradient with respect to x_adv.

    Where the gradient does not exist or is NaN, it is zero: the attack does not move.

    Args:
        model: images to logits or Outputs.
        x_adv: (N, ...).
        score: (out, target) -> (N,).
        target: the second argument of the score.

    Returns:
        (out, score (N,), gradient (N, ...)).
    """
    x_adv = x_adv.detach().requires_grad_()
    out = as_outputs(model(x_adv))
    value = score(out, target)
    if not value.requires_grad:  # the model cut the graph
        return out, value, torch.zeros_like(x_adv)
    return out, value.detach(), gradient(value, x_adv)


def gradient(value: Tensor, x_adv: Tensor, *, retain_graph: bool = False) -> Tensor:
    """The gradient of a score with respect to x_adv: zero where it does not exist or is NaN.

    Args:
        value: (N,), with a graph.
        x_adv: (N, ...).
        retain_graph: keep the graph for another score.

    Returns:
        (N, ...).

    Raises:
        UserError: the model's backward pass fails.
    """
    try:
        found = torch.autograd.grad(
            value.sum(), x_adv, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
        )
    except Exception as error:  # what the model edits in place after it was used, or a backward of its own
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(
            f"the model has no gradient with respect to the images: {type(error).__name__}: {error} Attacks without "
            "gradients (square, rays, spsa, noise) can be run all the same."
        ) from error
    return found[0].nan_to_num(0.0)


def predict(model: Model, x_adv: Tensor) -> Outputs:
    """The model's output without a graph."""
    with torch.no_grad():
        return as_outputs(model(x_adv))


def all_rows(y: Tensor) -> Tensor:
    """Every row's number, (N,) int64."""
    return torch.arange(len(y), device=y.device)


def those(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of each tensor where the mask, (N,) bool, is true.

    A mask as an index makes the host wait for the device once a tensor; here it waits once.
    """
    rows = torch.nonzero(mask)[:, 0]
    return tuple(tensor[rows] for tensor in tensors)


def should_drop_fooled(step: int, x: Tensor) -> bool:
    """Whether fooled samples leave the batch at this step: each step on the CPU, every fifth step on other devices.

    Selecting rows makes the host wait for the device.
    """
    return x.device.type == "cpu" or step % 5 == 4
