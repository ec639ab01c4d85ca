"""Memory: an evaluation of images in a file takes as much for many images as for few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")

PEAK = """
import sys
from pathlib import Path
def peak():  # of this program: the peak in getrusage begins with that of the process that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
"""
FEW = (
    PEAK
    + """
import torch
from torch import nn
from holdfast import evaluate, mapped
from holdfast.data import Data
from holdfast.evaluation import Stage
count, in_a_file, path = int(sys.argv[1]), sys.argv[2] == "file", sys.argv[3]
torch.manual_seed(0)
net = nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, 4))
x = mapped.create(None, (count, 3, 224, 224), torch.uint8)
for rows in torch.arange(count).split(20):
    mapped.put(x, rows, torch.randint(0, 256, (20, 3, 224, 224), dtype=torch.uint8), rows >= 0)
x = x if in_a_file else x.clone()
y = torch.cat([net(part.float() / 255).argmax(1) for part in mapped.chunks(x)])
before = peak()
suite = [Stage("sweep", "apgd", settings={"steps": 2})]
found = evaluate(net, Data(x, y, torch.arange(count)), "linf:0.01", suite, pgd50=0, batch_size=20, checkpoint=path)
print(peak() - before, int(found.clean.sum()))
"""
)
COMMAND = (
    PEAK
    + """
from holdfast.cli import main
try:
    main()
finally:
    print("peak", peak(), file=sys.stderr)
"""
)
RESNET = '''
import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels, out):
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, out, 3, 2, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.around = nn.Conv2d(channels, out, 1, 2)

    def forward(self, x):
        return torch.relu(self.around(x) + self.two(torch.relu(self.one(x))))


def build():
    """A small ResNet."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 7, 8, 3), nn.ReLU())
    return nn.Sequential(stem, Block(4, 8), Block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
'''


def run(code, *arguments, **variables):
    """What a process of its own prints."""
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    call = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@linux
def test_the_memory_of_an_evaluation_does_not_grow_with_its_images(tmp_path):
    """Adversarial images of 0.6 MB each: in memory, 300 more take 180 MB at least, in a file none."""

    def grown(count, where):
        path = tmp_path / f"{count}-{where}.safetensors"
        out = run(FEW, count, where, path, MALLOC_MMAP_THRESHOLD_="65536").stdout.split()  # the same peak every time
        assert int(out[1]) == count
        return int(out[0])

    few, many, in_memory = grown(40, "file"), grown(340, "file"), grown(340, "memory")
    assert many - few < 60e6, (few, many)
    assert in_memory - few > 180e6, (few, in_memory)


@linux
@pytest.mark.slow
def test_photographs_of_any_number_stay_under_two_gibibytes(tmp_path):
    """`evaluate --suite quick` on 2,000 images of 224 x 224, and on five times as many."""
    (tmp_path / "net.py").write_text(RESNET)
    rng, peaks = np.random.default_rng(0), []
    for total in (2_000, 10_000):
        folder = tmp_path / f"photos-{total}"
        for number in range(total):
            file = folder / f"class{number % 4}" / f"{number:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
            coarse.resize((224, 224), Image.Resampling.NEAREST).save(file)
        where = {"--data": folder, "--out": tmp_path / f"out-{total}", "--threat": "linf:2/255", "--suite": "quick"}
        options = [part for pair in where.items() for part in pair]
        done = run(
            COMMAND, "evaluate", f"{tmp_path / 'net.py'}:build", *options, "--limit", 0, "--device", "cpu", "-q",
            HOLDFAST_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
        peaks.append(int(done.stderr.split("peak ")[1].split()[0]))
        results = json.loads((tmp_path / f"out-{total}" / "results.json").read_text())
        assert results["runs"][0]["n"] == total
    assert peaks[0] < 2 * 2**30, peaks
    assert peaks[1] < peaks[0] + 2**27, peaks
