"""Contracts of the command line: what is printed where, what is refused and how, what a user sees of a mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image
from tests.helpers import in_foreground, write_parquet
from typer.models import OptionInfo

import holdfast
from holdfast import cli, results
from holdfast.attacks import ATTACKS
from holdfast.data import DATASETS, load
from holdfast.errors import UserError
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.experiments.config import Comparison
from holdfast.experiments.recipes import RECIPES, Recipe
from holdfast.information.sources import SOURCES
from holdfast.losses import LOSSES
from holdfast.models import MODELS
from holdfast.models.heads import HEADS
from holdfast.objectives import OBJECTIVES
from holdfast.train import FitConfig

COMMANDS = (
    "compare",
    "recipe",
    "train",
    "evaluate",
    "export",
    "explain",
    "bracket",
    "curves",
    "report",
    "replay",
    "list",
    "doctor",
)
SMALL = ("--epochs", "2", "--batch-size", "32", "--suite", "tiny", "--device", "cpu")
TINY_SUITE = (Stage("apgd", "apgd", settings={"steps": 3}),)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every command runs in tmp_path, 80 columns wide; a default output folder falls there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SUITES, "tiny", TINY_SUITE)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("data") / "digits")


def one_line(err):
    """The one line of an error, without a traceback."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0]


# Help.


