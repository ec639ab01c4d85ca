"""Softmax cross-entropy and the inference-softmax family, all functions of the negative log odds u.

    u = logsumexp_{j != y} z_j - z_y          SCE = softplus(u)          I-SCE(s) = softplus(u + s)

u is computed without subtracting nearly equal numbers, so values and gradients keep their relative precision in
float32 at any margin, where ``F.cross_entropy`` loses the true logit's gradient beyond about 17 and all of it
beyond 104.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, at_least
from ..outputs import Outputs, logits_of
from .scores import need_class_indices

_LINEAR_FROM = 50.0  # beyond it softplus(x) = x to the last bit of float64


class _NegativeLogOdds(torch.autograd.Function):
    """u with two (N, K) buffers and one pass in the backward: as fast as the fused cross-entropy at large K."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y[:, None]
        others = z.scatter(1, y, -math.inf)
        top = others.amax(1, keepdim=True)
        p = torch.softmax(others, 1)  # over the competitors: the largest is at least 1 / (K - 1)
        return ((top - z.gather(1, y)) - p.amax(1, keepdim=True).log())[:, 0], p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Apart from ``forward``, as torch.func asks for: grad, vmap and jvp then work on every loss."""
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        z, y, p = ctx.saved_tensors
        g, y = grads[0][:, None], y[:, None]
        if torch.is_grad_enabled():  # create_graph: the gradient will be differentiated
            p = torch.softmax(z.scatter(1, y, -math.inf), 1)
            return (p * g).scatter(1, y, -g), None
        return (p * g).scatter_(1, y, -g), None

    @staticmethod
    def jvp(ctx: Any, z_tangent: Tensor, y_tangent: None) -> tuple[Tensor, None]:
        _, y, p = ctx.saved_tensors
        return (p * z_tangent).sum(1) - z_tangent.gather(1, y[:, None])[:, 0], None


def _full(z: Tensor) -> Tensor:
    """Half-precision logits in float32, as the fused cross-entropy takes them under autocast."""
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def negative_log_odds(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """The negative log odds of the true class, the score of the SCE family.

        u = logsumexp_{j != y} z_j - z_y

    u > log(K - 1) implies a mistake, and u < 0 a correct prediction. u never saturates: its gradient at the logits is
    the softmax of the competitors, and -1 at y, whatever the margin.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) int64 labels.

    Returns:
        (N,), any real number.

    >>> negative_log_odds(torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([0]))  # log(2e) - 2 = log 2 - 1
    tensor([-0.3069])
    """
    need_class_indices(y)
    z = _full(logits_of(out))
    if torch.compiler.is_compiling():  # which knows no function with a jvp of its own, and fuses this one by itself
        others = z.scatter(1, y[:, None], -math.inf)
        top = others.detach().amax(1)
        return (top - z.gather(1, y[:, None])[:, 0]) + torch.logsumexp(others - top[:, None], 1)
    return _NegativeLogOdds.apply(z, y)[0]


def negative_log_odds_of_all(out: Outputs | Tensor) -> Tensor:
    """The negative log odds that each class would have, were it the true one.

        u_c = logsumexp_{j != c} z_j - z_c = logsumexp_j z_j + log(1 - p_c) - z_c

    The second form is exact where p_c <= 1/2; the class above that, if there is one, is computed by the first.

    Args:
        out: Outputs or (N, K) logits.

    Returns:
        (N, K).

    >>> negative_log_odds_of_all(torch.tensor([[2.0, 1.0, 1.0]]))
    tensor([[-0.3069,  1.3133,  1.3133]])
    """
    z = _full(logits_of(out))
    top = z.detach().argmax(1)
    p = torch.softmax(z, 1).scatter(1, top[:, None], 0.0)
    u = torch.logsumexp(z, 1, keepdim=True) + torch.log1p(-p) - z
    return u.scatter(1, top[:, None], negative_log_odds(z, top)[:, None])


SPREAD = 10.0  # scaled_log_odds scales logits so that the largest is this far above their mean


def scaled_log_odds(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """The negative log odds of logits at a fixed scale, unchanged if the logits are multiplied or shifted.

        u(10 z / d),   d = max_j z_j - mean_j z_j, a constant in the gradient

    On tiny logits u itself weighs all competitors alike, and its gradient leads to no mistake in particular. With K = 2
    there is one competitor at any scale, and d would be the margin: u is returned.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) int64 labels.

    Returns:
        (N,), any real number.

    >>> z, y = torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0])
    >>> score, same = scaled_log_odds(z, y), scaled_log_odds(1e-4 * z, y)
    >>> bool(torch.allclose(score, same, rtol=1e-3)), bool(score < 0)
    (True, True)
    """
    z = _full(logits_of(out))
    if z.shape[1] < 3:
        return negative_log_odds(z, y)
    fixed = z.detach()
    d = (fixed.amax(1) - fixed.mean(1)).clamp_min(1e-30)
    return negative_log_odds(z * (SPREAD / d)[:, None], y)


def softplus(u: Tensor) -> Tensor:
    """log(1 + e^u), with full relative precision for any u.

    Args:
        u: Any shape.

    Returns:
        The same shape, >= 0.

    >>> softplus(torch.tensor([-100.0, 0.0, 100.0]))
    tensor([3.7835e-44, 6.9315e-01, 1.0000e+02])
    """
    return F.softplus(u, threshold=_LINEAR_FROM)


def sce(out: Outputs | Tensor, y: Tensor, *, smoothing: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Softmax cross-entropy, with optional label smoothing and temperature.

        SCE = -log p_y = softplus(u),   SCE_e = softplus(u) + e (z_y - mean_j z_j),   SCE_T(z) = T SCE(z / T)

    Label smoothing e puts the target 1 - e on y, plus e / K on every class; the second form needs no K logarithms.
    The factor T keeps the gradient of a misclassified sample at the scale that it has at T = 1.

    Where it fails: it asks the training samples to be classified correctly, and says nothing of their neighbourhood.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) int64 labels.
        smoothing: e in [0, 1).
        temperature: T > 0.

    Returns:
        (N,), >= 0.

    Raises:
        UserError: smoothing lies outside [0, 1), or temperature is not a finite number above 0.

    >>> z, y = torch.tensor([[2.0, 1.0, 0.1]], dtype=torch.float64), torch.tensor([0])
    >>> print(f"{sce(z, y).item():.6f} {sce(z, y, smoothing=0.1).item():.6f} {sce(z, y, temperature=0.5).item():.6f}")
    0.417030 0.513697 0.073220
    """
    if not 0 <= smoothing < 1:
        raise UserError(f"smoothing must lie in [0, 1), got {smoothing}.")
    at_least("temperature", temperature, above=True)
    loss = _tempered(negative_log_odds(_cooled(out, temperature), y), temperature)
    if smoothing == 0:
        return loss
    z = logits_of(out).to(loss.dtype)
    return loss + smoothing * (z.gather(1, y[:, None])[:, 0] - z.mean(1))


