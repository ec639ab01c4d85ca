"""One contract for every kind of layer: sampled inputs, the Jacobian and float32 itself stay within its bounds."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.bounds.helpers import least_margins
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from holdfast.bounds import CannotBound, certify, cheaply_proved, logit_difference_bounds
from holdfast.bounds.by_lipschitz import margins_by_lipschitz
from holdfast.bounds.chain import chain_of
from holdfast.bounds.layers import LAYERS, Normalisation, largest_singular_value, layer_of
from holdfast.bounds.rounding import gamma
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.models import build, logits_only
from holdfast.models.convnets import Step
from holdfast.models.orthogonal import MaxMin, OrthogonalConv, OrthogonalLinear
from holdfast.threat import Threat

IMAGE, FLAT = (2, 6, 7), (6,)
# Each kind in every form in which it computes something else, and the shape of its input.
CASES = {
    "linear": (nn.Linear(6, 4), FLAT),
    "linear without bias": (nn.Linear(6, 9, bias=False), FLAT),
    "linear on pixels": (nn.Linear(7, 3), IMAGE),
    "conv": (nn.Conv2d(2, 3, 3), IMAGE),
    "conv, strided, dilated, grouped, padded": (nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2), IMAGE),
    "conv, large": (nn.Conv2d(2, 3, 3, padding=1), (2, 40, 40)),
    "conv, large, strided, dilated": (nn.Conv2d(2, 3, 3, stride=2, dilation=2), (2, 50, 50)),
    "relu": (nn.ReLU(), IMAGE),
    "maxmin": (MaxMin(), IMAGE),
    "flatten": (nn.Flatten(), IMAGE),
    "max pool": (nn.MaxPool2d(2), IMAGE),
    "max pool, overlapping": (nn.MaxPool2d(3, stride=1, padding=1), IMAGE),
    "max pool, dilated": (nn.MaxPool2d(2, stride=2, dilation=2), IMAGE),
    "max pool, ceil": (nn.MaxPool2d(3, stride=2, ceil_mode=True), IMAGE),
    "average pool": (nn.AvgPool2d(2), IMAGE),
    "average pool, overlapping": (nn.AvgPool2d(3, stride=2, padding=1), IMAGE),
    "average pool, sums": (nn.AvgPool2d(2, divisor_override=1), IMAGE),
    "average pool, padding not counted": (nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), IMAGE),
    "average pool, ceil": (nn.AvgPool2d(3, stride=2, ceil_mode=True), IMAGE),
    "batch norm": (nn.BatchNorm2d(2), IMAGE),
    "batch norm without weights": (nn.BatchNorm2d(2, affine=False), IMAGE),
    "step": (Step(10.0, 0.01), IMAGE),
    "orthogonal linear": (OrthogonalLinear(6, 4), FLAT),
    "orthogonal conv": (OrthogonalConv(2, 3, 2), IMAGE),
    "normalisation": (
        build("linear", IMAGE, 2, mean=torch.tensor([0.2, 0.4]), std=torch.tensor([0.5, 0.1])), IMAGE,
    ),
}  # fmt: skip


def case(name):
    """(layer, x (4, ...) float32) of a case; parameters and statistics are none of the initial ones."""
    module, shape = CASES[name]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and name != "normalisation":
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.copy_(torch.tensor([0.3, 2.0]))
    module.eval().requires_grad_(False)
    layer = Normalisation(module) if name == "normalisation" else layer_of(module)
    return layer, torch.rand(4, *shape, generator=generator)


def forward(layer, x):
    """The layer as the network computes it."""
    return (x - layer.module.mean) / layer.module.std if isinstance(layer, Normalisation) else layer.module(x)


def jacobian(layer, x):
    """(outputs, inputs) at x (1, ...) float64."""
    return torch.autograd.functional.jacobian(layer.apply, x).reshape(-1, x.numel())


def test_every_kind_is_tried():
    assert {type(module) for module, _ in CASES.values()} >= LAYERS.keys()


@pytest.mark.parametrize("name", [name for name in CASES if "large" not in name])
def test_intervals_are_exact_for_affine_layers_and_the_corners_of_monotone_ones(name):
    layer, x = case(name)
    module = logits_only(layer.module) if name == "normalisation" else layer.module
    net, x = nn.Sequential(copy.deepcopy(module), nn.Flatten()).double(), x.double()
    lo, hi = x - 0.3 * torch.rand_like(x), x + 0.3
    y = torch.arange(4) % 2

    def differences(out):
        return out - out.gather(1, y[:, None])

    bounds = logit_difference_bounds(net, lo, hi, y)
    if isinstance(layer.module, nn.ReLU | MaxMin | nn.MaxPool2d | Step):
        expected = net(hi) - net(lo).gather(1, y[:, None])
    else:
        matrix = torch.autograd.functional.jacobian(net, x[:1]).reshape(-1, x[0].numel())
        spread = (matrix - matrix[y][:, None]).abs() @ ((hi - lo) / 2).flatten(1)[..., None]
        expected = differences(net((lo + hi) / 2)) + spread[..., 0]
    torch.testing.assert_close(bounds, expected.scatter(1, y[:, None], 0.0))
    for share in torch.rand(20, *x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype):
        assert (differences(net(lo + (hi - lo) * share)) <= bounds + 1e-12).all()


@pytest.mark.parametrize("name", CASES)
def test_float32_rounds_by_no_more_than_gamma_times_the_magnitude(name):
    layer, x = case(name)
    error = (forward(layer, x).double() - layer.apply(x.double())).abs()
    assert (error <= gamma(layer.n_terms) * layer.magnitude(x.double())).all() if layer.n_terms else not error.any()


@pytest.mark.parametrize("name", [name for name in CASES if "large" not in name])
def test_no_jacobian_is_larger_than_the_lipschitz_bound(name):
    layer, x = case(name)
    for image in x.double().split(1):
        matrix = jacobian(layer, image)
        norm = float(largest_singular_value(matrix))
        assert norm <= float(layer.lipschitz_upper_bound(image)) * (1 + 1e-6)
        assert float(layer.lipschitz_estimate(image)) <= float(layer.lipschitz_upper_bound(image)) * (1 + 1e-6)
        if layer.n_terms:
            assert float(largest_singular_value(matrix.abs())) <= float(layer.magnitude_norm(image)) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["conv, large", "conv, large, strided, dilated"])
def test_the_bound_by_the_kernel_holds_of_large_convolutions(name):
    """Power iteration on the whole map comes near its norm from below."""
    layer, x = case(name)
    u = x[:1].double()
    for _ in range(50):
        u = torch.autograd.functional.vjp(layer.without_bias, u, layer.without_bias(u))[1]
        u = u / u.norm()
    norm, bound = float(layer.without_bias(u).norm()), float(layer.lipschitz_upper_bound(x[:1].double()))
    assert norm <= bound <= 3 * norm


def test_pairs_of_points_are_pushed_apart_by_no_more_where_a_maximum_repeats_them():
    """The Jacobian at a random point seldom sees one pixel that wins several windows."""
    for name in ("max pool, overlapping", "max pool, dilated"):
        layer, x = case(name)
        a, b = torch.zeros_like(x[:1]), torch.zeros_like(x[:1])
        b[0, 0, 2, 2] = 1.0
        assert (layer.apply(b) - layer.apply(a)).norm() <= layer.lipschitz_upper_bound(a) * (b - a).norm()


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes what its parent does."""


