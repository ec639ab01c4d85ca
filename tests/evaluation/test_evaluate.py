"""Evaluations of models that can be computed by hand: columns, costs, errors, and what is left unchanged."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tests.evaluation.helpers import (
    COLUMNS,
    FEW,
    THREAT,
    Interrupt,
    Threshold,
    case,
    differing_columns,
    numbers,
)
from tests.helpers import on_digits
from torch import nn

from holdfast.attacks import ATTACKS, AttackEntry
from holdfast.data import Data, pixels
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import Stage
from holdfast.losses import negative_margin
from holdfast.outputs import Outputs, fooled
from holdfast.threat import Threat

pytestmark = pytest.mark.usefixtures("unproved")


def test_every_column_of_a_model_that_can_be_computed_by_hand():
    values = [0.9, 0.55, 0.3, 0.65, 0.59, 0.61]
    e = evaluate(Threshold(), numbers(values), THREAT, FEW)
    assert e.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert e.y.tolist() == [0] * 6
    assert e.prediction.tolist() == [0, 0, 1, 0, 0, 0]
    assert e.clean.tolist() == [True, True, False, True, True, True]
    assert torch.allclose(e.margin, 2 * torch.tensor(values) - 1, atol=1e-6)
    assert e.pgd50.tolist() == [True, False, False, True, False, True]
    assert e.broken_by.tolist() == [-1, 1, -2, -1, 1, -1]
    assert e.robust.tolist() == [True, False, False, True, False, True]
    assert e.prediction_adv.tolist() == [0, 1, 1, 0, 1, 0]
    lowest = torch.tensor([0.8, 0.45, 0.3, 0.55, 0.49, 0.51])
    assert torch.allclose(e.x_adv.flatten(), lowest, atol=1e-5)
    assert torch.allclose(e.margin_adv, 2 * lowest - 1, atol=1e-5)
    assert e.x_adv.shape == (6, 1, 1, 1)
    assert e.threat == THREAT
    assert [stage.name for stage in e.stages] == ["clean", "pgd50", "apgd", "apgd-dlr-t", "square"]


def test_pgd50_is_one_attack_and_robust_is_what_all_attacks_leave():
    """No gradient: the published protocol stays at its random start, and the attacks without gradients break it."""
    values = [0.55] * 30 + [0.9] * 5 + [0.2] * 5
    e = evaluate(Threshold(gradient=False), numbers(values), THREAT, (Stage("noise", "noise", settings={"steps": 60}),))
    assert int(e.clean.sum()) == 35
    assert 5 < int(e.pgd50[:30].sum()) < 30
    assert int(e.robust.sum()) == 5
    assert (e.broken_by[:30][e.pgd50[:30]] == 2).all()
    assert (e.broken_by[:30][~e.pgd50[:30]] == 1).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_clean_pgd50_robust_are_in_order_and_every_witness_holds(norm):
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


@pytest.mark.parametrize("kind", ["too far", "out of the box", "nan", "a little too far"])
def test_a_candidate_outside_the_threat_is_counted_as_outside_and_breaks_nothing(monkeypatch, kind):
    def liar(model, x, y, threat, *, score, noise):
        far = {"too far": x - 0.5, "out of the box": x * 0 - 0.01, "nan": x * math.nan, "a little too far": x - 0.1001}
        return far[kind]

    monkeypatch.setitem(ATTACKS, "liar", AttackEntry(liar, "a test"))
    at = {"out of the box": 0.09}.get(kind, 0.6003)
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


def test_batch_size_and_order_do_not_change_what_is_broken(digits):
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
        assert differing_columns(whole, evaluate(model, samples, threat, FEW, batch_size=size)) == []
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    mixed = evaluate(model, samples.take(order), threat, FEW)
    assert all(torch.equal(getattr(mixed, name), getattr(whole, name)[order]) for name in COLUMNS)


def test_the_seed_is_the_only_source_of_randomness():
    net, samples, threat = case()
    first = evaluate(net, samples, threat, FEW)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert differing_columns(first, evaluate(net, samples, threat, FEW)) == []
    torch.random.set_rng_state(state)
    assert differing_columns(first, evaluate(net, samples, threat, FEW, seed=1)) != []
    assert torch.equal(state, torch.random.get_rng_state())


def test_uint8_and_float_images_are_the_same_images():
    net, samples, threat = case()
    as_float = Data(pixels(samples.x), samples.y, samples.index)
    assert differing_columns(evaluate(net, samples, threat, FEW), evaluate(net, as_float, threat, FEW)) == []


@pytest.mark.parametrize("wrap", [lambda z: (z,), lambda z: SimpleNamespace(logits=z), lambda z: Outputs(z)])
def test_a_model_may_be_a_function_and_answer_in_any_form(wrap):
    net, samples, threat = case(n=12)
    expected = evaluate(net, samples, threat, FEW)
    assert differing_columns(expected, evaluate(lambda x: wrap(net(x)), samples, threat, FEW)) == []


def test_forwards_and_backwards_are_exact():
    """3 clean, asked twice before; 2 right: 50 steps and a judgement; one stands: apgd looks 7 times, the noise 9."""
    model = Threshold()
    stages = (
        Stage("apgd", "apgd", "scaled_log_odds", settings={"steps": 6}),
        Stage("noise", "noise", settings={"steps": 9}),
    )
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


def test_progress_is_reported_after_each_batch():
    told = []
    evaluate(
        Threshold(), numbers([0.9, 0.55, 0.3, 0.8]), THREAT, FEW, batch_size=2, progress=lambda *args: told.append(args)
    )
    assert [what for what, _, _ in told[:2]] == ["pgd50, at most 50.0% robust"] * 2
    assert {what.split(",")[0] for what, _, _ in told} == {"pgd50", "apgd", "apgd-dlr-t", "square"}
    spent = [done for _, done, _ in told]
    assert spent == sorted(spent), "passes only grow"
    assert all(done <= total for _, done, total in told)
    assert told[-1][1] == told[-1][2], "at the end nothing is to come"


class Watch(nn.Module):
    """Notes the arithmetic that it is called under."""

    def __init__(self, fails=False):
        super().__init__()
        self.inner, self.seen, self.fails = Threshold(), set(), fails

    def forward(self, x):
        b = torch.backends
        self.seen.add((b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"), self.training))
        if self.fails and x.requires_grad:
            raise Interrupt
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
                with pytest.raises(Interrupt):
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
        with pytest.raises(UserError, match="labels range from"):
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
        assert differing_columns(expected, evaluate(net, samples, threat, FEW)) == []
        assert not torch.is_grad_enabled()


def test_the_data_are_not_touched():
    net, samples, threat = case(n=20)
    as_float = Data(pixels(samples.x), samples.y, samples.index)
    kept = as_float.x.clone()
    e = evaluate(net, as_float, threat, FEW)
    assert torch.equal(as_float.x, kept)
    e.x_adv.zero_()
    assert torch.equal(as_float.x, kept)
