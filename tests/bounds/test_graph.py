"""Every operator that bounds know: the graph computes the network, and boxes and lines hold what float32 gives."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.bounds.helpers import Net, check_bounds, least_margins, threats
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from holdfast.bounds import CannotBound, certify, cheaply_proved, linear, propagation, why_not
from holdfast.bounds.graph import read
from holdfast.bounds.regions import region_of
from holdfast.bounds.rules import AFFINE, CURVED
from holdfast.bounds.steps import Box, bind
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.outputs import as_outputs
from holdfast.threat import Threat

SHAPE = (3, 5, 6)
N = 2


def seeded(build):
    """A module with the random weights of seed 0, none of them initial statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build()
        for name, tensor in module.state_dict().items():
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape) + 0.1)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape))
    return module


@cache
def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def w(x, *shape):
    """A constant of this shape."""
    return weight(*shape).to(x)


def in_place(m, x):
    x = x * 1
    x += 1
    x.mul_(2).clamp_(-1, 2)
    x[:, 0] = x[:, 1] * 0.5
    x[:, :, 1:3] += x[:, :, 3:]
    x[..., 0].zero_()
    return x


def attention(m, x):
    q, k, v = x.unbind(1)
    return F.scaled_dot_product_attention(q, k, v)


def layers(*modules):
    return seeded(lambda: nn.Sequential(*[module() for module in modules]))


