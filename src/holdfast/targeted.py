"""Targeted robustness, class by class: which share of each class an attack turns into each other class."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import report, run_folder
from .attacks import apgd
from .data import Data
from .data.arguments import AnyData, as_data, check_logits, note_assumptions
from .errors import UserError
from .experiments.evaluate_model import ModelUnderTest, check_classes
from .io import content_hash, load_tensors, next_save, save_tensors, understood, write_atomic
from .losses import negative_margin
from .noise import Noise
from .outputs import Model, Outputs, Queried, frozen_eval
from .progress import Progress, as_progress
from .queries import Batches, CountingModel, default_batch_size, device_of, exact_float32, judge_candidates
from .results import percent
from .results.terminal import Printed
from .threat import Threat, as_threat, check_images
from .user_input import any_seed, typed, whole

if TYPE_CHECKING:
    import pandas as pd

CHECKPOINT, CHECKPOINT_VERSION = "targeted checkpoint", 1
STEPS = 50
MOST_STEPS = 10_000
MOST_CLASSES = 100  # each class is a target of every image
SHOWN_CLASSES, SHOWN_PAIRS = 12, 10  # of a table in a terminal


class OneTarget(Queried):
    """A model that tells one class from all others: logits of (any other class, the target).

    An untargeted attack on label 0 then ends where the target is predicted, and nowhere else.

    Args:
        model: what is attacked.
        target: the class.
    """

    def __init__(self, model: Model, target: int) -> None:
        super().__init__(model)
        self.target = target

    def __call__(self, x: Tensor) -> Outputs:
        """(N, ...) -> Outputs with (N, 2) logits."""
        z = super().__call__(x).logits
        hidden = torch.arange(z.shape[1], device=z.device) == self.target
        return Outputs(torch.stack([z.masked_fill(hidden, -torch.inf).amax(1), z[:, self.target]], 1))


@dataclass(frozen=True)
class TargetedMatrix:
    """Which classes each sample was turned into.

    Args:
        threat: the threat model.
        index: (N,) int64, position of the sample in its data set.
        y: (N,) int64, label.
        prediction: (N,) int64, predicted class of the clean image.
        reached: (N, K) bool, whether a point of the threat was found that is classified as each class; the clean image
            is one of them.
        classes: the names of the K classes.
        steps: of the attack.
        forwards: samples sent forward.
        backwards: input gradients computed.
        seconds: wall-clock time.
    """

    threat: Threat
    index: Tensor
    y: Tensor
    prediction: Tensor
    reached: Tensor
    classes: tuple[str, ...]
    steps: int
    forwards: int
    backwards: int
    seconds: float

    @property
    def counts(self) -> Tensor:
        """(K,) int64: how many samples each class has."""
        return torch.bincount(self.y, minlength=len(self.classes))

    @property
    def shares(self) -> Tensor:
        """(K, K) float64: the share of each class, a line, that was turned into each other, a column.

        NaN on the diagonal, and in the line of a class without samples. A lower bound of what the threat allows.
        """
        k = len(self.classes)
        counts = torch.zeros(k, k, dtype=torch.float64).index_add_(0, self.y, self.reached.double())
        shares = counts / self.counts[:, None]
        return shares.masked_fill(torch.eye(k, dtype=torch.bool), torch.nan)

    @property
    def any_other(self) -> Tensor:
        """(K,) float64: the share of each class that was turned into some other one; NaN where it has no samples."""
        k = len(self.classes)
        other = self.reached.scatter(1, self.y[:, None], torch.zeros_like(self.y, dtype=torch.bool)[:, None]).any(1)
        counts = torch.zeros(k, dtype=torch.float64).index_add_(0, self.y, other.double())
        return counts / self.counts

    def frame(self) -> pd.DataFrame:
        """``shares`` as a pandas frame: a line for each class, a column for each target."""
        import pandas as pd  # here, since it takes half a second

        return pd.DataFrame(self.shares.numpy(), index=list(self.classes), columns=list(self.classes))


class _About(TypedDict):
    """What a checkpoint holds beside tensors."""

    identity: dict[str, Any]
    done: int
    forwards: int
    backwards: int
    seconds: float


@typed
def targeted_matrix(
    model: Model,
    data: AnyData,
    threat: Threat | str,
    *,
    steps: int = STEPS,
    seed: int = 0,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> TargetedMatrix:
    """Try to turn every sample into every class.

    Auto-PGD maximises the logit of the target minus the largest other one, from one random start, until the target is
    predicted. What it returns counts only if the model, asked afresh, predicts the target there. Nothing is proved: a
    pair that was not reached may be reachable.

    Args:
        model: maps images in the threat's box to logits or Outputs.
        data: the samples, uint8 or float in [0, 1]: Data, (x, y), a DataLoader, a data set or its name.
        threat: the threat model, or its text, such as "linf:8/255".
        steps: of the attack, >= 1.
        seed: of the samples' noise.
        batch_size: >= 1; by default chosen by image size and device, and halved where memory runs out.
        checkpoint: file to save to after a target; an interrupted call resumes from it.
        key: identifies the weights and data that the checkpoint belongs to.
        progress: called with (what is being done, attacks done, attacks in all).

    Returns:
        The matrix, with tensors on the CPU.

    Raises:
        UserError: images outside the threat's box, labels without a logit, more than 100 classes, a checkpoint of other
            work.

    >>> net = lambda x: x.flatten(1)  # the largest pixel
    >>> data = (torch.tensor([[1.0, 0.8], [0.5, 1.0]]).view(2, 1, 1, 2), [0, 1])
    >>> targeted_matrix(net, data, "linf:0.15").reached.tolist()
    [[True, True], [False, True]]
    """
    data, threat, tell = as_data(data), as_threat(threat), as_progress(progress)
    note_assumptions(data, unit_box=(threat.lo, threat.hi) == (0, 1))
    if not len(data):
        raise UserError("there is nothing to attack: the data set is empty.")
    check_images(data.x, threat)
    whole("steps", steps, 1, MOST_STEPS)
    size = default_batch_size(data.x) if batch_size is None else whole("batch_size", batch_size, 1)
    data = data.to(device_of(model, data))
    counted, batches = CountingModel(model, occurring=data.y.unique()), Batches(size)
    rows, noise = torch.arange(len(data), device=data.y.device), Noise(any_seed(seed), data.index)
    samples = content_hash(data.x, data.y, data.index)
    identity = {"key": key, "threat": threat.describe(), "steps": steps, "seed": int(seed), "samples": samples}
    with exact_float32(), frozen_eval(model):
        with torch.no_grad():
            z = torch.cat(batches.map(rows, lambda some: counted(data.pixels(some).float()).logits))
        check_logits(model, z, data, counted.ruled_out)
        k, prediction = z.shape[1], z.argmax(1)
        if k > MOST_CLASSES:
            raise UserError(f"every class is a target of every image, for at most {MOST_CLASSES} classes, got {k}.")
        work = _Work(Path(checkpoint) if checkpoint else None, identity, counted, rows.new_zeros(len(data), k).bool())
        due = next_save(time.perf_counter())
        for target in range(work.done, k):
            tell(f"towards class {target}", target * len(data), k * len(data))
            reached = prediction == target
            attacked = rows[~reached & (data.y != target)]
            attack = partial(_attack, counted, data, threat, noise.fold(target), steps, target, reached)
            batches.map(attacked, attack)
            work.reached[:, target], work.done = reached, target + 1
            if time.perf_counter() > due or target == k - 1:
                began = time.perf_counter()
                work.save()
                due = next_save(began)
        tell("targeted attacks", k * len(data), k * len(data))
    forwards, backwards, seconds = work.cost
    names = data.classes or tuple(map(str, range(k)))
    return TargetedMatrix(
        threat, data.index.cpu(), data.y.cpu(), prediction.cpu(), work.reached.cpu(), names, steps, forwards, backwards,
        seconds,
    )  # fmt: skip


def _attack(
    model: CountingModel,
    data: Data,
    threat: Threat,
    noise: Noise,
    steps: int,
    target: int,
    reached: Tensor,
    rows: Tensor,
) -> None:
    """Attack these samples towards one class, and note which reached it."""
    x, y = data.pixels(rows).float(), torch.zeros_like(rows)
    x_adv = apgd(OneTarget(model, target), x, y, threat, score=negative_margin, noise=noise[rows], steps=steps)
    judged = judge_candidates(model, x_adv, x, data.y[rows], threat)
    reached[rows] = judged.inside & judged.finite & (judged.prediction == target)


class _Work:
    """What was reached so far, saved target by target."""

    def __init__(self, path: Path | None, identity: dict[str, Any], model: CountingModel, reached: Tensor) -> None:
        self.path, self.identity, self.model, self.reached, self.done = path, identity, model, reached, 0
        self.began, self.earlier, self.is_new = time.perf_counter(), (0, 0, 0.0), True
        if path is None or not path.exists():
            return
        tensors, about = load_tensors(path, CHECKPOINT, CHECKPOINT_VERSION, _About)
        if about["identity"] != identity:
            raise UserError(f"{path} belongs to other attacks. Name another folder.")
        with understood(path):
            if tensors["reached"].shape != reached.shape or not 0 <= about["done"] <= reached.shape[1]:
                raise ValueError("columns of another shape")
            self.reached, self.done = tensors["reached"].to(reached.device), about["done"]
        self.earlier, self.is_new = (about["forwards"], about["backwards"], about["seconds"]), False

    @property
    def cost(self) -> tuple[int, int, float]:
        """Forward passes, backward passes and seconds so far; those of an earlier call where all was done in it."""
        if not self.is_new and self.done == self.reached.shape[1] and not self.model.backwards:
            return self.earlier
        now = (self.model.forwards, self.model.backwards, time.perf_counter() - self.began)
        return (self.earlier[0] + now[0], self.earlier[1] + now[1], self.earlier[2] + now[2])

    def save(self) -> None:
        """Write the checkpoint."""
        if self.path is not None:
            forwards, backwards, seconds = self.cost
            about = {"identity": self.identity, "done": self.done, "forwards": forwards, "backwards": backwards}
            tensors = {"reached": self.reached}
            save_tensors(self.path, CHECKPOINT, CHECKPOINT_VERSION, tensors, {**about, "seconds": seconds})


def _pairs(found: TargetedMatrix) -> list[tuple[float, str, str]]:
    """(share, class, target) of each pair that was reached, the most frequent first."""
    shares, names = found.shares, found.classes
    pairs = [(float(shares[i, j]), names[i], names[j]) for i, j in torch.nonzero(shares > 0).tolist()]
    return sorted(pairs, key=lambda pair: -pair[0])


@typed
def sentence(found: TargetedMatrix) -> str:
    """What the matrix says: the pair that is reached most often, and the mean over pairs.

    Args:
        found: the matrix.

    Returns:
        Two or three sentences.
    """
    shares, pairs = found.shares, _pairs(found)
    if not pairs:
        return f"No sample was turned into another class under {found.threat}."
    share, name, target = pairs[0]
    other = found.any_other[~found.any_other.isnan()]
    return (
        f"Of a class, {percent(float(shares[~shares.isnan()].mean()))}% can be turned into a given other one under "
        f"{found.threat}, the mean over pairs; most easily {name} into {target} ({percent(share)}%). "
        f"{percent(float(other.mean()))}% of a class can be turned into some other one. These are lower bounds: what "
        "was not reached is not proved."
    )


@typed
def table(found: TargetedMatrix, name: str = "") -> Printed:
    """The matrix in percent, for a terminal; of more than 12 classes the pairs that are reached most often.

    Args:
        found: the matrix.
        name: the network's name.

    Returns:
        An object that ``rich`` prints.
    """
    caption = (
        f"targeted attacks{f' on {name}' if name else ''}, {found.threat}, {len(found.y)} samples: of each class (a "
        f"line) the percent that was turned into each other (a column); {found.forwards + found.backwards:,} passes"
    )
    if len(found.classes) > SHOWN_CLASSES:
        lines = [(f"{one} into {target}", percent(share)) for share, one, target in _pairs(found)[:SHOWN_PAIRS]]
        return Printed(("class into target", "%"), tuple(lines), caption)
    texts = [["-" if math.isnan(v) else f"{100 * v:.0f}" for v in line] for line in found.shares.tolist()]
    short = [report.short(one, 6) for one in found.classes]
    other = ["-" if math.isnan(v) else f"{100 * v:.0f}" for v in found.any_other.tolist()]
    columns = zip(found.classes, map(str, found.counts.tolist()), texts, other, strict=True)
    return Printed(
        ("class", "n", *short, "any"), tuple((one, n, *line, last) for one, n, line, last in columns), caption
    )


@typed
def figure(found: TargetedMatrix, name: str = "") -> Figure:
    """Draw the matrix: a line for each class, a column for each target.

    Args:
        found: the matrix.
        name: the network's name, for the title.

    Returns:
        The matplotlib figure.
    """
    shares, k = 100 * found.shares.numpy(), len(found.classes)
    names = [report.short(one, 10) for one in found.classes]
    with report.style():
        canvas = Figure(figsize=(5.6, 5.2), layout="constrained")
        ax = canvas.subplots()
        ax.imshow(shares, cmap=report.fading(report.PGD50), vmin=0, vmax=140)  # faint below the numbers
        if k <= SHOWN_CLASSES:
            for (line, at), value in np.ndenumerate(shares):
                if not np.isnan(value):
                    ax.text(at, line, f"{value:.0f}", ha="center", va="center", fontsize=7, color=report.INK)
        step = max(1, k // 25)
        ax.set_xticks(range(0, k, step), names[::step], fontsize=7, rotation=90 * (k > SHOWN_CLASSES))
        lines = [f"{one} (n={n})" for one, n in zip(names, found.counts.tolist(), strict=True)]
        ax.set_yticks(range(0, k, step), lines[::step], fontsize=7)
        ax.tick_params(length=0)
        ax.set_xlabel("turned into, % of the class")
        ax.set_ylabel("class")
        ax.set_title(f"{name + ', ' if name else ''}{found.threat}", fontweight="bold")
    return canvas


@typed
def save(found: TargetedMatrix, folder: str | Path, name: str = "", about: dict[str, Any] | None = None) -> list[Path]:
    """Write targeted.json, targeted.csv, targeted.svg, targeted.png and targeted.pdf.

    Args:
        found: the matrix.
        folder: an existing folder.
        name: the network's name, for the figure's title.
        about: what else the JSON says, such as network and data.

    Returns:
        The files.
    """
    folder = Path(folder)
    text = json.dumps(
        {
            **(about or {}), "threat": found.threat.describe(), "steps": found.steps, "classes": list(found.classes),
            "shares": [[None if math.isnan(v) else v for v in line] for line in found.shares.tolist()],
            "any_other": [None if math.isnan(v) else v for v in found.any_other.tolist()],
            "cost": {"forwards": found.forwards, "backwards": found.backwards, "seconds": found.seconds},
            "columns": {
                "index": found.index.tolist(), "y": found.y.tolist(), "prediction": found.prediction.tolist(),
                "reached": [torch.nonzero(line)[:, 0].tolist() for line in found.reached],
            },
            "sentence": sentence(found),
        }
    )  # fmt: skip
    written = [write_atomic(folder / "targeted.json", text)]
    written.append(write_atomic(folder / "targeted.csv", found.frame().to_csv(index_label="class")))
    return [*written, *report.write_figure(figure(found, name), folder, "targeted")]


@typed
def targeted_subject(
    subject: ModelUnderTest,
    threat: str,
    out: str | Path,
    *,
    steps: int = STEPS,
    limit: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[TargetedMatrix, list[Path]]:
    """The matrix of a network on its test images, written to a folder. After an interruption, the same call resumes.

    Args:
        subject: the network and its data.
        threat: "norm:eps".
        out: the output folder.
        steps: as for ``targeted_matrix``.
        limit: the maximum number of images, also of cross-validated data; 0 for all.
        seed: as for ``targeted_matrix``.
        batch_size: as for ``targeted_matrix``.
        progress: as for ``targeted_matrix``.

    Returns:
        (the matrix, the files written).

    Raises:
        UserError: as ``targeted_matrix`` does; ``out`` belongs to other work.
    """
    out, against, data = Path(out), Threat.parse(threat), subject.split.test.take(slice(0, limit or None))
    check_images(data.x, against)
    whole("steps", steps, 1, MOST_STEPS)
    check_classes(subject)
    asked = {"threat": against.describe(), "steps": steps}
    run_folder.reserve(out, {**subject.about, "targeted": asked, "seed": any_seed(seed), "limit": limit})
    network = f"{run_folder.weights_hash(subject.model)} {subject.code}".strip()
    found = targeted_matrix(
        subject.model, data, against, steps=steps, seed=seed, batch_size=batch_size, progress=progress,
        checkpoint=out / "targeted.safetensors", key=f"{subject.split.fingerprint} {network}",
    )  # fmt: skip
    about = {
        "network": subject.name, "weights": run_folder.weights_hash(subject.model), "data": subject.data,
        "fingerprint": subject.split.fingerprint, "seed": seed,
    }  # fmt: skip
    return found, save(found, out, subject.name, about)
