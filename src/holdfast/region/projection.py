"""The data for a figure of a network's decisions, and of what an attack does to its features, in two dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attacks.base import predict
from ..models import Classifier
from ..outputs import Model
from ..queries import default_batch_size, logits_differ
from ..results import DecisionGrid, Projection
from ..user_input import typed, whole
from .feature_shift import class_centers
from .samples import choose_samples, counted, features_of, json_number, to_float64

DIGITS = 4  # significant digits of the numbers in the JSON
LogitsAt = Callable[[Tensor], Tensor]  # points of a space, (N, D), to logits, both float64 on the CPU


@typed
def projection(
    model: Model,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    *,
    s: float | None = None,
    index: Tensor | None = None,
    limit: int = 200,
    grid: int = 61,
    seed: int = 0,
    batch_size: int | None = None,
) -> Projection:
    """Clean and adversarial points in a plane, and the network's decisions on that plane.

    For images of two values the plane is the box of pixels [0, 1]^2, and every decision is exact. Otherwise it is the
    plane in feature space through the mean of the class centers, along the two directions in which the centers are
    farthest apart. Points are projected onto it, so a point may lie on the other side of a boundary than the network's
    decision, which is in ``prediction``.

    Args:
        model: images to logits or Outputs.
        x: (N, C, H, W), uint8 or float, the clean images.
        y: (N,) labels.
        x_adv: (N, C, H, W), the adversarial ones.
        s: the inference information in units of the logits, or None.
        index: (N,) int64, the samples' own indices, as in ``measure``.
        limit: number of samples, with equal numbers of each class.
        grid: points along each side of the plane, >= 2.
        seed: any integer.
        batch_size: samples at a time; default by the device and the image size.

    Returns:
        The Projection.

    Raises:
        UserError: for no samples, or columns of different length.
    """
    whole("grid", grid, 2)
    samples = choose_samples(model, x, y, x_adv, index, limit, seed)
    batch_size = default_batch_size(samples.one) if batch_size is None else whole("batch_size", batch_size, 1)
    with counted(model) as counting, torch.no_grad():
        both = [(predict(counting, batch.x), predict(counting, batch.x_adv)) for batch in samples.batches(batch_size)]
        outputs, outputs_adv = zip(*both, strict=True)
        z, z_adv = (torch.cat([to_float64(out.logits) for out in outs]) for outs in (outputs, outputs_adv))
        if samples.one.numel() == 2:
            space, batch = "pixels", samples.take(slice(None))
            points, points_adv = (to_float64(images.flatten(1)) for images in (batch.x, batch.x_adv))
            logits_at: LogitsAt | None = _network(counting, samples.one, batch_size)
        else:
            space = "logits" if outputs[0].features is None else "features"
            points, points_adv = (torch.cat([features_of(out) for out in outs]) for outs in (outputs, outputs_adv))
            logits_at = _head(model, space)
            if logits_at is not None and bool(logits_differ(z, logits_at(points)).any()):
                logits_at = None  # the head needs more than these features
        finite = torch.cat([z, z_adv, points, points_adv], 1).isfinite().all(1)
        z, z_adv, points, points_adv, labels = (v[finite] for v in (z, z_adv, points, points_adv, samples.y))
        explained, decisions = None, None
        if space == "pixels":
            origin, axes = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
            low, high = origin, origin + 1
        elif len(points):
            origin, axes, explained = plane(points, labels)
            points, points_adv = ((part - origin) @ axes.T for part in (points, points_adv))
            low, high = _rectangle(torch.cat([points, points_adv]))
        else:
            logits_at = None
        if logits_at is not None and bool((high - low).isfinite().all()):
            decisions = _decisions(logits_at, origin, axes, low, high, grid)
    centers, _ = class_centers(points, labels)
    center_of = dict(zip(labels.unique().tolist(), _rounded(centers), strict=True))
    return Projection(
        exact=space == "pixels",
        space=space,
        explained=None if explained is None else json_number(explained),
        s=None if s is None else float(s),
        classes=z.shape[1],
        y=tuple(labels.tolist()),
        prediction=tuple(z.argmax(1).tolist()),
        prediction_adv=tuple(z_adv.argmax(1).tolist()),
        points=_rounded(points),
        points_adv=_rounded(points_adv),
        centers=tuple(center_of.get(k) for k in range(z.shape[1])),
        grid=decisions,
    )


class Plane(NamedTuple):
    """A plane in feature space.

    Attributes:
        origin: (D,), a point of it.
        axes: (2, D), two orthonormal directions.
        explained: the share of the class centers' scatter that lies in it; None where the centers coincide.
    """

    origin: Tensor
    axes: Tensor
    explained: float | None


def plane(h: Tensor, y: Tensor) -> Plane:
    """The plane through the class centers.

    The origin is the mean of the centers. The directions are those in which the centers scatter most. Where the centers
    lie on one line, or coincide, the directions of the largest scatter of the samples beside it complete them. The
    largest entry of a direction is positive.

    Args:
        h: (N, D) features.
        y: (N,) labels.

    Returns:
        The Plane.

    >>> h = torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 2.0, 0.0], [4.0, 2.0, 0.0]])
    >>> origin, axes, explained = plane(h, torch.tensor([0, 0, 1, 1]))  # centers (2, 0, 0) and (2, 2, 0)
    >>> origin, axes.abs(), explained
    (tensor([2., 1., 0.]), tensor([[0., 1., 0.],
            [1., 0., 0.]]), 1.0)
    """
    centers, _ = class_centers(h, y)
    origin = centers.mean(0)
    axes = h.new_zeros(0, h.shape[1])
    for deviations in (centers - origin, h - origin):
        residual = deviations - deviations @ axes.T @ axes
        _, size, directions = torch.linalg.svd(residual, full_matrices=False)
        new = directions[size > 1e-6 * deviations.norm().clamp_min(torch.finfo(h.dtype).tiny)]
        axes = torch.cat([axes, new])[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    axes = torch.cat([axes, h.new_zeros(2 - len(axes), h.shape[1])])  # zeros where all samples lie on a line
    scatter = float((centers - origin).square().sum())
    explained = float(((centers - origin) @ axes.T).square().sum()) / scatter if scatter > 0 else None
    return Plane(origin, axes, explained)


def _network(model: Model, like: Tensor, batch_size: int) -> LogitsAt:
    """The network itself, from flat pixels. like: images of the shape, dtype and device that it takes."""

    def logits_at(points: Tensor) -> Tensor:
        images = points.to(like.dtype).to(like.device).view(-1, *like.shape[1:])
        return torch.cat([to_float64(predict(model, batch).logits) for batch in images.split(batch_size)])

    return logits_at


def _head(model: Model, space: str) -> LogitsAt | None:
    """The network's head, from features to logits; None for a model that is not this package's."""
    if space == "logits":
        return lambda h: h
    if not isinstance(model, Classifier):
        return None
    # A head that returns transformed features has a method ``read`` for these.
    head, like = getattr(model.head, "read", model.head), model.mean

    def logits_at(h: Tensor) -> Tensor:
        h = h.to(like.dtype).to(like.device)
        return to_float64(head(h).logits * model.logit_scale)

    return logits_at


def _rectangle(points: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of a rectangle around all points, with a border of 5%; never of zero width."""
    low, high = points.amin(0), points.amax(0)
    border = torch.where(high > low, 0.05 * (high - low), 1.0)
    return low - border, high + border


def _decisions(logits_at: LogitsAt, origin: Tensor, axes: Tensor, low: Tensor, high: Tensor, grid: int) -> DecisionGrid:
    """Predicted class and margin on a grid of the plane."""
    across, up = (torch.linspace(float(low[i]), float(high[i]), grid, dtype=torch.float64) for i in (0, 1))
    points = torch.stack([across.repeat(grid), up.repeat_interleave(grid)], 1)  # row by row
    top = logits_at(origin + points @ axes).topk(2, dim=1)
    return DecisionGrid(
        across=_rounded(across),
        up=_rounded(up),
        prediction=tuple(map(tuple, top.indices[:, 0].view(grid, grid).tolist())),
        margin=_rounded((top.values[:, 0] - top.values[:, 1]).view(grid, grid)),
    )


def _rounded(values: Tensor) -> tuple[Any, ...]:
    """Nested tuples of numbers with four digits; None for NaN and infinity."""
    if values.ndim > 1:
        return tuple(map(_rounded, values))
    return tuple(float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values.tolist())
