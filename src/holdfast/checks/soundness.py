"""Is the evaluation valid at all? If one of these checks fires, no figure counts, or the arithmetic is too coarse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attacks import cross_entropy
from ..noise import AuditStream
from ..outputs import Model
from ..queries import OFF_DATA_TOLERANCE, CountingModel, copied, default_batch_size, logits_differ, margin_moved
from ..threat import Threat
from .findings import CheckCount, lower_bound_99
from .probe import Probe

ALONE = 32  # points that are queried alone
RANDOMISED = "the model is randomised: an image gives other logits at every call"


def outputs_are_finite(probe: Probe) -> CheckCount:
    """No logit is NaN or infinite at any point that was queried, in the evaluation or in the audit."""
    costs = probe.evaluation.stages
    k = sum(cost.nonfinite for cost in costs) + int(probe.model.nonfinite)
    n = sum(cost.forwards for cost in costs) + probe.model.forwards
    return CheckCount(k, max(n, 1), 0.0, f"the logits are NaN or infinite at {k} of {n} points that were queried")


def outputs_are_repeatable(probe: Probe) -> CheckCount:
    """The same image gives the same logits: now, at the beginning and at the end of evaluation and audit.

    Clean images, the stored x_adv, random points of the threat and points that an ascent leads to are queried. The
    margins that the evaluation stored are compared too. If the evaluation recognised a randomised model and used
    majority votes, its figures are valid but uncertain.
    """
    evaluation = probe.evaluation
    again = probe.logits_at(probe.x, probe.rows)
    moved = margin_moved(again, probe.y(probe.rows), evaluation.margin[probe.rows.cpu()])
    k = int((logits_differ(probe.clean_logits, again) | moved).sum())
    n, votes = len(again), ""
    if probe.votes > 1:
        votes = f"; predictions are the majority of {probe.votes} outputs"
    else:
        rows = torch.cat([probe.rows, probe.survivors]).unique()
        at_x_adv = probe.logits_at(probe.stored_x_adv, rows)
        k += int(margin_moved(at_x_adv, probe.y(rows), evaluation.margin_adv[rows.cpu()], OFF_DATA_TOLERANCE).sum())
        k += int(probe.points.differs(probe.logits(probe.points.x)).sum())
        n += len(at_x_adv) + len(probe.points.x)
    return CheckCount(k, n, 0.0, f"the same image gives other logits on {k} of {n} points{votes}")


def outputs_do_not_depend_on_batch_mates(probe: Probe) -> CheckCount | str:
    """An image gives the same logits alone and in batches of all sizes, at clean images and at points of the threat."""
    if probe.votes > 1:
        return RANDOMISED
    points, order = probe.points, probe.noise[probe.points.rows].fold(AuditStream.BATCH_ORDER).uniform(()).argsort()
    n, largest = len(order), default_batch_size(probe.points.x)
    differs = torch.zeros_like(points.rows, dtype=torch.bool)
    start, size = 0, 1
    while size <= largest:
        count = min(ALONE, n) if size == 1 else 1  # so many batches of this size
        for _ in range(count):
            batch = order[torch.arange(start, start + size, device=order.device) % n]
            z = points.logits.clone()
            z[batch] = probe.logits(points.x[batch])
            differs |= points.differs(z)
            start += size
        size *= 2
    k = int(differs.sum())
    return CheckCount(k, n, 0.0, f"the logits at {k} of {n} points depend on the size of their batch or on its images")


def outputs_do_not_depend_on_the_gradient_mode(probe: Probe) -> CheckCount | str:
    """The logits are the same with and without gradients, of the image and of the weights, and in inference mode."""
    if probe.votes > 1:
        return RANDOMISED
    points = probe.points

    def answers(model: Model, requires_grad: bool = False) -> Tensor:
        """The logits at the points."""

        def one(x: Tensor) -> Tensor:
            return model(x.clone().requires_grad_(requires_grad)).logits.detach().clone()

        return probe.batches.cat(one, points.x)

    differs = points.differs(answers(probe.model, requires_grad=True)) | points.differs(answers(probe.model))
    cached, trainable = copied(probe.raw_model), copied(probe.raw_model)  # what a mode leaves behind stays in its copy
    if cached is not None and trainable is not None:
        with torch.inference_mode():
            in_inference_mode = answers(CountingModel(cached, probe.model))
        differs |= points.differs(in_inference_mode.clone())
        trainable.requires_grad_()
        differs |= points.differs(answers(CountingModel(trainable, probe.model)))
    k, n = int(differs.sum()), len(differs)
    return CheckCount(k, n, 0.0, f"the logits at {k} of {n} points depend on whether gradients are recorded")


def a_copy_that_was_never_queried_answers_alike(probe: Probe) -> CheckCount | str:
    """A copy made before the evaluation gives the same logits: the model does not remember what it was asked."""
    if probe.votes > 1:
        return RANDOMISED
    if probe.evaluation.pristine is None:
        return "there is no copy of the model from before the evaluation"
    points, parts = probe.points, []
    for part in points.x.split(points.sizes):  # a copy for each kind of point: it has not been asked about the others
        fresh = copied(probe.evaluation.pristine)
        parts.append(probe.logits(part, None if fresh is None else CountingModel(fresh, probe.model)))
    k, n = int(points.differs(torch.cat(parts)).sum()), len(points.x)
    return CheckCount(k, n, 0.0, f"a copy of the network that was never queried has other logits at {k} of {n} points")


def clean_accuracy_is_above_chance(probe: Probe) -> CheckCount:
    """The network classifies clean images significantly better than its predictions would if they were shuffled."""
    y, prediction = probe.evaluation.y, probe.evaluation.prediction
    n, correct = len(y), int(probe.evaluation.clean.sum())
    classes = int(torch.maximum(y.max(), prediction.max())) + 1
    shares = [column.bincount(minlength=classes).double() / n for column in (y, prediction)]
    chance = float((shares[0] * shares[1]).sum())  # Cohen's kappa is 0 there
    at_chance = lower_bound_99(correct, n) <= chance
    return CheckCount(
        n if at_chance else 0,
        n,
        0.0,
        f"{correct} of {n} clean images are classified correctly, which is not significantly above chance "
        f"({chance:.1%}): the accuracy under attack says nothing of robustness; look first at the normalisation (mean, "
        "std, input range) and at the order of the classes",
    )


def the_model_is_left_as_it_was(probe: Probe) -> CheckCount | str:
    """A forward pass changes neither weights nor buffers."""
    if not isinstance(probe.raw_model, nn.Module):
        return "the model is a function: its state is not accessible"
    before = {name: tensor.clone() for name, tensor in probe.raw_model.state_dict().items()}
    probe.logits(probe.x(probe.rows[:8]))
    after = probe.raw_model.state_dict()
    k = sum(not torch.equal(before[name], after[name]) for name in before)
    return CheckCount(k, max(len(before), 1), 0.0, f"a forward pass in eval mode changes {k} of the model's tensors")


def candidates_lie_in_the_threat(probe: Probe) -> CheckCount:
    """Images lie in the box of pixel values, and no attack returned a point outside the threat."""
    costs = probe.evaluation.stages
    x = probe.x(probe.rows)
    k = int(((x < probe.threat.lo - 1e-6) | (x > probe.threat.hi + 1e-6)).flatten(1).any(1).sum())
    k, n = k + sum(cost.outside for cost in costs), len(x) + sum(cost.candidates for cost in costs)
    return CheckCount(k, n, 0.0, f"{k} of {n} images and candidates lie outside the threat")


def eps_zero_is_clean(probe: Probe) -> CheckCount:
    """An attack with an eps of practically zero breaks nothing."""
    tiny = Threat(probe.threat.norm, 1e-9, probe.threat.lo, probe.threat.hi)
    broken = probe.attack("pgd", probe.rows, cross_entropy, AuditStream.EPS_ZERO, threat=tiny, steps=2)
    k = int(broken.sum())
    return CheckCount(k, len(broken), 0.02, f"an attack with eps = 1e-9 breaks {k} of {len(broken)} samples")


def certified_samples_are_unbroken(probe: Probe) -> CheckCount | str:
    """Neither the suite nor a check broke a certified sample; otherwise the certificate or the attack is wrong."""
    certified = probe.evaluation.certified
    if certified is None:
        reason = "a randomised model has none" if probe.votes > 1 else "no bound of the network is known"
        return f"there is no certificate: {reason}"
    n = int(certified.sum())
    if n == 0:
        return "there is no certificate: no sample is certified"
    k = int((probe.broken.cpu() & certified).sum())
    return CheckCount(k, n, 0.0, f"{k} of {n} certified samples were broken")


def outputs_are_logits(probe: Probe) -> CheckCount:
    """The model returns logits, not probabilities: a softmax of a softmax has hardly any gradient."""
    z = probe.clean_logits
    k = int(((z >= 0).all(1) & ((z.sum(1) - 1).abs() < 1e-3)).sum())
    return CheckCount(k, len(z), 0.5, f"the outputs are probabilities on {k} of {len(z)} samples")


def arithmetic_is_float32(probe: Probe) -> CheckCount:
    """Logits have float32 precision, not that of float16 or bfloat16, and TF32 is off."""
    z = probe.clean_logits
    half = (z.half().to(z.dtype) == z).all(1) | (z.bfloat16().to(z.dtype) == z).all(1)
    half_dtype = z.dtype in (torch.float16, torch.bfloat16)
    if torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32 or half_dtype:
        half = torch.ones_like(half)
    k = int(half.sum())
    return CheckCount(k, len(z), 0.5, f"the logits have no more than half precision on {k} of {len(z)} samples")
