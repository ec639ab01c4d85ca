"""Exact robustness of small ReLU networks under linf, by mixed-integer programming: a truth to measure attacks by.

A sample is robust iff no x_adv of the threat has logit_t >= logit_y for a class t != y. Bounds settle much of it,
linear programs some, mixed-integer programs over the unstable ReLUs the rest (Tjeng, Xiao and Tedrake 2019). It uses no
gradient: what hides from gradient attacks does not hide from this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor, nn

from .errors import UserError, at_least
from .heads import Linear as LinearHead
from .models import Classifier
from .models.convnets import Linear as Pixels
from .models.convnets import Mlp
from .threat import TOLERANCE, Threat

TIE = 1e-6  # of the logits' scale: a gap within +- this of zero is called neither robust nor broken
FAR = 1e-4  # a gap that neither projection nor float32 can turn
GAP = 1e9  # relative, to the optimum: the first run that is found ends the search
Array = NDArray[np.float64]
Affine = tuple[Array, Array]  # weight (out, in), bias (out,)


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


def exact(
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
    >>> [exact(linear, x, y, Threat("linf", eps, -1, 1)).status for eps in (0.499, 0.5, 0.501)]
    [('robust',), ('unknown',), ('broken',)]
    """
    net = _checked(layers, x, y, threat)
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


