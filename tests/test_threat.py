"""The norm geometry: the ball, the box, the nearest point of their cut, the steepest direction, fair random starts."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.errors import UserError
from holdfast.noise import Noise
from holdfast.threat import NORMS, SPARSITY, TOLERANCE, Threat

SHAPES = [(1,), (2,), (5,), (2, 3), (1, 4, 4), (3, 5, 5), (257,)]


class Case(NamedTuple):
    threat: Threat
    x: Tensor
    x_adv: Tensor

    @property
    def slack(self) -> Tensor:
        """(N,): what rounding may add to a size: the relative error of eps, and each pixel's own."""
        unit = torch.finfo(self.x.dtype).eps
        dim = self.x[0].numel()
        grow = {"linf": 1.0, "l2": math.sqrt(dim), "l1": float(dim)}[self.threat.norm]
        step = (self.x_adv - self.x).flatten(1).abs().amax(1).clamp_max(self.threat.hi - self.threat.lo)
        pixel = max(abs(self.threat.lo), abs(self.threat.hi))
        return 8 * unit * (self.threat.eps * math.sqrt(dim) + grow * (pixel + step))


@st.composite
def cases(draw, norms=NORMS, dtypes=(torch.float32, torch.float64), shapes=tuple(SHAPES), longest=100.0):
    norm, dtype, shape = draw(st.sampled_from(norms)), draw(st.sampled_from(dtypes)), draw(st.sampled_from(shapes))
    eps = 10 ** draw(st.floats(-3, 2))
    lo = draw(st.sampled_from([0.0, -1.0, -7.5, 3.0]))
    hi = lo + 10 ** draw(st.floats(-1, 2.5))
    threat = Threat(norm, eps, lo, hi)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 4)), *shape)
    x = lo + (hi - lo) * torch.rand(shape, generator=rng, dtype=torch.float64)
    corner = torch.rand(shape, generator=rng)
    x = torch.where(corner < 0.15, lo, torch.where(corner > 0.85, hi, x))
    x = x.to(dtype).clamp(lo, hi)
    delta = torch.randn(shape, generator=rng, dtype=torch.float64)
    if draw(st.booleans()):  # a few large coordinates among many small ones
        delta = delta**3
    delta = delta / threat.size(delta).view(-1, *[1] * (x.ndim - 1)) * eps
    x_adv = (x + delta * 10 ** draw(st.floats(-2, math.log10(longest)))).to(dtype)
    return Case(threat, x, x_adv)


def project(case: Case) -> Tensor:
    return case.threat.project(case.x_adv, case.x)


def broken_rules(case: Case) -> list[str]:
    """The rules of a projection that ``case.threat.project`` breaks on this case: [] for a true projection."""
    threat, x, x_adv = case
    point, broken = project(case), []
    size, wanted = threat.size(point - x), threat.size(x_adv.clamp(threat.lo, threat.hi) - x)
    if point.shape != x.shape or point.dtype is not x.dtype or not point.isfinite().all():
        return ["shape, dtype, finite"]
    if bool((size > threat.eps * (1 + 1e-6) + case.slack).any()):
        broken.append("in the ball")
    if bool((point < threat.lo).any() | (point > threat.hi).any()):
        broken.append("in the box")
    if bool(((size - wanted.clamp_max(threat.eps)).abs() > threat.eps * 1e-6 + case.slack).any()):
        broken.append("lands on the radius")
    outside = x_adv.clamp(threat.lo, threat.hi) != x_adv
    inside = (wanted < threat.eps * (1 - 1e-6) - case.slack) & ~outside.flatten(1).any(1)
    if not torch.equal(point[inside], x_adv[inside]):
        broken.append("identity inside")
    if bool((threat.size(threat.project(point, x) - point) > case.slack).any()):
        broken.append("idempotent")
    return broken


