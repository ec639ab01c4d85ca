"""What the bench found, put below the line: Evaluations become one Results, their x_adv the witnesses."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import __version__, region, run_folder
from ..checks import PGD50, ROBUST, Audit, Claim, judge, merge, remaining
from ..data import Split, pixels
from ..evaluation import UNBROKEN, Evaluation, StageCost
from ..io import save_tensors
from ..replay import WITNESSES, WITNESSES_VERSION
from ..results import Example, Interval, Results, Run, Samples, Stage, proportion, save
from ..threat import Threat


@dataclass(frozen=True)
class NetworkResult:
    """One network that has been trained and attacked: its folder, what was found, how it was trained, on what data."""

    loss: str
    seed: int
    folder: Path
    evaluation: Evaluation
    trained: dict[str, Any]
    split: Split
    cut: dict[str, Any]  # how ``data.load`` made that split
    audit: Audit | None = None
    name: str | None = None  # of the row; default: loss and seed
    region: dict[str, Any] | None = None  # as ``region.measure`` and ``region.picture`` return them
    picture: dict[str, Any] | None = None


def collect(judged: Sequence[NetworkResult], out: Path, data: str, settings: dict[str, Any], command: str) -> Results:
    """Write results.json and witnesses.safetensors to ``out``: a run per loss, seed and threat, its folds put together.

    ``validate`` is in the order of the rows.
    """
    groups: dict[tuple[str, int, Threat], list[NetworkResult]] = {}
    for one in judged:
        groups.setdefault((one.loss, one.seed, one.evaluation.threat), []).append(one)
    found = [_run(parts) for parts in groups.values()]
    splits = [part.split for part in next(iter(groups.values()))]  # every loss and seed saw the same folds
    results = Results(
        runs=tuple(found),
        data={
            "name": data,
            "classes": list(splits[0].classes),
            "n": found[0].n,
            "shape": list(splits[0].shape),
            "fingerprint": "+".join(split.fingerprint for split in splits),
        },
        command=command,
        settings=json.loads(json.dumps(settings)),
        environment=run_folder.environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        holdfast=__version__,
    )
    witnesses: dict[str, Tensor] = {}
    networks = []
    for number, one in enumerate(judged):
        broken = one.evaluation.broken_by >= 0
        witnesses[f"{number}/index"] = one.evaluation.index[broken]
        witnesses[f"{number}/x_adv"] = one.evaluation.x_adv[broken]
        where = {"folder": os.path.relpath(one.folder, out), "cut": one.cut, "fingerprint": one.split.fingerprint}
        networks.append({"run": _name(one), "threat": one.evaluation.threat.describe(), **where})
    save_tensors(out / "witnesses.safetensors", WITNESSES, WITNESSES_VERSION, witnesses, {"networks": networks})
    save(results, out)
    return results


def _name(one: NetworkResult) -> str:
    return one.name or f"{one.loss} seed {one.seed}"


def _run(parts: list[NetworkResult]) -> Run:
    """One row's worth: the folds' samples put together, their costs added up."""
    evaluations, trained = [part.evaluation for part in parts], [part.trained for part in parts]

    def column(which: str) -> Any:
        return torch.cat([getattr(evaluation, which) for evaluation in evaluations])

    robust, clean, published = column("robust"), column("clean"), column("pgd50")
    stages = [_added([e.stages[i] for e in evaluations]) for i in range(len(evaluations[0].stages))]
    mean = {key: _mean([t[key] for t in trained]) for key in ("accuracy", "val")}
    judged = _verdicts(parts, published, robust)
    void = bool(judged) and judged["verdict"].status == "void"
    certified = None if any(e.certified is None for e in evaluations) else column("certified")
    surveys = [part.region for part in parts if part.region]
    attacks = [name for name in evaluations[0].attack_correct if all(name in e.attack_correct for e in evaluations)]
    shares = {name: _share(torch.cat([e.attack_correct[name] for e in evaluations])) for name in attacks}
    return Run(
        name=_name(parts[0]),
        loss=parts[0].name or parts[0].loss,
        seed=parts[0].seed,
        threat=evaluations[0].threat.describe(),
        n=len(clean),
        clean=_share(clean),
        pgd50=_share(published),
        robust=None if void else _share(robust),
        own=shares.get("pgd50-train-loss"),
        certified=None if void or certified is None else _share(certified),
        individual={} if set(shares) <= {"pgd50", "pgd50-train-loss"} else shares,
        **judged,
        cost={
            "forwards": sum(e.forwards for e in evaluations),
            "backwards": sum(e.backwards for e in evaluations),
            "seconds": round(sum(e.seconds for e in evaluations), 2),
        },
        stages=tuple(Stage(s.name, s.attacked, s.broken, s.forwards, s.backwards, round(s.seconds, 3)) for s in stages),
        samples=Samples(
            **{key: column(key) for key in ("index", "y", "prediction", "clean", "pgd50", "robust")},
            stage=(column("broken_by") + (column("broken_by") >= 0)),  # stage 0 is the clean pass
            margin=column("margin"),
            margin_adv=column("margin_adv"),
            certified=certified,
            prediction_adv=column("prediction_adv"),
        ),
        examples=tuple(_examples(evaluations[0], parts[0].split)),
        region=region.merge(surveys) if len(surveys) == len(parts) else {},
        picture=parts[0].picture or {},
        train={
            **trained[0],
            **mean,
            "seconds": round(sum(t["seconds"] for t in trained), 2),
            "networks": len(trained),
        },
    )


def _verdicts(parts: list[NetworkResult], published: Tensor, robust: Tensor) -> dict[str, Any]:
    """What the checks say of this row's two claims, the folds' samples counted together; nothing without an audit."""
    audits = [part.audit for part in parts if part.audit is not None]
    if len(audits) < len(parts):
        return {}
    findings = merge([audit.findings for audit in audits])
    left = remaining(audits)
    return {
        "verdict": judge(Claim(ROBUST, robust.tolist()), robust.tolist(), findings, left),
        "pgd50_verdict": judge(Claim(PGD50, published.tolist()), robust.tolist(), findings, left),
        "checks": [finding.to_dict() for finding in findings],
        "remaining": left.to_dict(),
        "measures": {key: _mean([audit.measures.get(key) for audit in audits]) for key in audits[0].measures},
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _share(right: Tensor) -> Interval:
    return proportion(int(right.sum()), len(right))


def _added(costs: list[StageCost]) -> StageCost:
    total = {key: sum(getattr(cost, key) for cost in costs) for key in vars(costs[0]) if key != "name"}
    return StageCost(costs[0].name, **total)


def _examples(evaluation: Evaluation, split: Split, most: int = 6) -> list[Example]:
    """The surest broken sample of each class, surest first, as pictures; the perturbation around mid-grey, full scale =
    its largest change.

    Those the network was surest of say most: what is near the boundary anyway falls to anything.
    """
    broken = torch.nonzero(evaluation.broken_by > UNBROKEN)[:, 0]
    surest = broken[evaluation.margin[broken].argsort(descending=True, stable=True)].tolist()
    chosen: dict[int, int] = {}
    for row in surest:
        chosen.setdefault(int(evaluation.y[row]), row)
    x = pixels(split.test.x)
    examples = []
    for row in list(chosen.values())[:most]:
        delta = evaluation.x_adv[row] - x[row]
        full = float(delta.abs().max().clamp_min(1e-12))
        examples.append(
            Example(
                index=int(evaluation.index[row]),
                y=int(evaluation.y[row]),
                prediction=int(evaluation.prediction[row]),
                prediction_adv=int(evaluation.prediction_adv[row]),
                x_png=_png(x[row]),
                x_adv_png=_png(evaluation.x_adv[row]),
                delta_png=_png(0.5 + delta / (2 * full)),
            )
        )
    return examples


def _png(image: Tensor) -> str:
    """(C, H, W) in [0, 1] as PNG in base64."""
    array = (image * 255).round().clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
