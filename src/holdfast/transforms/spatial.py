"""The worst rotation and translation of each image: a grid over all of them, then gradient steps from the best."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..attacks.base import predict
from ..errors import UserError
from ..losses import negative_margin
from ..outputs import Model, Outputs, Queried, frozen_eval
from ..threat import column
from ..user_input import whole
from .filters import pixel_grid, sample_at
from .threats import Spatial

ANGLES, SHIFTS = 31, 5  # of the grid, as in Engstrom et al. 2019
BEST, STEPS = 3, 10  # grid points that gradient steps begin at, and steps from each


def move(x: Tensor, parameters: Tensor) -> Tensor:
    """Rotate images about their centre, then move them; bilinear, 0 beyond the edge. Differentiable in both.

    Args:
        x: (N, C, H, W).
        parameters: (N, 3): degrees counter-clockwise, pixels down, pixels to the right.

    Returns:
        (N, C, H, W).

    >>> x = torch.arange(4.0).view(1, 1, 2, 2)
    >>> move(x, torch.tensor([[90.0, 0.0, 0.0]])).round().tolist(), move(x, torch.tensor([[0.0, 0.0, 1.0]])).tolist()
    ([[[[1.0, 3.0], [0.0, 2.0]]]], [[[[0.0, 0.0], [0.0, 2.0]]]])
    """
    rows, cols = pixel_grid(x)
    middle = [(side - 1) / 2 for side in x.shape[-2:]]
    angle, down, right = (part[:, None, None] for part in parameters.to(x.dtype).unbind(1))
    rows, cols = rows - middle[0] - down, cols - middle[1] - right
    cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    return sample_at(x, cos * rows + sin * cols + middle[0], cos * cols - sin * rows + middle[1], "zeros")


def grid_of(threat: Spatial, angles: int = ANGLES, shifts: int = SHIFTS) -> Tensor:
    """The grid over the threat, (G, 3): the identity first, then by size.

    >>> len(grid_of(Spatial(30, 3))), grid_of(Spatial(30), angles=3).tolist()
    (775, [[0.0, 0.0, 0.0], [-30.0, 0.0, 0.0], [30.0, 0.0, 0.0]])
    """
    turns = torch.linspace(-threat.rotation, threat.rotation, angles) if threat.rotation else torch.zeros(1)
    moves = torch.linspace(-threat.translation, threat.translation, shifts) if threat.translation else torch.zeros(1)
    points = torch.tensor(list(itertools.product(turns.tolist(), moves.tolist(), moves.tolist())))
    size = torch.tensor([max(threat.rotation, 1e-9), *[max(threat.translation, 1e-9)] * 2])
    return points[(points / size).abs().sum(1).argsort(stable=True)]


def worst_move(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Spatial,
    *,
    angles: int = ANGLES,
    shifts: int = SHIFTS,
    steps: int = STEPS,
) -> Tensor:
    """The rotation and translation of each image with the smallest margin.

    All points of a grid are tried, 31 angles x 5 x 5 shifts by default; then the best three of each image that none
    fooled take gradient steps, whose size falls from half a cell of the grid to nothing. Like an attack, it makes no
    claim.

    Args:
        model: images to logits or Outputs.
        x: (N, C, H, W) in [0, 1].
        y: (N,) labels.
        threat: how far.
        angles: of the grid, an odd number.
        shifts: of the grid, an odd number, in each direction.
        steps: from each of the three best points; 0 for the grid alone.

    Returns:
        (N, 3): degrees, pixels down, pixels to the right; for ``move``.

    Source: Engstrom et al. 2019. The gradient steps that begin at the best points of the grid are added here.
    """
    whole("steps", steps)
    for name, count in (("angles", angles), ("shifts", shifts)):
        if whole(name, count, 1) % 2 == 0:
            raise UserError(f"{name} must be odd, so that the grid holds the image itself, got {count}.")
    points = grid_of(threat, angles, shifts).to(x)
    queried = model if isinstance(model, Queried) else Queried(model)
    with frozen_eval(model), torch.autocast(x.device.type, enabled=False):
        scores = torch.full((len(x), len(points)), -torch.inf, dtype=x.dtype, device=x.device)
        rows = torch.arange(len(x), device=x.device)
        for place, point in enumerate(points):
            score = _score(predict(queried, move(x[rows], point.expand(len(rows), 3))), y[rows])
            scores[rows, place] = score
            if place % 25 == 24 or x.device.type == "cpu":  # selecting rows makes the host wait for the device
                rows = rows[scores[rows].amax(1) <= 0]
                if not len(rows):
                    break
        best, at = scores.topk(min(BEST, len(points)), dim=1)
        found, found_score = points[at[:, 0]], best[:, 0]
        rows = torch.nonzero(found_score <= 0)[:, 0]
        cell = points.new_tensor([2 * threat.rotation / max(1, angles - 1), *[_cell(threat, shifts)] * 2])
        most = points.new_tensor([threat.rotation, threat.translation, threat.translation])
        for start in at.unbind(1) if steps and len(rows) else ():
            better, score = _ascend(queried, x[rows], y[rows], points[start[rows]], cell / 2, most, steps)
            better = torch.where(column(score > found_score[rows], better), better, found[rows])
            found[rows], found_score[rows] = better, torch.maximum(score, found_score[rows])
    return found


def _cell(threat: Spatial, shifts: int) -> float:
    return 2 * threat.translation / max(1, shifts - 1)


def _score(out: Outputs, y: Tensor) -> Tensor:
    """The negative margin: positive where fooled; -inf for NaN, which fools nobody."""
    return negative_margin(out, y).nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _ascend(
    model: Queried, x: Tensor, y: Tensor, start: Tensor, size: Tensor, most: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The best point on a path of sign steps that shrink: (parameters (N, 3), score (N,))."""
    at, found = start, start
    best = torch.full_like(x[:, 0, 0, 0], -torch.inf)
    for step in range(steps + 1):
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            score = _score(model(move(x, at)), y)
            grad = torch.autograd.grad(score.sum(), at)[0].nan_to_num(0.0) if score.requires_grad else at * 0
        score, at = score.detach(), at.detach()
        found, best = torch.where(column(score > best, at), at, found), torch.maximum(score, best)
        at = torch.minimum(torch.maximum(at + (1 - step / (steps + 1)) * size * grad.sign(), -most), most)
    return found, best
