"""Margin decomposition: the terms that it maximises, and the networks that need it."""

from __future__ import annotations

import torch
from tests.helpers import noise_of, run_attack

from holdfast.attacks import bim, fooled
from holdfast.losses import negative_margin
from holdfast.threat import Threat


def test_md_breaks_what_imbalanced_gradients_hide():
    """Near x the rival's logit falls faster than the true one does, so the margin leads back to x; -z_y leads out."""

    def model(x):
        q = x.flatten(1)[:, 0] - 0.5
        return torch.stack([1 - 4 * q, -5 * q.abs().clamp_max(0.1)], 1)

    x, y, threat = torch.full((9, 1, 1, 2), 0.51), torch.zeros(9, dtype=torch.int64), Threat("linf", 0.4)
    assert not fooled(model(bim(model, x, y, threat, score=negative_margin, noise=noise_of(9))), y).any()
    assert fooled(model(run_attack("md", model, x, y, threat, steps=6)), y).all()


def test_md_climbs_one_term_first_then_the_margin():
    """Read off from the gradients it asks for: -z_y in the first restart, the rival's logit in the second."""
    taken = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            taken.append(grad[0].tolist())
            return grad

    def model(x):
        z = torch.stack([9 + x.flatten(1).sum(1), x.flatten(1).sum(1), -x.flatten(1).sum(1) - 5], 1)
        return Watched.apply(z)

    x, y, threat = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), Threat("linf", 0.1)
    run_attack("md", model, x, y, threat, steps=4)
    own, rival, both = [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 1.0, 0.0]
    assert taken == [own, own, both, both, rival, rival, both, both]
    taken.clear()
    run_attack("md", model, x, y, threat, steps=4, target=torch.tensor([2]))
    assert taken[:2] == [own, own]
    assert taken[4:6] == [[0.0, 0.0, 1.0]] * 2
