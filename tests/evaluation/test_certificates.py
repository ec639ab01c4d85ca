"""Certificates in an evaluation, and the check that nothing breaks a certified sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.evaluation.helpers import CLOSE
from torch import nn

from holdfast import data
from holdfast.attacks import ATTACKS
from holdfast.checks import audit
from holdfast.errors import UserError
from holdfast.evaluation import clean_pass, evaluate
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
    monkeypatch.setattr(clean_pass, "proved", lambda task, rows, method: torch.ones_like(rows, dtype=torch.bool))
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
    monkeypatch.setattr(clean_pass, "proved", lambda task, rows, method: task.data.y[rows] < 5)
    wrong = evaluate(mlp, some, CLOSE, "quick")
    finding, verdicts = finding_and_verdicts(audit(mlp, some, wrong, size=24))
    broken = int((wrong.certified & ~wrong.robust).sum())
    assert broken > 0
    assert (finding.status, finding.k, finding.n) == ("fires", broken, int(wrong.certified.sum()))
    assert verdicts == ["void", "void"]
    assert f"{broken} of {finding.n} certified samples were broken" in finding.why


def test_one_certified_sample_broken_by_a_check_is_enough(monkeypatch, mlp, some):
    """The only attack of the evaluation, PGD-50, is made harmless: it is the audit that breaks samples."""
    monkeypatch.setattr(clean_pass, "proved", lambda task, rows, method: torch.ones_like(rows, dtype=torch.bool))
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
        (lambda task, rows, method: None, "there is no certificate: no bound of the network is known"),
        (lambda task, rows, method: rows < 0, "there is no certificate: no sample is certified"),
    ],
)
def test_without_a_certificate_the_check_does_not_run(monkeypatch, mlp, some, proof, lacks):
    monkeypatch.setattr(clean_pass, "proved", proof)
    few = some.take(slice(0, 24))
    finding, _ = finding_and_verdicts(audit(mlp, few, evaluate(mlp, few, CLOSE, ()), size=12))
    assert (finding.status, finding.why) == ("not run", lacks)
