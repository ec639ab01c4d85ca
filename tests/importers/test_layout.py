"""Images laid out as a network expects them: channels last, flat, without a batch axis; certificates through it."""

from __future__ import annotations

import pytest
import torch
from tests.bounds.helpers import least_margins
from torch import nn

from holdfast.attacks import pgd
from holdfast.bounds import cheaply_proved, logit_difference_bounds, why_not
from holdfast.errors import UserError
from holdfast.importers import ModelSource, wrap
from holdfast.importers.layout import arrange
from holdfast.losses import negative_margin
from holdfast.milp import layers_of
from holdfast.models import build, logits_only
from holdfast.noise import Noise
from holdfast.threat import Threat

COLOUR = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
GRAY = COLOUR[:, :1]
LAST = COLOUR.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("x", "layout", "input_shape", "expected"),
    [
        (COLOUR, "", None, COLOUR), (COLOUR, "nchw", None, COLOUR), (COLOUR, "nhwc", None, LAST),
        (COLOUR, "flat", None, COLOUR.flatten(1)), (COLOUR, "flat-nhwc", None, LAST.flatten(1)),
        (COLOUR, "", (None, 3, 4, 5), COLOUR), (COLOUR, "", (None, None, None, None), COLOUR),
        (COLOUR, "", (1, 4, 5, 3), LAST), (COLOUR, "", (None, None, None, 3), LAST), (COLOUR, "", (4, 5, 3), LAST),
        (COLOUR, "flat", (16, 60), COLOUR.flatten(1)), (COLOUR, "flat-nhwc", (None, 60), LAST.flatten(1)),
        (COLOUR, "flat", (60,), COLOUR.flatten(1)), (COLOUR, "", (3, 4, 5), COLOUR),
        (GRAY, "", (None, 20), GRAY.flatten(1)), (GRAY, "", (20,), GRAY.flatten(1)), (GRAY, "", (4, 5), GRAY[:, 0]),
        (GRAY, "", (20, 1), GRAY.flatten(1)[..., None]), (GRAY, "", (1, 20, 1), GRAY.flatten(1)[..., None]),
        (GRAY, "", (1, 1, 1, 20), GRAY.flatten(1)[:, None, None]), (GRAY, "", (None, 4, 5), GRAY[:, 0]),
        (GRAY, "", (7, 4, 5, 1), GRAY.permute(0, 2, 3, 1)), (GRAY, "", (None, None), GRAY.flatten(1)),
        (COLOUR.flatten(1), "", (60,), COLOUR.flatten(1)),
    ],
)  # fmt: skip
def test_the_shape_leaves_one_way(x, layout, input_shape, expected):
    assert torch.equal(arrange(x, layout, input_shape), expected)


def test_two_ways_are_asked_about():
    with pytest.raises(UserError, match=r"3 x 4 x 5.*flat .*flat-nhwc"):
        arrange(COLOUR, "", (None, 60))
    with pytest.raises(UserError, match=r"makes 4 x 5 x 3 .* 1 x 3 x 4 x 5"):
        arrange(COLOUR, "nhwc", (1, 3, 4, 5))
    for make in (lambda: ModelSource("a.onnx", input_layout="hwc"), lambda: wrap(lambda x: x, input_layout="hwc")):
        with pytest.raises(UserError, match=r"layout 'hwc'.*nhwc"):
            make()


def dense(pixels=64, seed=0, width=12):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def images(channels=1, n=40):
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(1))


PREPROCESSING = [
    {}, {"input_range": (-1.0, 1.0)}, {"mean": (0.4,), "std": (0.3,)},
    {"input_range": (0.0, 2.0), "mean": (0.4,), "std": (1.3,)}, {"input_layout": "flat"}, {"input_layout": "nhwc"},
    {"input_range": (-0.5, 1.0), "mean": (0.1,), "std": (0.7,), "input_layout": "flat-nhwc"},
]  # fmt: skip


def standardised(x, input_range=(0.0, 1.0), mean=(0.0,), std=(1.0,), **layout):
    low, high = input_range
    return (low + (high - low) * x - mean[0]) / std[0]


