"""The attacks that look for the smallest perturbation: closed forms, the projection on a plane, and the contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.attacks import fgsm, fooled
from holdfast.attacks.minimal_norm import NearestAdversarial, cw, deepfool, distances, fab, fmn, lbfgs, scores_and_grads
from holdfast.errors import UserError
from holdfast.losses import negative_log_odds, negative_margin
from holdfast.noise import Noise
from holdfast.threat import Threat

DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
FAR = {"lo": -8.0, "hi": 8.0}  # a box that the boundary is well within
WIDE = {"linf": 16.0, "l2": 64.0, "l1": 256.0}  # any point of it
FEW = {  # settings that are enough for the small cases here
    "deepfool": {"steps": 5},
    "cw": {"steps": 20, "searches": 3},
    "lbfgs": {"steps": 8, "searches": 4},
    "fmn": {"steps": 15},
    "fab": {"steps": 5, "targets": 3},
}
BY_NAME = {"deepfool": deepfool, "cw": cw, "lbfgs": lbfgs, "fmn": fmn, "fab": fab}
PAIRS = [(name, norm) for name in BY_NAME for norm in DUAL if (name, norm) != ("cw", "l1")]
every = pytest.mark.parametrize(("name", "norm"), PAIRS)


def draw(n, seed=0):
    return Noise(seed, torch.arange(n))


def strike(name, model, x, y, threat, *, score=negative_margin, noise=None, **kept):
    return BY_NAME[name](model, x, y, threat, score=score, noise=noise or draw(len(x)), **kept)


class Plain(nn.Module):
    """A linear model, (N, 1, 4, 4) -> (N, K)."""

    def __init__(self, classes, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(classes, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight).sum(2) + self.bias  # no product whose rounding depends on N


def linear_case(classes, norm, seed=0, n=24):
    """(model, x, y, needed): needed is the closed form min_j (z_y - z_j) / ||w_y - w_j||_dual."""
    model = Plain(classes, seed)
    x = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) / 2
    with torch.no_grad():
        z = model(x)
        y = z.argmax(1)
        slope = (model.weight[y][:, None] - model.weight[None]).norm(p=DUAL[norm], dim=2)
        needed = ((z.gather(1, y[:, None]) - z) / slope).nan_to_num(math.inf).amin(1)
    return model, x, y, needed


# ------------------------------------------------------------------------------------------------------ closed forms

# The distance found over the closed form: (of the median sample, of the worst). Where a class that is not the nearest
# leads at first, fmn and cw may settle at its boundary; the penalty of lbfgs is l2's whatever the norm is.
TOLERANCE = {
    ("deepfool", 2): (1.0201, 1.0201), ("deepfool", 4): (1.0201, 1.0201),
    ("fab", 2): (1.006, 1.006), ("fab", 4): (1.006, 1.006),
    ("fmn", 2): (1.0001, 1.0001), ("fmn", 4): (1.0001, 1.8),
    ("cw", 2): (1.01, 1.02), ("cw", 4): (1.02, 1.5),
    ("lbfgs", 2): (1.03, 1.03), ("lbfgs", 4): (1.03, 1.5),
    ("lbfgs", 2, "linf"): (1.8, 1.8), ("lbfgs", 4, "linf"): (1.7, 1.9),
    ("lbfgs", 2, "l1"): (1.8, 1.8), ("lbfgs", 4, "l1"): (1.7, 2.0),
}  # fmt: skip
LOOSE = {("lbfgs", "linf"), ("lbfgs", "l1")}
FULL = {"lbfgs": {"searches": 8, "steps": 10}, "fab": {"steps": 10}, "deepfool": {"steps": 5}}


@every
@pytest.mark.parametrize("classes", [2, 4])
def test_the_least_perturbation_of_a_linear_model_is_found(name, norm, classes):
    model, x, y, needed = linear_case(classes, norm)
    x_adv = strike(name, model, x, y, Threat(norm, WIDE[norm], **FAR), **FULL.get(name, {}))
    assert fooled(model(x_adv), y).all()
    ratio = distances(x_adv, x, norm) / needed
    median, worst = TOLERANCE.get((name, classes, norm), TOLERANCE[name, classes])
    assert ratio.min() > 1 - 1e-9, "nearer than the boundary"
    assert ratio.median() < median
    assert ratio.max() < worst


@every
def test_a_target_is_gone_for_and_any_mistake_on_the_way_counts(name, norm):
    model, x, y, _ = linear_case(4, norm, seed=3, n=12)
    target = (y + 1) % 4
    with torch.no_grad():
        z, rows = model(x), torch.arange(12)
        to_target = (z[rows, y] - z[rows, target]) / (model.weight[y] - model.weight[target]).norm(p=DUAL[norm], dim=1)
    x_adv = strike(name, model, x, y, Threat(norm, WIDE[norm], **FAR), target=target, **FULL.get(name, {}))
    assert fooled(model(x_adv), y).all()
    assert (distances(x_adv, x, norm) < (3.0 if (name, norm) in LOOSE else 1.5) * to_target).all()


@every
def test_it_comes_back_where_the_threat_holds_it_and_only_there(name, norm):
    """Under evaluate: broken where the closed form lies clearly in the threat, standing where it lies outside."""
    model, x, y, needed = linear_case(2, norm, seed=2)
    threat = Threat(norm, float(needed.sort().values[12]), **FAR)
    x_adv = strike(name, model, x, y, threat, **FULL.get(name, {}))
    assert (threat.violation(x_adv, x) == 0).all()
    broken = fooled(model(x_adv), y)
    assert not broken[needed > threat.eps * (1 + 1e-6)].any()
    reach = 3.0 if (name, norm) in LOOSE else 1.05
    assert broken[needed * reach < threat.eps].all()


# -------------------------------------------------------------------------------------------- projection on a plane


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(["linf", "l2", "l1"]), st.floats(-1.5, 1.5))
def test_the_step_to_a_plane_is_the_smallest_one_in_the_box(seed, norm, share):
    """It meets the plane inside the box, or all walls are reached; no feasible point that we can make is smaller."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 6, generator=generator, dtype=torch.float64)
    slope = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    slope[:, seed % 6] = 0.0
    threat = Threat(norm, 1.0)
    most = (slope.abs() * torch.where(slope * share > 0, 1 - x, x)).sum(1)
    need = share * most
    r = threat.to_plane(x, slope, need)
    assert (x + r >= -1e-12).all()
    assert (x + r <= 1 + 1e-12).all()
    gained = (slope * r).sum(1)
    assert torch.allclose(gained, need.clamp(-most, most), rtol=1e-9, atol=1e-12)
    if abs(share) >= 1:
        return
    # Others on the same plane within the box: random points put there along their own segment to a corner.
    corner = torch.where(slope * share > 0, 1.0, 0.0) - x
    points = torch.rand(200, 6, generator=generator, dtype=torch.float64) - x
    have = (points * slope).sum(1, keepdim=True)
    t = (need[:, None] - have) / ((corner - points) * slope).sum(1, keepdim=True)
    on_it = ((t >= 0) & (t <= 1))[:, 0]
    others = (points + t * (corner - points))[on_it]
    assert (threat.size(others) >= threat.size(r) - 1e-9).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_step_to_a_plane_survives_any_scale_and_no_slope(norm, scale):
    x, threat = torch.zeros(2, 3), Threat(norm, 1.0, -9, 9)
    slope = torch.tensor([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0]])
    r = threat.to_plane(x, slope * scale, torch.tensor([2.0, 2.0]) * scale)
    assert torch.allclose((r * slope).sum(1), torch.tensor([2.0, 0.0]))
    assert (r[1] == 0).all()


