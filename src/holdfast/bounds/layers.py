"""The kinds of layers whose Lipschitz constants are known: one class for each.

To add a kind, write its class and add a line to ``LAYERS``. Every bound must hold for the layer as float32 computes it:
``n_terms`` and ``magnitude`` bound the rounding error.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks
from torch.nn.utils import parametrize

from ..models import convnets, orthogonal
from .graph import CannotBound

M = TypeVar("M", bound=nn.Module)
# What a subclass may define without computing something else.
_HARMLESS = {"__init__", "__module__", "__doc__", "__annotations__", "__static_attributes__", "__firstlineno__"}
SMALL = 4096  # a convolution's singular values are computed if neither its input nor its output has more values


def computes_as(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a module computes what ``kind`` computes.

    It does if it is of that class itself, or of a subclass that adds a constructor and nothing else, and if no hook, no
    attribute of its own and no compiled call stands in for a method. Its tensors must be torch's own, and so must what
    parametrises them. Anything else may compute anything.

    >>> class Residual(nn.Sequential):
    ...     def forward(self, x):
    ...         return x + super().forward(x)
    >>> computes_as(nn.Sequential(nn.ReLU()), nn.Sequential), computes_as(Residual(nn.ReLU()), nn.Sequential)
    (True, False)
    """
    if not isinstance(module, kind):
        return False
    own_class = parametrize.type_before_parametrizations(module)
    added = own_class.__mro__[: own_class.__mro__.index(kind)]
    return (
        all(set(vars(each)) <= _HARMLESS for each in added)
        and not any(callable(getattr(kind, name, None)) for name in vars(module))
        and module._compiled_call_impl is None
        and all(type(own) in (Tensor, nn.Parameter, type(None)) for own in _tensors(module))
        and all(_is_known(part) for part in _parametrisations(module))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (_global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks)
    )


def _tensors(module: nn.Module) -> Iterator[Tensor | None]:
    yield from module._parameters.values()
    yield from module._buffers.values()


def _parametrisations(module: nn.Module) -> Iterator[nn.Module]:
    """What computes the parameters of a module, if anything does."""
    if parametrize.is_parametrized(module):
        for computed in module.parametrizations.values():  # type: ignore[operator]
            yield from computed


def _is_known(parametrisation: nn.Module) -> bool:
    """Whether it is torch's or holdfast's: these give the same tensor at every call in eval mode."""
    return type(parametrisation).__module__.split(".")[0] in ("torch", "holdfast")


class Layer(ABC):
    """What bounds ask of a layer, for a batch h of its inputs, (N, ...), in h's dtype.

    ``n_terms``, ``magnitude`` and ``magnitude_norm`` bound the rounding of float32. The other methods bound exact
    arithmetic.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def apply(self, h: Tensor) -> Tensor:
        """The layer's output at h."""
        output: Tensor = self.module(h.clone())  # which may work in place, and h is needed after it
        return output

    @property
    @abstractmethod
    def n_terms(self) -> int:
        """How many products are summed for one output: the rounding error grows with it. 0: nothing rounds."""

    @abstractmethod
    def magnitude(self, h: Tensor) -> Tensor:
        """|W| |h| + |b|: the sum of the absolute terms of each output."""

    def largest_weight(self) -> Tensor | float:
        """No factor that multiplies an input is larger in absolute value."""
        return 1.0

    @abstractmethod
    def magnitude_norm(self, h: Tensor) -> Tensor:
        """An upper bound of the l2 norm of |W|, 0-dim."""

    def lipschitz_estimate(self, probe: Tensor) -> Tensor:
        """An estimate of the l2 Lipschitz constant, 0-dim, with a graph, for training; probe: an input, (1, ...)."""
        return self.lipschitz_upper_bound(probe)

    @abstractmethod
    def lipschitz_upper_bound(self, probe: Tensor) -> Tensor:
        """A proved upper bound of the l2 Lipschitz constant, 0-dim; probe: an input, (1, ...)."""


class Selection(Layer):
    """A layer whose outputs are among its inputs (or zero): nothing rounds. Monotone in every input."""

    @property
    def n_terms(self) -> int:
        return 0

    def magnitude(self, h: Tensor) -> Tensor:
        return self.apply(h.abs())

    def magnitude_norm(self, h: Tensor) -> Tensor:
        return self.lipschitz_upper_bound(h)

    def lipschitz_upper_bound(self, probe: Tensor) -> Tensor:
        return probe.new_ones(())


class MaxPool(Selection):
    """Where windows overlap, several outputs may be the same input."""

    def lipschitz_upper_bound(self, probe: Tensor) -> Tensor:
        return probe.new_ones(()) * math.sqrt(_windows(self.module))


