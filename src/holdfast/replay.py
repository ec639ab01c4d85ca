"""Recount what results.json shows, from the stored networks and adversarial examples: no attack code.

Clean accuracy, the upper bound of robust accuracy and certificates are computed again; PGD-50 as far as its adversarial
examples are stored. What cannot be recounted is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from . import results, run_folder
from .bounds import certify
from .data import Data, load, pixels
from .errors import UserError
from .io import decode, inside, load_tensors, understood
from .outputs import frozen_eval
from .queries import CountingModel, exact_float32, is_misclassified, majority_vote
from .results import Run
from .threat import Threat
from .user_input import typed

WITNESSES, WITNESSES_VERSION = "witnesses", 1
VERDICTS = "verdicts, trust checks, the inference region, pictures, costs"  # they need attacks


@dataclass(frozen=True)
class Replay:
    """The outcome for one run of a results file.

    Attributes:
        run: the run's name and threat.
        n: number of samples.
        misclassified: samples that are misclassified without an attack.
        broken: correctly classified samples that a valid witness breaks.
        failed: invalid witnesses: outside the threat, or classified correctly.
        certified: samples that are proved again; None where the run reports no certificates.
        reported: the robust accuracy in results.json; None for a void run.
        problems: what does not hold, in words.
        not_rechecked: what the run reports and this pass cannot recount, in words.
    """

    run: str
    n: int
    misclassified: int
    broken: int
    failed: int
    certified: int | None
    reported: float | None
    problems: tuple[str, ...]
    not_rechecked: tuple[str, ...]

    @property
    def bound(self) -> float:
        """The upper bound of robust accuracy that this pass proves."""
        return 1 - (self.misclassified + self.broken) / self.n

    @property
    def holds(self) -> bool:
        """Whether all that was recounted is what results.json says."""
        return not self.problems


class _Network(TypedDict):
    """What witnesses.safetensors says of a network: its run, where it is, and its data."""

    run: str
    threat: dict[str, Any]
    folder: str
    cut: dict[str, Any]
    fingerprint: str


class _Header(TypedDict):
    networks: list[_Network]


class _Recount(NamedTuple):
    """What one network gives, one entry per sample; ``failed`` counts witnesses."""

    samples: Tensor
    y: Tensor
    misclassified: Tensor
    broken: Tensor
    certified: Tensor | None
    failed: int


@typed
def replay(folder: str | Path, *, device: str = "cpu", batch_size: int = 1024, run_code: bool = False) -> list[Replay]:
    """Recount the runs of a results file: classify clean images and adversarial examples again, and certify again.

    Args:
        folder: holds results.json and witnesses.safetensors.
        device: where the networks run.
        batch_size: images per forward pass, >= 1.
        run_code: as for ``run_folder.load``.

    Returns:
        One outcome per run; none where results.json holds no runs.

    Raises:
        UserError: files are missing or damaged, a network is outside of the folder, or consists of Python code and
            ``run_code`` is False; or the data differ from those the witnesses were made from.
    """
    folder = Path(folder)
    stored, path = results.load(folder), folder / "witnesses.safetensors"
    witnesses, header = load_tensors(path, WITNESSES, WITNESSES_VERSION, _Header)
    with understood(path):
        threats = [Threat(**network["threat"]) for network in header["networks"]]
    replays = []
    for run in stored.runs:
        with understood(folder / results.FILE):
            threat = Threat(**run.threat)
        votes = run.remaining.votes if run.remaining is not None else 1
        parts = [
            _network(
                folder, network, threat, *_witnesses(path, witnesses, number), run, votes, device, batch_size, run_code
            )
            for number, network in enumerate(header["networks"])
            if network["run"] == run.name and threats[number] == threat
        ]
        replays.append(_compare(run, parts, votes))
    return replays


def _witnesses(path: Path, tensors: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """(sample numbers, adversarial images) of a network."""
    index, x_adv = (tensors.get(f"{number}/{name}") for name in ("index", "x_adv"))
    if index is None or x_adv is None:
        raise UserError(f"{path} holds no adversarial examples of its network {number}: restore the file from a copy.")
    if index.dtype != torch.int64 or index.ndim != 1 or not x_adv.is_floating_point() or len(index) != len(x_adv):
        raise UserError(
            f"{path}: network {number} should have sample numbers (N,) int64 and images (N, C, H, W), got "
            f"{tuple(index.shape)} {index.dtype} and {tuple(x_adv.shape)} {x_adv.dtype}."
        )
    return index, x_adv


def _folder_of(folder: Path, name: str) -> Path:
    """A network's folder: within the folder of the results, or the run folder around it."""
    return folder.resolve().parent if name == ".." else inside(folder, name, f"{folder / 'witnesses.safetensors'}")


