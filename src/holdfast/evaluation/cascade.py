"""One evaluation under way: the columns, the stages that fill them, what is kept on disk, who shares the work."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from ..attacks import ATTACKS, N_NEAREST, N_RANDOM, Stage
from ..attacks.base import all_rows
from ..attacks.minimal_norm import scores_and_grads
from ..bounds import certify
from ..data import Data, pixels
from ..errors import UserError
from ..io import load_tensors, save_tensors
from ..losses import Loss, negative_margin
from ..noise import Noise
from ..outputs import Model, out_of_memory
from ..queries import (
    EOT_SAMPLES,
    VOTES,
    CountingModel,
    EOTModel,
    default_batch_size,
    is_misclassified,
    logits_differ,
    majority_vote,
    prefers_channels_last,
)
from ..results import SpotCheck
from ..threat import Threat, column
from .alone import column_of
from .budget import Budget
from .evaluation import MISCLASSIFIED, UNBROKEN, Evaluation, StageCost, sum_over_processes

Progress = Callable[[str, int, int, int], None]  # (stage, passes so far, passes expected in all, samples standing)
RECORD, RECORD_VERSION = "evaluation record", 3
STATE = ("costs", "chosen_for", "rest", "fast", "randomised")  # what a record holds beside columns
PREFLIGHT = 64  # samples that are asked twice before anything else
PLACES = 16  # more than a stage has targets
DRAW, AIM = 20_000, 30_000  # the streams of the sample of the drawn stages, and of random targets
LINEAR_FROM = 10  # with more classes than this, targets are ranked by linearised distance, not by logit
MANY = 20  # of which so many are looked at
# What a budget is spent on when the suite has ended: the nearest, by other scores, to more targets, from new starts.
MORE = (
    Stage("u", "apgd", settings={"steps": 100}, subset="nearest", share=0.3),
    Stage("targets", "apgd", "dlr", targets=4, settings={"steps": 50}, subset="nearest", share=0.3),
    Stage("md", "md", settings={"steps": 40}, subset="nearest", share=0.3),
    Stage("square", "square", "margin", settings={"steps": 200}, subset="nearest", share=0.1),
)


class Cascade:
    """The state of one evaluation: ``columns`` hold an entry per sample, on the device."""

    def __init__(
        self,
        *,
        model: CountingModel,
        data: Data,
        threat: Threat,
        stages: tuple[Stage, ...],
        individual: dict[str, str],
        scores: dict[str, Loss],
        seed: int,
        batch_size: int | None,
        budget: Budget | None,
        progress: Progress | None,
    ) -> None:
        if len(data) == 0:
            raise UserError("there is nothing to evaluate: the set is empty.")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}.")
        self.model, self.data, self.threat, self.scores = model, data, threat, scores
        self.stages, self.individual, self.budget, self.progress = list(stages), individual, budget, progress
        # Memory may halve the first; processes deal batches of the second, which stays.
        self.batch_size = self.dealt = batch_size or default_batch_size(data.x)
        self.noise = Noise(seed, data.index)
        self.costs = [StageCost("clean"), *(StageCost(stage.name) for stage in stages)]
        self.votes, self.over = 1, False
        self.chosen_for, self.ended, self.rest = -1, 0, 0  # stage under way, stages ended, survivors beyond the near
        self.record: Path | None = None
        self.save_after = time.perf_counter() + 5.0
        shared = distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)

    # ------------------------------------------------------------------------------------------------------- beginning

    def begin(self, record: Path | None, key: str) -> None:
        """The clean pass, or what a record kept of an evaluation of the same thing."""
        if record is not None and self.world > 1:
            record = record.with_suffix(f".{self.rank}-of-{self.world}{record.suffix}")
        self.record = record
        self.about = {
            "key": key,
            "threat": self.threat.describe(),
            "stages": json.loads(json.dumps([asdict(stage) for stage in self.stages])),
            "matched": getattr(self.scores["matched"], "__name__", repr(self.scores["matched"])),
            "seed": self.noise.seed,
            "n": len(self.data),
        }
        self._check_pixels()
        if record is not None and record.exists():
            tensors, about = load_tensors(record, RECORD, RECORD_VERSION)
            costs, self.chosen_for, self.rest, fast, randomised = (about.pop(name) for name in STATE)
            if about != self.about:
                raise UserError(f"{record} belongs to another evaluation. Name another folder, or delete the file.")
            self.columns = {name: tensor.to(self.data.y.device) for name, tensor in tensors.items()}
            self.costs = [StageCost(**cost) for cost in costs]
            self._more_stages(len(self.costs) - 1)
            self._ask(fast, randomised)
        else:
            self._clean()
        if self.world > 1:
            self._agree()

    def _check_pixels(self) -> None:
        x = self.data.x
        lowest, highest = float(x.min()), float(x.max())
        scale = 255.0 if x.dtype == torch.uint8 else 1.0
        if not (self.threat.lo <= lowest / scale + 1e-6 and highest / scale - 1e-6 <= self.threat.hi):
            raise UserError(
                f"images must lie in the threat's box [{self.threat.lo}, {self.threat.hi}], these reach from "
                f"{lowest / scale:.4g} to {highest / scale:.4g}. Normalisation belongs inside the model."
            )

    def _preflight(self) -> tuple[bool, bool]:
        """Ask a few images twice: which memory order may the model be asked in, and is it randomised?"""

        def ask(rows: Tensor) -> tuple[bool, bool]:
            x = pixels(self.data.x[rows])
            first, second = self.model(x).logits, self.model(x).logits
            numbers = first.isfinite().all(1) & second.isfinite().all(1)
            randomised = bool((logits_differ(first, second) & numbers).any())
            return not randomised and prefers_channels_last(self.model, x, first), randomised

        with torch.no_grad():
            answers = self._each(all_rows(self.data.y)[:PREFLIGHT], ask)
        return all(fast for fast, _ in answers), any(randomised for _, randomised in answers)

    def _ask(self, fast: bool, randomised: bool) -> None:
        """From now on the model is asked like this: by attacks, ``climbed``; for a verdict, ``votes`` times."""
        self.fast, self.votes = fast, VOTES if randomised else 1
        asked = CountingModel(self.model.model, self.model, channels_last=True) if fast else self.model
        self.climbed: Model = EOTModel(asked, EOT_SAMPLES) if randomised else asked

    def _clean(self) -> None:
        x, y = self.data.x, self.data.y
        began = time.perf_counter()
        self._ask(*self._preflight())
        with torch.no_grad():
            answers = self._each(all_rows(y), lambda rows: majority_vote(self.model, pixels(x[rows]), self.votes))
        z, votes = (torch.cat(parts) for parts in zip(*answers, strict=True))
        if z.shape[1] < 2 or int(y.max()) >= z.shape[1] or int(y.min()) < 0:
            raise UserError(
                f"the model returns {z.shape[1]} logits and the labels go from {int(y.min())} to {int(y.max())}: "
                "they must lie in 0 .. K-1, with K >= 2."
            )
        if not bool(z.isfinite().all()):
            bad = int((~z.isfinite().all(1)).sum())
            raise UserError(
                f"the model's clean logits are NaN or infinite on {bad} of {len(y)} samples: nothing to judge."
            )
        right = votes.gather(1, y[:, None])[:, 0] > self.votes / 2
        margin = -negative_margin(z, y)
        self.columns = {
            "prediction": votes.argmax(1),
            "margin": margin,
            "clean": right,
            **{column_of(stage): right.clone() for stage in self.stages if stage.individual},
            "broken_by": torch.where(right, UNBROKEN, MISCLASSIFIED),
            "margin_adv": margin.clone(),
            "prediction_adv": votes.argmax(1),
            "x_adv": pixels(x).clone(),
            "targets": self._targets(z),
            "done": torch.zeros_like(y),  # places in the order of stages and targets that this sample is through with
            "chosen": right.clone(),  # whom the stage under way attacks
            "spot_check": torch.zeros_like(y),  # in the sample of the drawn stages: 1 near, 2 far
        }
        if any(stage.target for stage in self.stages):  # one wrong class of each sample, all as likely
            drawn = self.noise.fold(AIM).integers(z.shape[1] - 1)
            self.columns["aim"] = drawn + (drawn >= y)
        proved = self._certified()
        if proved is not None:
            self.columns["certified"] = proved & right
        self._cost(0, began)

    def _certified(self) -> Tensor | None:
        """What is proved of each sample, (N,) bool; None where no bound is known, or the model answers by chance."""
        if self.votes > 1:
            return None
        return certify(self.model.model, pixels(self.data.x), self.data.y, self.threat)

    def _targets(self, z: Tensor) -> Tensor:
        """The wrong classes, likeliest first, (N, at most 9): by logit; among many classes by linearised distance."""
        y, k = self.data.y, z.shape[1]
        ranked = z.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        if k <= LINEAR_FROM:
            return ranked[:, : min(9, k - 1)].contiguous()
        ranked = ranked[:, : min(MANY, k - 1)]

        def nearest(rows: Tensor) -> Tensor:  # Melamed et al. 2024, MALT
            classes, own = ranked[rows], y[rows][:, None]
            _, gaps, grads = scores_and_grads(
                self.climbed, pixels(self.data.x[rows]), lambda z: z.gather(1, classes) - z.gather(1, own)
            )
            steep = torch.stack([self.threat.dual_size(grad) for grad in grads.unbind(1)], 1)
            away = (-gaps / steep.clamp_min(1e-30)).nan_to_num(torch.inf)
            return classes.gather(1, away.argsort(dim=1, stable=True)[:, :9])

        with torch.enable_grad():
            return torch.cat(self._each(all_rows(y), nearest))

    # ------------------------------------------------------------------------------------------------------- the stages

    def all_stages(self) -> None:
        """Every stage in turn; with a budget, then further rounds until it is spent or nothing stands."""
        while self.ended < len(self.stages) and not self.over:
            self._stage(self.ended)
            self.ended += not self.over
            if self.budget is not None and self.ended == len(self.stages) and self._standing():
                self._more_stages(self.ended + 1)

    def _more_stages(self, count: int) -> None:
        """Stages beyond the suite's, up to so many: what a budget is spent on when the suite has ended."""
        base, more = len(self.about["stages"]), [one for one in MORE if self.threat.norm in ATTACKS[one.attack].norms]
        while len(self.stages) < count:
            turn, place = divmod(len(self.stages) - base, len(more))
            self.stages.append(replace(more[place], name=f"more {turn + 1}: {more[place].name}"))
        while len(self.costs) < len(self.stages) + 1:
            self.costs.append(StageCost(self.stages[len(self.costs) - 1].name))

    def _stage(self, number: int) -> None:
        """Run one stage on the samples due, those first that are nearest to a mistake."""
        if number < self.chosen_for:  # a record says that it has ended
            return
        stage, c = self.stages[number], self.columns
        self._choose(number)
        for rank in range(self._targets_of(stage)):
            due = c["chosen"] if stage.individual else c["chosen"] & (c["broken_by"] == UNBROKEN)
            rows = torch.nonzero(due & (c["done"] <= number * PLACES + rank))[:, 0]
            if len(rows):
                rows = rows[c["margin_adv"][rows].argsort(stable=True)]
                self._each(self._mine(rows), partial(self._attack, number, rank), self._allowed(number))
                if self.world > 1:
                    self._share(rows)
            if self.over:
                break

    def _each(
        self, rows: Tensor, work: Callable[[Tensor], Any], allowed: Callable[[], float] = lambda: math.inf
    ) -> list[Any]:
        """work(batch) of each batch of these rows. Where memory runs out, batches are halved and go on being halved."""
        answers = []
        while len(rows):
            size = int(min(self.batch_size, allowed(), len(rows)))
            if size < 1:
                self.over = True
                break
            try:
                answers.append(work(rows[:size]))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(f"memory ran out on a single image: {error}") from error
                self.batch_size = max(1, size // 2)
                if rows.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            rows = rows[size:]
        return answers

    def _allowed(self, number: int) -> Callable[[], float]:
        """How many samples the rest of the budget still pays for; what stands alone is always paid for."""
        stage, budget = self.stages[number], self.budget
        if budget is None or stage.individual:  # half of a column would be a wrong number
            return lambda: math.inf
        each = stage.passes(self.classes) / self._targets_of(stage) * (EOT_SAMPLES if self.votes > 1 else 1)

        def left() -> float:
            spent, seconds = self._spent(), sum(cost.seconds for cost in self.costs)
            passes = budget.passes / self.world - spent
            return min(passes, (budget.seconds - seconds) * spent / max(seconds, 1e-9)) / each

        return left

    def _choose(self, number: int) -> None:
        """Whom the stage attacks, decided once, when it begins: a resumed stage finds the choice in its record."""
        if self.chosen_for == number:
            return
        stage, c = self.stages[number], self.columns
        stands = c["broken_by"] == UNBROKEN
        nobody = torch.zeros_like(stands)
        if stage.individual:
            chosen = c["clean"]
        elif stage.round > 1 and not bool(self._hit(lambda other: other.round == stage.round - 1).any()):
            chosen = nobody
        elif stage.subset == "nearest":
            chosen = self._nearest(stands, stage.share)
        elif stage.subset == "sampled":
            if not bool(c["spot_check"].any()):
                self._draw(stands)
            chosen = c["spot_check"] > 0
        elif stage.subset == "escalated":
            fell = c["spot_check"][self._hit(lambda other: other.subset == "sampled")]
            near, far = bool((fell == 1).any()), bool((fell == 2).any())
            chosen = stands if far else self._nearest(stands, stage.share) if near else nobody
            chosen = chosen & (c["spot_check"] == 0)  # those have been through it
        else:
            chosen = stands
        c["chosen"], self.chosen_for = chosen.clone(), number

    def _hit(self, which: Callable[[Stage], bool]) -> Tensor:
        """(N,) bool: broken by one of these stages."""
        by = self.columns["broken_by"]
        return torch.isin(by, torch.tensor([k for k, one in enumerate(self.stages) if which(one)]).to(by))

    def _nearest(self, stands: Tensor, share: float) -> Tensor:
        rows = torch.nonzero(stands)[:, 0]
        count = max(math.ceil(share * len(rows)), N_NEAREST)
        chosen = torch.zeros_like(stands)
        chosen[rows[self.columns["margin_adv"][rows].argsort(stable=True)[:count]]] = True
        return chosen

    def _draw(self, stands: Tensor) -> None:
        """The sample of the drawn stages: the nearest, and others by the samples' own noise."""
        near = self._nearest(stands, 1e-9)
        far = torch.nonzero(stands & ~near)[:, 0]
        lot = self.noise[far].fold(DRAW).uniform(()).argsort(stable=True)
        self.columns["spot_check"][near] = 1
        self.columns["spot_check"][far[lot[:N_RANDOM]]] = 2
        self.rest = len(far)

    def _attack(self, number: int, rank: int, batch: Tensor) -> None:
        stage, c = self.stages[number], self.columns
        began = time.perf_counter()
        x, y = pixels(self.data.x[batch]), self.data.y[batch]
        aimed: dict[str, Tensor] = {}
        if stage.target or stage.targets:
            aimed["target"] = c["aim"][batch] if stage.target else c["targets"][batch, rank]
        noise = self.noise[batch].fold(number if stage.noise_stream is None else stage.noise_stream, rank)
        x_adv = ATTACKS[stage.attack].attack(
            self.climbed, x, y, self.threat, score=self.scores[stage.score], noise=noise,
            **stage.keywords(self.threat.eps), **aimed,
        )  # fmt: skip
        broken, outside = self._judge(number, batch, x, y, x_adv)
        c["done"][batch] = number * PLACES + rank + 1
        self._cost(number + 1, began, attacked=len(batch) if rank == 0 else 0, broken=broken, outside=outside)
        self.save()
        if self.progress is not None and self.rank == 0:
            spent = self._spent()
            self.progress(stage.name, spent, spent + self._planned(number, rank), self._standing())

    def _judge(self, number: int, rows: Tensor, x: Tensor, y: Tensor, x_adv: Tensor) -> tuple[int, int]:
        """Measure the candidates afresh: in the threat, and misclassified by one more answer, or by most of many."""
        c = self.columns
        with torch.no_grad():
            logits, votes = majority_vote(self.model, x_adv, self.votes)
        inside = self.threat.violation(x_adv, x) == 0
        broken = is_misclassified(votes, y, self.votes) & inside
        margin = -negative_margin(logits, y)
        if self.stages[number].individual:
            c[column_of(self.stages[number])][rows] &= ~broken
        stood = c["broken_by"][rows] == UNBROKEN
        newly = broken & stood
        lower = inside & logits.isfinite().all(1) & (newly | (margin < c["margin_adv"][rows]))
        if self.votes > 1:  # a mean margin is no proof: what the votes have broken keeps its witness
            lower &= newly | stood
        c["x_adv"][rows] = torch.where(column(lower, x), x_adv, c["x_adv"][rows])
        c["margin_adv"][rows] = torch.where(lower, margin, c["margin_adv"][rows])
        c["prediction_adv"][rows] = torch.where(lower, votes.argmax(1), c["prediction_adv"][rows])
        c["broken_by"][rows] = torch.where(newly, number, c["broken_by"][rows])
        return int(newly.sum()), int((~inside).sum())

    # ------------------------------------------------------------------------------------------------------ the account

    @property
    def classes(self) -> int:
        """At least as many as matter for the cost of a stage."""
        return self.columns["targets"].shape[1] + 1

    def _targets_of(self, stage: Stage) -> int:
        return max(1, min(stage.targets, self.classes - 1))

    def _standing(self) -> int:
        return int((self.columns["broken_by"] == UNBROKEN).sum())

    def _spent(self) -> int:
        return sum(cost.forwards + cost.backwards for cost in self.costs)

    def _planned(self, number: int, rank: int) -> int:
        """Passes that are still to come if nothing more is broken, in this stage and in the others."""
        stands, right, c = self._standing(), int(self.columns["clean"].sum()), self.columns
        due = c["chosen"] if self.stages[number].individual else c["chosen"] & (c["broken_by"] == UNBROKEN)
        now = self.stages[number]
        each = now.passes(self.classes) / self._targets_of(now)
        waiting = int((due & (c["done"] <= number * PLACES + rank)).sum())
        planned = each * (waiting + int(due.sum()) * (self._targets_of(now) - rank - 1))
        for stage in self.stages[number + 1 :]:
            many = {
                "survivors": stands,
                "nearest": 0 if stage.round > 1 else min(stands, max(N_NEAREST, math.ceil(stage.share * stands))),
                "sampled": min(stands, N_NEAREST + N_RANDOM),
                "escalated": 0,
            }[stage.subset]
            planned += stage.passes(self.classes) * (right if stage.individual else many)
        return round(planned * (EOT_SAMPLES if self.votes > 1 else 1))

    def _cost(self, place: int, began: float, **counts: int) -> None:
        model, cost = self.model, self.costs[place]
        counts |= {"forwards": model.forwards, "backwards": model.backwards, "nonfinite": int(model.nonfinite)}
        model.forwards = model.backwards = model.nonfinite = 0
        added = {name: getattr(cost, name) + count for name, count in counts.items()}
        self.costs[place] = replace(cost, seconds=cost.seconds + time.perf_counter() - began, **added)

    def save(self, *, force: bool = False) -> None:
        began = time.perf_counter()
        if self.record is not None and (force or began > self.save_after):
            costs = [vars(cost) for cost in self.costs]
            state = dict(zip(STATE, (costs, self.chosen_for, self.rest, self.fast, self.votes > 1), strict=True))
            save_tensors(self.record, RECORD, RECORD_VERSION, self.columns, {**self.about, **state})
            ended = time.perf_counter()
            self.save_after = ended + max(5.0, 20 * (ended - began))  # at most a twentieth of the time goes to saving

    # --------------------------------------------------------------------------------------------------- many processes

    def _mine(self, rows: Tensor) -> Tensor:
        """This process's part of the rows: whole batches, dealt in turn, so that batches are those of one process."""
        return torch.cat([rows[:0], *rows.split(self.dealt)[self.rank :: self.world]])

    def _share(self, rows: Tensor) -> None:
        """After a stage's turn at a target: everybody learns what the others found, and whether a budget is spent."""
        mine, kept = self._mine(rows), [column_of(one) for one in self.stages if one.individual]
        names = ["x_adv", "margin_adv", "prediction_adv", "broken_by", "done", *kept]
        news: list[Any] = [None] * self.world
        told = mine.cpu(), {name: self.columns[name][mine].cpu() for name in names}, self.over
        distributed.all_gather_object(news, told)
        for theirs, found, over in news:
            for name, values in found.items():
                self.columns[name][theirs.to(rows.device)] = values.to(rows.device)
            self.over |= over

    def _agree(self) -> None:
        """When processes begin, from records that were cut at different moments: the furthest of each sample counts."""
        news: list[Any] = [None] * self.world
        columns = {name: tensor.cpu() for name, tensor in self.columns.items()}
        distributed.all_gather_object(news, (columns, self.chosen_for, self.rest, len(self.stages)))
        furthest = torch.stack([theirs["done"] for theirs, *_ in news]).argmax(0)
        for name, tensor in self.columns.items():
            every = torch.stack([theirs[name] for theirs, *_ in news])
            self.columns[name] = every[furthest, torch.arange(len(furthest))].to(tensor.device)
        last = max(news, key=lambda told: told[1])
        for name in ("chosen", "spot_check"):
            self.columns[name] = last[0][name].to(self.columns[name].device)
        self.chosen_for, self.rest = last[1], last[2]
        self._more_stages(max(told[3] for told in news))

    def answer(self) -> Evaluation:
        costs = self.costs
        if self.world > 1:
            news: list[Any] = [None] * self.world
            distributed.all_gather_object(news, costs)
            costs = [sum_over_processes(parts) for parts in zip(*news, strict=True)]
        never = {
            column_of(stage) for stage in self.stages[self.ended :] if stage.individual
        }  # a budget ended before them
        names = [f.name for f in fields(Evaluation) if f.name in {*self.columns} - {*never, "spot_check"}]
        kept: dict[str, Any] = {name: self.columns[name].cpu() for name in names}
        kept["individual"] = {name: self.columns[of].cpu() for name, of in self.individual.items() if of not in never}
        kept |= {"index": self.data.index.cpu(), "y": self.data.y.cpu(), "spot_check": self._drawn()}
        unfinished = self.ended < len(self.about["stages"])
        return Evaluation(self.threat, stages=tuple(costs), votes=self.votes, unfinished=unfinished, **kept)

    def _drawn(self) -> SpotCheck | None:
        """What became of the sample, if all its stages have ended."""
        last = max((k for k, stage in enumerate(self.stages) if stage.subset == "sampled"), default=self.ended)
        if last >= self.ended:
            return None
        place, hit = self.columns["spot_check"], self._hit(lambda stage: stage.subset == "sampled")
        near, far = place == 1, place == 2
        tried, fell = int(far.sum()), int((far & hit).sum())
        promoted = [k for k, stage in enumerate(self.stages) if stage.subset == "escalated"]
        if fell and promoted and promoted[-1] < self.ended:  # the rest has been through it as well
            tried, fell = self.rest, fell + int(self._hit(lambda stage: stage.subset == "escalated").sum())
        return SpotCheck(int(near.sum()), int((near & hit).sum()), tried, fell, self.rest)
