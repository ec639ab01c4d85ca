"""Runs merged into the rows of a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import printable
from ..user_input import typed
from .schema import Interval, ProofCost, Results, Run, Verdict, total_proofs
from .statistics import over_seeds, proportion

LONGEST_NAME = 400  # characters of a loss, a network or an attack in a table
WORST_FIRST = ("void", "refuted", "loose", "tight", "exact")


@dataclass(frozen=True)
class Row:
    """One line of a table: a loss under a threat, over one or more seeds.

    Attributes:
        label: the loss, with the threat or the run's name where the loss alone is ambiguous.
        loss: the loss spec.
        threat: the threat in words.
        clean: clean accuracy.
        attacks: attack name -> accuracy under that attack alone; has "pgd50" unless it was left out.
        robust: share that survived every attack; None when void.
        status: status of the verdict on ``robust``; "" without an audit.
        verdict: that verdict in words.
        n: samples per run.
        seeds: training seeds of the merged runs.
        interval: which interval the accuracies carry.
        runs: indices into ``results.runs``.
        certified: certified accuracy; None where unknown.
        pgd50_status: status of the verdict on the PGD-50 accuracy; "" without an audit.
        pgd50_verdict: that verdict in words.
        pgd50_excess: share of the samples that PGD-50 leaves correct and other attacks break, with its interval (over
            samples, or over seeds); None where void, or without per-sample columns.
        pgd50_n: samples per run that PGD-50 was run on, where these are not all; the least of the merged runs.
        status_seeds: how many of the merged runs have ``status``, the worst of their verdicts.
        pgd50_status_seeds: the same of ``pgd50_status``.
        between: samples of all runs that are neither broken nor proved; None where that is not known, and when void.
        proofs: what each method of proof did and cost in all runs; empty where that was not recorded.
        norm: of the threat; "corruptions", "rotation", "translation" or "patch" where it is none.
    """

    label: str
    loss: str
    threat: str
    clean: Interval
    attacks: dict[str, Interval]
    robust: Interval | None
    status: str
    verdict: str
    n: int
    seeds: tuple[int | None, ...]
    interval: str
    runs: tuple[int, ...]
    certified: Interval | None = None
    pgd50_status: str = ""
    pgd50_verdict: str = ""
    pgd50_excess: Interval | None = None
    pgd50_n: int | None = None
    status_seeds: int = 1
    pgd50_status_seeds: int = 1
    between: int | None = None
    proofs: tuple[ProofCost, ...] = ()
    norm: str = ""

    @property
    def pgd50(self) -> Interval | None:
        """Accuracy under PGD-50; None where it was left out."""
        return self.attacks.get("pgd50")


def name_text(name: str) -> str:
    """A name as a table shows it: without control characters, its middle cut out if it is very long.

    >>> name_text("sce\\x1b[2J")
    'sce'
    """
    return printable(name, LONGEST_NAME)


@typed
def rows(results: Results) -> list[Row]:
    """One row per loss and threat, in order of first appearance.

    Runs that differ only in their seed are merged: mean and t interval over seeds, and the worst verdict. A single run
    keeps its own interval. Runs of one loss whose seeds repeat are different experiments: one row per run name. One
    void run makes the row void. An accuracy that one of the merged runs lacks is not shown.

    Args:
        results: the runs.

    Returns:
        The rows, with distinct labels.
    """
    out = [_merged(results.runs, members) for members in _groups(results.runs)]
    for pattern in ("{0.threat}", "{1.name}", "n={0.n}", "{0.runs[0]}"):
        taken = Counter(r.label for r in out)
        extra = [pattern.format(r, results.runs[r.runs[0]]) for r in out]
        named = [f"{r.label} ({e})" if taken[r.label] > 1 else r.label for r, e in zip(out, extra, strict=True)]
        out = [dataclasses.replace(r, label=name) for r, name in zip(out, named, strict=True)]
    given = results.data.get("labels")
    labels = {k: v for k, v in given.items() if isinstance(v, str)} if isinstance(given, dict) else {}
    out = [dataclasses.replace(r, label=_own_label(r, labels)) for r in out]
    return [dataclasses.replace(r, label=name_text(r.label), threat=name_text(r.threat)) for r in out]


def _own_label(row: Row, labels: dict[str, str]) -> str:
    """The text that the user gave for a row or for its loss, which keeps what tells rows of one loss apart."""
    if row.loss in labels:
        return labels.get(row.label, labels[row.loss] + row.label.removeprefix(row.loss))
    return labels.get(row.label, row.label)


def _merged(runs: Sequence[Run], members: Sequence[int]) -> Row:
    """The row of the runs with these indices, labelled by the loss."""
    group, first = [runs[i] for i in members], runs[members[0]]
    clean, attacks, robust, certified = first.clean, first.attacks, first.robust, first.certified
    interval = first.interval
    if len(group) > 1:
        clean = over_seeds(r.clean.value for r in group)
        means = {name: _mean([r.attacks.get(name) for r in group]) for name in attacks}
        attacks = {name: mean for name, mean in means.items() if mean is not None}
        robust, certified = _mean([r.robust for r in group]), _mean([r.certified for r in group])
        interval = f"mean and 95% t interval over {len(group)} seeds"
    status, verdict, status_seeds = _worst([r.verdict for r in group])
    pgd50_status, pgd50_verdict, pgd50_status_seeds = _worst([r.pgd50_verdict for r in group])
    return Row(
        label=first.loss,
        loss=first.loss,
        threat=first.threat_text,
        clean=clean,
        attacks=attacks,
        robust=robust,
        status=status,
        verdict=verdict,
        n=first.n,
        seeds=tuple(r.seed for r in group),
        interval=interval,
        runs=tuple(members),
        certified=certified,
        pgd50_status=pgd50_status,
        pgd50_verdict=pgd50_verdict,
        pgd50_excess=_pgd50_excess(group),
        pgd50_n=min((r.pgd50_n for r in group if r.pgd50_n is not None), default=None),
        status_seeds=status_seeds,
        pgd50_status_seeds=pgd50_status_seeds,
        between=_sum([r.between for r in group]),
        proofs=total_proofs([cost for r in group for cost in r.proofs]),
        norm=str(first.threat["norm"]),
    )


def _pgd50_excess(group: Sequence[Run]) -> Interval | None:
    """What other attacks break of the samples that PGD-50 leaves correct, counted sample by sample."""
    pairs = [
        [(p, r) for p, r in zip(run.samples.pgd50, run.samples.robust, strict=True) if p is not None]
        for run in group
        if run.samples is not None and run.samples.pgd50 is not None and run.robust is not None
    ]
    if len(pairs) < len(group) or not all(pairs):
        return None
    broken = [sum(p and not r for p, r in one) for one in pairs]
    if len(group) == 1:
        return proportion(broken[0], len(pairs[0]))
    return over_seeds(k / len(one) for k, one in zip(broken, pairs, strict=True))


def _mean(figures: Sequence[Interval | None]) -> Interval | None:
    """Mean over seeds; None where one of them has no value."""
    values = [figure.value for figure in figures if figure is not None]
    return over_seeds(values) if len(values) == len(figures) else None


def _sum(counts: Sequence[int | None]) -> int | None:
    """The sum over runs; None where one of them has no value."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _groups(runs: Sequence[Run]) -> list[list[int]]:
    """Indices of the runs that share a row."""
    keys: list[tuple[Any, ...]] = [(r.loss, r.threat_text, r.n) for r in runs]
    for extra in ([r.name for r in runs], range(len(runs))):
        counts = Counter((k, r.seed) for k, r in zip(keys, runs, strict=True))
        repeated = {k for (k, _), times in counts.items() if times > 1}
        keys = [(*k, e) if k in repeated else k for k, e in zip(keys, extra, strict=True)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, k in enumerate(keys):
        groups.setdefault(k, []).append(i)
    return list(groups.values())


def _worst(given: Sequence[Verdict | None]) -> tuple[str, str, int]:
    """(status, verdict in words, how many have that status) of the worst of several verdicts."""
    verdicts = [v for v in given if v is not None]
    if not verdicts:
        return "", "", len(given)
    order = {s: i for i, s in enumerate(WORST_FIRST)}
    v = min(verdicts, key=lambda v: order.get(v.status, -1))
    count = sum(w.status == v.status for w in verdicts)
    share = f" ({count} of {len(given)} seeds)" if len(given) > 1 else ""
    return v.status, f"{v.status}: {v.why}{share}" if v.why else v.status + share, count
