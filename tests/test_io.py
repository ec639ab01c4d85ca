"""Contracts of storage: what is written comes back; what is not whole or not ours is refused; no half-written file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import TypedDict

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast import io
from holdfast.errors import UserError
from holdfast.io import decode, inside, load_tensors, read_json, save_tensors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
TENSORS = {"a.b": torch.arange(6.0).view(2, 3), "mask": torch.tensor([True, False])}
ABOUT = {"history": [{"epoch": 1, "val": None}], "name": "Katze, 猫 & 'co' \n", "seconds": 1.5}


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=3),
    about=st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=3,
    ),
)
def test_round_trip(tmp_path_factory, dtype, shape, about):
    path = tmp_path_factory.mktemp("round") / "file.safetensors"
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    save_tensors(path, "thing", 3, {"x": tensor, "other": TENSORS["a.b"]}, about)
    back, header = load_tensors(path, "thing", 3)
    assert header == about
    assert set(back) == {"x", "other"}
    assert back["x"].dtype == dtype
    assert back["x"].shape == tensor.shape
    assert torch.equal(back["x"], tensor)


def test_special_values_survive(tmp_path):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    save_tensors(tmp_path / "f", "thing", 1, {"x": x}, {})
    back = load_tensors(tmp_path / "f", "thing", 1)[0]["x"]
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))


def test_views_graphs_and_shared_memory_are_written_as_values(tmp_path):
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    parts = {"turned": whole.t(), "row": whole[1], "again": whole, "column": whole[:, 2], "graph": whole * 2}
    save_tensors(tmp_path / "f", "thing", 1, parts, {})
    back, _ = load_tensors(tmp_path / "f", "thing", 1)
    for name, tensor in parts.items():
        assert torch.equal(back[name], tensor), name
        assert not back[name].requires_grad


def test_no_tensors_at_all(tmp_path):
    save_tensors(tmp_path / "f", "thing", 1, {}, {"only": "words"})
    assert load_tensors(tmp_path / "f", "thing", 1) == ({}, {"only": "words"})


def test_folders_are_made(tmp_path):
    save_tensors(tmp_path / "a" / "b" / "f", "thing", 1, TENSORS, ABOUT)
    assert load_tensors(tmp_path / "a" / "b" / "f", "thing", 1)[1] == ABOUT


def test_a_loaded_tensor_outlives_its_file(tmp_path):
    """What was read stays as it was read when the next checkpoint takes the file's place, or it is deleted."""
    path = tmp_path / "f"
    save_tensors(path, "thing", 1, {"x": torch.ones(100_000)}, {})
    x = load_tensors(path, "thing", 1)[0]["x"]
    save_tensors(path, "thing", 1, {"x": torch.zeros(10)}, {})
    path.unlink()
    assert torch.equal(x, torch.ones(100_000))
    x += 1  # and it may be written to


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no thing at .*nowhere"):
        load_tensors(tmp_path / "nowhere", "thing", 1)
    with pytest.raises(UserError, match="there is no thing"):
        load_tensors(tmp_path, "thing", 1)


def test_another_kind_is_refused(tmp_path):
    save_tensors(tmp_path / "f", "thing", 1, TENSORS, ABOUT)
    with pytest.raises(UserError, match=r"is not a holdfast checkpoint .*'thing'"):
        load_tensors(tmp_path / "f", "checkpoint", 1)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_somebody_elses_safetensors_are_refused(metadata, tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "f", metadata)
    with pytest.raises(UserError, match="is not a holdfast thing"):
        load_tensors(tmp_path / "f", "thing", 1)


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_version_is_refused_with_both_numbers(version, tmp_path):
    save_tensors(tmp_path / "f", "thing", version, TENSORS, ABOUT)
    before = (tmp_path / "f").read_bytes()
    with pytest.raises(UserError, match=f"of version {version}; this holdfast reads version 1"):
        load_tensors(tmp_path / "f", "thing", 1)
    assert (tmp_path / "f").read_bytes() == before


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "f"
    save_tensors(path, "thing", 1, TENSORS, ABOUT)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short or damaged"):
            load_tensors(path, "thing", 1)
        assert path.stat().st_size == length


def test_garbage_is_refused(tmp_path):
    path = tmp_path / "f"
    save_tensors(path, "thing", 1, TENSORS, ABOUT)
    whole = path.read_bytes()
    for content in (b"not a safetensors file at all", b"\x00" * len(whole), whole[::-1], whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_tensors(path, "thing", 1)


def test_an_about_that_is_no_json_is_refused(tmp_path):
    header = {"holdfast": "thing", "version": "1", "about": "{broken"}
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "f", header)
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path / "f", "thing", 1)


