"""Data sets as tensors: read once, checked once, held on one device, and split by fixed rules.

If a data set has an official test split, that is the test set, and ``val`` is split off from train. Otherwise the data
is divided into n stratified folds, one of which is the test set. No split has a random state: where a sample goes
depends on a hash of its number and the seed, so splits are the same on every machine and in every version.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import user_input
from ..errors import UserError, unknown
from ..user_input import typed
from .arrays import check_arrays, check_source
from .dataset import Data, DataWarning, Source, Split, augment, pixels, standardisation
from .folders import IMAGE_SUFFIXES, SPLITS, find
from .images import Reading
from .readers import cache_file, digits, hub, image_folder, moons, parquet
from .splits import FOLD_SEED, LIMIT_SEED, split_source

__all__ = [
    "DATASETS", "FOLD_SEED", "IMAGE_SUFFIXES", "LIMIT_SEED", "SPLITS", "Data", "DataWarning", "DatasetEntry",
    "Split", "augment", "check_arrays", "default_folds", "from_arrays", "load", "local_path", "pixels",
    "standardisation",
]  # fmt: skip


@typed
def local_path(name: str) -> Path | None:
    """The file or folder of this name, if there is one.

    Args:
        name: a path, relative to the working directory; ~ is the home folder.

    Returns:
        The absolute path, or None.
    """
    try:
        path = Path(name).expanduser()
        return Path(os.path.abspath(path)) if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL character, an unknown user
        return None


def _find(name: str, reading: Reading) -> Source:
    """Read a key of DATASETS, else a path that exists, else a hub name."""
    if name in DATASETS:
        return DATASETS[name].read(reading)
    path = user_input.path("the data set", name)
    if path.is_dir():
        return (parquet if find(path, [".parquet"]).files else image_folder)(path, reading)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return parquet(path, reading)
    if path.exists():
        raise UserError(f"'{name}' is a file of another kind: expected a .parquet file or a folder.")
    if re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", name) and path.suffix.lower() != ".parquet":
        return hub(name, reading)
    if re.search(r"[/\\]", name) or name.startswith(("~", ".")) or path.suffix:
        raise UserError(f"there is no such path: '{name}'. Expected a folder or a .parquet file.")
    raise unknown("data set", name, DATASETS)


def _warn(split: Split) -> Split:
    """Warn of what was assumed; worker processes are silent, as the one that started them has said it."""
    if multiprocessing.parent_process() is None:
        for note in split.notes:
            warnings.warn(note, DataWarning, stacklevel=3)
    return split


@dataclass(frozen=True)
class DatasetEntry:
    """A data set that has a name.

    Args:
        read: reads it; converts and resizes as it is told.
        about: one line that describes it.
        pad: suitable augmentation: pixels of padding before a random crop.
        flip: suitable augmentation: mirror images.
        folds: number of folds that test every sample once; 1 with an official test split.
        repo: "owner/name" on the hub; "" for data that needs no download.
    """

    read: Callable[[Reading], Source]
    about: str
    pad: int
    flip: bool
    folds: int = 1
    repo: str = ""

    @property
    def is_here(self) -> bool:
        """Whether it can be read without a network: embedded, or downloaded and decoded before."""
        return not self.repo or cache_file(f"hub:{self.repo}").exists()


def _from_hub(repo: str, about: str, pad: int, flip: bool) -> DatasetEntry:
    return DatasetEntry(partial(hub, repo), about, pad, flip, repo=repo)


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        digits, "1,797 handwritten digits, 8x8 grey; 5 folds, as it has no test split; no download", 1, False, 5
    ),
    "moons": DatasetEntry(
        moons, "3,000 points of two half circles, as images of 1x2 pixels, for plots; no download", 0, False
    ),
    "mnist": _from_hub("ylecun/mnist", "70,000 handwritten digits, 28x28 grey, from the hub", 2, False),
    "cifar10": _from_hub("uoft-cs/cifar10", "60,000 photographs, 32x32 RGB, from the hub", 4, True),
}


@typed
def default_folds(name: str) -> int:
    """Number of folds that test every sample once: 5 for digits, 1 for data with an official test split.

    Args:
        name: as for ``load``.

    Returns:
        The number; 1 for data that is not in DATASETS.
    """
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
    eval_split: str = "test",
    image_column: str = "",
    label_column: str = "",
    convert: str = "",
    resize: int = 0,
) -> Split:
    """Read, check and split a data set.

    What is unambiguous is read; what was assumed, skipped or converted is in ``notes`` of the result, and in warnings.

    Args:
        name: a key of DATASETS; else the path of a .parquet file, of a folder of them in hub layout, or of an image
            folder (root/train/<class>/* and root/test/<class>/*, or root/<class>/*); else a hub name, "owner/name".
            Without a test split a validation split is the test set.
        device: where the tensors go.
        fold: (k, n): the k-th of n stratified folds, k = 0..n-1, is the test set; default (0, 5). Only for data
            without a test split. The n test folds together hold every sample once, and do not depend on ``seed``.
        val: fraction of train to hold out for validation, in [0, 1), stratified, chosen by ``seed``; 0 for none.
        seed: of the validation split.
        limit: at most so many test samples: classes in equal numbers as far as possible, always the same samples, a
            smaller limit a subset of a larger one. None for all.
        limit_train: likewise for train, before val is split off.
        whole: nothing is to be trained: train and val are empty, and without a test split all samples are test.
        eval_split: "test", or "val" to evaluate on the validation images: they become ``test`` of the result, and the
            test images stay untouched. Use it for model selection.
        image_column: of a table, the column with the images; "" to find it by type and name.
        label_column: of a table, the column with the labels; "" to find it by type and name.
        convert: "rgb" or "grey" to convert all images; "" refuses images of several modes.
        resize: N to resize all images to N x N, whatever their proportions; 0 refuses images of several sizes.

    Returns:
        Tensors on ``device``, each part in source order.

    Raises:
        UserError: the data cannot be found or read, its content is invalid, or an argument is.

    >>> digits = load("digits", fold=(2, 5))
    >>> digits.shape, len(digits.train), len(digits.val), len(digits.test)
    ((1, 8, 8), 1294, 144, 359)
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    user_input.path("the data set", name)
    word = (convert or "").lower()
    reading = Reading(
        image_column or "", label_column or "", {"gray": "grey", "l": "grey"}.get(word, word), resize or 0
    )
    source = partial(_find, name, reading)
    split = split_source(
        name, source, device=device, fold=fold, val=val, seed=seed, limit=limit, limit_train=limit_train, whole=whole,
        eval_split=eval_split,
    )  # fmt: skip
    return _warn(split)


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str = "arrays",
    **cut: Any,
) -> Split:
    """Check a user's own arrays or tensors and split them as ``load`` does.

    Args:
        x: (N, C, H, W), uint8, or float in [0, 1].
        y: (N,) integers 0..K-1.
        test: (x, y) of the test set; without it one fold is the test set.
        classes: K names; default "0".."K-1". Only where they are given, a network must have K logits.
        name: the data set's name, for errors and results.
        cut: device, fold, val, seed, limit, limit_train, whole, eval_split, as for ``load``.

    Returns:
        Tensors, each part in source order.

    Raises:
        UserError: the arrays are invalid, or an argument is.

    >>> split = from_arrays(torch.rand(20, 3, 8, 8), torch.arange(20) % 2, classes=["cat", "dog"])
    >>> len(split.train), len(split.val), len(split.test), split.classes
    (14, 2, 4, ('cat', 'dog'))
    """
    source = partial(check_source, (x, y), test, classes, name)
    return _warn(split_source(name, source, named=classes is not None, **cut))
