"""PGD and its relatives: closed-form optima, the points that are considered, restarts, and the artefacts of a score."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from tests.helpers import (
    LinearModel,
    PointRecorder,
    SmallNet,
    boundary_distances,
    island,
    leads_and_slopes,
    noise_of,
    predicted_labels,
    random_images,
    run_attack,
    survivors,
    unbreakable,
)

from holdfast.attacks import SCORES, apgd, bim, cross_entropy, fgsm, fooled, mim, pgd
from holdfast.errors import UserError
from holdfast.losses import dlr, isce, negative_log_odds, negative_margin, sce
from holdfast.threat import Threat

EPS = {"linf": 0.15, "l2": 0.8, "l1": 3.0}
FAR = {"lo": -1e3, "hi": 1e3}  # a box that no step comes near


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (pgd, {"restarts": 0}, "restarts >= 1"),
        (apgd, {"restarts": 0}, "restarts >= 1"),
        (pgd, {"iterate": "first"}, "'best' or 'last'.*'first'"),
        (pgd, {"iterate": "last", "restarts": 2}, "cannot choose between restarts"),
        (bim, {"iterate": "last", "restarts": 2}, "cannot choose between restarts"),
    ],
)
def test_settings_that_mean_nothing_are_refused(attack, settings, message):
    x, y = random_images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match=message):
        attack(SmallNet(), x, y, Threat("linf", 0.1), score=negative_log_odds, noise=noise_of(2), **settings)


def least_margins(model, x, y, threat):
    """The smallest margin in the threat, in closed form: (N,), min_j (z_y - z_j) - eps ||w_y - w_j||_dual."""
    lead, slope = leads_and_slopes(model, x, y, threat.norm)
    return (lead - threat.eps * slope).scatter(1, y[:, None], math.inf).amin(1)


def linear_case(classes, norm, seed, n=60, dim=16):
    """(model, x, y, threat): some samples can be broken, some cannot, and none is close to the border."""
    model = LinearModel(classes, dim, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
    radii = boundary_distances(model, x, y, norm).amin(1).sort().values[n // 4 : 3 * n // 4]
    widest = int((radii[1:] - radii[:-1]).argmax())
    return model, x, y, Threat(norm, float(radii[widest] + radii[widest + 1]) / 2, **FAR)


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
    x_adv = attack(model, x, y, threat, score=negative_log_odds, noise=noise_of(len(x)), **few)
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
    survives = torch.ones_like(robust)
    with torch.no_grad():
        ranked = model(x).scatter(1, y[:, None], -math.inf).argsort(dim=1, descending=True)
        for rank in range(9):
            rows = torch.nonzero(survives)[:, 0]
            kept = {**few, "target": ranked[rows, rank], "score": SCORES[score]}
            x_adv = attack(model, x[rows], y[rows], threat, noise=noise_of(len(x))[rows].fold(rank), **kept)
            survives[rows] &= ~fooled(model(x_adv), y[rows])
    assert not (robust & ~survives).any(), "broke what cannot be broken"
    # dlr's own denominator bends its ascent, and what a step of constant size leaves on the l2 sphere may be a sample.
    assert int((survives & ~robust).sum()) <= (name == "pgd" and norm == "l2")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_step_of_pgd_from_x_is_fgsm(norm):
    model, x, threat = SmallNet(), random_images(8), Threat(norm, EPS[norm])
    y = predicted_labels(model, x)
    expected = fgsm(model, x, y, threat, score=negative_log_odds, noise=noise_of(8))
    one = pgd(
        model,
        x,
        y,
        threat,
        score=negative_log_odds,
        noise=noise_of(8),
        steps=1,
        step_size=threat.eps,
        random_start=False,
    )
    assert torch.equal(one, expected)


def test_fgsm_is_the_signed_step():
    model, x, y, threat = linear_case(2, "linf", 1)
    with torch.no_grad():
        z = model(x)
    sign = torch.where((y == 0)[:, None], 1.0, -1.0) * (model.weight[1] - model.weight[0]).sign()
    moved = x + threat.eps * sign.view_as(x).detach()
    x_adv = fgsm(model, x, y, threat, score=negative_log_odds, noise=noise_of(len(x)))
    assert (z.argmax(1) == y).all()
    assert torch.allclose(x_adv, moved, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_k_steps_consider_k_plus_one_points(norm, steps):
    x, y, threat = random_images(3), torch.zeros(3, dtype=torch.int64), Threat(norm, EPS[norm])
    run = partial(run_attack, x=x, y=y, threat=threat, steps=steps)
    for name, kept, points in [
        ("pgd", {}, steps + 1),
        ("pgd", {"iterate": "last"}, steps),
        ("pgd", {"restarts": 3}, 3 * (steps + 1)),
        ("bim", {}, steps + 1),
        ("mim", {}, steps + 1),
        ("apgd", {}, steps + 1),
        ("apgd", {"restarts": 2}, 2 * (steps + 1)),
        ("noise", {}, steps),
        *([("square", {}, steps)] if norm != "l1" else []),
    ]:
        model = PointRecorder(unbreakable)
        run(name, model, **kept)
        assert model.sizes == [3] * points, (name, kept)


@pytest.mark.parametrize("name", ["bim", "pgd"])
def test_fooled_samples_leave_the_batch(name):
    """Sample i needs i + 1 steps, so it is evaluated i + 2 times and then leaves the batch."""
    steps, size, n = 6, 0.01, 9
    threat = Threat("linf", 0.2)
    x = torch.full((n, 1, 1, 1), 0.5) + size * (torch.arange(n) + 0.5).view(-1, 1, 1, 1)
    model = PointRecorder(lambda x: torch.stack([x.flatten(1)[:, 0] - 0.5, 0.5 - x.flatten(1)[:, 0]], 1))
    y = torch.zeros(n, dtype=torch.int64)
    kept = {"steps": steps, "step_size": size} | ({"random_start": False} if name == "pgd" else {})
    x_adv = run_attack(name, model, x, y, threat, **kept)
    assert sum(model.sizes) == sum(min(i + 2, steps + 1) for i in range(n))
    assert model.sizes == [n, n, n - 1, n - 2, n - 3, n - 4, n - 5]
    assert fooled(model(x_adv), y).tolist() == [i < steps for i in range(n)]


@pytest.mark.parametrize(("name", "settings"), [("pgd", {"restarts": 3}), ("apgd", {"restarts": 3}), ("noise", {})])
def test_what_is_fooled_at_once_costs_one_look(name, settings):
    model = PointRecorder(lambda x: -unbreakable(x))
    run_attack(
        name, model, random_images(4), torch.zeros(4, dtype=torch.int64), Threat("linf", 0.1), steps=5, **settings
    )
    assert model.sizes == [4]


def test_a_success_on_the_path_is_returned():
    """IoAF's silent success: an iterate fools, the last one does not."""
    model, threat = island(0.32, 0.38), Threat("linf", 0.3)
    x, y = torch.full((2, 1, 1, 1), 0.3), torch.zeros(2, dtype=torch.int64)
    walk = {"score": lambda out, y: out.features[:, 0], "steps": 6, "step_size": 0.05}
    found = pgd(model, x, y, threat, noise=noise_of(2), random_start=False, **walk)
    missed = pgd(model, x, y, threat, noise=noise_of(2), random_start=False, iterate="last", **walk)
    assert fooled(model(found).logits, y).all()
    assert not fooled(model(missed).logits, y).any()
    assert torch.allclose(missed, torch.full_like(x, 0.6))
    assert fooled(model(run_attack("bim", model, x, y, threat, **walk)).logits, y).all()


