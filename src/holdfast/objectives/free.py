"""Free adversarial training: the gradient of x_adv comes with the gradient of the weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from ..attacks import Model
from ..errors import UserError, at_least
from ..information.sources import Source, check_fraction, ramp_fraction
from ..losses import Loss, required_loss
from ..noise import Noise
from ..threat import Threat, as_threat
from ..user_input import typed, whole
from .inner_attack import MIN_EPS_FRACTION, MOST_STEPS
from .problem import Objective, Schedule, at_x_adv, outer_loss_of


@typed
def free(
    loss: Loss | str,
    threat: Threat | str,
    *,
    s: Source | None = None,
    replays: int = 4,
    step: float = 1.0,
    ramp: float = 0.0,
    factor: float = 1.0,
) -> Schedule:
    """Free adversarial training (Shafahi et al. 2019): each batch is replayed, and each replay moves weights and x_adv.

        x_adv = random point of the threat around x;  then ``replays`` times, with one backward pass each:
        w     <- optimiser's step on the gradient of mean_i loss(x_adv_i, y_i) with respect to w
        x_adv <- project(x_adv + step eps ascent(the gradient of the same loss with respect to x_adv))

    An epoch of m replays takes m steps of the optimiser a batch and m forward and backward passes an image: as many as
    ``adversarial`` with m - 1 steps. The paper divides the epochs by m. There x_adv - x goes on from the batch before;
    here each batch begins with a random start, so that a resumed run is the same run. The gradient is the loss's own,
    in training mode: a loss with a flat or masked gradient makes weak examples, where ``adversarial`` takes a score of
    its own. Too many replays forget other batches. Steps of a whole eps may bring catastrophic overfitting: watch the
    robust validation accuracy, and keep the best checkpoint.

    Args:
        loss: (out, y) -> (N,), or its name.
        threat: what x_adv is held to, or its text.
        s: a source of I-SCE's s.
        replays: m, steps of the optimiser on each batch, >= 1; 1 trains on random points of the threat.
        step: the length of a step over eps, > 0.
        ramp: the fraction of training, in [0, 1], over which eps increases from 1% to all of it.
        factor: the eps of training over the threat's, > 0.

    Returns:
        The schedule.

    Raises:
        UserError: for a setting out of range, and for a source of s that needs an attack.
    """
    whole("replays", replays, 1, MOST_STEPS)
    at_least("step", step, above=True)
    check_fraction("ramp, the fraction of training over which eps increases,", ramp)
    at_least("factor", factor, above=True)
    if s is not None and s.needs_attack:
        raise UserError(
            "objective 'free' needs its loss at x_adv, but an s from an attack needs it at x: take 'adversarial'."
        )
    ball, outer_loss = as_threat(threat), outer_loss_of(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        current = replace(ball, eps=factor * ramp_fraction(progress, ramp, MIN_EPS_FRACTION) * ball.eps)

        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            return current.random_start(x, noise)

        def advance(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
            ascent = current.ascent(grad.nan_to_num(0.0), x_adv)
            return current.project(ascent.mul_(step * current.eps).add_(x_adv), x)

        return Objective(perturb, partial(at_x_adv, outer_loss, progress), replays=replays, advance=advance)

    return schedule
