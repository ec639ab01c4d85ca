"""Evaluation: a suite of attacks run as a cascade. Each stage attacks what is left, neither broken nor proved.

robust accuracy = fraction of samples that are classified correctly and that no attack broke: an upper bound
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..attacks import ATTACKS
from ..data import Data
from ..data.arguments import AnyData, as_data, note_assumptions
from ..errors import UserError, type_of
from ..losses import Loss, as_loss
from ..mapped import VARIABLE, is_mapped
from ..noise import Noise
from ..outputs import Model, frozen_eval
from ..progress import Progress, as_progress, silent
from ..queries import Batches, CountingModel, copied, default_batch_size, device_of, exact_float32
from ..results import PRECISION
from ..threat import Threat, as_threat
from ..user_input import any_seed, number, of_type, path, whole
from . import cascade
from .budget import Budget
from .checkpoint import images_file, load_x_adv
from .distributed import Processes
from .evaluation import MISCLASSIFIED, UNBROKEN, Evaluation, StageCost, add_witnesses
from .grid import differs_off_grid, is_8bit
from .state import PROOFS, Task, check_proofs
from .suites import SUITES, Stage, individual_names, resolve, stage_scores, with_pgd50

__all__ = [
    "MISCLASSIFIED",
    "PROOFS",
    "SUITES",
    "UNBROKEN",
    "Budget",
    "Evaluation",
    "Stage",
    "StageCost",
    "add_witnesses",
    "check_proofs",
    "differs_off_grid",
    "evaluate",
    "is_8bit",
    "load_x_adv",
]


def evaluate(
    model: Model,
    data: AnyData,
    threat: Threat | str,
    suite: str | Sequence[Stage] = "standard",
    *,
    trained_with: Loss | str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    budget: Budget | None = None,
    proofs: str = "linear",
    precision: float = PRECISION,
    pgd50: int | None = None,
    candidates: Tensor | None = None,
    checkpoint: str | Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Attack a model with a suite and report, sample by sample, what survives.

    PGD-50 runs first, on all correctly classified samples; further stages attack survivors, unless they are individual
    attacks with an accuracy of their own. A candidate counts only after it was verified with a fresh query: inside the
    threat and misclassified.

    Where images are 8-bit and the box is [0, 1], candidates are also judged rounded to multiples of 1/255, and a sample
    counts as broken if either point is misclassified; see ``holdfast.evaluation.grid``.

    A model that answers the same image differently is randomised: attacks use the mean of 8 outputs per step, and
    a sample is correct or broken only by the majority of 32 fresh outputs. Where a bound of the network is known,
    samples it proves are ``certified``. The individual attacks, PGD-50 among them, attack these too, which would expose
    a false proof; the other stages leave them out.

    Under torch.distributed, processes share the batches, and all return the result that a single one would.

    Args:
        model: maps images in the threat's box to logits or Outputs.
        data: the samples, uint8 or float in [0, 1]: Data, (x, y), a DataLoader, a data set or its name.
        threat: the threat model, or its text, such as "linf:8/255".
        suite: a key of SUITES, or stages. Stages whose attack is not defined for the threat's norm are skipped.
        trained_with: the loss the network was trained with, or its name: "matched" stages derive their score from it.
            None means cross-entropy.
        seed: of the samples' noise.
        batch_size: >= 1; by default chosen by image size and device. It is halved where memory runs out. It does not
            change the result, except for rounding in batched kernels.
        budget: upper limit on the cost. Individual attacks, PGD-50 among them, are finished once begun; the other
            stages attack samples with the smallest margins first. What is left after the suite is spent on further
            rounds. None: run the suite once.
        proofs: the last method of ``bounds.certify`` that is tried on what the individual attacks leave: "linear",
            "crown", "alpha", or "branch", which needs a budget of time. The methods up to "linear" are cheap and always
            tried, on all samples. Of what is left of the budget, "crown" and "alpha" take at most half, with "branch"
            the attacks of the suite half of the rest, and branch and bound what they leave; what is over then goes to
            further attacks. An adversarial example of branch and bound counts as one of the stage "branch and bound".
        precision: share of all samples, in (0, 1], that may be breakable still where nothing shows it. The spot check
            and the audit attack as many survivors as that needs: see ``results.sample_size``.
        pgd50: how many samples, drawn at random, PGD-50 attacks on its own: its accuracy is then a share of these. None
            for all samples; 0 leaves PGD-50 out, and the first stage of the suite then attacks all samples.
        candidates: (N, C, H, W), images that may be adversarial, such as ``x_adv`` at a smaller eps in the same norm; a
            clean image is no candidate. They are judged after the individual attacks, and what they break is left out.
        checkpoint: file to save to; an interrupted evaluation resumes from it.
        key: identifies the weights and data that the checkpoint belongs to.
        progress: called after each batch with (stage and robust accuracy so far, passes so far, passes expected).

    Returns:
        An Evaluation, with tensors on the CPU.

    Raises:
        UserError: for an empty data set, pixels outside the threat's box, labels without a logit, clean logits that are
            not finite, unknown suites, attacks or scores, and a checkpoint of another evaluation.
    """
    data, threat, trained_with = as_data(data), as_threat(threat), as_loss(trained_with)
    note_assumptions(data, unit_box=(threat.lo, threat.hi) == (0, 1))
    report = as_progress(progress)
    stages = tuple(stage for stage in resolve(suite) if threat.norm in ATTACKS[stage.attack].norms)
    _check(data, key, budget, proofs, precision, pgd50, candidates)
    size = default_batch_size(data.x) if batch_size is None else whole("batch_size", batch_size, 1)
    data = data.to(device_of(model, data))
    file = None if checkpoint is None else path("checkpoint", checkpoint)
    task = Task(
        model=CountingModel(model, occurring=data.y.unique()),
        data=data,
        threat=threat,
        suite=with_pgd50(stages, leave_out=pgd50 == 0),
        attack_names=tuple(individual_names(stages, leave_out=pgd50 == 0)),
        scores=stage_scores(trained_with),
        noise=Noise(any_seed(seed), data.index),
        budget=budget,
        batch_size=size,
        batches=Batches(size),
        grid=is_8bit(data, threat),
        proofs=proofs,
        precision=precision,
        pgd50=pgd50,
        candidates=candidates if candidates is None or is_mapped(candidates) else candidates.to(data.y.device),
        progress=report if Processes.current().is_first else silent,
        x_adv_file=None if file is None else images_file(file),
    )
    with exact_float32(), frozen_eval(model):
        pristine = copied(model)  # before the first query
        return replace(cascade.run(task, file, key), pristine=pristine)


def _check(
    data: Data,
    key: str,
    budget: Budget | None,
    proofs: str,
    precision: float,
    pgd50: int | None,
    candidates: Tensor | None,
) -> None:
    """Raise UserError for arguments of ``evaluate`` that nothing can be done with."""
    of_type("key", key, str)
    if len(data) == 0:
        raise UserError("there is nothing to evaluate: the data set is empty.")
    if budget is not None and not isinstance(budget, Budget):
        raise UserError(f'budget must be a Budget, such as Budget.parse("10min"), got {type_of(budget)}.')
    check_proofs(proofs, budget)
    number("precision", precision, 0, 1, above=True)
    if pgd50 is not None:
        whole("pgd50", pgd50)
    of_type("candidates", candidates, Tensor | None)
    if is_mapped(data.x) and Processes.current().count > 1:
        raise UserError(
            f"the images are in a file, as they do not fit in memory, and are evaluated by one process alone: start it "
            f"without torchrun, or set {VARIABLE} to more than {data.x.nbytes:,} bytes."
        )
    if candidates is not None and candidates.shape != data.x.shape:
        raise UserError(
            f"candidates must be images of the same samples, {tuple(data.x.shape)}, got {tuple(candidates.shape)}."
        )
