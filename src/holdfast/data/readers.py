"""Readers of data sets: scikit-learn's, the hub, parquet, image folders; decoded data is cached."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError
from .dataset import Data, Source, check_source

if TYPE_CHECKING:
    import datasets  # imported where a source is first decoded, since the import takes a second

T = TypeVar("T")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
SPLITS = ("train", "test", "val", "valid", "validation")

# one split before decoding: encoded images or their files, labels, class names if the source has any
EncodedSplit = tuple[list[bytes | Path], np.ndarray, tuple[str, ...] | None]


def _decode(images: Sequence[bytes | Path], what: str) -> Tensor:
    """Decode images, all of one size and mode, to (N, C, H, W) uint8."""

    def name(i: int) -> str:
        image = images[i]
        return f"image '{image}'" if isinstance(image, Path) else f"the image in row {i} of {what}"

    def read(i: int) -> tuple[str, np.ndarray]:
        image = images[i]
        try:
            with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return opened.mode, np.asarray(opened)
        except Exception as error:  # Pillow raises errors of many kinds on damaged files
            reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
            raise UserError(f"{name(i)} cannot be decoded ({reason}): replace or remove it.") from error

    if not images:
        raise UserError(f"{what} is empty: expected at least one image.")
    mode, first = read(0)
    if mode not in ("L", "RGB"):
        raise UserError(f"{name(0)} has mode {mode}: expected grey (L) or RGB. Use image.convert('RGB') on all.")
    out = np.empty((len(images), *first.shape), dtype=np.uint8)

    def fill(rows: range) -> None:
        for i in rows:
            mode_i, out_i = read(i)
            if (mode_i, out_i.shape) != (mode, first.shape):
                a, b = (f"{v.shape[1]}x{v.shape[0]} {m}" for v, m in ((out_i, mode_i), (first, mode)))
                raise UserError(f"{name(i)} is {a}, but {name(0)} is {b}: resize or convert all to one size and mode.")
            out[i] = out_i

    # small images decode faster than threads can hand over the interpreter lock; a pool pays from about 64x64
    with ThreadPoolExecutor(1 if first.size < 64 * 64 else os.cpu_count()) as pool:
        for _ in pool.map(fill, (range(i, min(i + 256, len(out))) for i in range(0, len(out), 256))):
            pass
    x = torch.from_numpy(out)
    return x[:, None] if mode == "L" else x.permute(0, 3, 1, 2).contiguous()


def _assemble(splits: Mapping[str, T], read: Callable[[T, str], EncodedSplit], what: str) -> Source:
    """Choose train and test among a source's splits, read them, compare class names, decode, check."""
    if {"train", "test"} <= set(splits):
        chosen = ["train", "test"]  # a validation split of the source is not used: val is split off from train
    elif len(splits) == 1:
        chosen = list(splits)
    else:
        hint = "expected train and test, or a single one. Rename one, or use data.from_arrays."
        raise UserError(f"{what} has the splits {', '.join(sorted(splits))}: {hint}")
    named = {f"{what} ({key})" if len(chosen) == 2 else what: splits[key] for key in chosen}
    parts = {name: read(split, name) for name, split in named.items()}
    names = [part[2] for part in parts.values()]
    if names[0] != names[-1]:
        different = ", ".join(map(repr, sorted(set(names[0] or ()) ^ set(names[-1] or ())))) or "their order"
        raise UserError(f"train and test of {what} differ in their classes ({different}): name the same ones in both.")
    pairs = [(_decode(images, name), y) for name, (images, y, _) in parts.items()]
    return check_source(pairs[0], pairs[1] if len(pairs) == 2 else None, names[0], what)