MODULES = {
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "conv, all settings": lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1), groups=3),
    "conv, same": lambda: nn.Conv2d(3, 2, 3, padding="same", dilation=2),
    "conv, reflect": lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
    "conv, circular": lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"),
    "conv, replicate, no bias": lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="replicate", bias=False),
    "transposed conv": lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
    "transposed conv, grouped": lambda: nn.ConvTranspose2d(3, 6, 2, groups=3, dilation=2, bias=False),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(90, 4)),
    "linear on pixels": lambda: nn.Linear(6, 2),
    "linear without bias": lambda: nn.Linear(6, 2, bias=False),
    "spectral norm": lambda: spectral_norm(nn.Linear(6, 2)),
    "weight norm": lambda: weight_norm(nn.Conv2d(3, 2, 3)),
    "batch norm": lambda: nn.BatchNorm2d(3),
    "batch norm without weights": lambda: nn.BatchNorm2d(3, affine=False),
    "batch norm 1d": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(90)),
    "group norm": lambda: nn.GroupNorm(3, 3),
    "group norm, one group": lambda: nn.GroupNorm(1, 3, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(3),
    "instance norm with weights": lambda: nn.InstanceNorm2d(3, affine=True),
    "instance norm with statistics": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "layer norm": lambda: nn.LayerNorm(6),
    "layer norm over all": lambda: nn.LayerNorm(SHAPE, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(6),
    "max pool": lambda: nn.MaxPool2d(2),
    "max pool, padded and dilated": lambda: nn.MaxPool2d(3, stride=1, padding=1, dilation=2),
    "max pool, ceil": lambda: nn.MaxPool2d((3, 2), stride=2, ceil_mode=True),
    "average pool": lambda: nn.AvgPool2d(2),
    "average pool, padded": lambda: nn.AvgPool2d(3, stride=2, padding=1),
    "average pool, padding not counted": lambda: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
    "average pool, ceil": lambda: nn.AvgPool2d(2, ceil_mode=True, divisor_override=3),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d((2, 4)),
    "adaptive pool to one": lambda: nn.AdaptiveAvgPool2d(1),
    "prelu": lambda: nn.PReLU(3),
    "prelu, one slope": lambda: nn.PReLU(),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "leaky relu, steep": lambda: nn.LeakyReLU(-1.5),
    "relu6": lambda: nn.ReLU6(),
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.4),
    "hardsigmoid": lambda: nn.Hardsigmoid(),
    "hardswish": lambda: nn.Hardswish(),
    "elu": lambda: nn.ELU(0.7),
    "selu": lambda: nn.SELU(),
    "celu": lambda: nn.CELU(0.3),
    "celu, negative": lambda: nn.CELU(-0.6),
    "gelu": lambda: nn.GELU(),
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "silu": lambda: nn.SiLU(),
    "mish": lambda: nn.Mish(),
    "softplus": lambda: nn.Softplus(),
    "softplus, steep": lambda: nn.Softplus(30.0, 1.0),
    "softplus, negative": lambda: nn.Softplus(-2.0),
    "log sigmoid": lambda: nn.LogSigmoid(),
    "softsign": lambda: nn.Softsign(),
    "tanhshrink": lambda: nn.Tanhshrink(),
    "glu": lambda: nn.GLU(3),
    "softmax": lambda: nn.Softmax(-1),
    "softmax over channels": lambda: nn.Softmax(1),
    "softmin": lambda: nn.Softmin(2),
    "log softmax": lambda: nn.LogSoftmax(1),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "upsample, bilinear": lambda: nn.Upsample((7, 11), mode="bilinear"),
    "upsample, aligned": lambda: nn.Upsample((9, 4), mode="bilinear", align_corners=True),
    "pixel unshuffle": lambda: nn.Sequential(nn.ZeroPad2d((0, 0, 0, 1)), nn.PixelUnshuffle(2)),
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2)),
    "channel shuffle": lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ChannelShuffle(3)),
    "padding": lambda: nn.Sequential(nn.ConstantPad2d((1, -1, 0, 2), 0.3), nn.ReflectionPad2d(1)),
    "unfold": lambda: nn.Unfold(2, dilation=2, stride=2),
    "encoder": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(30, 8), nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), nn.Linear(8, 1)
    ),
    "bilinear cnn": lambda: nn.Sequential(nn.Conv2d(3, 2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
}  # fmt: skip
FUNCTIONS = {
    "add, alpha": lambda m, x: torch.add(x, x.flip(3), alpha=-2.5),
    "sub, alpha": lambda m, x: torch.sub(x[:, :1], x, alpha=3),
    "rsub, alpha": lambda m, x: torch.rsub(x, 1.0, alpha=3) + torch.rsub(x, x.roll(1, 2), alpha=-2),
    "scalars": lambda m, x: 1 - (0.1 + x) * 0.3 / 0.7 - x / w(x, 5, 1) / -3,
    "constant first": lambda m, x: w(x, 3, 5, 6) - x + w(x, 6) * x,
    "neg, abs": lambda m, x: -x.abs(),
    "mean, sum": lambda m, x: (
        torch.cat([x.mean((-1, 1)), x.sum(-2).flatten(1), x.mean((2, 3), keepdim=True)[..., 0, 0]], 1)
    ),
    "cumsum": lambda m, x: x.cumsum(-1),
    "views": lambda m, x: (
        x.permute(0, 3, 1, 2).reshape(-1, 9, 10).transpose(-1, -2).unsqueeze(1).squeeze(1).contiguous()
    ),
    "expand, repeat": lambda m, x: x[:, :1].expand(-1, 3, -1, -1) + x.repeat(1, 1, 1, 2)[..., 3:9],
    "windows, diagonals": lambda m, x: torch.cat([x.unfold(3, 2, 3).flatten(1), x.diagonal(0, 2, 3).flatten(1)], 1),
    "slices": lambda m, x: x[:, [0, 2], 1:4:2, -3:],
    "index": lambda m, x: x[:, torch.tensor([2, 0])].index_select(3, torch.tensor([1, 1, 5])),
    "select, unbind": lambda m, x: torch.stack([x.select(1, -1), *x.unbind(1)[:2]], -1),
    "split, chunk, cat": lambda m, x: (
        torch.cat([*x.split([2, 1], 1)[::-1], *x.chunk(2, 1), w(x, 2, 5, 6).expand(len(x), -1, -1, -1)], 1)
    ),
    "where": lambda m, x: torch.where(w(x, 5, 6) > 0, x, torch.tensor(0.25).to(x)) + torch.where(w(x, 5, 6) > 1, x, -x),
    "clamp, one side": lambda m, x: x.clamp(min=-0.1) + x.clamp(max=0.2) * 2,
    "clamp, float32's largest": lambda m, x: x.clamp(0, torch.finfo(torch.float32).max) - x.clamp(-math.inf, 0.1),
    "clamp by a tensor": lambda m, x: x.clamp(min=w(x, 5, 6) - 1) + torch.clamp(x, max=w(x, 6)),
    "maximum, minimum": lambda m, x: (
        torch.maximum(x, x.flip(3)) - torch.minimum(x, w(x, 3, 5, 6)) + torch.max(x, x.flip(2))
    ),
    "max, amax": lambda m, x: (
        torch.cat([x.max(3)[0].flatten(1), x.amax((1, 2)), x.amax(-1, keepdim=True).flatten(1)], 1)
    ),
    "min, amin": lambda m, x: torch.cat([x.min(3)[0].flatten(1), x.amin((1, 2)), x.amin(-1, True).flatten(1)], 1),
    "constants of its shape": lambda m, x: (
        torch.zeros_like(x) + x.new_ones(5, 6) * x + torch.full_like(x, 0.1) - x.new_full((6,), 0.7)
    ),
    "masked fill": lambda m, x: x.masked_fill(w(x, 5, 6) > 0, 0.1),
    "detach": lambda m, x: x + (F.relu(x) - x).detach(),
    "in place": in_place,
    "product": lambda m, x: x * x.flip(3) + x * x[:, :1],
    "itself": lambda m, x: x * x,
    "quotient": lambda m, x: x / (x.flip(3).square() + 1),
    "squares": lambda m, x: x.square() + (x + 4) ** 3 + (x + 4) ** -1 + (x + 5) ** -2,
    "roots": lambda m, x: (x + 5).sqrt() + (x + 5) ** 0.5 + (x + 5).rsqrt() + (x + 5) ** -0.5 + 1 / (x + 5),
    "exp, log": lambda m, x: x.exp() + x.expm1() + (x + 5).log() + (x + 5).log1p(),
    "sigmoid, tanh, erf": lambda m, x: x.sigmoid() + x.tanh() + x.erf() + x.atan(),
    "sin, cos": lambda m, x: (3 * x).sin() + (5 * x).cos(),
    "norms": lambda m, x: (
        torch.cat([(x + 4).norm(dim=1).flatten(1), x.norm(p=1, dim=(2, 3)), F.normalize(x + 4, dim=1).flatten(1)], 1)
    ),
    "var, std": lambda m, x: (
        torch.cat([x.var((2, 3)), x.std((1, 2), correction=0), x.std(-1, keepdim=True).flatten(1), x.var(1,
        False).flatten(1)], 1)
    ),
    "cosines": lambda m, x: F.linear(F.normalize(x.flatten(1)), F.normalize(w(x, 4, 90))) * 5,
    "matmul": lambda m, x: x @ w(x, 6, 3) + (w(x, 2, 5) @ x).sum((2, 3), keepdim=True),
    "matmul of two values": lambda m, x: x @ x.transpose(2, 3),
    "einsum": lambda m, x: torch.einsum("nchw,kc,nchv->nkwv", x, w(x, 2, 3), x.flip(1))[:, :, :2],
    "attention": attention,
    "float64 inside": lambda m, x: (x.double() * 0.1 + 1e-3).float(),
    "double maximum": lambda m, x: F.relu(F.relu(x) - 0.1) + F.relu(x),
    "addmm": lambda m, x: torch.addmm(x[:, 0, 0, :4], x.flatten(1), w(x, 90, 4), beta=-0.5, alpha=2),
}  # fmt: skip
CASES = {**dict.fromkeys(MODULES), **FUNCTIONS}


def build(name):
    if name in MODULES:
        return Net(lambda m, x: m.inner(x), inner=seeded(MODULES[name]))
    return Net(FUNCTIONS[name])


EPS = {"encoder": 3e-4, "attention": 0.02, "var, std": 0.05}  # where boxes alone are too wide for a bound
GRAPHS = {}  # of the cases, as they were read


@pytest.mark.parametrize("name", CASES)
def test_boxes_and_lines_hold_what_the_network_gives(name):
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1)) * 4 - 2
    GRAPHS[name] = check_bounds(
        build(name), x, threats(EPS.get(name, 0.2)), loose=2.0 if name == "softplus, steep" else 1e-5
    )


