"""From the figure that the public code of I-SCE prints to robust accuracy, one change at a time.

The attack there keeps no ball, so its figure is no accuracy under a threat: ``evaluate`` never counts it. It is
measured here, and stands beside how far the images were moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import ATTACKS, SCORES
from ..data import Data, pixels
from ..data.arguments import as_data
from ..errors import UserError, type_of
from ..evaluation import Evaluation, Stage, evaluate
from ..evaluation.suites import stage_scores
from ..losses import Loss, as_loss
from ..models import with_statistics
from ..models.cifar_preactresnet import SwitchedBatchNorm
from ..noise import Noise
from ..outputs import Model, fooled, frozen_eval
from ..progress import Progress, as_progress
from ..queries import CountingModel, device_of, exact_float32, judge_candidates
from ..results import Interval, proportion
from ..threat import Threat, check_images
from ..user_input import any_seed, number, whole

MOST_STEPS = 200
# What each step of the waterfall changes.
CHANGES = {
    "as the code prints it": "predicted labels, no projection, the training loss, last iterate, batch statistics",
    "projection": "every step is projected into the ball that the figure is quoted for",
    "true labels": "labels are the true ones: a misclassified image is no longer driven out of its wrong class",
    "running statistics": "batch norm uses its running statistics: an answer depends on its image alone",
    "raw logits": "the score is a margin of the network's logits, without the loss's head and link",
    "best iterate": "the most adversarial point, the clean image among them, not the last one",
    "more steps": f"{MOST_STEPS} steps of eps / 10",
    "other scores": "the same on all scores: " + ", ".join(SCORES).replace("_", " "),
    "targets": "the same, targeted at each of the 9 most likely wrong classes",
    "black box": "the suite as-coded: standard with Square, a black box, and PGD-50 on three scores",
}


@dataclass(frozen=True)
class Measured:
    """What is left of a network's accuracy after an attack, and how far that attack moved the images.

    Args:
        name: of the attack, or of what was changed in it: a key of CHANGES.
        correct: number of samples left.
        n: number of samples.
        linf: the largest change of a pixel of any sample, in 255ths of the pixels' range.
        l2: the largest l2 norm of a change, in the same unit.
    """

    name: str
    correct: int
    n: int
    linf: float
    l2: float

    @property
    def accuracy(self) -> Interval:
        """Accuracy with its exact 95% interval."""
        return proportion(self.correct, self.n)

    def __str__(self) -> str:
        """In words; the largest change stands beside the figure always.

        >>> print(Measured("true labels", 9, 10, 6.375, 21.25))
        true labels: 90.0 [55.5, 99.7] of n = 10; pixels moved by up to 6.4/255, images by 21.2/255 in l2
        """
        i = self.accuracy
        figure = f"{100 * i.value:.1f} [{100 * i.low:.1f}, {100 * i.high:.1f}] of n = {self.n}"
        moved = f"pixels moved by up to {self.linf:.1f}/255, images by {self.l2:.1f}/255 in l2"
        return f"{self.name}: {figure}; {moved}"


@dataclass(frozen=True)
class _Setting:
    """One network under one attack: what all measurements of a waterfall share."""

    model: CountingModel
    data: Data
    noise: Noise
    scores: dict[str, Loss]
    batch_size: int

    def run(self, threat: Threat, stage: Stage, left: Tensor | None = None) -> tuple[Tensor, float, float]:
        """((N,) which samples are left, linf and l2 of the largest change in 255ths of the box).

        Without ``left``, an image is left if it is classified correctly where the attack ended, whatever it was before:
        as that code counts. With it, (N,) bool, these alone are attacked, and any candidate in the threat breaks them.
        Batches are answered as they were attacked, because with batch statistics another batch is another network.
        """
        rows = torch.arange(len(self.data)) if left is None else torch.nonzero(left)[:, 0].cpu()
        correct = torch.zeros(len(self.data), dtype=torch.bool) if left is None else left.clone()
        changes, unit = [0.0, 0.0], 255 / (threat.hi - threat.lo)
        for batch in rows.split(self.batch_size) if len(rows) else ():
            x, y = pixels(self.data.x[batch]), self.data.y[batch]
            for target in self._targets(x, y, stage):
                x_adv = ATTACKS[stage.attack].attack(
                    self.model, x, y, threat, score=self.scores[stage.score], noise=self.noise[batch],
                    **stage.keywords(threat.eps), **({} if target is None else {"target": target}),
                )  # fmt: skip
                if left is None:
                    with torch.no_grad():
                        correct[batch] = ~fooled(self.model(x_adv).logits, y).cpu()
                else:
                    correct[batch] &= ~judge_candidates(self.model, x_adv, x, y, threat).broken.cpu()
                sizes = (replace(threat, norm=norm).size(x_adv - x) for norm in ("linf", "l2"))
                changes = [max(a, unit * float(b.max())) for a, b in zip(changes, sizes, strict=True)]
        return correct, changes[0], changes[1]

    def _targets(self, x: Tensor, y: Tensor, stage: Stage) -> Sequence[Tensor | None]:
        """The likeliest wrong classes of these images, one tensor for each rank; [None] for an untargeted stage."""
        if not stage.targets:
            return [None]
        with torch.no_grad():
            z = self.model(x).logits
        ranked = z.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
        return list(ranked[:, : stage.n_targets(z.shape[1])].T)


def _setting(
    model: Model, data: Data, trained_with: Loss | str | None, threat: Threat, seed: int, batch_size: int
) -> _Setting:
    """The arguments of the functions below, checked."""
    data, loss = as_data(data), as_loss(trained_with)
    if len(data) == 0:
        raise UserError("there is nothing to attack: the data set is empty.")
    check_images(data.x, threat)
    size, seed = whole("batch_size", batch_size, 1), any_seed(seed)
    data = data.to(device_of(model, data))
    counting = CountingModel(model, occurring=data.y.unique())
    return _Setting(counting, data, Noise(seed, data.index), stage_scores(loss), size)


def _ball(step_size: float) -> Threat:
    """The ball that the code's figures are quoted for: its radius is called eps there, and is the step size."""
    step_size = number("step_size", step_size, 0, above=True)
    if step_size >= 1:
        raise UserError(f"step_size must be below 1, the range of the pixels, got {step_size:g}: did you mean a 255th?")
    return Threat("linf", step_size)


