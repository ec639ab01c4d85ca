"""Contracts over every entry of OBJECTIVES, and what the min-max problem promises."""

from __future__ import annotations

import copy
import importlib
import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.helpers import training_state
from torch import nn

from holdfast.attacks import pgd
from holdfast.bounds import box_of, crown_ibp_bounds, interval_growth, logit_difference_bounds
from holdfast.errors import UserError
from holdfast.information.sources import SOURCES, source
from holdfast.losses import LOSSES, isce, mmc, negative_log_odds, negative_margin, sce
from holdfast.models import build
from holdfast.noise import Noise
from holdfast.objectives import (
    OBJECTIVES,
    Objective,
    adversarial,
    fast,
    free,
    friendly,
    interval,
    mart,
    standard,
    trades,
)
from holdfast.threat import Threat

SHAPE, N = (1, 6, 6), 8
EPS = {"linf": 0.1, "l2": 0.6, "l1": 2.0}
PROGRESS = (0.0, 0.37, 1.0)


class Normed(nn.Module):
    """A classifier with a frozen batch norm, a live one and a dropout before the head of the loss."""

    def __init__(self, head="linear"):
        super().__init__()
        self.net = build("mlp", SHAPE, 4, head=head)
        self.frozen, self.live, self.drop = nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.Dropout(0.3)
        self.train()
        self.frozen.eval()
        self.net.backbone.layers[1].bias.requires_grad_(False)

    def forward(self, x):
        return self.net(self.drop(self.live(self.frozen(x))))


def batch(dtype=torch.float32):
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return x, torch.arange(N) % 4, Noise(3, torch.arange(N))


def schedule(name, loss=sce, threat=None):
    """The objective with what its signature asks for: a new one is found here by itself."""
    wanted = inspect.signature(OBJECTIVES[name]).parameters
    given = {"loss": loss, "threat": threat or Threat("linf", 0.1)}
    if "steps" in wanted:
        given["steps"] = 3
    return OBJECTIVES[name](**{key: value for key, value in given.items() if key in wanted})


def network(name, head="linear"):
    """What the objective can train: interval bounds know chains alone. One weight is frozen, as in a Normed."""
    if name != "interval":
        return Normed(head)
    model = build("mlp", SHAPE, 4, head=head).train()
    model.backbone.layers[1].bias.requires_grad_(False)
    return model


every = pytest.mark.parametrize("name", list(OBJECTIVES))


@every
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("progress", PROGRESS)
def test_perturb_stays_in_the_threat_and_leaves_the_model_as_it_was(name, norm, progress):
    model, (x, y, noise), threat = Normed(), batch(), Threat(norm, EPS[norm])
    objective = schedule(name, threat=threat)(progress)
    assert isinstance(objective, Objective)
    before, kept = training_state(model), x.clone()
    x_adv = objective.perturb(model, x, y, noise)
    after = training_state(model)
    assert before[:2] == after[:2]
    assert all(torch.equal(before[2][key], after[2][key]) for key in before[2]), "batch statistics moved"
    assert torch.equal(x, kept)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert x_adv.isfinite().all()
    allowed = (
        replace(threat, eps=3 * threat.eps) if name == "fast" else threat
    )  # its start is wide, its step unprojected
    assert (allowed.violation(x_adv, x) == 0).all()


@every
@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_pays_per_sample_with_a_graph_to_every_weight(name, loss):
    entry = LOSSES[loss]
    model, (x, y, noise) = network(name, entry.head), batch()
    objective = schedule(name, loss=entry.loss)(0.5)
    x_adv = objective.perturb(model, x, y, noise)
    if name == "interval" and (entry.head != "linear" or entry.coupled):  # bounds are of logits, behind a linear head
        with pytest.raises(UserError):
            objective.loss(model, x, x_adv, y)
        return
    with objective.weight_context(model, x, x_adv, y):
        each = objective.loss(model, x, x_adv, y)
        assert each.shape == (N,)
        assert each.isfinite().all()
        each.mean().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.isfinite().all()) == parameter.requires_grad, key


