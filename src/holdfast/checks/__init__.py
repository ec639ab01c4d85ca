"""Trust checks: what a robustness figure is worth. ``audit`` runs all checks; ``judge`` turns findings into a verdict.

To add a check: a function ``(Probe) -> CheckCount``, or a text saying what it lacks, whose name and docstring say what
is true of a sound evaluation; a line in ``CHECKS``; a faulty model on which it fires; and a run on honest networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..attacks.base import frozen_eval
from ..data import Data
from ..errors import UserError, unknown
from ..evaluation import Evaluation, StageCost, add_witnesses
from ..losses import Loss
from ..outputs import Model
from ..progress import Progress, silent
from ..queries import device_of, exact_float32
from ..results import Finding, Remaining, RemainingVulnerable, Verdict, remaining_vulnerable
from . import gradients, soundness, strength
from .findings import CheckCount, lower_bound_99, merge, result_of
from .probe import Probe
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
    "judge",
    "lower_bound_99",
    "merge",
    "name_of",
    "remaining",
    "result_of",
]  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of CHECKS.

    Args:
        function: counts faulty samples, or says what it lacks.
        claims: the claims that the check applies to.
        source: who proposed it.
        void: whether the evaluation is invalid if it fires.
    """

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
    Check(gradients.gradients_of_the_training_loss_are_not_zero, (), _IOAF),
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
    Check(strength.the_ascent_has_converged, (ROBUST,), _IOAF),
    Check(strength.hidden_adversarial_examples_are_found, (ROBUST,), "Zimmermann et al. 2022, the binarisation test"),
    # The last one, so that it counts what all other checks have broken.
    Check(soundness.certified_samples_are_unbroken, _BOTH, "this project", void=True),
)


def name_of(check: Check) -> str:
    """The sentence that a check stands for: its function's name in words.

    >>> name_of(CHECKS[0])
    'outputs are finite'
    """
    return check.function.__name__.replace("_", " ")


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Args:
        evaluation: the audited one, with one more stage, "audit": the samples that checks broke.
        findings: one per check.
        remaining: estimate of the survivors that are still breakable.
        measures: see ``gradients.measures``.
        cost: passes and seconds of the audit.
    """

    evaluation: Evaluation
    findings: tuple[Finding, ...]
    remaining: RemainingVulnerable
    measures: dict[str, float | None]
    cost: StageCost

    def verdict(self, claim: str = ROBUST) -> Verdict:
        """What a figure of the evaluation is worth; see ``judge`` for the rules.

        Args:
            claim: "robust" for the robust accuracy, "pgd50" for the accuracy under PGD-50.

        Raises:
            UserError: for any other claim.
        """
        if claim not in (PGD50, ROBUST):
            raise unknown("claim", claim, (PGD50, ROBUST))
        correct = getattr(self.evaluation, claim).tolist()
        return judge(Claim(claim, correct), self.evaluation.robust.tolist(), self.findings, remaining([self]))


def remaining(audits: Sequence[Audit]) -> Remaining:
    """What may still be breakable in one or several audits, with their samples counted together.

    Args:
        audits: of the networks that share a row (folds), at least one.

    Returns:
        The capture-recapture estimate of the summed counts. Where the spot checks suggest more, ``expected`` and
        ``high`` are theirs.
    """
    estimates = [audit.remaining for audit in audits]
    evaluations = [audit.evaluation for audit in audits]
    counts = (
        sum(getattr(one, name) for one in estimates) for name in ("first", "second", "both", "tested", "survivors")
    )
    whole = remaining_vulnerable(*counts)
    spot_checks = tuple(evaluation.spot_check for evaluation in evaluations if evaluation.spot_check is not None)
    expected = max(whole.expected, sum(one.expected for one in spot_checks))
    high = max(whole.high, expected)
    return Remaining(
        **{**asdict(whole), "expected": expected, "high": high},
        spot_checks=spot_checks,
        unfinished=any(evaluation.unfinished for evaluation in evaluations),
        votes=max(evaluation.votes for evaluation in evaluations),
    )


def audit(
    model: Model,
    data: Data,
    evaluation: Evaluation,
    *,
    trained_with: Loss | None = None,
    transfer_source: Tensor | None = None,
    seed: int = 0,
    size: int = 64,
    progress: Progress = silent,
) -> Audit:
    """Run every check on an evaluation, and estimate how many of its survivors are still breakable.

    Args:
        model: the evaluated model.
        data: the evaluated samples, in the same order.
        evaluation: of that model on these samples.
        trained_with: the loss the network was trained with, as given to ``evaluate``.
        transfer_source: (N, C, H, W), adversarial images of an SCE network for the same samples, for the transfer
            check; None skips it.
        seed: of the audit's own noise.
        size: number of samples that a check looks at, >= 1; checks on survivors use up to half as many again.
        progress: called before each check with (its name, its number from 1, number of checks).

    Returns:
        An Audit. Adversarial examples that checks find are part of its evaluation.

    Raises:
        UserError: if the evaluation is of other samples.
    """
    if len(data) != len(evaluation.y) or not torch.equal(data.index.cpu(), evaluation.index):
        raise UserError("the evaluation is of other samples: audit the samples that were evaluated, in the same order.")
    began = time.perf_counter()
    with exact_float32(), frozen_eval(model):
        probe = Probe(model, data.to(device_of(model, data)), evaluation, trained_with, seed, size, transfer_source)
        findings = []
        for number, check in enumerate(CHECKS):
            progress(name_of(check), number + 1, len(CHECKS))
            findings.append(_run(check, probe))
        estimate = remaining_vulnerable(*strength.recapture(probe), int(evaluation.robust.sum()))
        measures = gradients.measures(probe)
        # The first check again: it also counts outputs that were not finite during the other checks.
        findings[0] = _run(CHECKS[0], probe)
    cost = StageCost(
        "audit",
        attacked=len(probe.survivors),
        broken=sum(len(witnesses.rows) for witnesses in probe.witnesses),
        forwards=probe.model.forwards,
        backwards=probe.model.backwards,
        seconds=time.perf_counter() - began,
        nonfinite=int(probe.model.nonfinite),
    )
    return Audit(add_witnesses(evaluation, probe.witnesses, cost), tuple(findings), estimate, measures, cost)


def _run(check: Check, probe: Probe) -> Finding:
    """Run one check and compare its count with its threshold."""
    outcome = check.function(probe) if len(probe.rows) else "no sample is classified correctly"
    if isinstance(outcome, str):
        count, status = CheckCount(0, 0, 0.0, outcome), "not run"
    else:
        count = outcome
        status = "fires" if lower_bound_99(count.k, count.n) > count.threshold else "holds"
    # A model recognised as randomised was evaluated by majority votes: its figures are uncertain, but not invalid.
    void = check.void and not (check.function is soundness.outputs_are_repeatable and probe.votes > 1)
    return Finding(
        name_of(check), status, count.k, count.n, count.threshold, count.why, void, check.claims, check.source
    )
