"""Runs merged into rows, and the rows as a table: in the terminal, Markdown, CSV and LaTeX."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from csv import writer as csv_writer
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from .schema import Interval, Results, Run, Verdict
from .statistics import over_seeds, proportion

_WORST_FIRST = ("void", "refuted", "loose", "tight")


@dataclass(frozen=True)
class Row:
    """One line of the table: a loss under a threat, over one or more seeds. ``runs`` are indexes into results.runs."""

    label: str  # the loss, told apart by threat or name where the loss alone does not
    loss: str
    threat: str
    clean: Interval
    pgd50: Interval
    robust: Interval | None
    status: str
    verdict: str
    n: int
    seeds: tuple[int | None, ...]
    interval: str
    runs: tuple[int, ...]
    pgd50_status: str = ""  # status and verdict are of the robust figure, these two of the published one
    pgd50_verdict: str = ""
    own: Interval | None = None
    certified: Interval | None = None
    individual: dict[str, Interval] = dataclasses.field(default_factory=dict)


def rows(results: Results) -> list[Row]:
    """One row per loss and threat, in order of first appearance.

    Runs that differ in seed alone are merged: mean and t interval over seeds; a single run keeps its own interval. Runs
    of one loss whose seeds repeat are different experiments: one row per run name. One void run makes the row void, and
    the verdict shown is the worst of the merged ones. A figure that one of them lacks is not shown.
    """
    out: list[Row] = []
    for members in _groups(results.runs):
        merged, first = [results.runs[i] for i in members], results.runs[members[0]]
        clean, published, robust, own = first.clean, first.pgd50, first.robust, first.own
        certified, alone = first.certified, first.individual
        interval = first.interval
        if len(merged) > 1:
            clean, published = over_seeds(r.clean.value for r in merged), over_seeds(r.pgd50.value for r in merged)
            robust, own = _mean([r.robust for r in merged]), _mean([r.own for r in merged])
            certified = _mean([r.certified for r in merged])
            means = {name: _mean([r.individual.get(name) for r in merged]) for name in alone}
            alone = {name: mean for name, mean in means.items() if mean is not None}
            interval = f"mean and 95% t interval over {len(merged)} seeds"
        status, text = _worst([r.verdict for r in merged])
        claimed, why = _worst([r.pgd50_verdict for r in merged])
        figures = first.loss, first.loss, first.threat_text, clean, published, robust, status, text, first.n
        seeds = tuple(r.seed for r in merged)
        out.append(Row(*figures, seeds, interval, tuple(members), claimed, why, own, certified, alone))
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


def _share(figure: Interval | None) -> str:
    return percent(figure.value) if figure else "-"


_HEAD = ("loss", "clean", "pgd50", "verdict", "own loss", "certified", "robust, 95%", "verdict")


def _cells(row: Row) -> tuple[str, ...]:
    published = _share(row.pgd50), row.pgd50_status or "-"
    proved = _share(row.own), _share(row.certified)
    return _name(row), _share(row.clean), *published, *proved, robust_text(row), row.status or "-"


def _name(row: Row) -> str:
    return re.sub(r"\s+", " ", row.label)


def any_proved(found: Sequence[Row]) -> bool:
    """Whether a certificate holds of any sample: one that proves nothing is not worth a column to a reader."""
    return any(row.certified is not None and row.certified.value > 0 for row in found)


def per_attack_table(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """The papers' table as text, head first: a row per loss, a column per attack alone, then what the row is worth.

    clean, each of ``alone`` in order of first appearance, certified where any is, robust, and its verdict.
    """
    names = list(dict.fromkeys(name for row in found for name in row.individual))
    proved = ["certified"] if any_proved(found) else []
    lines = [("loss", "clean", *names, *proved, "robust, 95%", "verdict")]
    for row in found:
        figures = [row.clean, *(row.individual.get(name) for name in names), *([row.certified] if proved else [])]
        lines.append((_name(row), *map(_share, figures), robust_text(row), row.status or "-"))
    return lines


def _lines(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """Head and rows as text: the papers' table where attacks stood alone; else a verdict's column only where something
    was judged, the own loss's where it was run, certified where something was proved."""
    if any(row.individual for row in found):
        return per_attack_table(found)
    seen = {3: any(r.pgd50_status for r in found), 4: any(r.own for r in found)}
    seen |= {5: any_proved(found), 7: any(r.status for r in found)}
    return [tuple(c for i, c in enumerate(line) if seen.get(i, True)) for line in (_HEAD, *map(_cells, found))]