def test_every_operator_of_the_tables_is_met():
    for name in CASES:
        if name not in GRAPHS:
            GRAPHS[name] = read(build(name).eval(), SHAPE)
    met = {operation.name for graph in GRAPHS.values() for operation in graph.operations}
    other_forms = {  # of operators that are met
        "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_reshape_alias", "reshape", "alias", "lift_fresh",
        "movedim", "t", "native_channel_shuffle", "channel_shuffle", "_unsafe_view", "copy",
    }  # fmt: skip
    assert {*AFFINE, *CURVED} - met <= other_forms


@torch.no_grad()
def test_a_batch_for_training_is_bounded_as_its_images_are_for_proofs():
    """By the same tables: what is called for all images at once gives what each of them gets."""
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)) * 4 - 2
    lo, hi = x - 0.01, x + 0.01
    for number, name in enumerate(CASES):
        if name not in GRAPHS:
            GRAPHS[name] = read(build(name).eval(), SHAPE)
        graph = GRAPHS[name]
        y = torch.arange(3) % graph.classes
        found = propagation.upper_differences(propagation.plan_of(graph, torch.float32), lo, hi, y)
        inside = as_outputs(build(name).eval()(x)).logits
        assert (inside - inside.gather(1, y[:, None]) <= found + 1e-4).all(), name
        # Of operators that are monotone the pieces are not looked at in training.
        if number % 5 == 0 and not any(operation.corners for operation in graph.operations):
            region = linear.Region(Box(lo[:, None], hi[:, None]), x[:, None], Threat("linf", 0.01), 0.0)
            steps = bind(graph, torch.float32)
            expected = linear.upper_differences(steps, linear.forward(steps, region, rounding=False), region, y)
            expected = expected.scatter(1, y[:, None], 0.0)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


