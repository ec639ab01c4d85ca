"""The attack contract, over every entry of ATTACKS in every norm that it is defined for.

A new attack is tested here as soon as it has a line in ATTACKS; what it finds is tested in tests/attacks.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from tests.helpers import (
    SmallNet,
    noise_of,
    predicted_labels,
    random_images,
    run_attack,
    same_state,
    training_state,
)
from torch import nn

from holdfast.attacks import ATTACKS, attack, fooled
from holdfast.errors import UserError
from holdfast.losses import negative_margin
from holdfast.outputs import Outputs
from holdfast.threat import Threat

SIDE = 6
EPS = {"linf": 0.15, "l2": 0.8, "l1": 3.0}
FEW = {
    "fgsm": {},
    "bim": {"steps": 4},
    "square": {"steps": 12},
    "as_coded": {"steps": 5, "iterate": "last"},
}  # a new attack runs with steps=5
TABLE = [(name, norm) for name, entry in ATTACKS.items() for norm in entry.norms]
GRADIENT = [(name, norm) for name, norm in TABLE if ATTACKS[name].gradients]
# The same contract for settings that take other paths through the code. ``target`` is added to y, modulo 2.
VARIANTS = [
    ("pgd", {"steps": 3, "iterate": "last"}),
    ("pgd", {"steps": 3, "restarts": 2}),
    ("pgd", {"steps": 3, "momentum": 0.9}),
    ("pgd", {"steps": 3, "target": 1}),
    ("apgd", {"steps": 6, "restarts": 2}),
    ("apgd", {"steps": 6, "target": 1}),
    ("square", {"steps": 5, "target": 1}),
]
TABLE_OF_ALL = [pytest.param(name, norm, FEW.get(name, {"steps": 5}), id=f"{name}-{norm}") for name, norm in TABLE]
TABLE_OF_ALL += [
    pytest.param(name, norm, settings, id=f"{name}-{norm}-" + "-".join(f"{k}={v}" for k, v in settings.items()))
    for name, settings in VARIANTS
    for norm in ("linf", "l2")
]
every = pytest.mark.parametrize(("name", "norm", "few"), TABLE_OF_ALL)


def run(name, model, x, y, threat, **settings):
    """The attack, with a target that is given as an offset from y."""
    if isinstance(settings.get("target"), int):
        settings["target"] = (y + settings["target"]) % 2
    return run_attack(name, model, x, y, threat, **settings)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_back_is_a_point_of_the_threat_for_every_sample(name, norm, few, dtype):
    model, x, threat = SmallNet().to(dtype), random_images(9, dtype=dtype), Threat(norm, EPS[norm])
    y = predicted_labels(model, x)
    kept, y_kept = x.clone(), y.clone()
    x_adv = run(name, model, x, y, threat, **few)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == dtype
    assert x_adv.isfinite().all()
    assert not x_adv.requires_grad
    assert (threat.violation(x_adv, x) == 0).all()
    assert torch.equal(x, kept)
    assert torch.equal(y, y_kept)
    assert x_adv.data_ptr() != x.data_ptr()
    model.eval()
    if few.get("iterate") != "last":  # which evaluates no point
        assert fooled(model(x_adv), y)[::4].all(), "a sample that is wrong already stays wrong"


@every
def test_the_model_comes_back_as_it_was_and_so_do_the_global_random_numbers(name, norm, few):
    model, x = SmallNet(), random_images(5)
    y = predicted_labels(model, x)
    before, chance = training_state(model), torch.random.get_rng_state()
    assert not model.frozen.training
    assert model.live.training
    run(name, model, x, y, Threat(norm, EPS[norm]), **few)
    assert same_state(before, training_state(model))
    assert torch.equal(chance, torch.random.get_rng_state())


class Trips(nn.Module):
    """Fails at its second answer, with some of its modules in eval mode by then."""

    def __init__(self, at=2):
        super().__init__()
        self.net, self.calls, self.at = SmallNet(), 0, at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("midway")
        return self.net(x)


@every
@pytest.mark.parametrize("at", [1, 2])
def test_the_model_comes_back_as_it_was_when_the_attack_raises(name, norm, few, at):
    model, x = Trips(at), random_images(5)
    y = predicted_labels(model.net, x, wrong=False)
    before = training_state(model)
    grad = torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError, match="midway"):
        run(name, model, x, y, Threat(norm, EPS[norm] / 100), **few)
    assert same_state(before, training_state(model))
    assert torch.is_grad_enabled() == grad


@every
def test_the_callers_modes_do_not_matter_and_are_kept(name, norm, few):
    """Without gradients, and under autocast."""
    model, x, threat = SmallNet(), random_images(6), Threat(norm, EPS[norm])
    y = predicted_labels(model, x)
    expected = run(name, model, x, y, threat, **few)
    with torch.no_grad():
        assert torch.equal(run(name, model, x, y, threat, **few), expected)
        assert not torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(name, model, x, y, threat, **few), expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", [name for name, entry in ATTACKS.items() if entry.gradients])
def test_inference_mode_does_not_silence_an_attack(name):
    """Inside it no graph is recorded: the attack must lift it or refuse, never return its start as its best."""
    model, x, threat = SmallNet(), random_images(6), Threat("linf", EPS["linf"])
    y = predicted_labels(model, x, wrong=False)
    expected = run(name, model, x, y, threat, **FEW.get(name, {"steps": 5}))
    with torch.inference_mode():
        try:
            x_adv = run(name, model, x, y, threat, **FEW.get(name, {"steps": 5}))
        except (UserError, RuntimeError):
            return
    assert torch.equal(x_adv, expected)


@every
def test_an_empty_batch_comes_back_empty(name, norm, few):
    x, y = random_images(0), torch.zeros(0, dtype=torch.int64)
    x_adv = run(name, SmallNet(), x, y, Threat(norm, EPS[norm]), **few)
    assert x_adv.shape == (0, 1, SIDE, SIDE)
    assert x_adv.dtype == x.dtype


@every
def test_one_seed_one_answer(name, norm, few):
    model, x, threat = SmallNet(), random_images(8), Threat(norm, EPS[norm] / 8)
    y = predicted_labels(model, x, wrong=False)
    first = run(name, model, x, y, threat, **few)
    torch.manual_seed(123)
    assert torch.equal(first, run(name, model, x, y, threat, **few))
    other = run(name, model, x, y, threat, seed=1, **few)
    from_x = name in ("fgsm", "bim", "mim", "deepfool", "cw", "lbfgs", "fmn", "fab", "jsma", "least_likely", "as_coded")
    assert torch.equal(first, other) == from_x


@every
def test_a_tiny_threat_changes_no_prediction(name, norm, few):
    model, x = SmallNet(), random_images(9)
    y = predicted_labels(model, x, wrong=False)
    x_adv = run(name, model, x, y, Threat(norm, 1e-5), **few)
    model.eval()
    assert (negative_margin(model(x), y) < -1e-3).all()
    assert not fooled(model(x_adv), y).any()


class IntegerLinear(nn.Module):
    """A linear model with integer weights, whose products are summed sample by sample: no batch size changes a bit."""

    def __init__(self, classes=5, side=SIDE, seed=0):
        super().__init__()
        weight = torch.randint(-3, 4, (classes, side * side), generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight.double())

    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight).sum(2)


@every
def test_batch_size_and_order_do_not_matter_exactly_for_a_linear_model(name, norm, few):
    n = 7
    model, threat = IntegerLinear(), Threat(norm, {"linf": 1 / 16, "l2": 0.25, "l1": 1.0}[norm])
    x = (random_images(n, dtype=torch.float64) * 256).round() / 256
    y, noise = predicted_labels(model, x), noise_of(n)
    together = run(name, model, x, y, threat, noise=noise, **few)
    slack = 1e-12 if name in ("fmn", "cw") else 0.0  # rivals share the gradient by fractions, so the model's sums round
    for rows in (torch.arange(1), *torch.arange(n).split(4), torch.tensor([6, 2, 0, 4, 1, 3, 5])):
        alone = run(name, model, x[rows], y[rows], threat, noise=noise[rows], **few)
        assert torch.allclose(alone, together[rows], rtol=0, atol=slack)


def nan_off(x0, net):
    """A model whose logits are NaN in one class, away from the images themselves."""

    def model(x):
        z = net(x)
        moved = torch.tensor([not bool((row == x0.flatten(1)).all(1).any()) for row in x.flatten(1)])
        return z.masked_fill(moved[:, None] & (torch.arange(z.shape[1]) == 0), math.nan)

    return model


@every
def test_nan_logits_are_never_a_success(name, norm, few):
    net, x, threat = SmallNet(), random_images(6), Threat(norm, EPS[norm])
    net.eval()
    y = predicted_labels(net, x, wrong=False)
    model = nan_off(x, net)
    x_adv = run(name, model, x, y, threat, **few)
    if few.get("iterate") != "last":  # which evaluates no point
        assert torch.equal(x_adv, x), "every other point has a NaN among its logits"
    assert not fooled(model(x_adv), y).any()


ANSWERS = {
    "tuple": lambda z: (z, "more"),
    "list": lambda z: [z],
    "object": lambda z: SimpleNamespace(logits=z),
    "outputs": lambda z: Outputs(z, None, None),
}


@every
def test_a_model_may_answer_in_any_form(name, norm, few):
    net, x, threat = SmallNet().eval(), random_images(5), Threat(norm, EPS[norm])
    y = predicted_labels(net, x)
    expected = run(name, net, x, y, threat, **few)
    for wrap in ANSWERS.values():
        assert torch.equal(run(name, lambda x, wrap=wrap: wrap(net(x)), x, y, threat, **few), expected)


@every
def test_an_answer_without_logits_is_an_error_that_says_so(name, norm, few):
    x, y = random_images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match=r"\(N, K\) logits.*shape \(2,\)"):
        run(name, lambda x: x.flatten(1).sum(1), x, y, Threat(norm, EPS[norm]), **few)


@every
def test_logits_in_another_precision_do_not_change_the_images(name, norm, few):
    """A model may answer in float64 (as a probe of its arithmetic does); its images stay float32."""
    net, x, threat = SmallNet().eval(), random_images(5), Threat(norm, EPS[norm] / 4)
    y = predicted_labels(net, x)
    x_adv = run(name, lambda x: net(x).double(), x, y, threat, **few)
    assert x_adv.dtype == torch.float32
    assert (threat.violation(x_adv, x) == 0).all()


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_is_an_error_that_says_so(name, steps):
    x, y = random_images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="steps"):
        run(name, SmallNet(), x, y, Threat("linf", 0.1), steps=steps)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_whatever_a_new_attack_returns_the_contract_has_the_last_word(norm):
    x, threat = random_images(4), Threat(norm, EPS[norm])
    x = x.clamp(0.01, 0.99)
    y = torch.zeros(4, dtype=torch.int64)
    for value in (math.nan, math.inf, -math.inf):
        assert torch.equal(attack(lambda *_, value=value: torch.full_like(x, value))(SmallNet(), x, y, threat), x)
    x_adv = attack(lambda *_: x + 5.0)(SmallNet(), x, y, threat)
    assert (threat.violation(x_adv, x) == 0).all()
    assert not torch.equal(x_adv, x)


def test_every_entry_says_what_it_is():
    for name, entry in ATTACKS.items():
        assert entry.about
        assert set(entry.norms) <= {"linf", "l2", "l1"}
        assert {"score", "noise"} <= set(inspect.signature(entry.attack).parameters), name


@pytest.mark.parametrize(("name", "norm"), GRADIENT)
@pytest.mark.parametrize("kind", ["detached", "zero", "nan", "unused"])
def test_a_gradient_that_is_not_there_moves_nothing(name, norm, kind):
    net, x, threat = SmallNet().eval(), random_images(5), Threat(norm, EPS[norm])
    y = predicted_labels(net, x, wrong=False)

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.full_like(grad, math.nan)

    model = {
        "detached": lambda x: net(x).detach(),
        "zero": lambda x: net(x) * 0 + torch.eye(4)[predicted_labels(net, x.detach(), wrong=False)],
        "nan": lambda x: net(Bad.apply(x)),
        "unused": lambda x: net(x.detach()),
    }[kind]
    few = FEW.get(name, {"steps": 5})
    if name == "pgd":
        x_adv = run(name, model, x, y, threat, random_start=False, **few)
        assert torch.equal(x_adv, x)
    x_adv = run(name, model, x, y, threat, **few)
    assert x_adv.isfinite().all()
    assert (threat.violation(x_adv, x) == 0).all()
    if name in ("fgsm", "bim", "mim"):
        assert torch.equal(x_adv, x)