@dataclass(frozen=True)
class Printed:
    """A table for a terminal, laid out when the width is known. A line of one cell is the head of a part."""

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from _laid_out(self.head, self.lines, options.max_width, "-" if options.ascii_only else "\u2500")
        if self.caption:
            yield Text(self.caption + "\n", style="dim")


def table(results: Results) -> Printed:
    """The table for a terminal, 80 columns or more, in percent; with several threats, a part for each.

    A loss whose name is too long for a column has it on a line of its own, above its figures. The papers' table has
    heads of two lines, and robust, verdict and interval in one cell of two lines.
    """
    found = rows(results)
    head, *cells = _lines(found)
    if any(row.individual for row in found):
        names = [name.replace("certified", "certi-fied").replace("-", "-\n") for name in head[:-2]]
        head, cells = (*names, "robust,\n95%"), [_narrow(line) for line in cells]
    lines: list[tuple[str, ...]] = []
    threats, before = list(dict.fromkeys(row.threat for row in found)), ""
    for row, (label, *rest) in zip(found, cells, strict=True):
        if len(threats) > 1:
            label = label.removesuffix(f" ({row.threat})")
            if row.threat != before:
                lines.append((row.threat,))
            before = row.threat
        lines.append((label, *rest))
    return Printed(head, tuple(lines), caption(results, found) if found else "")


def caption(results: Results, found: Sequence[Row]) -> str:
    """What the figures of a table are of: the data, how many samples, the threat where there is one, the interval."""
    threats = list(dict.fromkeys(row.threat for row in found))
    about = [
        str(results.data.get("name", "")),
        " or ".join(f"{n:,}" for n in dict.fromkeys(row.n for row in found)) + " samples",
        *(threats if len(threats) == 1 else []),
        "in percent",
    ]
    return f"{', '.join(filter(None, about))}; {'; '.join(dict.fromkeys(row.interval for row in found))}"


_COLOURS = {"tight": "green", "loose": "yellow", "refuted": "red", "void": "bold red"}
_COLUMN = 16  # up to here, a wider column for names is worth closer figures


def _laid_out(head: tuple[str, ...], lines: Sequence[tuple[str, ...]], width: int, rule: str) -> Iterator[Text]:
    """Head, rule and rows as lines: names that fit beside the figures stand there, longer ones above them."""
    figures = [line for line in lines if len(line) > 1]
    widths = [
        max(cell_len(part) for line in (head, *figures) for part in line[i].split("\n")) for i in range(1, len(head))
    ]
    labels = [cell_len(line[0]) for line in figures]
    rooms = {gap: width - 1 - sum(widths) - gap * len(widths) for gap in (1, 2)}
    beside = {gap: sum(n <= room for n in labels) for gap, room in rooms.items()}
    roomy = rooms[2] >= (_COLUMN if beside[2] < beside[1] else cell_len(head[0]))
    gap = 2 if roomy else 1
    room = rooms[gap]
    column = max([cell_len(head[0]), *(n for n in labels if n <= room)])
    lefts = [name == "verdict" for name in head[1:]]

    def row(label: str, cells: Sequence[str], styles: tuple[str, str], foot: bool = False) -> Iterator[Text]:
        parts = [cell.split("\n") for cell in cells]
        height = max(map(len, parts), default=1)
        if foot:  # the words of a head stand on its rule
            parts = [[""] * (height - len(part)) + part for part in parts]
        for k in range(height):
            at_label = label if k == (height - 1 if foot else 0) else ""
            line = Text(
                at_label + " " * (column - cell_len(at_label)), style=styles[0], no_wrap=True, overflow="ignore"
            )
            for part, wide, to_left in zip(parts, widths, lefts, strict=True):
                cell = part[k] if k < len(part) else ""
                space = " " * (wide - cell_len(cell))
                said, blank, word = cell.rpartition(" ")
                line.append(" " * gap + ("" if to_left else space))
                line.append(said + blank).append(word, styles[1] or _COLOURS.get(word, ""))
                line.append(space if to_left else "")
            yield line.append(" ")

    yield from row(head[0], head[1:], ("bold", "bold"), foot=True)
    yield Text(rule * (column + sum(widths) + gap * len(widths)), no_wrap=True, overflow="ignore")
    for number, (label, *cells) in enumerate(lines):
        if not cells:
            yield Text(("\n" if number else "") + label, style="bold")
            continue
        if cell_len(label) > column:
            yield Text(_broken(label, width - 2), no_wrap=True, overflow="ignore")
            label = ""
        yield from row(label, cells, ("", ""))


