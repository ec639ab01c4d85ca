"""Attacks of foolbox and torchattacks as stages: ``foolbox:LinfPGD``, ``torchattacks:PGD:steps=50``."""

from __future__ import annotations

import importlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import ATTACKS, AttackEntry, attack
from ..errors import UserError, unknown
from ..importers.python_code import user_code_errors
from ..noise import Noise
from ..optional_package import optional_package
from ..outputs import Model, as_outputs
from ..spec import parse
from ..threat import Threat

PACKAGES = ("foolbox", "torchattacks")
_L2_BY_NATURE = ("CW", "DeepFool")  # of torchattacks, which names others PGDL2
_TAKES_NORM = {"linf": "Linf", "l2": "L2"}
_GIVEN = ("model", "eps", "norm", "distance")  # arguments of an attack's class that the evaluation gives


class PackageAttackWarning(UserWarning):
    """An attack of another package returned points outside of the threat."""


def is_package_attack(text: str) -> bool:
    """Whether a reference names an attack of another package.

    >>> is_package_attack("foolbox:LinfPGD"), is_package_attack("pgd:steps=5")
    (True, False)
    """
    return text.strip().partition(":")[0] in PACKAGES


def register(text: str) -> tuple[str, str]:
    """Put an attack of another package into ``ATTACKS``.

    Args:
        text: package:Attack, with settings of its class after another colon: ``torchattacks:PGD:steps=50``.

    Returns:
        (its key in ATTACKS, the package with its version).

    Raises:
        UserError: the package is missing or broken, or has no such attack, or the attack has no such setting or needs
            an argument that no text can give.
    """
    package, _, rest = text.strip().partition(":")
    name, _, written = rest.partition(":")
    if not name:
        raise UserError(f"'{text}' alone is not enough: name the attack, such as {package}:PGD.")
    settings = parse(f"attack:{written}")[1] if written else {}
    module = optional_package(package, f"the attack {text}", package)
    known, made, norms = _FINDERS[package](module, name, settings)
    if made is None:
        raise unknown(f"attack of {package}", name, known)
    _check_settings(f"{package}:{name}", made, settings)
    key = text.strip()
    run = _RUNNERS[package](made, settings, key)
    ATTACKS[key] = AttackEntry(attack(_judged(run, key)), f"of the package {package}", norms)
    return key, f"{package} {module.__version__}"


def _foolbox(module: Any, name: str, settings: dict[str, Any]) -> tuple[list[str], Any, tuple[str, ...]]:
    """(the attacks that there are, the one of this name, the norms that it is for)."""
    attacks = importlib.import_module(f"{module.__name__}.attacks")
    classes = {
        key: value
        for key, value in vars(attacks).items()
        if inspect.isclass(value) and issubclass(value, attacks.Attack) and not inspect.isabstract(value)
    }
    made = classes.get(name)
    distance = getattr(made, "distance", None)
    by_p = {0: ("linf", "l2", "l1"), 1: ("l1",), 2: ("l2",), float("inf"): ("linf",)}
    if isinstance(distance, property):  # the mixins name it: L2AdditiveGaussianNoiseAttack
        lower = name.lower()
        named = [norm for norm in ("linf", "l2", "l1") if lower.startswith(norm)]
        return list(classes), made, tuple(named) or ("linf", "l2", "l1")
    if made is not None and "constraint" in inspect.signature(made).parameters:  # HopSkipJumpAttack
        return list(classes), made, (settings.get("constraint", "l2"),)
    return list(classes), made, by_p.get(getattr(distance, "p", 0), ())


def _run_foolbox(made: Any, settings: dict[str, Any], key: str) -> Callable[..., Tensor]:
    def run(model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        foolbox = optional_package("foolbox", key, "foolbox")
        given = dict(settings)
        if "distance" in inspect.signature(made).parameters:
            given["distance"] = getattr(foolbox.distances, threat.norm)
        asked = foolbox.PyTorchModel(_Logits(model, x), bounds=(threat.lo, threat.hi), device=x.device)
        one = made(**given)
        # An l0 attack knows no eps of this threat: its smallest change is projected.
        eps = threat.eps if getattr(getattr(one, "distance", None), "p", 0) else None
        _, clipped, _ = one(asked, x, foolbox.criteria.Misclassification(y), epsilons=eps)
        return clipped

    return run


def _torchattacks(module: Any, name: str, settings: dict[str, Any]) -> tuple[list[str], Any, tuple[str, ...]]:
    """As ``_foolbox``."""
    base = module.attack.Attack
    classes = {key: value for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)}
    made = classes.get(name)
    takes = inspect.signature(made).parameters if made else {}
    if "norm" in takes:
        return list(classes), made, tuple(_TAKES_NORM)
    if name.endswith("L2") or name in _L2_BY_NATURE:
        return list(classes), made, ("l2",)
    return list(classes), made, ("linf",) if "eps" in takes else ("linf", "l2", "l1")


