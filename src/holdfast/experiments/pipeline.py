"""What follows an evaluation: its audit and the survey of its region, each read from its record, or made and kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import region, run_folder
from ..checks import CHECKS, audit, name_of
from ..checks.cache import load_audit, save_audit
from ..errors import UserError
from ..evaluation import StageCost, Witnesses, add_witnesses
from ..io import load_tensors, save_tensors
from ..outputs import out_of_memory
from ..process_pool import Progress
from . import loss_spec
from .collect import NetworkResult

SURVEY, SURVEY_VERSION = "region record", 2


def cached_audit(
    one: NetworkResult, model: nn.Module, record: Path, twin: Tensor | None, tell: Progress, *, seed: int
) -> NetworkResult:
    """The same with its audit: read from the record, or made and written there."""
    asked = {
        "data": one.split.fingerprint,
        "weights": run_folder.weights_hash(model),
        "stages": [asdict(cost) for cost in one.evaluation.stages],
        "checks": [name_of(check) for check in CHECKS],
        "twin": None if twin is None else hashlib.blake2b(twin.numpy().tobytes()).hexdigest(),
    }
    key = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()
    found = load_audit(record, key, one.evaluation)
    if found is None:
        found = audit(
            model,
            one.split.test,
            one.evaluation,
            trained_with=loss_spec.parse(one.loss).loss,
            transfer_source=twin,
            seed=seed,
            progress=lambda name, done, total: tell(one.folder.name, f"checking: {name}", done, total),
        )
        save_audit(record, key, found)
    return replace(one, evaluation=found.evaluation, audit=found)


def cached_region(one: NetworkResult, model: nn.Module, record: Path, tell: Progress, *, seed: int) -> NetworkResult:
    """The same with its inference region measured: read from the record, or measured and written there.

    What the minimal attack breaks on its way counts, as one more stage, "region"; not of a model whose answers differ:
    one of them says nothing of their majority.
    """
    found = one.evaluation
    threat, s = found.threat.describe(), loss_spec.parse(one.loss).s
    asked = [region.VERSION, one.split.fingerprint, run_folder.weights_hash(model), threat, seed, s]
    mark = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8)
    mark.update(found.x_adv.cpu().numpy().tobytes())
    key = mark.hexdigest()
    broken: dict[str, Tensor] = {}
    kept: dict[str, Any] = {}
    with suppress(UserError):  # a missing or damaged record is measured anew
        broken, kept = load_tensors(record, SURVEY, SURVEY_VERSION)
    if kept.get("key") != key:
        tell(one.folder.name, "measuring the inference region", 1, 1)
        test, began, parts = one.split.test, time.perf_counter(), []
        columns = model, test.x, test.y, found.x_adv
        ask = partial(region.measure, *columns, found.threat, s=s, index=test.index, seed=seed)
        measured = _fitting(partial(ask, keep=lambda *part: parts.append(part)))
        drawn = _fitting(partial(region.picture, *columns, s=s, index=test.index, seed=seed))
        fell, *_ = parts[-1]
        counts = found.robust[fell] & (found.votes == 1)
        broken = {name: column[counts] for name, column in zip(Witnesses._fields, parts[-1], strict=True)}
        measured["missed"] = None if found.votes > 1 else 0  # from here on they count
        attacked, seconds = len(measured["distances"]["index"]), time.perf_counter() - began
        cost = StageCost("region", attacked, len(broken["rows"]), **measured["passes"], seconds=seconds)
        kept = {"key": key, "region": measured, "picture": drawn, "cost": asdict(cost)}
        save_tensors(record, SURVEY, SURVEY_VERSION, broken, kept)
    counted = add_witnesses(found, [Witnesses(**broken)], StageCost(**kept["cost"]))
    return replace(one, evaluation=counted, region=kept["region"], picture=kept["picture"])


def _fitting(ask: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What ``ask(batch_size=...)`` answers: in batches of its own size, smaller ones where memory runs out."""
    for size in (None, 64, 16, 4):
        try:
            return ask(batch_size=size)
        except Exception as error:
            if not out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # does nothing where CUDA was not used
    return ask(batch_size=1)
