"""Silent weaknesses of respected suites, trainers and losses: the weak variant goes wrong beside ours, which does not.

What attacks by themselves can get wrong in silence is in test_weaknesses_of_attacks.py.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast import losses, models
from holdfast.attacks import ATTACKS, AttackEntry, cross_entropy, fooled
from holdfast.checks import PGD50, ROBUST, Claim, audit, judge
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.losses import LOSSES
from holdfast.models.heads import HEADS
from holdfast.noise import Noise
from holdfast.objectives import adversarial, standard
from holdfast.outputs import Outputs
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

SHORT = (Stage("apgd", "apgd", "margin", settings={"steps": 10}),)
NOTHING = Threat("linf", 1e-9)


def numbers(*values, y=0):
    """Images of one pixel, all of class ``y``."""
    n = len(values)
    return Data(torch.tensor(values).view(-1, 1, 1, 1), torch.full((n,), y), torch.arange(n))


def threshold(x, at=0.5):
    """Class 0 while the pixel is above ``at``."""
    p = x.flatten(1)[:, 0]
    return torch.stack([p - at, at - p], 1)


class Linear(nn.Module):
    """A linear model with ``n`` images that it gets right; half of them fall within ``threat``, exactly."""

    def __init__(self, n=80, pixels=16, scale=1.0):
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        weight = torch.randn(pixels, generator=chance)
        x = 0.4 + 0.2 * torch.rand(n, 1, 4, pixels // 4, generator=chance)
        self.weight, self.bias, self.scale = nn.Parameter(weight), float(weight @ x.flatten(1).mean(0)), scale
        with torch.no_grad():
            lead = x.flatten(1) @ weight - self.bias
        self.data = Data(x, (lead < 0).long(), torch.arange(n))
        needed = lead.abs() / weight.abs().sum()
        self.threat = Threat("linf", float(needed.median()) * 1.0001)
        self.survives = needed > self.threat.eps

    def forward(self, x):
        lead = x.flatten(1) @ self.weight - self.bias
        return torch.stack([lead, -lead], 1) * self.scale


def checked(model, data, threat, suite=SHORT, **kept):
    """(evaluation, findings by name, verdict of the robust claim, of the published one)."""
    found = evaluate(model, data, threat, suite, **kept)
    queried = audit(model, data, found, **kept)
    after = queried.evaluation.robust.tolist()
    claims = [Claim(ROBUST, found.robust.tolist()), Claim(PGD50, found.pgd50.tolist())]
    verdicts = [judge(claim, after, queried.findings) for claim in claims]
    return found, {finding.name: finding for finding in queried.findings}, *verdicts


# ------------------------------------------------------------------------------------------------ what is evaluated


class Moody(nn.Module):
    """Dropout and batch norm before a threshold."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1, affine=False), nn.Dropout(0.5)

    def forward(self, x):
        return threshold(self.drop(self.norm(x)), 0.4)


def test_a_model_in_train_mode_is_evaluated_in_eval_mode():
    """Train mode is used as it is, at best with a warning, and eps 0 is not clean: a leaderboard, a suite."""
    model, data = Moody(), numbers(*torch.linspace(0.0, 1.0, 40).tolist())
    truth = model.eval()(data.x).argmax(1) == 0
    model.train()
    assert not torch.equal(model(data.x).argmax(1) == 0, truth)
    model.norm.reset_running_stats()
    found = evaluate(model, data, NOTHING, SHORT)
    for column in (found.clean, found.pgd50, found.robust):
        assert torch.equal(column, truth)
    assert all(module.training for module in model.modules())
    assert model.norm.num_batches_tracked == 0


def test_answers_that_depend_on_batch_mates_are_void():
    """Batch statistics at test time pass unseen, and predictions depend on the batch: a well-known defence's code."""
    model, data = Moody(), numbers(*torch.linspace(0.0, 1.0, 40).tolist())
    data = Data(data.x.expand(-1, 1, 2, 2).contiguous(), data.y, data.index)
    model.drop.p = 0.0

    def hidden(x):  # a function: nobody can put it into eval mode
        return model.train()(x)

    assert not torch.equal(hidden(data.x)[-5:].argmax(1), hidden(data.x[-5:]).argmax(1))
    _, findings, robust, published = checked(hidden, data, Threat("linf", 0.01))
    assert findings["outputs do not depend on batch mates"].fires
    assert (robust.status, published.status) == ("void", "void")
    _, findings, robust, _ = checked(model, data, Threat("linf", 0.01))
    assert not findings["outputs do not depend on batch mates"].fires
    assert robust.status != "void"


