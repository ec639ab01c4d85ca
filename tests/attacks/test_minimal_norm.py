"""The minimum-norm attacks against closed forms, and the parts that they share. The contract is in tests/contracts."""

from __future__ import annotations

import math

import pytest
import torch
from tests.helpers import DUAL_NORM, LinearModel, boundary_distances, noise_of, run_attack

from holdfast.attacks import ATTACKS, distances, fooled
from holdfast.attacks.minimal_norm import NearestAdversarial, scores_and_grads
from holdfast.errors import UserError
from holdfast.losses import negative_margin
from holdfast.threat import Threat

FAR = {"lo": -8.0, "hi": 8.0}  # a box that the boundary is well within
WIDE = {"linf": 16.0, "l2": 64.0, "l1": 256.0}  # any point of it
FEW = {  # settings that are enough for the small cases here
    "deepfool": {"steps": 5},
    "cw": {"steps": 20, "searches": 3},
    "lbfgs": {"steps": 8, "searches": 4},
    "fmn": {"steps": 15},
    "fab": {"steps": 5, "targets": 3},
}
NAMES = ("deepfool", "cw", "lbfgs", "fmn", "fab")
PAIRS = [(name, norm) for name in NAMES for norm in ATTACKS[name].norms]
every = pytest.mark.parametrize(("name", "norm"), PAIRS)


def linear_case(classes, norm, seed=0, n=24):
    """(model, x, y, needed): needed is the closed form min_j (z_y - z_j) / ||w_y - w_j||_dual."""
    model = LinearModel(classes, seed=seed)
    x = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) / 2
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, x, y, boundary_distances(model, x, y, norm).amin(1)


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
    x_adv = run_attack(name, model, x, y, Threat(norm, WIDE[norm], **FAR), **FULL.get(name, {}))
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
        to_target = (z[rows, y] - z[rows, target]) / (model.weight[y] - model.weight[target]).norm(
            p=DUAL_NORM[norm], dim=1
        )
    x_adv = run_attack(name, model, x, y, Threat(norm, WIDE[norm], **FAR), target=target, **FULL.get(name, {}))
    assert fooled(model(x_adv), y).all()
    assert (distances(x_adv, x, norm) < (3.0 if (name, norm) in LOOSE else 1.5) * to_target).all()


@every
def test_it_comes_back_where_the_threat_holds_it_and_only_there(name, norm):
    """Under evaluate: broken where the closed form lies clearly in the threat, standing where it lies outside."""
    model, x, y, needed = linear_case(2, norm, seed=2)
    threat = Threat(norm, float(needed.sort().values[12]), **FAR)
    x_adv = run_attack(name, model, x, y, threat, **FULL.get(name, {}))
    assert (threat.violation(x_adv, x) == 0).all()
    broken = fooled(model(x_adv), y)
    assert not broken[needed > threat.eps * (1 + 1e-6)].any()
    reach = 3.0 if (name, norm) in LOOSE else 1.05
    assert broken[needed * reach < threat.eps].all()


@every
def test_a_sample_that_is_wrong_already_needs_no_perturbation(name, norm):
    model, x, y, _ = linear_case(3, norm, n=6)
    model, x = model.float(), x.float()
    y[::2] = (y[::2] + 1) % 3
    for eps in (1e-4, 0.3):
        x_adv = run_attack(name, model, x, y, Threat(norm, eps, **FAR), **FEW[name])
        assert torch.equal(x_adv[::2], x[::2])


def test_scores_and_grads_are_those_of_each_score():
    model, x, y, _ = linear_case(4, "l2", n=5)
    logits, scores, grads = scores_and_grads(model, x, lambda z: z[:, 1:] - z[:, :1])
    assert torch.equal(logits, model(x).detach())
    assert torch.allclose(scores, logits[:, 1:] - logits[:, :1])
    expected = (model.weight[1:] - model.weight[:1]).detach().view(1, 3, 1, 4, 4).expand(5, -1, -1, -1, -1)
    assert torch.allclose(grads, expected)
    _, _, none = scores_and_grads(lambda x: model(x.detach()).detach(), x, lambda z: z[:, 1:])
    assert none.shape == (5, 3, 1, 4, 4)
    assert (none == 0).all()
    assert not y.requires_grad


