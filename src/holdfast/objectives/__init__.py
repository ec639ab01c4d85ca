"""The min-max problem of training: how the attack perturbs x, and which loss the weights minimise.

    min over weights  mean_i loss(model, x_i, perturb(x_i), y_i)

A factory returns a Schedule: progress in [0, 1] -> Objective, so that every ramp is in one place. Each factory takes
any loss, and for I-SCE any source of s (``holdfast.information.sources``). To add an objective: the factory, and a line
in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections.abc import Callable

from .attacked import adversarial, divergence, fast, friendly, mart, mart_terms, standard, trades
from .bounded import interval
from .free import free
from .problem import Objective, Schedule

OBJECTIVES: dict[str, Callable[..., Schedule]] = {
    "standard": standard,
    "adversarial": adversarial,
    "fast": fast,
    "free": free,
    "friendly": friendly,
    "trades": trades,
    "mart": mart,
    "interval": interval,
}

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Schedule",
    "adversarial",
    "divergence",
    "fast",
    "free",
    "friendly",
    "interval",
    "mart",
    "mart_terms",
    "standard",
    "trades",
]
