"""The inference region: every measure against a case whose answer is known, and the data that reports are made of."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import norm as gaussian
from sklearn.covariance import ledoit_wolf
from torch import nn

from holdfast import data, models, run_folder
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.io import decode
from holdfast.models.heads import HEADS
from holdfast.outputs import Outputs
from holdfast.region import (
    auc,
    choose,
    class_centers,
    fraction_within,
    frechet,
    input_margin,
    local_lipschitz,
    measure,
    median_distance,
    merge,
    mmd2,
    movement,
    plane,
    projection,
    reliability,
    scatter_ratio,
    shrunk_covariance,
    smallest_perturbation,
)
from holdfast.results import Spread
from holdfast.threat import NORMS, Threat


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Line:
    """logits = W x: two classes, the boundary a plane through 0; the box is far away."""

    def __init__(self, dim):
        self.weight = draw(2, dim, seed=1).float()
        self.x = draw(50, dim, seed=2).float()
        self.y = self(self.x).argmax(1)
        self.slope = self.weight[0] - self.weight[1]

    def __call__(self, x):
        return x @ self.weight.T

    def distance(self, threat):
        return (self.x @ self.slope).abs() / threat.dual_size(self.slope[None])


# -------------------------------------------------------------------------------------------------------------- margins


@pytest.mark.parametrize("norm", NORMS)
def test_first_order_margin_of_a_linear_model_is_its_distance(norm):
    line, threat = Line(6), Threat(norm, 0.1, -9, 9)
    margin = (line.x @ line.slope).abs()
    grad = line.slope.expand(50, -1)
    assert torch.allclose(input_margin(margin, grad, threat).float(), line.distance(threat))
    assert torch.allclose(input_margin(-margin, grad, threat).float(), -line.distance(threat))


def test_first_order_margin_without_a_gradient():
    found = input_margin(torch.tensor([2.0, -2.0, 0.0]), torch.zeros(3, 4), Threat("l2", 1.0))
    assert found.tolist() == [math.inf, -math.inf, 0.0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dim", [2, 12])
def test_the_distance_of_a_linear_model_is_found(norm, dim):
    line, threat = Line(dim), Threat(norm, 0.1, -9, 9)
    nearest, size = smallest_perturbation(line, line.x, line.y, threat)
    exact = line.distance(threat)
    assert (size >= exact * (1 - 1e-5)).all()
    assert (size <= exact * 1.02).all()
    assert torch.equal(threat.size(nearest - line.x), size)
    assert (line(nearest).argmax(1) != line.y).all()


def test_a_walk_that_ends_on_the_boundary_itself_is_no_dead_end():
    def model(x):
        return torch.stack([x[:, 0], 1 - x[:, 0]], 1)  # 0.8 - 0.3 is 0.5 to the last bit, where the first logit wins

    _, size = smallest_perturbation(model, torch.tensor([[0.8]]), torch.tensor([0]), Threat("linf", 0.01))
    assert float(size) == pytest.approx(0.3, abs=1e-3)


def test_distance_takes_what_was_found_before_and_nothing_else():
    line, threat = Line(5), Threat("l2", 0.1, -9, 9)
    x_adv = torch.where((torch.arange(50) % 2 == 0)[:, None], -line.x, line.x)  # the even ones fool, and are far
    stuck = lambda x: line(x.detach())  # noqa: E731 - no gradient: FMN finds nothing
    nearest, size = smallest_perturbation(stuck, line.x, line.y, threat, x_adv=x_adv)
    assert torch.equal(nearest, x_adv)
    assert torch.allclose(size[::2], 2 * line.x[::2].norm(dim=1))
    assert size[1::2].isinf().all()
    better = smallest_perturbation(line, line.x, line.y, threat, x_adv=x_adv)[1]
    assert (better <= line.distance(threat) * 1.02).all()  # a far one found before does not hide a near one
    wrong = smallest_perturbation(line, line.x, 1 - line.y, threat)[1]
    assert not wrong.any()


@pytest.mark.parametrize("norm", NORMS)
def test_the_slope_of_a_linear_model_is_its_lipschitz_constant(norm):
    line, threat = Line(6), Threat(norm, 0.1, -9, 9)
    found = local_lipschitz(line, line.x, line.y, threat)
    assert torch.allclose(found, threat.dual_size(line.slope[None]).expand(50))


def test_the_slope_is_looked_for_in_the_ball():
    x, eps = torch.tensor([[0.3]]), 0.1

    def model(x):  # margin 1 - x^2: its slope is 2 |x|, steepest at x + eps, where attacks go
        return torch.cat([1 - x.square(), torch.zeros_like(x)], 1)

    found = [float(local_lipschitz(model, x, torch.tensor([0]), Threat("linf", eps), points=n)) for n in (1, 2, 3, 6)]
    assert found == pytest.approx([0.6, 0.7, 0.8, 0.8])  # never more than the constant of the ball


def test_share_within():
    assert fraction_within(torch.tensor([-0.1, 0.0, 0.1, 3.0, 3.1]), 3.0) == pytest.approx(0.4)
    assert fraction_within(torch.zeros(0), 3.0) == 0.0


# -------------------------------------------------------------------------------------------------------- distributions


def test_frechet_of_gaussians_with_a_known_distance():
    a, mean, wide = draw(40_000, 5, seed=1), torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5], dtype=torch.float64), 3.0
    b = mean + wide * draw(40_000, 5, seed=2)
    assert frechet(a, b) == pytest.approx(float(mean.square().sum()) + 5 * (wide - 1) ** 2, rel=0.02)
    assert frechet(a, draw(40_000, 5, seed=3)) < 0.002


@pytest.mark.parametrize(("n", "m", "d"), [(50, 80, 6), (8, 5, 20)])
def test_frechet_is_the_formula_with_a_matrix_root(n, m, d):
    a, b = draw(n, d, seed=1) @ draw(d, d, seed=2), draw(m, d, seed=3) + 1
    cov_a, cov_b = (np.cov(v.numpy().T) for v in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9 * float(np.trace(cov_a)))


def test_mmd_of_gaussians_with_a_known_discrepancy():
    n, d, width = 3000, 3, 2.0
    mean = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    a, b = draw(n, d, seed=1), mean + draw(n, d, seed=2)
    v = width**2
    expected = 2 * (v / (v + 2)) ** (d / 2) * (1 - math.exp(-float(mean.square().sum()) / (2 * (v + 2))))
    assert mmd2(a, b, bandwidth=width) == pytest.approx(expected, rel=0.1)
    assert abs(mmd2(a, draw(n, d, seed=3), bandwidth=width)) < expected / 50


def test_mmd_is_the_literal_double_sum_in_any_chunks():
    a, b, width = draw(13, 4, seed=1), draw(13, 4, seed=2) + 100, 1.7

    def kernel(u, v):
        return math.exp(-float((u - v).square().sum()) / (2 * width**2))

    pairs = [(i, j) for i in range(13) for j in range(13) if i != j]
    expected = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) - 2 * kernel(a[i], b[j]) for i, j in pairs) / len(pairs)
    for chunk in (1, 4, 13, 1000):
        assert mmd2(a, b, bandwidth=width, chunk=chunk) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_unbiased_although_twins_look_alike():
    found = []
    for seed in range(200):
        a = draw(20, 2, seed=seed)
        b = (3 * a + draw(20, 2, seed=1000 + seed)) / math.sqrt(10)  # the same distribution, nearly the same points
        found.append(mmd2(a, b, bandwidth=1.0))
    assert abs(np.mean(found)) < 0.003  # with twins compared it would be -0.06


def test_mmd_does_not_depend_on_the_scale_of_features():
    a, b = draw(60, 5, seed=1), draw(60, 5, seed=2) + 1
    assert mmd2(a, b) > 0.05
    assert mmd2(1e6 * a, 1e6 * b) == pytest.approx(mmd2(a, b))


def test_median_distance():
    assert median_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0]])) == 4  # of 1, 5, 4
    assert median_distance(torch.zeros(4, 1), torch.tensor([[0.0], [3.0]])) == 1  # of fifteen pairs five are 3 apart
    a = draw(5000, 3, seed=1)
    assert median_distance(a, a + 0.0) == pytest.approx(float(torch.pdist(a[:2000]).median()), rel=0.05)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_auc_of_shifted_gaussians(shift):
    d = 4
    a, b = draw(4000, d, seed=1), draw(4000, d, seed=2) + shift / math.sqrt(d)
    turned = draw(d, d, seed=3)  # no linear map of the features matters to the best linear classifier
    expected = gaussian.cdf(shift / math.sqrt(2))
    assert auc(a @ turned, b @ turned) == pytest.approx(expected, abs=0.02)


def test_auc_with_more_features_than_samples():
    n, d = 60, 400
    null = [auc(draw(n, d, seed=2 * k), draw(n, d, seed=2 * k + 1)) for k in range(10)]
    assert np.mean(null) == pytest.approx(0.5, abs=0.06)
    assert auc(draw(n, d, seed=1), draw(n, d, seed=2) + 0.5) > 0.97


def test_twins_are_on_one_side_of_the_split():
    """a_i = r_i e_i and b_i = -r_i e_i: who has seen a sample knows its twin, and who has not knows nothing."""
    n = 20
    a = torch.diag(draw(n).sign())
    assert auc(a, -a) == pytest.approx(0.5, abs=1e-9)
    assert auc(a, -a.roll(1, 0)) == 1.0  # rows that are no twins: the samples leak


def test_shrunk_covariance_is_ledoit_and_wolfs():
    for n, d in ((30, 8), (10, 25), (1000, 3)):
        x = draw(n, d, seed=n) @ draw(d, d, seed=d)
        x = x - x.mean(0)
        expected, share = ledoit_wolf(x.numpy(), assume_centered=True)
        assert 0 < share < 1
        assert np.allclose(shrunk_covariance(x).numpy(), expected, atol=1e-9 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------------- movement


def test_scatter_ratio_of_gaussian_classes():
    d, wide = 6, 0.5
    centers = 3 * draw(5, d, seed=1)
    y = torch.arange(50_000) % 5
    h = centers[y] + wide * draw(50_000, d, seed=2)
    between = float((centers - centers.mean(0)).square().sum(1).mean())
    assert scatter_ratio(h, y) == pytest.approx(d * wide**2 / between, rel=0.02)
    assert scatter_ratio(centers[y], y) == pytest.approx(0, abs=1e-9)
    assert scatter_ratio(h, torch.zeros_like(y)) == math.inf


def test_movement_by_hand():
    h = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 9.0], [0.0, 11.0]])
    y = torch.tensor([3, 3, 5, 5])  # centers (0, 0) and (0, 10)
    h_adv = h + torch.tensor([[1.0, 8.0], [0.0, 0.0], [0.0, 0.0], [3.0, -1.0]])
    result = movement(h, h_adv, y)
    assert torch.allclose(result.moved, torch.tensor([65**0.5, 0, 0, 10**0.5]))
    assert torch.allclose(result.relative, result.moved / 10)
    assert torch.allclose(result.own_before, torch.tensor([1.0, 1, 1, 1]))
    assert torch.allclose(result.own_after, torch.tensor([8.0, 1, 1, 3]))
    assert torch.allclose(result.other_before, torch.tensor([101**0.5, 101**0.5, 9, 11]))
    assert torch.allclose(result.other_after, torch.tensor([2, 101**0.5, 9, 109**0.5]))
    assert result.strayed_after.tolist() == [True, False, False, False]
    assert not result.strayed_before.any()


def test_class_centers():
    h, y = draw(30, 4), torch.arange(30) % 3 * 2  # classes 0, 2, 4
    centers, which = class_centers(h, y)
    assert torch.allclose(centers[1], h[y == 2].mean(0))
    assert torch.equal(which * 2, y)


# ---------------------------------------------------------------------------------------------------------- calibration


def binary(confidence, right):
    """Logits that say class 0 with this confidence, and labels, 0 where right."""
    p = torch.as_tensor(confidence, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], 1), (~torch.as_tensor(right)).long()


def test_calibrated_predictions_have_no_error():
    result = reliability(*binary([0.75] * 4 + [0.9] * 10, [True] * 3 + [False] + [True] * 9 + [False]))
    assert result.ece == pytest.approx(0, abs=1e-12)
    assert result.brier == pytest.approx(2 * (4 * 0.75 * 0.25 + 10 * 0.9 * 0.1) / 14)  # 2 p (1 - p)
    p = torch.softmax(2 * draw(40_000, 4, seed=1), 1)
    y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    drawn = reliability(p.log(), y)
    assert drawn.ece < 0.01
    assert sum(drawn.bins.n) == 40_000


def test_overconfident_predictions():
    result = reliability(*binary([0.95] * 100, [True] * 60 + [False] * 40))
    assert result.ece == pytest.approx(0.35)
    assert result.brier == pytest.approx(2 * (0.6 * 0.05**2 + 0.4 * 0.95**2))
    assert result.nll == pytest.approx(-0.6 * math.log(0.95) - 0.4 * math.log(0.05))
    (bin_,) = [b for b, n in enumerate(result.bins.n) if n]
    assert bin_ == 14
    assert (result.bins.n[14], result.bins.accuracy[14]) == (100, pytest.approx(0.6))
    assert result.bins.confidence[:14] == (None,) * 14


def test_a_confidence_on_a_border_is_in_the_lower_bin():
    assert reliability(torch.zeros(3, 2), torch.zeros(3).long(), bins=2).bins.n == (3, 0)


def test_calibration_of_huge_logits_is_a_number():
    result = reliability(torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.tensor([0, 1]))
    assert (result.ece, result.brier, result.nll) == (0.5, 1.0, 5000.0)


# ---------------------------------------------------------------------------------------------------- what is looked at


def test_samples_are_balanced_and_stay_the_same():
    y = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    index = torch.arange(100) + 1000
    rows = choose(y, index, 30, seed=0)
    assert y[rows].bincount().tolist() == [13, 12, 5]
    assert len(set(rows.tolist())) == 30
    assert y[rows[:9]].bincount().tolist() == [3, 3, 3]
    assert torch.equal(choose(y, index, 9, seed=0), rows[:9])  # a smaller wish is a beginning of a larger one
    turned = torch.arange(99, -1, -1)
    again = choose(y[turned], index[turned], 30, seed=0)
    assert torch.equal(index[turned][again], index[rows])  # the order that samples come in does not matter
    assert set(choose(y, index, 30, seed=1).tolist()) != set(rows.tolist())
    assert len(choose(y, index, 500, seed=0)) == 100


# -------------------------------------------------------------------------------------------------------------- measure


@pytest.fixture(scope="module")
def linear():
    """(model, x, y, x_adv, threat): a linear network of the house; x_adv is the worst of the threat, in closed form."""
    model = models.build("linear", (1, 2, 3), 2, seed=1)
    x = 0.3 + 0.4 * draw(120, 1, 2, 3, seed=4).sigmoid().float()
    threat = Threat("linf", 0.02)
    with torch.no_grad():
        z = model(x).logits
        model.head.linear.bias[0] -= (z[:, 0] - z[:, 1]).median() + 1e-3  # the boundary in the middle of the samples
        y = model(x).logits.argmax(1)
        slope = (model.head.linear.weight[0] - model.head.linear.weight[1]).view(1, 2, 3)
    sign = torch.where(y == 0, -1.0, 1.0).view(-1, 1, 1, 1)
    return model, x, y, x + threat.eps * sign * slope.sign(), threat


def everything(value):
    if isinstance(value, dict):
        for part in value.values():
            yield from everything(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from everything(part)
    else:
        yield value


def is_json(result, most=120_000):
    plain = asdict(result)
    text = json.dumps(plain, allow_nan=False)  # raises for NaN and infinity
    assert decode(type(result), json.loads(text), "it") == result
    assert {type(value) for value in everything(plain)} <= {int, float, str, bool, type(None)}
    return len(text) < most


def test_measure_of_a_linear_network(linear):
    model, x, y, x_adv, threat = linear
    result = measure(model, x, y, x_adv, threat, s=0.1)
    assert is_json(result)
    assert (result.n, result.right, result.not_finite) == (120, 120, 0)
    assert (result.space, result.dim, result.norm, result.eps, result.s) == (
        "features",
        6,
        "linf",
        0.02,
        0.1,
    )
    with torch.no_grad():
        margin, margin_adv = ((out.logits[:, 0] - out.logits[:, 1]) * torch.where(y == 0, 1, -1) for out in (
            model(x), model(x_adv)
        ))  # fmt: skip
        slope = float((model.head.linear.weight[0] - model.head.linear.weight[1]).abs().sum())
    assert result.lipschitz.q10 == pytest.approx(slope, rel=1e-4) == result.lipschitz.q90
    middle = float(margin.quantile(0.5, interpolation="nearest"))
    assert result.margin.median == pytest.approx(middle, rel=1e-4)
    assert result.input_margin.median == pytest.approx(middle / slope, rel=1e-4)
    assert result.distance.median == pytest.approx(middle / slope, rel=2e-3)
    for key, values in (("inference_region", margin), ("inference_region_adv", margin_adv)):
        expected = float(((values > 0) & (values <= 0.1)).double().mean())
        assert 0 < expected < 1
        assert getattr(result, key) == pytest.approx(expected, abs=1e-5)
    found = dict(zip(result.distances.index, result.distances.distance, strict=True))
    assert found == pytest.approx({i: float(margin[i]) / slope for i in range(120)}, rel=2e-3)
    assert result.movement.moved.q90 == pytest.approx(0.02 * 6**0.5, rel=1e-4)  # features are the pixels
    standing = [sum(d > eps for d in found.values()) for eps in (0.01, 0.02, 0.03, 0.04)]
    assert [(c.n, c.minimal_norm, c.robust) for c in result.eps_checks] == [(120, k, k) for k in standing]
    attacked = sum(standing) - standing[1]  # at eps itself the evaluation has attacked
    assert result.passes.passes == 3 * 120 + 2 * (50 + 10) * 120 + 26 * attacked


def test_of_what_is_wrong_already_there_is_no_twin():
    def model(x):  # the margin of class 0: steep where it is right, flat where it is wrong; features of its own there
        m = x.flatten(1) - 0.5
        return Outputs(torch.cat([torch.where(m > 0, 10 * m, m), 0 * m], 1), torch.where(m > 0, m, 100.0))

    x = torch.linspace(0.05, 0.95, 40).view(-1, 1, 1, 1)
    x_adv = torch.where(x > 0.5, x - 0.01, x)
    result = measure(model, x, torch.zeros(40).long(), x_adv, Threat("linf", 0.01))
    assert (result.n, result.right, result.per_class.n) == (40, 20, (20, 0))
    assert result.lipschitz == Spread(10.0, 10.0, 10.0, 10.0, 10.0)
    assert result.movement.moved.q10 == result.movement.moved.q90 == pytest.approx(0.01, rel=1e-3)
    assert result.input_margin.q10 > 0 > result.margin.q10
    assert sorted(result.distances.distance)[:21].count(0.0) == 20


def test_the_curve_that_distances_make_is_the_accuracy_under_attack(linear):
    model, x, y, x_adv, threat = linear
    result = measure(model, x, y, x_adv, threat)
    for eps in (0.005, 0.02, 0.06):
        line = model.head.linear
        slope = (line.weight[0] - line.weight[1]).abs().sum()
        with torch.no_grad():
            survives = (model(x).logits[:, 0] - model(x).logits[:, 1]).abs() > eps * slope
        curve = np.mean([d is None or d > eps for d in result.distances.distance])
        assert curve == pytest.approx(float(survives.float().mean()), abs=0.01)


def test_measure_is_the_same_every_time_and_in_every_batch(digits):
    model, x, y = digits
    x_adv = (x + 0.1 * (x < 0.5)).clamp(0, 1)
    threat = Threat("linf", 0.1)
    result = measure(model, x, y, x_adv, threat, s=1.0, steps=10)
    assert result == measure(model, x, y, x_adv, threat, s=1.0, steps=10)
    assert result.space == "logits"
    assert result.dim == 10
    split = measure(model, x, y, x_adv, threat, s=1.0, steps=10, batch_size=7)
    assert split.distances.distance == pytest.approx(result.distances.distance, rel=0.05)
    assert split.two_sample.auc == pytest.approx(result.two_sample.auc, abs=1e-3)
    few = measure(model, x, y, x_adv, threat, limit=15, steps=10)
    assert few.n == 15
    assert few.distances.index == result.distances.index[:15]
    numbered = measure(model, x, y, x_adv, threat, index=torch.arange(len(y)) + 500, steps=10)
    assert min(numbered.distances.index) == 500
    assert numbered.inference_region is None


def test_at_most_512_samples_are_measured_unless_more_are_asked_for(monkeypatch):
    monkeypatch.setattr("holdfast.region.measures.N_DISTANCES", 4)
    line = Line(2)
    x = line.x.repeat(11, 1)[:530, :, None, None]
    model, y = (lambda x: line(x[..., 0, 0])), line(x[..., 0, 0]).argmax(1)
    box = Threat("linf", 0.01, -10, 10)
    assert measure(model, x, y, x, box, steps=1).n == 512
    assert measure(model, x, y, x, box, steps=1, limit=520).n == 520


def test_measure_reports_its_progress(linear):
    model, x, y, x_adv, threat = linear
    reports = []
    measure(model, x, y, x_adv, threat, steps=2, batch_size=50, progress=lambda *report: reports.append(report))
    assert reports == [
        (f"measuring {what}", done, 120) for what in ("features", "distances") for done in (50, 100, 120)
    ]


def test_measure_leaves_the_network_as_it_was(linear):
    model, x, y, x_adv, threat = linear
    model.train()
    measure(model, x, y, x_adv, threat, steps=2)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()


def test_what_the_evaluation_missed_is_counted(linear):
    model, x, y, x_adv, threat = linear
    with torch.no_grad():
        falls = int((model(x_adv).logits.argmax(1) != y).sum())
    assert 0 < falls < 120
    kept = []  # x_adv = x: the evaluation has found nothing at all
    measure(model, x, y, x, threat, on_witnesses=kept.append)
    (rows, points, margin, prediction), *more = kept
    assert abs(len(rows) - falls) <= 1
    assert not more
    assert bool((threat.violation(points, x[rows]) == 0).all())
    with torch.no_grad():
        logits = model(points).logits
    assert torch.equal(logits.argmax(1), prediction)
    assert bool((prediction != y[rows]).all())
    own, other = (logits.gather(1, label[:, None])[:, 0] for label in (y[rows], 1 - y[rows]))
    torch.testing.assert_close(margin, own - other)
    # On a linear network the edge of the threat is farther behind the boundary than the nearest mistake.
    assert float((threat.size(points - x[rows]) / threat.eps).median()) > 0.99


def curve_at(result, eps):
    """The samples that stand at eps, read off the distances as the report does."""
    return sum(d is None or d > eps for d in result.distances.distance)


def test_what_the_minimal_norm_attack_misses_an_attack_on_a_radius_finds():
    """A score that is flat around x: FMN, which starts at x, does not move; an attack from a random start does."""

    def model(x):  # the boundary is where the mean has moved by 0.051
        moved = (x.flatten(1).mean(1) - 0.5).abs()
        return torch.stack([1 - (moved - 0.001).clamp_min(0) / 0.05, torch.zeros_like(moved)], 1)

    x, y, threat = torch.full((40, 1, 4, 4), 0.5), torch.zeros(40).long(), Threat("linf", 0.06)
    assert smallest_perturbation(model, x, y, threat)[1].isinf().all()
    kept = []
    result = measure(model, x, y, x, threat, on_witnesses=kept.append)
    assert [(c.minimal_norm, c.robust) for c in result.eps_checks] == [(40, 40), (40, 0), (40, 0), (40, 0)]
    assert all(0.05099 <= d <= 0.054 for d in result.distances.distance)
    assert len(kept[0].rows) == 40  # moved back, they lie in the threat
    assert (curve_at(result, 0.05), curve_at(result, 0.06)) == (40, 0)


@pytest.mark.parametrize("eps", [4 / 255, 8 / 255, 0.1, 1 / 3])
def test_what_the_evaluation_broke_at_eps_does_not_stand_at_eps(eps):
    x, y = torch.full((12, 1, 2, 2), 0.3), torch.zeros(12).long()
    x_adv = torch.where(torch.arange(12).view(-1, 1, 1, 1) < 8, x + eps, x)  # in float32: the edge, or a bit beyond
    model = lambda x: torch.stack([0.29 + eps - x.mean((1, 2, 3)).detach(), 0 * x.sum((1, 2, 3))], 1)  # noqa: E731
    result = measure(model, x, y, x_adv, Threat("linf", eps))
    assert curve_at(result, eps) <= 4
    assert result.eps_checks[1].robust == curve_at(result, eps)


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.5)], ids=str)
def test_the_curve_of_cosine_logits_is_that_of_evaluations(trained_runs, threat):
    """CosFace stood at 47% at linf 0.2, where an evaluation breaks everything: its gradient at x is saturated."""
    model, split = run_folder.load(trained_runs("cosface"))[0], data.load("digits")
    some = split.test.take(slice(0, 64))
    x_adv = evaluate(model, some, threat, "quick").x_adv
    result = measure(model, some.x, some.y, x_adv, threat)
    for share, check in zip((0.5, 1.0, 1.5, 2.0), result.eps_checks, strict=True):
        eps = share * threat.eps
        survives = int(evaluate(model, some, replace(threat, eps=eps), "quick").robust.sum())
        assert check.robust == curve_at(result, check.eps)
        assert curve_at(result, eps) <= survives + 5


def test_misalignment_is_seen_and_its_absence_too():
    torch.manual_seed(0)
    model = models.build("linear", (1, 2, 2), 2)
    x = torch.rand(400, 1, 2, 2)
    y = model(x).logits.argmax(1)
    shifted = (x + torch.tensor([0.5, 0.0, 0.0, 0.0]).view(1, 2, 2)) / 1.5  # not along the boundary alone
    threat = Threat("linf", 0.5)
    seen, same = (measure(model, x, y, x_adv, threat, steps=2).two_sample for x_adv in (shifted, x))
    assert seen.auc > 0.75
    assert seen.mmd2 > 0.05
    assert seen.frechet > 5 * seen.frechet_chance
    assert same.auc == 0.5
    assert (same.mmd2, same.frechet) == (0.0, pytest.approx(0, abs=1e-9))
    assert seen.frechet_relative == pytest.approx(seen.frechet / (4 / 12), rel=0.1)


class Odd(nn.Module):
    """A model of no features, of one constant feature, or whose answer to dark images is no number."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        z = torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)
        if self.kind == "constant":
            return Outputs(0 * z, torch.ones(len(x), 3))
        if self.kind == "nan":
            return torch.where(x[:, :1, 0, 0] < 0.5, math.nan, z)
        return z


