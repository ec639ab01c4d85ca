"""The identities that shape the design, each checked by hand-written arithmetic or by an exact small model."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from holdfast.bounds import s_lipschitz_pairwise
from holdfast.errors import UserError
from holdfast.information.formulas import (
    dead_zone,
    logit_differences,
    needed_log_odds,
    s_att,
    s_cert,
    s_lipschitz,
)
from holdfast.losses import arcface, cosface, isce, lgm, negative_log_odds, negative_margin, sce
from holdfast.noise import Noise
from holdfast.outputs import Outputs
from holdfast.threat import Threat

Y0 = torch.tensor([0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def batch(seed=0, n=8, k=5, spread=3.0):
    return spread * randn(n, k, seed=seed), torch.randint(k, (n,), generator=generator(seed + 1))


def one_hot(y, k):
    return F.one_hot(y, k).double()  # a number times int64 would be float32


def relu_net(seed=0, d=8, width=16, k=5):
    weights = [randn(width, d, seed=seed) / 2, randn(width, seed=seed + 1), randn(k, width, seed=seed + 2) / 2]
    return lambda x: (x @ weights[0].to(x.dtype).T + weights[1].to(x.dtype)).relu() @ weights[2].to(x.dtype).T


# -- what a constant s means


@given(st.integers(0, 10_000), st.floats(0, 60), st.floats(0.001, 0.999))
def test_the_expected_interval_moves_up_by_s(seed, s, probability):
    """Set z_y at the needed gap above the others: the training-time probability is then exactly what was asked for."""
    z, y = batch(seed)
    others = torch.logsumexp(z.scatter(1, y[:, None], -math.inf), 1)
    z = z.scatter(1, y[:, None], (others + needed_log_odds(probability, s))[:, None])
    shifted = z - s * one_hot(y, z.shape[1])
    p = torch.softmax(shifted, 1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(p, torch.full_like(p, probability))
    torch.testing.assert_close(isce(z, y, s=s), torch.full_like(p, -math.log(probability)))
    assert needed_log_odds(probability, s) - needed_log_odds(probability) == pytest.approx(s)


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_a_probability_lies_between_its_bounds(probability):
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        needed_log_odds(probability)


@given(st.integers(0, 10_000), st.floats(0, 60))
def test_isce_is_cross_entropy_of_logits_with_the_true_one_lowered(seed, s):
    z, y = batch(seed)
    literal = F.cross_entropy(z - s * one_hot(y, z.shape[1]), y, reduction="none")
    torch.testing.assert_close(isce(z, y, s=s), literal, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 10_000))
def test_isce_with_a_logit_box_is_the_worst_sce_in_it(seed):
    """max over |delta_k| <= r of CE(z + delta) = I-SCE(2 r), also by following the gradient into the corner."""
    z, y = batch(seed, k=4)
    delta = torch.zeros_like(z, requires_grad=True)
    (grad,) = torch.autograd.grad(F.cross_entropy(z + delta, y, reduction="sum"), delta)
    reached = F.cross_entropy(z + 1.5 * grad.sign(), y, reduction="none")
    torch.testing.assert_close(reached, isce(z, y, s=3.0), rtol=1e-10, atol=1e-12)


# -- the losses that I-SCE contains


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(1, 64))
def test_cosface_is_isce_with_s_of_scale_times_m(seed, m, scale):
    cos, y = batch(seed)
    cos = cos.tanh()
    lowered = scale * (cos - m * one_hot(y, cos.shape[1]))
    literal = F.cross_entropy(lowered, y, reduction="none")
    torch.testing.assert_close(isce(scale * cos, y, s=scale * m), literal, rtol=1e-9, atol=1e-11)
    assert torch.equal(cosface(scale * cos, y, m=m, scale=scale), isce(scale * cos, y, s=scale * m))


@given(st.integers(0, 10_000), st.floats(0, 1.5), st.floats(1, 64))
def test_arcface_is_isce_with_an_s_of_each_sample(seed, m, scale):
    angle = math.pi * torch.rand(8, 5, generator=generator(seed), dtype=torch.float64) * 0.98 + 0.01
    y = torch.randint(5, (8,), generator=generator(seed + 1))
    own = angle.gather(1, y[:, None])
    turned = torch.where(own < math.pi - m, (own + m).cos(), own.cos() - m * math.sin(m))
    s = scale * (own.cos() - turned)
    torch.testing.assert_close(
        arcface(scale * angle.cos(), y, m=m, scale=scale), isce(scale * angle.cos(), y, s=s), rtol=1e-8, atol=1e-10
    )
    assert (s >= 0).all()  # a margin, never a discount


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_lgm_is_isce_with_s_a_share_of_the_own_distance_plus_the_likelihood(seed, ratio, weight):
    distance, y = batch(seed)
    d, halflog = distance.square() / 2, 0.3 * randn(1, 5, seed=seed + 2)
    out = Outputs(-d - halflog, None, 2 * d)
    own, own_log = d.gather(1, y[:, None]), halflog.expand_as(d).gather(1, y[:, None])[:, 0]
    grown = -d * (1 + ratio * one_hot(y, 5)) - halflog
    literal = F.cross_entropy(grown, y, reduction="none") + weight * (own[:, 0] + own_log)
    torch.testing.assert_close(lgm(out, y, ratio=ratio, weight=weight), literal, rtol=1e-9, atol=1e-10)
    as_isce = isce(-d - halflog, y, s=ratio * own) + weight * (own[:, 0] + own_log)
    torch.testing.assert_close(as_isce, literal, rtol=1e-9, atol=1e-10)


@given(st.integers(0, 10_000), st.floats(-2, 2))
def test_measured_information_is_adversarial_training(seed, magnitude):
    z, y = batch(seed)
    z_adv = z + 10**magnitude * randn(*z.shape, seed=seed + 7)
    s = s_att(z, z_adv, y)
    assert (s.gather(1, y[:, None]) == 0).all()
    difference = isce(z, y, s=s) - F.cross_entropy(z_adv, y, reduction="none")
    assert difference.abs().max() <= 1e-12 * (1 + z_adv.abs().max())


@given(st.integers(0, 10_000))
def test_gaps_are_zero_at_the_label_and_negative_where_right(seed):
    z, y = batch(seed)
    found = logit_differences(z, y)
    for i, label in enumerate(y.tolist()):
        assert found[i].tolist() == pytest.approx([value - z[i, label].item() for value in z[i].tolist()])
    worst = found.scatter(1, y[:, None], -math.inf).amax(1)
    torch.testing.assert_close(worst, negative_margin(z, y))


# -- guessed, bounded, measured: the bracket of a linear model, where the worst case is known


class Linear:
    """z = x W' + b under |x_adv - x| <= eps in linf: the worst rise of gap_j is eps ||w_j - w_y||_1 exactly."""

    def __init__(self, seed=0, d=5, k=4, eps=0.3):
        self.w, self.b, self.eps, self.d, self.k = randn(k, d, seed=seed), randn(k, seed=seed + 1), eps, d, k
        self.x = 3 * randn(6, d, seed=seed + 2)
        self.y = torch.randint(k, (6,), generator=generator(seed + 3))
        self.corners = torch.tensor(list(itertools.product([-eps, eps], repeat=d)), dtype=torch.float64)

    def __call__(self, x):
        return x @ self.w.T + self.b

    @property
    def exact(self):
        return self.eps * (self.w[None] - self.w[self.y][:, None]).abs().sum(2)

    @property
    def interval(self):
        """Each logit bounded apart, as interval propagation does: eps (||w_j||_1 + ||w_y||_1)."""
        sizes = self.w.abs().sum(1)
        apart = self.eps * (sizes[None] + sizes[self.y][:, None])
        return apart.scatter(1, self.y[:, None], 0.0)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_bounded_information_gives_the_interval_bound_of_the_worst_loss(k, seed):
    model = Linear(seed, k=k)
    z = model(model.x)
    upper = logit_differences(z, model.y) + model.exact
    loss = isce(z, model.y, s=s_cert(z, upper, model.y))
    others = upper.scatter(1, model.y[:, None], -math.inf)
    literal = torch.log1p(torch.exp(others).sum(1))  # log(1 + sum_{j != y} e^{upper_j})
    torch.testing.assert_close(loss, literal, rtol=1e-11, atol=1e-12)
    worst = torch.stack([sce(model(model.x + corner), model.y) for corner in model.corners]).amax(0)
    assert (worst <= loss + 1e-12).all()
    if k == 2:  # one competitor: no corner is asked to serve two masters
        torch.testing.assert_close(worst, loss, rtol=1e-11, atol=1e-12)
    else:
        assert (worst < loss - 1e-6).any()


