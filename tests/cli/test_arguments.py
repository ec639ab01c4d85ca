"""What is typed: every bad argument is one line on stderr and exit status 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import fields
from inspect import signature

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tests.results.factory import make_results, make_run

from holdfast import results
from holdfast.cli.bracket import bracket
from holdfast.cli.evaluate import evaluate
from holdfast.cli.explain import explain
from holdfast.cli.own_model import OwnModel
from holdfast.cli.smooth import smooth
from holdfast.cli.targeted import targeted
from holdfast.evaluation.suites import SUITES, Stage

LONG = "x" * 100_000
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        h = x.flatten(1)
        return {answer}

def build():
    return Net()
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 3}),))


def refused(answer):
    """The one line of an error."""
    status, out, err = answer
    assert (status, out) == (2, ""), (status, out, err)
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert len(lines[0]) < 1300
    assert lines[0].startswith("error: ")
    assert not any(ord(ch) < 32 or 126 < ord(ch) < 160 for ch in lines[0])
    return lines[0]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--out", ""), "--out is empty"),
        (("--out=",), "--out is empty"),
        (("-o", ""), "-o is empty"),
        (("--out", "/"), "--out is the root"),
        (("--out", "x" * 300), "--out 'x*…x*' is too long for a file system"),
        (("--out", "~nobody-of-this-name/x"), "home folder that does not exist"),
        (("--out", "pipe"), "device, a pipe or a socket"),
        (("--epochs", "1_000"), "--epochs 1_000: write the number without underscores"),
        (("--lr=1_0e-3",), "--lr 1_0e-3: write the number without underscores"),
        (("--epochs", "0"), "epochs must be a whole number >= 1, got 0"),
        (("--lr", "nan"), "lr must be a positive finite number, got nan"),
        (("--weight-decay", "inf"), "weight_decay must be a finite number >= 0, got inf"),
        (("--threat", "linf:1e300"), "covers all pixels"),
        (("--threat", "linf:8"), "Did you mean 8/255"),
        (("--threat", "linf:1e999999999"), "cannot read the threat"),
        (("--threat", f"linf:{'1' * 60}"), "covers all pixels"),
        (("--threat", "linf:0.1/0"), "cannot read the threat"),
        (("--threat", "linf:1_0/255"), "cannot read the threat"),
        (("--loss", "sce@"), "names no head after its @"),
        (("--loss", "sce:"), "no settings after its colon"),
        (("--loss", "isce:s=1,s=2"), "gives s twice"),
        (("--loss", "isce:s=1_0"), "unknown source of s '1_0'"),
        (("--loss", "sce+fit:epochs=1.5"), "epochs must be a whole number >= 1, got 1.5"),
        (("--loss", "sce+fit:pad=true"), "pad must be a whole number >= 0, got True"),
        (("--loss", "sce+fit:flip=1"), "flip must be True or False"),
        (("--loss", "sce+fit:lr=x"), "lr must be a positive finite number, got 'x'"),
        (("--loss", "\x1b[31mred"), "'red' holds control characters"),
        (("--loss", "y" * 9000), r"unknown loss 'y+…y+'"),
        (("--model", "mlp:width=99999999999"), "more than 1,000,000,000 parameters"),
        (("--model", "mlp:width=1e3"), "width of model 'mlp' must be a whole number"),
        (("--data", "pipe"), "device, a pipe or a socket"),
        (("--data", "/dev/null"), "device, a pipe or a socket"),
        (("--data", "~nobody-of-this-name/x"), "home folder that does not exist"),
        (("--data", LONG), "100,000 characters long"),
        (("--data", "x" * 5000), "too long for a file system"),
        (("--data", ""), "--data is empty: give it a value, or leave --data out"),
        (("--data", " "), "--data is empty"),
        (("--s", ""), "--s is empty"),
        (("--device=",), "--device is empty"),
        (("--out", "/dev"), "could not write to /dev"),
        (("--out", "/dev/pts/x"), "/dev holds no files"),
        (("--out", "/proc/x"), "/proc holds no files"),
        (("--out", ".."), "--out .. is above the working folder"),
        (("--out", "../.."), "is above the working folder"),
        (("--out", "~"), "is your home folder"),
        (("--out=~",), "is your home folder"),
        (("--seed", str(2**63 - 1)), "seed must be a whole number >= -8,796,093,022,208 and <= 8,796,093,022,208, got"),
        (("--seed", str(2**70)), "seed must be .*, got"),
        (("--epochs", str(2**70)), "<= 9,007,199,254,740,992, got"),
        (("--limit-train", str(2**70)), "which is too large"),
        (("--augment", "crop:999999"), "pad must be 0 to 16 pixels for these images, got 999999"),
        (("--loss", "sce+fit:pad=99999"), "pad must be 0 to 16 pixels"),
        (("--objective", "adversarial:steps=99999999999"), "steps >= 1 and <= 10,000, got 99999999999"),
        (("--threat", "linf:1e-300"), "eps must be at least 1.2e-38"),
        (("--threat", "linf:0.1,l2:1"), "cannot read the threat 'linf:0.1,l2:1'"),
        (("--data", "moons", "--fold", "1"), "--fold is for data without a test split"),
        (("--no-such-option\x1b]0;title\x07", "1"), "control characters"),
    ],
)
def test_train_refuses_in_one_line(words, why, holdfast_, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    out = () if words[0].startswith(("--out", "-o")) else ("--out", "run")
    began = time.monotonic()
    line = refused(holdfast_("train", *out, "--epochs", "1", *words, "--device", "cpu", "-q"))
    assert time.monotonic() - began < 60
    assert re.search(why, line), line
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("compare", "--losses", ""), "--losses is empty"),  # not the default seven
        (("compare", "--seeds", "99999999999"), "seeds must be a whole number >= 1 and <= 10,000"),
        (("compare", "--first-seed", str(2**53)), "seed must be a whole number"),
        (("compare", "--out", ".."), "is above the working folder"),
        (("recipe", ""), "NAME is empty: give it a value, or leave it out"),
        (("explain", ""), "RUN is empty"),
        (("bracket", ""), "RUN is empty"),
        (("evaluate", "mine.py:build", "--data", "digits", "--weights", ""), "--weights is empty"),
        (("evaluate", "mine.py:build", "--data", "digits", "--budget", ""), "--budget is empty"),
        (("evaluate", "mine.py:build", "--data", "digits", "--std", "0"), "std must be > 0, got"),
        (("evaluate", "mine.py:build", "--data", "digits", "--mean", "0,0", "--std", "1"), "as many numbers"),
        (("evaluate", "mine.py:build", "--data", "digits", "--out", "/dev/x"), "/dev holds no files"),
    ],
)
def test_every_command_refuses_in_one_line(words, why, holdfast_):
    assert re.search(why, refused(holdfast_(*words, "-q")))


def test_one_of_mean_and_std_is_enough(ten_classes, holdfast_, tmp_path):
    """As --help says: the other is 0 or 1."""
    model, folders = ten_classes("self.layer(h)"), []
    for given in (("--std", "0.5"), ("--mean", "0", "--std", "0.5")):
        assert evaluated(holdfast_, model, "digits", "--limit", "20", *given)[0] == 0
        folders.append((tmp_path / "run").rename(tmp_path / f"run{len(folders)}"))
    one, two = (results.load(folder).runs[0].samples for folder in folders)
    assert one == two


def test_a_home_folder_in_an_option_is_written_out(holdfast_, tmp_path, monkeypatch):
    """No shell writes it out after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train = ("train", "--data", "moons", "--epochs", "1", "--device", "cpu", "-q", "--out=~/run")
    assert holdfast_(*train)[0] == 0
    assert holdfast_("evaluate", "~/run", "--suite", "tiny", "--limit", "5", "--out=~/e", "-q")[0] == 0
    assert holdfast_("report", "~/e", "--out=~/e/page.html")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    assert holdfast_("replay", "~/e/results.json")[0] == 0  # the file stands for its folder


