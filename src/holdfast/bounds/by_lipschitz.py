"""Certificates by Lipschitz constants, for networks that are chains of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .chain import ROWS, LogitLayer, chain_of
from .graph import CannotBound
from .layers import Layer
from .lipschitz import layer_constants
from .rounding import HUGE, gamma, underflow

AGREES = 1e-6  # how far a chain may be from the graph of the network, both in float64, relative to its largest logit


def margins_by_lipschitz(
    model: nn.Module, x: Tensor, y: Tensor, distance: Tensor, answers: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor | None:
    """Lower bounds of the smallest margin within an l2 distance, (N,) each; None if a layer has no Lipschitz constant.

    Layer by layer, with L the layer's constant: h is its output at x, in exact arithmetic; no x_adv's exact output is
    farther from h than ``radius``; no float32 output is farther from the exact one than ``rounding_error``, where

        rounding_error' = L rounding_error + gamma (||  |W| |h| + |b|  || + || |W| || (radius + rounding_error))

    and what underflow may lose is added to it. A sample that may overflow is not proved.

    A chain is what the classes of modules say. ``answers`` are images and the logits (N, K) that the network's own
    operators give there: where the layers compute others, the chain is of another function, and None is returned.
    """
    try:
        layers, last = chain_of(model)
        constants = layer_constants(layers, x[:1].double(), proved=True)
    except CannotBound:
        return None
    if not all(_computes(layers, last, images.double(), logits) for images, logits in answers):
        return None
    weight, bias = last.parameters(torch.float64)
    distances, lengths = (weight[None] - weight[:, None]).norm(dim=2), weight.norm(dim=1)
    least = []
    for rows, labels, radius in zip(x.split(ROWS), y.split(ROWS), distance.double().split(ROWS), strict=True):
        h = rows.double()
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
        size = h.abs() @ weight.abs().T + bias.abs() + lengths * (radius + rounding_error)[:, None]
        largest = h.abs().amax(1) + radius + rounding_error
        lost = underflow(weight.shape[1], largest, weight.abs().amax())
        slack = gamma(weight.shape[1]) * (size + size.gather(1, labels[:, None])) + 2 * lost[:, None]
        slack = slack.masked_fill(~(size.amax(1, keepdim=True) < HUGE), math.inf)
        rise = distances[labels] * (radius + rounding_error)[:, None]
        differences = logits - logits.gather(1, labels[:, None]) + rise + slack
        least.append(-differences.scatter(1, labels[:, None], -math.inf).amax(1))
    return torch.cat(least)


def _computes(layers: Sequence[Layer], last: LogitLayer, h: Tensor, logits: Tensor) -> bool:
    """Whether a chain maps images h to these logits."""
    for layer in layers:
        h = layer.apply(h)
    weight, bias = last.parameters(torch.float64)
    apart = (h @ weight.T + bias - logits).abs().amax(1)
    return bool(((apart <= AGREES * logits.abs().amax(1) + 1e-30) | ~(logits.abs().amax(1) < HUGE)).all())
