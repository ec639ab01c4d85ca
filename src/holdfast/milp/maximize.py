"""The largest value of each logit difference over the threat: between a point that reaches it and a proof."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, at_least
from ..threat import Threat
from ..user_input import typed
from .network import Affine, Array, box_around, checked, forward, logit_differences_of, scaled
from .program import ACCURACY, TIE, Program, preactivation_bounds, tighten


@dataclass(frozen=True)
class WorstLogitDifferences:
    """The maximum of each logit_j - logit_y over the threat: per-sample columns, on the CPU.

    Args:
        low: (N, K) float64, in units of the logits, 0 at y; no maximum is lower.
        high: (N, K) float64, 0 at y; no maximum is higher.
        x_adv: (N, K, ...) float32, the point that reaches each low; x itself at y.
        solved: (N,) bool, whether every program ended in time.
        seconds: (N,) float64, the time that each sample took.
    """

    low: Tensor
    high: Tensor
    x_adv: Tensor
    solved: Tensor
    seconds: Tensor


@typed
def maximize(
    layers: Sequence[tuple[Tensor, Tensor]],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    classes: str = "worst",
    start: Sequence[Tensor] = (),
    seconds: float = 60.0,
) -> WorstLogitDifferences:
    """Maximise every logit difference logit_j - logit_y over the threat. All arithmetic is float64.

        low_j <= max over x_adv of  logit_j - logit_y  <= high_j,   s*_j = that maximum - its value at x

    low is measured by a forward pass at a float32 x_adv in the threat. high is proved for all that
    ``Threat.violation`` forgives: it is HiGHS's dual bound plus what HiGHS's tolerances can take off it (1e-7 for each
    unit of a variable's range, and 4e-6 of the logits' scale, which covers float32's rounding too). So no attack
    exceeds high, and a sample is robust if high < 0 for all j != y; ``decide`` agrees unless a difference is within a
    tie of zero. Where all programs ended, high - low is about 5e-5 of the logits' scale (see ``decide``), plus the rise
    between eps and the eps that ``violation`` forgives.

    Where it fails: on networks with more than about fifty unstable ReLUs low and high stay far apart.

    Args:
        layers: (weight (out, in), bias (out,)) in order, with a ReLU between each two, as ``layers_of`` gives them.
        x: (N, ...) float images in the threat's box, read as float32 and flattened to (N, in).
        y: (N,) int64 labels in 0 .. K-1.
        threat: An linf threat.
        classes: "worst" solves for the largest difference alone, the sample's worst margin. It stops on another class
            as soon as high_j is below that, and is three to eight times faster. "all" solves for every class.
        start: Known x_adv, each (N, ...). No low is below what they reach.
        seconds: The time limit for each sample, > 0. The last program may end a little later; a program that is out of
            time leaves the bound that it had.

    Returns:
        The WorstLogitDifferences of the N samples.

    Raises:
        UserError: As ``decide``; unknown ``classes``; a ``start`` of another shape than x.

    >>> linear = [(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2))]   # z_1 - z_0 = -a - 2 b, rises by 3 eps
    >>> worst = maximize(linear, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), Threat("linf", 0.25))
    >>> [[round(float(v), 3) for v in side[0]] for side in (worst.low, worst.high)]
    [[0.0, -0.75], [0.0, -0.75]]
    """
    net = checked(layers, x, y, threat)
    at_least("seconds", seconds, above=True)
    if classes not in ("worst", "all"):
        raise UserError(f"classes must be 'worst' or 'all', got {classes!r}.")
    for known in start:
        if known.shape != x.shape:
            raise UserError(f"start must hold tensors of x's shape {tuple(x.shape)}, got {tuple(known.shape)}.")
    count, shape = len(net[-1][1]), tuple(x.shape[1:])
    x = x.detach().cpu().to(torch.float32)
    low, high = (torch.zeros(len(x), count, dtype=torch.float64) for _ in range(2))
    x_adv = x[:, None].repeat(1, count, *[1] * len(shape))
    solved, spent = [], []
    for i, label in enumerate(y.tolist()):
        began = time.perf_counter()
        points = [known[i : i + 1].detach().cpu().to(torch.float32) for known in start]
        one = _maximize_one(net, x[i : i + 1], label, threat, classes == "all", points, began + seconds)
        others = torch.arange(count) != label
        low[i, others], high[i, others], x_adv[i, others] = one.low, one.high, one.x_adv
        solved.append(one.solved)
        spent.append(time.perf_counter() - began)
    return WorstLogitDifferences(
        low, high, x_adv, torch.tensor(solved, dtype=torch.bool), torch.tensor(spent, dtype=torch.float64)
    )


class _BestPoints:
    """The largest value seen of each logit difference, (K - 1,) in units of the logits' scale, and its x_adv."""

    def __init__(self, net: list[Affine], x: Tensor, y: int, threat: Threat, unit: float) -> None:
        self.net, self.x, self.y, self.threat, self.unit = net, x, y, threat, unit
        self.low = np.full(len(net[-1][1]) - 1, -np.inf)
        self.x_adv = x.repeat(len(self.low), *[1] * (x.ndim - 1))

    def update(self, point: Array) -> None:
        """Measure the network as it was given at the float32 point of the threat that is nearest to this one."""
        x_adv = self.threat.project(torch.from_numpy(point).to(torch.float32).view_as(self.x), self.x)
        if float(self.threat.violation(x_adv, self.x)) > 0:  # NaN is infinite there
            return
        logits = forward(self.net, x_adv.flatten().double().numpy())
        differences = np.delete(logits - logits[self.y], self.y) / self.unit
        better = differences > self.low
        self.low[better] = differences[better]
        self.x_adv[torch.from_numpy(better)] = x_adv