@every
def test_perturb_depends_on_the_noise_alone(name):
    model, (x, y, noise) = Normed(), batch()
    objective = schedule(name)(0.0)
    first = objective.perturb(model, x, y, noise)
    torch.manual_seed(1)
    assert torch.equal(first, objective.perturb(model, x, y, noise))
    half = slice(0, N // 2)
    part = objective.perturb(model, x[half], y[half], noise[half])
    assert torch.allclose(part, first[half], atol=1e-6)


@every
def test_the_model_comes_back_when_perturb_fails(name):
    model, (x, y, noise) = Normed(), batch()
    before = training_state(model)
    model.net.backbone.register_forward_hook(lambda *_: 1 / 0)
    try:
        schedule(name)(0.0).perturb(model, x, y, noise)
    except ZeroDivisionError:
        pass
    else:
        assert name in ("standard", "interval", "free")
    assert before[:2] == training_state(model)[:2]


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "interval"])  # which bounds no Normed
def test_the_outer_loss_sees_the_network_in_train_mode(name):
    model, (x, y, noise) = Normed(), batch()
    modes = []
    model.live.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    objective = schedule(name)(0.0)
    x_adv = objective.perturb(model, x, y, noise)
    inner = len(modes)
    assert all(not training for training, _ in modes)
    objective.loss(model, x, x_adv, y)
    assert all(training and grad for training, grad in modes[inner:])
    assert len(modes) > inner
    assert model.live.num_batches_tracked == len(modes) - inner  # trades, mart: once for x, once for x_adv
    assert model.frozen.num_batches_tracked == 0


def test_standard_is_the_loss_on_the_images_as_they_are():
    model, (x, y, noise) = build("mlp", SHAPE, 4), batch()
    objective = standard(partial(isce, s=2.0))(0.0)
    assert torch.equal(objective.perturb(model, x, y, noise), x)
    assert torch.equal(objective.loss(model, x, x, y), isce(model(x), y, s=2.0))


def test_adversarial_is_the_loss_on_the_last_iterate_of_pgd():
    model, (x, y, noise), threat = build("mlp", SHAPE, 4), batch(), Threat("linf", 0.1)
    objective = adversarial(sce, threat, steps=4, step_size=0.03)(0.0)
    x_adv = objective.perturb(model, x, y, noise)
    expected = pgd(model, x, y, threat, score=negative_log_odds, noise=noise, steps=4, step_size=0.03, iterate="last")
    assert torch.equal(x_adv, expected)
    assert torch.equal(objective.loss(model, x, x_adv, y), sce(model(x_adv), y))
    assert (objective.loss(model, x, x_adv, y) > sce(model(x), y)).all()
    other = objective.perturb(model, x, y, noise.fold(1))
    assert not torch.equal(other, x_adv), "no random start"


def test_ten_steps_unless_told_otherwise():
    model, (x, y, noise), threat = build("mlp", SHAPE, 4), batch(), Threat("l2", 0.5)
    expected = pgd(model, x, y, threat, score=negative_log_odds, noise=noise, steps=10, step_size=0.125, iterate="last")
    assert torch.equal(adversarial(sce, threat)(0.0).perturb(model, x, y, noise), expected)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("s", [0.5, 5.0, 100.0])
def test_inference_information_in_the_inner_problem_makes_no_difference(norm, s):
    """Exactly, in float64: the score of I-SCE is SCE's, and its own gradient has SCE's direction."""
    model, (x, y, noise), threat = build("mlp", SHAPE, 4).double(), batch(torch.float64), Threat(norm, EPS[norm])
    plain = adversarial(sce, threat, steps=5)(0.0).perturb(model, x, y, noise)
    assert torch.equal(plain, adversarial(partial(isce, s=s), threat, steps=5)(0.0).perturb(model, x, y, noise))
    climbed = adversarial(sce, threat, steps=5, score=partial(isce, s=s))(0.0).perturb(model, x, y, noise)
    if norm == "linf":
        assert torch.equal(plain, climbed)
    assert torch.allclose(plain, climbed, rtol=0, atol=1e-9)