@pytest.mark.parametrize("seed", range(6))
def test_attack_truth_and_bound_stand_in_this_order(seed):
    model = Linear(seed)
    z = model(model.x)
    x_adv = model.x.clone()
    for _ in range(5):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(negative_log_odds(model(x_adv), model.y).sum(), x_adv)
        x_adv = model.x + (x_adv.detach() + 0.1 * grad.sign() - model.x).clamp(-model.eps, model.eps)
    s_attack = s_att(z, model(x_adv), model.y)
    s_bound = s_cert(z, logit_differences(z, model.y) + model.interval, model.y)
    truth = torch.stack([s_att(z, model(model.x + corner), model.y) for corner in model.corners]).amax(0)
    torch.testing.assert_close(truth, model.exact, rtol=1e-10, atol=1e-10)
    assert (s_attack <= truth + 1e-10).all()
    assert (truth <= s_bound + 1e-10).all()
    assert (s_attack < truth - 1e-3).any()  # one attack is not the worst case of every competitor at once
    assert (truth < s_bound - 1e-3).any()
    for s in (s_attack, truth, s_bound):
        assert (s.gather(1, model.y[:, None]).abs() < 1e-12).all()
    losses = [isce(z, model.y, s=s) for s in (s_attack, truth, s_bound)]
    assert (losses[0] <= losses[1] + 1e-12).all()
    assert (losses[1] <= losses[2] + 1e-12).all()


