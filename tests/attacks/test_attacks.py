"""Contracts over every entry of ATTACKS, closed-form oracles, and the silent weaknesses that peers' attacks have."""

from __future__ import annotations

import copy
import inspect
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import on_digits, right_ones
from torch import nn

from holdfast.attacks import (
    ATTACKS,
    SCORES,
    MostAdversarial,
    apgd,
    attack,
    bim,
    cross_entropy,
    fgsm,
    fooled,
    mim,
    pgd,
    square,
)
from holdfast.attacks import random_noise as noise_attack
from holdfast.errors import UserError
from holdfast.losses import dlr, isce, negative_log_odds, negative_margin, sce
from holdfast.noise import Noise
from holdfast.outputs import Outputs, as_outputs
from holdfast.threat import Threat

SIDE = 6
EPS = {"linf": 0.15, "l2": 0.8, "l1": 3.0}
FEW = {"fgsm": {}, "bim": {"steps": 4}, "square": {"steps": 12}}  # anything new runs with steps=5
TABLE = [(name, norm) for name, entry in ATTACKS.items() for norm in entry.norms]
GRADIENT = [(name, norm) for name, norm in TABLE if ATTACKS[name].gradients]
# The same contract for the settings that take other paths through the code.
VARIANTS = [
    ("pgd", {"steps": 3, "keep": "last"}),
    ("pgd", {"steps": 3, "restarts": 2}),
    ("pgd", {"steps": 3, "momentum": 0.9}),
    ("pgd", {"steps": 3, "target": 1}),
    ("apgd", {"steps": 6, "restarts": 2}),
    ("apgd", {"steps": 6, "target": 1}),
    ("square", {"steps": 5, "target": 1}),
]
TABLE_OF_ALL = [pytest.param(name, norm, FEW.get(name, {"steps": 5}), id=f"{name}-{norm}") for name, norm in TABLE]
TABLE_OF_ALL += [
    pytest.param(name, norm, kept, id=f"{name}-{norm}-" + "-".join(f"{k}={v}" for k, v in kept.items()))
    for name, kept in VARIANTS
    for norm in ("linf", "l2")
]
every = pytest.mark.parametrize(("name", "norm", "few"), TABLE_OF_ALL)


def draw(n, seed=0, dtype=torch.float32):
    return Noise(seed, torch.arange(n))


def images(n, seed=0, dtype=torch.float32):
    return torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Net(nn.Module):
    """All that an attack might disturb: a frozen batch norm, a dropout in train mode, a frozen parameter."""

    def __init__(self, classes=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 6, 3, padding=1)
            self.frozen = nn.BatchNorm2d(6)
            self.live = nn.BatchNorm2d(6)
            self.drop = nn.Dropout(0.5)
            self.last = nn.Linear(6 * SIDE * SIDE, classes)
            for norm in (self.frozen, self.live):
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 1.5)
        self.train()
        self.frozen.eval()
        self.conv.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.drop(self.live(self.frozen(self.conv(x)).relu())).flatten(1))


def state(model):
    modes = [(name, module.training) for name, module in model.named_modules()]
    parameters = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return modes, parameters, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a, b):
    return a[:2] == b[:2] and all(torch.equal(a[2][name], b[2][name]) for name in a[2])


