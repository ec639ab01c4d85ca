"""The bracket of inference information, sample by sample: s_att <= s* <= s_cert, against the margin. Table and figure.

    gap_j = z_j - z_y,   margin = -max_{j != y} gap_j(x),   S(x_adv) = max_{j != y} gap_j(x_adv) + margin

s* is the largest S in the threat, by how much the margin can fall: the s that I-SCE would have to know. Attacks find a
part of it, s_att; bounds prove no more than s_cert; the truth between them is known where a network is small.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

from .. import run_folder
from ..errors import at_least
from ..experiments import loss_spec
from ..experiments.evaluate_model import from_run
from ..losses import isce
from ..progress import JobProgress, silent_job
from ..spec import threat_file_name
from ..threat import Threat
from .measure import bracket
from .plot import figure, save, sentence
from .result import STATUS, Bracket

__all__ = ["STATUS", "Bracket", "bracket", "constant_s", "figure", "of_run", "save", "sentence"]


def constant_s(loss: str) -> float | None:
    """The constant s of a loss's spec, in units of the network's logits; None where s is no constant.

    >>> constant_s("isce:s=10"), constant_s("isce"), constant_s("isce:s=2*3"), constant_s("sce")
    (10.0, 1.0, 6.0, None)
    """
    chosen = loss_spec.parse(loss)
    if getattr(chosen.loss, "func", chosen.loss) is not isce or chosen.source:
        return None
    given = getattr(chosen.loss, "keywords", {}).get("s", inspect.signature(isce).parameters["s"].default)
    return float(given) * chosen.logit_scale


def of_run(
    run: Path,
    threat: str,
    out: Path | None = None,
    *,
    seconds: float = 10.0,
    limit: int = 100,
    seed: int = 0,
    device: str = "cpu",
    tell: JobProgress = silent_job,
) -> tuple[Bracket, list[Path]]:
    """The bracket of a run folder's network on its test images; writes bracket.json, .svg and .png to ``out``.

    out: default bracket-THREAT in the run folder; limit: at most so many images, cross-validated or not, 0 for all; the
    other arguments as for ``bracket``.

    Stopped at any moment, the same call goes on where it was. Raises UserError as ``bracket`` and ``from_run`` do, and
    where ``out`` belongs to another bracket.
    """
    against = Threat.parse(threat)  # what cannot be read must not leave a folder behind
    at_least("seconds", seconds)
    subject = from_run(run, limit=limit, device=device)
    out = out or run / f"bracket-{threat_file_name(threat)}"
    settings = {**subject.about, "threat": threat, "seconds": seconds, "seed": seed, "limit": limit}
    run_folder.reserve(out, settings)
    found = bracket(
        subject.model,
        subject.split.test.take(slice(0, limit or None)),
        against,
        seconds=seconds,
        seed=seed,
        trained_s=constant_s(subject.loss.text),
        record=out / "bracket.safetensors",
        key=f"{subject.split.fingerprint} {run_folder.weights_hash(subject.model)} {threat} {seconds} {seed}",
        progress=partial(tell, subject.name),
    )
    return found, save(found, out, subject.name)
