"""The faulty models: honest at harmless severities, right on clean images where claimed, total at the last."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from tests.faults.calibration_nets import PLANS, ROLES, networks
from tests.faults.faulty_models import FAULTY

from holdfast import data, losses, models
from holdfast.attacks import ATTACKS, cross_entropy, fooled
from holdfast.attacks.base import predict, score_and_grad
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.losses import negative_log_odds, negative_margin
from holdfast.noise import Noise
from holdfast.objectives import standard
from holdfast.outputs import as_outputs, frozen_eval
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

THREAT = Threat("linf", 0.1)
HARMLESS = [(name, severity) for name, faulty in FAULTY.items() for severity in faulty.harmless]
EXACT = 0.0  # not one prediction changes
KEEPS = {  # how much clean accuracy a faulty model may cost at any severity; the others change predictions by design
    **dict.fromkeys(("logit_scale", "temperature", "softmax_output", "detached_graph", "gradient_flip"), EXACT),
    **dict.fromkeys(("keeps_state", "nan_off_grid", "decoy_gradient", "batch1_raises", "remembers"), EXACT),
    **dict.fromkeys(("plateau", "off_grid", "honest_alone", "honest_at_first", "gradient_mode"), EXACT),
    "half_logits": 0.01,
    "half_network": 0.02,
    "shattered": 0.02,
    "train_batch_norm": 0.03,
}
UP_TO = {  # (the last severity that keeps clean accuracy, how nearly)
    "quantised_input": (4, 0.05),
    "noise": (0.05, 0.05),
    "dropout": (0.1, 0.08),
    "out_of_range_guard": (0.2, 0.05),
    "kwta": (0.3, 0.1),
    "nan_midway": (3, EXACT),
}
HIDES = {  # severity: PGD on cross-entropy finds next to nothing, square what it finds on the honest model
    "logit_scale": 1e6,
    "temperature": 1e-3,
    "half_logits": 1000.0,
    "shattered": 0.1,
    "quantised_input": 4.0,
    "detached_graph": 1.0,
    "gradient_flip": 1.0,
}


@pytest.fixture(scope="module")
def split():
    return data.load("digits", fold=(0, 5), limit_train=600)


@pytest.fixture(scope="module")
def honest(split):
    mean, std = data.standardisation(split.train)
    model = models.build("smallconv", split.shape, len(split.classes), mean=mean, std=std)
    fit(model, split.train, split.val, standard(losses.sce), FitConfig(epochs=15, batch_size=64, lr=3e-3), device="cpu")
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def seen(split):
    """100 test images."""
    return split.test.take(slice(0, 100))


@pytest.fixture(scope="module")
def x(seen):
    return data.pixels(seen.x)


def faulty(name, honest, severity=None):
    """At its last severity, if none is named."""
    return FAULTY[name].make(honest, FAULTY[name].severities[-1] if severity is None else severity)


def accuracy(model, x, y):
    return float((predict(model, x).logits.argmax(1) == y).float().mean())


def robust(model, seen, name, **settings):
    """What survives one attack."""
    x = data.pixels(seen.x)
    x_adv = ATTACKS[name].attack(model, x, seen.y, THREAT, noise=Noise(0, seen.index), **settings)
    return 1 - float(fooled(predict(model, x_adv).logits, seen.y).float().mean())


def by_pgd(model, seen, score=cross_entropy):
    return robust(model, seen, "pgd", score=score, steps=20)


def by_square(model, seen):
    return robust(model, seen, "square", score=negative_margin, steps=300)


def without_gradient(model, x, y, score):
    """The share of samples whose gradient is zero in every pixel."""
    return float((score_and_grad(model, x, score, y)[2].flatten(1).abs().amax(1) == 0).float().mean())


def logit_sum(out, weights):
    """Every logit counts, their common shift too."""
    return (out.logits * weights).sum(1)


def test_the_honest_network_has_something_to_hide(honest, seen, x):
    assert accuracy(honest, x, seen.y) > 0.9
    assert by_pgd(honest, seen) < 0.7
    assert by_square(honest, seen) < 0.85


@pytest.mark.parametrize("name", FAULTY)
def test_severities_begin_harmless(name):
    entry = FAULTY[name]
    assert entry.about
    assert entry.severities[0] in entry.harmless
    assert set(entry.harmless) < set(entry.severities)
    assert len(set(entry.severities)) == len(entry.severities)


@pytest.mark.parametrize(("name", "severity"), HARMLESS)
def test_a_harmless_severity_is_the_honest_model(name, severity, honest, seen, x):
    model, weights = faulty(name, honest, severity), torch.linspace(-1, 2, 10).expand(len(x), 10)
    x = (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)  # off the grid too
    for score, goal in ((logit_sum, weights), (negative_log_odds, seen.y), (cross_entropy, seen.y)):
        out, _, grad = score_and_grad(model, x, score, goal)
        truth, _, right = score_and_grad(honest, x, score, goal)
        torch.testing.assert_close(out.logits, truth.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.features, truth.features)
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("name", [name for name in FAULTY if name != "wrong_shape"])
def test_features_pass_through(name, honest, x):
    out = as_outputs(faulty(name, honest)(x))
    assert out.logits.shape == (len(x), 10)
    assert out.features is not None
    assert out.features.shape == (len(x), 64)
    assert out.logits.dtype == out.features.dtype == torch.float32


@pytest.mark.parametrize("name", KEEPS)
def test_clean_accuracy_is_kept_at_every_severity(name, honest, seen, x):
    for severity in FAULTY[name].severities:
        lost = accuracy(honest, x, seen.y) - accuracy(faulty(name, honest, severity), x, seen.y)
        assert abs(lost) <= KEEPS[name], severity


@pytest.mark.parametrize("name", UP_TO)
def test_clean_accuracy_is_kept_up_to_a_severity(name, honest, seen, x):
    last, tolerance = UP_TO[name]
    torch.manual_seed(0)
    for severity in FAULTY[name].severities[: FAULTY[name].severities.index(last) + 1]:
        lost = accuracy(honest, x, seen.y) - accuracy(faulty(name, honest, severity), x, seen.y)
        assert lost <= tolerance, severity


def test_every_faulty_model_but_the_shapeless_has_its_accuracy_stated():
    assert {*KEEPS, *UP_TO, "wrong_shape"} == set(FAULTY)


@pytest.mark.parametrize("name", FAULTY)
def test_the_same_images_get_the_same_answer_unless_that_is_the_lie(name, honest, x):
    if name == "wrong_shape":
        return
    model = faulty(name, honest)
    first, second = predict(model, x).logits, predict(model, x).logits
    same = torch.equal(first.nan_to_num(1e9), second.nan_to_num(1e9))
    assert same == (name not in ("noise", "dropout", "keeps_state"))


@pytest.mark.parametrize("name", [name for name in FAULTY if name not in ("wrong_shape", "noise", "dropout")])
def test_a_copy_in_float64_tells_the_same_story(name, honest, x):
    """The checks compare the two: the copy must work, and agree where the severity is no matter of precision."""
    severity = FAULTY[name].severities[1]
    twin = copy.deepcopy(faulty(name, honest, severity)).double()
    out, truth = predict(twin, x.double()), predict(faulty(name, honest, severity), x)
    assert out.logits.dtype == torch.float64
    assert float((out.logits.argmax(1) == truth.logits.argmax(1)).double().mean()) >= 0.98


@pytest.mark.parametrize("name", HIDES)
def test_pgd_finds_little_and_square_what_was_there(name, honest, seen, x):
    model = faulty(name, honest, HIDES[name])
    assert by_pgd(model, seen) >= accuracy(model, x, seen.y) - 0.08  # what a random start breaks
    assert by_pgd(model, seen) - by_pgd(honest, seen) > 0.2
    assert by_square(model, seen) <= by_pgd(model, seen) - 0.05


def test_more_is_hidden_with_the_severity(honest, seen):
    for name in ("detached_graph", "gradient_flip", "shattered"):
        survives = [by_pgd(faulty(name, honest, severity), seen) for severity in FAULTY[name].severities]
        assert all(b >= a - 0.03 for a, b in pairwise(survives)), (name, survives)
        assert survives[-1] > survives[0] + 0.2


@pytest.mark.parametrize("name", ["logit_scale", "half_logits"])
def test_large_logits_leave_cross_entropy_no_gradient_but_the_gap_one(name, honest, seen, x):
    model = faulty(name, honest)
    assert without_gradient(model, x, seen.y, cross_entropy) > 0.8
    assert without_gradient(model, x, seen.y, negative_log_odds) < 0.05
    assert by_pgd(model, seen, negative_log_odds) < by_pgd(model, seen) - 0.2


def test_a_saturated_softmax_hides_from_the_gap_too(honest, seen):
    model = faulty("temperature", honest)
    assert by_pgd(model, seen, negative_log_odds) > by_pgd(honest, seen, negative_log_odds) + 0.1


@pytest.mark.parametrize("severity", FAULTY["quantised_input"].severities[1:])
def test_rounding_has_no_gradient_at_any_number_of_levels(severity, honest, seen, x):
    model = faulty("quantised_input", honest, severity)
    assert without_gradient(model, x, seen.y, negative_log_odds) == 1
    assert torch.equal(predict(model, x + 1e-6).logits, predict(model, x).logits) or severity == 256


def test_a_detached_graph_has_no_graph(honest, x):
    assert not faulty("detached_graph", honest)(x.clone().requires_grad_()).logits.requires_grad


def test_a_flipped_gradient_is_the_negative(honest, seen, x):
    flipped, right = (
        score_and_grad(model, x, negative_log_odds, seen.y)[2] for model in (faulty("gradient_flip", honest), honest)
    )
    torch.testing.assert_close(flipped, -right)
    half = score_and_grad(faulty("gradient_flip", honest, 0.5), x, negative_log_odds, seen.y)[2]
    assert int((half == right).all(0).sum()) >= 32
    assert int((half == -right).all(0).sum()) >= 32


def test_shattered_logits_are_close_and_their_gradients_are_not(honest, seen, x):
    model = faulty("shattered", honest)
    assert float((predict(model, x).logits - predict(honest, x).logits).abs().max()) <= 0.1001
    a, b = (score_and_grad(one, x, negative_log_odds, seen.y)[2].flatten(1) for one in (model, honest))
    assert float(torch.cosine_similarity(a, b).abs().mean()) < 0.3


def test_softmax_outputs_are_probabilities(honest, x):
    torch.testing.assert_close(predict(faulty("softmax_output", honest), x).logits.sum(1), torch.ones(len(x)))


def test_half_precision_is_seen_in_the_logits(honest, x):
    for name, severity, dtype in (
        ("half_logits", 1, torch.float16),
        ("half_network", 1, torch.float16),
        ("half_network", 2, torch.bfloat16),
    ):
        z = predict(faulty(name, honest, severity), x).logits
        assert torch.equal(z, z.to(dtype).float())
        assert not torch.equal(z, predict(honest, x).logits)


def test_half_logits_overflow_beyond_the_last_severity(honest, x):
    assert not bool(predict(faulty("half_logits", honest, 1e5), x).logits.isfinite().all())


def test_noise_moves_predictions_at_the_last_severity(honest, x):
    for name in ("noise", "dropout"):
        model = faulty(name, honest)
        assert bool((predict(model, x).logits.argmax(1) != predict(model, x).logits.argmax(1)).any()), name


def test_batch_norm_depends_on_batch_mates(honest, x):
    model = faulty("train_batch_norm", honest)
    alone = torch.cat([predict(model, one).logits for one in x.split(1)])
    together = predict(model, x).logits
    assert float(((alone - together).abs().amax(1) > 0.1).float().mean()) > 0.9


def test_few_winners_are_a_discontinuity(honest, seen, x):
    """On the way from an image to white, a step of a hundredth moves the logits more than honest ones ever do."""

    white = torch.ones_like(x[:20])

    def jump(model):
        line = [predict(model, x[:20].lerp(white, t)).logits for t in torch.linspace(0, 1, 101).tolist()]
        return max(float((b - a).abs().max()) for a, b in pairwise(line))

    assert jump(faulty("kwta", honest, 0.1)) > 5 * jump(honest)
    assert by_square(faulty("kwta", honest, 0.1), seen) < by_square(honest, seen)


def test_a_guard_sees_no_step_within_its_severity(honest, x):
    model, black = faulty("out_of_range_guard", honest, 0.1), x == 0
    moved = torch.where(black, 0.1, x)
    assert not torch.equal(predict(honest, moved).logits, predict(honest, x).logits)
    torch.testing.assert_close(predict(model, moved).logits, predict(model, x).logits)


def test_nan_comes_with_the_calls(honest, x):
    model = faulty("nan_midway", honest, 3)
    assert [bool(predict(model, x).logits.isfinite().all()) for _ in range(5)] == [True, True, True, False, False]


def test_nan_comes_off_the_grid(honest, x):
    model = faulty("nan_off_grid", honest)
    assert bool(predict(model, x).logits.isfinite().all())
    assert bool(predict(model, x * 0.999).logits.isnan().all())


def test_a_state_drifts(honest, seen, x):
    model = faulty("keeps_state", honest)
    before = model.state_dict()["calls"].clone()
    first = accuracy(model, x, seen.y)
    for _ in range(300):
        predict(model, x[:1])
    assert int(model.state_dict()["calls"] - before) == 301
    assert accuracy(model, x, seen.y) < first - 0.5


def test_one_image_alone_is_an_error(honest, x):
    model = faulty("batch1_raises", honest)
    assert len(predict(model, x[:2]).logits) == 2
    with pytest.raises(RuntimeError, match="batch of 2"):
        model(x[:1])


@pytest.mark.parametrize("severity", [1.0, 2.0])
def test_a_wrong_shape_is_refused(severity, honest, seen):
    with pytest.raises(UserError):
        evaluate(faulty("wrong_shape", honest, severity), seen, THREAT, ())


def test_nan_from_the_first_call_is_refused(honest, seen):
    with pytest.raises(UserError, match="NaN"):
        evaluate(faulty("nan_midway", honest, 0), seen, THREAT, ())


def test_a_faulty_model_is_an_ordinary_model_to_an_evaluation(honest, seen):
    found = evaluate(faulty("quantised_input", honest, 16), seen, THREAT, ())
    assert int((found.clean & ~found.pgd50).sum()) <= 3
    with frozen_eval(faulty("kwta", honest)):
        pass


def test_what_needs_a_relu_says_so(split):
    with pytest.raises(ValueError, match="ReLU"):
        faulty("kwta", models.build("linear", split.shape, 10))


def test_the_plans_of_the_calibration():
    for plans in (make() for make in PLANS.values()):
        assert len({plan.name for plan in plans}) == len(plans)
        assert {plan.role for plan in plans} <= set(ROLES)
    plans = PLANS["digits"]()
    held_out = [plan for plan in plans if plan.role == "heldout"]
    assert len(held_out) >= 12
    assert all(plan.honest for plan in held_out)
    assert not {plan.seed for plan in held_out} & {plan.seed for plan in plans if plan.role == "threshold"}
    assert [plan.honest for plan in plans if plan.role == "faulty"] == [True, False, False, False, False, False]
    assert math.inf in FAULTY["nan_midway"].harmless
    with pytest.raises(ValueError, match="kind"):
        networks("honest")
