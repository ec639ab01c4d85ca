"""Labels as files hold them (text, booleans, whole floats, counted from 1) become 0..K-1 with K class names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError

MAX_CLASSES = 30_000  # ImageNet-21k has 21,841; more are a mistake, such as a column of file names


def some(names: Sequence[object], most: int = 3) -> str:
    """The first few of many, and how many there are.

    >>> some(["a", "b"]), some(range(9))
    ('a, b', '0, 1, 2, ... (9 in all)')
    """
    listed = ", ".join(str(name)[:80] for name in names[:most])
    return listed if len(names) <= most else f"{listed}, ... ({len(names):,} in all)"


def count(n: int, one: str, many: str = "") -> str:
    """A number with its noun.

    >>> count(1, "image"), count(2000, "image"), count(2, "image is", "images are")
    ('1 image', '2,000 images', '2 images are')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def encode(
    train: np.ndarray, test: np.ndarray | None, what: str, column: str = "the labels"
) -> tuple[list[np.ndarray], tuple[str, ...] | None, list[str]]:
    """Number the classes of labels that have no class names beside them.

    Text is numbered in sorted order, and numerically where all of it is whole numbers. Whole floats are integers;
    integers 1..K are counted from 0 and keep their names "1".."K". Nothing else is renumbered: labels with gaps may
    belong to a network with more outputs.

    Args:
        train: (N,) integers, floats, booleans or text.
        test: likewise, or None.
        what: name of the data, for errors and notes.
        column: where the labels are from.

    Returns:
        ([train labels, test labels if any], class names or None for "0".."K-1", notes on what was assumed).

    Raises:
        UserError: floats that are not whole, too many classes, or a class that occurs in test alone.

    >>> encode(np.array(["dog", "cat"]), None, "pets")[:2]
    ([array([1, 0])], ('cat', 'dog'))
    >>> encode(np.array([1.0, 3.0, 2.0]), None, "floats")[:2]
    ([array([0, 2, 1])], ('1', '2', '3'))
    """
    parts = [train] if test is None else [train, test]
    kinds = {"text" if part.dtype.kind in "OUS" else part.dtype.kind.replace("u", "i") for part in parts}
    if len(kinds) > 1:
        raise UserError(f"{column} of {what} has another type in train than in test: write both in the same way.")
    notes: list[str] = []
    if kinds == {"f"}:
        for part in parts:
            odd = part[~(np.isfinite(part) & (part == np.round(part)))]
            if len(odd):
                hint = "labels are classes, not quantities. Name another column with --label-column."
                raise UserError(f"{column} of {what} holds {odd[0]:g}: {hint}")
        parts = [part.astype(np.int64) if np.abs(part).max(initial=0) < 2**62 else part for part in parts]
        notes.append(f"{what}: {column} holds whole numbers as floats, read as integers.")
    values = np.unique(parts[0])
    if len(values) > MAX_CLASSES:
        hint = f"at most {MAX_CLASSES:,} classes are read. Name the label column with --label-column."
        raise UserError(f"{column} of {what} holds {len(values):,} different labels ({some(values.tolist())}): {hint}")
    if kinds == {"text"}:
        named = sorted(values.tolist(), key=numeric_order)
        order = "in numerical order" if all(re.fullmatch(r"\d+", name) for name in named) else "sorted by name"
        notes.append(f"{what}: {column} is text; its {len(named)} classes are numbered {order}: {some(named)}.")
    elif kinds == {"b"}:
        named = [False, True]
        notes.append(f"{what}: {column} is boolean; class 0 is False, class 1 is True.")
    elif len(values) > 1 and values[0] == 1 and values[-1] == len(values) and min(map(np.min, parts)) >= 0:
        named = values.tolist()
        notes.append(f"{what}: {column} counts from 1; class 0 is the one labelled 1.")
    else:
        return parts, None, notes
    number = {name: k for k, name in enumerate(named)}
    for part in parts:
        alien = sorted({value for value in part.tolist() if value not in number})
        if alien:
            hint = "there is nothing to learn it from. Add training samples, or remove it from test."
            raise UserError(f"the label {some(alien)} of {what} occurs in test but not in train: {hint}")
    return [np.array([number[v] for v in part.tolist()], dtype=np.int64) for part in parts], _names(named), notes


def same_names(train: tuple[str, ...], test: tuple[str, ...], y: np.ndarray, what: str) -> tuple[np.ndarray, list[str]]:
    """Number test labels as train does, by their class names.

    Args:
        train: class names of train.
        test: class names of test.
        y: (N,) test labels, numbers of ``test``.
        what: name of the data, for errors and notes.

    Returns:
        (test labels as numbers of ``train``, notes on what was assumed).

    Raises:
        UserError: test has a class that train has not.

    >>> same_names(("a", "b"), ("b",), np.array([0, 0]), "letters")
    (array([1, 1]), ['letters: no test images of class a.'])
    """
    if test == train:
        return y, []
    if set(test) - set(train):
        different = some([repr(name) for name in sorted(set(train) ^ set(test))])
        raise UserError(f"train and test of {what} differ in their classes ({different}): name the same ones in both.")
    missing, notes = [name for name in train if name not in test], []
    if missing:
        notes.append(f"{what}: no test images of class {some(missing)}.")
    if [name for name in train if name in test] != list(test):
        notes.append(f"{what}: train and test list their classes in a different order; they are matched by name.")
    number = {name: k for k, name in enumerate(train)}
    mapped = np.array([number[name] for name in test], dtype=np.int64)
    inside = (y >= 0) & (y < len(test))  # what is outside is refused later, with its row
    return np.where(inside, mapped[np.where(inside, y, 0)], y), notes


def check_names(classes: Sequence[str], what: str) -> None:
    """Refuse class names that repeat, are too many, or are not names.

    Args:
        classes: the class names.
        what: name of the data, for errors.

    Raises:
        UserError: see above.
    """
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{what} names {len(classes):,} classes: at most {MAX_CLASSES:,} are read. Name fewer.")
    # control characters would steer the terminal that the name is printed on
    odd = [
        name
        for name in classes
        if not 0 < len(name) <= 200 or re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", name)
    ]
    if odd:
        hint = "expected text of 1 to 200 characters without control characters. Rename it."
        raise UserError(f"{what} has the class name {odd[0][:40]!r}: {hint}")
    if len(set(classes)) < len(classes):
        raise UserError(f"{what} has a class name twice among {some(sorted(classes))}: make them distinct.")


def numeric_order(name: str) -> tuple[bool, int, str]:
    """A key to sort by: whole numbers first and by value, then other text.

    >>> sorted(["10", "9", "b", "a"], key=numeric_order)
    ['9', '10', 'a', 'b']
    """
    whole = re.fullmatch(r"[0-9]{1,18}", name) is not None
    return (not whole, int(name) if whole else 0, name)


def _names(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)
