"""GoogLeNet for images of about 32x32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import Shape, need_side


class InceptionBlock(nn.Module):
    """Four ways side by side, their channels stacked: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3 (for 5x5); 3x3 max pooling, 1x1.

    Each convolution is followed by batch norm and ReLU. ``narrow3``, ``narrow5``: the channels of the 1x1 before.
    """

    def __init__(self, width_in: int, one: int, narrow3: int, three: int, narrow5: int, five: int, pooled: int) -> None:
        super().__init__()
        self.ways = nn.ModuleList(
            [
                _conv(width_in, one, 1),
                nn.Sequential(_conv(width_in, narrow3, 1), _conv(narrow3, three, 3)),
                nn.Sequential(_conv(width_in, narrow5, 1), _conv(narrow5, five, 3), _conv(five, five, 3)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(width_in, pooled, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([way(x) for way in self.ways], 1)


class Inception(nn.Module):
    """GoogLeNet's nine inception blocks for 32x32, with batch norm, as common on CIFAR.

    6,166,250 parameters on three channels with a linear head of 10 classes. The stem is one 3x3 convolution, and 5x5 is
    two 3x3. Source: Szegedy et al. 2015; Ioffe & Szegedy 2015.
    """

    features = 1024

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        need_side(16, shape, "inception", "smallconv")
        self.layers = nn.Sequential(
            _conv(shape[0], 192, 3),
            InceptionBlock(192, 64, 96, 128, 16, 32, 32),
            InceptionBlock(256, 128, 128, 192, 32, 96, 64),
            nn.MaxPool2d(3, stride=2, padding=1),
            InceptionBlock(480, 192, 96, 208, 16, 48, 64),
            InceptionBlock(512, 160, 112, 224, 24, 64, 64),
            InceptionBlock(512, 128, 128, 256, 24, 64, 64),
            InceptionBlock(512, 112, 144, 288, 32, 64, 64),
            InceptionBlock(528, 256, 160, 320, 32, 128, 128),
            nn.MaxPool2d(3, stride=2, padding=1),
            InceptionBlock(832, 256, 160, 320, 32, 128, 128),
            InceptionBlock(832, 384, 192, 384, 48, 128, 128),
        )

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h.mean((2, 3))


def _conv(width_in: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution (with a bias, as in the common form, although batch norm takes it away), batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(width_in, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU())
