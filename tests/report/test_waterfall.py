"""holdfast explain: the waterfall counts what the stages broke, says so, and draws it."""

import copy
import dataclasses
import io
import json

import pytest
from rich.console import Console
from tests.faults.faulty_models import LIARS
from typer.testing import CliRunner

from holdfast import data, models
from holdfast.cli import app
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import PGD50, SUITES
from holdfast.experiments.collect import NetworkResult, collect
from holdfast.losses import sce
from holdfast.objectives import standard
from holdfast.report import waterfall
from holdfast.results import Verdict
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit


@pytest.fixture(scope="module")
def split():
    return data.load("digits")


@pytest.fixture(scope="module")
def honest(split):
    model = models.build("smallconv", split.shape, 10)
    fit(model, split.train, split.val, standard(sce), FitConfig(epochs=8, batch_size=64, lr=3e-3), device="cpu")
    return model.eval()


def explained(model, split, folder):
    """The run of an evaluation with the suite "explain", on 60 samples."""
    some = split.test.take(slice(0, 60))
    found = evaluate(model, some, Threat("linf", 0.1), "explain")
    trained = {"accuracy": 1.0, "val": 1.0, "seconds": 0.0}
    few = type(split)(split.name, split.train, split.val, some, split.classes, split.fingerprint)
    results = collect([NetworkResult("sce", 0, folder, found, trained, few, {})], folder, "digits", {}, "")
    return results.runs[0], found


@pytest.fixture(scope="module")
def liar(honest, split, tmp_path_factory):
    return explained(LIARS["logit_scale"].make(copy.deepcopy(honest), 1e4), split, tmp_path_factory.mktemp("liar"))


def test_each_step_is_one_change_and_none_gives_samples_back(liar):
    run, found = liar
    steps = waterfall.steps(run)
    assert [step.name for step in steps] == ["clean", "pgd50", *(stage.name for stage in SUITES["explain"])]
    assert {step.name for step in steps} <= set(waterfall.CHANGES)
    stands = [step.stands for step in steps]
    assert stands == sorted(stands, reverse=True)
    assert stands[0] == int(found.clean.sum())
    assert stands[1] == int(found.pgd50.sum())
    assert stands[-1] == int(found.robust.sum())


def test_stable_arithmetic_takes_the_illusion_away(liar):
    points = {step.name: step.accuracy for step in waterfall.steps(liar[0])}
    assert points["pgd50"] > 0.9
    assert points["stable arithmetic"] < points["pgd50"] - 0.2
    assert points["stable arithmetic"] - points["black box"] < 0.1
    assert "'stable arithmetic' took the most" in waterfall.sentence(liar[0])
    assert "upper bound" not in waterfall.sentence(liar[0])


def test_until_starts_are_what_changes_the_start_is_the_published_one(honest, split):
    """From the same start the worst iterate breaks all that the last one does."""
    some = split.test.take(slice(0, 60))
    broken = {}
    for stage in SUITES["explain"][:2]:
        found = evaluate(
            honest, some, Threat("linf", 0.1), (dataclasses.replace(stage, name="again", individual=True),)
        )
        broken[stage.name] = found.clean & ~found.attack_correct["again"]
    assert not bool((broken["stable arithmetic"] & ~broken["best iterate"]).any())
    assert [stage.name for stage in SUITES["explain"] if stage.noise_stream is None] == [
        "restarts", "other scores", "black box",
    ]  # fmt: skip


def test_a_stage_of_the_published_stream_is_the_published_attack_again(honest, split):
    """The same steps on the same score from the same start break nothing that "pgd50" did not break."""
    some = split.test.take(slice(0, 60))
    again = dataclasses.replace(PGD50, name="again", individual=False, noise_stream=0)
    found = evaluate(honest, some, Threat("linf", 0.1), (again,))
    assert found.stages[2].attacked == int(found.pgd50.sum()) > 0
    assert found.stages[2].broken == 0


def test_the_accuracy_under_its_own_loss_is_told_beside(liar):
    run, found = liar
    assert run.own.value == found.attack_correct["pgd50-train-loss"].sum().item() / run.n
    assert f"alone, leaves {100 * run.own.value:.1f}%" in waterfall.sentence(run)


def test_a_void_measurement_has_no_figures(liar):
    void = dataclasses.replace(liar[0], robust=None, verdict=Verdict("void", "the same image gives other logits"))
    for told in (waterfall.steps, waterfall.table, waterfall.sentence, waterfall.figure):
        with pytest.raises(UserError, match="void, so there is no figure to explain: the same image"):
            told(void)


def test_an_honest_network_loses_little(honest, split, tmp_path):
    run, _ = explained(honest, split, tmp_path)
    points = {step.name: step.accuracy for step in waterfall.steps(run)}
    assert points["pgd50"] - points["black box"] <= 0.1


def test_the_table_fits_a_terminal(liar):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(waterfall.table(liar[0]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "stable arithmetic" in text


def test_the_figure_shows_every_step_with_its_number(liar, tmp_path):
    paths = waterfall.save(liar[0], tmp_path)
    assert [path.name for path in paths] == ["waterfall.svg", "waterfall.png"]
    svg = paths[0].read_text()
    for step in waterfall.steps(liar[0]):
        assert step.name in svg
        assert f"{100 * step.accuracy:.1f}" in svg
    texts = [text for text in waterfall.figure(liar[0]).axes[0].texts if text.get_text()]
    assert len(texts) == 3 * len(waterfall.steps(liar[0]))


def test_a_run_without_samples_cannot_be_explained(liar):
    with pytest.raises(UserError, match="nothing to explain"):
        waterfall.steps(dataclasses.replace(liar[0], samples=None))


def test_the_command_line_explains_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    made = run(app, ["train", "-o", "run", "--loss", "isce:s=100", "--epochs", "2", "--device", "cpu", "--quiet"])
    assert made.exit_code == 0, made.output
    told = run(app, ["explain", "run", "--limit", "20", "--device", "cpu", "--quiet", "--json"])
    assert told.exit_code == 0, told.output
    steps = json.loads(told.stdout)
    assert [step["name"] for step in steps][:3] == ["clean", "pgd50", "stable arithmetic"]
    folder = tmp_path / "run" / "explain-linf0.1"
    assert {"waterfall.svg", "waterfall.png", "report.html", "results.json"} <= {path.name for path in folder.iterdir()}
    missing = run(app, ["explain", "nowhere", "--device", "cpu"])
    assert isinstance(missing.exception, UserError)
    unread = run(app, ["explain", "run", "--threat", "nonsense", "--device", "cpu"])
    assert isinstance(unread.exception, UserError)
    assert not (tmp_path / "run" / "explain-nonsense").exists()
    for wrong in (["--limit", "-1"], ["--suite", "nonsense"]):
        refused = run(app, ["evaluate", "run", "--device", "cpu", *wrong, "--out", "never"])
        assert isinstance(refused.exception, UserError), wrong
        assert not (tmp_path / "never").exists()
