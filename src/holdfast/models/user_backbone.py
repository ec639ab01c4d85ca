"""A user's own backbone: ``mymodel.py:backbone``, a function of the images' shape. Any head goes on top."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, unknown
from ..outputs import frozen_eval
from .common import Shape


def is_own(text: str) -> bool:
    """Whether a model's name names a user's file.

    >>> [is_own(text) for text in ("nets/mine.py:backbone", "mine.py", "wideresnet:depth=16")]
    [True, True, False]
    """
    return re.search(r"\.py(:|$)", text) is not None


def own_backbone(text: str, shape: Shape) -> tuple[nn.Module, int]:
    """(the module that path.py:name makes for images of this shape, its number of features D).

    The file is executed: build what you trust. The module maps (N, C, H, W) to (N, D); D is found by asking it for two
    images of zeros, in eval mode, and must be its ``features`` where it has such a number.

    Raises UserError when the file is missing, lacks the name, or raises (with file and line); when what it names cannot
    be called with a shape, makes no module, or the module does not answer with (N, D) features.
    """
    from ..importers.model_file import (  # here, since it loads all that reads files
        blame,
        executed,
        existing,
        importing_from,
    )

    found = re.fullmatch(r"(.+\.py):(\w+)", text)
    if found is None:
        raise UserError(f"'{text}' is not enough: say what in it makes the backbone, mymodel.py:backbone.")
    path, name = existing(found[1]), found[2]
    what = f"{path.name}:{name}"
    with importing_from(path.parent):
        with blame(f"importing {path.name}", path):
            module = executed(path)
        if not hasattr(module, name):
            public = [key for key, value in vars(module).items() if not key.startswith("_") and callable(value)]
            raise unknown(f"name in {path.name}", name, public)
        make = getattr(module, name)
        _takes_a_shape(make, what)
        with blame(what, path):
            backbone = make(shape)
        if not isinstance(backbone, nn.Module) or isinstance(backbone, type):
            raise UserError(f"{what} must return an nn.Module from images to (N, D) features, got {_kind(backbone)}.")
        with blame(f"the backbone of {what}", path), frozen_eval(backbone), torch.no_grad():
            answer = backbone(torch.zeros(2, *shape))
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != 2 or not answer.is_floating_point():
        got = f"shape {tuple(answer.shape)}, {answer.dtype}" if isinstance(answer, Tensor) else _kind(answer)
        raise UserError(f"the backbone of {what} must return (N, D) features, for two images it returned {got}.")
    said = getattr(backbone, "features", None)
    if isinstance(said, int) and said != answer.shape[1]:  # of others' networks, .features is often a module
        raise UserError(f"the backbone of {what} says features = {said}, and returned {answer.shape[1]} of them.")
    return backbone, answer.shape[1]


def _takes_a_shape(make: Any, what: str) -> None:
    if isinstance(make, nn.Module) or not callable(make):
        raise UserError(
            f"{what} must be a function, or a class, that takes the shape (C, H, W) and returns the backbone; it is "
            f"{_kind(make)}."
        )
    try:
        inspect.signature(make).bind((1, 1, 1))
    except TypeError:
        raise UserError(
            f"{what} has the arguments {inspect.signature(make)}, and is called with one, the shape (C, H, W): write "
            "def backbone(shape) around it."
        ) from None
    except ValueError:  # a builtin without a signature
        return


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
