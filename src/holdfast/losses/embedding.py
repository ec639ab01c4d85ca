"""Losses on features: distances to the head's centers, and pairs of samples in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError, at_least
from ..outputs import Outputs
from .softmax import isce, sce


def _own_distance(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """distances[:, y], (N,). Raises UserError if the head has none."""
    if not isinstance(out, Outputs) or out.distances is None:
        raise UserError(
            "this loss needs distances to centers, and the model's head has none. "
            "Use head 'center', 'mmc' or 'gaussian' (the loss's own head is the default)."
        )
    return out.distances.gather(1, y[:, None])[:, 0]


def _features(out: Outputs) -> Tensor:
    """The features, (N, D). Raises UserError if there are none."""
    if not isinstance(out, Outputs) or out.features is None:
        raise UserError(
            "this loss compares features, and the model returned logits alone: return Outputs with features."
        )
    return out.features


def center(out: Outputs, y: Tensor, *, weight: float = 0.05) -> Tensor:
    """Center loss: SCE + weight/2 ||h - c_y||^2, with the centers c in the head.

    The optimiser updates the centers. With Adam this equals the paper's own normalised update up to its rate.

    Args:
        out: Outputs with distances, of head "center".
        y: (N,) int64 labels.
        weight: of the center term, >= 0.

    Returns:
        (N,), >= 0.

    Raises:
        UserError: there are no distances, or weight is negative.

    Source: Wen et al. 2016.

    >>> out = Outputs(torch.tensor([[0.0, 0.0]]), None, torch.tensor([[5.0, 1.0]]))
    >>> center(out, torch.tensor([0]), weight=1.0)  # log 2 + 5 / 2
    tensor([3.1931])
    """
    at_least("weight", weight)
    return sce(out, y) + weight / 2 * _own_distance(out, y)


def lgm(out: Outputs, y: Tensor, *, ratio: float = 0.1, weight: float = 0.01) -> Tensor:
    """Large-margin Gaussian mixture: I-SCE with s = ratio d_y on logits -d - log|L|/2, plus weight (d_y + log|L_y|/2).

        d_k = (h - mu_k)' L_k^-1 (h - mu_k) / 2

    In training, the distance to the own class counts 1 + ratio times.

    Args:
        out: Outputs of head "gaussian", with logits and distances.
        y: (N,) int64 labels.
        ratio: of the additional distance, >= 0 (alpha in the paper).
        weight: of the likelihood term, >= 0 (lambda in the paper).

    Returns:
        (N,).

    Raises:
        UserError: there are no distances, or ratio or weight is negative.

    Source: Wan et al. 2018.

    >>> d = torch.tensor([[5.0, 8.0, 2.0]], dtype=torch.float64)  # h = (1, 2), mu = (0,0), (3,0), (0,3)
    >>> print(f"{lgm(Outputs(-d / 2, None, d), torch.tensor([0]), ratio=0.1, weight=0.1).item():.6f}")
    2.201765
    """
    at_least("ratio, the share of the own distance that L-GM adds,", ratio)
    at_least("weight", weight)
    d_y = _own_distance(out, y) / 2
    return isce(out, y, s=(ratio * d_y)[:, None]) - weight * out.logits.gather(1, y[:, None])[:, 0]


def mmc(out: Outputs, y: Tensor) -> Tensor:
    """Max-Mahalanobis center loss: ||h - mu_y||^2 / 2, with fixed centers mu, as far apart as possible.

    Where it fails: it ignores the other centers, so it is not a score for attacks: a step away from mu_y need not lead
    towards any other center (Tramer et al. 2020).

    Args:
        out: Outputs with distances, of head "mmc".
        y: (N,) int64 labels.

    Returns:
        (N,), >= 0.

    Raises:
        UserError: there are no distances.

    Source: Pang et al. 2020.

    >>> mmc(Outputs(torch.zeros(1, 2), None, torch.tensor([[5.0, 8.0]])), torch.tensor([0]))
    tensor([2.5000])
    """
    return _own_distance(out, y) / 2


def _pairwise(h: Tensor) -> Tensor:
    """(N, N) squared distances; exact zeros on the diagonal, never negative."""
    sizes = h.square().sum(1)
    square = (sizes[:, None] + sizes[None, :] - 2 * h @ h.T).clamp_min(0.0)
    return square.masked_fill(torch.eye(len(h), dtype=torch.bool, device=h.device), 0.0)


def contrastive(out: Outputs, y: Tensor, *, weight: float = 0.05, separation: float = 1.0) -> Tensor:
    """Contrastive loss (DeepID2): SCE + weight * the mean of pair(i, j) over the batch's other samples j.

        pair(i, j) = ||h_i - h_j||^2 / 2                         for samples of one class
        pair(i, j) = max(0, separation - ||h_i - h_j||)^2 / 2    for samples of two classes

    A sample's loss depends on its batch. A batch of one sample has no pair term.

    Args:
        out: Outputs with features.
        y: (N,) int64 labels.
        weight: of the pair term, >= 0.
        separation: the distance beyond which pairs of two classes cost nothing, > 0.

    Returns:
        (N,), >= 0.

    Raises:
        UserError: there are no features, or weight or separation lies outside its range.

    Source: Sun et al. 2014.

    >>> h = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    >>> pair = contrastive(Outputs(torch.zeros(2, 2), h), torch.tensor([1, 1]), weight=1.0) - torch.tensor(2.0).log()
    >>> pair  # ||(0.2, -0.6)||^2 / 2
    tensor([0.2000, 0.2000])
    """
    at_least("weight", weight)
    at_least("separation", separation, above=True)
    square = _pairwise(_features(out))
    same = y[:, None] == y[None, :]
    apart = (separation - square.clamp_min(1e-12).sqrt()).clamp_min(0.0).square()
    pairs = torch.where(same, square, apart) / 2
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    return sce(out, y) + weight * pairs.masked_fill(itself, 0.0).sum(1) / max(len(y) - 1, 1)


def triplet(out: Outputs, y: Tensor, *, weight: float = 1.0, separation: float = 0.2) -> Tensor:
    """Triplet loss (FaceNet): SCE + weight * the mean over positives p of max(0, d_ap - d_an + separation).

    d are squared distances of features of unit length; a is the sample itself and p another one of its class. n is
    semi-hard: the nearest sample of another class that is farther than p, or the farthest if there is none.

    A sample's loss depends on its batch. Without a positive or a negative in the batch there is no triplet term.

    Args:
        out: Outputs with features.
        y: (N,) int64 labels.
        weight: of the triplet term, >= 0.
        separation: >= 0.

    Returns:
        (N,), >= 0.

    Raises:
        UserError: there are no features, or weight or separation is negative.

    Source: Schroff et al. 2015.

    >>> h = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # anchor 0: 0.4 to its positive, 2 to the negative
    >>> triplet(Outputs(torch.zeros(3, 2), h), torch.tensor([0, 0, 1]), separation=2.0) - torch.tensor(2.0).log()
    tensor([0.4000, 1.6000, 0.0000])
    """
    at_least("weight", weight)
    at_least("separation", separation)
    square = _pairwise(torch.nn.functional.normalize(_features(out), dim=1))
    same = y[:, None] == y[None, :]
    negatives = square.masked_fill(same, torch.inf).sort(1).values  # of each anchor, nearest first; then inf
    count = (~same).sum(1, keepdim=True)
    place = torch.searchsorted(negatives.detach(), square.detach().contiguous(), right=True)
    negative = negatives.gather(1, torch.minimum(place, (count - 1).clamp_min(0)))
    positive = same & ~torch.eye(len(y), dtype=torch.bool, device=y.device) & (count > 0)
    hinge = torch.where(positive, square - torch.where(positive, negative, 0.0) + separation, 0.0).clamp_min(0.0)
    return sce(out, y) + weight * hinge.sum(1) / positive.sum(1).clamp_min(1)
