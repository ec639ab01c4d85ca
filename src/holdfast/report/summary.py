"""The numbers of the report: the main finding, tests between rows, per class, per stage, the inference region."""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Any

from ..results import Results, Row, Run, holm, mcnemar, paired_t, percent, rows
from ..user_input import typed


@typed
def finding(results: Results) -> str:
    """The main finding in one sentence or two: the PGD-50 accuracy that is most wrong, and the most robust loss.

    >>> finding(Results(runs=(), data={}))
    'No robust accuracy can be reported: every measurement is void.'
    """
    valid = [(r, r.robust) for r in rows(results) if r.robust is not None]
    if not valid:
        return "No robust accuracy can be reported: every measurement is void."
    doubtful = [
        v for v in valid if v[0].pgd50_status not in ("tight", "exact")
    ]  # a tight one is off by a sample or two
    sentences = ["No PGD-50 accuracy is refuted."]
    if len(doubtful) == len(valid):
        sentences = ["No PGD-50 accuracy exceeds the robust accuracy."]
    if doubtful:
        worst, robust = max(doubtful, key=lambda v: v[0].pgd50.value - v[1].value)
        reported, bound = percent(worst.pgd50.value), percent(robust.value)
        if worst.pgd50.value > robust.value and reported != bound:
            sentences = [f"{worst.label}: PGD-50 reports {reported}%, but robust accuracy is at most {bound}%."]
    threats = list(dict.fromkeys(row.threat for row, _ in valid))
    for threat in threats if len(valid) > 1 else ():  # accuracies under different threats are not compared
        here = [v for v in valid if v[0].threat == threat]
        best = max((r for _, r in here), key=lambda r: r.value)
        names = " and ".join(row.label for row, r in here if r.value == best.value)
        where = f" under {threat}" if len(threats) > 1 else ""
        interval = f"95% interval {percent(best.low)} to {percent(best.high)}"
        proved = max((row.certified.value for row, r in here if r.value == best.value and row.certified), default=0.0)
        least = f", and {percent(proved)}% is certified" if proved else ""
        sentences.append(f"Most robust{where}: {names}, at most {percent(best.value)}% ({interval}){least}.")
    return " ".join(sentences)


@dataclasses.dataclass(frozen=True)
class RowDifference:
    """A row against the first row of its threat, in robust accuracy.

    Attributes:
        label: the row.
        against: the first row.
        test: the test, or the reason why the two were not compared; the numbers are then None.
        difference: robust accuracy of the row minus that of the first.
        low: lower end of the difference's 95% interval; None for McNemar's test.
        high: upper end.
        p: p-value.
        p_holm: p-value adjusted for the number of comparisons.
    """

    label: str
    against: str
    test: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None


@typed
def compare_rows(results: Results) -> list[RowDifference]:
    """Compare each row with the first of its threat: on the same samples (one run each), or on the seeds both have.

    McNemar's test needs equal sample indices and labels; the t test two or more seeds. All p-values are adjusted
    together (Holm).

    Args:
        results: the runs.

    Returns:
        One entry for each row but the first of each threat.
    """
    first: dict[str, Row] = {}
    pairs = [(row, first.setdefault(row.threat, row)) for row in rows(results)]
    out = [_compare(results, row, base) for row, base in pairs if row is not base]
    adjusted = iter(holm([c.p for c in out if c.p is not None]))
    return [c if c.p is None else dataclasses.replace(c, p_holm=next(adjusted)) for c in out]


