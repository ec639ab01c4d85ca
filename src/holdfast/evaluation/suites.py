"""Attack suites: which attacks an evaluation runs, in which order and on which samples.

To add a suite, add a line to ``SUITES``. ``evaluate`` also takes a tuple of stages directly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor

from ..attacks import ATTACKS, SCORES, cross_entropy, matched_score
from ..errors import UserError, printable, type_of, unknown
from ..losses import Loss
from ..noise import EvaluationStream
from ..spec import accepts
from ..user_input import check_settings, flag, number, of_type, text, typed, whole

N_NEAREST = 32  # samples that a stage on the nearest attacks at least
# Which samples a stage attacks. A cascade spends its passes on the samples most likely to break; the spot check then
# tests whether that was justified.
SUBSETS: dict[str, str] = {
    "survivors": "all survivors",
    "nearest": f"the fraction of survivors with the smallest margins, at least {N_NEAREST} samples",
    "next": "the nearest fraction; where nothing was broken since the last two stages before the first one on this "
    "subset, without the nearest of the spot check, which get its full-length attacks",
    "sampled": "the spot check: as many survivors as the precision needs, half of them those with the smallest margins "
    f"and half random others; at least {N_NEAREST} nearest where a stage on the next has broken one",
    "escalated": "the nearest fraction if the spot check broke one of its nearest, all survivors if it broke a random "
    "one",
}


# Arguments of every attack that are no settings of a stage: where they come from.
GIVEN = {
    **dict.fromkeys(("model", "x", "y", "threat"), "leave it out"),
    "score": "use score= of the Stage",
    "noise": "use noise_stream= of the Stage, or seed= of evaluate",
    "target": "use target= or targets= of the Stage",
}


@dataclass(frozen=True)
class Stage:
    """One attack of a suite.

    Args:
        name: unique within the suite; shown in tables and stored with the results.
        attack: a key of ATTACKS.
        score: a key of SCORES, or "matched" (the score of the loss the network was trained with), or "train_loss"
            (that loss itself, including its link function).
        targets: 0 for an untargeted attack; t > 0 runs the attack once towards each of the t likeliest wrong classes
            (or towards all wrong classes if there are fewer).
        settings: keyword arguments of the attack.
        step: step size as a multiple of eps; None leaves it to the attack.
        individual: run on every correctly classified sample, not only on survivors. The stage then has its own
            accuracy, stored in ``Evaluation.attack_correct`` under ``name``.
        noise_stream: stages with the same number draw the same noise, for example the same random start; None gives
            the stage a stream of its own.
        subset: a key of SUBSETS: which samples are attacked.
        fraction: for "nearest", "next" and "escalated", the fraction of survivors in (0, 1] that is taken.
        round: a stage of round r > 1 runs only if a stage of round r - 1 broke a sample.
        after: name of a stage or a key of SUBSETS: this one runs only if that stage, or a stage on that subset, broke a
            sample. "" for no condition.
        on_grid: query the model at points rounded to the 8-bit grid; gradients pass through the rounding.
        target: "random" targets one random wrong class per sample, drawn from the sample's own noise, as papers with
            targeted attacks do. Any misclassification counts as a success. "" for no target.

    Raises:
        UserError: for an unknown subset or target, both kinds of target at once, a fraction outside (0, 1], a number of
            another kind or range, or an attack's setting that it does not take.
    """

    name: str
    attack: str
    score: str = "matched"
    targets: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    step: float | None = None
    individual: bool = False
    noise_stream: int | None = None
    subset: str = "survivors"
    fraction: float = 1.0
    round: int = 0
    target: str = ""
    after: str = ""
    on_grid: bool = False

    def __post_init__(self) -> None:
        what = f"stage '{text('the name of a stage', self.name, 200)}'"
        for key, value in (
            ("targets", self.targets),
            ("round", self.round),
        ):
            whole(f"{key} of {what}", value)
        if self.noise_stream is not None:
            whole(f"noise_stream of {what}", self.noise_stream, 0, EvaluationStream.AUDIT - 1)
        number(f"fraction of {what}", self.fraction, 0, 1, above=True)
        if self.step is not None:
            number(f"step of {what}", self.step, 0, above=True)
        for key in ("attack", "subset", "target"):
            of_type(f"{key} of {what}", getattr(self, key), str)
        flag(f"individual of {what}", self.individual)
        if not isinstance(self.settings, dict):
            raise UserError(
                f"settings of {what} must be a dict of the attack's arguments, got {type_of(self.settings)}."
            )
        of_type(f"score of {what}", self.score, str)
        for key in self.settings:
            if not isinstance(key, str):
                raise UserError(f"settings of {what} must have names as keys, got {key!r}.")
            if key in GIVEN:
                raise UserError(f"settings of {what} holds '{key}', which an evaluation gives: {GIVEN[key]}.")
        if self.attack in ATTACKS:  # `resolve` names one that is not
            attack = ATTACKS[self.attack].attack
            required = [name for name, p in inspect.signature(attack).parameters.items() if p.default is p.empty]
            optional = {name: value for name, value in self.settings.items() if name not in required}
            accepts("attack", self.attack, attack, optional)
            check_settings(attack, self.settings)
            for key in ("steps", "restarts", "searches"):
                whole(f"{key} of {what}", self.settings.get(key, 1), 1)
            if self.settings.get("step_size") is not None:
                number(f"step_size of {what}", self.settings["step_size"], 0, above=True)
        if self.subset not in SUBSETS:
            raise unknown("subset of a stage", self.subset, SUBSETS)
        if self.target not in ("", "random"):
            raise unknown("target of a stage", self.target, ["random"])
        if self.target and self.targets:
            raise UserError(
                f"stage '{self.name}': use either target='random' or targets={self.targets} (likeliest), not both."
            )

    def n_targets(self, classes: int) -> int:
        """How many times the attack runs: once per target, at least once."""
        return max(1, min(self.targets, classes - 1))

    def passes(self, classes: int) -> float:
        """Approximate forward and backward passes spent on a sample that the stage does not break."""
        entry = ATTACKS[self.attack]
        settings = {"restarts": 1, "searches": 1, "targets": 1, **_default_settings(entry.attack), **self.settings}
        targets = min(max(self.targets, settings["targets"]), classes - 1)
        return 1 + float(settings["steps"] * settings["restarts"] * settings["searches"] * targets * entry.per_step)

    def keywords(self, eps: float) -> dict[str, Any]:
        """Keyword arguments that the attack is called with under a threat of this eps."""
        return self.settings if self.step is None else {**self.settings, "step_size": self.step * eps}


@cache
def _default_settings(attack: Callable[..., Tensor]) -> dict[str, Any]:
    """Defaults of an attack's keyword arguments; one step for an attack that has none."""
    defaults = {name: p.default for name, p in inspect.signature(attack).parameters.items() if p.default is not p.empty}
    return {"steps": 1, **defaults}


