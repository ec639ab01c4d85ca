"""Losses side by side: train a network per loss, seed and fold, evaluate each, and collect the answers in one Results.

Every network has a run folder of its own. What was finished when a command was stopped stays finished.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import bounds, models, process_pool, run_folder
from ..data import Split
from ..errors import UserError
from ..evaluation import load_x_adv
from ..io import read_json, understood, write_atomic
from ..progress import NETWORK_DONE, JobProgress, Progress, as_progress
from ..results import Results
from ..threat import Threat
from ..train import Tracking, tracker_names
from ..user_input import typed
from .collect import TrainedNetwork, collect
from .config import Comparison, DataCut, Job, default_out, own_model_identity
from .expected import expected_of_all
from .initial_weights import InitialWeightsWarning, initial_identity, initialise
from .pipeline import (
    EVALUATED_FILE,
    EVALUATION_FILE,
    RESULT_FILE,
    NetworkResult,
    check_answers,
    evaluate_network,
    lacks_transfer,
    note_size,
    result_key,
)
from .stored_result import load_result
from .training import TrainSummary, is_trained, tracking_of, train_network

__all__ = ["TRANSFER_LOSS", "Comparison", "compare", "default_out"]

TRANSFER_LOSS = "sce"  # the loss whose adversarial examples are tried on every other network
POLL = 0.2  # seconds between looks for the SCE network's adversarial examples


@typed
def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    command: str = "",
    device: str = "cpu",
    workers: int = 1,
    progress: JobProgress | None = None,
    track: str | Sequence[str] | None = None,
) -> Results:
    """Train and evaluate every network of a comparison; write results.json and witnesses.safetensors.

    Stopped at any moment, the same call resumes: networks that are complete on disk are not touched again, and the one
    under way continues from its checkpoint. So does a call with more losses or more seeds, in the same folder: what is
    there counts. Where it adds the SCE network, the other networks' audits are made again, now with the transfer check.

    Args:
        comparison: what is compared.
        out: the output folder; the networks' run folders are in out/runs.
        command: the command line, for the report.
        device: "cpu", "cuda", ...
        workers: networks at a time, each in a process of its own; 1 runs them in this process.
        progress: called with (network, what is being done, units done, units in all); with ``NETWORK_DONE`` once for
            each network that is complete, where the units are networks.
        track: trackers that get each network's epochs, and its evaluation at the end: "tensorboard", "wandb", "mlflow",
            or several. A network that was complete before is not sent.

    Returns:
        One run per loss, seed and threat, its folds put together.

    Raises:
        UserError: ``out`` belongs to another comparison, or to one with losses or seeds that this one lacks; a tracker
            is not installed or cannot start; or as ``Comparison.checked`` does.
    """
    trackers = tracker_names(track)
    comparison, out, report = comparison.checked(), Path(out), as_progress(progress)
    split = _try_out(comparison, device)
    _reserve(out, _config(comparison, split))

    data = _Splits(comparison.data)
    jobs = comparison.jobs(out, device)
    remaining = [job for job in jobs if stored_results(job, data[job.cut]) is None]
    done = [job for job in jobs if job not in remaining]
    if remaining:
        note_size(split.test, out, len(remaining) * len(comparison.threats))
    for number, job in enumerate(done, 1):
        report(job.name, NETWORK_DONE, number, len(jobs))

    def on_done(job: Job) -> None:
        done.append(job)
        report(job.name, NETWORK_DONE, len(done), len(jobs))

    ahead = expected_of_all(remaining, split, workers) if remaining else ""
    if ahead:
        report("all networks", ahead, 0, len(remaining))
    # The networks whose adversarial examples others wait for come first.
    remaining.sort(key=lambda job: job.loss.text != TRANSFER_LOSS)
    run = partial(run_job, track=trackers) if trackers else run_job
    process_pool.run(run, remaining, workers=workers, progress=report, on_done=on_done)
    return collect(_rows(comparison, jobs, data), out, _title(comparison), comparison.to_json(), command)


def _try_out(comparison: Comparison, device: str) -> Split:
    """What cannot work must not leave a folder behind: try device, data and network before the folder is reserved."""
    run_folder.check_device(device)
    split = comparison.cut(0).load(comparison.data)
    models.build(comparison.model or models.default_model(split.shape, device), split.shape, len(split.classes))
    for job in comparison.jobs("", device)[: len(comparison.losses)] if comparison.init_from else ():
        initialise(models.build(**job.model_arguments(split)), comparison.init_from)
    return split


@typed
def why_uncertifiable(comparison: Comparison, device: str = "cpu") -> str:
    """Why the networks of a comparison cannot all be certified, in one sentence; "" where they can.

    Args:
        comparison: whose networks, as they are before training.
        device: which decides the default network.

    Returns:
        The first loss whose network has no known bound, and why.

    Raises:
        UserError: as ``Comparison.checked`` does.
    """
    comparison = comparison.checked()
    split = comparison.cut(0).load(comparison.data)
    for job in comparison.jobs("", device)[: len(comparison.losses)]:
        why = bounds.why_not(models.build(**job.model_arguments(split)), tuple(split.shape))
        if why:
            return f"{job.loss.text}: {why}"
    return ""


def _config(comparison: Comparison, split: Split) -> dict[str, Any]:
    """What the comparison is, for config.json: data and code of the user's own by their content."""
    config: dict[str, Any] = comparison.to_json()
    data, paths = run_folder.data_identity(comparison.data, split)
    del config["data"]
    if codes := {row.text: row.code for row in comparison.loss_specs if row.file}:
        config["loss_code"] = codes
    if comparison.init_from:
        initial, place = initial_identity(comparison.init_from)
        config, paths = config | initial, paths | place
    if models.is_own(comparison.model) or models.is_pretrained(comparison.model):
        config["model"], code, found = own_model_identity(comparison.model)
        config, paths = config | code, paths | found
    return {**config, **data, **({run_folder.PATHS: paths} if paths else {})}


