"""What is needed to draw a network's decisions and what an attack does to its features in two dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attacks.base import predict
from ..models import Classifier
from ..outputs import Model
from ..queries import default_batch_size, logits_differ
from .feature_shift import class_centers
from .samples import asking, chosen, features_of, number, wide

DIGITS = 4  # that a number in the JSON keeps


def picture(
    model: Model,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    *,
    s: float | None = None,
    index: Tensor | None = None,
    most: int = 200,
    grid: int = 61,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Clean and adversarial points in a plane, and what the network decides on it, ready for JSON.

    Images of two values are drawn as they are: the plane is the box of pixels [0, 1]^2 and every decision is the
    network's own. Else it is a plane in feature space, through the mean of the class centers, along the two directions
    in which these lie farthest apart: points are projected on it, so one may lie on the other side of a border than the
    network puts it; what it decides is in ``prediction``.

    Args: x, x_adv: (N, C, H, W), uint8 or float; y: (N,); s: in units of the logits; index, most, seed: which samples,
    as in ``measure``; grid: points along each side, at least 2.

    Returns
        exact: whether it is the box of pixels. space: "pixels", "features" or "logits".
        explained: the share of the scatter between class centers that lies in the plane; None for one class.
        s; classes: how many. y, prediction, prediction_adv: a label for each point.
        points, points_adv, centers: [across, up] of each point, and of each class (None where it does not occur).
        grid: across, up (``grid`` values each); prediction[i][j] and margin[i][j] (largest logit - second) are those
        at (across[j], up[i]): 0 < margin <= s is the inference region. None where features cannot be put through the
        head by themselves (a model of another make).

    Raises UserError for no samples, or columns of different length.
    """
    asked = chosen(model, x, y, x_adv, index, most, seed)
    size = batch_size or default_batch_size(asked.x)
    with asking(model) as counted, torch.no_grad():
        clean, attacked = ([predict(counted, part) for part in images.split(size)] for images in (asked.x, asked.x_adv))
        z, z_adv = (torch.cat([wide(out.logits) for out in answers]) for answers in (clean, attacked))
        if asked.x[0].numel() == 2:
            space = "pixels"
            points, points_adv = (wide(images.flatten(1)) for images in (asked.x, asked.x_adv))
            read: Read | None = _network(counted, asked.x, size)
        else:
            space = "logits" if clean[0].features is None else "features"
            points, points_adv = (torch.cat([features_of(out) for out in answers]) for answers in (clean, attacked))
            read = _head(model, space)
            if read is not None and bool(logits_differ(z, read(points)).any()):
                read = None  # a head that asks for more than features
        finite = torch.cat([z, z_adv, points, points_adv], 1).isfinite().all(1)
        z, z_adv, points, points_adv, labels = (v[finite] for v in (z, z_adv, points, points_adv, asked.y.cpu()))
        explained, drawn = None, None
        if space == "pixels":
            origin, axes = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
            low, high = origin, origin + 1
        elif len(points):
            origin, axes, explained = plane(points, labels)
            points, points_adv = ((part - origin) @ axes.T for part in (points, points_adv))
            low, high = _around(torch.cat([points, points_adv]))
        else:
            read = None
        if read is not None:
            drawn = _drawn(read, origin, axes, low, high, grid)
    centers, _ = class_centers(points, labels)
    where = dict(zip(labels.unique().tolist(), _rounded(centers), strict=True))
    return {
        "exact": space == "pixels",
        "space": space,
        "explained": None if explained is None else number(explained),
        "s": None if s is None else float(s),
        "classes": z.shape[1],
        "y": labels.tolist(),
        "prediction": z.argmax(1).tolist(),
        "prediction_adv": z_adv.argmax(1).tolist(),
        "points": _rounded(points),
        "points_adv": _rounded(points_adv),
        "centers": [where.get(k) for k in range(z.shape[1])],
        "grid": drawn,
    }


def plane(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float | None]:
    """The plane through the class centers: its origin (D,), two orthonormal directions (2, D), and what it explains.

    origin: the mean of the centers. Directions: in which the centers scatter most; where these lie on one line, or
    coincide, in which the samples scatter most beside it. A direction's largest entry is positive. explained: the share
    of the centers' scatter, None where they coincide.

    Args: h: (N, D); y: (N,).

    >>> h = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 2.0, 0.0], [4.0, 2.0, 0.0]])
    >>> origin, axes, explained = plane(h, torch.tensor([0, 0, 1, 1]))  # centers (2, 0, 0) and (2, 2, 0)
    >>> origin, axes.abs(), explained
    (tensor([2., 1., 0.]), tensor([[0., 1., 0.],
            [1., 0., 0.]]), 1.0)
    """
    centers, _ = class_centers(h, y)
    origin = centers.mean(0)
    axes = h.new_zeros(0, h.shape[1])
    for spread in (centers - origin, h - origin):
        beside = spread - spread @ axes.T @ axes
        _, size, ways = torch.linalg.svd(beside, full_matrices=False)
        new = ways[size > 1e-6 * spread.norm().clamp_min(torch.finfo(h.dtype).tiny)]
        axes = torch.cat([axes, new])[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    axes = torch.cat([axes, h.new_zeros(2 - len(axes), h.shape[1])])  # fewer where no sample leaves a line
    scatter = float((centers - origin).square().sum())
    explained = float(((centers - origin) @ axes.T).square().sum()) / scatter if scatter > 0 else None
    return origin, axes, explained


Read = Callable[[Tensor], Tensor]  # points of a space, (N, D), to logits, both float64 on the CPU


def _network(model: Model, like: Tensor, size: int) -> Read:
    """Pixels to logits: the network itself. like: images of the shape and kind that it takes."""

    def read(points: Tensor) -> Tensor:
        images = points.to(like.dtype).to(like.device).view(-1, *like.shape[1:])
        return torch.cat([wide(predict(model, part).logits) for part in images.split(size)])

    return read


def _head(model: Model, space: str) -> Read | None:
    """Features to logits: what the network decides from them."""
    if space == "logits":
        return lambda h: h
    if not isinstance(model, Classifier):
        return None
    decide, like = getattr(model.head, "read", model.head), model.mean  # some heads report what they made of features

    def read(h: Tensor) -> Tensor:
        h = h.to(like.dtype).to(like.device)
        return wide(decide(h).logits * model.logit_scale)

    return read


def _around(points: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of a rectangle around all points, a little larger; never flat."""
    low, high = points.amin(0), points.amax(0)
    room = torch.where(high > low, 0.05 * (high - low), 1.0)
    return low - room, high + room


def _drawn(read: Read, origin: Tensor, axes: Tensor, low: Tensor, high: Tensor, grid: int) -> dict[str, Any]:
    """Predicted class and margin on a grid of the plane."""
    across, up = (torch.linspace(float(low[i]), float(high[i]), grid, dtype=torch.float64) for i in (0, 1))
    at = torch.stack([across.repeat(grid), up.repeat_interleave(grid)], 1)  # row by row
    z = read(origin + at @ axes)
    top = z.topk(2, dim=1)
    return {
        "across": _rounded(across),
        "up": _rounded(up),
        "prediction": top.indices[:, 0].view(grid, grid).tolist(),
        "margin": _rounded((top.values[:, 0] - top.values[:, 1]).view(grid, grid)),
    }


def _rounded(values: Tensor) -> list[Any]:
    """Nested lists of numbers with four digits; None for what is no number."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()]
