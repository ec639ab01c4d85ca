"""A user's own backbone: ``mymodel.py:backbone``, a function of the images' shape. Any head goes on top."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import UserError, type_of
from ..importers.python_code import (
    call_factory,
    importing_from,
    load_name,
    source_hash,
    split_reference,
    user_code_errors,
)
from ..io import existing_file
from ..outputs import frozen_eval
from ..user_input import typed
from .common import Shape


@typed
def is_own(text: str) -> bool:
    """Whether a model's name refers to a user's file.

    >>> [is_own(text) for text in ("nets/mine.py:backbone", "mine.py", "wideresnet:depth=16")]
    [True, True, False]
    """
    return re.search(r"\.py(:|$)", text) is not None


@typed
def own_code_hash(text: str) -> str:
    """``source_hash`` of the user's file that a model's name refers to. The file is executed.

    Args:
        text: path.py:name.

    Returns:
        16 hexadecimal digits.

    Raises:
        UserError: the file is missing, or raises.
    """
    file, name = split_reference(text)
    path = existing_file(file)
    with importing_from(path.parent):
        load_name(path, name)
    return source_hash(path)


def own_backbone(text: str, shape: Shape) -> tuple[nn.Module, int]:
    """Build the backbone that a Python file names. The file is executed: build only what you trust.

    Args:
        text: path.py:name; the name is a function or class that takes the shape (C, H, W) and returns a module from
            (N, C, H, W) to (N, D).
        shape: (C, H, W) of an image.

    Returns:
        (the module, D). D is measured on two images of zeros in eval mode, and must equal the module's ``features``
        where that is a number.

    Raises:
        UserError: the file is missing, lacks the name, or raises (the message names file and line); or what it names
            cannot be called with a shape, returns no module, or the module does not return (N, D) features.
    """
    file, name = split_reference(text)
    if not name:
        raise UserError(f"'{text}' alone is not enough: name what makes the backbone, such as mymodel.py:backbone.")
    path = existing_file(file)
    what = f"{path.name}:{name}"
    with importing_from(path.parent):
        backbone = call_factory(
            load_name(path, name),
            what,
            path,
            shape,
            expected="a function or class that takes the shape (C, H, W) and returns the backbone",
            hint="it is called with one, the shape (C, H, W): write def backbone(shape) around it.",
        )
        if not isinstance(backbone, nn.Module) or isinstance(backbone, type):
            raise UserError(
                f"{what} must return an nn.Module from images to (N, D) features, it returned {type_of(backbone)}."
            )
        with user_code_errors(f"the backbone of {what}", path):
            return measured(backbone, shape, what)


def measured(backbone: nn.Module, shape: Shape, what: str) -> tuple[nn.Module, int]:
    """(a backbone, its number of features), measured on two images of zeros in eval mode.

    Args:
        backbone: images to features.
        shape: (C, H, W) of an image.
        what: how the user named it, for errors.

    Raises:
        UserError: it does not return (N, D) features, or declares another D. Its own errors are passed on.
    """
    with frozen_eval(backbone), torch.no_grad():
        out = backbone(torch.zeros(2, *shape))
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2 or not out.is_floating_point():
        got = f"shape {tuple(out.shape)}, {out.dtype}" if isinstance(out, Tensor) else type_of(out)
        raise UserError(f"the backbone of {what} must return (N, D) features, for two images it returned {got}.")
    declared = getattr(backbone, "features", None)
    if isinstance(declared, int) and declared != out.shape[1]:  # in other people's networks it is often a module
        raise UserError(f"the backbone of {what} has features = {declared}, but returned {out.shape[1]} of them.")
    return backbone, out.shape[1]
