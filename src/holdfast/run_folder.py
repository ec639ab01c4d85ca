"""The run folder: config.json, env.json, log.jsonl, checkpoint.safetensors, and model.safetensors once finished."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Required, TypedDict

import torch
from torch import Tensor, nn

from . import models
from .data import DATASETS, Split, local_path
from .environment import environment
from .errors import UserError
from .importers.model_file import ModelSource, code_hash, open_model
from .importers.pretrained import pretrained_hash
from .importers.python_code import split_reference
from .io import RESTORE, inside, load_tensors, read_json, understood, write_atomic
from .mapped import chunks
from .user_input import typed

MODEL_FILE = "model_file"  # the key of config.json that holds the ModelSource of a user's own model
ENSEMBLE = "ensemble"  # the key of config.json for the members of several networks that were evaluated as one
MEMBERS = "members"  # the folder of those networks' own folders, by number
PATHS = "paths"  # the key of config.json for where data and code were found: no part of what the run is
_FILES = (  # of a run, an evaluation or a bracket; env.json may be there first
    "checkpoint.safetensors", "model.safetensors", "log.jsonl", "train.json", "results.json", "witnesses.safetensors",
    "evaluation.safetensors", "audit.safetensors", "region.safetensors", "result.safetensors", "bracket.json",
    "smoothing.json",
)  # fmt: skip
LATER = "resumed_in"  # the key of env.json for the environments that the run was resumed in
MOST_PIXELS = 2**24  # values of an image that config.json may ask for


@typed
def check_device(device: str) -> None:
    """Raise UserError unless a tensor can be made on this device."""
    try:
        made = torch.zeros(1, device=device)
        made.cpu()  # a device without values, such as meta, fails here
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"the device '{device}' cannot be used here: {reason}. Try --device cpu.") from None
    if made.device.type == "cpu" and torch.device(device).index:
        raise UserError(f"the device '{device}' cannot be used here: there is one CPU. Write --device cpu.")


@typed
def folder_name(loss: str, seed: int, fold: int) -> str:
    """The folder of one network, in characters that every file system accepts.

    >>> folder_name("isce:s=10@cosine", 0, 2)
    'isce_s=10_cosine-seed0-fold2'
    """
    plain = "".join(c if c.isalnum() or c in "._-=" else "_" for c in loss)
    return f"{plain}-seed{seed}-fold{fold}"


@typed
def reserve(out: str | Path, config: dict[str, Any], *, write: bool = True) -> None:
    """Make ``out`` the folder of this configuration, or refuse it if it belongs to another one.

    A folder is what its configuration holds, which names data and code by their content. Only the key "paths", where
    they were found, may change: the new paths are noted. Where work goes on under another version of holdfast or torch,
    or on another machine, env.json notes that too.

    Args:
        out: the folder; it is created where it does not exist.
        config: what config.json holds; values that JSON can hold.
        write: whether to write config.json and env.json; if False, only check.

    Raises:
        UserError: config.json is there and differs, or cannot be read or written; or it is not there, but files are
            that would be overwritten.
    """
    out = Path(out)
    path, config = out / "config.json", json.loads(json.dumps(config))
    if not path.exists():
        theirs = sorted(name for name in _FILES if (out / name).exists())
        if theirs:
            raise UserError(
                f"{out} holds {theirs[0]}, but no config.json that says what it is: it would be overwritten. Name "
                "another folder."
            )
        if write:  # config.json last: with it the folder is reserved.
            write_atomic(out / "env.json", json.dumps(environment(), indent=1))
            write_atomic(path, json.dumps(config, indent=1))
        return
    there = read_json(path)
    differs = sorted(key for key in {*there, *config} - {PATHS} if there.get(key) != config.get(key))
    if differs:
        raise UserError(
            f"{out} holds a run with another configuration (they differ in {', '.join(differs)}). Name another folder."
        )
    if write:
        note_paths(out, config.get(PATHS, {}))
        _note_environment(out / "env.json")


@typed
def note_paths(out: str | Path, paths: dict[str, str]) -> None:
    """Note in config.json where data and code were found this time, if that has changed."""
    out = Path(out)
    there = read_json(out / "config.json")
    if paths and there.get(PATHS) != paths:
        write_atomic(out / "config.json", json.dumps({**there, PATHS: paths}, indent=1))


@typed
def environments(folder: str | Path) -> list[dict[str, Any]]:
    """The environments that a folder was worked on in, the first one first, as env.json holds them.

    Raises:
        UserError: env.json is damaged.
    """
    folder = Path(folder)
    path = folder / "env.json"
    if not path.exists():
        return []
    first = read_json(path, _Environments)
    return [{key: value for key, value in first.items() if key != LATER}, *first.get(LATER, [])]


def _note_environment(path: Path) -> None:
    """Add this environment to an env.json that lacks it."""
    known, now = environments(path.parent), environment()
    same = [key for key in now if key != "threads"]
    if not any(all(one.get(key) == now[key] for key in same) for one in known):
        first, *later = [*known, now]
        write_atomic(path, json.dumps({**first, **({LATER: later} if later else {})}, indent=1))


class _Environments(TypedDict, total=False):
    """env.json: the environment that the run was begun in, and those it was resumed in."""

    resumed_in: list[dict[str, Any]]


class _ModelArguments(TypedDict, total=False):
    """The arguments of ``models.build``."""

    name: Required[str]
    shape: Required[list[int]]
    classes: Required[int]
    head: str
    head_settings: dict[str, Any] | None
    seed: int


class _Paths(TypedDict, total=False):
    """Where data and code were found last."""

    model: str
    weights: str
    data: str
    init_from: str
    loss: str


class _Fit(TypedDict, total=False):
    """What others read of the training configuration."""

    seed: Required[int]


class RunConfig(TypedDict, total=False):
    """What config.json of a run folder holds, as far as others read it."""

    model: _ModelArguments
    model_file: dict[str, Any]
    ensemble: dict[str, Any]
    paths: _Paths
    code: str
    loss: str
    objective: str
    data: str
    data_hash: str
    cut: dict[str, Any]
    fit: _Fit
    logit_scale: float


@typed
def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of a run folder, checked.

    Raises:
        UserError: the folder has no config.json, or it is damaged (the message names the field), or it is the folder of
            a comparison (the message names one of its networks).
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.exists():
        raise UserError(
            f"{folder} is not a run folder: there is nothing of this name. A model file is named as model.onnx, "
            "model.pt2 or mymodel.py:build."
        )
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json.")
    networks = sorted(inner.parent for inner in (folder / "runs").glob("*/config.json"))
    if networks:
        raise UserError(f"{folder} holds a comparison of {len(networks)} networks: name one, such as {networks[0]}.")
    config: dict[str, Any] = read_json(path, RunConfig, what="the config.json of a run folder")
    return config


@typed
def load(folder: str | Path, *, device: str = "cpu", run_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a run folder, and its configuration.

    The folder is one that ``fit`` wrote with ``about["model"]``, the arguments of ``models.build``; or one that an
    evaluation of a user's own model or of an ensemble wrote: then that model, or its members, are opened again.

    Args:
        folder: the run folder.
        device: where the model goes.
        run_code: execute the Python file that the folder names, where it names one; what is executed is said on stderr.

    Returns:
        (model in eval mode, the contents of config.json).

    Raises:
        UserError: the folder is missing, unfinished, not a run folder, or damaged; it names Python code and
            ``run_code`` is False; a file that it names has changed; or the device cannot be used.
    """
    check_device(device)
    folder = Path(folder)
    config = read_config(folder)
    path = folder / "config.json"
    if ENSEMBLE in config:
        with understood(path):
            mean, count = config[ENSEMBLE]["mean"], len(config[ENSEMBLE]["members"])
        folders = [folder / MEMBERS / str(k) for k in range(count)]
        if any(ENSEMBLE in read_config(one) for one in folders):
            raise UserError(f"{path} names an ensemble of ensembles, which holdfast does not write. {RESTORE}")
        members = [load(one, device=device, run_code=run_code)[0] for one in folders]
        return models.ensemble(members, mean).eval(), config
    if MODEL_FILE in config:
        return _open_model_file(folder, config, device, run_code), config
    if not (folder / "model.safetensors").exists():
        raise UserError(f"the run in {folder} is not finished: rerun the command that started it; it resumes.")
    if "model" not in config:
        raise UserError(
            f"{path} does not say how the model is built (no key 'model'): build it and load the weights yourself."
        )
    arguments = dict(config["model"])
    external = models.is_own(arguments["name"]) or models.is_pretrained(arguments["name"])
    if external:
        arguments["name"] = config.get(PATHS, {}).get("model", arguments["name"])
    if models.is_pretrained(arguments["name"]) and pretrained_hash(arguments["name"])[0] != config.get("code"):
        raise UserError(
            f"{path} names the network {arguments['name']}, which has changed since it was trained: bring it back."
        )
    if models.is_own(arguments["name"]):
        _allow_code(path, arguments["name"], run_code)
    tensors, _ = load_tensors(folder / "model.safetensors", "model", 1)
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    if arguments["classes"] not in sizes or not 0 < math.prod(arguments["shape"]) <= MOST_PIXELS:
        raise UserError(
            f"{path} describes a network of {arguments['classes']} classes for images of {arguments['shape']}; that is "
            f"not the one in model.safetensors. {RESTORE}"
        )
    with understood(path):
        model = models.build(**arguments)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the weights in {folder} do not fit the network that {path} describes: {reason}") from None
    model.logit_scale = config.get("logit_scale", 1.0)
    return model.to(device).eval(), config


