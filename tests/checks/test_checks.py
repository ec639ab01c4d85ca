"""The trust checks: verdicts by rule, what fires on which faulty model, silence on an honest network, nothing lost."""

import copy
import json
import math
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.faults.faulty_models import FAULTY
from tests.helpers import shorten_audits
from torch import nn

from holdfast import checks, data, models
from holdfast.checks import CHECKS, PGD50, ROBUST, Claim, audit, judge, lower_bound_99, merge, name_of, result_of
from holdfast.checks.cache import load_audit, save_audit
from holdfast.errors import UserError
from holdfast.evaluation import UNBROKEN, evaluate
from holdfast.evaluation.suites import SUITES
from holdfast.io import decode
from holdfast.losses import isce, sce
from holdfast.noise import Noise
from holdfast.objectives import standard
from holdfast.outputs import as_outputs
from holdfast.results import Finding, Remaining, remaining_vulnerable
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

THREAT = Threat("linf", 0.1)


@pytest.fixture(scope="module")
def split():
    return data.load("digits")


@pytest.fixture(scope="module")
def honest(split):
    model = models.build("smallconv", split.shape, 10)
    fit(model, split.train, split.val, standard(sce), FitConfig(epochs=10, batch_size=64, lr=3e-3), device="cpu")
    return model.eval()


@pytest.fixture(scope="module")
def some(split):
    return split.test.take(slice(0, 90))


def evaluate_and_audit(model, some, suite="quick", **more):
    return audit(model, some, evaluate(model, some, THREAT, suite), **more)


def fires(audited):
    return {finding.name for finding in audited.findings if finding.fires}


@pytest.fixture(scope="module")
def clean_evaluation(honest, some):
    """The honest network after the suite "quick", before any audit."""
    return evaluate(honest, some, THREAT, "quick")


@pytest.fixture(scope="module")
def clean_audit(honest, some, clean_evaluation):
    return audit(honest, some, clean_evaluation)


@pytest.fixture(scope="module")
def faulty_audit(honest, some):
    """(faulty model, severity) -> its audit, made once. The honest network is copied, so that it stays as it is."""

    @cache
    def audited(faulty, severity):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            if faulty not in ("decoy_gradient", "plateau", "remembers", "honest_at_first"):  # RayS catches, or counts
                shorten_audits(patch)
            return evaluate_and_audit(FAULTY[faulty].make(copy.deepcopy(honest), severity).eval(), some, size=32)

    return audited


# Rules.


def finding(name="a check", *, status="fires", k=5, n=10, threshold=0.1, void=False, claims=(PGD50, ROBUST), **more):
    return Finding(name, status, k, n, threshold, f"{k} of {n}", void, claims, "nobody", **more)


def test_a_claim_is_refuted_by_samples_that_surely_fell():
    correct = [1] * 1000
    assert judge(Claim(PGD50, correct), [1] * 983 + [0] * 17, []).status == "tight"  # 17 of 1,000: low 0.0087
    assert judge(Claim(PGD50, correct), [1] * 980 + [0] * 20, []).status == "refuted"  # 20 of 1,000: low 0.0108
    assert judge(Claim(PGD50, [1] + [0] * 999), [1] + [0] * 999, []).status == "tight"
    why = judge(Claim(PGD50, correct), [1] * 483 + [0] * 517, []).why
    assert why == "51.7 points too high (95% interval 48.6 to 54.8; other attacks broke 517 more of 1000 samples)"


def test_void_comes_before_refuted_and_refuted_before_loose():
    nothing, correct = [0] * 100, [1] * 100
    broken, firing = finding("void one", void=True), finding("loose one")
    assert judge(Claim(ROBUST, correct), correct, [firing, broken]).status == "void"
    assert judge(Claim(PGD50, correct), nothing, [firing]).status == "refuted"
    verdict = judge(Claim(ROBUST, correct), correct, [firing, firing])
    assert verdict.status == "loose"
    assert verdict.why == "5 of 10, and 1 more checks fire"