def test_the_last_point_is_judged_too():
    """adversarial-library's slip: evaluated before stepping, so that the last step counts for nothing."""
    model, threat = island(0.59, 0.61), Threat("linf", 0.3)
    x, y = torch.full((1, 1, 1, 1), 0.3), torch.zeros(1, dtype=torch.int64)
    walk = {"score": lambda out, y: out.features[:, 0], "steps": 6, "step_size": 0.05}
    assert fooled(model(pgd(model, x, y, threat, noise=noise_of(1), random_start=False, **walk)).logits, y).all()


@pytest.mark.parametrize("restarts", [1, 2, 5])
@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_restarts_are_merged_sample_by_sample(name, restarts):
    """Nothing but the random start decides here, so a sample falls if any of its starts fools."""
    n, threat = 200, Threat("linf", 0.2)
    x, y, noise = torch.full((n, 1, 1, 1), 0.5), torch.zeros(n, dtype=torch.int64), noise_of(n)

    def model(x):
        p = x.detach().flatten(1)[:, 0]
        return torch.stack([0.62 - p, p - 0.62], 1)  # a fifth of the starts

    starts = [threat.random_start(x, noise.fold(restart)) for restart in range(restarts)]
    falls = torch.stack([fooled(model(start), y) for start in starts])
    x_adv = run_attack(name, model, x, y, threat, noise=noise, steps=2, restarts=restarts)
    assert torch.equal(fooled(model(x_adv), y), falls.any(0))
    assert not torch.equal(falls.any(0), falls[0]) or restarts == 1


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.12), ("l2", 0.6), ("l1", 2.5)])
def test_stronger_attacks_break_no_less(many_digits, norm, eps):
    """noise < fgsm <= pgd <= apgd, in samples of 300."""
    net, x, y = many_digits
    threat = Threat(norm, eps)
    survives = {
        name: int(survivors(name, net, x, y, threat, score=negative_log_odds, **kept).sum())
        for name, kept in {"noise": {"steps": 20}, "fgsm": {}, "pgd": {"steps": 25}, "apgd": {"steps": 25}}.items()
    }
    assert 15 < survives["pgd"] < 270, "a case that tells nothing"
    assert survives["noise"] == max(survives.values())
    assert survives["noise"] > survives["pgd"] + 30
    assert survives["fgsm"] >= survives["pgd"]
    assert survives["apgd"] <= survives["pgd"]


