"""A node of an ONNX graph, where it runs, and what its operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UserError

FLOATS = (1, 10, 11, 16)  # onnx's numbers for float32, float16, float64 and bfloat16


@dataclass(frozen=True)
class Node:
    """One step of the graph, from the values it takes to those it gives.

    fixed: which of the values it takes are constants; drop: what nothing needs after it.
    """

    op: str
    name: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 0
    fixed: frozenset[int] = frozenset()
    drop: tuple[str, ...] = ()


class Run(NamedTuple):
    """What a forward pass has in common. batch: (n, b) where constants of the file speak of b images and n came."""

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    batch: tuple[int, int] | None = None


class At(NamedTuple):
    """Where an operator stands: its node and the run."""

    node: Node
    run: Run

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the node."""
        return self.node.attributes.get(name, default)

    def refuse(self, what: str) -> UserError:
        """The error for a form of the operator that is not converted."""
        return UserError(
            f"{self.node.op} (node '{self.node.name}') with {what} is not converted by holdfast. Export the model "
            "without it, or give the model as mymodel.py:build."
        )


Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def ints(given: Tensor | Sequence[int] | None) -> list[int]:
    """Whole numbers from an input or an attribute; none from None."""
    if given is None:
        return []
    return [int(value) for value in (given.reshape(-1).tolist() if isinstance(given, Tensor) else given)]


def axes_of(at: At, given: Tensor | None, ndim: int) -> list[int]:
    """Axes from an input, or from the attribute of older opsets; none are negative."""
    return [axis % ndim for axis in ints(at.get("axes") if given is None else given)]


def meet(*given: Tensor) -> tuple[Tensor, ...]:
    """All on one device: what the CPU holds follows what is elsewhere."""
    device = next((x.device for x in given if x.device.type != "cpu"), None)
    return given if device is None else tuple(x.to(device) for x in given)
