"""Readers of data sets: scikit-learn's, the hub, parquet, image folders; decoded data is cached."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch

from ..errors import UserError
from .arrays import check_labels, check_source, class_names, given_names
from .dataset import Data, DataWarning, Source
from .folders import SPLIT_NAMES, by_class, by_split, find, notes_on, skipped, subfolders, train_and_test
from .images import AS_IS, Encoded, Reading, arrange, decode, refit
from .labels import encode, same_names

T = TypeVar("T")


def _assemble(
    splits: Mapping[str, T], read: Callable[[T, str], Encoded], what: str, reading: Reading
) -> tuple[Source, bool]:
    """Choose train and test, read them, number their classes alike, decode, check; (source, whether it may be cached).

    What refers to image files of its own is not cached: they may change while the table that names them does not.
    """
    chosen, notes = train_and_test(splits, what)
    parts = [read(split, name) for name, split in chosen]
    train, test = parts[0], parts[1] if len(parts) == 2 else None
    for part in parts:
        notes += part.notes
    labels, classes = [part.y for part in parts], train.classes
    if test is not None and (train.classes is None) != (test.classes is None):
        raise UserError(f"only one of train and test of {what} has class names: give them to both, or to none.")
    if classes is None:
        labels, classes, more = encode(labels[0], labels[1] if test else None, what, train.column)
        notes += more
    elif test is not None and test.classes is not None:
        labels[1], more = same_names(classes, test.classes, labels[1], what)
        notes += more
    # labels first: they are cheap to refuse, and decoding may take minutes
    names = given_names(classes, what)
    for y, part, (name, _) in zip(labels, parts, chosen, strict=True):
        if len(y):
            checked = check_labels(torch.from_numpy(y), len(part.x), names, name)
            names = class_names(checked, names, what) if part is train else names
    images: list[torch.Tensor] = []
    for part, (name, _) in zip(parts, chosen, strict=True):
        if isinstance(part.x, np.ndarray):
            x, more = arrange(part.x, name, reading)
        else:
            x, more = decode(part.x, name, reading)
        images.append(x)
        notes += more
    pairs: list[tuple[Any, Any]] = list(zip(images, labels, strict=True))
    source = check_source(pairs[0], pairs[1] if test else None, classes, what, list(dict.fromkeys(notes)))
    return source, not any(part.refers for part in parts)


def cache_folder() -> Path:
    """Where decoded data is cached: $HOLDFAST_CACHE, by default ~/.cache/holdfast."""
    return Path(os.environ.get("HOLDFAST_CACHE") or "~/.cache/holdfast").expanduser()


def cache_file(origin: str) -> Path:
    """The file that a data set is cached in.

    Args:
        origin: the absolute path of the source, or hub:owner/name.

    Returns:
        The path; nothing need be there.
    """
    stem = re.sub(r"[^\w.-]+", "-", Path(origin).name) + "-" + hashlib.sha256(os.fsencode(origin)).hexdigest()[:12]
    return cache_folder() / f"{stem}.safetensors"


def _cached(
    root: str | Path, files: Sequence[Path], reading: Reading, build: Callable[[], tuple[Source, bool]]
) -> Source:
    """What ``build`` returns, cached in $HOLDFAST_CACHE (default ~/.cache/holdfast), one file per data set.

    It is rebuilt when name, size or time of a source file changes, when it is read in another way, or when the cached
    file is damaged. ``build`` says whether its source may be cached.
    """
    origin = str(root.resolve()) if isinstance(root, Path) else root
    stats = [(os.path.relpath(f, root), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(
        json.dumps(["2", origin, stats, asdict(reading)]).encode()
    ).hexdigest()  # "2": increment when the format changes
    path = cache_file(origin)
    try:
        with safetensors.safe_open(path, "pt") as cached:
            meta = cached.metadata() or {}
            if meta["key"] == key:
                # cloned, since the file would stay mapped otherwise
                pairs = [[cached.get_tensor(f"{k}.{name}").clone() for name in "xy"] for k in meta["splits"].split()]
                train, *test = (Data(x, y, torch.arange(len(y))) for x, y in pairs)
                names, notes = (tuple(json.loads(meta[name])) for name in ("classes", "notes"))
                return Source(train, test[0] if test else None, names, notes)
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        pass  # missing or damaged: build it again
    source, may_be_cached = build()
    if not may_be_cached:
        return source
    parts = {k: d for k, d in (("train", source.train), ("test", source.test)) if d is not None}
    tensors = {f"{k}.{name}": getattr(d, name) for k, d in parts.items() for name in "xy"}
    meta = {"key": key, "splits": " ".join(parts), "classes": json.dumps(source.classes)}
    meta["notes"] = json.dumps(source.notes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            safetensors.torch.save_file(tensors, Path(scratch) / path.name, meta)
            os.replace(Path(scratch) / path.name, path)  # atomic: nobody reads half a file
    except (OSError, safetensors.SafetensorError) as error:
        hint = "set HOLDFAST_CACHE to a writable folder."
        warnings.warn(
            f"decoded data is not cached: '{path}' cannot be written ({error}); {hint}", DataWarning, stacklevel=2
        )
    return source


def digits(reading: Reading = AS_IS) -> Source:
    """Read scikit-learn's 1,797 handwritten digits; grey levels 0..16 become 0..255."""
    reading.check_no_columns("digits")
    images, labels = _digits()
    x = refit(torch.from_numpy(images.copy()), reading)
    return check_source((x, labels.copy()), None, [str(k) for k in range(10)], "digits")


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 1, 8, 8) uint8 and (1797,) labels: a text file, parsed once per process."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.round(loaded.images * (255 / 16)).astype(np.uint8)[:, None], loaded.target


