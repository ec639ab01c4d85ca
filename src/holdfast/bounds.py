"""Bounds of a network over a threat: how far each gap can rise, by intervals and by Lipschitz constants.

Training and certificates share these functions. Interval-bound training puts s_cert = bound - logit difference into
I-SCE; a sample is certified when every bound is negative. To bound another kind of layer: a line in
``_propagate_interval`` (intervals) and one in ``_lipschitz_upper_bound``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .models import Classifier, convnets, heads, lipschitz, orthogonal
from .outputs import Model, frozen_eval
from .threat import Threat

UNIT = 2.0**-24  # the unit roundoff of float32, in which networks are evaluated
# Backbones whose forward is their Sequential ``layers`` and nothing else.
_CHAINS = (
    convnets.Mlp, convnets.SmallConvNet, convnets.ConvNet, convnets.StepNet, convnets.Madry, convnets.SmallCnn,
    lipschitz.LipMlp, lipschitz.LipConv,
)  # fmt: skip
_LINEAR_HEADS = (heads.Linear, heads.Centers, heads.Orthogonal)


class CannotBound(UserError):
    """A network with a layer that no bound is known for."""


def logit_difference_bounds(model: nn.Module, lo: Tensor, hi: Tensor, y: Tensor, *, slack: bool = False) -> Tensor:
    """Upper bounds of logit_j - logit_y over all x with lo <= x <= hi, by intervals: (N, K), 0 at y; differentiable.

        affine layers:  c' = W c + b,  r' = |W| r;     the last one, W_j - W_y, is bounded as one layer

    Args:
        model: a Classifier with a chain for a backbone (linear, mlp, the convnets, the Lipschitz networks) and a linear
            head, or an nn.Sequential of Linear, Conv2d, ReLU, MaxMin, pooling, Flatten, BatchNorm2d, Dropout.
        lo, hi: (N, C, H, W); y: (N,). slack: also cover the rounding of float32 evaluation: each layer's radius grows
            by its worst case, (n + 2) 2^-24 (|W| |h| + |b|) for n terms. Then the bounds hold of the numbers that a
            computer gets, if these are added up in any order at float32 precision (no TF32).

    A batch norm counts with its running statistics, as in eval mode. Raises CannotBound for any other layer.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # gap_1 = -2 x
    >>> lo, hi = torch.tensor([[[[0.2]]]]), torch.tensor([[[[0.4]]]])
    >>> logit_difference_bounds(net, lo, hi, torch.tensor([0])).detach()
    tensor([[ 0.0000, -0.4000]])
    """
    center, radius = (lo + hi) / 2, (hi - lo) / 2
    *layers, last = _chain(model)
    weight, bias = _affine(last, center.dtype)
    for layer in layers:
        center, radius = _propagate_interval(layer, center, radius, slack)
    if center.ndim != 2:
        raise CannotBound(f"the last layer must read (N, D) features, it reads {tuple(center.shape)}.")
    # W_j - W_y per label, not per sample: K products of (N, D) with (D, K) would be K times the work.
    difference = weight[None] - weight[:, None]  # [y, j]
    middle = center @ weight.T + bias
    reach = torch.einsum("nd,nkd->nk", radius, difference.abs()[y])
    bounds = middle - middle.gather(1, y[:, None]) + reach
    if slack:
        size = (center.abs() + radius) @ weight.abs().T + bias.abs()
        bounds = bounds + _gamma(weight.shape[1]) * (size + size.gather(1, y[:, None]))
    return bounds.scatter(1, y[:, None], 0.0)


def box_of(x: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """(lo, hi): the smallest box that holds all of the threat.

    >>> box_of(torch.tensor([[0.95]]), Threat("linf", 0.1))
    (tensor([[0.8500]]), tensor([[1.]]))
    """
    return (x - threat.eps).clamp_min(threat.lo), (x + threat.eps).clamp_max(threat.hi)


def worst_logit_difference(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Upper bounds of the largest gap, max_{j != y} logit_j - logit_y, that float32 can meet in the threat: (N,).

    By intervals in float64, over the box that holds all that ``Threat.violation`` forgives, with slack for rounding:
    below zero it is a proof. Raises CannotBound.
    """
    model, x, y = _with_float64(model, x, y)
    whole = replace(threat, eps=threat.farthest(math.prod(x.shape[1:])))
    found = [
        logit_difference_bounds(model, *box_of(here.double(), whole), labels, slack=True).scatter(
            1, labels[:, None], -math.inf
        )
        for here, labels in zip(x.split(ROWS), y.split(ROWS), strict=True)
    ]
    return torch.cat([bounds.amax(1) for bounds in found])


