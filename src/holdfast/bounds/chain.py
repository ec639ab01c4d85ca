"""A network as Lipschitz constants read it: a chain of layers, and the linear layer that gives the logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..importers import OnnxNet, Wrapped
from ..importers.layout import FileNetwork
from ..models import Classifier, LogitsOnly, convnets, heads, lipschitz, orthogonal
from .graph import CannotBound
from .layers import Arrangement, Layer, Normalisation, Rescaling, computes_as, layer_of

ROWS = 256  # samples that are bounded at a time
# Backbones whose forward is their Sequential ``layers`` and nothing else.
_CHAINS = (
    convnets.Mlp, convnets.SmallConvNet, convnets.ConvNet, convnets.StepNet, convnets.Madry, convnets.SmallCnn,
    lipschitz.LipMlp, lipschitz.LipConv,
)  # fmt: skip
_LINEAR_HEADS = (heads.Linear, heads.Centers, heads.Orthogonal)
_DENSE = (nn.Linear, orthogonal.OrthogonalLinear)


@dataclass(frozen=True)
class LogitLayer:
    """The last layer: a dense module, its linear head if it has one, and the factor on the logits."""

    dense: Any
    head: nn.Module | None = None
    logit_scale: float = 1.0

    def parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(weight (K, D), bias (K,)) in this dtype, with all factors multiplied in."""
        weight, bias = self.dense.weight.to(dtype) * self.logit_scale, self.dense.bias
        if isinstance(self.head, heads.Orthogonal):
            weight, bias = weight * self.head.scale, self.head.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias.to(dtype) * self.logit_scale


def chain_of(model: nn.Module) -> tuple[list[Layer], LogitLayer]:
    """The layers in order, and the last one. Raises CannotBound for a network that is no chain of known layers."""
    if computes_as(model, LogitsOnly):
        return chain_of(model.inner)
    if computes_as(model, Wrapped):
        if not isinstance(model.inner, nn.Module):
            raise CannotBound(f"no bound is known for {_kind(model.inner)}: give an nn.Sequential or a Classifier.")
        inner, end = chain_of(model.inner)
        return [*_preprocessing(model), *inner], end
    if computes_as(model, Classifier):
        backbone, head = model.backbone, model.head
        if not any(computes_as(backbone, kind) for kind in (*_CHAINS, convnets.Linear, nn.Sequential)):
            raise CannotBound(f"no bound is known for the backbone {type(backbone).__name__}.")
        if not any(computes_as(head, kind) for kind in _LINEAR_HEADS):
            raise CannotBound(f"bounds need a linear head, got {type(head).__name__}.")
        layers = [Normalisation(model), *map(layer_of, _leaves(backbone))]
        return layers, LogitLayer(_dense(head.linear), head, model.logit_scale)
    if computes_as(model, nn.Sequential):
        *hidden, last = list(_leaves(model)) or [model]
        return [layer_of(module) for module in hidden], LogitLayer(_dense(last))
    raise CannotBound(f"no bound is known for {_kind(model)}: give an nn.Sequential or a Classifier.")


def _kind(model: object) -> str:
    """What a network is, in a user's words."""
    if isinstance(model, OnnxNet):
        return "the graph of an ONNX file"
    if isinstance(model, FileNetwork):
        return "a torch.export program"
    return type(model).__name__ if isinstance(model, nn.Module) else "a function"


def _preprocessing(model: Wrapped) -> list[Layer]:
    """What a wrapped network does to its images first."""
    steps: list[Layer] = [] if model.input_range is None else [Rescaling(model)]
    steps += [] if model.mean is None else [Normalisation(model)]
    return [*steps, Arrangement(model)] if model.input_layout not in ("", "nchw") else steps


def _dense(module: Any) -> nn.Module:
    if not any(computes_as(module, kind) for kind in _DENSE):
        raise CannotBound(f"bounds need a network that ends with a linear layer, not with {type(module).__name__}.")
    dense: nn.Module = module
    return dense


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are applied, in order; without those that do nothing in eval mode."""
    if any(computes_as(module, kind) for kind in _CHAINS):
        yield from _leaves(module.layers)  # type: ignore[arg-type]
    elif computes_as(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    elif computes_as(module, convnets.Linear):
        yield nn.Flatten()
    elif not any(computes_as(module, kind) for kind in (nn.Dropout, nn.Identity)):
        yield module


def in_float64(model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """All three on a device that has float64: the CPU instead of mps."""
    return (copy.deepcopy(model).cpu(), x.cpu(), y.cpu()) if x.device.type == "mps" else (model, x, y)