class AveragePool(Layer):
    """A linear layer without negative weights."""

    def __init__(self, module: nn.AvgPool2d) -> None:
        super().__init__(module)
        if (module.divisor_override or 1) < 0:
            raise CannotBound(f"bounds know average pooling by a positive divisor, got {module.divisor_override}.")

    @property
    def n_terms(self) -> int:
        return math.prod(_pair(self.module.kernel_size))

    def magnitude(self, h: Tensor) -> Tensor:
        return self.apply(h.abs())

    def magnitude_norm(self, h: Tensor) -> Tensor:
        return self.lipschitz_upper_bound(h).clamp_min(1.0)

    def lipschitz_upper_bound(self, probe: Tensor) -> Tensor:
        """sqrt(largest row sum * largest column sum) of its matrix."""
        pool = self.module
        weight, rows = 1 / self.n_terms, 1.0
        if pool.divisor_override is not None:
            weight, rows = 1 / pool.divisor_override, self.n_terms / pool.divisor_override
        elif pool.ceil_mode or (max(_pair(pool.padding)) and not pool.count_include_pad):
            weight = 1.0  # a window at the border may hold a single value
        return probe.new_ones(()) * math.sqrt(rows * _windows(pool) * weight)


class Step(Layer):
    """``convnets.Step``: monotone, and nowhere steeper than its ``steepest``."""

    def largest_weight(self) -> float:
        return float(self.module.steepest)

    @property
    def n_terms(self) -> int:
        return 8  # x, 1/2, the clamp's two terms and leak x, and the constants slope, leak and 1 - leak, round

    def magnitude(self, h: Tensor) -> Tensor:
        size: Tensor = self.module.steepest * (h.abs() + 1)  # as if nothing were clamped
        return size

    def magnitude_norm(self, h: Tensor) -> Tensor:
        return h.new_tensor(self.module.steepest)

    def lipschitz_upper_bound(self, probe: Tensor) -> Tensor:
        return probe.new_tensor(self.module.steepest)


