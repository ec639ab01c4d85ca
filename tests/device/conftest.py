"""The whole path on a device that is not the CPU: the pretended accelerator, or with HOLDFAST_DEVICE=cuda a real one."""

import copy

import pytest
import torch
from tests.accelerator import under_test


@pytest.fixture(scope="session")
def device():
    return under_test()


@pytest.fixture(autouse=True)
def backward_in_this_thread():
    """The engine counts the devices once: a backward pass of another test may have come before the pretended one."""
    with torch.autograd.set_multithreading_enabled(False):
        yield


@pytest.fixture(scope="session")
def on_both(digits, device):
    """(the network of the digits on the CPU, the same on the device)."""
    net = digits[0]
    return net, copy.deepcopy(net).to(device)
