"""Files: atomic writes, JSON read as the type it should have, and tensors with a typed, versioned, checksummed header.

What a file holds is checked where it is read, by ``decode``: a harmed file is one sentence, not a traceback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import UserError
from .user_input import path as checked_path

if TYPE_CHECKING:
    from torch import Tensor

RESTORE = "Restore it from a copy, or rerun the command that wrote it with another folder."
SAVE_EVERY = 5.0  # seconds between two checkpoints, at least
MOST_DIGITS = 300  # of a whole number in a file: a float can hold it


def content_hash(*parts: Any) -> str:
    """A hash of tensors (shape, type and values) and of what JSON can hold, in order: 16 hexadecimal digits.

    >>> content_hash("a", 1), content_hash("a", 1) == content_hash("a", 2)
    ('645ef034eb2e756b', False)
    """
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        if hasattr(part, "detach"):
            from .mapped import chunks  # here, since results load without torch

            state.update(f"{tuple(part.shape)} {part.dtype}".encode())
            for some in chunks(part) if part.numel() else ():
                state.update(some.detach().cpu().contiguous().numpy().data)
        else:
            state.update(json.dumps(part, sort_keys=True, default=str).encode())
    return state.hexdigest()


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write a file completely or not at all: to a temporary file beside it, then by a rename.

    Args:
        path: file to write; missing folders are created.
        content: text (written as UTF-8) or bytes.

    Returns:
        ``path``.

    Raises:
        UserError: the file could not be written. An older file at ``path`` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"could not write {path}: {error.strerror or error}. A file that was there before is unchanged."
        ) from error
    return path


def next_save(began: float) -> float:
    """When the next checkpoint is due, by ``time.perf_counter()``: at most 5% of the time goes into writing.

    Args:
        began: when the writing of the last one began, which has ended now; or now, before the first one.

    >>> round(next_save(time.perf_counter()) - time.perf_counter())
    5
    """
    now = time.perf_counter()
    return now + max(SAVE_EVERY, 20 * (now - began))


def existing_file(path: str | Path) -> Path:
    """Resolve the path of a file.

    Args:
        path: absolute, or relative to the working directory.

    Returns:
        The absolute path.

    Raises:
        UserError: there is no such file, or the text is no path.
    """
    found = checked_path("the file", path)
    if not found.is_file():
        raise UserError(f"there is no file at {path}.")
    return found.resolve()


def check_zip(path: Path, what: str) -> None:
    """Refuse a file that torch wrote, which is a zip archive, where a part is not what its checksum says.

    torch itself does not look: a flipped bit would become other weights.

    Args:
        path: the file; one that is no zip archive has no checksums, and passes.
        what: what to do about a damaged one, a sentence.

    Raises:
        UserError: it is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:  # whatever a damaged directory makes of it
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). {what}") from None
    if wrong is not None:
        raise UserError(f"{path} is damaged: its part {wrong!r} does not fit its checksum. {what}")


def read_json(path: str | Path, kind: Any = dict[str, Any], *, what: str = "a file of this holdfast") -> Any:
    """Read a JSON file as a type.

    Args:
        path: the file.
        kind: the type of its content, as ``decode`` takes it.
        what: what the file should be, for the error.

    Returns:
        The content.

    Raises:
        UserError: the file cannot be read, is no JSON, or holds something else; the message names file and field.
    """
    path = Path(path)
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {RESTORE}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). {RESTORE}") from None
    try:
        return decode(kind, raw, path.stem)
    except UserError as error:
        raise UserError(f"{path} is not {what}: {error} {RESTORE}") from None


def parse_json(text: str) -> Any:
    """Parse JSON as it is defined: no NaN, no infinity, and no number that a float cannot hold.

    Args:
        text: the JSON text.

    Returns:
        What it stands for.

    Raises:
        ValueError: it is not such a text.
        RecursionError: it is nested too deeply.

    >>> parse_json('{"n": 3}')
    {'n': 3}
    >>> parse_json("[1e999]")
    Traceback (most recent call last):
    ValueError: the number 1e999 is too large
    """

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}, which JSON does not allow")

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MOST_DIGITS:
            raise ValueError(f"the number {digits[:20]}... is too large")
        return int(digits)

    def real(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"the number {digits[:20]} is too large")
        return value

    return json.loads(text, parse_constant=refuse, parse_int=integer, parse_float=real)


