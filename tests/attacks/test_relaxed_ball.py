"""Constraint relaxation: which balls its points lie in, and which targets it keeps."""

from __future__ import annotations

import torch
from tests.helpers import run_attack

from holdfast.attacks import fooled
from holdfast.threat import Threat

THREAT = Threat("linf", 0.1)


class Watched:
    """Linear logits of three classes; keeps every point that it is asked about."""

    def __init__(self, gaps=(9.0, 9.0)):
        self.gaps, self.points = gaps, []

    def __call__(self, x):
        self.points.append(x.detach().clone())
        p = x.flatten(1).sum(1) - 0.5
        return torch.stack([0 * p + self.gaps[0], p + 0 * p, -p + self.gaps[0] - self.gaps[1]], 1)


def reach(points, x):
    return [float((point - x[: len(point)]).abs().max()) for point in points]


def test_a_cycle_leaves_the_threat_comes_back_and_shrinks():
    """Towards one target, with gaps that no step closes by half, but in the first phase beyond the threat."""
    model, x = Watched((0.3, 9.0)), torch.full((1, 1, 1, 1), 0.5)
    x_adv = run_attack("cr", model, x, torch.tensor([0]), THREAT, steps=30, target=torch.tensor([1]))
    far = reach(model.points[1:], x)  # without the start's own query
    assert max(far[:11]) > 0.14, "ten steps in a ball of eps + eps / 2"
    assert max(far[11:]) <= 0.1 + 1e-6, "then in the threat"
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    assert not fooled(model(x_adv), torch.tensor([0])).any(), "what it met beyond the threat does not count"


def test_a_target_that_stays_far_is_given_up():
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    near, far = Watched((0.12, 9.0)), Watched((9.0, 9.0))
    run_attack("cr", near, x, y, THREAT, steps=90, target=torch.tensor([1]))
    run_attack("cr", far, x, y, THREAT, steps=90, target=torch.tensor([1]))
    assert len(near.points) == 1 + 91
    assert len(far.points) == 1 + 21, "after two phases"


def test_another_start_is_for_targets_that_nearly_succeeded():
    x, y, calls = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), {}
    for gap in (0.101, 0.15):  # 0.1 of it can be closed
        model = Watched((gap, 9.0))
        run_attack("cr", model, x, y, THREAT, steps=30, restarts=3, target=torch.tensor([1]))
        calls[gap] = len(model.points)
    assert calls == {0.101: 1 + 3 * 31, 0.15: 1 + 31}


def test_the_scale_of_the_logits_changes_nothing():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(16, 24, generator=g), torch.randn(24, 5, generator=g)
    x = torch.rand(20, 1, 4, 4, generator=g)

    def net(scale):
        return lambda images: scale * ((images.flatten(1) @ w[0]).relu() @ w[1])

    y = net(1.0)(x).argmax(1)
    one, large = (run_attack("cr", net(scale), x, y, THREAT, steps=40) for scale in (1.0, 2.0**10))
    assert torch.equal(one, large)
