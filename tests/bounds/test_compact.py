"""Branch and bound asks a narrower network: it has the same bounds, and those of any domain hold on its points."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.bounds.branch import _bounded, _children, _Pool, _Problem
from holdfast.bounds.compact import DenseStep, compact
from holdfast.bounds.graph import read
from holdfast.bounds.linear import all_lines, forward, least, relus_of
from holdfast.bounds.regions import region_of
from holdfast.bounds.steps import bind
from holdfast.threat import Threat

THREAT = Threat("linf", 0.25)


class Joined(nn.Module):
    """A ReLU that a dense layer and a sum read: it stays whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x.flatten(1)).relu()
        return self.last(h + self.second(h).relu())


NETS = {
    "dense": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "sum": Joined,
}


@pytest.fixture(params=list(NETS))
def asked(request):
    """(net, x, steps, found, region) of one image."""
    torch.manual_seed(3)
    net = NETS[request.param]().eval().requires_grad_(False)
    x = torch.rand(1, 1, 2, 3)
    steps = bind(read(net, x.shape[1:]), torch.float64)
    region = region_of(x, THREAT)
    return net, x, steps, forward(steps, region, refine=True), region


def widths(steps):
    return [step.shape[-1] for step in relus_of(steps).values()]


def test_the_narrower_network_has_the_same_bounds(asked):
    net, _, steps, found, region = asked
    narrow, boxes = compact(steps, found)
    assert all(now <= before for now, before in zip(widths(narrow), widths(steps), strict=True))
    if isinstance(net[0] if isinstance(net, nn.Sequential) else net, nn.Flatten):
        assert sum(widths(narrow)) < sum(widths(steps))
    rows = torch.randn(1, 20, 1, 3, dtype=torch.float64)
    last = len(steps) - 1
    before = least(steps, found, all_lines(steps, found), region, last, rows)
    now = least(narrow, boxes, all_lines(narrow, boxes), region, last, rows)
    assert torch.allclose(now, before, rtol=1e-10, atol=1e-10)


def test_bounds_of_random_domains_hold_on_their_points(asked):
    """Splits at random: a domain's bound, of any slopes and multipliers, is below every margin that lies in it."""
    net, x, steps, found, region = asked
    problem = _Problem.of(*compact(steps, found), region)
    rows = torch.tensor([[[1.0, -1.0, 0.0]], [[1.0, 0.0, -1.0]]], dtype=torch.float64)
    shapes = {n: problem.steps[n].shape for n in problem.relus}
    fill = {n: torch.rand(2, *shape) for n, shape in shapes.items()}
    pool = _Pool(
        torch.full((2,), -torch.inf, dtype=torch.float64), rows,
        {n: torch.zeros(2, *shape, dtype=torch.int8) for n, shape in shapes.items()},
        fill, {n: torch.zeros_like(part) for n, part in fill.items()},
    )  # fmt: skip
    sizes = [part[0].numel() for part in fill.values()]
    root = None
    for _ in range(4):
        pool, point = _bounded(problem, pool, None)
        assert point is None
        root = pool.bounds if root is None else root
        for _ in range(3):  # other multipliers than the best ones are bounds too
            slopes, betas = ({n: torch.rand_like(part).double() for n, part in fill.items()} for fill in
                             (pool.alphas, pool.betas))  # fmt: skip
            pool.bounds = torch.maximum(pool.bounds, problem.least(pool, slopes, betas))
        boxes = [problem.box(n, pool.signs[n]) for n in shapes]
        free = torch.cat([((box.lo < 0) & (box.hi > 0)).flatten(1) for box in boxes], 1)
        if not free.any(1).all():
            break
        chosen = torch.rand(free.shape).masked_fill(~free, -1).argmax(1)
        pool = _children(pool, list(shapes), sizes, chosen)
    pool, _ = _bounded(problem, pool, None)
    assert (pool.bounds >= root.min() - 1e-9).all()
    points = (x + THREAT.eps * (2 * torch.rand(4000, 1, 2, 3) - 1)).clamp(0, 1)
    values = inputs_of_relus(problem, points)
    logits = net(points).double()
    met = 0
    for place in range(len(pool.bounds)):
        inside = torch.ones(len(points), dtype=torch.bool)
        for n, signs in pool.signs.items():
            inside &= ((values[n] * signs[place].flatten()) >= 0).all(1)
        margins = logits[inside] @ pool.rows[place].flatten()
        assert (margins >= pool.bounds[place]).all()
        met += int(inside.any())
    assert met > 1


def inputs_of_relus(problem, points):
    """The input of each ReLU that is left, step by step: (points, width)."""
    outputs, found = [points.double()[:, None]], {}
    for number, step in enumerate(problem.steps[1:], 1):
        reads = [outputs[i] for i in step.reads]
        if isinstance(step, DenseStep):
            outputs.append(reads[0] @ step.weight.T + step.offset)
        elif number in problem.relus:
            found[number] = reads[0].flatten(1)
            outputs.append(reads[0].clamp_min(0))
        else:
            outputs.append(torch.vmap(step.function)(*reads))
    return found