def test_an_about_that_is_missing_is_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "f", {"holdfast": "thing", "version": "1"})
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path / "f", "thing", 1)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(failing, code, tmp_path, monkeypatch):
    path = tmp_path / "f"
    save_tensors(path, "thing", 1, TENSORS, ABOUT)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(UserError, match=f"could not write .*{os.strerror(code)}"):
        save_tensors(path, "thing", 1, {"x": torch.zeros(1000)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_a_user_error(tmp_path):
    (tmp_path / "f").mkdir()
    with pytest.raises(UserError, match="could not write"):
        save_tensors(tmp_path / "f", "thing", 1, TENSORS, ABOUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        save_tensors(tmp_path / "file" / "f", "thing", 1, TENSORS, ABOUT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "file"]


WRITER = """
import sys, torch
from pathlib import Path
from holdfast.io import save_tensors
number = 0
while True:
    save_tensors(Path(sys.argv[1]), "thing", 1, {"x": torch.full((200_000,), float(number))}, {"number": number})
    print(number, flush=True)
    number += 1
"""


def test_a_reader_and_a_kill_never_see_half_a_file(tmp_path):
    """A writer in another process replaces the file without pause, is read all the while, and is killed with -9."""
    path = tmp_path / "f"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        seen, until = set(), time.monotonic() + 0.7
        while time.monotonic() < until:
            tensors, about = load_tensors(path, "thing", 1)
            assert torch.equal(tensors["x"], torch.full((200_000,), float(about["number"])))
            seen.add(about["number"])
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    tensors, about = load_tensors(path, "thing", 1)
    assert float(tensors["x"][-1]) == about["number"]
    assert len(seen) > 3


def test_the_header_says_what_it_is(tmp_path):
    """A stranger with nothing but the safetensors library can tell what the file is."""
    save_tensors(tmp_path / "f", "witnesses", 7, TENSORS, ABOUT)
    with safetensors.safe_open(tmp_path / "f", framework="pt") as file:
        header = file.metadata()
    assert (header["holdfast"], header["version"], json.loads(header["about"])) == ("witnesses", "7", ABOUT)


# The checksum: what is read is what was written.


def test_every_flipped_bit_is_found(tmp_path):
    """A stored weight, name, length or word of the header: every bit of the file counts."""
    path = tmp_path / "f"
    save_tensors(path, "thing", 1, TENSORS, ABOUT, packed=["a.b"])
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):  # every byte, two or three of its bits
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError):
            load_tensors(path, "thing", 1)


def test_a_file_without_a_checksum_is_read_with_a_note(tmp_path):
    header = {"holdfast": "thing", "version": "1", "about": json.dumps(ABOUT)}
    safetensors.torch.save_file(TENSORS, tmp_path / "f", header)
    with pytest.warns(UserWarning, match="has no checksum"):
        assert load_tensors(tmp_path / "f", "thing", 1)[1] == ABOUT


def test_the_checksum_is_not_taken_from_the_metadata(tmp_path):
    save_tensors(tmp_path / "f", "thing", 1, {"checksum": torch.ones(2)}, {"checksum": "0" * 32, '"checksum":"': "x"})
    assert load_tensors(tmp_path / "f", "thing", 1)[1]["checksum"] == "0" * 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (1, 5)])
def test_packed_tensors_come_back_bit_for_bit(dtype, shape, tmp_path):
    x = (torch.randn(shape) * 100).to(dtype)
    save_tensors(tmp_path / "f", "thing", 1, {"x": x, "y": x}, {}, packed=["x"])
    back = load_tensors(tmp_path / "f", "thing", 1)[0]
    for name in "xy":
        assert back[name].dtype == dtype
        assert back[name].shape == x.shape
        assert torch.equal(back[name], x)


def test_adversarial_images_are_packed_into_half(tmp_path):
    x = (torch.arange(32) * torch.arange(1, 41)[:, None, None, None]).expand(40, 3, 32, 32) % 256 / 255
    x_adv = (x + 8 / 255 * torch.randn(x.shape).sign()).clamp(0, 1)
    for name, packed in (("plain", []), ("packed", ["x_adv"])):
        save_tensors(tmp_path / name, "thing", 1, {"x_adv": x_adv}, {}, packed=packed)
    assert (tmp_path / "packed").stat().st_size < 0.5 * (tmp_path / "plain").stat().st_size


