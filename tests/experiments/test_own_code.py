"""Losses and attacks of the user's own files: named by text, identified by content, and errors with the line."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch

from holdfast.attacks import ATTACKS, matched_score
from holdfast.data import load
from holdfast.errors import UserError
from holdfast.experiments import added_attacks
from holdfast.experiments.compare import compare
from holdfast.experiments.config import Comparison, default_out
from holdfast.experiments.loss_spec import parse
from holdfast.losses import LOSSES, loss_name, mmc, negative_log_odds, negative_margin
from holdfast.outputs import Outputs
from holdfast.results import load as load_results
from holdfast.threat import Threat
from holdfast.train import FitConfig

LOSS = """
from holdfast.losses import LossEntry, negative_log_odds, negative_margin
from holdfast.outputs import logits_of

def hinge(out, y, width=1.0):
    return (width + negative_margin(logits_of(out), y)).clamp_min(0)

def mean(out, y):
    return hinge(out, y).mean()

def broken(out, y):
    return hinge(out, y) / nothing

entry = LossEntry(hinge, negative_log_odds, "cosine", "a hinge on cosines")
number = 3
"""
ATTACK = """
from holdfast.attacks import AttackEntry

def step(model, x, y, threat, *, score, noise, steps=1):
    x_adv = x
    for _ in range(steps):
        x_adv = threat.random_start(x, noise)
    return x_adv

def outside(model, x, y, threat, *, score, noise):
    return x + 1000

def broken(model, x, y, threat, *, score, noise):
    return x.nothing

def few(model, x, y, threat, *, score, noise):
    return x[:1]