@pytest.mark.parametrize("words", [(), *((command,) for command in COMMANDS)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_a_terminal(words, flag, holdfast_):
    status, out, err = holdfast_(*words, flag)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert "Usage: holdfast" in out
    for line in out.splitlines():
        assert not re.search(r"\*\*|``|\[bold\]|\[/", line), "markup is rendered, not shown"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command, holdfast_):
    """Option names stand whole on a line, and each has a word on it and its default beside."""
    _, out, _ = holdfast_(command, "--help")
    callback = next(c for c in cli.app.registered_commands if (c.name or c.callback.__name__) == command).callback
    import inspect

    for name, parameter in inspect.signature(callback, eval_str=True).parameters.items():
        about = parameter.annotation.__metadata__[0]
        assert about.help, name
        if parameter.default is not parameter.empty and isinstance(about, OptionInfo):
            flag = {"as_json": "--json", "fit_settings": "--fit"}.get(name, "--" + name.replace("_", "-"))
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", out), flag


def test_no_words_are_a_question_for_help(holdfast_):
    status, out, err = holdfast_()
    assert status in (0, 2)
    assert all(command in out + err for command in COMMANDS)


def test_the_first_help_page_names_every_command_and_the_first_step(holdfast_):
    _, out, _ = holdfast_("--help")
    assert all(command in out for command in COMMANDS)
    assert "holdfast compare" in out


def test_version(holdfast_):
    assert holdfast_("--version") == (0, f"holdfast {holdfast.__version__}\n", "")


# List.


def test_list_json_is_what_the_dicts_hold(holdfast_):
    status, out, err = holdfast_("list", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    dicts = {
        "losses": LOSSES, "heads": HEADS, "attacks": ATTACKS, "objectives": OBJECTIVES, "models": MODELS,
        "datasets": DATASETS, "recipes": RECIPES, "sources": SOURCES,
    }  # fmt: skip
    assert set(found) == {*dicts, "checks", "corruptions"}
    for kind, named in dicts.items():
        assert found[kind] == sorted(named), kind
    assert all(isinstance(name, str) for name in found["checks"])


def test_list_for_people_has_a_line_for_each(holdfast_):
    status, out, _ = holdfast_("list")
    assert status == 0
    for named in (LOSSES, HEADS, ATTACKS, OBJECTIVES, MODELS, DATASETS, RECIPES, SOURCES):
        for name in named:
            assert re.search(rf"^  {name} +\S", out, re.MULTILINE), name


# Recipes and curves.


def test_recipe_without_a_name_lists_what_there_is(holdfast_):
    status, out, _ = holdfast_("recipe")
    assert status == 0
    for name in RECIPES:
        assert f"{name}: " in out


def test_a_recipe_holds_its_numbers_against_those_it_expects(holdfast_, parquet, monkeypatch):
    def small(data=parquet):
        comparison = Comparison(data=data, losses=("sce",), suite="tiny", fit=FitConfig(epochs=2, batch_size=32))
        return Recipe("small", comparison, "no time", {("sce", "clean"): (0.0, 1.0), ("sce", "robust"): (1.1, 1.2)})

    monkeypatch.setitem(RECIPES, "small", small)
    status, out, _ = holdfast_("recipe", "small", "--out", "out", "--device", "cpu", "--jobs", "1")
    assert status == 1
    assert "expected 0.0% to 100.0%: as expected" in out
    assert "expected 110.0% to 120.0%: NOT as expected" in out
    status, out, _ = holdfast_("curves", "out")
    assert status == 0
    assert re.search(r"sce, seed 0: 2 epochs, loss [\d.]+, validation [\d.]+%\.", out)
    assert Path("out/curves.png").exists()


def test_a_recipe_of_another_size_expects_nothing(holdfast_, parquet, monkeypatch):
    status, out, _ = holdfast_(
        "recipe", "mnist-l2", "--data", parquet, "--epochs", "1", "--suite", "tiny", "--model", "lipmlp:width=16",
        "--proofs", "crown", "--out", "out", "--quiet", "--jobs", "1",
    )  # fmt: skip
    assert status == 0
    assert "as expected" not in out


@pytest.mark.parametrize("name", ["cifar10", "cifar10-wide"])
def test_the_recipes_of_photographs_run_end_to_end(name, holdfast_, tmp_path):
    """At a size that fits: digits for photographs, a smaller network of the same kind."""
    words = ("--epochs", "1", "--limit-train", "40", "--limit", "4", "--suite", "tiny", "--jobs", "1", "--quiet")
    model = {"cifar10": "preactresnet8", "cifar10-wide": "wideresnet:depth=10,width=1"}[name]
    photographs = write_parquet(tmp_path / "photographs", photographs=True)
    status, out, _ = holdfast_("recipe", name, "--data", photographs, "--model", model, "--out", "out", *words)
    assert status == 0
    assert "not available" not in out


def test_an_unknown_recipe_is_named(holdfast_):
    status, _, err = holdfast_("recipe", "mnits")
    assert status == 2
    assert "Did you mean 'mnist'" in one_line(err)


# Compare.


@pytest.fixture(scope="module")
def done_once(parquet, tmp_path_factory):
    """The words of a small comparison, what was printed, and where it was done: nobody changes anything there."""
    words = ("compare", "--data", parquet, "--losses", "sce,isce:s=10", *SMALL, "--out", "out", "--jobs", "1")
    folder, out, err = tmp_path_factory.mktemp("once"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        patch.setenv("HOLDFAST_CACHE", str(folder / "cache"))
        patch.setitem(SUITES, "tiny", TINY_SUITE)
        patch.setattr(sys, "argv", ["holdfast", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return words, (stop.value.code or 0, out.getvalue(), err.getvalue()), folder / "out"


@pytest.fixture
def compared(done_once, tmp_path):
    words, printed, folder = done_once
    shutil.copytree(folder, tmp_path / "out")
    return words, printed, tmp_path / "out"


@pytest.fixture
def sce_done(done_once):
    """Puts the finished SCE network of that comparison into another output folder, where the same command finds it."""

    def put(out):
        name = "sce-seed0-fold0"
        shutil.copytree(done_once[2] / "runs" / name, Path(out) / "runs" / name)

    return put


def test_compare_prints_a_table_and_says_where_things_are(compared, holdfast_):
    words, (status, out, err), folder = compared
    assert status == 0
    assert re.search(r"sce +[\d.]+ +[\d.]+ +(-[\d.]+ )?\w+ +([\d.-]+ +)?(<= )?[\d.]+ \[[\d.]+, [\d.]+\] +\w+", out)
    assert "isce:s=10" in out
    for name in ("out/results.json", "out/report.html", "holdfast replay out"):
        assert name in out
    for name in ("results.json", "report.html", "witnesses.safetensors", "config.json", "env.json"):
        assert (folder / name).is_file(), name
    lines = [line.partition(", about ")[0] for line in err.splitlines() if line.startswith("network ")]
    assert lines == [f"network {i} of 2 done: {name}" for i, name in
                     enumerate(("sce-seed0-fold0", "isce_s=10-seed0-fold0"), 1)]  # fmt: skip
    found = results.load(folder)
    assert found.command.startswith("holdfast compare --data ")
    assert [run.n for run in found.runs] == [40, 40]
    page = (folder / "report.html").read_text()
    assert "isce:s=10" in page
    assert not re.search(r"(src|href)=.https?:", page)

    again = holdfast_(*words)
    assert (again[0], again[1]) == (0, out)


def test_json_is_all_there_is_on_stdout(parquet, holdfast_, tmp_path, sce_done):
    sce_done("out")
    status, out, err = holdfast_(
        "compare", "--data", parquet, "--losses", "sce,mmc", *SMALL, "--out", "out", "--jobs", "1", "--json"
    )
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "results.json").read_text())
    assert {run["loss"] for run in json.loads(out)["runs"]} == {"sce", "mmc"}
    assert "network 2 of 2" in err


def test_quiet_is_the_answer_alone(parquet, holdfast_, tmp_path, sce_done):
    sce_done("out")
    words = ("compare", "--data", parquet, "--losses", "sce", *SMALL, "--jobs", "1", "--quiet")
    status, out, err = holdfast_(*words, "--out", "out")
    assert (status, err) == (0, "")
    assert "sce" in out
    assert "results.json" not in out
    status, out, err = holdfast_(*words, "--json", "--out", "out")
    assert (status, err) == (0, "")
    assert json.loads(out)["schema"] == results.SCHEMA


def test_the_default_folder_is_found_again(parquet, holdfast_, tmp_path):
    words = ("compare", "--data", parquet, "--losses", "sce", *SMALL, "--jobs", "1")
    _, first, _ = holdfast_(*words)
    made = list((tmp_path / "out").iterdir())
    assert len(made) == 1
    assert made[0].name.startswith("digits-linf0.1-")
    assert made[0].name in first
    _, again, _ = holdfast_(*words)
    assert again == first
    holdfast_(*words, "--seeds", "2")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_limit_that_cross_validation_does_not_use_is_named(holdfast_, monkeypatch):
    def stopped(*_, **__):
        raise UserError("stopped")

    monkeypatch.setattr("holdfast.experiments.compare.compare", stopped)
    assert "note: --limit 40 is not used: 5 folds test on every image once" in holdfast_("compare", "--limit", "40")[2]
    for words in ((), ("--limit", "40", "--folds", "1"), ("--limit", "0")):
        assert "note" not in holdfast_("compare", *words)[2]


def test_the_threat_that_is_suggested_for_photographs_is_small(holdfast_, tmp_path):
    data = write_parquet(tmp_path / "photographs", photographs=True)
    words = ("train", "--data", data, "--model", "mlp", "--epochs", "1", "--device", "cpu", "--out")
    assert "next: holdfast evaluate a --threat linf:8/255" in holdfast_(*words, "a")[1]
    assert "--threat linf:0.05" in holdfast_(*words, "b", "--threat", "linf:0.05")[1]
    assert "--threat linf:0.1" in holdfast_(*words, "c", "--objective", "adversarial:steps=1")[1]


def test_options_reach_the_training(parquet, holdfast_, tmp_path):
    status, *_ = holdfast_(
        "compare", "--data", parquet, "--losses", "cosface:m=0.2,scale=15,sce@center", "--threat", "l2:1/2",
        "--suite", "tiny", "--objective", "adversarial:steps=2", "--seeds", "1", "--epochs", "1", "--limit", "20",
        "--limit-train", "60", "--model", "mlp", "--batch-size", "16", "--optimizer", "sgd", "--lr", "0.05",
        "--weight-decay", "0.001", "--augment", "crop:1+flip", "--jobs", "1", "--device", "cpu",
        "--fit", "ema=0.9,schedule=step", "-o", "out", "-q",
    )  # fmt: skip
    assert status == 0
    found = results.load(tmp_path / "out")
    assert found.settings["fit"] | {
        "epochs": 1, "batch_size": 16, "optimizer": "sgd", "lr": 0.05, "ema": 0.9, "schedule": "step",
        "weight_decay": 0.001, "pad": 1, "flip": True,
    } == found.settings["fit"]  # fmt: skip
    assert [run.loss for run in found.runs] == ["cosface:m=0.2,scale=15", "sce@center"]
    assert [run.n for run in found.runs] == [20, 20]
    assert found.runs[0].threat == {"norm": "l2", "eps": 0.5, "lo": 0.0, "hi": 1.0}
    assert found.settings["objective"] == "adversarial:steps=2"
    folder = next((tmp_path / "out" / "runs").glob("cosface*"))
    assert json.loads((folder / "config.json").read_text())["model"]["name"] == "mlp"


def test_the_split_and_the_checkpoint_are_chosen_by_options(holdfast_, monkeypatch):
    chosen = []
    nothing = results.Results(runs=(), data={})
    monkeypatch.setattr("holdfast.cli.compare.run_comparison", lambda one, *_: chosen.append(one) or nothing)
    assert holdfast_("compare", "--split", "val", "--checkpoint", "best")[0] == 0
    assert (chosen[0].eval_split, chosen[0].fit.checkpoint) == ("val", "best")
    assert holdfast_("compare")[0] == 0
    assert (chosen[1].eval_split, chosen[1].fit.checkpoint) == ("test", "last")
    for option, message in (("--split", "eval_split must be 'test' or 'val'"), ("--checkpoint", "checkpoint must be")):
        status, _, err = holdfast_("compare", option, "train")
        assert status == 2
        assert message in one_line(err)


def test_the_input_range_is_for_a_model_of_ones_own(compared, holdfast_):
    status, _, err = holdfast_("evaluate", "out/runs/sce-seed0-fold0", "--input-range", "0,255")
    assert status == 2
    assert "--input-range is for your own model" in one_line(err)


def test_compare_on_the_embedded_digits(holdfast_, tmp_path):
    status, out, _ = holdfast_(
        "compare",
        "--losses",
        "sce",
        "--folds",
        "2",
        "--limit-train",
        "100",
        *SMALL,
        "--jobs",
        "1",
        "-o",
        "out",
        "--json",
    )
    assert status == 0
    found = json.loads(out)
    assert found["data"]["name"] == "digits"
    assert found["runs"][0]["n"] == 1797


def test_a_folder_with_brackets_is_printed_as_it_is(parquet, holdfast_, sce_done):
    """[...] is markup to rich and an ordinary folder name to everybody else."""
    folder = "a [bold] b [/x] :smile:"
    sce_done(folder)
    status, out, _ = holdfast_("compare", "--data", parquet, "--losses", "sce", *SMALL, "--jobs", "1", "--out", folder)
    assert status == 0
    assert f"{folder}/results.json" in out
    status, out, _ = holdfast_("report", folder)
    assert (status, out.strip()) == (0, f"{folder}/report.html")


def test_the_command_to_replay_can_be_pasted(parquet, holdfast_, sce_done):
    """The command that is printed names the folder so that a shell understands it."""
    sce_done("my out")
    _, out, _ = holdfast_("compare", "--data", parquet, "--losses", "sce", *SMALL, "--jobs", "1", "--out", "my out")
    line = next(line for line in out.splitlines() if "holdfast replay" in line)
    import shlex

    assert shlex.split(line)[-1] == "my out"


# The chain.


def test_train_evaluate_report_replay(parquet, holdfast_, tmp_path):
    status, out, _ = holdfast_(
        "train", "--out", "run", "--data", parquet, "--loss", "isce:s=10", "--epochs", "3", "--batch-size", "32",
        "--device", "cpu",
    )  # fmt: skip
    assert status == 0
    assert re.search(r"isce:s=10: train accuracy [\d.]+%, validation [\d.]+%, 3 epochs in [\d.]+ s\.", out)
    assert "holdfast evaluate run" in out
    for name in ("config.json", "env.json", "log.jsonl", "checkpoint.safetensors", "model.safetensors"):
        assert (tmp_path / "run" / name).is_file(), name
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3

    status, out, _ = holdfast_("evaluate", "run", "--threat", "linf:8/255", "--suite", "tiny", "--device", "cpu")
    assert status == 0
    folder = tmp_path / "run" / "evaluation-linf8_255-tiny"
    found = results.load(folder)
    assert (found.runs[0].loss, found.runs[0].n) == ("isce:s=10", 40)
    assert "results.json" in out

    status, out, _ = holdfast_("report", "run/evaluation-linf8_255-tiny", "--out", "page.html", "--figures", "figures")
    assert status == 0
    assert (tmp_path / "page.html").stat().st_size > 1000
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} >= {".svg", ".png"}
    assert all((tmp_path / line).exists() for line in out.splitlines())

    status, out, _ = holdfast_("replay", "run/evaluation-linf8_255-tiny", "--device", "cpu")
    assert status == 0
    assert re.search(r"isce:s=10 seed 0, linf 8/255: at most [\d.]+% of 40 are robust \(.*\): holds", out)
    assert holdfast_("replay", "run/evaluation-linf8_255-tiny", "--device", "cpu", "-q") == (0, out, "")
    status, out, _ = holdfast_("replay", "run/evaluation-linf8_255-tiny", "--json")
    assert status == 0
    assert json.loads(out)[0]["holds"] is True
    assert json.loads(out)[0]["bound"] == pytest.approx(found.runs[0].robust.value)


def test_a_replay_that_fails_says_so_and_returns_1(compared, holdfast_):
    _, _, folder = compared
    raw = json.loads((folder / "results.json").read_text())
    raw["runs"][0]["robust"] = {"value": 0.0, "low": 0.0, "high": 0.2}
    (folder / "results.json").write_text(json.dumps(raw))
    status, out, err = holdfast_("replay", "out")
    assert (status, err) == (1, "")
    assert re.search(r"sce seed 0, linf 0.1: .*: FAILS \(", out)
    status, out, _ = holdfast_("replay", "out", "--json")
    assert status == 1
    assert [proof["holds"] for proof in json.loads(out)] == [False, True]


@pytest.mark.filterwarnings("default::holdfast.data.DataWarning")
def test_data_is_read_as_it_is_told_and_what_was_assumed_is_said_once(holdfast_, tmp_path):
    """Pictures of two sizes and a hidden folder: refused in one line, then read, trained on, attacked and replayed."""
    digits = load("digits")
    for image, label, number in zip(digits.train.x, digits.train.y.tolist(), range(120), strict=False):
        for name in (f"class-{label % 2}", *([".ipynb_checkpoints"] if number < 3 else [])):
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image[0].numpy())
            picture.resize((9, 9) if number == 5 else (8, 8)).save(tmp_path / "set" / name / f"{number:03}.png")
    words = ("train", "--out", "run", "--data", "set", "--epochs", "2", "--batch-size", "32", "--device", "cpu")
    status, _, err = holdfast_(*words)
    assert status == 2
    assert "with --resize N" in one_line(err)
    assert not (tmp_path / "run").exists()
    status, _, err = holdfast_(*words, "--resize", "8")
    assert status == 0
    assert re.findall("^note: .*", err, re.MULTILINE) == [
        "note: set: skipped 3 hidden images: .ipynb_checkpoints.",
        "note: set: 1 image resized to 8x8, bilinear; proportions may change.",
    ]
    assert holdfast_("evaluate", "run", "--suite", "tiny", "--device", "cpu", "-q")[0] == 0
    assert holdfast_("replay", "run/evaluation-linf0.1-tiny", "--device", "cpu")[0] == 0
    status, _, err = holdfast_("evaluate", "run", "--resize", "8")
    assert status == 2
    assert "--resize is for your own model" in one_line(err)
    out = ("compare", "--data", "set", "--losses", "sce,mmc", *SMALL, "--jobs", "1", "--resize", "8", "--out", "out")
    status, _, err = holdfast_(*out)
    assert status == 0
    assert len(re.findall("^note: ", err, re.MULTILINE)) == 2
    assert results.load(tmp_path / "out").settings["resize"] == 8


def test_train_goes_on_where_it_was(parquet, holdfast_, tmp_path):
    words = ("train", "--out", "run", "--data", parquet, "--epochs", "2", "--batch-size", "32", "-q", "--device", "cpu")
    _, first, _ = holdfast_(*words)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    status, again, _ = holdfast_(*words)
    assert (status, again) == (0, first)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("change", [("--loss", "mmc"), ("--epochs", "3"), ("--seed", "1"), ("--lr", "0.1")])
def test_train_does_not_hand_out_another_network(change, parquet, holdfast_):
    """The folder holds a finished run of sce; asked for something else, it must not answer with that."""
    words = ("train", "--out", "run", "--data", parquet, "--epochs", "2", "--batch-size", "32", "-q", "--device", "cpu")
    assert holdfast_(*words)[0] == 0
    status, out, err = holdfast_(*words, *change)
    assert (status, out) == (2, "")
    assert "another configuration" in one_line(err)


def test_report_takes_several_files(compared, holdfast_, tmp_path):
    shutil.copytree("out", "other")
    status, out, _ = holdfast_("report", "out/results.json", "other", "--out", "both.html")
    assert (status, out) == (0, "both.html\n")
    assert (tmp_path / "both.html").is_file()
    status, out, _ = holdfast_("report", "out/results.json")
    assert (status, out) == (0, "out/report.html\n")


# What a user can mend: one line on stderr, status 2, nothing on stdout, no traceback.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--losses", "icse"), r"unknown loss 'icse'\. Did you mean 'isce'\?"),
        (("--losses", "isce:s=-1"), r"s, the inference information, must be a finite number >= 0.*-1"),
        (("--losses", "isce:s=ten"), r"unknown source of s 'ten'"),
        (("--losses", "isce:t=1"), r"unknown setting of loss 'isce' 't'"),
        (("--losses", "isce@cosin"), r"unknown head 'cosin'\. Did you mean 'cosine'\?"),
        (("--losses", "sce,sce"), r"'sce' is named twice"),
        (("--losses", ","), r"no names in ','"),
        (("--losses", "mmc@linear"), r"needs distances to centers"),
        (("--threat", "linf:0"), r"eps must be a positive finite number"),
        (("--threat", "linf:-0.1"), r"eps must be a positive finite number"),
        (("--threat", "linf:inf"), r"cannot read the threat|eps must be a positive"),
        (("--threat", "linf:nan"), r"cannot read the threat|eps must be a positive"),
        (("--threat", "0.1"), r"cannot read the threat '0\.1': expected norm:eps"),
        (("--threat", "linf:8/0"), r"cannot read the threat"),
        (("--threat", "lnf:0.1"), r"unknown norm 'lnf'\. Did you mean 'linf'\?"),
        (("--data", "digts"), r"unknown data set 'digts'\. Did you mean 'digits'\?"),
        (("--data", "gone.parquet"), r"there is no such path: 'gone\.parquet'"),
        (("--data", "./gone"), r"there is no such path"),
        (("--suite", "quik"), r"unknown suite 'quik'\. Did you mean 'quick'\?"),
        (("--objective", "advers"), r"unknown objective 'advers'"),
        (("--model", "smallcnv"), r"unknown model 'smallcnv'\. Did you mean 'smallconv'\?"),
        (("--model", "preactresnet18"), r"needs images of at least 16x16, got 8x8"),
        (("--seeds", "0"), r"seeds must be a whole number >= 1"),
        (("--epochs", "0"), r"epochs must be a whole number >= 1"),
        (("--lr", "-1"), r"lr must be a positive finite number"),
        (("--lr", "nan"), r"lr must be a positive finite number"),
        (("--batch-size", "0"), r"batch_size must be a whole number >= 1"),
        (("--optimizer", "rmsprop"), r"optimizer must be 'adam', 'sgd' or 'momentum'"),
        (("--augment", "crop"), r"cannot read the augmentation 'crop'"),
        (("--augment", "flip"), r"cannot read the augmentation 'flip'"),
        (("--fit", "emma=0.9"), r"unknown training setting in --fit 'emma'\. Did you mean 'ema'\?"),
        (("--fit", "seed=3"), r"unknown training setting in --fit 'seed'"),
        (("--fit", "ema=1"), r"ema must be in \[0, 1\)"),
        (("--fit", "ema"), r"cannot read 'ema'"),
        (("--limit-train", "-1"), r"limit_train"),
        (("--limit-train", "5"), r"leaves none of class|limit_train"),
        (("--folds", "-1"), r"folds"),
        (("--device", "cuda:99"), r"device 'cuda:99' cannot be used"),
        (("--device", "gpu"), r"device 'gpu' cannot be used"),
    ],
)
def test_a_mistake_is_one_line(words, message, holdfast_, monkeypatch):
    monkeypatch.setattr("holdfast.experiments.training.fit", lambda *_, **__: pytest.fail("it was trained first"))
    status, out, err = holdfast_("compare", "--losses", "sce", "--epochs", "1", "--jobs", "1", "--out", "out", *words)
    assert (status, out) == (2, ""), err
    assert re.search(message, one_line(err))


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "--los", "sce"), ("compare", "--epsilon", "0.1"), ("compare", "--epochs", "many"),
        ("compare", "extra"), ("compar",), ("train",), ("evaluate",), ("report",), ("replay",), ("train", "--out"),
        ("list", "--yaml"),
    ],
)  # fmt: skip
def test_what_typer_refuses_is_refused_with_words(words, holdfast_):
    status, out, err = holdfast_(*words)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert any(word in err for word in words[1:] or words) or "Missing argument" in err or "Missing option" in err


