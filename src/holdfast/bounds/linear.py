"""Bounds of a network by lines: one pass forward for boxes, passes backward that carry lines to the image (CROWN).

    boxes:  lo_i <= h_i <= hi_i of each operation over the threat, and how far float32 may be from exact arithmetic
    lines:  A h_i >= ... >= A_0 x + b, operation by operation backward, each non-affine one replaced by a line

Source: Zhang et al. 2018 (CROWN); Xu et al. 2020 (general graphs), 2021 (optimised slopes, alpha-CROWN).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..threat import Threat
from .rounding import DOUBLE
from .steps import AffineStep, Box, Lines, RelaxedStep, ReluStep, Step, over_rows

SLOPES = 2**22  # of the lines for inner operations, that are optimised at a time: more take turns
MEMORY = 2**28  # bytes of the widest rows that are carried backward at a time


@dataclass
class Forward:
    """Boxes and rounding errors of all operations for a batch of N images.

    Args:
        boxes: of each operation's float32 output, (N, ...).
        errors: how far that output may be from the exact one of the same inputs, (N, ...); None: it is exact.
        unbounded: images that some bound does not exist for, (N,) bool; their boxes are empty of meaning.
    """

    boxes: list[Box] = field(default_factory=list)
    errors: list[Tensor | None] = field(default_factory=list)
    unbounded: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


@dataclass(frozen=True)
class Region:
    """The images that are allowed: center (N, *shape) and the box around it, and the ball of a norm in it."""

    box: Box
    center: Tensor
    threat: Threat
    eps: float

    def least(self, rows: Tensor) -> Tensor:
        """min over the region of <row, image>, at least: rows (N, S, *shape) -> (N, S)."""
        by_box = _sums(rows, (self.box.lo + self.box.hi) / 2) - _sums(rows.abs(), (self.box.hi - self.box.lo) / 2)
        if self.threat.norm == "linf":
            return by_box
        flat = rows.flatten(2)
        dual = flat.norm(dim=2) if self.threat.norm == "l2" else flat.abs().amax(2)
        by_ball = _sums(rows, self.center) - self.eps * dual
        return torch.maximum(by_box, by_ball)


def forward(
    steps: Sequence[Step],
    region: Region,
    *,
    rounding: bool = True,
    refine: bool = False,
    iterations: int = 0,
    known: Forward | None = None,
    until: float = math.inf,
) -> Forward:
    """Boxes of all operations.

    Args:
        steps: of the network.
        region: the images.
        rounding: also cover what float32 loses.
        refine: tighten the inputs of each non-affine operation by lines, where that matters (full CROWN).
        iterations: of Adam on the slopes of these lines. As many rows take part at a time as slopes fit in memory.
        known: of the same images and with the same rounding, by a cheaper method: boxes without lines before
            ``refine``, refined ones before ``iterations``. No box becomes wider than it is there.
        until: ``time.monotonic()`` from which on nothing is tightened any more.
    """
    found = Forward(unbounded=torch.zeros(len(region.center), dtype=torch.bool, device=region.center.device))
    read_by_relaxed = {number for step in steps if isinstance(step, RelaxedStep) for number in step.reads}
    lines: dict[int, Lines] = {}
    if known is not None and bool(known.unbounded.any()):
        known = None  # some boxes are empty of meaning
    tighter: set[int] = set()  # operations whose boxes differ from the known ones
    for number, step in enumerate(steps):
        inputs = [found.boxes[i] for i in step.reads]
        if known is not None and not tighter.intersection(_sources(step)):
            box, error = known.boxes[number], known.errors[number]
        else:
            box, error = _box(step, inputs, found, region if number == 0 else None, rounding=rounding)
            tighter.add(number)
            if known is not None:
                box, before = _both(box, known.boxes[number]), known.errors[number]
                error = error if error is None or before is None else torch.fmin(error, before)
            if rounding:
                box, error = _finite(box, error, found)
        found.boxes.append(box)
        found.errors.append(error)
        if refine and isinstance(step, RelaxedStep):
            lines[number] = step.lines(inputs)
        optimisable = not iterations or number in tighter or any(isinstance(steps[i], ReluStep) for i in lines)
        if refine and number in read_by_relaxed and number and (known is None or optimisable):
            found.boxes[number] = _refined(steps, found, lines, region, number, iterations, until)
            if found.boxes[number] is not box:
                tighter.add(number)
    return found


def _sources(step: Step) -> tuple[int, ...]:
    """The operations whose boxes its own is computed from."""
    corners = step.operation.corners
    return (*step.reads, *(corners.reads if corners is not None else ()))


def _box(
    step: Step, inputs: list[Box], found: Forward, region: Region | None, *, rounding: bool
) -> tuple[Box, Tensor | None]:
    """The box of an operation's float32 output, that of the image where a region is given, and its rounding error."""
    box = step.box(inputs) if region is None else region.box
    if step.operation.corners is not None:
        corners = step.operation.corners
        box = _within(box, [found.boxes[i] for i in corners.reads], corners.bind(step.constants))
    error = step.rounding(inputs, box) if rounding else None
    return (box if error is None else step.rounded(inputs, box, error)), error


