"""What is compared and how: a Comparison, the Jobs it consists of, and how a loss spec turns into their settings."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import data, models, run_folder, spec
from ..errors import UserError, unknown
from ..evaluation import check_proofs
from ..evaluation.suites import SUITES
from ..importers.pretrained import full_reference, pretrained_hash, short_reference
from ..importers.python_code import split_reference
from ..information.sources import source
from ..io import decode, existing_file
from ..objectives import OBJECTIVES, Schedule
from ..results import PRECISION, threat_text
from ..threat import Threat
from ..train import FitConfig, fit_to_json
from ..user_input import MOST, check_fields, number, typed, whole
from . import loss_spec
from .initial_weights import initial_identity
from .loss_spec import LossSpec

MOST_SEEDS = 10_000  # networks per loss
# Settings that a stored comparison names only where they are not the default: folders of before they were there resume.
_READING = ("image_column", "label_column", "convert", "resize", "skip_corrupt")
_LATER = ("proofs", "precision", "pgd50", *_READING, "init_from")


@dataclass(frozen=True)
class DataCut:
    """How ``data.load`` cuts a data set; the arguments have its names.

    Args:
        fold: (k, n): the k-th of n stratified folds is the test set. None: the data's own test split.
        limit: at most so many test images; None for all.
        limit_train: at most so many training images; None for all.
        whole: no training: all samples are test samples where the data has no test split.
        eval_split: "test", or "val" to evaluate on the validation images.
        image_column: of a table; "" to find it.
        label_column: of a table; "" to find it.
        convert: "rgb" or "grey", or "" for images as they are.
        resize: N for images of N x N, or 0 for images as they are.
        skip_corrupt: leave out images that cannot be decoded.
    """

    fold: tuple[int, int] | None = None
    limit: int | None = None
    limit_train: int | None = None
    whole: bool = False
    eval_split: str = "test"
    image_column: str = ""
    label_column: str = ""
    convert: str = ""
    resize: int = 0
    skip_corrupt: bool = False

    def load(self, name: str) -> data.Split:
        """The data set of this name, cut. Raises UserError as ``data.load`` does."""
        return data.load(name, **self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The settings that are not the default, as config.json and witnesses.safetensors hold them.

        >>> DataCut(fold=(0, 5)).to_json(), DataCut().to_json()
        ({'fold': [0, 5]}, {})
        """
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}

    @staticmethod
    def from_json(cut: dict[str, Any]) -> DataCut:
        """The cut that ``to_json`` wrote. Raises UserError for another object."""
        decoded: DataCut = decode(DataCut, cut, "cut")
        return decoded


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how. Equal comparisons share an output folder and resume each other's work.

    One with more losses or more seeds goes on in the folder of a smaller one, where that is named.

    Args:
        data: a name or path for ``data.load``.
        losses: loss specs such as "isce:s=10"; one row of the table each.
        threat: "norm:eps" such as "linf:0.1", or several with commas between; adversarial training uses the first.
        suite: a key of ``SUITES``.
        proofs: the last method of proof that is tried, as for ``evaluate``: "linear", "crown" or "alpha".
        precision: share of all samples that may be breakable still, in (0, 1], as for ``evaluate``.
        pgd50: how many samples PGD-50 attacks, as for ``evaluate``; None for all, 0 for none.
        objective: a key of ``OBJECTIVES`` with settings, such as "adversarial:steps=10".
        model: a key of ``MODELS`` with settings, or "" for the default of image size and device.
        seeds: networks per loss, 1 to 10,000.
        first_seed: the seed of the first one, >= 0.
        folds: cross-validation folds, >= 0; 0 for the data's own number.
        limit: at most so many test images, >= 0; 0 for all. Unused with folds > 1, which test every image once.
        limit_train: at most so many training images, >= 0; 0 for all.
        eval_split: "test", or "val" to evaluate on the validation images, for model selection.
        image_column: of a table of images; "" to find it. This and the next four as for ``data.load``.
        label_column: of a table of images; "" to find it.
        convert: "rgb" or "grey", or "" for images as they are.
        resize: N for images of N x N, or 0 for images as they are.
        skip_corrupt: leave out images that cannot be decoded.
        init_from: a run folder or a weights file whose weights every network begins with, as for ``load_initial``; ""
            for weights drawn from the seed.
        fit: how each network is trained.
    """

    data: str = "digits"
    losses: tuple[str, ...] = ("sce", "isce:s=3", "isce:s=100", "mmc", "center", "lgm", "cosface:m=0.2,scale=15")
    threat: str = "linf:0.1"
    suite: str = "standard"
    proofs: str = "linear"
    precision: float = PRECISION
    pgd50: int | None = None
    objective: str = "standard"
    model: str = ""
    seeds: int = 1
    first_seed: int = 0
    folds: int = 0
    limit: int = 1000
    limit_train: int = 0
    eval_split: str = "test"
    image_column: str = ""
    label_column: str = ""
    convert: str = ""
    resize: int = 0
    skip_corrupt: bool = False
    init_from: str = ""
    fit: FitConfig = field(default_factory=FitConfig)

    @cached_property
    def loss_specs(self) -> tuple[LossSpec, ...]:
        """The losses, parsed. Raises UserError as ``loss_spec.parse`` does."""
        return tuple(loss_spec.parse(text) for text in self.losses)

    @cached_property
    def threats(self) -> tuple[Threat, ...]:
        """The threats the networks are attacked under."""
        return tuple(Threat.parse(text) for text in self.threat.split(","))

    @property
    def networks(self) -> int:
        """How many networks are trained and evaluated."""
        return len(self.losses) * self.seeds * max(self.folds, 1)

    @property
    def row_names(self) -> list[str]:
        """What the rows of its table are called: each loss, and with several threats each loss under each threat."""
        losses = [row.text for row in self.loss_specs]
        threats = [threat_text(threat.describe()) for threat in self.threats]
        return [*losses, *(f"{loss} ({threat})" for threat in threats if len(threats) > 1 for loss in losses)]

    def checked(self) -> Comparison:
        """The same comparison with its defaults filled in, and every setting checked before any work is done.

        Raises:
            UserError: an unknown name, a value out of its range, a loss or a threat named twice, no loss at all.
        """
        check_fields(self)
        if len(set(self.threats)) < len(self.threats):
            raise UserError(f"the threats '{self.threat}' name one twice: name each once.")
        if not self.losses:
            raise UserError("there is no loss to compare: name at least one, such as sce.")
        names = [row.text for row in self.loss_specs]
        twice = sorted({text for text in names if names.count(text) > 1})
        if twice:
            raise UserError(f"the loss '{twice[0]}' is named twice: name each once, and use seeds for repetitions.")
        for row in self.loss_specs:
            schedule_of(self, row)
            fit_config(self, row)
            if row.model:
                models.check(row.model)
        if self.suite not in SUITES:
            raise unknown("suite", self.suite, SUITES)
        if self.proofs == "branch":
            raise UserError(
                "branch and bound needs a budget of time, which a comparison has not: compare with proofs 'alpha', and "
                "evaluate single networks with --proofs branch --budget 10min."
            )
        check_proofs(self.proofs, None)
        number("precision", self.precision, 0, 1, above=True)
        if self.pgd50 is not None:
            whole("pgd50", self.pgd50)
        if self.init_from and any(fit_config(self, row).init != "default" for row in self.loss_specs):
            raise UserError("init=interval draws weights anew, and init_from brings some: leave one of them out.")
        if self.model:
            models.check(self.model)
        if self.eval_split not in ("test", "val"):
            raise UserError(f"eval_split must be 'test' or 'val', got '{self.eval_split}'.")
        for name in ("seeds", "first_seed", "folds", "limit", "limit_train"):
            whole(name, getattr(self, name), int(name == "seeds"), MOST_SEEDS if name == "seeds" else MOST)
        for row in self.loss_specs:
            fit_config(self, row, self.first_seed + self.seeds)  # the last seed is one too
        return replace(
            self,
            losses=tuple(row.reference for row in self.loss_specs),
            folds=self.folds or data.default_folds(self.data),
        )

    def cut(self, fold: int) -> DataCut:
        """How the data of a fold is cut. Cross-validated data is evaluated whole: each sample is once a test sample."""
        folds = (fold, self.folds) if self.folds > 1 else None
        limit = None if folds else self.limit or None
        return DataCut(folds, limit, self.limit_train or None, eval_split=self.eval_split, **self.reading)

    @property
    def reading(self) -> dict[str, Any]:
        """How files are read where they leave a choice: those settings of ``DataCut`` that are not the default."""
        return {name: getattr(self, name) for name in _READING if getattr(self, name)}

    def to_json(self) -> dict[str, Any]:
        """What identifies the comparison, as its folder keeps it; without later settings that are the default."""
        losses = [row.text for row in self.loss_specs]
        every = {**asdict(self), "losses": losses, "fit": fit_to_json(self.fit)}
        later = {f.name: f.default for f in fields(self) if f.name in _LATER}
        return {
            key: value
            for key, value in json.loads(json.dumps(every)).items()
            if key not in later or value != later[key]
        }

    def jobs(self, out: str | Path, device: str = "cpu") -> list[Job]:
        """One job per loss, seed and fold, in that order from the inside out."""
        return [
            Job(self, row, seed, fold, Path(out) / "runs" / run_folder.folder_name(row.text, seed, fold), device)
            for fold in range(self.folds)
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            for row in self.loss_specs
        ]


@dataclass(frozen=True)
class Job:
    """One network to train and evaluate, in a folder of its own: all that a worker process needs.

    Args:
        comparison: what it is part of, as ``Comparison.checked`` returned it.
        loss: the loss it is trained with.
        seed: of weights, order, augmentation and noise.
        fold: which fold is the test set, where the comparison has folds.
        folder: its run folder.
        device: "cpu", "cuda", ...
    """

    comparison: Comparison
    loss: LossSpec
    seed: int
    fold: int
    folder: Path
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The folder's name, which progress reports show."""
        return self.folder.name

    @property
    def cut(self) -> DataCut:
        """How its data is cut."""
        return self.comparison.cut(self.fold)

    @property
    def fit_config(self) -> FitConfig:
        """Its training configuration: the comparison's, with the changes of its own loss spec, and its seed."""
        return fit_config(self.comparison, self.loss, self.seed)

    @property
    def is_adversarial(self) -> bool:
        """Whether training uses the threat: through its objective, or through its source of s."""
        objective = self.loss.objective or self.comparison.objective
        return bool(self.loss.source) or spec.parse(objective)[0] != "standard"

    def model_arguments(self, split: data.Split) -> dict[str, Any]:
        """The arguments of ``models.build`` for its network on this data."""
        return {
            "name": self.loss.model or self.comparison.model or models.default_model(split.shape, self.device),
            "shape": split.shape,
            "classes": len(split.classes),
            "head": self.loss.head,
            "head_settings": self.loss.head_settings,
            "seed": self.seed,
        }

    def about(self, split: data.Split) -> dict[str, Any]:
        """What its config.json says beside the training configuration: enough to rebuild model and data.

        Data and code of the user's own are named by their content, so that the folder and they can be moved.
        """
        model = self.model_arguments(split)
        data, paths = run_folder.data_identity(self.comparison.data, split)
        initial, place = initial_identity(self.comparison.init_from)
        paths = paths | place
        code: dict[str, str] = {}
        if self.loss.file:
            code, paths = {"loss_code": self.loss.code}, paths | {"loss": self.loss.file}
        if models.is_own(model["name"]) or models.is_pretrained(model["name"]):
            model["name"], own, found = own_model_identity(model["name"])
            code, paths = code | own, paths | found
        return {
            "model": model,
            "loss": self.loss.text,
            "objective": self.loss.objective or self.comparison.objective,
            **data,
            **code,
            **initial,
            "cut": self.cut.to_json(),
            **({"threat": self.comparison.threat} if self.is_adversarial else {}),
            **({} if self.loss.logit_scale == 1 else {"logit_scale": self.loss.logit_scale}),
            **({run_folder.PATHS: paths} if paths else {}),
        }


