"""The loop itself: data in an order that the seed decides, the inner attack, the outer step, and what is kept."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..data import Data, augment, pixels
from ..errors import UserError
from ..noise import Noise
from ..objectives import Schedule
from ..run_folder import reserve
from ..threat import Threat
from .checkpoint import CHECKPOINT_FILE, finish, resume, save, write_log
from .config import SCHEDULES, FitConfig, Fitted, Progress, best_epoch, expected_config
from .distributed import accelerator_on, together
from .fast_kernels import InBfloat16, quick
from .validation import averaged_weights, check_finite, check_task, validate


def fit(
    model: nn.Module,
    train: Data,
    val: Data,
    objective: Schedule,
    config: FitConfig,
    *,
    val_threat: Threat | None = None,
    out: Path | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
    device: str | None = None,
) -> Fitted:
    """Train ``model`` in place, and resume where a run in ``out`` was stopped: bit for bit on a CPU.

    Args:
        model: images to Outputs; train, val: the data (test data has no way in here); objective: Schedule.
        config: FitConfig. val_threat: a threat under which each epoch's robust accuracy on val is measured (PGD-10 on
            the margin, the first 1,000 images of val), logged as val_robust, and the best epoch chosen.
        out: the run folder; without one nothing is written and nothing can be resumed.
        about: what else config.json shall say, such as how the model is built (``runs.load`` reads it).
        progress: called after each epoch. device: "cpu", "cuda", ...; default the best there is.

    Every module is trained in the mode that it is in: one in eval mode, such as a frozen batch norm, stays so. (A
    network that ``runs.load`` opened is in eval mode: call ``model.train()`` on it first.) Torch's global random state
    is afterwards what it was before.
    Under torchrun every process takes its share of each batch; the gradient is that of the whole batch.
    The folder: config.json, env.json, log.jsonl (a line an epoch), checkpoint.safetensors; when done model.safetensors,
    the weights that ``config.keep`` names, and beside it the others, best.safetensors or last.safetensors.
    Raises UserError for empty data, labels the head has no logit for, another configuration in the same folder, a
    checkpoint of another version, a loss that is not finite (it names the samples, and the last good checkpoint stays),
    a process of the group that was lost.
    """
    started = time.perf_counter()
    check_task(model, train)
    if not len(val) and (val_threat is not None or config.keep == "best"):
        raise UserError("there are no validation images: without them nothing can be watched and no epoch is the best.")
    accelerator = accelerator_on(device)
    with _own_chance(accelerator.device), together(accelerator.num_processes, out):
        bench = _set_up(model, config, accelerator)
        history: list[dict[str, Any]] = []
        spent = 0.0
        if out is not None:
            reserve(out, expected_config(config, val_threat, about), write=accelerator.is_main_process)
            if (out / CHECKPOINT_FILE).exists():
                history, spent = resume(out, bench.plain, bench.optimizer, bench.averaged, bench.best)
                if accelerator.is_main_process:
                    write_log(out, history)
        train, val = train.to(accelerator.device), val.to(accelerator.device)
        saved, watching = time.perf_counter(), 0.0

        def seconds() -> float:
            return spent + time.perf_counter() - started - watching

        for epoch in range(len(history), config.epochs):
            began = time.perf_counter()
            means, each, index = _epoch(epoch, bench, train, objective, config)
            means = accelerator.reduce(means, reduction="mean")  # every process logs, and fails for, the whole batch
            check_finite(means, each, index, bench.plain, epoch, out)
            with averaged_weights(bench.plain, bench.averaged):
                figures = validate(bench.plain, val, val_threat, config.seed)
            (figures,) = broadcast_object_list([figures])  # batch statistics are each process's own: the first decides
            took = time.perf_counter() - began - figures.get("val_seconds", 0.0)
            watching += figures.get("val_seconds", 0.0)
            line = {
                "epoch": epoch + 1,
                "loss": float(means.mean()),
                "lr": config.lr * SCHEDULES[config.schedule](epoch / config.epochs),
                **figures,
                "seconds": round(took, 3),
            }
            line["best_epoch"] = best_epoch([*history, line])
            history.append(line)
            if line["best_epoch"] == epoch + 1:
                bench.best.update(bench.standing())
            last = epoch + 1 == config.epochs
            if out is not None and (last or time.perf_counter() - saved >= config.checkpoint_seconds):
                if accelerator.is_main_process:
                    save(out, bench.plain, bench.optimizer, bench.averaged, bench.best, history, seconds())
                saved = time.perf_counter()
            if progress is not None and accelerator.is_main_process:
                progress(epoch + 1, config.epochs, line)
        best = best_epoch(history)
        sides = {"last": bench.standing(), **({"best": bench.best} if best else {})}
        epochs = {"last": config.epochs, "best": best or config.epochs}
        bench.plain.load_state_dict(sides[config.keep])
        bench.plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as a loaded model is
        if out is not None and accelerator.is_main_process:
            finish(out, sides, epochs, config.keep, seconds())
        accelerator.wait_for_everyone()
        return Fitted(out, tuple(history), seconds(), best, epochs[config.keep])


@dataclass(frozen=True)
class _Bench:
    """What training changes in place. wrapped: plain, in the process group; inner: plain, as the inner attack sees it.

    averaged: the moving average of the weights, empty without ema; best: the weights of the best epoch so far.
    """

    wrapped: nn.Module
    plain: nn.Module
    inner: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    averaged: dict[str, Tensor]
    best: dict[str, Tensor]

    def standing(self) -> dict[str, Tensor]:
        """A copy of the weights that are judged and kept: the averaged ones, where there are some."""
        return {k: v.detach().clone() for k, v in (self.averaged or self.plain.state_dict()).items()}


def _set_up(model: nn.Module, config: FitConfig, accelerator: Accelerator) -> _Bench:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions are faster so
    optimizer = _optimizer(model, config)
    wrapped = accelerator.prepare(model)
    plain: nn.Module = accelerator.unwrap_model(wrapped)
    averaged = {k: v.detach().clone() for k, v in plain.state_dict().items()} if config.ema else {}
    inner = InBfloat16(plain) if config.precision == "bf16" else plain
    return _Bench(wrapped, plain, inner, optimizer, accelerator, averaged, {})


def _own_chance(device: torch.device) -> AbstractContextManager[None]:
    """Torch's generators of the CPU and of this device, for us alone: both come back as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _seed_all(seed: int, device: torch.device) -> None:
    """Seed those two and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _epoch(
    epoch: int, bench: _Bench, train: Data, objective: Schedule, config: FitConfig
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One pass over the data; every random number depends on (seed, epoch) alone.

    Returns, unread by the host: (steps,) each step's loss; and for each step its samples' losses and their numbers.
    """
    accelerator, optimizer = bench.accelerator, bench.optimizer
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    _seed_all(config.seed * 1_000_003 + epoch, device)  # dropout and its kin
    chance = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    batches = torch.randperm(len(train), generator=chance).to(device).split(config.batch_size)
    means: list[Tensor] = []
    losses: list[Tensor] = []
    numbers: list[Tensor] = []
    for step, batch in enumerate(batches):
        progress = (epoch + step / len(batches)) / config.epochs
        for group in optimizer.param_groups:
            group["lr"] = config.lr * SCHEDULES[config.schedule](progress)
        x, y = pixels(train.x.index_select(0, batch)), train.y[batch]
        if config.pad or config.flip:
            x = augment(x, chance, pad=config.pad, flip=config.flip)
        mine = slice(rank, None, world)
        x, y, index = x[mine], y[mine], train.index[batch][mine]
        now = objective(progress)
        with quick(device):
            x_adv = now.perturb(bench.inner, x, y, Noise(config.seed, index).fold(epoch))
        with now.weight_context(bench.plain, x, x_adv, y):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                each = now.loss(bench.wrapped, x, x_adv, y)
            mean = each.sum() * world / len(batch)  # the processes' gradients are averaged: this makes it the batch's
            optimizer.zero_grad()
            mean.backward()  # bf16 needs no loss scaling, so the plain calls are all there is
        optimizer.step()
        if bench.averaged:
            _average(bench.averaged, bench.plain, config.ema)
        means.append(mean.detach())
        losses.append(each.detach())
        numbers.append(index)
    stacked = torch.stack(means)
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32)), losses, numbers  # a bf16 mean would be coarse


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
