"""What an evaluation says: a column for each question, an entry for each sample, and what each stage cost."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torch import Tensor

from ..results import SpotCheck, notebook_counts
from ..threat import Threat

UNBROKEN, MISCLASSIFIED = (
    -1,
    -2,
)  # what ``broken_by`` says of a sample that no stage broke, and of one that was wrong already


@dataclass(frozen=True)
class StageCost:
    """What one stage did: samples attacked and broken, passes over samples, seconds, points outside the threat
    and points whose logits were NaN or infinite."""

    name: str
    attacked: int = 0
    broken: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    outside: int = 0
    nonfinite: int = 0


def sum_over_processes(parts: tuple[StageCost, ...]) -> StageCost:
    """One stage's cost over processes: counts add up, time does not."""
    counts = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(StageCost) if f.name != "name"}
    return StageCost(parts[0].name, **{**counts, "seconds": max(part.seconds for part in parts)})


@dataclass(frozen=True)
class Evaluation:
    """Per-sample columns, all (N,) on the CPU, and what each stage cost.

    index, y; prediction and margin (logit_y - largest other) of the clean image; clean: right; published: right on the
    last iterate of the published protocol, one attack alone; broken_by: the number of the stage that broke the sample,
    -1 none, -2 wrong already; margin_adv: the smallest margin seen among judged candidates; prediction_adv; x_adv:
    (N, C, H, W), the candidate with that margin, x itself where there is none; own: right on the last iterate of the
    published protocol on the trained loss itself, where the suite has that stage.

    certified: proved to be right on every x_adv of the threat, so never where ``clean`` is False; None where no bound
    of the network is known. alone: name -> right under that attack alone, in the suite's order; empty where no attack
    but the published one and that on the trained loss stands alone.

    drawn: what full-length attacks did to a few survivors, where the suite draws some; votes: of how many answers of
    the model the majority was taken, 1 for a model that always answers the same; unfinished: a budget ended it before
    the suite did. ``robust`` is what stands at the end.
    """

    threat: Threat
    index: Tensor
    y: Tensor
    prediction: Tensor
    margin: Tensor
    clean: Tensor
    pgd50: Tensor
    broken_by: Tensor
    margin_adv: Tensor
    prediction_adv: Tensor
    x_adv: Tensor
    stages: tuple[StageCost, ...]
    own: Tensor | None = None
    spot_check: SpotCheck | None = None
    votes: int = 1
    unfinished: bool = False
    certified: Tensor | None = None
    individual: dict[str, Tensor] = field(default_factory=dict)

    @property
    def robust(self) -> Tensor:
        """(N,) bool: right, and not broken by anything tried."""
        return self.broken_by == UNBROKEN

    def _repr_html_(self) -> str:
        """Itself in a notebook."""
        shares = {
            "clean": self.clean, "pgd50": self.pgd50, "own loss": self.own, "certified": self.certified,
            "robust": self.robust,
        }  # fmt: skip
        counts = {name: None if column is None else int(column.sum()) for name, column in shares.items()}
        unjudged = "No verdict yet: holdfast.checks.audit judges it."
        return notebook_counts(str(self.threat), len(self.y), counts, self.stages, unjudged)

    @property
    def forwards(self) -> int:
        return sum(stage.forwards for stage in self.stages)

    @property
    def backwards(self) -> int:
        return sum(stage.backwards for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)
