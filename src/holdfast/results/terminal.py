"""The table of results in a terminal, laid out for its width."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from ..user_input import typed
from .corruptions import corruption_tables
from .rows import rows
from .schema import Results
from .text import caption, cells, percent

_COLOURS = {"exact": "green", "tight": "green", "loose": "yellow", "refuted": "red", "void": "bold red"}
_COLUMN = 16  # with this much room for names, columns stay two apart although fewer names then fit
_Line = tuple[str, ...]


@dataclass(frozen=True)
class Printed:
    """A table for ``rich``, laid out when the width is known.

    Attributes:
        head: headings of the columns.
        lines: cells of each line. A line of one cell is the heading of a part.
        caption: a line below the table.
    """

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        head, lines = _wrapped(self.head, self.lines, 11), self.lines
        if len(head[0]) + sum(1 + wide for wide in _widths(head, lines)) > options.max_width - 1:
            lines = tuple(_folded(self.head, line) for line in self.lines)
            names = [name.replace("certified", "certi-fied") for name in self.head if not name.endswith("verdict")]
            head = _wrapped(tuple(names), lines, 8)
        yield from _laid_out(head, lines, options.max_width, "-" if options.ascii_only else "\u2500")
        if self.caption:
            yield Text(self.caption + "\n", style="dim")


@typed
def table(results: Results) -> Printed:
    """The table for a terminal of 80 columns or more, in percent; with several threats, a part for each.

    A loss whose name is too long for its column is printed on a line of its own, above its numbers. Where the columns
    do not fit side by side, each verdict moves below the accuracy it belongs to.

    Args:
        results: the results.

    Returns:
        An object that ``rich`` prints.
    """
    shown = rows(results)
    head, *texts = cells(shown)
    lines: list[_Line] = []
    threats, before = list(dict.fromkeys(row.threat for row in shown)), ""
    for row, (label, *rest) in zip(shown, texts, strict=True):
        if len(threats) > 1:
            label = label.removesuffix(f" ({row.threat})")
            if row.threat != before:
                lines.append((row.threat,))
            before = row.threat
        lines.append((label, *rest))
    return Printed(head, tuple(lines), caption(results, shown) if shown else "")


@typed
def corruption_prints(results: Results) -> list[Printed]:
    """Accuracy under each kind of corruption at each severity, in percent, for a terminal: one table for each row.

    Args:
        results: the results.

    Returns:
        Objects that ``rich`` prints; none where there are no corruptions.
    """
    return [
        Printed(
            (f"{one.label}, severity", *map(str, one.severities)),
            (
                *((kind, *map(percent, values)) for kind, values in one.accuracy.items()),
                ("mean", *map(percent, one.means)),
                ("right under every kind", *map(percent, one.every)),
            ),
        )
        for one in corruption_tables(results)
    ]


def _widths(head: _Line, lines: Sequence[_Line]) -> list[int]:
    """Width of every column but the first."""
    with_numbers = [head, *(line for line in lines if len(line) > 1)]
    return [max(cell_len(part) for line in with_numbers for part in line[i].split("\n")) for i in range(1, len(head))]


def _wrapped(head: _Line, lines: Sequence[_Line], narrow: int) -> _Line:
    """The headings, those wider than their column's cells broken between words to ``narrow`` characters.

    >>> _wrapped(("loss", "PGD-50, train loss", "pgd10-targeted"), [("sce", "1.0", "2.0")], 10)
    ('loss', 'PGD-50,\\ntrain loss', 'pgd10-\\ntargeted')
    """
    cells_only = _widths(("",) * len(head), lines)
    return (head[0], *(_wrap(name, max(narrow, wide)) for name, wide in zip(head[1:], cells_only, strict=True)))


def _wrap(name: str, width: int) -> str:
    lines = [""]
    for word in re.findall(r"PGD-50,? ?|[^ -]+[ -]?", name):
        if lines[-1] and cell_len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(map(str.rstrip, lines))


def _folded(head: _Line, line: _Line) -> _Line:
    """A line with every verdict in the cell of its accuracy; below the robust one its interval."""
    if len(line) < len(head):
        return line
    out: list[str] = []
    for name, cell in zip(head, line, strict=True):
        if name.endswith("verdict"):
            figure, _, interval = out[-1].partition("\n")
            verdict = "" if cell in ("-", figure) else cell
            if interval:
                out[-1] = f"{figure} {verdict}".strip() + f"\n{interval}"
            else:
                out[-1] = "\n".join([figure, *verdict.split()])
        else:
            out.append(cell.replace(" [", "\n["))
    return tuple(out)


def _laid_out(head: _Line, lines: Sequence[_Line], width: int, rule: str) -> Iterator[Text]:
    """Head, rule and rows as lines. Names that fit stand beside their numbers, longer ones above them."""
    widths = _widths(head, lines)
    labels = [cell_len(line[0]) for line in lines if len(line) > 1]
    space_left = {gap: width - 1 - sum(widths) - gap * len(widths) for gap in (1, 2)}
    names_that_fit = {gap: sum(n <= room for n in labels) for gap, room in space_left.items()}
    gap = 2 if space_left[2] >= (_COLUMN if names_that_fit[2] < names_that_fit[1] else cell_len(head[0])) else 1
    column = max([cell_len(head[0]), *(n for n in labels if n <= space_left[gap])])
    left_aligned = [name.split("\n")[-1].endswith("verdict") for name in head[1:]]

    def row(label: str, texts: Sequence[str], styles: tuple[str, str], at_bottom: bool = False) -> Iterator[Text]:
        parts = [cell.split("\n") for cell in texts]
        height = max(map(len, parts), default=1)
        if at_bottom:
            parts = [[""] * (height - len(part)) + part for part in parts]
        for k in range(height):
            name = label if k == (height - 1 if at_bottom else 0) else ""
            line = Text(name + " " * (column - cell_len(name)), style=styles[0], no_wrap=True, overflow="ignore")
            for part, wide, is_left_aligned in zip(parts, widths, left_aligned, strict=True):
                cell = part[k] if k < len(part) else ""
                space = " " * (wide - cell_len(cell))
                before, blank, word = cell.rpartition(" ")
                line.append(" " * gap + ("" if is_left_aligned else space))
                line.append(before + blank).append(word, styles[1] or _COLOURS.get(word, ""))
                line.append(space if is_left_aligned else "")
            yield line.append(" ")

    yield from row(head[0], head[1:], ("bold", "bold"), at_bottom=True)
    yield Text(rule * (column + sum(widths) + gap * len(widths)), no_wrap=True, overflow="ignore")
    for number, (label, *texts) in enumerate(lines):
        if not texts:
            yield Text(("\n" if number else "") + label, style="bold")
            continue
        if cell_len(label) > column:
            yield Text(_broken(label, width - 2), no_wrap=True, overflow="ignore")
            label = ""
        yield from row(label, texts, ("", ""))


def _broken(label: str, width: int) -> str:
    """A name on as many lines as it needs, broken between its parts; a part longer than a line is cut.

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
