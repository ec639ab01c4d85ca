"""The wording of results: column headings, cells, captions and sentences, shared by every output format."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..user_input import typed
from .corruptions import CORRUPTIONS, mean_corrupted
from .rows import Row, name_text, rows
from .schema import Interval, ProofCost, Results, Run, total_proofs

TRAIN_LOSS = "pgd50-train-loss"
SMALL_GAP = 0.01  # between PGD-50 and robust accuracy: a tight verdict needs no line of its own
_HEADINGS = {"pgd50": "PGD-50", TRAIN_LOSS: "PGD-50, train loss"}


@typed
def heading(name: str) -> str:
    """The heading of an accuracy: "PGD-50" for pgd50, "PGD-50, train loss" for pgd50-train-loss, else its name.

    >>> heading("pgd50"), heading("cw")
    ('PGD-50', 'cw')
    """
    return _HEADINGS.get(name, name_text(name))


@typed
def percent(v: float) -> str:
    """A proportion in percent with one decimal, as text.

    >>> percent(0.0625)
    '6.2'
    """
    return f"{100 * v:.1f}"


@typed
def robust_text(row: Row) -> str:
    """The robust accuracy with its interval, as a cell: '43.0 [39.9, 46.1]'; '<= ' before a loose one; or 'void'."""
    if row.robust is None:
        return "void"
    r, sign = row.robust, "<= " if row.status == "loose" else ""
    return f"{sign}{percent(r.value)} [{percent(r.low)}, {percent(r.high)}]"


@typed
def status_text(status: str, count: int, runs: int) -> str:
    """A row's verdict in one word, as a cell: 'loose', or '1/5 loose' where it is that of 1 of 5 seeds.

    >>> status_text("loose", 1, 5), status_text("tight", 5, 5), status_text("", 1, 1)
    ('1/5 loose', 'tight', '-')
    """
    return f"{count}/{runs} {status}" if status and count < runs else status or "-"


@typed
def pgd50_verdict_text(row: Row) -> str:
    """The verdict on PGD-50 as a cell: '-32.5 refuted'. The number is what other attacks take off it, in points."""
    word = status_text(row.pgd50_status, row.pgd50_status_seeds, len(row.runs))
    if row.pgd50_excess is None or not row.pgd50_status:
        return word
    return f"{'-' * (row.pgd50_excess.value > 0)}{percent(row.pgd50_excess.value)} {word}"


@typed
def pgd50_heading(shown: Sequence[Row]) -> str:
    """The heading of the PGD-50 column: "PGD-50", or "PGD-50, n=100" where it was run on so many samples only."""
    counts = sorted({row.pgd50_n for row in shown if row.pgd50_n is not None})
    return heading("pgd50") + (f", n={' or '.join(map(str, counts))}" if counts else "")


def holds_words(name: str) -> bool:
    """Whether the column of this heading holds words, not numbers: names and verdicts.

    >>> holds_words("PGD-50 verdict"), holds_words("PGD-50")
    (True, False)
    """
    return name == "loss" or name.endswith("verdict")


@typed
def any_certified(shown: Sequence[Row]) -> bool:
    """Whether any sample is certified: a certificate that covers none needs no column."""
    return any(row.certified is not None and row.certified.value > 0 for row in shown)


@typed
def other_attacks(shown: Sequence[Row]) -> list[str]:
    """Names of the attacks other than PGD-50, in order of first appearance; PGD-50 on the training loss last."""
    names = dict.fromkeys(name for row in shown for name in row.attacks)
    return sorted(names.keys() - {"pgd50"}, key=lambda name: (name == TRAIN_LOSS, list(names).index(name)))


@typed
def attack_columns(shown: Sequence[Row]) -> list[str]:
    """The names of ``other_attacks`` that have a column: kinds of corruption have a table of their own."""
    return other_attacks([row for row in shown if row.norm != CORRUPTIONS])


@typed
def cells(shown: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table as text: a head, then a line for each row. Every output format shows these columns.

    loss, clean, PGD-50 and its verdict, the other attacks, the mean over kinds of corruption, certified, robust with
    its interval and its verdict. Each but loss, clean and robust has a column only where some row has a value for it.

    Args:
        shown: the rows of the table.

    Returns:
        The head and the lines, all of one length.
    """
    names, certified = attack_columns(shown), any_certified(shown)
    means = [mean_corrupted(row) for row in shown]
    corrupted = any(mean is not None for mean in means)
    pgd50_verdict, verdict = any(row.pgd50_status for row in shown), any(row.status for row in shown)
    pgd50 = any(row.pgd50 for row in shown)
    head = ["loss", "clean", *[pgd50_heading(shown)] * pgd50, *["PGD-50 verdict"] * pgd50_verdict, *map(heading, names)]
    head += ["corrupted, mean"] * corrupted
    lines = [(*head, *["certified"] * certified, "robust, 95%", *["robust verdict"] * verdict)]
    for row, mean in zip(shown, means, strict=True):
        line = [re.sub(r"\s+", " ", row.label), _percent_or_dash(row.clean), *[_percent_or_dash(row.pgd50)] * pgd50]
        line += [pgd50_verdict_text(row)] * pgd50_verdict
        line += [_percent_or_dash(row.attacks.get(name)) for name in names]
        line += ["-" if mean is None else percent(mean)] * corrupted
        line += [_percent_or_dash(row.certified)] * certified
        word = status_text(row.status, row.status_seeds, len(row.runs))
        lines.append((*line, robust_text(row), *[word] * verdict))
    return lines


