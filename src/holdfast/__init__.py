"""holdfast: swap your loss, train, and get a robustness number you can defend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data, losses, models, objectives
    from .checks import audit
    from .cli.display import Display
    from .evaluation import evaluate
    from .experiments.compare import compare
    from .experiments.config import Comparison
    from .experiments.pipeline import NetworkResult, evaluate_network
    from .models.ensemble import ensemble
    from .results import load as load_results
    from .threat import Threat
    from .train import FitConfig, fit

__version__ = "0.1.0"

__all__ = [
    "Comparison", "Display", "FitConfig", "NetworkResult", "Threat", "__version__", "audit", "compare", "data",
    "ensemble", "evaluate", "evaluate_network", "fit", "load_results", "losses", "models", "objectives",
]  # fmt: skip

# name -> (module, name in it); imported on first use, so that ``import holdfast`` stays fast and needs no torch.
_LAZY = {
    "Comparison": ("experiments.config", "Comparison"),
    "Display": ("cli.display", "Display"),
    "FitConfig": ("train", "FitConfig"),
    "NetworkResult": ("experiments.pipeline", "NetworkResult"),
    "Threat": ("threat", "Threat"),
    "audit": ("checks", "audit"),
    "compare": ("experiments.compare", "compare"),
    "data": ("data", ""),
    "ensemble": ("models", "ensemble"),
    "evaluate": ("evaluation", "evaluate"),
    "evaluate_network": ("experiments.pipeline", "evaluate_network"),
    "fit": ("train", "fit"),
    "load_results": ("results", "load"),
    "losses": ("losses", ""),
    "models": ("models", ""),
    "objectives": ("objectives", ""),
}
_LAZY |= {name: (name, "") for name in (
    "attacks", "bounds", "bracket", "importers", "region", "report", "results", "run_folder", "smoothing", "targeted",
    "transforms",
)}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'holdfast' has no attribute '{name}'")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(f".{module}", __name__)
    value = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
