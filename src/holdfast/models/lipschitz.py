"""Networks that are 1-Lipschitz in the l2 norm by construction: |f(x) - f(x')| <= |x - x'|. Made of orthogonal layers.

Classifier divides by std before them, which multiplies that constant by 1 / min(std).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..errors import UserError
from .common import Shape, need_side
from .orthogonal import MaxMin, OrthogonalConv, OrthogonalLinear


class LipMlp(nn.Module):
    """1-Lipschitz: two hidden layers of 256 units, orthogonal, MaxMin. For certificates, with the head 'orthogonal'.

    Args: width, even: units a layer. 269,322 parameters on 28x28 with a linear head of 10 classes.
    """

    def __init__(self, shape: Shape, width: int = 256) -> None:
        super().__init__()
        _need_even(width, "lipmlp")
        self.features = width
        self.layers = nn.Sequential(
            nn.Flatten(),
            OrthogonalLinear(math.prod(shape), width),
            MaxMin(),
            OrthogonalLinear(width, width),
            MaxMin(),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class LipConv(nn.Module):
    """1-Lipschitz: orthogonal patches 4x4 and 2x2, each followed by a 1x1, then 256 units; MaxMin. Images from 4x4 on.

    Args: width, even: channels of the first two layers; the next two have twice as many.
    """

    features = 256

    def __init__(self, shape: Shape, width: int = 64) -> None:
        super().__init__()
        need_side(4, shape, "lipconv", "lipmlp")
        _need_even(width, "lipconv")
        channels, height, width_of_image = shape
        patches = math.ceil(math.ceil(height / 4) / 2) * math.ceil(math.ceil(width_of_image / 4) / 2)
        self.layers = nn.Sequential(
            OrthogonalConv(channels, width, 4),
            MaxMin(),
            OrthogonalConv(width, width, 1),
            MaxMin(),
            OrthogonalConv(width, 2 * width, 2),
            MaxMin(),
            OrthogonalConv(2 * width, 2 * width, 1),
            MaxMin(),
            nn.Flatten(),
            OrthogonalLinear(2 * width * patches, 256),
            MaxMin(),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


def _need_even(width: int, name: str) -> None:
    if width < 2 or width % 2:
        raise UserError(f"width of model '{name}' must be even and >= 2, since MaxMin sorts pairs, got {width}.")
