"""The loss spec: how a user writes a loss, its head, and the settings that hold for this row of a comparison alone.

``isce:s=10``, ``isce:s=2@cosine:scale=10``, ``sce*100``, ``isce:s=3+trades:beta=2+wideresnet:depth=16+fit:lr=0.01``;
and a loss of the user's own, ``mine.py:hinge:width=2``.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, unknown
from ..information.sources import SOURCES
from ..losses import LOSSES, Loss, LossEntry, OwnLoss, load_own_loss
from ..models import is_own, is_pretrained
from ..models.heads import HEADS
from ..objectives import OBJECTIVES
from ..outputs import Outputs
from ..spec import accepts, value_of
from ..spec import parse as parse_spec
from ..user_input import typed


@dataclass(frozen=True)
class LossSpec:
    """A parsed loss spec. Two are equal when their texts are; pickled, it travels as its text.

    Args:
        text: the spec as written, a user's own file without its folder; the name of its row.
        loss: (out, y) -> (N,).
        score: (out, y) -> (N,), the loss without its monotone link, which attacks maximise.
        head: a key of HEADS.
        head_settings: the head's settings, for ``models.build``.
        logit_scale: the factor on the logits after training, > 0.
        source: where I-SCE's s comes from if it is not a number, else "".
        objective: the spec of this row's own objective, or "".
        model: the spec of this row's own network, or "".
        fit: changes to the training configuration.
        s: the constant inference information in units of the logits; None where the loss has none, or no constant one.
        file: the path of the user's file that the loss comes from, or "".
        code: hash of that file and of what it imports, or "".
    """

    text: str
    loss: Loss = field(compare=False, repr=False)
    score: Loss = field(compare=False, repr=False)
    head: str = field(compare=False)
    head_settings: dict[str, Any] = field(default_factory=dict, compare=False)
    logit_scale: float = field(default=1.0, compare=False)
    source: str = field(default="", compare=False)
    objective: str = field(default="", compare=False)
    model: str = field(default="", compare=False)
    fit: dict[str, Any] = field(default_factory=dict, compare=False)
    s: float | None = field(default=None, compare=False)
    file: str = field(default="", compare=False)
    code: str = field(default="", compare=False)

    @property
    def reference(self) -> str:
        """The spec with the whole path of the user's file: what can be parsed anywhere on this machine."""
        return str(Path(self.file).parent / self.text) if self.file else self.text

    def __reduce__(self) -> tuple[Any, ...]:
        return parse, (self.reference,)  # a worker process has its own functions


