"""The bracket of inference information, sample by sample: s_att <= s* <= s_cert, compared with the margin.

    d_j = logit_j - logit_y,   margin = -max_{j != y} d_j(x),   S(x_adv) = max_{j != y} d_j(x_adv) + margin

s* is the largest S over the threat: the worst-case margin drop, and the s that I-SCE would need. Attacks reach a part
of it, s_att; bounds prove that it is at most s_cert; for small networks under linf it is known exactly.
"""

from __future__ import annotations

from pathlib import Path

from .. import run_folder
from ..errors import at_least
from ..experiments.evaluate_model import ModelUnderTest, from_run
from ..progress import Progress
from ..spec import threat_file_name
from ..threat import Threat
from ..user_input import typed
from .measure import bracket
from .plot import figure, save, sentence
from .result import STATUS, Bracket

__all__ = ["STATUS", "Bracket", "bracket", "bracket_run", "bracket_subject", "figure", "save", "sentence"]


@typed
def bracket_run(
    run: str | Path,
    threat: str,
    out: str | Path | None = None,
    *,
    seconds: float = 10.0,
    limit: int = 100,
    seed: int = 0,
    device: str = "cpu",
    run_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Bracket, list[Path]]:
    """Bracket a run folder's network on its test images; write bracket.json, .svg and .png.

    After an interruption, the same call resumes.

    Args:
        run: The run folder.
        threat: "norm:eps".
        out: The output folder. Default: bracket-THREAT in the run folder.
        seconds: The time limit per sample for the exact answer; 0 for none.
        limit: The maximum number of images, also of cross-validated data; 0 for all.
        seed: Seed of the attacks' random starts.
        device: "cpu", "cuda", ...
        run_code: As for ``from_run``.
        progress: None, or called with (what is being done, samples done, samples).

    Returns:
        (the Bracket, the files written).

    Raises:
        UserError: As ``bracket`` and ``from_run`` do; ``out`` belongs to another bracket.
    """
    Threat.parse(threat)  # before anything is opened
    subject = from_run(run, limit=limit, device=device, run_code=run_code)
    folder = Path(out) if out else Path(run) / f"bracket-{threat_file_name(threat)}"
    return bracket_subject(subject, threat, folder, seconds=seconds, limit=limit, seed=seed, progress=progress)


@typed
def bracket_subject(
    subject: ModelUnderTest,
    threat: str,
    out: str | Path,
    *,
    seconds: float = 10.0,
    limit: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Bracket, list[Path]]:
    """Bracket any network on its test images: what ``from_run`` or ``from_file`` opened.

    Args:
        subject: The network and its data.
        threat: "norm:eps".
        out: The output folder.
        seconds: As for ``bracket_run``.
        limit: As for ``bracket_run``.
        seed: As for ``bracket_run``.
        progress: As for ``bracket_run``.

    Returns:
        (the Bracket, the files written).

    Raises:
        UserError: As ``bracket`` does; ``out`` belongs to another bracket.
    """
    parsed, out = Threat.parse(threat), Path(out)  # before anything is written
    at_least("seconds", seconds)
    settings = {**subject.about, "threat": threat, "seconds": seconds, "seed": seed, "limit": limit}
    run_folder.reserve(out, settings)
    network = f"{run_folder.weights_hash(subject.model)} {subject.code}".strip()
    result = bracket(
        subject.model,
        subject.split.test.take(slice(0, limit or None)),
        parsed,
        seconds=seconds,
        seed=seed,
        trained_s=subject.loss.s,
        checkpoint=out / "bracket.safetensors",
        key=f"{subject.split.fingerprint} {network} {threat} {seconds} {seed}",
        progress=progress,
    )
    return result, save(result, out, subject.name)
