"""The pre-activation ResNet of the only public code that we know under the name of the I-SCE paper."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, unknown
from .common import Shape, he_normal, need_side, per_stage
from .resnets import PreActResNet

STATISTICS = ("running", "batch")


class SwitchedBatchNorm(nn.BatchNorm2d):
    """Batch norm that in eval mode uses running statistics, or (``statistics="batch"``) those of the batch it is given.

    With "batch" the output of an image depends on the images beside it: no accuracy of such a network is a number about
    an image. Running statistics are tracked in training either way, so that both read the same weights.
    """

    statistics = "running"

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.statistics == "running" or x.numel() == 0:
            return super().forward(x)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def with_statistics(model: nn.Module, statistics: str) -> nn.Module:
    """A copy of a network whose batch norms use these statistics in eval mode; the weights stay the same.

    Args:
        model: a network with the batch norm of ``preactresnet``.
        statistics: "running" or "batch".

    Returns:
        The copy.

    Raises:
        UserError: other statistics, or a network without such a batch norm.
    """
    if statistics not in STATISTICS:
        raise unknown("statistics", str(statistics), STATISTICS)
    twin = copy.deepcopy(model)
    switches = [module for module in twin.modules() if isinstance(module, SwitchedBatchNorm)]
    if not switches:
        raise UserError(
            "the statistics of this network cannot be switched: only those of the model 'preactresnet' can."
        )
    for module in switches:
        module.statistics = statistics
    return twin


class PerImageStandardised(nn.Module):
    """(x - mean) / max(std, 1 / sqrt(D)) with mean and std over the D values of each image (all channels together).

    What TensorFlow calls per_image_standardization. It has a gradient everywhere, at a constant image too.
    """

    def forward(self, x: Tensor) -> Tensor:
        each = x.flatten(1)
        centered = each - each.mean(1, keepdim=True)
        variance = centered.square().mean(1, keepdim=True)
        return (centered / variance.clamp_min(1 / each.shape[1]).sqrt()).view_as(x)


class CifarPreActResNet(nn.Module):
    """Pre-activation ResNet of depth 6n + 2 (8, 14, 20, 26, 32), 16, 32, 64 wide, behind per-image standardisation.

    Shortcuts are average-pooled and padded with channels of zeros: no parameters. After the last batch norm, the ReLU
    and the mean over pixels stands a dense layer of 64 units without activation: it is the features.
    468,314 parameters on three channels with a linear head of 10 classes.

    That code subtracts the mean training image, where ours subtracts one mean per channel and divides by one standard
    deviation per channel. The standardisation cancels what is common to all pixels of an image, of either. What differs
    is the pattern of the mean image, and the ratio of the channels' deviations (within 8% on CIFAR-10).

    Args: depth; statistics: of the batch norms in eval mode, "running", or "batch" as that code has it, always the
    statistics of the current batch. With "batch" every figure of the network is ``void``: see ``SwitchedBatchNorm``.
    """

    def __init__(self, shape: Shape, depth: int = 32, statistics: str = "running") -> None:
        super().__init__()
        need_side(8, shape, "preactresnet", "smallconv")
        n = per_stage(depth, 2, 6, "preactresnet")
        if statistics not in STATISTICS:
            raise unknown("statistics of model 'preactresnet'", str(statistics), STATISTICS)
        self.features = 64
        self.standardised = PerImageStandardised()
        self.blocks = PreActResNet(shape, 16, (16, 32, 64), n, norm=SwitchedBatchNorm, pooled=True)
        he_normal(self.blocks)
        self.dense = nn.Linear(self.blocks.features, self.features)
        for module in self.modules():
            if isinstance(module, SwitchedBatchNorm):
                module.statistics = statistics

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.dense(self.blocks(self.standardised(x)))
        return h
