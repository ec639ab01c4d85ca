"""Residual networks for images of about 32x32."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import UserError


class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); where shape changes, the shortcut is a 1x1 convolution of relu(bn(x))."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        changes = stride != 1 or width_in != width
        self.shortcut = nn.Conv2d(width_in, width, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        ready = self.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(ready)
        return kept + self.conv2(self.relu(self.bn2(self.conv1(ready))))


class PreActResNet(nn.Module):
    """Pre-activation blocks (He et al. 2016), ``depth`` of each width, each further width at half the side.

    A last batch norm stands before the pooling.
    """

    widths: tuple[int, ...]
    depth: int

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if min(shape[1:]) < 16:
            name = type(self).__name__.lower()
            raise UserError(
                f"model '{name}' needs images of at least 16x16, got {shape[1]}x{shape[2]}. Try 'smallconv'."
            )
        blocks: list[nn.Module] = []
        width_in = self.widths[0]
        for place, width in enumerate(self.widths):
            for block in range(self.depth):
                blocks.append(PreActBlock(width_in, width, 2 if place and not block else 1))
                width_in = width
        self.features = width_in
        self.stem = nn.Conv2d(shape[0], self.widths[0], 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(width_in)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.relu(self.bn(self.blocks(self.stem(x))))
        return h.mean((2, 3))


class PreActResNet18(PreActResNet):
    """PreActResNet-18 of the adversarial training literature: 2-2-2-2 blocks, 64..512 wide.

    11,172,170 parameters on three channels with a linear head of 10 classes.
    """

    widths, depth = (64, 128, 256, 512), 2


class PreActResNet8(PreActResNet):
    """The smallest of its kind, for machines without a GPU: 1-1-1 blocks, 16..64 wide, 77,850 parameters likewise."""

    widths, depth = (16, 32, 64), 1