class Small(nn.Module):
    """Two dense layers around a function of itself and flat images, which are 4 pixels wide."""

    def __init__(self, function):
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(4, 16), nn.Linear(4, 3)
        self.register_buffer("memory", torch.zeros(4))

    def forward(self, x):
        return self.function(self, x.flatten(1))


def small(function):
    return seeded(lambda: Small(function)).eval()


def swallowed(m, x):
    try:
        high = bool(x.mean() > 0.95)
    except UserError:
        high = False
    return m.last(x) * (2 if high else 1)


def remembered(m, x):
    m.memory.add_(1)
    return m.last(x + m.memory)


def kept(m, x):
    m.memory.copy_(x.mean(0))
    return m.last(x + m.memory)


VALUES = "looks at values of its images"
REFUSED = {
    "if": (lambda m, x: m.last(x) * (2 if x.mean() > 0.95 else 1), VALUES),
    "if, and the refusal caught": (swallowed, VALUES),
    "item": (lambda m, x: m.last(x) * x.max().item(), VALUES),
    "data": (lambda m, x: m.last(x) * float(x.data.mean()), VALUES),
    "numpy": (lambda m, x: m.last(x) * float(x.detach().numpy().mean()), VALUES),
    "array": (lambda m, x: m.last(x) * float(np.asarray(x.detach()).mean()), VALUES),
    "dlpack": (lambda m, x: m.last(x) * float(np.from_dlpack(x.detach()).mean()), VALUES),
    "storage": (lambda m, x: m.last(x) * sum(x.untyped_storage().tolist()), VALUES),
    "text": (lambda m, x: m.last(x) * len(repr(x)), VALUES),
    "equal": (lambda m, x: m.last(x) * (2 if torch.equal(x, x.clamp(0, 0.9)) else 1), VALUES),
    "number of pixels": (lambda m, x: m.last(x) * len(torch.nonzero(x > 0.95)), VALUES),
    "number of values": (lambda m, x: m.last(x) * x.unique().numel(), VALUES),
    "size of a selection": (lambda m, x: m.last(x) * x[x > 0.95].numel(), VALUES),
    "argmax": (lambda m, x: m.last(x) + m.last.weight[:, x.argmax(1)].T, "argmax computes torch.int64"),
    "comparison": (lambda m, x: m.last(torch.where(x > 0.5, x, 0.0)), "gt computes torch.bool"),
    "torch.cond": (lambda m, x: torch.cond(x.mean() > 0.95, m.last, lambda x: 2 * m.last(x), (x,)), "bounds know"),
    "half precision": (lambda m, x: m.last(x.half().float()), "computes torch.float16"),
    "autocast": (lambda m, x: with_autocast(m, x), "computes torch.bfloat16"),
    "no rule": (lambda m, x: m.last(x.round()), "no bound is known for the operator round"),
    "sort": (lambda m, x: m.last(x.sort(1).values), "no bound is known for the operator sort"),
    "a division that rounds": (lambda m, x: m.last(torch.div(x, 0.3, rounding_mode="floor")),
        "operator div that rounds"),
    "a power": (lambda m, x: m.last(x**4), "a power other than"),
    "a norm": (lambda m, x: m.last(x / x.norm(p=3)), "a norm of order 3"),
    "a kernel from the image": (
        lambda m, x: m.last(F.conv2d(x.view(1, -1, 2, 2), m.first(x)[:, :9].reshape(-1, 1, 3, 3), padding=1,
                                     groups=len(x)).view(-1, 4)), "convolution of values that depend on the image",
    ),
    "weights from the image": (
        lambda m, x: F.linear(x, m.first(x).view(4, 4)[:3], m.last.bias), "addmm of values that depend on the image",
    ),
    "statistics from the image": (
        lambda m, x: m.last(F.batch_norm(x, x[0] * 0, torch.ones(4))), "native_batch_norm of values that depend",
    ),
    "batch statistics": (
        lambda m, x: m.last(F.batch_norm(x.view(-1, 1, 2, 2), None, None, training=True).flatten(1)),
        "the statistics of its batch",
    ),
    "random numbers": (lambda m, x: m.last(x) + 1e-9 * torch.rand(3), "draws random numbers"),
    "dropout": (lambda m, x: m.last(F.dropout(x)), "draws random numbers"),
    "a counter": (remembered, "changes its own tensors"),
    "a memory": (kept, "."),
    "one logit": (lambda m, x: m.last(x)[:, :1], r"shape \(1, 1\), expected \(1, K\) with K >= 2"),
    "no image": (lambda m, x: m.last.weight.T[:1], "the logits do not depend on the image"),
    "batch": (lambda m, x: m.last(x - x.mean(0)), "not those of the operators"),
    "size of the batch": (lambda m, x: m.last(x) * (1 if len(x) == 1 else 2), "not those of the operators"),
    "mode": (lambda m, x: m.last(x) * (2 if torch.is_grad_enabled() else 1), "not those of the operators"),
    "time": (lambda m, x: m.last(x) * next(COUNT), "not those of the operators"),
}  # fmt: skip
COUNT = iter(range(1, 10**9))