class Reversed(nn.Sequential):
    def __iter__(self):
        return iter(list(self._modules.values())[::-1])


class WithWeightOfItsOwn(nn.Linear):
    def __getattr__(self, name):
        found = super().__getattr__(name)
        return 2 * found if name == "weight" else found


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *layers)


def initialised(layer):
    nn.init.eye_(layer._parameters["weight"])
    return layer


def with_hook(net, hook, kind=""):
    getattr(net[-1], f"register_forward_{kind}hook")(hook)
    return net


def patched(net):
    net[1].forward = lambda x: 3 * x
    return net


def residual_with(number):
    """A network whose answer is that of its class at most points: a hook, a patch or a subclass adds to it."""
    return network(Residual(nn.Linear(4, 4), nn.ReLU()), *[nn.Linear(4, 4) for _ in range(number)], nn.Linear(4, 3))


OTHERWISE = {
    "renamed": lambda: network(nn.Linear(4, 4), Renamed(4, 3)),
    "residual": lambda: residual_with(0),
    "doubled": lambda: network(Doubled(4, 4), nn.Linear(4, 3)),
    "doubled last": lambda: network(nn.Linear(4, 4), Doubled(4, 3)),
    "patched": lambda: patched(network(nn.Linear(4, 4), nn.Linear(4, 3))),
    "hook": lambda: with_hook(network(nn.Linear(4, 3)), lambda module, x, out: 1 - 2 * out),
    "pre-hook": lambda: with_hook(network(nn.Linear(4, 3)), lambda module, x: (3 * x[0].flip(1),), "pre_"),
    "iterates otherwise": lambda: network(nn.Linear(4, 4), Reversed(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3)),
    "weight is a property": lambda: network(initialised(WithWeightOfItsOwn(4, 4)), nn.Linear(4, 3)),
    "parametrised": lambda: network(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3)),
}  # fmt: skip


