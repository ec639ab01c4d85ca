"""Image classifiers of timm and of Hugging Face's transformers, by name or from a folder: ``timm:NAME``, ``hf:PATH``.

Their preprocessing is inside: pixel range, mean, std, and a resize to the size that they take, through which gradients
flow. The threat is a ball around the images as the data has them. Code that comes with a model is never executed.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..optional_package import is_installed, optional_package
from ..outputs import out_of_memory
from ..spec import parse

PACKAGES = {"timm": "timm", "hf": "transformers"}
_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # of PIL's resampling filters
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of an image x in [0, 1]: ``(low + (high - low) x - mean) / std``, resized and cropped.

    Args:
        input_range: (low, high).
        mean: one number per channel; empty for none.
        std: as many.
        resize: (height, width), or one number for the shorter side; empty for none.
        crop: (height, width) of the middle that is left then; empty for none.
        mode: bilinear, bicubic or nearest.
    """

    input_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: tuple[int, ...] = ()
    crop: tuple[int, ...] = ()
    mode: str = "bilinear"


@dataclass(frozen=True)
class Pretrained:
    """A network of another library.

    Args:
        network: images as it expects them to logits, or to (N, D) features.
        preprocessing: what it expects.
        classes: the names of its logits, where it has some.
        notes: what was assumed, a sentence each.
    """

    network: nn.Module
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_pretrained(text: str) -> bool:
    """Whether a model's name refers to timm or to transformers.

    >>> [is_pretrained(text) for text in ("timm:resnet18", "hf:./vit", "wideresnet:depth=16")]
    [True, True, False]
    """
    return text.strip().partition(":")[0] in PACKAGES and ":" in text


def split_pretrained(text: str) -> tuple[str, str, dict[str, Any]]:
    """(library, name or absolute folder, settings) of a reference.

    Raises:
        UserError: it names nothing, or a folder that does not exist or holds no model; or the package is not installed.
    """
    kind, _, rest = text.strip().partition(":")
    name, colon, written = rest.rpartition(":") if re.search(r":[^:/]*=", rest) else (rest, "", "")
    if not name.strip():
        raise UserError(f"'{text}' alone is not enough: name the model, such as timm:resnet18 or hf:google/vit-base.")
    if not is_installed(PACKAGES[kind]):
        raise UserError(
            f"the model {text} needs the package {PACKAGES[kind]}: pip install 'holdfast[{kind}]', or pip install "
            f"{PACKAGES[kind]}."
        )
    settings = parse(f"model:{written}")[1] if colon else {}
    if kind == "timm":
        return kind, name, settings
    if settings:
        raise UserError(f"'{text}' has settings, which models of transformers do not take: leave out {written}.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not the folder of a transformers model: it has no config.json.")
        return kind, str(folder.resolve()), {}
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"there is no folder {name}: name one that save_pretrained wrote, or a model of the hub.")
    return kind, name, {}


def full_reference(text: str) -> str:
    """The reference with an absolute folder, so that it can be read from anywhere."""
    kind, name, _ = split_pretrained(text)
    return f"{kind}:{name}" if kind == "hf" else text.strip()


def short_reference(text: str) -> str:
    """The reference without the place of its folder, for tables and config.json.

    >>> short_reference("hf:nets/vit"), short_reference("timm:resnet18:in_chans=1")
    ('hf:vit', 'timm:resnet18:in_chans=1')
    """
    kind, _, rest = text.strip().partition(":")
    return f"hf:{Path(rest).name}" if kind == "hf" else text.strip()


def pretrained_hash(text: str) -> tuple[str, str]:
    """(a hash of what a model is but for its weights, a hash of the weights).

    Args:
        text: the reference.

    Returns:
        16 hexadecimal digits each. For a model of the hub the first one is of its name, the second one is "".

    Raises:
        UserError: as ``split_pretrained`` does, or a file cannot be read.
    """
    kind, name, _ = split_pretrained(text)
    if kind == "timm" or not Path(name).is_absolute():
        return hashlib.blake2b(text.strip().encode(), digest_size=8).hexdigest(), ""
    try:
        files = sorted(path for path in Path(name).iterdir() if path.is_file())
        settings = [path for path in files if path.name in ("config.json", "preprocessor_config.json")]
        return _hash_files(settings), _hash_files([path for path in files if path.suffix in _WEIGHTS])
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from None


