"""CROWN by hand, and branch and bound against mixed-integer programs: certified <= exact <= attacked."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from tests.bounds.helpers import attacked_margins
from tests.helpers import on_digits, right_ones
from torch import nn

from holdfast.bounds import METHODS, certify, linear
from holdfast.bounds import branch as branch_module
from holdfast.bounds.graph import read
from holdfast.bounds.linear import forward, optimised
from holdfast.bounds.regions import region_of
from holdfast.bounds.steps import ReluStep, bind
from holdfast.data import Data
from holdfast.milp import decide, layers_of
from holdfast.outputs import fooled
from holdfast.threat import Threat


def dense(*layers):
    """A ReLU network of these (weight, bias)."""
    modules = [nn.Flatten()]
    for weight, bias in layers:
        weight, bias = torch.tensor(weight), torch.tensor(bias)
        modules += [nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()]
        modules[-2].weight.data, modules[-2].bias.data = weight, bias
    return nn.Sequential(*modules[:-1]).eval()


def bounds(net, point, threat, y=0):
    x = torch.tensor(point).view(1, 1, 1, -1)
    data = Data(x, torch.tensor([y]), torch.arange(1))
    return {method: certify(net, data, threat, method=method) for method in METHODS}


def test_crown_by_hand():
    """a = x1 + x2 and b = x1 - x2 lie in [-2, 2]; the margin is 2.5 - relu(a) - relu(b).

    Boxes: relu <= 2, so 2.5 - 4 = -1.5. Lines: relu(h) <= h / 2 + 1, so 2.5 - 2 - (a + b) / 2 = 0.5 - x1 >= -0.5.
    (Of a third ReLU nothing is read. It keeps the product of Lipschitz constants large, so that lines are what counts.)
    In truth relu(a) + relu(b) <= 2, so the margin is 0.5 at least, and branch and bound proves it.
    """
    net = dense(([[1.0, 1.0], [1.0, -1.0], [9.0, 0.0]], [0.0] * 3), ([[0.0] * 3, [1.0, 1.0, 0.0]], [2.5, 0.0]))
    found = bounds(net, [0.0, 0.0], Threat("linf", 1.0, -5, 5))
    assert float(found["interval"].bound) == pytest.approx(-1.5, abs=1e-3)
    for method in ("linear", "crown", "alpha"):  # upper lines have no slope to choose
        assert float(found[method].bound) == pytest.approx(-0.5, abs=1e-3)
        assert not found[method].proved
    assert found["branch"].proved
    assert 0 < float(found["branch"].bound) <= 0.5
    assert found["branch"].by == ("branch",)


def test_slopes_by_hand():
    """x lies in [-1, 2]; the margin is relu(x) - x / 2 + 0.1, x / 2 by a ReLU that is always on.

    CROWN takes slope 1 for the lower line, since 2 > 1: x / 2 + 0.1 >= -0.4. Slope 1/2 gives 0.1, which is the truth.
    """
    net = dense(([[1.0], [1.0]], [0.0, 10.0]), ([[1.0, 0.0], [0.0, 0.5]], [0.0, -5.1]))
    found = bounds(net, [0.5], Threat("linf", 1.5, -5, 5))
    assert float(found["crown"].bound) == pytest.approx(-0.4, abs=1e-3)
    assert 0 < float(found["alpha"].bound) <= 0.1
    assert found["alpha"].by == ("alpha",)


def test_the_ball_of_l2_and_l1_by_hand():
    """The margin is 3 x1 + 4 x2 - 1 and x is (1, 1): 6 - 5 eps in l2 and 6 - 4 eps in l1, where the box is far."""
    net = dense(([[3.0, 4.0], [0.0, 0.0]], [-1.0, 0.0]))
    for norm, dual in (("l2", 5.0), ("l1", 4.0), ("linf", 7.0)):
        for eps in (0.1, 0.5):
            found = bounds(net, [1.0, 1.0], Threat(norm, eps, -9, 9))
            assert float(found["interval"].bound) == pytest.approx(6 - dual * eps, abs=1e-3)
    near = bounds(net, [1.0, 1.0], Threat("l2", 0.5, 0.9, 9))  # the box leaves 0.1 in both: 6 - 0.7
    assert float(near["linear"].bound) == pytest.approx(5.3, abs=1e-3)


def test_a_counterexample_by_hand():
    """The margin 1.5 - relu(a) - relu(b) falls to -0.5: branch and bound meets a point below zero, and keeps it."""
    net = dense(([[1.0, 1.0], [1.0, -1.0], [9.0, 0.0]], [0.0] * 3), ([[0.0] * 3, [1.0, 1.0, 0.0]], [1.5, 0.0]))
    threat, x = Threat("linf", 1.0, -5, 5), torch.zeros(1, 1, 1, 2)
    found = bounds(net, [0.0, 0.0], threat)["branch"]
    assert not found.proved
    assert found.ended
    [x_adv] = found.x_adv.values()
    assert fooled(net(x_adv.view_as(x)), torch.tensor([0]))
    assert threat.violation(x_adv.view_as(x), x) == 0


@pytest.fixture(scope="module")
def trained():
    """(net, x, y): a dense network of 28 ReLUs and 24 digits."""
    net, split = on_digits(
        lambda: (
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10),
        ),
        lr=1e-2,
        epochs=12,
    )  # fmt: skip
    return net, *right_ones(net, split, 24)


@pytest.mark.parametrize("eps", [0.03, 0.08])
def test_certified_is_below_exact_is_below_attacked(trained, eps):
    """Branch and bound proves exactly what mixed-integer programs prove, and breaks what they break."""
    net, x, y = trained
    threat = Threat("linf", eps)
    exact = decide(layers_of(net), x, y, threat)
    attacked = attacked_margins(net, x, y, threat) > 0
    assert not (exact.robust & ~attacked).any()
    assert exact.robust.any()
    assert exact.broken.any()
    before, bound = torch.zeros(24, dtype=torch.bool), torch.full((24,), -torch.inf, dtype=torch.float64)
    for method in METHODS:
        found = certify(net, Data(x, y, torch.arange(24)), threat, method=method)
        assert not (found.proved & ~exact.robust & ~exact.unknown).any()
        assert not (before & ~found.proved).any(), "a later method proves what earlier ones do"
        assert (found.bound >= bound - 1e-9).all()
        assert ((found.bound > 0) == found.proved).all()
        assert [by != "" for by in found.by] == found.proved.tolist()
        before, bound = found.proved, found.bound
    assert torch.equal(found.proved[~exact.unknown], exact.robust[~exact.unknown])
    assert found.ended[~exact.unknown].all()
    assert not found.proved[list(found.x_adv)].any()
    for number, x_adv in found.x_adv.items():
        assert x_adv.dtype == torch.float32
        assert fooled(net(x_adv[None]), y[number : number + 1])
        assert threat.violation(x_adv[None], x[number : number + 1]) == 0
    assert not exact.robust[list(found.x_adv)].any()


@pytest.mark.parametrize("threat", [Threat("l2", 0.25), Threat("l1", 0.8)])
def test_branch_and_bound_in_other_norms(trained, threat):
    """Attacks break nothing that is proved, and more is proved than by lines."""
    net, x, y = trained
    data = Data(x[:12], y[:12], torch.arange(12))
    alpha, branch = (certify(net, data, threat, method=method, seconds=3.0) for method in ("alpha", "branch"))
    assert not (alpha.proved & ~branch.proved).any()
    assert branch.proved.any()
    assert not (branch.proved & ~(attacked_margins(net, x[:12], y[:12], threat) > 0)).any()
    for number, x_adv in branch.x_adv.items():
        assert fooled(net(x_adv[None]), y[number : number + 1])
        assert threat.violation(x_adv[None], x[number : number + 1]) == 0


def test_convolutions_and_what_is_no_relu(digits):
    """A network with pools and a sigmoid is branched on its ReLUs alone; bounds hold, and the time is kept."""
    net, x, y = digits
    smooth = nn.Sequential(*list(net)[:-1], nn.Sigmoid(), net[-1]).eval()
    x = x[:6]
    for model in (net, smooth):
        y = model(x).argmax(1)
        threat = Threat("linf", 0.02)
        began = time.monotonic()
        found = certify(model, Data(x, y, torch.arange(6)), threat, method="branch", seconds=4.0)
        assert time.monotonic() - began < 30
        assert found.proved.any()
        assert (found.bound <= attacked_margins(model, x, y, threat)).all()


class Beside(nn.Module):
    """Slopes of ReLUs that no row of the sigmoid's input passes, and a sigmoid behind them."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.last(self.first(x).relu() + self.other(x).tanh().square().sigmoid())


