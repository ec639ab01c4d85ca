"""The one way in for what a user writes: numbers, names, paths and their texts, for Python and the command line alike.

Each function takes the argument's name and what arrived, and returns the value or raises a UserError of one sentence.
Nothing is converted that could mean something else: ``True`` is no number, ``"0"`` no seed, ``1.5`` no batch size.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, is_typeddict

from .errors import UserError, plain, printable, type_of

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_TEXT = 10_000  # characters of one argument: a list of several hundred losses
LONGEST_NUMBER = 60  # characters
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, as on Linux
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
LARGEST = 2**63 - 1  # in size, of any whole number: what torch can hold
MOST = 2**53  # the largest whole number: up to here float64 and JSON hold every one


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> float:
    """A finite number in a range.

    Args:
        name: the argument's name, for the error.
        value: what arrived; a number of Python or numpy.
        low: the smallest value.
        high: the largest value.
        above: refuse ``low`` itself.

    Returns:
        The number; int stays int.

    Raises:
        UserError: no number (true, false and text are none), NaN, infinite, or outside the range.

    >>> number("eps", 0.5, 0, above=True)
    0.5
    >>> number("eps", True)
    Traceback (most recent call last):
    holdfast.errors.UserError: eps must be a finite number, got True.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UserError(f"{name} must be {_range(low, high, above)}, got {value!r}.")
    exact: float = value if isinstance(value, (int, float)) else float(value)
    if not low <= exact <= high or abs(exact) == math.inf or (above and exact == low):
        raise UserError(f"{name} must be {_range(low, high, above)}, got {value!r}.")
    return exact


def _range(low: float, high: float, above: bool = False, kind: str = "a finite number") -> str:
    """A range in words."""
    if above and low == 0 and high >= MOST:
        return kind.replace("a ", "a positive ", 1)
    low_text, high_text = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (low, high))
    parts = [f"{'>' if above else '>='} {low_text}"] * (low > -math.inf) + [f"<= {high_text}"] * (high < MOST)
    return f"{kind} {' and '.join(parts)}".strip()


def whole(name: str, value: Any, low: int = 0, high: int = MOST) -> int:
    """A whole number in a range.

    Args:
        name: the argument's name, for the error.
        value: what arrived; an integer of Python or numpy.
        low: the smallest value.
        high: the largest value.

    Returns:
        The number.

    Raises:
        UserError: no integer (true, false, text and 2.0 are none), or outside the range.

    >>> whole("batch_size", 64, 1)
    64
    >>> whole("batch_size", 1.5, 1)
    Traceback (most recent call last):
    holdfast.errors.UserError: batch_size must be a whole number >= 1, got 1.5.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        beyond = f" and <= {MOST:,}" if isinstance(value, numbers.Integral) and int(value) > high >= MOST else ""
        got = printable(repr(value), 80)
        raise UserError(f"{name} must be {_range(low, high, kind='a whole number')}{beyond}, got {got}.")
    return int(value)


def any_seed(seed: Any) -> int:
    """A random seed: any integer. Raises UserError for text, floats, true and false.

    >>> any_seed(-1)
    -1
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise UserError(f"seed must be a whole number, got {seed!r}.")
    return int(seed)


