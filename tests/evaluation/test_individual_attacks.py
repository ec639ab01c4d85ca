"""Individual attacks: run on all correctly classified samples, each with an accuracy of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.evaluation.helpers import CLOSE, PER_ATTACK, THREAT, Threshold, numbers

from holdfast import data
from holdfast.attacks import ATTACKS, AttackEntry
from holdfast.checks import CHECKS, audit, name_of
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import PGD50, PGD50_TRAIN_LOSS, Stage
from holdfast.outputs import fooled
from holdfast.threat import Threat

NAMES = ["pgd10", "pgd10-targeted", "pgd50", "pgd50-targeted", "cw"]


def share(column):
    return float(column.double().mean())


def test_individual_attacks_have_a_column_each_in_the_suites_order(mlp, some, per_attack):
    assert list(per_attack.attack_correct) == NAMES
    for name, correct in per_attack.attack_correct.items():
        assert correct.shape == per_attack.clean.shape
        assert not (correct & ~per_attack.clean).any(), name
        assert not (per_attack.robust & ~correct).any(), "a sample it broke is broken"
    stages = {stage.name: stage for stage in per_attack.stages}
    n = int(per_attack.clean.sum())
    assert all(stages[name].attacked == n for name in NAMES), "all correct samples, broken before or not"
    assert 0.05 < share(per_attack.robust) < share(per_attack.clean)


def test_pgd50_is_not_run_twice(per_attack):
    assert torch.equal(per_attack.attack_correct["pgd50"], per_attack.pgd50)
    assert [stage.name for stage in per_attack.stages].count("pgd50") == 1
    assert per_attack.stages[1].name == "pgd50"


def test_a_column_does_not_depend_on_the_other_stages(mlp, some, per_attack):
    """The same attack by itself breaks the same samples."""
    for stage in PER_ATTACK:
        if stage.name != "pgd50":
            correct = evaluate(mlp, some, CLOSE, (stage,), batch_size=37).attack_correct
            assert list(correct) == ["pgd50", stage.name]
            assert float((correct[stage.name] == per_attack.attack_correct[stage.name]).double().mean()) >= 0.99, (
                stage.name
            )


def test_more_steps_and_untargeted_attacks_break_more(mlp, test_set):
    """On the whole test set: a targeted attack aims at only one wrong class of nine."""
    correct = evaluate(mlp, test_set, Threat("linf", 0.05), PER_ATTACK).attack_correct
    assert share(correct["pgd50"]) <= share(correct["pgd10"]) + 0.01
    assert share(correct["pgd10-targeted"]) > share(correct["pgd10"]) + 0.05
    assert share(correct["pgd50-targeted"]) > share(correct["pgd50"]) + 0.05
    assert abs(share(correct["cw"]) - share(correct["pgd50"])) < 0.06


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_carlini_and_wagner_in_this_length_is_nearly_as_good_as_in_full(mlp, some, norm, eps):
    full = replace(PER_ATTACK[-1], name="full", settings={})
    correct = evaluate(mlp, some, Threat(norm, eps), (PER_ATTACK[-1], full)).attack_correct
    assert share(correct["cw"]) <= share(correct["full"]) + 0.04


def test_a_norm_without_an_attack_has_no_column_of_it(mlp, some):
    correct = evaluate(mlp, some.take(slice(0, 8)), Threat("l1", 0.3), PER_ATTACK).attack_correct
    assert list(correct) == NAMES[:-1]


def test_pgd50_comes_first_unless_the_suite_gives_its_place(mlp, some):
    e = evaluate(mlp, some.take(slice(0, 8)), CLOSE, (PGD50_TRAIN_LOSS,))
    assert list(e.attack_correct) == ["pgd50", "pgd50-train-loss"]
    e = evaluate(mlp, some.take(slice(0, 8)), CLOSE, (PGD50_TRAIN_LOSS, PER_ATTACK[0], PGD50))
    assert list(e.attack_correct) == ["pgd50-train-loss", "pgd10", "pgd50"]
    assert torch.equal(e.attack_correct["pgd50"], e.pgd50)
    assert [stage.name for stage in e.stages] == ["clean", "pgd50", "pgd50-train-loss", "pgd10"]


def random_targets(monkeypatch, samples, model, stage, **more):
    """index -> target class."""
    seen = {}

    def probe(model, x, y, threat, *, score, noise, target):
        seen.update(zip(noise.index.tolist(), target.tolist(), strict=True))
        return x

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    stage = replace(stage, attack="probe", score="scaled_log_odds", settings={}, step=None)
    evaluate(model, samples, CLOSE, (stage,), **more)
    return seen


def test_random_targets_are_uniform_wrong_classes_from_the_samples_own_noise(monkeypatch, mlp, test_set):
    samples = test_set
    seen = random_targets(monkeypatch, samples, mlp, PER_ATTACK[1])
    y = dict(zip(samples.index.tolist(), samples.y.tolist(), strict=True))
    assert len(seen) > 300
    assert all(0 <= t < 10 and t != y[i] for i, t in seen.items())
    after = torch.tensor([(t - y[i]) % 10 for i, t in seen.items()])  # 1 .. 9, uniform
    counts = after.bincount(minlength=10)[1:].double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 26.1  # chi squared, 8 df, p = 0.001
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    assert random_targets(monkeypatch, samples.take(order), mlp, PER_ATTACK[3], batch_size=50) == seen
    assert random_targets(monkeypatch, samples, mlp, PER_ATTACK[1], seed=1) != seen
    two = random_targets(monkeypatch, numbers([0.9, 0.1], [0, 1]), Threshold(), PER_ATTACK[1])
    assert two == {0: 1, 1: 0}


def test_a_targeted_attack_counts_any_mistake(monkeypatch):
    """Class 0 turns into 2 whatever the target: with target 1 that is a success too."""

    def model(x):
        p = x.flatten(1)[:, :1]
        return torch.cat([p - 0.5, -9 + p * 0, 0.5 - p], 1)

    def drop(model, x, y, threat, *, score, noise, target):
        return x - 0.1

    monkeypatch.setitem(ATTACKS, "drop", AttackEntry(drop, "a test"))
    stage = Stage("drop", "drop", "scaled_log_odds", individual=True, target="random")
    e = evaluate(model, numbers([0.55] * 20 + [0.9]), THREAT, (stage,))
    assert set(e.prediction_adv[:20].tolist()) == {2}
    assert e.attack_correct["drop"].tolist() == [False] * 20 + [True]


def test_a_witness_of_every_broken_sample_holds(mlp, some, per_attack):
    """Individual attacks leave witnesses like all others."""
    broken = per_attack.broken_by >= 0
    with torch.no_grad():
        assert bool(fooled(mlp(per_attack.x_adv[broken]), some.y[broken]).all())
    assert bool((CLOSE.violation(per_attack.x_adv, data.pixels(some.x)) == 0).all())
    for name, correct in per_attack.attack_correct.items():
        assert bool(broken[per_attack.clean & ~correct].all()), name


def test_pgd50_on_a_sample_is_the_same_attack_there(mlp, some):
    whole = evaluate(mlp, some, CLOSE, "quick")
    part = evaluate(mlp, some, CLOSE, "quick", pgd50=30)
    asked = part.pgd50_sample
    assert int(asked.sum()) == 30
    assert part.stages[1].attacked == int((asked & part.clean).sum())
    assert torch.equal(part.pgd50[asked], whole.pgd50[asked])
    assert not bool(part.pgd50[~asked].any())
    assert len(part.of_pgd50(part.robust)) == 30
    assert not bool((part.robust & part.clean & asked & ~part.pgd50).any()), "what it breaks counts"
    assert evaluate(mlp, some, CLOSE, "quick", pgd50=len(some)).pgd50_sample is None, "all are no sample"
    other = evaluate(mlp, some, CLOSE, "quick", pgd50=30, seed=1)
    assert not torch.equal(other.pgd50_sample, asked)


def test_pgd50_left_out_leaves_its_samples_to_the_suite(mlp, some):
    whole, without = (evaluate(mlp, some, CLOSE, "standard", pgd50=n) for n in (None, 0))
    assert without.pgd50 is None
    assert without.attack_correct == {}
    assert [stage.name for stage in without.stages[:2]] == ["clean", "sweep"]
    assert without.stages[1].attacked == int((without.clean & ~without.certified).sum())
    assert int((whole.robust != without.robust).sum()) <= 1
    assert without.forwards + without.backwards < whole.forwards + whole.backwards
    audited = audit(mlp, some, without)
    assert audited.verdict().status in ("exact", "tight", "loose")
    with pytest.raises(UserError, match="PGD-50 was left out of this evaluation"):
        audited.verdict("pgd50")
    left_out = {finding.name for finding in audited.findings if "left out" in finding.why}
    assert left_out == {name_of(check) for check in CHECKS if check.claims == ("pgd50",)}


def test_the_verdict_on_a_sample_counts_its_samples(mlp, some):
    audited = audit(mlp, some, evaluate(mlp, some, CLOSE, "quick", pgd50=30))
    verdict = audited.verdict("pgd50")
    assert "30 samples" in verdict.why or verdict.status == "exact"
    assert f"of {len(some)} samples" in audited.verdict().why or audited.verdict().status == "exact"


@pytest.mark.parametrize("n", [-1, 1.5, "10", True])
def test_a_number_of_samples_for_pgd50_is_a_number(mlp, some, n):
    with pytest.raises(UserError, match="pgd50 must be a whole number"):
        evaluate(mlp, some, CLOSE, (), pgd50=n)
