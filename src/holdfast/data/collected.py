"""What a user holds as Data: a name, a split, (x, y), a DataLoader, a torch or a Hugging Face data set."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .. import mapped
from ..errors import UserError, type_of
from . import load
from .arrays import ROUNDING, check_arrays, check_labels, given_names
from .columns import IMAGE_NAMES, LABEL_NAMES
from .dataset import Data, Split

SHUFFLES = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
IMAGE_KEYS = (*IMAGE_NAMES, "pixel_values")  # the last as Hugging Face processors name it


def collect(data: Any, name: str, which: str) -> Any:
    """Read all samples of what is not Data yet.

    Args:
        data: what a caller gave.
        name: the argument's name, for errors.
        which: "train", "val" or "test": what is taken of a Split and of a data set by name.

    Returns:
        Data on the CPU; ``data`` itself where it is Data, or of a kind that is not known here.

    Raises:
        UserError: a source that shuffles or augments, or content that is no image with a label.
    """
    if isinstance(data, Split):
        return getattr(data, which)
    if isinstance(data, str | os.PathLike):
        return getattr(load(data), which)
    if isinstance(data, tuple | list) and len(data) == 2:
        return check_arrays(*data, what=name)
    if isinstance(data, DataLoader):
        _check_fixed(data.dataset, data.sampler, name)
        return _stack(_batches(data, name), _class_names(data.dataset), name, _expected(data))
    if hasattr(data, "column_names") and hasattr(data, "features") and isinstance(data, Iterable):  # Hugging Face
        _check_fixed(data, None, name)
        return _stack((_single(item, name) for item in data), _class_names(data), name, _length(data))
    if isinstance(data, Dataset):
        _check_fixed(data, None, name)
        items: Iterable[Any] = data if isinstance(data, IterableDataset) else _items(data)
        return _stack((_single(item, name) for item in items), _class_names(data), name, _length(data))
    return data


def _check_fixed(dataset: Any, sampler: Any, name: str) -> None:
    """Refuse a source that gives other samples each time it is read: adversarial examples are stored by number."""
    if isinstance(sampler, SHUFFLES):
        raise UserError(f"{name} is a DataLoader that shuffles, so its samples have no number: pass shuffle=False.")
    numbered = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)  # which has one that raises
    if not numbered or not _length(dataset):
        return
    first, again = _guarded(lambda: [_single(dataset[0], name)[0] for _ in range(2)], name)
    if first.shape != again.shape or not torch.equal(first, again):
        raise UserError(
            f"{name} gives another first image each time it is read (random augmentation?): pass the data set without."
        )


def _items(dataset: Any) -> Iterator[Any]:
    """The samples by number: a plain loop would read on past the end of a data set that never raises IndexError."""
    return (dataset[i] for i in range(len(dataset)))


def _length(dataset: Any) -> int | None:
    """How many samples a source says that it has; None where it does not say."""
    try:
        return len(dataset)
    except Exception:  # a user's code may raise anything, and a stream need not know
        return None


def _expected(loader: DataLoader[Any]) -> int | None:
    """How many samples a loader is to give; None where nobody knows."""
    if isinstance(loader.dataset, IterableDataset):
        count = _length(loader.dataset)
    else:
        count = _length(loader.sampler) if loader.batch_size else None
    return count - count % loader.batch_size if count and loader.batch_size and loader.drop_last else count


def _batches(loader: Iterable[Any], name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader as (x, y)."""
    for batch in loader:
        x, y = _pair(batch, name)
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        if x.ndim != 4 or y.ndim != 1 or len(x) != len(y):
            raise UserError(
                f"{name} gives batches of the shapes {tuple(x.shape)} and {tuple(y.shape)}: expected (N, C, H, W) "
                "images and (N,) labels."
            )
        yield x, y


def _single(item: Any, name: str) -> tuple[Tensor, Tensor]:
    """One sample as a batch of one: images of Pillow as uint8, channels first."""
    x, y = _pair(item, name)
    if isinstance(x, Image.Image):
        array = np.array(x)
        if array.dtype != np.uint8 or x.mode == "P":
            raise UserError(f"{name} has an image of the mode {x.mode}: expected L or RGB. Convert it first.")
        x = torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)
    x = torch.as_tensor(np.array(x) if not isinstance(x, Tensor) else x)
    x = x[None] if x.ndim == 2 else x
    return x[None], torch.as_tensor(y).reshape(1)


