"""The cascade: attacks on survivors only; every candidate is measured and judged here, not by the attack it is from.

robust accuracy = share of samples that are right and that nothing tried has broken: a true upper bound
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attacks import ATTACKS, OWN_LOSS, PUBLISHED, SCORES, SUITES, Stage, cross_entropy
from .data import Data, pixels
from .errors import UserError, unknown
from .losses import Loss, negative_margin, score_of
from .noise import Noise
from .outputs import Model, Outputs, as_outputs, fooled, frozen_eval
from .storage import load_tensors, save_tensors
from .threat import Threat, column

Progress = Callable[[str, int, int, int], None]  # (stage, samples done, samples of the stage, samples standing)
RECORD, RECORD_VERSION = "evaluation record", 1
ALONE = {PUBLISHED.name: "published", OWN_LOSS.name: "own"}  # the stages with a column of their own in an Evaluation
STANDS, WRONG = -1, -2  # what ``broken_by`` says of a sample that no stage broke, and of one that was wrong already


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


@dataclass(frozen=True)
class Evaluation:
    """Per-sample columns, all (N,) on the CPU, and what each stage cost.

    index, y; prediction and margin (logit_y - largest other) of the clean image; clean: right; published: right on the
    last iterate of the published protocol, one attack alone; broken_by: the number of the stage that broke the sample,
    -1 none, -2 wrong already; margin_adv: the smallest margin seen among judged candidates; prediction_adv; x_adv:
    (N, C, H, W), the candidate with that margin, x itself where there is none; own: right on the last iterate of the
    published protocol on the trained loss itself, where the suite has that stage.
    ``robust`` is what stands at the end.
    """

    threat: Threat
    index: Tensor
    y: Tensor
    prediction: Tensor
    margin: Tensor
    clean: Tensor
    published: Tensor
    broken_by: Tensor
    margin_adv: Tensor
    prediction_adv: Tensor
    x_adv: Tensor
    stages: tuple[StageCost, ...]
    own: Tensor | None = None

    @property
    def robust(self) -> Tensor:
        """(N,) bool: right, and not broken by anything tried."""
        return self.broken_by == STANDS

    @property
    def forwards(self) -> int:
        return sum(stage.forwards for stage in self.stages)

    @property
    def backwards(self) -> int:
        return sum(stage.backwards for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


class Counted:
    """A model that counts, without reading the device: samples forward, gradients back, logits that are no numbers.

    ``into``: another one that keeps the counts. Raises UserError, with the model's own words, where it cannot answer.
    """

    def __init__(self, model: Model, into: Counted | None = None) -> None:
        self.model, self.counts = model, into or self
        self.forwards, self.backwards = 0, 0
        self.nonfinite: Tensor | int = 0

    def __call__(self, x: Tensor) -> Outputs:
        self.counts.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)  # a node of the graph: its gradient is seen once, however many outputs lead to it
            x.register_hook(self._returned)
        try:
            out = as_outputs(self.model(x))
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            shape = tuple(x.shape)
            raise UserError(
                f"the model cannot answer a batch of shape {shape} on {x.device}: {type(error).__name__}: {error} "
                "An evaluation asks for batches of any size from 1 up, on one device."
            ) from error
        if len(out.logits) != len(x) or out.logits.device != x.device:
            got = f"logits of shape {tuple(out.logits.shape)} on {out.logits.device}"
            raise UserError(f"the model answers a batch of shape {tuple(x.shape)} on {x.device} with {got}.")
        self.counts.nonfinite = self.counts.nonfinite + (~out.logits.detach().isfinite().all(1)).sum()
        return out

    def _returned(self, grad: Tensor) -> None:
        self.counts.backwards += len(grad)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """float32 that is float32: TF32 off on CUDA, no autocast; restored afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def evaluate(
    model: Model,
    data: Data,
    threat: Threat,
    suite: str | tuple[Stage, ...] = "standard",
    *,
    trained_with: Loss | None = None,
    seed: int = 0,
    batch_size: int = 512,
    record: Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Attack the model on these samples and say which of them it keeps.

    Args:
        model: images in the threat's box to logits or Outputs. data: the samples, uint8 or float in [0, 1].
        threat: what the adversary may do. suite: a key of SUITES, or stages; the published protocol always comes first.
        trained_with: the loss the network was trained with, default SCE; "matched" stages climb its score.
        seed: of the samples' noise; the answer does not depend on batch_size, but for the rounding of batched kernels.
        record: a file that the work is kept in: a killed evaluation goes on from there.
        key: what the record belongs to (weights, data); another key in the file is an error.
        progress: called after each batch.

    Returns an Evaluation. Raises UserError for an empty set, pixels outside the threat's box, labels without a logit,
    unknown suites, attacks or scores, and a model whose clean logits are not finite numbers.
    """
    stages = SUITES.get(suite) if isinstance(suite, str) else suite
    if stages is None:
        raise unknown("suite", str(suite), SUITES)
    stages = tuple(s for s in (PUBLISHED, *stages) if threat.norm in _attack(s.attack).norms)
    for stage in stages:  # a name that does not exist is found before any work is done
        if stage.score not in ("matched", "loss", *SCORES):
            raise unknown("score", stage.score, [*SCORES, "matched", "loss"])
        if stage.alone and stage.name not in ALONE:
            raise unknown("stage that stands alone", stage.name, ALONE)
    scores = {
        **SCORES,
        "matched": SCORES["u"] if trained_with is None else score_of(trained_with),
        "loss": trained_with or cross_entropy,
    }
    device = device_of(model, data)
    with exact_arithmetic(), frozen_eval(model):
        run = _Run(Counted(model), data.to(device), threat, stages, scores, seed, batch_size, progress)
        run.begin(record, key)
        for number in range(len(stages)):
            run.stage(number)
        run.save(force=True)
    return run.answer()


class _Run:
    """One evaluation under way: the columns, and the stages that fill them."""

    def __init__(
        self,
        model: Counted,
        data: Data,
        threat: Threat,
        stages: tuple[Stage, ...],
        scores: dict[str, Loss],
        seed: int,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        if len(data) == 0:
            raise UserError("there is nothing to evaluate: the set is empty.")
        self.model, self.data, self.threat, self.scores = model, data, threat, scores
        self.stages, self.batch_size, self.progress = stages, batch_size, progress
        self.noise = Noise(seed, data.index)
        self.costs = [StageCost("clean"), *(StageCost(stage.name) for stage in stages)]
        self.record: Path | None = None
        self.save_after = time.perf_counter() + 5.0

    def begin(self, record: Path | None, key: str) -> None:
        """The clean pass, or what a record kept of an evaluation of the same thing."""
        self.record = record
        self.about = {
            "key": key,
            "threat": self.threat.describe(),
            "stages": json.loads(json.dumps([stage.describe() for stage in self.stages])),
            "matched": getattr(self.scores["matched"], "__name__", repr(self.scores["matched"])),
            "seed": self.noise.seed,
            "n": len(self.data),
        }
        if record is not None and record.exists():
            tensors, about = load_tensors(record, RECORD, RECORD_VERSION)
            costs = about.pop("costs")
            if about != self.about:
                raise UserError(f"{record} belongs to another evaluation. Name another folder, or delete the file.")
            self.columns = {name: tensor.to(self.data.y.device) for name, tensor in tensors.items()}
            self.costs = [StageCost(**cost) for cost in costs]
        else:
            self._clean()

    def _clean(self) -> None:
        x, y = self.data.x, self.data.y
        lowest, highest = float(x.min()), float(x.max())
        scale = 255.0 if x.dtype == torch.uint8 else 1.0
        if not (self.threat.lo <= lowest / scale + 1e-6 and highest / scale - 1e-6 <= self.threat.hi):
            raise UserError(
                f"images must lie in the threat's box [{self.threat.lo}, {self.threat.hi}], these reach from "
                f"{lowest / scale:.4g} to {highest / scale:.4g}. Normalisation belongs inside the model."
            )
        began = time.perf_counter()
        with torch.no_grad():
            z = torch.cat([self.model(pixels(batch)).logits for batch in x.split(self.batch_size)])
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
        prediction = z.argmax(1)
        margin = -negative_margin(z, y)
        right = prediction == y
        ranked = z.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        self.columns = {
            "prediction": prediction,
            "margin": margin,
            "clean": right,
            **{ALONE[stage.name]: right.clone() for stage in self.stages if stage.alone},
            "broken_by": torch.where(right, STANDS, WRONG),
            "margin_adv": margin.clone(),
            "prediction_adv": prediction.clone(),
            "x_adv": pixels(x).clone(),
            "targets": ranked[:, : min(9, z.shape[1] - 1)].contiguous(),
            "done": torch.zeros_like(y),  # stages that this sample has been through
        }
        self.costs[0] = self._cost(self.costs[0], began)

    def stage(self, number: int) -> None:
        """Run one stage on the samples due: all that are right if it stands alone, else the survivors."""
        stage, c = self.stages[number], self.columns
        score, keywords = self.scores[stage.score], stage.keywords(self.threat.eps)
        for rank in range(max(1, min(stage.targets, c["targets"].shape[1]))):
            due = c["clean"] if stage.alone else c["broken_by"] == STANDS
            step = number * 16 + rank  # a place in the order of stages and targets
            rows = torch.nonzero(due & (c["done"] <= step))[:, 0]
            if len(rows) == 0:
                continue
            done = 0
            for batch in rows.split(self.batch_size):
                began = time.perf_counter()
                attacked = len(batch) if rank == 0 else 0
                x, y = pixels(self.data.x[batch]), self.data.y[batch]
                aimed = {"target": c["targets"][batch, rank]} if stage.targets else {}
                noise = self.noise[batch].fold(number if stage.stream is None else stage.stream, rank)
                x_adv = _attack(stage.attack).attack(
                    self.model, x, y, self.threat, score=score, noise=noise, **keywords, **aimed
                )
                broken, outside = self._judge(number, batch, x, y, x_adv)
                c["done"][batch] = step + 1
                self.costs[number + 1] = self._cost(
                    self.costs[number + 1], began, attacked=attacked, broken=broken, outside=outside
                )
                self.save()
                done += len(batch)
                if self.progress is not None:
                    standing = int((c["broken_by"] == STANDS).sum())
                    self.progress(stage.name, done, len(rows), standing)

    def _judge(self, number: int, rows: Tensor, x: Tensor, y: Tensor, x_adv: Tensor) -> tuple[int, int]:
        """Measure the candidates afresh: in the threat, and misclassified by one more forward pass."""
        c = self.columns
        with torch.no_grad():
            logits = self.model(x_adv).logits
        inside = self.threat.violation(x_adv, x) == 0
        broken = fooled(logits, y) & inside
        margin = -negative_margin(logits, y)
        if self.stages[number].alone:
            c[ALONE[self.stages[number].name]][rows] &= ~broken
        newly = broken & (c["broken_by"][rows] == STANDS)
        lower = inside & logits.isfinite().all(1) & (newly | (margin < c["margin_adv"][rows]))
        c["x_adv"][rows] = torch.where(column(lower, x), x_adv, c["x_adv"][rows])
        c["margin_adv"][rows] = torch.where(lower, margin, c["margin_adv"][rows])
        c["prediction_adv"][rows] = torch.where(lower, logits.argmax(1), c["prediction_adv"][rows])
        c["broken_by"][rows] = torch.where(newly, number, c["broken_by"][rows])
        return int(newly.sum()), int((~inside).sum())

    def _cost(self, cost: StageCost, began: float, **counts: int) -> StageCost:
        model = self.model
        counts |= {"forwards": model.forwards, "backwards": model.backwards, "nonfinite": int(model.nonfinite)}
        model.forwards = model.backwards = model.nonfinite = 0
        added = {name: getattr(cost, name) + count for name, count in counts.items()}
        return replace(cost, seconds=cost.seconds + time.perf_counter() - began, **added)

    def save(self, *, force: bool = False) -> None:
        began = time.perf_counter()
        if self.record is not None and (force or began > self.save_after):
            about = {**self.about, "costs": [vars(cost) for cost in self.costs]}
            save_tensors(self.record, RECORD, RECORD_VERSION, self.columns, about)
            ended = time.perf_counter()
            self.save_after = ended + max(5.0, 20 * (ended - began))  # at most a twentieth of the time goes to saving

    def answer(self) -> Evaluation:
        kept = {f.name: self.columns[f.name].cpu() for f in fields(Evaluation) if f.name in self.columns}
        kept |= {"index": self.data.index.cpu(), "y": self.data.y.cpu()}
        return Evaluation(self.threat, stages=tuple(self.costs), **kept)


def _attack(name: str) -> Any:
    if name not in ATTACKS:
        raise unknown("attack", name, ATTACKS)
    return ATTACKS[name]


def stored_x_adv(record: Path) -> Tensor:
    """x_adv of the evaluation that a record keeps, (N, C, H, W)."""
    return load_tensors(record, RECORD, RECORD_VERSION)[0]["x_adv"]


def device_of(model: Model, data: Data) -> torch.device:
    """Where the model's parameters are; the data's own device for a model without any."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next(parameters, data.x).device
