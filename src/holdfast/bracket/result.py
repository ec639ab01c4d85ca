"""What a bracket says: a column for each bound, an entry for each sample, and what follows for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..threat import Threat

# What can be said of a sample, the first that holds; the words of the figure.
STATUS = {
    "certified": "certified: margin > s_cert",
    "robust": "robust in truth: margin > s*",
    "unknown": "unknown",
    "missed": "broken, attacks miss it",
    "attacked": "broken by an attack: margin ≤ s_att",
    "wrong": "wrong already",
}


@dataclass(frozen=True)
class Bracket:
    """Per-sample columns on the CPU, (N,) each, float64 in units of the logits but for the first three.

    index, y; rival: the strongest competitor at x; margin: by how far y stands above it; s_att: the largest S that was
    reached by an attack; s_low <= s* <= s_high: by the exact programs, equal to their accuracy where ``solved``;
    s_cert: S by interval bounds. s_low, s_high and solved are None where the network or the norm has no exact answer,
    s_cert where no bound is known. trained_s: the constant s that it was trained with, None for another loss.
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
        """s*, NaN where its programs ran out of time; the upper side, so that margin > s* is a proof."""
        if self.s_high is None or self.solved is None:
            return None
        return torch.where(self.solved, self.s_high, math.nan)

    @property
    def status(self) -> tuple[str, ...]:
        """A key of STATUS for each sample."""
        never = torch.full_like(self.margin, math.inf)
        high = never if self.s_high is None else self.s_high
        low = self.s_att if self.s_low is None else self.s_low
        cert = never if self.s_cert is None else self.s_cert
        tests = {
            "wrong": self.margin <= 0,
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
        """How many samples have each status."""
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
