"""What each method of proof reaches of the images that attacks leave, and what it costs.

    HOLDFAST_MNIST=data/mnist HOLDFAST_CIFAR10=data/cifar10 python benchmarks/bench_bounds.py [NAME ...]

Networks are trained first, once, under out/bounds (``rows`` says how). Methods: interval, linear, crown, alpha, and
branch and bound for at most 1, 10 and 60 seconds on each image that is left; for the networks of digits also the exact
answer of mixed-integer programs. Every step is kept as JSON, so a stopped run goes on; the table has what is done.
Seconds are CPU seconds of one thread, the limits of branch and bound too: other work on the machine changes little.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from goals import goal
from holdfast import Threat, data, evaluate, losses, objectives
from holdfast.bounds import METHODS, ProofCache, certify
from holdfast.environment import environment
from holdfast.milp import decide, layers_of
from holdfast.outputs import frozen_eval
from holdfast.results import proportion
from holdfast.train import FitConfig, fit

OUT = Path(__file__).resolve().parent.parent / "out" / "bounds"
STEPS = (*METHODS[:-1], "branch 1", "branch 10", "branch 60")  # seconds for each image


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
    """A network, how it is trained, and the threats and number of test images it is asked about."""

    model: nn.Module
    source: str
    threats: tuple[str, ...]
    trained: str = ""  # the threat of PGD training; "" for standard training
    epochs: int = 5
    images: int = 100_000  # of the training set, at most
    samples: int = 50
    exact: bool = False


def rows() -> dict[str, Row]:
    """All rows, the cheap ones first."""
    return {
        "digits-2x32": Row(mlp(64, 32, 32), "digits", ("linf:0.05", "linf:0.1"), epochs=60, samples=100, exact=True),
        "digits-2x32-at": Row(mlp(64, 32, 32), "digits", ("linf:0.1",), "linf:0.1", 60, samples=100, exact=True),
        "mnist-2x256": Row(mlp(784, 256, 256), "mnist", ("linf:0.02", "linf:0.03")),
        "mnist-4x256": Row(mlp(784, *[256] * 4), "mnist", ("linf:0.02",), samples=20),
        "mnist-6x256": Row(mlp(784, *[256] * 6), "mnist", ("linf:0.01", "linf:0.02"), samples=20),
        "mnist-6x100": Row(mlp(784, *[100] * 6), "mnist", ("linf:0.026",), samples=20),
        "mnist-conv-at0.1": Row(conv_small(1, 28), "mnist", ("linf:0.1",), "linf:0.1", 5, 10_000),
        "mnist-conv-at0.3": Row(conv_small(1, 28), "mnist", ("linf:0.3",), "linf:0.3", 8, 10_000, 20),
        "cifar-conv-at2": Row(conv_small(3, 32), "cifar10", ("linf:2/255",), "linf:2/255", 15, 10_000),
        "cifar-resnet-at2": Row(small_resnet(3), "cifar10", ("linf:1/255", "linf:2/255"), "linf:2/255", 15, 10_000),
    }


def trained(name: str, row: Row) -> tuple[nn.Module, data.Split]:
    """The network of a row, from its run folder."""
    split = data.load(os.environ.get(f"HOLDFAST_{row.source.upper()}", row.source))
    threat = row.trained and Threat.parse(row.trained)
    objective = (
        objectives.adversarial(losses.sce, threat, steps=3, ramp=0.5) if threat else objectives.standard(losses.sce)
    )
    batch = 256 if row.source == "mnist" else 64
    config = FitConfig(epochs=row.epochs, batch_size=batch, lr=2e-3, schedule="onecycle", seed=0)
    torch.manual_seed(0)
    some, fewer = (part.take(slice(0, most)) for part, most in ((split.train, row.images), (split.val, 1_000)))
    fit(row.model, some, fewer, objective, config, out=OUT / name)
    return row.model.eval(), split


class Measured:
    """What is known of a network's test images under a threat, kept in a file after each step.

    ``found`` has "clean" and "standing", numbers of images; for each method those that it "proved", those that it
    "broke", how many it "tried", and its CPU "seconds"; "exact", the numbers that are robust.
    """

    def __init__(self, name: str, row: Row, threat: str) -> None:
        self.name, self.row, self.threat = name, row, threat
        file = f"{name}-{threat.replace('/', '_').replace(':', '')}-{row.samples}.json"
        self.file = OUT / file
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}

    @property
    def done(self) -> dict[str, dict]:
        """The methods that came to their end, in order."""
        return {method: self.found[method] for method in STEPS if method in self.found}

    @property
    def left(self) -> list[int]:
        """Images that attacks left, neither proved nor broken."""
        decided = {number for step in self.done.values() for number in step["proved"] + step["broke"]}
        return [number for number in self.found["standing"] if number not in decided]

    def proved(self, last: str = STEPS[-1]) -> int:
        """How many images the methods up to this one proved."""
        upto = STEPS[: STEPS.index(last) + 1]
        return sum(len(step["proved"]) for method, step in self.done.items() if method in upto)

    @property
    def attacked(self) -> int:
        """How many images nothing broke."""
        return len(self.found["standing"]) - sum(len(step["broke"]) for step in self.done.values())

    @property
    def gap(self) -> float:
        """Points between what is attacked and what is proved."""
        return 100 * (self.attacked - self.proved()) / self.row.samples

    def keep(self, **more: object) -> None:
        self.found |= more
        self.file.write_text(json.dumps(self.found))
        print(self.name, self.threat, {key: _short(value) for key, value in more.items()}, flush=True)

    def run(self, steps: Sequence[str]) -> None:
        """Those of these steps, from the first method, that are not done; and the exact answer."""
        wanted = [step for step in (*steps, *(["exact"] if self.row.exact else [])) if step not in self.found]
        if not wanted:
            return
        model, split = trained(self.name, self.row)
        some, threat = split.test.take(slice(0, self.row.samples)), Threat.parse(self.threat)
        if "standing" not in self.found:
            seen = evaluate(model, some, threat, "standard")
            self.keep(clean=int(seen.clean.sum()), standing=seen.robust.nonzero()[:, 0].tolist())
        cache = ProofCache()
        if self.done and self.left:  # boxes that an earlier run computed, and no step is charged for
            last = [step for step in self.done if not step.startswith("branch")][-1]
            certify(model, some.take(torch.tensor(self.left)), threat, method=last, cache=cache)
        for step in (step for step in steps if step not in self.found):
            self.keep(**{step: self.prove(model, some, threat, step, cache)})
        if "exact" in wanted:
            with frozen_eval(model):
                exact = decide(layers_of(model), data.pixels(some.x), some.y, threat)
            self.keep(exact=exact.robust.nonzero()[:, 0].tolist())

    def prove(self, model: nn.Module, some: data.Data, threat: Threat, step: str, cache: ProofCache) -> dict:
        """A method on what is left; branch and bound on each image by itself."""
        method, _, limit = step.partition(" ")
        left, began, proved, broke = self.left, time.process_time(), [], []
        for part in [[number] for number in left] if limit else [left] if left else []:
            seconds = float(limit) if limit else math.inf
            rows = torch.tensor(part)
            found = certify(model, some.take(rows), threat, method=method, seconds=seconds, cache=cache)
            proved += rows[found.proved].tolist()
            broke += [part[place] for place in found.x_adv]
        return {"proved": proved, "broke": broke, "tried": len(left), "seconds": time.process_time() - began}


def _short(value: object) -> object:
    if isinstance(value, list):
        return len(value)
    return {key: _short(each) for key, each in value.items()} if isinstance(value, dict) else value


def table(lines: list[Measured]) -> str:
    """Images proved so far by each method, with its CPU seconds for one that it tried, as a Markdown table."""
    names = ["clean", *STEPS, "proved, 95%", "attacked, 95%", "gap, points", "exact"]
    out = ["| network | threat | n | " + " | ".join(names) + " |", "|---|---|---:|" + "---:|" * len(names)]
    for line in lines:
        n, cells = line.row.samples, [str(line.found["clean"])]
        for method in STEPS:
            step = line.done.get(method)
            if step is None:
                cells.append("-")
                continue
            cost = f" ({step['seconds'] / step['tried']:.2g} s)" if step["tried"] else ""
            cells.append(f"{line.proved(method)}{cost}")
        cells += [_percent(line.proved(), n), _percent(line.attacked, n), f"{line.gap:.0f}"]
        cells.append(str(len(line.found["exact"])) if "exact" in line.found else "-")
        out.append(f"| {line.name} | {line.threat} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _percent(k: int, n: int) -> str:
    share = proportion(k, n)
    return f"{100 * share.value:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def goals(lines: list[Measured]) -> None:
    """Print those whose rows are measured."""
    digits = [line for line in lines if "exact" in line.found]
    if digits:
        exact = sum(len(line.found["exact"]) for line in digits)
        share = 100 * sum(line.proved("alpha") for line in digits) / exact
        goal("digits: alpha, of the exactly robust images", share, 90, unit="%", larger=True)
    for line in (line for line in lines if STEPS[-1] in line.found):
        if line.name == "mnist-6x256":
            share = 100 * line.proved() / line.attacked
            goal(f"6x256, {line.threat}: proved, of those that stand", share, 50, unit="%", larger=True)
        if line.name == "cifar-conv-at2":
            goal("PGD-trained convnet, linf 2/255: gap in points", line.gap, 10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    time.monotonic = time.process_time  # the limits of branch and bound count CPU seconds
    OUT.mkdir(parents=True, exist_ok=True)
    every = rows()
    lines = [Measured(name, row, threat) for name, row in every.items() for threat in row.threats]
    for steps in (STEPS[:-1], STEPS):  # the longest last
        for line in lines:
            if line.name in (sys.argv[1:] or every):
                line.run(steps)
    measured = [line for line in lines if "standing" in line.found]
    print(table(measured))
    goals(measured)
    print(environment())
