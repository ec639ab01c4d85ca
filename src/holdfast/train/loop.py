"""fit: the training loop, with the inner attack, the outer step, validation and checkpoints in plain sight."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..data import Data, augment, pixels
from ..data.arguments import AnyData
from ..mapped import is_mapped, take
from ..noise import Noise, TrainingStream
from ..objectives import Schedule
from ..progress import Progress, as_progress
from ..run_folder import reserve
from ..threat import Threat
from .checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint, save_final, write_log
from .config import SCHEDULES, CollapseWarning, FitConfig, Fitted, best_epoch, collapse, expected_config
from .distributed import accelerator_on, group_errors
from .fast_kernels import InBfloat16, fast_input_gradients
from .freeze import frozen_parts
from .initialise import initialise_for_bounds, measure_batch_norm
from .noise_augmentation import WithNoise
from .trackers import Tracking, tracking
from .validation import averaged_weights, check_arguments, check_finite, check_task, check_validation, validate


def fit(
    model: nn.Module,
    train: AnyData,
    val: AnyData,
    objective: Schedule,
    config: FitConfig,
    *,
    val_threat: Threat | str | None = None,
    out: Path | str | None = None,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
    track: str | Sequence[str] | Tracking | None = None,
    device: str | None = None,
) -> Fitted:
    """Train a model in place, and resume where a run in ``out`` was stopped: bit for bit on a CPU.

    The run folder holds config.json, env.json, log.jsonl (one line per epoch), checkpoint.safetensors and, when
    training is done, model.safetensors with the weights that ``config.checkpoint`` chose. (The checkpoint keeps the
    others.)

    Every module is trained in the mode it is in: a batch norm in eval mode stays frozen. (``run_folder.load`` returns a
    network in eval mode: call ``model.train()`` before training it further.) Torch's global random state is afterwards
    what it was before. Under torchrun every process takes its share of each batch; the gradient is the whole batch's.

    Args:
        model: images to Outputs.
        train: training images, as ``as_data`` takes them; test data has no way in here.
        val: validation images; may be empty.
        objective: the min-max problem, as a function of training progress in [0, 1).
        config: hyperparameters.
        val_threat: measure robust accuracy on val after each epoch (PGD-10 on the margin, first 1,000 images), log it
            as val_robust, and choose the best epoch by it. CollapseWarning: it fell to less than half of the best.
        out: the run folder; without one nothing is written and nothing can be resumed.
        about: further entries of config.json, such as how the model is built (``run_folder.load`` reads "model").
        progress: None, or called after each epoch with its log line in words, the epochs done and all epochs.
        track: trackers that get each line of log.jsonl: "tensorboard", "wandb", "mlflow", or several. A resumed run
            sends its earlier epochs too.
        device: "cpu", "cuda", ...; default: the best there is.

    Returns:
        History, time, and the best epoch.

    Raises:
        UserError: the data is empty, a label has no logit, ``config.freeze`` chooses no parameter or all of them, the
            folder holds another configuration or a checkpoint of another version, a loss is not finite (the message
            names the samples, and the last good checkpoint stays), the device cannot be used, a tracker is not
            installed or cannot start, or another process of the group was lost.
    """
    start_time, progress = time.perf_counter(), as_progress(progress)
    train, val, val_threat, out = check_arguments(train, val, objective, config, val_threat, out)
    check_task(model, train)
    if val_threat is not None or config.checkpoint == "best":
        check_validation(val)
    settings = expected_config(config, val_threat, about)
    accelerator = accelerator_on(device)
    own_state, errors = _own_torch_state(accelerator.device), group_errors(accelerator.num_processes, out)
    with frozen_parts(model, config.freeze), tracking(track, out, settings) as tracked, own_state, errors:
        state = _set_up(model, config, accelerator)
        history, earlier_seconds = _resumed(out, settings, state)
        if accelerator.is_main_process:
            tracked.open(history)
        train, val = train.to(accelerator.device), val.to(accelerator.device)
        last_save, validation_seconds = time.perf_counter(), 0.0

        def seconds() -> float:
            return earlier_seconds + time.perf_counter() - start_time - validation_seconds

        for epoch in range(len(history), config.epochs):
            epoch_start = time.perf_counter()
            means, losses, index = _epoch(epoch, state, train, objective, config)
            means = accelerator.reduce(means, reduction="mean")  # every process logs, and checks, the whole batch
            check_finite(means, losses, index, state.model, epoch, out)
            measured = _validated(state, train, val, val_threat, config)
            (measured,) = broadcast_object_list([measured])  # batch statistics differ: the first process decides
            validation_seconds += measured.get("val_seconds", 0.0)
            lr = config.lr * SCHEDULES[config.schedule](epoch / config.epochs)
            line = {"epoch": epoch + 1, "loss": float(means.mean()), "lr": lr, **measured}
            line["seconds"] = round(time.perf_counter() - epoch_start - measured.get("val_seconds", 0.0), 3)
            history.append(line)
            line["best_epoch"] = best_epoch(history)
            if line["best_epoch"] == epoch + 1:
                state.best.update(state.validated_weights())
            last = epoch + 1 == config.epochs
            if out is not None and (last or time.perf_counter() - last_save >= config.checkpoint_seconds):
                if accelerator.is_main_process:
                    save_checkpoint(out, state.model, state.optimizer, state.ema, state.best, history, seconds())
                last_save = time.perf_counter()
            if accelerator.is_main_process:
                tracked.epoch(line)
                progress(_in_words(line), epoch + 1, config.epochs)
                _warn_of_collapse(history, out)
        best = best_epoch(history)
        kept, weights = _keep(state, best, config)
        if out is not None and accelerator.is_main_process:
            save_final(out, weights, kept, seconds())
        accelerator.wait_for_everyone()
        return Fitted(out, tuple(history), seconds(), best, kept)


@dataclass(frozen=True)
class _TrainingState:
    """What training changes in place.

    model: the network; parallel_model: the same, in the process group; attacked_model: the same, as the inner attack
    calls it; ema: the moving average of the weights, empty without one; best: the weights of the best epoch so far.
    """

    model: nn.Module
    parallel_model: nn.Module
    attacked_model: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    ema: dict[str, Tensor]
    best: dict[str, Tensor]

    def validated_weights(self) -> dict[str, Tensor]:
        """A copy of the weights that are validated and saved: the averaged ones if there are any."""
        return {k: v.detach().clone() for k, v in (self.ema or self.model.state_dict()).items()}


def _set_up(model: nn.Module, config: FitConfig, accelerator: Accelerator) -> _TrainingState:
    # The optimizer comes after the move, which may replace the parameters. Convolutions are faster in this format.
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.init == "interval":
        initialise_for_bounds(model, config.seed)
    optimizer = _optimizer(model, config)
    parallel_model = accelerator.prepare(model)
    model = accelerator.unwrap_model(parallel_model)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()} if config.ema else {}
    attacked_model = InBfloat16(model) if config.precision == "bf16" else model
    return _TrainingState(model, parallel_model, attacked_model, optimizer, accelerator, ema, {})


def _resumed(out: Path | None, settings: dict[str, Any], state: _TrainingState) -> tuple[list[dict[str, Any]], float]:
    """Reserve a run folder, load its checkpoint and let its log end there: (history, seconds of training so far)."""
    if out is None:
        return [], 0.0
    is_main = state.accelerator.is_main_process
    reserve(out, settings, write=is_main)
    if not (out / CHECKPOINT_FILE).exists():
        return [], 0.0
    history, seconds = load_checkpoint(out, state.model, state.optimizer, state.ema, state.best)
    if is_main:
        write_log(out, history)
    return history, seconds


def _keep(state: _TrainingState, best: int | None, config: FitConfig) -> tuple[int, dict[str, Tensor]]:
    """Load the weights that ``config.checkpoint`` chooses: (their epoch, the weights)."""
    kept, weights = config.epochs, state.validated_weights()
    if best is not None and config.checkpoint == "best":
        kept, weights = best, state.best
    state.model.load_state_dict(weights)
    state.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as a loaded model is
    return kept, weights


def _warn_of_collapse(history: Sequence[dict[str, Any]], out: Path | None) -> None:
    fallen = collapse(history)
    if fallen is not None:
        warnings.warn(f"{out.name}: {fallen}" if out else fallen, CollapseWarning, stacklevel=3)


def _in_words(line: dict[str, Any]) -> str:
    """An epoch's log line, for a progress display."""
    text = f"epoch {line['epoch']}, loss {line['loss']:.4g}"
    if line["val"] is not None:
        text += f", validation {line['val']:.1%}"
    return text + (f", robust {line['val_robust']:.1%}" if "val_robust" in line else "")