def test_slopes_are_the_gradients_of_each_height():
    model, x, y, _ = linear_case(4, "l2", n=5)
    logits, heights, grads = scores_and_grads(model, x, lambda z: z[:, 1:] - z[:, :1])
    assert torch.equal(logits, model(x).detach())
    assert torch.allclose(heights, logits[:, 1:] - logits[:, :1])
    expected = (model.weight[1:] - model.weight[:1]).detach().view(1, 3, 1, 4, 4).expand(5, -1, -1, -1, -1)
    assert torch.allclose(grads, expected)
    _, _, none = scores_and_grads(lambda x: model(x.detach()).detach(), x, lambda z: z[:, 1:])
    assert none.shape == (5, 3, 1, 4, 4)
    assert (none == 0).all()
    assert not y.requires_grad


# ------------------------------------------------------------------------------------------------------ the contract


@every
@pytest.mark.parametrize("classes", [2, 3])
def test_in_the_threat_for_few_classes_and_samples_that_are_wrong_already(name, norm, classes):
    model, x, y, _ = linear_case(classes, norm, n=6)
    model, x = model.float(), x.float()
    y[::2] = (y[::2] + 1) % classes
    for eps in (1e-4, 0.3):
        threat = Threat(norm, eps, **FAR)
        x_adv = strike(name, model, x, y, threat, **FEW[name])
        assert x_adv.dtype == torch.float32
        assert (threat.violation(x_adv, x) == 0).all()
        assert fooled(model(x_adv), y)[::2].all()
        assert torch.equal(x_adv[::2], x[::2]), "wrong already: the smallest perturbation is none"


