"""Contracts of holdfast.data: splits, checks, readers, cache, augmentation. No download, no file outside tmp_path."""

from __future__ import annotations

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from holdfast import data
from holdfast.errors import UserError
from holdfast.models import default_model

ODD = ['Katze, 猫 & "co"', "l'été <b>", "a b\tc"]


# Several of these data sets repeat images or are dark on purpose; test_reading.py is about what is said of that.
pytestmark = pytest.mark.filterwarnings("ignore::holdfast.data.DataWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(k: int, *, mode="L", size=(4, 4)) -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def table(labels, *, names=None, images=None, column="image", metadata=True, **extra) -> pa.Table:
    images = images or [png(picture(k)) for k in range(len(labels))]
    columns = {column: [{"bytes": b, "path": None} for b in images], "label": list(labels), **extra}
    if not metadata:
        kinds = {column: pa.struct([("bytes", pa.binary()), ("path", pa.string())]), "label": pa.int32()}
        return pa.table({k: pa.array(v, kinds.get(k)) for k, v in columns.items()})
    names = names or [str(k) for k in range(3)]
    features = {column: datasets.Image(), "label": datasets.ClassLabel(names=names)}
    features |= {k: datasets.ClassLabel(names=["u", "v"]) for k in extra}
    schema = datasets.Features(features).arrow_schema
    return pa.table({k: pa.array(v, schema.field(k).type) for k, v in columns.items()}, schema=schema)


def write(root: Path, **tables: pa.Table) -> str:
    root.mkdir(exist_ok=True)
    for name, content in tables.items():
        pq.write_table(content, root / f"{name}.parquet")
    return str(root)


def write_folder(root: Path, counts: dict[str, int], **kind) -> str:
    for i, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            picture(100 * i + k, **kind).save(root / name / f"{k:03}.png")
    return str(root)


def arrays(n=30, classes=3, shape=(1, 4, 4)):
    x = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
    return x, np.arange(n) % classes


def same(a: data.Data, b: data.Data) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.index, b.index)


# ------------------------------------------------------------------------------------------------------------- splits


def test_digits():
    split = data.load("digits")
    assert (split.name, split.shape, split.classes) == ("digits", (1, 8, 8), tuple("0123456789"))
    assert split.train.x.dtype == torch.uint8
    assert split.train.y.dtype == split.train.index.dtype == torch.int64
    assert set(split.train.x.unique().tolist()) == {round(g * 255 / 16) for g in range(17)}
    assert len(split.train) + len(split.val) + len(split.test) == 1797


def test_moons():
    split = data.load("moons")
    assert (split.name, split.shape, split.classes) == ("moons", (1, 1, 2), ("upper", "lower"))
    assert [len(split.train), len(split.val), len(split.test)] == [1800, 200, 1000]
    assert split.test.y.bincount().tolist() == [500, 500]
    x = data.pixels(split.train.x).flatten(1)
    assert x.min() > 0.01
    assert x.max() < 0.99
    # Back in scikit-learn's plane the upper moon lies around the unit circle, and so does the lower one around its own.
    plane = x * torch.tensor([4.0, 2.5]) + torch.tensor([-1.5, -1.0])
    for label, middle in ((0, (0.0, 0.0)), (1, (1.0, 0.5))):
        radius = (plane[split.train.y == label] - torch.tensor(middle)).norm(dim=1)
        assert abs(float(radius.mean()) - 1) < 0.02
        assert abs(float(radius.std()) - 0.1) < 0.01
    assert same(split.test, data.load("moons").test)
    assert default_model(split.shape) == "mlp"


