"""How far each gap rises at most: the s* of the min-max problem, between a point that reaches it and a proof."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, at_least
from ..threat import Threat
from .network import Affine, Array, box_around, checked, forward, logit_differences_of, scaled
from .program import CLOSE, TIE, Program, bounds_of, tightened


@dataclass(frozen=True)
class WorstLogitDifferences:
    """Per-sample columns, on the CPU.

    low, high: (N, K) float64, low <= max over the threat of (logit_j - logit_y) <= high, 0 at y, in the logits' units;
    x_adv: (N, K, ...) float32, the point that reaches each low, x itself at y; solved: (N,) bool, whether every program
    ended in time; seconds: (N,) float64, what each sample took.
    """

    low: Tensor
    high: Tensor
    x_adv: Tensor
    solved: Tensor
    seconds: Tensor


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
    """Maximise every gap logit_j - logit_y over the threat. All arithmetic in float64.

        low_j <= max over x_adv of  logit_j - logit_y  <= high_j,   s*_j = that maximum - its value at x

    low is measured, by a forward pass at a float32 x_adv in the threat. high is proved for all that
    ``Threat.violation`` forgives: HiGHS's dual bound, plus what its tolerances can take off it (1e-7 for each unit of a
    variable's range, 4e-6 of the logits' scale, in which float32's rounding has room). So no judged attack exceeds
    high, and a sample is robust if high < 0 for all j != y, as ``exact`` says where no gap is within a tie of zero.
    Where all programs ended, high - low is about 5e-5 of the logits' scale (see ``exact``), and what a gap rises
    between eps and the eps that ``violation`` forgives.

    Args:
        layers, x, y, threat: as for ``exact``.
        classes: "worst" closes the largest gap alone, the sample's worst margin; for the other classes it stops as soon
            as high_j is below that, three to eight times sooner. "all" closes every one.
        start: x_adv known already, each (N, ...): no low is below what they reach.
        seconds: at most so many a sample, > 0; a program just begun ends a little later, with the bound it had.

    Raises UserError as ``exact`` does. It fails, by wide brackets, on networks of more than some fifty unstable ReLUs.

    >>> linear = [(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2))]   # z_1 - z_0 = -a - 2 b, rises by 3 eps
    >>> found = maximize(linear, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), Threat("linf", 0.25))
    >>> [[round(float(v), 3) for v in side[0]] for side in (found.low, found.high)]
    [[0.0, -0.75], [0.0, -0.75]]
    """
    net = checked(layers, x, y, threat)
    at_least("seconds", seconds, above=True)
    if classes not in ("worst", "all"):
        raise UserError(f"classes must be 'worst' or 'all', got {classes!r}.")
    for one in start:
        if one.shape != x.shape:
            raise UserError(f"start must hold tensors of x's shape {tuple(x.shape)}, got {tuple(one.shape)}.")
    count, shape = len(net[-1][1]), tuple(x.shape[1:])
    x = x.detach().cpu().to(torch.float32)
    low, high = (torch.zeros(len(x), count, dtype=torch.float64) for _ in range(2))
    x_adv = x[:, None].repeat(1, count, *[1] * len(shape))
    solved, spent = [], []
    for i, label in enumerate(y.tolist()):
        began = time.perf_counter()
        mine = [known[i : i + 1].detach().cpu().to(torch.float32) for known in start]
        found = _one(net, x[i : i + 1], label, threat, classes == "all", mine, began + seconds)
        others = torch.arange(count) != label
        low[i, others], high[i, others], x_adv[i, others] = found[:3]
        solved.append(found[3])
        spent.append(time.perf_counter() - began)
    return WorstLogitDifferences(
        low, high, x_adv, torch.tensor(solved, dtype=torch.bool), torch.tensor(spent, dtype=torch.float64)
    )


class _Reached:
    """The largest of each gap seen so far, in units of the logits' scale, and where: (K - 1,), (K - 1, ...)."""

    def __init__(self, net: list[Affine], x: Tensor, y: int, threat: Threat, unit: float) -> None:
        self.net, self.x, self.y, self.threat, self.unit = net, x, y, threat, unit
        self.low = np.full(len(net[-1][1]) - 1, -np.inf)
        self.x_adv = x.repeat(len(self.low), *[1] * (x.ndim - 1))

    def see(self, point: Array) -> None:
        """Measure the network as it was given at the float32 point of the threat that is nearest to this one."""
        x_adv = self.threat.project(torch.from_numpy(point).to(torch.float32).view_as(self.x), self.x)
        if float(self.threat.violation(x_adv, self.x)) > 0:  # NaN is no point
            return
        logits = forward(self.net, x_adv.flatten().double().numpy())
        gaps = np.delete(logits - logits[self.y], self.y) / self.unit
        better = gaps > self.low
        self.low[better] = gaps[better]
        self.x_adv[torch.from_numpy(better)] = x_adv


def _one(
    net: list[Affine], x: Tensor, y: int, threat: Threat, every: bool, start: Sequence[Tensor], deadline: float
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(low (K-1,), high (K-1,), x_adv (K-1, ...), solved) of one sample, x (1, ...)."""
    box = box_around(x, threat)
    whole, (net, unit) = net, scaled(net, box)
    net = logit_differences_of(net, y)
    weights, biases = net[-1]
    reached = _Reached(whole, x, y, threat, unit)
    for known in (x, *start):
        reached.see(known.flatten().double().numpy())
    bounds = bounds_of(net, box)
    high = bounds[-1][1] + TIE

    def open_() -> list[int]:
        """The classes that are not closed, the highest first."""
        floor = reached.low if every else np.full_like(high, reached.low.max())
        return [int(j) for j in np.argsort(-high) if high[j] > floor[j] + CLOSE]

    todo = open_()
    if todo:
        if len(net) > 2:
            bounds = tightened(net, box, bounds)
            high = np.minimum(high, bounds[-1][1] + 4 * TIE)
        program = Program.of(net[:-1], box, bounds)
        for j in todo:
            if j in open_():
                top, point = program.relaxed(weights[j], biases[j])
                high[j] = min(high[j], top + program.slack)
                reached.see(point)
        todo = open_()
    while todo and time.perf_counter() < deadline:
        late = []
        for left, j in enumerate(todo):
            if j not in open_():  # what another class reaches can close it
                continue
            share = (deadline - time.perf_counter()) / (len(todo) - left)
            least = (reached.low[j] if every else reached.low.max()) + CLOSE
            state, top, points = program.largest(weights[j], biases[j], least, time.perf_counter() + share)
            high[j] = min(high[j], top + program.slack)
            for point in points:
                reached.see(point)
            late += [j] * (state == "late")
        todo = late
    low = torch.from_numpy(reached.low * unit)
    return low, torch.maximum(torch.from_numpy(high * unit), low), reached.x_adv, not todo
