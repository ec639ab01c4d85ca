"""What is asked of a network in training: its accuracy, clean and attacked, and whether its numbers are finite."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..attacks import pgd
from ..data import Data, pixels
from ..errors import UserError
from ..losses import negative_margin
from ..noise import Noise
from ..outputs import Model, as_outputs, fooled, frozen_eval
from ..threat import Threat
from .fast_kernels import quick

WATCHED, WATCH_STEPS = 1000, 10  # at most so many images of val, in its own order, under PGD of so many steps
NAMED = 5  # how many samples an error names


def accuracy(model: Model, data: Data, batch_size: int = 1024) -> float:
    """The share of samples that the model, in eval mode, gets right.

    >>> data = Data(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), torch.arange(2))
    >>> accuracy(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), data)
    0.5
    """
    right = torch.zeros((), dtype=torch.int64, device=data.y.device)
    with frozen_eval(model), torch.no_grad():
        for x, y in zip(data.x.split(batch_size), data.y.split(batch_size), strict=True):
            logits = as_outputs(model(pixels(x))).logits
            right += ((logits.argmax(1) == y) & logits.isfinite().all(1)).sum()  # NaN is never right
    return float(right) / len(data)


def robust_accuracy(
    model: Model, data: Data, threat: Threat, *, seed: int = 0, steps: int = WATCH_STEPS, batch_size: int = 250
) -> float:
    """The share that the model, in eval mode and float32, still gets right at the worst point PGD on the margin finds.

    A quick look while training, and an upper bound like any attack's; ``evaluate`` is what judges a network. The noise
    belongs to the samples (seed, data.index), so it is the same at every call.

    >>> data = Data(torch.full((2, 1, 1, 1), 0.5), torch.tensor([0, 1]), torch.arange(2))
    >>> model = lambda x: torch.cat([x.flatten(1) - 0.45, 0.45 - x.flatten(1)], 1)  # class 0 while x > 0.45
    >>> robust_accuracy(model, data, Threat("linf", 0.04)), robust_accuracy(model, data, Threat("linf", 0.2))
    (0.5, 0.0)
    """
    right, noise = torch.zeros((), dtype=torch.int64, device=data.y.device), Noise(seed, data.index)
    for start in range(0, len(data), batch_size):
        rows = slice(start, start + batch_size)
        x, y = pixels(data.x[rows]), data.y[rows]
        with quick(x.device):
            x_adv = pgd(model, x, y, threat, score=negative_margin, noise=noise[rows], steps=steps)
        with frozen_eval(model), torch.no_grad():
            logits = as_outputs(model(x_adv)).logits
        right += (~fooled(logits, y) & logits.isfinite().all(1)).sum()
    return float(right) / len(data)


def validate(model: nn.Module, val: Data, val_threat: Threat | None, seed: int) -> dict[str, Any]:
    """The figures of an epoch: val (None without samples), and val_robust and its val_seconds where watched."""
    found: dict[str, Any] = {"val": accuracy(model, val) if len(val) else None}
    if val_threat is not None:
        began = time.perf_counter()
        found["val_robust"] = robust_accuracy(model, val.take(slice(0, WATCHED)), val_threat, seed=seed)
        found["val_seconds"] = round(time.perf_counter() - began, 3)
    return found


@contextmanager
def averaged_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """The model with these weights, and with its own again afterwards; with none given, as it is."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()} if weights else {}
    if weights:
        model.load_state_dict(weights)
    try:
        yield
    finally:
        if weights:
            model.load_state_dict(own)


def check_task(model: nn.Module, train: Data) -> None:
    """Raise UserError for an empty training set, or labels that the head has no logit for."""
    if len(train) == 0:
        raise UserError("there is nothing to train on: the training set is empty.")
    device = next(iter(model.parameters()), train.x).device
    with frozen_eval(model), torch.no_grad():
        classes = as_outputs(model(pixels(train.x[:1]).to(device))).logits.shape[1]
    lowest, highest = int(train.y.min()), int(train.y.max())
    if lowest < 0:
        raise UserError(f"labels must be 0 .. K-1, the lowest is {lowest}.")
    if highest >= classes:
        raise UserError(
            f"the model's head has {classes} logits, labels go up to {highest}: build it with {highest + 1} classes."
        )


def check_finite(
    means: Tensor, each: Sequence[Tensor], index: Sequence[Tensor], model: nn.Module, epoch: int, out: Path | None
) -> None:
    """Raise UserError where an epoch (from 0) went wrong: its first step with a loss that is not finite, and whose.

    Args: means: (steps,), each step's loss over all processes; each, index: this process's samples of every step, their
    losses and their numbers in the data. Where all losses of a step are gone at once it was the weights that went.
    """
    bad = torch.nonzero(~means.isfinite())
    if len(bad):
        step = int(bad[0])
        here = index[step][~each[step].isfinite()].tolist(), [len(each[step])]
        guilty, sizes = (gather_object(part) for part in here)  # every process is here: they all saw the same mean
        where = f"the loss is not finite in epoch {epoch + 1}, step {step + 1}, {_whose(sorted(guilty), sum(sizes))}"
    elif not bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all()):
        where = f"the weights are not finite after epoch {epoch + 1}, step {len(means)}: lower the learning rate"
    else:
        return
    kept = out is not None and (out / "checkpoint.safetensors").exists()
    raise UserError(f"{where}.{f' The last good checkpoint is in {out}.' if kept else ''}")


def _whose(guilty: list[int], of: int) -> str:
    if not guilty:
        return "where the samples' finite losses add up to too much: lower the learning rate"
    if len(guilty) == of > 1:
        return f"for all of its {of} samples: the weights had gone before. Lower the learning rate"
    named, more = guilty[:NAMED], len(guilty) - NAMED
    names = ", ".join(map(str, named)) + (f" and {more} more" if more > 0 else "")
    samples, them = ("samples", "them") if len(guilty) > 1 else ("sample", "it")
    return f"for training {samples} {names}: look at {them}, or lower the learning rate"
