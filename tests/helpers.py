"""What several test files share: the training loop of small networks, models and images to attack, stand-ins."""

import io
import math
import re
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from holdfast import data
from holdfast.attacks import ATTACKS
from holdfast.checks import Audit
from holdfast.errors import UserError
from holdfast.evaluation import StageCost
from holdfast.experiments.pipeline import NetworkResult
from holdfast.losses import negative_margin
from holdfast.noise import Noise
from holdfast.outputs import Outputs, as_outputs, fooled, frozen_eval
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
    return NetworkResult(evaluation, Audit(evaluation, (), nothing, None, StageCost("audit")), None, None)


def shorten_audits(patch):
    """Fewer queries in the audit's attacks that take most of its time, where another thing is tested."""
    for name in ("RAYS_STEPS", "SQUARE_STEPS", "NOISE_STEPS", "MD_TARGETS"):
        patch.setattr(f"holdfast.checks.strength.{name}", 2)


# ------------------------------------------------------------------------------------------------- attacks on models

DUAL_NORM = {"linf": 1, "l2": 2, "l1": math.inf}


def noise_of(n, seed=0):
    """The noise of samples 0 .. n-1."""
    return Noise(seed, torch.arange(n))


def run_attack(name, model, x, y, threat, *, score=negative_margin, seed=0, noise=None, **settings):
    """x_adv of an entry of ATTACKS."""
    noise = noise or noise_of(len(x), seed)
    return ATTACKS[name].attack(model, x, y, threat, score=score, noise=noise, **settings)


class LinearModel(nn.Module):
    """Logits = W (x - center) + b with random W and b: (N, ...) of ``dim`` values -> (N, K).

    Products are summed sample by sample, so that no rounding depends on the batch size.
    """

    def __init__(self, classes, dim=16, seed=0, dtype=torch.float64, bias=1.0, center=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.center = center
        self.weight = nn.Parameter(torch.randn(classes, dim, generator=generator, dtype=dtype))
        self.bias = nn.Parameter(bias * torch.randn(classes, generator=generator, dtype=dtype))

    def forward(self, x):
        return ((x - self.center).flatten(1)[:, None] * self.weight).sum(2) + self.bias


@torch.no_grad()
def leads_and_slopes(model, x, y, norm):
    """For each class behind y: z_y - z_j, and ||w_y - w_j|| in the dual norm; (N, K) each, both 0 at y."""
    z = model(x)
    slope = (model.weight[y][:, None] - model.weight[None]).norm(p=DUAL_NORM[norm], dim=2)
    return z.gather(1, y[:, None]) - z, slope


def boundary_distances(model, x, y, norm):
    """The distance to each class's boundary in closed form, infinite at y: (N, K)."""
    lead, slope = leads_and_slopes(model, x, y, norm)
    return (lead / slope).scatter(1, y[:, None], math.inf)


class SmallNet(nn.Module):
    """Everything that an attack might disturb: a frozen batch norm, a dropout in train mode, a frozen parameter."""

    def __init__(self, classes=4, seed=0, side=6):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 6, 3, padding=1)
            self.frozen = nn.BatchNorm2d(6)
            self.live = nn.BatchNorm2d(6)
            self.drop = nn.Dropout(0.5)
            self.last = nn.Linear(6 * side * side, classes)
            for norm in (self.frozen, self.live):
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 1.5)
        self.train()
        self.frozen.eval()
        self.conv.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.drop(self.live(self.frozen(self.conv(x)).relu())).flatten(1))


def random_images(n, seed=0, dtype=torch.float32, side=6):
    """(n, 1, side, side), uniform in [0, 1]."""
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def predicted_labels(model, x, wrong=True):
    """The model's predictions in eval mode; every fourth one replaced by another class where ``wrong``."""
    with frozen_eval(model), torch.no_grad():
        z = as_outputs(model(x)).logits
    y = z.argmax(1)
    if wrong:
        y[::4] = (y[::4] + 1) % z.shape[1]
    return y


def training_state(model):
    """Modes, gradient flags and tensors of a model, to be compared by ``same_state``."""
    modes = [(name, module.training) for name, module in model.named_modules()]
    parameters = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return modes, parameters, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a, b):
    """Whether two training states are equal, bit for bit."""
    return a[:2] == b[:2] and all(torch.equal(a[2][name], b[2][name]) for name in a[2])


class PointRecorder(nn.Module):
    """A model that keeps the size of every batch and the images in it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.sizes, self.points = inner, [], []

    def forward(self, x):
        self.sizes.append(len(x))
        self.points.append(x.detach().clone())
        return self.inner(x)


def unbreakable(x):
    """Two logits with a gradient everywhere; class 0 leads by so much that no attack changes the prediction."""
    total = x.flatten(1).sum(1)
    return torch.stack([1e6 + total, total * 0], 1)


def island(low, high):
    """Wrong only for low < x < high. The score is x itself, so an ascent walks across the island."""

    def model(x):
        p = x.flatten(1)[:, 0]
        inside = torch.where((p > low) & (p < high), 1.0, -1.0)
        return Outputs(torch.stack([-inside, inside], 1), x.flatten(1))

    return model


def survivors(name, model, x, y, threat, **settings):
    """(N,) bool: the samples that an attack does not break; its points must lie in the threat."""
    x_adv = run_attack(name, model, x, y, threat, **settings)
    assert (threat.violation(x_adv, x) == 0).all()
    with torch.no_grad():
        return ~fooled(as_outputs(model(x_adv)).logits, y)


def write_parquet(folder, train=120, test=40, *, top=None, photographs=False):
    """scikit-learn's first digits as a parquet folder with a test split; returns its path as text.

    top: labels are taken modulo top + 1; photographs: 32x32, in colour.
    """
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    kinds = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int32())])
    for name, rows in (("train", range(train)), ("test", range(train, train + test))):
        cells = []
        for row in rows:
            buffer = io.BytesIO()
            picture = Image.fromarray((digits.images[row] * 15).astype(np.uint8))
            (picture.resize((32, 32)).convert("RGB") if photographs else picture).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        labels = [int(digits.target[row]) if top is None else int(digits.target[row]) % (top + 1) for row in rows]
        pq.write_table(pa.table({"image": cells, "label": labels}, schema=kinds), folder / f"{name}.parquet")
    return str(folder)


# What a harmed file may hold; and what may stand at a place in a JSON file.
HARM = [
    b"", b"{", b"null", b"[]", b"3", b'"text"', b'{"a": 1}', b"[" * 5000, b"\xff\xfe", b"NaN", b"1e999",
]  # fmt: skip
VALUES = [None, [], {}, "x", -1, 1.5, True, 10**40, {"a": {"b": []}}]


def one_sentence(call, path):
    said = ""
    try:
        call()
    except UserError as error:
        said = str(error)
    except Exception as error:
        pytest.fail(f"{path}: {type(error).__name__}: {error}")
    assert "\n" not in said, path
    assert len(said) < 700, path
    assert not re.search("[Dd]elete", said), path


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        if not isinstance(value, list) or key < 2:
            yield from places(value[key], (*path, key))


def put(value, path, new):
    """A copy with another value at one place."""
    if not path:
        return new
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def in_foreground():
    """Signals as a terminal leaves them: under nohup, and in the background of a script, some are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
