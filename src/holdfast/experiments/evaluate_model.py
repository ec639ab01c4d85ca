"""One network attacked: a run folder of holdfast's, or a user's own model from a file. Nothing is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from .. import run_folder
from ..data import Split, load, pixels
from ..errors import UserError, unknown
from ..evaluation import Budget, evaluate
from ..evaluation.suites import SUITES
from ..importers.model_file import ModelSource, code_hash, open_model
from ..outputs import frozen_eval
from ..process_pool import Progress
from ..queries import CountingModel
from ..results import Results
from ..threat import Threat
from . import loss_spec
from .collect import NetworkResult, collect
from .compare import evaluation_progress
from .pipeline import cached_audit, cached_region


@dataclass(frozen=True)
class ModelUnderTest:
    """A network and what it is attacked on.

    name: its row's; loss: the spec of the loss it was trained with; data, cut: how ``data.load`` makes the split;
    folder: where it can be opened again from, None for where its results go; about: what identifies it, for
    config.json; trained: how its training ended, where that is known.
    """

    name: str
    model: nn.Module
    loss: str
    seed: int
    data: str
    cut: dict[str, Any]
    split: Split
    folder: Path | None
    about: dict[str, Any]
    trained: dict[str, Any]


@contextmanager
def distributed_processes(device: str) -> Iterator[tuple[str, bool]]:
    """(this process's device, whether it is the first): torchrun's processes find each other here, one is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield device, True
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device, distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


NOT_TRAINED = {"accuracy": None, "val": None, "seconds": 0.0}


def from_run(run: Path, *, limit: int = 1000, device: str = "cpu") -> ModelUnderTest:
    """The network in a run folder. Raises UserError where there is none, or one that ``train_one`` did not train."""
    _counted(limit)
    model, config = run_folder.load(run, device=device)
    if not {"data", "cut", "loss", "fit"} <= config.keys():
        raise UserError(f"{run / 'config.json'} does not say which data and loss the network was trained with.")
    cut = {key: value for key, value in config["cut"].items() if key != "on"}  # chosen on val, judged on test
    if not cut.get("fold"):
        cut["limit"] = limit or None
    summary = run / "train.json"
    trained = run_folder.read_json(summary) if summary.exists() else NOT_TRAINED
    return ModelUnderTest(
        run.name, model, config["loss"], config["fit"]["seed"], config["data"], cut, load(config["data"], **cut), run,
        {"run": str(run)}, trained,
    )  # fmt: skip


def _counted(limit: int) -> None:
    if limit < 0:
        raise UserError(f"limit must be >= 0 (0: all), got {limit}.")


def from_file(
    source: ModelSource, data: str, *, loss: str = "sce", limit: int = 1000, seed: int = 0, device: str = "cpu"
) -> ModelUnderTest:
    """A user's own model on his own data: all of it where it has no test split, since nothing is trained here.

    loss: what it was trained with, which its attacks are matched to. Raises UserError as ``open_model`` and
    ``data.load`` do.
    """
    _counted(limit)
    source = replace(source, path=os.path.abspath(source.path))  # as the data: it is found again from anywhere
    source = replace(source, weights=os.path.abspath(source.weights) if source.weights else "")
    model = open_model(source, device)
    cut: dict[str, Any] = {"limit": limit or None, "whole": True}
    local = Path(data).expanduser()
    data = str(local.resolve()) if local.exists() else data
    split = load(data, **cut)
    about = {"foreign": asdict(source), "code": code_hash(source), "loss": loss, "data": data}
    return ModelUnderTest(Path(source.path).name, model, loss, seed, data, cut, split, None, about, NOT_TRAINED)


def evaluate_model(
    subject: ModelUnderTest,
    threat: str,
    suite: str,
    out: Path,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    batch_size: int | None = None,
    tell: Progress = lambda *_: None,
    command: str = "",
) -> Results | None:
    """Attack it, audit the answer, and write results.json and witnesses.safetensors to ``out``.

    Under torch.distributed the processes share the attacks; the first one audits and writes, the others return None.
    Raises UserError for what cannot be read, and where ``out`` belongs to another evaluation.
    """
    against = Threat.parse(threat)  # what cannot be read must not leave a folder behind
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    trained_with = loss_spec.parse(subject.loss).loss
    settings = {**subject.about, "threat": threat, "suite": suite, "seed": seed, "cut": subject.cut}
    if budget:
        settings["budget"] = {name: value for name, value in asdict(budget).items() if value < math.inf}
    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    with frozen_eval(subject.model), torch.no_grad():  # nor must a model that cannot answer
        CountingModel(subject.model)(pixels(subject.split.test.x[:2]))
    if first:
        run_folder.reserve(out, settings)
    evaluation = evaluate(
        subject.model,
        subject.split.test,
        against,
        suite,
        trained_with=trained_with,
        seed=seed,
        batch_size=batch_size,
        budget=budget,
        checkpoint=out / "evaluation.safetensors",
        key=f"{subject.split.fingerprint} {run_folder.weights_hash(subject.model)}",
        progress=evaluation_progress(subject.name, tell, against),
    )
    if not first:
        return None
    judged = NetworkResult(
        subject.loss, subject.seed, subject.folder or out, evaluation, subject.trained, subject.split, subject.cut,
        name=None if subject.folder else subject.name,
    )  # fmt: skip
    judged = cached_audit(judged, subject.model, out / "audit.safetensors", None, tell, seed=seed)
    judged = cached_region(judged, subject.model, out / "region.safetensors", tell, seed=seed)
    return collect([judged], out, subject.data, settings, command)
