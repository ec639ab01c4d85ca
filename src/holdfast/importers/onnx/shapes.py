"""ONNX operators that move numbers about, and those that make and read shapes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .node import FLOATS, At, Operator, axes_of, ints, meet


def _reshape(at: At, x: Tensor, shape: Tensor | None = None) -> Tensor:
    wanted = ints(at.get("shape") if shape is None else shape)
    if not at.get("allowzero", 0):
        wanted = [x.shape[k] if size == 0 else size for k, size in enumerate(wanted)]
    if at.run.batch is not None and (shape is None or 1 in at.node.fixed) and wanted and wanted[0] > 0:
        n, b = at.run.batch
        wanted[0] = wanted[0] * n // b  # the file says how many rows b images make
    return x.reshape(wanted)


def _flatten(at: At, x: Tensor) -> Tensor:
    axis = at.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(at: At, x: Tensor) -> Tensor:
    return x.permute(at.get("perm", list(range(x.ndim))[::-1]))


def _concat(at: At, *given: Tensor) -> Tensor:
    axis, parts = at.get("axis", 1), list(meet(*given))
    if at.run.batch is not None and axis % parts[0].ndim:  # a constant of one image beside n of them
        n = max(len(part) for part in parts)
        parts = [part.expand(n, *part.shape[1:]) if len(part) == 1 else part for part in parts]
    return torch.cat(parts, axis)


def _split(at: At, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = at.get("axis", 0)
    given = ints(at.get("split") if sizes is None else sizes)
    return x.split(given or math.ceil(x.shape[axis] / len(at.node.gives)), axis)


def _slice(
    at: At,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = (ints(at.get(k) if v is None else v) for k, v in (("starts", starts), ("ends", ends)))
    dims = axes_of(at, axes, x.ndim) or list(range(len(first)))
    for dim, start, end, step in zip(dims, first, last, ints(steps) or [1] * len(first), strict=True):
        where = range(*slice(start, end, step).indices(x.shape[dim]))
        if step > 0:
            x = x[(slice(None),) * dim + (slice(where.start, max(where.start, where.stop), step),)]
        else:
            x = x.index_select(dim, torch.tensor(list(where), dtype=torch.int64, device=x.device))
    return x


def _gather(at: At, x: Tensor, index: Tensor) -> Tensor:
    axis = at.get("axis", 0) % x.ndim
    index = index.to(x.device, torch.int64)
    index = torch.where(index < 0, index + x.shape[axis], index)
    chosen = x.index_select(axis, index.reshape(-1))
    return chosen.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _squeeze(at: At, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(at, axes, x.ndim) or [dim for dim, size in enumerate(x.shape) if size == 1]
    return x.reshape([size for dim, size in enumerate(x.shape) if dim not in dims or size != 1])


def _unsqueeze(at: At, x: Tensor, axes: Tensor | None = None) -> Tensor:
    count = len(ints(at.get("axes") if axes is None else axes))
    for dim in sorted(axes_of(at, axes, x.ndim + count)):
        x = x.unsqueeze(dim)
    return x


def _pad_any(
    at: At, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    given = ints(at.get("pads", at.get("paddings")) if pads is None else pads)
    dims = axes_of(at, axes, x.ndim) or list(range(x.ndim))
    mode, half = at.get("mode", "constant"), len(given) // 2
    fill = at.get("value", 0.0) if value is None else value.reshape(()).item()
    for dim, before, after in zip(dims, given[:half], given[half:], strict=True):
        size = x.shape[dim]
        if not (before or after):
            continue
        if mode == "constant" or (before <= 0 and after <= 0):
            x = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [before, after], value=fill)
            continue
        where = torch.arange(-before, size + after)
        if mode == "reflect":
            where = where.abs() if size > 1 else where * 0
            where = size - 1 - (size - 1 - where % (2 * max(size - 1, 1))).abs()
        else:
            where = where % size if mode == "wrap" else where.clamp(0, size - 1)
        x = x.index_select(dim, where.to(x.device))
    return x


def _shape(at: At, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[at.get("start", 0) : at.get("end", x.ndim)], dtype=torch.int64)


def _constant(at: At) -> Tensor:
    for name, value in at.node.attributes.items():
        if name in ("value_int", "value_ints"):
            return torch.tensor(value, dtype=torch.int64)
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=at.run.dtype, device=at.run.device)
        if name == "value":
            tensor: Tensor = value
            return tensor
    raise at.refuse(f"the attribute {', '.join(at.node.attributes) or 'value missing'}")


def _constant_of_shape(at: At, shape: Tensor) -> Tensor:
    value = at.get("value")
    if value is None or value.is_floating_point():
        fill = 0.0 if value is None else value.item()
        return torch.full(ints(shape), fill, dtype=at.run.dtype, device=at.run.device)
    return torch.full(ints(shape), value.item(), dtype=value.dtype)


def _cast(at: At, x: Tensor) -> Tensor:
    """Between floats nothing changes: the network has one dtype, and its owner chooses it."""
    if at.get("to") in FLOATS:
        return x if x.is_floating_point() else x.to(at.run.dtype)
    if at.get("to") == 8:
        raise at.refuse("strings")
    return x.to(torch.bool if at.get("to") == 9 else torch.int64)


def _cast_like(at: At, x: Tensor, like: Tensor) -> Tensor:
    return x if x.is_floating_point() and like.is_floating_point() else x.to(like.dtype)


def _expand(at: At, x: Tensor, shape: Tensor) -> Tensor:
    wanted = ints(shape)
    if at.run.batch is not None and 1 in at.node.fixed and len(wanted) == x.ndim and wanted[0] == at.run.batch[1]:
        wanted[0] = at.run.batch[0]
    return x.expand(torch.broadcast_shapes(x.shape, wanted))


def _range(at: At, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def _depth_to_space(at: At, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = at.get("blocksize")
    if at.get("mode", "DCR") == "DCR":
        x = x.reshape(n, b * b, c // (b * b), h, w).transpose(1, 2).reshape(n, c, h, w)
    return F.pixel_shuffle(x, b)


def _space_to_depth(at: At, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = at.get("blocksize")
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


def _tile(at: At, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(ints(repeats))


def _dropout(at: At, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    return x, torch.ones_like(x, dtype=torch.bool)


SHAPING: dict[str, Operator] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad_any,
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
