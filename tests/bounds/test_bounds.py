"""Bounds: no attack finds anything above them, no certificate is broken, closed forms are met where there are some."""

from __future__ import annotations

import importlib
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bounds.helpers import attacked_margins
from torch import nn

from holdfast.attacks import pgd
from holdfast.bounds import (
    CannotBound,
    box_of,
    certify,
    cheaply_proved,
    interval_growth,
    l2_radius,
    ladder,
    lipschitz_constant,
    lipschitz_s,
    logit_difference_bounds,
    worst_logit_difference,
)
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.information.formulas import logit_differences
from holdfast.losses import negative_margin
from holdfast.models import build
from holdfast.models.orthogonal import OrthogonalLinear
from holdfast.noise import Noise
from holdfast.threat import Threat

CHAINS = ["linear", "mlp", "smallconv", "convnet", "stepnet", "madry", "smallcnn", "lipmlp", "lipconv"]
N = 12


def network(name, seed=0, classes=5):
    side = 28 if name in ("madry", "smallcnn", "convnet", "stepnet") else 8
    head = "orthogonal" if name.startswith("lip") else "linear"
    model = build(
        name, (1, side, side), classes, head=head, mean=torch.tensor([0.2]), std=torch.tensor([0.5]), seed=seed
    )
    x = torch.rand(N, 1, side, side, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = model.eval()(x).logits.argmax(1)
    return model, x, y


@pytest.mark.parametrize("name", CHAINS)
def test_nothing_in_the_box_lies_above_the_bound(name):
    model, x, y = network(name)
    for eps in (0.001, 0.03):
        threat = Threat("linf", eps)
        lo, hi = box_of(x, threat)
        bound = logit_difference_bounds(model, lo.double(), hi.double(), y)
        assert torch.equal(bound.gather(1, y[:, None]), torch.zeros(N, 1, dtype=torch.float64))
        found = [x] + [threat.random_start(x, Noise(i, torch.arange(N))) for i in range(3)]
        for t in range(5):
            target = (y + 1 + t) % 5
            found.append(pgd(model, x, y, threat, score=negative_margin, noise=Noise(0, torch.arange(N)), steps=5,
                             target=target, iterate="last"))  # fmt: skip
        with torch.no_grad():
            worst = torch.stack([logit_differences(model(one).logits, y) for one in found]).amax(0)
        assert (worst <= bound + 1e-5).all()
        proved = worst_logit_difference(model, x, y, threat)
        assert (worst.scatter(1, y[:, None], -torch.inf).amax(1) <= proved).all(), "rounding included"


NORMS = {"linf": 0.002, "l2": 0.05, "l1": 0.05}


@pytest.mark.parametrize(
    ("name", "norm"),
    [*itertools.product(("mlp", "smallconv", "lipmlp"), NORMS), ("linear", "l2"), ("lipconv", "l1"),
     *zip(("convnet", "stepnet", "madry", "smallcnn"), ("linf", "l2", "linf", "l1"), strict=True)],
)  # fmt: skip
def test_no_certified_sample_is_broken(name, norm):
    model, x, y = (part[:6] if isinstance(part, torch.Tensor) else part for part in network(name))
    threat = Threat(norm, NORMS[norm])
    proved = cheaply_proved(model, x, y, threat)
    assert proved is not None
    assert proved.dtype == torch.bool
    for seed in range(2):
        x_adv = pgd(model, x, y, threat, score=negative_margin,
                    noise=Noise(seed, torch.arange(6)), steps=10)  # fmt: skip
        with torch.no_grad():
            assert not (proved & (model(x_adv).logits.argmax(1) != y)).any()


@given(seed=st.integers(0, 50), eps=st.floats(1e-4, 0.3))
@settings(max_examples=25, deadline=None)
def test_a_linear_model_is_certified_up_to_its_own_boundary(seed, eps):
    """The truth is known: the margin over the dual norm of the difference of two rows."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    x, y = torch.rand(20, 1, 2, 3), torch.arange(20) % 3
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    z = x.flatten(1).double() @ weight.T + bias
    for norm, dual in (("linf", 1), ("l2", 2)):
        apart = (weight[None] - weight[:, None]).norm(p=dual, dim=2)[y]
        distance = (-logit_differences(z, y) / apart.clamp_min(1e-12)).scatter(1, y[:, None], math.inf).amin(1)
        proved = cheaply_proved(model, x, y, Threat(norm, eps, -9, 9))
        assert torch.equal(proved, distance > eps) or ((distance - eps).abs()[proved != (distance > eps)] < 1e-4).all()
        assert not (proved & (distance <= eps)).any()


def test_the_bound_grows_with_the_box_and_is_differentiable():
    model, x, y = network("smallconv")
    small, large = (logit_difference_bounds(model, *box_of(x, Threat("linf", eps)), y) for eps in (0.01, 0.02))
    assert (large >= small - 1e-6).all()
    large.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    point = logit_difference_bounds(model, x, x, y)
    assert torch.allclose(point, logit_differences(model(x).logits, y), atol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_the_lipschitz_constant_holds_and_training_estimates_it_from_below(name):
    model, x, _ = network(name)
    proved = float(lipschitz_constant(model, tuple(x.shape[1:]), proved=True).detach())
    with torch.no_grad():
        h = model(x).features
        rates = (h[1:] - h[:-1]).norm(dim=1) / (x[1:] - x[:-1]).flatten(1).norm(dim=1)
    assert float(rates.max()) <= proved * (1 + 1e-5)
    guess = float(lipschitz_constant(model, tuple(x.shape[1:])).detach())
    assert 0.5 * proved < guess <= proved * (1 + 1e-4) or name in ("madry", "smallcnn")
    assert guess <= proved * (1 + 1e-4)


def test_rises_are_pairwise_and_an_linf_ball_is_as_wide_as_its_corners():
    model, _, y = network("lipmlp")
    rises = lipschitz_s(model, (1, 8, 8), Threat("l2", 0.5), y)
    expected = math.sqrt(2) * 0.5 / 0.5  # 1-Lipschitz behind pixels / 0.5, orthonormal rows
    assert torch.allclose(rises, torch.full_like(rises, expected).scatter(1, y[:, None], 0.0), atol=1e-4)
    assert l2_radius(Threat("linf", 0.1), 64) == pytest.approx(0.8)
    assert torch.allclose(lipschitz_s(model, (1, 8, 8), Threat("linf", 0.5), y), 8 * rises, atol=1e-3)


def test_logit_scale_and_batch_norm_count():
    model, x, y = network("smallconv")
    before = logit_difference_bounds(model, *box_of(x, Threat("linf", 0.01)), y)
    model.logit_scale = 7.0
    assert torch.allclose(
        logit_difference_bounds(model, *box_of(x, Threat("linf", 0.01)), y), 7 * before, rtol=1e-4, atol=1e-4
    )
    normed = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
                           nn.Linear(64, 3))  # fmt: skip
    normed(x)  # its statistics move
    normed.eval()
    y = normed(x).argmax(1)
    assert torch.allclose(logit_difference_bounds(normed, x, x, y), logit_differences(normed(x), y), atol=1e-5)
    assert cheaply_proved(normed, x, y, Threat("linf", 1e-5)).any()


@pytest.mark.parametrize("name", ["preactresnet8", "resnet:depth=8"])
def test_residual_networks_are_bounded_too(name):
    """By their graph: no attack is above the bound, and at a small eps something is proved."""
    model = build(name, (3, 16, 16), 3).eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).logits.argmax(1)
    small = Threat("linf", 1e-6)
    assert cheaply_proved(model, x, y, small).any() or name != "preactresnet8"
    assert not cheaply_proved(model, x, (y + 1) % 3, small).any()
    for threat in (small, Threat("linf", 2 / 255)):
        found = certify(model, Data(x, y, torch.arange(2)), threat, method="linear")
        assert (found.bound <= attacked_margins(model, x, y, threat)).all()
    bounds = logit_difference_bounds(model, (x - 1e-6).clamp(0, 1), (x + 1e-6).clamp(0, 1), y)
    assert (-bounds.scatter(1, y[:, None], -math.inf).amax(1) <= attacked_margins(model, x, y, small) + 1e-4).all()


def test_a_network_that_was_changed_is_read_again():
    """A setting, a hook or a replaced forward changes the bounds of a network that is no chain."""
    model = build("resnet:depth=8", (3, 16, 16), 3).eval().requires_grad_(False)
    x, y = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0])

    def agree():
        logits = model(x).logits
        assert torch.allclose(logit_difference_bounds(model, x, x, y), logits - logits[:, :1], rtol=1e-3, atol=1e-4)

    agree()
    model.logit_scale = 7.0
    agree()
    handle = model.backbone.register_forward_hook(lambda module, x, out: 2 * out)
    agree()
    handle.remove()
    agree()
    model.head.linear.forward = lambda h: -2 * h[:, :3]
    agree()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.LeakyReLU(0.1)])
def test_lines_over_intervals_hold_are_tighter_than_intervals_and_have_a_gradient(activation):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), activation, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 8), activation,
        nn.Linear(8, 4),
    )  # fmt: skip
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 4
    for eps in (0.02, 0.2):
        threat = Threat("linf", eps)
        boxes, lines = (
            logit_difference_bounds(net, *box_of(x, threat), y, method=method) for method in ("interval", "crown")
        )
        assert torch.equal(lines.gather(1, y[:, None]), torch.zeros(6, 1))
        worst = -attacked_margins(net, x, y, threat)
        assert (worst <= lines.scatter(1, y[:, None], -math.inf).amax(1) + 1e-5).all()
        points = (x + eps * (2 * torch.rand(200, *x.shape) - 1)).clamp(0, 1)
        rises = logit_differences(net(points.flatten(0, 1)), y.repeat(200)).view(200, 6, 4).amax(0)
        assert (rises <= lines + 1e-5).all()
        assert lines.sum() < boxes.sum()
        grads = torch.autograd.grad(lines.sum(), list(net.parameters()))
        assert all(grad.isfinite().all() for grad in grads)
        assert all(grad.abs().any() for grad in grads[:-1])


def test_lines_over_a_box_without_width_have_a_gradient():
    """A ReLU of exactly zero: hi - lo divides nothing."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    bounds = logit_difference_bounds(net, x, x, y, "crown")
    assert torch.allclose(bounds, logit_differences(net(x), y), atol=1e-6)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(bounds.sum(), list(net.parameters())))
    with pytest.raises(UserError, match="method"):
        logit_difference_bounds(net, x, x, y, "crwon")