@pytest.mark.parametrize("kind", ["plain", "constant", "nan"])
@pytest.mark.parametrize("labels", ["right", "wrong", "one class", "one sample"])
@pytest.mark.parametrize("attacked", [True, False])
def test_degenerate_input_gives_no_odd_numbers(kind, labels, attacked):
    model, x = Odd(kind), draw(24, 1, 2, 2).sigmoid().float()
    y = (x.mean((1, 2, 3)) < 0.5).long()
    if labels == "wrong":
        y = 1 - y
    if labels == "one class":
        x, y = x[y == 0], y[y == 0]
    if labels == "one sample":
        x, y = x[:1], y[:1]
    x_adv = 1 - x if attacked else x
    result = measure(model, x, y, x_adv, Threat("l2", 3.0), s=0.5, steps=3)
    assert is_json(result)
    assert is_json(merge([result, result]))
    drawn = projection(model, x, y, x_adv, s=0.5, grid=5)
    assert is_json(drawn)
    if kind == "nan":
        assert result.not_finite > 0 or labels == "one sample"
    if not attacked and result.right >= 10:
        assert result.two_sample.mmd2 == 0.0
        assert result.two_sample.auc == 0.5


def test_samples_that_do_not_fit_are_refused(linear):
    model, x, y, x_adv, threat = linear
    for bad in ((x[:0], y[:0], x_adv[:0]), (x, y, x_adv[:5]), (x, y[:5], x_adv), (x, y, x_adv.flatten(2))):
        with pytest.raises(
            UserError, match=r"nothing to measure|of the same samples|one label for each image|labels, got"
        ):
            measure(model, *bad, threat)