@pytest.fixture(scope="module")
def deep():
    """(steps, region): a network of three layers of random ReLUs, most of them of either sign, and 5 images."""
    torch.manual_seed(0)
    widths = (16, 24, 24, 24, 3)
    net = nn.Sequential(nn.Flatten(), *(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)))
    with torch.no_grad():
        x = torch.rand(5, 1, 4, 4)
        return bind(read(net.eval(), (1, 4, 4)), torch.float64), region_of(x, Threat("linf", 0.1))


def widths(found, chosen=None):
    """The width of all boxes of each operation, or of chosen values."""
    chosen = [torch.ones_like(box.lo) for box in found.boxes] if chosen is None else chosen
    return torch.stack([((box.hi - box.lo) * which).sum() for box, which in zip(found.boxes, chosen, strict=True)])


@torch.no_grad()
def test_rows_whose_slopes_do_not_fit_take_turns(deep, monkeypatch):
    """Every unstable ReLU has optimised slopes, whatever fits at a time."""
    steps, region = deep
    crown, alpha = (forward(steps, region, refine=True, iterations=n) for n in (0, 6))
    undecided = [(box.lo < 0) & (box.hi > 0) for box in alpha.boxes]
    assert (widths(alpha, undecided)[[4, 6]] < 0.98 * widths(crown, undecided)[[4, 6]]).all()
    asked = []

    def counted(steps, found, lines, region, start, rows, **more):
        asked.append(rows.shape[0] * rows.shape[1] * 24 * sum(isinstance(steps[n], ReluStep) for n in lines))
        return optimised(steps, found, lines, region, start, rows, **more)

    monkeypatch.setattr(linear, "optimised", counted)
    for slopes in (1, 500, 5000):
        asked.clear()
        monkeypatch.setattr(linear, "SLOPES", slopes)
        split = forward(steps, region, refine=True, iterations=6)
        assert 0 < max(asked) <= max(72, slopes)  # one row at least
        torch.testing.assert_close(widths(split, undecided), widths(alpha, undecided), rtol=0.01, atol=0)


