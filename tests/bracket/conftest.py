"""One small trained network for all of the room, and what is true of it."""

import pytest
import torch
from tests.helpers import on_digits
from torch import nn

from holdfast.data import pixels
from holdfast.milp import decide, layers_of
from holdfast.threat import Threat


def layers():
    return nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)


@pytest.fixture(scope="session")
def small():
    """(net, split): a fully connected network on the digits."""
    return on_digits(layers, lr=3e-3, epochs=10)


@pytest.fixture(scope="session")
def truth(small):
    """(net, 40 test samples, threat, broken): which of them have an adversarial example, by mixed-integer programs."""
    net, split = small
    data, threat = split.test.take(slice(0, 40)), Threat("linf", 0.06)
    found = decide(layers_of(net), pixels(data.x), data.y, threat)
    assert set(found.status) <= {"robust", "broken", "misclassified"}
    return net, data, threat, torch.tensor([status != "robust" for status in found.status])