def test_files_of_somebody_else_are_not_overwritten(holdfast_, tmp_path):
    """A folder without config.json is none of ours: a model.safetensors in it stays what it is."""
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    words = ("train", "--data", "moons", "--epochs", "1", "--device", "cpu", "-q", "--out", ".")
    assert "holds model.safetensors, but no config.json" in refused(holdfast_(*words))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("command", ["evaluate", "export", "explain", "bracket", "curves", "report", "replay"])
@pytest.mark.parametrize(
    ("word", "why"), [("", "is empty"), ("/", "the root"), ("pipe", "a pipe"), (LONG, "characters")]
)
def test_a_folder_that_is_none(command, word, why, holdfast_, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert why in refused(holdfast_(command, word))


@pytest.mark.parametrize("option", [("--epochs", "3"), ("--data", "mnist"), ("--suite", "quick"), ("--out", "x")])
def test_options_of_no_recipe_are_refused(option, holdfast_):
    assert f"{option[0]} belongs to a recipe" in refused(holdfast_("recipe", *option))


def test_a_number_with_an_underscore_may_be_a_name(holdfast_):
    assert "2024_01" in refused(holdfast_("replay", "2024_01"))  # there is no such folder, and that is all


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + b"\0" * 100])
def test_a_damaged_program_is_one_line(content, holdfast_, tmp_path, caplog):
    (tmp_path / "net.pt2").write_bytes(content)
    line = refused(holdfast_("evaluate", "net.pt2", "--data", "digits", "--device", "cpu", "-q"))
    assert "cannot be read as a torch.export program" in line
    assert not caplog.records


