"""Atomic file writes, and tensors in safetensors files with a typed, versioned header."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .user_input import path as checked_path

if TYPE_CHECKING:
    from torch import Tensor


def write_atomic(path: Path, content: str | bytes) -> Path:
    """Write a file completely or not at all: to a temporary file beside it, then by a rename.

    Args:
        path: file to write; missing folders are created.
        content: text (written as UTF-8) or bytes.

    Returns:
        ``path``.

    Raises:
        UserError: the file could not be written. An older file at ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"could not write {path}: {error.strerror or error}. A file that was there before is unchanged."
        ) from error
    return path


def existing_file(path: str | Path) -> Path:
    """Resolve the path of a file.

    Args:
        path: absolute, or relative to the working directory.

    Returns:
        The absolute path.

    Raises:
        UserError: there is no such file, or the text is no path.
    """
    found = checked_path("the file", path)
    if not found.is_file():
        raise UserError(f"there is no file at {path}.")
    return found.resolve()


def save_tensors(path: Path, kind: str, version: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and metadata to one safetensors file, atomically.

    Args:
        path: file to write.
        kind: what the file is, such as "checkpoint"; ``load_tensors`` refuses another kind.
        version: format version of this kind.
        tensors: by name, on any device; views and graphs are written as plain values.
        metadata: anything JSON can hold.

    Raises:
        UserError: the file could not be written. An older file at ``path`` is unchanged.
    """
    import safetensors.torch  # imported here so that results and the report load without torch

    header = {"holdfast": kind, "version": str(version), "about": json.dumps(metadata)}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(plain, header))


def load_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that ``save_tensors`` wrote.

    Args:
        path: file to read.
        kind: the kind that it must have.
        version: the format version that it must have.

    Returns:
        (tensors by name, metadata). The tensors do not refer to the file and may be changed.

    Raises:
        UserError: the file is missing, truncated, or of another kind or version.
    """
    import safetensors.torch

    if not path.is_file():
        raise UserError(f"there is no {kind} at {path}.")
    try:
        content = path.read_bytes()  # read once: a writer may replace the file at any moment
        tensors = safetensors.torch.load(content)
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size]).get("__metadata__", {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). It is cut short or damaged: delete it to start over."
        ) from None
    if header.get("holdfast") != kind:
        raise UserError(f"{path} is not a holdfast {kind} (its header says {header.get('holdfast')!r}).")
    if header.get("version") != str(version):
        raise UserError(
            f"{path} is a {kind} of version {header.get('version')}; this holdfast reads version {version}. "
            "Use the holdfast that wrote it, or start over in a new folder."
        )
    try:
        return tensors, json.loads(header["about"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). It is damaged: delete it to start over.") from None
