"""Robust accuracy for training time: the objectives beside a PGD-10 loop written by hand, CPU seconds of one thread.

    HOLDFAST_MNIST=data/mnist python benchmarks/bench_training.py run                 # an hour; resumable
    HOLDFAST_CIFAR10=data/cifar10 python benchmarks/bench_training.py run --data cifar10-2 --seeds 3
    python benchmarks/bench_training.py                                              # the table of all results

The loop is that of bench_adversarial_epoch.py (torch.autograd.grad on x_adv, F.cross_entropy, a DataLoader), with the
same network, optimiser, batch size, cosine schedule and ramp of eps as fit. Its training time is one budget. Every
objective gets a share of that: as many whole epochs as fit into it, after one epoch was timed. Robust accuracy is that
of ``standard`` with its audit, on test images. Seconds are processor time, so other work on the machine does not count;
validation and evaluation are left out on both sides. Each row is a JSON file under out/training: a stopped run goes on.
Goals: more robust than the loop in equal time, and as robust in a third of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench_epoch import Images
from goals import goal
from holdfast import models
from holdfast.checks import audit
from holdfast.data import Data, Split, load, standardisation
from holdfast.evaluation import evaluate
from holdfast.losses import sce
from holdfast.objectives import Schedule, adversarial, fast, free, friendly
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

FOLDER = Path(__file__).resolve().parent.parent / "out" / "training"
LOOP, LOOP_STEPS, RAMP = "PGD-10 by hand", 10, 0.3
SHARES = (1.0, 1 / 3)


@dataclass(frozen=True)
class Plan:
    """A data set, a threat and a network, and how long the loop trains."""

    data: str
    variable: str
    eps: float
    model: str
    train: int
    epochs: int
    lr: float
    samples: int


PLANS = {
    "mnist-0.3": Plan("mnist", "HOLDFAST_MNIST", 0.3, "convnet", 12_000, 5, 4e-3, 300),
    "cifar10-2": Plan("cifar10", "HOLDFAST_CIFAR10", 2 / 255, "fastconvnet", 10_000, 10, 5e-3, 300),
    "cifar10-8": Plan("cifar10", "HOLDFAST_CIFAR10", 8 / 255, "fastconvnet", 10_000, 10, 5e-3, 300),
}
METHODS: dict[str, Callable[[Threat], Schedule]] = {
    "adversarial:steps=10": lambda threat: adversarial(sce, threat, steps=10, ramp=RAMP),
    "adversarial:steps=2": lambda threat: adversarial(sce, threat, steps=2, ramp=RAMP),
    "adversarial:steps=4,curriculum=1": lambda threat: adversarial(sce, threat, steps=4, curriculum=1.0, ramp=RAMP),
    "friendly:steps=4": lambda threat: friendly(sce, threat, steps=4, ramp=RAMP),
    "fast": lambda threat: fast(sce, threat, ramp=RAMP),
    "free:replays=4": lambda threat: free(sce, threat, replays=4, ramp=RAMP),
}


def file(plan: str, method: str, share: float, seed: int) -> Path:
    return FOLDER / f"{plan}-{method.replace(':', '_').replace(' ', '-')}-{share:.3g}-seed{seed}.json"


def read(plan: str, method: str, share: float, seed: int) -> dict[str, Any] | None:
    path = file(plan, method, share, seed)
    return json.loads(path.read_text()) if path.exists() else None


def save(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(row))
    path.with_suffix(".tmp").rename(path)
    print(json.dumps(row), flush=True)


def network(plan: Plan, split: Split, seed: int) -> models.Classifier:
    mean, std = standardisation(split.train)
    return models.build(plan.model, split.shape, len(split.classes), mean=mean, std=std, seed=seed)


def attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """PGD as scripts write it."""
    x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-eps, eps), 0, 1)
    for _ in range(LOOP_STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv).logits, y), [x_adv])
        x_adv = x_adv.detach() + 2.5 * eps / LOOP_STEPS * torch.sign(grad)
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - eps), x + eps), 0, 1)
    return x_adv.detach()


def by_hand(plan: Plan, data: Data, model: nn.Module, seed: int) -> float:
    """Train with the loop; CPU seconds."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.0)
    loader = DataLoader(Images(data), batch_size=128, shuffle=True)
    began, step, steps = time.process_time(), 0, plan.epochs * len(loader)
    for _ in range(plan.epochs):
        for x, y in loader:
            done = step / steps
            optimizer.param_groups[0]["lr"] = plan.lr * (1 + math.cos(math.pi * done)) / 2
            model.eval()
            x_adv = attacked(model, x, y, plan.eps * min(1.0, max(done / RAMP, 0.01)))
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv).logits, y).backward()
            optimizer.step()
            step += 1
    return time.process_time() - began


def with_fit(plan: Plan, split: Split, model: nn.Module, method: str, epochs: int, seed: int) -> float:
    """Train with fit; CPU seconds."""
    schedule, nothing = METHODS[method](Threat("linf", plan.eps)), split.val.take(slice(0, 0))
    config = FitConfig(epochs=epochs, lr=plan.lr, seed=seed)
    began = time.process_time()
    fit(model, split.train, nothing, schedule, config, device="cpu")
    return time.process_time() - began


