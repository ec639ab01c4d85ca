"""All measures of one network on one set of samples; and their average over networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attacks.base import predict, score_and_grad
from ..losses import negative_margin
from ..outputs import Model
from ..progress import Progress, as_progress
from ..queries import CountingModel, default_batch_size
from ..results import (
    Calibration,
    CalibrationBins,
    Distances,
    FeatureShift,
    Passes,
    RegionMeasures,
    Reliability,
    Spread,
    TwoSample,
    TwoSamplePerClass,
)
from ..threat import Threat
from ..user_input import typed, whole
from ..witnesses import Witnesses
from .calibration import reliability
from .distances import measure_distances
from .feature_shift import movement, scatter_ratio
from .margins import fraction_within, input_margin
from .misalignment import auc, frechet, mmd2
from .samples import Samples, choose_samples, counted, features_of, json_number, to_float64

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of a Spread
MIN_SAMPLES = 10  # fewer samples than this are not compared as distributions
N_DISTANCES = 256  # samples whose distance and local Lipschitz constant are measured: most of the passes


@typed
def measure(
    model: Model,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    threat: Threat,
    *,
    s: float | None = None,
    index: Tensor | None = None,
    limit: int = 512,
    steps: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    on_witnesses: Callable[[Witnesses], None] | None = None,
    progress: Progress | None = None,
) -> RegionMeasures:
    """The inference region of a network, and how its features are misaligned under attack.

    It costs 3 passes for each sample, 2 (steps + 10) more for each of the first 256, and for each of these at each
    radius of ``eps_checks`` but eps 26 more where it stands there, and 6 more where it falls.

    Args:
        model: images to logits or Outputs.
        x: (N, C, H, W), uint8 or float in the threat's box, the clean images.
        y: (N,) labels.
        x_adv: (N, C, H, W), what an evaluation made of them (``Evaluation.x_adv``).
        threat: the threat of that evaluation.
        s: the inference information in units of the logits; None where it is not a number.
        index: (N,) int64, the samples' own indices, default 0..N-1. With the seed they choose the samples.
        limit: number of samples, with equal numbers of each class. Distances and Lipschitz constants are measured on
            the first 256 of them.
        steps: steps of FMN, which measures the distances.
        seed: any integer; it chooses the samples, and gives the random starts of the attacks of ``eps_checks``.
        batch_size: samples at a time; default by the device and the image size.
        on_witnesses: called once with the samples that are broken within the threat although x_adv does not fool; they
            may be none.
        progress: called after each batch.

    Returns:
        The RegionMeasures.

    Raises:
        UserError: for no samples, or columns of different length.
    """
    progress = as_progress(progress)
    samples = choose_samples(model, x, y, x_adv, index, limit, seed)
    batch_size = default_batch_size(samples.one) if batch_size is None else whole("batch_size", batch_size, 1)
    with counted(model) as counting:
        columns, space = _outputs(counting, samples, threat, batch_size, progress)
        found = measure_distances(
            counting, samples.first(N_DISTANCES), threat,
            steps=steps, seed=seed, batch_size=batch_size, progress=progress,
        )  # fmt: skip
    if on_witnesses is not None:
        on_witnesses(found.witnesses)
    labels, z, margin = samples.y, columns["z"], columns["margin"]
    finite = torch.stack([columns[key].isfinite().all(1) for key in ("z", "z_adv", "h", "h_adv")]).all(0)
    right = finite & (margin > 0)
    h, h_adv, y_right = columns["h"][right], columns["h_adv"][right], labels[right]
    margin, margin_adv = margin[finite], columns["margin_adv"][finite]
    s = None if s is None else float(s)
    return RegionMeasures(
        n=len(labels),
        right=int(right.sum()),
        not_finite=int((~finite).sum()),
        space=space,
        dim=h.shape[1],
        norm=threat.norm,
        eps=float(threat.eps),
        s=s,
        margin=spread(margin),
        margin_adv=spread(margin_adv),
        inference_region=None if s is None else json_number(fraction_within(margin, s)),
        inference_region_adv=None if s is None else json_number(fraction_within(margin_adv, s)),
        input_margin=spread(columns["input_margin"][right]),
        distance=spread(found.distance),
        distances=Distances(
            tuple(samples.indices[: len(found.distance)].tolist()),
            # Unrounded: a distance of eps, rounded up, would be a sample that stands at eps.
            tuple(value if math.isfinite(value) else None for value in found.distance.tolist()),
        ),
        lipschitz=spread(found.lipschitz[right[: len(found.lipschitz)]]),
        movement=_feature_shift(h, h_adv, y_right),
        scatter=json_number(scatter_ratio(h, y_right)) if len(h) else None,
        scatter_adv=json_number(scatter_ratio(h_adv, y_right)) if len(h) else None,
        two_sample=_two_sample(h, h_adv),
        per_class=_per_class(h, h_adv, y_right, z.shape[1]),
        calibration=Calibration(
            clean=_reliability(z[finite], labels[finite]), adv=_reliability(columns["z_adv"][finite], labels[finite])
        ),
        eps_checks=found.checks,
        passes=Passes(counting.forwards, counting.backwards),
    )


def _outputs(
    model: CountingModel, samples: Samples, threat: Threat, batch_size: int, progress: Progress
) -> tuple[dict[str, Tensor], str]:
    """The model's outputs on clean and adversarial samples, as float64 columns on the CPU, and the feature space."""
    parts: dict[str, list[Tensor]] = {}
    space, done = "logits", 0
    for batch in samples.batches(batch_size):
        out, negative, grad = score_and_grad(model, batch.x, negative_margin, batch.y)
        out_adv = predict(model, batch.x_adv)
        space = "logits" if out.features is None else "features"
        values = {
            "z": to_float64(out.logits),
            "z_adv": to_float64(out_adv.logits),
            "h": features_of(out),
            "h_adv": features_of(out_adv),
            "input_margin": input_margin(-to_float64(negative), to_float64(grad), threat),
        }
        for key, value in values.items():
            parts.setdefault(key, []).append(value)
        done += len(batch.y)
        progress("measuring features", done, len(samples))
    columns = {key: torch.cat(values) for key, values in parts.items()}
    columns["margin"], columns["margin_adv"] = (-negative_margin(columns[key], samples.y) for key in ("z", "z_adv"))
    return columns, space


