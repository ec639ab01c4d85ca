"""Results as JSON: written atomically, read back equal."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io import decode, parse_json, write_atomic
from ..user_input import path as checked_path
from ..user_input import typed
from .schema import OLDEST, SCHEMA, Results, Samples

FILE = "results.json"


@typed
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


@typed
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


@typed
def load(path: str | Path) -> Results:
    """Read a results file.

    Args:
        path: the file, or the folder that holds ``results.json``.

    Returns:
        The Results, equal to those saved. What an older file does not have is as in Results that were made without it.

    Raises:
        UserError: the file cannot be read, is damaged, or has another schema; the message names the field.
    """
    path = checked_path("the results", path)
    path = path / FILE if path.is_dir() else path
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
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
    if raw["schema"] < OLDEST:
        command = raw.get("command")
        again = f"the command recorded in it: {command}" if command else "the evaluation that wrote it."
        raise UserError(
            f"{path} was written by holdfast with results schema {raw['schema']}; this version reads schemas {OLDEST} "
            f"to {SCHEMA}: rerun {again}"
        )
    try:
        return decode(Results, {**raw, "schema": SCHEMA}, "results")
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
