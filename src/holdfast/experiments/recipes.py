"""Named experiments: functions that return a Recipe, what is run and which results are expected."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..data import DATASETS, default_folds
from ..errors import UserError, unknown
from ..results import Results, rows
from ..train import FitConfig
from ..user_input import typed
from .config import Comparison

PHOTOGRAPHS = FitConfig(
    epochs=30, optimizer="sgd", lr=0.1, schedule="onecycle", weight_decay=5e-4,
    pad=DATASETS["cifar10"].pad, flip=DATASETS["cifar10"].flip,
)  # fmt: skip
AT = "adversarial:steps=5,ramp=0.3"
FAMILY = (
    "sce", "sce:smoothing=0.1", "isce:s=3", "isce:s=100", "isce_b:tau=10", "isce_c", "contrastive", "triplet", "center",
    "lgm", "mmc", "cosface:m=0.2,scale=15", "arcface",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A named experiment.

    Args:
        about: one line.
        comparison: what is run.
        cost: how long it takes, in words.
        expects: (row, column) -> (low, high), in [0, 1], under the first threat; column is clean, pgd50, robust or
            certified.
        note: what a reader must know.
    """

    about: str
    comparison: Comparison
    cost: str
    expects: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Expectation:
    """One expected result of a recipe beside the measured one.

    Args:
        row: the loss spec.
        column: clean, pgd50, robust or certified.
        low: end of the expected range, in [0, 1].
        high: the other end.
        value: as measured; None if it was not.
    """

    row: str
    column: str
    low: float
    high: float
    value: float | None

    @property
    def holds(self) -> bool:
        """Whether it was measured and lies in the range."""
        return self.value is not None and self.low <= self.value <= self.high


@typed
def compare_to_expected(recipe: Recipe, results: Results) -> list[Expectation]:
    """Each expectation of the recipe beside the measured value, in the recipe's order."""
    table = rows(results)
    measured = {row.loss: row for row in table if row.threat == table[0].threat}
    expectations = []
    for (row, column), (low, high) in recipe.expects.items():
        figure = getattr(measured[row], column) if row in measured else None
        expectations.append(Expectation(row, column, low, high, None if figure is None else figure.value))
    return expectations


def digits() -> Recipe:
    """The main job: seven losses on scikit-learn's digits, 5 folds, linf 0.1."""
    return Recipe(
        about="seven losses on the 1,797 bundled digits, linf 0.1: what `holdfast compare` runs by default",
        comparison=Comparison(fit=fit_for("digits")),
        cost="4 minutes on 2 cores",
        expects={
            ("sce", "clean"): (0.95, 1.0),
            ("isce:s=100", "pgd50"): (0.7, 1.0),
            ("isce:s=100", "robust"): (0.3, 0.7),
        },
    )


def digits_adversarial() -> Recipe:
    """SCE with standard training, adversarial training and interval bounds; digits, one fold, linf 0.1."""
    return Recipe(
        about="SCE with standard training, adversarial training and interval bounds; one fold of the digits, linf 0.1",
        comparison=Comparison(
            losses=("sce", f"sce+{AT}", f"isce:s=3+{AT}", "sce+interval"), folds=1, fit=fit_for("digits")
        ),
        cost="2 minutes on 2 cores",
        expects={
            ("sce", "clean"): (0.93, 1.0),
            (f"sce+{AT}", "robust"): (0.75, 0.92),
            ("sce+interval", "certified"): (0.6, 0.8),
        },
    )


def mnist(data: str = "mnist") -> Recipe:
    """An illusion at full size: SCE against I-SCE with s = 100 on MNIST, linf 0.1."""
    return Recipe(
        about="SCE and I-SCE (s = 3, 10, 100) on MNIST, linf 0.1: a PGD-50 accuracy that is not real",
        comparison=Comparison(data=data, losses=("sce", "isce:s=3", "isce:s=10", "isce:s=100"), fit=fit_for(data)),
        cost="15 minutes on 2 cores",
        expects={("sce", "clean"): (0.98, 1.0), ("isce:s=100", "robust"): (0.0, 0.6)},
    )


def losses(data: str = "digits") -> Recipe:
    """The papers' comparison: every loss with and without adversarial training, two eps, every usual attack."""
    photographs = "cifar" in data.lower()
    cross_validated = default_folds(data) > 1  # one fold is enough for a table of 26 rows
    return Recipe(
        about="every loss with and without adversarial training at two eps: each usual attack, and the worst case",
        comparison=Comparison(
            data=data,
            losses=(*FAMILY, *(f"{loss}+{AT}" for loss in FAMILY)),
            threat="linf:8/255,linf:16/255" if photographs else "linf:0.1,linf:0.2",
            suite="per-attack",
            folds=1 if cross_validated else 0,
            limit=0 if cross_validated else 500,
            limit_train=0 if photographs else 10_000,
            fit=fit_for(data),
        ),
        cost="10 minutes on 2 cores for the digits, 20 to 30 for MNIST, a GPU for CIFAR-10",
    )


