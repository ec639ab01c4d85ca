"""A fully connected ReLU network as affine layers: read off a model, checked, run, bounded by intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..bounds.layers import computes_as
from ..errors import UserError
from ..importers import Wrapped
from ..models import Classifier, LogitsOnly
from ..models.convnets import Linear as Pixels
from ..models.convnets import Mlp
from ..models.heads import Linear as LinearHead
from ..threat import Threat
from ..user_input import typed

Array = NDArray[np.float64]
Affine = tuple[Array, Array]  # weight (out, in), bias (out,)
PLAIN = ("", "nchw", "flat")  # input layouts that leave the order of the pixels


@typed
def layers_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Read a fully connected ReLU network as affine layers.

    The mean, std and logit_scale of a Classifier, and the preprocessing of ``importers.wrap``, become part of the
    weights. Linear layers without a ReLU between them become one.

    Args:
        model: An nn.Sequential of Flatten, Linear and ReLU (nested ones too), or a Classifier with such a backbone
            ("mlp", "linear", an nn.Sequential) and a linear head; also in ``wrap`` or ``models.logits_only``.

    Returns:
        (weight (out, in), bias (out,)) of each layer, float64, for ``decide`` and ``maximize``.

    Raises:
        UserError: The model is something else.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [tuple(weight.shape) for weight, bias in layers_of(model)]
    [(3, 4), (2, 3)]
    """
    if computes_as(model, LogitsOnly):
        return layers_of(model.inner)
    if computes_as(model, Wrapped) and isinstance(model.inner, nn.Module) and model.input_layout in PLAIN:
        first, *rest = layers_of(model.inner)
        if model.mean is not None and model.std is not None:
            first = _standardised(first, model.mean, model.std)
        if model.input_range is not None:
            low, high = model.input_range.detach().cpu().double()
            first = _reading(first, high - low, low)
        return [first, *rest]
    parts = [model.backbone, model.head] if computes_as(model, Classifier) else [model]
    layers: list[tuple[Tensor, Tensor]] = []
    separate = True  # whether a ReLU lies between the last layer and the next one
    for module in (module for part in parts for module in _modules(part)):
        if computes_as(module, nn.Linear):
            weight = module.weight.detach().cpu().double()
            bias = torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach().cpu().double()
            if not separate:
                before, offset = layers.pop()
                weight, bias = weight @ before, weight @ offset + bias
            layers.append((weight, bias))
            separate = False
        elif computes_as(module, nn.ReLU) and layers:
            separate = True
        elif layers or not computes_as(module, nn.Flatten) or (module.start_dim, module.end_dim) != (1, -1):
            raise UserError(
                "exact answers need a fully connected ReLU network, Flatten() and then Linear and ReLU in turn, "
                f"got {module} as layer {len(layers)}."
            )
    if not layers or separate:
        raise UserError("exact answers need a network that ends with a Linear layer, whose outputs are the logits.")
    if computes_as(model, Classifier):
        weight, bias = layers[-1]
        layers[-1] = (weight * model.logit_scale, bias * model.logit_scale)
        layers[0] = _standardised(layers[0], model.mean, model.std)
    return layers


