"""The attack of the public code of I-SCE: with no ball, in the ball, and the waterfall from one figure to the other."""

import pytest
import torch
from tests.helpers import LinearModel, noise_of, random_images

from holdfast.attacks import ATTACKS, cross_entropy
from holdfast.data import Data, pixels
from holdfast.errors import UserError
from holdfast.evaluation import SUITES, Stage, evaluate
from holdfast.experiments.as_coded import CHANGES, Measured, as_coded_waterfall, switched, unprojected
from holdfast.losses import isce_c
from holdfast.threat import Threat

SIDE = 4


def linear(n=60, wrong=True):
    """(model, data): a linear network in float32, and the labels that it predicts, every fourth one wrong."""
    model = LinearModel(4, SIDE**2, dtype=torch.float32, center=0.5, bias=0.1)
    x = random_images(n, side=SIDE)
    y = model(x).argmax(1).detach()
    if wrong:
        y[::4] = model(x[::4]).topk(2).indices[:, 1]
    return model, Data(x, y, torch.arange(n))


def by_hand(model, data, loss, steps, step_size):
    """The code's attack, written down again: x <- clip(x + a sign(g)), labels fixed to the first prediction."""
    x = pixels(data.x)
    label, x_adv = model(x).argmax(1), x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(x_adv), label).sum(), x_adv)
        x_adv = (x_adv + step_size * grad.sign()).clamp(0, 1).detach()
    return x_adv


@pytest.mark.parametrize(("trained_with", "loss"), [(None, cross_entropy), ("isce_c", isce_c)])
def test_without_a_ball_it_is_the_codes_attack_and_says_how_far_it_went(trained_with, loss):
    model, data = linear()
    x_adv = by_hand(model, data, loss, 7, 0.03)
    found = unprojected(model, data, trained_with=trained_with, steps=7, step_size=0.03)
    assert found.correct == int((model(x_adv).argmax(1) == data.y).sum())
    change = (x_adv - data.x).flatten(1)
    assert found.linf == pytest.approx(255 * float(change.abs().max()), rel=1e-5)
    assert found.linf == pytest.approx(255 * 0.21, rel=1e-4)  # 7 steps of 0.03, not 0.03
    assert found.l2 == pytest.approx(255 * float(change.norm(dim=1).max()), rel=1e-5)
    few = {"score": loss, "noise": noise_of(60), "steps": 7, "step_size": 0.03}
    again = ATTACKS["as_coded"].attack(model, data.x, data.y, Threat("linf", 1.0), **few)
    assert torch.equal(again, x_adv)


def test_a_misclassified_image_driven_out_of_its_wrong_class_counts_as_correct():
    """So the printed figure may exceed clean accuracy's share of what stays; in the ball with true labels it cannot."""
    model, data = linear()
    wrong = data.take(torch.arange(len(data)) % 4 == 0)
    assert int((model(wrong.x).argmax(1) == wrong.y).sum()) == 0
    assert unprojected(model, wrong, steps=3, step_size=0.02).correct > len(wrong) // 2
    true = Stage("true", "as_coded", "train_loss", settings={"steps": 3, "step_size": 0.02, "away_from": "true"})
    assert int(evaluate(model, wrong, "linf:0.02", (true,)).robust.sum()) == 0


def test_an_evaluation_projects_it_so_that_no_image_outside_the_threat_breaks_anything():
    model, data = linear(wrong=False)
    stage = Stage("coded", "as_coded", "train_loss", settings={"steps": 10, "step_size": 0.05}, individual=True)
    in_ball, all_of_it = (evaluate(model, data, Threat("linf", eps), (stage,)) for eps in (0.05, 0.5))
    assert all(cost.outside == 0 for cost in (*in_ball.stages, *all_of_it.stages))
    assert (in_ball.x_adv - data.x).abs().max() <= 0.05 + 1e-6
    free = unprojected(model, data, steps=10, step_size=0.05)
    assert free.correct == int(all_of_it.attack_correct["coded"].sum())  # a true figure of the ball that it fills
    assert free.correct < int(in_ball.attack_correct["coded"].sum())