@every
def test_a_tiny_threat_leaves_the_clean_answer(name, norm):
    model, x, y, needed = linear_case(3, norm, n=8)
    threat = Threat(norm, float(needed.min()) / 10, **FAR)
    assert not fooled(model(strike(name, model, x, y, threat, **FEW[name])), y).any()


@every
def test_nan_is_never_a_success_and_never_comes_back(name, norm):
    """NaN logits beyond a boundary that is nearer than the true one, NaN gradients, and a graph that is cut."""
    model, x, y, _ = linear_case(3, norm, n=6)
    threat = Threat(norm, 0.5 * {"linf": 1, "l2": 2, "l1": 4}[norm], **FAR)

    def broken(z):
        return model(z) * torch.where((z - x).abs().flatten(1).amax(1) > 1e-9, math.nan, 1.0)[:, None]

    assert torch.equal(strike(name, broken, x, y, threat, **FEW[name]), x)

    def rough(z):  # the logits are fine, the gradient is NaN
        return model(z) + 0 * (z - z.detach()).abs().sqrt().sum((1, 2, 3))[:, None]

    def cut(z):
        return model(z).detach()

    for odd in (rough, cut):
        x_adv = strike(name, odd, x, y, threat, **FEW[name])
        assert x_adv.isfinite().all()
        assert (threat.violation(x_adv, x) == 0).all()


@every
def test_batch_size_and_order_do_not_matter(name, norm):
    model, x, y, _ = linear_case(4, norm, n=7)
    threat, noise = Threat(norm, 0.3, **FAR), draw(7)
    together = strike(name, model, x, y, threat, noise=noise, **FEW[name])
    for rows in (torch.arange(1), torch.tensor([4, 5, 6]), torch.tensor([6, 2, 0, 4, 1, 3, 5])):
        alone = strike(name, model, x[rows], y[rows], threat, noise=noise[rows], **FEW[name])
        assert torch.allclose(alone, together[rows], rtol=0, atol=1e-7)


def test_restarts_of_fab_draw_the_samples_own_noise():
    model, x, y, _ = linear_case(3, "l2", n=4)
    few = {"steps": 2, "restarts": 2, "targets": 2}
    threat = Threat("l2", 2.0, **FAR)
    whole = strike("fab", model, x, y, threat, noise=draw(4), **few)
    part = strike("fab", model, x[2:], y[2:], threat, noise=draw(4)[2:], **few)
    assert torch.allclose(part, whole[2:], rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-4, 1e6])
