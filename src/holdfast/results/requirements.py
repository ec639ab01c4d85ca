"""Requirements on results, such as "robust>=0.45": read, held against the rows of a table, written as JUnit XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import UserError, plain, printable, unknown
from ..user_input import read_number, typed
from ..user_input import text as checked_text
from .rows import WORST_FIRST, Row
from .schema import Interval
from .statistics import proportion

COLUMNS = ("clean", "pgd50", "robust", "certified")
VERDICT = "verdict"
_FORM = re.compile(r"(?:(?P<row>.*\S)\s*:)?\s*(?P<column>[^\s:<>=]+)\s*(?P<sign>[<>]?=?)\s*(?P<value>[^<>=]*)")


@dataclass(frozen=True)
class Requirement:
    """What a figure of a row, or of every row, must be.

    Attributes:
        text: as it was written.
        row: the label or the loss of the rows that it is about; "" for every row.
        column: of COLUMNS, or "verdict" for the verdict on robust accuracy.
        sign: ">=" or "<=".
        value: a proportion in [0, 1], or a verdict other than void.
    """

    text: str
    row: str
    column: str
    sign: str
    value: float | str

    def is_about(self, *names: str) -> bool:
        """Whether it is about a row with one of these names."""
        return not self.row or _folded(self.row) in map(_folded, names)


@dataclass(frozen=True)
class Outcome:
    """A requirement held against the rows that it is about.

    Attributes:
        requirement: what was required.
        measured: for each row, its label and what was measured, in words.
        failures: for each row that does not meet it, why, in words.
    """

    requirement: Requirement
    measured: tuple[str, ...]
    failures: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Whether every row that it is about meets it, and there is one."""
        return bool(self.measured) and not self.failures

    @property
    def reason(self) -> str:
        """Why it is not met, in one line; "" where it is."""
        if self.met:
            return ""
        return plain(f"{self.requirement.text}: {'; '.join(self.failures) or 'no row was measured'}")


@typed
def parse_requirement(text: str) -> Requirement:
    """Read a requirement.

    Args:
        text: "COLUMN>=VALUE" or "COLUMN<=VALUE", with COLUMN clean, pgd50, robust or certified, and VALUE 0.45 or 45%;
            or "verdict=tight". Before it "ROW:" for one row alone; ROW is a label of the table, or a loss spec.

    Returns:
        The requirement. "verdict=tight" asks for this verdict or a better one: exact > tight > loose > refuted > void.

    Raises:
        UserError: another form, an unknown column or verdict, or a value outside [0, 1].

    >>> one = parse_requirement("isce:s=10: robust >= 45%")
    >>> one.row, one.column, one.sign, one.value
    ('isce:s=10', 'robust', '>=', 0.45)
    """
    text = checked_text("a requirement", text).strip()
    form = _FORM.fullmatch(text)
    if form is None:
        raise UserError(
            f"cannot read the requirement '{text}': write it as robust>=0.45, verdict=tight or 'sce: robust>=0.45'."
        )
    row, column, sign, value = form["row"] or "", form["column"].lower(), form["sign"], form["value"].strip()
    if column not in (*COLUMNS, VERDICT):
        raise unknown(f"column of the requirement '{text}':", form["column"], (*COLUMNS, VERDICT))
    if column == VERDICT:
        if sign not in ("=", ">="):
            raise UserError(f"the requirement '{text}' is no least verdict: write verdict=tight, for tight or better.")
        if value.lower() not in WORST_FIRST[1:]:  # every row is void or better
            raise unknown(f"verdict of the requirement '{text}':", value, WORST_FIRST[1:])
        return Requirement(text, row, column, ">=", value.lower())
    if sign not in (">=", "<="):
        raise UserError(f"the requirement '{text}' compares with neither >= nor <=: write {column}>=0.45.")
    return Requirement(text, row, column, sign, _proportion(text, value))


def _proportion(text: str, value: str) -> float:
    """The proportion that a value is: 0.45 or 45%."""
    number = read_number(value.removesuffix("%").strip())
    if number is None:
        raise UserError(f"the requirement '{text}' has no number after its sign: write 0.45 or 45%.")
    share = number / 100 if value.endswith("%") else float(number)
    if not 0 <= share <= 1:
        percent = f": for percent write {value}%" if 1 < share <= 100 and not value.endswith("%") else ""
        raise UserError(f"the value of the requirement '{text}' must lie between 0 and 1, or 0% and 100%{percent}.")
    return share


@typed
def check_rows(requirements: Sequence[Requirement], names: Iterable[str]) -> None:
    """Check before a measurement that every row that is required will be there.

    Args:
        requirements: what is required.
        names: labels and losses of the rows.

    Raises:
        UserError: a requirement is about another row.
    """
    names = list(dict.fromkeys(names))
    for one in requirements:
        if not one.is_about(*names):
            raise unknown(f"row of the requirement '{one.text}':", one.row, names)


