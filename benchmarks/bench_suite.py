"""holdfast's suites beside AutoAttack (PyPI: pyautoattack 0.2.0) on the same networks, samples and machine.

    python benchmarks/bench_suite.py peer                # hours: every network, threat and seed; resumable
    python benchmarks/bench_suite.py ours
    python benchmarks/bench_suite.py                     # the table of all results in out/suite/bench

Passes are forward passes plus backward passes, summed over samples, on both sides. They include the clean pass, PGD-50,
attacks, the check of every candidate, and trust checks. Seconds are processor time of one thread, so other work on the
machine does not count. ``HOLDFAST_MNIST`` and ``HOLDFAST_CIFAR10`` name parquet folders.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from goals import goal
from holdfast.data import pixels
from holdfast.outputs import as_outputs, fooled
from holdfast.threat import Threat
from suite_networks import FOLDER, PLANS, Net, Plan, build, threats

BENCH = FOLDER / "bench"
SAMPLES = {"mnist": 300, "cifar10": 100}
SEEDS = (0, 1, 2)
NORMS = {"linf": "Linf", "l2": "L2"}


class Counting(nn.Module):
    """The network as AutoAttack needs it: logits only, with its passes counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._count_backward)
        return as_outputs(self.model(x)).logits

    def _count_backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def file(side: str, plan: Plan, threat: Threat, seed: int, samples: int = 0) -> Path:
    many = f"-n{samples}" if samples else ""
    return BENCH / f"{side}-{plan.name}-{threat.norm}{threat.eps:.4g}-seed{seed}{many}.json"


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(result))
    path.with_suffix(".tmp").rename(path)
    shown = {key: value for key, value in result.items() if key not in ("robust", "stages")}
    print(path.stem, shown, "survivors:", sum(result["robust"]), flush=True)


