"""Silent weaknesses of respected attack libraries, one a test: the weak variant goes wrong beside ours, which does not.

What evaluation, checks, training and losses can get wrong in silence is in test_weaknesses_of_suites.py.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.attacks import ATTACKS, MostAdversarial, apgd, bim, cross_entropy, fgsm, fooled, mim, pgd, square
from holdfast.losses import dlr, negative_log_odds, negative_margin
from holdfast.noise import Noise
from holdfast.outputs import Outputs, as_outputs, frozen_eval
from holdfast.threat import Threat

BALL = Threat("linf", 0.3)


def numbers(*values):
    """Images of one pixel, all of class 0."""
    return torch.tensor(values).view(-1, 1, 1, 1), torch.zeros(len(values), dtype=torch.int64)


def draw(n, seed=0):
    return Noise(seed, torch.arange(n))


def threshold(x, at=0.5):
    """Class 0 while the pixel is above ``at``."""
    p = x.flatten(1)[:, 0]
    return torch.stack([p - at, at - p], 1)


def island(low, high):
    """Class 1 only for low < pixel < high; the feature is the pixel, so whoever climbs it walks over the island."""

    def model(x):
        p = x.flatten(1)[:, 0]
        inside = torch.where((p > low) & (p < high), 1.0, -1.0)
        return Outputs(torch.stack([-inside, inside], 1), x.flatten(1))

    return model


def climb(out, y):
    return out.features[:, 0]


def wrong(model, x, y):
    """(N,) bool: what anybody sees who asks the model again."""
    with torch.no_grad():
        return fooled(as_outputs(model(x)).logits, y)


def halfway(needed):
    """An eps at which half of the samples fall, clear of each of them: at one's own eps rounding would decide."""
    low, high = needed.sort().values[len(needed) // 2 - 1 :][:2]
    return float(low + high) / 2


def linear(n=200, pixels=16, classes=2, scale=1.0, seed=0):
    """(model, x, y, needed): a linear model, images far from the box's walls, and the eps at which each of them falls.

    needed is exact for linf: the true logit's least lead over the l1 size of the difference of weights.
    """
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, pixels, generator=chance)
    x = 0.4 + 0.2 * torch.rand(n, 1, 4, pixels // 4, generator=chance)
    bias = -(weight @ x.flatten(1).mean(0))

    def model(x):
        return (x.flatten(1) @ weight.T + bias) * scale

    y = model(x).argmax(1)
    lead = (model(x) - model(x).gather(1, y[:, None])) / scale
    reach = (weight[None] - weight[y][:, None]).abs().sum(2)
    needed = (-lead / reach.clamp_min(1e-9)).masked_fill(F.one_hot(y, classes).bool(), torch.inf).amin(1)
    return model, x, y, needed


# ------------------------------------------------------------------------------------------------ what is returned


@pytest.mark.parametrize(
    ("attack", "place", "kept"),
    [
        (pgd, (0.32, 0.38), {"random_start": False, "step_size": 0.05}),
        (bim, (0.32, 0.38), {"step_size": 0.05}),
        (mim, (0.32, 0.38), {"step_size": 0.05}),
        (apgd, (0.0, 0.58), {}),
    ],
)
def test_a_success_on_the_path_is_not_lost(attack, place, kept):
    """The last iterate is all that comes back: PGD of three attack libraries, APGD of one more."""
    model, (x, y) = island(*place), numbers(0.3, 0.3)
    last = x
    for _ in range(6):
        last = BALL.project(last + 0.05, x)
    assert not wrong(model, last, y).any()
    assert wrong(model, attack(model, x, y, BALL, score=climb, noise=draw(2), steps=6, **kept), y).all()


def test_a_success_is_preferred_to_a_higher_loss():
    """The iterate of the best loss is kept, right or wrong: a modular attack toolbox."""
    model, (x, y), seen = island(0.32, 0.38), numbers(0.3), []

    def noted(x):
        seen.append(x.detach().clone())
        return model(x)

    x_adv = pgd(noted, x, y, BALL, score=climb, noise=draw(1), random_start=False, steps=6, step_size=0.05)
    walk = [BALL.project(x + 0.05 * step, x) for step in range(7)]
    best_loss = max(walk, key=lambda x: float(climb(model(x), y)))
    assert not wrong(model, best_loss, y).any()
    assert wrong(model, x_adv, y).all()
    assert len(seen) < len(walk)  # once fooled, it goes no further; and if it did:
    worst = MostAdversarial(x, y)
    for point in walk:
        worst.update(torch.tensor([0]), point, model(point).logits)
    assert wrong(model, worst.x, y).all()


def test_the_point_of_the_last_step_is_judged():
    """Judging before stepping, so that k steps are k - 1 and one step is none: a library of attack functions."""
    model, x, y, needed = linear()
    threat, few = Threat("linf", halfway(needed)), {"score": negative_log_odds, "noise": draw(len(x))}
    best, x_adv = x, x
    for _ in range(1):
        best = torch.where(wrong(model, x_adv, y).view(-1, 1, 1, 1), x_adv, best)
        x_adv = fgsm(model, x_adv, y, threat, **few)
    assert not wrong(model, best, y).any()  # "100% robust"
    one = pgd(model, x, y, threat, steps=1, step_size=threat.eps, random_start=False, **few)
    assert torch.equal(one, fgsm(model, x, y, threat, **few))
    assert wrong(model, one, y).sum() == (needed < threat.eps).sum() == len(x) // 2


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_every_restart_counts_for_every_sample(attack):
    """Only the last restart counts (a mask inverted as bytes), or the best one for the whole batch: two libraries."""
    n, restarts, threat = 120, 4, Threat("linf", 0.2)
    x, y = numbers(*[0.5] * n)

    def model(x):
        return threshold(-x.detach(), -0.6)  # no gradient: the random start decides, a quarter of them fool

    starts = [threat.random_start(x, draw(n).fold(restart)) for restart in range(restarts)]
    broken = torch.stack([wrong(model, start, y) for start in starts])
    last = torch.zeros_like(x)
    for start, fools in zip(starts, broken, strict=True):
        everyone = (~(~fools).byte()).bool()  # 254 and 255: true, both of them
        last[everyone] = start[everyone]
    assert torch.equal(wrong(model, last, y), broken[-1])
    batch_wise = broken[broken.sum(1).argmax()]
    found = wrong(
        model, attack(model, x, y, threat, score=negative_log_odds, noise=draw(n), steps=2, restarts=restarts), y
    )
    assert torch.equal(found, broken.any(0))
    assert found.sum() > batch_wise.sum() + 20
    assert found.sum() > broken[-1].sum() + 20


@pytest.mark.parametrize("name", ["pgd", "bim", "mim", "apgd"])
def test_a_targeted_run_counts_any_mistake(name):
    """Only the target reached is a success, a mistake on the way is thrown away: targeted APGD of two libraries."""

    def model(x):  # class 0 above 0.5, class 1 down to 0.3, class 2 beyond
        p = x.flatten(1)[:, 0]
        return torch.stack([p - 0.5, 0.5 - p, 1.1 - 3 * p], 1)

    x, y = numbers(0.55)
    target, threat = torch.tensor([2]), Threat("linf", 0.1)
    few = {"score": negative_margin, "noise": draw(1), "steps": 20}
    x_adv = ATTACKS[name].attack(model, x, y, threat, target=target, **few)
    reached = model(threat.project(x - 1, x)).argmax(1) == target
    assert not reached.any()  # the target is out of reach, so the weak count stays at zero
    assert wrong(model, x_adv, y).all()


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_nan_is_never_a_success(name):
    """NaN is the largest logit to argmax, so broken arithmetic counts as fooled: all that compare predictions alone."""

    def model(x):  # right wherever it is a number; off a narrow range the other logit is none
        p = x.mean((1, 2, 3))
        return torch.stack([p, torch.where((p > 0.55) & (p < 0.75), -p, torch.nan)], 1)

    x, y = torch.full((2, 1, 2, 2), 0.65), torch.zeros(2, dtype=torch.int64)
    assert (model(x - 0.2).argmax(1) != y).all()
    assert not wrong(model, x - 0.2, y).any()
    few = {"iterate": "best"} if name == "as_coded" else {}  # by default it evaluates no point
    x_adv = ATTACKS[name].attack(model, x, y, Threat("linf", 0.2), score=negative_log_odds, noise=draw(2), **few)
    assert x_adv.isfinite().all()
    assert not wrong(model, x_adv, y).any()
    assert model(x_adv).isfinite().all()  # a point that can be judged is preferred


# ------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projection_moves_what_is_outside_and_only_that(norm):
    """A factor that is always 1, or one that puts every point on the sphere: the FMN of two attack libraries."""
    threat, x = Threat(norm, 1.0, lo=-9, hi=9), torch.zeros(2, 4)
    v = torch.tensor([[0.1, -0.2, 0.1, 0.1], [3.0, -1.0, 2.0, 0.5]])
    size = threat.size(v)[:, None]
    identity = v * torch.minimum(torch.ones(1), size / size)
    pushed = v / size
    assert threat.size(identity)[1] > 2
    assert not torch.allclose(pushed[0], v[0])
    ours = threat.project(x + v, x)
    assert torch.equal(ours[0], v[0])
    assert threat.size(ours)[1] == pytest.approx(1.0, abs=1e-6)


def test_pixels_stay_in_their_own_box():
    """A box as wide as the normalised channels allow together, or none: attacks on images normalised outside."""
    mean, std = torch.tensor([0.2, 0.6]).view(2, 1, 1), torch.tensor([0.2, 0.4]).view(2, 1, 1)

    def model(x):  # wrong only where no pixel can be: a first channel below zero
        p = x[:, 0].flatten(1)[:, 0]
        return torch.stack([p + 0.01, -p - 0.01], 1)

    x, y, threat = torch.full((3, 2, 1, 1), 0.05), torch.zeros(3, dtype=torch.int64), Threat("linf", 0.1)
    low = ((0 - mean) / std).min()  # the smallest value that any channel may have
    moved = ((x - 0.1 - mean) / std).clamp_min(low) * std + mean
    assert wrong(model, moved, y).all()  # "0% robust"
    for name, entry in ATTACKS.items():
        x_adv = entry.attack(model, x, y, threat, score=negative_log_odds, noise=draw(3))
        assert (x_adv >= 0).all(), name
        assert not wrong(model, x_adv, y).any(), name


def test_eps_is_measured_in_pixels():
    """Attacks on normalised tensors, whose eps is another one: the first question in one library's issues."""
    mean, std, threat = 0.5, 0.25, Threat("linf", 0.1)
    x, y = numbers(0.52, 0.58, 0.65)

    def inner(z):
        return threshold(z * std + mean)

    def whole(x):
        return inner((x - mean) / std)

    z = (x - mean) / std
    few = {"score": negative_log_odds, "noise": draw(3), "steps": 10}
    weak = pgd(inner, z, y, Threat("linf", 0.1, -2, 2), **few) * std + mean
    assert wrong(whole, weak, y).tolist() == [True, False, False]  # eps was 0.025
    assert wrong(whole, pgd(whole, x, y, threat, **few), y).tolist() == [True, True, False]


def test_rounding_is_no_violation():
    """size < eps (or <= eps) in float32 refuses points that the projection itself has made: two libraries."""
    x, far = 0.8 * torch.rand(2, 4096, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for norm, eps in (("linf", 8 / 255), ("l2", 0.1), ("l1", 0.1)):
        threat = Threat(norm, eps)
        x_adv = threat.project(x + far + 0.2, x)
        size = threat.size(x_adv - x)
        assert (size > eps).sum() > 20  # what <= refuses; < refuses more
        assert (threat.violation(x_adv, x) == 0).all()
        assert (threat.violation(x_adv + 1e-5, x) > 0).all()


@pytest.mark.parametrize("attack", [pgd, bim, mim, apgd])
@pytest.mark.parametrize("eps", [1e-3, 0.45])
def test_default_steps_reach_the_edge_of_any_ball(attack, eps):
    """A default step of 0.1 whatever eps is: the APGD of a large toolbox."""
    x, y = numbers(*[0.5 + 0.999 * eps] * 20)  # so many that no luck of random starts helps all
    threat, weak = Threat("linf", eps), x
    for _ in range(3):
        weak = threat.project(weak - 0.1, x)
    assert wrong(threshold, weak, y).all() == (eps < 0.1)
    assert wrong(threshold, attack(threshold, x, y, threat, score=negative_log_odds, noise=draw(20), steps=3), y).all()


# ------------------------------------------------------------------------------------------- scores and gradients


@pytest.mark.parametrize("name", ["pgd", "bim", "mim", "apgd"])
def test_a_loss_of_exactly_zero_ends_nothing(name):
    """``if all(loss == 0): break`` in the inner loop: the APGD of a large toolbox."""
    model, x, y, needed = linear()
    threat = Threat("linf", halfway(needed))

    def zero(out, y):  # a score that is zero everywhere, with the gradient of the gap
        value = negative_log_odds(out, y)
        return value - value.detach()

    weak, few = x, {"score": zero, "noise": draw(len(x))}
    for _ in range(20):
        if (zero(model(weak), y) == 0).all():
            break
        weak = fgsm(model, weak, y, threat, **few)
    assert not wrong(model, weak, y).any()
    x_adv = ATTACKS[name].attack(model, x, y, threat, steps=20, **few)
    assert torch.equal(wrong(model, x_adv, y), needed < threat.eps)


@pytest.mark.parametrize("score", [negative_log_odds, negative_margin, dlr])
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e6])
def test_no_scale_of_the_logits_hides_anything(score, scale):
    """Cross-entropy and softmax margins go blind on large logits, "100% robust": PGD nearly everywhere, PMA."""
    model, x, y, needed = linear(scale=scale)
    threat = Threat("linf", halfway(needed))

    def softmax_margin(out, y):
        p = out.logits.softmax(1)
        return p.scatter(1, y[:, None], 0).amax(1) - p.gather(1, y[:, None])[:, 0]

    few = {"noise": draw(len(x)), "steps": 20, "random_start": False, "step_size": threat.eps}

    def broken(score):
        return int(wrong(model, pgd(model, x, y, threat, score=score, **few), y).sum())

    blind = [broken(cross_entropy), broken(softmax_margin)]
    assert max(blind) < 5 if scale == 1e6 else max(blind) > 20
    assert broken(score) == (needed < threat.eps).sum()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_two_and_three_classes_are_enough(name, classes):
    """DLR asks for a third or fourth logit that is not there: three libraries crash, one warns."""
    model, x, y, needed = linear(classes=classes)
    threat = Threat("linf", halfway(needed))
    with pytest.raises(IndexError):
        model(x).sort(1).values[:, -4]
    clear = (needed / threat.eps - 1).abs() > 0.02
    for aims in ([None], [(y + k) % classes for k in range(1, classes)]):  # untargeted, and every target in turn
        broken = torch.zeros_like(y, dtype=torch.bool)
        for target in aims:
            few = {"score": dlr, "noise": draw(len(x)), "steps": 30, "target": target}
            broken |= wrong(model, ATTACKS[name].attack(model, x, y, threat, **few), y)
        assert torch.equal(broken[clear], (needed < threat.eps)[clear])


