"""ONNX's Resize and Upsample: one axis after the other, nearest or linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .node import At, Operator, ints


def _places(at: At, n: int, out: int, scale: float) -> Tensor:
    """Where each of ``out`` places lies among n, in float32 as onnxruntime computes it, (out,)."""
    steps = torch.arange(out, dtype=torch.float32)
    way = at.get("coordinate_transformation_mode", "half_pixel")
    if at.node.opset < 11 or way == "asymmetric":
        return steps / scale
    if way == "align_corners":
        return steps * ((n - 1) / (out - 1)) if out > 1 else steps
    if way == "half_pixel" or (way == "pytorch_half_pixel" and out > 1):
        return (steps + 0.5) / scale - 0.5
    if way == "pytorch_half_pixel":
        return steps
    raise at.refuse(f"coordinate_transformation_mode {way}")


def _nearest(at: At, places: Tensor, scale: float) -> Tensor:
    way = at.get("nearest_mode", "round_prefer_floor")
    if at.node.opset < 11:
        way = "ceil" if scale < 1 else "floor"
    if way == "round_prefer_floor":
        return (places - 0.5).ceil()
    if way == "round_prefer_ceil":
        return (places + 0.5).floor()
    return places.ceil() if way == "ceil" else places.floor()


def _resized(at: At, x: Tensor, axis: int, out: int, scale: float) -> Tensor:
    n = x.shape[axis]
    places = _places(at, n, out, scale)
    if at.get("mode", "nearest") == "nearest":
        return x.index_select(axis, _nearest(at, places, scale).long().clamp(0, n - 1).to(x.device))
    places = places.clamp(0, n - 1)
    low = places.long()
    share = (places - low).to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1 - axis))
    high = (low + 1).clamp(max=n - 1)
    return (1 - share) * x.index_select(axis, low.to(x.device)) + share * x.index_select(axis, high.to(x.device))


def _resize(at: At, x: Tensor, *given: Tensor | None) -> Tensor:
    old = at.node.op == "Upsample" or at.node.opset < 11
    scales, sizes = ((*given, None)[0], None) if old else (*given, None, None, None)[1:3]  # roi is before them
    if at.get("mode", "nearest") not in ("nearest", "linear", "bilinear"):
        raise at.refuse(f"mode {at.get('mode')}")
    for name, usual in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch")):
        if at.get(name, usual) != usual:
            raise at.refuse(f"{name}={at.get(name)}")
    axes = [axis % x.ndim for axis in at.get("axes", range(x.ndim))]
    if sizes is not None and sizes.numel():
        outs = ints(sizes)
        factors = [out / x.shape[axis] for axis, out in zip(axes, outs, strict=True)]
    else:
        factors = at.get("scales") if scales is None else scales.tolist()
        outs = [math.floor(x.shape[axis] * factor) for axis, factor in zip(axes, factors, strict=True)]
    if at.run.batch is not None and axes[0] == 0:  # the number of images is nothing to resize
        outs[0], factors[0] = x.shape[0], 1.0
    for axis, out, factor in zip(axes, outs, factors, strict=True):
        if out != x.shape[axis] or factor != 1.0:
            x = _resized(at, x, axis, out, factor)
    return x


RESIZING: dict[str, Operator] = {"Resize": _resize, "Upsample": _resize}
