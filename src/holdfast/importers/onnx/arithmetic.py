"""ONNX operators that compute: convolution, pooling, normalisation, activations, arithmetic, reductions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...straight_through import rounded_through
from .node import Context, Operator, axes_of, on_one_device

# Convolution and pooling


def _window(ctx: Context, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """(strides, dilations) of the node, one number per spatial axis."""
    ones = [1] * len(kernel)
    return list(ctx.get("strides", ones)), list(ctx.get("dilations", ones))


def _pads(ctx: Context, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis, from auto_pad or pads."""
    strides, dilations = _window(ctx, kernel)
    auto = ctx.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [(0, 0)] * len(kernel)
    if auto == "NOTSET":
        pads = ctx.get("pads", [0] * (2 * len(kernel)))
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    pads = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        pads.append((less, more) if auto == "SAME_UPPER" else (more, less))
    return pads


def _pad(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the spatial axes; a negative number crops."""
    flat = [side for pair in reversed(pads) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    strides, dilations = _window(ctx, kernel)
    pads = _pads(ctx, x.shape[2:], kernel)
    padding = [before for before, _ in pads]
    if any(before != after or before < 0 for before, after in pads):
        x, padding = _pad(x, pads), [0] * len(pads)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    out: Tensor = conv(x, weight, bias, strides, padding, dilations, ctx.get("group", 1))
    return out


def _conv_transpose(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    strides, dilations = _window(ctx, kernel)
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(kernel)]
    full = conv(x, weight, None, strides, 0, 0, ctx.get("group", 1), dilations)
    extra = ctx.get("output_padding", [0] * len(kernel))
    auto, output_shape = ctx.get("auto_pad", "NOTSET"), ctx.get("output_shape")
    if auto.startswith("SAME") and output_shape is None:
        output_shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if output_shape is None:
        crop = _pads(ctx, x.shape[2:], kernel)
    else:
        crop = []
        for full_size, added, size in zip(full.shape[2:], extra, output_shape[-len(kernel) :], strict=True):
            total = max(full_size + added - size, 0)
            less, more = total // 2, total - total // 2
            crop.append((less, more) if auto == "SAME_UPPER" else (more, less))
    out: Tensor = _pad(full, [(-before, added - after) for (before, after), added in zip(crop, extra, strict=True)])
    return out if bias is None else out + bias.reshape(-1, *[1] * len(kernel))


def _window_pads(ctx: Context, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) padding that the node's windows fill exactly; with ceil_mode the last ends outside."""
    strides, dilations = _window(ctx, kernel)
    filled = []
    pads = _pads(ctx, sizes, kernel)
    for size, k, stride, dilation, (before, after) in zip(sizes, kernel, strides, dilations, pads, strict=True):
        width = (k - 1) * dilation + 1
        room = size + before + after - width
        count = (-(-room // stride) if ctx.get("ceil_mode", 0) else room // stride) + 1
        if ctx.get("ceil_mode", 0) and (count - 1) * stride >= size + before:
            count -= 1  # a window must start inside the image
        filled.append((before, (count - 1) * stride + width - size - before))
    return filled


def _max_pool(ctx: Context, x: Tensor) -> Tensor:
    kernel = ctx.get("kernel_shape")
    strides, dilations = _window(ctx, kernel)
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
    pads = _pads(ctx, x.shape[2:], kernel)
    if not ctx.get("ceil_mode", 0) and all(a == b and 0 <= 2 * a <= k for (a, b), k in zip(pads, kernel, strict=True)):
        out: Tensor = pool(x, kernel, strides, [before for before, _ in pads], dilations)
    else:
        out = pool(_pad(x, _window_pads(ctx, x.shape[2:], kernel), -math.inf), kernel, strides, 0, dilations)
    return out


def _average_pool(ctx: Context, x: Tensor) -> Tensor:
    kernel = ctx.get("kernel_shape")
    strides, dilations = _window(ctx, kernel)
    if any(dilation != 1 for dilation in dilations):
        raise ctx.unsupported("dilations")
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    pads, filled = _pads(ctx, x.shape[2:], kernel), _window_pads(ctx, x.shape[2:], kernel)
    mean: Tensor = pool(_pad(x, filled), kernel, strides)
    counted = pads if ctx.get("count_include_pad", 0) else [(0, 0)] * len(kernel)
    if all(a == p and b <= q for (a, b), (p, q) in zip(filled, counted, strict=True)):
        return mean
    ones = _pad(x.new_ones(1, 1, *x.shape[2:]), counted, 1.0)
    rest = [(a - p, b - q) for (a, b), (p, q) in zip(filled, counted, strict=True)]
    return mean / pool(_pad(ones, rest), kernel, strides)


def _global(reduce: Callable[..., Tensor]) -> Operator:
    return lambda ctx, x: reduce(x, dim=tuple(range(2, x.ndim)), keepdim=True)


def _lrn(ctx: Context, x: Tensor) -> Tensor:
    size, channels = ctx.get("size"), x.shape[1]
    below = (size - 1) // 2
    squares = F.pad(x.square(), [0] * (2 * (x.ndim - 2)) + [below, size - 1 - below])
    window_sum = torch.stack([squares[:, k : k + channels] for k in range(size)]).sum(0)
    return x / (ctx.get("bias", 1.0) + ctx.get("alpha", 1e-4) / size * window_sum) ** ctx.get("beta", 0.75)


# Normalisation


def _batch_norm(ctx: Context, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if ctx.get("training_mode", 0):
        raise ctx.unsupported("training_mode=1 (call model.eval() before the export)")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, ctx.get("epsilon", 1e-5))


def _standardised(ctx: Context, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + ctx.get("epsilon", 1e-5)).sqrt()


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def _instance_norm(ctx: Context, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return _standardised(ctx, x, tuple(range(2, x.ndim))) * _per_channel(scale, x) + _per_channel(bias, x)


def _group_norm(ctx: Context, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = x.reshape(len(x), ctx.get("num_groups"), -1)
    normalised = _standardised(ctx, groups, (2,)).reshape(x.shape)
    repeats = x.shape[1] // len(scale)  # before opset 21 there is one number per group
    scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    return normalised * _per_channel(scale, x) + _per_channel(bias, x)


def _layer_norm(ctx: Context, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _standardised(ctx, x, tuple(range(ctx.get("axis", -1) % x.ndim, x.ndim))) * scale
    return out if bias is None else out + bias


def _lp_norm(ctx: Context, x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, ctx.get("p", 2), dim=ctx.get("axis", -1), keepdim=True)


# Activations


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda ctx, x: function(x)


def _clip(ctx: Context, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if ctx.node.opset < 11:
        low, high = ctx.get("min"), ctx.get("max")
    return x if low is None and high is None else torch.clamp(x, low, high)


def _prelu(ctx: Context, x: Tensor, slope: Tensor) -> Tensor:
    if ctx.node.opset < 7 and slope.ndim == 1 and x.ndim > 2:
        slope = _per_channel(slope, x)
    return torch.where(x >= 0, x, slope * x)


def _hard_sigmoid(ctx: Context, x: Tensor) -> Tensor:
    return (ctx.get("alpha", 0.2) * x + ctx.get("beta", 0.5)).clamp(0.0, 1.0)


def _selu(ctx: Context, x: Tensor) -> Tensor:
    return ctx.get("gamma", 1.0507009873554805) * F.elu(x, ctx.get("alpha", 1.6732632423543772))


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def operator(ctx: Context, x: Tensor) -> Tensor:
        if ctx.node.opset >= 13:
            return function(x, dim=ctx.get("axis", -1))
        axis = ctx.get("axis", 1) % x.ndim  # before opset 13: over all axes from this one on
        return function(x.reshape(math.prod(x.shape[:axis]), -1), dim=1).reshape(x.shape)

    return operator


# Arithmetic and comparison


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        if ctx.node.opset < 7 and ctx.get("axis") is not None:  # b's first axis is this axis of a
            b = b.reshape(*b.shape, *[1] * (a.ndim - ctx.get("axis") % a.ndim - b.ndim))
        return function(*on_one_device(a, b))

    return operator


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda ctx, *terms: functools.reduce(function, on_one_device(*terms))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _modulo(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
    a, b = on_one_device(a, b)
    return torch.fmod(a, b) if ctx.get("fmod", 0) else torch.remainder(a, b)


def _where(ctx: Context, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    condition, a, b = on_one_device(condition, a, b)
    return torch.where(condition, a, b)


def _gemm(ctx: Context, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = (a.T if ctx.get("transA", 0) else a) @ (b.T if ctx.get("transB", 0) else b)
    product = product if ctx.get("alpha", 1.0) == 1.0 else ctx.get("alpha") * product
    return product if c is None else product + (c if ctx.get("beta", 1.0) == 1.0 else ctx.get("beta") * c)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def operator(ctx: Context, x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = axes_of(ctx, axes, x.ndim)
        if not dims and ctx.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(dims or range(x.ndim)), bool(ctx.get("keepdims", 1)))

    return operator


def _product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _arg_max(ctx: Context, x: Tensor) -> Tensor:
    if ctx.get("select_last_index", 0):
        raise ctx.unsupported("select_last_index=1")
    return x.argmax(ctx.get("axis", 0), keepdim=bool(ctx.get("keepdims", 1)))


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf, "Softplus": F.softplus,
    "Softsign": F.softsign, "Mish": F.mish, "HardSwish": F.hardswish, "Sqrt": torch.sqrt, "Exp": torch.exp,
    "Log": torch.log, "Neg": torch.neg, "Abs": torch.abs, "Reciprocal": torch.reciprocal, "Floor": torch.floor,
    "Ceil": torch.ceil, "Round": rounded_through, "Sign": torch.sign, "Sin": torch.sin, "Cos": torch.cos,
    "Not": torch.logical_not, "Identity": lambda x: x, "Size": lambda x: torch.tensor(x.numel()),
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": _divide, "Pow": torch.pow, "MatMul": torch.matmul,
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip

ARITHMETIC: dict[str, Operator] = {
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
    "LeakyRelu": lambda ctx, x: F.leaky_relu(x, ctx.get("alpha", 0.01)),
    "ThresholdedRelu": lambda ctx, x: torch.where(x > ctx.get("alpha", 1.0), x, 0.0),
    "PRelu": _prelu,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Elu": lambda ctx, x: F.elu(x, ctx.get("alpha", 1.0)),
    "Celu": lambda ctx, x: F.celu(x, ctx.get("alpha", 1.0)),
    "Selu": _selu,
    "Gelu": lambda ctx, x: F.gelu(x, approximate=ctx.get("approximate", "none")),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    **{name: _binary(function) for name, function in _BINARY.items()},
    "Mod": _modulo,
    "Where": _where,
    "Min": _variadic(torch.minimum),
    "Max": _variadic(torch.maximum),
    "Sum": _variadic(torch.add),
    "Mean": lambda ctx, *terms: functools.reduce(torch.add, terms) / len(terms),
    "Gemm": _gemm,
    "Einsum": lambda ctx, *terms: torch.einsum(ctx.get("equation"), *terms),
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
    "ArgMin": lambda ctx, x: _arg_max(ctx, -x),
}  # fmt: skip
