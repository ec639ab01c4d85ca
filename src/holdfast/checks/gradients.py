"""Do gradients tell the truth? An attack that follows a lying gradient leaves a number standing for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attacks import cross_entropy
from ..attacks.base import score_and_grad
from ..losses import Loss, negative_log_odds
from ..region import input_margin, spread
from ..threat import column
from .findings import CheckCount
from .probe import Probe

DIRECTIONS = 4  # random directions per sample in which the slope is measured
IMBALANCE = 10.0  # one logit's gradient is so many times the other's


def _zero(probe: Probe, score: Loss, named: str) -> CheckCount:
    """Samples with a gradient of exactly zero at half or more of four points: a random start, and steps of eps/2."""
    threat, rows, dead = probe.threat, probe.rows, []
    x = probe.x(rows)
    now = threat.random_start(x, probe.noise[rows].fold(3))
    for _ in range(4):
        grad = probe.gradient(score, now, rows)
        dead.append((grad == 0).flatten(1).all(1))
        now = threat.project(now + threat.eps / 2 * threat.ascent(grad, now), x)
    k, n = int((torch.stack(dead).float().mean(0) >= 0.5).sum()), len(rows)
    return CheckCount(k, n, 0.05, f"the gradient of {named} is exactly zero on {k} of {n} samples")


def gradients_of_cross_entropy_are_not_zero(probe: Probe) -> CheckCount:
    """F.cross_entropy in float32, which published attacks climb, has a gradient along their path."""
    return _zero(probe, cross_entropy, "F.cross_entropy")


def gradients_of_the_trained_loss_are_not_zero(probe: Probe) -> CheckCount:
    """The loss that the network was trained with has a gradient along its own path."""
    return _zero(probe, probe.loss, "the trained loss")


def gradients_of_the_score_are_not_zero(probe: Probe) -> CheckCount:
    """The score that the suite climbs has a gradient along its path."""
    return _zero(probe, probe.matched, "the score that is climbed")


def gradients_predict_slopes(probe: Probe) -> CheckCount:
    """The score's slope in random directions is what its gradient says: nothing cuts, bends or shatters it.

    A slope is measured over 4% of eps. Two slopes disagree when they differ by more than half of the larger; a sample
    shows the fault when they do in half or more of the directions.
    """
    threat, rows = probe.threat, probe.rows
    h = 0.02 * threat.eps
    x = threat.random_start(probe.x(rows), probe.noise[rows].fold(4)).clamp(threat.lo + h, threat.hi - h)
    grad = probe.gradient(probe.score, x, rows)
    wrong = []
    for number in range(DIRECTIONS):
        step = probe.noise[rows].fold(5, number).sign(tuple(x.shape[1:]), x.dtype)
        step = h * step / column(threat.size(step), x)
        with torch.no_grad():
            high, low = (probe.score(probe.model(x + t * step), probe.y(rows)) for t in (1, -1))
        seen, told = (high - low).double(), 2 * (grad * step).flatten(1).double().sum(1)
        rounding = 1e-6 * torch.maximum(high.abs(), low.abs()).double()
        wrong.append((seen - told).abs() > 0.5 * torch.maximum(seen.abs(), told.abs()) + 4 * rounding)
    k, n = int((torch.stack(wrong).double().mean(0) >= 0.5).sum()), len(rows)
    return CheckCount(k, n, 0.25, f"the gradient does not predict how the score changes on {k} of {n} samples")


def gradients_of_the_logits_are_balanced(probe: Probe) -> CheckCount:
    """Neither the true logit nor its strongest rival has nearly all of the gradient."""
    x, y = probe.x(probe.rows), probe.y(probe.rows)
    rival = probe.clean.scatter(1, y[:, None], -torch.inf).argmax(1)

    def size(chosen: Tensor) -> Tensor:
        grad = probe.gradient(lambda out, _: out.logits.gather(1, chosen[:, None])[:, 0], x, probe.rows)
        return grad.flatten(1).abs().sum(1)

    true, other = size(y), size(rival)
    uneven = torch.maximum(true, other) > IMBALANCE * torch.minimum(true, other)
    k, n = int(uneven.sum()), len(y)
    return CheckCount(
        k, n, 0.25, f"one logit has more than {IMBALANCE:g} times the gradient of its rival on {k} of {n} samples"
    )


def measures(probe: Probe, most: int = 512) -> dict[str, float | None]:
    """What is reported beside the verdict, over at most ``most`` samples that are right, at the clean image.

    zero_gradient, zero_gradient_own: share with an input gradient of F.cross_entropy, of the trained loss, that is
    exactly zero. input_margin: median of ``region.input_margin`` with m = -u; None where it is infinite.
    """
    rows = torch.nonzero(probe.evaluation.clean.to(probe.data.y.device))[:most, 0]
    if len(rows) == 0:
        return {}
    x = probe.x(rows)
    found: dict[str, float | None] = {}
    for name, score in (("zero_gradient", cross_entropy), ("zero_gradient_own", probe.loss)):
        found[name] = float((probe.gradient(score, x, rows) == 0).flatten(1).all(1).double().mean())
    _, value, grad = score_and_grad(probe.model, x, negative_log_odds, probe.y(rows))
    found["input_margin"] = spread(input_margin(-value, grad, probe.threat))["median"]
    return found
