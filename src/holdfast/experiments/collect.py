"""From evaluated networks to one Results: a run per loss, seed and threat, and the adversarial examples beside it."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import __version__, region, run_folder
from ..checks import PGD50, ROBUST, Claim, judge, merge, remaining, result_of
from ..data import Split, pixels
from ..environment import environment
from ..evaluation import UNBROKEN, Evaluation
from ..evaluation.proofs import PROVED_BY
from ..io import save_tensors
from ..mapped import is_mapped
from ..replay import WITNESSES, WITNESSES_VERSION
from ..results import (
    CleanMeasures,
    Cost,
    Example,
    Interval,
    Results,
    Run,
    Samples,
    Training,
    Verdict,
    proportion,
    save,
    total_cost,
    total_proofs,
)
from ..threat import Threat
from ..transforms import Transformed
from ..witness_files import save_apart, witnesses_file
from .config import DataCut
from .loss_spec import LossSpec
from .network_result import NetworkResult
from .training import TrainSummary

ENVIRONMENT = ("holdfast", "torch", "python", "gpu", "processor")  # where one of these differs, it is another one


@dataclass(frozen=True)
class TrainedNetwork:
    """One network with its final answer under one threat.

    Args:
        loss: the loss it was trained with.
        seed: it was trained with.
        folder: where its weights are, or, for a user's own model, what opens it again.
        trained: how training ended.
        split: the data it was evaluated on.
        cut: how ``data.load`` made that split.
        result: its final answer.
        name: of its row; default: loss and seed.
        notes: what was assumed or converted when the network was opened.
    """

    loss: LossSpec
    seed: int
    folder: Path
    trained: TrainSummary
    split: Split
    cut: DataCut
    result: NetworkResult
    name: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def row_name(self) -> str:
        """The name of its run in results.json."""
        return self.name or f"{self.loss.text} seed {self.seed}"


def collect(
    networks: Sequence[TrainedNetwork], out: str | Path, data: str, settings: dict[str, Any], command: str
) -> Results:
    """Write results.json and witnesses.safetensors: a run per loss, seed and threat, its folds put together.

    Args:
        networks: in the order of the rows; every loss and seed on the same folds.
        out: the folder that both files go to.
        data: the data set's name.
        settings: the settings of the command, as JSON can hold them.
        command: the command line.

    Returns:
        The Results that were written.
    """
    out = Path(out)
    groups: dict[tuple[LossSpec, int, Threat], list[TrainedNetwork]] = {}
    for network in networks:
        groups.setdefault((network.loss, network.seed, network.result.evaluation.threat), []).append(network)
    runs = [_run(parts) for parts in groups.values()]
    splits = [part.split for part in next(iter(groups.values()))]
    notes = [note for one in networks for note in (*one.split.notes, *one.notes)]
    folders = [network.folder for network in networks]
    results = results_of(runs, splits, notes, folders, out, data, settings, command)
    _save_witnesses(networks, out)
    save(results, out)
    return results


def results_of(
    runs: Sequence[Run],
    splits: Sequence[Split],
    notes: Sequence[str],
    folders: Sequence[Path],
    out: Path,
    data: str,
    settings: dict[str, Any],
    command: str,
) -> Results:
    """The runs with what is said of all of them.

    Args:
        runs: at least one.
        splits: the data of one run: its folds, or one.
        notes: what was assumed or converted.
        folders: where the networks are.
        out: the output folder.
        data: the data set's name.
        settings: the settings of the command, as JSON can hold them.
        command: the command line.
    """
    return Results(
        runs=tuple(runs),
        data={
            "name": data,
            "classes": list(splits[0].classes),
            "n": runs[0].n,
            "shape": list(splits[0].shape),
            "fingerprint": "+".join(split.fingerprint for split in splits),
            "notes": list(dict.fromkeys(notes)),
        },
        command=command,
        settings=json.loads(json.dumps(settings)),
        environment=_environment(folders, out),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        holdfast=__version__,
    )


def _save_witnesses(networks: Sequence[TrainedNetwork], out: Path) -> None:
    """Write each network's adversarial examples, and what ``replay`` needs to open network and data."""
    witnesses: dict[str, Tensor] = {}
    about = []
    for number, network in enumerate(networks):
        evaluation = network.result.evaluation
        broken = evaluation.broken_by >= 0
        witnesses[f"{number}/index"] = evaluation.index[broken]
        apart = is_mapped(evaluation.x_adv)
        if not apart:
            witnesses[f"{number}/x_adv"] = evaluation.x_adv[broken]
        about.append(
            {
                **({"x_adv": save_apart(evaluation.x_adv, broken, witnesses_file(out, number))} if apart else {}),
                "run": network.row_name,
                "threat": evaluation.threat.describe(),
                "folder": os.path.relpath(network.folder.resolve(), out.resolve()),
                "cut": network.cut.to_json(),
                "fingerprint": network.split.fingerprint,
            }
        )
    packed = [name for name in witnesses if name.endswith("/x_adv")]
    path = out / "witnesses.safetensors"
    save_tensors(path, WITNESSES, WITNESSES_VERSION, witnesses, {"networks": about}, packed=packed)


