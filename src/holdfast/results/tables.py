"""Runs merged into rows, and the rows as a table: in the terminal, Markdown, CSV and LaTeX."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from csv import writer as csv_writer
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .schema import Interval, Results, Run, Verdict
from .statistics import over_seeds

_WORST_FIRST = ("void", "refuted", "loose", "tight")


@dataclass(frozen=True)
class Row:
    """One line of the table: a loss under a threat, over one or more seeds. ``runs`` are indexes into results.runs."""

    label: str  # the loss, told apart by threat or name where the loss alone does not
    loss: str
    threat: str
    clean: Interval
    published: Interval
    robust: Interval | None
    status: str
    verdict: str
    n: int
    seeds: tuple[int | None, ...]
    interval: str
    runs: tuple[int, ...]
    published_status: str = ""  # status and verdict are of the robust figure, these two of the published one
    published_verdict: str = ""
    own: Interval | None = None


def rows(results: Results) -> list[Row]:
    """One row per loss and threat, in order of first appearance.

    Runs that differ in seed alone are merged: mean and t interval over seeds; a single run keeps its own interval. Runs
    of one loss whose seeds repeat are different experiments: one row per run name. One void run makes the row void, and
    the verdict shown is the worst of the merged ones.
    """
    out: list[Row] = []
    for members in _groups(results.runs):
        merged, first = [results.runs[i] for i in members], results.runs[members[0]]
        clean, published, robust, own = first.clean, first.published, first.robust, first.own
        interval = first.interval
        if len(merged) > 1:
            clean, published = over_seeds(r.clean.value for r in merged), over_seeds(r.published.value for r in merged)
            robust, own = _mean([r.robust for r in merged]), _mean([r.own for r in merged])
            interval = f"mean and 95% t interval over {len(merged)} seeds"
        status, text = _worst([r.verdict for r in merged])
        claimed, why = _worst([r.published_verdict for r in merged])
        figures = first.loss, first.loss, first.threat_text, clean, published, robust, status, text, first.n
        out.append(Row(*figures, tuple(r.seed for r in merged), interval, tuple(members), claimed, why, own))
    for told in ("{0.threat}", "{1.name}", "n={0.n}", "{0.runs[0]}"):
        taken = Counter(r.label for r in out)
        shown = [told.format(r, results.runs[r.runs[0]]) for r in out]
        named = [f"{r.label} ({t})" if taken[r.label] > 1 else r.label for r, t in zip(out, shown, strict=True)]
        out = [dataclasses.replace(r, label=name) for r, name in zip(out, named, strict=True)]
    return out


def _mean(figures: Sequence[Interval | None]) -> Interval | None:
    """Over seeds; None where one of them has no figure."""
    found = [figure.value for figure in figures if figure is not None]
    return over_seeds(found) if len(found) == len(figures) else None


def _groups(runs: Sequence[Run]) -> list[list[int]]:
    keys: list[tuple[Any, ...]] = [(r.loss, r.threat_text, r.n) for r in runs]
    for extra in ([r.name for r in runs], range(len(runs))):
        seen = Counter((k, r.seed) for k, r in zip(keys, runs, strict=True))
        repeated = {k for (k, _), times in seen.items() if times > 1}
        keys = [(*k, e) if k in repeated else k for k, e in zip(keys, extra, strict=True)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, k in enumerate(keys):
        groups.setdefault(k, []).append(i)
    return list(groups.values())


def _worst(given: Sequence[Verdict | None]) -> tuple[str, str]:
    verdicts = [v for v in given if v is not None]
    if not verdicts:
        return "", ""
    order = {s: i for i, s in enumerate(_WORST_FIRST)}
    v = min(verdicts, key=lambda v: order.get(v.status, -1))
    alike = sum(w.status == v.status for w in verdicts)
    share = f" ({alike} of {len(given)} seeds)" if len(given) > 1 else ""
    return v.status, f"{v.status}: {v.why}{share}" if v.why else v.status + share


def percent(v: float) -> str:
    """A proportion in percent with one decimal, as text."""
    return f"{100 * v:.1f}"


def robust_text(row: Row) -> str:
    """The robust figure with its interval: '43.0 [39.9, 46.1]', with '<= ' before it when loose; 'void' without one."""
    if row.robust is None:
        return "void"
    r, sign = row.robust, "<= " if row.status == "loose" else ""
    return f"{sign}{percent(r.value)} [{percent(r.low)}, {percent(r.high)}]"


_HEAD = ("loss", "clean", "published", "verdict", "own loss", "robust, 95%", "verdict")


def _cells(row: Row) -> tuple[str, ...]:
    label, own = re.sub(r"\s+", " ", row.label), percent(row.own.value) if row.own else "-"
    published = percent(row.published.value), row.published_status or "-"
    return label, percent(row.clean.value), *published, own, robust_text(row), row.status or "-"


def _lines(results: Results) -> list[tuple[str, ...]]:
    """Head and rows as text; a verdict's column only where something was judged, the own loss's where it was run."""
    found = rows(results)
    seen = {3: any(r.published_status for r in found), 4: any(r.own for r in found), 6: any(r.status for r in found)}
    return [tuple(c for i, c in enumerate(line) if seen.get(i, True)) for line in (_HEAD, *map(_cells, found))]


def table(results: Results) -> Table:
    """A rich table that fits 80 columns, in percent; with several threats, a part for each."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    out.add_column(_HEAD[0], overflow="fold", max_width=26)
    lines, found = _lines(results), rows(results)
    for name in lines[0][1:]:
        out.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    threats = {row.threat for row in found}
    before = ""
    for row, (label, *cells) in zip(found, lines[1:], strict=True):
        if len(threats) > 1:
            label = label.removesuffix(f" ({row.threat})")
            if row.threat != before:
                out.add_section()
                out.add_row(Text(row.threat, style="bold"))
            before = row.threat
        out.add_row(Text(label), *map(Text, cells))
    return out


