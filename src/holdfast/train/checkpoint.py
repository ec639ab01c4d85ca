"""Files of a run folder: the checkpoint that training resumes from, the log, and the final weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Required, TypedDict

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..io import load_tensors, parse_json, save_tensors, understood, write_atomic

CHECKPOINT, CHECKPOINT_VERSION = "checkpoint", 2  # 2: with the best epoch's weights
CHECKPOINT_FILE, LOG_FILE = "checkpoint.safetensors", "log.jsonl"


class LogLine(TypedDict, total=False):
    """A line of the log, as far as others read it."""

    epoch: int
    loss: Required[float]
    val: Required[float | None]
    val_robust: float | None


class _Progress(TypedDict):
    """What the checkpoint holds beside tensors."""

    history: list[LogLine]
    seconds: float


def save_checkpoint(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor],
    best: dict[str, Tensor],
    history: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Write the checkpoint, a single file, and then the log.

    Args:
        out: the run folder.
        model: the network.
        optimizer: its optimizer.
        ema: the averaged weights, empty without averaging.
        best: the weights of the best epoch so far, empty without one.
        history: one log line per epoch.
        seconds: training time so far.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    tensors |= {f"best.{k}": v for k, v in best.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    metadata = {"history": history, "seconds": seconds}
    save_tensors(out / CHECKPOINT_FILE, CHECKPOINT, CHECKPOINT_VERSION, tensors, metadata)
    write_log(out, history)


def write_log(out: Path, history: list[dict[str, Any]]) -> None:
    """Write log.jsonl, one line per epoch. It follows the checkpoint, so that it never holds an epoch that was lost."""
    write_atomic(out / LOG_FILE, "".join(json.dumps(line) + "\n" for line in history))


def read_log(out: Path) -> list[dict[str, Any]]:
    """Read log.jsonl; empty where there is none. Raises UserError for one that cannot be read."""
    path = out / LOG_FILE
    with understood(path):
        return [parse_json(text) for text in path.read_text().splitlines()] if path.exists() else []


def load_checkpoint(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor],
    best: dict[str, Tensor],
) -> tuple[list[dict[str, Any]], float]:
    """Load the checkpoint of a run folder into a model, its optimizer, and the two dicts of weights.

    Args:
        out: the run folder.
        model: changed in place, as are the others.
        optimizer: the model's.
        ema: the averaged weights.
        best: the weights of the best epoch.

    Returns:
        (history, seconds of training).

    Raises:
        UserError: the checkpoint belongs to another network, or cannot be read.
    """
    path = out / CHECKPOINT_FILE
    tensors, metadata = load_tensors(path, CHECKPOINT, CHECKPOINT_VERSION, _Progress)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    try:
        model.load_state_dict(part("model."))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint in {out} belongs to another network: {reason}") from None
    with understood(path):
        for name, tensor in part("ema.").items():
            ema[name].copy_(tensor)
        weights = model.state_dict()
        best.update({name: tensor.to(weights[name].device) for name, tensor in part("best.").items()})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            number, _, key = name.partition(".")
            p = parameters[int(number)]
            if tensor.shape == p.shape:  # in the parameter's memory order, since fused optimizers walk both together
                tensor = torch.empty_like(p, requires_grad=False).copy_(tensor)
            state.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata["history"], metadata["seconds"]


def checkpointed_epochs(out: Path | None) -> int:
    """How many epochs the checkpoint of a run folder holds; 0 where there is none that can be read."""
    if out is None or not (out / CHECKPOINT_FILE).exists():
        return 0
    try:
        return len(load_tensors(out / CHECKPOINT_FILE, CHECKPOINT, CHECKPOINT_VERSION)[1]["history"])
    except UserError:
        return 0


def save_final(out: Path, weights: dict[str, Tensor], epoch: int, seconds: float) -> None:
    """Write the chosen weights as model.safetensors: its existence means that the run is finished.

    Args:
        out: the run folder.
        weights: of the chosen epoch.
        epoch: its number.
        seconds: training time.
    """
    save_tensors(out / "model.safetensors", "model", 1, weights, {"seconds": seconds, "epoch": epoch})
