"""Tensors in files: images that do not fit in memory are mapped, and their pages are given back after use.

A mapped tensor is an ordinary one on the CPU, whose values are in a .npy file. Work that goes over all of it takes it
in ``chunks``, or reads rows by ``take`` and writes them by ``put``: these give back the memory of pages they touched.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

RESIDENT = 2**28  # bytes of images that are held in memory by default; an evaluation takes about 20 times as much
VARIABLE = "HOLDFAST_MEMORY"  # another number of bytes, such as 64M or 2G
CHUNK = 2**24  # bytes of a mapped tensor that are worked on at a time
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TYPES: dict[torch.dtype, Any] = {
    torch.uint8: np.uint8, torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64,
}  # fmt: skip


class _Array(np.memmap[Any, Any]):
    """A mapped array that keeps its file open, and what rows were changed in memory alone."""

    file: Any
    changed: list[tuple[Tensor, Tensor]]


_ARRAYS: WeakValueDictionary[int, _Array] = WeakValueDictionary()  # by the address of their first value


def resident_bytes(default: int = RESIDENT) -> int:
    """How many bytes of images are held in memory: $HOLDFAST_MEMORY, by default 256 MiB.

    Args:
        default: where the variable is not set.

    Raises:
        UserError: the variable is no number of bytes.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return default
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not match:
        raise UserError(f"{VARIABLE} is '{text[:40]}': expected a number of bytes, such as 64M or 2G.")
    return int(match[1]) * _UNITS[match[2].upper()]


def is_mapped(x: Tensor) -> bool:
    """Whether a tensor, or the tensor that it is a view of, is in a file."""
    return _array(x) is not None


def _array(x: Tensor) -> _Array | None:
    return _ARRAYS.get(x.untyped_storage().data_ptr()) if len(_ARRAYS) and x.device.type == "cpu" else None


def create(path: Path | None, shape: Sequence[int], dtype: torch.dtype, *, folder: Path | None = None) -> Tensor:
    """A mapped tensor of zeros in a new file; what is written to it is written to the file.

    Args:
        path: of the .npy file; an older one is replaced. None for a temporary file.
        shape: of the tensor.
        dtype: of the tensor.
        folder: of a temporary file.

    Returns:
        The tensor. Space for all of it is reserved.

    Raises:
        UserError: the file cannot be written, or the disk is too small.
    """
    kind = np.dtype(_TYPES[dtype])
    where = Path(folder or tempfile.gettempdir()) if path is None else path.parent
    need = math.prod(shape) * kind.itemsize
    file: Any = None
    try:
        where.mkdir(parents=True, exist_ok=True)
        if path is not None:
            path.unlink(missing_ok=True)  # whoever has mapped it keeps the old one
        file = tempfile.TemporaryFile(dir=folder) if path is None else path.open("w+b")  # noqa: SIM115
        about = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, about)
        file.flush()
        offset = file.tell()
        if need > shutil.disk_usage(where).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # a hole in the file that the disk has no room for would end the process when it is written
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, offset + need)
        else:
            file.truncate(offset + need)
    except OSError as error:
        if file is not None:
            file.close()
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise UserError(
            f"{need / 2**30:,.2f} GiB of images cannot be written to {where} "
            f"({error.strerror or error}): make room there, or use fewer images."
        ) from error
    return _map(file, kind, shape, offset, "r+")


def stored(x: Tensor, path: Path | None = None) -> Tensor:
    """A mapped copy of a tensor on the CPU, in a new file.

    Args:
        x: (N, ...).
        path: of the file; None for a temporary file.

    Raises:
        UserError: as ``create`` does.
    """
    copy = create(path, x.shape, x.dtype)
    for rows in torch.arange(len(x)).split(rows_at_a_time(copy)):
        put(copy, rows, take(x, rows), torch.ones_like(rows, dtype=torch.bool))
    flush(copy)
    return copy


def gathered(parts: Iterable[Tensor]) -> Tensor:
    """Parts of a tensor in one: in memory as far as ``resident_bytes`` allows, else mapped from a temporary file.

    Args:
        parts: (n, ...) on the CPU, at least one, of the same shape but for n, and of the same type.

    Raises:
        UserError: the file cannot be written.

    >>> gathered([torch.zeros(2, 3), torch.ones(1, 3)]).sum(1).tolist()
    [0.0, 0.0, 3.0]
    """
    held: list[Tensor] = []
    limit, size, count, file = resident_bytes(), 0, 0, None
    for part in parts:
        held.append(part.contiguous())
        size, count = size + part.nbytes, count + len(part)
        if size > limit or file is not None:
            try:
                file = file or tempfile.TemporaryFile()  # noqa: SIM115
                while held:
                    file.write(held.pop(0).numpy().data)
            except OSError as error:
                if file is not None:
                    file.close()
                raise UserError(
                    f"{size / 2**30:,.2f} GiB of images cannot be written to {tempfile.gettempdir()} "
                    f"({error.strerror}): make room there, set TMPDIR to another folder, or use fewer images."
                ) from error
    if file is None:
        return torch.cat(held)
    file.flush()
    return _map(file, np.dtype(_TYPES[part.dtype]), (count, *part.shape[1:]), 0, "c")


