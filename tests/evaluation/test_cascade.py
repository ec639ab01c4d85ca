"""The engine of the arsenal: whom a stage attacks, budgets, randomised models, memory, processes, scales."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.attacks import ATTACKS, SUITES, AttackEntry, Stage, matched_score
from holdfast.checks import audit
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.evaluation import Budget, evaluate
from holdfast.losses import scaled_log_odds
from holdfast.threat import Threat

THREAT = Threat("linf", 0.1)
EPS = 0.004  # of the linear models


def numbers(values):
    """Samples of one pixel, all of class 0."""
    x = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)
    return Data(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))


def threshold(x):
    """Class 0 where the pixel is above one half; its logits are 2 p - 1 apart."""
    p = x.flatten(1)[:, 0]
    return torch.stack([p - 0.5, 0.5 - p], 1)


class Linear(nn.Module):
    """K classes of D pixels, a linear map: the exact robust accuracy under linf is known in closed form."""

    def __init__(self, classes=10, pixels=30, scale=1.0, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = torch.randn(classes, pixels, generator=g)
        self.scale = scale

    def forward(self, x):
        return self.scale * ((x.flatten(1) - 0.5) @ self.w.T)

    def data(self, n=400, seed=1):
        g = torch.Generator().manual_seed(seed)
        x = (0.5 + 0.2 * (torch.rand(n, 1, 5, 6, generator=g) - 0.5)).float()  # far from the box
        return Data(x, self(x).argmax(1), torch.arange(n))

    def robust(self, data, eps):
        """(N,) bool: min over j of (z_y - z_j) / ||w_y - w_j||_1 > eps."""
        z = (data.x.flatten(1).double() - 0.5) @ self.w.double().T
        gap = z.gather(1, data.y[:, None]) - z
        size = (self.w[data.y][:, None] - self.w[None]).abs().sum(2).double()
        away = (gap / size).scatter(1, data.y[:, None], torch.inf).amin(1)
        return away > eps


# ------------------------------------------------------------------------------------------------ scales of the logits


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_no_scale_of_the_logits_changes_the_answer_and_the_answer_is_the_truth(scale, suite):
    model = Linear(scale=scale)
    data, threat = model.data(), Threat("linf", EPS)
    truth = model.robust(data, threat.eps)
    assert 0.2 < truth.float().mean() < 0.8
    found = evaluate(model, data, threat, suite)
    assert not (truth & ~found.robust).any(), "what is proved robust cannot be broken"
    assert (found.robust & ~truth).float().mean() <= 0.005


def test_u_alone_climbs_to_a_mistake_at_any_scale():
    for scale in (1e-4, 1.0, 1e6):
        model = Linear(scale=scale)
        data = model.data()
        stage = Stage("u", "apgd", "u", settings={"steps": 20})
        found = evaluate(model, data, Threat("linf", EPS), (stage,))
        assert (found.robust & ~model.robust(data, EPS)).float().mean() <= 0.02, scale
    assert matched_score(None) is matched_score("isce") is scaled_log_odds


# ------------------------------------------------------------------------------------------------- whom a stage attacks


@pytest.fixture
def seen(monkeypatch):
    """An attack, "probe", that notes whom it is given, and breaks the samples whose numbers are in ``breaks``."""
    noted = []

    def probe(model, x, y, threat, *, score, noise, breaks=()):
        noted.append(sorted(noise.index.tolist()))
        hit = torch.isin(noise.index, torch.tensor(list(breaks), dtype=torch.int64))
        return torch.where(hit.view(-1, 1, 1, 1), (x - threat.eps).clamp(0, 1), x)

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    return noted


STEP, FINE = 0.002, Threat("linf", 0.0005)


def edge(n):
    """n samples, nearest to the edge first, so far apart that an attack within FINE changes no order."""
    return numbers([0.51 + STEP * k for k in range(n)])


def trap(x):
    """No gradient; margins of 2 p - 1; wrong where the pixel was moved by all of FINE, as "probe" moves it."""
    p = x.detach().flatten(1)[:, 0].double()
    off = (p / STEP - (p / STEP).round()).abs() * STEP
    z = p - 0.5
    return torch.stack([torch.where(off > FINE.eps * (1 - 5e-4), -z, z), -z], 1).float() * torch.tensor([1.0, 0.5])


def test_the_nearest_are_those_with_the_smallest_margins(seen):
    evaluate(trap, edge(200), FINE, (Stage("probe", "probe", subset="nearest", share=0.3),))
    assert seen == [list(range(60))]
    seen.clear()
    evaluate(trap, edge(40), FINE, (Stage("probe", "probe", subset="nearest", share=0.1),))
    assert seen == [list(range(32))], "at least 32"


DRAWN = (
    Stage("audit", "probe", subset="sampled"),
    Stage("escalated", "probe", subset="escalated", share=0.5),
)


def test_the_drawn_are_the_32_nearest_and_32_of_the_rest(seen):
    e = evaluate(trap, edge(200), FINE, DRAWN)
    (drawn,) = seen  # nothing fell: nobody is promoted
    assert drawn[:32] == list(range(32))
    assert len(drawn) == 64
    assert e.spot_check.near == e.spot_check.far == 32
    assert (e.spot_check.rest, e.spot_check.near_broken, e.spot_check.far_broken, e.spot_check.expected) == (
        168,
        0,
        0,
        0.0,
    )
    assert 10 < e.spot_check.high < 20  # 1 - 0.05^(1/32) = 8.9% of 168


def test_a_hit_among_the_nearest_promotes_the_nearest_share(seen):
    stages = (replace(DRAWN[0], settings={"breaks": (3,)}), DRAWN[1])
    e = evaluate(trap, edge(200), FINE, stages)
    drawn, promoted = seen
    assert set(promoted) == set(range(101)) - set(drawn)  # half of the 199 that stand, but who was drawn
    assert (e.spot_check.near_broken, e.spot_check.far_broken) == (1, 0)


def test_a_hit_among_the_others_promotes_all(seen):
    evaluate(trap, edge(200), FINE, DRAWN)
    far = seen[0][40]
    seen.clear()
    stages = (replace(DRAWN[0], settings={"breaks": (far,)}), DRAWN[1])
    e = evaluate(trap, edge(200), FINE, stages)
    drawn, promoted = seen
    assert set(drawn) | set(promoted) == set(range(200))
    assert e.spot_check.far_broken == 1
    assert e.spot_check.high == 0.0, "all of them have been through it"
    assert int(e.robust.sum()) == 199


def test_a_second_round_is_run_only_if_the_first_broke_something(seen):
    for breaks, calls in (((), 1), ((5,), 2)):
        seen.clear()
        stages = (
            Stage("one", "probe", subset="nearest", share=0.5, round=1, settings={"breaks": breaks}),
            Stage("two", "probe", subset="nearest", share=0.5, round=2),
        )
        evaluate(trap, edge(100), FINE, stages)
        assert len(seen) == calls


def test_whom_nobody_knows_is_refused():
    with pytest.raises(UserError, match="unknown who of a stage 'nearst'"):
        Stage("a", "apgd", subset="nearst")
    with pytest.raises(UserError, match="share must lie"):
        Stage("a", "apgd", subset="nearest", share=0.0)


def test_a_choice_survives_a_kill(seen, tmp_path, monkeypatch):
    from holdfast.evaluation.cascade import Cascade

    save = Cascade.save
    monkeypatch.setattr(Cascade, "save", lambda self, *, force=False: save(self, force=True))
    stages = (
        Stage("one", "probe", subset="nearest", share=0.3, settings={"breaks": (1, 7, 30)}),
        *(replace(stage, settings={"breaks": (9,)}) for stage in DRAWN),
    )
    few = {"suite": stages, "batch_size": 16}
    whole = evaluate(trap, edge(150), FINE, **few)
    calls, record = list(seen), tmp_path / "record.safetensors"
    for stop in range(1, 40):
        seen.clear()

        left = iter(range(stop - 1))

        def kill(*args, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        record.unlink(missing_ok=True)
        try:
            evaluate(trap, edge(150), FINE, **few, record=record, progress=kill)
        except KeyboardInterrupt:
            again = evaluate(trap, edge(150), FINE, **few, record=record)
        else:
            break
        assert again.broken_by.tolist() == whole.broken_by.tolist()
        assert again.spot_check == whole.spot_check
        assert seen == calls, "the same batches, each once"
    assert stop > 10


# -------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("text", ["", "10", "min", "ten min", "-3s", "0s", "1e999passes", "nan s", "1.2.3s", "5days"])
def test_budgets_that_cannot_be_read(text):
    with pytest.raises(UserError, match="cannot read the budget"):
        Budget.parse(text)


def test_a_budget_of_passes_is_kept_and_spent_on_the_nearest():
    model = Linear()
    data, threat = model.data(), Threat("linf", EPS)
    full = evaluate(model, data, threat, "standard")
    published = sum(cost.forwards + cost.backwards for cost in full.stages[:2])
    before = len(data)
    for passes in (1, published + 2_000, published + 20_000):
        e = evaluate(model, data, threat, "standard", budget=Budget(passes=passes))
        assert e.unfinished
        assert e.forwards + e.backwards <= max(passes, published) + 64
        assert not (model.robust(data, threat.eps) & ~e.robust).any(), "an upper bound all the same"
        assert e.stages[1].attacked == full.stages[1].attacked, "the published protocol is always finished"
        assert int(e.robust.sum()) <= before
        before = int(e.robust.sum())


def test_a_budget_beyond_the_suite_goes_on_in_rounds():
    model = Linear()
    data, threat = model.data(100), Threat("linf", EPS)
    quick = evaluate(model, data, threat, "quick")
    e = evaluate(model, data, threat, "quick", budget=Budget(passes=quick.forwards + quick.backwards + 60_000))
    assert not e.unfinished
    names = [cost.name for cost in e.stages[len(quick.stages) :]]
    assert names[:4] == ["more 1: u", "more 1: targets", "more 1: md", "more 1: square"]
    assert any(name.startswith("more 2") for name in names)
    assert e.robust.tolist() == model.robust(data, threat.eps).tolist()


def test_a_budget_of_seconds_ends():
    model = Linear()
    e = evaluate(model, model.data(200), Threat("linf", EPS), "quick", budget=Budget(seconds=1.5))
    assert 0.5 < e.seconds < 6


def test_a_budget_survives_a_kill(tmp_path):
    model, threat = Linear(), Threat("linf", EPS)
    data, record = model.data(100), tmp_path / "record.safetensors"
    few = {"suite": "quick", "budget": Budget(passes=80_000)}
    whole = evaluate(model, data, threat, **few)
    evaluate(model, data, threat, **few, record=record)
    again = evaluate(model, data, threat, **few, record=record)
    assert again.broken_by.tolist() == whole.broken_by.tolist()
    assert [cost.name for cost in again.stages] == [cost.name for cost in whole.stages]


# ---------------------------------------------------------------------------------------------------- randomised models


class Noisy(nn.Module):
    """A threshold under noise: the majority is right while the pixel is above one half."""

    def __init__(self, sigma):
        super().__init__()
        self.sigma = sigma

    def forward(self, x):
        return threshold(x + self.sigma * torch.randn(len(x), 1, 1, 1))


def test_luck_is_no_success():
    """At 0.65 an answer is wrong once in 6 at sigma 0.15, and nearly half the time where the threat ends, at 0.55."""
    torch.manual_seed(0)
    data = numbers([0.56] * 30 + [0.68] * 30 + [0.9] * 30)
    e = evaluate(Noisy(0.15), data, THREAT, "quick")
    assert e.votes == 32
    kept = e.robust.view(3, 30).float().mean(1)
    assert kept[0] <= 0.1, "the majority changes sides at 0.46"
    assert kept[1] >= 0.85, "a lucky pass is likely, a majority is not"
    assert kept[2] == 1.0
    judged = audit(Noisy(0.15), data, e)
    assert {finding.name: finding for finding in judged.findings}["outputs are repeatable"].fires
    assert judged.evaluation.robust.view(3, 30)[2].all()


def test_a_model_that_always_answers_the_same_is_asked_once():
    assert evaluate(threshold, numbers([0.9, 0.8]), THREAT, "quick").votes == 1


# --------------------------------------------------------------------------------------------------------------- memory


class Small(nn.Module):
    """A device that holds so many images at once, and says so as CUDA or as the CPU's allocator does."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.sizes = most, error, []

    def forward(self, x):
        if len(x) > self.most:
            raise self.error
        self.sizes.append(len(x))
        return threshold(x)


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("most", [1, 7, 20])
def test_when_memory_runs_out_batches_are_halved_and_nothing_else_changes(error, most):
    data, model = numbers(torch.linspace(0.51, 0.7, 50).tolist()), Small(most, error)
    e = evaluate(model, data, THREAT, "quick")
    assert e.robust.tolist() == evaluate(threshold, data, THREAT, "quick").robust.tolist()
    assert max(model.sizes) > most // 2


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_for_not_one_image_is_an_error(error):
    with pytest.raises(UserError, match="memory ran out on a single image"):
        evaluate(Small(0, error), edge(5), THREAT, "quick")


