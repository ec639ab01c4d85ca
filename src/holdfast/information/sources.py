"""Where the inference information s comes from: one switch from a guess, over a bound, to a measurement.

    s = "10" | "class:3" | "gradient:0.5" | "lipschitz" | "ibp" | "attack" | "mix:0.3"

For every sample and class s_attack <= s* <= s_ibp, where s* is what the worst case adds to gap_j = z_j - z_y. A source
computes s with a graph, so training moves what s is made of, too. To add one: a factory and a line in ``SOURCES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bounds import box_of, lipschitz_s, logit_difference_bounds
from ..errors import UserError, at_least, unknown
from ..losses import negative_margin
from ..outputs import Outputs, as_outputs
from ..threat import Threat
from .formulas import logit_differences, s_att, s_cert


@dataclass(frozen=True)
class SourceContext:
    """What a source may look at: the network (unwrapped), the images, the adversary's, the point that is paid for, the
    network's answer there, the labels, and how far training is, in [0, 1]."""

    model: Any
    x: Tensor
    x_adv: Tensor
    at: Tensor
    out: Outputs
    y: Tensor
    progress: float


@dataclass(frozen=True)
class Source:
    """infer: moment -> s, (N, K) with 0 at y, or (N, 1). adversary: it needs an x_adv; the loss is then paid at x."""

    infer: Callable[[SourceContext], Tensor]
    adversary: bool = False


def per_class(threat: Threat, s: float, counts: Tensor | None = None) -> Source:
    """s_y = s (n_min / n_y)^(1/4): the rarest class gets the whole of it (LDAM, Cao et al. 2019); on balanced data, s.

    Args: s >= 0; counts: (K,) training samples of each class.
    """
    at_least("s per class", s)

    def infer(now: SourceContext) -> Tensor:
        if counts is None:
            raise UserError("s per class needs the number of training samples of each class.")
        many = counts.to(now.y.device).to(now.out.logits.dtype).clamp_min(1)
        return (s * (many.min() / many) ** 0.25)[now.y][:, None]

    return Source(infer)


def gradient(threat: Threat, kappa: float = 0.5, counts: Tensor | None = None, stopped: bool = False) -> Source:
    """s = kappa eps ||grad_x margin||_dual: what the threat takes to first order. Differentiated through.

    stopped: no gradient through s. Then it is a mere weight, and an illusion: the network grows its logits instead.
    """
    at_least("kappa", kappa)

    def infer(now: SourceContext) -> Tensor:
        with torch.enable_grad():
            x = now.at.detach().requires_grad_()
            margin = -negative_margin(as_outputs(now.model(x)), now.y)
            (slope,) = torch.autograd.grad(margin.sum(), x, create_graph=not stopped)
        return kappa * threat.eps * threat.dual_size(slope)[:, None]

    return Source(infer)


def lipschitz(threat: Threat, factor: float = 1.0, counts: Tensor | None = None, capped: bool = False) -> Source:
    """s_j = factor L reach ||w_j - w_y||_2 (Lipschitz-margin training, Tsuzuku et al. 2018).

    capped: no further than the current margin goes, s_j <= max(z_y - z_j, 0), as in the paper's code: a sample that is
    wrong gets no margin. factor: 1 trains for the threat's own eps, 2 for twice that.
    """
    at_least("factor of s=lipschitz", factor)

    def infer(now: SourceContext) -> Tensor:
        s = factor * lipschitz_s(now.model, tuple(now.x.shape[1:]), threat, now.y)
        if capped:
            margin = (-logit_differences(now.out.logits, now.y)).detach().clamp_min(0.0)
            s = s * (margin / s.detach().clamp_min(1e-12)).clamp_max(1.0)
        return s

    return Source(infer)


def ibp(threat: Threat, ramp: float = 0.5, counts: Tensor | None = None) -> Source:
    """s = interval bound of the gaps - gap: with it I-SCE is interval-bound training (Gowal et al. 2019).

    ramp: the share of training over which eps rises from 0: from the first step it would teach nothing.
    """
    check_fraction("ramp", ramp)

    def infer(now: SourceContext) -> Tensor:
        return s_cert(now.out.logits, _worst_logit_differences(now, threat, ramp), now.y)

    return Source(infer)


def attack(threat: Threat, counts: Tensor | None = None) -> Source:
    """s = gap(x_adv) - gap(x): with it I-SCE is adversarial training, SCE(x_adv)."""
    return Source(_measured, adversary=True)


def mix(threat: Threat, kappa: float = 0.3, counts: Tensor | None = None, ramp: float = 0.5) -> Source:
    """s = (1 - kappa) s_attack + kappa s_ibp: what certified training does best with (De Palma et al. 2024)."""
    check_fraction("kappa of s=mix", kappa)

    def infer(now: SourceContext) -> Tensor:
        bound = s_cert(now.out.logits, _worst_logit_differences(now, threat, ramp), now.y)
        return (1 - kappa) * _measured(now) + kappa * bound

    return Source(infer, adversary=True)


def _measured(now: SourceContext) -> Tensor:
    return s_att(now.out.logits, as_outputs(now.model(now.x_adv)).logits, now.y)


def _worst_logit_differences(now: SourceContext, threat: Threat, ramp: float) -> Tensor:
    smaller = replace(threat, eps=ramp_fraction(now.progress, ramp) * threat.eps)
    return logit_difference_bounds(now.model, *box_of(now.x, smaller), now.y)


def ramp_fraction(progress: float, ramp: float, least: float = 1e-6) -> float:
    """What of eps has risen by now: straight from ``least`` to all of it over the share ``ramp`` of training.

    >>> ramp_fraction(0.25, 0.5), ramp_fraction(0.5, 0.5), ramp_fraction(0.0, 0.0), ramp_fraction(0.0, 0.5)
    (0.5, 1.0, 1.0, 1e-06)
    """
    return 1.0 if progress >= ramp else max(progress / ramp, least)


def check_fraction(name: str, value: float) -> None:
    """Raise UserError unless the value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} must lie in [0, 1], got {value}.")


SOURCES: dict[str, tuple[Callable[..., Source], str]] = {
    "class": (per_class, "class:3: up to 3, less for frequent classes (LDAM)"),
    "gradient": (gradient, "gradient:0.5: half of what the threat takes from the margin to first order"),
    "lipschitz": (lipschitz, "lipschitz or lipschitz:2: a Lipschitz bound, for the threat or twice its eps"),
    "lipschitz-capped": (partial(lipschitz, capped=True), "the same, no further than the current margin"),
    "gradient-stopped": (partial(gradient, stopped=True), "gradient without its gradient: an illusion, for controls"),
    "ibp": (ibp, "ibp or ibp:0.5: interval bounds, eps rising over half of training"),
    "attack": (attack, "what the objective's attack does: adversarial training"),
    "mix": (mix, "mix:0.3: 0.3 of ibp and 0.7 of attack"),
}


def source(text: str, threat: Threat, counts: Tensor | None = None) -> Source:
    """A source from its spec, ``name`` or ``name:number``. Raises UserError for what cannot be read.

    >>> source("attack", Threat("linf", 0.1)).adversary
    True
    """
    name, _, number = text.partition(":")
    if name not in SOURCES:
        raise unknown("source of s", text, [*SOURCES, "a number"])
    make, about = SOURCES[name]
    if not number:
        if name == "class":
            raise UserError("s=class needs a number, such as class:3.")
        return make(threat, counts=counts)
    if name == "attack":
        raise UserError(f"s=attack takes no number, got '{text}'.")
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"cannot read the source of s '{text}': expected {about}.") from None
    return make(threat, value, counts=counts)
