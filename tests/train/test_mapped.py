"""Training on images in a file: bit for bit what it is on images in memory, and resumed alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast import FitConfig, Threat, data, fit, losses, mapped, models, objectives
from holdfast.train import accuracy

SPLIT = data.load("digits", fold=(0, 5), limit_train=200)
FILE = replace(SPLIT, **{part: replace(getattr(SPLIT, part), x=mapped.stored(getattr(SPLIT, part).x))
                         for part in ("train", "val")})  # fmt: skip


def trained(split, out=None, epochs=2, **settings):
    mean, std = data.standardisation(split.train)
    model = models.build("smallconv", split.shape, 10, seed=0, mean=mean, std=std)
    config = FitConfig(epochs=epochs, batch_size=64, lr=3e-3, pad=1, **settings)
    threat = Threat("linf", 0.05)
    schedule = objectives.adversarial(losses.sce, threat=threat, steps=2)
    return model, fit(model, split.train, split.val, schedule, config, val_threat=threat, out=out, device="cpu")


def assert_same(a, b):
    (one, fitted), (other, refitted) = a, b
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name
    for line, again in zip(fitted.history, refitted.history, strict=True):
        assert {k: v for k, v in line.items() if "seconds" not in k} == {
            k: v for k, v in again.items() if "seconds" not in k
        }


@pytest.mark.parametrize("settings", [{}, {"precise_batch_norm": True, "checkpoint": "best"}], ids=str)
def test_the_network_is_the_same(settings):
    assert mapped.is_mapped(FILE.train.x)
    one, other = trained(SPLIT, **settings), trained(FILE, **settings)
    assert_same(one, other)
    assert accuracy(one[0], SPLIT.train) == accuracy(one[0], FILE.train)


def test_a_run_is_finished_on_the_other_kind(tmp_path):
    stopped = []

    def stop(line, done, total):
        stopped.append(done)
        raise KeyboardInterrupt

    mean, std = data.standardisation(SPLIT.train)
    model = models.build("smallconv", SPLIT.shape, 10, seed=0, mean=mean, std=std)
    config = FitConfig(epochs=3, batch_size=64, lr=3e-3, checkpoint_seconds=0)
    schedule = objectives.standard(losses.sce)
    with pytest.raises(KeyboardInterrupt):
        fit(model, FILE.train, FILE.val, schedule, config, out=tmp_path, progress=stop, device="cpu")
    again = models.build("smallconv", SPLIT.shape, 10, seed=0, mean=mean, std=std)
    fitted = fit(again, SPLIT.train, SPLIT.val, schedule, config, out=tmp_path, device="cpu")
    whole = models.build("smallconv", SPLIT.shape, 10, seed=0, mean=mean, std=std)
    assert_same((again, fitted), (whole, fit(whole, SPLIT.train, SPLIT.val, schedule, config, device="cpu")))
    assert stopped == [1]
