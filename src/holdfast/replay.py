"""Re-check stored adversarial examples against the stored networks: one forward pass, no attack code."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import results, run_folder
from .data import load, pixels
from .errors import UserError
from .io import load_tensors
from .outputs import frozen_eval
from .queries import CountingModel, is_misclassified, majority_vote
from .threat import Threat

WITNESSES, WITNESSES_VERSION = "witnesses", 1


@dataclass(frozen=True)
class Replay:
    """The outcome for one run of a results file.

    Attributes:
        run: the run's name and threat.
        n: number of samples.
        misclassified: samples that are misclassified without an attack.
        broken: correctly classified samples that a valid witness breaks.
        failed: invalid witnesses: outside the threat, or classified correctly.
        reported: the robust accuracy in results.json.
    """

    run: str
    n: int
    misclassified: int
    broken: int
    failed: int
    reported: float

    @property
    def bound(self) -> float:
        """The upper bound of robust accuracy that this pass proves."""
        return 1 - (self.misclassified + self.broken) / self.n

    @property
    def holds(self) -> bool:
        """Whether every witness is valid and the bound equals the reported robust accuracy."""
        return self.failed == 0 and abs(self.bound - self.reported) < 0.5 / self.n


def replay(folder: str | Path, *, device: str = "cpu", batch_size: int = 1024) -> list[Replay]:
    """Classify the clean images and every stored adversarial example again.

    Args:
        folder: holds results.json and witnesses.safetensors.
        device: where the networks run.
        batch_size: images per forward pass, >= 1.

    Returns:
        One outcome per run. A void run reports no robust accuracy and is left out.

    Raises:
        UserError: files are missing or damaged, or the data differ from those the witnesses were made from.
    """
    folder = Path(folder)
    stored = results.load(folder)
    witnesses, header = load_tensors(folder / "witnesses.safetensors", WITNESSES, WITNESSES_VERSION)
    replays = []
    for run in stored.runs:
        if run.robust is None:
            continue
        threat, counts, votes = (
            Threat(**run.threat),
            Counter[str](),
            run.remaining.votes if run.remaining is not None else 1,
        )
        for number, network in enumerate(header["networks"]):
            if (network["run"], network["threat"]) == (run.name, run.threat):
                index, x_adv = witnesses[f"{number}/index"], witnesses[f"{number}/x_adv"]
                counts += _network(folder / network["folder"], network, threat, index, x_adv, votes, device, batch_size)
        replays.append(
            Replay(
                run=f"{run.name}, {run.threat_text}",
                n=run.n,
                misclassified=counts["misclassified"],
                broken=counts["broken"],
                failed=counts["failed"],
                reported=run.robust.value,
            )
        )
    return replays


def _network(
    run: Path,
    network: dict[str, Any],
    threat: Threat,
    index: Tensor,
    x_adv: Tensor,
    votes: int,
    device: str,
    batch_size: int,
) -> Counter[str]:
    """One network's counts. A randomised network is queried as often per image as it was during the evaluation."""
    model, config = run_folder.load(run, device=device)
    split = load(config["data"], **network["cut"])
    if split.fingerprint != network["fingerprint"]:
        raise UserError(f"the data '{config['data']}' is not what the witnesses were made from (fingerprint).")
    place = {int(number): row for row, number in enumerate(split.test.index)}
    unknown = [int(number) for number in index if int(number) not in place]
    if unknown:
        raise UserError(f"the witnesses name the sample {unknown[0]}, not in the test set of '{config['data']}'.")
    rows = torch.tensor([place[int(number)] for number in index], dtype=torch.int64)
    x, y = pixels(split.test.x), split.test.y
    with frozen_eval(model), torch.no_grad():
        misclassified = _misclassified(model, x, y, votes, device, batch_size)
        valid = _misclassified(model, x_adv, y[rows], votes, device, batch_size)
    valid &= threat.violation(x_adv, x[rows]) == 0
    broken = torch.zeros_like(misclassified)
    broken[rows[valid]] = True  # each sample counts once, however many witnesses name it
    return Counter(
        misclassified=int(misclassified.sum()),
        broken=int((broken & ~misclassified).sum()),
        failed=int((~valid).sum()),
    )


def _misclassified(model: nn.Module, x: Tensor, y: Tensor, votes: int, device: str, batch_size: int) -> Tensor:
    """(N,) bool: which images the model misclassifies."""
    counted = CountingModel(model)
    parts = [
        is_misclassified(majority_vote(counted, xs.to(device), votes)[1], ys.to(device), votes).cpu()
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