def test_half_precision_logits_break_no_arithmetic():
    """A mask of 1e10 overflows half precision, and the loss is NaN: the FAB of two libraries."""
    model, x, y, needed = linear()
    threat = Threat("linf", halfway(needed))
    z = model(x).half()
    assert (z.float() - 1e10 * F.one_hot(y, 2)).half().isinf().any()
    for score in (negative_log_odds, negative_margin, dlr):
        few = {"score": score, "noise": draw(len(x)), "steps": 20}
        x_adv = apgd(lambda x: model(x).half(), x, y, threat, **few)
        assert x_adv.dtype == x.dtype
        clear = (needed / threat.eps - 1).abs() > 0.05  # the rounding of half precision moves the boundary a little
        assert torch.equal(wrong(model, x_adv, y)[clear], (needed < threat.eps)[clear])


# ------------------------------------------------------------------------------------------ the model and its answers


class Net(nn.Module):
    """A frozen batch norm, a dropout in train mode, a frozen weight: all that an attack may disturb."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.last = nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Linear(16, 3)
        self.norm.eval()
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.drop(self.norm(x)).flatten(1))


def test_each_module_gets_its_own_mode_back():
    """One flag, the root's, is restored to all modules, and a frozen batch norm wakes up: a research toolbox."""
    model, x = Net(), torch.rand(4, 1, 4, 4)
    before = [m.training for m in model.modules()]
    assert before == [True, False, True, True]
    root = model.training
    model.eval()
    model.train(root)
    assert [m.training for m in model.modules()] != before  # the weak restore
    model.norm.eval()
    for name, entry in ATTACKS.items():
        entry.attack(model, x, torch.zeros(4, dtype=torch.int64), BALL, score=negative_log_odds, noise=draw(4))
        assert [m.training for m in model.modules()] == before, name
    with frozen_eval(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_weights_get_no_gradient_and_keep_their_flags(name):
    """``loss.backward()`` adds to the weights' gradients: the FAB of the best-known attack suite."""
    model, x, y = Net(), torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    weak = Net()
    cross_entropy(weak(x.clone().requires_grad_()), y).sum().backward()
    assert weak.last.weight.grad.abs().sum() > 0
    model.last.weight.grad = torch.full_like(model.last.weight, 7.0)
    flags = [p.requires_grad for p in model.parameters()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    ATTACKS[name].attack(model, x, y, BALL, score=negative_log_odds, noise=draw(4))
    assert (model.last.weight.grad == 7).all()
    assert model.norm.weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == flags
    assert flags.count(False) == 1
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda z: (z, z.sum()), lambda z: SimpleNamespace(loss=z.sum(), logits=z), Outputs])
def test_a_wrapped_answer_is_the_same_answer(wrap):
    """Models that answer with a tuple or an object crash or are read wrongly: two libraries."""
    model, x, y, needed = linear()
    threat = Threat("linf", halfway(needed))

    def wrapped(x):
        return wrap(model(x))

    with pytest.raises((AttributeError, TypeError)):
        wrapped(x).argmax(1)
    few = {"score": negative_log_odds, "noise": draw(len(x)), "steps": 5}
    assert torch.equal(pgd(wrapped, x, y, threat, **few), pgd(model, x, y, threat, **few))