def labels_of(model, x, wrong=True):
    """What the model says in eval mode, every fourth label turned into another class."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        z = as_outputs(model(x)).logits
    for module, mode in modes:
        module.training = mode
    y = z.argmax(1)
    if wrong:
        y[::4] = (y[::4] + 1) % z.shape[1]
    return y


def strike(name, model, x, y, threat, *, score=negative_margin, seed=0, noise=None, **kept):
    if isinstance(kept.get("target"), int):
        kept["target"] = (y + kept["target"]) % 2
    return ATTACKS[name].attack(model, x, y, threat, score=score, noise=noise or draw(len(x), seed), **kept)


# ---------------------------------------------------------------------------------------------------- the contract


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_back_is_a_point_of_the_threat_for_every_sample(name, norm, few, dtype):
    model, x, threat = Net().to(dtype), images(9, dtype=dtype), Threat(norm, EPS[norm])
    y = labels_of(model, x)
    kept, y_kept = x.clone(), y.clone()
    x_adv = strike(name, model, x, y, threat, **few)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == dtype
    assert x_adv.isfinite().all()
    assert not x_adv.requires_grad
    assert (threat.violation(x_adv, x) == 0).all()
    assert torch.equal(x, kept)
    assert torch.equal(y, y_kept)
    assert x_adv.data_ptr() != x.data_ptr()


@every
def test_the_model_comes_back_as_it_was(name, norm, few):
    model, x = Net(), images(5)
    y = labels_of(model, x)
    before = state(model)
    assert not model.frozen.training
    assert model.live.training
    strike(name, model, x, y, Threat(norm, EPS[norm]), **few)
    assert same_state(before, state(model))


class Trips(nn.Module):
    """Fails at its second answer, with some of its modules in eval mode by then."""

    def __init__(self, at=2):
        super().__init__()
        self.net, self.calls, self.at = Net(), 0, at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("midway")
        return self.net(x)


@every
@pytest.mark.parametrize("at", [1, 2])
def test_the_model_comes_back_as_it_was_when_the_attack_raises(name, norm, few, at):
    model, x = Trips(at), images(5)
    y = labels_of(model.net, x, wrong=False)
    before = state(model)
    grad = torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError, match="midway"):
        strike(name, model, x, y, Threat(norm, EPS[norm] / 100), **few)
    assert same_state(before, state(model))
    assert torch.is_grad_enabled() == grad


@every
def test_the_callers_gradient_mode_does_not_matter_and_is_kept(name, norm, few):
    model, x, threat = Net(), images(6), Threat(norm, EPS[norm])
    y = labels_of(model, x)
    expected = strike(name, model, x, y, threat, **few)
    with torch.no_grad():
        assert torch.equal(strike(name, model, x, y, threat, **few), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("name", [name for name, entry in ATTACKS.items() if entry.gradients])
def test_inference_mode_does_not_silence_an_attack(name):
    """Inside it no graph is recorded: the attack must lift it or refuse, never return its start as its best."""
    model, x, threat = Net(), images(6), Threat("linf", EPS["linf"])
    y = labels_of(model, x, wrong=False)
    expected = strike(name, model, x, y, threat, **FEW.get(name, {"steps": 5}))
    with torch.inference_mode():
        try:
            x_adv = strike(name, model, x, y, threat, **FEW.get(name, {"steps": 5}))
        except (UserError, RuntimeError):
            return
    assert torch.equal(x_adv, expected)


@every
def test_autocast_around_an_attack_does_not_change_it(name, norm, few):
    model, x, threat = Net(), images(6), Threat(norm, EPS[norm])
    y = labels_of(model, x)
    expected = strike(name, model, x, y, threat, **few)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(strike(name, model, x, y, threat, **few), expected)
        assert torch.is_autocast_enabled("cpu")


@every
def test_an_empty_batch_comes_back_empty(name, norm, few):
    x, y = images(0), torch.zeros(0, dtype=torch.int64)
    x_adv = strike(name, Net(), x, y, Threat(norm, EPS[norm]), **few)
    assert x_adv.shape == (0, 1, SIDE, SIDE)
    assert x_adv.dtype == x.dtype


@every
@pytest.mark.parametrize("classes", [2, 3])
def test_two_and_three_classes_are_enough(name, norm, few, classes):
    model, x, threat = Net(classes), images(5), Threat(norm, EPS[norm])
    y = labels_of(model, x)
    x_adv = strike(name, model, x, y, threat, score=dlr, **few)
    assert (threat.violation(x_adv, x) == 0).all()
    assert x_adv.isfinite().all()


@every
def test_one_seed_one_answer(name, norm, few):
    model, x, threat = Net(), images(8), Threat(norm, EPS[norm] / 8)
    y = labels_of(model, x, wrong=False)
    first = strike(name, model, x, y, threat, **few)
    torch.manual_seed(123)
    assert torch.equal(first, strike(name, model, x, y, threat, **few))
    other = strike(name, model, x, y, threat, seed=1, **few)
    from_x = name in ("fgsm", "bim", "mim", "deepfool", "cw", "lbfgs", "fmn", "fab", "jsma", "least_likely")
    assert torch.equal(first, other) == from_x


@every
def test_the_global_random_numbers_are_left_alone(name, norm, few):
    model, x = Net(), images(4)
    y = labels_of(model, x)
    before = torch.random.get_rng_state()
    strike(name, model, x, y, Threat(norm, EPS[norm]), **few)
    assert torch.equal(before, torch.random.get_rng_state())


class Whole(nn.Module):
    """A linear model whose sums are taken sample by sample, without a matrix product: no batch size changes a bit."""

    def __init__(self, classes=5, side=SIDE, seed=0):
        super().__init__()
        weight = torch.randint(-3, 4, (classes, side * side), generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight.double())

    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight).sum(2)


def permuted(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@every
def test_batch_size_and_order_do_not_matter_exactly_for_a_linear_model(name, norm, few):
    n = 7
    model, threat = Whole(), Threat(norm, {"linf": 1 / 16, "l2": 0.25, "l1": 1.0}[norm])
    x = (images(n, dtype=torch.float64) * 256).round() / 256
    y, noise = labels_of(model, x), draw(n)
    together = strike(name, model, x, y, threat, noise=noise, **few)
    slack = 1e-12 if name in ("fmn", "cw") else 0.0  # rivals share the gradient by fractions, so the model's sums round
    for rows in (torch.arange(1), *torch.arange(n).split(4), permuted(n)):
        alone = strike(name, model, x[rows], y[rows], threat, noise=noise[rows], **few)
        assert torch.allclose(alone, together[rows], rtol=0, atol=slack)


def nan_off(x0, net):
    """A model whose logits are NaN in one class, away from the images themselves."""

    def model(x):
        z = net(x)
        moved = torch.tensor([not bool((row == x0.flatten(1)).all(1).any()) for row in x.flatten(1)])
        return z.masked_fill(moved[:, None] & (torch.arange(z.shape[1]) == 0), math.nan)

    return model


@every
def test_nan_logits_are_never_a_success(name, norm, few):
    net, x, threat = Net(), images(6), Threat(norm, EPS[norm])
    net.eval()
    y = labels_of(net, x, wrong=False)
    model = nan_off(x, net)
    x_adv = strike(name, model, x, y, threat, **few)
    if few.get("keep") != "last":  # which judges nothing
        assert torch.equal(x_adv, x), "every other point has a NaN among its logits"
    assert not fooled(model(x_adv), y).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fooled_wants_finite_logits(bad):
    z = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 5.0], [bad, 0.0, 0.0], [3.0, 1.0, bad]])
    assert fooled(z, torch.zeros(4, dtype=torch.int64)).tolist() == [True, False, False, False]


ANSWERS = {
    "tuple": lambda z: (z, "more"),
    "list": lambda z: [z],
    "object": lambda z: SimpleNamespace(logits=z),
    "outputs": lambda z: Outputs(z, None, None),
}


@every
def test_a_model_may_answer_in_any_form(name, norm, few):
    net, x, threat = Net().eval(), images(5), Threat(norm, EPS[norm])
    y = labels_of(net, x)
    expected = strike(name, net, x, y, threat, **few)
    for wrap in ANSWERS.values():
        assert torch.equal(strike(name, lambda x, wrap=wrap: wrap(net(x)), x, y, threat, **few), expected)


@every
def test_an_answer_without_logits_is_an_error_that_says_so(name, norm, few):
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"\(N, K\) logits.*shape \(2,\)"):
        strike(name, lambda x: x.flatten(1).sum(1), x, y, Threat(norm, EPS[norm]), **few)


@every
def test_logits_in_another_precision_do_not_change_the_images(name, norm, few):
    """A model may answer in float64 (as a probe of its arithmetic does); its images stay float32."""
    net, x, threat = Net().eval(), images(5), Threat(norm, EPS[norm] / 4)
    y = labels_of(net, x)
    x_adv = strike(name, lambda x: net(x).double(), x, y, threat, **few)
    assert x_adv.dtype == torch.float32
    assert (threat.violation(x_adv, x) == 0).all()


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_is_an_error_that_says_so(name, steps):
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="steps"):
        strike(name, Net(), x, y, Threat("linf", 0.1), steps=steps)


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (pgd, {"restarts": 0}, "restarts >= 1"),
        (apgd, {"restarts": 0}, "restarts >= 1"),
        (pgd, {"keep": "best"}, "'worst' or 'last'.*'best'"),
        (pgd, {"keep": "last", "restarts": 2}, "cannot choose between restarts"),
        (bim, {"keep": "last", "restarts": 2}, "cannot choose between restarts"),
    ],
)
def test_settings_that_mean_nothing_are_refused(attack, settings, message):
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match=message):
        attack(Net(), x, y, Threat("linf", 0.1), score=negative_log_odds, noise=draw(2), **settings)


@pytest.mark.parametrize("first", [0.0, -0.5, 1.5])
def test_the_first_square_is_a_share_of_the_image(first):
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="first"):
        square(Net(), x, y, Threat("linf", 0.1), score=negative_log_odds, noise=draw(2), first=first)


def test_square_says_what_it_is_defined_for():
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="linf and l2"):
        square(Net(), images(2), y, Threat("l1", 1.0), score=negative_log_odds, noise=draw(2))
    with pytest.raises(UserError, match=r"images, got linf, \(2, 36\)"):
        square(Net(), images(2).flatten(1), y, Threat("linf", 0.1), score=negative_log_odds, noise=draw(2))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_whatever_a_new_attack_returns_the_contract_has_the_last_word(norm):
    x, threat = images(4), Threat(norm, EPS[norm])
    x = x.clamp(0.01, 0.99)
    y = torch.zeros(4, dtype=torch.int64)
    for value in (math.nan, math.inf, -math.inf):
        assert torch.equal(attack(lambda *_, value=value: torch.full_like(x, value))(Net(), x, y, threat), x)
    x_adv = attack(lambda *_: x + 5.0)(Net(), x, y, threat)
    assert (threat.violation(x_adv, x) == 0).all()
    assert not torch.equal(x_adv, x)


def test_every_entry_says_what_it_is():
    for name, entry in ATTACKS.items():
        assert entry.about
        assert set(entry.norms) <= {"linf", "l2", "l1"}
        assert {"score", "noise"} <= set(inspect.signature(entry.attack).parameters), name


# ------------------------------------------------------------------------------------------------------ the oracles

DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
FAR = {"lo": -1e3, "hi": 1e3}  # a box that no step comes near


class Plain(nn.Module):
    """A linear model, (N, 1, h, w) -> (N, K)."""

    def __init__(self, classes, dim, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, dim, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(classes, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


def leads(model, x, y, norm):
    """Of each class behind y: by how much, and how fast eps takes it away."""
    z = model(x)
    slope = (model.weight[y][:, None] - model.weight[None]).norm(p=DUAL[norm], dim=2)
    return z.gather(1, y[:, None]) - z, slope


def least_margins(model, x, y, threat):
    """The smallest margin in the threat, in closed form: (N,), min_j (z_y - z_j) - eps ||w_y - w_j||_dual."""
    with torch.no_grad():
        lead, slope = leads(model, x, y, threat.norm)
        return (lead - threat.eps * slope).scatter(1, y[:, None], math.inf).amin(1)


def linear_case(classes, norm, seed, n=60, dim=16):
    model = Plain(classes, dim, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
        lead, slope = leads(model, x, y, norm)
    radii = (lead / slope).nan_to_num(math.inf).amin(1).sort().values[n // 4 : 3 * n // 4]
    widest = int((radii[1:] - radii[:-1]).argmax())
    eps = float(radii[widest] + radii[widest + 1]) / 2  # some can be broken, some cannot, none is at the very border
    return model, x, y, Threat(norm, eps, **FAR)


ORACLES = [
    ("bim", bim, {"steps": 40}),
    ("mim", mim, {"steps": 40}),
    ("pgd", pgd, {"steps": 40}),
    ("pgd-restarts", pgd, {"steps": 40, "restarts": 2}),
    ("apgd", apgd, {"steps": 40}),
]
# The share of the reachable margin that may be left. Nothing, but for an l2 step of constant size from a random start:
# it turns the direction by a constant share a step, and 40 steps of 2.5 eps / 40 leave a few percent.
SLACK = {"linf": 1e-9, "l2": 1e-9, "l2-constant": 0.05, "l1": 1e-9}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(("name", "attack", "few"), ORACLES, ids=[o[0] for o in ORACLES])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_optimum_of_a_binary_linear_model_is_reached(name, attack, few, norm, seed):
    model, x, y, threat = linear_case(2, norm, seed)
    best = least_margins(model, x, y, threat)
    with torch.no_grad():
        clean = -negative_margin(model(x), y)
    x_adv = attack(model, x, y, threat, score=negative_log_odds, noise=draw(len(x)), **few)
    with torch.no_grad():
        margin = -negative_margin(model(x_adv), y)
    constant = norm == "l2" and name.startswith("pgd")
    left = SLACK["l2-constant" if constant else norm] * (clean - best)
    assert (margin >= best - 1e-9).all(), "below the optimum: outside the threat"
    robust = best > 0
    assert 10 < int(robust.sum()) < len(x) - 10, "a case that tells nothing"
    assert (margin <= best + left)[robust].all()
    sure = best < -left
    assert (margin < 0)[sure].all()
    if not constant:
        assert torch.equal(margin >= 0, best >= 0), "robust accuracy is not the closed form's"


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    ("name", "attack", "few"), [("bim", bim, {"steps": 20}), ("pgd", pgd, {"steps": 40}), ("apgd", apgd, {"steps": 20})]
)
@pytest.mark.parametrize("score", ["dlr", "margin"])
def test_targeted_runs_reach_the_optimum_of_a_linear_model_with_ten_classes(name, attack, few, norm, score):
    model, x, y, threat = linear_case(10, norm, 3)
    best = least_margins(model, x, y, threat)
    robust = best > 0
    assert 10 < int(robust.sum()) < len(x) - 10
    stands = torch.ones_like(robust)
    with torch.no_grad():
        ranked = model(x).scatter(1, y[:, None], -math.inf).argsort(dim=1, descending=True)
        for rank in range(9):
            rows = torch.nonzero(stands)[:, 0]
            kept = {**few, "target": ranked[rows, rank], "score": SCORES[score]}
            x_adv = attack(model, x[rows], y[rows], threat, noise=draw(len(x))[rows].fold(rank), **kept)
            stands[rows] &= ~fooled(model(x_adv), y[rows])
    assert not (robust & ~stands).any(), "broke what cannot be broken"
    # dlr's own denominator bends its ascent, and what a step of constant size leaves on the l2 sphere may be a sample.
    assert int((stands & ~robust).sum()) <= (name == "pgd" and norm == "l2")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_step_of_pgd_from_x_is_fgsm(norm):
    model, x, threat = Net(), images(8), Threat(norm, EPS[norm])
    y = labels_of(model, x)
    expected = fgsm(model, x, y, threat, score=negative_log_odds, noise=draw(8))
    one = pgd(
        model, x, y, threat, score=negative_log_odds, noise=draw(8), steps=1, step_size=threat.eps, random_start=False
    )
    assert torch.equal(one, expected)


def test_fgsm_is_the_signed_step():
    model, x, y, threat = linear_case(2, "linf", 1)
    with torch.no_grad():
        z = model(x)
    sign = torch.where((y == 0)[:, None], 1.0, -1.0) * (model.weight[1] - model.weight[0]).sign()
    moved = x + threat.eps * sign.view_as(x).detach()
    x_adv = fgsm(model, x, y, threat, score=negative_log_odds, noise=draw(len(x)))
    assert (z.argmax(1) == y).all()
    assert torch.allclose(x_adv, moved, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------- points, steps, who is still there


class Counter(nn.Module):
    """Notes the size of every batch that goes forward, and the points themselves."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.sizes, self.points = inner, [], []

    def forward(self, x):
        self.sizes.append(len(x))
        self.points.append(x.detach().clone())
        return self.inner(x)


