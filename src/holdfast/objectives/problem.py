"""The min-max problem at one time of training, and the outer loss that most objectives share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attacks import Model
from ..information.sources import Source, SourceContext
from ..losses import Loss, isce
from ..noise import Noise
from ..outputs import as_outputs


def _stays(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return x_adv


def _no_weight_context(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Objective:
    """The min-max problem at one time of training.

    Attributes:
        perturb: (model, x, y, noise) -> x_adv, the inner problem.
        loss: (model, x, x_adv, y) -> (N,) with a graph, the outer loss.
        weight_context: (model, x, x_adv, y) -> a context manager in which the loss and its gradient are computed; it
            may perturb the weights.
        replays: steps of the optimiser on each batch, >= 1.
        advance: (x_adv, gradient of the loss there, x) -> the x_adv of the next of these steps.
    """

    perturb: Callable[[Model, Tensor, Tensor, Noise], Tensor]
    loss: Callable[[Model, Tensor, Tensor, Tensor], Tensor]
    weight_context: Callable[[Model, Tensor, Tensor, Tensor], AbstractContextManager[Any]] = _no_weight_context
    replays: int = 1
    advance: Callable[[Tensor, Tensor, Tensor], Tensor] = _stays


Schedule = Callable[[float], Objective]
# (model, x, x_adv, loss_input, y, progress) -> (the model's output at loss_input, the loss there)
OuterLoss = Callable[[Model, Tensor, Tensor, Tensor, Tensor, float], tuple[Any, Tensor]]


def outer_loss_of(loss: Loss, s: Source | None) -> OuterLoss:
    """The loss at ``loss_input``, with s from the source where there is one; at x where s is measured by the attack."""

    def outer_loss(
        model: Model, x: Tensor, x_adv: Tensor, loss_input: Tensor, y: Tensor, progress: float
    ) -> tuple[Any, Tensor]:
        if s is None:
            out = model(loss_input)
            return out, loss(out, y)
        loss_input = x if s.needs_attack else loss_input
        out = as_outputs(model(loss_input))
        network = getattr(model, "module", model)  # without the wrapper of distributed training
        context = SourceContext(network, x, x_adv, loss_input, out, y, progress)
        return out, isce(out, y, s=s.infer(context))

    return outer_loss


def at_x_adv(outer_loss: OuterLoss, progress: float, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """The outer loss at x_adv."""
    return outer_loss(model, x, x_adv, x_adv, y, progress)[1]
