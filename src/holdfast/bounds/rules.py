"""The primitive operators: how each maps a box, how lines bound it from both sides, how float32 rounds it.

Four kinds. An affine operator is exact for lines; AFFINE says which of its arguments multiply and which are added, and
how many products it sums. A smooth function of one variable is bounded by samples and by its second derivative: CURVED.
A ReLU and a product of two values have rules of their own. To bound another operator, add a line to one of the tables;
a composite one goes to ``composites.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .graph import CannotBound, Constant, Graph, Operation, leaves_of
from .rounding import TINY


@dataclass(frozen=True)
class Affine:
    """An affine operator.

    Args:
        terms: how many products are summed for one output, from the operation and its constants; 0: nothing rounds.
        weights: arguments that multiply, where they are constants.
        biases: arguments that are added, where they are constants.
        absolute: the operator with every sign positive, where it is another one.
        varying: arguments that may be values, where not all may: the operator is affine in these alone.
    """

    terms: int | Callable[[Operation, Sequence[Tensor], Graph], int] = 0
    weights: tuple[int | str, ...] = ()
    biases: tuple[int | str, ...] = ()
    absolute: Callable[..., Any] | None = None
    varying: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Curved:
    """A function of one variable, smooth but for its kinks.

    Args:
        curvature: a bound of its absolute second derivative on [lo, hi], both tensors, away from kinks.
        monotone: whether it increases.
        kinks: where its derivative jumps.
        least: of its values, where samples alone would not give it.
        slack: by how much the kernel may differ from a smooth function, as softplus does beyond its threshold.
        cancels: what the kernel loses where it adds numbers of the size of its argument, in units of that size: a gelu
            is x (1 + erf), also where erf is almost -1.
    """

    curvature: Callable[[Operation, Tensor, Tensor], Tensor | float]
    monotone: bool = False
    kinks: tuple[float, ...] = ()
    least: float = -math.inf
    slack: Callable[[Operation], float] = lambda operation: 0.0
    cancels: float = 0.0


def _inputs_per_output(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of a sum or a mean over whole dimensions."""
    size = math.prod(graph.operations[operation.reads[0]].shape)
    return max(1, size // max(1, math.prod(operation.shape)))


def _inputs_of_mean(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """A fused norm computes x scale - mean scale, and not (x - mean) scale: as if its mean rounded three times more."""
    return _inputs_per_output(operation, constants, graph) + 3


def _all_inputs(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    return math.prod(graph.operations[operation.reads[0]].shape)


def _of_kernel(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of a convolution, transposed or not."""
    weight = constants[operation.args[1].number]
    return max(weight[0].numel(), weight[:, 0].numel())


def _inner(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of a product of matrices, whichever of them is the constant."""
    left = leaves_of(operation)[-2]
    shape = constants[left.number].shape if isinstance(left, Constant) else graph.operations[left.number].shape
    return shape[-1]


def _window(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of an average pool."""
    if len(operation.args) > 6 and (operation.args[6] or 1) < 0:
        raise CannotBound(f"bounds know average pooling by a positive divisor, got {operation.args[6]}.")
    kernel = operation.args[1]
    return math.prod(kernel) ** (2 if len(kernel) == 1 else 1)


def _of_positions(operation: Operation, constants: Sequence[Tensor], graph: Graph) -> int:
    """Of a bilinear interpolation, whose weights come from positions in float32: they round as the largest of them."""
    return 16 + 8 * max(*graph.operations[operation.reads[0]].shape[-2:], *operation.shape[-2:])


def batch_norm(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *more: Any) -> tuple[Tensor]:
    """x factor + offset, one of each for a channel, with running statistics."""
    factor = (var + more[-1]).rsqrt()
    factor = factor if weight is None else factor * weight
    offset = -mean * factor if bias is None else bias - mean * factor
    shape = (1, -1, *[1] * (x.ndim - 2))
    return (x * factor.view(shape) + offset.view(shape),)


def batch_norm_terms(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *more: Any) -> tuple[Tensor]:
    """The sum of the absolute terms, however a kernel arranges them: all arguments are absolute values here."""
    size = batch_norm(x, weight, None, torch.zeros_like(mean), var, *more)[0]
    size = size + 2 * batch_norm(torch.zeros_like(x), weight, None, -mean, var, *more)[0]
    return (size if bias is None else size + 2 * bias.view(1, -1, *[1] * (x.ndim - 2)),)


MOVE = Affine()
NORMS = ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")
SCALED = Affine(1, (0, 1))
AFFINE: dict[str, Affine] = {
    "convolution": Affine(_of_kernel, (1,), (2,), varying=(0, 2)),
    "addmm": Affine(_inner, (1, 2, "alpha", "beta"), (0,)),
    "mm": Affine(_inner, (0, 1)),
    "bmm": Affine(_inner, (0, 1)),
    **dict.fromkeys(NORMS, Affine(8, (1, 3), (2,), varying=(0,))),  # 6 on a CPU; a GPU's rsqrt has a few more units
    "mul": SCALED,
    "div": Affine(1, (1,), varying=(0,)),
    "add": Affine(2, ("alpha",), (0, 1)),
    "sub": Affine(2, ("alpha",), (0, 1), torch.add),
    "rsub": Affine(2, (2, "alpha"), (1,), lambda x, other, alpha=1: other + alpha * x),
    "neg": Affine(0, absolute=torch.clone),
    "sum": Affine(_inputs_per_output),
    "mean": Affine(_inputs_of_mean),
    "cumsum": Affine(_all_inputs),
    "avg_pool2d": Affine(_window),
    "_adaptive_avg_pool2d": Affine(_all_inputs),
    "upsample_bilinear2d": Affine(_of_positions),
    "where": Affine(0, (), (1, 2), varying=(1, 2)),
    "constant_pad_nd": Affine(0, (), (2,)),
    "cat": Affine(0, (), (0,)),
    "stack": Affine(0, (), (0,)),
    **dict.fromkeys(
        (
            "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "squeeze", "unsqueeze",
            "expand", "slice", "select", "split", "split_with_sizes", "unbind", "index_select", "index", "flip", "roll",
            "clone", "alias", "_to_copy", "lift_fresh", "reflection_pad2d", "replication_pad2d", "repeat",
            "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "upsample_nearest2d",
            "im2col", "diagonal", "copy", "movedim", "slice_scatter", "select_scatter",
        ),
        MOVE,
    ),
}  # fmt: skip


def _constant(bound: float) -> Callable[[Operation, Tensor, Tensor], Tensor | float]:
    return lambda operation, lo, hi: bound


def _positive(bound: Callable[[Tensor], Tensor]) -> Callable[[Operation, Tensor, Tensor], Tensor | float]:
    """Of a function that is smooth on x > 0 alone, and less and less curved there."""
    return lambda operation, lo, hi: torch.where(lo > 2 * TINY, bound(lo.clamp_min(TINY)), math.inf)


def _elu(operation: Operation, lo: Tensor, hi: Tensor) -> Tensor:
    """Of alpha (exp(inner x) - 1) on x < 0; 0 beyond."""
    alpha, scale, inner = _elu_settings(operation)
    return abs(alpha * scale) * inner * inner * torch.maximum((inner * lo).exp(), torch.ones_like(lo))


def _elu_settings(operation: Operation) -> tuple[float, float, float]:
    """(alpha, scale, input scale) of elu and celu."""
    given = [float(each) for each in operation.args[1:]]
    if operation.name == "celu":
        alpha = given[0] if given else 1.0
        return alpha, 1.0, 1.0 / alpha
    alpha, scale, inner = [*given, *[1.0] * (3 - len(given))]
    return alpha, scale, inner


def _softplus(operation: Operation) -> tuple[float, float]:
    """(beta, threshold)."""
    beta, threshold = [*(float(each) for each in operation.args[1:]), *(1.0, 20.0)[len(operation.args) - 1 :]]
    return beta, threshold


def _softplus_slack(operation: Operation) -> float:
    """The jump at the threshold, beyond which the kernel returns x; and what it may flush to zero before it divides."""
    beta, threshold = _softplus(operation)
    return (math.log1p(math.exp(min(-threshold, 700.0))) + 2 * TINY) / abs(beta)


CURVED: dict[str, Curved] = {
    "sigmoid": Curved(_constant(0.0963), True),
    "tanh": Curved(_constant(0.77), True),
    "erf": Curved(_constant(0.97), True),
    "gelu": Curved(_constant(1.0), cancels=16.0),
    "silu": Curved(_constant(0.501)),
    "mish": Curved(_constant(1.0)),
    "softplus": Curved(lambda operation, lo, hi: 0.25 * abs(_softplus(operation)[0]), True, slack=_softplus_slack),
    "log_sigmoid_forward": Curved(_constant(0.25), True),
    **dict.fromkeys(("elu", "celu"), Curved(_elu, False, (0.0,))),
    "hardswish": Curved(_constant(0.334), False, (-3.0, 3.0), cancels=4.0),
    "abs": Curved(_constant(0.0), False, (0.0,), 0.0),
    "sin": Curved(_constant(1.0)),
    "cos": Curved(_constant(1.0)),
    "atan": Curved(_constant(0.65), True),
    "pow": Curved(_constant(2.0), least=0.0),
    "exp": Curved(lambda operation, lo, hi: hi.exp(), True),
    "expm1": Curved(lambda operation, lo, hi: hi.exp(), True),
    "log": Curved(_positive(lambda lo: lo**-2), True),
    "log1p": Curved(lambda operation, lo, hi: _positive(lambda low: low**-2)(operation, 1 + lo, hi), True),
    "sqrt": Curved(_positive(lambda lo: 0.25 * lo**-1.5), True),
    "rsqrt": Curved(_positive(lambda lo: 0.75 * lo**-2.5)),
    "reciprocal": Curved(lambda operation, lo, hi: _away_from_zero(lo, hi)),
}  # fmt: skip


def _away_from_zero(lo: Tensor, hi: Tensor) -> Tensor:
    nearest = torch.where(lo > 0, lo, torch.where(hi < 0, -hi, torch.zeros_like(lo)))
    return torch.where(nearest > 2 * TINY, 2 * nearest.clamp_min(TINY) ** -3, math.inf)
