"""One network from attacks to the final answer: what evaluate_network returns, keeps, and says."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from holdfast import FitConfig, Threat, data, evaluate_network, fit, losses, models, objectives
from holdfast.errors import UserError
from holdfast.evaluation import Stage
from holdfast.experiments import pipeline
from holdfast.io import load_tensors

THREAT = Threat("linf", 0.1)
STAGES = (Stage("apgd", "apgd", settings={"steps": 4}),)


@pytest.fixture(scope="module")
def split():
    return data.load("digits", fold=(0, 5), limit=120)


@pytest.fixture(scope="module")
def model(split):
    """README's example, with fewer epochs."""
    model = models.build("smallconv", split.shape, len(split.classes))
    fit(model, split.train, split.val, objectives.standard(losses.isce), FitConfig(epochs=2, batch_size=64, lr=3e-3))
    return model.eval()


@pytest.fixture(scope="module")
def result(model, split):
    return evaluate_network(model, split.test, THREAT, STAGES, trained_with=losses.isce, s=1.0)


def columns(evaluation):
    found = {f.name: getattr(evaluation, f.name) for f in dataclasses.fields(evaluation)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def assert_same(a, b):
    assert columns(a.evaluation).keys() == columns(b.evaluation).keys()
    for name, column in columns(a.evaluation).items():
        assert torch.equal(column, columns(b.evaluation)[name]), name
    assert [(s.name, s.attacked, s.broken) for s in a.evaluation.stages] == [
        (s.name, s.attacked, s.broken) for s in b.evaluation.stages
    ]
    assert a.audit.findings == b.audit.findings
    assert a.verdict() == b.verdict()


def test_there_is_one_final_answer(result):
    """What the audit and the region broke is in it, and nothing in it says otherwise."""
    assert [stage.name for stage in result.evaluation.stages] == ["clean", "pgd50", "apgd", "audit", "region"]
    assert result.audit.evaluation is result.evaluation
    assert result.verdict("robust") == result.audit.verdict("robust")
    assert result.verdict("pgd50").status in ("tight", "loose", "refuted", "void")
    assert result.region.s == 1.0
    with pytest.raises(UserError, match="unknown claim"):
        result.verdict("clean")


def test_it_prints_the_three_figures_with_their_verdicts(result):
    text = str(result)
    n = len(result.evaluation.y)
    assert text.splitlines()[0] == f"linf 0.1, {n} samples, in percent; 95% Clopper-Pearson interval"
    for name, column in (("clean", result.evaluation.clean), ("PGD-50", result.evaluation.pgd50)):
        assert f"{name} " in text
        assert f"{100 * float(column.float().mean()):.1f}" in text
    assert f"<= {100 * float(result.evaluation.robust.float().mean()):.1f} [" in text
    assert result.verdict().status in text
    html = result._repr_html_()
    assert "robust, at most" in html
    assert "No verdict yet" not in html


def test_a_void_measurement_states_no_robust_accuracy(result):
    firing = dataclasses.replace(result.audit.findings[0], status="fires", void=True, why="NaN everywhere")
    void = dataclasses.replace(result, audit=dataclasses.replace(result.audit, findings=(firing,)))
    assert void.verdict().status == "void"
    assert "<=" not in str(void)
    assert "at most" not in void._repr_html_()


def test_a_finished_cache_is_read_back_and_an_unfinished_one_resumes(model, split, result, tmp_path, monkeypatch):
    arguments = {"trained_with": losses.isce, "s": 1.0, "cache": tmp_path}
    reports = []
    made = evaluate_network(model, split.test, THREAT, STAGES, **arguments, progress=lambda *r: reports.append(r))
    assert_same(made, result)
    assert all(0 < done <= total for _, done, total in reports)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "audit.safetensors", "evaluated.json", "evaluation.safetensors", "region.safetensors", "result.safetensors",
    ]  # fmt: skip
    # No image is stored twice: the result holds those alone that came after the attacks.
    later = load_tensors(tmp_path / "result.safetensors", "network result", 3)[0]["later/x_adv"]
    assert len(later) <= sum(stage.broken for stage in made.evaluation.stages[-2:])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evaluate", lambda *_, **__: pytest.fail("attacked again"))
        read = evaluate_network(model, split.test, THREAT, STAGES, **arguments)
        assert_same(read, made)
        assert read.region == made.region
        assert read.evaluation.stages == made.evaluation.stages
    (tmp_path / "result.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "audit", lambda *_, **__: pytest.fail("audited again"))
        patch.setattr(pipeline.region, "measure", lambda *_, **__: pytest.fail("measured again"))
        assert_same(evaluate_network(model, split.test, THREAT, STAGES, **arguments), made)


@pytest.mark.parametrize("change", [{"seed": 1}, {"s": 2.0}, {"trained_with": losses.sce}])
def test_a_result_of_another_question_is_not_read_back(change, result):
    arguments = {"key": "k", "trained_with": losses.isce, "s": 1.0, "seed": 0}
    same = pipeline.result_key(THREAT, STAGES, **arguments)
    assert same == pipeline.result_key(THREAT, STAGES, **arguments)
    assert same != pipeline.result_key(THREAT, STAGES, **arguments | change)
    assert same != pipeline.result_key(Threat("linf", 0.2), STAGES, **arguments)
    assert same != pipeline.result_key(THREAT, "quick", **arguments)


def test_the_cache_of_other_weights_is_refused(model, split, tmp_path):
    some = split.test.take(slice(0, 20))
    evaluate_network(model, some, THREAT, STAGES, cache=tmp_path)
    other = models.build("smallconv", split.shape, 10, seed=1).eval()
    with pytest.raises(UserError):
        evaluate_network(other, some, THREAT, STAGES, cache=tmp_path)


def test_the_transfer_source_may_come_later(model, split):
    """A function is called once the attacks have ended; the check runs on what it returns."""
    some, asked = split.test.take(slice(0, 20)), []

    def later():
        asked.append(True)
        return data.pixels(some.x)

    result = evaluate_network(model, some, THREAT, STAGES, transfer_source=later)
    check = next(f for f in result.audit.findings if f.name == "transfer is not stronger")
    assert asked == [True]
    assert check.status != "not run" or "twin" not in check.why


def test_what_may_take_gigabytes_is_said_before_the_work():
    pixel = torch.zeros(1, dtype=torch.uint8)
    many = data.Data(pixel.expand(50_000, 3, 224, 224), torch.zeros(50_000).long(), torch.arange(50_000))
    few = data.Data(many.x[:400], many.y[:400], many.index[:400])
    with pytest.warns(data.DataWarning, match=r"of 50,000 samples take up to 60\.2 GB in out, .*--limit evaluates"):
        pipeline.note_size(many, "out")
    with pytest.warns(data.DataWarning, match=r"of 400 samples, 5 times, take up to 2\.4 GB"):
        pipeline.note_size(few, "out", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.note_size(few, "out")
