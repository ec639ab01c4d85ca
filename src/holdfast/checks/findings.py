"""What a check found, and what a claim is worth in its light: plain data and counting, no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from scipy import stats

from ..results import Verdict

PGD50, ROBUST = "pgd50", "robust"
CONFIDENCE = 0.99  # how sure a check is before it fires
TOLERANCE = 0.01  # a claim is worth its number up to this share of the samples


@dataclass(frozen=True)
class CheckCount:
    """``k`` of ``n`` samples show the fault; the check fires when the share is surely above ``threshold``; ``why``."""

    k: int
    n: int
    threshold: float
    why: str


@dataclass(frozen=True)
class Finding:
    """A check's answer.

    name: a sentence that holds of a healthy claim; status: "holds", "fires" or "not run"; k of n samples show the
    fault, threshold is the share above which it counts; why: what was seen, or what is missing; void: whether firing
    makes the measurement worthless; claims: which claims it speaks of; source: who proposed the check.
    """

    name: str
    status: str
    k: int
    n: int
    threshold: float
    why: str
    void: bool
    claims: tuple[str, ...]
    source: str

    @property
    def fires(self) -> bool:
        return self.status == "fires"

    def to_dict(self) -> dict[str, Any]:
        """As results.json holds it, with the share found, its lower bound, and the check's own record."""
        value, low = (self.k / self.n, lower_bound_99(self.k, self.n)) if self.n else (None, None)
        return {
            **asdict(self),
            "claims": list(self.claims),
            "value": value,
            "low": low,
            "track_record": track_record(self.name),
        }

    @staticmethod
    def from_dict(found: dict[str, Any]) -> Finding:
        kept = {key: found[key] for key in Finding.__dataclass_fields__}
        return Finding(**{**kept, "claims": tuple(found["claims"])})


@cache
def _calibration() -> dict[str, Any]:
    path = Path(__file__).with_name("calibration.json")
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def track_record(name: str) -> str:
    """What is known of a check: false alarms on honest networks that set no threshold, and the liars it fires on.

    Measured by benchmarks/calibrate_checks.py; empty for a check that was never calibrated.
    """
    known = _calibration().get(name)
    if known is None:
        return ""
    caught = f"; fires on {', '.join(known['caught'])}" if known["caught"] else "; has fired on no liar yet"
    return f"{known['false_alarms']} false alarms on {known['honest']} honest networks{caught}"


def lower_bound_99(k: int, n: int) -> float:
    """The share that k of n proves with 99% confidence: the one-sided lower bound of Clopper and Pearson.

    >>> lower_bound_99(0, 64), round(lower_bound_99(64, 64), 3), round(0.01 ** (1 / 64), 3)
    (0.0, 0.931, 0.931)
    """
    return 0.0 if k == 0 else float(stats.beta.ppf(1 - CONFIDENCE, k, n - k + 1))


def merge(parts: Sequence[Sequence[Finding]]) -> tuple[Finding, ...]:
    """The findings on several networks that share one row (folds), check by check: their samples are counted together.

    A check that did not run on some of them is counted on the others.
    """
    merged = []
    for found in zip(*parts, strict=True):
        ran = [finding for finding in found if finding.status != "not run"]
        if not ran:
            merged.append(found[0])
            continue
        k, n = sum(finding.k for finding in ran), sum(finding.n for finding in ran)
        status = "fires" if lower_bound_99(k, n) > ran[0].threshold else "holds"
        worst = max(ran, key=lambda finding: finding.k / max(finding.n, 1))
        why = worst.why if len(ran) == 1 else f"{worst.why}; over {len(ran)} networks {k} of {n}"
        merged.append(replace(worst, k=k, n=n, status=status, why=why))
    return tuple(merged)


@dataclass(frozen=True)
class Claim:
    """These attacks leave this accuracy. stands: one entry per sample, whether it is claimed to hold."""

    name: str
    stands: Sequence[Any]


def judge(
    claim: Claim, robust: Sequence[Any], findings: Sequence[Finding], remainder: dict[str, float] | None = None
) -> Verdict:
    """What a claim is worth.

    void: a check found the measurement broken. refuted: samples that the claim holds up were broken, surely more than
    1% of all (99% Clopper-Pearson). loose: nothing broke more, but a check that speaks of this claim fires, or more
    than 1% of the samples are expected to be breakable still. tight: none of these.

    Args: claim: what is claimed; robust: one entry per sample, what stands after everything tried, in the same order;
    findings: of the checks; remainder: of the survivors, as a dict: "expected" and "high", in samples.

    >>> print(judge(Claim("pgd50", [1, 1, 1, 1, 0]), [0, 0, 0, 0, 0], []).status)
    refuted
    >>> judge(Claim("pgd50", [1, 1, 0]), [1, 0, 0], []).why
    'other attacks broke 1 more of 3, not surely above 1%'
    >>> judge(Claim("robust", [1, 0]), [1, 0], [])
    Verdict(status='tight', why='attacks of different kinds agree')
    """
    ruined = [finding for finding in findings if finding.fires and finding.void]
    if ruined:
        return Verdict("void", ruined[0].why)
    n = len(claim.stands)
    more = sum(bool(held) and not left for held, left in zip(claim.stands, robust, strict=True))
    if lower_bound_99(more, n) > TOLERANCE:
        return Verdict("refuted", f"other attacks broke {more} more of {n} samples ({more / n:.1%})")
    spoken = [finding for finding in findings if finding.fires and claim.name in finding.claims]
    if spoken:
        others = f", and {len(spoken) - 1} more checks fire" if len(spoken) > 1 else ""
        return Verdict("loose", spoken[0].why + others)
    agreed = (
        f"other attacks broke {more} more of {n}, not surely above 1%" if more else "attacks of different kinds agree"
    )
    if remainder is None:
        return Verdict("tight", agreed)
    more_to_come = f"{remainder['expected']:.1f} more of {n} are expected to fall, at most {remainder['high']:.0f}"
    if remainder["expected"] / n > TOLERANCE:
        return Verdict("loose", more_to_come)
    return Verdict("tight", f"{agreed}; {more_to_come}")
