"""The run folder: config.json, env.json, log.jsonl, checkpoint.safetensors, and model.safetensors once finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .environment import environment
from .errors import UserError
from .importers.model_file import ModelSource, open_model
from .io import load_tensors, write_atomic

MODEL_FILE = "model_file"  # the key of config.json that holds the ModelSource of a user's own model


def check_device(device: str) -> None:
    """Raise UserError unless a tensor can be made on this device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device '{device}' cannot be used here: {reason} Try --device cpu.") from None


def folder_name(loss: str, seed: int, fold: int) -> str:
    """The folder of one network, in characters that every file system accepts.

    >>> folder_name("isce:s=10@cosine", 0, 2)
    'isce_s=10_cosine-seed0-fold2'
    """
    plain = "".join(c if c.isalnum() or c in "._-=" else "_" for c in loss)
    return f"{plain}-seed{seed}-fold{fold}"


def reserve(out: str | Path, config: dict[str, Any], *, write: bool = True) -> None:
    """Make ``out`` the folder of this configuration, or refuse it if it belongs to another one.

    Args:
        out: the folder; it is created where it does not exist.
        config: what config.json holds; values that JSON can hold.
        write: whether to write config.json and env.json where they are missing; if False, only check.

    Raises:
        UserError: config.json is there and differs, or cannot be read or written.
    """
    out = Path(out)
    path = out / "config.json"
    if path.exists():
        there = read_json(path)
        differs = sorted(key for key in {*there, *config} if there.get(key) != json.loads(json.dumps(config.get(key))))
        if differs:
            raise UserError(
                f"{out} holds a run with another configuration (they differ in {', '.join(differs)}). "
                "Name another folder, or delete this one."
            )
    elif write:
        # config.json last: with it the folder is reserved.
        write_atomic(out / "env.json", json.dumps(environment(), indent=1))
        write_atomic(path, json.dumps(config, indent=1))


def load(folder: str | Path, *, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The network in a run folder, and its configuration.

    The folder is one that ``fit`` wrote with ``about["model"]``, the arguments of ``models.build``; or one that an
    evaluation of a user's own model wrote: then that model is opened again.

    Args:
        folder: the run folder.
        device: where the model goes.

    Returns:
        (model in eval mode, the contents of config.json).

    Raises:
        UserError: the folder is missing, unfinished, or not a run folder; or the device cannot be used.
    """
    check_device(device)
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json.")
    config = read_json(path)
    if MODEL_FILE in config:
        return open_model(ModelSource(**config[MODEL_FILE]), device), config
    if not (folder / "model.safetensors").exists():
        raise UserError(f"the run in {folder} is not finished: rerun the command that started it; it resumes.")
    if "model" not in config:
        raise UserError(
            f"{path} does not say how the model is built (no key 'model'): build it and load the weights yourself."
        )
    model = models.build(**config["model"])
    tensors, _ = load_tensors(folder / "model.safetensors", "model", 1)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit the network that {path} describes: {error}") from None
    model.logit_scale = config.get("logit_scale", 1.0)
    return model.to(device).eval(), config


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file of a run folder. Raises UserError when it cannot be read."""
    path = Path(path)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete the folder {path.parent} and start again.") from None
    return content


def weights_hash(model: nn.Module) -> str:
    """A short hash of all weights, buffers and the logit scale: it says which network a cached file belongs to."""
    return _hash(model.state_dict(), getattr(model, "logit_scale", 1.0))


def stored_weights_hash(folder: str | Path) -> str:
    """``weights_hash`` of the network in a finished run folder, read from its files: no model is built.

    Raises:
        UserError: config.json or model.safetensors is missing or damaged.
    """
    folder = Path(folder)
    tensors, _ = load_tensors(folder / "model.safetensors", "model", 1)
    return _hash(tensors, read_json(folder / "config.json").get("logit_scale", 1.0))


def _hash(tensors: Mapping[str, Tensor], logit_scale: object) -> str:
    mark = hashlib.blake2b(str(logit_scale).encode(), digest_size=8)
    for name in sorted(tensors):
        mark.update(name.encode())
        mark.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()