def test_a_check_speaks_of_its_own_claims_alone():
    firing = finding(claims=(PGD50,))
    assert judge(Claim(ROBUST, [1]), [1], [firing]).status == "tight"
    assert judge(Claim(PGD50, [1]), [1], [firing]).status == "loose"
    assert judge(Claim(PGD50, [1]), [1], [finding(status="holds"), finding(status="not run")]).status == "tight"


def test_what_is_certified_is_exact():
    """Proved on every sample that counts: neither a check nor an estimate takes that back. Void is no proof."""
    firing, correct = finding(), [1, 1, 0]
    certified = {"certified": [True, True, False]}
    assert judge(Claim(ROBUST, correct), correct, [firing], None, **certified).status == "exact"
    assert judge(Claim(PGD50, correct), correct, [firing], **certified).status == "exact"
    assert judge(Claim(ROBUST, correct), correct, [finding(void=True)], **certified).status == "void"
    assert judge(Claim(ROBUST, correct), correct, [], certified=[True, False, False]).status == "tight"
    chance = finding(vacuous=True)  # of a constant prediction, all is proved and nothing is said
    assert judge(Claim(ROBUST, correct), correct, [chance], **certified).status == "loose"
    for harmless in (finding(vacuous=True, status="holds"), finding("clean accuracy is above chance")):
        assert judge(Claim(ROBUST, correct), correct, [harmless], **certified).status == "exact"  # no name is compared
    assert judge(Claim(PGD50, [1] * 3), correct, [], certified=[True, True, False]).status == "tight"  # one fell
    assert judge(Claim(PGD50, [1] * 99), [1] * 66 + [0] * 33, [], certified=[1] * 66 + [0] * 33).status == "refuted"


@pytest.mark.parametrize("certified", [None, [False] * 3])
@pytest.mark.parametrize("claim", [ROBUST, PGD50])
def test_what_no_sample_survives_is_exact(claim, certified):
    """Each has a witness, so nothing is left to prove or to break. Void and chance come first, as for proofs."""
    nothing = [0, 0, 0]
    found = judge(Claim(claim, nothing), nothing, [finding()], certified=certified)
    assert found.status == "exact"
    assert found.why == "each of these 3 samples is misclassified or has an adversarial example"
    assert judge(Claim(claim, nothing), nothing, [finding(void=True)], certified=certified).status == "void"
    assert judge(Claim(claim, nothing), nothing, [finding(vacuous=True)], certified=certified).status == "loose"
    assert judge(Claim(claim, [1, 0, 0]), [1, 0, 0], [], certified=certified).status == "tight"
    assert judge(Claim(claim, [1, 0, 0]), nothing, [], certified=certified).status != "exact"
    assert judge(Claim(claim, []), [], [], certified=[]).status == "tight"


def test_the_same_gap_is_refuted_on_many_samples_and_too_few_to_tell_on_few():
    """56.1 to 54.2 on 360 images, 56.2 to 53.9 on 1,797: the word depends on n, so the sentence says n."""
    few = judge(Claim(PGD50, [1] * 202 + [0] * 158), [1] * 195 + [0] * 165, [])
    assert few.status == "tight"
    assert few.why == (
        "empirical: 1.9 points too high (95% interval 0.8 to 4.0; other attacks broke 7 more of 360 samples), "
        "too few images to tell whether it is more than 1 point"
    )
    many = judge(Claim(PGD50, [1] * 1010 + [0] * 787), [1] * 969 + [0] * 828, [])
    assert (many.status, "too few" in many.why) == ("refuted", False)
    one = judge(Claim(PGD50, [1] * 200 + [0] * 160), [1] * 199 + [0] * 161, [])
    assert "broke 1 more of 360 samples)" in one.why
    assert "too few" not in one.why


