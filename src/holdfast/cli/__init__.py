"""The command line: it parses, calls, prints. No logic lives here."""

from __future__ import annotations

# Importing a command's file registers it; --help lists commands in this order.
# isort: off
from . import compare, recipe  # noqa: F401
from . import train, evaluate, export  # noqa: F401
from . import explain, bracket, smooth, targeted, curves, report, replay, list_names, doctor  # noqa: F401
from .app import app, main

# isort: on

__all__ = ["app", "main"]
