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

from .linear import MEMORY, Forward, Region, all_lines, least, relus_of, step_width
from .steps import Box, Lines, Step

FILTERED = 4  # how many ReLUs the score proposes for each domain
ITERATIONS = 12  # steps of Adam on the slopes and multipliers of new domains
LARGEST = 1e4  # of the multipliers of a linear program: where its signs contradict each other, they grow without end
RATE, DECAY = 0.2, 0.97
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
    relus = list(relus_of(steps))
    shape = {number: steps[number].shape for number in relus}
    none = {n: torch.zeros(len(rows), *shape[n], dtype=torch.int8, device=rows.device) for n in relus}
    lines = all_lines(steps, found)
    alphas = {n: lines[n].lower[0][:, 0].expand(len(rows), *shape[n]).clone() for n in relus}
    betas = {n: rows.new_zeros(len(rows), *shape[n]) for n in relus}
    pool = _Pool(rows.new_full((len(rows),), -torch.inf), rows, none, alphas, betas)
    width = max(step_width(step) for step in steps) * rows.element_size() * 4
    batch = max(2, min(512, MEMORY // width))
    pool, point = _bounded(steps, found, region, pool, lines, misclassified)
    most = WAITING // (1 + sum(17 * step_width(steps[n]) for n in relus))  # a sign, a slope, a multiplier for each ReLU
    bounded = len(pool.bounds)
    pool = pool.take((pool.bounds <= 0).nonzero()[:, 0])
    while len(pool.bounds) and point is None and time.monotonic() < until and len(pool.bounds) < most:
        order = pool.bounds.argsort()
        some, pool = pool.take(order[: batch // 2]), pool.take(order[batch // 2 :])
        children, whole = _split(steps, found, region, some, lines)
        if len(whole.bounds):  # every ReLU has its sign: what is left is to find the multipliers
            whole = _solved(steps, found, region, whole, lines)
            if bool((whole.bounds <= 0).any()):
                pool = pool.join(children).join(whole)
                break
        if not len(children.bounds):
            continue
        children, point = _bounded(steps, found, region, children, lines, misclassified)
        bounded += len(children.bounds)
        pool = pool.join(children.take((children.bounds <= 0).nonzero()[:, 0]))
    left = float(pool.bounds.amin()) if len(pool.bounds) else float("inf")
    return Answer(left, bounded, point is not None or left > 0, point)


def _repeated(found: Forward, region: Region, count: int) -> tuple[Forward, Region]:
    """The one image for each of ``count`` domains, without a copy."""

    def many(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:])

    boxes = [Box(many(box.lo), many(box.hi)) for box in found.boxes]
    errors = [None if error is None else many(error) for error in found.errors]
    inside = Region(Box(many(region.box.lo), many(region.box.hi)), many(region.center), region.threat, region.eps)
    return Forward(boxes, errors, many(found.unbounded)), inside


def _with_signs(steps: Sequence[Step], found: Forward, signs: dict[int, Tensor]) -> Forward:
    """The boxes of domains: a fixed pre-activation has its sign."""
    boxes = list(found.boxes)
    for number, sign in signs.items():
        [source] = steps[number].reads
        lo, hi = boxes[source]
        boxes[source] = Box(torch.where(sign > 0, lo.clamp_min(0), lo), torch.where(sign < 0, hi.clamp_max(0), hi))
    return Forward(boxes, found.errors, found.unbounded)


def _lines_of(
    steps: Sequence[Step], inside: Forward, lines: dict[int, Lines], alphas: dict[int, Tensor]
) -> dict[int, Lines]:
    own, relus = dict(lines), relus_of(steps)
    for number, alpha in alphas.items():
        own[number] = relus[number].lines([inside.boxes[i] for i in relus[number].reads], alpha[:, None])
    return own


def _pushed(steps: Sequence[Step], signs: dict[int, Tensor], betas: dict[int, Tensor]) -> dict[int, Tensor]:
    """What the multipliers add to the rows of each pre-activation: - beta s."""
    more: dict[int, Tensor] = {}
    for number, beta in betas.items():
        [source] = steps[number].reads
        part = -(beta * signs[number])[:, None]
        more[source] = more[source] + part if source in more else part
    return more


def _adding(more: dict[int, Tensor]) -> Callable[[int, Tensor], Tensor | None]:
    return lambda number, rows: more.get(number)


def _bounded(
    steps: Sequence[Step],
    found: Forward,
    region: Region,
    pool: _Pool,
    lines: dict[int, Lines],
    misclassified: Callable[[Tensor], Tensor] | None,
) -> tuple[_Pool, Tensor | None]:
    """The pool with the best bounds that Adam reaches; and a counterexample, if the minimum of a bound is one."""
    count, last = len(pool.rows), len(steps) - 1
    many, around = _repeated(found, region, count)
    inside = _with_signs(steps, many, pool.signs)
    alphas = {n: alpha.clone().requires_grad_() for n, alpha in pool.alphas.items()}
    betas = {n: beta.clone().requires_grad_() for n, beta in pool.betas.items()}
    best, kept = pool.bounds.clone(), _Pool(pool.bounds, pool.rows, pool.signs, dict(pool.alphas), dict(pool.betas))
    groups: list[dict[str, Any]] = [{"params": [*alphas.values()]}, {"params": [*betas.values()], "lr": RATE / 2}]
    optimiser = torch.optim.Adam(groups, lr=RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, DECAY)
    proposed: list[Tensor] = []
    for _ in range(ITERATIONS):
        with torch.enable_grad():
            own = _lines_of(steps, inside, lines, alphas)
            more = _pushed(steps, pool.signs, betas)

            def visit(number: int, rows: Tensor, more: dict[int, Tensor] = more) -> Tensor | None:
                if number == 0:
                    proposed[:] = [rows.detach()[:, 0]]
                return more.get(number)

            reached = least(steps, inside, own, around, last, pool.rows[:, None], visit=visit)[:, 0]
            optimiser.zero_grad()
            (-reached[reached < 0]).sum().backward()
        better = reached.detach() > best
        best = torch.where(better, reached.detach(), best)
        for values, into in ((alphas, kept.alphas), (betas, kept.betas)):
            for n, value in values.items():
                into[n] = torch.where(better.view(-1, *[1] * (value.ndim - 1)), value.detach(), into[n])
        if bool((best > 0).all()):
            break
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for alpha in alphas.values():
                alpha.clamp_(0, 1)
            for beta in betas.values():
                beta.clamp_min_(0)
    kept.bounds = best
    point = None
    if misclassified is not None and proposed:
        lo, hi = around.box
        corner = torch.where(proposed[0] > 0, lo, hi)
        wrong = misclassified(corner)
        point = corner[wrong][0] if bool(wrong.any()) else None
    return kept, point


def _solved(steps: Sequence[Step], found: Forward, region: Region, pool: _Pool, lines: dict[int, Lines]) -> _Pool:
    """Domains whose ReLUs all have a sign, with the multipliers of a linear program: the network is affine on each.

        min c x + d  with  s_k (a_k x + b_k) >= 0 and x in the box;  beta_k is the price of the k-th condition

    The program only proposes multipliers: the bound is that of ``least`` with them.
    """
    for number in range(len(pool.bounds)):
        one = pool.take(torch.tensor([number], device=pool.bounds.device))
        inside = _with_signs(steps, found, one.signs)
        own = _lines_of(steps, inside, lines, one.alphas)
        objective, _ = _as_affine(steps, inside, own, region, len(steps) - 1, one.rows[:, None])
        fixed = {n: signs.flatten().nonzero()[:, 0] for n, signs in one.signs.items()}
        conditions = []
        for relu, places in fixed.items():
            [source] = steps[relu].reads
            signs = one.signs[relu].flatten()
            rows = torch.diag(signs.to(objective.dtype))[places].view(1, len(places), *steps[source].shape)
            conditions.append(_as_affine(steps, inside, own, region, source, rows))
        slopes, offsets = (torch.cat(parts) for parts in zip(*conditions, strict=True))
        prices = _prices(objective[0], slopes, offsets, region.box)
        if prices is None:
            continue
        betas = {n: torch.zeros_like(beta) for n, beta in one.betas.items()}
        for (relu, places), part in zip(fixed.items(), prices.split([*map(len, fixed.values())]), strict=True):
            betas[relu].view(-1)[places] = part
        more = _pushed(steps, one.signs, betas)
        low = least(steps, inside, own, region, len(steps) - 1, one.rows[:, None], visit=_adding(more))
        pool.bounds[number] = torch.maximum(pool.bounds[number], low[0, 0])
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


def _split(
    steps: Sequence[Step], found: Forward, region: Region, pool: _Pool, lines: dict[int, Lines]
) -> tuple[_Pool, _Pool]:
    """Both children of each domain, at the ReLU whose worse child has the better bound; and the domains without one."""
    count, last = len(pool.rows), len(steps) - 1
    many, around = _repeated(found, region, count)
    inside = _with_signs(steps, many, pool.signs)
    own = _lines_of(steps, inside, lines, pool.alphas)
    more = _pushed(steps, pool.signs, pool.betas)
    at_relus: dict[int, Tensor] = {}

    def visit(number: int, rows: Tensor) -> Tensor | None:
        if number in pool.signs:
            at_relus[number] = rows[:, 0]
        return more.get(number)

    least(steps, inside, own, around, last, pool.rows[:, None], visit=visit)
    scores, numbers, sizes = [], list(pool.signs), []
    for number in numbers:
        [source] = steps[number].reads
        lo, hi = inside.boxes[source]
        unstable = (lo < 0) & (hi > 0)
        row = at_relus.get(number, torch.zeros_like(lo))
        alpha = pool.alphas[number]
        above = -lo * hi / (hi - lo).clamp_min(1e-300)  # of the upper line over the ReLU, at most
        below = torch.maximum(-alpha * lo, (1 - alpha) * hi)
        score = row.clamp_max(0).abs() * above + row.clamp_min(0) * below + 1e-12 * above
        scores.append(torch.where(unstable, score, torch.full_like(score, -1.0)).flatten(1))
        sizes.append(scores[-1].shape[1])
    every = torch.cat(scores, 1)
    divisible = (every >= 0).any(1)
    if not bool(divisible.all()):
        rest = divisible.nonzero()[:, 0]
        whole = pool.take((~divisible).nonzero()[:, 0])
        return (_split(steps, found, region, pool.take(rest), lines)[0] if len(rest) else pool.take(rest)), whole
    filtered = every.topk(min(FILTERED, every.shape[1]), 1)
    best = torch.full((count,), -torch.inf, dtype=pool.rows.dtype, device=pool.rows.device)
    chosen = filtered.indices[:, 0]
    for place in range(filtered.indices.shape[1]):
        candidate, valid = filtered.indices[:, place], filtered.values[:, place] >= 0
        children = _children(pool, numbers, sizes, candidate)
        two, twice = _repeated(found, region, 2 * count)
        within = _with_signs(steps, two, children.signs)
        own, more = _lines_of(steps, within, lines, children.alphas), _pushed(steps, children.signs, children.betas)
        bound = least(steps, within, own, twice, last, children.rows[:, None], visit=_adding(more))[:, 0]
        worse = torch.minimum(bound[:count], bound[count:])
        better = valid & (worse > best)
        best, chosen = torch.where(better, worse, best), torch.where(better, candidate, chosen)
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
