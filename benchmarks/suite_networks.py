"""The networks that suites are selected on ("choose"), and those that are compared with AutoAttack ("bench").

Each is a run folder under out/suite/: a stopped build resumes, and a finished network is loaded. The roles share no
seed. ``HOLDFAST_MNIST`` and ``HOLDFAST_CIFAR10`` name parquet folders.

    python benchmarks/suite_networks.py [choose | bench] [part/parts]
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from holdfast.data import Split
from holdfast.experiments import loss_spec
from holdfast.experiments.config import Comparison, Job
from holdfast.experiments.recipes import fit_for, override
from holdfast.experiments.training import train_network
from holdfast.losses import Loss
from holdfast.models import Classifier
from holdfast.threat import Threat

FOLDER = Path(__file__).resolve().parent.parent / "out" / "suite"


@dataclass(frozen=True)
class Plan:
    """A network to train and its threats. at: the threat of its adversarial training, "" for standard training."""

    name: str
    role: str
    data: str
    seed: int
    loss: str = "sce"
    at: str = ""
    steps: int = 7
    threats: tuple[str, ...] = ("linf:0.1",)
    epochs: int = 10
    limit_train: int = 18_000
    model: str = ""


@dataclass(frozen=True)
class Net:
    """A trained network, its data, and the loss that it was trained with."""

    plan: Plan
    model: Classifier
    split: Split
    loss: Loss


def _robust(name: str, role: str, data: str, seed: int, at: str, **more: object) -> Plan:
    return Plan(name, role, data, seed, at=at, threats=(at,), **more)


_CIFAR = {"epochs": 10, "limit_train": 10_000, "steps": 4, "model": "preactresnet8"}
PLANS: tuple[Plan, ...] = (
    _robust("mnist-at0.2", "bench", "mnist", 1, "linf:0.2"),
    _robust("mnist-at0.1", "bench", "mnist", 1, "linf:0.1"),
    _robust("mnist-at0.3", "bench", "mnist", 1, "linf:0.3"),
    _robust("mnist-at-l2", "bench", "mnist", 1, "l2:1.5"),
    Plan("cifar-at", "bench", "cifar10", 1, at="linf:8/255", threats=("linf:4/255", "linf:8/255"), **_CIFAR),
    Plan("mnist-sce", "bench", "mnist", 1),
    Plan("mnist-isce100", "bench", "mnist", 1, "isce:s=100"),
    Plan("mnist-mmc", "bench", "mnist", 1, "mmc"),
    Plan("mnist-center", "bench", "mnist", 1, "center"),
    _robust("digits-at0.1-v", "choose", "digits", 7, "linf:0.1", epochs=30),
    Plan("digits-sce-v", "choose", "digits", 7, epochs=30),
    Plan("digits-mmc-v", "choose", "digits", 7, "mmc", epochs=30),
    Plan("digits-isce100-v", "choose", "digits", 7, "isce:s=100", epochs=30),
    _robust("mnist-at0.2-v", "choose", "mnist", 7, "linf:0.2"),
    _robust("mnist-at0.3-v", "choose", "mnist", 7, "linf:0.3"),
    _robust("mnist-at-l2-v", "choose", "mnist", 7, "l2:1.5"),
    Plan("mnist-isce100-v", "choose", "mnist", 7, "isce:s=100"),
    Plan("mnist-mmc-v", "choose", "mnist", 7, "mmc"),
    Plan("cifar-sce-v", "choose", "cifar10", 7, threats=("linf:1/255",), **{**_CIFAR, "epochs": 6}),
    Plan("cifar-at-v", "choose", "cifar10", 7, at="linf:6/255", threats=("linf:6/255",), **{**_CIFAR, "epochs": 6}),
)


def _path(data: str) -> str:
    return os.environ.get(f"HOLDFAST_{data.upper()}", data)


def build(plan: Plan) -> Net:
    """Train the network, or load it if it is finished."""
    data = _path(plan.data)
    fit = override(fit_for(plan.data), epochs=plan.epochs, lr=1e-3 if plan.at and plan.data == "mnist" else None)
    comparison = Comparison(
        data=data,
        losses=(plan.loss,),
        threat=plan.at or plan.threats[0],
        objective=f"adversarial:steps={plan.steps},ramp=0.5" if plan.at else "standard",
        model=plan.model,
        limit_train=plan.limit_train,
        fit=fit,
    ).checked()
    loss = loss_spec.parse(plan.loss)
    model, _, split = train_network(Job(comparison, loss, plan.seed, 0, FOLDER / plan.name))
    return Net(plan, model, split, loss.loss)


def threats(plan: Plan) -> list[Threat]:
    return [Threat.parse(text) for text in plan.threats]


if __name__ == "__main__":
    role = sys.argv[1] if len(sys.argv) > 1 else ""
    part, parts = map(int, (sys.argv[2] if len(sys.argv) > 2 else "0/1").split("/"))
    torch.set_num_threads(1)
    for number, plan in enumerate(plan for plan in PLANS if role in ("", plan.role)):
        if number % parts == part:
            net = build(plan)
            print(plan.name, "is trained", flush=True)
