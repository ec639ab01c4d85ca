"""An export answers as the run does, for each format; it can be evaluated; and what cannot be exported is refused."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from holdfast import run_folder
from holdfast.data import load, pixels
from holdfast.errors import UserError
from holdfast.experiments.config import Comparison, Job
from holdfast.experiments.export import export_run
from holdfast.experiments.training import train_network
from holdfast.importers import ModelSource, open_model
from holdfast.importers.onnx import runtime
from holdfast.outputs import as_outputs
from holdfast.train import FitConfig


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def logits(model, x):
    with torch.no_grad():
        return as_outputs(model(x)).logits


def trained(folder, **settings):
    comparison = Comparison(**{"folds": 1, "fit": FitConfig(epochs=1), "limit_train": 64} | settings).checked()
    train_network(Job(comparison, comparison.loss_specs[0], 0, 0, folder), announce=False)
    return folder


@pytest.mark.parametrize(
    ("to", "name"), [("onnx", "a.onnx"), ("pt2", "a.pt2"), ("state_dict", "a.safetensors"), ("state_dict", "a.pt")]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_export_answers_as_the_run_does(to, name, dynamic, trained_runs, tmp_path):
    run = trained_runs("cosface")
    done = export_run(run, tmp_path / name, to=to, dynamic_batch=dynamic)
    assert done.files[0] == tmp_path / name
    assert done.n == 64
    assert done.difference < 1e-4
    assert (done.runtime_difference is not None) == (to == "onnx")
    model, _ = run_folder.load(run)
    weights = {"weights": str(tmp_path / name)} if to == "state_dict" else {}
    source = ModelSource(f"{tmp_path / 'a.py'}:build" if weights else str(tmp_path / name), **weights)
    x = pixels(load("digits", fold=(0, 5)).test.x[:7])
    torch.testing.assert_close(logits(open_model(source), x), logits(model, x), atol=1e-4, rtol=1e-4)
    if to == "onnx":
        import onnx

        size = onnx.load(tmp_path / name).graph.input[0].type.tensor_type.shape.dim[0]
        assert size.dim_param == "n" if dynamic else size.dim_value == 1


def test_the_factor_on_the_logits_and_orthogonal_layers_are_exported(tmp_path):
    """ONNX has no operator that solves linear equations: the weights are written, not their formula."""
    run = trained(tmp_path / "run", losses=("sce@orthogonal:scale=2*50",), model="lipconv")
    for to in ("onnx", "pt2", "state_dict"):
        done = export_run(run, to=to)
        assert done.files[0].parent == run
        assert done.difference < 1e-3
    code = (run / "weights.py").read_text()
    assert "logit_scale = 50" in code
    assert "head='orthogonal', head_settings={'scale': 2}" in code


def test_a_backbone_of_ones_own_is_exported_with_consent(here, tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\ndef backbone(shape):\n    return nn.Flatten()\n")
    run = trained(tmp_path / "run", losses=("sce",), model="mine.py:backbone")
    with pytest.raises(UserError, match="run_code=True"):
        export_run(run)
    for to in ("onnx", "pt2", "state_dict"):
        assert export_run(run, to=to, run_code=True).difference < 1e-4


def test_a_network_that_mixes_images_is_refused(tmp_path, capfd):
    """Batch statistics: a single image gets another answer than a batch."""
    run = trained(tmp_path / "run", losses=("sce",), model="preactresnet:depth=8,statistics=batch")
    for to in ("onnx", "pt2"):
        refused = r"cannot be written as onnx|cannot be read back: model.pt2 was|on 64 images a logit differs by"
        with pytest.raises(UserError, match=refused):
            export_run(run, to=to)
        assert capfd.readouterr().out == ""  # torch prints the graph that it could not write
    assert not (run / "model.onnx").exists()
    assert not (run / "model.pt2").exists()


def test_an_export_that_onnxruntime_reads_otherwise_is_refused(trained_runs, tmp_path, monkeypatch):
    monkeypatch.setattr("holdfast.experiments.export.runtime_outputs", lambda *a: runtime.runtime_outputs(*a) + 0.1)
    with pytest.raises(UserError, match=r"in onnxruntime otherwise than the run"):
        export_run(trained_runs("sce"), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_an_export_says_what_to_do_where_a_format_lacks_an_operation(trained_runs, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"cannot be written as onnx: RuntimeError: no such operator\. .*pt2"):
        export_run(trained_runs("sce"), tmp_path / "a.onnx")


@pytest.mark.parametrize(("to", "name"), [("pt3", "a"), ("onnx", "a.pt2"), ("pt2", "a"), ("state_dict", "a.bin")])
def test_a_format_and_a_suffix_that_do_not_fit_are_refused(to, name, trained_runs, tmp_path):
    with pytest.raises(UserError, match=r"unknown export format|ends in"):
        export_run(trained_runs("sce"), tmp_path / name, to=to)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_difference_and_a_command_that_works(copied_run, holdfast_, here):
    run = copied_run("sce")
    status, out, err = holdfast_("export", run, "--to", "state_dict", "--out", "net.safetensors")
    assert (status, err) == (0, "")
    first, second, *files = out.splitlines()
    assert first.startswith("largest difference of a logit from the run, on 64 images: 0.0e+00")
    assert files == ["net.safetensors", "net.py"]
    words = shlex.split(second.removeprefix("next: holdfast "))
    status, out, err = holdfast_(*words, "--suite", "quick", "--limit", "10", "-q", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "net.py:build" in out
    status, out, _ = holdfast_("export", run, "--json", "--dynamic-batch")
    answer = json.loads(out)
    assert answer["files"] == [str(run / "model.onnx")]
    assert answer["runtime_difference"] < 1e-4


def test_code_of_somebody_else_is_not_replaced(copied_run, holdfast_, here, tmp_path):
    (tmp_path / "net.py").write_text("x = 1\n")
    status, out, err = holdfast_("export", copied_run("sce"), "--to", "state_dict", "--out", "net.pt")
    assert (status, out) == (2, "")
    assert "net.py exists and is not of an export" in err
    assert (tmp_path / "net.py").read_text() == "x = 1\n"
    assert not (tmp_path / "net.pt").exists()


def test_an_unfinished_run_is_refused(copied_run, holdfast_):
    run = copied_run("sce")
    (run / "model.safetensors").unlink()
    status, out, err = holdfast_("export", run)
    assert (status, out) == (2, "")
    assert "is not finished" in err