def _percent_or_dash(figure: Interval | None) -> str:
    return percent(figure.value) if figure else "-"


@typed
def caption(results: Results, shown: Sequence[Row]) -> str:
    """What a table shows: data set, number of samples, threat if there is only one, intervals, how to read verdicts."""
    threats = list(dict.fromkeys(row.threat for row in shown))
    title = results.data.get("title")
    parts = [
        name_text(": ".join(str(one) for one in (title, results.data.get("name")) if one)),
        " or ".join(f"{n:,}" for n in dict.fromkeys(row.n for row in shown)) + " samples",
        *(threats if len(threats) == 1 else []),
        "in percent",
    ]
    notes = [*dict.fromkeys(row.interval for row in shown), *caption_notes(shown)]
    if not any_certified(shown) and any(row.certified for row in shown):
        notes.append("no sample is certified")
    return f"{', '.join(filter(None, parts))}; {'; '.join(notes)}"


@typed
def caption_notes(shown: Sequence[Row]) -> list[str]:
    """How to read the verdicts of these rows: what the number before a verdict is, and which seeds it counts."""
    notes = []
    if any(row.norm == CORRUPTIONS for row in shown):
        notes.append("robust of corruptions: right as it is and under every kind")
    if any(row.pgd50_status and row.pgd50_excess for row in shown):
        notes.append("PGD-50 verdict: after the points that other attacks take off it")
    counts = [(count, len(row.runs)) for row in shown for count in (row.status_seeds, row.pgd50_status_seeds)]
    if mixed := [(count, runs) for count, runs in counts if count < runs]:
        count, runs = mixed[0]
        notes.append(f"{count}/{runs}: a row has the worst verdict of its seeds, here of {count} of {runs}")
    return notes


@typed
def doubts(results: Results) -> list[str]:
    """What is in doubt, in lines.

    An accuracy has a line where its verdict is neither tight nor exact, or where PGD-50 differs from it by more than 1%
    of the samples. A run has one where a budget cut its suite short.

    Args:
        results: the results.

    Returns:
        The lines. Each says what was observed, and then the verdict.
    """
    verdicts = [
        (row.label, name, status, words, row.pgd50_excess.value if row.pgd50_excess and name != "robust" else 0.0)
        for row in rows(results)
        for name, status, words in (
            (heading("pgd50"), row.pgd50_status, row.pgd50_verdict),
            ("robust", row.status, row.verdict),
        )
    ]
    lines = [
        f"{label}: {name}, {words.partition(': ')[2] or 'no reason recorded'}: {status}"
        for label, name, status, words, gap in verdicts
        if status not in ("", "tight", "exact") or (status and gap > SMALL_GAP)
    ]
    return lines + [
        f"{run.name}: the budget ran out before the suite was complete; an estimated {run.remaining.expected:.1f} "
        f"more of {run.n:,} are still breakable, at most {run.remaining.high:.0f}"
        for run in results.runs
        if run.remaining is not None and run.remaining.unfinished
    ]