@contextmanager
def _own_torch_state(device: torch.device) -> Iterator[None]:
    """Gradients enabled, whatever mode the caller is in, and torch's generators of the CPU and this device restored."""
    on_cpu = device.type == "cpu"
    random = torch.random.fork_rng(devices=[] if on_cpu else [device], device_type="cuda" if on_cpu else device.type)
    with torch.inference_mode(False), torch.enable_grad(), random:
        yield


def _seed_all(seed: int, device: torch.device) -> None:
    """Seed these two generators and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _epoch(
    epoch: int, state: _TrainingState, train: Data, objective: Schedule, config: FitConfig
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One pass over the data; every random number depends on (seed, epoch) only.

    Returns, without synchronising: (steps,) mean losses; and for each step of the optimiser its samples' losses and
    their numbers.
    """
    accelerator, optimizer = state.accelerator, state.optimizer
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    _seed_all(config.seed * 1_000_003 + epoch, device)  # for dropout and the like
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    batches = torch.randperm(len(train), generator=rng).to(device).split(config.batch_size)
    means: list[Tensor] = []
    losses: list[Tensor] = []
    indices: list[Tensor] = []
    for step, (batch, x) in enumerate(zip(batches, _read_ahead(train, batches), strict=True)):
        fraction = (epoch + step / len(batches)) / config.epochs
        for group in optimizer.param_groups:
            group["lr"] = config.lr * SCHEDULES[config.schedule](fraction)
        y = train.y[batch]
        if config.pad or config.flip:
            x = augment(x, rng, pad=config.pad, flip=config.flip)
        own = slice(rank, None, world)
        x, y, index = x[own], y[own], train.index[batch][own]
        problem, noise = objective(fraction), Noise(config.seed, index).fold(epoch)
        attacked, perturbed, parallel = _with_noise(state, config.noise_sigma, x, noise)
        with fast_input_gradients(device):
            x_adv = problem.perturb(attacked, x, y, noise)
        for replay in range(problem.replays):
            if problem.replays > 1:  # its gradient comes with the weights'
                x_adv = x_adv.detach().requires_grad_()
            with problem.weight_context(perturbed, x, x_adv, y):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = problem.loss(parallel, x, x_adv, y)
                mean = loss.sum() * world / len(batch)  # gradients are averaged over processes: the batch's mean
                if config.l1:
                    mean = mean + config.l1 * sum(p.abs().sum() for p in _decayed(state.model))
                optimizer.zero_grad()
                mean.backward()  # bf16 needs no loss scaling
            optimizer.step()
            if state.ema:
                _update_ema(state.ema, state.model, config.ema)
            means.append(mean.detach())
            losses.append(loss.detach())
            indices.append(index)
            if replay + 1 < problem.replays and x_adv.grad is not None:
                x_adv = problem.advance(x_adv.detach(), x_adv.grad, x)
    stacked = torch.stack(means)
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32)), losses, indices  # bf16 is too coarse to log


