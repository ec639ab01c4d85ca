"""Densely connected networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError, at_least
from .common import Shape, he_normal, need_side, per_stage


class DenseLayer(nn.Module):
    """x -> [x, conv3x3(relu(bn(conv1x1(relu(bn(x))))))]: ``growth`` more channels, through 4 growth (the B of BC)."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return torch.cat([x, new], 1)


class DenseNet(nn.Module):
    """DenseNet-BC: three dense blocks, depth 6n + 4, ``growth`` channels a layer; ``compression`` in between.

    769,162 parameters on three channels with a linear head of 10 classes. Without dropout.
    Args: compression in (0, 1]: the share of channels that a transition keeps (the C of BC).
    Source: Huang et al. 2017.
    """

    def __init__(self, shape: Shape, depth: int = 100, growth: int = 12, compression: float = 0.5) -> None:
        super().__init__()
        need_side(16, shape, "densenet", "smallconv")
        n = per_stage(depth, 4, 6, "densenet")
        at_least("growth of model 'densenet'", growth, 1)
        if not 0 < compression <= 1:
            raise UserError(f"compression of model 'densenet' must be in (0, 1], got {compression}.")
        width = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1, bias=False)]
        for place in range(3):
            if place:
                kept = max(1, int(width * compression))
                layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, kept, 1, bias=False), nn.AvgPool2d(2)]
                width = kept
            for _ in range(n):
                layers.append(DenseLayer(width, growth))
                width += growth
        self.features = width
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h.mean((2, 3))