def _reserve(out: Path, config: dict[str, Any]) -> None:
    """Make ``out`` the folder of this comparison, also where it is that of a smaller one.

    Raises:
        UserError: it belongs to something else, or holds losses or seeds that this comparison lacks.
    """
    path = out / "config.json"
    there = read_json(path) if path.exists() else {}
    if "losses" not in there or _settings(there) != _settings(config):
        run_folder.reserve(out, config)
        return
    codes = config.get("loss_code", {})
    with understood(path):
        changed = [loss for loss, code in there.get("loss_code", {}).items() if codes.get(loss, code) != code]
        lacking = [f"the loss '{loss}'" for loss in there["losses"] if loss not in config["losses"]]
        lacking += [f"the seed {seed}" for seed in _seeds(there) if seed not in _seeds(config)]
    if lacking and not changed:
        raise UserError(
            f"{out} holds a comparison with {', '.join(lacking)}, which this one lacks: a comparison goes on in its "
            "folder with more losses or seeds, not with fewer. Name them too, or name another folder."
        )
    if changed:
        raise UserError(
            f"{out} holds networks of the loss '{changed[0]}', whose code has changed since (they differ in "
            "loss_code). Name another folder."
        )
    run_folder.reserve(out, {**there, run_folder.PATHS: config.get(run_folder.PATHS, {})})
    if there != config:
        write_atomic(path, json.dumps(config, indent=1))


_ROWS = ("losses", "loss_code", "seeds", "first_seed")  # of a comparison's config.json: which networks it has


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a comparison does with each of its networks."""
    return {key: value for key, value in config.items() if key not in (*_ROWS, run_folder.PATHS)}


def _seeds(config: dict[str, Any]) -> range:
    return range(config["first_seed"], config["first_seed"] + config["seeds"])


class _Splits(dict[DataCut, Split]):
    """A data set's cuts, each loaded once."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __missing__(self, cut: DataCut) -> Split:
        return self.setdefault(cut, cut.load(self.name))


def run_job(job: Job, progress: JobProgress, track: Sequence[str] = ()) -> None:
    """Train a job's network and evaluate it under each threat. The answers are on disk, for ``stored_results``.

    Args:
        job: the network.
        progress: called with its name and what is being done.
        track: names of trackers.
    """
    with tracking_of(job, track) as tracked:
        _train_and_evaluate(job, progress, tracked)


def _train_and_evaluate(job: Job, progress: JobProgress, tracked: Tracking) -> None:
    def report(what: str, done: int, total: int) -> None:
        progress(job.name, what, done, total)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InitialWeightsWarning)  # ``compare`` has said it of all, and how long they take
        model, _, split = train_network(job, progress=report, announce=False, track=tracked)
    comparison, key = job.comparison, _key(job, split)
    sce = _transfer_job(job)
    answers: dict[Threat, NetworkResult] = {}
    for threat in sorted(comparison.threats, key=lambda one: one.eps):
        transfer_source = None if sce is None else partial(_wait_for_x_adv, sce, threat, split, report)
        smaller = _smaller(comparison, threat)
        answers[threat] = evaluate_network(
            model,
            split.test,
            threat,
            comparison.suite,
            trained_with=job.loss.loss,
            s=job.loss.s,
            seed=job.seed,
            proofs=comparison.proofs,
            precision=comparison.precision,
            pgd50=comparison.pgd50,
            smaller=None if smaller is None else answers[smaller],
            cache=cache_folder(job, threat),
            key=key,
            transfer_source=transfer_source,
            progress=report,
        )
        name = cache_folder(job, threat).name.partition("-")[2]
        tracked.log({f"{name}/{key}": value for key, value in answers[threat].figures().items()}, job.fit_config.epochs)