@typed
def proved_text(proofs: Sequence[ProofCost]) -> str:
    """How many samples each method proved: 'lipschitz 16, linear 209'; "" where none did."""
    return ", ".join(f"{cost.method} {cost.proved:,}" for cost in proofs if cost.proved)


@typed
def seconds_text(seconds: float) -> str:
    """A time as text.

    >>> seconds_text(0.04), seconds_text(119.6), seconds_text(600)
    ('0.0 s', '120 s', '10 min')
    """
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


@typed
def bracket_text(results: Results) -> str:
    """What is proved and what is attacked, in one line: both ends, what lies between, by what it is proved, the cost.

    Args:
        results: the results; of several runs the samples are counted together.

    Returns:
        The line; "" where no sample is certified.
    """
    shown = [run for run in results.runs if run.between is not None and run.certified is not None]
    certified = sum(sum(run.samples.certified or ()) for run in shown if run.samples is not None)
    if not certified:
        return ""
    n, between = sum(run.n for run in shown), sum(run.between or 0 for run in shown)
    lie = f"{between:,} of {n:,} samples lie{'s' * (between == 1)} between"
    first = shown[0]
    if len(shown) > 1 or first.certified is None or first.robust is None:
        parts = [f"Certified {certified:,} samples of {len(shown)} runs; {lie}."]
    elif between:
        low, high = percent(first.certified.value), percent(first.robust.value)
        parts = [f"Certified {low}% <= robust accuracy <= {high}% attacked: {lie}."]
    else:
        parts = [f"Certified = attacked = {percent(first.robust.value)}%: no sample lies between."]
    proofs = total_proofs([cost for run in shown for cost in run.proofs])
    if names := proved_text(proofs):
        parts.append(f"Proved by {names}, in {seconds_text(sum(cost.seconds for cost in proofs))}.")
    if late := sum(cost.out_of_time for cost in proofs):
        parts.append(f"Time ran out for {late:,} of those between.")
    return " ".join(parts)


@typed
def precision_text(results: Results, precision: float) -> str:
    """What the attacks on a sample of the survivors cost, in one sentence; "" without an audit.

    Args:
        results: of several runs, the costs are added up.
        precision: that the samples were chosen for.

    Returns:
        The sentence.
    """
    shown = [run for run in results.runs if run.remaining is not None]
    full = sum(one.near + one.far for run in shown if run.remaining for one in run.remaining.spot_checks)
    tested, survivors = (sum(getattr(run.remaining, name) for run in shown) for name in ("tested", "survivors"))
    stages = [stage for run in shown for stage in run.stages]
    total = sum(stage.passes for stage in stages)
    passes = sum(stage.passes for stage in stages if stage.name.startswith("sampled: ") or stage.name == "audit")
    if not total:
        return ""
    return (
        f"precision {100 * precision:g}%: of {survivors:,} survivors without a certificate, {full:,} were attacked at "
        f"full length and {tested:,} by two more attacks of the audit; both took {passes:,} of {total:,} passes "
        f"({passes / total:.0%})"
    )


@typed
def remaining_text(run: Run) -> str:
    """How many survivors may still be breakable, in sentences; "" without an audit."""
    left = run.remaining
    if left is None:
        return ""
    near, far, rest, near_broken, far_broken, high = (
        sum(getattr(one, name) for one in left.spot_checks)
        for name in ("near", "far", "rest", "near_broken", "far_broken", "high")
    )
    parts = [
        f"Two independent attacks on {left.tested:,} of {left.survivors:,} survivors broke {left.first} and "
        f"{left.second}, {left.both} of them in common: an estimated {left.expected:.1f} more of {run.n:,} are still "
        f"breakable (95% interval {left.low:.0f} to {left.high:.0f})."
    ]
    if left.spot_checks:
        parts.append(
            f"Full-length attacks on the {near:,} survivors with the smallest margins and on {far:,} of the other "
            f"{rest:,} broke {near_broken} and {far_broken}: they would break at most {high:.0f} more (95%)."
        )
    if left.unfinished:
        parts.append("The budget ran out before the suite was complete.")
    if left.votes > 1:
        parts.append(f"A prediction is the majority of {left.votes} votes.")
    return " ".join(parts)