@pytest.mark.parametrize("name", ["pgd", "apgd", "square", "noise"])
def test_batch_size_and_order_leave_the_verdicts_alone(many_digits, name):
    net, x, y = many_digits
    threat, noise, few = Threat("linf", 0.12), noise_of(len(x)), {"steps": 10, "score": dlr}
    together = survivors(name, net, x, y, threat, noise=noise, **few)
    parts = [survivors(name, net, x[r], y[r], threat, noise=noise[r], **few) for r in torch.arange(300).split(37)]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    mixed = survivors(name, net, x[order], y[order], threat, noise=noise[order], **few)
    differ = int((torch.cat(parts) != together).sum() + (mixed != together[order]).sum())
    assert differ <= 0.001 * 2 * len(x)


SCALES = (1e-4, 1.0, 1e3, 1e6)


def scaled(net, scale):
    return lambda x: net(x) * scale


@pytest.mark.parametrize("name", ["pgd", "apgd"])
@pytest.mark.parametrize("score", ["margin", "dlr"])
def test_the_scale_of_the_logits_does_not_change_robust_accuracy(many_digits, name, score):
    net, x, y = many_digits
    counts = [
        int(survivors(name, scaled(net, s), x, y, Threat("linf", 0.12), score=SCORES[score], steps=12).sum())
        for s in SCALES
    ]
    assert max(counts) - min(counts) <= 1, counts


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_u_does_not_saturate_and_becomes_the_margin(many_digits, name):
    """Beyond 1e3 its soft maximum is the margin's. Near 0 it climbs the competitors' mean: a suite needs dlr too."""
    net, x, y = many_digits

    def count(score, scale):
        return int(survivors(name, scaled(net, scale), x, y, Threat("linf", 0.12), score=score, steps=12).sum())

    counts = [count(negative_log_odds, s) for s in SCALES]
    hard = count(negative_margin, 1.0)
    assert max(counts[1:]) - min(counts[1:]) <= 10, counts
    assert counts[0] > counts[1] + 20
    assert abs(counts[2] - hard) <= 1
    assert abs(counts[3] - hard) <= 1


