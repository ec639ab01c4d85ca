"""The result of a bracket: its columns, and the status of each sample that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..threat import Threat

# The statuses of a sample, in the order of the figure, and their words there.
STATUS = {
    "certified": "certified: margin > s_cert",
    "robust": "robust (exact): margin > s*",
    "unknown": "unknown",
    "missed": "broken, missed by attacks",
    "attacked": "broken by an attack: margin ≤ s_att",
    "misclassified": "misclassified",
}


@dataclass(frozen=True)
class Bracket:
    """The margin of each sample and its bracket: columns of shape (N,), on the CPU, float64 in units of the logits.

    Args:
        threat: The threat of all columns.
        index: int64, the samples' places in the data set.
        y: int64, the labels.
        rival: int64, the class of the strongest other logit at x.
        margin: logit_y - logit_rival at x.
        s_att: The largest margin drop S that an attack reached.
        s_low: A lower bound of s* by the exact programs; None if the network or the norm has no exact answer.
        s_high: The upper bound; where ``solved`` the two are equal to the programs' accuracy.
        solved: bool, whether the programs ended in time.
        s_cert: An upper bound of s* by intervals; None if no bound is known.
        trained_s: The constant s that the network was trained with; None for a loss without one.
    """

    threat: Threat
    index: Tensor
    y: Tensor
    rival: Tensor
    margin: Tensor
    s_att: Tensor
    s_low: Tensor | None = None
    s_high: Tensor | None = None
    solved: Tensor | None = None
    s_cert: Tensor | None = None
    trained_s: float | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def s_star(self) -> Tensor | None:
        """s*, NaN where its programs ran out of time. It is s_high, so that margin > s* is a proof."""
        if self.s_high is None or self.solved is None:
            return None
        return torch.where(self.solved, self.s_high, math.nan)

    @property
    def status(self) -> tuple[str, ...]:
        """A key of STATUS for each sample: the first of the tests below that holds, or "unknown"."""
        never = torch.full_like(self.margin, math.inf)
        high = never if self.s_high is None else self.s_high
        low = self.s_att if self.s_low is None else self.s_low
        cert = never if self.s_cert is None else self.s_cert
        tests = {
            "misclassified": self.margin <= 0,
            "attacked": self.margin <= self.s_att,
            "missed": self.margin <= low,
            "certified": self.margin > cert,
            "robust": self.margin > high,
        }
        return tuple(
            next((name for name, holds in tests.items() if bool(holds[i])), "unknown") for i in range(len(self))
        )

    @property
    def counts(self) -> dict[str, int]:
        """The number of samples with each status."""
        status = self.status
        return {name: status.count(name) for name in STATUS}

    def describe(self) -> dict[str, Any]:
        """The bracket as bracket.json holds it: NaN is null."""
        columns = {
            name: getattr(self, name)
            for name in ("index", "y", "rival", "margin", "s_att", "s_low", "s_high", "solved", "s_cert")
        }
        return {
            "threat": self.threat.describe(),
            "trained_s": self.trained_s,
            "samples": len(self),
            "counts": self.counts,
            "columns": {
                **{name: None if column is None else column.tolist() for name, column in columns.items()},
                "status": list(self.status),
            },
        }