# --------------------------------------------------------------------------------------------------------- memory order


class Convolution(nn.Module):
    def __init__(self, view):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.conv.weight.data = torch.randn(4, 3, 3, 3, generator=g)
        self.conv.bias.data.zero_()
        self.view, self.plain, self.last = view, 0, 0

    def forward(self, x):
        self.plain, self.last = self.plain + x.is_contiguous(), self.last + (not x.is_contiguous())
        h = self.conv(x).relu().mean((2, 3))
        return h + 0 * x.view(len(x), -1)[:, :4] if self.view else h


@pytest.mark.parametrize("view", [False, True])
def test_channels_last_is_used_where_the_model_can_take_it(view):
    model = Convolution(view)
    x = torch.rand(20, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    data = Data(x, model(x).argmax(1), torch.arange(20))
    model.plain = model.last = 0
    e = evaluate(model, data, Threat("linf", 0.02), "quick")
    assert model.last == 1 if view else model.last > 50, "one attempt, or every step of every attack"
    assert model.plain > (50 if view else 0), "candidates are judged in the plain order"
    assert e.clean.all()


# ------------------------------------------------------------------------------------------------------- many classes


def test_among_many_classes_targets_are_ranked_by_distance():
    """A rival whose logit is near but whose slope is tiny is farther than one with a lower logit and a steep slope."""

    def model(x):
        p = x.flatten(1)[:, :1]
        z = torch.full((len(x), 12), -50.0)
        z = torch.cat([torch.zeros(len(x), 1), -1 + 0.01 * (0.5 - p), -2 + 30 * (0.5 - p), z[:, 3:]], 1)
        return z

    data = numbers([0.5, 0.52])
    e = evaluate(model, data, Threat("linf", 0.2), (Stage("t", "apgd", "margin", targets=1, settings={"steps": 3}),))
    assert not e.robust.any()
    assert e.prediction_adv.tolist() == [2, 2]


# ------------------------------------------------------------------------------------------------------ many processes

SHARED = """
import sys, torch
from torch import distributed
sys.path.insert(0, {tests!r})
from tests.evaluation.test_cascade import EPS, Linear
from holdfast.evaluation import evaluate
from holdfast.io import save_tensors
from holdfast.threat import Threat
from pathlib import Path
torch.set_num_threads(1)
distributed.init_process_group("gloo")
model = Linear()
out = Path({out!r})
e = evaluate(model, model.data(), Threat("linf", EPS), "standard", batch_size=16, record=out / "r.safetensors")
columns = {{name: getattr(e, name) for name in ("robust", "broken_by", "margin_adv", "x_adv", "pgd50")}}
passes = torch.tensor([e.forwards, e.backwards])
columns["passes"] = passes
save_tensors(out / f"answer{{distributed.get_rank()}}.safetensors", "answer", 1, columns, {{}})
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_share_the_work_and_give_the_answer_of_one(tmp_path):
    from pathlib import Path

    from holdfast.io import load_tensors

    script = tmp_path / "shared.py"
    script.write_text(SHARED.format(tests=str(Path(__file__).parents[2]), out=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
    for _ in range(2):  # the second time from the records of the first
        subprocess.run([*launch, str(script)], check=True, capture_output=True, timeout=300)
        model = Linear()
        one = evaluate(model, model.data(), Threat("linf", EPS), "standard", batch_size=16)
        for rank in (0, 1):
            answer = load_tensors(tmp_path / f"answer{rank}.safetensors", "answer", 1)[0]
            for name in ("robust", "broken_by", "margin_adv", "x_adv", "pgd50"):
                assert torch.equal(answer[name], getattr(one, name)), (rank, name)
            # each process asks the preflight and the clean pass for itself
            assert abs(int(answer["passes"].sum()) - one.forwards - one.backwards) <= 2 * (400 + 128)


def test_the_suites_cost_more_and_more():
    """Of a sample that nothing breaks and that is the nearest, passes of 10 classes."""
    costs = [sum(stage.passes(10) for stage in SUITES[suite]) for suite in ("quick", "standard", "paranoid")]
    assert costs == sorted(costs)
    assert costs[2] > 9000, "as many as AutoAttack's"