def test_merged_networks(linear):
    model, x, y, x_adv, threat = linear
    one, two = (measure(model, x[part], y[part], x_adv[part], threat, s=0.1, steps=5) for part in (
        slice(0, 80), slice(80, 120)
    ))  # fmt: skip
    both = merge([one, two])
    assert is_json(both)
    assert (both.n, both.dim, both.eps, both.s, both.space) == (120, 6, 0.02, 0.1, "features")
    assert both.margin.median == pytest.approx((one.margin.median + two.margin.median) / 2, rel=1e-5)
    assert len(both.distances.index) == len(both.distances.distance) == 120
    whole, bins = reliability(model(x).logits.detach(), y), both.calibration.clean.bins
    assert bins.n == whole.bins.n
    for key in ("accuracy", "confidence"):
        mine, all_at_once = ([v or 0 for v in getattr(part, key)] for part in (bins, whole.bins))
        assert mine == pytest.approx(all_at_once, rel=1e-4)
    assert both.per_class.n == tuple(y.bincount().tolist())


# ----------------------------------------------------------------------------------------------------------- projection


def test_the_plane_goes_through_the_centers():
    y = torch.arange(90) % 3
    h = 4 * draw(3, 7, seed=1)[y] + 0.1 * draw(90, 7, seed=2)
    origin, axes, explained = plane(h, y)
    centers, _ = class_centers(h, y)
    assert torch.allclose(axes @ axes.T, torch.eye(2, dtype=torch.float64))
    assert torch.allclose(origin + (centers - origin) @ axes.T @ axes, centers)  # three points lie in one plane
    assert explained == pytest.approx(1)
    spread = ((centers - origin) @ axes.T).square().sum(0)
    assert spread[0] > spread[1]
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()
    many = torch.arange(90) % 9
    part = plane(4 * draw(9, 7, seed=1)[many], many)[2]
    sizes = torch.linalg.svdvals(4 * draw(9, 7, seed=1) - 4 * draw(9, 7, seed=1).mean(0)).square()
    assert part == pytest.approx(float(sizes[:2].sum() / sizes.sum()))


