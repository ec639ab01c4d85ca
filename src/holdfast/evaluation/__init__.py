"""The cascade: attacks on survivors only; every candidate is measured and judged here, not by the attack it is from.

robust accuracy = share of samples that are right and that nothing tried has broken: a true upper bound
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..attacks import ATTACKS, PGD50, SCORES, SUITES, Stage, cross_entropy, matched_score
from ..data import Data
from ..errors import unknown
from ..io import load_tensors
from ..losses import Loss
from ..outputs import Model, frozen_eval
from ..queries import CountingModel, device_of, exact_float32
from ..threat import Threat
from .alone import is_published, shown
from .budget import Budget
from .cascade import RECORD, RECORD_VERSION, Cascade, Progress
from .evaluation import MISCLASSIFIED, UNBROKEN, Evaluation, StageCost

__all__ = [
    "MISCLASSIFIED",
    "UNBROKEN",
    "Budget",
    "Evaluation",
    "StageCost",
    "evaluate",
    "stored_x_adv",
]  # fmt: skip


def evaluate(
    model: Model,
    data: Data,
    threat: Threat,
    suite: str | tuple[Stage, ...] = "standard",
    *,
    trained_with: Loss | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    budget: Budget | None = None,
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
        batch_size: default by image size and device; halved whenever memory runs out.
        budget: what it may cost. What stands alone, the published protocol too, is finished once it has begun; the
            suite's other stages take those samples first that are nearest to a mistake; what is left goes into further
            rounds on the nearest.
        record: a file that the work is kept in: a killed evaluation goes on from there.
        key: what the record belongs to (weights, data); another key in the file is an error.
        progress: called after each batch with (stage, passes so far, passes expected in all, samples standing).

    A model that answers the same image twice in two ways is randomised: its attacks climb the mean of 8 answers, and
    nothing counts, as right or as broken, that the majority of 32 fresh answers does not say.

    Where a bound of the network is known, the samples that it proves are ``certified`` before any attack; attacks try
    them like all others. A stage that is ``alone`` is run on every sample that is right and has a column of its own;
    one that is the published protocol by another name is a name for its column, and is not run again.

    Under torch.distributed the processes share the batches and all return the answer that one would give.

    Returns an Evaluation. Raises UserError for an empty set, pixels outside the threat's box, labels without a logit,
    unknown suites, attacks or scores, and a model whose clean logits are not finite numbers.
    """
    stages = SUITES.get(suite) if isinstance(suite, str) else suite
    if stages is None:
        raise unknown("suite", str(suite), SUITES)
    for stage in stages:  # a name that does not exist is found before any work is done
        if stage.attack not in ATTACKS:
            raise unknown("attack", stage.attack, ATTACKS)
        if stage.score not in ("matched", "loss", *SCORES):
            raise unknown("score", stage.score, [*SCORES, "matched", "loss"])
    scores = {**SCORES, "matched": matched_score(trained_with), "loss": trained_with or cross_entropy}
    stages = tuple(stage for stage in stages if threat.norm in ATTACKS[stage.attack].norms)
    alone = shown(stages)
    data = data.to(device_of(model, data))
    with exact_float32(), frozen_eval(model):
        run = Cascade(
            model=CountingModel(model),
            data=data,
            threat=threat,
            stages=(PGD50, *(stage for stage in stages if not is_published(stage))),
            individual=alone,
            scores=scores,
            seed=seed,
            batch_size=batch_size,
            budget=budget,
            progress=progress,
        )
        run.begin(record, key)
        run.all_stages()
        run.save(force=True)
        return run.answer()


def stored_x_adv(record: Path) -> Tensor:
    """x_adv of the evaluation that a record keeps, (N, C, H, W)."""
    return load_tensors(record, RECORD, RECORD_VERSION)[0]["x_adv"]
