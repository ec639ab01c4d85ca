"""Where the inference information s comes from: a guess, a bound or a measurement.

    s = "10" | "class:3" | "gradient:0.5" | "lipschitz" | "ibp" | "attack" | "mix:0.3"

For every sample and class s_att <= s* <= s_cert, where s* is the largest increase of the logit difference z_j - z_y in
the threat. A source computes s with a graph, so that training also changes what s is made of. To add a source: a
factory, and a line in ``SOURCES``.
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
from ..user_input import typed
from .formulas import logit_differences, s_att, s_cert


@dataclass(frozen=True)
class SourceContext:
    """What a source computes s from.

    Attributes:
        model: the network, without the wrapper of distributed training.
        x: (N, ...), clean images.
        x_adv: (N, ...), adversarial images.
        loss_input: (N, ...), the images that the loss is computed at: x or x_adv.
        out: the network's output at ``loss_input``.
        y: (N,) labels.
        progress: the fraction of training that is done, in [0, 1].
    """

    model: Any
    x: Tensor
    x_adv: Tensor
    loss_input: Tensor
    out: Outputs
    y: Tensor
    progress: float


@dataclass(frozen=True)
class Source:
    """A source of s.

    Attributes:
        infer: SourceContext -> s, (N, K) with 0 at y, or (N, 1).
        needs_attack: whether s is computed from x_adv; the loss is then computed at x.
    """

    infer: Callable[[SourceContext], Tensor]
    needs_attack: bool = False


@typed
def per_class(threat: Threat, s: float, counts: Tensor | None = None) -> Source:
    """A number for each class, largest for the rarest (LDAM, Cao et al. 2019); on balanced data it is s.

        s_y = s (n_min / n_y)^(1/4)

    Args:
        threat: not used.
        s: >= 0, the inference information of the rarest class.
        counts: (K,), number of training samples of each class.

    Returns:
        The source. It raises UserError when it is used without counts.
    """
    at_least("s per class", s)

    def infer(context: SourceContext) -> Tensor:
        if counts is None:
            raise UserError("s per class needs the number of training samples of each class.")
        n = counts.to(context.y.device).to(context.out.logits.dtype).clamp_min(1)
        return (s * (n.min() / n) ** 0.25)[context.y][:, None]

    return Source(infer)


@typed
def gradient(threat: Threat, kappa: float = 0.5, counts: Tensor | None = None, stopped: bool = False) -> Source:
    """s = kappa eps ||grad_x margin||_dual: the margin that the threat can remove, to first order.

    Args:
        threat: gives eps and the norm.
        kappa: a factor, >= 0.
        counts: not used.
        stopped: stop the gradient through s. s is then a mere weight and does not help: the network increases its
            logits instead. For control experiments.

    Returns:
        The source.
    """
    at_least("kappa", kappa)

    def infer(context: SourceContext) -> Tensor:
        with torch.enable_grad():
            x = context.loss_input.detach().requires_grad_()
            margin = -negative_margin(as_outputs(context.model(x)), context.y)
            (grad,) = torch.autograd.grad(margin.sum(), x, create_graph=not stopped)
        return kappa * threat.eps * threat.dual_size(grad)[:, None]

    return Source(infer)


@typed
def lipschitz(threat: Threat, factor: float = 1.0, counts: Tensor | None = None, capped: bool = False) -> Source:
    """Lipschitz-margin training (Tsuzuku et al. 2018).

        s_j = factor L r ||w_j - w_y||_2

    L is an upper bound of the backbone's Lipschitz constant in l2, and r the radius of the l2 ball around the threat.

    Args:
        threat: gives the radius.
        factor: a factor, >= 0: 1 trains for the threat's own eps, 2 for twice that.
        counts: not used.
        capped: limit s_j to the current margin, max(z_y - z_j, 0), as the paper's code does: a misclassified sample
            gets no margin.

    Returns:
        The source.
    """
    at_least("factor of s=lipschitz", factor)

    def infer(context: SourceContext) -> Tensor:
        s = factor * lipschitz_s(context.model, tuple(context.x.shape[1:]), threat, context.y)
        if capped:
            margin = (-logit_differences(context.out.logits, context.y)).detach().clamp_min(0.0)
            s = s * (margin / s.detach().clamp_min(1e-12)).clamp_max(1.0)
        return s

    return Source(infer)


@typed
def ibp(threat: Threat, ramp: float = 0.5, counts: Tensor | None = None) -> Source:
    """s_cert from interval bounds: with it I-SCE is interval-bound training (Gowal et al. 2019).

    Args:
        threat: what the bounds hold for.
        ramp: the fraction of training, in [0, 1], over which eps increases from 0; with the whole eps from the first
            step the network would learn nothing.
        counts: not used.

    Returns:
        The source.
    """
    check_fraction("ramp", ramp)

    def infer(context: SourceContext) -> Tensor:
        return s_cert(context.out.logits, _worst_logit_differences(context, threat, ramp), context.y)

    return Source(infer)


@typed
def attack(threat: Threat, counts: Tensor | None = None) -> Source:
    """s_att from the objective's attack: with it I-SCE is adversarial training, SCE(x_adv).

    Args:
        threat: not used; the objective's attack has its own.
        counts: not used.

    Returns:
        The source.
    """
    return Source(_measured, needs_attack=True)


@typed
def mix(threat: Threat, kappa: float = 0.3, counts: Tensor | None = None, ramp: float = 0.5) -> Source:
    """s = (1 - kappa) s_att + kappa s_cert, the best known form of certified training (De Palma et al. 2024).

    Args:
        threat: what the interval bounds hold for.
        kappa: the weight of s_cert, in [0, 1].
        counts: not used.
        ramp: as for ``ibp``.

    Returns:
        The source.
    """
    check_fraction("kappa of s=mix", kappa)

    def infer(context: SourceContext) -> Tensor:
        bound = s_cert(context.out.logits, _worst_logit_differences(context, threat, ramp), context.y)
        return (1 - kappa) * _measured(context) + kappa * bound

    return Source(infer, needs_attack=True)


def _measured(context: SourceContext) -> Tensor:
    """s_att."""
    return s_att(context.out.logits, as_outputs(context.model(context.x_adv)).logits, context.y)


def _worst_logit_differences(context: SourceContext, threat: Threat, ramp: float) -> Tensor:
    """Upper bounds of z_j - z_y over the threat of the current eps, (N, K)."""
    current = replace(threat, eps=ramp_fraction(context.progress, ramp) * threat.eps)
    return logit_difference_bounds(context.model, *box_of(context.x, current), context.y)


def ramp_fraction(progress: float, ramp: float, minimum: float = 1e-6) -> float:
    """The fraction of eps that is used by now: it increases linearly to 1 over the first part of training.

    Args:
        progress: the fraction of training that is done, in [0, 1].
        ramp: the fraction of training over which eps increases.
        minimum: the smallest value, at the start.

    Returns:
        A float in [minimum, 1].

    >>> ramp_fraction(0.25, 0.5), ramp_fraction(0.5, 0.5), ramp_fraction(0.0, 0.0), ramp_fraction(0.0, 0.5)
    (0.5, 1.0, 1.0, 1e-06)
    """
    return 1.0 if progress >= ramp else max(progress / ramp, minimum)


def check_fraction(name: str, value: float) -> None:
    """Raise UserError unless the value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} must lie in [0, 1], got {value}.")


