"""Attacks: each one readable function under one contract; suites: which of them are run, in which order.

    attack(model, x, y, threat, *, score, noise, ...) -> x_adv

An attack makes no claim: ``evaluate`` measures and judges what it returns. To add one: the function under ``@attack``
and a line in ``ATTACKS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..losses import Loss, dlr, gap, negative_margin
from ..outputs import Outputs, logits_of
from .apgd import apgd
from .blackbox import random_noise, square
from .contract import Model, Worst, attack, fooled, frozen_eval
from .minimal import cw, deepfool, distances, fab, fmn, lbfgs
from .others import jsma, least_likely, md, spsa
from .pgd import bim, fgsm, mim, pgd

__all__ = [
    "ATTACKS", "OWN_LOSS", "PUBLISHED", "SCORES", "SUITES", "Entry", "Model", "Stage", "Worst", "apgd", "attack",
    "bim", "cross_entropy", "cw", "deepfool", "distances", "fab", "fgsm", "fmn", "fooled", "frozen_eval", "jsma",
    "lbfgs", "least_likely", "md", "mim", "pgd", "random_noise", "spsa", "square",
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of ATTACKS: the function, the norms it is defined for, whether it needs gradients, a word on it."""

    attack: Callable[..., Tensor]
    about: str
    norms: tuple[str, ...] = ("linf", "l2", "l1")
    gradients: bool = True


ATTACKS: dict[str, Entry] = {
    "fgsm": Entry(fgsm, "one step of eps (Goodfellow 2015)"),
    "bim": Entry(bim, "small steps from x (Kurakin 2017)"),
    "mim": Entry(mim, "bim with momentum (Dong 2018)"),
    "pgd": Entry(pgd, "projected gradient ascent, random starts (Madry 2018)"),
    "apgd": Entry(apgd, "pgd with its own step size (Croce 2020)"),
    "md": Entry(md, "one term of the margin first, then both (Ma 2020)"),
    "least_likely": Entry(least_likely, "bim towards the least likely class (Kurakin 2017)"),
    "deepfool": Entry(deepfool, "steps to the nearest linearised boundary (Moosavi-Dezfooli 2016)"),
    "cw": Entry(cw, "smallest perturbation by Adam and a search of the constant (Carlini 2017)", ("linf", "l2")),
    "lbfgs": Entry(lbfgs, "smallest l2 perturbation by quasi-Newton steps (Szegedy 2014)"),
    "fmn": Entry(fmn, "smallest perturbation in a ball that shrinks and grows (Pintor 2021)"),
    "fab": Entry(fab, "smallest perturbation by steps to linearised boundaries, targeted (Croce 2020)"),
    "jsma": Entry(jsma, "the most salient pixels, one by one (Papernot 2016)"),
    "spsa": Entry(spsa, "ascent on a gradient guessed from answers (Uesato 2018)", gradients=False),
    "square": Entry(square, "random squares, no gradients (Andriushchenko 2020)", ("linf", "l2"), gradients=False),
    "noise": Entry(random_noise, "random points of the threat", gradients=False),
}


def cross_entropy(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """``F.cross_entropy`` in the logits' own precision: what papers climb, dead zone included. (N, K), (N,) -> (N,)."""
    return F.cross_entropy(logits_of(out), y, reduction="none")


# What a stage may climb by name; "matched" is score_of the loss that the network was trained with.
SCORES: dict[str, Loss] = {"u": gap, "margin": negative_margin, "dlr": dlr, "cross_entropy": cross_entropy}


@dataclass(frozen=True)
class Stage:
    """One attack of a suite.

    attack: a key of ATTACKS; score: a key of SCORES, or "matched" (the trained loss's score), or "loss" (the trained
    loss itself, links and all); targets: 0 is untargeted, t > 0 runs the attack towards each of the t likeliest wrong
    classes in turn (as many as there are); settings: the attack's keywords; step: step_size over eps; alone: run on
    every sample that is right, not on survivors only, so that its own accuracy is known; stream: stages with the same
    number draw the same noise, so that a random start is not what they differ in; None: noise of the stage's own.
    """

    name: str
    attack: str
    score: str = "matched"
    targets: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    step: float | None = None
    alone: bool = False
    stream: int | None = None

    def keywords(self, eps: float) -> dict[str, Any]:
        """What the attack is called with."""
        return self.settings if self.step is None else {**self.settings, "step_size": self.step * eps}

    def describe(self) -> dict[str, Any]:
        """The stage as a record holds it: a stream that was not asked for is not mentioned."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("stream", None)}


# Robustness as papers report it: F.cross_entropy, one random start, 50 PGD steps of eps/4, the last iterate.
PUBLISHED = Stage("published", "pgd", "cross_entropy", settings={"steps": 50, "keep": "last"}, step=0.25, alone=True)
# The usual adaptive attack: the same on the loss that the network was trained with.
OWN_LOSS = replace(PUBLISHED, name="own loss", score="loss")


SUITES: dict[str, tuple[Stage, ...]] = {
    "quick": (
        Stage("apgd", "apgd", settings={"steps": 20}),
        Stage("apgd-dlr-t", "apgd", "dlr", targets=3, settings={"steps": 20}),
    ),
    "standard": (
        Stage("apgd", "apgd", settings={"steps": 50}),
        Stage("apgd-dlr", "apgd", "dlr", settings={"steps": 50}),
        Stage("apgd-dlr-t", "apgd", "dlr", targets=9, settings={"steps": 30}),
        Stage("square", "square", "margin", settings={"steps": 300}),
    ),
}
# What `holdfast explain` runs: from the published protocol on, one change at a time. The start is the published one
# (stream 0 is that of stage 0) until starts are what changes: else every change would be one more restart as well.
_LONG: dict[str, Any] = {"settings": {"steps": 200}, "step": 0.1}
SUITES["explain"] = (
    replace(PUBLISHED, name="stable arithmetic", score="u", alone=False, stream=0),
    Stage("best iterate", "pgd", "u", settings={"steps": 50}, step=0.25, stream=0),
    Stage("more steps", "pgd", "u", **_LONG, stream=0),
    Stage("restarts", "pgd", "u", settings={"steps": 200, "restarts": 4}, step=0.1),  # "more steps" was the first of 5
    Stage("targets", "pgd", "u", targets=9, **_LONG, stream=0),
    Stage("other scores", "apgd", "dlr", settings={"steps": 100}),
    Stage("black box", "square", "margin", settings={"steps": 1000}),
    replace(OWN_LOSS, stream=0),
)
SUITES["claims"] = (OWN_LOSS, *SUITES["standard"])
