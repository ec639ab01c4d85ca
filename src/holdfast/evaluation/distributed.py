"""Several processes share one evaluation (torch.distributed): each runs some batches, all get the same result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .evaluation import StageCost, sum_over_processes
from .state import Columns, State, Task, add_extra_stages


@dataclass(frozen=True)
class Processes:
    """This process among those that share the evaluation.

    Args:
        rank: its number, 0 for the first.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all of them have found."""
        return self.rank == 0

    @staticmethod
    def current() -> Processes:
        """As torch.distributed says; a single process where it is not initialised."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return Processes()
        return Processes(distributed.get_rank(), distributed.get_world_size())

    def mine(self, rows: Tensor, batch_size: int) -> Tensor:
        """This process's part of the rows: whole batches, dealt out in turn, so that batches do not depend on count."""
        return torch.cat([rows[:0], *rows.split(batch_size)[self.rank :: self.count]])

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in order of rank."""
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values


class _Results(NamedTuple):
    """What a process sends after its part of a stage: the columns of its rows, by name."""

    rows: Tensor
    columns: dict[str, Tensor]
    budget_spent: bool


class _Resumed(NamedTuple):
    """What a process sends when it resumes: all columns by name, and how far it has come."""

    columns: dict[str, Tensor]
    chosen_for: int
    n_rest: int
    n_stages: int


def exchange_results(task: Task, state: State, processes: Processes, rows: Tensor) -> None:
    """After a stage has run at one target: exchange results, and whether a budget is spent, with all processes."""
    mine, columns = processes.mine(rows, task.batch_size), state.columns
    shared = {
        "x_adv": columns.x_adv,
        "margin_adv": columns.margin_adv,
        "prediction_adv": columns.prediction_adv,
        "broken_by": columns.broken_by,
        "done": columns.done,
        **{f"attack_correct/{name}": correct for name, correct in columns.attack_correct.items()},
    }
    sent = _Results(mine.cpu(), {name: column[mine].cpu() for name, column in shared.items()}, state.budget_spent)
    for theirs in processes.gather(sent):
        for name, values in theirs.columns.items():
            shared[name][theirs.rows.to(rows.device)] = values.to(rows.device)
        state.budget_spent |= theirs.budget_spent


def synchronise(task: Task, state: State, processes: Processes) -> None:
    """When processes resume from checkpoints of different moments: each sample continues where it had come furthest."""
    tensors = state.columns.to_tensors()
    columns = {name: tensor.cpu() for name, tensor in tensors.items()}
    received = processes.gather(_Resumed(columns, state.chosen_for, state.n_rest, len(state.stages)))
    furthest = torch.stack([theirs.columns["done"] for theirs in received]).argmax(0)
    latest = max(received, key=lambda theirs: theirs.chosen_for)
    merged = {}
    for name, tensor in tensors.items():
        every = torch.stack([theirs.columns[name] for theirs in received])
        column = every[furthest, torch.arange(len(furthest))]
        if name in ("chosen", "spot_check"):  # decided for all samples at once
            column = latest.columns[name]
        merged[name] = column.to(tensor.device)
    state.columns = Columns.from_tensors(merged)
    state.chosen_for, state.n_rest = latest.chosen_for, latest.n_rest
    add_extra_stages(task, state, max(theirs.n_stages for theirs in received))


def total_costs(state: State, processes: Processes) -> list[StageCost]:
    """Cost of each stage, over all processes."""
    if processes.count == 1:
        return state.costs
    return [sum_over_processes(parts) for parts in zip(*processes.gather(state.costs), strict=True)]
