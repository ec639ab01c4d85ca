"""Choose the stages of a suite on recorded success tables, not by hand.

    python benchmarks/choose_suites.py record [part/parts]   # what each candidate breaks on the validation networks
    python benchmarks/choose_suites.py choose                # greedy: most new samples a pass, until nothing is left

A table holds, for each network and candidate stage, what it breaks of the samples that a first sweep leaves, the
smallest margin it reaches there, and its passes. Noise belongs to the candidate, so a cascade of candidates breaks the
union of what they break alone: any order can be judged from the tables without another attack (Liu et al. 2023).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from arsenal_nets import FOLDER, PLANS, build, threats
from torch import Tensor

from holdfast.attacks import ATTACKS, SCORES, cross_entropy, matched
from holdfast.checks.probe import rescaled
from holdfast.data import pixels
from holdfast.evaluate import Counted, exact_arithmetic
from holdfast.losses import negative_margin
from holdfast.noise import Noise
from holdfast.outputs import fooled, frozen_eval

TABLES = FOLDER / "tables"
SAMPLES = {"digits": 359, "mnist": 300, "cifar10": 120}


@dataclass(frozen=True)
class Candidate:
    """One attack that a suite may hold. rank: towards the rank-th likeliest wrong class of the clean image, or None."""

    name: str
    attack: str
    score: str = "matched"
    rank: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def candidates() -> list[Candidate]:
    found = [Candidate("sweep", "apgd", settings={"steps": 10})]
    for copy in ("", "'"):
        for score in ("matched", "margin", "dlr", "rescaled"):
            for steps in (20, 50, 100):
                found.append(Candidate(f"{score}{steps}{copy}", "apgd", score, settings={"steps": steps}))
        for rank in range(9):
            for steps in (10, 20, 50, 100) if not copy else (20, 50):
                if not copy or rank < 4:
                    found.append(Candidate(f"dlr-t{rank}x{steps}{copy}", "apgd", "dlr", rank, {"steps": steps}))
        for rank in range(4):
            found.append(Candidate(f"margin-t{rank}x20{copy}", "apgd", "margin", rank, {"steps": 20}))
            found.append(Candidate(f"matched-t{rank}x20{copy}", "apgd", "matched", rank, {"steps": 20}))
        found.append(Candidate(f"md20{copy}", "md", "margin", settings={"steps": 20, "restarts": 2}))
        found.append(Candidate(f"md40{copy}", "md", "margin", settings={"steps": 40, "restarts": 2}))
    found.append(Candidate("fab3x20", "fab", "margin", settings={"steps": 20, "targets": 3}))
    found.append(Candidate("fmn40", "fmn", "margin", settings={"steps": 40}))
    for steps in (50, 200, 1000):
        found.append(Candidate(f"square{steps}", "square", "margin", settings={"steps": steps}))
    return found


def record(part: int, parts: int) -> None:
    """Attack the survivors of the sweep with every candidate, each alone."""
    for plan in [plan for plan in PLANS if plan.role == "choose"][part::parts]:
        for threat in threats(plan):
            path = TABLES / f"{plan.name}-{threat.norm}{threat.eps:.4g}.pt"
            if path.exists():
                continue
            net = build(plan)
            some = net.split.test.take(slice(0, SAMPLES[plan.data]))
            scores = {**SCORES, "matched": matched(net.loss), "loss": cross_entropy, "rescaled": rescaled}
            began = time.process_time()
            with exact_arithmetic(), frozen_eval(net.model):
                model, x, y = Counted(net.model), pixels(some.x), some.y
                clean = torch.cat([model(part).logits for part in x.split(128)])
                ranked = clean.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
                rows = torch.nonzero(clean.argmax(1) == y)[:, 0]
                table: dict[str, Any] = {"n": len(y), "right": len(rows), "columns": {}}
                for number, one in enumerate(candidates()):
                    if threat.norm not in ATTACKS[one.attack].norms or (one.rank or 0) >= ranked.shape[1] - 1:
                        continue
                    model.forwards = model.backwards = 0
                    aimed = {} if one.rank is None else {"target": ranked[rows, one.rank]}
                    noise = Noise(0, some.index[rows]).fold(5000 + number)
                    x_adv = ATTACKS[one.attack].attack(
                        model, x[rows], y[rows], threat, score=scores[one.score], noise=noise, **one.settings, **aimed
                    )
                    with torch.no_grad():
                        logits = model(x_adv).logits
                    broken = fooled(logits, y[rows]) & (threat.violation(x_adv, x[rows]) == 0)
                    margin = -negative_margin(logits, y[rows])
                    passes = model.forwards + model.backwards
                    if one.name == "sweep":
                        rows, margin = rows[~broken], margin[~broken]
                        table |= {"rows": rows, "margin": margin, "sweep": passes}
                        continue
                    table["columns"][one.name] = {"broken": broken, "margin": margin, "passes": passes}
            TABLES.mkdir(parents=True, exist_ok=True)
            torch.save(table, path)
            left = len(rows) - int(union(table).sum())
            print(
                f"{path.stem}: {table['n']} samples, {table['right']} right, {len(rows)} after the sweep, {left} stand; "
                f"{time.process_time() - began:.0f} s",
                flush=True,
            )


def union(table: dict[str, Any]) -> Tensor:
    return torch.stack([column["broken"] for column in table["columns"].values()]).any(0)


def load() -> dict[str, dict[str, Any]]:
    return {path.stem: torch.load(path, weights_only=True) for path in sorted(TABLES.glob("*.pt"))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["record"]:
        part, parts = map(int, (sys.argv[2] if len(sys.argv) > 2 else "0/1").split("/"))
        record(part, parts)
