"""What a run keeps: the checkpoint that it resumes from, its log, and the two sets of weights it ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..io import load_tensors, save_tensors, write_atomic

CHECKPOINT, CHECKPOINT_VERSION = "checkpoint", 2  # 2: with the best weights
CHECKPOINT_FILE, LOG_FILE = "checkpoint.safetensors", "log.jsonl"


def save(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: dict[str, Tensor],
    best: dict[str, Tensor],
    history: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Write the checkpoint, all of it in one file, and then the log."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in averaged.items()}
    tensors |= {f"best.{k}": v for k, v in best.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    about = {"history": history, "seconds": seconds}
    save_tensors(out / CHECKPOINT_FILE, CHECKPOINT, CHECKPOINT_VERSION, tensors, about)
    write_log(out, history)


def write_log(out: Path, history: list[dict[str, Any]]) -> None:
    """log.jsonl, a line an epoch. It follows the checkpoint, at a save as at a resume: no line is of a lost epoch."""
    write_atomic(out / LOG_FILE, "".join(json.dumps(line) + "\n" for line in history))


def resume(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: dict[str, Tensor],
    best: dict[str, Tensor],
) -> tuple[list[dict[str, Any]], float]:
    """Put the checkpoint's tensors into all of these; (history, seconds). Raises UserError for another network's."""
    tensors, about = load_tensors(out / CHECKPOINT_FILE, CHECKPOINT, CHECKPOINT_VERSION)

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    try:
        model.load_state_dict(under("model."))
    except RuntimeError as error:
        raise UserError(f"the checkpoint in {out} belongs to another network: {error}") from None
    for name, tensor in under("ema.").items():
        averaged[name].copy_(tensor)
    own = model.state_dict()
    best.update({name: tensor.to(own[name].device) for name, tensor in under("best.").items()})
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


def epochs_kept(out: Path | None) -> int:
    """How many epochs the checkpoint in a run folder holds; 0 where there is none to read."""
    if out is None or not (out / CHECKPOINT_FILE).exists():
        return 0
    try:
        return len(load_tensors(out / CHECKPOINT_FILE, CHECKPOINT, CHECKPOINT_VERSION)[1]["history"])
    except UserError:
        return 0


def finish(out: Path, sides: dict[str, dict[str, Tensor]], epochs: dict[str, int], keep: str, seconds: float) -> None:
    """Write the side that is kept as model.safetensors, the other one as best.safetensors or last.safetensors.

    model.safetensors comes last: with it the run is done.
    """
    for side in sorted(sides, key=lambda side: side == keep):
        path = out / f"{'model' if side == keep else side}.safetensors"
        save_tensors(path, "model", 1, sides[side], {"seconds": seconds, "epoch": epochs[side]})
