"""An ONNX file as a torch module with gradients: what an attack needs of a network that was trained elsewhere.

A constant of the file that is a float becomes a buffer, so ``.to(device)``, ``.double()`` and ``state_dict`` work;
what depends on constants alone is computed once, when the file is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...outputs import out_of_memory
from .arithmetic import COMPUTING
from .node import FLOATS, At, Node, Operator, Run
from .resize import RESIZING
from .shapes import SHAPING

OPERATORS: dict[str, Operator] = {**COMPUTING, **SHAPING, **RESIZING}
TAIL = ("Identity", "Reshape", "Flatten", "Squeeze", "Cast")  # what may stand between a last Softmax and the output


class OnnxNet(nn.Module):
    """The graph of an ONNX file: x -> its first output, axes of size 1 after the classes left out.

    input_shape: of a batch, None where the file leaves a size open. ends_in: the operator that makes the output;
    stripped: whether it was a Softmax that is left out. batching: how a number of images that is not the file's is
    answered - "as written", "rescaled" (constants of Reshape and Expand that count the file's images count these), or
    "pieces" (as many images at a time as the file says).
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
        self.ends_in, self.stripped, self.batching = "", False, "as written"
        self.nodes, self.kept, self.buffer_of = _with_drops(nodes, self.output_name), {}, {}
        uses = {name: [] for name in constants}  # type: dict[str, list[tuple[str, int]]]
        for node in nodes:
            for position, name in enumerate(node.takes):
                uses.get(name, []).append((node.op, position))
        for name, tensor in constants.items():
            if not uses[name]:
                continue
            read_by_cpu = all(use in (("Resize", 1), ("Resize", 2), ("Upsample", 1), ("Pad", 2)) for use in uses[name])
            if tensor.is_floating_point() and not read_by_cpu:
                plain = re.sub(r"\W", "_", name) or "constant"
                while hasattr(self, plain):
                    plain += "_"
                self.register_buffer(plain, tensor.contiguous())
                self.buffer_of[name] = plain
            else:
                self.kept[name] = tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) images as the file takes them -> the first output, logits (N, K) of a classifier.

        Raises UserError for images of another shape, and for a node that cannot be computed on them.
        """
        wanted = self.input_shape
        if x.ndim != len(wanted) or any(w not in (None, s) for s, w in zip(x.shape[1:], wanted[1:], strict=True)):
            sizes = " x ".join("any" if size is None else str(size) for size in wanted[1:])
            raise UserError(f"the ONNX network takes images of {sizes}, got {' x '.join(map(str, x.shape[1:]))}.")
        n, b = len(x), self.input_shape[0] or 1
        if self.batching != "pieces" or n == b:
            return self._run(x, (n, b) if self.batching == "rescaled" and n != b else None)
        answers = []
        for piece in x.split(b):
            full = torch.cat([piece, piece[-1:].expand(b - len(piece), *piece.shape[1:])])
            answers.append(self._run(full, None)[: len(piece)])
        return torch.cat(answers)

    def _run(self, x: Tensor, batch: tuple[int, int] | None) -> Tensor:
        run = Run(x.dtype, x.device, batch)
        values = {"": None, self.input_name: x, **self.kept}  # type: dict[str, Tensor | None]
        values |= {name: getattr(self, plain) for name, plain in self.buffer_of.items()}
        for node in self.nodes:
            _step(node, run, values)
        out = values[self.output_name]
        if not isinstance(out, Tensor):
            raise UserError("the ONNX network has no output.")
        return out.flatten(1) if out.ndim > 2 and all(size == 1 for size in out.shape[2:]) else out


def load_onnx(path: str | Path, *, strip_softmax: bool = True) -> OnnxNet:
    """The network of an ONNX file, in eval mode, with gradients with respect to its images.

    path: of a file with one input of floats, images first; half and double precision are read as float32.
    strip_softmax: a Softmax that makes the output is left out, so that the output is logits: argmax is the same, and
    an attack has gradients where probabilities have saturated.

    The first output counts. A file that was exported for one batch size answers any: constants of Reshape that count
    its images are read as counting those that came, where two batches then agree with one of both; elsewhere the
    images go through in pieces of the file's size. That is tried here where the file says how large an image is.

    Raises UserError when the onnx package is missing, the file cannot be read, or it uses what OPERATORS lacks.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("reading an ONNX file needs the onnx package: pip install 'holdfast[onnx]'.") from None
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no ONNX file at {path}.")
    try:
        proto = onnx.load(path)
        if proto.functions:
            from onnx import inliner

            proto = inliner.inline_local_functions(proto)
    except Exception as error:  # protobuf, a missing file of weights, no memory: all a file that cannot be read
        raise UserError(
            f"{path} cannot be read as ONNX ({type(error).__name__}: {error}). It is cut short, damaged, or lacks the "
            "file that holds its weights: export it again."
        ) from None
    net = _convert(proto, path, strip_softmax)
    _choose_batching(net)
    return net.eval()