def _columns(table: datasets.Dataset, what: str) -> EncodedSplit:
    """Find the image and the label column by type; of several label columns, take ``label``, else ``fine_label``."""
    import datasets

    features = dict(table.features)
    images = [k for k, f in features.items() if isinstance(f, datasets.Image) or (isinstance(f, dict) and "bytes" in f)]
    labels = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
    labels = labels or [k for k, f in features.items() if re.match("u?int", getattr(f, "dtype", ""))]
    labels = next(([k] for k in ("label", "fine_label") if k in labels), labels)
    if len(images) != 1 or len(labels) != 1:
        kinds = {k: f.dtype if isinstance(f, datasets.Value) else type(f).__name__ for k, f in features.items()}
        listed = ", ".join(f"{k} ({kind})" for k, kind in kinds.items())
        hint = "expected one of each. Name the label column 'label', drop other images, or use data.from_arrays."
        raise UserError(f"{what} has {len(images)} image and {len(labels)} label columns in {listed}: {hint}")
    arrow = table.select_columns([*images, *labels]).with_format("arrow")[:]  # encoded bytes, not decoded row by row
    y = arrow.column(labels[0])
    if y.null_count:
        raise UserError(f"column {labels[0]} of {what} has {y.null_count} empty entries: fill or drop them.")
    cells = [cell or {} for cell in arrow.column(images[0]).to_pylist()]
    content = [c.get("bytes") or (Path(c["path"]) if c.get("path") else b"") for c in cells]
    names = getattr(features[labels[0]], "names", None)
    return content, y.to_numpy(), tuple(names) if names else None