def _open_model_file(folder: Path, config: dict[str, Any], device: str, run_code: bool) -> nn.Module:
    """The user's own model, from the file that config.json names: code with consent, and only what was evaluated."""
    path = folder / "config.json"
    with understood(path):
        settings = {key: value for key, value in config[MODEL_FILE].items() if key != "name"}
        source = ModelSource(**{**_own_paths(config), **settings})
        file = Path(split_reference(source.path)[0])
    pretrained = models.is_pretrained(source.path)
    if file.suffix.lower() != ".onnx" and not pretrained:  # torch opens .pt2 files by pickle
        _allow_code(path, source.path, run_code)
    if file.suffix.lower() != ".py" and code_hash(source) != config.get("code"):
        raise UserError(f"{path} names the network {file}, but that is not the file that was evaluated (hash).")
    model = open_model(source, device)
    if code_hash(source) != config.get("code"):
        raise UserError(
            f"{path} names the network {source.path}, but its code has changed since it was evaluated: evaluate it "
            "again, into another folder."
        )
    return model


def _own_paths(config: dict[str, Any]) -> dict[str, str]:
    """The paths of a user's own model, for ModelSource."""
    paths = config.get(PATHS, {})
    return {key: paths[name] for key, name in (("path", "model"), ("weights", "weights")) if name in paths}


