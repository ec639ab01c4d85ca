"""Contracts of run folders from elsewhere: no code runs unasked, a harmed file is one sentence, moved ones work."""

from __future__ import annotations

import json
import shutil
import textwrap

import pytest
import torch
from tests.helpers import HARM, VALUES, one_sentence, places, put, write_parquet

from holdfast import environment, run_folder
from holdfast.bracket import bracket_run
from holdfast.errors import UserError
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.experiments.compare import compare
from holdfast.experiments.config import Comparison, Job
from holdfast.experiments.evaluate_model import evaluate_model, from_file, from_run
from holdfast.experiments.training import train_network
from holdfast.importers.model_file import ModelSource, code_hash
from holdfast.io import load_tensors, save_tensors
from holdfast.replay import replay
from holdfast.train import FitConfig, curves

FIT = FitConfig(epochs=1, batch_size=64, lr=3e-3)
MODEL = """
from pathlib import Path
import torch
from torch import nn
from part import scale

with (Path(__file__).parent / "ran").open("a") as file:
    file.write("ran ")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return scale(self.layer(x.flatten(1)))

def build():
    return Net()

class Features(nn.Module):
    features = 64

    def forward(self, x):
        return scale(x.flatten(1))

def backbone(shape):
    return Features()
"""
PART = "def scale(z):\n    return {} * z\n"


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch):
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 3}),))


