"""Is the score matched to a loss ever weaker than a generic one? Every loss, on the digits, several networks each.

    python benchmarks/bench_adaptive.py [seeds] [losses]

APGD attacks every correctly classified sample with the same steps and the same noise, on the matched score and on
F.cross_entropy, the margin and DLR. An exact McNemar test, paired by sample, compares the matched score with the best
other one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from holdfast.attacks import ATTACKS, SCORES, matched_score
from holdfast.data import pixels
from holdfast.experiments import loss_spec
from holdfast.experiments.config import Comparison, Job
from holdfast.experiments.recipes import fit_for
from holdfast.experiments.training import train_network
from holdfast.losses import LOSSES
from holdfast.noise import Noise
from holdfast.outputs import as_outputs, fooled
from holdfast.results import mcnemar
from holdfast.threat import Threat

FOLDER = Path(__file__).resolve().parent.parent / "out" / "adaptive"
THREAT, STEPS = Threat("linf", 0.1), 30


def broken(
    model: torch.nn.Module, score: object, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    x_adv = ATTACKS["apgd"].attack(model, x, y, THREAT, score=score, noise=Noise(0, index), steps=STEPS)
    with torch.no_grad():
        return fooled(as_outputs(model(x_adv)).logits, y)


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(1)
    print(f"digits, {THREAT}, {STEPS} steps of APGD, {seeds} networks a loss: samples broken")
    print("| loss | correct | matched | cross-entropy | margin | DLR | only matched, only best other | p |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for text in sys.argv[2:] or [*LOSSES, "isce:s=10", "isce:s=100", "isce_b:tau=100", "sce*100"]:
        spec = loss_spec.parse(text)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("matched", "cross_entropy", "margin", "dlr")}
        for seed in range(seeds):
            comparison = Comparison(losses=(text,), fit=fit_for("digits")).checked()
            where = FOLDER / f"{text.replace(':', '-').replace('*', 'x')}-{seed}"
            model, _, split = train_network(Job(comparison, spec, seed, 0, where))
            x, y = pixels(split.test.x), split.test.y
            with torch.no_grad():
                correct = as_outputs(model(x)).logits.argmax(1) == y
            for name in parts:
                score = matched_score(spec.loss) if name == "matched" else SCORES[name]
                parts[name].append(broken(model, score, x[correct], y[correct], split.test.index[correct]))
        columns = {name: torch.cat(masks) for name, masks in parts.items()}
        best = max((name for name in columns if name != "matched"), key=lambda name: int(columns[name].sum()))
        mine, other = (int((columns[a] & ~columns[b]).sum()) for a, b in (("matched", best), (best, "matched")))
        p = mcnemar(columns["matched"].int().tolist(), columns[best].int().tolist())
        counts = " | ".join(str(int(column.sum())) for column in columns.values())
        print(f"| {text} | {len(columns['matched'])} | {counts} | {mine}, {other} ({best}) | {p:.2g} |", flush=True)


if __name__ == "__main__":
    main()
