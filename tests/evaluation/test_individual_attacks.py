"""Certificates, and attacks that stand alone: what the columns hold, kept on disk, shared, believed with care."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.evaluation.test_evaluate import THREAT, Stop, Threshold, numbers, stop_after
from tests.helpers import on_digits
from torch import nn

import holdfast.evaluation as module
from holdfast import data
from holdfast.attacks import ATTACKS, PGD50, PGD50_TRAIN_LOSS, SUITES, AttackEntry, Stage
from holdfast.checks import PGD50 as ON_PUBLISHED
from holdfast.checks import ROBUST, Claim, audit, judge
from holdfast.errors import UserError
from holdfast.evaluation import Budget, cascade, evaluate
from holdfast.experiments.collect import NetworkResult, collect
from holdfast.io import load_tensors, save_tensors
from holdfast.outputs import fooled
from holdfast.threat import Threat

COLUMNS = ["pgd10", "pgd10-targeted", "pgd50", "pgd50-targeted", "cw"]
CLOSE = Threat("linf", 0.02)  # intervals prove some of the digits here, and attacks break some
PROTOCOLS = SUITES["protocols"][:5]
CHECK = "certified samples stand"


@pytest.fixture(scope="module")
def net():
    made, split = on_digits(lambda: (nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)), lr=5e-3, epochs=6)
    return made, split


@pytest.fixture(scope="module")
def some(net):
    return net[1].test.take(slice(0, 90))


@pytest.fixture(scope="module")
def found(net, some):
    return evaluate(net[0], some, CLOSE, "protocols")


def share(column):
    return float(column.double().mean())


# -------------------------------------------------------------------------------------- attacks that stand alone


def test_the_protocols_are_columns_in_their_order(net, some, found):
    assert list(found.individual) == COLUMNS
    for name, right in found.individual.items():
        assert right.shape == found.clean.shape
        assert not (right & ~found.clean).any(), name
        assert not (found.robust & ~right).any(), "what it broke is broken"
    stages = {stage.name: stage for stage in found.stages}
    n = int(found.clean.sum())
    assert all(stages[name].attacked == n for name in COLUMNS), "survivors and fallen alike"
    assert 0.05 < share(found.robust) < share(found.clean)


def test_the_published_protocol_by_another_name_is_not_run_twice(found):
    assert torch.equal(found.individual["pgd50"], found.pgd50)
    assert [stage.name for stage in found.stages].count("pgd50") == 1
    assert found.stages[1].name == "pgd50"


def test_a_column_is_what_the_attack_alone_leaves(net, some, found):
    """The same attack by itself, on all samples, in another company."""
    for stage in PROTOCOLS:
        if stage.name != "pgd50":
            alone = evaluate(net[0], some, CLOSE, (stage,), batch_size=37).individual
            assert list(alone) == ["pgd50", stage.name]
            assert float((alone[stage.name] == found.individual[stage.name]).double().mean()) >= 0.99, stage.name


def test_more_steps_and_fewer_aims_break_more(net):
    """On the whole test set: of a targeted attack only one wrong class in nine is the aim."""
    alone = evaluate(net[0], net[1].test, Threat("linf", 0.05), PROTOCOLS).individual
    assert share(alone["pgd50"]) <= share(alone["pgd10"]) + 0.01
    assert share(alone["pgd10-targeted"]) > share(alone["pgd10"]) + 0.05
    assert share(alone["pgd50-targeted"]) > share(alone["pgd50"]) + 0.05
    assert abs(share(alone["cw"]) - share(alone["pgd50"])) < 0.06


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_carlini_and_wagner_in_this_length_is_nearly_as_good_as_in_full(net, some, norm, eps):
    full = replace(PROTOCOLS[-1], name="full", settings={})
    alone = evaluate(net[0], some, Threat(norm, eps), (PROTOCOLS[-1], full)).individual
    assert share(alone["cw"]) <= share(alone["full"]) + 0.04


def test_a_norm_without_an_attack_has_no_column_of_it(net, some):
    alone = evaluate(net[0], some.take(slice(0, 8)), Threat("l1", 0.3), PROTOCOLS).individual
    assert list(alone) == COLUMNS[:-1]


def test_the_published_and_the_own_loss_keep_their_fields(net, some):
    e = evaluate(net[0], some.take(slice(0, 8)), CLOSE, (PGD50_TRAIN_LOSS,))
    assert e.own is not None
    assert e.individual == {}
    e = evaluate(net[0], some.take(slice(0, 8)), CLOSE, (PGD50_TRAIN_LOSS, PROTOCOLS[0], PGD50))
    assert list(e.individual) == ["own loss", "pgd10", "pgd50"]
    assert torch.equal(e.individual["own loss"], e.own)
    assert torch.equal(e.individual["pgd50"], e.pgd50)
    assert [stage.name for stage in e.stages] == ["clean", "pgd50", "own loss", "pgd10"]


def aimed(monkeypatch, samples, model, stage, **more):
    """index -> the class that each sample was steered to."""
    seen = {}

    def probe(model, x, y, threat, *, score, noise, target):
        seen.update(zip(noise.index.tolist(), target.tolist(), strict=True))
        return x

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    evaluate(model, samples, CLOSE, (replace(stage, attack="probe", score="u", settings={}, step=None),), **more)
    return seen


def test_random_targets_are_wrong_classes_all_as_likely_and_the_samples_own(monkeypatch, net):
    samples = net[1].test
    seen = aimed(monkeypatch, samples, net[0], PROTOCOLS[1])
    y = dict(zip(samples.index.tolist(), samples.y.tolist(), strict=True))
    assert len(seen) > 300
    assert all(0 <= t < 10 and t != y[i] for i, t in seen.items())
    after = torch.tensor([(t - y[i]) % 10 for i, t in seen.items()])  # 1 .. 9, uniform
    counts = after.bincount(minlength=10)[1:].double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 26.1  # chi squared, 8 df, p = 0.001
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    assert aimed(monkeypatch, samples.take(order), net[0], PROTOCOLS[3], batch_size=50) == seen
    assert aimed(monkeypatch, samples, net[0], PROTOCOLS[1], seed=1) != seen
    two = aimed(monkeypatch, numbers([0.9, 0.1], [0, 1]), Threshold(), PROTOCOLS[1])
    assert two == {0: 1, 1: 0}


def test_a_targeted_attack_counts_any_mistake(monkeypatch):
    """Class 0 turns into 2 whatever the aim is: with the aim 1 it is a mistake all the same."""

    def model(x):
        p = x.flatten(1)[:, :1]
        return torch.cat([p - 0.5, -9 + p * 0, 0.5 - p], 1)

    def drop(model, x, y, threat, *, score, noise, target):
        return x - 0.1

    monkeypatch.setitem(ATTACKS, "drop", AttackEntry(drop, "a test"))
    stage = Stage("drop", "drop", "u", individual=True, target="random")
    e = evaluate(model, numbers([0.55] * 20 + [0.9]), THREAT, (stage,))
    assert set(e.prediction_adv[:20].tolist()) == {2}
    assert e.individual["drop"].tolist() == [False] * 20 + [True]


def test_names_and_targets_that_cannot_be(net, some):
    with pytest.raises(UserError, match=r"unknown target of a stage 'randon'\. Did you mean 'random'"):
        Stage("a", "pgd", target="randon")
    with pytest.raises(UserError, match="stage 'a': give it a random target or the likeliest 3, not both"):
        Stage("a", "pgd", target="random", targets=3)
    twice = (PROTOCOLS[0], replace(PROTOCOLS[1], name="pgd10"))
    with pytest.raises(UserError, match="two stages that stand alone are called 'pgd10'"):
        evaluate(net[0], some, CLOSE, twice)
    with pytest.raises(UserError, match="'pgd50' names the published protocol"):
        evaluate(net[0], some, CLOSE, (replace(PROTOCOLS[0], name="pgd50"),))


def test_a_budget_finishes_a_column_or_leaves_it_out(net, some):
    """A column that was cut short would hold what was never attacked to be right."""
    few = Budget(passes=100)
    e = evaluate(net[0], some, CLOSE, PROTOCOLS[:2], budget=few)
    assert list(e.individual) == ["pgd50", "pgd10", "pgd10-targeted"]
    assert {stage.attacked for stage in e.stages[1:4]} == {int(e.clean.sum())}
    e = evaluate(net[0], some, CLOSE, (Stage("sweep", "apgd", settings={"steps": 50}), *PROTOCOLS[:2]), budget=few)
    assert list(e.individual) == ["pgd50"]
    assert e.unfinished
    e = evaluate(net[0], some, CLOSE, (Stage("sweep", "apgd", settings={"steps": 50}), PGD50_TRAIN_LOSS), budget=few)
    assert e.own is None


# -------------------------------------------------------------------------------------------------- certificates


def test_certified_samples_are_right_and_stand(net, some, found):
    assert found.certified.dtype == torch.bool
    assert 0 < int(found.certified.sum()) < int(found.robust.sum())
    assert not (found.certified & ~found.clean).any()
    assert not (found.certified & ~found.robust).any()
    sweep = next(stage for stage in found.stages if stage.name == "sweep")
    assert sweep.attacked == int(torch.stack(list(found.individual.values())).all(0).sum()), (
        "proved or not, all are attacked"
    )
    parts = evaluate(net[0], some, CLOSE, (), batch_size=7)
    assert torch.equal(parts.certified, found.certified)
    wide = evaluate(net[0], some.take(slice(0, 20)), Threat("linf", 0.5), ())
    assert wide.certified.tolist() == [False] * 20


def test_what_cannot_be_bounded_has_no_certificate(net, some):
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.randn(len(x), 10)

    few = some.take(slice(0, 12))
    assert evaluate(lambda x: net[0](x), few, CLOSE, ()).certified is None
    e = evaluate(Noisy(*net[0]), few, CLOSE, ())
    assert e.votes > 1
    assert e.certified is None


def test_a_proof_of_a_wrong_sample_is_none(monkeypatch, net, some):
    monkeypatch.setattr(cascade, "certify", lambda model, x, y, threat: torch.ones_like(y, dtype=torch.bool))
    labelled = data.Data(some.x, (some.y + (some.index % 2)) % 10, some.index)
    e = evaluate(net[0], labelled, CLOSE, ())
    assert torch.equal(e.certified, e.clean)


def test_the_certificate_and_the_columns_are_kept_in_the_record(monkeypatch, net, some, tmp_path):
    save = module.Cascade.save
    monkeypatch.setattr(module.Cascade, "save", lambda self, *, force=False: save(self, force=True))
    few = {"suite": PROTOCOLS[:4], "batch_size": 30, "key": "k", "record": tmp_path / "record.safetensors"}
    whole = evaluate(net[0], some, CLOSE, few["suite"], batch_size=30)
    calls = []
    real = cascade.certify
    monkeypatch.setattr(cascade, "certify", lambda *args: calls.append(1) or real(*args))
    kills, again = 0, None
    while again is None:
        try:
            again = evaluate(net[0], some, CLOSE, **few, progress=stop_after(1))
        except Stop:
            kills += 1
            assert kills < 60
    assert kills >= 8
    assert len(calls) == 1, "proved once, whatever was killed"
    assert torch.equal(again.certified, whole.certified)
    assert list(again.individual) == list(whole.individual)
    assert all(torch.equal(again.individual[name], whole.individual[name]) for name in whole.individual)


def test_a_record_of_an_older_version_is_refused(net, some, tmp_path):
    record = tmp_path / "record.safetensors"
    evaluate(net[0], some, CLOSE, (), record=record, key="k")
    tensors, about = load_tensors(record, cascade.RECORD, cascade.RECORD_VERSION)
    save_tensors(record, cascade.RECORD, 2, tensors, about)
    with pytest.raises(UserError, match=r"evaluation record of version 2; this holdfast reads version 3.*new folder"):
        evaluate(net[0], some, CLOSE, (), record=record, key="k")


# ----------------------------------------------------------------------------------------------------- the check


def answer(judged):
    """What the check says, and the verdicts."""
    (one,) = (finding for finding in judged.findings if finding.name == CHECK)
    claims = (Claim(ROBUST, judged.evaluation.robust), Claim(ON_PUBLISHED, judged.evaluation.pgd50))
    return one, [judge(claim, judged.evaluation.robust.tolist(), judged.findings).status for claim in claims]


def test_a_certificate_that_holds_is_told_and_voids_nothing(net, some, found):
    one, verdicts = answer(audit(net[0], some, found, size=24))
    assert (one.status, one.k, one.n) == ("holds", 0, int(found.certified.sum()))
    assert "void" not in verdicts


def test_a_certificate_that_attacks_contradict_voids_both_claims(monkeypatch, net, some):
    monkeypatch.setattr(cascade, "certify", lambda model, x, y, threat: y < 5)
    lie = evaluate(net[0], some, CLOSE, "quick")
    one, verdicts = answer(audit(net[0], some, lie, size=24))
    broken = int((lie.certified & ~lie.robust).sum())
    assert broken > 0
    assert (one.status, one.k, one.n) == ("fires", broken, int(lie.certified.sum()))
    assert verdicts == ["void", "void"]
    assert f"{broken} of {one.n} samples that are proved to stand were broken" in one.why


def test_one_broken_sample_is_enough_and_a_check_may_be_what_breaks_it(monkeypatch, net, some):
    """The evaluation holds no attack but the published one, made harmless: what falls, falls to the audit."""
    monkeypatch.setattr(cascade, "certify", lambda model, x, y, threat: torch.ones_like(y, dtype=torch.bool))
    monkeypatch.setitem(ATTACKS, "pgd", replace(ATTACKS["pgd"], attack=lambda model, x, y, threat, **_: x))
    idle = evaluate(net[0], some, CLOSE, ())
    assert torch.equal(idle.certified, idle.robust)
    monkeypatch.undo()
    judged = audit(net[0], some, idle, size=24)
    one, verdicts = answer(judged)
    assert one.k == judged.cost.broken > 0
    assert verdicts == ["void", "void"]


@pytest.mark.parametrize(
    ("proof", "lacks"),
    [
        (lambda model, x, y, threat: None, "there is no certificate: no bound of the network is known"),
        (lambda model, x, y, threat: y < 0, "there is no certificate: no sample is proved to stand"),
    ],
)
def test_without_a_certificate_the_check_says_what_is_missing(monkeypatch, net, some, proof, lacks):
    monkeypatch.setattr(cascade, "certify", proof)
    few = some.take(slice(0, 24))
    one, _ = answer(audit(net[0], few, evaluate(net[0], few, CLOSE, ()), size=12))
    assert (one.status, one.why) == ("not run", lacks)


# -------------------------------------------------------------------------------------------- results, processes


def test_folds_are_put_together(net, some, tmp_path):
    split = net[1]
    parts = [replace(split, test=some.take(rows)) for rows in (slice(0, 40), slice(40, 90))]
    trained = {"accuracy": 1.0, "val": 1.0, "seconds": 0.0}

    def put(certify):
        found = []
        for part in parts:
            e = evaluate(net[0], part.test, CLOSE, PROTOCOLS[:3])
            found.append(e if certify(part) else replace(e, certified=None))
        judged = [NetworkResult("sce", 0, tmp_path, e, trained, part, {}) for e, part in zip(found, parts, strict=True)]
        return found, collect(judged, tmp_path, "digits", {}, "a test").runs[0]

    found, run = put(lambda part: True)
    proved = torch.cat([e.certified for e in found])
    assert run.certified.value == share(proved)
    assert run.samples.certified == tuple(proved.int().tolist())
    assert list(run.individual) == COLUMNS[:3]
    for name, figure in run.individual.items():
        assert figure.value == share(torch.cat([e.individual[name] for e in found]))
    assert run.individual["pgd50"] == run.pgd50
    assert run.certified.value <= run.robust.value
    _, run = put(lambda part: part is parts[0])  # a fold without a bound: no figure of the whole
    assert run.certified is None
    assert run.samples.certified is None


SHARED = """
import sys, torch
from torch import distributed
sys.path.insert(0, {tests!r})
from tests.evaluation.test_individual_attacks import CLOSE, PROTOCOLS, on_digits
from torch import nn
from holdfast.evaluation import evaluate
from holdfast.io import save_tensors
from pathlib import Path
torch.set_num_threads(1)
distributed.init_process_group("gloo")
net, split = on_digits(lambda: (nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)), lr=5e-3, epochs=6)
out = Path({out!r})
some = split.test.take(slice(0, 90))
e = evaluate(net, some, CLOSE, PROTOCOLS, batch_size=16, record=out / "r.safetensors")
columns = {{"certified": e.certified, "robust": e.robust, **e.individual}}
save_tensors(out / f"answer{{distributed.get_rank()}}.safetensors", "answer", 1, columns, {{}})
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_agree_on_certificates_and_columns(net, some, tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(tests=str(Path(__file__).parents[2]), out=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    one = evaluate(net[0], some, CLOSE, PROTOCOLS, batch_size=16)
    wanted = {"certified": one.certified, "robust": one.robust, **one.individual}
    for _ in range(2):  # the second time from the records of the first
        subprocess.run([*launch, str(script)], check=True, capture_output=True, timeout=300)
        for rank in (0, 1):
            answers = load_tensors(tmp_path / f"answer{rank}.safetensors", "answer", 1)[0]
            assert set(answers) == set(wanted)
            for name, column in wanted.items():
                assert torch.equal(answers[name], column), (rank, name)


def test_a_witness_of_every_broken_sample_holds(net, some, found):
    """What an attack alone breaks is a witness like any other."""
    broken = found.broken_by >= 0
    with torch.no_grad():
        assert bool(fooled(net[0](found.x_adv[broken]), some.y[broken]).all())
    assert bool((CLOSE.violation(found.x_adv, data.pixels(some.x)) == 0).all())
    for name, right in found.individual.items():
        assert bool(broken[found.clean & ~right].all()), name