def _standardised(layer: tuple[Tensor, Tensor], mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The layer that reads x where this one reads (x - mean) / std."""
    mean, std = mean.detach().cpu().double(), std.detach().cpu().double()
    return _reading(layer, 1 / std, -mean / std)


def _reading(layer: tuple[Tensor, Tensor], factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The layer that reads x where this one reads factor x + offset; one number per channel, or one for all."""
    weight, bias = layer
    factor, offset = (t.flatten().repeat_interleave(weight.shape[1] // t.numel()) for t in (factor, offset))
    return weight * factor, bias + weight @ offset


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """The leaves in the order in which they are applied. What is unknown here is given as it is, and refused later."""
    if computes_as(model, nn.Sequential):
        for child in model:
            yield from _modules(child)
    elif computes_as(model, Mlp):
        yield from _modules(model.layers)
    elif computes_as(model, LinearHead):
        yield model.linear
    elif not computes_as(model, Pixels):
        yield model


def checked(layers: Sequence[tuple[Tensor, Tensor]], x: Tensor, y: Tensor, threat: Threat) -> list[Affine]:
    """The layers as float64 arrays. Raises UserError unless layers, x, y and threat fit each other."""
    if threat.norm != "linf":
        raise UserError(f"exact answers exist for linf threats, got {threat.norm}.")
    if not layers:
        raise UserError("exact answers need at least one layer.")
    net: list[Affine] = []
    width = x[:1].numel() if len(x) else layers[0][0].shape[-1]
    for number, (weight, bias) in enumerate(layers):
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[1] != width:
            raise UserError(
                f"layer {number} takes {width} values: expected weight (out, {width}) and bias (out,), "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}."
            )
        net.append((weight.detach().cpu().double().numpy(), bias.detach().cpu().double().numpy()))
        width = len(weight)
        if not all(np.isfinite(part).all() for part in net[-1]):
            raise UserError(f"layer {number} has weights that are NaN or infinite.")
    if width < 2:
        raise UserError("exact answers need at least two logits.")
    if y.shape != x.shape[:1] or (len(y) and not (int(y.min()) >= 0 and int(y.max()) < width)):
        raise UserError(f"y must be (N,) = ({len(x)},) labels in 0 .. {width - 1}, got shape {tuple(y.shape)}.")
    if not bool(((x >= threat.lo) & (x <= threat.hi)).all()):
        raise UserError(f"x must lie in the threat's box [{threat.lo}, {threat.hi}].")
    return net


def box_around(x: Tensor, threat: Threat) -> tuple[Array, Array]:
    """The box of all that ``Threat.violation`` forgives, in float64: x (1, ...) -> (in,), (in,)."""
    center = x.flatten().double().numpy()
    radius = threat.farthest(len(center))
    return np.maximum(center - radius, threat.lo), np.minimum(center + radius, threat.hi)


def logit_differences_of(net: list[Affine], y: int) -> list[Affine]:
    """The network whose outputs are logit_j - logit_y for j != y, in order: (K - 1,)."""
    last, offset = net[-1]
    return [*net[:-1], (np.delete(last, y, 0) - last[y], np.delete(offset, y) - offset[y])]


def forward(net: list[Affine], a: Array) -> Array:
    """The logits at a (in,)."""
    for number, (weight, bias) in enumerate(net):
        a = weight @ (np.maximum(a, 0) if number else a) + bias
    return a


def interval(layer: Affine, low: Array, high: Array) -> tuple[Array, Array]:
    """Bounds of W a + b over low <= a <= high."""
    weight, bias = layer
    plus, minus = np.maximum(weight, 0), np.minimum(weight, 0)
    return plus @ low + minus @ high + bias, plus @ high + minus @ low + bias


def scaled(net: list[Affine], box: tuple[Array, Array]) -> tuple[list[Affine], float]:
    """The network with each layer divided by a positive number, and the unit of its logits.

    By interval bounds, every pre-activation then lies in [-1, 1], and every logit's sum of absolute terms in [0, 1].
    ReLU is positively homogeneous: the argmax stays the same.
    """
    layers = []
    unit = 1.0
    low, high = box
    for number, (weight, bias) in enumerate(net):
        weight = weight * unit  # the layer's input is in units of the layer before
        if number < len(net) - 1:
            size = np.abs(interval((weight, bias), low, high)).max()
        else:
            size = (np.abs(weight) @ np.maximum(np.abs(low), np.abs(high)) + np.abs(bias)).max()
        unit = float(size) or 1.0
        layers.append((weight / unit, bias / unit))
        low, high = (np.maximum(side, 0) for side in interval(layers[-1], low, high))
    return layers, unit
