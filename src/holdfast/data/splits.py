"""Splitting a data set into train, val and test, by hashes of sample numbers and without any random state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from ..errors import UserError
from ..mapped import chunks, resident_bytes
from ..user_input import any_seed, flag, of_type
from ..user_input import whole as whole_number
from .arrays import assumptions
from .dataset import Chosen, Data, Source, Split
from .images import machine_memory
from .labels import some

FOLD_SEED, LIMIT_SEED = -1, -2  # independent of the user's seed, so that runs with different seeds stay paired


def _keys(data: Data, seed: int) -> np.ndarray:
    """(N,) uint64 hashes of seed and index, to shuffle by; numpy's random streams may change with its version."""
    return _hashes(seed, data.index.numpy().astype("<i8").tobytes())


@lru_cache(maxsize=8)
def _hashes(seed: int, index: bytes) -> np.ndarray:
    """The same for an index in bytes; the last few are kept, since a comparison splits the same data many times."""
    numbers = np.frombuffer(index, "<i8").tolist()
    hashes = (hashlib.blake2b(b"%d %d" % (seed, i), digest_size=8).digest() for i in numbers)
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def _shuffled_rows(data: Data, seed: int, *, balanced: bool) -> np.ndarray:
    """(N,) rows, shuffled so that every prefix has classes in equal numbers (balanced) or in proportion."""
    y, keys = data.y.numpy(), _keys(data, seed)
    by_class, sizes = np.lexsort((keys, y)), np.bincount(y)
    rank = np.empty(len(y), dtype=np.int64)  # of the sample within its class
    rank[by_class] = np.arange(len(y)) - (np.cumsum(sizes) - sizes)[y[by_class]]
    return np.lexsort((keys, rank if balanced else (rank + 0.5) / sizes[y]))


def _divide(data: Data, rows: np.ndarray) -> tuple[Data, Data]:
    """(the samples at ``rows``, the others), both in source order."""
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.from_numpy(rows)] = True
    return data.take(chosen), data.take(~chosen)


def _limited(data: Data, limit: int | None) -> Data:
    return data if limit is None else _divide(data, _shuffled_rows(data, LIMIT_SEED, balanced=True)[:limit])[0]


