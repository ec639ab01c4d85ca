"""Networks from elsewhere: Python code, weights, a torch.export program, an ONNX file; wrapped for images in [0, 1]."""

from __future__ import annotations

from .layout import LAYOUTS
from .model_file import ModelSource, code_hash, is_model_file, open_model
from .onnx import OPERATORS, OnnxNet, load_onnx
from .wrapped import Wrapped, wrap

__all__ = [
    "LAYOUTS",
    "OPERATORS",
    "ModelSource",
    "OnnxNet",
    "Wrapped",
    "code_hash",
    "is_model_file",
    "load_onnx",
    "open_model",
    "wrap",
]
