"""The operations of a network with their constants filled in: boxes, lines and rounding, which the methods ask for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..threat import column
from .graph import CannotBound, Change, Constant, Graph, Operation, Value, leaves_in
from .rounding import FUNCTION, HUGE, TINY, UNIT, gamma, underflow
from .rules import AFFINE, CURVED, NORMS, Affine, batch_norm, batch_norm_terms

CACHED = ("offset", "shifts", "matrix", "_back")  # what an affine step computes once from its constants
CELLS = 32  # of the grid on which a curved function is sampled


class Box(NamedTuple):
    """lo <= h <= hi, elementwise: both (N, ...), one row for each image."""

    lo: Tensor
    hi: Tensor

    @property
    def largest(self) -> Tensor:
        """No value is larger in absolute value."""
        return torch.maximum(self.lo.abs(), self.hi.abs())


class Lines(NamedTuple):
    """sum_i lower_i h_i + lower_at <= f(h) <= sum_i upper_i h_i + upper_at, over the boxes of the inputs h_i.

    All (N, S, ...): S is 1, or there is a line for each of S rows that are bounded.
    """

    lower: tuple[Tensor, ...]
    lower_at: Tensor
    upper: tuple[Tensor, ...]
    upper_at: Tensor


def over_rows(function: Callable[..., Any], *rows: Tensor) -> Any:
    """A function of one image's values, for all rows at once."""
    return torch.vmap(function)(*rows)


class Step(ABC):
    """One operation with its constants filled in: what the methods ask of it."""

    def __init__(self, operation: Operation, constants: Sequence[Tensor] = ()) -> None:
        self.operation, self.reads, self.shape = operation, operation.reads, operation.shape
        self.constants = constants

    @abstractmethod
    def box(self, boxes: list[Box]) -> Box:
        """A box of the outputs over the boxes of the inputs, in exact arithmetic."""

    @abstractmethod
    def rounding(self, boxes: list[Box], out: Box) -> Tensor | None:
        """At most how far a float32 output is from the exact output of the same inputs, (N, ...); None: it is exact."""

    def rounded(self, boxes: list[Box], out: Box, error: Tensor) -> Box:
        """The box of float32 outputs: ``out``, and the error on either side where nothing better is known."""
        return Box(out.lo - error, out.hi + error)