def test_folds_cover_every_image_once():
    folds = [data.load("digits", fold=(k, 5), seed=k) for k in range(data.default_folds("digits"))]
    numbers = torch.cat([f.test.index for f in folds])
    assert numbers.sort().values.equal(torch.arange(1797))
    per_class = torch.stack([f.test.y.bincount(minlength=10) for f in folds])
    assert (per_class.max(0).values - per_class.min(0).values).max() <= 1
    for f in folds:
        assert torch.cat([f.train.index, f.val.index, f.test.index]).unique().numel() == 1797
    assert same(data.load("digits").test, folds[0].test)


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 2), max_size=40),
    folds=st.integers(2, 5),
    val=st.floats(0, 0.4),
    seed=st.integers(-(2**70), 2**70),
)
def test_splits_are_disjoint_stratified_and_complete(labels, folds, val, seed):
    labels = labels + [0, 1, 2] * 4
    x = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    seen = []
    for k in range(folds):
        split = data.from_arrays(x, labels, fold=(k, folds), val=val, seed=seed)
        parts = torch.cat([split.train.index, split.val.index, split.test.index])
        assert parts.sort().values.equal(torch.arange(len(labels)))
        for part in (split.train, split.val, split.test):
            assert part.x.flatten().long().equal(part.index)  # a sample keeps its image, label and number
            assert part.y.tolist() == [labels[i] for i in part.index]
            assert part.index.equal(part.index.sort().values)
        assert split.train.y.unique().tolist() == [0, 1, 2]
        share = len(split.val) / (len(split.train) + len(split.val))
        held, kept = (p.y.bincount(minlength=3) for p in (split.val, split.train))
        assert ((held - share * (held + kept)).abs() <= 1.5).all()
        seen += split.test.index.tolist()
    assert sorted(seen) == list(range(len(labels)))


def test_the_seed_moves_val_and_nothing_else():
    one, again, other = (data.load("digits", seed=s, limit=50) for s in (0, 0, 1))
    assert same(one.val, again.val)
    assert same(one.train, again.train)
    assert not one.val.index.equal(other.val.index)
    assert same(one.test, other.test)
    assert one.fingerprint == other.fingerprint


def test_global_random_state_is_neither_used_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = data.load("digits")
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    assert same(one.train, data.load("digits").train)


def test_splits_never_change():
    """Stored adversarial examples and published results depend on these numbers."""
    split = data.load("digits", limit=10)
    assert split.test.index.tolist() == [193, 476, 624, 813, 1047, 1095, 1162, 1528, 1545, 1645]
    assert split.val.index[:5].tolist() == [5, 16, 35, 37, 54]
    assert split.fingerprint == "5ddd6a2b661fd6a3"


def test_limits_are_balanced_and_nested():
    small, large = (data.load("digits", limit=n, limit_train=10 * n) for n in (20, 50))
    assert small.test.y.bincount().tolist() == [2] * 10
    assert large.test.y.bincount().tolist() == [5] * 10
    assert set(small.test.index.tolist()) < set(large.test.index.tolist())
    train = [set(s.train.index.tolist()) | set(s.val.index.tolist()) for s in (small, large)]
    assert [len(t) for t in train] == [200, 500]
    assert train[0] < train[1]
    assert len(small.val) == 20
    assert len(data.load("digits", limit=10**9).test) == 360
    assert small.fingerprint != large.fingerprint


def test_eval_split_val_evaluates_validation_images_and_touches_no_test_image():
    given = data.load("digits", fold=(2, 5))
    chosen, few = (data.load("digits", fold=(2, 5), eval_split="val", limit=n) for n in (None, 20))
    assert chosen.test.index.tolist() == given.val.index.tolist()
    assert chosen.train.index.tolist() == given.train.index.tolist()
    assert len(few.test) == 20
    assert set(few.test.index.tolist()) < set(given.val.index.tolist())
    assert chosen.fingerprint not in (given.fingerprint, few.fingerprint)


