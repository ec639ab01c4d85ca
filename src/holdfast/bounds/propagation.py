"""Interval bound propagation of a whole batch, for training: centres and radii, one call of an operator for all images.

    affine operators:    center' = W center + b,  radius' = |W| radius
    monotone operators:  the box between their values at the two corners

``plan_of`` works out once what does not depend on the weights; ``upper_differences`` computes. Both follow the graph
and the tables of ``rules.py``, as proofs do; they count no rounding. A value of the shape (1, ...) is kept as (N, ...):
most operators take their first dimension as a batch. Which of them do is not listed but tried, on random images.

Source: Gowal et al. 2019 (IBP).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Change, Graph, Operation, Value
from .rules import CURVED
from .steps import AffineForms, Box, CurvedStep, ProductStep, affine_forms, as_dtype, bind, over_rows, with_absolute

TRIED = 3  # random images, of which an operator of a batch must give what it gives image by image


class Span:
    """A box by its center and radius or by its corners, whichever is given; the other pair is computed when needed."""

    def __init__(self, ball: tuple[Tensor, Tensor] | None = None, box: Box | None = None) -> None:
        self.ball_given = ball is not None
        if ball is not None:
            self.ball = ball
        if box is not None:
            self.box = box

    @cached_property
    def ball(self) -> tuple[Tensor, Tensor]:
        """(center, radius)."""
        lo, hi = self.box
        center = (lo + hi) / 2
        return center, center - lo

    @cached_property
    def box(self) -> Box:
        """The corners."""
        center, radius = self.ball
        return Box(center - radius, center + radius)


@dataclass(frozen=True)
class Call:
    """An operator of one image's values, called for a batch.

    Args:
        operation: the operator.
        shapes: of its inputs for one image.
        at_once: whether it takes the first dimension of all its inputs as a batch.
    """

    operation: Operation
    shapes: tuple[tuple[int, ...], ...]
    at_once: bool

    def __call__(self, constants: Sequence[Tensor], change: Change | None, values: Sequence[Tensor]) -> Tensor:
        function = self.operation.bind(constants, change)
        if self.at_once:
            out: Tensor = function(*values)
            return out
        rows = (x.unsqueeze(1) if shape[:1] == (1,) else x for x, shape in zip(values, self.shapes, strict=True))
        out = over_rows(function, *rows)
        return out.squeeze(1) if self.operation.shape[:1] == (1,) else out


@dataclass(frozen=True)
class AffineRule:
    """W h + b, by two calls."""

    signed: Call
    absolute: Call
    forms: AffineForms
    shifts: bool  # whether W is the identity

    def center(self, constants: Sequence[Tensor], dtype: torch.dtype, values: Sequence[Tensor]) -> Tensor:
        return self.signed(constants, as_dtype(dtype), values)

    def __call__(self, constants: Sequence[Tensor], dtype: torch.dtype, spans: Sequence[Span]) -> Span:
        if self.forms.moves and not any(span.ball_given for span in spans):
            lo, hi = (self.center(constants, dtype, side) for side in zip(*(span.box for span in spans), strict=True))
            return Span(box=Box(lo, hi))
        centers, radii = zip(*(span.ball for span in spans), strict=True)
        center = self.center(constants, dtype, centers)
        if self.shifts:
            return Span((center, radii[0]))
        change = with_absolute(dtype, self.forms.weights, self.forms.biases, _nothing)
        return Span((center, self.absolute(constants, change, radii)))


@dataclass(frozen=True)
class MonotoneRule:
    """An operator that is monotone in all its inputs."""

    call: Call

    def __call__(self, constants: Sequence[Tensor], dtype: torch.dtype, spans: Sequence[Span]) -> Span:
        lo, hi = (
            self.call(constants, as_dtype(dtype), side) for side in zip(*(span.box for span in spans), strict=True)
        )
        return Span(box=Box(lo, hi))


@dataclass(frozen=True)
class ElementwiseRule:
    """A function of one variable, or a product: what its step gives."""

    step: Callable[[Sequence[Tensor], torch.dtype], CurvedStep | ProductStep]

    def __call__(self, constants: Sequence[Tensor], dtype: torch.dtype, spans: Sequence[Span]) -> Span:
        return Span(box=self.step(constants, dtype).box([span.box for span in spans]))


Rule = AffineRule | MonotoneRule | ElementwiseRule


@dataclass(frozen=True)
class Plan:
    """What is computed, in order, as (number of the operation, what it reads, rule).

    Args:
        graph: of the network.
        rules: of the operations whose boxes are needed.
        last_reads: for each of the rules, the operations whose boxes no later one reads: their memory is used again.
        sources: the operations, or the image, that the tail reads.
        tail: the affine operations behind the last ones that are not affine: logit differences pass it as one map.
        last: the operation that gives the logits.
    """

    graph: Graph
    rules: tuple[tuple[int, tuple[int, ...], Rule], ...]
    last_reads: tuple[frozenset[int], ...]
    sources: tuple[int, ...]
    tail: tuple[tuple[int, tuple[int, ...], AffineRule], ...]
    last: int


def plan_of(graph: Graph, dtype: torch.dtype) -> Plan:
    """How boxes of a batch pass through a graph.

    Raises:
        CannotBound: An operator has no rule.
    """
    bind(graph, dtype)  # it raises where an operator has no rule
    with torch.no_grad():
        constants = constants_of(graph, dtype)
    chosen: dict[int, tuple[tuple[int, ...], Rule]] = {}

    def rule_of(number: int) -> tuple[tuple[int, ...], Rule]:
        if number not in chosen:
            reads, rule = _rule(graph, graph.operations[number], constants, dtype)
            chosen[number] = tuple(_copied(graph, source) for source in reads), rule
        return chosen[number]

    tail, sources = set(), set()
    last = _copied(graph, len(graph.operations) - 1)
    waiting = [last]
    while waiting:
        number = waiting.pop()
        if number in tail or number in sources:
            continue
        if number == 0 or not isinstance(rule_of(number)[1], AffineRule):
            sources.add(number)
        else:
            tail.add(number)
            waiting += rule_of(number)[0]
    needed, waiting = set(), sorted(sources)
    while waiting:
        number = waiting.pop()
        if number and number not in needed:
            needed.add(number)
            waiting += rule_of(number)[0]
    rules = tuple((number, *rule_of(number)) for number in sorted(needed))
    last_reads, later = [], set(sources)
    for _, reads, _ in reversed(rules):
        last_reads.append(frozenset(reads) - later)
        later |= set(reads)
    return Plan(
        graph,
        rules,
        tuple(reversed(last_reads)),
        tuple(sorted(sources)),
        tuple((number, *rule_of(number)) for number in sorted(tail)),  # type: ignore[misc]
        last,
    )


def _copied(graph: Graph, number: int) -> int:
    """The operation whose output this one's is a copy of, or itself."""
    while graph.operations[number].name in ("clone", "alias"):
        [number] = graph.operations[number].reads
    return number


