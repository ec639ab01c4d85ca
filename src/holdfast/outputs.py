"""What a model returns, its evaluation mode, and the one place where bare logits become Outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Any]  # an nn.Module or any function from images to logits or Outputs


class Outputs(NamedTuple):
    """A network's output for N images.

    Attributes:
        logits: (N, K), whose argmax is the prediction: W h, scale * cosine, or -distance / 2.
        features: (N, D), the head's input, or None.
        distances: (N, K), squared distances of the features to the head's centers, unscaled, or None.
    """

    logits: Tensor
    features: Tensor | None = None
    distances: Tensor | None = None


def as_outputs(answer: Any) -> Outputs:
    """Outputs from what a model returned.

    Args:
        answer: Outputs, a logits tensor, an object with ``.logits``, or a tuple or list that starts with logits.

    Returns:
        Outputs. Features and distances are kept from Outputs alone.

    Raises:
        TypeError: where there are no (N, K) logits in it.

    >>> import torch
    >>> as_outputs(torch.zeros(2, 3)).logits.shape
    torch.Size([2, 3])
    """
    if isinstance(answer, Outputs):
        return answer
    logits = answer
    if not isinstance(answer, Tensor):  # a named attribute comes first
        logits = getattr(answer, "logits", None)
        if logits is None and isinstance(answer, (tuple, list)) and answer:
            logits = answer[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(answer).__name__
        raise TypeError(
            f"a model must return (N, K) logits, or something that holds them as .logits; it returned {got}"
        )
    return Outputs(logits)


def logits_of(out: Outputs | Tensor) -> Tensor:
    """The (N, K) logits of Outputs, or the logits themselves."""
    return out.logits if isinstance(out, Outputs) else out


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or on a CPU, so that a smaller batch may work.

    PyTorch raises a plain RuntimeError for a CPU; it is recognised by its message.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), out_of_memory(RuntimeError("shape"))
    (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def frozen_eval(model: Model) -> Iterator[None]:
    """Every module in eval mode, every parameter without gradient, and gradients enabled; all are restored afterwards.

    Attacks and checks need gradients in the images whatever mode the caller is in, ``no_grad`` and ``inference_mode``
    included.

    Each module gets its own mode back. A batch norm that its owner froze stays frozen, and a dropout that was in train
    mode returns to it.

    Args:
        model: an nn.Module; any other callable is left as it is.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    wanted = [p for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    try:
        for module in modules:
            module.training = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the model is fooled: argmax != y, and all logits are finite. NaN is never a success.

    Args:
        logits: (N, K).
        y: (N,) labels.

    Returns:
        (N,) bool.

    >>> import torch
    >>> fooled(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), torch.tensor([0, 0]))
    tensor([ True, False])
    """
    return (logits.argmax(1) != y) & logits.isfinite().all(1)
