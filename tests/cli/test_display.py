"""What a person sees: tables that fit, colours that survive a pipe, progress that behaves, results in a notebook, and
what ``holdfast report`` says of what it was given and of what it wrote over."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import importlib
import inspect
import io
import itertools
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from tests.results.factory import PROTOCOLS, THREAT, make_results, make_run, proved

from holdfast import cli, results
from holdfast.cli import display, output_files
from holdfast.cli.display import Display
from holdfast.data import DataWarning
from holdfast.evaluation import Evaluation
from holdfast.progress import NETWORK_DONE
from holdfast.threat import Threat

LONG = (
    "sce+adversarial:steps=5,ramp=0.3,factor=1.1+fit:lr=5e-3",
    "isce:s=3+trades:beta=6,steps=5,ramp=0.3+fit:epochs=6,lr=1e-2",
    "sce:smoothing=0.1+adversarial:steps=5,ramp=0.3+fit:lr=1e-2,weight_decay=0.1",
)
COMMANDS = {command.name or command.callback.__name__: command for command in cli.app.registered_commands}


def printed(found, width=80, **more):
    console = Console(width=width, file=io.StringIO(), color_system=None, **more)
    console.print(results.table(found))
    return console.file.getvalue()


@pytest.fixture
def holdfast_(holdfast_, monkeypatch, tmp_path):
    """The same in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return holdfast_


def refused(answer):
    """The one line of a refusal, without the traceback."""
    status, out, err = answer
    assert (status, out) == (2, ""), answer
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


# Tables.


def columns(line):
    """Where the figures of a line end."""
    return [match.end() for match in re.finditer(r"\d+\.\d(?= )", line)]


def test_a_long_name_stands_whole_above_its_figures():
    runs = [proved(0.6, make_run(loss, robust=0.3)) for loss in LONG]
    above, head, _, *lines = printed(make_results([*runs, proved(0.6, make_run("sce"))])).splitlines()
    assert above.split() == ["robust"]
    for loss, name, figures in zip(LONG, lines[:6:2], lines[1:6:2], strict=True):
        assert name.rstrip() == loss
        assert re.match(r" +97\.0 +40\.0 +60\.0 +30\.0 \[23\.7, 36\.9\] +tight", figures)
    assert re.match(r"sce +97\.0 +40\.0", lines[6]), "a short name stays on one line"
    assert columns(lines[1]) == columns(lines[6]), "figures stand below each other"
    assert lines[6].index("97.0") + 4 == head.index("clean") + 5
    assert max(map(len, [head, *lines])) <= 80


def test_every_column_at_once_fits_with_long_names():
    """Own loss, certified, both verdicts, the widest figures there are."""
    whole = {"clean": 1.0, "pgd50": 1.0, "robust": 1.0}
    wide = [
        dataclasses.replace(
            proved(1.0, make_run(loss, **whole, status="loose")),
            attacks=dict.fromkeys(("pgd50", "pgd50-train-loss"), results.proportion(200, 200)),
            pgd50_verdict=results.Verdict("refuted", "more"),
        )
        for loss in LONG
    ]
    text = printed(make_results(wide))
    assert max(map(len, text.splitlines())) <= 80
    for loss in LONG:
        assert loss in text
    assert text.count("<= 100.0 loose") == text.count("[98.2, 100.0]") == 3  # the gap needs room: the verdicts fold
    assert "certi-" in text.splitlines()[1]


def test_a_wide_terminal_has_a_line_for_each_row():
    text = printed(make_results([proved(0.6, make_run(loss)) for loss in LONG]), width=160)
    assert all(re.search(rf"^{re.escape(loss)} +97\.0", text, re.M) for loss in LONG)


