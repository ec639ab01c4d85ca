"""Data sets as tensors: read once, checked once, resident on one device, cut by fixed rules.

An official test split is the test set, and ``val`` is cut from train. A data set without one is dealt into n stratified
folds, one of which is the test set. No cut has a random state: a sample's place in it is a hash of its number and the
seed, the same on every machine and in every version, whatever ran before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from holdfast.errors import UserError, unknown

if TYPE_CHECKING:
    import datasets  # at run time only where a source is decoded for the first time: the import takes a second

T = TypeVar("T")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
SPLITS = ("train", "test", "val", "valid", "validation")
FOLD_SEED, LIMIT_SEED = -1, -2  # these cuts do not move with the user's seed: runs with different seeds stay paired


@dataclass(frozen=True)
class Data:
    """Samples on one device. x: (N, C, H, W), uint8, or float32 in [0, 1] if the user's own array was float.

    y: (N,) int64. index: (N,) int64, the sample's number in its source split; it stays with it through every cut.
    """

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor | slice) -> Data:
        """The samples at `rows`, in that order."""
        return Data(self.x[rows], self.y[rows], self.index[rows])

    def to(self, device: str | torch.device) -> Data:
        """The same samples on another device."""
        return Data(self.x.to(device), self.y.to(device), self.index.to(device))


@dataclass(frozen=True)
class Split:
    """One data set, cut. name: what the user asked for. classes: the names of labels 0..K-1.

    fingerprint: a hash of test x and y (after `limit`), so that stored adversarial examples can be checked against the
    data they were made from.
    """

    name: str
    train: Data
    val: Data
    test: Data
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every sample."""
        c, h, w = self.train.x.shape[1:]
        return c, h, w


class _Source(NamedTuple):  # a data set as it came: checked, not yet cut
    train: Data
    test: Data | None
    classes: tuple[str, ...]


# one split before decoding: encoded images or their files, labels, class names if the source has any
Part = tuple[list[bytes | Path], np.ndarray, tuple[str, ...] | None]


def pixels(x: Tensor) -> Tensor:
    """Pixels in [0, 1] as a model takes them: uint8 becomes float32 x / 255, float passes through.

    >>> pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(255)
    if not x.is_floating_point():
        raise UserError(f"x is {x.dtype}: expected uint8 in 0..255 or float in [0, 1]. Convert it first.")
    return x


def standardisation(data: Data) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel's pixels in [0, 1], both (C,) float32: layer 0 of a model.

    std is at least 1/255, one grey level, so that a constant channel does not blow up.
    """
    if not len(data):
        raise UserError("standardisation needs samples, and this data is empty: pass the training data.")
    total, squares = torch.zeros(2, data.x.shape[1], dtype=torch.float64)
    for chunk in data.x.split(
        4096
    ):  # float64 of all at once would not fit; on the CPU, as not every device has float64
        p = pixels(chunk.cpu()).double()
        total += p.sum((0, 2, 3))
        squares += p.square().sum((0, 2, 3))
    mean = total / data.x[:, 0].numel()
    variance = squares / data.x[:, 0].numel() - mean.square()
    std = variance.clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.float().to(data.x.device), std.float().to(data.x.device)


def augment(x: Tensor, generator: torch.Generator, *, pad: int, flip: bool) -> Tensor:
    """A random crop of each sample, padded by `pad` zeros on every side, and its mirror image half the time if `flip`.

    x: (N, C, H, W) of any dtype on any device. generator: the only source of chance; one on the CPU draws the same for
    every device. pad: >= 0 pixels; all (2 pad + 1)^2 crops are equally likely. Returns x's shape, dtype and device;
    with pad=0 and flip=False, x itself.

    >>> augment(torch.full((1, 1, 1, 3), 7), torch.Generator().manual_seed(0), pad=0, flip=True)
    tensor([[[[7, 7, 7]]]])
    """
    if pad < 0:
        raise UserError(f"pad is {pad}: expected 0 or more pixels.")
    if pad == 0 and not flip:
        return x
    n, c, h, w = x.shape
    down, right, mirror = (
        torch.randint(high, (n, 1), generator=generator, device=generator.device).to(x.device)
        for high in (2 * pad + 1, 2 * pad + 1, 2 if flip else 1)
    )
    rows = down + torch.arange(h, device=x.device)
    cols = right + torch.arange(w, device=x.device)
    cols = torch.where(mirror.bool(), cols.flip(1), cols)
    sample = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return F.pad(x, (pad, pad, pad, pad))[sample, channel, rows[:, None, :, None], cols[:, None, None, :]]


