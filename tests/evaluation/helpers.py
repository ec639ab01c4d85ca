"""Models and samples whose robustness is known, for the tests of evaluations."""

from __future__ import annotations

import torch
from tests.helpers import on_digits
from torch import nn

from holdfast.bounds import Certified
from holdfast.data import Data, pixels
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.results import ProofCost
from holdfast.threat import Threat

THREAT = Threat("linf", 0.1)


COLUMNS = (
    "index",
    "y",
    "prediction",
    "margin",
    "clean",
    "pgd50",
    "broken_by",
    "margin_adv",
    "prediction_adv",
    "x_adv",
)


FEW = (
    Stage("apgd", "apgd", "scaled_log_odds", settings={"steps": 6}),
    Stage("apgd-dlr-t", "apgd", "dlr", targets=2, settings={"steps": 4}),
    Stage("square", "square", "margin", settings={"steps": 10}),
)


def numbers(values, y=None):
    """Samples of one pixel."""
    x = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else torch.tensor(y)
    return Data(x, y, torch.arange(len(x)))


class Threshold(nn.Module):
    """Class 0 where the pixel is above one half, margin 2 p - 1; counts passes with hooks of its own."""

    def __init__(self, classes=2, gradient=True):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.5))
        self.classes, self.gradient, self.forwards, self.backwards = classes, gradient, 0, 0
        self.sizes = []

    def forward(self, x):
        self.forwards += len(x)
        self.sizes.append(len(x))
        p = x.flatten(1)[:, 0]
        if p.requires_grad:
            p.register_hook(self._count_backward)
        lead = p - self.at
        z = torch.stack([lead, -lead, *[lead * 0 - 9.0] * (self.classes - 2)], 1)
        return z if self.gradient else z.detach()

    def _count_backward(self, grad):
        self.backwards += len(grad)


class Net(nn.Module):
    """A small network with layers that have a train and an eval mode."""

    def __init__(self, classes=4, seed=0, side=6):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(6 * side * side, classes)
            self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


def case(n=40, classes=4, side=6, eps=0.02):
    """A network, n grey images (uint8) with its predictions as labels, one in five wrong, and a threat."""
    net = Net(classes, side=side).eval()
    x = torch.randint(256, (n, 1, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        y = net(pixels(x)).argmax(1)
    y[::5] = (y[::5] + 1) % classes
    return net, Data(x, y, torch.arange(n)), Threat("linf", eps)


def differing_columns(a, b):
    """Names of the columns in which two evaluations differ."""
    return [name for name in COLUMNS if not torch.equal(getattr(a, name), getattr(b, name))]


class Interrupt(BaseException):
    """Raised by ``interrupt_after``."""


def interrupt_after(batches):
    """A progress callback that interrupts the evaluation after so many batches."""
    left = [batches]

    def progress(*args):
        left[0] -= 1
        if left[0] == 0:
            raise Interrupt

    return progress


def toy():
    """(model, data): ten samples that end at different stages."""
    return Threshold(classes=4), numbers([0.3, *torch.linspace(0.5, 0.95, 10)[1:].tolist()])


def threshold(x):
    """Class 0 where the pixel is above one half; its logits are 2 p - 1 apart."""
    p = x.flatten(1)[:, 0]
    return torch.stack([p - 0.5, 0.5 - p], 1)


PER_ATTACK = SUITES["per-attack"][:5]  # its individual attacks


CLOSE = Threat("linf", 0.02)  # attacks break some digits here, and some are certified


EPS = 0.004  # breaks about half of the samples of LinearModel


class LinearModel(nn.Module):
    """K classes of D pixels, a linear map: the exact robust accuracy under linf is known in closed form."""

    def __init__(self, classes=10, pixels=30, scale=1.0, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = torch.randn(classes, pixels, generator=g)
        self.scale = scale

    def forward(self, x):
        return self.scale * ((x.flatten(1) - 0.5) @ self.w.T)

    def data(self, n=400, seed=1):
        g = torch.Generator().manual_seed(seed)
        x = (0.5 + 0.2 * (torch.rand(n, 1, 5, 6, generator=g) - 0.5)).float()  # far from the box
        return Data(x, self(x).argmax(1), torch.arange(n))

    def robust(self, data, eps):
        """(N,) bool: min over j of (z_y - z_j) / ||w_y - w_j||_1 > eps."""
        z = (data.x.flatten(1).double() - 0.5) @ self.w.double().T
        lead = z.gather(1, data.y[:, None]) - z
        size = (self.w[data.y][:, None] - self.w[None]).abs().sum(2).double()
        distance = (lead / size).scatter(1, data.y[:, None], torch.inf).amin(1)
        return distance > eps


def small_mlp():
    """(net, split): a network with one hidden layer, trained on digits."""
    return on_digits(lambda: (nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)), lr=5e-3, epochs=6)


def certificates(proved, method="interval"):
    """What ``certify`` returns where these samples are proved by a method, (N,) bool."""
    n = len(proved)
    bound, ended = torch.where(proved, 1.0, -torch.inf).double(), torch.ones(n, dtype=torch.bool)
    by = tuple(method if one else "" for one in proved.tolist())
    cost = ProofCost(method, n, int(proved.sum()), 0.5)
    return Certified(proved, by, bound, {}, torch.zeros(n, dtype=torch.float64), ended, (cost,))
