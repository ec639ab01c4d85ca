"""Recount what results.json shows, from the stored networks and adversarial examples: no attack code.

Clean accuracy, the upper bound of robust accuracy and certificates are computed again; PGD-50 as far as its adversarial
examples are stored. What cannot be recounted is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from . import results, run_folder
from .bounds import CannotBound, certify
from .data import Data, Split, load, pixels
from .errors import UserError
from .importers.model_file import model_name
from .io import decode, inside, load_tensors, understood
from .losses import negative_margin
from .mapped import rows_at_a_time, take
from .outputs import frozen_eval
from .queries import LOGIT_TOLERANCE, CountingModel, exact_float32, is_misclassified, majority_vote
from .results import Run, Samples
from .threat import NORMS, Threat
from .user_input import typed
from .witness_files import open_apart, witnesses_file

WITNESSES, WITNESSES_VERSION = "witnesses", 1
# They need attacks, or are the word of whoever wrote the file.
VERDICTS = (
    "verdicts, trust checks, counts of the audit and the spot check, the inference region, pictures, costs, margins of "
    "adversarial images, training figures, settings, environment and dates"
)

# Branch and bound may take so many times as long as all proofs of the run did, and no longer than so many seconds: the
# machine may be slower, and a forged time must not make it run without end.
PROOF_TIMES, LONGEST_PROOF = 10.0, 3600.0


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
    x_adv: NotRequired[str]  # a hash of the images, where they are in a file of their own


class _Header(TypedDict):
    networks: list[_Network]


class _Recount(NamedTuple):
    """What one network gives, one entry per sample.

    ``failed`` counts witnesses; ``slack`` is by how much rounding may move a margin, and where it
    cannot change the prediction, that is ``clear``; ``trained`` is the loss and seed
    that its folder names, None where it names none.
    """

    samples: Tensor
    y: Tensor
    misclassified: Tensor
    broken: Tensor
    prediction: Tensor
    clear: Tensor
    margin: Tensor
    slack: Tensor
    certified: Tensor | None
    failed: int
    trained: tuple[str, int] | None
    split: Split


@typed
def replay(folder: str | Path, *, device: str = "cpu", batch_size: int = 1024, run_code: bool = False) -> list[Replay]:
    """Recount the runs of a results file: classify clean images and adversarial examples again, and certify again.

    Args:
        folder: holds results.json and witnesses.safetensors; or that results.json.
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
    folder = folder.parent if folder.name == results.FILE else folder
    stored, path = results.load(folder), folder / "witnesses.safetensors"
    if other := [run.threat_text for run in stored.runs if run.threat["norm"] not in NORMS]:
        raise UserError(
            f"{folder} was evaluated under {other[0]}, and replay recounts threats in a norm alone. The same `holdfast "
            "evaluate` with another --out repeats it: it draws nothing but what its seed says."
        )
    witnesses, header = load_tensors(path, WITNESSES, WITNESSES_VERSION, _Header)
    with understood(path):
        threats = [Threat(**network["threat"]) for network in header["networks"]]
    replays = []
    for run in stored.runs:
        with understood(folder / results.FILE):
            threat = Threat(**run.threat)
        votes = run.remaining.votes if run.remaining is not None else 1
        parts = []
        for number, network in enumerate(header["networks"]):
            if network["run"] == run.name and threats[number] == threat:
                examples = _witnesses(path, witnesses, number, network)
                parts.append(_network(folder, network, threat, *examples, run, votes, device, batch_size, run_code))
        replays.append(_compare(run, parts, votes, stored.data))
    return replays


def _witnesses(path: Path, tensors: dict[str, Tensor], number: int, network: _Network) -> tuple[Tensor, Tensor]:
    """(sample numbers, adversarial images) of a network."""
    index, x_adv = (tensors.get(f"{number}/{name}") for name in ("index", "x_adv"))
    if network.get("x_adv"):
        x_adv = open_apart(witnesses_file(path.parent, number), network["x_adv"])
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
    x, y = data.x, data.y
    if x_adv.shape[1:] != x.shape[1:] and len(x_adv):
        raise UserError(
            f"the witnesses are images of {tuple(x_adv.shape[1:])}, those of '{name}' {tuple(x.shape[1:])}."
        )
    with exact_float32(), frozen_eval(model), torch.no_grad():
        clean = _answers(model, x, y, votes, device, batch_size)
        valid = _answers(model, x_adv, y[rows], votes, device, batch_size).misclassified
        proved = None
        if run.certified is not None:
            proved = _certified(model, data, threat, run, device, batch_size)
    for some in torch.arange(len(rows)).split(min(batch_size, rows_at_a_time(x_adv))) if len(rows) else ():
        valid[some] &= threat.violation(take(x_adv, some), pixels(take(x, rows[some]))) == 0
    broken = torch.zeros_like(clean.misclassified)
    broken[rows[valid]] = True  # each sample counts once, however many witnesses name it
    broken &= ~clean.misclassified
    failed, trained = int((~valid).sum()), _trained(config)
    answers = clean[1:]
    return _Recount(data.index, y, clean.misclassified, broken, *answers, proved, failed, trained, split)


