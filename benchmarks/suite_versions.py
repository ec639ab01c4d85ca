"""The suite `standard` of two versions of holdfast, on the same networks, samples and seeds.

    python benchmarks/suite_versions.py run old      # in a checkout of the one version
    python benchmarks/suite_versions.py run new      # in a checkout of the other, with out/suite of the first one
    python benchmarks/suite_versions.py table old new

Minutes for each network; what is finished is not run again. Passes are those of attacks and audit. The table counts the
samples that one version alone breaks. ``HOLDFAST_MNIST`` names a parquet folder.
"""

from __future__ import annotations

import json
import sys

import torch

from holdfast.checks import audit
from holdfast.evaluation import evaluate
from suite_networks import FOLDER, PLANS, build, threats

RESULTS = FOLDER / "versions"
NETWORKS = (
    "digits-sce-v", "digits-at0.1-v", "digits-mmc-v", "digits-isce100-v", "mnist-sce", "mnist-at0.2", "mnist-isce100",
    "mnist-mmc",
)  # fmt: skip
SIZES, SEEDS = (100, 300), (0, 1)


def run(version: str) -> None:
    """Evaluate and audit every network; one file for each size and seed."""
    torch.set_num_threads(1)
    (RESULTS / version).mkdir(parents=True, exist_ok=True)
    for plan in (plan for plan in PLANS if plan.name in NETWORKS):
        net, (threat,) = build(plan), threats(plan)
        for n in SIZES:
            for seed in SEEDS:
                path = RESULTS / version / f"{plan.name}-{n}-{seed}.json"
                if path.exists():
                    continue
                some = net.split.test.take(slice(0, n))
                evaluation = evaluate(net.model, some, threat, "standard", trained_with=net.loss, seed=seed)
                audited = audit(net.model, some, evaluation, trained_with=net.loss, seed=seed)
                final = audited.evaluation
                answer = {
                    "robust": final.robust.int().tolist(),
                    "passes": sum(stage.passes for stage in final.stages),
                    "verdict": audited.verdict().status,
                }
                path.write_text(json.dumps(answer))
                print(path.stem, answer["passes"], sum(answer["robust"]), answer["verdict"], flush=True)


def table(old: str, new: str) -> None:
    """Both versions side by side, and the sums."""
    for n in SIZES:
        passes, alone, verdicts = [0, 0], [0, 0], 0
        for path in sorted((RESULTS / old).glob(f"*-{n}-*.json")):
            other = RESULTS / new / path.name
            if not other.exists():
                continue
            a, b = json.loads(path.read_text()), json.loads(other.read_text())
            pairs = list(zip(a["robust"], b["robust"], strict=True))
            only = [sum(x < y for x, y in pairs), sum(x > y for x, y in pairs)]
            print(
                f"{path.stem:28}{a['passes']:>9,} {b['passes']:>9,}  only {old} breaks {only[0]}, only {new} {only[1]}"
            )
            passes = [passes[0] + a["passes"], passes[1] + b["passes"]]
            alone = [alone[0] + only[0], alone[1] + only[1]]
            verdicts += a["verdict"] != b["verdict"]
        print(
            f"n = {n}: {passes[0]:,} and {passes[1]:,} passes, {passes[0] / max(passes[1], 1):.2f}x; only {old} breaks "
            f"{alone[0]}, only {new} {alone[1]}; verdicts differ {verdicts} times\n"
        )


if __name__ == "__main__":
    what, *names = sys.argv[1:] or [""]
    if (what, len(names)) not in (("run", 1), ("table", 2)):
        sys.exit(__doc__)
    (run if what == "run" else table)(*names)