def test_val_zero_is_empty():
    split = data.load("digits", val=0)
    assert len(split.val) == 0
    assert len(split.train) + len(split.test) == 1797


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fold": (5, 5)}, r"fold must be \(k, n\) .* got \(5, 5\)"),
        ({"fold": (0, 1)}, r"n >= 2"),
        ({"fold": (0, 1000)}, r"arrays cannot be split into 1000 folds \(it has 30 samples\)"),
        ({"val": 1.0}, r"val must be .* 0 <= val < 1, got 1.0"),
        ({"val": -0.1}, r"val must be .* got -0.1"),
        ({"val": 0.99}, r"val=0.99 of 24 samples leaves no sample of class '.' to train on: lower val"),
        ({"limit": 0}, r"limit must be .* >= 1, or None for all, got 0"),
        ({"limit_train": -3}, r"limit_train must be .* got -3"),
        ({"limit_train": 3}, r"val=0.1 of 3 samples leaves no sample of class '.' to train on: .* raise limit_train"),
        ({"limit_train": 1}, r"of 1 samples leaves no sample of class .* raise limit_train"),
        ({"eval_split": "train"}, r"eval_split must be 'test' or 'val', got 'train'"),
        ({"eval_split": "val", "val": 0.0}, r"nothing is held out"),
        ({"device": "no-such"}, r"device 'no-such' cannot be used"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        data.from_arrays(*arrays(), **arguments)


def test_fold_needs_data_without_a_test_split():
    x, y = arrays()
    with pytest.raises(UserError, match=r"has an official test split: leave fold out"):
        data.from_arrays(x, y, test=(x, y), fold=(0, 5))


# -------------------------------------------------------------------------------------------------------- user's arrays


def test_arrays_keep_their_values():
    x, y = arrays()
    split = data.from_arrays(x, y, name="mine")
    assert (split.name, split.classes, split.shape) == ("mine", ("0", "1", "2"), (1, 4, 4))
    for part in (split.train, split.val, split.test):
        assert torch.equal(part.x, torch.from_numpy(x)[part.index])
    floats = data.check_arrays(torch.from_numpy(x).double() / 255, torch.from_numpy(y).to(torch.uint8))
    assert (floats.x.dtype, floats.y.dtype) == (torch.float32, torch.int64)
    x.setflags(write=False)
    assert torch.equal(data.check_arrays(x, y).x, torch.from_numpy(x.copy()))


def test_the_users_test_arrays_are_the_test_set():
    x, y = arrays()
    split = data.from_arrays(x[:20], y[:20], test=(x[20:], y[20:]), classes=ODD)
    assert torch.equal(split.test.x, torch.from_numpy(x[20:]))
    assert split.test.index.equal(torch.arange(10))
    assert len(split.train) + len(split.val) == 20
    assert split.classes == tuple(ODD)


X, Y = arrays()
F = X / 255.0


def replaced(values, value):
    values = values.copy()
    values[7] = value
    return values


@pytest.mark.parametrize(
    ("x", "y", "kind", "message"),
    [
        (X[:0], Y[:0], {}, r"arrays is empty \(x has shape \(0, 1, 4, 4\)\): expected at least one sample"),
        (X, Y * 0, {}, r"one class only \('0'\): a classifier needs at least two"),
        (
            X,
            replaced(Y, 3),
            {"classes": ODD},
            r"label 3 in row 7 of arrays is out of range: with 3 classes labels are 0..2",
        ),
        (X, Y + 1, {}, r"label 0 never occurs in arrays, though 3 does: .*Relabel, or name the classes"),
        (X, replaced(Y, -1), {}, r"label -1 in row 7 of arrays is negative"),
        (X, Y.astype(float), {}, r"y of arrays is torch.float64: labels must be integers"),
        (X, Y > 0, {}, r"y of arrays is torch.bool: labels must be integers"),
        (X, Y[:-1], {}, r"y of arrays has shape \(29,\): expected \(30,\)"),
        (X, np.eye(3)[Y], {}, r"y of arrays has shape \(30, 3\)"),
        (replaced(F, np.nan), Y, {}, r"x of arrays holds NaN or infinity"),
        (replaced(F, np.inf), Y, {}, r"x of arrays holds NaN or infinity"),
        (X.astype(float), Y, {}, r"runs from \d+ to 255: float must lie in \[0, 1\]. Divide by 255, or pass uint8"),
        (F - 0.5, Y, {}, r"runs from -0.5 to 0.5: float must lie"),
        (X.astype(int), Y, {}, r"x of arrays is torch.int64: expected uint8 in 0..255 or float"),
        (X[:, 0], Y, {}, r"shape \(30, 4, 4\): expected \(N, C, H, W\). Add the channel with x\[:, None\]"),
        (X.reshape(30, -1), Y, {}, r"shape \(30, 16\): expected \(N, C, H, W\)\.$"),
        (np.zeros((30, 8, 8, 3), np.uint8), Y, {}, r"channels last: expected \(N, C, H, W\); use x.transpose"),
        (np.array(["a"]), Y, {}, r"arrays must be arrays of numbers"),
        (X, Y, {"classes": ["a", "b", "a"]}, r"a class name twice among a, a, b"),
        (X, Y, {"test": (X[:, :, :3], Y)}, r"are \(1, 4, 4\) torch.uint8 in train but \(1, 3, 4\) torch.uint8 in test"),
        (X, Y, {"test": (F, Y)}, r"torch.uint8 in train but \(1, 4, 4\) torch.float32 in test"),
        (X, Y, {"test": (X, Y + 1)}, r"label 3 in row 2 of arrays \(test\) is out of range"),
        (X[:4], [0, 0, 0, 1], {}, r"cannot be split into 5 folds"),
        (X[:6], [0, 0, 0, 0, 0, 1], {}, r"cannot be split into 5 folds \(class '1' has one sample\)"),
    ],
)
def test_arrays_are_checked(x, y, kind, message):
    with pytest.raises(UserError, match=message):
        data.from_arrays(x, y, **kind)


# --------------------------------------------------------------------------------------------------------------- pixels


def test_pixels():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.pixels(x), torch.arange(256) / 255)
    floats = torch.rand(3)
    assert data.pixels(floats) is floats
    with pytest.raises(UserError, match=r"x is torch.int64: expected uint8"):
        data.pixels(torch.arange(3))


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_standardisation(kind):
    x, y = arrays(5000, shape=(2, 3, 4))
    x[:, 1] = 51
    mean, std = data.standardisation(data.check_arrays(x if kind == "uint8" else x / 255.0, y))
    assert mean.dtype == std.dtype == torch.float32
    assert mean.tolist() == pytest.approx([x[:, 0].mean() / 255, 0.2], abs=1e-6)
    assert std.tolist() == pytest.approx([x[:, 0].std() / 255, 1 / 255], abs=1e-6)
    with pytest.raises(UserError, match="this data is empty"):
        data.standardisation(data.check_arrays(x, y).take(slice(0, 0)))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    pad=st.integers(0, 6),
    flip=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    seed=st.integers(0, 99),
)
def test_augment_crops_and_mirrors(shape, pad, flip, dtype, seed):
    x = torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(dtype)
    out = data.augment(x, torch.Generator().manual_seed(seed), pad=pad, flip=flip)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    assert torch.equal(out, data.augment(x, torch.Generator().manual_seed(seed), pad=pad, flip=flip))
    h, w = shape[2:]
    for sample, result in zip(x, out, strict=True):  # every result is one of the crops, written out literally
        padded = torch.zeros(shape[1], h + 2 * pad, w + 2 * pad, dtype=dtype)
        padded[:, pad : pad + h, pad : pad + w] = sample
        crops = [padded[:, i : i + h, j : j + w] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
        crops += [c.flip(2) for c in crops] if flip else []
        assert any(torch.equal(result, c) for c in crops)


def test_augment_uses_every_crop_and_only_its_own_generator():
    x = torch.ones(4000, 1, 1, 1)
    state = torch.get_rng_state()
    out = data.augment(x, torch.Generator().manual_seed(0), pad=1, flip=True)
    assert torch.get_rng_state().equal(state)
    assert float(out.mean()) == pytest.approx(1 / 9, abs=0.02)  # one crop of nine holds the only pixel
    x = torch.tensor([1.0, 2.0]).expand(4000, 1, 1, 2)
    mirrored = data.augment(x, torch.Generator().manual_seed(0), pad=0, flip=True)[:, 0, 0, 0] == 2
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.04)
    rng = torch.Generator().manual_seed(0)
    assert data.augment(x, rng, pad=0, flip=False) is x
    one, two = (data.augment(x, rng, pad=2, flip=True) for _ in range(2))
    assert not torch.equal(one, two)
    with pytest.raises(UserError, match="pad must be 0 to 16 pixels for these images, got -1"):
        data.augment(x, rng, pad=-1, flip=False)