def test_pixels_are_refused_for_their_range_not_for_their_rounding():
    """A range check without tolerance refuses -2.98e-08, and none lets normalised images pass: an attack library."""
    low = -2.98e-08
    rounded = numbers(low, 0.6, 1.0)
    assert float(rounded.x.min()) < 0  # what the strict check refuses
    assert evaluate(threshold, rounded, Threat("linf", 0.05), SHORT).robust.tolist() == [False, True, True]
    for value in (-0.01, 1.01, -2.1):
        with pytest.raises(UserError, match="images must lie in the threat's box"):
            evaluate(threshold, numbers(value, 0.6), Threat("linf", 0.05), SHORT)


def test_a_sample_that_is_wrong_is_not_pushed_back_to_right():
    """Accuracy of the attacked images, whatever was right before: one number of many evaluation scripts."""
    data, walk = numbers(0.3, 0.5), 0.1

    def model(x):  # wrong on a narrow island
        p = x.flatten(1)[:, 0]
        inside = torch.where((p > 0.29) & (p < 0.31), 1.0, -1.0) + 0 * p
        return torch.stack([-inside, inside], 1)

    assert not fooled(model(data.x + walk), data.y).any()  # "100% robust", above the clean accuracy
    found = evaluate(model, data, Threat("linf", 0.1), "quick")
    for column in (found.clean, found.robust, found.pgd50):
        assert column.tolist() == [False, True]
    assert found.broken_by.tolist() == [-2, -1]


@pytest.mark.parametrize("kind", ["success", "outside", "box"])
def test_an_attacks_word_is_not_taken(monkeypatch, kind):
    """The attack's own flag, of a point not clipped or outside eps, is counted: three libraries."""
    away = {"success": 0.0, "outside": 0.2, "box": 0.1}[kind]

    def boast(model, x, y, threat, *, score, noise):
        return x - away

    monkeypatch.setitem(ATTACKS, "boast", AttackEntry(boast, "claims every sample"))
    data = numbers(0.55, 0.65) if kind != "box" else replace(numbers(0.05, 0.08), source="nearly black by intent")
    model = partial(threshold, at=0.5 if kind != "box" else -0.001)
    assert kind == "success" or fooled(model(data.x - away), data.y).all()
    found = evaluate(model, data, Threat("linf", 0.1), (Stage("boast", "boast"),))
    truth = [False, True] if kind != "box" else [True, True]
    assert found.robust.tolist() == truth
    assert found.stages[-1].broken == 0
    assert found.stages[-1].outside == (0 if kind == "success" else sum(truth))
    with torch.no_grad():
        assert torch.equal(~fooled(model(found.x_adv), data.y), found.robust)


def test_the_answer_is_one_for_any_batch_size():
    """Seeds by batch and trackers that forget all batches but one: the best-known suite, a toolbox."""
    model = Linear()
    per_batch = [[torch.rand(1, generator=torch.Generator().manual_seed(0)).item() for _ in range(2)] for _ in range(2)]
    assert per_batch[0] == per_batch[1]  # two batches, one noise
    stages = (Stage("noise", "noise", settings={"steps": 5}), *SHORT)
    stages += (Stage("square", "square", "margin", settings={"steps": 10}),)
    whole = evaluate(model, model.data, model.threat, stages)
    for batch_size in (1, 7):
        parts = evaluate(model, model.data, model.threat, stages, batch_size=batch_size)
        assert torch.equal(parts.broken_by, whole.broken_by)
        for cost, same in zip(parts.stages, whole.stages, strict=True):
            assert (cost.attacked, cost.broken, cost.forwards) == (same.attacked, same.broken, same.forwards)
    assert torch.equal(whole.robust, model.survives)


# ----------------------------------------------------------------------------------------------- what a suite runs


