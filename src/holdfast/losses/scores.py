"""Scores: what an attack climbs. Higher means nearer to a mistake, and none of them saturates."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from ..outputs import Outputs, logits_of
from .types import Loss


def negative_margin(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: > 0 is a mistake, < 0 is right.

    Args: out: Outputs or (N, K) logits; y: (N,) int64.  Returns (N,).
    On a center head, where z = -d/2, it is half of (own - nearest other squared distance): the score for MMC and L-GM.

    >>> import torch
    >>> negative_margin(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    tensor([-1.])
    """
    z = logits_of(out)
    y = y[:, None]
    return z.scatter(1, y, -math.inf).amax(1) - z.gather(1, y)[:, 0]


def dlr(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)), the margin freed from shift and scale.

    Args: out: Outputs or (N, K) logits; y: (N,) int64.  Returns (N,), at least -1; a mistake may exceed 1.
    With K < 3 there is no third logit and no ratio to take: the negative margin is returned.
    Source: Croce and Hein 2020.

    >>> import torch
    >>> print(f"{dlr(torch.tensor([[2.0, 1.0, 0.1]], dtype=torch.float64), torch.tensor([0])).item():.6f}")
    -0.526316
    """
    z = logits_of(out)
    if z.shape[1] < 3:
        return negative_margin(z, y)
    top = z.topk(3, dim=1).values
    return negative_margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(out: Outputs | Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4))/2) towards class t; with K < 4 there is no z_(4) and no ratio is taken.

    With K = 3 a ratio to z_(1) - z_(3) would be -1 towards the lowest class whatever the logits are: a plain where
    gradients vanish, and on which an attack that compares values sees no step as progress.

    Args: out: Outputs or (N, K) logits; target: (y, t), both (N,) int64.  Returns (N,).
    Source: Croce and Hein 2020.

    >>> import torch
    >>> z = torch.tensor([[4.0, 3.0, 1.0, 1.0]])
    >>> targeted_dlr(z, (torch.tensor([0]), torch.tensor([1])))
    tensor([-0.3333])
    """
    y, t = target
    z = logits_of(out)
    rise = z.gather(1, t[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]
    if z.shape[1] < 4:
        return rise
    top = z.topk(4, dim=1).values
    return rise / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)


def targeted(score: Loss) -> Loss:
    """The targeted form of a score, on targets (y, t): higher is nearer to class t.

    dlr becomes its own targeted form; any other score is negated at t, since what nears a mistake *about* t leaves it.

    >>> import torch
    >>> targeted(negative_margin)(torch.tensor([[2.0, 1.0, 0.1]]), (torch.tensor([0]), torch.tensor([1])))
    tensor([-1.])
    """
    if score is dlr:
        return targeted_dlr
    return partial(_negated_at_target, score)


def _negated_at_target(score: Loss, out: Outputs | Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    return -score(out, target[1])
