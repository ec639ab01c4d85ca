"""The table of `make bench`: goals of every benchmark, and what did not run."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "goals.py"


def table(folder, *names):
    """(lines of the table, what the benchmarks printed, exit status) for the scripts of this folder."""
    (folder / "goals.py").write_text(TABLE.read_text())
    done = subprocess.run(
        [sys.executable, str(folder / "goals.py"), *names], capture_output=True, text=True, timeout=60
    )
    return done.stdout.splitlines(), done.stderr, done.returncode


def script(folder, name, text):
    (folder / f"bench_{name}.py").write_text(f"from goals import goal\n{text}\n")


def row(lines, word):
    (found,) = [line for line in lines if word in line]
    return [cell.strip() for cell in found.split("│")[1:-1]]


def test_goals_that_are_met_and_missed_are_in_one_table(tmp_path):
    script(
        tmp_path, "one", "print('words'); goal('an epoch', 1.7, 1.5, ours='fit', peer='by hand', unit='x', larger=True)"
    )
    script(tmp_path, "two", "goal('a step', 1.2, 1.15)")
    lines, printed, status = table(tmp_path)
    assert row(lines, "an epoch") == ["one", "an epoch", "fit", "by hand", "1.7x", ">= 1.5x", "yes"]
    assert row(lines, "a step") == ["two", "a step", "", "", "1.2", "<= 1.15", "NO"]
    assert "words" in printed
    assert status == 1
    lines, _, status = table(tmp_path, "one")
    assert status == 0
    assert not any("a step" in line for line in lines)


def test_a_benchmark_that_fails_or_has_no_goal_is_a_line_and_the_others_run(tmp_path):
    script(tmp_path, "bad", "raise SystemExit('foolbox is not installed')")
    script(tmp_path, "half", "goal('a step', 1.0, 1.15); raise SystemExit('no data')")
    script(tmp_path, "plain", "print('{\"seconds\": 2}')")
    lines, _, status = table(tmp_path)
    assert "not run to its end: foolbox is not installed" in row(lines, "foolbox")[1]
    assert row(lines, "a step")[-1] == "yes"
    assert row(lines, "no data")[0] == "half"
    assert row(lines, "no goal")[0] == "plain"
    assert status == 1


def test_an_unknown_benchmark_is_named(tmp_path):
    script(tmp_path, "one", "")
    _, printed, status = table(tmp_path, "epcoh")
    assert "there is no benchmark epcoh: one." in printed
    assert status == 1


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("bench_*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "path", list(sys.path))
    pytest.importorskip("onnxruntime" if "onnx" in path.stem else "torch")
    assert runpy.run_path(str(path))["__doc__"]
