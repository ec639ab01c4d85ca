"""What a user writes on a command line, read once: names with settings, lists of them, numbers, augmentations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .errors import UserError, unknown


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(name, settings) of ``name:key=value,key=value``; values are numbers (fractions too), true/false, or words.

    >>> parse("pgd:steps=100,step_size=1/4,iterate=last")
    ('pgd', {'steps': 100, 'step_size': 0.25, 'iterate': 'last'})
    """
    name, _, rest = text.strip().partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"cannot read '{part}' in '{text}': expected name:key=value,key=value, such as isce:s=10.")
        settings[key.strip()] = value_of(value.strip())
    return name.strip().lower(), settings


def value_of(text: str) -> Any:
    """A number (fractions too), true or false, or the word itself.

    >>> value_of("1/4"), value_of("true"), value_of("last")
    (0.25, True, 'last')
    """
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


def augmentation(text: str | None) -> dict[str, Any]:
    """The settings of FitConfig that ``none``, ``crop:PAD`` or ``crop:PAD+flip`` names; none of them for None.

    >>> augmentation("crop:4+flip"), augmentation("none")
    ({'pad': 4, 'flip': True}, {'pad': 0, 'flip': False})
    """
    if text is None:
        return {}
    if text == "none":
        return {"pad": 0, "flip": False}
    crop, _, flip = text.partition("+")
    name, _, pad = crop.partition(":")
    if name != "crop" or not pad.isdigit() or flip not in ("", "flip"):
        raise UserError(f"cannot read the augmentation '{text}': expected none, crop:PAD or crop:PAD+flip.")
    return {"pad": int(pad), "flip": flip == "flip"}


def numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers of an option of this name, with commas (or colons) between.

    >>> numbers("mean", "0.5,0.25")
    (0.5, 0.25)
    """
    try:
        return tuple(float(part) for part in text.replace(":", ",").split(",") if part.strip())
    except ValueError:
        raise UserError(
            f"cannot read --{name} '{text}': expected numbers with commas between, such as 0,255."
        ) from None
