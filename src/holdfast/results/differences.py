"""Rows against a baseline: paired tests, adjusted for their number, and the sentence that a paper can use."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..errors import unknown
from ..user_input import typed
from .rows import Row, rows
from .schema import Results
from .statistics import holm, mcnemar_of_counts, paired_t
from .text import percent

CLAIM_SEEDS = 8  # paired seeds that a claim about losses needs
LEVEL = 0.05  # of a claim, after Holm


@dataclass(frozen=True)
class RowDifference:
    """A row against the baseline of its threat, in robust accuracy.

    Attributes:
        label: the row.
        against: the baseline.
        test: the test, or the reason why the two were not compared; the numbers are then None.
        difference: robust accuracy of the row minus that of the baseline.
        low: lower end of the difference's 95% interval; None for McNemar's test.
        high: upper end.
        p: p-value.
        p_holm: p-value adjusted for the number of comparisons.
        seeds: paired seeds; None for McNemar's test.
        threat: of both rows, in words.
        loose: which of the two has a loose robust accuracy.
    """

    label: str
    against: str
    test: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    seeds: int | None = None
    threat: str = ""
    loose: tuple[str, ...] = ()


@typed
def compare_rows(results: Results, baseline: str = "") -> list[RowDifference]:
    """Compare each row with the baseline of its threat: on the same samples (one run each), or on the seeds both have.

    McNemar's test needs equal sample indices and labels; the t test two or more seeds. All p-values are adjusted
    together (Holm).

    Args:
        results: the runs.
        baseline: the label or the loss of a row; "" for the first row of each threat.

    Returns:
        One entry for each row but the baselines. A threat without the baseline has none.

    Raises:
        UserError: no row has that name.
    """
    shown = rows(results)
    if not has_row(results, baseline):
        raise unknown("baseline", baseline, {name for row in shown for name in (row.label, row.loss)})
    bases: dict[str, Row] = {}
    for row in shown:
        if not baseline or baseline in (row.label, row.loss):
            bases.setdefault(row.threat, row)
    out = [_compare(results, row, bases[row.threat]) for row in shown if row is not bases.get(row.threat, row)]
    adjusted = iter(holm([c.p for c in out if c.p is not None]))
    return [c if c.p is None else dataclasses.replace(c, p_holm=next(adjusted)) for c in out]


def has_row(results: Results, name: str) -> bool:
    """Whether a row has this label or loss; every results have a row named ""."""
    return not name or any(name in (row.label, row.loss) for row in rows(results))


def _compare(results: Results, row: Row, base: Row) -> RowDifference:
    """One row against another."""
    loose = tuple(one.label for one in (row, base) if one.status == "loose")
    plain = RowDifference(row.label, base.label, "", threat=row.threat, loose=loose)
    if row.robust is None or base.robust is None:
        return dataclasses.replace(plain, test="not compared: one of the two is void")
    ours, theirs = ([results.runs[i] for i in one.runs] for one in (row, base))
    if len(ours) == len(theirs) == 1:
        a, b = ours[0].samples, theirs[0].samples
        if a is None or b is None or not len(a) or (a.index, a.y) != (b.index, b.y):
            return dataclasses.replace(plain, test="not compared: not evaluated on the same samples")
        won = sum(p > q for p, q in zip(a.robust, b.robust, strict=True))
        lost = sum(p < q for p, q in zip(a.robust, b.robust, strict=True))
        test = f"exact McNemar: robust on {won:,} samples where the baseline is not, the reverse on {lost:,}"
        p = mcnemar_of_counts(won, lost)
        return dataclasses.replace(plain, test=test, difference=(won - lost) / len(a), p=p)
    by_seed = [{r.seed: r.robust.value for r in side if r.robust is not None} for side in (ours, theirs)]
    seeds = [s for s in by_seed[0] if s in by_seed[1]]
    if len(seeds) < 2:
        return dataclasses.replace(plain, test="not compared: fewer than two seeds in common")
    t = paired_t(*([side[s] for s in seeds] for side in by_seed))
    few = f"; fewer than the {CLAIM_SEEDS} that a claim needs" if t.n < CLAIM_SEEDS else ""
    return dataclasses.replace(
        plain, test=f"paired t over {t.n} seeds{few}", difference=t.difference, low=t.low, high=t.high, p=t.p, seeds=t.n
    )


@typed
def significance(results: Results, baseline: str = "") -> list[str]:
    """What may be claimed of the rows against a baseline, in sentences for a paper.

    A claim needs 8 paired seeds and a Holm-adjusted p below 0.05. With less, the sentence says what is missing.

    Args:
        results: the runs.
        baseline: as for :func:`compare_rows`.

    Returns:
        A sentence or two for each row that was compared over seeds, and one for all others; none without a comparison.

    Raises:
        UserError: no row has the name of the baseline.
    """
    compared = [one for one in compare_rows(results, baseline) if one.difference is not None]
    out = [_claim(one) for one in compared if one.seeds is not None]
    if len(out) < len(compared):
        few = f"that takes {CLAIM_SEEDS} paired seeds for each."
        out.append(f"One network per row: no claim that one loss is more robust than another is possible; {few}")
    return out


def _claim(one: RowDifference) -> str:
    """What a paired t test says, in a sentence; a second one where a figure is loose."""
    difference, low, high = one.difference or 0.0, one.low or 0.0, one.high or 0.0
    p = p_text(one.p_holm if one.p_holm is not None else 1.0)
    test, where = f"(paired t, Holm-adjusted p {p})", f"under {one.threat}"
    points = f"{points_text(difference)} points [{points_text(low)}, {points_text(high)}]"
    if one.seeds is not None and one.seeds < CLAIM_SEEDS:
        text = (
            f"Over {one.seeds} paired seeds, {one.label} minus {one.against} is {points} of robust accuracy {where} "
            f"{test}: no claim is possible with fewer than {CLAIM_SEEDS}."
        )
    elif one.p_holm is None or one.p_holm >= LEVEL:
        text = (
            f"Over {one.seeds} paired seeds, the robust accuracies of {one.label} and {one.against} {where} do not "
            f"differ significantly: {points} {test}."
        )
    else:
        word = "more" if difference > 0 else "less"
        ends = (low, high) if difference > 0 else (-high, -low)
        text = (
            f"Over {one.seeds} paired seeds, {one.label} is {points_text(abs(difference))} points "
            f"[{points_text(ends[0])}, {points_text(ends[1])}] {word} robust than {one.against} {where} {test}."
        )
    if one.loose:
        text += f" The figure of {' and '.join(one.loose)} is loose: stronger attacks may change the difference."
    return text


def points_text(share: float) -> str:
    """A difference in percentage points, without a negative zero."""
    text = percent(share)
    return text.lstrip("-") if float(text) == 0 else text


def p_text(p: float) -> str:
    """A p-value with its sign, to three decimals.

    >>> p_text(0.0421), p_text(0.0001)
    ('= 0.042', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
