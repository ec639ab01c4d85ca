"""Attacks against the exact answer: ten small ReLU networks whose robustness is proved per sample (tests/fixtures).

    python benchmarks/bench_exact.py

Per network: how many samples are breakable, and how many of them PGD-50, `quick` and `standard` break. Then how often
the interval for the missed samples contains the exact number: after audits, and after two runs of a few PGD steps. Two
such runs miss the same samples, which violates the assumption of capture-recapture.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.checks.test_remaining_vulnerable import CASCADES, left
from tests.milp import make_exact_fixture

from goals import goal
from holdfast.attacks import ATTACKS, SCORES
from holdfast.checks import audit
from holdfast.data import pixels
from holdfast.evaluation import evaluate
from holdfast.noise import Noise
from holdfast.outputs import fooled
from holdfast.results import remaining_vulnerable
from holdfast.threat import Threat

SUITES = {"pgd50": (), "quick": "quick", "standard": "standard"}
WEAK_STEPS = (1, 2, 4)


def main() -> None:
    torch.set_num_threads(1)
    split = make_exact_fixture.digits()
    totals, lines, contradicted, none_missed = dict.fromkeys(SUITES, 0), [], 0, 0
    strong: list[bool] = []
    weak: list[bool] = []
    truths = make_exact_fixture.load()
    for truth in track(truths, description="networks"):
        data, threat, loss = split.test.take(truth.rows), Threat("linf", truth.plan.eps), truth.plan.loss
        hits = {}
        for name, suite in SUITES.items():
            broken = ~evaluate(truth.model, data, threat, suite, trained_with=loss).robust
            hits[name] = int((broken & truth.broken).sum())
            contradicted += int((broken & truth.robust).sum())
            totals[name] += hits[name]
        counts = ", ".join(f"{name} {count}" for name, count in hits.items())
        lines.append(
            f"{truth.plan.name}: {len(truth.rows)} samples, {int(truth.broken.sum())} breakable; broken by {counts}"
        )
        for stages in CASCADES.values():
            evaluation = evaluate(truth.model, data, threat, stages, trained_with=loss)
            audited = audit(truth.model, data, evaluation, trained_with=loss)
            least, most = left(truth, audited)
            none_missed += most == 0
            strong.append(audited.remaining.low <= most and least <= audited.remaining.high)
        x, y = pixels(data.x), data.y
        for steps in WEAK_STEPS:
            runs = []
            for seed, score in ((1, "scaled_log_odds"), (2, "dlr")):
                keywords = {"score": SCORES[score], "noise": Noise(seed, data.index), "steps": steps}
                x_adv = ATTACKS["pgd"].attack(truth.model, x, y, threat, step_size=threat.eps, **keywords)
                runs.append(fooled(truth.model(x_adv).logits, y))
            a, b = runs
            estimate = remaining_vulnerable(int(a.sum()), int(b.sum()), int((a & b).sum()), len(y), len(y))
            weak.append(estimate.low <= int((truth.broken & ~(a | b)).sum()) <= estimate.high)
    print("\n".join(lines))
    unknown, robust, broken = (sum(int(getattr(t, k).sum()) for t in truths) for k in ("unknown", "robust", "broken"))
    print(f"in all: {robust} proved robust, {broken} breakable, {unknown} unknown; broken: {totals}")
    print(f"adversarial examples for samples that are proved robust: {contradicted}")
    goal("adversarial examples for samples that are proved robust", contradicted, 0, peer="exact proofs")
    goal("breakable samples that standard breaks", totals["standard"], broken, peer="exact proofs", larger=True)
    print(
        f"the interval contains the exact number of missed samples: after audits {sum(strong)} of {len(strong)} (none "
        f"is missed in {none_missed}), after weak runs {sum(weak)} of {len(weak)}"
    )


if __name__ == "__main__":
    main()