def test_a_name_longer_than_a_line_ends_its_lines_where_its_parts_end():
    loss = "+".join(LONG)
    text = printed(make_results([make_run(loss), make_run("y" * 200)]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    at = next(i for i, line in enumerate(lines) if line.startswith("sce+"))
    name = list(itertools.takewhile(lambda line: "97.0" not in line, lines[at:]))
    assert "".join(map(str.strip, name)) == loss
    assert all(line.rstrip()[-1] == "," or after.strip()[0] in "+:@" for line, after in itertools.pairwise(name))
    assert text.count("y") >= 200


def test_the_papers_table_keeps_names_whole_too():
    runs = [proved(0.05, make_run(loss), **PROTOCOLS) for loss in (*LONG, "sce")]
    text = printed(make_results(runs))
    assert max(map(len, text.splitlines())) <= 80
    assert all(re.search(rf"^{re.escape(loss)} *$", text, re.M) for loss in LONG)
    assert re.search(r"^sce +97\.0 +40\.0 +55\.0", text, re.M)


def test_the_table_says_what_its_figures_are_of():
    assert "digits, 200 samples, linf 0.1, in percent; 95% Clopper-Pearson interval" in printed(make_results())
    two = [make_run(), make_run(threat={**THREAT, "eps": 0.2}, seed=0)]
    parts = printed(make_results(two))
    assert re.search(r"^linf 0\.1$.*^linf 0\.2$", parts, re.M | re.S)
    assert "samples, in percent" in parts
    assert "over 2 seeds" in printed(make_results([make_run(seed=s) for s in (0, 1)]))


def test_a_terminal_without_the_rule_gets_a_plain_one():
    class Ascii(io.StringIO):
        encoding = "ascii"

    console = Console(width=80, file=Ascii(), color_system=None)
    console.print(results.table(make_results()))
    assert console.file.getvalue().isascii()


def test_no_runs_print_an_empty_table():
    assert printed(dataclasses.replace(make_results(), runs=())).startswith("loss")


def test_a_verdict_has_its_colour_and_a_loss_of_that_name_has_none():
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(results.table(make_results([make_run("tight", status="loose")])))
    text = console.file.getvalue()
    assert "\x1b[33mloose\x1b[0m" in text
    assert "\x1b[32m" not in text


# Colours.


@pytest.mark.parametrize(
    ("environment", "in_a_pipe", "on_a_terminal"),
    [
        ({}, False, True),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, False, True),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "0"}, False, True),
        ({"CLICOLOR_FORCE": "1"}, True, True),
        ({"CLICOLOR_FORCE": "0"}, False, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"GITHUB_ACTIONS": "true"}, False, True),
    ],
)
def test_colours_go_where_they_are_wanted(environment, in_a_pipe, on_a_terminal):
    assert display.coloured(environment, False) is in_a_pipe
    assert display.coloured(environment, True) is on_a_terminal


def real(words, terminal=False, **environment):
    """What a process prints, stdout and stderr together, into a pipe or on a terminal of 80 columns."""
    kept = {k: v for k, v in os.environ.items() if not re.search("COLOR|TERM|ACTIONS|^COLUMNS|TTY", k)}
    more = {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "xterm", **environment}
    if not terminal:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=more, timeout=60)
        return done.stdout.decode()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=more, close_fds=True)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    process.wait(timeout=60)
    os.close(ours)
    return said.decode()


HOLDFAST = (sys.executable, "-m", "holdfast")


@pytest.mark.parametrize("words", [("--help",), ("nothing-like-it",), ("--version",)], ids=" ".join)
def test_a_pipe_has_no_escape_sequences(words):
    for environment in ({}, {"GITHUB_ACTIONS": "true"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        assert "\x1b" not in real([*HOLDFAST, *words], **environment)


@pytest.mark.parametrize("forced", ["FORCE_COLOR", "CLICOLOR_FORCE"])
def test_forced_colours_survive_a_pipe(forced):
    assert "\x1b[" in real([*HOLDFAST, "--help"], **{forced: "1"})
    code = "from holdfast.cli.display import screen; screen.print('x', style='red')"
    assert "\x1b[31mx" in real([sys.executable, "-c", code], **{forced: "1"})


def test_a_terminal_has_colours_unless_they_are_not_wanted():
    code = (
        "from holdfast.cli.display import screen, errors\n"
        "screen.print('x', style='bold red'); errors.print('y', style='red')"
    )
    words = [sys.executable, "-c", code]
    assert real(words, terminal=True).count("\x1b[0m") == 2
    assert "\x1b" not in real(words, terminal=True, NO_COLOR="1"), "bold neither"
    assert "\x1b" not in real([*HOLDFAST, "--help"], terminal=True, NO_COLOR="1")
    assert "\x1b" not in real(words, terminal=True, TERM="dumb")


# Progress.

WORK = """
import time
from holdfast.cli.display import Display
from holdfast.data import DataWarning
from holdfast.progress import NETWORK_DONE
with Display(networks=2) as d:
    for n, name in enumerate(("a" * 90 + "-seed7-fold3", "b"), 1):
        for k in range(3):
            d.progress(name, "training", k, 3); time.sleep(0.05)
        d.progress(name, NETWORK_DONE, n, 2)
print("the answer")
"""
BARS = re.compile(r"\r|\x1b\[\?25|\x1b\[\d*[AKJ]|━")


def test_a_log_has_plain_lines_even_with_forced_colours():
    for environment in ({}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}):
        text = real([sys.executable, "-c", WORK], **environment)
        assert not BARS.search(text), environment
        assert "network 1 of 2 done" in text
        assert len(text.splitlines()) == 3


def test_a_terminal_has_bars_that_fit_and_are_gone_at_the_end():
    text = real([sys.executable, "-c", WORK], terminal=True)
    assert "━" in text
    assert "networks done" in text
    assert "…a-seed7-fold3 · training" in text, "what it does is seen beside a long name"
    frames = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, frames)) <= 80
    assert "network 1 of 2 done" not in text
    assert frames[-2] == "the answer"


