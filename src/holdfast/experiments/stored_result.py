"""A finished NetworkResult on disk: reading it back needs no model and computes nothing.

Its adversarial images are those of the evaluation's checkpoint beside it. What came after, from the audit and the
region, is in the file itself: no image is stored twice.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..checks import Audit
from ..errors import UserError
from ..evaluation import Evaluation, StageCost, load_x_adv
from ..io import content_hash, load_tensors, save_tensors, understood
from ..results import Finding, RemainingVulnerable, SpotCheck
from ..threat import Threat

RESULT, RESULT_VERSION = "network result", 3  # 2: the images that the checkpoint has are not repeated
_ROWS, _IMAGES = "later/rows", "later/x_adv"


def save_result(
    path: Path, checkpoint: Path, key: str, audit: Audit, region: dict[str, Any], projection: dict[str, Any]
) -> None:
    """Write a result, whole or not at all.

    Args:
        path: the file.
        checkpoint: the file of the evaluation.
        key: what the result belongs to, as ``pipeline.result_key`` returns it.
        audit: with the final evaluation.
        region: as ``region.measure`` returned it.
        projection: as ``region.projection`` returned it.
    """
    evaluation = audit.evaluation
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    columns_of: dict[str, list[str]] = {}  # the fields that are dicts of columns, with their keys in order
    for f in fields(Evaluation):
        value = getattr(evaluation, f.name)
        if isinstance(value, Tensor):
            tensors[f.name] = value
        elif isinstance(value, dict):
            tensors |= {f"{f.name}/{name}": column for name, column in value.items()}
            columns_of[f.name] = list(value)
        elif value is not None and f.name != "pristine":
            plain[f.name] = value
    x_adv, before = tensors.pop("x_adv"), load_x_adv(checkpoint)
    later = torch.nonzero((x_adv != before).flatten(1).any(1))[:, 0]
    tensors |= {_ROWS: later, _IMAGES: x_adv[later]}
    spot_check = evaluation.spot_check
    about = {
        "key": key,
        "x_adv": content_hash(before),
        "columns_of": columns_of,
        "evaluation": {
            **plain,
            "threat": evaluation.threat.describe(),
            "stages": [asdict(cost) for cost in evaluation.stages],
            "spot_check": None if spot_check is None else asdict(spot_check),
        },
        "audit": {
            "findings": [asdict(finding) for finding in audit.findings],
            "remaining": asdict(audit.remaining),
            "measures": audit.measures,
            "cost": asdict(audit.cost),
        },
        "region": region,
        "projection": projection,
    }
    save_tensors(path, RESULT, RESULT_VERSION, tensors, about, packed=[_IMAGES])


def load_result(
    path: Path, checkpoint: Path, key: str
) -> tuple[Evaluation, Audit, dict[str, Any], dict[str, Any]] | None:
    """Read a result back.

    Args:
        path: the file.
        checkpoint: the file of the evaluation.
        key: what the result must belong to.

    Returns:
        (evaluation, audit, region, projection), the fields of a NetworkResult; None where the file is missing, damaged,
        of another version, or belongs to something else.
    """
    with suppress(UserError):
        tensors, about = load_tensors(path, RESULT, RESULT_VERSION, _About)
        if about["key"] == key:
            with understood(path):
                x_adv = load_x_adv(checkpoint)
                if content_hash(x_adv) == about["x_adv"]:
                    x_adv[tensors.pop(_ROWS)] = tensors.pop(_IMAGES)
                    return _read({**tensors, "x_adv": x_adv}, about)
    return None


class _About(TypedDict):
    """What the file holds beside tensors."""

    key: str
    x_adv: str
    columns_of: dict[str, list[str]]
    evaluation: dict[str, Any]
    audit: dict[str, Any]
    region: dict[str, Any]
    projection: dict[str, Any]


def _read(tensors: dict[str, Tensor], about: _About) -> tuple[Evaluation, Audit, dict[str, Any], dict[str, Any]]:
    plain, audited = dict(about["evaluation"]), about["audit"]
    spot_check = plain.pop("spot_check")
    columns = {name: column for name, column in tensors.items() if "/" not in name}
    if any(len(column) != len(tensors["x_adv"]) for column in tensors.values()):
        raise ValueError("columns of different lengths")
    evaluation = Evaluation(
        **{
            **plain,
            **columns,
            "threat": Threat(**plain["threat"]),
            "stages": tuple(StageCost(**cost) for cost in plain["stages"]),
            "attack_kinds": tuple(plain["attack_kinds"]),
            "spot_check": None if spot_check is None else SpotCheck(**spot_check),
            **{
                field: {name: tensors[f"{field}/{name}"] for name in names}
                for field, names in about["columns_of"].items()
            },
        }
    )
    audit = Audit(
        evaluation,
        tuple(Finding.from_dict(finding) for finding in audited["findings"]),
        RemainingVulnerable(**audited["remaining"]),
        audited["measures"],
        StageCost(**audited["cost"]),
    )
    return evaluation, audit, about["region"], about["projection"]
