"""Data sets as tensors: read once, checked once, resident on one device, cut by fixed rules.

An official test split is the test set, and ``val`` is cut from train. A data set without one is dealt into n stratified
folds, one of which is the test set. No cut has a random state: a sample's place in it is a hash of its number and the
seed, the same on every machine and in every version, whatever ran before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, unknown
from .dataset import Data, Source, Split, augment, check_arrays, check_source, pixels, standardisation
from .readers import IMAGE_SUFFIXES, SPLITS, digits, hub, image_folder, moons, parquet
from .splits import FOLD_SEED, LIMIT_SEED, cut_source

__all__ = [
    "DATASETS", "FOLD_SEED", "IMAGE_SUFFIXES", "LIMIT_SEED", "SPLITS", "Data", "DatasetEntry", "Split", "augment",
    "check_arrays", "default_folds", "from_arrays", "load", "pixels", "standardisation",
]  # fmt: skip


def _find(name: str) -> Source:
    """A key of DATASETS, else a path that exists, else a hub name."""
    if name in DATASETS:
        return DATASETS[name].read()
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"'{name}' is not a .parquet file: expected one, or a folder.")
    if path.exists():
        return parquet(path) if path.is_file() or any(path.rglob("*.parquet")) else image_folder(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and path.suffix != ".parquet":
        return hub(name)
    if re.search(r"[/\\]", name) or name.startswith(("~", ".")) or path.suffix:
        raise UserError(f"there is no such path: '{name}'. Expected a folder or a .parquet file.")
    raise unknown("data set", name, DATASETS)


@dataclass(frozen=True)
class DatasetEntry:
    """How to read a data set, what it is, which augmentation (pad, flip) suits it, how many folds test all of it."""

    read: Callable[[], Source]
    about: str
    pad: int
    flip: bool
    folds: int = 1


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        digits, "1,797 handwritten digits, 8x8 grey; no test split, so 5 folds; no network", 1, False, 5
    ),
    "moons": DatasetEntry(
        moons, "3,000 points of two half circles, images of 1x2 pixels: to look at; no network", 0, False
    ),
    "mnist": DatasetEntry(
        partial(hub, "ylecun/mnist"), "70,000 handwritten digits, 28x28 grey, from the hub", 2, False
    ),
    "cifar10": DatasetEntry(partial(hub, "uoft-cs/cifar10"), "60,000 photographs, 32x32 RGB, from the hub", 4, True),
}


def default_folds(name: str) -> int:
    """How many folds test every sample once: 5 for digits, 1 where there is an official test split."""
    return DATASETS[name].folds if name in DATASETS else 1


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    fold: tuple[int, int] | None = None,
    val: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    limit_train: int | None = None,
    whole: bool = False,
    on: str = "test",
) -> Split:
    """Read, check and cut a data set.

    name: a key of `DATASETS`; else the path of a .parquet file, of a folder of them in hub layout, or of an image
        folder (root/train/<class>/* and root/test/<class>/*, or root/<class>/*); else a hub name, "owner/name".
    fold: (k, n) makes the k-th of n stratified folds, k = 0..n-1, the test set; default (0, 5). Only for data without a
        test split. The n test folds together hold every sample once, and do not move with `seed`.
    val: share of train to hold out, in [0, 1), stratified, fixed by `seed`; 0 gives an empty val.
    limit, limit_train: at most so many samples of test, and of train before val is cut: classes in equal numbers as far
        as they reach, always the same samples, a smaller limit a subset of a larger one.
    whole: nothing is to be trained on: train and val are empty, and without a test split all samples are test.
    on: "test"; or "val": the validation images stand in the place of the test images, which are not touched. That is
        where settings are chosen.
    Returns tensors on `device`, each part in source order. Errors: `UserError`, saying what is wrong and what to do.

    >>> digits = load("digits", fold=(2, 5))
    >>> digits.shape, len(digits.train), len(digits.val), len(digits.test)
    ((1, 8, 8), 1294, 144, 359)
    """
    name = os.fspath(name)
    cut = partial(cut_source, name, partial(_find, name), device=device, fold=fold, val=val, seed=seed)
    return cut(limit=limit, limit_train=limit_train, whole=whole, on=on)


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str = "arrays",
    **cut: Any,
) -> Split:
    """A user's own numpy arrays or tensors, checked, and cut as in `load`.

    x: (N, C, H, W), uint8, or float in [0, 1]. y: (N,) integers 0..K-1. test: (x, y) of the test set; without it a fold
    is cut off. classes: K names, default "0".."K-1". cut: device, fold, val, seed, limit, limit_train, on as in `load`.

    >>> split = from_arrays(torch.rand(20, 3, 8, 8), torch.arange(20) % 2, classes=["cat", "dog"])
    >>> len(split.train), len(split.val), len(split.test), split.classes
    (14, 2, 4, ('cat', 'dog'))
    """
    return cut_source(name, lambda: check_source((x, y), test, classes, name), **cut)