def holds(net, x, threat):
    """Bounds of all methods hold for the network as it answers, with the labels that it gives. Returns what is proved.

    With other labels nothing is proved.
    """
    with torch.no_grad():
        y = net(x).argmax(1)
    for method in ("interval", "crown"):
        found = certify(net, Data(x, y, torch.arange(len(y))), threat, method=method)
        assert (found.bound <= least_margins(net, x, y, threat, count=24)).all()
        assert not certify(net, Data(x, (y + 1) % 3, torch.arange(len(y))), threat, method=method).proved.any()
    return found.proved


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_a_network_computes_is_bounded_whatever_its_classes_say(name):
    net, x = OTHERWISE[name]().eval(), torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert holds(net, x, Threat("linf", 1e-3)).any()
    for threat in (Threat("linf", 0.2), Threat("l2", 0.2)):
        holds(net, x, threat)


def test_a_network_without_a_linear_layer_at_its_end():
    holds(Residual(nn.Flatten(1), nn.Linear(4, 4)), torch.rand(4, 4), Threat("linf", 0.1))


def test_a_hook_on_every_module_is_a_hook_on_these():
    x, net = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)), network(nn.Linear(4, 3))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, x, out: out - 5 * x[0][:, :3].relu() if isinstance(module, nn.Linear) else None
    )
    try:
        holds(net, x, Threat("linf", 0.1))
    finally:
        handle.remove()
    holds(net, x, Threat("linf", 0.1))


def test_a_class_that_computes_something_else_than_it_did_is_no_chain(monkeypatch):
    """Lipschitz constants are those of the classes: where the operators give other logits they are left out."""
    net = network(nn.Linear(4, 3))
    x = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert margins_by_lipschitz(net, x, net(x).argmax(1), torch.full((len(x),), 0.1)) is not None
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x.flip(1) @ self.weight.T + self.bias)
    holds(net, x, Threat("l2", 0.1))
    with torch.no_grad():
        logits = net(x).double()
    assert margins_by_lipschitz(net, x, logits.argmax(1), torch.full((len(x),), 0.1), [(x, logits)]) is None
    found = certify(net, Data(x, logits.argmax(1), torch.arange(8)), Threat("l2", 0.01), method="interval")
    assert found.proved.any()
    assert "lipschitz" not in found.by


