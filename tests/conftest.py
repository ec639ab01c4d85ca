"""Hypothesis: few examples, no deadline, in CI the same ones every time. One thread: tiny tensors, shared cores.

And a small trained network that several files attack.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import nn

from holdfast import data

settings.register_profile("here", deadline=None, max_examples=40)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

torch.set_num_threads(1)  # ten times faster here than two threads that wait for each other


@pytest.fixture(scope="session")
def digits():
    """(net, x, y): a tiny convolutional network and 40 test digits that it gets right."""
    split = data.load("digits", val=0.0)
    x, y = data.pixels(split.train.x), split.train.y
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(6):
            for rows in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    net.eval().requires_grad_(False)
    x, y = data.pixels(split.test.x), split.test.y
    right = torch.nonzero(net(x).argmax(1) == y)[:40, 0]
    return net, x[right], y[right]