def _compare(results: Results, row: Row, base: Row) -> RowDifference:
    """One row against another."""
    if row.robust is None or base.robust is None:
        return RowDifference(row.label, base.label, "not compared: one of the two is void")
    ours, theirs = runs_of(results, row), runs_of(results, base)
    if len(ours) == len(theirs) == 1:
        a, b = ours[0].samples, theirs[0].samples
        if a is None or b is None or not len(a) or (a.index, a.y) != (b.index, b.y):
            return RowDifference(row.label, base.label, "not compared: not evaluated on the same samples")
        won = sum(p > q for p, q in zip(a.robust, b.robust, strict=True))
        lost = sum(p < q for p, q in zip(a.robust, b.robust, strict=True))
        test = f"exact McNemar: robust on {won:,} samples where the first is not, the reverse on {lost:,}"
        return RowDifference(row.label, base.label, test, (won - lost) / len(a), p=mcnemar(a.robust, b.robust))
    by_seed = [{r.seed: r.robust.value for r in side if r.robust is not None} for side in (ours, theirs)]
    seeds = [s for s in by_seed[0] if s in by_seed[1]]
    if len(seeds) < 2:
        return RowDifference(row.label, base.label, "not compared: fewer than two seeds in common")
    t = paired_t(*([side[s] for s in seeds] for side in by_seed))
    few = "; fewer than the 8 that a claim needs" if t.n < 8 else ""
    return RowDifference(row.label, base.label, f"paired t over {t.n} seeds{few}", t.difference, t.low, t.high, t.p)


@typed
def per_class(results: Results) -> tuple[list[str], list[tuple[str, int, list[float | None]]]]:
    """Robust accuracy per class.

    Args:
        results: the runs.

    Returns:
        The labels of the rows that have per-sample columns, and for each class its name, its number of samples and one
        accuracy per such row (None where the row has no sample of it).
    """
    shown = [
        (row.label, [r.samples for r in runs_of(results, row) if r.samples is not None])
        for row in rows(results)
        if row.robust is not None
    ]
    shown = [(label, samples) for label, samples in shown if samples]
    robust: dict[int, list[list[int]]] = {}
    for j, (_, samples) in enumerate(shown):
        for y, unbroken in ((y, unbroken) for s in samples for y, unbroken in zip(s.y, s.robust, strict=True)):
            robust.setdefault(y, [[] for _ in shown])[j].append(unbroken)
    return [label for label, _ in shown], [
        (class_name(results, y), max(map(len, columns)), [sum(c) / len(c) if c else None for c in columns])
        for y, columns in sorted(robust.items())
    ]


@typed
def confusion(results: Results, row: Row) -> tuple[list[str], list[list[int]]]:
    """Confusion matrix under attack.

    A robust sample counts on the diagonal, one that is misclassified without an attack at its clean prediction.

    Args:
        results: the runs.
        row: one of its rows.

    Returns:
        The class names, and counts[i][j]: how many samples of class i are classified as j under attack. Both are empty
        where no prediction is recorded, or the row is void.
    """
    columns = [run.samples for run in runs_of(results, row) if run.samples is not None and run.robust is not None]
    triples = [(s.y, s.prediction_adv, s.robust) for s in columns if s.prediction_adv is not None]
    samples = [sample for triple in triples for sample in zip(*triple, strict=True)]
    if not samples:
        return [], []
    names = results.data.get("classes")
    k = max([1 + max(max(y, j) for y, j, _ in samples), len(names) if isinstance(names, list) else 0])
    counts = [[0] * k for _ in range(k)]
    for y, j, unbroken in samples:
        counts[y][y if unbroken else j] += 1
    return [class_name(results, y) for y in range(k)], counts


def frequent_confusions(results: Results, most: int = 5) -> list[tuple[str, str]]:
    """Each row's most frequent confusions under attack: ('sce', '8 as 3 (24), 1 as 7 (11)')."""
    out = []
    for row in rows(results):
        names, counts = confusion(results, row)
        pairs = [(n, i, j) for i, line in enumerate(counts) for j, n in enumerate(line) if i != j and n]
        pairs.sort(key=lambda p: (-p[0], p[1], p[2]))
        if pairs:
            out.append((row.label, ", ".join(f"{names[i]} as {names[j]} ({n:,})" for n, i, j in pairs[:most])))
    return out


