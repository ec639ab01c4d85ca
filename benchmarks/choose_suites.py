"""Select the stages of a suite from recorded success tables.

    python benchmarks/choose_suites.py record [part/parts]   # what each candidate breaks on the validation networks
    python benchmarks/choose_suites.py choose                # greedy: most new samples per pass, until none is left

For each network and candidate stage, a table holds which survivors of a first sweep the candidate breaks, the smallest
margins it reaches, and its passes. Each candidate has noise of its own, so a cascade of candidates breaks the union of
what they break individually. So the tables give the result of any order without another attack (Liu et al. 2023).
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.attacks import ATTACKS, SCORES, cross_entropy, matched_score
from holdfast.checks.probe import rescaled_cross_entropy
from holdfast.data import pixels
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.losses import negative_margin
from holdfast.noise import Noise
from holdfast.outputs import fooled, frozen_eval
from holdfast.queries import CountingModel, exact_float32
from suite_networks import FOLDER, PLANS, build, threats

TABLES = FOLDER / "tables"
SAMPLES = {"digits": 359, "mnist": 300, "cifar10": 120}


@dataclass(frozen=True)
class Candidate:
    """An attack that a suite may use. rank: it targets the rank-th likeliest wrong class of the clean image."""

    name: str
    attack: str
    score: str = "matched"
    rank: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def candidates() -> list[Candidate]:
    stages = [Candidate("sweep", "apgd", settings={"steps": 10})]
    for copy in ("", "'"):  # the same again, from other random starts
        stages += [
            Candidate(f"{score}{steps}{copy}", "apgd", score, settings={"steps": steps})
            for score in ("matched", "margin", "dlr", "rescaled")
            for steps in (20, 50, 100)
        ]
        stages += [
            Candidate(f"dlr-t{rank}x{steps}{copy}", "apgd", "dlr", rank, {"steps": steps})
            for rank in range(4 if copy else 9)
            for steps in ((20, 50) if copy else (10, 20, 50, 100))
        ]
        stages += [
            Candidate(f"{score}-t{rank}x20{copy}", "apgd", score, rank, {"steps": 20})
            for rank in range(4)
            for score in ("margin", "matched")
        ]
        stages += [
            Candidate(f"md{steps}{copy}", "md", "margin", settings={"steps": steps, "restarts": 2})
            for steps in (20, 40)
        ]
    stages.append(Candidate("fab3x20", "fab", "margin", settings={"steps": 20, "targets": 3}))
    stages.append(Candidate("fmn40", "fmn", "margin", settings={"steps": 40}))
    return stages + [
        Candidate(f"square{steps}", "square", "margin", settings={"steps": steps}) for steps in (50, 200, 1000)
    ]


def record(part: int, parts: int) -> None:
    """Attack the survivors of the sweep with each candidate individually."""
    for plan in [plan for plan in PLANS if plan.role == "choose"][part::parts]:
        for threat in threats(plan):
            path = TABLES / f"{plan.name}-{threat.norm}{threat.eps:.4g}.pt"
            if path.exists():
                continue
            net = build(plan)
            some = net.split.test.take(slice(0, SAMPLES[plan.data]))
            scores = {
                **SCORES,
                "matched": matched_score(net.loss),
                "train_loss": cross_entropy,
                "rescaled": rescaled_cross_entropy,
            }
            began = time.process_time()
            with exact_float32(), frozen_eval(net.model):
                model, x, y = CountingModel(net.model), pixels(some.x), some.y
                clean = torch.cat([model(part).logits for part in x.split(128)])
                ranked = clean.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
                rows = torch.nonzero(clean.argmax(1) == y)[:, 0]
                table: dict[str, Any] = {"n": len(y), "correct": len(rows), "columns": {}}
                for number, one in enumerate(candidates()):
                    if threat.norm not in ATTACKS[one.attack].norms or (one.rank or 0) >= ranked.shape[1] - 1:
                        continue
                    model.forwards = model.backwards = 0
                    target = {} if one.rank is None else {"target": ranked[rows, one.rank]}
                    noise = Noise(0, some.index[rows]).fold(5000 + number)
                    x_adv = ATTACKS[one.attack].attack(
                        model, x[rows], y[rows], threat, score=scores[one.score], noise=noise, **one.settings, **target
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
                f"{path.stem}: {table['n']} samples, {table['correct']} correct, {len(rows)} after the sweep, "
                f"{left} survivors, "
                f"{time.process_time() - began:.0f} s",
                flush=True,
            )


def union(table: dict[str, Any]) -> Tensor:
    return torch.stack([column["broken"] for column in table["columns"].values()]).any(0)


def load() -> dict[str, dict[str, Any]]:
    return {path.stem: torch.load(path, weights_only=True) for path in sorted(TABLES.glob("*.pt"))}


@dataclass
class State:
    """One network in the middle of a cascade."""

    table: dict[str, Any]
    margin: Tensor
    broken: Tensor
    cost: float = 0.0

    def chosen(self, fraction: float, minimum: int = 32) -> Tensor:
        rows = torch.nonzero(~self.broken)[:, 0]
        count = max(math.ceil(fraction * len(rows)), minimum)
        return rows[self.margin[rows].argsort()[:count]]

    def gain(self, name: str, fraction: float) -> tuple[int, float]:
        column = self.table["columns"].get(name)
        if column is None:
            return 0, 0.0
        rows = self.chosen(fraction)
        # Passes of a survivor: broken samples leave the attack, so the table's mean over all samples is a lower bound.
        each = column["passes"] / max(1, len(self.broken))
        return int(column["broken"][rows].sum()), each * len(rows)

    def take(self, name: str, fraction: float) -> None:
        _, cost = self.gain(name, fraction)
        column = self.table["columns"].get(name)
        self.cost += cost
        if column is not None:
            rows = self.chosen(fraction)
            self.margin[rows] = torch.minimum(self.margin[rows], column["margin"][rows])
            self.broken[rows] |= column["broken"][rows]


FRACTIONS = (1.0, 0.5, 0.3, 0.15, 0.08)


def begin(tables: dict[str, dict[str, Any]]) -> list[State]:
    return [
        State(table, table["margin"].clone(), torch.zeros(len(table["rows"]), dtype=torch.bool), float(table["sweep"]))
        for table in tables.values()
    ]


def left(states: list[State]) -> int:
    return sum(int((union(state.table) & ~state.broken).sum()) for state in states)


def choose(tables: dict[str, dict[str, Any]]) -> list[tuple[str, float]]:
    """Greedy: the candidate and fraction with the most new samples per pass, over all networks, until none is left."""
    states, taken = begin(tables), []
    names = list(next(iter(tables.values()))["columns"])
    print(f"after the sweep {left(states)} breakable samples remain on {len(states)} networks")
    while left(states):
        best: tuple[float, str, float] = (0.0, "", 0.0)
        for name in names:
            for fraction in FRACTIONS:
                gains = [state.gain(name, fraction) for state in states]
                new, cost = sum(g for g, _ in gains), sum(c for _, c in gains)
                best = max(best, (new / cost if cost else 0.0, name, fraction))
        if not best[1]:
            break
        before = left(states)
        for state in states:
            state.take(best[1], best[2])
        taken.append(best[1:])
        spent = sum(state.cost for state in states) / sum(state.table["correct"] for state in states)
        print(
            f"{best[1]:16s} nearest {best[2]:4.0%}: {before - left(states):3d} new, {left(states):3d} left, "
            f"{spent:6.0f} passes a sample"
        )
    return taken


def plan(tables: dict[str, dict[str, Any]], cascade: list[tuple[str, float]]) -> None:
    """Print how many breakable samples a cascade misses, network by network."""
    states = begin(tables)
    for name, fraction in cascade:
        for state in states:
            state.take(name, fraction)
    for name, state in zip(tables, states, strict=True):
        breakable, cost = int(union(state.table).sum()), state.cost / state.table["correct"]
        print(f"{name:32s} misses {left([state]):3d} of {breakable:3d}, {cost:6.0f} passes per correct sample")
    print(f"together {left(states)} of {sum(int(union(state.table).sum()) for state in states)}")


def columns_of(stage: Stage) -> list[str]:
    """The columns of a table that correspond to a stage of a suite."""
    steps = stage.settings["steps"]
    if stage.attack == "md":
        return [f"md{steps}"]
    if stage.attack == "square":
        return [f"square{steps}"]
    kind = stage.score
    return [f"{kind}-t{rank}x{steps}" for rank in range(stage.targets)] or [f"{kind}{steps}"]


def cascade_of(suite: str) -> list[tuple[str, float]]:
    """A suite as (column, fraction). Its sweep, its spot check and its second round are not in the tables."""
    stages = [stage for stage in SUITES[suite] if stage.subset in ("survivors", "nearest") and stage.round < 2]
    return [(name, stage.fraction) for stage in stages if stage.name != "sweep" for name in columns_of(stage)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["record"]:
        part, parts = map(int, (sys.argv[2] if len(sys.argv) > 2 else "0/1").split("/"))
        record(part, parts)
    else:
        tables = load()
        choose(tables)
        for suite in ("quick", "standard"):
            print(f"\n{suite}, without its second round and its spot check")
            plan(tables, cascade_of(suite))
