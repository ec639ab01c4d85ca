"""ONNX operators of quantised networks: integers carried as floats, rounded in the forward pass and passed straight on.

A tensor that the file computes as int8 or uint8 is a float tensor of whole numbers here. Sums of products are exact, as
in int32, so that an answer depends neither on the batch nor on the order of the sum; scales are applied in float32, as
onnxruntime does. In the backward pass rounding counts as the identity, and saturation as a clamp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...straight_through import rounded_through
from .arithmetic import ARITHMETIC
from .node import INTEGERS, Context, Operator

_RANGES = {dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max) for dtype in INTEGERS.values()}
_EXACT = torch.float64  # holds every sum of int32


def _along(ctx: Context, values: Tensor, x: Tensor, axis: int) -> Tensor:
    """One number, one along an axis of x, one per block of that axis, or one per image, so that it broadcasts to x."""
    if values.numel() == 1:
        return values.reshape(())
    if values.ndim == 1:
        return values.reshape([-1 if dim == axis % x.ndim else 1 for dim in range(x.ndim)])
    block = ctx.get("block_size", 0)
    return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis]) if block else values


def _range(ctx: Context, zero_point: Tensor | None) -> tuple[int, int]:
    """(lowest, highest) number of the quantised type. A zero point that the graph computes is always uint8."""
    dtype = INTEGERS.get(ctx.get("output_dtype", 0), torch.uint8 if zero_point is None else zero_point.dtype)
    if dtype in (torch.float32, torch.float64) and zero_point is not None and 2 not in ctx.node.constant_inputs:
        dtype = torch.uint8
    if dtype not in _RANGES or ctx.get("output_dtype", 2) not in INTEGERS:
        raise ctx.unsupported("a quantised type other than int8, uint8, int16 and uint16")
    return _RANGES[dtype]


def _quantize(ctx: Context, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    low, high = _range(ctx, zero_point)
    axis = ctx.get("axis", 1)
    scaled = rounded_through(x.float() / _along(ctx, scale, x, axis).float())
    if zero_point is not None:
        scaled = scaled + _along(ctx, zero_point, x, axis).float()
    return scaled.clamp(low, high).to(ctx.settings.dtype)


def _centred(ctx: Context, q: Tensor, zero_point: Tensor | None, axis: int = 1) -> Tensor:
    """q - zero_point, exactly."""
    q = q.to(_EXACT)
    return q if zero_point is None else q - _along(ctx, zero_point, q, axis).to(_EXACT)


def _dequantize(ctx: Context, q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    axis = ctx.get("axis", 1)
    scaled = _centred(ctx, q, zero_point, axis).float() * _along(ctx, scale, q, axis).float()
    return scaled.to(ctx.settings.dtype)


def _requantize(ctx: Context, total: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Whole numbers, as int32 sums, to the quantised type of the zero point."""
    low, high = _range(ctx, zero_point)
    scaled = rounded_through(total.float() * scale)
    return (scaled + zero_point.float().reshape(())).clamp(low, high).to(ctx.settings.dtype)


