"""Trust checks: what a robustness figure is worth. ``audit`` runs all checks; ``judge`` turns findings into a verdict.

To add a check: a function ``(Probe) -> CheckCount``, or a text saying what it lacks, whose name and docstring say what
is true of a sound evaluation; a line in ``CHECKS``; a faulty model on which it fires; and a run on honest networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import results
from ..attacks.base import frozen_eval
from ..data.arguments import AnyData, as_data
from ..errors import UserError, type_of, unknown
from ..evaluation import Evaluation, StageCost, add_witnesses
from ..losses import Loss, as_loss
from ..mapped import take
from ..outputs import Model
from ..progress import Progress, as_progress
from ..queries import device_of, exact_float32
from ..results import CleanMeasures, Finding, Remaining, RemainingVulnerable, Verdict, remaining_vulnerable
from ..user_input import any_seed, of_type, whole
from . import gradients, soundness, strength
from .findings import CheckCount, lower_bound_99, merge, result_of
from .probe import BATCH, Probe, Recapture
from .verdict import CONFIDENCE, PGD50, ROBUST, TOLERANCE, Claim, judge

__all__ = [
    "CHECKS",
    "CONFIDENCE",
    "PGD50",
    "ROBUST",
    "TOLERANCE",
    "Audit",
    "Check",
    "CheckCount",
    "Claim",
    "Probe",
    "audit",
    "identity_of_checks",
    "judge",
    "lower_bound_99",
    "merge",
    "name_of",
    "remaining",
    "result_of",
    "with_later_witnesses",
]  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of CHECKS.

    Args:
        function: counts faulty samples, or says what it lacks.
        claims: the claims that the check applies to.
        source: who proposed it.
        void: whether the evaluation is invalid if it fires.
        without_samples: whether it also runs where no sample is classified correctly.
        vacuous: whether even a proof says nothing of robustness if it fires.
    """

    function: Callable[[Probe], CheckCount | str]
    claims: tuple[str, ...]
    source: str
    void: bool = False
    without_samples: bool = False
    vacuous: bool = False


_BOTH = (PGD50, ROBUST)
_IOAF = "Pintor et al. 2022, indicators of attack failure"
_ATHALYE = "Athalye, Carlini and Wagner 2018"
_CARLINI = "Carlini et al. 2019, on evaluating robustness"

# The weightiest first: a verdict names the first of the checks that fire, of those that make it void before the others.
CHECKS: tuple[Check, ...] = (
    Check(soundness.outputs_are_finite, _BOTH, _CARLINI, void=True),
    Check(soundness.outputs_are_repeatable, _BOTH, "Croce et al. 2020, RobustBench", void=True),
    Check(soundness.outputs_do_not_depend_on_batch_mates, _BOTH, "Carlini 2019, on TRADES", void=True),
    Check(soundness.outputs_do_not_depend_on_the_gradient_mode, _BOTH, "this project", void=True),
    Check(soundness.a_copy_that_was_never_queried_answers_alike, _BOTH, "this project", void=True),
    Check(soundness.the_model_is_left_as_it_was, _BOTH, "this project", void=True),
    Check(soundness.candidates_lie_in_the_threat, _BOTH, _CARLINI, void=True),
    Check(soundness.eps_zero_is_clean, _BOTH, _CARLINI, void=True),
    Check(soundness.clean_accuracy_is_above_chance, _BOTH, "Cohen 1960, kappa", without_samples=True, vacuous=True),
    Check(gradients.gradients_of_the_score_are_not_zero, _BOTH, _IOAF),
    Check(gradients.gradients_of_cross_entropy_are_not_zero, (PGD50,), _IOAF),
    Check(gradients.gradients_of_the_training_loss_are_not_zero, (), _IOAF),
    Check(soundness.outputs_are_logits, _BOTH, "Carlini and Wagner 2017"),
    Check(strength.margins_are_continuous, _BOTH, "this project"),
    Check(gradients.gradients_predict_slopes, _BOTH, _IOAF),
    Check(strength.more_steps_and_restarts_do_not_help, (ROBUST,), _CARLINI),
    Check(strength.a_black_box_is_not_stronger, (ROBUST,), _ATHALYE),
    Check(strength.labels_alone_break_no_survivor, (ROBUST,), "Chen and Gu 2020, RayS"),
    Check(strength.decomposing_the_margin_breaks_no_survivor, (ROBUST,), "Ma et al. 2020, imbalanced gradients"),
    Check(strength.descending_the_score_breaks_no_survivor, (ROBUST,), _ATHALYE),
    Check(strength.answers_agree_on_and_off_the_8_bit_grid, _BOTH, "this project"),
    Check(strength.noise_is_not_stronger, (ROBUST,), _ATHALYE),
    Check(strength.transfer_is_not_stronger, (ROBUST,), _IOAF),
    Check(strength.float64_scores_break_no_survivor, (ROBUST,), "this project"),
    Check(strength.the_choice_of_score_agrees, (PGD50,), "Croce and Hein 2020"),
    Check(strength.a_temperature_changes_nothing, (PGD50,), "Carlini and Wagner 2017, on distillation"),
    Check(strength.float64_changes_nothing, (PGD50,), "this project"),
    Check(strength.the_best_iterate_is_kept, (PGD50,), _IOAF),
    Check(strength.a_huge_eps_leaves_nothing, _BOTH, _ATHALYE),
    Check(strength.robust_accuracy_falls_with_eps, _BOTH, _ATHALYE),
    Check(strength.hidden_adversarial_examples_are_found, (ROBUST,), "Zimmermann et al. 2022, the binarisation test"),
    Check(strength.witnesses_hold_in_onnxruntime, (ROBUST,), "this project"),
    Check(strength.the_ascent_has_converged, (ROBUST,), _IOAF),
    Check(gradients.gradients_of_the_logits_are_balanced, _BOTH, "Ma et al. 2020, imbalanced gradients"),
    Check(soundness.arithmetic_is_float32, _BOTH, "this project"),
    # The last one, so that it counts what all other checks have broken.
    Check(soundness.certified_samples_are_unbroken, _BOTH, "this project", void=True),
)
# Run again at the end: the first also counts outputs of the other checks, and the second compares with the beginning.
_TWICE = (soundness.outputs_are_finite, soundness.outputs_are_repeatable)