def _both(one: Box, other: Box) -> Box:
    """What lies in both boxes, which hold the same values; a side that is no number says nothing."""
    return _ordered(torch.fmax(one.lo, other.lo), torch.fmin(one.hi, other.hi))


def _ordered(lo: Tensor, hi: Tensor) -> Box:
    """The box of two sides that may have crossed by what float64 loses: the float32 value lies in both."""
    crossed = lo > hi
    return Box(torch.where(crossed, torch.minimum(lo, hi), lo), torch.where(crossed, torch.maximum(lo, hi), hi))


def _within(box: Box, inputs: list[Box], corners: Callable[..., Tensor]) -> Box:
    """The part of a box between the values of a monotone operator at the corners of its inputs."""
    low = over_rows(corners, *(each.lo for each in inputs))
    high = over_rows(corners, *(each.hi for each in inputs))
    return Box(torch.maximum(box.lo, low), torch.minimum(box.hi, high))


def _finite(box: Box, error: Tensor | None, found: Forward) -> tuple[Box, Tensor | None]:
    """Mark images without a bound, and give them numbers that break no arithmetic."""
    good = box.lo.isfinite() & box.hi.isfinite()
    if error is not None:
        good = good & error.isfinite()
    found.unbounded |= ~good.flatten(1).all(1)
    lo, hi = (torch.where(good, side, torch.zeros_like(side)) for side in box)
    return Box(lo, hi), None if error is None else torch.where(good, error, torch.zeros_like(error))


def all_lines(steps: Sequence[Step], found: Forward) -> dict[int, Lines]:
    """The lines of each non-affine operation over these boxes."""
    return {
        number: step.lines([found.boxes[i] for i in step.reads])
        for number, step in enumerate(steps)
        if isinstance(step, RelaxedStep)
    }


def least(
    steps: Sequence[Step],
    found: Forward,
    lines: dict[int, Lines],
    region: Region,
    start: int,
    rows: Tensor,
    *,
    visit: Callable[[int, Tensor], Tensor | None] | None = None,
    rounding: bool = True,
) -> Tensor:
    """Lower bounds of <row, output of operation ``start``> over the region, as float32 computes that output.

    Args:
        steps: of the network.
        found: boxes and errors.
        lines: of the non-affine operations before ``start``.
        region: the images.
        start: the operation.
        rows: (N, S, *shape of its output).
        visit: is shown the rows of each operation's output, and may return what to add to them (N, S, ...).
        rounding: count what lines lose in float64; without it and with no errors, it is a guess and no bound.

    Returns:
        (N, S).
    """
    waiting: dict[int, Tensor] = {start: rows}
    total = rows.new_zeros(rows.shape[:2])
    for number in range(start, -1, -1):
        if number not in waiting:
            continue
        rows, step = waiting.pop(number), steps[number]
        if visit is not None and (more := visit(number, rows)) is not None:
            rows = rows + more
        error = found.errors[number]
        if error is not None:
            total = total - _sums(rows.abs(), error)
        if number == 0:
            total = total + region.least(rows)
        elif isinstance(step, AffineStep):
            flat = rows.flatten(0, 1)
            if step.shifts:
                total = total + rows.flatten(2) @ step.offset.flatten()
            for source, part in zip(step.reads, step.pull(flat), strict=True):
                _add(waiting, source, part.unflatten(0, rows.shape[:2]))
        else:
            box = found.boxes[number] if rounding else None
            total = total + _through_lines(rows, lines[number], box, step, waiting)
    return torch.where(total.isnan(), -math.inf, total)  # inf - inf: nothing is known


