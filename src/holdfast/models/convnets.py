"""Small networks without batch statistics: the linear model, an MLP, and the convnets of the MNIST literature."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..errors import UserError, at_least
from .common import Shape, need_side


class Linear(nn.Module):
    """The pixels themselves: with a linear head, the model whose worst case is known in closed form."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.features = math.prod(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Mlp(nn.Module):
    """Two hidden layers of 256 ReLU units.

    Args: width >= 1: units a layer; about 32 are as many as exact answers (``exact``) can follow.
    """

    def __init__(self, shape: Shape, width: int = 256) -> None:
        super().__init__()
        at_least("width of model 'mlp'", width, 1)
        self.features = width
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
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
        need_side(4, shape, "smallconv")
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

    Args: width >= 1 multiplies channels and units. 166,406 parameters on 28x28 with a linear head of 10 classes.
    """

    name = "convnet"

    def __init__(self, shape: Shape, width: int = 1) -> None:
        super().__init__()
        channels, height, across = shape
        need_side(8, shape, self.name)
        at_least(f"width of model '{self.name}'", width, 1)
        self.features = 100 * width
        flat = 32 * width * (height // 4) * (across // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16 * width, 32 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, 100 * width),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class StepNet(ConvNet):
    """ConvNet behind a fixed step on every pixel: for near-binary images (MNIST) under linf. Pixels are not normalised.

    What robustness the step adds is a property of such images, not of a loss.

    Args: slope >= 1 and leak in (0, 1], see ``Step``; width as ConvNet's, and as many parameters: the step has none.
    Source: Schott et al. 2019, whose binarised CNN has hard steps; those blind gradient attacks.
    """

    name, normalised = "stepnet", False

    def __init__(self, shape: Shape, slope: float = 10.0, leak: float = 0.01, width: int = 1) -> None:
        super().__init__(shape, width)
        if not 1 <= slope < math.inf or not 0 < leak <= 1:
            raise UserError(f"model 'stepnet' needs slope >= 1 and leak in (0, 1], got {slope} and {leak}.")
        self.layers = nn.Sequential(Step(slope, leak), *self.layers)


class Step(nn.Module):
    """(1 - leak) clamp(slope (x - 1/2) + 1/2, 0, 1) + leak x: pixels near 0 or 1 move leak times as far as in x.

    The leak is there for attacks: where a step is flat, gradients are zero and attacks that follow them find nothing.
    """

    def __init__(self, slope: float, leak: float) -> None:
        super().__init__()
        self.slope, self.leak = slope, leak

    @property
    def steepest(self) -> float:
        """The Lipschitz constant."""
        return (1 - self.leak) * self.slope + self.leak

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.leak) * (self.slope * (x - 0.5) + 0.5).clamp(0, 1) + self.leak * x


class Madry(nn.Module):
    """conv32 5x5, pool, conv64 5x5, pool, fc 1024: the MNIST network of Madry et al. 2018.

    3,274,634 parameters on 28x28 with a linear head of 10 classes.
    """

    features = 1024

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels, height, width = shape
        need_side(4, shape, "madry")
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 1024),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class SmallCnn(nn.Module):
    """conv32 3x3 twice, pool, conv64 3x3 twice, pool, fc 200 twice: SmallCNN, the MNIST network of TRADES.

    312,202 parameters on 28x28 with a linear head of 10 classes. Convolutions without padding; dropout 1/2 between the
    dense layers. Source: Zhang et al. 2019, whose last layer starts at zero; a head here starts as heads do.
    """

    features = 200

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels, height, width = shape
        need_side(16, shape, "smallcnn", "smallconv")
        left = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * math.prod(left), 200),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(200, 200),
            nn.ReLU(),
        )
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features
