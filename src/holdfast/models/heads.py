"""Heads: the last layer, features -> Outputs, and the owner of every tensor that a loss needs (centers, variances).

A head is a module ``Head(features, classes, **settings)`` whose forward maps (N, D) features to Outputs. To add one:
the class and a line in ``HEADS``. The heads of single losses are in ``losses.heads``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UserError, at_least
from ..losses.heads import (
    Centers,
    Cosine,
    GaussianMixture,
    Linear,
    MaxMahalanobis,
    max_mahalanobis_centers,
    squared_distances,
)
from ..outputs import Outputs
from .orthogonal import OrthogonalLinear


class Orthogonal(nn.Module):
    """logits = scale Q h, the rows of Q orthonormal: no gap of logits is steeper than sqrt(2) scale. For certificates.

    Args: scale > 0; bias: learn one, which changes no steepness. Raises UserError where classes > features: so many
    orthonormal rows do not exist.
    """

    def __init__(self, features: int, classes: int, scale: float = 1.0, bias: bool = False) -> None:
        super().__init__()
        at_least("scale of an orthogonal head", scale, above=True)
        if classes > features:
            raise UserError(
                f"head 'orthogonal' needs at least as many features as classes, got {features} for {classes}. Take a "
                "wider network, or head 'linear'."
            )
        self.linear = OrthogonalLinear(features, classes, bias=False)
        self.bias = nn.Parameter(torch.zeros(classes)) if bias else None
        self.scale = scale

    def forward(self, h: Tensor) -> Outputs:
        logits = self.scale * self.linear(h)
        return Outputs(logits if self.bias is None else logits + self.bias, h)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "cosine": Cosine,
    "mmc": MaxMahalanobis,
    "center": Centers,
    "gaussian": GaussianMixture,
    "orthogonal": Orthogonal,
}

__all__ = [
    "HEADS",
    "Centers",
    "Cosine",
    "GaussianMixture",
    "Linear",
    "MaxMahalanobis",
    "Orthogonal",
    "max_mahalanobis_centers",
    "squared_distances",
]
