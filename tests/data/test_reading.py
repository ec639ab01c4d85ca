"""What is read, what is assumed and said, and what is refused: tables, folders, labels, modes, sizes, paths, bombs."""

from __future__ import annotations

import os
import shutil
import struct
import sys
import time
import warnings
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.data.test_data import as_dataset, hub, picture, png

from holdfast import data
from holdfast.data import images as images_module
from holdfast.errors import UserError
from holdfast.experiments.config import Comparison, DataCut, default_out

pytestmark = pytest.mark.filterwarnings("ignore::holdfast.data.DataWarning")
N = 20
LABELS = [k % 2 for k in range(N)]
PICTURES = [picture(k, size=(5, 4)) for k in range(N)]
PNGS = [png(one) for one in PICTURES]
CELLS = [{"bytes": one, "path": None} for one in PNGS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))


def table(tmp_path, name="one", **columns):
    path = tmp_path / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def folder(root, pictures):
    """Class folders of pictures: {"train/cat": [image, ...]}; a list of bytes is written as it is."""
    for name, inside in pictures.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k, one in enumerate(inside):
            path = root / name / f"{k:02}.png"
            path.write_bytes(one) if isinstance(one, bytes) else one.save(path)
    return root


def pictures(count=6, start=0, **kind):
    return [picture(start + k, **kind) for k in range(count)]


def whole(path, **reading):
    """All samples, in source order."""
    split = data.load(path, whole=True, **reading)
    return split.test, split.classes, "\n".join(split.notes)


