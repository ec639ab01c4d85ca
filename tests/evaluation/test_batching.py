"""Batches are halved where memory runs out."""

from __future__ import annotations

import pytest
import torch
from tests.evaluation.helpers import THREAT, numbers, threshold
from torch import nn

from holdfast.errors import UserError
from holdfast.evaluation import evaluate


class LimitedMemory(nn.Module):
    """A device that holds so many images at once, with the errors of CUDA and of the CPU's allocator."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.sizes = most, error, []

    def forward(self, x):
        if len(x) > self.most:
            raise self.error
        self.sizes.append(len(x))
        return threshold(x)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("most", [1, 7, 20])
def test_when_memory_runs_out_batches_are_halved_and_nothing_else_changes(error, most):
    data, model = numbers(torch.linspace(0.51, 0.7, 50).tolist()), LimitedMemory(most, error)
    e = evaluate(model, data, THREAT, "quick")
    assert e.robust.tolist() == evaluate(threshold, data, THREAT, "quick").robust.tolist()
    assert max(model.sizes) > most // 2


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_for_one_image_is_an_error(error):
    with pytest.raises(UserError, match="memory ran out on a single image"):
        evaluate(LimitedMemory(0, error), numbers([0.6] * 5), THREAT, "quick")
