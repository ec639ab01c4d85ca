"""What several commands do: choose a device, read training settings, run comparisons and evaluations, show results."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .display import Display, aside, errors, screen
from .gate import Gate, check_bounds, check_names
from .output_files import OutputFile, own_folder, page, say

if TYPE_CHECKING:
    from ..experiments.config import Comparison
    from ..experiments.evaluate_model import ModelUnderTest
    from ..results import Results
    from ..train import FitConfig


def best_device(device: str) -> str:
    """The device to use; auto is the GPU if there is one."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def workers_for(jobs: int, device: str) -> int:
    """How many networks run at a time: --jobs, or one per core of a CPU. Raises UserError for a negative number."""
    if jobs < 0:
        raise UserError(f"jobs must be >= 0 (0: as many as fit), got {jobs}.")
    if jobs:
        return jobs
    return len(os.sched_getaffinity(0)) if device == "cpu" and hasattr(os, "sched_getaffinity") else 1


def fit_from(
    data: str,
    epochs: int | None,
    batch_size: int | None,
    optimizer: str | None,
    lr: float | None,
    weight_decay: float | None,
    augment: str | None,
    checkpoint: str | None,
    settings: str = "",
    freeze: str = "",
) -> FitConfig:
    """The data set's default training configuration, with the options that were given in place of its own."""
    from ..experiments.config import changed_fit
    from ..experiments.recipes import fit_for, override
    from ..spec import augmentation, parse

    given = {"epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr, "weight_decay": weight_decay}
    fit = override(fit_for(data), **given, checkpoint=checkpoint, freeze=freeze or None, **augmentation(augment))
    return changed_fit(fit, parse(f"fit:{settings}")[1], "--fit") if settings else fit


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; a string is one already. Flushed, so that a closed pipe is noticed here."""
    print(value.rstrip("\n") if isinstance(value, str) else json.dumps(value, indent=1), flush=True)


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["holdfast", *sys.argv[1:]])


def asked_of_pgd50(samples: int | None, left_out: bool) -> int | None:
    """How many samples PGD-50 attacks, from its two options; None for all. Raises UserError where both are given."""
    if left_out and samples is not None:
        raise UserError(f"--no-pgd50 leaves PGD-50 out, and --pgd50 {samples} runs it: give one of the two.")
    if samples is not None and samples < 1:
        raise UserError(f"--pgd50 must be >= 1 samples, got {samples}. Leave PGD-50 out with --no-pgd50.")
    return 0 if left_out else samples


def run_comparison(
    comparison: Comparison,
    out: Path | None,
    device: str,
    jobs: int,
    quiet: bool,
    as_json: bool,
    gate: Gate,
    track: str = "",
) -> Results:
    """Run a comparison, show its progress, write its page, print its table; refuse before it what no row can meet."""
    from .. import models
    from ..experiments.compare import compare, why_uncertifiable
    from ..experiments.config import default_out

    folder, where = out or default_out(comparison), best_device(device)
    own_folder(folder)
    check_names(gate, comparison.row_names)
    if comparison.folds > 1 and comparison.limit not in (0, type(comparison).limit) and not quiet:
        errors.sentence(
            f"note: --limit {comparison.limit} is not used: {comparison.folds} folds test on every image once. With "
            "--folds 1 it is."
        )
    with aside(as_json), Display(quiet, comparison.networks) as display:
        if gate.needs("certified"):
            check_bounds(gate, why_uncertifiable(comparison, where))
        results = compare(
            comparison,
            folder,
            command=command_line(),
            device=where,
            workers=workers_for(jobs, where),
            progress=display.progress,
            track=track,
        )
    placed = page([results], folder / "report.html")
    if not quiet:
        say_precision(results, comparison.precision)
    show(results, as_json)
    say_files([folder / "results.json", placed], quiet, as_json)
    if not as_json and not quiet:
        code = (
            " --run-code" if any(models.is_own(row.model or comparison.model) for row in comparison.loss_specs) else ""
        )
        command = f"holdfast replay {shlex.quote(str(folder))}{code}"
        screen.print(f"re-check the adversarial examples: {command}", soft_wrap=True)
    return results


def run_evaluation(
    open_subject: Callable[..., ModelUnderTest],
    threat: str,
    suite: str,
    folder: Path,
    *,
    seed: int,
    device: str,
    quiet: bool,
    as_json: bool,
    budget: str = "",
    proofs: str = "linear",
    precision: float = 0.01,
    pgd50: int | None = None,
    batch_size: int | None = None,
    gate: Gate | None = None,
    added: Sequence[str] = (),
) -> tuple[Results, OutputFile, str] | None:
    """Evaluate one network and show its progress.

    Args:
        open_subject: called with ``device=``; opens the network and its data.
        threat: "norm:eps".
        suite: a key of SUITES.
        folder: the output folder.
        seed: of the attacks.
        device: as typed.
        quiet: whether to show no progress.
        as_json: whether stdout is for one JSON document.
        budget: as typed; "" for none.
        proofs: the last method of proof that is tried.
        precision: share of all samples that may be breakable still.
        pgd50: how many samples PGD-50 attacks; None for all, 0 for none.
        batch_size: of the attacks.
        gate: what is required of the answer; refused before the work where the answer cannot have it.
        added: attacks that come after the suite.

    Returns:
        (results, its page, why nothing is certified or ""); None in all but the first of several torchrun processes.
    """
    from ..evaluation import Budget
    from ..experiments.evaluate_model import distributed_processes, evaluate_model, why_unbounded, why_uncertified

    limited = Budget.parse(budget) if budget else None
    own_folder(folder)
    with (
        aside(as_json),
        distributed_processes(best_device(device)) as (where, first),
        Display(quiet or not first) as display,
    ):
        subject = open_subject(device=where)
        if gate is not None:
            check_names(gate, [subject.row_name])
            check_bounds(gate, why_unbounded(subject) if gate.needs("certified") else "")
        for note in getattr(subject.model, "notes", ()) if first and not quiet else ():
            errors.sentence(note)
        results = evaluate_model(
            subject,
            threat,
            suite,
            folder,
            seed=seed,
            budget=limited,
            proofs=proofs,
            precision=precision,
            pgd50=pgd50,
            batch_size=batch_size,
            added=added,
            progress=partial(display.progress, subject.name),
            command=command_line(),
        )
    if results and not quiet:
        say_precision(results, precision)
    return (results, page([results], folder / "report.html"), why_uncertified(subject, results)) if results else None


def run_transforms(
    open_subject: Callable[..., ModelUnderTest],
    threat: str,
    folder: Path,
    *,
    seed: int,
    device: str,
    quiet: bool,
    as_json: bool,
    batch_size: int | None,
    gate: Gate,
) -> tuple[Results, OutputFile, str]:
    """Evaluate one network under corruptions, rotations or patches, and show its progress.

    Args and results are those of ``run_evaluation``; nothing is said of certificates.
    """
    from ..experiments.transformed import evaluate_transforms
    from ..transforms import parse

    parse(threat)
    own_folder(folder)
    with aside(as_json), Display(quiet) as display:
        subject = open_subject(device=best_device(device))
        check_names(gate, [subject.row_name])
        for note in getattr(subject.model, "notes", ()) if not quiet else ():
            errors.sentence(note)
        results = evaluate_transforms(
            subject, threat, folder, seed=seed, batch_size=batch_size,
            progress=partial(display.progress, subject.name), command=command_line(),
        )  # fmt: skip
    return results, page([results], folder / "report.html"), ""


def say_precision(results: Results, precision: float) -> None:
    """Print on stderr what the attacks on a sample of the survivors cost."""
    from ..results import precision_text

    if said := precision_text(results, precision):
        errors.sentence(said)


def say_files(files: list[Path | OutputFile], quiet: bool, as_json: bool) -> None:
    """Print where files are, after a blank line; when quiet or JSON, only what was replaced, on stderr."""
    if not quiet and not as_json:
        screen.print()
    say([file if isinstance(file, OutputFile) else OutputFile(file) for file in files], quiet or as_json)


def show(results: Results, as_json: bool) -> None:
    """Print the table, what is in doubt, what sums it up, what may be claimed, and what is proved; or JSON."""
    from .. import report as reporting
    from ..results import bracket_text, corruption_prints, doubts, significance, table, to_json

    if as_json:
        print_json(to_json(results))
        return
    for one in corruption_prints(results):
        screen.print(one)
        screen.print()
    screen.print(table(results))
    for line in doubts(results):
        screen.sentence(line)
    screen.sentence(reporting.finding(results))
    for line in significance(results):
        screen.sentence(line)
    if proved := bracket_text(results):
        screen.sentence(proved)


def percent_text(value: float | None) -> str:
    """A share as 97.5%, or a dash for None."""
    return "-" if value is None else f"{value:.1%}"
