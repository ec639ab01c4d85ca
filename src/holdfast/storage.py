"""Tensors on disk: one safetensors file with a header that says what it is; whole, or not there at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import UserError
from .results import write_atomic


def save_tensors(path: Path, kind: str, version: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON-able ``about`` atomically: a kill or a full disk leaves the old file as it was."""
    header = {"holdfast": kind, "version": str(version), "about": json.dumps(about)}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(plain, header))


def load_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of a file that ``save_tensors`` wrote.

    Raises UserError when the file is missing, cut short, of another kind, or of another version.
    """
    if not path.is_file():
        raise UserError(f"there is no {kind} at {path}.")
    try:
        whole = path.read_bytes()  # read once: a writer may put a new file in its place at any moment
        tensors = safetensors.torch.load(whole)
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). It is cut short or damaged: delete it to begin again."
        ) from None
    if header.get("holdfast") != kind:
        raise UserError(f"{path} is not a holdfast {kind} (it says {header.get('holdfast')!r}).")
    if header.get("version") != str(version):
        raise UserError(
            f"{path} is a {kind} of version {header.get('version')}; this holdfast reads version {version}. "
            "Use the holdfast that wrote it, or begin in a new folder."
        )
    try:
        return tensors, json.loads(header["about"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). It is damaged: delete it to begin again.") from None
