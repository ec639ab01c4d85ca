"""Attacks: each one readable function under one contract; suites: which of them are run, in which order.

    attack(model, x, y, threat, *, score, noise, ...) -> x_adv

An attack makes no claim: ``evaluate`` measures and judges what it returns. To add one: the function under ``@attack``
and a line in ``ATTACKS``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, unknown
from ..losses import Loss, dlr, negative_log_odds, negative_margin, scaled_log_odds, score_of
from ..outputs import Outputs, logits_of
from .apgd import apgd
from .base import Model, MostAdversarial, attack, fooled, frozen_eval
from .minimal_norm import cw, deepfool, distances, fab, fmn, lbfgs
from .others import jsma, least_likely, md, spsa
from .pgd import bim, fgsm, mim, pgd
from .square import random_noise, square

__all__ = [
    "ATTACKS",
    "PGD50",
    "PGD50_TRAIN_LOSS",
    "SCORES",
    "SUBSETS",
    "SUITES",
    "AttackEntry",
    "Model",
    "MostAdversarial",
    "Stage",
    "apgd",
    "attack",
    "bim",
    "cross_entropy",
    "cw",
    "deepfool",
    "distances",
    "fab",
    "fgsm",
    "fmn",
    "fooled",
    "frozen_eval",
    "jsma",
    "lbfgs",
    "least_likely",
    "matched_score",
    "md",
    "mim",
    "pgd",
    "random_noise",
    "spsa",
    "square",
]  # fmt: skip


@dataclass(frozen=True)
class AttackEntry:
    """One line of ATTACKS: the function, a word on it, the norms it is defined for, whether it needs gradients, and
    about how many passes it takes for each step, target, restart and search."""

    attack: Callable[..., Tensor]
    about: str
    norms: tuple[str, ...] = ("linf", "l2", "l1")
    gradients: bool = True
    per_step: float = 2.0


ATTACKS: dict[str, AttackEntry] = {
    "fgsm": AttackEntry(fgsm, "one step of eps (Goodfellow 2015)"),
    "bim": AttackEntry(bim, "small steps from x (Kurakin 2017)"),
    "mim": AttackEntry(mim, "bim with momentum (Dong 2018)"),
    "pgd": AttackEntry(pgd, "projected gradient ascent, random starts (Madry 2018)"),
    "apgd": AttackEntry(apgd, "pgd with its own step size (Croce 2020)"),
    "md": AttackEntry(md, "one term of the margin first, then both (Ma 2020)"),
    "least_likely": AttackEntry(least_likely, "bim towards the least likely class (Kurakin 2017)"),
    "deepfool": AttackEntry(
        deepfool, "steps to the nearest linearised boundary (Moosavi-Dezfooli 2016)", per_step=10.0
    ),
    "cw": AttackEntry(cw, "smallest perturbation by Adam and a search of the constant (Carlini 2017)", ("linf", "l2")),
    "lbfgs": AttackEntry(lbfgs, "smallest l2 perturbation by quasi-Newton steps (Szegedy 2014)"),
    "fmn": AttackEntry(fmn, "smallest perturbation in a ball that shrinks and grows (Pintor 2021)"),
    "fab": AttackEntry(
        fab, "smallest perturbation by steps to linearised boundaries, targeted (Croce 2020)", per_step=3.0
    ),
    "jsma": AttackEntry(jsma, "the most salient pixels, one by one (Papernot 2016)"),
    "spsa": AttackEntry(
        spsa, "ascent on a gradient guessed from answers (Uesato 2018)", gradients=False, per_step=65.0
    ),
    "square": AttackEntry(
        square, "random squares, no gradients (Andriushchenko 2020)", ("linf", "l2"), gradients=False, per_step=1.0
    ),
    "noise": AttackEntry(random_noise, "random points of the threat", gradients=False, per_step=1.0),
}


def cross_entropy(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """``F.cross_entropy`` in the logits' own precision: what papers climb, dead zone included. (N, K), (N,) -> (N,)."""
    return F.cross_entropy(logits_of(out), y, reduction="none")


# What a stage may climb by name; "matched" is score_of the loss that the network was trained with.
SCORES: dict[str, Loss] = {"u": scaled_log_odds, "margin": negative_margin, "dlr": dlr, "cross_entropy": cross_entropy}