def _network(
    folder: Path,
    network: _Network,
    threat: Threat,
    index: Tensor,
    x_adv: Tensor,
    run: Run,
    votes: int,
    device: str,
    batch_size: int,
    run_code: bool,
) -> _Recount:
    """One network's recount. A randomised network is queried as often per image as it was during the evaluation."""
    where = _folder_of(folder, network["folder"])
    model, config = run_folder.load(where, device=device, run_code=run_code)
    name = run_folder.data_of(where, config)
    with understood(folder / "witnesses.safetensors"):
        split = load(name, **decode(dict[str, Any], network["cut"], "cut"))
    if split.fingerprint != network["fingerprint"]:
        raise UserError(f"the data '{name}' is not what the witnesses were made from (fingerprint).")
    data: Data = split.test
    place = {int(number): row for row, number in enumerate(data.index)}
    unknown = [int(number) for number in index if int(number) not in place]
    if unknown:
        raise UserError(f"the witnesses name the sample {unknown[0]}, not in the test set of '{name}'.")
    rows = torch.tensor([place[int(number)] for number in index], dtype=torch.int64)
    x, y = pixels(data.x), data.y
    if x_adv.shape[1:] != x.shape[1:] and len(x_adv):
        raise UserError(
            f"the witnesses are images of {tuple(x_adv.shape[1:])}, those of '{name}' {tuple(x.shape[1:])}."
        )
    with exact_float32(), frozen_eval(model), torch.no_grad():
        misclassified = _misclassified(model, x, y, votes, device, batch_size)
        valid = _misclassified(model, x_adv, y[rows], votes, device, batch_size)
        proved = None
        if run.certified is not None:
            proved = _certified(model, x, y, threat, device, batch_size)
    if len(rows):
        valid &= threat.violation(x_adv, x[rows]) == 0
    broken = torch.zeros_like(misclassified)
    broken[rows[valid]] = True  # each sample counts once, however many witnesses name it
    return _Recount(data.index, y, misclassified, broken & ~misclassified, proved, int((~valid).sum()))


def _certified(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, device: str, batch_size: int) -> Tensor:
    """(N,) bool: which samples are proved; none where no bound of the network is known."""
    parts = []
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        proved = certify(model, xs.to(device), ys.to(device), threat)
        parts.append(torch.zeros(len(xs), dtype=torch.bool) if proved is None else proved.cpu())
    return torch.cat(parts)


