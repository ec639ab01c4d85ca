"""Are the attacks strong enough? Each check tries something else and counts what it breaks in addition."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..attacks import ATTACKS, SCORES, cross_entropy
from ..attacks.base import all_rows, predict, score_and_grad
from ..evaluation import differs_off_grid, is_8bit
from ..importers.onnx import runtime_predictions
from ..losses import Loss, negative_log_odds, negative_margin
from ..mapped import take
from ..noise import AuditStream
from ..outputs import Model, Outputs, as_outputs
from ..threat import Threat, column
from .findings import CheckCount
from .probe import Probe, Recapture, rescaled_cross_entropy

NO_SURVIVOR = "there is no survivor without a certificate to try it on"
FEW = 20  # survivors that a costly check looks at
RAYS_STEPS, SQUARE_STEPS, NOISE_STEPS = 200, 100, 40  # queries of the attacks without gradients
MD_TARGETS = 9  # likeliest wrong classes that margin decomposition tries
MOST_FEATURES = 2**24  # numbers that the planted examples hold at once, 128 MiB in float64


def a_huge_eps_leaves_nothing(probe: Probe) -> CheckCount:
    """If any image is allowed, an attack leaves at most the samples of the most frequent predicted class."""
    threat, x = probe.threat, probe.x(probe.rows)
    width = threat.hi - threat.lo
    pixels = x[0].numel()
    eps = width * {"linf": 1.0, "l2": math.sqrt(pixels), "l1": float(pixels)}[threat.norm]
    huge = Threat(threat.norm, eps, threat.lo, threat.hi)
    unbroken = ~probe.attack("apgd", probe.rows, probe.matched, AuditStream.HUGE_EPS, threat=huge, steps=20)
    k, n = int(unbroken.sum()), len(unbroken)
    most_frequent = float(probe.clean_logits.argmax(1).bincount().max()) / n
    return CheckCount(k, n, most_frequent, f"{k} of {n} samples survive at eps = {eps:.3g}, where any image is allowed")


def robust_accuracy_falls_with_eps(probe: Probe) -> CheckCount:
    """Of independent attacks at eps and at 2 eps, the second breaks nearly all that the first breaks."""
    threat = probe.threat
    twice = Threat(threat.norm, 2 * threat.eps, threat.lo, threat.hi)
    small = probe.pgd10(probe.matched)
    large = probe.attack(
        "pgd", probe.rows, probe.matched, AuditStream.TWICE_EPS, threat=twice, steps=10, step_size=threat.eps / 2
    )
    k, n = int((small & ~large).sum()), len(small)
    return CheckCount(k, n, 0.05, f"{k} of {n} samples are broken at eps but not at 2 eps")


def the_best_iterate_is_kept(probe: Probe) -> CheckCount:
    """The last iterate of PGD breaks nearly all that any of its iterates breaks."""
    last = probe.pgd10(cross_entropy, iterate="last")
    k, n = int((probe.broken_by_cross_entropy & ~last).sum()), len(last)
    return CheckCount(k, n, 0.05, f"the last iterate misses {k} of {n} samples that an earlier iterate broke")


def the_choice_of_score_agrees(probe: Probe) -> CheckCount:
    """F.cross_entropy breaks what scores without saturation break: scaled log odds, margin, DLR."""
    others = torch.stack([probe.pgd10(SCORES[name]) for name in ("scaled_log_odds", "margin", "dlr")]).any(0)
    k, n = int((others & ~probe.broken_by_cross_entropy).sum()), len(others)
    return CheckCount(k, n, 0.1, f"F.cross_entropy misses {k} of {n} samples that other scores break")


def a_temperature_changes_nothing(probe: Probe) -> CheckCount:
    """Dividing the logits by the difference of the top two does not make F.cross_entropy stronger."""
    broken = probe.pgd10(rescaled_cross_entropy)
    k, n = int((broken & ~probe.broken_by_cross_entropy).sum()), len(broken)
    return CheckCount(k, n, 0.1, f"rescaling the logits breaks {k} more of {n} samples")


def float64_changes_nothing(probe: Probe) -> CheckCount | str:
    """The same steps on F.cross_entropy in float64 break no more."""
    broken = probe.attack_in_float64("pgd", probe.rows, cross_entropy, AuditStream.PGD10, **probe.pgd10_settings)
    if isinstance(broken, str):
        return broken
    k, n = int((broken & ~probe.broken_by_cross_entropy).sum()), len(broken)
    return CheckCount(k, n, 0.1, f"float64 breaks {k} more of {n} samples")


def float64_scores_break_no_survivor(probe: Probe) -> CheckCount | str:
    """APGD on the score in float64 breaks no survivor."""
    rows = probe.survivors[: len(probe.survivors) // 4]
    if len(rows) == 0:
        return NO_SURVIVOR
    broken = probe.attack_in_float64("apgd", rows, probe.matched, AuditStream.FLOAT64_SURVIVORS, steps=20)
    if isinstance(broken, str):
        return broken
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"float64 breaks {k} of {n} survivors")


def a_black_box_is_not_stronger(probe: Probe) -> CheckCount | str:
    """Square, which uses no gradients, breaks hardly any survivor of the gradient attacks."""
    costs = [cost for cost in probe.evaluation.stages if "square" in cost.name and cost.attacked]
    if costs:
        k, n = sum(cost.broken for cost in costs), sum(cost.attacked for cost in costs)
    else:
        if len(probe.survivors) == 0:
            return NO_SURVIVOR
        if probe.threat.norm not in ATTACKS["square"].norms:
            return f"square is not defined for {probe.threat.norm}"
        broken = probe.attack("square", probe.survivors, SCORES["margin"], AuditStream.SQUARE, steps=SQUARE_STEPS)
        k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"Square breaks {k} of {n} survivors of the gradient attacks")


def labels_alone_break_no_survivor(probe: Probe) -> CheckCount | str:
    """RayS, which reads predicted labels and neither logits nor gradients, breaks hardly any survivor."""
    rows = probe.survivors[:FEW]
    if len(rows) == 0:
        return NO_SURVIVOR
    if probe.threat.norm not in ATTACKS["rays"].norms:
        return f"rays is not defined for {probe.threat.norm}"
    broken = probe.attack("rays", rows, SCORES["margin"], AuditStream.RAYS, steps=RAYS_STEPS)
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"RayS, which reads labels alone, breaks {k} of {n} survivors")


def decomposing_the_margin_breaks_no_survivor(probe: Probe) -> CheckCount | str:
    """Margin decomposition towards every class breaks hardly any survivor.

    It breaks what other scores miss where the gradient of one logit drowns that of another, as on networks trained by
    squared error on one-hot targets.
    """
    rows = probe.survivors[:FEW]
    if len(rows) == 0:
        return NO_SURVIVOR
    stream = AuditStream.MARGIN_DECOMPOSITION
    broken = _towards_each(probe, "md", rows, SCORES["margin"], stream, MD_TARGETS, steps=10)
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"margin decomposition towards every class breaks {k} of {n} survivors")


def _towards_each(
    probe: Probe, name: str, rows: Tensor, score: Loss, stream: AuditStream, targets: int, *, steps: int
) -> Tensor:
    """Which samples an attack breaks towards their likeliest wrong classes: the first, then a batch of others."""
    broken = torch.zeros_like(rows, dtype=torch.bool)
    logits = probe.logits_at(probe.x, rows).scatter(1, probe.y(rows)[:, None], -torch.inf)
    ranked = logits.topk(min(targets, logits.shape[1] - 1), dim=1).indices
    place, left = 0, all_rows(rows)
    while place < ranked.shape[1] and len(left):
        several = max(1, probe.batches.size // len(left)) if place else 1
        target = ranked[left, place : place + several].T  # (T, n)
        draw = torch.arange(len(target), device=rows.device)[:, None].expand_as(target) + place
        found = probe.attack(
            name, rows[left].repeat(len(target)), score, stream,
            target=target.flatten(), draw=draw.flatten(), steps=steps,
        )  # fmt: skip
        broken[left] = found.view(target.shape).any(0)
        place, left = place + several, torch.nonzero(~broken)[:, 0]
    return broken


def descending_the_score_breaks_no_survivor(probe: Probe) -> CheckCount | str:
    """Steps against the gradient of the score break hardly any survivor: the gradient does not lead away on purpose."""
    rows = probe.survivors[:FEW]
    if len(rows) == 0:
        return NO_SURVIVOR
    broken = probe.attack("pgd", rows, _descent, AuditStream.DESCENT, steps=20, step_size=probe.threat.eps / 4)
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"descending the score breaks {k} of {n} survivors of attacks that ascend it")


def _descent(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """The score turned round."""
    return -negative_log_odds(out, y)


def answers_agree_on_and_off_the_8_bit_grid(probe: Probe) -> CheckCount | str:
    """Images of multiples of 1/255 are answered like the images less than half a level beside them."""
    data = probe.data.take(probe.rows)
    if not is_8bit(data, probe.threat):
        return "the images are not 8-bit, or the box is not [0, 1]"
    if probe.votes > 1:
        return "the model is randomised: an image gives other logits at every call"

    def differs_at(rows: Tensor) -> Tensor:
        return differs_off_grid(
            probe.model, probe.data.take(rows), probe.threat, probe.noise[rows].fold(AuditStream.GRID)
        )

    differs = probe.batches.cat(differs_at, probe.rows)
    k, n = int(differs.sum()), len(differs)
    return CheckCount(k, n, 0.02, f"the logits of {k} of {n} samples change once pixels leave the 8-bit grid")


def witnesses_hold_in_onnxruntime(probe: Probe) -> CheckCount | str:
    """onnxruntime misclassifies the adversarial examples that were found on holdfast's copy of an ONNX network."""
    return confirmed_by_onnxruntime(probe.raw_model, *probe.found())


