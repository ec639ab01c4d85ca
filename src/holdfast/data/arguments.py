"""The samples that a caller hands to evaluate, audit and fit: Data, checked once at the door."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, type_of
from ..outputs import tensor_fault
from ..user_input import of_type
from .arrays import assumptions
from .collected import collect
from .dataset import Data, DataWarning
from .labels import count, some

AnyData = Any  # what ``as_data`` takes
CHANCE = 0.01  # of the classes that a network has and the labels do not, all missing from a random selection


def as_data(data: Any, name: str = "data", which: str = "test") -> Data:
    """The samples that an argument is: plain tensors, labels and numbers as int64.

    Args:
        data: Data, a Split, what ``load`` takes, (x, y), or a DataLoader, a torch or a Hugging Face data set that
            neither shuffles nor augments; the last three are read into memory.
        name: the argument's name, for errors.
        which: "train", "val" or "test": the part that is meant of a Split, and of what ``load`` takes.

    Returns:
        The Data; itself where nothing had to be converted.

    Raises:
        UserError: none of these (the message says how to make Data), tensors of different lengths, images that are
            neither uint8 nor float, labels that are not integers or beyond the classes, or tensors that are not dense.

    >>> len(as_data("digits")), len(as_data((torch.zeros(3, 1, 2, 2), [0, 1, 1])))
    (360, 3)
    >>> as_data(Data(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1], dtype=torch.int32), torch.arange(2))).y.dtype
    torch.int64
    """
    data = collect(data, name, which)
    if not isinstance(data, Data):
        raise UserError(
            f"{name} must be Data, (x, y), a DataLoader, a data set or its name, got {type_of(data)}: "
            "holdfast.data.from_arrays(x, y, whole=True).test makes Data from images and labels."
        )
    parts = {"x": data.x, "y": data.y, "index": data.index}
    for key, part in parts.items():
        if not isinstance(part, Tensor):
            raise UserError(f"{key} of {name} must be a tensor, got {type_of(part)}: torch.as_tensor makes one.")
        if tensor_fault(part):
            raise UserError(f"{key} of {name} is {tensor_fault(part)}.")
        if key != "x" and (part.is_floating_point() or part.dtype == torch.bool):
            raise UserError(
                f"{key} of {name} is {part.dtype}: expected integers. Convert it with .long() if it holds any."
            )
    lengths = {len(part) if part.ndim else -1 for part in parts.values()}
    if len(lengths) > 1 or lengths == {-1} or data.y.ndim != 1 or data.index.ndim != 1:
        shapes = ", ".join(f"{key} {tuple(part.shape)}" for key, part in parts.items())
        raise UserError(f"{name} must have one label and one number per image, got the shapes {shapes}.")
    if data.x.dtype != torch.uint8 and not data.x.is_floating_point():
        raise UserError(
            f"x of {name} is {data.x.dtype}: expected uint8 in 0..255 or float in [0, 1]. Convert it first."
        )
    of_type(f"classes of {name}", data.classes, tuple[str, ...])
    if data.classes and len(data) and int(data.y.max()) >= len(data.classes):
        raise UserError(
            f"a label of {name} is {int(data.y.max())}, but it names {len(data.classes)} classes: labels are their "
            "places, from 0."
        )
    x, y, index = _plain(data.x), _plain(data.y.long()), _plain(data.index.long())
    return data if x is data.x and y is data.y and index is data.index else replace(data, x=x, y=y, index=index)


def _plain(part: Tensor) -> Tensor:
    """A tensor without a graph, a subclass or inference mode; itself if it has none."""
    if type(part) is not Tensor or part.requires_grad:
        part = part.detach().as_subclass(Tensor)
    return part.clone() if part.is_inference() else part


def note_assumptions(data: Data, name: str = "data", *, unit_box: bool = True) -> None:
    """Warn of what is assumed about images that no reader of this package has looked at, as ``load`` does for its own.

    Args:
        data: as ``as_data`` returns it.
        name: the argument's name.
        unit_box: whether float images are meant in [0, 1].
    """
    if data.source or not data.x.numel() or not (unit_box or data.x.dtype == torch.uint8):
        return
    for note in assumptions(data.x, name):
        warnings.warn(note, DataWarning, stacklevel=3)


def classes_differ(model: Any, n_logits: int, classes: Sequence[str]) -> bool:
    """Whether a network has another number of logits than the data has classes, and no mapping explains it.

    A network whose logits are mapped to the classes by name, ``wrap(model, class_order=...)``, may have more.

    >>> classes_differ(None, 12, ["cat", "dog"]), classes_differ(None, 2, ["cat", "dog"])
    (True, False)
    """
    mapped = getattr(model, "class_order", None) is not None
    return n_logits != len(classes) and not (mapped and n_logits > len(classes))


def check_logits(model: Any, z: Tensor, data: Data, ruled_out: Tensor | None = None) -> None:
    """Compare the logits of clean images with the labels, and with the classes of the data where they are named.

    Where they are not, a network with more logits than there are labels is legal, since a selection need not hold every
    class. It is warned of where several labels occur and all are small: by chance all classes above would be missing
    from less than 1% of selections, or the labels are 0, 1, ... without a gap.

    Args:
        model: the network.
        z: (M, K) logits of all samples, or of the first ones.
        data: the samples.
        ruled_out: (K,) bool, classes that the network itself rules out by logits of -inf; None for none.

    Raises:
        UserError: fewer than two logits, a label without one, or another number of logits than of named classes.
    """
    k, low, high = z.shape[1], int(data.y.min()), int(data.y.max())
    if k < 2 or high >= k or low < 0:
        raise UserError(
            f"the model returns {k} logits, but the labels range from {low} to {high}: "
            "they must lie in 0 .. K-1, with K >= 2."
        )
    if data.classes and classes_differ(model, k, data.classes):
        raise UserError(
            f"the network returns {k} logits, but {data.source or 'the data'} has {len(data.classes)} classes "
            f"({some(data.classes)}). If they are logits of these classes and others, give their order with "
            "wrap(model, class_order=...); if not, choose the logits with wrap(model, output=...)."
        )
    above = k - high - 1 - (0 if ruled_out is None else int(ruled_out[high + 1 :].sum()))
    if data.classes or above <= 0:
        return
    occurring = len(data.y.unique())
    unlikely = occurring == high + 1 or ((high + 1) / k) ** len(data) < CHANCE
    if occurring > 1 and unlikely:
        predicted = int((z.argmax(1) > high).sum())
        warnings.warn(
            f"the network returns {k} logits, but no label is above {high}: {predicted} of {len(z)} clean images are "
            f"predicted as one of the {count(above, 'class', 'classes')} above, and an attack that ends there counts. "
            "Are these the logits, and the labels numbered as the network's? wrap(model, output=..., class_order=...) "
            f"chooses; Data(..., classes=...) with {k} names says that they are.",
            DataWarning,
            stacklevel=3,
        )
