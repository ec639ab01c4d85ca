"""The command line: parses, calls, prints. No logic lives here."""

from __future__ import annotations

from . import look, work  # noqa: F401  # each registers its commands
from .app import app, main

__all__ = ["app", "main"]
