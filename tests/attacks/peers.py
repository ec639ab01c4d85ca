"""holdfast's attacks beside foolbox's: which is held against which, at which settings, and one judge of both.

The bench and test_peers.py share it. Both sides get the same steps and step sizes where the attack has them; a point
counts where it lies in the threat and the network, asked again, is fooled. foolbox has no L-BFGS, FAB, APGD, margin
decomposition or C&W under linf: these are held against its attacks for the same question. It has nothing like Square,
SPSA or JSMA (its black boxes are decision-based or targeted).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.attacks import ATTACKS
from holdfast.attacks.minimal_norm import distances
from holdfast.losses import negative_log_odds
from holdfast.noise import Noise
from holdfast.outputs import fooled
from holdfast.queries import CountingModel
from holdfast.threat import Threat

BALL = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class Pair:
    """One of ours and one of foolbox's: a key of ATTACKS and a class of foolbox.attacks, each with its settings.

    step: the step over eps, for both; least: go for the class that the network believes least. ``twin``: the same
    attack, so that figures may be asked to agree; otherwise a relative that answers the same question.
    """

    ours: str
    norm: str
    theirs: str
    settings: dict[str, Any] = field(default_factory=dict)
    their_settings: dict[str, Any] = field(default_factory=dict)
    step: float | None = None
    least: bool = False
    twin: bool = True

    @property
    def label(self) -> str:
        """Its name and the settings that its name does not tell."""
        named = ("steps", "stepsize", "initial_stepsize", "max_stepsize", "binary_search_steps")
        kept = [f"{name}={value:g}" for name, value in self.their_settings.items() if name in named]
        return f"{self.theirs.removesuffix('Attack')} {' '.join(kept)}"


def _steps(
    ours: str, theirs: str, norms: tuple[str, ...], steps: int, step: float, *, more: Any = None, **about: Any
) -> list[Pair]:
    """Pairs of attacks that take ``steps`` steps of ``step * eps``; ``{}`` in the name of theirs is the norm."""
    both = {"steps": steps}
    return [
        Pair(ours, norm, theirs.format(BALL[norm]), {**both, **(more or {})}, both, step, **about) for norm in norms
    ]


ALL = ("linf", "l2", "l1")
# At a fixed eps: how many fall.
FIXED: list[Pair] = [
    *(Pair("fgsm", norm, f"{BALL[norm]}FastGradientAttack") for norm in ALL),
    *_steps("bim", "{}BasicIterativeAttack", ALL, 10, 0.2),
    *_steps("pgd", "{}ProjectedGradientDescentAttack", ALL, 40, 2.5 / 40),
    *_steps("pgd", "SparseL1DescentAttack", ("l1",), 40, 2.5 / 40),
    *_steps("mim", "{}MomentumIterativeFastGradientMethod", ALL, 10, 0.2),
    *_steps("least_likely", "{}BasicIterativeAttack", ALL, 10, 0.2, least=True),
    Pair("noise", "linf", "LinfRepeatedAdditiveUniformNoiseAttack", {"steps": 100}, {"repeats": 100}),
    Pair("noise", "l2", "L2RepeatedAdditiveGaussianNoiseAttack", {"steps": 100}, {"repeats": 100}),
    *(
        Pair("apgd", norm, name, {"steps": 40}, {"steps": 40, "rel_stepsize": 2.5 / 40}, twin=False)
        for norm, name in (
            ("linf", "LinfProjectedGradientDescentAttack"),
            ("l2", "L2ProjectedGradientDescentAttack"),
            ("l1", "SparseL1DescentAttack"),
        )
    ),
    *(
        Pair(
            "md",
            norm,
            name,
            {"steps": 20, "restarts": 2},
            {"steps": 40, "rel_stepsize": 2.5 / 40},
            twin=False,
        )
        for norm, name in (
            ("linf", "LinfProjectedGradientDescentAttack"),
            ("l2", "L2ProjectedGradientDescentAttack"),
            ("l1", "SparseL1DescentAttack"),
        )
    ),
]

_DEEPFOOL = {"steps": 50, "overshoot": 0.02}
_CW = {"steps": 100, "binary_search_steps": 6, "stepsize": 0.1}
_CW_AS_PUBLISHED = {**_CW, "stepsize": 0.01, "binary_search_steps": 9}
_EAD = {"steps": 100, "initial_stepsize": 0.1, "decision_rule": "L1"}
_CW_OWN = {"stepsize": 0.01, "binary_search_steps": 9}  # its defaults
_EAD = {"steps": 100, "initial_stepsize": 0.1, "decision_rule": "L1"}
_FMN = {"steps": 100, "gamma": 0.05}
# The smallest perturbation: how small. foolbox's steps of C&W and FMN are in pixels, ours have no unit.
LEAST: list[Pair] = [
    Pair("deepfool", "linf", "LinfDeepFoolAttack", {**_DEEPFOOL, "classes": 9}, {**_DEEPFOOL, "candidates": 10}),
    Pair("deepfool", "l2", "L2DeepFoolAttack", {**_DEEPFOOL, "classes": 9}, {**_DEEPFOOL, "candidates": 10}),
    Pair("fmn", "linf", "LInfFMNAttack", {"steps": 100}, _FMN),
    Pair("fmn", "linf", "LInfFMNAttack", {"steps": 100}, {**_FMN, "max_stepsize": 10.0}),
    Pair("fmn", "l2", "L2FMNAttack", {"steps": 100}, _FMN),
    Pair("fmn", "l2", "DDNAttack", {"steps": 100}, {"steps": 100}, twin=False),
    Pair("fmn", "l1", "L1FMNAttack", {"steps": 100}, _FMN),
    Pair("fmn", "l1", "EADAttack", {"steps": 100}, _EAD, twin=False),
    Pair("cw", "l2", "L2CarliniWagnerAttack", {"steps": 100, "searches": 6}, _CW),
    Pair("cw", "l2", "L2CarliniWagnerAttack", {"steps": 100, "searches": 9}, _CW_AS_PUBLISHED),
    Pair("cw", "l2", "DDNAttack", {"steps": 100, "searches": 6}, {"steps": 600}, twin=False),
    Pair("cw", "linf", "LInfFMNAttack", {"steps": 100, "searches": 6}, {**_FMN, "steps": 600}, twin=False),
    Pair("lbfgs", "l2", "L2CarliniWagnerAttack", {"steps": 20, "searches": 8}, _CW, twin=False),
    Pair("lbfgs", "l2", "L2FMNAttack", {"steps": 20, "searches": 8}, {**_FMN, "steps": 160}, twin=False),
    Pair("fab", "linf", "LInfFMNAttack", {"steps": 40, "targets": 9}, {**_FMN, "steps": 360}, twin=False),
    Pair("fab", "l2", "DDNAttack", {"steps": 40, "targets": 9}, {"steps": 360}, twin=False),
    Pair("fab", "l1", "L1FMNAttack", {"steps": 40, "targets": 9}, {**_FMN, "steps": 360}, twin=False),
]  # fmt: skip


class Network(nn.Module):
    """A network that answers logits alone and counts what it is asked: what foolbox takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.counted = CountingModel(model)

    def forward(self, x: Tensor) -> Tensor:
        return self.counted(x).logits


