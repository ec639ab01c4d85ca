"""Which column of a table holds the images, which the labels, and what is in them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from ..errors import UserError, unknown
from .images import Encoded, Reading, is_encoded
from .labels import some

IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "pixels", "x")
PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image_file")
LABEL_NAMES = ("label", "labels", "class", "cls", "target", "targets", "category", "class_id", "class_name", "y")
ASK = (
    "expected one of each. Name them with --image-column and --label-column (in Python image_column=, label_column=), "
    "or use data.from_arrays."
)


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Args:
        x: the column of images, or those of the pixels in row-major order.
        y: the label column.
        grid: (rows, columns) that the names of pixel columns give, such as 1x1..28x28.
        named: whether the label column has a name or type that says so; otherwise it is the only one possible.
        notes: what was assumed.
    """

    x: tuple[str, ...]
    y: str
    grid: tuple[int, int] | None = None
    named: bool = True
    notes: tuple[str, ...] = ()


def choose(schema: pa.Schema, reading: Reading, what: str) -> Columns:
    """Find the image and the label column by type, then by name; several that are alike are refused.

    Args:
        schema: of the table, with the metadata of the hub if it has any.
        reading: the columns that the user named.
        what: name of the data, for errors and notes.

    Returns:
        The columns.

    Raises:
        UserError: a named column does not exist, or there is not one of each.
    """
    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{what} has a column name twice among {some(sorted(schema.names), 12)}: make them distinct.")
    for name in (reading.image_column, reading.label_column):
        if name and name not in schema.names:
            raise unknown(f"column of {what}", name, schema.names[:40])
    if reading.image_column and reading.image_column == reading.label_column:
        raise UserError(f"column {reading.image_column} of {what} cannot hold both the images and the labels.")
    features = _features(schema)
    kinds = {name: _kind(schema.field(name).type, features.get(name, {})) for name in schema.names}
    every = [name for name in schema.names if not name.startswith("__index_level_")]  # row numbers that pandas adds
    rest = [name for name in every if name != reading.label_column]
    pixels, grid = _pixel_columns([name for name in rest if kinds[name] in ("whole", "number")])
    images: list[str] = [reading.image_column] if reading.image_column not in ("", *pixels) else []
    if images and kinds[images[0]] in ("class", "whole", "number", "flag"):
        raise UserError(f"column {images[0]} of {what} has one number a row: that is no image. Name another column.")
    for kind in ("image", "bytes", "numbers") if not reading.image_column else ():
        images = images or [name for name in rest if kinds[name] == kind]
    if not reading.image_column:
        paths = [name for name in rest if kinds[name] == "text" and name.lower() in (*PATH_NAMES, *IMAGE_NAMES)]
        images = images or paths
    pictures = _preferred(images, IMAGE_NAMES)
    if not images and pixels:
        pictures = [pixels[0]]  # one set of columns
    free = [name for name in every if name not in (*images, *(() if images else pixels))]
    classes = [name for name in free if kinds[name] == "class"]
    plain = [name for name in free if kinds[name] in ("whole", "number", "text", "flag")]
    known = [name for name in plain if name.lower() in LABEL_NAMES]
    labels = [reading.label_column] if reading.label_column else classes or known
    named = bool(labels)
    if pictures:
        for kinds_of in (("whole",), ("text", "flag")):
            labels = labels or [name for name in plain if kinds[name] in kinds_of]
    labels = labels or [name for name in plain if kinds[name] == "whole"]
    chosen = _preferred(labels, ("label", "fine_label") if classes else ("label", "labels"))
    if len(pictures) != 1 or len(chosen) != 1:
        said = {name: features.get(name, {}).get("_type", str(schema.field(name).type)) for name in schema.names}
        listed = some([f"{name} ({kind})" for name, kind in said.items()], 12)
        raise UserError(f"{what} has {len(pictures)} image and {len(chosen)} label columns in {listed}: {ASK}")
    notes = []
    for word, one, others in (("images", pictures[0], images), ("labels", chosen[0], [*classes, *known])):
        left = [name for name in others if name != one]
        if left and not (reading.label_column if word == "labels" else reading.image_column):
            notes.append(f"{what}: the {word} are read from column {one}, not from {some(left)}.")
    if not named:
        notes.append(f"{what}: the labels are read from column {chosen[0]}, the only one that may hold them.")
    if images:
        return Columns((pictures[0],), chosen[0], None, named, tuple(notes))
    return Columns(tuple(pixels), chosen[0], grid, named, tuple(notes))


