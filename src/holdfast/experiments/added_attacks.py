"""Attacks that a user adds to a suite: ``mine.py:step``, ``foolbox:LinfPGD``, or one of ``ATTACKS``, with settings."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attacks import ATTACKS, AttackEntry, attack
from ..data import Data, pixels
from ..errors import UserError, type_of, unknown
from ..evaluation.suites import Stage
from ..importers.python_code import importing_from, load_name, source_hash, user_code_errors
from ..io import existing_file
from ..losses import negative_margin
from ..noise import Noise
from ..outputs import Model
from ..spec import parse
from ..threat import Threat
from ..user_input import typed
from .package_attacks import is_package_attack, register


@typed
def added_stages(references: Sequence[str]) -> tuple[tuple[Stage, ...], dict[str, str]]:
    """The stages of attacks that come after a suite, on what it left. An attack of a file is put into ``ATTACKS``.

    Args:
        references: ``mine.py:step`` with settings, ``mine.py:step:steps=20``; an attack of foolbox or torchattacks,
            ``torchattacks:PGD:steps=50``; or a key of ATTACKS with settings. A file is executed. It names a function
            (model, x, y, threat, *, score, noise, ...) -> x_adv, or an AttackEntry.

    Returns:
        (the stages; by the name of each stage the hash of its code, or the version of its package, or "" for attacks of
        holdfast).

    Raises:
        UserError: an attack is named twice, an unknown attack or setting, a file that is missing, raises (the message
            names the line) or names something else, a package that is not installed.

    >>> [stage.name for stage in added_stages(["fab:steps=20"])[0]]
    ['fab:steps=20']
    """
    stages: list[Stage] = []
    codes: dict[str, str] = {}
    for text in references:
        own = re.fullmatch(r"(.+\.py)(?::(\w*)(:.*)?)?", text.strip())
        settings: dict[str, Any]
        if is_package_attack(text):
            name, code = register(text)
            label, settings = name, {}
        elif own is None:
            name, settings = parse(text)
            code, label = "", text.strip()
            if name not in ATTACKS:
                raise unknown("attack", name, [*ATTACKS, "mine.py:step", "foolbox:LinfPGD", "torchattacks:PGD"])
        else:
            name, code = _register(own[1], own[2] or "")
            label, settings = f"{name}{own[3] or ''}", parse(f"attack{own[3] or ''}")[1]
        if label in codes:
            raise UserError(f"the attack '{label}' is named twice: name each once.")
        codes[label] = code
        stages.append(Stage(label, name, settings=settings))
    return tuple(stages), codes


def try_stages(stages: Sequence[Stage], codes: dict[str, str], model: Model, data: Data, threat: Threat) -> None:
    """Run the attacks of files and packages on two images, so that one that fails does so before the suite.

    Args:
        stages: as ``added_stages`` returned them.
        codes: what names the code by stage, likewise.
        model: the network under attack.
        data: its images.
        threat: the threat.

    Raises:
        UserError: an attack raises (the message names the line), returns something else than x_adv, or is not defined
            for the norm.
    """
    few = data.take(slice(0, 2))
    for stage in stages:
        entry = ATTACKS[stage.attack]
        if threat.norm not in entry.norms:
            raise UserError(f"the attack '{stage.attack}' is for {', '.join(entry.norms)}, not for {threat.norm}.")
        if codes[stage.name]:
            given = {"score": negative_margin, "noise": Noise(0, few.index), **stage.settings}
            entry.attack(model, pixels(few.x), few.y, threat, **given)


def _register(file: str, name: str) -> tuple[str, str]:
    """Put a file's attack into ATTACKS: (its key, the hash of its code)."""
    if not name:
        raise UserError(f"'{file}' alone is not enough: name the attack in it, such as {file}:step.")
    path = existing_file(file)
    reference = f"{path.name}:{name}"
    with importing_from(path.parent):
        found = load_name(path, name)
    entry = found if isinstance(found, AttackEntry) else AttackEntry(found, reference)
    if isinstance(entry.attack, type) or not callable(entry.attack):
        raise UserError(
            f"{reference} must be a function (model, x, y, threat, *, score, noise) -> x_adv, or an AttackEntry, got "
            f"{type_of(entry.attack)}."
        )
    ATTACKS[reference] = replace(entry, attack=_guarded(entry.attack, reference, path))
    return reference, source_hash(path)


def _guarded(function: Any, reference: str, path: Path) -> Any:
    """The user's attack under the contract of ``attack``; its errors name file and line."""

    @functools.wraps(function)
    def run(*args: Any, **settings: Any) -> Any:
        with user_code_errors(reference, path):
            x_adv = function(*args, **settings)
        if not isinstance(x_adv, Tensor) or x_adv.shape != args[1].shape:
            got = f"a tensor of shape {tuple(x_adv.shape)}" if isinstance(x_adv, Tensor) else type_of(x_adv)
            raise UserError(f"{reference} must return x_adv in the shape of x, {tuple(args[1].shape)}, got {got}.")
        return x_adv

    return attack(run)