def _trained(config: dict[str, Any]) -> tuple[str, int] | None:
    """(the loss, the seed) as the table shows them, from config.json; None where it does not say so.

    A user's own model stands under the name of its file, with the seed of the evaluation.
    """
    if run_folder.ENSEMBLE in config:
        name, seed = config[run_folder.ENSEMBLE].get("name"), config.get("seed")
        return (name, seed) if isinstance(name, str) and isinstance(seed, int) else None
    own = run_folder.MODEL_FILE in config
    loss = model_name(config.get(run_folder.PATHS, {}).get("model", "")) if own else config.get("loss")
    seed = config.get("seed") if own else config.get("fit", {}).get("seed")
    return (loss, seed) if loss and isinstance(seed, int) else None


def _certified(model: nn.Module, data: Data, threat: Threat, run: Run, device: str, batch_size: int) -> Tensor:
    """(N,) bool: which samples are proved; none where no bound of the network is known.

    The cheap methods are tried on all samples, and then what proved them in the run on those that it calls certified.
    """
    proved = torch.zeros(len(data), dtype=torch.bool)
    samples = run.samples
    claims = () if samples is None or samples.certified is None else zip(samples.index, samples.certified, strict=True)
    claimed = torch.isin(data.index.cpu(), torch.tensor([number for number, one in claims if one], dtype=torch.int64))
    by_branch = samples is not None and "branch" in (samples.proved_by or ())
    spent = sum(cost.seconds for cost in run.proofs)
    for method, rows in (("linear", torch.ones_like(claimed)), ("branch" if by_branch else "alpha", claimed)):
        waiting = (rows & ~proved).nonzero()[:, 0]
        for part in waiting.split(rows_at_a_time(data.x)) if len(waiting) and isinstance(model, nn.Module) else ():
            seconds = min(PROOF_TIMES * spent, LONGEST_PROOF) if method == "branch" else math.inf
            some = data.take(part.to(data.y.device)).to(device)
            with suppress(CannotBound):
                found = certify(model, some, threat, method=method, seconds=seconds, batch_size=batch_size)
                proved[part] = found.proved.cpu()
    return proved


class _Answers(NamedTuple):
    """What a model answers, (N,) each."""

    misclassified: Tensor
    prediction: Tensor
    clear: Tensor
    margin: Tensor
    slack: Tensor


def _answers(model: nn.Module, x: Tensor, y: Tensor, votes: int, device: str, batch_size: int) -> _Answers:
    """Ask a model about images, a randomised one as often as the evaluation did."""
    counted = CountingModel(model)
    parts = []
    every = torch.arange(len(x))
    for rows, ys in zip(every.split(batch_size), y.to(device).split(batch_size), strict=True):
        if len(rows):  # no network is asked about no images
            logits, counts = majority_vote(counted, pixels(take(x, rows)).to(device), votes)
            top = logits.topk(2).values
            slack = LOGIT_TOLERANCE * (top[:, 0] - logits.amin(1))
            margin, clear = -negative_margin(logits, ys), top[:, 0] - top[:, 1] > 2 * slack
            columns = is_misclassified(counts, ys, votes), counts.argmax(1), clear, margin, slack
            parts.append([column.cpu() for column in columns])
    if not parts:
        none = torch.zeros(0)
        return _Answers(none.bool(), none.long(), none.bool(), none, none)
    return _Answers(*map(torch.cat, zip(*parts, strict=True)))


