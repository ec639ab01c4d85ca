"""A user's own network: Python code that builds it, a torch.export program, or an ONNX file; as holdfast asks models.

holdfast's images lie in [0, 1]: what a network wants done to them first is done inside the module that comes back.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import UserError, unknown
from ..outputs import Model, as_outputs, out_of_memory
from .onnx import load_onnx

WEIGHTS_ALONE = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
NESTS = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the weights in their file
PREFIXES = ("module.", "model.", "_orig_mod.", "net.")  # what wrappers put before the names of weights
FORMS = "mymodel.py:build (a function without arguments), model.pt2 (torch.export) or model.onnx"


@dataclass(frozen=True)
class ModelSource:
    """Where a network comes from and what it takes, as JSON holds it (lists are taken for tuples).

    path: mymodel.py:build, model.pt2 or model.onnx. weights: a .safetensors, or a .pt, .pth, .bin, .ckpt of tensors
    alone, for a network that Python code builds. pixels: the range that the network takes its pixels in; then
    (x - mean) / std, one number per channel, or one for all.

    Raises UserError for numbers that are not finite, an empty range, std <= 0, and a mean without its std.

    >>> ModelSource("mymodel.py:build", pixels=(0.0, 255.0)).pixels
    (0.0, 255.0)
    """

    path: str
    weights: str = ""
    pixels: tuple[float, ...] = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        pixels, mean, std = _checked(self.pixels, self.mean, self.std)
        for name, value in (("pixels", pixels), ("mean", mean), ("std", std)):
            object.__setattr__(self, name, value)


def is_model_file(text: str) -> bool:
    """Whether this names a network from elsewhere, and no run folder: by its ending, unless it is a folder.

    >>> [is_model_file(text) for text in ("nets/mine.py:build", "a.onnx", "a.pt2", "a.pth", "out/sce-seed0-fold0")]
    [True, True, True, True, False]
    """
    path, name = _split(text)
    known = (".py", ".onnx", ".pt2", *WEIGHTS_ALONE)
    return (bool(name) or Path(path).suffix.lower() in known) and not Path(text).is_dir()


def code_hash(source: ModelSource) -> str:
    """A short hash of the file that a network comes from: weights alone do not tell a changed forward pass."""
    return hashlib.blake2b(existing(_split(source.path)[0]).read_bytes(), digest_size=8).hexdigest()


def open_model(source: ModelSource, device: str | torch.device = "cpu") -> nn.Module:
    """The network, in eval mode on a device: images in [0, 1], (N, C, H, W) -> what the network returns.

    ``notes`` of the module says what was done to make the weights fit. Code is executed: open what you trust.

    Raises UserError when a file is missing or damaged, when the code raises (with its file and line), when weights do
    not fit (with the first names that differ), or when the device cannot be used.
    """
    path, name = _split(source.path)
    ending, notes = Path(path).suffix.lower(), []
    if source.weights and ending in (".onnx", ".pt2"):
        raise UserError(f"{path} holds its own weights: leave out {source.weights}.")
    model: Model
    if ending == ".onnx":
        model = load_onnx(path)
    elif ending == ".pt2":
        model = _exported(path, device)
    elif ending == ".py":
        model = _built(existing(path), name)
        if source.weights:
            notes = _load_weights(model, source.weights)
    elif ending in WEIGHTS_ALONE:
        raise UserError(
            f"{path} holds weights, and no network to put them in. Write mymodel.py with a function build() that "
            f"returns the network, and give mymodel.py:build with {path} as its weights."
        )
    else:
        raise UserError(f"'{source.path}' is no network: give {FORMS}.")
    wrapped = wrap(model, pixels=source.pixels, mean=source.mean, std=source.std)
    wrapped.notes = tuple(notes)
    try:
        return wrapped.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the network cannot be put on '{device}': {reason} Try the device cpu.") from None


def wrap(
    model: Model,
    *,
    pixels: Sequence[float] = (0.0, 1.0),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Wrapped:
    """A network in memory, a module or any function from images to logits, as a module that takes images in [0, 1].

    Raises UserError as ``Foreign`` does. The network's mode is left as it is.

    >>> net = wrap(lambda x: x.flatten(1), pixels=(-1.0, 1.0))
    >>> net(torch.tensor([[0.0, 0.5, 1.0]]))
    tensor([[-1.,  0.,  1.]])
    """
    if not callable(model):
        raise UserError(f"a network is a torch module or a function from images to logits, got {_kind(model)}.")
    return Wrapped(model, *_checked(pixels, mean, std))


class Wrapped(nn.Module):
    """(N, C, H, W) in [0, 1] -> what ``inner`` returns for it in its own range; made by ``wrap``.

    The numbers are buffers: they move with the module, and belong to what identifies it. An error of the network
    becomes a UserError with the file and line.
    """

    pixels: Tensor | None
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, inner: Model, pixels: tuple[float, float], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.inner = inner  # a module becomes a child, a function stays one
        self.notes: tuple[str, ...] = ()
        self.register_buffer("pixels", None if pixels == (0.0, 1.0) else torch.tensor(pixels))
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1) if mean else None)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1) if std else None)
        self.training = inner.training if isinstance(inner, nn.Module) else False

    def forward(self, x: Tensor) -> Any:
        """Whatever the network returns."""
        if self.pixels is not None:
            x = self.pixels[0] + (self.pixels[1] - self.pixels[0]) * x
        if self.mean is not None and self.std is not None:
            if x.ndim != 4 or len(self.mean) not in (1, x.shape[1]):
                raise UserError(
                    f"mean and std have {len(self.mean)} numbers, one per channel, and the images have the shape "
                    f"{tuple(x.shape)}: give as many as there are channels, or one for all."
                )
            x = (x - self.mean) / self.std
        with blame("the network"):
            return self.inner(x)

    def train(self, mode: bool = True) -> Wrapped:
        """As of every module; an exported program, which refuses to change its mode, has only its flags set."""
        self.training = mode
        for child in self.children():
            try:
                child.train(mode)
            except RuntimeError:
                for module in child.modules():
                    module.training = mode
        return self


def _checked(
    pixels: Sequence[float], mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, float], tuple[float, ...], tuple[float, ...]]:
    try:
        pixels, mean, std = (tuple(float(value) for value in values) for values in (pixels, mean, std))
    except (TypeError, ValueError):
        raise UserError(f"pixels, mean and std are lists of numbers, got {pixels}, {mean} and {std}.") from None
    if not all(math.isfinite(value) for value in (*pixels, *mean, *std)):
        raise UserError(f"pixels, mean and std must be finite, got {pixels}, {mean} and {std}.")
    if len(pixels) != 2 or pixels[0] >= pixels[1]:
        raise UserError(f"pixels is the range that the network takes, lowest and highest, got {pixels}.")
    if len(mean) != len(std):
        raise UserError(f"mean and std must have one number per channel each, got {len(mean)} and {len(std)}.")
    if any(value <= 0 for value in std):
        raise UserError(f"std must be > 0, got {std}.")
    return (pixels[0], pixels[1]), mean, std


def _split(text: str) -> tuple[str, str]:
    """(path, name) of path.py:name.

    >>> _split("a/b.py:net"), _split("c.onnx")
    (('a/b.py', 'net'), ('c.onnx', ''))
    """
    found = re.fullmatch(r"(.+\.py):(\w*)", text)
    return (found[1], found[2]) if found else (text, "")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def existing(path: str) -> Path:
    """The whole path of a file. Raises UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(f"there is no file at {path}.")
    return Path(path).resolve()