def huge(width, height):
    """A PNG of a few bytes that claims any size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("column", "labels", "classes", "note"),
    [
        ("label", LABELS, ("0", "1"), ""),
        ("cls", ["b" if k else "a" for k in LABELS], ("a", "b"), "its 2 classes are numbered sorted by name: a, b"),
        ("class", ["10" if k else "9" for k in LABELS], ("9", "10"), "in numerical order: 9, 10"),
        ("target", [bool(k) for k in LABELS], ("False", "True"), "class 0 is False, class 1 is True"),
        ("labels", [float(k) for k in LABELS], ("0", "1"), "whole numbers as floats"),
        ("Label", [k + 1 for k in LABELS], ("1", "2"), "counts from 1; class 0 is the one labelled 1"),
        ("y", [k + 1.0 for k in LABELS], ("1", "2"), "counts from 1"),
        ("species", ["b" if k else "a" for k in LABELS], ("a", "b"), "column species, the only one that may hold them"),
        ("kind", pa.array(["b" if k else "a" for k in LABELS]).dictionary_encode(), ("a", "b"), "sorted by name"),
    ],
)
def test_labels_of_every_kind(tmp_path, column, labels, classes, note):
    test, names, notes = whole(table(tmp_path, image=PNGS, **{column: labels}))
    assert names == classes
    assert test.y.tolist() == LABELS
    assert note in notes
    assert bool(notes) == bool(note)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([k / 2 for k in LABELS], r"column label of .* holds 0.5: labels are classes, not quantities"),
        ([float("nan")] * N, r"holds nan"),
        (["" if k else "a" for k in LABELS], r"column label of .* has 10 empty entries"),
        ([3e8 * k for k in LABELS], r"label 1 never occurs in .*, though 300000000 does"),
        ([300_000_000 * k for k in LABELS], r"label 1 never occurs in .*, though 300000000 does"),
        ([10**18 * k for k in LABELS], r"label 1 never occurs"),
        (pa.array([(2**64 - 1) * k for k in LABELS], pa.uint64()), r"label 18446744073709551615: labels are 0..K-1"),
        ([k - 1 for k in LABELS], r"label -1 in row 0 .* is negative"),
        ([[k] for k in LABELS], r"column label of .* is list<.*>: expected whole numbers"),
    ],
)
def test_labels_that_name_no_classes(tmp_path, monkeypatch, labels, message):
    monkeypatch.setattr(data.readers, "decode", None)  # refused before any image is decoded
    path = table(tmp_path, image=PNGS, label=labels)
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        data.load(path, label_column="label")
    assert time.monotonic() - began < 5


def test_far_labels_of_arrays_are_refused_at_once():
    x = np.zeros((4, 1, 2, 2), np.uint8)
    for far in (300_000_000, 2**62):
        with pytest.raises(UserError, match=f"label 1 never occurs in arrays, though {far} does"):
            data.from_arrays(x, [0, far, 0, far])
    with pytest.raises(UserError, match=r"holds the label 18446744073709551615"):
        data.from_arrays(x, np.array([0, 2**64 - 1, 0, 1], np.uint64))


def test_too_many_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(data.readers, "decode", None)
    count = 30_001
    path = table(tmp_path, image=[PNGS[0]] * (2 * count), label=[str(k % count) for k in range(2 * count)])
    with pytest.raises(UserError, match=r"holds 30,001 different labels \(0, 1, 10, ... .*at most 30,000 classes"):
        data.load(path)
    x, y = np.zeros((20, 1, 2, 2), np.uint8), LABELS
    with pytest.raises(UserError, match=r"arrays names 100,000 classes: at most 30,000"):
        data.from_arrays(x, y, classes=range(100_000))
    with pytest.raises(UserError, match=r"class name 'aaaa"):
        data.from_arrays(x, y, classes=["a" * 10**6, "b"])
    with pytest.raises(UserError, match=r"class name 'a\\x1b\[31m': .*without control characters"):
        data.from_arrays(x, y, classes=["a\x1b[31m", "b"])
    with pytest.raises(UserError, match=r"is the text 'ab': expected a list"):
        data.from_arrays(x, y, classes="ab")


def test_a_column_of_texts_is_not_taken_for_labels(tmp_path):
    path = table(tmp_path, image=PNGS, caption=[f"a picture of {k}" for k in range(N)])
    with pytest.raises(UserError, match=r"caption of .* holds 20 different values in 20 rows, so it names no classes"):
        data.load(path)


def test_columns_are_asked_for_where_there_is_a_choice(tmp_path):
    text = ["b" if k else "a" for k in LABELS]
    path = table(tmp_path, a=PNGS, b=PNGS[::-1], target=LABELS, cls=text)
    with pytest.raises(
        UserError, match=r"2 image and 2 label columns in a \(binary\), .* --image-column and --label-c"
    ):
        data.load(path)
    test, classes, _ = whole(path, image_column="b", label_column="cls")
    assert classes == ("a", "b")
    assert torch.equal(test.x[0, 0], torch.from_numpy(np.array(PICTURES[-1])))
    with pytest.raises(UserError, match=r"unknown column of .* 'c'"):
        data.load(path, image_column="c")
    with pytest.raises(UserError, match=r"column a of .* cannot hold both the images and the labels"):
        data.load(path, image_column="a", label_column="a")
    with pytest.raises(UserError, match=r"column target of .* has one number a row: that is no image"):
        data.load(path, image_column="target", label_column="cls")
    with pytest.raises(UserError, match=r"digits is not a table: image_column and label_column are for parquet"):
        data.load("digits", label_column="y")
    _, classes, notes = whole(table(tmp_path, "two", image=PNGS, mask=PNGS, label=LABELS, cls=text))
    assert classes == ("0", "1")
    assert "the images are read from column image, not from mask" in notes
    assert "the labels are read from column label, not from cls" in notes


def test_classes_of_train_and_test_are_matched_by_name(tmp_path):
    def part(labels, names):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        schema = features.arrow_schema
        columns = {"image": CELLS[: len(labels)], "label": labels}
        return pa.table({k: pa.array(v, schema.field(k).type) for k, v in columns.items()}, schema=schema)

    pq.write_table(part([0, 1, 2] * 4, ["cat", "dog", "eel"]), tmp_path / "train.parquet")
    pq.write_table(part([0, 1] * 3, ["eel", "cat"]), tmp_path / "test.parquet")
    split = data.load(tmp_path)
    assert split.classes == ("cat", "dog", "eel")
    assert split.test.y.tolist() == [2, 0] * 3
    assert "no test images of class dog" in "\n".join(split.notes)
    assert "matched by name" in "\n".join(split.notes)


def test_text_labels_that_only_test_has(tmp_path):
    table(tmp_path, "train", image=PNGS, label=["a", "b"] * 10)
    table(tmp_path, "test", image=PNGS, label=["b", "c"] * 10)
    with pytest.raises(UserError, match=r"the label c of .* occurs in test but not in train"):
        data.load(tmp_path)


def test_labels_from_1_in_train_and_test(tmp_path):
    table(tmp_path, "train", image=PNGS, label=[1, 2, 3, 3] * 5)
    table(tmp_path, "test", image=PNGS, label=[2, 3] * 10)
    split = data.load(tmp_path)
    assert split.classes == ("1", "2", "3")
    assert split.test.y.tolist() == [1, 2] * 10


# --------------------------------------------------------------------------------------------------- images in a table

RANDOM = np.random.default_rng(0)
FLAT = RANDOM.integers(0, 256, (N, 36))
COLOUR = RANDOM.integers(0, 256, (N, 6, 5, 3))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (PNGS, np.stack([np.asarray(one) for one in PICTURES])[:, None]),
        (pa.array(PNGS, pa.large_binary()), np.stack([np.asarray(one) for one in PICTURES])[:, None]),
        (FLAT.tolist(), FLAT.reshape(N, 1, 6, 6)),
        (pa.array(FLAT.tolist(), pa.list_(pa.int16(), 36)), FLAT.reshape(N, 1, 6, 6)),
        (FLAT.astype(float).tolist(), FLAT.reshape(N, 1, 6, 6)),
        (FLAT.reshape(N, 4, 9).tolist(), FLAT.reshape(N, 1, 4, 9)),
        ([row.astype(np.uint8).tobytes() for row in FLAT], FLAT.reshape(N, 1, 6, 6)),
        (COLOUR.tolist(), COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2).tolist(), COLOUR.transpose(0, 3, 1, 2)),
        ((FLAT > 99).tolist(), (FLAT > 99).reshape(N, 1, 6, 6) * 255),
    ],
)
def test_images_as_bytes_and_lists(tmp_path, column, expected):
    test, _, _ = whole(table(tmp_path, image=column, label=LABELS))
    assert test.x.dtype == torch.uint8
    assert np.array_equal(test.x.numpy(), expected)


def test_images_as_floats(tmp_path):
    test, _, notes = whole(table(tmp_path, image=(FLAT / 255).tolist(), label=LABELS))
    assert test.x.dtype == torch.float32
    assert np.allclose(test.x.numpy().reshape(N, 36), FLAT / 255)
    assert "rows of 36 pixels were read as 6x6 grey images" in notes


@pytest.mark.parametrize("name", ["pixel{}", "{}", "px_{}", "grid"])
def test_images_as_pixel_columns(tmp_path, name):
    order = RANDOM.permutation(36)  # names say where a pixel is, not the order of the columns
    names = [f"{i // 9 + 1}x{i % 9 + 1}" if name == "grid" else name.format(i) for i in range(36)]
    path = table(tmp_path, id=list(range(N)), label=LABELS, **{names[i]: FLAT[:, i] for i in order})
    test, _, _ = whole(path)
    shape = (4, 9) if name == "grid" else (6, 6)
    assert np.array_equal(test.x.numpy(), FLAT.reshape(N, 1, *shape))
    assert test.y.tolist() == LABELS


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (RANDOM.integers(0, 256, (N, 3072)).tolist(), r"3072 pixels a row without a shape: only squares of grey"),
        (RANDOM.integers(0, 256, (N, 3, 3, 3)).tolist(), r"shape 3 x 3 x 3: expected H x W, H x W x C or C x H x W"),
        ([[1] * (16 + k % 2) for k in range(N)], r"lists of different lengths \(16, 17\): make them equal"),
        ([[1] * 16] * (N - 1) + [None], r"has 1 empty entries"),
        ([[1, None] * 8] * N, r"empty entries: fill or drop"),
        ([[-5, 200] * 8] * N, r"run from -5 to 200: expected whole numbers in 0..255 or floats in \[0, 1\]"),
        ([[0.5, 200.5] * 8] * N, r"run from 0 to 200.5: expected whole numbers"),
        ([[0.5, float("nan")] * 8] * N, r"NaN or infinity"),
    ],
)
def test_numbers_that_are_no_images(tmp_path, column, message):
    with pytest.raises(UserError, match=message):
        data.load(table(tmp_path, image=column, label=LABELS))


# ----------------------------------------------------------------------------------------------------- paths in a table


@pytest.mark.parametrize("column", ["image", "file_name"])
def test_paths_start_beside_the_table(tmp_path, monkeypatch, column):
    folder(tmp_path / "set" / "pics", {"": PICTURES})
    paths = [f"pics/{k:02}.png" for k in range(N)]
    cells = [{"bytes": None, "path": path} for path in paths] if column == "image" else paths
    path = table(tmp_path / "set", **{column: cells, "label": LABELS})
    monkeypatch.chdir("/")
    test, _, _ = whole(path)
    assert torch.equal(test.x[:, 0], torch.stack([torch.from_numpy(np.array(one)) for one in PICTURES]))
    picture(99, size=(5, 4)).save(tmp_path / "set" / "pics" / "00.png")  # no answer of yesterday
    assert not torch.equal(whole(path)[0].x[0], test.x[0])


@pytest.mark.parametrize("where", ["absolute", "above", "link", "missing", "nul", "fifo"])
def test_paths_may_not_leave_the_folder(tmp_path, where):
    PICTURES[0].save(tmp_path / "secret.png")
    inside = tmp_path / "set"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(inside / "fifo.png")
    path = {"absolute": str(tmp_path / "secret.png"), "above": "../secret.png", "nul": "a\0b"}.get(
        where, f"{where}.png"
    )
    file = table(inside, image=[{"bytes": None, "path": path}] * N, label=LABELS)
    why = "does not exist" if where in ("missing", "nul", "fifo") else "outside the folder of the table"
    with pytest.raises(UserError, match=rf"row 0 of .* names the file '.*', (which )?{why}"):
        data.load(file)


def test_text_in_place_of_bytes_is_not_opened(tmp_path, monkeypatch):
    PICTURES[0].save(tmp_path / "secret.png")
    monkeypatch.chdir(tmp_path)
    for name in ("secret.png", str(tmp_path / "secret.png")):
        path = table(tmp_path / "set", image=[{"bytes": name, "path": None}] * N, label=LABELS)
        with pytest.raises(UserError, match=r"0 image and 1 label columns"):
            data.load(path)


def test_the_hub_does_not_open_local_pictures(tmp_path, monkeypatch):
    PICTURES[0].save(tmp_path / "secret.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * N
    columns = {"image": cells, "label": LABELS}
    schema = features.arrow_schema
    content = pa.table({k: pa.array(v, schema.field(k).type) for k, v in columns.items()}, schema=schema)
    hub(monkeypatch, datasets.DatasetDict({"train": as_dataset(content)}))
    with pytest.raises(UserError, match=r"names the file .*secret.png', outside the folder of the table"):
        data.load("some/one")


def test_extension_types_of_the_hub(tmp_path, monkeypatch):
    features = datasets.Features({"pixels": datasets.Array2D((4, 9), "uint8"), "label": datasets.Value("string")})
    rows = {"pixels": FLAT.reshape(N, 4, 9).tolist(), "label": ["b" if k else "a" for k in LABELS]}
    made = datasets.Dataset.from_dict(rows, features=features)
    hub(monkeypatch, datasets.DatasetDict({"train": made}))
    test, classes, _ = whole("some/arrays")
    assert classes == ("a", "b")
    assert np.array_equal(test.x.numpy(), FLAT.reshape(N, 1, 4, 9))
    made.to_parquet(tmp_path / "one.parquet")
    assert torch.equal(whole(tmp_path / "one.parquet")[0].x, test.x)


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_sizes_are_read_before_pixels(tmp_path):
    """A small file that claims a large image is refused by its header; no memory is taken for it."""
    for name, sides in (("one", (12_000, 12_000)), ("two", (60_000, 60_000))):
        path = table(tmp_path, name, image=[*PNGS[:-1], huge(*sides)], label=LABELS)
        with pytest.raises(UserError, match=r"row 19 .*claims .*limit of 89,478,485"):
            data.load(path)
    many = table(tmp_path, "many", image=[huge(9000, 9000)] * 20_000, label=[0, 1] * 10_000)
    message = (
        r"the 14,400 images .* 9000x9000 .* need 1,086.3 GiB on the disk of .*cache, which has .* left: .*--resize"
    )
    with pytest.raises(UserError, match=message):
        data.load(many)


def test_the_columns_of_a_table_must_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "machine_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"the columns image, label of .* need .* GiB; the limit is a quarter of this"):
        data.load(table(tmp_path, image=PNGS, label=LABELS))


def test_images_of_several_sizes_and_modes(tmp_path):
    root = folder(tmp_path / "a", {"x": pictures(mode="RGB"), "y": pictures(mode="RGB", start=9)})
    picture(1, size=(9, 8), mode="RGB").save(root / "x" / "00.png")  # the odd one comes first
    picture(2).save(root / "y" / "03.png")
    message = r"x/00.png' is 9x8 RGB, image '.*y/03.png' is 4x4 L, but image '.*x/01.png' is 4x4 RGB: .*with {}"
    with pytest.raises(
        UserError, match=message.format(r"--resize N and --convert rgb or grey \(in Python resize=N, c")
    ):
        data.load(root)
    with pytest.raises(UserError, match=r"y/03.png' is 4x4 L, but .* with --convert rgb or grey \(in Python convert="):
        data.load(root, resize=6)
    test, _, notes = whole(root, resize=6, convert="rgb")
    assert test.x.shape == (12, 3, 6, 6)
    expected = picture(1, size=(9, 8), mode="RGB").resize((6, 6), Image.Resampling.BILINEAR)
    assert np.array_equal(test.x[0].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert "12 images resized to 6x6, bilinear" in notes
    assert "converted to RGB: 1 of mode L" in notes
    assert whole(root, resize=6, convert="gray")[0].x.shape == (12, 1, 6, 6)
    assert whole(root, resize=5, convert="grey")[0].x.shape == (12, 1, 5, 5)  # the cache knows how it was read
    many = folder(tmp_path / "b", {"x": pictures(9), "y": pictures(5, size=(3, 3))})
    with pytest.raises(UserError, match=r"y/00.png' .*y/01.png' .*y/02.png' is 3x3 L \(and 2 more\), but"):
        data.load(many)


@pytest.mark.parametrize(
    ("name", "odd", "message"),
    [
        ("cmyk.tif", picture(0, mode="RGB").convert("CMYK"), r"has mode CMYK: expected grey \(L\) or RGB. Use --conve"),
        ("clear.png", Image.new("RGBA", (4, 4), (1, 2, 3, 99)), r"is transparent in part: --convert rgb"),
        ("grey.png", picture(0), r"is 4x4 L, but .* is 4x4 RGB"),
        ("float.tif", Image.new("F", (4, 4)), r"has 32-bit pixels \(mode F\): their range is not known"),
    ],
)
def test_one_odd_image_is_named_or_converted(tmp_path, name, odd, message):
    root = folder(tmp_path / "a", {"x": pictures(mode="RGB"), "y": pictures(mode="RGB", start=9)})
    odd.save(root / "x" / name)
    with pytest.raises(UserError, match=rf"x/{name}' {message}"):
        data.load(root)
    if odd.mode == "F":
        with pytest.raises(UserError, match=r"32-bit pixels"):
            data.load(root, convert="rgb")
    else:
        test, _, notes = whole(root, convert="rgb")
        assert test.x.shape == (13, 3, 4, 4)
        assert np.array_equal(test.x[6].permute(1, 2, 0).numpy(), np.asarray(odd.convert("RGB")))
        assert f"converted to RGB: 1 of mode {odd.mode}" in notes


def test_forms_that_say_the_same_are_read(tmp_path):
    """A palette and an alpha channel that hides nothing are RGB; black and white is grey."""
    root = folder(tmp_path / "a", {"x": pictures(mode="RGB"), "y": pictures(mode="RGB", start=9)})
    opaque = picture(1, mode="RGB")
    opaque.putalpha(255)
    palette = picture(2, mode="RGB").quantize(8)
    opaque.save(root / "x" / "06.png")
    palette.save(root / "x" / "07.png")
    test, _, notes = whole(root)
    assert np.array_equal(test.x[6].permute(1, 2, 0).numpy(), np.asarray(opaque)[..., :3])
    assert np.array_equal(test.x[7].permute(1, 2, 0).numpy(), np.asarray(palette.convert("RGB")))
    assert "converted to RGB: 1 of mode P, 1 of mode RGBA" in notes
    bits = folder(tmp_path / "b", {"x": [one.convert("1") for one in pictures()], "y": pictures(start=9)})
    assert set(whole(bits)[0].x[:6].unique().tolist()) == {0, 255}


def test_orientation_and_frames_are_said(tmp_path):
    root = folder(tmp_path / "a", {"x": pictures(), "y": pictures(start=9)})
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(root / "x" / "turned.jpg", exif=exif)
    picture(1).save(root / "y" / "several.tif", save_all=True, append_images=[picture(2)])
    test, _, notes = whole(root)
    assert np.array_equal(test.x[-1, 0].numpy(), np.asarray(picture(1)))
    assert "1 image with an EXIF orientation, which is not applied" in notes
    assert "1 image of several frames: the first is used" in notes


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_images_are_scaled(tmp_path, suffix):
    ramp = np.arange(0, 65536, 13, dtype=np.uint16)[: 71 * 71].reshape(71, 71)
    for name in "xy":
        (tmp_path / "a" / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.roll(ramp, k)).save(tmp_path / "a" / name / f"{k}.{suffix}")
    test, _, notes = whole(tmp_path / "a")
    assert np.array_equal(test.x[0, 0].numpy(), np.round(ramp / 257))
    assert "6 16-bit grey images scaled to 8 bits, value / 257." in notes
    rgb, _, _ = whole(tmp_path / "a", convert="rgb")
    assert np.array_equal(rgb.x[0, 1].numpy(), np.round(ramp / 257))  # not white: convert alone would clip at 255
    for path in (tmp_path / "a").rglob(f"*.{suffix}"):
        Image.fromarray(ramp // 16).save(path)
    assert "The largest value is 4095: if they hold fewer bits" in whole(tmp_path / "a")[2]


def test_broken_images_are_counted(tmp_path):
    root = folder(tmp_path / "a", {"x": [b"broken"] * 5 + pictures(), "y": pictures()})
    message = (
        r"x/00.png' cannot be decoded \(unknown format\), and 4 more: image '.*x/01.png', image '.*x/02.png': repl"
    )
    with pytest.raises(UserError, match=message):
        data.load(root)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", b"\0\0\1\0\1\0"])
def test_no_format_that_starts_another_program(tmp_path, content):
    cells = [{"bytes": content, "path": None}] * N
    with pytest.raises(UserError, match=r"cannot be decoded \(unknown format\)"):
        data.load(table(tmp_path, image=cells, label=LABELS))


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"convert": "cmyk"}, r"convert must be 'rgb' or 'grey', got 'cmyk'"),
        ({"resize": -1}, r"resize must be the side in pixels, 1..4096 .* got -1"),
        ({"resize": 1.5}, r"got 1.5"),
        ({"resize": 10**6}, r"got 1000000"),
        ({"resize": True}, r"got True"),
    ],
)
def test_what_cannot_be_asked_for(reading, message):
    with pytest.raises(UserError, match=message):
        data.load("digits", **reading)


def test_bundled_data_is_resized_too():
    split = data.load("digits", resize=16, convert="rgb")
    assert split.shape == (3, 16, 16)
    assert data.load("digits").test.y.equal(split.test.y)


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("names", [("Train", "TEST"), ("training", "Testing"), ("TRAIN", "test")])
def test_split_folders_in_any_case(tmp_path, names):
    root = tmp_path / "a"
    for start, name, count in ((0, names[0], 6), (50, names[1], 2)):
        folder(root / name, {"x": pictures(count, start), "y": pictures(count, start + 20)})
    split = data.load(root, val=0)
    assert split.classes == ("x", "y")
    assert (len(split.train), len(split.test), split.notes) == (12, 4, ())


@pytest.mark.parametrize("name", ["val", "Val", "valid", "validation"])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_validation_is_the_test_set_where_there_is_no_other(tmp_path, name, kind):
    if kind == "folder":
        for split, start in (("train", 0), (name, 50)):
            folder(tmp_path / split, {"x": pictures(6, start), "y": pictures(6, start + 20)})
    else:
        table(tmp_path, "train", image=PNGS, label=LABELS)
        table(tmp_path, f"{name}-0", image=PNGS[:12], label=LABELS[:12])
    split = data.load(tmp_path)
    assert len(split.test) == 12
    assert "no test split, so the validation split is the test set" in split.notes[0]


def test_a_validation_split_beside_test_is_said_not_to_be_used(tmp_path):
    for split, start in (("train", 0), ("Validation", 20), ("test", 50)):
        folder(tmp_path / split, {"x": pictures(6, start), "y": pictures(6, start + 20)})
    assert "not used: 'val'. Validation images are split off from train." in data.load(tmp_path).notes[0]
    shutil.copytree(tmp_path / "train", tmp_path / "TRAIN")
    with pytest.raises(UserError, match=r"has both 'TRAIN' and 'train' for train: put them together"):
        data.load(tmp_path)


def test_hidden_and_other_files_are_skipped_and_counted(tmp_path):
    root = folder(
        tmp_path / "a",
        {"x": pictures(), "y": pictures(start=9), ".ipynb_checkpoints": pictures(2), "__MACOSX/x": pictures(3)}
        | {"x/.ipynb_checkpoints": pictures(1), ".empty": []},
    )
    (root / "x" / "._00.png").write_bytes(b"resource fork")
    (root / "x" / "notes.txt").write_text("no image")
    (root / "y" / "Thumbs.db").write_text("")
    (root / "empty").mkdir()
    picture(0).save(root / "loose.png")
    os.mkfifo(root / "x" / "fifo.png")
    pq.write_table(pa.table({"a": [1]}), root / ".ipynb_checkpoints" / "a.parquet")
    test, classes, notes = whole(root)
    assert classes == ("x", "y")
    assert len(test) == 12
    assert "skipped 7 hidden images: .ipynb_checkpoints, __MACOSX, files that begin with a dot" in notes
    assert "skipped 1 image outside the class folders" in notes
    assert "skipped 1 file of other kinds: .txt" in notes
    assert "class folders without images were left out: empty" in notes
    assert whole(root)[2] == notes  # from the cache too
    picture(77).save(root / "empty" / "0.png")
    assert whole(root)[1] == ("empty", "x", "y")


def test_hidden_parquet_files_are_skipped_and_counted(tmp_path):
    table(tmp_path, "Train-0", image=PNGS, label=LABELS)
    table(tmp_path, "TEST-0", image=PNGS, label=LABELS)
    table(tmp_path / ".ipynb_checkpoints", "train-1", image=PNGS, label=LABELS)
    split = data.load(tmp_path)
    assert len(split.train) + len(split.val) == N
    assert "skipped 1 hidden parquet file: .ipynb_checkpoints" in split.notes[0]


def test_a_class_without_test_images(tmp_path):
    folder(tmp_path / "train", {"x": pictures(), "y": pictures(start=9), "z": pictures(start=18), "w": []})
    folder(tmp_path / "test", {"x": pictures(2, 30), "z": pictures(2, 40), "y": []})
    folder(tmp_path / "extra" / "q", {"": pictures(3)})
    split = data.load(tmp_path)
    assert split.classes == ("x", "y", "z")
    assert split.test.y.tolist() == [0, 0, 2, 2]
    notes = "\n".join(split.notes)
    assert "no test images of class y" in notes
    assert "class folders without images were left out: w" in notes
    assert "skipped folders that are no split: 'extra' (3 images)" in notes


def test_numbered_class_folders_are_said_to_be_sorted_as_text(tmp_path):
    """As torchvision sorts them, so that a network trained there finds its classes."""
    _, classes, notes = whole(folder(tmp_path, {name: pictures(start=int(name)) for name in ("0", "2", "10")}))
    assert classes == ("0", "10", "2")
    assert "class folders are numbered in the order of text: 0, 10, 2" in notes


def test_folders_that_hold_no_classes(tmp_path):
    folder(tmp_path / "a", {"": pictures(3)})
    with pytest.raises(UserError, match=r"no folder of images per class \(images that lie in it directly: 3\)"):
        data.load(tmp_path / "a")
    folder(tmp_path / "b" / "wrapped", {"x": pictures(), "y": pictures()})
    with pytest.raises(UserError, match=r"holds a single folder, 'wrapped', with others in it: .*name that"):
        data.load(tmp_path / "b")


@pytest.mark.parametrize("name", ["x" * 100_000, "x/" * 50_000, "~nouser/x", "a\0b", "", "/dev/null", "fifo"])
def test_names_that_no_file_has(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(
        UserError, match=r"no such path|another kind|too long|control characters|home folder|device|is empty"
    ) as error:
        data.load(name)
    assert len(str(error.value)) < 400


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are text")
def test_a_folder_whose_name_is_no_text(tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    assert len(whole(folder(root, {"x": pictures(), "y": pictures(start=9)}))[0]) == 12
    with pytest.raises(UserError, match="without control characters"):
        data.load(folder(tmp_path / "b", {os.fsdecode(b"\xe9"): pictures(), "y": pictures()}))


# ------------------------------------------------------------------------------------- duplicates, assumptions, notes


def test_duplicates_between_the_cuts_are_named(tmp_path):
    folder(tmp_path / "train", {"x": pictures(), "y": pictures(start=9)})
    folder(tmp_path / "test", {"x": pictures(2, 30), "y": pictures(2, 40)})
    shutil.copy(tmp_path / "train" / "x" / "03.png", tmp_path / "test" / "x" / "01.png")
    Image.open(tmp_path / "train" / "x" / "00.png").save(
        tmp_path / "test" / "y" / "00.bmp"
    )  # equal pixels, another file
    (note,) = data.load(tmp_path).notes
    assert "2 test images are in train too, pixel for pixel (test 1 is train 3), 1 of them under another label" in note
    split = data.from_arrays(torch.stack([torch.full((1, 4, 4), k // 2 / 19) for k in range(N)]), LABELS)
    assert "10 images repeat earlier ones, pixel for pixel (image 1 is image 0), 10 of them under" in split.notes[0]
    assert data.load("moons").notes == ()  # two pixels may be equal by chance


X = torch.from_numpy(RANDOM.integers(0, 256, (N, 3, 5, 6), dtype=np.uint8))


@pytest.mark.parametrize(
    ("x", "note"),
    [
        (X, ""),
        (X.double() / 255, ""),
        (X % 2, r"uint8 images hold 0 and 1 only, read as 0/255 and 1/255, nearly black"),
        (X % 17, r"largest value of x is 16, read in 0..255, nearly black"),
        (X / 255**2, r"largest value of x is 0.0039.*, read in \[0, 1\], nearly black"),
        ((X % 2).float(), r"float images hold 0 and 1 only, read as black and white"),
        (X[:, :, :3, :3], r"x has the shape \(20, 3, 3, 3\), read as 3 channels of 3x3 pixels"),
        (X[..., :1], r"x has the shape \(20, 3, 5, 1\), read as 3 channels of 5x1"),
        (X[:, :1], ""),
        (X[:, :1, :, :1], ""),
    ],
)
def test_what_is_assumed_of_arrays_is_said(x, note):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = data.from_arrays(x, LABELS)
    notes = [one for one in split.notes if "pixel for pixel" not in one]
    assert len(notes) == bool(note)
    if note:
        with pytest.raises(AssertionError, match=note):
            raise AssertionError(notes[0])
    assert [str(one.message) for one in caught] == list(split.notes)
    assert all(one.filename == __file__ for one in caught)  # the user's own line


def test_text_that_is_not_text(tmp_path):
    labels = pa.array([b"\xff\xfe" if k else b"a" for k in LABELS]).cast(pa.string(), safe=False)
    with pytest.raises(UserError, match=r"cannot be read as parquet .*(utf|UTF)"):
        data.load(table(tmp_path, image=PNGS, label=labels))


def test_sparse_arrays_are_refused():
    with pytest.raises(UserError, match=r"x of arrays is a sparse tensor"):
        data.from_arrays(X.to_sparse(), LABELS)


def test_how_data_is_read_belongs_to_the_cut():
    cut = DataCut(limit=5, label_column="cls", resize=8)
    assert DataCut.from_json(cut.to_json()) == cut
    assert DataCut(limit=5).to_json() == {"limit": 5}
    plain, other = Comparison(), Comparison(resize=8, convert="rgb")
    assert other.cut(0) == DataCut(fold=None, limit=1000, resize=8, convert="rgb")
    assert "resize" not in plain.to_json()  # folders of before are found again
    assert other.to_json()["resize"] == 8
    assert default_out(plain) != default_out(other)


def test_a_flipped_bit_in_a_parquet_page_with_a_checksum_is_noticed(tmp_path):
    """Arrow checks those checksums, which a writer may leave out, only where it is asked to."""
    labels = [row % 2 for row in range(20)]
    path, plain = tmp_path / "d.parquet", {"compression": "none", "use_dictionary": False}
    cells = [{"bytes": png(picture(row)), "path": None} for row in labels]
    pq.write_table(pa.table({"image": cells, "label": labels}), path, write_page_checksum=True, **plain)
    whole = path.read_bytes()
    data.load(str(path))
    at = whole.index(np.array(labels, np.int64).tobytes())  # the first label
    path.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    with pytest.raises(UserError, match=r"d\.parquet' cannot be read as parquet .*CRC"):
        data.load(str(path))
