"""An adversarial epoch (PGD-10) of holdfast's fit over the same epoch by hand: images per second, pair by pair.

    python benchmarks/bench_adversarial_epoch.py [--data PATH_OR_NAME] [--images N] [--pairs N] [--profile]

The hand-written side follows the scripts of the literature: a Dataset of uint8 images, a DataLoader, model.eval() for
the attack and model.train() for the step, F.cross_entropy, a random start and 10 steps of sign, min, max and clamp on
x.detach().requires_grad_(), loss.item() after every batch. It comes in two forms: torch.autograd.grad on x_adv (TRADES,
Zhang et al. 2019), and loss.backward(), which takes the weights' gradients along at every step (Madry's port, Rice et
al. 2020). Both sides: the same network, optimiser, batch size and number of passes, one process, the same threads, one
after the other in alternating order. Goal: fit is >= 1.5 times faster than the faster form.

The floor is the network alone: as many forward and backward passes through the same modules (11 forwards, 10 backwards
to the pixels and one to the weights a batch) on a fixed batch, without data, attack, loss or optimiser.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from bench_epoch import BATCH, Images
from goals import goal
from holdfast import models
from holdfast.data import Data, load, pixels
from holdfast.losses import sce
from holdfast.objectives import adversarial
from holdfast.outputs import frozen_eval
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

STEPS, EPS = 10, 0.3
SIZE = 2.5 * EPS / STEPS


def network(data: Data, classes: int) -> torch.nn.Module:
    return models.build(models.default_model(data.x.shape[1:]), tuple(data.x.shape[1:]), classes)


def pgd_by_hand(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, form: str) -> torch.Tensor:
    x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-EPS, EPS), 0, 1)
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv).logits, y)
        if form == "backward":
            loss.backward()
            grad = x_adv.grad
        else:
            (grad,) = torch.autograd.grad(loss, [x_adv])
        x_adv = x_adv.detach() + SIZE * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS)
        x_adv = torch.clamp(x_adv, 0, 1)
    return x_adv.detach()


def by_hand(data: Data, classes: int, form: str) -> float:
    model = network(data, classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    loader = DataLoader(Images(data), batch_size=BATCH, shuffle=True)
    began = time.perf_counter()
    for x, y in loader:
        model.eval()
        x_adv = pgd_by_hand(model, x, y, form)
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x_adv).logits, y)
        loss.backward()
        optimizer.step()
        loss.item()
    return time.perf_counter() - began


def with_fit(data: Data, classes: int, steps: int = STEPS) -> float:
    model = network(data, classes)
    objective = adversarial(sce, Threat("linf", EPS), steps=steps)
    began = time.perf_counter()
    fit(model, data, data.take(slice(0, 0)), objective, FitConfig(epochs=1, batch_size=BATCH), device="cpu")
    return time.perf_counter() - began


def floor(data: Data, classes: int, layout: torch.memory_format) -> float:
    model, batches = network(data, classes).to(memory_format=layout), -(-len(data) // BATCH)
    x = pixels(data.x[:BATCH]).to(memory_format=layout)
    up = torch.ones(len(x), classes)
    began = time.perf_counter()
    for _ in range(batches):
        with frozen_eval(model):
            for _ in range(STEPS):
                there = x.detach().requires_grad_()
                torch.autograd.grad(model(there).logits, there, up)
        torch.autograd.grad(model(x).logits, list(model.parameters()), up)
    return time.perf_counter() - began


def profiled(data: Data, classes: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with_fit(data.take(slice(0, 20 * BATCH)), classes)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="a data set or path for holdfast.data.load")
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="only profile fit")
    arguments = parser.parse_args()
    if arguments.data:
        split = load(arguments.data, limit_train=arguments.images)
        data, classes = split.train, len(split.classes)
    else:
        torch.manual_seed(0)
        x = torch.randint(0, 256, (arguments.images, 1, 28, 28), dtype=torch.uint8)
        data, classes = Data(x, torch.randint(10, (arguments.images,)), torch.arange(arguments.images)), 10
    with_fit(data.take(slice(0, 256)), classes)  # the first use of accelerate initialises it
    if arguments.profile:
        profiled(data, classes)
        return
    sides: dict[str, Callable[[], float]] = {
        "by hand, autograd.grad": lambda: by_hand(data, classes, "grad"),
        "fit": lambda: with_fit(data, classes),  # between the two, so that other load affects all three
        "by hand, loss.backward": lambda: by_hand(data, classes, "backward"),
        "network alone, contiguous": lambda: floor(data, classes, torch.contiguous_format),
        "network alone, channels last": lambda: floor(data, classes, torch.channels_last),
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(arguments.pairs):
        for name in list(sides) if pair % 2 == 0 else reversed(list(sides)):
            took[name].append(sides[name]())
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(data):,} images {tuple(data.x.shape[1:])}"
        f", PGD-{STEPS}, batches of {BATCH}; medians of {arguments.pairs}; paired speed-up of fit [lowest, highest]"
    )
    middle = {}
    for name, seconds in took.items():
        gains = [other / ours for other, ours in zip(seconds, took["fit"], strict=True)]
        middle[name] = statistics.median(gains)
        print(
            f"{name:30s} {statistics.median(seconds):6.2f} s {len(data) / statistics.median(seconds):8,.0f} images/s   "
            f"fit is {statistics.median(gains):.2f} times faster [{min(gains):.2f}, {max(gains):.2f}]"
        )
    faster = min(gain for name, gain in middle.items() if "by hand" in name)
    what = f"an epoch of PGD-{STEPS} training"
    goal(what, faster, 1.5, ours="fit", peer="the faster loop by hand", unit="x faster", larger=True)


if __name__ == "__main__":
    main()
