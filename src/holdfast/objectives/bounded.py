"""Objectives on bounds: interval-bound training, alone or beside an attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..attacks import Model
from ..bounds import box_of, crown_ibp_bounds
from ..errors import at_least, unknown
from ..information.sources import check_fraction, ramp_fraction
from ..losses import Loss, required_loss, score_of
from ..noise import Noise
from ..threat import Threat, as_threat
from ..user_input import typed
from .inner_attack import InnerAttack
from .problem import Objective, Schedule

TOLERANCE = 0.5  # of ``bounds.interval_growth``, as Shi et al. chose it
CROWN_SHARE: dict[str, Callable[[float], float]] = {  # fraction of eps -> share of crown's bounds
    "interval": lambda fraction: 0.0,
    "crown": lambda fraction: 1.0,
    "crown-interval": lambda fraction: 1 - fraction,
}


@typed
def interval(
    loss: Loss | str,
    threat: Threat | str,
    *,
    kappa: float = 0.5,
    ramp: float = 0.55,
    factor: float = 1.0,
    warmup: float = 0.0,
    bound: str = "interval",
    regulariser: float = 0.0,
    steps: int = 0,
    step_size: float | None = None,
    attack_factor: float = 1.0,
    score: Loss | str | None = None,
) -> Schedule:
    """Training on interval bounds (Gowal et al. 2019): the loss of the worst case that they allow.

        steps = 0:  (1 - k) loss(bounds of the logit differences over the threat) + k loss(x)
        steps > 0:  (1 - k) loss(bounds of the logit differences over the threat) + k loss(x_adv)     (MTL-IBP)

    k decreases from 1 to kappa while eps increases. An s of the loss is added to the bound: a certified margin. With
    an attack and kappa near 1 the bounds only regularise, and networks keep more clean accuracy, but their proofs need
    lines or branch and bound (``bounds.certify``). The same mixture inside s is the source "mix".

    Args:
        loss: of logits alone (the SCE family), (out, y) -> (N,).
        threat: what the bounds hold for.
        kappa: the weight of the other term at the end, in [0, 1].
        ramp: the fraction of training, in [0, 1], over which eps and k change.
        factor: the eps of training over the threat's, > 0.
        warmup: the fraction of training before that, in [0, 1], on the loss at x alone.
        bound: "interval"; "crown", lines over intervals (CROWN-IBP); or "crown-interval", which changes from the second
            to the first while eps increases: crown's bounds are tighter early in training, intervals train to tighter
            networks under a large eps.
        regulariser: weight at the start, >= 0, of ``bounds.interval_growth``; it decreases to 0 while eps increases.
            Deep networks with batch norm start well with 0.5 and ``init=interval``.
        steps: steps of PGD for x_adv, >= 0; 0 takes x itself.
        step_size: of PGD, in pixels; default 2.5 eps / steps.
        attack_factor: the eps of x_adv over that of the bounds, > 0.
        score: what PGD maximises, default ``score_of(loss)``.

    Returns:
        The schedule.

    Raises:
        UserError: for a setting out of range, and for a network that has no interval bounds
            (``bounds.logit_difference_bounds``).

    Source: Gowal et al. 2019; Zhang et al. 2020 (CROWN-IBP); De Palma et al. 2024 (MTL-IBP).
    """
    check_fraction("ramp, over which eps increases,", ramp)
    check_fraction("kappa, the weight of the loss beside the bounds,", kappa)
    check_fraction("warmup, the fraction of training before bounds,", warmup)
    if bound not in CROWN_SHARE:
        raise unknown("bound of objective 'interval'", bound, CROWN_SHARE)
    at_least("factor", factor, above=True)
    at_least("attack_factor", attack_factor, above=True)
    at_least("steps of x_adv", steps)
    at_least("regulariser", regulariser)
    ball, loss_fn = as_threat(threat), required_loss(loss)
    attack: InnerAttack | None = None
    if steps:
        score_fn = required_loss(score) if score is not None else score_of(loss_fn)
        attack = InnerAttack(ball, steps, step_size, ramp, factor * attack_factor, "eval")

    def schedule(progress: float) -> Objective:
        since = max(0.0, progress - warmup)
        fraction = ramp_fraction(since, ramp)
        current, k = replace(ball, eps=fraction * factor * ball.eps), 1 - fraction * (1 - kappa)
        warm = progress < warmup

        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            if attack is None or warm or k == 0:  # a loss without weight needs no attack
                return x
            return attack(since, model, x, y, noise, score=score_fn)

        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            # Also without weight: batch norms see the images, and a process group averages the gradients that follow.
            beside = loss_fn(model(x_adv), y)
            if warm:
                return beside
            network: Any = getattr(model, "module", model)  # without the wrapper of distributed training
            lo, hi = box_of(x, current)
            share, weight = CROWN_SHARE[bound](fraction), regulariser * (1 - fraction)
            worst, growth = crown_ibp_bounds(network, lo, hi, y, share, tolerance=TOLERANCE if weight else None)
            return k * beside + (1 - k) * loss_fn(worst, y) + weight * growth

        return Objective(perturb, outer)

    return schedule