def name_of(check: Check) -> str:
    """The sentence that a check stands for: its function's name in words.

    >>> name_of(CHECKS[0])
    'outputs are finite'
    """
    return check.function.__name__.replace("_", " ")


def identity_of_checks() -> list[list[Any]]:
    """What stored findings depend on, for the key of a cache: of each check its name and what follows if it fires."""
    return [[name_of(check), check.claims, check.void, check.vacuous] for check in CHECKS]


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Args:
        evaluation: the audited one, with one more stage, "audit": the samples that checks broke.
        findings: one per check.
        remaining: estimate of the survivors that are still breakable.
        measures: gradients and distances at the clean images; None where no sample is correct, or the model failed.
        cost: passes and seconds of the audit.
    """

    evaluation: Evaluation
    findings: tuple[Finding, ...]
    remaining: RemainingVulnerable
    measures: CleanMeasures | None
    cost: StageCost

    def verdict(self, claim: str = ROBUST) -> Verdict:
        """What a figure of the evaluation is worth; see ``judge`` for the rules.

        Args:
            claim: "robust" for the robust accuracy, "pgd50" for the accuracy under PGD-50.

        Raises:
            UserError: for any other claim, and for "pgd50" where PGD-50 was left out.
        """
        if claim not in (PGD50, ROBUST):
            raise unknown("claim", claim, (PGD50, ROBUST))
        evaluation, correct = self.evaluation, self.evaluation.robust
        if claim == PGD50:
            if evaluation.pgd50 is None:
                raise UserError("PGD-50 was left out of this evaluation: evaluate again without pgd50=0.")
            correct = evaluation.pgd50
        counted = evaluation.of_pgd50 if claim == PGD50 else lambda column: column
        return judge(
            Claim(claim, counted(correct).tolist()),
            counted(evaluation.robust).tolist(),
            self.findings,
            remaining([self]),
            attack_kinds=evaluation.attack_kinds,
            certified=None if evaluation.certified is None else counted(evaluation.certified).tolist(),
            samples=len(correct),
        )


def remaining(audits: Sequence[Audit]) -> Remaining:
    """What may still be breakable in one or several audits, with their samples counted together.

    Args:
        audits: of the networks that share a row (folds), at least one.

    Returns:
        The capture-recapture estimate of the summed counts. Where the spot checks suggest more, ``expected`` and
        ``high`` are theirs.
    """
    evaluations = [audit.evaluation for audit in audits]
    return results.sum_remaining(
        [audit.remaining for audit in audits],
        [evaluation.spot_check for evaluation in evaluations if evaluation.spot_check is not None],
        unfinished=any(evaluation.unfinished for evaluation in evaluations),
        votes=max(evaluation.votes for evaluation in evaluations),
    )


def audit(
    model: Model,
    data: AnyData,
    evaluation: Evaluation,
    *,
    trained_with: Loss | str | None = None,
    transfer_source: Tensor | None = None,
    seed: int = 0,
    size: int = 64,
    progress: Progress | None = None,
) -> Audit:
    """Run every check on an evaluation, and estimate how many of its survivors are still breakable.

    Args:
        model: the evaluated model.
        data: the evaluated samples, in the same order; of any kind that ``evaluate`` takes.
        evaluation: of that model on these samples.
        trained_with: the loss the network was trained with, or its name, as given to ``evaluate``.
        transfer_source: (N, C, H, W), adversarial images of an SCE network for the same samples, for the transfer
            check; None skips it.
        seed: of the audit's own noise.
        size: number of samples that a check looks at, >= 1; checks on survivors use up to half as many again.
        progress: None, or called before each check with (its name, its number from 1, number of checks).

    Returns:
        An Audit. Adversarial examples that checks find are part of its evaluation.

    Raises:
        UserError: if the evaluation is of other samples.
    """
    if not isinstance(evaluation, Evaluation):
        raise UserError(f"evaluation must be what holdfast.evaluate returned, got {type_of(evaluation)}.")
    data, trained_with = as_data(data), as_loss(trained_with)
    seed, size, progress = any_seed(seed), whole("size", size, 1), as_progress(progress)
    of_type("transfer_source", transfer_source, Tensor | None)
    if transfer_source is not None and transfer_source.shape != data.x.shape:
        raise UserError(
            f"transfer_source must be images of the same samples, {tuple(data.x.shape)}, got "
            f"{tuple(transfer_source.shape)}."
        )
    if len(data) != len(evaluation.y) or not torch.equal(data.index.cpu(), evaluation.index):
        raise UserError("the evaluation is of other samples: audit the samples that were evaluated, in the same order.")
    began = time.perf_counter()
    with exact_float32(), frozen_eval(model):
        probe = Probe(model, data.to(device_of(model, data)), evaluation, trained_with, seed, size, transfer_source)
        findings = []
        for number, check in enumerate(CHECKS):
            progress(name_of(check), number + 1, len(CHECKS))
            findings.append(_run(check, probe))
        estimate = _estimate(probe)
        measures = None
        with suppress(UserError):  # the model failed, as the checks say
            measures = gradients.measures(probe)
        for number, check in enumerate(CHECKS):
            if check.function in _TWICE:
                findings[number] = max(findings[number], _run(check, probe), key=lambda finding: finding.k)
    cost = StageCost(
        "audit",
        attacked=len(probe.survivors),
        broken=sum(len(witnesses.rows) for witnesses in probe.witnesses),
        forwards=probe.model.forwards,
        backwards=probe.model.backwards,
        seconds=time.perf_counter() - began,
        nonfinite=int(probe.model.nonfinite),
    )
    evaluation = add_witnesses(replace(evaluation, pristine=None), probe.witnesses, cost)
    return with_later_witnesses(Audit(evaluation, tuple(findings), estimate, measures, cost), model, evaluation)


def with_later_witnesses(audited: Audit, model: Model, evaluation: Evaluation) -> Audit:
    """The audit with an evaluation in which more may be broken: onnxruntime is asked about everything that counts.

    Args:
        audited: of this evaluation, or of an earlier state of it.
        model: the evaluated model.
        evaluation: with later stages, such as the region's.

    Returns:
        The audit with this evaluation.
    """
    findings = list(audited.findings)
    broken = torch.nonzero(evaluation.broken_by >= 0)[:, 0]
    asks = {name_of(one): one for one in CHECKS if one.function is strength.witnesses_hold_in_onnxruntime}
    for number, finding in enumerate(findings):
        if finding.name in asks and finding.n != len(broken):
            images = (take(evaluation.x_adv, rows) for rows in broken.split(BATCH))
            with frozen_eval(model):
                outcome = strength.confirmed_by_onnxruntime(model, evaluation.y[broken], images)
            findings[number] = _finding(asks[finding.name], outcome)
    return replace(audited, evaluation=evaluation, findings=tuple(findings))


def _estimate(probe: Probe) -> RemainingVulnerable:
    """What may still be breakable of the survivors that no certificate covers."""
    survivors = probe.evaluation.robust
    if probe.evaluation.certified is not None:
        survivors = survivors & ~probe.evaluation.certified
    try:
        counts = strength.recapture(probe)
    except UserError:  # the model failed, as the check on the same runs says
        counts = Recapture(0, 0, 0, 0)
    return remaining_vulnerable(*counts, int(survivors.sum()))


def _run(check: Check, probe: Probe) -> Finding:
    """Run one check and compare its count with its threshold. A model that fails in it makes it fire."""
    try:
        runs = len(probe.rows) or check.without_samples
        outcome: CheckCount | str = "no sample is classified correctly"
        if check.claims == (PGD50,) and probe.evaluation.pgd50 is None:
            outcome = "PGD-50 was left out of the evaluation"
        elif runs:
            outcome = check.function(probe)
    except UserError as error:
        outcome = CheckCount(1, 1, 0.0, f"the model failed: {error}")
    # A model recognised as randomised was evaluated by majority votes: its figures are uncertain, but not invalid.
    void = check.void and not (check.function is soundness.outputs_are_repeatable and probe.votes > 1)
    return replace(_finding(check, outcome), void=void)


def _finding(check: Check, outcome: CheckCount | str) -> Finding:
    """What a check counted, held against its threshold."""
    count = CheckCount(0, 0, 0.0, outcome) if isinstance(outcome, str) else outcome
    status = "fires" if lower_bound_99(count.k, count.n) > count.threshold else "holds"
    if isinstance(outcome, str):
        status = "not run"
    about = (check.void, check.claims, check.source, check.vacuous)
    return Finding(name_of(check), status, count.k, count.n, count.threshold, count.why, *about)