def test_an_unknown_option_names_the_nearest(holdfast_):
    _, _, err = holdfast_("compare", "--epoch", "3")
    assert "--epochs" in err


@pytest.mark.parametrize("content", [b"", b"PAR1 not really PAR1", b"\x00" * 100])
def test_a_broken_parquet_is_one_line(content, holdfast_, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(content)
    status, out, err = holdfast_("compare", "--data", "broken.parquet", "--losses", "sce", "--jobs", "1")
    assert (status, out) == (2, "")
    assert "broken.parquet' cannot be read as parquet" in one_line(err)


def test_a_truncated_parquet_is_one_line(parquet, holdfast_, tmp_path):
    shutil.copytree(parquet, tmp_path / "cut")
    whole = (tmp_path / "cut" / "train.parquet").read_bytes()
    (tmp_path / "cut" / "train.parquet").write_bytes(whole[: len(whole) // 2])
    status, out, err = holdfast_("train", "--data", "cut", "--out", "run")
    assert (status, out) == (2, "")
    assert "train.parquet' cannot be read as parquet" in one_line(err)


def test_a_label_beyond_the_head_is_one_line(parquet, holdfast_, tmp_path):
    """Trained on data with five classes, evaluated after the data behind its path got ten."""
    write_parquet(tmp_path / "data", top=4)
    words = ("train", "--data", "data", "--out", "run", "--epochs", "1", "-q", "--device", "cpu")
    assert holdfast_(*words)[0] == 0
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(parquet, tmp_path / "data")
    status, out, err = holdfast_("evaluate", "run", "--suite", "tiny", "--device", "cpu")
    assert (status, out) == (2, "")
    assert re.search(r"the data at .* is not what run was made with: its content has changed", one_line(err))


@pytest.mark.parametrize("command", ["compare", "train", "report"])
def test_a_folder_that_cannot_be_written_is_one_line(command, compared, holdfast_, tmp_path, parquet):
    (tmp_path / "file").write_text("in the way")
    words = {
        "compare": ("compare", "--data", parquet, "--losses", "sce", *SMALL, "--jobs", "1", "--out", "file/out"),
        "train": ("train", "--data", parquet, "--epochs", "1", "--out", "file/out", "--device", "cpu"),
        "report": ("report", "out", "--out", "file/page.html"),
    }[command]
    status, out, err = holdfast_(*words)
    assert (status, out) == (2, "")
    assert "could not write" in one_line(err)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(parquet, holdfast_, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    status, out, err = holdfast_("train", "--data", parquet, "--epochs", "1", "--out", "closed/run")
    assert (status, out) == (2, "")
    assert "could not write" in one_line(err)


def test_the_results_of_another_comparison_are_one_line(compared, holdfast_):
    words, _, folder = compared
    before = (folder / "results.json").read_bytes()
    status, out, err = holdfast_(*words, "--threat", "linf:0.2")
    assert (status, out) == (2, "")
    assert "differ in threat" in one_line(err)
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "gone"), r"gone is not a run folder"),
        (("evaluate", "out"), r"out"),
        (("evaluate", "out/runs/sce-seed0-fold0", "--threat", "linf:0"), r"eps must be a positive"),
        (("evaluate", "out/runs/sce-seed0-fold0", "--suite", "quik"), r"unknown suite 'quik'"),
        (("evaluate", "out/runs/sce-seed0-fold0", "--limit", "-1"), r"limit"),
        (("report", "gone"), r"could not read gone"),
        (("report", "out/report.html"), r"is not readable JSON"),
        (("report", "out/config.json"), r"is not a holdfast results file"),
        (("replay", "gone"), r"could not read gone"),
        (("replay", "out/runs"), r"results\.json"),
        (("replay", "out", "--device", "gpu"), r"device 'gpu' cannot be used"),
        (("evaluate", "out/runs/sce-seed0-fold0", "--device", "gpu"), r"device 'gpu' cannot be used"),
        (("train", "--out", "new", "--loss", "icse"), r"Did you mean 'isce'"),
        (("train", "--out", "new", "--fold", "7"), r"fold"),
        (("train", "--out", "new", "--device", "gpu"), r"device 'gpu' cannot be used"),
        (("train", "--out", "new", "--threat", "l3:1"), r"unknown norm 'l3'"),
        (("train", "--out", "new", "--fold", "-1"), r"fold"),
    ],
)
def test_a_mistake_in_the_other_commands_is_one_line(words, message, compared, holdfast_, tmp_path):
    status, out, err = holdfast_(*words)
    assert (status, out) == (2, ""), err
    assert re.search(message, one_line(err))
    assert not (tmp_path / "gone").exists(), "an error leaves no folder behind"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "train.json"])
