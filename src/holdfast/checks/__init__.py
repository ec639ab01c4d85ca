"""Trust checks: what a robustness number is worth. Each check is a function; ``audit`` asks them all, ``judge`` weighs.

To add one: a function ``(Probe) -> Measured``, or a text that says what it lacks; its docstring's first line says what
holds of a healthy claim. Then a line in ``CHECKS``, a liar with a dose, and a look at honest networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..attacks.base import frozen_eval
from ..data import Data
from ..errors import UserError, unknown
from ..evaluation import Evaluation, StageCost
from ..losses import Loss
from ..outputs import Model
from ..queries import device_of, exact_float32
from ..results import RemainingVulnerable, SpotCheck, Verdict, remaining_vulnerable
from . import gradients, soundness, strength
from .findings import PGD50, ROBUST, TOLERANCE, CheckCount, Claim, Finding, judge, lower_bound_99, merge
from .probe import Probe

__all__ = [
    "CHECKS",
    "FOUND",
    "PGD50",
    "ROBUST",
    "TOLERANCE",
    "Audit",
    "Check",
    "CheckCount",
    "Claim",
    "Finding",
    "Probe",
    "add_witnesses",
    "audit",
    "judge",
    "lower_bound_99",
    "merge",
    "name_of",
    "remaining",
]  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of CHECKS: the function, which claims it speaks of, who proposed it, whether firing makes them void."""

    function: Callable[[Probe], CheckCount | str]
    claims: tuple[str, ...]
    source: str
    void: bool = False


_BOTH = (PGD50, ROBUST)
_IOAF = "Pintor et al. 2022, indicators of attack failure"
_ATHALYE = "Athalye, Carlini and Wagner 2018"
_CARLINI = "Carlini et al. 2019, on evaluating robustness"

CHECKS: tuple[Check, ...] = (
    Check(soundness.outputs_are_finite, _BOTH, _CARLINI, void=True),
    Check(soundness.outputs_are_repeatable, _BOTH, "Croce et al. 2020, RobustBench", void=True),
    Check(soundness.outputs_do_not_depend_on_batch_mates, _BOTH, "Carlini 2019, on TRADES", void=True),
    Check(soundness.the_model_is_left_as_it_was, _BOTH, "this project", void=True),
    Check(soundness.candidates_lie_in_the_threat, _BOTH, _CARLINI, void=True),
    Check(soundness.eps_zero_is_clean, _BOTH, _CARLINI, void=True),
    Check(soundness.outputs_are_logits, _BOTH, "Carlini and Wagner 2017"),
    Check(soundness.arithmetic_is_float32, _BOTH, "this project"),
    Check(gradients.gradients_of_cross_entropy_are_not_zero, (PGD50,), _IOAF),
    Check(gradients.gradients_of_the_trained_loss_are_not_zero, (PGD50,), _IOAF),
    Check(gradients.gradients_of_the_score_are_not_zero, _BOTH, _IOAF),
    Check(gradients.gradients_predict_slopes, _BOTH, _IOAF),
    Check(gradients.gradients_of_the_logits_are_balanced, _BOTH, "Ma et al. 2020, imbalanced gradients"),
    Check(strength.a_huge_eps_leaves_nothing, _BOTH, _ATHALYE),
    Check(strength.robust_accuracy_falls_with_eps, _BOTH, _ATHALYE),
    Check(strength.the_best_iterate_is_kept, (PGD50,), _IOAF),
    Check(strength.the_choice_of_score_agrees, (PGD50,), "Croce and Hein 2020"),
    Check(strength.a_temperature_changes_nothing, (PGD50,), "Carlini and Wagner 2017, on distillation"),
    Check(strength.float64_changes_nothing, (PGD50,), "this project"),
    Check(strength.float64_scores_break_no_survivor, (ROBUST,), "this project"),
    Check(strength.more_steps_and_restarts_do_not_help, (ROBUST,), _CARLINI),
    Check(strength.a_black_box_is_not_stronger, (ROBUST,), _ATHALYE),
    Check(strength.noise_is_not_stronger, (ROBUST,), _ATHALYE),
    Check(strength.transfer_is_not_stronger, (ROBUST,), _IOAF),
    Check(strength.the_climb_has_ended, (ROBUST,), _IOAF),
    Check(strength.hidden_adversarial_examples_are_found, (ROBUST,), "Zimmermann et al. 2022, the binarisation test"),
    Check(soundness.certified_samples_stand, _BOTH, "this project", void=True),  # last: whatever was broken before it
)


def name_of(check: Check) -> str:
    """The sentence that a check stands for, its function's name in words.

    >>> name_of(CHECKS[0])
    'outputs are finite'
    """
    return check.function.__name__.replace("_", " ")