def _smaller(comparison: Comparison, threat: Threat) -> Threat | None:
    """The threat of the next smaller eps in the same norm: its adversarial examples lie in this one too."""
    below = [one for one in comparison.threats if one.norm == threat.norm and one.eps < threat.eps]
    return max(below, key=lambda one: one.eps, default=None)


def cache_folder(job: Job, threat: Threat) -> Path:
    """Where the evaluation of a job's network under one threat is kept."""
    return job.folder / f"evaluation-{threat.norm}{threat.eps:.6g}"


def stored_results(job: Job, split: Split) -> list[NetworkResult] | None:
    """A job's finished results, one per threat, read back from its folder; None where the job is not complete.

    Raises:
        UserError: the folder belongs to another configuration, or its weights cannot be read.
    """
    if not is_trained(job, split):
        return None
    results = []
    for threat in job.comparison.threats:
        if not _is_evaluated(job, threat, split):
            return None
        folder = cache_folder(job, threat)
        stored = load_result(folder / RESULT_FILE, folder / EVALUATION_FILE, _result_key(job, threat, split))
        if stored is None or (_transfer_job(job) is not None and lacks_transfer(stored)):
            return None
        results.append(stored)
    if models.is_own(job.model_arguments(split)["name"]):  # weights alone do not say how the user's code answers
        model, _ = run_folder.load(job.folder, device=job.device, run_code=True)
        for result in results:
            check_answers(model, split.test, result.evaluation, job.folder)
    return results


def _key(job: Job, split: Split) -> str:
    """What a job's evaluations belong to: its data, its weights, and the user's code where the network has some."""
    code = run_folder.own_code(run_folder.read_config(job.folder))
    return f"{split.fingerprint} {run_folder.stored_weights_hash(job.folder)} {code}".strip()


def _result_key(job: Job, threat: Threat, split: Split) -> str:
    """What a job's result under one threat belongs to, as ``evaluate_network`` names it."""
    return result_key(
        threat,
        job.comparison.suite,
        key=_key(job, split),
        trained_with=job.loss.loss,
        s=job.loss.s,
        seed=job.seed,
        proofs=job.comparison.proofs,
        precision=job.comparison.precision,
        pgd50=job.comparison.pgd50,
        smaller=_smaller(job.comparison, threat),
    )


def _is_evaluated(job: Job, threat: Threat, split: Split) -> bool:
    """Whether the attacks on a job's network have ended, its audit perhaps not yet."""
    path = cache_folder(job, threat) / EVALUATED_FILE
    return path.exists() and read_json(path).get("key") == _result_key(job, threat, split)


def _transfer_job(job: Job) -> Job | None:
    """The SCE network of the same seed and fold, if the comparison has one and it is not this one."""
    comparison = job.comparison
    beside = [row for row in comparison.loss_specs if row.text == TRANSFER_LOSS and row != job.loss]
    if not beside:
        return None
    folder = job.folder.parent / run_folder.folder_name(TRANSFER_LOSS, job.seed, job.fold)
    return Job(comparison, beside[0], job.seed, job.fold, folder, job.device)


def _wait_for_x_adv(job: Job, threat: Threat, split: Split, progress: Progress) -> Tensor:
    """x_adv of another job's evaluation, once its attacks have ended. That job started earlier and waits for none."""
    while not _is_evaluated(job, threat, split):
        progress(f"waiting for the adversarial examples of {job.name}", 0, 1)
        time.sleep(POLL)
    return load_x_adv(cache_folder(job, threat) / EVALUATION_FILE)


def _rows(comparison: Comparison, jobs: list[Job], data: _Splits) -> list[TrainedNetwork]:
    """Every network's results, in the order of the table: by threat, loss and seed."""
    rows = []
    for job in jobs:
        split = data[job.cut]
        results = stored_results(job, split)
        if results is None:
            raise UserError(f"the results in {job.folder} disappeared while the comparison ran: rerun the command.")
        trained = TrainSummary.load(job.folder)
        rows += [TrainedNetwork(job.loss, job.seed, job.folder, trained, split, job.cut, one) for one in results]
    threats, losses = comparison.threats, comparison.loss_specs
    rows.sort(key=lambda row: (threats.index(row.result.evaluation.threat), losses.index(row.loss), row.seed))
    return rows


def _title(comparison: Comparison) -> str:
    return comparison.data + (", validation images" if comparison.eval_split == "val" else "")
