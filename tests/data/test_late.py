"""Images that do not fit in memory: the same samples from a file; damaged ones are named, refused or left out."""

from __future__ import annotations

import os
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from holdfast import data, mapped
from holdfast.data import late, tables
from holdfast.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::holdfast.data.DataWarning")
SIDE = 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setenv(mapped.VARIABLE, "100")


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def imagenet(root, train=12, test=8):
    """The layout of ImageNet: a folder for each synset below train and val."""
    number = 0
    for split, count in (("train", train), ("val", test)):
        for synset in ("n01440764", "n01443537"):
            folder = root / split / synset
            folder.mkdir(parents=True)
            for i in range(count):
                picture(number).save(folder / f"{synset}_{i:03}.JPEG")
                number += 1
    return root


def parquet(root, rows=30, group=7):
    """The layout of the hub, in shards of small row groups."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    root.mkdir(parents=True)
    for split, start in (
        ("train-00000-of-00002", 0),
        ("train-00001-of-00002", rows),
        ("test-00000-of-00001", 2 * rows),
    ):
        content = []
        for i in range(start, start + rows):
            path = root / "one.png"
            picture(i).save(path)
            content.append({"bytes": path.read_bytes(), "path": None})
            path.unlink()
        schema = features.arrow_schema
        columns = {"image": content, "label": [i % 3 for i in range(rows)]}
        table = pa.table({k: pa.array(v, schema.field(k).type) for k, v in columns.items()}, schema=schema)
        pq.write_table(table, root / f"{split}.parquet", row_group_size=group)
    return root


CUTS = [{}, {"whole": True}, {"limit": 13, "whole": True}, {"limit": 6, "limit_train": 15, "val": 0.2}]


def same(a, b):
    for part in ("train", "val", "test"):
        one, other = getattr(a, part), getattr(b, part)
        for name in ("x", "y", "index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), (part, name)
        assert one.classes == other.classes
    assert (a.fingerprint, a.classes, a.shape) == (b.fingerprint, b.classes, b.shape)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("make", [imagenet, parquet])
def test_a_file_holds_the_same_samples(tmp_path, monkeypatch, make, cut):
    root = make(tmp_path / "data")
    whole = data.load(root, **cut)
    assert not mapped.is_mapped(whole.test.x)
    monkeypatch.setenv(mapped.VARIABLE, "100")
    for _ in range(2):  # decoded, then from the file
        found = data.load(root, **cut)
        assert mapped.is_mapped(found.test.x)
        assert mapped.is_mapped(found.train.x) is (not cut.get("whole", False))
        same(whole, found)
        assert "more than is held in memory" in " ".join(found.notes)
    monkeypatch.setattr(late, "decode", None)  # what was decoded before is not decoded again
    same(whole, data.load(root, **cut))


def test_only_what_is_needed_is_decoded(tmp_path, small, cache):
    """Evaluating ImageNet's validation images decodes none of the training images."""
    root = imagenet(tmp_path / "data")
    for damaged in (root / "train").glob("*/*"):
        damaged.write_bytes(damaged.read_bytes()[:200])
    split = data.load(root, whole=True, limit=6)
    assert len(split.test) == 6
    assert split.test.y.bincount().tolist() == [3, 3]
    assert sum(file.stat().st_size for file in cache.glob("*.npy")) < 8 * 3 * SIDE * SIDE


def test_changed_files_are_decoded_again(tmp_path, small, cache):
    root = imagenet(tmp_path / "data")
    first = data.load(root, whole=True)
    file = root / "val" / "n01440764" / "n01440764_000.JPEG"
    picture(99).save(file)
    os.utime(file, ns=(1, 1))
    second = data.load(root, whole=True)
    assert not torch.equal(first.test.x[0], second.test.x[0])
    assert len(list(cache.glob("*.npy"))) == 1, "files of the earlier state were left"
    file = next(iter(cache.glob("*.npy")))
    file.unlink()  # the one that is mapped stays as it is
    file.write_bytes(b"nothing")
    same(second, data.load(root, whole=True))


