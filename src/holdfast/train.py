"""Training: one visible loop. fit(model, train, val, objective, config) -> a run folder; no test data comes in here."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .data import Data, augment, pixels
from .errors import UserError
from .noise import Noise
from .objectives import Schedule
from .outputs import Model, as_outputs, frozen_eval
from .results import write_atomic
from .runs import claim
from .storage import load_tensors, save_tensors

CHECKPOINT, CHECKPOINT_VERSION = "checkpoint", 1
Progress = Callable[[int, int, dict[str, Any]], None]  # (epochs done, epochs, the epoch's log line)


@dataclass(frozen=True)
class FitConfig:
    """How to fit.

    epochs >= 1; batch_size: over all processes; optimizer: "adam" or "sgd" (Nesterov momentum); lr > 0; schedule:
    "cosine" to zero, "onecycle" (up for a third, then cosine), "step" (a tenth at 1/2 and 3/4), "constant";
    weight_decay: decoupled for adam, on weights alone (not on biases, norms and centers); ema in [0, 1): decay of the
    averaged weights that are kept and judged, 0 is off; pad, flip: augmentation; precision: "no" (float32) or
    "bf16" for the forward pass of training; seed: of order, augmentation and noise; checkpoint_seconds: how much work a
    kill may cost, at most.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "cosine"
    weight_decay: float = 0.0
    momentum: float = 0.9
    ema: float = 0.0
    pad: int = 0
    flip: bool = False
    precision: str = "no"
    seed: int = 0
    checkpoint_seconds: float = 10.0

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, ">= 1"),
            "batch_size": (self.batch_size >= 1, ">= 1"),
            "optimizer": (self.optimizer in ("adam", "sgd"), "'adam' or 'sgd'"),
            "lr": (0 < self.lr < math.inf, "> 0"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "weight_decay": (self.weight_decay >= 0, ">= 0"),
            "ema": (0 <= self.ema < 1, "in [0, 1)"),
            "pad": (self.pad >= 0, ">= 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "checkpoint_seconds": (self.checkpoint_seconds >= 0, ">= 0"),
            "precision": (self.precision in ("no", "bf16"), "'no' or 'bf16'"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise UserError(f"{name} must be {wanted}, got {getattr(self, name)!r}.")


SCHEDULES: dict[str, Callable[[float], float]] = {  # progress in [0, 1) -> factor on lr
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "onecycle": lambda p: 0.05 + 0.95 * p * 3 if p < 1 / 3 else (1 + math.cos(math.pi * (p - 1 / 3) * 1.5)) / 2,
    "step": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01,
    "constant": lambda p: 1.0,
}


@dataclass(frozen=True)
class Fitted:
    """What fit leaves behind: the run folder (None if nothing was to be written), one log line per epoch, seconds."""

    folder: Path | None
    history: tuple[dict[str, Any], ...]
    seconds: float


def fit(
    model: nn.Module,
    train: Data,
    val: Data,
    objective: Schedule,
    config: FitConfig,
    *,
    out: Path | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
    device: str | None = None,
) -> Fitted:
    """Train ``model`` in place, and resume where a run in ``out`` was stopped: bit for bit on a CPU.

    Args:
        model: images to Outputs; train, val: the data (test data has no way in here); objective: Schedule.
        config: FitConfig. out: the run folder; without one nothing is written and nothing can be resumed.
        about: what else config.json shall say, such as how the model is built (``runs.load`` reads it).
        progress: called after each epoch. device: "cpu", "cuda", ...; default the best there is.

    Under torchrun every process takes its share of each batch; the gradient is that of the whole batch.
    The folder: config.json, env.json, log.jsonl (a line an epoch), checkpoint.safetensors, model.safetensors when done.
    Raises UserError for empty data, labels the head has no logit for, another configuration in the same folder, a
    checkpoint of another version, a loss that is not finite (the last good checkpoint stays).
    """
    started = time.perf_counter()
    _check(model, train)
    accelerator = Accelerator(cpu=device == "cpu")
    train, val = train.to(accelerator.device), val.to(accelerator.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions are faster so
    optimizer = _optimizer(model, config)
    wrapped = accelerator.prepare(model)
    plain: nn.Module = accelerator.unwrap_model(wrapped)
    averaged = {k: v.detach().clone() for k, v in plain.state_dict().items()} if config.ema else {}
    history: list[dict[str, Any]] = []
    spent = 0.0
    if out is not None:
        claim(out, {"fit": asdict(config), **(about or {})}, write=accelerator.is_main_process)
        if (out / "checkpoint.safetensors").exists():
            history, spent = _resume(out, plain, optimizer, averaged)
            if accelerator.is_main_process:
                _write_log(out, history)
    steps = math.ceil(len(train) / config.batch_size)
    saved = time.perf_counter()
    for epoch in range(len(history), config.epochs):
        began = time.perf_counter()
        losses = _epoch(epoch, steps, wrapped, plain, optimizer, accelerator, train, objective, config, averaged)
        losses = accelerator.reduce(losses, reduction="mean")  # every process logs, and fails for, the whole batch
        _finite(losses, plain, epoch, out)
        line = {
            "epoch": epoch + 1,
            "loss": float(losses.mean()),
            "lr": config.lr * SCHEDULES[config.schedule](epoch / config.epochs),
            "val": _validated(plain, averaged, val),
            "seconds": round(time.perf_counter() - began, 3),
        }
        history.append(line)
        last = epoch + 1 == config.epochs
        if out is not None and (last or time.perf_counter() - saved >= config.checkpoint_seconds):
            if accelerator.is_main_process:
                _save(out, plain, optimizer, averaged, history, spent + time.perf_counter() - started)
            saved = time.perf_counter()
        if progress is not None and accelerator.is_main_process:
            progress(epoch + 1, config.epochs, line)
    if averaged:
        plain.load_state_dict(averaged)
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as a loaded model is
    seconds = spent + time.perf_counter() - started
    if out is not None and accelerator.is_main_process:
        save_tensors(out / "model.safetensors", "model", 1, plain.state_dict(), {"seconds": seconds})
    accelerator.wait_for_everyone()
    return Fitted(out, tuple(history), seconds)


def _epoch(
    epoch: int,
    steps: int,
    model: nn.Module,
    plain: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    train: Data,
    objective: Schedule,
    config: FitConfig,
    averaged: dict[str, Tensor],
) -> Tensor:
    """One pass over the data; every random number depends on (seed, epoch) alone. Returns each step's loss, unread."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # dropout and its kin
    chance = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(train), generator=chance).to(device)
    losses = torch.zeros(steps, device=device)
    model.train()
    for step, batch in enumerate(order.split(config.batch_size)):
        progress = (epoch + step / steps) / config.epochs
        for group in optimizer.param_groups:
            group["lr"] = config.lr * SCHEDULES[config.schedule](progress)
        x, y = pixels(train.x.index_select(0, batch)), train.y[batch]
        if config.pad or config.flip:
            x = augment(x, chance, pad=config.pad, flip=config.flip)
        mine = slice(rank, None, world)
        x, y, noise = x[mine], y[mine], Noise(config.seed, train.index[batch][mine]).fold(epoch)
        now = objective(progress)
        x_adv = now.perturb(plain, x, y, noise)
        with now.around(plain):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                each = now.loss(model, x, x_adv, y)
            mean = each.sum() * world / len(batch)  # the processes' gradients are averaged: this makes it the batch's
            optimizer.zero_grad()
            mean.backward()  # bf16 needs no loss scaling, so the plain calls are all there is
        optimizer.step()
        if averaged:
            _average(averaged, plain, config.ema)
        losses[step] = mean.detach()
    return losses


def _validated(model: nn.Module, averaged: dict[str, Tensor], val: Data) -> float | None:
    """Validation accuracy of the weights that will be kept: the averaged ones, where there are some."""
    if not len(val):
        return None
    if not averaged:
        return accuracy(model, val)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(averaged)
    judged = accuracy(model, val)
    model.load_state_dict(own)
    return judged


def _average(averaged: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            averaged[name].lerp_(tensor, 1 - decay)
        else:
            averaged[name].copy_(tensor)


def _optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels; none on biases, norms, centers and variances."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bare = {name for name, p in named if p.ndim < 2 or name.endswith(("centers", "log_variances"))}
    groups = [
        {"params": [p for name, p in named if name not in bare], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if name in bare], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


def _check(model: nn.Module, train: Data) -> None:
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


def _finite(losses: Tensor, model: nn.Module, epoch: int, out: Path | None) -> None:
    bad = torch.nonzero(~losses.isfinite())
    if len(bad):
        where = f"the loss is not finite in epoch {epoch + 1}, step {int(bad[0]) + 1}"
    elif not bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all()):
        where = f"the weights are not finite after epoch {epoch + 1}, step {len(losses)}"
    else:
        return
    kept = out is not None and (out / "checkpoint.safetensors").exists()
    raise UserError(f"{where}. Lower the learning rate.{f' The last good checkpoint is in {out}.' if kept else ''}")


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


def _save(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: dict[str, Tensor],
    history: list[dict[str, Any]],
    seconds: float,
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in averaged.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    save_tensors(
        out / "checkpoint.safetensors",
        CHECKPOINT,
        CHECKPOINT_VERSION,
        tensors,
        {"history": history, "seconds": seconds},
    )
    _write_log(out, history)


def _write_log(out: Path, history: list[dict[str, Any]]) -> None:
    # It follows the checkpoint, at a save as at a resume, so it never tells of epochs that are lost.
    write_atomic(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def _resume(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averaged: dict[str, Tensor]
) -> tuple[list[dict[str, Any]], float]:
    tensors, about = load_tensors(out / "checkpoint.safetensors", CHECKPOINT, CHECKPOINT_VERSION)

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    try:
        model.load_state_dict(under("model."))
    except RuntimeError as error:
        raise UserError(f"the checkpoint in {out} belongs to another network: {error}") from None
    for name, tensor in under("ema.").items():
        averaged[name].copy_(tensor)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer.").items():
        number, _, key = name.partition(".")
        p = parameters[int(number)]
        if tensor.shape == p.shape:  # in the memory order of its parameter: fused optimisers walk both side by side
            tensor = torch.empty_like(p, requires_grad=False).copy_(tensor)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return about["history"], about["seconds"]