def _broken(label: str, width: int) -> str:
    """A name on as many lines as it takes, which end where its parts do; a part longer than a line is cut.

    >>> print(_broken("sce+adversarial:steps=5,ramp=0.3+stepnet:slope=10", 20))
    sce+adversarial
      :steps=5,ramp=0.3
      +stepnet:slope=10
    """
    lines = [""]
    for whole in re.findall(r"[+@:]?[^+@,:]*,?", label):
        for part in re.findall(f".{{1,{max(1, width - 2)}}}", whole):
            if lines[-1] and cell_len(lines[-1] + part) > width - 2 * (len(lines) > 1):
                lines.append("")
            lines[-1] += part
    return "\n  ".join(lines)


def _narrow(line: tuple[str, ...]) -> tuple[str, ...]:
    """The last two cells in one: figure and verdict above, interval below."""
    figure, _, interval = line[-2].partition(" [")
    above = f"{figure} {line[-1]}" if line[-1] not in ("-", figure) else figure
    return (*line[:-2], f"{above}\n[{interval}" if interval else above)


def doubts(results: Results) -> list[str]:
    """A line for each figure whose verdict is not tight: what it is worth, and why."""
    judged = [
        (row.label, name, status, why)
        for row in rows(results)
        for name, status, why in (
            ("pgd50", row.pgd50_status, row.pgd50_verdict),
            ("robust", row.status, row.verdict),
        )
    ]
    said = [f"{label}: {name} {why}" for label, name, status, why in judged if status not in ("", "tight")]
    said += [
        f"{run.name}: the minimal attack behind the region's measures broke {missed:,} more: robust is too high"
        for run in results.runs
        if run.robust is not None and (missed := run.region.get("missed"))
    ]
    return said + [
        f"{run.name}: the budget ended the suite before its end; {run.remaining['expected']:.1f} more of {run.n:,} are "
        f"expected to fall, at most {run.remaining['high']:.0f}"
        for run in results.runs
        if run.remaining.get("unfinished")
    ]


def remaining_text(run: Run) -> str:
    """What may still be breakable, in a sentence."""
    left = run.remaining
    if not left:
        return ""
    drawn = left.get("spot_check")
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
        f"Two independent runs on {left['tested']:,} of {left['survivors']:,} survivors broke {left['first']} and "
        f"{left['second']}, {left['both']} of them alike: {left['expected']:.1f} more of {run.n:,} are expected to be "
        f"breakable (95% interval {left['low']:.0f} to {left['high']:.0f}).{full}{ended}{votes}"
    )


_CELL = "padding:.15em .6em;white-space:nowrap;text-align:"
_RULE = "border-bottom:1px solid rgba(128,128,128,.5)"  # a grey that shows on white and on black; no other colour


def notebook(results: Results) -> str:
    """The table as HTML for a notebook: self-contained, escaped, in the notebook's own colours; doubts below it."""
    found = rows(results)
    if not found:
        return "<p>No runs.</p>"
    head, *cells = _lines(found)
    several = len({row.threat for row in found}) > 1
    lines, before = [], ""
    for row, (label, *rest) in zip(found, cells, strict=True):
        if several and row.threat != before:
            part = f'<th colspan="{len(head)}" style="{_CELL}left;padding-top:.8em">{escape(row.threat)}</th>'
            lines.append(f"<tr>{part}</tr>")
            before = row.threat
        name = label.removesuffix(f" ({row.threat})") if several else label
        lines.append(_html_row(head, [name, *rest], "td"))
    doubtful = [f"<li>{escape(line)}</li>" for line in doubts(results)]
    why = f"<details><summary>what is in doubt: {len(doubtful)}</summary><ul>{''.join(doubtful)}</ul></details>"
    return _html_table(_html_row(head, head, "th"), lines, caption(results, found)) + (why if doubtful else "")