def check_arrays(x: Any, y: Any, *, classes: Sequence[str] | None = None, what: str = "the data") -> Data:
    """A user's own arrays as `Data` on the CPU, or a `UserError` that says what is wrong with them.

    x: (N, C, H, W), uint8, or float in [0, 1]. y: (N,) integers in 0..K-1, K = len(classes) if given. what: a name
    for errors. Refused: an empty set, wrong dimensions or types, NaN, infinity, values out of range.

    >>> check_arrays(np.full((2, 1, 4, 4), 9.0), [0, 1])
    Traceback (most recent call last):
    holdfast.errors.UserError: x of the data runs from 9 to 9: float must lie in [0, 1]. Divide by 255, or pass uint8.
    """
    try:  # numpy is copied: torch warns about arrays it may not write
        x, y = (v.detach().cpu() if isinstance(v, Tensor) else torch.from_numpy(np.array(v)) for v in (x, y))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is not made of numbers ({error}): pass numpy arrays or tensors x and y.") from error
    shape = tuple(x.shape)
    if x.ndim != 4:
        hint = " Add the channel with x[:, None]." if x.ndim == 3 else ""
        raise UserError(f"x of {what} has shape {shape}: expected (N, C, H, W).{hint}")
    if not x.numel():
        raise UserError(f"{what} is empty (x has shape {shape}): at least one sample is needed.")
    if shape[1] > 4 and shape[3] <= 4:
        hint = "use x.transpose(0, 3, 1, 2) in numpy, x.permute(0, 3, 1, 2) in torch."
        raise UserError(f"x of {what} has shape {shape}, channels last: expected (N, C, H, W); {hint}")
    if x.is_floating_point():
        x = x.to(torch.float32)
        if not x.isfinite().all():
            raise UserError(f"x of {what} holds NaN or infinity: float must lie in [0, 1]. Clean the array first.")
        if x.min() < 0 or x.max() > 1:
            span = f"{float(x.min()):g} to {float(x.max()):g}"
            raise UserError(f"x of {what} runs from {span}: float must lie in [0, 1]. Divide by 255, or pass uint8.")
    elif x.dtype != torch.uint8:
        raise UserError(f"x of {what} is {x.dtype}: expected uint8 in 0..255 or float in [0, 1]. Convert it first.")
    if y.shape != x.shape[:1]:
        raise UserError(f"y of {what} has shape {tuple(y.shape)}: expected ({len(x)},), one label for each of x.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"y of {what} is {y.dtype}: labels must be integers. Use y.astype('int64').")
    y = y.to(torch.int64)
    low, high = int(y.min()), int(y.max())
    if low < 0:
        hint = "-1 often marks a test split whose labels are withheld: use another split."
        raise UserError(f"label {low} in row {int(y.argmin())} of {what} is negative: labels start at 0. {hint}")
    if classes is not None and high >= len(classes):
        hint = f"with {len(classes)} classes labels are 0..{len(classes) - 1}. Relabel, or name more classes."
        raise UserError(f"label {high} in row {int(y.argmax())} of {what} is out of range: {hint}")
    return Data(x.contiguous(), y, torch.arange(len(y)))


def _source(train: tuple[Any, Any], test: tuple[Any, Any] | None, classes: Sequence[str] | None, what: str) -> _Source:
    """Check the parts by themselves and against each other."""
    data = check_arrays(*train, classes=classes, what=f"{what} (train)" if test else what)
    present = data.y.unique().tolist()
    if classes is None:  # a gap is then more likely a mistake (labels from 1) than an empty class
        missing = sorted(set(range(present[-1])) - set(present))
        if missing:
            hint = "without class names labels must be 0..K-1 with none missing. Relabel, or name the classes."
            raise UserError(f"label {missing[0]} never occurs in {what}, though {present[-1]} does: {hint}")
        classes = [str(k) for k in present]
    if len(present) < 2:
        raise UserError(f"{what} has one class only ('{classes[present[0]]}'): a classifier needs at least two.")
    if len(set(classes)) < len(classes):
        raise UserError(f"{what} has a class name twice among {', '.join(sorted(classes))}: make them distinct.")
    held = None if test is None else check_arrays(*test, classes=classes, what=f"{what} (test)")
    if held and (held.x.shape[1:], held.x.dtype) != (data.x.shape[1:], data.x.dtype):
        a, b = (f"{tuple(d.x.shape[1:])} {d.x.dtype}" for d in (data, held))
        raise UserError(f"samples of {what} are {a} in train but {b} in test: resize or convert one of the two.")
    return _Source(data, held, tuple(classes))


def _keys(data: Data, seed: int) -> np.ndarray:
    """(N,) uint64, hashes of seed and index, to shuffle by: numpy's random streams may change with its version."""
    hashes = (hashlib.blake2b(b"%d %d" % (seed, i), digest_size=8).digest() for i in data.index.tolist())
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def _prefix(data: Data, seed: int, *, balanced: bool) -> np.ndarray:
    """(N,) rows in a shuffled order whose every beginning has classes in equal numbers (balanced) or in proportion."""
    y, keys = data.y.numpy(), _keys(data, seed)
    by_class, sizes = np.lexsort((keys, y)), np.bincount(y)
    rank = np.empty(len(y), dtype=np.int64)  # the sample's place within its class
    rank[by_class] = np.arange(len(y)) - (np.cumsum(sizes) - sizes)[y[by_class]]
    return np.lexsort((keys, rank if balanced else (rank + 0.5) / sizes[y]))


def _divide(data: Data, rows: np.ndarray) -> tuple[Data, Data]:
    """The samples at `rows` and the others, both in source order."""
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.from_numpy(rows)] = True
    return data.take(chosen), data.take(~chosen)


