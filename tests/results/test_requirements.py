"""Requirements: what can be written, which rows meet them, and the JUnit file."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.results.factory import make_results, make_run, proved

from holdfast import results as R
from holdfast.errors import UserError

INTERVAL = R.proportion(60, 200)  # robust, of the factory's runs: 30.0 [23.7, 36.9]


def outcome(text, *runs):
    (found,) = R.check_requirements([R.parse_requirement(text)], R.rows(make_results(list(runs) or [make_run()])))
    return found


@pytest.mark.parametrize(
    ("text", "row", "column", "sign", "value"),
    [
        ("robust>=0.45", "", "robust", ">=", 0.45),
        (" robust >= 45 % ", "", "robust", ">=", 0.45),
        ("PGD50<=9/10", "", "pgd50", "<=", 0.9),
        ("certified>=100%", "", "certified", ">=", 1.0),
        ("sce: clean>=1", "sce", "clean", ">=", 1.0),
        ("isce:s=10:robust>=0", "isce:s=10", "robust", ">=", 0.0),
        ("sce (linf 0.1): verdict=Tight", "sce (linf 0.1)", "verdict", ">=", "tight"),
        ("verdict>=exact", "", "verdict", ">=", "exact"),
    ],
)
def test_what_can_be_written(text, row, column, sign, value):
    found = R.parse_requirement(text)
    assert (found.row, found.column, found.sign, found.value) == (row, column, sign, pytest.approx(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("robust", "neither >= nor <="),
        ("robust=0.45", "write robust>=0.45"),
        ("robust>0.45", "neither >= nor <="),
        ("robust==0.45", "cannot read"),
        ("robst>=0.45", "Did you mean 'robust'"),
        ("robust>=", "no number"),
        ("robust>=nan", "no number"),
        ("robust>=half", "no number"),
        ("robust>=4_5%", "no number"),
        ("robust>=45", "for percent write 45%"),
        ("robust>=-0.1", "between 0 and 1"),
        ("robust>=145%", "between 0 and 1"),
        ("verdict=good", "unknown verdict"),
        ("verdict=void", "unknown verdict"),
        ("verdict<=tight", "write verdict=tight"),
        ("robust>=0.45\x1b[2J", "control characters"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        R.parse_requirement(text)


@given(st.text(max_size=40))
def test_any_other_text_is_refused_not_a_crash(text):
    with suppress(UserError):
        R.parse_requirement(text)


def test_the_end_of_the_interval_decides():
    low, high = INTERVAL.low, INTERVAL.high
    assert outcome(f"robust>={low - 1e-9}").met
    assert not outcome(f"robust>={low + 1e-9}").met
    assert not outcome(f"robust>={INTERVAL.value}").met
    assert outcome(f"robust<={high + 1e-9}").met
    assert not outcome(f"robust<={high - 1e-9}").met
    assert outcome("robust>=0.25").reason == (
        "robust>=0.25: sce: robust 30.0% [23.7, 36.9], whose lower end 23.7% is below 25.0%"
    )
    ends = re.findall(r"end ([\d.]+)% is below ([\d.]+)%", outcome(f"robust>={low + 1e-9}").reason)
    assert ends[0][0] != ends[0][1]


@pytest.mark.parametrize("figures", [(0.2, 0.3, 0.4), (0.3, 0.31, 0.32), (0.3, 0.3, 0.3)])
def test_over_seeds_it_holds_both_intervals(figures):
    runs = [make_run(seed=seed, robust=robust) for seed, robust in enumerate(figures)]
    seeds, samples = R.over_seeds(figures), R.proportion(round(sum(figures) / 3 * runs[0].n), runs[0].n)
    low, high = min(seeds.low, samples.low), max(seeds.high, samples.high)
    assert low < 0.3 < high
    assert outcome(f"robust>={low - 1e-9}", *runs).met
    assert not outcome(f"robust>={low + 1e-9}", *runs).met
    assert outcome(f"robust<={high + 1e-9}", *runs).met
    assert not outcome(f"robust<={high - 1e-9}", *runs).met


def test_a_void_seed_meets_nothing():
    runs = [make_run(seed=seed, robust=robust) for seed, robust in enumerate((0.3, 0.31, 0.32))]
    runs[1] = dataclasses.replace(runs[1], robust=None, verdict=R.Verdict("void", "NaN"))
    assert not outcome("robust>=0", *runs).met


def test_every_row_or_the_one_that_is_named():
    runs = [make_run("sce"), make_run("isce:s=10", robust=0.1)]
    both = outcome("robust>=0.2", *runs)
    assert not both.met
    assert both.failures[0].startswith("isce:s=10: robust 10.0%")
    assert len(both.failures) == 1
    assert len(both.measured) == 2
    assert outcome("SCE: robust>=0.2", *runs).met
    assert not outcome("isce:s=10: robust>=0.2", *runs).met
    with pytest.raises(UserError, match=r"unknown row.*'isce:s=1'.*Did you mean 'isce:s=10'"):
        outcome("isce:s=1: robust>=0.2", *runs)


def test_a_loss_under_several_threats_is_all_of_its_rows_and_a_label_is_one():
    other = dataclasses.replace(make_run(robust=0.1), threat={"norm": "l2", "eps": 1.0, "lo": 0.0, "hi": 1.0})
    assert not outcome("sce: robust>=0.2", make_run(), other).met
    assert outcome("sce (linf 0.1): robust>=0.2", make_run(), other).met
    assert not outcome("sce (l2 1): robust>=0.2", make_run(), other).met


@pytest.mark.parametrize("text", ["robust>=0", "robust<=1", "certified>=0", "pgd50<=1", "clean>=0", "verdict=refuted"])
def test_a_void_measurement_meets_nothing(text):
    found = outcome(text, make_run(status="void"))
    assert not found.met
    assert "void" in found.reason
    assert not outcome(text, dataclasses.replace(make_run(), pgd50_verdict=R.Verdict("void", "NaN"))).met


def test_the_order_of_verdicts():
    order = ("refuted", "loose", "tight", "exact")
    for place, status in enumerate(order):
        for least, asked in enumerate(order):
            assert outcome(f"verdict={asked}", make_run(status=status)).met == (place >= least)


def test_what_was_not_measured_meets_nothing():
    assert "certified was not measured" in outcome("certified<=1").reason
    assert outcome("certified<=1", proved(0.1)).met
    assert "verdict was not measured" in outcome("verdict=loose", dataclasses.replace(make_run(), verdict=None)).reason
    assert not R.check_requirements([R.parse_requirement("robust>=0")], [])[0].met


def test_junit_has_a_case_for_each_requirement():
    texts = ("robust>=0.2", "robust>=0.25", "verdict=tight")
    shown = R.rows(make_results([make_run('<sce> & "more"')]))
    outcomes = R.check_requirements([R.parse_requirement(text) for text in texts], shown)
    root = ElementTree.fromstring(R.junit(outcomes, suite="holdfast compare", timestamp="2026-01-02T03:04:05+00:00"))
    suite = root.find("testsuite")
    assert root.tag == "testsuites"
    assert {key: suite.get(key) for key in ("name", "tests", "failures", "errors")} == {
        "name": "holdfast compare", "tests": "3", "failures": "1", "errors": "0",
    }  # fmt: skip
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == list(texts)
    assert [case.find("failure") is not None for case in cases] == [False, True, False]
    assert "below 25.0%" in cases[1].find("failure").get("message")
    assert '<sce> & "more": robust 30.0%' in cases[0].find("system-out").text
