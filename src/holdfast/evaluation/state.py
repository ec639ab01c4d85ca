"""What an evaluation is asked to do (``Task``), and how far it has come (``State``, whose tensors are ``Columns``)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import mapped
from ..attacks import ATTACKS
from ..bounds import ProofCache
from ..data import Data, pixels
from ..errors import UserError, unknown
from ..losses import Loss
from ..noise import EvaluationStream, Noise
from ..outputs import Model
from ..progress import Progress
from ..queries import EOT_SAMPLES, VOTES, Batches, CountingModel, EOTModel
from ..results import PRECISION, ProofCost
from ..threat import Threat
from .budget import Budget
from .evaluation import UNBROKEN, StageCost
from .grid import OnGrid
from .suites import EXTRA_ROUND, Stage, on_grid_too

PROOFS = ("linear", "crown", "alpha", "branch")  # of the methods of ``bounds.certify``, the last one that is tried
BY_BRANCH = -3  # value of ``Columns.broken_by``: branch and bound met an adversarial example
BRANCH = "branch and bound"  # the stage that it is shown as
BY_CANDIDATE = -4  # value of ``Columns.broken_by``: an image that was given did
CANDIDATES = "candidates"  # the stage that it is shown as
MAX_TARGETS = 16  # more than any stage has: places reserved for a stage in ``Columns.done``


def check_proofs(proofs: str, budget: Budget | None) -> None:
    """Raise UserError for a method of proof that there is not, and for branch and bound without a budget of time."""
    if proofs not in PROOFS:
        raise unknown("proofs", str(proofs), PROOFS)
    if proofs == "branch" and (budget is None or budget.seconds == math.inf):
        raise UserError(
            "branch and bound may take hours for one sample: give proofs 'branch' a budget of time, such as --budget "
            '10min, in Python budget=Budget.parse("10min").'
        )


@dataclass(frozen=True)
class Task:
    """What is evaluated and how; the same from beginning to end.

    Args:
        model: counts its passes.
        data: the samples, on the model's device.
        threat: the threat model.
        suite: the stages to run, PGD-50 first.
        attack_names: names of the individual attacks, in the order in which the result lists them.
        scores: score name -> score, as stages name them.
        noise: one stream per sample.
        budget: None for no limit.
        batch_size: how samples are distributed over processes; never changes.
        proofs: the last method of ``bounds.certify`` that is tried on the survivors of the individual attacks.
        precision: share of all samples that may be breakable still; it decides the size of samples.
        pgd50: how many samples PGD-50 attacks; None for all, 0 where it is left out.
        candidates: (N, C, H, W), images that may be adversarial, tried on the survivors; None for none.
        grid: whether the images are 8-bit: candidates are then judged on the 8-bit grid as well.
        cache: what the proofs of this process computed, for the stronger ones.
        batches: the batch size in use, which shrinks where memory runs out.
        progress: see ``evaluate``.
        x_adv_file: where adversarial images go that are not held in memory; None for a temporary file.
    """

    model: CountingModel
    data: Data
    threat: Threat
    suite: tuple[Stage, ...]
    attack_names: tuple[str, ...]
    scores: dict[str, Loss]
    noise: Noise
    budget: Budget | None
    batch_size: int
    batches: Batches
    progress: Progress
    proofs: str = "linear"
    precision: float = PRECISION
    pgd50: int | None = None
    candidates: Tensor | None = None
    grid: bool = False
    cache: ProofCache = field(default_factory=ProofCache)
    x_adv_file: Path | None = None

    @property
    def pgd50_sample(self) -> Tensor | None:
        """(N,) bool: the samples that PGD-50 is asked about, right or wrong, drawn by their own noise; None for all."""
        if self.pgd50 is None or not 0 < self.pgd50 < len(self.data):
            return None
        order = self.noise.fold(EvaluationStream.PGD50_SAMPLE).uniform(()).argsort(stable=True)
        return torch.zeros_like(self.data.y, dtype=torch.bool).index_fill_(0, order[: self.pgd50], True)

    def clean_images(self) -> Tensor:
        """(N, C, H, W): a copy of the images as a model takes them, for ``Columns.x_adv``; mapped where the data is."""
        x = self.data.x
        if not mapped.is_mapped(x):
            return pixels(x).clone()
        copy = mapped.create(self.x_adv_file, x.shape, pixels(x[:1]).dtype)
        for rows in torch.arange(len(x)).split(mapped.rows_at_a_time(copy)):
            mapped.put(copy, rows, pixels(mapped.take(x, rows)), torch.ones_like(rows, dtype=torch.bool))
        return copy

    def placed(self, x_adv: Tensor) -> Tensor:
        """Stored adversarial images as ``Columns`` hold them: in a file where the data is, else on the device."""
        if mapped.is_mapped(x_adv) == mapped.is_mapped(self.data.x):
            return x_adv if mapped.is_mapped(x_adv) else x_adv.to(self.data.y.device)
        if mapped.is_mapped(x_adv):
            return x_adv.to(self.data.y.device, copy=True)
        return mapped.stored(x_adv, self.x_adv_file)

    def stages(self, differs_off_grid: bool) -> tuple[Stage, ...]:
        """The suite's stages, and those on the 8-bit grid for a model that answers otherwise there."""
        return on_grid_too(self.suite) if differs_off_grid else self.suite