class _One(NamedTuple):
    """A ``WorstLogitDifferences`` of one sample, without its own class: (K-1,) each, x_adv (K-1, ...)."""

    low: Tensor
    high: Tensor
    x_adv: Tensor
    solved: bool


def _maximize_one(
    net: list[Affine], x: Tensor, y: int, threat: Threat, every: bool, start: Sequence[Tensor], deadline: float
) -> _One:
    """The answer for one sample, x (1, ...)."""
    box = box_around(x, threat)
    given, (net, unit) = net, scaled(net, box)
    net = logit_differences_of(net, y)
    weights, biases = net[-1]
    best = _BestPoints(given, x, y, threat, unit)
    for known in (x, *start):
        best.update(known.flatten().double().numpy())
    bounds = preactivation_bounds(net, box)
    high = bounds[-1][1] + TIE

    def unsolved() -> list[int]:
        """The classes whose high is above the low that counts, the highest first."""
        floor = best.low if every else np.full_like(high, best.low.max())
        return [int(j) for j in np.argsort(-high) if high[j] > floor[j] + ACCURACY]

    todo = unsolved()
    if todo:
        if len(net) > 2:
            bounds = tighten(net, box, bounds)
            high = np.minimum(high, bounds[-1][1] + 4 * TIE)
        program = Program.of(net[:-1], box, bounds)
        for j in todo:
            if j in unsolved():
                top, point = program.relaxation(weights[j], biases[j])
                high[j] = min(high[j], top + program.slack)
                best.update(point)
        todo = unsolved()
    while todo and time.perf_counter() < deadline:
        late = []
        for done, j in enumerate(todo):
            if j not in unsolved():  # a point found for another class has settled this one
                continue
            share = (deadline - time.perf_counter()) / (len(todo) - done)
            least = (best.low[j] if every else best.low.max()) + ACCURACY
            state, top, points = program.maximum(weights[j], biases[j], least, time.perf_counter() + share)
            high[j] = min(high[j], top + program.slack)
            for point in points:
                best.update(point)
            late += [j] * (state == "late")
        todo = late
    low = torch.from_numpy(best.low * unit)
    return _One(low, torch.maximum(torch.from_numpy(high * unit), low), best.x_adv, solved=not todo)