def matched_score(loss: Loss | str | None) -> Loss:
    """The score that an attack on a network trained with this loss climbs, freed from the scale of the logits.

    ``score_of(loss)``, where u is u of logits brought to one scale; u where no loss is known. See docs/adaptive.md.
    """
    score = negative_log_odds if loss is None else score_of(loss)
    return scaled_log_odds if score is negative_log_odds else score


@cache
def _defaults(attack: Callable[..., Tensor]) -> dict[str, Any]:
    """What an attack's settings are unless they are given; one step where it counts none."""
    found = {name: p.default for name, p in inspect.signature(attack).parameters.items() if p.default is not p.empty}
    return {"steps": 1, **found}


N_NEAREST, N_RANDOM = 32, 32  # survivors that attacks of full length are tried on: the nearest, and others at random
# Whom a stage attacks. A cascade spends where samples can still break, and then asks whether that was right.
SUBSETS: dict[str, str] = {
    "survivors": "all that stand",
    "nearest": f"the share of them with the smallest margins, at least {N_NEAREST}",
    "sampled": f"the {N_NEAREST} of them with the smallest margins, and {N_RANDOM} drawn at random from the rest",
    "escalated": f"the nearest share if a sampled stage broke one of the {N_NEAREST} nearest, all if one of the others",
}


@dataclass(frozen=True)
class Stage:
    """One attack of a suite.

    attack: a key of ATTACKS; score: a key of SCORES, or "matched" (the trained loss's score), or "loss" (the trained
    loss itself, links and all); targets: 0 is untargeted, t > 0 runs the attack towards each of the t likeliest wrong
    classes in turn (as many as there are); settings: the attack's keywords; step: step_size over eps; alone: run on
    every sample that is right, not on survivors only, so that its own accuracy is known and stands under the stage's
    name; stream: stages with the same number draw the same noise, so that a random start is not what they differ in;
    None: noise of the stage's own; target: "random" steers each sample to one wrong class, drawn from its own noise, as
    papers with targeted attacks do; any mistake counts all the same.

    who: a key of WHO; share: of the survivors that "nearest" and "escalated" take, those with the smallest margins;
    round: stages of a round r > 1 are run only if a stage of round r - 1 broke something.
    """

    name: str
    attack: str
    score: str = "matched"
    targets: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    step: float | None = None
    individual: bool = False
    noise_stream: int | None = None
    subset: str = "survivors"
    share: float = 1.0
    round: int = 0
    target: str = ""

    def __post_init__(self) -> None:
        if self.subset not in SUBSETS:
            raise unknown("who of a stage", self.subset, SUBSETS)
        if self.target not in ("", "random"):
            raise unknown("target of a stage", self.target, ["random"])
        if self.target and self.targets:
            raise UserError(f"stage '{self.name}': give it a random target or the likeliest {self.targets}, not both.")
        if not 0 < self.share <= 1 or self.round < 0:
            raise UserError(f"stage '{self.name}': share must lie in (0, 1] and round be >= 0.")

    def passes(self, classes: int) -> float:
        """About how many passes it costs a sample that nothing breaks."""
        entry = ATTACKS[self.attack]
        settings = {"restarts": 1, "searches": 1, "targets": 1, **_defaults(entry.attack), **self.settings}
        targets = min(max(self.targets, settings["targets"]), classes - 1)
        return 1 + float(settings["steps"] * settings["restarts"] * settings["searches"] * targets * entry.per_step)

    def keywords(self, eps: float) -> dict[str, Any]:
        """What the attack is called with."""
        return self.settings if self.step is None else {**self.settings, "step_size": self.step * eps}


# Robustness as papers report it: F.cross_entropy, one random start, 50 PGD steps of eps/4, the last iterate.
PGD50 = Stage("pgd50", "pgd", "cross_entropy", settings={"steps": 50, "keep": "last"}, step=0.25, individual=True)
# The usual adaptive attack: the same on the loss that the network was trained with.
PGD50_TRAIN_LOSS = replace(PGD50, name="own loss", score="loss")


def _round(number: int) -> tuple[Stage, ...]:
    """Long attacks of four kinds on the survivors that are nearest to a mistake."""
    nearest: dict[str, Any] = {"subset": "nearest", "share": 0.15, "round": number}
    return (
        Stage(f"round {number}: long", "apgd", settings={"steps": 100}, **nearest),
        Stage(f"round {number}: dlr", "apgd", "dlr", settings={"steps": 50}, **nearest),
        Stage(f"round {number}: targets", "apgd", "dlr", targets=4, settings={"steps": 50}, **nearest),
        Stage(f"round {number}: md", "md", settings={"steps": 40}, **nearest),
    )