@given(cases())
def test_projection_keeps_every_rule(case):
    assert broken_rules(case) == []


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_leaves_inside_points_to_the_last_bit(norm, dtype):
    threat = Threat(norm, 0.5)
    x = torch.rand(50, 3, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    start = threat.random_start(x, Noise(0, torch.arange(50)))
    x_adv = x + 0.999 * (start - x)
    assert torch.equal(threat.project(x_adv, x), x_adv)
    assert torch.equal(threat.project(x, x), x)


class PushedOut(Threat):
    """A slip of the field: every point is scaled to the sphere, those inside as well."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        size = self.size(delta).clamp_min(1e-30).view(-1, *[1] * (x.ndim - 1))
        return (x + delta * self.eps / size).clamp(self.lo, self.hi)


class AlwaysOne(Threat):
    """Another: the factor is min(1, max(1, eps / size)) = 1, so nothing is ever projected."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        size = self.size(delta).clamp_min(1e-30).view(-1, *[1] * (x.ndim - 1))
        return (x + delta * (self.eps / size).clamp_min(1.0).clamp_max(1.0)).clamp(self.lo, self.hi)


class WholeBatch(Threat):
    """Another: one norm for the whole batch."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        size = self.size(delta.reshape(1, -1)).clamp_min(1e-30)
        return (x + delta * (self.eps / size).clamp_max(1.0)).clamp(self.lo, self.hi)


class OneAfterTheOther(Threat):
    """Another: scale to the ball, then clip to the box; feasible, but not the nearest point of the two together."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        size = self.size(delta).clamp_min(1e-30).view(-1, *[1] * (x.ndim - 1))
        return (x + delta * (self.eps / size).clamp_max(1.0)).clamp(self.lo, self.hi)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("slip", "length", "rule"),
    [
        (PushedOut, 0.5, "identity inside"),
        (AlwaysOne, 3.0, "in the ball"),
        (WholeBatch, 0.9, "identity inside"),
        (OneAfterTheOther, 3.0, "lands on the radius"),
    ],
)
def test_the_slips_of_the_field_would_be_caught(norm, slip, length, rule):
    x = torch.full((2, 6), 0.5)
    if slip is OneAfterTheOther:
        x[:, 0] = 1.0
    v = torch.tensor([[3.0, 1.0, -1.0, 0.5, 2.0, 1.0], [-1.0, 2.0, 1.0, 1.0, -0.5, 0.5]]).abs()
    eps = 0.2
    threat = Threat(norm, eps)
    x_adv = x + v * (length * eps / threat.size(v))[:, None]
    if slip is WholeBatch and norm == "linf":
        x_adv[0] = x[0] + 5 * (x_adv[0] - x[0])  # the maximum of a batch shows only beside a large sample
    assert broken_rules(Case(threat, x, x_adv)) == []
    mutant = slip(norm, eps)
    if slip is OneAfterTheOther and norm == "linf":
        return  # scaling linf loses nothing at the largest coordinate: the closed form below catches it
    assert rule in broken_rules(Case(mutant, x, x_adv))


def feasible(case: Case, rng: torch.Generator, count: int) -> Tensor:
    """(count, N, ...) points of the ball cut with the box: a point of the ball moved towards x by the box stays in."""
    threat, x, _ = case
    v = torch.randn((count, *x.shape), generator=rng, dtype=x.dtype)
    v[::3] = v[::3] * (torch.rand(v[::3].shape, generator=rng) < 0.4)  # sparse ones too, for l1
    flat = v.flatten(2)
    order = {"linf": math.inf, "l2": 2, "l1": 1}[threat.norm]
    size = flat.norm(p=order, dim=2).clamp_min(1e-12).view(count, -1, *[1] * (x.ndim - 1))
    radius = torch.rand(size.shape, generator=rng, dtype=x.dtype) ** 0.3
    return (x + v / size * radius * threat.eps).clamp(threat.lo, threat.hi)


@given(cases(dtypes=(torch.float64,), shapes=((1,), (2,), (3,), (6,), (30,))), st.integers(0, 2**31))
def test_projection_is_the_nearest_point(case, seed):
    """p is the nearest point of a convex set exactly if <x_adv - p, w - p> <= 0 for each of its points w."""
    threat, _, x_adv = case
    point = project(case)
    others = feasible(case, torch.Generator().manual_seed(seed), 300)
    away = (x_adv - point).flatten(1)
    product = (away * (others - point).flatten(2)).sum(2)
    scale = away.norm(dim=1) * (threat.eps + threat.hi - threat.lo)
    assert (product <= 1e-8 * scale + 1e-12).all()
    assert (away.norm(dim=1) <= (x_adv - others).flatten(2).norm(dim=2) * (1 + 1e-9) + 1e-12).all()


