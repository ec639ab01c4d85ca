"""What the measures share: the choice of samples, the model's evaluation mode, and conversions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Data, pixels
from ..errors import UserError
from ..mapped import take
from ..noise import Noise
from ..outputs import Model, Outputs, check_samples, frozen_eval
from ..queries import CountingModel, device_of, exact_float32


def choose(y: Tensor, index: Tensor, limit: int, seed: int) -> Tensor:
    """The rows of at most ``limit`` samples, with equal numbers of each class where there are enough.

    The rows are shuffled, and every prefix of them is balanced. A sample's place is a hash of its own index and the
    seed, so it depends neither on the order of the samples nor on ``limit``.

    Args:
        y: (N,) labels.
        index: (N,) int64, the samples' own indices.
        limit: number of rows.
        seed: any integer.

    Returns:
        (n,) int64 on the CPU, n <= limit.

    >>> y = torch.tensor([0, 0, 0, 0, 1, 2])
    >>> y[choose(y, torch.arange(6), 3, seed=0)].sort().values
    tensor([0, 1, 2])
    """
    y, index = y.cpu(), index.cpu()
    shuffled = Noise(seed, index).uniform((), torch.float64).argsort(stable=True)
    grouped = shuffled[y[shuffled].argsort(stable=True)]
    sizes = y.bincount()
    rank = torch.empty_like(grouped)  # of the sample within its class
    rank[grouped] = torch.arange(len(y)) - (sizes.cumsum(0) - sizes)[y[grouped]]
    return shuffled[rank[shuffled].argsort(stable=True)][:limit]


class Batch(NamedTuple):
    """Samples on the model's device.

    Attributes:
        x: (n, C, H, W), clean images as the model takes them.
        x_adv: (n, C, H, W), the adversarial ones.
        y: (n,) labels.
        indices: (n,) int64 on the CPU, the samples' own indices.
        rows: (n,) int64 on the CPU, their rows in the columns that they were taken from.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    indices: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Samples:
    """Samples whose images stay where they are, and are taken a batch at a time.

    Args:
        data: all samples.
        x_adv: (N, C, H, W), the adversarial images of all of them.
        rows: (n,) int64 on the CPU, which ones.
        device: the model's.
    """

    data: Data
    x_adv: Tensor
    rows: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def y(self) -> Tensor:
        """(n,) labels on the CPU."""
        return self.data.y.cpu()[self.rows]

    @property
    def indices(self) -> Tensor:
        """(n,) int64 on the CPU, the samples' own indices."""
        return self.data.index[self.rows]

    @property
    def one(self) -> Tensor:
        """(1, C, H, W), the first clean image, which has the shape, the type and the device of all."""
        return self.take(slice(1)).x

    def first(self, count: int) -> Samples:
        """The first ones, at most ``count``."""
        return replace(self, rows=self.rows[:count])

    def take(self, place: slice) -> Batch:
        """The samples in these places."""
        rows = self.rows[place]
        with torch.inference_mode(False):  # gradients are needed, whatever mode the caller is in
            x, x_adv, y = (
                take(part, rows.to(part.device)).to(self.device) for part in (self.data.x, self.x_adv, self.data.y)
            )
            return Batch(pixels(x), pixels(x_adv), y, self.data.index[rows], rows)

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def choose_samples(
    model: Model, x: Tensor, y: Tensor, x_adv: Tensor, index: Tensor | None, limit: int, seed: int
) -> Samples:
    """The samples that are measured, chosen by ``choose``; UserError for none, or for columns that do not match."""
    check_samples(x, y)
    if len(y) == 0 or limit < 1:
        raise UserError(f"there is nothing to measure: {len(y)} samples, of which at most {limit} are used.")
    if not len(x) == len(x_adv) == len(y) or x.shape != x_adv.shape:
        raise UserError(
            f"x, y and x_adv must be of the same samples, got {tuple(x.shape)}, {tuple(y.shape)}, {tuple(x_adv.shape)}."
        )
    index = torch.arange(len(y)) if index is None else index.cpu()
    data = Data(x, y, index)
    return Samples(data, x_adv, choose(y, index, limit, seed), device_of(model, data))


@contextmanager
def counted(model: Model) -> Iterator[CountingModel]:
    """The model in eval mode and in exact float32, with gradients enabled and its passes counted."""
    with exact_float32(), frozen_eval(model), torch.enable_grad():
        yield CountingModel(model)


def features_of(out: Outputs) -> Tensor:
    """The head's input where the model returns it, else the logits: (N, D) float64 on the CPU."""
    return to_float64(out.logits if out.features is None else out.features.flatten(1))


def to_float64(values: Tensor) -> Tensor:
    """float64 on the CPU, because not every device has float64."""
    return values.detach().cpu().double()


def json_number(value: float | Tensor) -> float | None:
    """A number with six digits as JSON holds it; None for NaN and infinity.

    >>> json_number(1 / 3), json_number(math.inf)
    (0.333333, None)
    """
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None
