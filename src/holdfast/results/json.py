"""Results as JSON: written atomically, read back equal."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..io import write_atomic
from ..user_input import path as checked_path
from .schema import SCHEMA, Results, Samples

FILE = "results.json"


def save(results: Results, dir: str | Path) -> Path:
    """Write ``dir/results.json`` atomically.

    Args:
        results: what to write.
        dir: the folder; created if needed.

    Returns:
        The path of the file.

    Raises:
        UserError: the file cannot be written (an existing file is left unchanged), or as :func:`to_json` raises.
    """
    return write_atomic(Path(dir) / FILE, to_json(results))


def to_json(results: Results) -> str:
    """The text of a results file, one run a line.

    Args:
        results: what to write. Tuples inside dicts come back from :func:`load` as lists, everything else unchanged.

    Returns:
        JSON text.

    Raises:
        UserError: a value has no place in JSON: NaN, infinity, keys that are not text, other objects.
    """
    whole = _encode(results, "results")
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in whole.pop("runs"))
    head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in whole.items())
    return f'{{{head},\n"runs": [\n{runs}\n]}}\n'


def _encode(value: Any, where: str) -> Any:
    """A value as plain JSON types; ``where`` names it in errors."""
    if isinstance(value, Samples):  # its columns are plain already
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"{where} has the key {key!r}: JSON keys are text. Write str(key).")
        return {k: _encode(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _encode(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}: JSON has no such number. Store None and say why.")
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where} is a {type(value).__name__}: results hold numbers, text, lists and dicts.")
    return value


def load(path: str | Path) -> Results:
    """Read a results file.

    Args:
        path: the file, or the folder that holds ``results.json``.

    Returns:
        The Results, equal to those saved.

    Raises:
        UserError: the file cannot be read, is damaged, or has another schema; the message names the field.
    """
    path = checked_path("the results", path)
    path = path / FILE if path.is_dir() else path

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}, which JSON does not allow")

    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as e:
        raise UserError(
            f"could not read {path}: {e.strerror}. Give a results.json or the folder that holds one."
        ) from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not readable JSON ({e}). Was it cut short or edited by hand?") from e
    known = isinstance(raw, dict) and type(raw.get("schema")) is int and raw["schema"] >= 1
    if not known or "runs" not in raw:
        raise UserError(f"{path} is not a holdfast results file: 'schema' and 'runs' were expected at the top.")
    if raw["schema"] > SCHEMA:
        newer = f"schema {raw['schema']}, this one reads {SCHEMA}. Upgrade holdfast."
        raise UserError(f"{path} was written by a newer holdfast: {newer}")
    if raw["schema"] < SCHEMA:
        command = raw.get("command")
        again = f"the command recorded in it: {command}" if command else "the evaluation that wrote it."
        raise UserError(
            f"{path} was written by holdfast with results schema {raw['schema']}; this version reads schema {SCHEMA}: "
            f"rerun {again}"
        )
    try:
        return _decode(Results, raw, "results")
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def _decode(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as ``kind``, checked; ``where`` names it in errors."""
    if kind is Any:
        return value
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else _decode(get_args(kind)[0], value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} should be an object, got {type(value).__name__}.")
        hints, known = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
        if unknown := sorted(set(value) - set(known)):
            raise UserError(f"{where} has the field '{unknown[0]}', which schema {SCHEMA} does not know.")
        for name, f in known.items():
            if name not in value and f.default is f.default_factory is dataclasses.MISSING:
                raise UserError(f"{where}.{name} is missing.")
        return kind(**{k: _decode(hints[k], v, f"{where}.{k}") for k, v in value.items()})  # type: ignore[operator]
    origin: Any = get_origin(kind) or kind
    accepted: Any = {float: (int, float), tuple: list}.get(origin, origin)
    if not isinstance(value, accepted) or (isinstance(value, bool) and origin is not bool):
        raise UserError(f"{where} should be {origin.__name__}, got {type(value).__name__} ({str(value)[:40]}).")
    if origin is dict:
        return {k: _decode(get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        item = get_args(kind)[0]
        plain: set[Any] = {int} if item is int else {int, float, type(None)} if item == float | None else set()
        if value and set(map(type, value)) <= plain:  # a long column at once
            return tuple(value)
        return tuple(_decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    return value
