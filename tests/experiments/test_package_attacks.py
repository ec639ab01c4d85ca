"""Attacks of foolbox and torchattacks: found by name, repeatable, judged in the ball. The real ones where installed."""

from __future__ import annotations

import random
import re
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from tests.helpers import noise_of

from holdfast.attacks import ATTACKS
from holdfast.errors import UserError
from holdfast.experiments.added_attacks import added_stages
from holdfast.experiments.package_attacks import PackageAttackWarning, register
from holdfast.outputs import Outputs, fooled
from holdfast.results import load as load_results
from holdfast.threat import Threat

LINF = Threat("linf", 0.1)


class FakeAttack:
    """The base class of the fake torchattacks."""

    def __init__(self, model):
        self.model = model
        self.device = next(model.parameters()).device  # as theirs do


class Walk(FakeAttack):
    """One step of alpha along the gradient from a random start, without a ball."""

    def __init__(self, model, eps=8 / 255, alpha=2 / 255, seed=None):
        super().__init__(model)
        assert isinstance(model, torch.nn.Module)
        assert not model.training
        self.eps, self.alpha, self.seed = eps, alpha, seed

    def __call__(self, x, y):
        assert self.seed is not None
        x = (x + random.random() * 1e-3 + np.random.uniform() * 1e-3 + 1e-3 * torch.rand_like(x)).requires_grad_()  # noqa: NPY002
        loss = torch.nn.functional.cross_entropy(self.model(x), y)
        return (x + self.alpha * torch.autograd.grad(loss, x)[0].sign()).clamp(0, 1).detach()


class InTwoNorms(FakeAttack):
    def __init__(self, model, norm="Linf", eps=0.3, n_classes=10):
        assert (norm, eps, n_classes) == ("L2", 0.5, 10)

    def __call__(self, x, y):
        return x


class ForL2(FakeAttack):
    def __init__(self, model, c=1):
        pass


class NeedsMore(FakeAttack):
    def __init__(self, model, loader):
        pass


class Fails(FakeAttack):
    def __call__(self, x, y):
        return x.no_such_name


class Halves(FakeAttack):
    def __call__(self, x, y):
        return x[:, :, ::2]


@pytest.fixture
def fake(monkeypatch):
    """A torchattacks of these attacks, whatever is installed."""
    module = types.ModuleType("torchattacks")
    module.__version__ = "9.9"
    module.attack = types.SimpleNamespace(Attack=FakeAttack)
    for made in (Walk, InTwoNorms, NeedsMore, Fails, Halves):
        setattr(module, made.__name__, made)
    module.CW = ForL2
    monkeypatch.setitem(sys.modules, "torchattacks", module)
    before = dict(ATTACKS)
    yield module
    ATTACKS.clear()
    ATTACKS.update(before)


def run(text, digits, threat=LINF, n=20, seed=0):
    net, x, y = digits
    stage = added_stages([text])[0][0]
    return ATTACKS[stage.attack].attack(net, x[:n], y[:n], threat, noise=noise_of(n, seed))


def test_what_leaves_the_ball_is_said_and_projected(fake, digits):
    _, x, _ = digits
    with pytest.warns(PackageAttackWarning, match=r"torchattacks:Walk:alpha=0\.5 returned points outside of linf 0\.1"):
        x_adv = run("torchattacks:Walk:alpha=0.5", digits)
    assert not LINF.violation(x_adv, x[:20]).any()
    assert (x_adv - x[:20]).abs().max() > 0.09
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("torchattacks:Walk:alpha=0.05", digits)


