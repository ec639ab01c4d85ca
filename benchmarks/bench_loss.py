"""I-SCE against F.cross_entropy: time and peak memory of forward + backward, and its share of a training step.

    python benchmarks/bench_loss.py

Both sides run in turn in one process, and the ratio is taken pair by pair. Goals: <= 1.1x at K = 1,000 and 100,000
(time and memory); a training step with I-SCE <= 1.01x of the step with SCE at K = 10.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from goals import goal
from holdfast import models
from holdfast.losses import isce, sce

SIZES = {10: 128, 1_000: 1_024, 100_000: 64}  # classes -> samples


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def inference(z: Tensor, y: Tensor) -> Tensor:
    return isce(z, y, s=10.0)


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], seconds: float
) -> tuple[float, float, float, float]:
    """(median ratio, its quartiles, median seconds of theirs): A B B A A B ..., so that drift cancels."""
    ours(), theirs()
    ratios, times = [], []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(ratios) < 20:
        spent = {}
        for run in (ours, theirs) if len(ratios) % 2 else (theirs, ours):
            began = time.perf_counter()
            run()
            spent[run] = time.perf_counter() - began
        ratios.append(spent[ours] / spent[theirs])
        times.append(spent[theirs])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high, statistics.median(times)


def once(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor) -> Callable[[], None]:
    def run() -> None:
        z.grad = None
        loss(z, y).mean().backward()

    return run


def memory(name: str, classes: int) -> int:
    """Bytes that forward + backward add to the peak of a process of its own."""
    code = (
        "import torch, sys; sys.path.insert(0, 'benchmarks'); import bench_loss as b;"
        f"K = {classes}; N = 51_200_000 // K; z = torch.randn(N, K, requires_grad=True); y = torch.randint(K, (N,));"
        "w = torch.randn(8, K, requires_grad=True); b.once(b.isce, w, y[:8])(); b.once(b.cross_entropy, w, y[:8])();"
        f"before = b.peak(); b.once(b.{name}, z, y)(); print(b.peak() - before)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(answer.stdout)


def peak() -> int:
    """The most memory that this program has held, in bytes. On Linux getrusage begins with that of its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    model = models.build("convnet", (1, 28, 28), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x, y = torch.rand(128, 1, 28, 28), torch.randint(10, (128,))

    def run() -> None:
        optimizer.zero_grad()
        loss(model(x).logits, y).mean().backward()
        optimizer.step()

    return run


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, CPU")
    print("I-SCE(s=10) over F.cross_entropy, forward + backward: median ratio [quartiles], pair by pair")
    for classes, samples in SIZES.items():
        z, y = torch.randn(samples, classes, requires_grad=True), torch.randint(classes, (samples,))
        ratio, low, high, seconds = paired(once(inference, z, y), once(cross_entropy, z, y), 6)
        print(f"  K={classes:<7,} N={samples:<6,} {ratio:.2f} [{low:.2f}, {high:.2f}]   {seconds * 1e3:.3f} ms")
        if classes >= 1_000:
            goal(f"I-SCE, K={classes:,}, time", ratio, 1.1, ours="isce", peer="F.cross_entropy", unit="x")
    for classes in (1_000, 100_000):
        ours, theirs = memory("inference", classes), memory("cross_entropy", classes)
        print(f"  K={classes:<7,} peak memory {ours / theirs:.2f}   ({ours / 2**20:.0f} over {theirs / 2**20:.0f} MiB)")
        goal(f"I-SCE, K={classes:,}, memory", ours / theirs, 1.1, ours="isce", peer="F.cross_entropy", unit="x")
    print("a training step of the 28x28 convnet, batch 128, K=10")
    for name, other in (("SCE (holdfast)", sce), ("F.cross_entropy", cross_entropy)):
        ratio, low, high, seconds = paired(step(inference), step(other), 10)
        print(f"  I-SCE over {name:<16} {ratio:.3f} [{low:.3f}, {high:.3f}]   {seconds * 1e3:.2f} ms a step")
        if other is sce:
            goal("a training step with I-SCE, K=10", ratio, 1.01, ours="isce", peer=name, unit="x")
    print(f"peak of this process: {peak() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
