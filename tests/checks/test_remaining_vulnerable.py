"""Capture-recapture against networks whose truth is known: what is said to be left, and what is."""

import pytest
from tests.milp import make_exact_fixture

from holdfast.checks import audit
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.results import sample_size
from holdfast.threat import Threat

# Cascades from hardly any to a good one: what each leaves is what the two runs of an audit are asked about.
CASCADES = {
    "published alone": (),
    "three steps": (Stage("three steps", "pgd", "scaled_log_odds", settings={"steps": 3}),),
    "quick": SUITES["quick"],
}


@pytest.fixture(scope="module")
def audits():
    """(plan, cascade) -> (truth, audit)."""
    split, found = make_exact_fixture.digits(), {}
    for truth in make_exact_fixture.load():
        data, threat = split.test.take(truth.rows), Threat("linf", truth.plan.eps)
        for name, stages in CASCADES.items():
            evaluation = evaluate(truth.model, data, threat, stages, trained_with=truth.plan.loss)
            audited = audit(truth.model, data, evaluation, trained_with=truth.plan.loss)
            found[truth.plan.name, name] = truth, audited
    return found


def left(truth, audited):
    """Truly breakable samples that stand after the audit: those of unknown status may go either way."""
    survives = audited.evaluation.robust
    return int((survives & truth.broken).sum()), int((survives & ~truth.robust).sum())


def test_the_interval_covers_the_truth_in_nine_of_ten_cases(audits):
    covered = []
    for truth, audited in audits.values():
        least, most = left(truth, audited)
        covered.append(audited.remaining.low <= most and least <= audited.remaining.high)
    assert len(covered) >= 30
    assert sum(covered) >= 0.9 * len(covered)


def test_no_adversarial_example_is_claimed_for_a_sample_proved_robust(audits):
    for truth, audited in audits.values():
        assert bool(audited.evaluation.robust[truth.robust].all())


def test_an_audit_leaves_little_of_what_is_breakable(audits):
    """Over all networks, what stands after an audit is within a point of the truth, whatever cascade came before."""
    for name in CASCADES:
        pairs = [pair for (_, cascade), pair in audits.items() if cascade == name]
        n = sum(len(truth.rows) for truth, _ in pairs)
        assert sum(left(truth, audited)[0] for truth, audited in pairs) <= 0.01 * n


def test_no_check_accuses_a_network_whose_robustness_is_proved_to_be_what_was_found(audits):
    """The honest ones fire nothing after a good cascade; void checks are silent on all, after any."""
    for (plan, cascade), (_, audited) in audits.items():
        honest = plan.startswith(("sce-seed", "sce-decay", "at")) and cascade == "quick"
        fired = [finding.name for finding in audited.findings if finding.fires and (honest or finding.void)]
        assert not fired, (plan, cascade)


def test_what_was_left_for_more_runs_to_break_is_said(audits):
    """Of the network with large logits nothing fell to the published protocol: more runs help, and are said to."""
    fired = {finding.name for finding in audits["sce-times100", "published alone"][1].findings if finding.fires}
    assert "more steps and restarts do not help" in fired


def test_an_audit_tests_as_many_survivors_as_the_precision_needs(audits):
    """Where a run breaks one of them, all that the checks look at; never more than survive."""
    for truth, audited in audits.values():
        left = audited.remaining
        needed = sample_size(left.survivors, len(truth.rows))
        broken = left.first + left.second - left.both
        assert left.tested in {needed, left.survivors}
        assert left.tested == needed or broken > 0


def test_a_tighter_precision_tests_more_survivors():
    split, truth = make_exact_fixture.digits(), make_exact_fixture.load()[0]
    data, threat = split.test, Threat("linf", truth.plan.eps)
    tested = {}
    for precision in (0.001, 0.01, 0.1):
        evaluation = evaluate(truth.model, data, threat, "quick", trained_with=truth.plan.loss, precision=precision)
        left = audit(truth.model, data, evaluation, trained_with=truth.plan.loss).remaining
        tested[precision] = left.tested
        assert left.expected <= precision * len(data) or left.tested == left.survivors
    assert tested[0.001] > tested[0.01] > tested[0.1] > 0
