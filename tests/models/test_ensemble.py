"""Several networks as one: what is averaged, where gradients flow, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.helpers import noise_of
from torch import nn

from holdfast import Threat, attacks, ensemble, models, run_folder
from holdfast.data import load, pixels
from holdfast.errors import UserError
from holdfast.io import load_tensors, save_tensors
from holdfast.losses import negative_margin
from holdfast.results import load as load_results


@pytest.fixture
def two():
    return [models.build("smallconv", (1, 8, 8), 10, seed=seed).eval() for seed in (0, 1)]


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_it_is_the_average(two, mean):
    x = torch.rand(5, 1, 8, 8)
    logits = torch.stack([one(x).logits * 3 for one in two])
    for one in two:
        one.logit_scale = 3
    out = ensemble(two, mean=mean)(x)
    if mean == "logits":
        assert torch.allclose(out, logits.mean(0), atol=1e-5)
    else:
        assert torch.allclose(out.softmax(1), logits.softmax(2).mean(0), atol=1e-6)
    assert torch.allclose(ensemble([two[0], two[0]], mean)(x), logits[0], atol=1e-5)


def test_confident_networks_that_disagree_have_finite_logits_and_a_gradient():
    """In float32 the average of these softmaxes is 0.5, 0.5 and 0: its logarithm would be -inf without a gradient."""
    x = torch.ones(1, 1, requires_grad=True)
    zero = x * 0
    sure = [lambda x: torch.cat([x * 300, zero, zero], 1), lambda x: torch.cat([zero, x * 200, zero], 1)]
    out = ensemble(sure)(x)
    assert torch.allclose(out.softmax(1), torch.tensor([[0.5, 0.5, 0.0]]))
    # The third class has exp(-200) of the second network alone, over the 1 of the first one: its logit is -200 below.
    assert float((out[0, 0] - out[0, 2]).detach()) == pytest.approx(200, abs=1e-3)
    (grad,) = torch.autograd.grad(out[0, 0] - out[0, 2], x)
    assert float(grad) == pytest.approx(200, abs=1e-3)


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_attacks_climb_the_margin_of_the_average_through_all_members(two, mean, digits):
    net, x, y = digits
    together = ensemble(two, mean)
    x_in = x[:4].clone().requires_grad_()
    together(x_in).square().sum().backward()
    assert x_in.grad.abs().sum() > 0
    for one in two:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.head.parameters())
    together = ensemble([net, two[0]], mean)  # one trained, one not
    x_adv = attacks.pgd(together, x, y, Threat("linf", 0.1), score=negative_margin, noise=noise_of(len(x)), steps=10)
    before, after = (negative_margin(together(images), y) for images in (x, x_adv))
    assert (after > before).float().mean() > 0.9
    assert all(p.requires_grad for p in two[0].parameters()), "left as it was"


def test_a_transform_is_a_member_and_modes_are_set(two):
    class Flipped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.flip(-1))

    together = ensemble([two[0], Flipped(two[0])], mean="logits")
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(together(x), together(x.flip(-1)), atol=1e-5)
    together.train()
    assert two[0].training
    assert len({id(p) for p in together.parameters()}) == len([*two[0].parameters()])


@pytest.mark.parametrize(
    ("members", "mean", "message"),
    [
        ([lambda x: x], "logits", "at least 2 networks, got 1"),
        ([lambda x: x, 3], "logits", "must be a torch module or a function of images, got an int"),
        ([lambda x: x, nn.Linear], "logits", "must be a torch module or a function"),
        ([lambda x: x] * 2, "logit", "Did you mean 'logits'"),
        (3, "logits", "members must be"),
    ],
)
def test_what_is_no_ensemble_is_refused(members, mean, message):
    with pytest.raises(UserError, match=message):
        ensemble(members, mean)


def test_other_numbers_of_classes_are_refused():
    with pytest.raises(UserError, match=r"same classes, their logits are \(2, 3\), \(2, 4\)"):
        ensemble([lambda x: x[:, :3], lambda x: x[:, :4]])(torch.zeros(2, 5))


@pytest.mark.usefixtures("short_audits")
def test_the_shell_evaluates_and_replays_several_run_folders(copied_run, holdfast_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(copied_run("sce"), "a")
    shutil.copytree("a", "b")
    tensors = load_tensors("b/model.safetensors", "model", 1)[0]
    save_tensors("b/model.safetensors", "model", 1, {key: value * 0.9 for key, value in tensors.items()}, {})
    words = ("--suite", "quick", "--device", "cpu", "-q", "--threat", "linf:0.02")
    status, _, err = holdfast_("evaluate", "a", "b", *words)
    assert status == 0, err
    folder = tmp_path / "out" / "a+b-linf0.02-quick"
    (found,) = load_results(folder).runs
    assert found.loss == "ensemble(a, b)"
    shutil.rmtree("a")
    shutil.rmtree("b")  # the members were copied
    assert holdfast_("replay", folder)[0] == 0
    model, config = run_folder.load(folder)
    assert (config["ensemble"]["mean"], len(model.members)) == ("probabilities", 2)
    split = load("digits", fold=(0, 5))
    clean = float((model(pixels(split.test.x)).argmax(1) == split.test.y).float().mean())
    assert clean == pytest.approx(found.clean.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--average", "logits"], "--average is for several networks"),
        (["a.py:build", "b.py:build", "--weights", "w.pt", "--data", "digits"], "--weights is for one network"),
        (["run", "net.py:build"], "your own model needs --data"),
        (["run", "run", "--average", "median"], "unknown mean of an ensemble 'median'"),
        (["run", "other"], "other is not a run folder"),
    ],
)
def test_several_that_do_not_go_together_are_one_sentence(words, message, copied_run, holdfast_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert copied_run("sce") == tmp_path / "run"
    status, out, err = holdfast_("evaluate", *words)
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())


def test_networks_of_other_folds_are_refused(copied_run, holdfast_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert copied_run("sce") == tmp_path / "run"
    words = ("--epochs", "1", "--limit-train", "40", "--device", "cpu", "-q")
    assert holdfast_("train", "--fold", "1", "--out", "other", *words)[0] == 0
    status, _, err = holdfast_("evaluate", "run", "other")
    assert status == 2
    assert "needs the same test samples" in err