def _hash_files(paths: Sequence[Path]) -> str:
    mark = hashlib.blake2b(digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            mark.update(f"{path.name} {hashlib.file_digest(file, 'blake2b').hexdigest()}".encode())
    return mark.hexdigest()


def open_pretrained(text: str, *, weights: bool = True) -> Pretrained:
    """Open a classifier with its weights.

    Args:
        text: timm:NAME, with settings of ``timm.create_model`` after another colon; or hf:PATH or hf:NAME.
        weights: whether its weights are wanted; False for others that come from a file.

    Returns:
        The network, in eval mode and float32.

    Raises:
        UserError: the package is missing or broken; the model is unknown, cannot be read or fetched, or is no trained
            image classifier.
    """
    kind, name, settings = split_pretrained(text)
    return _open_timm(text, name, {"pretrained": weights, **settings}) if kind == "timm" else _open_hf(text, name)


def open_backbone(text: str) -> Pretrained:
    """Open a network without its last layer, with its weights: images to (N, D) features. Raises as above."""
    kind, name, settings = split_pretrained(text)
    if kind == "timm":
        return _open_timm(text, name, {"pretrained": True, **settings, "num_classes": 0})
    return _open_hf(text, name, head=False)


def pretrained_classes(text: str) -> tuple[str, ...]:
    """The names of a classifier's logits, in order, where its configuration has some; empty for timm."""
    kind, name, _ = split_pretrained(text)
    if kind == "timm":
        return ()
    transformers = optional_package("transformers", f"the model {text}", "'holdfast[hf]'")
    with _quiet(transformers), _errors(text):
        return _labels(transformers.AutoConfig.from_pretrained(name))


class Preprocessed(nn.Module):
    """A pretrained network behind its preprocessing: (N, C, H, W) in [0, 1] -> what the network returns.

    Args:
        network: of another library.
        preprocessing: what it expects.
        what: its reference, for errors.
    """

    low_high: Tensor
    mean: Tensor
    std: Tensor
    normalised = False  # by the data's own mean and std: it has its own

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, what: str) -> None:
        super().__init__()
        self.network, self.what = network, what
        self.resize, self.crop, self.mode = preprocessing.resize, preprocessing.crop, preprocessing.mode
        self.channels = len(preprocessing.mean)
        self.register_buffer("low_high", torch.tensor(preprocessing.input_range))
        self.register_buffer("mean", torch.tensor(preprocessing.mean or (0.0,)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std or (1.0,)).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        """(N, C, H, W) in [0, 1] -> logits or features."""
        if self.channels > 1 and x.shape[1] != self.channels:
            raise UserError(
                f"{self.what} takes images of {self.channels} channels, these have {x.shape[1]}: add --convert rgb (in "
                'Python: data.load(..., convert="rgb")).'
            )
        low, high = self.low_high
        return self.network(self.fit((low + (high - low) * x - self.mean) / self.std))

    def fit(self, x: Tensor) -> Tensor:
        """Resize and crop as the network's own preprocessing does; images of the final size are left as they are."""
        height, width = x.shape[-2:]
        size = self.resize
        if len(size) == 1:
            scale = size[0] / min(height, width)
            size = (max(size[0], math.floor(height * scale)), max(size[0], math.floor(width * scale)))
        if (height, width) in (size, self.crop):
            return x if (height, width) == (self.crop or size) else self._middle(x)
        if size:
            smooth = {} if self.mode == "nearest" else {"antialias": True, "align_corners": False}
            x = F.interpolate(x, size, mode=self.mode, **smooth)
        return self._middle(x)

    def _middle(self, x: Tensor) -> Tensor:
        if not self.crop:
            return x
        top, left = ((have - want) // 2 for have, want in zip(x.shape[-2:], self.crop, strict=True))
        if min(top, left) < 0:
            raise UserError(f"{self.what} crops images to {self.crop}, these are smaller: give --resize.")
        return x[..., top : top + self.crop[0], left : left + self.crop[1]]


def preprocessed(
    opened: Pretrained,
    what: str,
    input_range: tuple[float, ...] = (0.0, 1.0),
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> Preprocessed:
    """A network behind its preprocessing; what is given takes the place of its own range, mean or std."""
    own = opened.preprocessing
    low, high = own.input_range if tuple(input_range) == (0.0, 1.0) else input_range
    chosen = Preprocessing((low, high), mean or own.mean, std or own.std, own.resize, own.crop, own.mode)
    if chosen.mean and len(chosen.mean) != len(chosen.std):
        raise UserError(f"{what} has {len(own.mean)} channels: give as many numbers as mean and std.")
    return Preprocessed(opened.network, chosen, what)


@contextmanager
def _errors(text: str) -> Iterator[None]:
    """Errors of the other library, as one sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"the model {text} cannot be opened ({type(error).__name__}: {reason}).") from error


def _open_timm(text: str, name: str, settings: dict[str, Any]) -> Pretrained:
    timm = optional_package("timm", f"the model {text}", "'holdfast[timm]'")
    with _errors(text):
        network = timm.create_model(name, **settings)
        about = importlib.import_module("timm.data").resolve_model_data_config(network)
        height, width = (int(size) for size in about["input_size"][1:])
        share = float(about.get("crop_pct") or 1.0)
        square = math.floor(height / share) if height == width else 0
        return Pretrained(
            network.float().eval(),
            Preprocessing(
                mean=tuple(about["mean"]),
                std=tuple(about["std"]),
                resize=(square,) if square else (math.floor(height / share), math.floor(width / share)),
                crop=(height, width),
                mode=about["interpolation"] if about["interpolation"] in _MODES.values() else "bilinear",
            ),
            notes=(_size_note((height, width)),),
        )


def _open_hf(text: str, name: str, head: bool = True) -> Pretrained:
    transformers = optional_package("transformers", f"the model {text}", "'holdfast[hf]'")
    with _quiet(transformers), _errors(text):
        network, loading = transformers.AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
        network = network.float().eval()
        base = f"{network.base_model_prefix}."
        lacks = [key for key in loading["missing_keys"] if head or key.startswith(base)]
        if lacks:
            raise UserError(
                f"{text} is no trained image classifier: its weights lack '{sorted(lacks)[0]}' ({len(lacks)} in all). "
                "Train it as a backbone: holdfast train --model."
            )
        preprocessing, notes = _hf_preprocessing(transformers, name, network.config)
    classes = _labels(network.config)
    return Pretrained(_Hf(network if head else _without_head(network, text)), preprocessing, classes, notes)


class _Hf(nn.Module):
    """A classifier of transformers: pixel values -> logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K), or (N, D) without its last layer."""
        logits: Tensor = self.network(pixel_values=x).logits
        return logits.flatten(1)


def _without_head(network: nn.Module, text: str) -> nn.Module:
    """The network with an identity in place of its last linear layer, the one beside the base model."""
    base, labels = f"{network.base_model_prefix}.", network.config.num_labels  # type: ignore[union-attr]
    heads = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == labels and not name.startswith(base)
    ]
    if len(heads) != 1:
        raise UserError(f"{text} has {len(heads)} last layers for its {labels} classes: its features cannot be told.")
    parent, _, leaf = heads[0].rpartition(".")
    setattr(network.get_submodule(parent) if parent else network, leaf, nn.Identity())
    return network


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """transformers without its notes and progress bars."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _labels(config: Any) -> tuple[str, ...]:
    """The names of the classes; empty where they are only numbered."""
    names = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    return () if any(re.fullmatch(r"LABEL_\d+", name) for name in names) or len({*names}) < len(names) else names


def _hf_preprocessing(transformers: Any, name: str, config: Any) -> tuple[Preprocessing, tuple[str, ...]]:
    """What the model's processor does, and what is to be said about it."""
    try:
        found = transformers.AutoImageProcessor.from_pretrained(name).to_dict()
    except (OSError, ValueError):  # there is none
        side = getattr(config, "image_size", None)
        size = (side, side) if isinstance(side, int) else tuple(side or ())
        said = "the model has no processor: pixels in [0, 1] go in as they are, unless mean and std are given"
        return Preprocessing(resize=size), (f"{said}.", *((_size_note(size),) if size else ()))
    resize, crop = _sizes(found)
    mean, std = (tuple(map(float, found.get(key) or ())) for key in ("image_mean", "image_std"))
    if not found.get("do_normalize", True):
        mean = std = ()
    elif found.get("include_top") and "rescale_offset" in found:  # EfficientNet's divides by std once more
        mean, std = mean, tuple(value**2 for value in std)
    high = 255.0 * float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 255.0
    low = -1.0 if found.get("rescale_offset") else 0.0
    mode = _MODES.get(int(found.get("resample") or 0), "bilinear")
    high = 1.0 if abs(high - 1) < 1e-6 else high
    final = crop or (resize if len(resize) == 2 else ())
    return Preprocessing((low, high + low), mean, std, resize, crop, mode), ((_size_note(final),) if final else ())


def _sizes(found: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(resize, crop) of a processor."""

    def pair(size: Any) -> tuple[int, ...]:
        if isinstance(size, int):
            return (size, size)
        keys = ("height", "width") if (size or {}).get("height") else ("shortest_edge",)
        return tuple(int(size[key]) for key in keys) if size and size.get(keys[0]) else ()

    resize = pair(found.get("size")) if found.get("do_resize", True) else ()
    crop = pair(found.get("crop_size")) if found.get("do_center_crop") else ()
    if len(resize) == 1 and found.get("crop_pct"):  # ConvNeXT's: a larger one, of which the middle is taken
        side = resize[0]
        return ((int(side / found["crop_pct"]),), (side, side)) if side < 384 else ((side, side), ())
    return resize, crop


def _size_note(size: Sequence[int]) -> str:
    return f"images are resized to {' x '.join(map(str, size))} inside the network; the threat is on the data's pixels."
