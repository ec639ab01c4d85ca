"""RayS: a search for the nearest mistake along rays. It reads predicted labels alone, no logits and no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import Loss
from ..noise import Noise
from ..threat import Threat
from .base import Model, MostAdversarial, all_rows, attack, fooled, predict, should_drop_fooled, those

BISECTIONS = 8  # queries that shorten a ray once a better direction was found


@attack
def rays(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 200,
) -> Tensor:
    """RayS (Chen and Gu 2020): flip blocks of signs, and keep a flip if the ray then meets a mistake sooner.

    A direction is a vector of signs, and its radius the distance at which the prediction turns wrong along it. Each
    step flips one block of a direction, first all of it, then halves, quarters and so on, and asks for one label at the
    radius so far. Where that is a mistake, bisection shortens the radius. The search starts from random signs and with
    the box's width as radius, so it begins outside the threat and ends where a mistake lies inside it. Arguments that
    are not listed here are those of ``pgd``.

    It breaks networks whose logits or gradients mislead: a plateau with a decoy gradient, rounded or cut graphs. On
    honest networks it is far weaker than a gradient attack with as many passes.

    Args:
        threat: linf or l2.
        score: not used.
        steps: number of flips that are tried, >= 1; a flip that helps costs eight more queries.

    Returns:
        x_adv, (N, C, H, W), in the threat.
    """
    best, rows, flat = MostAdversarial(x, y), all_rows(y), x.flatten(1)
    dim = flat.shape[1]
    sign = noise.sign((dim,), x.dtype)
    unit = float(threat.size(torch.ones_like(flat[:1])))  # all directions have this norm
    radius = torch.full_like(flat[:, 0], (threat.hi - threat.lo) * unit)  # in the threat's norm
    block, level = 0, 0  # the block that is flipped next, of 2 ** level

    def wrong(rows: Tensor, sign: Tensor, radius: Tensor) -> Tensor:
        """(M,) bool: misclassified at this distance along the rays. Points inside the threat are kept."""
        points = (flat[rows] + sign * (radius / unit)[:, None]).clamp(threat.lo, threat.hi).view_as(x[rows])
        logits = predict(model, points).logits
        inside = torch.nonzero(radius <= threat.eps)[:, 0]
        if len(inside):
            best.update(rows[inside], threat.project(points[inside], x[rows[inside]]), logits[inside])
        return fooled(logits, y[rows])

    for step in range(steps):
        width = -(-dim // 2**level)
        flip = torch.ones(dim, dtype=x.dtype, device=x.device)
        if step:  # the first ray is taken as it is
            flip[block * width : (block + 1) * width] = -1.0
            block += 1
            if block * width >= dim:
                block, level = 0, level + 1 if width > 1 else 0
        tried = sign * flip
        some = torch.nonzero(wrong(rows, tried, radius))[:, 0]
        if len(some):
            low, high = torch.zeros_like(radius[some]), radius[some]
            middle = torch.minimum(torch.full_like(high, threat.eps), high)  # the threat's own radius is asked first
            for _ in range(BISECTIONS):
                here = wrong(rows[some], tried[some], middle)
                low, high = torch.where(here, low, middle), torch.where(here, middle, high)
                middle = (low + high) / 2
            sign[some], radius[some] = tried[some], high
        if should_drop_fooled(step, x):
            rows, sign, radius = those(~best.fooled[rows], rows, sign, radius)
            if len(rows) == 0:
                break
    return best.x
