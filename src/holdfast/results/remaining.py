"""How many survivors may still be breakable: capture-recapture, and the spot check of a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from scipy import special, stats

from ..errors import UserError

PRECISION = 0.01  # share of all samples that a tight verdict allows to be breakable still
MOST_VOTES = 1000  # predictions per image; an evaluation takes 32
LEAST_TESTED = 20  # survivors, where so many stand: fewer show no weakness of the attacks
MOST_EXACT = 2000  # survivors for which the size of a sample is computed; more are scaled down to so many


@dataclass(frozen=True)
class RemainingVulnerable:
    """Capture-recapture estimate of the number of survivors that are still breakable.

    Attributes:
        expected: posterior mean, in samples.
        low: lower end of the central 95% interval, in samples.
        high: upper end of the central 95% interval, in samples.
        survivors: number of survivors before the two runs, without those that are certified: these cannot be broken.
        tested: number of these that both runs attacked.
        first: number of tested samples that the first run broke.
        second: number of tested samples that the second run broke.
        both: number of tested samples that both runs broke.
    """

    expected: float
    low: float
    high: float
    survivors: int
    tested: int
    first: int
    second: int
    both: int


def remaining_vulnerable(first: int, second: int, both: int, tested: int, survivors: int) -> RemainingVulnerable:
    """Estimate how many survivors two independent attack runs both missed (capture-recapture).

    Of the survivors M are breakable; a random subset of them was tested. Each run breaks a breakable one with its own
    unknown probability, uniform on [0, 1]; M has the prior 1 / (M + 1). With a, b, c broken by the first alone, the
    second alone and both, and k breakable among the tested,

        P(a, b, c | k) = k! / (a! b! c! (k-a-b-c)!) B(a+c+1, k-a-c+1) B(b+c+1, k-b-c+1)

    and k given M is hypergeometric. The estimate is the mean and central 95% of M minus the number found. Finding none
    means little unless many were tested: 0 of 5 leaves more open than 0 of 500. Some samples are harder to break than
    others, so every capture-recapture estimate is too low; by how much is measured on networks whose exact robustness
    is known (benchmarks/bench_exact.py).

    Args:
        first: number that the first run broke.
        second: number that the second run broke.
        both: number that both broke, <= first, second.
        tested: number of survivors that both runs attacked.
        survivors: number of survivors before the two runs, >= tested.

    Returns:
        The estimate, with its 95% interval and the counts.

    Raises:
        UserError: the counts contradict each other.

    Source: Seber 1982 (the model); Bayesian form as in Castledine 1981.

    >>> r = remaining_vulnerable(0, 0, 0, tested=100, survivors=100)     # P(M) ~ 1 / (M + 1)^3
    >>> round(r.expected, 1), r.low, r.high
    (0.4, 0.0, 3.0)
    >>> r = remaining_vulnerable(10, 10, 5, tested=100, survivors=100)   # Lincoln-Petersen: 10 * 10 / 5 = 20, 15 found
    >>> round(r.expected), r.low, r.high
    (6, 0.0, 19.0)
    """
    first, second, both, tested, survivors = int(first), int(second), int(both), int(tested), int(survivors)
    if not 0 <= both <= min(first, second) or first + second - both > tested or tested > survivors:
        raise UserError(
            f"remaining_vulnerable expects both <= first, second, and their union <= tested <= survivors; got "
            f"first={first}, second={second}, both={both}, tested={tested}, survivors={survivors}."
        )
    broken = first + second - both
    if survivors == 0:
        return RemainingVulnerable(0.0, 0.0, 0.0, 0, tested, first, second, both)
    k = np.arange(broken, tested + 1)  # breakable among the tested
    evidence = special.gammaln(k + 1) - special.gammaln(k - broken + 1)
    evidence = evidence + special.betaln(first + 1, k - first + 1) + special.betaln(second + 1, k - second + 1)
    m = np.arange(broken, survivors + 1)  # breakable among all survivors
    if tested == survivors:
        weight = evidence
    else:
        chance = stats.hypergeom.logpmf(k[:, None], survivors, m[None, :], tested)
        weight = special.logsumexp(chance + evidence[:, None], axis=0)
    weight = weight - np.log(m + 1.0)
    p = np.exp(weight - special.logsumexp(weight))
    total, missed = np.cumsum(p), m - broken
    low, high = (float(missed[min(int(np.searchsorted(total, q)), len(missed) - 1)]) for q in (0.025, 0.975))
    return RemainingVulnerable(float((p * missed).sum()), low, high, survivors, tested, first, second, both)


def sample_size(survivors: int, n: int, precision: float = PRECISION) -> int:
    """How many survivors are tested, for a precision.

    Args:
        survivors: number that may be breakable, >= 0.
        n: number of all samples, >= 1.
        precision: share of all samples that may be expected to be breakable if the tests break nothing, in (0, 1].

    Returns:
        The smallest number tested for which ``remaining_vulnerable(0, 0, 0, tested, survivors).expected`` is at most
        ``precision * n``, but at least 20; all survivors where these are not enough. More than 2,000 survivors are
        scaled down to so many, which makes the sample a little larger than necessary.

    >>> [sample_size(survivors, n) for survivors, n in ((10, 100), (54, 100), (180, 300), (800, 1000))]
    [10, 26, 29, 31]
    >>> [sample_size(800, 1000, precision) for precision in (0.1, 0.003, 0.001)]
    [20, 134, 407]
    """
    scale = min(1.0, MOST_EXACT / max(survivors, 1))
    size = _size(round(survivors * scale), precision * n * scale)
    return min(survivors, max(LEAST_TESTED, size))


@cache
def _size(survivors: int, allowed: float) -> int:
    """The smallest sample of these survivors that leaves so many expected, by bisection."""
    low, high = 0, 1  # low is too few
    while high < survivors and remaining_vulnerable(0, 0, 0, high, survivors).expected > allowed:
        low, high = high, 2 * high
    high = min(high, survivors)
    while high - low > 1:
        middle = (low + high) // 2
        enough = remaining_vulnerable(0, 0, 0, middle, survivors).expected <= allowed
        low, high = (low, middle) if enough else (middle, high)
    return high


@dataclass(frozen=True)
class SpotCheck:
    """Outcome of full-length attacks on a few survivors.

    Attributes:
        near: number attacked among those with the smallest margins (all of these).
        near_broken: number of them broken.
        far: number sampled at random from the rest and attacked.
        far_broken: number of them broken.
        rest: size of the rest.

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
        """How many of the rest that were not attacked these attacks would break: (rest - far) * far_broken / far."""
        return round(self.far_broken / self.far * (self.rest - self.far), 1) if self.far else 0.0

    @property
    def high(self) -> float:
        """Its upper bound: the one-sided 95% Clopper-Pearson bound of the share, times the rest, less those broken."""
        if self.far in (0, self.rest):
            return 0.0
        share = (
            1.0
            if self.far_broken == self.far
            else float(stats.beta.ppf(0.95, self.far_broken + 1, self.far - self.far_broken))
        )
        return round(min(share * self.rest - self.far_broken, self.rest - self.far), 1)


