"""Data and Split, and what a batch goes through: pixels, augmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import mapped
from ..errors import UserError
from ..user_input import typed


class DataWarning(UserWarning):
    """What was assumed, skipped or converted while data was read; ``Split.notes`` holds the same sentences."""


@dataclass(frozen=True)
class Data:
    """Samples on one device; images that do not fit in memory are in a file, and go to the device row by row.

    Args:
        x: (N, C, H, W), uint8, or float32 in [0, 1] if the user's own array was float; on the CPU where it is mapped.
        y: (N,) int64, labels.
        index: (N,) int64, the sample's number in its source split, which it keeps in every selection.
        classes: names of the labels 0..K-1, those that do not occur in this selection too; empty where nobody named
            them. A network must have one logit for each.
        source: name of the data set that the samples were read and checked with; "" for tensors of a user's own.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    classes: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor | slice) -> Data:
        """Select samples.

        Args:
            rows: indices, a mask or a slice.

        Returns:
            The samples at ``rows``, in that order.
        """
        if isinstance(rows, slice):
            return replace(self, x=self.x[rows], y=self.y[rows], index=self.index[rows])
        x = mapped.take(self.x, rows, self.y.device)
        return replace(self, x=x, y=self.y[rows], index=self.index[rows])

    def pixels(self, rows: Tensor | slice) -> Tensor:
        """(M, C, H, W): images of some samples as a model takes them, on the device of the labels.

        Args:
            rows: (M,) int64, or a slice.
        """
        return pixels(mapped.take(self.x, rows, self.y.device))

    def to(self, device: str | torch.device) -> Data:
        """Move the samples to a device; images in a file stay there."""
        x = self.x if mapped.is_mapped(self.x) else self.x.to(device)
        return replace(self, x=x, y=self.y.to(device), index=self.index.to(device))


@dataclass(frozen=True)
class Split:
    """A data set, split.

    Args:
        name: what the user asked for.
        train: training samples.
        val: validation samples.
        test: test samples.
        classes: names of the labels 0..K-1.
        fingerprint: a hash of test x and y (after ``limit``), so that stored adversarial examples can be checked
            against the data they were made from.
        notes: what was assumed, skipped or converted while the data was read, a sentence each.
    """

    name: str
    train: Data
    val: Data
    test: Data
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every sample."""
        c, h, w = self.train.x.shape[1:]
        return c, h, w


class Source(NamedTuple):
    """A data set as it was read: checked, not yet split; test is None without an official test split.

    With ``decode``, images are decoded once it is known which of them are needed. ``x`` of train and test then holds
    their numbers, (N,) int64, and ``decode(numbers, most)`` returns them: in memory up to ``most`` bytes, else mapped.
    """

    train: Data
    test: Data | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    decode: Callable[..., Chosen] | None = None


class Chosen(NamedTuple):
    """Images of a source that were decoded.

    Attributes:
        x: (N, C, H, W), as they were asked for; of no use where some are damaged.
        notes: what was assumed.
        damaged: numbers of those that cannot be decoded, which are to be left out.
    """

    x: Tensor
    notes: tuple[str, ...]
    damaged: tuple[int, ...]


def pixels(x: Tensor) -> Tensor:
    """Convert images to [0, 1] as a model takes them: uint8 becomes float32 x / 255, float stays as it is.

    Args:
        x: images of any shape, uint8 or float.

    Returns:
        A float tensor of the same shape.

    Raises:
        UserError: another dtype.

    >>> pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(255)
    if not x.is_floating_point():
        raise UserError(f"x is {x.dtype}: expected uint8 in 0..255 or float in [0, 1]. Convert it first.")
    return x


@typed
def standardisation(data: Data) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each channel's pixels in [0, 1], for layer 0 of a model.

    Args:
        data: the training samples.

    Returns:
        (mean, std), both (C,) float32; std is at least 1/255, one grey level, so that a constant channel is not
        divided by zero.

    Raises:
        UserError: there are no samples.
    """
    if not len(data):
        raise UserError("standardisation needs samples, but this data is empty: pass the training data.")
    total, squares = torch.zeros(2, data.x.shape[1], dtype=torch.float64)
    # in chunks, since all of it in float64 may not fit; on the CPU, since not every device has float64
    for part in mapped.chunks(data.x):
        for chunk in part.split(4096):
            p = pixels(chunk.cpu()).double()
            total += p.sum((0, 2, 3))
            squares += p.square().sum((0, 2, 3))
    mean = total / data.x[:, 0].numel()
    variance = squares / data.x[:, 0].numel() - mean.square()
    std = variance.clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.float().to(data.y.device), std.float().to(data.y.device)


def augment(x: Tensor, rng: torch.Generator, *, pad: int, flip: bool) -> Tensor:
    """Augment a batch: a random crop of each padded sample, and its mirror image half of the time.

    Args:
        x: (N, C, H, W) of any dtype on any device.
        rng: source of all random numbers; one on the CPU gives the same result on every device.
        pad: pixels of zeros on every side before the crop, >= 0; all (2 pad + 1)^2 crops are equally likely.
        flip: whether to mirror.

    Returns:
        The batch in x's shape, dtype and device; x itself with pad=0 and flip=False.

    Raises:
        UserError: pad < 0, or more than 16 and twice the longer side of the images.

    >>> augment(torch.full((1, 1, 1, 3), 7), torch.Generator().manual_seed(0), pad=0, flip=True)
    tensor([[[[7, 7, 7]]]])
    """
    most = max(16, 2 * max(x.shape[-2:]))
    if not 0 <= pad <= most:
        raise UserError(f"pad must be 0 to {most} pixels for these images, got {pad}.")
    if pad == 0 and not flip:
        return x
    n, c, h, w = x.shape
    down, right, mirror = (
        torch.randint(high, (n, 1), generator=rng, device=rng.device).to(x.device, non_blocking=True)
        for high in (2 * pad + 1, 2 * pad + 1, 2 if flip else 1)
    )
    rows = down + torch.arange(h, device=x.device)
    cols = right + torch.arange(w, device=x.device)
    cols = torch.where(mirror.bool(), cols.flip(1), cols)
    sample = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return F.pad(x, (pad, pad, pad, pad))[sample, channel, rows[:, None, :, None], cols[:, None, None, :]]
