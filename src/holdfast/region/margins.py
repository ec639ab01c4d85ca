"""How far a decision stands from a mistake: to first order, by the steepest slope nearby, and as an attack finds it."""

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
from ..threat import Threat


def input_margin(margin: Tensor, grad: Tensor, threat: Threat) -> Tensor:
    """The first-order distance to the boundary, m / ||grad m||_dual, in the threat's norm; below zero at a mistake.

    Exact for a linear model of two classes. Where the network saturates near x it says too much: an indication only.

    Args: margin: (N,), logit_y - largest other; grad: (N, ...), its gradient at x (the sign does not matter).
    Returns (N,) float64; infinite where the gradient vanishes.
    Source: Elsayed et al. 2018, large margin deep networks.

    >>> input_margin(torch.tensor([7.0]), torch.tensor([[3.0, -4.0]]), Threat("linf", 0.1))
    tensor([1.], dtype=torch.float64)
    """
    margin, steep = margin.double(), threat.dual_size(grad.double())
    return torch.where(steep > 0, margin / steep, margin.sign() * math.inf).nan_to_num(0.0, math.inf, -math.inf)


def share_within(margin: Tensor, s: float) -> float:
    """The share of samples in the inference region of I-SCE: right, but by no more than s, 0 < m <= s. (N,) -> float.

    s is in units of the logits: networks whose logits differ in scale cannot be compared by it. Empty: 0.

    >>> share_within(torch.tensor([-1.0, 0.5, 2.0, 5.0]), 2.0)
    0.5
    """
    return float(((margin > 0) & (margin <= s)).double().mean()) if len(margin) else 0.0


def smallest(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, x_adv: Tensor | None = None, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """The nearest point known to fool, and its distance: the better of FMN's, looked for in all of the box, and x_adv.

    Args: x: (N, ...) in the box; y: (N,); threat: its norm and box, its eps does not matter; x_adv: (N, ...), what an
    evaluation has found already; steps: of FMN, a gradient each.
    Returns (points (N, ...), sizes (N,) in the threat's norm): an upper bound of the true distance; 0 where x is wrong
    already, infinite (and x) where nothing was found. The model must be in eval mode.
    Source: Pintor et al. 2021 (``attacks.fmn``).

    >>> model = lambda x: torch.stack([x[:, 0], 1 - x[:, 0]], 1)                    # the boundary is x = 0.5
    >>> _, size = smallest(model, torch.tensor([[0.8]]), torch.tensor([0]), Threat("linf", 0.01))
    >>> print(f"{float(size):.3f}")
    0.300
    """
    wide = replace(threat, eps=float(threat.size(torch.full_like(x[:1], threat.hi - threat.lo))))
    found = fmn(model, x, y, wide, score=negative_margin, noise=Noise(0, all_rows(y)), steps=steps)
    nearest, size = x, torch.full(y.shape, math.inf, dtype=x.dtype, device=x.device)
    # A step that ends on the boundary itself, where nothing is decided, leaves FMN there: a hair farther is beyond it.
    beyond = (x + 1.001 * (found - x)).clamp(threat.lo, threat.hi)
    for point in (found, beyond) if x_adv is None else (x_adv, found, beyond):
        far = threat.size(point - x)
        better = fooled(predict(model, point).logits, y) & (far < size)
        nearest = torch.where(better.view(-1, *[1] * (x.ndim - 1)), point, nearest)
        size = torch.where(better, far, size)
    return nearest, size


def local_lipschitz(model: Model, x: Tensor, y: Tensor, threat: Threat, *, points: int = 6) -> Tensor:
    """A lower bound of the margin's Lipschitz constant in the threat's ball: the steepest of a few gradients.

        max_k ||grad m(x_k)||_dual,  x_0 = x,  x_k+1 = x_k and a step of eps/2 towards a mistake, within the threat

    Args: x: (N, ...); y: (N,); points >= 1: how many, a gradient each.
    Returns (N,), logits per unit of the threat's norm. Exact for a linear model of two classes; the true
    constant may be much higher. ReLU networks have no second derivative to climb the slope itself by, so the path is
    that of an attack.
    Source: Weng et al. 2018 (CLEVER, which samples gradients), Yang et al. 2020 (along attacks).

    >>> model = lambda x: torch.stack([3 * x[:, 0], 1 - x[:, 0]], 1)
    >>> local_lipschitz(model, torch.tensor([[0.8]]), torch.tensor([0]), Threat("linf", 0.1))
    tensor([4.])
    """
    now, steepest = x, torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for _ in range(points):
        _, _, grad = score_and_grad(model, now, negative_margin, y)
        steepest = torch.maximum(steepest, threat.dual_size(grad))
        now = threat.project(now + threat.eps / 2 * threat.ascent(grad, now), x)
    return steepest