def unprojected(
    model: Model,
    data: Data,
    *,
    trained_with: Loss | str | None = None,
    steps: int = 5,
    step_size: float = 0.005,
    batch_size: int = 128,
) -> Measured:
    """The figure that the code prints: its attack without a ball, on every image, right or wrong, in the given order.

    k steps of a move a pixel by up to k a: what the code calls eps is a. The figure is no robust accuracy of any threat
    that is quoted with it, which is why ``evaluate`` has no stage like it.

    Args:
        model: maps images in [0, 1] to logits or Outputs.
        data: the samples, uint8 or float in [0, 1].
        trained_with: the loss the network was trained with, or its name; None means cross-entropy.
        steps: k >= 1.
        step_size: a, in (0, 1), of pixels in [0, 1]: half of the code's, whose pixels are in [-1, 1].
        batch_size: >= 1; with batch statistics the figure depends on it.

    Returns:
        The figure and the largest change.

    Raises:
        UserError: an argument of another kind, an empty data set, or pixels outside [0, 1].
    """
    ball, box = _ball(step_size), Threat("linf", 1.0)
    setting = _setting(model, data, trained_with, ball, 0, batch_size)
    name = f"unprojected, {whole('steps', steps, 1)} steps of {255 * ball.eps:.3g}/255"
    stage = Stage(name, "as_coded", "train_loss", settings={"steps": steps, "step_size": ball.eps})
    with exact_float32(), frozen_eval(model):
        return _measured(name, *setting.run(box, stage))


def _measured(name: str, correct: Tensor, linf: float, l2: float) -> Measured:
    return Measured(name, int(correct.sum()), len(correct), linf, l2)


