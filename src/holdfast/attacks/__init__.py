"""Attacks: each one readable function under one contract.

    attack(model, x, y, threat, *, score, noise, ...) -> x_adv

An attack makes no claim: ``evaluate`` measures and judges what it returns. To add one: the function under ``@attack``
and a line in ``ATTACKS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..losses import Loss, dlr, negative_log_odds, negative_margin, scaled_log_odds, score_of
from ..outputs import Outputs, logits_of
from .apgd import apgd
from .as_coded import as_coded
from .base import Model, MostAdversarial, attack, fooled, frozen_eval
from .cw import cw
from .deepfool import deepfool
from .fab import fab
from .fmn import fmn
from .jsma import jsma
from .lbfgs import lbfgs
from .margin_decomposition import md
from .minimal_norm import distances
from .pgd import bim, fgsm, least_likely, mim, pgd
from .random_noise import random_noise
from .rays import rays
from .relaxed_ball import cr
from .spsa import spsa
from .square import square

__all__ = [
    "ATTACKS",
    "SCORES",
    "AttackEntry",
    "Model",
    "MostAdversarial",
    "apgd",
    "as_coded",
    "attack",
    "bim",
    "cr",
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
    "rays",
    "spsa",
    "square",
]  # fmt: skip


@dataclass(frozen=True)
class AttackEntry:
    """One entry of ATTACKS.

    Attributes:
        attack: the attack function.
        about: one line about it, for lists.
        norms: the norms that it is defined for.
        gradients: whether it needs gradients.
        per_step: forward and backward passes per sample, for each step, target, restart and search; an estimate.
    """

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
    "apgd": AttackEntry(apgd, "pgd with an adaptive step size (Croce 2020)"),
    "md": AttackEntry(md, "one term of the margin first, then the margin (Ma 2020)"),
    "cr": AttackEntry(cr, "margin steps in a wider and a narrower ball in turn (FastAT 2026)", per_step=6.0),
    "as_coded": AttackEntry(
        as_coded, "bim away from the predicted class, last point, as the public code of I-SCE has it", ("linf",)
    ),
    "least_likely": AttackEntry(least_likely, "targeted bim on the least likely class (Kurakin 2017)"),
    "deepfool": AttackEntry(
        deepfool, "steps to the nearest linearised boundary (Moosavi-Dezfooli 2016)", per_step=10.0
    ),
    "cw": AttackEntry(cw, "smallest perturbation by Adam and a search over a constant (Carlini 2017)", ("linf", "l2")),
    "lbfgs": AttackEntry(lbfgs, "smallest l2 perturbation by quasi-Newton steps (Szegedy 2014)"),
    "fmn": AttackEntry(fmn, "smallest perturbation in a ball of adaptive radius (Pintor 2021)"),
    "fab": AttackEntry(
        fab, "smallest perturbation by steps to linearised boundaries, targeted (Croce 2020)", per_step=3.0
    ),
    "jsma": AttackEntry(jsma, "the most salient pixels, one at a time (Papernot 2016)"),
    "spsa": AttackEntry(
        spsa, "ascent on a gradient estimated from logits (Uesato 2018)", gradients=False, per_step=65.0
    ),
    "square": AttackEntry(
        square, "random squares, no gradients (Andriushchenko 2020)", ("linf", "l2"), gradients=False, per_step=1.0
    ),
    "rays": AttackEntry(
        rays, "nearest mistake along rays, by labels alone (Chen 2020)", ("linf", "l2"), gradients=False, per_step=1.5
    ),
    "noise": AttackEntry(random_noise, "random points of the threat", gradients=False, per_step=1.0),
}


def cross_entropy(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """``F.cross_entropy`` in the logits' own precision, dead zone included: the score of the usual PGD protocol.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) labels.

    Returns:
        (N,).
    """
    return F.cross_entropy(logits_of(out), y, reduction="none")


# What a stage may climb by name; "matched" is score_of the loss that the network was trained with.
SCORES: dict[str, Loss] = {
    "scaled_log_odds": scaled_log_odds,
    "margin": negative_margin,
    "dlr": dlr,
    "cross_entropy": cross_entropy,
}


def matched_score(loss: Loss | str | None) -> Loss:
    """The score for attacks on a network that was trained with this loss, independent of the scale of the logits.

    It is ``score_of(loss)``, except that the scaled log odds replace the negative log odds, which depend on the scale.
    See docs/adaptive.md.

    Args:
        loss: the training loss or its name; None where it is unknown, for the scaled log odds.

    Returns:
        A score, (out, y) -> (N,).
    """
    score = negative_log_odds if loss is None else score_of(loss)
    return scaled_log_odds if score is negative_log_odds else score
