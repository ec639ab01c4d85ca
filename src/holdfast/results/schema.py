"""The data model of an evaluation's results: frozen dataclasses of numbers and text, without tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, unknown
from ..user_input import eps_text
from .region import Passes, Projection, RegionMeasures
from .remaining import Remaining

SCHEMA = 6
OLDEST = 4  # of the schemas that are read: what a file of it lacks is optional
PROOF_METHODS = ("interval", "lipschitz", "linear", "crown", "alpha", "branch")  # in the order they are tried in
CLOPPER_PEARSON = "95% Clopper-Pearson interval over samples"


@dataclass(frozen=True)
class Interval:
    """A proportion and its interval, ``0 <= low <= value <= high <= 1``.

    Attributes:
        value: the proportion.
        low: lower end of the 95% interval.
        high: upper end of the 95% interval.

    Raises:
        UserError: the three numbers are not in this order, or outside [0, 1].
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.value <= self.high <= 1:
            raise UserError(
                f"Interval expects 0 <= low <= value <= high <= 1, got {self.low}, {self.value}, {self.high}."
            )


@dataclass(frozen=True)
class Verdict:
    """How far a claimed accuracy can be trusted.

    Attributes:
        status: "exact", "tight", "loose", "refuted" or "void".
        why: the reason in one phrase.
    """

    status: str
    why: str = ""


@dataclass(frozen=True)
class Finding:
    """The outcome of a trust check.

    Attributes:
        name: a sentence that is true of a sound evaluation.
        status: "holds", "fires" or "not run".
        k: number of samples that violate it.
        n: number of samples examined.
        threshold: the check fires if the share of violations is significantly above it (99% confidence).
        why: the observation, or what the check lacked.
        void: whether the evaluation is invalid if the check fires.
        claims: the figures that it applies to: "pgd50", "robust".
        source: who proposed the check.
        vacuous: whether even a proof says nothing of robustness if the check fires.
    """

    name: str
    status: str
    k: int
    n: int
    threshold: float
    why: str
    void: bool
    claims: tuple[str, ...]
    source: str
    vacuous: bool = False

    @property
    def fires(self) -> bool:
        """Whether the fault was found."""
        return self.status == "fires"


@dataclass(frozen=True)
class CheckResult(Finding):
    """A finding as results.json stores it, with what follows from its counts and its name.

    Attributes:
        value: k / n; None if the check did not run.
        low: 99% lower confidence bound of the share; None if the check did not run.
        track_record: how the check did on networks of known quality, in one sentence.
    """

    value: float | None = None
    low: float | None = None
    track_record: str = ""