@torch.no_grad()
def test_no_box_is_wider_than_the_one_it_started_from(deep):
    """Slopes start from the boxes of CROWN, and CROWN from those of intervals: in one pass each, none is wider."""
    steps, region = deep
    boxes = forward(steps, region)
    crown = forward(steps, region, refine=True, known=boxes)
    alpha = forward(steps, region, refine=True, iterations=6, known=crown)
    for wide, narrow in ((boxes, crown), (crown, alpha)):
        for one, other in zip(wide.boxes, narrow.boxes, strict=True):
            assert (one.lo <= other.lo).all()
            assert (other.lo <= other.hi).all()
            assert (other.hi <= one.hi).all()
    assert (widths(crown)[[4, 6]] < widths(boxes)[[4, 6]]).all()
    assert (widths(alpha)[[4, 6]] < widths(crown)[[4, 6]]).all()
    late = forward(steps, region, refine=True, iterations=6, known=crown, until=0.0)
    assert torch.equal(widths(late), widths(crown)), "what time cuts short has the boxes that were known"


def test_slopes_of_relus_that_a_row_does_not_pass():
    torch.manual_seed(0)
    net, x = Beside().eval(), torch.rand(4, 1, 2, 2)
    y = net(x).argmax(1)
    threat = Threat("linf", 0.3)
    for method in ("alpha", "branch"):
        found = certify(net, Data(x, y, torch.arange(4)), threat, method=method, seconds=3.0)
        assert (found.bound <= attacked_margins(net, x, y, threat)).all()


