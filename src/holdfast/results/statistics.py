"""Intervals of proportions and over seeds, paired tests, and the correction for many questions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from ..errors import UserError
from .schema import Interval


def proportion(k: int, n: int) -> Interval:
    """k of n, with the exact 95% interval of Clopper and Pearson (Biometrika 26, 1934).

    low = Beta(k, n-k+1) at 0.025, high = Beta(k+1, n-k) at 0.975; for k = n, low = 0.025^(1/n).
    Raises UserError unless 0 <= k <= n and n >= 1.

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


def over_seeds(values: Iterable[float]) -> Interval:
    """The mean over seeds and its 95% t interval, mean +- t_{0.975, n-1} sd / sqrt(n) (Student 1908), within [0, 1].

    One seed says nothing of the spread between seeds: its interval is [0, 1]. (A table shows a single run with the
    interval over its samples instead.) Equal values give an interval of no width.

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
    n, mean = len(x), min(max(math.fsum(x) / len(x), min(x)), max(x))
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)


def mcnemar(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Exact two-sided p-value that two networks differ on the same samples (McNemar, Psychometrika 12, 1947).

    Of the m samples where exactly one is right, the smaller share k is Binomial(m, 1/2): p = min(1, 2 P(X <= k)).
    It speaks of these two networks, not of the losses they were trained with. Raises UserError on unequal lengths.

    >>> mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1])    # 5 against 1: 2 * (1 + 6) / 64
    0.21875
    """
    if len(a) != len(b):
        raise UserError(f"mcnemar expects paired samples, got {len(a)} and {len(b)}.")
    only_a = sum(bool(p) and not q for p, q in zip(a, b, strict=True))
    only_b = sum(bool(q) and not p for p, q in zip(a, b, strict=True))
    m = only_a + only_b
    return min(1.0, 2 * float(stats.binom.cdf(min(only_a, only_b), m, 0.5))) if m else 1.0


@dataclass(frozen=True)
class Paired:
    """p-value, mean difference a - b, its 95% interval, and the number of pairs."""

    p: float
    difference: float
    low: float
    high: float
    n: int


