"""Certificates: which samples are proved robust, by which method, and how large their margins are at least."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data, pixels
from ..errors import UserError, type_of, unknown
from ..outputs import Model, Outputs, Queried, check_samples, fooled, frozen_eval
from ..progress import Progress, as_progress
from ..queries import Batches, copied
from ..results import ProofCost, total_proofs
from ..threat import Threat, as_threat, check_images
from ..user_input import typed
from .agreement import compare_answers
from .branch import branch
from .by_lipschitz import margins_by_lipschitz
from .chain import in_float64
from .graph import CannotBound, Graph, read
from .linear import (
    MEMORY,
    Forward,
    Region,
    against,
    all_lines,
    forward,
    least,
    optimised,
    others,
    put,
    take,
    upper_differences,
)
from .steps import Box, ReluStep, Step, bind

METHODS = ("interval", "linear", "crown", "alpha", "branch")  # each tries the ones before it first
ROWS = 256  # images that are bounded at a time, at most
LEAST = 2.0**-1074  # the smallest number above zero: the bound of a margin whose sign alone is proved
INNER = 10  # steps of Adam on the slopes of lines for inner operations


@dataclass(frozen=True)
class Certified:
    """What is proved of each sample, and by what.

    Args:
        proved: (N,) bool: no point of the threat has another argmax than y.
        by: the method that proved each sample; "" where none did.
        bound: (N,) float64 lower bounds of the smallest logit_y - logit_j over the threat; -inf where there is none,
            below zero where the image itself is misclassified.
        x_adv: adversarial examples that branch and bound met: sample number -> image. They are misclassified.
        seconds: (N,) float64, what each sample cost.
        ended: (N,) bool: its last method ran to its end; False: time ran out first.
        costs: what each method did and cost; reading the network counts with "interval".
        forwards: images that the network was asked about.
    """

    proved: Tensor
    by: tuple[str, ...]
    bound: Tensor
    x_adv: dict[int, Tensor]
    seconds: Tensor
    ended: Tensor
    costs: tuple[ProofCost, ...] = ()
    forwards: int = 0


@typed
def certify(
    model: Model,
    data: Data,
    threat: Threat | str,
    *,
    method: str = "alpha",
    seconds: float = math.inf,
    batch_size: int = ROWS,
    progress: Progress | None = None,
) -> Certified:
    """Prove of each sample that no x_adv of the threat has another argmax than y.

    The network is read as a graph of primitive operators (``graph.read``), and bounded in float64 on its float32
    weights. What float32 rounding can do in each operator counts as bounded noise, and so does all that
    ``Threat.violation`` forgives: a proof speaks of the numbers that a computer gets, if it sums at float32 precision,
    in any order (no TF32, no FFT or Winograd kernels).

    Args:
        model: an nn.Module, images to logits or Outputs. It is evaluated in eval mode, without gradients.
        data: float images in the threat's box, or uint8; labels.
        threat: of any norm, or its text, such as "linf:8/255".
        method: the last one that is tried on what is left by those before it.
            "interval": boxes, the last layers merged; and products of Lipschitz constants where the network is a chain.
            "linear": lines over these boxes, from the logits to the image (CROWN on the last layer).
            "crown": lines for the inputs of every non-affine operator too.
            "alpha": slopes of ReLUs optimised.
            "branch": branch and bound on the signs of ReLUs. It ends with a proof, an adversarial example, or the time.
        seconds: wall-clock time for all samples. Branch and bound shares it out evenly among those that are left.
        batch_size: images that are bounded at a time, at most; fewer where the network is wide.
        progress: is called with (what, done, total).

    Returns:
        The columns of ``Certified``.

    Raises:
        CannotBound: the network cannot be read, an operator has no rule, or the network's answers are not those of its
            graph (it answers by batch, by history or at random).
        UserError: images outside the threat's box; a label without a logit; an unknown method.

    Source: Gowal et al. 2019 (interval); Zhang et al. 2018, Xu et al. 2021 (lines); Wang et al. 2021 (branch).

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # right while x > 0
    >>> x = torch.tensor([0.05, 0.25]).view(2, 1, 1, 1)
    >>> found = certify(net, Data(x, torch.tensor([0, 0]), torch.arange(2)), Threat("linf", 0.1, -1, 1))
    >>> found.proved.tolist(), found.by, [round(bound, 3) for bound in found.bound.tolist()]
    ([False, True], ('', 'interval'), [-0.1, 0.3])
    """
    threat = as_threat(threat)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    x, y = pixels(data.x), data.y
    _check(x, y, threat)
    if not isinstance(model, nn.Module):
        raise CannotBound("bounds need a torch module, and the model is a function.")
    began = time.monotonic()
    until = began + seconds
    with frozen_eval(model), torch.no_grad():
        network, images, labels = in_float64(model, x, y)
        graph = read_network(network, images.shape[1:], images.device)
        if len(y) and int(y.max()) >= graph.classes:
            raise UserError(
                f"labels must be 0 .. K-1: the network returns {graph.classes} logits, a label is {y.max()}."
            )
        asked = _Asked(network)
        work = _Work(network, asked, graph, bind(graph, torch.float64), images, labels, threat, METHODS.index(method))
        report = as_progress(progress)
        reading = ProofCost("interval", 0, 0, time.monotonic() - began)

        def certified(rows: Tensor) -> Certified:
            left = (until - time.monotonic()) * len(rows) / (len(y) - int(rows[0]))
            return _certify_rows(work, rows, time.monotonic() + left, report)

        parts = Batches(min(work.rows, batch_size)).map(torch.arange(len(y)), certified)
    return replace(_joined(parts, reading), forwards=asked.forwards)


def _joined(parts: list[Certified], reading: ProofCost) -> Certified:
    """The columns of all batches."""
    x_adv = {number: image for part in parts for number, image in part.x_adv.items()}
    columns: dict[str, Any] = {
        name: torch.cat([torch.zeros(0, dtype=dtype), *(getattr(part, name) for part in parts)])
        for name, dtype in (
            ("proved", torch.bool), ("bound", torch.float64), ("seconds", torch.float64), ("ended", torch.bool),
        )
    }  # fmt: skip
    by = tuple(by for part in parts for by in part.by)
    costs = total_proofs([reading, *(cost for part in parts for cost in part.costs)])
    return Certified(by=by, x_adv=x_adv, costs=costs, **columns)


@typed
def cheaply_proved(model: Model, x: Tensor, y: Tensor, threat: Threat | str) -> Tensor | None:
    """Which samples the cheap methods prove, interval, Lipschitz and linear: (N,) bool; None if no bound is known.

    Args:
        model: as for ``certify``.
        x: (N, C, H, W) float32 images.
        y: (N,) int64 labels.
        threat: of any norm, or its text.

    Raises:
        UserError: images outside the threat's box, or not float; a label without a logit.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # right while x > 0
    >>> x, y = torch.tensor([0.05, 0.25]).view(2, 1, 1, 1), torch.tensor([0, 0])
    >>> cheaply_proved(net, x, y, Threat("linf", 0.1, -1, 1))
    tensor([False,  True])
    """
    threat = as_threat(threat)
    _check(x, y, threat)
    if not isinstance(model, nn.Module) or x.dtype != torch.float32:
        return None
    try:
        found = certify(model, Data(x, y.long(), torch.arange(len(y))), threat, method="linear")
    except CannotBound:
        return None
    return found.proved.to(x.device)


@typed
def worst_logit_difference(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Bound max_{j != y} logit_j - logit_y over the threat by the cheapest methods. Below zero it is a proof.

    Args:
        model: as for ``certify``.
        x: (N, C, H, W) float32 images.
        y: (N,) int64 labels.
        threat: of any norm.

    Returns:
        (N,) float64 upper bounds, infinite where there is none: -1 times the ``bound`` of ``certify`` by "interval".

    Raises:
        CannotBound: as ``certify`` does.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # logit_1 - logit_0 = -2 x
    >>> bound = worst_logit_difference(net, torch.tensor([[[[0.3]]]]), torch.tensor([0]), Threat("linf", 0.1))
    >>> print(f"{bound.item():.4f}")
    -0.4000
    """
    check_samples(x, y)
    return -certify(model, Data(x, y, torch.arange(len(y))), threat, method="interval").bound


