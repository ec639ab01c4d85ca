"""Commands on images that do not fit in memory: the same answer as in memory, which replay confirms."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from holdfast import mapped
from holdfast.evaluation.suites import SUITES, Stage

pytestmark = pytest.mark.filterwarnings("always::holdfast.data.DataWarning")  # which are printed as notes

NETWORK = '''
import torch
from torch import nn


def build():
    """Answers by the mean of each channel."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False))
    net[2].weight.data.copy_(torch.eye(3) * 5)
    return net
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 3}),))
    (tmp_path / "net.py").write_text(NETWORK)
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10)):
        for label in range(3):
            for number in range(count):
                pixels = rng.integers(60, 160, (12, 12, 3))
                pixels[..., label] += rng.integers(-10, 40)
                file = tmp_path / "photos" / split / f"n{label}" / f"{number:02}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(file, quality=95)
    return tmp_path


def answer(path):
    found = json.loads((path / "results.json").read_text())
    kept = {key: found["runs"][0][key] for key in ("clean", "robust", "certified", "samples", "examples")}
    return {**kept, "data": {**found["data"], "notes": None}}


EVALUATE = (
    "evaluate",
    "net.py:build",
    "--data",
    "photos",
    "--suite",
    "tiny",
    "--device",
    "cpu",
    "--threat",
    "linf:0.05",
)


def test_an_own_model_is_evaluated_and_replayed(here, holdfast_, monkeypatch):
    assert holdfast_(*EVALUATE, "--out", "memory")[0] == 0
    monkeypatch.setenv(mapped.VARIABLE, "1000")
    for _ in range(2):  # the second one reads what the first has written
        status, _, err = holdfast_(*EVALUATE, "--out", "file")
        assert status == 0, err
        assert answer(here / "memory") == answer(here / "file")
    assert (here / "file" / "evaluation.x_adv.npy").exists()
    for folder in ("memory", "file"):
        status, out, err = holdfast_("replay", folder, "--run-code")
        assert (status, "holds" in out) == (0, True), (out, err)
    stored = here / "file" / "witnesses-0.npy"
    content = bytearray(stored.read_bytes())
    content[-3] ^= 1
    for damaged in (bytes(content), bytes(content[:-1]), None):
        stored.unlink()
        if damaged:
            stored.write_bytes(damaged)
        status, _, err = holdfast_("replay", "file", "--run-code")
        assert status == 2
        assert "witnesses-0.npy" in err
        assert "Traceback" not in err
        stored.write_bytes(b"")


def test_a_network_is_trained_evaluated_and_replayed(here, holdfast_, monkeypatch):
    train = ("train", "--data", "photos", "--model", "mlp", "--epochs", 2, "--device", "cpu", "--batch-size", 16)
    evaluate = ("--suite", "tiny", "--device", "cpu", "--threat", "linf:0.02", "--out")
    assert holdfast_(*train, "--out", "memory")[0] == 0
    assert holdfast_("evaluate", "memory", *evaluate, "memory/tiny")[0] == 0
    monkeypatch.setenv(mapped.VARIABLE, "1000")
    for words in ((*train, "--out", "file"), ("evaluate", "file", *evaluate, "file/tiny"), ("replay", "file/tiny")):
        status, out, err = holdfast_(*words)
        assert status == 0, (out, err)
    assert answer(here / "memory" / "tiny") == answer(here / "file" / "tiny")


def test_damaged_images_are_refused_or_left_out_by_name(here, holdfast_):
    for name in ("n0/03.JPEG", "n2/07.JPEG"):
        (here / "photos" / "val" / name).write_bytes(b"\xff\xd8\xff")
    status, _, err = holdfast_(*EVALUATE, "--out", "out")
    assert status == 2
    said = " ".join(err.split())
    assert "n0/03.JPEG' cannot be decoded" in said
    assert "1 more" in said
    assert not (here / "out").exists()
    status, _, err = holdfast_(*EVALUATE, "--out", "out", "--skip-corrupt")
    assert status == 0, err
    assert "2 images cannot be decoded and are left out" in " ".join(err.split())
    found = json.loads((here / "out" / "results.json").read_text())
    assert found["runs"][0]["n"] == 28
    assert any("n2/07.JPEG" in note for note in found["data"]["notes"])
    assert holdfast_("replay", "out", "--run-code")[0] == 0
    shutil.rmtree(here / "cache")
    train = ("train", "--data", "photos", "--model", "mlp", "--epochs", 1, "--device", "cpu", "--skip-corrupt")
    status, _, err = holdfast_(*train, "--out", "run")
    assert status == 0, err
    assert json.loads((here / "run" / "config.json").read_text())["cut"]["skip_corrupt"] is True


def test_a_disk_without_room_is_said_before_the_work(here, holdfast_, monkeypatch):
    monkeypatch.setenv(mapped.VARIABLE, "1000")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3000})())
    status, _, err = holdfast_(*EVALUATE, "--out", "out")
    assert status == 2
    assert "GiB on the disk of" in " ".join(err.split())
