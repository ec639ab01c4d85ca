"""What each method of proof reaches, and what it costs: proved share and seconds an image, beside what attacks leave.

    HOLDFAST_MNIST=data/mnist HOLDFAST_CIFAR10=data/cifar10 python benchmarks/bench_bounds.py [NAME ...]

Networks are trained first, once, under out/bounds (``TRAINED`` says how); every row is kept there as JSON, so a stopped
run goes on. Methods: interval, linear, crown, alpha, and branch at 1, 10 and 60 seconds an image; the exact answer of
mixed-integer programs where a network is small enough. Seconds are wall-clock of one thread: run nothing beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from holdfast import Threat, data, evaluate, losses, objectives
from holdfast.bounds import METHODS, certify
from holdfast.environment import environment
from holdfast.milp import decide, layers_of
from holdfast.outputs import frozen_eval
from holdfast.train import FitConfig, fit

OUT = Path(__file__).resolve().parent.parent / "out" / "bounds"
BRANCH_SECONDS = (1, 10, 60)


def mlp(inputs: int, *widths: int) -> nn.Sequential:
    """A fully connected ReLU network with ten logits."""
    sizes = (inputs, *widths)
    hidden = (part for a, b in zip(sizes, widths, strict=False) for part in (nn.Linear(a, b), nn.ReLU()))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def conv_small(channels: int, side: int) -> nn.Sequential:
    """Two strided convolutions of 16 and 32 channels and a dense layer of 100, as ConvSmall of the ERAN benchmarks."""
    left = ((side - 4) // 2 + 1 - 4) // 2 + 1
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * left * left, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


class Block(nn.Module):
    """relu(x + conv(relu(conv(x)))), with a strided shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(into, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.shortcut = nn.Conv2d(into, out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def small_resnet(channels: int) -> nn.Sequential:
    """Two strided residual blocks of 8 and 16 channels, as ResNet2b of VNN-COMP, and a dense layer of 100."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), Block(8, 8, 2), Block(8, 16, 2), nn.Flatten(),
        nn.Linear(16 * 16, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A network, how it is trained, and the threats and number of images it is asked about."""

    model: nn.Module
    source: str
    threats: tuple[str, ...]
    trained: str = ""  # the threat of PGD training; "" for standard training
    epochs: int = 10
    samples: int = 50
    exact: bool = False


def rows() -> dict[str, Row]:
    """All rows, the cheap ones first."""
    return {
        "digits-2x32": Row(mlp(64, 32, 32), "digits", ("linf:0.05", "linf:0.1"), epochs=60, samples=100, exact=True),
        "digits-2x32-at": Row(mlp(64, 32, 32), "digits", ("linf:0.1",), "linf:0.1", 60, 100, True),
        "mnist-2x256": Row(mlp(784, 256, 256), "mnist", ("linf:0.02", "linf:0.03")),
        "mnist-4x256": Row(mlp(784, *[256] * 4), "mnist", ("linf:0.02",)),
        "mnist-6x256": Row(mlp(784, *[256] * 6), "mnist", ("linf:0.01", "linf:0.02")),
        "mnist-6x100": Row(mlp(784, *[100] * 6), "mnist", ("linf:0.026",)),
        "mnist-conv-at0.1": Row(conv_small(1, 28), "mnist", ("linf:0.1",), "linf:0.1"),
        "mnist-conv-at0.3": Row(conv_small(1, 28), "mnist", ("linf:0.3",), "linf:0.3"),
        "cifar-conv-at2": Row(conv_small(3, 32), "cifar10", ("linf:2/255",), "linf:2/255", 20),
        "cifar-resnet-at2": Row(small_resnet(3), "cifar10", ("linf:1/255", "linf:2/255"), "linf:2/255", 20),
    }


def trained(name: str, row: Row) -> tuple[nn.Module, data.Split]:
    """The network of a row, from its run folder."""
    split = data.load(os.environ.get(f"HOLDFAST_{row.source.upper()}", row.source))
    threat = row.trained and Threat.parse(row.trained)
    objective = (
        objectives.adversarial(losses.sce, threat, steps=5, ramp=0.5) if threat else objectives.standard(losses.sce)
    )
    batch = 64 if row.source == "digits" else 256
    config = FitConfig(epochs=row.epochs, batch_size=batch, lr=2e-3, schedule="onecycle", seed=0)
    torch.manual_seed(0)
    fit(row.model, split.train, split.val, objective, config, out=OUT / name)
    return row.model.eval(), split


def measure(name: str, row: Row) -> list[dict[str, object]]:
    """One line for each threat and method."""
    lines = []
    model, split = trained(name, row)
    some = split.test.take(slice(0, row.samples))
    for text in row.threats:
        file = OUT / f"{name}-{text.replace('/', '_').replace(':', '')}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        threat = Threat.parse(text)

        def keep(what: str, share: float, began: float, text=text, file=file, kept=kept) -> None:
            kept[what] = {"share": share, "seconds": (time.monotonic() - began) / row.samples}
            file.write_text(json.dumps(kept))
            print(name, text, what, kept[what], flush=True)

        if "attacked" not in kept:
            began = time.monotonic()
            kept["clean"] = {"share": float(evaluate(model, some, threat, ()).clean.double().mean()), "seconds": 0.0}
            keep("attacked", float(evaluate(model, some, threat, "standard").robust.double().mean()), began)
        limits = [(method, float("inf")) for method in METHODS[:-1]]
        limits += [("branch", float(seconds * row.samples)) for seconds in BRANCH_SECONDS]
        for method, seconds in limits:
            what = method if method != "branch" else f"branch {seconds / row.samples:.0f} s"
            if what not in kept:
                began = time.monotonic()
                found = certify(model, some, threat, method=method, seconds=seconds)
                keep(what, float(found.proved.double().mean()), began)
        if row.exact and "exact" not in kept:
            began = time.monotonic()
            with frozen_eval(model):
                exact = decide(layers_of(model), data.pixels(some.x), some.y, threat)
            keep("exact", float(exact.robust.double().mean()), began)
        lines.append({"network": name, "threat": text, **kept})
    return lines


def table(lines: list[dict]) -> str:
    """Shares in percent and seconds an image, as a Markdown table."""
    methods = ["clean", *METHODS[:-1], *(f"branch {s} s" for s in BRANCH_SECONDS), "exact", "attacked"]
    out = ["| network | threat | " + " | ".join(methods) + " |", "|---|---|" + "---:|" * len(methods)]
    for line in lines:
        cells = []
        for method in methods:
            found = line.get(method)
            cost = "" if not found or method == "clean" else f" ({found['seconds']:.2g} s)"
            cells.append(f"{100 * found['share']:.0f}{cost}" if found else "-")
        out.append(f"| {line['network']} | {line['threat']} | " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    every = rows()
    chosen = sys.argv[1:] or list(every)
    lines = [line for name in chosen for line in measure(name, every[name])]
    print(table(lines))
    print(environment())