def _cut(
    name: str,
    source: Callable[[], _Source],
    *,
    device: str | torch.device = "cpu",
    fold: tuple[int, int] | None = None,
    val: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    limit_train: int | None = None,
) -> Split:
    """Check the wishes, then read the source (which may mean a download), then cut. See `load`."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{device}' cannot be used ({reason}): use 'cpu' or one that torch sees.") from error
    if fold is not None and not (len(fold) == 2 and fold[1] >= 2 and 0 <= fold[0] < fold[1]):
        raise UserError(f"fold is {fold}: expected (k, n) with n >= 2 folds and k one of 0..n-1.")
    if not 0 <= val < 1:
        raise UserError(f"val is {val}: expected the share of train to hold out, 0 <= val < 1.")
    for key, count in (("limit", limit), ("limit_train", limit_train)):
        if count is not None and count < 1:
            raise UserError(f"{key} is {count}: expected a number of samples, 1 or more, or None for all.")

    train, given, classes = source()
    if given is not None and fold is not None:
        raise UserError(f"fold is {fold}, but {name} has a test split of its own: leave fold out.")
    present = set(train.y.tolist())
    test = given
    if test is None:
        k, n = fold or (0, 5)
        sizes = np.bincount(train.y.numpy()).tolist()
        if n > len(train) or 1 in sizes:
            why = f"class '{classes[sizes.index(1)]}' has one sample" if 1 in sizes else f"it has {len(train)} samples"
            raise UserError(f"{name} cannot be cut into {n} folds ({why}): add samples, or a test split of its own.")
        dealt = np.lexsort((_keys(train, FOLD_SEED), train.y.numpy()))  # class by class, to one fold after the other
        test, train = _divide(train, dealt[k::n])
    if limit is not None:
        test, _ = _divide(test, _prefix(test, LIMIT_SEED, balanced=True)[:limit])
    if limit_train is not None:
        train, _ = _divide(train, _prefix(train, LIMIT_SEED, balanced=True)[:limit_train])
    held, count = max(1, round(val * len(train))) if val else 0, len(train)
    validation, train = _divide(train, _prefix(train, seed, balanced=False)[:held])
    lost = sorted(present - set(train.y.tolist()))
    if lost:
        why = f"val={val} of {count} samples leaves none of class '{classes[lost[0]]}' to train on"
        raise UserError(f"{why}: lower val or raise limit_train.")
    digest = hashlib.sha256(f"{tuple(test.x.shape)} {test.x.dtype}".encode())
    digest.update(test.x.numpy().data)
    digest.update(test.y.numpy().data)
    return Split(name, train.to(device), validation.to(device), test.to(device), classes, digest.hexdigest()[:16])


def _decode(images: Sequence[bytes | Path], what: str) -> Tensor:
    """Encoded images, all of one size and mode -> (N, C, H, W) uint8."""

    def name(i: int) -> str:
        image = images[i]
        return f"image '{image}'" if isinstance(image, Path) else f"the image in row {i} of {what}"

    def read(i: int) -> tuple[str, np.ndarray]:
        image = images[i]
        try:
            with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return opened.mode, np.asarray(opened)
        except Exception as error:  # Pillow raises errors of many kinds on damaged files
            reason = "no known format" if isinstance(error, UnidentifiedImageError) else str(error)
            raise UserError(f"{name(i)} cannot be decoded ({reason}): replace or remove it.") from error

    if not images:
        raise UserError(f"{what} is empty: at least one image is needed.")
    mode, first = read(0)
    if mode not in ("L", "RGB"):
        raise UserError(f"{name(0)} has mode {mode}: expected grey (L) or RGB. Use image.convert('RGB') on all.")
    out = np.empty((len(images), *first.shape), dtype=np.uint8)

    def fill(rows: range) -> None:
        for i in rows:
            found, out_i = read(i)
            if (found, out_i.shape) != (mode, first.shape):
                a, b = (f"{v.shape[1]}x{v.shape[0]} {m}" for v, m in ((out_i, found), (first, mode)))
                raise UserError(f"{name(i)} is {a}, but {name(0)} is {b}: resize or convert all to one size and mode.")
            out[i] = out_i

    # small images decode faster than threads hand over the interpreter lock; a pool pays from about 64x64
    with ThreadPoolExecutor(1 if first.size < 64 * 64 else os.cpu_count()) as pool:
        for _ in pool.map(fill, (range(i, min(i + 256, len(out))) for i in range(0, len(out), 256))):
            pass
    x = torch.from_numpy(out)
    return x[:, None] if mode == "L" else x.permute(0, 3, 1, 2).contiguous()


def _assemble(found: Mapping[str, T], read: Callable[[T, str], Part], what: str) -> _Source:
    """Choose the splits among those found, read them, compare class names, decode, check."""
    if {"train", "test"} <= set(found):
        chosen = ["train", "test"]  # a validation split of the source is left alone: val is cut from train
    elif len(found) == 1:
        chosen = list(found)
    else:
        hint = "expected train and test, or one to cut. Rename one, or use data.from_arrays."
        raise UserError(f"{what} has the splits {', '.join(sorted(found))}: {hint}")
    named = {f"{what} ({key})" if len(chosen) == 2 else what: found[key] for key in chosen}
    parts = {name: read(split, name) for name, split in named.items()}
    names = [part[2] for part in parts.values()]
    if names[0] != names[-1]:
        odd = ", ".join(map(repr, sorted(set(names[0] or ()) ^ set(names[-1] or ())))) or "their order"
        raise UserError(f"train and test of {what} differ in their classes ({odd}): name the same ones in both.")
    pairs = [(_decode(images, name), y) for name, (images, y, _) in parts.items()]
    return _source(pairs[0], pairs[1] if len(pairs) == 2 else None, names[0], what)


def _columns(table: datasets.Dataset, what: str) -> Part:
    """Find the image and the label column by type. Of several label columns `label` is taken, else `fine_label`."""
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
    arrow = table.select_columns([*images, *labels]).with_format("arrow")[:]  # encoded bytes, no decode for each row
    y = arrow.column(labels[0])
    if y.null_count:
        raise UserError(f"column {labels[0]} of {what} has {y.null_count} empty entries: fill or drop them.")
    cells = [cell or {} for cell in arrow.column(images[0]).to_pylist()]
    content = [c.get("bytes") or (Path(c["path"]) if c.get("path") else b"") for c in cells]
    names = getattr(features[labels[0]], "names", None)
    return content, y.to_numpy(), tuple(names) if names else None


def _cached(root: str | Path, files: Sequence[Path], build: Callable[[], _Source]) -> _Source:
    """What `build` returns, kept decoded in $HOLDFAST_CACHE (default ~/.cache/holdfast), one file for each data set.

    It is built anew when name, size or time of a source file changes, or when the kept file is damaged.
    """
    origin = str(root.resolve()) if isinstance(root, Path) else root
    stats = [(os.path.relpath(f, root), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps(["1", origin, stats]).encode()).hexdigest()  # "1": raise it when the format changes
    stem = re.sub(r"[^\w.-]+", "-", Path(origin).name) + "-" + hashlib.sha256(origin.encode()).hexdigest()[:12]
    path = Path(os.environ.get("HOLDFAST_CACHE") or "~/.cache/holdfast").expanduser() / f"{stem}.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as kept:
            meta = kept.metadata() or {}
            if meta["key"] == key:
                # cloned: the file stays mapped otherwise
                pairs = [[kept.get_tensor(f"{k}.{name}").clone() for name in "xy"] for k in meta["splits"].split()]
                train, *test = (Data(x, y, torch.arange(len(y))) for x, y in pairs)
                return _Source(train, test[0] if test else None, tuple(json.loads(meta["classes"])))
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        pass  # absent or damaged: it is only a copy
    source = build()
    parts = {k: d for k, d in (("train", source.train), ("test", source.test)) if d is not None}
    tensors = {f"{k}.{name}": getattr(d, name) for k, d in parts.items() for name in "xy"}
    meta = {"key": key, "splits": " ".join(parts), "classes": json.dumps(source.classes)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            safetensors.torch.save_file(tensors, Path(scratch) / path.name, meta)
            os.replace(Path(scratch) / path.name, path)  # at once: nobody reads half a file
    except (OSError, safetensors.SafetensorError) as error:
        hint = "set HOLDFAST_CACHE to a folder that can."
        warnings.warn(f"decoded data is not kept: '{path}' cannot be written ({error}); {hint}", stacklevel=2)
    return source


def _digits() -> _Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = np.round(found.images * (255 / 16)).astype(np.uint8)[:, None]  # grey levels 0..16
    return _source((x, found.target), None, [str(k) for k in range(10)], "digits")


def _hub(repo: str) -> _Source:
    """A hub data set, fetched once; from then on the decoded copy serves, without a network."""

    def build() -> _Source:
        import datasets

        datasets.disable_progress_bars()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # prepared tables go away with it
            try:
                found = datasets.load_dataset(repo, cache_dir=scratch)
            except ConnectionError as error:
                hint = "connect once, or pass the path of a local copy. 'digits' needs no network."
                raise UserError(f"the hub cannot be reached to fetch '{repo}' ({error}): {hint}") from error
            except Exception as error:  # errors of many kinds from several libraries
                why = f"{type(error).__name__}: {error}"
                raise UserError(f"'{repo}' is neither a local path nor on the hub ({why}): check the name.") from error
            return _assemble(found, _columns, repo)

    return _cached(f"hub:{repo}", [], build)


def _parquet(root: Path) -> _Source:
    """A file, or hub layout: the file name begins with its split (train-00000-of-00002.parquet), or its folder is."""
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    found: dict[str, list[Path]] = {}
    for file in files:
        words = [re.split("[-_.]", file.name)[0], *file.relative_to(root).parts[:-1]] if root.is_dir() else []
        found.setdefault(next((w for w in words if w in SPLITS), "all"), []).append(file)

    def read(shards: list[Path], what: str) -> Part:
        import datasets
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        tables, shard = [], shards[0]
        try:
            for shard in shards:  # straight into memory: datasets' own reader leaves a copy on the disk
                tables.append(pq.ParquetFile(shard).read())
            return _columns(datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables))), what)
        except (pa.ArrowException, OSError) as error:
            hint = "it may be cut short, or differ from the files beside it. Fetch it anew."
            raise UserError(f"'{shard}' cannot be read as parquet ({error}): {hint}") from error

    return _cached(root, files, lambda: _assemble(found, read, str(root)))


def _image_folder(root: Path) -> _Source:
    """root/train/<class>/* and root/test/<class>/*, or root/<class>/*; sorted here, as index follows this order."""

    def folders(of: Path) -> list[Path]:
        return sorted(d for d in of.iterdir() if d.is_dir() and not d.name.startswith("."))

    def pictures(of: Path) -> list[Path]:
        return sorted(f for f in of.rglob("[!.]*") if f.suffix.lower() in IMAGE_SUFFIXES)

    def read(folder: Path, what: str) -> Part:
        files = {d.name: pictures(d) for d in folders(folder)}
        if not files:
            raise UserError(f"'{folder}' holds no parquet file and no folder of images per class: check the path.")
        for name, inside in files.items():
            if not inside:
                raise UserError(f"class folder '{folder / name}' holds no images: add some, or remove the folder.")
        y = np.repeat(np.arange(len(files)), [len(inside) for inside in files.values()])
        return [file for inside in files.values() for file in inside], y, tuple(files)

    nested = {d.name: d for d in folders(root) if d.name in SPLITS and folders(d)}  # not a class that is called "train"
    found = nested if "train" in nested or "test" in nested else {"all": root}
    return _cached(root, pictures(root), lambda: _assemble(found, read, str(root)))


def _find(name: str) -> _Source:
    """A key of DATASETS, else a path that exists, else a hub name."""
    if name in DATASETS:
        return DATASETS[name].read()
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"'{name}' is not a .parquet file: expected one, or a folder.")
    if path.exists():
        return _parquet(path) if path.is_file() or any(path.rglob("*.parquet")) else _image_folder(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and path.suffix != ".parquet":
        return _hub(name)
    if re.search(r"[/\\]", name) or name.startswith(("~", ".")) or path.suffix:
        raise UserError(f"there is no such path: '{name}'. Expected a folder or a .parquet file.")
    raise unknown("data set", name, DATASETS)


@dataclass(frozen=True)
class Entry:
    """How to read a data set, what it is, which augmentation (pad, flip) suits it, how many folds test all of it."""

    read: Callable[[], _Source]
    about: str
    pad: int
    flip: bool
    folds: int = 1


DATASETS: dict[str, Entry] = {
    "digits": Entry(_digits, "1,797 handwritten digits, 8x8 grey; no test split, so 5 folds; no network", 1, False, 5),
    "mnist": Entry(partial(_hub, "ylecun/mnist"), "70,000 handwritten digits, 28x28 grey, from the hub", 2, False),
    "cifar10": Entry(partial(_hub, "uoft-cs/cifar10"), "60,000 photographs, 32x32 RGB, from the hub", 4, True),
}


def default_folds(name: str) -> int:
    """How many folds test every sample once: 5 for digits, 1 where there is an official test split."""
    return DATASETS[name].folds if name in DATASETS else 1


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    fold: tuple[int, int] | None = None,
    val: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    limit_train: int | None = None,
) -> Split:
    """Read, check and cut a data set.

    name: a key of `DATASETS`; else the path of a .parquet file, of a folder of them in hub layout, or of an image
        folder (root/train/<class>/* and root/test/<class>/*, or root/<class>/*); else a hub name, "owner/name".
    fold: (k, n) makes the k-th of n stratified folds, k = 0..n-1, the test set; default (0, 5). Only for data without a
        test split. The n test folds together hold every sample once, and do not move with `seed`.
    val: share of train to hold out, in [0, 1), stratified, fixed by `seed`; 0 gives an empty val.
    limit, limit_train: at most so many samples of test, and of train before val is cut: classes in equal numbers as far
        as they reach, always the same samples, a smaller limit a subset of a larger one.
    Returns tensors on `device`, each part in source order. Errors: `UserError`, saying what is wrong and what to do.

    >>> digits = load("digits", fold=(2, 5))
    >>> digits.shape, len(digits.train), len(digits.val), len(digits.test)
    ((1, 8, 8), 1294, 144, 359)
    """
    name = os.fspath(name)
    cut = partial(_cut, name, partial(_find, name), device=device, fold=fold, val=val, seed=seed)
    return cut(limit=limit, limit_train=limit_train)


def from_arrays(
    x: Any,
    y: Any,
    *,
    test: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str = "arrays",
    **cut: Any,
) -> Split:
    """A user's own numpy arrays or tensors, checked, and cut as in `load`.

    x: (N, C, H, W), uint8, or float in [0, 1]. y: (N,) integers 0..K-1. test: (x, y) of the test set; without it a fold
    is cut off. classes: K names, default "0".."K-1". cut: device, fold, val, seed, limit, limit_train as in `load`.

    >>> split = from_arrays(torch.rand(20, 3, 8, 8), torch.arange(20) % 2, classes=["cat", "dog"])
    >>> len(split.train), len(split.val), len(split.test), split.classes
    (14, 2, 4, ('cat', 'dog'))
    """
    return _cut(name, lambda: _source((x, y), test, classes, name), **cut)
