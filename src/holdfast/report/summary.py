"""The numbers of the report: the main finding, per class, per stage, the inference region."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from ..results import (
    RegionMeasures,
    Results,
    Row,
    Run,
    StageCost,
    any_certified,
    corruption_sentence,
    corruption_tables,
    percent,
    proved_text,
    rows,
    seconds_text,
    total_cost,
)
from ..results.corruptions import CORRUPTIONS
from ..user_input import typed

TIED = 5  # from this many rows on, those that share the first place are counted, not named


@typed
def finding(results: Results) -> str:
    """The main finding in one sentence or two: the PGD-50 accuracy that is most wrong, and the most robust loss.

    >>> finding(Results(runs=(), data={}))
    'No robust accuracy can be reported: every measurement is void.'
    """
    corrupted = [corruption_sentence(table) for table in corruption_tables(results)]
    shown = [row for row in rows(results) if row.norm != CORRUPTIONS]
    valid = [(r, r.robust) for r in shown if r.robust is not None]
    if corrupted and not shown:
        return " ".join(corrupted)
    if not valid:
        return "No robust accuracy can be reported: every measurement is void."
    reported = [(r, r.pgd50, robust) for r, robust in valid if r.pgd50 is not None]
    doubtful = [v for v in reported if v[0].pgd50_status not in ("tight", "exact")]  # a tight one: a sample or two
    sentences = ["No PGD-50 accuracy is refuted."] * bool(reported)
    if doubtful and len(doubtful) == len(reported):
        sentences = ["No PGD-50 accuracy exceeds the robust accuracy."]
    if doubtful:
        worst, pgd50, robust = max(doubtful, key=lambda v: v[1].value - v[2].value)
        figure, bound = percent(pgd50.value), percent(robust.value)
        if pgd50.value > robust.value and figure != bound:
            sentences = [f"{worst.label}: PGD-50 reports {figure}%, but robust accuracy is at most {bound}%."]
    threats = list(dict.fromkeys(row.threat for row, _ in valid))
    named = len(valid) > 1 or not reported
    for threat in threats if named else ():  # accuracies under different threats are not compared
        here = [v for v in valid if v[0].threat == threat]
        best = max((r for _, r in here), key=lambda r: r.value)
        tied = [row.label.removesuffix(f" ({threat})") for row, r in here if r.value == best.value]
        names = " and ".join([", ".join(tied[:-1]), tied[-1]] if len(tied) > 1 else tied)
        names = names if len(tied) < TIED else f"{len(tied)} of {len(here)} rows alike"
        where = f" under {threat}" if len(threats) > 1 else ""
        interval = f"95% interval {percent(best.low)} to {percent(best.high)}"
        proved = max((row.certified.value for row, r in here if r.value == best.value and row.certified), default=0.0)
        least = f", and {percent(proved)}% is certified" if proved else ""
        sentences.append(f"Most robust{where}: {names}, at most {percent(best.value)}% ({interval}){least}.")
    return " ".join(sentences + corrupted)


@dataclasses.dataclass(frozen=True)
class ClassAccuracy:
    """Robust accuracy of one class.

    Attributes:
        name: of the class.
        n: number of samples.
        robust: the accuracy in each row of a PerClass; None where the row has no sample of the class.
    """

    name: str
    n: int
    robust: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class PerClass:
    """Robust accuracy class by class.

    Attributes:
        rows: labels of the rows that have per-sample columns.
        classes: one entry for each class that occurs.
    """

    rows: tuple[str, ...]
    classes: tuple[ClassAccuracy, ...]


@typed
def per_class(results: Results) -> PerClass:
    """Robust accuracy per class, of the rows that are not void and have per-sample columns."""
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
    classes = [
        ClassAccuracy(
            class_name(results, y), max(map(len, columns)), tuple(sum(c) / len(c) if c else None for c in columns)
        )
        for y, columns in sorted(robust.items())
    ]
    return PerClass(tuple(label for label, _ in shown), tuple(classes))


@typed
def confusion(results: Results, row: Row) -> Counter[tuple[int, int]]:
    """The confusion matrix under attack, without its zeros.

    A robust sample counts on the diagonal, one that is misclassified without an attack at its clean prediction.

    Args:
        results: the runs.
        row: one of its rows.

    Returns:
        counts[i, j], how many samples of class i are classified as j. Empty where no prediction is recorded, or the row
        is void.
    """
    columns = [run.samples for run in runs_of(results, row) if run.samples is not None and run.robust is not None]
    return Counter(
        (y, y if unbroken else prediction)
        for s in columns
        if s.prediction_adv is not None
        for y, prediction, unbroken in zip(s.y, s.prediction_adv, s.robust, strict=True)
    )


def frequent_confusions(results: Results, most: int = 5) -> list[tuple[str, str]]:
    """Each row's most frequent confusions under attack: ('sce', '8 as 3 (24), 1 as 7 (11)')."""
    out = []
    for row in rows(results):
        wrong = [(pair, n) for pair, n in sorted(confusion(results, row).items()) if pair[0] != pair[1]]
        wrong.sort(key=lambda one: -one[1])
        if wrong:
            texts = [f"{class_name(results, i)} as {class_name(results, j)} ({n:,})" for (i, j), n in wrong[:most]]
            out.append((row.label, ", ".join(texts)))
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

    A curve is held against attacks on a few fixed radii (``RegionMeasures.eps_checks``; at eps that is the evaluation).
    Where these break more samples than the minimal-norm attack, by more than 2% of all, it is in doubt between the
    neighbouring radii. It is in doubt everywhere for a row whose robust accuracy is loose, and where no such checks
    were recorded; and beyond the last radius.
    """
    out = []
    for row in rows(results):
        regions = regions_of(results, row)
        distances = sorted(math.inf if d is None else d for region in regions for d in region.distances.distance)
        if row.robust is not None and distances:
            eps = float(results.runs[row.runs[0]].threat["eps"])
            out.append(EpsCurve(row, eps, tuple(distances), *_doubts_over_eps(row, regions)))
    return out


def _doubts_over_eps(row: Row, regions: list[RegionMeasures]) -> tuple[tuple[_Part, ...], tuple[str, ...]]:
    """The parts of a row's curve that are in doubt, and why."""
    if row.status == "loose":
        return ((0.0, math.inf),), ("its robust accuracy is loose, so the curve is no more than an upper bound",)
    if not all(region.eps_checks for region in regions):
        return ((0.0, math.inf),), ("no other attack was run at these eps",)
    checks = list(zip(*(region.eps_checks for region in regions), strict=True))
    radii = [0.0, *(check[0].eps for check in checks), math.inf]
    doubtful, notes = [], []
    for i, check in enumerate(checks):
        n, alone, robust = (sum(getattr(one, name) for one in check) for name in ("n", "minimal_norm", "robust"))
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
_Value = float | None | tuple[float | None, ...]  # several: one for each class
# The lines of the region table: the measure, clean and where there is one adversarial.
MEASURES: dict[str, Callable[[RegionMeasures], tuple[_Value, ...]]] = {
    SMALLEST: lambda r: (r.distance.median,),
    "distance to the decision boundary, first-order estimate, median": lambda r: (r.input_margin.median,),
    "share with 0 < margin ≤ s": lambda r: (r.inference_region, r.inference_region_adv),
    "share nearer to another class's center": lambda r: (r.movement.strayed_before, r.movement.strayed_after),
    "separability of clean and adversarial features, AUC": lambda r: (r.two_sample.auc,),
    "feature shift, relative to the distance between class centers, median": lambda r: (r.movement.relative.median,),
    "scatter within / between classes": lambda r: (r.scatter, r.scatter_adv),
    "the same AUC within a class, mean": lambda r: (r.per_class.auc,),
    "MMD²": lambda r: (r.two_sample.mmd2,),
    "Fréchet distance, relative": lambda r: (r.two_sample.frechet_relative,),
    "local Lipschitz constant of the margin, median": lambda r: (r.lipschitz.median,),
    "expected calibration error": lambda r: tuple(
        None if one is None else one.ece for one in (r.calibration.clean, r.calibration.adv)
    ),
}
DECIDING = 5  # the first measures: how near the boundary is, and whether an attack's features can be told from others