@typed
def parse(text: str) -> LossSpec:
    """Parse a loss spec: ``name:settings``, with another head than the loss's own after @, and more after * and +.

    ``isce:s=2@cosine:scale=10`` trains I-SCE on a cosine head. s may name its source: ``isce:s=gradient:0.5``,
    ``isce:s=ibp``. After + come an objective, a network and training settings for this row alone:
    ``isce:s=3+trades:beta=2+wideresnet:depth=16,width=2``, ``sce+fit:weight_decay=5e-4``.

    ``sce*100`` trains with SCE and multiplies the logits by 100 afterwards. No prediction changes, hence no robustness:
    it is the control experiment for losses that make logits large.

    A loss of the user's own is ``mine.py:hinge``, see ``losses.load_own_loss``. The file is executed.

    Args:
        text: the spec.

    Returns:
        The parsed spec. Torch's random state is left as it was.

    Raises:
        UserError: an unknown loss, head or setting (with the nearest name), a value that the loss refuses (s < 0), a
            head that lacks what the loss needs, a factor that is not a positive number, or two objectives or networks.

    >>> chosen = parse("cosface:m=0.2,scale=15")
    >>> chosen.head, chosen.head_settings
    ('cosine', {'scale': 15})
    >>> parse("isce:s=3").s, chosen.s
    (3.0, 3.0)
    >>> parse("isce:s=attack+adversarial:steps=5").source, parse("sce+adversarial:steps=5").objective
    ('attack', 'adversarial:steps=5')
    """
    text, scale = text.strip(), 1.0
    row, *parts = re.split(r"\+(?=[a-zA-Z])", text)
    objective, model, fit = _parts(text, parts)
    trained, times, factor = row.rpartition("*")
    if times:
        value = value_of(factor.strip())
        if isinstance(value, (str, bool)) or not 0 < value < math.inf:
            raise UserError(f"'{text}' multiplies its logits by '{factor}': expected a positive number, as in sce*100.")
        scale = float(value)
    before, at, after = (trained if times else row).partition("@")
    if at and not after.strip():
        raise UserError(f"'{text}' names no head after its @: leave the @ out, or write one, as in isce:s=2@cosine.")
    name, settings, entry = _entry(before)
    source = str(settings.pop("s")) if name == "isce" and isinstance(settings.get("s"), str) else ""
    if source and source.partition(":")[0] not in SOURCES:
        raise unknown("source of s", source, [*SOURCES, "a number"])
    accepts("loss", name, entry.loss, settings)
    chosen = partial(entry.loss, **settings) if settings else entry.loss
    head, head_settings = parse_spec(after) if after else (entry.head, {})
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    accepts("head", head, HEADS[head], head_settings)
    parameters = inspect.signature(entry.loss).parameters
    if head == "cosine" and "scale" in parameters:  # one scale for loss and head: the loss divides by the head's
        head_settings.setdefault("scale", settings.get("scale", parameters["scale"].default))
        if head_settings["scale"] != settings.get("scale", parameters["scale"].default):
            raise UserError(f"'{text}' gives loss and head two different scales: name it once, in the loss.")
    if head != "cosine" and entry.head == "cosine":
        raise UserError(f"loss '{name}' works on cosines: it needs head 'cosine', got '{head}'.")
    with torch.random.fork_rng(devices=[]):
        probe = HEADS[head](4, 3, **head_settings)(torch.zeros(2, 4))
    values = chosen(Outputs(*probe), torch.tensor([0, 1]))  # refuses bad values now, not after an hour of training
    if values.shape != (2,):
        raise UserError(f"loss '{name}' returned shape {tuple(values.shape)} for 2 samples: a loss must return (N,).")
    s = None if source else _constant(name, {key: p.default for key, p in parameters.items()} | settings)
    s = None if s is None else s * scale
    own = entry.loss if isinstance(entry.loss, OwnLoss) else None
    if own is not None:
        text = text.replace(before.strip(), f"{name}{before.strip().partition(name)[2]}", 1)
    file, code = (str(own.path), own.code) if own else ("", "")
    return LossSpec(text, chosen, entry.score, head, head_settings, scale, source, objective, model, fit, s, file, code)


def _entry(text: str) -> tuple[str, dict[str, Any], LossEntry]:
    """(name, settings, entry) of a loss: of LOSSES, or of a user's file."""
    own = re.fullmatch(r"(.+\.py)(?::(\w*)(:.*)?)?", text.strip())
    if own is None:
        name, settings = parse_spec(text)
        if name not in LOSSES:
            raise unknown("loss", name, LOSSES)
        return name, settings, LOSSES[name]
    file, name = own[1], own[2]
    if not name:
        raise UserError(f"'{file}' alone is not enough: name the loss in it, such as {file}:hinge.")
    entry = load_own_loss(file, name)
    return f"{Path(file).name}:{name}", parse_spec(f"loss{own[3] or ''}")[1], entry


def _constant(name: str, settings: dict[str, Any]) -> float | None:
    """What a loss adds to the competitors' logits: s of I-SCE, scale times m of CosFace."""
    if name == "isce" and not isinstance(settings["s"], torch.Tensor):
        return float(settings["s"])
    return float(settings["m"] * settings["scale"]) if name == "cosface" else None


def _parts(text: str, parts: list[str]) -> tuple[str, str, dict[str, Any]]:
    """(objective, model, training settings) from the parts after the plus signs."""
    objective, model, fit = "", "", {}
    for part in parts:
        external = is_own(part.strip()) or is_pretrained(part)
        name, settings = ("", {}) if external else parse_spec(part)
        if name == "fit":
            fit = settings
        elif name in OBJECTIVES and not objective:
            objective = part.strip()
        elif not model and name not in OBJECTIVES:
            model = part.strip()
        else:
            raise UserError(f"'{text}' names two objectives or two networks: name one of each.")
    return objective, model, fit
