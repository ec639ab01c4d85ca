"""Fractal networks: deep without residuals."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import UserError, at_least
from .common import Shape, need_side


class FractalBlock(nn.Module):
    """f_1 = conv, f_{c+1}(x) = join(f_c(f_c(x)), conv(x)), conv = relu(bn(conv3x3)), join = the mean of its inputs.

    Unrolled: column c of 0..columns - 1 has 2^c convolutions, and columns that end in the same row are joined there.
    """

    def __init__(self, width_in: int, width: int, columns: int) -> None:
        super().__init__()
        self.columns = nn.ModuleList(
            nn.ModuleList(_conv(width if row else width_in, width) for row in range(2**column))
            for column in range(columns)
        )

    def joined(self, row: int) -> list[int]:
        """The columns that end in a row, from 1 to 2^(columns - 1)."""
        last = len(self.columns) - 1
        return [column for column in range(last + 1) if row % 2 ** (last - column) == 0]

    def forward(self, x: Tensor, column: int | None = None, drop: float = 0.0) -> Tensor:
        """column: the one to keep (global drop-path). drop: the chance of each input of a join to be left out (local).

        What is left out is multiplied by zero, not skipped: every weight then has a gradient at every step, which
        training on several devices relies on.
        """
        feeds = [x] * len(self.columns)
        last = len(self.columns) - 1
        for row in range(1, 2**last + 1):
            ending = self.joined(row)
            outputs = [self.columns[c][row // 2 ** (last - c) - 1](feeds[c]) for c in ending]  # type: ignore[index]
            weights = _weights(ending, column, drop)
            mean = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
            for c in ending:
                feeds[c] = mean
        return feeds[0]


def _weights(ending: list[int], column: int | None, drop: float) -> list[float]:
    """How much of each input goes into a join; they sum to 1. Draws from torch's generator where drop > 0."""
    kept = [True] * len(ending)
    if column is not None and column in ending:
        kept = [c == column for c in ending]
    elif column is None and drop > 0 and len(ending) > 1:
        kept = (torch.rand(len(ending)) >= drop).tolist()
        if not any(kept):
            kept[int(torch.randint(len(ending), ()))] = True
    return [flag / sum(kept) for flag in kept]


class FractalNet(nn.Module):
    """FractalNet: blocks of columns 1, 2, 4, ... deep, joined by means; drop-path in training. 5 x 3 is FractalNet-20.

    33,724,618 parameters on three channels with a linear head of 10 classes. The paper's table says 38.6M, which does
    not follow from five blocks of three columns, 64, 128, 256, 512, 512 wide. Without the paper's dropout.

    Args:
        blocks >= 1, each followed by 2x2 max pooling; columns >= 1: depth is blocks 2^(columns - 1); width of the first
        block, doubled from block to block up to 8 times.
        drop in [0, 1): local drop-path. Each step in train mode draws, from torch's generator, whether to leave out
        each input of each join with this chance (never all), or to keep one column of the whole network (half of the
        steps). 0: neither. Eval mode joins all columns.
    Source: Larsson et al. 2017.
    """

    def __init__(self, shape: Shape, blocks: int = 5, columns: int = 3, width: int = 64, drop: float = 0.15) -> None:
        super().__init__()
        need_side(16, shape, "fractalnet", "smallconv")
        for name, value in (("blocks", blocks), ("columns", columns), ("width", width)):
            at_least(f"{name} of model 'fractalnet'", value, 1)
        if not 0 <= drop < 1:
            raise UserError(f"drop of model 'fractalnet' must be in [0, 1), got {drop}.")
        widths = [shape[0]] + [width * 2 ** min(place, 3) for place in range(blocks)]
        self.blocks = nn.ModuleList(FractalBlock(a, b, columns) for a, b in pairwise(widths))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)  # 28 -> 14, 7, 4, 2, 1: five times, as 32
        self.features, self.columns, self.drop = widths[-1], columns, drop

    def forward(self, x: Tensor) -> Tensor:
        column, drop = None, self.drop if self.training else 0.0
        if drop > 0 and torch.rand(()) < 0.5:
            column = int(torch.randint(self.columns, ()))
        for block in self.blocks:
            x = self.pool(block(x, column, drop))
        return x.mean((2, 3))


def _conv(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
