"""The whole path on a device other than the CPU: the pretended accelerator, or with HOLDFAST_DEVICE=cuda a real one."""

import copy

import pytest
from tests.accelerator import under_test


@pytest.fixture(scope="session")
def device():
    return under_test()


@pytest.fixture(scope="session")
def on_both(digits, device):
    """(the network of the digits on the CPU, the same on the device)."""
    net = digits[0]
    return net, copy.deepcopy(net).to(device)
