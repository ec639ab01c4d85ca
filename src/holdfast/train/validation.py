"""Validation during training: clean and robust accuracy, and the check that losses and weights are finite."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..attacks import pgd
from ..data import Data, augment, pixels
from ..data.arguments import AnyData, as_data, note_assumptions
from ..errors import UserError, type_of
from ..losses import negative_margin
from ..noise import Noise
from ..objectives import Schedule
from ..outputs import Model, Queried, fooled, frozen_eval
from ..threat import Threat, as_threat, check_eps
from ..user_input import path, typed, whole
from .checkpoint import CHECKPOINT_FILE
from .config import FitConfig
from .fast_kernels import fast_input_gradients

ROBUST_VAL_IMAGES, ROBUST_VAL_STEPS = 1000, 10  # robust validation: the first so many images of val, PGD steps
MAX_NAMED = 5  # how many samples an error names


@typed
def accuracy(model: Model, data: Data, batch_size: int = 1024) -> float:
    """Measure the accuracy of a model in eval mode. A sample with a logit that is not finite counts as wrong.

    Args:
        model: images to logits or Outputs.
        data: the samples, on the model's device.
        batch_size: samples per forward pass.

    Returns:
        The accuracy in [0, 1].

    >>> data = Data(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), torch.arange(2))
    >>> accuracy(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), data)
    0.5
    """
    whole("batch_size", batch_size, 1)
    queried, correct = Queried(model), torch.zeros((), dtype=torch.int64, device=data.y.device)
    with frozen_eval(model), torch.no_grad():
        for start in range(0, len(data), batch_size):
            rows = slice(start, start + batch_size)
            logits = queried(data.pixels(rows)).logits
            correct += ((logits.argmax(1) == data.y[rows]) & logits.isfinite().all(1)).sum()
    return float(correct) / len(data)


@typed
def robust_accuracy(
    model: Model, data: Data, threat: Threat, *, seed: int = 0, steps: int = ROBUST_VAL_STEPS, batch_size: int = 250
) -> float:
    """Measure the accuracy under PGD on the margin, of a model in eval mode and float32.

    A cheap upper bound for use during training; ``evaluate`` measures robust accuracy properly. The noise belongs to
    the samples (seed, data.index), so every call gives the same number.

    Args:
        model: images to logits or Outputs.
        data: the samples, on the model's device.
        threat: what PGD may do.
        seed: of the noise.
        steps: of PGD.
        batch_size: samples per forward pass.

    Returns:
        The accuracy in [0, 1].

    >>> data = Data(torch.full((2, 1, 1, 1), 0.5), torch.tensor([0, 1]), torch.arange(2))
    >>> model = lambda x: torch.cat([x.flatten(1) - 0.45, 0.45 - x.flatten(1)], 1)  # class 0 while x > 0.45
    >>> robust_accuracy(model, data, Threat("linf", 0.04)), robust_accuracy(model, data, Threat("linf", 0.2))
    (0.5, 0.0)
    """
    whole("batch_size", batch_size, 1)
    correct, noise = torch.zeros((), dtype=torch.int64, device=data.y.device), Noise(seed, data.index)
    queried = Queried(model)
    for start in range(0, len(data), batch_size):
        rows = slice(start, start + batch_size)
        x, y = data.pixels(rows), data.y[rows]
        with fast_input_gradients(x.device):
            x_adv = pgd(model, x, y, threat, score=negative_margin, noise=noise[rows], steps=steps)
        with frozen_eval(model), torch.no_grad():
            logits = queried(x_adv).logits
        correct += (~fooled(logits, y) & logits.isfinite().all(1)).sum()
    return float(correct) / len(data)


def validate(model: nn.Module, val: Data, val_threat: Threat | None, seed: int) -> dict[str, Any]:
    """Measure what an epoch's log line says about validation.

    Args:
        model: the network.
        val: validation images; may be empty.
        val_threat: threat of robust validation, or None.
        seed: of PGD's noise.

    Returns:
        val: accuracy, None without images; with a threat also val_robust and val_seconds.
    """
    line: dict[str, Any] = {"val": accuracy(model, val) if len(val) else None}
    if val_threat is not None:
        start = time.perf_counter()
        line["val_robust"] = robust_accuracy(model, val.take(slice(0, ROBUST_VAL_IMAGES)), val_threat, seed=seed)
        line["val_seconds"] = round(time.perf_counter() - start, 3)
    return line


@contextmanager
def averaged_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Give a model these weights for the duration of the context; empty weights change nothing."""
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()} if weights else {}
    if weights:
        model.load_state_dict(weights)
    try:
        yield
    finally:
        if weights:
            model.load_state_dict(original)