# -------------------------------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_parquet_in_hub_layout(tmp_path, mode):
    pictures = [picture(k, mode=mode, size=(5, 4)) for k in range(12)]
    labels = [k % 3 for k in range(12)]
    bytes_ = [png(p) for p in pictures]
    root = write(
        tmp_path / "set",
        **{
            "train-00000-of-00002": table(labels[:5], names=ODD, images=bytes_[:5]),
            "train-00001-of-00002": table(labels[5:], names=ODD, images=bytes_[5:]),
            "validation-00000-of-00001": table([0], names=ODD),
            "test-00000-of-00001": table(labels[:4], names=ODD, images=bytes_[:4]),
        },
    )
    split = data.load(root, val=0.25)
    assert (split.name, split.classes, split.shape) == (root, tuple(ODD), (1 if mode == "L" else 3, 4, 5))
    assert [len(split.train), len(split.val), len(split.test)] == [9, 3, 4]
    for part in (split.train, split.val, split.test):
        for x, y, i in zip(part.x, part.y, part.index, strict=True):
            expected = np.asarray(pictures[i]).reshape(4, 5, -1)
            assert np.array_equal(x.permute(1, 2, 0).numpy(), expected)
            assert y == labels[i]


def test_large_images_are_decoded_in_a_pool(tmp_path):
    pictures = [picture(k, size=(80, 70)) for k in range(6)]
    content = table([0, 1] * 3, images=[png(p) for p in pictures])
    split = data.load(write(tmp_path / "set", train=content, test=content))
    assert all(np.array_equal(x[0], np.asarray(p)) for x, p in zip(split.test.x, pictures, strict=True))