def test_float32_cross_entropy_is_blinded_by_the_scale_of_the_logits(many_digits):
    """The artefact behind many a claim: at 1e6 its gradient is zero and the network 'robust'; u sees through it."""
    net, x, y = many_digits
    count = {
        (score, s): int(survivors("pgd", scaled(net, s), x, y, Threat("linf", 0.12), score=of, steps=12).sum())
        for score, of in (("cross_entropy", cross_entropy), ("u", negative_log_odds))
        for s in (1.0, 1e6)
    }
    assert abs(count["cross_entropy", 1.0] - count["u", 1.0]) <= 3
    assert count["cross_entropy", 1e6] > count["u", 1e6] + 100, count


@pytest.mark.parametrize("name", ["pgd", "bim", "mim"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inference_information_in_the_inner_attack_changes_nothing(many_digits, name, norm):
    """The gradients of SCE and I-SCE have one direction: the same x_adv in float64, bit for bit where signs decide."""
    net, x, y = many_digits
    threat = Threat(norm, {"linf": 0.12, "l2": 0.6}[norm])
    x, y = x[:60].double(), y[:60]
    net = copy.deepcopy(net).double()
    few = {"steps": 8, "iterate": "last"}
    plain, shifted = (run_attack(name, net, x, y, threat, score=score, **few) for score in (sce, partial(isce, s=5.0)))
    if norm == "linf" and name != "mim":
        assert torch.equal(plain, shifted)
    assert torch.allclose(plain, shifted, rtol=0, atol=1e-9)
    assert not torch.allclose(plain, x, atol=1e-3)


def test_mim_is_bim_with_a_memory():
    """Literal reference: gradients divided by their l1 size and summed, decay 1."""
    net = SmallNet().double().eval()
    x, threat, steps = random_images(4, dtype=torch.float64), Threat("linf", 0.1), 6
    y = predicted_labels(net, x, wrong=False)
    x_adv, velocity = x, torch.zeros_like(x)
    for _ in range(steps):
        point = x_adv.clone().requires_grad_()
        grad = torch.autograd.grad(negative_log_odds(net(point), y).sum(), point)[0]
        velocity = velocity + grad / grad.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
        x_adv = (x_adv + 1.25 * threat.eps / steps * velocity.sign()).clamp(x - threat.eps, x + threat.eps).clamp(0, 1)
    ours = mim(net, x, y, threat, score=negative_log_odds, noise=noise_of(4), steps=steps, iterate="last")
    assert torch.allclose(ours, x_adv, rtol=0, atol=1e-12)


def test_least_likely_goes_for_the_least_likely_class():
    model = LinearModel(5, dtype=torch.float32, bias=1 / 9, center=0.5)
    x = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, least = model(x).argmax(1), model(x).argmin(1)
    threat = Threat("linf", 0.02)
    x_adv = run_attack("least_likely", model, x, y, threat, score=negative_margin)
    assert torch.equal(x_adv, run_attack("least_likely", model, x, y, threat, score=negative_margin, target=least))
    rows = torch.arange(len(x))
    other = model(x_adv)[rows, least] - model(x)[rows, least]
    assert (other >= 0).all()
    y[0] = least[0]  # wrong already, and the label itself the least likely: another class is taken
    x_adv = run_attack("least_likely", model, x, y, threat)
    assert fooled(model(x_adv), y)[0]
