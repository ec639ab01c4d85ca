"""A node of an ONNX graph, the context in which it is computed, and helpers that operators share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UserError

FLOATS = (1, 10, 11, 16)  # onnx's numbers for float32, float16, float64 and bfloat16
MOST_VALUES = 2**30  # of a tensor that a file asks for by its size alone: 4 GB
# Its numbers for the integers that quantisation uses: their type says where they saturate. All others are int64 here.
INTEGERS = {2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16}


@dataclass(frozen=True)
class Node:
    """One operation of the graph.

    Args:
        op: operator name, with its domain unless that is ONNX's own.
        name: the node's name, for errors.
        input_names: of the values that it reads; "" for an optional input left out.
        output_names: of the values that it makes.
        attributes: as in the file; tensors as torch tensors.
        opset: version of the operator set that the file uses.
        constant_inputs: positions of the inputs that are constants.
        last_use: names of the values that no later node needs.
    """

    op: str
    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 0
    constant_inputs: frozenset[int] = frozenset()
    last_use: tuple[str, ...] = ()


class PassSettings(NamedTuple):
    """What all nodes of one forward pass share.

    Args:
        dtype: dtype of the floats.
        device: where the images are.
        batch: (n, b) where n images came and the file's constants assume b; None where no constant is rescaled.
        n: how many images came.
        quantised: whether the graph holds quantised operators: sums of products are then computed in float64 and
            rounded once, so that no activation near a rounding boundary depends on the batch.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    batch: tuple[int, int] | None = None
    n: int = 1
    quantised: bool = False


class Context(NamedTuple):
    """What an operator computes on, beside its inputs.

    Args:
        node: the node.
        settings: the forward pass.
    """

    node: Node
    settings: PassSettings

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the node."""
        return self.node.attributes.get(name, default)

    def unsupported(self, what: str) -> UserError:
        """The error for a form of the operator that is not converted."""
        return UserError(
            f"{self.node.op} (node '{self.node.name}') with {what} is not converted by holdfast. Export the model "
            "without it, or give the model as mymodel.py:build."
        )


Operator = Callable[..., Tensor | tuple[Tensor, ...]]  # (context, *inputs) -> output, or a tuple of outputs


def limited(sizes: Iterable[int], what: str = "a tensor") -> None:
    """Refuse a size that a file asks for before memory is taken for it. Raises UserError."""
    if (values := math.prod(sizes)) > MOST_VALUES:
        raise UserError(f"{what} of {values:,} values is asked for: at most {MOST_VALUES:,} are made. Is it damaged?")


def integers(values: Tensor | Sequence[int] | None) -> list[int]:
    """An input or an attribute as a list of integers; [] for None."""
    if values is None:
        return []
    return [int(value) for value in (values.reshape(-1).tolist() if isinstance(values, Tensor) else values)]


def axes_of(ctx: Context, axes: Tensor | None, ndim: int) -> list[int]:
    """Non-negative axes, from an input or, in older opsets, from the attribute."""
    return [axis % ndim for axis in integers(ctx.get("axes") if axes is None else axes)]


def on_one_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Move tensors on the CPU to the device of the others."""
    device = next((x.device for x in tensors if x.device.type != "cpu"), None)
    return tensors if device is None else tuple(x.to(device) for x in tensors)
