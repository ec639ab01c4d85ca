"""Data and Split, the checks on a user's arrays, and what a batch goes through: pixels, augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

ROUNDING = 1e-6  # how far float pixels may lie outside [0, 1], as after an undone normalisation; they are clipped


@dataclass(frozen=True)
class Data:
    """Samples on one device.

    Args:
        x: (N, C, H, W), uint8, or float32 in [0, 1] if the user's own array was float.
        y: (N,) int64, labels.
        index: (N,) int64, the sample's number in its source split, which it keeps in every selection.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor | slice) -> Data:
        """Select samples.

        Args:
            rows: indices, a mask or a slice.

        Returns:
            The samples at ``rows``, in that order.
        """
        return Data(self.x[rows], self.y[rows], self.index[rows])

    def to(self, device: str | torch.device) -> Data:
        """Move the samples to a device."""
        return Data(self.x.to(device), self.y.to(device), self.index.to(device))


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
    """

    name: str
    train: Data
    val: Data
    test: Data
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every sample."""
        c, h, w = self.train.x.shape[1:]
        return c, h, w


class Source(NamedTuple):
    """A data set as it was read: checked, not yet split; test is None without an official test split."""

    train: Data
    test: Data | None
    classes: tuple[str, ...]


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
    for chunk in data.x.split(4096):
        p = pixels(chunk.cpu()).double()
        total += p.sum((0, 2, 3))
        squares += p.square().sum((0, 2, 3))
    mean = total / data.x[:, 0].numel()
    variance = squares / data.x[:, 0].numel() - mean.square()
    std = variance.clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.float().to(data.x.device), std.float().to(data.x.device)


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
        UserError: pad < 0.

    >>> augment(torch.full((1, 1, 1, 3), 7), torch.Generator().manual_seed(0), pad=0, flip=True)
    tensor([[[[7, 7, 7]]]])
    """
    if pad < 0:
        raise UserError(f"pad must be >= 0 pixels, got {pad}.")
    if pad == 0 and not flip:
        return x
    n, c, h, w = x.shape
    down, right, mirror = (
        torch.randint(high, (n, 1), generator=rng, device=rng.device).to(x.device)
        for high in (2 * pad + 1, 2 * pad + 1, 2 if flip else 1)
    )
    rows = down + torch.arange(h, device=x.device)
    cols = right + torch.arange(w, device=x.device)
    cols = torch.where(mirror.bool(), cols.flip(1), cols)
    sample = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return F.pad(x, (pad, pad, pad, pad))[sample, channel, rows[:, None, :, None], cols[:, None, None, :]]


def check_arrays(x: Any, y: Any, *, classes: Sequence[str] | None = None, what: str = "the data") -> Data:
    """Check a user's own arrays and convert them.

    Args:
        x: (N, C, H, W), uint8, or float in [0, 1].
        y: (N,) integers in 0..K-1.
        classes: K names, if they are known.
        what: name of the data, for errors.

    Returns:
        The samples on the CPU.

    Raises:
        UserError: no samples, wrong dimensions or dtypes, NaN, infinity, or values out of range.

    >>> check_arrays(np.full((2, 1, 4, 4), 9.0), [0, 1])
    Traceback (most recent call last):
    holdfast.errors.UserError: x of the data runs from 9 to 9: float must lie in [0, 1]. Divide by 255, or pass uint8.
    """
    try:  # numpy is copied: torch warns about arrays it may not write
        x, y = (v.detach().cpu() if isinstance(v, Tensor) else torch.from_numpy(np.array(v)) for v in (x, y))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} must be arrays of numbers ({error}): pass numpy arrays or tensors x and y.") from error
    shape = tuple(x.shape)
    if x.ndim != 4:
        hint = " Add the channel with x[:, None]." if x.ndim == 3 else ""
        raise UserError(f"x of {what} has shape {shape}: expected (N, C, H, W).{hint}")
    if not x.numel():
        raise UserError(f"{what} is empty (x has shape {shape}): expected at least one sample.")
    if shape[1] > 4 and shape[3] <= 4:
        hint = "use x.transpose(0, 3, 1, 2) in numpy, x.permute(0, 3, 1, 2) in torch."
        raise UserError(f"x of {what} has shape {shape}, channels last: expected (N, C, H, W); {hint}")
    if x.is_floating_point():
        x = x.to(torch.float32)
        if not x.isfinite().all():
            raise UserError(f"x of {what} holds NaN or infinity: float must lie in [0, 1]. Clean the array first.")
        if x.min() < -ROUNDING or x.max() > 1 + ROUNDING:
            span = f"{float(x.min()):g} to {float(x.max()):g}"
            raise UserError(f"x of {what} runs from {span}: float must lie in [0, 1]. Divide by 255, or pass uint8.")
        x = x.clamp(0, 1)
    elif x.dtype != torch.uint8:
        raise UserError(f"x of {what} is {x.dtype}: expected uint8 in 0..255 or float in [0, 1]. Convert it first.")
    if y.shape != x.shape[:1]:
        raise UserError(f"y of {what} has shape {tuple(y.shape)}: expected ({len(x)},), one label for each of x.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"y of {what} is {y.dtype}: labels must be integers. Use y.astype('int64').")
    y = y.to(torch.int64)
    low, high = int(y.min()), int(y.max())
    if low < 0:
        hint = "-1 often marks a test split with hidden labels: use another split."
        raise UserError(f"label {low} in row {int(y.argmin())} of {what} is negative: labels start at 0. {hint}")
    if classes is not None and high >= len(classes):
        hint = f"with {len(classes)} classes labels are 0..{len(classes) - 1}. Relabel, or name more classes."
        raise UserError(f"label {high} in row {int(y.argmax())} of {what} is out of range: {hint}")
    return Data(x.contiguous(), y, torch.arange(len(y)))


def check_source(
    train: tuple[Any, Any], test: tuple[Any, Any] | None, classes: Sequence[str] | None, what: str
) -> Source:
    """Check train and test, each by itself and against each other.

    Args:
        train: (x, y).
        test: (x, y), or None without an official test split.
        classes: K names, or None: then labels must be 0..K-1 with none missing.
        what: name of the data, for errors.

    Returns:
        The source.

    Raises:
        UserError: as for ``check_arrays``; or a label is missing, there is only one class, class names repeat, or
            train and test differ in shape or dtype.
    """
    data = check_arrays(*train, classes=classes, what=f"{what} (train)" if test else what)
    present = data.y.unique().tolist()
    if classes is None:  # a missing label is more likely a mistake (labels from 1) than an empty class
        missing = sorted(set(range(present[-1])) - set(present))
        if missing:
            hint = "without class names, labels must be 0..K-1 with none missing. Relabel, or name the classes."
            raise UserError(f"label {missing[0]} never occurs in {what}, though {present[-1]} does: {hint}")
        classes = [str(k) for k in present]
    if len(present) < 2:
        raise UserError(f"{what} has one class only ('{classes[present[0]]}'): a classifier needs at least two.")
    if len(set(classes)) < len(classes):
        raise UserError(f"{what} has a class name twice among {', '.join(sorted(classes))}: make them distinct.")
    test_data = None if test is None else check_arrays(*test, classes=classes, what=f"{what} (test)")
    if test_data and (test_data.x.shape[1:], test_data.x.dtype) != (data.x.shape[1:], data.x.dtype):
        a, b = (f"{tuple(d.x.shape[1:])} {d.x.dtype}" for d in (data, test_data))
        raise UserError(f"samples of {what} are {a} in train but {b} in test: resize or convert one of the two.")
    return Source(data, test_data, tuple(classes))