def check_arguments(
    train: AnyData,
    val: AnyData,
    objective: Schedule,
    config: FitConfig,
    val_threat: Threat | str | None,
    out: Path | str | None,
) -> tuple[Data, Data, Threat | None, Path | None]:
    """Check what ``fit`` was given beside the model.

    Args:
        train: training images.
        val: validation images.
        objective: the min-max problem, as a function of training progress.
        config: hyperparameters.
        val_threat: a threat or its text, or None.
        out: the run folder, or None.

    Returns:
        (training images, validation images, the threat, the run folder).

    Raises:
        UserError: one of them is of another type, or cannot be read.
    """
    if not isinstance(config, FitConfig):
        raise UserError(f"config must be a FitConfig, such as FitConfig(epochs=10), got {type_of(config)}.")
    if not _takes_progress(objective):
        raise UserError(
            "objective must be a schedule as holdfast.objectives makes it, such as standard(loss) or "
            f"adversarial(loss, threat), got {type_of(objective)}."
        )
    threat = None if val_threat is None else as_threat(val_threat)
    if threat is not None:
        check_eps(threat)
    train, val = as_data(train, "train", "train"), as_data(val, "val", "val")
    augment(train.x[:1], torch.Generator(), pad=config.pad, flip=False)  # refuses a pad that does not fit
    note_assumptions(train, "train")
    return train, val, threat, None if out is None else path("out", out)


def _takes_progress(objective: Any) -> bool:
    """Whether it can be called with one number, as a schedule is; a loss takes two arguments."""
    try:
        inspect.signature(objective).bind(0.0)
    except (TypeError, ValueError):
        return False
    return True


def check_task(model: nn.Module, train: Data) -> None:
    """Check that the training set is not empty and that the head has a logit for every label.

    Raises:
        UserError: otherwise.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model must be a torch module with parameters to train, got {type_of(model)}.")
    if len(train) == 0:
        raise UserError("the training set is empty: expected at least one sample.")
    device = next(iter(model.parameters()), train.x).device
    with frozen_eval(model), torch.no_grad():
        classes = Queried(model)(pixels(train.x[:1]).to(device)).logits.shape[1]
    lowest, highest = int(train.y.min()), int(train.y.max())
    if lowest < 0:
        raise UserError(f"labels must be 0 .. K-1, the lowest is {lowest}.")
    if highest >= classes:
        raise UserError(
            f"the model's head has {classes} logits, but labels go up to {highest}: build it with {highest + 1} "
            "classes."
        )


def check_validation(val: Data) -> None:
    """Check that there are validation images, for a fit that needs them.

    Raises:
        UserError: there are none.
    """
    if len(val) == 0:
        raise UserError(
            "val holds no validation images, but val_threat and checkpoint='best' need some: hold some out, or use "
            "neither."
        )


def check_finite(
    means: Tensor, losses: Sequence[Tensor], index: Sequence[Tensor], model: nn.Module, epoch: int, out: Path | None
) -> None:
    """Check that the losses of an epoch and the weights after it are finite.

    Where all losses of a step are lost at once, the weights were already not finite; otherwise the error names the
    samples.

    Args:
        means: (steps,), each step's loss over all processes.
        losses: this process's losses of every step.
        index: the numbers of these samples in the data.
        model: the network after the epoch.
        epoch: counted from 0.
        out: the run folder, for the message.

    Raises:
        UserError: a loss or a weight is not finite.
    """
    bad_steps = torch.nonzero(~means.isfinite())
    if len(bad_steps):
        step = int(bad_steps[0])
        own = index[step][~losses[step].isfinite()].tolist(), [len(losses[step])]
        bad, sizes = (gather_object(part) for part in own)  # every process is here: all saw the same mean
        why = f"the loss is not finite in epoch {epoch + 1}, step {step + 1}, {_which(sorted(bad), sum(sizes))}"
    elif not bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all()):
        why = f"the weights are not finite after epoch {epoch + 1}, step {len(means)}: lower the learning rate"
    else:
        return
    saved = out is not None and (out / CHECKPOINT_FILE).exists()
    raise UserError(f"{why}.{f' The last good checkpoint is in {out}.' if saved else ''}")


def _which(bad: list[int], batch_size: int) -> str:
    if not bad:
        return "although each sample's is: their sum overflows. Lower the learning rate"
    if len(bad) == batch_size > 1:
        return (
            f"for all {batch_size} samples in the batch: the weights were already non-finite. Lower the learning rate"
        )
    more = len(bad) - MAX_NAMED
    names = ", ".join(map(str, bad[:MAX_NAMED])) + (f" and {more} more" if more > 0 else "")
    samples, them = ("samples", "them") if len(bad) > 1 else ("sample", "it")
    return f"for training {samples} {names}: look at {them}, or lower the learning rate"
