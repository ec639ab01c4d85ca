"""The gate of pipelines: exit status 3, a line for each requirement that is not met, and the JUnit file."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tests.results.factory import make_results, make_run

from holdfast import results as R
from holdfast.evaluation.suites import SUITES, Stage

OWN = ("mine.py:build", "--data", "digits", "--limit", "20", "--device", "cpu", "--threat", "linf:0.01")
TINY = ("--suite", "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 3}),))
    Path("mine.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n\n"
        "class Rounded(nn.Linear):\n    def forward(self, x):\n        return super().forward(x.round(decimals=2))\n\n"
        "def rounded():\n    return nn.Sequential(nn.Flatten(), Rounded(64, 10))\n"
    )
    R.save(make_results([make_run("sce"), make_run("isce:s=10", robust=0.1, status="loose")]), tmp_path / "two")


def require(*texts):
    return [word for text in texts for word in ("--require", text)]


def test_what_is_met_ends_with_0_and_says_so(holdfast_):
    code, out, err = holdfast_("report", "two", *require("sce: robust>=0.2", "verdict=loose"))
    assert code == 0, err
    assert out.splitlines()[-1] == "requirements met: 2 of 2"
    assert "not met" not in err


def test_what_is_not_met_ends_with_3_and_a_line_each(holdfast_):
    code, out, err = holdfast_("report", "two", *require("robust>=20%", "sce: clean>=0.9", "verdict=tight"))
    assert code == 3
    lines = err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["not met", "not met"]
    assert "robust>=20%: isce:s=10: robust 10.0%" in lines[0]
    assert "isce:s=10: verdict loose" in lines[1]
    assert out.splitlines()[-1] == "requirements met: 1 of 3"
    assert Path("two/report.html").exists()


def test_quiet_and_json_leave_stdout_as_it_was(holdfast_):
    code, out, err = holdfast_("report", "two", *require("robust>=0.9"), "-q")
    assert (code, out.splitlines()) == (3, ["two/report.html"])
    assert err.startswith("not met: ")
    code, out, err = holdfast_("report", "two", *require("robust>=0.9"), "--json")
    assert code == 3
    assert json.loads(out)["page"] == "two/report.html"
    assert err.startswith("not met: ")


def test_the_junit_file_has_a_case_for_each(holdfast_):
    code, _, _ = holdfast_("report", "two", *require("clean>=0.9", "robust>=0.9"), "--junit", "ci/junit.xml")
    assert code == 3
    suite = ElementTree.parse("ci/junit.xml").getroot().find("testsuite")
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("holdfast report", "2", "1")
    assert [case.get("name") for case in suite] == ["clean>=0.9", "robust>=0.9"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "two", *require("robst>=1")), "Did you mean 'robust'"),
        (("report", "two", *require("isc:s=10: robust>=1")), "Did you mean 'isce:s=10'"),
        (("report", "two", *require("certified>=0.1")), "--require 'certified>=0.1'"),
        (("report", "two", "--junit", "x.xml"), "add --require"),
        (("report", "two", *require("robust>=0.1"), "--junit", "two"), "is a folder"),
        (("evaluate", *OWN, *require("robust>=half")), "no number"),
        (("evaluate", *OWN, *require("sce: robust>=0.1")), "mine.py"),
        (("evaluate", "mine.py:rounded", *OWN[1:], *require("certified>=0.1")), "the operator round"),
        (("bracket", *OWN, *require("pgd50>=0.1")), "measures no pgd50"),
        (("bracket", *OWN, *require("verdict=tight")), "measures no verdict"),
        (("bracket", *OWN, "--margins", *require("robust>=0.1")), "--margins takes no --require"),
        (("bracket", *OWN, *require("other: robust>=0.1")), "unknown row"),
        (("compare", "--losses", "sce", *require("mmc: robust>=0.1")), "unknown row"),
        (("compare", "--losses", "sce", *require("sce (linf 0.1): robust>=0.1")), "unknown row"),
        (("recipe", *require("robust>=0.1")), "--require belongs to a recipe"),
        (("recipe", "digits", *require("robust>=45")), "write 45%"),
    ],
)
def test_a_mistake_is_one_line_before_the_work(words, message, holdfast_):
    before = set(Path().rglob("*"))
    code, out, err = holdfast_(*words, "-q")
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert message in err
    assert not out
    assert set(Path().rglob("*")) - before <= {Path("__pycache__")} | set(Path("__pycache__").rglob("*"))


def test_rows_of_several_data_sets_are_told_apart(holdfast_, tmp_path):
    other = make_results([make_run("sce", robust=0.1)])
    R.save(dataclasses.replace(other, data={**other.data, "name": "mnist"}), tmp_path / "other")
    code, _, err = holdfast_("report", "two", "other", *require("sce: robust>=0.2"), "-q", "--out", "x.html")
    assert code == 3
    assert "sce (mnist): robust 10.0%" in err
    code, _, err = holdfast_("report", "two", "other", *require("sce (digits): robust>=0.2"), "-q", "--out", "x.html")
    assert code == 0, err


def test_evaluate_and_bracket_hold_what_they_measured(holdfast_):
    words = ("evaluate", *OWN, *TINY, "--out", "evaluated", *require("mine.py:build: robust<=100%", "robust>=99%"))
    code, out, err = holdfast_(*words, "--junit", "evaluated/junit.xml")
    assert code == 3
    assert "not met: robust>=99%: mine.py:build: robust " in err
    assert out.splitlines()[-1] == "requirements met: 1 of 2"
    assert len(ElementTree.parse("evaluated/junit.xml").getroot().findall(".//testcase")) == 2
    assert R.load("evaluated").runs
    words = ("bracket", *OWN, "--budget", "20s", "--out", "bracketed", "-q")
    code, _, err = holdfast_(*words, *require("robust<=0.9", "clean<=0.9", "certified>=0"))
    assert code == 0, err
    code, _, err = holdfast_(*words, *require("certified>=0.99"))
    assert code == 3
    assert "not met: certified>=0.99: mine.py:build: certified " in err
    assert Path("bracketed/accuracy.json").exists()


def test_compare_holds_each_row(holdfast_, short_audits):
    words = (
        "compare",
        "--losses",
        "sce,isce:s=10",
        "--folds",
        "2",
        "--limit-train",
        "100",
        "--epochs",
        "1",
        "--jobs",
        "1",
    )
    words = (*words, "--jobs", "1", "--device", "cpu", "--threat", "linf:0.01,linf:0.3", *TINY, "--out", "out", "-q")
    code, out, err = holdfast_(*words, *require("sce: robust<=100%", "isce:s=10 (linf 0.3): robust>=0.9"))
    assert code == 3
    assert [line for line in err.splitlines() if line.startswith("not met")] == err.splitlines()
    assert "isce:s=10 (linf 0.3): robust " in err
    assert "sce" in out
    code, _, err = holdfast_(*words, *require("clean>=0"))
    assert code == 0, err


def test_report_writes_latex_against_a_named_row(holdfast_):
    code, out, err = holdfast_("report", "two", "--latex", "paper/table.tex", "--baseline", "isce:s=10")
    assert code == 0, err
    assert "paper/table.tex" in out
    assert "to isce:s=10, in points" in Path("paper/table.tex").read_text()
    assert "isce:s=10" in Path("two/report.html").read_text()
    code, _, err = holdfast_("report", "two", "--baseline", "isc:s=10")
    assert code == 2
    assert "Did you mean 'isce:s=10'" in err
    code, _, err = holdfast_("report", "two", "--latex", "two")
    assert (code, "is a folder" in err) == (2, True)
