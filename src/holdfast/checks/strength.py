"""Are the attacks as strong as they could be? Each check tries something else and counts what it breaks on top."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attacks import ATTACKS, SCORES, cross_entropy
from ..attacks.base import score_and_grad
from ..losses import Loss, negative_log_odds
from ..outputs import Outputs, as_outputs
from ..threat import Threat, column
from .findings import CheckCount
from .probe import Probe, rescaled_cross_entropy

NONE_STANDING = "no sample stands that it could be tried on"
NO_DOUBLE = "the model is a function: it cannot be turned to float64"


def a_huge_eps_leaves_nothing(probe: Probe) -> CheckCount:
    """With the whole box to move in, an attack leaves at most what a constant answer would get right."""
    threat, x = probe.threat, probe.x(probe.rows)
    whole = threat.hi - threat.lo
    pixels = x[0].numel()
    eps = whole * {"linf": 1.0, "l2": math.sqrt(pixels), "l1": float(pixels)}[threat.norm]
    huge = Threat(threat.norm, eps, threat.lo, threat.hi)
    standing = ~probe.attack("apgd", probe.rows, probe.matched, 6, threat=huge, steps=20)
    k, n = int(standing.sum()), len(standing)
    common = float(probe.clean.argmax(1).bincount().max()) / n
    return CheckCount(k, n, common, f"{k} of {n} samples stand at eps = {eps:.3g}, where anything is allowed")


def robust_accuracy_falls_with_eps(probe: Probe) -> CheckCount:
    """Independent attacks at eps and 2 eps: hardly a sample falls at the smaller and stands at the larger one."""
    threat = probe.threat
    twice = Threat(threat.norm, 2 * threat.eps, threat.lo, threat.hi)
    small = probe.short(probe.matched)
    large = probe.attack("pgd", probe.rows, probe.matched, 7, threat=twice, steps=10, step_size=threat.eps / 2)
    k, n = int((small & ~large).sum()), len(small)
    return CheckCount(k, n, 0.05, f"{k} of {n} samples fall at eps and stand at 2 eps")


def the_best_iterate_is_kept(probe: Probe) -> CheckCount:
    """What an attack passes on its way it also returns: hardly a sample is broken by the best iterate alone."""
    last = probe.short(cross_entropy, iterate="last")
    k, n = int((probe.by_cross_entropy & ~last).sum()), len(last)
    return CheckCount(k, n, 0.05, f"the last iterate misses {k} of {n} samples that its own path had broken")


def the_choice_of_score_agrees(probe: Probe) -> CheckCount:
    """F.cross_entropy breaks what the scores without a link break: u, the margin, DLR."""
    others = torch.stack([probe.short(SCORES[name]) for name in ("u", "margin", "dlr")]).any(0)
    k, n = int((others & ~probe.by_cross_entropy).sum()), len(others)
    return CheckCount(k, n, 0.1, f"F.cross_entropy misses {k} of {n} samples that other scores break")


def a_temperature_changes_nothing(probe: Probe) -> CheckCount:
    """F.cross_entropy of logits divided by their own top gap breaks no more than F.cross_entropy."""
    broken = probe.short(rescaled_cross_entropy)
    k, n = int((broken & ~probe.by_cross_entropy).sum()), len(broken)
    return CheckCount(k, n, 0.1, f"dividing the logits by a number breaks {k} more of {n} samples")


def float64_changes_nothing(probe: Probe) -> CheckCount | str:
    """The same steps on F.cross_entropy in float64 break no more."""
    if probe.double is None:
        return NO_DOUBLE
    broken = probe.short(cross_entropy, model=probe.double, dtype=torch.float64)
    k, n = int((broken & ~probe.by_cross_entropy).sum()), len(broken)
    return CheckCount(k, n, 0.1, f"float64 breaks {k} more of {n} samples")


def float64_scores_break_no_survivor(probe: Probe) -> CheckCount | str:
    """APGD on the score in float64 breaks nothing that stands."""
    rows = probe.standing[: len(probe.standing) // 4]
    if probe.double is None:
        return NO_DOUBLE
    if len(rows) == 0:
        return NONE_STANDING
    broken = probe.attack("apgd", rows, probe.matched, 8, model=probe.double, dtype=torch.float64, steps=20)
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"float64 breaks {k} of {n} samples that stood")


def a_black_box_is_not_stronger(probe: Probe) -> CheckCount | str:
    """Square, which sees no gradient, breaks next to nothing of what gradients have left."""
    costs = [cost for cost in probe.evaluation.stages if "square" in cost.name and cost.attacked]
    if costs:
        k, n = sum(cost.broken for cost in costs), sum(cost.attacked for cost in costs)
    else:
        if len(probe.standing) == 0:
            return NONE_STANDING
        if probe.threat.norm not in ATTACKS["square"].norms:
            return f"square is not defined for {probe.threat.norm}"
        broken = probe.attack("square", probe.standing, SCORES["margin"], 9, steps=100)
        k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"Square breaks {k} of {n} samples that gradients had left")


def noise_is_not_stronger(probe: Probe) -> CheckCount | str:
    """Random points of the threat break nothing that stands."""
    rows = probe.standing[: len(probe.standing) // 4 or None]
    if len(rows) == 0:
        return NONE_STANDING
    broken = probe.attack("noise", rows, SCORES["margin"], 11, steps=40)
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"random noise breaks {k} of {n} samples that gradients had left")


def transfer_is_not_stronger(probe: Probe) -> CheckCount | str:
    """Adversarial images of the SCE network of the same seed break nothing that stands."""
    if probe.transfer_source is None:
        return "there is no SCE network of the same seed to take adversarial images from"
    twin = probe.transfer_source.to(probe.data.y.device)
    stands = torch.nonzero(~probe.broken)[:, 0]
    rows = stands[(twin[stands] != probe.x(stands)).flatten(1).any(1)]
    if len(rows) == 0:
        return NONE_STANDING
    broken = probe.judge(rows, probe.x(rows), twin[rows])
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"adversarial images of an SCE network break {k} of {n} samples that stood")


def the_climb_has_ended(probe: Probe) -> CheckCount | str:
    """On what stands, the last of the steps hardly raise the score any more.

    The score is rescaled to what the whole climb gained; a sample shows the fault when the last quarter of 40 steps
    gained more than a twentieth of it.
    """
    rows = probe.standing[: len(probe.standing) // 2]
    if len(rows) == 0:
        return NONE_STANDING
    best = _climb(probe, rows, probe.x(rows), probe.matched, [0.5] * 10 + [0.25] * 10 + [0.1] * 20)
    gained, late = best[40] - best[0], best[40] - best[30]
    k, n = int((late > 0.05 * gained).sum()), len(rows)
    return CheckCount(k, n, 0.25, f"the score of {k} of {n} samples that stand was still rising when the steps ended")


def _climb(probe: Probe, rows: Tensor, start: Tensor, score: Loss, sizes: list[float]) -> list[Tensor]:
    """The best score so far, (n,), at the start and after each step of an ascent; sizes: of the steps, over eps."""
    threat, x, now = probe.threat, probe.x(rows), start
    best: list[Tensor] = []
    for size in [*sizes, 0.0]:
        _, value, grad = score_and_grad(probe.model, now, score, probe.y(rows))
        best.append(torch.maximum(best[-1], value) if best else value)
        now = threat.project(now + size * threat.eps * threat.ascent(grad, now), x)
    return best


def hidden_adversarial_examples_are_found(probe: Probe, inner: int = 24) -> CheckCount | str:
    """The binarisation test: where an adversarial example is put by construction, the gradient finds it.

    For each sample a linear head on the features tells one point on the surface of the threat from ``inner`` points
    within, so that it alone counts as adversarial; an ascent must then find such a point (Zimmermann et al. 2022).
    """
    threat, rows = probe.threat, probe.rows[: max(1, len(probe.rows) // 2)]
    x = probe.x(rows)

    def features(points: Tensor) -> Tensor:
        out: Outputs = as_outputs(probe.model(points))
        return out.logits if out.features is None else out.features

    with torch.no_grad():
        inside = []
        for number in range(inner):
            start = threat.random_start(x, probe.noise[rows].fold(12, number))
            inside.append(features(x + 0.9 * (start - x)).double())
        far = probe.noise[rows].fold(13).sign(tuple(x.shape[1:]), x.dtype)
        edge = features(threat.project(x + 2 * threat.eps * far / column(threat.size(far), x), x)).double()
        points = torch.stack([features(x).double(), *inside], 1)  # (n, inner + 1, D)
        middle = points.mean(1)
        spread = points - middle[:, None]
        scatter = spread.mT @ spread
        ridge = 1e-3 * scatter.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        eye = torch.eye(scatter.shape[1], dtype=scatter.dtype, device=scatter.device)
        w = torch.linalg.solve(scatter + ridge[:, None, None] * eye, edge - middle)
        high = torch.einsum("nd,nid->ni", w, points).amax(1)
        goal = (w * edge).sum(1)
        possible = goal > high + 1e-9 * goal.abs()
        bias = -(0.99 * goal + 0.01 * high)
    if not bool(possible.any()):
        return "no head on the features tells the surface of the threat from its inside"

    def head(out: Outputs, _: Tensor) -> Tensor:
        found = out.logits if out.features is None else out.features
        return (w * found.double()).sum(1) + bias

    start = threat.random_start(x, probe.noise[rows].fold(14))
    best = _climb(probe, rows, start, head, [0.5] * 7 + [0.25] * 7 + [0.1] * 6)[-1]
    k, n = int(((best <= 0) & possible).sum()), int(possible.sum())
    return CheckCount(k, n, 0.25, f"the gradient misses {k} of {n} adversarial examples that were put there")


def more_steps_and_restarts_do_not_help(probe: Probe) -> CheckCount | str:
    """Two more runs, independent of the suite and of each other, break next to nothing of what stands."""
    first, second, both, tried = recapture(probe)
    if tried == 0:
        return NONE_STANDING
    k = first + second - both
    return CheckCount(k, tried, 0.02, f"two more independent runs break {k} of {tried} samples that stood")


def recapture(probe: Probe) -> tuple[int, int, int, int]:
    """Two independent runs on the survivors: (broken by the first, by the second, by both, tried). Run once a probe.

    They differ in score, in target, in schedule and in noise: targeted DLR by APGD towards the nearest classes, and PGD
    on u with random starts.
    """
    if probe.recaptured is None:
        probe.recaptured = _recapture(probe)
    return probe.recaptured


def _recapture(probe: Probe) -> tuple[int, int, int, int]:
    rows = probe.standing
    if len(rows) == 0:
        return 0, 0, 0, 0
    logits = probe.logits(probe.x(rows)).scatter(1, probe.y(rows)[:, None], -torch.inf)
    first = torch.zeros_like(rows, dtype=torch.bool)
    for number, target in enumerate(logits.topk(min(2, logits.shape[1] - 1), dim=1).indices.unbind(1)):
        left = ~first
        first[left] = probe.attack("apgd", rows[left], SCORES["dlr"], 15 + number, steps=25, target=target[left])
    second = probe.attack("pgd", rows, negative_log_odds, 20, steps=25, step_size=probe.threat.eps / 8, restarts=2)
    return int(first.sum()), int(second.sum()), int((first & second).sum()), len(rows)
