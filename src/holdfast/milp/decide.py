"""Robust or broken: a decision for each sample, with the x_adv that breaks it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import at_least
from ..threat import Threat
from ..user_input import typed
from .network import Affine, Array, box_around, checked, forward, logit_differences_of, scaled
from .program import TIE, Program, preactivation_bounds, tighten

CLEAR = 1e-4  # of the logits' scale: neither projection nor float32 rounding changes the sign of such a difference


@dataclass(frozen=True)
class Decision:
    """What is known of each sample: per-sample columns, on the CPU.

    Args:
        status: N times "robust" (proved), "broken" (x_adv shows it) or "unknown" (a tie, or out of time).
        x_adv: float32, of x's shape; x itself where nothing is broken.
        seconds: (N,) float64, the time that each sample took.
    """

    status: tuple[str, ...]
    x_adv: Tensor
    seconds: Tensor

    @property
    def robust(self) -> Tensor:
        """(N,) bool."""
        return self._is("robust")

    @property
    def broken(self) -> Tensor:
        """(N,) bool."""
        return self._is("broken")

    @property
    def unknown(self) -> Tensor:
        """(N,) bool."""
        return self._is("unknown")

    def _is(self, name: str) -> Tensor:
        return torch.tensor([status == name for status in self.status], dtype=torch.bool)


@typed
def decide(
    layers: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor, threat: Threat, *, seconds: float = 60.0
) -> Decision:
    """Prove each sample robust, or give the x_adv that breaks it. All arithmetic is float64.

        robust: max over t != y and over x_adv of  logit_t - logit_y  <  -tie      (proved for all x_adv)
        broken: some t and x_adv with              logit_t - logit_y  >   tie      (x_adv is returned)

    tie is ``TIE`` times the largest sum of absolute terms, |w| a + |b|, that interval bounds allow in any logit: about
    16 roundings of float32. In between, rounding decides the argmax, and the sample is "unknown"; so it is when
    ``seconds`` run out. An exact tie counts for neither side, whichever index is lower.

    "robust" holds for all that ``Threat.violation`` forgives, so no attack can contradict it. The x_adv of a "broken"
    sample is float32, projected on the threat itself, and measured after that. A sample that is misclassified already
    is broken by x. HiGHS works to tolerances of 1e-6. They can only add points: "infeasible" is therefore true of the
    network, and each point that HiGHS offers is measured by a forward pass.

    Where it fails: on networks with more than about a hundred unstable ReLUs most samples are "unknown".

    Args:
        layers: (weight (out, in), bias (out,)) in order, with a ReLU between each two, as ``layers_of`` gives them.
        x: (N, ...) float images in the threat's box, read as float32 and flattened to (N, in).
        y: (N,) int64 labels in 0 .. K-1.
        threat: An linf threat.
        seconds: The time limit for each sample, > 0. The last program may end a little later.

    Returns:
        A Decision for the N samples.

    Raises:
        UserError: Another norm, shapes that do not fit, weights that are not finite, or pixels outside the box.

    >>> linear = [(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2))]    # z_0 - z_1 = a + 2 b falls by 3 eps
    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])                   # from 1.5 here: robust below eps = 0.5
    >>> [decide(linear, x, y, Threat("linf", eps, -1, 1)).status for eps in (0.499, 0.5, 0.501)]
    [('robust',), ('unknown',), ('broken',)]
    """
    net = checked(layers, x, y, threat)
    at_least("seconds", seconds, above=True)
    statuses, spent = [], []
    x = x.detach().cpu().to(torch.float32)
    x_adv = x.clone()
    for i, label in enumerate(y.tolist()):
        began = time.perf_counter()
        status, witness = _decide_one(net, x[i : i + 1], label, threat, began + seconds)
        statuses.append(status)
        if witness is not None:
            x_adv[i] = witness[0]
        spent.append(time.perf_counter() - began)
    return Decision(tuple(statuses), x_adv, torch.tensor(spent, dtype=torch.float64))


def _decide_one(net: list[Affine], x: Tensor, y: int, threat: Threat, deadline: float) -> tuple[str, Tensor | None]:
    """The status of one sample, x (1, ...), and the x_adv that breaks it."""
    box = box_around(x, threat)
    given, (net, unit) = net, scaled(net, box)
    net = logit_differences_of(net, y)

    def as_witness(point: Array) -> Tensor | None:
        """The x_adv at this point if it breaks the sample, measured on the network as it was given."""
        x_adv = threat.project(torch.from_numpy(point).to(torch.float32).view_as(x), x)
        logits = forward(given, x_adv.flatten().double().numpy())
        difference = np.delete(logits, y).max() - logits[y]
        return x_adv if difference > TIE * unit and float(threat.violation(x_adv, x)) == 0 else None

    witness = as_witness(x.flatten().double().numpy())
    bounds = preactivation_bounds(net, box)
    if witness is None and len(net) > 2 and bounds[-1][1].max() >= -TIE:
        bounds = tighten(net, box, bounds)
    unproved = np.flatnonzero(bounds[-1][1] >= -TIE)
    program = Program.of(net[:-1], box, bounds)
    upper = {}  # of the classes that the linear programs leave open
    for t in unproved[np.argsort(-bounds[-1][1][unproved])]:
        if witness is not None:
            break
        value, point = program.relaxation(net[-1][0][t], net[-1][1][t])
        if value >= -TIE:
            upper[int(t)] = value
            witness = as_witness(point)
    todo, tied = sorted(upper, key=lambda t: -upper[t]), False
    while todo and witness is None and time.perf_counter() < deadline:
        late = []
        for done, t in enumerate(todo):
            share = (deadline - time.perf_counter()) / (len(todo) - done)
            difference = net[-1][0][t], net[-1][1][t]
            state, witness = _decide_class(program, difference, as_witness, time.perf_counter() + share)
            if witness is not None:
                break
            tied |= state == "feasible"
            late += [t] * (state == "late")
        todo = late
    if witness is not None:
        return "broken", witness
    return "unknown" if todo or tied else "robust", None


def _decide_class(
    program: Program, difference: tuple[Array, float], as_witness: Callable[[Array], Tensor | None], until: float
) -> tuple[str, Tensor | None]:
    """Whether one logit difference can reach -TIE.

    ("infeasible", None): it cannot. ("feasible", x_adv, or None for a tie): it can. ("late", None): out of time.
    """
    state = "infeasible"
    for least in (-TIE, CLEAR):  # the first point found may be a tie; one that breaks the sample may still exist
        answer, points = program.search(*difference, least, until)
        witness = next((w for w in map(as_witness, points) if w is not None), None)
        if witness is not None or answer != "feasible":
            return state if answer == "infeasible" else answer, witness
        state = "feasible"
    return state, None