def _full(who: str, queries: int) -> tuple[Stage, ...]:
    """Attacks of full length, as AutoAttack has them, and a black box as a sentinel."""
    return (
        Stage(f"{who}: long", "apgd", settings={"steps": 100}, subset=who, share=0.3),
        Stage(f"{who}: all targets", "apgd", "dlr", targets=9, settings={"steps": 100}, subset=who, share=0.3),
        Stage(f"{who}: square", "square", "margin", settings={"steps": queries}, subset=who, share=0.3),
    )


# Chosen on tables of what each attack breaks on validation networks (benchmarks/choose_suites.py): short attacks find
# nearly all, what they miss is near a mistake already, and the drawn sample says whether that was true here.
SUITES: dict[str, tuple[Stage, ...]] = {
    "quick": (
        Stage("sweep", "apgd", settings={"steps": 10}),
        Stage("targets", "apgd", "dlr", targets=3, settings={"steps": 10}, subset="nearest", share=0.5),
        Stage("longer", "apgd", settings={"steps": 50}, subset="nearest", share=0.15),
    ),
    "standard": (
        Stage("sweep", "apgd", settings={"steps": 10}),
        Stage("targets", "apgd", "dlr", targets=3, settings={"steps": 10}),
        Stage("longer", "apgd", settings={"steps": 50}, subset="nearest", share=0.5),
        Stage("margin", "apgd", "margin", settings={"steps": 20}, subset="nearest", share=0.5),
        Stage("all targets", "apgd", "dlr", targets=9, settings={"steps": 20}, subset="nearest", share=0.3),
        *_round(1),
        *_round(2),
        *_full("sampled", 200),
        *_full("escalated", 1000),
    ),
    "paranoid": (
        Stage("long", "apgd", settings={"steps": 100}),
        Stage("cross entropy", "apgd", "cross_entropy", settings={"steps": 100}),
        Stage("dlr", "apgd", "dlr", settings={"steps": 100}),
        Stage("all targets", "apgd", "dlr", targets=9, settings={"steps": 100}),
        Stage("md", "md", settings={"steps": 100}),
        Stage("fab", "fab", "margin", settings={"steps": 100, "targets": 9}),
        Stage("square", "square", "margin", settings={"steps": 5000}),
    ),
}
# What `holdfast explain` runs: from the published protocol on, one change at a time. The start is the published one
# (stream 0 is that of stage 0) until starts are what changes: else every change would be one more restart as well.
_LONG: dict[str, Any] = {"settings": {"steps": 200}, "step": 0.1}
SUITES["explain"] = (
    replace(PGD50, name="stable arithmetic", score="u", individual=False, noise_stream=0),
    Stage("best iterate", "pgd", "u", settings={"steps": 50}, step=0.25, noise_stream=0),
    Stage("more steps", "pgd", "u", **_LONG, noise_stream=0),
    Stage("restarts", "pgd", "u", settings={"steps": 200, "restarts": 4}, step=0.1),  # "more steps" was the first of 5
    Stage("targets", "pgd", "u", targets=9, **_LONG, noise_stream=0),
    Stage("other scores", "apgd", "dlr", settings={"steps": 100}),
    Stage("black box", "square", "margin", settings={"steps": 1000}),
    replace(PGD50_TRAIN_LOSS, noise_stream=0),
)
SUITES["claims"] = (PGD50_TRAIN_LOSS, *SUITES["standard"])
# The columns of the papers' tables, each on all that is right, and then what the network is worth. "pgd50" is the
# published protocol: not run twice. All start from its random points. C&W in a length at which more finds no more.
_PGD10 = replace(PGD50, name="pgd10", settings={**PGD50.settings, "steps": 10}, noise_stream=0)
_PGD50_ALIAS = replace(PGD50, name="pgd50")
SUITES["protocols"] = (
    _PGD10,
    replace(_PGD10, name="pgd10-targeted", target="random"),
    _PGD50_ALIAS,
    replace(_PGD50_ALIAS, name="pgd50-targeted", target="random", noise_stream=0),
    Stage("cw", "cw", "margin", settings={"steps": 50, "searches": 4}, individual=True),
    *SUITES["standard"],
)