def _convert(proto: Any, path: Path, strip_softmax: bool) -> OnnxNet:
    graph = proto.graph
    if not graph.node or not graph.output:
        raise UserError(f"{path} holds no network: its graph has {len(graph.node)} nodes. It is damaged: export again.")
    constants = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in constants]
    if len(given) != 1:
        names = ", ".join(value.name for value in given) or "none"
        raise UserError(f"{path} has {len(given)} inputs ({names}); holdfast attacks networks with one, the images.")
    if given[0].type.tensor_type.elem_type not in FLOATS:
        raise UserError(f"the input '{given[0].name}' of {path} holds no floats: export the network without its codec.")
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in given[0].type.tensor_type.shape.dim)
    if len(shape) < 2:
        raise UserError(f"the input '{given[0].name}' of {path} must be a batch of images, its shape is {shape}.")
    opset = max([entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")], default=1)
    output = graph.output[0].name
    nodes = _needed([_node(entry, opset) for entry in graph.node], output)
    _refuse_unknown(nodes, path)
    nodes, last, stripped = _without_softmax(nodes, output, strip=strip_softmax)
    nodes, constants = _folded(nodes, constants, given[0].name)
    if output not in {name for node in nodes for name in node.gives}:
        raise UserError(f"the output '{output}' of {path} does not depend on its input '{given[0].name}'.")
    net = OnnxNet(nodes, constants, (given[0].name, output), shape)
    net.ends_in, net.stripped = last, stripped
    return net


def _tensor(proto: Any) -> Tensor:
    """A tensor of the file: float32, int64 or bool."""
    from onnx import numpy_helper

    try:
        array = numpy_helper.to_array(proto)
    except Exception as error:
        raise UserError(f"the tensor '{proto.name}' cannot be read ({error}): the file is damaged.") from None
    if array.dtype.kind in "SOU":
        raise UserError(f"the tensor '{proto.name}' holds strings, which no image classifier needs.")
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype("int64"))
    return torch.from_numpy(array.astype("bool" if array.dtype.kind == "b" else "float32"))


def _node(proto: Any, opset: int) -> Node:
    import onnx

    attributes = {}
    for entry in proto.attribute:
        value = onnx.helper.get_attribute_value(entry)
        if entry.type == onnx.AttributeProto.TENSOR:
            value = _tensor(value)
        elif isinstance(value, bytes):
            value = value.decode(errors="replace")
        attributes[entry.name] = list(value) if isinstance(value, (list, tuple)) else value
    op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
    name = proto.name or next((name for name in proto.output if name), op)
    outputs = list(proto.output)
    return Node(op, name, tuple(proto.input), tuple(outputs), attributes, opset)


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output depends on, in their order."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.gives):
            kept.append(node)
            wanted |= set(node.takes) - {""}
    return kept[::-1]


def _refuse_unknown(nodes: list[Node], path: Path) -> None:
    count = Counter(node.op for node in nodes if node.op not in OPERATORS)
    if count:
        first = {node.op: node.name for node in reversed(nodes)}
        named = ", ".join(f"{op} (node '{first[op]}'{f' and {n - 1} more' * (n > 1)})" for op, n in count.items())
        raise UserError(
            f"{path} uses operators that holdfast does not convert: {named}. Export the model without them (in float32,"
            " without quantisation, post-processing or control flow), or give it as PyTorch code: mymodel.py:build. "
            f"Known: {', '.join(sorted(OPERATORS))}."
        )


def _without_softmax(nodes: list[Node], output: str, *, strip: bool) -> tuple[list[Node], str, bool]:
    """(nodes, the operator that makes the output, whether it was a Softmax that is now an Identity)."""
    maker = {name: node for node in nodes for name in node.gives}
    uses = Counter(name for node in nodes for name in node.takes)
    node = maker.get(output)
    while node is not None and node.op in TAIL and uses[node.takes[0]] == 1 and node.takes[0] in maker:
        node = maker[node.takes[0]]
    if node is None:
        return nodes, "", False
    over_classes = node.attributes.get("axis", -1 if node.opset >= 13 else 1) in (1, -1)
    if not (strip and node.op == "Softmax" and over_classes):
        return nodes, node.op, False
    plain = replace(node, op="Identity", attributes={})
    return [plain if entry is node else entry for entry in nodes], node.op, True


def _folded(nodes: list[Node], constants: dict[str, Tensor], source: str) -> tuple[list[Node], dict[str, Tensor]]:
    """(nodes that depend on the input, constants): what needs no image is computed, on the CPU."""
    values = {"": None, **constants}  # type: dict[str, Tensor | None]
    moving, left = {source}, []
    for node in nodes:
        if moving & set(node.takes):
            moving |= set(node.gives)
            fixed = frozenset(k for k, name in enumerate(node.takes) if name in values)
            left.append(replace(node, fixed=fixed))
        else:
            with torch.no_grad():
                _step(node, Run(), values)
    return left, {name: value for name, value in values.items() if value is not None}


def _with_drops(nodes: Sequence[Node], output: str) -> list[Node]:
    """Each node with the values that nothing needs after it."""
    seen, found = {output}, []
    for node in reversed(nodes):
        names = dict.fromkeys([*node.takes, *node.gives])
        found.append(replace(node, drop=tuple(name for name in names if name and name not in seen)))
        seen |= set(names)
    return found[::-1]


def _step(node: Node, run: Run, values: dict[str, Tensor | None]) -> None:
    """Compute one node; what nothing needs any more is let go."""
    try:
        answer = OPERATORS[node.op](At(node, run), *[values[name] for name in node.takes])
    except KeyError as error:
        raise UserError(f"the node '{node.name}' needs {error}, which nothing makes: the file is damaged.") from None
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        shapes = ", ".join(str(tuple(v.shape)) for name in node.takes if (v := values.get(name)) is not None)
        raise UserError(
            f"{node.op} (node '{node.name}') cannot be computed on inputs of shape {shapes}: "
            f"{type(error).__name__}: {error}"
        ) from error
    outputs = answer if isinstance(answer, tuple) else (answer,)
    values.update(zip(node.gives, outputs, strict=False))  # an output beyond these is missed by who needs it
    for name in node.drop:
        values.pop(name, None)


def _choose_batching(net: OnnxNet) -> None:
    """Set ``batching`` to the first way in which two batches agree with one of both; pieces always do."""
    b, *sizes = net.input_shape
    if any(size is None for size in sizes):
        net.batching = "as written" if b is None else "pieces"
        return
    b = b or 1
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2 * b, *[size or 1 for size in sizes], generator=source)
    with torch.no_grad():
        apart = torch.cat([net(x[:b]), net(x[b:])])
        scale = float(apart.nan_to_num(0.0, 0.0, 0.0).abs().max()) if apart.numel() else 0.0
        for way in ("as written", "rescaled"):
            net.batching = way
            try:
                together = net(x)
            except UserError:
                continue
            if together.shape == apart.shape and torch.allclose(together, apart, 1e-3, 1e-4 * scale, equal_nan=True):
                return
    net.batching = "pieces"