def _sums(rows: Tensor, values: Tensor) -> Tensor:
    """<row, value of its image>: rows (N, S, ...), values (N, ...) -> (N, S)."""
    return (rows.flatten(2) @ values.flatten(1)[..., None])[..., 0]


def _through_lines(rows: Tensor, lines: Lines, box: Box | None, step: Step, waiting: dict[int, Tensor]) -> Tensor:
    """Pass rows through a non-affine operation: the lower line where a row is positive, the upper one elsewhere.

    box: of its output, to count what float64 loses; None: that is not counted.
    """
    if box is None:  # fewer passes over the rows
        minus = rows.clamp_max(0)
        for source, low, high in zip(step.reads, lines.lower, lines.upper, strict=True):
            _add(waiting, source, torch.addcmul(rows * low, minus, high - low))
        lift = lines.upper_at - lines.lower_at
        return _inner(minus, lift) + _inner(rows, lines.lower_at)
    plus, minus = rows.clamp_min(0), rows.clamp_max(0)
    for source, low, high in zip(step.reads, lines.lower, lines.upper, strict=True):
        _add(waiting, source, plus * low + minus * high)
    at = plus * lines.lower_at + minus * lines.upper_at
    lost = DOUBLE * (plus - minus) * (box.largest[:, None] + lines.lower_at.abs() + lines.upper_at.abs())
    return (at - lost).flatten(2).sum(2)


def _inner(rows: Tensor, at: Tensor) -> Tensor:
    """<row, at> of rows (N, S, ...) and of one or S values (N, 1 or S, ...): (N, S)."""
    if at.shape[1] == 1:
        return torch.einsum("nsd,nd->ns", rows.flatten(2), at.flatten(1))
    return (rows * at).flatten(2).sum(2)


def _add(waiting: dict[int, Tensor], number: int, rows: Tensor) -> None:
    waiting[number] = waiting[number] + rows if number in waiting else rows