def test_no_time_is_an_answer(trained):
    net, x, y = trained
    data, threat = Data(x, y, torch.arange(24)), Threat("linf", 0.08)
    found = certify(net, data, threat, method="branch", seconds=0.0)
    cheap = certify(net, data, threat, method="interval")
    assert torch.equal(found.proved, cheap.proved)
    assert (found.ended | ~found.proved).all()
    assert not found.ended.all()
    assert not found.x_adv


def test_domains_that_do_not_fit_in_memory_end_branch_and_bound(trained, monkeypatch):
    """It says that it did not end, and its bound is still one."""
    net, x, y = trained
    data, threat = Data(x, y, torch.arange(24)), Threat("linf", 0.08)
    whole = certify(net, data, threat, method="branch", seconds=60.0)
    monkeypatch.setattr(branch_module, "WAITING", 1)
    found = certify(net, data, threat, method="branch", seconds=60.0)
    assert not (found.proved & ~whole.proved).any()
    assert (~found.ended & whole.ended).any()
    assert (found.bound <= attacked_margins(net, x, y, threat)).all()


@pytest.fixture
def undecided(trained):
    """(problem, pool): an image that crown leaves, and the nine domains without a sign."""
    net, x, y = trained
    threat = Threat("linf", 0.08)
    left = (~certify(net, Data(x, y, torch.arange(len(y))), threat, method="crown").proved).nonzero()[0]
    steps = bind(read(net, tuple(x.shape[1:])), torch.float64)
    region = region_of(x[left], threat)
    found = forward(steps, region, refine=True)
    problem = branch_module._Problem.of(*branch_module.compact(steps, found), region)
    rows = linear.against(y[left], 10, torch.float64)[0]
    shapes = {number: (len(rows), *problem.steps[number].shape) for number in problem.relus}
    signs = {n: torch.zeros(shape, dtype=torch.int8) for n, shape in shapes.items()}
    alphas, betas = ({n: torch.full(shape, start) for n, shape in shapes.items()} for start in (0.5, 0.0))
    pool = branch_module._Pool(torch.full((len(rows),), -torch.inf, dtype=torch.float64), rows, signs, alphas, betas)
    return problem, pool


@pytest.mark.parametrize("batch", [2, 40, 4096])
def test_a_domain_is_split_where_its_worse_child_is_best(undecided, batch, monkeypatch):
    """Whatever the number of candidates whose children are bounded at a time."""
    problem, pool = undecided
    monkeypatch.setattr(branch_module, "FILTERED", 10_000)
    count, light = len(pool.rows), problem.light
    children, whole = branch_module._split(problem, pool, batch)
    assert not len(whole.rows)
    chosen = light.least(children, children.alphas, children.betas).view(2, count).amin(0)
    sizes = [pool.signs[number].shape[1:].numel() for number in pool.signs]
    best = torch.full((count,), -torch.inf)
    for place in range(sum(sizes)):
        every = branch_module._children(pool, list(pool.signs), sizes, torch.full((count,), place))
        best = torch.maximum(best, light.least(every, every.alphas, every.betas).view(2, count).amin(0))
    torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-4)
    assert (best > light.least(pool, pool.alphas, pool.betas)).any()


def test_a_domain_that_is_proved_by_what_it_inherits_is_not_optimised(undecided, monkeypatch):
    problem, pool = undecided
    whole, optimised_rows = branch_module._optimised(problem.light, pool), []
    before = problem.light.least(whole, whole.alphas, whole.betas)
    real = branch_module._optimised
    monkeypatch.setattr(
        branch_module, "_optimised", lambda light, some: optimised_rows.append(len(some.rows)) or real(light, some)
    )
    after, _ = branch_module._bounded(problem, whole, None)
    assert optimised_rows == [int((before <= branch_module.ENOUGH).sum())]
    assert 0 < optimised_rows[0] < len(pool.rows)
    assert (after.bounds >= before - 1e-2).all(), "but for the rounding that a proof counts"
