"""The verdict on a claim, from the attacks and the findings of the checks. Plain data and counting, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..results import PRECISION, Finding, Remaining, Verdict, percent, proportion
from .findings import CONFIDENCE, lower_bound_99

__all__ = ["CONFIDENCE", "PGD50", "ROBUST", "TOLERANCE", "Claim", "judge"]

PGD50, ROBUST = "pgd50", "robust"  # claims: the accuracy under PGD-50 alone, and the robust accuracy of the evaluation
TOLERANCE = PRECISION  # error that a claim may have, as a fraction of all samples


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
    claim: Claim,
    robust: Sequence[Any],
    findings: Sequence[Finding],
    remaining: Remaining | None = None,
    *,
    attack_kinds: Sequence[str] = (),
    certified: Sequence[Any] | None = None,
    samples: int | None = None,
) -> Verdict:
    """What a claimed accuracy is worth.

    * void: a check found the evaluation invalid.
    * refuted: attacks broke samples that the claim counts as correct: significantly more than 1% of all samples, at
      99% confidence (Clopper-Pearson).
    * exact: every sample is decided. Those that the claim counts are certified, a proof, and the others misclassified
      or broken by an adversarial example; a claim that counts none needs no proof. Unless a check that makes proofs
      vacuous fires.
    * loose: neither of these, but a check that applies to the claim fires, or more than 1% of the samples are expected
      to be breakable still.
    * tight: none of these. It is empirical, of these samples and these attacks; only a certificate is a proof.

    Of several checks that fire, the reason is that of the first: checks are listed with the weightiest first.

    The words depend on the number of samples: the same gap may be tight on 360 and refuted on 1,797. So the reason
    states the gap in points, with its interval and the number of samples, and says where they are too few to tell.

    Args:
        claim: what is claimed.
        robust: one entry per sample, in the same order: correct after all attacks.
        findings: of the checks.
        remaining: estimate of the survivors that are still breakable; None if there is none.
        attack_kinds: the attacks that ran, for the reason of a tight verdict.
        certified: one entry per sample, in the same order: proved to be robust; None where no bound is known.
        samples: number of samples that ``remaining`` is about; None for as many as the claim has.

    Returns:
        The verdict and its reason.

    >>> print(judge(Claim("pgd50", [1, 1, 1, 1, 0]), [0, 0, 0, 0, 0], []).status)
    refuted
    >>> judge(Claim("pgd50", [1, 1, 0]), [1, 0, 0], []).why
    'empirical: 33.3 points too high (95% interval 0.8 to 90.6; other attacks broke 1 more of 3 samples), too few \
images to tell whether it is more than 1 point'
    >>> judge(Claim("robust", [1, 0]), [1, 0], [], attack_kinds=("apgd", "pgd", "square")).why
    'empirical: no attack of 3 kinds broke more of these 2 samples'
    >>> judge(Claim("robust", [1, 0]), [1, 0], [], certified=[1, 0])
    Verdict(status='exact', why='proved: all that survive of these 2 samples are certified')
    >>> judge(Claim("robust", [0, 0]), [0, 0], [])
    Verdict(status='exact', why='each of these 2 samples is misclassified or has an adversarial example')
    """
    invalid = [finding for finding in findings if finding.fires and finding.void]
    if invalid:
        return Verdict("void", invalid[0].why)
    n = len(claim.correct)
    broken = sum(bool(claimed) and not survived for claimed, survived in zip(claim.correct, robust, strict=True))
    if lower_bound_99(broken, n) > TOLERANCE:
        return Verdict("refuted", _gap(broken, n))
    proofs = zip(claim.correct, [False] * n if certified is None else certified, strict=True)
    vacuous = any(finding.fires and finding.vacuous for finding in findings)
    if n and all(proof for claimed, proof in proofs if claimed) and not vacuous:
        if any(claim.correct):
            return Verdict("exact", f"proved: all that survive of these {n} samples are certified")
        return Verdict("exact", f"each of these {n} samples is misclassified or has an adversarial example")
    firing = [finding for finding in findings if finding.fires and claim.name in finding.claims]
    if firing:
        others = f", and {len(firing) - 1} more checks fire" if len(firing) > 1 else ""
        why = firing[0].why + others
        if claim.name == ROBUST:
            return Verdict("loose", why)
        # The figure of a weak attack may be right: say how far off it is before saying why it is no evidence.
        return Verdict("loose", f"{_gap(broken, n) if broken else f'0.0 points too high on {n} samples'}, but {why}")
    kinds = len(set(attack_kinds))
    attacks = f"attack of {kinds} kinds" if kinds > 1 else "other attack"
    agreement = f"empirical: no {attacks} broke more of these {n} samples"
    if broken:
        few = f", too few images to tell whether it is more than {100 * TOLERANCE:.0f} point"
        agreement = f"empirical: {_gap(broken, n)}" + few * (broken > TOLERANCE * n)
    if remaining is None:
        return Verdict("tight", agreement)
    estimate = (
        f"{remaining.expected:.1f} more of {samples or n} samples are expected to be breakable, at most "
        f"{remaining.high:.0f}"
    )
    if remaining.expected / (samples or n) > TOLERANCE:
        return Verdict("loose", f"{_gap(broken, n)}; {estimate}" if broken else estimate)
    return Verdict("tight", f"{agreement}; {estimate}")


def _gap(broken: int, n: int) -> str:
    """How much too high a claim is, in points, with its interval."""
    share = proportion(broken, n)
    return (
        f"{percent(share.value)} points too high (95% interval {percent(share.low)} to {percent(share.high)}; other "
        f"attacks broke {broken} more of {n} samples)"
    )
