"""What transforms leave of a network's accuracy, sample by sample: each is tried, and its answer is asked afresh."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..data import Data, pixels
from ..data.arguments import AnyData, as_data, check_logits, note_assumptions
from ..errors import UserError
from ..evaluation import MISCLASSIFIED, UNBROKEN, StageCost
from ..io import content_hash, load_tensors, next_save, save_tensors, understood
from ..losses import negative_margin
from ..noise import EvaluationStream, Noise
from ..outputs import Model, frozen_eval
from ..progress import Progress, as_progress
from ..queries import (
    Batches,
    CountingModel,
    default_batch_size,
    device_of,
    exact_float32,
    is_misclassified,
    logits_differ,
    majority_vote,
)
from ..threat import Threat, check_images, column
from ..user_input import any_seed, of_type, typed, whole
from .corruptions import corrupt
from .patch import mask_of, worst_patch
from .spatial import move, worst_move
from .threats import Corrupted, Patch, Spatial, Transform, as_transforms, is_inside

CHECKPOINT, CHECKPOINT_VERSION = "transforms checkpoint", 1
PROBED = 32  # images that are asked twice


@dataclass(frozen=True)
class Transformed:
    """What one threat left of a model's accuracy. All tensors are on the CPU.

    Args:
        threat: the threat.
        index: (N,) int64, position of the sample in its data set.
        y: (N,) int64, label.
        prediction: (N,) int64, predicted class of the image as it is.
        margin: (N,), logit_y - largest other logit there.
        clean: (N,) bool, whether it is classified correctly.
        correct: kind of corruption -> (N,) bool, whether the corrupted image is classified correctly, whatever the
            clean one is; empty for other threats.
        broken_by: (N,) int64, which of ``stages`` broke the sample first; UNBROKEN or MISCLASSIFIED.
        margin_adv: (N,), the smallest margin found.
        prediction_adv: (N,) int64, the class predicted there.
        parameters: (N, P), what was found there: the number of the kind of corruption; degrees, pixels down and pixels
            right; or top and left of the patch.
        patches: (N, C, height, width), the values in the patch; (N, 0) for other threats.
        stages: cost of the clean pass, then of each kind of corruption, or of the search.
        seed: of the corruptions' noise.
    """

    threat: Transform
    index: Tensor
    y: Tensor
    prediction: Tensor
    margin: Tensor
    clean: Tensor
    correct: dict[str, Tensor]
    broken_by: Tensor
    margin_adv: Tensor
    prediction_adv: Tensor
    parameters: Tensor
    patches: Tensor
    stages: tuple[StageCost, ...]
    seed: int

    @property
    def robust(self) -> Tensor:
        """(N,) bool: classified correctly as it is, and with everything that was tried."""
        return self.broken_by == UNBROKEN

    @property
    def mean_accuracy(self) -> float | None:
        """The mean over kinds of the accuracy on all corrupted images; None for other threats."""
        shares = [float(correct.double().mean()) for correct in self.correct.values()]
        return sum(shares) / len(shares) if shares else None

    def x_adv(self, x: Tensor, rows: Tensor) -> Tensor:
        """The worst image found of some broken samples, made again.

        Args:
            x: (N, C, H, W), all images of the data.
            rows: (M,) int64.

        Returns:
            (M, C, H, W) float in [0, 1].
        """
        noise = corruption_noise(self.seed, self.index)
        return transformed(
            self.threat, pixels(x.cpu()[rows]).float(), noise[rows], self.parameters[rows], self.patches[rows]
        )


def corruption_noise(seed: int, index: Tensor) -> Noise:
    """The noise that an evaluation corrupts samples with.

    Args:
        seed: of the evaluation.
        index: (N,), the samples' own.
    """
    return Noise(seed, index).fold(EvaluationStream.TRANSFORMS)


def transformed(threat: Transform, x: Tensor, noise: Noise, parameters: Tensor, patches: Tensor) -> Tensor:
    """Images as a threat's parameters transform them: (N, C, H, W), within the threat.

    Args:
        threat: the threat.
        x: (N, C, H, W) float in [0, 1].
        noise: of these samples, for corruptions.
        parameters: (N, P), as in ``Transformed``.
        patches: (N, C, height, width), for a patch.
    """
    if isinstance(threat, Spatial):
        return move(x, parameters)
    if isinstance(threat, Patch):
        out = x.clone()
        out.masked_scatter_((mask_of(x, parameters, threat) > 0).expand_as(x), patches.clamp(0, 1))
        return out
    out = x.clone()
    for number, kind in enumerate(threat.kinds):
        rows = torch.nonzero(parameters[:, 0] == number)[:, 0]
        if len(rows):
            out[rows] = corrupt(x[rows], kind, threat.severity, noise=noise[rows])
    return out


@typed
def evaluate(
    model: Model,
    data: AnyData,
    threat: Any,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> tuple[Transformed, ...]:
    """Find out what transforms leave of a model's accuracy.

    Corruptions are applied to all samples. Rotations with translations, and patches, are searched for the worst one of
    each correctly classified sample, by ``worst_move`` and ``worst_patch``. What was found is made again from its
    parameters, so that it lies in the threat, and counts only if the model, asked afresh, is wrong about it. No bound
    is known: every accuracy in the worst case is an upper bound.

    Args:
        model: maps images in [0, 1] to logits or Outputs; the same answer every time.
        data: the samples, uint8 or float in [0, 1]: Data, (x, y), a DataLoader, a data set or its name.
        threat: a text such as "corruptions:3", "rotation:30,translation:3" or "patch:5x5"; or threats of this package.
        seed: of the noise. The same sample is corrupted in the same way whatever the batch.
        batch_size: >= 1; by default chosen by image size and device, and halved where memory runs out.
        checkpoint: file to save to; an interrupted call resumes from it.
        key: identifies the weights and data that the checkpoint belongs to.
        progress: called with (the threat, samples done, samples in all).

    Returns:
        One Transformed for each threat: five for "corruptions".

    Raises:
        UserError: a threat that cannot be read or does not fit the images, images outside [0, 1], labels without a
            logit, a model that answers the same image differently, a checkpoint of other work.

    >>> net = lambda x: torch.stack([x[:, 0, 0, 0], 0.5 - x[:, 0, 0, 0]], 1)  # one pixel decides
    >>> found = evaluate(net, (torch.ones(2, 1, 8, 8), [0, 0]), "patch:2x2")[0]
    >>> found.clean.tolist(), found.robust.tolist(), found.parameters.tolist()
    ([True, True], [False, False], [[0.0, 0.0], [0.0, 0.0]])
    """
    data, threats, report = as_data(data), as_transforms(threat), as_progress(progress)
    note_assumptions(data)
    of_type("key", key, str)
    check_data(data, threats)
    size = default_batch_size(data.x) if batch_size is None else whole("batch_size", batch_size, 1)
    data = data.to(device_of(model, data))
    with exact_float32(), frozen_eval(model), torch.no_grad():
        work = _Work(CountingModel(model, occurring=data.y.unique()), data, threats, any_seed(seed))
        work.check_answers(model)
        file = None if checkpoint is None else Path(checkpoint)
        work.run(Batches(size), file, key, report)
    return work.results()


def check_data(data: Data, threats: tuple[Transform, ...]) -> None:
    """Raise UserError where there are no samples, or images that a threat does not fit."""
    if not len(data):
        raise UserError("there is nothing to evaluate: the data set is empty.")
    check_images(data.x, Threat("linf", 0.1))
    c, h, w = data.x.shape[1:]
    for threat in threats:
        if why := threat.why_not((c, h, w)):
            raise UserError(f"{threat} does not suit images of {h}x{w} pixels: {why}.")


class _About(TypedDict):
    """What a checkpoint holds beside tensors."""

    identity: dict[str, Any]
    done: int
    costs: list[list[dict[str, Any]]]


class _Work:
    """The samples in order, in batches: what is known of them, and what it cost."""

    def __init__(self, model: CountingModel, data: Data, threats: tuple[Transform, ...], seed: int) -> None:
        self.model, self.data, self.threats, self.seed = model, data, threats, seed
        self.noise = corruption_noise(seed, data.index)
        self.done = 0
        n, (c, *_), device = len(data), data.x.shape[1:], data.y.device
        self.columns = {"prediction": torch.zeros(n, dtype=torch.int64, device=device)}
        self.columns |= {
            "margin": torch.zeros(n, device=device),
            "clean": torch.zeros(n, dtype=torch.bool, device=device),
        }
        self.costs: list[list[StageCost]] = []
        for number, threat in enumerate(threats):
            names = threat.kinds if isinstance(threat, Corrupted) else (str(threat),)
            self.costs.append([StageCost("clean"), *map(StageCost, names)])
            width = {Corrupted: 1, Spatial: 3, Patch: 2}[type(threat)]
            patch = (c, threat.height, threat.width) if isinstance(threat, Patch) else (0,)
            kinds = len(names) if isinstance(threat, Corrupted) else 0
            self.columns |= {
                f"{number}/correct": torch.zeros(n, kinds, dtype=torch.bool, device=device),
                f"{number}/broken_by": torch.full((n,), UNBROKEN, device=device),
                f"{number}/margin_adv": torch.zeros(n, device=device),
                f"{number}/prediction_adv": torch.zeros(n, dtype=torch.int64, device=device),
                f"{number}/parameters": torch.zeros(n, width, device=device),
                f"{number}/patches": torch.zeros(n, *patch, device=device),
            }

    def check_answers(self, model: Model) -> None:
        """Raise UserError where logits do not fit the labels, or the same image has two answers."""
        x = pixels(self.data.x[:PROBED]).float()
        first = self.model(x).logits
        check_logits(model, first, self.data, self.model.ruled_out)
        again = torch.cat([self.model(part).logits for part in (x[:1], x[1:]) if len(part)])
        if bool(logits_differ(first, again).any()):
            raise UserError(
                "the network answers the same image differently when it is asked again, in another batch: corruptions "
                "and the worst transform are of networks that do not. Look for dropout, noise, batch norm without "
                "running statistics."
            )

    def run(self, batches: Batches, path: Path | None, key: str, report: Progress) -> None:
        """All samples that are not done, saved as they come."""
        threats = [str(threat) for threat in self.threats]
        samples = content_hash(self.data.x, self.data.y, self.data.index)
        identity = {"key": key, "threats": threats, "seed": self.seed, "samples": samples}
        if path is not None and path.exists():
            self._load(path, identity)
        due, complete = next_save(time.perf_counter()), self.done == len(self.data)
        what = threats[0] if len(threats) == 1 else f"{threats[0]} to {self.threats[-1].describe()['eps']}"
        report(what, self.done, len(self.data))

        def step(rows: Tensor) -> None:
            nonlocal due
            costs = self._batch(rows)  # repeated as a whole where memory runs out
            self.costs = [
                [_sum(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(self.costs, costs, strict=True)
            ]
            self.done += len(rows)
            if path is not None and time.perf_counter() > due:
                began = time.perf_counter()
                self._save(path, identity)
                due = next_save(began)
            report(what, self.done, len(self.data))

        batches.map(torch.arange(self.done, len(self.data), device=self.data.y.device), step)
        if path is not None and not complete:
            self._save(path, identity)

    def _batch(self, rows: Tensor) -> list[list[StageCost]]:
        """Fill in the columns of these samples; what each stage cost."""
        x, y = self.data.pixels(rows).float(), self.data.y[rows]
        began, spent = time.perf_counter(), (self.model.forwards, self.model.backwards)
        logits, counts = majority_vote(self.model, x, 1)
        clean, margin = ~is_misclassified(counts, y, 1), -negative_margin(logits, y)
        if not bool(logits.isfinite().all()):
            raise UserError("the network's logits of images as they are are not finite: no accuracy means anything.")
        found = {"prediction": counts.argmax(1), "margin": margin, "clean": clean}
        first = self._cost("clean", len(rows), 0, began, spent)
        costs = []
        for number, threat in enumerate(self.threats):
            column_of = {
                name: self.columns[f"{number}/{name}"] for name in ("margin_adv", "prediction_adv", "broken_by")
            }
            column_of["margin_adv"][rows], column_of["prediction_adv"][rows] = margin, found["prediction"]
            column_of["broken_by"][rows] = torch.where(clean, UNBROKEN, MISCLASSIFIED)
            if isinstance(threat, Corrupted):
                costs.append([first, *self._corrupt(number, threat, rows, x, y)])
            else:
                costs.append([first, self._search(number, threat, rows, x, y, clean)])
        for name, values in found.items():
            self.columns[name][rows] = values
        return costs

    def _cost(self, name: str, attacked: int, broken: int, began: float, spent: tuple[int, int]) -> StageCost:
        forwards, backwards = self.model.forwards - spent[0], self.model.backwards - spent[1]
        seconds = time.perf_counter() - began
        return StageCost(name, attacked, broken, forwards, backwards, seconds, candidates=attacked)

    def _corrupt(self, number: int, threat: Corrupted, rows: Tensor, x: Tensor, y: Tensor) -> list[StageCost]:
        """Try each kind on all samples."""
        costs = []
        for place, kind in enumerate(threat.kinds):
            began, spent = time.perf_counter(), (self.model.forwards, self.model.backwards)
            x_adv = corrupt(x, kind, threat.severity, noise=self.noise[rows])
            parameters = torch.full_like(y, place)[:, None].float()
            wrong, newly = self._judge(number, place + 1, rows, x_adv, y, parameters)
            self.columns[f"{number}/correct"][rows, place] = ~wrong
            costs.append(self._cost(kind, len(rows), newly, began, spent))
        return costs

    def _search(
        self, number: int, threat: Spatial | Patch, rows: Tensor, x: Tensor, y: Tensor, clean: Tensor
    ) -> StageCost:
        """Search for the worst transform of the samples that are classified correctly."""
        began, spent = time.perf_counter(), (self.model.forwards, self.model.backwards)
        right = torch.nonzero(clean)[:, 0]
        rows, x, y, newly = rows[right], x[right], y[right], 0
        if len(rows):
            patches = self.columns[f"{number}/patches"]
            if isinstance(threat, Spatial):
                found = worst_move(self.model, x, y, threat)
            else:
                x_adv, found = worst_patch(self.model, x, y, threat, noise=self.noise[rows])
                inside = (mask_of(x, found, threat) > 0).expand_as(x)
                patches[rows] = x_adv.masked_select(inside).view(len(rows), *patches.shape[1:])
            if not is_inside(threat, found, x):
                raise UserError(
                    f"the search for {threat} left the threat: this is a fault of holdfast, please report it."
                )
            x_adv = transformed(threat, x, self.noise[rows], found, patches[rows])
            newly = self._judge(number, 1, rows, x_adv, y, found.float())[1]
        return self._cost(str(threat), len(rows), newly, began, spent)

    def _judge(
        self, number: int, stage: int, rows: Tensor, x_adv: Tensor, y: Tensor, parameters: Tensor
    ) -> tuple[Tensor, int]:
        """Ask afresh, and keep what has the smallest margin so far: (which are wrong, how many are newly broken)."""
        logits, counts = majority_vote(self.model, x_adv, 1)
        wrong, margin = is_misclassified(counts, y, 1), -negative_margin(logits, y)
        by, least = self.columns[f"{number}/broken_by"], self.columns[f"{number}/margin_adv"]
        predicted, kept = self.columns[f"{number}/prediction_adv"], self.columns[f"{number}/parameters"]
        better, newly = margin < least[rows], wrong & (by[rows] == UNBROKEN)
        better |= newly
        kept[rows] = torch.where(column(better, parameters), parameters, kept[rows])
        predicted[rows] = torch.where(better, counts.argmax(1), predicted[rows])
        least[rows] = torch.where(better, margin.to(least.dtype), least[rows])
        by[rows] = torch.where(newly, stage, by[rows])
        return wrong, int(newly.sum())

    def _save(self, path: Path, identity: dict[str, Any]) -> None:
        costs = [[vars(cost) for cost in costs] for costs in self.costs]
        about = {"identity": identity, "done": self.done, "costs": costs}
        save_tensors(path, CHECKPOINT, CHECKPOINT_VERSION, self.columns, about)

    def _load(self, path: Path, identity: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises UserError for one of other work."""
        tensors, about = load_tensors(path, CHECKPOINT, CHECKPOINT_VERSION, _About)
        if about["identity"] != identity:
            raise UserError(f"{path} belongs to another evaluation. Name another folder.")
        with understood(path):
            for name, values in self.columns.items():
                if tensors[name].shape != values.shape or tensors[name].dtype != values.dtype:
                    raise ValueError("columns of another shape")
                self.columns[name] = tensors[name].to(values.device)
            self.costs = [[StageCost(**cost) for cost in costs] for costs in about["costs"]]
            if not 0 <= about["done"] <= len(self.data):
                raise ValueError("a number of samples that there are not")
            self.done = about["done"]

    def results(self) -> tuple[Transformed, ...]:
        """One for each threat."""
        shared = {name: self.columns[name].cpu() for name in ("prediction", "margin", "clean")}
        own = ("broken_by", "margin_adv", "prediction_adv", "parameters", "patches")
        return tuple(
            Transformed(
                threat=threat,
                index=self.data.index.cpu(),
                y=self.data.y.cpu(),
                **shared,
                correct=dict(
                    zip(
                        threat.kinds if isinstance(threat, Corrupted) else (),
                        self.columns[f"{number}/correct"].cpu().unbind(1),
                        strict=True,
                    )
                ),
                **{name: self.columns[f"{number}/{name}"].cpu() for name in own},
                stages=tuple(self.costs[number]),
                seed=self.seed,
            )
            for number, threat in enumerate(self.threats)
        )


def _sum(a: StageCost, b: StageCost) -> StageCost:
    counts = {name: value + getattr(b, name) for name, value in vars(a).items() if name != "name"}
    return StageCost(a.name, **counts)
