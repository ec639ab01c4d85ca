"""Which samples a stage attacks: the nearest, the spot check, and what escalates from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.evaluation.helpers import numbers

from holdfast.attacks import ATTACKS, AttackEntry
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import Stage
from holdfast.threat import Threat


@pytest.fixture
def seen(monkeypatch):
    """The samples given to each call of an attack, "probe", which breaks those whose index is in ``breaks``."""
    calls = []

    def probe(model, x, y, threat, *, score, noise, breaks=()):
        calls.append(sorted(noise.index.tolist()))
        hit = torch.isin(noise.index, torch.tensor(list(breaks), dtype=torch.int64))
        return torch.where(hit.view(-1, 1, 1, 1), (x - threat.eps).clamp(0, 1), x)

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    return calls


STEP, FINE = 0.002, Threat("linf", 0.0005)


def edge(n):
    """n samples, smallest margin first, so far apart that an attack within FINE does not change their order."""
    return numbers([0.51 + STEP * k for k in range(n)])


def trap(x):
    """No gradient; margin 2 p - 1; wrong where the pixel was moved by all of FINE, as "probe" does."""
    p = x.detach().flatten(1)[:, 0].double()
    off = (p / STEP - (p / STEP).round()).abs() * STEP
    z = p - 0.5
    return torch.stack([torch.where(off > FINE.eps * (1 - 5e-4), -z, z), -z], 1).float() * torch.tensor([1.0, 0.5])


def test_the_nearest_are_those_with_the_smallest_margins(seen):
    evaluate(trap, edge(200), FINE, (Stage("probe", "probe", subset="nearest", fraction=0.3),))
    assert seen == [list(range(60))]
    seen.clear()
    evaluate(trap, edge(40), FINE, (Stage("probe", "probe", subset="nearest", fraction=0.1),))
    assert seen == [list(range(32))], "at least 32"


SPOT_CHECK = (
    Stage("sampled", "probe", subset="sampled"),
    Stage("escalated", "probe", subset="escalated", fraction=0.5),
)


def test_the_spot_check_has_the_32_nearest_and_32_random_survivors(seen):
    e = evaluate(trap, edge(200), FINE, SPOT_CHECK)
    (drawn,) = seen  # nothing was broken: no escalation
    assert drawn[:32] == list(range(32))
    assert len(drawn) == 64
    assert e.spot_check.near == e.spot_check.far == 32
    assert (e.spot_check.rest, e.spot_check.near_broken, e.spot_check.far_broken) == (168, 0, 0)
    assert e.spot_check.expected == 0.0
    assert 10 < e.spot_check.high < 20  # 1 - 0.05^(1/32) = 8.9% of 168


def test_a_broken_nearest_sample_escalates_to_the_nearest_fraction(seen):
    stages = (replace(SPOT_CHECK[0], settings={"breaks": (3,)}), SPOT_CHECK[1])
    e = evaluate(trap, edge(200), FINE, stages)
    drawn, escalated = seen
    assert set(escalated) == set(range(101)) - set(drawn)  # half of the 199 survivors, without the spot check
    assert (e.spot_check.near_broken, e.spot_check.far_broken) == (1, 0)


def test_a_broken_random_sample_escalates_to_all_survivors(seen):
    evaluate(trap, edge(200), FINE, SPOT_CHECK)
    far = seen[0][40]
    seen.clear()
    stages = (replace(SPOT_CHECK[0], settings={"breaks": (far,)}), SPOT_CHECK[1])
    e = evaluate(trap, edge(200), FINE, stages)
    drawn, escalated = seen
    assert set(drawn) | set(escalated) == set(range(200))
    assert e.spot_check.far_broken == 1
    assert e.spot_check.high == 0.0, "all survivors have been attacked"
    assert int(e.robust.sum()) == 199


def test_a_second_round_is_run_only_if_the_first_broke_something(seen):
    for breaks, calls in (((), 1), ((5,), 2)):
        seen.clear()
        stages = (
            Stage("one", "probe", subset="nearest", fraction=0.5, round=1, settings={"breaks": breaks}),
            Stage("two", "probe", subset="nearest", fraction=0.5, round=2),
        )
        evaluate(trap, edge(100), FINE, stages)
        assert len(seen) == calls


def test_a_resumed_stage_attacks_the_samples_chosen_before(seen, tmp_path, save_every_batch):
    stages = (
        Stage("one", "probe", subset="nearest", fraction=0.3, settings={"breaks": (1, 7, 30)}),
        *(replace(stage, settings={"breaks": (9,)}) for stage in SPOT_CHECK),
    )
    few = {"suite": stages, "batch_size": 16}
    whole = evaluate(trap, edge(150), FINE, **few)
    calls, path = list(seen), tmp_path / "checkpoint.safetensors"
    for stop in range(1, 40):
        seen.clear()
        left = iter(range(stop - 1))

        def interrupt(*args, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        path.unlink(missing_ok=True)
        try:
            evaluate(trap, edge(150), FINE, **few, checkpoint=path, progress=interrupt)
        except KeyboardInterrupt:
            again = evaluate(trap, edge(150), FINE, **few, checkpoint=path)
        else:
            break
        assert again.broken_by.tolist() == whole.broken_by.tolist()
        assert again.spot_check == whole.spot_check
        assert seen == calls, "the same batches, each once"
    assert stop > 10
