"""Contracts of compare and replay: every image evaluated once, work done once, bounds that are checked or refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil

import pytest
import torch
from sklearn.datasets import load_digits
from tests.helpers import write_parquet
from tests.results.factory import make_projection, make_region

from holdfast import results, run_folder
from holdfast.data import load, readers
from holdfast.errors import UserError
from holdfast.evaluation import evaluate, load_x_adv
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.experiments import compare as comparing
from holdfast.experiments import pipeline, training
from holdfast.experiments.compare import cache_folder, compare, run_job, stored_results
from holdfast.experiments.config import Comparison, Job, default_out
from holdfast.experiments.evaluate_model import evaluate_model, from_run
from holdfast.experiments.training import train_network
from holdfast.io import load_tensors, save_tensors
from holdfast.progress import NETWORK_DONE
from holdfast.region import distances, measures
from holdfast.replay import WITNESSES, WITNESSES_VERSION, replay
from holdfast.threat import Threat
from holdfast.train import FitConfig
from holdfast.witnesses import Witnesses

FIT = FitConfig(epochs=3, batch_size=50, lr=3e-3)
TINY = Comparison(losses=("sce", "isce:s=10"), suite="tiny", folds=2, limit_train=200, fit=FIT)
STAGES = (
    Stage("apgd", "apgd", settings={"steps": 4}),
    Stage("apgd-dlr-t", "apgd", "dlr", targets=2, settings={"steps": 3}),
)
PROOFS = ("certified", "proved_by")
SAMPLE_COLUMNS = [field.name for field in dataclasses.fields(results.Samples) if field.name not in PROOFS]


def evaluate_run(run, threat, suite, out):
    return evaluate_model(from_run(run), threat, suite, out)


N = 400  # of the digits, in this file: what is tested holds of any number


@pytest.fixture(scope="module", autouse=True)
def tiny_suite():
    images, labels = readers._digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "tiny", STAGES)
        patch.setattr(readers, "_digits", lambda: (images[:N], labels[:N]))
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(results, folder) of the tiny comparison. Copy the folder before you change it."""
    out = tmp_path_factory.mktemp("compare") / "out"
    return compare(TINY, out, command="holdfast compare --tiny"), out


