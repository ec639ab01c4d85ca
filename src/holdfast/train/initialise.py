"""Weights to begin with for training on interval bounds, and statistics of batch norms to end with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Data
from ..user_input import typed

AFFINE = nn.Linear | nn.Conv1d | nn.Conv2d


@typed
def initialise_for_bounds(model: nn.Module, seed: int = 0) -> None:
    """Draw weights anew so that intervals neither grow nor shrink on their way through a network (Shi et al. 2021).

        W ~ N(0, 2 pi / n^2),  n = inputs of one output (fan-in)

    With the usual scale, variance 2 / n, the radius of a box grows by about sqrt(n / pi) in every affine layer: the
    bounds of an untrained deep network are astronomical, and training on them first has to undo that.

    Args:
        model: changed in place. Linear layers and convolutions whose weights are trained and not parametrised;
            everything else, biases too, stays.
        seed: of the draw. Torch's own random state is left as it was.

    >>> layer = nn.Linear(400, 300)
    >>> initialise_for_bounds(layer)
    >>> print(f"{layer.weight.std().item() * 400:.2f}, sqrt(2 pi) = {math.sqrt(2 * math.pi):.2f}")
    2.51, sqrt(2 pi) = 2.51
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, AFFINE) and not hasattr(module, "parametrizations") and module.weight.requires_grad:
            fan_in = module.weight[0].numel()
            drawn = torch.randn(module.weight.shape, generator=generator) * (math.sqrt(2 * math.pi) / fan_in)
            with torch.no_grad():
                module.weight.copy_(drawn)


def measure_batch_norm(model: nn.Module, train: Data, batch_size: int, weights: dict[str, Tensor]) -> None:
    """Give each batch norm in training mode the statistics of all training images under the present weights.

    Args:
        model: changed in place.
        train: the images, on the model's device.
        batch_size: images at a time; the mean over batches is taken.
        weights: a copy of the model's state, in which the statistics are changed too; may be empty.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    with torch.no_grad(), _cumulative(norms):
        for x in _batches(train, batch_size):
            model(x)
    for name, buffer in model.named_buffers():
        if name in weights:
            weights[name].copy_(buffer)


def _batches(train: Data, batch_size: int) -> Iterator[Tensor]:
    """Batches of about one size: a small rest would count as much as a full batch."""
    for rows in torch.arange(len(train)).tensor_split(max(1, len(train) // batch_size)):
        yield train.pixels(slice(int(rows[0]), int(rows[-1]) + 1))


@contextmanager
def _cumulative(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms that average over all batches from now on."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
