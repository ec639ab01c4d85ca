"""What a check found, and how often it has been wrong before. Plain data and counting, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from scipy import stats

from ..results import CheckResult, Finding

CONFIDENCE = 0.99  # of the lower bound at which a check fires and a claim is refuted


@dataclass(frozen=True)
class CheckCount:
    """What a check counted.

    The check fires if the fraction of faulty samples is significantly above the threshold, at 99% confidence.

    Args:
        k: number of samples that show the fault.
        n: number of samples examined.
        threshold: in [0, 1].
        why: the observation in one sentence.
    """

    k: int
    n: int
    threshold: float
    why: str


def result_of(finding: Finding) -> CheckResult:
    """A finding as results.json stores it: with the share of violations, its lower bound and the track record."""
    value, low = (finding.k / finding.n, lower_bound_99(finding.k, finding.n)) if finding.n else (None, None)
    return CheckResult(**asdict(finding), value=value, low=low, track_record=track_record(finding.name))


@cache
def _calibration() -> dict[str, Any]:
    path = Path(__file__).with_name("calibration.json")
    calibration: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return calibration


def track_record(name: str) -> str:
    """False alarms of a check on held-out honest networks, and the faulty models it fires on.

    Args:
        name: of the check.

    Returns:
        One sentence, measured by benchmarks/calibrate_checks.py; "" for a check that was never calibrated.
    """
    known = _calibration().get(name)
    if known is None:
        return ""
    caught = ", ".join(known["caught"])
    fires = f"fires on {caught}" if caught else "fires on no faulty model so far"
    return f"{known['false_alarms']} false alarms on {known['honest']} honest networks; {fires}"


def lower_bound_99(k: int, n: int) -> float:
    """One-sided 99% lower bound of a proportion, given k of n (Clopper and Pearson).

    >>> lower_bound_99(0, 64), round(lower_bound_99(64, 64), 3), round(0.01 ** (1 / 64), 3)
    (0.0, 0.931, 0.931)
    """
    return 0.0 if k <= 0 else float(stats.beta.ppf(1 - CONFIDENCE, min(k, n), max(n - k, 0) + 1))


def merge(parts: Sequence[Sequence[Finding]]) -> tuple[Finding, ...]:
    """Findings on several networks that share a row (folds), check by check, with their counts added up.

    A check that did not run on some of the networks is counted on the others.

    Args:
        parts: findings of each network, all with the same checks in the same order.

    Returns:
        One finding per check.
    """
    merged = []
    for findings in zip(*parts, strict=True):
        ran = [finding for finding in findings if finding.status != "not run"]
        if not ran:
            merged.append(findings[0])
            continue
        k, n = sum(finding.k for finding in ran), sum(finding.n for finding in ran)
        status = "fires" if lower_bound_99(k, n) > ran[0].threshold else "holds"
        worst = max(ran, key=lambda finding: finding.k / max(finding.n, 1))
        why = worst.why if len(ran) == 1 else f"{worst.why}; over {len(ran)} networks {k} of {n}"
        merged.append(replace(worst, k=k, n=n, status=status, why=why))
    return tuple(merged)
