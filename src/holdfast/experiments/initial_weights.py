"""Weights to begin training with: those of another run, or of a file; the head may be another one."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import models
from ..errors import UserError
from ..importers.weights import read_weights, without_prefix
from ..io import existing_file, load_tensors
from ..user_input import typed

BACKBONE, HEAD = "backbone.", "head."  # what the names of a Classifier's weights begin with
NORMALISATION = ("mean", "std")


class InitialWeightsWarning(UserWarning):
    """What of the initial weights was not taken."""


@typed
def load_initial(model: models.Classifier, source: str | Path) -> tuple[str, ...]:
    """Load the weights of a run or a file into a fresh network.

    The backbone must fit, weight by weight. The head is left as it was drawn where it has other names or shapes, as for
    other classes. Mean and std come along where the source has them, since the weights were trained with them. A file
    may hold the whole network, as a run and ``holdfast export`` write it, or a backbone alone; with more weights than
    the backbone has, such as a last layer, these are left out.

    Args:
        model: changed in place.
        source: a finished run folder; or a .safetensors, .pt, .pth, .bin or .ckpt file.

    Returns:
        What was changed to make the weights fit, and what was left out, a sentence each.

    Raises:
        UserError: the source is missing or damaged, or its weights do not fit the backbone (the message names the first
            difference of each kind).
    """
    tensors, notes = _read(source)
    expected = model.state_dict()
    tensors, removed = without_prefix(tensors, expected)
    if not any(name.startswith(BACKBONE) for name in tensors):
        inner = model.backbone.state_dict()
        tensors, more = without_prefix(tensors, inner)
        removed += more
        tensors = {f"{BACKBONE}{name}": tensor for name, tensor in tensors.items()}
    _check_backbone(tensors, expected, source)
    taken = {name: tensor for name, tensor in tensors.items() if name in expected and not name.startswith(HEAD)}
    notes += [*removed, *_head(tensors, expected, taken)]
    others = [name for name in tensors if name not in expected and not name.startswith(HEAD)]
    if others:
        count = f" and {len(others) - 1} more" if len(others) > 1 else ""
        notes.append(f"'{others[0]}'{count} of {source} left out: the network has no such weight")
    model.load_state_dict({**expected, **taken})
    return tuple(notes)


def initialise(model: models.Classifier, source: str) -> None:
    """``load_initial``, with a warning for each thing that was changed or left out. Nothing without a source."""
    for note in load_initial(model, source) if source else ():
        warnings.warn(note, InitialWeightsWarning, stacklevel=2)


def initial_identity(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """What identifies initial weights in config.json, and where they were found.

    Args:
        source: as for ``load_initial``; "" for none.

    Returns:
        ({"init_from": hash of the file}, {"init_from": absolute path}); both empty for none.

    Raises:
        UserError: there is no such file.
    """
    if not source:
        return {}, {}
    path = _file_of(source)
    with path.open("rb") as file:
        mark = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"init_from": mark}, {"init_from": str(Path(source).resolve())}


def _file_of(source: str | Path) -> Path:
    """The file with the weights: the source itself, or model.safetensors of a run folder."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return existing_file(source)
    path = folder / "model.safetensors"
    if not path.exists():
        raise UserError(f"{source} holds no model.safetensors: name a finished run folder, or a weights file.")
    return path.resolve()


def _read(source: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a run, whose checksum is verified, or of a file; with notes."""
    path = _file_of(source)
    if Path(source).is_dir():
        return load_tensors(path, "model", 1)[0], []
    return read_weights(str(path))


def _check_backbone(tensors: dict[str, Tensor], expected: dict[str, Any], source: str | Path) -> None:
    """Refuse weights that do not fit the network without its head."""
    mine = {name: t for name, t in expected.items() if not name.startswith(HEAD)}
    missing = [name for name in mine if name not in tensors and name not in NORMALISATION]
    shapes = [name for name in mine if name in tensors and tensors[name].shape != mine[name].shape]
    if not missing and not shapes:
        return
    parts = []
    if shapes:
        there, here = tuple(tensors[shapes[0]].shape), tuple(mine[shapes[0]].shape)
        parts.append(f"'{shapes[0]}' has the shape {there} there and {here} here ({len(shapes)} such)")
    if missing:
        parts.append(f"'{missing[0]}' is missing there ({len(missing)} such)")
        others = [name for name in tensors if name not in expected]
        parts += [f"'{others[0]}' is not of this network ({len(others)} such)"] if others else []
    raise UserError(
        f"the weights of {source} do not fit the network: {'; '.join(parts)}. Train the same model, for images of the "
        "same shape; only the head may differ."
    )


def _head(tensors: dict[str, Tensor], expected: dict[str, Any], taken: dict[str, Tensor]) -> list[str]:
    """Take the head where all of it fits; else a note on what differs."""
    mine = {name: tensor for name, tensor in expected.items() if name.startswith(HEAD)}
    theirs = {name: tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    if {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in theirs.items()}:
        taken |= theirs
        return []
    if not theirs:
        return ["the head is new: the weights hold none"]
    name = next(
        name for name in (*mine, *theirs) if name not in mine or name not in theirs or _differ(name, mine, theirs)
    )
    there, here = (tuple(side[name].shape) if name in side else "missing" for side in (theirs, mine))
    return [f"the head is new, since '{name}' differs: {there} in the weights, {here} in the network"]


def _differ(name: str, mine: dict[str, Any], theirs: dict[str, Tensor]) -> bool:
    return bool(mine[name].shape != theirs[name].shape)
