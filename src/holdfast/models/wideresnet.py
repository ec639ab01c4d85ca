"""Wide residual networks: the large networks of the robustness literature."""

from __future__ import annotations

from ..errors import at_least
from .common import Shape, he_normal, need_side, per_stage
from .resnets import PreActResNet


class WideResNet(PreActResNet):
    """WRN-depth-width: pre-activation blocks, 16, 32, 64 times ``width`` channels; depth 6n + 4 (16, 28, 34, 70).

    36,479,194 parameters on three channels with a linear head of 10 classes; 46,160,474 with depth 34.
    Without dropout. Source: Zagoruyko & Komodakis 2016.
    """

    def __init__(self, shape: Shape, depth: int = 28, width: int = 10) -> None:
        need_side(16, shape, "wideresnet", "smallconv")
        at_least("width of model 'wideresnet'", width, 1)
        n = per_stage(depth, 4, 6, "wideresnet")
        super().__init__(shape, 16, (16 * width, 32 * width, 64 * width), n)
        he_normal(self)
