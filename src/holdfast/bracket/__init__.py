"""Two brackets: certified <= accuracy under a threat <= attacked; and per sample the worst-case margin drop.

``bracket_accuracy`` attacks every sample, and proves or breaks what is left. ``bracket`` measures, sample by sample,
s_att <= s* <= s_cert, compared with the margin:

    d_j = logit_j - logit_y,   margin = -max_{j != y} d_j(x),   S(x_adv) = max_{j != y} d_j(x_adv) + margin

s* is the largest S over the threat: the worst-case margin drop, and the s that I-SCE would need. Attacks reach a part
of it, s_att; bounds prove that it is at most s_cert; for small networks under linf it is known exactly.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from .. import run_folder
from ..bounds import METHODS
from ..errors import at_least, unknown
from ..experiments.evaluate_model import ModelUnderTest, check_classes, from_run
from ..io import save_tensors, write_atomic
from ..progress import Progress
from ..report import write_figure
from ..spec import threat_file_name
from ..threat import Threat
from ..user_input import typed
from .accuracy import AccuracyBracket, StepCost, witnesses
from .measure import bracket
from .plot import figure, save, sentence
from .proof_figure import proof_figure
from .prove import bracket_accuracy
from .result import STATUS, Bracket

__all__ = [
    "STATUS",
    "AccuracyBracket",
    "Bracket",
    "StepCost",
    "bracket",
    "bracket_accuracy",
    "bracket_run",
    "bracket_subject",
    "figure",
    "proof_figure",
    "save",
    "sentence",
    "subject_accuracy",
]

WITNESSES, WITNESSES_VERSION = "bracket witnesses", 1


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


@typed
def subject_accuracy(
    subject: ModelUnderTest,
    threat: str,
    out: str | Path,
    *,
    method: str = "branch",
    seconds: float = math.inf,
    limit: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[AccuracyBracket, list[Path]]:
    """Bracket the accuracy of any network on its test images; write accuracy.json, a figure, adversarial examples.

    After an interruption, the same call resumes; with more time or a stronger method, it goes on.

    Args:
        subject: What ``from_run`` or ``from_file`` opened.
        threat: "norm:eps".
        out: The output folder.
        method: As for ``bracket_accuracy``.
        seconds: As for ``bracket_accuracy``.
        limit: The maximum number of images; 0 for all.
        seed: Seed of the attacks' noise.
        progress: As for ``bracket_accuracy``.

    Returns:
        (the AccuracyBracket, the files written: accuracy.json, witnesses.safetensors; and where a sample is proved the
        figure of the proved share against time, accuracy.svg and .png).

    Raises:
        UserError: As ``bracket_accuracy`` does; ``out`` belongs to another bracket.
    """
    parsed, out = Threat.parse(threat), Path(out)  # before anything is written
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    check_classes(subject)
    settings = {**subject.about, "threat": threat, "seed": seed, "limit": limit}
    run_folder.reserve(out, settings)
    network = f"{run_folder.weights_hash(subject.model)} {subject.code}".strip()
    found = bracket_accuracy(
        subject.model,
        subject.split.test.take(slice(0, limit or None)),
        parsed,
        method=method,
        seconds=seconds,
        trained_with=subject.loss.loss,
        seed=seed,
        checkpoint=out / "accuracy.safetensors",
        key=f"{subject.split.fingerprint} {network}",
        progress=progress,
    )
    told = write_atomic(out / "accuracy.json", json.dumps(found.describe()))
    save_tensors(
        out / "witnesses.safetensors", WITNESSES, WITNESSES_VERSION, witnesses(found),
        {"threat": parsed.describe(), "network": network, "name": subject.name}, packed=["x_adv"],
    )  # fmt: skip
    figure_of = proof_figure(found, subject.name)
    drawn = [] if figure_of is None else write_figure(figure_of, out, "accuracy")
    return found, [told, out / "witnesses.safetensors", *drawn]