def seconds_of_epoch(plan: Plan, split: Split, method: str) -> float:
    """Of the last of three epochs' worth of training on a tenth of the images, when the attack is at full length."""
    tenth = Split(**{**vars(split), "train": split.train.take(slice(0, len(split.train) // 10))})
    one, three = (with_fit(plan, tenth, network(plan, split, 0), method, epochs, 0) for epochs in (1, 3))
    return 10 * (three - one) / 2


def measure(name: str, method: str, share: float, seed: int, split: Split) -> None:
    """Train and evaluate one network, and keep the row."""
    plan, threat = PLANS[name], Threat("linf", PLANS[name].eps)
    model = network(plan, split, seed)
    if method == LOOP:
        epochs, seconds = plan.epochs, by_hand(plan, split.train, model, seed)
    else:
        loop = read(name, LOOP, 1.0, seed)
        if loop is None:
            raise SystemExit(f"the loop of {name}, seed {seed}, comes first.")
        epochs = max(1, int(share * loop["seconds"] / seconds_of_epoch(plan, split, method)))
        seconds = with_fit(plan, split, model, method, epochs, seed)
    model.eval()
    test = split.test.take(slice(0, plan.samples))
    evaluation = evaluate(model, test, threat, "standard", trained_with=sce, seed=seed)
    final = audit(model, test, evaluation, trained_with=sce, seed=seed).evaluation
    row = {"plan": name, "method": method, "share": share, "seed": seed, "epochs": epochs, "seconds": round(seconds, 1)}
    row |= {"samples": len(test), "clean": float(final.clean.double().mean())}
    save(file(name, method, share, seed), row | {"robust": float(final.robust.double().mean())})


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    plan = PLANS[arguments.data]
    split = load(os.environ.get(plan.variable, plan.data), limit_train=plan.train, limit=plan.samples)
    for seed in range(arguments.seeds):
        for method, share in [(LOOP, 1.0), *((method, share) for share in SHARES for method in METHODS)]:
            wanted = arguments.only in method or method == LOOP
            if wanted and read(arguments.data, method, share, seed) is None:
                measure(arguments.data, method, share, seed, split)


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def table() -> None:
    """A line per method and share, means over seeds; differences are paired by seed."""
    for name, plan in PLANS.items():
        loops = [row for seed in range(100) if (row := read(name, LOOP, 1.0, seed)) is not None]
        if not loops:
            print(f"{name}: not run")
            continue
        base = {loop["seed"]: loop["robust"] for loop in loops}
        every = {
            (method, share): [row for seed in base if (row := read(name, method, share, seed)) is not None]
            for method, share in [(LOOP, 1.0), *((method, share) for method in METHODS for share in SHARES)]
        }
        images = f"{plan.train:,} images with validation, {plan.samples} test images"
        print(f"\n{name}: {plan.model}, {images}, linf {plan.eps:.4g}; differences to the loop seed by seed")
        print("| method | share of the loop's time | CPU s | epochs | seeds | clean | robust | minus the loop's |")
        print("|---|---:|---:|---:|---:|---:|---:|---|")
        for (method, share), rows in every.items():
            if rows:
                gains = ", ".join(f"{100 * (row['robust'] - base[row['seed']]):+.1f}" for row in rows)
                epochs = f"{mean(rows, 'epochs'):.1f} | {len(rows)}"
                print(
                    f"| {method} | {share:.2g} | {mean(rows, 'seconds'):.0f} | {epochs} "
                    f"| {mean(rows, 'clean'):.1%} | {mean(rows, 'robust'):.1%} | {gains} |"
                )
        goals(name, loops, {key: rows for key, rows in every.items() if key[0] != LOOP and len(rows) == len(loops)})


def goals(name: str, loops: list[dict[str, Any]], every: dict[tuple[str, float], list[dict[str, Any]]]) -> None:
    """The best objective in equal time, and the shortest time in which one is as robust as the loop."""
    robust = mean(loops, "robust")
    whole = [rows for (_, share), rows in every.items() if share == 1]
    if whole:
        best = max(whole, key=lambda rows: mean(rows, "robust"))
        ours, peer = f"{mean(best, 'robust'):.1%}, {best[0]['method']}", f"{robust:.1%}, {LOOP}"
        more = 100 * (mean(best, "robust") - robust)
        goal(f"{name}: robust in equal time", more, 0, ours=ours, peer=peer, unit=" points more", larger=True)
    reached = [rows for rows in every.values() if mean(rows, "robust") >= robust]
    if reached:
        best = min(reached, key=lambda rows: mean(rows, "seconds"))
        ours, peer = f"{mean(best, 'seconds'):.0f} s, {best[0]['method']}", f"{mean(loops, 'seconds'):.0f} s, {LOOP}"
        faster = mean(loops, "seconds") / mean(best, "seconds")
        goal(f"{name}: time to the loop's robust", faster, 3, ours=ours, peer=peer, unit="x less", larger=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="table", choices=["run", "table"])
    parser.add_argument("--data", default="mnist-0.3", choices=list(PLANS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="only methods with this in their name")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments)
    table()


if __name__ == "__main__":
    main()
