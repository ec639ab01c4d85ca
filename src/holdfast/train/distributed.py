"""The processes of one fit under torchrun, and what is said when one of them is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ..errors import UserError
from .checkpoint import epochs_kept

# A process that is killed closes its connections, which the others notice at once; this is for one that hangs. It must
# outlast whatever one process may do alone: writing a checkpoint to a slow disk.
PATIENCE = timedelta(minutes=15)
_SIGNS = ("gloo", "nccl", "connection", "broken pipe", "timed out", "process group", "peer")


def accelerator_on(device: str | None) -> Accelerator:
    """accelerate on this device, or the best there is; under torchrun with a process group that loses patience."""
    return Accelerator(cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


@contextmanager
def together(processes: int, out: Path | None) -> Iterator[None]:
    """Work that needs all processes: where one is lost, the others raise UserError that says so and how to go on.

    They learn of it in two ways, whichever is first: the connection closes, or torchrun ends them (SIGTERM).
    """
    if processes == 1:
        yield
        return

    def ended(number: int, frame: Any) -> None:
        raise UserError(_lost("this process was told to end (SIGTERM), as torchrun does when another one failed", out))

    free = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if free:
        signal.signal(signal.SIGTERM, ended)
    try:
        yield
    except RuntimeError as error:
        if not _of_the_group(error):
            raise
        raise UserError(_lost(f"another process of this fit was lost ({_first_line(error)})", out)) from None
    finally:
        if free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _of_the_group(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error).lower() for sign in _SIGNS)


def _first_line(error: RuntimeError) -> str:
    text = str(error).strip().splitlines()[0]
    return text if len(text) <= 160 else text[:159] + "…"


def _lost(what: str, out: Path | None) -> str:
    kept = epochs_kept(out)
    if out is None:
        return f"{what}. Nothing was written, as fit was given no folder: begin again."
    if not kept:
        return f"{what}. There is no checkpoint in {out} yet: the same command begins again."
    return f"{what}. The checkpoint in {out} holds all up to epoch {kept}: the same command goes on from there."
