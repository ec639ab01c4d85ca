"""Evaluate one network: the one in a run folder, or a user's own model from a file. Nothing is trained."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from .. import bounds, run_folder
from ..data import Split, pixels
from ..data.arguments import classes_differ
from ..data.labels import some
from ..errors import UserError, unknown
from ..evaluation import Budget, check_proofs, evaluate
from ..evaluation.distributed import Processes
from ..evaluation.suites import SUITES
from ..importers.model_file import ModelSource, class_order, code_hash, model_name, open_model
from ..importers.pretrained import full_reference, is_pretrained, pretrained_classes
from ..importers.python_code import split_reference
from ..io import understood, write_atomic
from ..models import ensemble
from ..outputs import frozen_eval
from ..progress import Progress
from ..queries import CountingModel
from ..results import PRECISION, Results
from ..threat import Threat
from ..user_input import number, typed, whole
from . import loss_spec
from .added_attacks import added_stages, try_stages
from .collect import TrainedNetwork, collect
from .config import DataCut
from .loss_spec import LossSpec
from .pipeline import EVALUATION_FILE, evaluate_network, note_size
from .training import TrainSummary

METHOD_NAMES = {
    "interval": "interval", "lipschitz": "Lipschitz", "linear": "linear", "crown": "CROWN", "alpha": "alpha-CROWN",
    "branch": "branch-and-bound",
}  # fmt: skip


@dataclass(frozen=True)
class ModelUnderTest:
    """A network and the data it is evaluated on.

    Args:
        name: of the run folder or the model's file.
        model: images in [0, 1] to logits or Outputs.
        loss: the loss it was trained with.
        seed: it was trained with.
        data: the data set's name or path.
        cut: how ``data.load`` makes the split.
        split: the data.
        folder: the run folder that it can be opened again from; None for a user's own model.
        about: what identifies network and data by their content, for config.json; with where they were found.
        code: hash of the user's code in it; "" where there is none.
        trained: how training ended, where that is known.
        members: the networks of an ensemble; none for a single network.
    """

    name: str
    model: nn.Module
    loss: LossSpec
    seed: int
    data: str
    cut: DataCut
    split: Split
    folder: Path | None
    about: dict[str, Any]
    code: str = ""
    trained: TrainSummary = field(default_factory=TrainSummary)
    members: tuple[ModelUnderTest, ...] = ()

    @property
    def row_name(self) -> str:
        """What its row is called in tables: the loss of a run folder, or the file of a user's own model."""
        return self.loss.text if self.folder else self.name


@contextmanager
def distributed_processes(device: str) -> Iterator[tuple[str, bool]]:
    """Join the process group that torchrun started, if it did.

    Args:
        device: "cuda" becomes this process's own GPU.

    Yields:
        (the device of this process, whether it is the first process).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield device, True
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device, Processes.current().is_first
    finally:
        distributed.destroy_process_group()


@typed
def from_run(run: str | Path, *, limit: int = 1000, device: str = "cpu", run_code: bool = False) -> ModelUnderTest:
    """The network in a run folder, and the test images of the data it was trained on.

    Args:
        run: a run folder that ``holdfast train`` or ``compare`` wrote.
        limit: at most so many test images, >= 0; 0 for all; of cross-validated data, from the run's fold.
        device: where the model goes.
        run_code: as for ``run_folder.load``.

    Returns:
        The network and its data.

    Raises:
        UserError: there is no such run, it names Python code and ``run_code`` is False, it does not say which data and
            loss the network was trained with, or the data has changed.
    """
    _check_limit(limit)
    run = Path(run)
    model, config = run_folder.load(run, device=device, run_code=run_code)
    if not {"cut", "loss", "fit"} <= config.keys():
        raise UserError(f"{run / 'config.json'} does not say which data and loss the network was trained with.")
    data = run_folder.data_of(run, config)
    reference = run_folder.loss_of(run, config, run_code)
    with understood(run / "config.json"):
        cut = replace(DataCut.from_json(config["cut"]), eval_split="test")  # chosen on val, evaluated on test
        loss = loss_spec.parse(reference)
    cut = replace(cut, limit=limit or None)
    split = cut.load(data)
    run_folder.check_data(run, config, split)
    run_folder.environments(run)  # what collect reads at the end is checked before the work
    code = run_folder.own_code(config)
    return ModelUnderTest(
        name=run.resolve().name,
        model=model,
        loss=loss,
        seed=config["fit"]["seed"],
        data=data,
        cut=cut,
        split=split,
        folder=run,
        about=_identity(model, split, code, loss),
        code=f"{code} {loss.code}".strip(),
        trained=TrainSummary.load(run),
    )


def _identity(model: nn.Module, split: Split, code: str, loss: LossSpec) -> dict[str, Any]:
    """What identifies a network and its data, wherever they are; and the loss, where it is the user's own."""
    return {
        "weights": run_folder.weights_hash(model),
        **({"code": code} if code else {}),
        **({"loss_code": loss.code} if loss.code else {}),
        "fingerprint": split.fingerprint,
    }


