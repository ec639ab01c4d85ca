"""What the page says in numbers: the main finding, who beats whom, class by class, stage by stage."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..results import Results, Row, Run, holm, mcnemar, paired_t, percent, rows


def finding(results: Results) -> str:
    """The main finding in one sentence or two: the figure that exceeds the truth most, and the most robust loss."""
    found = [(r, r.robust) for r in rows(results) if r.robust is not None]
    if not found:
        return "No robust figure stands: every measurement is void."
    doubtful = [f for f in found if f[0].pgd50_status != "tight"]  # a tight one is off by a sample or two
    said = ["No published figure is refuted."]
    if len(doubtful) == len(found):
        said = ["No published figure exceeds what stronger attacks left standing."]
    if doubtful:
        worst, robust = max(doubtful, key=lambda f: f[0].pgd50.value - f[1].value)
        published, true = percent(worst.pgd50.value), percent(robust.value)
        if worst.pgd50.value > robust.value and published != true:
            said = [f"{worst.label}: published {published}% but at most {true}% is true."]
    threats = list(dict.fromkeys(row.threat for row, _ in found))
    for threat in threats if len(found) > 1 else ():  # figures under different threats are not compared
        here = [f for f in found if f[0].threat == threat]
        best = max((r for _, r in here), key=lambda r: r.value)
        names = " and ".join(row.label for row, r in here if r.value == best.value)
        where = f" under {threat}" if len(threats) > 1 else ""
        interval = f"95% interval {percent(best.low)} to {percent(best.high)}"
        proved = max((row.certified.value for row, r in here if r.value == best.value and row.certified), default=0.0)
        least = f", and {percent(proved)}% is proved" if proved else ""
        said.append(f"Most robust{where}: {names}, at most {percent(best.value)}% ({interval}){least}.")
    return " ".join(said)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row against the first of its threat, in robust accuracy; figures are None where ``test`` says why not."""

    label: str
    against: str
    test: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None


def compare(results: Results) -> list[Comparison]:
    """Each row against the first of its threat: on the same samples (one run each), or on the seeds both have.

    McNemar needs equal sample indexes and labels; the t test two or more seeds. All are adjusted together (Holm).
    """
    first: dict[str, Row] = {}
    pairs = [(row, first.setdefault(row.threat, row)) for row in rows(results)]
    out = [_compare(results, row, base) for row, base in pairs if row is not base]
    adjusted = iter(holm([c.p for c in out if c.p is not None]))
    return [c if c.p is None else dataclasses.replace(c, p_holm=next(adjusted)) for c in out]


def _compare(results: Results, row: Row, base: Row) -> Comparison:
    if row.robust is None or base.robust is None:
        return Comparison(row.label, base.label, "not compared: one of the two is void")
    ours, theirs = runs_of(results, row), runs_of(results, base)
    if len(ours) == len(theirs) == 1:
        a, b = ours[0].samples, theirs[0].samples
        if a is None or b is None or not len(a) or (a.index, a.y) != (b.index, b.y):
            return Comparison(row.label, base.label, "not compared: not measured on the same samples")
        won = sum(p > q for p, q in zip(a.robust, b.robust, strict=True))
        lost = sum(p < q for p, q in zip(a.robust, b.robust, strict=True))
        test = f"exact McNemar; holds alone on {won:,} samples, the first on {lost:,}"
        return Comparison(row.label, base.label, test, (won - lost) / len(a), p=mcnemar(a.robust, b.robust))
    by_seed = [{r.seed: r.robust.value for r in side if r.robust is not None} for side in (ours, theirs)]
    seeds = [s for s in by_seed[0] if s in by_seed[1]]
    if len(seeds) < 2:
        return Comparison(row.label, base.label, "not compared: fewer than two seeds in common")
    t = paired_t(*([side[s] for s in seeds] for side in by_seed))
    few = "; fewer than the 8 a claim needs" if t.n < 8 else ""
    return Comparison(row.label, base.label, f"paired t over {t.n} seeds{few}", t.difference, t.low, t.high, t.p)


def per_class(results: Results) -> tuple[list[str], list[tuple[str, int, list[float | None]]]]:
    """Robust accuracy per class: the labels of the rows that have it, and (class name, samples, one figure per row)."""
    shown = [
        (row.label, [r.samples for r in runs_of(results, row) if r.samples is not None])
        for row in rows(results)
        if row.robust is not None
    ]
    shown = [(label, samples) for label, samples in shown if samples]
    held: dict[int, list[list[int]]] = {}
    for j, (_, samples) in enumerate(shown):
        for y, right in ((y, right) for s in samples for y, right in zip(s.y, s.robust, strict=True)):
            held.setdefault(y, [[] for _ in shown])[j].append(right)
    return [label for label, _ in shown], [
        (class_name(results, y), max(map(len, cells)), [sum(c) / len(c) if c else None for c in cells])
        for y, cells in sorted(held.items())
    ]