def doubts(results: Results) -> list[str]:
    """A line for each figure whose verdict is not tight: what it is worth, and why."""
    judged = [
        (row.label, name, status, why)
        for row in rows(results)
        for name, status, why in (
            ("published", row.published_status, row.published_verdict),
            ("robust", row.status, row.verdict),
        )
    ]
    said = [f"{label}: {name} {why}" for label, name, status, why in judged if status not in ("", "tight")]
    return said + [
        f"{run.name}: the budget ended the suite before its end; {run.remainder['expected']:.1f} more of {run.n:,} are "
        f"expected to fall, at most {run.remainder['high']:.0f}"
        for run in results.runs
        if run.remainder.get("unfinished")
    ]


def remainder_text(run: Run) -> str:
    """What may still be breakable, in a sentence."""
    left = run.remainder
    if not left:
        return ""
    drawn = left.get("drawn")
    full = (
        f" Attacks of full length on the {drawn['near']:,} survivors nearest to a mistake and on {drawn['far']:,} of "
        f"the other {drawn['rest']:,} broke {drawn['near_broken']} and {drawn['far_broken']}: at most "
        f"{drawn['high']:.0f} more that way (95%)."
        if drawn
        else ""
    )
    ended = " A budget ended the suite before its end." if left.get("unfinished") else ""
    votes = f" The majority of {left['votes']} answers was judged." if left.get("votes") else ""
    return (
        f"Two independent runs on {left['tested']:,} of {left['stood']:,} survivors broke {left['first']} and "
        f"{left['second']}, {left['both']} of them alike: {left['expected']:.1f} more of {run.n:,} are expected to be "
        f"breakable (95% interval {left['low']:.0f} to {left['high']:.0f}).{full}{ended}{votes}"
    )


def markdown(results: Results) -> str:
    """The table in Markdown."""
    head, *cells = _lines(results)
    rules = ["---" if name in ("loss", "verdict") else "---:" for name in head]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(rules) + "|"]
    for label, *rest in cells:
        lines.append("| " + " | ".join([re.sub(r"([\\`*_<>\[\]|&~$#])", r"\\\1", label), *rest]) + " |")
    return "\n".join(lines) + "\n"


def csv(results: Results) -> str:
    """The rows as CSV, proportions unrounded, empty where there is no figure."""
    out = StringIO()
    write = csv_writer(out, lineterminator="\n").writerow
    bounds = [f"{c}{suffix}" for c in ("clean", "published", "robust") for suffix in ("", "_low", "_high")]
    write(["loss", "threat", *bounds, "published_verdict", "verdict", "n", "seeds", "interval"])
    for r in rows(results):
        figures = [v for i in (r.clean, r.published, r.robust) for v in (dataclasses.astuple(i) if i else ("", "", ""))]
        write(
            [r.label, r.threat, *figures, r.published_verdict, r.verdict, r.n, " ".join(map(str, r.seeds)), r.interval]
        )
    return out.getvalue()


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", **{c: "\\" + c for c in "&%$#_{}"}}  # fmt: skip


def latex(results: Results) -> str:
    """The table as a LaTeX tabular, every special character escaped."""
    head, *found = _lines(results)
    columns = "".join("l" if name in ("loss", "verdict") else "r" for name in head)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", " & ".join(head).replace("%", r"\%") + r" \\", r"\hline"]
    at = next(i for i, name in enumerate(head) if name.startswith("robust"))
    for line in found:
        cells = ["".join(_TEX.get(ch, ch) for ch in c) for c in line]
        cells[at] = cells[at].replace(r"\textless{}=", r"$\leq$").replace("[", "{[}").replace("]", "{]}")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"
