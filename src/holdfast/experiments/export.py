"""Export the network of a run folder: plain logits of images in [0, 1], as ONNX, torch.export program or weights."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import models, run_folder
from ..data import pixels
from ..errors import UserError, unknown
from ..importers.model_file import ModelSource, open_model
from ..importers.onnx.runtime import onnx_part, runtime_outputs
from ..io import write_atomic
from ..outputs import as_outputs, frozen_eval
from ..user_input import typed
from .evaluate_model import ModelUnderTest, from_run

SUFFIXES = {"onnx": (".onnx",), "pt2": (".pt2",), "state_dict": (".safetensors", ".pt")}
N_IMAGES = 64  # that the exported network is compared on
TOLERANCE = 1e-4  # of the largest logit, in size: float32 in another order of summation differs by less
_WRITTEN = "written by holdfast export"  # in the first line of a .py file that may be replaced


@dataclass(frozen=True)
class ExportSummary:
    """What was exported.

    Attributes:
        files: what was written; of a state_dict the weights, then the Python file that builds their network.
        n: images that run and export were compared on.
        difference: the largest difference of a logit on them.
        runtime_difference: the same by onnxruntime; None where it was not asked.
        data: the name or path of the run's data.
    """

    files: tuple[Path, ...]
    n: int
    difference: float
    runtime_difference: float | None
    data: str


@typed
def export_run(
    run: str | Path,
    path: str | Path | None = None,
    *,
    to: str = "onnx",
    dynamic_batch: bool = False,
    run_code: bool = False,
) -> ExportSummary:
    """Export the network of a run folder, after a check that the export answers as the run does.

    The export takes (N, C, H, W) float32 images in [0, 1] and returns (N, K) logits: normalisation and the factor on
    the logits are inside. ``holdfast evaluate`` reads it. A state_dict comes with a Python file whose ``build()``
    makes the network for it, by ``holdfast.models.build``.

    Args:
        run: a finished run folder.
        path: the file, with a suffix of the format; None for model.onnx or model.pt2 in the run folder, or
            weights.safetensors for a state_dict.
        to: "onnx", "pt2" (torch.export) or "state_dict" (.safetensors, or .pt).
        dynamic_batch: whether the export takes any number of images, or one at a time. A state_dict takes any.
        run_code: as for ``run_folder.load``.

    Returns:
        The files, and how far they are from the run.

    Raises:
        UserError: the run cannot be loaded or its data not be read, an unknown format or another suffix than its own,
            the network holds an operation that the format lacks, or its logits differ from the run's. Then nothing is
            written.
    """
    target = target_of(run, path, to)
    if to == "onnx":
        _need_onnx()
    subject = from_run(run, limit=N_IMAGES, run_code=run_code)
    x = pixels(subject.split.test.x[:N_IMAGES])
    if to == "state_dict":
        _check_replaceable(target.with_suffix(".py"))
    with tempfile.TemporaryDirectory(prefix="holdfast-") as made, frozen_eval(subject.model):
        files = _write(subject, x, Path(made) / target.name, to, dynamic_batch)
        difference, by_runtime = _differences(subject.model, files, x)
        content = [(target.parent / file.name, file.read_bytes()) for file in files]
    for placed, data in content:
        write_atomic(placed, data)
    return ExportSummary(tuple(placed for placed, _ in content), len(x), difference, by_runtime, subject.data)


@typed
def target_of(run: str | Path, path: str | Path | None, to: str) -> Path:
    """The file that ``export_run`` writes.

    Args:
        run: the run folder.
        path: as for ``export_run``.
        to: as for ``export_run``.

    Returns:
        The path.

    Raises:
        UserError: an unknown format, or a suffix of another one.

    >>> target_of("runs/mine", None, "pt2").name, target_of("runs/mine", "net.pt", "state_dict").name
    ('model.pt2', 'net.pt')
    """
    if to not in SUFFIXES:
        raise unknown("export format", to, SUFFIXES)
    name = "weights.safetensors" if to == "state_dict" else f"model{SUFFIXES[to][0]}"
    target = Path(run) / name if path is None else Path(path)
    if target.suffix.lower() not in SUFFIXES[to]:
        expected = " or ".join(SUFFIXES[to])
        raise UserError(f"{to} is written to a file that ends in {expected}, not to {target}.")
    return target


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise UserError("writing ONNX needs the package onnx: pip install 'holdfast[onnx]'.") from None


def _check_replaceable(code: Path) -> None:
    """Refuse to replace a Python file that is not of an earlier export."""
    if code.exists() and _WRITTEN not in code.read_text(errors="replace").partition("\n")[0]:
        raise UserError(f"{code} exists and is not of an export: name the weights otherwise with --out.")


def _write(subject: ModelUnderTest, x: Tensor, path: Path, to: str, dynamic_batch: bool) -> list[Path]:
    """Write the network to a file, for a state_dict to two."""
    if to == "state_dict":
        tensors = {name: tensor.contiguous() for name, tensor in subject.model.state_dict().items()}
        if path.suffix.lower() == ".pt":
            torch.save(tensors, path)
        else:
            path.write_bytes(safetensors.torch.save(tensors))
        code = path.with_suffix(".py")
        code.write_text(_code(subject, path.name))
        return [path, code]
    given = x[:2] if dynamic_batch else x[:1]  # torch.export takes an axis of length 1 for a fixed one
    writer = {"onnx": _write_onnx, "pt2": _write_pt2}[to]
    subject.model(given)  # orthogonal layers then keep their weights, whose formula ONNX has no operator for
    try:
        with warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")
            writer(models.logits_only(subject.model), given, path, dynamic_batch)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"the network of {subject.name} cannot be written as {to}: {type(error).__name__}: {reason}. Other formats "
            f"are {', '.join(name for name in SUFFIXES if name != to)}."
        ) from None
    return [path]


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on stdout: where an export fails, torch's compiled code prints the whole graph there."""
    kept = None
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def _write_onnx(model: nn.Module, given: Tensor, path: Path, dynamic_batch: bool) -> None:
    """By tracing, which needs no package but onnx; what a trace would fix wrongly, the comparison finds."""
    torch.onnx.export(
        model,
        (given,),
        path,
        dynamo=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}} if dynamic_batch else None,
    )


