"""From encoded images, or numbers in columns, to one uint8 tensor: sizes are read before pixels, and limits named."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .. import mapped
from ..errors import UserError
from .labels import count

MAX_PIXELS = 89_478_485  # of one image; Pillow's own limit against files that claim more than they hold
ORIENTATION = 0x0112  # the EXIF tag
MAX_SIDE = 4096  # of --resize
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no format whose reader starts another program
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's convert("L")
PLAIN = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "RGBX": "RGB"}
SAID = {"L": "grey", "RGB": "RGB"}


@dataclass(frozen=True)
class Reading:
    """How files are read where they leave a choice. All are strings or numbers, for JSON and the command line.

    Args:
        image_column: the column of a table that holds the images; "" to find it.
        label_column: the column that holds the labels; "" to find it.
        convert: "rgb" or "grey": convert all images to it; "" refuses images that differ.
        resize: N: resize all images to N x N, bilinear, whatever their proportions; 0 refuses images that differ.
        skip_corrupt: leave out images that cannot be decoded, and say so; otherwise they are refused.

    Raises:
        UserError: convert or resize has another value.
    """

    image_column: str = ""
    label_column: str = ""
    convert: str = ""
    resize: int = 0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        if self.convert not in ("", "rgb", "grey"):
            raise UserError(f"convert must be 'rgb' or 'grey', got '{self.convert}'.")
        if isinstance(self.resize, bool) or not isinstance(self.resize, int) or not 0 <= self.resize <= MAX_SIDE:
            raise UserError(f"resize must be the side in pixels, 1..{MAX_SIDE} (0: as they are), got {self.resize!r}.")

    def check_no_columns(self, what: str) -> None:
        """Raise UserError if columns are named for data that has none."""
        if self.image_column or self.label_column:
            raise UserError(f"{what} is not a table: image_column and label_column are for parquet and hub data.")

    @property
    def mode(self) -> str:
        """Pillow's name of ``convert``; "" without one."""
        return {"": "", "rgb": "RGB", "grey": "L"}[self.convert]


AS_IS = Reading()
Kind = tuple[str, tuple[int, int]]  # mode, (width, height)


@dataclass(frozen=True)
class Encoded:
    """One split before its images are decoded.

    Args:
        x: encoded images, or their files; or (N, ...) numbers that ``images.arrange`` takes.
        y: (N,) numbers of ``classes``; without class names, labels as they are stored.
        classes: class names, if the source has any.
        column: where the labels are from, for errors.
        notes: what was assumed.
    """

    x: Sequence[bytes | Path] | np.ndarray
    y: np.ndarray
    classes: tuple[str, ...] | None
    column: str = "the labels"
    notes: tuple[str, ...] = ()

    @property
    def refers(self) -> bool:
        """Whether images are files of their own, which may change while the table does not."""
        if isinstance(self.x, np.ndarray):
            return False
        return any(isinstance(image, Path) for image in (self.x if isinstance(self.x, list) else self.x[:1]))