@dataclass(frozen=True)
class Samples:
    """Per-sample columns of equal length. Any sequence is accepted (arrays and tensors too) and stored as a tuple.

    Attributes:
        index: position in the data set.
        y: label.
        prediction: class predicted for the clean image.
        clean: 1 if the clean image is classified correctly.
        pgd50: 1 if still correct under PGD-50; None where PGD-50 was not asked; None (no column) where it was left out.
        robust: 1 if no attack broke the sample.
        stage: index of the stage that broke the sample; -1: none did; -2: misclassified without an attack.
        margin: logit_y - max_{j != y} logit_j of the clean image, rounded to 4 decimals; None where not finite.
        margin_adv: the smallest margin found by any attack, likewise.
        certified: 1 if proved to be correct on the whole threat; None (no column) where no bound is known.
        prediction_adv: class predicted for the most adversarial image found; None (no column) where not recorded.
        proved_by: the method that proved the sample, of PROOF_METHODS; "" where none did; None (no column) where that
            was not recorded, or no bound is known.

    Raises:
        UserError: the columns differ in length, or ``proved_by`` names no method.

    >>> Samples([7], [3], [3], [True], [1], [0], [0], [1.23456], [float("nan")]).margin
    (1.2346,)
    """

    index: tuple[int, ...]
    y: tuple[int, ...]
    prediction: tuple[int, ...]
    clean: tuple[int, ...]
    pgd50: tuple[int | None, ...] | None
    robust: tuple[int, ...]
    stage: tuple[int, ...]
    margin: tuple[float | None, ...]
    margin_adv: tuple[float | None, ...]
    certified: tuple[int, ...] | None = None
    prediction_adv: tuple[int, ...] | None = None
    proved_by: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            column = getattr(self, f.name)
            if column is None and (f.default is None or f.name == "pgd50"):
                continue
            column = column.tolist() if hasattr(column, "tolist") else column
            plain: tuple[int | float | str | None, ...]
            if f.name == "proved_by":
                plain = tuple(map(str, column))
                if other := [name for name in plain if name not in ("", *PROOF_METHODS)]:
                    raise unknown("method of proof in the column 'proved_by'", str(other[0]), PROOF_METHODS)
            elif f.name.startswith("margin"):
                plain = tuple(None if v is None or not math.isfinite(v) else round(float(v), 4) for v in column)
            else:
                plain = tuple(None if v is None and f.name == "pgd50" else int(v) for v in column)
            object.__setattr__(self, f.name, plain)
            if len(plain) != len(self.index):
                raise UserError(f"Samples column '{f.name}' has {len(plain)} entries, 'index' has {len(self.index)}.")

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class StageCost:
    """What one stage of the attack cascade did and cost.

    Attributes:
        name: the stage's name.
        attacked: number of samples it attacked.
        broken: number of these it broke.
        forwards: forward passes, summed over its samples.
        backwards: backward passes, summed over its samples.
        seconds: wall-clock time.
    """

    name: str
    attacked: int
    broken: int
    forwards: int
    backwards: int
    seconds: float

    @property
    def passes(self) -> int:
        """Forward and backward passes together."""
        return self.forwards + self.backwards


def total_cost(parts: Sequence[StageCost]) -> StageCost:
    """The cost of one stage in several evaluations, added up.

    Args:
        parts: at least one, of one name.

    Returns:
        The sums, seconds included.

    >>> total_cost([StageCost("pgd50", 9, 2, 450, 450, 1.5), StageCost("pgd50", 7, 1, 350, 350, 1.0)])
    StageCost(name='pgd50', attacked=16, broken=3, forwards=800, backwards=800, seconds=2.5)
    """
    counts = [f.name for f in dataclasses.fields(StageCost) if f.name != "name"]
    return StageCost(parts[0].name, **{name: sum(getattr(part, name) for part in parts) for name in counts})


@dataclass(frozen=True)
class ProofCost:
    """What one method of proof did and cost.

    Attributes:
        method: of PROOF_METHODS.
        tried: number of samples it was tried on.
        proved: number of these it proved.
        seconds: wall-clock time.
        broken: number of these for which it met an adversarial example; branch and bound alone does.
        out_of_time: number of these for which time ran out, which may be decided with more of it.

    Raises:
        UserError: another method.
    """

    method: str
    tried: int
    proved: int
    seconds: float
    broken: int = 0
    out_of_time: int = 0

    def __post_init__(self) -> None:
        if self.method not in PROOF_METHODS:
            raise unknown("method of proof", self.method, PROOF_METHODS)


def total_proofs(parts: Sequence[ProofCost]) -> tuple[ProofCost, ...]:
    """The costs of proofs added up: one entry for each method, in the order they are tried in.

    Args:
        parts: of one or several evaluations.

    Returns:
        The sums.

    >>> total_proofs([ProofCost("linear", 9, 4, 1.5), ProofCost("interval", 9, 0, 0.5), ProofCost("linear", 7, 1, 0.5)])
    ... # doctest: +NORMALIZE_WHITESPACE
    (ProofCost(method='interval', tried=9, proved=0, seconds=0.5, broken=0, out_of_time=0),
     ProofCost(method='linear', tried=16, proved=5, seconds=2.0, broken=0, out_of_time=0))
    """
    counts = [f.name for f in dataclasses.fields(ProofCost) if f.name != "method"]
    groups = [[part for part in parts if part.method == method] for method in PROOF_METHODS]
    return tuple(
        ProofCost(group[0].method, **{name: sum(getattr(part, name) for part in group) for name in counts})
        for group in groups
        if group
    )


