"""Residual networks for images of about 32x32."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .common import Shape, he_normal, need_side, per_stage


class Block(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))): the post-activation block (He et al. 2015).

    Where the shape changes, the shortcut is a 1x1 convolution with batch norm (projection), or else every second pixel,
    with the new channels zero, half of them on each side (option A, no parameters).
    """

    def __init__(self, width_in: int, width: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        changes = stride != 1 or width_in != width
        self.shortcut: nn.Module = nn.Identity()
        if changes and projection:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )
        elif changes:
            self.shortcut = Padded(stride, width - width_in)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(self.shortcut(x) + h)
        return out


class Padded(nn.Module):
    """Every ``stride``-th pixel, and ``more`` channels of zeros: the shortcut of option A."""

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x: Tensor) -> Tensor:
        before = self.more // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.more - before))


class PostActResNet(nn.Module):
    """Post-activation blocks, ``n`` of each width, each further width at half the side; then the mean over pixels."""

    def __init__(self, shape: Shape, widths: tuple[int, ...], n: int, projection: bool) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width_in = widths[0]
        for place, width in enumerate(widths):
            for block in range(n):
                blocks.append(Block(width_in, width, 2 if place and not block else 1, projection))
                width_in = width
        self.features = width_in
        self.stem = nn.Conv2d(shape[0], widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.blocks(self.relu(self.bn(self.stem(x))))
        return h.mean((2, 3))


class ResNet(PostActResNet):
    """ResNet of CIFAR, depth 6n + 2 (20, 32, 44, 56, 110): 16, 32, 64 wide, shortcuts without parameters (option A).

    269,722 parameters on three channels with a linear head of 10 classes; 1,727,962 with depth 110.
    Source: He et al. 2015.
    """

    def __init__(self, shape: Shape, depth: int = 20) -> None:
        need_side(16, shape, "resnet", "smallconv")
        super().__init__(shape, (16, 32, 64), per_stage(depth, 2, 6, "resnet"), projection=False)
        he_normal(self)


class ResNet18(PostActResNet):
    """ResNet-18 for 32x32: 2-2-2-2 post-activation blocks, 64..512 wide, 1x1 shortcuts.

    11,173,962 parameters on three channels with a linear head of 10 classes.
    """

    def __init__(self, shape: Shape) -> None:
        need_side(16, shape, "resnet18", "smallconv")
        super().__init__(shape, (64, 128, 256, 512), 2, projection=True)


class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); where shape changes, the shortcut is a 1x1 convolution of relu(bn(x)).

    Args: norm: the class of its batch norms; pooled: the shortcut there is x, averaged over 2x2 pixels, with the new
    channels zero, half of them on each side (no parameters).
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        stride: int,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self.bn1 = norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.pooled = pooled
        self.shortcut: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.shortcut = (
                nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), Padded(1, width - width_in))
                if pooled
                else nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        ready = self.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(x if self.pooled else ready)
        out: Tensor = kept + self.conv2(self.relu(self.bn2(self.conv1(ready))))
        return out


class PreActResNet(nn.Module):
    """Pre-activation blocks (He et al. 2016), ``n`` of each width, each further width at half the side.

    ``stem``: how wide the first convolution is. A last batch norm stands before the pooling. ``norm``, ``pooled``: of
    the blocks.
    """

    def __init__(
        self,
        shape: Shape,
        stem: int,
        widths: tuple[int, ...],
        n: int,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width_in = stem
        for place, width in enumerate(widths):
            for block in range(n):
                blocks.append(PreActBlock(width_in, width, 2 if place and not block else 1, norm, pooled))
                width_in = width
        self.features = width_in
        self.stem = nn.Conv2d(shape[0], stem, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.bn = norm(width_in)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.relu(self.bn(self.blocks(self.stem(x))))
        return h.mean((2, 3))


class PreActResNet18(PreActResNet):
    """PreActResNet-18 of the adversarial training literature: 2-2-2-2 blocks, 64..512 wide.

    11,172,170 parameters on three channels with a linear head of 10 classes.
    """

    def __init__(self, shape: Shape) -> None:
        need_side(16, shape, "preactresnet18", "smallconv")
        super().__init__(shape, 64, (64, 128, 256, 512), 2)


class PreActResNet8(PreActResNet):
    """The smallest of its kind, for machines without a GPU: 1-1-1 blocks, 16..64 wide, 77,850 parameters likewise."""

    def __init__(self, shape: Shape) -> None:
        need_side(16, shape, "preactresnet8", "smallconv")
        super().__init__(shape, 16, (16, 32, 64), 1)