SOURCES: dict[str, tuple[Callable[..., Source], str]] = {
    "class": (per_class, "class:3: up to 3, less for frequent classes (LDAM)"),
    "gradient": (gradient, "gradient:0.5: half of the margin that the threat can remove, to first order"),
    "lipschitz": (lipschitz, "lipschitz or lipschitz:2: a Lipschitz bound, for the threat or twice its eps"),
    "lipschitz-capped": (partial(lipschitz, capped=True), "lipschitz, limited to the current margin"),
    "gradient-stopped": (
        partial(gradient, stopped=True),
        "gradient, but no gradient flows through s: a control",
    ),
    "ibp": (ibp, "ibp or ibp:0.5: interval bounds, eps increasing over half of training"),
    "attack": (attack, "the increase under the objective's attack: adversarial training"),
    "mix": (mix, "mix:0.3: 0.3 of ibp and 0.7 of attack"),
}


@typed
def source(text: str, threat: Threat, counts: Tensor | None = None) -> Source:
    """A source from its spec.

    Args:
        text: ``name`` or ``name:number``, with a name in SOURCES.
        threat: the threat of training.
        counts: (K,), number of training samples of each class.

    Returns:
        The source.

    Raises:
        UserError: for a spec that cannot be read.

    >>> source("attack", Threat("linf", 0.1)).needs_attack
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