def lipschitz_constant(model: nn.Module, shape: tuple[int, ...], *, proved: bool = False) -> Tensor:
    """L of images -> features (what the last layer reads), l2 to l2: the product of the layers' constants, 0-dim.

    Args: shape: (C, H, W). proved: an upper bound for certificates, in float64 (singular values of small layers, a
    bound by the kernel for large ones); else the estimate of training, by power iteration, with a graph: 5 rounds from
    a fixed start, the same at every call, so training resumes bit for bit. Orthogonal layers count as 1 in training.

    The product is loose unless layers are orthogonal. Raises CannotBound for a layer that none is known for.

    >>> float(lipschitz_constant(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2)))  # the last layer is apart
    1.0
    """
    device = next(iter(model.parameters())).device
    dtype = torch.float64 if proved else next(model.parameters()).dtype
    constants = _constants(model, torch.zeros(1, *shape, device=device, dtype=dtype), proved)
    return torch.stack([torch.ones((), device=device, dtype=dtype), *constants]).prod()


def _constants(model: nn.Module, probe: Tensor, proved: bool) -> list[Tensor]:
    """Each layer's own constant, but for the last layer's; probe: (1, C, H, W)."""
    *layers, _ = _chain(model)
    found = []
    for layer in layers:
        found.append((_lipschitz_upper_bound if proved else _lipschitz_estimate)(layer, probe))
        with torch.no_grad():
            probe = _apply(layer, probe)
    return found


def l2_radius(threat: Threat, dim: int, size: float | None = None) -> float:
    """The l2 size of the largest perturbation: eps for l2 and l1, sqrt(dim) eps for linf. size: another one than eps.

    An l2 Lipschitz constant used with an linf eps as it stands would be a false certificate.

    >>> l2_radius(Threat("l2", 0.5), 784), l2_radius(Threat("linf", 0.5), 784)
    (0.5, 14.0)
    """
    return (threat.eps if size is None else size) * (math.sqrt(dim) if threat.norm == "linf" else 1.0)


def s_lipschitz_pairwise(constant: float | Tensor, eps: float, weight: Tensor, y: Tensor) -> Tensor:
    """s_j = L eps ||w_j - w_y||_2: (N, K), for a linear head on L-Lipschitz features; tighter than sqrt(2) L ||W|| eps.

    Args: constant: L of the features, from the threat's norm to l2; weight: (K, D) of the head; y: (N,).
    margin / sqrt(2) > L eps certifies only when the rows are orthonormal; this form always does.

    >>> s_lipschitz_pairwise(1.0, 0.5, torch.eye(2), torch.tensor([0]))
    tensor([[0.0000, 0.7071]])
    """
    apart = (weight[None] - weight[:, None]).norm(dim=2)  # of labels, (K, K), not of samples
    return constant * eps * apart[y]


def lipschitz_s(model: nn.Module, shape: tuple[int, ...], threat: Threat, y: Tensor) -> Tensor:
    """s_j = L reach ||w_j - w_y||_2: no gap rises further, up to the estimate of L; (N, K), with a graph."""
    *_, last = _chain(model)
    weight, _ = _affine(last, next(model.parameters()).dtype)
    return s_lipschitz_pairwise(lipschitz_constant(model, shape), l2_radius(threat, math.prod(shape)), weight, y)


