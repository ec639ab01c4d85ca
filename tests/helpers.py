"""What several test files share: the one loop that small test networks are trained by, and stand-ins."""

import torch
import torch.nn.functional as F
from torch import nn

from holdfast import data
from holdfast.checks import Audit
from holdfast.evaluation import StageCost
from holdfast.experiments.pipeline import NetworkResult
from holdfast.results import remaining_vulnerable


def on_digits(layers, *, lr, epochs):
    """(net, split): the layers that ``layers`` makes, trained on scikit-learn's digits, always the same."""
    split = data.load("digits", val=0.0)
    x, y = data.pixels(split.train.x), split.train.y
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*layers())
        optimizer = torch.optim.Adam(net.parameters(), lr)
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    return net.eval().requires_grad_(False), split


def right_ones(net, split, most):
    """(x, y) of at most so many test digits that the network gets right."""
    x, y = data.pixels(split.test.x), split.test.y
    right = torch.nonzero(net(x).argmax(1) == y)[:, 0]
    assert len(right) > 0.9 * len(y)
    return x[right[:most]], y[right[:most]]


def unaudited(evaluation):
    """A NetworkResult of this evaluation in which no check was run and no region measured, to test what follows it."""
    nothing = remaining_vulnerable(0, 0, 0, 0, 0)
    return NetworkResult(evaluation, Audit(evaluation, (), nothing, {}, StageCost("audit")), {}, {})