@dataclass(frozen=True)
class Cost(Passes):
    """What an evaluation cost: the passes of all its stages, and their time.

    Attributes:
        seconds: wall-clock time.
    """

    seconds: float


@dataclass(frozen=True)
class CleanMeasures:
    """Measures at the clean image, over at most 512 correctly classified samples.

    Attributes:
        zero_gradient: share of samples whose input gradient of F.cross_entropy is exactly zero.
        zero_gradient_training_loss: the same for the training loss.
        input_margin: median first-order distance to the decision boundary in the threat's norm; None where infinite.
    """

    zero_gradient: float | None
    zero_gradient_training_loss: float | None
    input_margin: float | None


@dataclass(frozen=True)
class Training:
    """How a network was trained; None where that is not known, as for one that holdfast did not train.

    Attributes:
        epochs: epochs trained.
        accuracy: on the training images, the mean over networks.
        val: on the validation images, the mean over networks.
        best_epoch: the epoch with the best (robust) validation accuracy, counted from 1.
        seconds: of all networks together.
        model: the spec of the network.
        networks: how many networks share the run, one per fold of a cross-validation.
    """

    epochs: int | None = None
    accuracy: float | None = None
    val: float | None = None
    best_epoch: int | None = None
    seconds: float | None = None
    model: str | None = None
    networks: int = 1


@dataclass(frozen=True)
class Example:
    """One broken sample as three pictures.

    Attributes:
        index: position in the data set.
        y: label.
        prediction: class predicted for the clean image.
        prediction_adv: class predicted for the adversarial image.
        x_png: the clean image, PNG in base64.
        x_adv_png: the adversarial image, PNG in base64.
        delta_png: the perturbation, scaled to be visible, PNG in base64.
    """

    index: int
    y: int
    prediction: int
    prediction_adv: int
    x_png: str
    x_adv_png: str
    delta_png: str


