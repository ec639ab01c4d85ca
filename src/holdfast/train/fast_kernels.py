"""Faster input gradients for the inner attack of training: bf16 forward passes, and better CPU kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..outputs import Outputs, as_outputs


class InBfloat16(nn.Module):
    """A network whose forward pass runs under bf16 autocast and returns float32.

    Attacks turn autocast off around the model, which is right for evaluations; so it is turned on inside. The network
    is a child, so that its parameters can be frozen; its other attributes are reached through this module.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Outputs:
        """(N, C, H, W) -> Outputs in float32."""
        with torch.autocast(x.device.type, torch.bfloat16):
            out = as_outputs(self.network(x))
        return Outputs(*(None if part is None else part.float() for part in out))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


def fast_input_gradients(device: torch.device) -> AbstractContextManager[Any]:
    """Make a context in which gradients with respect to images, through frozen weights, use faster CPU kernels.

    Two cases are replaced; the results differ by rounding only. The input gradient of a convolution of grey images is
    a matrix product and ``F.fold``: oneDNN's kernel for one input channel is 2 to 5 times slower, and in small networks
    a third of an attack. And the gradient of flattened features gets their own memory order, channels last: a ReLU
    whose two operands differ in memory order is 5 times slower.

    Args:
        device: where the model runs; other devices than the CPU are left as they are.

    Returns:
        The context manager.
    """
    return _FastInputGradients() if device.type == "cpu" else nullcontext()


class _FastInputGradients(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and _is_frozen_grey_convolution(*args):
            return _GreyConvolution.apply(*args[:6])
        if func is torch.Tensor.flatten and _is_channels_last(args[0]):
            args[0].register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
        return func(*args, **(kwargs or {}))


def _is_frozen_grey_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    grey = weight.shape[1] == 1 and groups == 1 and x.ndim == 4
    plain = not isinstance(padding, str) and not torch.is_autocast_enabled("cpu")
    return frozen and grey and plain and x.requires_grad and torch.is_grad_enabled()


def _is_channels_last(x: Tensor) -> bool:
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return channels_last and x.requires_grad and torch.is_grad_enabled()


class _GreyConvolution(torch.autograd.Function):
    """conv2d of one input channel; backward: the columns W' g, summed where they overlap."""

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
