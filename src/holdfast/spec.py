"""The mini-language of the command line: names with settings, lists of them, numbers, augmentations, file names."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

from .errors import UserError, printable, unknown
from .io import existing_file
from .user_input import read_number
from .user_input import text as checked_text


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``name:key=value,key=value``; values are numbers (fractions too), true/false, or words.

    Args:
        text: one spec; spaces around its parts do not matter, the name is read in any case.

    Returns:
        (name in lower case, settings).

    Raises:
        UserError: a part is not key=value, a key is given twice, or nothing follows the colon.

    >>> parse("pgd:steps=100,step_size=1/4,iterate=last")
    ('pgd', {'steps': 100, 'step_size': 0.25, 'iterate': 'last'})
    """
    name, colon, rest = checked_text("a spec", text).strip().partition(":")
    settings: dict[str, Any] = {}
    if colon and not rest.strip(" ,"):
        raise UserError(f"'{text}' has no settings after its colon: leave it out, or write name:key=value.")
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"cannot read '{part}' in '{text}': expected name:key=value,key=value, such as isce:s=10.")
        if key.strip() in settings:
            raise UserError(f"'{text}' gives {key.strip()} twice: give it once.")
        settings[key.strip()] = value_of(value.strip())
    return name.strip().lower(), settings


def value_of(text: str) -> Any:
    """A number (fractions too), true or false, or the word itself.

    >>> value_of("1/4"), value_of("true"), value_of("last")
    (0.25, True, 'last')
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = read_number(text)
    if number is not None:
        return number
    try:  # nan, inf and 1e999 are numbers that whoever takes them refuses
        return text if "_" in text else float(text)
    except ValueError:
        return text


def split(text: str) -> list[str]:
    """Split a list of specs: a comma begins a new one unless what follows is a setting (key=value).

    Braces hold values that are tried in turn, one spec for each; two pairs of braces give every combination.

    Args:
        text: specs with commas between.

    Returns:
        The specs, each with its own settings.

    Raises:
        UserError: there is no spec in the text, or braces that do not close or hold nothing.

    >>> split("sce,isce:s=10,cosface:m=0.2,scale=15,mmc")
    ['sce', 'isce:s=10', 'cosface:m=0.2,scale=15', 'mmc']
    >>> split("isce:s={1,10},cosface:m={0.1,0.2},scale=15")
    ['isce:s=1', 'isce:s=10', 'cosface:m=0.1,scale=15', 'cosface:m=0.2,scale=15']
    """
    specs: list[str] = []
    for part in filter(None, (piece.strip() for piece in re.split(r",(?![^{}]*\})", text))):
        is_setting = "=" in part and ":" not in part.partition("=")[0] and "@" not in part.partition("=")[0]
        if is_setting and specs:
            specs[-1] += "," + part
        else:
            specs.append(part)
    if not specs:
        raise UserError(f"no names in '{text}': expected at least one, such as sce,isce:s=10.")
    return [one for spec in specs for one in _each_of(spec)]


MOST_SPECS = 1000  # of one text with braces: more is a slip


def _each_of(spec: str) -> list[str]:
    """A spec for each combination of the values in its braces."""
    pieces = re.split(r"\{([^{}]*)\}", spec)  # text, values, text, values, ..., text
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise UserError(f"the braces in '{spec}' do not close: write values as isce:s={{1,10,100}}.")
    values = [[value.strip() for value in piece.split(",")] for piece in pieces[1::2]]
    if any(not value for choice in values for value in choice):
        raise UserError(f"a value is missing in the braces of '{spec}': write them as isce:s={{1,10,100}}.")
    if math.prod(map(len, values)) > MOST_SPECS:
        raise UserError(f"'{spec}' names {math.prod(map(len, values)):,} specs, more than {MOST_SPECS:,}.")
    return [
        "".join(itertools.chain(*zip(pieces[::2], (*chosen, ""), strict=True))) for chosen in itertools.product(*values)
    ]


def accepts(kind: str, name: str, function: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Check settings against a function's keyword arguments.

    Args:
        kind: what the function is, for the error: "loss", "head", ...
        name: its name, for the error.
        function: its keyword arguments with defaults are the legal settings.
        settings: key -> value.

    Raises:
        UserError: a setting that the function does not take, or a value of another type than the default's.
    """
    known = {key: p for key, p in inspect.signature(function).parameters.items() if _writable(p)}
    for key, value in settings.items():
        if key not in known:
            raise unknown(f"setting of {kind} '{name}'", key, known or ["(none)"])
        default = known[key].default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{key} of {kind} '{name}' must be true or false, got '{value}'.")
        numbers = isinstance(default, (int, float)) and not isinstance(default, bool)
        if numbers and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{key} of {kind} '{name}' must be a number, got '{value}'.")
        if isinstance(default, int) and not isinstance(default, bool) and not isinstance(value, int):
            raise UserError(f"{key} of {kind} '{name}' must be a whole number, got {value}.")