def layers_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each layer of a fully connected ReLU network, float64: what ``exact`` takes.

    model: an nn.Sequential of Flatten, Linear and ReLU (nested ones too), or a Classifier with such a backbone ("mlp",
    "linear", an nn.Sequential) and a linear head: its mean, std and logit_scale become part of the weights. Linear
    layers without a ReLU between them become one. Raises UserError for anything else.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [tuple(weight.shape) for weight, bias in layers_of(model)]
    [(3, 4), (2, 3)]
    """
    parts = [model.backbone, model.head] if isinstance(model, Classifier) else [model]
    layers: list[tuple[Tensor, Tensor]] = []
    apart = True  # whether a ReLU stands between the last layer and the next one
    for module in (module for part in parts for module in _modules(part)):
        if type(module) is nn.Linear:  # a subclass may do anything
            weight = module.weight.detach().cpu().double()
            bias = torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach().cpu().double()
            if not apart:
                before, offset = layers.pop()
                weight, bias = weight @ before, weight @ offset + bias
            layers.append((weight, bias))
            apart = False
        elif type(module) is nn.ReLU and layers:
            apart = True
        elif layers or type(module) is not nn.Flatten or (module.start_dim, module.end_dim) != (1, -1):
            raise UserError(
                "exact knows fully connected ReLU networks, Flatten() and then Linear and ReLU in turn: "
                f"it cannot read {module} as layer {len(layers)}."
            )
    if not layers or apart:
        raise UserError("a network for exact ends with a Linear layer, whose outputs are the logits.")
    if isinstance(model, Classifier):
        weight, bias = layers[-1]
        layers[-1] = (weight * model.logit_scale, bias * model.logit_scale)
        weight, bias = layers[0]
        mean, std = (t.detach().cpu().double().flatten() for t in (model.mean, model.std))
        mean, std = (t.repeat_interleave(weight.shape[1] // len(t)) for t in (mean, std))
        layers[0] = (weight / std, bias - weight @ (mean / std))
    return layers


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """The leaves in the order in which they are applied, as far as the kinds known here go."""
    if type(model) is nn.Sequential:
        for child in model:
            yield from _modules(child)
    elif isinstance(model, Mlp):
        yield from _modules(model.layers)
    elif isinstance(model, LinearHead):
        yield model.linear
    elif not isinstance(model, Pixels):
        yield model


def _checked(layers: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor, threat: Threat) -> list[Affine]:
    """The layers as float64 arrays, once everything fits."""
    if threat.norm != "linf":
        raise UserError(f"exact is defined for linf, got {threat.norm}.")
    if not layers:
        raise UserError("exact needs at least one layer.")
    net: list[Affine] = []
    width = x[:1].numel() if len(x) else layers[0][0].shape[-1]
    for number, (weight, bias) in enumerate(layers):
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[1] != width:
            raise UserError(
                f"layer {number} takes {width} values: expected weight (out, {width}) and bias (out,), "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}."
            )
        net.append((weight.detach().cpu().double().numpy(), bias.detach().cpu().double().numpy()))
        width = len(weight)
        if not all(np.isfinite(part).all() for part in net[-1]):
            raise UserError(f"layer {number} has weights that are NaN or infinite.")
    if width < 2:
        raise UserError("exact needs at least two logits.")
    if y.shape != x.shape[:1] or (len(y) and not (int(y.min()) >= 0 and int(y.max()) < width)):
        raise UserError(f"y must be (N,) = ({len(x)},) labels in 0 .. {width - 1}, got shape {tuple(y.shape)}.")
    if not bool(((x >= threat.lo) & (x <= threat.hi)).all()):
        raise UserError(f"x must lie in the threat's box [{threat.lo}, {threat.hi}].")
    return net


def _one(net: list[Affine], x: Tensor, y: int, threat: Threat, deadline: float) -> tuple[str, Tensor | None]:
    """The status of one sample, x (1, ...), and what breaks it."""
    middle = x.flatten().double().numpy()
    rounding = 2 * torch.finfo(torch.float32).eps * max(abs(threat.lo), abs(threat.hi))
    reach = threat.eps * (1 + TOLERANCE) + rounding  # all that ``violation`` forgives
    box = np.maximum(middle - reach, threat.lo), np.minimum(middle + reach, threat.hi)
    whole, (net, unit) = net, _scaled(net, box)
    last, offset = net[-1]
    net = [*net[:-1], (np.delete(last, y, 0) - last[y], np.delete(offset, y) - offset[y])]  # outputs are gaps now

    def witness(point: Array) -> Tensor | None:
        x_adv = threat.project(torch.from_numpy(point).to(torch.float32).view_as(x), x)
        logits = _forward(whole, x_adv.flatten().double().numpy())  # of the network as it was given
        gap = np.delete(logits, y).max() - logits[y]
        return x_adv if gap > TIE * unit and float(threat.violation(x_adv, x)) == 0 else None

    found = witness(middle)
    bounds = _bounds(net, box)
    if found is None and len(net) > 2 and bounds[-1][1].max() >= -TIE:
        bounds = _tightened(net, box, bounds)
    open_ = np.flatnonzero(bounds[-1][1] >= -TIE)
    program = _Program.of(net[:-1], box, bounds)
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
    program: _Program, gap: tuple[Array, float], witness: Callable[[Array], Tensor | None], until: float
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


def _forward(net: list[Affine], a: Array) -> Array:
    for number, (weight, bias) in enumerate(net):
        a = weight @ (np.maximum(a, 0) if number else a) + bias
    return a


def _interval(layer: Affine, low: Array, high: Array) -> tuple[Array, Array]:
    """Bounds of W a + b over low <= a <= high."""
    weight, bias = layer
    plus, minus = np.maximum(weight, 0), np.minimum(weight, 0)
    return plus @ low + minus @ high + bias, plus @ high + minus @ low + bias


def _scaled(net: list[Affine], box: tuple[Array, Array]) -> tuple[list[Affine], float]:
    """The same network in other units, and the unit of its logits.

    Every pre-activation lies within [-1, 1] by interval bounds, every logit's sum of absolute terms in [0, 1]. ReLU is
    homogeneous, so each layer's unit is free; argmax stays.
    """
    scaled = []
    unit = 1.0
    low, high = box
    for number, (weight, bias) in enumerate(net):
        weight = weight * unit  # what comes in is in units of the layer before
        if number < len(net) - 1:
            size = np.abs(_interval((weight, bias), low, high)).max()
        else:
            size = (np.abs(weight) @ np.maximum(np.abs(low), np.abs(high)) + np.abs(bias)).max()
        unit = float(size) or 1.0
        scaled.append((weight / unit, bias / unit))
        low, high = (np.maximum(side, 0) for side in _interval(scaled[-1], low, high))
    return scaled, unit


def _bounds(net: list[Affine], box: tuple[Array, Array]) -> list[tuple[Array, Array]]:
    """Bounds of each layer's outputs before the ReLU: the tighter of intervals and back-substitution."""
    bounds: list[tuple[Array, Array]] = []
    low, high = box
    for number in range(len(net)):
        by_interval = _interval(net[number], low, high)
        top = _back(net[: number + 1], box, bounds)
        weight, bias = net[number]
        bottom = -_back([*net[:number], (-weight, -bias)], box, bounds)
        bounds.append((np.maximum(by_interval[0], bottom), np.minimum(by_interval[1], top)))
        low, high = (np.maximum(side, 0) for side in bounds[-1])
    return bounds