@pytest.mark.parametrize("head", HEADS)
def test_the_plane_shows_what_the_head_decides(head):
    model = models.build("mlp:width=16", (1, 3, 3), 4, head=head, seed=3)
    model.logit_scale = 2.0
    x = draw(60, 1, 3, 3, seed=1).sigmoid().float()
    y = torch.arange(60) % 4
    drawn = projection(model, x, y, x.flip(3), s=1.0, limit=40, grid=9)
    assert is_json(drawn)
    assert (drawn.exact, drawn.space, drawn.classes, drawn.s) == (False, "features", 4, 1.0)
    assert 0 < drawn.explained < 1
    rows = choose(y, torch.arange(60), 40, seed=0)
    with torch.no_grad():
        out, out_adv = model(x[rows]), model(x.flip(3)[rows])
    assert drawn.y == tuple(y[rows].tolist())
    assert drawn.prediction == tuple(out.logits.argmax(1).tolist())
    assert drawn.prediction_adv == tuple(out_adv.logits.argmax(1).tolist())
    # A backbone that hands on points of the plane: its network must say what the grid says.
    h = out.features.double()
    origin, axes, _ = plane(h, y[rows])
    assert np.allclose(drawn.points_adv, (out_adv.features.double() - origin) @ axes.T, rtol=1e-3, atol=1e-3)
    grid = drawn.grid
    assert (len(grid.across), len(grid.up), len(grid.margin), len(grid.margin[0])) == (9, 9, 9, 9)
    across, up = (torch.tensor(values, dtype=torch.float64) for values in (grid.across, grid.up))
    at = (origin + across[6] * axes[0] + up[2] * axes[1]).float()[None]
    if head == "mmc":
        logits = -(at[:, None] - model.head.centers).square().sum(2)  # half of it, twice by the scale
    else:
        logits = 2 * model.head(at).logits.detach()
    top = logits[0].topk(2)
    assert grid.prediction[2][6] == int(top.indices[0])
    assert grid.margin[2][6] == pytest.approx(float(top.values[0] - top.values[1]), rel=2e-2, abs=1e-3)


