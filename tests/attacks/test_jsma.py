"""The saliency map attack: few pixels, the most salient ones, as far as the threat allows."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import LinearModel, run_attack

from holdfast.attacks import fooled
from holdfast.threat import Threat

EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}


def case(classes, n=8, seed=0):
    """(model, x, y): a linear model with logits near 0 at mid-grey, and what it predicts."""
    model = LinearModel(classes, seed=seed, dtype=torch.float32, bias=1 / 9, center=0.5)
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return model, x, model(x).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("steps", [1, 3])
def test_jsma_changes_few_pixels(norm, steps):
    model, x, y = case(4)
    x_adv = run_attack("jsma", model, x, y, Threat(norm, EPS[norm]), steps=steps)
    changed = (x_adv != x).flatten(1).sum(1)
    assert 0 < changed.max() <= steps


def test_jsma_takes_the_most_salient_pixel_as_far_as_it_goes():
    """Two classes, so a = -b counts everywhere: |a b| times the way to the wall decides."""
    weight = torch.tensor([1.0, -3.0, 2.0, 0.5])

    def model(x):
        rise = (x.flatten(1) * weight).sum(1)
        return torch.stack([9 - rise, rise], 1)

    x, y = torch.tensor([0.5, 0.9, 0.2, 0.5]).view(1, 1, 2, 2), torch.tensor([0])
    by_linf = run_attack("jsma", model, x, y, Threat("linf", 0.3), steps=1) - x
    assert torch.allclose(by_linf.flatten(), torch.tensor([0, -0.3, 0, 0]), atol=1e-6)
    by_l1 = run_attack("jsma", model, x, y, Threat("l1", 1.2), steps=2) - x
    assert torch.allclose(by_l1.flatten(), torch.tensor([0, -0.9, 0.3, 0]), atol=1e-6)
    by_l2 = run_attack("jsma", model, x, y, Threat("l2", 0.95), steps=2) - x
    assert torch.allclose(by_l2.flatten(), torch.tensor([0, -0.9, (0.95**2 - 0.81) ** 0.5, 0]), atol=1e-6)


def test_jsma_finds_the_few_pixels_that_matter():
    """Two of 64 pixels carry the answer; l1 leaves room for both."""

    def model(x):
        p = x.flatten(1)
        lead = p[:, 11] + p[:, 42] - 1.0 + 1e-3 * (p.mean(1) - 0.5)
        return torch.stack([lead, -lead], 1)

    x, y = torch.full((3, 1, 8, 8), 0.9), torch.zeros(3, dtype=torch.int64)
    x_adv = run_attack("jsma", model, x, y, Threat("l1", 2.0), steps=2)
    assert fooled(model(x_adv), y).all()
    assert ((x_adv != x).flatten(1).sum(1) <= 2).all()