def constants_of(graph: Graph, dtype: torch.dtype) -> list[Tensor]:
    """The constants of a graph from the weights of the moment, in this dtype."""
    return [c.to(dtype) if c.is_floating_point() else c for c in graph.constants()]


def upper_differences(
    plan: Plan, lo: Tensor, hi: Tensor, y: Tensor, before_relus: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Upper bounds of logit_j - logit_y over boxes of images (N, C, H, W): (N, K), 0 at y.

    ``before_relus`` is given the (center, radius) of each ReLU's input.
    """
    dtype = lo.dtype
    constants = constants_of(plan.graph, dtype)
    spans = {0: Span(box=Box(lo, hi))}
    for (number, reads, rule), done in zip(plan.rules, plan.last_reads, strict=True):
        if before_relus is not None and plan.graph.operations[number].name == "relu":
            before_relus.append(spans[reads[0]].ball)
        spans[number] = rule(constants, dtype, [spans[source] for source in reads])
        for source in done:
            del spans[source]
    return through_tail(plan, constants, spans, y)


def through_tail(plan: Plan, constants: Sequence[Tensor], spans: dict[int, Span], y: Tensor) -> Tensor:
    """Upper bounds of logit_j - logit_y over boxes of what the tail reads: (N, K), 0 at y.

    The tail is one affine map W: a difference has the weights W_j - W_y. W is the gradient of the logits, for K copies
    of one point: it depends on no image.
    """
    like = spans[plan.sources[0]].ball[0]
    dtype, device, classes = like.dtype, like.device, plan.graph.classes
    eye = torch.eye(classes, dtype=dtype, device=device)
    centers = {source: spans[source].ball[0] for source in plan.sources}
    logits = _through(plan, constants, dtype, centers)
    weights = [eye]
    if plan.tail:
        with torch.enable_grad():
            points = {
                n: torch.zeros(classes, *at.shape[1:], dtype=dtype, device=device, requires_grad=True)
                for n, at in centers.items()
            }
            reached = _through(plan, constants, dtype, points)
        weights = list(torch.autograd.grad(reached, list(points.values()), eye, create_graph=torch.is_grad_enabled()))
    bounds = logits - logits.gather(1, y[:, None])
    for source, weight in zip(plan.sources, weights, strict=True):
        flat, radius = (part.unsqueeze(-1).flatten(1) for part in (weight, spans[source].ball[1]))  # of numbers too
        # W_j - W_y for each label, then for each sample; or at once, where there are fewer samples than labels.
        rows = (flat - flat[:, None]).abs()[y] if len(flat) <= len(y) else (flat - flat[y][:, None]).abs()
        bounds = bounds + torch.einsum("nd,nkd->nk", radius, rows)
    return torch.where(bounds.isnan(), torch.inf, bounds).scatter(1, y[:, None], 0.0)  # inf - inf: nothing is known


def _through(plan: Plan, constants: Sequence[Tensor], dtype: torch.dtype, values: dict[int, Tensor]) -> Tensor:
    """The logits of a batch, from values of the sources."""
    values = dict(values)
    for number, reads, rule in plan.tail:
        values[number] = rule.center(constants, dtype, [values[source] for source in reads])
    return values[plan.last]


def _rule(
    graph: Graph, operation: Operation, constants: Sequence[Tensor], dtype: torch.dtype
) -> tuple[tuple[int, ...], Rule]:
    """What an operation reads, and how boxes pass it."""
    reads, name = operation.reads, operation.name
    if operation.corners is not None:  # as tight as a box can be: what it is made of is not needed
        corners = operation.corners
        return corners.reads, MonotoneRule(_call(graph, corners, constants, as_dtype(dtype)))
    if name == "relu":
        return reads, MonotoneRule(_call(graph, replace(operation, function=F.relu), constants, None))
    if name == "mul" and len(reads) == 2:
        return reads, ElementwiseRule(lambda constants, dtype: ProductStep(operation, constants))
    if name in CURVED:
        return reads, ElementwiseRule(lambda constants, dtype: CurvedStep(operation, constants, dtype))
    forms = affine_forms(operation)
    signed = _call(graph, forms.signed, constants, as_dtype(dtype))
    change = with_absolute(dtype, forms.weights, forms.biases, _nothing)
    absolute = _call(graph, forms.positive, constants, change)
    shifts = (
        name in ("add", "sub", "rsub")
        and len(operation.args) == 2 and not operation.kwargs
        and len(reads) == 1 and not (isinstance(operation.args[0], Value) and isinstance(operation.args[1], Value))
        and graph.operations[reads[0]].shape == operation.shape
    )  # fmt: skip
    return reads, AffineRule(signed, absolute, forms, shifts)


def _call(graph: Graph, operation: Operation, constants: Sequence[Tensor], change: Change | None) -> Call:
    """An operator for a batch: at once where that gives the same on random images."""
    shapes = tuple(graph.operations[number].shape for number in operation.reads)
    by_image = Call(operation, shapes, False)
    if any(shape[:1] != (1,) for shape in (*shapes, operation.shape)):
        return by_image
    if operation.name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "expand"):
        sizes = (operation.args[0], [-1, *operation.shape[1:]], *operation.args[2:])
        operation = replace(operation, args=sizes)
    at_once = Call(operation, shapes, True)
    generator = torch.Generator().manual_seed(0)
    dtype = next((c.dtype for c in constants if c.is_floating_point()), torch.float32)
    points = [torch.randn(TRIED, *s[1:], generator=generator, dtype=dtype).to(graph.device) for s in shapes]
    with torch.no_grad():
        expected = by_image(constants, change, points)
        try:
            found = at_once(constants, change, points)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return by_image
    same = found.shape == expected.shape and torch.allclose(
        found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().amax())
    )
    return at_once if same else by_image


def _nothing(bias: Any) -> Any:
    return torch.zeros_like(bias) if isinstance(bias, Tensor) else 0