_Part = tuple[float, float]  # of the eps axis
UNCONVERGED = 0.02  # share of the samples that the minimal-norm attack may miss at one eps: 5 of the usual 256


@dataclasses.dataclass(frozen=True)
class EpsCurve:
    """Robust accuracy over eps of one row: at eps, the share of samples whose distance is larger.

    Attributes:
        row: the row.
        eps: the evaluated radius.
        distances: smallest perturbation found for each measured sample, ascending; infinite where nothing was found.
        doubtful: parts (from, to) of the eps axis where the curve may be too high; the last may be infinite.
        notes: why, a sentence for each reason.
    """

    row: Row
    eps: float
    distances: tuple[float, ...]
    doubtful: tuple[_Part, ...]
    notes: tuple[str, ...]

    def at(self, eps: float) -> float:
        """The share of samples that no perturbation of size eps or less breaks, as far as is known."""
        return 1 - bisect.bisect_right(self.distances, eps) / len(self.distances)

    def is_doubtful(self, eps: float) -> bool:
        """Whether the curve is in doubt at this eps."""
        return any(low <= eps <= high for low, high in self.doubtful)


@typed
def eps_curves(results: Results) -> list[EpsCurve]:
    """The curves of accuracy over eps, of the rows that are not void and have distances.

    A curve is held against attacks on a few fixed radii (``Run.region["eps_checks"]``; at eps that is the evaluation).
    Where these break more samples than the minimal-norm attack, by more than 2% of all, it is in doubt between the
    neighbouring radii. It is in doubt everywhere for a row whose robust accuracy is loose, and where no such checks
    were recorded; and beyond the last radius.
    """
    out = []
    for row in rows(results):
        runs = [run for run in runs_of(results, row) if "distances" in run.region]
        columns = [run.region["distances"]["distance"] for run in runs]
        if row.robust is None or not any(columns):
            continue
        known = sorted(math.inf if d is None else float(d) for distances in columns for d in distances)
        eps = float(runs[0].threat["eps"])
        out.append(EpsCurve(row, eps, tuple(known), *_doubts_over_eps(row, [run.region for run in runs])))
    return out


def _doubts_over_eps(
    row: Row, regions: list[dict[str, Any]]
) -> tuple[tuple[tuple[float, float], ...], tuple[str, ...]]:
    """The parts of a row's curve that are in doubt, and why."""
    if row.status == "loose":
        return ((0.0, math.inf),), ("its robust accuracy is loose, so the curve is no more than an upper bound",)
    if not all(region.get("eps_checks") for region in regions):
        return ((0.0, math.inf),), ("no other attack was run at these eps",)
    checks = list(zip(*(region["eps_checks"] for region in regions), strict=True))
    radii = [0.0, *(float(check[0]["eps"]) for check in checks), math.inf]
    doubtful, notes = [], []
    for i, check in enumerate(checks):
        n, alone, robust = (sum(one[key] for one in check) for key in ("n", "minimal_norm", "robust"))
        if alone - robust > UNCONVERGED * n:
            high = radii[i + 2] if math.isfinite(radii[i + 2]) else radii[i + 1]
            doubtful.append((radii[i], high))
            notes.append(
                f"the minimal-norm attack did not converge: at eps {radii[i + 1]:.3g} it leaves {alone:,} of {n:,} "
                f"samples unbroken, other attacks {robust:,}; from eps {radii[i]:.3g} to {high:.3g} the curve may be "
                "too high"
            )
    return (*doubtful, (radii[-2], math.inf)), tuple(notes)