def test_the_suite_has_the_attack_and_all_that_stands_beside_it():
    names = [stage.name for stage in SUITES["as-coded"] if stage.individual]
    assert names == ["as-coded-5", "as-coded-50", "pgd50", "pgd50-train-loss", "pgd50-matched"]
    assert all(stage in SUITES["as-coded"] for stage in SUITES["standard"])


@pytest.fixture(scope="module")
def waterfall(batch_statistics):
    net, split = batch_statistics
    test, seen = split.test.take(slice(0, 24)), []
    with pytest.MonkeyPatch.context() as patch:  # the attacks are the same, and short
        patch.setattr("holdfast.experiments.as_coded.MOST_STEPS", 20)
        patch.setitem(SUITES, "as-coded", SUITES["as-coded"][:1])
        running = switched(net, "running")  # it begins with batch statistics all the same
        found, evaluation = as_coded_waterfall(running, test, step_size=0.15, progress=lambda *said: seen.append(said))
    return net, test, found, evaluation, seen


def test_the_waterfall_changes_one_thing_at_a_time(waterfall):
    net, test, found, evaluation, seen = waterfall
    assert [row.name for row in found] == list(CHANGES)
    assert {row.n for row in found} == {24}
    first = unprojected(net, test, trained_with="isce_c", steps=5, step_size=0.15)
    assert (first.correct, first.linf, first.l2) == (found[0].correct, found[0].linf, found[0].l2)
    assert found[0].linf > 2 * 255 * 0.15
    assert all(row.linf <= 255 * 0.15 + 1e-3 for row in found[1:])
    bounds = [row.correct for row in found[4:]]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] <= int(evaluation.robust.sum())
    assert found[1].correct - bounds[-1] >= 3, "the ball's figure as coded is too high, or this case shows nothing"
    assert [said[0] for said in seen] == [*CHANGES, "done"]


def test_its_first_figures_are_those_of_the_attack_by_itself(waterfall):
    net, test, found, *_ = waterfall
    x, y, threat = pixels(test.x), test.y, Threat("linf", 0.15)
    running = switched(net, "running")
    for row, model, labels in ((1, net, "predicted"), (2, net, "true"), (3, running, "true")):
        few = {"score": isce_c, "noise": noise_of(24), "steps": 5, "away_from": labels}
        x_adv = ATTACKS["as_coded"].attack(model, x, y, threat, **few)
        with torch.no_grad():
            assert found[row].correct == int((model(x_adv).logits.argmax(1) == y).sum())


def test_the_figure_is_never_without_the_change(waterfall):
    row = waterfall[2][0]
    assert f"{row.accuracy.value:.1%}"[:-1] in str(row)
    assert "255 in l2" in str(row)
    assert Measured("a", 0, 5, 1.0, 2.0).accuracy.low == 0


def test_what_it_refuses(batch_statistics):
    net, split = batch_statistics
    few = split.test.take(slice(0, 4))
    with pytest.raises(UserError, match="did you mean a 255th"):
        unprojected(net, few, step_size=2.0)
    with pytest.raises(UserError, match="steps must be"):
        unprojected(net, few, steps=0)
    with pytest.raises(UserError, match="data set is empty"):
        unprojected(net, few.take(slice(0, 0)))
    with pytest.raises(UserError, match="must be a torch module"):
        as_coded_waterfall(lambda x: x.flatten(1), few)
    given = {"score": cross_entropy, "noise": noise_of(4), "away_from": "guessed"}
    with pytest.raises(UserError, match=r"unknown class to move away from 'guessed'.*Known: predicted, true"):
        ATTACKS["as_coded"].attack(net, pixels(few.x), few.y, Threat("linf", 0.1), **given)


def test_a_network_without_a_switch_is_the_same_with_all_statistics(digits):
    assert switched(digits[0], "running") is switched(digits[0], "batch") is digits[0]
