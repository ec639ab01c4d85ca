"""Adversarial weight perturbation (AWP)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..attacks import Model
from ..errors import UserError
from .problem import Objective


def with_awp(perturb: Any, outer: Any, awp: float) -> Objective:
    """The objective, with adversarial weight perturbation where awp > 0."""
    if not awp:
        return Objective(perturb, outer)

    def weight_context(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[Any]:
        return _perturbed_weights(model, lambda: outer(model, x, x_adv, y).mean(), awp)

    return Objective(perturb, outer, weight_context)


@contextmanager
def _perturbed_weights(model: Model, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Adversarial weight perturbation (Wu et al. 2020): w + gamma ||w|| g / ||g|| for each matrix and kernel.

    g is the gradient of the loss. The weights are restored on exit. Batch-norm statistics are updated by the outer loss
    alone, not by the pass that computes g.
    """
    if not isinstance(model, nn.Module):
        raise UserError("awp perturbs weights: it needs an nn.Module.")
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    buffers = [(b, b.clone()) for b in model.buffers()]
    grads = torch.autograd.grad(loss(), weights, allow_unused=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
        saved = [w.clone() for w in weights]
        for w, g in zip(weights, grads, strict=True):
            if g is not None:
                if distributed.is_available() and distributed.is_initialized():  # the same direction in all processes
                    distributed.all_reduce(g)
                w.add_(g * (gamma * w.norm() / g.norm().clamp_min(1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for w, before in zip(weights, saved, strict=True):
                w.copy_(before)