@dataclass(frozen=True)
class Remaining(RemainingVulnerable):
    """What may still be breakable of a row's samples, in samples: the estimate, and what limits the evaluation.

    Where the spot checks suggest more than capture-recapture, ``expected`` and ``high`` are theirs.

    Attributes:
        spot_checks: full-length attacks on a sample of the survivors, one per network; empty where there are none.
        unfinished: a budget ended the attacks before the suite did.
        votes: number of predictions per image whose majority counts, 1 to 1,000; 1 for a deterministic model.

    Raises:
        UserError: ``votes`` is outside of its range.
    """

    spot_checks: tuple[SpotCheck, ...] = ()
    unfinished: bool = False
    votes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.votes <= MOST_VOTES:
            raise UserError(f"votes must be 1 to {MOST_VOTES} predictions per image, got {self.votes}.")


def sum_remaining(
    estimates: Sequence[RemainingVulnerable],
    spot_checks: Sequence[SpotCheck] = (),
    *,
    unfinished: bool = False,
    votes: int = 1,
) -> Remaining:
    """What may still be breakable of one row, the samples of its networks counted together.

    Args:
        estimates: of the networks (folds), at least one; only their counts are read.
        spot_checks: of the networks that have one.
        unfinished: a budget ended the attacks before the suite did.
        votes: number of predictions per image whose majority counts.

    Returns:
        The capture-recapture estimate of the summed counts. Where the spot checks suggest more, ``expected`` and
        ``high`` are theirs.

    Raises:
        UserError: the counts contradict each other.
    """
    first, second, both, tested, survivors = (
        sum(getattr(one, name) for one in estimates) for name in ("first", "second", "both", "tested", "survivors")
    )
    whole = remaining_vulnerable(first, second, both, tested, survivors)
    expected = max(whole.expected, sum(one.expected for one in spot_checks))
    high = max(whole.high, expected)
    return Remaining(
        **{**asdict(whole), "expected": expected, "high": high},
        spot_checks=tuple(spot_checks),
        unfinished=unfinished,
        votes=votes,
    )