def notebook_counts(
    about: str, n: int, counts: Mapping[str, int | None], stages: Sequence[Any] = (), note: str = ""
) -> str:
    """One evaluation as HTML for a notebook, from plain numbers.

    counts: of n samples, how many are clean, robust, ...: each as a share with its 95% interval, None is left out;
    stages: whatever has name, attacked, broken, forwards, backwards and seconds; note: a sentence below.
    """
    head = ("accuracy", "%", "95%")
    shares = {name: proportion(k, n) for name, k in counts.items() if k is not None and n}
    lines = [
        _html_row(head, (name, percent(share.value), f"[{percent(share.low)}, {percent(share.high)}]"), "td")
        for name, share in shares.items()
    ]
    out = _html_table(_html_row(head, head, "th"), lines, f"{about}, {n:,} samples; Clopper-Pearson intervals")
    if stages:
        heads = ("stage", "attacked", "broken", "passes", "seconds")
        told = [
            (s.name, f"{s.attacked:,}", f"{s.broken:,}", f"{s.forwards + s.backwards:,}", f"{s.seconds:.1f}")
            for s in stages
        ]
        whole = _html_table(_html_row(heads, heads, "th"), [_html_row(heads, cells, "td") for cells in told], "")
        out += f"<details><summary>stages: {len(told)}</summary>{whole}</details>"
    return out + (f"<p>{escape(note)}</p>" if note else "")


def _html_row(head: Sequence[str], cells: Sequence[str], tag: str) -> str:
    told = []
    for name, cell in zip(head, cells, strict=True):
        words = name in (head[0], "verdict")
        look = _CELL + ("left" if words else "right")
        if name == head[0]:  # names may be long
            look = look.replace("nowrap", "normal;overflow-wrap:anywhere")
        told.append(f'<{tag} style="{look};{_RULE if tag == "th" else ""}">{escape(cell)}</{tag}>')
    return f"<tr>{''.join(told)}</tr>"


def _html_table(head: str, lines: Sequence[str], below: str) -> str:
    said = f'<div style="opacity:.75;margin:.3em 0">{escape(below)}</div>' if below else ""
    whole = f'<table style="border-collapse:collapse"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div style="overflow-x:auto">{whole}{said}</div>'


def markdown(results: Results) -> str:
    """The table in Markdown."""
    head, *cells = _lines(rows(results))
    rules = ["---" if name in ("loss", "verdict") else "---:" for name in head]
    lines = ["| " + " | ".join(map(_plain, head)) + " |", "|" + "|".join(rules) + "|"]
    for label, *rest in cells:
        lines.append("| " + " | ".join([_plain(label), *rest]) + " |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([\\`*_<>\[\]|&~$#])", r"\\\1", text)


def csv(results: Results) -> str:
    """The rows as CSV, proportions unrounded, empty where there is no figure.

    Columns of attacks alone and of certified accuracy only where some row has them.
    """
    out = StringIO()
    write = csv_writer(out, lineterminator="\n").writerow
    found = rows(results)
    names = list(dict.fromkeys(name for row in found for name in row.individual))
    proved = ["certified"] if any(row.certified for row in found) else []
    shown = ("clean", "pgd50", *names, *proved, "robust")
    bounds = [f"{c}{suffix}" for c in shown for suffix in ("", "_low", "_high")]
    write(["loss", "threat", *bounds, "pgd50_verdict", "verdict", "n", "seeds", "interval"])
    for r in found:
        every = r.clean, r.pgd50, *map(r.individual.get, names), *([r.certified] if proved else []), r.robust
        figures = [v for i in every for v in (dataclasses.astuple(i) if i else ("", "", ""))]
        write([r.label, r.threat, *figures, r.pgd50_verdict, r.verdict, r.n, " ".join(map(str, r.seeds)), r.interval])
    return out.getvalue()


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", **{c: "\\" + c for c in "&%$#_{}"}}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(ch, ch) for ch in text)


def latex(results: Results) -> str:
    """The table as a LaTeX tabular, every special character escaped."""
    head, *found = _lines(rows(results))
    columns = "".join("l" if name in ("loss", "verdict") else "r" for name in head)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", " & ".join(map(_tex, head)) + r" \\", r"\hline"]
    at = next(i for i, name in enumerate(head) if name.startswith("robust"))
    for line in found:
        cells = [_tex(c) for c in line]
        cells[at] = cells[at].replace(r"\textless{}=", r"$\leq$").replace("[", "{[}").replace("]", "{]}")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"
