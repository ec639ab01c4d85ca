"""The result of an evaluation: one column per question, one entry per sample, and the cost of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import results
from ..mapped import with_rows
from ..results import PRECISION, ProofCost, SpotCheck, notebook_counts
from ..threat import Threat
from ..witnesses import Witnesses

if TYPE_CHECKING:
    import pandas as pd

# Values of ``Evaluation.broken_by`` besides the number of a stage.
UNBROKEN = -1  # correctly classified, and no attack broke it
MISCLASSIFIED = -2  # misclassified before any attack


@dataclass(frozen=True)
class StageCost(results.StageCost):
    """What one stage did and what it cost, with counts of its candidates that only the trust checks need.

    Args:
        name: of the stage; "clean" for the pass over the clean images.
        attacked: number of samples attacked.
        broken: number of samples the stage broke that no earlier stage had.
        forwards: samples sent forward through the model.
        backwards: input gradients computed, counted in samples.
        seconds: wall-clock time.
        outside: candidates that lie outside the threat; they never count as adversarial.
        nonfinite: points whose logits contain NaN or infinity.
        candidates: number of candidates that were verified; one for each sample and target class.
    """

    attacked: int = 0
    broken: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    outside: int = 0
    nonfinite: int = 0
    candidates: int = 0


def sum_over_processes(parts: tuple[StageCost, ...]) -> StageCost:
    """One stage's cost over several processes: counts add up; the time is that of the slowest."""
    counts = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(StageCost) if f.name != "name"}
    return StageCost(parts[0].name, **{**counts, "seconds": max(part.seconds for part in parts)})


