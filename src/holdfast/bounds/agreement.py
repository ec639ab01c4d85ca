"""Whether a network answers what the operators that one run of it showed compute: else no bound is of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..outputs import Queried, out_of_memory
from .graph import CannotBound
from .linear import Region, all_lines, forward, least, take
from .rounding import HUGE
from .steps import Box, Step

AGREES = 1e-3  # how far the network may be from its graph in float64, relative to its largest logit


def compare_answers(
    queried: Queried, steps: Sequence[Step], classes: int, x: Tensor, region: Region
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Compare a network's answers with its graph's, at the images and beside them: in a batch, alone, with gradients.

    Args:
        queried: the network, float32.
        steps: of its graph, in float64.
        classes: how many logits the graph returns.
        x: (N, *shape) images.
        region: around them.

    Returns:
        (N,) bool, which images the network answers with finite logits; (N, K) logits; and what was compared, pairs of
        images and of the graph's logits.

    Raises:
        CannotBound: the network's answers are not what its graph computes.
    """
    finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if not len(x):
        return finite, x.new_zeros(0, classes), []
    compared = []
    share = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(region.center)[:, None]
    beside = (region.box.lo + (region.box.hi - region.box.lo) * share)[:, 0].to(x.dtype)
    for images, more in ((x, beside), (beside, x)):
        point = images.double()[:, None]
        at = replace(region, box=Box(point, point), center=point, eps=0.0)
        last = forward(steps, at, rounding=False).boxes[-1]
        logits = ((last.lo + last.hi) / 2)[:, 0]
        compared.append((images, logits))
        batch = images if len(images) > 1 else torch.cat([images, more])
        try:
            together = queried(batch).logits[: len(images)]
        except Exception as error:
            if len(images) > 1 or not out_of_memory(error):
                raise
            together = queried(images).logits
        answers = [(together, logits), (queried(images[-1:]).logits, logits[-1:])]
        with torch.enable_grad():
            answers.append((queried(images.clone().requires_grad_()).logits.detach(), logits))
        for answer, expected in answers:
            if answer.shape != expected.shape:
                raise CannotBound("the network returns logits of another shape for a batch than for one image.")
            known = answer.isfinite().all(1) & (expected.abs().amax(1) < HUGE)
            apart = (answer.double() - expected).abs().amax(1)
            other = (known & ~(apart <= AGREES * expected.abs().amax(1) + 1e-30)).nonzero()[:, 0]
            if len(other) and not _by_rounding(steps, classes, at, other + len(x) - len(known), answer[other].double()):
                raise CannotBound(
                    "the network's answers are not those of the operators that one run of it showed: it answers by "
                    "batch, by history or at random, or in lower precision."
                )
            finite[-len(known) :] &= known
        if images is x:
            clean = answers[0][0]
    return finite, clean, compared


def _by_rounding(steps: Sequence[Step], classes: int, at: Region, some: Tensor, answers: Tensor) -> bool:
    """Whether float32 may give these answers (n, K) at some of these points, as where large numbers cancel."""
    part, inside = take(forward(steps, at), at, some)
    eye = torch.eye(classes, dtype=torch.float64, device=some.device)
    rows = eye[None, :, None].expand(len(some), -1, 1, -1)
    lines, last = all_lines(steps, part), len(steps) - 1
    low, high = (least(steps, part, lines, inside, last, rows * sign) * sign for sign in (1, -1))
    return bool((part.unbounded | ((low <= answers) & (answers <= high)).all(1)).all())