def flag(name: str, value: Any) -> bool:
    """True or false. Raises UserError for anything else.

    >>> flag("flip", False)
    False
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} must be True or False, got {value!r}.")
    return value


def eps_text(eps: float) -> str:
    """eps in words: as a fraction of 255 where it is one, of at most two decimals, and its own decimals are long.

    >>> eps_text(0.1), eps_text(8 / 255), eps_text(0.25 / 255), eps_text(1 / 7)
    ('0.1', '8/255', '0.25/255', '0.142857')
    """
    short, levels = f"{eps:g}", round(eps * 255, 2)
    return f"{levels:g}/255" if len(short) > 5 and levels and abs(eps * 255 - levels) < 1e-5 else short


def read_number(text: str) -> float | None:
    """The number that a text is: a decimal, or a fraction of two.

    Args:
        text: such as 0.1, 1e-3, 8/255 or 8.0/255. ``1_000``, ``nan``, ``inf`` and hexadecimal are no numbers here.

    Returns:
        int or float; None where the text is no finite number.

    >>> read_number("8.0/255") == 8 / 255, read_number("10"), read_number("1_000"), read_number("1e999")
    (True, 10, None, None)
    """
    if len(text) > LONGEST_NUMBER:
        return None
    parts = [part.strip() for part in text.split("/")]
    if len(parts) > 2 or not all(_DECIMAL.fullmatch(part) for part in parts):
        return None
    if len(parts) == 1 and re.fullmatch(r"[+-]?\d+", parts[0]):
        return int(parts[0])
    values = [float(part) for part in parts]
    if len(values) == 2 and values[1] == 0:
        return None
    value = values[0] / values[1] if len(values) == 2 else values[0]
    return value if math.isfinite(value) else None


def text(name: str, value: Any, most: int = LONGEST_TEXT) -> str:
    """A text of bounded length without control characters.

    Args:
        name: the argument's name, for the error.
        value: what arrived.
        most: the largest number of characters.

    Returns:
        The text.

    Raises:
        UserError: no text, a longer one, or one with control characters.

    >>> text("loss", "sce")
    'sce'
    """
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, got {type_of(value)}.")
    if len(value) > most:
        raise UserError(f"{name} is {len(value):,} characters long: at most {most:,} are read.")
    if plain(value) != value or "\n" in value:
        raise UserError(f"{name} '{printable(value, 60)}' holds control characters: write it without.")
    return value


def path(name: str, value: Any) -> Path:
    """A path as a user writes it: a text or a Path; ``~`` is the home folder.

    Args:
        name: the argument's name, for the error.
        value: what arrived.

    Returns:
        The path. Nothing need be there.

    Raises:
        UserError: empty, the root, too long for a file system, with control characters, of an unknown user's home
            folder, or a device, pipe or socket.

    >>> path("out", "runs/mine").parts
    ('runs', 'mine')
    >>> path("out", "")
    Traceback (most recent call last):
    holdfast.errors.UserError: out is empty: name a file or a folder.
    """
    try:
        written = os.fspath(value)
    except TypeError:
        raise UserError(f"{name} must be a path, got {type_of(value)}.") from None
    if not isinstance(written, str):
        raise UserError(f"{name} must be a path as text, got {type_of(written)}.")
    if not written.strip():
        raise UserError(f"{name} is empty: name a file or a folder.")
    readable = os.fsencode(written).decode(errors="ignore")  # a name in another encoding is a name too
    if plain(readable) != readable or "\n" in readable:
        raise UserError(f"{name} '{printable(written, 60)}' holds control characters: rename it, or write it without.")
    if len(os.fsencode(written)) > LONGEST_PATH or any(len(os.fsencode(p)) > LONGEST_NAME for p in Path(written).parts):
        raise UserError(
            f"{name} '{printable(written, 60)}' is too long for a file system: a name has at most {LONGEST_NAME} "
            f"bytes, a path {LONGEST_PATH:,}."
        )
    try:
        found = Path(written).expanduser()
    except RuntimeError:
        raise UserError(f"{name} '{written}' names a home folder that does not exist: write the path out.") from None
    full = os.path.abspath(found)
    if full == Path(full).anchor:
        raise UserError(f"{name} is the root of the file system: name a file or a folder in it.")
    try:
        mode = found.stat().st_mode
    except OSError:  # nothing is there, or nobody may look: the reader or writer says so
        return found
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{name} '{written}' is a device, a pipe or a socket: name a file or a folder.")
    return found


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """A public function that checks the type of every argument against its annotation before it does anything.

    Ranges and meanings are the function's own matter. What is annotated as text or Path is a path, as ``path`` checks
    it.

    Args:
        function: any function with annotated arguments.

    Returns:
        The same function; it raises UserError for an argument of another type.

    >>> @typed
    ... def repeat(text: str, times: int = 2) -> str: return text * times
    >>> repeat("ab", "3")
    Traceback (most recent call last):
    holdfast.errors.UserError: times must be a whole number, got '3'.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        check_call(function, *args, **kwargs)
        return function(*args, **kwargs)

    return run


def check_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Refuse a call with an argument of another type than the function's annotation says, as ``typed`` does.

    Args:
        function: what is to be called.
        args: its arguments.
        kwargs: its named arguments.

    Raises:
        UserError: an argument is of another type.
        TypeError: one is missing, or there are too many, as Python says it.
    """
    try:
        given = _signature(function).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{function.__name__}(): {error}") from None
    kinds = _kinds(function)
    for name, value in given.items():
        if name in kinds:
            of_type(name, value, kinds[name])


def check_settings(function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Check the types of some of a function's arguments, as ``typed`` does, before it is called. Raises UserError."""
    kinds = _kinds(function)
    for name, value in settings.items():
        of_type(name, value, kinds.get(name, Any))