def _run_torchattacks(made: Any, settings: dict[str, Any], key: str) -> Callable[..., Tensor]:
    def run(model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        if (threat.lo, threat.hi) != (0.0, 1.0):
            raise UserError(f"{key} is for pixels in [0, 1], not in [{threat.lo}, {threat.hi}].")
        takes, given = inspect.signature(made).parameters, dict(settings)
        logits = _Logits(model, x)
        if "eps" in takes:
            given["eps"] = threat.eps
        if "norm" in takes:
            given["norm"] = _TAKES_NORM[threat.norm]
        if "seed" in takes:  # some seed torch themselves, by default with the time
            given.setdefault("seed", int(torch.randint(2**31, ())))
        if "n_classes" in takes:
            with torch.no_grad():
                given.setdefault("n_classes", logits(x[:1]).shape[1])
        x_adv: Tensor = made(logits, **given)(x, y)
        return x_adv

    return run


_FINDERS: dict[str, Callable[..., tuple[list[str], Any, tuple[str, ...]]]] = {
    "foolbox": _foolbox, "torchattacks": _torchattacks,
}  # fmt: skip
_RUNNERS = {"foolbox": _run_foolbox, "torchattacks": _run_torchattacks}


class _Logits(nn.Module):
    """A queried model as these packages expect it: a module in eval mode, on a device, from images to logits."""

    def __init__(self, model: Model, x: Tensor) -> None:
        super().__init__()
        self.ask = [model]  # in a list, so that it is no part of this module
        self.device = nn.Parameter(torch.empty(0, device=x.device), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, K)."""
        return as_outputs(self.ask[0](x)).logits


def _check_settings(reference: str, made: Any, settings: dict[str, Any]) -> None:
    """Refuse settings that the attack's class does not take, and a class that needs more than text can give."""
    parameters = inspect.signature(made).parameters
    known = [key for key in parameters if key not in _GIVEN]
    for key in settings:
        if key in _GIVEN:
            raise UserError(f"{key} of the attack '{reference}' is that of the evaluation: leave it out.")
        if key not in known:
            raise unknown(f"setting of attack '{reference}'", key, known or ["(none)"])
    lacks = [key for key in known if parameters[key].default is inspect.Parameter.empty and key not in settings]
    if lacks:
        raise UserError(
            f"the attack '{reference}' needs {', '.join(lacks)}: give numbers and words after a colon; write an attack "
            "of your own, mine.py:step, around one that needs more."
        )


def _judged(run: Callable[..., Tensor], key: str) -> Callable[..., Tensor]:
    """The other package's attack under the contract of ``attack``: its errors, its random numbers, and its ball."""

    def judged(model: Model, x: Tensor, y: Tensor, threat: Threat, *, score: Any = None, noise: Noise) -> Tensor:
        with user_code_errors(key), _seeded(noise, x):
            x_adv = run(model, x, y, threat).detach()
        if x_adv.shape != x.shape:
            raise UserError(f"{key} returned images of shape {tuple(x_adv.shape)} for {tuple(x.shape)}.")
        if bool((threat.violation(x_adv, x) > 0).any()):
            warnings.warn(
                f"{key} returned points outside of {threat}: they are projected into it, which may undo the attack.",
                PackageAttackWarning,
                stacklevel=2,
            )
        return x_adv

    judged.__name__ = key
    return judged


@contextmanager
def _seeded(noise: Noise, x: Tensor) -> Iterator[None]:
    """The generators that these packages draw from, seeded by the samples of the batch and restored afterwards."""
    seed = int(noise.bits(()).sum()) % 2**32
    drawn, state = random.getstate(), np.random.get_state()  # noqa: NPY002  (theirs, not ours)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(state)  # noqa: NPY002
