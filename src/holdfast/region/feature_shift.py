"""How features move under attack, relative to the centers of the classes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.heads import squared_distances


def class_centers(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each class that occurs, and the row of each sample's own class among them.

    Args:
        h: (N, D) features.
        y: (N,) labels.

    Returns:
        (centers (P, D), rows (N,)) for the P classes that occur.

    >>> class_centers(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([7, 7, 9]))
    (tensor([[1.],
            [5.]]), tensor([0, 0, 1]))
    """
    _, rows, counts = y.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), h.shape[1], dtype=h.dtype, device=h.device).index_add(0, rows, h)
    return sums / counts[:, None], rows


class Movement(NamedTuple):
    """What an attack does to each sample's features. Every column is (N,); distances are Euclidean.

    Distances to another class are infinite where there is only one class.

    Attributes:
        moved: ||h_adv - h||.
        relative: ``moved`` over the distance from the own center to the nearest other one; not finite where these
            coincide.
        own_before: distance of the clean features to the center of their own class.
        own_after: the same of the adversarial features.
        other_before: distance of the clean features to the nearest center of another class.
        other_after: the same of the adversarial features.
    """

    moved: Tensor
    relative: Tensor
    own_before: Tensor
    own_after: Tensor
    other_before: Tensor
    other_after: Tensor

    @property
    def strayed_before(self) -> Tensor:
        """(N,) bool: the clean features are nearer to another class's center than to their own."""
        return self.other_before < self.own_before

    @property
    def strayed_after(self) -> Tensor:
        """(N,) bool: the same of the adversarial features."""
        return self.other_after < self.own_after


def movement(h: Tensor, h_adv: Tensor, y: Tensor) -> Movement:
    """How far features move, and their distances to the own and to the nearest other class center before and after.

    The centers are the class means of the clean features.

    Args:
        h: (N, D), clean features.
        h_adv: (N, D), adversarial features of the same samples, row by row.
        y: (N,) labels.

    Returns:
        The columns of ``Movement``.

    >>> h, y = torch.tensor([[0.0], [10.0]]), torch.tensor([0, 1])
    >>> result = movement(h, torch.tensor([[6.0], [10.0]]), y)
    >>> result.moved, result.relative, result.other_after, result.strayed_after
    (tensor([6., 0.]), tensor([0.6000, 0.0000]), tensor([ 4., 10.]), tensor([ True, False]))
    """
    centers, rows = class_centers(h, y)
    nearest_center = squared_distances(centers, centers).sqrt().fill_diagonal_(math.inf).amin(1)
    moved = (h_adv - h).norm(dim=1)
    own_and_other = []
    for features in (h, h_adv):
        distance = squared_distances(features, centers).sqrt()
        own = distance.gather(1, rows[:, None])[:, 0]
        own_and_other.append((own, distance.scatter(1, rows[:, None], math.inf).amin(1)))
    (own_before, other_before), (own_after, other_after) = own_and_other
    between = nearest_center[rows]
    relative = torch.where(between.isfinite(), moved / between, math.inf)
    return Movement(moved, relative, own_before, own_after, other_before, other_after)


def scatter_ratio(h: Tensor, y: Tensor) -> float:
    """Scatter within classes over scatter between them: small where classes are compact and far apart.

        sum_i ||h_i - c_y||^2 / sum_k n_k ||c_k - mean||^2

    Args:
        h: (N, D) features.
        y: (N,) labels.

    Returns:
        A float; infinite where the centers coincide or there is only one class.

    Source: Fisher 1936.

    >>> scatter_ratio(torch.tensor([[-1.0], [1.0], [9.0], [11.0]]), torch.tensor([0, 0, 1, 1]))  # 4 / 100
    0.04
    """
    h = h.double()
    centers, rows = class_centers(h, y)
    within = float((h - centers[rows]).square().sum())
    between = float((centers[rows] - h.mean(0)).square().sum())
    return within / between if between > 1e-12 * within else math.inf  # a smaller scatter is rounding
