"""Results from evaluated networks: folds are put together."""

from __future__ import annotations

from dataclasses import replace

import torch
from tests.evaluation.helpers import CLOSE, PER_ATTACK, small_mlp
from tests.helpers import unaudited

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
