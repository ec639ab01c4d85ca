"""Reading VNN-LIB properties: what they come to, and everything else refused in one sentence."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.bracket import vnnlib
from holdfast.bracket.vnnlib import parse_property, read_property
from holdfast.errors import UserError

HEAD = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"
BOX = "(assert (>= X_0 0)) (assert (<= X_0 1)) (assert (>= X_1 -0.5)) (assert (<= X_1 5e-1))"


def cases(text, box=BOX):
    return [
        (case.weights.tolist(), case.offsets.tolist(), case.lo.tolist(), case.hi.tolist())
        for case in parse_property(HEAD + box + text).cases
    ]


def rows(text):
    return [case[:2] for case in cases(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(assert (<= Y_0 Y_1))", [([[1, -1]], [0])]),
        ("(assert (>= Y_0 Y_1))", [([[-1, 1]], [0])]),
        ("(assert (>= Y_0 3.5))", [([[-1, 0]], [3.5])]),
        ("(assert (<= 3.5 Y_0))", [([[-1, 0]], [3.5])]),
        ("(assert (<= Y_0 (- 2)))", [([[1, 0]], [2])]),
        ("(assert (<= (+ Y_0 (* 2 Y_1) 1) 0.5))", [([[1, 2]], [0.5])]),
        ("(assert (>= (- Y_0 Y_1) (- 1 3)))", [([[-1, 1]], [-2])]),
        ("(assert (and (<= Y_0 1) (<= Y_1 2)))", [([[1, 0], [0, 1]], [-1, -2])]),
        ("(assert (or (<= Y_0 1) (<= Y_1 2)))", [([[1, 0]], [-1]), ([[0, 1]], [-2])]),
        ("(assert (<= Y_0 1)) (assert (or (<= Y_1 2)))", [([[1, 0], [0, 1]], [-1, -2])]),
        (
            "(assert (or (and (<= Y_0 1) (or (<= Y_1 2) (<= Y_1 3))) (>= Y_0 9)))",
            [([[1, 0], [0, 1]], [-1, -2]), ([[1, 0], [0, 1]], [-1, -3]), ([[-1, 0]], [9])],
        ),
    ],
)
def test_what_assertions_come_to(text, expected):
    assert rows(text) == expected


def test_boxes_come_from_anywhere():
    given = (
        "(assert (and (<= 0.25 X_0) (<= X_0 1))) ; a comment (assert (\n(assert (and (>= X_1 -1)))(assert (>= 2 X_1))"
    )
    [(_, _, lo, hi)] = cases("(assert (<= Y_0 0))", given + "(assert (<= X_1 0.5)) (assert (<= (* 2 X_0) 1.5))")
    assert (lo, hi) == ([0.25, -1.0], [0.75, 0.5])
    one, two = cases("(assert (<= Y_0 0)) (assert (or (and (<= X_0 0.5) (<= Y_1 1)) (>= X_0 0.5)))")
    assert (one[3], two[2]) == ([0.5, 0.5], [0.5, -0.5])
    assert (one[0], two[0]) == ([[1, 0], [0, 1]], [[1, 0]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "says nothing of the outputs"),
        ("(assert (<= Y_0 0)", "never closed"),
        ("(assert (<= Y_0 0)))", "never opened"),
        ("assert", r"expected \(declare-const"),
        ("()", r"expected \(declare-const"),
        ("((assert))", r"expected \(declare-const"),
        ("(assert)", "'assert' with 0 arguments"),
        ("(check-sat)", "'check-sat' with 0 arguments is not known"),
        ("(declare-const Z_0 Real)", r"expected \(declare-const X_i Real\)"),
        ("(declare-const X_2 Int)", r"expected \(declare-const X_i Real\)"),
        ("(declare-const X_02 Real)", r"expected \(declare-const X_i Real\)"),
        ("(declare-const X_1 Real)", "declared twice"),
        ("(declare-const X_999999999 Real)", "number is 4,194,304 or more"),
        ("(declare-const X_3 Real)", "X_2 is not declared"),
        ("(assert (<= Y_7 0))", "Y_7 is not declared before it is used"),
        ("(assert (< Y_0 0))", "expected <= or >="),
        ("(assert (= Y_0 0))", "expected <= or >="),
        ("(assert (not (<= Y_0 0)))", "expected <= or >="),
        ("(assert (<= Y_0 0 1))", "two sides"),
        ("(assert Y_0)", "expected a comparison"),
        ("(assert (and))", "'and' of nothing"),
        ("(assert ((<= Y_0 0)))", "expected a comparison"),
        ("(assert (<= 1 2))", "two numbers"),
        ("(assert (<= X_0 Y_0))", "more than one number"),
        ("(assert (<= X_0 X_1))", "more than one number"),
        ("(assert (<= Y_0 Y_0))", "occurs twice"),
        ("(assert (<= (* Y_0 Y_1) 1))", "product of two variables"),
        ("(assert (<= (/ Y_0 2) 1))", r"expected a number, a variable, or \+ - \*"),
        ("(assert (<= Y_0 nan))", "neither a finite number nor a variable"),
        ("(assert (<= Y_0 1e999))", "neither a finite number nor a variable"),
        ("(assert (<= Y_0 1/2))", "neither a finite number nor a variable"),
        ("(assert (<= Y_0 0x10))", "neither a finite number nor a variable"),
        ("(assert (<= Y_0 1_0))", "neither a finite number nor a variable"),
        ("(assert (<= Y_0 " + "1" * 500 + "))", "neither a finite number nor a variable"),
        ("(assert (<= (* 1e300 1e300 Y_0) 1))", "too large"),
        ("(assert (<= Y_0 0)) (assert (>= X_0 2))", "the box of inputs is empty: X_0 >= 2 and X_0 <= 1"),
        ("(assert (or (and (>= X_0 2) (<= Y_0 0))))", "the box of inputs is empty"),
        ("(assert (or (<= Y_0 0) (<= X_0 0.5)))", "says nothing of the outputs"),
        ("(assert " + "(and " * 40 + "(<= Y_0 0)" + ")" * 41, "nested deeper than 32"),
        ("(" * 100_000, "nested deeper than 32"),
        ("\n\n(assert (<= Y_0 \x1b[2J))", "^line 3: "),
    ],
)
def test_everything_else_is_refused(text, said):
    with pytest.raises(UserError, match=said) as error:
        parse_property(HEAD + BOX + text)
    assert "\x1b" not in str(error.value)


def test_inputs_need_both_bounds_and_letters_need_variables():
    with pytest.raises(UserError, match="X_1 has no upper bound"):
        parse_property(HEAD + BOX.replace("(assert (<= X_1 5e-1))", "") + "(assert (<= Y_0 0))")
    with pytest.raises(UserError, match="Y_0 is not declared"):
        parse_property("(declare-const X_0 Real)(assert (<= X_0 1))")
    with pytest.raises(UserError, match="X_0 is not declared"):
        parse_property("")


def test_sizes_are_bounded_before_the_work(tmp_path, monkeypatch):
    began = time.process_time()
    choice = "(assert (or " + " ".join(f"(<= Y_0 {i})" for i in range(100)) + "))"
    with pytest.raises(UserError, match=r"come to 1,\d{3},000,000,000,000 cases|1,000,000,000,000 cases"):
        parse_property(HEAD + BOX + choice * 6)
    many = "(assert (and " + " ".join(f"(<= Y_0 {i})" for i in range(10_000)) + "))"
    with pytest.raises(UserError, match="numbers: at most"):
        parse_property(HEAD + BOX + choice * 2 + many)
    assert time.process_time() - began < 5
    monkeypatch.setattr(vnnlib, "MOST_WORDS", 20)
    with pytest.raises(UserError, match="line 1: what begins there has more than 20 words"):
        parse_property(HEAD + BOX + choice)
    file = tmp_path / "p.vnnlib"
    file.write_text(HEAD + BOX + "(assert (<= Y_0 0))")
    assert read_property(file).n_inputs == 2
    monkeypatch.setattr(vnnlib, "MOST_BYTES", 50)
    with pytest.raises(UserError, match=r"p\.vnnlib has \d+ bytes: a property may have at most 50"):
        read_property(file)
    file.write_bytes(b"\xff\xfe(assert")
    with pytest.raises(UserError, match="not ASCII"):
        read_property(file)
    with pytest.raises(UserError, match="there is no file"):
        read_property(tmp_path / "nowhere")


PIECES = [
    "(",
    ")",
    "assert",
    "and",
    "or",
    "<=",
    ">=",
    "X_0",
    "Y_1",
    "0.5",
    "-",
    "*",
    "+",
    ";",
    "\n",
    "declare-const",
    "é",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_no_text_ends_in_a_traceback(words):
    for text in (" ".join(words), HEAD + BOX + f"(assert {' '.join(words)})"):
        try:
            found = parse_property(text)
        except UserError:
            continue
        assert found.cases
