"""Several processes share one evaluation (torch.distributed): each runs some batches, all get the same result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .evaluation import StageCost, sum_over_processes
from .state import BY_BRANCH, Columns, State, Task, add_extra_stages

PROOF_COLUMNS = ("certified", "proved_by", "tried", "given")


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
    """What a process sends after its part of some work: the columns of its rows, by name, and one answer."""

    rows: Tensor
    columns: dict[str, Tensor]
    said: bool


class _Resumed(NamedTuple):
    """What a process sends when it resumes: all columns by name, and how far it has come."""

    columns: dict[str, Tensor]
    chosen_for: int
    n_rest: int
    n_stages: int
    proved: bool


def exchange_results(task: Task, state: State, processes: Processes, rows: Tensor) -> None:
    """After a stage has run at one target: exchange results, and whether a budget is spent, with all processes."""
    columns = state.columns
    shared = {
        "x_adv": columns.x_adv,
        "margin_adv": columns.margin_adv,
        "prediction_adv": columns.prediction_adv,
        "broken_by": columns.broken_by,
        "done": columns.done,
        **{f"attack_correct/{name}": correct for name, correct in columns.attack_correct.items()},
    }
    state.budget_spent = any(exchange(processes, shared, processes.mine(rows, task.batch_size), state.budget_spent))


def exchange(processes: Processes, shared: dict[str, Tensor], mine: Tensor, said: bool) -> list[bool]:
    """Give all processes this one's rows of some columns, and take theirs. Returns what each process said."""
    sent = _Results(mine.cpu(), {name: column[mine].cpu() for name, column in shared.items()}, said)
    received = processes.gather(sent)
    for theirs in received:
        for name, values in theirs.columns.items():
            shared[name][theirs.rows.to(mine.device)] = values.to(mine.device)
    return [theirs.said for theirs in received]


def synchronise(task: Task, state: State, processes: Processes) -> None:
    """When processes resume from checkpoints of different moments: each sample continues where it had come furthest."""
    tensors = state.columns.to_tensors()
    columns = {name: tensor.cpu() for name, tensor in tensors.items()}
    received = processes.gather(_Resumed(columns, state.chosen_for, state.n_rest, len(state.stages), state.proved))
    tensors = {name: tensor for name, tensor in tensors.items() if all(name in theirs.columns for theirs in received)}
    # A witness of branch and bound comes after what is done.
    came = [2 * theirs.columns["done"] + (theirs.columns["broken_by"] == BY_BRANCH) for theirs in received]
    furthest = torch.stack(came).argmax(0)
    latest = max(received, key=lambda theirs: theirs.chosen_for)
    merged = {}
    for name, tensor in tensors.items():
        every = torch.stack([theirs.columns[name] for theirs in received])
        column = every[furthest, torch.arange(len(furthest))]
        if name in PROOF_COLUMNS:  # what one of them has proved is proved
            column = every.amax(0)
        if name in ("chosen", "spot_check"):  # decided for all samples at once
            column = latest.columns[name]
        merged[name] = column.to(tensor.device)
    state.columns = Columns.from_tensors(merged)
    state.chosen_for, state.n_rest = latest.chosen_for, latest.n_rest
    state.proved = all(theirs.proved for theirs in received)
    add_extra_stages(task, state, max(theirs.n_stages for theirs in received))


def total_costs(costs: list[StageCost], processes: Processes) -> list[StageCost]:
    """Cost of each stage, over all processes."""
    if processes.count == 1:
        return costs
    return [sum_over_processes(parts) for parts in zip(*processes.gather(costs), strict=True)]
