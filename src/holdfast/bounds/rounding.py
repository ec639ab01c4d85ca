"""What float32 may lose: bounds hold for the numbers that a computer gets, not for exact arithmetic alone."""

from __future__ import annotations

from torch import Tensor

UNIT = 2.0**-24  # the unit roundoff of float32, in which networks are evaluated
TINY = 2.0**-126  # the smallest normal float32: a kernel may flush anything smaller to zero
HUGE = 2.0**100  # sums of absolute terms beyond this may overflow float32 on the way (its largest is 2^128)
# A sigmoid, an exponential and their like are computed to a few units; approximations of vector libraries count too.
FUNCTION = 32 * UNIT
DOUBLE = 2.0**-46  # what lines of float64 lose, relative to the values they bound: 64 units and more


def underflow(terms: int, largest: Tensor, largest_weight: Tensor | float) -> Tensor:
    """At most how much a sum of ``terms`` products loses where float32 flushes anything below TINY to zero, (N,).

    A flushed input or weight loses at most TINY times the other factor, and a flushed product or sum TINY.

    Args:
        terms: number of products.
        largest: (N,), no input is larger in absolute value.
        largest_weight: 0-dim, no factor of an input is larger in absolute value.
    """
    return 4 * TINY * (terms + 2) * (1 + largest + largest_weight)


def gamma(terms: int) -> float:
    """The relative rounding error of a float32 sum of ``terms`` products and a bias, in any order of summation.

    The error is at most gamma times the sum of the absolute terms.

    >>> gamma(0) == 2 * UNIT / (1 - 2 * UNIT)
    True
    """
    return (terms + 2) * UNIT / (1 - (terms + 2) * UNIT)
