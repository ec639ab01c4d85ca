"""The command line: parses, calls, prints. No logic lives here."""

from __future__ import annotations

from . import work  # noqa: F401  # each registers its commands; those of work come first in --help

# isort: split
from . import look  # noqa: F401
from .app import app, main

__all__ = ["app", "main"]
