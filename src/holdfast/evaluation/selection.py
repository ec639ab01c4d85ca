"""Which samples a stage attacks, and the spot check: full-length attacks on a few of the survivors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..noise import EvaluationStream
from ..results import SpotCheck, sample_size
from .state import State, Task
from .suites import N_NEAREST, PGD50

NEAR, RANDOM = 1, 2  # values of Columns.spot_check


def choose(task: Task, state: State, number: int) -> None:
    """Decide which samples a stage attacks, once, when it begins; a resumed stage reads it from its checkpoint."""
    if state.chosen_for != number:
        state.columns.chosen = _chosen(task, state, number).clone()
        state.chosen_for = number


def _chosen(task: Task, state: State, number: int) -> Tensor:
    stage, columns, left = state.stages[number], state.columns, state.open
    nobody = torch.zeros_like(left)
    if stage.individual:
        asked = task.pgd50_sample if stage.name == PGD50.name else None
        return columns.clean if asked is None else columns.clean & asked
    if stage.round > 1:
        previous = [k for k, other in enumerate(state.stages) if other.round == stage.round - 1]
        if not bool(state.broken_by_stages(previous).any()):
            return nobody
    if stage.after:
        named = [k for k, other in enumerate(state.stages) if stage.after in (other.name, other.subset)]
        if not bool(state.broken_by_stages(named).any()):
            return nobody
    if stage.subset == "nearest":
        return _nearest(state, stage.fraction)
    if stage.subset == "next":
        if _still_breaking(state, number):
            return _nearest(state, stage.fraction)
        drawn = number > min(_numbers(state, "sampled"), default=number)
        near = columns.spot_check == NEAR if drawn else _draw_nearest(task, state)
        return _nearest(state, stage.fraction, int(near.sum())) & ~near
    if stage.subset == "sampled":
        if number == min(_numbers(state, "sampled")):
            _draw_random(task, state, number)
        return columns.spot_check > 0
    if stage.subset == "escalated":
        broken = columns.spot_check[state.broken_by_stages(_numbers(state, "sampled"))]
        if bool((broken == RANDOM).any()):
            chosen = left
        else:
            chosen = _nearest(state, stage.fraction) if bool((broken == NEAR).any()) else nobody
        return chosen & (columns.spot_check == 0)  # the spot check itself has had these attacks
    return left


def _numbers(state: State, subset: str) -> list[int]:
    """Numbers of the stages that attack this subset."""
    return [number for number, stage in enumerate(state.stages) if stage.subset == subset]


def _nearest(state: State, fraction: float, least: int = N_NEAREST) -> Tensor:
    """(N,) bool: this fraction of what is open, at least so many samples, those with the smallest margins."""
    rows = torch.nonzero(state.open)[:, 0]
    count = max(math.ceil(fraction * len(rows)), least)
    chosen = torch.zeros_like(state.open)
    chosen[rows[state.columns.margin_adv[rows].argsort(stable=True)[:count]]] = True
    return chosen


def spot_check_sizes(survivors: int, n: int, precision: float) -> tuple[int, int]:
    """How many of the nearest and of the other survivors the spot check attacks.

    >>> spot_check_sizes(180, 300, 0.01), spot_check_sizes(7, 300, 0.01)
    ((15, 14), (4, 3))
    """
    size = sample_size(survivors, n, precision)
    return size - size // 2, size // 2


def _still_breaking(state: State, number: int) -> bool:
    """Whether something was broken since the last two stages before the first one on the next."""
    first = min(_numbers(state, "next"), default=number)
    return bool(state.broken_by_stages(list(range(max(0, first - 2), number))).any())


def _draw_nearest(task: Task, state: State, least: int = 0) -> Tensor:
    """(N,) bool: the nearest samples of the spot check. Those that were drawn before and are open stay in it."""
    columns = state.columns
    count, _ = spot_check_sizes(int(state.open.sum()), len(state.open), task.precision)
    if int((columns.spot_check == NEAR).sum()) < max(count, least):
        columns.spot_check[_nearest(state, 0.0, max(count, least))] = NEAR
    columns.spot_check[~state.open] = 0
    return columns.spot_check == NEAR


def _draw_random(task: Task, state: State, number: int) -> None:
    """Draw the spot check's random samples, from what is open, by the samples' own noise."""
    columns = state.columns
    near = _draw_nearest(task, state, N_NEAREST if _still_breaking(state, number) else 0)
    rest = torch.nonzero(state.open & ~near)[:, 0]
    order = task.noise[rest].fold(EvaluationStream.SPOT_CHECK).uniform(()).argsort(stable=True)
    _, count = spot_check_sizes(int(state.open.sum()), len(state.open), task.precision)
    columns.spot_check[rest[order[:count]]] = RANDOM
    state.n_rest = len(rest)


def spot_check_result(state: State) -> SpotCheck | None:
    """What the full-length attacks broke; None unless all of their stages have ended."""
    sampled, escalated = _numbers(state, "sampled"), _numbers(state, "escalated")
    if not sampled or sampled[-1] >= state.ended:
        return None
    drawn, broken = state.columns.spot_check, state.broken_by_stages(sampled)
    near, random = drawn == NEAR, drawn == RANDOM
    n_random, random_broken = int(random.sum()), int((random & broken).sum())
    if random_broken and escalated and escalated[-1] < state.ended:  # then the rest has been attacked as well
        n_random, random_broken = state.n_rest, random_broken + int(state.broken_by_stages(escalated).sum())
    return SpotCheck(int(near.sum()), int((near & broken).sum()), n_random, random_broken, state.n_rest)