@pytest.fixture
def code(tmp_path):
    """The user's folder of code: mymodel.py imports part.py, and each execution leaves a word in the file "ran"."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "mymodel.py").write_text(textwrap.dedent(MODEL))
    (folder / "part.py").write_text(PART.format(1.0))
    return folder


def executions(code):
    path = code / "ran"
    return len(path.read_text().split()) if path.exists() else 0


def evaluate_own(code, out, data="digits", limit=20):
    subject = from_file(ModelSource(f"{code}/mymodel.py:build"), data, limit=limit)
    return evaluate_model(subject, "linf:0.1", "tiny", out)


def job(folder, **change):
    comparison = Comparison(losses=("sce",), folds=1, fit=FIT, suite="tiny", limit_train=100, **change).checked()
    return Job(comparison, comparison.loss_specs[0], 0, 0, folder)


# Nothing that a folder names is executed unless the user says so.


def test_the_code_that_a_run_folder_names_runs_only_if_asked(code, tmp_path, capsys):
    train_network(job(tmp_path / "run", model=f"{code}/mymodel.py:backbone"))
    train_network(job(tmp_path / "run", model=f"{code}/mymodel.py:backbone"))  # the command names it: no option needed
    ran = executions(code)
    for opening in (run_folder.load, from_run, lambda run: bracket_run(run, "linf:0.1", limit=5)):
        with pytest.raises(UserError, match=r"mymodel\.py.*--run-code \(in Python: run_code=True\)") as error:
            opening(tmp_path / "run")
        assert "\n" not in str(error.value)
    assert executions(code) == ran
    capsys.readouterr()
    subject = from_run(tmp_path / "run", limit=20, run_code=True)
    assert executions(code) > ran
    assert str(code / "mymodel.py") in capsys.readouterr().err
    evaluate_model(subject, "linf:0.1", "tiny", tmp_path / "run" / "evaluation")
    ran = executions(code)
    with pytest.raises(UserError, match="--run-code"):
        replay(tmp_path / "run" / "evaluation")
    assert executions(code) == ran
    assert all(one.holds for one in replay(tmp_path / "run" / "evaluation", run_code=True))


def test_a_limit_takes_a_part_of_the_fold_that_a_run_left_out(tmp_path):
    comparison = Comparison(losses=("sce",), folds=5, fit=FIT, limit_train=100).checked()
    train_network(Job(comparison, comparison.loss_specs[0], 0, 1, tmp_path / "run"))
    fold, few = from_run(tmp_path / "run", limit=0), from_run(tmp_path / "run", limit=20)
    assert (len(fold.split.test), len(few.split.test)) == (360, 20)
    assert set(few.split.test.index.tolist()) < set(fold.split.test.index.tolist())
    assert few.split.test.y.bincount().tolist() == [2] * 10
    evaluate_model(few, "linf:0.1", "tiny", tmp_path / "run" / "evaluation")
    assert all(one.holds for one in replay(tmp_path / "run" / "evaluation"))


def test_the_code_that_an_evaluation_names_runs_only_if_asked(code, tmp_path):
    evaluate_own(code, tmp_path / "out")
    evaluate_own(code, tmp_path / "out")  # the same command resumes
    ran = executions(code)
    with pytest.raises(UserError, match=r"mymodel\.py.*--run-code"):
        replay(tmp_path / "out")
    assert executions(code) == ran
    assert all(one.holds for one in replay(tmp_path / "out", run_code=True))


@pytest.mark.parametrize(
    "change",
    [
        {"model_file": {"path": "CODE/mymodel.py:build"}},
        {"model_file": {}, "paths": {"model": "CODE/mymodel.py:build"}},
        {"model_file": {"path": "CODE/mymodel.py"}},
        {"model_file": {"path": "CODE/mymodel.PY"}},
        {"model": {"name": "CODE/mymodel.py:backbone", "shape": [1, 8, 8], "classes": 10}},
        {"model": {"name": "mymodel.py:backbone", "shape": [1, 8, 8], "classes": 10},
         "paths": {"model": "CODE/mymodel.py:backbone"}},
    ],
)  # fmt: skip
def test_a_forged_config_runs_no_code(change, code, copied_run):
    run = copied_run("sce")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **change}).replace("CODE", str(code)))
    for opening in (run_folder.load, from_run):
        with pytest.raises(UserError):
            opening(run)
    assert executions(code) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, from a copy of a program
def test_a_network_file_that_was_exchanged_is_not_opened(tmp_path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.zeros(3, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    subject = from_file(ModelSource(f"{tmp_path}/net.pt2"), "digits", limit=20)
    evaluate_model(subject, "linf:0.1", "tiny", tmp_path / "out")
    with pytest.raises(UserError, match=r"torch\.export program, which may hold code.*--run-code"):
        replay(tmp_path / "out")  # torch opens it by pickle
    assert all(one.holds for one in replay(tmp_path / "out", run_code=True))
    (tmp_path / "net.pt2").write_bytes(b"another file")
    with pytest.raises(UserError, match="not the file that was evaluated"):
        replay(tmp_path / "out", run_code=True)


# Paths in a folder may not leave it.


@pytest.mark.parametrize("name", ["../../elsewhere", "ABSOLUTE", "../other", "network/../.."])
def test_witnesses_may_not_name_a_network_outside(name, evaluated_run, tmp_path):
    run = shutil.copytree(evaluated_run, tmp_path / "run")
    shutil.copytree(run, tmp_path / "elsewhere")
    assert all(one.holds for one in replay(run / "evaluation"))
    path = run / "evaluation" / "witnesses.safetensors"
    tensors, about = load_tensors(path, "witnesses", 1)
    assert about["networks"][0]["folder"] == ".."  # the run folder around it
    about["networks"][0]["folder"] = name.replace("ABSOLUTE", str(tmp_path / "elsewhere"))
    save_tensors(path, "witnesses", 1, tensors, about)
    with pytest.raises(UserError, match="may not leave it"):
        replay(run / "evaluation")


@pytest.mark.parametrize("name", ["/etc", "../data", "data/../../data", "~nobody-of-that-name/x", "~/x"])
def test_a_run_may_not_name_data_outside_without_its_hash(name, copied_run, tmp_path):
    run = copied_run("sce")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": name}))
    with pytest.raises(UserError, match=r"may not leave it|there is no such path: '.*/run/~"):
        from_run(run)


# A folder is what it holds: it can be moved, and so can the user.


def test_a_moved_run_on_moved_paths_is_evaluated_and_resumed(code, tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "data", 200, 60)
    monkeypatch.chdir(tmp_path)
    one = job(tmp_path / "run", data="data", model="code/mymodel.py:backbone")
    train_network(one)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    again = job(tmp_path / "run", data="../data", model="../code/mymodel.py:backbone")
    monkeypatch.setattr("holdfast.experiments.training.fit", lambda *_, **__: pytest.fail("trained again"))
    train_network(again)
    first = evaluate_model(from_run(tmp_path / "run", run_code=True), "linf:0.1", "tiny", tmp_path / "run" / "eval")
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.setattr("holdfast.experiments.pipeline.evaluate", lambda *_, **__: pytest.fail("attacked again"))
    subject = from_run(tmp_path / "moved", run_code=True)
    assert (
        evaluate_model(subject, "linf:0.1", "tiny", tmp_path / "moved" / "eval").runs[0].samples
        == first.runs[0].samples
    )
    assert all(one.holds for one in replay(tmp_path / "moved" / "eval", run_code=True))
    (tmp_path / "data").rename(tmp_path / "data2")
    (tmp_path / "code").rename(tmp_path / "code2")
    train_network(job(tmp_path / "moved", data="../data2", model="../code2/mymodel.py:backbone"))  # notes the new paths
    assert from_run(tmp_path / "moved", run_code=True).split.fingerprint == subject.split.fingerprint


def test_an_evaluation_of_ones_own_model_is_known_by_its_content(code, tmp_path, monkeypatch):
    first = evaluate_own(code, tmp_path / "out")
    code.rename(tmp_path / "code2")
    (tmp_path / "out").rename(tmp_path / "out2")
    monkeypatch.setattr("holdfast.experiments.pipeline.evaluate", lambda *_, **__: pytest.fail("attacked again"))
    assert evaluate_own(tmp_path / "code2", tmp_path / "out2").runs[0].samples == first.runs[0].samples
    assert all(one.holds for one in replay(tmp_path / "out2", run_code=True))


def test_an_evaluation_elsewhere_takes_the_network_along(copied_run, tmp_path):
    run = copied_run("sce")
    evaluate_model(from_run(run, limit=20), "linf:0.1", "tiny", tmp_path / "apart" / "out")
    shutil.rmtree(run)
    assert all(one.holds for one in replay(tmp_path / "apart" / "out"))


def test_changed_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "data", 200, 60)
    train_network(job(tmp_path / "run", data=str(tmp_path / "data")))
    write_parquet(tmp_path / "data", 190, 60)
    with pytest.raises(UserError, match="its content has changed"):
        from_run(tmp_path / "run")
    with pytest.raises(UserError, match="differ in data_hash") as error:
        train_network(job(tmp_path / "run", data=str(tmp_path / "data")))
    assert "elete" not in str(error.value)


# Answers of yesterday.


def test_a_changed_module_beside_the_model_counts(code, tmp_path):
    source = ModelSource(f"{code}/mymodel.py:build")
    before = code_hash(source)
    evaluate_own(code, tmp_path / "out")
    assert code_hash(source) == before
    (code / "unrelated.py").write_text("x = 1\n")
    assert code_hash(source) == before
    (code / "part.py").write_text(PART.format(-1.0))
    assert code_hash(source) != before
    with pytest.raises(UserError, match="differ in code"):
        evaluate_own(code, tmp_path / "out")
    with pytest.raises(UserError, match="code has changed"):
        replay(tmp_path / "out", run_code=True)
    found = evaluate_own(code, tmp_path / "out2")  # in the same process: part.py is read again
    assert found.runs[0].clean.value < 0.5


def test_modules_in_packages_and_late_imports_count(tmp_path):
    (tmp_path / "pkg" / "deep").mkdir(parents=True)
    for name in ("pkg/__init__.py", "pkg/deep/__init__.py", "pkg/deep/a.py", "pkg/b.py", "late.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "mine.py").write_text("import pkg.deep.a\ndef build():\n    import late\n    import json\n")
    (tmp_path / "pkg" / "deep" / "a.py").write_text("from .. import b\n")
    (tmp_path / "dynamic.py").write_text("")
    source = ModelSource(f"{tmp_path}/mine.py:build")
    seen = {code_hash(source)}
    for name in ("pkg/__init__.py", "pkg/deep/__init__.py", "pkg/deep/a.py", "pkg/b.py", "late.py", "mine.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
        assert code_hash(source) not in seen, name
        seen.add(code_hash(source))


def read_scale_from_a_file(code):
    path = "Path(__file__).parent / 'number'"
    text = f"from pathlib import Path\ndef scale(z):\n    return float(({path}).read_text()) * z\n"
    (code / "part.py").write_text(text)
    (code / "number").write_text("1")


def test_a_stored_answer_is_asked_again_before_it_is_believed(code, tmp_path, monkeypatch):
    """What the hash of the code cannot see: a file that it reads."""
    read_scale_from_a_file(code)
    evaluate_own(code, tmp_path / "out")
    (code / "number").write_text("-1")
    with pytest.raises(UserError, match=r"answers otherwise than when .*the margin of sample \d+ was"):
        evaluate_own(code, tmp_path / "out")
    (tmp_path / "out" / "result.safetensors").unlink()  # an unfinished evaluation is asked too
    with pytest.raises(UserError, match="answers otherwise"):
        evaluate_own(code, tmp_path / "out")
    (code / "number").write_text("1")
    evaluate_own(code, tmp_path / "out")


def test_a_comparison_of_ones_own_backbone_asks_again(code, tmp_path):
    read_scale_from_a_file(code)
    comparison = job(tmp_path, model=f"{code}/mymodel.py:backbone", limit=20).comparison
    compare(comparison, tmp_path / "out")
    compare(comparison, tmp_path / "out")
    (code / "number").write_text("-1")
    with pytest.raises(UserError, match="answers otherwise"):
        compare(comparison, tmp_path / "out")


def test_a_second_environment_is_noted(evaluated_run, tmp_path, monkeypatch):
    run = shutil.copytree(evaluated_run, tmp_path / "run")
    now = environment.environment()
    assert run_folder.environments(run / "evaluation") == [now]
    monkeypatch.setattr(run_folder, "environment", lambda: {**now, "torch": "9.9", "holdfast": "7"})
    found = evaluate_model(from_run(run, limit=12), "linf:0.1", "tiny", run / "evaluation")
    evaluate_model(from_run(run, limit=12), "linf:0.1", "tiny", run / "evaluation")
    kept = run_folder.environments(run / "evaluation")
    assert [one["torch"] for one in kept] == [now["torch"], "9.9"]
    assert [one["torch"] for one in found.environment["earlier"]] == ["9.9"]  # this process is in truth the first one


# Harmed files: one sentence, whatever they hold.


def opened(run):
    """All that reads a run folder, short of attacking."""
    return [
        lambda: run_folder.load(run),
        lambda: run_folder.stored_weights_hash(run),
        lambda: from_run(run, limit=12),
        lambda: train_network(Job(*_asked(run))),
        lambda: curves.sentence(curves.read(run)),
    ]


def _asked(run):
    comparison = Comparison(losses=("sce",), folds=1, fit=FitConfig(epochs=8, batch_size=64, lr=3e-3)).checked()
    return comparison, comparison.loss_specs[0], 0, 0, run


@pytest.mark.parametrize("name", ["config.json", "env.json", "train.json", "log.jsonl"])
def test_a_harmed_file_of_a_run_is_one_sentence(name, evaluated_run, tmp_path, monkeypatch):
    monkeypatch.setattr("holdfast.experiments.training.fit", lambda *_, **__: pytest.fail("trained"))
    run = shutil.copytree(evaluated_run, tmp_path / "run")
    text = (run / name).read_text()
    content = list(HARM)
    if name != "log.jsonl":
        raw = json.loads(text)
        content += [json.dumps(put(raw, path, value)).encode() for path in places(raw) for value in VALUES]
    else:
        first, *rest = text.splitlines()
        changed = [put(json.loads(first), path, value) for path in places(json.loads(first)) for value in VALUES]
        content += ["\n".join([json.dumps(line), *rest]).encode() for line in changed]
    for harm in content:
        (run / name).write_bytes(harm)
        for call in opened(run):
            one_sentence(call, f"{name}: {harm[:300]!r}")


def test_the_folder_of_a_comparison_is_told_from_a_run(tmp_path):
    for name in ("sce-seed0-fold0", "mmc-seed0-fold0"):
        run = tmp_path / "out" / "runs" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
    (tmp_path / "out" / "config.json").write_text('{"model": ""}')
    with pytest.raises(UserError, match=r"holds a comparison of 2 networks: name one, such as .*runs/mmc-seed0-fold0"):
        run_folder.read_config(tmp_path / "out")
