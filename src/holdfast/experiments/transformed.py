"""Corruptions, rotations and patches of one network and its data: a row of results.json for each threat."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import run_folder, transforms
from ..errors import UserError
from ..evaluation.distributed import Processes
from ..progress import Progress
from ..results import Cost, Results, Run, Samples, proportion, save, total_cost
from ..transforms import Transformed
from ..transforms.evaluation import check_data
from ..user_input import typed
from .collect import examples, results_of, training_of
from .evaluate_model import ModelUnderTest, check_classes

WORK_FILE = "transforms.safetensors"


@typed
def evaluate_transforms(
    subject: ModelUnderTest,
    threat: str,
    out: str | Path,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Results:
    """Evaluate a network with ``transforms.evaluate``; write results.json and transforms.safetensors.

    Args:
        subject: the network and its data.
        threat: as for ``transforms.parse``.
        out: the output folder; the work is kept there, and the same call resumes.
        seed: of the noise.
        batch_size: default by image size.
        progress: called with (what is being done, units done, units in all).
        command: the command line, for the report.

    Returns:
        The Results: a run for each threat, without a verdict, since nothing is audited.

    Raises:
        UserError: what cannot be read, several processes, or ``out`` belongs to another evaluation.
    """
    out, threats, data = Path(out), transforms.parse(threat), subject.split.test
    if Processes.current().count > 1:
        raise UserError(f"{threat} is evaluated by one process: start holdfast without torchrun.")
    check_data(data, threats)
    check_classes(subject)
    settings = {**subject.about, "threat": threat, "seed": seed, "cut": subject.cut.to_json()}
    run_folder.reserve(out, settings)
    key = f"{subject.split.fingerprint} {run_folder.weights_hash(subject.model)} {subject.code}".strip()
    found = transforms.evaluate(
        subject.model, data, threats, seed=seed, batch_size=batch_size, checkpoint=out / WORK_FILE, key=key,
        progress=progress,
    )  # fmt: skip
    notes = (*subject.split.notes, *getattr(subject.model, "notes", ()))
    runs = [_run(subject, one) for one in found]
    folders = [subject.folder] if subject.folder else []
    results = results_of(runs, [subject.split], notes, folders, out, subject.data, settings, command)
    save(results, out)
    return results


def _run(subject: ModelUnderTest, found: Transformed) -> Run:
    """The row of one threat."""
    columns: dict[str, Any] = {
        name: getattr(found, name)
        for name in ("index", "y", "prediction", "clean", "robust", "margin", "margin_adv", "prediction_adv")
    }
    columns["stage"], n = found.broken_by, len(found.y)
    return Run(
        name=f"{subject.row_name} seed {subject.seed}" if subject.folder else subject.name,
        loss=subject.row_name,
        seed=subject.seed,
        threat=found.threat.describe(),
        n=n,
        clean=proportion(int(found.clean.sum()), n),
        attacks={kind: proportion(int(correct.sum()), n) for kind, correct in found.correct.items()},
        robust=proportion(int(found.robust.sum()), n),
        cost=Cost(
            forwards=sum(stage.forwards for stage in found.stages),
            backwards=sum(stage.backwards for stage in found.stages),
            seconds=round(sum(stage.seconds for stage in found.stages), 2),
        ),
        stages=tuple(replace(total_cost([stage]), seconds=round(stage.seconds, 3)) for stage in found.stages),
        samples=Samples(**columns, pgd50=None),
        examples=tuple(examples(found, subject.split, lambda rows: found.x_adv(subject.split.test.x, rows))),
        train=training_of([subject.trained]),
    )
