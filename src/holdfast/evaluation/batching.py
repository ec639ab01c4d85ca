"""Work in batches that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from ..outputs import out_of_memory

T = TypeVar("T")


def unlimited() -> float:
    """The limit of work that always has to be finished."""
    return math.inf


class Batches:
    """A batch size that is halved, for good, whenever memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def map(self, rows: Tensor, work: Callable[[Tensor], T], limit: Callable[[], float] = unlimited) -> list[T]:
        """work(batch) for each batch of rows, in order.

        Args:
            rows: (M,) int64.
            work: called with one batch of rows at a time; repeated with half the rows where it runs out of memory.
            limit: asked before each batch how many more samples may be processed; below 1, the rest is left out.

        Returns:
            One result per batch.

        Raises:
            UserError: if memory runs out on a single image.
        """
        results = []
        while len(rows):
            size = int(min(self.size, limit(), len(rows)))
            if size < 1:
                break
            try:
                results.append(work(rows[:size]))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(f"memory ran out on a single image: {error}") from error
                self.size = max(1, size // 2)
                if rows.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            rows = rows[size:]
        return results
