"""What a user writes on a command line, read once: ``isce:s=10``, ``isce:s=2@cosine:scale=10``, ``sce*100``."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from .errors import UserError, unknown
from .heads import HEADS
from .losses import LOSSES, Loss
from .outputs import Outputs


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(name, settings) of ``name:key=value,key=value``; values are numbers (fractions too), true/false, or words.

    >>> parse("pgd:steps=100,step_size=1/4,keep=last")
    ('pgd', {'steps': 100, 'step_size': 0.25, 'keep': 'last'})
    """
    name, _, rest = text.strip().partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"cannot read '{part}' in '{text}': expected name:key=value,key=value, such as isce:s=10.")
        settings[key.strip()] = _value(value.strip())
    return name.strip().lower(), settings


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        return text


def split(text: str) -> list[str]:
    """Several specs in one argument: a comma begins a new one unless what follows is a setting (key=value).

    >>> split("sce,isce:s=10,cosface:m=0.2,scale=15,mmc")
    ['sce', 'isce:s=10', 'cosface:m=0.2,scale=15', 'mmc']
    """
    specs: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        is_setting = "=" in part and ":" not in part.partition("=")[0] and "@" not in part.partition("=")[0]
        if is_setting and specs:
            specs[-1] += "," + part
        else:
            specs.append(part)
    if not specs:
        raise UserError(f"no names in '{text}': expected some, such as sce,isce:s=10.")
    return specs


def accepts(kind: str, name: str, function: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Raise UserError unless the function takes each setting as a keyword, with a value of the default's kind."""
    known = {key: p for key, p in inspect.signature(function).parameters.items() if _writable(p)}
    for key, value in settings.items():
        if key not in known:
            raise unknown(f"setting of {kind} '{name}'", key, known or ["(none)"])
        wanted = known[key].default
        if isinstance(wanted, bool) and not isinstance(value, bool):
            raise UserError(f"{key} of {kind} '{name}' must be true or false, got '{value}'.")
        numbers = isinstance(wanted, (int, float)) and not isinstance(wanted, bool)
        if numbers and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{key} of {kind} '{name}' must be a number, got '{value}'.")
        if isinstance(wanted, int) and not isinstance(wanted, bool) and not isinstance(value, int):
            raise UserError(f"{key} of {kind} '{name}' must be a whole number, got {value}.")


def _writable(parameter: inspect.Parameter) -> bool:
    """Whether a user can write it as key=value: it has a default, and is no function."""
    return parameter.default is not parameter.empty and "Loss" not in str(parameter.annotation)


@dataclass(frozen=True)
class LossChoice:
    """A loss as a user chose it, and the head that it trains with.

    text: as written, the row's name; loss: (out, y) -> (N,); score: what attacks climb; head, head_settings: for
    ``models.build``; logit_scale: what the logits are multiplied by after training; source: of I-SCE's s, where that is
    no number; objective, model: specs of this row's own, or ""; fit: changes to the schedule.
    """

    text: str
    loss: Loss
    score: Loss
    head: str
    head_settings: dict[str, Any] = field(default_factory=dict)
    logit_scale: float = 1.0
    source: str = ""
    objective: str = ""
    model: str = ""
    fit: dict[str, Any] = field(default_factory=dict)


def loss(text: str) -> LossChoice:
    """A loss from ``name:settings`` with, after @, another head than its own: ``isce:s=2@cosine:scale=10``.

    s may name where it comes from (``sources``): ``isce:s=gradient:0.5``, ``isce:s=ibp``. After + come an objective, a
    network, and changes to the schedule, of this row alone: ``isce:s=3+trades:beta=2+wideresnet:depth=16,width=2``,
    ``sce+fit:weight_decay=5e-4``.

    ``sce*100`` trains with sce and multiplies the logits by 100 afterwards. No prediction changes, so no robustness
    does: the honest control for whatever is said of a loss that makes logits large.
    Raises UserError for an unknown loss, head or setting (with the nearest name), a value the loss refuses (s < 0), a
    head that lacks what the loss needs, or a factor that is not a positive number.

    >>> chosen = loss("cosface:m=0.2,scale=15")
    >>> chosen.head, chosen.head_settings
    ('cosine', {'scale': 15})
    >>> loss("isce:s=attack+adversarial:steps=5").source, loss("sce+adversarial:steps=5").objective
    ('attack', 'adversarial:steps=5')
    """
    text, scale = text.strip(), 1.0
    row, *parts = re.split(r"\+(?=[a-zA-Z])", text)
    objective, model, fit = _parts(text, parts)
    trained, times, factor = row.rpartition("*")
    if times:
        value = _value(factor.strip())
        if isinstance(value, (str, bool)) or not 0 < value < math.inf:
            raise UserError(
                f"'{text}' multiplies its logits by '{factor}': expected a positive number, such as sce*100."
            )
        scale = float(value)
    before, _, after = (trained if times else row).partition("@")
    name, settings = parse(before)
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    entry = LOSSES[name]
    source = str(settings.pop("s")) if name == "isce" and isinstance(settings.get("s"), str) else ""
    if source and source.partition(":")[0] not in SOURCE_NAMES:
        raise unknown("source of s", source, [*SOURCE_NAMES, "a number"])
    accepts("loss", name, entry.loss, settings)
    chosen = partial(entry.loss, **settings) if settings else entry.loss
    head, head_settings = parse(after) if after else (entry.head, {})
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    accepts("head", head, HEADS[head], head_settings)
    parameters = inspect.signature(entry.loss).parameters
    if head == "cosine" and "scale" in parameters:  # one scale for both: the loss divides by the head's
        head_settings.setdefault("scale", settings.get("scale", parameters["scale"].default))
        if head_settings["scale"] != settings.get("scale", parameters["scale"].default):
            raise UserError(f"'{text}' gives loss and head two different scales: name it once, in the loss.")
    if head != "cosine" and entry.head == "cosine":
        raise UserError(f"loss '{name}' works on cosines: it needs head 'cosine', got '{head}'.")
    with torch.random.fork_rng(devices=[]):
        probe = HEADS[head](4, 3, **head_settings)(torch.zeros(2, 4))
    answer = chosen(Outputs(*probe), torch.tensor([0, 1]))  # refuses bad values now, not after an hour
    if answer.shape != (2,):
        raise UserError(f"loss '{name}' returned shape {tuple(answer.shape)} for 2 samples: a loss must return (N,).")
    return LossChoice(text, chosen, entry.score, head, head_settings, scale, source, objective, model, fit)


# Of OBJECTIVES and SOURCES, which stand above this file; a test holds them together.
SOURCE_NAMES = (
    "class", "gradient", "gradient-stopped", "lipschitz", "lipschitz-capped", "ibp", "attack", "mix",
)  # fmt: skip
OBJECTIVE_NAMES = ("standard", "adversarial", "fast", "trades", "mart", "interval")


def _parts(text: str, parts: list[str]) -> tuple[str, str, dict[str, Any]]:
    """(objective, model, changes to the schedule) of what stands after the plus signs."""
    objective, model, fit = "", "", {}
    for part in parts:
        name, settings = parse(part)
        if name == "fit":
            fit = settings
        elif name in OBJECTIVE_NAMES and not objective:
            objective = part.strip()
        elif not model and name not in OBJECTIVE_NAMES:
            model = part.strip()
        else:
            raise UserError(f"'{text}' names two objectives or two networks: name one of each.")
    return objective, model, fit
