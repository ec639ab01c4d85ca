"""The smallest perturbation of each sample that any attack found, and whether the minimal-norm attack converged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..attacks import apgd, fmn
from ..attacks.base import all_rows, predict, those
from ..losses import negative_margin
from ..noise import Noise
from ..outputs import Model, check_samples, fooled
from ..progress import Progress, as_progress
from ..queries import CountingModel
from ..results import EpsCheck
from ..threat import Threat, column
from ..user_input import typed
from ..witnesses import Witnesses
from .margins import local_lipschitz
from .samples import Samples, to_float64

EPS_CHECKS = (0.5, 1.0, 1.5, 2.0)  # radii at which the distances are compared with an attack on that radius, in eps
CHECK_STEPS = 12  # of the attack on a radius; at eps itself it is the evaluation's
HALVINGS = 6  # of the way back to x from a point that such an attack found


class MeasuredDistances(NamedTuple):
    """What ``measure_distances`` returns.

    Attributes:
        distance: (N,) float64 on the CPU, the smallest perturbation found: 0 where x is misclassified, infinite where
            nothing was found. Each is an upper bound.
        lipschitz: (N,) float64 on the CPU (``local_lipschitz``).
        witnesses: samples broken within the threat although x_adv does not fool.
        checks: one entry for each radius of EPS_CHECKS.
    """

    distance: Tensor
    lipschitz: Tensor
    witnesses: Witnesses
    checks: tuple[EpsCheck, ...]


@typed
def smallest_perturbation(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, x_adv: Tensor | None = None, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """The nearest point known to fool the model, and its distance, by FMN in the whole box.

    Args:
        model: in eval mode; images to logits or Outputs.
        x: (N, ...) in the box.
        y: (N,) labels.
        threat: gives the norm and the box; its eps is not used.
        x_adv: (N, ...), points that an evaluation has found already; the nearer of the two counts.
        steps: of FMN, one gradient each.

    Returns:
        (points (N, ...), distances (N,) in the threat's norm). A distance is an upper bound of the true one: 0 where x
        is misclassified already, and infinite (with the point x) where nothing was found.

    Source: Pintor et al. 2021 (``attacks.fmn``).

    >>> model = lambda x: torch.stack([x[:, 0], 1 - x[:, 0]], 1)                    # the boundary is x = 0.5
    >>> _, size = smallest_perturbation(model, torch.tensor([[0.8]]), torch.tensor([0]), Threat("linf", 0.01))
    >>> print(f"{float(size):.3f}")
    0.300
    """
    check_samples(x, y)
    whole_box = replace(threat, eps=_box_size(x, threat))
    by_fmn = fmn(model, x, y, whole_box, score=negative_margin, noise=Noise(0, all_rows(y)), steps=steps)
    # FMN may end exactly on the boundary, where the point does not fool; 0.1% further out it does.
    beyond = (x + 1.001 * (by_fmn - x)).clamp(threat.lo, threat.hi)
    nearest, size = x, torch.full(y.shape, math.inf, dtype=x.dtype, device=x.device)
    for point in (by_fmn, beyond) if x_adv is None else (x_adv, by_fmn, beyond):
        nearest, size = _nearer(model, x, y, threat, nearest, size, point)
    return nearest, size


def measure_distances(
    model: CountingModel,
    samples: Samples,
    threat: Threat,
    *,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> MeasuredDistances:
    """The smallest perturbation of each sample, by three kinds of attacks, and the local Lipschitz constant.

    A minimal-norm attack can stall where attacks on a fixed radius do not. So a distance is the smallest that any of
    these found: FMN; the evaluation of the threat (``samples.x_adv``); and APGD at the other radii of EPS_CHECKS on the
    samples that stand there, each point it finds moved back towards x.

    Args:
        model: in eval mode, its passes counted.
        samples: what is measured.
        threat: of the evaluation.
        steps: of FMN.
        seed: of the random starts.
        batch_size: samples at a time.
        progress: called after each batch.

    Returns:
        The MeasuredDistances.
    """
    progress, total, done = as_progress(progress), len(samples), 0
    none = samples.take(slice(0))
    found = [Witnesses(none.rows, none.x.cpu(), none.x.new_zeros(0).cpu(), none.y.cpu())]
    parts: list[tuple[Tensor, ...]] = []
    radii = [min(share * threat.eps, _box_size(samples.one, threat)) for share in EPS_CHECKS]
    for x, x_adv, y, indices, rows in samples.batches(batch_size):
        nearest, by_fmn = smallest_perturbation(model, x, y, threat, steps=steps)
        nearest, distance = _nearer(model, x, y, threat, nearest, by_fmn, x_adv)
        for stream, radius in enumerate(radii):
            if radius != threat.eps:  # there the evaluation itself has attacked
                at, noise = replace(threat, eps=radius), Noise(seed, indices.to(x.device)).fold(stream)
                nearest, distance = _attacked(model, x, y, at, noise, nearest, distance)
        unbroken = ~fooled(predict(model, x_adv).logits, y)
        missed = unbroken & distance.isfinite() & (threat.violation(nearest, x) == 0)
        if missed.any():
            points, margin, prediction = _clearest_point(model, x[missed], nearest[missed], y[missed], threat)
            found.append(Witnesses(rows[missed.cpu()], points.cpu(), margin.cpu(), prediction.cpu()))
        parts.append(tuple(map(to_float64, (by_fmn, distance, local_lipschitz(model, x, y, threat)))))
        done += len(y)
        progress("measuring distances", done, total)
    by_fmn, distance, lipschitz = (torch.cat(columns) for columns in zip(*parts, strict=True))
    for radius in radii:  # a point on the edge of a ball lies in it: float32 says so to seven digits alone
        by_fmn, distance = (
            torch.where(d > radius, torch.where(_stands(d, radius), d, radius), d) for d in (by_fmn, distance)
        )
    checks = (
        EpsCheck(float(radius), total, int((by_fmn > radius).sum()), int((distance > radius).sum())) for radius in radii
    )
    witnesses = Witnesses(*(torch.cat(columns) for columns in zip(*found, strict=True)))
    return MeasuredDistances(distance, lipschitz, witnesses, tuple(checks))


def _box_size(x: Tensor, threat: Threat) -> float:
    """The radius within which every image of the box lies."""
    return float(threat.size(torch.full_like(x[:1], threat.hi - threat.lo)))


def _stands(distance: Tensor, radius: float) -> Tensor:
    """Which samples no perturbation of this radius breaks, as far as is known; a rounding error is no difference."""
    return distance > radius * (1 + 1e-5)


def _nearer(
    model: Model, x: Tensor, y: Tensor, threat: Threat, nearest: Tensor, size: Tensor, point: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest points and their distances, with these points taken in where they fool and are nearer."""
    distance = threat.size(point - x)
    better = fooled(predict(model, point).logits, y) & (distance < size)
    return torch.where(column(better, x), point, nearest), torch.where(better, distance, size)


def _attacked(
    model: Model, x: Tensor, y: Tensor, at: Threat, noise: Noise, nearest: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest points and their distances after a short attack on the samples that stand at this radius."""
    rows = torch.nonzero(_stands(size, at.eps))[:, 0]
    if len(rows) == 0:
        return nearest, size
    base, labels = x[rows], y[rows]
    x_adv = apgd(model, base, labels, at, score=negative_margin, noise=noise[rows], steps=CHECK_STEPS)
    wrong = fooled(predict(model, x_adv).logits, labels)
    rows, base, labels, x_adv = those(wrong, rows, base, labels, x_adv)
    if len(rows) == 0:
        return nearest, size
    closest, distance = x_adv, at.size(x_adv - base)
    low, high = torch.zeros_like(distance), torch.ones_like(distance)  # of the way to x_adv
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        point = base + column(middle, x) * (x_adv - base)
        wrong = fooled(predict(model, point).logits, labels)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
        closest = torch.where(column(wrong, x), point, closest)
        distance = torch.where(wrong, at.size(point - base), distance)
    nearest, size = nearest.clone(), size.clone()
    nearest[rows], size[rows] = closest, distance
    return nearest, size


def _clearest_point(
    model: CountingModel, x: Tensor, nearest: Tensor, y: Tensor, threat: Threat
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_adv, margin, prediction): the nearest mistake, or the point behind it at the threat's edge.

    The edge is taken where it is misclassified by a larger margin, so that rounding cannot undo the mistake.
    """
    size = column(threat.size(nearest - x).clamp_min(1e-12), x)
    edge = (x + (nearest - x) * (0.999 * threat.eps / size)).clamp(threat.lo, threat.hi)
    logits, edge_logits = predict(model, nearest).logits, predict(model, edge).logits
    clearer = negative_margin(edge_logits, y) > negative_margin(logits, y)
    logits = torch.where(clearer[:, None], edge_logits, logits)
    x_adv = torch.where(column(clearer, x), edge, nearest)
    return x_adv, -negative_margin(logits, y), logits.argmax(1)
