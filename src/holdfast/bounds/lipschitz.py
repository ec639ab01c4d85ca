"""Lipschitz constants in the l2 norm, and the inference information s that they give."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..threat import Threat
from ..user_input import typed
from .chain import chain_of
from .layers import Layer


@typed
def lipschitz_constant(model: nn.Module, shape: tuple[int, ...], *, proved: bool = False) -> Tensor:
    """Bound or estimate the l2 Lipschitz constant L of images -> features, the product of the layers' constants.

    The features are what the last layer reads. The product is loose unless the layers are orthogonal.

    Args:
        model: As for ``logit_difference_bounds``.
        shape: (C, H, W) of the images.
        proved: Give an upper bound for certificates, in float64: singular values of small layers, a bound by the kernel
            for large ones. Otherwise give the estimate of training, with a graph: power iteration, 5 rounds from a
            fixed start, the same at every call, so that training resumes bit for bit; orthogonal layers count as 1.

    Returns:
        L, 0-dim.

    Raises:
        CannotBound: No constant is known for a layer.

    >>> float(lipschitz_constant(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2)))  # the last layer is apart
    1.0
    """
    device = next(iter(model.parameters())).device
    dtype = torch.float64 if proved else next(model.parameters()).dtype
    constants = layer_constants(chain_of(model)[0], torch.zeros(1, *shape, device=device, dtype=dtype), proved)
    return torch.stack([torch.ones((), device=device, dtype=dtype), *constants]).prod()


def layer_constants(layers: list[Layer], probe: Tensor, proved: bool) -> list[Tensor]:
    """The Lipschitz constant of each layer; probe: an image, (1, C, H, W)."""
    constants = []
    for layer in layers:
        constants.append(layer.lipschitz_upper_bound(probe) if proved else layer.lipschitz_estimate(probe))
        with torch.no_grad():
            probe = layer.apply(probe)
    return constants


@typed
def l2_radius(threat: Threat, dim: int, size: float | None = None) -> float:
    """The l2 norm of the largest perturbation: eps for l2 and l1, sqrt(dim) eps for linf.

    An l2 Lipschitz constant times an linf eps, without this factor, would be a false certificate.

    Args:
        threat: Of any norm.
        dim: How many values a sample has, C H W.
        size: A radius in the threat's norm, instead of eps.

    Returns:
        The l2 radius, in units of the pixels.

    >>> l2_radius(Threat("l2", 0.5), 784), l2_radius(Threat("linf", 0.5), 784)
    (0.5, 14.0)
    """
    return (threat.eps if size is None else size) * (math.sqrt(dim) if threat.norm == "linf" else 1.0)


@typed
def s_lipschitz_pairwise(constant: float | Tensor, eps: float, weight: Tensor, y: Tensor) -> Tensor:
    """The inference information s_j = L eps ||w_j - w_y||_2 of a linear head on L-Lipschitz features.

    It is tighter than sqrt(2) L ||W|| eps. margin / sqrt(2) > L eps certifies only if the rows of W are orthonormal;
    this form always does.

    Args:
        constant: L of the features, from the threat's norm to l2.
        eps: The radius, in the threat's norm.
        weight: (K, D), of the head.
        y: (N,) int64 labels.

    Returns:
        (N, K), 0 at y.

    >>> s_lipschitz_pairwise(1.0, 0.5, torch.eye(2), torch.tensor([0]))
    tensor([[0.0000, 0.7071]])
    """
    distances = (weight[None] - weight[:, None]).norm(dim=2)  # between rows: (K, K)
    return constant * eps * distances[y]


@typed
def lipschitz_s(model: nn.Module, shape: tuple[int, ...], threat: Threat, y: Tensor) -> Tensor:
    """The inference information of a network: s_j = L r ||w_j - w_y||_2, with r the threat's ``l2_radius``.

    No logit difference rises by more over the threat, up to the error of the estimate of L.

    Args:
        model: As for ``logit_difference_bounds``.
        shape: (C, H, W) of the images.
        threat: Of any norm.
        y: (N,) int64 labels.

    Returns:
        (N, K), 0 at y, with a graph.

    Raises:
        CannotBound: No constant is known for a layer.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> lipschitz_s(net, (1, 1, 1), Threat("l2", 0.5), torch.tensor([0])).detach()
    tensor([[0., 1.]])
    """
    weight, _ = chain_of(model)[1].parameters(next(model.parameters()).dtype)
    return s_lipschitz_pairwise(lipschitz_constant(model, shape), l2_radius(threat, math.prod(shape)), weight, y)
