"""How much the distributions of clean and adversarial features differ: three answers of different kinds.

All take (N, D) features in which row i of one and row i of the other are one sample and its adversarial twin. Chance is
kept out by it: no statistic compares twins, which would look more alike than strangers do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models.heads import squared_distances


def median_distance(a: Tensor, b: Tensor, most: int = 500) -> float:
    """The median distance between two samples of the pool, from at most ``most`` of each, evenly spaced; 0 if alike.

    Where more than half of the pairs coincide it is the mean. (N, D), (N, D) -> float.

    >>> median_distance(torch.tensor([[0.0]]), torch.tensor([[3.0]]))
    3.0
    """
    every = math.ceil(len(a) / most)
    far = torch.pdist(torch.cat([a[::every], b[::every]]))
    return (float(far.median()) or float(far.mean())) if len(far) else 0.0


def mmd2(a: Tensor, b: Tensor, *, bandwidth: float | None = None, chunk: int = 1024) -> float:
    """The squared maximum mean discrepancy with a Gaussian kernel, unbiased: about 0 where the distributions agree.

        1 / (n (n - 1)) sum_{i != j} k(a_i, a_j) + k(b_i, b_j) - 2 k(a_i, b_j),   k(u, v) = exp(-|u - v|^2 / (2 w^2))

    Args: a, b: (N, D), N >= 2, row i of both a sample and its twin; bandwidth: w, default ``median_distance``; chunk:
    rows at a time, for memory.
    Returns a float, at most 2, below 0 by chance. A scale of the features does not change it with the default w.
    Source: Gretton et al. 2012 (the U-statistic for pairs; the median heuristic).

    >>> two = torch.tensor([[0.0], [1.0]])
    >>> mmd2(two, two)
    0.0
    >>> print(f"{mmd2(torch.zeros(2, 1), torch.ones(2, 1), bandwidth=1.0):.4f}")  # 2 - 2/sqrt e
    0.7869
    """
    a, b = a.double(), b.double()
    middle = (a.mean(0) + b.mean(0)) / 2  # distances are differences of squares: keep these small
    a, b, n = a - middle, b - middle, len(a)
    width = median_distance(a, b) if bandwidth is None else bandwidth
    if width == 0:
        return 0.0
    total = 0.0
    for left, right, weight in ((a, a, 1.0), (b, b, 1.0), (a, b, -2.0)):
        for i in range(0, n, chunk):
            for j in range(i if left is right else 0, n, chunk):
                kernel = squared_distances(left[i : i + chunk], right[j : j + chunk]).mul_(-0.5 / width**2).exp_()
                if i == j:
                    kernel.fill_diagonal_(0.0)  # a sample and itself, or its twin
                total += weight * (2 if left is right and i != j else 1) * float(kernel.sum())
    return total / (n * (n - 1))


def frechet(a: Tensor, b: Tensor) -> float:
    """The squared Frechet distance of Gaussians with the means and covariances of a and b.

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2)

    Args: a, b: (N, D) and (M, D). Returns a float >= 0, in squared units of the features: networks whose features
    differ in scale cannot be compared by it. Too high by chance where N is not many times D.

    tr (A B)^1/2 is the nuclear norm of R_a R_b', R the triangular factors of the centered samples: no root of a matrix
    is taken, and covariances may be singular.
    Source: Dowson and Landau 1982; Heusel et al. 2017.

    >>> a = torch.tensor([[-1.0], [1.0]])
    >>> print(f"{frechet(a, 3 * a + 2):.4f}")         # means 0 and 2, deviations sqrt 2 and 3 sqrt 2: 4 + (2 sqrt 2)^2
    12.0000
    """
    mean, factor = zip(*(_gaussian(part.double()) for part in (a, b)), strict=True)
    overlap = float(torch.linalg.svdvals(factor[0] @ factor[1].T).sum())
    spread = sum(float(part.square().sum()) for part in factor)
    return max(0.0, float((mean[0] - mean[1]).square().sum()) + spread - 2 * overlap)


def _gaussian(a: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and R with R'R the covariance."""
    mean = a.mean(0)
    return mean, torch.linalg.qr((a - mean) / math.sqrt(max(1, len(a) - 1)), mode="r").R


def shrunk_covariance(x: Tensor) -> Tensor:
    """Ledoit and Wolf's covariance of centered samples, (N, D) -> (D, D): drawn to a multiple of the identity.

    (1 - t) S + t tr(S)/D I, t in closed form the share that is estimated to be noise.
    Source: Ledoit and Wolf 2004.

    >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # S = diag(2, 1/2), t = 17/18
    >>> shrunk_covariance(x)
    tensor([[1.2917, 0.0000],
            [0.0000, 1.2083]])
    """
    n, d = x.shape
    s = x.T @ x / n
    scale, norm2 = s.trace() / d, s.square().sum()
    noise = (x.square().sum(1).square().sum() / n - norm2) / n
    share = float((noise / (norm2 - d * scale**2).clamp_min(torch.finfo(x.dtype).tiny)).clamp(1e-6, 1.0))
    return (1 - share) * s + share * scale * torch.eye(d, dtype=x.dtype, device=x.device)


def auc(a: Tensor, b: Tensor, *, folds: int = 5) -> float:
    """How well a held-out linear classifier tells b from a: the area under its ROC curve, 0.5 for chance, 1 for surely.

    Fisher's discriminant S^-1 (mean_b - mean_a), S the shrunk covariance within a and b, of all folds but one; the area
    on that one; the mean over folds. Row i is in fold i mod folds, in a and in b: a sample and its twin are never on
    two sides. Rows must have no period: shuffle samples first.

    Args: a, b: (N, D), N >= folds >= 2, row i of both a sample and its twin.
    Returns a float in [0, 1]; a little below 0.5 by chance. What only a curved boundary tells apart it does not see.
    Source: Lopez-Paz and Oquab 2017, classifier two-sample tests.

    >>> a = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> auc(a, a + 10, folds=2), auc(a, a, folds=2)
    (1.0, 0.5)
    """
    a, b = _narrow(a.double(), b.double())
    fold = torch.arange(len(a), device=a.device) % folds
    areas = []
    for k in range(folds):
        train, held = fold != k, fold == k
        mean_a, mean_b = a[train].mean(0), b[train].mean(0)
        covariance = shrunk_covariance(torch.cat([a[train] - mean_a, b[train] - mean_b]))
        way = mean_b - mean_a
        if covariance.trace() > 0:
            way = torch.linalg.solve(covariance, way)
        areas.append(_area(a[held] @ way, b[held] @ way))
    return sum(areas) / folds


def _narrow(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same points in coordinates of the space that they span: no more of these than there are points."""
    both = torch.cat([a, b])
    both = both - both.mean(0)
    if both.shape[1] > len(both):
        both = torch.linalg.qr(both.T, mode="r").R.T  # both' = Q R: R's columns are the points along Q's
    return both[: len(a)], both[len(a) :]


def _area(low: Tensor, high: Tensor) -> float:
    """P(high > low) + P(high = low) / 2 over all pairs."""
    low = low.sort().values
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean()) / 2 / len(low)