@dataclass
class Columns:
    """One entry per sample, (N,) on the model's device unless stated otherwise.

    Args:
        prediction, margin, clean, broken_by, margin_adv, prediction_adv, x_adv, attack_correct, certified,
            proved_by: as in ``Evaluation``.
        targets: (N, T) int64, wrong classes, likeliest first.
        done: int64, position in the sequence of (stage, target) pairs up to which the sample has been attacked.
        chosen: bool, samples of the current stage.
        spot_check: int64, 1 for the nearest samples of the spot check, 2 for its random ones, 0 for all others.
        random_target: int64, a random wrong class; None if no stage uses one.
        tried: int64, how many methods of proof have come to their end, in the order of ``bounds.METHODS``; None where
            no bound is known.
        given: float64, seconds that branch and bound last had for the sample; None where no bound is known.
    """

    prediction: Tensor
    margin: Tensor
    clean: Tensor
    broken_by: Tensor
    margin_adv: Tensor
    prediction_adv: Tensor
    x_adv: Tensor
    targets: Tensor
    done: Tensor
    chosen: Tensor
    spot_check: Tensor
    attack_correct: dict[str, Tensor]
    random_target: Tensor | None = None
    certified: Tensor | None = None
    proved_by: Tensor | None = None
    tried: Tensor | None = None
    given: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """All columns under flat names, as a file stores them."""
        tensors = {f"attack_correct/{name}": correct for name, correct in self.attack_correct.items()}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**tensors, **{name: value for name, value in values.items() if isinstance(value, Tensor)}}

    def expect_proofs(self, known: bool) -> None:
        """Begin the columns of proofs, in which nothing is proved yet; without ``known`` there are none."""
        self.certified = torch.zeros_like(self.clean) if known else None
        self.proved_by = torch.zeros_like(self.done) if known else None
        self.tried = torch.zeros_like(self.done) if known else None
        self.given = torch.zeros_like(self.done, dtype=torch.float64) if known else None

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Columns:
        """The inverse of ``to_tensors``."""
        columns: dict[str, Any] = {"attack_correct": {}}
        for name, tensor in tensors.items():
            kind, _, attack = name.partition("/")
            if attack:
                columns["attack_correct"][attack] = tensor
            else:
                columns[kind] = tensor
        return Columns(**columns)


