"""Random networks of all that bounds know: no sampled and no attacked point is outside a bound of any method."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.bounds.helpers import attacked_margins
from torch import nn

from holdfast.bounds import METHODS, CannotBound, certify
from holdfast.data import Data
from holdfast.threat import Threat

MANY = 100


class Gate(nn.Sequential):
    def forward(self, x):
        return x * super().forward(x).sigmoid()


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Concat(nn.Sequential):
    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class Pointwise(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        return x * self.scale - 0.1


class Attention(nn.Module):
    """Each pixel as a token."""

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens.flip(1), tokens).transpose(1, 2).reshape(x.shape)


SAME = [  # of the same shape, from a number of channels
    lambda draw, c: nn.Conv2d(c, c, 3, padding=1),
    lambda draw, c: nn.Conv2d(c, c, 1, groups=c, bias=False),
    lambda draw, c: nn.BatchNorm2d(c),
    lambda draw, c: nn.GroupNorm(1, c),
    lambda draw, c: nn.InstanceNorm2d(c, eps=0.1),
    lambda draw, c: Scale(c),
    lambda draw, c: nn.PReLU(c),
    lambda draw, c: draw.choice([nn.LeakyReLU(0.1), nn.GELU(), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.ELU(),
                                 nn.Softplus(), nn.Hardswish(), nn.Hardtanh(-0.5, 0.5), nn.ReLU6(), nn.Mish()]),
    lambda draw, c: nn.MaxPool2d(3, 1, 1),
    lambda draw, c: nn.AvgPool2d(3, 1, 1),
    lambda draw, c: nn.Softmax(1),
    lambda draw, c: Attention(),
    lambda draw, c: Pointwise(lambda x: torch.maximum(x, x.flip(3)) - x.abs().clamp(max=0.3)),
    lambda draw, c: Pointwise(lambda x: (x.square() + 0.1).sqrt()),
]  # fmt: skip


def blocks(draw, channels, depth):
    """(layers, channels behind them)."""
    found = []
    for _ in range(draw.randint(1, 3)):
        kind = draw.random()
        if kind < 0.35:
            width, kernel = draw.randint(1, 3), draw.choice([1, 3])
            found += [nn.Conv2d(channels, width, kernel, padding=draw.choice([kernel // 2, 1])), nn.ReLU()]
            channels = width
        elif kind < 0.6 or not depth:
            found.append(draw.choice(SAME)(draw, channels))
        elif kind < 0.75:
            found.append(Residual(*[draw.choice(SAME)(draw, channels) for _ in range(draw.randint(1, 2))]))
        elif kind < 0.85:
            found.append(Gate(draw.choice(SAME)(draw, channels)))
        else:
            inner = [draw.choice(SAME)(draw, channels) for _ in range(draw.randint(1, 2))]
            found.append(Concat(*inner))
            channels *= 2
    return found, channels


def network(seed):
    """A random network for (1, 4, 4) images, with random statistics."""
    draw = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers, channels = blocks(draw, 1, 1)
        more, channels = blocks(draw, channels, 1)
        end = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)]
        if draw.random() < 0.5:
            end[2:] = [nn.Linear(4 * channels, 6), nn.ReLU(), nn.Linear(6, 3)]
        net = nn.Sequential(*layers, *more, *end).eval().requires_grad_(False)
        for name, tensor in net.state_dict().items():
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape) + 0.05)
            elif "running_mean" in name:
                tensor.copy_(torch.randn(tensor.shape))
    return net


def check(seed, methods):
    """How many images of a random network each method proves: all that it proves holds."""
    net, draw = network(seed), random.Random(-seed)
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    y = net(x).argmax(1)
    norm = draw.choice(["linf", "l2", "l1"])
    threat = Threat(norm, {"linf": 1, "l2": 3, "l1": 8}[norm] * draw.choice([1e-6, 1e-3, 0.01, 0.05]))
    worst = attacked_margins(net, x, y, threat, steps=6)
    proved = 0
    for method in methods:
        try:
            found = certify(net, Data(x, y, torch.arange(3)), threat, method=method, seconds=20.0)
        except CannotBound as refusal:
            raise AssertionError(f"network {seed} is not bounded: {refusal}") from None
        assert (found.bound <= worst).all(), (seed, method, found.bound - worst)
        assert not (found.proved & (worst <= 0)).any(), (seed, method)
        proved += int(found.proved.sum())
    return proved


@given(st.integers(0, 10**6))
@settings(max_examples=6, phases=[Phase.generate], derandomize=True)
def test_no_point_of_a_random_network_is_outside_a_bound(seed):
    check(seed, ("interval", "crown"))


def test_random_networks_are_proved_too():
    """A bound that is always -inf would pass the test above."""
    assert sum(check(seed, ("alpha",)) for seed in range(6)) >= 3


@pytest.mark.slow
def test_many_random_networks():
    """And the counts, which say how much was tried."""
    proved = {method: sum(check(seed, (method,)) for seed in range(MANY)) for method in METHODS}
    print(proved)
    assert proved["interval"] <= proved["crown"] <= proved["alpha"] <= proved["branch"]
