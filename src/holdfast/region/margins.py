"""The distance from a decision to a mistake: to first order, by the local Lipschitz constant, and by an attack."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..attacks import fmn
from ..attacks.base import all_rows, predict, score_and_grad
from ..losses import negative_margin
from ..noise import Noise
from ..outputs import Model, fooled
from ..threat import Threat, column


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


def smallest_perturbation(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, x_adv: Tensor | None = None, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """The nearest point known to fool the model, and its distance, by FMN in the whole box.

    Args:
        model: in eval mode; images to logits or Outputs.
        x: (N, ...) in the box.
        y: (N,) labels.
        threat: gives the norm and the box; its eps is not used.
        x_adv: (N, ...), points that an evaluation has found already; the nearer of the two counts.
        steps: of FMN, one gradient each.

    Returns:
        (points (N, ...), distances (N,) in the threat's norm). A distance is an upper bound of the true one: 0 where x
        is misclassified already, and infinite (with the point x) where nothing was found.

    Source: Pintor et al. 2021 (``attacks.fmn``).

    >>> model = lambda x: torch.stack([x[:, 0], 1 - x[:, 0]], 1)                    # the boundary is x = 0.5
    >>> _, size = smallest_perturbation(model, torch.tensor([[0.8]]), torch.tensor([0]), Threat("linf", 0.01))
    >>> print(f"{float(size):.3f}")
    0.300
    """
    whole_box = replace(threat, eps=float(threat.size(torch.full_like(x[:1], threat.hi - threat.lo))))
    by_fmn = fmn(model, x, y, whole_box, score=negative_margin, noise=Noise(0, all_rows(y)), steps=steps)
    nearest, size = x, torch.full(y.shape, math.inf, dtype=x.dtype, device=x.device)
    # FMN may end exactly on the boundary, where the point does not fool; 0.1% further out it does.
    beyond = (x + 1.001 * (by_fmn - x)).clamp(threat.lo, threat.hi)
    for point in (by_fmn, beyond) if x_adv is None else (x_adv, by_fmn, beyond):
        distance = threat.size(point - x)
        better = fooled(predict(model, point).logits, y) & (distance < size)
        nearest = torch.where(column(better, x), point, nearest)
        size = torch.where(better, distance, size)
    return nearest, size


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
    point, largest = x, torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for _ in range(points):
        _, _, grad = score_and_grad(model, point, negative_margin, y)
        largest = torch.maximum(largest, threat.dual_size(grad))
        point = threat.project(point + threat.eps / 2 * threat.ascent(grad, point), x)
    return largest
