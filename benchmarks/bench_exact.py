"""The bench against the truth: ten small ReLU networks whose robustness is proved sample by sample (tests/fixtures).

    python benchmarks/bench_exact.py

Per network: truly broken samples, and how many of them the published protocol, `quick` and `standard` find. Then how
often the interval of what is left holds the truth: after audits, and after two runs of a few PGD steps, which miss the
same samples and so break what capture-recapture assumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.checks.test_remaining_vulnerable import CASCADES, left
from tests.milp import make_exact_fixture

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
    found, lines, contradicted, clear = dict.fromkeys(SUITES, 0), [], 0, 0
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
            found[name] += hits[name]
        told = ", ".join(f"{name} {count}" for name, count in hits.items())
        lines.append(f"{truth.plan.name}: {len(truth.rows)} samples, {int(truth.broken.sum())} broken; found: {told}")
        for stages in CASCADES.values():
            judged = audit(
                truth.model, data, evaluate(truth.model, data, threat, stages, trained_with=loss), trained_with=loss
            )
            least, most = left(truth, judged)
            clear += most == 0
            strong.append(judged.remaining.low <= most and least <= judged.remaining.high)
        x, y = pixels(data.x), data.y
        for steps in WEAK_STEPS:
            runs = []
            for seed, score in ((1, "scaled_log_odds"), (2, "dlr")):
                keywords = {"score": SCORES[score], "noise": Noise(seed, data.index), "steps": steps}
                x_adv = ATTACKS["pgd"].attack(truth.model, x, y, threat, step_size=threat.eps, **keywords)
                runs.append(fooled(truth.model(x_adv).logits, y))
            a, b = runs
            said = remaining_vulnerable(int(a.sum()), int(b.sum()), int((a & b).sum()), len(y), len(y))
            weak.append(said.low <= int((truth.broken & ~(a | b)).sum()) <= said.high)
    print("\n".join(lines))
    unknown, robust, broken = (sum(int(getattr(t, k).sum()) for t in truths) for k in ("unknown", "robust", "broken"))
    print(f"in all: {robust} proved robust, {broken} broken, {unknown} unknown; found: {found}")
    print(f"adversarial examples claimed for a sample proved robust: {contradicted}")
    print(
        f"the interval of what is left holds the truth: after audits {sum(strong)} of {len(strong)} (nothing is "
        f"left in {clear}), after weak runs {sum(weak)} of {len(weak)}"
    )


if __name__ == "__main__":
    main()