@dataclass(frozen=True)
class Evaluation:
    """What the attacks of a suite left of a model's accuracy, sample by sample.

    All tensors are on the CPU and have one entry per sample, (N,), unless stated otherwise.

    Args:
        threat: the threat model.
        index: int64, position of the sample in its data set.
        y: int64, label.
        prediction: int64, predicted class of the clean image.
        margin: float, logit_y - largest other logit of the clean image.
        clean: bool, whether the clean image is classified correctly.
        attack_correct: name -> bool, whether the sample is still correct under that attack alone, run on all correctly
            classified samples; in the suite's order. Has "pgd50" unless it was left out.
        broken_by: int64, which of ``stages`` broke the sample; UNBROKEN or MISCLASSIFIED.
        margin_adv: float, smallest margin of any candidate within the threat.
        prediction_adv: int64, predicted class at ``x_adv``.
        x_adv: (N, C, H, W), the candidate with that margin; the clean image if no candidate had a smaller one. Mapped
            where the data is.
        stages: cost of the clean pass, then of each stage.
        spot_check: what full-length attacks did to a sample of survivors; None if the suite has no spot check or did
            not finish it.
        votes: number of model outputs each prediction is the majority of; 1 for a deterministic model.
        unfinished: whether a budget ended the suite early.
        certified: bool, proved to be classified correctly at every point of the threat (never where ``clean`` is
            False); None if no bound of the network is known.
        proved_by: int64, the method that proved the sample, counted from 1 in ``results.PROOF_METHODS``; 0 where none
            did; None if no bound of the network is known.
        proofs: what each method of proof did and cost; part of the cost of the clean pass.
        attack_kinds: the attacks that ran, keys of ATTACKS.
        precision: share of all samples that may be breakable still; the audit chooses its samples by it too.
        pgd50_sample: bool, the samples that PGD-50 was asked about; its column is False elsewhere. None for all.
        pristine: a copy of the model as it was before it was queried, for the audit, which drops it; None for a
            function, and for a model that cannot be copied. It is never saved.
    """

    threat: Threat
    index: Tensor
    y: Tensor
    prediction: Tensor
    margin: Tensor
    clean: Tensor
    attack_correct: dict[str, Tensor]
    broken_by: Tensor
    margin_adv: Tensor
    prediction_adv: Tensor
    x_adv: Tensor
    stages: tuple[StageCost, ...]
    spot_check: SpotCheck | None = None
    votes: int = 1
    unfinished: bool = False
    certified: Tensor | None = None
    proved_by: Tensor | None = None
    proofs: tuple[ProofCost, ...] = ()
    attack_kinds: tuple[str, ...] = ()
    precision: float = PRECISION
    pgd50_sample: Tensor | None = None
    pristine: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def robust(self) -> Tensor:
        """(N,) bool: correctly classified, and not broken by any attack."""
        return self.broken_by == UNBROKEN

    @property
    def pgd50(self) -> Tensor | None:
        """(N,) bool: correct under PGD-50 alone, as usually reported; None where it was left out.

        Where ``pgd50_sample`` is given, only its samples were attacked, and the accuracy is a share of these.
        """
        return self.attack_correct.get("pgd50")

    def of_pgd50(self, column: Tensor) -> Tensor:
        """The entries of a column, (N,), that belong to samples that PGD-50 was asked about."""
        return column if self.pgd50_sample is None else column[self.pgd50_sample]

    @property
    def forwards(self) -> int:
        """Samples sent forward, over all stages."""
        return sum(stage.forwards for stage in self.stages)

    @property
    def backwards(self) -> int:
        """Input gradients computed, over all stages."""
        return sum(stage.backwards for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Wall-clock time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def frame(self) -> pd.DataFrame:
        """One line for each sample, as a pandas frame.

        Returns:
            Columns index, y, prediction, margin, clean; whether each attack that attacked all left it correct; robust;
            broken_by, the name of the stage, "" for none; margin_adv, prediction_adv; and where bounds are known,
            certified and proved_by, the name of the method.
        """
        import pandas as pd  # here, since it takes half a second

        stage = [self.stages[k].name if k >= 0 else "" for k in self.broken_by.tolist()]
        columns: dict[str, Any] = {
            **{name: getattr(self, name).numpy() for name in ("index", "y", "prediction", "margin", "clean")},
            **{name: correct.numpy() for name, correct in self._of_all().items()},
            "robust": self.robust.numpy(), "broken_by": stage,
            **{name: getattr(self, name).numpy() for name in ("margin_adv", "prediction_adv")},
        }  # fmt: skip
        if self.certified is not None and self.proved_by is not None:
            methods = ("", *results.PROOF_METHODS)
            columns |= {"certified": self.certified.numpy(), "proved_by": [methods[k] for k in self.proved_by.tolist()]}
        return pd.DataFrame(columns)

    def _of_all(self) -> dict[str, Tensor]:
        """The columns of attacks that attacked all correctly classified samples."""
        sampled = () if self.pgd50_sample is None else ("pgd50",)
        return {name: column for name, column in self.attack_correct.items() if name not in sampled}

    def _repr_html_(self) -> str:
        """The evaluation as shown in a notebook."""
        columns = {"clean": self.clean, **self._of_all(), "certified": self.certified, "robust": self.robust}
        counts = {name: None if column is None else int(column.sum()) for name, column in columns.items()}
        note = "No verdict yet: run holdfast.checks.audit."
        return notebook_counts(str(self.threat), len(self.y), counts, self.stages, note)


def add_witnesses(evaluation: Evaluation, witnesses: list[Witnesses], cost: StageCost) -> Evaluation:
    """The evaluation with one more stage, which broke the samples of these witnesses.

    Args:
        evaluation: left unchanged.
        witnesses: adversarial examples of samples that are unbroken so far.
        cost: of the new stage.

    Returns:
        A copy in which these samples are broken by the new stage and have the witness as their ``x_adv``.
    """
    margin_adv = evaluation.margin_adv.clone()
    prediction_adv, broken_by = evaluation.prediction_adv.clone(), evaluation.broken_by.clone()
    for found in witnesses:
        rows = found.rows.cpu()
        margin_adv[rows] = found.margin.cpu()
        prediction_adv[rows] = found.prediction.cpu()
        broken_by[rows] = len(evaluation.stages)
    x_adv = evaluation.x_adv
    if witnesses:
        rows, images = (torch.cat([getattr(found, name).cpu() for found in witnesses]) for name in ("rows", "x_adv"))
        x_adv = with_rows(x_adv, rows, images.to(x_adv))
    return replace(
        evaluation,
        stages=(*evaluation.stages, cost),
        x_adv=x_adv,
        margin_adv=margin_adv,
        prediction_adv=prediction_adv,
        broken_by=broken_by,
    )