def test_a_damaged_run_is_one_line(name, compared, holdfast_, tmp_path):
    path = tmp_path / "out" / "runs" / "sce-seed0-fold0" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    status, out, err = holdfast_("evaluate", path.parent, "--suite", "tiny", "--device", "cpu")
    assert (status, out) == (2, "")
    assert name in one_line(err)


def test_an_error_with_markup_in_it_is_shown_as_it_is(holdfast_):
    _, _, err = holdfast_("compare", "--data", "[bold]x[/bold]", "--losses", "sce", "--jobs", "1")
    assert "'[bold]x[/bold]'" in one_line(err)


# The real process.


def real(*words, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast.cli", *map(str, words)] if not shutil.which("holdfast", path=BIN)
        else [os.path.join(BIN, "holdfast"), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, preexec_fn=in_foreground, **settings,
    )  # fmt: skip


BIN = os.path.dirname(sys.executable)


def test_the_installed_command_answers_at_once():
    began = time.perf_counter()
    process = real("--version")
    assert process.communicate(timeout=30) == (f"holdfast {holdfast.__version__}\n", "")
    assert process.returncode == 0
    assert time.perf_counter() - began < 5


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ctrl_c_is_a_stop_not_a_crash(parquet, tmp_path):
    process = real(
        "compare", "--data", parquet, "--losses", "sce,mmc,isce:s=3", "--epochs", "400", "--jobs", "2",
        "--out", "out", "--batch-size", "8", start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("out/runs/*/config.json")) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the whole group
        _, err = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130
    assert "rerun the same command to resume" in err
    assert "Traceback" not in err
    until = time.monotonic() + 10
    while alive(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(process.pid), "somebody of the group is left"


# A run folder from elsewhere.


def test_code_that_a_folder_names_runs_with_an_option_alone(parquet, holdfast_, tmp_path):
    net = "def backbone(shape):\n    print('it ran')\n    return torch.nn.Flatten()\n"
    (tmp_path / "mine.py").write_text("import torch\n" + net)
    words = ("train", "--data", parquet, "--model", "mine.py:backbone", "--out", "run", "--epochs", "1", "-q")
    for _ in range(2):  # the command names the code itself, and so does the one that resumes it
        assert holdfast_(*words, "--device", "cpu")[0] == 0
    small = ("--suite", "tiny", "--limit", "10", "-q", "--device", "cpu")
    for command in (
        ("evaluate", "run", *small),
        ("explain", "run", "--limit", "10"),
        ("bracket", "run", "--limit", "5"),
    ):
        status, out, err = holdfast_(*command)
        assert (status, out) == (2, "")
        assert re.search(r"run/config\.json names Python code, .*/mine\.py: .*--run-code", one_line(err))
    status, out, err = holdfast_("evaluate", "run", *small, "--run-code")
    assert status == 0
    assert f"executing {tmp_path / 'mine.py'}, which run/config.json names" in err
    status, _, err = holdfast_("replay", "run/evaluation-linf0.1-tiny")
    assert status == 2
    assert "--run-code" in one_line(err)
    assert holdfast_("replay", "run/evaluation-linf0.1-tiny", "--run-code")[0] == 0
    assert holdfast_("report", "run/evaluation-linf0.1-tiny")[0] == 0  # draws numbers, and executes nothing


# One's own network


@pytest.fixture
def own(tmp_path):
    """A network of one's own, as Python code, and the options that it needs."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n\n"
        "def smooth():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))\n\n"
        "class Rounded(nn.Linear):\n    def forward(self, x):\n        return super().forward(x.round(decimals=2))\n\n"
        "def rounded():\n    return nn.Sequential(nn.Flatten(), Rounded(64, 10))\n"
    )
    return ("--data", "digits", "--limit", "20", "--device", "cpu", "-q")


def test_a_missing_certified_column_has_a_reason(own, holdfast_):
    _, out, _ = holdfast_("evaluate", "mine.py:rounded", "--suite", "tiny", *own)
    assert "certified: not measured, since no bound is known for the operator round." in out
    _, out, _ = holdfast_("evaluate", "mine.py:build", "--suite", "tiny", "--threat", "linf:0.5", *own)
    assert "certified: none of 20 samples could be proved" in out


@pytest.mark.parametrize("command", ["bracket", "explain"])
def test_other_commands_take_ones_own_network_too(command, own, holdfast_):
    code, _, err = holdfast_(command, "mine.py:build", "--device", "cpu")
    assert code == 2
    assert "--data" in err
    more = ("--budget", "20s") if command == "bracket" else ()
    code, out, err = holdfast_(command, "mine.py:build", "--input-layout", "flat", *own, *more)
    assert not code, err
    assert out
    assert Path("out", f"mine-{command}-linf0.1", "config.json").is_file()


def test_pgd50_and_the_precision_are_options(own, holdfast_):
    """The table has no PGD-50 column, or says on how many samples; what the precision costs is said on stderr."""
    given = [*own[:-1], "--suite", "quick"]
    _, out, err = holdfast_("evaluate", "mine.py:build", *given, "--no-pgd50", "--precision", "2%", "--out", "without")
    assert "PGD-50" not in out.partition("certified")[0]
    assert "precision 2%: of " in err
    assert " passes (" in err
    page = Path("without/report.html").read_text()
    assert "PGD-50 (as usually" not in page
    _, out, _ = holdfast_("evaluate", "mine.py:build", *given, "--pgd50", "10", "--out", "sampled")
    assert "n=10" in out
    assert "n = 10</small>" in Path("sampled/report.html").read_text()
    for words, says in (
        (["--no-pgd50", "--pgd50", "5"], "give one of the two"),
        (["--pgd50", "0"], "--pgd50 must be >= 1 samples"),
        (["--precision", "1"], "expected a share of the samples, such as 1% or 0.01"),
    ):
        code, _, err = holdfast_("evaluate", "mine.py:build", *given, *words)
        assert code == 2
        assert says in one_line(err)