def _back(net: list[Affine], box: tuple[Array, Array], bounds: list[tuple[Array, Array]]) -> Array:
    """Upper bounds of the last layer's outputs as linear functions of x (CROWN, Zhang et al. 2018).

    From above a ReLU that may be on or off is its chord, from below 0 or z, whichever leaves the smaller area.
    """
    weight, bias = net[-1]
    for (before, offset), (low, high) in zip(net[-2::-1], bounds[len(net) - 2 :: -1], strict=True):
        off, on = high <= 0, low >= 0
        slope = np.where(on, 1.0, np.where(off, 0.0, high / np.where(on | off, 1.0, high - low)))
        lift = np.where(on | off, 0.0, -low * slope)
        under = np.where(on, 1.0, np.where(off, 0.0, (high > -low).astype(float)))
        plus, minus = np.maximum(weight, 0), np.minimum(weight, 0)
        bias = bias + plus @ lift
        weight = plus * slope + minus * under
        weight, bias = weight @ before, bias + weight @ offset
    return _interval((weight, bias), *box)[1]


def _tightened(
    net: list[Affine], box: tuple[Array, Array], bounds: list[tuple[Array, Array]]
) -> list[tuple[Array, Array]]:
    """Bounds of the unstable neurons beyond the first layer by linear programs: fewer binaries, smaller big-Ms."""
    tight = bounds[:1]
    for number in range(1, len(net) - 1):
        low, high = (side.copy() for side in bounds[number])
        program = _Program.of(net[:number], box, tight)
        weight, bias = net[number]
        for i in np.flatnonzero((low < 0) & (high > 0)):
            high[i] = min(high[i], program.relaxed(weight[i], bias[i])[0] + TIE)
            if high[i] > 0:
                low[i] = max(low[i], -program.relaxed(-weight[i], -bias[i])[0] - TIE)
        tight = [*tight, (low, high)]
    top = _back(net, box, tight)
    return [*tight, (bounds[-1][0], np.minimum(bounds[-1][1], top))]


