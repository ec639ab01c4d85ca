"""The primitive operators: how each maps a box, how lines bound it from both sides, how float32 rounds it.

Four kinds. An affine operator is exact for lines; AFFINE says which of its arguments multiply and which are added, and
how many products it sums. A smooth function of one variable is bounded by samples and by its second derivative: CURVED.
A ReLU and a product of two values have rules of their own. To bound another operator, add a line to one of the tables;
a composite one goes to ``composites.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..threat import column
from .graph import CannotBound, Constant, Graph, Operation, Value, leaves_in, leaves_of
from .rounding import FUNCTION, HUGE, TINY, UNIT, gamma, underflow

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


@dataclass(frozen=True)
class Affine:
    """An affine operator.

    Args:
        terms: how many products are summed for one output, from the operation and its constants; 0: nothing rounds.
        weights: arguments that multiply, where they are constants.
        biases: arguments that are added, where they are constants.
        absolute: the operator with every sign positive, where it is another one.
        inputs: arguments that may be values, where not all may: the operator is affine in these alone.
    """

    terms: int | Callable[[Operation, Sequence[Tensor], Graph], int] = 0
    weights: tuple[int | str, ...] = ()
    biases: tuple[int | str, ...] = ()
    absolute: Callable[..., Any] | None = None
    inputs: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Curved:
    """A function of one variable, smooth but for its kinks.

    Args:
        curvature: a bound of its absolute second derivative on [lo, hi], both tensors, away from kinks.
        monotone: whether it increases.
        kinks: where its derivative jumps.
        least: of its values, where samples alone would not give it.
        slack: by how much the kernel may differ from a smooth function, as softplus does beyond its threshold.
        cancels: what the kernel loses where it adds numbers of the size of its argument, in units of that size: a gelu
            is x (1 + erf), also where erf is almost -1.
    """

    curvature: Callable[[Operation, Tensor, Tensor], Tensor | float]
    monotone: bool = False
    kinks: tuple[float, ...] = ()
    least: float = -math.inf
    slack: Callable[[Operation], float] = lambda operation: 0.0
    cancels: float = 0.0


def _inputs_per_output(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of a sum or a mean over whole dimensions."""
    size = math.prod(graph.operations[operation.inputs[0]].shape)
    return max(1, size // max(1, math.prod(operation.shape)))


def _inputs_of_mean(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """A fused norm computes x scale - mean scale, and not (x - mean) scale: as if its mean rounded three times more."""
    return _inputs_per_output(operation, constants, graph) + 3


def _all_inputs(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    return math.prod(graph.operations[operation.inputs[0]].shape)


def _of_kernel(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of a convolution, transposed or not."""
    weight = constants[operation.args[1].number]
    return max(weight[0].numel(), weight[:, 0].numel())


def _inner(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of a product of matrices, whichever of them is the constant."""
    left = leaves_of(operation)[-2]
    shape = constants[left.number].shape if isinstance(left, Constant) else graph.operations[left.number].shape
    return shape[-1]


def _window(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of an average pool."""
    if len(operation.args) > 6 and (operation.args[6] or 1) < 0:
        raise CannotBound(f"bounds know average pooling by a positive divisor, got {operation.args[6]}.")
    kernel = operation.args[1]
    return math.prod(kernel) ** (2 if len(kernel) == 1 else 1)


def _of_positions(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of a bilinear interpolation, whose weights come from positions in float32: they round as the largest of them."""
    return 16 + 8 * max(*graph.operations[operation.inputs[0]].shape[-2:], *operation.shape[-2:])


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *more: Any) -> tuple[Tensor]:
    """x factor + offset, one of each for a channel, with running statistics."""
    factor = (var + more[-1]).rsqrt()
    factor = factor if weight is None else factor * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    shape = (1, -1, *[1] * (x.ndim - 2))
    return (x * factor.view(shape) + offset.view(shape),)


def _batch_norm_terms(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *more: Any) -> tuple[Tensor]:
    """The sum of the absolute terms, however a kernel arranges them: all arguments are absolute values here."""
    size = _batch_norm(x, weight, None, torch.zeros_like(mean), var, *more)[0]
    size = size + 2 * _batch_norm(torch.zeros_like(x), weight, None, -mean, var, *more)[0]
    return (size if bias is None else size + 2 * bias.view(1, -1, *[1] * (x.ndim - 2)),)


MOVE = Affine()
NORMS = ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")
SCALED = Affine(1, (0, 1))
AFFINE: dict[str, Affine] = {
    "convolution": Affine(_of_kernel, (1,), (2,), inputs=(0, 2)),
    "addmm": Affine(_inner, (1, 2, "alpha", "beta"), (0,)),
    "mm": Affine(_inner, (0, 1)),
    "bmm": Affine(_inner, (0, 1)),
    **dict.fromkeys(NORMS, Affine(8, (1, 3), (2,), inputs=(0,))),  # 6 on a CPU; a GPU's rsqrt has a few more units
    "mul": SCALED,
    "div": Affine(1, (1,), inputs=(0,)),
    "add": Affine(2, ("alpha",), (0, 1)),
    "sub": Affine(2, ("alpha",), (0, 1), torch.add),
    "rsub": Affine(2, (2, "alpha"), (1,), lambda x, other, alpha=1: other + alpha * x),
    "neg": Affine(0, absolute=torch.clone),
    "sum": Affine(_inputs_per_output),
    "mean": Affine(_inputs_of_mean),
    "cumsum": Affine(_all_inputs),
    "avg_pool2d": Affine(_window),
    "_adaptive_avg_pool2d": Affine(_all_inputs),
    "upsample_bilinear2d": Affine(_of_positions),
    "where": Affine(0, (), (1, 2), inputs=(1, 2)),
    "constant_pad_nd": Affine(0, (), (2,)),
    "cat": Affine(0, (), (0,)),
    "stack": Affine(0, (), (0,)),
    **dict.fromkeys(
        (
            "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "squeeze", "unsqueeze",
            "expand", "slice", "select", "split", "split_with_sizes", "unbind", "index_select", "index", "flip", "roll",
            "clone", "alias", "_to_copy", "lift_fresh", "reflection_pad2d", "replication_pad2d", "repeat",
            "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "upsample_nearest2d",
            "im2col", "diagonal", "copy", "movedim", "slice_scatter", "select_scatter",
        ),
        MOVE,
    ),
}  # fmt: skip


def _constant(bound: float) -> Callable[[Operation, Tensor, Tensor], Tensor | float]:
    return lambda operation, lo, hi: bound


def _positive(bound: Callable[[Tensor], Tensor]) -> Callable[[Operation, Tensor, Tensor], Tensor | float]:
    """Of a function that is smooth on x > 0 alone, and less and less curved there."""
    return lambda operation, lo, hi: torch.where(lo > 2 * TINY, bound(lo.clamp_min(TINY)), math.inf)


def _elu(operation: Operation, lo: Tensor, hi: Tensor) -> Tensor:
    """Of alpha (exp(inner x) - 1) on x < 0; 0 beyond."""
    alpha, scale, inner = _elu_settings(operation)
    return abs(alpha * scale) * inner * inner * torch.maximum((inner * lo).exp(), torch.ones_like(lo))


def _elu_settings(operation: Operation) -> tuple[float, float, float]:
    """(alpha, scale, input scale) of elu and celu."""
    given = [float(each) for each in operation.args[1:]]
    if operation.name == "celu":
        alpha = given[0] if given else 1.0
        return alpha, 1.0, 1.0 / alpha
    alpha, scale, inner = [*given, *[1.0] * (3 - len(given))]
    return alpha, scale, inner


def _softplus(operation: Operation) -> tuple[float, float]:
    """(beta, threshold)."""
    beta, threshold = [*(float(each) for each in operation.args[1:]), *(1.0, 20.0)[len(operation.args) - 1 :]]
    return beta, threshold


def _softplus_slack(operation: Operation) -> float:
    """The jump at the threshold, beyond which the kernel returns x; and what it may flush to zero before it divides."""
    beta, threshold = _softplus(operation)
    return (math.log1p(math.exp(min(-threshold, 700.0))) + 2 * TINY) / abs(beta)


CURVED: dict[str, Curved] = {
    "sigmoid": Curved(_constant(0.0963), True),
    "tanh": Curved(_constant(0.77), True),
    "erf": Curved(_constant(0.97), True),
    "gelu": Curved(_constant(1.0), cancels=4.0),
    "silu": Curved(_constant(0.501)),
    "mish": Curved(_constant(1.0)),
    "softplus": Curved(lambda operation, lo, hi: 0.25 * abs(_softplus(operation)[0]), True, slack=_softplus_slack),
    "log_sigmoid_forward": Curved(_constant(0.25), True),
    **dict.fromkeys(("elu", "celu"), Curved(_elu, False, (0.0,))),
    "hardswish": Curved(_constant(0.334), False, (-3.0, 3.0), cancels=4.0),
    "abs": Curved(_constant(0.0), False, (0.0,), 0.0),
    "sin": Curved(_constant(1.0)),
    "cos": Curved(_constant(1.0)),
    "atan": Curved(_constant(0.65), True),
    "pow": Curved(_constant(2.0), least=0.0),
    "exp": Curved(lambda operation, lo, hi: hi.exp(), True),
    "expm1": Curved(lambda operation, lo, hi: hi.exp(), True),
    "log": Curved(_positive(lambda lo: lo**-2), True),
    "log1p": Curved(lambda operation, lo, hi: _positive(lambda low: low**-2)(operation, 1 + lo, hi), True),
    "sqrt": Curved(_positive(lambda lo: 0.25 * lo**-1.5), True),
    "rsqrt": Curved(_positive(lambda lo: 0.75 * lo**-2.5)),
    "reciprocal": Curved(lambda operation, lo, hi: _away_from_zero(lo, hi)),
}  # fmt: skip


def _away_from_zero(lo: Tensor, hi: Tensor) -> Tensor:
    nearest = torch.where(lo > 0, lo, torch.where(hi < 0, -hi, torch.zeros_like(lo)))
    return torch.where(nearest > 2 * TINY, 2 * nearest.clamp_min(TINY) ** -3, math.inf)


def over_rows(function: Callable[..., Any], *rows: Tensor) -> Any:
    """A function of one image's values, for all rows at once."""
    return torch.vmap(function)(*rows)


class Step(ABC):
    """One operation with its constants filled in: what the methods ask of it."""

    def __init__(self, operation: Operation, constants: Sequence[Tensor] = ()) -> None:
        self.operation, self.inputs, self.shape = operation, operation.inputs, operation.shape
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

    def __init__(self, operation: Operation, constants: list[Tensor], graph: Graph, dtype: torch.dtype) -> None:
        super().__init__(operation, constants)
        rule = AFFINE[operation.name]
        _check_affine(operation, rule)
        self.shapes = [graph.operations[number].shape for number in self.inputs]
        self.terms = rule.terms if isinstance(rule.terms, int) else rule.terms(operation, constants, graph)
        self.moves = self.terms == 0 and rule.absolute is None
        self.inserts = self.moves and bool(rule.biases)
        self.averages = rule.absolute is None and not rule.weights and not rule.biases and operation.name not in NORMS
        ready = [c.to(dtype) if c.is_floating_point() else c for c in constants]
        norm = operation.name in NORMS
        weights, biases = ((1,), (2, 3)) if norm else (rule.weights, rule.biases)  # in the box a mean is added
        signed = replace(operation, function=_batch_norm) if norm else operation
        positive = signed if rule.absolute is None else replace(operation, function=rule.absolute)
        terms = replace(operation, function=_batch_norm_terms) if norm else positive
        self.function = signed.bind(ready, _as_dtype(dtype))
        self.absolute = positive.bind(ready, _absolute(dtype, weights, biases, lambda part: part * 0))
        self.magnitude = terms.bind(ready, _absolute(dtype, weights, biases, abs))
        self.zeros = [torch.zeros(shape, dtype=dtype, device=_device(ready)) for shape in self.shapes]
        self._factors = operation, ready, rule.weights, norm

    @cached_property
    def largest_weight(self) -> float:
        """No factor of an input is larger in absolute value. It waits for the device."""
        operation, constants, weights, norm = self._factors
        largest = _largest(operation, constants, weights)
        return max(largest, _largest_scale(operation, constants)) ** 2 if norm else largest

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
        apart = ((row * rise).sum() - pulled).abs() > 1e-9 * (
            (row * rise).abs().sum() + (row.abs() * most).sum()
        ) + 1e-300
        above = rise.abs() > most * (1 + 1e-9) + 1e-9 * most.amax()
        if bool(apart | above.any()):  # infinite weights prove nothing, and pass
            raise CannotBound(f"the operator {self.operation.name} is not affine as bounds read it.")

    @cached_property
    def offset(self) -> Tensor:
        """b, for one image."""
        out: Tensor = self.function(*self.zeros)
        return out

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
        upper = torch.where(unstable, hi / (hi - lo).clamp_min(1e-300), on)
        upper_at = torch.where(unstable, -upper * lo, torch.zeros_like(lo))
        return Lines((lower,), torch.zeros_like(lo), (upper,), upper_at)


class CurvedStep(RelaxedStep):
    """A function of one variable: between two samples it is within curvature h^2 / 8 of its chord."""

    def __init__(self, operation: Operation, constants: list[Tensor], graph: Graph, dtype: torch.dtype) -> None:
        super().__init__(operation, constants)
        if operation.name == "pow" and operation.args[1] != 2:
            raise CannotBound(f"no bound is known for the power {operation.args[1]}.")
        self.rule = CURVED[operation.name]
        self.slack = self.rule.slack(operation)
        self.function = operation.bind(
            [c.to(dtype) if c.is_floating_point() else c for c in constants], _as_dtype(dtype)
        )

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
    constants = graph.constants()
    steps: list[Step] = [ImageStep(graph.operations[0])]
    for operation in graph.operations[1:]:
        name, inputs = operation.name, operation.inputs
        if name == "relu":
            steps.append(ReluStep(operation, constants))
        elif name == "mul" and len(inputs) == 2:
            steps.append(ProductStep(operation, constants))
        elif name == "mul" and _is_square(operation):
            raise CannotBound("a value times itself: write x.square(), which has tighter bounds.")
        elif name in CURVED:
            steps.append(CurvedStep(operation, constants, graph, dtype))
        elif name in AFFINE:
            affine = AffineStep(operation, constants, graph, dtype)
            if dtype == torch.float64:  # for proofs
                affine.check()
            steps.append(affine)
        else:
            raise CannotBound(no_rule(name))
    return steps


def _check_affine(operation: Operation, rule: Affine) -> None:
    """Raise CannotBound where an operator of the table is not affine in its inputs."""
    values = [
        place for place, argument in enumerate(operation.args) if any(isinstance(x, Value) for x in leaves_in(argument))
    ]
    products = operation.name in ("addmm", "mm", "bmm", "mul") and sum(place in rule.weights for place in values) > 1
    if products or (rule.inputs is not None and not set(values) <= set(rule.inputs)):
        raise CannotBound(f"no bound is known for the operator {operation.name} of values that depend on the image.")
    if dict(operation.kwargs).get("rounding_mode") is not None:
        raise CannotBound(f"no bound is known for the operator {operation.name} that rounds.")


def no_rule(name: str) -> str:
    """The sentence of an operator without a rule."""
    return f"no bound is known for the operator {name}."


def _is_square(operation: Operation) -> bool:
    return sum(isinstance(leaf, Value) for leaf in operation.args[:2]) == 2


def _device(constants: list[Tensor]) -> torch.device:
    return constants[0].device if constants else torch.device("cpu")


def _as_dtype(dtype: torch.dtype) -> Callable[[int | str, Any], Any]:
    return lambda position, leaf: dtype if isinstance(leaf, torch.dtype) else leaf


def _absolute(
    dtype: torch.dtype, weights: Sequence[int | str], biases: Sequence[int | str], bias: Callable[[Any], Any]
) -> Callable[[int | str, Any], Any]:
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


def _largest(operation: Operation, constants: list[Tensor], weights: Sequence[int | str]) -> float:
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


def _largest_scale(operation: Operation, constants: list[Tensor]) -> float:
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