def onto_ball(v: np.ndarray, norm: str, eps: float) -> np.ndarray:
    """The nearest point of the ball around 0 alone: scaling for l2, the sorted soft threshold of Duchi 2008 for l1."""
    if norm == "l2":
        return v * min(1.0, eps / max(np.linalg.norm(v), 1e-300))
    if np.abs(v).sum() <= eps:
        return v
    ranked = np.sort(np.abs(v))[::-1]
    threshold = (np.cumsum(ranked) - eps) / np.arange(1, len(v) + 1)
    kept = np.nonzero(ranked > threshold)[0][-1]
    return np.sign(v) * np.maximum(np.abs(v) - threshold[kept], 0)


def dykstra(threat: Threat, x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
    """The nearest point of ball and box together from the two projections alone, corrected in turns (Dykstra 1983)."""
    point, ball, box = x_adv - x, np.zeros(len(x)), np.zeros(len(x))
    for _ in range(20_000):
        inside = onto_ball(point + ball, threat.norm, threat.eps)
        ball = point + ball - inside
        moved = np.clip(inside + box, threat.lo - x, threat.hi - x)
        box = inside + box - moved
        change, point = np.abs(moved - point).max(), moved
        if change < 1e-13 and np.abs(moved - inside).max() < 1e-13:
            break
    return x + point


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("seed", range(12))
def test_projection_agrees_with_alternating_projections(norm, seed):
    rng = np.random.default_rng(seed)
    d, eps = int(rng.integers(2, 9)), float(rng.uniform(0.2, 1.2))
    threat = Threat(norm, eps)
    x = rng.choice([0.0, 1.0, 0.5, 0.8], size=d)
    x_adv = x + rng.normal(size=d) * rng.uniform(0.3, 3)
    ours = threat.project(torch.tensor(x_adv)[None], torch.tensor(x)[None])[0].numpy()
    theirs = dykstra(threat, x, x_adv)
    np.testing.assert_allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize("ratio", [1.3, 2.0, 10.0])
def test_l2_projection_is_exact_when_the_box_stops_one_coordinate_after_another(ratio):
    """Steps that grow geometrically meet the box one by one: each bound that is found uncovers the next."""
    d, room = 20, 0.1
    x = torch.full((1, d), 1 - room, dtype=torch.float64)
    x_adv = x + 0.2 * ratio ** torch.arange(d, dtype=torch.float64)
    threat = Threat("l2", 0.95 * room * math.sqrt(d))
    point = threat.project(x_adv, x)

    def size(t):
        return float(threat.size((x + t * (x_adv - x)).clamp(0, 1) - x))

    t = scipy.optimize.brentq(lambda t: size(t) - threat.eps, 0.0, 1.0, xtol=1e-300, rtol=1e-14)
    torch.testing.assert_close(point, (x + t * (x_adv - x)).clamp(0, 1), rtol=1e-7, atol=1e-9)


@given(cases(norms=("linf",)))
def test_linf_projection_is_the_closed_form(case):
    threat, x, x_adv = case
    for ours, centre, point in zip(project(case).flatten(), x.flatten(), x_adv.flatten(), strict=True):
        low, high = max(threat.lo, centre.item() - threat.eps), min(threat.hi, centre.item() + threat.eps)
        literal = min(max(point.item(), low), high)
        assert ours.item() == pytest.approx(literal, rel=4e-7, abs=4e-7 * threat.eps)


@given(cases(), st.integers(0, 3))
def test_no_sample_sees_its_batch_mates(case, row):
    row = row % len(case.x)
    alone = Case(case.threat, case.x[row : row + 1], case.x_adv[row : row + 1])
    difference = (project(alone) - project(case)[row : row + 1]).abs().max()
    assert difference <= 1e-6 * (case.threat.eps + case.x.abs().max())
    assert torch.equal(case.threat.ascent(alone.x_adv), case.threat.ascent(case.x_adv)[row : row + 1])
    torch.testing.assert_close(case.threat.size(alone.x_adv), case.threat.size(case.x_adv)[row : row + 1])


def test_size_is_the_norm_of_one_sample():
    delta = torch.tensor([[[3.0, -4.0], [0.0, 0.0]], [[0.5, 0.5], [-0.5, 0.5]]])
    assert Threat("linf", 1.0).size(delta).tolist() == [4.0, 0.5]
    assert Threat("l2", 1.0).size(delta).tolist() == [5.0, 1.0]
    assert Threat("l1", 1.0).size(delta).tolist() == [7.0, 2.0]


# -- ascent


@given(cases(), st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]), st.booleans())
def test_ascent_has_size_one_at_any_scale_of_the_gradient(case, scale, boxed):
    threat, x, x_adv = case
    grad = (x_adv - x) * (scale / (x_adv - x).abs().max().clamp_min(1e-6))
    step = threat.ascent(grad, x) if boxed else threat.ascent(grad)
    assert step.shape == grad.shape
    assert step.dtype is grad.dtype
    assert step.isfinite().all()
    size = threat.size(step)
    blocked = grad.flatten(1).abs().amax(1) < 1e-37 if not boxed else size == 0
    assert ((size - 1).abs() <= 1e-5)[~blocked].all()
    if boxed and threat.norm == "l1":  # zero only where the box stops every coordinate
        free = (grad > 0) & (x < threat.hi) | (grad < 0) & (x > threat.lo)
        assert torch.equal(size == 0, ~free.flatten(1).any(1))
        assert not ((step > 0) & (x >= threat.hi) | (step < 0) & (x <= threat.lo)).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_ascent_of_extreme_gradients_is_never_nan(norm, value):
    grad = torch.zeros(3, 2, 4)
    grad[0], grad[1, 0, 1] = value, -value
    step = Threat(norm, 0.1).ascent(grad)
    assert step.isfinite().all()
    assert Threat(norm, 0.1).size(step).tolist() == pytest.approx([float(value > 0)] * 2 + [0.0], abs=1e-3)
    assert (step * grad.sign() >= 0).all()


