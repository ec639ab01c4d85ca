"""The cascade: later stages attack survivors only, and the result does not depend on the scale of the logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.evaluation.helpers import EPS, FEW, THREAT, LinearModel, Threshold, numbers
from torch import nn

from holdfast.attacks import ATTACKS, AttackEntry, matched_score
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import Stage
from holdfast.losses import dlr, isce, mmc, negative_margin, scaled_log_odds
from holdfast.threat import Threat

pytestmark = pytest.mark.usefixtures("unproved")


def test_a_stage_attacks_survivors_only(monkeypatch):
    """The k-th probe breaks samples of class k: each gets what earlier ones left, and no sample twice."""
    attacked_by = {}

    def probe(model, x, y, threat, *, score, noise, breaks):
        attacked_by.setdefault(breaks, []).extend(noise.index.tolist())
        return torch.where((y == breaks).view(-1, 1, 1, 1), torch.zeros_like(x), x)

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    y = [0, 1, 2, 0, 1, 2, 3]

    class Steps(nn.Module):  # right at x, wrong at 0, no gradient
        def forward(self, x):
            k = (x.detach().flatten(1)[:, 0] * 10).round().long().clamp(0, 9)
            return F.one_hot(k, 10).float()

    samples = numbers([0.1 * (label + 1) for label in y], [label + 1 for label in y])
    samples = replace(samples, classes=tuple("0123456789"))
    stages = tuple(Stage(f"probe{k}", "probe", settings={"breaks": k}) for k in (1, 2, 3))
    e = evaluate(Steps(), samples, Threat("linf", 0.99), stages, batch_size=2)
    broken = {i for i in range(7) if e.broken_by[i] == 1}
    survivors = [i for i in range(7) if i not in broken]
    assert attacked_by.get(1, []) == survivors
    survivors = [i for i in survivors if y[i] != 0]
    assert attacked_by.get(2, []) == survivors
    survivors = [i for i in survivors if y[i] != 1]
    assert attacked_by.get(3, []) == survivors
    attacked = {stage.name: (stage.attacked, stage.broken) for stage in e.stages}
    assert attacked["pgd50"] == (7, len(broken))
    for k in (1, 2, 3):
        assert attacked[f"probe{k}"][0] == len(attacked_by.get(k, []))
    assert int(e.robust.sum()) == 7 - len(broken) - sum(attacked[f"probe{k}"][1] for k in (1, 2, 3))


def test_a_misclassified_sample_is_never_attacked():
    model = Threshold()
    e = evaluate(model, numbers([0.1, 0.2, 0.3]), THREAT, FEW)
    assert model.forwards == 3 + 2 * 3  # the preflight queries twice
    assert all(stage.attacked == 0 for stage in e.stages[1:])
    assert e.broken_by.tolist() == [-2, -2, -2]


@pytest.mark.parametrize("values", [[0.2, 0.3], [0.55, 0.56], [0.55, 0.3]])
def test_a_stage_without_samples_does_not_query_the_model(values):
    """x.view(len(x), -1) fails on an empty batch, and so do many networks."""
    reports = []

    def model(x):
        assert len(x), "an empty batch"
        p = x.view(len(x), -1)[:, 0]
        return torch.stack([p - 0.5, 0.5 - p], 1)

    e = evaluate(model, numbers(values), THREAT, FEW, progress=lambda *args: reports.append(args))
    assert not e.robust.any()
    assert all(done > 0 for _, done, _ in reports)
    assert all(stage.seconds == 0 for stage in e.stages[2:])


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_the_scale_of_the_logits_does_not_change_the_result_and_the_result_is_exact(scale, suite):
    model = LinearModel(scale=scale)
    data, threat = model.data(), Threat("linf", EPS)
    truth = model.robust(data, threat.eps)
    assert 0.2 < truth.float().mean() < 0.8
    found = evaluate(model, data, threat, suite)
    assert not (truth & ~found.robust).any(), "a sample proved robust cannot be broken"
    assert (found.robust & ~truth).float().mean() <= 0.005


def test_scaled_log_odds_work_at_any_scale():
    for scale in (1e-4, 1.0, 1e6):
        model = LinearModel(scale=scale)
        data = model.data()
        stage = Stage("apgd", "apgd", "scaled_log_odds", settings={"steps": 20})
        found = evaluate(model, data, Threat("linf", EPS), (stage,))
        assert (found.robust & ~model.robust(data, EPS)).float().mean() <= 0.02, scale
    assert matched_score(None) is matched_score("isce") is scaled_log_odds


def test_matched_is_the_score_of_the_training_loss(monkeypatch):
    scores = []

    def probe(model, x, y, threat, *, score, noise):
        scores.append(score)
        return x

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    stages = (Stage("probe", "probe"), Stage("probe-dlr", "probe", "dlr"))
    for loss, score in ((None, scaled_log_odds), (isce, scaled_log_odds), (mmc, negative_margin)):
        scores.clear()
        evaluate(Threshold(), numbers([0.9]), THREAT, stages, trained_with=loss)
        assert scores == [score, dlr]