@pytest.fixture
def copied(original, tmp_path):
    shutil.copytree(original[1], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Some digits as a parquet folder with a test split of 60."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return write_parquet(tmp_path / "data", 200, 60)


def by_loss(found, loss):
    return next(run for run in found.runs if run.loss == loss)


def witnesses_of(folder):
    return load_tensors(folder / "witnesses.safetensors", WITNESSES, WITNESSES_VERSION)


def rewrite(folder, tensors, about):
    save_tensors(folder / "witnesses.safetensors", WITNESSES, WITNESSES_VERSION, tensors, about)


def test_every_image_is_judged_once_for_every_loss(original):
    found, out = original
    assert results.load(out) == results.load(out / "results.json") == found
    assert [(run.loss, run.seed, run.n) for run in found.runs] == [("sce", 0, N), ("isce:s=10", 0, N)]
    for run in found.runs:
        assert sorted(run.samples.index) == list(range(N))
        assert len(results.rows(found)) == 2
        assert run.train.networks == 2
    truth = load_digits().target
    for run in found.runs:
        assert [truth[i] for i in run.samples.index] == list(run.samples.y)
    assert by_loss(found, "sce").samples.index == by_loss(found, "isce:s=10").samples.index  # paired


def test_the_columns_tell_one_story(original):
    for run in original[0].runs:
        s = run.samples
        clean, published, robust, stage = (torch.tensor(c) for c in (s.clean, s.pgd50, s.robust, s.stage))
        assert bool((robust <= published).all())
        assert bool((published <= clean).all())
        assert torch.equal(clean.bool(), torch.tensor(s.prediction) == torch.tensor(s.y))
        assert torch.equal(stage == -2, clean == 0)
        assert torch.equal(stage == -1, robust == 1)
        for name in ("clean", "pgd50", "robust"):
            column, interval = getattr(s, name), getattr(run, name)
            assert interval == results.proportion(sum(column), run.n)
        assert run.robust.value <= run.pgd50.value <= run.clean.value
        assert run.clean.value > 0.3
        margin, margin_adv = torch.tensor(s.margin), torch.tensor(s.margin_adv)
        assert bool(((margin > 0) == (clean == 1))[margin != 0].all())
        assert bool((margin_adv <= margin + 1e-4).all())
        broken = stage >= 0
        assert bool((margin_adv[broken] <= 0).all())
        assert bool((margin_adv[robust == 1] >= 0).all())
        # stages: 0 is the clean pass; each later one broke as many as its number stands beside
        assert run.stages[0].name == "clean"
        assert [st.name for st in run.stages[1:]] == ["pgd50", "apgd", "apgd-dlr-t", "audit", "region"]
        for number, st in enumerate(run.stages[1:], 1):
            assert st.broken == int((stage == number).sum()), st.name
        assert run.cost.forwards == sum(st.forwards for st in run.stages)
        assert run.cost.backwards == sum(st.backwards for st in run.stages)


def test_the_json_has_the_promised_fields(original):
    raw = json.loads((original[1] / "results.json").read_text())
    assert raw["schema"] == 6
    for run in raw["runs"]:
        wanted = {"name", "loss", "seed", "threat", "n", "clean", "attacks", "robust", "verdict", "checks", "cost"}
        assert wanted <= set(run)
        assert set(run["threat"]) == {"norm", "eps", "lo", "hi"}
        for interval in (run["clean"], run["attacks"]["pgd50"], run["robust"]):
            assert set(interval) == {"value", "low", "high"}
        assert isinstance(run["checks"], list)
        assert {"forwards", "backwards", "seconds"} <= set(run["cost"])
    assert raw["data"]["n"] == N
    assert raw["data"]["name"] == "digits"
    assert len(raw["data"]["classes"]) == 10
    assert raw["command"] == "holdfast compare --tiny"
    assert raw["settings"]["losses"] == ["sce", "isce:s=10"]
    assert raw["environment"]["torch"] == torch.__version__


def test_examples_are_broken_samples_as_pictures(original):
    import base64

    for run in original[0].runs:
        assert 0 < len(run.examples) <= 6
        where = {index: row for row, index in enumerate(run.samples.index)}
        for example in run.examples:
            assert run.samples.stage[where[example.index]] >= 0
            assert run.samples.y[where[example.index]] == example.y != example.prediction_adv
            for png in (example.x_png, example.x_adv_png, example.delta_png):
                assert base64.b64decode(png).startswith(b"\x89PNG")


def test_the_inference_region_is_measured_in_every_fold(original):
    found, _ = original
    for run in found.runs:
        assert run.region.n == N  # of both folds
        assert len(run.region.distances.distance) == 2 * measures.N_DISTANCES
        assert run.region.space == "features"
        assert 0 <= run.region.two_sample.auc <= 1
        assert run.projection.classes == 10
        assert run.region.s == (10 if run.loss == "isce:s=10" else None)
    column = dict(zip(found.runs[0].samples.index, found.runs[0].samples.clean, strict=True))
    told = found.runs[0].region.distances
    for index, distance in zip(told.index, told.distance, strict=True):
        assert (distance == 0) == (not column[index])  # wrong already: no distance at all


@pytest.mark.parametrize(
    ("most", "sizes"), [(16, [None, 64, 16]), (1, [None, 64, 16, 4, 1]), (0, [None, 64, 16, 4, 1])]
)
def test_where_memory_runs_out_the_region_is_asked_for_in_smaller_batches(most, sizes):
    asked = []

    def measure(batch_size):
        asked.append(batch_size)
        if batch_size is None or batch_size > most:
            raise torch.OutOfMemoryError
        return {"size": batch_size}

    with pytest.raises(torch.OutOfMemoryError) if most == 0 else contextlib.nullcontext():
        assert pipeline._fitting(measure) == {"size": sizes[-1]}
    assert asked == sizes


def test_the_same_again_does_no_work(original, copied, monkeypatch):
    def no(*_, **__):
        pytest.fail("the work was done again")

    monkeypatch.setattr(training, "fit", no)
    monkeypatch.setattr(training.run_folder, "load", no)
    monkeypatch.setattr(comparing, "run_job", no)
    again = compare(TINY, copied, command="holdfast compare --tiny")
    assert again.runs == original[0].runs
    assert again.data == original[0].data


def lose_results(out, *more):
    """Delete every finished result under a comparison's folder, and other files of the cache."""
    for name in ("result.safetensors", *more):
        for path in (out / "runs").glob(f"*/evaluation-*/{name}"):
            path.unlink()


def test_a_damaged_result_is_made_again_from_the_caches(original, copied, monkeypatch):
    for path in (copied / "runs").glob("*/evaluation-*/result.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    monkeypatch.setattr("holdfast.experiments.pipeline.audit", lambda *_, **__: pytest.fail("audited again"))
    assert compare(TINY, copied).runs == original[0].runs


def test_a_damaged_cache_of_the_region_is_measured_again(original, copied):
    lose_results(copied)
    for path in (copied / "runs").glob("*/evaluation-*/region.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    for was, run in zip(original[0].runs, compare(TINY, copied).runs, strict=True):
        assert (run.region, run.projection, run.samples) == (was.region, was.projection, was.samples)


def test_what_the_minimal_attack_breaks_counts(copied, original, monkeypatch):
    lose_results(copied, "region.safetensors")
    with monkeypatch.context() as here:  # it "breaks" each sample at the image itself
        here.setattr(distances, "smallest_perturbation", lambda model, x, y, threat, **_: (x, torch.zeros(len(y))))
        found = compare(TINY, copied).runs
    for was, run in zip(original[0].runs, found, strict=True):
        assert run.stages[-1].broken > 0
        assert sum(run.samples.robust) == sum(was.samples.robust) - run.stages[-1].broken
    assert [run.robust for run in compare(TINY, copied).runs] == [run.robust for run in found]  # read from the record


@pytest.mark.parametrize("votes", [1, 2])
def test_of_what_the_minimal_attack_breaks_only_what_stood_counts(votes, copied, monkeypatch):
    model, _, split = train_network(job(copied / "run"))
    some = split.test.take(slice(0, 60))
    evaluation = dataclasses.replace(evaluate(model, some, Threat("linf", 0.1), STAGES), votes=votes)
    n = len(some)

    def everything(model, x, y, *_, on_witnesses, **__):
        on_witnesses(Witnesses(torch.arange(n), evaluation.x_adv, torch.full((n,), -1.0), y))
        return make_region(passes=results.Passes(3, 2))

    monkeypatch.setattr(pipeline.region, "measure", everything)
    monkeypatch.setattr(pipeline.region, "projection", lambda *_, **__: make_projection())
    survivors = int(evaluation.robust.sum())
    assert 0 < survivors < n
    for _ in range(2):  # measured, then read
        found = pipeline.cached_region(
            model, some, evaluation, s=None, seed=0, path=copied / "region", key=""
        ).evaluation
        assert found.stages[-1].broken == (survivors if votes == 1 else 0)
        assert int(found.robust.sum()) == (0 if votes == 1 else survivors)


def test_what_is_complete_is_skipped_and_the_rest_is_run(original, copied, monkeypatch):
    """Resume is a visible step: only the network whose result is missing runs, and the count starts at the others."""
    lost = copied / "runs" / run_folder.folder_name("isce:s=10", 0, 1)
    (lost / "evaluation-linf0.1" / "result.safetensors").unlink()
    ran, reports = [], []
    monkeypatch.setattr(comparing, "run_job", lambda one, progress: (ran.append(one.name), run_job(one, progress)))
    again = compare(TINY, copied, progress=lambda *report: reports.append(report))
    assert ran == [lost.name]
    assert again.runs == original[0].runs
    ended = [(done, total) for _, what, done, total in reports if what == NETWORK_DONE]
    assert ended == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert reports[-1][0] == lost.name


def test_results_are_read_back_without_a_model(original, monkeypatch):
    found, out = original
    monkeypatch.setattr(run_folder.models, "build", lambda *_, **__: pytest.fail("a model was built"))
    one = TINY.checked().jobs(out)[0]
    (result,) = stored_results(one, one.cut.load("digits"))
    assert result.verdict() is not None
    robust = result.evaluation.robust.int().tolist()
    assert tuple(robust) == by_loss(found, "sce").samples.robust[: len(robust)]


def test_a_result_of_other_weights_is_not_read_back(copied):
    one, two = TINY.checked().jobs(copied)[:2]
    shutil.copy(two.folder / "model.safetensors", one.folder / "model.safetensors")
    assert stored_results(one, one.cut.load("digits")) is None


def test_the_audit_waits_for_the_sce_network_of_the_same_seed_and_fold(original, monkeypatch):
    """Wherever SCE is named, its jobs come first; the others wait for its adversarial examples."""
    _, out = original
    checked = dataclasses.replace(TINY, losses=("isce:s=10", "sce")).checked()
    jobs = checked.jobs(out)
    assert [comparing._transfer_job(one) for one in jobs if one.loss.text == "sce"] == [None, None]
    for one in jobs[::2]:
        sce = comparing._transfer_job(one)
        assert (sce.loss.text, sce.seed, sce.fold) == ("sce", one.seed, one.fold)
    sce, split, threat = comparing._transfer_job(jobs[0]), jobs[0].cut.load("digits"), checked.threats[0]
    waited, ended = [], iter([False, False, True])
    monkeypatch.setattr(comparing, "_is_evaluated", lambda *_: next(ended))
    monkeypatch.setattr(comparing.time, "sleep", waited.append)
    x_adv = comparing._wait_for_x_adv(sce, threat, split, lambda *_: None)
    assert waited == [comparing.POLL] * 2
    assert torch.equal(x_adv, load_x_adv(cache_folder(sce, threat) / "evaluation.safetensors"))
    ran = []
    monkeypatch.setattr(comparing, "stored_results", lambda *_: None)
    monkeypatch.setattr(comparing.process_pool, "run", lambda _, jobs, **__: ran.extend(jobs))
    with pytest.raises(UserError, match="disappeared"):
        compare(dataclasses.replace(TINY, losses=("isce:s=10", "sce")), out.parent / "another")
    assert [one.loss.text for one in ran] == ["sce", "sce", "isce:s=10", "isce:s=10"]


def test_lost_results_are_assembled_from_what_is_there(original, copied):
    for name in ("results.json", "witnesses.safetensors"):
        (copied / name).unlink()
    again = compare(TINY, copied)
    assert [run.samples for run in again.runs] == [run.samples for run in original[0].runs]
    assert [run.robust for run in again.runs] == [run.robust for run in original[0].runs]
    assert all(proof.holds for proof in replay(copied))


@pytest.mark.parametrize(
    "change",
    [
        {"threat": "linf:0.2"}, {"suite": "quick"}, {"folds": 3}, {"limit_train": 100},
        {"objective": "adversarial:steps=2"}, {"model": "mlp"}, {"fit": dataclasses.replace(FIT, epochs=4)},
    ],
)  # fmt: skip
def test_another_comparison_in_the_same_folder_is_refused(change, copied):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"another configuration \(they differ in {next(iter(change))}\)"):
        compare(dataclasses.replace(TINY, **change), copied)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


SMALL = dataclasses.replace(TINY, losses=("isce:s=10",), folds=1, limit=40, limit_train=60)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [({"losses": ("sce",)}, r"the loss 'isce:s=10'"), ({"losses": ("sce", "mmc")}, r"the loss 'isce:s=10'"),
     ({"first_seed": 1}, "the seed 0"),
     ({"first_seed": 1, "seeds": 4, "losses": ("sce",)}, "the loss 'isce:s=10', the seed 0")],
)  # fmt: skip
def test_a_folder_is_not_left_with_fewer_rows_or_seeds(change, lacks, copied):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"holds a comparison with {lacks}, which this one lacks: .* not with fewer"):
        compare(dataclasses.replace(TINY, **change), copied)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


