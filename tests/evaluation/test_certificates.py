"""Certificates in an evaluation, and the check that nothing breaks a certified sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.evaluation.helpers import CLOSE, certificates
from torch import nn

from holdfast import data, models
from holdfast.attacks import ATTACKS
from holdfast.bounds import certify
from holdfast.checks import audit
from holdfast.errors import UserError
from holdfast.evaluation import Budget, evaluate, proofs
from holdfast.threat import Threat

CHECK = "certified samples are unbroken"


def test_certified_samples_are_correct_and_unbroken(mlp, some, per_attack):
    assert per_attack.certified.dtype == torch.bool
    assert 0 < int(per_attack.certified.sum()) <= int(per_attack.robust.sum())
    assert not (per_attack.certified & ~per_attack.clean).any()
    assert not (per_attack.certified & ~per_attack.robust).any()
    for stage in per_attack.stages[1:]:
        if stage.name in per_attack.attack_correct:
            assert stage.attacked == int(per_attack.clean.sum()), "an individual attack also tries what is proved"
    sweep = next(stage for stage in per_attack.stages if stage.name == "sweep")
    left = torch.stack(list(per_attack.attack_correct.values())).all(0)
    assert sweep.attacked == int((left & ~per_attack.certified).sum()), "what is proved leaves the other attacks"
    parts = evaluate(mlp, some, CLOSE, (), batch_size=7)
    assert torch.equal(parts.certified, per_attack.certified)
    wide = evaluate(mlp, some.take(slice(0, 20)), Threat("linf", 0.5), ())
    assert wide.certified.tolist() == [False] * 20


def test_stronger_proofs_leave_the_attacks_less_to_do(mlp, some):
    """Optimised slopes prove one sample more than lines over intervals, and then nothing is left to attack."""
    threat = Threat("linf", 0.08)
    cheap, strong = (evaluate(mlp, some, threat, "standard", proofs=proofs) for proofs in ("linear", "alpha"))
    assert torch.equal(cheap.robust, strong.robust)
    assert not (cheap.certified & ~strong.certified).any()
    assert int(strong.certified.sum()) > int(cheap.certified.sum())
    assert not (strong.certified & ~strong.robust).any()
    assert torch.equal(strong.certified, strong.robust), "exact: certified = attacked"
    assert sum(stage.passes for stage in strong.stages) < 0.8 * sum(stage.passes for stage in cheap.stages)
    with pytest.raises(UserError, match="unknown proofs 'branches'"):
        evaluate(mlp, some, CLOSE, "quick", proofs="branches")


HOUR = Budget(seconds=3600.0)


def test_branch_and_bound_decides_what_is_left(mlp, some):
    """Without an attack but PGD-50: what PGD-50 misses is met by branch and bound, and is a witness like any other."""
    threat, few = Threat("linf", 0.1), some.take(slice(0, 45))
    e = evaluate(mlp, few, threat, (), proofs="branch", budget=HOUR)
    assert torch.equal(e.certified, e.robust), "exact: nothing lies between"
    assert not e.unfinished
    stage, cost = e.stages[-1], e.proofs[-1]
    assert (stage.name, cost.method, cost.out_of_time) == ("branch and bound", "branch", 0)
    met = e.broken_by == len(e.stages) - 1
    assert int(met.sum()) == stage.broken == cost.broken > 0
    assert cost.proved == int((e.proved_by == proofs.PROVED_BY.index("branch")).sum()) > 0
    assert stage.attacked == cost.tried == cost.proved + cost.broken
    assert bool(e.pgd50[met].all()), "PGD-50 had missed them"
    with torch.no_grad():
        answers = mlp(e.x_adv[met]).argmax(1)
    assert torch.equal(answers, e.prediction_adv[met])
    assert bool((answers != few.y[met]).all())
    assert float(threat.violation(e.x_adv[met], data.pixels(few.x)[met]).max()) == 0
    audited = audit(mlp, few, e, size=12)
    assert audited.verdict("robust").status == "exact"


def test_where_the_budget_ends_what_is_open_stays_open(mlp, some):
    e = evaluate(mlp, some, Threat("linf", 0.1), "quick", proofs="branch", budget=Budget(seconds=1e-3))
    between = int((e.robust & ~e.certified).sum())
    assert e.unfinished
    assert between > 0
    assert (e.proofs[-1].method, e.proofs[-1].tried, e.proofs[-1].out_of_time) == ("branch", 0, between)
    assert "branch and bound" not in {stage.name for stage in e.stages}
    assert int(e.certified.sum()) > 0, "the cheap proofs come first"


@pytest.mark.parametrize("budget", [None, Budget(passes=1e6)])
def test_branch_and_bound_needs_a_budget_of_time(mlp, some, budget):
    with pytest.raises(UserError, match=r"give proofs 'branch' a budget of time, such as --budget 10min"):
        evaluate(mlp, some, CLOSE, "quick", proofs="branch", budget=budget)


def test_each_sample_has_the_method_that_proved_it_and_each_method_its_cost(mlp, some):
    threat = Threat("linf", 0.08)
    e = evaluate(mlp, some, threat, (), proofs="alpha")
    found = certify(mlp, replace(some, x=data.pixels(some.x)), threat, method="alpha")
    broken = ~e.robust
    names = [proofs.PROVED_BY[number] for number in e.proved_by.tolist()]
    assert torch.equal(e.certified, e.proved_by > 0)
    assert names == ["" if lost else name for name, lost in zip(found.by, broken.tolist(), strict=True)]
    costs = {cost.method: cost for cost in e.proofs}
    assert list(costs) == ["interval", "lipschitz", "linear", "crown", "alpha"]
    assert [cost.proved for cost in e.proofs] == [names.count(name) for name in costs]
    assert costs["interval"].tried == len(some), "the strong methods try the cheap ones again, which counts once"
    assert (
        costs["crown"].tried
        == int((e.robust & (e.proved_by == 0)).sum()) + costs["crown"].proved + costs["alpha"].proved
    )
    assert all(cost.seconds > 0 for cost in e.proofs)
    assert sum(cost.seconds for cost in e.proofs) <= e.stages[0].seconds


def test_lipschitz_constants_prove_in_an_evaluation_what_they_prove_alone(some):
    """A hook that counts would make the network another one: no orthogonal network had a certificate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.build("lipmlp:width=16", (1, 8, 8), 10, head="orthogonal")
    few = data.pixels(some.take(slice(0, 12)).x)
    right = data.Data(few, net(few).logits.argmax(1), torch.arange(12))
    found, e = certify(net, right, "l2:0.03", method="linear"), evaluate(net, right, "l2:0.03", ())
    assert "lipschitz" in found.by
    assert torch.equal(found.proved, e.certified)
    assert found.forwards > 0


