"""How much the distributions of clean and adversarial features differ: three statistics of different kinds.

Each takes (N, D) clean and (N, D) adversarial features, in which row i of both is the same sample. The two features of
one sample are closer to each other than those of different samples. MMD and AUC therefore never compare them, which
would bias the statistic when the distributions agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models.heads import squared_distances


def median_distance(a: Tensor, b: Tensor, limit: int = 500) -> float:
    """The median distance between two samples of the pool of a and b.

    Args:
        a: (N, D).
        b: (N, D).
        limit: number of samples used of each, evenly spaced.

    Returns:
        A float. Where more than half of the pairs coincide it is the mean distance; 0 where all do.

    >>> median_distance(torch.tensor([[0.0]]), torch.tensor([[3.0]]))
    3.0
    """
    stride = math.ceil(len(a) / limit)
    distances = torch.pdist(torch.cat([a[::stride], b[::stride]]))
    return (float(distances.median()) or float(distances.mean())) if len(distances) else 0.0


def mmd2(a: Tensor, b: Tensor, *, bandwidth: float | None = None, chunk: int = 1024) -> float:
    """The squared maximum mean discrepancy with a Gaussian kernel, unbiased: about 0 where the distributions agree.

        1 / (n (n - 1)) sum_{i != j} k(a_i, a_j) + k(b_i, b_j) - 2 k(a_i, b_j),   k(u, v) = exp(-|u - v|^2 / (2 w^2))

    Args:
        a: (N, D), N >= 2, clean features.
        b: (N, D), adversarial features of the same samples, row by row.
        bandwidth: w, default ``median_distance``.
        chunk: rows at a time, to bound the memory.

    Returns:
        A float of at most 2, and negative by chance. With the default bandwidth it does not depend on the scale of the
        features.

    Source: Gretton et al. 2012 (the U-statistic for pairs; the median heuristic).

    >>> two = torch.tensor([[0.0], [1.0]])
    >>> mmd2(two, two)
    0.0
    >>> print(f"{mmd2(torch.zeros(2, 1), torch.ones(2, 1), bandwidth=1.0):.4f}")  # 2 - 2/sqrt e
    0.7869
    """
    a, b = a.double(), b.double()
    center = (a.mean(0) + b.mean(0)) / 2  # distances are differences of squares: this keeps the squares small
    a, b, n = a - center, b - center, len(a)
    width = median_distance(a, b) if bandwidth is None else bandwidth
    if width == 0:
        return 0.0
    total = 0.0
    for left, right, weight in ((a, a, 1.0), (b, b, 1.0), (a, b, -2.0)):
        for i in range(0, n, chunk):
            for j in range(i if left is right else 0, n, chunk):
                kernel = squared_distances(left[i : i + chunk], right[j : j + chunk]).mul_(-0.5 / width**2).exp_()
                if i == j:
                    kernel.fill_diagonal_(0.0)  # a sample and itself, or its two features
                total += weight * (2 if left is right and i != j else 1) * float(kernel.sum())
    return total / (n * (n - 1))


def frechet(a: Tensor, b: Tensor) -> float:
    """The squared Frechet distance between the Gaussians with the means and covariances of a and b.

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2)

    tr (A B)^1/2 is computed as the nuclear norm of R_a R_b', where R are the triangular factors of the centered
    samples. So no matrix root is needed, and the covariances may be singular.

    Args:
        a: (N, D).
        b: (M, D).

    Returns:
        A float >= 0, in squared units of the features: networks whose features differ in scale cannot be compared by
        it. It is biased upwards where N is not many times D.

    Source: Dowson and Landau 1982; Heusel et al. 2017.

    >>> a = torch.tensor([[-1.0], [1.0]])
    >>> print(f"{frechet(a, 3 * a + 2):.4f}")         # means 0 and 2, deviations sqrt 2 and 3 sqrt 2: 4 + (2 sqrt 2)^2
    12.0000
    """
    mean, factor = zip(*(_gaussian(part.double()) for part in (a, b)), strict=True)
    overlap = float(torch.linalg.svdvals(factor[0] @ factor[1].T).sum())
    trace = sum(float(part.square().sum()) for part in factor)
    return max(0.0, float((mean[0] - mean[1]).square().sum()) + trace - 2 * overlap)


def _gaussian(a: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and R with R'R the covariance."""
    mean = a.mean(0)
    return mean, torch.linalg.qr((a - mean) / math.sqrt(max(1, len(a) - 1)), mode="r").R


def shrunk_covariance(x: Tensor) -> Tensor:
    """Ledoit and Wolf's covariance: the sample covariance S, shrunk towards a multiple of the identity.

        (1 - t) S + t tr(S)/D I,   t the estimated fraction of noise, in closed form

    Args:
        x: (N, D), centered.

    Returns:
        (D, D).

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
    t = float((noise / (norm2 - d * scale**2).clamp_min(torch.finfo(x.dtype).tiny)).clamp(1e-6, 1.0))
    return (1 - t) * s + t * scale * torch.eye(d, dtype=x.dtype, device=x.device)


def auc(a: Tensor, b: Tensor, *, folds: int = 5) -> float:
    """How well a linear classifier separates b from a on held-out samples: the area under its ROC curve.

    The classifier is Fisher's discriminant S^-1 (mean_b - mean_a), where S is the shrunk covariance within a and b. It
    is fitted on all folds but one and tested on that one; the result is the mean over folds. Row i of a and of b is in
    fold i mod folds, so the two features of a sample are never split between fitting and testing. The order of the rows
    must not be periodic: shuffle the samples first.

    Args:
        a: (N, D), N >= folds, clean features.
        b: (N, D), adversarial features of the same samples, row by row.
        folds: number of folds, >= 2.

    Returns:
        A float in [0, 1]: 1 for perfect separation, about 0.5 (or a little less) where the distributions agree. It does
        not see a difference that only a curved boundary separates.

    Source: Lopez-Paz and Oquab 2017, classifier two-sample tests.

    >>> a = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> auc(a, a + 10, folds=2), auc(a, a, folds=2)
    (1.0, 0.5)
    """
    a, b = _in_span(a.double(), b.double())
    fold = torch.arange(len(a), device=a.device) % folds
    areas = []
    for k in range(folds):
        train, held_out = fold != k, fold == k
        mean_a, mean_b = a[train].mean(0), b[train].mean(0)
        covariance = shrunk_covariance(torch.cat([a[train] - mean_a, b[train] - mean_b]))
        direction = mean_b - mean_a
        if covariance.trace() > 0:
            direction = torch.linalg.solve(covariance, direction)
        areas.append(_area(a[held_out] @ direction, b[held_out] @ direction))
    return sum(areas) / folds


def _in_span(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same points in coordinates of the space that they span, which has at most as many dimensions as points."""
    both = torch.cat([a, b])
    both = both - both.mean(0)
    if both.shape[1] > len(both):
        both = torch.linalg.qr(both.T, mode="r").R.T  # both' = Q R: column i of R holds the coordinates of point i
    return both[: len(a)], both[len(a) :]


def _area(low: Tensor, high: Tensor) -> float:
    """P(high > low) + P(high = low) / 2 over all pairs."""
    low = low.sort().values
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean()) / 2 / len(low)