def isce(
    out: Outputs | Tensor,
    y: Tensor,
    *,
    s: float | Tensor = 1.0,
    gamma: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Inference-softmax cross-entropy, reading A.

        logsumexp_j(z_j + s_j) - z_y with s_y = 0;   for a number s:  softplus(u + s)

    For a number s it is the largest SCE over the logit box of radius s/2 around z, and at s = 0 it is SCE itself, to
    the last bit. The formula is derived from the paper's description, not quoted from it.

    With a focal factor and a temperature, and p the probability of y after the offset:

        T (1 - p)^gamma (-log p),   -log p = logsumexp_j((z_j + s_j) / T) - z_y / T

    On networks with a bounded Lipschitz constant this is known: s = 2, T = 0.75, gamma = 5 is the logit annealing of
    BRONet (ICML 2025), and gamma = 0 the offset and temperature of 1-Lipschitz networks since AOL (2022).

    Where it fails: a constant s has no scale; on logits that are free to grow, the network meets it by growing them.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) int64 labels.
        s: inference information: a number >= 0, or a tensor broadcastable to (N, K) whose column y is taken as 0:
            (K,) per class, (N, 1) per sample, (N, K) per competitor. Gradients flow through tensors. Their values are
            not checked, since that would synchronise the device.
        gamma: exponent of the focal factor, >= 0. Above 0, samples of high probability count less.
        temperature: T > 0. On free logits a network can undo it by growing them.

    Returns:
        (N,), > 0.

    Raises:
        UserError: s is a negative or non-finite number, or gamma or temperature lies outside its range.

    Source: Song et al. 2022 (the idea); the derivation is this project's. Focal factor: Lin et al. 2017.

    >>> z, y = torch.tensor([[2.0, 1.0, 0.1]], dtype=torch.float64), torch.tensor([0])
    >>> print(f"{isce(z, y, s=1.0).item():.6f} {isce(z, y, s=5.0).item():.6f}")
    0.878202 4.354091
    >>> bool(isce(z, y, s=0.0) == sce(z, y))
    True
    >>> print(f"{isce(z, y, s=2.0, gamma=5.0, temperature=0.75).item():.6f}")
    0.531098
    """
    at_least("gamma", gamma)
    at_least("temperature", temperature, above=True)
    if isinstance(s, Tensor):
        z = logits_of(out)
        z = z + s.expand(z.shape).scatter(1, y[:, None], 0.0)
        return _tempered(negative_log_odds(_cooled(z, temperature), y), temperature, gamma)
    if not 0 <= s < math.inf:
        raise UserError(f"s, the inference information, must be a finite number >= 0 (0 is plain SCE), got {s}.")
    return _tempered(negative_log_odds(_cooled(out, temperature), y) + s / temperature, temperature, gamma)


def _cooled(out: Outputs | Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature."""
    z = _full(logits_of(out))
    return z if temperature == 1 else z / temperature