@dataclass(frozen=True)
class Run:
    """One trained model, one threat, one evaluation.

    Attributes:
        name: tells runs apart.
        loss: the loss spec as given, such as "isce:s=100".
        seed: training seed; None where unknown.
        threat: {"norm", "eps", "lo", "hi"}; for corruptions, rotations, translations and patches the norm is their
            name, eps the severity, degrees, pixels or area, and "text" says all of it.
        n: number of samples.
        clean: clean accuracy.
        attacks: attack name -> accuracy under that attack alone. Has "pgd50" unless it was left out.
        robust: share that survived every attack, an upper bound of robust accuracy. None when the verdict is void.
        certified: share proved correct on the whole threat, a lower bound. None where no bound is known, and when void.
        verdict: verdict on ``robust``; None without an audit.
        pgd50_verdict: verdict on the PGD-50 accuracy; None without an audit.
        pgd50_n: number of samples that PGD-50 was run on and its accuracy is a share of; None where these are all.
        checks: the trust checks; empty without an audit.
        remaining: how many survivors may still be breakable; None without an audit.
        measures: gradients and distances at the clean image; None without an audit, and where no sample is correct.
        cost: of all stages together; None where it was not recorded.
        stages: the attack cascade in order.
        proofs: what each method of proof did and cost; empty where no bound is known, or this was not recorded.
        samples: per-sample columns.
        examples: pictures of broken samples.
        train: how the network was trained; None where that was not recorded.
        interval: which interval the accuracies carry.
        region: measures of the inference region, the mean over folds where there are several; None where not measured.
        projection: features in two dimensions, for the figure; of the first fold.

    Raises:
        UserError: ``n`` < 1, ``pgd50_n`` is not 1 to ``n``, ``threat`` lacks a key or is none, or ``samples`` has
            another length than ``n``.
    """

    name: str
    loss: str
    seed: int | None
    threat: dict[str, Any]
    n: int
    clean: Interval
    attacks: dict[str, Interval]
    robust: Interval | None
    certified: Interval | None = None
    verdict: Verdict | None = None
    pgd50_verdict: Verdict | None = None
    pgd50_n: int | None = None
    checks: tuple[CheckResult, ...] = ()
    remaining: Remaining | None = None
    measures: CleanMeasures | None = None
    cost: Cost | None = None
    stages: tuple[StageCost, ...] = ()
    proofs: tuple[ProofCost, ...] = ()
    samples: Samples | None = None
    examples: tuple[Example, ...] = ()
    train: Training | None = None
    interval: str = CLOPPER_PEARSON
    region: RegionMeasures | None = None
    projection: Projection | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checks", tuple(self.checks))
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "proofs", tuple(self.proofs))
        object.__setattr__(self, "examples", tuple(self.examples))
        if self.pgd50_n is not None and not 1 <= self.pgd50_n <= self.n:
            raise UserError(f"Run '{self.name}': pgd50_n must be 1 to {self.n} samples, got {self.pgd50_n}.")
        for key in ("norm", "eps", "lo", "hi"):
            if key not in self.threat:
                raise UserError(f"Run '{self.name}': threat needs norm, eps, lo and hi; '{key}' is missing.")
        numbers = [self.threat[key] for key in ("lo", "hi", "eps")]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in numbers):
            raise UserError(f"Run '{self.name}': eps, lo and hi of the threat must be finite numbers, got {numbers}.")
        if not isinstance(self.threat["norm"], str) or not numbers[0] < numbers[1] or not numbers[2] > 0:
            raise UserError(f"Run '{self.name}': a threat is a norm, eps > 0 and lo < hi, got {self.threat}.")
        if self.n < 1:
            raise UserError(f"Run '{self.name}': n must be >= 1 samples, got {self.n}.")
        if self.samples is not None and len(self.samples) != self.n:
            raise UserError(f"Run '{self.name}': n is {self.n} but samples has {len(self.samples)} entries.")

    @property
    def pgd50(self) -> Interval | None:
        """Accuracy under PGD-50: cross-entropy, 50 steps, one start, the last iterate. None where it was left out."""
        return self.attacks.get("pgd50")

    @property
    def between(self) -> int | None:
        """Samples that are neither broken nor proved; None where no bound is known, without columns, and when void."""
        if self.robust is None or self.samples is None or self.samples.certified is None:
            return None
        return sum(r and not c for r, c in zip(self.samples.robust, self.samples.certified, strict=True))

    @property
    def threat_text(self) -> str:
        """The threat in words, as :func:`threat_text` writes it."""
        return threat_text(self.threat)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything a report needs: the runs and where they come from.

    Attributes:
        schema: version of the file format.
        runs: one entry per trained model, threat and evaluation.
        data: name, classes (names), n, shape, fingerprint.
        command: the command that made the results.
        settings: its settings, nested.
        environment: versions and hardware.
        created: date and time, ISO 8601.
        holdfast: the version that wrote it.
    """

    schema: int = SCHEMA
    runs: tuple[Run, ...]
    data: dict[str, Any]
    command: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    holdfast: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))


def threat_text(threat: dict[str, Any]) -> str:
    """The threat in words.

    Args:
        threat: a dict with "norm" and "eps"; with "text" where that is no norm.

    Returns:
        Norm and eps, eps as a fraction of 255 where it is one and its decimals are long; else the text.

    >>> threat_text({"norm": "linf", "eps": 0.1}), threat_text({"norm": "linf", "eps": 8 / 255})
    ('linf 0.1', 'linf 8/255')
    """
    if isinstance(threat.get("text"), str):
        return threat["text"]
    return f"{threat['norm']} {eps_text(float(threat['eps']))}"