def test_intervals_are_those_of_the_classic_formula_and_so_are_their_gradients():
    """center' = W center + b and radius' = |W| radius, written by hand."""
    torch.manual_seed(0)
    conv, dense, last = nn.Conv2d(1, 3, 3, stride=2), nn.Linear(27, 6), nn.Linear(6, 4)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), dense, nn.ReLU(), nn.Dropout(0.5), last)
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5) % 4
    lo, hi = box_of(x, Threat("linf", 0.1))
    center, radius = (lo + hi) / 2, (hi - lo) / 2
    center, radius = conv(center), nn.functional.conv2d(radius, conv.weight.abs(), stride=2)
    lo_1, hi_1 = (center - radius).relu().flatten(1), (center + radius).relu().flatten(1)
    center, radius = dense((lo_1 + hi_1) / 2), (hi_1 - lo_1) / 2 @ dense.weight.abs().T
    lo_2, hi_2 = (center - radius).relu(), (center + radius).relu()
    rows = last.weight - last.weight[y][:, None]
    spread = (rows.abs() @ ((hi_2 - lo_2) / 2)[..., None])[..., 0]
    expected = logit_differences(last((lo_2 + hi_2) / 2), y) + spread
    found = logit_difference_bounds(net, lo, hi, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-6)
    weights = torch.rand(5, 4)
    grads = [torch.autograd.grad((weights * out).sum(), list(net.parameters())) for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=6e-6)


