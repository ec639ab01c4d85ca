"""Tensors in files: they are what tensors in memory are, and their pages are given back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast import mapped
from holdfast.errors import UserError
from holdfast.io import content_hash

X = torch.arange(24, dtype=torch.float32).view(6, 1, 2, 2)


def test_a_file_holds_what_is_written(tmp_path):
    path = tmp_path / "deeper" / "x.npy"
    x = mapped.create(path, X.shape, X.dtype)
    assert mapped.is_mapped(x)
    assert mapped.is_mapped(x[2:4])
    assert not mapped.is_mapped(X)
    rows = torch.tensor([4, 1])
    mapped.put(x, rows, X[rows], torch.tensor([True, False]))
    mapped.flush(x)
    assert np.load(path)[4].tolist() == X[4].tolist()
    assert not np.load(path)[1].any()
    assert torch.equal(mapped.take(x, rows), torch.stack([X[4], torch.zeros(1, 2, 2)]))


def test_what_is_opened_to_read_does_not_change_its_file(tmp_path):
    mapped.stored(X, tmp_path / "x.npy")
    x = mapped.opened(tmp_path / "x.npy")
    x[0] = 9
    assert torch.equal(mapped.opened(tmp_path / "x.npy"), X)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "x.npy")), X)


def test_other_rows_stay_in_memory_and_survive_a_release(tmp_path):
    x = mapped.stored(X, tmp_path / "x.npy")
    y = mapped.with_rows(x, torch.tensor([1]), X[:1] + 50)
    z = mapped.with_rows(y, torch.tensor([3]), X[:1] + 70)
    for one in (x, y, z):
        mapped.release(one)
    assert torch.equal(x, X)
    assert z[1].flatten().tolist() == [50, 51, 52, 53]
    assert y[3].tolist() == X[3].tolist()
    assert z[3].flatten().tolist() == [70, 71, 72, 73]
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "x.npy")), X)
    assert torch.equal(mapped.with_rows(X, torch.tensor([1]), X[:1])[1], X[0])


def test_parts_add_up(monkeypatch):
    monkeypatch.setattr(mapped, "CHUNK", 2 * X[0].nbytes)
    x = mapped.stored(X)
    assert [len(part) for part in mapped.chunks(x)] == [2, 2, 2]
    assert [len(part) for part in mapped.chunks(X)] == [6]
    assert content_hash(x, [1]) == content_hash(X, [1])
    assert mapped.extremes(x) == (0.0, 23.0)


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="counts memory as Linux does")
def test_pages_are_given_back():
    size = 2**27
    before = resident()
    x = mapped.create(None, (128, size // 128), torch.uint8)
    for rows in torch.arange(128).split(8):
        mapped.put(x, rows, torch.full((8, size // 128), 7, dtype=torch.uint8), rows >= 0)
    assert mapped.extremes(x) == (7, 7)
    assert resident() - before < size // 2
    assert mapped.extremes(mapped.detached(x)) == (7, 7)
    assert resident() - before < size // 2
    assert int(x.sum()) == 7 * size
    assert resident() - before > size // 2, "the test measures nothing"


def test_no_room_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"GiB of images cannot be written to .*No space left on device.*make room"):
        mapped.create(tmp_path / "x.npy", (4, 4), torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(3))
    with pytest.raises(ValueError, match="another type"):
        mapped.opened(path)
    np.save(path, np.asfortranarray(np.zeros((3, 3), np.float32)))
    with pytest.raises(ValueError, match="another type"):
        mapped.opened(path)
    mapped.stored(X, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        mapped.opened(path)


@pytest.mark.parametrize(
    ("text", "size"), [("", 2**28), ("64M", 2**26), ("2GiB", 2**31), ("1000", 1000), ("5 kb", None)]
)
def test_how_much_stays_in_memory_is_a_number_of_bytes(monkeypatch, text, size):
    monkeypatch.setenv(mapped.VARIABLE, text)
    if size is None:
        with pytest.raises(UserError, match="expected a number of bytes"):
            mapped.resident_bytes()
    else:
        assert mapped.resident_bytes() == size


def test_an_empty_tensor_is_stored_too(tmp_path):
    assert mapped.stored(X[:0], tmp_path / "x.npy").shape == (0, 1, 2, 2)
    assert mapped.opened(tmp_path / "x.npy").shape == (0, 1, 2, 2)
