"""Files written whole or not at all; tensors in safetensors files with a header that says what they are."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Writes a file whole or not at all: a neighbour first, then a rename. Raises UserError; an old file then stays."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tmp.open("wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise UserError(f"could not write {path}: {e.strerror or e}. What was there before is as it was.") from e
    return path


def save_tensors(path: Path, kind: str, version: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON-able ``about`` atomically: a kill or a full disk leaves the old file as it was."""
    import safetensors.torch  # here, so that results and the report need no torch

    header = {"holdfast": kind, "version": str(version), "about": json.dumps(about)}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(plain, header))


def load_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of a file that ``save_tensors`` wrote.

    Raises UserError when the file is missing, cut short, of another kind, or of another version.
    """
    import safetensors.torch

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
