"""The cascade: columns known by hand, survivors only, lies caught, work never done twice, nothing left changed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import on_digits
from torch import nn

import holdfast.evaluation as module
from holdfast.attacks import ATTACKS, SUITES, AttackEntry, Stage
from holdfast.data import Data, pixels
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.alone import is_published
from holdfast.losses import isce, negative_margin
from holdfast.outputs import Outputs, fooled
from holdfast.threat import Threat

COLUMNS = (
    "index",
    "y",
    "prediction",
    "margin",
    "clean",
    "pgd50",
    "broken_by",
    "margin_adv",
    "prediction_adv",
    "x_adv",
)
THREAT = Threat("linf", 0.1)
FEW = (
    Stage("apgd", "apgd", "u", settings={"steps": 6}),
    Stage("apgd-dlr-t", "apgd", "dlr", targets=2, settings={"steps": 4}),
    Stage("square", "square", "margin", settings={"steps": 10}),
)


def numbers(values, y=None):
    """Samples of one pixel."""
    x = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else torch.tensor(y)
    return Data(x, y, torch.arange(len(x)))


class Threshold(nn.Module):
    """Class 0 where the pixel is above one half, margin 2 p - 1; it counts, by its own hooks, what passes it."""

    def __init__(self, classes=2, gradient=True):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.5))
        self.classes, self.gradient, self.forwards, self.backwards = classes, gradient, 0, 0
        self.sizes = []

    def forward(self, x):
        self.forwards += len(x)
        self.sizes.append(len(x))
        p = x.flatten(1)[:, 0]
        if p.requires_grad:
            p.register_hook(self._came_back)
        lead = p - self.at
        z = torch.stack([lead, -lead, *[lead * 0 - 9.0] * (self.classes - 2)], 1)
        return z if self.gradient else z.detach()

    def _came_back(self, grad):
        self.backwards += len(grad)


def same(a, b, but=()):
    return [name for name in COLUMNS if name not in but and not torch.equal(getattr(a, name), getattr(b, name))]


class Net(nn.Module):
    """A small network with the layers that have a mode."""

    def __init__(self, classes=4, seed=0, side=6):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(6 * side * side, classes)
            self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


def case(n=40, classes=4, side=6, eps=0.02):
    """A network with n grey images (uint8) that it gets right, one in five relabelled, and a threat for some."""
    net = Net(classes, side=side).eval()
    x = torch.randint(256, (n, 1, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        y = net(pixels(x)).argmax(1)
    y[::5] = (y[::5] + 1) % classes
    return net, Data(x, y, torch.arange(n)), Threat("linf", eps)


# ----------------------------------------------------------------------------------------------------- what is found


def test_every_column_of_a_model_that_can_be_worked_out_by_hand():
    values = [0.9, 0.55, 0.3, 0.65, 0.59, 0.61]
    e = evaluate(Threshold(), numbers(values), THREAT, FEW)
    assert e.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert e.y.tolist() == [0] * 6
    assert e.prediction.tolist() == [0, 0, 1, 0, 0, 0]
    assert e.clean.tolist() == [True, True, False, True, True, True]
    assert torch.allclose(e.margin, 2 * torch.tensor(values) - 1, atol=1e-6)
    assert e.pgd50.tolist() == [True, False, False, True, False, True]
    assert e.broken_by.tolist() == [-1, 0, -2, -1, 0, -1]
    assert e.robust.tolist() == [True, False, False, True, False, True]
    assert e.prediction_adv.tolist() == [0, 1, 1, 0, 1, 0]
    lowest = torch.tensor([0.8, 0.45, 0.3, 0.55, 0.49, 0.51])
    assert torch.allclose(e.x_adv.flatten(), lowest, atol=1e-5)
    assert torch.allclose(e.margin_adv, 2 * lowest - 1, atol=1e-5)
    assert e.x_adv.shape == (6, 1, 1, 1)
    assert e.threat == THREAT
    assert [stage.name for stage in e.stages] == ["clean", "pgd50", "apgd", "apgd-dlr-t", "square"]


def test_published_is_one_attack_alone_and_robust_is_what_stands():
    """No gradient: the published protocol stays at its random start, and the attacks without gradients break it."""
    values = [0.55] * 30 + [0.9] * 5 + [0.2] * 5
    e = evaluate(Threshold(gradient=False), numbers(values), THREAT, (Stage("noise", "noise", settings={"steps": 60}),))
    assert int(e.clean.sum()) == 35
    assert 5 < int(e.pgd50[:30].sum()) < 30
    assert int(e.robust.sum()) == 5
    assert (e.broken_by[:30][e.pgd50[:30]] == 1).all()
    assert (e.broken_by[:30][~e.pgd50[:30]] == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_clean_published_robust_are_in_order_and_every_witness_holds(norm):
    net, samples, _ = case()
    threat = Threat(norm, {"linf": 0.02, "l2": 0.1, "l1": 0.5}[norm])
    e = evaluate(net, samples, threat, FEW)
    x = pixels(samples.x)
    assert not (e.robust & ~e.pgd50).any()
    assert not (e.pgd50 & ~e.clean).any()
    assert 0 < int(e.robust.sum()) < int(e.clean.sum())
    with torch.no_grad():
        clean, z = net(x), net(e.x_adv)
    broken = e.broken_by >= 0
    assert torch.equal(e.prediction, clean.argmax(1))
    assert torch.equal(e.clean, e.prediction == samples.y)
    assert torch.equal(e.broken_by == -2, ~e.clean)
    assert (threat.violation(e.x_adv, x) == 0).all()
    assert torch.equal(fooled(z, samples.y), broken | ~e.clean)
    assert torch.allclose(-negative_margin(z, samples.y), e.margin_adv, atol=1e-5)
    assert torch.equal(z.argmax(1), e.prediction_adv)
    assert (e.margin_adv[e.clean] <= e.margin[e.clean]).all()
    assert torch.equal(e.x_adv[~e.clean], x[~e.clean])
    assert all(torch.equal(getattr(e, name), getattr(e, name).cpu()) for name in COLUMNS)


def test_an_attack_is_given_survivors_only(monkeypatch):
    """The k-th probe breaks samples of class k: each sees what the ones before it left, no sample twice."""
    seen = {}

    def probe(model, x, y, threat, *, score, noise, breaks):
        seen.setdefault(breaks, []).extend(noise.index.tolist())
        return torch.where((y == breaks).view(-1, 1, 1, 1), torch.zeros_like(x), x)

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    y = [0, 1, 2, 0, 1, 2, 3]

    class Sure(nn.Module):  # right at x, wrong at 0, and no gradient tells the way
        def forward(self, x):
            k = (x.detach().flatten(1)[:, 0] * 10).round().long().clamp(0, 9)
            return F.one_hot(k, 10).float()

    samples = numbers([0.1 * (label + 1) for label in y], [label + 1 for label in y])
    stages = tuple(Stage(f"probe{k}", "probe", settings={"breaks": k}) for k in (1, 2, 3))
    e = evaluate(Sure(), samples, Threat("linf", 0.99), stages, batch_size=2)
    gone = {i for i in range(7) if e.broken_by[i] == 0}
    stands = [i for i in range(7) if i not in gone]
    assert seen.get(1, []) == stands
    stands = [i for i in stands if y[i] != 0]
    assert seen.get(2, []) == stands
    stands = [i for i in stands if y[i] != 1]
    assert seen.get(3, []) == stands
    attacked = {stage.name: (stage.attacked, stage.broken) for stage in e.stages}
    assert attacked["pgd50"] == (7, len(gone))
    for k in (1, 2, 3):
        assert attacked[f"probe{k}"][0] == len(seen.get(k, []))
    assert int(e.robust.sum()) == 7 - len(gone) - sum(attacked[f"probe{k}"][1] for k in (1, 2, 3))


def test_a_sample_that_is_wrong_already_is_never_attacked():
    model = Threshold()
    e = evaluate(model, numbers([0.1, 0.2, 0.3]), THREAT, FEW)
    assert model.forwards == 3 + 2 * 3  # the preflight asks twice
    assert all(stage.attacked == 0 for stage in e.stages[1:])
    assert e.broken_by.tolist() == [-2, -2, -2]


@pytest.mark.parametrize("lie", ["too far", "out of the box", "nan", "a little too far"])
def test_a_candidate_outside_the_threat_is_counted_as_outside_and_breaks_nothing(monkeypatch, lie):
    def liar(model, x, y, threat, *, score, noise):
        far = {"too far": x - 0.5, "out of the box": x * 0 - 0.01, "nan": x * math.nan, "a little too far": x - 0.1001}
        return far[lie]

    monkeypatch.setitem(ATTACKS, "liar", AttackEntry(liar, "a test"))
    at = {"out of the box": 0.09}.get(lie, 0.6003)
    model = Threshold()
    with torch.no_grad():
        model.at.fill_(at - 0.10005)
    e = evaluate(model, numbers([at, at, 0.9]), THREAT, (Stage("liar", "liar"),))
    assert e.robust.all()
    assert [stage.outside for stage in e.stages] == [0, 0, 3]
    assert [stage.broken for stage in e.stages] == [0, 0, 0]
    assert (THREAT.violation(e.x_adv, numbers([at, at, 0.9]).x) == 0).all()
    assert e.margin_adv.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_break_nothing(monkeypatch, bad):
    """Not even the columns: a sample that stands has a finite smallest margin and is predicted as its own class."""

    def drop(model, x, y, threat, *, score, noise):
        return x - 0.1

    monkeypatch.setitem(ATTACKS, "drop", AttackEntry(drop, "a test"))
    at = torch.tensor([0.55, 0.9])

    class Overflows(nn.Module):
        def forward(self, x):
            p = x.flatten(1)[:, 0]
            still = (p[:, None] == at).any(1) | torch.tensor(p.requires_grad)
            z = torch.stack([p - 0.5, 0.5 - p], 1)
            return torch.where(still[:, None], z, torch.stack([p, p * 0 + bad], 1))

    e = evaluate(Overflows(), numbers([0.55, 0.9]), THREAT, (Stage("drop", "drop"),))
    assert e.robust.all()
    assert e.margin_adv.isfinite().all()
    assert e.prediction_adv.tolist() == [0, 0]


# ----------------------------------------------------------------------------------- batch size, order, kinds of data


@pytest.fixture(scope="module")
def digits():
    net, split = on_digits(
        lambda: (
            nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 48), nn.ReLU(),
            nn.Linear(48, 10),
        ),
        lr=5e-3,
        epochs=6,
    )  # fmt: skip
    return net, split.test


def agree(a, b):
    """The share of samples with the same verdict of the same stage."""
    assert torch.equal(a.index, b.index)
    return float((a.broken_by == b.broken_by).float().mean())


def test_batch_size_and_order_leave_the_verdicts_alone(digits):
    net, samples = digits
    threat = Threat("linf", 0.1)
    whole = evaluate(net, samples, threat, FEW)
    assert 50 < int(whole.robust.sum()) < 320
    parts = evaluate(net, samples, threat, FEW, batch_size=41)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    mixed = evaluate(net, samples.take(order), threat, FEW)
    assert agree(whole, parts) >= 0.999
    back = order.argsort()
    assert torch.equal(mixed.index[back], whole.index)
    assert float((mixed.broken_by[back] == whole.broken_by).float().mean()) >= 0.999
    few = evaluate(net, samples.take(order[:50]), threat, FEW)
    assert torch.equal(few.broken_by, mixed.broken_by[:50])


class Whole(nn.Module):
    """Whole weights in float64 on pixels in 256ths: no sum rounds, so no batch size can change a bit."""

    def __init__(self):
        super().__init__()
        weight = torch.randint(-3, 4, (5, 16), generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight.double())

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def test_batch_size_and_order_do_not_change_a_bit_where_no_sum_rounds():
    x = torch.randint(257, (23, 1, 4, 4), generator=torch.Generator().manual_seed(1)).double() / 256
    model, threat = Whole(), Threat("linf", 1 / 32)
    with torch.no_grad():
        y = model(x).argmax(1)
    samples = Data(x, y, torch.arange(23) + 100)
    whole = evaluate(model, samples, threat, FEW)
    assert 0 < int(whole.robust.sum()) < 23
    for size in (1, 7):
        assert same(whole, evaluate(model, samples, threat, FEW, batch_size=size)) == []
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    mixed = evaluate(model, samples.take(order), threat, FEW)
    assert all(torch.equal(getattr(mixed, name), getattr(whole, name)[order]) for name in COLUMNS)


def test_the_seed_is_all_the_chance_there_is():
    net, samples, threat = case()
    first = evaluate(net, samples, threat, FEW)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert same(first, evaluate(net, samples, threat, FEW)) == []
    torch.random.set_rng_state(state)
    assert same(first, evaluate(net, samples, threat, FEW, seed=1)) != []
    assert torch.equal(state, torch.random.get_rng_state())


def test_uint8_and_float_images_are_the_same_images():
    net, samples, threat = case()
    as_float = Data(pixels(samples.x), samples.y, samples.index)
    assert same(evaluate(net, samples, threat, FEW), evaluate(net, as_float, threat, FEW)) == []


@pytest.mark.parametrize("wrap", [lambda z: (z,), lambda z: SimpleNamespace(logits=z), lambda z: Outputs(z)])
def test_a_model_may_be_a_function_and_answer_in_any_form(wrap):
    net, samples, threat = case(n=12)
    expected = evaluate(net, samples, threat, FEW)
    assert same(expected, evaluate(lambda x: wrap(net(x)), samples, threat, FEW)) == []


def test_matched_climbs_the_score_of_the_loss_that_the_network_was_trained_with(monkeypatch):
    climbed = []

    def probe(model, x, y, threat, *, score, noise):
        climbed.append(score)
        return x

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    stages = (Stage("probe", "probe"), Stage("probe-dlr", "probe", "dlr"))
    from holdfast.losses import dlr, mmc, scaled_log_odds

    for loss, score in ((None, scaled_log_odds), (isce, scaled_log_odds), (mmc, negative_margin)):
        climbed.clear()
        evaluate(Threshold(), numbers([0.9]), THREAT, stages, trained_with=loss)
        assert climbed == [score, dlr]


def test_targets_are_the_likeliest_wrong_classes_in_turn(monkeypatch):
    aimed = []

    def probe(model, x, y, threat, *, score, noise, target):
        aimed.append(target.tolist())
        return x

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    rows = torch.tensor([[9.0, 1.0, 3.0, 2.0], [1.0, 2.0, 9.0, 3.0]])
    x = numbers([0.25, 0.75], [0, 2])

    def model(x):
        return rows[(x.detach().flatten(1)[:, 0] > 0.5).long()]

    evaluate(model, x, THREAT, (Stage("probe", "probe", targets=2),))
    assert aimed == [[2, 3], [3, 1]]
    aimed.clear()
    e = evaluate(model, x, THREAT, (Stage("probe", "probe", targets=9),))  # as many as there are
    assert aimed == [[2, 3], [3, 1], [1, 0]]
    assert e.stages[-1].attacked == 2


# --------------------------------------------------------------------------------------------------------- what it cost


def test_forwards_and_backwards_are_exact():
    """3 clean, asked twice before; 2 right: 50 steps and a judgement; one stands: apgd looks 7 times, the noise 9."""
    model = Threshold()
    stages = (Stage("apgd", "apgd", "u", settings={"steps": 6}), Stage("noise", "noise", settings={"steps": 9}))
    e = evaluate(model, numbers([0.9, 0.55, 0.3]), THREAT, stages)
    assert [stage.forwards for stage in e.stages] == [3 * 3, 2 * 51, 7 + 1, 9 + 1]
    assert [stage.backwards for stage in e.stages] == [0, 2 * 50, 6, 0]
    assert [stage.attacked for stage in e.stages[1:]] == [2, 1, 1]
    assert [stage.broken for stage in e.stages[1:]] == [1, 0, 0]
    assert (e.forwards, e.backwards) == (model.forwards, model.backwards)
    assert e.seconds > 0


@pytest.mark.parametrize("batch_size", [3, 512])
def test_costs_agree_with_a_module_that_counts_for_itself(batch_size):
    model = Threshold(classes=4)
    values = [0.3, *torch.linspace(0.51, 0.95, 15).tolist()]
    e = evaluate(model, numbers(values), THREAT, FEW, batch_size=batch_size)
    assert e.forwards == model.forwards
    assert e.backwards == model.backwards
    assert max(model.sizes) <= batch_size
    assert sum(stage.broken for stage in e.stages[1:]) == int((e.broken_by >= 0).sum())


def test_progress_is_told_after_each_batch():
    told = []
    evaluate(
        Threshold(), numbers([0.9, 0.55, 0.3, 0.8]), THREAT, FEW, batch_size=2, progress=lambda *args: told.append(args)
    )
    assert [(name, standing) for name, _, _, standing in told[:2]] == [("pgd50", 2), ("pgd50", 2)]
    assert {name for name, *_ in told} == {"pgd50", "apgd", "apgd-dlr-t", "square"}
    spent = [done for _, done, _, _ in told]
    assert spent == sorted(spent), "passes only grow"
    assert all(done <= total for _, done, total, _ in told)
    assert told[-1][1] == told[-1][2], "at the end nothing is to come"


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("values", [[0.2, 0.3], [0.55, 0.56], [0.55, 0.3]])
def test_a_stage_with_nothing_to_do_asks_the_model_nothing(values):
    """x.view(len(x), -1) fails on an empty batch, and so do many networks."""
    told = []

    def model(x):
        assert len(x), "an empty batch"
        p = x.view(len(x), -1)[:, 0]
        return torch.stack([p - 0.5, 0.5 - p], 1)

    e = evaluate(model, numbers(values), THREAT, FEW, progress=lambda *args: told.append(args))
    assert not e.robust.any()
    assert all(done > 0 for _, done, _, _ in told)
    assert all(stage.seconds == 0 for stage in e.stages[2:])


class Stop(BaseException):
    pass


@pytest.fixture
def eager(monkeypatch):
    """The record is kept after every batch, not every few seconds."""
    save = module.Cascade.save
    monkeypatch.setattr(module.Cascade, "save", lambda self, *, force=False: save(self, force=True))


def stop_after(batches):
    left = [batches]

    def progress(*args):
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    return progress


def toy():
    return Threshold(classes=4), numbers([0.3, *torch.linspace(0.5, 0.95, 10)[1:].tolist()])


@pytest.mark.parametrize("batches", [1, 4, 6])
def test_a_killed_evaluation_goes_on_from_its_record(eager, tmp_path, batches):
    few = {"suite": FEW, "batch_size": 3}
    model, samples = toy()
    whole = evaluate(model, samples, THREAT, **few)
    total = (model.forwards, model.backwards)
    model, record = toy()[0], tmp_path / "record.safetensors"
    with pytest.raises(Stop):
        evaluate(model, samples, THREAT, **few, record=record, key="k", progress=stop_after(batches))
    before = model.forwards
    assert record.exists()
    resumed = evaluate(model, samples, THREAT, **few, record=record, key="k")
    assert same(whole, resumed) == []
    assert (model.forwards, model.backwards) == total, "work was repeated"
    assert model.forwards > before
    # the seconds are a clock's; all else is the same work
    for a, b in zip(whole.stages, resumed.stages, strict=True):
        assert (a.name, a.attacked, a.broken, a.forwards, a.backwards, a.outside) == (
            b.name, b.attacked, b.broken, b.forwards, b.backwards, b.outside,
        )  # fmt: skip


def test_a_chain_of_kills_ends_where_one_run_does(eager, tmp_path):
    net, samples, threat = case(n=30)
    few, record = {"suite": FEW, "batch_size": 8, "key": "k"}, tmp_path / "record.safetensors"
    whole = evaluate(net, samples, threat, **few)
    kills, resumed = 0, None
    while resumed is None:
        try:
            resumed = evaluate(net, samples, threat, **few, record=record, progress=stop_after(1))
        except Stop:
            kills += 1
            assert kills < 60, "it does not get on"
    assert kills > 8
    assert same(whole, resumed) == []


def test_a_finished_record_is_an_answer(tmp_path):
    model, samples = toy()
    record = tmp_path / "record.safetensors"
    first = evaluate(model, samples, THREAT, FEW, record=record, key="k")
    done = model.forwards
    again = evaluate(model, samples, THREAT, FEW, record=record, key="k")
    assert model.forwards == done
    assert same(first, again) == []
    assert first.stages == again.stages


OTHER = {
    "key": {"key": "other"},
    "eps": {"threat": Threat("linf", 0.2)},
    "norm": {"threat": Threat("l2", 0.1)},
    "box": {"threat": Threat("linf", 0.1, -1.0, 1.0)},
    "seed": {"seed": 1},
    "a stage less": {"suite": FEW[:1]},
    "the order of stages": {"suite": (FEW[1], FEW[0], FEW[2])},
    "settings of a stage": {"suite": (Stage("apgd", "apgd", "u", settings={"steps": 60}), *FEW[1:])},
    "score of a stage": {"suite": (Stage("apgd", "apgd", "margin", settings={"steps": 6}), *FEW[1:])},
    "attack of a stage": {"suite": (Stage("apgd", "pgd", "u", settings={"steps": 6}), *FEW[1:])},
    "targets of a stage": {
        "suite": (FEW[0], Stage("apgd-dlr-t", "apgd", "dlr", targets=3, settings={"steps": 4}), FEW[2])
    },
}


@pytest.mark.parametrize("other", list(OTHER))
def test_a_record_of_another_evaluation_is_refused(tmp_path, other):
    model, samples = toy()
    record = tmp_path / "record.safetensors"
    first = {"threat": THREAT, "suite": FEW, "key": "k", "record": record}
    evaluate(model, samples, **first)
    kept = record.read_bytes()
    with pytest.raises(UserError, match=r"belongs to another evaluation\..*delete the file"):
        evaluate(model, samples, **{**first, **OTHER[other]})
    assert record.read_bytes() == kept


def test_a_record_of_other_samples_is_refused(tmp_path):
    model, samples = toy()
    record = tmp_path / "record.safetensors"
    evaluate(model, samples, THREAT, FEW, record=record, key="k")
    with pytest.raises(UserError, match="belongs to another evaluation"):
        evaluate(model, samples.take(slice(0, 5)), THREAT, FEW, record=record, key="k")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_record_cut_short_says_so(tmp_path, left):
    model, samples = toy()
    record = tmp_path / "record.safetensors"
    evaluate(model, samples, THREAT, FEW, record=record, key="k")
    record.write_bytes(record.read_bytes()[:left])
    with pytest.raises(UserError, match="cut short or damaged: delete it"):
        evaluate(model, samples, THREAT, FEW, record=record, key="k")


def test_a_file_that_is_no_record_says_so(tmp_path):
    from holdfast.io import save_tensors

    record = tmp_path / "model.safetensors"
    save_tensors(record, "model", 1, {"w": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="not a holdfast evaluation record"):
        evaluate(*toy(), THREAT, FEW, record=record)


# ----------------------------------------------------------------------------------------------- what is left unchanged


class Watch(nn.Module):
    """Notes the arithmetic that it is called under."""

    def __init__(self, fails=False):
        super().__init__()
        self.inner, self.seen, self.fails = Threshold(), set(), fails

    def forward(self, x):
        b = torch.backends
        self.seen.add((b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"), self.training))
        if self.fails and x.requires_grad:
            raise Stop
        return self.inner(x)


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("fails", [False, True])
def test_arithmetic_is_exact_inside_and_as_it_was_outside(flags, fails):
    b = torch.backends
    found = (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32)
    model = Watch(fails).train()
    try:
        b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32 = flags
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fails:
                with pytest.raises(Stop):
                    evaluate(model, numbers([0.9]), THREAT, FEW)
            else:
                evaluate(model, numbers([0.9]), THREAT, FEW)
            assert torch.is_autocast_enabled("cpu")
        assert (b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32) == flags
    finally:
        b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32 = found
    assert model.seen == {(False, False, False, False)}
    assert model.training
    assert model.inner.training


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails):
    net, samples, threat = case(n=8)
    net.train()
    net.norm.eval()
    net.conv.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if fails:
        with pytest.raises(UserError, match="labels go from"):
            evaluate(net, Data(samples.x, samples.y + 9, samples.index), threat, FEW)
    else:
        evaluate(net, samples, threat, FEW)
    modes = {name: m.training for name, m in net.named_modules()}
    assert modes == {"": True, "conv": True, "norm": False, "drop": True, "last": True}
    wanted = {name: p.requires_grad for name, p in net.named_parameters()}
    assert [name for name, wants in wanted.items() if not wants] == ["conv.bias"]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_callers_gradient_mode_does_not_matter():
    net, samples, threat = case(n=20)
    expected = evaluate(net, samples, threat, FEW)
    with torch.no_grad():
        assert same(expected, evaluate(net, samples, threat, FEW)) == []
        assert not torch.is_grad_enabled()


def test_the_data_are_not_touched():
    net, samples, threat = case(n=20)
    as_float = Data(pixels(samples.x), samples.y, samples.index)
    kept = as_float.x.clone()
    e = evaluate(net, as_float, threat, FEW)
    assert torch.equal(as_float.x, kept)
    e.x_adv.zero_()
    assert torch.equal(as_float.x, kept)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="the set is empty"):
        evaluate(Threshold(), numbers([]), THREAT, FEW)


@pytest.mark.parametrize("values", [[0.5, 1.2], [-0.3, 0.5], [float("nan"), 0.5], [0.5, float("inf")]])
def test_pixels_outside_the_box(values):
    with pytest.raises(UserError, match=r"box \[0.0, 1.0\].*reach from.*inside the model"):
        evaluate(Threshold(), numbers(values), THREAT, FEW)


def test_uint8_pixels_outside_a_smaller_box():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    samples = Data(x, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    with pytest.raises(UserError, match=r"box \[0.0, 0.5\].*reach from 0 to 1\b"):
        evaluate(Threshold(), samples, Threat("linf", 0.1, 0.0, 0.5), FEW)


@pytest.mark.parametrize("y", [[0, 2], [-1, 0]])
def test_labels_without_a_logit(y):
    with pytest.raises(UserError, match=rf"returns 2 logits and the labels go from {min(y)} to {max(y)}"):
        evaluate(Threshold(), numbers([0.9, 0.8], y), THREAT, FEW)


def test_one_logit_is_no_classifier():
    with pytest.raises(UserError, match="returns 1 logits"):
        evaluate(lambda x: x.flatten(1)[:, :1], numbers([0.9, 0.8]), THREAT, FEW)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clean_logits_that_are_not_numbers(bad):
    def model(x):
        z = torch.stack([x.flatten(1)[:, 0], 0 * x.flatten(1)[:, 0]], 1)
        return torch.where(x.flatten(1) > 0.7, bad, z)

    with pytest.raises(UserError, match="NaN or infinite on 2 of 3 samples"):
        evaluate(model, numbers([0.9, 0.8, 0.2]), THREAT, FEW)


def test_names_that_do_not_exist():
    model = Threshold()
    with pytest.raises(UserError, match=r"unknown suite 'standart'. Did you mean 'standard'"):
        evaluate(model, numbers([0.9]), THREAT, "standart")
    with pytest.raises(UserError, match=r"unknown attack 'pdg'. Did you mean 'pgd'"):
        evaluate(model, numbers([0.9]), THREAT, (Stage("a", "pdg"),))
    assert model.forwards == 0
    with pytest.raises(UserError, match=r"unknown score 'marign'. Did you mean 'margin'.*matched"):
        evaluate(model, numbers([0.9]), THREAT, (Stage("a", "pgd", "marign"),))
    assert model.forwards == 0, "a name that does not exist is found before any work is done"


def test_the_suites_name_what_exists():
    from holdfast.attacks import SCORES

    for stages in SUITES.values():
        names = [stage.name for stage in stages]
        assert len(set(names)) == len(names)
        for stage in stages:
            assert stage.attack in ATTACKS
            assert stage.score in {*SCORES, "matched", "loss"}


@pytest.mark.parametrize(
    ("suite", "norm"),
    [  # "paranoid" is run and counted step by step for linf and l2 in test_silent_weaknesses_bench
        (suite, norm) for suite in SUITES for norm in ("linf", "l2", "l1") if suite != "paranoid" or norm == "l1"
    ],
)
def test_every_suite_runs_for_every_norm(suite, norm):
    """Stages that are not defined for a norm are left out."""
    net, samples, _ = case(n=2)  # one of them is right
    e = evaluate(net, samples, Threat(norm, 0.01), suite)
    run = [stage for stage in SUITES[suite] if norm in ATTACKS[stage.attack].norms and not is_published(stage)]
    names = [stage.name for stage in run]
    assert [stage.name for stage in e.stages] == ["clean", "pgd50", *names]
