"""Interval bounds of logit differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UserError, at_least, unknown
from ..outputs import Queried, eval_mode
from ..threat import Threat
from ..user_input import typed
from .graph import CannotBound, Graph, read
from .linear import Region, against, all_lines, forward, least, others
from .propagation import Plan, Span, constants_of, plan_of, through_tail, upper_differences
from .steps import Box, bind

TRAINING_METHODS = ("interval", "crown")
SMALLEST = 1e-12  # that is divided by
STEEP = {"sqrt", "rsqrt", "log", "log1p", "reciprocal"}  # their slopes grow without end
# What every module has: dictionaries of tensors and hooks, and what no bound depends on.
HELD = {"_parameters", "_buffers", *(name for name in vars(nn.Module()) if name.endswith("_hooks"))}
UNREAD = {"training", *vars(nn.Module())} - HELD
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
        model: any that ``bounds.graph`` can read.
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
    with _full_precision(lo.device):
        graph, plan = _read(model, tuple(lo.shape[1:]), lo)
        return upper_differences(plan, lo, hi, y) if method == "interval" else _by_lines(graph, plan, lo, hi, y)


@typed
def interval_growth(
    model: nn.Module, lo: Tensor, hi: Tensor, y: Tensor, tolerance: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The bounds of ``logit_difference_bounds``, and how far boxes grow and ReLUs are out of balance (Shi et al. 2021).

        growth:   mean over ReLUs i of max(0, 1 - width of the image's box / width of box i / tolerance)
        balance:  the same of min(a, 1/a), a = what active ReLUs let pass in the mean / what inactive ones stop
                  and of min(v, 1/v), v = the same of squared deviations

    Args:
        model: as for ``logit_difference_bounds``.
        lo: the lower corners.
        hi: the upper corners.
        y: labels.
        tolerance: no term counts beyond it, in (0, 1].

    Returns:
        (N, K) upper bounds by intervals, and the 0-dim sum of the three terms, which training can add to its loss.

    Raises:
        CannotBound: as ``logit_difference_bounds`` does.
        UserError: tolerance is not in (0, 1].

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.fill_(4.0)      # radius 0.1 -> 0.4; the only ReLU is on, and none is off
    >>> x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    >>> _, growth = interval_growth(net, x - 0.1, x + 0.1, y)
    >>> print(f"{growth.item():.3f}")  # (1 - (1 / 4) / (1 / 2)) + 1 + 1
    2.500
    """
    at_least("tolerance", tolerance, above=True)
    if tolerance > 1:
        raise UserError(f"tolerance must lie in (0, 1], got {tolerance}.")
    return crown_ibp_bounds(model, lo, hi, y, 0.0, tolerance=tolerance)


@typed
def crown_ibp_bounds(
    model: nn.Module, lo: Tensor, hi: Tensor, y: Tensor, share: float, *, tolerance: float | None = None
) -> tuple[Tensor, Tensor]:
    """A share of the bounds by lines and the rest of those by intervals, with the boxes of all layers computed once.

        share crown + (1 - share) interval,   each as ``logit_difference_bounds`` gives it

    Args:
        model: as for ``logit_difference_bounds``.
        lo: the lower corners.
        hi: the upper corners.
        y: labels.
        share: of the bounds by lines, in [0, 1].
        tolerance: of ``interval_growth``, which is computed from the same boxes; None where it is not wanted.

    Returns:
        (N, K) upper bounds, 0 at y; and the 0-dim growth, 0 without a tolerance.

    Raises:
        CannotBound: as ``logit_difference_bounds`` does.
        UserError: share or tolerance out of range.

    Source: Zhang et al. 2020 (CROWN-IBP).

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # logit_1 - logit_0 = -2 x
    >>> lo, hi = torch.tensor([[[[0.2]]]]), torch.tensor([[[[0.4]]]])
    >>> bounds, growth = crown_ibp_bounds(net, lo, hi, torch.tensor([0]), 0.5)
    >>> bounds.detach(), growth
    (tensor([[ 0.0000, -0.4000]]), tensor(0.))
    """
    if not 0 <= share <= 1:
        raise UserError(f"share, of the bounds by lines, must lie in [0, 1], got {share}.")
    with _full_precision(lo.device):
        graph, plan = _read(model, tuple(lo.shape[1:]), lo)
        before: list[tuple[Tensor, Tensor]] | None = None if tolerance is None else []
        if share == 0:
            bounds = upper_differences(plan, lo, hi, y, before)
        else:
            bounds = _by_lines(graph, plan, lo, hi, y, share, before)
        if before is None or tolerance is None:
            return bounds, bounds.new_zeros(())
        width = ((hi - lo) / 2).mean()
        terms = [term for each in before for term in _out_of_order(*each, width, tolerance)]
        return bounds, sum(terms, bounds.new_zeros(())) / max(1, len(before))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Whatever the caller's mode: in half precision these would be no bounds."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(device.type, enabled=False):
        yield


