"""The methods of proof, one after another, each on what the ones before it left: it starts from their boxes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..outputs import Outputs, Queried, fooled
from ..progress import Progress
from ..results import ProofCost
from ..threat import Threat
from .agreement import compare_answers
from .branch import branch
from .by_lipschitz import margins_by_lipschitz
from .cache import ProofCache, Undecided, joined
from .graph import Graph
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
from .regions import Allowed, farthest, region_in, region_of
from .steps import ReluStep, Step

METHODS = ("interval", "linear", "crown", "alpha", "branch")  # each tries the ones before it first
LINEAR, CROWN, ALPHA, BRANCH = range(1, len(METHODS))
ROWS = 256  # images that are bounded at a time, at most
LEAST = 2.0**-1074  # the smallest number above zero: the bound of a margin whose sign alone is proved
INNER = 10  # steps of Adam on the slopes of lines for inner operations
SHARE = 0.5  # of the time, at most, that bounds may take where branch and bound is to follow


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
        ended: (N,) bool: its last method ran to its end; False: time ran out first, and some boxes or slopes are those
            of the method before.
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


class Asked(Queried):
    """The network, with a count of the images that it was asked about."""

    forwards = 0

    def query(self, x: Tensor) -> Outputs:
        self.forwards += len(x)
        return super().query(x)


@dataclass(frozen=True)
class Work:
    """What certifying any of the samples needs; ``index`` names them in the cache, and is on the CPU."""

    model: nn.Module
    asked: Asked
    graph: Graph
    steps: list[Step]
    x: Tensor
    y: Tensor
    index: Tensor
    threat: Allowed
    level: int
    cache: ProofCache | None

    @property
    def rows(self) -> int:
        """How many images are bounded at a time: as many as fit in memory with a row for each class."""
        width = max(math.prod(step.shape) for step in self.steps) * 8 * self.graph.classes
        return max(1, min(ROWS, MEMORY // width))

    def region(self, rows: Tensor) -> Region:
        """What is allowed of some images."""
        if isinstance(self.threat, Threat):
            return region_of(self.x[rows], self.threat)
        return region_in(self.x[rows], *(corner[rows] for corner in self.threat))


def certify_rows(work: Work, rows: Tensor, until: float, report: Progress) -> Certified:
    """The ladder of methods for some images."""
    ladder = Ladder(work, rows, until, report)
    ladder.begin()
    now = time.monotonic()
    if ladder.branches:
        until = min(until, now + SHARE * max(0.0, until - now))
    for level, method, share in (
        (LINEAR, ladder.linear, work.rows), (CROWN, ladder.crown, _share(work)), (ALPHA, ladder.alpha, _share(work)),
    ):  # fmt: skip
        if work.level >= level:
            ladder.improve(level, method, share, until)
    if ladder.branches:
        ladder.branch()
    ladder.keep()
    low = ladder.bounds.amin(1).cpu()
    return Certified(
        low > 0, tuple(ladder.by), low, ladder.x_adv, ladder.seconds, ladder.ended, tuple(ladder.costs.values())
    )


class Ladder:
    """The methods one after another for some images; what each of them changes is kept here."""

    def __init__(self, work: Work, rows: Tensor, until: float, report: Progress) -> None:
        self.work, self.rows, self.until, self.report = work, rows, until, report
        self.x, self.y = work.x[rows], work.y[rows]
        self.index = work.index[rows.cpu()].tolist()
        self.region, self.found = work.region(rows), Forward()
        self.margins = against(self.y, work.graph.classes, torch.float64)
        self.finite, self.correct = torch.ones(2, len(rows), dtype=torch.bool, device=self.x.device)
        self.bounds = torch.full(self.margins.shape[:2], -math.inf, dtype=torch.float64, device=self.x.device)
        self.level = torch.zeros(len(rows), dtype=torch.int64)  # the last of METHODS that came to its end
        self.by = [""] * len(rows)
        self.seconds = torch.zeros(len(rows), dtype=torch.float64)
        self.ended = torch.ones(len(rows), dtype=torch.bool)
        self.news = False  # whether anything is known that the cache does not hold
        self.x_adv: dict[int, Tensor] = {}
        self.costs: dict[str, ProofCost] = {}
        splits = any(isinstance(step, ReluStep) for step in work.steps)
        self.branches = splits and work.level >= BRANCH

    @property
    def left(self) -> list[int]:
        """The numbers of the images that are answered right and not proved."""
        open_ = (self.bounds.amin(1) <= 0) & self.finite & self.correct
        return [number for number, is_open in enumerate(open_.tolist()) if is_open]

    def there(self, numbers: Sequence[int]) -> Tensor:
        """Numbers of images on their device."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.x.device)

    def begin(self) -> None:
        """What earlier calls found of these images; and the boxes of the others, with what follows from them alone."""
        began, work = time.monotonic(), self.work
        # Known images too: a network that answers otherwise than before is none that their boxes are of.
        finite, logits, compared = compare_answers(work.asked, work.steps, work.graph.classes, self.x, self.region)
        self.finite, self.correct = finite, logits.argmax(1) == self.y
        at, known = self.there([]), None
        if work.cache is not None:
            at, known = work.cache.get(self.index, self.y, self.region)
        if known is not None:
            self.bounds[at], self.level[at.cpu()] = known.low, known.level
        new = sorted({*range(len(self.rows))} - {*at.tolist()})
        if new or known is None:
            self.news = True
            some, region = self.there(new), work.region(self.rows[new])
            boxes = forward(work.steps, region)
            self.cheap(new, boxes, region, compared, began)
            fresh = Undecided(self.y[some], self.bounds[some], self.level[new], boxes, region)
            known = fresh if known is None else joined([known, fresh]).take(torch.cat([at, some]).argsort())
        self.found = known.found
        self.seconds += (time.monotonic() - began) / max(1, len(self.rows))

    def keep(self) -> None:
        """Leave to later calls what is known of the images that are left."""
        rows = self.rows.tolist()
        left = [place for place in self.left if rows[place] not in self.x_adv]
        if self.work.cache is not None and (self.news or len(left) < len(rows)):
            known = Undecided(self.y, self.bounds, self.level, self.found, self.region)
            self.work.cache.put(self.index, left, known.take(self.there(left)))

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
        """Take lower bounds (n, K - 1) of these images, where they exist and are better; one wait for the device."""
        low = low.masked_fill(low.isnan() | (found.unbounded | ~self.finite[some])[:, None], -math.inf)
        before = self.bounds[some].amin(1)
        self.bounds[some] = torch.maximum(self.bounds[some], low)
        now = (before <= 0) & (self.bounds[some].amin(1) > 0)
        for number, is_new in torch.stack([some, now.long()], 1).tolist():
            if is_new:
                self.by[number] = method
        proved = len(self.by) - self.by.count("")
        self.report(method, int(self.rows[0]) + proved, len(self.work.y))

    def cheap(
        self, numbers: list[int], boxes: Forward, region: Region, compared: list[tuple[Tensor, Tensor]], began: float
    ) -> None:
        """What boxes of some images, begun then, and Lipschitz constants say."""
        some = self.there(numbers)
        x, y = self.x[some], self.y[some]
        high = upper_differences(self.work.steps, boxes, region, y)
        self.raise_to(some, -high.gather(1, others(y, self.work.graph.classes)), boxes, "interval")
        self.count("interval", numbers, began)
        start = time.monotonic()
        low = margins_by_lipschitz(self.work.model, x, y, farthest(x, region), compared)
        if low is not None:
            bounded = replace(boxes, unbounded=torch.zeros_like(boxes.unbounded))
            self.raise_to(some, low[:, None].expand(self.bounds[some].shape), bounded, "lipschitz")
            self.count("lipschitz", numbers, start)

    def improve(
        self, level: int, method: Callable[[Tensor, Forward, Region, float], Forward], share: int, until: float
    ) -> None:
        """A method for what is left and has not had it, in parts that fit in memory; it returns the boxes it used."""
        left = [number for number in self.left if self.level[number] < level]
        for begin in range(0, len(left), share):
            start, numbers = time.monotonic(), left[begin : begin + share]
            if start > until:
                self.ended[numbers] = False
                continue
            self.news, some = True, self.there(numbers)
            part, inside = take(self.found, self.region, some)
            tight = method(some, part, inside, until)
            if tight is not part:
                self.found = put(self.found, some, tight)
            if time.monotonic() > until:  # it was cut short, or would have been
                self.ended[numbers] = torch.tensor([bool(self.by[number]) for number in numbers])
            else:
                self.level[numbers] = level
            self.seconds[numbers] += (time.monotonic() - start) / len(numbers)
            self.count(METHODS[level], numbers, start)

    def linear(self, some: Tensor, part: Forward, inside: Region, until: float) -> Forward:
        """Lines over boxes."""
        steps = self.work.steps
        low = least(steps, part, all_lines(steps, part), inside, len(steps) - 1, self.margins[some])
        self.raise_to(some, low, part, "linear")
        return part

    def crown(self, some: Tensor, part: Forward, inside: Region, until: float) -> Forward:
        """Lines over boxes that lines have tightened."""
        steps, margins = self.work.steps, self.margins[some]
        tight = forward(steps, inside, refine=True, known=part, until=until)
        low = least(steps, tight, all_lines(steps, tight), inside, len(steps) - 1, margins)
        self.raise_to(some, low, tight, "crown")
        return tight

    def alpha(self, some: Tensor, part: Forward, inside: Region, until: float) -> Forward:
        """The same with optimised slopes, of inner operations too."""
        steps, margins = self.work.steps, self.margins[some]
        tight = forward(steps, inside, refine=True, iterations=INNER, known=part, until=until)
        low = optimised(steps, tight, all_lines(steps, tight), inside, len(steps) - 1, margins)
        self.raise_to(some, low, tight, "alpha")
        return tight

    def branch(self) -> None:
        """Branch and bound, one image after another; each may take its share of the time that is left."""
        left = self.left
        for place, number in enumerate(left):
            start = time.monotonic()
            if start > self.until:
                self.ended[number] = False
                continue
            part, inside = take(self.found, self.region, self.there([number]))
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
                self.raise_to(self.there([number]), low[None], part, "branch")
            self.seconds[number] += time.monotonic() - start
            self.count("branch", [number], start)


def _share(work: Work) -> int:
    """How many images are refined at a time: fewer where the network is wide."""
    width = sum(math.prod(step.shape) for step in work.steps)
    return max(1, min(16, 2_000_000 // width))


def _judge(work: Work, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Whether corners of the region, rounded to float32 and projected onto the threat, are misclassified."""

    def misclassified(points: Tensor) -> Tensor:
        images = points[:, 0].to(work.x.dtype)
        if not isinstance(work.threat, Threat):  # the corners are float32: nothing is to be projected
            return fooled(work.asked(images).logits, y)
        start = x.expand_as(images)
        inside = work.threat.project(images, start)
        points[:, 0] = inside.double()
        wrong = fooled(work.asked(inside).logits, y)
        return wrong & (work.threat.violation(inside, start) == 0)

    return misclassified