@dataclass
class State:
    """How far an evaluation has come.

    Args:
        columns: per-sample results.
        costs: of the clean pass, then of each stage.
        stages: the suite's, then those that a larger budget adds.
        channels_last: whether attacks query the model in that memory order.
        randomised: whether the model answers the same image differently.
        differs_off_grid: whether the model answers 8-bit images otherwise than images beside them.
        chosen_for: number of the stage that ``columns.chosen`` belongs to; -1 before the first.
        ended: number of stages that are finished.
        n_rest: survivors outside the nearest ones of the spot check when its random ones were drawn.
        proved: whether the survivors of the individual attacks have had their proofs.
        cut: whether the budget ended these.
        proofs: what each method of proof cost.
        branch: cost of branch and bound.
        given: cost of trying the candidates.
        tried: whether they have been tried.
        branched: whether it has had its share of the budget, in this run.
        until: seconds spent at which the share of the budget of bounds, and then of attacks, ends; infinite at first.
        budget_spent: whether the budget has ended the evaluation.
        settled: whether images in a file are those that the columns are about; not while stages run.
    """

    columns: Columns
    costs: list[StageCost]
    stages: list[Stage]
    channels_last: bool
    randomised: bool
    differs_off_grid: bool = False
    chosen_for: int = -1
    ended: int = 0
    n_rest: int = 0
    proved: bool = False
    cut: bool = False
    proofs: list[ProofCost] = field(default_factory=list)
    branch: StageCost = field(default_factory=lambda: StageCost(BRANCH))
    given: StageCost = field(default_factory=lambda: StageCost(CANDIDATES))
    tried: bool = False
    branched: bool = False
    until: float = math.inf
    budget_spent: bool = field(default=False)
    settled: bool = True

    @property
    def survivors(self) -> Tensor:
        """(N,) bool: correctly classified and not broken so far."""
        return self.columns.broken_by == UNBROKEN

    @property
    def open(self) -> Tensor:
        """(N,) bool: survivors that are not proved. Attacks without an accuracy of their own leave the others."""
        certified = self.columns.certified
        return self.survivors if certified is None else self.survivors & ~certified

    @property
    def n_classes(self) -> int:
        """Number of classes, as far as it matters for the cost of a stage: at most 10."""
        return self.columns.targets.shape[1] + 1

    @property
    def votes(self) -> int:
        """Number of model outputs that decide whether a candidate is misclassified."""
        return VOTES if self.randomised else 1

    @property
    def eot_samples(self) -> int:
        """Number of model outputs averaged for one step of an attack."""
        return EOT_SAMPLES if self.randomised else 1

    def due(self, number: int) -> Tensor:
        """(N,) bool: samples that a stage still has to attack: those chosen for it, unless broken or proved by now."""
        chosen = self.columns.chosen
        return chosen if self.stages[number].individual else chosen & self.open

    def broken_by_stages(self, numbers: list[int]) -> Tensor:
        """(N,) bool: broken by one of these stages."""
        by = self.columns.broken_by
        return torch.isin(by, torch.tensor(numbers).to(by, non_blocking=True))


def add_extra_stages(task: Task, state: State, count: int) -> None:
    """Extend ``state.stages`` to so many: further rounds, for a budget that is larger than the suite needs."""
    extra = [stage for stage in EXTRA_ROUND if task.threat.norm in ATTACKS[stage.attack].norms]
    while len(state.stages) < count:
        turn, place = divmod(len(state.stages) - len(task.stages(state.differs_off_grid)), len(extra))
        state.stages.append(replace(extra[place], name=f"more {turn + 1}: {extra[place].name}"))
    while len(state.costs) < len(state.stages) + 1:
        state.costs.append(StageCost(state.stages[len(state.costs) - 1].name))


def attack_model(model: CountingModel, channels_last: bool, randomised: bool, on_grid: bool = False) -> Model:
    """The model as attacks query it: in its preferred memory order, averaged over outputs if it is randomised."""
    ordered = CountingModel(model.model, model, channels_last=True) if channels_last else model
    averaged = EOTModel(ordered, EOT_SAMPLES) if randomised else ordered
    return OnGrid(averaged) if on_grid else averaged
