"""SPSA: it needs logits alone, and evaluates them in pairs and in chunks."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import LinearModel, noise_of, run_attack

from holdfast.attacks import fooled, pgd
from holdfast.errors import UserError
from holdfast.losses import negative_log_odds, negative_margin
from holdfast.threat import Threat


def case(classes, n=8, seed=0):
    """(model, x, y): a linear model with logits near 0 at mid-grey, and what it predicts."""
    model = LinearModel(classes, seed=seed, dtype=torch.float32, bias=1 / 9, center=0.5)
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return model, x, model(x).argmax(1)


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"chunk": 0}, {"width": 0.0}, {"steps": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    model, x, y = case(2, n=2)
    with pytest.raises(UserError, match=next(iter(wrong))):
        run_attack("spsa", model, x, y, Threat("linf", 0.1), **wrong)


def test_spsa_sees_no_gradient_and_needs_none():
    model, x, y = case(2, n=16)
    with torch.no_grad():
        lead = -negative_margin(model(x), y)
        steep = (model.weight[0] - model.weight[1]).abs().sum()
    eps = float((lead / steep).median()) * 1.3
    threat, few = Threat("linf", eps), {"steps": 10, "pairs": 16}
    open_, closed = (run_attack("spsa", m, x, y, threat, **few) for m in (model, lambda x: model(x).detach()))
    assert torch.equal(open_, closed)
    breakable = fooled(model(pgd(model, x, y, threat, score=negative_log_odds, noise=noise_of(16), steps=20)), y)
    broken = fooled(model(open_), y)
    assert breakable.sum() >= 6
    assert broken.sum() >= breakable.sum() - 3
    assert not (broken & ~breakable).any()


def test_spsa_asks_in_pairs_inside_the_box_and_no_more_at_once_than_it_is_told():
    _, x, _ = case(2, n=3)
    y = torch.zeros(3, dtype=torch.int64)
    asked = []

    def model(z):
        asked.append(z.detach().clone())
        return torch.stack([1e3 + z.flatten(1).sum(1), z.flatten(1).sum(1) * 0], 1)

    run_attack("spsa", model, x, y, Threat("linf", 0.1), steps=2, pairs=6, chunk=4)
    assert [len(z) for z in asked] == [3, 24, 12] * 2 + [3]
    assert all(z.min() >= 0 and z.max() <= 1 for z in asked)
    plus, minus = asked[1].view(2, 3, 4, 1, 4, 4)
    inside = ((x > 0.011) & (x < 0.989))[:, None].expand_as(plus)
    assert torch.allclose(((plus + minus) / 2)[inside], x[:, None].expand_as(plus)[inside], atol=1e-6)
    assert not torch.equal(plus[0] > x[0], plus[1] > x[1]), "samples share their directions"