def survivors(net: Net, threat: Threat, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """(N,) bool, by the same rule for both sides: correct, and x_adv is not a misclassified point of the threat."""
    with torch.no_grad():
        clean, adv = (as_outputs(net.model(batch)).logits for batch in (x, x_adv))
    return (clean.argmax(1) == y) & ~(fooled(adv, y) & (threat.violation(x_adv, x) == 0))


def peer(plan: Plan, threat: Threat, seed: int, samples: int = 0) -> None:
    from pyautoattack import AutoAttack

    net = build(plan)
    some = net.split.test.take(slice(0, samples or SAMPLES[plan.data]))
    x, y = pixels(some.x), some.y
    model = Counting(net.model.eval())
    torch.manual_seed(seed)
    attack = AutoAttack(model, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, version="standard", device="cpu")
    began = time.process_time()
    answer = attack.run_standard_evaluation(x, y, batch_size=250)
    seconds = time.process_time() - began
    x_adv = next(part for part in (answer if isinstance(answer, tuple) else (answer,)) if part.shape == x.shape)
    save(
        file("peer", plan, threat, seed, samples),
        {
            "robust": survivors(net, threat, x, x_adv, y).int().tolist(),
            "forwards": model.forwards,
            "backwards": model.backwards,
            "seconds": seconds,
        },
    )


def ours(plan: Plan, threat: Threat, seed: int, suite: str, samples: int = 0) -> None:
    from holdfast.checks import audit
    from holdfast.evaluation import evaluate

    net = build(plan)
    some = net.split.test.take(slice(0, samples or SAMPLES[plan.data]))
    began = time.process_time()
    evaluation = evaluate(net.model, some, threat, suite, trained_with=net.loss, seed=seed)
    final = audit(net.model, some, evaluation, trained_with=net.loss, seed=seed).evaluation
    seconds = time.process_time() - began
    save(
        file(suite, plan, threat, seed, samples),
        {
            "robust": survivors(net, threat, pixels(some.x), final.x_adv, some.y).int().tolist(),
            "forwards": final.forwards,
            "backwards": final.backwards,
            "seconds": seconds,
            "stages": [vars(stage) for stage in final.stages],
        },
    )


def run_all(side: str, arguments: argparse.Namespace) -> None:
    for seed in SEEDS[: arguments.seeds]:
        for plan in (plan for plan in PLANS if plan.role == "bench" and arguments.only in plan.name):
            for threat in threats(plan):
                if file(side, plan, threat, seed, arguments.samples).exists() and not arguments.again:
                    continue
                if side == "peer":
                    peer(plan, threat, seed, arguments.samples)
                else:
                    ours(plan, threat, seed, side, arguments.samples)


def read(side: str, plan: Plan, threat: Threat, samples: int) -> list[dict[str, Any]]:
    paths = [file(side, plan, threat, seed, samples) for seed in SEEDS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def only_second_breaks(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Samples that b breaks and a does not."""
    return sum(x and not y for x, y in zip(a["robust"], b["robust"], strict=True))


def table(suite: str, samples: int) -> None:
    """Print a line per network, means over seeds, and the totals."""
    lines: list[tuple[Any, ...]] = []
    for plan in PLANS:
        for threat in threats(plan):
            mine, theirs = (read(side, plan, threat, samples) for side in (suite, "peer"))
            pairs = list(zip(mine, theirs, strict=False))
            if not pairs or plan.role != "bench":
                continue
            again = [(a, b) for a in theirs for b in theirs if a is not b]
            passes = [sum(one["forwards"] + one["backwards"] for one in side) / len(side) for side in (mine, theirs)]
            seconds = [sum(one["seconds"] for one in side) / len(side) for side in (mine, theirs)]
            lines.append((
                f"{plan.name}, {threat}", len(mine[0]["robust"]), len(pairs),
                sum(sum(one["robust"]) for one in mine) / len(mine),
                sum(sum(one["robust"]) for one in theirs) / len(theirs),
                sum(sum(x and y for x, y in zip(a["robust"], b["robust"], strict=True)) for a, b in pairs) / len(pairs),
                sum(only_second_breaks(a, b) for a, b in pairs), max(only_second_breaks(a, b) for a, b in pairs),
                sum(only_second_breaks(b, a) for a, b in pairs),
                len(pairs) * sum(only_second_breaks(a, b) for a, b in again) / max(1, len(again)),
                *passes, *seconds,
            ))  # fmt: skip
    head = (
        "| network | n | seeds | survive ours | peer | both | only the peer breaks | only ours breaks "
        "| only a second peer run breaks | passes, ours | peer | ratio | s, ours | peer | ratio |"
    )
    print(head + "\n|" + "---|" + "---:|" * (head.count("|") - 2))
    for name, n, seeds, a, b, both, lost, _, won, itself, pa, pb, sa, sb in lines:
        print(
            f"| {name} | {n} | {seeds} | {a:.1f} | {b:.1f} | {both:.1f} | {lost} | {won} | {itself:.1f} "
            f"| {pa:,.0f} | {pb:,.0f} | {pb / pa:.1f} | {sa:.1f} | {sb:.1f} | {sb / sa:.1f} |"
        )
    if lines:
        lost, won, itself = (sum(line[k] for line in lines) for k in (6, 8, 9))
        worst = max(line[7] / line[1] for line in lines)
        pa, pb, sa, sb = (sum(line[k] for line in lines) for k in (10, 11, 12, 13))
        print(
            f"\nover networks and seeds: only the peer breaks {lost}, only ours {won}, only a second run of the peer "
            f"{itself:.1f}; at worst {1000 * worst:.1f} of 1,000 on one network; {pb / pa:.1f}x fewer passes, "
            f"{sb / sa:.1f}x less time"
        )
        goal(
            "passes of the suite",
            pb / pa,
            10,
            ours=f"{pa:,.0f}",
            peer=f"{pb:,.0f}, AutoAttack",
            unit="x fewer",
            larger=True,
        )
        goal(
            "time of the suite",
            sb / sa,
            8,
            ours=f"{sa:.0f} s",
            peer=f"{sb:.0f} s, AutoAttack",
            unit="x less",
            larger=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="table", choices=["peer", "ours", "table"])
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--samples", type=int, default=0, help="default: 300 of MNIST, 100 of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--again", action="store_true", help="run again what is finished")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if arguments.what == "table":
        table(arguments.suite, arguments.samples)
    else:
        run_all("peer" if arguments.what == "peer" else arguments.suite, arguments)