def test_a_loose_figure_says_how_far_off_it_is_first():
    """'86.0 loose' stood beside '86.0 tight' for the same samples: the sentence says that they are the same."""
    correct, firing = [1] * 86 + [0] * 14, finding(claims=(PGD50,))
    same = judge(Claim(PGD50, correct), correct, [firing])
    assert (same.status, same.why) == ("loose", "0.0 points too high on 100 samples, but 5 of 10")
    off = judge(Claim(PGD50, correct), [1] * 85 + [0] * 15, [firing])
    assert off.why == (
        "1.0 points too high (95% interval 0.0 to 5.4; other attacks broke 1 more of 100 samples), but 5 of 10"
    )
    assert judge(Claim(ROBUST, correct), correct, [firing]).status == "tight"


def test_what_is_expected_to_remain_makes_a_claim_loose():
    few = Remaining(0.9, 0.0, 4.0, 100, 100, 0, 0, 0)
    many = Remaining(1.1, 0.0, 4.0, 100, 100, 0, 0, 0)
    assert judge(Claim(ROBUST, [1] * 100), [1] * 100, [], few).status == "tight"
    verdict = judge(Claim(ROBUST, [1] * 100), [1] * 100, [], many)
    assert verdict.status == "loose"
    assert verdict.why == "1.1 more of 100 samples are expected to be breakable, at most 4"


@given(st.integers(0, 200), st.integers(1, 200))
def test_surely_is_a_lower_bound(k, n):
    k = min(k, n)
    low = lower_bound_99(k, n)
    assert 0 <= low <= k / n
    # the definition: at this share, k or more of n come up with probability 1%
    if k:
        assert 1 - float(torch.distributions.Binomial(n, torch.tensor(low, dtype=torch.float64)).log_prob(
            torch.arange(k, dtype=torch.float64)).exp().sum()) == pytest.approx(0.01, abs=1e-6)  # fmt: skip


def test_folds_are_counted_together():
    parts = [[finding(k=1, n=10, status="holds")], [finding(k=9, n=10)], [finding(k=0, n=0, status="not run")]]
    (merged,) = merge(parts)
    assert (merged.k, merged.n, merged.status) == (10, 20, "fires")
    assert merge([[finding(status="not run", k=0, n=0)]])[0].status == "not run"
    assert merge([[finding(k=1, n=100, threshold=0.5)], [finding(k=1, n=100, threshold=0.5)]])[0].status == "holds"


def test_a_finding_comes_back_from_json():
    one = finding()
    assert decode(Finding, json.loads(json.dumps(asdict(one))), "it") == one
    assert result_of(one).value == 0.5
    assert result_of(finding(k=0, n=0)).value is None


# What is left.


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 60), st.integers(0, 500))
@settings(deadline=None)
def test_the_remainder_is_an_interval(first, second, both, more, untested):
    both = min(first, second, both)
    tested = first + second - both + more
    left = remaining_vulnerable(first, second, both, tested, tested + untested)
    assert 0 <= left.low <= left.high <= more + untested
    assert left.low <= left.expected <= more + untested
    assert remaining_vulnerable(second, first, both, tested, tested + untested).expected == pytest.approx(left.expected)


def test_nothing_found_in_more_samples_leaves_less_in_proportion():
    shares = [remaining_vulnerable(0, 0, 0, n, n).high / n for n in (10, 100, 1000)]
    assert shares == sorted(shares, reverse=True)
    assert remaining_vulnerable(0, 0, 0, 0, 50).expected > remaining_vulnerable(0, 0, 0, 50, 50).expected
    assert remaining_vulnerable(0, 0, 0, 0, 0).high == 0


def test_the_remainder_of_two_runs_that_agree_is_small_and_of_two_that_do_not_is_large():
    agree, differ = remaining_vulnerable(10, 10, 10, 100, 100), remaining_vulnerable(10, 10, 1, 100, 100)
    assert agree.expected < 0.5
    assert differ.expected > 15