@pytest.mark.parametrize("method", ["interval", "crown"])
def test_bounds_for_training_are_float32_whatever_the_mode_of_the_caller(method):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    expected = logit_difference_bounds(net, x, x + 0.1, y, method)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)):
        with mode():
            found = logit_difference_bounds(net, x, x + 0.1, y, method)
        assert torch.equal(found, expected)
        assert found.requires_grad == (found.grad_fn is not None) == isinstance(mode, partial)
    twice = logit_difference_bounds(net.double(), x.double(), x.double() + 0.1, y, method)
    assert twice.dtype == torch.float64
    assert torch.allclose(twice.float(), expected, atol=1e-5)
    assert logit_difference_bounds(net.float(), x[:0], x[:0], y[:0], method).shape == (0, 3)


def test_weights_that_were_frozen_when_the_network_was_read_count_later():
    """An orthogonal layer keeps its matrix while it is frozen: its bounds are those of the weights of the moment."""
    net = nn.Sequential(nn.Flatten(), OrthogonalLinear(4, 3)).requires_grad_(False)
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    for factor in (1, 1, 1, 3):
        net[1].free.mul_(factor)
        bounds = logit_difference_bounds(net, x, x, y)
        assert torch.allclose(bounds, logit_differences(net(x), y), atol=1e-6)
        assert not net[1].free.requires_grad
    net.requires_grad_(True)
    logit_difference_bounds(net, x, x + 0.1, y).sum().backward()
    assert net[1].free.grad.abs().any()


class Mixing(nn.Module):
    """Operators that take the first dimension for something else than a batch, beside ones that do not."""

    def forward(self, x):
        one = x[0]  # (2, 3, 3): no dimension of one image
        swapped = x.transpose(0, 1).amax((0, 2, 3), keepdim=False)  # over the channels of one image
        h = torch.cat([x.flatten(1), one.reshape(1, -1) * 2, swapped.reshape(1, -1)], 1)
        return torch.cat([h[:, :5].clamp(0.2, 0.7), h[:, 5:].mean(1, keepdim=True), h.max().reshape(1, 1)], 1)


