"""Suites: their names, their stages, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.evaluation.helpers import CLOSE, PER_ATTACK, THREAT, Threshold, case, numbers

from holdfast.attacks import ATTACKS, SCORES, AttackEntry
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import PGD50, SUITES, Stage
from holdfast.threat import Threat


def test_names_that_do_not_exist():
    model = Threshold()
    with pytest.raises(UserError, match=r"unknown suite 'standart'. Did you mean 'standard'"):
        evaluate(model, numbers([0.9]), THREAT, "standart")
    with pytest.raises(UserError, match=r"unknown attack 'pdg'. Did you mean 'pgd'"):
        evaluate(model, numbers([0.9]), THREAT, (Stage("a", "pdg"),))
    assert model.forwards == 0
    with pytest.raises(UserError, match=r"unknown score 'marign'. Did you mean 'margin'.*matched"):
        evaluate(model, numbers([0.9]), THREAT, (Stage("a", "pgd", "marign"),))
    assert model.forwards == 0, "a name that does not exist is found before any work is done"


def test_the_suites_name_what_exists():
    for stages in SUITES.values():
        names = [stage.name for stage in stages]
        assert len(set(names)) == len(names)
        assert all(stage == PGD50 for stage in stages if stage.name == "pgd50")
        for stage in stages:
            assert stage.attack in ATTACKS
            assert stage.score in {*SCORES, "matched", "train_loss"}


def shortened(stage):
    """The stage with at most three steps; PGD-50 as it is."""
    few = {name: min(value, 3) for name, value in stage.settings.items() if name in ("steps", "restarts")}
    return stage if stage == PGD50 else replace(stage, settings={**stage.settings, **few})


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_for_every_norm(suite, norm):
    """Stages that are not defined for a norm are left out. Here they are short: tests/faults counts steps."""
    net, samples, _ = case(n=2)  # one of them is right
    short = tuple(shortened(stage) for stage in SUITES[suite])
    e = evaluate(net, samples, Threat(norm, 0.01), short)
    run = [stage for stage in short if norm in ATTACKS[stage.attack].norms and stage != PGD50]
    names = [stage.name for stage in run]
    assert [stage.name for stage in e.stages] == ["clean", "pgd50", *names]


def test_an_unknown_subset_is_refused():
    with pytest.raises(UserError, match="unknown subset of a stage 'nearst'"):
        Stage("a", "apgd", subset="nearst")
    with pytest.raises(UserError, match="fraction of stage 'a' must be a finite number > 0 and <= 1"):
        Stage("a", "apgd", subset="nearest", fraction=0.0)


def test_the_suites_cost_more_and_more():
    """Passes for the nearest sample if nothing breaks it, with 10 classes."""
    costs = [sum(stage.passes(10) for stage in SUITES[suite]) for suite in ("quick", "standard", "paranoid")]
    assert costs == sorted(costs)
    assert costs[2] > 9000, "as many as AutoAttack's"


def test_impossible_names_and_targets_are_refused(mlp, some):
    with pytest.raises(UserError, match=r"unknown target of a stage 'randon'\. Did you mean 'random'"):
        Stage("a", "pgd", target="randon")
    with pytest.raises(UserError, match=r"stage 'a': use either target='random' or targets=3 \(likeliest\), not both"):
        Stage("a", "pgd", target="random", targets=3)
    twice = (PER_ATTACK[0], replace(PER_ATTACK[1], name="pgd10"))
    with pytest.raises(UserError, match="two individual stages are named 'pgd10'"):
        evaluate(mlp, some, CLOSE, twice)
    with pytest.raises(UserError, match="'pgd50' is reserved for the standard PGD-50 stage"):
        evaluate(mlp, some, CLOSE, (replace(PER_ATTACK[0], name="pgd50"),))


def test_a_stage_after_another_runs_only_if_that_one_broke_something(unproved, monkeypatch):
    def shift(model, x, y, threat, *, score, noise, by):
        return x - by

    monkeypatch.setitem(ATTACKS, "shift", AttackEntry(shift, "a test"))
    samples = numbers([0.65, 0.9])
    for by, runs in ((0.2, 1), (0.0, 0)):
        stages = (
            Stage("first", "shift", settings={"by": by}),
            Stage("named", "shift", settings={"by": 0.0}, after="first"),
            Stage("subset", "shift", settings={"by": 0.0}, after="survivors"),
            Stage("last", "shift", settings={"by": 0.0}, after="named"),
        )
        found = evaluate(Threshold(gradient=False), samples, Threat("linf", 0.2), stages)
        assert [stage.attacked for stage in found.stages[2:]] == [2, runs, runs, 0]
    with pytest.raises(UserError, match=r"unknown stage that 'a' runs after 'frist'.*Did you mean 'first'"):
        evaluate(Threshold(), samples, THREAT, (Stage("first", "noise"), Stage("a", "noise", after="frist")))
