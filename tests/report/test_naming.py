"""A title and row labels of the reader's own."""

from __future__ import annotations

import dataclasses
import re

import pytest
from tests.results.factory import make_results, make_run

import holdfast.results as R
from holdfast import report
from holdfast.errors import UserError

THREAT = make_run().threat
OWN = "I-SCE & s = 100"


def test_page_figures_and_tables_show_the_names(tmp_path):
    given = make_results([make_run("sce"), make_run("isce:s=100")])
    (shown,) = report.named(given, "Worth", {"isce:s=100": OWN})
    assert shown.runs == given.runs
    page = report.render(shown, tmp_path / "r.html").read_text()
    assert "<title>Worth: robustness report</title>" in page
    assert re.search("<h1>([^<]*)</h1>", page)[1] == "Worth"
    assert 'data-row="I-SCE &amp; s = 100"' in page
    assert 'data-row="isce:s=100"' not in page
    files = {path.name: path for path in report.figures(shown, tmp_path, "isce:s=100")}
    assert "I-SCE &amp; s = 100" in files["accuracy.svg"].read_text()
    tex = files["table.tex"].read_text()
    assert r"\caption{Worth: digits, 200 samples" in tex
    assert r"I-SCE \& s = 100 & " in tex
    assert R.compare_rows(shown, "isce:s=100")[0].against == OWN
    assert R.load(R.save(shown, tmp_path)) == shown


def test_a_loss_under_two_threats_keeps_the_threat_and_a_row_has_a_name_of_its_own():
    other = make_run("sce", threat={**THREAT, "norm": "l2"})
    given = make_results([make_run("sce"), other])
    first, second = R.rows(given)
    (shown,) = report.named(given, names={"sce": "SCE"})
    assert [row.label for row in R.rows(shown)] == [
        first.label.replace("sce", "SCE"),
        second.label.replace("sce", "SCE"),
    ]
    (shown,) = report.named(given, names={second.label: "wide"})
    assert [row.label for row in R.rows(shown)] == [first.label, "wide"]


def test_a_page_without_a_title_is_named_after_its_data_and_its_only_row(tmp_path):
    def title(*losses, name=""):
        (results,) = report.named(make_results([make_run(loss) for loss in losses]), name)
        page = report.render(results, tmp_path / "r.html").read_text()
        return re.sub("<[^>]*>", "", re.search("<h1>(.*?)</h1>", page)[1])

    assert title("isce:s=1") == "isce:s=1 on digits"
    assert title("sce", "mmc") == "digits"
    two = [make_results(), make_results()]
    two[1] = dataclasses.replace(two[1], data={**two[1].data, "name": "other"})
    page = report.render(report.named(two, "Mine"), tmp_path / "r.html").read_text()
    assert re.findall("<h1>([^<]*)</h1>", page) == ["Mine: digits", "Mine: other"]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ({"scr": "x"}, r"unknown row 'scr'\. Did you mean 'sce'\?"),
        ({"sce": " "}, "the label of the row 'sce' is empty"),
        ({"sce": "mmc"}, "2 rows would have the label 'mmc'"),
    ],
)
def test_names_that_would_mislead_are_refused(names, why):
    with pytest.raises(UserError, match=why):
        report.named(make_results([make_run("sce"), make_run("mmc")]), names=names)


def test_a_label_is_read_after_the_longest_name():
    known = ["isce:s=1", "isce:s=1=2", "sce"]
    assert report.parse_label("isce:s=1=2=x = y", known) == ("isce:s=1=2", "x = y")
    with pytest.raises(UserError, match="write ROW=TEXT"):
        report.parse_label("nothing", known)
    with pytest.raises(UserError, match="unknown row 'isce:s=3'"):
        report.parse_label("isce:s=3=x", known)


def test_labels_of_a_file_that_are_no_text_are_left_out():
    results = make_results([make_run("sce")])
    for labels in ([1], {"sce": 3}):
        odd = dataclasses.replace(results, data={**results.data, "labels": labels, "title": labels})
        assert [row.label for row in R.rows(odd)] == ["sce"]
        assert report.latex_tables(odd)
