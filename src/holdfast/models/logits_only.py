"""A network that returns a logits tensor and nothing else, for tools that know no Outputs."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import UserError, type_of
from ..outputs import Outputs, as_outputs
from ..user_input import typed


class LogitsOnly(nn.Module):
    """Images -> (N, K) logits; ``logits_only`` makes it.

    Args:
        inner: the network.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, K) logits."""
        answer = self.inner(x)
        return answer.logits if isinstance(answer, Outputs) else as_outputs(answer).logits


@typed
def logits_only(model: nn.Module) -> LogitsOnly:
    """The same network with a tensor for its output: what foolbox, torchattacks, jit.trace and torch.export take.

    It shares the weights and keeps the mode, train or eval. Its images are in [0, 1], as those of the model.

    Args:
        model: a Classifier, or any module that returns Outputs, logits, or something with ``.logits``.

    Returns:
        The module.

    Raises:
        UserError: ``model`` is no module.

    >>> import torch
    >>> from holdfast import models
    >>> net = models.build("smallconv", (1, 8, 8), 10).eval()
    >>> models.logits_only(net)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"logits_only takes a torch module, got {type_of(model)}.")
    return LogitsOnly(model)