flat = AttackEntry(step, "for one norm", norms=("l2",))
number = 3
"""
FIT = FitConfig(epochs=1, lr=3e-3)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working folder with code in lib; ATTACKS is afterwards what it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mine.py").write_text(LOSS)
    (tmp_path / "lib" / "attacks.py").write_text(ATTACK)
    before = dict(ATTACKS)
    yield
    ATTACKS.clear()
    ATTACKS.update(before)


# Losses.


def test_a_loss_of_a_file_is_what_the_function_says():
    row = parse("lib/mine.py:hinge:width=2+adversarial:steps=5+fit:lr=0.1")
    assert row.text == "mine.py:hinge:width=2+adversarial:steps=5+fit:lr=0.1"
    assert (row.head, row.objective, row.fit) == ("linear", "adversarial:steps=5", {"lr": 0.1})
    z, y = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])
    assert row.loss(Outputs(z), y).tolist() == [1.0, 0.0]
    assert row.score is negative_margin
    assert matched_score(row.loss) is negative_margin
    assert "hinge" in loss_name(row.loss)
    assert row.code in loss_name(row.loss)
    assert not any("mine.py" in name for name in LOSSES)


def test_an_entry_brings_its_score_and_head_and_another_head_can_be_chosen():
    row = parse("lib/mine.py:entry:width=2")
    assert (row.text, row.head, row.score) == ("mine.py:entry:width=2", "cosine", negative_log_odds)
    assert parse("lib/mine.py:hinge@center").head == "center"
    assert parse("mmc").loss is mmc


def test_a_row_may_name_a_backbone_of_a_file(tmp_path):
    assert parse("lib/mine.py:hinge+nets.py:backbone").model == "nets.py:backbone"


def test_a_loss_travels_to_other_processes_and_folders(tmp_path, monkeypatch):
    row = parse("lib/mine.py:hinge:width=2")
    packed = pickle.dumps(row)
    monkeypatch.chdir("/")
    again = pickle.loads(packed)
    assert (again, again.text, again.code) == (row, row.text, row.code)


def test_a_comparison_is_the_same_wherever_it_is_typed(tmp_path, monkeypatch):
    first = Comparison(losses=("lib/mine.py:hinge",)).checked()
    folder = default_out(first)
    monkeypatch.chdir(tmp_path / "lib")
    second = Comparison(losses=("mine.py:hinge",))
    assert second.checked().to_json() == first.to_json()
    assert first.to_json()["losses"] == ["mine.py:hinge"]
    assert default_out(second) == folder
    with pytest.raises(UserError, match="named twice"):
        Comparison(losses=("mine.py:hinge", "../lib/mine.py:hinge")).checked()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lib/mine.py", r"'lib/mine\.py' alone is not enough: name the loss"),
        ("lib/mine.py:", r"'lib/mine\.py' alone is not enough: name the loss"),
        ("lib/mine.py:hing", r"unknown name in mine\.py 'hing'\. Did you mean 'hinge'"),
        ("lib/mine.py:number", r"must be a function \(out, y\) -> \(N,\), or a LossEntry, got"),
        ("lib/mine.py:mean", r"returned shape \(\) for 2 samples"),
        ("lib/mine.py:broken", r"mine\.py:broken raised NameError: .*mine\.py, line 12"),
        ("lib/mine.py:hinge:with=3", r"Did you mean 'width'"),
        ("lib/mine.py:hinge@nohead", r"unknown head"),
        ("lib/other.py:hinge", r"there is no file at lib/other\.py"),
    ],
)
def test_a_loss_that_cannot_be_used_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


@pytest.mark.usefixtures("short_audits")
def test_a_comparison_of_own_losses_runs_on_several_processes_and_resumes(tmp_path, monkeypatch):
    losses = ("sce", "lib/mine.py:hinge", "lib/mine.py:entry:width=2")
    comparison = Comparison(losses=losses, folds=1, limit=12, limit_train=60, suite="quick", fit=FIT)
    compare(comparison, tmp_path / "out", workers=2)
    results = load_results(tmp_path / "out")
    assert [run.loss for run in results.runs] == ["sce", "mine.py:hinge", "mine.py:entry:width=2"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["loss_code"]) == {"mine.py:hinge", "mine.py:entry:width=2"}
    with monkeypatch.context() as patch:
        patch.setattr("holdfast.experiments.compare.run_job", lambda *_: pytest.fail("done again"))
        compare(comparison, tmp_path / "out")
    Path("lib/mine.py").write_text(LOSS + "\n# changed\n")
    with pytest.raises(UserError, match="differ in loss_code"):
        compare(comparison, tmp_path / "out")


def test_the_shell_trains_and_evaluates_with_consent(holdfast_, tmp_path, monkeypatch):
    words = ("--epochs", "1", "--device", "cpu")
    status, out, err = holdfast_("train", "--loss", "lib/mine.py:hinge:width=2", "--out", "run", *words)
    assert (status, err) == (0, "")
    assert out.startswith("mine.py:hinge:width=2: train accuracy")
    assert out.rstrip().endswith("--run-code")
    assert json.loads(Path("run/config.json").read_text())["loss"] == "mine.py:hinge:width=2"
    small = ("--suite", "quick", "-q", "--device", "cpu")
    status, out, err = holdfast_("evaluate", "run", *small)
    assert (status, out) == (2, "")
    assert re.search(r"^error: run/config\.json names Python code, .*mine\.py: .*--run-code", err)
    status, out, err = holdfast_("evaluate", "run", *small, "--run-code")
    assert status == 0
    assert f"executing {tmp_path}/lib/mine.py, which run/config.json names" in err
    assert holdfast_("replay", "run/evaluation-linf0.1-quick")[0] == 0  # which asks for no loss

    config = json.loads(Path("run/config.json").read_text())
    for damage in ({"paths": {}}, {"paths": {"loss": str(tmp_path / "lib" / "attacks.py")}}, {"loss_code": None}):
        damaged = {key: value for key, value in (config | damage).items() if value is not None}
        Path("run/config.json").write_text(json.dumps(damaged))
        status, out, err = holdfast_("evaluate", "run", *small, "--run-code", "--out", "new")
        assert (status, out) == (2, ""), damage
        assert "Traceback" not in err
        assert "executing" not in err


# Attacks.


def test_an_added_attack_is_the_last_stage_and_stays_in_the_ball(copied_run, holdfast_):
    run = copied_run("sce")
    words = ("evaluate", run, "--suite", "quick", "-q", "--device", "cpu", "--limit", "20", "--threat", "linf:0.02")
    added = "lib/attacks.py:step:steps=3,fab:steps=2,lib/attacks.py:outside"
    status, out, err = holdfast_(*words, "--attack", added)
    assert status == 0, err
    folder = run / "evaluation-linf0.02-quick+attacks.py_step_steps=3+fab_steps=2+attacks.py_outside"
    (found,) = load_results(folder).runs
    names = [stage.name for stage in found.stages]
    place = names.index("attacks.py:step:steps=3")
    assert names[place - 1 : place + 3] == ["md", "attacks.py:step:steps=3", "fab:steps=2", "attacks.py:outside"]
    assert found.stages[place].attacked > 0
    assert load_results(folder).settings["attacks"]["fab:steps=2"] == ""
    assert len(load_results(folder).settings["attacks"]["attacks.py:outside"]) == 16
    assert holdfast_("replay", folder)[0] == 0, "what is outside of the ball counts for nothing"
    Path("lib/attacks.py").write_text(ATTACK + "# changed\n")
    status, out, err = holdfast_(*words, "--attack", added)
    assert (status, out) == (2, "")
    assert "differ in attacks" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lib/attacks.py", r"'lib/attacks\.py' alone is not enough: name the attack"),
        ("lib/attacks.py:stp", r"Did you mean 'step'"),
        ("lib/attacks.py:step:stepz=2", r"unknown setting of attack 'attacks\.py:step' 'stepz'"),
        ("lib/attacks.py:number", r"or an AttackEntry, got"),
        ("lib/attacks.py:broken", r"attacks\.py:broken raised AttributeError: .*attacks\.py, line 14"),
        ("lib/attacks.py:few", r"must return x_adv in the shape of x, \(2, 1, 8, 8\), got a tensor of shape \(1, "),
        ("lib/attacks.py:flat", r"'attacks\.py:flat' is for l2, not for linf"),
        ("jsma,jsma", r"'jsma' is named twice"),
        ("fob", r"Did you mean 'fab'"),
    ],
)
def test_an_attack_that_cannot_be_used_leaves_no_folder(text, message, copied_run, holdfast_):
    run = copied_run("sce")
    status, out, err = holdfast_("evaluate", run, "--attack", text, "--out", "new", "--device", "cpu", "-q")
    assert (status, out) == (2, "")
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1
    assert not Path("new").exists()


def test_it_works_on_the_model_of_a_caller_too():
    stages, codes = added_attacks.added_stages(["lib/attacks.py:step"])
    data = load("digits", fold=(0, 5)).test
    calls = []

    def model(x):
        calls.append(len(x))
        return x.flatten(1)[:, :10]

    added_attacks.try_stages(stages, codes, model, data, Threat("linf", 0.1))
    assert codes.keys() == {"attacks.py:step"}
    assert not calls, "a random start asks for no answer"