def _out_of_order(center: Tensor, radius: Tensor, width: Tensor, tolerance: float) -> tuple[Tensor, ...]:
    """The three terms of one ReLU's input."""
    active, inactive = center - radius > 0, center + radius < 0
    deviation = (center - center.mean()).square()
    ratios = (
        width / radius.mean().clamp_min(SMALLEST),
        _balance((center * active).sum(), -(center * inactive).sum()),
        _balance((deviation * active).sum(), (deviation * inactive).sum()),
    )
    return tuple((1 - ratio / tolerance).clamp_min(0) for ratio in ratios)


def _balance(a: Tensor, b: Tensor) -> Tensor:
    """min(a / b, b / a)."""
    return torch.minimum(a, b) / torch.maximum(a, b).clamp_min(SMALLEST)


def _by_lines(
    graph: Graph,
    plan: Plan,
    lo: Tensor,
    hi: Tensor,
    y: Tensor,
    share: float = 1.0,
    before_relus: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """CROWN-IBP, or a share of it and the rest by the intervals that it starts from.

    ``before_relus`` is given the (center, radius) of each ReLU's input.
    """
    steps = bind(graph, lo.dtype)
    lo, hi = lo[:, None], hi[:, None]
    region = Region(Box(lo, hi), (lo + hi) / 2, Threat("linf", 1.0), 0.0)  # the box alone counts
    found = forward(steps, region, rounding=False)
    rows = against(y, graph.classes, lo.dtype)
    lines = -least(steps, found, all_lines(steps, found), region, len(steps) - 1, rows, rounding=False)
    bounds = lines.new_zeros(len(y), graph.classes).scatter(1, others(y, graph.classes), lines)

    def span(number: int) -> Span:
        of_images = graph.operations[number].shape[:1] == (1,)  # there is no such dimension in a batch
        return Span(box=Box(*(side.squeeze(1) if of_images else side for side in found.boxes[number])))

    if before_relus is not None:
        relus = (reads[0] for number, reads, _ in plan.rules if graph.operations[number].name == "relu")
        before_relus += [span(number).ball for number in relus]
    if share == 1:
        return bounds
    sources = {number: span(number) for number in plan.sources}
    return share * bounds + (1 - share) * through_tail(plan, constants_of(graph, lo.dtype), sources, y)


def _read(model: nn.Module, shape: tuple[int, ...], like: Tensor) -> tuple[Graph, Plan]:
    """The graph of a network, read again when a module, a tensor, a hook or a setting is another one than before."""
    key = shape, str(like.device), like.dtype, *(part for module in model.modules() for part in _parts(module))
    kept = _GRAPHS.get(model)
    if kept is None or kept[0] != key:
        with eval_mode(model), _trained(model):
            graph = read(Queried(model), shape, device=like.device, grad=True, dtype=_dtype_of(model))
        steep = sorted({operation.name for operation in graph.operations} & STEEP)
        if steep:
            raise CannotBound(f"boxes through {steep[0]} have no gradient where they reach 0: train without it.")
        kept = _GRAPHS[model] = key, graph, plan_of(graph, like.dtype)
    return kept[1:]


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of the weights, else of the buffers; float32 without any."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


@contextmanager
def _trained(model: nn.Module) -> Iterator[None]:
    """All weights with a gradient: what is computed from them is computed at each step, whatever is frozen now."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and not p.is_inference()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _parts(module: nn.Module) -> list[Any]:
    """What a module computes with: numbers and texts by value, tensors, hooks and anything else by identity."""
    parts: list[Any] = [id(module), type(module)]
    for name, value in vars(module).items():
        if name in HELD or name.endswith("_hooks"):
            if value:
                parts += (*value, *map(id, value.values()))  # keys of hooks are never given twice
        elif name not in UNREAD:
            parts += (name, value if isinstance(value, int | float | str) else id(value))
    return parts


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