_signature = functools.lru_cache(maxsize=1000)(inspect.signature)  # half of what a check costs


@functools.lru_cache(maxsize=1000)
def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments; not of those that ``*`` and ``**`` collect."""
    return {
        name: _kind(parameter.annotation, inspect.unwrap(function).__globals__)
        for name, parameter in _signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def check_fields(made: Any) -> None:
    """Check the fields of a dataclass as ``typed`` checks arguments: for ``__post_init__``. Raises UserError."""
    for name, annotation in type(made).__annotations__.items():
        of_type(name, getattr(made, name), _kind(annotation, type(made).__init__.__globals__))


def of_type(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of another type.

    Args:
        name: the argument's name, for the error.
        value: what arrived.
        kind: the type; Any accepts everything, ``str | Path`` is a path, a float may be whole.

    Raises:
        UserError: the value is of another type, or no path where one is due.

    >>> of_type("seed", True, int)
    Traceback (most recent call last):
    holdfast.errors.UserError: seed must be a whole number, got True.
    """
    if not _fits(value, kind):
        short = isinstance(value, (str, bytes, int, float, NoneType, list, tuple)) and len(repr(value)) < 80
        shown = repr(value) if short else type_of(value)
        if (
            isinstance(value, numbers.Integral)
            and not isinstance(value, bool)
            and {int, float} & {*_alternatives(kind)}
        ):
            shown = f"{shown}, which is too large: the limit is {LARGEST:,}"
        raise UserError(f"{name} must be {' or '.join(dict.fromkeys(_words(kind)))}, got {shown}.")
    if Path in _alternatives(kind) and isinstance(value, (str, os.PathLike)):
        path(name, value)


def _kind(annotation: Any, names: dict[str, Any]) -> Any:
    """An annotation as a type; Any where its module cannot name it at run time."""
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, names)
    except NameError:
        return Any


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type."""
    if len(_alternatives(kind)) > 1:
        return any(_fits(value, one) for one in _alternatives(kind))
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is None or not isinstance(origin, type) or is_typeddict(kind):
        return kind is not None or value is None
    if origin in (Any, object):
        return True
    if origin.__name__ == "Callable":
        return callable(value) and not isinstance(value, type)
    if origin in (int, float):
        whole = isinstance(value, numbers.Integral)
        real = whole if origin is int else isinstance(value, numbers.Real)
        return real and not isinstance(value, bool) and not (whole and abs(value) > LARGEST)
    if origin is Path:
        return isinstance(value, (str, os.PathLike))
    if origin in (list, tuple, Sequence, Iterable):
        listed = isinstance(value, (list, tuple))
        plural = hasattr(value, "__iter__") and not isinstance(value, (str, bytes, Mapping, type))
        if not plural or (origin in (list, tuple) and not listed) or getattr(value, "ndim", 1) != 1:
            return False
        if not listed or not inner:
            return True
        if origin is tuple and inner[-1] is not ...:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(one, inner[0]) for one in value)
    return isinstance(value, origin)


def _words(kind: Any) -> list[str]:
    """What a type is called in an error, one entry for each alternative."""
    every = _alternatives(kind)
    if Path in every:
        return ["a path", *(word for one in every if one not in (str, Path, os.PathLike) for word in _words(one))]
    if len(every) > 1:
        return [word for one in every for word in _words(one)]
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in _PLURAL:
        return [_SINGULAR[origin]]
    if origin in _SEVERAL:
        count = f"{len(inner)} " if origin is tuple and ... not in inner else ""
        return [f"{_SEVERAL[origin]} of {count}{_PLURAL.get(inner[0], 'values')}" if inner else _SEVERAL[origin]]
    if getattr(origin, "__name__", "") == "Callable":
        return ["a function"]
    name = "None" if kind in (None, NoneType) else _with_article(getattr(origin, "__name__", str(origin)))
    return [{"a Tensor": "a tensor", "a Module": "a torch module"}.get(name, name)]


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


_SINGULAR = {str: "a text", int: "a whole number", float: "a number", bool: "True or False"}
_PLURAL = {str: "texts", int: "whole numbers", float: "numbers", bool: "True or False"}
_SEVERAL = {Sequence: "a list", list: "a list", Iterable: "a list", tuple: "a tuple"}
