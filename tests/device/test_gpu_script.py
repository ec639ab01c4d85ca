"""benchmarks/gpu.sh, the script for the day a GPU is at hand: its dry run on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("tests", "agreement", "throughput", "cifar10")


def run(out, **settings):
    env = {**os.environ, "OUT": str(out), "DEVICE": "cpu", "TINY": "1", "PYTHON": sys.executable, **settings}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_every_stage_ends_and_what_is_finished_is_not_run_again(tmp_path):
    status, said = run(tmp_path)
    assert status == 0, said
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STAGES}
    assert found["tests"]["failed"] == {}
    assert found["tests"]["tests"] > 3
    assert found["agreement"]["noise"]
    assert found["agreement"]["sce"]["robust_differs"] == []
    assert all(figure["waits_per_step"] == 0 for key, figure in found["throughput"].items() if ", batch" in key)
    assert len(found["cifar10"]["epochs"]) == 2
    (tmp_path / "cifar10.json").unlink()  # as if it had been stopped at the last epoch
    status, said = run(tmp_path)
    assert status == 0
    assert said.count("done before") == 3
    assert json.loads((tmp_path / "cifar10.json").read_text())["epochs"] == found["cifar10"]["epochs"]


@pytest.mark.slow
def test_what_cannot_start_says_so(tmp_path):
    status, said = run(tmp_path, DEVICE="cuda:97")
    assert status == 2
    assert "cuda:97 cannot be used" in said
    status, said = run(tmp_path, MINUTES="0")
    assert status == 0
    assert said.count("no time left") == 4
    assert said.count("not finished") == 4
