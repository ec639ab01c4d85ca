"""The cost of the inference region: the feature measures at 10,000 x 512; ``measure`` and ``projection`` on a network.

    python benchmarks/bench_region.py

Goals on 2 cores: all feature measures together under 30 s; ``measure`` on the digits network under 0.5 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from goals import goal
from holdfast import models
from holdfast.data import load, pixels, standardisation
from holdfast.experiments.recipes import fit_for, override
from holdfast.losses import sce
from holdfast.objectives import standard
from holdfast.region import auc, frechet, measure, mmd2, movement, projection, scatter_ratio
from holdfast.threat import Threat
from holdfast.train import fit

SAMPLES, FEATURES, GOAL, NETWORK_GOAL = 10_000, 512, 30.0, 0.5


def timed(name: str, run: Callable[[], object]) -> float:
    """The seconds of one call. Prints them, with the result if that is a number."""
    began = time.perf_counter()
    answer = run()
    seconds = time.perf_counter() - began
    print(f"  {name:<10} {seconds:6.2f} s" + (f"   {answer:.5g}" if isinstance(answer, float) else ""))
    return seconds


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    h = torch.randn(SAMPLES, FEATURES, dtype=torch.float64)
    h_adv, y = h + 0.5 * torch.randn_like(h), torch.arange(SAMPLES) % 10
    print(f"{SAMPLES:,} x {FEATURES} features and as many adversarial ones")
    spent = sum(
        timed(name, run)
        for name, run in {
            "mmd2": lambda: mmd2(h, h_adv),
            "frechet": lambda: frechet(h, h_adv),
            "auc": lambda: auc(h, h_adv),
            "movement": lambda: movement(h, h_adv, y),
            "scatter": lambda: scatter_ratio(h, y),
        }.items()
    )
    print(f"  together   {spent:6.2f} s ({'meets' if spent < GOAL else 'misses'} {GOAL:g})")
    goal("feature measures, 10,000 x 512", spent, GOAL, unit=" s")

    torch.set_num_threads(1)
    split, threat = load("digits"), Threat("linf", 0.1)
    mean, std = standardisation(split.train)
    model = models.build(models.default_model(split.shape), split.shape, len(split.classes), mean=mean, std=std)
    fit(model, split.train, split.val, standard(sce), override(fit_for("digits"), epochs=5), device="cpu")
    x, y = pixels(split.test.x), split.test.y
    x_adv = threat.project(x + 0.05 * torch.randn_like(x).sign(), x)
    print("the digits network, one thread")
    measure(model, x, y, x_adv, threat)
    spent = min(timed("measure", lambda: measure(model, x, y, x_adv, threat, s=3.0)) for _ in range(3))
    timed("projection", lambda: projection(model, x, y, x_adv, s=3.0))
    print(f"  measure    {spent:6.2f} s ({'meets' if spent < NETWORK_GOAL else 'misses'} {NETWORK_GOAL:g})")
    goal("measure on the digits network", spent, NETWORK_GOAL, unit=" s")


if __name__ == "__main__":
    main()
