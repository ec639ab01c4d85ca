"""Every name a user can write, with one line on each: what ``holdfast list`` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..attacks import ATTACKS
from ..checks import CHECKS
from ..data import DATASETS
from ..experiments.recipes import RECIPES
from ..information.sources import SOURCES
from ..losses import LOSSES
from ..models import MODELS
from ..models.heads import HEADS
from ..objectives import OBJECTIVES
from ..transforms import CORRUPTIONS


def catalogue() -> dict[str, dict[str, str]]:
    """All names, by kind.

    Returns:
        kind -> name -> one line about it.

    >>> sorted(catalogue())
    ['attacks', 'checks', 'corruptions', 'datasets', 'heads', 'losses', 'models', 'objectives', 'recipes', 'sources']
    """
    return {
        "losses": {name: entry.about for name, entry in LOSSES.items()},
        "heads": _first_lines(HEADS),
        "attacks": {name: entry.about for name, entry in ATTACKS.items()},
        "objectives": _first_lines(OBJECTIVES),
        "sources": {name: about for name, (_, about) in SOURCES.items()},
        "models": _first_lines(MODELS),
        "datasets": {name: entry.about for name, entry in DATASETS.items()},
        "corruptions": {name: entry.about for name, entry in CORRUPTIONS.items()},
        "checks": {check.function.__name__: (check.function.__doc__ or "").splitlines()[0] for check in CHECKS},
        "recipes": {name: recipe().about for name, recipe in RECIPES.items()},
    }


def _first_lines(named: dict[str, Callable[..., Any]]) -> dict[str, str]:
    return {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in named.items()}
