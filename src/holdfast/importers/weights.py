"""A weights file for a network that Python code built: read safely, unwrapped, and fitted name by name."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import UserError, type_of
from ..io import check_zip, existing_file
from ..outputs import Model

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
CONTAINER_KEYS = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the weights
PREFIXES = ("module.", "model.", "_orig_mod.", "net.")  # what wrappers put before the names of weights


def load_weights(model: Model, path: str) -> list[str]:
    """Load a weights file into a network; every tensor must fit.

    Args:
        model: a torch module, changed in place.
        path: a .safetensors, .pt, .pth, .bin or .ckpt file. Weights nested in a training script's dict, and names
            with a wrapper's prefix, are recognised.

    Returns:
        What was changed to make the weights fit, a sentence each.

    Raises:
        UserError: the file is missing, damaged or holds more than tensors; or the weights do not fit (the message
            names the first difference).
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"weights ({path}) need a torch module, and the code returned {type_of(model)}.")
    expected = model.state_dict()
    tensors, notes = read_weights(path)
    tensors, removed = without_prefix(tensors, expected)
    notes += removed
    tried = f" (tried: {'; '.join(notes)})" if notes else ""
    for key in tensors.keys() & expected.keys():
        if tensors[key].shape != expected[key].shape:
            shapes = f"{tuple(tensors[key].shape)} in the file, {tuple(expected[key].shape)} in the network"
            raise UserError(f"the weights in {path} are of another network: '{key}' has the shape {shapes}{tried}.")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        different = {
            "missing in the file": [key for key in expected if key not in tensors],
            "missing in the network": [key for key in tensors if key not in expected],
        }
        reason = "; ".join(f"{what}: '{keys[0]}' ({len(keys)} in all)" for what, keys in different.items() if keys)
        raise UserError(f"the weights in {path} are of another network: {reason or error}{tried}.") from None
    return notes


def read_weights(path: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a file.

    Args:
        path: as for ``load_weights``.

    Returns:
        (the tensors by name, notes on where they were in it).

    Raises:
        UserError: the file is missing, damaged or holds more than tensors.
    """
    return _unnest(_read(existing_file(path)), path)


def without_prefix(tensors: dict[str, Tensor], expected: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Names without what wrappers put before them, unless the network's own names begin so.

    Args:
        tensors: weights by name.
        expected: the network's own, by name.

    Returns:
        (the same weights, a note for each prefix that was removed).

    >>> without_prefix({"module.weight": torch.zeros(1)}, {"weight": None})
    ({'weight': tensor([0.])}, ["removed the prefix 'module.' from every name"])
    """
    notes: list[str] = []
    for _ in range(len(PREFIXES)):
        prefix = next((p for p in PREFIXES if tensors and all(key.startswith(p) for key in tensors)), None)
        if prefix is None or set(tensors) == set(expected) or all(key.startswith(prefix) for key in expected):
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        notes.append(f"removed the prefix '{prefix}' from every name")
    return tensors, notes


def _read(path: Path) -> Any:
    """The content of a weights file; nothing that could execute code is unpickled."""
    if path.suffix.lower() != ".safetensors":
        check_zip(path, "Restore it from a copy, or write it again with torch.save.")
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        name = re.search(r"GLOBAL ([\w.]+)", reason)
        raise UserError(
            f"{path} holds more than tensors ({name[1] if name else reason[:200]}), and loading pickled objects can "
            "run any code, so holdfast refuses it. If you trust the file, write its tensors to another one: "
            f"import torch, safetensors.torch; m = torch.load('{path}', weights_only=False); safetensors.torch."
            "save_file(m if isinstance(m, dict) else m.state_dict(), 'weights.safetensors')"
        ) from None
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}: {error}). It is cut short, damaged, or of "
            "another kind: expected .safetensors, or .pt, .pth, .bin or .ckpt written by torch.save."
        ) from None


def _unnest(content: Any, path: str) -> tuple[dict[str, Tensor], list[str]]:
    """(the state_dict inside a file's content, notes on where it was)."""
    notes = []
    while isinstance(content, dict):
        key = next((key for key in CONTAINER_KEYS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        content = content[key]
        notes.append(f"took the entry '{key}'")
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} must hold a dict of tensors (a state_dict), it holds {type_of(content)}.")
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{path} must hold a dict of tensors (a state_dict), but '{others[0]}' is {type_of(content[others[0]])}. "
            "Save only the network's state_dict()."
        )
    return content, notes
