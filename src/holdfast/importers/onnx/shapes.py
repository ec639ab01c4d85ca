"""ONNX operators that rearrange tensors, and those that make and read shapes and constants."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .node import FLOATS, INTEGERS, Context, Operator, axes_of, integers, limited, on_one_device


def _reshape(ctx: Context, x: Tensor, shape: Tensor | None = None) -> Tensor:
    size = integers(ctx.get("shape") if shape is None else shape)
    if not ctx.get("allowzero", 0):
        size = [x.shape[axis] if length == 0 else length for axis, length in enumerate(size)]
    constant = shape is None or 1 in ctx.node.constant_inputs
    if ctx.settings.batch is not None and constant and size and size[0] > 0:
        n, b = ctx.settings.batch
        size[0] = size[0] * n // b  # the file holds the number of rows that b images make
    return x.reshape(size)


def _flatten(ctx: Context, x: Tensor) -> Tensor:
    axis = ctx.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(ctx: Context, x: Tensor) -> Tensor:
    return x.permute(ctx.get("perm", list(range(x.ndim))[::-1]))


def _concat(ctx: Context, *inputs: Tensor) -> Tensor:
    axis, parts = ctx.get("axis", 1), list(on_one_device(*inputs))
    if ctx.settings.batch is not None and axis % parts[0].ndim:  # a constant for one image, beside n images
        n = max(len(part) for part in parts)
        parts = [part.expand(n, *part.shape[1:]) if len(part) == 1 else part for part in parts]
    return torch.cat(parts, axis)


def _split(ctx: Context, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = ctx.get("axis", 0)
    lengths = integers(ctx.get("split") if sizes is None else sizes)
    return x.split(lengths or math.ceil(x.shape[axis] / len(ctx.node.output_names)), axis)


def _slice(
    ctx: Context,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = (integers(ctx.get(k) if v is None else v) for k, v in (("starts", starts), ("ends", ends)))
    dims = axes_of(ctx, axes, x.ndim) or list(range(len(first)))
    for dim, start, end, step in zip(dims, first, last, integers(steps) or [1] * len(first), strict=True):
        rows = range(*slice(start, end, step).indices(x.shape[dim]))
        if step > 0:
            x = x[(slice(None),) * dim + (slice(rows.start, max(rows.start, rows.stop), step),)]
        else:
            x = x.index_select(dim, torch.tensor(list(rows), dtype=torch.int64, device=x.device))
    return x


def _gather(ctx: Context, x: Tensor, index: Tensor) -> Tensor:
    axis = ctx.get("axis", 0) % x.ndim
    index = index.to(x.device, torch.int64)
    index = torch.where(index < 0, index + x.shape[axis], index)
    rows = x.index_select(axis, index.reshape(-1))
    return rows.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _squeeze(ctx: Context, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(ctx, axes, x.ndim) or [dim for dim, size in enumerate(x.shape) if size == 1]
    return x.reshape([size for dim, size in enumerate(x.shape) if dim not in dims or size != 1])


def _unsqueeze(ctx: Context, x: Tensor, axes: Tensor | None = None) -> Tensor:
    count = len(integers(ctx.get("axes") if axes is None else axes))
    for dim in sorted(axes_of(ctx, axes, x.ndim + count)):
        x = x.unsqueeze(dim)
    return x


def _pad(
    ctx: Context, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    widths = integers(ctx.get("pads", ctx.get("paddings")) if pads is None else pads)
    dims = axes_of(ctx, axes, x.ndim) or list(range(x.ndim))
    mode, half = ctx.get("mode", "constant"), len(widths) // 2
    fill = ctx.get("value", 0.0) if value is None else value.reshape(()).item()
    for dim, before, after in zip(dims, widths[:half], widths[half:], strict=True):
        size = x.shape[dim]
        if not (before or after):
            continue
        if mode == "constant" or (before <= 0 and after <= 0):
            limited([*x.shape[:dim], size + before + after, *x.shape[dim + 1 :]])
            x = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [before, after], value=fill)
            continue
        limited([*x.shape[:dim], size + before + after, *x.shape[dim + 1 :]])
        rows = torch.arange(-before, size + after)
        if mode == "reflect":
            rows = rows.abs() if size > 1 else rows * 0
            rows = size - 1 - (size - 1 - rows % (2 * max(size - 1, 1))).abs()
        else:
            rows = rows % size if mode == "wrap" else rows.clamp(0, size - 1)
        x = x.index_select(dim, rows.to(x.device))
    return x


def _shape(ctx: Context, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[ctx.get("start", 0) : ctx.get("end", x.ndim)], dtype=torch.int64)


def _constant(ctx: Context) -> Tensor:
    for name, value in ctx.node.attributes.items():
        if name in ("value_int", "value_ints"):
            return torch.tensor(value, dtype=torch.int64)
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=ctx.settings.dtype, device=ctx.settings.device)
        if name == "value":
            tensor: Tensor = value
            return tensor
    raise ctx.unsupported(f"the attribute {', '.join(ctx.node.attributes) or 'value missing'}")


def _constant_of_shape(ctx: Context, shape: Tensor) -> Tensor:
    limited(integers(shape))
    value = ctx.get("value")
    if value is None or value.is_floating_point():
        fill = 0.0 if value is None else value.item()
        return torch.full(integers(shape), fill, dtype=ctx.settings.dtype, device=ctx.settings.device)
    return torch.full(integers(shape), value.item(), dtype=value.dtype)


def _cast(ctx: Context, x: Tensor) -> Tensor:
    """A cast between floats does nothing: the whole network has one dtype, which its owner chooses."""
    to = ctx.get("to")
    if to in FLOATS:
        return x.to(ctx.settings.dtype)
    if to == 8:
        raise ctx.unsupported("strings")
    if to == 9:
        return x.to(torch.bool)
    if ctx.settings.quantised and x.is_floating_point():  # whole numbers stay floats: the gradient passes
        return x.detach().double().trunc() + (x - x.detach()).double()
    return x.to(INTEGERS.get(to, torch.int64))


def _cast_like(ctx: Context, x: Tensor, like: Tensor) -> Tensor:
    return x if x.is_floating_point() and like.is_floating_point() else x.to(like.dtype)


def _expand(ctx: Context, x: Tensor, shape: Tensor) -> Tensor:
    size = integers(shape)
    if (
        ctx.settings.batch is not None
        and 1 in ctx.node.constant_inputs
        and len(size) == x.ndim
        and size[0] == ctx.settings.batch[1]
    ):
        size[0] = ctx.settings.batch[0]
    size = list(torch.broadcast_shapes(x.shape, size))
    limited(size)
    return x.expand(size)


def _range(ctx: Context, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    limited([math.ceil(abs((limit.item() - start.item()) / (delta.item() or 1)))])
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def _depth_to_space(ctx: Context, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = ctx.get("blocksize")
    if ctx.get("mode", "DCR") == "DCR":
        x = x.reshape(n, b * b, c // (b * b), h, w).transpose(1, 2).reshape(n, c, h, w)
    return F.pixel_shuffle(x, b)


def _space_to_depth(ctx: Context, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = ctx.get("blocksize")
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


def _tile(ctx: Context, x: Tensor, repeats: Tensor) -> Tensor:
    limited([x.numel(), *integers(repeats)])
    return x.repeat(integers(repeats))


def _dropout(ctx: Context, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x, dtype=torch.bool)


def _one_hot(ctx: Context, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    limited([index.numel(), abs(int(depth.reshape(-1)[0]))])
    classes = torch.arange(int(depth.reshape(-1)[0]), device=index.device)
    axis = ctx.get("axis", -1) % (index.ndim + 1)
    index = torch.where(index < 0, index + len(classes), index).unsqueeze(axis)
    hot = index == classes.reshape([-1 if dim == axis else 1 for dim in range(index.ndim)])
    off, on = values.to(index.device)
    return torch.where(hot, on, off)


def _top_k(ctx: Context, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, ...]:
    count = integers([ctx.get("k")] if k is None else k)[0]
    values, indices = x.topk(count, ctx.get("axis", -1), bool(ctx.get("largest", 1)), bool(ctx.get("sorted", 1)))
    return values, indices


def _gather_elements(ctx: Context, x: Tensor, index: Tensor) -> Tensor:
    axis = ctx.get("axis", 0)
    index = index.to(x.device, torch.int64)
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index))


SHAPES: dict[str, Operator] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "OneHot": _one_hot,
    "TopK": _top_k,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Shape": _shape,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Dropout": _dropout,
}  # fmt: skip
