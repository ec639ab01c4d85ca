"""The account of an evaluation: passes and seconds spent, what a budget still pays for, what is still to come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from ..queries import unlimited
from .selection import spot_check_sizes
from .state import State, Task
from .suites import N_NEAREST, PGD50, Stage


def add_cost(task: Task, state: State, place: int | str, began: float, **counts: int) -> None:
    """Add what was done since ``began`` to ``state.costs[place]``, or to the field of this name; reset the counters."""
    model, cost = task.model, state.costs[place] if isinstance(place, int) else getattr(state, place)
    counts |= {"forwards": model.forwards, "backwards": model.backwards, "nonfinite": int(model.nonfinite)}
    model.forwards = model.backwards = model.nonfinite = 0
    added = {name: getattr(cost, name) + count for name, count in counts.items()}
    cost = replace(cost, seconds=cost.seconds + time.perf_counter() - began, **added)
    if isinstance(place, int):
        state.costs[place] = cost
    else:
        setattr(state, place, cost)


def passes_spent(state: State) -> int:
    """Forward and backward passes so far, in this process."""
    return sum(cost.passes for cost in (*state.costs, state.branch, state.given))


def seconds_spent(state: State) -> float:
    """Wall-clock seconds so far, in this process."""
    return sum(cost.seconds for cost in (*state.costs, state.branch, state.given))


def waits_for_branch(task: Task, state: State) -> bool:
    """Whether branch and bound is still to have its share of the budget."""
    return task.proofs == "branch" and not state.branched


def affordable(task: Task, state: State, number: int, n_targets: int, n_processes: int) -> Callable[[], float]:
    """How many more samples of a stage, each at so many targets, the rest of the budget pays for.

    Individual attacks have no limit: half a column would be a wrong accuracy.
    """
    stage, budget = state.stages[number], task.budget
    if budget is None or stage.individual:
        return unlimited
    each = stage.passes(state.n_classes) / stage.n_targets(state.n_classes) * n_targets * state.eot_samples

    def limit() -> float:
        spent, seconds = passes_spent(state), seconds_spent(state)
        allowed = min(budget.seconds, state.until) if waits_for_branch(task, state) else budget.seconds
        passes = budget.passes / n_processes - spent
        return min(passes, (allowed - seconds) * spent / max(seconds, 1e-9)) / each

    return limit


def planned_passes(task: Task, state: State, number: int, waiting: int, targets: range) -> int:
    """Passes still to come if no more samples are broken.

    Args:
        task: the evaluation.
        state: of the evaluation.
        number: of the current stage.
        waiting: samples that the current stage has not attacked yet at its current targets.
        targets: places of these targets.
    """
    survivors, clean = int(state.open.sum()), int(state.columns.clean.sum())
    stage, classes = state.stages[number], state.n_classes
    each = stage.passes(classes) / stage.n_targets(classes)
    left = stage.n_targets(classes) - targets.stop
    planned = each * (waiting * len(targets) + int(state.due(number).sum()) * left)
    near, far = spot_check_sizes(survivors, len(state.open), task.precision)
    for later in state.stages[number + 1 :]:
        expected = {
            "survivors": 0 if later.after else survivors,
            "nearest": 0 if later.round > 1 else min(survivors, max(N_NEAREST, math.ceil(later.fraction * survivors))),
            "next": 0 if later.round > 1 else max(0, math.ceil(later.fraction * survivors) - near),
            "sampled": near + far,
            "escalated": 0,
        }[later.subset]
        planned += later.passes(classes) * (_individual(task, later, clean) if later.individual else expected)
    return round(planned * state.eot_samples)


def _individual(task: Task, stage: Stage, clean: int) -> int:
    """How many samples an individual attack has, about."""
    if stage.name != PGD50.name or task.pgd50 is None:
        return clean
    return round(clean * min(1.0, task.pgd50 / len(task.data)))