def own_code(config: dict[str, Any]) -> str:
    """The hash of the user's code that a loaded network consists of, as it is now; "" where there is none."""
    name = config["model"]["name"] if "model" in config else ""
    return models.own_code_hash(config.get(PATHS, {}).get("model", name)) if models.is_own(name) else ""


def loss_of(folder: str | Path, config: dict[str, Any], run_code: bool) -> str:
    """The spec of the loss that a run folder names, as ``experiments.loss_spec.parse`` takes it.

    Args:
        folder: the run folder.
        config: as ``load`` returned it.
        run_code: as for ``load``: a loss of the user's own is Python code, which parsing executes.

    Returns:
        The spec, with the path of the user's file where it has one.

    Raises:
        UserError: it names a file and ``run_code`` is False, or does not say where the file is.
    """
    path = Path(folder) / "config.json"
    if "loss_code" not in config:
        if ".py" in config["loss"].partition("+")[0]:
            raise UserError(f"{path} names a loss of a file, {config['loss']}, and lacks its hash. {RESTORE}")
        return str(config["loss"])
    file = config.get(PATHS, {}).get("loss", "")
    if not file or Path(file).name != config["loss"].partition(":")[0]:
        raise UserError(f"{path} does not say where the file of the loss {config['loss']} is. {RESTORE}")
    _allow_code(path, file, run_code)
    return str(Path(file).parent / config["loss"])