@pytest.mark.parametrize("content", ['{"losses": 3}', '{"losses": [], "seeds": "x"}'])
def test_a_damaged_config_of_a_comparison_is_refused(content, copied):
    (copied / "config.json").write_text(
        json.dumps({**json.loads((copied / "config.json").read_text()), **json.loads(content)})
    )
    with pytest.raises(UserError, match=r"config\.json"):
        compare(TINY, copied)


def ran(monkeypatch):
    """The names of the networks that are run from now on."""
    names = []
    monkeypatch.setattr(comparing, "run_job", lambda one, progress: (names.append(one.name), run_job(one, progress)))
    return names


def test_more_rows_and_seeds_go_on_in_the_folder(original, copied, monkeypatch):
    """What is there is reused; the answer is the one that the whole comparison gives in a folder of its own."""
    names = ran(monkeypatch)
    found = compare(dataclasses.replace(TINY, losses=("isce:s=10", "sce")), copied)
    assert names == []
    assert [run.loss for run in found.runs] == ["isce:s=10", "sce"]
    found = compare(dataclasses.replace(TINY, losses=("mmc", "sce", "isce:s=10")), copied)
    assert names == ["mmc-seed0-fold0", "mmc-seed0-fold1"]
    assert [run.loss for run in found.runs] == ["mmc", "sce", "isce:s=10"]
    assert [run.samples for run in found.runs[1:]] == [run.samples for run in original[0].runs]
    assert json.loads((copied / "config.json").read_text())["losses"] == ["mmc", "sce", "isce:s=10"]
    with pytest.raises(UserError, match="the loss 'mmc', which this one lacks"):
        compare(TINY, copied)
    assert all(proof.holds for proof in replay(copied))


