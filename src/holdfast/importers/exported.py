"""A torch.export program (.pt2) as a module that takes any number of images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..io import check_zip, existing_file
from ..outputs import as_outputs
from .layout import FileNetwork
from .wrapped import Wrapped

TRAINING_FLAG = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}  # position of the argument, per operator


class Exported(FileNetwork):
    """A program that takes ``low`` to ``high`` images per call, for any number of images.

    Images go through in chunks; the last chunk is filled up with copies. Images with one axis more than the program's
    input go through one at a time.

    Args:
        inner: the program.
        input_shape: of its input, None for an open size.
        low: fewest images per call.
        high: most images per call, None for no limit.
    """

    def __init__(self, inner: nn.Module, input_shape: tuple[int | None, ...], low: int, high: int | None) -> None:
        super().__init__()
        self.inner, self.input_shape, self.low, self.high = inner, input_shape, low, high
        self.training = inner.training

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, K) logits."""
        if self.input_shape is not None and x.ndim > len(self.input_shape):
            return torch.cat([_row(self.inner(image)) for image in x])
        logits = []
        for chunk in x.split(self.high or max(len(x), 1)):
            missing = max(0, self.low - len(chunk))
            full = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing else chunk
            answer = self.inner(full)
            logits.append(_row(answer) if len(full) == 1 else as_outputs(answer).logits[: len(chunk)])
        return torch.cat(logits)

    train: Callable[..., Any] = Wrapped.train


def _row(answer: Any) -> Tensor:
    """(1, K) logits of one image, which a program without an axis for the batch answers as (K,)."""
    if isinstance(answer, Tensor) and answer.ndim == 1:
        answer = answer[None]
    return as_outputs(answer).logits


def load_exported(path: str | Path, device: str | torch.device) -> Exported:
    """Load a torch.export program.

    Args:
        path: a .pt2 file.
        device: where the program will run.

    Returns:
        A module that takes any number of images.

    Raises:
        UserError: the file is missing or damaged, takes other than one batch of images, was exported in training mode,
            or holds a program that this torch cannot run.
    """
    file = existing_file(path)
    check_zip(file, "Restore it from a copy, or export it again with torch.export.save.")
    try:
        with _quietly():
            program = torch.export.load(file)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a torch.export program ({_reason(error)}). It is damaged, of another version of "
            "torch, or compiled: write it with torch.export.save(torch.export.export(model, (x,)), path)."
        ) from None
    try:
        with _quietly():
            return _as_module(path, program, device)
    except UserError:
        raise
    except Exception as error:  # a file of another torch, or one that was changed, fails anywhere from here
        raise UserError(
            f"{path} was read, but its program cannot be run ({_reason(error)}). It is damaged, or of another version "
            "of torch: export it again with this one."
        ) from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the traceback that torch logs beside the error that it raises."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _reason(error: Exception) -> str:
    """An error in one line. Where torch refers to what it logged, its kind alone."""
    line = str(error).strip().partition("\n")[0]
    return type(error).__name__ if not line or "warnings above" in line else f"{type(error).__name__}: {line}"


def _as_module(path: str | Path, program: Any, device: str | torch.device) -> Exported:
    """The program on the device, ready for any number of images."""
    inputs = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    x = values.get(inputs[0]) if len(inputs) == 1 else None
    if not isinstance(x, Tensor) or not x.ndim or not x.is_floating_point():
        raise UserError(f"{path} has the inputs {', '.join(map(str, inputs))}: expected one, a batch of float images.")
    for node in program.graph.nodes:
        position = TRAINING_FLAG.get(str(node.target))
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise UserError(
                f"{path} was exported in training mode ({node.target}), which cannot be undone: call model.eval() "
                "before torch.export.export."
            )
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    low, high = _batch_limits(x.shape[0], program)
    shape = tuple(size if isinstance(size, int) else None for size in x.shape)
    return Exported(program.module(), shape, low, high)


def _batch_limits(n: Any, program: Any) -> tuple[int, int | None]:
    """(fewest, most) images per call, most None for no limit; n is the program's own, possibly symbolic, number."""
    if isinstance(n, int):
        return n, n
    bounds = program.range_constraints.get(n.node.expr)
    if bounds is None:
        return 1, None
    high = int(bounds.upper) if bounds.upper < 2**31 else None
    return max(1, int(bounds.lower)), high
