"""Is the evaluation valid at all? If one of these checks fires, no figure counts, or the arithmetic is too coarse."""

from __future__ import annotations

import torch
from torch import nn

from ..attacks import cross_entropy
from ..queries import LOGIT_TOLERANCE, logits_differ
from ..threat import Threat
from .findings import CheckCount
from .probe import Probe


def outputs_are_finite(probe: Probe) -> CheckCount:
    """No logit is NaN or infinite at any point that was queried, in the evaluation or in the audit."""
    costs = probe.evaluation.stages
    k = sum(cost.nonfinite for cost in costs) + int(probe.model.nonfinite)
    n = sum(cost.forwards for cost in costs) + probe.model.forwards
    return CheckCount(k, max(n, 1), 0.0, f"the logits are NaN or infinite at {k} of {n} points that were queried")


def outputs_are_repeatable(probe: Probe) -> CheckCount:
    """The same image gives the same logits: twice now, and as at the beginning of the evaluation.

    If the evaluation recognised a randomised model and used majority votes, its figures are valid but uncertain.
    """
    again = probe.logits(probe.x(probe.rows))
    top = again.scatter(1, probe.y(probe.rows)[:, None], -torch.inf).amax(1)
    margin = again.gather(1, probe.y(probe.rows)[:, None])[:, 0] - top
    before = probe.evaluation.margin.to(again)[probe.rows]
    spread = (again.amax(1) - again.amin(1)).clamp_min(torch.finfo(again.dtype).tiny)
    k = int((logits_differ(probe.clean_logits, again) | ~((margin - before).abs() <= LOGIT_TOLERANCE * spread)).sum())
    votes = "" if probe.votes == 1 else f"; predictions are the majority of {probe.votes} outputs"
    return CheckCount(k, len(again), 0.0, f"the same image gives other logits on {k} of {len(again)} samples{votes}")


def outputs_do_not_depend_on_batch_mates(probe: Probe) -> CheckCount | str:
    """An image gives the same logits alone, in a small batch, and among other images."""
    if probe.votes > 1:
        return "the model is randomised: an image gives other logits at every call"
    x = probe.x(probe.rows)
    order = probe.noise[probe.rows].fold(90).uniform(()).argsort()
    parts = [*order[:4].split(1), *order[4:].split(max(2, len(order) // 3))]
    mixed = torch.cat([probe.logits(x[part]) for part in parts])
    k = int(logits_differ(probe.clean_logits[torch.cat(parts)], mixed).sum())
    return CheckCount(k, len(x), 0.0, f"the logits of {k} of {len(x)} images depend on the other images of their batch")


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
    outside, n = sum(cost.outside for cost in costs), sum(cost.attacked for cost in costs)
    x = probe.x(probe.rows)
    k = outside + int(((x < probe.threat.lo - 1e-6) | (x > probe.threat.hi + 1e-6)).flatten(1).any(1).sum())
    return CheckCount(k, max(n, 1), 0.0, f"{k} candidates lie outside the threat")


def eps_zero_is_clean(probe: Probe) -> CheckCount:
    """An attack with an eps of practically zero breaks nothing."""
    tiny = Threat(probe.threat.norm, 1e-9, probe.threat.lo, probe.threat.hi)
    broken = probe.attack("pgd", probe.rows, cross_entropy, 2, threat=tiny, steps=2)
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
