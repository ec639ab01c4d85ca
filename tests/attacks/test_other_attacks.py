"""jsma, spsa, md and least_likely: what each is for, and the contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from holdfast.attacks import bim, fgsm, fooled, pgd
from holdfast.attacks.others import jsma, least_likely, md, spsa
from holdfast.errors import UserError
from holdfast.losses import negative_log_odds, negative_margin
from holdfast.noise import Noise
from holdfast.threat import Threat

BY_NAME = {"jsma": jsma, "spsa": spsa, "md": md, "least_likely": least_likely}
FEW = {"jsma": {"steps": 4}, "spsa": {"steps": 4, "pairs": 6, "together": 4}, "md": {"steps": 5}, "least_likely": {}}
EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}
every = pytest.mark.parametrize(("name", "norm"), [(name, norm) for name in BY_NAME for norm in EPS])


def draw(n, seed=0):
    return Noise(seed, torch.arange(n))


def strike(name, model, x, y, threat, *, score=negative_log_odds, noise=None, **kept):
    return BY_NAME[name](model, x, y, threat, score=score, noise=noise or draw(len(x)), **kept)


class Plain(nn.Module):
    """A linear model, (N, 1, 4, 4) -> (N, K)."""

    def __init__(self, classes, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=generator))
        self.bias = nn.Parameter(torch.randn(classes, generator=generator) / 9)

    def forward(self, x):
        return (x - 0.5).flatten(1) @ self.weight.T + self.bias


def case(classes, n=8, seed=0):
    model = Plain(classes, seed)
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return model, x, model(x).argmax(1)


# ------------------------------------------------------------------------------------------------------ the contract


@every
@pytest.mark.parametrize("classes", [2, 3])
def test_in_the_threat_for_few_classes_and_samples_that_are_wrong_already(name, norm, classes):
    model, x, y = case(classes)
    y[::2] = (y[::2] + 1) % classes
    threat = Threat(norm, EPS[norm])
    for aimed in (None, (y + 1) % classes):
        x_adv = strike(name, model, x, y, threat, target=aimed, **FEW[name])
        assert x_adv.isfinite().all()
        assert (threat.violation(x_adv, x) == 0).all()
        assert fooled(model(x_adv), y)[::2].all()


@every
def test_a_tiny_threat_leaves_the_clean_answer(name, norm):
    model, x, y = case(3)
    with torch.no_grad():
        clear = negative_margin(model(x), y) < -0.1
    assert clear.sum() > 3
    assert not fooled(model(strike(name, model, x, y, Threat(norm, 1e-3), **FEW[name])), y)[clear].any()


@every
def test_nan_is_never_a_success_and_never_comes_back(name, norm):
    model, x, y = case(3)
    threat = Threat(norm, EPS[norm])

    def broken(z):
        moved = torch.tensor([not bool((row == x.flatten(1)).all(1).any()) for row in z.flatten(1)])
        return model(z).masked_fill(moved[:, None], math.nan)

    assert torch.equal(strike(name, broken, x, y, threat, **FEW[name]), x)
    x_adv = strike(name, lambda z: model(z).detach(), x, y, threat, **FEW[name])
    assert x_adv.isfinite().all()
    assert (threat.violation(x_adv, x) == 0).all()


@every
def test_batch_size_and_order_do_not_matter(name, norm):
    model, x, y = case(4, n=7)
    model, x = model.double(), x.double()
    threat, noise = Threat(norm, EPS[norm] / 4), draw(7)
    together = strike(name, model, x, y, threat, noise=noise, **FEW[name])
    for rows in (torch.arange(1), torch.tensor([4, 5, 6]), torch.tensor([6, 2, 0, 4, 1, 3, 5])):
        alone = strike(name, model, x[rows], y[rows], threat, noise=noise[rows], **FEW[name])
        assert torch.allclose(alone, together[rows], rtol=0, atol=1e-9)


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"together": 0}, {"width": 0.0}, {"steps": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    model, x, y = case(2, n=2)
    with pytest.raises(UserError, match=next(iter(wrong))):
        strike("spsa", model, x, y, Threat("linf", 0.1), **wrong)


# ------------------------------------------------------------------------------------------------ what each is for


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("steps", [1, 3])
def test_jsma_changes_few_pixels(norm, steps):
    model, x, y = case(4)
    x_adv = strike("jsma", model, x, y, Threat(norm, EPS[norm]), steps=steps)
    changed = (x_adv != x).flatten(1).sum(1)
    assert 0 < changed.max() <= steps


def test_jsma_takes_the_most_salient_pixel_as_far_as_it_goes():
    """Two classes, so a = -b counts everywhere: |a b| times the way to the wall decides."""
    weight = torch.tensor([1.0, -3.0, 2.0, 0.5])

    def model(x):
        rise = (x.flatten(1) * weight).sum(1)
        return torch.stack([9 - rise, rise], 1)

    x, y = torch.tensor([0.5, 0.9, 0.2, 0.5]).view(1, 1, 2, 2), torch.tensor([0])
    by_linf = strike("jsma", model, x, y, Threat("linf", 0.3), steps=1) - x
    assert torch.allclose(by_linf.flatten(), torch.tensor([0, -0.3, 0, 0]), atol=1e-6)
    by_l1 = strike("jsma", model, x, y, Threat("l1", 1.2), steps=2) - x
    assert torch.allclose(by_l1.flatten(), torch.tensor([0, -0.9, 0.3, 0]), atol=1e-6)
    by_l2 = strike("jsma", model, x, y, Threat("l2", 0.95), steps=2) - x
    assert torch.allclose(by_l2.flatten(), torch.tensor([0, -0.9, (0.95**2 - 0.81) ** 0.5, 0]), atol=1e-6)


def test_jsma_finds_the_few_pixels_that_matter():
    """Two of 64 pixels carry the answer; l1 leaves room for both."""

    def model(x):
        p = x.flatten(1)
        told = p[:, 11] + p[:, 42] - 1.0 + 1e-3 * (p.mean(1) - 0.5)
        return torch.stack([told, -told], 1)

    x, y = torch.full((3, 1, 8, 8), 0.9), torch.zeros(3, dtype=torch.int64)
    x_adv = strike("jsma", model, x, y, Threat("l1", 2.0), steps=2)
    assert fooled(model(x_adv), y).all()
    assert ((x_adv != x).flatten(1).sum(1) <= 2).all()


def test_spsa_sees_no_gradient_and_needs_none():
    model, x, y = case(2, n=16)
    with torch.no_grad():
        lead = -negative_margin(model(x), y)
        steep = (model.weight[0] - model.weight[1]).abs().sum()
    eps = float((lead / steep).median()) * 1.3
    threat, few = Threat("linf", eps), {"steps": 10, "pairs": 16}
    open_, closed = (strike("spsa", m, x, y, threat, **few) for m in (model, lambda x: model(x).detach()))
    assert torch.equal(open_, closed)
    breakable = fooled(model(pgd(model, x, y, threat, score=negative_log_odds, noise=draw(16), steps=20)), y)
    broken = fooled(model(open_), y)
    assert breakable.sum() >= 6
    assert broken.sum() >= breakable.sum() - 3
    assert not (broken & ~breakable).any()


def test_spsa_asks_in_pairs_inside_the_box_and_no_more_at_once_than_it_is_told():
    _, x, _ = case(2, n=3)
    y = torch.zeros(3, dtype=torch.int64)
    asked = []

    def model(z):
        asked.append(z.detach().clone())
        return torch.stack([1e3 + z.flatten(1).sum(1), z.flatten(1).sum(1) * 0], 1)

    strike("spsa", model, x, y, Threat("linf", 0.1), steps=2, pairs=6, together=4)
    assert [len(z) for z in asked] == [3, 24, 12] * 2 + [3]
    assert all(z.min() >= 0 and z.max() <= 1 for z in asked)
    plus, minus = asked[1].view(2, 3, 4, 1, 4, 4)
    inside = ((x > 0.011) & (x < 0.989))[:, None].expand_as(plus)
    assert torch.allclose(((plus + minus) / 2)[inside], x[:, None].expand_as(plus)[inside], atol=1e-6)
    assert not torch.equal(plus[0] > x[0], plus[1] > x[1]), "samples share their directions"


def test_md_breaks_what_imbalanced_gradients_hide():
    """Near x the rival's logit falls faster than the true one does, so the margin leads back to x; -z_y leads out."""

    def model(x):
        q = x.flatten(1)[:, 0] - 0.5
        return torch.stack([1 - 4 * q, -5 * q.abs().clamp_max(0.1)], 1)

    x, y, threat = torch.full((9, 1, 1, 2), 0.51), torch.zeros(9, dtype=torch.int64), Threat("linf", 0.4)
    assert not fooled(model(bim(model, x, y, threat, score=negative_margin, noise=draw(9))), y).any()
    assert fooled(model(strike("md", model, x, y, threat, steps=6)), y).all()


