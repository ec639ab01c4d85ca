"""Two processes on the device: they train the network of one, and evaluate it to the same result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from holdfast import io

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.accelerator import install, install_groups
from holdfast import evaluate, losses, models
from holdfast.data import load
from holdfast.objectives import adversarial
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit
out, device = Path(sys.argv[1]), sys.argv[2]
if device == "pretend":
    install(), install_groups()
split = load("digits", limit_train=110)  # 99 to train on: batches of 48, 48 and 3
model = models.build("smallconv", split.shape, 10)
config = FitConfig(epochs=2, batch_size=48, pad=1, weight_decay=1e-3, optimizer="sgd", lr=0.02, ema=0.5)
objective = adversarial(losses.isce, Threat("l2", 0.5), steps=2)  # smooth: no sign to flip by rounding
fit(model, split.train, split.val, objective, config, out=out, device=None if device == "none" else device)
if device == "pretend":
    found = evaluate(model, split.test.take(slice(0, 24)), "linf:0.02", "quick", batch_size=8)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save({"robust": found.robust, "where": str(next(model.parameters()).device)}, out / "found.pt")
world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
(out / f"world-{world}").touch()
os._exit(0)  # torch now and then aborts a process that ends while its group's threads run, with all its work done
"""


def trained(folder, processes, device):
    script, out = folder / "script.py", folder / f"{device}-{processes}"
    script.write_text(SCRIPT)
    group = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
             "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]  # fmt: skip
    done = subprocess.run(
        [*([sys.executable] if processes == 1 else group), str(script), str(out), device],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / f"world-{processes}").exists()
    return io.load_tensors(out / "model.safetensors", "model", 1)[0], out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"), 1, "pretend")


@pytest.mark.slow
def test_two_processes_train_and_evaluate_the_network_of_one(alone, tmp_path):
    (one, first), (two, second) = alone, trained(tmp_path, 2, "pretend")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)
    here, there = (torch.load(out / "found.pt") for out in (first, second))
    assert here["where"] == there["where"] == "pretend:0"
    assert int((here["robust"] != there["robust"]).sum()) <= 1


@pytest.mark.slow
def test_where_no_device_is_named_and_no_gpu_there_they_are_a_group_too(alone, tmp_path):
    """Not two runs beside one another in one folder."""
    for name, tensor in trained(tmp_path, 2, "none")[0].items():
        torch.testing.assert_close(tensor, alone[0][name], rtol=0, atol=1e-6)
