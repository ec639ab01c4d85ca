"""Proofs in an evaluation: what is proved leaves the attacks that have no accuracy of their own."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import METHODS, ROWS, CannotBound, certify
from ..data import pixels
from ..progress import silent
from .costs import add_cost
from .state import State, Task

CHEAP = "linear"  # the last method that is tried on all samples, before any attack


def proved(task: Task, rows: Tensor, method: str) -> Tensor | None:
    """Which of these samples are proved, (n,) bool; None if no bound of the network is known. Its forwards are counted.

    Args:
        task: the evaluation.
        rows: numbers of the samples.
        method: the last one that is tried.
    """
    model, data = task.model.model, task.data.take(rows)
    if not isinstance(model, nn.Module) or pixels(data.x[:1]).dtype != torch.float32:
        return None

    def count(module: nn.Module, images: tuple[Any, ...]) -> None:
        task.model.forwards += len(images[0])

    report = silent if method == CHEAP else task.progress
    size = min(ROWS, task.batches.size)
    hook = model.register_forward_pre_hook(count)
    try:
        found = certify(model, data, task.threat, method=method, batch_size=size, progress=report)
        return found.proved.to(rows.device)
    except CannotBound:
        return None
    finally:
        hook.remove()


def prove_survivors(task: Task, state: State) -> None:
    """Try the stronger methods on what the individual attacks left."""
    began, certified = time.perf_counter(), state.columns.certified
    if certified is not None and METHODS.index(task.proofs) > METHODS.index(CHEAP):
        rows = torch.nonzero(state.open)[:, 0]
        found = proved(task, rows, task.proofs)
        if found is not None:
            certified[rows] = found
        add_cost(task, state, 0, began)
    state.proved = True
