"""The worst patch of each image: a grid over places with a short attack at each, then a long one at the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attacks import apgd
from ..attacks.base import predict
from ..losses import negative_margin
from ..noise import Noise, PatchStream
from ..outputs import Model, Outputs, Queried, frozen_eval
from ..threat import Threat, column
from ..user_input import whole
from .threats import Patch

PLACES = 64  # at most so many are tried
SHORT, LONG = 5, 50  # steps of the attack at each place, and at the best
BEST = 4  # places


@dataclass(frozen=True)
class InPatch(Threat):
    """Free values in a patch. The last channel of x is its mask, which selects with the rows: (N, C + 1, H, W)."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest image that differs from x in the patch alone."""
        free = torch.where(x[:, -1:] > 0, x_adv[:, :-1].clamp(self.lo, self.hi), x[:, :-1])
        return torch.cat([free, x[:, -1:]], 1)

    def random_start(self, x: Tensor, noise: Noise) -> Tensor:
        """Uniform values in the patch."""
        return self.project(self.lo + (self.hi - self.lo) * noise.uniform(tuple(x.shape[1:]), x.dtype), x)


class WithoutMask(Queried):
    """A model that is shown images without their last channel."""

    def __call__(self, x: Tensor) -> Outputs:
        """(N, C + 1, H, W) -> Outputs."""
        return super().__call__(x[:, :-1])


def places_of(threat: Patch, shape: tuple[int, int], most: int = PLACES) -> Tensor:
    """The places that are tried, (P, 2) int64 of top and left: all of them, or a grid of at most so many.

    >>> len(places_of(Patch(5, 5), (8, 8))), len(places_of(Patch(5, 5), (28, 28)))
    (16, 64)
    """
    rows, cols = shape[0] - threat.height + 1, shape[1] - threat.width + 1
    n_rows, n_cols = rows, cols
    if rows * cols > most:
        n_rows = min(rows, max(math.isqrt(most), most // cols))
        n_cols = min(cols, most // n_rows)
    tops, lefts = (torch.linspace(0, count - 1, n).round().long() for count, n in ((rows, n_rows), (cols, n_cols)))
    return torch.cartesian_prod(tops, lefts)


def worst_patch(
    model: Model, x: Tensor, y: Tensor, threat: Patch, *, noise: Noise, places: int = PLACES, steps: int = LONG
) -> tuple[Tensor, Tensor]:
    """The patch of each image, place and values, with the smallest margin.

    Auto-PGD with 5 steps is run at each place, with all values of the box allowed in the patch; on each image that no
    place fooled it is run again with more steps at the four places with the smallest margins. Like an attack, it makes
    no claim.

    Args:
        model: images to logits or Outputs.
        x: (N, C, H, W) in [0, 1].
        y: (N,) labels.
        threat: the size of the patch.
        noise: of these samples.
        places: at most so many are tried, on a grid where there are more.
        steps: at each of the best places, >= 1.

    Returns:
        (x_adv (N, C, H, W), its place (N, 2): top and left).
    """
    whole("places", places, 1)
    whole("steps", steps, 1)
    tried = places_of(threat, (x.shape[-2], x.shape[-1]), places).to(x.device)
    scores = torch.full((len(x), len(tried)), -torch.inf, dtype=x.dtype, device=x.device)
    best, found = x.clone(), tried[:1].repeat(len(x), 1)
    best_score = torch.full_like(scores[:, 0], -torch.inf)

    def attack(rows: Tensor, at: Tensor, own: Noise, n_steps: int) -> Tensor:
        nonlocal best_score
        masked = torch.cat([x[rows], mask_of(x[rows], at, threat)], 1)
        inside = InPatch("linf", 1.0)
        x_adv = apgd(
            WithoutMask(model), masked, y[rows], inside, score=negative_margin, noise=own[rows], steps=n_steps
        )[:, :-1]
        score = negative_margin(predict(model, x_adv), y[rows]).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        better = score > best_score[rows]
        best[rows] = torch.where(column(better, x_adv), x_adv, best[rows])
        found[rows] = torch.where(column(better, at), at, found[rows])
        best_score[rows] = torch.maximum(score, best_score[rows])
        return score

    with frozen_eval(model):
        rows = torch.arange(len(x), device=x.device)
        for number, place in enumerate(tried):
            scores[rows, number] = attack(
                rows, place.expand(len(rows), 2), noise.fold(PatchStream.PLACE, number), SHORT
            )
            rows = rows[best_score[rows] <= 0]
            if not len(rows):
                return best, found
        order = scores.topk(min(BEST, len(tried)), dim=1).indices
        for number in range(order.shape[1]):
            if len(rows):
                attack(rows, tried[order[rows, number]], noise.fold(PatchStream.BEST, number), steps)
                rows = rows[best_score[rows] <= 0]
    return best, found


def mask_of(x: Tensor, places: Tensor, threat: Patch) -> Tensor:
    """1 in each image's patch and 0 elsewhere, (N, 1, H, W).

    Args:
        x: (N, C, H, W).
        places: (N, 2), top and left.
        threat: the size of the patch.
    """
    rows, cols = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    top, left = places[:, :1], places[:, 1:]
    in_rows, in_cols = (rows >= top) & (rows < top + threat.height), (cols >= left) & (cols < left + threat.width)
    return (in_rows[:, :, None] & in_cols[:, None, :])[:, None].to(x.dtype)
