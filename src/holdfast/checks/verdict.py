"""The verdict on a claim, from the attacks and the findings of the checks. Plain data and counting, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..results import Finding, Remaining, Verdict
from .findings import CONFIDENCE, lower_bound_99

__all__ = ["CONFIDENCE", "PGD50", "ROBUST", "TOLERANCE", "Claim", "judge"]

PGD50, ROBUST = "pgd50", "robust"  # claims: the accuracy under PGD-50 alone, and the robust accuracy of the evaluation
TOLERANCE = 0.01  # error that a claim may have, as a fraction of all samples


@dataclass(frozen=True)
class Claim:
    """A claimed accuracy.

    Args:
        name: ROBUST, PGD50 or another name that checks apply to.
        correct: one entry per sample, true where the claim counts it as correct under attack.
    """

    name: str
    correct: Sequence[Any]


def judge(
    claim: Claim, robust: Sequence[Any], findings: Sequence[Finding], remaining: Remaining | None = None
) -> Verdict:
    """What a claimed accuracy is worth.

    * void: a check found the evaluation invalid.
    * refuted: attacks broke samples that the claim counts as correct: significantly more than 1% of all samples, at
      99% confidence (Clopper-Pearson).
    * loose: not refuted, but a check that applies to the claim fires, or more than 1% of the samples are expected to
      be breakable still.
    * tight: none of these.

    Args:
        claim: what is claimed.
        robust: one entry per sample, in the same order: correct after all attacks.
        findings: of the checks.
        remaining: estimate of the survivors that are still breakable; None if there is none.

    Returns:
        The verdict and its reason.

    >>> print(judge(Claim("pgd50", [1, 1, 1, 1, 0]), [0, 0, 0, 0, 0], []).status)
    refuted
    >>> judge(Claim("pgd50", [1, 1, 0]), [1, 0, 0], []).why
    'other attacks broke 1 more of 3 samples, not significantly more than 1%'
    >>> judge(Claim("robust", [1, 0]), [1, 0], [])
    Verdict(status='tight', why='attacks of different kinds agree')
    """
    invalid = [finding for finding in findings if finding.fires and finding.void]
    if invalid:
        return Verdict("void", invalid[0].why)
    n = len(claim.correct)
    broken = sum(bool(claimed) and not survived for claimed, survived in zip(claim.correct, robust, strict=True))
    if lower_bound_99(broken, n) > TOLERANCE:
        return Verdict("refuted", f"other attacks broke {broken} more of {n} samples ({broken / n:.1%})")
    firing = [finding for finding in findings if finding.fires and claim.name in finding.claims]
    if firing:
        others = f", and {len(firing) - 1} more checks fire" if len(firing) > 1 else ""
        return Verdict("loose", firing[0].why + others)
    agreement = (
        f"other attacks broke {broken} more of {n} samples, not significantly more than {TOLERANCE:.0%}"
        if broken
        else "attacks of different kinds agree"
    )
    if remaining is None:
        return Verdict("tight", agreement)
    estimate = (
        f"{remaining.expected:.1f} more of {n} samples are expected to be breakable, at most {remaining.high:.0f}"
    )
    if remaining.expected / n > TOLERANCE:
        return Verdict("loose", estimate)
    return Verdict("tight", f"{agreement}; {estimate}")