def own_model_identity(reference: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """What identifies a user's own or a pretrained backbone in config.json. A user's file is executed.

    Args:
        reference: path.py:name, timm:NAME, hf:NAME or hf:FOLDER.

    Returns:
        (file.py:name, {"code": hash}, {"model": absolute path.py:name}); for a folder of weights also their hash, since
        training begins with them.

    Raises:
        UserError: the file is missing, or raises.
    """
    if models.is_pretrained(reference):
        code, weights = pretrained_hash(reference)
        identity = {"code": code, **({"pretrained": weights} if weights else {})}
        return short_reference(reference), identity, {"model": full_reference(reference)}
    file, name = split_reference(reference)
    path = existing_file(file)
    return f"{path.name}:{name}", {"code": models.own_code_hash(reference)}, {"model": f"{path}:{name}"}


def schedule_of(comparison: Comparison, row: LossSpec, counts: Tensor | None = None) -> Schedule:
    """The training objective of a row: its own or the comparison's, with the row's loss and its source of s.

    Args:
        comparison: gives the threat, and the objective where the row names none.
        row: the loss spec.
        counts: (K,) training samples per class, for the sources of s that use them.

    Returns:
        A Schedule, which ``fit`` takes.

    Raises:
        UserError: an unknown objective or setting, or an objective that sets s itself for a loss with a source of s.
    """
    name, settings = spec.parse(row.objective or comparison.objective)
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    factory, threat = OBJECTIVES[name], comparison.threats[0]
    spec.accepts("objective", name, factory, settings)
    takes = inspect.signature(factory).parameters
    if row.source:
        if "s" not in takes:
            raise UserError(
                f"objective '{name}' sets s itself: give '{row.text}' a number for s, or choose another objective."
            )
        settings["s"] = source(row.source, threat, counts)
    if "threat" in takes:
        settings["threat"] = threat
    if "score" in takes:
        settings["score"] = row.score
    return factory(row.loss, **settings)


def fit_config(comparison: Comparison, row: LossSpec, seed: int = 0) -> FitConfig:
    """The comparison's training configuration with the row's own changes.

    Raises:
        UserError: the row changes a setting that FitConfig does not have, or to a value that it does not take.
    """
    return replace(changed_fit(comparison.fit, row.fit, f"'{row.text}'"), seed=seed)


def changed_fit(fit: FitConfig, changes: dict[str, Any], where: str) -> FitConfig:
    """A training configuration with other settings.

    Args:
        fit: the configuration.
        changes: settings of FitConfig, all but the seed, and their values.
        where: what names them, for errors.

    Returns:
        The changed configuration.

    Raises:
        UserError: a setting that FitConfig does not have, or a value that it does not take.

    >>> changed_fit(FitConfig(), {"ema": 0.99}, "--fit").ema
    0.99
    """
    known = [f.name for f in fields(FitConfig) if f.name != "seed"]
    for key in changes:
        if key not in known:
            raise unknown(f"training setting in {where}", key, sorted(known))
    try:
        return replace(fit, **changes)
    except TypeError:
        raise UserError(f"the training settings of {where} cannot be read: {changes}.") from None


@typed
def default_out(comparison: Comparison) -> Path:
    """out/DATA-THREAT-HASH, with a hash of the whole comparison: the same command finds its own work again."""
    whole = json.dumps(comparison.checked().to_json(), sort_keys=True)
    mark = hashlib.blake2b(whole.encode(), digest_size=3).hexdigest()
    name = Path(comparison.data).name or "data"
    return Path("out") / f"{name}-{spec.threat_file_name(comparison.threat)}-{mark}"