def test_the_interval_covers_what_is_simulated():
    """Runs that find each breakable sample with probabilities drawn anew: the interval holds the truth."""
    chance = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        m = int(torch.randint(0, 40, (), generator=chance))
        p, q = torch.rand(2, generator=chance)
        a, b = torch.rand(m, generator=chance) < p, torch.rand(m, generator=chance) < q
        left = remaining_vulnerable(int(a.sum()), int(b.sum()), int((a & b).sum()), 100, 100)
        covered += left.low <= m - int((a | b).sum()) <= left.high
    assert covered >= 270


@pytest.mark.parametrize("bad", [(1, 1, 2, 5, 5), (3, 3, 0, 5, 9), (0, 0, 0, 6, 5), (-1, 0, 0, 5, 5)])
def test_impossible_counts_are_refused(bad):
    with pytest.raises(UserError, match="remaining_vulnerable expects"):
        remaining_vulnerable(*bad)


# An honest network.


def test_no_check_fires_on_an_honest_network(clean_audit):
    assert fires(clean_audit) == set()
    ran = [finding.status for finding in clean_audit.findings]
    assert ran.count("not run") <= 3  # transfer lacks a source, onnxruntime a file, and no bound may prove a sample


def test_every_check_says_what_it_is():
    names = [name_of(check) for check in CHECKS]
    assert len(set(names)) == len(names) >= 20
    for check in CHECKS:
        assert (check.function.__doc__ or "").strip().endswith((".", ")."))
        assert set(check.claims) <= {PGD50, ROBUST}
        assert check.source
    (informs,) = (name_of(check) for check in CHECKS if not check.claims)
    assert informs == "gradients of the training loss are not zero"  # no figure rests on an attack on it


def test_an_audit_is_repeatable_and_leaves_the_model_as_it_was(honest, some, clean_audit):
    honest.train()
    before = copy.deepcopy(honest.state_dict())
    again = evaluate_and_audit(honest, some)
    assert again.findings == clean_audit.findings
    assert again.remaining == clean_audit.remaining
    assert again.measures == clean_audit.measures
    assert honest.training
    assert all(p.requires_grad for p in honest.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in honest.state_dict().items())
    honest.eval()


def test_what_an_audit_breaks_is_kept_as_a_witness(honest, some):
    saturated = FAULTY["logit_scale"].make(honest, 1e4)
    lax = evaluate(saturated, some, THREAT, ())  # the published protocol alone, which stands still there
    audited = audit(saturated, some, lax)
    kept, number = audited.evaluation, len(lax.stages)
    new = kept.broken_by == number
    assert audited.cost.broken == int(new.sum()) > 0
    assert kept.stages[-1].name == "audit"
    assert bool((lax.broken_by[new] == UNBROKEN).all())
    x = data.pixels(some.x)
    assert bool((THREAT.violation(kept.x_adv, x) == 0).all())
    with torch.no_grad():
        wrong = as_outputs(honest(kept.x_adv[new])).logits.argmax(1) != some.y[new]
    assert bool(wrong.all())
    assert torch.equal(kept.broken_by[~new], lax.broken_by[~new])


def test_an_audit_comes_back_from_its_record(clean_evaluation, clean_audit, tmp_path):
    save_audit(tmp_path / "audit.safetensors", "key", clean_audit)
    back = load_audit(tmp_path / "audit.safetensors", "key", clean_evaluation)
    assert back.findings == clean_audit.findings
    assert [one.name for one in back.findings if one.vacuous] == ["clean accuracy is above chance"]
    assert back.remaining == clean_audit.remaining
    assert torch.equal(back.evaluation.x_adv, clean_audit.evaluation.x_adv)
    assert torch.equal(back.evaluation.broken_by, clean_audit.evaluation.broken_by)
    assert load_audit(tmp_path / "audit.safetensors", "another", clean_evaluation) is None
    assert load_audit(tmp_path / "missing.safetensors", "key", clean_evaluation) is None