@typed
def why_not(model: Model, shape: tuple[int, ...]) -> str:
    """Why no bound is known for a model, in one sentence; "" where one is.

    Args:
        model: images to logits or Outputs.
        shape: (C, H, W) of an image.

    Returns:
        The sentence, or "".

    >>> why_not(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    ''
    >>> class Rounded(nn.Sequential):
    ...     def forward(self, x):
    ...         return super().forward(x.round())
    >>> why_not(Rounded(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    'no bound is known for the operator round.'
    """
    if not isinstance(model, nn.Module):
        return "bounds need a torch module, and the model is a function."
    try:
        with frozen_eval(model), torch.no_grad():
            device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
            bind(read_network(model, shape, device), torch.float64)
    except CannotBound as error:
        return str(error)
    return ""


def read_network(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Graph:
    """``graph.read``, of a network in float32."""
    if any(tensor.dtype != torch.float32 for tensor in model.parameters()):
        raise CannotBound("bounds know the rounding of float32, and the model has weights of another precision.")
    recorded = copied(model) or model  # code that keeps what it is shown keeps it in a copy
    return read(Queried(recorded), shape, device=device)


@typed
def region_of(x: Tensor, threat: Threat) -> Region:
    """All that ``Threat.violation`` forgives around float32 images, in float64."""
    center = x.double()[:, None]
    eps = threat.farthest(math.prod(x.shape[1:]))
    lowest, highest = (torch.tensor(edge, dtype=torch.float32).item() for edge in (threat.lo, threat.hi))
    low = (center - eps).clamp_min(min(lowest, threat.lo)).minimum(center)
    high = (center + eps).clamp_max(max(highest, threat.hi)).maximum(center)
    return Region(Box(low, high), center, threat, eps)


class _Asked(Queried):
    """The network, with a count of the images that it was asked about."""

    forwards = 0

    def query(self, x: Tensor) -> Outputs:
        self.forwards += len(x)
        return super().query(x)


@dataclass(frozen=True)
class _Work:
    """What certifying any of the samples needs."""

    model: nn.Module
    asked: _Asked
    graph: Graph
    steps: list[Step]
    x: Tensor
    y: Tensor
    threat: Threat
    level: int

    @property
    def rows(self) -> int:
        """How many images are bounded at a time: as many as fit in memory with a row for each class."""
        width = max(math.prod(step.shape) for step in self.steps) * 8 * self.graph.classes
        return max(1, min(ROWS, MEMORY // width))


def _certify_rows(work: _Work, rows: Tensor, until: float, report: Progress) -> Certified:
    """The ladder of methods for some images."""
    began = time.monotonic()
    region = region_of(work.x[rows], work.threat)
    finite, logits, compared = compare_answers(work.asked, work.steps, work.graph.classes, work.x[rows], region)
    found = forward(work.steps, region)
    ladder = _Ladder(work, rows, region, found, until, report)
    ladder.finite, ladder.correct = finite, logits.argmax(1) == ladder.y
    ladder.cheap(compared, began)
    ladder.seconds += (time.monotonic() - began) / max(1, len(rows))
    if work.level >= METHODS.index("linear"):
        ladder.improve("linear", ladder.linear, work.rows)
    if work.level >= METHODS.index("crown"):
        ladder.improve("crown", ladder.crown, _share(work))
    if work.level >= METHODS.index("alpha"):
        ladder.improve("alpha", ladder.alpha, _share(work))
    if ladder.branches:
        ladder.branch()
    low = ladder.bounds.amin(1).cpu()
    return Certified(
        low > 0, tuple(ladder.by), low, ladder.x_adv, ladder.seconds, ladder.ended, tuple(ladder.costs.values())
    )


class _Ladder:
    """The methods one after another for some images; what each of them changes is kept here."""

    def __init__(
        self, work: _Work, rows: Tensor, region: Region, found: Forward, until: float, report: Progress
    ) -> None:
        self.work, self.rows, self.region, self.found = work, rows, region, found
        self.until, self.report = until, report
        self.x, self.y = work.x[rows], work.y[rows]
        self.margins = against(self.y, work.graph.classes, torch.float64)
        self.finite = self.correct = torch.ones(len(rows), dtype=torch.bool, device=self.x.device)
        self.bounds = torch.full(self.margins.shape[:2], -math.inf, dtype=torch.float64, device=self.x.device)
        self.by = [""] * len(rows)
        self.seconds = torch.zeros(len(rows), dtype=torch.float64)
        self.ended = torch.ones(len(rows), dtype=torch.bool)
        self.refined: dict[int, tuple[Forward, Region]] = {}
        self.x_adv: dict[int, Tensor] = {}
        self.costs: dict[str, ProofCost] = {}
        splits = any(isinstance(step, ReluStep) for step in work.steps)
        self.branches = splits and work.level >= METHODS.index("branch")

    @property
    def left(self) -> Tensor:
        """The numbers of the images that are answered right and not proved."""
        return ((self.bounds.amin(1) <= 0) & self.finite & self.correct).nonzero()[:, 0]

    def count(self, method: str, some: Sequence[int], start: float) -> None:
        """Add to a method's cost what it did since ``start`` for these images."""
        before = self.costs.get(method, ProofCost(method, 0, 0, 0.0))
        self.costs[method] = replace(
            before,
            tried=before.tried + len(some),
            proved=self.by.count(method),
            seconds=before.seconds + time.monotonic() - start,
            broken=before.broken + sum(int(self.rows[number]) in self.x_adv for number in some),
        )

    def raise_to(self, some: Tensor, low: Tensor, found: Forward, method: str) -> None:
        """Take lower bounds (n, K - 1) of these images, where they exist and are better."""
        low = low.masked_fill(low.isnan() | (found.unbounded | ~self.finite[some])[:, None], -math.inf)
        before = self.bounds[some].amin(1)
        self.bounds[some] = torch.maximum(self.bounds[some], low)
        for number in some[(before <= 0) & (self.bounds[some].amin(1) > 0)].tolist():
            self.by[number] = method
        proved = int((self.bounds.amin(1) > 0).sum())
        self.report(method, int(self.rows[0]) + proved, len(self.work.y))

    def cheap(self, compared: list[tuple[Tensor, Tensor]], began: float) -> None:
        """Boxes, begun then, and Lipschitz constants."""
        every, steps = torch.arange(len(self.rows), device=self.x.device), self.work.steps
        high = upper_differences(steps, self.found, self.region, self.y)
        low = -high.gather(1, others(self.y, self.work.graph.classes))
        self.raise_to(every, low, self.found, "interval")
        self.count("interval", range(len(self.rows)), began)
        start = time.monotonic()
        low_by_constants = margins_by_lipschitz(self.work.model, self.x, self.y, self.work.threat, compared)
        if low_by_constants is not None:
            bounded = replace(self.found, unbounded=torch.zeros_like(self.found.unbounded))
            self.raise_to(every, low_by_constants[:, None].expand_as(low), bounded, "lipschitz")
            self.count("lipschitz", range(len(self.rows)), start)

    def improve(self, name: str, method: Callable[[Tensor, Forward, Region], None], share: int) -> None:
        """A method for what is left, in parts that fit in memory."""
        left = self.left
        for some in left.split(share) if len(left) else ():
            start = time.monotonic()
            if start > self.until:
                self.ended[some.cpu()] = False
                continue
            part, inside = take(self.found, self.region, some)
            method(some, part, inside)
            if time.monotonic() > self.until:  # it was cut short, or would have been
                self.ended[some.cpu()] = (self.bounds[some].amin(1) > 0).cpu()
            numbers = some.tolist()
            self.seconds[numbers] += (time.monotonic() - start) / len(some)
            self.count(name, numbers, start)

    def linear(self, some: Tensor, part: Forward, inside: Region) -> None:
        """Lines over boxes."""
        steps = self.work.steps
        low = least(steps, part, all_lines(steps, part), inside, len(steps) - 1, self.margins[some])
        self.raise_to(some, low, part, "linear")

    def crown(self, some: Tensor, part: Forward, inside: Region) -> None:
        """Lines over boxes that lines have tightened."""
        steps, margins = self.work.steps, self.margins[some]
        tight = forward(steps, inside, refine=True, known=part, until=self.until)
        self.found = put(self.found, some, tight)
        low = least(steps, tight, all_lines(steps, tight), inside, len(steps) - 1, margins)
        self.raise_to(some, low, tight, "crown")

    def alpha(self, some: Tensor, part: Forward, inside: Region) -> None:
        """The same with optimised slopes, of inner operations too; it starts from the boxes of crown."""
        steps, margins = self.work.steps, self.margins[some]
        tight = forward(steps, inside, refine=True, iterations=INNER, known=part, until=self.until)
        low = optimised(steps, tight, all_lines(steps, tight), inside, len(steps) - 1, margins)
        self.raise_to(some, low, tight, "alpha")
        if self.branches:
            for place, number in enumerate(some.tolist()):
                self.refined[number] = take(tight, inside, torch.tensor([place], device=some.device))

    def branch(self) -> None:
        """Branch and bound, one image after another; each may take its share of the time that is left."""
        left = self.left.tolist()
        for place, number in enumerate(left):
            start = time.monotonic()
            if number not in self.refined or start > self.until:
                self.ended[number] = False
                continue
            part, inside = self.refined[number]
            if bool(part.unbounded.any()):
                continue
            share = (self.until - start) / (len(left) - place)
            open_ = self.bounds[number] <= 0
            answer = branch(
                self.work.steps, part, inside, self.margins[number][open_],
                until=start + share, misclassified=_judge(self.work, self.x[number], self.y[number]),
            )  # fmt: skip
            if answer.point is not None:
                self.x_adv[int(self.rows[number])] = answer.point[0].to(self.work.x.dtype)
            else:
                self.ended[number] = answer.ended
                low = self.bounds[number].clamp_min(min(answer.bound, LEAST))  # a proof is of the sign alone
                self.raise_to(torch.tensor([number]), low[None], part, "branch")
            self.seconds[number] += time.monotonic() - start
            self.count("branch", [number], start)


def _share(work: _Work) -> int:
    """How many images are refined at a time: fewer where the network is wide."""
    width = sum(math.prod(step.shape) for step in work.steps)
    return max(1, min(16, 2_000_000 // width))


def _judge(work: _Work, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Whether images of the region, rounded to float32 and projected onto the threat, are misclassified."""

    def misclassified(points: Tensor) -> Tensor:
        images = points[:, 0].to(work.x.dtype)
        start = x.expand_as(images)
        inside = work.threat.project(images, start)
        points[:, 0] = inside.double()
        wrong = fooled(work.asked(inside).logits, y)
        return wrong & (work.threat.violation(inside, start) == 0)

    return misclassified


def _check(x: Tensor, y: Tensor, threat: Threat) -> None:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and y.shape == x.shape[:1]):
        raise UserError(f"certify expects tensors of images and of one label each, got {type_of(x)} and {type_of(y)}.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or (len(y) and int(y.min()) < 0):
        raise UserError(f"labels must be integers >= 0, got {y.dtype}{f' from {y.min()}' if len(y) else ''}.")
    if not x.is_floating_point():
        raise UserError(f"certify expects float images in the threat's box, got {x.dtype}. Divide by 255 first.")
    check_images(x, threat)
