"""The targeted matrix: against closed forms and exhaustive search, resumed, written, and as a user."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import holdfast.targeted as module
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.queries import CountingModel
from holdfast.targeted import OneTarget, sentence, targeted_matrix
from holdfast.threat import Threat


def pixels_net(x):
    """The largest pixel is the class."""
    return x.flatten(1)


@pytest.fixture(scope="module")
def pixels_data():
    x = 0.2 + 0.6 * torch.rand(60, 1, 1, 5, generator=torch.Generator().manual_seed(0))
    return Data(x, x.flatten(1).argmax(1), torch.arange(60))


def test_what_is_reached_is_what_can_be(pixels_data):
    """A pixel becomes the largest within eps exactly where it is less than 2 eps below the largest."""
    x, y = pixels_data.x.flatten(1), pixels_data.y
    below = x.amax(1, keepdim=True) - x
    assert float((below - 0.2).abs().amin()) > 1e-4
    found = targeted_matrix(pixels_net, pixels_data, "linf:0.1")
    assert found.reached.tolist() == (below < 0.2).tolist()
    shares = found.shares
    for one in range(5):
        for target in range(5):
            if one == target:
                assert shares[one, target].isnan()
            else:
                assert shares[one, target] == pytest.approx(float((below < 0.2)[y == one, target].double().mean()))
    other = (below < 0.2).scatter(1, y[:, None], torch.zeros(60, 1, dtype=torch.bool)).any(1)
    assert found.any_other.tolist() == pytest.approx([float(other[y == k].double().mean()) for k in range(5)])


def test_a_third_class_on_the_way_does_not_end_the_attack():
    """The untargeted attack ends at class 1, which is nearer; class 2 is reached beyond it."""

    def net(x):
        move = x.flatten(1)[:, 0] - 0.5
        return torch.stack([0.1 - move, torch.full_like(move, 0.06), 4 * move - 0.24], 1)

    found = targeted_matrix(net, (torch.full((3, 1, 1, 1), 0.5), [0, 0, 0]), Threat("linf", 0.1), steps=30)
    assert found.reached[0].tolist() == [True, True, True]


def test_the_two_logits_of_a_target():
    z = OneTarget(pixels_net, 2)(torch.tensor([0.3, 0.8, 0.5]).view(1, 1, 1, 3)).logits
    assert z.tolist() == [[pytest.approx(0.8), pytest.approx(0.5)]]


def test_a_class_without_samples_has_no_share():
    x = torch.tensor([0.9, 0.1, 0.85, 0.1, 0.1]).view(1, 1, 1, 5)
    data = Data(x, torch.tensor([0]), torch.arange(1), tuple("abcde"))
    found = targeted_matrix(pixels_net, data, "linf:0.1")
    assert found.shares[1].isnan().all()
    assert found.any_other.isnan().tolist() == [False, True, True, True, True]
    assert "a into c" in sentence(found)
    none = targeted_matrix(pixels_net, data, "linf:0.001")
    assert sentence(none).startswith("No sample was turned")
    assert found.frame().loc["a", "c"] == 1.0


def test_it_resumes_after_each_target(pixels_data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "next_save", lambda began: 0.0)
    file = tmp_path / "work.safetensors"

    def stop(what, done, total):
        if what == "towards class 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        targeted_matrix(pixels_net, pixels_data, "linf:0.1", checkpoint=file, progress=stop)
    whole = targeted_matrix(pixels_net, pixels_data, "linf:0.1")
    resumed = targeted_matrix(pixels_net, pixels_data, "linf:0.1", checkpoint=file)
    assert resumed.reached.tolist() == whole.reached.tolist()
    assert resumed.backwards == whole.backwards
    again = CountingModel(pixels_net)
    repeated = targeted_matrix(again, pixels_data, "linf:0.1", checkpoint=file)
    assert again.backwards == 0
    assert repeated.backwards == whole.backwards
    with pytest.raises(UserError, match="belongs to other attacks"):
        targeted_matrix(pixels_net, pixels_data, "linf:0.2", checkpoint=file)


def test_what_cannot_be_attacked_is_refused(pixels_data):
    wide = torch.rand(2, 1, 1, 101)
    with pytest.raises(UserError, match="at most 100 classes"):
        targeted_matrix(pixels_net, Data(wide, torch.tensor([0, 100]), torch.arange(2)), "linf:0.1")
    with pytest.raises(UserError, match="empty"):
        targeted_matrix(pixels_net, pixels_data.take(slice(0, 0)), "linf:0.1")
    with pytest.raises(UserError, match="steps must be"):
        targeted_matrix(pixels_net, pixels_data, "linf:0.1", steps=0)


def test_a_user_gets_table_sentence_and_files(holdfast_, copied_run, tmp_path, monkeypatch):
    copied_run("sce")
    monkeypatch.chdir(tmp_path)
    status, said, _ = holdfast_("targeted", "run", "--threat", "linf:0.1", "--limit", "30", "--steps", "10")
    assert status == 0
    assert "can be turned into some other one" in said
    folder = tmp_path / "run" / "targeted-linf0.1"
    stored = json.loads((folder / "targeted.json").read_text())
    lines = list(csv.reader((folder / "targeted.csv").read_text().splitlines()))
    assert len(lines) == 11
    assert [None if v == "" else float(v) for v in lines[1][1:]] == stored["shares"][0]
    assert (folder / "targeted.svg").exists()
    reached = [set(classes) for classes in stored["columns"]["reached"]]
    assert all(p in classes for p, classes in zip(stored["columns"]["prediction"], reached, strict=True))
    status, again, _ = holdfast_("targeted", "run", "--threat", "linf:0.1", "--limit", "30", "--steps", "10")
    assert status == 0
    assert again == said
    status, _, error = holdfast_("targeted", "run", "--threat", "patch:5x5")
    assert status == 2
    assert "no norm ball" in error
