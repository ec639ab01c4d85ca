"""What a model returns, how it is asked, and the one border at which a bare logits tensor is wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Any]  # an nn.Module or any function from images to logits or Outputs


class Outputs(NamedTuple):
    """A network's answer for N images.

    logits: (N, K), what argmax is taken of: w.h, scale * cosine, or -distance / 2.
    features: (N, D), what the head saw, or None.
    distances: (N, K) squared distances of the features to the head's centers, raw, or None.
    """

    logits: Tensor
    features: Tensor | None = None
    distances: Tensor | None = None


def as_outputs(answer: Any) -> Outputs:
    """Outputs from what a model returned: Outputs, a logits tensor, a tuple that starts with one, or ``.logits``.

    Raises TypeError when there are no (N, K) logits in it.

    >>> import torch
    >>> as_outputs(torch.zeros(2, 3)).logits.shape
    torch.Size([2, 3])
    """
    if isinstance(answer, Outputs):
        return answer
    logits = answer
    if not isinstance(answer, Tensor):  # a name says more than a place
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
    """The (N, K) logits of a model's answer."""
    return out.logits if isinstance(out, Outputs) else out


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of the device, or, in words alone, of a CPU. Smaller batches help.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), out_of_memory(RuntimeError("shape"))
    (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def frozen_eval(model: Model) -> Iterator[None]:
    """Every module in eval mode and no parameter with a gradient, each restored to its own state afterwards.

    Per module, not by one flag: a batch norm that its owner froze comes back frozen, a dropout in train mode likewise.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    wanted = [p for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    try:
        for module in modules:
            module.training = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """argmax != y, and no logit is NaN or infinite: broken arithmetic is never a success. (N, K), (N,) -> (N,) bool.

    >>> import torch
    >>> fooled(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), torch.tensor([0, 0]))
    tensor([ True, False])
    """
    return (logits.argmax(1) != y) & logits.isfinite().all(1)
