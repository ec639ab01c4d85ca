"""holdfast's suites beside AutoAttack (PyPI: pyautoattack 0.2.0) on the same networks, samples and machine.

    python benchmarks/bench_arsenal.py peer                   # hours: every network, threat and seed; resumable
    python benchmarks/bench_arsenal.py ours [--suite standard]
    python benchmarks/bench_arsenal.py                        # the table of what both have left in out/arsenal/bench

Passes are samples sent forward and gradients sent back, each counted once, on both sides, everything included: clean
pass, published protocol, attacks, verification, trust checks. Seconds are of the processor, one thread, so that what
else the machine does meanwhile does not count. ``HOLDFAST_MNIST`` and ``HOLDFAST_CIFAR10`` name parquet folders.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from arsenal_nets import FOLDER, PLANS, Net, Plan, build, threats
from torch import Tensor, nn

from holdfast.data import pixels
from holdfast.outputs import as_outputs, fooled
from holdfast.threat import Threat

BENCH = FOLDER / "bench"
SAMPLES = {"mnist": 300, "cifar10": 100}
SEEDS = (0, 1, 2)
NORMS = {"linf": "Linf", "l2": "L2"}


class Counting(nn.Module):
    """The network as the peer wants it, logits alone, with its passes counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._returned)
        return as_outputs(self.model(x)).logits

    def _returned(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def file(side: str, plan: Plan, threat: Threat, seed: int) -> Path:
    return BENCH / f"{side}-{plan.name}-{threat.norm}{threat.eps:.4g}-seed{seed}.json"


def keep(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(found))
    path.with_suffix(".tmp").rename(path)
    shown = {key: value for key, value in found.items() if key not in ("robust", "stages")}
    print(path.stem, shown, "stand:", sum(found["robust"]), flush=True)


def judged(net: Net, threat: Threat, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """What stands, by the same yardstick for both: one more forward pass, inside the threat."""
    with torch.no_grad():
        clean, adv = (as_outputs(net.model(batch)).logits for batch in (x, x_adv))
    return (clean.argmax(1) == y) & ~(fooled(adv, y) & (threat.violation(x_adv, x) == 0))


def peer(plan: Plan, threat: Threat, seed: int) -> None:
    from pyautoattack import AutoAttack

    net = build(plan)
    some = net.split.test.take(slice(0, SAMPLES[plan.data]))
    x, y = pixels(some.x), some.y
    model = Counting(net.model.eval())
    torch.manual_seed(seed)
    attack = AutoAttack(model, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, version="standard", device="cpu")
    began = time.process_time()
    answer = attack.run_standard_evaluation(x, y, batch_size=250)
    seconds = time.process_time() - began
    x_adv = next(part for part in (answer if isinstance(answer, tuple) else (answer,)) if part.shape == x.shape)
    stands = judged(net, threat, x, x_adv, y)
    keep(
        file("peer", plan, threat, seed),
        {
            "robust": stands.int().tolist(),
            "forwards": model.forwards,
            "backwards": model.backwards,
            "seconds": seconds,
        },
    )


def ours(plan: Plan, threat: Threat, seed: int, suite: str) -> None:
    from holdfast.checks import audit
    from holdfast.evaluate import evaluate

    net = build(plan)
    some = net.split.test.take(slice(0, SAMPLES[plan.data]))
    began = time.process_time()
    found = evaluate(net.model, some, threat, suite, trained_with=net.loss, seed=seed)
    checked = audit(net.model, some, found, trained_with=net.loss, seed=seed)
    seconds = time.process_time() - began
    final = checked.evaluation
    keep(
        file(suite, plan, threat, seed),
        {
            "robust": judged(net, threat, pixels(some.x), final.x_adv, some.y).int().tolist(),
            "forwards": final.forwards,
            "backwards": final.backwards,
            "seconds": seconds,
            "stages": [vars(stage) for stage in final.stages],
        },
    )


def every(side: str, argued: argparse.Namespace) -> None:
    for seed in SEEDS:
        for plan in (plan for plan in PLANS if plan.role == "bench" and argued.only in plan.name):
            for threat in threats(plan):
                if not file(side, plan, threat, seed).exists() or argued.again:
                    peer(plan, threat, seed) if side == "peer" else ours(plan, threat, seed, side)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="table", choices=["peer", "ours", "table"])
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--only", default="", help="networks whose name holds this")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    argued = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if argued.what != "table":
        every("peer" if argued.what == "peer" else argued.suite, argued)