def _writable(parameter: inspect.Parameter) -> bool:
    """Whether a user can write it as key=value: it has a default and is not a loss function."""
    return parameter.default is not parameter.empty and "Loss" not in str(parameter.annotation)


def augmentation(text: str | None) -> dict[str, Any]:
    """The settings of FitConfig for ``none``, ``crop:PAD``, ``crop:PAD+flip``, ``noise:SIGMA``, or crop and noise.

    Args:
        text: one of these forms; None sets nothing.

    Returns:
        {"pad": int, "flip": bool, "noise_sigma": float}, or an empty dict for None.

    Raises:
        UserError: any other text.

    >>> augmentation("crop:4+flip+noise:0.25")
    {'pad': 4, 'flip': True, 'noise_sigma': 0.25}
    >>> augmentation("none")
    {'pad': 0, 'flip': False, 'noise_sigma': 0.0}
    """
    if text is None:
        return {}
    form = re.fullmatch(r"none|(?:crop:([0-9]{1,6})(\+flip)?)?(?:(?(1)\+)noise:([^+\s]+))?", text)
    sigma = read_number(form[3]) if form and form[3] else 0.0
    if not text or form is None or sigma is None:
        raise UserError(
            f"cannot read the augmentation '{text}': expected none, crop:PAD, crop:PAD+flip, noise:SIGMA or "
            "crop:PAD+flip+noise:SIGMA."
        )
    return {"pad": int(form[1] or 0), "flip": bool(form[2]), "noise_sigma": float(sigma)}


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Read a list of numbers.

    Args:
        name: the option's name, for the error.
        text: numbers with commas (or colons) between.

    Returns:
        The numbers; none for an empty text.

    Raises:
        UserError: a part is not a number.

    >>> numbers("mean", "0.5,0.25")
    (0.5, 0.25)
    """
    values = [read_number(part.strip()) for part in text.replace(":", ",").split(",") if part.strip()]
    if None in values:
        raise UserError(f"cannot read --{name} '{text}': expected numbers with commas between, such as 0,255.")
    return tuple(float(value) for value in values if value is not None)


def share(name: str, text: str) -> float:
    """Read a share: a percentage, or a number below 1.

    Args:
        name: the option's name, for the error.
        text: such as 1%, 0.5% or 0.01.

    Returns:
        The share, in (0, 1].

    Raises:
        UserError: it is no share. A whole number without % is refused: 1 may mean 1% or all.

    >>> share("precision", "1%"), share("precision", "0.005"), share("precision", "100%")
    (0.01, 0.005, 1.0)
    """
    percent = text.strip().endswith("%")
    value = read_number(text.strip().removesuffix("%"))
    if value is None or not (0 < value <= 100 if percent else 0 < value < 1):
        raise UserError(f"cannot read --{name} '{text}': expected a share of the samples, such as 1% or 0.01.")
    return value / 100 if percent else float(value)


def name_list(option: str, text: str) -> tuple[str, ...]:
    """Read a list of names, such as a network's classes.

    Args:
        option: where it was given, for the error.
        text: names with commas between, or the path of a text file with one name a line.

    Returns:
        The names, without spaces around them; none for an empty text.

    Raises:
        UserError: the file cannot be read as text, or a name is empty.

    >>> name_list("--classes", "cat, dog")
    ('cat', 'dog')
    """
    if not text:
        return ()
    if "," in text:
        names = text.split(",")
    else:
        file = existing_file(text)
        try:
            names = file.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{option} {text} cannot be read as text ({error}): write one name a line.") from None
    names = [checked_text(option, name.strip()) for name in names]
    if not all(names):
        raise UserError(f"{option} has an empty name at place {names.index('')}, counted from 0: give every logit one.")
    return tuple(names)


def threat_file_name(threat: str) -> str:
    """A threat as part of a file's name; a long one keeps its two ends.

    >>> threat_file_name("linf:8/255,l2:1")
    'linf8_255-l21'
    """
    return printable(threat.replace(":", "").replace("/", "_").replace(",", "-"), 80)