_PLAIN: dict[Any, set[type]] = {int: {int}, float: {int, float}, float | None: {int, float, type(None)}}


def decode(kind: Any, value: Any, where: str) -> Any:
    """A value that JSON can hold as a type, checked at every level.

    Args:
        kind: a dataclass (all of its fields, and no other), a TypedDict (its fields; others pass), ``dict[str, T]``,
            ``list[T]``, ``tuple[T, ...]``, a plain type, ``T | None`` or Any.
        value: as ``json.loads`` returned it.
        where: the name of the value, for the error.

    Returns:
        The value; lists become tuples where a tuple is expected, objects become dataclasses.

    Raises:
        UserError: a field is missing, unknown or of another type; the message names it.

    >>> decode(dict[str, int], {"n": "three"}, "it")
    Traceback (most recent call last):
    holdfast.errors.UserError: it.n should be int, got str (three).
    """
    if kind is Any:
        return value
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else decode(get_args(kind)[0], value, where)
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _decode_fields(kind, value, where)
    origin: Any = get_origin(kind) or kind
    accepted: Any = {float: (int, float), tuple: list}.get(origin, origin)
    if not isinstance(value, accepted) or (isinstance(value, bool) and origin is not bool):
        raise UserError(f"{where} should be {origin.__name__}, got {type(value).__name__} ({str(value)[:40]}).")
    if origin is dict and get_args(kind):
        return {k: decode(get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin in (tuple, list):
        item = get_args(kind)[0]
        if value and set(map(type, value)) <= _PLAIN.get(item, set()):  # a long column at once
            return origin(value)
        return origin(decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    return value


def _decode_fields(kind: Any, value: Any, where: str) -> Any:
    """An object as a dataclass or a TypedDict."""
    if not isinstance(value, dict):
        raise UserError(f"{where} should be an object, got {type(value).__name__}.")
    hints = get_type_hints(kind)
    if is_typeddict(kind):
        marked = get_type_hints(kind, include_extras=True)  # __required_keys__ cannot see through postponed annotations
        required = {key for key in hints if kind.__total__ or get_origin(marked[key]) is Required}
        required -= {key for key in hints if get_origin(marked[key]) is NotRequired}
        known = {key: decode(hints[key], value[key], f"{where}.{key}") for key in hints if key in value}
        made: Any = {**value, **known}
    else:
        fields = {f.name: f for f in dataclasses.fields(kind)}
        if unknown := sorted(set(value) - set(fields)):
            raise UserError(f"{where} has the field '{unknown[0][:60]}', which this holdfast does not know.")
        required = {k for k, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
        made = None
    if missing := sorted(required - set(value)):
        raise UserError(f"{where}.{missing[0]} is missing.")
    return made if made is not None else kind(**{k: decode(hints[k], v, f"{where}.{k}") for k, v in value.items()})


@contextmanager
def understood(path: Path | str, *, prefix: bool = True) -> Iterator[None]:
    """While a file's content is put to use: what does not fit together becomes a UserError that names the file.

    Args:
        path: the file that the content came from, or files in words.
        prefix: put the file's name before other UserErrors as well.

    Raises:
        UserError: the content is not what this holdfast writes.
    """
    try:
        yield
    except UserError as error:
        if not prefix:
            raise
        raise UserError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise UserError(f"{path} holds something that this holdfast did not write ({reason}). {RESTORE}") from error


def inside(folder: Path, name: str, what: str) -> Path:
    """The path that a file in a folder names, which may not lead out of the folder.

    Args:
        folder: the folder.
        name: a relative path, as the file holds it.
        what: the file and the field, for the error.

    Returns:
        ``folder / name``.

    Raises:
        UserError: the path is absolute, or leads out of the folder, by .. or by a link.
    """
    try:
        (folder / name).exists()  # refuses what is no path: too long, or with a zero byte
        stays = (folder / name).resolve().is_relative_to(folder.resolve()) and not os.path.isabs(name)
    except (OSError, ValueError, RuntimeError):
        stays = False
    if not stays or "\0" in name:
        raise UserError(f"{what} names {name[:80]!r}, outside of {folder}: a path in a folder may not leave it.")
    return folder / name


def save_tensors(
    path: str | Path,
    kind: str,
    version: int,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    *,
    packed: Collection[str] = (),
) -> None:
    """Write tensors and metadata to one safetensors file, atomically, with a checksum of the whole file.

    Args:
        path: file to write.
        kind: what the file is, such as "checkpoint"; ``load_tensors`` refuses another kind.
        version: format version of this kind.
        tensors: by name, on any device; views and graphs are written as plain values.
        metadata: anything JSON can hold.
        packed: names of tensors to compress, without loss, by zlib.

    Raises:
        UserError: the file could not be written. An older file at ``path`` is unchanged.
    """
    import safetensors.torch  # imported here so that results and the report load without torch

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"holdfast": kind, "version": str(version), "about": json.dumps(metadata)}
    stored, layout = {**plain}, {}
    for name in packed:
        stored[name], how = _pack(plain[name])
        layout[name] = [str(plain[name].dtype).removeprefix("torch."), list(plain[name].shape), *how]
    if layout:
        header["packed"] = json.dumps(layout)
    content = bytearray(safetensors.torch.save(stored, {**header, "checksum": _NO_CHECKSUM}))
    at = content.index(_CHECKSUM) + len(_CHECKSUM)
    content[at : at + len(_NO_CHECKSUM)] = hashlib.blake2b(content, digest_size=16).hexdigest().encode()
    write_atomic(path, bytes(content))


_CHECKSUM = b'"checksum":"'  # in the file's header; a quote inside another value has a backslash before it
_NO_CHECKSUM = "0" * 32  # in its place while the checksum is computed
_HEADER = {"holdfast", "version", "about", "packed", "checksum", "format"}


BLOCK = 2**20  # values that are packed together


def _pack(tensor: Tensor) -> tuple[Tensor, list[str]]:
    """(a tensor's bytes, compressed: (M,) uint8; how, beside zlib). Nothing is lost.

    Adversarial images are clean ones of 256 levels, moved a little: float32 in [0, 1] is written as the nearest levels,
    and the distance of the bits from them. That takes a tenth to a half less than the values themselves.
    """
    import numpy as np
    import torch

    plain = tensor.reshape(-1, 1).view(torch.uint8).numpy().reshape(-1)
    in_levels = tensor.dtype == torch.float32 and bool(((tensor >= 0) & (tensor <= 1)).all())  # no NaN
    packing, size = zlib.compressobj(1), tensor.element_size() * BLOCK
    blocks = (plain[start : start + size] for start in range(0, len(plain), size))
    parts = [packing.compress(_to_levels(block) if in_levels else block.tobytes()) for block in blocks]
    content = b"".join([*parts, packing.flush()])
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy()), ["levels"] if in_levels else []


def _to_levels(block: Any) -> bytes:
    """The bytes of n float32: n differences of levels, then n bit distances, zigzag, their lowest bytes first."""
    import numpy as np

    values = block.view(np.float32)
    levels = np.rint(values * np.float32(255)).astype(np.uint8)
    apart = values.view(np.int32) - (levels.astype(np.float32) / np.float32(255)).view(np.int32)
    zigzag = (apart << 1) ^ (apart >> 31)
    in_planes = zigzag.view(np.uint8).reshape(-1, 4).T
    return bytes(np.diff(levels, prepend=np.uint8(0)).tobytes() + in_planes.tobytes())


def _from_levels(block: Any) -> Any:
    """The inverse of ``_to_levels``: (4 n,) uint8."""
    import numpy as np

    n = len(block) // 5
    levels = np.cumsum(block[:n], dtype=np.uint8)
    zigzag = np.ascontiguousarray(block[n:].reshape(4, n).T).view(np.uint32)[:, 0]
    apart = (zigzag >> 1).view(np.int32) ^ -((zigzag & 1).view(np.int32))
    return ((levels.astype(np.float32) / np.float32(255)).view(np.int32) + apart).view(np.uint8)


def _unpack(stored: Tensor, dtype: str, shape: list[int], how: str) -> Tensor:
    """The tensor that ``_pack`` was given. Raises ValueError where it is another one."""
    import numpy as np
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or min(shape, default=0) < 0 or how not in ("", "levels"):
        raise ValueError(f"a packed tensor of {dtype[:20]} {shape} {how[:20]}")
    if how and kind != torch.float32:
        raise ValueError(f"levels of {dtype[:20]}")
    width = 5 if how else kind.itemsize
    expected = math.prod(shape) * width
    unpacking = zlib.decompressobj()
    try:
        content = unpacking.decompress(stored.numpy().tobytes(), expected + 1)  # never more than its shape says
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(content) != expected:
        raise ValueError(f"a packed tensor of {len(content)} bytes, expected {expected}")
    plain = np.frombuffer(content, np.uint8)
    if how:
        blocks = [plain[start : start + width * BLOCK] for start in range(0, expected, width * BLOCK)]
        plain = np.concatenate([_from_levels(block) for block in blocks] or [plain])
    return torch.from_numpy(plain.copy()).view(-1, kind.itemsize).view(kind).view(shape)


def load_tensors(
    path: str | Path, kind: str, version: int, about: Any = dict[str, Any]
) -> tuple[dict[str, Tensor], Any]:
    """Read a file that ``save_tensors`` wrote.

    Args:
        path: file to read.
        kind: the kind that it must have.
        version: the format version that it must have.
        about: the type that its metadata must have, as ``decode`` takes it.

    Returns:
        (tensors by name, metadata). The tensors do not refer to the file and may be changed.

    Raises:
        UserError: the file is missing, truncated, of another kind or version, or not what its checksum says.

    Warns:
        UserWarning: an earlier holdfast wrote the file, without a checksum: damage would not be noticed.
    """
    import safetensors.torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no {kind} at {path}.")
    try:
        content = path.read_bytes()  # read once: a writer may replace the file at any moment
        tensors = safetensors.torch.load(content)
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size]).get("__metadata__", {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). It is cut short or damaged. {RESTORE}") from None
    if header.get("holdfast") != kind:
        raise UserError(f"{path} is not a holdfast {kind} (its header says {header.get('holdfast')!r}).")
    if header.get("version") != str(version):
        raise UserError(
            f"{path} is a {kind} of version {header.get('version')}; this holdfast reads version {version}. "
            "Use the holdfast that wrote it, or start over in a new folder."
        )
    _check_sum(path, content, header)
    try:
        layout = decode(dict[str, list[Any]], json.loads(header.get("packed", "{}")), "packed")
        for name, (dtype, shape, *how) in layout.items():
            kinds = decode(str, dtype, name), decode(list[int], shape, name), decode(str, "".join(how), name)
            tensors[name] = _unpack(tensors[name], *kinds)
        metadata = decode(about, json.loads(header["about"]), "about")
    except (LookupError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). It is damaged. {RESTORE}") from None
    if "checksum" not in header:
        warnings.warn(
            f"{path} has no checksum, since an earlier holdfast wrote it: damage would not be noticed.", stacklevel=2
        )
    return tensors, metadata


def _check_sum(path: Path, content: bytes, header: dict[str, str]) -> None:
    """Raise UserError unless a tensor file is what its checksum says; one without has to have an earlier header."""
    if "checksum" in header:
        at = content.find(_CHECKSUM) + len(_CHECKSUM)
        digest = hashlib.blake2b(content[:at], digest_size=16)
        digest.update(_NO_CHECKSUM.encode())
        digest.update(memoryview(content)[at + len(_NO_CHECKSUM) :])
        if digest.hexdigest() != header["checksum"]:
            raise UserError(f"{path} is damaged: its checksum does not fit its content. {RESTORE}")
    elif not header.keys() <= _HEADER or "packed" in header:
        raise UserError(f"{path} is damaged: its header is not one that holdfast writes. {RESTORE}")