@pytest.mark.usefixtures("short_audits")
def test_seeds_before_and_after_are_added(tmp_path, monkeypatch):
    one = dataclasses.replace(SMALL, first_seed=1)
    before = compare(one, tmp_path)
    names = ran(monkeypatch)
    after = compare(dataclasses.replace(one, first_seed=0, seeds=3), tmp_path)
    assert names == ["isce_s=10-seed0-fold0", "isce_s=10-seed2-fold0"]
    assert [run.seed for run in after.runs] == [0, 1, 2]
    assert after.runs[1].samples == before.runs[0].samples


class Stopped(BaseException):
    """Stands for a kill."""


@pytest.mark.usefixtures("short_audits")
def test_a_row_that_the_sce_network_joins_later_is_audited_with_its_adversarial_examples(tmp_path, monkeypatch):
    """Stopped in between, it goes on; no network is trained or attacked twice, and the end is that of the whole."""
    whole = dataclasses.replace(SMALL, losses=("isce:s=10", "sce"))
    expected = compare(whole, tmp_path / "whole")

    def transfer(found):
        return next(f for f in by_loss(found, "isce:s=10").checks if f.name == "transfer is not stronger")

    first = compare(SMALL, tmp_path / "out")
    assert transfer(first).status == "not run"
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "run_job", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            compare(whole, tmp_path / "out")
    assert [run.loss for run in results.load(tmp_path / "out").runs] == ["isce:s=10"]  # what was there is left
    trained = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *a, **k: (trained.append(k["out"].name), fit(*a, **k))[1])
    with pytest.raises(UserError, match="the loss 'sce', which this one lacks"):
        compare(SMALL, tmp_path / "out")
    found = compare(whole, tmp_path / "out")
    assert trained == ["sce-seed0-fold0"]
    assert [run.samples for run in found.runs] == [run.samples for run in expected.runs]
    assert transfer(found).status == transfer(expected).status == "holds"