@typed
def from_file(
    source: ModelSource,
    data: str,
    *,
    loss: str = "sce",
    limit: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    reading: dict[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> ModelUnderTest:
    """A user's own model on their own data; all of it where it has no test split, since nothing is trained here.

    Args:
        source: how the model is opened.
        data: a name or path for ``data.load``.
        loss: the spec of the loss it was trained with; attacks also maximise its score.
        limit: at most so many test images, >= 0; 0 for all.
        seed: of the evaluation.
        device: where the model goes.
        reading: image_column, label_column, convert, resize and skip_corrupt, as for ``data.load``.
        classes: the model's class names in the order of its logits; empty where they are the data's, or those that a
            model of transformers names.

    Returns:
        The model and its data.

    Raises:
        UserError: as ``open_model``, ``loss_spec.parse``, ``data.load`` and ``class_order`` do.
    """
    _check_limit(limit)
    trained_with = loss_spec.parse(loss)
    # Absolute paths: the folder of results can then be read from anywhere.
    pretrained = is_pretrained(source.path)
    source = replace(source, path=full_reference(source.path) if pretrained else os.path.abspath(source.path))
    source = replace(source, weights=os.path.abspath(source.weights) if source.weights else "")
    cut = DataCut(limit=limit or None, whole=True, **(reading or {}))
    split = cut.load(data)
    named = pretrained_classes(source.path) if pretrained and not classes else ()
    if classes or set(split.classes) <= set(named):
        source = replace(source, class_order=class_order(classes or named, split.classes))
    model = open_model(source, device)
    identity, paths = run_folder.data_identity(data, split)
    settings = {key: value for key, value in _described(source).items() if key not in ("path", "weights")}
    found = {"model": source.path, **({"weights": source.weights} if source.weights else {}), **paths}
    code = code_hash(source)
    settings["name"] = model_name(source.path) if pretrained else split_reference(source.path)[1]
    return ModelUnderTest(
        name=model_name(source.path),
        model=model,
        loss=trained_with,
        seed=seed,
        data=paths.get("data", data),
        cut=cut,
        split=split,
        folder=None,
        about={
            run_folder.MODEL_FILE: settings,
            **_identity(model, split, code, trained_with),
            **identity,
            "loss": trained_with.text,
            run_folder.PATHS: found,
        },
        code=f"{code} {trained_with.code}".strip(),
    )


@typed
def from_several(
    openers: Sequence[Callable[..., ModelUnderTest]], mean: str = "probabilities", *, seed: int = 0, device: str = "cpu"
) -> ModelUnderTest:
    """Several networks as one, on the data that they share.

    Args:
        openers: each opens a network, as ``from_run`` or ``from_file`` does, when it is called with ``device=``.
        mean: what is averaged, as for ``models.ensemble``.
        seed: of the evaluation.
        device: where the networks go.

    Returns:
        Their ensemble and the data. It counts as trained with the loss of its members, or with SCE where they differ.

    Raises:
        UserError: as the openers and ``models.ensemble`` do; or the networks are not for the same test samples.
    """
    members = tuple(opener(device=device) for opener in openers)
    first = members[0]
    for one in members[1:]:
        if (one.split.fingerprint, one.split.classes) != (first.split.fingerprint, first.split.classes):
            raise UserError(
                f"an ensemble needs the same test samples for all its networks: those of {one.name} are not those of "
                f"{first.name}. Networks of one fold and one data set can be averaged."
            )
    model = ensemble([one.model for one in members], mean)
    loss = first.loss if all(one.loss.text == first.loss.text for one in members) else loss_spec.parse("sce")
    name = f"ensemble({', '.join(one.name for one in members)})"
    code = " ".join(filter(None, (one.code for one in members)))
    identity, paths = run_folder.data_identity(first.data, first.split)
    abouts = [{key: value for key, value in one.about.items() if key != run_folder.PATHS} for one in members]
    about = {
        run_folder.ENSEMBLE: {"mean": mean, "name": name, "members": abouts},
        **_identity(model, first.split, code, loss),
        **identity,
        run_folder.PATHS: paths,
    }
    return ModelUnderTest(
        name, model, loss, seed, first.data, first.cut, first.split, None, about, code, members=members
    )


def _described(source: ModelSource) -> dict[str, Any]:
    """A source as config.json holds it: what older folders do not have is left out where it is empty."""
    return {
        key: value
        for key, value in asdict(source).items()
        if value or key not in ("input_layout", "output", "class_order")
    }


def _check_limit(limit: int) -> None:
    whole("limit (0: all)", limit)


def check_classes(subject: ModelUnderTest) -> None:
    """Ask the network about two images, and compare the number of its logits with that of the data's classes.

    Raises:
        UserError: the network cannot answer, or the two numbers differ and no class names say which logit is whose.
    """
    with frozen_eval(subject.model), torch.no_grad():
        n_logits = CountingModel(subject.model)(pixels(subject.split.test.x[:2])).logits.shape[1]
    names = subject.split.classes
    if classes_differ(subject.model, n_logits, names):
        what = f"the network returns {n_logits} logits, but {subject.data} has {len(names)} classes ({some(names)})"
        if subject.folder is not None:
            raise UserError(
                f"{what}. It was trained on other classes: has the data changed? Train again, or bring it back."
            )
        raise UserError(
            f"{what}. If they are logits, name the network's classes in their order with --classes; if not, choose the "
            "logits with --output."
        )


@typed
def why_unbounded(subject: ModelUnderTest) -> str:
    """Why no bound of a network is known, in one sentence; "" where one is. Nothing is measured."""
    return bounds.why_not(subject.model, tuple(pixels(subject.split.test.x[:1]).shape[1:]))


@typed
def why_uncertified(subject: ModelUnderTest, results: Results) -> str:
    """Why the table of an evaluation has no certified column, in one sentence; "" where it has one.

    Args:
        subject: what was evaluated.
        results: its results.

    Returns:
        The sentence.
    """
    run = results.runs[0]
    if run.samples is None or run.samples.certified is None:
        reason = why_unbounded(subject) or "the model's answers vary, or its images are not float32."
        return f"certified: not measured, since {reason}"
    if not any(run.samples.certified):
        *others, last = [METHOD_NAMES[cost.method] for cost in run.proofs] or ["interval", "Lipschitz", "linear"]
        return f"certified: none of {run.n:,} samples could be proved, by {', '.join(others)} and {last} bounds."
    return ""


@typed
def evaluate_model(
    subject: ModelUnderTest,
    threat: str,
    suite: str,
    out: str | Path,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    proofs: str = "linear",
    precision: float = PRECISION,
    pgd50: int | None = None,
    batch_size: int | None = None,
    added: Sequence[str] = (),
    progress: Progress | None = None,
    command: str = "",
) -> Results | None:
    """Evaluate a network with ``evaluate_network``; write results.json and witnesses.safetensors.

    Under torch.distributed the processes share the attacks; the first one audits and writes, the others return None.

    Args:
        subject: the network and its data.
        threat: "norm:eps".
        suite: a key of ``SUITES``.
        out: the output folder; the work is cached there, and the same call resumes.
        seed: of the attacks' noise.
        budget: stop the attacks there.
        proofs: as for ``evaluate``.
        precision: as for ``evaluate``.
        pgd50: as for ``evaluate``.
        batch_size: of the attacks; default by image size.
        added: attacks that come after the suite, as for ``added_stages``.
        progress: called with (what is being done, units done, units in all).
        command: the command line, for the report.

    Returns:
        The Results; None in all but the first process.

    Raises:
        UserError: what cannot be read, or ``out`` belongs to another evaluation.
    """
    out = Path(out)
    against = Threat.parse(threat)  # what cannot be read must not leave a folder behind
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    check_proofs(proofs, budget)
    number("precision", precision, 0, 1, above=True)
    if pgd50 is not None:
        whole("pgd50", pgd50)
    stages, codes = added_stages(added)
    settings = {**subject.about, "threat": threat, "suite": suite, "seed": seed, "cut": subject.cut.to_json()}
    if budget:
        settings["budget"] = {name: value for name, value in asdict(budget).items() if value < math.inf}
    if proofs != "linear":
        settings["proofs"] = proofs
    if precision != PRECISION:
        settings["precision"] = precision
    if pgd50 is not None:
        settings["pgd50"] = pgd50
    if codes:
        settings["attacks"] = codes
    check_classes(subject)  # nor must a model that cannot answer
    try_stages(stages, codes, subject.model, subject.split.test, against)
    code = " ".join(filter(None, (subject.code, *codes.values())))
    key = f"{subject.split.fingerprint} {run_folder.weights_hash(subject.model)} {code}".strip()
    attacks = (*SUITES[suite], *stages) if stages else suite
    arguments: Any = {
        "trained_with": subject.loss.loss, "seed": seed, "batch_size": batch_size, "budget": budget, "key": key,
        "proofs": proofs, "precision": precision, "pgd50": pgd50,
    }  # fmt: skip
    if not Processes.current().is_first:
        evaluate(subject.model, subject.split.test, against, attacks, checkpoint=out / EVALUATION_FILE, **arguments)
        return None
    run_folder.reserve(out, settings)
    note_size(subject.split.test, out)
    result = evaluate_network(
        subject.model, subject.split.test, against, attacks, s=subject.loss.s, cache=out, progress=progress, **arguments
    )
    network = TrainedNetwork(
        subject.loss,
        subject.seed,
        _network_folder(subject, out),
        subject.trained,
        subject.split,
        subject.cut,
        result,
        name=None if subject.folder else subject.name,
        notes=tuple(getattr(subject.model, "notes", ())),
    )
    return collect([network], out, subject.data, settings, command)


def _network_folder(subject: ModelUnderTest, out: Path) -> Path:
    """Where ``replay`` finds the network: in ``out``, or in the run folder around it; else a copy goes to ``out``."""
    for k, member in enumerate(subject.members):
        place = out / run_folder.MEMBERS / str(k)
        if member.folder is None:
            write_atomic(place / "config.json", json.dumps(member.about, indent=1))
        else:
            run_folder.copy_network(member.folder, place)
    if subject.folder is None:
        return out
    run = subject.folder.resolve()
    if run == out.resolve().parent or run.is_relative_to(out.resolve()):
        return subject.folder
    return run_folder.copy_network(subject.folder, out / "network")
