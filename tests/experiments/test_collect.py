"""Results from evaluated networks: folds are put together."""

from __future__ import annotations

from dataclasses import replace

import torch
from tests.evaluation.helpers import CLOSE, PER_ATTACK, small_mlp
from tests.helpers import unaudited

from holdfast import report, results
from holdfast.evaluation import evaluate
from holdfast.experiments import loss_spec
from holdfast.experiments.collect import TrainedNetwork, collect
from holdfast.experiments.config import DataCut
from holdfast.experiments.training import TrainSummary


def accuracy(correct):
    return float(correct.double().mean())


def test_folds_are_put_together(tmp_path):
    net, split = small_mlp()
    some = split.test.take(slice(0, 90))
    parts = [replace(split, test=some.take(rows)) for rows in (slice(0, 40), slice(40, 90))]
    sce, trained = loss_spec.parse("sce"), TrainSummary(accuracy=1.0, val=1.0)

    def collected(is_certified):
        found = []
        for part in parts:
            e = evaluate(net, part.test, CLOSE, PER_ATTACK[:3])
            found.append(e if is_certified(part) else replace(e, certified=None))
        networks = [
            TrainedNetwork(sce, 0, tmp_path, trained, part, DataCut(), unaudited(e))
            for e, part in zip(found, parts, strict=True)
        ]
        return found, collect(networks, tmp_path, "digits", {}, "a test").runs[0]

    found, run = collected(lambda part: True)
    certified = torch.cat([e.certified for e in found])
    assert run.certified.value == accuracy(certified)
    assert run.samples.certified == tuple(certified.int().tolist())
    assert list(run.attacks) == [stage.name for stage in PER_ATTACK[:3]]
    for name, figure in run.attacks.items():
        assert figure.value == accuracy(torch.cat([e.attack_correct[name] for e in found]))
    assert run.attacks["pgd50"] == run.pgd50
    assert run.certified.value <= run.robust.value
    _, run = collected(lambda part: part is parts[0])  # a fold without a bound: no figure of the whole
    assert run.certified is None
    assert run.samples.certified is None


def test_what_was_assumed_is_kept(tmp_path):
    """The sentences on data and network that a command prints once are in results.json, and on the page."""
    net, split = small_mlp()
    part = replace(split, test=split.test.take(slice(0, 10)), notes=("mine: 3 files were skipped.", "<b>: \x1b[2J"))
    result = unaudited(evaluate(net, part.test, CLOSE, PER_ATTACK[:1]))
    sce = loss_spec.parse("sce")
    network = TrainedNetwork(
        sce, 0, tmp_path, TrainSummary(accuracy=1.0, val=1.0), part, DataCut(), result, notes=("removed a prefix",)
    )
    collect([network, replace(network, seed=1)], tmp_path, "mine", {}, "a test")
    stored = results.load(tmp_path)
    assert stored.data["notes"] == [*part.notes, "removed a prefix"]
    other = replace(stored, data={**stored.data, "notes": ["another file", 5]})
    page = report.render([stored, other], tmp_path / "page.html").read_text()
    for said in ("mine: 3 files were skipped.", "&lt;b&gt;: ", "removed a prefix", "another file"):
        assert said in page
    assert "\x1b" not in page
    many = replace(stored, data={**stored.data, "notes": [f"note {n}" for n in range(1000)]})
    assert "and 980 more, in results.json" in report.render(many, tmp_path / "page.html").read_text()
