"""The type that losses and scores share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Loss = Callable[..., Tensor]  # (out, target, **settings) -> (N,); target: y, or any tuple of tensors with leading N