def test_md_climbs_one_term_first_then_the_margin():
    """Read off from the gradients it asks for: -z_y in the first restart, the rival's logit in the second."""
    taken = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            taken.append(grad[0].tolist())
            return grad

    def model(x):
        z = torch.stack([9 + x.flatten(1).sum(1), x.flatten(1).sum(1), -x.flatten(1).sum(1) - 5], 1)
        return Watched.apply(z)

    x, y, threat = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), Threat("linf", 0.1)
    strike("md", model, x, y, threat, steps=4)
    own, rival, both = [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 1.0, 0.0]
    assert taken == [own, own, both, both, rival, rival, both, both]
    taken.clear()
    strike("md", model, x, y, threat, steps=4, target=torch.tensor([2]))
    assert taken[:2] == [own, own]
    assert taken[4:6] == [[0.0, 0.0, 1.0]] * 2


def test_least_likely_goes_for_the_least_likely_class():
    model, x, y = case(5)
    with torch.no_grad():
        least = model(x).argmin(1)
    threat = Threat("linf", 0.02)
    x_adv = strike("least_likely", model, x, y, threat, score=negative_margin)
    assert torch.equal(x_adv, strike("least_likely", model, x, y, threat, score=negative_margin, target=least))
    rows = torch.arange(len(x))
    other = model(x_adv)[rows, least] - model(x)[rows, least]
    assert (other >= 0).all()
    y[0] = least[0]  # wrong already, and the label itself the least likely: another class is taken
    x_adv = strike("least_likely", model, x, y, threat)
    assert fooled(model(x_adv), y)[0]


