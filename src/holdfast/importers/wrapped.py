"""A user's network as a module for images in [0, 1]: its preprocessing moves inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, type_of
from ..outputs import IN_OWN_DTYPE, Model, as_outputs, ask, own_dtype
from ..user_input import of_type, typed, whole
from .layout import FileNetwork, arrange, check_layout
from .python_code import user_code_errors


@typed
def wrap(
    model: Model,
    *,
    input_range: Sequence[float] = (0.0, 1.0),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    input_layout: str = "",
    output: str | int = "",
    class_order: Sequence[int] = (),
) -> Wrapped:
    """Wrap a network in memory as a module that takes images in [0, 1].

    The network receives ``(low + (high - low) x - mean) / std``, laid out as it expects. It keeps its mode, training or
    eval. A file whose input are integers, such as uint8, gets their whole range where ``input_range`` is the default.
    One that is float64 or half precision throughout is asked in that type, and its logits are converted back; ``notes``
    says so.

    Args:
        model: a torch module, or any function from images to logits.
        input_range: (low, high), the pixel range that the network expects before mean and std; low < high.
        mean: one number per channel, or one for all; empty for none.
        std: as many numbers as ``mean``, each > 0.
        input_layout: nchw, nhwc, flat or flat-nhwc, see ``layout.arrange``; "" for what the shape of an ONNX or
            torch.export file leaves, and nchw for other networks.
        output: which entry of the network's answer holds the logits, by name or number; "" where there is no choice.
        class_order: the numbers of all logits in the order of the data's classes, then those of other classes; empty
            where they agree.

    Returns:
        The module.

    Raises:
        UserError: ``model`` cannot be called, or the numbers are refused as by ``ModelSource``.

    >>> net = wrap(lambda x: x.flatten(1), input_range=(-1.0, 1.0))
    >>> net(torch.tensor([[0.0, 0.5, 1.0]]))
    tensor([[-1.,  0.,  1.]])
    """
    if not callable(model):
        raise UserError(f"model must be a torch module or a function from images to logits, got {type_of(model)}.")
    return Wrapped(
        model,
        *check_preprocessing(input_range, mean, std),
        check_layout(input_layout),
        output,
        check_order(class_order),
    )


class Wrapped(nn.Module):
    """A network with its preprocessing inside; ``wrap`` makes it.

    (N, C, H, W) in [0, 1] -> what ``inner`` returns. The numbers are buffers: they move with the module and are part
    of its identity. An error of the network becomes a UserError with file and line. With an output, a class order or a
    type of its own it returns Outputs.

    Args:
        inner: the network; a torch module becomes a child.
        input_range: (low, high) of the pixels that ``inner`` expects.
        mean: numbers per channel, or empty.
        std: numbers per channel, or empty.
        input_layout: a layout of ``layout.LAYOUTS``, or "".
        output: the entry of the answer that holds the logits, or "".
        class_order: the numbers of all logits in the order of the data's classes, or empty.
    """

    input_range: Tensor | None
    mean: Tensor | None
    std: Tensor | None

    class_order: Tensor | None

    def __init__(
        self,
        inner: Model,
        input_range: tuple[float, float],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        input_layout: str = "",
        output: str | int = "",
        class_order: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.inner, self.input_layout, self.output = inner, input_layout, output
        self.dtype: torch.dtype | None = None  # the network's own, once it has refused that of the images
        own = own_dtype(inner)
        self.notes: tuple[str, ...] = (IN_OWN_DTYPE.format(own),) if own else ()
        self.register_buffer("class_order", torch.tensor(class_order) if class_order else None)
        if isinstance(inner, FileNetwork) and inner.integer_range and input_range == (0.0, 1.0):
            input_range = (float(inner.integer_range[0]), float(inner.integer_range[1]))
        self.register_buffer("input_range", None if input_range == (0.0, 1.0) else torch.tensor(input_range))
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1) if mean else None)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1) if std else None)
        self.training = inner.training if isinstance(inner, nn.Module) else False

    def forward(self, x: Tensor) -> Any:
        """(N, C, H, W) in [0, 1] -> what the network returns."""
        if self.input_range is not None:
            x = self.input_range[0] + (self.input_range[1] - self.input_range[0]) * x
        if self.mean is not None and self.std is not None:
            if x.ndim != 4 or len(self.mean) not in (1, x.shape[1]):
                raise UserError(
                    f"mean and std have {len(self.mean)} numbers, one per channel, but the images have the shape "
                    f"{tuple(x.shape)}: give as many numbers as there are channels, or one for all."
                )
            x = (x - self.mean) / self.std
        x = self.arrange(x)
        with user_code_errors("the network"):
            answer, self.dtype = ask(self.inner, x, self.dtype, self.output)
        if self.class_order is not None:
            out = as_outputs(answer)
            if out.logits.shape[1] != len(self.class_order):
                raise UserError(
                    f"{len(self.class_order)} classes are named, but the network returns {out.logits.shape[1]} logits: "
                    "name each logit, in order."
                )
            answer = out._replace(logits=out.logits[:, self.class_order], distances=None)
        return answer

    def arrange(self, x: Tensor) -> Tensor:
        """Lay the images out as the network expects them."""
        known = self.inner.input_shape if isinstance(self.inner, FileNetwork) else None
        return arrange(x, self.input_layout, known)

    def train(self, mode: bool = True) -> Wrapped:
        """Set the mode. An exported program refuses ``train``: of its modules only the flags are set."""
        self.training = mode
        for child in self.children():
            try:
                child.train(mode)
            except RuntimeError:
                for module in child.modules():
                    module.training = mode
        return self


def check_order(class_order: Sequence[int]) -> tuple[int, ...]:
    """Check that an order of logits names each of them once. Raises UserError.

    >>> check_order([1, 0])
    (1, 0)
    """
    of_type("class_order", class_order, Sequence)
    order = tuple(whole("class_order", place) for place in class_order)
    if sorted(order) != list(range(len(order))):
        raise UserError(f"class_order must hold the number of each logit once, got {order}.")
    return order


def check_preprocessing(
    input_range: Sequence[float], mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, float], tuple[float, ...], tuple[float, ...]]:
    """Check the numbers of a network's preprocessing, and return them as tuples of floats.

    Raises:
        UserError: a number is not finite, the range is empty, a std is not positive, or mean and std differ in length.
    """
    try:
        input_range, mean, std = (tuple(float(value) for value in values) for values in (input_range, mean, std))
    except (TypeError, ValueError):
        raise UserError(
            f"input_range, mean and std must be lists of numbers, got {input_range}, {mean}, {std}."
        ) from None
    if not all(math.isfinite(value) for value in (*input_range, *mean, *std)):
        raise UserError(f"input_range, mean and std must be finite, got {input_range}, {mean} and {std}.")
    if len(input_range) != 2 or input_range[0] >= input_range[1]:
        raise UserError(f"input_range must be the lowest and the highest pixel value, low < high, got {input_range}.")
    mean, std = mean or (0.0,) * len(std), std or (1.0,) * len(mean)  # one alone leaves the other as it is
    if len(mean) != len(std):
        raise UserError(f"mean and std must have as many numbers as each other, got {len(mean)} and {len(std)}.")
    if any(value <= 0 for value in std):
        raise UserError(f"std must be > 0, got {std}.")
    return (input_range[0], input_range[1]), mean, std
