"""Objectives on clean images and on adversarial examples: standard, adversarial, friendly, fast, TRADES, MART."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attacks import Model
from ..errors import UserError, at_least
from ..information.sources import Source, ramp_fraction
from ..losses import Loss, required_loss, score_of
from ..noise import Noise
from ..outputs import as_outputs, batch_norm_mode, frozen_eval, logits_of
from ..threat import Threat, as_threat
from ..user_input import typed
from .inner_attack import MIN_EPS_FRACTION, InnerAttack
from .problem import Objective, Schedule, at_x_adv, outer_loss_of
from .weight_perturbation import with_awp


@typed
def standard(loss: Loss | str, *, s: Source | None = None) -> Schedule:
    """Standard training: the loss on clean images.

    Args:
        loss: (out, y) -> (N,), or its name, such as "isce:s=3".
        s: a source of I-SCE's s, used instead of the loss's own number.

    Returns:
        The schedule.

    Raises:
        UserError: for a source that needs an attack.
    """
    if s is not None and s.needs_attack:
        raise UserError("this s is measured by an attack, and objective 'standard' has none: take 'adversarial'.")
    outer_loss = outer_loss_of(required_loss(loss), s)

    def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return x

    def schedule(progress: float) -> Objective:
        return Objective(perturb, lambda model, x, x_adv, y: outer_loss(model, x, x, x, y, progress)[1])

    return schedule


@typed
def adversarial(
    loss: Loss | str,
    threat: Threat | str,
    *,
    s: Source | None = None,
    steps: int = 10,
    step_size: float | None = None,
    score: Loss | str | None = None,
    ramp: float = 0.0,
    factor: float = 1.0,
    curriculum: float = 0.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """Adversarial training (Madry et al. 2018): the loss at the last iterate of PGD with one random start.

    Args:
        loss: the outer loss, (out, y) -> (N,), or its name.
        threat: the threat of the inner attack, or its text, such as "linf:8/255".
        s: a source of I-SCE's s.
        steps: steps of PGD, >= 1.
        step_size: of PGD, in pixels; default 2.5 eps / steps.
        score: what PGD maximises, default ``score_of(loss)``. An s of I-SCE would change nothing here, because the
            direction of the gradient is the same for every s.
        ramp: the fraction of training, in [0, 1], over which eps increases from 1% to all of it. With a large eps from
            the first step (MNIST, 0.2 and more) small networks learn a constant output.
        factor: the eps of training over the threat's, > 0.
        curriculum: the fraction of training, in [0, 1], over which the steps increase from 1 to all of them (Cai et al.
            2018): an attack that is cheap while it need not be strong. step_size follows, unless it is given.
        batch_norm: "eval" attacks with running statistics, "train" with those of the attack's own batch, as the outer
            loss uses.
        awp: gamma of adversarial weight perturbation, >= 0; 0 is none. See ``_perturbed_weights``.

    Returns:
        The schedule.

    Raises:
        UserError: for a setting out of range, and for a loss without a known score where none is given.
    """
    attack = InnerAttack(as_threat(threat), steps, step_size, ramp, factor, batch_norm, curriculum=curriculum)
    return _at_last_iterate(loss, attack, s, score, awp)


@typed
def friendly(
    loss: Loss | str,
    threat: Threat | str,
    *,
    s: Source | None = None,
    steps: int = 10,
    extra: int = 1,
    step_size: float | None = None,
    score: Loss | str | None = None,
    ramp: float = 0.0,
    factor: float = 1.0,
    curriculum: float = 0.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """Friendly adversarial training: PGD that leaves a sample ``extra`` steps after it is misclassified.

    Samples that are easy to break take few steps, and those that hold take all of them. It keeps more clean accuracy
    than ``adversarial``, and its examples are weaker. On the CPU samples that are done leave the batch, which saves
    their passes; on other devices they are computed along, because to drop them the host would wait at every step.
    Arguments that are not listed here are those of ``adversarial``.

    Args:
        steps: the most steps of a sample, >= 1.
        extra: steps after a misclassified point, >= 0 (tau of the paper, which increases it during training).

    Returns:
        The schedule.

    Raises:
        UserError: for a setting out of range, and for a loss without a known score where none is given.

    Source: Zhang et al. 2020 (FAT).
    """
    attack = InnerAttack(
        as_threat(threat), steps, step_size, ramp, factor, batch_norm, curriculum=curriculum, extra=extra
    )
    return _at_last_iterate(loss, attack, s, score, awp)


def _at_last_iterate(
    loss: Loss | str, attack: InnerAttack, s: Source | None, score: Loss | str | None, awp: float
) -> Schedule:
    """The loss at the end of the inner attack."""
    score_fn = required_loss(score) if score is not None else score_of(required_loss(loss))
    at_least("awp", awp)
    outer_loss = outer_loss_of(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        return with_awp(partial(attack, progress, score=score_fn), partial(at_x_adv, outer_loss, progress), awp)

    return schedule


@typed
def fast(
    loss: Loss | str,
    threat: Threat | str,
    *,
    s: Source | None = None,
    start: float = 2.0,
    step: float = 1.0,
    score: Loss | str | None = None,
    ramp: float = 0.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """Adversarial training with one gradient: a random start, then one step that is not projected (N-FGSM).

        x_adv = box(x + start eps U + step eps ascent(gradient there)),  U uniform in the ball

    A start wider than the ball, without a projection, prevents catastrophic overfitting. With single steps inside the
    ball (start=1, step=1.25, Wong et al. 2020) robust accuracy may collapse from one epoch to the next. x_adv can be
    (start + step) eps away from x. Watch the robust validation accuracy, and keep the best checkpoint.
    Arguments that are not listed here are those of ``adversarial``.

    Args:
        start: the radius of the random start over eps, >= 0.
        step: the length of the step over eps, > 0.

    Returns:
        The schedule.

    Raises:

    Source: de Jorge et al. 2022.
    """
    at_least("start", start)
    at_least("step", step, above=True)
    score_fn = required_loss(score) if score is not None else score_of(required_loss(loss))
    # PGD's ball lies around the random start here and is as wide as the step, so only the box limits the step.
    ball = as_threat(threat)
    attack = InnerAttack(ball, 1, ball.eps, ramp, step, batch_norm, random_start=False)
    at_least("awp", awp)
    outer_loss = outer_loss_of(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        start_eps = start * ramp_fraction(progress, ramp, MIN_EPS_FRACTION) * ball.eps
        start_threat = replace(ball, eps=start_eps) if start else None

        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            x_start = x if start_threat is None else start_threat.random_start(x, noise)
            return attack(progress, model, x_start, y, noise, score=score_fn)

        return with_awp(perturb, partial(at_x_adv, outer_loss, progress), awp)

    return schedule


@typed
def trades(
    loss: Loss | str,
    threat: Threat | str,
    *,
    s: Source | None = None,
    beta: float = 6.0,
    steps: int = 10,
    step_size: float | None = None,
    ramp: float = 0.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """TRADES (Zhang et al. 2019): loss(x) + beta KL(p(x) || p(x_adv)); the attack maximises that KL divergence.

    Arguments that are not listed here are those of ``adversarial``.

    Args:
        loss: the loss of the clean images, (out, y) -> (N,).
        beta: weight of the divergence, >= 0; the paper uses 6 for CIFAR-10 and 1 for MNIST.

    Returns:
        The schedule.

    Raises:
        UserError: for a setting out of range.
    """
    at_least("beta", beta)
    attack = InnerAttack(as_threat(threat), steps, step_size, ramp, 1.0, batch_norm)
    at_least("awp", awp)
    outer_loss = outer_loss_of(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            with batch_norm_mode(model, batch_norm), frozen_eval(model), torch.no_grad():
                z = _logits(model(x))
            return attack(progress, model, x, y, noise, score=lambda out, y: divergence(z, _logits(out)))

        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            out, clean = outer_loss(model, x, x_adv, x, y, progress)
            return clean + beta * divergence(_logits(out), _logits(model(x_adv)))

        return with_awp(perturb, outer, awp)

    return schedule


@typed
def mart(
    loss: Loss | str,
    threat: Threat | str,
    *,
    s: Source | None = None,
    weight: float = 5.0,
    steps: int = 10,
    step_size: float | None = None,
    score: Loss | str | None = None,
    ramp: float = 0.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """MART (Wang et al. 2020): misclassified samples get a larger weight.

        loss(x_adv) - log(1 - max_{j != y} p_j(x_adv)) + weight (1 - p_y(x)) KL(p(x) || p(x_adv))

    With SCE the first two terms are the paper's boosted cross-entropy. Arguments that are not listed here are those of
    ``adversarial``.

    Args:
        loss: the loss at x_adv, (out, y) -> (N,).
        weight: weight of the divergence, >= 0; the paper uses 5 for CIFAR-10.

    Returns:
        The schedule.

    Raises:
        UserError: for a setting out of range, and for a source of s that needs an attack.
    """
    at_least("weight", weight)
    if s is not None and s.needs_attack:
        raise UserError(
            "objective 'mart' computes its loss at x_adv, but an s from an attack needs the loss at x: "
            "take 'adversarial' or 'trades'."
        )
    score_fn = required_loss(score) if score is not None else score_of(required_loss(loss))
    attack = InnerAttack(as_threat(threat), steps, step_size, ramp, 1.0, batch_norm)
    at_least("awp", awp)
    outer_loss = outer_loss_of(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            clean = _logits(model(x))
            out, at_x_adv = outer_loss(model, x, x_adv, x_adv, y, progress)
            return at_x_adv + mart_terms(clean, _logits(out), y, weight)

        return with_awp(partial(attack, progress, score=score_fn), outer, awp)

    return schedule


def divergence(z: Tensor, z_adv: Tensor) -> Tensor:
    """KL(softmax(z) || softmax(z_adv)).

    Args:
        z: (N, K) clean logits.
        z_adv: (N, K) adversarial logits.

    Returns:
        (N,).

    >>> print(f"{divergence(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([[1.0, 1.5, 0.1]])).item():.5f}")
    0.23763
    """
    log_p, log_q = torch.log_softmax(z, 1), torch.log_softmax(z_adv, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def mart_terms(z: Tensor, z_adv: Tensor, y: Tensor, weight: float) -> Tensor:
    """What MART adds to the loss at x_adv: -log(1 - max_{j != y} p_j(x_adv)) + weight (1 - p_y(x)) KL.

    Args:
        z: (N, K) clean logits.
        z_adv: (N, K) adversarial logits.
        y: (N,) labels.
        weight: weight of the divergence.

    Returns:
        (N,).

    >>> z, z_adv = torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([[1.0, 1.5, 0.1]])
    >>> y = torch.tensor([0])
    >>> print(f"{(torch.nn.functional.cross_entropy(z_adv, y) + mart_terms(z, z_adv, y, 5.0)).item():.6f}")
    2.297753
    """
    p, p_adv = torch.softmax(z, 1), torch.softmax(z_adv, 1)
    largest_other = p_adv.scatter(1, y[:, None], 0.0).amax(1)
    wrong = 1 - p.gather(1, y[:, None])[:, 0]
    return -torch.log1p(-largest_other.clamp_max(1 - 1e-6)) + weight * wrong * divergence(z, z_adv)


def _logits(answer: Any) -> Tensor:
    return logits_of(as_outputs(answer))
