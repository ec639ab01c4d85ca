"""The processes of one fit under torchrun, and the error that the others raise when one is lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from ..errors import UserError
from ..run_folder import check_device
from .checkpoint import checkpointed_epochs

# For a process that hangs; one that is killed closes its connections, which the others notice at once. It must exceed
# whatever one process may do while the others wait: writing a checkpoint to a slow disk.
GROUP_TIMEOUT = timedelta(minutes=15)
_GROUP_ERRORS = ("gloo", "nccl", "connection", "broken pipe", "timed out", "process group", "peer")


def accelerator_on(device: str | None) -> Accelerator:
    """Make the Accelerator of a device, or of the best there is; under torchrun its group has GROUP_TIMEOUT.

    Accelerate keeps the device of the first one for good, and chooses among several GPUs itself: both are undone here,
    so that a fit runs where it was told to. A device for which accelerate has no group of processes gets gloo.

    Args:
        device: "cpu", "cuda", "cuda:1", ... or None. Under torchrun each process has the GPU of its own number.

    Raises:
        UserError: the device cannot be used.
    """
    if device is not None:
        check_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)
    group = InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)
    on_gpu = device is None or torch.device(device).type in ("cuda", "xpu")
    accelerator = Accelerator(cpu=not on_gpu, kwargs_handlers=[group])
    if accelerator.num_processes < int(os.environ.get("WORLD_SIZE", "1")):  # it found no GPU, and made no group
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[group])
    where = accelerator.device if device is None else torch.device(device)
    if accelerator.num_processes == 1 or where.type != accelerator.device.type:
        accelerator.state.device = where
    return accelerator


@contextmanager
def group_errors(processes: int, out: Path | None) -> Iterator[None]:
    """Turn the loss of another process into a UserError that says how to resume.

    The others learn of a loss in one of two ways: the connection closes, or torchrun ends them (SIGTERM).

    Args:
        processes: how many there are; 1 changes nothing.
        out: the run folder, or None.

    Raises:
        UserError: another process was lost.
    """
    if processes == 1:
        yield
        return

    def on_sigterm(number: int, frame: Any) -> None:
        raise UserError(_lost("this process got SIGTERM, which torchrun sends when another one failed", out))

    in_main_thread = threading.current_thread() is threading.main_thread()
    handle = in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if handle:
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    except RuntimeError as error:
        if not _is_group_error(error):
            raise
        raise UserError(_lost(f"another process of this fit was lost ({_first_line(error)})", out)) from None
    finally:
        if handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_group_error(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in _GROUP_ERRORS)


def _first_line(error: RuntimeError) -> str:
    text = str(error).strip().splitlines()[0]
    return text if len(text) <= 160 else text[:159] + "…"


def _lost(what: str, out: Path | None) -> str:
    epochs = checkpointed_epochs(out)
    if out is None:
        return f"{what}. Nothing was saved, since fit was given no folder: start over."
    if not epochs:
        return f"{what}. There is no checkpoint in {out} yet: rerun the same command to start over."
    return f"{what}. The checkpoint in {out} holds {epochs} epochs: rerun the same command to resume."
