"""``holdfast export``: write the network of a run folder as ONNX, torch.export program or weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .app import app, exits
from .common import print_json
from .display import aside, screen, working
from .options import RUN, option
from .output_files import OutputFile, say, writable


@app.command(rich_help_panel="Step by step", epilog=exits())
def export(
    run: Annotated[Path, typer.Argument(help=RUN)],
    to: Annotated[
        str,
        option(
            "Format: onnx, pt2 (a torch.export program) or state_dict (.safetensors or .pt, with a Python file that "
            "builds the network)."
        ),
    ] = "onnx",
    out: Annotated[
        Path | None,
        option(
            "The file. Default: model.onnx, model.pt2 or weights.safetensors in the run folder.",
            "--out",
            "-o",
        ),
    ] = None,
    dynamic_batch: Annotated[
        bool, option("Take any number of images per call. Default: one.", "--dynamic-batch")
    ] = False,
    run_code: o.RunCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Export a trained network for other tools: float32 images in [0, 1] to plain logits, normalisation inside.

    The export is opened again and compared with the run on 64 of its test images, with onnxruntime too where that is
    installed. The largest difference of a logit is printed; where it is more than rounding, nothing is written.

    `holdfast evaluate FILE --data ...` reads the file.
    """
    from ..experiments.export import export_run, target_of

    target = target_of(run, out, to)
    writable(target.parent, "--out")
    before = {path: path.read_bytes() for path in (target, target.with_suffix(".py")) if path.is_file()}
    with aside(as_json), working("exporting", quiet):
        done = export_run(run, target, to=to, dynamic_batch=dynamic_batch, run_code=run_code)
    if as_json:
        print_json({**asdict(done), "files": [str(path) for path in done.files]})
        return
    line = f"largest difference of a logit from the run, on {done.n} images: {done.difference:.1e}"
    line += "" if done.runtime_difference is None else f", in onnxruntime {done.runtime_difference:.1e}"
    if not quiet:
        screen.print(line, soft_wrap=True)
        say_next(done.files, done.data)
    say([OutputFile(path, before.get(path, content) != content) for path, content in contents(done.files)], quiet)


def say_next(files: Sequence[Path], data: str) -> None:
    """Print the command that evaluates the export."""
    network, weights = (
        (f"{files[1]}:build", f" --weights {shlex.quote(str(files[0]))}") if files[1:] else (files[0], "")
    )
    command = f"holdfast evaluate {shlex.quote(str(network))}{weights} --data {shlex.quote(data)}"
    screen.print(f"next: {command}", soft_wrap=True)


def contents(files: Sequence[Path]) -> list[tuple[Path, bytes]]:
    """Each file with what it holds."""
    return [(path, path.read_bytes()) for path in files]
