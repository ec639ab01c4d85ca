"""Packages that holdfast uses where they are installed, and what to do where one is not or is broken."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from .errors import UserError


def optional_package(name: str, purpose: str, install: str) -> ModuleType:
    """Import a package that is not required.

    Args:
        name: of the package, as it is imported.
        purpose: what needs it, for the error: "the model timm:resnet18".
        install: what pip installs to have it: "'holdfast[timm]'".

    Returns:
        The module.

    Raises:
        UserError: it is not installed, or cannot be imported; the message says what to do.

    >>> optional_package("no_such_package", "an example", "no-such-package")
    Traceback (most recent call last):
    holdfast.errors.UserError: an example needs the package no_such_package: pip install no-such-package.
    """
    if not is_installed(name):
        raise UserError(f"{purpose} needs the package {name}: pip install {install}.")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation fails in any way
        reason = (str(error).splitlines() or [""])[0][:200].rstrip(".")
        about = f"{reason} {getattr(error, 'name', '')}"
        advice = f"Install it again: pip install --force-reinstall {install}."
        if "torchvision" in about:
            advice = "Install the torchvision that belongs to this torch (see pytorch.org)."
        raise UserError(
            f"{purpose} needs the package {name}, which is installed but cannot be imported here "
            f"({type(error).__name__}: {reason}). {advice}"
        ) from error


def is_installed(name: str) -> bool:
    """Whether a top-level package can be found; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was put into sys.modules without a spec
        return True