def _write_pt2(model: nn.Module, given: Tensor, path: Path, dynamic_batch: bool) -> None:
    shapes: Any = ({0: torch.export.Dim("n", min=1)},) if dynamic_batch else None
    torch.export.save(torch.export.export(model, (given,), dynamic_shapes=shapes), path)


def _code(subject: ModelUnderTest, weights: str) -> str:
    """A Python file whose ``build()`` returns the network without its weights."""
    config = run_folder.read_config(subject.folder or "")
    arguments = dict(config["model"])
    if models.is_own(arguments["name"]) or models.is_pretrained(arguments["name"]):
        arguments["name"] = config[run_folder.PATHS]["model"]
    name, shape, classes = arguments.pop("name"), tuple(arguments.pop("shape")), arguments.pop("classes")
    arguments.pop("seed", None)
    more = "".join(f", {key}={value!r}" for key, value in arguments.items() if value)
    return (
        f'"""The network of {subject.name} for the weights in {weights}, {_WRITTEN}."""\n\n'
        "from holdfast import models\n\n\n"
        "def build():\n"
        f"    model = models.build({name!r}, {shape!r}, {classes!r}{more})\n"
        f"    model.logit_scale = {config.get('logit_scale', 1.0)!r}\n"
        "    return model.eval()\n"
    )


def _differences(model: nn.Module, files: list[Path], x: Tensor) -> tuple[float, float | None]:
    """The largest difference of a logit between the run and its export, and by onnxruntime.

    Raises:
        UserError: it is more than rounding.
    """
    path = files[0]
    source = ModelSource(f"{files[1]}:build", str(path)) if len(files) > 1 else ModelSource(str(path))
    try:
        opened = open_model(source)
    except UserError as error:
        raise UserError(f"the export cannot be read back: {str(error).replace(str(path), path.name)}") from None
    found = _largest_difference(model, opened, x, "")
    net = onnx_part(opened)
    try:
        import onnxruntime
    except ImportError:
        return found, None
    if net is None:
        return found, None
    session = onnxruntime.InferenceSession(net.path, providers=["CPUExecutionProvider"])
    hook = net.register_forward_hook(lambda _, given, out: runtime_outputs(session, net, given[0], out))
    try:
        return found, _largest_difference(model, opened, x, " in onnxruntime")
    finally:
        hook.remove()


def _largest_difference(model: Callable[[Tensor], Any], exported: nn.Module, x: Tensor, where: str) -> float:
    """Over all images together, and the first one without others."""
    worst = 0.0
    with torch.no_grad():
        for part in (x, x[:1]):
            logits = as_outputs(model(part)).logits
            difference = float((as_outputs(exported(part)).logits - logits).abs().max())
            worst = max(worst, difference)
            if not difference <= TOLERANCE * max(1.0, float(logits.abs().max())):
                raise UserError(
                    f"the export answers{where} otherwise than the run: on {len(part)} images a logit differs by "
                    f"{difference:.2g}. Nothing was written. A network whose answer to an image depends on the images "
                    "beside it, or on branches in its code, cannot be exported."
                )
    return worst
