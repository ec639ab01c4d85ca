"""Images that are decoded late, once it is known which are needed: what does not fit in memory goes to a file, once."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import mapped
from ..io import content_hash, write_atomic
from .arrays import check_labels
from .dataset import Chosen, Data, Source
from .images import Encoded, Reading, Some, decode, decoded_size


def decodes_late(parts: Sequence[Encoded], reading: Reading) -> bool:
    """Whether the images of a source are decoded late: they do not fit in memory, or damaged ones are to be skipped."""
    if not all(len(part.x) and not isinstance(part.x, np.ndarray) for part in parts):
        return False
    return reading.skip_corrupt or _size(parts, reading) > mapped.resident_bytes()


def _size(parts: Sequence[Encoded], reading: Reading) -> int:
    return sum(decoded_size(part.x, reading) for part in parts if not isinstance(part.x, np.ndarray))


def late_source(
    parts: Sequence[Encoded],
    numbers: Sequence[np.ndarray],
    what: str,
    said: Sequence[str],
    classes: Sequence[str],
    reading: Reading,
    notes: Sequence[str],
) -> Source:
    """A source whose images are decoded when they are asked for, by number: those of train, then those of test.

    Args:
        parts: train, and test if there is one.
        numbers: the labels of each part, (N,) int64 places in ``classes``.
        what: name of the data, for notes.
        said: names of the parts, for errors and notes.
        classes: names of the labels.
        reading: how to convert and resize, and whether to skip what is damaged.
        notes: what was assumed so far.

    Returns:
        The source. Its ``decode`` also takes ``folder``, for files, and ``kept``, the beginning of their names if they
        are kept.
    """
    starts = np.cumsum([0, *map(len, numbers)])
    samples = []
    for y, start, name in zip(numbers, starts[:-1].tolist(), said, strict=True):
        checked = check_labels(torch.from_numpy(y), len(y), classes, name)
        samples.append(Data(torch.arange(start, start + len(y)), checked, torch.arange(len(y))))
    notes = list(dict.fromkeys(notes))
    if _size(parts, reading) > mapped.resident_bytes():
        many = f"{what}: {int(starts[-1]):,} images are more than is held in memory"
        notes.append(f"{many}: they are decoded to a file as they are needed, and not compared with each other.")
    test = samples[1] if len(samples) == 2 else None
    decode_part = partial(_decode, parts, starts, said, reading)
    return Source(samples[0], test, tuple(classes), tuple(notes), decode_part)


def _decode(
    parts: Sequence[Encoded],
    starts: np.ndarray,
    said: Sequence[str],
    reading: Reading,
    numbers: Tensor,
    most: int,
    *,
    folder: Path,
    kept: Path | None,
) -> Chosen:
    """Decode the images of these numbers, or take them from the file that they were decoded to before."""
    place = int(np.searchsorted(starts, int(numbers[0]), side="right")) - 1
    part, name = parts[place], said[place]
    some = Some(part.x, (numbers - starts[place]).numpy())
    file = None if kept is None else kept.with_name(f"{kept.name}.{content_hash(numbers)}.npy")
    if file is not None and (known := _known(file, len(numbers), most)) is not None:
        return known
    scratch = None
    if decoded_size(some, reading) > most or file is not None:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{os.getpid()}-{content_hash(numbers)}.npy.tmp"
    try:
        x, notes, damaged = decode(some, name, reading, path=scratch, skip=reading.skip_corrupt)
        found = Chosen(x, tuple(notes), tuple(int(numbers[i]) for i in damaged))
        if file is not None and scratch is not None:
            _keep(file, scratch, found)
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)  # what is mapped stays
    return found._replace(x=_held(x, most))


def _held(x: Tensor, most: int) -> Tensor:
    """Images in memory where they fit, else mapped; changes stay in memory."""
    return mapped.detached(x) if x.nbytes > most else x.clone()


def _known(file: Path, count: int, most: int) -> Chosen | None:
    """What was decoded before; None where it was not, or where a file is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads(file.with_suffix(".json").read_text())
        notes, damaged = tuple(about["notes"]), tuple(about["damaged"])
        if damaged:
            return Chosen(torch.empty(0), notes, damaged)
        x = mapped.opened(file)
        if len(x) == count:
            return Chosen(_held(x, most), notes, ())
    return None


def _keep(file: Path, scratch: Path, found: Chosen) -> None:
    """Keep what was decoded; of an earlier state of the data, nothing."""
    stem, key, _, _ = file.name.rsplit(".", 3)
    for old in file.parent.glob(f"{stem}.????????.????????????????.*"):
        if old.name.rsplit(".", 3)[1] != key:
            old.unlink(missing_ok=True)
    if not found.damaged:
        mapped.flush(found.x)
        os.replace(scratch, file)
    write_atomic(file.with_suffix(".json"), json.dumps({"notes": found.notes, "damaged": found.damaged}))
