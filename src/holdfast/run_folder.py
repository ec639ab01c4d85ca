"""The run folder: config.json, env.json, log.jsonl, checkpoint.safetensors, and model.safetensors once it is done."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, models
from .errors import UserError
from .importers.model_file import ModelSource, open_model
from .io import load_tensors, write_atomic


def check_device(device: str) -> None:
    """Raise UserError unless a tensor can be made on this device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device '{device}' cannot be used here: {reason} Try --device cpu.") from None


def folder_name(loss: str, seed: int, fold: int) -> str:
    """The folder of one network, in characters that every file system takes.

    >>> folder_name("isce:s=10@cosine", 0, 2)
    'isce_s=10_cosine-seed0-fold2'
    """
    plain = "".join(c if c.isalnum() or c in "._-=" else "_" for c in loss)
    return f"{plain}-seed{seed}-fold{fold}"


def reserve(out: Path, wanted: dict[str, Any], *, write: bool = True) -> None:
    """Write config.json, or refuse a folder that belongs to another configuration."""
    path = out / "config.json"
    if path.exists():
        found = read_json(path)
        differs = sorted(key for key in {*found, *wanted} if found.get(key) != json.loads(json.dumps(wanted.get(key))))
        if differs:
            raise UserError(
                f"{out} holds a run with another configuration (they differ in {', '.join(differs)}). "
                "Name another folder, or delete this one."
            )
    elif write:
        # config.json last: it is what makes the folder this run's.
        write_atomic(out / "env.json", json.dumps(environment(), indent=1))
        write_atomic(path, json.dumps(wanted, indent=1))


def load(folder: Path, *, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """(model, configuration) of a finished run folder whose fit was told ``about["model"]``, what ``build`` takes; or
    of a folder that an evaluation of a user's own model wrote: that model, opened again.

    Raises UserError when the folder is missing, unfinished, or not a run's.
    """
    check_device(device)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.json.")
    config = read_json(path)
    if "foreign" in config:
        return open_model(ModelSource(**config["foreign"]), device), config
    if not (folder / "model.safetensors").exists():
        raise UserError(f"the run in {folder} is not finished: repeat the command that began it, it will resume.")
    if "model" not in config:
        raise UserError(
            f"{path} does not say how its model is built ('model' is missing): build it and load the weights."
        )
    model = models.build(**config["model"])
    tensors, _ = load_tensors(folder / "model.safetensors", "model", 1)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} are not of the network that {path} describes: {error}") from None
    model.logit_scale = config.get("logit_scale", 1.0)
    return model.to(device).eval(), config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run folder. Raises UserError when it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete the folder {path.parent} to begin again.") from None
    return found


def weights_hash(model: nn.Module) -> str:
    """A short hash of all weights and buffers: which network a record belongs to."""
    mark = hashlib.blake2b(str(getattr(model, "logit_scale", 1.0)).encode(), digest_size=8)
    for name, tensor in model.state_dict().items():
        mark.update(name.encode())
        mark.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()


def environment() -> dict[str, Any]:
    """Versions and hardware, as env.json and results.json hold them."""
    cuda = torch.cuda.is_available()
    return {
        "holdfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
