"""Randomised smoothing: [certified, attacked] accuracy of the smoothed classifier of any network, under l2.

``holdfast.bounds.certify_smoothed`` has the theorem and the certificate alone. Everything here is about the smoothed
classifier, which answers by noisy votes, and not about the network; each certificate has a probability of 1 - alpha.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import run_folder
from ..bounds.votes import Vote
from ..experiments.evaluate_model import ModelUnderTest, check_classes
from ..progress import Progress
from ..user_input import any_seed, typed
from .measure import COPIES, STEPS, ExpectedModel, checked_radii, radii_of, smooth, smoothadv
from .plot import figure, save
from .result import SmoothedAccuracy, sentence, table

__all__ = [
    "ExpectedModel",
    "SmoothedAccuracy",
    "figure",
    "radii_of",
    "save",
    "sentence",
    "smooth",
    "smooth_subject",
    "smoothadv",
    "table",
]


@typed
def smooth_subject(
    subject: ModelUnderTest,
    sigma: float,
    radii: Any,
    out: str | Path,
    *,
    n: int = 10_000,
    n0: int = 100,
    alpha: float = 0.001,
    steps: int = STEPS,
    copies: int = COPIES,
    limit: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[SmoothedAccuracy, list[Path]]:
    """Certify and attack the smoothed classifier of a network on its test images; write smoothing.json and figures.

    After an interruption, the same call resumes.

    Args:
        subject: The network and its data: what ``from_run`` or ``from_file`` opened.
        sigma: As for ``smooth``.
        radii: As for ``smooth``.
        out: The output folder.
        n: As for ``smooth``.
        n0: As for ``smooth``.
        alpha: As for ``smooth``.
        steps: As for ``smooth``.
        copies: As for ``smooth``.
        limit: The maximum number of images, also of cross-validated data; 0 for all.
        seed: As for ``smooth``.
        batch_size: As for ``smooth``.
        progress: As for ``smooth``.

    Returns:
        (the result, the files written).

    Raises:
        UserError: As ``smooth`` does; ``out`` belongs to other work.
    """
    out, data = Path(out), subject.split.test.take(slice(0, limit or None))
    Vote(sigma, n, n0, alpha)  # what is out of range must not leave a folder behind
    radii = checked_radii(radii, data, steps=steps, copies=copies, batch_size=batch_size)
    check_classes(subject)
    asked = {"sigma": sigma, "radii": list(radii), "n": n, "n0": n0, "alpha": alpha, "steps": steps, "copies": copies}
    settings = {**subject.about, "smoothing": asked, "seed": any_seed(seed), "limit": limit}
    run_folder.reserve(out, settings)
    network = f"{run_folder.weights_hash(subject.model)} {subject.code}".strip()
    found = smooth(
        subject.model, data, sigma, radii, n=n, n0=n0, alpha=alpha, steps=steps, copies=copies, seed=seed,
        batch_size=batch_size, folder=out, progress=progress, key=f"{subject.split.fingerprint} {network}",
    )  # fmt: skip
    about = {
        "network": subject.name, "weights": run_folder.weights_hash(subject.model), "data": subject.data,
        "fingerprint": subject.split.fingerprint, "seed": seed,
    }  # fmt: skip
    return found, save(found, out, subject.name, about)