def test_splits_named_by_folder(tmp_path):
    for name, n in (("train", 6), ("test", 4)):
        write(tmp_path / name, **{"0000": table([k % 2 for k in range(n)])})
    assert len(data.load(tmp_path).test) == 4


def test_single_parquet_file_is_split(tmp_path):
    write(tmp_path, train=table([k % 2 for k in range(20)], names=["a", "b"]))
    split = data.load(tmp_path / "train.parquet", val=0)
    assert [len(split.train), len(split.test)] == [16, 4]
    assert split.test.y.bincount().tolist() == [2, 2]
    assert same(split.test, data.load(tmp_path, fold=(0, 5)).test)
    with pytest.raises(UserError, match=r"the image in row 1 of \S+one.parquet cannot be decoded"):
        data.load(write(tmp_path / "odd-one", one=table([0, 1], images=[png(picture(0)), b""])) + "/one.parquet")


def test_parquet_without_metadata_finds_columns_by_type(tmp_path):
    plain = table([0, 1] * 5, column="img", metadata=False, id=list(range(10)))
    split = data.load(write(tmp_path / "set", train=plain, test=plain))
    assert split.classes == ("0", "1")


def test_of_several_label_columns_label_is_taken(tmp_path):
    content = table([0, 1, 2] * 4, coarse=[0, 1] * 6)
    assert len(data.load(write(tmp_path / "set", train=content, test=content)).classes) == 3
    fine = table([0, 1] * 6, coarse=[0, 1] * 6).rename_columns(["image", "fine_label", "coarse"])
    renamed = datasets.Features(
        {"image": datasets.Image(), "fine_label": datasets.ClassLabel(names=["p", "q"]), "c": datasets.ClassLabel(2)}
    )
    fine = pa.table(fine.columns, schema=renamed.arrow_schema)
    assert data.load(write(tmp_path / "fine", train=fine, test=fine)).classes == ("p", "q")


GOOD = table([0, 1, 2] * 4)
IMAGES = [png(picture(k)) for k in range(12)]


def only(column: str) -> pa.Table:
    schema = datasets.Features({column: datasets.Features.from_arrow_schema(GOOD.schema)[column]}).arrow_schema
    return pa.table([GOOD.column(column)], schema=schema)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (table([]), r"is empty: expected at least one image"),
        (table([1] * 12), r"has one class only \('1'\)"),
        (table([0, 1, -1] * 4), r"label -1 in row 2 of .* \(train\) is negative: .* hidden labels"),
        (table([0, 1, 7] * 4), r"label 7 in row 2 of .* is out of range: with 3 classes"),
        (table([0, 1, None] * 4), r"column label of .* has 4 empty entries"),
        (table([0, 1, 2] * 4, names=["0", "1", "two"]), r"differ in their classes \('2', 'two'\)"),
        (table([0, 1, 2] * 4, images=[*IMAGES[:-1], b"no image"]), r"row 11 of .*set \(train\) cannot .* \(unknown"),
        (table([0, 1, 2] * 4, images=[*IMAGES[:-1], b""]), r"image in row 11 of .*train.* cannot be decoded"),
        (table([0, 1, 2] * 4, images=[*IMAGES[:-1], IMAGES[0][:-30]]), r"image in row 11 .* cannot be decoded"),
        (
            table([0, 1, 2] * 4, images=[*IMAGES[:5], png(picture(5, size=(6, 4))), *IMAGES[6:]]),
            r"the image in row 5 of .* is 6x4 L, but the image in row 0 of .* is 4x4 L: resize or convert all",
        ),
        (table([0, 1, 2] * 4, images=[*IMAGES[:-1], png(picture(5, mode="RGB"))]), r"row 11 .* 4x4 RGB, but .* 4x4 L"),
        (table([0, 1] * 6, images=[png(picture(k, mode="RGB")) for k in range(12)]), r"\(1, 4, 4\) .*--convert rgb"),
        (only("image"), r"1 image and 0 label columns in image \(Image\)"),
        (only("label"), r"0 image and 1 label columns in label \(ClassLabel\)"),
        (pa.table({"text": ["a"]}), r"0 image and 0 label columns in text \(string\)"),
    ],
)  # fmt: skip
def test_parquet_is_checked(tmp_path, cache, train, message):
    root = write(tmp_path / "set", train=train, test=GOOD)
    with pytest.raises(UserError, match=message):
        data.load(root)
    assert not cache.exists()  # refused data is not cached


