"""Are gradients informative? An attack that follows a wrong gradient breaks nothing, and the figure means nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attacks import cross_entropy
from ..attacks.base import score_and_grad
from ..losses import Loss, negative_log_odds
from ..noise import AuditStream
from ..outputs import Outputs, logits_of
from ..region import input_margin, spread
from ..results import CleanMeasures
from ..threat import column
from .findings import CheckCount
from .probe import Probe

DIRECTIONS = 4  # random directions per sample in which the slope is measured
IMBALANCE = 10.0  # ratio of two logits' gradients at which they count as imbalanced


def _zero_gradients(probe: Probe, score: Loss, name: str) -> CheckCount:
    """Samples whose gradient is exactly zero at half or more of four points: a random start and steps of eps/2."""
    threat = probe.threat

    def is_zero(rows: Tensor) -> Tensor:
        zero, x = [], probe.x(rows)
        x_adv = threat.random_start(x, probe.noise[rows].fold(AuditStream.ZERO_GRADIENTS))
        for _ in range(4):
            grad = probe.gradient(score, x_adv, rows)
            zero.append((grad == 0).flatten(1).all(1))
            x_adv = threat.project(x_adv + threat.eps / 2 * threat.ascent(grad, x_adv), x)
        return torch.stack(zero).float().mean(0) >= 0.5

    k, n = int(probe.batches.cat(is_zero, probe.rows).sum()), len(probe.rows)
    return CheckCount(k, n, 0.05, f"the gradient of {name} is exactly zero on {k} of {n} samples")


def gradients_of_cross_entropy_are_not_zero(probe: Probe) -> CheckCount:
    """F.cross_entropy in float32, which the usual PGD maximises, has a gradient along its path."""
    return _zero_gradients(probe, cross_entropy, "F.cross_entropy")


def gradients_of_the_training_loss_are_not_zero(probe: Probe) -> CheckCount:
    """The training loss has a gradient along its own path. No figure rests on it, so this lowers no verdict."""
    return _zero_gradients(probe, probe.loss, "the training loss")


def gradients_of_the_score_are_not_zero(probe: Probe) -> CheckCount:
    """The score that the suite maximises has a gradient along its path."""
    return _zero_gradients(probe, probe.matched, "the attacks' score")


def gradients_predict_slopes(probe: Probe) -> CheckCount:
    """The score's slope in random directions agrees with its gradient: no detached, negated or shattered gradient.

    The slope is measured over 4% of eps. It disagrees with the gradient if they differ by more than half of the larger;
    a sample shows the fault if they disagree in half or more of the directions.
    """
    threat = probe.threat
    h = 0.02 * threat.eps

    def is_wrong(rows: Tensor) -> Tensor:
        x = threat.random_start(probe.x(rows), probe.noise[rows].fold(AuditStream.SLOPE_START))
        x = x.clamp(threat.lo + h, threat.hi - h)
        grad, wrong = probe.gradient(probe.score, x, rows), []
        for number in range(DIRECTIONS):
            step = probe.noise[rows].fold(AuditStream.SLOPE_DIRECTION, number).sign(tuple(x.shape[1:]), x.dtype)
            step = h * step / column(threat.size(step), x)
            with torch.no_grad():
                high, low = (probe.score(probe.model(x + t * step), probe.y(rows)) for t in (1, -1))
            measured, predicted = (high - low).double(), 2 * (grad * step).flatten(1).double().sum(1)
            rounding = 1e-6 * torch.maximum(high.abs(), low.abs()).double()
            larger = torch.maximum(measured.abs(), predicted.abs())
            wrong.append((measured - predicted).abs() > 0.5 * larger + 4 * rounding)
        return torch.stack(wrong).double().mean(0) >= 0.5

    k, n = int(probe.batches.cat(is_wrong, probe.rows).sum()), len(probe.rows)
    return CheckCount(k, n, 0.25, f"the gradient does not predict how the score changes on {k} of {n} samples")


def gradients_of_the_logits_are_balanced(probe: Probe) -> CheckCount:
    """Neither the true logit nor the largest other one has nearly all of the gradient."""
    y = probe.y(probe.rows)
    other = probe.clean_logits.scatter(1, y[:, None], -torch.inf).argmax(1)

    def gradient_size(rows: Tensor, label: Tensor) -> Tensor:
        _, _, grad = score_and_grad(probe.model, probe.x(rows), _logit, label)
        return grad.flatten(1).abs().sum(1)

    a, b = (probe.batches.cat(gradient_size, probe.rows, label) for label in (y, other))
    k, n = int((torch.maximum(a, b) > IMBALANCE * torch.minimum(a, b)).sum()), len(y)
    return CheckCount(
        k, n, 0.25, f"one logit has more than {IMBALANCE:g} times the gradient of the other on {k} of {n} samples"
    )


def _logit(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """The logits of these classes, (N,)."""
    return logits_of(out).gather(1, y[:, None])[:, 0]


def measures(probe: Probe, most: int = 512) -> CleanMeasures | None:
    """Measures reported beside the verdict, at the clean images.

    Args:
        probe: the model under audit.
        most: number of correctly classified samples to use, at most.

    Returns:
        The CleanMeasures; input_margin is that of ``region.input_margin`` with m = -u, where u is the negative log
        odds. None if no sample is classified correctly.
    """
    rows = torch.nonzero(probe.evaluation.clean.to(probe.data.y.device))[:most, 0]
    if len(rows) == 0:
        return None

    def of(rows: Tensor) -> Tensor:
        x, y = probe.x(rows), probe.y(rows)
        zero, zero_training_loss = (
            (probe.gradient(score, x, rows) == 0).flatten(1).all(1) for score in (cross_entropy, probe.loss)
        )
        _, value, grad = score_and_grad(probe.model, x, negative_log_odds, y)
        return torch.stack([zero.double(), zero_training_loss.double(), input_margin(-value, grad, probe.threat)], 1)

    zero_gradient, zero_gradient_training_loss, distance = probe.batches.cat(of, rows).unbind(1)
    return CleanMeasures(
        float(zero_gradient.mean()), float(zero_gradient_training_loss.mean()), spread(distance).median
    )