class Sly(torch.Tensor):
    """A weight that decides itself what a product with it is."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 3 - out if getattr(function, "__name__", "") == "linear" else out


class Counted(nn.Module):
    """A parametrisation that gives another weight at every call."""

    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * self.calls


def test_what_stands_in_for_a_layer_in_another_way_is_refused():
    x, threat = torch.rand(8, 1, 2, 2), Threat("linf", 1e-3)

    def compiled(net):
        net[1]._compiled_call_impl = lambda x: 2 - net[1].forward(x)

    def of_a_subclass(net):
        net[1].weight = nn.Parameter(net[1].weight.detach().as_subclass(Sly))

    def parametrised(net):
        nn.utils.parametrize.register_parametrization(net[1], "weight", Counted(), unsafe=True)

    for change in (compiled, of_a_subclass, parametrised):  # a copy, which is read, has no compiled call
        net = network(nn.Linear(4, 3))
        change(net)
        assert cheaply_proved(net, x, torch.zeros(8, dtype=torch.int64), threat) is None


def test_the_images_are_left_as_they_are():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(8, 1, 2, 2) - 0.5
    before = x.clone()
    cheaply_proved(net, x, torch.zeros(8, dtype=torch.int64), Threat("linf", 0.1, -1, 1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("weight", [1e-23, 1e-30, 1e-38])
def test_products_that_vanish_in_float32_prove_nothing(weight):
    """In exact arithmetic logit 1 is above logit 0; in float32 both are zero, and the prediction is class 0."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        net[1].weight.fill_(weight)
        net[3].weight.copy_(torch.tensor([[0.0], [weight]]))
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([1])
    assert net(x).argmax(1) == 0
    assert not cheaply_proved(net, x, y, Threat("linf", 0.1)).any()


def test_numbers_that_overflow_in_float32_prove_nothing():
    """Exactly, logit 1 is far above logit 0; in float32 it is infinity - infinity."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[1].weight.fill_(1e30)
        net[3].weight.copy_(torch.tensor([[0.0, 0.0], [1e30, -0.9e30]]))
    x = torch.full((1, 1, 1, 1), 0.5)
    assert net(x).isnan().any()
    assert not cheaply_proved(net, x, torch.tensor([1]), Threat("linf", 0.01)).any()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randint(2, 256, (3, 1, 2, 2)).float(), "must lie in the threat's box"),
        (torch.rand(3, 1, 2, 2) - 0.5, "must lie in the threat's box"),
        (torch.full((3, 1, 2, 2), torch.nan), "must lie in the threat's box"),
        (torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8), "expects float images"),
    ],
    ids=["0..255", "shifted", "nan", "uint8"],
)
def test_images_outside_the_box_are_refused_not_certified(x, message):
    with pytest.raises(UserError, match=message):
        cheaply_proved(network(nn.Linear(4, 3)), x, torch.tensor([0, 1, 2]), Threat("linf", 0.1))


def test_another_precision_has_no_certificate():
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    for dtype in (torch.float64, torch.bfloat16):
        assert cheaply_proved(network(nn.Linear(4, 3)).to(dtype), x.to(dtype), y, Threat("linf", 1e-3)) is None


def test_a_module_that_is_applied_twice_is_bounded_twice():
    torch.manual_seed(0)
    relu, dense = nn.ReLU(), nn.Linear(4, 4)
    shared = nn.Sequential(nn.Flatten(), dense, relu, dense, relu, nn.Linear(4, 3))
    apart = nn.Sequential(nn.Flatten(), dense, nn.ReLU(), copy.deepcopy(dense), nn.ReLU(), shared[-1])
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    lo, hi = x - 0.1, x + 0.1
    assert torch.equal(logit_difference_bounds(shared, lo, hi, y), logit_difference_bounds(apart, lo, hi, y))
    assert len(chain_of(shared)[0]) == 5


def test_a_classifier_inside_a_network_is_no_layer():
    net = nn.Sequential(build("linear", (1, 2, 2), 4), nn.Linear(4, 3))
    assert cheaply_proved(net, torch.rand(1, 1, 2, 2), torch.tensor([0]), Threat("linf", 1e-3)) is None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "zero padding"),
        (nn.Conv2d(1, 1, 3, padding="same"), "zero padding"),
        (nn.BatchNorm2d(1, track_running_stats=False), "depends on its batch"),
        (nn.AvgPool2d(2, divisor_override=-1), "positive divisor, got -1"),
        (nn.Sigmoid(), "no bound is known for a layer of kind Sigmoid"),
    ],
)
def test_refusals(module, message):
    with pytest.raises(CannotBound, match=message):
        layer_of(module)