def never(x):
    """Two logits, class 0 always far ahead, a gradient everywhere."""
    total = x.flatten(1).sum(1)
    return torch.stack([1e6 + total, total * 0], 1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_k_steps_consider_k_plus_one_points(norm, steps):
    x, y, threat = images(3), torch.zeros(3, dtype=torch.int64), Threat(norm, EPS[norm])
    run = partial(strike, x=x, y=y, threat=threat, steps=steps)
    for name, kept, points in [
        ("pgd", {}, steps + 1),
        ("pgd", {"keep": "last"}, steps),
        ("pgd", {"restarts": 3}, 3 * (steps + 1)),
        ("bim", {}, steps + 1),
        ("mim", {}, steps + 1),
        ("apgd", {}, steps + 1),
        ("apgd", {"restarts": 2}, 2 * (steps + 1)),
        ("noise", {}, steps),
        *([("square", {}, steps)] if norm != "l1" else []),
    ]:
        model = Counter(never)
        run(name, model, **kept)
        assert model.sizes == [3] * points, (name, kept)


@pytest.mark.parametrize("name", ["bim", "pgd"])
def test_fooled_samples_leave_the_batch(name):
    """Sample i needs i + 1 steps, so it is looked at i + 2 times, and never again."""
    steps, size, n = 6, 0.01, 9
    threat = Threat("linf", 0.2)
    x = torch.full((n, 1, 1, 1), 0.5) + size * (torch.arange(n) + 0.5).view(-1, 1, 1, 1)
    model = Counter(lambda x: torch.stack([x.flatten(1)[:, 0] - 0.5, 0.5 - x.flatten(1)[:, 0]], 1))
    y = torch.zeros(n, dtype=torch.int64)
    kept = {"steps": steps, "step_size": size} | ({"random_start": False} if name == "pgd" else {})
    x_adv = strike(name, model, x, y, threat, **kept)
    assert sum(model.sizes) == sum(min(i + 2, steps + 1) for i in range(n))
    assert model.sizes == [n, n, n - 1, n - 2, n - 3, n - 4, n - 5]
    assert fooled(model(x_adv), y).tolist() == [i < steps for i in range(n)]


@pytest.mark.parametrize(("name", "settings"), [("pgd", {"restarts": 3}), ("apgd", {"restarts": 3}), ("noise", {})])
def test_what_is_fooled_at_once_costs_one_look(name, settings):
    model = Counter(lambda x: -never(x))
    strike(name, model, images(4), torch.zeros(4, dtype=torch.int64), Threat("linf", 0.1), steps=5, **settings)
    assert model.sizes == [4]


def island(low, high):
    """Wrong only for low < x < high; what is climbed is x itself, so a climber walks over the island."""

    def model(x):
        p = x.flatten(1)[:, 0]
        inside = torch.where((p > low) & (p < high), 1.0, -1.0)
        return Outputs(torch.stack([-inside, inside], 1), x.flatten(1))

    return model


def test_a_success_on_the_path_is_returned():
    """IoAF's silent success: an iterate fools, the last one does not."""
    model, threat = island(0.32, 0.38), Threat("linf", 0.3)
    x, y = torch.full((2, 1, 1, 1), 0.3), torch.zeros(2, dtype=torch.int64)
    walk = {"score": lambda out, y: out.features[:, 0], "steps": 6, "step_size": 0.05}
    found = pgd(model, x, y, threat, noise=draw(2), random_start=False, **walk)
    missed = pgd(model, x, y, threat, noise=draw(2), random_start=False, keep="last", **walk)
    assert fooled(model(found).logits, y).all()
    assert not fooled(model(missed).logits, y).any()
    assert torch.allclose(missed, torch.full_like(x, 0.6))
    assert fooled(model(strike("bim", model, x, y, threat, **walk)).logits, y).all()


def test_the_last_point_is_judged_too():
    """adversarial-library's slip: evaluated before stepping, so that the last step counts for nothing."""
    model, threat = island(0.59, 0.61), Threat("linf", 0.3)
    x, y = torch.full((1, 1, 1, 1), 0.3), torch.zeros(1, dtype=torch.int64)
    walk = {"score": lambda out, y: out.features[:, 0], "steps": 6, "step_size": 0.05}
    assert fooled(model(pgd(model, x, y, threat, noise=draw(1), random_start=False, **walk)).logits, y).all()


def test_apgd_judges_its_first_and_its_last_point():
    y, climb = torch.zeros(1, dtype=torch.int64), {"score": lambda out, y: out.features[:, 0]}
    for steps, where in ((1, (0.59, 0.61)), (5, (0.0, 0.5999))):
        x = torch.full((1, 1, 1, 1), 0.3)
        model, threat = island(*where), Threat("linf", 0.3)
        assert fooled(model(apgd(model, x, y, threat, noise=draw(1), steps=steps, **climb)).logits, y).all()


@pytest.mark.parametrize("restarts", [1, 2, 5])
@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_restarts_are_merged_sample_by_sample(name, restarts):
    """Nothing but the random start decides here, so a sample falls if any of its starts fools."""
    n, threat = 200, Threat("linf", 0.2)
    x, y, noise = torch.full((n, 1, 1, 1), 0.5), torch.zeros(n, dtype=torch.int64), draw(n)

    def model(x):
        p = x.detach().flatten(1)[:, 0]
        return torch.stack([0.62 - p, p - 0.62], 1)  # a fifth of the starts

    starts = [threat.random_start(x, noise.fold(restart)) for restart in range(restarts)]
    falls = torch.stack([fooled(model(start), y) for start in starts])
    x_adv = strike(name, model, x, y, threat, noise=noise, steps=2, restarts=restarts)
    assert torch.equal(fooled(model(x_adv), y), falls.any(0))
    assert not torch.equal(falls.any(0), falls[0]) or restarts == 1


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_the_worst_point_is_a_maximum_over_all_that_was_seen(points, pick):
    """Against a literal search, whatever the order and whichever rows see a point; NaN and infinity included."""
    y = torch.tensor([0, 1, 0])
    x = torch.zeros(3, 1)
    worst, seen = MostAdversarial(x, y), [[] for _ in range(3)]
    for number, values in enumerate(points):
        z = torch.tensor([[v, -v] for v in values])
        broken = pick.draw(st.lists(st.sampled_from([0.0, math.nan, math.inf]), min_size=3, max_size=3))
        z[:, 0] += torch.tensor(broken)
        rows = torch.tensor(sorted(pick.draw(st.sets(st.integers(0, 2), min_size=1))))
        stands = worst.see(rows, torch.full((len(rows), 1), number + 1.0), z[rows])
        for k, row in enumerate(rows.tolist()):
            seen[row].append((bool(fooled(z[row : row + 1], y[row : row + 1])), float(number + 1)))
            assert bool(stands[k]) == (not any(f for f, _ in seen[row]))
    for row in range(3):
        hits = [number for f, number in seen[row] if f]
        assert not hits or float(worst.x[row]) in hits
        assert bool(worst.fooled[row]) == bool(hits)


# ------------------------------------------------------------------------------------- gradients that are not there


@pytest.mark.parametrize(("name", "norm"), GRADIENT)
@pytest.mark.parametrize("kind", ["detached", "zero", "nan", "unused"])
def test_a_gradient_that_is_not_there_moves_nothing(name, norm, kind):
    net, x, threat = Net().eval(), images(5), Threat(norm, EPS[norm])
    y = labels_of(net, x, wrong=False)

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.full_like(grad, math.nan)

    model = {
        "detached": lambda x: net(x).detach(),
        "zero": lambda x: net(x) * 0 + torch.eye(4)[labels_of(net, x.detach(), wrong=False)],
        "nan": lambda x: net(Bad.apply(x)),
        "unused": lambda x: net(x.detach()),
    }[kind]
    few = FEW.get(name, {"steps": 5})
    if name == "pgd":
        x_adv = strike(name, model, x, y, threat, random_start=False, **few)
        assert torch.equal(x_adv, x)
    x_adv = strike(name, model, x, y, threat, **few)
    assert x_adv.isfinite().all()
    assert (threat.violation(x_adv, x) == 0).all()
    if name in ("fgsm", "bim", "mim"):
        assert torch.equal(x_adv, x)


# ------------------------------------------------------------------------------------------------------------- apgd


def literal_apgd(model, x, y, threat, noise, steps, score):
    """Croce and Hein's loop for one sample, in plain Python, as field/attacks.md D1 writes it down."""
    length, ends, end = int(0.22 * steps), [], 0
    while end + length <= steps:
        end += length
        ends.append(end)
        length = max(length - max(int(0.03 * steps), 1), int(0.06 * steps), 1)

    def ask(point):
        point = point.detach().requires_grad_()
        value = score(model(point), y)
        return value.item(), torch.autograd.grad(value.sum(), point)[0]

    now = old = best = threat.random_start(x, noise)
    value, grad = ask(now)
    values, best_value, best_grad = [value], value, grad
    size, was_halved, judged, last = 2 * threat.eps, True, value, 0
    for i in range(1, steps + 1):
        z = threat.project(now + size * threat.ascent(grad), x)
        a = 1.0 if i == 1 else 0.75
        now, old = threat.project(now + a * (z - now) + (1 - a) * (now - old), x), now
        value, grad = ask(now)
        values.append(value)
        if value > best_value:
            best, best_value, best_grad = now, value, grad
        if i in ends:
            rose = sum(values[j] > values[j - 1] for j in range(last + 1, i + 1))
            if rose <= 0.75 * (i - last) or (not was_halved and best_value <= judged):
                size, was_halved = size / 2, True
                now, grad = best, best_grad
                values[-1] = best_value
            else:
                was_halved = False
            judged, last = best_value, i
    return best_value


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_is_the_published_loop(norm):
    """Every value on the path against a literal twin: 50 steps hold six periods and both reasons for halving."""
    net = Net().double().eval()
    x, threat = images(4, dtype=torch.float64), Threat(norm, EPS[norm])
    y, noise = labels_of(net, x, wrong=False), draw(4)

    def lead(x):  # class y far ahead: nothing is fooled, so the loop runs to its end
        return net(x) * 3 + 50 * F.one_hot(y[: len(x)] if len(x) == 4 else y[row : row + 1], 4)

    row = 0
    x_adv = apgd(lead, x, y, threat, score=negative_margin, noise=noise, steps=50)
    reached = negative_margin(lead(x_adv), y)
    for row in range(4):
        one = slice(row, row + 1)
        start = noise.fold(0)[one]
        expected = literal_apgd(lead, x[one], y[one], threat, start, 50, negative_margin)
        assert reached[row].item() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.3, 0.95), st.sampled_from([20, 50]))
