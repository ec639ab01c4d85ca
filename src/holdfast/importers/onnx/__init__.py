"""An ONNX file as a torch module with gradients, so that a network trained elsewhere can be attacked.

A float constant of the file becomes a buffer, so that ``.to(device)``, ``.double()`` and ``state_dict`` work. What
depends on constants only is computed once, when the file is read.
"""

from __future__ import annotations

from .load import load_onnx
from .network import OPERATORS, OnnxNet
from .runtime import runtime_predictions

__all__ = ["OPERATORS", "OnnxNet", "load_onnx", "runtime_predictions"]
