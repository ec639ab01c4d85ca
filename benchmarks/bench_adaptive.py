"""Is the score matched to a loss ever weaker than a generic one? Every loss, on the digits, several networks each.

    python benchmarks/bench_adaptive.py [seeds] [losses]

APGD with the same steps and the same noise, alone on every sample that is right, on the matched score and on
F.cross_entropy, the margin and DLR. Paired by sample: exact McNemar between the matched score and the best other one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from holdfast.attacks import ATTACKS, SCORES, matched_score
from holdfast.data import pixels
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
    print("| loss | right | matched | cross-entropy | margin | DLR | matched alone, best other alone | p |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for text in sys.argv[2:] or [*LOSSES, "isce:s=10", "isce:s=100", "isce_b:tau=100", "sce*100"]:
        found: dict[str, list[torch.Tensor]] = {name: [] for name in ("matched", "cross_entropy", "margin", "dlr")}
        for seed in range(seeds):
            comparison = Comparison(losses=(text,), fit=fit_for("digits")).checked()
            where = FOLDER / f"{text.replace(':', '-').replace('*', 'x')}-{seed}"
            loss = comparison.loss_specs[0]
            model, _, split = train_network(Job(comparison, loss, seed, 0, where))
            x, y = pixels(split.test.x), split.test.y
            with torch.no_grad():
                right = as_outputs(model(x)).logits.argmax(1) == y
            for name in found:
                score = matched_score(loss.loss) if name == "matched" else SCORES[name]
                found[name].append(broken(model, score, x[right], y[right], split.test.index[right]))
        columns = {name: torch.cat(parts) for name, parts in found.items()}
        best = max((name for name in columns if name != "matched"), key=lambda name: int(columns[name].sum()))
        mine, other = (int((columns[a] & ~columns[b]).sum()) for a, b in (("matched", best), (best, "matched")))
        p = mcnemar(columns["matched"].int().tolist(), columns[best].int().tolist())
        counts = " | ".join(str(int(column.sum())) for column in columns.values())
        print(f"| {text} | {len(columns['matched'])} | {counts} | {mine}, {other} ({best}) | {p:.2g} |", flush=True)


if __name__ == "__main__":
    main()