def _cached(root: str | Path, files: Sequence[Path], build: Callable[[], Source]) -> Source:
    """What ``build`` returns, cached in $HOLDFAST_CACHE (default ~/.cache/holdfast), one file per data set.

    It is rebuilt when name, size or time of a source file changes, or when the cached file is damaged.
    """
    origin = str(root.resolve()) if isinstance(root, Path) else root
    stats = [(os.path.relpath(f, root), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(
        json.dumps(["1", origin, stats]).encode()
    ).hexdigest()  # "1": increment when the format changes
    stem = re.sub(r"[^\w.-]+", "-", Path(origin).name) + "-" + hashlib.sha256(origin.encode()).hexdigest()[:12]
    path = Path(os.environ.get("HOLDFAST_CACHE") or "~/.cache/holdfast").expanduser() / f"{stem}.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as cached:
            meta = cached.metadata() or {}
            if meta["key"] == key:
                # cloned, since the file would stay mapped otherwise
                pairs = [[cached.get_tensor(f"{k}.{name}").clone() for name in "xy"] for k in meta["splits"].split()]
                train, *test = (Data(x, y, torch.arange(len(y))) for x, y in pairs)
                return Source(train, test[0] if test else None, tuple(json.loads(meta["classes"])))
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        pass  # missing or damaged: build it again
    source = build()
    parts = {k: d for k, d in (("train", source.train), ("test", source.test)) if d is not None}
    tensors = {f"{k}.{name}": getattr(d, name) for k, d in parts.items() for name in "xy"}
    meta = {"key": key, "splits": " ".join(parts), "classes": json.dumps(source.classes)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            safetensors.torch.save_file(tensors, Path(scratch) / path.name, meta)
            os.replace(Path(scratch) / path.name, path)  # atomic: nobody reads half a file
    except (OSError, safetensors.SafetensorError) as error:
        hint = "set HOLDFAST_CACHE to a writable folder."
        warnings.warn(f"decoded data is not cached: '{path}' cannot be written ({error}); {hint}", stacklevel=2)
    return source


def digits() -> Source:
    """Read scikit-learn's 1,797 handwritten digits; grey levels 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    x = np.round(loaded.images * (255 / 16)).astype(np.uint8)[:, None]
    return check_source((x, loaded.target), None, [str(k) for k in range(10)], "digits")


def moons() -> Source:
    """Make scikit-learn's two half circles as (1, 1, 2) images: 2,000 training and 1,000 test samples.

    The noise is 0.1. [-1.5, 2.5] x [-1, 1.5] of the plane becomes the range of pixels, so that no point is clipped. The
    classes are so close that even a perfect network has a robust accuracy of about one half at linf 0.064.
    """
    from sklearn.datasets import make_moons

    def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        points, y = make_moons(count, noise=0.1, random_state=seed)
        x = (points - [-1.5, -1.0]) / [4.0, 2.5]
        return np.round(255 * x.clip(0, 1)).astype(np.uint8)[:, None, None], y

    return check_source(draw(2000, 0), draw(1000, 1), ["upper", "lower"], "moons")


def hub(repo: str) -> Source:
    """Read a hub data set: downloaded once, then from the decoded cache, offline.

    Args:
        repo: "owner/name".

    Returns:
        The source.

    Raises:
        UserError: the hub cannot be reached, there is no such data set, or its content is invalid.
    """

    def build() -> Source:
        import datasets

        datasets.disable_progress_bars()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # for the prepared tables
            try:
                loaded = datasets.load_dataset(repo, cache_dir=scratch)
            except ConnectionError as error:
                hint = "connect once, or pass the path of a local copy. 'digits' needs no download."
                raise UserError(f"the hub cannot be reached to fetch '{repo}' ({error}): {hint}") from error
            except Exception as error:  # errors of many kinds from several libraries
                why = f"{type(error).__name__}: {error}"
                raise UserError(f"'{repo}' is neither a local path nor on the hub ({why}): check the name.") from error
            return _assemble(loaded, _columns, repo)

    return _cached(f"hub:{repo}", [], build)


def parquet(root: Path) -> Source:
    """Read a .parquet file, or a folder of them in hub layout.

    Args:
        root: the file or folder. A file's split is the first word of its name (train-00000-of-00002.parquet) or one of
            its folders.

    Returns:
        The source.

    Raises:
        UserError: a file cannot be read, or its content is invalid.
    """
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [re.split("[-_.]", file.name)[0], *file.relative_to(root).parts[:-1]] if root.is_dir() else []
        splits.setdefault(next((w for w in words if w in SPLITS), "all"), []).append(file)

    def read(shards: list[Path], what: str) -> EncodedSplit:
        import datasets
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        tables, shard = [], shards[0]
        try:
            for shard in shards:  # into memory: the reader of datasets leaves a copy on the disk
                tables.append(pq.ParquetFile(shard).read())
            return _columns(datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables))), what)
        except (pa.ArrowException, OSError) as error:
            hint = "it may be cut short, or differ from the files beside it. Download it again."
            raise UserError(f"'{shard}' cannot be read as parquet ({error}): {hint}") from error

    return _cached(root, files, lambda: _assemble(splits, read, str(root)))


def image_folder(root: Path) -> Source:
    """Read a folder of images: root/train/<class>/* and root/test/<class>/*, or root/<class>/*.

    Args:
        root: the folder; classes and files are sorted by name, which defines each sample's index.

    Returns:
        The source.

    Raises:
        UserError: there is no image, a class is empty, or an image cannot be decoded or differs in size or mode.
    """

    def folders(of: Path) -> list[Path]:
        return sorted(d for d in of.iterdir() if d.is_dir() and not d.name.startswith("."))

    def images(of: Path) -> list[Path]:
        return sorted(f for f in of.rglob("[!.]*") if f.suffix.lower() in IMAGE_SUFFIXES)

    def read(folder: Path, what: str) -> EncodedSplit:
        files = {d.name: images(d) for d in folders(folder)}
        if not files:
            raise UserError(f"'{folder}' holds no parquet file and no folder of images per class: check the path.")
        for name, inside in files.items():
            if not inside:
                raise UserError(f"class folder '{folder / name}' holds no images: add some, or remove the folder.")
        y = np.repeat(np.arange(len(files)), [len(inside) for inside in files.values()])
        return [file for inside in files.values() for file in inside], y, tuple(files)

    nested = {d.name: d for d in folders(root) if d.name in SPLITS and folders(d)}  # a class may be called "train"
    splits = nested if "train" in nested or "test" in nested else {"all": root}
    return _cached(root, images(root), lambda: _assemble(splits, read, str(root)))