def machine_memory() -> int:
    """This machine's memory in bytes; 32 GiB where that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 32 * 2**30


def check_memory(size: int, what: str, hint: str, share: str = "half", where: Path | None = None) -> None:
    """Refuse what does not fit before it is allocated.

    Args:
        size: bytes.
        what: what takes them, for the error.
        hint: what to do.
        share: "half" or "a quarter" of this machine's memory is the limit.
        where: an existing folder that they are written to: its disk is the limit then.

    Raises:
        UserError: it is more.
    """
    if where is not None:
        if size > (free := shutil.disk_usage(where).free):
            need, have = size / 2**30, free / 2**30
            raise UserError(f"{what} need {need:,.1f} GiB on the disk of {where}, which has {have:,.1f} left: {hint}")
        return
    limit = machine_memory() // {"half": 2, "a quarter": 4}[share]
    if size > limit:
        need, have = size / 2**30, limit / 2**30
        raise UserError(
            f"{what} need {need:,.1f} GiB; the limit is {share} of this machine's memory, {have:.1f}: {hint}"
        )


@dataclass(frozen=True)
class _Bad:
    """An image that cannot be used, and why; ``cause``: "file", "mode" or "alpha"."""

    cause: str
    reason: str


class _Transparent(Exception):
    """An image that lets something through, though nobody said what to do with it."""


def _target(opened: Image.Image, reading: Reading) -> str:
    """The mode that an opened image is converted to; "" where only the user can say."""
    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM")):
        return reading.mode or "L"
    if opened.mode in ("I", "F"):  # no range of values that is known
        return ""
    return reading.mode or PLAIN.get(opened.mode, "")


def _is_transparent(opened: Image.Image) -> bool:
    """Whether any pixel lets something through; an alpha channel alone says nothing."""
    if not (opened.mode.endswith("A") or "transparency" in opened.info):
        return False
    return bool(opened.convert("RGBA").getchannel("A").getextrema() != (255, 255))


def _values(opened: Image.Image, mode: str, reading: Reading, seen: Counter[str]) -> np.ndarray:
    """The pixels of an opened image, (C, H, W) in ``mode``; counts what was assumed in ``seen``."""
    image = opened
    wide = opened.mode.startswith("I")
    if "16" in str([tile[3] for tile in getattr(opened, "tile", ())[:1]]) and not wide:
        seen["colour16"] += 1
    if getattr(opened, "is_animated", False):
        seen["frames"] += 1
    if "exif" in opened.info and opened.getexif().get(ORIENTATION, 1) != 1:
        seen["turned"] += 1
    if wide:
        values = np.asarray(opened).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels outside 0..65535")
        seen["grey16"] += 1
        seen["largest16"] = max(seen["largest16"], int(values.max()))
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif _is_transparent(opened):
        if not reading.mode:
            raise _Transparent
        seen["alpha"] += 1
    if image.mode != mode:
        seen[f"from {opened.mode}"] += 1
        image = image.convert(mode)
    if reading.resize and image.size != (reading.resize, reading.resize):
        seen["resized"] += 1
        image = image.resize((reading.resize, reading.resize), Image.Resampling.BILINEAR)
    values = np.asarray(image)
    return values[None] if mode == "L" else values.transpose(2, 0, 1)


def is_encoded(content: bytes) -> bool:
    """Whether bytes begin like an image in one of ``FORMATS``; its size may be too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(BytesIO(content), formats=FORMATS).close()
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow raises errors of many kinds
        return False
    return True


class Some(Sequence[Any]):
    """Some of many encoded images, which are read only when they are asked for.

    Args:
        x: all of them.
        rows: (M,) the numbers of those that are meant.
    """

    def __init__(self, x: Sequence[Any] | np.ndarray, rows: np.ndarray) -> None:
        self.x, self.rows = x, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.x[int(self.rows[place])]


def decoded_size(x: Sequence[bytes | Path], reading: Reading) -> int:
    """About how many bytes images take once they are decoded, by the header of the first one that has any."""
    for i in range(min(16, len(x))):
        try:
            image = x[i]
            with Image.open(image if isinstance(image, Path) else BytesIO(image), formats=FORMATS) as opened:
                width, height = (reading.resize, reading.resize) if reading.resize else opened.size
                return len(x) * width * height * (1 if _target(opened, reading) == "L" else 3)
        except Exception:  # it is named when it is decoded
            continue
    return 0


class Decoded(NamedTuple):
    """Decoded images.

    Attributes:
        x: (N, C, H, W) uint8; what stands at damaged images means nothing.
        notes: what was assumed.
        damaged: numbers of the images that cannot be decoded, where these are to be skipped.
    """

    x: Tensor
    notes: list[str]
    damaged: list[int]