def test_the_inner_score_is_the_losss_own_unless_it_is_named():
    (x, y, noise), threat = batch(), Threat("linf", 0.1)
    model = build("mlp", SHAPE, 4, head="mmc")
    run = partial(pgd, model, x, y, threat, noise=noise, steps=10, iterate="last")
    assert torch.equal(adversarial(mmc, threat)(0.0).perturb(model, x, y, noise), run(score=negative_margin))
    named = adversarial(mmc, threat, score=mmc)(0.0).perturb(model, x, y, noise)
    assert torch.equal(named, run(score=mmc))


def test_a_loss_without_a_score_needs_one_named():
    def mine(out, y):
        return sce(out, y) * 2

    with pytest.raises(UserError, match="no score is known for the loss 'mine'"):
        adversarial(mine, Threat("linf", 0.1))
    model, (x, y, noise) = build("mlp", SHAPE, 4), batch()
    objective = adversarial(mine, Threat("linf", 0.1), score=negative_log_odds)(0.0)
    x_adv = objective.perturb(model, x, y, noise)
    assert torch.equal(objective.loss(model, x, x_adv, y), 2 * sce(model(x_adv), y))
    assert standard(mine)(0.0).loss(model, x, x, y).shape == (N,)


def test_no_steps_are_refused():
    x, y, noise = batch()
    with pytest.raises(UserError, match="steps >= 1"):
        adversarial(sce, Threat("linf", 0.1), steps=0)(0.0).perturb(build("mlp", SHAPE, 4), x, y, noise)


def test_a_few_rounds_of_it_make_a_network_more_robust():
    """What it is all for: on two classes that differ in many weak pixels and in one strong one."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    sign = (2 * y - 1).float()[:, None]
    strong, weak = 0.5 + 0.3 * sign, 0.5 + 0.05 * sign + 0.05 * torch.randn(200, 35, generator=generator)
    x, threat = torch.cat([strong, weak], 1).clamp(0, 1).view(200, *SHAPE), Threat("linf", 0.15)
    noise, robust = Noise(0, torch.arange(200)), {}
    start = build("linear", SHAPE, 2)
    for name, train in {"standard": standard(sce), "adversarial": adversarial(sce, threat, steps=5)}.items():
        model, objective = copy.deepcopy(start), train(0.0)
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for step in range(60):
            x_adv = objective.perturb(model, x, y, noise.fold(step))
            optimizer.zero_grad()
            objective.loss(model, x, x_adv, y).mean().backward()
            optimizer.step()
        worst = pgd(model, x, y, threat, score=negative_log_odds, noise=noise, steps=20)
        with torch.no_grad():
            robust[name] = float((model(worst).logits.argmax(1) == y).float().mean())
    assert robust["adversarial"] > 0.95
    assert robust["standard"] < 0.6


def test_fast_is_one_step_from_a_wide_start():
    model, (x, y, noise), threat = build("mlp", SHAPE, 4), batch(), Threat("linf", 0.1)
    begin = Threat("linf", 0.2).random_start(x, noise).requires_grad_()
    (grad,) = torch.autograd.grad(negative_log_odds(model(begin), y).sum(), begin)
    expected = (begin + 0.1 * grad.sign()).clamp(0, 1).detach()
    assert torch.allclose(fast(sce, threat)(0.0).perturb(model, x, y, noise), expected, atol=1e-6)


def test_free_starts_at_random_and_steps_with_the_projected_gradient():
    (x, y, noise), threat = batch(), Threat("linf", 0.1)
    objective = free(sce, threat, replays=3, step=0.5)(0.0)
    assert objective.replays == 3
    model = build("mlp", SHAPE, 4)
    x_adv = objective.perturb(model, x, y, noise)
    assert torch.equal(x_adv, threat.random_start(x, noise))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.min(torch.max(x_adv + 0.05 * grad.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    assert torch.allclose(objective.advance(x_adv, grad, x), expected, atol=1e-7)
    ramped = free(sce, threat, ramp=0.5, factor=2.0)(0.25)
    assert torch.equal(ramped.perturb(model, x, y, noise), threat.random_start(x, noise))


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_friendly_leaves_a_sample_so_many_steps_after_its_first_mistake(extra):
    """One sample at a time, as the paper's loop does it."""
    model, (x, y, noise), threat = build("mlp", SHAPE, 4), batch(), Threat("linf", 0.4)
    start, expected, taken = threat.random_start(x, noise), [], []
    for i in range(N):
        x_adv, left, steps = start[i : i + 1], extra, 0
        for _ in range(12):
            point = x_adv.detach().requires_grad_()
            z = model(point).logits
            if int(z.argmax(1)) != y[i]:
                if left == 0:
                    break
                left -= 1
            (grad,) = torch.autograd.grad(negative_log_odds(model(point), y[i : i + 1]).sum(), point)
            x_adv = torch.min(torch.max(point + 0.02 * grad.sign(), x[i] - 0.4), x[i] + 0.4).clamp(0, 1).detach()
            steps += 1
        expected.append(x_adv)
        taken.append(steps)
    objective = friendly(sce, threat, steps=12, step_size=0.02, extra=extra)(0.0)
    rows = []
    hook = model.register_forward_hook(lambda module, images, out: rows.append(len(images[0])))
    assert torch.allclose(objective.perturb(model, x, y, noise), torch.cat(expected), atol=1e-6)
    hook.remove()
    assert min(taken) == extra < max(taken), "the network should be wrong on some samples at the start, and not on all"
    assert sum(rows) <= sum(taken) + N, "samples that are done were computed along"


