"""Certificates: which samples are proved robust."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import UserError, type_of
from ..outputs import Model, Queried, frozen_eval
from ..threat import Threat, as_threat, check_images
from ..user_input import typed
from .chain import ROWS, chain_of, in_float64
from .interval import worst_logit_difference
from .layers import HUGE, CannotBound, gamma, underflow
from .lipschitz import l2_radius, layer_constants


def certify(model: Model, x: Tensor, y: Tensor, threat: Threat | str) -> Tensor | None:
    """Prove of each sample that no x_adv of the threat has another argmax than y.

    By intervals and by Lipschitz constants; a sample counts if either proves it. The arithmetic is float64 on the
    float32 weights, with slack for the float32 rounding of the network itself and for all that ``Threat.violation``
    forgives. Rounding is bounded for sums in any order at float32 precision: without TF32, and not for FFT or Winograd
    kernels.

    Args:
        model: Images to logits or Outputs. It is evaluated in eval mode.
        x: (N, C, H, W) float32 images.
        y: (N,) int64 labels.
        threat: Of any norm, or its text, such as "linf:8/255".

    Returns:
        (N,) bool, True where it is proved; None if no bound is known for the model. Where the network's own answer at
        x is not what its layers compute, nothing is proved.

    Raises:
        UserError: Images outside the threat's box, or not float; a label without a logit.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # right while x > 0
    >>> x, y = torch.tensor([0.05, 0.25]).view(2, 1, 1, 1), torch.tensor([0, 0])
    >>> certify(net, x, y, Threat("linf", 0.1, -1, 1))
    tensor([False,  True])
    """
    threat = as_threat(threat)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and y.shape == x.shape[:1]):
        raise UserError(f"certify expects tensors of images and of one label each, got {type_of(x)} and {type_of(y)}.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or (len(y) and int(y.min()) < 0):
        raise UserError(f"labels must be integers >= 0, got {y.dtype}{f' from {y.min()}' if len(y) else ''}.")
    y = y.long()
    check_images(x, threat)
    if not isinstance(model, nn.Module):
        return None
    if not x.is_floating_point():
        raise UserError(f"certify expects float images in the threat's box, got {x.dtype}. Divide by 255 first.")
    if x.dtype != torch.float32 or why_not(model):
        return None
    with frozen_eval(model), torch.no_grad():
        classes = Queried(model)(x[:1]).logits.shape[1] if len(x) else 0
        if len(x) and int(y.max()) >= classes:
            raise UserError(f"labels must be 0 .. K-1: the network returns {classes} logits, a label is {y.max()}.")
        network, images, labels = in_float64(model, x, y)
        try:
            proved = worst_logit_difference(network, images, labels, threat) < 0
            by_lipschitz, logits = _proved_by_lipschitz(network, images, labels, threat)
            return ((proved | by_lipschitz) & _returns(network, images, logits)).to(x.device)
        except CannotBound:
            return None


@typed
def why_not(model: Model) -> str:
    """Why no bound is known for a model, in one sentence; "" where one is.

    Args:
        model: Images to logits or Outputs.

    Returns:
        The sentence, or "".

    >>> why_not(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    ''
    >>> why_not(nn.Sequential(nn.Flatten(), nn.GELU(), nn.Linear(4, 2)))
    'no bound is known for a layer of kind GELU.'
    """
    if not isinstance(model, nn.Module):
        return "bounds need a torch module, and the model is a function."
    if any(tensor.dtype != torch.float32 for tensor in model.parameters()):
        return "bounds know the rounding of float32, and the model has weights of another precision."
    try:
        chain_of(model)
    except CannotBound as error:
        return str(error)
    return ""


def _returns(model: nn.Module, x: Tensor, logits: Tensor) -> Tensor:
    """Whether the model returns these (N, K) logits at x, up to float32 rounding, (N,) bool.

    A proof is about the layers that were read. Where the model answers otherwise, it does something that they do not
    show.
    """
    queried = Queried(model)
    answer = torch.cat([queried(rows).logits.double() for rows in x.split(ROWS)])
    if answer.shape != logits.shape:
        raise CannotBound("the network returns logits of another shape than its layers compute.")
    return (answer - logits).abs().amax(1) <= 1e-3 * logits.abs().amax(1) + 1e-30


def _proved_by_lipschitz(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """Which samples are proved by Lipschitz constants, (N,) bool; and the layers' exact logits at x, (N, K).

    Layer by layer, with L the layer's constant: h is its output at x, in exact arithmetic; no x_adv's exact output is
    farther from h than ``radius``; no float32 output is farther from the exact one than ``rounding_error``, where

        rounding_error' = L rounding_error + gamma (||  |W| |h| + |b|  || + || |W| || (radius + rounding_error))

    and what underflow may lose is added to it. A sample that may overflow is not proved.
    """
    dim = math.prod(x.shape[1:])
    layers, last = chain_of(model)
    constants = layer_constants(layers, x[:1].double(), proved=True)
    weight, bias = last.parameters(torch.float64)
    distances, lengths = (weight[None] - weight[:, None]).norm(dim=2), weight.norm(dim=1)
    proved, exact = [], []
    for rows, labels in zip(x.split(ROWS), y.split(ROWS), strict=True):
        h = rows.double()
        farthest = l2_radius(threat, dim, threat.farthest(dim))
        radius = torch.full((len(h),), farthest, dtype=h.dtype, device=h.device)
        rounding_error = torch.zeros_like(radius)
        for layer, constant in zip(layers, constants, strict=True):
            before, rounding_error = rounding_error, rounding_error * constant
            if layer.n_terms:
                terms = layer.magnitude(h).flatten(1)
                size = terms.norm(dim=1) + layer.magnitude_norm(h) * (radius + before)
                largest = h.abs().flatten(1).amax(1) + radius + before
                lost = underflow(layer.n_terms, largest, layer.largest_weight()) * math.sqrt(terms.shape[1])
                rounding_error = rounding_error + gamma(layer.n_terms) * size + lost
                rounding_error = rounding_error.masked_fill(~(size < HUGE), math.inf)
            h, radius = layer.apply(h), constant * radius
        logits = h @ weight.T + bias
        exact.append(logits)
        size = h.abs() @ weight.abs().T + bias.abs() + lengths * (radius + rounding_error)[:, None]
        largest = h.abs().amax(1) + radius + rounding_error
        lost = underflow(weight.shape[1], largest, weight.abs().amax())
        slack = gamma(weight.shape[1]) * (size + size.gather(1, labels[:, None])) + 2 * lost[:, None]
        slack = slack.masked_fill(~(size.amax(1, keepdim=True) < HUGE), math.inf)
        rise = distances[labels] * (radius + rounding_error)[:, None]
        differences = logits - logits.gather(1, labels[:, None]) + rise + slack
        proved.append((differences.scatter(1, labels[:, None], -math.inf) < 0).all(1))
    return torch.cat(proved), torch.cat(exact)