def extract(
    table: pa.Table,
    columns: Columns,
    folders: Sequence[Path],
    what: str,
    shard: str = "",
    x: Sequence[bytes | Path] | np.ndarray | None = None,
) -> Encoded:
    """Read images and labels of a table.

    Args:
        table: holds the columns.
        columns: which ones.
        folders: image files must lie in one of these; relative paths start in the first.
        what: name of the data, for errors.
        shard: the table's file, where there are several.
        x: the images, where the table holds labels alone.

    Returns:
        The images, encoded or as numbers, and the labels.

    Raises:
        UserError: an entry is empty, rows differ in shape, a label is not whole, or a file lies elsewhere.
    """
    where, folders = shard or what, [folder.resolve() for folder in folders]
    column = table.column(columns.y)
    x = images_of(table, columns, folders, where) if x is None else x
    y, classes = _labels(column, columns, where), _class_names(table.schema, columns.y)
    return Encoded(x, y, classes, f"column {columns.y}", columns.notes)


def images_of(table: pa.Table, columns: Columns, folders: Sequence[Path], what: str) -> list[bytes | Path] | np.ndarray:
    """Encoded images, files, or numbers: those of a table, as for ``extract``."""
    first = table.column(columns.x[0])
    kind = _kind(first.type, {})
    if len(columns.x) > 1 or kind in ("whole", "number", "flag"):
        values = np.stack([_numbers(table.column(name), name, what) for name in columns.x], axis=1)
        return values.reshape(-1, *columns.grid) if columns.grid else values
    if kind == "numbers":
        return _numbers(first, columns.x[0], what)
    rows = _storage(first).to_pylist()
    if kind == "bytes":
        content: list[bytes] = [row or b"" for row in rows]
        lengths = {len(one) for one in content}
        if len(lengths) == 1 and min(lengths) >= 16 and not any(is_encoded(one) for one in content[:9]):  # pixels
            return np.frombuffer(b"".join(content), dtype=np.uint8).reshape(len(content), -1).copy()
        return [*content]
    cells = [row if isinstance(row, dict) else {"path": row} for row in rows]
    return [
        cell.get("bytes") or (_beside(str(cell["path"]), folders, i, what) if cell.get("path") else b"")
        for i, cell in enumerate(cells)
    ]


def _labels(column: pa.ChunkedArray, columns: Columns, what: str) -> np.ndarray:
    """(N,) labels as they are stored."""
    name = columns.y
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not (text or pa.types.is_boolean(column.type) or _is_number(column.type) or pa.types.is_null(column.type)):
        hint = "expected whole numbers, text or booleans. Name another with --label-column."
        raise UserError(f"column {name} of {what} is {column.type}: {hint}")
    values = column.to_pylist() if text else column
    empty = sum(1 for value in values if not value) if text else column.null_count
    if empty:
        raise UserError(f"column {name} of {what} has {empty} empty entries: fill or drop them.")
    y = np.array(values, dtype=object) if text else np.array(column.to_numpy())  # a copy that may be written
    different = len(set(values)) if text else len(np.unique(y))
    if not columns.named and len(y) >= 8 and different > len(y) / 2:
        why = f"holds {different:,} different values in {len(y):,} rows, so it names no classes"
        raise UserError(f"column {name} of {what} {why}. Name the label column with --label-column.")
    return y


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What the hub's metadata says of each column; {} where there is none, or none that can be read."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: one for name, one in found.items() if isinstance(one, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _class_names(schema: pa.Schema, name: str) -> tuple[str, ...] | None:
    """The class names that the metadata gives to a column of whole numbers."""
    feature = _features(schema).get(name, {})
    names = feature.get("names")
    if feature.get("_type") != "ClassLabel" or not isinstance(names, list) or not names:
        return None
    return tuple(names) if pa.types.is_integer(schema.field(name).type) else None