def test_a_model_without_bounds_has_no_certificate(mlp, some):
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.randn(len(x), 10)

    few = some.take(slice(0, 12))
    assert evaluate(lambda x: mlp(x), few, CLOSE, ()).certified is None
    e = evaluate(Noisy(*mlp), few, CLOSE, ())
    assert e.votes > 1
    assert e.certified is None


def test_a_misclassified_sample_is_never_certified(monkeypatch, mlp, some):
    monkeypatch.setattr(proofs, "certified", lambda task, rows, *_: certificates(rows >= 0))
    labelled = data.Data(some.x, (some.y + (some.index % 2)) % 10, some.index)
    e = evaluate(mlp, labelled, CLOSE, ())
    assert torch.equal(e.certified, e.clean)


def finding_and_verdicts(audited):
    """The finding of the check, and the verdicts on both claims."""
    (finding,) = (finding for finding in audited.findings if finding.name == CHECK)
    return finding, [audited.verdict(claim).status for claim in ("robust", "pgd50")]


def test_a_correct_certificate_voids_nothing(mlp, some, per_attack):
    finding, verdicts = finding_and_verdicts(audit(mlp, some, per_attack, size=24))
    assert (finding.status, finding.k, finding.n) == ("holds", 0, int(per_attack.certified.sum()))
    assert "void" not in verdicts


def test_a_wrong_certificate_voids_both_claims(monkeypatch, mlp, some):
    monkeypatch.setattr(proofs, "certified", lambda task, rows, *_: certificates(task.data.y[rows] < 5))
    wrong = evaluate(mlp, some, CLOSE, "quick")
    finding, verdicts = finding_and_verdicts(audit(mlp, some, wrong, size=24))
    broken = int((wrong.certified & ~wrong.robust).sum())
    assert broken > 0
    assert (finding.status, finding.k, finding.n) == ("fires", broken, int(wrong.certified.sum()))
    assert verdicts == ["void", "void"]
    assert f"{broken} of {finding.n} certified samples were broken" in finding.why


def test_one_certified_sample_broken_by_a_check_is_enough(monkeypatch, mlp, some):
    """The only attack of the evaluation, PGD-50, is made harmless: it is the audit that breaks samples."""
    monkeypatch.setattr(proofs, "certified", lambda task, rows, *_: certificates(rows >= 0))
    monkeypatch.setitem(ATTACKS, "pgd", replace(ATTACKS["pgd"], attack=lambda model, x, y, threat, **_: x))
    harmless = evaluate(mlp, some, CLOSE, ())
    assert torch.equal(harmless.certified, harmless.robust)
    monkeypatch.undo()
    audited = audit(mlp, some, harmless, size=24)
    finding, verdicts = finding_and_verdicts(audited)
    assert finding.k == audited.cost.broken > 0
    assert verdicts == ["void", "void"]


@pytest.mark.parametrize(
    ("proof", "lacks"),
    [
        (lambda *_: None, "there is no certificate: no bound of the network is known"),
        (lambda task, rows, *_: certificates(rows < 0), "there is no certificate: no sample is certified"),
    ],
)
def test_without_a_certificate_the_check_does_not_run(monkeypatch, mlp, some, proof, lacks):
    monkeypatch.setattr(proofs, "certified", proof)
    few = some.take(slice(0, 24))
    finding, _ = finding_and_verdicts(audit(mlp, few, evaluate(mlp, few, CLOSE, ()), size=12))
    assert (finding.status, finding.why) == ("not run", lacks)
