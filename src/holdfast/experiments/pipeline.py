"""One network's robustness, from its attacks to the final answer: evaluate, audit, measure the inference region.

``evaluate_network`` is the one place where these follow each other. What the audit and the region break counts, so only
its NetworkResult is final.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from .. import __version__, region, run_folder
from ..checks import Audit, audit, identity_of_checks, with_later_witnesses
from ..checks.cache import load_audit, save_audit
from ..checks.strength import NO_TRANSFER_SOURCE
from ..data import Data, DataWarning, pixels
from ..data.arguments import AnyData, as_data
from ..errors import UserError
from ..evaluation import Budget, Evaluation, Stage, StageCost, add_witnesses, evaluate
from ..evaluation.checkpoint import CleanAnswers, load_clean_answers
from ..evaluation.distributed import Processes
from ..evaluation.suites import resolve
from ..io import content_hash, load_tensors, save_tensors, write_atomic
from ..losses import Loss, as_loss, loss_name, negative_margin
from ..mapped import create, is_mapped, put, rows_at_a_time, take
from ..outputs import Model, frozen_eval, out_of_memory
from ..progress import Progress, as_progress
from ..queries import OFF_DATA_TOLERANCE, CountingModel, default_batch_size, device_of, exact_float32, margin_moved
from ..results import PRECISION, Projection, RegionMeasures
from ..threat import Threat, as_threat, column
from ..user_input import typed
from ..witnesses import Witnesses
from .network_result import NetworkResult
from .stored_result import load_result, save_result

EVALUATION_FILE, AUDIT_FILE, REGION_FILE = (f"{name}.safetensors" for name in ("evaluation", "audit", "region"))
RESULT_FILE, EVALUATED_FILE = "result.safetensors", "evaluated.json"
REGION, REGION_VERSION = "region cache", 2
LARGE = 1e9  # bytes in a folder of results, from which on their number is said before the work


@typed
def evaluate_network(
    model: Model,
    data: AnyData,
    threat: Threat | str,
    suite: str | Sequence[Stage] = "standard",
    *,
    trained_with: Loss | str | None = None,
    s: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    budget: Budget | None = None,
    proofs: str = "linear",
    precision: float = PRECISION,
    pgd50: int | None = None,
    smaller: NetworkResult | None = None,
    cache: str | Path | None = None,
    key: str = "",
    transfer_source: Tensor | Callable[[], Tensor | None] | None = None,
    progress: Progress | None = None,
) -> NetworkResult:
    """Attack a network, audit the evaluation, and measure its inference region: the final answer, with its verdict.

    An adversarial example that the audit or the region measurement finds counts as one of the attacks': it is one more
    stage of the evaluation, "audit" or "region". (Not so the region's for a model whose answers vary: a single answer
    does not decide there.)

    Under torch.distributed every process calls this: they share the attacks, and each returns the same answer.

    Args:
        model: images in the threat's box to logits or Outputs.
        data: the samples, uint8 or float in [0, 1]: Data, (x, y), a DataLoader, a data set or its name.
        threat: what the adversary may do, or its text, such as "linf:8/255".
        suite: a key of ``SUITES``, or stages.
        trained_with: the loss the network was trained with, or its name; default SCE. Attacks also maximise its score.
        s: the constant inference information of the loss in units of the logits; None where there is none.
        seed: of the noise of attacks and checks.
        batch_size: of the attacks, >= 1; default by image size, halved when memory runs out.
        budget: stop the attacks there; the verdict then says what may be left.
        proofs: as for ``evaluate``.
        precision: as for ``evaluate``.
        pgd50: as for ``evaluate``.
        smaller: the answer for the same samples at a smaller eps of that norm; what is broken there needs no attack.
        cache: a folder where work is kept: a killed call resumes from it, a finished one is read back.
        key: what the cache belongs to, data and weights; default a hash of both.
        transfer_source: (N, C, H, W), adversarial examples of an SCE network for the same samples, for the transfer
            check; or a function that returns them, called when the audit starts.
        progress: called with (what is being done, units done, units in all).

    Returns:
        The NetworkResult.

    Raises:
        UserError: as ``evaluate`` and ``audit`` do; and for a cache that belongs to other data or weights.
    """
    report, threat, trained_with, data = as_progress(progress), as_threat(threat), as_loss(trained_with), as_data(data)
    cache = None if cache is None else Path(cache)
    if cache is not None and not key:
        if not isinstance(model, nn.Module):
            raise UserError("a function has no weights to tell it by: with a cache, give a key that names it.")
        key = f"{content_hash(data.x, data.y, data.index)} {run_folder.weights_hash(model)}"
    asked: Any = {
        "trained_with": trained_with, "seed": seed, "budget": budget, "proofs": proofs, "precision": precision,
        "pgd50": pgd50,
    }  # fmt: skip
    known = None if smaller is None else smaller.evaluation
    result_id = result_key(threat, suite, key=key, s=s, smaller=None if known is None else known.threat, **asked)
    processes = Processes.current()
    finished = None if cache is None else _finished(model, data, cache, result_id, batch_size)
    if finished and (transfer_source is None or not lacks_transfer(finished)):
        return finished
    evaluation = evaluate(
        model,
        data,
        threat,
        suite,
        **asked,
        batch_size=batch_size,
        candidates=None if known is None else witnesses_of(known, data),
        checkpoint=None if cache is None else cache / EVALUATION_FILE,
        key=key,
        progress=lambda what, done, total: report(f"{threat}, {what}", done, total),
    )
    if cache is not None and processes.is_first:
        write_atomic(cache / EVALUATED_FILE, json.dumps({"key": result_id}))
    if callable(transfer_source):
        transfer_source = transfer_source()
    cache = cache if processes.is_first else None
    audited = cached_audit(
        model, data, evaluation, trained_with=trained_with, transfer_source=transfer_source, seed=seed,
        path=None if cache is None else cache / AUDIT_FILE, key=key, progress=progress,
    )  # fmt: skip
    measured = cached_region(
        model, data, audited.evaluation, s=s, seed=seed,
        path=None if cache is None else cache / REGION_FILE, key=key, progress=progress,
    )  # fmt: skip
    audited = with_later_witnesses(audited, model, measured.evaluation)
    result = NetworkResult(measured.evaluation, audited, measured.region, measured.projection)
    if cache is not None:
        save_result(cache / RESULT_FILE, cache / EVALUATION_FILE, result_id, result)
    return result


def _finished(model: Model, data: Data, cache: Path, result_id: str, batch_size: int | None) -> NetworkResult | None:
    """The result that the cache holds; None where it holds none, or a part, whose answers are compared then too."""
    alone = Processes.current().count == 1  # in a group, all processes must attack or none
    finished = load_result(cache / RESULT_FILE, cache / EVALUATION_FILE, result_id) if alone else None
    if finished is not None:
        check_answers(model, data, finished.evaluation, cache, batch_size)
    elif (cache / EVALUATION_FILE).exists():
        check_answers(model, data, load_clean_answers(cache / EVALUATION_FILE), cache, batch_size)
    return finished


def lacks_transfer(result: NetworkResult) -> bool:
    """Whether the transfer check did not run for want of an SCE network: such an audit is made again with one."""
    return any(finding.why == NO_TRANSFER_SOURCE for finding in result.audit.findings)


def witnesses_of(evaluation: Evaluation, data: Data) -> Tensor:
    """The adversarial examples of an evaluation, (N, C, H, W), as candidates: clean images where there is none."""
    if not is_mapped(data.x):
        x = pixels(data.x).cpu()
        return torch.where(column(evaluation.broken_by >= 0, x), evaluation.x_adv, x)
    found = create(None, evaluation.x_adv.shape, evaluation.x_adv.dtype)
    for rows in torch.arange(len(data)).split(rows_at_a_time(found)):
        broken = evaluation.broken_by[rows] >= 0
        put(found, rows, pixels(take(data.x, rows)), ~broken)
        put(found, rows, take(evaluation.x_adv, rows), broken)
    return found


def note_size(data: Data, folder: str | Path, count: int = 1) -> None:
    """Say before the work how much the adversarial images may take on disk, where that is more than a gigabyte.

    Args:
        data: what is evaluated.
        folder: where the images go.
        count: how many evaluations of so much data there are.

    Warns:
        DataWarning: the size at most: every image in the record, and again among the adversarial examples.
    """
    most = 2 * 4 * data.x.numel() * count
    if most > LARGE:
        warnings.warn(
            f"the adversarial images of {len(data):,} samples{f', {count} times,' if count > 1 else ''} take up to "
            f"{most / 1e9:,.1f} GB in {folder}, most often a third of that; --limit evaluates fewer.",
            DataWarning,
            stacklevel=2,
        )


def check_answers(
    model: Model,
    data: Data,
    stored: Evaluation | CleanAnswers,
    folder: str | Path,
    batch_size: int | None = None,
) -> None:
    """Before a stored evaluation is believed, ask a batch of images again, clean and attacked, and compare the margins.

    Args:
        model: the network as it is now.
        data: the samples of the evaluation.
        stored: the evaluation, or a part of it.
        folder: where it is stored, for the error.
        batch_size: of the evaluation.

    Raises:
        UserError: the network answers otherwise than it did: the evaluation is not of this network.
    """
    folder = Path(folder)
    if stored.votes > 1 or len(stored.margin) != len(data):  # answers vary anyway; or the key will not fit
        return
    # A batch as the evaluation had it, since the answers of some networks depend on it.
    rows = torch.arange(min(batch_size or default_batch_size(data.x), len(data)))
    some = data.take(rows).to(device_of(model, data))
    counted, x_adv = CountingModel(model), stored.x_adv[rows].to(some.x.device)
    with exact_float32(), frozen_eval(model), torch.no_grad():
        clean, attacked = counted(pixels(some.x)).logits, counted(x_adv).logits
    moved = margin_moved(clean, some.y, stored.margin[rows])
    if bool(moved.any()):
        row = int(moved.nonzero()[0, 0])
        was, now = float(stored.margin[row]), float(-negative_margin(clean, some.y)[row])
        raise UserError(
            f"the network answers otherwise than when {folder} was written: the margin of sample "
            f"{int(data.index[row])} was {was:.6g} and is {now:.6g}, with the same weights. Code that it calls has "
            "changed, or its answers vary. Name another folder."
        )
    differ = int(margin_moved(attacked, some.y, stored.margin_adv[rows], OFF_DATA_TOLERANCE).sum())
    if differ > 0.1 * len(rows):  # a few may: rounding decides some answers off the data
        raise UserError(
            f"the network answers {differ} of {len(rows)} adversarial images otherwise than when {folder} was written, "
            "with the same weights. Code or data that it reads has changed. Name another folder."
        )


def result_key(
    threat: Threat,
    suite: str | Sequence[Stage],
    *,
    key: str,
    trained_with: Loss | None,
    s: float | None,
    seed: int,
    budget: Budget | None = None,
    proofs: str = "linear",
    precision: float = PRECISION,
    pgd50: int | None = None,
    smaller: Threat | None = None,
) -> str:
    """What a stored NetworkResult belongs to: data and weights (``key``), the arguments, and the versions of the code.

    Returns:
        A hash in hexadecimal.

    Raises:
        UserError: an unknown suite, attack or score.
    """
    identity = {
        "key": key,
        "threat": threat.describe(),
        "stages": [asdict(stage) for stage in resolve(suite)],
        "trained with": loss_name(trained_with),
        "s": s,
        "seed": seed,
        "budget": None if budget is None else repr(budget),
        "proofs": proofs,
        "precision": precision,
        "pgd50": pgd50,
        **({} if smaller is None else {"smaller": smaller.describe()}),
        "checks": identity_of_checks(),
        "versions": [__version__, region.VERSION, REGION_VERSION],
    }
    return content_hash(identity)


def cached_audit(
    model: Model,
    data: Data,
    evaluation: Evaluation,
    *,
    trained_with: Loss | None,
    transfer_source: Tensor | None,
    seed: int,
    path: str | Path | None,
    key: str,
    progress: Progress | None = None,
) -> Audit:
    """``checks.audit``, read from the file at ``path`` where it was made before, else written there.

    Args:
        model: as for ``audit``.
        data: as for ``audit``.
        evaluation: as for ``audit``.
        trained_with: as for ``audit``.
        transfer_source: as for ``audit``.
        seed: as for ``audit``.
        path: the cache file; None to keep nothing.
        key: what the file belongs to, data and weights.
        progress: called before each check.

    Returns:
        The Audit.
    """
    report, file = as_progress(progress), None if path is None else Path(path)
    identity = {
        "key": key,
        "stages": [asdict(cost) for cost in evaluation.stages],
        "checks": identity_of_checks(),
        "transfer": None if transfer_source is None else content_hash(transfer_source),
        "seed": seed,
    }
    stored_key = content_hash(identity)
    cached = None if file is None else load_audit(file, stored_key, evaluation)
    if cached is not None:
        return cached
    made = audit(
        model,
        data,
        evaluation,
        trained_with=trained_with,
        transfer_source=transfer_source,
        seed=seed,
        progress=lambda name, done, total: report(f"checking: {name}", done, total),
    )
    if file is not None:
        save_audit(file, stored_key, made)
    return made


class MeasuredRegion(NamedTuple):
    """What ``cached_region`` returns.

    Attributes:
        evaluation: with one more stage, "region", for what the measurement broke on its way.
        region: the measures.
        projection: what a figure of the region needs.
    """

    evaluation: Evaluation
    region: RegionMeasures
    projection: Projection


class _StoredRegion(TypedDict):
    """What a region cache holds beside tensors."""

    key: str
    region: RegionMeasures
    projection: Projection
    cost: StageCost


def cached_region(
    model: Model,
    data: Data,
    evaluation: Evaluation,
    *,
    s: float | None,
    seed: int,
    path: str | Path | None,
    key: str,
    progress: Progress | None = None,
) -> MeasuredRegion:
    """The inference region, read from the file at ``path`` where it was measured before, else written there.

    What the minimal attack breaks on its way counts, as one more stage, "region"; not for a model whose answers vary.

    Args:
        model: as for ``region.measure``.
        data: the samples of the evaluation.
        evaluation: after the audit.
        s: as for ``region.measure``.
        seed: as for ``region.measure``.
        path: the cache file; None to keep nothing.
        key: what the file belongs to, data and weights.
        progress: called after each batch.

    Returns:
        The MeasuredRegion.
    """
    file = None if path is None else Path(path)
    stored_key = content_hash([region.VERSION, key, evaluation.threat.describe(), seed, s], evaluation.x_adv)
    stored = _read(file)
    if stored is not None and stored[1]["key"] == stored_key:
        broken, about = stored
    else:
        began = time.perf_counter()
        attempts: list[Witnesses] = []
        columns = model, data.x, data.y, evaluation.x_adv
        measure = partial(region.measure, *columns, evaluation.threat, s=s, index=data.index, seed=seed)
        measured = _fitting(partial(measure, on_witnesses=attempts.append, progress=progress))
        projection = _fitting(partial(region.projection, *columns, s=s, index=data.index, seed=seed))
        witnesses = attempts[-1]  # of the batch size that fitted in memory
        counts = evaluation.robust[witnesses.rows] & (evaluation.votes == 1)
        broken = {name: column[counts] for name, column in zip(Witnesses._fields, witnesses, strict=True)}
        passes, seconds = asdict(measured.passes), time.perf_counter() - began
        cost = StageCost("region", len(measured.distances.index), len(broken["rows"]), **passes, seconds=seconds)
        about = {"key": stored_key, "region": measured, "projection": projection, "cost": cost}
        if file is not None:
            plain = {"key": stored_key, **{part: asdict(about[part]) for part in ("region", "projection", "cost")}}
            save_tensors(file, REGION, REGION_VERSION, broken, plain)
    final = add_witnesses(evaluation, [Witnesses(**broken)], about["cost"])
    return MeasuredRegion(final, about["region"], about["projection"])


def _read(path: Path | None) -> tuple[dict[str, Tensor], _StoredRegion] | None:
    """(tensors, about) of a region cache; None where it is missing or damaged: it is then measured again."""
    if path is None or not path.exists():
        return None
    with suppress(UserError):
        return load_tensors(path, REGION, REGION_VERSION, _StoredRegion)
    return None


_Measured = TypeVar("_Measured")


def _fitting(measure: Callable[..., _Measured]) -> _Measured:
    """What ``measure(batch_size=...)`` returns: with its own batch size, with smaller ones where memory runs out."""
    for size in (None, 64, 16, 4):
        try:
            return measure(batch_size=size)
        except Exception as error:
            if not out_of_memory(error):
                raise
        torch.cuda.empty_cache()  # does nothing where CUDA was not used
    return measure(batch_size=1)