def test_restarts_of_fab_draw_the_samples_own_noise():
    model, x, y, _ = linear_case(3, "l2", n=4)
    few = {"steps": 2, "restarts": 2, "targets": 2}
    threat = Threat("l2", 2.0, **FAR)
    whole = run_attack("fab", model, x, y, threat, noise=noise_of(4), **few)
    part = run_attack("fab", model, x[2:], y[2:], threat, noise=noise_of(4)[2:], **few)
    assert torch.allclose(part, whole[2:], rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-4, 1e6])
@pytest.mark.parametrize("name", ["deepfool", "cw", "fmn", "fab"])
def test_the_scale_of_the_logits_does_not_matter(name, scale):
    model, x, y, _ = linear_case(3, "l2", n=8)
    threat = Threat("l2", 64.0, **FAR)
    plain, scaled = (
        distances(run_attack(name, m, x, y, threat, **FEW[name]), x, "l2") for m in (model, lambda x: model(x) * scale)
    )
    assert torch.allclose(plain, scaled, rtol=1e-3)


def test_confidence_asks_for_a_lead():
    model, x, y, _ = linear_case(3, "l2", n=8)
    threat = Threat("l2", 64.0, **FAR)
    for confidence in (0.0, 2.0):
        x_adv = run_attack("cw", model, x, y, threat, confidence=confidence)
        assert (negative_margin(model(x_adv), y) >= confidence).all()


def test_nearest_keeps_the_nearest_that_fools():
    x, y = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    near = NearestAdversarial(x, y, Threat("l2", 9.0, -9, 9))
    right, wrong = torch.tensor([[1.0, 0.0]]).expand(3, 2), torch.tensor([[0.0, 1.0]]).expand(3, 2)
    for point, logits in ((3.0, wrong), (1.0, right), (2.0, wrong), (2.5, wrong)):
        near.update(x + point, logits)
    near.update(x + 0.5, wrong * math.nan)
    near.update(x + 0.5, wrong, torch.tensor([True, False, False]))
    assert near.x[:, 0].tolist() == [0.5, 2.0, 2.0]
    assert near.size.tolist() == [0.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "norm", "wrong", "message"),
    [
        ("cw", "l1", {}, "linf and l2, got l1"),
        ("deepfool", "l2", {"classes": 0}, "classes must be >= 1 .*got 0"),
        ("deepfool", "l2", {"step_fraction": 0.0}, "step_fraction"),
        ("fab", "l2", {"targets": 0}, "targets must be >= 1 .*got 0"),
        ("fmn", "l2", {"shrink": 1.0}, "shrink"),
        ("lbfgs", "l2", {"memory": 0}, "memory"),
        ("fmn", "l2", {"steps": 0}, "steps >= 1"),
        ("fab", "l2", {"restarts": 0}, "restarts >= 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, norm, wrong, message):
    model, x, y, _ = linear_case(2, norm, n=2)
    with pytest.raises(UserError, match=message):
        run_attack(name, model, x, y, Threat(norm, 1.0, **FAR), **wrong)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("distance", [0.01, 0.1])
def test_fmn_comes_back_from_a_first_estimate_that_is_far_too_large(norm, distance):
    """A saturated score, as that of cosine logits: its gradient at x promises the boundary beyond the box."""

    def model(x):
        margin = torch.tanh(4 * (1 - (x.flatten(1).mean(1) - 0.2) / distance))
        return torch.stack([margin, torch.zeros_like(margin)], 1)

    x, y, threat = torch.full((3, 1, 4, 4), 0.2), torch.zeros(3).long(), Threat(norm, WIDE[norm])
    x_adv = run_attack("fmn", model, x, y, threat, steps=50)
    assert fooled(model(x_adv), y).all()
    exact = {"linf": 1.0, "l2": 4.0, "l1": 16.0}[norm] * distance
    assert (threat.size(x_adv - x) < 1.1 * exact).all()
