"""report.waterfall and `holdfast explain`: accuracy after each change of the attack, as steps, table and figure."""

import copy
import dataclasses
import io
import json
import re

import pytest
from rich.console import Console
from tests.faults.faulty_models import FAULTY
from tests.helpers import unaudited
from typer.testing import CliRunner

from holdfast import data, run_folder
from holdfast.cli import app
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import PGD50, SUITES
from holdfast.experiments import loss_spec
from holdfast.experiments.collect import TrainedNetwork, collect
from holdfast.experiments.config import DataCut
from holdfast.experiments.training import TrainSummary
from holdfast.report import waterfall
from holdfast.results import Verdict, heading
from holdfast.threat import Threat


@pytest.fixture(scope="module")
def split():
    return data.load("digits")


@pytest.fixture(scope="module")
def honest(trained_runs):
    return run_folder.load(trained_runs("sce"))[0]


def explained(model, split, folder):
    """The run of an evaluation with the suite "explain", on 60 samples."""
    some = split.test.take(slice(0, 60))
    found = evaluate(model, some, Threat("linf", 0.1), "explain")
    trained = TrainSummary(accuracy=1.0, val=1.0)
    few = type(split)(split.name, split.train, split.val, some, split.classes, split.fingerprint)
    network = TrainedNetwork(loss_spec.parse("sce"), 0, folder, trained, few, DataCut(), unaudited(found))
    results = collect([network], folder, "digits", {}, "")
    return results.runs[0], found


@pytest.fixture(scope="module")
def faulty(honest, split, tmp_path_factory):
    return explained(FAULTY["logit_scale"].make(copy.deepcopy(honest), 1e4), split, tmp_path_factory.mktemp("faulty"))


def test_each_step_is_one_change_and_none_gives_samples_back(faulty):
    run, evaluation = faulty
    steps = waterfall.steps(run)
    assert [step.name for step in steps] == ["clean", "pgd50", *(stage.name for stage in SUITES["explain"])]
    assert {step.name for step in steps} <= set(waterfall.CHANGES)
    correct = [step.correct for step in steps]
    assert correct == sorted(correct, reverse=True)
    assert correct[0] == int(evaluation.clean.sum())
    assert correct[1] == int(evaluation.pgd50.sum())
    assert correct[-1] == int(evaluation.robust.sum())


def test_stable_arithmetic_lowers_the_inflated_pgd50_accuracy(faulty):
    points = {step.name: step.accuracy for step in waterfall.steps(faulty[0])}
    assert points["pgd50"] > 0.9
    assert points["stable arithmetic"] < points["pgd50"] - 0.2
    assert points["stable arithmetic"] - points["black box"] < 0.1
    assert re.search(r"The largest drop, [\d.]+ points, comes from 'stable arithmetic'", waterfall.sentence(faulty[0]))
    assert "upper bound" not in waterfall.sentence(faulty[0])


def test_stages_before_restarts_start_where_pgd50_does(honest, split):
    """From the same start the most adversarial iterate breaks every sample that the last one does."""
    some = split.test.take(slice(0, 60))
    broken = {}
    for stage in SUITES["explain"][:2]:
        alone = dataclasses.replace(stage, name="alone", individual=True)
        evaluation = evaluate(honest, some, Threat("linf", 0.1), (alone,))
        broken[stage.name] = evaluation.clean & ~evaluation.attack_correct["alone"]
    assert not bool((broken["stable arithmetic"] & ~broken["best iterate"]).any())
    assert [stage.name for stage in SUITES["explain"] if stage.noise_stream is None] == [
        "restarts", "other scores", "black box",
    ]  # fmt: skip


def test_a_stage_with_the_noise_of_pgd50_repeats_it(honest, split):
    """The same steps on the same score from the same start break nothing that "pgd50" did not break."""
    some = split.test.take(slice(0, 60))
    again = dataclasses.replace(PGD50, name="again", individual=False, noise_stream=0)
    evaluation = evaluate(honest, some, Threat("linf", 0.1), (again,))
    assert evaluation.stages[2].attacked == int(evaluation.pgd50.sum()) > 0
    assert evaluation.stages[2].broken == 0


def test_the_sentence_reports_pgd50_on_the_training_loss(faulty):
    run, _ = faulty
    trained = run.attacks["pgd50-train-loss"].value
    assert f"On its own, PGD-50 on the training loss leaves {100 * trained:.1f}%." in waterfall.sentence(run)


def test_a_void_measurement_has_no_figures(faulty):
    void = dataclasses.replace(faulty[0], robust=None, verdict=Verdict("void", "the same image gives other logits"))
    for show in (waterfall.steps, waterfall.table, waterfall.sentence, waterfall.figure):
        with pytest.raises(UserError, match="void, so there is nothing to explain: the same image"):
            show(void)


def test_an_honest_network_loses_little(honest, split, tmp_path):
    run, _ = explained(honest, split, tmp_path)
    points = {step.name: step.accuracy for step in waterfall.steps(run)}
    assert points["pgd50"] - points["black box"] <= 0.1


def test_the_table_fits_a_terminal(faulty):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(waterfall.table(faulty[0]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "stable arithmetic" in text


def test_the_figure_shows_every_step_with_its_number(faulty, tmp_path):
    paths = waterfall.save(faulty[0], tmp_path)
    assert [path.name for path in paths] == ["waterfall.svg", "waterfall.png", "waterfall.pdf"]
    svg = paths[0].read_text()
    for step in waterfall.steps(faulty[0]):
        assert heading(step.name) in svg
        assert f"{100 * step.accuracy:.1f}" in svg
    texts = [text for text in waterfall.figure(faulty[0]).axes[0].texts if text.get_text()]
    assert len(texts) == 3 * len(waterfall.steps(faulty[0]))


def test_a_run_without_samples_cannot_be_explained(faulty):
    with pytest.raises(UserError, match="nothing to explain"):
        waterfall.steps(dataclasses.replace(faulty[0], samples=None))


def test_the_command_line_explains_a_run(copied_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copied_run("isce")
    run = CliRunner().invoke
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