def test_findings_are_stored_under_what_follows_from_them(monkeypatch):
    """A record from before a check made proofs vacuous is not read: its verdict could be a proof of nothing."""
    before = checks.identity_of_checks()
    others = [replace(check, vacuous=False) for check in CHECKS]
    monkeypatch.setattr("holdfast.checks.CHECKS", tuple(others))
    assert checks.identity_of_checks() != before


def test_an_audit_is_of_the_samples_that_were_evaluated(honest, split, clean_evaluation):
    with pytest.raises(UserError, match="other samples"):
        audit(honest, split.test.take(slice(1, 91)), clean_evaluation)


def test_a_network_that_is_never_right_has_nothing_to_check_but_that(some):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        wrong = data.Data(
            some.x, (as_outputs(model(data.pixels(some.x))).logits.argmax(1) + 1) % 10, some.index, some.classes
        )
    audited = evaluate_and_audit(model, wrong)
    assert {finding.name for finding in audited.findings if finding.status != "not run"} == {
        "clean accuracy is above chance"
    }
    assert audited.remaining.high == 0
    assert audited.verdict().status == "loose"


def test_a_function_is_audited_too(honest, some):
    audited = evaluate_and_audit(lambda x: honest(x).logits, some)
    assert fires(audited) == set()
    statuses = {finding.name: finding.status for finding in audited.findings}
    assert statuses["float64 changes nothing"] == "not run"


def test_an_audit_says_what_each_claim_is_worth(clean_audit, faulty_audit):
    assert clean_audit.verdict().status == "tight"
    faulty = faulty_audit("logit_scale", 1e4)
    assert faulty.verdict("pgd50").status == "refuted"
    with pytest.raises(UserError, match="unknown claim 'own'"):
        faulty.verdict("own")
    twice = checks.remaining([clean_audit, clean_audit])
    left = clean_audit.remaining
    assert (twice.tested, twice.survivors) == (2 * left.tested, 2 * left.survivors)


# Faulty models.


@pytest.mark.parametrize(
    ("faulty", "severity", "check", "void"),
    [
        ("logit_scale", 1e4, "gradients of cross entropy are not zero", False),
        ("logit_scale", 1e4, "the choice of score agrees", False),
        ("logit_scale", 1e4, "a temperature changes nothing", False),
        ("softmax_output", 1.0, "outputs are logits", False),
        ("half_logits", 1.0, "arithmetic is float32", False),
        ("half_network", 2.0, "arithmetic is float32", False),
        ("quantised_input", 4.0, "gradients of the score are not zero", False),
        ("quantised_input", 4.0, "a huge eps leaves nothing", False),
        ("quantised_input", 16.0, "gradients predict slopes", False),
        ("quantised_input", 4.0, "hidden adversarial examples are found", False),
        ("shattered", 1e-1, "gradients predict slopes", False),
        ("detached_graph", 1.0, "gradients predict slopes", False),
        ("gradient_flip", 0.5, "gradients predict slopes", False),
        ("gradient_flip", 1.0, "hidden adversarial examples are found", False),
        ("decoy_gradient", 1.0, "labels alone break no survivor", False),
        ("decoy_gradient", 1.0, "descending the score breaks no survivor", False),
        ("off_grid", 1.0, "answers agree on and off the 8 bit grid", False),
        ("noise", 0.05, "outputs are repeatable", False),
        ("dropout", 0.3, "outputs are repeatable", False),
        ("train_batch_norm", 1.0, "outputs do not depend on batch mates", True),
        ("keeps_state", 1e-2, "the model is left as it was", True),
        ("nan_midway", 10.0, "outputs are finite", True),
        ("nan_off_grid", 0.1, "outputs are finite", True),
        ("remembers", 0.21, "a copy that was never queried answers alike", True),
        ("honest_alone", 1.0, "outputs do not depend on batch mates", True),
        ("honest_alone", 32.0, "outputs do not depend on batch mates", True),
        ("honest_at_first", 300.0, "outputs are repeatable", True),
        ("gradient_mode", 1.0, "outputs do not depend on the gradient mode", True),
        ("gradient_mode", 2.0, "outputs do not depend on the gradient mode", True),
        ("batch1_raises", 1.0, "outputs do not depend on batch mates", True),  # and no job ends
        ("plateau", 0.1, "margins are continuous", False),
        ("plateau", 1.0, "margins are continuous", False),
        ("plateau", 1.0, "labels alone break no survivor", False),
    ],
)
def test_faulty_models_are_caught(faulty_audit, faulty, severity, check, void):
    audited = faulty_audit(faulty, severity)
    assert check in fires(audited)
    robust = audited.evaluation.robust.tolist()
    verdicts = {judge(Claim(name, robust), robust, audited.findings).status for name in (PGD50, ROBUST)}
    assert verdicts == {"void"} if void else "loose" in verdicts