@dataclass(frozen=True)
class Audit:
    """What an audit leaves behind.

    evaluation: with whatever the audit itself broke; findings: one per check; remainder: what may still be breakable;
    measures: see ``gradients.measures``; cost: passes and seconds of the audit.
    """

    evaluation: Evaluation
    findings: tuple[Finding, ...]
    remaining: RemainingVulnerable
    measures: dict[str, float | None]
    cost: StageCost

    def verdict(self, of: str = ROBUST) -> Verdict:
        """What the robust figure is worth after this audit, or the "pgd50" one; ``judge`` has the rules.

        Raises UserError for a claim of another name.
        """
        if of not in (PGD50, ROBUST):
            raise unknown("claim", of, (PGD50, ROBUST))
        claim = Claim(of, getattr(self.evaluation, of).tolist())
        return judge(claim, self.evaluation.robust.tolist(), self.findings, remaining([self]))


def remaining(audits: Sequence[Audit]) -> dict[str, Any]:
    """What may still fall of the samples of one or several audits, counted together: ``remainder`` of results.json."""
    left = [audit.remaining for audit in audits]
    counts = (sum(getattr(one, name) for one in left) for name in ("first", "second", "both", "tested", "survivors"))
    told: dict[str, Any] = asdict(remaining_vulnerable(*counts))
    evaluations = [audit.evaluation for audit in audits]
    drawn = [found.spot_check for found in evaluations if found.spot_check is not None]
    if drawn:
        columns = [*(f.name for f in fields(SpotCheck)), "expected", "high"]
        told["spot_check"] = {name: sum(getattr(one, name) for one in drawn) for name in columns}
        told["expected"] = max(told["expected"], told["spot_check"]["expected"])
        told["high"] = max(told["high"], told["expected"])
    if any(found.unfinished for found in evaluations):
        told["unfinished"] = True
    votes = max(found.votes for found in evaluations)
    if votes > 1:
        told["votes"] = votes
    return told


def audit(
    model: Model,
    data: Data,
    evaluation: Evaluation,
    *,
    trained_with: Loss | None = None,
    transfer_source: Tensor | None = None,
    seed: int = 0,
    size: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """Ask every check about an evaluation of this model on these samples, and estimate what may still be breakable.

    Args:
        model, data, trained_with: as ``evaluate`` was given them, the samples in the same order.
        twin: (N, C, H, W), adversarial images of an SCE network for the same samples, for the transfer check.
        seed: of the audit's own noise; size: samples that a check looks at; up to half as many
            again of the survivors.
        progress: called with (check, its number from 1, how many) before each.

    Returns an Audit. Its evaluation has one more stage, "audit": an adversarial example that a check comes across is
    kept like any other. Raises UserError for data that the evaluation is not of.
    """
    if len(data) != len(evaluation.y) or not torch.equal(data.index.cpu(), evaluation.index):
        raise UserError("the evaluation is of other samples than these: audit what was evaluated, in the same order.")
    began = time.perf_counter()
    with exact_float32(), frozen_eval(model):
        probe = Probe(model, data.to(device_of(model, data)), evaluation, trained_with, seed, size, transfer_source)
        findings = []
        for number, check in enumerate(CHECKS):
            if progress is not None:
                progress(name_of(check), number + 1, len(CHECKS))
            findings.append(_ask(check, probe))
        left = remaining_vulnerable(*strength.recapture(probe), int(evaluation.robust.sum()))
        measured = gradients.measures(probe)
        # Whatever came back as no number since the first check asked counts too.
        findings[0] = _ask(CHECKS[0], probe)
    cost = StageCost(
        "audit",
        attacked=len(probe.standing),
        broken=sum(len(rows) for rows, *_ in probe.found),
        forwards=probe.model.forwards,
        backwards=probe.model.backwards,
        seconds=time.perf_counter() - began,
        nonfinite=int(probe.model.nonfinite),
    )
    return Audit(add_witnesses(evaluation, probe.found, cost), tuple(findings), left, measured, cost)


def _ask(check: Check, probe: Probe) -> Finding:
    empty = "no sample is right" if len(probe.rows) == 0 else ""
    found = empty or check.function(probe)
    if isinstance(found, str):
        found, status = CheckCount(0, 0, 0.0, found), "not run"
    else:
        status = "fires" if lower_bound_99(found.k, found.n) > found.threshold else "holds"
    void = check.void and not (check.function is soundness.outputs_are_repeatable and probe.votes > 1)
    return Finding(
        name_of(check), status, found.k, found.n, found.threshold, found.why, void, check.claims, check.source
    )


FOUND = ("x_adv", "margin_adv", "prediction_adv")  # what is kept of a sample that the audit breaks


def add_witnesses(
    evaluation: Evaluation, found: list[tuple[Tensor, Tensor, Tensor, Tensor]], cost: StageCost
) -> Evaluation:
    """The evaluation with one more stage, and with what that stage broke. found: (rows, x_adv, margin, prediction)."""
    columns: dict[str, Any] = {name: getattr(evaluation, name).clone() for name in (*FOUND, "broken_by")}
    number = len(evaluation.stages) - 1  # stages[0] is the clean pass
    for rows, *values in found:
        rows = rows.cpu()
        for name, value in zip(FOUND, values, strict=True):
            columns[name][rows] = value.cpu()
        columns["broken_by"][rows] = number
    return replace(evaluation, stages=(*evaluation.stages, cost), **columns)
