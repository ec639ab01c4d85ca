"""The pass over the clean images: checks of the input, predictions, certificates, and the order of target classes."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..attacks.base import all_rows
from ..attacks.minimal_norm import scores_and_grads
from ..data.arguments import check_logits
from ..errors import UserError
from ..losses import negative_margin
from ..noise import EvaluationStream
from ..outputs import Model
from ..queries import VOTES, logits_differ, majority_vote, prefers_channels_last
from .costs import add_cost
from .evaluation import MISCLASSIFIED, UNBROKEN, StageCost
from .grid import differs_off_grid
from .state import Columns, State, Task, attack_model

PREFLIGHT = 64  # samples that are queried twice before anything else
DIFFER = 0.05  # of these samples that answer otherwise off the grid, from which on attacks stay on it as well
LINEAR_FROM = 10  # with more classes than this, targets are ranked by linearised distance, not by logit
MAX_LINEARISED = 20  # number of classes with the largest logits whose distance is computed
MAX_RANKED = 9  # number of target classes kept per sample


def clean_pass(task: Task) -> State:
    """Query the model on the clean images and set up all columns.

    Raises:
        UserError: for labels without a logit, a single logit, and clean logits that are NaN or infinite.
    """
    y = task.data.y
    began = time.perf_counter()
    model = _preflight(task)
    stages = task.stages(model.differs_off_grid)
    votes_needed = VOTES if model.randomised else 1
    with torch.no_grad():
        outputs = task.batches.map(
            all_rows(y), lambda rows: majority_vote(task.model, task.data.pixels(rows), votes_needed)
        )
    z, votes = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    check_logits(task.model.model, z, task.data, task.model.ruled_out)
    _check_finite(z, y)
    clean = votes.gather(1, y[:, None])[:, 0] > votes_needed / 2
    margin, prediction = -negative_margin(z, y), votes.argmax(1)
    queried = attack_model(task.model, model.channels_last, model.randomised)
    columns = Columns(
        prediction=prediction,
        margin=margin,
        clean=clean,
        broken_by=torch.where(clean, UNBROKEN, MISCLASSIFIED),
        margin_adv=margin.clone(),
        prediction_adv=prediction.clone(),
        x_adv=task.clean_images(),
        targets=_ranked_targets(task, queried, z),
        done=torch.zeros_like(y),
        chosen=clean.clone(),
        spot_check=torch.zeros_like(y),
        attack_correct={stage.name: clean.clone() for stage in task.suite if stage.individual},
    )
    if any(stage.target for stage in task.suite):  # all wrong classes are equally likely
        drawn = task.noise.fold(EvaluationStream.RANDOM_TARGET).integers(z.shape[1] - 1)
        columns.random_target = drawn + (drawn >= y)
    columns.expect_proofs(known=not model.randomised)
    costs = [StageCost("clean"), *(StageCost(stage.name) for stage in stages)]
    state = State(columns, costs, list(stages), **model._asdict())
    add_cost(task, state, 0, began)
    return state


class _Preflight(NamedTuple):
    """What a few images say of a model.

    Attributes:
        channels_last: attacks may query it in that memory order.
        randomised: it answers the same image differently.
        differs_off_grid: it answers 8-bit images otherwise than images beside them.
    """

    channels_last: bool
    randomised: bool
    differs_off_grid: bool


def _preflight(task: Task) -> _Preflight:
    """Query a few images before anything else."""

    def query(rows: Tensor) -> tuple[bool, bool, Tensor]:
        x = task.data.pixels(rows)
        first, second = task.model(x).logits, task.model(x).logits
        finite = first.isfinite().all(1) & second.isfinite().all(1)
        randomised = bool((logits_differ(first, second) & finite).any())
        differs = torch.zeros_like(rows, dtype=torch.bool)
        if task.grid and not randomised:
            some = rows[: len(rows) // 2 or None]
            noise = task.noise[some].fold(EvaluationStream.GRID)
            differs = differs_off_grid(task.model, task.data.take(some), task.threat, noise)
        return not randomised and prefers_channels_last(task.model, x, first), randomised, differs

    with torch.no_grad():
        answers = task.batches.map(all_rows(task.data.y)[:PREFLIGHT], query)
    channels_last, randomised, differs = zip(*answers, strict=True)
    return _Preflight(all(channels_last), any(randomised), float(torch.cat(differs).double().mean()) > DIFFER)


def _check_finite(z: Tensor, y: Tensor) -> None:
    if not bool(z.isfinite().all()):
        bad = int((~z.isfinite().all(1)).sum())
        raise UserError(
            f"the model's clean logits are NaN or infinite on {bad} of {len(y)} samples: it cannot be evaluated."
        )


def _ranked_targets(task: Task, model: Model, z: Tensor) -> Tensor:
    """Wrong classes, likeliest first, (N, at most 9): by logit, or among many classes by linearised distance."""
    y, k = task.data.y, z.shape[1]
    ranked = z.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
    if k <= LINEAR_FROM:
        return ranked[:, : min(MAX_RANKED, k - 1)].contiguous()
    ranked = ranked[:, : min(MAX_LINEARISED, k - 1)]

    def nearest(rows: Tensor) -> Tensor:  # Melamed et al. 2024, MALT
        classes, label = ranked[rows], y[rows][:, None]
        _, differences, grads = scores_and_grads(
            model, task.data.pixels(rows), lambda z: z.gather(1, classes) - z.gather(1, label)
        )
        slope = torch.stack([task.threat.dual_size(grad) for grad in grads.unbind(1)], 1)
        distance = (-differences / slope.clamp_min(1e-30)).nan_to_num(torch.inf)
        return classes.gather(1, distance.argsort(dim=1, stable=True)[:, :MAX_RANKED])

    with torch.enable_grad():
        return torch.cat(task.batches.map(all_rows(y), nearest))