def test_ambiguous_columns_are_named(tmp_path):
    content = table([0, 1] * 6, coarse=[0, 1] * 6)
    schema = datasets.Features(
        {"image": datasets.Image(), "a": datasets.ClassLabel(2), "b": datasets.ClassLabel(2)}
    ).arrow_schema
    content = pa.table(content.columns, schema=schema)
    with pytest.raises(
        UserError, match=r"2 label columns in image \(Image\), a \(ClassLabel\), b \(ClassLabel\): .*data.from_arrays"
    ):
        data.load(write(tmp_path / "set", train=content, test=content))


@pytest.mark.parametrize("keep", [0, 3, -20])
def test_truncated_parquet(tmp_path, keep):
    root = write(tmp_path / "set", train=GOOD, test=GOOD)
    file = tmp_path / "set" / "test.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"test.parquet' cannot be read as parquet .* Download it again"):
        data.load(root)


def test_splits_must_be_clear(tmp_path):
    root = write(tmp_path / "set", test=GOOD, validation=GOOD)
    with pytest.raises(
        UserError, match=r"has the splits test, val: expected train and test, train and val, or a single"
    ):
        data.load(root)


# -------------------------------------------------------------------------------------------------------- image folders


def test_image_folder_with_splits(tmp_path):
    names = {"Ähre": 4, "b c": 6}
    write_folder(tmp_path / "train", names, mode="RGB")
    write_folder(tmp_path / "test", dict.fromkeys(names, 2), mode="RGB")
    (tmp_path / "train" / "b c" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    split = data.load(tmp_path)
    assert (split.classes, split.shape) == (tuple(sorted(names)), (3, 4, 4))
    assert [len(split.train), len(split.val), len(split.test)] == [9, 1, 4]
    files = sorted((tmp_path / "train").rglob("*.png"))
    for x, y, i in zip(split.train.x, split.train.y, split.train.index, strict=True):
        assert np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(Image.open(files[i])))
        assert files[i].parent.name == split.classes[y]


def test_image_folder_without_splits_gives_a_fifth_to_test(tmp_path):
    split = data.load(write_folder(tmp_path / "set", {"car": 10, "train": 10}))  # a class may be called train
    assert split.classes == ("car", "train")
    assert split.test.y.bincount().tolist() == [2, 2]


