"""The final answer on one network under one threat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..checks import PGD50, ROBUST, Audit
from ..evaluation import Evaluation
from ..results import Projection, RegionMeasures, Verdict, notebook_counts, percent, proportion, proved_text


@dataclass(frozen=True)
class NetworkResult:
    """The final answer on one network under one threat.

    Args:
        evaluation: per-sample columns and costs, with whatever the audit and the region measurement broke.
        audit: the findings of the trust checks and the estimate of remaining vulnerable samples; its ``evaluation`` is
            the final one too.
        region: the inference region; None where it was not measured.
        projection: what a figure of the region needs; None where it was not measured.
    """

    evaluation: Evaluation
    audit: Audit
    region: RegionMeasures | None
    projection: Projection | None

    def verdict(self, claim: str = ROBUST) -> Verdict:
        """What a figure is worth: "robust", or "pgd50" for the usual protocol. Raises UserError for another name."""
        return self.audit.verdict(claim)

    def figures(self) -> dict[str, float | str]:
        """The accuracies, the robust one with its interval, and the verdicts, by name; without those that are void."""
        evaluation, verdict = self.evaluation, self.verdict()
        columns = {"clean": evaluation.clean, **evaluation.attack_correct}
        if evaluation.pgd50 is not None:
            columns["pgd50"] = evaluation.of_pgd50(evaluation.pgd50)
        if verdict.status != "void":
            columns["robust"] = evaluation.robust
            if evaluation.certified is not None:
                columns["certified"] = evaluation.certified
        shares = {name: proportion(int(column.sum()), len(column)) for name, column in columns.items()}
        figures: dict[str, float | str] = {name: share.value for name, share in shares.items()}
        if "robust" in shares:
            figures |= {"robust_low": shares["robust"].low, "robust_high": shares["robust"].high}
        words = {} if evaluation.pgd50 is None else {"pgd50_verdict": self.verdict(PGD50).status}
        return {**figures, "verdict": verdict.status, **words}

    def __str__(self) -> str:
        """The accuracies, the interval of the robust one, and the two verdicts."""
        evaluation, robust = self.evaluation, self.verdict()
        void = robust.status == "void"
        figures = {"clean": _percent(evaluation.clean)}
        if evaluation.pgd50 is not None:
            asked = evaluation.of_pgd50(evaluation.pgd50)
            n = "" if evaluation.pgd50_sample is None else f" of {len(asked):,} samples"
            figures["PGD-50"] = f"{_percent(asked)}{n}  {_words(self.verdict(PGD50))}"
        figures["robust"] = f"{'-' if void else _bound(evaluation.robust)}  {_words(robust)}"
        if evaluation.certified is not None and not void:
            between = int((evaluation.robust & ~evaluation.certified).sum())
            proved = proved_text(evaluation.proofs)
            figures["certified"] = f"{_percent(evaluation.certified)}  {between:,} between{'; ' * bool(proved)}{proved}"
        head = f"{evaluation.threat}, {len(evaluation.y):,} samples, in percent; 95% Clopper-Pearson interval"
        return "\n".join([head, *(f"{name:<10}{figure}" for name, figure in figures.items())])

    def _repr_html_(self) -> str:
        """The same as a table in a notebook, with the cost of each stage."""
        robust, evaluation = self.verdict(), self.evaluation
        void = robust.status == "void"
        pgd50 = None if evaluation.pgd50 is None else self.verdict(PGD50)
        columns = {
            "clean": evaluation.clean,
            **({f"PGD-50 ({pgd50.status})": evaluation.pgd50} if pgd50 and evaluation.pgd50_sample is None else {}),
            "certified": None if void else evaluation.certified,
            f"robust, at most ({robust.status})": None if void else evaluation.robust,
        }
        counts = {name: None if column is None else int(column.sum()) for name, column in columns.items()}
        on = "" if evaluation.pgd50_sample is None else f" on {int(evaluation.pgd50_sample.sum()):,} samples"
        note = (f"PGD-50{on}: {_words(pgd50)}. " if pgd50 else "") + f"robust: {_words(robust)}"
        return notebook_counts(str(evaluation.threat), len(evaluation.y), counts, evaluation.stages, note)


def _percent(correct: Tensor) -> str:
    return percent(proportion(int(correct.sum()), len(correct)).value)


def _bound(correct: Tensor) -> str:
    """An upper bound with its interval: <= 41.0 [34.1, 48.2]."""
    interval = proportion(int(correct.sum()), len(correct))
    return f"<= {percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]"


def _words(verdict: Verdict) -> str:
    return f"{verdict.why}: {verdict.status}" if verdict.why else verdict.status
