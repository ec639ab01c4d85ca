"""Attacks that look for the smallest perturbation that fools, and only then ask whether the threat allows it.

Each keeps the nearest fooled point it has seen and returns it where it lies in the threat; elsewhere the worse of x and
that point put into the threat. With a threat as wide as the box they measure distances: ``distances(x_adv, x, norm)``.
But for deepfool, which never turns back, they walk all samples to the end, since a nearer point may follow: none leaves
the batch, nothing waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import Loss, negative_margin, targeted
from ..noise import Noise
from ..outputs import Outputs, as_outputs, logits_of
from ..threat import Threat, column
from .base import (
    Model,
    MostAdversarial,
    all_rows,
    attack,
    fooled,
    predict,
    score_and_grad,
    should_drop_fooled,
    targeted_score,
)

# cw: how far into tanh's range the walls are put, so that its slope there is not zero. linf may start a little off x.
TANH_RANGE = {"linf": 0.9, "l2": 1 - 1e-4}
INITIAL_TEMPERATURE = 0.2  # cw, fmn: the first heat of the rivals, over the margin at x
NEAR_BOUNDARY = 0.1  # deepfool: the boundary is close once the way to it is this share of what is walked


def distances(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """||x_adv - x|| of each sample: (N, ...), (N, ...) -> (N,).

    >>> distances(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), "l2")
    tensor([5.])
    """
    return Threat(norm, 1.0).size(x_adv - x)


class NearestAdversarial:
    """The nearest fooled point seen for each sample and its size, infinite while there is none."""

    def __init__(self, x: Tensor, y: Tensor, threat: Threat) -> None:
        self.base, self.y, self.threat = x, y, threat
        self.x = x.clone()
        self.size = torch.full(y.shape, math.inf, dtype=x.dtype, device=x.device)

    def see(self, x_adv: Tensor, logits: Tensor, sure: Tensor | None = None) -> Tensor:
        """Keep the points that fool (and are ``sure``) where they are nearer; says which fool, (N,) bool."""
        x_adv = x_adv.detach()
        size = self.threat.size(x_adv - self.base)
        fools = fooled(logits.detach(), self.y)
        fools = fools if sure is None else fools & sure
        nearer = fools & (size < self.size)  # NaN compares as False
        self.x = torch.where(column(nearer, x_adv), x_adv, self.x)
        self.size = torch.where(nearer, size, self.size)
        return fools

    def answer(self, model: Model, last: Tensor) -> Tensor:
        """The nearest point where the threat holds it; else the worse of x and it, or ``last``, put into the threat."""
        found = self.size.isfinite()
        point = torch.where(column(found, self.x), self.x, last)
        inside = self.threat.project(point, self.base)
        worst, rows = MostAdversarial(self.base, self.y), all_rows(self.y)
        for candidate in (self.base, inside):
            worst.see(rows, candidate, predict(model, candidate).logits)
        reached = found & (inside == point).flatten(1).all(1)
        return torch.where(column(reached, point), point, worst.x)


def scores_and_grads(model: Model, x_adv: Tensor, heights: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``contract.rise`` for several scores of one answer: (logits, heights (N, J), their gradients (N, J, ...)).

    heights: (N, K) logits -> (N, J). One forward pass and J backward passes, whatever N is.
    """
    x_adv = x_adv.detach().requires_grad_()
    logits = as_outputs(model(x_adv)).logits
    values = heights(logits)
    if not values.requires_grad:  # the model cut the graph
        flat = x_adv.new_zeros(len(values), values.shape[1], *x_adv.shape[1:])
        return logits, values.to(x_adv.dtype), flat
    grads = [
        torch.autograd.grad(value.sum(), x_adv, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        for value in values.unbind(1)
    ]
    return logits.detach(), values.detach().to(x_adv.dtype), torch.stack(grads, 1).nan_to_num(0.0)


class Adam:
    """Adam's direction (Kingma and Ba 2015), pixel by pixel, so that no sample knows of the others."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, grad: Tensor) -> Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * grad
        self.square = 0.999 * self.square + 0.001 * grad.square()
        return (self.mean / (1 - 0.9**self.count)) / ((self.square / (1 - 0.999**self.count)).sqrt() + 1e-12)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _distance_to_boundary(value: Tensor, grad: Tensor, threat: Threat) -> Tensor:
    """How far the boundary is if the score is linear: |value| / ||gradient||, in the dual norm; at most 1e6."""
    steep = threat.dual_size(grad)
    return (value.abs() / steep.clamp_min(torch.finfo(grad.dtype).tiny)).to(grad.dtype).clamp(1e-12, 1e6)


def _target_classes(model: Model, x: Tensor, y: Tensor, count: int, target: Tensor | None) -> Tensor:
    """The classes to go for, (N, J): the target alone, or the ``count`` likeliest wrong ones, as many as there are."""
    if target is not None:
        return target[:, None]
    if count < 1:
        raise UserError(f"at least one wrong class must be gone for, got {count}.")
    logits = predict(model, x).logits
    return logits.scatter(1, y[:, None], -math.inf).topk(min(count, logits.shape[1] - 1), dim=1).indices


def _logit_differences_to(y: Tensor, classes: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits -> z_j - z_y of these classes, (N, J)."""
    return lambda logits: logits.gather(1, classes) - logits.gather(1, y[:, None])


def _soft_margin(heat: Tensor, target: Tensor | None) -> Loss:
    """The negative margin with all rivals in it: heat logsumexp_{j != y}(z_j / heat) - z_y; the margin at heat 0.

    The likeliest wrong class at x need not be the nearest one. While it is warm the others pull too, and an attack that
    goes by the margin does not settle at the first boundary it meets. Where there is a target it is alone.
    """
    if target is not None:
        return targeted(negative_margin)

    def score(out: Outputs | Tensor, y: Tensor) -> Tensor:
        logits = logits_of(out)
        wrong = logits.scatter(1, y[:, None], -math.inf)
        top, warm = wrong.detach().amax(1, keepdim=True), heat.clamp_min(1e-30)[:, None]
        rivals = top + warm * ((wrong - top) / warm).logsumexp(1, keepdim=True)
        return (rivals - logits.gather(1, y[:, None]))[:, 0]

    return score


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


@attack
def deepfool(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 50,
    classes: int = 9,
    overshoot: float = 0.02,
    share: float = 0.5,
    target: Tensor | None = None,
) -> Tensor:
    """DeepFool (Moosavi-Dezfooli et al. 2016): steps to the nearest linearised boundary until it is crossed.

    r <- r + share argmin ||r_j|| over j, where r_j takes z_j - z_y to zero by its gradient;
    x_adv = x + (1 + overshoot) r

    Args: as for ``pgd``; the score and the noise are not used: it goes by the logits. classes: how many of the
    likeliest wrong classes are compared at each step; overshoot: the share by which it goes beyond the boundary;
    share: of the way to the boundary that a step takes while the boundary is far; 1 is the paper's step; target: the
    one class to compare. Steps stay in the box, which the paper's do not: where walls stop many pixels a whole step
    moves the others so far that its end is well beyond a curved boundary (10% to 25% too far on MNIST).

    Returns x_adv, (N, C, H, W), in the threat. Greedy: it crosses the first boundary that it meets and never turns
    back, so on curved networks fab finds nearer points. Raises UserError where classes < 1 or share is not in (0, 1].

    >>> model = lambda x: torch.cat([x.flatten(1), -x.flatten(1)], 1)  # right while x > 0
    >>> x, y, wide = torch.full((1, 1, 1, 1), 0.25), torch.tensor([0]), Threat("linf", 0.5, -1, 1)
    >>> deepfool(model, x, y, wide, score=negative_margin, noise=Noise(0, torch.arange(1)), share=1.0)
    tensor([[[[-0.0050]]]])
    """
    if not 0 < share <= 1:
        raise UserError(f"share, how much of the way to the boundary a step takes, must lie in (0, 1], got {share}.")
    rivals, rows = _target_classes(model, x, y, classes, target), all_rows(y)
    near, ends, base, walked, x_adv = NearestAdversarial(x, y, threat), x.clone(), x, x, x
    for step in range(steps):
        logits, above, grads = scores_and_grads(model, x_adv, _logit_differences_to(y[rows], rivals[rows]))
        stands = ~fooled(logits, y[rows])
        if should_drop_fooled(step, x):  # what is fooled stays where it is
            ends[rows] = x_adv
            rows, base, walked, x_adv, above, grads = (t[stands] for t in (rows, base, walked, x_adv, above, grads))
            stands = stands[stands]
            if len(rows) == 0:
                break
        away = _distance_to_boundary(above.flatten(), grads.flatten(0, 1), threat).view_as(above)
        best, each = away.argmin(1), all_rows(rows)
        # `walked` is where the boundary was, `x_adv` a little beyond: the next step starts from there.
        way = threat.to_plane(x_adv, grads[each, best], -above[each, best])
        far = threat.size(way) > NEAR_BOUNDARY * threat.size(walked - base)
        way = column(torch.where(far, share, 1.0) * stands, x) * way
        walked = (walked + way).clamp(threat.lo, threat.hi)
        x_adv = (base + (1 + overshoot) * (walked - base)).clamp(threat.lo, threat.hi)
    ends[rows] = x_adv
    near.see(ends, predict(model, ends).logits)
    return near.answer(model, ends)


@attack
def cw(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 100,
    step_size: float = 0.3,
    searches: int = 6,
    confidence: float = 0.0,
    target: Tensor | None = None,
) -> Tensor:
    """Carlini and Wagner 2017: Adam on w, x_adv = tanh(w) stretched to the box, over a search of the constant.

    l2: ||delta||^2 + c max(margin + confidence, 0), c halved between what failed and what succeeded.
    linf: max(margin + confidence, 0) within |delta| <= tau, which takes the place of the box: the paper's penalty
    sum max(|delta| - tau, 0) where it outweighs the margin. tau is 0.9 of the size found (the paper's rule) until a
    search fails, then halved between what failed and what was found. Each search starts where the last one ended.

    Args: as for ``pgd``; the score and the noise are not used: it goes by the margin, all rivals in it at first (the
    paper's is the margin throughout). steps: of Adam, for each of the ``searches`` constants; step_size: Adam's
    longest, in w, falling to a hundredth; confidence: by how much the wrong logit must lead. The boundary of the
    linearised margin sets the first c and tau, and under l2 caps the step of a pixel at half of its share of that way:
    neither the scale of the logits nor that of the box matters.

    Returns x_adv, (N, C, H, W), in the threat. Raises UserError for the l1 norm. Costs steps * searches gradients.
    """
    if threat.norm == "l1":
        raise UserError("cw is defined for linf and l2, got l1.")
    climb, goal = targeted_score(negative_margin, y, target)
    goals, near = goal(all_rows(y)), NearestAdversarial(x, y, threat)
    out, value, grad = score_and_grad(model, x, climb, goals)
    near.see(x, out.logits, value >= confidence)
    away, l2, heat = (
        _distance_to_boundary(value - confidence, grad, threat),
        threat.norm == "l2",
        INITIAL_TEMPERATURE * value.abs(),
    )
    reach = column(away, x) / 2 / x[0].numel() ** 0.5 if l2 else math.inf
    # l2: twice the constant at which pull and push meet at the linear boundary
    c = (4 * away / grad.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp_max(1e30)
    tau, lower, upper, x_adv = away, torch.zeros_like(away), torch.full_like(away, math.inf), x
    for _ in range(searches):
        low, high = (threat.lo, threat.hi) if l2 else _box_around(x, tau, threat)
        half, middle = (high - low) / 2, (high + low) / 2
        start = ((x if l2 else x_adv) - middle) / half
        limit = TANH_RANGE[threat.norm]
        w = torch.atanh(start * limit if l2 else start.nan_to_num(0.0).clamp(-limit, limit))
        adam, hit = Adam(w), torch.zeros_like(y, dtype=torch.bool)
        for step in range(steps + 1):
            bent = w.tanh()
            x_adv = (middle + half * bent).clamp(threat.lo, threat.hi)
            out, _, grad = score_and_grad(
                model, x_adv, _soft_margin(_cosine(1.0, 0.0, step / steps) * heat, target), goals
            )
            value = climb(out, goals).detach()
            hit |= near.see(x_adv, out.logits, value >= confidence)
            slope = -torch.where(column(value < confidence, grad), grad, 0.0)
            if l2:
                slope = 2 * (x_adv - x) + column(c, x) * slope
            stretch = half * (1 - bent.square())  # dx / dw
            size = (reach / stretch).clamp_max(step_size)
            w = w - _cosine(1.0, 0.01, step / steps) * size * adam(slope * stretch)
        if l2:
            upper, lower = torch.where(hit, c, upper), torch.where(hit, lower, c)
            c = torch.where(upper.isfinite(), (lower + upper) / 2, 10 * c).clamp_max(1e30)
        else:
            upper, lower = near.size, torch.where(hit, lower, tau)
            between = torch.where(lower > 0, (lower + upper) / 2, 0.9 * upper)
            tau = torch.where(upper.isfinite(), between, 2 * tau)
    return near.answer(model, x_adv)


def _box_around(x: Tensor, tau: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """The walls of the box and of |delta| <= tau together."""
    tau = column(tau, x)
    return (x - tau).clamp_min(threat.lo), (x + tau).clamp_max(threat.hi)


@attack
def lbfgs(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 20,
    searches: int = 8,
    memory: int = 5,
    target: Tensor | None = None,
) -> Tensor:
    """Box-constrained L-BFGS (Szegedy et al. 2014): minimise c ||delta||_2^2 - score, and search for the largest c.

    Args: as for ``pgd``; the noise is not used. steps: of L-BFGS, for each of the ``searches`` values of c, one
    gradient each; memory: pairs of steps and gradient differences that the curvature is read from. The penalty is the
    l2 norm's, whatever the threat's: under linf or l1 it is a weak attack.

    Returns x_adv, (N, C, H, W), in the threat. Every sample has its own c, curvature and step: a step that does not
    lower the objective is refused and the next one is a quarter as long.
    """
    if memory < 1:
        raise UserError(f"memory, the pairs that the curvature is read from, must be at least 1, got {memory}.")
    climb, goal = targeted_score(score, y, target)
    margin, aimed = targeted_score(negative_margin, y, target)
    rows = all_rows(y)
    near, x_adv = NearestAdversarial(x, y, threat), x
    out, value, grad = score_and_grad(model, x, margin, aimed(rows))
    near.see(x, out.logits)
    away = _distance_to_boundary(value, grad, Threat("l2", 1.0))
    grad = score_and_grad(model, x, climb, goal(rows))[2]
    c = (grad.flatten(1).norm(dim=1) / (2 * away)).clamp(1e-12, 1e12)
    lower, upper = torch.zeros_like(c), torch.full_like(c, math.inf)
    for _ in range(searches):
        x_adv, hit = _quasi_newton(model, near, c, climb, goal(rows), steps, memory)
        lower, upper = torch.where(hit, c, lower), torch.where(hit, upper, c)
        between = torch.where(upper.isfinite(), (lower * upper).sqrt(), 4 * c)
        c = torch.where(lower > 0, between, c / 4).clamp(1e-12, 1e12)
    return near.answer(model, x_adv)


def _quasi_newton(
    model: Model, near: NearestAdversarial, c: Tensor, climb: Loss, goals: Any, steps: int, memory: int
) -> tuple[Tensor, Tensor]:
    """The last point of a projected L-BFGS descent from x on c ||delta||^2 - score, and whether any point fooled."""
    x, lo, hi = near.base, near.threat.lo, near.threat.hi

    def objective(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, value, grad = score_and_grad(model, point, climb, goals)
        delta = point - x
        return c * _dot(delta, delta) - value.to(x.dtype), 2 * column(c, x) * delta - grad, near.see(point, out.logits)

    def descent(slope: Tensor) -> Tensor:  # the two loops of Nocedal 1980
        shares = []
        for s, d, inverse in reversed(pairs):
            shares.append(inverse * _dot(s, slope))
            slope = slope - column(shares[-1], x) * d
        slope = column(scale, x) * slope
        for (s, d, inverse), share in zip(pairs, reversed(shares), strict=True):
            slope = slope + column(share - inverse * _dot(d, slope), x) * s
        return -slope

    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scale = 1 / (2 * c)  # the inverse curvature of the penalty: exact where the score is linear
    now, length = x, torch.ones_like(c)
    value, slope, hit = objective(now)
    for _ in range(steps):
        free = ~(((slope > 0) & (now <= lo)) | ((slope < 0) & (now >= hi)))
        loose = slope * free
        way = descent(loose) * free
        way = torch.where(column(_dot(way, loose) < 0, x), way, -column(scale, x) * loose)
        tried = (now + column(length, x) * way).nan_to_num(0.0).clamp(lo, hi)
        new_value, new_slope, fools = objective(tried)
        hit = hit | fools
        taken = new_value <= value + 1e-4 * _dot(slope, tried - now)
        s, d = ((b - a) * column(taken, x) for a, b in ((now, tried), (slope, new_slope)))
        curvature, square = _dot(s, d), _dot(d, d)
        bends = curvature > 1e-8 * square.clamp_min(1e-30)  # a pair that does not counts as none
        pairs = [*pairs, (s, d, torch.where(bends, 1 / curvature, 0.0))][-memory:]
        scale = torch.where(bends, curvature / square, scale)
        length = torch.where(taken, 1.0, length / 4)
        value = torch.where(taken, new_value, value)
        now, slope = (torch.where(column(taken, x), b, a) for a, b in ((now, tried), (slope, new_slope)))
    return now, hit


@attack
def fmn(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 100,
    step_size: float = 1.0,
    shrink: float = 0.05,
    target: Tensor | None = None,
) -> Tensor:
    """Fast minimum norm (Pintor et al. 2021): ascent in a ball whose radius shrinks where fooled and grows elsewhere.

    radius <- ||delta|| + |margin| / ||gradient||_dual until a fooled point is known, then times 1 - gamma, and at most
    the smallest size found, where fooled, and times 1 + gamma elsewhere; gamma and the step fall by a cosine.

    Args: as for ``pgd``; the score and the noise are not used: it goes by the margin, all rivals in it at first (the
    paper's is the margin throughout, and meets the nearest boundary less often). step_size: the first step over the
    radius (the paper's is in pixels), falling to a thousandth; shrink: the first gamma, falling to a fiftieth.

    Returns x_adv, (N, C, H, W), in the threat. One gradient a step: the cheapest of the exact ones. Under l1 with few
    steps the ball moves faster than its few pixels can follow.
    """
    if not 0 < shrink < 1:
        raise UserError(f"shrink, the first share that the radius loses, must lie in (0, 1), got {shrink}.")
    climb, goal = targeted_score(negative_margin, y, target)
    goals, ball, round_ball = goal(all_rows(y)), Threat(threat.norm, 1.0, -1e30, 1e30), Threat("l2", 1.0)
    widest = threat.size(torch.maximum(threat.hi - x, x - threat.lo)).clamp_min(1e-12)
    near, x_adv, radius = NearestAdversarial(x, y, threat), x, torch.zeros_like(widest)
    heat = INITIAL_TEMPERATURE * climb(predict(model, x), goals).abs()
    for step in range(steps):
        out, _, grad = score_and_grad(model, x_adv, _soft_margin(_cosine(1.0, 0.0, step / steps) * heat, target), goals)
        value = climb(out, goals).detach()
        fools = near.see(x_adv, out.logits)
        stopped = ((grad > 0) & (x_adv >= threat.hi)) | ((grad < 0) & (x_adv <= threat.lo))  # by the box
        grad = grad.masked_fill(stopped, 0.0)
        gamma = _cosine(shrink, shrink / 50, step / steps)
        guess = threat.size(x_adv - x) + _distance_to_boundary(value, grad, threat)
        outside = torch.where(near.size.isfinite(), radius * (1 + gamma), guess)
        radius = torch.where(fools, torch.minimum(radius * (1 - gamma), near.size), outside)
        radius = torch.minimum(radius.clamp_min(1e-12), widest)
        # The step's l2 length is that of the norm's own steepest step: sqrt(dim) for linf, 1 for l2, less for l1.
        length = radius * _cosine(step_size, step_size / 1000, step / steps) * round_ball.size(threat.ascent(grad))
        delta = x_adv + column(length, x) * round_ball.ascent(grad) - x
        delta = ball.project(delta / column(radius, x), torch.zeros_like(x)) * column(radius, x)
        x_adv = (x + delta).clamp(threat.lo, threat.hi)
    near.see(x_adv, predict(model, x_adv).logits)
    return near.answer(model, x_adv)


@attack
def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    score: Loss,
    noise: Noise,
    steps: int = 40,
    targets: int = 9,
    restarts: int = 1,
    target: Tensor | None = None,
) -> Tensor:
    """Fast adaptive boundary, targeted (FAB-T, Croce and Hein 2020), towards each of the likeliest wrong classes.

    Step to the linearised boundary of z_t - z_y, drawn by alpha <= 0.1 to the point of it that is nearest to x, both 5%
    too far; where that fools, go back a tenth of the way to x. Five halvings of the way from x end it.

    Args: as for ``pgd``; the score is not used: it goes by the logits. steps: for each target and restart; targets: how
    many classes; restarts: the first starts at x, further ones at random points of the threat; target: the one class.

    Returns x_adv, (N, C, H, W), in the threat. Costs steps * targets gradients and twice as many passes forward. It
    trusts the linearisation: where gradients are masked it goes nowhere.
    """
    rivals = _target_classes(model, x, y, targets, target)
    near, x_adv = NearestAdversarial(x, y, threat), x
    near.see(x, predict(model, x).logits)
    for restart in range(restarts):
        for rival in rivals.split(1, dim=1):
            x_adv = threat.random_start(x, noise.fold(restart)) if restart else x
            heights = _logit_differences_to(y, rival)
            for _ in range(steps):
                _, above, grads = scores_and_grads(model, x_adv, heights)
                need, slope = -above[:, 0], grads[:, 0]
                here = threat.to_plane(x_adv, slope, need)
                there = threat.to_plane(x, slope, need + _dot(slope, x_adv - x))
                mine, its = threat.size(here), threat.size(there)
                alpha = column((mine / (mine + its).clamp_min(1e-12)).clamp(0.0, 0.1), x)
                x_adv = (1 - alpha) * (x_adv + 1.05 * here) + alpha * (x + 1.05 * there)
                x_adv = x_adv.clamp(threat.lo, threat.hi)
                fools = near.see(x_adv, predict(model, x_adv).logits)
                x_adv = torch.where(column(fools, x), x + 0.9 * (x_adv - x), x_adv)
    inner, outer = x, near.x
    for _ in range(5):
        half = (inner + outer) / 2
        fools = column(near.see(half, predict(model, half).logits), x)
        inner, outer = torch.where(fools, inner, half), torch.where(fools, half, outer)
    return near.answer(model, x_adv)