@given(cases(norms=("linf", "l2"), dtypes=(torch.float64,)), st.integers(0, 2**31))
def test_ascent_maximises_the_inner_product(case, seed):
    threat, x, x_adv = case
    grad = x_adv - x
    assume(bool((threat.size(grad) > 0).all()))
    best = (threat.ascent(grad) * grad).flatten(1).sum(1)
    dual = grad.flatten(1).norm(p=1 if threat.norm == "linf" else 2, dim=1)  # the dual norm: what no direction beats
    torch.testing.assert_close(best, dual)
    other = torch.randn((200, *x.shape), generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    order = math.inf if threat.norm == "linf" else 2
    other = other.flatten(2) / other.flatten(2).norm(p=order, dim=2, keepdim=True)
    assert ((other * grad.flatten(1)).sum(2) <= best * (1 + 1e-12)).all()


@pytest.mark.parametrize("d", [1, 10, 50, 51, 784])
def test_l1_ascent_moves_the_few_largest_coordinates_alike(d):
    grad = torch.randn(3, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    step = Threat("l1", 1.0).ascent(grad)
    count = math.ceil(SPARSITY * d)
    for row, g in zip(step, grad, strict=True):
        chosen = sorted(range(d), key=lambda i: -abs(g[i].item()))[:count]
        literal = torch.zeros(d, dtype=torch.float64)
        for i in chosen:
            literal[i] = math.copysign(1 / count, g[i].item())
        torch.testing.assert_close(row, literal)
    if count == 1:  # then it is the exact maximiser
        torch.testing.assert_close((step * grad).sum(1), grad.abs().amax(1))


def test_l1_ascent_passes_over_what_the_box_stops():
    threat, grad = Threat("l1", 1.0), torch.tensor([[3.0, -2.0, 1.0]])
    assert threat.ascent(grad).tolist() == [[1.0, 0.0, 0.0]]
    assert threat.ascent(grad, torch.tensor([[1.0, 0.5, 0.5]])).tolist() == [[0.0, -1.0, 0.0]]
    assert threat.ascent(grad, torch.tensor([[1.0, 0.0, 0.5]])).tolist() == [[0.0, 0.0, 1.0]]
    assert threat.ascent(grad, torch.tensor([[1.0, 0.0, 1.0]])).tolist() == [[0.0, 0.0, 0.0]]
    assert grad.tolist() == [[3.0, -2.0, 1.0]]


# -- random starts


@given(cases(), st.integers(-(2**40), 2**40))
def test_random_start_is_feasible_and_belongs_to_its_sample(case, seed):
    threat, x, _ = case
    noise = Noise(seed, torch.arange(100, 100 + len(x)))
    start = threat.random_start(x, noise)
    assert start.dtype is x.dtype
    assert start.shape == x.shape
    assert (threat.size(start - x) <= threat.eps * (1 + 1e-5) + case.slack).all()
    assert (start >= threat.lo).all()
    assert (start <= threat.hi).all()
    assert not threat.violation(start, x).any()
    order = torch.arange(len(x)).flip(0)
    torch.testing.assert_close(threat.random_start(x[order], noise[order]), start[order], rtol=1e-6, atol=1e-6)
    assert torch.equal(threat.random_start(x, noise), start)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [1, 3, 20])
def test_random_start_is_uniform_in_the_ball(norm, d):
    n, eps = 4000, 0.7
    threat = Threat(norm, eps, -10.0, 10.0)
    x = torch.zeros(n, d, dtype=torch.float64)
    delta = threat.random_start(x, Noise(1, torch.arange(n)))
    assert not (delta == threat.random_start(x, Noise(1, torch.arange(n)).fold(1))).any()  # a restart is a new draw
    filled = (threat.size(delta) / eps) ** d  # the share of the ball's volume that lies nearer: uniform
    assert scipy.stats.kstest(filled.numpy(), "uniform").pvalue > 1e-3
    assert (delta.mean(0).abs() < 5 * eps / math.sqrt(n * (d if norm == "l2" else 1))).all()
    spread = {
        "linf": delta.square().mean(0) / (eps**2 / 3),
        "l2": delta.square().mean(0) / (eps**2 / (d + 2)),
        "l1": delta.abs().mean(0) / (eps / (d + 1)),
    }[norm]
    assert (spread - 1).abs().max() < 0.12  # every coordinate, no axis favoured
    square = {"linf": 1 / 3, "l2": 1 / (d + 2), "l1": 2 / ((d + 1) * (d + 2))}[norm]  # E delta_i^2 / eps^2 in the ball
    assert delta.square().mean().item() == pytest.approx(square * eps**2, rel=0.06)
    if d > 1:
        correlation = np.corrcoef(delta.T.numpy())
        assert np.abs(correlation - np.eye(d)).max() < 0.08
        size = threat.size(delta)  # and the direction does not know the radius
        assert abs(np.corrcoef(size, (delta[:, 0] > 0).double())[0, 1]) < 0.08


# -- violation


@given(cases())
def test_projected_points_break_no_rule(case):
    threat = case.threat
    assert not threat.violation(project(case), case.x).any()
    assert not threat.violation(case.x, case.x).any()


@given(cases(shapes=((1,), (2,), (5,), (2, 3), (1, 4, 4))))
def test_one_percent_outside_is_a_violation_of_one_percent(case):
    threat = dataclasses.replace(case.threat, lo=0.5 - 2 * case.threat.eps, hi=0.5 + 2 * case.threat.eps)
    x = torch.full_like(case.x, 0.5)
    v = (case.x_adv - case.x).double()
    assume(bool((threat.size(v) > 0).all()) and threat.eps > 0.05)
    x_adv = (x + v * (1.01 * threat.eps / threat.size(v)).view(-1, *[1] * (x.ndim - 1))).to(x.dtype)
    found = threat.violation(x_adv, x)
    assert (found > 0).all()
    assert found.tolist() == pytest.approx([0.01 * threat.eps] * len(x), rel=0.15)


def test_violation_forgives_its_tolerance_and_nothing_else():
    x = torch.zeros(1, 4, dtype=torch.float64)
    for norm, delta in [("linf", [1, 1, 1, 1]), ("l2", [0.5, 0.5, 0.5, 0.5]), ("l1", [0.25, 0.25, 0.25, 0.25])]:
        threat, x_adv = Threat(norm, 1e2, -1e3, 1e3), 1e2 * torch.tensor([delta], dtype=torch.float64)
        assert threat.violation(x_adv, x).item() == 0
        assert threat.violation(x_adv * (1 + TOLERANCE), x).item() == 0
        assert threat.violation(x_adv * (1 + 30 * TOLERANCE), x).item() > 0


def test_violation_sees_the_box_and_what_is_not_a_number():
    threat = Threat("linf", 0.5)
    x = torch.full((5, 2), 0.75)
    x_adv = torch.tensor([[1.0, 0.5], [1.1, 0.5], [math.nan, 0.5], [math.inf, 0.5], [-math.inf, 0.5]])
    found = threat.violation(x_adv, x)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(0.1, rel=1e-5)
    assert found[2] == math.inf
    assert (found[3:] > 1e6).all()
    assert threat.violation(torch.tensor([[-0.2, 0.9]]), torch.tensor([[0.1, 0.9]])).item() == pytest.approx(0.2)


def test_an_infinite_box_is_refused_or_still_bounded_by_eps():
    try:
        threat = Threat("l2", 1.0, -math.inf, math.inf)
    except UserError:
        return
    x, x_adv = torch.zeros(1, 2), torch.tensor([[30.0, 40.0]])
    assert threat.violation(x_adv, x).item() == pytest.approx(49.0, rel=1e-3)
    torch.testing.assert_close(threat.project(x_adv, x), torch.tensor([[0.6, 0.8]]))


# -- words and errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threat("l3", 0.1), r"unknown norm 'l3'.*Known: l1, l2, linf"),
        (lambda: Threat("Linf", 0.1), r"unknown norm 'Linf'.*Did you mean 'linf'"),
        (lambda: Threat(2, 0.1), r"unknown norm '2'"),
        (lambda: Threat("l2", 0.0), r"eps must be a positive finite number, got 0.0"),
        (lambda: Threat("l2", -1), r"eps must be .* got -1"),
        (lambda: Threat("l2", math.inf), r"eps must be .* got inf"),
        (lambda: Threat("l2", math.nan), r"eps must be .* got nan"),
        (lambda: Threat("l2", "8/255"), r"eps must be .* got '8/255'"),
        (lambda: Threat("l2", 1.0, 1.0, 1.0), r"box of pixels is empty: lo=1.0 is not below hi=1.0"),
        (lambda: Threat("l2", 1.0, 1.0, 0.0), r"box of pixels is empty"),
        (lambda: Threat("l2", 1.0, math.nan, 1.0), r"lo, an edge of the box of pixels, must be a finite number"),
        (lambda: Threat.parse("linf"), r"cannot read the threat 'linf': expected norm:eps"),
        (lambda: Threat.parse("linf:"), r"cannot read the threat"),
        (lambda: Threat.parse("linf:eight"), r"cannot read the threat"),
        (lambda: Threat.parse("linf:1/0"), r"cannot read the threat"),
        (lambda: Threat.parse("linf:0.1:0.2"), r"cannot read the threat"),
        (lambda: Threat.parse("linf:nan"), r"cannot read the threat"),
        (lambda: Threat.parse("linf:-0.1"), r"eps must be"),
        (lambda: Threat.parse("0.1"), r"cannot read the threat"),
        (lambda: Threat.parse("l7:0.1"), r"unknown norm 'l7'"),
        (lambda: Threat.parse("linf:1e400"), r"eps must be|cannot read the threat"),
    ],
)
def test_errors_say_what_was_wrong(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "threat"),
    [
        ("linf:8/255", Threat("linf", 8 / 255)),
        ("l2:0.5", Threat("l2", 0.5)),
        (" L1 : 12 ", Threat("l1", 12.0)),
        ("linf:1e-2", Threat("linf", 0.01)),
    ],
)
def test_parse_reads_what_people_write(text, threat):
    assert Threat.parse(text) == threat


