"""Every attack on the device: the same samples fall as on the CPU, and the host waits no more often than it must."""

import copy
import inspect

import pytest
import torch
from tests.accelerator import is_real, synchronisations
from tests.helpers import SmallNet, predicted_labels, random_images

from holdfast.attacks import ATTACKS
from holdfast.losses import negative_margin
from holdfast.noise import Noise
from holdfast.outputs import as_outputs, fooled, frozen_eval
from holdfast.threat import Threat

EPS = {"linf": 0.15, "l2": 0.8, "l1": 3.0}
STEPS = {"linf": 10, "l2": 3, "l1": 3}  # projections on l2 and l1 are many small operators
N = 8


def most_waits(name, steps):
    """How often the host may wait in a call of so many steps.

    At every fifth step fooled samples leave the batch, which asks once who is left; minimal-norm attacks drop nobody. A
    second restart asks once more, and cr before each of its two targets. RayS is steered by labels: it asks for them at
    every step, and in bisections.
    """
    drops = steps // 5
    if name in ("cw", "lbfgs", "fmn", "fab"):
        return 0
    return {"md": 2 * drops + 1, "cr": 2 * (drops + 1), "rays": 1 + 10 * steps + drops}.get(name, drops)


@pytest.fixture(scope="module")
def task(device):
    """(network on the CPU, the same on the device, images, labels that the network predicts but for every fourth)."""
    net = SmallNet().float()
    x = random_images(N).float()
    return net, copy.deepcopy(net).to(device), x, predicted_labels(net, x)


def attacked(name, model, x, y, norm):
    entry = ATTACKS[name].attack
    steps = {"steps": STEPS[norm]} if "steps" in inspect.signature(entry).parameters else {}
    noise = Noise(0, torch.arange(N, device=x.device))
    return entry(model, x, y, Threat(norm, EPS[norm]), score=negative_margin, noise=noise, **steps)


def misclassified(model, x_adv, y):
    with frozen_eval(model), torch.no_grad():
        return fooled(as_outputs(model(x_adv)).logits, y).cpu()


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, entry in ATTACKS.items() for norm in entry.norms])
def test_same_samples_fall_and_few_waits(name, norm, task, device):
    net, there, x, y = task
    x_there, y_there = x.to(device), y.to(device)
    with synchronisations() as seen:
        x_adv = attacked(name, there, x_there, y_there, norm)
    assert x_adv.device == x_there.device
    assert bool((Threat(norm, EPS[norm]).violation(x_adv, x_there) == 0).all())
    expected = attacked(name, net, x, y, norm)
    falls, broken = misclassified(there, x_adv, y_there), misclassified(net, expected, y)
    if is_real():  # the rounding is another
        assert int((falls != broken).sum()) <= 1
    else:
        assert torch.equal(falls, broken)
        torch.testing.assert_close(x_adv.cpu()[~broken], expected[~broken], rtol=0, atol=1e-5)
    assert seen.total() <= most_waits(name, STEPS[norm]), seen