SMALLEST = "smallest perturbation found, median (misclassified: 0)"
# The lines of the region table: heading, and the path in ``Run.region``, clean and where there is one adversarial.
MEASURES = (
    ("distance to the decision boundary, first-order estimate, median", ("input_margin.median",)),
    (SMALLEST, ("distance.median",)),
    ("share with 0 < margin ≤ s", ("inference_region", "inference_region_adv")),
    ("feature shift, relative to the distance between class centers, median", ("movement.relative.median",)),
    ("share nearer to another class's center", ("movement.strayed_before", "movement.strayed_after")),
    ("scatter within / between classes", ("scatter", "scatter_adv")),
    ("separability of clean and adversarial features, AUC", ("two_sample.auc",)),
    ("the same within a class, mean AUC", ("per_class.auc",)),
    ("MMD²", ("two_sample.mmd2",)),
    ("Fréchet distance, relative", ("two_sample.frechet_relative",)),
    ("local Lipschitz constant of the margin, median", ("lipschitz.median",)),
    ("expected calibration error", ("calibration.clean.ece", "calibration.adv.ece")),
)


@typed
def region_table(results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The measures of the inference region as a table.

    Args:
        results: the runs.

    Returns:
        The labels of the rows that have any, and (measure, one cell per such row): means over runs, "clean →
        adversarial" where both are measured. A measure that no row has is left out. "≤" stands before a smallest
        perturbation where the curve over eps is in doubt.
    """
    shown, curves = [], {curve.row.label: curve for curve in eps_curves(results)}
    for row in rows(results):
        regions = [run.region for run in runs_of(results, row) if run.region and row.robust is not None]
        if regions:
            shown.append((row.label, regions))
    lines = [(what, [[_mean_at(regions, path) for path in paths] for _, regions in shown]) for what, paths in MEASURES]

    def text(what: str, label: str, cell: list[float | None]) -> str:
        curve = curves.get(label)
        doubtful = what == SMALLEST and curve is not None and cell[0] is not None and curve.is_doubtful(cell[0])
        return "≤ " * doubtful + " → ".join(map(_figure, cell)) if any(v is not None for v in cell) else "–"

    labels = [label for label, _ in shown]
    return labels, [
        (what, [text(what, label, cell) for label, cell in zip(labels, line, strict=True)])
        for what, line in lines
        if any(value is not None for cell in line for value in cell)
    ]


def _mean_at(regions: list[dict[str, Any]], path: str) -> float | None:
    """Mean over runs of the number, or numbers, at a dotted path."""
    values = []
    for region in regions:
        at: Any = region
        for name in path.split("."):
            at = at.get(name) if isinstance(at, dict) else None
        values += [v for v in (at if isinstance(at, list) else [at]) if isinstance(v, int | float)]
    return sum(values) / len(values) if values else None


def _figure(value: float | None) -> str:
    """Two significant digits, never an exponent for size."""
    return "–" if value is None else f"{value:.2g}" if abs(value) < 99.5 else f"{value:,.0f}"


def missed(results: Results) -> list[tuple[str, int]]:
    """Rows whose minimal-norm attack broke samples that count as robust, and how many."""
    shown = [row for row in rows(results) if row.robust is not None]
    counts = [(row.label, sum(run.region.get("missed") or 0 for run in runs_of(results, row))) for row in shown]
    return [(label, count) for label, count in counts if count]


def runs_of(results: Results, row: Row) -> list[Run]:
    """The runs that a row was merged from."""
    return [results.runs[i] for i in row.runs]


def class_name(results: Results, y: int) -> str:
    """The name of class y, or its number where the data has no names."""
    names = results.data.get("classes")
    return str(names[y]) if isinstance(names, list) and 0 <= y < len(names) else str(y)


def stage_totals(results: Results, row: Row) -> dict[str, list[float]]:
    """Stage name -> [attacked, broken, passes, seconds], summed over the row's runs."""
    out: dict[str, list[float]] = {}
    for run in runs_of(results, row):
        for s in run.stages:
            total = out.setdefault(s.name, [0, 0, 0, 0])
            for k, v in enumerate((s.attacked, s.broken, s.forwards + s.backwards, s.seconds)):
                total[k] += v
    return out