@typed
def check_requirements(requirements: Sequence[Requirement], shown: Sequence[Row]) -> list[Outcome]:
    """Hold requirements against rows.

    ">=" asks for the lower end of the 95% interval, "<=" for the upper one. An interval over seeds says nothing about
    other samples, and equal seeds give it no width: it is widened to hold the interval over the samples of one run.
    A row with a void measurement meets no requirement, and a row without the figure meets none on it.

    Args:
        requirements: what is required.
        shown: the rows.

    Returns:
        An outcome for each requirement.

    Raises:
        UserError: a requirement is about a row that is not there.
    """
    check_rows(requirements, [name for row in shown for name in (row.label, row.loss)])
    outcomes = []
    for one in requirements:
        about = [row for row in shown if one.is_about(row.label, row.loss)]
        failures = [(row.label, _failure(one, row)) for row in about]
        outcomes.append(
            Outcome(
                one,
                tuple(f"{row.label}: {_measured(one, row)}" for row in about),
                tuple(f"{label}: {why}" for label, why in failures if why),
            )
        )
    return outcomes


def is_measured(column: str, row: Row) -> bool:
    """Whether a row has a column of COLUMNS, or a verdict; a void one has them all, and they count for nothing."""
    return _is_void(row) or (bool(row.status) if column == VERDICT else _figure(column, row) is not None)


def _is_void(row: Row) -> bool:
    return row.robust is None or "void" in (row.status, row.pgd50_status)


def _figure(column: str, row: Row) -> Interval | None:
    """A figure of a row with the interval that a requirement holds against; None where it was not measured."""
    figures = {"clean": row.clean, "pgd50": row.attacks.get("pgd50"), "robust": row.robust, "certified": row.certified}
    figure, n = figures[column], (row.pgd50_n if column == "pgd50" else None) or row.n
    if figure is None or len(row.runs) < 2:
        return figure
    one_run = proportion(round(figure.value * n), n)
    return Interval(figure.value, min(figure.low, one_run.low), max(figure.high, one_run.high))


def _measured(one: Requirement, row: Row) -> str:
    """What a row has in the column of a requirement, in words."""
    if not is_measured(one.column, row):
        return f"{one.column} was not measured"
    figure = None if one.column == VERDICT or _is_void(row) else _figure(one.column, row)
    if figure is None:
        return f"verdict {row.verdict or 'void'}"
    value, low, high = (f"{100 * end:.1f}" for end in (figure.value, figure.low, figure.high))
    return f"{one.column} {value}% [{low}, {high}]"


def _failure(one: Requirement, row: Row) -> str:
    """Why a row does not meet a requirement; "" where it does."""
    if _is_void(row) or not is_measured(one.column, row):
        return _measured(one, row)
    if isinstance(one.value, str):
        enough = WORST_FIRST.index(row.status) >= WORST_FIRST.index(one.value)
        return "" if enough else f"{_measured(one, row)}, which is worse than {one.value}"
    figure = _figure(one.column, row)
    if figure is None:
        return f"{one.column} was not measured"
    end, name, beyond = (figure.low, "lower", "below") if one.sign == ">=" else (figure.high, "upper", "above")
    if end >= one.value if one.sign == ">=" else end <= one.value:
        return ""
    ends = next(
        texts for digits in range(1, 20) if len(set(texts := [_percent(v, digits) for v in (end, one.value)])) > 1
    )
    return f"{_measured(one, row)}, whose {name} end {ends[0]}% is {beyond} {ends[1]}%"


def _percent(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f}"


def _folded(name: str) -> str:
    return " ".join(name.split()).casefold()


@typed
def junit(outcomes: Sequence[Outcome], *, suite: str = "holdfast", timestamp: str = "") -> str:
    """Outcomes as JUnit XML, which continuous integration shows: one test case for each requirement.

    Args:
        outcomes: what was found.
        suite: the name of the test suite.
        timestamp: when, as ISO 8601; "" to leave it out.

    Returns:
        XML. A case that is not met has a failure with its reason; each has what was measured as its output.
    """
    failed = sum(not one.met for one in outcomes)
    about = {"name": printable(suite), "tests": str(len(outcomes)), "failures": str(failed), "errors": "0"}
    root = ElementTree.Element("testsuites", about)
    group = ElementTree.SubElement(root, "testsuite", about | ({"timestamp": timestamp} if timestamp else {}))
    for one in outcomes:
        case = ElementTree.SubElement(
            group, "testcase", classname=printable(suite), name=plain(one.requirement.text), time="0"
        )
        if not one.met:
            failure = ElementTree.SubElement(case, "failure", type="requirement", message=one.reason)
            failure.text = "\n".join(map(plain, one.failures))
        ElementTree.SubElement(case, "system-out").text = "\n".join(map(plain, one.measured))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