def test_apgd_walks_the_published_path_whatever_the_score_does(seed, rises, steps):
    """A scripted score: falls first, then rises without a new best, and all else that halves a step or does not."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.rand(steps + 1, generator=generator, dtype=torch.float64) < rises
    script = (torch.rand(steps + 1, generator=generator, dtype=torch.float64) * torch.where(up, 1.0, -3.0)).cumsum(0)
    pull = torch.randn(steps + 1, 1, 2, 2, generator=generator, dtype=torch.float64)
    threat, noise = Threat("l2", 1.0, **FAR), draw(1)
    x, y = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def walk(attack):
        points, turn = [], iter(range(steps + 1))

        def model(x):
            points.append(x.detach().clone())
            return Outputs(torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(len(x), 2), x)

        def score(out, y):
            k = next(turn)
            pulled = (out.features * pull[k]).flatten(1).sum(1)
            return script[k] + pulled - pulled.detach()

        attack(model, score)
        return torch.cat(points)

    ours = walk(lambda model, score: apgd(model, x, y, threat, score=score, noise=noise, steps=steps))
    theirs = walk(lambda model, score: literal_apgd(model, x, y, threat, noise.fold(0), steps, score))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


def test_apgd_judges_progress_where_the_reference_does():
    from holdfast.attacks.apgd import _periods

    assert _periods(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 5, 10, 20, 30, 50, 1000):
        ends = _periods(steps)
        assert all(a < b for a, b in zip([0, *ends], ends, strict=False))
        assert all(end < steps for end in ends)


# ---------------------------------------------------------------------------------------------- a small trained network


@pytest.fixture(scope="session")
def digits():
    """(net, x, y): a small convolutional network, 97% right, and 300 test digits that it gets right."""
    net, split = on_digits(
        lambda: (
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        ),
        lr=3e-3,
        epochs=8,
    )  # fmt: skip
    return net, *right_ones(net, split, 300)


def survivors(name, model, x, y, threat, **kept):
    x_adv = strike(name, model, x, y, threat, **kept)
    assert (threat.violation(x_adv, x) == 0).all()
    with torch.no_grad():
        return ~fooled(as_outputs(model(x_adv)).logits, y)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.6), ("l1", 2.5)])
def test_stronger_attacks_break_no_less(digits, norm, eps):
    """noise < fgsm <= pgd <= apgd, in samples of 300."""
    net, x, y = digits
    threat = Threat(norm, eps)
    stands = {
        name: int(survivors(name, net, x, y, threat, score=negative_log_odds, **kept).sum())
        for name, kept in {"noise": {"steps": 20}, "fgsm": {}, "pgd": {"steps": 25}, "apgd": {"steps": 25}}.items()
    }
    assert 15 < stands["pgd"] < 270, "a case that tells nothing"
    assert stands["noise"] == max(stands.values())
    assert stands["noise"] > stands["pgd"] + 30
    assert stands["fgsm"] >= stands["pgd"]
    assert stands["apgd"] <= stands["pgd"]


@pytest.mark.parametrize("name", ["pgd", "apgd", "square", "noise"])
def test_batch_size_and_order_leave_the_verdicts_alone(digits, name):
    net, x, y = digits
    threat, noise, few = Threat("linf", 0.12), draw(len(x)), {"steps": 10, "score": dlr}
    together = survivors(name, net, x, y, threat, noise=noise, **few)
    parts = [survivors(name, net, x[r], y[r], threat, noise=noise[r], **few) for r in torch.arange(300).split(37)]
    order = permuted(len(x), 1)
    mixed = survivors(name, net, x[order], y[order], threat, noise=noise[order], **few)
    differ = int((torch.cat(parts) != together).sum() + (mixed != together[order]).sum())
    assert differ <= 0.001 * 2 * len(x)


SCALES = (1e-4, 1.0, 1e3, 1e6)


def scaled(net, scale):
    return lambda x: net(x) * scale


@pytest.mark.parametrize("name", ["pgd", "apgd"])
@pytest.mark.parametrize("score", ["margin", "dlr"])
def test_the_scale_of_the_logits_does_not_change_robust_accuracy(digits, name, score):
    net, x, y = digits
    counts = [
        int(survivors(name, scaled(net, s), x, y, Threat("linf", 0.12), score=SCORES[score], steps=12).sum())
        for s in SCALES
    ]
    assert max(counts) - min(counts) <= 1, counts


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_u_does_not_saturate_and_becomes_the_margin(digits, name):
    """Beyond 1e3 its soft maximum is the margin's. Near 0 it climbs the competitors' mean: a suite needs dlr too."""
    net, x, y = digits

    def count(score, scale):
        return int(survivors(name, scaled(net, scale), x, y, Threat("linf", 0.12), score=score, steps=12).sum())

    counts = [count(negative_log_odds, s) for s in SCALES]
    hard = count(negative_margin, 1.0)
    assert max(counts[1:]) - min(counts[1:]) <= 10, counts
    assert counts[0] > counts[1] + 20
    assert abs(counts[2] - hard) <= 1
    assert abs(counts[3] - hard) <= 1


def test_float32_cross_entropy_is_blinded_by_the_scale_of_the_logits(digits):
    """The artefact behind many a claim: at 1e6 its gradient is zero and the network 'robust'; u sees through it."""
    net, x, y = digits
    count = {
        (score, s): int(survivors("pgd", scaled(net, s), x, y, Threat("linf", 0.12), score=of, steps=12).sum())
        for score, of in (("cross_entropy", cross_entropy), ("u", negative_log_odds))
        for s in (1.0, 1e6)
    }
    assert abs(count["cross_entropy", 1.0] - count["u", 1.0]) <= 3
    assert count["cross_entropy", 1e6] > count["u", 1e6] + 100, count


@pytest.mark.parametrize("name", ["pgd", "bim", "mim"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inference_information_in_the_inner_attack_changes_nothing(digits, name, norm):
    """The gradients of SCE and I-SCE have one direction: the same x_adv in float64, bit for bit where signs decide."""
    net, x, y = digits
    threat = Threat(norm, {"linf": 0.12, "l2": 0.6}[norm])
    x, y = x[:60].double(), y[:60]
    net = copy.deepcopy(net).double()
    few = {"steps": 8, "keep": "last"}
    plain, shifted = (strike(name, net, x, y, threat, score=score, **few) for score in (sce, partial(isce, s=5.0)))
    if norm == "linf" and name != "mim":
        assert torch.equal(plain, shifted)
    assert torch.allclose(plain, shifted, rtol=0, atol=1e-9)
    assert not torch.allclose(plain, x, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- square


def quantised(net):
    """Four grey levels: a gradient that is zero everywhere, and hides nothing from one who asks for answers only."""
    return lambda x: net((x * 3).round() / 3)


def test_square_breaks_what_only_hides_its_gradient(digits):
    net, x, y = digits
    model, threat = quantised(net), Threat("linf", 0.2)
    with torch.no_grad():
        right = net((x * 3).round() / 3).argmax(1) == y
    x, y = x[right][:100], y[right][:100]
    by_pgd = survivors("pgd", model, x, y, threat, score=negative_log_odds, steps=20, random_start=False)
    by_square = survivors("square", model, x, y, threat, score=negative_margin, steps=120)
    assert by_pgd.all()
    assert int(by_square.sum()) < 60


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_gives_every_sample_its_own_squares(digits, norm):
    """AutoAttack draws one window for the whole batch; here two samples of a batch are as each alone."""
    net, x, y = digits
    # Far from any mistake, so that every query is asked.
    model = Counter(lambda x: net(x) * 1e-2 + 10 * F.one_hot(y[:2][: len(x)], 10) if len(x) == 2 else alone(x))

    def alone(x):
        return net(x) * 1e-2 + 10 * F.one_hot(y[row : row + 1], 10)

    row, threat, noise, steps = 0, Threat(norm, 0.3), draw(2), 40
    both = square(model, x[:2], y[:2], threat, score=negative_margin, noise=noise, steps=steps)
    together = model.points
    assert [len(points) for points in together] == [2] * steps
    for row in range(2):
        model.points = []
        one = slice(row, row + 1)
        x_adv = square(model, x[one], y[one], threat, score=negative_margin, noise=noise[one], steps=steps)
        assert torch.allclose(x_adv, both[one], rtol=0, atol=1e-6)
        for points, mine in zip(together, model.points, strict=True):
            assert torch.allclose(points[one], mine, rtol=0, atol=1e-6)


def box_of(changed):
    """(top, bottom, left, right) of the true cells of (C, H, W)."""
    cells = torch.nonzero(changed.any(0))
    return (*cells.amin(0).tolist(), *cells.amax(0).tolist()) if len(cells) else None


def test_square_changes_one_square_of_the_best_point_and_keeps_only_rises():
    """Read off from what it asks: each proposal differs from the best so far in one square, or it had kept a fall."""
    side, steps = 12, 60
    x = torch.full((3, 2, side, side), 0.5)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * side * side, generator=generator)

    def rugged(x):
        z = (x.flatten(1) @ weight) + (17 * x.flatten(1)).sin().sum(1)
        return torch.stack([1e4 - z, z * 0], 1)

    model, threat = Counter(rugged), Threat("linf", 0.2)
    y = torch.zeros(3, dtype=torch.int64)
    x_adv = square(model, x, y, threat, score=negative_margin, noise=draw(3), steps=steps, first=0.3)
    assert len(model.points) == steps
    values = [negative_margin(rugged(points), y) for points in model.points]
    boxes, kept = [], torch.zeros(3, dtype=torch.int64)
    for row in range(3):
        best, best_value, sizes = model.points[0][row], values[0][row], []
        for query in range(1, steps):
            proposed = model.points[query][row]
            box = box_of(proposed != best)
            share = 0.3 / 2 ** (int(query > 10) + int(query > 50))
            assert box is None or max(box[2] - box[0], box[3] - box[1]) + 1 <= round((share * side * side) ** 0.5)
            sizes.append(box)
            if values[query][row] > best_value:
                best, best_value = proposed, values[query][row]
                kept[row] += 1
        boxes.append(sizes)
        assert torch.equal(x_adv[row], best)
        assert torch.allclose((best - x[row]).abs(), torch.tensor(0.2))
    assert (kept > 3).all()
    assert (kept < steps - 10).all()
    same = sum(a == b for a, b in zip(boxes[0], boxes[1], strict=True))
    assert same < steps / 2, "samples share their windows"


@pytest.mark.parametrize("channels", [1, 3])
def test_square_stays_on_the_l2_sphere(channels):
    """With the box out of reach every query has size eps: what one square gives up another takes."""
    x, eps = torch.zeros(4, channels, 9, 11), 0.7
    model = Counter(lambda x: torch.stack([1e3 + x.flatten(1).sum(1) * 0, x.flatten(1)[:, :40].sum(1)], 1))
    threat = Threat("l2", eps, **FAR)
    x_adv = square(
        model, x, torch.zeros(4, dtype=torch.int64), threat, score=negative_log_odds, noise=draw(4), steps=80
    )
    for points in [*model.points, x_adv]:
        assert torch.allclose(threat.size(points - x), torch.full((4,), eps), rtol=1e-4)
    first, last = (p.flatten(1)[:, :40].sum(1) for p in (model.points[0], x_adv))
    assert (last > first).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_query_of_square_and_noise_is_in_the_threat(norm):
    x, threat = images(4), Threat(norm, EPS[norm])
    for run in (square, noise_attack):
        model = Counter(never)
        run(model, x, torch.zeros(4, dtype=torch.int64), threat, score=negative_log_odds, noise=draw(4), steps=30)
        assert all((threat.violation(points, x) == 0).all() for points in model.points)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (3, 1, 7), (2, 5, 3)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_takes_images_of_any_size(shape, norm):
    x, threat = torch.full((2, *shape), 0.5), Threat(norm, 0.2)
    y = torch.zeros(2, dtype=torch.int64)
    x_adv = square(never, x, y, threat, score=negative_log_odds, noise=draw(2), steps=15)
    assert (threat.violation(x_adv, x) == 0).all()
    assert not torch.equal(x_adv, x)


def test_mim_is_bim_with_a_memory():
    """Literal twin: gradients divided by their l1 size and summed, decay 1."""
    net = Net().double().eval()
    x, threat, steps = images(4, dtype=torch.float64), Threat("linf", 0.1), 6
    y = labels_of(net, x, wrong=False)
    x_adv, velocity = x, torch.zeros_like(x)
    for _ in range(steps):
        point = x_adv.clone().requires_grad_()
        grad = torch.autograd.grad(negative_log_odds(net(point), y).sum(), point)[0]
        velocity = velocity + grad / grad.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
        x_adv = (x_adv + 1.25 * threat.eps / steps * velocity.sign()).clamp(x - threat.eps, x + threat.eps).clamp(0, 1)
    ours = mim(net, x, y, threat, score=negative_log_odds, noise=draw(4), steps=steps, keep="last")
    assert torch.allclose(ours, x_adv, rtol=0, atol=1e-12)
