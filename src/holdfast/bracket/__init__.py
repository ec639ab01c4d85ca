"""The bracket of inference information, sample by sample: s_att <= s* <= s_cert, against the margin. Table and figure.

    gap_j = z_j - z_y,   margin = -max_{j != y} gap_j(x),   S(x_adv) = max_{j != y} gap_j(x_adv) + margin

s* is the largest S in the threat, by how much the margin can fall: the s that I-SCE would have to know. Attacks find a
part of it, s_att; bounds prove no more than s_cert; the truth between them is known where a network is small.
"""

from __future__ import annotations

from pathlib import Path

from .. import run_folder
from ..errors import at_least
from ..experiments.evaluate_model import from_run
from ..progress import Progress, silent
from ..spec import threat_file_name
from ..threat import Threat
from .measure import bracket
from .plot import figure, save, sentence
from .result import STATUS, Bracket

__all__ = ["STATUS", "Bracket", "bracket", "figure", "of_run", "save", "sentence"]


def of_run(
    run: Path,
    threat: str,
    out: Path | None = None,
    *,
    seconds: float = 10.0,
    limit: int = 100,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[Bracket, list[Path]]:
    """Bracket a run folder's network on its test images; write bracket.json, .svg and .png.

    Stopped at any moment, the same call resumes.

    Args:
        run: the run folder.
        threat: "norm:eps".
        out: the output folder; default bracket-THREAT in the run folder.
        seconds: per sample, on the exact answer; 0 for none.
        limit: at most so many images, of cross-validated data too; 0 for all.
        seed: of the attacks' starts.
        device: "cpu", "cuda", ...
        progress: called with (what is being done, samples done, samples).

    Returns:
        (the Bracket, the files written).

    Raises:
        UserError: as ``bracket`` and ``from_run`` do, and where ``out`` belongs to another bracket.
    """
    against = Threat.parse(threat)  # what cannot be read must not leave a folder behind
    at_least("seconds", seconds)
    subject = from_run(run, limit=limit, device=device)
    out = out or run / f"bracket-{threat_file_name(threat)}"
    settings = {**subject.about, "threat": threat, "seconds": seconds, "seed": seed, "limit": limit}
    run_folder.reserve(out, settings)
    result = bracket(
        subject.model,
        subject.split.test.take(slice(0, limit or None)),
        against,
        seconds=seconds,
        seed=seed,
        trained_s=subject.loss.s,
        record=out / "bracket.safetensors",
        key=f"{subject.split.fingerprint} {run_folder.weights_hash(subject.model)} {threat} {seconds} {seed}",
        progress=progress,
    )
    return result, save(result, out, subject.name)
