"""The min-max problem of training: what the inner player does to x, what the outer player pays for it.

    min over weights  mean_i loss(model, x_i, perturb(x_i), y_i)

A factory returns a Schedule: progress in [0, 1] -> Objective, so every ramp lives in one place. Each takes any loss,
and any source of s (``sources``) where the loss is I-SCE. To add one: the factory and a line in ``OBJECTIVES``.
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
from .losses import Loss, isce, score_of
from .noise import Noise
from .outputs import as_outputs, frozen_eval, logits_of
from .threat import Threat


def _no_weight_context(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Objective:
    """One moment of the min-max problem.

    perturb: (model, x, y, noise) -> x_adv; loss: (model, x, x_adv, y) -> (N,) with a graph; around: (model, x, x_adv,
    y) -> context in which loss and its gradient are taken (where the weights stand meanwhile).
    """

    perturb: Callable[[Model, Tensor, Tensor, Noise], Tensor]
    loss: Callable[[Model, Tensor, Tensor, Tensor], Tensor]
    weight_context: Callable[[Model, Tensor, Tensor, Tensor], AbstractContextManager[Any]] = _no_weight_context


Schedule = Callable[[float], Objective]
OuterLoss = Callable[[Model, Tensor, Tensor, Tensor, Tensor, float], tuple[Any, Tensor]]


def _outer_loss(loss: Loss, s: Source | None) -> OuterLoss:
    """(model, x, x_adv, at, y, progress) -> (the answer that is paid for, the loss), s inferred where asked for."""

    def pay(model: Model, x: Tensor, x_adv: Tensor, at: Tensor, y: Tensor, progress: float) -> tuple[Any, Tensor]:
        if s is None:
            out = model(at)
            return out, loss(out, y)
        at = x if s.adversary else at
        out = as_outputs(model(at))
        plain = getattr(model, "module", model)  # under torchrun: the network itself
        return out, isce(out, y, s=s.infer(SourceContext(plain, x, x_adv, at, out, y, progress)))

    return pay


def standard(loss: Loss, *, s: Source | None = None) -> Schedule:
    """Plain training: the loss on the images as they are.

    Args: loss: (out, y) -> (N,). s: where I-SCE's s comes from, instead of the loss's own number.
    """
    if s is not None and s.adversary:
        raise UserError("this s is measured by an attack, and objective 'standard' has none: take 'adversarial'.")
    pay = _outer_loss(loss, s)

    def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return x

    def schedule(progress: float) -> Objective:
        return Objective(perturb, lambda model, x, x_adv, y: pay(model, x, x, x, y, progress)[1])

    return schedule


def adversarial(
    loss: Loss,
    threat: Threat,
    *,
    s: Source | None = None,
    steps: int = 10,
    step_size: float | None = None,
    score: Loss | None = None,
    ramp: float = 0.0,
    factor: float = 1.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """Adversarial training (Madry et al. 2018): the loss on the last iterate of PGD with one random start.

    Args:
        loss: the outer loss, (out, y) -> (N,); s: where I-SCE's s comes from.
        threat: what the inner player may do; steps, step_size: its PGD, default 10 steps of 2.5 eps / steps.
        score: what PGD climbs, default ``score_of(loss)``. For I-SCE an s in here would change nothing: the gradient's
            direction is the same for every s.
        ramp: the share of training, in [0, 1], over which eps rises from 1% to all of it. Small networks answer the
            same for every image when they meet a large eps (MNIST, 0.2 and more) from the first step.
        factor: the eps of training over that of the threat.
        batch_norm: "eval": the attack sees running statistics; "train": those of its own batch, as the outer loss does.
        awp: gamma of adversarial weight perturbation, 0 is none; see ``_perturbed_weights``.
    """
    climb = score_of(loss) if score is None else score
    inner = _Inner(threat, steps, step_size, ramp, factor, batch_norm)
    at_least("awp", awp)
    pay = _outer_loss(loss, s)

    def schedule(progress: float) -> Objective:
        return _guarded(partial(inner, progress, score=climb), partial(_at_x_adv, pay, progress), awp)

    return schedule


def fast(
    loss: Loss,
    threat: Threat,
    *,
    s: Source | None = None,
    start: float = 2.0,
    step: float = 1.0,
    score: Loss | None = None,
    ramp: float = 0.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """Adversarial training with one gradient: a random start, then one step that is not projected (N-FGSM).

        x_adv = box(x + start eps U + step eps ascent(gradient there)),  U uniform in the ball

    A start wider than the ball, without a projection, is what keeps it from catastrophic overfitting, where training on
    single steps within the ball (start=1, step=1.25, Wong et al. 2020) may break down from one epoch to the next. x_adv
    can lie (start + step) eps from x. Watch the robust accuracy of validation, and keep the best epoch.
    Source: de Jorge et al. 2022.
    """
    at_least("start", start)
    at_least("step", step, above=True)
    climb = score_of(loss) if score is None else score
    # The step is held only by the box: the ball around its start is as wide as the step.
    inner = _Inner(threat, 1, threat.eps, ramp, step, batch_norm, random_start=False)
    at_least("awp", awp)
    pay = _outer_loss(loss, s)

    def schedule(progress: float) -> Objective:
        wide = replace(threat, eps=start * ramp_fraction(progress, ramp, LEAST) * threat.eps) if start else None

        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            begin = x if wide is None else wide.random_start(x, noise)
            return inner(progress, model, begin, y, noise, score=climb)

        return _guarded(perturb, partial(_at_x_adv, pay, progress), awp)

    return schedule


def trades(
    loss: Loss,
    threat: Threat,
    *,
    s: Source | None = None,
    beta: float = 6.0,
    steps: int = 10,
    step_size: float | None = None,
    ramp: float = 0.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """TRADES (Zhang et al. 2019): loss(x) + beta KL(p(x) || p(x_adv)), x_adv climbing that KL from a random start.

    Args: loss: of the clean images; beta >= 0: 6 for CIFAR-10, 1 for MNIST; the others as of ``adversarial``.
    """
    at_least("beta", beta)
    inner = _Inner(threat, steps, step_size, ramp, 1.0, batch_norm)
    at_least("awp", awp)
    pay = _outer_loss(loss, s)

    def schedule(progress: float) -> Objective:
        def perturb(model: Model, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
            with _batch_norm(model, batch_norm), frozen_eval(model), torch.no_grad():
                z = _logits(model(x))
            return inner(progress, model, x, y, noise, score=lambda out, y: divergence(z, _logits(out)))

        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            out, first = pay(model, x, x_adv, x, y, progress)
            return first + beta * divergence(_logits(out), _logits(model(x_adv)))

        return _guarded(perturb, outer, awp)

    return schedule


def mart(
    loss: Loss,
    threat: Threat,
    *,
    s: Source | None = None,
    weight: float = 5.0,
    steps: int = 10,
    step_size: float | None = None,
    score: Loss | None = None,
    ramp: float = 0.0,
    batch_norm: str = "eval",
    awp: float = 0.0,
) -> Schedule:
    """MART (Wang et al. 2020): what is wrong already is pulled back harder.

        loss(x_adv) - log(1 - max_{j != y} p_j(x_adv)) + weight (1 - p_y(x)) KL(p(x) || p(x_adv))

    Args: weight >= 0: 5 for CIFAR-10; the others as of ``adversarial``. With SCE the first two terms are its BCE.
    """
    at_least("weight", weight)
    if s is not None and s.adversary:
        raise UserError("objective 'mart' pays for x_adv, and an s that the attack measures is paid for at x.")
    climb = score_of(loss) if score is None else score
    inner = _Inner(threat, steps, step_size, ramp, 1.0, batch_norm)
    at_least("awp", awp)
    pay = _outer_loss(loss, s)

    def schedule(progress: float) -> Objective:
        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            clean = _logits(model(x))
            out, first = pay(model, x, x_adv, x_adv, y, progress)
            return first + mart_terms(clean, _logits(out), y, weight)

        return _guarded(partial(inner, progress, score=climb), outer, awp)

    return schedule


def interval(loss: Loss, threat: Threat, *, kappa: float = 0.5, ramp: float = 0.55, factor: float = 1.0) -> Schedule:
    """Interval-bound training (Gowal et al. 2019): what the worst case could be, by bounds; no attack at all.

        (1 - k) loss(bounds of the gaps over the threat) + k loss(x),    k from 1 down to kappa while eps rises

    An s of the loss stands on top of the bound, where it is a hinge that is certified.

    Args: loss: of logits alone (the SCE family); kappa in [0, 1]: the clean share at the end; ramp: the share of
    training over which eps and k move; factor: the eps of training over that of the threat.
    Raises UserError for a network that has no interval bounds (``bounds.logit_difference_bounds``).
    """
    check_fraction("ramp, over which eps rises,", ramp)
    check_fraction("kappa, the clean share of interval training,", kappa)
    at_least("factor", factor, above=True)

    def schedule(progress: float) -> Objective:
        share = ramp_fraction(progress, ramp)
        now, clean = replace(threat, eps=share * factor * threat.eps), 1 - share * (1 - kappa)

        def outer(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
            first = loss(model(x), y)
            network: Any = getattr(model, "module", model)  # under torchrun: the network itself
            worst = logit_difference_bounds(network, *box_of(x, now), y)
            return clean * first + (1 - clean) * loss(worst, y)

        return Objective(lambda model, x, y, noise: x, outer)

    return schedule


def divergence(z: Tensor, z_adv: Tensor) -> Tensor:
    """KL(softmax(z) || softmax(z_adv)): (N, K), (N, K) -> (N,).

    >>> print(f"{divergence(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([[1.0, 1.5, 0.1]])).item():.5f}")
    0.23763
    """
    log_p, log_q = torch.log_softmax(z, 1), torch.log_softmax(z_adv, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def mart_terms(z: Tensor, z_adv: Tensor, y: Tensor, weight: float) -> Tensor:
    """-log(1 - max_{j != y} p_j(x_adv)) + weight (1 - p_y(x)) KL: what MART adds to the loss at x_adv; (N,).

    >>> z, z_adv = torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([[1.0, 1.5, 0.1]])
    >>> y = torch.tensor([0])
    >>> print(f"{(torch.nn.functional.cross_entropy(z_adv, y) + mart_terms(z, z_adv, y, 5.0)).item():.6f}")
    2.297753
    """
    p, p_adv = torch.softmax(z, 1), torch.softmax(z_adv, 1)
    rival = p_adv.scatter(1, y[:, None], 0.0).amax(1)
    wrong = 1 - p.gather(1, y[:, None])[:, 0]
    return -torch.log1p(-rival.clamp_max(1 - 1e-6)) + weight * wrong * divergence(z, z_adv)


LEAST = 0.01  # of eps, where an attack's rises: less would move nothing


@dataclass(frozen=True)
class _Inner:
    """The inner player: the last iterate of PGD, its eps rising with progress. Settings as of ``adversarial``."""

    threat: Threat
    steps: int
    step_size: float | None
    ramp: float
    factor: float
    batch_norm: str
    random_start: bool = True

    def __post_init__(self) -> None:
        if not self.steps >= 1:
            raise UserError(f"adversarial training needs steps >= 1, got {self.steps}.")
        if self.step_size is not None:
            at_least("step_size", self.step_size, above=True)
        check_fraction("ramp, the share of training over which eps rises,", self.ramp)
        at_least("factor", self.factor, above=True)
        if self.batch_norm not in ("eval", "train"):
            raise UserError(f"batch_norm of the inner attack must be 'eval' or 'train', got '{self.batch_norm}'.")

    def __call__(self, progress: float, model: Model, x: Tensor, y: Tensor, noise: Noise, *, score: Loss) -> Tensor:
        share = self.factor * ramp_fraction(progress, self.ramp, LEAST)
        with _batch_norm(model, self.batch_norm):
            return pgd(
                model,
                x,
                y,
                replace(self.threat, eps=share * self.threat.eps),
                score=score,
                noise=noise,
                steps=self.steps,
                step_size=None if self.step_size is None else share * self.step_size,
                random_start=self.random_start,
                iterate="last",
            )


def _at_x_adv(pay: OuterLoss, progress: float, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    return pay(model, x, x_adv, x_adv, y, progress)[1]


def _logits(answer: Any) -> Tensor:
    return logits_of(as_outputs(answer))


def _guarded(perturb: Any, outer: Any, awp: float) -> Objective:
    """With weight perturbation around it, where awp > 0."""
    if not awp:
        return Objective(perturb, outer)

    def around(model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[Any]:
        return _perturbed_weights(model, lambda: outer(model, x, x_adv, y).mean(), awp)

    return Objective(perturb, outer, around)


@contextmanager
def _perturbed_weights(model: Model, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Adversarial weight perturbation (Wu et al. 2020): w + gamma ||w|| g / ||g|| for each matrix and kernel, g the
    gradient of the loss; the weights come back on the way out. Batch statistics move once, not twice.
    """
    if not isinstance(model, nn.Module):
        raise UserError("awp perturbs weights: it needs an nn.Module.")
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    buffers = [(b, b.clone()) for b in model.buffers()]
    grads = torch.autograd.grad(loss(), weights, allow_unused=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
        kept = [w.clone() for w in weights]
        for w, g in zip(weights, grads, strict=True):
            if g is not None:
                if distributed.is_available() and distributed.is_initialized():  # one direction for all processes
                    distributed.all_reduce(g)
                w.add_(g * (gamma * w.norm() / g.norm().clamp_min(1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for w, before in zip(weights, kept, strict=True):
                w.copy_(before)


@contextmanager
def _batch_norm(model: Model, mode: str) -> Iterator[None]:
    """With "train", batch norms forget their running statistics for a while: even in eval mode they then use those of
    the batch, and move nothing. Only those that are in train mode: one that its owner froze stays frozen.
    """
    norms = [
        module
        for module in (model.modules() if mode == "train" and isinstance(model, nn.Module) else ())
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, (mean, var) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, var


OBJECTIVES: dict[str, Callable[..., Schedule]] = {
    "standard": standard,
    "adversarial": adversarial,
    "fast": fast,
    "trades": trades,
    "mart": mart,
    "interval": interval,
}
