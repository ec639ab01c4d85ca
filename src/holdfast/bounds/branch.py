"""Branch and bound on the signs of ReLUs, with optimised slopes and multipliers (beta-CROWN).

A domain fixes the sign of some pre-activations, for one competing class. Its bound is that of ``linear.least`` with the
fixed ReLUs exact and a multiplier beta >= 0 for each fixed sign:

    min c f(x)  with  s_k h_k >= 0   >=   max over beta >= 0 of  min c f(x) - sum_k beta_k s_k h_k

Domains are bounded in batches, the lowest bound first, and split in two where that is expected to help most: a score
filters a few ReLUs, and bounding the children of each of them decides.

Source: Bunel et al. 2018; De Palma et al. 2021 (filtered smart branching); Wang et al. 2021 (beta-CROWN).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from .compact import compact, in_float32
from .linear import MEMORY, Forward, Region, all_lines, least, relus_of, step_width
from .steps import Box, Lines, Step

Visit = Callable[[int, Tensor], None] | None

FILTERED = 16  # how many ReLUs the score proposes for each domain
ITERATIONS = 12  # steps of Adam on the slopes and multipliers of new domains
LARGEST = 1e4  # of the multipliers of a linear program: where its signs contradict each other, they grow without end
RATE, DECAY = 0.2, 0.97
ENOUGH = 1e-4  # a bound in float32 that is above this is one in float64 too
WAITING = 2**31  # bytes of the domains of one image that may wait


@dataclass(frozen=True)
class Answer:
    """What branch and bound says of one image.

    Args:
        bound: a lower bound of the smallest margin; above zero it is a proof.
        domains: how many were bounded.
        ended: with a proof or an adversarial example; False: time or memory ended first, or no ReLU was left to split.
        point: an image of the region that the linear bound proposed, misclassified as ``misclassified`` judged it.
    """

    bound: float
    domains: int
    ended: bool
    point: Tensor | None = None


@dataclass
class _Pool:
    """Domains in rows: bounds (D,), competitors (D,), signs and slopes of each ReLU (D, *shape)."""

    bounds: Tensor
    rows: Tensor
    signs: dict[int, Tensor]
    alphas: dict[int, Tensor]
    betas: dict[int, Tensor]

    def take(self, which: Tensor) -> _Pool:
        parts = ({n: tensor[which] for n, tensor in part.items()} for part in self._parts())
        return _Pool(self.bounds[which], self.rows[which], *parts)

    def join(self, other: _Pool) -> _Pool:
        parts = (
            {n: torch.cat([mine[n], theirs[n]]) for n in mine}
            for mine, theirs in zip(self._parts(), other._parts(), strict=True)
        )
        return _Pool(torch.cat([self.bounds, other.bounds]), torch.cat([self.rows, other.rows]), *parts)

    def _parts(self) -> tuple[dict[int, Tensor], ...]:
        return self.signs, self.alphas, self.betas


def branch(
    steps: Sequence[Step],
    found: Forward,
    region: Region,
    rows: Tensor,
    *,
    until: float,
    misclassified: Callable[[Tensor], Tensor] | None = None,
) -> Answer:
    """Branch and bound for one image.

    Args:
        steps: of the network; its non-affine operations should be ReLUs, others are never split.
        found: boxes and errors of this image, (1, ...).
        region: the images around it, (1, ...).
        rows: (R, 1, K), each a competitor that is not ruled out: logit_y - logit_j.
        until: ``time.monotonic()`` at which to stop.
        misclassified: of images (D, *shape), which are counterexamples, (D,) bool.

    Returns:
        The answer; its bound is that of the domains that are left.
    """
    problem = _Problem.of(*compact(steps, found), region)
    relus = problem.relus
    shape = {number: problem.steps[number].shape for number in relus}
    none = {n: torch.zeros(len(rows), *shape[n], dtype=torch.int8, device=rows.device) for n in relus}
    alphas = {n: problem.light.lines[n].lower[0][0].expand(len(rows), *shape[n]).clone() for n in relus}
    betas = {n: torch.zeros_like(alpha) for n, alpha in alphas.items()}
    pool = _Pool(rows.new_full((len(rows),), -torch.inf), rows, none, alphas, betas)
    width = max(step_width(step) for step in problem.steps) * rows.element_size() * 4
    batch = max(2, min(512, MEMORY // width))
    pool, point = _bounded(problem, pool, misclassified)
    most = WAITING // (1 + sum(9 * step_width(problem.steps[n]) for n in relus))  # a sign, a slope, a multiplier each
    bounded = len(pool.bounds)
    pool = pool.take((pool.bounds <= 0).nonzero()[:, 0])
    while len(pool.bounds) and point is None and time.monotonic() < until and len(pool.bounds) < most:
        order = pool.bounds.argsort()
        some, pool = pool.take(order[: batch // 2]), pool.take(order[batch // 2 :])
        children, whole = _split(problem, some, batch)
        if len(whole.bounds):  # every ReLU has its sign: what is left is to find the multipliers
            whole = _solved(problem, whole)
            if bool((whole.bounds <= 0).any()):
                pool = pool.join(children).join(whole)
                break
        if not len(children.bounds):
            continue
        children, point = _bounded(problem, children, misclassified)
        bounded += len(children.bounds)
        pool = pool.join(children.take((children.bounds <= 0).nonzero()[:, 0]))
    left = float(pool.bounds.amin()) if len(pool.bounds) else float("inf")
    return Answer(left, bounded, point is not None or left > 0, point)


@dataclass(frozen=True)
class _Asked:
    """One image's network in one precision, with the lines of its operations before any split."""

    steps: Sequence[Step]
    found: Forward
    region: Region
    lines: dict[int, Lines]
    proves: bool

    def least(self, pool: _Pool, slopes: dict[int, Tensor], betas: dict[int, Tensor], visit: Visit = None) -> Tensor:
        """A lower bound of each domain (D,), by these slopes and multipliers (D, ...). The domains are rows of one
        image. ``visit`` is shown the rows (D, ...) of each operation's output."""
        more = _pushed(self.steps, pool.signs, betas)
        lines = {**self.lines, **{n: self._relu(n, pool.signs[n], slope) for n, slope in slopes.items()}}

        def push(number: int, rows: Tensor) -> Tensor | None:
            if visit is not None:
                visit(number, rows[0])
            return more.get(number)

        rows = pool.rows.to(self.region.center.dtype)[None]
        last = len(self.steps) - 1
        return least(self.steps, self.found, lines, self.region, last, rows, visit=push, rounding=self.proves)[0]

    def box(self, number: int, signs: Tensor) -> Box:
        """Of the input of a ReLU, with the signs of the domains: (D, ...)."""
        [source] = self.steps[number].reads
        lo, hi = self.found.boxes[source]
        return Box(torch.where(signs > 0, lo.clamp_min(0), lo), torch.where(signs < 0, hi.clamp_max(0), hi))

    def _relu(self, number: int, signs: Tensor, slope: Tensor) -> Lines:
        lines = relus_of(self.steps)[number].lines([self.box(number, signs)], slope[:, None])
        return Lines(
            tuple(slope.transpose(0, 1) for slope in lines.lower), lines.lower_at.transpose(0, 1),
            tuple(slope.transpose(0, 1) for slope in lines.upper), lines.upper_at.transpose(0, 1),
        )  # fmt: skip


