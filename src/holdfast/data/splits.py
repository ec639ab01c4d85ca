"""A checked data set cut into train, val and test: by hashes of sample numbers, never by a random state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from ..errors import UserError
from .dataset import Data, Source, Split

FOLD_SEED, LIMIT_SEED = -1, -2  # these cuts do not move with the user's seed: runs with different seeds stay paired


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


def _limited(data: Data, limit: int | None) -> Data:
    return data if limit is None else _divide(data, _prefix(data, LIMIT_SEED, balanced=True)[:limit])[0]


def cut_source(
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
    on: str = "test",
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

    if on not in ("test", "val"):
        raise UserError(f"on is '{on}': expected 'test', or 'val' to judge on the validation images.")
    if on == "val" and (whole or not val):
        raise UserError("on is 'val', but nothing is held out for validation: give val a share above 0.")

    train, given, classes = source()
    if given is not None and fold is not None:
        raise UserError(f"fold is {fold}, but {name} has a test split of its own: leave fold out.")
    present = set(train.y.tolist())
    test = given
    if whole:
        test, train = train if test is None else test, train.take(slice(0, 0))
        val, present = 0.0, set()
    elif test is None:
        k, n = fold or (0, 5)
        sizes = np.bincount(train.y.numpy()).tolist()
        if n > len(train) or 1 in sizes:
            why = f"class '{classes[sizes.index(1)]}' has one sample" if 1 in sizes else f"it has {len(train)} samples"
            raise UserError(f"{name} cannot be cut into {n} folds ({why}): add samples, or a test split of its own.")
        dealt = np.lexsort((_keys(train, FOLD_SEED), train.y.numpy()))  # class by class, to one fold after the other
        test, train = _divide(train, dealt[k::n])
    test = _limited(test, limit)
    train = _limited(train, limit_train)
    held, count = max(1, round(val * len(train))) if val else 0, len(train)
    validation, train = _divide(train, _prefix(train, seed, balanced=False)[:held])
    lost = sorted(present - set(train.y.tolist()))
    if lost:
        why = f"val={val} of {count} samples leaves none of class '{classes[lost[0]]}' to train on"
        raise UserError(f"{why}: lower val or raise limit_train.")
    if on == "val":
        test = _limited(validation, limit)
    digest = hashlib.sha256(f"{tuple(test.x.shape)} {test.x.dtype}".encode())
    digest.update(test.x.numpy().data)
    digest.update(test.y.numpy().data)
    return Split(name, train.to(device), validation.to(device), test.to(device), classes, digest.hexdigest()[:16])