@contextmanager
def blame(who: str, path: Path | None = None) -> Iterator[None]:
    """Errors of the user's code become UserErrors that name the line: the last one in his folder, or outside torch."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        own = [frame for frame in frames if path is not None and frame.filename.startswith(str(path.parent))]
        outside = [frame for frame in frames if not frame.filename.startswith(str(Path(torch.__file__).parent))]
        frames = own or outside or frames
        where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "in compiled code"
        if isinstance(error, SyntaxError) and error.filename:
            where = f"{error.filename}, line {error.lineno}"
        raise UserError(f"{who} raised {type(error).__name__}: {error} ({where}).") from error


# Python code


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """The folder first on the path. What it imports is marked as its own: another folder's namesake is not taken."""
    siblings = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()}
    for name, module in list(sys.modules.items()):
        owner = getattr(module, "__holdfast_folder__", None)
        if owner not in (None, str(folder)) and name.partition(".")[0] in siblings:
            del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{folder}/"):
                sys.modules[name].__dict__["__holdfast_folder__"] = str(folder)


def _built(path: Path, name: str) -> Model:
    if not name:
        raise UserError(f"{path.name} is not enough: say what in it makes the network, {path.name}:build.")
    with importing_from(path.parent):
        with blame(f"importing {path.name}", path):
            module = executed(path)
        public = [key for key, value in vars(module).items() if not key.startswith("_") and callable(value)]
        if not hasattr(module, name):
            raise unknown(f"name in {path.name}", name, public)
        made = getattr(module, name)
        if not isinstance(made, nn.Module):
            _takes_nothing(made, f"{path.name}:{name}")
            with blame(f"{path.name}:{name}", path):
                made = made()
    if isinstance(made, type) or not callable(made):
        raise UserError(f"{path.name}:{name} must return a torch module or a function, it returned {_kind(made)}.")
    model: Model = made
    return model


def executed(path: Path) -> ModuleType:
    """The file as a module of its own name; a class in it can be found again through sys.modules."""
    name = f"_holdfast_{path.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _takes_nothing(made: Any, what: str) -> None:
    if not callable(made):
        raise UserError(
            f"{what} must be a function that returns the network, a class or a module; it is {_kind(made)}."
        )
    try:
        inspect.signature(made).bind()
    except TypeError:
        raise UserError(
            f"{what} needs arguments {inspect.signature(made)}, and is called without any: give them defaults, or "
            "write a function around it. A function from images to logits is returned by build(), not named."
        ) from None
    except ValueError:  # a builtin without a signature
        return