def test_two_workers_find_what_one_finds(parquet, tmp_path):
    """In processes of their own, which a patched suite does not reach: so with "quick"."""
    small = dataclasses.replace(TINY, data=parquet, suite="quick", folds=0, limit=24)
    reports = []
    two = compare(small, tmp_path / "two", workers=2, progress=lambda *report: reports.append(report))
    one = compare(small, tmp_path / "one", workers=1)
    for a, b in zip(one.runs, two.runs, strict=True):
        assert a.samples.certified == b.samples.certified
        assert a.samples.proved_by == b.samples.proved_by
        for column in SAMPLE_COLUMNS:
            mine, theirs = (torch.tensor(getattr(run.samples, column)) for run in (a, b))
            if column.startswith("margin"):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)
            else:
                assert (mine != theirs).float().mean() <= 0.005, column
    ended = [(job, done, total) for job, what, done, total in reports if what == NETWORK_DONE]
    assert [(done, total) for _, done, total in ended] == [(1, 2), (2, 2)]
    assert {job for job, *_ in ended} == {path.name for path in (tmp_path / "two" / "runs").iterdir()}
    assert {job for job, *_ in reports} == {job for job, *_ in ended}
    assert all(0 <= done <= total for _, _, done, total in reports)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_comes_out_as_it_is(workers, parquet, tmp_path):
    """One network's folder is somebody else's: the message is the user's, not a pool's."""
    theirs = tmp_path / "out" / "runs" / run_folder.folder_name("isce:s=10", 0, 0)
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text('{"fit": "another"}')
    with pytest.raises(UserError, match=r"isce_s=10-seed0-fold0 holds a run with another configuration"):
        compare(dataclasses.replace(TINY, data=parquet, suite="quick", folds=0), tmp_path / "out", workers=workers)


def test_seeds_are_networks_of_their_own(tmp_path):
    comparison = dataclasses.replace(
        TINY, losses=("sce",), seeds=2, folds=1, limit=30, limit_train=50, fit=dataclasses.replace(FIT, epochs=1)
    )
    found = compare(comparison, tmp_path)
    assert [(run.loss, run.seed) for run in found.runs] == [("sce", 0), ("sce", 1)]
    assert found.runs[0].samples.prediction != found.runs[1].samples.prediction
    assert len(results.rows(found)) == 1
    assert results.rows(found)[0].interval == "mean and 95% t interval over 2 seeds"
    assert all(proof.holds for proof in replay(tmp_path))
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_settings_are_chosen_on_validation_images_and_evaluated_on_fresh_seeds(tmp_path):
    comparison = dataclasses.replace(
        TINY, losses=("sce",), folds=1, seeds=2, first_seed=3, eval_split="val", fit=dataclasses.replace(FIT, epochs=1)
    )
    found = compare(comparison, tmp_path)
    split = load("digits", limit_train=200)
    assert [run.seed for run in found.runs] == [3, 4]
    assert sorted(found.runs[0].samples.index) == sorted(split.val.index.tolist())
    assert found.data["name"] == "digits, validation images"
    assert all(proof.holds for proof in replay(tmp_path))
    subject = from_run(next((tmp_path / "runs").iterdir()))  # the same network, evaluated alone: on test images
    assert subject.split.fingerprint == load("digits").fingerprint