def spread(values: Tensor) -> Spread:
    """Quantiles, each the value of one sample, so that infinite values do no harm.

    Args:
        values: (N,); NaN is left out.

    Returns:
        The Spread.

    >>> spread(torch.tensor([1.0, 2.0, 3.0, 4.0, float("inf")]))
    Spread(q10=1.0, q25=2.0, median=3.0, q75=4.0, q90=None)
    """
    values = values.double()
    values = values[~values.isnan()]
    if len(values) == 0:
        return Spread()
    return Spread(*(json_number(values.quantile(q, interpolation="nearest")) for q in QUANTILES))


def _feature_shift(h: Tensor, h_adv: Tensor, y: Tensor) -> FeatureShift:
    """``Movement`` as spreads and shares."""
    if len(h) == 0:
        return FeatureShift()
    moves = movement(h, h_adv, y)
    several_classes = bool(moves.other_before.isfinite().all())
    spreads = {name: spread(getattr(moves, name)) for name in moves._fields}
    return FeatureShift(
        **spreads,
        strayed_before=json_number(moves.strayed_before.double().mean()) if several_classes else None,
        strayed_after=json_number(moves.strayed_after.double().mean()) if several_classes else None,
    )


def _two_sample(h: Tensor, h_adv: Tensor) -> TwoSample:
    """The three two-sample statistics, and the reference values of the Frechet distance."""
    if len(h) < MIN_SAMPLES:
        return TwoSample()
    distance = frechet(h, h_adv)
    scatter = float(h.var(0).sum())
    return TwoSample(
        mmd2=json_number(mmd2(h, h_adv)),
        frechet=json_number(distance),
        frechet_chance=json_number(frechet(h[::2], h[1::2])),
        frechet_relative=json_number(distance / scatter) if scatter > 0 else None,
        auc=json_number(auc(h, h_adv)),
    )


def _per_class(h: Tensor, h_adv: Tensor, y: Tensor, classes: int) -> TwoSamplePerClass:
    """The two-sample statistics of each class."""
    members = [y == k for k in range(classes)]
    statistics = [_two_sample(h[rows], h_adv[rows]) for rows in members]
    return TwoSamplePerClass(
        n=tuple(int(rows.sum()) for rows in members),
        mmd2=tuple(one.mmd2 for one in statistics),
        frechet=tuple(one.frechet for one in statistics),
        frechet_chance=tuple(one.frechet_chance for one in statistics),
        auc=tuple(one.auc for one in statistics),
    )


def _reliability(z: Tensor, y: Tensor) -> Reliability | None:
    return _rounded(reliability(z, y)) if len(y) else None


def _rounded(value: Any) -> Any:
    """The same data with each float as ``json_number``."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _rounded(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return json_number(value) if isinstance(value, float) else value


EQUAL = ("dim", "eps", "s")  # numbers that the networks of a cross-validation share


def merge(parts: Sequence[RegionMeasures]) -> RegionMeasures:
    """The measures of several networks (the folds of a cross-validation) as one.

    Counts are added, and figures are averaged over the networks that have one. Quantiles are averaged too, because the
    feature spaces of different networks cannot be pooled. Distances are concatenated, and bins of calibration are
    weighted by their samples.

    Args:
        parts: what ``measure`` returned for each network, at least one.

    Returns:
        The RegionMeasures of all.
    """
    merged: RegionMeasures = _merged(list(parts))
    return merged


def _merged(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known or isinstance(known[0], str):
        return known[0] if known else None
    if isinstance(known[0], CalibrationBins):
        return _pooled_bins(known)
    if isinstance(known[0], Distances):
        index, distance = (sum((getattr(part, name) for part in known), ()) for name in ("index", "distance"))
        return Distances(index, distance)
    if is_dataclass(known[0]):
        columns = {f.name: [getattr(part, f.name) for part in known] for f in fields(known[0])}
        merged = {name: column[0] if name in EQUAL else _merged(column) for name, column in columns.items()}
        return replace(known[0], **merged)  # type: ignore[type-var]
    if isinstance(known[0], tuple):
        return tuple(_merged(list(items)) for items in zip(*known, strict=True))
    return sum(known) if isinstance(known[0], int) else json_number(math.fsum(known) / len(known))


def _pooled_bins(parts: list[CalibrationBins]) -> CalibrationBins:
    """The calibration bins of the samples of all networks together."""
    counts = list(zip(*(part.n for part in parts), strict=True))

    def means(name: str) -> tuple[float | None, ...]:
        figures = zip(*(getattr(part, name) for part in parts), strict=True)
        sums = [
            sum(n * (v or 0.0) for n, v in zip(bins, values, strict=True))
            for bins, values in zip(counts, figures, strict=True)
        ]
        return tuple(json_number(total / sum(n)) if sum(n) else None for total, n in zip(sums, counts, strict=True))

    return CalibrationBins(tuple(map(sum, counts)), means("confidence"), means("accuracy"))
