"""Training begins with the weights of a run or a file; what does not fit is named, and the folder knows its start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast import models
from holdfast.errors import UserError
from holdfast.experiments.compare import compare
from holdfast.experiments.config import Comparison
from holdfast.experiments.initial_weights import InitialWeightsWarning, load_initial
from holdfast.train import FitConfig

pytestmark = pytest.mark.filterwarnings("always::holdfast.experiments.initial_weights.InitialWeightsWarning")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fresh(classes=10, head="linear", name="smallconv"):
    return models.build(name, (1, 8, 8), classes, head=head, seed=5)


def file_of(run):
    return load_file(run / "model.safetensors")


def test_all_weights_of_a_run_are_taken(trained_runs):
    net, run = fresh(), trained_runs("sce")
    assert load_initial(net, run) == ()
    assert all(torch.equal(tensor, file_of(run)[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("changes", [{"classes": 3}, {"head": "mmc"}, {"head": "cosine"}])
def test_another_head_stays_as_it_was_drawn_and_is_named(changes, trained_runs):
    net, untouched, run = fresh(**changes), fresh(**changes), trained_runs("sce")
    (note,) = load_initial(net, run)
    assert note.startswith("the head is new, since 'head.")
    for name, tensor in net.state_dict().items():
        kept = untouched.state_dict()[name] if name.startswith("head.") else file_of(run)[name]
        assert torch.equal(tensor, kept), name


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.backbone."])
def test_a_file_may_hold_a_backbone_alone_and_more(prefix, trained_runs, tmp_path):
    inner = {n.removeprefix("backbone."): t for n, t in file_of(trained_runs("sce")).items() if n[:9] == "backbone."}
    torch.save({"state_dict": {prefix + name: t for name, t in (inner | {"fc.weight": torch.ones(2)}).items()}}, "w.pt")
    net = fresh()
    mean = net.mean.clone()
    notes = load_initial(net, "w.pt")
    assert all(torch.equal(tensor, inner[name]) for name, tensor in net.backbone.state_dict().items())
    assert torch.equal(net.mean, mean), "the file has no normalisation: that of the data stays"
    assert "took the entry 'state_dict'" in notes
    assert "the head is new: the weights hold none" in notes
    assert any("fc.weight' of w.pt left out: the network has no such weight" in note for note in notes)


def test_weights_that_do_not_fit_are_named(trained_runs, tmp_path):
    run = trained_runs("sce")
    with pytest.raises(UserError, match=r"is missing there \(\d+ such\); 'backbone\.\S+' is not of this network"):
        load_initial(fresh(name="mlp"), run)
    weights = file_of(run)
    save_file(weights | {"backbone.layers.0.weight": torch.zeros(16, 3, 3, 3)}, "w.safetensors")
    shapes = r"'backbone\.layers\.0\.weight' has the shape \(16, 3, 3, 3\) there and \(16, 1, 3, 3\) here \(1 such\)"
    net = fresh()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError, match=shapes):
        load_initial(net, "w.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    (tmp_path / "empty").mkdir()
    for source, message in (("empty", "holds no model.safetensors"), ("gone.pt", "there is no file at gone.pt")):
        with pytest.raises(UserError, match=message):
            load_initial(fresh(), source)


def test_the_command_fine_tunes_a_part_and_resumes(copied_run, holdfast_):
    run = copied_run("sce")
    words = (
        "train",
        "--loss",
        "cosface:m=0.2,scale=15",
        "--init-from",
        run,
        "--freeze",
        "backbone.*",
        "--out",
        "tuned",
    )
    for _ in range(2):
        status, out, err = holdfast_(*words, "--epochs", "2", "--device", "cpu")
        assert status == 0, err
        assert "cosface" in out
    config = json.loads(Path("tuned/config.json").read_text())
    assert config["fit"]["freeze"] == ["backbone.*"]
    assert len(config["init_from"]) == 32
    assert config["paths"]["init_from"] == str(run)
    before, after = file_of(run), load_file("tuned/model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("head."))
    assert not torch.equal(after["head.weight"], before["head.linear.weight"])

    holdfast_("train", "--out", "other", "--epochs", "1", "--device", "cpu")
    words = [word if word != run else "other" for word in words]
    status, out, err = holdfast_(*words, "--epochs", "2", "--device", "cpu")
    assert (status, out) == (2, "")
    assert "they differ in init_from" in err


def test_a_head_that_is_left_out_is_said_once_and_training_begins_there(copied_run, holdfast_):
    words = ("train", "--loss", "mmc", "--init-from", copied_run("sce"), "--epochs", "1", "--lr", "1e-9")
    status, out, err = holdfast_(*words, "--out", "a", "--device", "cpu")
    assert status == 0
    assert err.count("note: the head is new") == 1
    status, again, _ = holdfast_(*words[:3], "--epochs", "1", "--lr", "1e-9", "--out", "b", "--device", "cpu")
    accuracy = [float(text.split("accuracy ")[1].split("%")[0]) for text in (out, again)]
    assert accuracy[0] != accuracy[1]


@pytest.mark.usefixtures("short_audits")
def test_all_rows_of_a_comparison_begin_there_in_other_processes_too(copied_run, tmp_path, monkeypatch):
    run = copied_run("sce")
    fit = FitConfig(epochs=1, lr=1e-9)
    settings = {"losses": ("sce", "isce:s=1"), "folds": 1, "limit": 12, "suite": "quick", "fit": fit}
    comparison = Comparison(**settings, init_from=str(run)).checked()
    compare(comparison, tmp_path / "out", workers=2)
    for row in ("sce", "isce_s=1"):
        weights = load_file(tmp_path / "out" / "runs" / f"{row}-seed0-fold0" / "model.safetensors")
        torch.testing.assert_close(weights, file_of(run), atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["init_from"]) == 32
    with pytest.raises(UserError, match="do not fit"):
        compare(Comparison(**settings, model="mlp", init_from=str(run)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    other_head = Comparison(**settings | {"losses": ("mmc",)}, init_from=str(run))
    with pytest.warns(InitialWeightsWarning, match="the head is new"):
        compare(other_head, tmp_path / "mmc")


def test_weights_and_a_start_that_draws_them_are_refused(copied_run):
    with pytest.raises(UserError, match="leave one of them out"):
        Comparison(init_from="run", fit=FitConfig(init="interval")).checked()
