"""ONNX operators that compute: convolution, pooling, normalisation, functions of numbers, reductions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .node import At, Operator, axes_of, meet

# Convolution and pooling


def _window(at: At, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """(strides, dilations)"""
    ones = [1] * len(kernel)
    return list(at.get("strides", ones)), list(at.get("dilations", ones))


def _pads(at: At, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis, from auto_pad or pads."""
    strides, dilations = _window(at, kernel)
    auto = at.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [(0, 0)] * len(kernel)
    if auto == "NOTSET":
        pads = at.get("pads", [0] * (2 * len(kernel)))
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    found = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if auto == "SAME_UPPER" else (more, less))
    return found


def _pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Spatial axes padded, or cut where a number is negative."""
    flat = [side for pair in reversed(pads) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(at: At, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    strides, dilations = _window(at, kernel)
    pads = _pads(at, x.shape[2:], kernel)
    padding = [before for before, _ in pads]
    if any(before != after or before < 0 for before, after in pads):
        x, padding = _pad(x, pads), [0] * len(pads)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    answer: Tensor = conv(x, weight, bias, strides, padding, dilations, at.get("group", 1))
    return answer


def _conv_transpose(at: At, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    strides, dilations = _window(at, kernel)
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(kernel)]
    whole = conv(x, weight, None, strides, 0, 0, at.get("group", 1), dilations)
    more = at.get("output_padding", [0] * len(kernel))
    auto, wanted = at.get("auto_pad", "NOTSET"), at.get("output_shape")
    if auto.startswith("SAME") and wanted is None:
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is None:
        cut = _pads(at, x.shape[2:], kernel)
    else:
        cut = []
        for full, extra, size in zip(whole.shape[2:], more, wanted[-len(kernel) :], strict=True):
            total = max(full + extra - size, 0)
            less, rest = total // 2, total - total // 2
            cut.append((less, rest) if auto == "SAME_UPPER" else (rest, less))
    whole = _pad(whole, [(-a, extra - b) for (a, b), extra in zip(cut, more, strict=True)])
    return whole if bias is None else whole + bias.reshape(-1, *[1] * len(kernel))


def _covering(at: At, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """The padding with which whole windows cover what the node's windows cover; ceil_mode ends beyond the image."""
    strides, dilations = _window(at, kernel)
    found = []
    given = _pads(at, sizes, kernel)
    for size, k, stride, dilation, (before, after) in zip(sizes, kernel, strides, dilations, given, strict=True):
        width = (k - 1) * dilation + 1
        room = size + before + after - width
        count = (-(-room // stride) if at.get("ceil_mode", 0) else room // stride) + 1
        if at.get("ceil_mode", 0) and (count - 1) * stride >= size + before:
            count -= 1  # a window must begin inside the image
        found.append((before, (count - 1) * stride + width - size - before))
    return found


def _max_pool(at: At, x: Tensor) -> Tensor:
    kernel = at.get("kernel_shape")
    strides, dilations = _window(at, kernel)
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    pads = _pads(at, x.shape[2:], kernel)
    if not at.get("ceil_mode", 0) and all(a == b and 0 <= 2 * a <= k for (a, b), k in zip(pads, kernel, strict=True)):
        answer: Tensor = pool(x, kernel, strides, [before for before, _ in pads], dilations)
    else:
        answer = pool(_pad(x, _covering(at, x.shape[2:], kernel), -math.inf), kernel, strides, 0, dilations)
    return answer


def _average_pool(at: At, x: Tensor) -> Tensor:
    kernel = at.get("kernel_shape")
    strides, dilations = _window(at, kernel)
    if any(dilation != 1 for dilation in dilations):
        raise at.refuse("dilations")
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    pads, covering = _pads(at, x.shape[2:], kernel), _covering(at, x.shape[2:], kernel)
    mean: Tensor = pool(_pad(x, covering), kernel, strides)
    counted = pads if at.get("count_include_pad", 0) else [(0, 0)] * len(kernel)
    if all(a == p and b <= q for (a, b), (p, q) in zip(covering, counted, strict=True)):
        return mean
    ones = _pad(x.new_ones(1, 1, *x.shape[2:]), counted, 1.0)
    rest = [(a - p, b - q) for (a, b), (p, q) in zip(covering, counted, strict=True)]
    return mean / pool(_pad(ones, rest), kernel, strides)


def _global(reduce: Callable[..., Tensor]) -> Operator:
    return lambda at, x: reduce(x, dim=tuple(range(2, x.ndim)), keepdim=True)


def _lrn(at: At, x: Tensor) -> Tensor:
    size, channels = at.get("size"), x.shape[1]
    below = (size - 1) // 2
    squares = F.pad(x.square(), [0] * (2 * (x.ndim - 2)) + [below, size - 1 - below])
    near = torch.stack([squares[:, k : k + channels] for k in range(size)]).sum(0)
    return x / (at.get("bias", 1.0) + at.get("alpha", 1e-4) / size * near) ** at.get("beta", 0.75)


# Normalisation


def _batch_norm(at: At, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if at.get("training_mode", 0):
        raise at.refuse("training_mode=1 (exported in training mode: call model.eval() before)")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, at.get("epsilon", 1e-5))


def _standardised(at: At, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + at.get("epsilon", 1e-5)).sqrt()


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def _instance_norm(at: At, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return _standardised(at, x, tuple(range(2, x.ndim))) * _per_channel(scale, x) + _per_channel(bias, x)


def _group_norm(at: At, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = x.reshape(len(x), at.get("num_groups"), -1)
    plain = _standardised(at, groups, (2,)).reshape(x.shape)
    many = x.shape[1] // len(scale)  # before opset 21 one number per group
    scale, bias = scale.repeat_interleave(many), bias.repeat_interleave(many)
    return plain * _per_channel(scale, x) + _per_channel(bias, x)


def _layer_norm(at: At, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    plain = _standardised(at, x, tuple(range(at.get("axis", -1) % x.ndim, x.ndim))) * scale
    return plain if bias is None else plain + bias


def _lp_norm(at: At, x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, at.get("p", 2), dim=at.get("axis", -1), keepdim=True)


# Functions of one number


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda at, x: function(x)


def _clip(at: At, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least, most = (at.get("min"), at.get("max")) if at.node.opset < 11 else (low, high)
    return x if least is None and most is None else torch.clamp(x, least, most)


def _prelu(at: At, x: Tensor, slope: Tensor) -> Tensor:
    if at.node.opset < 7 and slope.ndim == 1 and x.ndim > 2:
        slope = _per_channel(slope, x)
    return torch.where(x >= 0, x, slope * x)


def _hard_sigmoid(at: At, x: Tensor) -> Tensor:
    return (at.get("alpha", 0.2) * x + at.get("beta", 0.5)).clamp(0.0, 1.0)


def _selu(at: At, x: Tensor) -> Tensor:
    return at.get("gamma", 1.0507009873554805) * F.elu(x, at.get("alpha", 1.6732632423543772))


def _soft(function: Callable[..., Tensor]) -> Operator:
    def run(at: At, x: Tensor) -> Tensor:
        if at.node.opset >= 13:
            return function(x, dim=at.get("axis", -1))
        axis = at.get("axis", 1) % x.ndim  # all axes from this one on are one
        return function(x.reshape(math.prod(x.shape[:axis]), -1), dim=1).reshape(x.shape)

    return run


# Arithmetic and comparison


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(at: At, a: Tensor, b: Tensor) -> Tensor:
        if at.node.opset < 7 and at.get("axis") is not None:  # b's axes begin at this one of a
            b = b.reshape(*b.shape, *[1] * (a.ndim - at.get("axis") % a.ndim - b.ndim))
        return function(*meet(a, b))

    return run


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda at, *given: functools.reduce(function, meet(*given))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _modulo(at: At, a: Tensor, b: Tensor) -> Tensor:
    a, b = meet(a, b)
    return torch.fmod(a, b) if at.get("fmod", 0) else torch.remainder(a, b)


def _where(at: At, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    condition, a, b = meet(condition, a, b)
    return torch.where(condition, a, b)


def _gemm(at: At, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = (a.T if at.get("transA", 0) else a) @ (b.T if at.get("transB", 0) else b)
    product = product if at.get("alpha", 1.0) == 1.0 else at.get("alpha") * product
    return product if c is None else product + (c if at.get("beta", 1.0) == 1.0 else at.get("beta") * c)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def run(at: At, x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = axes_of(at, axes, x.ndim)
        if not dims and at.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(dims or range(x.ndim)), bool(at.get("keepdims", 1)))

    return run


def _product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _arg_max(at: At, x: Tensor) -> Tensor:
    if at.get("select_last_index", 0):
        raise at.refuse("select_last_index=1")
    return x.argmax(at.get("axis", 0), keepdim=bool(at.get("keepdims", 1)))


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf, "Softplus": F.softplus,
    "Softsign": F.softsign, "Mish": F.mish, "HardSwish": F.hardswish, "Sqrt": torch.sqrt, "Exp": torch.exp,
    "Log": torch.log, "Neg": torch.neg, "Abs": torch.abs, "Reciprocal": torch.reciprocal, "Floor": torch.floor,
    "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin, "Cos": torch.cos,
    "Not": torch.logical_not, "Identity": lambda x: x, "Size": lambda x: torch.tensor(x.numel()),
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": _divide, "Pow": torch.pow, "MatMul": torch.matmul,
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip

COMPUTING: dict[str, Operator] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "LRN": _lrn,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_norm,
    **{name: _unary(function) for name, function in _UNARY.items()},
    "LeakyRelu": lambda at, x: F.leaky_relu(x, at.get("alpha", 0.01)),
    "ThresholdedRelu": lambda at, x: torch.where(x > at.get("alpha", 1.0), x, 0.0),
    "PRelu": _prelu,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Elu": lambda at, x: F.elu(x, at.get("alpha", 1.0)),
    "Celu": lambda at, x: F.celu(x, at.get("alpha", 1.0)),
    "Selu": _selu,
    "Gelu": lambda at, x: F.gelu(x, approximate=at.get("approximate", "none")),
    "Softmax": _soft(torch.softmax),
    "LogSoftmax": _soft(torch.log_softmax),
    **{name: _binary(function) for name, function in _BINARY.items()},
    "Mod": _modulo,
    "Where": _where,
    "Min": _many(torch.minimum),
    "Max": _many(torch.maximum),
    "Sum": _many(torch.add),
    "Mean": lambda at, *given: functools.reduce(torch.add, given) / len(given),
    "Gemm": _gemm,
    "Einsum": lambda at, *given: torch.einsum(at.get("equation"), *given),
    "ReduceMean": _reduce(lambda x, dims, keep: x.mean(dims, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, dims, keep: x.sum(dims, keepdim=keep)),
    "ReduceMax": _reduce(lambda x, dims, keep: x.amax(dims, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, dims, keep: x.amin(dims, keepdim=keep)),
    "ReduceL1": _reduce(lambda x, dims, keep: x.abs().sum(dims, keepdim=keep)),
    "ReduceL2": _reduce(lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keepdim=keep)),
    "ReduceSumSquare": _reduce(lambda x, dims, keep: x.square().sum(dims, keepdim=keep)),
    "ReduceLogSumExp": _reduce(lambda x, dims, keep: x.logsumexp(dims, keepdim=keep)),
    "ReduceProd": _reduce(_product),
    "ArgMax": _arg_max,
}  # fmt: skip