def _environment(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """This environment; and where work was done under others, in the folders' env.json, those too."""
    now = environment()
    known = [one for folder in {out, *folders} for one in run_folder.environments(folder)]
    others = {json.dumps(one, sort_keys=True) for one in known if any(one.get(k) != now[k] for k in ENVIRONMENT)}
    return {**now, **({"earlier": [json.loads(one) for one in sorted(others)]} if others else {})}


def _run(parts: list[TrainedNetwork]) -> Run:
    """One row of the table: the folds' samples put together, their costs added up."""
    networks, trained = [part.result for part in parts], [part.trained for part in parts]
    evaluations = [network.evaluation for network in networks]
    measured = [network.region for network in networks if network.region is not None]

    def column(which: str) -> Any:
        return torch.cat([getattr(evaluation, which) for evaluation in evaluations])

    robust, clean, pgd50 = column("robust"), column("clean"), _pgd50(evaluations)
    stages = [total_cost([e.stages[i] for e in evaluations]) for i in range(len(evaluations[0].stages))]
    certified = None if any(e.certified is None for e in evaluations) else column("certified")
    known = certified is not None and all(e.proved_by is not None for e in evaluations)
    proved_by = tuple(PROVED_BY[number] for number in column("proved_by").tolist()) if known else None
    proofs = total_proofs([cost for e in evaluations for cost in e.proofs]) if known else ()
    asked = None if pgd50 is None else pgd50 >= 0  # the others have no answer of PGD-50
    verdicts = _verdicts(parts, pgd50, robust, certified)
    void = verdicts["verdict"].status == "void"
    attacks = [e.attack_correct for e in evaluations]
    names = [name for name in attacks[0] if all(name in one for one in attacks)]
    shares = {name: _share(torch.cat([one[name] for one in attacks])) for name in names}
    if pgd50 is not None and asked is not None:
        shares[PGD50] = _share(pgd50[asked] > 0)
    return Run(
        name=parts[0].row_name,
        loss=parts[0].name or parts[0].loss.text,
        seed=parts[0].seed,
        threat=evaluations[0].threat.describe(),
        n=len(clean),
        clean=_share(clean),
        attacks=shares,
        pgd50_n=None if asked is None or bool(asked.all()) else int(asked.sum()),
        robust=None if void else _share(robust),
        certified=None if void or certified is None else _share(certified),
        **verdicts,
        cost=Cost(
            forwards=sum(e.forwards for e in evaluations),
            backwards=sum(e.backwards for e in evaluations),
            seconds=round(sum(e.seconds for e in evaluations), 2),
        ),
        stages=tuple(replace(stage, seconds=round(stage.seconds, 3)) for stage in stages),
        proofs=tuple(replace(cost, seconds=round(cost.seconds, 3)) for cost in proofs),
        samples=Samples(
            **{key: column(key) for key in ("index", "y", "prediction", "clean", "robust")},
            pgd50=None if pgd50 is None else tuple(one if one >= 0 else None for one in pgd50.tolist()),
            stage=column("broken_by"),
            margin=column("margin"),
            margin_adv=column("margin_adv"),
            certified=certified,
            proved_by=proved_by,
            prediction_adv=column("prediction_adv"),
        ),
        examples=tuple(examples(evaluations[0], parts[0].split, lambda rows: evaluations[0].x_adv[rows])),
        region=region.merge(measured) if measured else None,
        projection=networks[0].projection,
        train=training_of(trained),
    )


def training_of(trained: Sequence[TrainSummary]) -> Training:
    """How the networks of a row were trained: the mean over its folds."""
    return Training(
        epochs=trained[0].epochs,
        accuracy=_mean([t.accuracy for t in trained]),
        val=_mean([t.val for t in trained]),
        best_epoch=trained[0].best_epoch,
        seconds=round(sum(t.seconds for t in trained), 2),
        model=trained[0].model,
        networks=len(trained),
    )


def _pgd50(evaluations: list[Evaluation]) -> Tensor | None:
    """(N,) int64: correct under PGD-50 alone, -1 where it was not asked; None where it was left out."""
    columns = []
    for evaluation in evaluations:
        if evaluation.pgd50 is None:
            return None
        answer, asked = evaluation.pgd50.long(), evaluation.pgd50_sample
        columns.append(answer if asked is None else torch.where(asked, answer, -1))
    return torch.cat(columns)


def _verdicts(
    parts: list[TrainedNetwork], pgd50: Tensor | None, robust: Tensor, certified: Tensor | None
) -> dict[str, Any]:
    """What the checks say of this row's two claims, the folds' samples counted together."""
    audits = [part.result.audit for part in parts]
    findings, left = merge([audit.findings for audit in audits]), remaining(audits)
    kinds = sorted({kind for part in parts for kind in part.result.evaluation.attack_kinds})

    def verdict(claim: str, correct: Tensor) -> Verdict:
        asked = correct >= 0
        return judge(
            Claim(claim, correct[asked].tolist()),
            robust[asked].tolist(),
            findings,
            left,
            attack_kinds=kinds,
            certified=None if certified is None else certified[asked].tolist(),
            samples=len(robust),
        )

    return {
        "verdict": verdict(ROBUST, robust.long()),
        "pgd50_verdict": None if pgd50 is None else verdict(PGD50, pgd50),
        "checks": tuple(result_of(finding) for finding in findings),
        "remaining": left,
        "measures": _mean_measures([audit.measures for audit in audits if audit.measures is not None]),
    }


def _mean_measures(parts: list[CleanMeasures]) -> CleanMeasures | None:
    """The mean over networks."""
    columns = ([getattr(part, f.name) for part in parts] for f in fields(CleanMeasures))
    return CleanMeasures(*map(_mean, columns)) if parts else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _share(correct: Tensor) -> Interval:
    return proportion(int(correct.sum()), len(correct))


def examples(
    evaluation: Evaluation | Transformed, split: Split, x_adv_of: Callable[[Tensor], Tensor], most: int = 6
) -> list[Example]:
    """As pictures, the broken sample of each class with the largest clean margin, largest first.

    The perturbation is drawn around mid-grey, its largest change at full scale. A large margin says most: samples near
    the boundary fall to any attack.

    Args:
        evaluation: which samples are broken.
        split: their images.
        x_adv_of: the adversarial images of some rows.
        most: at most so many.
    """
    broken = torch.nonzero(evaluation.broken_by > UNBROKEN)[:, 0]
    ranked = broken[evaluation.margin[broken].argsort(descending=True, stable=True)].tolist()
    chosen: dict[int, int] = {}
    for row in ranked:
        chosen.setdefault(int(evaluation.y[row]), row)
    shown = list(chosen.values())[:most]
    x_adv_of_shown = x_adv_of(torch.tensor(shown, dtype=torch.int64)) if shown else ()
    pictures = []
    for row, adversarial in zip(shown, x_adv_of_shown, strict=True):
        x = pixels(split.test.x[row])
        delta = adversarial - x
        scale = float(delta.abs().max().clamp_min(1e-12))
        pictures.append(
            Example(
                index=int(evaluation.index[row]),
                y=int(evaluation.y[row]),
                prediction=int(evaluation.prediction[row]),
                prediction_adv=int(evaluation.prediction_adv[row]),
                x_png=_png(x),
                x_adv_png=_png(adversarial),
                delta_png=_png(0.5 + delta / (2 * scale)),
            )
        )
    return pictures


def _png(image: Tensor) -> str:
    """(C, H, W) in [0, 1] as PNG in base64."""
    array = (image * 255).round().clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
