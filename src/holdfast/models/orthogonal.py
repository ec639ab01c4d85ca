"""Orthogonal layers: linear maps that lengthen no vector, and the activation that goes with them. For 1-Lipschitz nets.

Each is 1-Lipschitz in the l2 norm up to rounding, |f(x) - f(x')| <= |x - x'|, and so is any chain of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, at_least


def cayley(free: Tensor) -> Tensor:
    """A matrix with orthonormal columns (tall) or rows (wide) from any matrix of that shape: (n, m) -> (n, m).

        [A; B] = free (A square),  S = A - A' + B'B,  Q = [(I + S)^-1 (I - S); -2 B (I + S)^-1],  wide: by transposing

    I + S can always be inverted, with singular values >= 1: S is skew plus positive. One solve of min(n, m) rows.
    Smooth, so it trains as it stands. Its error in float32 is about 1e-6, and grows with the size of ``free``.

    Raises UserError unless free has two dimensions.
    Source: Trockman & Kolter 2021; Helfrich et al. 2018.

    >>> cayley(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))  # S = [[0, 1], [-1, 0]]: a quarter turn
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    if free.ndim != 2:
        raise UserError(f"cayley takes a matrix, got a tensor of shape {tuple(free.shape)}.")
    rows, columns = free.shape
    if rows < columns:
        return cayley(free.T).T
    with torch.autocast(free.device.type, enabled=False):  # half precision would not be orthogonal
        upper, lower = free[:columns], free[columns:]
        eye = torch.eye(columns, dtype=free.dtype, device=free.device)
        inverse_of = eye + upper - upper.T + lower.T @ lower  # never singular: solve's check would wait for the device
        twice = torch.linalg.solve_ex(inverse_of, 2 * eye).result  # 2 (I + S)^-1
        return torch.cat([twice - eye, -lower @ twice])  # (I + S)^-1 (I - S) = 2 (I + S)^-1 - I


class Orthogonal(nn.Module):
    """The owner of an orthogonal matrix Q = cayley(free): (n, m). What the orthogonal layers share.

    Where no gradient of ``free`` is asked for (attacks, evaluation), Q is computed once, in float64, rounded to the
    dtype, and kept while ``free`` is what it was, value for value: an edit through ``.data`` leaves no other trace.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(rows, columns) / math.sqrt(max(rows, columns)))  # Q is well mixed at once
        self._kept: tuple[Tensor, Tensor] | None = None  # (free, Q), not in state_dict

    @property
    def matrix(self) -> Tensor:
        """Q: (n, m), with a graph where ``free`` needs one."""
        free = self.free
        wanted = free.requires_grad and torch.is_grad_enabled()
        if (
            wanted or not isinstance(free, nn.Parameter) or torch.compiler.is_compiling()
        ):  # functional_call: no Parameter
            return cayley(free)
        if self._kept is None or not _same(self._kept[0], free):
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor would break the next attack
                precise = free.float() if free.device.type == "mps" else free.double()
                self._kept = free.detach().clone(), cayley(precise).to(free.dtype)
        return self._kept[1]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class OrthogonalLinear(Orthogonal):
    """x W' + b, W of orthonormal rows (it narrows: 1-Lipschitz) or columns (it widens: every length is kept).

    Args: features_in, features_out >= 1; bias. ``weight``: (out, in), as of nn.Linear.

    >>> layer = OrthogonalLinear(5, 3)
    >>> bool((layer.weight @ layer.weight.T - torch.eye(3)).abs().max() < 1e-5)
    True
    """

    def __init__(self, features_in: int, features_out: int, bias: bool = True) -> None:
        for name, size in (("features_in", features_in), ("features_out", features_out)):
            at_least(f"{name} of an orthogonal layer", size, 1)
        super().__init__(features_out, features_in)
        self.bias = nn.Parameter(torch.zeros(features_out)) if bias else None

    @property
    def weight(self) -> Tensor:
        """(out, in)."""
        return self.matrix

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OrthogonalConv(Orthogonal):
    """A convolution with stride = kernel whose every patch passes one orthogonal map: (N, C, H, W) -> (N, D, H/k, W/k).

    The patches share no pixel, so the whole is 1-Lipschitz where the map of one patch is, and keeps every length where
    that widens (D >= C k^2). Sides that k does not divide are filled up with zeros, right and below. kernel 1 mixes the
    channels. Chosen over circular convolutions by Cayley in Fourier space: those need a solve per frequency.

    Args: channels_in, channels_out, kernel >= 1; bias. ``weight``: (out, in, k, k), as of nn.Conv2d.

    >>> OrthogonalConv(1, 4, 2)(torch.zeros(2, 1, 7, 8)).shape
    torch.Size([2, 4, 4, 4])
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, bias: bool = True) -> None:
        sizes = (("channels_in", channels_in), ("channels_out", channels_out), ("kernel", kernel))
        for name, size in sizes:
            at_least(f"{name} of an orthogonal convolution", size, 1)
        super().__init__(channels_out, channels_in * kernel * kernel)
        self.shape = (channels_out, channels_in, kernel, kernel)
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None

    @property
    def weight(self) -> Tensor:
        """(out, in, k, k)."""
        return self.matrix.reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return patchwise(x, self.weight, self.bias)


def patchwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d with stride = kernel, of images filled up with zeros to whole patches: (N, C, H, W) -> (N, D, H/k, W/k).

    Args: weight: (D, C, k, k); bias: (D,).

    >>> patchwise(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 2, 2))
    tensor([[[[4., 4.],
              [2., 2.]]]])
    """
    kernel = weight.shape[-1]
    right, below = -x.shape[3] % kernel, -x.shape[2] % kernel
    return F.conv2d(F.pad(x, (0, right, 0, below)) if right or below else x, weight, bias, stride=kernel)


class MaxMin(nn.Module):
    """max(a, b), min(a, b) of the two halves a, b of dimension 1: it sorts pairs (GroupSort2), and keeps every length.

    A ReLU is 1-Lipschitz too, but loses half of the gradient's length. Raises UserError for an odd number of channels.
    Source: Anil et al. 2019.

    >>> MaxMin()(torch.tensor([[1.0, 5.0, 3.0, 4.0]]))
    tensor([[3., 5., 1., 4.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            raise UserError(f"MaxMin sorts pairs of channels: it needs an even number of them, got {x.shape[1]}.")
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)
