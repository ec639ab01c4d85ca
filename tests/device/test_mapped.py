"""Images in a file, the network on the device: batches go there, and the answers are those of images in memory."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.accelerator import is_real

from holdfast import FitConfig, data, evaluate_network, fit, losses, mapped, models, objectives
from holdfast.data import Data
from holdfast.evaluation.suites import SUITES

ROUNDING = 1 if is_real() else 0
STAGES = (replace(SUITES["quick"][0], settings={"steps": 3}), *SUITES["quick"][1:2])


@pytest.fixture(scope="module")
def few(digits):
    _, x, y = digits
    return Data(mapped.stored(x[:16]), y[:16], torch.arange(16), classes=tuple("0123456789"))


def test_the_final_answer_is_the_same(on_both, few, tmp_path):
    home = evaluate_network(on_both[0], replace(few, x=few.x.clone()), "linf:0.1", STAGES)
    for _ in range(2):  # the second is read back
        away = evaluate_network(on_both[1], few, "linf:0.1", STAGES, cache=tmp_path, key="k")
        assert mapped.is_mapped(away.evaluation.x_adv)
        assert int((away.evaluation.robust != home.evaluation.robust).sum()) <= ROUNDING
        assert away.verdict().status == home.verdict().status
    larger = evaluate_network(on_both[1], few, "linf:0.2", STAGES, smaller=away)
    assert bool((larger.evaluation.robust <= away.evaluation.robust).all())


def test_training_reads_batches_to_the_device(device):
    split = data.load("digits", fold=(0, 5), limit_train=100)
    train, val = (replace(part, x=mapped.stored(part.x)) for part in (split.train, split.val))
    found = []
    for parts in ((split.train, split.val), (train, val)):
        mean, std = data.standardisation(parts[0])
        model = models.build("smallconv", split.shape, 10, seed=0, mean=mean, std=std)
        config = FitConfig(epochs=1, batch_size=32, lr=3e-3, precise_batch_norm=True)
        fit(model, *parts, objectives.standard(losses.sce), config, device=str(device))
        found.append(copy.deepcopy(model).cpu().state_dict())
    for name, weights in found[0].items():
        torch.testing.assert_close(weights, found[1][name])
