"""Robust or broken: a verdict on each sample, with the x_adv that breaks it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import at_least
from ..threat import Threat
from .network import Affine, Array, box_around, checked, forward, logit_differences_of, scaled
from .program import TIE, Program, bounds_of, tightened

FAR = 1e-4  # a gap that neither projection nor float32 can turn


@dataclass(frozen=True)
class Exact:
    """Per-sample columns, on the CPU.

    status: N times "robust" (proved), "broken" (x_adv shows it) or "unknown" (a tie, or out of time); x_adv: float32,
    of x's shape, x itself where nothing is broken; seconds: (N,) float64, what each sample took.
    ``robust``, ``broken``, ``unknown``: (N,) bool.
    """

    status: tuple[str, ...]
    x_adv: Tensor
    seconds: Tensor

    @property
    def robust(self) -> Tensor:
        return self._is("robust")

    @property
    def broken(self) -> Tensor:
        return self._is("broken")

    @property
    def unknown(self) -> Tensor:
        return self._is("unknown")

    def _is(self, name: str) -> Tensor:
        return torch.tensor([status == name for status in self.status], dtype=torch.bool)


def decide(
    layers: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor, threat: Threat, *, seconds: float = 60.0
) -> Exact:
    """Prove each sample robust, or show the x_adv that breaks it. All arithmetic in float64.

        robust: max over t != y and over x_adv of  logit_t - logit_y  <  -tie      (proved for all x_adv)
        broken: some t and x_adv with              logit_t - logit_y  >   tie      (x_adv is returned)

    tie is ``TIE`` times the largest sum of absolute terms, |w| a + |b|, that interval bounds allow in any logit: about
    16 roundings of float32. In between argmax is left to rounding, and the sample is "unknown", as it is after
    ``seconds``. Broken means argmax != y: an exact tie is not counted for either side, whichever index is lower.

    "robust" is proved for all that ``Threat.violation`` forgives, so no judged attack can contradict it; x_adv of a
    "broken" one is float32, projected on the threat itself, and measured after that. A sample that is wrong already is
    broken by x. HiGHS works to tolerances of 1e-6: they can only add points, so "infeasible" holds of the network, and
    each point it offers is measured by a forward pass.

    Args:
        layers: (weight (out, in), bias (out,)) in order, a ReLU between each two; ``layers_of`` reads them off a model.
        x: (N, ...) float in the threat's box, flattened to (N, in); read as float32. y: (N,) int64 in 0 .. K-1.
        threat: linf. seconds: at most so many a sample, > 0; a program just begun ends a little later.

    Raises UserError for another norm, shapes that do not fit, weights that are not finite, pixels outside the box.
    It fails, by "unknown", on networks with more than about a hundred unstable ReLUs.

    >>> linear = [(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2))]    # z_0 - z_1 = a + 2 b, by 3 eps at most
    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])                   # 1.5 here: robust below eps = 0.5
    >>> [decide(linear, x, y, Threat("linf", eps, -1, 1)).status for eps in (0.499, 0.5, 0.501)]
    [('robust',), ('unknown',), ('broken',)]
    """
    net = checked(layers, x, y, threat)
    at_least("seconds", seconds, above=True)
    status, spent = [], []
    x = x.detach().cpu().to(torch.float32)
    x_adv = x.clone()
    for i, label in enumerate(y.tolist()):
        began = time.perf_counter()
        found, witness = _one(net, x[i : i + 1], label, threat, began + seconds)
        status.append(found)
        if witness is not None:
            x_adv[i] = witness[0]
        spent.append(time.perf_counter() - began)
    return Exact(tuple(status), x_adv, torch.tensor(spent, dtype=torch.float64))


def _one(net: list[Affine], x: Tensor, y: int, threat: Threat, deadline: float) -> tuple[str, Tensor | None]:
    """The status of one sample, x (1, ...), and what breaks it."""
    box = box_around(x, threat)
    whole, (net, unit) = net, scaled(net, box)
    net = logit_differences_of(net, y)

    def witness(point: Array) -> Tensor | None:
        x_adv = threat.project(torch.from_numpy(point).to(torch.float32).view_as(x), x)
        logits = forward(whole, x_adv.flatten().double().numpy())  # of the network as it was given
        gap = np.delete(logits, y).max() - logits[y]
        return x_adv if gap > TIE * unit and float(threat.violation(x_adv, x)) == 0 else None

    found = witness(x.flatten().double().numpy())
    bounds = bounds_of(net, box)
    if found is None and len(net) > 2 and bounds[-1][1].max() >= -TIE:
        bounds = tightened(net, box, bounds)
    open_ = np.flatnonzero(bounds[-1][1] >= -TIE)
    program = Program.of(net[:-1], box, bounds)
    heights = {}
    for t in open_[np.argsort(-bounds[-1][1][open_])]:
        if found is not None:
            break
        height, point = program.relaxed(net[-1][0][t], net[-1][1][t])
        if height >= -TIE:
            heights[int(t)] = height
            found = witness(point)
    todo, tied = sorted(heights, key=lambda t: -heights[t]), False
    while todo and found is None and time.perf_counter() < deadline:
        late = []
        for left, t in enumerate(todo):
            share = (deadline - time.perf_counter()) / (len(todo) - left)
            state, found = _settle(program, (net[-1][0][t], net[-1][1][t]), witness, time.perf_counter() + share)
            if found is not None:
                break
            tied |= state == "some"
            late += [t] * (state == "late")
        todo = late
    if found is not None:
        return "broken", found
    return "unknown" if todo or tied else "robust", None


def _settle(
    program: Program, gap: tuple[Array, float], witness: Callable[[Array], Tensor | None], until: float
) -> tuple[str, Tensor | None]:
    """("none", None) if no run reaches the gap, ("some", x_adv or None for a tie), ("late", None) out of time."""
    state = "none"
    for least in (-TIE, FAR):  # a run that cannot be shown to be wrong may hide one that can
        answer, points = program.search(*gap, least, until)
        found = next((w for w in map(witness, points) if w is not None), None)
        if found is not None or answer != "some":
            return state if answer == "none" else answer, found
        state = "some"
    return state, None
