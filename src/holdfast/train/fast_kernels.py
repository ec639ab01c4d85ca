"""The network as the inner attack of training asks it: in the training's precision, by the quicker of two kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..outputs import Outputs, as_outputs


class InBfloat16(nn.Module):
    """A network whose forward runs under bf16 autocast and answers in float32.

    Attacks turn autocast off around the model, which is right for evaluations: so it is turned on inside. The network
    is a child, so that whoever freezes the parameters finds them; what else it has is reached through this one.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Outputs:
        with torch.autocast(x.device.type, torch.bfloat16):
            out = as_outputs(self.network(x))
        return Outputs(*(None if part is None else part.float() for part in out))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


def quick(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which the pixels' gradient through frozen weights takes the quicker kernel that there is.

    On a CPU: a convolution of gray images hands its gradient to the pixels as a matrix product and ``F.fold``. The
    kernel that oneDNN has for one input channel does the same sums 2 to 5 times more slowly, and in small networks it
    is a third of an attack. And where features are flattened their gradient comes back in the memory order that they
    have themselves, channels last: a ReLU whose two operands lie differently is 5 times slower. The numbers differ by
    rounding alone. Elsewhere nothing is changed.
    """
    return _Quick() if device.type == "cpu" else nullcontext()


class _Quick(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and _fits(*args):
            return _GrayConvolution.apply(*args[:6])
        if func is torch.Tensor.flatten and _lies_channels_last(args[0]):
            args[0].register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
        return func(*args, **(kwargs or {}))


def _fits(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    gray = weight.shape[1] == 1 and groups == 1 and x.ndim == 4
    plain = not isinstance(padding, str) and not torch.is_autocast_enabled("cpu")
    return frozen and gray and plain and x.requires_grad and torch.is_grad_enabled()


def _lies_channels_last(x: Tensor) -> bool:
    by_channel = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return by_channel and x.requires_grad and torch.is_grad_enabled()


class _GrayConvolution(torch.autograd.Function):
    """conv2d of one channel; backward: the columns W' g, added up where they overlap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any) -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, *ctx.geometry = inputs
        ctx.size = x.shape[2:]
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (stride, padding, dilation) = ctx.saved_tensors, ctx.geometry
        columns = weight.flatten(1).t() @ grads[0].flatten(2)
        grad = F.fold(columns, ctx.size, weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
        return grad, None, None, None, None, None