def _misclassified(model: nn.Module, x: Tensor, y: Tensor, votes: int, device: str, batch_size: int) -> Tensor:
    """(N,) bool: which images the model misclassifies."""
    counted = CountingModel(model)
    parts = [
        is_misclassified(majority_vote(counted, xs.to(device), votes)[1], ys.to(device), votes).cpu()
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True)
        if len(xs)  # no network is asked about no images
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def _compare(run: Run, parts: Sequence[_Recount], votes: int) -> Replay:
    """Hold a run against the recount of its networks."""
    name = f"{run.name}, {run.threat_text}"
    reported = None if run.robust is None else run.robust.value
    if not parts:
        why = ("witnesses.safetensors names no network for this run, so nothing of it can be recounted",)
        return Replay(name, run.n, 0, 0, 0, None, reported, why, ())
    index, y, misclassified, broken = (
        torch.cat([getattr(part, key) for part in parts]) for key in _Recount._fields[:4]
    )
    failed, n = sum(part.failed for part in parts), len(index)
    proved = None
    if all(part.certified is not None for part in parts):
        proved = torch.cat([part.certified for part in parts if part.certified is not None])
    problems, not_rechecked = [], [VERDICTS]

    def figure(what: str, shown: results.Interval, count: int) -> None:
        if abs(shown.value - count / n) >= 0.5 / n:
            problems.append(f"{what} is reported as {shown.value:.1%}, recounted {count / n:.1%}")
        interval = results.proportion(count, n)
        if max(abs(shown.low - interval.low), abs(shown.high - interval.high)) > 1e-6:
            problems.append(f"the interval of {what} is not the 95% Clopper-Pearson interval of {count} of {n}")

    if n != run.n:
        problems.append(f"{run.n} samples are reported, its networks have {n}")
    if n != len(set(index.tolist())):
        problems.append("a sample is counted twice")
    if failed:
        problems.append(f"{failed} of the stored adversarial examples are outside the threat or classified correctly")
    figure("clean accuracy", run.clean, int((~misclassified).sum()))
    if run.robust is not None:
        figure("robust accuracy", run.robust, int((~misclassified & ~broken).sum()))
    elif run.verdict is None or run.verdict.status != "void":
        problems.append("robust accuracy is missing, though the run is not void")
    if run.certified is not None and proved is not None:
        certified = proved & ~misclassified
        if run.certified.value - int(certified.sum()) / n >= 0.5 / n:
            problems.append(
                f"certified accuracy is reported as {run.certified.value:.1%}, proved again {certified.sum() / n:.1%}"
            )
    if run.verdict is not None and run.verdict.status == "exact":
        unproved = int((~misclassified & ~broken & ~(torch.zeros_like(broken) if proved is None else proved)).sum())
        if unproved:
            problems.append(f"the verdict is exact, but {unproved} survivors are not proved")
    not_rechecked += [f"{attack} alone" for attack in run.attacks if attack != "pgd50"]
    if run.samples is None or list(run.samples.index) != index.tolist():
        not_rechecked.append("PGD-50, since results.json holds no columns of these samples")
        if run.samples is not None:
            problems.append("the samples in results.json are not those of its networks")
    else:
        problems += _columns(run, y, misclassified, broken, proved)
        not_rechecked.append("PGD-50 on the samples that it left")
    return Replay(
        run=name,
        n=n,
        misclassified=int(misclassified.sum()),
        broken=int(broken.sum()),
        failed=failed,
        certified=None if proved is None else int((proved & ~misclassified).sum()),
        reported=reported,
        problems=tuple(problems),
        not_rechecked=tuple(not_rechecked),
    )


def _columns(run: Run, y: Tensor, misclassified: Tensor, broken: Tensor, proved: Tensor | None) -> list[str]:
    """What is wrong in the per-sample columns: with the recount, with each other, and with the figures shown."""
    samples, problems = run.samples, []
    if samples is None:
        return []
    clean, pgd50, robust, stage = (
        torch.tensor(column) for column in (samples.clean, samples.pgd50, samples.robust, samples.stage)
    )

    def differ(what: str, wrong: Tensor) -> None:
        if bool(wrong.any()):
            first = samples.index[int(wrong.nonzero()[0, 0])]
            problems.append(f"{what} of {int(wrong.sum())} samples, such as {first}, is not what was recounted")

    differ("the label", torch.tensor(samples.y) != y)
    differ("the clean answer", clean.bool() == misclassified)
    differ("the robust column", robust.bool() == (misclassified | broken))
    differ("the stage", (stage == -2) != misclassified)
    stages = [one.name for one in run.stages]
    if "pgd50" in stages:  # what it broke has a witness
        differ("PGD-50's answer", pgd50.bool() != ~(misclassified | (broken & (stage == stages.index("pgd50")))))
    if run.certified is not None and samples.certified is not None and proved is not None:
        differ("the certificate", torch.tensor(samples.certified).bool() & ~(proved & ~misclassified))
    for what, shown, column in (
        ("PGD-50 accuracy", run.pgd50, pgd50),
        ("certified accuracy", run.certified, None if samples.certified is None else torch.tensor(samples.certified)),
    ):
        if shown is not None and column is not None and abs(shown.value - float(column.double().mean())) >= 0.5 / run.n:
            problems.append(f"{what} is reported as {shown.value:.1%}, its column gives {column.double().mean():.1%}")
    return problems