# -- one direction for every s


def sign_gradient(loss, model, x, y):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(model(x), y).sum(), x)
    return grad


LOSSES_OF_ONE_DIRECTION = {
    "torch": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "sce": sce,
    **{f"isce {s}": lambda z, y, s=s: isce(z, y, s=s) for s in (0.0, 0.5, 1.0, 10.0, 100.0, 300.0)},
}


@pytest.mark.parametrize("name", LOSSES_OF_ONE_DIRECTION)
@pytest.mark.parametrize("seed", range(3))
def test_pgd_on_any_s_is_pgd_on_sce_and_on_the_gap(name, seed):
    """In float64: grad I-SCE(s) = sigmoid(u + s) grad u, so sign and unit gradients agree, step after step."""
    model, loss = relu_net(seed), LOSSES_OF_ONE_DIRECTION[name]
    x = torch.rand(10, 8, generator=generator(seed), dtype=torch.float64)
    y = torch.randint(5, (10,), generator=generator(seed + 1))
    ours, theirs = x.clone(), x.clone()
    for _ in range(6):
        mine, other = sign_gradient(loss, model, ours, y), sign_gradient(negative_log_odds, model, theirs, y)
        cosine = (F.normalize(mine, dim=1, eps=1e-300) * F.normalize(other, dim=1, eps=1e-300)).sum(1)
        assert (cosine > 1 - 1e-9).all()
        ours = x + (ours + 0.03 * mine.sign() - x).clamp(-0.1, 0.1)
        theirs = x + (theirs + 0.03 * other.sign() - x).clamp(-0.1, 0.1)
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, x)
    if name.startswith("isce"):
        u, s = negative_log_odds(model(x), y), float(name.split()[1])
        factor = torch.sigmoid(u + s)[:, None]
        torch.testing.assert_close(
            sign_gradient(loss, model, x, y),
            factor * sign_gradient(negative_log_odds, model, x, y),
            rtol=1e-9,
            atol=1e-12,
        )


def test_in_float32_the_fused_cross_entropy_loses_the_true_logit_and_the_gap_does_not():
    z = torch.zeros(50, 10)
    z[:, 0] = torch.linspace(24, 27, 50)
    y = torch.zeros(50).long()

    def own(loss):
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, y).sum(), leaf)[0][:, 0]

    assert (own(lambda z, y: F.cross_entropy(z, y, reduction="none")) == 0).all()
    assert (own(negative_log_odds) == -1).all()
    expected = -9 * torch.exp(-z[:, 0].double()) / (1 + 9 * torch.exp(-z[:, 0].double()))
    torch.testing.assert_close(own(sce).double(), expected, rtol=1e-5, atol=0)
    in_double = z.double().requires_grad_()  # the fused one is right where there are digits enough
    (right,) = torch.autograd.grad(F.cross_entropy(in_double, y, reduction="sum"), in_double)
    torch.testing.assert_close(right[:, 0], expected, rtol=1e-4, atol=0)