def moons(reading: Reading = AS_IS) -> Source:
    """Make scikit-learn's two half circles as (1, 1, 2) images: 2,000 training and 1,000 test samples.

    The noise is 0.1. [-1.5, 2.5] x [-1, 1.5] of the plane becomes the range of pixels, so that no point is clipped. The
    classes are so close that even a perfect network has a robust accuracy of about one half at linf 0.064.
    """
    from sklearn.datasets import make_moons

    reading.check_no_columns("moons")

    def draw(count: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        points, y = make_moons(count, noise=0.1, random_state=seed)
        x = (points - [-1.5, -1.0]) / [4.0, 2.5]
        pixels = torch.from_numpy(np.round(255 * x.clip(0, 1)).astype(np.uint8)[:, None, None])
        return refit(pixels, reading), y

    return check_source(draw(2000, 0), draw(1000, 1), ["upper", "lower"], "moons")


def hub(repo: str, reading: Reading = AS_IS) -> Source:
    """Read a hub data set: downloaded once, then from the decoded cache, offline.

    Args:
        repo: "owner/name".
        reading: which columns to read, and how to convert and resize.

    Returns:
        The source.

    Raises:
        UserError: the hub cannot be reached, there is no such data set, or its content is invalid.
    """

    def build() -> tuple[Source, bool]:
        import datasets  # here, since the import takes a second

        from .tables import from_hub

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
            folders = [Path(scratch), Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE)]

            def read(split: Any, what: str) -> Encoded:
                return from_hub(split, what, reading, folders)

            # downloaded files are the hub's own, and do not change behind the cache
            return _assemble(by_split(loaded.items(), repo), read, repo, reading)[0], True

    return _cached(f"hub:{repo}", [], reading, build)


def parquet(root: Path, reading: Reading = AS_IS) -> Source:
    """Read a .parquet file, or a folder of them in hub layout.

    Args:
        root: the file or folder. A file's split is the first word of its name (train-00000-of-00002.parquet) or one of
            its folders, in any case.
        reading: which columns to read, and how to convert and resize.

    Returns:
        The source.

    Raises:
        UserError: a file cannot be read, or its content is invalid.
    """
    found = find(root, [".parquet"]) if root.is_dir() else None
    files = found.files if found else [root]
    shards: dict[str, list[Path]] = {}
    for file in files:
        words = [re.split("[-_.]", file.name)[0], *file.relative_to(root).parts[:-1]] if root.is_dir() else []
        split = next((SPLIT_NAMES[w.lower()] for w in words if w.lower() in SPLIT_NAMES), "all")
        shards.setdefault(split, []).append(file)

    def read(files: list[Path], what: str) -> Encoded:
        from .tables import from_parquet  # here, since importing pyarrow takes time

        return from_parquet(files, what, reading)

    source = _cached(root, files, reading, lambda: _assemble(shards, read, str(root), reading))
    return source._replace(notes=(*(skipped(found.hidden, str(root), "parquet file") if found else ()), *source.notes))


def image_folder(root: Path, reading: Reading = AS_IS) -> Source:
    """Read a folder of images: root/train/<class>/* and root/test/<class>/*, or root/<class>/*.

    Args:
        root: the folder; classes and files are sorted by name, which defines each sample's index. Hidden folders are
            skipped, and class folders without images are left out.
        reading: how to convert and resize.

    Returns:
        The source.

    Raises:
        UserError: there is no image, or an image cannot be decoded or differs in size or mode.
    """
    reading.check_no_columns(f"'{root}'")
    named = [(d.name, d) for d in subfolders(root) if d.name.lower() in SPLIT_NAMES and subfolders(d)]
    rest = [d for d in subfolders(root) if d.name not in dict(named)]  # a class may be called "train"
    nested = any(SPLIT_NAMES[name.lower()] != "val" for name, _ in named) or (named and not rest)
    if not named and len(rest) == 1 and len(subfolders(rest[0])) > 1:
        hint = f"a class needs a folder of its own. If the classes are in '{rest[0]}', name that."
        raise UserError(f"'{root}' holds a single folder, '{rest[0].name}', with others in it: {hint}")
    splits = by_split(named, f"'{root}'") if nested else {"all": root}
    parts = {split: by_class(folder) for split, folder in splits.items()}
    around = by_class(root, leave_out=splits.values()) if nested else None

    def read(split: str, what: str) -> Encoded:
        files = {name: inside for name, inside in parts[split].classes.items() if inside}
        if not files:
            alone = f" (images that lie in it directly: {parts[split].loose:,})" if parts[split].loose else ""
            hint = "holds no parquet file and no folder of images per class"
            raise UserError(f"'{splits[split]}' {hint}{alone}: check the path.")
        y = np.repeat(np.arange(len(files)), [len(inside) for inside in files.values()])
        return Encoded([file for inside in files.values() for file in inside], y, tuple(files))

    # folders count too: one that is empty changes the classes, and no file
    seen = [d for folder in splits.values() for d in subfolders(folder)]
    images = [file for part in parts.values() for inside in part.classes.values() for file in inside]

    def build() -> tuple[Source, bool]:
        source, _ = _assemble({split: split for split in splits}, read, str(root), reading)
        return source, True  # the key holds all files

    source = _cached(root, [*images, *seen], reading, build)
    return source._replace(notes=(*notes_on(list(parts.values()), around, str(root)), *source.notes))