def mnist_linf(data: str = "mnist") -> Recipe:
    """MNIST at linf 0.3: adversarial training, and interval bounds for certificates, behind a step on every pixel."""
    attacked = "sce+adversarial:steps=6,ramp=0.3,factor=1.25+stepnet:width=2"
    bounded = "sce+interval+stepnet:slope=3+fit:epochs=30,lr=2e-3"
    return Recipe(
        about="linf 0.3 on MNIST: adversarial training, and training on interval bounds, behind a step on every pixel",
        comparison=Comparison(
            data=data,
            losses=(attacked, bounded),
            threat="linf:0.3",
            fit=FitConfig(epochs=14, lr=4e-3),
        ),
        cost="20 minutes on 2 cores",
        expects={
            (attacked, "clean"): (0.98, 1.0),
            (attacked, "robust"): (0.915, 0.95),
            (bounded, "certified"): (0.83, 0.91),
        },
        note="MNIST's pixels are nearly black or white, and the step exploits that: the data helps, not a loss.",
    )


def mnist_fast(data: str = "mnist") -> Recipe:
    """MNIST at linf 0.3 in minutes: adversarial training with two steps, behind a step on every pixel."""
    row = "sce+adversarial:steps=2,ramp=0.3,factor=1.25"
    return Recipe(
        about="linf 0.3 on MNIST in minutes: adversarial training with two steps, behind a step on every pixel",
        comparison=Comparison(
            data=data,
            losses=(row,),
            threat="linf:0.3",
            model="stepnet:width=2",
            limit=500,
            fit=FitConfig(epochs=8, lr=4e-3, schedule="onecycle", checkpoint="best"),
        ),
        cost="3 minutes of training and 2 of attacks on 2 cores",
        expects={(row, "clean"): (0.98, 1.0), (row, "robust"): (0.905, 0.96)},
        note="MNIST's pixels are nearly black or white, and the step exploits that: the data helps, not a loss.",
    )


def mnist_certified(data: str = "mnist") -> Recipe:
    """MNIST at linf 0.3: the record's network for certificates, trained on interval bounds."""
    row = "sce+interval:kappa=0,ramp=0.5"
    return Recipe(
        about="linf 0.3 certified on MNIST: interval bounds behind a step on every pixel, 80 epochs",
        comparison=Comparison(
            data=data,
            losses=(row,),
            threat="linf:0.3",
            model="stepnet:slope=3,width=2",
            fit=FitConfig(epochs=80, batch_size=256, lr=4e-3, schedule="onecycle"),
        ),
        cost="40 minutes on 2 cores",
        expects={(row, "clean"): (0.97, 0.99), (row, "certified"): (0.87, 0.93)},
        note="MNIST's pixels are nearly black or white, and the step exploits that: the data helps, not a loss.",
    )


def cifar10_certified(data: str = "cifar10") -> Recipe:
    """CIFAR-10 at linf 2/255: interval bounds beside an attack, proofs by lines on all layers."""
    row = "sce+interval:kappa=0.9,ramp=0.4,warmup=0.05,steps=2"
    return Recipe(
        about="linf 2/255 certified on CIFAR-10: a small network, interval bounds beside an attack, proofs by crown",
        comparison=Comparison(
            data=data,
            losses=(row,),
            threat="linf:2/255",
            model="convnet:width=2",
            limit=500,
            proofs="crown",
            fit=FitConfig(
                epochs=40, batch_size=256, lr=3e-3, schedule="onecycle", ema=0.99, pad=2, flip=True, init="interval"
            ),
        ),
        cost="45 minutes on 2 cores",
        expects={(row, "clean"): (0.57, 0.68), (row, "certified"): (0.43, 0.56)},
        note="The figures that were measured are of CIFAR-10 as JPEG.",
    )


def mnist_l2(data: str = "mnist") -> Recipe:
    """Certified under l2 1.58: s from the Lipschitz constant of an orthogonal network, MNIST."""
    row = "isce:s=lipschitz:1.5@orthogonal:scale=10"
    return Recipe(
        about="l2 1.58 certified on MNIST: an orthogonal MLP, I-SCE with s from its Lipschitz constant",
        comparison=Comparison(
            data=data,
            losses=(row,),
            threat="l2:1.58",
            model="lipmlp:width=512",
            fit=FitConfig(epochs=25, batch_size=256, lr=5e-3),
        ),
        cost="10 minutes on 2 cores",
        expects={(row, "clean"): (0.955, 0.985), (row, "certified"): (0.63, 0.70)},
    )