@dataclass(frozen=True)
class _Problem(_Asked):
    """In float64, where bounds are proved; and ``light``, in float32, where slopes and splits are looked for."""

    light: _Asked

    @staticmethod
    def of(steps: Sequence[Step], found: Forward, region: Region) -> _Problem:
        lines = all_lines(steps, found)
        return _Problem(steps, found, region, lines, True, _Asked(*in_float32(steps, found, region, lines), False))

    @property
    def relus(self) -> list[int]:
        return list(relus_of(self.steps))

    def with_signs(self, signs: dict[int, Tensor]) -> Forward:
        """The boxes of one domain: a fixed pre-activation has its sign."""
        boxes = list(self.found.boxes)
        for number, sign in signs.items():
            boxes[self.steps[number].reads[0]] = self.box(number, sign)
        return Forward(boxes, self.found.errors, self.found.unbounded)


def _pushed(steps: Sequence[Step], signs: dict[int, Tensor], betas: dict[int, Tensor]) -> dict[int, Tensor]:
    """What the multipliers add to the rows (1, D, ...) of each pre-activation: - beta s."""
    more: dict[int, Tensor] = {}
    for number, beta in betas.items():
        [source] = steps[number].reads
        part = -(beta * signs[number])[None]
        more[source] = more[source] + part if source in more else part
    return more


