"""What several commands do: choose a device, read a schedule, attack one network, show results."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from .display import Display, aside, screen
from .output_files import OutputFile, page, say, writable


def best_device(device: str) -> str:
    """The device asked for; auto is the GPU where there is one."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def workers_for(asked: int, device: str) -> int:
    """How many networks at a time: what was asked for, else one per core of a CPU."""
    if asked < 0:
        raise UserError(f"jobs must be >= 0 (0: as many as fit), got {asked}.")
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if device == "cpu" and hasattr(os, "sched_getaffinity") else 1


def split_rows(text: str) -> list[str]:
    """The rows of --losses: commas split them, but not the settings of one."""
    from .. import spec

    return spec.split(text)


def schedule_from(
    data: str,
    epochs: int | None,
    batch_size: int | None,
    optimizer: str | None,
    lr: float | None,
    weight_decay: float | None,
    augment: str | None,
    keep: str | None,
) -> Any:
    """The data's own schedule with every option that was given in its place."""
    from ..experiments.recipes import fit_for, override
    from ..spec import augmentation

    given = {"epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr, "weight_decay": weight_decay}
    return override(fit_for(data), **given, keep=keep, **augmentation(augment))


def print_json(value: Any) -> None:
    """One JSON document on stdout; text is one already. Flushed, so that a pipe that was closed is noticed here."""
    print(value.rstrip("\n") if isinstance(value, str) else json.dumps(value, indent=1), flush=True)


def side_by_side(comparison: Any, out: Path | None, device: str, jobs: int, quiet: bool, as_json: bool) -> Any:
    """Run a comparison with its progress shown, write its page, print its table; its Results."""
    from ..experiments.compare import compare, default_out

    folder, where = out or default_out(comparison), best_device(device)
    writable(folder, "--out")
    with aside(as_json), Display(quiet, comparison.networks) as display:
        results = compare(
            comparison,
            folder,
            command=shlex.join(["holdfast", *sys.argv[1:]]),
            device=where,
            workers=workers_for(jobs, where),
            tell=display.tell,
            finished=display.finished,
            checked=display.checked,
        )
    placed = page([results], folder / "report.html")
    show(results, as_json)
    say_files([folder / "results.json", placed], quiet, as_json)
    if not as_json and not quiet:
        screen.print(f"prove it again: holdfast replay {shlex.quote(str(folder))}", soft_wrap=True)
    return results


def say_files(files: list[Path | OutputFile], quiet: bool, as_json: bool) -> None:
    """Where things are, after a blank line; when quiet or JSON, only what was replaced, on stderr."""
    if not quiet and not as_json:
        screen.print()
    say([file if isinstance(file, OutputFile) else OutputFile(file) for file in files], quiet or as_json)


def show(results: Any, as_json: bool) -> None:
    """Print the table, what is in doubt and the sentence that sums it up; or JSON."""
    from .. import report as reporting
    from ..results import doubts, table, to_json

    if as_json:
        print_json(to_json(results))
        return
    screen.print(table(results))
    for line in doubts(results):
        screen.print(line, soft_wrap=True)
    screen.print(reporting.finding(results), soft_wrap=True)


def attack_one(
    opened: Any,
    threat: str,
    suite: str,
    folder: Path,
    seed: int,
    device: str,
    quiet: bool,
    as_json: bool,
    budget: str = "",
    batch_size: int | None = None,
) -> tuple[Any, OutputFile] | None:
    """Attack one network with its progress shown; (results, page), None in all but the first of several processes."""
    from ..evaluation import Budget
    from ..experiments.evaluate_model import distributed_processes, evaluate_model

    limited = Budget.parse(budget) if budget else None
    writable(folder, "--out")
    with (
        aside(as_json),
        distributed_processes(best_device(device)) as (where, first),
        Display(quiet or not first) as display,
    ):
        results = evaluate_model(
            opened(device=where), threat, suite, folder, seed=seed, budget=limited, batch_size=batch_size,
            tell=display.tell, command=shlex.join(["holdfast", *sys.argv[1:]]),
        )  # fmt: skip
    return (results, page([results], folder / "report.html")) if results else None
