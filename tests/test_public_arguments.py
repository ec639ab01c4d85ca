"""Arguments of another kind: every public function says in one sentence which one is wrong, before it does anything."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers import SmallNet
from tests.results.factory import make_results
from torch import nn

from holdfast import bounds, data, importers, losses, objectives, results, run_folder, train
from holdfast.attacks import pgd
from holdfast.checks import audit
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.evaluation import Stage, evaluate
from holdfast.experiments import pipeline
from holdfast.experiments.compare import compare
from holdfast.experiments.config import Comparison
from holdfast.io import content_hash
from holdfast.noise import Noise
from holdfast.region import measure, measure_distances
from holdfast.threat import Threat
from holdfast.train import FitConfig
from holdfast.user_input import of_type, typed

ROOT = Path(__file__).resolve().parent.parent
THREAT = Threat("linf", 0.1)
X, Y = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
DATA = Data(X, Y, torch.arange(6))
NET = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval()
FEW = (Stage("apgd", "apgd", settings={"steps": 1}),)


class Thing:
    """No type that any argument has."""


WRONG = ["no such thing", None, -1, 1.5, math.nan, 10**30, True, [], [1, "a"], {}, Thing(), int, np.zeros((2, 2))]
# The wrappers that check types: ``typed``, and the attack contract. evaluate, audit, fit and data.load read what they
# are given themselves; losses, trust checks and helpers of tensors run in loops, where nothing is checked.
CHECKED = ("user_input.py", "base.py")


def documented():
    """The public functions of the reference."""
    pages = [page.read_text() for page in (ROOT / "docs").glob("api/*.md")]
    for name in sorted({name for page in pages for name in re.findall(r"^::: (holdfast[\w.]*)", page, re.MULTILINE)}):
        module = importlib.import_module(name)
        for key in getattr(module, "__all__", None) or list(vars(module)):
            function = getattr(module, key)
            wrapped = inspect.isfunction(function) and hasattr(function, "__wrapped__") and not key.startswith("_")
            if wrapped and Path(function.__code__.co_filename).name in CHECKED:
                yield pytest.param(function, id=f"{name}.{key}")


@pytest.mark.parametrize("function", list(documented()))
def test_a_thing_is_no_argument(function):
    """Of every function that checks types, the first argument that has one."""
    parameters = inspect.signature(function).parameters.values()
    given = {p.name: Thing() for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.default is p.empty}
    given = {name: value for name, value in given.items() if name != "settings"}
    with pytest.raises(UserError, match=r"must be|got a Thing"):
        function(**given)


def test_most_of_the_reference_checks_types():
    assert len(list(documented())) > 110


CALLS = [
    (objectives.standard, {"loss": losses.sce}),
    (objectives.adversarial, {"loss": losses.sce, "threat": THREAT, "steps": 2, "ramp": 0.0, "score": None, "s": None}),
    (objectives.interval, {"loss": "sce", "threat": "linf:0.1", "kappa": 0.5}),
    (bounds.cheaply_proved, {"model": NET, "x": X, "y": Y, "threat": THREAT}),
    (bounds.worst_logit_difference, {"model": NET, "x": X, "y": Y, "threat": THREAT}),
    (partial(pgd, NET, steps=1, noise=Noise(0, DATA.index)), {"x": X, "y": Y, "threat": THREAT, "score": losses.dlr}),
    (data.check_arrays, {"x": X, "y": Y, "classes": None}),
    (partial(data.from_arrays, X, Y, whole=True), {"test": None, "device": "cpu"}),
    (importers.wrap, {"model": NET, "input_range": (0, 1), "mean": (), "class_order": ()}),
    (importers.ModelSource, {"path": "x.onnx", "weights": "", "class_order": ()}),
    (results.csv, {"results": make_results()}),
    (results.proportion, {"k": 1, "n": 2}),
    (train.accuracy, {"model": NET, "data": DATA, "batch_size": 4}),
    (run_folder.check_device, {"device": "cpu"}),
    (FitConfig, {"optimizer": "sgd", "schedule": "step", "precision": "no", "checkpoint_seconds": 1.0}),
    (lambda **more: Comparison(**more).checked(), {"losses": ("sce",), "threat": "l2:1", "model": ""}),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sound"), CALLS)
def test_wrong_arguments_are_one_sentence(call, sound):
    call(**sound)
    for name in sound:
        for wrong in WRONG:
            with contextlib.suppress(UserError):  # some are right: True for a flag, [] for no numbers
                call(**{**sound, name: wrong})


def test_types_in_words():
    for kind, wrong, said in (
        (int, 10**30, "seed must be a whole number"),
        (float | None, "x", "a number or None, got 'x'"),
        (str | Path, 5, "a path, got 5"),
        (tuple[int, int] | None, (1,), r"a tuple of 2 whole numbers or None, got \(1,\)"),
        (list[str], "abc", "a list of texts, got 'abc'"),
        (Threat, {}, "a Threat, got a dict"),
        (torch.Tensor, [1], r"a tensor, got \[1\]"),
    ):
        with pytest.raises(UserError, match=said):
            of_type("seed", wrong, kind)
    with pytest.raises(TypeError, match="missing a required argument: 'a'"):
        typed(lambda a: a)()


def test_objectives_read_losses_and_threats_as_text():
    schedule = objectives.adversarial("isce:s=3", "linf:0.1", steps=1, score="dlr")
    net = SmallNet()
    x_adv = schedule(0.5).perturb(net, X, Y, Noise(0, DATA.index))
    assert 0 < float((x_adv - X).abs().max()) <= 0.1 + 1e-6
    with pytest.raises(UserError, match="cannot read the threat 'l5'"):
        objectives.fast("sce", "l5")
    with pytest.raises(UserError, match=r"unknown loss 'scee'.*'sce'"):
        objectives.standard("scee")


def test_a_certificate_needs_a_logit_for_every_label():
    with pytest.raises(UserError, match="returns 2 logits, a label is 5"):
        bounds.cheaply_proved(NET, X, torch.full((6,), 5), THREAT)


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cpu:x", "cpu:7", 5, "cuda:9999"])
def test_a_device_that_is_none(device):
    with pytest.raises(UserError, match="device"):
        train.fit(SmallNet(), DATA, DATA, objectives.standard("sce"), FitConfig(epochs=1), device=device)


def test_progress_may_be_none(tmp_path, monkeypatch):
    evaluation = evaluate(NET, DATA, THREAT, FEW, progress=None)
    monkeypatch.setattr("holdfast.checks.CHECKS", ())
    audit(NET, DATA, evaluation, progress=None)
    train.fit(SmallNet(), DATA, DATA, objectives.standard("sce"), FitConfig(epochs=1), device="cpu", progress=None)
    assert measure(NET, X, Y, X, THREAT, steps=1, limit=2, progress=None).n == 2
    for call in (
        partial(evaluate, NET, DATA, THREAT, FEW),
        partial(audit, NET, DATA, evaluation),
        partial(train.fit, NET, DATA, DATA, objectives.standard("sce"), FitConfig()),
        partial(pipeline.evaluate_network, NET, DATA, THREAT, FEW),
        partial(compare, Comparison(), tmp_path),
        partial(measure, NET, X, Y, X, THREAT),
        partial(measure_distances, NET, None, THREAT),
    ):
        with pytest.raises(UserError, match="progress must be a function"):
            call(progress="loud")


def test_a_transfer_source_is_images_of_the_same_samples():
    evaluation = evaluate(NET, DATA, THREAT, FEW)
    for wrong in ("x", X[:2], X[0]):
        with pytest.raises(UserError, match="transfer_source must be"):
            audit(NET, DATA, evaluation, transfer_source=wrong)


def test_a_function_has_no_weights_to_know_a_cache_by(tmp_path):
    with pytest.raises(UserError, match="give a key that names it"):
        pipeline.evaluate_network(lambda x: NET(x), DATA, THREAT, FEW, cache=tmp_path)


def test_adversarial_images_of_a_record_are_asked_again_too(tmp_path):
    """Another answer beside the 8-bit grid alone: the clean images do not show it."""

    class Beside(nn.Module):
        factor = 1.0

        def forward(self, x):
            level = x.detach() * 255
            beside = ((level - level.round()).abs().flatten(1).amax(1, keepdim=True) > 1e-2).to(x.dtype)
            return NET(x) * (1 + (self.factor - 1) * beside)

    net = Beside().eval()
    data = Data((DATA.x * 255).round() / 255, DATA.y, DATA.index)
    once = {"cache": tmp_path, "key": "one"}
    first = pipeline.evaluate_network(net, data, THREAT, FEW, **once)
    assert torch.equal(
        pipeline.evaluate_network(net, data, THREAT, FEW, **once).evaluation.x_adv, first.evaluation.x_adv
    )
    net.factor = 3.0
    with pytest.raises(UserError, match="adversarial images otherwise than when"):
        pipeline.evaluate_network(net, data, THREAT, FEW, **once)


def test_a_record_is_asked_again_in_a_process_group_too(tmp_path, monkeypatch):
    """The same weights, another answer: the stored attacks are of another network, under torchrun as well."""

    class Scaled(nn.Module):
        scale = 1.0

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(36, 2)

        def forward(self, x):
            return self.scale * self.layer(x.flatten(1))

    torch.manual_seed(0)
    net = Scaled().eval()
    file = tmp_path / pipeline.EVALUATION_FILE
    key = f"{content_hash(DATA.x, DATA.y, DATA.index)} {run_folder.weights_hash(net)}"
    evaluate(net, DATA, THREAT, FEW, checkpoint=file, key=key)
    net.scale = 2.0
    monkeypatch.setattr(pipeline.Processes, "current", lambda: pipeline.Processes(rank=1, count=2))
    with pytest.raises(UserError, match="answers otherwise than when"):
        pipeline.evaluate_network(net, DATA, THREAT, FEW, cache=tmp_path)
