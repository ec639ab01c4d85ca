"""Inference information s: what it means, where it can come from, and where float32 loses it.

    I-SCE = logsumexp_j (z_j + s_j) - z_y,   s_y = 0

Every function here that returns an s returns one for ``losses.isce``: a guess (a number), a bound (Lipschitz constants,
intervals) or a measurement (an attack). For every sample and class s_att <= s* <= s_cert, where s* is the largest
increase of the logit difference z_j - z_y in the threat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError


def logit_differences(logits: Tensor, y: Tensor) -> Tensor:
    """z_j - z_y, which is 0 at y. A sample is classified correctly where all others are negative.

    Args:
        logits: (N, K).
        y: (N,) labels.

    Returns:
        (N, K).

    >>> logit_differences(torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([0]))
    tensor([[ 0.0000, -1.0000, -1.5000]])
    """
    return logits - logits.gather(1, y[:, None])


def s_att(logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
    """The increase of the logit differences from x to x_adv.

        s_att = (z_j - z_y)(x_adv) - (z_j - z_y)(x)

    ``isce(logits, y, s=s_att(...))`` is adversarial training: it equals SCE(x_adv).

    Args:
        logits: (N, K) at x.
        logits_adv: (N, K) at x_adv.
        y: (N,) labels.

    Returns:
        (N, K), 0 at y.

    >>> from holdfast.losses import isce, sce
    >>> z, z_adv, y = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.5]]), torch.tensor([0])
    >>> isce(z, y, s=s_att(z, z_adv, y)) - sce(z_adv, y)
    tensor([0.])
    """
    return logit_differences(logits_adv, y) - logit_differences(logits, y)


def s_cert(logits: Tensor, logit_difference_bounds: Tensor, y: Tensor) -> Tensor:
    """An upper bound of the increase of the logit differences over the threat.

        s_cert = upper bound of z_j - z_y over the threat - (z_j - z_y)(x)

    With it I-SCE is interval-bound training.

    Args:
        logits: (N, K) at x.
        logit_difference_bounds: (N, K), upper bounds of z_j - z_y over the threat.
        y: (N,) labels.

    Returns:
        (N, K).

    >>> s_cert(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 0.5]]), torch.tensor([0]))
    tensor([[0.0000, 1.5000]])
    """
    return logit_difference_bounds - logit_differences(logits, y)


def s_lipschitz(constant: float, eps: float) -> float:
    """s = sqrt(2) L eps: an upper bound of the increase of every logit difference, from a Lipschitz constant.

    For more than two classes it is an upper bound and not the largest increase itself.

    Args:
        constant: L >= 0, from the threat's norm to the l2 norm of the logits. For an linf threat this is the linf -> l2
            constant (at most sqrt(dim) times the l2 one); an l2 constant would give a false certificate.
        eps: the radius of the threat, >= 0.

    Returns:
        A float.

    Raises:
        UserError: for a negative constant or eps.

    >>> print(f"{s_lipschitz(1.0, 0.5):.4f}")
    0.7071
    """
    if not (constant >= 0 and eps >= 0):
        raise UserError(f"a Lipschitz constant and eps must be >= 0, got {constant} and {eps}.")
    return math.sqrt(2.0) * constant * eps


def needed_log_odds(probability: float, s: float = 0.0) -> float:
    """How far z_y must exceed logsumexp_{j != y} z_j for a given probability during training.

    The probability during training, softmax(z - s onehot(y))_y, reaches p exactly when
    z_y - logsumexp_{j != y} z_j >= s + log(p / (1 - p)). So s shifts the threshold by s.

    Args:
        probability: p, strictly between 0 and 1.
        s: the inference information.

    Returns:
        A float, in units of the logits.

    Raises:
        UserError: for a probability outside (0, 1).

    >>> print(f"{needed_log_odds(0.9):.4f} {needed_log_odds(0.9, s=10.0):.4f}")
    2.1972 12.1972
    """
    if not 0 < probability < 1:
        raise UserError(f"probability must lie strictly between 0 and 1, got {probability}.")
    return s + math.log(probability / (1 - probability))


def dead_zone(dtype: torch.dtype, competitors: int = 1) -> tuple[float, float]:
    """The margins beyond which log-softmax plus NLL, as ``F.cross_entropy`` computes it, loses its gradient.

    Args:
        dtype: a floating dtype.
        competitors: number of other classes at that margin.

    Returns:
        (own, all). Beyond ``own`` the gradient at the true logit, p_y - 1, rounds to exactly 0, because
        sum_{j != y} e^{-margin} is less than half the spacing of floats above 1. Beyond ``all`` every p_j is 0 as well.

    >>> own, everything = dead_zone(torch.float32)
    >>> print(f"{own:.2f} {everything:.1f}")
    16.64 104.0
    """
    info = torch.finfo(dtype)
    half_spacing = info.eps / 2  # of floats above 1: 1 + less than this rounds to 1
    return math.log(competitors / half_spacing), math.log(2) - math.log(info.tiny) - math.log(info.eps)
