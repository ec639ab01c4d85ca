"""Interval bounds of logit differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import unknown
from ..outputs import Queried, eval_mode
from ..threat import Threat
from ..user_input import typed
from .chain import chain_of
from .graph import CannotBound, Graph, read
from .linear import Region, all_lines, forward, label_rows, least
from .propagation import Plan, plan_of, upper_differences
from .steps import Box, bind

TRAINING_METHODS = ("interval", "crown")
STEEP = {"sqrt", "rsqrt", "log", "log1p", "reciprocal"}  # their slopes grow without end
_GRAPHS: WeakKeyDictionary[nn.Module, tuple[Any, Graph, Plan]] = WeakKeyDictionary()


@typed
def logit_difference_bounds(model: nn.Module, lo: Tensor, hi: Tensor, y: Tensor, method: str = "interval") -> Tensor:
    """Bound logit_j - logit_y from above over all x with lo <= x <= hi, by intervals or by lines over intervals.

        affine layers:  center' = W center + b,  radius' = |W| radius

    "interval": the last layer is bounded as one affine layer with the weights W_j - W_y. "crown" (CROWN-IBP, Zhang et
    al. 2020): lines go backward from each logit difference to the image, over the boxes of the intervals. Where a ReLU
    may have either sign, the lower line is 0 or h, whichever leaves the smaller triangle. Mostly tighter, at many times
    the cost and with memory for K rows of each layer; neither is always the tighter one.

    Differentiable. A batch norm counts with its running statistics, as in eval mode. These are bounds for training, in
    exact arithmetic: they count no rounding, and the network is not compared with what was read. ``certify`` proves.

    Args:
        model: any that ``bounds.graph`` can read. Chains of layers take a faster way: a Classifier with a linear, mlp,
            convnet or Lipschitz backbone and a linear head, or an nn.Sequential of Linear, Conv2d, ReLU, MaxMin,
            pooling, Flatten, BatchNorm2d, Dropout; also inside ``importers.wrap`` or ``models.logits_only``.
        lo: (N, C, H, W), the lower corner of each sample's box.
        hi: (N, C, H, W), the upper corner.
        y: (N,) int64 labels.
        method: "interval" or "crown".

    Returns:
        (N, K) upper bounds, 0 at y.

    Raises:
        CannotBound: The network cannot be read, or an operator of it has no rule.
        UserError: an unknown method.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # logit_1 - logit_0 = -2 x
    >>> lo, hi = torch.tensor([[[[0.2]]]]), torch.tensor([[[[0.4]]]])
    >>> logit_difference_bounds(net, lo, hi, torch.tensor([0])).detach()
    tensor([[ 0.0000, -0.4000]])
    """
    if method not in TRAINING_METHODS:
        raise unknown("method", method, TRAINING_METHODS)
    try:
        layers, last = chain_of(model)
    except CannotBound:
        return _by_graph(model, lo, hi, y, method)
    if method == "crown":
        return _by_graph(model, lo, hi, y, method)
    center, radius = (lo + hi) / 2, (hi - lo) / 2
    weight, bias = last.parameters(center.dtype)
    for layer in layers:
        center, radius = layer.interval(center, radius)
    if center.ndim != 2:
        raise CannotBound(f"the last layer must read (N, D) features, it reads {tuple(center.shape)}.")
    # W_j - W_y for each label, not for each sample: K products of (N, D) with (D, K) would be K times the work.
    difference = weight[None] - weight[:, None]  # [y, j]
    logits = center @ weight.T + bias
    spread = torch.einsum("nd,nkd->nk", radius, difference.abs()[y])
    bounds = logits - logits.gather(1, y[:, None]) + spread
    return bounds.scatter(1, y[:, None], 0.0)


def _by_graph(model: nn.Module, lo: Tensor, hi: Tensor, y: Tensor, method: str) -> Tensor:
    """The bounds by the graph of operators."""
    graph, plan = _read(model, tuple(lo.shape[1:]), lo)
    if method == "interval":
        return upper_differences(plan, lo, hi, y)
    steps = bind(graph, lo.dtype)
    lo, hi = lo[:, None], hi[:, None]
    region = Region(Box(lo, hi), (lo + hi) / 2, Threat("linf", 1.0), 0.0)  # the box alone counts
    found = forward(steps, region, rounding=False)
    rows = label_rows(graph.classes, lo.dtype, y.device)[y]  # with one of zeros: a mask would wait for a GPU
    bounds = -least(steps, found, all_lines(steps, found), region, len(steps) - 1, rows)
    return bounds.scatter(1, y[:, None], 0.0)


def _read(model: nn.Module, shape: tuple[int, ...], like: Tensor) -> tuple[Graph, Plan]:
    """The graph of a network, read again when a module, a tensor, a hook or a setting is another one than before."""
    parts = (*model.modules(), *model.parameters(), *model.buffers())
    settings = (part for module in model.modules() for part in _settings(module))
    key = shape, str(like.device), like.dtype, *map(id, parts), *settings
    kept = _GRAPHS.get(model)
    if kept is None or kept[0] != key:
        with eval_mode(model):
            graph = read(Queried(model), shape, device=like.device, grad=True)
        steep = sorted({operation.name for operation in graph.operations} & STEEP)
        if steep:
            raise CannotBound(f"boxes through {steep[0]} have no gradient where they reach 0: train without it.")
        kept = _GRAPHS[model] = key, graph, plan_of(graph, like.dtype)
    return kept[1:]


def _settings(module: nn.Module) -> Iterator[Any]:
    """What a module computes with besides its tensors: numbers and texts by value, anything else by identity."""
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            yield from map(id, value.values())
        elif name != "training":
            yield name, value if isinstance(value, int | float | str) else id(value)


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