def test_the_lost_true_logit_turns_the_input_gradient():
    model = relu_net(3)
    x = torch.rand(200, 8, generator=generator(0), dtype=torch.float64)
    y = model(x).argmax(1)
    scale = 25 / -negative_margin(model(x), y)  # every margin becomes 25

    def direction(loss, dtype):
        grad = sign_gradient(lambda z, y: loss(z * scale[:, None].to(dtype), y), model, x.to(dtype), y)
        return F.normalize(grad.double(), dim=1, eps=1e-300)

    fused = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    truth = direction(negative_log_odds, torch.float64)
    assert (direction(fused, torch.float64) * truth).sum(1).min() > 1 - 1e-6
    assert (direction(sce, torch.float32) * truth).sum(1).min() > 0.999
    assert (direction(negative_log_odds, torch.float32) * truth).sum(1).min() > 0.999
    assert (direction(fused, torch.float32) * truth).sum(1).median() < 0.95


# -- the dead zone


def last_alive(alive, low=0.0, high=2000.0):
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if alive(middle) else (low, middle)
    return low


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("competitors", [1, 9])
def test_the_dead_zone_is_where_the_fused_cross_entropy_dies(dtype, competitors):
    def gradient(margin):
        z = torch.zeros(1, competitors + 1, dtype=dtype)
        z[0, 0] = margin
        z.requires_grad_()
        return torch.autograd.grad(F.cross_entropy(z, Y0), z)[0][0]

    own, everything = dead_zone(dtype, competitors)
    # Several tiny terms are summed in an order that depends on the machine: each may be lost alone, or all together.
    found = last_alive(lambda m: bool(gradient(m)[0] != 0))
    room = 0.01 + torch.finfo(dtype).eps * own  # margins themselves are rounded
    assert dead_zone(dtype, 1)[0] - room <= found <= own + room
    died = last_alive(lambda m: bool((gradient(m) != 0).any()))
    assert died == pytest.approx(everything, abs=0.01 + torch.finfo(dtype).eps * everything)
    assert own < everything
    assert (gradient(math.ceil(everything) + 1) == 0).all()
    z = torch.zeros(1, competitors + 1, dtype=dtype)
    z[0, 0] = math.ceil(everything) + 1
    z.requires_grad_()
    assert torch.autograd.grad(negative_log_odds(z, Y0).sum(), z)[0][0, 0] == -1


def test_more_competitors_keep_the_true_logit_alive_longer():
    assert dead_zone(torch.float32, 9)[0] == pytest.approx(dead_zone(torch.float32)[0] + math.log(9))
    assert dead_zone(torch.float32)[0] == pytest.approx(24 * math.log(2))
    assert dead_zone(torch.float32)[1] == pytest.approx(150 * math.log(2))


# -- Lipschitz information


def spectral_product(weights):
    return math.prod(np.linalg.norm(w.numpy(), 2) for w in weights)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_no_gap_rises_by_more_than_sqrt2_l_eps_in_an_l2_ball(seed, eps):
    weights = [randn(12, 6, seed=seed), randn(12, 12, seed=seed + 1) / 3, randn(4, 12, seed=seed + 2)]

    def model(x):
        return ((x @ weights[0].T).relu() @ weights[1].T).relu() @ weights[2].T

    s = s_lipschitz(spectral_product(weights), eps)
    x = randn(20, 6, seed=seed + 3)
    y = torch.randint(4, (20,), generator=generator(seed))
    threat = Threat("l2", eps, -100.0, 100.0)
    z, highest = model(x), torch.zeros(())
    for start in range(4):
        x_adv = threat.random_start(x, Noise(start, torch.arange(20)))
        for _ in range(8):
            direction = threat.ascent(sign_gradient(negative_log_odds, model, x_adv, y))
            x_adv = threat.project(x_adv + eps / 2 * direction, x)
            rise = s_att(z, model(x_adv), y)
            assert rise.max() <= s
            assert (sce(model(x_adv), y) <= isce(z, y, s=s) + 1e-12).all()
            highest = torch.maximum(highest, rise.max())
    assert highest > s / 50  # not by a bound that holds of anything


