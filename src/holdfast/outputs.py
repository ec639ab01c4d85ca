"""What a model returns, its evaluation mode, and the one place where bare logits become Outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import UserError, type_of

IN_OWN_DTYPE = "the network is {} throughout: it is asked in that type, and its logits are converted to float32."
OTHER_DTYPES = (torch.float64, torch.bfloat16, torch.float16)  # tried in turn where the parameters do not say which
Model = Callable[[Tensor], Any]  # an nn.Module or any function from images to logits or Outputs


class Outputs(NamedTuple):
    """A network's output for N images.

    Attributes:
        logits: (N, K), whose argmax is the prediction: W h, scale * cosine, or -distance / 2.
        features: (N, D), the head's input, or None.
        distances: (N, K), squared distances of the features to the head's centers, unscaled, or None.
    """

    logits: Tensor
    features: Tensor | None = None
    distances: Tensor | None = None


def as_outputs(answer: Any, output: str | int = "") -> Outputs:
    """Outputs from what a model returned.

    Logits are read where only one thing can be meant: a tensor, ``.logits`` or the entry of that name, or the only
    (N, K) tensor of floats in a tuple, list or dict.

    Args:
        answer: what the model returned.
        output: which entry holds the logits: its number from 0, or its name; "" where the answer leaves no choice.

    Returns:
        Outputs. Features and distances are kept from Outputs alone; feature maps become (N, D).

    Raises:
        UserError: there are no (N, K) logits of a floating type in it, more than one tensor may be the logits, or
            features or distances are not of the same samples.

    >>> import torch
    >>> as_outputs(torch.zeros(2, 3)).logits.shape
    torch.Size([2, 3])
    >>> as_outputs((torch.zeros(2, 8), torch.zeros(2, 3)), 1).logits.shape
    torch.Size([2, 3])
    """
    if output != "":
        answer = _entry(answer, output)
    out = answer if isinstance(answer, Outputs) else Outputs(_logits(answer))
    fault = _fault(out.logits)
    if fault:
        raise UserError(f"a model must return (N, K) logits, or something that holds them as .logits; {fault}")
    return out if out.features is None and out.distances is None else _matched(out)


def _matched(out: Outputs) -> Outputs:
    """Outputs whose features, as (N, D), and distances belong to the samples of the logits."""
    n, features, distances = len(out.logits), out.features, out.distances
    if features is not None and not (isinstance(features, Tensor) and features.ndim >= 2 and len(features) == n):
        raise UserError(f"the features in Outputs must be (N, D) with N = {n}, got {_described(features)}.")
    if distances is not None and not (isinstance(distances, Tensor) and distances.shape == out.logits.shape):
        shape = tuple(out.logits.shape)
        raise UserError(
            f"the distances in Outputs must have the shape of the logits, {shape}, got {_described(distances)}."
        )
    return out if features is None or features.ndim == 2 else out._replace(features=features.flatten(1))


def _named(answer: Any) -> dict[str, Any]:
    """The entries of a dict, a named tuple, a tuple or a list, by name or number; empty for anything else."""
    if isinstance(answer, Mapping):
        return {str(key): value for key, value in answer.items()}
    if isinstance(answer, (tuple, list)):
        return dict(zip(getattr(answer, "_fields", map(str, range(len(answer)))), answer, strict=True))
    return {}


def _entry(answer: Any, output: str | int) -> Any:
    """The entry of an answer that a user named."""
    entries = _named(answer)
    if str(output) in entries:
        return entries[str(output)]
    if str(output).isdecimal() and int(output) < len(entries):
        return list(entries.values())[int(output)]
    if isinstance(output, str) and isinstance(getattr(answer, output, None), Tensor):
        return getattr(answer, output)
    known = ", ".join(f"{name}: {_described(value)}" for name, value in entries.items()) or _described(answer)
    raise UserError(f"the model's answer has no output '{output}': it returned {known}. Name one of these.")


def _logits(answer: Any) -> Any:
    """What must be the logits in an answer; the answer itself where nothing is."""
    if isinstance(answer, Tensor):
        return answer
    entries = _named(answer)
    named = entries.get("logits", getattr(answer, "logits", None))
    if isinstance(named, Tensor):
        return named
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    possible = [value for value in tensors.values() if value.ndim == 2 and value.is_floating_point()]
    if len(possible) == 1:
        return possible[0]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if len(tensors) > 1:
        shown = ", ".join(f"{name}: {_described(value)}" for name, value in tensors.items())
        raise UserError(
            f"the model returns {len(tensors)} tensors ({shown}), and which are the logits is not clear: "
            "choose with --output NAME on the command line, or wrap(model, output=NAME) in Python."
        )
    return answer


def _described(value: Any) -> str:
    """A value of an answer, in words: the shape of a tensor, else the type."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _fault(logits: Any) -> str:
    """Why this cannot be logits, in words; "" where it can. Reads no values, which would wait for the device."""
    fault = tensor_fault(logits)
    if fault:
        return f"it returned {fault}"
    if not logits.is_floating_point():
        return f"it returned {logits.dtype}, not floats: return the scores before argmax or rounding"
    if logits.ndim != 2 or logits.shape[1] == 0:
        return f"it returned a tensor of shape {tuple(logits.shape)}"
    return ""