def split_source(
    name: str,
    source: Callable[[], Source],
    *,
    device: str | torch.device = "cpu",
    fold: tuple[int, int] | None = None,
    val: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    limit_train: int | None = None,
    whole: bool = False,
    eval_split: str = "test",
    named: bool = True,
) -> Split:
    """Check the arguments, then read the source (which may mean a download), then split it. See ``load``.

    Args:
        name: the data set's name.
        source: reads it.
        device: as for ``load``, and so are all others.
        fold: test fold.
        val: fraction held out for validation.
        seed: of the validation split.
        limit: at most so many test samples.
        limit_train: at most so many training samples.
        whole: nothing is to be trained.
        eval_split: "test" or "val".
        named: whether the classes are known, not merely the labels that occur.

    Returns:
        Tensors on ``device``.

    Raises:
        UserError: an argument is invalid, or the data cannot be split so.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device '{device}' cannot be used ({reason}): use 'cpu' or one that torch sees.") from error
    whole_pair = isinstance(fold, (tuple, list)) and len(fold) == 2 and all(type(part) is int for part in fold)
    if fold is not None and not (whole_pair and fold[1] >= 2 and 0 <= fold[0] < fold[1]):
        raise UserError(f"fold must be (k, n) with n >= 2 folds and k one of 0..n-1, got {fold}.")
    if isinstance(val, bool) or not isinstance(val, (int, float)) or not 0 <= val < 1:
        raise UserError(f"val must be the fraction of train to hold out, 0 <= val < 1, got {val}.")
    for key, count in (("limit", limit), ("limit_train", limit_train)):
        if count is not None:
            try:
                whole_number(key, count, 1)
            except UserError:
                raise UserError(f"{key} must be a number of samples >= 1, or None for all, got {count!r}.") from None
    any_seed(seed)
    flag("whole", whole)
    of_type("eval_split", eval_split, str)
    if eval_split not in ("test", "val"):
        raise UserError(f"eval_split must be 'test' or 'val', got '{eval_split}'.")
    if eval_split == "val" and (whole or not val):
        raise UserError("eval_split is 'val', but nothing is held out for validation: use val > 0 and not whole.")

    read = source()
    if read.test is not None and fold is not None:
        raise UserError(f"fold is {fold}, but {name} has an official test split: leave fold out.")
    how = partial(_cut, name, fold=fold, val=val, seed=seed, limit=limit, limit_train=limit_train, whole=whole)
    cut = partial(how, eval_split=eval_split)
    parts, notes = (cut(read), ()) if read.decode is None else _decoded(read, read.decode, cut, name)
    test, known = parts[2], read.classes if named else ()
    digest = hashlib.sha256(f"{tuple(test.x.shape)} {test.x.dtype}".encode())
    for part in chunks(test.x):
        digest.update(part.numpy().data)
    digest.update(test.y.numpy().data)
    train, validation, test = (replace(part.to(device), classes=known, source=name) for part in parts)
    return Split(name, train, validation, test, read.classes, digest.hexdigest()[:16], (*read.notes, *notes))


def _decoded(
    read: Source, decode: Callable[..., Chosen], cut: Callable[[Source], tuple[Data, ...]], name: str
) -> tuple[tuple[Data, ...], tuple[str, ...]]:
    """The parts with their images decoded, and what was assumed.

    Where images are damaged and to be left out, the source is cut again without them, as if they had never been there.
    """
    skipped: list[str] = []
    while True:
        parts = cut(read)
        # training asks for single images in any order, an evaluation takes 20 times their memory
        most = (resident_bytes(machine_memory() // 8),) * 2 + (resident_bytes(),)
        chosen = [decode(part.x, size) if len(part) else None for part, size in zip(parts, most, strict=True)]
        found = [one for one in chosen if one is not None]
        damaged = [number for one in found for number in one.damaged]
        notes = [note for one in found for note in one.notes]
        if not damaged:
            break
        skipped += notes
        train, test = (
            None if part is None else part.take(~torch.isin(part.x, torch.tensor(damaged)))
            for part in (read.train, read.test)
        )
        read = read._replace(train=train or read.train, test=test)
    shapes = sorted({tuple(one.x.shape[1:]) for one in found})
    if len(shapes) != 1:
        raise UserError(
            f"images of {name} have the shapes {some(shapes)} in train and test: resize or convert them. For files: "
            "--resize N, --convert rgb or --convert grey."
        )
    empty = torch.empty(0, *shapes[0], dtype=torch.uint8)
    images = [empty if one is None else one.x for one in chosen]
    notes += [note for one in found[-1:] for note in assumptions(one.x, name)]
    whole = tuple(replace(part, x=x) for part, x in zip(parts, images, strict=True))
    return whole, tuple(dict.fromkeys((*skipped, *notes)))


def _cut(
    name: str,
    read: Source,
    *,
    fold: tuple[int, int] | None,
    val: float,
    seed: int,
    limit: int | None,
    limit_train: int | None,
    whole: bool,
    eval_split: str,
) -> tuple[Data, ...]:
    """(train, val, test) of a source; the arguments have been checked."""
    train, test, classes = read.train, read.test, read.classes
    present = set(train.y.tolist())
    if whole:
        test, train = train if test is None else test, train.take(slice(0, 0))
        val, present = 0.0, set()
    elif test is None:
        k, n = fold or (0, 5)
        sizes = np.bincount(train.y.numpy()).tolist()
        if n > len(train) or 1 in sizes:
            why = f"class '{classes[sizes.index(1)]}' has one sample" if 1 in sizes else f"it has {len(train)} samples"
            raise UserError(f"{name} cannot be split into {n} folds ({why}): add samples, or give it a test split.")
        by_class = np.lexsort((_keys(train, FOLD_SEED), train.y.numpy()))  # every n-th goes to the same fold
        test, train = _divide(train, by_class[k::n])
    test = _limited(test, limit)
    train = _limited(train, limit_train)
    held_out, count = max(1, round(val * len(train))) if val else 0, len(train)
    validation, train = _divide(train, _shuffled_rows(train, seed, balanced=False)[:held_out])
    missing = sorted(present - set(train.y.tolist()))
    if missing:
        why = f"val={val} of {count} samples leaves no sample of class '{classes[missing[0]]}' to train on"
        raise UserError(f"{why}: lower val or raise limit_train.")
    if eval_split == "val":
        test = _limited(validation, limit)
    return train, validation, test
