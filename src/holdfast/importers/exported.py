"""A torch.export program (.pt2) as a module that takes any number of images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..io import existing_file
from ..outputs import as_outputs
from .wrapped import Wrapped

TRAINING_FLAG = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}  # position of the argument, per operator


class Chunked(nn.Module):
    """A program that takes ``low`` to ``high`` images per call, for any number of images.

    Images go through in chunks; the last chunk is filled up with copies.

    Args:
        inner: the program.
        low: fewest images per call.
        high: most images per call, None for no limit.
    """

    def __init__(self, inner: nn.Module, low: int, high: int | None) -> None:
        super().__init__()
        self.inner, self.low, self.high = inner, low, high
        self.training = inner.training

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, K) logits."""
        logits = []
        for chunk in x.split(self.high or max(len(x), 1)):
            missing = max(0, self.low - len(chunk))
            full = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing else chunk
            logits.append(as_outputs(self.inner(full)).logits[: len(chunk)])
        return torch.cat(logits)

    train: Callable[..., Any] = Wrapped.train


def load_exported(path: str, device: str | torch.device) -> nn.Module:
    """Load a torch.export program.

    Args:
        path: a .pt2 file.
        device: where the program will run.

    Returns:
        A module that takes any number of images.

    Raises:
        UserError: the file is missing or damaged, takes other than one batch of images, or was exported in training
            mode.
    """
    file = existing_file(path)
    try:
        with _silent_log():  # torch logs the traceback of what is said here
            program = torch.export.load(file)
    except Exception as error:
        raise _unreadable(path, error) from None
    inputs = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    x = values.get(inputs[0]) if len(inputs) == 1 else None
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise UserError(f"{path} has the inputs {', '.join(map(str, inputs))}: expected one, a batch of images.")
    for node in program.graph.nodes:
        position = TRAINING_FLAG.get(str(node.target))
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise UserError(
                f"{path} was exported in training mode ({node.target}), which cannot be undone: call model.eval() "
                "before torch.export.export."
            )
    try:
        if torch.device(device).type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        with _silent_log():
            module = program.module()
    except Exception as error:
        raise _unreadable(path, error) from None
    low, high = _batch_limits(x.shape[0], program)
    return module if (low, high) == (1, None) else Chunked(module, low, high)


def _unreadable(path: str, error: Exception) -> UserError:
    """The error for a file that torch cannot turn into a program."""
    reason = str(error).partition("\n")[0]
    return UserError(
        f"{path} cannot be read as a torch.export program ({type(error).__name__}: {reason}). "
        "It is damaged, of another version of torch, or compiled: write it with "
        "torch.export.save(torch.export.export(model, (x,)), path)."
    )


@contextmanager
def _silent_log() -> Iterator[None]:
    """Log records below this block go nowhere; the level before is restored."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _batch_limits(n: Any, program: Any) -> tuple[int, int | None]:
    """(fewest, most) images per call, most None for no limit; n is the program's own, possibly symbolic, number."""
    if isinstance(n, int):
        return n, n
    bounds = program.range_constraints.get(n.node.expr)
    if bounds is None:
        return 1, None
    high = int(bounds.upper) if bounds.upper < 2**31 else None
    return max(1, int(bounds.lower)), high