# Weights


def _load_weights(model: Model, path: str) -> list[str]:
    """Put a file's weights into the module, every one of them; returns what was done to make them fit."""
    if not isinstance(model, nn.Module):
        raise UserError(f"weights ({path}) need a torch module, and what was built is {_kind(model)}.")
    tensors, notes = _unnested(_read_weights(existing(path)), path)
    wanted = model.state_dict()
    for _ in range(len(PREFIXES)):
        prefix = next((p for p in PREFIXES if tensors and all(key.startswith(p) for key in tensors)), None)
        if prefix is None or set(tensors) == set(wanted) or all(key.startswith(prefix) for key in wanted):
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        notes.append(f"left out '{prefix}' before every name")
    done = f" (tried: {'; '.join(notes)})" if notes else ""
    for key in tensors.keys() & wanted.keys():
        if tensors[key].shape != wanted[key].shape:
            shapes = f"{tuple(tensors[key].shape)} in the file, {tuple(wanted[key].shape)} in the network"
            raise UserError(f"the weights in {path} are of another network: '{key}' has the shape {shapes}{done}.")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        differ = {
            "the network has what the file lacks": [key for key in wanted if key not in tensors],
            "the file has what the network lacks": [key for key in tensors if key not in wanted],
        }
        said = "; ".join(f"{what}: '{keys[0]}' ({len(keys)} in all)" for what, keys in differ.items() if keys)
        raise UserError(f"the weights in {path} are of another network: {said or error}{done}.") from None
    return notes


def _read_weights(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        known = re.search(r"GLOBAL ([\w.]+)", reason)
        raise UserError(
            f"{path} holds more than tensors ({known[1] if known else reason[:200]}): pickled objects can run any code "
            "when they are read, so holdfast does not. Where you trust the file, write its tensors to another: "
            f"import torch, safetensors.torch; m = torch.load('{path}', weights_only=False); safetensors.torch."
            "save_file(m if isinstance(m, dict) else m.state_dict(), 'weights.safetensors')"
        ) from None
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}: {error}). It is cut short, damaged, or "
            "something else: .safetensors, and .pt, .pth, .bin or .ckpt of torch.save are read."
        ) from None


def _unnested(found: Any, path: str) -> tuple[dict[str, Tensor], list[str]]:
    notes = []
    while isinstance(found, dict):
        key = next((key for key in NESTS if isinstance(found.get(key), dict)), None)
        if key is None:
            break
        found = found[key]
        notes.append(f"took the entry '{key}'")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} must hold a dict of tensors (a state_dict), it holds {_kind(found)}.")
    odd = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(
            f"{path} must hold a dict of tensors (a state_dict): '{odd[0]}' is {_kind(found[odd[0]])}. Save the "
            "network's state_dict() alone."
        )
    return found, notes


# torch.export


class Sized(nn.Module):
    """A program for low to high images at once, for any number: pieces, the last one filled up with copies."""

    def __init__(self, inner: nn.Module, low: int, high: int | None) -> None:
        super().__init__()
        self.inner, self.low, self.high = inner, low, high
        self.training = inner.training

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, K) logits."""
        answers = []
        for piece in x.split(self.high or max(len(x), 1)):
            missing = max(0, self.low - len(piece))
            full = torch.cat([piece, piece[-1:].expand(missing, *piece.shape[1:])]) if missing else piece
            answers.append(as_outputs(self.inner(full)).logits[: len(piece)])
        return torch.cat(answers)

    train: Callable[..., Any] = Wrapped.train


def _exported(path: str, device: str | torch.device) -> nn.Module:
    file = existing(path)
    try:
        program = torch.export.load(file)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a torch.export program ({type(error).__name__}: {error}). It is damaged, of "
            "another version of torch, or compiled: write it with torch.export.save(torch.export.export(model, (x,)), "
            "path)."
        ) from None
    inputs = program.graph_signature.user_inputs
    places = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    x = places.get(inputs[0]) if len(inputs) == 1 else None
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise UserError(f"{path} has the inputs {', '.join(map(str, inputs))}: it must take one batch of images.")
    for node in program.graph.nodes:
        place = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise UserError(
                f"{path} was exported in training mode ({node.target}), which cannot be undone: call model.eval() "
                "before torch.export.export."
            )
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()
    low, high = _sizes(x.shape[0], program)
    return module if (low, high) == (1, None) else Sized(module, low, high)


def _sizes(n: Any, program: Any) -> tuple[int, int | None]:
    """(fewest, most) images at once, None for any number, of a program whose images are n at its export."""
    if isinstance(n, int):
        return n, n
    bounds = program.range_constraints.get(n.node.expr)
    if bounds is None:
        return 1, None
    high = int(bounds.upper) if bounds.upper < 2**31 else None
    return max(1, int(bounds.lower)), high
