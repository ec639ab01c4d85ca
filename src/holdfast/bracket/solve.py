"""Decide a VNN-LIB property of an ONNX network: attack it, then prove that no counterexample exists.

A case of the property, weights @ y + offsets <= 0, is refuted on a box where the lower bound of one of its rows is
positive. The rows are one more affine operation behind the network, in exact arithmetic; what float32 rounding can do
inside the network counts. Where bounds over the whole box do not decide, networks with few inputs are split at inputs,
others at ReLUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bounds import CannotBound
from ..bounds.branch import branch
from ..bounds.certify import read_network
from ..bounds.graph import Operation, Value
from ..bounds.linear import Region, all_lines, forward, least, optimised
from ..bounds.regions import INSIDE
from ..bounds.rounding import DOUBLE
from ..bounds.steps import AffineStep, Box, ReluStep, Step, bind
from ..errors import UserError
from ..importers import OnnxNet
from ..importers.onnx.runtime import runtime_outputs
from ..outputs import as_outputs, frozen_eval
from ..progress import Progress, as_progress
from ..queries import exact_float32
from ..user_input import any_seed, number, typed
from .vnnlib import Case, Property

STARTS, STEPS = 8, 40  # of the attack on each case
BATCH = 64  # points that are attacked at a time
ROWS = 64  # rows that are bounded at a time
SPLIT_INPUTS = 12  # networks with at most so many inputs are split at inputs
BOXES = 64  # that are bounded at a time then
AGREES = 1e-3  # how far the network, its graph and onnxruntime may be apart, relative to the largest output
ATTACK_SHARE = 0.2  # of the time, at most
WAYS = ("", "linear", "crown", "alpha", "branch", "inputs")  # of proof


@dataclass(frozen=True)
class Answer:
    """What is known of a property.

    Args:
        verdict: "sat" (a counterexample), "unsat" (proved: there is none), "timeout", or "unknown" (the methods came to
            their end).
        x: the counterexample, in the order of X_0, X_1, ...; empty without one.
        y: the network's outputs there, of onnxruntime where it is installed.
        by: what decided it: "attack", "linear", "crown", "alpha", "branch" or "inputs" (split at inputs).
        seconds: wall-clock time.
        why: what the reader should know beside the verdict, in one sentence; "".
    """

    verdict: str
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()
    by: str = ""
    seconds: float = 0.0
    why: str = ""

    def text(self) -> str:
        """The answer as VNN-COMP writes it: the verdict on the first line, then the counterexample.

        >>> print(Answer("sat", (0.5,), (1.0, -2.0)).text())
        sat
        ((X_0 0.5)
        (Y_0 1.0)
        (Y_1 -2.0))
        """
        if self.verdict != "sat":
            return self.verdict
        values = [*(f"(X_{i} {v!r})" for i, v in enumerate(self.x)), *(f"(Y_{i} {v!r})" for i, v in enumerate(self.y))]
        return "\n".join([self.verdict, f"({values[0]}", *values[1:]]) + ")"


@typed
def check_property(
    net: OnnxNet, wanted: Property, *, seconds: float = math.inf, seed: int = 0, progress: Progress | None = None
) -> Answer:
    """Decide whether a counterexample exists.

    A counterexample counts once onnxruntime confirms it, where that is installed; without it, the network's own forward
    pass in float32 does. "unsat" holds for what any float32 evaluation of the network answers within the box, and in
    exact arithmetic.

    Args:
        net: a float32 network, as ``load_onnx(path, strip_softmax=False)`` reads it.
        wanted: the property.
        seconds: wall-clock time.
        seed: of the attack's starts.
        progress: called with (what is being done, cases decided, cases).

    Returns:
        The Answer.

    Raises:
        UserError: the network has other inputs or outputs than the property, or computes otherwise than onnxruntime.
    """
    began = time.monotonic()
    if seconds != math.inf:
        number("seconds", seconds, 0, above=True)
    with exact_float32(), frozen_eval(net):
        work = _Work(net, wanted, any_seed(seed), began + seconds, as_progress(progress))
        work.check()
        answer = work.search(began + ATTACK_SHARE * seconds) or work.prove()
    return Answer(answer.verdict, answer.x, answer.y, answer.by, time.monotonic() - began, answer.why or work.note)


def image_shape(net: OnnxNet, count: int) -> tuple[int, ...]:
    """The shape of one input of a network that takes so many numbers, without the batch.

    Raises:
        UserError: the file says no shape, or that of another number of values.
    """
    if net.input_shape is None:
        raise UserError("the ONNX file does not say what shape its input has: export it again with shapes.")
    if net.integer_range is not None:
        raise UserError("the ONNX network takes integers, and a property speaks of real numbers.")
    for sizes in (net.input_shape[1:], net.input_shape):  # with an axis for the batch; without one
        known = math.prod(size for size in sizes if size is not None)
        if sizes.count(None) == 1 and known and count % known == 0:
            return tuple(count // known if size is None else size for size in sizes)
        if None not in sizes and sizes and known == count:
            return tuple(size for size in sizes if size is not None)
    takes = " x ".join("any" if size is None else str(size) for size in net.input_shape)
    raise UserError(f"the property has {count:,} inputs X, but the ONNX network takes {takes}.")


class _Rows(AffineStep):
    """weights @ y + offsets behind the network: exact, but for what float64 and the numbers of the file may be off."""

    def __init__(self, source: int, weights: Tensor, offsets: Tensor, slack: Tensor) -> None:
        operation = Operation("rows", torch.clone, (Value(source),), shape=(1, len(offsets)))
        Step.__init__(self, operation)
        self.weights, self.offsets, self.slack = weights, offsets, slack

    @property
    def offset(self) -> Tensor:
        """The offsets, as of one image."""
        return self.offsets[None]

    def box(self, boxes: list[Box]) -> Box:
        [box] = boxes
        center = (box.lo + box.hi) / 2 @ self.weights.T + self.offsets
        radius = (box.hi - box.lo) / 2 @ self.weights.abs().T
        return Box(center - radius, center + radius)

    def rounding(self, boxes: list[Box], out: Box) -> Tensor:
        return DOUBLE * (boxes[0].largest @ self.weights.abs().T + self.offsets.abs()) + self.slack

    def rounded(self, boxes: list[Box], out: Box, error: Tensor) -> Box:
        return Box(out.lo - error, out.hi + error)

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows @ self.weights,)

    def cast(self, constants: Sequence[Tensor], dtype: torch.dtype) -> _Rows:
        """The same in another precision."""
        [source] = self.reads
        return _Rows(source, *(part.to(dtype) for part in (self.weights, self.offsets, self.slack)))


@dataclass
class _Group:
    """Cases over one box.

    Args:
        lo, hi: (*shape) float64 of the property, not rounded.
        weights, offsets, slack: the rows of all cases.
        places: for each case, which rows are its own.
    """

    lo: Tensor
    hi: Tensor
    weights: Tensor
    offsets: Tensor
    slack: Tensor
    places: list[Tensor] = field(default_factory=list)

    def region(self) -> Region:
        """A box that holds the property's, and its corners as float32 writes them."""
        near = 2.0**-50
        lo = torch.minimum(self.lo - near * self.lo.abs(), self.lo.float().double())
        hi = torch.maximum(self.hi + near * self.hi.abs(), self.hi.float().double())
        lo, hi = lo[None, None], hi[None, None]
        return Region(Box(lo, hi), (lo + hi) / 2, INSIDE, 0.0)

    def largest(self, y: Tensor) -> Tensor:
        """The largest row of each case: (D, K) float64 outputs -> (D, cases). A case holds where it is <= 0."""
        rows = y.double() @ self.weights.T + self.offsets
        return torch.stack([rows[:, places].amax(1) for places in self.places], 1)

    def refuted(self, low: Tensor) -> Tensor:
        """Which cases the lower bounds (D, rows) refute, (D, cases)."""
        return torch.stack([low[:, places].amax(1) > 0 for places in self.places], 1)