def paired_t(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Paired t test over seeds (Student 1908): d_i = a_i - b_i, t = mean(d) sqrt(n) / sd(d), n - 1 degrees of freedom.

    a, b: one value per seed, in the same order of seeds, two or more. Identical differences leave no spread: p is then
    1 when they are zero and 0 otherwise, which says little with few seeds. Raises UserError on other lengths.

    >>> r = paired_t([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])     # t = 0.2 sqrt(3) / 0.1; with 2 df p = 1 - t / sqrt(t^2 + 2)
    >>> round(r.difference, 3), round(r.low, 3), round(r.high, 3), round(r.p, 4), round(1 - 12**0.5 / 14**0.5, 4)
    (0.2, -0.048, 0.448, 0.0742, 0.0742)
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"paired_t expects two or more values per side and as many on each, got {len(a)} and {len(b)}.")
    d = [float(p) - float(q) for p, q in zip(a, b, strict=True)]
    mean, half = _mean_half(d)
    n = len(d)
    error = half / float(stats.t.ppf(0.975, n - 1))
    if error < 1e-15:
        return Paired(1.0 if abs(mean) < 1e-15 else 0.0, mean, mean, mean, n)
    return Paired(2 * float(stats.t.sf(abs(mean) / error, n - 1)), mean, mean - half, mean + half, n)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for m questions asked (Holm, Scandinavian Journal of Statistics 6, 1979), in the given order.

    In rising order, adjusted p_(i) = max_{k <= i} min(1, (m - k + 1) p_(k)).

    >>> holm([0.01, 0.04, 0.03])      # 3 * 0.01; 2 * 0.03; then max(0.06, 1 * 0.04)
    [0.03, 0.06, 0.06]
    """
    out, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = worst
    return out


@dataclass(frozen=True)
class RemainingVulnerable:
    """How many samples are expected to be breakable still, with a 95% interval, in samples.

    survivors: before the two runs; tested: how many of these both tried; first, second, both: how many of those
    each run, and both, broke.
    """

    expected: float
    low: float
    high: float
    survivors: int
    tested: int
    first: int
    second: int
    both: int


def remaining_vulnerable(first: int, second: int, both: int, tested: int, standing: int) -> RemainingVulnerable:
    """What two independent runs on the survivors have both missed: capture-recapture.

    Of ``standing`` survivors M are breakable; ``tested`` drawn at random were tried. Each run breaks a breakable one
    with its own unknown probability, uniform on [0, 1]; M has the prior 1 / (M + 1). With a, b, c broken by the first
    alone, the second alone and both, and k breakable among the tested,

        P(a, b, c | k) = k! / (a! b! c! (k-a-b-c)!) B(a+c+1, k-a-c+1) B(b+c+1, k-b-c+1)

    and k given M is hypergeometric. Returned: mean and central 95% of M minus what was found. Nothing found says little
    unless much was tried: 0 of 5 leaves more open than 0 of 500. Some samples are harder than others, which makes every
    capture-recapture estimate low; how low is measured on networks whose truth is known (benchmarks/bench_exact.py).

    Raises UserError unless both <= first, second <= tested <= standing.
    Source: Seber 1982 (the model); Bayesian form as in Castledine 1981.

    >>> r = remaining_vulnerable(0, 0, 0, tested=100, standing=100)     # P(M) ~ 1 / (M + 1)^3
    >>> round(r.expected, 1), r.low, r.high
    (0.4, 0.0, 3.0)
    >>> r = remaining_vulnerable(10, 10, 5, tested=100, standing=100)   # Lincoln and Petersen: 10 * 10 / 5 = 20, 15 were found
    >>> round(r.expected), r.low, r.high
    (6, 0.0, 19.0)
    """
    first, second, both, tested, standing = int(first), int(second), int(both), int(tested), int(standing)
    if not 0 <= both <= min(first, second) or first + second - both > tested or tested > standing:
        raise UserError(
            f"remainder expects both <= first, second, and their union <= tested <= standing; got first={first}, "
            f"second={second}, both={both}, tested={tested}, standing={standing}."
        )
    found = first + second - both
    if standing == 0:
        return RemainingVulnerable(0.0, 0.0, 0.0, 0, tested, first, second, both)
    k = np.arange(found, tested + 1)  # breakable among the tested
    evidence = special.gammaln(k + 1) - special.gammaln(k - found + 1)
    evidence = evidence + special.betaln(first + 1, k - first + 1) + special.betaln(second + 1, k - second + 1)
    m = np.arange(found, standing + 1)  # breakable among all that stand
    if tested == standing:
        weight = evidence
    else:
        chance = stats.hypergeom.logpmf(k[:, None], standing, m[None, :], tested)
        weight = special.logsumexp(chance + evidence[:, None], axis=0)
    weight = weight - np.log(m + 1.0)
    p = np.exp(weight - special.logsumexp(weight))
    total, left = np.cumsum(p), m - found
    low, high = (float(left[min(int(np.searchsorted(total, q)), len(left) - 1)]) for q in (0.025, 0.975))
    return RemainingVulnerable(float((p * left).sum()), low, high, standing, tested, first, second, both)


@dataclass(frozen=True)
class SpotCheck:
    """What full-length attacks did to a few survivors: the ``near`` ones with the smallest margins, all of them, and
    ``far`` ones drawn at random from the ``rest``.

    >>> SpotCheck(near=32, near_broken=1, far=32, far_broken=0, rest=320).high  # 1 - 0.05^(1/32) = 8.9% of 320
    28.6
    """

    near: int
    near_broken: int
    far: int
    far_broken: int
    rest: int

    @property
    def expected(self) -> float:
        """How many more of the rest the same attacks would break: far_broken / far of those that were not tried."""
        return round(self.far_broken / self.far * (self.rest - self.far), 1) if self.far else 0.0

    @property
    def high(self) -> float:
        """The upper end of that: the one-sided 95% Clopper-Pearson bound of the share times the rest."""
        if self.far in (0, self.rest):
            return 0.0
        share = (
            1.0
            if self.far_broken == self.far
            else float(stats.beta.ppf(0.95, self.far_broken + 1, self.far - self.far_broken))
        )
        return round(min(share * self.rest - self.far_broken, self.rest - self.far), 1)


@dataclass(frozen=True)
class Remaining:
    """What may still be breakable of a row's samples, in samples: the estimate, and what limits the evaluation.

    Attributes:
        expected: expected number of survivors still breakable: the larger of capture-recapture and spot check.
        low: lower end of the 95% interval.
        high: upper end of the 95% interval.
        survivors: number of survivors before the two runs.
        tested: number of these that both runs attacked.
        first: number of tested samples that the first run broke.
        second: number of tested samples that the second run broke.
        both: number of tested samples that both runs broke.
        spot_check: full-length attacks on a sample of the survivors; None where the suite has none.
        unfinished: a budget ended the attacks before the suite did.
        votes: number of predictions per image whose majority counts; 1 for a deterministic model.

    >>> left = Remaining(0.4, 0, 3, 100, 100, 0, 0, 0, SpotCheck(32, 1, 32, 0, 320))
    >>> left.to_dict()["spot_check"]["high"], Remaining.from_dict(left.to_dict()) == left
    (28.6, True)
    """

    expected: float
    low: float
    high: float
    survivors: int
    tested: int
    first: int
    second: int
    both: int
    spot_check: SpotCheck | None = None
    unfinished: bool = False
    votes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As results.json stores it: the fields, and of the spot check its derived ``expected`` and ``high`` too."""
        out = dataclasses.asdict(self)
        if self.spot_check is not None:
            out["spot_check"] |= {"expected": self.spot_check.expected, "high": self.spot_check.high}
        return out

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Remaining:
        """The inverse of :meth:`to_dict`."""
        counts = stored.get("spot_check")
        spot = SpotCheck(**{f.name: counts[f.name] for f in dataclasses.fields(SpotCheck)}) if counts else None
        plain = {f.name: stored[f.name] for f in dataclasses.fields(Remaining) if f.name in stored}
        return Remaining(**{**plain, "spot_check": spot})
