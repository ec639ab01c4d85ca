"""What an image meets besides small perturbations: corruptions, the worst rotation and translation, the worst patch."""

from __future__ import annotations

from .corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from .evaluation import Transformed, evaluate
from .patch import worst_patch
from .spatial import move, worst_move
from .threats import Corrupted, Patch, Spatial, Transform, is_transform, parse

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "Corrupted",
    "Corruption",
    "Patch",
    "Spatial",
    "Transform",
    "Transformed",
    "corrupt",
    "evaluate",
    "is_transform",
    "move",
    "parse",
    "worst_move",
    "worst_patch",
]
