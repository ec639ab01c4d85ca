"""The wheel: everything that is in the package, and the README's example run from it, far from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OFFLINE = ("No matching distribution found for hatchling", "Could not find a version that satisfies the requirement")


def pip(*words):
    """``pip`` of this environment; a build without a package index is skipped."""
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, check=False)
    if any(text in done.stderr for text in OFFLINE):
        pytest.skip("building a wheel fetches hatchling, and there is no package index")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (made,) = folder.glob("holdfast-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder in which the wheel is installed, without its requirements."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--quiet", "--no-deps", "--target", folder, wheel)
    return folder


def run(installed, words, cwd):
    """Python with the installed package in front of whatever else there is, in another folder."""
    there = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=there, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    files = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=False)
    source = {line.removeprefix("src/") for line in files.stdout.splitlines()}
    if not source:  # no checkout of git
        source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in source if (ROOT / "src" / name).exists()} <= names
    others = {name for name in names if not name.startswith("holdfast/")}
    assert {name.partition("/")[2] for name in others} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"
    }  # fmt: skip


def test_the_readme_s_example_runs_from_the_wheel(installed, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    example += "import holdfast; print(holdfast.__file__)\n"
    *printed, place = run(installed, ["-c", example.replace("epochs=30", "epochs=2")], tmp_path).splitlines()
    assert Path(place).is_relative_to(installed)
    assert re.search(r"clean .*PGD-50 .*robust ", " ".join(printed))
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_the_command_writes_a_page_from_the_wheel(installed, tmp_path):
    """Templates and data files are found where the wheel puts them."""
    code = "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (tmp_path / "net.py").write_text(code)
    words = ["evaluate", "net.py:build", "--data", "digits", "--limit", "40", "--suite", "quick", "-q", "--out", "e"]
    assert "robust, 95%" in run(installed, ["-m", "holdfast", *words], tmp_path)
    assert "false alarms" in (tmp_path / "e" / "results.json").read_text(), "the checks' calibration is there"
    assert (tmp_path / "e" / "report.html").stat().st_size > 10_000


def test_the_versions_of_python_that_it_names_agree():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [line.rpartition(" ")[2] for line in about["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]
    lowest = about["project"]["requires-python"].removeprefix(">=")
    assert named[0] == lowest == about["tool"]["mypy"]["python_version"]
    assert f"Python {lowest} or newer" in (ROOT / "README.md").read_text()
    assert named == [f"3.{int(lowest.partition('.')[2]) + k}" for k in range(len(named))]
