"""The 8-bit grid: real images hold multiples of 1/255, so candidates are judged there too.

Where the images are 8-bit (uint8, or multiples of 1/255) and the box is [0, 1], the candidates of attacks of at least
``LONG`` passes that break nothing are also judged rounded to the grid, inside the threat. A sample counts as broken if
either of the two is misclassified. The accuracy of an individual attack counts its own candidates alone, as papers do.
If the model answers 8-bit images otherwise than images beside them, the suite runs a second time on the grid.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ..data import Data, pixels
from ..noise import GridStream, Noise
from ..outputs import Model, Outputs, as_outputs
from ..straight_through import rounded_through
from ..threat import TOLERANCE, Threat, column
from ..user_input import typed

LEVELS = 255
LONG = 40  # passes of an attack from which on one more for the rounded candidate costs little
CHUNK = 4096  # images that are compared with the grid at a time
STEPS, FAR = 3, 0.45  # a line that leaves the grid: its steps, and how far it takes each pixel, in levels
RATIO, SHARE = 5.0, 0.01  # see ``differs_off_grid``


@typed
def is_8bit(data: Data, threat: Threat) -> bool:
    """Whether the images are 8-bit: uint8, or multiples of 1/255 up to rounding, under a threat with the box [0, 1].

    >>> x = torch.tensor([[0.2], [1.0]])  # 51/255 and 255/255
    >>> is_8bit(Data(x, torch.zeros(2), torch.arange(2)), Threat("linf", 0.1))
    True
    """
    if (threat.lo, threat.hi) != (0.0, 1.0):
        return False
    if data.x.dtype == torch.uint8:
        return True
    levels = (part * LEVELS for part in data.x.split(CHUNK))
    return all(bool(((part - part.round()).abs() < 1e-3).all()) for part in levels)


def to_grid(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """x_adv with each pixel rounded to a multiple of 1/255, inside the threat.

    A pixel takes the nearest level that the threat allows. Under l2 and l1, where the nearest levels leave the threat,
    all pixels of the sample are rounded toward x, which only makes the perturbation smaller.

    Args:
        x_adv: (N, ...), in the threat.
        x: (N, ...), 8-bit images as float.
        threat: with the box [0, 1].

    Returns:
        (N, ...), each pixel an integer / 255 as ``pixels`` computes it.

    >>> levels = to_grid(torch.tensor([[0.55, 0.5021]]), torch.tensor([[0.6, 0.6]]), Threat("linf", 0.1)) * 255
    >>> levels.round().tolist()  # 0.5021 is 128.04; of 153 levels, 25 may be taken off
    [[140.0, 128.0]]
    """
    start, delta = (x * LEVELS).round(), (x_adv - x) * LEVELS
    if threat.norm == "linf":
        most = _levels(threat)
        return (start + delta.round().clamp(-most, most)).clamp_(0, LEVELS).div_(LEVELS)
    nearest = (start + delta.round()).clamp_(0, LEVELS).div_(LEVELS)
    toward_x = (start + delta.trunc()).clamp_(0, LEVELS).div_(LEVELS)
    return torch.where(column(threat.violation(nearest, x) == 0, x), nearest, toward_x)


def whole_levels(threat: Threat) -> Threat:
    """The part of a linf threat that lies on the grid: eps is rounded down to whole levels. Other norms stay.

    >>> round(whole_levels(Threat("linf", 0.1)).eps * 255, 6)
    25.0
    """
    levels = _levels(threat)
    return replace(threat, eps=levels / LEVELS) if threat.norm == "linf" and levels else threat


def _levels(threat: Threat) -> int:
    """How many levels a pixel may move under linf."""
    return int(threat.eps * LEVELS * (1 + TOLERANCE))


class OnGrid:
    """A model that is asked on the 8-bit grid alone; gradients pass through the rounding as if it were not there.

    Args:
        model: images to logits or Outputs.

    Source: the straight-through estimator, as in BPDA (Athalye, Carlini and Wagner 2018).
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Outputs:
        return as_outputs(self.model(rounded_through(x * LEVELS) / LEVELS))


def differs_off_grid(model: Model, data: Data, threat: Threat, noise: Noise) -> Tensor:
    """Whether the model answers other things on the 8-bit grid than beside it, at a random point of the threat.

    The model is asked at a point on the grid, and at three equal steps along a line that takes each pixel less than
    half a level away. Along so short a line the logits of a smooth model change at a steady pace: where they follow a
    parabola, no step changes them more than three times as much as both of the others. A sample differs if one step
    changes the logits by more than 1% of their range, and more than five times as much as both of the others.

    Args:
        model: images to logits or Outputs.
        data: 8-bit images.
        threat: with the box [0, 1].
        noise: of these samples.

    Returns:
        (N,) bool.
    """
    x = pixels(data.x)
    on = to_grid(threat.random_start(x, noise), x, threat)
    inward = torch.where(on < 0.5, 1.0, -1.0)  # off the grid, and still in the box
    sign = noise.fold(GridStream.BESIDE).sign(tuple(x.shape[1:]), x.dtype)
    line = torch.where((on == 0) | (on == 1), inward, sign) * FAR / LEVELS
    with torch.no_grad():
        answers = [as_outputs(model(on + line * (step / STEPS))).logits.double() for step in range(STEPS + 1)]
    changes = torch.stack([(there - here).abs().amax(1) for here, there in pairwise(answers)])
    rest, largest = changes.sort(dim=0).values[-2:]
    width = answers[0].amax(1) - answers[0].amin(1)
    return (largest > SHARE * width) & (largest > RATIO * rest)
