"""Composite operators, written in primitive ones: to bound another one, write it here.

Each takes the arguments of its operator (``torch.ops.aten``), a tensor as an example of its shape, and gives a function
of the same arguments; or None where the operator is primitive as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

LARGEST = torch.finfo(torch.float32).max
Function = Callable[..., Tensor]
Chooser = Callable[[tuple[Any, ...], tuple[bool, ...]], Function | None]


def _always(function: Function) -> Chooser:
    return lambda args, varies: function


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """b + relu(a - b)."""
    return b + F.relu(a - b)


def minimum(a: Tensor, b: Tensor) -> Tensor:
    """b - relu(b - a)."""
    return b - F.relu(b - a)


def clamp(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """low + relu(x - low), and then high - relu(high - x); a side that float32 cannot pass is left out."""
    if low is not None and not (isinstance(low, float) and low <= -LARGEST):
        x = F.relu(x - low) + low
    return x.clone() if high is None or (isinstance(high, float) and high >= LARGEST) else high - F.relu(high - x)


def leaky_relu(x: Tensor, slope: float | Tensor = 0.01) -> Tensor:
    """slope x + (1 - slope) relu(x); the slope may be a tensor, such as one for each channel."""
    return slope * x + (1 - slope) * F.relu(x)


def unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """A selection of places; the windows become a new dimension behind all others."""
    dim %= x.ndim
    starts = torch.arange(0, x.shape[dim] - size + 1, step, device=x.device)
    places = starts[:, None] + torch.arange(size, device=x.device)
    return x.index_select(dim, places.flatten()).unflatten(dim, places.shape).movedim(dim + 1, -1)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """One half times the sigmoid of the other."""
    a, b = x.chunk(2, dim)
    return a * b.sigmoid()


def hardsigmoid(x: Tensor) -> Tensor:
    """clamp(x / 6 + 1 / 2, 0, 1)."""
    return clamp(x / 6 + 0.5, 0.0, 1.0)


def inverse_softmax(x: Tensor, dim: int) -> Tensor:
    """1 / softmax_i = the sum over j of exp(x_j - x_i), over a new dimension behind all others."""
    last = x.movedim(dim, -1)
    return (last.unsqueeze(-2) - last.unsqueeze(-1)).exp().sum(-1).movedim(-1, dim)


def layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) weight + bias, over the last dimensions."""
    dims = list(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    out = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, pixels: int, groups: int, eps: float
) -> Tensor:
    """The same, over each group of channels."""
    grouped = x.reshape(n, groups, -1)
    out = layer_norm(grouped, [grouped.shape[-1]], None, None, eps).reshape(n, c, -1)
    out = out if weight is None else out * weight[:, None]
    return (out if bias is None else out + bias[:, None]).reshape(x.shape)


def _batch_norm_of(args: tuple[Any, ...], varies: tuple[bool, ...]) -> Function | None:
    """Primitive in eval mode."""
    if args[5] or args[3] is None:
        raise UserError("a batch norm with the statistics of its batch depends on other images: it cannot be bounded.")
    return None


def _product_of(args: tuple[Any, ...], varies: tuple[bool, ...]) -> Function | None:
    """Primitive for two values of one shape, and for a value and a constant."""
    if not all(varies) or args[0].shape == args[1].shape:
        return None
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    return lambda a, b: a.expand(shape) * b.expand(shape)


def _quotient_of(args: tuple[Any, ...], varies: tuple[bool, ...]) -> Function | None:
    """a times 1 / b; primitive for a constant divisor."""
    return (lambda a, b: a * b.reciprocal()) if varies[1] else None


def _matrix_product_of(args: tuple[Any, ...], varies: tuple[bool, ...]) -> Function | None:
    """The sum over k of a_ik b_kj; primitive where one of the two is a constant."""
    return (lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)) if all(varies[:2]) else None


def _power_of(args: tuple[Any, ...], varies: tuple[bool, ...]) -> Function | None:
    """A square is primitive."""
    simple: dict[float, Function | None] = {
        1: lambda x, p: x.clone(), 2: None, 3: lambda x, p: x * x.square(),
        0.5: lambda x, p: x.sqrt(), -0.5: lambda x, p: x.rsqrt(), -1: lambda x, p: x.reciprocal(),
        -2: lambda x, p: x.square().reciprocal(),
    }  # fmt: skip
    if isinstance(args[1], Tensor) or args[1] not in simple:
        raise UserError("no bound is known for a power other than 1, 2, 3, 1/2, -1/2, -1, -2.")
    return simple[args[1]]