def test_the_projection_of_a_model_of_another_make(digits):
    model, x, y = digits
    drawn = projection(model, x, y, x, grid=7)
    assert drawn.space == "logits"  # whose plane needs no head
    at = np.array([(u, v) for v in drawn.grid.up for u in drawn.grid.across])
    rows = choose(y, torch.arange(len(y)), 200, 0)
    with torch.no_grad():
        origin, axes, _ = plane(model(x[rows]).double(), y[rows])
    decided = (origin.numpy() + at @ axes.numpy()).argmax(1)
    assert (decided.reshape(7, 7) == np.array(drawn.grid.prediction)).mean() > 0.9  # four digits of a coordinate
    hidden = projection(lambda images: Outputs(model(images), images.flatten(1)), x, y, x)
    assert hidden.space == "features"
    assert hidden.grid is None


def test_a_head_that_does_not_read_its_features_is_not_drawn():
    class Twice(nn.Linear):
        def forward(self, h):
            return Outputs(super().forward(h), 2 * h)

    model = models.build("mlp:width=8", (1, 2, 2), 2)
    x, y = draw(30, 1, 2, 2).sigmoid().float(), torch.arange(30) % 2
    assert projection(model, x, y, x).grid is not None
    model.head = Twice(8, 2)
    assert projection(model, x, y, x).grid is None


def test_images_of_two_values_are_drawn_as_they_are():
    split = data.load("moons", limit=300)
    model = models.build("mlp:width=8", split.shape, 2, seed=0)
    x, y = data.pixels(split.test.x), split.test.y
    x_adv = (x + 0.05).clamp(0, 1)
    drawn = projection(model, x, y, x_adv, s=0.5, grid=61)
    assert is_json(drawn)
    assert drawn.exact is True
    assert drawn.space == "pixels"
    assert len(drawn.y) == 200
    rows = choose(y, torch.arange(300), 200, seed=0)
    assert np.allclose(drawn.points, x[rows].flatten(1), atol=1e-3)
    assert np.allclose(drawn.points_adv, x_adv[rows].flatten(1), atol=1e-3)
    grid = drawn.grid
    assert (grid.across[0], grid.across[-1], grid.up[0], grid.up[-1]) == (0, 1, 0, 1)
    with torch.no_grad():
        z = model(torch.tensor([[[[10 / 60, 45 / 60]]]])).logits[0]
    assert grid.prediction[45][10] == int(z.argmax())
    assert grid.margin[45][10] == pytest.approx(float((z[0] - z[1]).abs()), rel=1e-3)
    assert {p for row in grid.prediction for p in row} <= {0, 1}