def _pair(item: Any, name: str) -> tuple[Any, Any]:
    """The image and the label of a sample or of a batch: the first two entries, or those that are named so."""
    if isinstance(item, Mapping):
        x, y = (next((key for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_NAMES))
        if x is None or y is None:
            listed = ", ".join(map(str, item))
            raise UserError(f"{name} gives {listed}: expected an image, such as 'image', and a 'label'. Rename them.")
        return item[x], item[y]
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise UserError(f"{name} gives {type_of(item)}: expected (image, label), or a dict with 'image' and 'label'.")


def _stack(parts: Iterator[tuple[Tensor, Tensor]], classes: Any, name: str, expected: int | None) -> Data:
    """All parts in one; the images in a file where they do not fit in memory."""
    labels: list[Tensor] = []
    shapes: list[tuple[int, ...]] = []

    def images() -> Iterator[Tensor]:
        for x, y in _guarded_parts(parts, name):
            labels.append(y)
            shapes.append(tuple(x.shape[1:]))
            if shapes[-1] != shapes[0]:
                one, other = sorted({shapes[0], shapes[-1]})
                raise UserError(f"{name} has images of different sizes ({one}, {other}): resize them to one.")
            yield _clipped(x.detach().cpu())

    first = next(parts_of := images(), None)
    if first is None:
        raise UserError(f"{name} is empty: expected at least one sample.")
    x = mapped.gathered(chain([first], parts_of))
    if expected is not None and len(x) != expected:
        ends = f"ends after {len(x):,} samples" if len(x) < expected else f"gives {len(x):,} samples"
        raise UserError(
            f"{name} {ends}, though its length is {expected:,}: is a file cut short or read twice, or does each worker "
            "read its share? Mend the source, or its length."
        )
    if x.is_floating_point():
        low, high = mapped.extremes(x)
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise UserError(
                f"images of {name} run from {low:g} to {high:g}: expected [0, 1]. If its transform normalises, leave "
                "that out and put it into the model: holdfast.importers.wrap(model, mean=..., std=...)."
            )
    y = torch.cat(labels)
    if mapped.is_mapped(x):
        few = check_arrays(x[:1], y[:1], what=name)  # of their type and range; all values have been looked at
        if x.is_floating_point() and not math.isfinite(low + high):
            raise UserError(f"x of {name} holds NaN or infinity: float must lie in [0, 1]. Clean the source first.")
        data = Data(x, check_labels(y, len(x), None, name), torch.arange(len(x)), few.classes)
    else:
        data = check_arrays(x, y, what=name)
    names = given_names(classes, name) if classes else None
    if names is None:
        return data
    check_labels(data.y, len(data), names, name)
    return Data(data.x, data.y, data.index, tuple(names))


def _clipped(x: Tensor) -> Tensor:
    """Images as they are kept: floats as float32, and what rounding took out of [0, 1] put back."""
    if not x.is_floating_point():
        return x
    low, high = mapped.extremes(x) if x.numel() else (0.0, 1.0)
    return x.to(torch.float32).clamp(0, 1) if low >= -ROUNDING and high <= 1 + ROUNDING else x.to(torch.float32)


def _guarded_parts(parts: Iterator[tuple[Tensor, Tensor]], name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts; an error of the user's own data set in one sentence."""
    while part := _guarded(lambda: list(islice(parts, 1)), name):
        yield part[0]


def _guarded(read: Callable[[], list[Any]], name: str) -> list[Any]:
    """What ``read`` returns; an error of the user's own data set in one sentence."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        why = f"{type(error).__name__}: {error}".rstrip(": .")
        short = " Has it fewer samples than its length says?" if isinstance(error, IndexError) else ""
        raise UserError(f"{name} cannot be read: {why}.{short}") from error


def _class_names(dataset: Any) -> Any:
    """The class names that a data set gives, as torchvision's and Hugging Face's do; None for none."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        key = next((key for key in LABEL_NAMES if key in features), None)
        return getattr(features[key], "names", None) if key else None
    classes = getattr(dataset, "classes", None)
    return classes if isinstance(classes, list) and all(isinstance(one, str) for one in classes) else None
