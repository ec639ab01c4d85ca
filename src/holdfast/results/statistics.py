"""Intervals of proportions and over seeds, paired tests, multiple-testing correction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from ..errors import UserError
from ..user_input import typed
from .schema import Interval


@typed
def proportion(k: int, n: int) -> Interval:
    """k of n, with the exact 95% interval.

    low = Beta(k, n-k+1) at 0.025, high = Beta(k+1, n-k) at 0.975; for k = n, low = 0.025^(1/n).

    Args:
        k: number of successes, 0 <= k <= n.
        n: number of trials, >= 1.

    Returns:
        The proportion and its Clopper-Pearson interval.

    Raises:
        UserError: k or n out of range.

    Source: Clopper and Pearson, Biometrika 26, 1934.

    >>> i = proportion(10, 10)
    >>> [round(v, 3) for v in (i.value, i.low, i.high)], round(0.025 ** 0.1, 3)
    ([1.0, 0.692, 1.0], 0.692)
    """
    k, n = int(k), int(n)
    if not 0 <= k <= n or n < 1:
        raise UserError(f"proportion expects 0 <= k <= n and n >= 1, got k={k}, n={n}.")
    low = 0.0 if k == 0 else float(stats.beta.ppf(0.025, k, n - k + 1))
    high = 1.0 if k == n else float(stats.beta.ppf(0.975, k + 1, n - k))
    return Interval(k / n, min(low, k / n), max(high, k / n))


@typed
def over_seeds(values: Iterable[float]) -> Interval:
    """The mean over seeds and its 95% t interval, mean +- t_{0.975, n-1} sd / sqrt(n), clipped to [0, 1].

    One seed does not determine the spread between seeds: its interval is [0, 1]. (A table shows a single run with the
    interval over its samples instead.) Equal values give an interval of zero width.

    Args:
        values: one proportion per seed, each in [0, 1].

    Returns:
        The mean and its interval.

    Raises:
        UserError: no values, or one outside [0, 1].

    Source: Student 1908.

    >>> over_seeds([0.4])
    Interval(value=0.4, low=0.0, high=1.0)
    >>> i = over_seeds([0.4, 0.5, 0.6])      # 0.5 +- 4.303 * 0.1 / sqrt(3)
    >>> round(i.value, 3), round(i.low, 3), round(i.high, 3)
    (0.5, 0.252, 0.748)
    """
    x = [float(v) for v in values]
    if not x or not all(0 <= v <= 1 for v in x):
        raise UserError(f"over_seeds expects one or more proportions in [0, 1], got {x}.")
    if len(x) == 1:
        return Interval(x[0], 0.0, 1.0)
    mean, half = _mean_half(x)
    return Interval(mean, max(0.0, mean - half), min(1.0, mean + half))


def _mean_half(x: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% t interval."""
    n, mean = len(x), min(max(math.fsum(x) / len(x), min(x)), max(x))
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)


@typed
def mcnemar(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Exact two-sided McNemar test of two networks on the same samples.

    Of the m samples where exactly one is correct, the smaller count k is Binomial(m, 1/2): p = min(1, 2 P(X <= k)).
    The test compares these two networks, not the losses they were trained with.

    Args:
        a: one entry per sample, true where the first network is correct.
        b: the same of the second network.

    Returns:
        The p-value.

    Raises:
        UserError: the lengths differ.

    Source: McNemar, Psychometrika 12, 1947.

    >>> mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1])    # 5 against 1: 2 * (1 + 6) / 64
    0.21875
    """
    if len(a) != len(b):
        raise UserError(f"mcnemar expects paired samples, got {len(a)} and {len(b)}.")
    only_a = sum(bool(p) and not q for p, q in zip(a, b, strict=True))
    only_b = sum(bool(q) and not p for p, q in zip(a, b, strict=True))
    return mcnemar_of_counts(only_a, only_b)


def mcnemar_of_counts(only_a: int, only_b: int) -> float:
    """``mcnemar`` where it is known on how many samples only the first network is correct, and only the second."""
    m = only_a + only_b
    return min(1.0, 2 * float(stats.binom.cdf(min(only_a, only_b), m, 0.5))) if m else 1.0


@dataclass(frozen=True)
class Paired:
    """Result of a paired t test.

    Attributes:
        p: two-sided p-value.
        difference: mean difference a - b.
        low: lower end of its 95% interval.
        high: upper end of its 95% interval.
        n: number of pairs.
    """

    p: float
    difference: float
    low: float
    high: float
    n: int


@typed
def paired_t(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Paired t test over seeds: d_i = a_i - b_i, t = mean(d) sqrt(n) / sd(d), n - 1 degrees of freedom.

    Identical differences have no spread: p is then 1 when they are zero and 0 otherwise, which means little with few
    seeds.

    Args:
        a: one value per seed, two or more.
        b: the same, in the same order of seeds.

    Returns:
        p-value, mean difference and its 95% interval.

    Raises:
        UserError: the lengths differ, or there are fewer than two pairs.

    Source: Student 1908.

    >>> r = paired_t([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])     # t = 0.2 sqrt(3) / 0.1; with 2 df p = 1 - t / sqrt(t^2 + 2)
    >>> round(r.difference, 3), round(r.low, 3), round(r.high, 3), round(r.p, 4), round(1 - 12**0.5 / 14**0.5, 4)
    (0.2, -0.048, 0.448, 0.0742, 0.0742)
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"paired_t expects two or more values per side, equally many, got {len(a)} and {len(b)}.")
    d = [float(p) - float(q) for p, q in zip(a, b, strict=True)]
    mean, half = _mean_half(d)
    n = len(d)
    error = half / float(stats.t.ppf(0.975, n - 1))
    if error < 1e-15:
        return Paired(1.0 if abs(mean) < 1e-15 else 0.0, mean, mean, mean, n)
    return Paired(2 * float(stats.t.sf(abs(mean) / error, n - 1)), mean, mean - half, mean + half, n)


@typed
def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for m comparisons.

    In ascending order, adjusted p_(i) = max_{k <= i} min(1, (m - k + 1) p_(k)).

    Args:
        ps: the m p-values.

    Returns:
        The adjusted p-values in the given order.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.

    >>> holm([0.01, 0.04, 0.03])      # 3 * 0.01; 2 * 0.03; then max(0.06, 1 * 0.04)
    [0.03, 0.06, 0.06]
    """
    out, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = worst
    return out