def _with_mean(rows: Any) -> Any:
    """The rows of a case and, of several, their mean: it is positive nowhere where none of them is, and no larger than
    the largest. Where it is positive everywhere it refutes the case, though none of the rows alone may."""
    return rows if len(rows) == 1 else np.concatenate([rows, rows.mean(0, keepdims=True)])


def _float32_box(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest float32 inside [lo, hi]; the nearest one where there is none."""
    low, high = lo.float(), hi.float()
    up, down = torch.nextafter(low, low.new_tensor(math.inf)), torch.nextafter(high, high.new_tensor(-math.inf))
    low, high = torch.where(low.double() < lo, up, low), torch.where(high.double() > hi, down, high)
    none = low > high
    return torch.where(none, lo.float(), low), torch.where(none, lo.float(), high)


class _Work:
    """One property of one network; ``found`` is a confirmed counterexample once there is one."""

    def __init__(self, net: OnnxNet, wanted: Property, seed: int, until: float, report: Progress) -> None:
        self.net, self.wanted, self.until, self.report = net, wanted, until, report
        self.shape = image_shape(net, wanted.n_inputs)
        self.generator = torch.Generator().manual_seed(seed)
        self.note = ""
        self.session = self._session()
        self.found: Answer | None = None
        self.unconfirmed = 0
        self.groups = self._groups()

    def _session(self) -> Any:
        try:
            import onnxruntime

            return onnxruntime.InferenceSession(self.net.path, providers=["CPUExecutionProvider"])
        except ImportError:
            self.note = "onnxruntime is not installed: a counterexample is confirmed by holdfast's forward pass alone."
        except Exception as error:  # whatever it refuses
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self.note = f"onnxruntime cannot run the file ({first[:200]}): holdfast's forward pass alone confirms."
        return None

    def _groups(self) -> list[_Group]:
        """The cases of the property by their box, of each at most ``ROWS`` rows at a time."""
        by_box: dict[int, list[list[Case]]] = {}
        for case in self.wanted.cases:
            parts = by_box.setdefault(id(case.lo), [[]])
            if parts[-1] and sum(len(one.offsets) for one in (*parts[-1], case)) > ROWS:
                parts.append([])
            parts[-1].append(case)
        made = []
        for cases in (part for parts in by_box.values() for part in parts):
            weights, offsets, slack = (
                torch.from_numpy(np.concatenate([_with_mean(getattr(case, name)) for case in cases]))
                for name in ("weights", "offsets", "slack")
            )
            places = list(torch.arange(len(offsets)).split([len(_with_mean(case.offsets)) for case in cases]))
            lo, hi = (torch.from_numpy(side).view(self.shape) for side in (cases[0].lo, cases[0].hi))
            made.append(_Group(lo, hi, weights, offsets, slack, places))
        return made

    def ask(self, x: Tensor) -> Tensor:
        """(N, *shape) float32 -> (N, K)."""
        return as_outputs(self.net(x.clone())).logits

    def ask_runtime(self, x: Tensor) -> Tensor:
        """The same of onnxruntime; of the network itself where that cannot run."""
        out = self.ask(x)
        return out if self.session is None else runtime_outputs(self.session, self.net, x, out)

    @torch.no_grad()
    def check(self) -> None:
        """Compare the network with the property, and with onnxruntime."""
        group = self.groups[0]
        share = torch.rand(2, *self.shape, generator=self.generator)
        low, high = _float32_box(group.lo, group.hi)
        x = torch.cat([((low + high) / 2)[None], low + (high - low) * share])
        out = self.ask(x)
        if out.shape[1] != self.wanted.n_outputs:
            raise UserError(
                f"the property has {self.wanted.n_outputs} outputs Y, but the ONNX network returns {out.shape[1]}."
            )
        try:
            theirs = self.ask_runtime(x)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self.session = None
            self.note = f"onnxruntime cannot run the file ({first[:200]}): holdfast's forward pass alone confirms."
            return
        _close(out, theirs, "holdfast computes otherwise than onnxruntime")

    def confirmed(self, group: _Group, x: Tensor, by: str) -> bool:
        """Ask once more about one float32 input (*shape) that should be a counterexample, and keep it if it is one."""
        low, high = _float32_box(group.lo, group.hi)
        if not bool(((x >= low) & (x <= high)).all()):
            return False
        with torch.no_grad():
            y = self.ask_runtime(x[None])
        if not bool(y.isfinite().all()) or not bool((group.largest(y) <= 0).any()):
            self.unconfirmed += 1
            return False
        self.found = Answer("sat", tuple(x.flatten().tolist()), tuple(y[0].tolist()), by)
        return True

    def search(self, until: float) -> Answer | None:
        """Projected gradient descent on the largest row of each case, from several starts."""
        for done, group in enumerate(self.groups):
            self.report("attack", done, len(self.groups))
            for cases in torch.arange(len(group.places)).split(max(1, BATCH // STARTS)):
                if time.monotonic() > until and done:
                    return None
                self._descend(group, cases.repeat_interleave(STARTS))
                if self.found is not None:
                    return self.found
        return None

    def _descend(self, group: _Group, cases: Tensor) -> None:
        """Attack each of these cases from one start: the first from the middle, others from anywhere in the box."""
        low, high = _float32_box(group.lo, group.hi)
        width = high - low
        share = torch.rand(len(cases), *self.shape, generator=self.generator)
        share[::STARTS] = 0.5
        share[1::STARTS] = share[1::STARTS].round()
        x = low + width * share
        for step in range(STEPS):
            x = torch.minimum(torch.maximum(x, low), high).detach().requires_grad_()
            with torch.enable_grad():
                y = self.ask(x)
                rows = y @ group.weights.T.float() + group.offsets.float()
                worst = torch.stack([rows[i, group.places[case]].amax() for i, case in enumerate(cases.tolist())])
                grad = torch.autograd.grad(worst.sum(), x, allow_unused=True)[0] if worst.requires_grad else None
            hits = (group.largest(y.detach()) <= 0).any(1).nonzero()[:, 0]
            for place in hits.tolist()[:4]:
                if self.confirmed(group, x[place].detach(), "attack"):
                    return
            if grad is None or time.monotonic() > self.until:
                return
            x = x.detach() - 0.3 * (1 - step / STEPS) * width * grad.nan_to_num().sign()

    @torch.no_grad()
    def prove(self) -> Answer:
        """The methods of proof, group by group; each may take its share of the time."""
        try:
            graph = read_network(self.net, self.shape, torch.device("cpu"))
            steps = bind(graph, torch.float64)
        except CannotBound as error:
            return Answer("unknown", why=str(error))
        by, ended, timed_out = "", True, False
        for done, group in enumerate(self.groups):
            self.report("proof", done, len(self.groups))
            now = time.monotonic()
            if now > self.until:
                return Answer("timeout", why=self._why())
            until = now + (self.until - now) / (len(self.groups) - done)
            behind = [*steps, _Rows(len(steps) - 1, group.weights, group.offsets, group.slack)]
            self._agrees(behind, group)
            proved, method, in_time = self._prove_group(behind, group, until)
            by = max(by, method, key=WAYS.index)
            if self.found is not None:
                return self.found
            ended, timed_out = ended and proved, timed_out or not in_time
        if ended:
            return Answer("unsat", by=by)
        return Answer("timeout" if timed_out else "unknown", why=self._why())

    def _why(self) -> str:
        if not self.unconfirmed:
            return ""
        return f"{self.unconfirmed} near-counterexamples were not confirmed, by rounding: {self.note or 'onnxruntime'}."

    def _agrees(self, steps: Sequence[Step], group: _Group) -> None:
        """Compare what the network answers with what its graph computes, at points of the box."""
        low, high = _float32_box(group.lo, group.hi)
        share = torch.rand(3, *self.shape, generator=self.generator)
        x = low + (high - low) * share
        point = x.double()[:, None]
        exact = forward(steps, Region(Box(point, point), point, INSIDE, 0.0), rounding=False)
        _close(self.ask(x), exact.boxes[len(steps) - 2].lo[:, 0], "the network computes otherwise than its graph")
        _close(self.ask(x[:1]), exact.boxes[len(steps) - 2].lo[:1, 0], "the network computes otherwise than its graph")

    def _prove_group(self, steps: list[Step], group: _Group, until: float) -> tuple[bool, str, bool]:
        """(is every case refuted, by what, or was there time left)."""
        region, last = group.region(), len(steps) - 1
        every = torch.eye(len(group.offsets), dtype=torch.float64)[None, :, None]
        found = forward(steps, region)
        low = least(steps, found, all_lines(steps, found), region, last, every)
        low = low.masked_fill(found.unbounded[:, None], -math.inf)
        if bool(group.refuted(low).all()):
            return True, "linear", True
        if self.wanted.n_inputs <= SPLIT_INPUTS:
            return self._split_inputs(steps, group, until)
        found = forward(steps, region, refine=True, known=found, until=until)
        for method, bound in (("crown", None), ("alpha", optimised)):
            if bound is None:
                more = least(steps, found, all_lines(steps, found), region, last, every)
            else:
                more = optimised(steps, found, all_lines(steps, found), region, last, every)
            low = torch.maximum(low, more.masked_fill(found.unbounded[:, None], -math.inf))
            if bool(group.refuted(low).all()):
                return True, method, True
        if bool(found.unbounded.any()) or not any(isinstance(step, ReluStep) for step in steps):
            return False, "", time.monotonic() < until
        left = (~group.refuted(low)[0]).nonzero()[:, 0].tolist()
        best = torch.stack([group.places[case][low[0, group.places[case]].argmax()] for case in left])
        answer = branch(steps, found, region, every[0, best], until=until, misclassified=self._judge(group, "branch"))
        return answer.bound > 0 and answer.point is None, "branch", time.monotonic() < until

    def _judge(self, group: _Group, by: str) -> Callable[[Tensor], Tensor]:
        """Which points (D, 1, *shape) of a box are counterexamples, rounded to float32 inside it: (D,) bool."""
        low, high = _float32_box(group.lo, group.hi)

        def judge(points: Tensor) -> Tensor:
            x = torch.minimum(torch.maximum(points[:, 0].float(), low), high)
            hits = (group.largest(self.ask(x)) <= 0).any(1)
            for place in hits.nonzero()[:, 0].tolist():
                hits[place] = self.found is None and self.confirmed(group, x[place], by)
            return hits

        return judge

    def _split_inputs(self, steps: list[Step], group: _Group, until: float) -> tuple[bool, str, bool]:
        """Halve boxes of inputs until each is refuted for every case."""
        whole, last, judge = group.region(), len(steps) - 1, self._judge(group, "inputs")
        los, his = whole.box.lo.clone(), whole.box.hi.clone()
        one = torch.eye(len(group.offsets), dtype=torch.float64)[None, :, None]
        while len(los):
            if time.monotonic() > until:
                return False, "", False
            lo, hi, los, his = los[-BOXES:], his[-BOXES:], los[:-BOXES], his[:-BOXES]
            region = Region(Box(lo, hi), (lo + hi) / 2, INSIDE, 0.0)
            found = forward(steps, region, refine=True, until=until)
            slopes: list[Tensor] = []

            def visit(at: int, rows: Tensor, slopes: list[Tensor] = slopes) -> None:
                if at == 0:
                    slopes[:] = [rows.abs().sum(1)]

            every = one.expand(len(lo), *one.shape[1:])
            low = least(steps, found, all_lines(steps, found), region, last, every, visit=visit)
            low = low.masked_fill(found.unbounded[:, None], -math.inf)
            open_ = (~group.refuted(low).all(1)).nonzero()[:, 0]
            if not len(open_):
                continue
            if bool(judge(region.center[open_]).any()):
                return False, "inputs", True
            lo, hi = lo[open_].flatten(1), hi[open_].flatten(1)
            width = hi - lo
            gain = width * (slopes[0][open_].flatten(1) + 1e-12) if slopes else width
            at = gain.argmax(1, keepdim=True)
            middle = (lo + hi) / 2
            if bool((width.gather(1, at) <= 2.0**-23 * middle.abs().amax().clamp_min(1e-30)).any()):
                return False, "", True  # float32 has no point between
            left, right = hi.scatter(1, at, middle.gather(1, at)), lo.scatter(1, at, middle.gather(1, at))
            shape = (-1, *los.shape[1:])
            los = torch.cat([los, lo.view(shape), right.view(shape)])
            his = torch.cat([his, left.view(shape), hi.view(shape)])
        return True, "inputs", True


def _close(mine: Tensor, theirs: Tensor, what: str) -> None:
    """Raise UserError where two answers to the same inputs differ by more than rounding."""
    mine, theirs = mine.double(), theirs.double()
    scale = theirs.abs().amax(1).clamp_min(1e-30)
    if mine.shape != theirs.shape or not bool(((mine - theirs).abs().amax(1) <= AGREES * scale).all()):
        raise UserError(f"{what}: no proof would be of the network in the file.")


def check_precision(path: str) -> None:
    """Refuse a file whose tensors are of another precision than float32: its network is not the one that is bounded.

    Raises:
        UserError: the file holds half or double precision.
    """
    import onnx

    proto = onnx.load(path, load_external_data=False)
    other = {
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.DOUBLE: "float64",
        onnx.TensorProto.BFLOAT16: "bfloat16",
    }
    held = [(tensor.name, tensor.data_type) for tensor in proto.graph.initializer]
    held += [(value.name, value.type.tensor_type.elem_type) for value in proto.graph.input]
    for name, kind in held:
        if kind in other:
            raise UserError(
                f"'{name}' of {path} is {other[kind]}, which holdfast reads as float32: a proof would be of another "
                "network. Export it in float32."
            )