def test_image_folder_errors(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no parquet file and no folder of images per class"):
        data.load(tmp_path / "none")
    root = write_folder(tmp_path / "set", {"a": 3, "b": 3})
    picture(0, size=(9, 9)).save(tmp_path / "set" / "b" / "001.png")
    with pytest.raises(UserError, match=r"b/001.png' is 9x9 L, but image '.*a/000.png' is 4x4 L"):
        data.load(root)
    (tmp_path / "set" / "b" / "001.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"b/001.png' cannot be decoded \(unknown format\): .*--skip-corrupt"):
        data.load(root)
    write_folder(tmp_path / "two" / "train", {"a": 3, "b": 3})
    write_folder(tmp_path / "two" / "test", {"a": 3, "c": 3})
    with pytest.raises(UserError, match=r"differ in their classes \('b', 'c'\)"):
        data.load(tmp_path / "two")


# ---------------------------------------------------------------------------------------------------------------- cache


def test_decoded_data_is_cached_and_rebuilt(tmp_path, cache, monkeypatch):
    root = write(tmp_path / "set", train=table([0, 1, 2] * 4, names=ODD), test=table([0, 1, 2] * 4, names=ODD))
    first = data.load(root)
    (kept,) = cache.iterdir()  # one file, and no temporary one
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(data.readers, "decode", None)  # a second decode would fail
        for name in (root, "set"):
            second = data.load(name)
            assert all(same(getattr(first, p), getattr(second, p)) for p in ("train", "val", "test"))
            assert (first.classes, first.fingerprint) == (second.classes, second.fingerprint)
    good = kept.read_bytes()
    for damage in (b"", good[:50], good[:-10], b"x" * 100, b"\xff" * len(good)):
        kept.write_bytes(damage)
        assert same(data.load(root).train, first.train)
        with monkeypatch.context() as patch:
            patch.setattr(data.readers, "decode", None)
            assert same(data.load(root).train, first.train)
    file = tmp_path / "set" / "test.parquet"
    pq.write_table(table([2, 1, 0] * 4, names=ODD), file)
    os.utime(file, ns=(1, 1))
    assert data.load(root).test.y[0] == 2
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_warns(tmp_path, monkeypatch):
    root = write(tmp_path / "set", train=GOOD, test=GOOD)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="decoded data is not cached: .* set HOLDFAST_CACHE"):
        assert len(data.load(root).test) == 12


# ------------------------------------------------------------------------------------------------------------------ hub


def hub(monkeypatch, answer):
    calls = []

    def load_dataset(repo, **kwargs):
        calls.append((repo, kwargs))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def as_dataset(content: pa.Table) -> datasets.Dataset:
    return datasets.Dataset(datasets.table.InMemoryTable(content))


@pytest.mark.parametrize(
    ("name", "repo"), [("cifar10", "uoft-cs/cifar10"), ("mnist", "ylecun/mnist"), ("a/b-1", "a/b-1")]
)
def test_hub_data_is_downloaded_once(monkeypatch, name, repo):
    parts = {
        "train": as_dataset(table([0, 1, 2] * 4, names=ODD, column="img")),
        "test": as_dataset(table([0, 1], names=ODD, column="img")),
    }
    calls = hub(monkeypatch, datasets.DatasetDict(parts))
    first, second = data.load(name), data.load(name)
    assert [c[0] for c in calls] == [repo]
    assert not Path(calls[0][1]["cache_dir"]).exists()
    assert (first.name, first.classes, first.fingerprint) == (name, tuple(ODD), second.fingerprint)
    assert len(first.test) == 2
    assert data.default_folds(name) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            ConnectionError("no route"),
            r"the hub cannot be reached to fetch 'ylecun/mnist' \(no route\): connect once, or pass",
        ),
        (
            FileNotFoundError("no such set"),
            r"neither a local path nor on the hub \(FileNotFoundError: no such set\): check",
        ),
        (ValueError("Config name is missing"), r"\(ValueError: Config name is missing\)"),
        (
            datasets.DatasetDict({"train": as_dataset(GOOD), "dev": as_dataset(GOOD)}),
            r"ylecun/mnist has the splits dev, train",
        ),
    ],
)
def test_hub_errors(monkeypatch, answer, message):
    hub(monkeypatch, answer)
    with pytest.raises(UserError, match=message):
        data.load("mnist")


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnits", r"unknown data set 'mnits'. Did you mean 'mnist'\? Known: cifar10, digits, mnist, moons"),
        ("./nowhere", r"there is no such path: './nowhere'"),
        ("nowhere/at/all", r"there is no such path"),
        ("/nowhere", r"there is no such path"),
        ("~/nowhere-at-all", r"there is no such path"),
        ("data/train.parquet", r"there is no such path"),
        ("train.parquet", r"there is no such path"),
    ],
)
def test_names_that_do_not_exist(monkeypatch, name, message):
    hub(monkeypatch, AssertionError("the hub must not be called"))
    with pytest.raises(UserError, match=message):
        data.load(name)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"a file of another kind: expected a .parquet file"):
        data.load(tmp_path / "x.csv")


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_entry_is_described(name):
    entry = data.DATASETS[name]
    assert entry.about
    assert entry.pad >= 0
    assert isinstance(entry.flip, bool)
    assert entry.folds == data.default_folds(name)