def test_its_random_numbers_are_those_of_the_samples_and_nobody_else_s(fake, digits):
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one, same, other = (run("torchattacks:Walk:alpha=0.05", digits, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_it_asks_a_model_that_returns_outputs(fake, digits):
    net, x, y = digits
    asked = []

    def model(images):
        asked.append(len(images))
        return Outputs(net(images))

    key, version = register("torchattacks:Walk")
    assert version == "torchattacks 9.9"
    ATTACKS[key].attack(model, x, y, LINF, noise=noise_of(len(x)))
    assert asked == [len(x)]


def test_norm_and_classes_are_those_of_the_evaluation(fake, digits):
    assert run("torchattacks:InTwoNorms", digits, Threat("l2", 0.5)).shape == (20, 1, 8, 8)
    assert ATTACKS["torchattacks:InTwoNorms"].norms == ("linf", "l2")
    assert ATTACKS[register("torchattacks:CW")[0]].norms == ("l2",)
    with pytest.raises(UserError, match=r"for pixels in \[0, 1\]"):
        run("torchattacks:Walk", digits, Threat("linf", 0.1, -1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchattacks:", r"name the attack, such as torchattacks:PGD"),
        ("torchattacks:Wolk", r"unknown attack of torchattacks 'Wolk'\. Did you mean 'Walk'"),
        ("torchattacks:Walk:alfa=2", r"unknown setting of attack 'torchattacks:Walk' 'alfa'\. Did you mean 'alpha'"),
        ("torchattacks:Walk:eps=2", r"eps of the attack 'torchattacks:Walk' is that of the evaluation"),
        ("torchattacks:NeedsMore", r"needs loader: .*mine\.py:step"),
        ("torchattacks:Fails", r"torchattacks:Fails raised AttributeError: .*no_such_name.*, line \d+"),
        ("torchattacks:Halves", r"returned images of shape \(20, 1, 4, 8\) for \(20, 1, 8, 8\)"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(text, message, fake, digits):
    with pytest.raises(UserError, match=message):
        run(text, digits)


@pytest.mark.parametrize("package", ["foolbox", "torchattacks"])
def test_a_package_that_is_missing_or_broken_says_what_to_do(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"the attack {package}:PGD needs the package {package}: pip install {package}"
    ):
        added_stages([f"{package}:PGD"])
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be imported here \(RuntimeError: .*nms.*\)\. Install the torchvision"):
        added_stages([f"{package}:PGD"])


@pytest.mark.filterwarnings("default::holdfast.experiments.package_attacks.PackageAttackWarning")
def test_the_shell_runs_it_after_the_suite(fake, copied_run, holdfast_):
    run_folder = copied_run("sce")
    words = ("evaluate", run_folder, "--suite", "quick", "--device", "cpu", "--limit", "20", "--threat", "linf:0.02")
    status, out, err = holdfast_(*words, "--attack", "torchattacks:Walk:alpha=0.4,seed=3,fab:steps=2")
    assert status == 0, err
    assert re.search("note: torchattacks:Walk:alpha=0.4,seed=3 returned points outside of linf 0.02", err)
    folder = run_folder / "evaluation-linf0.02-quick+torchattacks_Walk_alpha=0.4,seed=3+fab_steps=2"
    found = load_results(folder)
    names = [stage.name for stage in found.runs[0].stages]
    assert names.index("fab:steps=2") == names.index("torchattacks:Walk:alpha=0.4,seed=3") + 1
    assert found.settings["attacks"] == {"torchattacks:Walk:alpha=0.4,seed=3": "torchattacks 9.9", "fab:steps=2": ""}
    assert holdfast_("replay", folder)[0] == 0
    status, out, err = holdfast_(*words, "--attack", "torchattacks:CW", "--out", "new")
    assert (status, out) == (2, "")
    assert "'torchattacks:CW' is for l2, not for linf" in err


@pytest.mark.parametrize(
    ("text", "threat"),
    [
        ("foolbox:LinfPGD:steps=20", LINF), ("foolbox:L2DeepFoolAttack", Threat("l2", 1.0)),
        ("foolbox:HopSkipJumpAttack:steps=5", Threat("l2", 1.0)), ("foolbox:L1FMNAttack", Threat("l1", 4.0)),
        ("torchattacks:PGD:alpha=0.02", LINF), ("torchattacks:APGDT", LINF), ("torchattacks:PGDL2", Threat("l2", 1.0)),
        ("torchattacks:AutoAttack", LINF),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_the_real_ones_break_images_in_the_ball(text, threat, digits):
    pytest.importorskip(text.partition(":")[0])
    net, x, y = digits
    one, two = (run(text, digits, threat) for _ in range(2))
    assert torch.equal(one, two)
    assert not threat.violation(one, x[:20]).any()
    assert int(fooled(net(one), y[:20]).sum()) > 3