@dataclass(frozen=True)
class Run:
    """What one side did. size: of each sample's perturbation, infinite where the point does not fool; broken: which
    samples fall within the threat; forwards, backwards: passes, in samples."""

    size: Tensor
    broken: Tensor
    forwards: int
    backwards: int
    seconds: float

    @property
    def median(self) -> float:
        return float(self.size.double().quantile(0.5, interpolation="higher"))


def widest(norm: str, x: Tensor) -> Threat:
    """The threat that holds any image of this shape."""
    dim = x[0].numel()
    return Threat(norm, {"linf": 1.0, "l2": math.sqrt(dim), "l1": float(dim)}[norm])


def judge(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """(sizes, whether each falls within the threat): the network is asked again, whatever the attack says."""
    with torch.no_grad():
        hit = fooled(Network(model)(x_adv), y)
    size = torch.where(hit, distances(x_adv, x, threat.norm), math.inf)
    return size, hit & (threat.violation(x_adv, x) == 0)


@contextmanager
def _watch(model: nn.Module) -> Iterator[tuple[Network, list[float]]]:
    network, seconds = Network(model).eval(), [time.perf_counter()]
    yield network, seconds
    seconds[0] = time.perf_counter() - seconds[0]


def _least_likely(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return Network(model)(x).scatter(1, y[:, None], math.inf).argmin(1)


def run_ours(pair: Pair, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int = 0) -> Run:
    """holdfast's side. The score is ``gap``, whose gradient has the direction of cross-entropy's."""
    settings = dict(pair.settings)
    if pair.step is not None:
        settings["step_size"] = pair.step * threat.eps
    noise = Noise(seed, torch.arange(len(x)))
    with _watch(model) as (network, seconds):
        x_adv = ATTACKS[pair.ours].attack(network, x, y, threat, score=negative_log_odds, noise=noise, **settings)
    size, broken = judge(model, x, y, x_adv, threat)
    return Run(size, broken, network.counted.forwards, network.counted.backwards, seconds[0])


def run_theirs(pair: Pair, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int = 0) -> Run:
    """foolbox's side. Attacks that look for the smallest perturbation are not given eps."""
    import foolbox

    settings = dict(pair.their_settings)
    if pair.step is not None:
        settings["abs_stepsize"] = pair.step * threat.eps
    attack = getattr(foolbox.attacks, pair.theirs)(**settings)
    aim = foolbox.criteria.Misclassification(y)
    if pair.least:
        aim = foolbox.criteria.TargetedMisclassification(_least_likely(model, x, y))
    fixed = isinstance(attack, foolbox.attacks.base.FixedEpsilonAttack)
    with torch.random.fork_rng(), _watch(model) as (network, seconds):
        torch.manual_seed(seed)
        asked = foolbox.PyTorchModel(network, bounds=(threat.lo, threat.hi), device=x.device)
        _, x_adv, _ = attack(asked, x, aim, epsilons=threat.eps if fixed else None)
    size, broken = judge(model, x, y, x_adv, threat)
    return Run(size, broken, network.counted.forwards, network.counted.backwards, seconds[0])