def vector_norm(x: Tensor, p: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """The square root of the sum of squares; the sum of absolute values."""
    dims = list(range(x.ndim)) if dim is None else dim
    if p == 1:
        return x.abs().sum(dims, keepdim=keepdim)
    if p != 2:
        raise UserError(f"no bound is known for a norm of order {p}, only for 1 and 2.")
    return x.square().sum(dims, keepdim=keepdim).sqrt()


def variance(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    """The mean of squared deviations."""
    dims = list(range(x.ndim)) if dim is None else list(dim)
    n = math.prod(x.shape[d] for d in dims)
    squares = (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim)
    return squares / (n - (1 if correction is None else correction))


def largest_of(parts: list[Tensor]) -> Tensor:
    """The maximum of tensors, as a tree: fewer operators in a row than a chain."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [torch.maximum(*pair) for pair in pairs] + (parts[-1:] if len(parts) % 2 else [])
    return parts[0]


def _max_pool_of(args: tuple[Any, ...], varies: tuple[bool, ...]) -> Function:
    """The maximum of k^2 selections of pixels. A place outside the image repeats one inside the same window."""
    x, window = args[0], args[1]
    stride = args[2] if len(args) > 2 and args[2] else window
    padding = args[3] if len(args) > 3 else [0, 0]
    dilation = args[4] if len(args) > 4 else [1, 1]
    ceil = args[5] if len(args) > 5 else False
    pairs = [list(p) * 2 if len(p) == 1 else list(p) for p in (window, stride, padding, dilation)]
    height, width = x.shape[-2:]
    out = F.max_pool2d(x.float(), pairs[0], pairs[1], pairs[2], pairs[3], ceil).shape[-2:]
    places = [
        [_window(o * s - p, k, d, size) for o in range(n)]
        for n, k, s, p, d, size in zip(out, *pairs, (height, width), strict=True)
    ]
    selections = [
        torch.tensor([rows[i] * width + columns[j] for rows in places[0] for columns in places[1]])
        for i in range(pairs[0][0])
        for j in range(pairs[0][1])
    ]

    def function(x: Tensor, *_: Any, **__: Any) -> Tensor:
        flat = x.flatten(-2)
        parts = [flat.index_select(-1, selection.to(x.device)) for selection in selections]
        return largest_of(parts).reshape(*x.shape[:-2], *out)

    return function


def _window(start: int, k: int, dilation: int, size: int) -> list[int]:
    """The places of a window along one side, those outside replaced by one that is inside."""
    places = [start + i * dilation for i in range(k)]
    inside = [place for place in places if 0 <= place < size]
    return [place if 0 <= place < size else inside[0] for place in places]


def amax(x: Tensor, dims: Any = (), keepdim: bool = False) -> Tensor:
    """The maximum of selections."""
    for dim in sorted((d % x.ndim for d in (dims or range(x.ndim))), reverse=True):
        largest = largest_of(list(x.unbind(dim)))
        x = largest.unsqueeze(dim) if keepdim else largest
    return x


def _filled(place: int, value: float | None = 0.0) -> Chooser:
    """A constant: of the shape of the first argument, or of the second; value: None for that of the next argument."""

    def chooser(args: tuple[Any, ...], varies: tuple[bool, ...]) -> Function:
        shape = args[0].shape if place == 0 else args[1]
        like, number = args[0], args[place + 1] if value is None else value
        if isinstance(number, Tensor):
            return lambda x, *rest, **more: rest[place].to(like.dtype).expand(shape)
        return lambda x, *rest, **more: torch.full(shape, number, dtype=like.dtype, device=like.device)

    return chooser


# What each operator is written in. Those that keep the order of their inputs also stand in MONOTONE.
COMPOSITES: dict[str, Chooser] = {
    "detach": _always(lambda x: x.clone()),  # lines need its derivative
    "copy": _always(lambda x, source, non_blocking=False: source.to(x.dtype).expand(x.shape)),
    **dict.fromkeys(("zero", "zeros_like", "empty_like"), _filled(0)),
    **dict.fromkeys(("new_zeros", "new_empty"), _filled(1)),
    "ones_like": _filled(0, 1.0),
    "new_ones": _filled(1, 1.0),
    **dict.fromkeys(("fill", "full_like"), _filled(0, None)),
    "new_full": _filled(1, None),
    "masked_fill": _always(lambda x, mask, value: torch.where(mask, value, x)),
    "glu": _always(glu),
    "unfold": _always(unfold),
    "maximum": _always(maximum),
    "minimum": _always(minimum),
    "clamp": _always(clamp),
    "clamp_min": _always(lambda x, low: clamp(x, low)),
    "clamp_max": _always(lambda x, high: clamp(x, None, high)),
    "hardtanh": _always(lambda x, low=-1.0, high=1.0: clamp(x, low, high)),
    "relu6": _always(lambda x: clamp(x, 0.0, 6.0)),
    "leaky_relu": _always(leaky_relu),
    "_prelu_kernel": _always(leaky_relu),
    "hardsigmoid": _always(hardsigmoid),
    "max_pool2d": _max_pool_of,
    "max_pool2d_with_indices": _max_pool_of,
    "amax": _always(amax),
    "amin": _always(lambda x, dims=(), keepdim=False: -amax(-x, dims, keepdim)),
    "min": lambda args, varies: lambda x, *dim, **more: -amax(-x, list(dim[:1]), *dim[1:], **more),
    "max": lambda args, varies: (lambda x, dim, keepdim=False: amax(x, [dim], keepdim)) if len(args) > 1 else amax,
    "_softmax": _always(lambda x, dim, half_to_float=False: inverse_softmax(x, dim).reciprocal()),
    "_safe_softmax": _always(lambda x, dim, dtype=None: inverse_softmax(x, dim).reciprocal()),
    "_log_softmax": _always(lambda x, dim, half_to_float=False: inverse_softmax(x, dim).log().neg()),
    "native_layer_norm": _always(layer_norm),
    "native_group_norm": _always(group_norm),
    "native_batch_norm": _batch_norm_of,
    "cudnn_batch_norm": _batch_norm_of,
    "mul": _product_of,
    "div": _quotient_of,
    "bmm": _matrix_product_of,
    "mm": _matrix_product_of,
    "pow": _power_of,
    "linalg_vector_norm": _always(vector_norm),
    "norm": _always(lambda x, p=2, dim=None, keepdim=False: vector_norm(x, 2 if p is None else p, dim, keepdim)),
    "var": _always(variance),
    "std": _always(lambda x, dim=None, **more: variance(x, dim, **more).sqrt()),
}
MONOTONE = {
    "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "hardtanh", "relu6", "max_pool2d",
    "max_pool2d_with_indices", "amax", "amin", "max", "min", "hardsigmoid",
}  # fmt: skip
