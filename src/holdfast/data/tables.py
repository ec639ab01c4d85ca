"""Tables as encoded splits: parquet files, read only as far as needed, and tables of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from ..errors import UserError
from ..mapped import resident_bytes
from .columns import Columns, choose, extract, images_of
from .images import Encoded, Reading, check_memory
from .labels import some

ROWS = 1024  # read at a time
GROUPS = 8  # row groups of a table larger than memory that are held at a time


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
        if (late := _late(files, what, reading)) is not None:
            return late
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


def _late(files: Sequence[Path], what: str, reading: Reading) -> Encoded | None:
    """The split with images that are read as they are asked for; None where all of them fit in memory or are numbers.

    Labels are read now, and checked with the images of the first row group.
    """
    columns, size, parts = None, 0, []
    for shard in files:
        with pq.ParquetFile(shard) as file:
            columns = columns or choose(file.schema_arrow, reading, what)
            groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
            every = (group.column(place) for group in groups for place in range(group.num_columns))
            size += sum(one.total_uncompressed_size for one in every if one.path_in_schema.split(".")[0] in columns.x)
    if columns is None or len(columns.x) > 1 or size <= resident_bytes():
        return None
    images = ParquetImages(files, columns, what)
    if not len(images) or isinstance(images.group(0), np.ndarray):
        return None
    for shard in files:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            table = file.read(columns=[columns.y]).replace_schema_metadata(file.schema_arrow.metadata)
        parts.append(extract(table, columns, [], what, str(shard) if len(files) > 1 else what, x=[]))
    return replace(_joined(parts, what), x=images)


class ParquetImages(Sequence[Any]):
    """The encoded images of parquet files, of which a row group is read when one of its images is asked for.

    Args:
        files: parquet files, >= 1; image files that they name must lie in their own folder.
        columns: which column holds the images.
        what: name of the split, for errors.
    """

    def __init__(self, files: Sequence[Path], columns: Columns, what: str) -> None:
        self.columns, self.what, self.lock = columns, what, Lock()
        self.groups: list[tuple[Path, int]] = []
        sizes = []
        for file in files:
            about = pq.read_metadata(file)
            self.groups += [(file, number) for number in range(about.num_row_groups)]
            sizes += [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self.starts = np.cumsum([0, *sizes])
        self.recent: dict[int, Sequence[bytes | Path] | np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.group(number)[row - int(self.starts[number])]

    def group(self, number: int) -> Sequence[bytes | Path] | np.ndarray:
        """The images of a row group; the last few are kept, since several threads go through the rows in order."""
        with self.lock:
            if number not in self.recent:
                shard, place = self.groups[number]
                with pq.ParquetFile(shard, page_checksum_verification=True) as file:
                    table = file.read_row_group(place, columns=list(self.columns.x))
                while len(self.recent) >= GROUPS:
                    self.recent.pop(next(iter(self.recent)))
                self.recent[number] = images_of(table, self.columns, [shard.resolve().parent], str(shard))
            return self.recent[number]


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
