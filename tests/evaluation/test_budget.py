"""Budgets: what is finished in any case, and what a larger budget is spent on."""

from __future__ import annotations

import pytest
from tests.evaluation.helpers import CLOSE, EPS, PER_ATTACK, LinearModel

from holdfast.errors import UserError
from holdfast.evaluation import Budget, evaluate
from holdfast.evaluation.suites import PGD50_TRAIN_LOSS, Stage
from holdfast.threat import Threat

pytestmark = pytest.mark.usefixtures("unproved")


@pytest.mark.parametrize("text", ["", "10", "min", "ten min", "-3s", "0s", "1e999passes", "nan s", "1.2.3s", "5days"])
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(UserError, match="cannot read the budget"):
        Budget.parse(text)


def test_a_budget_of_passes_is_kept_and_spent_on_the_nearest():
    model = LinearModel()
    data, threat = model.data(), Threat("linf", EPS)
    full = evaluate(model, data, threat, "standard")
    pgd50 = sum(cost.forwards + cost.backwards for cost in full.stages[:2])
    before = len(data)
    for passes in (1, pgd50 + 2_000, pgd50 + 20_000):
        e = evaluate(model, data, threat, "standard", budget=Budget(passes=passes))
        assert e.unfinished
        assert e.forwards + e.backwards <= max(passes, pgd50) + 64
        assert not (model.robust(data, threat.eps) & ~e.robust).any(), "an upper bound all the same"
        assert e.stages[1].attacked == full.stages[1].attacked, "PGD-50 is always finished"
        assert int(e.robust.sum()) <= before
        before = int(e.robust.sum())


def test_a_budget_beyond_the_suite_is_spent_on_further_rounds():
    model = LinearModel()
    data, threat = model.data(100), Threat("linf", EPS)
    quick = evaluate(model, data, threat, "quick")
    e = evaluate(model, data, threat, "quick", budget=Budget(passes=quick.forwards + quick.backwards + 60_000))
    assert not e.unfinished
    names = [cost.name for cost in e.stages[len(quick.stages) :]]
    assert names[:4] == ["more 1: long", "more 1: targets", "more 1: md", "more 1: square"]
    assert any(name.startswith("more 2") for name in names)
    assert e.robust.tolist() == model.robust(data, threat.eps).tolist()


def test_a_budget_of_seconds_ends():
    model = LinearModel()
    e = evaluate(model, model.data(200), Threat("linf", EPS), "quick", budget=Budget(seconds=1.5))
    assert 0.5 < e.seconds < 6


def test_a_budget_finishes_a_column_or_leaves_it_out(mlp, some):
    """An unfinished column would count samples as correct that were never attacked."""
    few = Budget(passes=100)
    e = evaluate(mlp, some, CLOSE, PER_ATTACK[:2], budget=few)
    assert list(e.attack_correct) == ["pgd50", "pgd10", "pgd10-targeted"]
    assert {stage.attacked for stage in e.stages[1:4]} == {int(e.clean.sum())}
    e = evaluate(mlp, some, CLOSE, (Stage("sweep", "apgd", settings={"steps": 50}), *PER_ATTACK[:2]), budget=few)
    assert list(e.attack_correct) == ["pgd50"]
    assert e.unfinished
    e = evaluate(mlp, some, CLOSE, (Stage("sweep", "apgd", settings={"steps": 50}), PGD50_TRAIN_LOSS), budget=few)
    assert list(e.attack_correct) == ["pgd50"]


def test_an_evaluation_with_a_budget_resumes(tmp_path):
    model, threat = LinearModel(), Threat("linf", EPS)
    data, path = model.data(100), tmp_path / "checkpoint.safetensors"
    few = {"suite": "quick", "budget": Budget(passes=80_000)}
    whole = evaluate(model, data, threat, **few)
    evaluate(model, data, threat, **few, checkpoint=path)
    again = evaluate(model, data, threat, **few, checkpoint=path)
    assert again.broken_by.tolist() == whole.broken_by.tolist()
    assert [cost.name for cost in again.stages] == [cost.name for cost in whole.stages]
