"""The samples that a caller hands to evaluate, audit and fit: Data, checked once at the door."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, type_of
from .dataset import Data, Split


def as_data(data: Any, name: str = "data") -> Data:
    """The samples that an argument is, with labels and numbers as int64.

    Args:
        data: what a caller gave.
        name: the argument's name, for errors.

    Returns:
        The Data; itself where nothing had to be converted.

    Raises:
        UserError: no Data (the message says how to make one), tensors of different lengths, images that are neither
            uint8 nor float, or labels that are not integers.

    >>> as_data(Data(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1], dtype=torch.int32), torch.arange(2))).y.dtype
    torch.int64
    """
    if isinstance(data, Split):
        raise UserError(f"{name} must be the samples of one part of '{data.name}': pass its .test, .val or .train.")
    if not isinstance(data, Data):
        raise UserError(
            f"{name} must be Data, got {type_of(data)}: holdfast.data.from_arrays(x, y, whole=True).test makes it from "
            "images and labels."
        )
    parts = {"x": data.x, "y": data.y, "index": data.index}
    for key, part in parts.items():
        if not isinstance(part, Tensor):
            raise UserError(f"{key} of {name} must be a tensor, got {type_of(part)}: torch.as_tensor makes one.")
        if part.ndim == 0 or len(part) != len(parts["y"]) or (key != "x" and part.ndim != 1):
            shapes = ", ".join(f"{key} {tuple(part.shape)}" for key, part in parts.items())
            raise UserError(f"{name} must have one label and one number per image, got the shapes {shapes}.")
        if key != "x" and (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool):
            raise UserError(
                f"{key} of {name} is {part.dtype}: expected integers. Convert it with .long() if it holds any."
            )
    if data.x.dtype != torch.uint8 and not data.x.is_floating_point():
        raise UserError(
            f"x of {name} is {data.x.dtype}: expected uint8 in 0..255 or float in [0, 1]. Convert it first."
        )
    if data.y.dtype == data.index.dtype == torch.int64:
        return data
    return replace(data, y=data.y.long(), index=data.index.long())