def _refined(
    steps: Sequence[Step],
    found: Forward,
    lines: dict[int, Lines],
    region: Region,
    number: int,
    iterations: int,
    until: float,
) -> Box:
    """The box of an operation's output, tightened by lines where a later operation cares; the same one if none does."""
    box = found.boxes[number]
    wanted = torch.zeros_like(box.lo, dtype=torch.bool)
    for step in steps:
        if isinstance(step, RelaxedStep) and number in step.reads:
            wanted |= step.unstable(box)
    wanted[found.unbounded] = False
    lo, hi = (side.flatten(1).clone() for side in box)
    counts = wanted.flatten(1).sum(1)
    order = counts.argsort(descending=True)
    size = _rows_at_a_time(steps, lines, number, iterations, lo.element_size())
    at = 0
    while at < len(order) and counts[order[at]]:
        most = int(counts[order[at]])
        images = order[at : at + max(1, size // most)]
        part = (*take(found, region, images), {n: take_lines(each, images) for n, each in lines.items()})
        places = wanted.flatten(1)[images].long().topk(most, 1).indices  # padded with values that need no bound
        for some in places.split(max(1, size // len(images)), 1):
            if time.monotonic() > until:
                break
            one = torch.zeros(*some.shape, lo.shape[1], dtype=lo.dtype, device=lo.device)
            one.scatter_(2, some[..., None], 1.0)
            one = one.unflatten(2, box.lo.shape[1:])
            low, high = (_bound(steps, *part, number, sign * one, iterations) for sign in (1, -1))
            rows = images[:, None].expand_as(some)
            lo[rows, some] = torch.maximum(lo[rows, some], low)
            hi[rows, some] = torch.minimum(hi[rows, some], -high)
        at += len(images)
    if not at:
        return box
    lo, hi = _ordered(lo, hi)
    return Box(lo.view_as(box.lo), hi.view_as(box.hi))


def _rows_at_a_time(steps: Sequence[Step], lines: dict[int, Lines], number: int, iterations: int, item: int) -> int:
    """How many rows of an inner operation are bounded at a time: as many as fit in memory, with their slopes."""
    width = max(step_width(step) for step in steps[: number + 1]) * item
    slopes = sum(step_width(steps[relu]) for relu in lines if isinstance(steps[relu], ReluStep))
    size = MEMORY // width
    return min(size, SLOPES // slopes) if iterations and slopes else size


def _bound(
    steps: Sequence[Step],
    found: Forward,
    region: Region,
    lines: dict[int, Lines],
    number: int,
    rows: Tensor,
    iterations: int,
) -> Tensor:
    """Lower bounds of rows of an inner operation, with optimised slopes where Adam may take steps."""
    if iterations:
        return optimised(steps, found, lines, region, number, rows, iterations=iterations)
    return least(steps, found, lines, region, number, rows)


def relus_of(steps: Sequence[Step]) -> dict[int, ReluStep]:
    """The ReLUs among the steps, by number."""
    return {number: step for number, step in enumerate(steps) if isinstance(step, ReluStep)}


def step_width(step: Step) -> int:
    """How many values its output has for one image."""
    return math.prod(step.shape)


def take(found: Forward, region: Region, chosen: Tensor) -> tuple[Forward, Region]:
    """Both for some images."""
    part = Forward(
        [Box(box.lo[chosen], box.hi[chosen]) for box in found.boxes],
        [None if error is None else error[chosen] for error in found.errors],
        found.unbounded[chosen],
    )
    inside = Region(Box(region.box.lo[chosen], region.box.hi[chosen]), region.center[chosen], region.threat, region.eps)
    return part, inside


def put(found: Forward, chosen: Tensor, part: Forward) -> Forward:
    """The boxes of all images, with those of a part in the place of the chosen ones."""

    def placed(whole: Tensor, new: Tensor) -> Tensor:
        return whole.index_copy(0, chosen, new)

    boxes = [
        Box(placed(one.lo, new.lo), placed(one.hi, new.hi)) for one, new in zip(found.boxes, part.boxes, strict=True)
    ]
    errors = [
        one if one is None or new is None else placed(one, new)
        for one, new in zip(found.errors, part.errors, strict=True)
    ]
    return Forward(boxes, errors, placed(found.unbounded, part.unbounded))


def take_lines(lines: Lines, chosen: Tensor) -> Lines:
    """The lines of some images."""
    return Lines(
        tuple(slope[chosen] for slope in lines.lower), lines.lower_at[chosen],
        tuple(slope[chosen] for slope in lines.upper), lines.upper_at[chosen],
    )  # fmt: skip


def label_rows(classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of logit_y - logit_j for every label y and class j: (K, K, 1, K). Zero where j = y."""
    eye = torch.eye(classes, dtype=dtype, device=device)
    return (eye[:, None] - eye)[:, :, None]


def others(y: Tensor, classes: int) -> Tensor:
    """The classes other than each label, in order: (N, K - 1)."""
    every = torch.arange(classes - 1, device=y.device).expand(len(y), classes - 1)
    return every + (every >= y[:, None])


def against(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows of logit_y - logit_j for each j != y: (N, K - 1, 1, K)."""
    return label_rows(classes, dtype, y.device)[y[:, None], others(y, classes)]


def upper_differences(steps: Sequence[Step], found: Forward, region: Region, y: Tensor) -> Tensor:
    """Upper bounds of logit_j - logit_y by boxes, the last affine operations merged: (N, K), 0 at y.

    Rows on the way through the last affine operations depend on the label alone: they are carried for K labels, not for
    N images.
    """
    last, dtype = len(steps) - 1, found.boxes[0].lo.dtype
    rows = label_rows(steps[last].shape[-1], dtype, y.device)
    waiting, total = {last: rows}, rows.new_zeros(len(y), rows.shape[1])
    for number in range(last, -1, -1):
        if number not in waiting:
            continue
        rows, step = waiting.pop(number), steps[number]
        error = found.errors[number]
        if error is not None:
            total = total - _spread(rows, error, y)
        if number == 0:
            total = total + region.least(rows[y])
        elif isinstance(step, AffineStep):
            total = total + (rows * step.offset).flatten(2).sum(2)[y]
            for source, part in zip(step.reads, step.pull(rows.flatten(0, 1)), strict=True):
                _add(waiting, source, part.unflatten(0, rows.shape[:2]))
        else:
            box = found.boxes[number]
            middle = torch.einsum("nd,nkd->nk", ((box.lo + box.hi) / 2).flatten(1), rows.flatten(2)[y])
            total = total + middle - _spread(rows, (box.hi - box.lo) / 2, y)
    return torch.where(total.isnan(), math.inf, -total)  # inf - inf: nothing is known


def _spread(rows: Tensor, radius: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("nd,nkd->nk", radius.flatten(1), rows.abs().flatten(2)[y])


def optimised(
    steps: Sequence[Step],
    found: Forward,
    lines: dict[int, Lines],
    region: Region,
    start: int,
    rows: Tensor,
    *,
    iterations: int = 20,
    rate: float = 0.1,
) -> Tensor:
    """The best lower bounds of ``rows`` by slopes of ReLUs: 0, 1, the adaptive ones, and Adam (alpha-CROWN).

    Args:
        steps: of the network.
        found: boxes and errors, which stay.
        lines: of the non-affine operations before ``start``.
        region: the images.
        start: the operation whose output the rows read.
        rows: (N, S, *shape).
        iterations: steps of Adam on the slopes, one slope for each image, row and ReLU.
        rate: of Adam.

    Returns:
        (N, S).
    """
    best = least(steps, found, lines, region, start, rows)
    relus = {number: step for number, step in relus_of(steps).items() if number in lines}
    if not relus:
        return best

    def bound(alphas: dict[int, Tensor]) -> Tensor:
        own = dict(lines)
        for number, alpha in alphas.items():
            own[number] = relus[number].lines([found.boxes[i] for i in relus[number].reads], alpha)
        return least(steps, found, own, region, start, rows)

    shapes = {number: (*rows.shape[:2], *steps[number].shape) for number in relus}
    for slope in (0.0, 1.0):
        best = torch.maximum(best, bound({n: rows.new_full((1, 1, *shape[2:]), slope) for n, shape in shapes.items()}))
    alphas = {n: lines[n].lower[0].expand(shape).clone().requires_grad_() for n, shape in shapes.items()}
    optimiser = torch.optim.Adam(alphas.values(), lr=rate)
    for _ in range(iterations):
        if bool((best > 0).all()):
            break
        with torch.enable_grad():
            reached = bound(alphas)
            if not reached.requires_grad:  # no ReLU lies on the way to these rows
                break
            optimiser.zero_grad()
            (-reached[best < 0]).sum().backward()  # what is above zero needs no better slope
        best = torch.maximum(best, reached.detach())
        optimiser.step()
        with torch.no_grad():
            for alpha in alphas.values():
                alpha.clamp_(0, 1)
    return best
