"""Heads that losses need: cosines, and distances to centers that are fixed or learned. Each gives Outputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, at_least
from ..outputs import Outputs


def squared_distances(h: Tensor, centers: Tensor) -> Tensor:
    """||h_i - c_k||^2: (N, D), (K, D) -> (N, K), never negative.

    By the expansion |h|^2 - 2 h.c + |c|^2, one matrix product instead of an (N, K, D) difference.

    >>> squared_distances(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    tensor([[5., 8.]])
    """
    return (h.square().sum(1, keepdim=True) - 2 * h @ centers.T + centers.square().sum(1)).clamp_min(0.0)


def max_mahalanobis_centers(classes: int, features: int, radius: float = 10.0) -> Tensor:
    """K centers of norm ``radius`` in R^d with the largest possible smallest distance: (K, d) float32.

    For d >= K - 1 the corners of a regular simplex: <mu_i, mu_j> = -radius^2 / (K - 1), by the recursion that fills one
    coordinate a row. Below, the largest inner product is lowered by gradient descent from a fixed start: good, no more.

    Args: classes K >= 2; features d >= 1 (at least 2 when K > 2); radius > 0.
    Source: Pang et al. 2018, 2020.

    >>> mu = max_mahalanobis_centers(10, 64)
    >>> print(f"{mu[0] @ mu[1]:.4f} {(mu[2] - mu[7]).square().sum():.4f}")
    -11.1111 222.2222
    """
    if classes < 2 or features < min(2, classes - 1) or not 0 < radius < math.inf:
        raise UserError(
            "max-Mahalanobis centers need classes >= 2, features >= 2 and radius > 0, "
            f"got {classes}, {features}, {radius}."
        )
    if features < classes - 1:
        with torch.inference_mode(False), torch.enable_grad():
            return radius * _spread(classes, features)
    mu = torch.zeros(classes, features, dtype=torch.float64)
    mu[0, 0] = 1.0
    for k in range(1, classes):
        for j in range(k):
            mu[k, j] = -(1 / (classes - 1) + mu[k] @ mu[j]) / mu[j, j]
        left = 1 - float(mu[k].square().sum())
        if k < features and left > 1e-12:  # the last row has nothing left, so d = K - 1 coordinates are enough
            mu[k, k] = math.sqrt(left)
    return (radius * mu).float()


def _spread(classes: int, features: int, rounds: int = 2000) -> Tensor:
    """Unit directions pushed apart: the soft maximum of the inner products, sharpened as it goes."""
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(classes, features, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.02)
    itself = torch.eye(classes, dtype=torch.bool)
    for round_ in range(rounds):
        unit = F.normalize(free, dim=1)
        sharp = 10.0 * 100.0 ** (round_ / rounds)
        inner = (unit @ unit.T).masked_fill(itself, -math.inf)
        optimizer.zero_grad()
        (torch.logsumexp(sharp * inner.flatten(), 0) / sharp).backward()
        optimizer.step()
    return F.normalize(free.detach(), dim=1).float()


class Linear(nn.Module):
    """logits = W h + b."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, h: Tensor) -> Outputs:
        return Outputs(self.linear(h), h)


class Cosine(nn.Module):
    """logits = scale * cos(w_k, h): features and weights of unit size, no bias. For CosFace, ArcFace and their kin.

    Args: scale > 0, the largest logit there can be; it must equal the scale of the loss.
    """

    def __init__(self, features: int, classes: int, scale: float = 64.0) -> None:
        super().__init__()
        at_least("scale of a cosine head", scale, above=True)
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.kaiming_normal_(self.weight)
        self.scale = scale

    def forward(self, h: Tensor) -> Outputs:
        return Outputs(self.scale * F.linear(F.normalize(h, dim=1), F.normalize(self.weight, dim=1)), h)


class MaxMahalanobis(nn.Module):
    """logits = -||A h + b - mu_k||^2 / 2 to fixed centers of norm ``radius``, as far apart as they can be.

    The linear map is the paper's last dense layer: behind a ReLU the features could not reach centers on all sides.
    """

    centers: Tensor

    def __init__(self, features: int, classes: int, radius: float = 10.0) -> None:
        super().__init__()
        self.embed = nn.Linear(features, features)
        self.register_buffer("centers", max_mahalanobis_centers(classes, features, radius))

    def forward(self, h: Tensor) -> Outputs:
        return self.read(self.embed(h))

    def read(self, h: Tensor) -> Outputs:
        """The answer to features as this head reports them, which are behind its own map."""
        distances = squared_distances(h, self.centers)
        return Outputs(-distances / 2, h, distances)


class Centers(nn.Module):
    """logits = W h + b, and squared distances to a learned center of each class. For center loss."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)
        self.centers = nn.Parameter(torch.randn(classes, features) / math.sqrt(features))

    def forward(self, h: Tensor) -> Outputs:
        return Outputs(self.linear(h), h, squared_distances(h, self.centers))


class GaussianMixture(nn.Module):
    """logits = -d_k - log|L_k| / 2, d_k = (h - mu_k)' L_k^-1 (h - mu_k) / 2, with learned means. For L-GM.

    Args: variances: learn a diagonal L_k too; else L = I, the setting of the paper's larger experiments.
    """

    def __init__(self, features: int, classes: int, variances: bool = False) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(classes, features) / math.sqrt(features))
        self.log_variances = nn.Parameter(torch.zeros(classes, features)) if variances else None

    def forward(self, h: Tensor) -> Outputs:
        if self.log_variances is None:
            distances = squared_distances(h, self.centers)
            return Outputs(-distances / 2, h, distances)
        inverse = (-self.log_variances).exp()
        cross = h @ (inverse * self.centers).T
        distances = (h.square() @ inverse.T - 2 * cross + (inverse * self.centers.square()).sum(1)).clamp_min(0.0)
        return Outputs(-distances / 2 - self.log_variances.sum(1) / 2, h, distances)
