"""CPU time and memory of an attack on photographs, by the batch size; each size in a process of its own.

    python benchmarks/bench_batch.py                 # a minute on one core

Activations of larger batches are mapped and given back by the allocator at every operation, which is system time.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from torch import nn

from bench_loss import peak
from holdfast.data import Data
from holdfast.evaluation import Stage, evaluate
from holdfast.queries import default_batch_size

SIZES, SIDES, IMAGES = (8, 16, 32, 64), (64, 224), 64


def measure(size: int, side: int) -> None:
    """Print user and system seconds, and the MiB that APGD with 20 steps adds to the peak."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    convolutions = [
        nn.Conv2d(3, 16, 7, 2, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1, 1),
    ]
    net = nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()
    x = torch.randint(0, 256, (IMAGES, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        y = torch.cat([net(part.float() / 255).argmax(1) for part in x.split(8)])
    data, suite = Data(x, y, torch.arange(IMAGES)), [Stage("apgd", "apgd", settings={"steps": 20})]
    before, began = peak(), resource.getrusage(resource.RUSAGE_SELF)
    evaluate(net, data, "linf:0.1/255", suite, pgd50=0, batch_size=size)
    now = resource.getrusage(resource.RUSAGE_SELF)
    print(now.ru_utime - began.ru_utime, now.ru_stime - began.ru_stime, (peak() - before) >> 20)


def main() -> None:
    print(f"torch {torch.__version__}, one thread, APGD with 20 steps on {IMAGES} images, seconds of CPU time")
    for side in SIDES:
        for size in SIZES:
            call = [sys.executable, __file__, str(size), str(side)]
            answer = subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()
            user, system, memory = map(float, answer)
            chosen = " (default)" if size == default_batch_size(torch.zeros(1, 3, side, side)) else ""
            print(f"{side} x {side}, batch {size:2}: {user:5.1f} user, {system:5.1f} system, {memory:5.0f} MiB{chosen}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(*map(int, sys.argv[1:]))
    else:
        main()