def opened(path: Path, *, writable: bool = False) -> Tensor:
    """The tensor in a .npy file, mapped.

    Args:
        path: the file.
        writable: write changes to the file; otherwise they stay in memory.

    Raises:
        ValueError: it is no such file, or cut short.
        OSError: it cannot be read.
    """
    with path.open("r+b" if writable else "rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path.name} is of another version")
        shape, fortran, kind = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
        if fortran or kind not in [np.dtype(one) for one in _TYPES.values()]:
            raise ValueError(f"{path.name} holds another type of values")
        if os.fstat(file.fileno()).st_size < offset + math.prod(shape) * kind.itemsize:
            raise ValueError(f"{path.name} is cut short")
        return _map(_again(file), kind, shape, offset, "r+" if writable else "c")


def _again(file: Any) -> Any:
    """The same open file, to be closed by itself."""
    return os.fdopen(os.dup(file.fileno()), "r+b" if file.writable() else "rb")


def _map(file: Any, kind: Any, shape: Sequence[int], offset: int, mode: Any) -> Tensor:
    """What is in a file, mapped; the file is closed with it."""
    if math.prod(shape) == 0:  # nothing can be mapped
        file.close()
        return torch.from_numpy(np.zeros(tuple(shape), kind))
    array = _Array(file, kind, mode, offset, tuple(shape))
    array.file, array.changed = file, []
    finalize(array, file.close)
    _ARRAYS[array.ctypes.data] = array
    return torch.from_numpy(array)


def detached(x: Tensor) -> Tensor:
    """A mapped tensor as another one of the same file, whose changes stay in memory; another tensor as it is."""
    return with_rows(x, torch.zeros(0, dtype=torch.int64), x[:0]) if is_mapped(x) else x


def with_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy with other values in some rows; of a mapped tensor, these rows alone are held in memory.

    Args:
        x: (N, ...), whole.
        rows: (M,) int64 on the CPU.
        values: (M, ...).
    """
    array = _array(x)
    if array is None:
        copy = x.clone()
        copy[rows] = values
        return copy
    flush(x)
    copy = _map(_again(array.file), array.dtype, array.shape, array.offset, "c")
    other = _array(copy)
    if other is not None:
        other.changed = [*array.changed, *([(rows, values)] if len(rows) else [])]
        _change(copy, other)
    return copy


def _change(x: Tensor, array: _Array) -> None:
    for rows, values in array.changed:
        x[rows] = values


def flush(x: Tensor) -> None:
    """Write what was changed to the file."""
    array = _array(x)
    if array is not None and array.mode != "c":
        array.flush()


def release(x: Tensor) -> None:
    """Give back the memory of the pages of a mapped tensor that were read; does nothing for another one."""
    array = _array(x)
    base = None if array is None else array.base
    if array is not None and isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)
        if array.changed:  # these pages were of this process alone
            _change(torch.from_numpy(array), array)


def chunks(x: Tensor) -> Iterator[Tensor]:
    """A tensor in parts along its first dimension; one part unless it is mapped."""
    if not is_mapped(x):
        yield x
        return
    for part in x.split(rows_at_a_time(x)):
        yield part
        release(x)


def rows_at_a_time(x: Tensor) -> int:
    """How many rows of a mapped tensor are worked on at a time; all rows of another one."""
    return max(1, CHUNK // max(1, x[:1].nbytes)) if is_mapped(x) else max(1, len(x))


def take(x: Tensor, rows: Tensor | slice, device: torch.device | None = None) -> Tensor:
    """(M, ...) rows of a tensor, where it is; of a mapped one, copied to a device."""
    if not is_mapped(x):
        return x[rows]
    values = x[rows].clone() if isinstance(rows, slice) else x[rows.cpu()]
    release(x)
    return values if device is None else values.to(device)


def put(x: Tensor, rows: Tensor, values: Tensor, chosen: Tensor) -> None:
    """x[rows] = values, where chosen.

    Args:
        x: (N, ...), changed in place.
        rows: (M,) int64.
        values: (M, ...), on the device of ``rows``.
        chosen: (M,) bool.
    """
    if not is_mapped(x):
        x[rows] = torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), values, x[rows])
        return
    x[rows[chosen].cpu()] = values[chosen].to(x)
    release(x)


def extremes(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest value of a tensor that has some; NaN where it has any.

    >>> extremes(torch.tensor([[0.25, 1.0]]))
    (0.25, 1.0)
    """
    low, high = zip(*(part.aminmax() for part in chunks(x)), strict=True)
    return float(torch.stack(low).amin()), float(torch.stack(high).amax())
