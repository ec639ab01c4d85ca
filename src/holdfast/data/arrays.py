"""The checks on images and labels where they enter: shape, type, range, labels, and samples that occur twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..mapped import extremes
from ..outputs import tensor_fault
from ..user_input import of_type, typed
from .dataset import Data, Source
from .labels import MAX_CLASSES, check_names, count

ROUNDING = 1e-6  # how far float pixels may lie outside [0, 1], as after an undone normalisation; they are clipped
DARK = 0.1  # images whose largest pixel is below this share of the range are probably in another range
FEWEST = 16  # samples of fewer values than this may be equal by chance


@typed
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
    for name, v in (("x", x), ("y", y)):
        if isinstance(v, Tensor) and tensor_fault(v):
            raise UserError(f"{name} of {what} is {tensor_fault(v)}.")
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
    y = check_labels(y, len(x), classes, what)
    return Data(x.contiguous(), y, torch.arange(len(y)))


def check_labels(y: Tensor, n: int, classes: Sequence[str] | None, what: str) -> Tensor:
    """Check labels, which is cheap, before images are decoded.

    Args:
        y: (n,) integers in 0..K-1.
        n: number of samples.
        classes: K names, if they are known.
        what: name of the data, for errors.

    Returns:
        The labels as int64.

    Raises:
        UserError: another shape or dtype, or a label out of range.
    """
    if y.shape != (n,):
        raise UserError(f"y of {what} has shape {tuple(y.shape)}: expected ({n},), one label for each of x.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"y of {what} is {y.dtype}: labels must be integers. Use y.astype('int64').")
    if y.dtype == torch.uint64 and y.numpy().max() > torch.iinfo(torch.int64).max:
        raise UserError(f"y of {what} holds the label {y.numpy().max()}: labels are 0..K-1. Relabel.")
    y = y.to(torch.int64)
    low, high = int(y.min()), int(y.max())
    if low < 0:
        hint = "-1 often marks a test split with hidden labels: use another split."
        raise UserError(f"label {low} in row {int(y.argmin())} of {what} is negative: labels start at 0. {hint}")
    if classes is not None and high >= len(classes):
        hint = f"with {len(classes)} classes labels are 0..{len(classes) - 1}. Relabel, or name more classes."
        raise UserError(f"label {high} in row {int(y.argmax())} of {what} is out of range: {hint}")
    return y


def given_names(classes: Sequence[str] | None, what: str) -> Sequence[str] | None:
    """Class names as text, checked; None without any. Raises UserError as ``check_names`` does."""
    if isinstance(classes, str):
        raise UserError(f"classes of {what} is the text '{classes[:40]}': expected a list of K names.")
    if classes is not None:
        of_type(f"classes of {what}", classes, Sequence)
        classes = classes if len(classes) > MAX_CLASSES else [str(name) for name in classes]
        check_names(classes, what)
    return classes


def class_names(y: Tensor, classes: Sequence[str] | None, what: str) -> Sequence[str]:
    """The names of the classes of training labels; "0".."K-1" where none are given.

    Args:
        y: (N,) int64 labels of train, >= 0.
        classes: K names, or None: then labels must be 0..K-1 with none missing.
        what: name of the data, for errors.

    Returns:
        K names.

    Raises:
        UserError: a label is missing, there is only one class, or there are too many.
    """
    present = y.unique().tolist()
    if classes is None:  # a missing label is more likely a mistake (labels from 1) than an empty class
        missing = next((k for k, label in enumerate(present) if label != k), None)
        if missing is not None:
            hint = "without class names, labels must be 0..K-1 with none missing. Relabel, or name the classes."
            raise UserError(f"label {missing} never occurs in {what}, though {present[-1]} does: {hint}")
        classes = [str(k) for k in present]
        check_names(classes, what)
    if len(present) < 2:
        raise UserError(f"{what} has one class only ('{classes[present[0]]}'): a classifier needs at least two.")
    return classes


def check_source(
    train: tuple[Any, Any],
    test: tuple[Any, Any] | None,
    classes: Sequence[str] | None,
    what: str,
    notes: Sequence[str] = (),
) -> Source:
    """Check train and test, each by itself and against each other.

    Args:
        train: (x, y).
        test: (x, y), or None without an official test split.
        classes: K names, or None: then labels must be 0..K-1 with none missing.
        what: name of the data, for errors.
        notes: what was assumed so far.

    Returns:
        The source, with notes on images that may be in another range or layout, and on samples that occur twice.

    Raises:
        UserError: as for ``check_arrays``; or a label is missing, there is only one class, class names repeat, or
            train and test differ in shape or dtype.
    """
    classes = given_names(classes, what)
    for name, pair in (("the training data", train), ("test", test)):
        of_type(name, pair, tuple[Any, Any] | None)
    data = check_arrays(*train, classes=classes, what=f"{what} (train)" if test else what)
    classes = class_names(data.y, classes, what)
    test_data = None if test is None else check_arrays(*test, classes=classes, what=f"{what} (test)")
    if test_data and (test_data.x.shape[1:], test_data.x.dtype) != (data.x.shape[1:], data.x.dtype):
        a, b = (f"{tuple(d.x.shape[1:])} {d.x.dtype}" for d in (data, test_data))
        fix = " For files: --resize N, --convert rgb or --convert grey." if data.x.dtype == test_data.x.dtype else ""
        raise UserError(f"samples of {what} are {a} in train but {b} in test: resize or convert one of the two.{fix}")
    assumed = assumptions(data.x, what) or (assumptions(test_data.x, f"{what} (test)") if test_data else [])
    return Source(data, test_data, tuple(classes), (*notes, *assumed, *duplicates(data, test_data, what)))


def assumptions(x: Tensor, what: str) -> list[str]:
    """What is assumed about images that could also be meant in another way.

    Args:
        x: (N, ...), uint8, or float in [0, 1]; only of (N, C, H, W) the layout is looked at.
        what: name of the data.

    Returns:
        A sentence for each assumption; none for ordinary images.

    >>> assumptions(torch.tensor([0, 1], dtype=torch.uint8).expand(9, 1, 4, 2), "mine")
    ['mine: uint8 images hold 0 and 1 only, read as 0/255 and 1/255, nearly black. If 1 is white, multiply x by 255.']
    """
    notes = []
    whole = x.dtype == torch.uint8
    low, high = extremes(x)
    if whole and high <= 1:
        read = "read as 0/255 and 1/255, nearly black. If 1 is white, multiply x by 255."
        notes.append(f"{what}: uint8 images hold 0 and 1 only, {read}")
    elif low >= 0 and high < DARK * (255 if whole else 1):
        box = "0..255" if whole else "[0, 1]"
        read = f"read in {box}, nearly black. If another range is meant, scale x to {box}."
        notes.append(f"{what}: the largest value of x is {high:g}, {read}")
    elif not whole and high == 1 and low == 0 and bool(((x == 0) | (x == 1)).all()):
        read = "read as black and white. If they are meant in 0..255, divide x by 255."
        notes.append(f"{what}: float images hold 0 and 1 only, {read}")
    channels, height, width = x.shape[1:] if x.ndim == 4 else (0, 0, 0)
    either_way = {channels, width} <= {1, 3} or {channels, width} <= {3, 4}  # grey or RGB, RGB or RGBA
    if either_way and channels + width > 2:
        read = f"read as {channels} channels of {height}x{width} pixels (channels first)."
        notes.append(f"{what}: x has the shape {tuple(x.shape)}, {read}")
    return notes


def duplicates(train: Data, test: Data | None, what: str) -> list[str]:
    """Images that occur twice, pixel for pixel, by a hash of their content.

    Args:
        train: training samples, or all samples without a test split.
        test: test samples, or None.
        what: name of the data.

    Returns:
        A sentence about test images that are in train too, and one about repetitions within train.
    """
    if train.x[0].numel() < FEWEST:
        return []
    first: dict[bytes, int] = {}
    again = [(i, first[key]) for i, key in enumerate(_hashes(train.x)) if first.setdefault(key, i) != i]
    shared = [(i, first[key]) for i, key in enumerate(_hashes(test.x)) if key in first] if test else []

    def note(pairs: list[tuple[int, int]], y: Tensor, said: tuple[str, str], names: tuple[str, str], so: str) -> str:
        i, j = pairs[0]
        other = sum(int(y[a]) != int(train.y[b]) for a, b in pairs)
        labels = f", {other:,} of them under another label" if other else ""
        same = f"{names[0]} {i} is {names[1]} {j}"
        return f"{what}: {count(len(pairs), *said)}, pixel for pixel ({same}){labels}. {so}"

    notes = []
    if test and shared:
        said = "test image is in train too", "test images are in train too"
        notes.append(note(shared, test.y, said, ("test", "train"), "The test set is not independent."))
    if again:
        said, close = ("image repeats an earlier one", "images repeat earlier ones"), "Folds, training and validation"
        notes.append(note(again, train.y, said, ("image", "image"), f"{close} images may share them."))
    return notes


def _hashes(x: Tensor) -> list[bytes]:
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in x.contiguous().numpy()]