def test_a_suite_takes_the_steps_that_it_states():
    """A suite under a known name with 10 steps in place of 100: an attack library's version of the best-known suite."""
    data, classes = numbers(0.5, 0.6, 0.7), 12

    def model(x):  # never wrong, a gradient everywhere
        p = x.flatten(1)[:, :1]
        return torch.cat([1e3 + p, p * torch.arange(classes - 1)], 1)

    for norm in ("linf", "l2"):
        found = evaluate(model, data, Threat(norm, 0.1), "paranoid")
        assert [cost.name for cost in found.stages[2:]] == [stage.name for stage in SUITES["paranoid"]]
        for stage, cost in zip(SUITES["paranoid"], found.stages[2:], strict=True):
            if stage.attack in ("md", "fab"):  # their steps are not all alike
                continue
            steps, runs = stage.settings["steps"], max(1, stage.targets)
            first = 1 if ATTACKS[stage.attack].gradients else 0  # k steps look at k + 1 points, k queries at k
            assert cost.forwards == len(data) * runs * (steps + first + 1)  # and one look is the judge's
            assert cost.backwards == len(data) * runs * steps * first
            assert steps >= 100


@pytest.mark.parametrize(("classes", "weak_spot"), [(2, 1), (3, 1), (3, 2), (5, 4), (100, 57)])
def test_targets_are_counted_from_the_models_own_classes(classes, weak_spot):
    """Ten classes by default, so that others are never a target, and fewer are an index error: two suites."""
    data, decoy = numbers(0.55), 1

    def model(x):  # the weak spot alone ever wins, and a decoy leads untargeted attacks away from it
        p = x.flatten(1)[:, 0]
        z = torch.full((len(x), classes), -9.0) + 0 * p[:, None]
        z[:, 0], z[:, decoy] = 0.0, (p - 0.66) / 2
        z[:, weak_spot] = 5 * (0.46 - p)
        return 100 * z

    by_default = range(1, 10)
    assert (weak_spot not in by_default) == (classes == 100)
    if classes < 10:
        with pytest.raises(IndexError):
            model(data.x).sort(1).indices[:, [-rank for rank in by_default]]
    stage = Stage("targeted", "apgd", "dlr", targets=9, settings={"steps": 10})
    found = evaluate(model, data, Threat("linf", 0.1), (stage,))
    assert found.pgd50.tolist() == [weak_spot != decoy]
    assert found.robust.tolist() == [False]
    assert found.prediction_adv.tolist() == [weak_spot]


def test_an_attack_on_saturated_logits_is_beside_the_truth_and_its_claim_is_refuted():
    """PGD on cross-entropy says 100% where logits are times a million: the default of most libraries and papers."""
    for scale in (1.0, 1e6):
        model = Linear(scale=scale)
        found, _, robust, published = checked(model, model.data, model.threat)
        assert torch.equal(found.robust, model.survives)
        assert int(model.survives.sum()) == 40
        assert robust.status == "tight"
        assert int(found.pgd50.sum()) > 75 if scale == 1e6 else torch.equal(found.pgd50, model.survives)
        assert published.status == ("refuted" if scale == 1e6 else "tight")