def test_friendly_without_mistakes_is_adversarial():
    model, (x, _, noise), threat = build("mlp", SHAPE, 4), batch(), Threat("linf", 0.001)
    with torch.no_grad():
        y = model(x).logits.argmax(1)
    one, other = (make(sce, threat, steps=3)(0.0).perturb(model, x, y, noise) for make in (friendly, adversarial))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("progress", "steps"), [(0.0, 1), (0.19, 1), (0.2, 2), (0.45, 3), (0.8, 4), (1.0, 4)])
def test_a_curriculum_increases_the_steps(progress, steps):
    model, (x, y, noise), threat = build("mlp", SHAPE, 4), batch(), Threat("linf", 0.1)
    expected = adversarial(sce, threat, steps=steps)(0.0).perturb(model, x, y, noise)
    for make in (adversarial, friendly):
        passes = []
        hook = model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        x_adv = make(sce, threat, steps=4, curriculum=0.8)(progress).perturb(model, x, y, noise)
        hook.remove()
        assert len(passes) == steps
        assert make is friendly or torch.equal(x_adv, expected)


@pytest.mark.parametrize("name", ["adversarial", "trades", "mart"])
def test_batch_statistics_of_the_attack_are_a_choice(name):
    model, (x, y, noise), threat = Normed(), batch(), Threat("linf", 0.1)
    make = partial(OBJECTIVES[name], sce, threat, steps=3)
    before = training_state(model)
    frozen = make(batch_norm="eval")(0.0).perturb(model, x, y, noise)
    live = make(batch_norm="train")(0.0).perturb(model, x, y, noise)
    assert not torch.equal(frozen, live)
    after = training_state(model)
    assert all(torch.equal(before[2][key], after[2][key]) for key in before[2])


def test_trades_with_beta_zero_is_the_clean_loss_and_its_attack_climbs_the_divergence():
    from holdfast.objectives import divergence

    model, (x, y, noise), threat = build("mlp", SHAPE, 4), batch(), Threat("linf", 0.1)
    x_adv = trades(sce, threat)(0.0).perturb(model, x, y, noise)
    assert torch.equal(trades(sce, threat, beta=0.0)(0.0).loss(model, x, x_adv, y), sce(model(x), y))
    z = model(x).logits
    random = divergence(z, model(threat.random_start(x, noise)).logits)
    assert (divergence(z, model(x_adv).logits) > random).all()


