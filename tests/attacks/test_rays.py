"""RayS: it reads labels alone, so nothing but the predictions matters to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import LinearModel, boundary_distances, predicted_labels, random_images, run_attack, survivors

from holdfast.threat import Threat


def plateau(model):
    """The model's labels as logits that are flat, and a gradient that points away from every mistake."""

    def answer(x):
        z = model(x)
        decoy = (z - z.detach()).flip(1) * 1e-3
        return F.one_hot(z.argmax(1), z.shape[1]).to(z) * 9 + decoy

    return answer


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_labels_alone_are_enough(norm):
    model, x = LinearModel(4, dim=36, center=0.5), 0.35 + 0.3 * random_images(60, dtype=torch.float64)
    y = predicted_labels(model, x, wrong=False)
    distance = boundary_distances(model, x, y, norm).amin(1)
    eps = float(distance.median())
    near, survives = distance < 0.7 * eps, distance > eps
    for seen in (model, plateau(model)):
        left = survivors("rays", seen, x, y, Threat(norm, eps), steps=400)
        assert left[survives].all()
        assert left[near].double().mean() < 0.15
    hidden = survivors("apgd", plateau(model), x, y, Threat(norm, eps), steps=40)
    assert hidden[near].double().mean() > 0.5, "what a gradient attack sees of it"


def test_the_logits_behind_the_labels_change_nothing():
    model, x = LinearModel(4, dim=36, center=0.5), random_images(20, dtype=torch.float64)
    y, threat = predicted_labels(model, x, wrong=False), Threat("linf", 0.02)
    one, other = (
        run_attack("rays", lambda x, change=change: change(model(x)), x, y, threat, steps=60)
        for change in (lambda z: z, lambda z: F.one_hot(z.argmax(1), 4).double())
    )
    broken = model(one).argmax(1) != y
    assert broken.any()
    assert torch.equal(one[broken], other[broken])