def as_coded_waterfall(
    model: nn.Module,
    data: Data,
    *,
    trained_with: Loss | str | None = "isce_c",
    steps: int = 5,
    step_size: float = 0.005,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> tuple[tuple[Measured, ...], Evaluation]:
    """From the figure that the code prints to robust accuracy in the ball it is quoted for, one change at a time.

    The changes are those of CHANGES, each on top of the ones before. Up to "raw logits" each figure is that of one
    attack on all images, counted as the code counts, so it may rise. From "best iterate" on, each attack is run on what
    the ones before it left, and every figure is an upper bound of robust accuracy. Whichever statistics the
    network has, it begins with those of the batch, as the code does; without a batch norm of ``preactresnet`` nothing
    changes at "running statistics".

    Args:
        model: maps images in [0, 1] to logits or Outputs.
        data: the samples, uint8 or float in [0, 1].
        trained_with: as for ``unprojected``.
        steps: as for ``unprojected``.
        step_size: as for ``unprojected``; also the radius of the ball, since the code calls it eps.
        seed: of the suite's noise.
        batch_size: as for ``unprojected``.
        progress: called with (what comes next, changes measured, changes).

    Returns:
        (one Measured for each key of CHANGES, the Evaluation of the last one). An audit of that evaluation needs the
        same network, ``switched(model, "running")``.

    Raises:
        UserError: as ``unprojected`` does, and for a model that is no module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model must be a torch module, whose batch norms can be switched, got {type_of(model)}.")
    report, ball, box = as_progress(progress), _ball(step_size), Threat("linf", 1.0)
    by_batch, running = switched(model, "batch"), switched(model, "running")
    setting = _setting(by_batch, data, trained_with, ball, seed, batch_size)
    same = replace(setting, model=CountingModel(running, occurring=setting.data.y.unique()))
    coded = Stage("as coded", "as_coded", "train_loss", settings={"steps": whole("steps", steps, 1)}, step=1.0)
    true = replace(coded, settings={**coded.settings, "away_from": "true"})
    raw = replace(true, score="matched")
    unprojected_stage = replace(coded, settings={**coded.settings, "step_size": ball.eps}, step=None)
    one_attack = (
        (setting, box, unprojected_stage), (setting, ball, coded), (setting, ball, true), (same, ball, true),
        (same, ball, raw),
    )  # fmt: skip
    more: dict[str, Any] = {"settings": {"steps": MOST_STEPS, "iterate": "best", "away_from": "true"}, "step": 0.1}
    on_the_rest = (
        (replace(raw, settings={**true.settings, "iterate": "best"}),),
        (Stage("more steps", "as_coded", **more),),
        tuple(Stage(key, "as_coded", key, **more) for key in SCORES if same.scores[key] is not same.scores["matched"]),
        (Stage("targets", "pgd", "scaled_log_odds", 9, {"steps": MOST_STEPS, "random_start": False}, step=0.1),),
    )
    names, found = list(CHANGES), list[Measured]()
    with exact_float32(), frozen_eval(by_batch), frozen_eval(running):
        for under, threat, stage in one_attack:
            report(names[len(found)], len(found), len(names))
            left, *largest = under.run(threat, stage)
            found.append(_measured(names[len(found)], left, *largest))
        for stages in on_the_rest:
            report(names[len(found)], len(found), len(names))
            changes = []
            for stage in stages:
                left, *largest = same.run(ball, stage, left)
                changes.append(largest)
            found.append(_measured(names[len(found)], left, *map(max, zip(*changes, strict=True))))
    report(names[-1], len(found), len(names))
    evaluation = evaluate(running, data, ball, "as-coded", trained_with=trained_with, seed=seed)
    change = evaluation.x_adv - pixels(setting.data.x).cpu()
    sizes = (255 * float(replace(ball, norm=norm).size(change).max()) for norm in ("linf", "l2"))
    found.append(_measured(names[-1], left & evaluation.robust, *sizes))
    report("done", len(found), len(names))
    return tuple(found), evaluation


def switched(model: nn.Module, statistics: str) -> nn.Module:
    """A copy of the network whose batch norms use these statistics, or itself where none can be switched.

    Args:
        model: any network.
        statistics: "running" or "batch", as for ``models.with_statistics``.

    Returns:
        The copy, or ``model``.

    Raises:
        UserError: other statistics, for a network that can be switched.
    """
    can_be = any(isinstance(module, SwitchedBatchNorm) for module in model.modules())
    return with_statistics(model, statistics) if can_be else model