class AffineStep(Step):
    """W h + b."""

    def __init__(self, operation: Operation, constants: Sequence[Tensor], graph: Graph, dtype: torch.dtype) -> None:
        super().__init__(operation, constants)
        rule, forms = AFFINE[operation.name], affine_forms(operation)
        weights, biases, norm = forms.weights, forms.biases, operation.name in NORMS
        self.terms = rule.terms if isinstance(rule.terms, int) else rule.terms(operation, constants, graph)
        self.moves = forms.moves
        self.inserts = self.moves and bool(rule.biases)
        self.averages = rule.absolute is None and not rule.weights and not rule.biases and not norm
        terms = replace(operation, function=batch_norm_terms) if norm else forms.positive
        self.function = forms.signed.bind(constants, as_dtype(dtype))
        self.absolute = forms.positive.bind(constants, with_absolute(dtype, weights, biases, lambda part: part * 0))
        self.magnitude = terms.bind(constants, with_absolute(dtype, weights, biases, abs))
        shapes = [graph.operations[number].shape for number in self.reads]
        self.zeros = [torch.zeros(shape, dtype=dtype, device=graph.device) for shape in shapes]
        self._factors, self._signed = (rule.weights, norm), forms.signed

    def cast(self, constants: Sequence[Tensor], dtype: torch.dtype) -> AffineStep:
        """The same in another precision, to pull rows back and no more."""
        other = copy(self)
        for kept in CACHED:
            vars(other).pop(kept, None)
        other.function = self._signed.bind(constants, as_dtype(dtype))
        other.zeros = [zero.to(dtype) for zero in self.zeros]
        return other

    @cached_property
    def largest_weight(self) -> float:
        """No factor of an input is larger in absolute value. It waits for the device."""
        weights, norm = self._factors
        largest = _largest(self.operation, self.constants, weights)
        return max(largest, _largest_scale(self.operation, self.constants)) ** 2 if norm else largest

    @torch.no_grad()
    def check(self) -> None:
        """Raise CannotBound unless it is affine at a random point, with the derivative and the signs that bounds use:
        no entry of a table is believed unseen."""
        generator = torch.Generator().manual_seed(0)
        points = [torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device) for z in self.zeros]
        rise = self.function(*points) - self.offset
        row = torch.randn(rise.shape, generator=generator, dtype=rise.dtype).to(rise.device)
        pulled = sum((part[0] * at).sum() for part, at in zip(self.pull(row[None]), points, strict=True))
        most = self.absolute(*(at.abs() for at in points))
        most = most * (1 + 1e-9) + 1e-12 * self.offset.abs()  # of which a small rise is the rest
        apart = ((row * rise).sum() - pulled).abs() > 1e-9 * (row.abs() * most).sum() + 1e-300
        above = rise.abs() > most + 1e-9 * most.amax()
        wrong, self.shifts = torch.stack([apart | above.any(), self._shifts()]).tolist()  # one wait for the device
        if wrong:  # infinite weights prove nothing, and pass
            raise CannotBound(f"the operator {self.operation.name} is not affine as bounds read it.")

    @cached_property
    def offset(self) -> Tensor:
        """b, for one image."""
        out: Tensor = self.function(*self.zeros)
        return out

    @cached_property
    def shifts(self) -> bool:
        """Whether b is anything but zero."""
        return bool(self._shifts())

    def _shifts(self) -> Tensor:
        return (self.offset != 0).any()  # also where it is no number

    @cached_property
    def matrix(self) -> Tensor:
        """W, (out, in), of an operation with one input."""
        size = math.prod(self.shape)
        rows = torch.eye(size, dtype=self.offset.dtype, device=self.offset.device).view(size, *self.shape)
        return self.pull(rows)[0].flatten(1)

    @cached_property
    def _back(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        with torch.enable_grad():
            back: Callable[[Tensor], tuple[Tensor, ...]] = torch.func.vjp(self.function, *self.zeros)[1]
        return back

    def box(self, boxes: list[Box]) -> Box:
        if self.moves:
            return Box(*(over_rows(self.function, *corner) for corner in zip(*boxes, strict=True)))
        center = over_rows(self.function, *((box.lo + box.hi) / 2 for box in boxes))
        radius = over_rows(self.absolute, *((box.hi - box.lo) / 2 for box in boxes))
        return Box(center - radius, center + radius)

    def rounding(self, boxes: list[Box], out: Box) -> Tensor | None:
        if not self.terms:  # but a constant that is no float32 number is
            return gamma(0) * self.offset.abs().expand(boxes[0].lo.shape[0], *self.shape) if self.inserts else None
        largest = [box.largest for box in boxes]
        size: Tensor = over_rows(self.magnitude, *largest)
        most = torch.stack([part.flatten(1).amax(1) for part in largest]).amax(0)
        error = gamma(self.terms) * size + column(underflow(self.terms, most, self.largest_weight), size)
        return error.masked_fill(~(size < HUGE), math.inf)

    def rounded(self, boxes: list[Box], out: Box, error: Tensor) -> Box:
        """One sum is rounded monotonically: by its own size, not by the largest one of the box. No sum of positive
        numbers is rounded below zero. Both keep a variance away from zero."""
        box = super().rounded(boxes, out, error)
        if self.operation.name in ("add", "sub", "rsub") and not self.operation.kwargs:
            constant = self.magnitude(*self.zeros)
            lo, hi = (gamma(2) * (side.abs() + constant) + 16 * TINY for side in out)
            box = Box(torch.maximum(box.lo, out.lo - lo), torch.minimum(box.hi, out.hi + hi))
        if self.averages:
            positive = torch.stack([(each.lo >= 0).flatten(1).all(1) for each in boxes]).all(0)
            box = Box(torch.where(column(positive, box.lo), box.lo.clamp_min(0), box.lo), box.hi)
        return box

    def pull(self, rows: Tensor) -> tuple[Tensor, ...]:
        """A W, for each input: (R, *out) -> (R, *in)."""
        pulled: tuple[Tensor, ...] = torch.vmap(self._back)(rows)
        return pulled


class RelaxedStep(Step):
    """An operation that is not affine: lines bound it from both sides."""

    @abstractmethod
    def lines(self, boxes: list[Box]) -> Lines:
        """Lines over these boxes."""

    def unstable(self, box: Box) -> Tensor:
        """Which values of an input's box matter to the lines, (N, ...) bool."""
        return box.hi > box.lo


class ReluStep(RelaxedStep):
    """max(h, 0). Below, any slope from 0 to 1 will do; above, the chord."""

    def box(self, boxes: list[Box]) -> Box:
        [box] = boxes
        return Box(box.lo.clamp_min(0), box.hi.clamp_min(0))

    def rounding(self, boxes: list[Box], out: Box) -> Tensor | None:
        return None

    def unstable(self, box: Box) -> Tensor:
        return (box.lo < 0) & (box.hi > 0)

    def lines(self, boxes: list[Box], alpha: Tensor | None = None) -> Lines:
        """alpha: (N, S, ...) slopes of the lower line where h may have either sign; None: the smaller triangle."""
        lo, hi = (side[:, None] for side in boxes[0])
        on, unstable = (lo >= 0).to(lo.dtype), self.unstable(Box(lo, hi))
        if alpha is None:
            alpha = (hi > -lo).to(lo.dtype)
        lower = torch.where(unstable, alpha, on)
        width = torch.where(unstable, hi - lo, torch.ones_like(lo))  # 0 / 0 has no gradient, not even in `where`
        upper = torch.where(unstable, hi / width, on)
        upper_at = torch.where(unstable, -upper * lo, torch.zeros_like(lo))
        return Lines((lower,), torch.zeros_like(lo), (upper,), upper_at)


class CurvedStep(RelaxedStep):
    """A function of one variable: between two samples it is within curvature h^2 / 8 of its chord."""

    def __init__(self, operation: Operation, constants: Sequence[Tensor], dtype: torch.dtype) -> None:
        super().__init__(operation, constants)
        if operation.name == "pow" and operation.args[1] != 2:
            raise CannotBound(f"no bound is known for the power {operation.args[1]}.")
        self.rule = CURVED[operation.name]
        self.slack = self.rule.slack(operation)
        self.function = operation.bind(constants, as_dtype(dtype))

    def samples(self, box: Box) -> tuple[Tensor, Tensor, Tensor]:
        """Places (cells + 1, N, ...) from lo to hi, the function there, and how far it may leave its chords."""
        lo, hi = box
        share = torch.linspace(0, 1, CELLS + 1, dtype=lo.dtype, device=lo.device).view(-1, *[1] * lo.ndim)
        places = lo + (hi - lo) * share
        places[-1] = hi
        if self.rule.kinks:
            kinks = [torch.clamp(torch.full_like(lo, kink), lo, hi) for kink in self.rule.kinks]
            places = torch.cat([places, torch.stack(kinks)]).sort(0).values
        cell = (hi - lo) / CELLS
        curvature = self.rule.curvature(self.operation, lo, hi)
        leaves = cell * cell * curvature / 8 + self.slack
        return places, self.function(places), torch.where(cell > 0, leaves, torch.full_like(cell, self.slack))

    def box(self, boxes: list[Box]) -> Box:
        [box] = boxes
        if self.rule.monotone:
            low, high = self.function(box.lo), self.function(box.hi)
            return Box(torch.minimum(low, high) - self.slack, torch.maximum(low, high) + self.slack)
        _, values, leaves = self.samples(box)
        low = _no_nan(values.amin(0) - leaves, -math.inf).clamp_min(self.rule.least)
        return Box(low, _no_nan(values.amax(0) + leaves, math.inf))

    def rounding(self, boxes: list[Box], out: Box) -> Tensor | None:
        [box] = boxes
        places = self.samples(box)[0].detach().requires_grad_()
        with torch.enable_grad():
            steepest = torch.autograd.grad(self.function(places).sum(), places)[0].abs().amax(0)
        curvature = self.rule.curvature(self.operation, *box)
        steepest = steepest + curvature * (box.hi - box.lo) / CELLS
        error = FUNCTION * (out.largest + steepest * box.largest) + self.rule.cancels * UNIT * box.largest
        error = error + 4 * TINY * (1 + steepest + box.largest)  # what is flushed: the argument, a factor, the result
        return error.masked_fill(~(out.largest < HUGE), math.inf)

    def rounded(self, boxes: list[Box], out: Box, error: Tensor) -> Box:
        box = super().rounded(boxes, out, error)
        return Box(box.lo.clamp_min(self.rule.least), box.hi)

    def lines(self, boxes: list[Box]) -> Lines:
        [box] = boxes
        places, values, leaves = self.samples(box)
        secants = _slope(values.diff(dim=0), places.diff(dim=0), box)
        number = len(secants)
        chord = _slope(values[-1] - values[0], box.hi - box.lo, box)
        slopes = torch.stack([chord, *(secants[place] for place in (0, number // 4, number // 2, 3 * number // 4, -1))])
        slopes = torch.cat([slopes, torch.zeros_like(slopes[:1])]).nan_to_num(0.0, 0.0, 0.0)
        middle, average = places.mean(0), values.mean(0)
        best_lower = best_upper = torch.full_like(chord, math.inf)
        lower = upper = torch.zeros_like(chord)
        lower_at, upper_at = self.box(boxes)
        for slope in slopes:
            rest = values - slope * places
            low, high = rest.amin(0) - leaves, rest.amax(0) + leaves
            gap_below, gap_above = average - slope * middle - low, high + slope * middle - average
            better, higher = gap_below < best_lower, gap_above < best_upper
            lower, lower_at = torch.where(better, slope, lower), torch.where(better, low, lower_at)
            upper, upper_at = torch.where(higher, slope, upper), torch.where(higher, high, upper_at)
            best_lower, best_upper = torch.minimum(gap_below, best_lower), torch.minimum(gap_above, best_upper)
        return Lines((lower[:, None],), lower_at[:, None], (upper[:, None],), upper_at[:, None])


class ProductStep(RelaxedStep):
    """a b, both bounded: the planes of McCormick, of which the one that is closer in the middle is taken."""

    def box(self, boxes: list[Box]) -> Box:
        a, b = boxes
        corners = torch.stack([a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi])
        return Box(corners.amin(0), corners.amax(0))

    def rounding(self, boxes: list[Box], out: Box) -> Tensor | None:
        a, b = (box.largest for box in boxes)
        most = torch.maximum(a.flatten(1).amax(1), b.flatten(1).amax(1))
        error = gamma(1) * a * b + column(underflow(1, most, most), a)
        return error.masked_fill(~(a * b < HUGE), math.inf)

    def lines(self, boxes: list[Box]) -> Lines:
        a, b = boxes
        below = [(b.lo, a.lo, -a.lo * b.lo), (b.hi, a.hi, -a.hi * b.hi)]  # slope of a, slope of b, intercept
        above = [(b.lo, a.hi, -a.hi * b.lo), (b.hi, a.lo, -a.lo * b.hi)]
        middle_a, middle_b = (a.lo + a.hi) / 2, (b.lo + b.hi) / 2

        def chosen(planes: list[tuple[Tensor, Tensor, Tensor]], highest: bool) -> tuple[Tensor, ...]:
            first, second = ((p * middle_a + q * middle_b + at) for p, q, at in planes)
            take = (first >= second) if highest else (first <= second)
            return tuple(torch.where(take, x, y)[:, None] for x, y in zip(*planes, strict=True))

        (*lower, lower_at), (*upper, upper_at) = chosen(below, True), chosen(above, False)
        return Lines(tuple(lower), lower_at, tuple(upper), upper_at)


class ImageStep(Step):
    """The image itself."""

    def box(self, boxes: list[Box]) -> Box:
        raise AssertionError("the box of the image is given")

    def rounding(self, boxes: list[Box], out: Box) -> Tensor | None:
        return None


def bind(graph: Graph, dtype: torch.dtype) -> list[Step]:
    """The steps of a graph with the weights of the moment, in this dtype.

    Raises:
        CannotBound: An operator has no rule.
    """
    constants = [c.to(dtype) if c.is_floating_point() else c for c in graph.constants()]
    steps: list[Step] = [ImageStep(graph.operations[0])]
    for operation in graph.operations[1:]:
        name, inputs = operation.name, operation.reads
        if name == "relu":
            steps.append(ReluStep(operation, constants))
        elif name == "mul" and len(inputs) == 2:
            steps.append(ProductStep(operation, constants))
        elif name in CURVED:
            steps.append(CurvedStep(operation, constants, dtype))
        elif name in AFFINE:
            affine = AffineStep(operation, constants, graph, dtype)
            if dtype == torch.float64:  # for proofs
                affine.check()
            steps.append(affine)
        else:
            raise CannotBound(no_rule(name))
    return steps


@dataclass(frozen=True)
class AffineForms:
    """What is called for the box of an affine operator.

    Args:
        signed: W h + b.
        positive: the same, for |W| and without b once constants are changed so.
        weights: arguments that multiply, where they are constants.
        biases: arguments that are added, where they are constants.
        moves: whether W only moves values, so that corners of a box are corners afterwards.
    """

    signed: Operation
    positive: Operation
    weights: tuple[int | str, ...]
    biases: tuple[int | str, ...]
    moves: bool


def affine_forms(operation: Operation) -> AffineForms:
    """Raises CannotBound where the operator is not affine in its inputs."""
    rule, norm = AFFINE[operation.name], operation.name in NORMS
    _check_affine(operation, rule)
    signed = replace(operation, function=batch_norm) if norm else operation
    positive = signed if rule.absolute is None else replace(operation, function=rule.absolute)
    weights, biases = ((1,), (2, 3)) if norm else (rule.weights, rule.biases)  # in the box a mean is added
    return AffineForms(signed, positive, weights, biases, rule.terms == 0 and rule.absolute is None)


def _check_affine(operation: Operation, rule: Affine) -> None:
    """Raise CannotBound where an operator of the table is not affine in its inputs."""
    values = [
        place for place, argument in enumerate(operation.args) if any(isinstance(x, Value) for x in leaves_in(argument))
    ]
    products = operation.name in ("addmm", "mm", "bmm", "mul") and sum(place in rule.weights for place in values) > 1
    if products or (rule.varying is not None and not set(values) <= set(rule.varying)):
        raise CannotBound(f"no bound is known for the operator {operation.name} of values that depend on the image.")
    if dict(operation.kwargs).get("rounding_mode") is not None:
        raise CannotBound(f"no bound is known for the operator {operation.name} that rounds.")


def no_rule(name: str) -> str:
    """The sentence of an operator without a rule."""
    return f"no bound is known for the operator {name}."


def as_dtype(dtype: torch.dtype) -> Change:
    """A dtype among the arguments becomes this one."""
    return lambda position, leaf: dtype if isinstance(leaf, torch.dtype) else leaf


def with_absolute(
    dtype: torch.dtype, weights: Sequence[int | str], biases: Sequence[int | str], bias: Callable[[Any], Any]
) -> Change:
    """Constants that multiply become absolute values; those that are added become what ``bias`` makes of them."""

    def change(position: int | str, leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return dtype
        if isinstance(leaf, bool) or not isinstance(leaf, int | float | Tensor):
            return leaf
        if position in weights:
            return abs(leaf)
        return bias(leaf) if position in biases else leaf

    return change


def _largest(operation: Operation, constants: Sequence[Tensor], weights: Sequence[int | str]) -> float:
    """The largest absolute value of the constants that multiply; of a divisor, of its inverse."""
    largest = 1.0
    for position, argument in [*enumerate(operation.args), *operation.kwargs]:
        if position in weights:
            leaf = constants[argument.number] if isinstance(argument, Constant) else argument
            if isinstance(leaf, Tensor) and leaf.numel():
                size = float((1 / leaf if operation.name == "div" else leaf).detach().abs().amax())
                largest = max(largest, size)
            elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
                largest = max(largest, abs(1 / leaf) if operation.name == "div" and leaf else abs(leaf))
    return largest


def _largest_scale(operation: Operation, constants: Sequence[Tensor]) -> float:
    """The largest 1 / sqrt(var + eps) of a batch norm."""
    var, eps = constants[operation.args[4].number], operation.args[-1]
    least = float((var.detach().double() + eps).amin())
    return least**-0.5 if least >= TINY else math.inf  # a kernel may flush it to zero


def _slope(rise: Tensor, run: Tensor, box: Box) -> Tensor:
    """rise / run; zero over a run that is lost in rounding, where the rise is noise."""
    enough = run > 1e-9 * box.largest
    return torch.where(enough, rise / torch.where(enough, run, torch.ones_like(run)), torch.zeros_like(run))


def _no_nan(values: Tensor, instead: float) -> Tensor:
    return torch.where(values.isnan(), torch.full_like(values, instead), values)
