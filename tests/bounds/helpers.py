"""What holds of every bound of a network: the graph computes it, boxes and lines contain what float32 gives."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from holdfast.attacks import pgd
from holdfast.bounds.graph import read
from holdfast.bounds.linear import all_lines, forward, least
from holdfast.bounds.regions import region_of
from holdfast.bounds.steps import bind
from holdfast.losses import negative_margin
from holdfast.noise import Noise
from holdfast.outputs import as_outputs
from holdfast.threat import Threat


class Net(nn.Module):
    """A function of (N, C, H, W) images and of the weights ``parts``; its output is flattened to logits."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        out = self.function(self, x)
        return out if isinstance(out, tuple) or out.ndim == 2 else out.flatten(1)


def perturbed(x, threat, seed=0, count=24):
    """(count, N, ...) float32 points that the threat allows: random ones, steps to its edge, corners of its box."""
    found = [x]
    for number in range(count - 1):
        noise = Noise(seed + number, torch.arange(len(x)))
        generator = torch.Generator().manual_seed(seed + number)
        far = torch.randn(x.shape, generator=generator) * 10**number**0.5
        far = far.sign() * threat.eps if number % 3 == 1 else far
        found.append(threat.random_start(x, noise) if number % 3 == 0 else threat.project(x + far, x))
    return torch.stack([point for point in found if not threat.violation(point, x).any()])


@torch.no_grad()
def check_bounds(net, x, threats, *, rows=3, exact=1e-6, loose=1e-5, refine=False):
    """Read a network, and hold its boxes and lines against its float64 and its sampled float32 outputs.

    exact: how far the graph may be from the network in float64, relative to its largest output; loose: how far the
    bound over a single point may be from the value there. Returns the graph.
    """
    net = net.eval().requires_grad_(False)
    graph = read(net, x.shape[1:])
    steps = bind(graph, torch.float64)
    last = len(steps) - 1
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(len(x), rows, 1, graph.classes, generator=generator, dtype=torch.float64)
    row[:, 0] = torch.eye(graph.classes, dtype=torch.float64)[0]

    truth = as_outputs(copy.deepcopy(net).double()(x.double())).logits
    point = region_of(x, threats[0])
    point = point.__class__(point.box.__class__(point.center, point.center), point.center, threats[0], 0.0)
    found = forward(steps, point, rounding=False)
    scale = 1 + truth.abs().amax()
    middle = (found.boxes[-1].lo + found.boxes[-1].hi)[:, 0] / 2
    assert ((middle - truth).abs() <= exact * scale).all(), "the graph computes another function"
    low = least(steps, found, all_lines(steps, found), point, last, row)
    value = (row[:, :, 0] * truth[:, None]).sum(2)
    assert ((low - value).abs() <= loose * scale * row.abs().sum((2, 3))).all(), "a point has no tight bound"

    for threat in threats:
        region = region_of(x, threat)
        found = forward(steps, region, refine=refine)
        assert not found.unbounded.any(), "no bound"
        low = least(steps, found, all_lines(steps, found), region, last, row)
        assert low.isfinite().all()
        box = found.boxes[-1]
        for points in perturbed(x, threat):
            out = as_outputs(net(points)).logits.double()
            assert (box.lo[:, 0] <= out).all(), "below the box"
            assert (out <= box.hi[:, 0]).all(), "above the box"
            assert (low <= (row[:, :, 0] * out[:, None]).sum(2)).all(), "below the line"
    return graph


def threats(eps=0.2, lo=-3.0, hi=3.0, dim=60):
    """One of each norm, of similar reach in a single pixel."""
    return [Threat("linf", eps, lo, hi), Threat("l2", 2 * eps, lo, hi), Threat("l1", 3 * eps, lo, hi)]


def least_margins(net, x, y, threat, count=60, seed=0):
    """(N,) the smallest sampled logit_y - logit_j, each image asked in one batch."""
    worst = torch.full((len(x),), math.inf, dtype=torch.float64)
    with torch.no_grad():
        for points in perturbed(x, threat, seed, count):
            logits = as_outputs(net(points)).logits.double()
            margins = logits.gather(1, y[:, None]) - logits
            worst = torch.minimum(worst, margins.scatter(1, y[:, None], math.inf).amin(1))
    return worst


def attacked_margins(net, x, y, threat, steps=8):
    """(N,) the smallest logit_y - logit_j that samples and PGD reach, from both kinds of start."""
    worst = least_margins(net, x, y, threat, count=12)
    for seed in range(2):
        noise = Noise(seed, torch.arange(len(x)))
        x_adv = pgd(net, x, y, threat, score=negative_margin, noise=noise, steps=steps, iterate="last")
        with torch.no_grad():
            logits = as_outputs(net(x_adv)).logits.double()
        margins = logits.gather(1, y[:, None]) - logits
        worst = torch.minimum(worst, margins.scatter(1, y[:, None], math.inf).amin(1))
    return worst
