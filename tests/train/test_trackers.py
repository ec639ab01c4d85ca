"""Trackers: they get every figure of the log and of the evaluation, and never stop the training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers import shorten_audits

from holdfast import results
from holdfast.data import load
from holdfast.errors import UserError
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.experiments.compare import Comparison, compare
from holdfast.models import build
from holdfast.objectives import standard
from holdfast.train import FitConfig, fit, trackers
from holdfast.train.trackers import TrackerWarning

TINY = FitConfig(epochs=3, batch_size=50, checkpoint_seconds=0)
# Each fake writes what it is told to sent.jsonl in the working folder.
SENT = """
import json, os
def sent(what, *more):
    if what in os.environ.get("FAIL", "").split(","):
        raise ConnectionError(f"no server for {what}.\\nTraceback")
    with open("sent.jsonl", "a") as file:
        file.write(json.dumps([what, *more]) + "\\n")
"""
WANDB = (
    SENT
    + """
class Run:
    def log(self, values, step=None): sent("log", values, step)
    def finish(self): sent("finish")
class config:
    def update(values, allow_val_change): sent("config", values)
def init(project, name, dir=None):
    sent("init", project, name)
    return Run()
"""
)
MLFLOW = (
    SENT
    + """
class utils:
    class validation:
        MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 500, 100
