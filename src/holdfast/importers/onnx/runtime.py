"""What onnxruntime answers where holdfast's own copy of an ONNX network was attacked."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ...outputs import Model, as_outputs
from .network import OnnxNet

TYPES = {  # of the images that a file takes: onnxruntime's names, and NumPy's
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16",
    "tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(uint16)": "uint16", "tensor(int16)": "int16",
}  # fmt: skip


def onnx_part(model: Model) -> OnnxNet | None:
    """The ONNX network inside a module, with the file that it came from; None if there is none, or several."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, OnnxNet) and module.path]
    return found[0] if len(found) == 1 else None


def runtime_predictions(model: nn.Module, x: Tensor | Iterable[Tensor], batch_size: int = 64) -> Tensor | str:
    """The classes that the module predicts with onnxruntime's answers, from the file, in place of its network's.

    Whatever the module does before and after its network, it does here too: preprocessing, the order of the classes.

    Args:
        model: holds one OnnxNet, maybe behind preprocessing.
        x: (N, C, H, W) images in [0, 1], or batches of them.
        batch_size: images at a time, of those that are in one tensor.

    Returns:
        (N,) int64 on the model's device; or a text that says why onnxruntime has no answer.
    """
    net = onnx_part(model)
    if net is None:
        return "the network does not come from an ONNX file"
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime is not installed: pip install onnxruntime"
    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    batches = x.split(batch_size) if isinstance(x, Tensor) else x
    hook = None
    try:
        session = onnxruntime.InferenceSession(net.path, providers=["CPUExecutionProvider"])
        hook = net.register_forward_hook(lambda _, given, out: runtime_outputs(session, net, given[0], out))
        with torch.no_grad():
            parts = [as_outputs(model(part.to(device))).logits.argmax(1) for part in batches]
    except Exception as error:  # whatever onnxruntime refuses: no answer is no doubt
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        return f"onnxruntime cannot run {net.path}: {reason[:200]}"
    finally:
        if hook is not None:
            hook.remove()
    return torch.cat(parts)


def runtime_outputs(session: Any, net: OnnxNet, x: Tensor, out: Tensor) -> Tensor:
    """What onnxruntime answers for images, in the form of the network's own answer.

    Args:
        session: of the network's file.
        net: the network.
        x: the images that the network was given, (N, ...).
        out: what the network answered.

    Returns:
        A tensor in the shape, type and place of ``out``.
    """
    entry = session.get_inputs()[0]
    points = x.detach().cpu()
    if net.integer_range is not None:
        points = points.round().clamp(*net.integer_range)
    if len(entry.shape) < points.ndim:  # the graph has no axis for the batch
        chunks, kept = list(points), [0] * len(points)
    else:
        size = entry.shape[0] if isinstance(entry.shape[0], int) and entry.shape[0] > 0 else len(points)
        parts = points.split(size)
        chunks = [torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])]) for part in parts]
        kept = [len(part) for part in parts]
    answers = []
    for chunk, n in zip(chunks, kept, strict=True):
        (answer,) = session.run([net.output_of_file], {entry.name: chunk.numpy().astype(TYPES[entry.type])})
        answers.append(torch.from_numpy(answer).flatten(1)[:n] if n else torch.from_numpy(answer).flatten())
    return torch.cat(answers).reshape(out.shape).to(out)
