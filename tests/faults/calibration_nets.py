"""The networks that the trust checks are calibrated on: honest ones set thresholds, others count false alarms.

Each network is a run folder under out/calibration/, so a build that was stopped goes on, and a finished one is loaded.
``python tests/faults/calibration_nets.py`` builds them all: digits, moons, and MNIST where HOLDFAST_MNIST names
its parquet folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import progress as bars
from torch import nn

from holdfast.data import Split
from holdfast.experiments.config import Comparison, Job
from holdfast.experiments.recipes import fit_for
from holdfast.experiments.training import train_network
from holdfast.losses import Loss
from holdfast.progress import Progress, silent
from holdfast.threat import Threat
from holdfast.train import FitConfig

FOLDER = Path(__file__).resolve().parents[2] / "out" / "calibration"
MNIST = "HOLDFAST_MNIST"  # the environment variable with the path of MNIST's parquet folder
ROLES = ("threshold", "heldout", "faulty")
S = (0, 3, 10, 30, 100, 300)  # of I-SCE: faulty by training, and its severity is s


@dataclass(frozen=True)
class Plan:
    """A network to train. name: its folder; threat: what it is attacked under, and trained against where at is set;
    loss: a spec; at: adversarial training; model: a key of MODELS, "" for the size's own; role: one of ROLES."""

    name: str
    role: str
    seed: int
    loss: str = "sce"
    threat: str = "linf:0.1"
    at: bool = False
    model: str = ""
    weight_decay: float = 0.0

    @property
    def honest(self) -> bool:
        """Whether no check may fire on it: all but I-SCE, whose s = 0 is plain SCE."""
        return self.role != "faulty" or self.loss == "isce:s=0"


@dataclass(frozen=True)
class Net:
    """A trained network, the data it was cut from, the threat it is judged under, and the loss it was trained with."""

    name: str
    model: nn.Module
    split: Split
    threat: Threat
    loss: Loss
    honest: bool
    role: str


def families(role: str, seed: int) -> list[Plan]:
    """The four honest families at one seed: SCE, SCE with weight decay, adversarial training at two sizes."""
    return [
        Plan(f"sce-seed{seed}", role, seed),
        Plan(f"sce-decay-seed{seed}", role, seed, weight_decay=1e-3),
        Plan(f"at0.05-seed{seed}", role, seed, threat="linf:0.05", at=True),
        Plan(f"at0.1-seed{seed}", role, seed, at=True),
    ]


def digits() -> list[Plan]:
    """8 networks that set thresholds, 23 held out, 6 of I-SCE: fold 0 of the digits."""
    others = [
        plan
        for seed in (2, 3)
        for plan in (
            Plan(f"at0.15-seed{seed}", "heldout", seed, threat="linf:0.15", at=True),
            Plan(f"mlp-seed{seed}", "heldout", seed, threat="linf:0.05", model="mlp"),
            Plan(f"linear-seed{seed}", "heldout", seed, threat="linf:0.05", model="linear"),
            Plan(f"smoothing-seed{seed}", "heldout", seed, loss="sce:smoothing=0.1"),
            Plan(f"center-seed{seed}", "heldout", seed, loss="center"),
        )
    ]
    cosface = Plan("cosface-seed2", "heldout", 2, loss="cosface:m=0.2,scale=15")
    faulty = [Plan(f"isce-s{s}", "faulty", 0, loss=f"isce:s={s}") for s in S]
    honest = [plan for seed in (0, 1) for plan in families("threshold", seed)]
    honest += [plan for seed in (2, 3, 4) for plan in families("heldout", seed)]
    return [*honest, *others, cosface, *faulty]


def mnist() -> list[Plan]:
    """5 networks at 2 seeds. The honest ones are all held out: thresholds are set on the digits alone.

    Adversarial training from scratch at eps 0.2 stays at chance for as long as this.
    """
    return [
        plan
        for seed in (0, 1)
        for plan in (
            Plan(f"sce-seed{seed}", "heldout", seed),
            Plan(f"at0.1-seed{seed}", "heldout", seed, at=True),
            Plan(f"at0.15-seed{seed}", "heldout", seed, threat="linf:0.15", at=True),
            Plan(f"isce-s10-seed{seed}", "faulty", seed, loss="isce:s=10"),
            Plan(f"isce-s100-seed{seed}", "faulty", seed, loss="isce:s=100"),
        )
    ]


def moons() -> list[Plan]:
    """Networks of two pixels at 2 seeds, all held out: a threat of few pixels is another geometry."""
    return [
        plan
        for seed in (0, 1)
        for plan in (
            Plan(f"sce-seed{seed}", "heldout", seed, threat="linf:0.05", model="mlp"),
            Plan(f"at0.05-seed{seed}", "heldout", seed, threat="linf:0.05", at=True, model="mlp"),
            Plan(f"at0.1-seed{seed}", "heldout", seed, at=True, model="mlp"),
        )
    ]


PLANS = {"digits": digits, "moons": moons, "mnist": mnist}


def job(plan: Plan, data: str = "digits") -> Job:
    """How holdfast's own training is asked for the network. Raises KeyError for MNIST without HOLDFAST_MNIST."""
    small = data != "mnist"
    fit = fit_for(data) if small else FitConfig(epochs=5, batch_size=32, lr=2e-3)
    comparison = Comparison(
        data=data if small else os.environ[MNIST],
        losses=(plan.loss,),
        threat=plan.threat,
        objective="adversarial:steps=10" if plan.at else "standard",
        model=plan.model or ("smallconv" if small else "convnet"),
        limit_train=0 if small else 5000,
        fit=replace(fit, weight_decay=plan.weight_decay),
    )
    checked = comparison.checked()
    return Job(checked, checked.loss_specs[0], plan.seed, 0, FOLDER / data / plan.name)


def network(plan: Plan, data: str = "digits", progress: Progress = silent) -> Net:
    """Train the network, or load it if that is done."""
    wanted = job(plan, data)
    model, _, split = train_network(wanted, progress=progress)
    return Net(plan.name, model.eval(), split, Threat.parse(plan.threat), wanted.loss.loss, plan.honest, plan.role)


def networks(kind: str, data: str = "digits") -> list[Net]:
    """The networks of a kind: "threshold", "heldout", "faulty", or "all". data: a key of PLANS."""
    if kind not in (*ROLES, "all"):
        raise ValueError(f"kind must be one of {', '.join(ROLES)} or all, got {kind!r}.")
    return [network(plan, data) for plan in PLANS[data]() if kind in ("all", plan.role)]


def main() -> None:
    """Build every network that is not there yet."""
    torch.set_num_threads(1)
    todo = [(data, plan) for data in PLANS if data != "mnist" or MNIST in os.environ for plan in PLANS[data]()]
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns) as progress:
        whole = progress.add_task("networks", total=len(todo))
        one = progress.add_task("epochs", total=1)
        for data, plan in todo:
            progress.reset(one, description=f"{data} {plan.name}")

            def report(what: str, done: int, total: int) -> None:
                progress.update(one, completed=done, total=total)

            network(plan, data, report)
            progress.advance(whole)


if __name__ == "__main__":
    main()