@pytest.mark.parametrize("name", ["deepfool", "cw", "fmn", "fab"])
def test_the_scale_of_the_logits_does_not_matter(name, scale):
    model, x, y, _ = linear_case(3, "l2", n=8)
    threat = Threat("l2", 64.0, **FAR)
    plain, scaled = (
        distances(strike(name, m, x, y, threat, **FEW[name]), x, "l2") for m in (model, lambda x: model(x) * scale)
    )
    assert torch.allclose(plain, scaled, rtol=1e-3)


def test_confidence_asks_for_a_lead():
    model, x, y, _ = linear_case(3, "l2", n=8)
    threat = Threat("l2", 64.0, **FAR)
    for confidence in (0.0, 2.0):
        x_adv = strike("cw", model, x, y, threat, confidence=confidence)
        assert (negative_margin(model(x_adv), y) >= confidence).all()


def test_nearest_keeps_the_nearest_that_fools():
    x, y = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    near = NearestAdversarial(x, y, Threat("l2", 9.0, -9, 9))
    right, wrong = torch.tensor([[1.0, 0.0]]).expand(3, 2), torch.tensor([[0.0, 1.0]]).expand(3, 2)
    for point, logits in ((3.0, wrong), (1.0, right), (2.0, wrong), (2.5, wrong)):
        near.see(x + point, logits)
    near.see(x + 0.5, wrong * math.nan)
    near.see(x + 0.5, wrong, torch.tensor([True, False, False]))
    assert near.x[:, 0].tolist() == [0.5, 2.0, 2.0]
    assert near.size.tolist() == [0.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "norm", "wrong", "message"),
    [
        ("cw", "l1", {}, "linf and l2, got l1"),
        ("deepfool", "l2", {"classes": 0}, "at least one wrong class"),
        ("deepfool", "l2", {"share": 0.0}, "share"),
        ("fab", "l2", {"targets": 0}, "at least one wrong class"),
        ("fmn", "l2", {"shrink": 1.0}, "shrink"),
        ("lbfgs", "l2", {"memory": 0}, "memory"),
        ("fmn", "l2", {"steps": 0}, "steps >= 1"),
        ("fab", "l2", {"restarts": 0}, "restarts >= 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, norm, wrong, message):
    model, x, y, _ = linear_case(2, norm, n=2)
    with pytest.raises(UserError, match=message):
        strike(name, model, x, y, Threat(norm, 1.0, **FAR), **wrong)


# ------------------------------------------------------------------------------------------ a small trained network


# ``digits`` is conftest's: a tiny network and 40 digits that it gets right.

# What they may leave of what fgsm breaks, in samples: the penalty of lbfgs is l2's.
SLACK = {("fmn", "linf"): 2, ("cw", "linf"): 1, ("lbfgs", "linf"): 16, ("lbfgs", "l1"): 12}


@every
def test_it_breaks_what_fgsm_breaks(digits, name, norm):
    net, x, y = digits
    threat = Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm])
    by_fgsm = int(fooled(net(fgsm(net, x, y, threat, score=negative_log_odds, noise=draw(40))), y).sum())
    assert 5 < by_fgsm < 36, "a case that tells nothing"
    few = {"fab": {"steps": 10, "targets": 3}, "deepfool": {"steps": 10}}.get(name, {})
    x_adv = strike(name, net, x, y, threat, score=negative_log_odds, **few)
    assert (threat.violation(x_adv, x) == 0).all()
    assert int(fooled(net(x_adv), y).sum()) >= by_fgsm - SLACK.get((name, norm), 0) > 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_with_room_enough_every_digit_falls(digits, norm):
    net, x, y = digits
    threat = Threat(norm, {"linf": 1.0, "l2": 8.0, "l1": 64.0}[norm])
    found = {}
    for name, few in {"deepfool": {"steps": 20}, "fmn": {}, "fab": {"steps": 10, "targets": 3}}.items():
        x_adv = strike(name, net, x, y, threat, **few)
        assert fooled(net(x_adv), y).all(), name
        found[name] = distances(x_adv, x, norm)
    assert found["fmn"].mean() < 1.1 * found["deepfool"].mean()
    assert found["fab"].mean() < 1.02 * found["deepfool"].mean()
