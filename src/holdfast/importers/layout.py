"""How images are laid out for a network: channels first or last, flat, with or without an axis for the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import UserError, unknown

LAYOUTS = ("nchw", "nhwc", "flat", "flat-nhwc")


class FileNetwork(nn.Module):
    """A network from a file that says which input it takes.

    Attributes:
        input_shape: the shape of its input, None for a size that the file leaves open; None where it says nothing.
        integer_range: (low, high) of an input of integers; None for floats.
    """

    input_shape: tuple[int | None, ...] | None = None
    integer_range: tuple[int, int] | None = None


def check_layout(layout: str) -> str:
    """Return the layout. Raises UserError unless it is one of LAYOUTS, or "" for what the file's shape leaves."""
    if layout and layout not in LAYOUTS:
        raise unknown("input layout", str(layout), LAYOUTS)
    return layout


def arrange(x: Tensor, layout: str, input_shape: Sequence[int | None] | None = None) -> Tensor:
    """Lay images out as a network expects them.

    Args:
        x: (N, C, H, W); anything else passes unchanged.
        layout: nchw; nhwc; flat, channel by channel as PyTorch flattens; flat-nhwc, pixel by pixel as TensorFlow does;
            or "": the one that ``input_shape`` leaves, and nchw where nothing is known.
        input_shape: the shape of the network's input, None for an open size. Its first axis is the batch if the others
            hold an image; else the network takes one image at a time.

    Returns:
        (N, ...), an image being laid out as ``input_shape[1:]``, or as ``input_shape`` for one image at a time.

    Raises:
        UserError: the layout does not fit the shape, or an image of several channels can be flattened in two ways.

    >>> import torch
    >>> x = torch.zeros(5, 3, 8, 9)
    >>> arrange(x, "flat").shape, arrange(x, "", (1, 8, 9, 3)).shape, arrange(x[:, :1], "", (72, 1)).shape
    (torch.Size([5, 216]), torch.Size([5, 8, 9, 3]), torch.Size([5, 72, 1]))
    """
    if x.ndim != 4:
        return x
    channels, height, width = x.shape[1:]
    flat = (math.prod(x.shape[1:]),)
    dims = {"nchw": (channels, height, width), "nhwc": (height, width, channels), "flat": flat, "flat-nhwc": flat}
    if input_shape is None:
        return _laid_out(x, layout or "nchw", dims[layout or "nchw"])
    for sizes in (tuple(input_shape[1:]), tuple(input_shape)):
        shapes = {name: _filled(dims[name], sizes) for name in ([layout] if layout else LAYOUTS)}
        fitting = [name for name, shape in shapes.items() if shape is not None]
        if not fitting:
            continue
        if fitting == ["flat", "flat-nhwc"] and channels > 1:
            raise UserError(
                f"the network takes {flat[0]} numbers, and images of {channels} x {height} x {width} can be flattened "
                "in two orders: give the input layout flat (channel by channel, as PyTorch flattens) or flat-nhwc "
                "(pixel by pixel, as TensorFlow does)."
            )
        return _laid_out(x, fitting[0], shapes[fitting[0]] or ())
    if not layout:
        return x  # the network names the shapes
    takes = " x ".join("any" if size is None else str(size) for size in input_shape)
    raise UserError(
        f"the input layout {layout} makes {' x '.join(map(str, dims[layout]))} of an image, and the network's input is "
        f"{takes}: give another layout, or leave it out."
    )


def _laid_out(x: Tensor, layout: str, shape: Sequence[int]) -> Tensor:
    x = x.permute(0, 2, 3, 1) if layout.endswith("nhwc") else x
    return x if tuple(x.shape[1:]) == tuple(shape) else x.reshape(len(x), *shape)


def _filled(dims: Sequence[int], sizes: Sequence[int | None]) -> tuple[int, ...] | None:
    """The shape of an image of these dimensions in an input of these sizes; None where it has no place."""
    if len(sizes) == len(dims) and all(size in (None, dim) for size, dim in zip(sizes, dims, strict=True)):
        return tuple(dims)
    known = tuple(size for size in sizes if size is not None)
    if len(known) == len(sizes) and [size for size in known if size != 1] == [dim for dim in dims if dim != 1]:
        return known
    return None