def cifar10(data: str = "cifar10") -> Recipe:
    """PreActResNet-18 on CIFAR-10, linf 8/255, adversarial training in one cycle: minutes on a large GPU."""
    return Recipe(
        about="PreActResNet-18 on CIFAR-10, linf 8/255: 20 epochs of PGD-3 in one cycle, averaged weights, bf16",
        comparison=Comparison(
            data=data,
            losses=("sce+adversarial:steps=3",),
            threat="linf:8/255",
            model="preactresnet18",
            fit=replace(PHOTOGRAPHS, epochs=20, ema=0.999, precision="bf16", checkpoint="best"),
        ),
        cost="a GPU with bf16",
        note="Full-size results are not available yet. Comparable networks in the literature reach 48 to 50%.",
    )


def cifar10_small(data: str = "cifar10") -> Recipe:
    """SCE and reading C on CIFAR-10 by the narrow network of the record: what two cores can repeat within the hour."""
    return Recipe(
        about="SCE and reading C on CIFAR-10 without adversarial training: a narrow network, linf 0.25/255 and 8/255",
        comparison=Comparison(
            data=data,
            losses=("sce", "isce_c"),
            threat="linf:0.25/255,linf:8/255",
            suite="per-attack",
            model="fastconvnet",
            limit=250,
            fit=FitConfig(
                epochs=12, batch_size=256, lr=5e-3, schedule="onecycle", weight_decay=0.05, ema=0.99, pad=4, flip=True
            ),
        ),
        cost="under an hour on 2 cores",
        expects={
            ("sce", "clean"): (0.78, 0.88),
            ("sce", "robust"): (0.28, 0.50),
            ("isce_c", "clean"): (0.78, 0.88),
            ("isce_c", "robust"): (0.28, 0.50),
        },
        note="The figures that were measured are of CIFAR-10 as JPEG; a network without its artefacts may do better.",
    )


def cifar10_wide(data: str = "cifar10") -> Recipe:
    """WideResNet-34-10 on CIFAR-10, linf 8/255: TRADES, beta 6, PGD-10, 100 epochs."""
    return Recipe(
        about="WideResNet-34-10 on CIFAR-10, linf 8/255: TRADES (beta 6, 10 steps), 100 epochs, best checkpoint",
        comparison=Comparison(
            data=data,
            losses=("sce+trades:beta=6",),
            threat="linf:8/255",
            model="wideresnet:depth=34,width=10",
            fit=replace(PHOTOGRAPHS, epochs=100, schedule="step", precision="bf16", checkpoint="best"),
        ),
        cost="a day on a GPU with bf16",
        note="Full-size results are not available yet. The TRADES network in the literature reaches 53%.",
    )


# name -> function from the data set (default: the recipe's own) to the Recipe
RECIPES: dict[str, Callable[..., Recipe]] = {
    "digits": digits,
    "digits-adversarial": digits_adversarial,
    "losses": losses,
    "mnist": mnist,
    "mnist-linf": mnist_linf,
    "mnist-fast": mnist_fast,
    "mnist-certified": mnist_certified,
    "mnist-l2": mnist_l2,
    "cifar10-small": cifar10_small,
    "cifar10-certified": cifar10_certified,
    "cifar10": cifar10,
    "cifar10-wide": cifar10_wide,
}


@typed
def named(name: str, data: str = "") -> Recipe:
    """The recipe of this name.

    Args:
        name: a key of RECIPES.
        data: another data set than its own: a name or path for ``data.load``.

    Returns:
        The recipe.

    Raises:
        UserError: an unknown name, or data for a recipe that takes none.

    >>> named("losses", "mnist").comparison.limit
    500
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    if data and not inspect.signature(RECIPES[name]).parameters:
        raise UserError(f"recipe '{name}' runs on the bundled digits: it takes no data.")
    return RECIPES[name](data) if data else RECIPES[name]()


@typed
def resized(comparison: Comparison, **changes: object) -> Comparison:
    """The comparison at another size. A row that names its own model or epochs keeps them.

    Args:
        comparison: what to change.
        changes: seeds, limit, limit_train, model, suite, proofs or epochs; None leaves one as it is.

    Returns:
        The changed comparison.

    >>> resized(Comparison(), seeds=3, epochs=1).fit.epochs
    1
    """
    epochs = changes.pop("epochs", None)
    given = {key: value for key, value in changes.items() if value is not None}
    return replace(comparison, **given, fit=override(comparison.fit, epochs=epochs))  # type: ignore[arg-type]


@typed
def fit_for(data: str) -> FitConfig:
    """A training configuration that suits small networks on this data: Adam, or SGD with crops and flips for CIFAR.

    Args:
        data: a name or path for ``data.load``.

    >>> fit_for("digits").epochs, fit_for("mnist").epochs
    (30, 10)
    """
    if default_folds(data) > 1 or data == "moons":
        return FitConfig(epochs=30, batch_size=64, lr=3e-3)
    if "cifar" in data.lower():
        return PHOTOGRAPHS
    return FitConfig(epochs=10, lr=2e-3)


@typed
def override(fit: FitConfig, **changes: object) -> FitConfig:
    """The configuration with those changes that are not None.

    >>> override(FitConfig(), epochs=3, lr=None).epochs
    3
    """
    return replace(fit, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