def search_experiments(filter_string): return []
def create_experiment(name, artifact_location, tags): return 1
def start_run(run_name, **more): sent("init", run_name)
def log_params(values): sent("config", values)
def log_metrics(values, step): sent("log", values, step)
def end_run(): sent("finish")
"""
)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Installs a fake tracker; returns what reads what it was sent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 3}),))

    def install(name="wandb", code=WANDB):
        site = tmp_path / "site"
        (site / f"{name}-9.9.dist-info").mkdir(parents=True)
        (site / f"{name}-9.9.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
        (site / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return lambda: [json.loads(line) for line in Path("sent.jsonl").read_text().splitlines()]

    yield install
    for name in ("wandb", "mlflow"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def split():
    return load("digits", limit_train=100)


def fit_digits(split, out=None, **more):
    model = build("smallconv", split.shape, 10)
    return fit(model, split.train, split.val, standard("sce"), TINY, out=out, device="cpu", **more)


def log_of(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def numbers(line):
    return {name: value for name, value in line.items() if name != "epoch" and value is not None}


def test_every_line_of_the_log_is_sent(fake, split):
    sent = fake()
    fit_digits(split, "run", track="wandb")
    (_, project, name), (_, config), *logged, (last,) = sent()
    assert (project, name, last) == ("holdfast", "run", "finish")
    assert config["fit.lr"] == TINY.lr
    assert logged == [["log", numbers(line), line["epoch"]] for line in log_of("run")]
    assert len(logged) == 3


def test_a_resumed_run_is_whole_in_its_tracker(fake, split):
    sent = fake()

    def stop(what, done, total):
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit_digits(split, "run", track="wandb", progress=stop)
    Path("sent.jsonl").unlink()
    fit_digits(split, "run", track=["wandb"])
    assert [one[2] for one in sent() if one[0] == "log"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'. Did you mean 'tensorboard'"),
        ("mlflow", "the tracker mlflow is not installed: pip install mlflow"),
        (["wandb", "mlflow"], "pip install"),
    ],
)
def test_what_cannot_be_tracked_is_refused_before_the_work(track, message, split, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "TRACKERS", dict.fromkeys(trackers.TRACKERS, lambda: False))
    with pytest.raises(UserError, match=message):
        fit_digits(split, tmp_path / "run", track=track)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=message):
        compare(Comparison(losses=("sce",)), tmp_path / "out", track=track)
    assert not (tmp_path / "out").exists()


def test_tensorboard_needs_a_folder(split, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda: True)
    with pytest.raises(UserError, match="give fit a folder"):
        fit_digits(split, track="tensorboard")


def test_a_tracker_that_cannot_start_is_one_sentence(fake, split, monkeypatch):
    fake()
    monkeypatch.setenv("FAIL", "init")
    with pytest.raises(UserError, match=r"wandb could not start \(ConnectionError: no server for init\): set it up"):
        fit_digits(split, "run", track="wandb")


@pytest.mark.parametrize("what", ["log", "finish"])
def test_a_tracker_that_fails_costs_no_training(what, fake, split, monkeypatch):
    fake()
    monkeypatch.setenv("FAIL", what)
    with pytest.warns(TrackerWarning, match="no server") as warned:
        fitted = fit_digits(split, "run", track="wandb")
    assert len(warned) == 1
    assert len(fitted.history) == 3


def test_compare_sends_each_network_and_its_evaluation(fake, monkeypatch):
    sent = fake()
    shorten_audits(monkeypatch)
    fit_config = FitConfig(epochs=2, batch_size=50)
    comparison = Comparison(losses=("sce",), threat="linf:0.01,linf:0.3", suite="tiny", folds=1, limit=20,
                            limit_train=100, fit=fit_config)  # fmt: skip
    found = compare(comparison, "out", track="wandb")
    said = sent()
    assert said[0] == ["init", "holdfast", "sce-seed0-fold0"]
    assert said[-1] == ["finish"]
    logged = [(values, step) for what, *rest in said if what == "log" for values, step in [rest]]
    assert [step for _, step in logged] == [1, 2, 2, 2, 2]
    assert "trained/accuracy" in logged[2][0]
    for run, (values, _) in zip(found.runs, logged[3:], strict=True):
        name = f"linf{run.threat['eps']:g}"
        for figure in ("clean", "pgd50", "robust", "certified"):
            share = run.pgd50 if figure == "pgd50" else getattr(run, figure)
            assert values[f"{name}/{figure}"] == share.value
        assert values[f"{name}/robust_low"] == run.robust.low
        assert (values[f"{name}/verdict"], values[f"{name}/pgd50_verdict"]) == (
            run.verdict.status, run.pgd50_verdict.status)  # fmt: skip
    Path("sent.jsonl").unlink()
    assert compare(comparison, "out", track="wandb").runs[0].robust == found.runs[0].robust
    assert not Path("sent.jsonl").exists()  # nothing was left to do
    assert results.load("out").runs == found.runs


def test_mlflow_gets_numbers_as_metrics_and_texts_as_parameters(fake):
    sent = fake("mlflow", MLFLOW)
    with trackers.tracking("mlflow", Path("run"), {"fit": {"lr": 0.1}}) as tracked:
        tracked.log({"lost": 1.0}, 1)
        tracked.open()
        tracked.log({"robust": 0.5, "certified": None, "verdict": "tight"}, 2)
    assert sent() == [
        ["init", "run"],
        ["config", {"fit.lr": 0.1}],
        ["log", {"robust": 0.5}, 2],
        ["config", {"verdict": "tight"}],
        ["finish"],
    ]


def test_train_sends_a_finished_network_too(fake, holdfast_):
    sent = fake()
    words = ("train", "--limit-train", "100", "--epochs", "2", "--device", "cpu", "--out", "run", "-q")
    assert holdfast_(*words)[0] == 0
    assert not Path("sent.jsonl").exists()
    code, _, err = holdfast_(*words, "--track", "wandb")
    assert code == 0, err
    assert [one[2] for one in sent() if one[0] == "log"] == [1, 2, 2]
    code, _, err = holdfast_(*words, "--track", "tensorbord")
    assert (code, err.count("\n"), "Did you mean 'tensorboard'" in err) == (2, 1, True)


def test_tensorboard_has_the_curve_once_after_a_resume(tmp_path):
    """In a process of its own: what TensorBoard imports warns."""
    pytest.importorskip("tensorboard", exc_type=ImportError)
    code = """
from holdfast.data import load
from holdfast.models import build
from holdfast.objectives import standard
from holdfast.train import FitConfig, fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
split = load("digits", limit_train=100)
def stop(what, done, total):
    if done == 2:
        raise InterruptedError
for progress in (stop, None):
    model = build("smallconv", split.shape, 10)
    try:
        fit(model, split.train, split.val, standard("sce"), FitConfig(epochs=3, batch_size=50, checkpoint_seconds=0),
            out="run", device="cpu", track="tensorboard", progress=progress)
    except InterruptedError:
        pass
events = EventAccumulator("run/tensorboard")
events.Reload()
print([one.step for one in events.Scalars("loss")], [round(one.value, 5) for one in events.Scalars("loss")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [round(line["loss"], 5) for line in log_of(tmp_path / "run")]
    steps, _, values = done.stdout.strip().partition("] ")
    assert steps == "[1, 2, 3"
    assert json.loads(values) == pytest.approx(losses, abs=2e-5)
