"""What a check works with: a few samples, attacks and gradients there. Adversarial examples it finds are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import ATTACKS, cross_entropy, matched_score
from ..attacks.base import all_rows, predict, score_and_grad
from ..data import Data
from ..errors import UserError
from ..evaluation import Evaluation
from ..losses import Loss, negative_log_odds, score_of
from ..mapped import take
from ..noise import AuditStream, EvaluationStream, Noise
from ..outputs import Model, Outputs, logits_of, out_of_memory
from ..queries import (
    EOT_SAMPLES,
    Batches,
    CountingModel,
    EOTModel,
    default_batch_size,
    differs_off_data,
    judge_candidates,
    logits_differ,
)
from ..results import sample_size
from ..threat import Threat
from ..witnesses import Witnesses


class Recapture(NamedTuple):
    """Counts of two independent runs on survivors: broken by the first, the second and both, of ``tested``."""

    first: int
    second: int
    both: int
    tested: int


FLOAT32_INSIDE = "the network is float32 inside"
BATCH = 64  # adversarial examples at a time
POINTS = 32  # samples at which the model is queried in several ways


class Points(NamedTuple):
    """Points of the threat, and the model's first answers there.

    Attributes:
        x: (P, ...): clean images, random points of the threat, the stored x_adv of survivors, and last iterates of an
            ascent, in this order.
        logits: (P, K), without a graph.
        sizes: how many there are of each kind.
        rows: (P,) the samples they belong to.
    """

    x: Tensor
    logits: Tensor
    sizes: list[int]
    rows: Tensor

    def differs(self, other: Tensor) -> Tensor:
        """(P,) bool: another output than at first, beyond rounding."""
        n_clean = self.sizes[0]
        clean = logits_differ(self.logits[:n_clean], other[:n_clean])
        return torch.cat([clean, differs_off_data(self.logits[n_clean:], other[n_clean:])])


class Probe:
    """A model under audit.

    Attributes:
        raw_model: the model as the user gave it.
        model: the same, counting its passes.
        attack_model: as attacks query it: averaged over outputs if it is randomised.
        loss: the loss the network was trained with.
        score: its score, with its own gradient.
        matched: the score that the suite's "matched" stages use.
        rows: (M,) up to ``size`` correctly classified samples, drawn at random.
        survivors: (S,) up to half as many again of the samples that no attack has broken and no certificate covers,
            drawn at random; more where the precision of the evaluation needs more.
        tested: how many of them, the first ones, the precision needs to be attacked by two independent runs.
        witnesses: what the audit itself has broken so far.
        broken: (N,) bool, broken by the evaluation or by the audit so far, or misclassified.
        recapture: counts of the two independent runs, once they have been made.
        batches: how many of these samples are worked on at a time.
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
        self.raw_model, self.model, self.votes = (
            model,
            CountingModel(model, occurring=data.y.unique()),
            evaluation.votes,
        )
        self.attack_model: Model = EOTModel(self.model, EOT_SAMPLES) if self.votes > 1 else self.model
        self.data, self.evaluation, self.threat = data, evaluation, evaluation.threat
        self.transfer_source = transfer_source
        self.loss: Loss = trained_with or cross_entropy
        self.score = negative_log_odds if trained_with is None else score_of(trained_with)
        self.matched = matched_score(trained_with)
        self.noise = Noise(seed, data.index).fold(EvaluationStream.AUDIT)
        device = data.y.device
        order = self.noise.uniform(()).argsort()
        clean, robust = evaluation.clean.to(device), evaluation.robust.to(device)
        self.rows = order[clean[order]][:size]
        left = robust if evaluation.certified is None else robust & ~evaluation.certified.to(device)
        every = order[left[order]]
        self.tested = sample_size(len(every), len(data), evaluation.precision)
        self.survivors = every[: max(self.tested, 3 * size // 2)]
        self.witnesses: list[Witnesses] = []
        self.broken = ~robust
        self.recapture: Recapture | None = None
        self.batches = Batches(default_batch_size(data.x))

    def x(self, rows: Tensor) -> Tensor:
        """Clean images of these samples, float."""
        return self.data.pixels(rows)

    def stored_x_adv(self, rows: Tensor) -> Tensor:
        """The evaluation's most adversarial points of these samples."""
        return take(self.evaluation.x_adv, rows.cpu()).to(self.data.y.device)

    def y(self, rows: Tensor) -> Tensor:
        """Labels of these samples."""
        return self.data.y[rows]

    def logits(self, x: Tensor, model: Model | None = None) -> Tensor:
        """Logits of images, without a graph; of another model where one is given."""
        return self.batches.cat(lambda some: predict(model or self.model, some).logits, x)

    def logits_at(self, x: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Logits of some samples at x(rows), which is computed a batch at a time."""
        return self.batches.cat(lambda some: predict(self.model, x(some)).logits, rows)

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits of ``rows``, queried once."""
        return self.logits_at(self.x, self.rows)

    def attack(
        self,
        name: str,
        rows: Tensor,
        score: Loss,
        noise_stream: int,
        *,
        threat: Threat | None = None,
        model: Model | None = None,
        dtype: torch.dtype | None = None,
        target: Tensor | None = None,
        draw: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """Run an attack and verify its candidates on the model itself, in its own precision.

        Args:
            name: a key of ATTACKS.
            rows: (n,) samples; one may occur several times.
            score: what the attack maximises.
            noise_stream: a key of AuditStream.
            threat: if not that of the evaluation; nothing is kept as a witness then.
            model: what the attack queries, if not the model.
            dtype: of the images given to the attack.
            target: (n,) classes, for attacks that take them.
            draw: (n,) int64, a number for each time that a sample occurs, so that its noise differs.
            settings: other keyword arguments of the attack.

        Returns:
            (n,) bool, which samples it broke.
        """
        if len(rows) == 0:
            return torch.zeros(0, dtype=torch.bool, device=rows.device)
        noise = self.noise[rows].fold(noise_stream)
        noise = noise if draw is None else noise.fold_each(draw)

        def broken(some: Tensor) -> Tensor:
            x = self.x(rows[some])
            x_adv = ATTACKS[name].attack(
                model or self.attack_model,
                x if dtype is None else x.to(dtype),
                self.y(rows[some]),
                threat or self.threat,
                score=score,
                noise=noise[some],
                **({} if target is None else {"target": target[some]}),
                **settings,
            )
            return self.verify_candidates(rows[some], x, x_adv.to(x.dtype), threat)

        return self.batches.cat(broken, all_rows(rows))

    def verify_candidates(self, rows: Tensor, x: Tensor, x_adv: Tensor, threat: Threat | None = None) -> Tensor:
        """Query the model at the candidates. Those in the evaluation's threat that break a survivor become witnesses.

        Returns:
            (n,) bool: in the threat and misclassified.
        """
        judged = judge_candidates(self.model, x_adv, x, self.y(rows), threat or self.threat, self.votes)
        new = judged.broken & ~self.broken[rows]
        if threat is None and bool(new.any()):
            new = _first_of_each(rows, torch.nonzero(new)[:, 0])
            self.witnesses.append(Witnesses(rows[new], x_adv[new], judged.margin[new], judged.prediction[new]))
            self.broken[rows[new]] = True
        return judged.broken

    def found(self) -> tuple[Tensor, Iterator[Tensor]]:
        """(labels, images in batches) of all adversarial examples: those of the evaluation, then those of the audit."""
        rows = torch.nonzero(self.evaluation.broken_by >= 0)[:, 0].to(self.data.y.device)
        x_adv = chain(map(self.stored_x_adv, rows.split(BATCH)), (one.x_adv for one in self.witnesses))
        return self.y(torch.cat([rows, *(one.rows for one in self.witnesses)])), x_adv

    def gradient(self, score: Loss, x: Tensor, rows: Tensor) -> Tensor:
        """d score / d x at images x that belong to these samples; all at once."""
        return score_and_grad(self.model, x, score, self.y(rows))[2]

    @cached_property
    def points(self) -> Points:
        """Points of the threat at which the model is queried in several ways, with its first answers."""
        rows, survivors = self.rows[:POINTS], self.survivors[:POINTS]
        attacked = torch.cat([survivors, rows])[:POINTS]

        def ascended(rows: Tensor) -> Tensor:
            return ATTACKS["pgd"].attack(
                self.attack_model, self.x(rows), self.y(rows), self.threat, score=self.matched, iterate="last",
                noise=self.noise[rows].fold(AuditStream.POINTS_ASCENT), steps=10, step_size=self.threat.eps / 4,
            )  # fmt: skip

        start = self.threat.random_start(self.x(rows), self.noise[rows].fold(AuditStream.POINTS_START))
        parts = [self.x(rows), start, self.stored_x_adv(survivors), self.batches.cat(ascended, attacked)]
        x = torch.cat(parts)
        return Points(x, self.logits(x), [len(part) for part in parts], torch.cat([rows, rows, survivors, attacked]))

    @cached_property
    def float64_model(self) -> Model | str:
        """A copy of the model in float64, its passes counted with the others; or why there is none."""
        if not isinstance(self.raw_model, nn.Module):
            return "the model is a function: it cannot be converted to float64"
        try:
            model = CountingModel(copy.deepcopy(self.raw_model).double(), self.model)
            dtype = self._float64_dtype(model)
        except Exception as error:  # whatever the network's own code raises
            if out_of_memory(error):
                raise
            return f"{FLOAT32_INSIDE}: in float64 it fails with {type(error.__cause__ or error).__name__}"
        return model if dtype == torch.float64 else f"{FLOAT32_INSIDE}: its logits are {dtype}"

    def attack_in_float64(
        self, name: str, rows: Tensor, score: Loss, noise_stream: int, **settings: Any
    ) -> Tensor | str:
        """As ``attack``, on the copy in float64; or why there is none. No such attack may end an audit."""
        model = self.float64_model
        if isinstance(model, str):
            return model
        try:
            return self.attack(name, rows, score, noise_stream, model=model, dtype=torch.float64, **settings)
        except UserError as error:
            return f"{FLOAT32_INSIDE}: in float64 it fails with {type(error.__cause__ or error).__name__}"

    def _float64_dtype(self, model: CountingModel) -> torch.dtype:
        """The type of the logits for float64 images, asked without and with gradients as attacks do."""
        x = self.x(self.rows[:2]).double()
        _, value, _ = score_and_grad(model, x, negative_log_odds, self.y(self.rows[:2]))
        return value.dtype

    @cached_property
    def broken_by_cross_entropy(self) -> Tensor:
        """Which of ``rows`` PGD-10 on F.cross_entropy breaks: the baseline for other scores."""
        return self.pgd10(cross_entropy)

    @property
    def pgd10_settings(self) -> dict[str, Any]:
        """Ten PGD steps of eps/4."""
        return {"steps": 10, "step_size": self.threat.eps / 4}

    def pgd10(self, score: Loss, **settings: Any) -> Tensor:
        """Which of ``rows`` ten PGD steps of eps/4 on a score break, from the same start for every score."""
        return self.attack("pgd", self.rows, score, AuditStream.PGD10, **{**self.pgd10_settings, **settings})


def _first_of_each(rows: Tensor, places: Tensor) -> Tensor:
    """Of these places, the first one of each sample."""
    samples, which = rows[places].unique(return_inverse=True)
    return places.new_full(samples.shape, len(rows)).scatter_reduce(0, which, places, "amin")


def rescaled_cross_entropy(out: Outputs | Tensor, y: Tensor) -> Tensor:
    """F.cross_entropy of logits divided by the difference of the top two, so that their scale cancels.

    Args:
        out: Outputs or (N, K) logits.
        y: (N,) labels.

    Returns:
        (N,).

    Source: MIFPE, Yu 2023.
    """
    z = logits_of(out)
    top = z.detach().topk(2, dim=1).values
    return F.cross_entropy(z / (top[:, :1] - top[:, 1:]).clamp_min(1e-12), y, reduction="none")