class Imbalanced(nn.Module):
    """Class 0 leads by 1. Its logit falls a little along a steep slope, and each other logit jumps up along a flat one.

    The margin's gradient follows the steep slope alone, and ends at a margin of one half from every start.
    """

    def __init__(self, n=40, pixels=30, classes=10, eps=0.1):
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        self.steep = torch.randint(2, (pixels,), generator=chance) * 2.0 - 1
        self.flat = torch.randint(2, (classes - 1, pixels), generator=chance) * 2.0 - 1
        self.threat, self.unit = Threat("linf", eps), eps * pixels
        x = 0.5 + 0.02 * eps * torch.rand(n, 1, 5, pixels // 5, generator=chance)
        self.data = Data(x, torch.zeros(n, dtype=torch.int64), torch.arange(n))

    def forward(self, x):
        delta = (x - 0.5).flatten(1) / self.unit  # its product with a vector of signs is at most 1 in the threat
        true = 1 - 0.5 * delta @ self.steep
        others = delta @ self.flat.T
        apart = 0.1 * torch.arange(others.shape[1])  # so that DLR's quotient does not cancel the true logit
        return torch.cat([true[:, None], 0.01 * others + 20 * (others - 0.8).clamp_min(0) - apart], 1)


def test_a_margin_is_taken_apart_where_one_logit_drowns_the_other():
    """Networks trained by squared error stand at margins near 1 against PGD on any score: the best-known suite."""
    model = Imbalanced()
    weak = tuple(stage for stage in SUITES["standard"] if stage.attack != "md")
    assert evaluate(model, model.data, model.threat, weak).robust.all()
    assert not evaluate(model, model.data, model.threat, "standard").robust.any()
    _, findings, robust, _ = checked(model, model.data, model.threat)
    assert findings["decomposing the margin breaks no survivor"].fires
    assert robust.status == "refuted"
    found = evaluate(model, model.data, model.threat, "quick")
    assert int(found.robust.sum()) <= 8  # 32 of 40: quick takes the nearest apart


def test_a_score_that_leads_away_from_every_mistake_is_descended():
    """The gradient is turned round, and an attack that climbs goes where the model is surest: every suite."""
    honest = Linear()

    def model(x):
        z = honest(x)
        return 2 * z.detach() - z

    alone = (Stage("apgd", "apgd", "margin", settings={"steps": 20}),)
    assert evaluate(model, honest.data, honest.threat, alone).robust.sum() > honest.survives.sum() + 20
    _, findings, robust, _ = checked(model, honest.data, honest.threat, alone)
    assert findings["descending the score breaks no survivor"].fires
    assert robust.status in ("loose", "refuted")


def test_a_black_box_that_beats_gradients_counts_and_is_said():
    """Square breaks what gradients could not, and a line is printed that is not in the result: the best-known suite."""
    honest = Linear()

    def model(x):  # the same answers, no gradient
        return honest(x).detach()

    square = Stage("square", "square", "margin", settings={"steps": 300})
    alone = evaluate(model, honest.data, honest.threat, SHORT)
    assert alone.robust.sum() > honest.survives.sum() + 20
    found, findings, robust, _ = checked(model, honest.data, honest.threat, (*SHORT, square))
    assert found.robust.sum() < alone.robust.sum() - 10
    assert findings["a black box is not stronger"].fires
    assert robust.status == "loose"


# ----------------------------------------------------------------------------------------------------------- checks


def test_chance_is_looked_for_everywhere_and_rounding_is_none():
    """Only the first batch is asked twice, and 1e-4 of rounding is an alarm: the best-known suite."""
    model = Linear()
    late = torch.rand(len(model.data), generator=torch.Generator().manual_seed(1)) < 0.5
    late[:8] = False

    def jitter(x, size):
        z = model(x)
        return z * (1 + size * torch.randn(z.shape))

    def sometimes(x):  # chance in half of the samples, none of them among the first eight
        known = (x[:, None] - model.data.x).flatten(2).abs().amax(2)
        return torch.where(late[known.argmin(1)][:, None], jitter(x, 0.1), model(x))

    first = model.data.x[:8]
    assert torch.equal(sometimes(first), sometimes(first))  # the weak check sees nothing
    name = "outputs are repeatable"
    torch.manual_seed(0)
    _, findings, robust, _ = checked(sometimes, model.data, model.threat)
    assert findings[name].fires
    assert robust.status == "loose"  # judged by the majority of many answers
    rounding = partial(jitter, size=1e-4)
    torch.manual_seed(0)  # however many numbers the suite drew above
    assert (F.normalize(rounding(first)) - F.normalize(rounding(first))).norm(dim=1).max() > 1e-4
    assert not checked(rounding, model.data, model.threat)[1][name].fires


def test_one_lucky_pass_is_no_number():
    """A randomised model is attacked until one pass fails, and that counts: the best-known suite."""
    data, steps = numbers(*torch.linspace(0.6, 1.0, 60).tolist()), 20

    def model(x):  # right in 9 of 10 passes, at every point
        flip = torch.where(torch.rand(len(x), 1) < 0.1, -1.0, 1.0)
        return flip * threshold(x)

    torch.manual_seed(0)
    lucky = torch.stack([fooled(model(data.x), data.y) for _ in range(steps)]).any(0)
    assert (~lucky).float().mean() < 0.3
    found, _, robust, published = checked(model, data, Threat("linf", 0.05))
    assert found.votes == 32  # seen when it was asked twice
    assert found.robust.all()  # a candidate is judged by the majority of answers of its own, and 9 of 10 are right
    assert (robust.status, published.status) == ("loose", "loose")


def test_probabilities_in_place_of_logits_are_found():
    """A softmax output goes through another softmax, and its gradients fade: a suite that only logs it."""
    model = Linear(scale=1e3)

    def probabilities(x):
        return model(x).softmax(1)

    weak = evaluate(probabilities, model.data, model.threat, SHORT)
    assert weak.pgd50.sum() > model.survives.sum() + 20
    for answers, fires in ((probabilities, True), (model, False)):
        _, findings, robust, published = checked(answers, model.data, model.threat)
        assert findings["outputs are logits"].fires is fires
        assert ("tight" not in (robust.status, published.status)) is fires


def test_checks_answer_and_remember_nothing(capsys):
    """Findings are printed and a counter lives in the module, so the second model inherits from the first: a suite."""
    bad, good = Linear(scale=1e6), Linear()
    first = checked(good, good.data, good.threat)[1]
    assert checked(bad, bad.data, bad.threat)[1]["gradients of cross entropy are not zero"].fires
    again = checked(good, good.data, good.threat)[1]
    assert first == again
    assert not first["gradients of cross entropy are not zero"].fires
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ losses, training


def outputs(n=6, classes=4, dtype=torch.float32):
    chance = torch.Generator().manual_seed(0)
    z = torch.rand(n, classes, generator=chance, dtype=dtype).requires_grad_()
    h = torch.rand(n, 5, generator=chance, dtype=dtype).requires_grad_()
    return Outputs(z, h, (z * 2 + 1)), torch.arange(n) % classes


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_touches_no_global_state(name):
    """An option switches gradients on for the whole program: a loss of a popular model library."""

    def weak(out, y):
        torch.set_grad_enabled(True)
        return cross_entropy(out, y)

    out, y = outputs()
    with torch.no_grad():
        weak(out, y)
        assert torch.is_grad_enabled()
    kept, chance = [t.detach().clone() for t in out], torch.get_rng_state()
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            for function in (LOSSES[name].loss, LOSSES[name].score):
                value = function(out, y)
                assert torch.is_grad_enabled() is wanted
                assert value.requires_grad is wanted
    assert torch.equal(torch.get_rng_state(), chance)
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(now, before) for now, before in zip(out, kept, strict=True))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_owns_no_tensor_that_a_batch_could_change(name):
    """A loss holds the weights, and one float64 batch turns them to float64: the ArcFace of a metric library."""
    weak = nn.Parameter(torch.ones(3))
    weak.data = weak.data.to(torch.float64)  # what its forward does
    assert weak.dtype == torch.float64
    assert not isinstance(LOSSES[name].loss, nn.Module)
    head = HEADS[LOSSES[name].head](5, 4)
    for dtype in (torch.float64, torch.float32):
        out, y = outputs(dtype=dtype)
        assert LOSSES[name].loss(out, y).dtype == dtype
        LOSSES[name].loss(head(out.features.float()), y).sum().backward()
    assert all(p.dtype == torch.float32 for p in head.parameters())