def tensor_fault(value: Any) -> str:
    """What keeps a value from being a dense tensor that arithmetic works on, and what to do; "" for one that is.

    Reads no values, which would wait for the device.

    >>> tensor_fault(torch.eye(2).to_sparse()), tensor_fault(torch.eye(2))
    ('a sparse tensor: pass a dense one, as .to_dense() makes it', '')
    """
    if not isinstance(value, Tensor):
        return type_of(value)
    if value.is_nested:
        return "a nested tensor: pad or crop its parts to one shape"
    if value.is_quantized:
        return "a quantized tensor: pass a dense one, as .dequantize() makes it"
    if value.layout != torch.strided:
        kind = "a sparse tensor" if "sparse" in str(value.layout) else f"a tensor of layout {value.layout}"
        return f"{kind}: pass a dense one, as .to_dense() makes it"
    if value.is_meta:
        return "a tensor on the device meta, which holds no values: load them first"
    own_arithmetic = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if (own_arithmetic or is_traceable_wrapper_subclass(value)) and not torch.compiler.is_compiling():
        return f"{type_of(value)}, a tensor with arithmetic of its own: pass a plain one"
    if value.is_complex():
        return f"{value.dtype}, not floats: pass real numbers"
    if value.is_floating_point() and value.dtype.itemsize < 2:
        return f"{value.dtype}: pass float32, as .float() makes it"
    return ""


def own_dtype(model: Model) -> torch.dtype | None:
    """The floating type of all of a module's parameters where it is another than float32; None for any other model.

    >>> own_dtype(torch.nn.Linear(2, 2).double()), own_dtype(torch.nn.Linear(2, 2))
    (torch.float64, None)
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 and torch.float32 not in dtypes else None


def ask(
    model: Model, x: Tensor, dtype: torch.dtype | None = None, output: str | int = "", *, guess: bool = True
) -> tuple[Any, Any]:
    """What a model returns; one that refuses float32 images, by whatever error, is asked in a type that it takes.

    That is the type of its parameters. Where they do not say (a function, buffers alone, a type that the code asks
    for), the other floating types are tried in turn. Images of other types are never converted to float32, which would
    hide that a network rounds.

    Args:
        model: images to logits or Outputs.
        x: (N, ...).
        dtype: the type that an earlier call found; None for the images' own.
        output: as for ``as_outputs``.
        guess: try types that no parameter has; once a model has answered, an error of it says something else.

    Returns:
        (the answer, Outputs in the type of x where it was converted; the type that was found, or None).

    Raises:
        Exception: the model's own about the type of the images, where no type helps.
    """
    first = x.dtype if dtype is None or own_dtype(model) not in (None, dtype) else dtype
    try:
        return _answer(model, x, first, output)
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        guesses = OTHER_DTYPES if guess and x.dtype == torch.float32 else ()
        for other in dict.fromkeys((own_dtype(model), x.dtype, *guesses)):
            try:
                if other not in (None, first):
                    return _answer(model, x, other, output)
            except Exception as again:
                if out_of_memory(again):
                    raise
        raise


def _answer(model: Model, x: Tensor, dtype: torch.dtype, output: str | int) -> tuple[Any, Any]:
    """What ``ask`` returns, for one type of the images."""
    if dtype == x.dtype:
        answer = model(x)
        return answer if output == "" else as_outputs(answer, output), None
    out = as_outputs(model(x.to(dtype)), output)
    features, distances = (part if part is None else part.to(x.dtype) for part in out[1:])
    return Outputs(out.logits.to(x.dtype), features, distances), dtype


class Queried:
    """A model as attacks and evaluations query it: the answer is Outputs, in the type of the images.

    The model gets a copy of the images, so that one which edits its input in place changes no attack and no data, and
    breaks no graph. An error of the model is passed on.

    Args:
        model: images to logits or Outputs.

    Raises:
        UserError: when it is called, and the answer holds no logits or not one row for each image.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.dtype: torch.dtype | None = None  # one that the model takes, once it has refused that of the images
        self.has_answered = False

    def __call__(self, x: Tensor) -> Outputs:
        return self.query(x.clone())

    def query(self, x: Tensor) -> Outputs:
        """The answer to images that the model may edit."""
        shape = tuple(x.shape)
        answer, found = ask(self.model, x, self.dtype, guess=not self.has_answered)
        out = as_outputs(answer)
        if len(out.logits) != shape[0] or out.logits.device != x.device:
            got = f"logits of shape {tuple(out.logits.shape)} on {out.logits.device}"
            raise UserError(f"the model answers a batch of shape {shape} on {x.device} with {got}.")
        if found != self.dtype and found is not None:
            warnings.warn(IN_OWN_DTYPE.format(found), stacklevel=3)
        self.dtype, self.has_answered = found, True
        return out