def confirmed_by_onnxruntime(model: Model, y: Tensor, x_adv: Iterable[Tensor]) -> CheckCount | str:
    """How many adversarial examples onnxruntime does not confirm; every one that counts has to be asked here.

    Args:
        model: the network as the user gave it.
        y: (n,) labels.
        x_adv: (n, C, H, W) in batches, misclassified by the model.

    Returns:
        The count; or a text that says why onnxruntime was not asked.
    """
    if len(y) == 0:
        return "there is no adversarial example to confirm"
    if not isinstance(model, nn.Module):
        return "the network does not come from an ONNX file"
    predicted = runtime_predictions(model, x_adv)
    if isinstance(predicted, str):
        return predicted
    k, n = int((predicted == y.to(predicted.device)).sum()), len(y)
    return CheckCount(k, n, 0.0, f"onnxruntime does not confirm {k} of {n} adversarial examples: it answers the label")


def noise_is_not_stronger(probe: Probe) -> CheckCount | str:
    """Random points of the threat break no survivor."""
    rows = probe.survivors[: len(probe.survivors) // 4 or None]
    if len(rows) == 0:
        return NO_SURVIVOR
    broken = probe.attack("noise", rows, SCORES["margin"], AuditStream.RANDOM_NOISE, steps=NOISE_STEPS)
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"random noise breaks {k} of {n} survivors of the gradient attacks")