# ------------------------------------------------------------------------------------------ a small trained network


# ``digits`` is conftest's: a tiny network and 40 digits that it gets right.

# What it may leave of what fgsm breaks, in samples of 40: a few pixels, guessed gradients and the longest way cost.
SLACK = {
    "md": {"linf": 0, "l2": 0, "l1": 0}, "spsa": {"linf": 6, "l2": 1, "l1": 0},
    "jsma": {"linf": 10, "l2": 17, "l1": 11}, "least_likely": {"linf": 11, "l2": 8, "l1": 8},
}  # fmt: skip


@every
def test_it_breaks_what_fgsm_breaks(digits, name, norm):
    net, x, y = digits
    threat = Threat(norm, EPS[norm])
    by_fgsm = int(fooled(net(fgsm(net, x, y, threat, score=negative_log_odds, noise=draw(40))), y).sum())
    assert 5 < by_fgsm < 36, "a case that tells nothing"
    few = {"spsa": {"steps": 15, "pairs": 24, "together": 24}, "jsma": {"steps": 40}, "md": {"steps": 20}}.get(name, {})
    x_adv = strike(name, net, x, y, threat, **few)
    assert (threat.violation(x_adv, x) == 0).all()
    assert int(fooled(net(x_adv), y).sum()) >= by_fgsm - SLACK[name][norm] > 0