# -------------------------------------------------------------------------------------------------- chance and batches


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_noise_belongs_to_the_sample_not_to_its_place_in_the_batch(name):
    """Every batch is seeded alike, so a sample's noise is that of its slot: the best-known attack suite."""

    def slots(n):
        return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    x, y = torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.int64)
    assert torch.equal(slots(3), slots(6)[:3])
    assert not torch.equal(slots(3), slots(6)[3:])  # the same samples in a batch of their own

    def model(x):  # never wrong and no gradient: the noise alone makes samples differ
        z = x.detach().double().flatten(1) @ torch.linspace(-1, 1, 16, dtype=torch.float64)
        return torch.stack([99.0 + z, -z], 1)

    few = {} if name == "fgsm" else {"steps": 4}
    run = partial(ATTACKS[name].attack, model, threat=BALL, score=negative_log_odds, **few)
    whole = run(x, y, noise=draw(6))
    assert torch.equal(run(x[3:], y[3:], noise=draw(6)[3:]), whole[3:])
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    assert torch.equal(run(x[order], y[order], noise=draw(6)[order]), whole[order])
    from_x = ("fgsm", "bim", "mim", "deepfool", "cw", "lbfgs", "fmn", "fab", "jsma", "least_likely", "rays", "as_coded")
    assert name in from_x or not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_sample_has_its_own_squares(norm):
    """One window and one colour a query for the whole batch: the Square of the best-known attack suite."""
    queried = []

    def model(x):  # never wrong, the same everywhere: every proposal is made from the start
        queried.append(x.detach().clone())
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    def places(proposed):
        return {tuple(rows.tolist()) for rows in ((proposed - queried[0]).abs() > 1e-3).any(3)[:, 0]}

    n, x = 8, torch.full((8, 1, 16, 16), 0.5)
    square(
        model, x, torch.zeros(n, dtype=torch.int64), Threat(norm, 0.3), score=negative_log_odds, noise=draw(n), steps=15
    )
    shared = queried[0].clone()
    shared[:, :, 3:13, 2:12] = 0.0
    assert len(places(shared)) == 1
    assert len(queried) == 15
    assert all(len(places(proposed)) > 2 for proposed in queried[11:])
