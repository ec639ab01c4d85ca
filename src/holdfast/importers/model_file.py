"""A user's own network: Python code, a torch.export program, ONNX, or a model of timm or transformers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..io import existing_file
from ..outputs import Model
from ..user_input import of_type, text, typed
from .exported import load_exported
from .layout import check_layout
from .onnx import load_onnx
from .pretrained import is_pretrained, open_pretrained, preprocessed, pretrained_hash, short_reference
from .python_code import build_model, source_hash, split_reference
from .weights import WEIGHT_SUFFIXES, load_weights
from .wrapped import check_order, check_preprocessing, wrap

FORMS = (
    "mymodel.py:build (a function without arguments), model.pt2 (torch.export), model.onnx, timm:NAME, or hf:PATH of "
    "transformers"
)


@dataclass(frozen=True)
class ModelSource:
    """Which file a network comes from, and which input it expects; JSON can hold it (lists become tuples).

    The network receives ``(low + (high - low) x - mean) / std`` for an image x in [0, 1], in its own layout. A model of
    timm or transformers brings these numbers and its size; those given here take their place.

    Args:
        path: mymodel.py:build, model.pt2, model.onnx, timm:NAME, hf:NAME or hf:FOLDER.
        weights: for a network that Python code builds: a .safetensors file, or a .pt, .pth, .bin or .ckpt file that
            holds tensors only; "" for none.
        input_range: (low, high), the pixel range that the network expects before mean and std; low < high.
        mean: one number per channel, or one for all; empty for none.
        std: as many numbers as ``mean``, each > 0.
        input_layout: as for ``wrap``.
        output: which entry of the network's answer holds the logits, by name or number; "" where there is no choice.
        class_order: the numbers of all logits in the order of the data's classes; empty where they agree.

    Raises:
        UserError: the layout is unknown, a number is not finite, the range is empty, a std is not positive, or mean and
            std differ in length.

    >>> ModelSource("mymodel.py:build", input_range=(0.0, 255.0)).input_range
    (0.0, 255.0)
    """

    path: str
    weights: str = ""
    input_range: tuple[float, ...] = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    input_layout: str = ""
    output: str = ""
    class_order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("path", "weights"):
            of_type(name, getattr(self, name), str | os.PathLike)
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        input_range, mean, std = check_preprocessing(self.input_range, self.mean, self.std)
        for name, value in (("input_range", input_range), ("mean", mean), ("std", std)):
            object.__setattr__(self, name, value)
        check_layout(self.input_layout)
        for name in ("path", "weights", "output"):
            text(name, getattr(self, name))
        object.__setattr__(self, "class_order", check_order(self.class_order))


@typed
def is_model_file(text: str | Path) -> bool:
    """Whether a text names a model file, by its suffix, or a model of timm or transformers, and not a run folder.

    Args:
        text: what the user gave: a path, path.py:name, timm:NAME or hf:NAME.

    Returns:
        True for a known suffix or library, unless there is a folder of that name.

    >>> [is_model_file(text) for text in ("nets/mine.py:build", "a.onnx", "a.pt2", "hf:vit", "out/sce-seed0-fold0")]
    [True, True, True, True, False]
    """
    if is_pretrained(str(text)) and not Path(text).is_dir():
        return True
    path, name = split_reference(str(text))
    known = (".py", ".onnx", ".pt2", *WEIGHT_SUFFIXES)
    return (bool(name) or Path(path).suffix.lower() in known) and not Path(text).is_dir()


def model_name(reference: str) -> str:
    """What tables call a user's own model: its file without the folder, or timm:NAME or hf:NAME.

    >>> model_name("nets/mine.py:build"), model_name("hf:nets/vit")
    ('mine.py:build', 'hf:vit')
    """
    return short_reference(reference) if is_pretrained(reference) else Path(reference).name


def class_order(network: Sequence[str], data: Sequence[str]) -> tuple[int, ...]:
    """Bring a network's logits into the order of the data's classes, by name.

    Args:
        network: the network's class names, in the order of its logits.
        data: the data's class names, in the order of its labels.

    Returns:
        The number of each logit: those of the data's classes first, then the others; empty where both name the same.

    Raises:
        UserError: a name is given twice, or a class of the data has no logit.

    >>> class_order(["bird", "cat", "dog"], ["cat", "dog"]), class_order(["cat", "dog"], ["cat", "dog"])
    ((1, 2, 0), ())
    """
    twice = sorted({name for name in network if network.count(name) > 1})
    if twice:
        raise UserError(f"the network's class '{twice[0]}' is named twice: give each logit a name of its own.")
    missing = [name for name in data if name not in network]
    if missing:
        raise UserError(
            f"the data's class '{missing[0]}' is not among the network's {len(network)} classes "
            f"({', '.join(network[:20])}): name them as the data does."
        )
    order = [network.index(name) for name in data]
    order += [place for place, name in enumerate(network) if name not in data]
    return () if list(network) == list(data) else tuple(order)


@typed
def code_hash(source: ModelSource) -> str:
    """Hash what a network comes from, with what it imports: a changed forward pass does not show in weights.

    Args:
        source: where the network comes from.

    Returns:
        16 hexadecimal digits.

    Raises:
        UserError: the file does not exist.
    """
    if is_pretrained(source.path):
        return pretrained_hash(source.path)[0]
    path = existing_file(split_reference(source.path)[0])
    return source_hash(path) if path.suffix == ".py" else hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


@typed
def open_model(source: ModelSource, device: str | torch.device = "cpu") -> nn.Module:
    """Open a network from its file or library. Python code is executed: open only files that you trust.

    Args:
        source: the file, its weights, and the input that the network expects.
        device: where to put the network.

    Returns:
        A module in eval mode that takes (N, C, H, W) images in [0, 1] and returns what the network returns. Its
        ``notes`` list what was changed to make the weights fit.

    Raises:
        UserError: a file is missing or damaged, the code raises (the message names file and line), the weights do not
            fit (the message names the first difference), a library is not installed or does not know the model, or the
            device cannot be used.
    """
    path, name = split_reference(source.path)
    suffix, notes = Path(path).suffix.lower(), []
    if source.weights and suffix in (".onnx", ".pt2"):
        raise UserError(f"{path} holds its own weights: leave out {source.weights}.")
    model: Model
    given: dict[str, Any] = {"input_range": source.input_range, "mean": source.mean, "std": source.std}
    if is_pretrained(source.path):
        opened = open_pretrained(source.path, weights=not source.weights)
        notes = [*opened.notes, *(load_weights(opened.network, source.weights) if source.weights else ())]
        model, given = preprocessed(opened, source.path, **given), {}
    elif suffix == ".onnx":
        model = load_onnx(path)
    elif suffix == ".pt2":
        model = load_exported(path, device)
    elif suffix == ".py":
        model = build_model(existing_file(path), name)
        if source.weights:
            notes = load_weights(model, source.weights)
    elif suffix in WEIGHT_SUFFIXES:
        raise UserError(
            f"{path} holds weights without a network. Write mymodel.py with a function build() that returns the "
            f"network, and give mymodel.py:build with {path} as its weights."
        )
    else:
        raise UserError(f"'{source.path}' is not a network file: expected {FORMS}.")
    wrapped = wrap(
        model,
        **given,
        input_layout=source.input_layout,
        output=source.output,
        class_order=source.class_order,
    )
    wrapped.notes = (*notes, *wrapped.notes)
    try:
        return wrapped.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"the network cannot be put on the device '{device}': {reason}. Try the device cpu.") from None
