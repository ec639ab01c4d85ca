"""Frozen parts and their batch norms stay what they were, bit for bit; a run of them resumes; errors are named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from holdfast import losses, models
from holdfast.data import load
from holdfast.errors import UserError
from holdfast.objectives import adversarial, standard
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit, frozen_names, loop

FROZEN = FitConfig(epochs=2, batch_size=50, lr=3e-3, checkpoint_seconds=0, freeze=("backbone.bl*",))


class Killed(BaseException):
    """Simulates kill -9 in this process: nothing catches it."""


@pytest.fixture(scope="module")
def split():
    return load("digits", limit_train=150)


def network():
    return models.build("preactresnet:depth=8", (1, 8, 8), 10)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "settings", [{}, {"ema": 0.5}, {"precise_batch_norm": True}, {"weight_decay": 0.1, "l1": 1e-3}]
)
def test_frozen_parts_stay_and_the_others_move(settings, split):
    model = network()
    before = state(model)
    objective = adversarial(losses.sce, Threat("linf", 0.1), steps=1, batch_norm="train", awp=0.01)
    fit(model, split.train, split.val, objective, dataclasses.replace(FROZEN, **settings), device="cpu")
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert not {name for name in moved if name.startswith("backbone.bl")}, "statistics of batch norms are among them"
    assert {"backbone.stem.weight", "head.linear.weight"} & moved


def test_what_was_frozen_is_free_again(split):
    model = network()
    model.head.requires_grad_(False)  # by its owner
    fit(model, split.train, split.val, standard(losses.sce), FROZEN, device="cpu")
    assert all(module.training for module in model.modules())
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {"head"}


def test_a_stopped_run_resumes_bit_for_bit(split, tmp_path, monkeypatch):
    whole, stopped = network(), network()
    fit(whole, split.train, split.val, standard(losses.sce), FROZEN, out=tmp_path / "whole", device="cpu")

    def kill(*arguments):
        save(*arguments)
        raise Killed

    save = loop.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", kill)
        with pytest.raises(Killed):
            fit(stopped, split.train, split.val, standard(losses.sce), FROZEN, out=tmp_path / "run", device="cpu")
    again = network()
    fit(again, split.train, split.val, standard(losses.sce), FROZEN, out=tmp_path / "run", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(again).values(), strict=True))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["fit"]["freeze"] == ["backbone.bl*"]
    free = dataclasses.replace(FROZEN, freeze=())
    with pytest.raises(UserError, match="differ in fit"):
        fit(network(), split.train, split.val, standard(losses.sce), free, out=tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("backbon.*", r"'backbon\.\*' chooses no parameter of the network\. It has backbone\."),
        ("head.*|nothing", r"'nothing' chooses no parameter"),
        ("*", r"leaves no parameter to train"),
    ],
)
def test_a_pattern_that_fits_nothing_or_all_is_refused_before_anything_is_written(freeze, message, split, tmp_path):
    config = dataclasses.replace(FROZEN, freeze=freeze)
    with pytest.raises(UserError, match=message):
        fit(network(), split.train, split.val, standard(losses.sce), config, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_text_holds_several_patterns():
    assert FitConfig(freeze="head.* | backbone.stem.*").freeze == ("head.*", "backbone.stem.*")
    assert FitConfig(freeze="") == FitConfig()
    names = frozen_names(network(), FitConfig(freeze="*.bias").freeze)
    assert names
    assert all(name.endswith(".bias") for name in names)
    for wrong in (3, ("",), "a||b", (1,), {"a": 1}):
        with pytest.raises(UserError, match="freeze"):
            FitConfig(freeze=wrong)
