"""A finished NetworkResult on disk: reading it back needs no model and computes nothing.

Its adversarial images are those of the evaluation's checkpoint beside it. What came after, from the audit and the
region, is in the file itself: no image is stored twice.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Required, TypedDict

import torch
from torch import Tensor

from ..checks import Audit
from ..checks.cache import StoredAudit, stored_audit
from ..errors import UserError
from ..evaluation import Evaluation, StageCost, load_x_adv
from ..io import content_hash, load_tensors, save_tensors, understood
from ..mapped import chunks, take, with_rows
from ..results import Projection, ProofCost, RegionMeasures, SpotCheck
from ..threat import Threat
from .network_result import NetworkResult

RESULT, RESULT_VERSION = "network result", 3  # 2: the images that the checkpoint has are not repeated
_ROWS, _IMAGES = "later/rows", "later/x_adv"


def save_result(path: Path, checkpoint: Path, key: str, result: NetworkResult) -> None:
    """Write a result, whole or not at all.

    Args:
        path: the file.
        checkpoint: the file of the evaluation.
        key: what the result belongs to, as ``pipeline.result_key`` returns it.
        result: to be written.
    """
    evaluation = result.evaluation
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
    differs = [(now != then).flatten(1).any(1) for now, then in zip(chunks(x_adv), chunks(before), strict=True)]
    later = torch.nonzero(torch.cat(differs))[:, 0]
    tensors |= {_ROWS: later, _IMAGES: take(x_adv, later)}
    spot_check = evaluation.spot_check
    about = {
        "key": key,
        "x_adv": content_hash(before),
        "columns_of": columns_of,
        "evaluation": {
            **plain,
            "threat": evaluation.threat.describe(),
            "stages": [asdict(cost) for cost in evaluation.stages],
            "proofs": [asdict(cost) for cost in evaluation.proofs],
            "spot_check": None if spot_check is None else asdict(spot_check),
        },
        "audit": stored_audit(result.audit),
        "region": None if result.region is None else asdict(result.region),
        "projection": None if result.projection is None else asdict(result.projection),
    }
    save_tensors(path, RESULT, RESULT_VERSION, tensors, about, packed=[_IMAGES])


def load_result(path: Path, checkpoint: Path, key: str) -> NetworkResult | None:
    """Read a result back.

    Args:
        path: the file.
        checkpoint: the file of the evaluation.
        key: what the result must belong to.

    Returns:
        The NetworkResult; None where the file is missing, damaged, of another version, or belongs to something else.
    """
    with suppress(UserError):
        tensors, about = load_tensors(path, RESULT, RESULT_VERSION, _About)
        if about["key"] == key:
            with understood(path):
                x_adv = load_x_adv(checkpoint)
                if content_hash(x_adv) == about["x_adv"]:
                    x_adv = with_rows(x_adv, tensors.pop(_ROWS), tensors.pop(_IMAGES))
                    return _read({**tensors, "x_adv": x_adv}, about)
    return None


class _StoredEvaluation(TypedDict, total=False):
    """An evaluation without its columns; ``proofs`` and ``precision`` are missing in older files."""

    threat: Required[dict[str, Any]]
    stages: Required[tuple[StageCost, ...]]
    proofs: tuple[ProofCost, ...]
    spot_check: Required[SpotCheck | None]
    votes: Required[int]
    unfinished: Required[bool]
    attack_kinds: Required[tuple[str, ...]]
    precision: float


class _About(TypedDict):
    """What the file holds beside tensors."""

    key: str
    x_adv: str
    columns_of: dict[str, list[str]]
    evaluation: _StoredEvaluation
    audit: StoredAudit
    region: RegionMeasures | None
    projection: Projection | None


def _read(tensors: dict[str, Tensor], about: _About) -> NetworkResult:
    if any(len(column) != len(tensors["x_adv"]) for column in tensors.values()):
        raise ValueError("columns of different lengths")
    columns: dict[str, Any] = {name: column for name, column in tensors.items() if "/" not in name}
    for field, names in about["columns_of"].items():
        columns[field] = {name: tensors[f"{field}/{name}"] for name in names}
    plain: dict[str, Any] = {**about["evaluation"], "threat": Threat(**about["evaluation"]["threat"])}
    evaluation = Evaluation(**plain, **columns)
    return NetworkResult(evaluation, Audit(evaluation, **about["audit"]), about["region"], about["projection"])
