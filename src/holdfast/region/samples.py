"""What the measures share: which samples are looked at, and what the network says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Data, pixels
from ..errors import UserError
from ..noise import Noise
from ..outputs import Model, Outputs, frozen_eval
from ..queries import CountingModel, device_of, exact_float32


def choose(y: Tensor, index: Tensor, most: int, seed: int) -> Tensor:
    """The rows of at most ``most`` samples, classes in equal numbers as far as they reach: (N,), (N,) -> (n,).

    In shuffled order, of which every beginning is balanced. A sample's place is a hash of its own number and the seed.

    >>> y = torch.tensor([0, 0, 0, 0, 1, 2])
    >>> y[choose(y, torch.arange(6), 3, seed=0)].sort().values
    tensor([0, 1, 2])
    """
    y, index = y.cpu(), index.cpu()
    shuffled = Noise(seed, index).uniform((), torch.float64).argsort(stable=True)
    grouped = shuffled[y[shuffled].argsort(stable=True)]
    sizes = y.bincount()
    place = torch.empty_like(grouped)  # of the sample within its class
    place[grouped] = torch.arange(len(y)) - (sizes.cumsum(0) - sizes)[y[grouped]]
    return shuffled[place[shuffled].argsort(stable=True)][:most]


class Asked(NamedTuple):
    """Some samples on the model's device, x and x_adv as the model takes them, their own numbers and their rows."""

    x: Tensor
    x_adv: Tensor
    y: Tensor
    numbers: Tensor
    rows: Tensor

    def take(self, rows: slice) -> Asked:
        """The samples at these rows."""
        return Asked(*(column[rows] for column in self))


def chosen(model: Model, x: Tensor, y: Tensor, x_adv: Tensor, index: Tensor | None, most: int, seed: int) -> Asked:
    """The samples that are looked at, from all there are. Raises UserError for none, or columns of different length."""
    if len(y) == 0 or most < 1:
        raise UserError(f"there is nothing to measure: {len(y)} samples, of which at most {most} are looked at.")
    if not len(x) == len(x_adv) == len(y) or x.shape != x_adv.shape:
        raise UserError(
            f"x, y and x_adv must be of the same samples, got {tuple(x.shape)}, {tuple(y.shape)}, {tuple(x_adv.shape)}."
        )
    numbers = torch.arange(len(y)) if index is None else index.cpu()
    rows = choose(y, numbers, most, seed)
    device = device_of(model, Data(x, y, numbers))
    clean, attacked, labels = (part[rows.to(part.device)].to(device) for part in (x, x_adv, y))
    return Asked(pixels(clean), pixels(attacked), labels, numbers[rows], rows)


@contextmanager
def asking(model: Model) -> Iterator[CountingModel]:
    """The model in eval mode, in float32 that is float32, gradients on, its passes counted."""
    with exact_float32(), frozen_eval(model), torch.enable_grad():
        yield CountingModel(model)


def features_of(out: Outputs) -> Tensor:
    """What is called features: the head's input where a model tells it, else the logits; (N, D) float64 on the CPU."""
    return wide(out.logits if out.features is None else out.features.flatten(1))


def wide(values: Tensor) -> Tensor:
    """float64 on the CPU: not every device has it."""
    return values.detach().cpu().double()


def number(value: float | Tensor) -> float | None:
    """A figure as JSON holds it, six digits long; None for NaN and infinity.

    >>> number(1 / 3), number(math.inf)
    (0.333333, None)
    """
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None
