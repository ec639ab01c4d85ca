"""The 8-bit grid: real images hold multiples of 1/255, so candidates are judged there too.

Where the images are 8-bit (uint8, or multiples of 1/255) and the box is [0, 1], the candidates of attacks of at least
``LONG`` passes that break nothing are also judged rounded to the grid, inside the threat. A sample counts as broken if
either of the two is misclassified. The accuracy of an individual attack counts its own candidates alone, as papers do.
If the model answers 8-bit images otherwise than images beside them, the suite runs a second time on the grid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..data import Data, pixels
from ..noise import BesideStream, GridStream, Noise
from ..outputs import Model, Outputs, as_outputs
from ..straight_through import rounded_through
from ..threat import TOLERANCE, Threat, column
from ..user_input import typed

LEVELS = 255
LONG = 40  # passes of an attack from which on one more for the rounded candidate costs little
CHUNK = 4096  # images that are compared with the grid at a time
CLOSE, FAR = 0.2, 0.45  # how far from the grid, in levels, the points lie that are compared with a point on it
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

    One point on the grid is compared with two points beside it, each pixel less than half a level away. A smooth model
    answers the three nearly alike. A sample differs if the logits change by more than 1% of their range when the grid
    is left, and by five times as much as between the two points off the grid.

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
    shape = tuple(x.shape[1:])

    def beside(stream: Noise) -> Tensor:
        levels = CLOSE + (FAR - CLOSE) * stream.uniform(shape, x.dtype)
        inward = torch.where(on < 0.5, 1.0, -1.0)  # off the grid, and still in the box
        at_edge = (on == 0) | (on == 1)
        sign = torch.where(at_edge, inward, stream.fold(BesideStream.SIGN).sign(shape, x.dtype))
        return on + sign * levels / LEVELS

    with torch.no_grad():
        points = (on, *(beside(noise.fold(GridStream.BESIDE.numbered(number))) for number in range(2)))
        here, one, other = (as_outputs(model(point)).logits.double() for point in points)
    width = here.amax(1) - here.amin(1)
    leaving = torch.minimum((here - one).abs().amax(1), (here - other).abs().amax(1))
    staying = (one - other).abs().amax(1)
    return (leaving > SHARE * width) & (leaving > RATIO * staying)