def logits_of(out: Outputs | Tensor) -> Tensor:
    """The (N, K) logits of Outputs, or the logits themselves."""
    return out.logits if isinstance(out, Outputs) else out


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or on a CPU, so that a smaller batch may work.

    PyTorch raises a plain RuntimeError for a CPU; it is recognised by its message.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), out_of_memory(RuntimeError("shape"))
    (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """Every module in eval mode; each gets its own mode back.

    A batch norm that its owner froze stays frozen, and a dropout that was in train mode returns to it.

    Args:
        model: an nn.Module; any other callable is left as it is.
    """
    modes = [(module, module.training) for module in (model.modules() if isinstance(model, nn.Module) else ())]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_eval(model: Model) -> Iterator[None]:
    """Every module in eval mode, every parameter without gradient, and gradients enabled; all are restored afterwards.

    Attacks and checks need gradients in the images whatever mode the caller is in, ``no_grad`` and ``inference_mode``
    included.

    Args:
        model: an nn.Module; any other callable is left as it is.
    """
    wanted = [p for p in (model.parameters() if isinstance(model, nn.Module) else ()) if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def batch_norm_mode(model: Model, mode: str) -> Iterator[None]:
    """With "train", batch norms use the statistics of the batch even in eval mode, and update nothing.

    This holds for batch norms that are in train mode now; one that its owner froze stays frozen.

    Args:
        model: an nn.Module; any other callable is left as it is.
        mode: "eval" or "train".
    """
    norms = [
        module
        for module in (model.modules() if mode == "train" and isinstance(model, nn.Module) else ())
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    saved = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, (mean, var) in zip(norms, saved, strict=True):
            norm.running_mean, norm.running_var = mean, var


def check_samples(x: Tensor, y: Tensor) -> None:
    """Refuse what is no batch of images with a label each; no value is read, which would wait for the device.

    Args:
        x: (N, ...), floats or uint8.
        y: (N,), integers.

    Raises:
        UserError: another rank, length or type.
    """
    if x.ndim < 2 or y.shape != x.shape[:1] or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise UserError(
            f"x must be (N, ...) images, float or uint8, and y (N,) labels, got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(y.shape)}."
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"y must hold integers, got {y.dtype}.")


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the model is fooled: argmax != y, and all logits are finite. NaN is never a success.

    Args:
        logits: (N, K).
        y: (N,) labels.

    Returns:
        (N,) bool.

    >>> import torch
    >>> fooled(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), torch.tensor([0, 0]))
    tensor([ True, False])
    """
    return (logits.argmax(1) != y) & logits.isfinite().all(1)
