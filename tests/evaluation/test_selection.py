"""Which samples a stage attacks: the nearest, the spot check, and what escalates from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.evaluation.helpers import numbers

from holdfast.attacks import ATTACKS, AttackEntry
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import Stage
from holdfast.results import sample_size
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


def test_the_spot_check_has_as_many_samples_as_the_precision_needs(seen):
    for precision, near, far in ((0.01, 26, 25), (0.003, 75, 74), (1.0, 10, 10)):
        seen.clear()
        e = evaluate(trap, edge(200), FINE, SPOT_CHECK, precision=precision)
        (drawn,) = seen  # nothing was broken: no escalation
        assert near + far == sample_size(200, 200, precision)
        assert drawn[:near] == list(range(near))
        assert len(drawn) == near + far
        assert (e.spot_check.near, e.spot_check.far, e.spot_check.rest) == (near, far, 200 - near)
        assert (e.spot_check.near_broken, e.spot_check.far_broken, e.spot_check.expected) == (0, 0, 0.0)
        assert e.precision == precision
    assert e.spot_check.high > 20, "1 - 0.05^(1/10) = 25.9% of 190"


def test_never_more_samples_than_survive(seen):
    e = evaluate(trap, edge(15), FINE, SPOT_CHECK, precision=0.001)
    assert seen == [list(range(15))]
    assert (e.spot_check.near, e.spot_check.far, e.spot_check.high) == (8, 7, 0.0)


def test_a_precision_is_a_share():
    for precision in (0, -0.01, 1.5, "1%", True, float("nan")):
        with pytest.raises(UserError, match="precision must be a finite number > 0 and <= 1"):
            evaluate(trap, edge(4), FINE, (), precision=precision)


def test_a_stage_on_the_next_leaves_the_nearest_to_the_spot_check(seen):
    """They have its full-length attacks; where the stages before have just broken a sample, they have both."""
    first = Stage("long", "probe", subset="nearest", fraction=0.15)
    other = Stage("next", "probe", subset="next", fraction=0.3)
    size = sample_size(200, 200)
    near = size - size // 2
    evaluate(trap, edge(200), FINE, (first, other, SPOT_CHECK[0]))
    assert seen[1] == list(range(near, 60))
    assert seen[2][:near] == list(range(near))
    assert len(seen[2]) == size
    seen.clear()
    evaluate(trap, edge(200), FINE, (replace(first, settings={"breaks": (3,)}), other, SPOT_CHECK[0]))
    left = [k for k in range(200) if k != 3]
    assert seen[1] == left[:60]
    assert seen[2][:32] == left[:32], "at least 32 where samples still break"


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