def decode(
    x: Sequence[bytes | Path], what: str, reading: Reading, *, path: Path | None = None, skip: bool = False
) -> Decoded:
    """Decode images to one tensor.

    Read as they are: grey, RGB, and what is one of them in another form (black and white, palette, opaque alpha).
    16-bit grey is scaled to 8 bits by value / 257. Everything else is refused until ``reading`` says how.

    Args:
        x: encoded images, or their files.
        what: name of the data, for errors and notes.
        reading: how to convert and resize.
        path: a .npy file that the tensor is mapped from; None to hold it in memory.
        skip: leave out images that cannot be decoded.

    Returns:
        The tensor, with what was assumed.

    Raises:
        UserError: there is no image, one cannot be decoded, they differ in size or mode, or they need too much memory.
    """

    def name(i: int) -> str:
        image = x[i]
        row = x.rows[i] if isinstance(x, Some) else i
        return f"image '{image}'" if isinstance(image, Path) else f"the image in row {row} of {what}"

    kinds: list[Kind | None] = [None] * len(x)  # as they are
    bad: dict[int, _Bad] = {}
    kept, out = torch.empty(0), np.empty(0, dtype=np.uint8)
    wanted: Kind | None = None

    def read(i: int, seen: Counter[str] | None = None) -> Kind | None:
        """What image i is to become, by its header; with ``seen`` it is decoded, if that is what is wanted."""
        try:
            image = x[i]
            with Image.open(image if isinstance(image, Path) else BytesIO(image), formats=FORMATS) as opened:
                size, mode = opened.size, _target(opened, reading)
                kinds[i] = (mode or opened.mode, size)
                if size[0] * size[1] > MAX_PIXELS:
                    bad[i] = _Bad("file", f"it claims {size[0]}x{size[1]} pixels, the limit is {MAX_PIXELS:,}")
                elif not mode:
                    bad[i] = _Bad("mode", opened.mode)
                else:
                    kind = (mode, (reading.resize, reading.resize) if reading.resize else size)
                    if seen is not None and kind == wanted:
                        out[i] = _values(opened, mode, reading, seen)
                    return kind
        except _Transparent:
            bad[i] = _Bad("alpha", "transparent")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            bad[i] = _Bad("file", f"it claims more pixels than the limit of {MAX_PIXELS:,}")
        except Exception as error:  # Pillow raises errors of many kinds on damaged files
            bad[i] = _Bad("file", "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)[:200])
        return None

    def fill(rows: range) -> Counter[str]:
        seen: Counter[str] = Counter()
        for i in rows:
            read(i, seen)
        mapped.release(kept)
        return seen

    if not len(x):
        raise UserError(f"{what} is empty: expected at least one image.")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        first, wanted = next(((i, kind) for i in range(len(x)) if (kind := read(i)) is not None), (0, None))
        if wanted is None:
            raise _refusal(bad, name, skip)
        mode, (width, height) = wanted
        channels = {"L": 1, "RGB": 3}[mode]
        shape = (len(x), channels, height, width)
        hint = "use --resize N (in Python resize=N), or fewer images."
        said = f"the {len(x):,} images of {what}, if all are {width}x{height} like {name(first)},"
        check_memory(math.prod(shape), said, hint, where=None if path is None else path.parent)
        kept = torch.empty(shape, dtype=torch.uint8) if path is None else mapped.create(path, shape, torch.uint8)
        out = kept.numpy()
        # small images decode faster than threads can hand over the interpreter lock; a pool pays from about 64x64
        with ThreadPoolExecutor(1 if out[0].size < 64 * 64 and not reading.resize else os.cpu_count()) as pool:
            parts = list(pool.map(fill, (range(i, min(i + 256, len(out))) for i in range(0, len(out), 256))))
    damaged = sorted(i for i, one in bad.items() if skip and one.cause == "file")
    if len(damaged) < len(bad) or len(damaged) == len(x):
        raise _refusal(bad, name, skip)
    for i in damaged:
        kinds[i] = wanted
    _same_kind(kinds, wanted, name, reading)
    notes = _notes(parts, mode, what, reading)
    if damaged:
        left_out = count(len(damaged), "image cannot be decoded and is", "images cannot be decoded and are")
        named = [f"{name(i)} ({bad[i].reason})" for i in damaged[:3]]
        notes.append(f"{what}: {left_out} left out: {', '.join(named)}{', ...' if len(damaged) > 3 else ''}.")
    return Decoded(kept, notes, damaged)


def _refusal(bad: dict[int, _Bad], name: Callable[[int], str], skip: bool) -> UserError:
    """One sentence about the images that cannot be used, with the first three names."""
    cause = next(cause for cause in ("file", "mode", "alpha") if any(one.cause == cause for one in bad.values()))
    rows = sorted(i for i, one in bad.items() if one.cause == cause)
    first = name(rows[0])
    more = f", and {len(rows) - 1:,} more: {', '.join(map(name, rows[1:3]))}" if len(rows) > 1 else ""
    if cause == "file":
        them = "them" if more else "it"
        leave = "" if skip else f", or leave {them} out with --skip-corrupt (in Python skip_corrupt=True)"
        return UserError(f"{first} cannot be decoded ({bad[rows[0]].reason}){more}: replace or remove {them}{leave}.")
    fix = "--convert rgb or --convert grey (in Python convert='rgb')"
    if cause == "alpha":
        return UserError(f"{first} is transparent in part{more}: {fix} drops the transparency.")
    mode = bad[rows[0]].reason
    if mode in ("I", "F"):
        return UserError(f"{first} has 32-bit pixels (mode {mode}){more}: their range is not known. Save 8 or 16 bits.")
    return UserError(f"{first} has mode {mode}{more}: expected grey (L) or RGB. Use {fix}.")


def _same_kind(
    kinds: Sequence[Kind | None],
    wanted: Kind,
    name: Callable[[int], str],
    reading: Reading,
) -> None:
    """Refuse images of several sizes or modes; those that are fewest are named, whichever came first."""
    # what is converted or resized anyway does not count
    plain = [k and (wanted[0] if reading.mode else k[0], wanted[1] if reading.resize else k[1]) for k in kinds]
    common = Counter(plain).most_common(1)[0][0]
    rows = [i for i, kind in enumerate(plain) if kind != common]
    if not rows or common is None:
        return

    def say(i: int) -> str:
        mode, (width, height) = kinds[i] or ("", (0, 0))
        return f"{name(i)} is {width}x{height} {mode}"

    fixes = {1: ("--resize N", "resize=N"), 0: ("--convert rgb or grey", "convert='rgb'")}
    differ = [fix for part, fix in fixes.items() if any((plain[i] or common)[part] != common[part] for i in rows)]
    command, python = " and ".join(fix for fix, _ in differ), ", ".join(fix for _, fix in differ)
    more = f" (and {len(rows) - 3:,} more)" if len(rows) > 3 else ""
    raise UserError(
        f"{', '.join(map(say, rows[:3]))}{more}, but {say(plain.index(common))}: resize or convert all to one size and "
        f"mode, with {command} (in Python {python})."
    )


def _notes(parts: Sequence[Counter[str]], mode: str, what: str, reading: Reading) -> list[str]:
    """What was assumed or changed while decoding, a sentence each."""
    seen: Counter[str] = sum(parts, Counter())
    largest = max(part["largest16"] for part in parts)
    notes = []
    if seen["grey16"]:
        few = f" The largest value is {largest}: if they hold fewer bits, scale them first." if largest < 2**15 else ""
        notes.append(f"{what}: {count(seen['grey16'], '16-bit grey image')} scaled to 8 bits, value / 257.{few}")
    if seen["colour16"]:
        notes.append(
            f"{what}: {count(seen['colour16'], '16-bit colour image')} read as 8 bits, value / 256 rounded down."
        )
    if seen["frames"]:
        notes.append(f"{what}: {count(seen['frames'], 'image')} of several frames: the first is used.")
    if seen["turned"]:
        turned = count(seen["turned"], "image")
        notes.append(f"{what}: {turned} with an EXIF orientation, which is not applied: pixels are read as stored.")
    changed = {key[5:]: count for key, count in seen.items() if key.startswith("from ")}
    if changed:
        listed = ", ".join(f"{count:,} of mode {key}" for key, count in sorted(changed.items()))
        notes.append(f"{what}: images were converted to {SAID[mode]}: {listed}.")
    if seen["alpha"]:
        notes.append(f"{what}: the transparency of {count(seen['alpha'], 'image')} was dropped.")
    if seen["resized"]:
        side = f"{reading.resize}x{reading.resize}"
        notes.append(f"{what}: {count(seen['resized'], 'image')} resized to {side}, bilinear; proportions may change.")
    return notes


def arrange(values: np.ndarray, what: str, reading: Reading) -> tuple[Tensor, list[str]]:
    """Numbers from columns as images (N, C, H, W), uint8 or float.

    Args:
        values: (N, D) flat, (N, H, W), (N, H, W, C) or (N, C, H, W) numbers.
        what: name of the data, for errors and notes.
        reading: how to convert and resize.

    Returns:
        (the images, notes on what was assumed).

    Raises:
        UserError: the shape leaves a choice, or the values are neither 0..255 nor [0, 1].

    >>> arrange(np.zeros((5, 784), np.int64), "flat", Reading())[0].shape
    torch.Size([5, 1, 28, 28])
    """
    notes = []
    shape = values.shape
    if values.ndim == 2:
        side = round(shape[1] ** 0.5)
        if side * side != shape[1]:
            hint = "only squares of grey pixels are unambiguous. Use nested lists, or data.from_arrays."
            raise UserError(f"{what} has {shape[1]} pixels a row without a shape: {hint}")
        values = values.reshape(len(values), 1, side, side)
        notes.append(f"{what}: rows of {shape[1]} pixels were read as {side}x{side} grey images, row by row.")
    elif values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4 and (shape[1] in (1, 3)) != (shape[3] in (1, 3)):
        values = values if shape[1] in (1, 3) else values.transpose(0, 3, 1, 2)
    else:
        hint = "expected H x W, H x W x C or C x H x W with 1 or 3 channels. Use data.from_arrays with (N, C, H, W)."
        raise UserError(f"an image of {what} has the shape {' x '.join(map(str, shape[1:]))}: {hint}")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
        notes.append(f"{what}: the pixels are booleans, read as black and white.")
    elif values.dtype.kind in "iu" or (values.dtype.kind == "f" and values.max(initial=0) > 1):
        whole = values.dtype.kind in "iu" or bool((values == np.round(values)).all())
        low, high = values.min(initial=0), values.max(initial=0)
        if not whole or not (low >= 0 and high <= 255):
            hint = "expected whole numbers in 0..255 or floats in [0, 1]. Scale them first."
            raise UserError(f"the pixels of {what} run from {low:g} to {high:g}: {hint}")
        if values.dtype.kind == "f":
            notes.append(f"{what}: the pixels are whole floats up to {high:g}, read as 0..255.")
        values = values.astype(np.uint8)
    return refit(torch.from_numpy(np.ascontiguousarray(values)), reading), notes


def refit(x: Tensor, reading: Reading) -> Tensor:
    """Convert and resize images that are numbers already, as ``decode`` does encoded ones.

    Args:
        x: (N, C, H, W), uint8 or float.
        reading: how.

    Returns:
        (N, C', H', W') of x's dtype; x itself where nothing changes.
    """
    if reading.mode == "RGB" and x.shape[1] == 1:
        x = x.repeat(1, 3, 1, 1)
    elif reading.mode == "L" and x.shape[1] == 3:
        grey = torch.einsum("nchw,c->nhw", x.float(), torch.tensor(LUMA))[:, None]
        x = grey if x.is_floating_point() else grey.round().to(x.dtype)
    side = reading.resize
    if side and tuple(x.shape[2:]) != (side, side):
        check_memory(len(x) * x.shape[1] * side * side * 4, "the resized images", "use a smaller --resize.")
        resized = F.interpolate(x.float(), (side, side), mode="bilinear", antialias=True)
        x = resized if x.is_floating_point() else resized.round().clamp(0, 255).to(x.dtype)
    return x