@pytest.mark.parametrize("where", ["in memory", "in a file"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_damaged_images_are_named_and_left_out(tmp_path, monkeypatch, where, cut):
    """What is left is what there would be without them, with the numbers that the samples had."""
    root = imagenet(tmp_path / "data")
    if where == "in a file":
        monkeypatch.setenv(mapped.VARIABLE, "100")
    damaged = (("train", 2), ("val", 1), ("val", 5))
    names = [root / split / "n01443537" / f"n01443537_00{i}.JPEG" for split, i in damaged]
    whole = {split: sorted((root / split).glob("*/*")) for split in ("train", "val")}
    for name in names:
        name.write_bytes(name.read_bytes()[:300])
    with pytest.raises(UserError, match=r"n01443537_00\d.JPEG' cannot be decoded \(.*: replace or remove"):
        data.load(root, **cut)
    found = data.load(root, skip_corrupt=True, **cut)
    again = data.load(root, skip_corrupt=True, **cut)
    same(found, again)
    said = " ".join(found.notes)
    assert said == " ".join(again.notes)
    kept = [whole["val"][i] for i in found.test.index.tolist()]
    assert not {*kept} & {*names}
    if cut.get("limit"):
        assert len(kept) == cut["limit"]
        return
    assert all(name.name in said for name in (names[1:] if cut else names))
    assert "2 images cannot be decoded and are left out" in said
    for name in names:
        name.unlink()
    without = data.load(root, **cut)
    assert torch.equal(found.test.x, without.test.x)
    assert torch.equal(found.test.y, without.test.y)


def test_nothing_but_damaged_images_is_refused(tmp_path):
    root = imagenet(tmp_path / "data")
    for name in (root / "val").glob("*/*"):
        name.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000.JPEG' cannot be decoded \(unknown format\), and 15 more"):
        data.load(root, whole=True, skip_corrupt=True)
    with pytest.raises(UserError, match="skip_corrupt must be True or False"):
        data.load(root, skip_corrupt="yes")


def test_a_file_that_is_gone_is_named(tmp_path, small, monkeypatch):
    root = imagenet(tmp_path / "data")
    build = late.late_source

    def lose(*given):
        (root / "val" / "n01440764" / "n01440764_003.JPEG").unlink()
        return build(*given)

    monkeypatch.setattr("holdfast.data.readers.late_source", lose)
    with pytest.raises(UserError, match=r"n01440764_003.JPEG' cannot be decoded \(.*No such file"):
        data.load(root, whole=True)


def test_a_shard_that_is_cut_short_is_named(tmp_path, small):
    root = parquet(tmp_path / "data")
    file = root / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"test-00000.*cannot be read as parquet .*cut short"):
        data.load(root, whole=True)


def test_row_groups_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    root = parquet(tmp_path / "data", rows=30, group=3)
    monkeypatch.setattr(tables, "GROUPS", 2)
    files = sorted(root.glob("train*"))
    columns = tables.choose(pq.read_schema(files[0]), data.Reading(), "it")
    rows = tables.ParquetImages(files, columns, "it")
    assert len(rows) == 60
    assert len(rows.recent) == 0
    assert rows[31] == rows[31]
    assert rows[59] != rows[0]
    assert len(rows.recent) == 2
    assert len(rows[28:33]) == 5


def test_sizes_that_differ_between_train_and_test_are_refused(tmp_path, small):
    root = imagenet(tmp_path / "data")
    for name in (root / "val").glob("*/*"):
        picture(1).resize((9, 9)).save(name)
    with pytest.raises(UserError, match=r"shapes \(3, 8, 8\), \(3, 9, 9\) in train and test: .*--resize N"):
        data.load(root)
    assert data.load(root, whole=True).shape == (3, 9, 9)


def test_it_is_said(tmp_path, small):
    root = imagenet(tmp_path / "data")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.load(root, whole=True)
    assert any("40 images are more than is held in memory" in str(one.message) for one in caught)
