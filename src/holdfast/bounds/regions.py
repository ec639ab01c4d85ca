"""The images that a proof is about, in float64: all that a threat forgives, or a box for each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from ..threat import Threat, check_images
from .linear import Region
from .lipschitz import l2_radius
from .steps import Box

Allowed = Threat | tuple[Tensor, Tensor]  # a threat, or the lower and upper corner of each image's box
INSIDE = Threat("linf", 1.0)  # the norm whose ball is a box; the region says which box


def region_of(x: Tensor, threat: Threat) -> Region:
    """All that ``Threat.violation`` forgives around float32 images, in float64."""
    center = x.double()[:, None]
    eps = threat.farthest(math.prod(x.shape[1:]))
    lowest, highest = (torch.tensor(edge, dtype=torch.float32).item() for edge in (threat.lo, threat.hi))
    low = (center - eps).clamp_min(min(lowest, threat.lo)).minimum(center)
    high = (center + eps).clamp_max(max(highest, threat.hi)).maximum(center)
    return Region(Box(low, high), center, threat, eps)


def region_in(x: Tensor, lo: Tensor, hi: Tensor) -> Region:
    """The box from lo to hi of each of the images x, in float64."""
    return Region(Box(lo.double()[:, None], hi.double()[:, None]), x.double()[:, None], INSIDE, 0.0)


def farthest(x: Tensor, region: Region) -> Tensor:
    """The l2 distance from each of the images x to the farthest point of its region, at most, (N,)."""
    dim = math.prod(x.shape[1:])
    if region.threat is not INSIDE:
        distance = l2_radius(region.threat, dim, region.eps)
        return torch.full((len(x),), distance, dtype=torch.float64, device=x.device)
    away = torch.maximum(region.box.hi - region.center, region.center - region.box.lo)
    return away.flatten(1).norm(dim=1) * (1 + (dim + 2) * 2.0**-52)


def check_allowed(x: Tensor, allowed: Allowed) -> None:
    """Refuse images outside a threat's box, or boxes that are of another shape, empty or without the image.

    Args:
        x: (N, *shape) float images.
        allowed: the threat, or both corners.

    Raises:
        UserError: it says which.
    """
    if isinstance(allowed, Threat):
        check_images(x, allowed)
        return
    for name, corner in zip(("lower", "upper"), allowed, strict=True):
        if (corner.shape, corner.dtype, corner.device) != (x.shape, x.dtype, x.device):
            raise UserError(
                f"the {name} corners of the boxes must be {x.dtype} of the shape {tuple(x.shape)} on {x.device}, as "
                f"the images are, got {corner.dtype} of {tuple(corner.shape)} on {corner.device}."
            )
    lo, hi = allowed
    good = ((lo <= x) & (x <= hi) & lo.isfinite() & hi.isfinite()).flatten(1).all(1)
    if not bool(good.all()):
        raise UserError(
            f"the box of image {int((~good).nonzero()[0, 0])} must be finite and hold the image, lo <= x <= hi in "
            "every pixel: its label is compared with the prediction there."
        )