def test_threats_are_values():
    threat = Threat("linf", 8 / 255)
    assert str(threat) == "linf 8/255"
    assert threat.describe() == {"norm": "linf", "eps": 8 / 255, "lo": 0.0, "hi": 1.0}
    assert Threat(**threat.describe()) == threat
    assert len({threat, Threat("linf", 8 / 255), Threat("l2", 8 / 255)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 1.0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_nothing_that_is_forgiven_lies_farther_than_farthest(norm):
    """Proofs are about the points that ``violation`` passes, measured in float64."""
    threat, x = Threat(norm, {"linf": 0.1, "l2": 1.5, "l1": 10.0}[norm]), torch.rand(200, 1, 28, 28)
    stretch = torch.linspace(1 - 1e-5, 1 + 1e-4, 200).view(-1, 1, 1, 1)
    at_the_edge = threat.project(x + torch.randn_like(x), x)
    x_adv = (x + stretch * (at_the_edge - x)).clamp(0, 1)
    passed = threat.violation(x_adv, x) == 0
    assert passed.any()
    assert (threat.size(x_adv.double() - x.double())[passed] <= threat.farthest(784)).all()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(["linf", "l2", "l1"]), st.floats(-1.5, 1.5))
def test_to_plane_is_the_smallest_one_in_the_box(seed, norm, share):
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
def test_to_plane_survives_any_scale_and_no_slope(norm, scale):
    x, threat = torch.zeros(2, 3), Threat(norm, 1.0, -9, 9)
    slope = torch.tensor([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0]])
    r = threat.to_plane(x, slope * scale, torch.tensor([2.0, 2.0]) * scale)
    assert torch.allclose((r * slope).sum(1), torch.tensor([2.0, 0.0]))
    assert (r[1] == 0).all()