def _compare(run: Run, parts: Sequence[_Recount], votes: int, data: dict[str, Any]) -> Replay:
    """Hold a run against the recount of its networks."""
    name = f"{run.name}, {run.threat_text}"
    reported = None if run.robust is None else run.robust.value
    if not parts:
        why = ("witnesses.safetensors names no network for this run, so nothing of it can be recounted",)
        return Replay(name, run.n, 0, 0, 0, None, reported, why, ())
    whole = _together(parts)
    problems, not_rechecked = _figures(run, whole), [VERDICTS]
    problems += _remaining(run, whole)
    wrong, unknown = _origin(run, parts, data)
    problems, not_rechecked = problems + wrong, not_rechecked + unknown
    not_rechecked += [f"{attack} alone" for attack in run.attacks if attack != "pgd50"]
    if run.samples is None or list(run.samples.index) != whole.samples.tolist():
        not_rechecked.append("PGD-50, since results.json holds no columns of these samples")
        if run.samples is not None:
            problems.append("the samples in results.json are not those of its networks")
    else:
        problems += _columns(run, whole, votes)
        not_rechecked.append("PGD-50 on the samples that it left")
    proved = whole.certified
    return Replay(
        run=name,
        n=len(whole.samples),
        misclassified=int(whole.misclassified.sum()),
        broken=int(whole.broken.sum()),
        failed=whole.failed,
        certified=None if proved is None else int((proved & ~whole.misclassified).sum()),
        reported=reported,
        problems=tuple(problems),
        not_rechecked=tuple(not_rechecked),
    )


def _together(parts: Sequence[_Recount]) -> _Recount:
    """The networks of one run (folds) as one: their samples one after the other."""
    joined: dict[str, Any] = {}
    for key in ("samples", "y", "misclassified", "broken", "prediction", "clear", "margin", "slack", "certified"):
        columns = [getattr(part, key) for part in parts]
        joined[key] = None if any(column is None for column in columns) else torch.cat(columns)
    return parts[0]._replace(**joined, failed=sum(part.failed for part in parts))


def _figures(run: Run, whole: _Recount) -> list[str]:
    """What is wrong in the accuracies and their intervals."""
    problems, n = [], len(whole.samples)
    misclassified, broken, proved = whole.misclassified, whole.broken, whole.certified

    def figure(what: str, shown: results.Interval, count: int) -> None:
        if abs(shown.value - count / n) >= 0.5 / n:
            problems.append(f"{what} is reported as {shown.value:.1%}, recounted {count / n:.1%}")
        interval = results.proportion(count, n)
        if max(abs(shown.low - interval.low), abs(shown.high - interval.high)) > 1e-6:
            problems.append(f"the interval of {what} is not the 95% Clopper-Pearson interval of {count} of {n}")

    if n != run.n:
        problems.append(f"{run.n} samples are reported, its networks have {n}")
    if n != len(set(whole.samples.tolist())):
        problems.append("a sample is counted twice")
    if whole.failed:
        problems.append(
            f"{whole.failed} of the stored adversarial examples are outside the threat or classified correctly"
        )
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
    return problems