@pytest.mark.parametrize("settings", PREPROCESSING)
@pytest.mark.parametrize("inner", ["dense", "classifier"])
def test_preprocessing_is_part_of_the_chain(settings, inner):
    """Bounds, certificates and exact answers of a wrapped network are those of preprocessing, then the network."""
    net = dense() if inner == "dense" else build("mlp", (1, 8, 8), 3, seed=3).eval()
    if inner == "classifier" and "input_layout" in settings:
        pytest.skip("a Classifier takes (N, C, H, W)")
    model, x = wrap(net, **settings), images()
    y = logits_only(model)(x).argmax(1)
    assert why_not(model, (1, 8, 8)) == ""
    # A gray image has one order of its pixels in every layout.
    lo, hi = (x - 0.02).clamp(0, 1), (x + 0.02).clamp(0, 1)
    inside = [standardised(corner, **settings).double() for corner in (lo, hi)]
    bounds = logit_difference_bounds(model.double(), lo.double(), hi.double(), y)
    torch.testing.assert_close(bounds, logit_difference_bounds(net, *inside, y), rtol=1e-6, atol=1e-6)
    model.float()
    threat = Threat("linf", 0.02 if inner == "dense" else 0.001)
    proved = cheaply_proved(model, x, y, threat)
    assert proved is not None
    assert proved.any()
    x_adv = pgd(model, x, y, threat, score=negative_margin, noise=Noise(0, torch.arange(len(x))), steps=20)
    assert not (proved & (logits_only(model)(x_adv).argmax(1) != y)).any()
    assert torch.equal(cheaply_proved(logits_only(wrap(logits_only(model))), x, y, threat), proved)
    if settings.get("input_layout", "flat") == "flat":
        h = x.flatten(1).double()
        *hidden, (weight, bias) = layers_of(model)
        for w, b in hidden:
            h = (h @ w.T + b).relu()
        torch.testing.assert_close(h @ weight.T + bias, logits_only(model)(x).double(), atol=1e-4, rtol=1e-4)


def test_channels_have_their_own_numbers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    model = wrap(net, input_range=(0.0, 255.0), mean=(120.0, 110.0, 100.0), std=(60.0, 70.0, 80.0))
    x = images(3)
    y, threat = model(x).argmax(1), Threat("linf", 1 / 255)
    proved = cheaply_proved(model, x, y, threat)
    assert proved.any()
    x_adv = pgd(model, x, y, threat, score=negative_margin, noise=Noise(0, torch.arange(len(x))), steps=20)
    assert not (proved & (model(x_adv).argmax(1) != y)).any()
    mean, std = torch.tensor([120.0, 110.0, 100.0]).view(-1, 1, 1), torch.tensor([60.0, 70.0, 80.0]).view(-1, 1, 1)
    mlp = dense(192)
    wrapped = wrap(mlp, input_range=(0.0, 255.0), mean=(120.0, 110.0, 100.0), std=(60.0, 70.0, 80.0))
    weight, bias = layers_of(wrapped)[0]
    found = x.flatten(1).double() @ weight.T + bias
    torch.testing.assert_close(found.float(), mlp[1](((255 * x - mean) / std).flatten(1)), atol=1e-4, rtol=1e-4)


def test_what_does_more_than_it_shows_is_proved_as_what_it_does():
    """A hook, a replaced forward or other layers inside: the bound is of what is computed. A function has none."""
    hooked = wrap(dense())
    hooked.register_forward_hook(lambda module, x, out: -out)
    replaced = wrap(dense())
    replaced.arrange = lambda x: 1 - x
    x, threat = images(n=8), Threat("linf", 0.01)
    for model in (hooked, replaced, wrap(nn.Sequential(nn.Flatten(), nn.GELU()))):
        y = model(x).argmax(1)
        proved = cheaply_proved(model, x, y, threat)
        assert proved.any() or model.inner[1].__class__ is nn.GELU
        assert not (proved & (least_margins(model, x, y, threat) <= 0)).any()
        assert not cheaply_proved(model, x, (y + 1) % 3, threat).any()
        assert why_not(model, (1, 8, 8)) == ""
    function = wrap(lambda x: x.flatten(1))
    assert cheaply_proved(lambda x: x.flatten(1), x, y * 0, threat) is None
    assert "a function" in why_not(lambda x: x, (1, 8, 8))
    assert why_not(function, (1, 8, 8)) == ""
    assert not cheaply_proved(function, x, x.flatten(1).argmin(1), threat).any()
