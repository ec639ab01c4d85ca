"""How far, and where, features move under attack: seen from the centers of the classes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.heads import squared_distances


def class_centers(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each class that occurs, and each sample's row among them: (N, D), (N,) -> (P, D), (N,).

    >>> class_centers(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([7, 7, 9]))
    (tensor([[1.],
            [5.]]), tensor([0, 0, 1]))
    """
    _, which, counts = y.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), h.shape[1], dtype=h.dtype, device=h.device).index_add(0, which, h)
    return sums / counts[:, None], which


class Movement(NamedTuple):
    """What an attack does to each sample's features; all (N,), distances Euclidean, infinite where there is no other
    class. relative: in distances of the own center to the nearest other one, not finite where these coincide."""

    moved: Tensor
    relative: Tensor
    own_before: Tensor
    own_after: Tensor
    other_before: Tensor
    other_after: Tensor

    @property
    def strayed_before(self) -> Tensor:
        """(N,) bool: nearer to another class's center than to its own."""
        return self.other_before < self.own_before

    @property
    def strayed_after(self) -> Tensor:
        """(N,) bool, of the adversarial features."""
        return self.other_after < self.own_after


def movement(h: Tensor, h_adv: Tensor, y: Tensor) -> Movement:
    """||h_adv - h||, and the distances to the own and to the nearest other class center before and after.

    The centers are the class means of the clean features; the adversarial ones do not move them.

    Args: h, h_adv: (N, D), row by row the same samples; y: (N,).

    >>> h, y = torch.tensor([[0.0], [10.0]]), torch.tensor([0, 1])
    >>> told = movement(h, torch.tensor([[6.0], [10.0]]), y)
    >>> told.moved, told.relative, told.other_after, told.strayed_after
    (tensor([6., 0.]), tensor([0.6000, 0.0000]), tensor([ 4., 10.]), tensor([ True, False]))
    """
    centers, which = class_centers(h, y)
    between = squared_distances(centers, centers).sqrt().fill_diagonal_(math.inf).amin(1)
    moved = (h_adv - h).norm(dim=1)
    found = []
    for features in (h, h_adv):
        far = squared_distances(features, centers).sqrt()
        own = far.gather(1, which[:, None])[:, 0]
        found.append((own, far.scatter(1, which[:, None], math.inf).amin(1)))
    (own_before, other_before), (own_after, other_after) = found
    gap = between[which]
    relative = torch.where(gap.isfinite(), moved / gap, math.inf)
    return Movement(moved, relative, own_before, own_after, other_before, other_after)


def scatter_ratio(h: Tensor, y: Tensor) -> float:
    """Scatter within classes over scatter between them: small where classes are compact and far apart.

        sum_i ||h_i - c_y||^2 / sum_k n_k ||c_k - mean||^2

    Args: h: (N, D); y: (N,). Returns a float, infinite where the centers coincide or there is one class.
    Source: Fisher 1936.

    >>> scatter_ratio(torch.tensor([[-1.0], [1.0], [9.0], [11.0]]), torch.tensor([0, 0, 1, 1]))  # 4 / 100
    0.04
    """
    h = h.double()
    centers, which = class_centers(h, y)
    within = float((h - centers[which]).square().sum())
    between = float((centers[which] - h.mean(0)).square().sum())
    return within / between if between > 1e-12 * within else math.inf  # less is rounding