def _kind(kind: Any, feature: dict[str, Any]) -> str:
    """A column's kind: image, bytes, numbers (lists), class, whole, number, flag, text; "" for others."""
    if feature.get("_type") == "ClassLabel" and pa.types.is_integer(kind):
        return "class"
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):  # text in "bytes" would be opened as the name of a file
        place = kind.get_field_index("bytes")
        return "image" if place >= 0 and (_is_bytes(kind.field(place).type) or _is_null(kind.field(place).type)) else ""
    if _is_bytes(kind):
        return "bytes"
    if _is_list(kind):
        while _is_list(kind):
            kind = kind.value_type
        return "numbers" if _is_number(kind) or pa.types.is_boolean(kind) else ""
    if pa.types.is_integer(kind):
        return "whole"
    if pa.types.is_floating(kind):
        return "number"
    if pa.types.is_boolean(kind):
        return "flag"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else ""


def _is_null(kind: Any) -> bool:
    return bool(pa.types.is_null(kind))


def _is_bytes(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(kind: Any) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _preferred(names: list[str], order: Sequence[str]) -> list[str]:
    """The first of ``order`` among several names, in any case; all of them where none or two are there."""
    for word in order if len(names) > 1 else ():
        found = [name for name in names if name.lower() == word]
        if len(found) == 1:
            return found
    return names


def _pixel_columns(names: list[str]) -> tuple[list[str], tuple[int, int] | None]:
    """The largest set of number columns that are numbered without a gap (pixel0.., or 1x1..28x28), in order."""
    groups: dict[tuple[str, bool], dict[tuple[int, int], str]] = {}
    for name in names:
        found = re.fullmatch(r"(\D*?)(\d{1,6})(?:x(\d{1,6}))?", name)
        if found:
            prefix, row, col = found.groups()
            groups.setdefault((prefix, col is not None), {})[int(row), int(col or 0)] = name
    if not groups:
        return [], None
    (_, is_grid), places = max(groups.items(), key=lambda item: len(item[1]))
    rows, cols = (sorted(set(axis)) for axis in zip(*places, strict=True))
    counted = all(axis == list(range(axis[0], axis[0] + len(axis))) for axis in (rows, cols))
    if len(places) < 4 or not counted or len(places) != len(rows) * len(cols) or rows[0] > 1:
        return [], None
    return [places[key] for key in sorted(places)], (len(rows), len(cols)) if is_grid else None


def _storage(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without its extension type or dictionary."""
    if isinstance(column.type, pa.BaseExtensionType):
        return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_dictionary(column.type):
        return pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)
    return column


def _numbers(column: pa.ChunkedArray, name: str, what: str) -> np.ndarray:
    """A column of numbers, or of lists of numbers of one shape, as an array; whole numbers in 0..255 as uint8."""
    parts = []
    for chunk in _storage(column).chunks:
        values, shape = chunk, [len(chunk)]
        while _is_list(values.type):
            lengths = Counter(pc.list_value_length(values).to_pylist())
            if None in lengths:
                raise UserError(f"column {name} of {what} has {lengths[None]} empty entries: fill or drop them.")
            if len(lengths) > 1:
                listed = some(sorted(lengths))
                raise UserError(f"column {name} of {what} has lists of different lengths ({listed}): make them equal.")
            shape.append(next(iter(lengths), 0))
            values = values.flatten()
        if values.null_count:
            raise UserError(f"column {name} of {what} has {values.null_count} empty entries: fill or drop them.")
        array = values.to_numpy(zero_copy_only=False).reshape(shape)
        if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
            array = array.astype(np.uint8)  # at once: lists of int64 take eight times the memory
        parts.append(array.astype(np.float32) if array.dtype.kind == "f" else array)
    parts = [part for part in parts if len(part)]
    if len({part.shape[1:] for part in parts}) > 1:
        listed = some(sorted({" x ".join(map(str, part.shape[1:])) for part in parts}))
        raise UserError(f"column {name} of {what} has images of different sizes ({listed}): make them equal.")
    return np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.uint8)


def _beside(path: str, folders: Sequence[Path], row: int, what: str) -> Path:
    """The image file that a cell names; it may not leave the folder of its table."""
    said = f"row {row} of {what} names the file '{path[:200]}'"
    try:
        file = (folders[0] / path).resolve()
        inside, there = any(file.is_relative_to(folder) for folder in folders), file.is_file()
    except (OSError, ValueError, RuntimeError, IndexError):
        inside, there = True, False
    if not inside:
        raise UserError(f"{said}, outside the folder of the table: put the images beside it, with relative paths.")
    if not there:
        raise UserError(f"{said}, which does not exist: paths start in the folder of the table. Add the file.")
    return file