def test_a_dumb_terminal_has_lines():
    text = real([sys.executable, "-c", WORK], terminal=True, TERM="dumb")
    assert "━" not in text
    assert "network 2 of 2 done: b" in text


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: ``clock[0] += 60``."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_after_ten_seconds_and_then_every_minute(clock, capsys):
    with Display(networks=3) as shown:
        for second in range(181):
            clock[0] = 1000.0 + second
            shown.progress("sce-seed0", "training", second, 360)
            if second == 100:
                shown.progress("sce-seed0", NETWORK_DONE, 1, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "10 s · 0 of 3 networks done · sce-seed0 · training · 3%, about 5 min more for this part",
        "1 min · 0 of 3 networks done · sce-seed0 · training · 19%, about 4 min more for this part",
        "network 1 of 3 done: sce-seed0, about 3 min left",
        "2 min · 1 of 3 networks done · sce-seed0 · training · 36%, about 3 min more for this part",
    ]


def test_a_log_counts_the_rest_of_each_part_at_its_own_rate(clock, capsys):
    """Passes of the attacks, then checks: a count that starts again is another part."""
    with Display() as shown:
        for second in range(0, 100, 10):
            clock[0] = 1000.0 + second
            shown.progress("net", "linf 0.1, longer", 1000 * second, 180_000 - 500 * second)
        for number in range(1, 13):
            clock[0] += 10
            shown.progress("net", "checking: noise", number, 20)
    assert capsys.readouterr().err.splitlines() == [
        "10 s · net · linf 0.1, longer · 6%, about 2 min more for this part",
        "1 min · net · linf 0.1, longer · 48%, about 1 min more for this part",
        "2 min · net · checking: noise · 20%, about 2 min more for this part",
        "3 min · net · checking: noise · 50%, about 1 min more for this part",
    ]


def test_one_network_is_not_counted(clock, capsys):
    with Display() as shown:
        clock[0] += 30
        shown.progress("run", "apgd", 1, 0)
    assert capsys.readouterr().err == "30 s · run · apgd · 100%\n"


def test_networks_are_counted(clock, capsys):
    with Display(networks=2) as shown:
        shown.progress("a", NETWORK_DONE, 1, 2)
        clock[0] += 30
        shown.progress("b", "checking: noise", 1, 4)
    assert "30 s · 1 of 2 networks done · b · checking: noise · 25%" in capsys.readouterr().err


