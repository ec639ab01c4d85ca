"""How long a network will take, measured on a few of its images before the work begins."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from ..data import Split, pixels
from ..evaluation.suites import resolve
from ..outputs import as_outputs, frozen_eval
from ..progress import EXPECTED

SHORT = 30.0  # seconds of work that need no announcement
FEW, MANY = 8, 256  # images that are timed: many where few take no time worth measuring
INSTANT = 0.05  # seconds


def expected_time(model: nn.Module, split: Split, *, epochs: int, suite: str, threats: int, device: str) -> str:
    """Say how long training and attacks will take; "" for less than half a minute.

    Args:
        model: the network; it is copied, and no random number is drawn.
        split: its data.
        epochs: of training.
        suite: a key of ``SUITES``.
        threats: how many threats it is attacked under.
        device: where it will run.

    Returns:
        Such as "expected: 8 min of training, up to 17 min of attacks". The attacks' figure is that of a network that
        nothing breaks; adversarial training takes as many times longer as it has steps.
    """
    net, x = copy.deepcopy(model).to(device), split.test.x[:MANY]
    one = _seconds_per_pass(net, pixels(x[:FEW].to(device)))
    if one * FEW < INSTANT:
        one = _seconds_per_pass(net, pixels(x.to(device)))
    training = 2 * one * len(split.train) * epochs
    passes = sum(stage.passes(len(split.classes)) for stage in resolve(suite))
    attacks = one * len(split.test) * passes * threats
    if training + attacks < SHORT:
        return ""
    return f"{EXPECTED}{_words(training)} of training, up to {_words(attacks)} of attacks"


def _seconds_per_pass(model: nn.Module, x: torch.Tensor) -> float:
    """Of one image, forward or backward: the faster of two tries."""
    tries = []
    with frozen_eval(model), torch.enable_grad():
        for _ in range(2):
            began = time.perf_counter()
            logits = as_outputs(model(x.detach().requires_grad_())).logits
            logits.sum().backward()
            float(logits.detach()[0, 0])  # waits for a GPU
            tries.append(time.perf_counter() - began)
    return min(tries) / (2 * max(len(x), 1))


def _words(seconds: float) -> str:
    """A time in words.

    >>> _words(42.4), _words(180), _words(40000)
    ('42 s', '3 min', '11.1 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
