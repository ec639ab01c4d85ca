"""The beginning of a part of the page: what was tested, which number to quote, what it is worth, and the facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..errors import printable
from ..results import Results, Row, any_certified, percent, seconds_text
from ..results.corruptions import CORRUPTIONS
from ..results.rows import WORST_FIRST

ASSUMED = 20  # sentences on data and network that a page shows
MEANING = {
    "exact": "every sample that is left is certified, or none is left: a proof",
    "tight": "no trust check fired, and at most 1% of the samples are estimated to be breakable still: evidence, no "
    "proof",
    "loose": "a trust check fired, or more than 1% may be breakable still: the true figure may be far lower",
    "refuted": "other attacks broke significantly more than 1% of the samples beyond the figure: do not quote it",
    "void": "the measurement is invalid: there is no figure",
}


def page_title(results: Results, shown: Sequence[Row]) -> str:
    """The title given by the user; else the data, by its last folder, after the row where there is one only."""
    title, data = results.data.get("title"), str(results.data.get("name", "data not recorded"))
    data = data.rstrip("/").rpartition("/")[2] if data.startswith(("/", ".", "~")) else data
    if isinstance(title, str) and title:
        return title
    return f"{shown[0].label} on {data}" if len(shown) == 1 else data


def answers(results: Results, shown: Sequence[Row]) -> list[tuple[str, str]]:
    """What was tested, which number to quote, and what it is worth: (question, answer)."""
    return [("tested", _tested(results, shown)), ("quote", _quoted(shown)), ("worth", _worth(shown))]


def _tested(results: Results, shown: Sequence[Row]) -> str:
    samples = " or ".join(f"{n:,}" for n in dict.fromkeys(row.n for row in shown))
    networks = {len(row.runs) for row in shown}
    rows_text = f"{len(shown)} rows of the table" if len(shown) > 1 else shown[0].label
    seeds = f"{min(networks)} to {max(networks)}" if len(networks) > 1 else f"{max(networks)}"
    each = f", {seeds} seed{'s' * (max(networks) > 1)} each" if len(shown) > 1 else ""
    each = f", {seeds} seeds" if len(shown) == 1 and max(networks) > 1 else each
    threats = ", ".join(dict.fromkeys(row.threat for row in shown))
    return f"{results.data.get('name', 'data not recorded')}, {samples} samples, under {threats}: {rows_text}{each}"


def _quoted(shown: Sequence[Row]) -> str:
    valid = [(row, row.robust) for row in shown if row.robust is not None]
    if not valid:
        return "none: every measurement is void"
    if len(shown) > 1:
        bound = "" if all(row.norm == CORRUPTIONS for row in shown) else ", an upper bound"
        return f"the column robust{bound}, with its interval and verdict"
    row, robust = valid[0]
    most = "" if row.norm == CORRUPTIONS else "at most "
    proved = row.certified is not None and row.certified.value > 0
    least = f", at least {percent(row.certified.value)}% certified" if proved and row.certified else ""
    return f"robust, {most}{percent(robust.value)}% ({percent(robust.low)} to {percent(robust.high)}){least}"


def _worth(shown: Sequence[Row]) -> str:
    counts = Counter(row.status for row in shown if row.status)
    if not counts:
        return "not audited: no check was run on these figures"
    words = [word for word in reversed(WORST_FIRST) if word in counts]
    number = {word: f"{counts[word]} of {len(shown)} " if len(shown) > 1 else "" for word in words}
    return "; ".join(f"{number[word]}{word} ({MEANING[word]})" for word in words)


def facts(results: Results, shown: Sequence[Row]) -> list[tuple[str, str]]:
    """Data, samples, threat, seeds, intervals and cost; those that are not recorded are left out."""
    shape, classes = results.data.get("shape"), results.data.get("classes")
    samples = " or ".join(f"{n:,}" for n in dict.fromkeys(r.n for r in results.runs))
    seeds = list(dict.fromkeys(str(r.seed) for r in results.runs if r.seed is not None))
    lines = [
        ("data", str(results.data.get("name", "not recorded"))),
        ("samples", samples + (f", {' × '.join(map(str, shape))}" if isinstance(shape, list | tuple) else "")),
        ("classes", str(len(classes)) if isinstance(classes, list) else ""),
        ("threat", ", ".join(dict.fromkeys(r.threat_text for r in results.runs))),
        ("seeds", f"{len(seeds)}: {', '.join(seeds)}" if seeds else ""),
        ("certified", _certified(shown)),
        ("intervals", "; ".join(dict.fromkeys(r.interval for r in shown))),
        ("cost of the evaluation", _cost(results)),
    ]
    return [(name, text) for name, text in lines if text]


def assumed(results: Results) -> list[str]:
    """What was assumed, converted or skipped when data and network were read; the last line counts those left out."""
    notes = results.data.get("notes")
    notes = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    more = [f"and {len(notes) - ASSUMED:,} more, in results.json"] if len(notes) > ASSUMED else []
    return [printable(note) for note in notes[:ASSUMED]] + more


def _certified(shown: Sequence[Row]) -> str:
    """A line where bounds were computed but prove nothing, since the table then has no column for them; else empty."""
    if not any(row.certified for row in shown) or any_certified(shown):
        return ""
    proofs = [cost for row in shown for cost in row.proofs]
    took = f", in {seconds_text(sum(cost.seconds for cost in proofs))}" if proofs else ""
    return f"no sample: the bounds that were computed prove none{took}"


def _cost(results: Results) -> str:
    """Passes and time of all evaluations together; empty where none was recorded."""
    costs = [run.cost for run in results.runs if run.cost is not None]
    if not costs:
        return ""
    passes, seconds = sum(cost.passes for cost in costs), sum(cost.seconds for cost in costs)
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{passes / 1e6:.1f} million passes, {time}" if passes >= 1e5 else f"{passes:,} passes, {time}"
