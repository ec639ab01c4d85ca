"""The distance from a decision to a mistake, to first order; and the local Lipschitz constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attacks.base import score_and_grad
from ..losses import negative_margin
from ..outputs import Model, check_samples
from ..threat import Threat
from ..user_input import typed


def input_margin(margin: Tensor, grad: Tensor, threat: Threat) -> Tensor:
    """The first-order distance to the boundary, m / ||grad m||_dual, in the threat's norm; negative for a mistake.

    It is exact for a linear model of two classes. Where the network saturates near x it is too large, so it is only an
    indication.

    Args:
        margin: (N,), logit_y - largest other logit.
        grad: (N, ...), the margin's gradient at x; its sign does not matter.
        threat: gives the norm.

    Returns:
        (N,) float64; infinite where the gradient vanishes.

    Source: Elsayed et al. 2018, large margin deep networks.

    >>> input_margin(torch.tensor([7.0]), torch.tensor([[3.0, -4.0]]), Threat("linf", 0.1))
    tensor([1.], dtype=torch.float64)
    """
    margin, dual = margin.double(), threat.dual_size(grad.double())
    return torch.where(dual > 0, margin / dual, margin.sign() * math.inf).nan_to_num(0.0, math.inf, -math.inf)


def fraction_within(margin: Tensor, s: float) -> float:
    """The fraction of samples in the inference region of I-SCE: correct, but by a margin of at most s, 0 < m <= s.

    s is in units of the logits, so networks whose logits differ in scale cannot be compared by it.

    Args:
        margin: (N,), logit_y - largest other logit.
        s: the inference information.

    Returns:
        A float; 0 for no samples.

    >>> fraction_within(torch.tensor([-1.0, 0.5, 2.0, 5.0]), 2.0)
    0.5
    """
    return float(((margin > 0) & (margin <= s)).double().mean()) if len(margin) else 0.0


@typed
def local_lipschitz(model: Model, x: Tensor, y: Tensor, threat: Threat, *, points: int = 6) -> Tensor:
    """A lower bound of the margin's Lipschitz constant in the threat's ball: the largest of a few gradient norms.

        max_k ||grad m(x_k)||_dual,  x_0 = x,  x_k+1 = project(x_k + eps/2 * ascent(grad of the negative margin))

    ReLU networks have no second derivative by which the gradient's norm could be maximised, so the points are those of
    an attack.

    Args:
        model: in eval mode; images to logits or Outputs.
        x: (N, ...).
        y: (N,) labels.
        threat: the norm and the ball.
        points: number of points, >= 1, one gradient each.

    Returns:
        (N,), logits per unit of the threat's norm. Exact for a linear model of two classes; otherwise the true constant
        may be much larger.

    Source: Weng et al. 2018 (CLEVER, which samples gradients), Yang et al. 2020 (gradients along an attack).

    >>> model = lambda x: torch.stack([3 * x[:, 0], 1 - x[:, 0]], 1)
    >>> local_lipschitz(model, torch.tensor([[0.8]]), torch.tensor([0]), Threat("linf", 0.1))
    tensor([4.])
    """
    check_samples(x, y)
    point, largest = x, torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for _ in range(points):
        _, _, grad = score_and_grad(model, point, negative_margin, y)
        largest = torch.maximum(largest, threat.dual_size(grad))
        point = threat.project(point + threat.eps / 2 * threat.ascent(grad, point), x)
    return largest
