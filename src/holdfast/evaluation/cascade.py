"""The cascade: each stage attacks what earlier stages left, and every candidate is verified here, not by its attack."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import mapped
from ..attacks import ATTACKS
from ..noise import StageStream
from ..progress import silent
from ..threat import check_images
from .checkpoint import Checkpoint
from .clean_pass import clean_pass
from .costs import add_cost, affordable, passes_spent, planned_passes, waits_for_branch
from .distributed import Processes, exchange_results, synchronise, total_costs
from .evaluation import UNBROKEN, Evaluation
from .grid import LONG, to_grid, whole_levels
from .judging import judge, try_candidates
from .proofs import branch_survivors, proof_costs, prove_all, prove_survivors
from .selection import choose, spot_check_result
from .state import BY_BRANCH, BY_CANDIDATE, MAX_TARGETS, State, Task, add_extra_stages, attack_model
from .stored_images import begin_on_stored_images, settle_stored_images
from .suites import PGD50


def run(task: Task, path: Path | None, key: str) -> Evaluation:
    """Carry out an evaluation, or the rest of it if there is a checkpoint at ``path``."""
    processes = Processes.current()
    if path is not None and processes.count > 1:
        path = path.with_suffix(f".{processes.rank}-of-{processes.count}{path.suffix}")
    checkpoint = Checkpoint(path, task, key)
    check_images(task.data.x, task.threat)
    state = checkpoint.load(task) or clean_pass(task)
    unsettled = begin_on_stored_images(state, checkpoint.save)
    if processes.count > 1:
        synchronise(task, state, processes)
    prove_all(task, state, processes)
    while not state.budget_spent:
        complete = state.ended == len(state.stages)
        if complete or not state.stages[state.ended].individual:
            try_candidates(task, state, processes)
            prove_survivors(task, state, checkpoint.save, processes)
        if complete:
            branch_survivors(task, state, checkpoint.save, processes)
            if task.budget is None or not bool(state.open.any()):
                break
            add_extra_stages(task, state, state.ended + 1)
        run_stage(task, state, state.ended, checkpoint, processes)
        if state.budget_spent and waits_for_branch(task, state):  # it was the attacks' share of the budget
            state.budget_spent = False
            branch_survivors(task, state, checkpoint.save, processes)
        else:
            state.ended += not state.budget_spent
    settle_stored_images(task, state, unsettled)
    checkpoint.save(state, force=True)
    return result(task, state, processes)


def run_stage(task: Task, state: State, number: int, checkpoint: Checkpoint, processes: Processes) -> None:
    """Run one stage on its samples, smallest margins first, once per target.

    The likeliest target comes alone, since it breaks most, and what it breaks needs no other. Further targets share a
    batch as far as it has room: a small batch takes as long as a larger one. Several processes attack one target at a
    time, because memory may have run out on some of them, and all must take the same steps.
    """
    if number < state.chosen_for:  # finished before the checkpoint was written
        return
    choose(task, state, number)
    last, start = state.stages[number].n_targets(state.n_classes), 0
    chosen = max(1, int(state.columns.chosen.sum()))
    while start < last and not state.budget_spent:
        room = max(1, task.batches.size // chosen) if start and processes.count == 1 else 1
        targets = range(start, min(last, start + room))
        rows = torch.nonzero(_waiting(state, number, targets))[:, 0]
        if len(rows):
            rows = rows[state.columns.margin_adv[rows].argsort(stable=True)]
            mine = processes.mine(rows, task.batch_size)
            work = partial(attack_batch, task, state, checkpoint, number, targets)
            limit = affordable(task, state, number, len(targets), processes.count)
            state.budget_spent = sum(task.batches.map(mine, work, limit)) < len(mine)
            if processes.count > 1:
                exchange_results(task, state, processes, rows)
        start = targets.stop


def _waiting(state: State, number: int, targets: range) -> Tensor:
    """(N,) bool: samples that the stage has not attacked at each of these targets yet; these are attacked at all."""
    return state.due(number) & (state.columns.done < number * MAX_TARGETS + targets.stop)


def attack_batch(task: Task, state: State, checkpoint: Checkpoint, number: int, targets: range, rows: Tensor) -> int:
    """Attack one batch of samples at some targets at once, verify the candidates, and save.

    A sample that one target breaks is not judged at later ones, as if each had been attacked by itself.

    Returns:
        The number of samples.
    """
    stage, columns = state.stages[number], state.columns
    began, several = time.perf_counter(), rows.repeat(len(targets))
    places = torch.arange(targets.start, targets.stop, device=rows.device).repeat_interleave(len(rows))
    x, y = task.data.pixels(several), task.data.y[several]
    target: dict[str, Tensor] = {}
    if stage.target and columns.random_target is not None:
        target["target"] = columns.random_target[several]
    elif stage.targets:
        target["target"] = columns.targets[several, places]
    stream = number if stage.noise_stream is None else stage.noise_stream
    x_adv = ATTACKS[stage.attack].attack(
        attack_model(task.model, state.channels_last, state.randomised, stage.on_grid),
        x,
        y,
        whole_levels(task.threat) if stage.on_grid else task.threat,
        score=task.scores[stage.score],
        noise=task.noise[several].fold(stream, StageStream.TARGETS).fold_each(places),
        **stage.keywords(task.threat.eps),
        **target,
    )
    counts = {"attacked": len(rows) if targets.start == 0 else 0, "broken": 0, "outside": 0, "candidates": 0}
    for first in range(0, len(several), len(rows)):
        candidates = [column[first : first + len(rows)] for column in (several, x, y, x_adv)]
        if first:
            left = torch.nonzero(state.due(number)[rows])[:, 0]
            candidates = [column[left] for column in candidates]
        broken, outside = verify_candidates(task, state, number, *candidates)
        for name, count in (("broken", broken), ("outside", outside), ("candidates", len(candidates[0]))):
            counts[name] += count
    columns.done[rows] = number * MAX_TARGETS + targets.stop
    add_cost(task, state, number + 1, began, **counts)
    checkpoint.save(state)
    if task.progress is not silent:
        spent, waiting = passes_spent(state), int(_waiting(state, number, targets).sum())
        robust = float(state.survivors.double().mean())
        what = f"{stage.name}, at most {robust:.1%} robust"
        task.progress(what, spent, spent + planned_passes(task, state, number, waiting, targets))
    return len(rows)


def verify_candidates(
    task: Task, state: State, number: int, rows: Tensor, x: Tensor, y: Tensor, x_adv: Tensor
) -> tuple[int, int]:
    """Judge the candidates, and rounded to the 8-bit grid those that break nothing.

    The accuracy of an individual attack counts the candidates as the attack returned them.

    Returns:
        (number of samples newly broken, number of candidates outside the threat).
    """
    stage = state.stages[number]
    broken, newly, outside = judge(task, state, number, rows, x, y, x_adv)
    if stage.individual:
        state.columns.attack_correct[stage.name][rows] &= ~broken
    if task.grid and stage.passes(state.n_classes) >= LONG * stage.n_targets(state.n_classes):
        rounded = to_grid(x_adv, x, task.threat)
        left = (state.columns.broken_by[rows] == UNBROKEN) & (rounded != x_adv).flatten(1).any(1)
        left = torch.nonzero(left)[:, 0]
        if len(left):
            newly += judge(task, state, number, rows[left], x[left], y[left], rounded[left])[1]
    return newly, outside


def result(task: Task, state: State, processes: Processes) -> Evaluation:
    """The state as an Evaluation. Attacks that the budget ended before they began have no entry in attack_correct."""
    columns = state.columns
    by = columns.broken_by
    sample = task.pgd50_sample
    asked = torch.ones_like(columns.clean) if sample is None else sample
    missing = {stage.name for stage in state.stages[state.ended :] if stage.individual}
    *costs, branch, given = total_costs([*state.costs, state.branch, state.given], processes)
    stages = (*costs, *[branch] * bool(branch.attacked), *[given] * (task.candidates is not None))
    # 0 is the clean pass; branch and bound and the candidates come last, in this order
    by = torch.where(by >= 0, by + 1, torch.where(by == BY_BRANCH, len(costs), by))
    by = torch.where(by == BY_CANDIDATE, len(stages) - 1, by)
    ran = {stage.attack for stage, cost in zip(state.stages, stages[1:], strict=False) if cost.attacked}
    return Evaluation(
        threat=task.threat,
        index=task.data.index.cpu(),
        y=task.data.y.cpu(),
        prediction=columns.prediction.cpu(),
        margin=columns.margin.cpu(),
        clean=columns.clean.cpu(),
        attack_correct={
            name: (columns.attack_correct[name] & asked if name == PGD50.name else columns.attack_correct[name]).cpu()
            for name in task.attack_names
            if name not in missing
        },
        broken_by=by.cpu(),
        margin_adv=columns.margin_adv.cpu(),
        prediction_adv=columns.prediction_adv.cpu(),
        x_adv=mapped.detached(columns.x_adv.cpu()),
        stages=stages,
        spot_check=spot_check_result(state),
        votes=state.votes,
        precision=task.precision,
        pgd50_sample=None if sample is None else sample.cpu(),
        unfinished=state.ended < len(task.stages(state.differs_off_grid)),
        certified=None if columns.certified is None else columns.certified.cpu(),
        proved_by=None if columns.proved_by is None else columns.proved_by.cpu(),
        proofs=proof_costs(task, state, processes),
        attack_kinds=tuple(sorted(ran)),
    )