def mistakes(results: Results, row: Row) -> tuple[list[str], list[list[int]]]:
    """Who is mistaken for whom under attack: the class names, and how many samples of class i became class j.

    A sample that holds is on the diagonal, one that was wrong already where it was. Empty without the column, or where
    the row is void.
    """
    found = [run.samples for run in runs_of(results, row) if run.samples is not None and run.robust is not None]
    columns = [(s.y, s.prediction_adv, s.robust) for s in found if s.prediction_adv is not None]
    pairs = [pair for three in columns for pair in zip(*three, strict=True)]
    if not pairs:
        return [], []
    names = results.data.get("classes")
    k = max([1 + max(max(y, j) for y, j, _ in pairs), len(names) if isinstance(names, list) else 0])
    counts = [[0] * k for _ in range(k)]
    for y, j, held in pairs:
        counts[y][y if held else j] += 1
    return [class_name(results, y) for y in range(k)], counts


def most_mistaken(results: Results, most: int = 5) -> list[tuple[str, str]]:
    """Each row's most frequent mistakes under attack: ('sce', '8 as 3 (24), 1 as 7 (11)')."""
    told = []
    for row in rows(results):
        names, counts = mistakes(results, row)
        pairs = [(n, i, j) for i, line in enumerate(counts) for j, n in enumerate(line) if i != j and n]
        pairs.sort(key=lambda p: (-p[0], p[1], p[2]))
        if pairs:
            told.append((row.label, ", ".join(f"{names[i]} as {names[j]} ({n:,})" for n, i, j in pairs[:most])))
    return told


# What of a run's region stands in the table: heading, and where it is found, clean and, where there is one, attacked.
MEASURES = (
    ("median distance to a mistake, first order", ("input_margin.median",)),
    ("smallest perturbation found, median (wrong already: 0)", ("distance.median",)),
    ("0 < margin ≤ s: clean, attacked", ("inference_region", "inference_region_adv")),
    ("features moved, in distances between centers", ("movement.relative.median",)),
    ("nearer to another center: clean, attacked", ("movement.strayed_before", "movement.strayed_after")),
    ("scatter within / between classes: clean, attacked", ("scatter", "scatter_adv")),
    ("told apart, AUC", ("two_sample.auc",)),
    ("told apart within a class, AUC, mean", ("per_class.auc",)),
    ("MMD²", ("two_sample.mmd2",)),
    ("Fréchet distance, relative", ("two_sample.frechet_relative",)),
    ("local slope of the margin, median", ("lipschitz.median",)),
    ("calibration error: clean, attacked", ("calibration.clean.ece", "calibration.adv.ece")),
)


def measures(results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The region's measures as a table: the labels of the rows that have any, and (measure, a cell each); means over
    runs. A measure that no row has is left out.
    """
    told = []
    for row in rows(results):
        found = [run.region for run in runs_of(results, row) if run.region and row.robust is not None]
        if found:
            told.append((row.label, found))
    lines = [(what, [[_mean_at(found, path) for path in paths] for _, found in told]) for what, paths in MEASURES]
    return [label for label, _ in told], [
        (what, [" → ".join(map(_figure, cell)) if any(v is not None for v in cell) else "–" for cell in cells])
        for what, cells in lines
        if any(value is not None for cell in cells for value in cell)
    ]


def _mean_at(found: list[dict[str, Any]], path: str) -> float | None:
    values = []
    for value in found:
        at: Any = value
        for name in path.split("."):
            at = at.get(name) if isinstance(at, dict) else None
        values += [v for v in (at if isinstance(at, list) else [at]) if isinstance(v, int | float)]
    return sum(values) / len(values) if values else None


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}" if abs(value) < 99.5 else f"{value:,.0f}"


def missed(results: Results) -> list[tuple[str, int]]:
    """The rows of which the minimal attack broke samples that the evaluation left standing, and how many."""
    shown = [row for row in rows(results) if row.robust is not None]
    told = [(row.label, sum(run.region.get("missed") or 0 for run in runs_of(results, row))) for row in shown]
    return [(label, count) for label, count in told if count]


def runs_of(results: Results, row: Row) -> list[Run]:
    """The runs that a row was merged from."""
    return [results.runs[i] for i in row.runs]


def class_name(results: Results, y: int) -> str:
    """The name of class y, its number where the data has no names."""
    names = results.data.get("classes")
    return str(names[y]) if isinstance(names, list) and 0 <= y < len(names) else str(y)


def stage_totals(results: Results, row: Row) -> dict[str, list[float]]:
    """attacked, broken, passes and seconds by stage name, summed over the row's runs."""
    out: dict[str, list[float]] = {}
    for run in runs_of(results, row):
        for s in run.stages:
            total = out.setdefault(s.name, [0, 0, 0, 0])
            for k, v in enumerate((s.attacked, s.broken, s.forwards + s.backwards, s.seconds)):
                total[k] += v
    return out