def test_mart_with_weight_zero_is_the_boosted_cross_entropy():
    model, (x, y, _) = build("mlp", SHAPE, 4), batch()
    p = torch.softmax(model(x).logits, 1)
    rival = p.scatter(1, y[:, None], 0).amax(1)
    expected = -p.gather(1, y[:, None])[:, 0].log() - (1 - rival).log()
    assert torch.allclose(mart(sce, Threat("linf", 0.1), weight=0.0)(0.0).loss(model, x, x, y), expected, atol=1e-5)


def test_awp_raises_the_loss_inside_and_restores_every_weight_outside():
    model, (x, y, noise), threat = Normed(), batch(), Threat("linf", 0.1)
    model.drop.p = 0.0
    objective = adversarial(sce, threat, steps=2, awp=0.05)(0.0)
    x_adv = objective.perturb(model, x, y, noise)
    before, (_, _, kept) = objective.loss(model, x, x_adv, y).mean().item(), training_state(model)
    with objective.weight_context(model, x, x_adv, y):
        moved = [(name, p) for name, p in model.named_parameters() if not torch.equal(p, kept[name])]
        assert {name for name, _ in moved} == {n for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
        for name, p in moved:  # as far as gamma says
            assert torch.allclose((p - kept[name]).norm(), 0.05 * kept[name].norm(), rtol=1e-3)
        inside = objective.loss(model, x, x_adv, y).mean().item()
    assert inside > before
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], kept[name]) for name in after)


@pytest.mark.parametrize("name", list(SOURCES))
def test_every_source_pays_with_a_graph_and_lies_where_it_should(name):
    model, (x, y, noise), threat = build("mlp", SHAPE, 4), batch(), Threat("linf", 0.05)
    given = source(f"{name}:3" if name == "class" else name, threat, torch.tensor([9, 9, 9, 9]))
    objective = adversarial(isce, threat, s=given, steps=5)(1.0)
    x_adv = objective.perturb(model, x, y, noise)
    each = objective.loss(model, x, x_adv, y)
    assert each.shape == (N,)
    assert (each > sce(model(x), y) - 1e-6).all() or not given.needs_attack
    each.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_interval_training_warms_up_on_clean_images_and_mixes_bounds_with_an_attack():
    model, (x, y, noise), threat = network("interval"), batch(), Threat("linf", 0.1)
    model.eval()
    warm = interval(sce, threat, warmup=0.2, steps=2)(0.1)
    assert torch.equal(warm.perturb(model, x, y, noise), x)
    assert torch.equal(warm.loss(model, x, x, y), sce(model(x), y))
    attacked, bounds = adversarial(sce, threat, steps=2)(1.0), interval(sce, threat, kappa=0.0)(1.0)
    mixed = interval(sce, threat, kappa=0.7, warmup=0.2, ramp=0.5, steps=2)(0.9)
    x_adv = mixed.perturb(model, x, y, noise)
    assert torch.equal(x_adv, attacked.perturb(model, x, y, noise))
    parts = 0.7 * attacked.loss(model, x, x_adv, y) + 0.3 * bounds.loss(model, x, x, y)
    assert torch.allclose(mixed.loss(model, x, x_adv, y), parts)
    wider = interval(sce, threat, steps=1, attack_factor=2.0, step_size=1.0)(1.0).perturb(model, x, y, noise)
    assert float((wider - x).abs().max()) == pytest.approx(0.2, abs=1e-6)


def test_a_clean_loss_without_weight_asks_for_no_attack_and_still_passes_the_network():
    """A process group averages gradients after a forward pass of its own with a graph, and batch norms see images."""
    model, (x, y, noise), threat = network("interval"), batch(), Threat("linf", 0.1)
    objective = interval(sce, threat, kappa=0.0, ramp=0.5, steps=2)(1.0)
    assert objective.perturb(model, x, y, noise) is x
    seen = []
    model.register_forward_hook(lambda module, images, out: seen.append(out.logits.requires_grad))
    alone = interval(sce, threat, kappa=0.0)(1.0).loss(model, x, x, y)
    assert True in seen
    assert torch.equal(objective.loss(model, x, x, y), alone)


