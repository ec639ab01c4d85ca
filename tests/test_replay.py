"""Contracts of replay: it recounts all that is shown, names what it cannot recount, and no forged figure holds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tests.helpers import HARM, VALUES, one_sentence, places, put
from torch import nn

from holdfast import results, run_folder
from holdfast.errors import UserError
from holdfast.evaluation import Budget
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.experiments.config import Comparison, Job
from holdfast.experiments.evaluate_model import evaluate_model, from_run
from holdfast.experiments.training import train_network
from holdfast.io import load_tensors, save_tensors
from holdfast.replay import WITNESSES, WITNESSES_VERSION, replay
from holdfast.train import FitConfig


@pytest.fixture
def out(evaluated_run, tmp_path):
    """The evaluation of a run, which is the folder around it."""
    return shutil.copytree(evaluated_run, tmp_path / "run") / "evaluation"


def change(out, *path, to):
    """Put another value into results.json."""
    raw = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(put(raw, path, to)))


def figure(k, n=12):
    return {"value": k / n, "low": 0.0, "high": 1.0}


def test_it_holds_and_says_what_it_did_not_check(out):
    (one,) = replay(out)
    run = results.load(out).runs[0]
    assert one.holds
    assert one.reported == run.robust.value == pytest.approx(one.bound)
    assert any("verdict" in line for line in one.not_rechecked)
    assert any("PGD-50" in line for line in one.not_rechecked)


def forged(name, k):
    return lambda out: change(out, "runs", 0, *name, to=figure(k))


def column(name, value):
    def forge(out):
        raw = json.loads((out / "results.json").read_text())
        change(out, "runs", 0, "samples", name, to=[value] * len(raw["runs"][0]["samples"]["index"]))

    return forge


def all_pgd50(out):
    """PGD-50 broke nothing, in the figure and in its column."""
    raw = json.loads((out / "results.json").read_text())
    clean = raw["runs"][0]["samples"]["clean"]
    change(out, "runs", 0, "samples", "pgd50", to=clean)
    change(out, "runs", 0, "attacks", "pgd50", to=figure(sum(clean)))


def all_certified(out):
    raw = json.loads((out / "results.json").read_text())
    clean = raw["runs"][0]["samples"]["clean"]
    change(out, "runs", 0, "samples", "certified", to=clean)
    change(out, "runs", 0, "certified", to=figure(sum(clean)))


def no_network(out):
    path = out / "witnesses.safetensors"
    save_tensors(path, WITNESSES, WITNESSES_VERSION, {}, {"networks": []})


def another_run(out):
    change(out, "runs", 0, "name", to="a network that does not exist")


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (forged(("clean",), 3), "clean accuracy is reported as 25.0%, recounted"),
        (forged(("attacks", "pgd50"), 12), "PGD-50 accuracy is reported as 100.0%, its column gives"),
        (all_pgd50, "PGD-50's answer"),
        (forged(("robust",), 12), "robust accuracy is reported as 100.0%"),
        (lambda out: change(out, "runs", 0, "robust", to=None), "robust accuracy is missing"),
        (all_certified, "certificate"),
        (forged(("certified",), 12), "certified accuracy is reported as 100.0%"),
        (lambda out: change(out, "runs", 0, "robust", "low", to=0.0), "the interval of robust accuracy"),
        (lambda out: change(out, "runs", 0, "clean", "high", to=1.0), "the interval of clean accuracy"),
        (lambda out: change(out, "runs", 0, "verdict", "status", to="exact"), "survivors are not proved"),
        (column("y", 3), "the label"),
        (column("clean", 1), "the clean answer"),
        (column("robust", 1), "the robust column"),
        (column("index", 0), "the samples in results.json are not those"),
        (lambda out: change(out, "runs", 0, "samples", to=None), None),
        (lambda out: change(out, "runs", 0, "loss", to="isce:s=100"), "the folder of its network says sce"),
        (lambda out: change(out, "runs", 0, "seed", to=7), "the seed is reported as 7"),
        (lambda out: change(out, "data", "classes", 0, to="cat"), "the classes of the data"),
        (lambda out: change(out, "data", "fingerprint", to="0"), "the fingerprint of the data"),
        (lambda out: change(out, "runs", 0, "remaining", "expected", to=0.0), "may still be breakable 0.0"),
        (lambda out: change(out, "runs", 0, "remaining", "high", to=0.0), "may still be breakable"),
        (lambda out: change(out, "runs", 0, "remaining", "survivors", to=0), "the survivors of the estimate"),
        (lambda out: change(out, "runs", 0, "remaining", "survivors", to=10**12), "the survivors of the estimate"),
        (lambda out: change(out, "runs", 0, "remaining", "tested", to=10**6), "contradict each other"),
        (lambda out: change(out, "runs", 0, "remaining", "first", to=9), "than the"),
        (lambda out: change(out, "runs", 0, "remaining", to=None), "is missing, though there are checks"),
        (lambda out: change(out, "runs", 0, "stages", 1, "broken", to=0), "what the stages broke"),
        (column("margin", 99.0), "the margin"),
        (column("prediction", 3), "the prediction"),
        (no_network, "names no network for this run"),
        (another_run, "names no network for this run"),
    ],
)  # fmt: skip
def test_a_forged_figure_does_not_hold(forge, message, out):
    forge(out)
    (one,) = replay(out)
    if message is None:
        assert any("PGD-50, since" in line for line in one.not_rechecked)
        return
    assert not one.holds
    assert any(message in line for line in one.problems), one.problems


def test_no_runs_and_no_network_fail_with_a_reason(out, holdfast_):
    status, said, err = holdfast_("replay", out)
    assert (status, err) == (0, "")
    assert ": holds" in said
    assert "not re-checked: " in said
    another_run(out)
    status, said, _ = holdfast_("replay", out)
    assert status == 1
    assert "FAILS (witnesses.safetensors names no network" in said
    change(out, "runs", to=[])
    status, said, _ = holdfast_("replay", out)
    assert status == 1
    assert "holds no runs" in said
    assert ": holds" not in said


def test_a_void_run_is_recounted_too(out, holdfast_):
    change(out, "runs", 0, "robust", to=None)
    change(out, "runs", 0, "verdict", to={"status": "void", "why": "a reason"})
    assert replay(out)[0].holds
    change(out, "runs", 0, "clean", to=figure(3))
    assert not replay(out)[0].holds
    assert holdfast_("replay", out)[0] == 1


def trained_mlp(folder):
    """The run folder of a network that branch and bound decides in moments."""
    fit = FitConfig(epochs=3, batch_size=64, lr=3e-3)
    comparison = Comparison(losses=("sce",), model="mlp:width=16", folds=1, fit=fit).checked()
    train_network(Job(comparison, comparison.loss_specs[0], 0, 0, folder))
    return folder


def test_certificates_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 2}),))
    out = trained_mlp(tmp_path / "run") / "evaluation"
    found = evaluate_model(from_run(tmp_path / "run", limit=20), "linf:0.002", "tiny", out)
    certified = round(found.runs[0].certified.value * 20)
    assert 0 < certified < 20
    (one,) = replay(out)
    assert one.holds
    assert one.certified == certified
    column = [int(value) for value in found.runs[0].samples.certified]
    column[column.index(0)] = 1
    change(out, "runs", 0, "samples", "certified", to=column)
    change(out, "runs", 0, "certified", to=figure(certified + 1, 20))
    assert any("certificate" in line for line in replay(out)[0].problems)


def test_certificates_of_stronger_methods_are_made_again(evaluated_run, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 2}),))
    run = shutil.copytree(evaluated_run, tmp_path / "run")
    out = run / "alpha"
    found = evaluate_model(from_run(run, limit=12), "linf:0.03", "tiny", out, proofs="alpha").runs[0]
    assert {"crown", "alpha"} & set(found.samples.proved_by)
    (one,) = replay(out)
    assert one.holds, one.problems
    assert one.certified == sum(found.samples.certified)
    raw = json.loads((out / "results.json").read_text())
    names = list(found.samples.proved_by)
    change(out, "runs", 0, "samples", "proved_by", to=["alpha" if name else "" for name in names])
    assert any("methods of proof" in line for line in replay(out)[0].problems)
    change(out, "runs", 0, "samples", "proved_by", to=["alpha"] * len(names))
    assert any("the method of proof of" in line for line in replay(out)[0].problems)
    del raw["runs"][0]["samples"]["proved_by"], raw["runs"][0]["proofs"]  # as older files are
    (out / "results.json").write_text(json.dumps({**raw, "schema": 4}))
    assert replay(out)[0].holds


def test_what_branch_and_bound_proved_and_broke_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "none", ())
    run = trained_mlp(tmp_path / "run")
    out, budget = run / "branch", Budget.parse("1min")
    with pytest.raises(UserError, match="budget of time"):
        evaluate_model(from_run(run, limit=40), "linf:0.05", "none", out, proofs="branch")
    assert not out.exists()
    found = evaluate_model(from_run(run, limit=40), "linf:0.05", "none", out, proofs="branch", budget=budget).runs[0]
    assert found.verdict.status == "exact"
    assert found.between == 0
    assert "branch" in found.samples.proved_by
    names = [stage.name for stage in found.stages]
    assert found.samples.stage.count(names.index("branch and bound")) > 0
    (one,) = replay(out)
    assert one.holds, one.problems
    assert one.certified == sum(found.samples.certified)
    wrong = [name or "branch" for name in found.samples.proved_by]  # all of them, by branch and bound
    change(out, "runs", 0, "samples", "proved_by", to=wrong)
    change(out, "runs", 0, "samples", "certified", to=[1] * 40)
    assert any("the certificate of" in line for line in replay(out)[0].problems)


def test_no_network_is_asked_about_no_images(out, monkeypatch):
    """Where nothing was broken there is nothing to ask: x.view(x.size(0), -1) has no answer for an empty batch."""

    class Strict(nn.Module):
        def forward(self, x):
            assert len(x)
            return torch.zeros(len(x), 10)

    real = run_folder.load
    monkeypatch.setattr(run_folder, "load", lambda *a, **k: (Strict(), real(*a, **k)[1]))
    path = out / "witnesses.safetensors"
    tensors, about = load_tensors(path, WITNESSES, WITNESSES_VERSION)
    save_tensors(path, WITNESSES, WITNESSES_VERSION, {name: t[:0] for name, t in tensors.items()}, about)
    assert not replay(out)[0].holds


# Harmed files.


def smaller(raw):
    """Without the long free parts, whose every place need not be tried."""
    run = {**raw["runs"][0], "checks": raw["runs"][0]["checks"][:1], "examples": raw["runs"][0]["examples"][:1]}
    return {**raw, "runs": [run]}


def test_a_harmed_results_file_is_one_sentence(out, monkeypatch):
    raw = smaller(json.loads((out / "results.json").read_text()))
    skip = {"region", "projection", "stages", "measures", "train"}
    tried = [path for path in places(raw) if not skip & set(path)]
    content = [*HARM, *(json.dumps(put(raw, path, value)).encode() for path in tried for value in VALUES)]
    monkeypatch.setattr(run_folder, "load", lambda *_, **__: pytest.fail("not needed"))
    for harm in content:
        (out / "results.json").write_bytes(harm)
        one_sentence(lambda: results.load(out), f"results.json: {harm[:200]!r}")


@pytest.mark.parametrize("part", ["region", "projection", "measures", "train", "cost", "data", "environment"])
def test_a_page_of_harmed_results_is_one_sentence(part, out, holdfast_):
    raw = smaller(json.loads((out / "results.json").read_text()))
    where = (part,) if part in raw else ("runs", 0, part)
    below = raw[part] if part in raw else raw["runs"][0][part]
    for path in [(), *((key,) for key in below)][:8]:
        value = {"x": "y"} if path else "x"
        (out / "results.json").write_text(json.dumps(put(raw, (*where, *path), value)))
        status, _, err = holdfast_("report", out, "-q")
        assert status in (0, 2)
        assert "Traceback" not in err
        if status == 2:
            assert len(err.splitlines()) == 1, err
            assert err.startswith("error: ")


def test_votes_without_end_are_refused(out):
    change(out, "runs", 0, "remaining", "votes", to=10**9)
    with pytest.raises(UserError, match=r"results\.json: votes must be 1 to 1000"):
        replay(out)


@pytest.mark.parametrize("eps", [None, 0, -1, "x", 10**40])
def test_a_threat_that_is_none_is_refused(eps, out):
    change(out, "runs", 0, "threat", "eps", to=eps)
    if eps == 10**40:
        assert not replay(out)[0].holds
        return
    with pytest.raises(UserError, match=r"eps|threat"):
        replay(out)


def test_a_harmed_header_of_the_witnesses_is_one_sentence(out):
    path = out / "witnesses.safetensors"
    tensors, about = load_tensors(path, WITNESSES, WITNESSES_VERSION)
    for where in places(about):
        for value in VALUES:
            save_tensors(path, WITNESSES, WITNESSES_VERSION, tensors, {"about": put(about, where, value)}["about"])
            one_sentence(lambda: replay(out), f"{where}: {value}")
    for name in tensors:
        for harm in (torch.zeros(2), torch.zeros(0), torch.zeros(3, 3).long(), tensors[name][:1].flatten(), None):
            harmed = {**tensors, name: harm} if harm is not None else {k: t for k, t in tensors.items() if k != name}
            save_tensors(path, WITNESSES, WITNESSES_VERSION, harmed, about)
            one_sentence(lambda: replay(out), f"{name}: {harm}")


@pytest.mark.parametrize("name", ["evaluation", "result", "audit", "region"])
def test_a_harmed_cache_is_made_again_or_one_sentence(name, out, monkeypatch):
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 3}),))
    path = out / f"{name}.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.io._check_sum", lambda *_: None)
        kinds = {"evaluation": ("evaluation checkpoint", 5), "result": ("network result", 3),
                 "audit": ("audit cache", 2), "region": ("region cache", 2)}  # fmt: skip
        kind, version = kinds[name]
        tensors, about = load_tensors(path, kind, version)
    if name != "result":
        (out / "result.safetensors").unlink()

    def again():
        evaluate_model(from_run(out.parent, limit=12), "linf:0.1", "tiny", out)

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    one_sentence(again, name)
    for key in list(about):
        save_tensors(path, kind, version, tensors, {**about, key: []})
        one_sentence(again, f"{name}, {key}")
    for key in list(tensors)[:4]:
        save_tensors(path, kind, version, {**tensors, key: tensors[key][:-1]}, about)
        one_sentence(again, f"{name}, {key} shorter")
        save_tensors(path, kind, version, {k: t for k, t in tensors.items() if k != key}, about)
        one_sentence(again, f"{name} without {key}")
