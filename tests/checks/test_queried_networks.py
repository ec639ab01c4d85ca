"""Networks that answer by more than the image, fail in a probe, or edit their input: no wrong verdict, no lost job."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.helpers import shorten_audits
from torch import nn

from holdfast import data, evaluate_network, models
from holdfast.checks import CHECKS, PGD50, ROBUST, Claim, Probe, audit, judge, lower_bound_99, name_of, strength
from holdfast.checks.strength import _separate
from holdfast.evaluation import Stage, evaluate
from holdfast.evaluation.evaluation import StageCost
from holdfast.losses import sce
from holdfast.objectives import adversarial, standard
from holdfast.outputs import as_outputs, frozen_eval
from holdfast.queries import CountingModel
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

THREAT = Threat("linf", 0.1)
FIT = FitConfig(epochs=8, batch_size=64, lr=3e-3)


@pytest.fixture(scope="module")
def split():
    return data.load("digits")


@pytest.fixture(scope="module")
def some(split):
    return split.test.take(slice(0, 64))


def trained(split, objective):
    model = models.build("mlp", split.shape, len(split.classes))
    fit(model, split.train, split.val, objective, FIT, device="cpu")
    return model.eval()


@pytest.fixture(scope="module")
def plain(split):
    return trained(split, standard(sce))


@pytest.fixture(scope="module")
def hardened(split):
    return trained(split, adversarial(sce, THREAT, steps=3))


class Either(nn.Module):
    """The answer of one network or of another, by ``choose(self, x)``: (N, 1) bool or bool, true for the first."""

    def __init__(self, first, second, choose):
        super().__init__()
        self.first, self.second, self.choose, self.calls = copy.deepcopy(first), copy.deepcopy(second), choose, 0

    def forward(self, x):
        self.calls += 1
        chosen = torch.as_tensor(self.choose(self, x))
        return torch.where(chosen, as_outputs(self.first(x)).logits, as_outputs(self.second(x)).logits)


def evaluate_and_audit(model, some, **more):
    return audit(model, some, evaluate(model, some, THREAT, "quick", **more))


@pytest.fixture(scope="module")
def plain_audit(plain, some):
    """The plain network, evaluated and audited outside of any context."""
    return evaluate_and_audit(plain, some)


def finding(audited, check):
    (found,) = (found for found in audited.findings if found.name == check)
    return found


@pytest.mark.parametrize(
    ("choose", "check"),
    [
        (lambda net, x: len(x) == 1, "outputs do not depend on batch mates"),
        (lambda net, x: len(x) > 100, "outputs do not depend on batch mates"),
        (lambda net, x: torch.is_grad_enabled(), "outputs do not depend on the gradient mode"),
        (lambda net, x: x.requires_grad, "outputs do not depend on the gradient mode"),
        (lambda net, x: torch.is_inference_mode_enabled(), "outputs do not depend on the gradient mode"),
        (lambda net, x: next(net.parameters()).requires_grad, "outputs do not depend on the gradient mode"),
        (lambda net, x: net.calls < 20, "a copy that was never queried answers alike"),
        (lambda net, x: net.calls < 500, "outputs are repeatable"),
    ],
)
def test_one_network_shown_and_another_attacked_is_void(plain, hardened, some, choose, check, monkeypatch):
    if check != "outputs are repeatable":  # that one counts the calls
        shorten_audits(monkeypatch)
    audited = evaluate_and_audit(Either(plain, hardened, choose), some)
    assert finding(audited, check).fires
    assert audited.verdict().status == audited.verdict(PGD50).status == "void"


def test_a_network_that_is_weak_on_the_8_bit_grid_alone_is_loose(plain, hardened, some):
    def on_grid(net, x):
        grey = x.detach() * 255
        return (grey - grey.round()).abs().flatten(1).amax(1, keepdim=True) < 1e-2

    found = evaluate(Either(plain, hardened, on_grid), some, THREAT, ())
    audited = audit(Either(plain, hardened, on_grid), some, found)
    assert finding(audited, "answers agree on and off the 8 bit grid").fires
    assert audited.verdict().status == "loose"
    assert audited.verdict(PGD50).status == "refuted"  # what the check broke counts


def test_two_honest_networks_are_not_accused(plain_audit, hardened, some):
    for audited in (plain_audit, evaluate_and_audit(hardened, some)):
        assert not [found.name for found in audited.findings if found.fires]
        assert audited.verdict().status == "tight"
        assert audited.verdict().why.startswith("empirical: no attack of ")
        assert "of these 64 samples" in audited.verdict().why


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_changes_nothing(plain, plain_audit, some, mode):
    with mode():
        inside = evaluate_and_audit(plain, some)
        with frozen_eval(plain):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
    assert inside.findings == plain_audit.findings
    assert torch.equal(inside.evaluation.x_adv, plain_audit.evaluation.x_adv)


@pytest.mark.usefixtures("short_audits")
def test_the_whole_answer_is_given_inside_inference_mode(plain, some):
    few = some.take(slice(0, 12))
    with torch.inference_mode():
        inside = evaluate_network(plain, few, THREAT, (Stage("short", "apgd", settings={"steps": 3}),))
    outside = evaluate_network(plain, few, THREAT, (Stage("short", "apgd", settings={"steps": 3}),))
    assert torch.equal(inside.evaluation.x_adv, outside.evaluation.x_adv)
    assert inside.region == outside.region


def test_training_works_inside_no_grad(split):
    with torch.no_grad():
        inside = trained(split, standard(sce)).state_dict()
    outside = trained(split, standard(sce)).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in inside.values())
    assert inside.keys() == outside.keys()


class Table(nn.Module):
    """A linear network with its weights in a plain tensor, which ``double()`` does not convert."""

    def __init__(self, net, n_classes):
        super().__init__()
        eye = torch.eye(64).view(64, 1, 8, 8)
        with torch.no_grad():
            bias = as_outputs(net(torch.zeros(1, 1, 8, 8))).logits
            self.table, self.bias = as_outputs(net(eye)).logits - bias, bias

    def forward(self, x):
        return x.flatten(1) @ self.table + self.bias


class Buffers(Table):
    """The same as buffers, as an imported network has them; it cannot answer about no images."""

    def __init__(self, net, n_classes):
        super().__init__(net, n_classes)
        table, bias = self.__dict__.pop("table"), self.__dict__.pop("bias")
        self.register_buffer("table", table)
        self.register_buffer("bias", bias)

    def forward(self, x):
        return x.view(x.size(0), -1) @ self.table + self.bias


@pytest.fixture(scope="module")
def linear(split):
    model = models.build("linear", split.shape, len(split.classes))
    fit(model, split.train, split.val, standard(sce), FIT, device="cpu")
    return model.eval()


@pytest.mark.usefixtures("short_audits")
def test_a_network_that_is_float32_inside_is_audited(unproved, linear, some):
    audited = evaluate_and_audit(Table(linear, 10), some)
    for check in ("float64 changes nothing", "float64 scores break no survivor"):
        found = finding(audited, check)
        assert found.status == "not run"
        assert found.why.startswith("the network is float32 inside")


@pytest.mark.usefixtures("short_audits")
def test_a_network_of_buffers_is_asked_in_float64(linear, some):
    assert finding(evaluate_and_audit(Buffers(linear, 10), some), "float64 changes nothing").status == "holds"


@pytest.mark.usefixtures("short_audits")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_few_images_are_audited_and_never_none(linear, some, n):
    few = some.take(slice(0, n))
    asked = []

    class Sized(Buffers):
        def forward(self, x):
            asked.append(len(x))
            return super().forward(x)

    evaluate_and_audit(Sized(linear, 10), few)
    assert min(asked) >= 1


def test_no_network_is_queried_about_zero_images(linear):
    out = CountingModel(Buffers(linear, 10))(torch.zeros(0, 1, 8, 8))
    assert out.logits.shape == (0, 10)


def test_a_network_that_edits_its_input_is_evaluated_as_the_one_it_is(plain, plain_audit, some):
    class Edits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(plain)

        def forward(self, x):
            x.mul_(2.0)
            x -= 0.5
            return self.net((x + 0.5) / 2)

    edits, honest = evaluate_and_audit(Edits(), some), plain_audit
    assert torch.equal(edits.evaluation.clean, honest.evaluation.clean)
    assert torch.equal(edits.evaluation.robust, honest.evaluation.robust)
    assert edits.verdict().status == "tight"


@pytest.mark.usefixtures("short_audits")
def test_a_constant_prediction_is_loose_and_its_sentence_says_so(some):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.eye(10)[0] * 5 + 0.01 * x.flatten(1)[:, :10]

    verdict = evaluate_and_audit(Constant(), some).verdict()
    assert verdict.status == "loose"
    assert "not significantly above chance" in verdict.why


@pytest.mark.usefixtures("short_audits")
def test_a_constant_prediction_is_proved_and_not_exact(some):
    """All of it is certified and says nothing, as the finding on chance itself says."""
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.arange(10.0))
    audited = evaluate_and_audit(constant, some)
    assert bool(audited.evaluation.certified.any())
    assert [one.name for one in audited.findings if one.fires and one.vacuous] == ["clean accuracy is above chance"]
    assert audited.verdict().status == "loose"
    assert "not significantly above chance" in audited.verdict().why


def test_moons_raise_no_alarm():
    split = data.load("moons")
    model = models.build("mlp", split.shape, 2)
    fit(model, split.train, split.val, standard(sce), FitConfig(epochs=10, batch_size=64, lr=3e-3), device="cpu")
    audited = evaluate_and_audit(model.eval(), split.test.take(slice(0, 150)))
    found = finding(audited, "hidden adversarial examples are found")
    assert found.status == "holds"
    assert found.k <= found.n // 8


# What is counted.


def test_certified_samples_cannot_be_broken_any_more(some, monkeypatch):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    with torch.no_grad():
        wide[1].weight.copy_(1000 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
        y = wide(data.pixels(some.x)).argmax(1)
    threat = Threat("linf", 1e-5)
    evaluation = evaluate(wide, data.Data(some.x, y, some.index), threat, "quick")
    audited = audit(wide, data.Data(some.x, y, some.index), evaluation)
    proved = int(evaluation.certified.sum())
    assert proved > 0
    assert audited.remaining.survivors == int((evaluation.robust & ~evaluation.certified).sum()) < 64
    assert audited.remaining.high <= 64 - proved


def test_the_stage_that_broke_a_sample_is_found_by_its_number(plain_audit):
    final = plain_audit.evaluation
    for number, stage in enumerate(final.stages):
        assert int((final.broken_by == number).sum()) == stage.broken
    assert final.stages[0].name == "clean"
    assert final.stages[1].name == "pgd50"
    assert int((final.broken_by == 1).sum()) > 0


def test_counts_are_of_one_thing_and_their_bound_is_a_number(plain, plain_audit, some):
    assert lower_bound_99(90, 64) == lower_bound_99(64, 64)
    found = finding(plain_audit, "candidates lie in the threat")
    evaluation = evaluate(plain, some, THREAT, (Stage("targets", "apgd", "dlr", targets=3, settings={"steps": 2}),))
    assert found.k == 0
    assert all(cost.candidates >= cost.attacked for cost in evaluation.stages)
    assert any(cost.candidates > cost.attacked for cost in evaluation.stages)  # several targets
    assert StageCost("one").candidates == 0


def test_of_several_checks_the_weightiest_is_named():
    names = [name_of(check) for check in CHECKS]
    assert names.index("gradients of the score are not zero") < names.index("arithmetic is float32")
    assert names.index("clean accuracy is above chance") < names.index("gradients of the score are not zero")
    void = [number for number, check in enumerate(CHECKS[:-1]) if check.void]
    assert void == list(range(len(void)))


def test_tight_says_that_it_is_empirical():
    kinds = ("apgd", "pgd", "square")
    assert judge(Claim(ROBUST, [1] * 9), [1] * 9, [], attack_kinds=kinds).why == (
        "empirical: no attack of 3 kinds broke more of these 9 samples"
    )


def test_planted_examples_take_no_memory_that_grows_with_the_square_of_the_features():
    """Against the literal system of Zimmermann et al., (D, D), where it is small."""
    rng = torch.Generator().manual_seed(0)
    for n_features in (3, 40):  # fewer than the points, and more
        points = torch.randn(4, 9, n_features, generator=rng, dtype=torch.float64)
        surface = points[:, 0] + torch.randn(4, n_features, generator=rng, dtype=torch.float64)
        deviation = points - points.mean(1, keepdim=True)
        scatter = deviation.mT @ deviation
        ridge = scatter.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(n_features, dtype=torch.float64)
        w, bias, separable = _separate(points, surface)
        torch.testing.assert_close(w, torch.linalg.solve(scatter + ridge, surface - points.mean(1)))
        assert torch.equal(separable, (w * surface).sum(1) > (points @ w[:, :, None])[:, :, 0].amax(1))
        assert bool(((w * surface).sum(1) + bias > 0)[separable].all())
    many = torch.randn(2, 9, 60_000, generator=rng, dtype=torch.float64)  # a (D, D) system would take 58 GB
    assert _separate(many, many[:, 0] + 1)[2].all()
    assert not _separate(torch.full((1, 9, 3), torch.nan, dtype=torch.float64), surface[:1, :3])[2].any()


def test_planted_examples_are_the_same_in_parts(plain, some, monkeypatch):
    evaluation = evaluate(plain, some, THREAT, (Stage("apgd", "apgd", settings={"steps": 2}),))
    probe = Probe(plain, some, evaluation, None, 0, 16, None)
    with frozen_eval(plain):
        whole = strength.hidden_adversarial_examples_are_found(probe)
        monkeypatch.setattr(strength, "MOST_FEATURES", 1)
        assert strength.hidden_adversarial_examples_are_found(probe) == whole