@dataclasses.dataclass(frozen=True)
class RegionTable:
    """The measures of the inference region as text.

    Attributes:
        columns: labels of the rows of results, which are the columns here.
        lines: measure -> one cell for each column.
    """

    columns: tuple[str, ...]
    lines: dict[str, tuple[str, ...]]


@typed
def region_table(results: Results) -> RegionTable:
    """The measures of the inference region as a table: means over runs, "clean → adversarial" where both are measured.

    A measure that no row has is left out. "≤" stands before a smallest perturbation where the curve over eps is in
    doubt.

    Args:
        results: the runs.

    Returns:
        The table; without columns where nothing was measured.
    """
    curves = {curve.row.label: curve for curve in eps_curves(results)}
    columns = {row.label: regions_of(results, row) for row in rows(results) if row.robust is not None}
    columns = {label: regions for label, regions in columns.items() if regions}
    lines = {}
    for measure, figures_of in MEASURES.items():
        cells = {
            label: [_mean(column) for column in zip(*map(figures_of, regions), strict=True)]
            for label, regions in columns.items()
        }
        if known := [figure for cell in cells.values() for figure in cell if figure is not None]:
            digits = _decimals(known)
            lines[measure] = tuple(
                _cell(cell, curves.get(label) if measure == SMALLEST else None, digits) for label, cell in cells.items()
            )
    return RegionTable(tuple(columns), lines)


