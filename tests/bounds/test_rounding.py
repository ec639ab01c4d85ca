"""Float32: what networks compute in it never beats a bound, however large, small or cancelling its numbers are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.bounds.helpers import Net, least_margins
from torch import nn

from holdfast.bounds import certify, cheaply_proved, why_not
from holdfast.bounds.graph import read
from holdfast.bounds.linear import all_lines, forward, least
from holdfast.bounds.regions import region_of
from holdfast.bounds.steps import Box, CurvedStep, bind
from holdfast.data import Data
from holdfast.threat import Threat

SMOOTH = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "erf": torch.erf, "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "mish": F.mish, "softplus": F.softplus,
    "softplus, flat": lambda x: F.softplus(x, 0.01), "softplus, steep": lambda x: F.softplus(x, 50.0),
    "log sigmoid": F.logsigmoid, "elu": F.elu, "selu": F.selu, "celu": lambda x: F.celu(x, 0.1),
    "hardswish": F.hardswish, "abs": torch.abs, "sin": torch.sin, "cos": torch.cos, "atan": torch.atan,
    "square": torch.square, "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal,
}  # fmt: skip
PLACES = 4096
LAST = torch.channels_last


def grids():
    """Numbers of [-100, 100], around zero and one, of every size, where gelu cancels, and near multiples of pi / 2."""
    yield torch.linspace(-100, 100, PLACES)
    yield torch.linspace(-7, 7, PLACES)
    for sign in (1, -1):
        yield (sign * torch.logspace(-44, 37, PLACES, dtype=torch.float64)).float()
    yield 1 + torch.arange(-PLACES // 2, PLACES // 2) * 2**-23
    yield torch.arange(-PLACES // 2, PLACES // 2) * torch.pi / 2


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_function_rounds_by_no_more_than_its_rule_says(name):
    """Half of the allowance at most: another library's kernel may be less exact than this one."""
    steps = bind(read(Net(lambda m, x: SMOOTH[name](x.flatten(1))), (1, 1, PLACES)), torch.float64)
    [step] = [step for step in steps if isinstance(step, CurvedStep)]
    for x in grids():
        exact = x.double().view(1, 1, -1)
        box = Box(exact, exact)
        allowed = step.rounding([box], step.box([box]))
        found, error = SMOOTH[name](x[None])[None], (SMOOTH[name](x[None]).double()[None] - SMOOTH[name](exact)).abs()
        known = allowed.isfinite()
        assert (error[known] <= 0.5 * allowed[known]).all()
        assert found[known].isfinite().all()