# Robust accuracy as papers usually report it: F.cross_entropy, one random start, 50 PGD steps of eps/4, last iterate.
PGD50 = Stage("pgd50", "pgd", "cross_entropy", settings={"steps": 50, "iterate": "last"}, step=0.25, individual=True)
# The usual adaptive attack: the same steps on the loss that the network was trained with.
PGD50_TRAIN_LOSS = replace(PGD50, name="pgd50-train-loss", score="train_loss")


def resolve(suite: str | Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages of a suite, checked before any work is done.

    Args:
        suite: a key of SUITES, or the stages themselves.

    Returns:
        The stages as given. ``PGD50`` is not added here: see ``with_pgd50``.

    Raises:
        UserError: for an unknown suite, attack or score, for two individual stages of one name, and for an individual
            stage named "pgd50" that is not PGD50.
    """
    stages = SUITES.get(suite) if isinstance(suite, str) else suite
    if stages is None and isinstance(suite, str):
        raise unknown("suite", suite, SUITES)
    if not isinstance(stages, (tuple, list)) or not all(isinstance(stage, Stage) for stage in stages):
        raise UserError(
            f"suite must be one name ({', '.join(SUITES)}) or a tuple of Stages, got {printable(repr(suite), 80)}. "
            "The stages of two suites: (*SUITES['quick'], *SUITES['paranoid'])."
        )
    stages = tuple(stages)
    individual = [stage.name for stage in stages if stage.individual]
    names = [name for stage in stages for name in (stage.name, stage.subset)]
    for stage in stages:
        if stage.after and stage.after not in names:
            raise unknown(f"stage that '{stage.name}' runs after", stage.after, names)
        if stage.attack not in ATTACKS:
            raise unknown("attack", stage.attack, ATTACKS)
        if stage.score not in ("matched", "train_loss", *SCORES):
            raise unknown("score", stage.score, [*SCORES, "matched", "train_loss"])
        if stage.individual and individual.count(stage.name) > 1:
            raise UserError(f"two individual stages are named '{stage.name}': each needs a name of its own.")
        if stage.individual and stage.name == PGD50.name and stage != PGD50:
            raise UserError(f"'{PGD50.name}' is reserved for the standard PGD-50 stage: give this stage another name.")
    return stages


@typed
def with_pgd50(stages: Sequence[Stage], leave_out: bool = False) -> tuple[Stage, ...]:
    """The stages as they are run: PGD50 first, and only once if the suite lists it too; or without it.

    >>> [stage.name for stage in with_pgd50([PGD50_TRAIN_LOSS, PGD50])]
    ['pgd50', 'pgd50-train-loss']
    """
    return (*(() if leave_out else (PGD50,)), *(stage for stage in stages if stage != PGD50))


def on_grid_too(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages, then all but the individual ones again on the 8-bit grid: for models that answer otherwise there.

    >>> [stage.name for stage in on_grid_too([PGD50, Stage("sweep", "apgd")])]
    ['pgd50', 'sweep', 'grid: sweep']
    """
    names = {stage.name: f"grid: {stage.name}" for stage in stages if not stage.individual}
    again = (
        replace(stage, name=names[stage.name], after=names.get(stage.after, stage.after), on_grid=True)
        for stage in stages
        if stage.name in names
    )
    return (*stages, *again)


@typed
def individual_names(stages: Sequence[Stage], leave_out: bool = False) -> list[str]:
    """Names of the attacks with an accuracy of their own, in the suite's order; "pgd50" first unless it is listed.

    With ``leave_out`` there is no "pgd50".

    >>> individual_names([PGD50_TRAIN_LOSS]), individual_names([PGD50_TRAIN_LOSS, PGD50])
    (['pgd50', 'pgd50-train-loss'], ['pgd50-train-loss', 'pgd50'])
    """
    names = [stage.name for stage in stages if stage.individual]
    if leave_out:
        return [name for name in names if name != PGD50.name]
    return names if PGD50.name in names else [PGD50.name, *names]


def stage_scores(trained_with: Loss | None) -> dict[str, Loss]:
    """What each score name means for a network trained with this loss (None: cross-entropy)."""
    return {**SCORES, "matched": matched_score(trained_with), "train_loss": trained_with or cross_entropy}


def _round(number: int) -> tuple[Stage, ...]:
    """Long attacks of four kinds on the survivors with the smallest margins.

    The first one attacks the nearest of the spot check too. If it breaks one, the others do so as well.
    """
    part: dict[str, Any] = {"fraction": 0.15, "round": number}
    long = Stage(f"round {number}: long", "apgd", settings={"steps": 100}, subset="nearest", **part)
    part["subset"] = "next"
    return (
        long if number == 1 else replace(long, subset="next"),
        Stage(f"round {number}: dlr", "apgd", "dlr", settings={"steps": 50}, **part),
        Stage(f"round {number}: targets", "apgd", "dlr", targets=4, settings={"steps": 50}, **part),
        Stage(f"round {number}: md", "md", settings={"steps": 40}, **part),
        Stage(f"round {number}: md targets", "md", targets=9, settings={"steps": 10}, **part),
    )


def _full_length(subset: str, queries: int) -> tuple[Stage, ...]:
    """Attacks with as many passes as AutoAttack's, and a black-box attack that detects masked gradients."""
    return (
        Stage(f"{subset}: long", "apgd", settings={"steps": 100}, subset=subset, fraction=0.3),
        Stage(f"{subset}: all targets", "apgd", "dlr", targets=9, settings={"steps": 80}, subset=subset, fraction=0.3),
        Stage(f"{subset}: md", "md", targets=9, settings={"steps": 10}, subset=subset, fraction=0.3),
        Stage(f"{subset}: square", "square", "margin", settings={"steps": queries}, subset=subset, fraction=0.3),
    )


# Stages were chosen on validation networks by what each attack breaks (benchmarks/choose_suites.py). Short attacks find
# nearly all adversarial examples, the samples they miss have small margins, and the spot check tests that assumption.
# What a budget is spent on after the suite: the smallest margins, with other scores, more targets and new starts.
EXTRA_ROUND = (
    Stage("long", "apgd", settings={"steps": 100}, subset="nearest", fraction=0.3),
    Stage("targets", "apgd", "dlr", targets=4, settings={"steps": 50}, subset="nearest", fraction=0.3),
    Stage("md", "md", settings={"steps": 40}, subset="nearest", fraction=0.3),
    Stage("square", "square", "margin", settings={"steps": 200}, subset="nearest", fraction=0.1),
)

SUITES: dict[str, tuple[Stage, ...]] = {
    "quick": (
        Stage("sweep", "apgd", settings={"steps": 10}),
        Stage("targets", "apgd", "dlr", targets=3, settings={"steps": 10}, subset="nearest", fraction=0.5),
        Stage("longer", "apgd", settings={"steps": 50}, subset="nearest", fraction=0.15),
        Stage("md", "md", settings={"steps": 10}, subset="nearest", fraction=0.3),
    ),
    "standard": (
        Stage("sweep", "apgd", settings={"steps": 10}),
        Stage("targets", "apgd", "dlr", targets=3, settings={"steps": 10}),
        Stage("relaxed ball", "cr", settings={"steps": 45}, subset="nearest", fraction=0.5),
        Stage("margin", "apgd", "margin", settings={"steps": 20}, subset="nearest", fraction=0.5),
        Stage("all targets", "apgd", "dlr", targets=9, settings={"steps": 20}, subset="nearest", fraction=0.3),
        *_round(1),
        *_round(2),
        # Where md still finds what the others missed, as on networks trained by squared error, margins say little about
        # which samples will break: every survivor gets a long one.
        Stage("md on all", "md", settings={"steps": 40, "restarts": 4}, after="round 1: md"),
        Stage("md targets on all", "md", targets=9, settings={"steps": 20}, after="round 1: md targets"),
        *_full_length("sampled", 200),
        *_full_length("escalated", 1000),
        Stage("md targets again", "md", targets=9, settings={"steps": 20}, after="sampled: md"),
        Stage("md again", "md", settings={"steps": 40, "restarts": 4}, after="sampled"),
    ),
    "paranoid": (
        Stage("long", "apgd", settings={"steps": 100}),
        Stage("cross entropy", "apgd", "cross_entropy", settings={"steps": 100}),
        Stage("dlr", "apgd", "dlr", settings={"steps": 100}),
        Stage("all targets", "apgd", "dlr", targets=9, settings={"steps": 100}),
        Stage("md", "md", settings={"steps": 100}),
        Stage("fab", "fab", "margin", settings={"steps": 100, "targets": 9}),
        Stage("square", "square", "margin", settings={"steps": 5000}),
    ),
}
SUITES["standard+loss"] = (PGD50_TRAIN_LOSS, *SUITES["standard"])
# The columns of the papers' tables, each attack on all correctly classified samples, then the standard suite. All of
# them use PGD-50's random start (stream 0 is that of stage 0). C&W is as long as needed: more steps find no more.
_PGD10 = replace(PGD50, name="pgd10", settings={**PGD50.settings, "steps": 10}, noise_stream=0)
SUITES["per-attack"] = (
    _PGD10,
    replace(_PGD10, name="pgd10-targeted", target="random"),
    PGD50,
    replace(PGD50, name="pgd50-targeted", target="random", noise_stream=0),
    Stage("cw", "cw", "margin", settings={"steps": 50, "searches": 4}, individual=True),
    *SUITES["standard"],
)
# The attack of the public code of I-SCE, which calls its step size eps: here projected into the ball that it is quoted
# for. Without the projection it is no attack under a threat, and no stage: see experiments.as_coded.
_AS_CODED = Stage("as-coded-5", "as_coded", "train_loss", settings={"steps": 5}, step=1.0, individual=True)
SUITES["as-coded"] = (
    _AS_CODED,
    replace(_AS_CODED, name="as-coded-50", settings={"steps": 50}),
    PGD50,
    PGD50_TRAIN_LOSS,
    replace(PGD50, name="pgd50-matched", score="matched"),
    *SUITES["standard"],
)
# The suite of `holdfast explain`: PGD-50 with one change at a time. Stages keep PGD-50's random start until restarts
# are what changes; otherwise every change would also be one more restart.
_LONG: dict[str, Any] = {"settings": {"steps": 200}, "step": 0.1}
SUITES["explain"] = (
    replace(PGD50, name="stable arithmetic", score="scaled_log_odds", individual=False, noise_stream=0),
    Stage("best iterate", "pgd", "scaled_log_odds", settings={"steps": 50}, step=0.25, noise_stream=0),
    Stage("more steps", "pgd", "scaled_log_odds", **_LONG, noise_stream=0),
    # "more steps" was the first of five starts
    Stage("restarts", "pgd", "scaled_log_odds", settings={"steps": 200, "restarts": 4}, step=0.1),
    Stage("targets", "pgd", "scaled_log_odds", targets=9, **_LONG, noise_stream=0),
    Stage("other scores", "apgd", "dlr", settings={"steps": 100}),
    Stage("black box", "square", "margin", settings={"steps": 1000}),
    replace(PGD50_TRAIN_LOSS, noise_stream=0),
)