def _origin(run: Run, parts: Sequence[_Recount], data: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What is wrong in whose figures these are: loss, seed and data; and what of it the folders do not say."""
    problems, split = [], parts[0].split
    trained = {part.trained for part in parts}
    for loss, seed in (one for one in trained if one is not None):
        if run.loss != loss:
            problems.append(f"the loss is reported as {run.loss}, the folder of its network says {loss}")
        if run.seed != seed:
            problems.append(f"the seed is reported as {run.seed}, the folder of its network says {seed}")
        if run.name not in (loss, f"{loss} seed {seed}"):
            problems.append(f"the run is called {run.name}, but it is of {loss}, seed {seed}")
    known = {
        "fingerprint": "+".join(part.split.fingerprint for part in parts),
        "classes": list(split.classes),
        "shape": list(split.test.x.shape[1:]),
        "n": sum(len(part.split.test) for part in parts),
    }
    problems += [
        f"the {key} of the data in results.json is not that of the data"
        for key in known
        if key in data and data[key] != known[key]
    ]
    return problems, ["the loss and the seed, which the folder of the network does not say"] if None in trained else []


def _remaining(run: Run, whole: _Recount) -> list[str]:
    """What is wrong in the estimate of samples that may still be breakable: its counts, and what follows from them."""
    left, samples = run.remaining, run.samples
    if left is None:
        return ["the estimate of samples that may still be breakable is missing, though there are checks"] * bool(
            run.checks
        )
    names = [stage.name for stage in run.stages]
    if samples is not None and "audit" in names and len(samples) == len(whole.samples):
        stage = torch.tensor(samples.stage)
        survivors = (stage == -1) | (stage >= names.index("audit"))
        if run.certified is not None and whole.certified is not None:
            survivors &= ~whole.certified
        found = run.stages[names.index("audit")].broken
        void = run.robust is None  # what was certified is not shown then
        if left.survivors > int(survivors.sum()) or (left.survivors < int(survivors.sum()) and not void):
            return [f"the survivors of the estimate are reported as {left.survivors}, recounted {int(survivors.sum())}"]
        if left.first + left.second - left.both > found:
            return [f"the estimate counts more samples than the {found} that the audit broke"]
    if left.survivors > run.n:
        return [f"the survivors of the estimate are reported as {left.survivors}, of {run.n} samples"]
    try:
        again = results.sum_remaining([left], left.spot_checks, unfinished=left.unfinished, votes=left.votes)
    except UserError as error:
        return [f"the counts of the estimate contradict each other ({error})"]
    if any(abs(getattr(left, name) - getattr(again, name)) > 1e-6 * run.n for name in ("expected", "low", "high")):
        return [
            f"of the samples that may still be breakable {left.expected:.1f} are reported as expected, in "
            f"{left.low:g} to {left.high:g}; from its counts follow {again.expected:.1f}, {again.low:g} to "
            f"{again.high:g}"
        ]
    return []


def _pgd50_column(samples: Samples) -> tuple[Tensor, Tensor]:
    """((N,) whether PGD-50 was asked, (N,) its answer: correct under it); False where it was not asked."""
    column = [None] * len(samples) if samples.pgd50 is None else samples.pgd50
    return torch.tensor([one is not None for one in column]), torch.tensor([bool(one) for one in column])


def _columns(run: Run, whole: _Recount, votes: int) -> list[str]:
    """What is wrong in the per-sample columns: with the recount, with each other, and with the figures shown."""
    y, misclassified, broken, proved = whole.y, whole.misclassified, whole.broken, whole.certified
    samples, problems = run.samples, []
    if samples is None:
        return []
    clean, robust, stage = (torch.tensor(column) for column in (samples.clean, samples.robust, samples.stage))
    asked, pgd50 = _pgd50_column(samples)
    if run.pgd50_n is not None and int(asked.sum()) != run.pgd50_n:
        problems.append(f"PGD-50 is reported on {run.pgd50_n} samples, its column has {int(asked.sum())}")

    def differ(what: str, wrong: Tensor) -> None:
        if bool(wrong.any()):
            first = samples.index[int(wrong.nonzero()[0, 0])]
            problems.append(f"{what} of {int(wrong.sum())} samples, such as {first}, is not what was recounted")

    differ("the label", torch.tensor(samples.y) != y)
    differ("the clean answer", clean.bool() == misclassified)
    differ("the robust column", robust.bool() == (misclassified | broken))
    differ("the stage", (stage == -2) != misclassified)
    if votes == 1:  # the answers of a randomised network vary
        shown = torch.tensor([math.nan if value is None else value for value in samples.margin])
        close = (shown - whole.margin).abs() <= whole.slack + 1e-4  # they are shown to 4 decimals
        differ("the margin", ~(close | (shown.isnan() & ~whole.margin.isfinite())))
        differ("the prediction", whole.clear & (torch.tensor(samples.prediction) != whole.prediction))
    stages = [one.name for one in run.stages]
    counts = [int((stage == number).sum()) for number in range(1, len(stages))]
    if (bool((stage >= max(len(stages), 1)).any()) and stages) or counts != [one.broken for one in run.stages[1:]]:
        problems.append("what the stages broke is not what the samples' column says")
    if "pgd50" in stages:  # what it broke has a witness
        expected = ~(misclassified | (broken & (stage == stages.index("pgd50"))))
        differ("PGD-50's answer", asked & (pgd50 != expected))
    if run.certified is not None and samples.certified is not None and proved is not None:
        differ("the certificate", torch.tensor(samples.certified).bool() & ~(proved & ~misclassified))
    if samples.certified is not None and samples.proved_by is not None:
        named = torch.tensor([name != "" for name in samples.proved_by])
        differ("the method of proof", named != torch.tensor(samples.certified).bool())
        if any(cost.proved != samples.proved_by.count(cost.method) for cost in run.proofs):
            problems.append("what the methods of proof did is not what the samples' column says")
    for what, interval, column in (
        ("PGD-50 accuracy", run.pgd50, pgd50[asked] if bool(asked.any()) else None),
        ("certified accuracy", run.certified, None if samples.certified is None else torch.tensor(samples.certified)),
    ):
        if (
            interval is not None
            and column is not None
            and abs(interval.value - float(column.double().mean())) >= 0.5 / run.n
        ):
            problems.append(
                f"{what} is reported as {interval.value:.1%}, its column gives {column.double().mean():.1%}"
            )
    return problems
