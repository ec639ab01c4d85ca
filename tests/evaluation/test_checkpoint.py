"""Checkpoints: an interrupted evaluation resumes and repeats nothing; foreign and damaged files are refused."""

from __future__ import annotations

import pytest
import torch
from tests.evaluation.helpers import (
    CLOSE,
    FEW,
    PER_ATTACK,
    THREAT,
    Interrupt,
    case,
    differing_columns,
    interrupt_after,
    numbers,
    toy,
)

from holdfast.attacks import ATTACKS, AttackEntry
from holdfast.errors import UserError
from holdfast.evaluation import Budget, checkpoint, evaluate, load_x_adv, proofs
from holdfast.evaluation.suites import Stage
from holdfast.io import load_tensors, save_tensors
from holdfast.threat import Threat


@pytest.mark.parametrize("batches", [1, 4, 6])
def test_an_interrupted_evaluation_resumes_from_its_checkpoint(unproved, save_every_batch, tmp_path, batches):
    few = {"suite": FEW, "batch_size": 3}
    model, samples = toy()
    whole = evaluate(model, samples, THREAT, **few)
    total = (model.forwards, model.backwards)
    model, path = toy()[0], tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupt):
        evaluate(model, samples, THREAT, **few, checkpoint=path, key="k", progress=interrupt_after(batches))
    before = model.forwards
    assert path.exists()
    resumed = evaluate(model, samples, THREAT, **few, checkpoint=path, key="k")
    assert differing_columns(whole, resumed) == []
    assert (model.forwards, model.backwards) == total, "work was repeated"
    assert model.forwards > before
    # all but the seconds agree
    for a, b in zip(whole.stages, resumed.stages, strict=True):
        assert (a.name, a.attacked, a.broken, a.forwards, a.backwards, a.outside) == (
            b.name, b.attacked, b.broken, b.forwards, b.backwards, b.outside,
        )  # fmt: skip


@pytest.mark.parametrize("sizes", [(16, 4), (4, 16), (4, 7)])
def test_a_batch_size_that_changes_leaves_no_target_out(monkeypatch, unproved, save_every_batch, tmp_path, sizes):
    """A stage attacks as many targets at once as a batch has room for."""
    seen = set()

    def probe(model, x, y, threat, *, score, noise, target):
        seen.update(zip(y.tolist(), target.tolist(), strict=True))
        return x

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    data, logits = numbers([0.1, 0.3, 0.5, 0.7], [0, 1, 2, 3]), 9 * torch.eye(4)

    def model(x):
        return logits[(x.flatten(1)[:, 0] * 5).long()]

    suite, path = (Stage("probe", "probe", targets=9),), tmp_path / "checkpoint.safetensors"
    resume = {"pgd50": 0, "checkpoint": path, "key": "k"}
    for batches in (1, 1):
        with pytest.raises(Interrupt):
            evaluate(model, data, THREAT, suite, **resume, batch_size=sizes[0], progress=interrupt_after(batches))
    evaluate(model, data, THREAT, suite, **resume, batch_size=sizes[1])
    assert seen == {(y, target) for y in range(4) for target in range(4) if target != y}


def test_many_interruptions_give_the_same_result(unproved, save_every_batch, tmp_path):
    net, samples, threat = case(n=30)
    few, path = {"suite": FEW, "batch_size": 8, "key": "k"}, tmp_path / "checkpoint.safetensors"
    whole = evaluate(net, samples, threat, **few)
    interruptions, resumed = 0, None
    while resumed is None:
        try:
            resumed = evaluate(net, samples, threat, **few, checkpoint=path, progress=interrupt_after(1))
        except Interrupt:
            interruptions += 1
            assert interruptions < 60, "no progress"
    assert interruptions > 8
    assert differing_columns(whole, resumed) == []