def perturbed(norm, shape=(12, 3, 40, 40)):
    """8-bit images, and points of a threat around them as attacks leave them."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, shape, generator=draw) / 255
    noise = torch.randn(shape, generator=draw)
    delta = {"linf": 8 / 255 * noise.sign(), "l2": 0.002 * noise, "l1": 0.3 * noise * (noise.abs() > 2.5)}[norm]
    return (x + delta).clamp(0, 1)


@pytest.mark.parametrize(("norm", "share"), [("linf", 0.32), ("l2", 0.87), ("l1", 0.28)])
def test_images_beside_256_levels_are_packed_as_levels(norm, share, tmp_path):
    """Random pixels, which nothing but the levels compresses; zlib alone takes 0.41, 0.90 and 0.41 of their bytes."""
    x_adv = perturbed(norm)
    save_tensors(tmp_path / "f", "thing", 1, {"x_adv": x_adv}, {}, packed=["x_adv"])
    assert (tmp_path / "f").stat().st_size < share * 4 * x_adv.numel()
    assert torch.equal(load_tensors(tmp_path / "f", "thing", 1)[0]["x_adv"], x_adv)


def test_levels_keep_every_bit(tmp_path, monkeypatch):
    """In any number of blocks; negative zero, denormals, and values that are no levels at all."""
    monkeypatch.setattr("holdfast.io.BLOCK", 5)
    x = torch.tensor([0.0, -0.0, 1.0, 1e-45, 1.18e-38, 0.5, 0.99999994, 1 / 255, 254.5 / 255, 0.1, 1 / 3])
    for count in (0, 1, 5, 6, 10, 11):
        save_tensors(tmp_path / "f", "thing", 1, {"x": x[:count]}, {}, packed=["x"])
        back = load_tensors(tmp_path / "f", "thing", 1)[0]["x"]
        assert torch.equal(back.view(torch.int32), x[:count].view(torch.int32)), count


def test_the_page_on_results_says_how_to_read_them_without_holdfast(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "results-schema.md").read_text()
    (block,) = (one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def unpacked" in one)
    x_adv, scope = perturbed("l2", (2, 3, 420, 421)), {}  # more than one block
    save_tensors(tmp_path / "f", "thing", 1, {"x_adv": x_adv}, {}, packed=["x_adv"])
    exec(block, scope)
    content = safetensors.torch.load_file(tmp_path / "f")["x_adv"].numpy().tobytes()
    assert torch.equal(torch.from_numpy(scope["unpacked"](content, list(x_adv.shape))), x_adv)


def test_a_packed_tensor_of_an_earlier_holdfast_is_read(tmp_path):
    """zlib alone, without the word that says levels."""
    x = torch.rand(3, 4)
    packed = torch.frombuffer(bytearray(zlib.compress(x.numpy().tobytes())), dtype=torch.uint8)
    header = {"holdfast": "thing", "version": "1", "about": "{}", "packed": '{"x": ["float32", [3, 4]]}'}
    whole = {**header, "checksum": io._NO_CHECKSUM}
    content = bytearray(safetensors.torch.save({"x": packed}, whole))
    at = content.index(io._CHECKSUM) + len(io._CHECKSUM)
    content[at : at + 32] = hashlib.blake2b(content, digest_size=16).hexdigest().encode()
    (tmp_path / "f").write_bytes(content)
    assert torch.equal(load_tensors(tmp_path / "f", "thing", 1)[0]["x"], x)


# One reader: what a file holds is checked where it is read.


class Point(TypedDict):
    x: float
    names: list[str]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "should be an object, got list"), ({"x": 1.0}, "it.names is missing"),
        ({"x": None, "names": []}, "it.x should be float"), ({"x": True, "names": []}, "should be float, got bool"),
        ({"x": 1, "names": [3]}, r"it.names\[0\] should be str"), ({"x": 1, "names": {}}, "it.names should be list"),
    ],
)  # fmt: skip
def test_a_value_of_another_shape_is_named(value, message):
    with pytest.raises(UserError, match=message):
        decode(Point, value, "it")


def test_a_value_of_the_right_shape_passes_with_what_else_it_holds():
    assert decode(Point, {"x": 1, "names": ["a"], "more": None}, "it") == {"x": 1, "names": ["a"], "more": None}


@pytest.mark.parametrize("text", ["", "{", "[1, NaN]", "1e999", "[" * 10_000, "9" * 5000, '{"a": Infinity}', "\xff"])
def test_what_is_no_json_is_one_sentence(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON") as error:
        read_json(tmp_path / "config.json")
    assert len(str(error.value)) < 500
    assert "elete" not in str(error.value)


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/../../x", "link", "a" * 5000, "a\0b"])
def test_a_path_may_not_leave_its_folder(name, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="may not leave it"):
        inside(tmp_path / "in", name, "witnesses.safetensors")
    assert inside(tmp_path / "in", "a/b", "it") == tmp_path / "in" / "a" / "b"
