"""Images that may be adversarial, given to an evaluation: what they break needs no attack."""

from __future__ import annotations

import pytest
import torch
from tests.evaluation.helpers import THREAT, Threshold, numbers

from holdfast.checks import audit
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.experiments.pipeline import witnesses_of
from holdfast.threat import Threat

SMALL, LARGE = Threat("linf", 0.05), Threat("linf", 0.07)


@pytest.fixture(scope="module")
def pair(mlp, test_set):
    """(at the smaller eps, at the larger one alone, at the larger one from the smaller one)."""
    small = evaluate(mlp, test_set, SMALL, "standard")
    alone = evaluate(mlp, test_set, LARGE, "standard", pgd50=0)
    warm = evaluate(mlp, test_set, LARGE, "standard", pgd50=0, candidates=witnesses_of(small, test_set))
    return small, alone, warm


def passes(evaluation):
    return evaluation.forwards + evaluation.backwards


def test_what_breaks_at_a_smaller_eps_needs_no_attack_at_a_larger_one(pair):
    small, alone, warm = pair
    broken = small.broken_by >= 0
    given = len(warm.stages) - 1
    assert warm.stages[given].name == "candidates"
    assert int(broken.sum()) > 20
    assert bool((warm.broken_by[broken] == given).all()), "every one of them holds there"
    assert int((warm.broken_by == given).sum()) == warm.stages[given].broken
    assert torch.equal(warm.x_adv[broken], small.x_adv[broken]), "saved as witnesses"
    assert warm.stages[given].attacked == int(broken.sum()), "nothing else is asked"
    assert passes(warm) < passes(alone) - 3 * int(broken.sum())


def test_the_answers_are_the_same(pair, mlp, test_set):
    small, alone, warm = pair
    assert not bool((warm.robust & ~small.robust).any())
    assert int((warm.robust != alone.robust).sum()) <= 1
    assert not bool((warm.robust & ~alone.robust).any()), "nothing is lost"
    assert audit(mlp, test_set, warm).verdict().status == audit(mlp, test_set, alone).verdict().status


def test_a_candidate_counts_only_in_the_threat_and_misclassified(mlp):
    """As any other candidate: one outside of the threat breaks nothing, and says so to the checks."""
    data = numbers([0.52, 0.549, 0.9])  # the last one is proved
    far = (data.x - 0.6).clamp(0, 1)
    for images, broken, outside in ((far, 0, 2), (data.x, 0, 0), (data.x - 0.04, 1, 0)):
        found = evaluate(Threshold(gradient=False), data, Threat("linf", 0.05), (), pgd50=0, candidates=images)
        given = [stage for stage in found.stages if stage.name == "candidates"]
        assert sum(stage.broken for stage in given) == broken
        assert sum(stage.outside for stage in given) == outside


def test_individual_attacks_come_first_and_have_their_own_answers(pair, mlp, test_set):
    small = pair[0]
    alone = evaluate(mlp, test_set, LARGE, "quick")
    warm = evaluate(mlp, test_set, LARGE, "quick", candidates=witnesses_of(small, test_set))
    assert torch.equal(alone.pgd50, warm.pgd50)
    assert (warm.stages[1].name, warm.stages[1].broken) == ("pgd50", alone.stages[1].broken)


def test_an_interrupted_evaluation_resumes_with_its_candidates(pair, mlp, some, tmp_path, save_every_batch):
    images = witnesses_of(evaluate(mlp, some, SMALL, "quick"), some)
    stages = (Stage("sweep", "apgd", settings={"steps": 5}), *SUITES["quick"][1:2])
    arguments = {"candidates": images, "batch_size": 16, "pgd50": 0}
    whole = evaluate(mlp, some, LARGE, stages, **arguments)
    path, calls = tmp_path / "checkpoint.safetensors", []

    def interrupt(*report):
        calls.append(report)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(mlp, some, LARGE, stages, checkpoint=path, progress=interrupt, **arguments)
    again = evaluate(mlp, some, LARGE, stages, checkpoint=path, **arguments)
    assert torch.equal(again.broken_by, whole.broken_by)
    assert torch.equal(again.x_adv, whole.x_adv)
    assert again.stages[-1].broken == whole.stages[-1].broken > 0
    with pytest.raises(UserError, match="belongs to another evaluation"):
        evaluate(mlp, some, LARGE, stages, checkpoint=path, batch_size=16, pgd50=0)


def test_candidates_of_other_samples_are_refused():
    data = numbers([0.9, 0.8])
    with pytest.raises(UserError, match=r"candidates must be images of the same samples, \(2, 1, 1, 1\), got \(1, 1"):
        evaluate(Threshold(), data, THREAT, (), candidates=data.x[:1])
    with pytest.raises(UserError, match="candidates must be"):
        evaluate(Threshold(), data, THREAT, (), candidates=[1])