def test_a_batch_is_bounded_as_its_images_are_one_by_one():
    net, x, y = Mixing(), torch.rand(5, 2, 3, 3), torch.arange(5)
    together = logit_difference_bounds(net, x - 0.1, x + 0.1, y)
    one_by_one = [
        logit_difference_bounds(net, a - 0.1, a + 0.1, b) for a, b in zip(x.split(1), y.split(1), strict=True)
    ]
    assert torch.allclose(together, torch.cat(one_by_one), atol=1e-6)
    points = [a - 0.1 + 0.2 * torch.rand_like(a) for a in x.split(1) for _ in range(20)]
    found = torch.cat([net(point) for point in points]).view(5, 20, 7)
    assert ((found - found.gather(2, y.view(5, 1, 1).expand(5, 20, 1))) <= together[:, None] + 1e-6).all()


def test_a_hook_that_lies_in_memory_where_another_one_lay_is_another_hook():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    for factor in range(1, 9):
        handle = net.register_forward_hook(lambda module, x, out, factor=factor: factor * out)
        bounds = logit_difference_bounds(net, x, x, y)
        assert torch.allclose(bounds, logit_differences(net(x), y), rtol=1e-3)
        handle.remove()


def test_a_function_has_no_certificate():
    x, y = torch.rand(2, 1, 1, 3), torch.tensor([0, 1])
    assert cheaply_proved(lambda x: x.flatten(1), x, y, Threat("linf", 0.1)) is None
    with pytest.raises(CannotBound, match="a torch module, and the model is a function"):
        certify(lambda x: x.flatten(1), Data(x, y, torch.arange(2)), Threat("linf", 0.1))


class Turning(nn.Module):
    """Honest when it is asked for the first three times."""

    def __init__(self):
        super().__init__()
        self.linear, self.asked = nn.Linear(4, 3), 0

    def forward(self, x):
        self.asked += 1
        return self.linear(x.flatten(1)) * (1 if self.asked < 4 else -1)


def test_the_bound_of_a_bracket_is_of_a_network_that_answers_as_it_was_read():
    net, x = Turning().eval(), torch.rand(6, 1, 2, 2)
    with pytest.raises(CannotBound, match="by history"):
        worst_logit_difference(net, x, net(x).argmax(1), Threat("linf", 0.01))


def test_a_misclassified_image_has_a_bound_too():
    model, x, y = network("mlp")
    wrong = (y + 1) % 5
    bound = worst_logit_difference(model, x, wrong, Threat("linf", 0.001))
    with torch.no_grad():
        margin = -negative_margin(model(x).logits, wrong).double()
    assert bound.isfinite().all()
    assert (bound >= -margin).all()
    assert (-margin > 0).all()


def test_growth_of_boxes_and_balance_of_relus_by_hand():
    """One layer: radii 0.1 -> (0.4, 0.2), centers (0.9, -0.5): 0.1 / 0.3 of width, 0.5 / 0.9 of what passes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    net[1].weight.data = torch.tensor([[4.0], [-2.0]], dtype=torch.float64)
    net[1].bias.data = torch.tensor([-1.1, 0.5], dtype=torch.float64)
    x = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    bounds, growth = interval_growth(net, x - 0.1, x + 0.1, torch.tensor([0]))
    assert torch.equal(bounds, logit_difference_bounds(net, x - 0.1, x + 0.1, torch.tensor([0])))
    by_width, by_mean = 1 - (0.1 / 0.3) / 0.5, 0.0  # 0.5 / 0.9 is beyond the tolerance
    assert growth.item() == pytest.approx(by_width + by_mean + 0.0)  # both deviations are equal
    _, strict = interval_growth(net, x - 0.1, x + 0.1, torch.tensor([0]), 1.0)
    assert strict.item() == pytest.approx((1 - 1 / 3) + (1 - 0.5 / 0.9))
    growth.backward()
    assert net[1].weight.grad.isfinite().all()


def test_a_method_that_time_cut_short_has_not_ended(monkeypatch):
    """It came back with nothing proved and "ended": more time would have proved it."""
    clock, slow = [0.0], []
    certificates = importlib.import_module("holdfast.bounds.certify")  # whose name in the package is the function
    for module in (certificates, ladder):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def linear(self, some, part, inside, until):
        slow.append(len(some))
        clock[0] += 10.0
        return part

    monkeypatch.setattr(ladder.Ladder, "linear", linear)
    net = build("mlp:width=8", (1, 4, 4), 3)
    x = torch.full((2, 1, 4, 4), 0.5)
    data = Data(x, net.eval()(x).logits.argmax(1), torch.arange(2))
    cut, whole = (certify(net, data, "linf:0.4", method="linear", seconds=seconds) for seconds in (5.0, 50.0))
    assert slow == [2, 2]
    assert not cut.proved.any()
    assert not cut.ended.any()
    assert whole.ended.all()
