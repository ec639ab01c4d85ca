"""Prove an upper bound again: stored adversarial images against stored networks, one forward pass, no attack."""

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
    """One network set of a results file: of n samples, ``wrong`` are wrong as they are and ``broken`` by a witness.

    failed: witnesses that do not hold (out of the threat, or classified correctly).
    """

    run: str
    n: int
    wrong: int
    broken: int
    failed: int
    claimed: float

    @property
    def bound(self) -> float:
        """The upper bound on robust accuracy that this pass proves."""
        return 1 - (self.wrong + self.broken) / self.n

    @property
    def holds(self) -> bool:
        """No witness failed, and the bound is the robust accuracy that results.json claims."""
        return self.failed == 0 and abs(self.bound - self.claimed) < 0.5 / self.n


def replay(folder: Path, *, device: str = "cpu", batch_size: int = 1024) -> list[Replay]:
    """Check every witness in ``folder`` and say what upper bound it proves, run by run.

    Raises UserError when files are missing or damaged, or the data is not what the witnesses were made from.
    """
    found = results.load(folder)
    witnesses, about = load_tensors(folder / "witnesses.safetensors", WITNESSES, WITNESSES_VERSION)
    proofs = []
    for run in found.runs:
        if run.robust is None:  # void: no number was claimed
            continue
        threat, counts, votes = Threat(**run.threat), Counter[str](), run.remaining.get("votes", 1)
        for number, network in enumerate(about["networks"]):
            if (network["run"], network["threat"]) == (run.name, run.threat):
                index, x_adv = witnesses[f"{number}/index"], witnesses[f"{number}/x_adv"]
                counts += _network(folder / network["folder"], network, threat, index, x_adv, votes, device, batch_size)
        claimed = run.robust.value
        proofs.append(
            Replay(
                f"{run.name}, {run.threat_text}", run.n, counts["wrong"], counts["broken"], counts["failed"], claimed
            )
        )
    return proofs


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
    """One network's clean pass and witness pass; of a randomised network as many of each as were asked before."""
    model, config = run_folder.load(run, device=device)
    split = load(config["data"], **network["cut"])
    if split.fingerprint != network["fingerprint"]:
        raise UserError(f"the data '{config['data']}' is not what the witnesses were made from (fingerprint).")
    place = {int(number): row for row, number in enumerate(split.test.index)}
    strangers = [int(number) for number in index if int(number) not in place]
    if strangers:
        raise UserError(f"the witnesses name the sample {strangers[0]}, not in the test set of '{config['data']}'.")
    rows = torch.tensor([place[int(number)] for number in index], dtype=torch.int64)
    x, y = pixels(split.test.x), split.test.y
    with frozen_eval(model), torch.no_grad():
        wrong = _misses(model, x, y, votes, device, batch_size)
        hit = _misses(model, x_adv, y[rows], votes, device, batch_size)
    hit &= threat.violation(x_adv, x[rows]) == 0
    broken = torch.zeros_like(wrong)
    broken[rows[hit]] = True  # each sample counts once, however many witnesses name it
    return Counter(wrong=int(wrong.sum()), broken=int((broken & ~wrong).sum()), failed=int((~hit).sum()))


def _misses(model: nn.Module, x: Tensor, y: Tensor, votes: int, device: str, batch_size: int) -> Tensor:
    asked = CountingModel(model)
    parts = [
        is_misclassified(majority_vote(asked, xs.to(device), votes)[1], ys.to(device), votes).cpu()
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
