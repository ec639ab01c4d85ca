"""Tables as encoded splits: parquet files, read only as far as needed, and tables of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..errors import UserError
from .columns import Columns, choose, extract
from .images import Encoded, Reading, check_memory
from .labels import some

ROWS = 1024  # read at a time


def from_parquet(files: Sequence[Path], what: str, reading: Reading) -> Encoded:
    """Read the files of one split: the image and the label column, and no other.

    Args:
        files: parquet files, >= 1; image files that they name must lie in their own folder.
        what: name of the split, for errors and notes.
        reading: the columns that the user named.

    Returns:
        The encoded split.

    Raises:
        UserError: a file cannot be read, is larger than memory allows, or its columns are not clear.
    """
    parts: list[Encoded] = []
    columns, size, shard = None, 0, files[0]
    try:
        for shard in files:
            with pq.ParquetFile(shard, page_checksum_verification=True) as file:
                columns = columns or choose(file.schema_arrow, reading, what)
                names = [*columns.x, columns.y]
                missing = [name for name in names if name not in file.schema_arrow.names]
                if missing:
                    raise UserError(f"'{shard}' has no column {some(missing)}, but '{files[0]}' has: make them alike.")
                batches = []
                for batch in file.iter_batches(ROWS, columns=names):
                    size += batch.nbytes
                    check_memory(size, f"the columns {some(names)} of {what}", "use fewer rows.", "a quarter")
                    batches.append(batch)
                kept = [file.schema_arrow.field(name) for name in names]
                table = pa.Table.from_batches(batches) if batches else pa.schema(kept).empty_table()
                table = table.replace_schema_metadata(file.schema_arrow.metadata)
            parts.append(extract(table, columns, [shard.resolve().parent], str(shard) if len(files) > 1 else what))
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, MemoryError, UnicodeError) as error:
        hint = "it may be cut short, or differ from the files beside it. Download it again."
        raise UserError(f"'{shard}' cannot be read as parquet ({str(error)[:300]}): {hint}") from error
    return _joined(parts, what)


def from_hub(split: Any, what: str, reading: Reading, folders: Sequence[Path]) -> Encoded:
    """Read a split that the ``datasets`` package has loaded.

    Args:
        split: a ``datasets.Dataset``.
        what: name of the split, for errors and notes.
        reading: the columns that the user named.
        folders: where its image files may lie.

    Returns:
        The encoded split.

    Raises:
        UserError: its columns are not clear, or an image file lies elsewhere.
    """
    schema = split.features.arrow_schema
    columns: Columns = choose(schema, reading, what)
    # encoded images, not decoded row by row
    table = split.select_columns([*columns.x, columns.y]).with_format("arrow")[:]
    return extract(table.replace_schema_metadata(schema.metadata), columns, folders, what)


def _joined(parts: Sequence[Encoded], what: str) -> Encoded:
    """The files of a split as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({part.classes for part in parts}) > 1:
        raise UserError(f"the files of {what} differ in their class names: name the same ones, in the same order.")
    kinds = {part.y.dtype.kind.replace("u", "i") for part in parts if len(part.y)}
    shapes = {part.x.shape[1:] for part in parts if isinstance(part.x, np.ndarray) and len(part.x)}
    if len(kinds) > 1 or len(shapes) > 1 or len({isinstance(part.x, np.ndarray) for part in parts}) > 1:
        raise UserError(f"the files of {what} differ in the type of their labels or images: write them alike.")
    labels = np.concatenate([part.y for part in parts if len(part.y)] or [first.y])
    if isinstance(first.x, np.ndarray):
        arrays = [np.asarray(part.x) for part in parts if len(part.x)]
        return Encoded(np.concatenate(arrays or [first.x]), labels, first.classes, first.column, first.notes)
    images = [image for part in parts for image in part.x]
    return Encoded(images, labels, first.classes, first.column, first.notes)
