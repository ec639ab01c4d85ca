"""What onnxruntime answers where holdfast's own copy of an ONNX network was attacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...outputs import Model
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


def runtime_predictions(model: nn.Module, x: Tensor) -> Tensor | str:
    """The classes that onnxruntime predicts from the file, for the images as the module hands them to its network.

    Args:
        model: holds one OnnxNet, maybe behind preprocessing.
        x: (N, C, H, W) images in [0, 1].

    Returns:
        (N,) int64 on x's device; or a text that says why onnxruntime has no answer.
    """
    net = onnx_part(model)
    if net is None:
        return "the network does not come from an ONNX file"
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime is not installed: pip install onnxruntime"
    received: list[Tensor] = []
    hook = net.register_forward_pre_hook(lambda module, given: received.append(given[0].detach().cpu()))
    try:
        with torch.no_grad():
            model(x)
    finally:
        hook.remove()
    try:
        session = onnxruntime.InferenceSession(net.path, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        size = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) and entry.shape[0] > 0 else 0
        points, parts = torch.cat(received), []
        if entry.type in TYPES and "int" in TYPES[entry.type]:
            points = points.round()
        for part in points.split(size or len(points)):
            full = part if not size else torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
            (out,) = session.run([net.output_of_file], {entry.name: full.numpy().astype(TYPES[entry.type])})
            parts.append(torch.from_numpy(out).flatten(1)[: len(part)].argmax(1))
    except Exception as error:  # whatever onnxruntime refuses: no answer is no doubt
        return f"onnxruntime cannot run {net.path}: {str(error).splitlines()[0][:200]}"
    return torch.cat(parts).to(x.device)
