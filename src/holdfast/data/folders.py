"""Which files of a folder are data: split folders by name, class folders, and what is skipped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..errors import UserError
from .labels import count, numeric_order, some

T = TypeVar("T")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
SPLIT_NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val",
}  # fmt: skip
SPLITS = tuple(SPLIT_NAMES)
NOT_DATA = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found")
OF_SYSTEMS = ("thumbs.db", "desktop.ini")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is kept by a program beside the data, such as .ipynb_checkpoints and __MACOSX."""
    return name.startswith(".") or name in NOT_DATA


def subfolders(of: Path) -> list[Path]:
    """The folders in a folder that may hold data, by name. Raises UserError when it cannot be read."""
    try:
        return sorted(d for d in of.iterdir() if d.is_dir() and not is_hidden(d.name))
    except OSError as error:
        raise UserError(f"'{of}' cannot be read ({error.strerror}): check its permissions.") from error


@dataclass
class Found:
    """The files under a folder.

    Args:
        files: those that were looked for, sorted.
        hidden: how many of them each hidden folder or file has; these are not read.
        others: how many files of other kinds there are, by suffix.
    """

    files: list[Path] = field(default_factory=list)
    hidden: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


def find(folder: Path, suffixes: Iterable[str]) -> Found:
    """Look for files in a folder and its subfolders.

    Args:
        folder: where to look; links to folders beneath it are not followed.
        suffixes: of the files, in lower case.

    Returns:
        What was found.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"'{error.filename}' cannot be read ({error.strerror}): check its permissions.") from error

    found, wanted = Found(), set(suffixes)
    for here, _, names in os.walk(folder, onerror=refuse):
        below = Path(here).relative_to(folder).parts
        for name in names:
            path = Path(here, name)
            secret = next((part for part in (*below, name) if is_hidden(part)), None)
            if path.suffix.lower() not in wanted:
                if secret is None and name.lower() not in OF_SYSTEMS:
                    found.others[path.suffix.lower() or name[:40]] += 1
            elif secret is not None:
                found.hidden[secret if secret in below else "files that begin with a dot"] += 1
            elif path.is_file():
                found.files.append(path)
    found.files.sort()
    return found


@dataclass
class ClassFolders:
    """A folder with a folder of images per class.

    Args:
        classes: the images of each class folder, by name; none for an empty folder.
        loose: how many images lie beside the class folders.
        hidden: how many images each hidden folder or file has.
        others: how many files in the class folders are no images, by suffix.
    """

    classes: dict[str, list[Path]] = field(default_factory=dict)
    loose: int = 0
    hidden: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


def by_class(folder: Path, leave_out: Iterable[Path] = ()) -> ClassFolders:
    """Look for images in each folder of a folder.

    Args:
        folder: where to look.
        leave_out: folders in it that are no class.

    Returns:
        What was found. Raises UserError as ``find`` does.
    """
    found, known = ClassFolders(), set(leave_out)
    for child in sorted(folder.iterdir()):
        if child.is_dir() and child not in known:
            inside = find(child, IMAGE_SUFFIXES)
            if is_hidden(child.name):
                found.hidden[child.name] += len(inside.files) + inside.hidden.total()
                continue
            found.classes[child.name] = inside.files
            found.hidden += inside.hidden
            found.others += inside.others
        elif child.suffix.lower() in IMAGE_SUFFIXES and child.is_file():
            found.loose += 1
    found.hidden = +found.hidden  # hidden folders without images are of no interest
    return found


def notes_on(parts: Sequence[ClassFolders], rest: ClassFolders | None, what: str) -> list[str]:
    """What was skipped in image folders, a sentence each.

    Args:
        parts: each split.
        rest: what lies beside the split folders, if there are any.
        what: name of the data.

    Returns:
        The sentences.
    """
    every = [*parts, *([rest] if rest else [])]
    notes = skipped(sum((part.hidden for part in every), Counter[str]()), what, "image")
    loose = sum(part.loose for part in every)
    if loose:
        notes.append(f"{what}: skipped {count(loose, 'image')} outside the class folders.")
    others = sum((part.others for part in parts), Counter[str]())
    if others:
        listed = some([suffix for suffix, _ in others.most_common()])
        notes.append(f"{what}: skipped {count(others.total(), 'file')} of other kinds: {listed}.")
    beside = (
        [f"'{name}' ({count(len(files), 'image')})" for name, files in rest.classes.items() if files] if rest else []
    )
    if beside:
        notes.append(f"{what}: skipped folders that are no split: {some(beside)}.")
    names = sorted({name for part in parts for name, files in part.classes.items() if files})
    if names != sorted(names, key=numeric_order):
        notes.append(f"{what}: class folders are numbered in the order of text: {some(names)}.")
    empty = {name for part in parts for name, files in part.classes.items() if not files}
    empty -= {name for part in parts for name, files in part.classes.items() if files}
    if empty:
        notes.append(f"{what}: class folders without images were left out: {some(sorted(empty))}.")
    return notes


def skipped(hidden: Counter[str], what: str, kind: str) -> list[str]:
    """A sentence about hidden files that were not read, if there are any."""
    return [f"{what}: skipped {count(hidden.total(), f'hidden {kind}')}: {some(sorted(hidden))}."] if hidden else []


def by_split(parts: Iterable[tuple[str, T]], what: str) -> dict[str, T]:
    """Parts of a data set by the split that their names say, in any case; other names are kept.

    Args:
        parts: (name, part).
        what: name of the data, for errors.

    Returns:
        Parts by "train", "test", "val" or their own name.

    Raises:
        UserError: two names say the same split.

    >>> by_split([("Train", 1), ("validation", 2), ("extra", 3)], "mine")
    {'train': 1, 'val': 2, 'extra': 3}
    """
    splits: dict[str, T] = {}
    said: dict[str, str] = {}
    for name, part in parts:
        split = SPLIT_NAMES.get(name.lower(), name)
        if split in splits:
            raise UserError(f"{what} has both '{said[split]}' and '{name}' for {split}: put them together.")
        splits[split], said[split] = part, name
    return splits


def train_and_test(splits: Mapping[str, T], what: str) -> tuple[list[tuple[str, T]], list[str]]:
    """Choose what is trained on and what is tested on among a source's splits.

    A validation split of the source is the test set where there is no other; beside a test split it is not used, since
    validation images are split off from train.

    Args:
        splits: by name, as ``by_split`` returns them.
        what: name of the data, for errors and notes.

    Returns:
        ([(name, train), (name, test)] or the only part, notes on what was chosen).

    Raises:
        UserError: there are several splits, but not train with test or val.
    """
    if len(splits) == 1:
        return [(what, next(iter(splits.values())))], []
    tested = next((name for name in ("test", "val") if name in splits), None)
    if "train" not in splits or tested is None:
        hint = "expected train and test, train and val, or a single one. Rename one, or use data.from_arrays."
        raise UserError(f"{what} has the splits {some(sorted(splits), 8)}: {hint}")
    notes = []
    if tested == "val":
        notes.append(f"{what}: no test split, so the validation split is the test set.")
    unused = [f"'{name}'" for name in splits if name not in ("train", tested)]
    if unused:
        notes.append(f"{what}: not used: {some(unused)}. Validation images are split off from train.")
    return [(f"{what} ({name})", splits[name]) for name in ("train", tested)], notes