def test_the_regulariser_of_interval_training_fades_as_eps_increases():
    model, (x, y, _), threat = network("interval").double(), batch(torch.float64), Threat("linf", 0.1)
    plain, regular = interval(sce, threat, ramp=1.0), interval(sce, threat, ramp=1.0, regulariser=0.8)
    lo, hi = box_of(x, Threat("linf", 0.025))
    _, growth = interval_growth(model, lo, hi, y)
    added = regular(0.25).loss(model, x, x, y) - plain(0.25).loss(model, x, x, y)
    assert torch.allclose(added, 0.6 * growth.expand(N))
    assert growth > 0
    assert torch.equal(regular(1.0).loss(model, x, x, y), plain(1.0).loss(model, x, x, y))


def test_interval_training_goes_from_lines_to_intervals():
    model, (x, y, _), threat = network("interval").double(), batch(torch.float64), Threat("linf", 0.1)

    def bounds(bound, progress):
        return interval(sce, threat, kappa=0.0, ramp=1.0, bound=bound)(progress).loss(model, x, x, y)

    lo, hi = x - 0.05, x + 0.05
    lo, hi = lo.clamp_min(0), hi.clamp_max(1)
    by_lines = logit_difference_bounds(model, lo, hi, y, "crown")
    by_intervals = logit_difference_bounds(model, lo, hi, y)
    half = 0.5 * sce(model(x), y) + 0.5 * sce((by_lines + by_intervals) / 2, y)
    assert torch.allclose(bounds("crown-interval", 0.5), half)
    assert torch.allclose(bounds("crown", 0.5), 0.5 * sce(model(x), y) + 0.5 * sce(by_lines, y))
    assert torch.allclose(bounds("crown-interval", 1.0), bounds("interval", 1.0))


