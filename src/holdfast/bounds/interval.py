"""Interval bounds of logit differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..outputs import Queried, check_samples
from ..threat import Threat
from ..user_input import typed
from .chain import ROWS, chain_of, in_float64
from .graph import CannotBound, Graph, read
from .linear import Region, forward, upper_differences
from .rounding import HUGE, gamma, underflow
from .steps import Box, bind

STEEP = {"sqrt", "rsqrt", "log", "log1p", "reciprocal"}  # their slopes grow without end
_GRAPHS: WeakKeyDictionary[nn.Module, tuple[Any, Graph]] = WeakKeyDictionary()


@typed
def logit_difference_bounds(model: nn.Module, lo: Tensor, hi: Tensor, y: Tensor, *, slack: bool = False) -> Tensor:
    """Bound logit_j - logit_y from above over all x with lo <= x <= hi, by interval propagation.

        affine layers:  center' = W center + b,  radius' = |W| radius

    The last layer is bounded as one affine layer with the weights W_j - W_y. Differentiable. A batch norm counts with
    its running statistics, as in eval mode.

    Args:
        model: any that ``bounds.graph`` can read. Chains of layers take a faster way: a Classifier with a linear, mlp,
            convnet or Lipschitz backbone and a linear head, or an nn.Sequential of Linear, Conv2d, ReLU, MaxMin,
            pooling, Flatten, BatchNorm2d, Dropout; also inside ``importers.wrap`` or ``models.logits_only``.
        lo: (N, C, H, W), the lower corner of each sample's box.
        hi: (N, C, H, W), the upper corner.
        y: (N,) int64 labels.
        slack: Also cover the rounding of float32 evaluation: each layer's radius grows by its worst case,
            (n + 2) 2^-24 (|W| |h| + |b|) for n terms, and by what underflow may lose. A sample that may overflow has
            no bound (infinity). The bounds then hold for the numbers that a computer gets, if it sums the terms at
            float32 precision, in any order (no TF32).

    Returns:
        (N, K) upper bounds, 0 at y.

    Raises:
        CannotBound: The network cannot be read, or an operator of it has no rule.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # logit_1 - logit_0 = -2 x
    >>> lo, hi = torch.tensor([[[[0.2]]]]), torch.tensor([[[[0.4]]]])
    >>> logit_difference_bounds(net, lo, hi, torch.tensor([0])).detach()
    tensor([[ 0.0000, -0.4000]])
    """
    try:
        layers, last = chain_of(model)
    except CannotBound:
        return _by_graph(model, lo, hi, y, slack)
    center, radius = (lo + hi) / 2, (hi - lo) / 2
    weight, bias = last.parameters(center.dtype)
    for layer in layers:
        center, radius = layer.propagate_interval(center, radius, slack)
    if center.ndim != 2:
        raise CannotBound(f"the last layer must read (N, D) features, it reads {tuple(center.shape)}.")
    # W_j - W_y for each label, not for each sample: K products of (N, D) with (D, K) would be K times the work.
    difference = weight[None] - weight[:, None]  # [y, j]
    logits = center @ weight.T + bias
    spread = torch.einsum("nd,nkd->nk", radius, difference.abs()[y])
    bounds = logits - logits.gather(1, y[:, None]) + spread
    if slack:
        largest = center.abs() + radius
        size = largest @ weight.abs().T + bias.abs()
        lost = underflow(weight.shape[1], largest.amax(1), weight.abs().amax())
        bounds = bounds + gamma(weight.shape[1]) * (size + size.gather(1, y[:, None])) + 2 * lost[:, None]
        bounds = bounds.masked_fill(~(size.amax(1, keepdim=True) < HUGE), math.inf)
    return bounds.scatter(1, y[:, None], 0.0)


def _by_graph(model: nn.Module, lo: Tensor, hi: Tensor, y: Tensor, slack: bool) -> Tensor:
    """The bounds by the graph of operators: for networks that are no chains."""
    with _in_eval_mode(model):
        steps = bind(_graph_of(model, tuple(lo.shape[1:]), lo.device), lo.dtype)
    lo, hi = lo[:, None], hi[:, None]
    region = Region(Box(lo, hi), (lo + hi) / 2, Threat("linf", 1.0), 0.0)  # the box alone counts
    found = forward(steps, region, rounding=slack)
    bounds = upper_differences(steps, found, y)
    bounds = bounds.masked_fill(found.unbounded[:, None], math.inf)
    return bounds.scatter(1, y[:, None], 0.0)


def _graph_of(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Graph:
    """The graph of a network, read again when a module, a tensor, a hook or a setting is another one than before."""
    parts = (*model.modules(), *model.parameters(), *model.buffers())
    key = shape, str(device), *map(id, parts), *(part for module in model.modules() for part in _settings(module))
    kept = _GRAPHS.get(model)
    if kept is None or kept[0] != key:
        graph = read(Queried(model), shape, device=device, grad=True)
        steep = sorted({operation.name for operation in graph.operations} & STEEP)
        if steep:
            raise CannotBound(f"boxes through {steep[0]} have no gradient where they reach 0: train without it.")
        kept = _GRAPHS[model] = key, graph
    return kept[1]


def _settings(module: nn.Module) -> Iterator[Any]:
    """What a module computes with besides its tensors: numbers and texts by value, anything else by identity."""
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            yield from map(id, value.values())
        elif name != "training":
            yield name, value if isinstance(value, int | float | str) else id(value)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@typed
def box_of(x: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """Give the smallest box that holds all of the threat.

    Args:
        x: (N, ...) images in the threat's box of valid pixels.
        threat: Of any norm. For l2 and l1 the box is much larger than the ball.

    Returns:
        (lo, hi), both of x's shape.

    >>> box_of(torch.tensor([[0.95]]), Threat("linf", 0.1))
    (tensor([[0.8500]]), tensor([[1.]]))
    """
    return (x - threat.eps).clamp_min(threat.lo), (x + threat.eps).clamp_max(threat.hi)


@typed
def worst_logit_difference(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Bound max_{j != y} logit_j - logit_y over the threat, as float32 computes it. Below zero it is a proof.

    By intervals in float64, over the box that holds all that ``Threat.violation`` forgives, with slack for rounding.

    Args:
        model: As for ``logit_difference_bounds``, in eval mode.
        x: (N, C, H, W) float32 images.
        y: (N,) int64 labels.
        threat: Of any norm.

    Returns:
        (N,) float64 upper bounds.

    Raises:
        CannotBound: As ``logit_difference_bounds``.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # logit_1 - logit_0 = -2 x
    >>> bound = worst_logit_difference(net, torch.tensor([[[[0.3]]]]), torch.tensor([0]), Threat("linf", 0.1))
    >>> print(f"{bound.item():.4f}")
    -0.4000
    """
    check_samples(x, y)
    model, x, y = in_float64(model, x, y)
    forgiven = replace(threat, eps=threat.farthest(math.prod(x.shape[1:])))
    worst = []
    for rows, labels in zip(x.split(ROWS), y.split(ROWS), strict=True):
        bounds = logit_difference_bounds(model, *box_of(rows.double(), forgiven), labels, slack=True)
        worst.append(bounds.scatter(1, labels[:, None], -math.inf).amax(1))
    return torch.cat(worst)
