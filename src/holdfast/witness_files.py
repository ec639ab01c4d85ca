"""Adversarial examples that do not fit in memory: a file of their own per network, beside witnesses.safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError
from .io import RESTORE, content_hash
from .mapped import create, flush, opened, put, rows_at_a_time, take


def witnesses_file(folder: Path, number: int) -> Path:
    """Where the adversarial examples of a network are if they are not in witnesses.safetensors."""
    return folder / f"witnesses-{number}.npy"


def save_apart(x_adv: Tensor, broken: Tensor, path: Path) -> str:
    """Write adversarial examples to a file of their own, whole or not at all.

    Args:
        x_adv: (N, C, H, W).
        broken: (N,) bool, which of them are written.
        path: the file.

    Returns:
        A hash of what was written.

    Raises:
        UserError: the file cannot be written.
    """
    rows, scratch = torch.nonzero(broken)[:, 0], path.with_name(f".{path.name}.tmp")
    kept = create(scratch, (len(rows), *x_adv.shape[1:]), x_adv.dtype)
    for some in torch.arange(len(rows)).split(rows_at_a_time(x_adv)):
        put(kept, some, take(x_adv, rows[some]), torch.ones_like(some, dtype=torch.bool))
    flush(kept)
    os.replace(scratch, path)
    return content_hash(kept)


def open_apart(path: Path, digest: str) -> Tensor:
    """Adversarial examples in a file of their own, mapped.

    Args:
        path: the file.
        digest: as ``save_apart`` returned it.

    Raises:
        UserError: the file cannot be read, or is not what its hash says.
    """
    try:
        x_adv = opened(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). {RESTORE}") from error
    if content_hash(x_adv) != digest:
        raise UserError(f"{path} is damaged: its checksum does not fit its content. {RESTORE}")
    return x_adv