def test_quiet_says_nothing_whatever_happens(clock, capsys):
    with Display(quiet=True, networks=2) as shown:
        clock[0] += 1000
        shown.progress("a", "training", 1, 2)
        shown.progress("a", NETWORK_DONE, 1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def cells(monkeypatch):
    """A notebook: what is shown in it, and what was written over."""
    shown = []

    class Handle:
        def update(self, data, raw):
            shown[-1].append(data["text/plain"])

    def show(data, raw, display_id):
        assert (raw, display_id) == (True, True)
        shown.append([data["text/plain"]])
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    module = types.ModuleType("IPython.display")
    module.display = show
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(display.errors, "is_jupyter", True)
    return shown


def test_a_notebook_has_one_line_that_changes_once_a_second(clock, cells, capsys):
    with Display(networks=2) as shown:
        for tenth in range(300):  # half a minute
            clock[0] = 1000.0 + tenth / 10
            shown.progress("sce", "training", tenth, 300)
        shown.progress("sce", NETWORK_DONE, 1, 2)
    assert len(cells) == 1, "one output, not one more each time"
    assert 20 <= len(cells[0]) <= 32
    assert cells[0][-1] == "network 1 of 2 done: sce, about 30 s left"
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_in_a_notebook_stops_the_cell_not_the_notebook(cells):
    with pytest.raises(KeyboardInterrupt), Display():
        raise KeyboardInterrupt
    assert cells == [["Interrupted. Completed work is saved; rerun the same command to resume."]]


def test_a_log_says_at_once_how_long_a_network_will_take(capsys):
    """The first line of a log comes after ten seconds; what is expected of long work comes before it."""
    with Display() as shown:
        shown.progress("sce", "training convnet, expected: 8 min of training, at most 2.0 h of attacks", 0, 30)
        shown.progress("sce", "training convnet, expected: 8 min of training, at most 2.0 h of attacks", 1, 30)
    assert capsys.readouterr().err.count("at most 2.0 h of attacks") == 1


def test_the_expected_time_is_measured_and_short_work_is_not_announced(monkeypatch):
    """The steps that are timed are the job's own: an attack of many steps in training takes many times longer."""
    from holdfast import models
    from holdfast.experiments import expected
    from holdfast.experiments.config import Comparison

    plain, attacked = "sce+mlp:width=64", "sce+mlp:width=64+adversarial:steps=20"
    comparison = Comparison("moons", (plain, attacked), threat="linf:0.1", suite="quick", limit=50, seeds=2).checked()
    jobs = comparison.jobs("nowhere")
    split = jobs[0].cut.load("moons")
    model = models.build("mlp", split.shape, 2)
    weights = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    first, second = (expected.expected_of(job, split, model) for job in jobs[:2])
    assert second.training > 3 * first.training > 0
    assert first.attacks > 0
    assert expected.expected_of(jobs[0], split, model, evaluated=False).attacks == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert model.training
    fixed = {id(job): expected.Expected(1000.0 if job.loss.objective else 10.0, 600.0) for job in jobs}
    asked = []
    monkeypatch.setattr(expected, "expected_of", lambda job, split: asked.append(job) or fixed[id(job)])
    words = expected.expected_of_all(jobs, split, 2)
    assert words == "expected: 17 min of training, at most 20 min of attacks; 4 networks, 2 at a time"
    assert len(asked) == 2  # one of each kind
    assert not list(Path().glob("nowhere*"))


def test_a_training_that_cannot_be_timed_is_estimated_and_fails_where_it_runs(monkeypatch):
    """A measurement of ours ends no job: a loss that is not finite at the full eps may be so before."""
    from holdfast.errors import UserError
    from holdfast.experiments import expected
    from holdfast.experiments.config import Comparison

    def refuse(*arguments, **settings):
        raise UserError("the loss of sample 3 is not finite")

    monkeypatch.setattr(expected, "fit", refuse)
    job = Comparison("moons", ("sce+mlp",), suite="quick", limit=50).checked().jobs("nowhere")[0]
    assert expected.expected_of(job, job.cut.load("moons")).training > 0


def test_a_log_says_how_long_the_other_networks_will_take(capsys, monkeypatch):
    """Networks that were found done say nothing about the time."""
    now = [1000.0]
    monkeypatch.setattr("holdfast.cli.display.time.monotonic", lambda: now[0])
    with Display(networks=4) as shown:
        shown.progress("a", NETWORK_DONE, 1, 4)
        shown.progress("all networks", "expected: 8 min of training; 3 networks, 1 at a time", 0, 3)
        now[0] += 600
        shown.progress("b", NETWORK_DONE, 2, 4)
        now[0] += 600
        shown.progress("c", NETWORK_DONE, 3, 4)
        shown.progress("d", NETWORK_DONE, 4, 4)
    assert capsys.readouterr().err.splitlines() == [
        "network 1 of 4 done: a",
        "all networks · expected: 8 min of training; 3 networks, 1 at a time",
        "network 2 of 4 done: b, about 20 min left",
        "network 3 of 4 done: c, about 10 min left",
        "network 4 of 4 done: d",
    ]


@pytest.mark.parametrize(("module", "name"), [("holdfast.replay", "replay"), ("holdfast.cli.app", "check_arguments")])
def test_ctrl_c_in_any_command_ends_with_130(module, name, holdfast_, monkeypatch):
    """Also in those without progress, and before one begins."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(module), name, stop)
    status, _, err = holdfast_("replay", "nowhere")
    assert status == 130
    assert "Traceback" not in err


def test_ctrl_c_elsewhere_ends_with_130(capsys):
    with pytest.raises(SystemExit, match="130"), Display(quiet=True):
        raise KeyboardInterrupt
    assert "rerun the same command to resume" in capsys.readouterr().err


def test_a_spinner_turns_on_a_terminal_alone():
    code = (
        "from holdfast.cli.display import working\nwith working('drawing'): print('x')\nwith working('q', True): pass"
    )
    assert real([sys.executable, "-c", code], FORCE_COLOR="1") == "x\n"
    assert "drawing" in real([sys.executable, "-c", code], terminal=True)
    assert "drawing" not in real([sys.executable, "-c", code], terminal=True, TERM="dumb")


def test_a_notebook_without_ipython_has_a_log(clock, monkeypatch):
    monkeypatch.setattr(display.errors, "is_jupyter", True)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    assert Display().cell is None


# JSON, quiet, help.


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_and_quiet_and_tells_its_exit_statuses(name, holdfast_):
    assert {"quiet", "as_json"} <= set(inspect.signature(COMMANDS[name].callback).parameters)
    _, out, _ = holdfast_(name, "--help")
    assert re.search(r"Exit status: 0 success[;,] .*2\s+invalid\s+request", out, re.S)
    assert ("1 a check fails" in out) == (name == "replay")
    assert ("1 a result is outside" in out) == (name == "recipe")


def test_what_others_print_does_not_reach_the_json():
    """Not a user's model, not a C library, not a worker process."""
    code = (
        "import os, subprocess, sys\nfrom holdfast.cli.display import aside\n"
        "with aside(True):\n"
        "    print('python'); os.write(1, b'descriptor\\n'); subprocess.run(['echo', 'process'])\n"
        "print('{}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{}\n"
    assert sorted(done.stderr.split()) == ["descriptor", "process", "python"]
    plain = subprocess.run([sys.executable, "-c", code.replace("True", "False")], capture_output=True, text=True)
    assert "python" in plain.stdout


def test_recipes_and_lists_as_json_and_names_alone(holdfast_):
    status, out, err = holdfast_("recipe", "--json")
    assert (status, err) == (0, "")
    assert {"name", "about", "cost"} == set(json.loads(out)[0])
    assert holdfast_("recipe", "-q")[1].split() == [one["name"] for one in json.loads(out)]
    names = holdfast_("list", "-q")[1]
    assert re.search(r"^losses\n  sce\n", names)
    status, out, err = holdfast_("list", "--json", "-q")
    assert (status, err) == (0, "")
    assert "sce" in json.loads(out)["losses"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, made by the command; and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    words = "train --epochs 1 --limit-train 100 --model mlp:width=8 --device cpu --out run --json"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["holdfast", *words.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return folder / "run", (stop.value.code or 0, out.getvalue(), err.getvalue())


def test_train_answers_in_json(trained):
    folder, (status, out, err) = trained
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["run"] == "run"
    assert answer["loss"] == "sce"
    assert 0 <= answer["accuracy"] <= 1
    assert answer["epochs"] == 1
    assert (folder / "model.safetensors").is_file()


def test_curves_answer_in_json_and_say_what_they_replace(trained, holdfast_):
    folder, _ = trained
    status, out, err = holdfast_("curves", folder, "--out", "drawn", "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["files"] == ["drawn/curves.svg", "drawn/curves.png", "drawn/curves.pdf"]
    assert answer["replaced"] == []
    assert len(answer["curves"][0]["history"]) == 1
    status, out, err = holdfast_("curves", folder, "--out", "drawn", "-q")
    assert (status, err, len(out.splitlines())) == (0, "", 1)
    Path("drawn/curves.svg").write_text("mine")
    assert "replaced drawn/curves.svg\ndrawn/curves.png\n" in holdfast_("curves", folder, "--out", "drawn")[1]


def test_your_own_model_may_print(holdfast_, tmp_path):
    """Its words go to stderr, the JSON document stands alone."""
    (tmp_path / "mymodel.py").write_text(
        "from torch import nn\nprint('loading')\n"
        "def build():\n    print('building')\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    words = ("evaluate", "mymodel.py:build", "--data", "digits", "--suite", "quick", "--limit", "10", "--device", "cpu")
    status, out, err = holdfast_(*words, "--input-range", "0,255", "--json", "--out", "out")
    assert status == 0
    assert json.loads(out)["schema"] == results.SCHEMA
    assert json.loads(Path("out/config.json").read_text())["model_file"]["input_range"] == [0, 255]
    assert "loading" in err
    assert "building" in err


def test_holdfast_alone_is_a_start(holdfast_):
    status, out, err = holdfast_()
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    shown = [shlex.split(line)[1:] for line in re.findall(r"^  (holdfast .*?)(?:   .*)?$", out, re.M)]
    assert {words[0] for words in shown} == set(COMMANDS), "a way to each command"
    known = typer.main.get_command(cli.app)
    for name, *words in shown:
        with known.commands[name].make_context(name, words):  # as it stands there, it is understood
            pass


def test_the_first_page_of_help_begins_with_the_main_job(holdfast_):
    _, out, _ = holdfast_("--help")
    assert out.index("The main job") < out.index("Step by step") < out.index("Look")


# Notebooks.


class Page(html.parser.HTMLParser):
    """Tags must close in order; text and attributes are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.styles, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)
        self.styles += [value for name, value in attrs if name == "style"]
        assert {name for name, _ in attrs} <= {"style", "colspan"}, "nothing is fetched, nothing runs"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_result_in_a_notebook():
    loss = "<script>alert(1)</script>&x"
    page = Page(results.notebook(make_results([*make_results().runs, make_run(loss, status="void")])))
    assert "script" not in page.tags
    assert page.text.count(loss) == 1
    for cell in ("isce:s=100", "19.5 [14.2, 25.7]", "<= 41.0 [34.1, 48.2]", "loose", "void"):
        assert cell in page.text
    assert any("gradients vanish on 61% of samples" in text for text in page.text), "what is in doubt, and why"
    assert any("digits, 200 samples, linf 0.1" in text for text in page.text)


def test_results_and_evaluations_show_themselves():
    shown = make_results()
    assert shown._repr_html_() == results.notebook(shown)
    column = torch.tensor([True, False, True, True])
    nothing = torch.zeros(4)
    found = Evaluation(
        Threat("linf", 0.1), nothing, nothing, nothing, nothing, clean=column, attack_correct={"pgd50": column},
        broken_by=torch.tensor([-1, -2, 0, 0]), margin_adv=nothing, prediction_adv=nothing, x_adv=nothing, stages=(),
    )  # fmt: skip
    text = " ".join(Page(found._repr_html_()).text)
    assert "75.0" in text  # clean
    assert "25.0" in text  # robust
    assert "No verdict yet" in text


def test_a_notebook_keeps_its_own_colours():
    """A dark theme stays readable: no colour of the text, none behind it."""
    for style in Page(results.notebook(make_results())).styles:
        assert not re.search(r"(?<!border-)color:|background", style)


def test_several_threats_are_parts_in_a_notebook():
    two = [make_run(), make_run(threat={**THREAT, "eps": 0.2})]
    page = Page(results.notebook(make_results(two)))
    assert [text for text in page.text if text.startswith("linf")] == ["linf 0.1", "linf 0.2"]
    assert page.text.count("sce") == 2


def test_an_empty_result_in_a_notebook():
    assert Page(results.notebook(dataclasses.replace(make_results(), runs=()))).text == ["No runs."]


def test_counts_in_a_notebook():
    """What an Evaluation needs to show itself."""
    stages = make_run().stages
    page = Page(results.notebook_counts("linf <0.1>", 200, {"clean": 194, "robust": 60, "own": None}, stages, "a note"))
    assert page.text[:6] == ["accuracy", "%", "95%", "clean", "97.0", "[93.6, 98.9]"]
    assert "30.0" in page.text
    assert "own" not in page.text
    assert "linf <0.1>, 200 samples; Clopper-Pearson intervals" in page.text
    assert stages[0].name in page.text
    assert page.text[-1] == "a note"
    assert Page(results.notebook_counts("none", 0, {"clean": 0})).text[-1].startswith("none, 0 samples")


# Report.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of results: a and b of the same data, other of another set, like of one with the same name."""
    folder = tmp_path_factory.mktemp("saved")
    small = {"n": 40, "examples": ()}
    some = make_results([make_run("sce", **small), make_run("isce:s=3", **small)])
    more = make_results([make_run("mmc", **small), *some.runs[:1]])
    results.save(some, folder / "a")
    results.save(more, folder / "b")
    results.save(dataclasses.replace(some, data={**some.data, "name": "mnist"}), folder / "other")
    results.save(dataclasses.replace(some, data={**some.data, "fingerprint": "77aa"}), folder / "like")
    return folder


@pytest.fixture
def folders(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_different_data_are_told_apart(folders, holdfast_):
    status, out, err = holdfast_("report", "a", "other", "b/results.json", "--out", "page.html")
    assert status == 0
    lines = out.splitlines()
    assert lines == [
        "2 parts, one for each data set; rows of different parts are not compared:",
        "  1. digits: 3 rows, from a, b/results.json",
        "  2. mnist: 2 rows, from other",
        "page.html",
    ]
    assert err == "b/results.json: 1 of 2 runs are in a too, and count once.\n"
    page = (folders / "page.html").read_text()
    assert "digits" in page
    assert "mnist" in page


def test_data_of_one_name_are_told_apart_by_more(folders, holdfast_):
    _, out, _ = holdfast_("report", "a", "like", "--out", "page.html")
    assert "  1. digits (9f2c41d0): 2 rows, from a\n  2. digits (77aa): 2 rows, from like\n" in out


@pytest.mark.parametrize("again", ["a", "a/results.json", "./a", "link"])
def test_the_same_file_twice_is_said(again, folders, holdfast_):
    (folders / "link").symlink_to("a")
    status, out, err = holdfast_("report", "a", again, "--out", "page.html")
    assert (status, out) == (0, "page.html\n")
    assert err == f"{Path(again)} was given twice: its runs count once.\n"


def test_report_answers_in_json(folders, holdfast_):
    Path("fig").mkdir()
    status, out, err = holdfast_("report", "a", "other", "a", "--json", "--out", "new", "--figures", "fig")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["page"] == "new/report.html"
    assert answer["replaced"] == []
    assert all(Path(file).is_file() for file in answer["files"])
    assert any(file.startswith("fig/") and file.endswith(".svg") for file in answer["files"])
    assert [part["data"] for part in answer["parts"]] == ["digits", "mnist"]
    assert answer["repeated"] == ["a was given twice: its runs count once."]


def test_what_is_replaced_is_said_and_what_is_the_same_is_not(folders, holdfast_):
    assert holdfast_("report", "a")[1] == "a/report.html\n"
    assert holdfast_("report", "a")[1] == "a/report.html\n", "made from these very results"
    assert holdfast_("report", "a", "b", "-q") == (
        0, "a/report.html\n", "b: 1 of 2 runs are in a too, and count once.\nreplaced a/report.html\n",
    )  # fmt: skip
    assert holdfast_("report", "a")[1] == "replaced a/report.html\n"
    Path("a/report.html").write_text("my own page")
    assert json.loads(holdfast_("report", "a", "--json")[1])["replaced"] == ["a/report.html"]


def test_a_page_made_at_another_time_by_other_words_tells_the_same(folders, holdfast_):
    holdfast_("report", "a")
    found = results.load("a")
    results.save(dataclasses.replace(found, created="2027-05-06T07:08:09+00:00", command="holdfast compare -q"), "a")
    assert holdfast_("report", "a")[1] == "a/report.html\n"
    assert "2027-05-06" in Path("a/report.html").read_text(), "and is renewed"


def test_figures_that_are_replaced_are_said(folders, holdfast_):
    words = ("report", "a", "--out", "page.html", "--figures", "fig")
    first = holdfast_(*words)[1].splitlines()
    assert first[0] == "page.html"
    assert len(first) > 2
    assert all(Path(line).is_file() for line in first)
    assert holdfast_(*words)[1].splitlines() == first
    Path("fig/accuracy.svg").write_text("mine")
    _, out, _ = holdfast_(*words)
    assert [line for line in out.splitlines() if line.startswith("replaced")] == ["replaced fig/accuracy.svg"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "gone"), r"could not read gone: No such file.*Give a results\.json or the folder"),
        (("report", "empty"), r"could not read empty/results\.json: No such file"),
        (("report", "a", "cut"), r"cut/results\.json is not readable JSON"),
        (("report", "newer"), r"written by a newer holdfast: schema 99.*Upgrade"),
        (("report", "list.json"), r"list\.json is not a holdfast results file"),
        (("report", "none"), r"there are no runs to report"),
        (("report", "a", "--out", "file/page.html"), r"could not write to file: file is a file, not a folder.*--out"),
        (("report", "a", "--out", "file/deep/new"), r"could not write to file/deep/new: file is a file.*--out"),
        (("report", "a", "--figures", "file"), r"could not write to file: file is a file.*another with --figures"),
        (("report", "a", "--out", "/proc/holdfast/x.html"), r"could not write .*/proc/holdfast.*--out"),
        (("report", "a", "--out", "a/results.json"), r"the page is HTML: .*\.html.*not a/results\.json"),
        (("report", "a", "--out", "page.pdf"), r"the page is HTML"),
        (("curves", "a"), r"a is neither a run folder nor the output of a comparison"),
        (("compare", "--out", "file/out"), r"could not write to file/out: file is a file.*--out"),
        (("train", "--out", "file"), r"could not write to file: file is a file.*--out"),
    ],
)
def test_a_refusal_says_what_why_and_what_to_do_and_writes_nothing(words, message, folders, holdfast_):
    (folders / "file").write_text("in the way")
    (folders / "empty").mkdir()
    whole = (folders / "a" / "results.json").read_text()
    for name, text in {
        "cut": whole[:500],
        "newer": whole.replace(f'"schema": {results.SCHEMA}', '"schema": 99'),
        "none": '{"schema": 4, "runs": [], "data": {}}',
    }.items():
        (folders / name).mkdir()
        (folders / name / "results.json").write_text(text)
    (folders / "list.json").write_text("[1]")
    before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    assert re.search(message, refused(holdfast_(*words)))
    assert {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()} == before


def test_a_folder_without_permission_is_refused(folders, holdfast_, monkeypatch):
    access = os.access  # root may write everywhere
    monkeypatch.setattr(output_files.os, "access", lambda path, mode: mode != os.W_OK | os.X_OK and access(path, mode))
    line = refused(holdfast_("report", "a", "--out", "a/new/page.html"))
    assert "could not write to a/new: no permission to write in a. Name another with --out." in line


def test_a_figure_that_cannot_be_drawn_leaves_the_others_as_they_were(folders):
    def draw(stage):
        (stage / "one.svg").write_text("new")
        raise OSError("no more")

    (folders / "one.svg").write_text("old")
    with pytest.raises(OSError, match="no more"):
        output_files.write_files(draw, folders)
    assert (folders / "one.svg").read_text() == "old"


def test_a_folder_in_the_place_of_a_file_is_refused(folders, holdfast_):
    (folders / "fig" / "accuracy.svg").mkdir(parents=True)
    line = refused(holdfast_("report", "a", "--out", "page.html", "--figures", "fig"))
    assert re.search(r"could not write fig/accuracy\.svg: Is a directory\..*--figures", line)


@pytest.mark.parametrize("words", [(), ("report", "a", "--json", "--out", "page.html")], ids=["start", "json"])
def test_a_closed_pipe_is_no_crash(words, folders):
    """As `holdfast ... | head -1` leaves it."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*HOLDFAST, *words], stdout=writer, stderr=subprocess.PIPE, timeout=60, cwd=folders)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_note_is_printed_once_and_other_warnings_as_they_are(monkeypatch, capsys):
    """Filters that change between two warnings make Python forget that it has shown the first."""
    app_module = importlib.import_module("holdfast.cli.app")  # the package has the app itself under that name
    monkeypatch.setattr(app_module, "errors", display.console(stderr=True))
    others = []
    note = app_module._notes(lambda *what, **stream: others.append(what))
    for text in ("one", "one", "two"):
        note(DataWarning(text), DataWarning, "file.py", 1)
    note(UserWarning("theirs"), UserWarning, "file.py", 1)
    assert capsys.readouterr().err.splitlines() == ["note: one", "note: two"]
    assert len(others) == 1


@pytest.mark.parametrize(
    ("terminal", "lines"), [(True, ["the last word is", "whole"]), (False, ["the last word is whole"])]
)
def test_a_sentence_is_broken_between_words_on_a_terminal_alone(terminal, lines):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    display.PlainConsole(file=stream, width=18).sentence("the last word is whole")
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == lines


def test_a_list_of_one_kind(holdfast_):
    status, out, _ = holdfast_("list", "heads", "models", "-q")
    assert (status, [line for line in out.splitlines() if not line.startswith(" ")]) == (0, ["heads", "models"])
    assert json.loads(holdfast_("list", "heads", "--json")[1]).keys() == {"heads"}
    assert "Did you mean 'heads'?" in refused(holdfast_("list", "head"))


def test_a_report_under_names_of_the_users(holdfast_, tmp_path):
    results.save(make_results([make_run("sce"), make_run("isce:s=10"), make_run("mmc")]), tmp_path)
    asked = (
        "report",
        tmp_path,
        "--latex",
        tmp_path / "t.tex",
        "--title",
        "Worth",
        "--label",
        "isce:s=10=I-SCE, s = 10",
    )
    status, _, err = holdfast_(*map(str, asked), "--baseline", "isce:s=10", "--require", "isce:s=10: robust>=0.01")
    assert status == 0, err
    assert "<h1>Worth</h1>" in (tmp_path / "report.html").read_text()
    table = (tmp_path / "t.tex").read_text()
    assert "I-SCE, s = 10 & " in table
    assert "difference in robust accuracy to I-SCE, s = 10" in table
    assert "isce" not in table
    assert "unknown row 'scr'" in refused(holdfast_("report", str(tmp_path), "--label", "scr=x"))