FUSED = {
    "layer norm": (lambda: nn.LayerNorm(24), lambda m, x: m.norm(x)),
    "group norm": (lambda: nn.GroupNorm(2, 8), lambda m, x: m.norm(x.view(-1, 8, 1, 3))),
    "instance norm": (lambda: nn.InstanceNorm1d(8, affine=True), lambda m, x: m.norm(x.view(-1, 8, 3))),
    "batch norm": (lambda: nn.BatchNorm1d(24), lambda m, x: m.norm(x)),
    "rms norm": (lambda: nn.RMSNorm(24), lambda m, x: m.norm(x)),
    "softmax": (nn.Identity, lambda m, x: 1e3 * x.softmax(1)),
    "log softmax": (nn.Identity, lambda m, x: x.log_softmax(1)),
    "attention": (nn.Identity, lambda m, x: F.scaled_dot_product_attention(*x.view(-1, 3, 4, 2).unbind(1))),
    "mean": (nn.Identity, lambda m, x: torch.stack([x.mean(1), x.var(1), x.sum(1)], 1)),
    "division": (nn.Identity, lambda m, x: torch.cat([x / 3, x / 1e-5 - 1.1, x * 0.1, x - 0.3, 1.7 - x], 1)),
    "pools": (nn.Identity, lambda m, x: torch.cat([F.avg_pool2d(x.view(-1, 1, 4, 6), 2).flatten(1),
                                                  F.adaptive_avg_pool2d(x.view(-1, 1, 4, 6), (3, 5)).flatten(1)], 1)),
    "bilinear": (nn.Identity, lambda m, x: F.interpolate(x.view(-1, 1, 1, 24), (1, 1013), mode="bilinear")),
    "clamps": (nn.Identity, lambda m, x: torch.cat([x.clamp(0.1, 0.7), F.hardsigmoid(x), F.leaky_relu(x, 0.3)], 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (0.0, 1e-6), (100.0, 1.0), (1000.0, 1e-2), (-3.0, 20.0)])
@torch.no_grad()
def test_kernels_that_differ_from_the_operators_they_are_read_as_round_no_worse(name, offset, scale):
    """Over single points, where rounding is all that there is: a mean far from zero is lost in cancellation."""
    build, function = FUSED[name]
    net = Net(lambda m, x: function(m, offset + scale * x.flatten(1)), norm=build()).eval()
    for tensor in net.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(32, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    steps = bind(read(net, x.shape[1:]), torch.float64)
    point = region_of(x, Threat("linf", 1.0, -9, 9))
    point = point.__class__(Box(point.center, point.center), point.center, point.threat, 0.0)
    found, logits = forward(steps, point), net(x).double()
    known = ~found.unbounded
    box = found.boxes[-1]
    assert ((box.lo[:, 0] <= logits) & (logits <= box.hi[:, 0]))[known].all()
    rows = torch.randn(32, 4, 1, logits.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low = least(steps, found, all_lines(steps, found), point, len(steps) - 1, rows)
    assert (low <= (rows[:, :, 0] * logits[:, None]).sum(2))[known].all()


def sequential(*layers):
    """Layers after a Flatten, with the random weights of seed 0; called where they are made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return nn.Sequential(nn.Flatten(), *layers).eval()


@torch.no_grad()
def cancelling():
    """+1e8 h and -1e8 h, and a small part that float32 drowns."""
    net = sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    net[1].weight.abs_()
    net[1].weight[4:] = net[1].weight[[2, 0, 3, 1]]
    net[3].weight[:, :4] = 1e8 * torch.tensor([1.0, 0.3, 0.7, 0.9])
    net[3].weight[:, 4:] = -net[3].weight[:, [2, 0, 3, 1]]
    net[3].bias.copy_(torch.tensor([1.0, 0.5, 0.0]))
    return net


@torch.no_grad()
def tiny_variance():
    net = sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, eps=1e-12), nn.ReLU(), nn.Linear(8, 3))
    net[2].running_var.fill_(1e-14)
    net[2].running_mean.copy_(torch.linspace(-1, 1, 8))
    return net


@torch.no_grad()
def scaled(weight, back):
    net = sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net[1].weight.mul_(weight)
    net[1].bias.mul_(weight)
    net[3].weight.mul_(back)
    net[3].bias.mul_(0)
    return net


@torch.no_grad()
def one_ulp():
    """Logits that differ by one unit in the last place."""
    net = sequential(nn.Linear(4, 3))
    net[1].weight[:] = net[1].weight[:1]
    net[1].bias.copy_(torch.tensor([1.0, 1.0 - 2.0**-24, 1.0 - 2.0**-23]))
    return net


class Offset(nn.Module):
    def forward(self, x):
        return 1e6 + x


FLOATS = {
    "cancelling": cancelling,
    "tiny variance": tiny_variance,
    "subnormal weights": lambda: scaled(1e-40, 1.0),
    "subnormal products": lambda: scaled(1e-25, 1e-20),
    "subnormal, and back": lambda: scaled(1e-38, 1e38),
    "overflow": lambda: scaled(1e30, 1e10),
    "almost overflow": lambda: scaled(1e20, 1e9),
    "one ulp": one_ulp,
    "large offset": lambda: sequential(nn.Linear(4, 8), Offset(), nn.ReLU(), nn.Linear(8, 3)),
    "exponentials that overflow": lambda: sequential(Times(300.0), nn.Linear(4, 3), Exp()),
    "squares that overflow": lambda: sequential(Times(1e20), nn.Linear(4, 3), Square()),
    "gelu's tail": lambda: sequential(nn.Linear(4, 8), Minus(5.0), nn.GELU(), Times(1e6), nn.Linear(8, 3)),
}


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Minus(Times):
    def forward(self, x):
        return x - self.factor


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()


class Square(nn.Module):
    def forward(self, x):
        return x.square()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("flush", [False, True])
def test_float32_never_beats_a_bound(name, flush):
    """Nor where the processor flushes subnormal numbers to zero."""
    net = FLOATS[name]()
    x = torch.rand(24, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2] = 0.0, 1.0, 1e-40
    torch.set_flush_denormal(flush)
    try:
        with torch.no_grad():
            y = net(x).nan_to_num(0.0).argmax(1)
        for method in ("interval", "crown"):
            for threat in (Threat("linf", 1e-7), Threat("l2", 0.05)):
                found = certify(net, Data(x, y, torch.arange(len(y))), threat, method=method)
                worst = least_margins(net, x, y, threat, count=30)
                assert not (found.proved & ~(worst > 0)).any()
                known = found.bound.isfinite()
                assert (found.bound <= worst)[known].all()
    finally:
        torch.set_flush_denormal(False)


def test_a_logit_that_overflows_is_no_proof():
    """exp(100) is infinite in float32, and two infinite logits are a tie that the first class wins."""
    net = sequential(nn.Linear(1, 2), Exp())
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0], [10.0]]))
        net[1].bias.copy_(torch.tensor([95.0, 90.0]))
    x, y = torch.full((1, 1, 1, 1), 0.2), torch.tensor([0])
    assert net(x).isinf().all()
    assert not cheaply_proved(net, x, y, Threat("linf", 0.01)).any()
    assert not cheaply_proved(net, x, 1 - y, Threat("linf", 0.01)).any()


def test_what_cancels_is_bounded_or_not_but_is_no_other_network():
    """The float32 answer is far from the exact one: that is rounding, not a network that answers by history."""
    net = cancelling()
    x = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(net).double()(x.double())
    assert (net(x).double() - exact).abs().max() > 1e-3 * exact.abs().max()
    found = certify(net, Data(x, net(x).argmax(1), torch.arange(8)), Threat("linf", 0.01))
    assert not found.proved.any()


def test_a_group_norm_in_channels_last_is_refused():
    """Its kernel subtracts the square of the mean from the mean of squares; in the default format it does not."""
    norm, x = nn.GroupNorm(2, 8), torch.randn(4, 8, 4, 6, generator=torch.Generator().manual_seed(1))

    def net(memory_format):
        return Net(lambda m, x: m.norm((1000 + 0.01 * x).to(memory_format=memory_format)), norm=norm).eval()

    exact = copy.deepcopy(net(torch.contiguous_format)).double()(x.double())
    with torch.no_grad():
        apart = {format: float((net(format)(x) - exact).abs().max()) for format in (torch.contiguous_format, LAST)}
    assert apart[LAST] > 4 * apart[torch.contiguous_format]
    assert "channels-last" in why_not(net(LAST), (8, 4, 6))
    assert why_not(net(torch.contiguous_format), (8, 4, 6)) == ""