class ChannelAffine(Layer):
    """factor * h + offset, one factor and one offset for each channel."""

    @abstractmethod
    def factor_and_offset(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (C, 1, 1), in h's dtype."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """All numbers that float32 may multiply with each other on the way."""

    def largest_weight(self) -> Tensor:
        largest = torch.stack([factor.abs().amax().double() for factor in self.factors()]).amax().clamp_min(1.0)
        return largest.square()  # a product of two that is flushed may be multiplied with a third

    def apply(self, h: Tensor) -> Tensor:
        factor, offset = self.factor_and_offset(h)
        return h * factor + offset

    @property
    def n_terms(self) -> int:
        return 4

    def magnitude(self, h: Tensor) -> Tensor:
        factor, offset = self.factor_and_offset(h)
        return factor.abs() * h.abs() + 2 * offset.abs()

    def magnitude_norm(self, h: Tensor) -> Tensor:
        return self.factor_and_offset(h)[0].abs().amax()

    def lipschitz_upper_bound(self, probe: Tensor) -> Tensor:
        return self.factor_and_offset(probe)[0].abs().amax()


class BatchNorm(ChannelAffine):
    """Batch norm in eval mode, with its running statistics."""

    def __init__(self, module: nn.BatchNorm2d) -> None:
        super().__init__(module)
        if module.running_mean is None:
            raise CannotBound("a batch norm without running statistics depends on its batch: it cannot be bounded.")

    def factors(self) -> tuple[Tensor, ...]:
        norm = self.module
        scales = (norm.running_mean, (norm.running_var.double() + norm.eps).rsqrt(), norm.weight, norm.bias)
        return tuple(scale for scale in scales if scale is not None)

    def factor_and_offset(self, h: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.module
        factor = (norm.running_var.to(h.dtype) + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight.to(h.dtype)
        offset = -norm.running_mean.to(h.dtype) * factor
        offset = offset if norm.bias is None else offset + norm.bias.to(h.dtype)
        return factor.view(-1, 1, 1), offset.view(-1, 1, 1)


class Normalisation(ChannelAffine):
    """(x - mean) / std, in a ``Classifier`` or a ``Wrapped`` network, which is its module."""

    def factors(self) -> tuple[Tensor, ...]:
        return self.module.mean, 1 / self.module.std.double()

    def factor_and_offset(self, h: Tensor) -> tuple[Tensor, Tensor]:
        std, mean = self.module.std.to(h.dtype), self.module.mean.to(h.dtype)
        return 1 / std, -mean / std


class Rescaling(ChannelAffine):
    """low + (high - low) x, the first step of a ``Wrapped`` network, which is its module."""

    def factors(self) -> tuple[Tensor, ...]:
        low, high = self.module.input_range.double()
        return low, high - low

    def factor_and_offset(self, h: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.module.input_range.to(h.dtype)
        return high - low, low


class Arrangement(Selection):
    """The layout of a ``Wrapped`` network, which is its module: the pixels in another order."""

    def apply(self, h: Tensor) -> Tensor:
        arranged: Tensor = self.module.arrange(h)
        return arranged


class Affine(Layer):
    """W h + b, with W and b in the module's ``weight`` and ``bias``."""

    def linear_map(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with these tensors for its own."""
        return F.linear(h, weight, bias)

    def parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) in this dtype."""
        weight, bias = self.module.weight, self.module.bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def apply(self, h: Tensor) -> Tensor:
        return self.linear_map(h, *self.parameters(h.dtype))

    def without_bias(self, h: Tensor) -> Tensor:
        """W h."""
        return self.linear_map(h, self.module.weight.to(h.dtype), None)

    def largest_weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.detach().abs().amax()

    @property
    def n_terms(self) -> int:
        return int(self.module.weight[0].numel())

    def magnitude(self, h: Tensor) -> Tensor:
        weight, bias = self.parameters(h.dtype)
        return self.linear_map(h.abs(), weight.abs(), None if bias is None else bias.abs())

    def magnitude_norm(self, h: Tensor) -> Tensor:
        weight = self.module.weight.to(h.dtype).abs()
        flat = weight.flatten(1)
        rows = flat.sum(1).amax()
        columns = weight.flatten(2).sum((0, 2)).amax() if weight.ndim == 4 else flat.sum(0).amax()
        return (rows * columns).sqrt()

    def lipschitz_estimate(self, probe: Tensor) -> Tensor:
        """Power iteration: 5 rounds from a fixed start."""
        with torch.no_grad():
            start = torch.linspace(1, 2, probe.numel(), dtype=probe.dtype, device=probe.device).cos().view_as(probe)
            u = start
            for _ in range(5):
                v = self.without_bias(u)
                u = torch.autograd.functional.vjp(self.without_bias, u, v)[1]
                u = u / u.norm().clamp_min(1e-12)
        return self.without_bias(u).norm()

    def lipschitz_upper_bound(self, probe: Tensor) -> Tensor:
        return largest_singular_value(self.module.weight.to(probe.dtype).flatten(1))


class Convolution(Affine):
    """A convolution with zero padding."""

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__(module)
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise CannotBound("bounds know convolutions with zero padding given as numbers.")

    def linear_map(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.module
        return F.conv2d(h, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def lipschitz_upper_bound(self, probe: Tensor) -> Tensor:
        """The singular values of the whole map where it is small.

        Elsewhere sqrt(w) times the kernel's norm, where at most w windows read one pixel.
        """
        sizes = probe.numel(), self.without_bias(probe).numel()
        if min(sizes) <= SMALL // 2 and max(sizes) <= SMALL:
            eye = torch.eye(probe.numel(), dtype=probe.dtype, device=probe.device).view(-1, *probe.shape[1:])
            return largest_singular_value(self.without_bias(eye).flatten(1))
        return super().lipschitz_upper_bound(probe) * math.sqrt(_windows(self.module))


class OrthogonalDense(Affine):
    """An orthogonal layer: its constant is 1 while it trains; proofs measure the matrix as float32 rounds it."""

    def lipschitz_estimate(self, probe: Tensor) -> Tensor:
        if self.module.free.requires_grad and torch.is_grad_enabled():
            return probe.new_ones(())
        return self.lipschitz_upper_bound(probe)


class OrthogonalConvolution(OrthogonalDense):
    """An orthogonal map of disjoint patches."""

    def linear_map(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return orthogonal.patchwise(h, weight, bias)


# The layer kind of each module.
LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Affine,
    nn.Conv2d: Convolution,
    nn.ReLU: Selection,
    nn.MaxPool2d: MaxPool,
    nn.AvgPool2d: AveragePool,
    nn.BatchNorm2d: BatchNorm,
    nn.Flatten: Selection,
    convnets.Step: Step,
    orthogonal.MaxMin: Selection,
    orthogonal.OrthogonalLinear: OrthogonalDense,
    orthogonal.OrthogonalConv: OrthogonalConvolution,
}


def layer_of(module: nn.Module) -> Layer:
    """The layer that this module is. Raises CannotBound if no bound is known for it."""
    for kind, layer in LAYERS.items():
        if computes_as(module, kind):
            return layer(module)
    raise CannotBound(f"no bound is known for a layer of kind {type(module).__name__}.")


def largest_singular_value(matrix: Tensor) -> Tensor:
    """The largest singular value of an (n, m) matrix, rounded up, 0-dim."""
    small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    # In float64 eigvalsh errs by far less than 1e-9, relative to the largest eigenvalue.
    return torch.linalg.eigvalsh(small).amax().clamp_min(0.0).sqrt() * (1 + 1e-9) + 1e-12


def _windows(module: Any) -> int:
    """At most how many windows of a convolution or a pooling layer read one pixel."""
    dilation = _pair(getattr(module, "dilation", 1))
    sizes = zip(_pair(module.kernel_size), _pair(module.stride), dilation, strict=True)
    return math.prod(math.ceil((d * (k - 1) + 1) / s) for k, s, d in sizes)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