def certify(model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor | None:
    """Which samples are proved, (N,) bool: no x_adv of the threat has another argmax than y. None: no bound is known.

    By intervals and by Lipschitz constants, a sample counts if either proves it; in float64 arithmetic on the float32
    weights, with slack for the float32 rounding of the network itself and for all that ``Threat.violation`` forgives.
    Rounding is bounded for sums in any order at float32 precision: without TF32, and not for FFT or Winograd kernels.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # right while x > 0
    >>> x, y = torch.tensor([0.05, 0.25]).view(2, 1, 1, 1), torch.tensor([0, 0])
    >>> certify(net, x, y, Threat("linf", 0.1, -1, 1))
    tensor([False,  True])
    """
    if not isinstance(model, nn.Module):
        return None
    with frozen_eval(model), torch.no_grad():
        network, here, labels = _with_float64(model, x, y)
        try:
            proved = worst_logit_difference(network, here, labels, threat) < 0
            return (proved | _proved_by_lipschitz(network, here, labels, threat)).to(x.device)
        except CannotBound:
            return None


def _with_float64(model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """All three where float64 exists: on the CPU for mps, which has none."""
    return (copy.deepcopy(model).cpu(), x.cpu(), y.cpu()) if x.device.type == "mps" else (model, x, y)


def _proved_by_lipschitz(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """h is each layer's answer at x; far: how far any x_adv's can be from it; off: how far float32 can be from that.

    With |W| (|h| + far) as the size of the terms, layer by layer:  off' = L off + gamma (| |W| |h| + |b| | + |W| far).
    """
    dim = math.prod(x.shape[1:])
    *layers, last = _chain(model)
    constants = _constants(model, x[:1].double(), proved=True)
    weight, bias = _affine(last, torch.float64)
    apart, long = (weight[None] - weight[:, None]).norm(dim=2), weight.norm(dim=1)
    found = []
    for h, labels in zip(x.split(ROWS), y.split(ROWS), strict=True):
        h = h.double()
        far = torch.full((len(h),), l2_radius(threat, dim, threat.farthest(dim)), dtype=h.dtype, device=h.device)
        off = torch.zeros_like(far)
        for layer, constant in zip(layers, constants, strict=True):
            off = off * constant
            if terms := _n_terms(layer):
                size, stretch = _magnitude(layer, h)
                off = off + _gamma(terms) * (size.flatten(1).norm(dim=1) + stretch * (far + off))
            h, far = _apply(layer, h), constant * far
        logits = h @ weight.T + bias
        size = h.abs() @ weight.abs().T + bias.abs() + long * (far + off)[:, None]
        slack = _gamma(weight.shape[1]) * (size + size.gather(1, labels[:, None]))
        gaps = logits - logits.gather(1, labels[:, None]) + apart[labels] * (far + off)[:, None] + slack
        found.append((gaps.scatter(1, labels[:, None], -math.inf) < 0).all(1))
    return torch.cat(found)


def _chain(model: nn.Module) -> Iterator[nn.Module]:
    """The layers in order, the affine one that gives the logits last."""
    if isinstance(model, Classifier):
        yield _Shift(model)
        if not isinstance(model.backbone, (*_CHAINS, convnets.Linear, nn.Sequential)):
            raise CannotBound(f"no bound is known for the backbone {type(model.backbone).__name__}.")
        yield from _flat(model.backbone)
        if not isinstance(model.head, _LINEAR_HEADS):
            raise CannotBound(f"bounds need a linear head, got {type(model.head).__name__}.")
        yield _Last(model.head, model.logit_scale)
    elif isinstance(model, nn.Sequential) and len(model):
        yield from _flat(model)
    else:
        raise CannotBound(f"no bound is known for {type(model).__name__}: give an nn.Sequential or a Classifier.")


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, _CHAINS):
        yield from _flat(module.layers)
    elif isinstance(module, nn.Sequential):
        for child in module:
            yield from _flat(child)
    elif isinstance(module, convnets.Linear):
        yield nn.Flatten()
    elif not isinstance(module, (nn.Dropout, nn.Identity)):
        if not isinstance(module, _KNOWN):
            raise CannotBound(f"no bound is known for a layer of kind {type(module).__name__}.")
        yield module


class _Shift(nn.Module):
    """(x - mean) / std, as a layer."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.mean, self.std = model.mean, model.std

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class _Last(nn.Module):
    """A linear head, and what multiplies its logits."""

    def __init__(self, head: nn.Module, scale: float) -> None:
        super().__init__()
        self.head, self.scale = head, scale


_DENSE = (nn.Linear, orthogonal.OrthogonalLinear)
_CONVOLUTIONS = (nn.Conv2d, orthogonal.OrthogonalConv)
_MONOTONE = (nn.ReLU, nn.MaxPool2d, orthogonal.MaxMin)  # none of them rounds, none stretches
_SLOPES = (nn.BatchNorm2d, _Shift)  # h * factor + offset
_KNOWN = (*_DENSE, *_CONVOLUTIONS, *_MONOTONE, *_SLOPES, convnets.Step, nn.AvgPool2d, nn.Flatten)
ROWS = 256  # samples that are proved at a time
SMALL = 4096  # up to so many rows or columns the singular values of a layer are computed


def _affine(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the last layer, as numbers of this dtype."""
    head, scale = (layer.head, layer.scale) if isinstance(layer, _Last) else (None, 1.0)
    dense = layer if head is None else head.linear
    if not isinstance(dense, _DENSE):
        raise CannotBound(f"bounds need a network that ends with a linear layer, not with {type(dense).__name__}.")
    weight, bias = dense.weight.to(dtype) * scale, dense.bias
    if isinstance(head, heads.Orthogonal):
        weight, bias = weight * head.scale, head.bias
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.to(dtype) * scale


def _map(layer: Any, h: Tensor, size: bool = False, bias: bool = True) -> Tensor:
    """W h + b of an affine layer, or |W| h + |b|; in h's dtype."""
    weight = layer.weight.to(h.dtype)
    offset = layer.bias.to(h.dtype) if bias and layer.bias is not None else None
    if size:
        weight, offset = weight.abs(), None if offset is None else offset.abs()
    if isinstance(layer, _DENSE):
        return F.linear(h, weight, offset)
    if isinstance(layer, orthogonal.OrthogonalConv):
        return orthogonal.patchwise(h, weight, offset)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise CannotBound("bounds know convolutions with zero padding given as numbers.")
    return F.conv2d(h, weight, offset, layer.stride, layer.padding, layer.dilation, layer.groups)


def _slope(layer: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """(factor, offset) per channel of a batch norm with its running statistics, or of the normalisation."""
    if isinstance(layer, _Shift):
        std, mean = layer.std.to(h.dtype), layer.mean.to(h.dtype)
        return 1 / std, -mean / std
    if layer.running_mean is None:
        raise CannotBound("a batch norm without running statistics depends on its batch: it cannot be bounded.")
    factor = (layer.running_var.to(h.dtype) + layer.eps).rsqrt()
    factor = factor if layer.weight is None else factor * layer.weight.to(h.dtype)
    offset = -layer.running_mean.to(h.dtype) * factor
    offset = offset if layer.bias is None else offset + layer.bias.to(h.dtype)
    return factor.view(-1, 1, 1), offset.view(-1, 1, 1)


def _apply(layer: Any, h: Tensor) -> Tensor:
    """The layer at h, in h's dtype."""
    if isinstance(layer, (*_DENSE, *_CONVOLUTIONS)):
        return _map(layer, h)
    if isinstance(layer, _SLOPES):
        factor, offset = _slope(layer, h)
        return h * factor + offset
    answer: Tensor = layer(h)
    return answer


def _n_terms(layer: Any) -> int:
    """How many products are summed for one output: what the rounding grows with; 0 where nothing rounds."""
    if isinstance(layer, (*_DENSE, *_CONVOLUTIONS)):
        return int(layer.weight[0].numel())
    if isinstance(layer, nn.AvgPool2d):
        return math.prod(_pair(layer.kernel_size))
    if isinstance(layer, convnets.Step):
        return 8  # x, 1/2, the clamp's two terms and leak x, and the constants slope, leak and 1 - leak, round
    return 4 if isinstance(layer, _SLOPES) else 0


def _gamma(terms: int) -> float:
    """How far a float32 sum of so many products, and a bias, can be from the truth, relative to their sizes' sum."""
    return (terms + 2) * UNIT / (1 - (terms + 2) * UNIT)


def _propagate_interval(layer: Any, center: Tensor, radius: Tensor, slack: bool) -> tuple[Tensor, Tensor]:
    """(center, radius) of the box that holds the layer's answers for all h in a box."""
    if isinstance(layer, nn.Flatten):
        return layer(center), layer(radius)
    if isinstance(layer, _MONOTONE):
        low, high = layer(center - radius), layer(center + radius)
        return (low + high) / 2, (high - low) / 2
    if isinstance(layer, convnets.Step):
        low, high = layer(center - radius), layer(center + radius)
        size = _magnitude(layer, center.abs() + radius)[0] * _gamma(_n_terms(layer)) if slack else 0.0
        return (low + high) / 2, (high - low) / 2 + size
    after = _apply(layer, center)
    if isinstance(layer, nn.AvgPool2d):
        spread = size = layer(radius)
        size = layer(center.abs() + radius) if slack else size
    elif isinstance(layer, _SLOPES):
        factor, offset = _slope(layer, center)
        spread, size = factor.abs() * radius, factor.abs() * (center.abs() + radius) + 2 * offset.abs()
    else:
        spread = _map(layer, radius, size=True, bias=False)
        size = _map(layer, center.abs() + radius, size=True) if slack else spread
    return after, spread + _gamma(_n_terms(layer)) * size if slack else spread


def _magnitude(layer: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """(|W| |h| + |b|, a bound of the l2 norm of |W|)."""
    if isinstance(layer, _SLOPES):
        factor, offset = _slope(layer, h)
        return factor.abs() * h.abs() + 2 * offset.abs(), factor.abs().amax()
    if isinstance(layer, nn.AvgPool2d):
        return layer(h.abs()), h.new_ones(())
    if isinstance(layer, convnets.Step):  # the sum of what its terms can be, as if nothing were clamped
        return layer.steepest * (h.abs() + 1), h.new_tensor(layer.steepest)
    weight = layer.weight.to(h.dtype).abs()
    flat = weight.flatten(1)
    rows, columns = flat.sum(1).amax(), weight.flatten(2).sum((0, 2)).amax() if weight.ndim == 4 else flat.sum(0).amax()
    return _map(layer, h.abs(), size=True), (rows * columns).sqrt()


def _lipschitz_estimate(layer: Any, probe: Tensor) -> Tensor:
    """An estimate of the layer's l2 Lipschitz constant with a graph: power iteration; orthogonal layers count as 1."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return _lipschitz_upper_bound(layer, probe)
    with torch.no_grad():
        start = torch.linspace(1, 2, probe.numel(), dtype=probe.dtype, device=probe.device).cos().view_as(probe)
        u = start
        for _ in range(5):
            v = _map(layer, u, bias=False)
            u = torch.autograd.functional.vjp(lambda t: _map(layer, t, bias=False), u, v)[1]
            u = u / u.norm().clamp_min(1e-12)
    return _map(layer, u, bias=False).norm()


def _lipschitz_upper_bound(layer: Any, probe: Tensor) -> Tensor:
    """An upper bound of the layer's l2 Lipschitz constant; probe: (1, ...), what it reads."""
    one = probe.new_ones(())
    if isinstance(layer, nn.MaxPool2d):
        kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
        return one * math.sqrt(math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True)))
    if isinstance(layer, (nn.Flatten, *_MONOTONE)):
        return one
    if isinstance(layer, nn.AvgPool2d):
        kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
        return one * math.sqrt(math.prod(math.ceil(k / s) / k for k, s in zip(kernel, stride, strict=True)))
    if isinstance(layer, _SLOPES):
        return _slope(layer, probe)[0].abs().amax()
    if isinstance(layer, convnets.Step):
        return one * layer.steepest
    if isinstance(layer, orthogonal.Orthogonal) and layer.free.requires_grad and torch.is_grad_enabled():
        return one  # in training; a certificate measures the rounded matrix
    weight = layer.weight.to(probe.dtype)
    if isinstance(layer, nn.Conv2d):
        after = _map(layer, probe, bias=False)
        if min(probe.numel(), after.numel()) <= SMALL // 2 and max(probe.numel(), after.numel()) <= SMALL:
            eye = torch.eye(probe.numel(), dtype=probe.dtype, device=probe.device).view(-1, *probe.shape[1:])
            return _largest_singular_value(_map(layer, eye, bias=False).flatten(1))
        # Each pixel is read by at most ceil(k / stride)^2 windows, and each window is lengthened by the kernel's norm.
        windows = math.prod(
            math.ceil((d * (k - 1) + 1) / s)
            for k, s, d in zip(layer.kernel_size, _pair(layer.stride), _pair(layer.dilation), strict=True)
        )
        return _largest_singular_value(weight.flatten(1)) * math.sqrt(windows)
    return _largest_singular_value(weight.flatten(1))


def _largest_singular_value(matrix: Tensor) -> Tensor:
    """The largest singular value, rounded up."""
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    # Lengths of a kept norm come out as 1 +- 1e-7; float64's own error is far below 1e-9.
    return torch.linalg.eigvalsh(small).amax().clamp_min(0.0).sqrt() * (1 + 1e-9) + 1e-12


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
