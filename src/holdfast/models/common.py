"""What the families of networks share: the shape of images, what they refuse, He's first weights."""

from __future__ import annotations

import math

from torch import nn

from ..errors import UserError

Shape = tuple[int, int, int]  # (C, H, W)


def need_side(side: int, shape: Shape, name: str, instead: str = "mlp") -> None:
    """Raise UserError unless images are at least side x side.

    >>> need_side(4, (1, 3, 8), "smallconv")
    Traceback (most recent call last):
    holdfast.errors.UserError: model 'smallconv' needs images of at least 4x4, got 3x8. Try 'mlp'.
    """
    if min(shape[1:]) < side:
        raise UserError(
            f"model '{name}' needs images of at least {side}x{side}, got {shape[1]}x{shape[2]}. Try '{instead}'."
        )


def per_stage(depth: int, first: int, step: int, name: str) -> int:
    """n >= 1 of depth = step n + first. Raises UserError for a depth that is no such number.

    >>> per_stage(28, 4, 6, "wideresnet")
    4
    """
    n, rest = divmod(depth - first, step)
    if rest or n < 1:
        few = ", ".join(str(step * k + first) for k in range(1, 6))
        raise UserError(f"depth of model '{name}' must be {step}n + {first} ({few}, ...), got {depth}.")
    return n


def he_normal(model: nn.Module) -> None:
    """Convolutions drawn from N(0, 2 / (k^2 channels_out)), as the residual and dense networks' authors did."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.out_channels * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