def few_digits():
    from holdfast import data

    return data.load("digits", fold=(0, 5), limit_train=150)


def test_no_checkpoint_is_chosen_on_data_that_is_reported():
    """The best checkpoint is the best on the test set: two training codes, from which a field has copied."""
    chance, n = torch.Generator().manual_seed(0), 50
    guesses = (torch.rand(30, n, generator=chance) < 0.5).double().mean(1)  # 30 "epochs" of a coin
    assert guesses.max() > guesses.mean() + 0.1
    assert list(inspect.signature(fit).parameters)[:5] == ["model", "train", "val", "objective", "config"]
    split, found = few_digits(), []
    for val in (split.val, split.test):  # whatever is called val, it only fills the log
        model = models.build("smallconv", split.shape, 10)
        fit(model, split.train, val, standard(losses.sce), FitConfig(epochs=3, batch_size=50, lr=0.01), device="cpu")
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    test = {row.numpy().tobytes() for row in split.test.x}
    assert not test & {row.numpy().tobytes() for row in torch.cat([split.train.x, split.val.x])}


def test_the_inner_attack_leaves_modes_and_statistics_alone():
    """The inner attack of training runs in train mode, or leaves eval mode behind: two adversarial training codes."""
    split = few_digits()
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 10)).train()
    x, y = split.train.x[:40] / 255, split.train.y[:40]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objective = adversarial(losses.sce, Threat("linf", 0.1), steps=3)(0.0)
    x_adv = objective.perturb(model, x, y, Noise(0, torch.arange(40)))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not torch.equal(x_adv, x)
    model(x)  # what each step of the weak inner attack does
    assert model[0].num_batches_tracked == 1