@pytest.mark.parametrize("name", ["interval", "smallconv", "lipconv"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lines_and_intervals_of_one_step_share_their_boxes(name, share, monkeypatch):
    """The same bounds, growth and gradients as by one call for each, from boxes that are computed once."""
    model = network("interval") if name == "interval" else build(name, SHAPE, 4)
    model, (x, y, _) = model.double().eval().requires_grad_(True), batch(torch.float64)
    lo, hi = box_of(x, Threat("linf", 0.02))
    intervals, growth = interval_growth(model, lo, hi, y)
    crown = logit_difference_bounds(model, lo, hi, y, "crown")
    expected = share * crown + (1 - share) * intervals
    weights = torch.rand(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def grads(bounds, growth):
        weighted = (weights * bounds).sum() + growth
        found = torch.autograd.grad(weighted, list(model.parameters()), allow_unused=True)
        return [
            torch.zeros_like(weight) if grad is None else grad
            for grad, weight in zip(found, model.parameters(), strict=True)
        ]

    module, passes = importlib.import_module("holdfast.bounds.interval"), []
    for pass_ in ("forward", "upper_differences"):
        real = getattr(module, pass_)
        monkeypatch.setattr(module, pass_, lambda *args, real=real, **more: passes.append(1) or real(*args, **more))
    found, grown = crown_ibp_bounds(model, lo, hi, y, share, tolerance=0.5)
    assert len(passes) == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grown, growth, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(grads(found, grown), grads(expected, growth), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    bounds, none = crown_ibp_bounds(model, lo, hi, y, share)
    assert torch.equal(bounds, found)
    assert float(none) == 0.0
    assert len(passes) == 2


@pytest.mark.parametrize("bound", ["crown", "crown-interval"])
def test_a_step_of_interval_training_computes_boxes_once(bound, monkeypatch):
    model, (x, y, _) = network("interval"), batch()
    module, passes = importlib.import_module("holdfast.bounds.interval"), []
    for pass_ in ("forward", "upper_differences"):
        real = getattr(module, pass_)
        monkeypatch.setattr(module, pass_, lambda *args, real=real, **more: passes.append(1) or real(*args, **more))
    objective = interval(sce, Threat("linf", 0.1), ramp=1.0, bound=bound, regulariser=0.5)(0.4)
    objective.loss(model, x, x, y).sum().backward()
    assert len(passes) == 1
    with pytest.raises(UserError, match=r"share, .* must lie in \[0, 1\], got 1.5"):
        crown_ibp_bounds(model, x, x, y, 1.5)


def test_s_from_the_attack_is_adversarial_training_and_s_from_intervals_is_interval_training():
    model, (x, y, noise), threat = build("mlp", SHAPE, 4).double(), batch(torch.float64), Threat("linf", 0.05)
    x_adv = adversarial(sce, threat)(1.0).perturb(model, x, y, noise)

    def paid(text):
        return adversarial(isce, threat, s=source(text, threat))(1.0).loss(model, x, x_adv, y)

    assert torch.allclose(paid("attack"), sce(model(x_adv), y), atol=1e-10)
    assert torch.allclose(paid("ibp"), interval(sce, threat, kappa=0.0)(1.0).loss(model, x, x, y), atol=1e-10)
    assert torch.allclose(paid("mix:0"), paid("attack"), atol=1e-10)
    assert torch.allclose(paid("mix:1"), paid("ibp"), atol=1e-10)
    assert (paid("ibp") >= paid("attack")).all()


def test_the_gradient_source_is_exact_for_a_linear_model():
    model, (x, y, _), threat = build("linear", SHAPE, 2), batch(), Threat("linf", 0.01)
    y = y % 2
    s = source("gradient:1", threat)
    weight = model.head.linear.weight
    slope = (weight[0] - weight[1]).abs().sum()
    expected = isce(model(x), y, s=(0.01 * slope).item())
    assert torch.allclose(standard(isce, s=s)(0.0).loss(model, x, x, y), expected, atol=1e-5)


def test_a_source_that_needs_an_attack_says_so():
    with pytest.raises(UserError, match="'adversarial'"):
        standard(isce, s=source("attack", Threat("linf", 0.1)))
    with pytest.raises(UserError, match="Did you mean"):
        source("lipshitz", Threat("linf", 0.1))
    with pytest.raises(UserError, match="needs a number"):
        source("class", Threat("linf", 0.1))


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("adversarial", {"awp": -0.1}, "awp must be >= 0"), ("mart", {"batch_norm": "both"}, "'eval' or 'train'"),
    ("trades", {"ramp": 1.5}, "ramp"), ("fast", {"step": 0.0}, "step must be > 0"),
    ("interval", {"kappa": 2.0}, "kappa"), ("free", {"replays": 0}, "replays"), ("free", {"step": 0.0}, "step must be"),
    ("free", {"ramp": -0.5}, "ramp"), ("free", {"factor": 0.0}, "factor"), ("friendly", {"extra": -1}, "extra"),
    ("friendly", {"steps": 0}, "steps >= 1"), ("adversarial", {"curriculum": 1.5}, "curriculum"),
    ("interval", {"bound": "crwon"}, "crown"),
    ("interval", {"regulariser": -0.5}, "regulariser"),
    ("interval", {"warmup": 1.5}, "warmup"),
    ("interval", {"attack_factor": 0.0}, "attack_factor"),
    ("interval", {"steps": -1}, "steps"),
])  # fmt: skip
def test_what_cannot_work_is_refused_at_once(name, settings, message):
    with pytest.raises(UserError, match=message):
        OBJECTIVES[name](sce, Threat("linf", 0.1), **settings)


def test_mart_and_free_take_no_s_that_an_attack_measures():
    threat = Threat("linf", 0.1)
    with pytest.raises(UserError, match=r"at x_adv.*take 'adversarial'"):
        free(isce, threat, s=source("attack", threat))
    with pytest.raises(UserError, match=r"at x_adv.*take 'adversarial'"):
        mart(isce, threat, s=source("attack", threat))
