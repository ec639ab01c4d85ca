"""Reading a VNN-LIB property: a box of inputs, and what the outputs of a counterexample satisfy.

The language is the one of the VNN-COMP benchmarks (version 1): ``declare-const`` of X_i and Y_j, and ``assert`` with
<=, >=, and, or, numbers, variables, and + - * of them as far as they stay linear. Everything else is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, printable
from ..io import existing_file
from ..user_input import typed

MOST_BYTES = 2**26  # of a file
MOST_WORDS = 2**22  # of one assertion
MOST_DEPTH = 32  # of nested brackets
MOST_CASES = 10_000  # of the disjunction that the assertions come to
MOST_VARIABLES = 2**22
MOST_VALUES = 2**26  # numbers that all cases hold together
_TOKEN = re.compile(r";[^\n]*|[()]|[^\s();]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})", re.ASCII)
LONGEST_NUMBER = 400  # characters

Array = Any  # of numpy, float64


@dataclass(frozen=True)
class Case:
    """One way in which a counterexample may look: lo <= x <= hi, and weights @ y + offsets <= 0.

    Args:
        lo: (n,) float64; the same array for all cases without constraints of their own on the inputs.
        hi: (n,) float64.
        weights: (R, K) float64.
        offsets: (R,) float64.
        slack: (R,) float64, at most how far the offsets are from the numbers of the file.
    """

    lo: Array
    hi: Array
    weights: Array
    offsets: Array
    slack: Array


@dataclass(frozen=True)
class Property:
    """What a counterexample satisfies: one of the cases.

    Args:
        n_inputs: how many X there are, in the order in which the network's input lies in memory.
        n_outputs: how many Y.
        cases: at least one.
    """

    n_inputs: int
    n_outputs: int
    cases: tuple[Case, ...]


@typed
def read_property(path: str | Path) -> Property:
    """Read a .vnnlib file.

    Args:
        path: the file.

    Returns:
        The Property.

    Raises:
        UserError: there is no such file, it is too large, or it holds anything but the language above; an input without
            a lower or upper bound, an empty box, or a case without a constraint on outputs.
    """
    file = existing_file(path)
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise UserError(f"{file} has {size:,} bytes: a property may have at most {MOST_BYTES:,}.")
    try:
        text = file.read_bytes().decode("ascii")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no VNN-LIB property: it holds characters that are not ASCII.") from None
    try:
        return parse_property(text)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


@typed
def parse_property(text: str) -> Property:
    """The property in a text, as ``read_property`` reads it.

    >>> found = parse_property('''(declare-const X_0 Real) (declare-const Y_0 Real) (declare-const Y_1 Real)
    ... (assert (>= X_0 -0.5)) (assert (<= X_0 0.5))   ; a counterexample has Y_0 <= Y_1 or Y_0 <= -3
    ... (assert (or (<= Y_0 Y_1) (and (<= Y_0 -3.0))))''')
    >>> [(float(case.lo[0]), case.weights.tolist(), case.offsets.tolist()) for case in found.cases]
    [(-0.5, [[1.0, -1.0]], [0.0]), (-0.5, [[1.0, 0.0]], [3.0])]
    """
    declared: dict[str, set[int]] = {"X": set(), "Y": set()}
    asserted: list[Any] = []
    for line, form in _forms(text):
        try:
            if isinstance(form, str) or not form or not isinstance(form[0], str):
                raise UserError("expected (declare-const ...) or (assert ...)")
            if form[0] == "declare-const":
                _declare(form, declared)
            elif form[0] == "assert" and len(form) == 2:
                asserted.append(_formula(form[1], declared))
            else:
                raise UserError(f"'{printable(form[0], 40)}' with {len(form) - 1} arguments is not known")
        except UserError as error:
            raise UserError(f"line {line}: {str(error).rstrip('.')}.") from None
    counts = {}
    for letter, numbers in declared.items():
        counts[letter] = len(numbers)
        if not numbers or max(numbers) + 1 != len(numbers):
            missing = next((i for i in range(len(numbers) + 1) if i not in numbers), 0)
            raise UserError(f"{letter}_{missing} is not declared: variables are numbered from 0 without a gap.")
    return Property(counts["X"], counts["Y"], _cases(asserted, counts["X"], counts["Y"]))


def _forms(text: str) -> Iterator[tuple[int, Any]]:
    """The bracketed forms of a text as nested lists of words, each with the line that it begins on, one by one."""
    open_: list[list[Any]] = []
    line, counted, began, words = 1, 0, 0, 0
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word[0] == ";":
            continue
        if not open_:
            line += text.count("\n", counted, token.start())
            counted, began, words = token.start(), line, 0
        words += 1
        if words > MOST_WORDS:
            raise UserError(f"line {began}: what begins there has more than {MOST_WORDS:,} words and brackets.")
        if word == "(":
            open_.append([])
            if len(open_) > MOST_DEPTH:
                raise UserError(f"line {began}: brackets are nested deeper than {MOST_DEPTH}.")
            continue
        if word == ")":
            if not open_:
                raise UserError(f"line {began}: a bracket is closed that was never opened.")
            done: Any = open_.pop()
        else:
            done = word
        if open_:
            open_[-1].append(done)
        else:
            yield began, done
    if open_:
        raise UserError(f"line {began}: a bracket is never closed: the file is cut short.")


def _declare(form: list[Any], declared: dict[str, set[int]]) -> None:
    name = form[1] if len(form) == 3 and isinstance(form[1], str) else ""
    match = _VARIABLE.fullmatch(name)
    if match is None or form[2] != "Real":
        raise UserError("expected (declare-const X_i Real) or (declare-const Y_j Real)")
    letter, number = match[1], int(match[2])
    if number in declared[letter] or number >= MOST_VARIABLES:
        raise UserError(f"{name} is declared twice, or its number is {MOST_VARIABLES:,} or more")
    declared[letter].add(number)


# A formula is ("and", parts), ("or", parts), ("x", number, sign, bound) for sign x <= bound, or ("y", weights by
# output, offset, slack) for sum of weights y + offset <= 0.


def _formula(tree: Any, declared: dict[str, set[int]]) -> Any:
    head = tree[0] if isinstance(tree, list) and tree else tree
    if not isinstance(tree, list) or not isinstance(head, str):
        raise UserError(f"expected a comparison, and, or or, got '{_short(tree)}'")
    if head in ("and", "or"):
        if len(tree) == 1:
            raise UserError(f"'{head}' of nothing")
        return head, [_formula(part, declared) for part in tree[1:]]
    if head not in ("<=", ">=") or len(tree) != 3:
        raise UserError(f"expected <= or >= with two sides, and, or or, got '{_short(tree)}'")
    low, high = (_term(side, declared) for side in (tree[1:] if head == "<=" else tree[:0:-1]))
    weights: dict[tuple[str, int], float] = dict(low[0])
    for name, weight in high[0].items():
        if name in weights:
            raise UserError(f"{name[0]}_{name[1]} occurs twice in one comparison: write it once")
        weights[name] = -weight
    constants = [*low[1], *(-value for value in high[1])]
    offset, slack = math.fsum(constants), 2.0**-50 * sum(map(abs, constants))
    weights = {name: weight for name, weight in weights.items() if weight}
    letters = {letter for letter, _ in weights}
    if not letters:
        raise UserError("a comparison of two numbers")
    if letters == {"Y"}:
        return "y", {number: weight for (_, number), weight in weights.items()}, offset, slack
    if letters == {"X"} and len(weights) == 1 and len(constants) == 1:
        [((_, number), weight)] = weights.items()
        return "x", number, math.copysign(1.0, weight), -offset / abs(weight)
    raise UserError("a comparison of an input with more than one number: write (<= X_i number) or (>= X_i number)")


def _term(tree: Any, declared: dict[str, set[int]]) -> tuple[dict[tuple[str, int], float], list[float]]:
    """(weights by variable, constants to be summed) of a linear expression."""
    if isinstance(tree, str):
        match = _VARIABLE.fullmatch(tree)
        if match is not None:
            if int(match[2]) not in declared[match[1]]:
                raise UserError(f"{tree} is not declared before it is used")
            return {(match[1], int(match[2])): 1.0}, []
        number = float(tree) if len(tree) <= LONGEST_NUMBER and _NUMBER.fullmatch(tree) else math.inf
        if not math.isfinite(number):
            raise UserError(f"'{printable(tree, 40)}' is neither a finite number nor a variable X_i or Y_j")
        return {}, [number]
    head, parts = (tree[0], tree[1:]) if tree else ("", [])
    if head not in ("+", "-", "*") or not parts:
        raise UserError(f"expected a number, a variable, or + - * of them, got '{_short(tree)}'")
    terms = [_term(part, declared) for part in parts]
    if head == "*":
        factors = [math.fsum(constants) for weights, constants in terms if not weights]
        others = [term for term in terms if term[0]]
        if len(others) > 1:
            raise UserError("a product of two variables: a property must be linear")
        return _times(others[0] if others else ({}, [1.0]), math.prod(factors))
    if head == "-":
        terms = [_times(terms[0], -1.0)] if len(terms) == 1 else [terms[0], *(_times(t, -1.0) for t in terms[1:])]
    weights: dict[tuple[str, int], float] = {}
    for more, _ in terms:
        for name in more.keys() & weights.keys():
            raise UserError(f"{name[0]}_{name[1]} occurs twice in one comparison: write it once")
        weights |= more
    return weights, [value for _, constants in terms for value in constants]


def _times(
    term: tuple[dict[tuple[str, int], float], list[float]], factor: float
) -> tuple[dict[tuple[str, int], float], list[float]]:
    weights, constants = {name: w * factor for name, w in term[0].items()}, [value * factor for value in term[1]]
    if not all(map(math.isfinite, [*weights.values(), *constants])):
        raise UserError("a product that is too large")
    return weights, constants


def _short(tree: Any) -> str:
    """A tree as text, for an error."""
    text = tree if isinstance(tree, str) else f"({' '.join(p if isinstance(p, str) else '(...)' for p in tree[:4])})"
    return printable(text, 60)


def _cases(asserted: list[Any], n: int, k: int) -> tuple[Case, ...]:
    """The assertions as a disjunction."""
    conjuncts, choices = [], []
    for formula in (waiting := list(asserted)):
        if formula[0] == "and":
            waiting.extend(formula[1])  # the loop goes on over them
        elif formula[0] == "or":
            choices.append(formula)
        else:
            conjuncts.append(formula)
    count = math.prod(_count(formula) for formula in choices)
    if count > MOST_CASES:
        raise UserError(f"the assertions come to {count:,} cases: at most {MOST_CASES:,} are taken.")
    size = count * (k * sum(leaf[0] == "y" for leaf in conjuncts) + sum(map(_leaves, choices)) * (k + 1))
    size += count * n * any(_has_inputs(formula) for formula in choices)
    if size > MOST_VALUES:
        raise UserError(
            f"the {count:,} cases of the assertions hold {size:,} numbers: at most {MOST_VALUES:,} are taken."
        )
    lo, hi = np.full(n, -math.inf), np.full(n, math.inf)
    _bound(lo, hi, conjuncts)
    _check_box(lo, hi, whole=False)
    cases: list[Case] = []
    for chosen in product(*(_alternatives(formula) for formula in choices)):
        leaves = [leaf for part in chosen for leaf in part]
        low, high = lo, hi
        if any(leaf[0] == "x" for leaf in leaves):
            low, high = lo.copy(), hi.copy()
            _bound(low, high, leaves)
        if low is not lo or not cases:
            _check_box(low, high, whole=True)
        rows = [leaf for leaf in (*conjuncts, *leaves) if leaf[0] == "y"]
        if not rows:
            raise UserError("a case of the assertions says nothing of the outputs Y: every input would satisfy it.")
        weights = np.zeros((len(rows), k))
        for place, (_, by_number, _, _) in enumerate(rows):
            for number, weight in by_number.items():
                weights[place, number] = weight
        offsets, slack = (np.array([row[place] for row in rows]) for place in (2, 3))
        cases.append(Case(low, high, weights, offsets, slack))
    return tuple(cases)


def _count(formula: Any) -> int:
    """How many cases a formula comes to, before they are made."""
    if formula[0] == "or":
        return sum(map(_count, formula[1]))
    return math.prod(map(_count, formula[1])) if formula[0] == "and" else 1


def _leaves(formula: Any) -> int:
    """How many comparisons one case of a formula has at most."""
    if formula[0] == "or":
        return max(map(_leaves, formula[1]))
    return sum(map(_leaves, formula[1])) if formula[0] == "and" else 1


def _has_inputs(formula: Any) -> bool:
    return any(map(_has_inputs, formula[1])) if formula[0] in ("and", "or") else formula[0] == "x"


def _alternatives(formula: Any) -> list[list[Any]]:
    """A formula as a list of lists of comparisons: one of the lists holds."""
    if formula[0] == "or":
        return [case for part in formula[1] for case in _alternatives(part)]
    if formula[0] == "and":
        parts = product(*map(_alternatives, formula[1]))
        return [[leaf for case in chosen for leaf in case] for chosen in parts]
    return [[formula]]


def _bound(lo: Array, hi: Array, leaves: list[Any]) -> None:
    """Narrow a box by the comparisons of inputs, in place."""
    for leaf in leaves:
        if leaf[0] == "x":
            _, number, sign, bound = leaf
            if sign > 0:
                hi[number] = min(hi[number], bound)
            else:
                lo[number] = max(lo[number], -bound if bound else 0.0)


def _check_box(lo: Array, hi: Array, *, whole: bool) -> None:
    """Refuse an empty box; and with ``whole`` an input without both bounds."""
    empty = np.flatnonzero(lo > hi)
    if len(empty):
        i = int(empty[0])
        raise UserError(f"the box of inputs is empty: X_{i} >= {lo[i]:g} and X_{i} <= {hi[i]:g}.")
    open_ = np.flatnonzero(~(np.isfinite(lo) & np.isfinite(hi)))
    if whole and len(open_):
        i = int(open_[0])
        side = "lower" if math.isinf(lo[i]) else "upper"
        raise UserError(f"X_{i} has no {side} bound: give every input both.")