def _bounded(
    problem: _Problem, pool: _Pool, misclassified: Callable[[Tensor], Tensor] | None
) -> tuple[_Pool, Tensor | None]:
    """The pool with the bounds of the slopes and multipliers that Adam finds; and a counterexample, if the minimum of
    a bound is one."""
    kept = _improved(problem.light, pool)
    proposed: list[Tensor] = []

    def visit(number: int, rows: Tensor) -> None:
        if number == 0:
            proposed.append(rows)

    alphas, betas = ({n: part.to(pool.rows.dtype) for n, part in parts.items()} for parts in (kept.alphas, kept.betas))
    reached = problem.least(pool, alphas, betas, visit)
    kept.bounds = torch.maximum(pool.bounds, reached)
    point = None
    if misclassified is not None and proposed:
        corner = torch.where(proposed[0] > 0, *problem.region.box)
        wrong = misclassified(corner)
        point = corner[wrong][0] if bool(wrong.any()) else None
    return kept, point


def _improved(light: _Asked, pool: _Pool) -> _Pool:
    """The pool with optimised slopes and multipliers where those that it has prove nothing."""
    some = (light.least(pool, pool.alphas, pool.betas) <= ENOUGH).nonzero()[:, 0]
    if not len(some):
        return pool
    better = _optimised(light, pool.take(some))
    alphas, betas = (
        {n: whole.index_copy(0, some, part[n]) for n, whole in parts.items()}
        for parts, part in ((pool.alphas, better.alphas), (pool.betas, better.betas))
    )
    return _Pool(pool.bounds, pool.rows, pool.signs, alphas, betas)


def _optimised(light: _Asked, pool: _Pool) -> _Pool:
    """The pool with the slopes and multipliers that give the best bounds: nothing is proved here."""
    alphas = {n: alpha.clone().requires_grad_() for n, alpha in pool.alphas.items()}
    betas = {n: beta.clone().requires_grad_() for n, beta in pool.betas.items()}
    best = torch.full_like(pool.bounds, -torch.inf)
    kept = _Pool(pool.bounds, pool.rows, pool.signs, dict(pool.alphas), dict(pool.betas))
    groups: list[dict[str, Any]] = [{"params": [*alphas.values()]}, {"params": [*betas.values()], "lr": RATE / 2}]
    optimiser = torch.optim.Adam(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, DECAY)
    for _ in range(ITERATIONS):
        with torch.enable_grad():
            reached = light.least(pool, alphas, betas)
            optimiser.zero_grad()
            (-reached[reached < ENOUGH]).sum().backward()
        better = reached.detach() > best
        best = torch.where(better, reached.detach(), best)
        for values, into in ((alphas, kept.alphas), (betas, kept.betas)):
            for n, value in values.items():
                into[n] = torch.where(better.view(-1, *[1] * (value.ndim - 1)), value.detach(), into[n])
        if bool((best > ENOUGH).all()):
            break
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for alpha in alphas.values():
                alpha.clamp_(0, 1)
            for beta in betas.values():
                beta.clamp_min_(0)
    return kept


def _solved(problem: _Problem, pool: _Pool) -> _Pool:
    """Domains whose ReLUs all have a sign, with the multipliers of a linear program: the network is affine on each.

        min c x + d  with  s_k (a_k x + b_k) >= 0 and x in the box;  beta_k is the price of the k-th condition

    The program only proposes multipliers: the bound is that of ``least`` with them.
    """
    steps = problem.steps
    for number in range(len(pool.bounds)):
        one = pool.take(torch.tensor([number], device=pool.bounds.device))
        inside = problem.with_signs(one.signs)
        lines = all_lines(steps, inside)
        objective, _ = _as_affine(steps, inside, lines, problem.region, len(steps) - 1, one.rows[:, None])
        fixed = {n: signs.flatten().nonzero()[:, 0] for n, signs in one.signs.items()}
        conditions = []
        for relu, places in fixed.items():
            [source] = steps[relu].reads
            signs = one.signs[relu].flatten()
            rows = torch.diag(signs.to(objective.dtype))[places].view(1, len(places), *steps[source].shape)
            conditions.append(_as_affine(steps, inside, lines, problem.region, source, rows))
        slopes, offsets = (torch.cat(parts) for parts in zip(*conditions, strict=True))
        prices = _prices(objective[0], slopes, offsets, problem.region.box)
        if prices is None:
            continue
        alphas, betas = ({n: torch.zeros_like(each, dtype=prices.dtype) for n, each in one.betas.items()} for _ in "ab")
        for (relu, places), part in zip(fixed.items(), prices.split([*map(len, fixed.values())]), strict=True):
            betas[relu].view(-1)[places] = part
        low = problem.least(one, alphas, betas)
        pool.bounds[number] = torch.maximum(pool.bounds[number], low[0])
    return pool


