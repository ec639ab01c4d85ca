"""What a check may ask: a few samples, attacks on them, gradients there. Every candidate is judged, none is lost."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import ATTACKS, cross_entropy, matched_score
from ..attacks.base import predict, score_and_grad
from ..data import Data, pixels
from ..evaluation import Evaluation
from ..losses import Loss, negative_log_odds, negative_margin, score_of
from ..noise import Noise
from ..outputs import Model, Outputs, logits_of
from ..queries import EOT_SAMPLES, CountingModel, EOTModel, is_misclassified, majority_vote
from ..threat import Threat

AUDIT = 10_000  # where the audit's noise begins: apart from every stage's of an evaluation


class Probe:
    """A model under audit.

    rows: up to ``size`` samples that are right, drawn at random; standing: up to half as many again of those that
    nothing has broken. ``found`` gathers what the audit itself breaks.
    """

    def __init__(
        self,
        model: Model,
        data: Data,
        evaluation: Evaluation,
        trained_with: Loss | None,
        seed: int,
        size: int,
        transfer_source: Tensor | None,
    ) -> None:
        self.plain, self.model, self.votes = model, CountingModel(model), evaluation.votes
        self.climbed: Model = EOTModel(self.model, EOT_SAMPLES) if self.votes > 1 else self.model
        self.data, self.evaluation, self.threat, self.transfer_source = (
            data,
            evaluation,
            evaluation.threat,
            transfer_source,
        )
        self.loss: Loss = trained_with or cross_entropy
        self.score = (
            negative_log_odds if trained_with is None else score_of(trained_with)
        )  # with a gradient that is its own
        self.matched = matched_score(trained_with)  # what the suite climbs
        self.noise = Noise(seed, data.index).fold(AUDIT)
        device = data.y.device
        order = self.noise.uniform(()).argsort()
        clean, stands = evaluation.clean.to(device), evaluation.robust.to(device)
        self.rows = order[clean[order]][:size]
        self.standing = order[stands[order]][: 3 * size // 2]
        self.found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # rows, x_adv, margin, prediction
        self.broken = ~stands
        self.recaptured: tuple[int, int, int, int] | None = None

    def x(self, rows: Tensor) -> Tensor:
        return pixels(self.data.x[rows])

    def y(self, rows: Tensor) -> Tensor:
        return self.data.y[rows]

    def logits(self, x: Tensor) -> Tensor:
        return predict(self.model, x).logits

    @cached_property
    def clean(self) -> Tensor:
        """The logits of ``rows``, asked once."""
        return self.logits(self.x(self.rows))

    def attack(
        self,
        name: str,
        rows: Tensor,
        score: Loss,
        key: int,
        *,
        threat: Threat | None = None,
        model: Model | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Tensor:
        """Which of these samples an attack breaks, (n,) bool, judged on the model itself in its own precision."""
        if len(rows) == 0:
            return torch.zeros(0, dtype=torch.bool, device=rows.device)
        x, y = self.x(rows), self.y(rows)
        noise = self.noise[rows].fold(key)
        given = x if dtype is None else x.to(dtype)
        x_adv = ATTACKS[name].attack(
            model or self.climbed, given, y, threat or self.threat, score=score, noise=noise, **settings
        )
        return self.judge(rows, x, x_adv.to(x.dtype), threat)

    def judge(self, rows: Tensor, x: Tensor, x_adv: Tensor, threat: Threat | None = None) -> Tensor:
        """Measure candidates afresh; those of the threat itself that break a survivor are kept."""
        y = self.y(rows)
        with torch.no_grad():
            logits, votes = majority_vote(self.model, x_adv, self.votes)
        broken = is_misclassified(votes, y, self.votes) & ((threat or self.threat).violation(x_adv, x) == 0)
        new = broken & ~self.broken[rows]
        if threat is None and bool(new.any()):
            self.found.append((rows[new], x_adv[new], -negative_margin(logits, y)[new], votes.argmax(1)[new]))
            self.broken[rows[new]] = True
        return broken

    def gradient(self, score: Loss, x: Tensor, rows: Tensor) -> Tensor:
        """d score / d x at x, which belong to these rows."""
        return score_and_grad(self.model, x, score, self.y(rows))[2]

    @cached_property
    def double(self) -> Model | None:
        """The model in float64, counted in the same place; None for a function, which cannot be turned to it."""
        if not isinstance(self.plain, nn.Module) or next(self.plain.parameters(), None) is None:
            return None
        return CountingModel(copy.deepcopy(self.plain).double(), self.model)

    @cached_property
    def by_cross_entropy(self) -> Tensor:
        """Which of ``rows`` ten PGD steps on F.cross_entropy break: what other scores are held against."""
        return self.short(cross_entropy)

    def short(self, score: Loss, **settings: Any) -> Tensor:
        """Ten PGD steps of eps/4 on a score, from the same start for every score."""
        settings = {"steps": 10, "step_size": self.threat.eps / 4, **settings}
        return self.attack("pgd", self.rows, score, 1, **settings)


def rescaled_cross_entropy(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """F.cross_entropy of logits divided by their own top gap: no scale of the logits changes it (MIFPE, Yu 2023)."""
    z = logits_of(out)
    top = z.detach().topk(2, dim=1).values
    return F.cross_entropy(z / (top[:, :1] - top[:, 1:]).clamp_min(1e-12), y, reduction="none")
