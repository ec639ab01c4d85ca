"""Small networks without batch statistics: the linear model, an MLP, and the convnets of the MNIST literature."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..errors import UserError

Shape = tuple[int, int, int]


class Linear(nn.Module):
    """The pixels themselves: with a linear head, the model whose worst case is known in closed form."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.features = math.prod(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Mlp(nn.Module):
    """Two hidden layers of 256 ReLU units."""

    features = 256

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(shape), 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class SmallConvNet(nn.Module):
    """conv16 3x3, conv32 3x3/2, fc 64, for images of about 8x8 (the digits)."""

    features = 64

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels, height, width = shape
        _at_least(4, shape, "smallconv")
        flat = 32 * math.ceil(height / 2) * math.ceil(width / 2)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, 64),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class ConvNet(nn.Module):
    """conv16 4x4/2, conv32 4x4/2, fc 100: the small network of the certified-training literature, for about 28x28.

    166,406 parameters on 28x28 with a linear head of 10 classes.
    """

    features = 100

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels, height, width = shape
        _at_least(8, shape, "convnet")
        flat = 32 * (height // 4) * (width // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, 100),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


def _at_least(side: int, shape: Shape, name: str) -> None:
    if min(shape[1:]) < side:
        raise UserError(f"model '{name}' needs images of at least {side}x{side}, got {shape[1]}x{shape[2]}. Try 'mlp'.")