# Refusals: before anything is trained, and before the folder is anybody's.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": ("sce", "mmc", "sce")}, r"the loss 'sce' is named twice"),
        ({"losses": ("sce", " sce ")}, r"the loss 'sce' is named twice"),
        ({"losses": ()}, r"loss"),
        ({"losses": ("icse",)}, r"Did you mean 'isce'"),
        ({"losses": ("isce:s=-1",)}, r">= 0"),
        ({"threat": "linf"}, r"cannot read the threat 'linf'"),
        ({"threat": "linf:0"}, r"eps must be a positive"),
        ({"threat": "linf:-0.1"}, r"eps must be a positive"),
        ({"threat": "l3:0.1"}, r"unknown norm 'l3'"),
        ({"suite": "quik"}, r"unknown suite 'quik'\. Did you mean 'quick'"),
        ({"objective": "adversrial"}, r"unknown objective 'adversrial'\. Did you mean 'adversarial'"),
        ({"objective": "adversarial:step=3"}, r"Did you mean 'steps'"),
        ({"objective": "standard:steps=3"}, r"unknown setting"),
        ({"objective": "adversarial:steps=many"}, r"steps of objective 'adversarial' must be a number"),
        ({"objective": "adversarial:steps=2.5"}, r"steps"),
        ({"objective": "adversarial:steps=0"}, r"steps"),
        ({"objective": "adversarial:step_size=big"}, r"step_size"),
        ({"objective": "adversarial:score=u"}, r"score"),
        ({"model": "smalconv"}, r"unknown model 'smalconv'\. Did you mean 'smallconv'"),
        ({"seeds": 0}, r"seeds must be a whole number >= 1"),
        ({"folds": -1}, r"folds"),
        ({"limit": -1}, r"limit"),
        ({"limit_train": -5}, r"limit_train"),
        ({"first_seed": -1}, r"first_seed"),
        ({"data": "digts"}, r"unknown data set 'digts'\. Did you mean 'digits'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("a network was trained first"))
    with pytest.raises(UserError, match=message):
        compare(dataclasses.replace(TINY, **change), tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [({"data": "digts"}, {"data": "digits"}), ({"model": "preactresnet18"}, {"model": "smallconv"})],
)
def test_a_mended_command_may_use_the_folder_of_the_wrong_one(wrong, right, tmp_path):
    """Nothing was trained, so the folder is nobody's yet: a typing error must not cost a folder's name."""
    small = dataclasses.replace(
        TINY, losses=("sce",), folds=1, limit=20, limit_train=50, fit=dataclasses.replace(FIT, epochs=1)
    )
    with pytest.raises(UserError):
        compare(dataclasses.replace(small, **wrong), tmp_path)
    assert compare(dataclasses.replace(small, **right), tmp_path).runs[0].n == 20


def test_equal_comparisons_share_a_folder_and_others_do_not():
    assert default_out(TINY) == default_out(dataclasses.replace(TINY))
    assert default_out(Comparison(folds=5)) == default_out(Comparison(folds=0))  # the data's own number
    others = [{"seeds": 2}, {"suite": "quick"}, {"threat": "l2:0.5"}, {"fit": dataclasses.replace(FIT, epochs=9)}]
    assert len({default_out(dataclasses.replace(TINY, **change)) for change in [{}, *others]}) == 5
    for text in ("linf:8/255", "l2:0.5"):
        assert len(default_out(dataclasses.replace(TINY, threat=text)).parts) == 2


# Replay: the witnesses against the networks.


def test_replay_confirms_the_bounds(original):
    found, out = original
    proofs = replay(out)
    assert [proof.run for proof in proofs] == [f"{run.name}, linf 0.1" for run in found.runs]
    for proof, run in zip(proofs, found.runs, strict=True):
        assert proof.holds
        assert proof.failed == 0
        assert proof.bound == pytest.approx(run.robust.value)
        assert proof.misclassified == run.n - sum(run.samples.clean)
        assert proof.broken == sum(stage >= 0 for stage in run.samples.stage)
    assert replay(out, batch_size=77) == proofs


def test_a_folder_that_was_moved_still_proves_itself(copied, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    copied.rename(moved)
    assert all(proof.holds for proof in replay(moved))
    monkeypatch.chdir(moved.parent)
    assert all(proof.holds for proof in replay(moved.relative_to(moved.parent)))


def clean_images(index):
    digits = torch.from_numpy(load_digits().images * (255 / 16)).round().to(torch.uint8)[:, None]
    return digits[index].float() / 255


def image_back(x_adv, index):
    x_adv[0] = clean_images(index)[0]


def outside_eps(x_adv, index):
    x = clean_images(index)[0]
    x_adv[0] = (x + (x_adv[0] - x) * 1.05).clamp(0, 1)
    x_adv[0].view(-1)[0] = (x.view(-1)[0] - 0.11).clamp(0) if x.view(-1)[0] > 0.5 else x.view(-1)[0] + 0.11


def outside_the_box(x_adv, index):
    x_adv[0].view(-1)[0] = -1e-3


def not_a_number(x_adv, index):
    x_adv[0].view(-1)[0] = torch.nan


def moved_by_one(x_adv, index):
    index.copy_(index.roll(1))


@pytest.mark.parametrize("tamper", [image_back, outside_eps, outside_the_box, not_a_number, moved_by_one])
def test_a_tampered_witness_fails(tamper, copied):
    tensors, about = witnesses_of(copied)
    tamper(tensors["0/x_adv"], tensors["0/index"])
    rewrite(copied, tensors, about)
    bad, *good = replay(copied)
    assert not bad.holds
    assert bad.failed >= 1
    assert all(proof.holds for proof in good)


def test_a_witness_cannot_count_twice(copied):
    """The second witness is replaced by a copy of the first: as many as before, but one sample fewer is proved."""
    tensors, about = witnesses_of(copied)
    before = replay(copied)[0].broken
    for name in ("index", "x_adv"):
        tensors[f"0/{name}"][1] = tensors[f"0/{name}"][0]
    rewrite(copied, tensors, about)
    proof = replay(copied)[0]
    assert proof.broken == before - 1
    assert not proof.holds


def test_a_missing_witness_fails(copied):
    tensors, about = witnesses_of(copied)
    for name in ("index", "x_adv"):
        tensors[f"0/{name}"] = tensors[f"0/{name}"][1:].clone()
    rewrite(copied, tensors, about)
    proof = replay(copied)[0]
    assert (proof.failed, proof.holds) == (0, False)


def test_a_claim_that_is_too_low_fails(copied):
    raw = json.loads((copied / "results.json").read_text())
    raw["runs"][0]["robust"] = {"value": 0.0, "low": 0.0, "high": 0.1}
    (copied / "results.json").write_text(json.dumps(raw))
    assert [proof.holds for proof in replay(copied)] == [False, True]


def test_a_network_that_is_listed_twice_or_not_at_all_fails(copied):
    """Each of the n samples is to be judged by one network: no more, no less."""
    tensors, about = witnesses_of(copied)
    twice = {"networks": [about["networks"][0], about["networks"][0], *about["networks"][2:]]}
    tensors |= {"1/index": tensors["0/index"].clone(), "1/x_adv": tensors["0/x_adv"].clone()}
    rewrite(copied, tensors, twice)
    assert not replay(copied)[0].holds


def test_swapped_weights_fail(copied):
    folders = [copied / "runs" / run_folder.folder_name(loss, 0, 0) for loss in TINY.losses]
    one, two = (folder / "model.safetensors" for folder in folders)
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    assert not any(proof.holds for proof in replay(copied))


def test_other_data_is_refused(copied):
    tensors, about = witnesses_of(copied)
    about["networks"][0]["fingerprint"] = "0" * 16
    rewrite(copied, tensors, about)
    with pytest.raises(UserError, match=r"is not what the witnesses were made from \(fingerprint\)"):
        replay(copied)


@pytest.mark.parametrize("name", ["results.json", "witnesses.safetensors"])
def test_missing_or_damaged_files_are_named(name, copied):
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        replay(copied)
    (copied / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        replay(copied)


def test_a_missing_network_is_named(copied):
    shutil.rmtree(copied / "runs" / run_folder.folder_name("sce", 0, 1))
    with pytest.raises(UserError, match="sce-seed0-fold1"):
        replay(copied)


def test_an_index_that_the_data_does_not_have_is_a_user_error_or_a_failure(copied):
    tensors, about = witnesses_of(copied)
    tensors["0/index"][0] = 10**6
    rewrite(copied, tensors, about)
    with contextlib.suppress(UserError):
        assert not replay(copied)[0].holds


# One network at a time.


def job(folder, loss="sce", epochs=1, seed=0, fold=0, **change):
    comparison = dataclasses.replace(
        TINY, losses=(loss,), fit=dataclasses.replace(FIT, epochs=epochs), **change
    ).checked()  # fmt: skip
    return Job(comparison, comparison.loss_specs[0], seed, fold, folder)


@pytest.mark.parametrize("row", ["isce:s=attack+adversarial:steps=2", "isce:s=lipschitz@orthogonal+lipmlp:width=16",
                                 "sce+trades:steps=2+fit:epochs=1,checkpoint=best"])  # fmt: skip
def test_a_row_with_an_objective_of_its_own_is_trained_once_and_opened_again(row, tmp_path, monkeypatch):
    one = job(tmp_path / "run", loss=row)
    model, trained, _ = train_network(one)
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained again"))
    again, same, _ = train_network(one)
    assert same == trained
    assert run_folder.weights_hash(again) == run_folder.weights_hash(model)
    assert run_folder.stored_weights_hash(one.folder) == run_folder.weights_hash(model)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all("val_robust" in line for line in lines)


def test_a_finished_run_folder_is_not_handed_out_for_another_job(tmp_path):
    """Asked for another loss, seed, fold or schedule, the folder of a finished run is refused, not returned."""
    train_network(job(tmp_path / "run"))
    changes = [{"loss": "mmc"}, {"epochs": 2}, {"seed": 1}, {"fold": 1}, {"limit_train": 100}, {"model": "mlp"}]
    for change in changes:
        with pytest.raises(UserError, match="another configuration"):
            train_network(job(tmp_path / "run", **change))
    train_network(job(tmp_path / "run"))


def test_an_evaluation_of_other_weights_is_not_handed_out(tmp_path):
    """The run was trained anew in the same place: what is recorded in --out belongs to the weights that are gone."""
    run, out = tmp_path / "run", tmp_path / "evaluation"
    train_network(job(run, epochs=2))
    first = evaluate_run(run, "linf:0.1", "tiny", out)
    assert evaluate_run(run, "linf:0.1", "tiny", out).runs[0].samples == first.runs[0].samples
    shutil.rmtree(run)
    train_network(job(run, epochs=2, seed=5))
    try:
        second = evaluate_run(run, "linf:0.1", "tiny", out)
    except UserError:
        return  # refused: as good
    assert second.runs[0].samples != first.runs[0].samples
    assert all(proof.holds for proof in replay(out))


def test_evaluating_a_run_of_the_comparison_repeats_its_numbers(original, tmp_path):
    found, out = original
    alone = evaluate_run(out / "runs" / run_folder.folder_name("sce", 0, 0), "linf:0.1", "tiny", tmp_path / "one")
    wanted = by_loss(found, "sce").samples
    half = alone.runs[0].samples
    assert len(half) in (N // 2 - 1, N // 2, N // 2 + 1)
    assert half.certified == (wanted.certified and wanted.certified[: len(half)])
    for column in SAMPLE_COLUMNS:
        assert getattr(half, column) == getattr(wanted, column)[: len(half)], column
    assert all(proof.holds for proof in replay(tmp_path / "one"))
    with pytest.raises(UserError, match="another configuration"):
        evaluate_run(out / "runs" / run_folder.folder_name("sce", 0, 0), "linf:0.2", "tiny", tmp_path / "one")


def test_a_larger_eps_leaves_less(original, tmp_path):
    run = original[1] / "runs" / run_folder.folder_name("sce", 0, 0)
    robust = [evaluate_run(run, f"linf:{eps}", "tiny", tmp_path / eps).runs[0].robust.value for eps in ("0.02", "0.3")]
    assert robust[0] > original[0].runs[0].robust.value > robust[1]


def test_a_folder_that_is_no_run_is_refused(original, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate_run(original[1] / "runs", "linf:0.1", "tiny", tmp_path / "one")
    with pytest.raises(UserError):
        evaluate_run(original[1], "linf:0.1", "tiny", tmp_path / "two")  # the comparison's folder, not a run's


def test_stronger_proofs_of_a_comparison(tmp_path):
    """They are in its settings only where they are asked for, so that older folders resume; the table counts them."""
    assert "proofs" not in Comparison().to_json()
    assert Comparison(proofs="crown").to_json()["proofs"] == "crown"
    with pytest.raises(UserError, match=r"unknown proofs 'alpa'\. Did you mean 'alpha'"):
        Comparison(proofs="alpa").checked()
    with pytest.raises(UserError, match="branch and bound needs a budget of time"):
        Comparison(proofs="branch").checked()
    small = dataclasses.replace(TINY, losses=("sce",), folds=1, limit_train=0, threat="linf:0.02", proofs="alpha")
    strong = compare(small, tmp_path / "alpha")
    assert json.loads((tmp_path / "alpha" / "config.json").read_text())["proofs"] == "alpha"
    run = strong.runs[0]
    assert {cost.method for cost in run.proofs} >= {"linear", "crown", "alpha"}
    assert run.samples.proved_by.count("crown") + run.samples.proved_by.count("alpha") > 0
    (row,) = results.rows(strong)
    assert row.certified.value == sum(map(bool, run.samples.proved_by)) / run.n
    assert replay(tmp_path / "alpha")[0].holds
    with pytest.raises(UserError, match="another configuration"):
        compare(dataclasses.replace(small, proofs="linear"), tmp_path / "alpha")


def test_a_larger_eps_starts_from_what_a_smaller_one_broke(tmp_path, monkeypatch):
    """Whatever the order of the threats: the table keeps theirs, the work begins with the smallest."""
    comparison = dataclasses.replace(
        TINY, losses=("sce",), threat="linf:0.15,l2:0.5,linf:0.1", pgd50=0, precision=0.1
    ).checked()
    seen = []
    attack = pipeline.evaluate

    def evaluate_and_note(model, data, threat, *args, candidates=None, **more):
        seen.append((str(threat), None if candidates is None else int((candidates != data.x / 255).sum()) > 0))
        return attack(model, data, threat, *args, candidates=candidates, **more)

    monkeypatch.setattr(pipeline, "evaluate", evaluate_and_note)
    found = compare(comparison, tmp_path / "out")
    assert seen == [("linf 0.1", None), ("linf 0.15", True), ("l2 0.5", None)] * 2  # folds
    large, other, small = found.runs
    assert [run.threat_text for run in (large, other, small)] == ["linf 0.15", "l2 0.5", "linf 0.1"]
    assert not any(a and not b for a, b in zip(large.samples.robust, small.samples.robust, strict=True))
    names = [stage.name for stage in large.stages]
    given = large.stages[names.index("candidates")]
    assert given.broken == given.attacked == sum(s > 0 for s in small.samples.stage)
    assert "candidates" not in [stage.name for stage in small.stages]
    assert large.attacks == {}
    assert large.pgd50_verdict is None
    assert all(one.holds for one in replay(tmp_path / "out"))
    assert compare(comparison, tmp_path / "out").runs == found.runs
    assert len(seen) == 6, "nothing is evaluated twice"


def test_pgd50_on_a_sample_goes_all_the_way(tmp_path):
    comparison = dataclasses.replace(TINY, losses=("sce",), pgd50=50).checked()
    (run,) = compare(comparison, tmp_path / "out").runs
    assert run.pgd50_n == 100, "50 of each fold"
    assert sum(one is not None for one in run.samples.pgd50) == 100
    assert "100 samples" in run.pgd50_verdict.why
    (one,) = replay(tmp_path / "out")
    assert one.holds


@pytest.mark.parametrize(("name", "value"), [("precision", 0.0), ("precision", 2.0), ("pgd50", -1)])
def test_a_precision_or_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} must be"):
        dataclasses.replace(TINY, **{name: value}).checked()