def with_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.last(x).float()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_of_one_image_by_known_operators_is_refused_in_a_sentence(name):
    function, sentence = REFUSED[name]
    x = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    net, threat = small(function), Threat("linf", 0.01)
    with pytest.raises(CannotBound, match=sentence) as refusal:
        certify(net, Data(x, torch.tensor([0]), torch.arange(1)), threat)
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)
    assert cheaply_proved(net, x, torch.tensor([0]), threat) is None


library = torch.library.Library("holdfast_tests", "DEF")
library.define("relu(Tensor x) -> Tensor")
library.impl("relu", lambda x: x.relu() + 9 * (x > 0.99), "CompositeExplicitAutograd")


def test_an_operator_of_another_library_is_not_the_one_of_its_name():
    net = small(lambda m, x: m.last(torch.ops.holdfast_tests.relu(x)))
    assert why_not(net, (1, 2, 2)) == "no bound is known for the operator holdfast_tests.relu.default."


def test_weights_that_are_nan_are_refused_and_infinite_ones_prove_nothing():
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 0])
    for number, sentence in ((math.nan, "a weight of the network is NaN."), (math.inf, "")):
        net = small(lambda m, x: m.last(x))
        net.last.weight.data[0, 0] = number
        assert why_not(net, (1, 2, 2)) == sentence
        proved = cheaply_proved(net, x, y, Threat("linf", 1e-3))
        assert proved is None if sentence else not proved.any()


def test_no_images_and_images_at_the_edge():
    """No image is no error; an image outside the box by rounding is bounded where it is; weights count from there."""
    net = small(lambda m, x: m.last(x))
    none = certify(net, Data(torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.int64), torch.arange(0)), "linf:0.1")
    assert none.proved.shape == none.bound.shape == (0,)
    x = torch.ones(1, 1, 2, 2) + 5e-7
    y = net(x).argmax(1)
    found = certify(net, Data(x, y, torch.arange(1)), Threat("linf", 1e-9))
    assert found.bound <= least_margins(net, x, y, Threat("linf", 1e-9, 0, 2))


def test_an_edge_of_the_box_that_is_no_float32_number():
    """0.1 in float32 is larger than 0.1: the threat allows that pixel, and so the bound must."""
    x, threat = torch.full((1, 1, 1, 1), 0.05), Threat("linf", 0.09, 0.0, 0.1)
    highest = torch.full_like(x, 0.1)
    assert threat.violation(highest, x) == 0
    assert (region_of(x, threat).box.hi >= highest.double()).all()


def test_moves_whose_derivative_torch_does_not_know_are_read_by_value():
    """A detached value still depends on the image."""
    net = small(lambda m, x: m.last(x.detach() + x * 0.01))
    x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y, threat = net(x).argmax(1), Threat("linf", 0.3)
    for method in ("interval", "linear", "crown", "alpha"):
        found = certify(net, Data(x, y, torch.arange(4)), threat, method=method)
        assert (found.bound <= least_margins(net, x, y, threat)).all()


def test_a_table_that_lies_is_found(monkeypatch):
    """Every affine operator is held against itself at a random point before anything is bounded."""
    from holdfast.bounds.rules import Affine

    monkeypatch.setitem(AFFINE, "round", Affine(1))
    assert why_not(small(lambda m, x: m.last(x.round())), (1, 2, 2)) == (
        "the operator round is not affine as bounds read it."
    )
    monkeypatch.setitem(AFFINE, "sub", Affine(2, ("alpha",), (0, 1), lambda a, b, alpha=1: a - alpha * b))
    assert "sub is not affine" in why_not(small(lambda m, x: m.last(x - x.flip(1))), (1, 2, 2))