def test_sqrt2_l_eps_is_reached_by_opposite_orthogonal_rows():
    """z = x on two coordinates, L = 1: moving along (-1, 1) / sqrt 2 raises the gap by sqrt 2 eps."""
    x, eps = torch.tensor([[0.6, 0.1]], dtype=torch.float64), 0.2
    x_adv = x + eps * torch.tensor([[-1.0, 1.0]]).double() / math.sqrt(2)
    assert s_att(x, x_adv, Y0)[0, 1].item() == pytest.approx(s_lipschitz(1.0, eps))


def test_an_l2_constant_is_a_false_certificate_for_linf():
    d, eps = 100, 0.1
    w = torch.stack([torch.ones(d), -torch.ones(d)]).double() / math.sqrt(2 * d)  # L2 constant 1
    constant = np.linalg.norm(w.numpy(), 2)
    assert constant == pytest.approx(1)
    x = torch.full((1, d), 0.5, dtype=torch.float64) * w[0].sign() * 0.2
    z = x @ w.T
    margin = -negative_margin(z, Y0).item()
    assert margin > s_lipschitz(constant, eps)  # "certified"
    x_adv = x - eps * w[0].sign() * 1.0001
    assert Threat("linf", 1.01 * eps, -9.0, 9.0).violation(x_adv, x).item() == 0
    assert (x_adv @ w.T).argmax(1).item() == 1  # and wrong
    rise = s_att(z, x_adv @ w.T, Y0).max().item()
    assert rise > s_lipschitz(constant, 1.01 * eps)
    assert rise <= s_lipschitz(math.sqrt(d) * constant, 1.01 * eps)  # the linf -> l2 constant holds


@pytest.mark.parametrize("seed", range(5))
def test_pairwise_information_is_tight_for_a_linear_model(seed):
    w, eps = randn(5, 7, seed=seed), 0.4
    y = torch.arange(5)
    x = randn(5, 7, seed=seed + 1)
    s = s_lipschitz_pairwise(1.0, eps, w, y)
    assert s.shape == (5, 5)
    assert (s.diagonal() == 0).all()
    for i, j in itertools.permutations(range(5), 2):
        direction = (w[j] - w[i]) / (w[j] - w[i]).norm()
        reached = s_att(x[[i]] @ w.T, (x[[i]] + eps * direction) @ w.T, y[[i]])[0, j]
        assert reached.item() == pytest.approx(s[i, j].item(), rel=1e-12)
    random = Threat("l2", eps, -9.0, 9.0).random_start(x.expand(40, 5, 7).reshape(200, 7), Noise(0, torch.arange(200)))
    rise = s_att(x.repeat(40, 1) @ w.T, random @ w.T, y.repeat(40))
    assert (rise <= s.repeat(40, 1) + 1e-12).all()
    assert (s <= s_lipschitz(np.linalg.norm(w.numpy(), 2), eps) + 1e-12).all()
    torch.testing.assert_close(s_lipschitz_pairwise(3.0, eps, w, y), 3 * s)


def test_rows_of_unit_size_do_not_make_margin_over_sqrt2_a_certificate():
    """w_0 = -w_1: unit rows, not orthogonal. The gap moves by 2 eps, not by sqrt 2 eps."""
    w, eps = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), 0.7
    x = torch.tensor([[0.6, 0.0]], dtype=torch.float64)
    margin = -negative_margin(x @ w.T, Y0).item()
    assert margin / math.sqrt(2) > eps
    x_adv = x - torch.tensor([[0.65, 0.0]]).double()
    assert (x_adv - x).norm() < eps
    assert (x_adv @ w.T).argmax(1).item() == 1
    pairwise = s_lipschitz_pairwise(1.0, eps, w, Y0)
    assert pairwise.tolist() == [[0.0, pytest.approx(1.4)]]
    assert (logit_differences(x @ w.T, Y0) + pairwise).max() > 0  # which rightly refuses
    orthonormal = s_lipschitz_pairwise(1.0, eps, torch.eye(2).double(), Y0)
    assert orthonormal[0, 1].item() == pytest.approx(s_lipschitz(1.0, eps))


@pytest.mark.parametrize(("constant", "eps"), [(-1.0, 0.1), (1.0, -0.1), (math.nan, 0.1)])
def test_lipschitz_constants_are_not_negative(constant, eps):
    with pytest.raises(UserError, match="must be >= 0"):
        s_lipschitz(constant, eps)