def test_a_finished_checkpoint_gives_the_result(tmp_path):
    model, samples = toy()
    path = tmp_path / "checkpoint.safetensors"
    first = evaluate(model, samples, THREAT, FEW, checkpoint=path, key="k")
    done = model.forwards
    again = evaluate(model, samples, THREAT, FEW, checkpoint=path, key="k")
    assert model.forwards == done
    assert differing_columns(first, again) == []
    assert first.stages == again.stages
    assert torch.equal(load_x_adv(path), first.x_adv)


OTHER = {
    "key": {"key": "other"},
    "eps": {"threat": Threat("linf", 0.2)},
    "norm": {"threat": Threat("l2", 0.1)},
    "box": {"threat": Threat("linf", 0.1, -1.0, 1.0)},
    "seed": {"seed": 1},
    "a stage less": {"suite": FEW[:1]},
    "the order of stages": {"suite": (FEW[1], FEW[0], FEW[2])},
    "settings of a stage": {"suite": (Stage("apgd", "apgd", "scaled_log_odds", settings={"steps": 60}), *FEW[1:])},
    "score of a stage": {"suite": (Stage("apgd", "apgd", "margin", settings={"steps": 6}), *FEW[1:])},
    "attack of a stage": {"suite": (Stage("apgd", "pgd", "scaled_log_odds", settings={"steps": 6}), *FEW[1:])},
    "targets of a stage": {
        "suite": (FEW[0], Stage("apgd-dlr-t", "apgd", "dlr", targets=3, settings={"steps": 4}), FEW[2])
    },
}


@pytest.mark.parametrize("other", list(OTHER))
def test_a_checkpoint_of_another_evaluation_is_refused(tmp_path, other):
    model, samples = toy()
    path = tmp_path / "checkpoint.safetensors"
    first = {"threat": THREAT, "suite": FEW, "key": "k", "checkpoint": path}
    evaluate(model, samples, **first)
    kept = path.read_bytes()
    with pytest.raises(UserError, match=r"belongs to another evaluation\..*Name another folder"):
        evaluate(model, samples, **{**first, **OTHER[other]})
    assert path.read_bytes() == kept


def test_a_checkpoint_of_other_samples_is_refused(tmp_path):
    model, samples = toy()
    path = tmp_path / "checkpoint.safetensors"
    evaluate(model, samples, THREAT, FEW, checkpoint=path, key="k")
    with pytest.raises(UserError, match="belongs to another evaluation"):
        evaluate(model, samples.take(slice(0, 5)), THREAT, FEW, checkpoint=path, key="k")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_checkpoint_is_an_error(tmp_path, left):
    model, samples = toy()
    path = tmp_path / "checkpoint.safetensors"
    evaluate(model, samples, THREAT, FEW, checkpoint=path, key="k")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match="cut short or damaged"):
        evaluate(model, samples, THREAT, FEW, checkpoint=path, key="k")


