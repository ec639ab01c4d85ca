"""A box of its own for each image: every method proves, and breaks, what holds in it."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import on_digits, right_ones
from torch import nn

from holdfast.bounds import METHODS, ProofCache, certify
from holdfast.bounds.regions import farthest, region_in, region_of
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.models import build
from holdfast.threat import Threat


@pytest.fixture(scope="module")
def trained():
    """(net, data): a dense network of 28 ReLUs and 24 digits."""
    net, split = on_digits(
        lambda: (
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10),
        ),
        lr=1e-2,
        epochs=12,
    )  # fmt: skip
    x, y = right_ones(net, split, 24)
    return net, Data(x, y, torch.arange(24))


def boxes(x, seed=0, most=0.3):
    """Around images: of another width on either side of each pixel, of none for every third one, and beyond [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    below, above = (most * torch.rand(x.shape, generator=generator) ** 2 for _ in range(2))
    still = torch.rand(x.shape, generator=generator) < 1 / 3
    return x - below.masked_fill(still, 0), x + above.masked_fill(still, 0)


def least_margin(net, data, lo, hi, count=200):
    """(N,) of random points, of corners, and of corners that the gradient of a margin points to."""
    worst = torch.full((len(data),), torch.inf, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        share = torch.rand(data.x.shape, generator=generator)
        points = lo + (hi - lo) * (share if number % 2 else share.round())
        if number % 4 == 0:
            points.requires_grad_()
            logits = net(points)
            margin = logits.gather(1, data.y[:, None])[:, 0] - logits[:, number // 4 % logits.shape[1]]
            points = torch.where(torch.autograd.grad(margin.sum(), points)[0] > 0, lo, hi)
        with torch.no_grad():
            logits = net(torch.minimum(torch.maximum(points, lo), hi)).double()
        margins = logits.gather(1, data.y[:, None]) - logits
        worst = torch.minimum(worst, margins.scatter(1, data.y[:, None], torch.inf).amin(1))
    return worst


@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_a_box_is_outside_a_bound(trained, method):
    net, data = trained
    lo, hi = boxes(data.x)
    worst = least_margin(net, data, lo, hi)
    found = certify(net, data, (lo, hi), method=method, seconds=60.0)
    assert (found.bound <= worst).all()
    assert not (found.proved & (worst <= 0)).any()
    for row, x_adv in found.x_adv.items():
        assert ((lo[row] <= x_adv) & (x_adv <= hi[row])).all()
        assert net(x_adv[None]).argmax() != data.y[row]


def test_branch_and_bound_decides_every_box(trained):
    net, data = trained
    found = certify(net, data, boxes(data.x), method="branch", seconds=60.0)
    assert found.ended.all()
    assert (found.proved | torch.tensor([row in found.x_adv for row in range(24)])).all()
    assert 0 < len(found.x_adv) < 24
    assert {"interval", "linear", "crown", "alpha", "branch"} & set(found.by)


def test_the_box_of_a_threat_is_the_threat(trained):
    """The threat forgives a little more: bounds are equal but for that."""
    net, data = trained
    threat = Threat("linf", 0.05)
    lo, hi = (data.x - 0.05).clamp_min(0), (data.x + 0.05).clamp_max(1)
    for method in ("interval", "crown"):
        mine, theirs = (certify(net, data, allowed, method=method) for allowed in ((lo, hi), threat))
        torch.testing.assert_close(mine.bound, theirs.bound, rtol=1e-3, atol=1e-3)
        assert (mine.bound >= theirs.bound - 1e-6).all()


def test_boxes_by_hand():
    """The margin is 2 x1 - x2, from 2 lo1 - hi2: 2 - 1.5 over the first box and 2 - 2.5 over the second one."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    net[1].weight.data = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([2.0, 1.0]).view(1, 1, 1, 2).repeat(2, 1, 1, 1)
    lo, hi = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view_as(x), torch.tensor([[9.0, 1.5], [2.0, 2.5]]).view_as(x)
    found = certify(net, Data(x, torch.zeros(2).long(), torch.arange(2)), (lo, hi), method="interval")
    assert found.proved.tolist() == [True, False]
    assert found.bound.tolist() == pytest.approx([0.5, -0.5], abs=1e-5)
    at = certify(net, Data(x, torch.zeros(2).long(), torch.arange(2)), (x, x))
    assert at.proved.all(), "a box without width is its image"


def test_lipschitz_constants_reach_the_farthest_corner():
    """And no sample is proved by them that a point of its box breaks."""
    model = build("lipmlp", (1, 8, 8), 5, head="orthogonal").eval()
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = Data(x, model(x).logits.argmax(1), torch.arange(12))
    lo, hi = boxes(x, most=0.05)
    away = torch.maximum(hi - x, x - lo).double().flatten(1).norm(dim=1)
    assert torch.allclose(farthest(x, region_in(x, lo, hi)), away, rtol=1e-6)
    assert (farthest(x, region_in(x, lo, hi)) >= away * (1 - 1e-9)).all()
    assert (farthest(x, region_of(x, Threat("l2", 0.3))) >= 0.3).all()
    found = certify(model, data, (lo, hi), method="interval")
    assert "lipschitz" in found.by
    assert (found.bound <= least_margin(lambda images: model(images).logits, data, lo, hi, count=40)).all()


def test_boxes_of_another_call_are_not_taken_from_the_cache(trained):
    net, data = trained
    cache, (lo, hi) = ProofCache(), boxes(data.x)
    certify(net, data, (data.x, data.x), method="crown", cache=cache)
    certify(net, data, Threat("linf", 0.2), method="crown", cache=cache)
    mine, fresh = certify(net, data, (lo, hi), cache=cache), certify(net, data, (lo, hi))
    assert torch.equal(mine.bound, fresh.bound)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: (x[:3], x), r"the lower corners of the boxes must be torch.float32 of the shape \(24, 1, 8, 8\)"),
        (lambda x: (x, x.double()), "the upper corners .* got torch.float64"),
        (lambda x: (x + 0.1, x + 0.2), "the box of image 0 must be finite and hold the image"),
        (lambda x: (x, x - 0.1), "hold the image"),
        (lambda x: (x - torch.inf, x), "finite"),
        (lambda x: (x, x * torch.nan), "finite"),
        (lambda x: (x,), "threat must be .* a tuple of 2"),
        (lambda x: (0.1, 0.2), "threat must be"),
    ],
)
def test_a_box_that_is_none_is_one_sentence(trained, change, said):
    net, data = trained
    with pytest.raises(UserError, match=said):
        certify(net, data, change(data.x))
