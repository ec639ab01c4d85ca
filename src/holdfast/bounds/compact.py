"""The network as branch and bound asks it many times over one image: narrower, and in float32 where nothing is proved.

A ReLU whose input is never above zero gives zero. A dense layer before it needs no row for it, and one behind it no
column: in a trained network that is most of them. What is left gives the same outputs over the image's region.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from .linear import Forward, Region
from .steps import CACHED, AffineStep, Box, Lines, ReluStep, Step

DENSE = ("addmm", "mm")


class DenseStep(AffineStep):
    """W h + b by its matrix, (out, in), between rows (1, out) and (1, in)."""

    def __init__(self, step: AffineStep, weight: Tensor, offset: Tensor) -> None:
        vars(self).update({name: part for name, part in vars(step).items() if name not in CACHED})
        self.weight, self.offset, self.shape = weight, offset, tuple(offset.shape)

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows @ self.weight,)

    def cast(self, constants: Sequence[Tensor], dtype: torch.dtype) -> DenseStep:
        return DenseStep(self, self.weight.to(dtype), self.offset.to(dtype))


def compact(steps: Sequence[Step], found: Forward) -> tuple[list[Step], Forward]:
    """The steps and boxes of one image without the ReLUs between dense layers that are off all over its region.

    Args:
        steps: of the network, in float64.
        found: boxes and errors of the image, (1, ...).

    Returns:
        (steps, found), with the same numbers.
    """
    readers: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for source in step.reads:
            readers.setdefault(source, []).append(number)
    dense = {number for number, step in enumerate(steps) if _is_dense(step)}
    kept: dict[int, Tensor] = {}  # which values of an operation's output are left
    for number, step in enumerate(steps):
        if isinstance(step, ReluStep) and number in readers:
            [source] = step.reads
            if source in dense and readers[source] == [number] and set(readers[number]) <= dense:
                kept[source] = kept[number] = (~(found.boxes[source].hi[0, 0] <= 0)).nonzero()[:, 0]
    out, boxes, errors = list(steps), list(found.boxes), list(found.errors)
    for number, step in enumerate(steps):
        if number in dense and isinstance(step, AffineStep):
            weight, offset, [source] = step.matrix, step.offset, step.reads
            weight = weight[:, kept[source]] if source in kept else weight
            weight, offset = (weight[kept[number]], offset[:, kept[number]]) if number in kept else (weight, offset)
            out[number] = DenseStep(step, weight, offset)
        elif number in kept:
            out[number] = copy(step)
            out[number].shape = (1, len(kept[number]))
        if number in kept:
            boxes[number] = Box(*(side[..., kept[number]] for side in boxes[number]))
            error = errors[number]
            errors[number] = None if error is None else error[..., kept[number]]
    return out, Forward(boxes, errors, found.unbounded)


def _is_dense(step: Step) -> bool:
    """Whether it is a product of one row, (1, in), with a constant matrix."""
    if not isinstance(step, AffineStep) or step.operation.name not in DENSE or len(step.reads) != 1:
        return False
    return len(step.shape) == 2 and step.shape[0] == 1 and step.zeros[0].ndim == 2 and step.zeros[0].shape[0] == 1


def in_float32(
    steps: Sequence[Step], found: Forward, region: Region, lines: dict[int, Lines]
) -> tuple[list[Step], Forward, Region, dict[int, Lines]]:
    """All of it in float32 and without rounding errors: to look for slopes and multipliers, and to prove nothing."""
    constants = [c.float() if c.is_floating_point() else c for c in max((step.constants for step in steps), key=len)]
    out = [step.cast(constants, torch.float32) if isinstance(step, AffineStep) else step for step in steps]
    boxes = [Box(box.lo.float(), box.hi.float()) for box in found.boxes]
    inside = replace(region, box=Box(region.box.lo.float(), region.box.hi.float()), center=region.center.float())
    light = {
        number: Lines(
            tuple(slope.float() for slope in each.lower), each.lower_at.float(),
            tuple(slope.float() for slope in each.upper), each.upper_at.float(),
        )
        for number, each in lines.items()
    }  # fmt: skip
    return out, Forward(boxes, [None] * len(out), found.unbounded), inside, light
