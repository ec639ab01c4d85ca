"""The min-max problem of training: how the attack perturbs x, and which loss the weights minimise.

    min over weights  mean_i loss(model, x_i, perturb(x_i), y_i)

A factory returns a Schedule: progress in [0, 1] -> Objective, so that every ramp is in one place. Each factory takes
any loss, and for I-SCE any source of s (``holdfast.information.sources``). To add an objective: the factory, and a line
in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .attacks import Model, pgd
from .bounds import box_of, logit_difference_bounds
from .errors import UserError, at_least
from .information.sources import Source, SourceContext, check_fraction, ramp_fraction
from .losses import Loss, isce, required_loss, score_of
from .noise import Noise
from .outputs import as_outputs, batch_norm_mode, frozen_eval, logits_of
from .threat import Threat, as_threat
from .user_input import typed


def _no_weight_context(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Objective:
    """The min-max problem at one time of training.

    Attributes:
        perturb: (model, x, y, noise) -> x_adv, the inner problem.
        loss: (model, x, x_adv, y) -> (N,) with a graph, the outer loss.
        weight_context: (model, x, x_adv, y) -> a context manager in which the loss and its gradient are computed; it
            may perturb the weights.
    """

    perturb: Callable[[Model, Tensor, Tensor, Noise], Tensor]
    loss: Callable[[Model, Tensor, Tensor, Tensor], Tensor]
    weight_context: Callable[[Model, Tensor, Tensor, Tensor], AbstractContextManager[Any]] = _no_weight_context


Schedule = Callable[[float], Objective]
# (model, x, x_adv, loss_input, y, progress) -> (the model's output at loss_input, the loss there)
OuterLoss = Callable[[Model, Tensor, Tensor, Tensor, Tensor, float], tuple[Any, Tensor]]


def _outer_loss(loss: Loss, s: Source | None) -> OuterLoss:
    """The loss at ``loss_input``, with s from the source where there is one; at x where s is measured by the attack."""

    def outer_loss(
        model: Model, x: Tensor, x_adv: Tensor, loss_input: Tensor, y: Tensor, progress: float
    ) -> tuple[Any, Tensor]:
        if s is None:
            out = model(loss_input)
            return out, loss(out, y)
        loss_input = x if s.needs_attack else loss_input
        out = as_outputs(model(loss_input))
        network = getattr(model, "module", model)  # without the wrapper of distributed training
        context = SourceContext(network, x, x_adv, loss_input, out, y, progress)
        return out, isce(out, y, s=s.infer(context))

    return outer_loss


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
    outer_loss = _outer_loss(required_loss(loss), s)

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
        batch_norm: "eval" attacks with running statistics, "train" with those of the attack's own batch, as the outer
            loss uses.
        awp: gamma of adversarial weight perturbation, >= 0; 0 is none. See ``_perturbed_weights``.

    Returns:
        The schedule.

    Raises:
        UserError: for a setting out of range, and for a loss without a known score where none is given.
    """
    score_fn = required_loss(score) if score is not None else score_of(required_loss(loss))
    attack = _InnerAttack(as_threat(threat), steps, step_size, ramp, factor, batch_norm)
    at_least("awp", awp)
    outer_loss = _outer_loss(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        return _with_awp(partial(attack, progress, score=score_fn), partial(_at_x_adv, outer_loss, progress), awp)

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
    attack = _InnerAttack(ball, 1, ball.eps, ramp, step, batch_norm, random_start=False)
    at_least("awp", awp)
    outer_loss = _outer_loss(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        start_eps = start * ramp_fraction(progress, ramp, MIN_EPS_FRACTION) * ball.eps
        start_threat = replace(ball, eps=start_eps) if start else None

        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            x_start = x if start_threat is None else start_threat.random_start(x, noise)
            return attack(progress, model, x_start, y, noise, score=score_fn)

        return _with_awp(perturb, partial(_at_x_adv, outer_loss, progress), awp)

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
    attack = _InnerAttack(as_threat(threat), steps, step_size, ramp, 1.0, batch_norm)
    at_least("awp", awp)
    outer_loss = _outer_loss(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            with batch_norm_mode(model, batch_norm), frozen_eval(model), torch.no_grad():
                z = _logits(model(x))
            return attack(progress, model, x, y, noise, score=lambda out, y: divergence(z, _logits(out)))

        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            out, clean = outer_loss(model, x, x_adv, x, y, progress)
            return clean + beta * divergence(_logits(out), _logits(model(x_adv)))

        return _with_awp(perturb, outer, awp)

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
    attack = _InnerAttack(as_threat(threat), steps, step_size, ramp, 1.0, batch_norm)
    at_least("awp", awp)
    outer_loss = _outer_loss(required_loss(loss), s)

    def schedule(progress: float) -> Objective:
        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            clean = _logits(model(x))
            out, at_x_adv = outer_loss(model, x, x_adv, x_adv, y, progress)
            return at_x_adv + mart_terms(clean, _logits(out), y, weight)

        return _with_awp(partial(attack, progress, score=score_fn), outer, awp)

    return schedule


@typed
def interval(
    loss: Loss | str, threat: Threat | str, *, kappa: float = 0.5, ramp: float = 0.55, factor: float = 1.0
) -> Schedule:
    """Interval-bound training (Gowal et al. 2019): the loss of the worst case by interval bounds; no attack.

        (1 - k) loss(bounds of the logit differences over the threat) + k loss(x)

    k decreases from 1 to kappa while eps increases. An s of the loss is added to the bound: a certified margin.

    Args:
        loss: of logits alone (the SCE family), (out, y) -> (N,).
        threat: what the bounds hold for.
        kappa: the weight of the clean loss at the end, in [0, 1].
        ramp: the fraction of training, in [0, 1], over which eps and k change.
        factor: the eps of training over the threat's, > 0.

    Returns:
        The schedule.

    Raises:
        UserError: for a setting out of range, and for a network that has no interval bounds
            (``bounds.logit_difference_bounds``).
    """
    check_fraction("ramp, over which eps increases,", ramp)
    check_fraction("kappa, the weight of the clean loss,", kappa)
    at_least("factor", factor, above=True)
    ball, loss_fn = as_threat(threat), required_loss(loss)

    def schedule(progress: float) -> Objective:
        fraction = ramp_fraction(progress, ramp)
        current, k = replace(ball, eps=fraction * factor * ball.eps), 1 - fraction * (1 - kappa)

        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            clean = loss_fn(model(x), y)
            network: Any = getattr(model, "module", model)  # without the wrapper of distributed training
            worst = logit_difference_bounds(network, *box_of(x, current), y)
            return k * clean + (1 - k) * loss_fn(worst, y)

        return Objective(lambda model, x, y, noise: x, outer)

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


MOST_STEPS = 10_000  # of an inner attack: more is a slip of the finger, and never ends
MIN_EPS_FRACTION = 0.01  # of eps, at the start of a ramp: a smaller one would leave x as it is


@dataclass(frozen=True)
class _InnerAttack:
    """The inner attack: the last iterate of PGD, with the settings of ``adversarial``."""

    threat: Threat
    steps: int
    step_size: float | None
    ramp: float
    factor: float
    batch_norm: str
    random_start: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"adversarial training needs steps >= 1 and <= {MOST_STEPS:,}, got {self.steps}.")
        if self.step_size is not None:
            at_least("step_size", self.step_size, above=True)
        check_fraction("ramp, the fraction of training over which eps increases,", self.ramp)
        at_least("factor", self.factor, above=True)
        if self.batch_norm not in ("eval", "train"):
            raise UserError(f"batch_norm of the inner attack must be 'eval' or 'train', got '{self.batch_norm}'.")

    def __call__(self, progress: float, model: Model, x: Tensor, y: Tensor, noise: Noise, *, score: Loss) -> Tensor:
        fraction = self.factor * ramp_fraction(progress, self.ramp, MIN_EPS_FRACTION)
        with batch_norm_mode(model, self.batch_norm):
            return pgd(
                model,
                x,
                y,
                replace(self.threat, eps=fraction * self.threat.eps),
                score=score,
                noise=noise,
                steps=self.steps,
                step_size=None if self.step_size is None else fraction * self.step_size,
                random_start=self.random_start,
                iterate="last",
            )


def _at_x_adv(outer_loss: OuterLoss, progress: float, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """The outer loss at x_adv."""
    return outer_loss(model, x, x_adv, x_adv, y, progress)[1]


def _logits(answer: Any) -> Tensor:
    return logits_of(as_outputs(answer))


def _with_awp(perturb: Any, outer: Any, awp: float) -> Objective:
    """The objective, with adversarial weight perturbation where awp > 0."""
    if not awp:
        return Objective(perturb, outer)

    def weight_context(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[Any]:
        return _perturbed_weights(model, lambda: outer(model, x, x_adv, y).mean(), awp)

    return Objective(perturb, outer, weight_context)


@contextmanager
def _perturbed_weights(model: Model, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Adversarial weight perturbation (Wu et al. 2020): w + gamma ||w|| g / ||g|| for each matrix and kernel.

    g is the gradient of the loss. The weights are restored on exit. Batch-norm statistics are updated by the outer loss
    alone, not by the pass that computes g.
    """
    if not isinstance(model, nn.Module):
        raise UserError("awp perturbs weights: it needs an nn.Module.")
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    buffers = [(b, b.clone()) for b in model.buffers()]
    grads = torch.autograd.grad(loss(), weights, allow_unused=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
        saved = [w.clone() for w in weights]
        for w, g in zip(weights, grads, strict=True):
            if g is not None:
                if distributed.is_available() and distributed.is_initialized():  # the same direction in all processes
                    distributed.all_reduce(g)
                w.add_(g * (gamma * w.norm() / g.norm().clamp_min(1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for w, before in zip(weights, saved, strict=True):
                w.copy_(before)


OBJECTIVES: dict[str, Callable[..., Schedule]] = {
    "standard": standard,
    "adversarial": adversarial,
    "fast": fast,
    "trades": trades,
    "mart": mart,
    "interval": interval,
}
