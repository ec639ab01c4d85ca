"""Named experiments: functions that return a Recipe, what is run and the numbers it is expected to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .compare import Comparison
from .data import DATASETS, default_folds
from .train import FitConfig


@dataclass(frozen=True)
class Recipe:
    """about: one line; comparison: what is run; minutes: on 2 cores; expects: (loss, column) -> (low, high)."""

    about: str
    comparison: Comparison
    minutes: float
    expects: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)


def digits() -> Recipe:
    """The main job: seven losses on scikit-learn's digits, 5 folds, linf 0.1."""
    return Recipe(
        about="seven losses on 1,797 embedded digits, linf 0.1: what `holdfast compare` runs by default",
        comparison=Comparison(fit=fit_for("digits")),
        minutes=3,
        expects={
            ("sce", "clean"): (0.95, 1.0),
            ("isce:s=100", "published"): (0.7, 1.0),
            ("isce:s=100", "robust"): (0.3, 0.7),
        },
    )


def mnist(data: str = "mnist") -> Recipe:
    """The illusion at full size: SCE against I-SCE with s = 100 on MNIST, linf 0.1."""
    return Recipe(
        about="SCE and I-SCE (s = 3, 10, 100) on MNIST, linf 0.1: a published accuracy that is not there",
        comparison=Comparison(data=data, losses=("sce", "isce:s=3", "isce:s=10", "isce:s=100"), fit=fit_for(data)),
        minutes=15,
        expects={("sce", "clean"): (0.98, 1.0), ("isce:s=100", "robust"): (0.0, 0.6)},
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"digits": digits, "mnist": mnist}


def fit_for(data: str) -> FitConfig:
    """A schedule that fits small networks well: short for the digits, SGD with crops and flips for photographs.

    >>> fit_for("digits").epochs, fit_for("mnist").epochs
    (30, 10)
    """
    if default_folds(data) > 1:
        return FitConfig(epochs=30, batch_size=64, lr=3e-3)
    if "cifar" in data.lower():
        entry = DATASETS["cifar10"]
        return FitConfig(
            epochs=30, optimizer="sgd", lr=0.1, schedule="onecycle", weight_decay=5e-4, pad=entry.pad, flip=entry.flip
        )
    return FitConfig(epochs=10, lr=2e-3)


def override(fit: FitConfig, **changes: object) -> FitConfig:
    """The schedule with those changes that are not None.

    >>> override(FitConfig(), epochs=3, lr=None).epochs
    3
    """
    return replace(fit, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
