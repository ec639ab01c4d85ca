"""The graph of an ONNX file as a torch module with gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...outputs import out_of_memory
from .arithmetic import ARITHMETIC
from .node import Context, Node, Operator, PassSettings
from .resize import RESIZE
from .shapes import SHAPES

OPERATORS: dict[str, Operator] = {**ARITHMETIC, **SHAPES, **RESIZE}
READ_ON_CPU = (("Resize", 1), ("Resize", 2), ("Upsample", 1), ("Pad", 2))  # inputs read as sizes: they stay on the CPU


class OnnxNet(nn.Module):
    """The graph of an ONNX file: (N, ...) images -> its first output, without axes of size 1 after the classes.

    Attributes:
        input_shape: shape of a batch, None where the file leaves a size open.
        last_operator: the operator that makes the output.
        path: the file, "" for a network that was not read from one; output_of_file: the name of its first output.
        softmax_removed: whether that was a Softmax, left out.
        batching: how a batch of another size than the file's is computed: "as exported"; "rescaled" (constants of
            Reshape and Expand that hold the file's batch size hold the actual one); or "chunks" (as many images at a
            time as the file says).
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        constants: dict[str, Tensor],
        ends: tuple[str, str],
        input_shape: tuple[int | None, ...],
    ) -> None:
        super().__init__()
        self.input_name, self.output_name = ends
        self.input_shape = input_shape
        self.path, self.output_of_file = "", ""
        self.last_operator, self.softmax_removed, self.batching = "", False, "as exported"
        self.nodes = _with_last_use(nodes, self.output_name)
        self.plain_constants: dict[str, Tensor] = {}
        self.buffer_of: dict[str, str] = {}
        uses = {name: [] for name in constants}  # type: dict[str, list[tuple[str, int]]]
        for node in nodes:
            for position, name in enumerate(node.input_names):
                uses.get(name, []).append((node.op, position))
        for name, tensor in constants.items():
            if not uses[name]:
                continue
            if tensor.is_floating_point() and not all(use in READ_ON_CPU for use in uses[name]):
                buffer = re.sub(r"\W", "_", name) or "constant"
                while hasattr(self, buffer):
                    buffer += "_"
                self.register_buffer(buffer, tensor.contiguous())
                self.buffer_of[name] = buffer
            else:
                self.plain_constants[name] = tensor

    def forward(self, x: Tensor) -> Tensor:
        """Compute the first output, for a classifier the logits.

        Args:
            x: (N, ...) images as the file expects them.

        Returns:
            The output, (N, K) for a classifier.

        Raises:
            UserError: the images have another shape, or a node cannot be computed on them.
        """
        expected = self.input_shape
        if x.ndim != len(expected) or any(e not in (None, s) for s, e in zip(x.shape[1:], expected[1:], strict=True)):
            sizes = " x ".join("any" if size is None else str(size) for size in expected[1:])
            raise UserError(f"the ONNX network takes images of {sizes}, got {' x '.join(map(str, x.shape[1:]))}.")
        n, b = len(x), self.input_shape[0] or 1
        if self.batching != "chunks" or n == b:
            return self._compute(x, (n, b) if self.batching == "rescaled" and n != b else None)
        outputs = []
        for chunk in x.split(b):
            full = torch.cat([chunk, chunk[-1:].expand(b - len(chunk), *chunk.shape[1:])])
            outputs.append(self._compute(full, None)[: len(chunk)])
        return torch.cat(outputs)

    def _compute(self, x: Tensor, batch: tuple[int, int] | None) -> Tensor:
        settings = PassSettings(x.dtype, x.device, batch)
        values = {"": None, self.input_name: x, **self.plain_constants}  # type: dict[str, Tensor | None]
        values |= {name: getattr(self, buffer) for name, buffer in self.buffer_of.items()}
        for node in self.nodes:
            compute_node(node, settings, values)
        out = values[self.output_name]
        if not isinstance(out, Tensor):
            raise UserError("the ONNX network has no output: the file is damaged.")
        return out.flatten(1) if out.ndim > 2 and all(size == 1 for size in out.shape[2:]) else out


def compute_node(node: Node, settings: PassSettings, values: dict[str, Tensor | None]) -> None:
    """Compute one node, and forget the values that no later node needs.

    Args:
        node: the node.
        settings: the forward pass.
        values: by name; changed in place.

    Raises:
        UserError: an input is missing, or the operator fails on these shapes.
    """
    try:
        result = OPERATORS[node.op](Context(node, settings), *[values[name] for name in node.input_names])
    except KeyError as error:
        raise UserError(f"the node '{node.name}' needs {error}, which no node makes: the file is damaged.") from None
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        shapes = ", ".join(str(tuple(v.shape)) for name in node.input_names if (v := values.get(name)) is not None)
        raise UserError(
            f"{node.op} (node '{node.name}') cannot be computed on inputs of shape {shapes}: "
            f"{type(error).__name__}: {error}"
        ) from error
    outputs = result if isinstance(result, tuple) else (result,)
    values.update(zip(node.output_names, outputs, strict=False))  # a further output is missed by the node that needs it
    for name in node.last_use:
        values.pop(name, None)


def _with_last_use(nodes: Sequence[Node], output: str) -> list[Node]:
    """The nodes, each with the names of the values that no later node needs."""
    needed_later, marked = {output}, []
    for node in reversed(nodes):
        names = dict.fromkeys([*node.input_names, *node.output_names])
        marked.append(replace(node, last_use=tuple(name for name in names if name and name not in needed_later)))
        needed_later |= set(names)
    return marked[::-1]