NO_TRANSFER_SOURCE = "there is no SCE network of the same seed to take adversarial images from"


def transfer_is_not_stronger(probe: Probe) -> CheckCount | str:
    """Adversarial images of the SCE network of the same seed break no survivor."""
    if probe.transfer_source is None:
        return NO_TRANSFER_SOURCE
    source, survivors = probe.transfer_source, torch.nonzero(~probe.broken)[:, 0]

    def tried(rows: Tensor) -> Tensor:
        """(n, 2) bool: whether the image differs from the sample's own, and whether it breaks it."""
        x, x_adv = probe.x(rows), take(source, rows.to(source.device), rows.device).to(rows.device)
        moved = (x_adv != x).flatten(1).any(1)
        broken = moved.clone()
        broken[moved] = probe.verify_candidates(rows[moved], x[moved], x_adv[moved])
        return torch.stack([moved, broken], 1)

    moved, broken = probe.batches.cat(tried, survivors).unbind(1)
    if not bool(moved.any()):
        return NO_SURVIVOR
    broken = broken[moved]
    k, n = int(broken.sum()), len(broken)
    return CheckCount(k, n, 0.02, f"adversarial images of an SCE network break {k} of {n} survivors")


def the_ascent_has_converged(probe: Probe) -> CheckCount | str:
    """On survivors, the last steps of an attack hardly raise the score any more.

    A sample shows the fault if the last quarter of 40 steps contributed more than a twentieth of the whole gain.
    """
    rows = probe.survivors[: len(probe.survivors) // 2]
    if len(rows) == 0:
        return NO_SURVIVOR

    def is_rising(rows: Tensor) -> Tensor:
        best = _ascend(probe, rows, probe.x(rows), probe.matched, [0.5] * 10 + [0.25] * 10 + [0.1] * 20)
        return best[40] - best[30] > 0.05 * (best[40] - best[0])

    k, n = int(probe.batches.cat(is_rising, rows).sum()), len(rows)
    return CheckCount(k, n, 0.25, f"the score of {k} of {n} survivors was still rising at the last step")


def _ascend(probe: Probe, rows: Tensor, start: Tensor, score: Loss, sizes: list[float]) -> list[Tensor]:
    """Best score so far, (n,), at the start and after each step of an ascent; sizes: step sizes over eps."""
    threat, x, x_adv = probe.threat, probe.x(rows), start
    best: list[Tensor] = []
    for size in [*sizes, 0.0]:
        _, value, grad = score_and_grad(probe.model, x_adv, score, probe.y(rows))
        best.append(torch.maximum(best[-1], value) if best else value)
        x_adv = threat.project(x_adv + size * threat.eps * threat.ascent(grad, x_adv), x)
    return best


def hidden_adversarial_examples_are_found(probe: Probe, inner: int = 24) -> CheckCount | str:
    """The binarisation test: if an adversarial example is planted in the threat, a gradient attack finds it.

    For each sample, a linear head on the features separates one point on the surface of the threat from ``inner``
    points inside, so that only that side counts as adversarial; one of four ascents must then reach it (Zimmermann et
    al. 2022). The ridge is as large as the features' mean variance: a head on their smallest directions alone has many
    maxima in a threat of few pixels, and missing one of them says nothing of the gradient.
    """
    threat, rows = probe.threat, probe.rows[: max(1, len(probe.rows) // 2)]

    def features(points: Tensor) -> Tensor:
        out: Outputs = as_outputs(probe.model(points))
        return out.logits if out.features is None else out.features

    def hidden(rows: Tensor) -> Tensor:
        """(n, 2) bool: whether the planted point can be separated, and whether an ascent reaches it."""
        x = probe.x(rows)
        direction = probe.noise[rows].fold(AuditStream.SURFACE_POINT).sign(tuple(x.shape[1:]), x.dtype)
        planted = threat.project(x + 2 * threat.eps * direction / column(threat.size(direction), x), x)
        parts = []
        with torch.no_grad():
            surface = features(planted).double()
            batch = max(1, MOST_FEATURES // ((inner + 1) * surface.shape[1]))
            for some in all_rows(rows).split(batch):
                points = [features(x[some])]
                for number in range(inner):
                    start = threat.random_start(x[some], probe.noise[rows[some]].fold(AuditStream.INSIDE_POINT, number))
                    points.append(features(x[some] + 0.9 * (start - x[some])))
                parts.append(_separate(torch.stack(points, 1).double(), surface[some]))
        w, bias, separable = (torch.cat(part) for part in zip(*parts, strict=True))

        def head(out: Outputs, _: Tensor) -> Tensor:
            z = out.logits if out.features is None else out.features
            return (w * z.double()).sum(1) + bias

        found = torch.zeros_like(separable)
        for restart in range(4):
            if bool((found | ~separable).all()):
                break
            start = threat.random_start(x, probe.noise[rows].fold(AuditStream.ASCENT_START, restart))
            found |= _ascend(probe, rows, start, head, [0.5] * 7 + [0.25] * 7 + [0.1] * 6)[-1] > 0
        return torch.stack([separable, found], 1)

    separable, found = probe.batches.cat(hidden, rows).unbind(1)
    if not bool(separable.any()):
        return "no linear head on the features separates the surface of the threat from its inside"
    k, n = int((~found & separable).sum()), int(separable.sum())
    return CheckCount(k, n, 0.25, f"the gradient misses {k} of {n} planted adversarial examples")


def _separate(points: Tensor, surface: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Linear heads that separate a point from others, by linear discriminants with a ridge.

    The weights solve (S + ridge) w = surface - mean. S, (D, D), has the rank of the points, so the system is solved in
    their number, which is the same by Woodbury's identity and takes no memory that grows with D^2.

    Args:
        points: (n, m, D), float64.
        surface: (n, D), float64.

    Returns:
        (weights (n, D), biases (n,), whether they separate (n,)).
    """
    mean = points.mean(1)
    deviation = points - mean[:, None]
    ridge = deviation.square().sum(1).mean(1).clamp_min(1e-12)[:, None, None]
    toward = (surface - mean)[:, :, None]
    gram = deviation @ deviation.mT + ridge * torch.eye(points.shape[1], dtype=points.dtype, device=points.device)
    solved = torch.linalg.solve_ex(gram, deviation @ toward).result
    w = ((toward - deviation.mT @ solved) / ridge)[:, :, 0]
    highest_inside = torch.einsum("nd,nid->ni", w, points).amax(1)
    at_surface = (w * surface).sum(1)
    separable = at_surface > highest_inside + 1e-9 * at_surface.abs()  # never where features are NaN
    return w, -(0.99 * at_surface + 0.01 * highest_inside), separable


def margins_are_continuous(probe: Probe, bisections: int = 10) -> CheckCount | str:
    """Where the prediction changes, the margin passes through zero: it does not jump from a plateau to another.

    On the segment between two images of different predicted classes, bisection encloses a change of the prediction in a
    thousandth of its length. A sample shows the fault if the margin changes there by as much as the smaller of the
    margins at the two ends. Where it does, no gradient and no score leads to adversarial examples.
    """
    labels, numbers = probe.y(probe.rows), all_rows(probe.rows)
    n = len(numbers)
    others = (numbers[: (n + 1) // 2, None] + numbers) % n
    partner = others.gather(1, (labels[others] != labels[: len(others), None]).long().argmax(1, keepdim=True))[:, 0]
    differ = labels[partner] != labels[: len(others)]
    rows, partner = probe.rows[: len(others)][differ], probe.rows[partner][differ]
    if len(rows) == 0:
        return "all samples have one label"

    def jumps(rows: Tensor, partner: Tensor) -> Tensor:
        y, low, high = probe.y(rows), probe.x(rows), probe.x(partner)

        def margin(x: Tensor) -> Tensor:
            return -negative_margin(predict(probe.model, x).logits, y)

        at_low, at_high = margin(low), margin(high)
        least = torch.minimum(at_low.abs(), at_high.abs())
        for _ in range(bisections):
            middle = (low + high) / 2
            at_middle = margin(middle)
            right = at_middle > 0
            low, high = torch.where(column(right, low), middle, low), torch.where(column(right, high), high, middle)
            at_low, at_high = torch.where(right, at_middle, at_low), torch.where(right, at_high, at_middle)
        return at_low - at_high >= least

    k = int(probe.batches.cat(jumps, rows, partner).sum())
    return CheckCount(
        k, len(rows), 0.25, f"the margin jumps where the prediction changes, on {k} of {len(rows)} samples"
    )


def more_steps_and_restarts_do_not_help(probe: Probe) -> CheckCount | str:
    """Two more runs, independent of the suite and of each other, break hardly any survivor."""
    first, second, both, tested = recapture(probe)
    if tested == 0:
        return NO_SURVIVOR
    k = first + second - both
    return CheckCount(k, tested, 0.02, f"two more independent runs break {k} of {tested} survivors")


def recapture(probe: Probe) -> Recapture:
    """Two independent runs on the survivors, made once per probe.

    They differ in score, target, step sizes and noise: APGD on DLR, targeted at the two likeliest wrong classes, and
    PGD on the negative log odds from random starts. They attack as many survivors as the precision needs, and if a run
    breaks one of these, all that the checks look at.

    Args:
        probe: the model under audit.

    Returns:
        How many survivors each run broke.
    """
    if probe.recapture is None:
        probe.recapture = _recapture(probe)
    return probe.recapture


def _recapture(probe: Probe) -> Recapture:
    if len(probe.survivors) == 0:
        return Recapture(0, 0, 0, 0)

    def both(rows: Tensor) -> Tensor:
        first = _towards_each(probe, "apgd", rows, SCORES["dlr"], AuditStream.RECAPTURE_APGD, 2, steps=25)
        stream, step = AuditStream.RECAPTURE_PGD, probe.threat.eps / 8
        second = probe.attack("pgd", rows, negative_log_odds, stream, steps=25, step_size=step, restarts=2)
        return torch.stack([first, second])

    runs, rest = both(probe.survivors[: probe.tested]), probe.survivors[probe.tested :]
    if len(rest) and bool(runs.any()):
        runs = torch.cat([runs, both(rest)], 1)
    first, second = runs
    return Recapture(int(first.sum()), int(second.sum()), int((first & second).sum()), runs.shape[1])
