"""An epoch of holdfast's fit over the same epoch by hand with a DataLoader: images per second, pair by pair.

    python benchmarks/bench_epoch.py [--data PATH_OR_NAME]

The hand-written side follows most scripts: a Dataset of uint8 images, a DataLoader that shuffles, pixels / 255, the
same network, loss, optimiser and batch size, in the same process with the same threads. It is timed with two workers
and with none, and the faster counts. Without --data: 20,000 random 28x28 images (the content does not matter).
Goal: fit is >= 1.5 times faster.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from goals import goal
from holdfast import models
from holdfast.data import Data, load
from holdfast.losses import sce
from holdfast.objectives import standard
from holdfast.train import FitConfig, fit

BATCH = 128


class Images(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, data: Data) -> None:
        self.x, self.y = data.x, data.y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.x[i].float() / 255, int(self.y[i])


def by_hand(data: Data, classes: int, workers: int) -> float:
    model = models.build(models.default_model(data.x.shape[1:]), tuple(data.x.shape[1:]), classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    loader = DataLoader(Images(data), batch_size=BATCH, shuffle=True, num_workers=workers)
    began = time.perf_counter()
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).logits, y)
        loss.backward()
        optimizer.step()
        loss.item()
    return time.perf_counter() - began


def with_fit(data: Data, classes: int) -> float:
    model = models.build(models.default_model(data.x.shape[1:]), tuple(data.x.shape[1:]), classes)
    began = time.perf_counter()
    fit(model, data, data.take(slice(0, 0)), standard(sce), FitConfig(epochs=1, batch_size=BATCH), device="cpu")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", help="a data set or path for holdfast.data.load")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.data:
        split = load(arguments.data, limit_train=20_000)
        data, classes = split.train, len(split.classes)
    else:
        torch.manual_seed(0)
        x = torch.randint(0, 256, (20_000, 1, 28, 28), dtype=torch.uint8)
        data, classes = Data(x, torch.randint(10, (20_000,)), torch.arange(20_000)), 10
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(data):,} images {tuple(data.x.shape[1:])}"
    )
    with_fit(data.take(slice(0, 256)), classes)  # the first use of accelerate initialises it
    plain, forked = by_hand(data, classes, 0), by_hand(data, classes, 2)
    workers = 0 if plain <= forked else 2
    print(f"by hand: {plain:.2f} s without workers, {forked:.2f} s with two; used: {workers}")
    ratios, ours = [], []
    for _ in range(arguments.pairs):
        hand, mine = by_hand(data, classes, workers), with_fit(data, classes)
        ratios.append(hand / mine)
        ours.append(mine)
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(
        f"fit is {middle:.2f} times faster [{low:.2f}, {high:.2f}]: {len(data) / statistics.median(ours):,.0f} images/s"
    )
    goal("an epoch of training", middle, 1.5, ours="fit", peer="a loop with a DataLoader", unit="x faster", larger=True)


if __name__ == "__main__":
    main()
