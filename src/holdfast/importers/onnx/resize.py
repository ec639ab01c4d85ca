"""ONNX's Resize and Upsample, nearest or linear, one axis after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .node import Context, Operator, integers, limited


def _coordinates(ctx: Context, n: int, out: int, scale: float) -> Tensor:
    """(out,) input coordinates of ``out`` output pixels among n, in float32 as onnxruntime computes them."""
    steps = torch.arange(out, dtype=torch.float32)
    mode = ctx.get("coordinate_transformation_mode", "half_pixel")
    if ctx.node.opset < 11 or mode == "asymmetric":
        return steps / scale
    if mode == "align_corners":
        return steps * ((n - 1) / (out - 1)) if out > 1 else steps
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and out > 1):
        return (steps + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return steps
    raise ctx.unsupported(f"coordinate_transformation_mode {mode}")


def _nearest(ctx: Context, coordinates: Tensor, scale: float) -> Tensor:
    mode = ctx.get("nearest_mode", "round_prefer_floor")
    if ctx.node.opset < 11:
        mode = "ceil" if scale < 1 else "floor"
    if mode == "round_prefer_floor":
        return (coordinates - 0.5).ceil()
    if mode == "round_prefer_ceil":
        return (coordinates + 0.5).floor()
    return coordinates.ceil() if mode == "ceil" else coordinates.floor()


def _resize_axis(ctx: Context, x: Tensor, axis: int, out: int, scale: float) -> Tensor:
    n = x.shape[axis]
    limited([x.numel() // max(n, 1), out])
    coordinates = _coordinates(ctx, n, out, scale)
    if ctx.get("mode", "nearest") == "nearest":
        return x.index_select(axis, _nearest(ctx, coordinates, scale).long().clamp(0, n - 1).to(x.device))
    coordinates = coordinates.clamp(0, n - 1)
    low = coordinates.long()
    weight = (coordinates - low).to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis))
    high = (low + 1).clamp(max=n - 1)
    return (1 - weight) * x.index_select(axis, low.to(x.device)) + weight * x.index_select(axis, high.to(x.device))


def _resize(ctx: Context, x: Tensor, *inputs: Tensor | None) -> Tensor:
    old = ctx.node.op == "Upsample" or ctx.node.opset < 11
    scales, sizes = ((*inputs, None)[0], None) if old else (*inputs, None, None, None)[1:3]  # roi comes first
    if ctx.get("mode", "nearest") not in ("nearest", "linear", "bilinear"):
        raise ctx.unsupported(f"mode {ctx.get('mode')}")
    for name, default in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch")):
        if ctx.get(name, default) != default:
            raise ctx.unsupported(f"{name}={ctx.get(name)}")
    axes = [axis % x.ndim for axis in ctx.get("axes", range(x.ndim))]
    if sizes is not None and sizes.numel():
        outs = integers(sizes)
        factors = [out / x.shape[axis] for axis, out in zip(axes, outs, strict=True)]
    else:
        factors = ctx.get("scales") if scales is None else scales.tolist()
        outs = [math.floor(x.shape[axis] * factor) for axis, factor in zip(axes, factors, strict=True)]
    if ctx.settings.batch is not None and axes[0] == 0:  # the file resizes its own batch axis: keep ours
        outs[0], factors[0] = x.shape[0], 1.0
    for axis, out, factor in zip(axes, outs, factors, strict=True):
        if out != x.shape[axis] or factor != 1.0:
            x = _resize_axis(ctx, x, axis, out, factor)
    return x


RESIZE: dict[str, Operator] = {"Resize": _resize, "Upsample": _resize}
