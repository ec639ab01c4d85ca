"""The graph of an ONNX file as a torch module with gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import UserError
from ...outputs import out_of_memory
from ...straight_through import rounded_through
from ..layout import FileNetwork
from .arithmetic import ARITHMETIC
from .node import Context, Node, Operator, PassSettings
from .quantized import QUANTIZED
from .resize import RESIZE
from .shapes import SHAPES

OPERATORS: dict[str, Operator] = {**ARITHMETIC, **SHAPES, **RESIZE, **QUANTIZED}
# In a quantised graph these sums are computed in float64, and rounded once.
_SUMS = {
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum",
}  # fmt: skip
READ_ON_CPU = (("Resize", 1), ("Resize", 2), ("Upsample", 1), ("Pad", 2))  # inputs read as sizes: they stay on the CPU


class OnnxNet(FileNetwork):
    """The graph of an ONNX file: (N, ...) images -> its first output, without axes of size 1 after the classes.

    An input of integers, such as uint8, takes floats in their range and rounds them. The gradient passes straight
    through this rounding, and through that of quantised operators: see ``quantized``.

    Attributes:
        input_shape: shape of the input, None where the file leaves a size open; None where it gives no shape. Its first
            axis is the batch; images with one axis more go through one at a time, for a graph without a batch axis.
        integer_range: (low, high) of an input of integers; None for floats.
        quantised: whether the graph holds quantised operators.
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
        input_shape: tuple[int | None, ...] | None,
        integer_range: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.input_name, self.output_name = ends
        self.input_shape, self.integer_range = input_shape, integer_range
        self.quantised = any(node.op in QUANTIZED for node in nodes)
        self.vectorised: bool | None = None  # whether vmap answers as single images do; None: not tried yet
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
        expected = self.input_shape or (None,) * x.ndim
        single = x.ndim == len(expected) + 1  # the graph has no axis for the batch
        sizes, got = (expected, x.shape[1:]) if single else (expected[1:], x.shape[1:])
        if len(sizes) != len(got) or any(e not in (None, s) for s, e in zip(got, sizes, strict=True)):
            wanted = " x ".join("any" if size is None else str(size) for size in sizes)
            raise UserError(f"the ONNX network takes images of {wanted}, got {' x '.join(map(str, got))}.")
        if self.integer_range is not None:
            x = rounded_through(x).clamp(*self.integer_range)
        if single:
            return self._one_at_a_time(x)
        n, b = len(x), expected[0] or 1
        if self.batching != "chunks" or n == b:
            return self._compute(x, (n, b) if self.batching == "rescaled" and n != b else None)
        outputs = []
        for chunk in x.split(b):
            full = torch.cat([chunk, chunk[-1:].expand(b - len(chunk), *chunk.shape[1:])])
            outputs.append(self._compute(full, None)[: len(chunk)])
        return torch.cat(outputs)

    def _one_at_a_time(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, K) for a graph without a batch axis: all at once by vmap, where that answers the same."""

        def one(image: Tensor) -> Tensor:
            return self._compute(image, None, images=1).reshape(-1)

        if self.vectorised is None:
            with torch.no_grad():
                separate = torch.stack([one(image) for image in x[:2]])
                try:
                    together = torch.vmap(one)(x[:2])
                    scale = float(separate.nan_to_num(0.0, 0.0, 0.0).abs().max())
                    self.vectorised = torch.allclose(together, separate, 1e-4, 1e-5 * scale, equal_nan=True)
                except (RuntimeError, ValueError):  # a shape that depends on values, or an operator that vmap lacks
                    self.vectorised = False
        return torch.vmap(one)(x) if self.vectorised else torch.stack([one(image) for image in x])

    def _compute(self, x: Tensor, batch: tuple[int, int] | None, images: int | None = None) -> Tensor:
        n = len(x) if images is None else images
        settings = PassSettings(x.dtype, x.device, batch, n, self.quantised)
        values = {"": None, self.input_name: x, **self.plain_constants}  # type: dict[str, Tensor | None]
        values |= {name: getattr(self, buffer) for name, buffer in self.buffer_of.items()}
        for node in self.nodes:
            compute_node(node, settings, values)
        out = values[self.output_name]
        if not isinstance(out, Tensor):
            raise UserError("the ONNX network has no output: the file is damaged.")
        out = out.to(x.dtype)  # sums of int32 are float64 here
        if out.ndim == 1 and n == 1:  # a graph for one image may answer (K,)
            return out[None]
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
        inputs = [values[name] for name in node.input_names]
        exact = settings.quantised and node.op in _SUMS
        if exact:
            inputs = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
        result = OPERATORS[node.op](Context(node, settings), *inputs)
        if exact and isinstance(result, Tensor):
            result = result.to(settings.dtype)
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