def _dynamic_quantize(ctx: Context, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(quantised, scale, zero point), measured image by image: what a batch of one image answers."""
    n = ctx.settings.n
    if n > 1 and len(x) % n == 0:
        rows = x.detach().reshape(n, -1)
        low, high = rows.amin(1).clamp_max(0.0), rows.amax(1).clamp_min(0.0)
        low, high = (side.repeat_interleave(len(x) // n).reshape(-1, *[1] * (x.ndim - 1)) for side in (low, high))
    else:
        low, high = x.detach().amin().clamp_max(0.0), x.detach().amax().clamp_min(0.0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = (-low / scale).clamp(0, 255).round()
    return (rounded_through(x / scale) + zero_point).clamp(0, 255), scale, zero_point


def _sum_of_products(compute: Callable[..., Tensor], a: Tensor, b: Tensor, terms: int) -> Tensor:
    """A product of whole numbers of 8 bits, exact: in float32 where it holds every partial sum, else in float64."""
    if terms * 255 * 255 < 2**24:
        return rounded_through(compute(a.float(), b.float())).to(_EXACT)  # rounded: fast kernels may use fractions
    return compute(a, b)


def _integer_conv(
    ctx: Context, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    x, weight = _centred(ctx, x, x_zero), _centred(ctx, weight, w_zero, 0)
    wide = any(zero is not None and zero.dtype in (torch.uint16, torch.int16) for zero in (x_zero, w_zero))
    terms = 2**24 if wide else weight[0].numel()
    return _sum_of_products(partial(_of_table("Conv"), ctx), x, weight, terms)


def _integer_matmul(
    ctx: Context, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    return _centred(ctx, a, a_zero, -2) @ _centred(ctx, b, b_zero, -1)


def _qlinear_conv(
    ctx: Context, x: Tensor, x_scale: Tensor, x_zero: Tensor, weight: Tensor, w_scale: Tensor, w_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    total = _integer_conv(ctx, x, weight, x_zero, w_zero)
    if bias is not None:
        total = total + bias.to(_EXACT).reshape(-1, *[1] * (total.ndim - 2))
    scale = x_scale.float().reshape(()) * _along(ctx, w_scale.float(), total, 1) / y_scale.float().reshape(())
    return _requantize(ctx, total, scale, y_zero)


def _qlinear_matmul(
    ctx: Context, a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor,
) -> Tensor:  # fmt: skip
    total = _integer_matmul(ctx, a, b, a_zero, b_zero)
    scale = _along(ctx, a_scale.float(), total, -2) * _along(ctx, b_scale.float(), total, -1)
    return _requantize(ctx, total, scale / y_scale.float().reshape(()), y_zero)


def _qgemm(
    ctx: Context, a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor,
    c: Tensor | None = None, y_scale: Tensor | None = None, y_zero: Tensor | None = None,
) -> Tensor:  # fmt: skip
    a = a.T if ctx.get("transA", 0) else a
    b_centred = _centred(ctx, b, b_zero, 0 if ctx.get("transB", 0) else 1)
    total = _centred(ctx, a, a_zero) @ (b_centred.T if ctx.get("transB", 0) else b_centred)
    total = total if c is None else total + c.to(_EXACT)
    scale = ctx.get("alpha", 1.0) * a_scale.float().reshape(()) * _along(ctx, b_scale.float(), total, 1)
    if y_scale is None or y_zero is None:
        return (total.float() * scale).to(ctx.settings.dtype)
    return _requantize(ctx, total, scale / y_scale.float().reshape(()), y_zero)


def _scaled_product(ctx: Context, total: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = (total.float() * scale).to(ctx.settings.dtype)
    return out if bias is None else out + bias


def _matmul_to_float(
    ctx: Context, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_zero: Tensor | None = None,
    b_zero: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    total = _integer_matmul(ctx, a, b, a_zero, b_zero)
    return _scaled_product(ctx, total, _along(ctx, a_scale, total, -2) * _along(ctx, b_scale, total, -1), bias)


def _dynamic_matmul(
    ctx: Context, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    quantised, scale, zero = _dynamic_quantize(ctx, a)
    return _matmul_to_float(ctx, quantised, b, scale, b_scale, zero, b_zero, bias)


def _through_floats(function: Callable[..., Tensor], operands: int = 1) -> Operator:
    """An operator of onnxruntime on ``operands`` quantised tensors: dequantise, compute, quantise."""

    def operator(ctx: Context, *inputs: Tensor) -> Tensor:
        floats = [_one_scale(ctx, *inputs[3 * k : 3 * k + 3]) for k in range(operands)]
        return _quantize_last(ctx, function(ctx, *floats), *inputs[3 * operands : 3 * operands + 2])

    return operator


def _one_scale(ctx: Context, q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Dequantised by one scale, in float64: the operator rounds once, at its end."""
    return _centred(ctx, q, zero_point) * scale.to(_EXACT).reshape(())


def _quantize_last(ctx: Context, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    low, high = (0, 255) if zero_point is None else _RANGES.get(zero_point.dtype, (0, 0))
    if low == high:
        raise ctx.unsupported("a quantised type other than int8, uint8, int16 and uint16")
    scaled = rounded_through((x / scale.to(_EXACT).reshape(())).float())
    return (
        (scaled + (0 if zero_point is None else zero_point.float().reshape(()))).clamp(low, high).to(ctx.settings.dtype)
    )


def _qlinear_concat(ctx: Context, y_scale: Tensor, y_zero: Tensor, *inputs: Tensor) -> Tensor:
    parts = [_one_scale(ctx, *inputs[k : k + 3]) for k in range(0, len(inputs), 3)]
    return _quantize_last(ctx, torch.cat(parts, ctx.get("axis", 1)), y_scale, y_zero)


def _qlinear_where(ctx: Context, condition: Tensor, *inputs: Tensor) -> Tensor:
    a, b = _one_scale(ctx, *inputs[:3]), _one_scale(ctx, *inputs[3:6])
    return _quantize_last(ctx, torch.where(condition.to(a.device), a, b), *inputs[6:8])


def _of_table(name: str) -> Callable[..., Tensor]:
    """An operator of ARITHMETIC with one output."""

    def compute(ctx: Context, *x: Tensor) -> Tensor:
        if ctx.get("channels_last", 0):
            raise ctx.unsupported("channels_last=1")
        out = ARITHMETIC[name](ctx, *x)
        return out[0] if isinstance(out, tuple) else out

    return compute


_MS = "com.microsoft."
QUANTIZED: dict[str, Operator] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "ConvInteger": _integer_conv,
    "MatMulInteger": _integer_matmul,
    f"{_MS}QuantizeLinear": _quantize,
    f"{_MS}DequantizeLinear": _dequantize,
    f"{_MS}QLinearConv": _qlinear_conv,
    f"{_MS}QGemm": _qgemm,
    f"{_MS}MatMulIntegerToFloat": _matmul_to_float,
    f"{_MS}DynamicQuantizeMatMul": _dynamic_matmul,
    f"{_MS}QLinearAdd": _through_floats(_of_table("Add"), 2),
    f"{_MS}QLinearMul": _through_floats(_of_table("Mul"), 2),
    f"{_MS}QLinearConcat": _qlinear_concat,
    f"{_MS}QLinearWhere": _qlinear_where,
    f"{_MS}QLinearGlobalAveragePool": _through_floats(_of_table("GlobalAveragePool")),
    f"{_MS}QLinearAveragePool": _through_floats(_of_table("AveragePool")),
    f"{_MS}QLinearLeakyRelu": _through_floats(_of_table("LeakyRelu")),
    f"{_MS}QLinearSigmoid": _through_floats(_of_table("Sigmoid")),
    f"{_MS}QLinearSoftmax": _through_floats(_of_table("Softmax")),
}