def region_parts(table: RegionTable) -> list[RegionTable]:
    """The table in two: the measures that decide, and the others, which need a closer look; empty parts left out."""
    deciding = set(list(MEASURES)[:DECIDING])
    halves = [{name: cells for name, cells in table.lines.items() if (name in deciding) == first} for first in (1, 0)]
    return [RegionTable(table.columns, lines) for lines in halves if lines]


def _cell(figures: Sequence[float | None], curve: EpsCurve | None, digits: int) -> str:
    """Figures as text; after "≤" where they are distances, and the curve that these give is in doubt."""
    if all(figure is None for figure in figures):
        return "–"
    at = figures[0]
    doubtful = curve is not None and at is not None and curve.is_doubtful(at)
    return "≤ " * doubtful + " → ".join(_figure(figure, digits) for figure in figures)


def _mean(values: Sequence[_Value]) -> float | None:
    """The mean over runs, and over classes, of the figures that there are."""
    figures = [figure for value in values for figure in (value if isinstance(value, tuple) else (value,))]
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known else None


def _decimals(figures: Sequence[float]) -> int:
    """How many decimals all figures of a measure have: two significant digits of their median size."""
    sizes = [abs(figure) for figure in figures if math.isfinite(figure) and figure]
    return max(0, 1 - math.floor(math.log10(statistics.median(sizes)))) if sizes else 0


def _figure(value: float | None, digits: int) -> str:
    """A figure with so many decimals, never an exponent for its size; one that would read as zero has a bound."""
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}"
    if value and float(text.replace(",", "")) == 0:
        return f"{'<' if value > 0 else '>'} {math.copysign(10.0**-digits, value):.{digits}f}"
    return text


@typed
def proof_table(results: Results) -> list[tuple[str, ...]]:
    """What is proved, row by row; empty where no sample is certified.

    Args:
        results: the runs. Counts are of all runs of a row together.

    Returns:
        (label, certified, attacked, samples between, what proved how many, time of all proofs) as text, for each row
        that is not void and has bounds.
    """
    shown = [row for row in rows(results) if row.robust is not None and row.certified is not None]
    if not any_certified(shown):
        return []
    return [
        (
            row.label,
            percent(row.certified.value),
            percent(row.robust.value),
            "–" if row.between is None else f"{row.between:,}",
            proved_text(row.proofs) or "–",
            seconds_text(sum(cost.seconds for cost in row.proofs)) if row.proofs else "–",
        )
        for row in shown
        if row.certified is not None and row.robust is not None
    ]


def runs_of(results: Results, row: Row) -> list[Run]:
    """The runs that a row was merged from."""
    return [results.runs[i] for i in row.runs]


def regions_of(results: Results, row: Row) -> list[RegionMeasures]:
    """The inference regions of a row's runs, of those that have one."""
    return [run.region for run in runs_of(results, row) if run.region is not None]


def class_name(results: Results, y: int) -> str:
    """The name of class y, or its number where the data has no names."""
    names = results.data.get("classes")
    return str(names[y]) if isinstance(names, list) and 0 <= y < len(names) else str(y)


def stage_totals(results: Results, row: Row) -> list[StageCost]:
    """The cost of each stage, summed over the row's runs."""
    by_name: dict[str, list[StageCost]] = {}
    for stage in (stage for run in runs_of(results, row) for stage in run.stages):
        by_name.setdefault(stage.name, []).append(stage)
    return [total_cost(parts) for parts in by_name.values()]
