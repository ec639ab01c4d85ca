"""Inference information s: what it means, where it can come from, and where float32 stops seeing it.

    I-SCE = logsumexp_j (z_j + s_j) - z_y,   s_y = 0,   gap_j = z_j - z_y

Every function here gives an s for ``losses.isce``: guessed (a number), bounded (Lipschitz, intervals) or measured (an
attack). For every sample and class s_attack <= s* <= s_bound, where s* is the worst rise of the gap in the threat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError


def logit_differences(logits: Tensor, y: Tensor) -> Tensor:
    """gap_j = z_j - z_y: (N, K), 0 at y; a sample is right when all others are negative.

    >>> logit_differences(torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([0]))
    tensor([[ 0.0000, -1.0000, -1.5000]])
    """
    return logits - logits.gather(1, y[:, None])


def s_att(logits: Tensor, logits_adv: Tensor, y: Tensor) -> Tensor:
    """s_attack = gap(x_adv) - gap(x): (N, K). ``isce(logits, y, s=measured(...))`` is adversarial training, SCE(x_adv).

    >>> from holdfast.losses import isce, sce
    >>> z, z_adv, y = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.5]]), torch.tensor([0])
    >>> isce(z, y, s=s_att(z, z_adv, y)) - sce(z_adv, y)
    tensor([0.])
    """
    return logit_differences(logits_adv, y) - logit_differences(logits, y)


def s_cert(logits: Tensor, logit_difference_bounds: Tensor, y: Tensor) -> Tensor:
    """s_bound = upper bound of the gaps over the threat - gap(x): (N, K). With it I-SCE is interval-bound training.

    Args: logits: (N, K) at x; logit_difference_bounds: (N, K) upper bounds of z_j - z_y over the threat; y: (N,).

    >>> s_cert(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 0.5]]), torch.tensor([0]))
    tensor([[0.0000, 1.5000]])
    """
    return logit_difference_bounds - logit_differences(logits, y)


def s_lipschitz(constant: float, eps: float) -> float:
    """s = sqrt(2) L eps: no gap of a network whose logits are L-Lipschitz rises further in an l2 ball of radius eps.

    Args: constant: L, from the threat's norm to the l2 norm of the logits. For an linf threat that is the
    linf -> l2 constant (at most sqrt(dim) times the l2 one): an l2 constant there is a false certificate.
    For K > 2 this bounds the gaps' rise, it does not equal it.

    >>> print(f"{s_lipschitz(1.0, 0.5):.4f}")
    0.7071
    """
    if not (constant >= 0 and eps >= 0):
        raise UserError(f"a Lipschitz constant and eps must be >= 0, got {constant} and {eps}.")
    return math.sqrt(2.0) * constant * eps


def needed_log_odds(probability: float, s: float = 0.0) -> float:
    """The expected interval of the correct class: how far z_y must stand above logsumexp_{j != y} z_j.

    The training-time probability softmax(z - s onehot(y))_y reaches p exactly when
    z_y - logsumexp_{j != y} z_j >= s + log(p / (1 - p)): the interval moves up by s.

    >>> print(f"{needed_log_odds(0.9):.4f} {needed_log_odds(0.9, s=10.0):.4f}")
    2.1972 12.1972
    """
    if not 0 < probability < 1:
        raise UserError(f"probability must lie strictly between 0 and 1, got {probability}.")
    return s + math.log(probability / (1 - probability))


def dead_zone(dtype: torch.dtype, competitors: int = 1) -> tuple[float, float]:
    """The margins beyond which log-softmax plus NLL, as ``F.cross_entropy`` computes it, loses gradient.

    Returns (own, all): beyond ``own`` the gradient at the true logit, p_y - 1, rounds to exactly 0
    (sum_{j != y} e^{-margin} < half the spacing of floats above 1); beyond ``all`` every p_j is 0 as well.

    Args: dtype: a floating dtype; competitors: how many other classes stand at that margin.

    >>> own, everything = dead_zone(torch.float32)
    >>> print(f"{own:.2f} {everything:.1f}")
    16.64 104.0
    """
    info = torch.finfo(dtype)
    above_one = info.eps / 2  # half of the spacing above 1: the competitors' share that 1 + share loses
    return math.log(competitors / above_one), math.log(2) - math.log(info.tiny) - math.log(info.eps)