def _tempered(v: Tensor, temperature: float, gamma: float = 0.0) -> Tensor:
    """T (1 - p)^gamma (-log p) with -log p = softplus(v), log(1 - p) = -softplus(-v): no power of a tiny 1 - p."""
    loss = softplus(v)
    if gamma:
        loss = loss * (-gamma * softplus(-v)).exp()
    return loss if temperature == 1 else temperature * loss


def isce_b(out: Outputs | Tensor, y: Tensor, *, tau: float = 0.0) -> Tensor:
    """Inference-softmax cross-entropy, reading B: an additional class with the constant logit tau.

        -log e^{z_y} / (sum_j e^{z_j} + e^tau)

    Where it fails: it is not shift-invariant. Lowering all logits raises it without a step towards a mistake, so it is
    not a score for attacks.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) int64 labels.
        tau: any number; -inf gives SCE.

    Returns:
        (N,), > 0.

    Raises:
        UserError: tau is NaN or +inf.

    >>> z, y = torch.tensor([[2.0, 1.0, 0.1]], dtype=torch.float64), torch.tensor([0])
    >>> print(f"{isce_b(z, y, tau=0.0).item():.6f} {isce_b(z, y, tau=2.0).item():.6f}")
    0.502461 0.923246
    """
    if math.isnan(tau) or tau == math.inf:
        raise UserError(f"tau must be a number or -inf (which is plain SCE), got {tau}.")
    u = negative_log_odds(out, y)
    if tau == -math.inf:
        return softplus(u)
    z_y = logits_of(out).to(u.dtype).gather(1, y[:, None])[:, 0]
    return softplus(torch.logaddexp(u, tau - z_y))


def cosface(out: Outputs | Tensor, y: Tensor, *, m: float = 0.35, scale: float = 64.0) -> Tensor:
    """CosFace, also the outer loss of hypersphere embedding: I-SCE with s = scale * m on logits scale * cos.

        -log e^{scale (cos_y - m)} / (e^{scale (cos_y - m)} + sum_{j != y} e^{scale cos_j})

    Args:
        out: Outputs or (N, K) logits of a cosine head of the same scale.
        y: (N,) int64 labels.
        m: cosine margin, >= 0.
        scale: > 0.

    Returns:
        (N,), > 0.

    Raises:
        UserError: m or scale lies outside its range.

    Source: Wang et al. 2018; Pang et al. 2020 (hypersphere embedding: scale 15, m 0.2).

    >>> cos, y = torch.tensor([[0.6, 0.8, 0.28]], dtype=torch.float64), torch.tensor([0])
    >>> print(f"{cosface(64 * cos, y).item():.4f} {cosface(15 * cos, y, m=0.2, scale=15.0).item():.6f}")
    35.2000 6.002884
    """
    at_least("scale", scale, above=True)
    return isce(out, y, s=scale * m)


def arcface(out: Outputs | Tensor, y: Tensor, *, m: float = 0.5, scale: float = 64.0) -> Tensor:
    """ArcFace: I-SCE with s = scale (cos t_y - cos(t_y + m)), where t_y is the angle to the weights of class y.

    For t_y > pi - m, where cos(t_y + m) rises again, cos t_y - m sin m takes its place.

    Args:
        out: Outputs or (N, K) logits of a cosine head of the same scale.
        y: (N,) int64 labels.
        m: angular margin in radians, in [0, pi/2].
        scale: > 0.

    Returns:
        (N,), > 0.

    Raises:
        UserError: m or scale lies outside its range.

    Source: Deng et al. 2019.

    >>> cos, y = torch.tensor([[0.6, 0.8, 0.28]], dtype=torch.float64), torch.tensor([0])
    >>> print(f"{arcface(64 * cos, y).item():.6f}")
    42.047417
    """
    if not 0 < scale < math.inf or not 0 <= m <= math.pi / 2:
        raise UserError(f"ArcFace needs scale > 0 and m in [0, pi/2] radians, got scale={scale}, m={m}.")
    need_class_indices(y)
    z = _full(logits_of(out))
    cos = z.gather(1, y[:, None]) / scale
    sin = (1 - cos.square()).clamp_min(1e-12).sqrt()
    turned = cos * math.cos(m) - sin * math.sin(m)
    lowered = torch.where(cos > -math.cos(m), turned, cos - m * math.sin(m))
    return isce(z, y, s=scale * (cos - lowered))