def _allow_code(config: Path, reference: str, run_code: bool) -> None:
    """Refuse the Python file that a folder names, or say that it is executed."""
    file = Path(split_reference(reference)[0]).resolve()
    what = "a torch.export program, which may hold code" if file.suffix.lower() == ".pt2" else "Python code"
    if not run_code:
        raise UserError(
            f"{config} names {what}, {file}: code that a folder names is executed only if you say so. If you trust the "
            "file, add --run-code (in Python: run_code=True)."
        )
    print(f"executing {file}, which {config} names", file=sys.stderr)


@typed
def data_of(folder: str | Path, config: dict[str, Any]) -> str:
    """The name or path of the data that a run folder names.

    Args:
        folder: the run folder.
        config: as ``load`` returned it.

    Returns:
        What ``data.load`` takes.

    Raises:
        UserError: it names no data; or it names a path outside of the folder without a hash of what lies there.
    """
    folder = Path(folder)
    if "data_hash" in config and "data" in config.get(PATHS, {}):
        return str(config[PATHS]["data"])
    name = config.get("data")
    if name is None:
        raise UserError(f"{folder / 'config.json'} does not say which data the network was trained on.")
    path = Path(name)
    if name in DATASETS or not (path.is_absolute() or ".." in path.parts or name.startswith("~") or local_path(name)):
        return str(name)
    return str(inside(folder, name, f"{folder / 'config.json'}, key data,"))


def check_data(folder: str | Path, config: dict[str, Any], split: Split) -> None:
    """Raise UserError unless the data is what the folder's hash says, where it has one."""
    folder = Path(folder)
    if "data_hash" in config and config["data_hash"] != data_hash(split):
        raise UserError(
            f"the data at {data_of(folder, config)} is not what {folder} was made with: its content has changed. Put "
            "the old data back, or train and evaluate again in another folder."
        )


def data_identity(name: str, split: Split) -> tuple[dict[str, str], dict[str, str]]:
    """What identifies a data set in config.json, and where it was found.

    Args:
        name: what the user gave to ``data.load``.
        split: what was loaded.

    Returns:
        ({"data": name}, {}) for a data set with a name; for a path ({"data_hash": hash}, {"data": absolute path}).
    """
    local = None if name in DATASETS else local_path(name)
    if local is None:
        return {"data": name}, {}
    return {"data_hash": data_hash(split)}, {"data": str(local.resolve())}


@lru_cache(maxsize=4)
def data_hash(split: Split) -> str:
    """A hash of the training samples and class names; of the test samples where nothing is to be trained."""
    mark = hashlib.blake2b(json.dumps(split.classes).encode(), digest_size=16)
    if not len(split.train):
        mark.update(split.fingerprint.encode())
    for part in (split.train, split.val):
        for column in (part.x, part.y, part.index):
            for some in chunks(column) if column.numel() else ():
                mark.update(some.cpu().contiguous().numpy().data)
    return mark.hexdigest()


@typed
def copy_network(folder: str | Path, to: str | Path) -> Path:
    """Copy what ``load`` needs to another folder, so that what refers to the network can be moved with it.

    Args:
        folder: a finished run folder.
        to: where the copy goes.

    Returns:
        ``to``.

    Raises:
        UserError: a file cannot be read or written.
    """
    folder = Path(folder)
    to = Path(to)
    for name in ("env.json", "model.safetensors", "config.json"):
        path = folder / name
        if path.exists():
            content = path.read_bytes()
            if not (to / name).exists() or (to / name).read_bytes() != content:
                write_atomic(to / name, content)
    return to


@typed
def weights_hash(model: nn.Module) -> str:
    """A short hash of all weights, buffers and the logit scale: it says which network a cached file belongs to."""
    return _hash(model.state_dict(), getattr(model, "logit_scale", 1.0))


@typed
def stored_weights_hash(folder: str | Path) -> str:
    """``weights_hash`` of the network in a finished run folder, read from its files: no model is built.

    Raises:
        UserError: config.json or model.safetensors is missing or damaged.
    """
    folder = Path(folder)
    tensors, _ = load_tensors(folder / "model.safetensors", "model", 1)
    return _hash(tensors, read_config(folder).get("logit_scale", 1.0))


def _hash(tensors: Mapping[str, Tensor], logit_scale: object) -> str:
    mark = hashlib.blake2b(str(logit_scale).encode(), digest_size=8)
    for name in sorted(tensors):
        mark.update(name.encode())
        mark.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()