@dataclass(frozen=True)
class _Program:
    """A mixed-integer program whose points are the runs of a ReLU network over a box.

    Variables: x, then for each hidden layer its activations a and a binary d for each unstable ReLU. With z = W a + b
    of the layer before, in [l, u]:  a >= 0,  a >= z,  a <= z - l (1 - d),  a <= u d;  always on: a = z, always off: 0.
    """

    rows: csr_array
    low: Array
    high: Array
    lower: Array
    upper: Array
    binary: NDArray[np.bool_]
    last: slice  # the variables that the next layer reads
    width: int  # how many of the variables are x

    @staticmethod
    def of(hidden: list[Affine], box: tuple[Array, Array], bounds: list[tuple[Array, Array]]) -> _Program:
        """The program of these hidden layers; bounds: of their pre-activations (further entries are not read)."""
        unstable = [np.flatnonzero((low < 0) & (high > 0)) for low, high in bounds[: len(hidden)]]
        count = len(box[0]) + sum(len(b) + len(u) for (_, b), u in zip(hidden, unstable, strict=True))
        lower, upper, binary = np.zeros(count), np.ones(count), np.zeros(count, dtype=bool)
        last, end = slice(0, len(box[0])), len(box[0])
        lower[last], upper[last] = box
        blocks = [np.zeros((0, count))]
        lows, highs = [np.zeros(0)], [np.zeros(0)]
        for (weight, bias), (low, high), loose in zip(hidden, bounds, unstable, strict=False):
            now, end = slice(end, end + len(bias)), end + len(bias) + len(loose)
            bits = np.arange(now.stop, end)
            lower[now], upper[now] = np.maximum(low, 0), np.maximum(high, 0)
            binary[bits] = True
            kept = np.flatnonzero(high > 0)  # the rest is off: a = 0 by its bounds
            above = np.zeros((len(bias), count))  # a - z >= 0, and = 0 where it is always on
            above[:, now] = np.eye(len(bias))
            above[:, last] = -weight
            below, under = above[loose], np.zeros((len(loose), count))
            below[np.arange(len(loose)), bits] = -low[loose]
            under[np.arange(len(loose)), now.start + loose] = 1
            under[np.arange(len(loose)), bits] = -high[loose]
            blocks += [above[kept], below, under]
            lows += [bias[kept], np.full(2 * len(loose), -np.inf)]
            highs += [np.where(low >= 0, bias, np.inf)[kept], bias[loose] - low[loose], np.zeros(len(loose))]
            last = now
        return _Program(
            csr_array(np.vstack(blocks)), np.hstack(lows), np.hstack(highs), lower, upper, binary, last, len(box[0])
        )

    def relaxed(self, weight: Array, bias: float) -> tuple[float, Array]:
        """An upper bound of w a + b over the last activations, each d anywhere in [0, 1], and the x it is taken at."""
        answer = self._solve(weight, integers=False)
        if answer.status != 0:  # numerical trouble: no bound
            return np.inf, (self.lower + self.upper)[: self.width] / 2
        return bias - float(answer.fun), answer.x[: self.width]

    def search(self, weight: Array, bias: float, least: float, until: float) -> tuple[str, list[Array]]:
        """("none", []) if no run has w a + b >= least, ("some", such x, the best first), or ("late", [])."""
        seconds = until - time.perf_counter()
        if seconds <= 0:
            return "late", []
        answer = self._solve(weight, least=least - bias, seconds=seconds)
        if answer.status == 2:
            return "none", []
        if answer.x is None:
            return "late", []
        points = [answer.x[: self.width]]
        fixed = self._solve(weight, integers=False, pattern=np.round(answer.x))  # the best of its linear region
        if fixed.status == 0:
            points.insert(0, fixed.x[: self.width])
        return "some", points

    def _solve(
        self,
        weight: Array,
        *,
        integers: bool = True,
        least: float | None = None,
        pattern: Array | None = None,
        seconds: float | None = None,
    ) -> Any:
        cost = np.zeros(len(self.lower))
        cost[self.last] = -weight
        constraints = [LinearConstraint(self.rows, self.low, self.high)] if self.rows.shape[0] else []
        if least is not None:
            constraints.append(LinearConstraint(csr_array(-cost[None]), least, np.inf))
        lower, upper = self.lower, self.upper
        if pattern is not None:
            lower, upper = (np.where(self.binary, pattern, side) for side in (lower, upper))
        options = {"mip_rel_gap": GAP} | ({} if seconds is None else {"time_limit": seconds})
        return milp(
            cost,
            integrality=self.binary.astype(int) if integers else None,
            bounds=Bounds(lower, upper),
            constraints=constraints,
            options=options,
        )
