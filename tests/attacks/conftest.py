"""A small trained network for the attacks that need more samples than the ``digits`` of tests/conftest.py."""

import pytest
from tests.helpers import on_digits, right_ones
from torch import nn


@pytest.fixture(scope="session")
def many_digits():
    """(net, x, y): a small convolutional network, 97% right, and 300 test digits that it gets right."""
    net, split = on_digits(
        lambda: (
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        ),
        lr=3e-3,
        epochs=8,
    )  # fmt: skip
    return net, *right_ones(net, split, 300)
