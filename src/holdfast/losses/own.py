"""A user's own loss: ``mine.py:hinge``, a function (out, y) -> (N,), or a LossEntry with its score and head."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError, type_of
from ..importers.python_code import importing_from, load_name, source_hash, user_code_errors
from ..io import existing_file
from .entry import LossEntry
from .scores import negative_margin
from .types import Loss


class OwnLoss:
    """A user's loss: its errors name file and line, and its identity is its code.

    Args:
        function: (out, y, **settings) -> (N,).
        score: what attacks maximise.
        reference: file.py:name.
        path: the file.
        code: hash of the file and of what it imports.
    """

    def __init__(self, function: Loss, score: Loss, reference: str, path: Path, code: str) -> None:
        functools.update_wrapper(self, function, assigned=("__doc__",))  # its signature is the function's
        self.function, self.score, self.reference, self.path, self.code = function, score, reference, path, code
        self.__module__, self.__name__, self.__qualname__ = path.name, reference, f"{reference} {code}"

    def __call__(self, out: Any, y: Any, **settings: Any) -> Tensor:
        """The function's answer."""
        with user_code_errors(self.reference, self.path):
            return self.function(out, y, **settings)


def load_own_loss(file: str | Path, name: str) -> LossEntry:
    """The loss that a Python file names. The file is executed: name only what you trust.

    Args:
        file: the file.
        name: a function (out, y, **settings) -> (N,), or a LossEntry. A function alone is trained on the head "linear",
            and attacks maximise the negative margin, which is right for every loss.

    Returns:
        An entry whose loss is an OwnLoss.

    Raises:
        UserError: the file is missing, lacks the name or raises (the message names the line), or names something else.
    """
    path = existing_file(file)
    reference = f"{path.name}:{name}"
    with importing_from(path.parent):
        found = load_name(path, name)
    entry = found if isinstance(found, LossEntry) else LossEntry(found, negative_margin, "linear", reference)
    if isinstance(entry.loss, type) or not callable(entry.loss):
        raise UserError(f"{reference} must be a function (out, y) -> (N,), or a LossEntry, got {type_of(entry.loss)}.")
    return replace(entry, loss=OwnLoss(entry.loss, entry.score, reference, path, source_hash(path)))