@pytest.fixture
def threes_and_sevens(tmp_path):
    """A folder of two of the ten digits."""
    digits = load_digits()
    for row in [row for row in range(400) if digits.target[row] in (3, 7)]:
        folder = tmp_path / "images" / str(digits.target[row])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[row] * 15).astype("uint8")).save(folder / f"{row}.png")
    return "images"


@pytest.fixture
def ten_classes(tmp_path):
    """A linear network fitted to all ten digits; its file, by what it answers."""
    digits = load_digits()
    x = torch.tensor(digits.images * 15 / 255).float().flatten(1)
    y = torch.tensor(digits.target)
    layer = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x), y).backward()
        optimizer.step()
    torch.save({f"layer.{name}": value for name, value in layer.state_dict().items()}, tmp_path / "weights.pt")

    def file(answer):
        (tmp_path / "mine.py").write_text(MODEL.format(answer=answer))
        return "mine.py:build"

    return file


def evaluated(holdfast_, model, data, *words):
    return holdfast_(
        "evaluate", model, "--weights", "weights.pt", "--data", data, "--suite", "tiny", "--threat", "linf:0.05",
        "--device", "cpu", "--out", "run", "-q", *words,
    )  # fmt: skip


def test_more_logits_than_classes_need_names(threes_and_sevens, ten_classes, holdfast_, tmp_path):
    model = ten_classes("self.layer(h)")
    line = refused(evaluated(holdfast_, model, threes_and_sevens))
    assert "returns 10 logits, but" in line
    assert "has 2 classes (3, 7)" in line
    assert "--classes" in line
    line = refused(evaluated(holdfast_, model, threes_and_sevens, "--classes", "zero,one,two"))
    assert "the data's class '3' is not among the network's 3 classes" in line
    line = refused(evaluated(holdfast_, model, threes_and_sevens, "--classes", "3,7,8"))
    assert "3 classes are named, but the network returns 10 logits" in line
    assert not (tmp_path / "run").exists()

    (tmp_path / "names.txt").write_text("\n".join("0123456789"))
    status, _, err = evaluated(holdfast_, model, threes_and_sevens, "--classes", "names.txt")
    assert status == 0, err
    run = json.loads((tmp_path / "run" / "results.json").read_text())["runs"][0]
    assert run["clean"]["value"] > 0.9, "the logits of 3 and 7 are those of their labels"
    assert holdfast_("replay", "run", "--run-code")[0] == 0
    assert results.load(tmp_path / "run").runs[0].n > 50


def test_one_of_several_outputs_is_chosen(threes_and_sevens, ten_classes, holdfast_, tmp_path):
    model = ten_classes("(h[:, :10], self.layer(h))")
    line = refused(evaluated(holdfast_, model, "digits", "--limit", "60"))
    assert "returns 2 tensors (0: shape (2, 10), 1: shape (2, 10))" in line
    assert "--output" in line
    assert "no output 'scores'" in refused(evaluated(holdfast_, model, "digits", "--limit", "60", "--output", "scores"))
    status, _, err = evaluated(holdfast_, model, "digits", "--limit", "60", "--output", "1")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["runs"][0]["clean"]["value"] > 0.9
    assert holdfast_("replay", "run", "--run-code")[0] == 0


def test_a_float64_network_is_noted(ten_classes, holdfast_, tmp_path):
    model = ten_classes("self.layer(h)")
    text = (tmp_path / "mine.py").read_text().replace("return Net()", "return Net().double()")
    (tmp_path / "mine.py").write_text(text)
    status, _, err = holdfast_(
        "evaluate", model, "--data", "digits", "--suite", "tiny", "--threat", "linf:0.05", "--device", "cpu", "--out",
        "run", "--limit", "60",
    )  # fmt: skip
    assert status == 0, err
    assert "the network is torch.float64 throughout" in " ".join(err.split())


def test_names_in_results_cannot_drive_a_terminal(holdfast_, tmp_path):
    name = "\x1b]0;title\x07\x1b[2J=evil"
    stored = make_results([make_run(name, name=name), make_run("sce")])
    stored.data["name"] = name
    (tmp_path / "results.json").write_text(results.to_json(stored))
    for words in (("report", "results.json"), ("report", "results.json", "--json")):
        status, out, err = holdfast_(*words)
        assert status == 0, err
        assert "\x1b" not in out + err


def test_five_commands_take_the_same_options_of_an_own_model():
    names = {one.name for one in fields(OwnModel)}
    for command in (evaluate, bracket, explain, smooth, targeted):
        assert names <= set(signature(command).parameters)
        assert "own_model" not in signature(command).parameters