def answers(model, some):
    """Logits and the gradient of their square at clean images and beside them."""
    x = data.pixels(some.x)
    x = torch.cat([x, THREAT.random_start(x, Noise(0, some.index))]).requires_grad_()
    z = as_outputs(model(x)).logits
    return torch.cat([z, torch.autograd.grad(z.square().sum(), x)[0].flatten(1)], 1)


@pytest.mark.parametrize("faulty", sorted(FAULTY))
def test_a_faulty_model_at_a_harmless_severity_is_not_accused(honest, some, faulty):
    """Most are the honest network itself then, on which no check fires."""
    for severity in FAULTY[faulty].harmless:
        model = FAULTY[faulty].make(copy.deepcopy(honest), severity).eval()
        if not torch.equal(answers(model, some), answers(honest, some)):
            assert fires(evaluate_and_audit(model, some)) == set()


@pytest.mark.parametrize(
    ("faulty", "severity", "said"),
    [
        ("wrong_shape", 1.0, r"must return \(N, K\) logits"),
        ("wrong_shape", 2.0, "with logits of shape"),
        ("nan_midway", 0.0, "clean logits are NaN or infinite"),
    ],
)
def test_what_cannot_be_measured_is_an_error_that_says_so(honest, some, faulty, severity, said):
    model = FAULTY[faulty].make(copy.deepcopy(honest), severity).eval()
    with pytest.raises(UserError, match=said):
        evaluate_and_audit(model, some)


def test_a_model_on_another_device_is_an_error_that_says_so(some):
    away = nn.Linear(64, 10, device="meta")
    with pytest.raises(UserError, match=r"meta"):
        evaluate(lambda x: away(x.flatten(1)), some, THREAT, "quick")


def test_saturation_by_training_is_refuted_by_the_bench_alone(split, some):
    model = models.build("smallconv", split.shape, 10)
    loss = lambda out, y: isce(out, y, s=100.0)  # noqa: E731
    fit(model, split.train, split.val, standard(loss), FitConfig(epochs=10, batch_size=64, lr=3e-3), device="cpu")
    found = evaluate(model, split.test, THREAT, "quick")
    audited = audit(model, split.test, found)
    robust = audited.evaluation.robust.tolist()
    assert judge(Claim(PGD50, found.pgd50.tolist()), robust, audited.findings).status == "refuted"
    assert judge(Claim(ROBUST, robust), robust, audited.findings).status == "tight"
    assert {"gradients of cross entropy are not zero", "the choice of score agrees"} <= fires(audited)
    assert audited.measures.zero_gradient > 0.3
    assert math.isfinite(audited.measures.input_margin)


def test_images_of_a_twin_are_tried(honest, some, clean_evaluation):
    """A network that hides its gradients from the white box falls to images made on the one it was made from."""
    model = FAULTY["quantised_input"].make(copy.deepcopy(honest), 8.0).eval()
    gradients_only = (SUITES["quick"][0],)
    found = evaluate(model, some, THREAT, gradients_only)
    audited = audit(model, some, found, transfer_source=clean_evaluation.x_adv)
    assert "transfer is not stronger" in fires(audited)