def test_a_file_that_is_not_a_checkpoint_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors(path, "model", 1, {"w": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="not a holdfast evaluation checkpoint"):
        evaluate(*toy(), THREAT, FEW, checkpoint=path)


def test_certificates_and_columns_are_in_the_checkpoint(monkeypatch, save_every_batch, mlp, some, tmp_path):
    few = {"suite": PER_ATTACK[:4], "batch_size": 30, "key": "k", "checkpoint": tmp_path / "checkpoint.safetensors"}
    whole = evaluate(mlp, some, CLOSE, few["suite"], batch_size=30)
    calls = []
    real = proofs.certified
    monkeypatch.setattr(proofs, "certified", lambda *args: calls.append(1) or real(*args))
    interruptions, again = 0, None
    while again is None:
        try:
            again = evaluate(mlp, some, CLOSE, **few, progress=interrupt_after(1))
        except Interrupt:
            interruptions += 1
            assert interruptions < 60
    assert interruptions >= 4
    assert len(calls) == 1, "certified once, however often interrupted"
    assert torch.equal(again.certified, whole.certified)
    assert list(again.attack_correct) == list(whole.attack_correct)
    assert all(torch.equal(again.attack_correct[name], whole.attack_correct[name]) for name in whole.attack_correct)


def test_what_was_proved_when_a_kill_came_stays_proved(monkeypatch, save_every_batch, mlp, some, tmp_path):
    """Stronger methods take their samples in parts; a kill costs one of them."""
    monkeypatch.setattr(proofs, "PART", 1)
    monkeypatch.setattr(proofs, "PART_SECONDS", 0.0)
    threat, few = Threat("linf", 0.08), {"suite": (), "proofs": "alpha", "key": "k"}
    whole = evaluate(mlp, some, threat, **few)
    asked, real = [], proofs.certified

    def counted(task, rows, *more):
        if len(asked) == 2:
            raise Interrupt
        asked.append(rows.tolist())
        return real(task, rows, *more)

    monkeypatch.setattr(proofs, "certified", counted)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupt):
        evaluate(mlp, some, threat, **few, checkpoint=path)
    first, asked[:] = asked[1], [[]] * 3
    again = evaluate(mlp, some, threat, **few, checkpoint=path)
    assert asked[3:]
    assert not {row for rows in asked for row in rows} & set(first)
    assert torch.equal(again.proved_by, whole.proved_by)
    assert [(cost.method, cost.tried, cost.proved) for cost in again.proofs] == [
        (cost.method, cost.tried, cost.proved) for cost in whole.proofs
    ]


def test_what_branch_and_bound_decided_when_a_kill_came_stays_decided(
    monkeypatch, save_every_batch, mlp, some, tmp_path
):
    few = {"suite": (), "proofs": "branch", "key": "k", "budget": Budget(seconds=3600.0)}
    case, path = (mlp, some.take(slice(0, 45)), Threat("linf", 0.1)), tmp_path / "checkpoint.safetensors"
    asked, real = [], proofs.certified

    def counted(task, rows, method, *more):
        if method == "branch":
            if len(asked) == 2:
                raise Interrupt
            asked.append(int(rows[0]))
        return real(task, rows, method, *more)

    monkeypatch.setattr(proofs, "certified", counted)
    with pytest.raises(Interrupt):
        evaluate(*case, **few, checkpoint=path)
    first, asked[:] = [*asked], [None] * 3
    again = evaluate(*case, **few, checkpoint=path)
    assert asked[3:]
    assert not set(asked) & set(first)
    assert again.stages[-1].attacked == len({*first, *asked[3:]})
    assert torch.equal(again.certified, again.robust)
    assert again.proofs[-1].broken == again.stages[-1].broken


def test_a_checkpoint_without_methods_of_proof_is_resumed(mlp, some, tmp_path):
    path, few = tmp_path / "checkpoint.safetensors", {"suite": (), "proofs": "alpha", "key": "k"}
    whole = evaluate(mlp, some, CLOSE, **few, checkpoint=path)
    tensors, about = load_tensors(path, checkpoint.NAME, checkpoint.VERSION)
    del tensors["proved_by"], tensors["tried"], about["state"]["proofs"]
    for done in (True, False):
        about["state"]["proved"] = done
        save_tensors(path, checkpoint.NAME, checkpoint.VERSION, tensors, about, packed=["x_adv"])
        old = evaluate(mlp, some, CLOSE, **few, checkpoint=path)
        assert torch.equal(old.certified, whole.certified)
        assert (old.proved_by, old.proofs) == (None, ())


def test_a_checkpoint_of_an_older_version_is_refused(mlp, some, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    evaluate(mlp, some, CLOSE, (), checkpoint=path, key="k")
    tensors, about = load_tensors(path, checkpoint.NAME, checkpoint.VERSION)
    save_tensors(path, checkpoint.NAME, 3, tensors, about)
    with pytest.raises(
        UserError, match=r"evaluation checkpoint of version 3; this holdfast reads version 5.*new folder"
    ):
        evaluate(mlp, some, CLOSE, (), checkpoint=path, key="k")
