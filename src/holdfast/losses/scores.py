"""Scores, which attacks maximise: higher is nearer to a mistake. None of them saturates."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from ..errors import UserError
from ..outputs import Outputs, logits_of
from .types import Loss


def need_class_indices(y: Tensor) -> None:
    """Raise UserError for labels that are probabilities, which losses as functions do not take."""
    if y.is_floating_point():
        raise UserError(
            f"y must be class indices (N,), got {y.dtype} of shape {tuple(y.shape)}. The losses as modules, such "
            "as losses.ISCELoss, take probabilities (mixup), ignore_index, weight, reduction, as nn.CrossEntropyLoss."
        )


def negative_margin(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """The largest other logit less the true one: max_{j != y} z_j - z_y.

    On a center head, where z = -d/2, it is half of (squared distance to the own center - to the nearest other one):
    the score for MMC and L-GM.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) int64 labels.

    Returns:
        (N,), > 0 for a mistake, < 0 for a correct prediction.

    >>> import torch
    >>> negative_margin(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    tensor([-1.])
    """
    need_class_indices(y)
    z = logits_of(out)
    y = y[:, None]
    return z.scatter(1, y, -math.inf).amax(1) - z.gather(1, y)[:, 0]


def dlr(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: the negative margin, unchanged if the logits are multiplied or shifted.

        -(z_y - max_{j != y} z_j) / (z_(1) - z_(3))

    With K < 3 there is no third logit: the negative margin is returned.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) int64 labels.

    Returns:
        (N,), >= -1; for a mistake it may exceed 1.

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
    """The targeted difference of logits ratio: higher is nearer to class t.

        -(z_y - z_t) / (z_(1) - (z_(3) + z_(4))/2)

    With K < 4 there is no z_(4): z_t - z_y is returned. A ratio to z_(1) - z_(3) would be -1 for the lowest of three
    classes, whatever the logits are: its gradient vanishes, and an attack that compares values sees no progress.

    Args:
        out: Outputs or (N, K) logits.
        target: (y, t), both (N,) int64.

    Returns:
        (N,).

    Source: Croce and Hein 2020.

    >>> import torch
    >>> z = torch.tensor([[4.0, 3.0, 1.0, 1.0]])
    >>> targeted_dlr(z, (torch.tensor([0]), torch.tensor([1])))
    tensor([-0.3333])
    """
    y, t = target
    z = logits_of(out)
    difference = z.gather(1, t[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]
    if z.shape[1] < 4:
        return difference
    top = z.topk(4, dim=1).values
    return difference / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)


def targeted(score: Loss) -> Loss:
    """The targeted form of a score: a function of (y, t) that is higher nearer to class t.

    ``dlr`` has a targeted form of its own. Any other score is evaluated at t and negated: it is higher the nearer a
    sample of class t is to a mistake, and so the farther the prediction is from t.

    Attacks that take ``target=`` apply this themselves. The targeted form of a targeted score is that score.

    Args:
        score: a score (out, y) -> (N,).

    Returns:
        A score (out, (y, t)) -> (N,).

    >>> import torch
    >>> targeted(negative_margin)(torch.tensor([[2.0, 1.0, 0.1]]), (torch.tensor([0]), torch.tensor([1])))
    tensor([-1.])
    """
    if score is dlr:
        return targeted_dlr
    return score if is_targeted(score) else partial(_negated_at_target, score)


def is_targeted(score: Loss) -> bool:
    """Whether a score is a targeted one of this module, whose second argument is the pair (y, t).

    >>> is_targeted(negative_margin), is_targeted(targeted(negative_margin))
    (False, True)
    """
    return score is targeted_dlr or (isinstance(score, partial) and score.func is _negated_at_target)


def _negated_at_target(score: Loss, out: Outputs | Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    return -score(out, target[1])