def _read_ahead(train: Data, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The images of each batch; those in a file are read while the network is at the batch before."""
    if not is_mapped(train.x):
        yield from (train.pixels(batch) for batch in batches)
        return
    on_cpu = [batch.cpu() for batch in batches]
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(take, train.x, on_cpu[0])
        for batch in [*on_cpu[1:], None]:
            x = ahead.result()
            if batch is not None:
                ahead = reader.submit(take, train.x, batch)
            yield pixels(x.to(train.y.device))


def _validated(
    state: _TrainingState, train: Data, val: Data, val_threat: Threat | None, config: FitConfig
) -> dict[str, Any]:
    """What validation says of the weights that are saved."""
    with averaged_weights(state.model, state.ema):
        if config.precise_batch_norm:
            measure_batch_norm(state.model, train, config.batch_size, state.ema)
        return validate(state.model, val, val_threat, config.seed)


def _with_noise(state: _TrainingState, sigma: float, x: Tensor, noise: Noise) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The attacked, the plain and the parallel model, as they see this batch: with noise where sigma > 0."""
    models = state.attacked_model, state.model, state.parallel_model
    if not sigma:
        return models
    added = sigma * noise.fold(TrainingStream.AUGMENTATION).gaussian(tuple(x.shape[1:]))
    attacked, plain, parallel = (WithNoise(model, added) for model in models)
    return attacked, plain, parallel


def _update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            ema[name].lerp_(tensor, 1 - decay)
        else:
            ema[name].copy_(tensor)


def _decayed(model: nn.Module) -> list[Tensor]:
    """The weights of matrices and kernels, which decay; not biases, norms, centers and variances."""
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and not name.endswith(("centers", "log_variances"))
    ]


def _optimizer(model: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    decayed = _decayed(model)
    kept = set(map(id, decayed))
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in kept], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    nesterov = config.optimizer == "sgd" and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