def _as_affine(
    steps: Sequence[Step], inside: Forward, lines: dict[int, Lines], region: Region, start: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """(a (S, D), b (S,)): a x + b is below these rows of an operation's output, as a function of the one image x."""
    at_image = []

    def visit(number: int, rows: Tensor) -> None:
        if number == 0:
            at_image.append(rows)

    low = least(steps, inside, lines, region, start, rows, visit=visit)
    return at_image[0][0].flatten(1), (low - region.least(at_image[0]))[0]


def _prices(objective: Tensor, slopes: Tensor, offsets: Tensor, box: Box) -> Tensor | None:
    """Prices (R,) >= 0 of the conditions slopes x + offsets >= 0 in the minimum of objective x over the box."""
    count = len(offsets)
    lo, hi = (side.flatten().tolist() for side in box)
    missed = np.full(count, LARGEST)  # a condition may be missed at this price: the program always has an answer
    answer = linprog(
        np.concatenate([objective.cpu().numpy(), missed]), A_ub=np.hstack([-slopes.cpu().numpy(), -np.eye(count)]),
        b_ub=offsets.cpu().numpy(), bounds=[*zip(lo, hi, strict=True), *[(0, None)] * count], method="highs",
    )  # fmt: skip
    if answer.status != 0:
        return None
    return torch.as_tensor(-answer.ineqlin.marginals, dtype=objective.dtype).clamp_min(0).to(objective.device)


def _split(problem: _Problem, pool: _Pool, batch: int) -> tuple[_Pool, _Pool]:
    """Both children of each domain, at the ReLU whose worse child has the better bound; and the domains without one."""
    count, light = len(pool.rows), problem.light
    at_relus: dict[int, Tensor] = {}

    def visit(number: int, rows: Tensor) -> None:
        if number in pool.signs:
            at_relus[number] = rows

    light.least(pool, pool.alphas, pool.betas, visit)
    scores, numbers, sizes = [], list(pool.signs), []
    for number in numbers:
        lo, hi = light.box(number, pool.signs[number])
        unstable = (lo < 0) & (hi > 0)
        row = at_relus.get(number, torch.zeros_like(lo))
        alpha = pool.alphas[number]
        above = -lo * hi / (hi - lo).clamp_min(1e-30)  # of the upper line over the ReLU, at most
        below = torch.maximum(-alpha * lo, (1 - alpha) * hi)
        score = row.clamp_max(0).abs() * above + row.clamp_min(0) * below + 1e-12 * above
        scores.append(torch.where(unstable, score, torch.full_like(score, -1.0)).flatten(1))
        sizes.append(scores[-1].shape[1])
    every = torch.cat(scores, 1)
    divisible = (every >= 0).any(1)
    if not bool(divisible.all()):
        rest = divisible.nonzero()[:, 0]
        whole = pool.take((~divisible).nonzero()[:, 0])
        return (_split(problem, pool.take(rest), batch)[0] if len(rest) else pool.take(rest)), whole
    scored, filtered = every.topk(min(FILTERED, every.shape[1]), 1)
    worse = []
    for some in filtered.split(max(1, batch // (2 * count)), 1):
        parents = torch.arange(count, device=some.device).repeat_interleave(some.shape[1])
        children = _children(pool.take(parents), numbers, sizes, some.flatten())
        worse.append(light.least(children, children.alphas, children.betas).view(2, *some.shape).amin(0))
    chosen = torch.cat(worse, 1).masked_fill(scored < 0, -torch.inf).argmax(1)
    chosen = filtered.gather(1, chosen[:, None])[:, 0]
    return _children(pool, numbers, sizes, chosen), pool.take(chosen[:0])


def _children(pool: _Pool, numbers: list[int], sizes: list[int], chosen: Tensor) -> _Pool:
    """The domains with the chosen ReLU on, and then those with it off: (2 D) rows."""
    doubled = pool.join(pool)
    count, first = len(pool.rows), 0
    for number, size in zip(numbers, sizes, strict=True):
        here = ((chosen >= first) & (chosen < first + size)).nonzero()[:, 0]
        signs = doubled.signs[number].flatten(1)
        signs[here, chosen[here] - first] = 1
        signs[count + here, chosen[here] - first] = -1
        doubled.signs[number] = signs.view_as(doubled.signs[number])
        first += size
    return doubled
