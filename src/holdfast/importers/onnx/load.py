"""Reading an ONNX file: its graph, simplified, as an OnnxNet."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...outputs import out_of_memory
from ...user_input import typed
from .network import OPERATORS, OnnxNet, compute_node
from .node import FLOATS, INTEGERS, Node, PassSettings, limited

INT4 = (21, 22)  # onnx's numbers for uint4 and int4
SHAPE_OPERATORS = ("Identity", "Reshape", "Flatten", "Squeeze", "Cast")  # allowed between a last Softmax and the output


@typed
def load_onnx(path: str | Path, *, strip_softmax: bool = True) -> OnnxNet:
    """Load the network of an ONNX file, with gradients with respect to its images.

    The first output counts. A file that was exported for one batch size takes any: constants of Reshape that hold the
    file's batch size are read as the actual one, if two batches then agree with both at once; otherwise the images go
    through in chunks of the file's size. This is tried out here if the file says how large an image is.

    Args:
        path: a file with one input of floats, or of 8-bit or 16-bit integers, whose first axis is the batch; or without
            a batch axis. Half and double precision become float32.
        strip_softmax: leave out a Softmax that makes the output, so that the output is logits: argmax is the same, and
            gradients do not vanish where probabilities saturate.

    Returns:
        The network, in eval mode.

    Raises:
        UserError: the onnx package is missing, the file cannot be read, or it uses an operator that OPERATORS lacks.
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
    except Exception as error:  # protobuf errors, a missing weights file, no memory: the file cannot be read
        raise UserError(
            f"{path} cannot be read as ONNX ({type(error).__name__}: {error}). It is cut short, damaged, or lacks the "
            "file that holds its weights: export it again."
        ) from None
    try:
        net = _convert(proto, path, strip_softmax)
        net.path, net.output_of_file = str(path.resolve()), proto.graph.output[0].name
        _choose_batching(net)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"{path} holds a network that takes more memory than there is ({error}).") from None
    return net.eval()


def _convert(proto: Any, path: Path, strip_softmax: bool) -> OnnxNet:
    graph = proto.graph
    if not graph.node or not graph.output:
        raise UserError(
            f"{path} holds no network: its graph has {len(graph.node)} nodes. It is damaged: export it again."
        )
    constants = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UserError(f"{path} has {len(inputs)} inputs ({names}): expected one, the images.")
    name, kind = inputs[0].name, inputs[0].type.tensor_type
    integers = INTEGERS.get(kind.elem_type)
    if kind.elem_type not in FLOATS and integers is None:
        raise UserError(
            f"the input '{name}' of {path} holds neither floats nor integers of 8 or 16 bits: export the network "
            "without image decoding or tokens."
        )
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
    limited([size or 1 for size in shape], f"{path}: an input")
    if kind.HasField("shape") and not shape:
        raise UserError(f"the input '{name}' of {path} must hold images, it is a single number.")
    opset = max([entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")], default=1)
    output = graph.output[0].name
    nodes = _needed([_node(entry, opset) for entry in graph.node], output)
    _refuse_unknown(nodes, path)
    nodes, last_operator, removed = _without_softmax(nodes, output, strip=strip_softmax)
    nodes, constants = _fold_constants(nodes, constants, name)
    if output not in {out for node in nodes for out in node.output_names}:
        raise UserError(f"the output '{output}' of {path} does not depend on its input '{name}'.")
    limits = None if integers is None else (torch.iinfo(integers).min, torch.iinfo(integers).max)
    net = OnnxNet(nodes, constants, (name, output), shape or None, limits)
    net.last_operator, net.softmax_removed = last_operator, removed
    return net


def _tensor(proto: Any) -> Tensor:
    """A tensor of the file as float32, bool, an integer of 8 or 16 bits, or int64 for every other integer."""
    from onnx import numpy_helper

    try:
        array = numpy_helper.to_array(proto)
    except Exception as error:
        raise UserError(f"the tensor '{proto.name}' cannot be read ({error}): the file is damaged.") from None
    if array.dtype.kind in "SOU":
        raise UserError(f"the tensor '{proto.name}' holds strings: export the network without pre- or post-processing.")
    if proto.data_type in INTEGERS:
        return torch.from_numpy(array.copy())
    if array.dtype.kind in "iu" or proto.data_type in INT4:
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
    return Node(op, name, tuple(proto.input), tuple(proto.output), attributes, opset)


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output depends on, in their order."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed & set(node.output_names):
            kept.append(node)
            needed |= set(node.input_names) - {""}
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
    """(nodes, the operator that makes the output, whether that was a Softmax, now an Identity)."""
    maker = {name: node for node in nodes for name in node.output_names}
    uses = Counter(name for node in nodes for name in node.input_names)
    node = maker.get(output)
    while (
        node is not None
        and node.op in SHAPE_OPERATORS
        and uses[node.input_names[0]] == 1
        and node.input_names[0] in maker
    ):
        node = maker[node.input_names[0]]
    if node is None:
        return nodes, "", False
    over_classes = node.attributes.get("axis", -1 if node.opset >= 13 else 1) in (1, -1)
    if not (strip and node.op == "Softmax" and over_classes):
        return nodes, node.op, False
    identity = replace(node, op="Identity", attributes={})
    return [identity if entry is node else entry for entry in nodes], node.op, True


def _fold_constants(
    nodes: list[Node], constants: dict[str, Tensor], source: str
) -> tuple[list[Node], dict[str, Tensor]]:
    """(nodes that depend on the input, constants): everything else is computed here, once, on the CPU."""
    values = {"": None, **constants}  # type: dict[str, Tensor | None]
    variable, remaining = {source}, []
    for node in nodes:
        if variable & set(node.input_names):
            variable |= set(node.output_names)
            constant_inputs = frozenset(k for k, name in enumerate(node.input_names) if name in values)
            remaining.append(replace(node, constant_inputs=constant_inputs))
        else:
            with torch.no_grad():
                compute_node(node, PassSettings(), values)
    return remaining, {name: value for name, value in values.items() if value is not None}


def _choose_batching(net: OnnxNet) -> None:
    """Set ``batching`` to the first way in which both batches at once agree with each of them; chunks always do."""
    if net.input_shape is None:
        return
    b, *sizes = net.input_shape
    if not sizes:
        return  # one image at a time: ``OnnxNet`` tries whether vmap answers the same
    if any(size is None for size in sizes):
        dynamic = any("Dynamic" in node.op for node in net.nodes)  # its scale may depend on the batch
        net.batching = "as exported" if b is None and not dynamic else "chunks"
        return
    b = b or 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * b, *[size or 1 for size in sizes], generator=generator)
    if net.integer_range is not None:
        low, high = net.integer_range
        x = low + (high - low) * torch.rand(x.shape, generator=generator)
    with torch.no_grad():
        separate = torch.cat([net(x[:b]), net(x[b:])])
        scale = float(separate.nan_to_num(0.0, 0.0, 0.0).abs().max()) if separate.numel() else 0.0
        for batching in ("as exported", "rescaled"):
            net.batching = batching
            try:
                both = net(x)
            except UserError:
                continue
            if both.shape == separate.shape and torch.allclose(both, separate, 1e-3, 1e-4 * scale, equal_nan=True):
                return
    net.batching = "chunks"
