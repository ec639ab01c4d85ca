"""Attacks of other kinds: a few pixels, no gradient, the margin taken apart, the least likely class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss, negative_margin
from ..noise import Noise
from ..outputs import Outputs, logits_of
from ..threat import Threat
from .base import Model, MostAdversarial, attack, predict, score_and_grad, should_drop_fooled, targeted_score
from .minimal_norm import Adam, scores_and_grads
from .pgd import bim


@attack
def jsma(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 100,
    target: Tensor | None = None,
) -> Tensor:
    """Saliency map attack (Papernot et al. 2016), one pixel a step: the most salient one, as far as the threat allows.

    With a = dz_t/dx and b = d(sum of the other z)/dx a pixel counts where a and b have opposite signs, its saliency is
    |a b| times the way that it can go, and it goes in the direction of a. Where no pixel counts, those of the largest
    |a - b / (K - 1)| do. A pixel moves once. Under linf it goes eps far, under l2 and l1 as far as the size left.

    Args: as for ``pgd``; the score and the noise are not used: it goes by the logits. steps: pixels at most; target:
    the class t, by default the likeliest wrong one, looked up at each step.

    Returns x_adv, (N, C, H, W), in the threat: at most ``steps`` values of it differ from x. The paper moves pairs and
    in one direction. Greedy and blind to curvature: under linf a weak attack, whose merit is how few pixels it needs.
    """
    worst = MostAdversarial(x, y)
    rows, base, x_adv = worst.standing(), x, x
    fresh = torch.ones_like(x, dtype=torch.bool).flatten(1)  # pixels that have not moved
    for step in range(steps):
        mine, aimed = y[rows], None if target is None else target[rows]

        def heights(logits: Tensor, mine: Tensor = mine, aimed: Tensor | None = aimed) -> Tensor:
            wrong = logits.detach().scatter(1, mine[:, None], -math.inf).argmax(1) if aimed is None else aimed
            toward = logits.gather(1, wrong[:, None])
            return torch.cat([toward, logits.sum(1, keepdim=True) - toward], 1)

        logits, _, grads = scores_and_grads(model, x_adv, heights)
        stands = worst.see(rows, x_adv, logits)
        if should_drop_fooled(step, x):
            rows, base, x_adv, fresh, grads = (t[stands] for t in (rows, base, x_adv, fresh, grads))
            if len(rows) == 0:
                return worst.x
        a, b = grads.flatten(2).unbind(1)
        even = a - b / (logits.shape[1] - 1)
        here, start = x_adv.flatten(1), base.flatten(1)
        left = _budget_left(threat, here - start)[:, None]
        moves = []
        for direction in (a.sign(), even.sign()):
            room = torch.where(direction > 0, threat.hi - here, here - threat.lo)
            moves.append(direction * torch.where(fresh, torch.minimum(room, left), 0.0))
        opposed = torch.where(a * b < 0, (a * b * moves[0]).abs(), 0.0)
        any_opposed = opposed.amax(1, keepdim=True) > 0
        salience = torch.where(any_opposed, opposed, (even * moves[1]).abs())
        pixel = salience.argmax(1, keepdim=True)
        move = torch.where(any_opposed, moves[0], moves[1]).gather(1, pixel)
        fresh = fresh.scatter(1, pixel, False)
        x_adv = threat.project(here.scatter_add(1, pixel, move).view_as(x_adv), base)
    worst.see(rows, x_adv, predict(model, x_adv).logits)
    return worst.x


def _budget_left(threat: Threat, delta: Tensor) -> Tensor:
    """How far a pixel that has not moved may go: (N, D) -> (N,)."""
    size = threat.size(delta)
    if threat.norm == "linf":
        return torch.full_like(size, threat.eps)
    if threat.norm == "l1":
        return (threat.eps - size).clamp_min(0.0)
    return (threat.eps**2 - size.square()).clamp_min(0.0).sqrt()


@attack
def spsa(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 40,
    step_size: float | None = None,
    pairs: int = 32,
    together: int = 8,
    width: float = 0.01,
    target: Tensor | None = None,
) -> Tensor:
    """SPSA (Uesato et al. 2018): Adam on a gradient that is guessed from answers alone.

    g = mean of v (score(x_adv + width v) - score(x_adv - width v)) / (2 width) over random signs v;
    x_adv <- project(x_adv + step_size * Adam(g)); l2: * ascent(Adam(g)); l1: * ascent(Adam's mean of g)

    Args: as for ``pgd``; pairs: of answers for each step and sample; together: how many of them go to the model at
    once, in batches of 2 * together * N; width: of the differences, in pixels; step_size: default 2.5 eps / steps.

    Returns x_adv, (N, C, H, W), in the threat. Raises UserError where pairs, together or width are not positive. The
    guess is as noisy as sqrt(dimension / pairs): the paper asks thousands of pairs a step. It starts at x, and the
    model is asked within ``width`` of the threat, always inside the box.
    """
    if pairs < 1 or together < 1 or not width > 0:
        raise UserError(f"pairs, together and width must be positive, got {pairs}, {together} and {width}.")
    size = 2.5 * threat.eps / steps if step_size is None else step_size
    climb, goal = targeted_score(score, y, target)
    worst = MostAdversarial(x, y)
    rows, base, x_adv = worst.standing(), x, x
    adam = Adam(x)
    for step in range(steps):
        stands = worst.see(rows, x_adv, predict(model, x_adv).logits)
        if should_drop_fooled(step, x):
            rows, base, x_adv, adam.mean, adam.square = (t[stands] for t in (rows, base, x_adv, adam.mean, adam.square))
            if len(rows) == 0:
                return worst.x
        grad = torch.zeros_like(x_adv)
        for first in range(0, pairs, together):
            count = min(together, pairs - first)
            v = noise[rows].fold(step, first).sign((count, *x.shape[1:]), x.dtype)
            probes = (x_adv[:, None] + width * torch.stack([v, -v])).clamp(threat.lo, threat.hi)
            goals = goal(rows[:, None].expand(-1, count).flatten().repeat(2))
            value = climb(predict(model, probes.flatten(0, 2)), goals).to(x.dtype).view(2, len(rows), count)
            slope = ((value[0] - value[1]) / (2 * width)).nan_to_num(0.0, 0.0, 0.0)
            grad = grad + (v * slope.view(*slope.shape, *[1] * (x.ndim - 1))).sum(1) / pairs
        way = adam(grad)
        if threat.norm != "linf":  # under l1 Adam would make all pixels alike, where the few that matter are wanted
            way = threat.ascent(way if threat.norm == "l2" else adam.mean, x_adv)
        x_adv = threat.project(x_adv + size * way, base)
    worst.see(rows, x_adv, predict(model, x_adv).logits)
    return worst.x


def _negative_true_logit(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """-z_y."""
    return -logits_of(out).gather(1, y[:, None])[:, 0]


def _largest_other_logit(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j."""
    return logits_of(out).scatter(1, y[:, None], -math.inf).amax(1)


@attack
def md(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 2,
    target: Tensor | None = None,
) -> Tensor:
    """Margin decomposition (Ma et al. 2020): one term of the margin alone for the first half, then the whole margin.

    The margin's gradient is the sum of those of -z_y and max_{j != y} z_j. Where one of them swamps the other (networks
    with imbalanced gradients) the first half climbs -z_y alone, or in every second restart max z_j alone.

    Args: as for ``pgd``; the score is not used. step_size: the first step of each half, falling by a cosine; default
    2 eps (eps for l1); restarts: two of them take one term each; target: z_t takes the place of max z_j.

    Returns x_adv, (N, C, H, W), in the threat.
    """
    first = step_size if step_size is not None else threat.eps * (1 if threat.norm == "l1" else 2)
    climb, goal = targeted_score(negative_margin, y, target)
    worst, half = MostAdversarial(x, y), steps // 2
    for restart in range(restarts):
        rows = worst.standing()
        if len(rows) == 0:
            break
        base = x[rows]
        x_adv = threat.random_start(base, noise[rows].fold(restart))
        for step in range(steps):
            if step >= half:
                out, _, grad = score_and_grad(model, x_adv, climb, goal(rows))
            elif restart % 2 == 0:
                out, _, grad = score_and_grad(model, x_adv, _negative_true_logit, y[rows])
            elif target is None:
                out, _, grad = score_and_grad(model, x_adv, _largest_other_logit, y[rows])
            else:  # z_t is what _own has for t, negated
                out, _, grad = score_and_grad(model, x_adv, lambda out, t: -_negative_true_logit(out, t), target[rows])
            stands = worst.see(rows, x_adv, out.logits)
            if should_drop_fooled(step, x):
                rows, base, x_adv, grad = (t[stands] for t in (rows, base, x_adv, grad))
                if len(rows) == 0:
                    break
            share = step / half if step < half else (step - half) / (steps - half)
            size = first * (1 + math.cos(math.pi * share)) / 2
            x_adv = threat.project(x_adv + size * threat.ascent(grad, x_adv), base)
        if len(rows):
            worst.see(rows, x_adv, predict(model, x_adv).logits)
    return worst.x


@attack
def least_likely(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 10,
    target: Tensor | None = None,
    **settings: object,
) -> Tensor:
    """Iterative least-likely class method (Kurakin et al. 2017): bim towards the class that the model believes least.

    Args: as for ``bim``; target: another class to go for. steps=1, step_size=eps is its one-step form.
    Returns x_adv, (N, C, H, W), in the threat. Any mistake counts, but the way to the least likely class is the longest
    one: weaker than bim where the threat is small.
    """
    if target is None:
        target = predict(model, x).logits.scatter(1, y[:, None], math.inf).argmin(1)
    return bim(model, x, y, threat, score=score, noise=noise, steps=steps, target=target, **settings)
