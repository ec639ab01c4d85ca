"""All measures of one network on one set of samples, as plain data; and their average over networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attacks.base import predict, score_and_grad
from ..losses import negative_margin
from ..outputs import Model
from ..progress import Progress, as_progress
from ..queries import CountingModel, default_batch_size
from ..threat import Threat
from ..user_input import typed, whole
from ..witnesses import Witnesses
from .calibration import reliability
from .distances import measure_distances
from .feature_shift import Movement, movement, scatter_ratio
from .margins import fraction_within, input_margin
from .misalignment import auc, frechet, mmd2
from .samples import Samples, choose_samples, counted, features_of, json_number, to_float64

QUANTILES = {"q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9}
MIN_SAMPLES = 10  # fewer samples than this are not compared as distributions
N_DISTANCES = 256  # samples whose distance and local Lipschitz constant are measured: most of the passes
STRAYED = ("strayed_before", "strayed_after")


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
) -> dict[str, Any]:
    """The inference region of a network, and how its features are misaligned under attack, ready for JSON.

    It costs 3 passes for each sample, 2 (steps + 10) more for each of the first 256, and for each of these at each
    radius of ``eps_checks`` but eps 26 more where it stands there, and 6 more where it falls.

    Figures are floats, or None where there is none. A *spread* is a dict of q10, q25, median, q75, q90.

    The result has these keys:

    * n, right, not_finite: samples used, those classified correctly, those left out because of NaN or infinity.
    * space, dim: "features", or "logits" for a model that returns no features; their dimension.
    * norm, eps, s: as given.
    * margin, margin_adv: spreads of logit_y - largest other logit, clean and under attack.
    * inference_region, inference_region_adv: fractions with 0 < margin <= s, None without s.
    * input_margin: spread of the first-order distance to the boundary, over correct samples (``input_margin``).
    * distance: spread of the smallest perturbation found by any attack (``measure_distances``); 0 for misclassified
      samples. It is an upper bound.
    * distances: index and distance of each of these samples, None where nothing was found; they give robust
      accuracy over eps.
    * eps_checks: for eps / 2, eps, 3 eps / 2 and 2 eps: eps; n, the samples with a distance; minimal_norm, how many of
      them are robust at this eps by FMN alone; robust, how many by every attack. Where minimal_norm is larger, FMN did
      not converge, and between the neighbouring radii the distances may be too large.
    * missed: how many of these samples are broken within the threat although x_adv does not fool. If it is not 0, the
      evaluation's robust accuracy is too high.
    * lipschitz: spread of a lower bound of the margin's local Lipschitz constant, over correct samples.
    * movement: spreads of the columns of ``Movement``, and the fractions strayed_before and strayed_after, over
      correct samples. So are all measures below, because a sample that is misclassified already has no adversarial
      example.
    * scatter, scatter_adv: scatter within over between classes (``scatter_ratio``).
    * two_sample: mmd2 (about 0 by chance); frechet; frechet_chance, the distance between two halves of the clean
      samples (above the chance level of frechet, since a half has fewer samples); frechet_relative, over the
      scatter of the clean features (independent of scale); auc (about 0.5 by chance). None for fewer than 10
      samples.
    * per_class: n, mmd2, frechet, frechet_chance, auc: lists with one entry for each class.
    * calibration: for clean and adv: ece, brier, nll, bins (``reliability``).
    * passes: forwards, backwards.

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
        A dict of plain data, with the keys above.

    Raises:
        UserError: for no samples, or columns of different length.
    """
    progress = as_progress(progress)
    samples = choose_samples(model, x, y, x_adv, index, limit, seed)
    batch_size = default_batch_size(samples.x) if batch_size is None else whole("batch_size", batch_size, 1)
    with counted(model) as counting:
        columns, space = _outputs(counting, samples, threat, batch_size, progress)
        found = measure_distances(
            counting, samples.take(slice(N_DISTANCES)), threat,
            steps=steps, seed=seed, batch_size=batch_size, progress=progress,
        )  # fmt: skip
    if on_witnesses is not None:
        on_witnesses(found.witnesses)
    return {
        **_measures(samples, columns, space, found.distance, found.lipschitz, threat, s),
        "eps_checks": [check._asdict() for check in found.checks],
        "missed": len(found.witnesses.rows),
        "passes": {"forwards": counting.forwards, "backwards": counting.backwards},
    }


def _measures(
    samples: Samples,
    columns: dict[str, Tensor],
    space: str,
    distance: Tensor,
    lipschitz: Tensor,
    threat: Threat,
    s: float | None,
) -> dict[str, Any]:
    """The measures as plain data, from the columns of ``_outputs`` and ``measure_distances``."""
    labels = samples.y.cpu()
    finite = torch.stack([columns[key].isfinite().all(1) for key in ("z", "z_adv", "h", "h_adv")]).all(0)
    right = finite & (columns["margin"] > 0)
    h, h_adv, y_right = (part[right] for part in (columns["h"], columns["h_adv"], labels))
    s = None if s is None else float(s)
    return {
        "n": len(labels),
        "right": int(right.sum()),
        "not_finite": int((~finite).sum()),
        "space": space,
        "dim": h.shape[1],
        "norm": threat.norm,
        "eps": float(threat.eps),
        "s": s,
        **{key: spread(columns[key][finite]) for key in ("margin", "margin_adv")},
        **{
            f"inference_region{end}": None
            if s is None
            else json_number(fraction_within(columns[f"margin{end}"][finite], s))
            for end in ("", "_adv")
        },
        "input_margin": spread(columns["input_margin"][right]),
        "distance": spread(distance),
        "distances": {
            "index": samples.indices[: len(distance)].tolist(),
            # Unrounded: a distance of eps, rounded up, would be a sample that stands at eps.
            "distance": [float(value) if value.isfinite() else None for value in distance],
        },
        "lipschitz": spread(lipschitz[right[: len(lipschitz)]]),
        "movement": _movement(h, h_adv, y_right),
        "scatter": json_number(scatter_ratio(h, y_right)) if len(h) else None,
        "scatter_adv": json_number(scatter_ratio(h_adv, y_right)) if len(h) else None,
        "two_sample": _two_sample(h, h_adv),
        "per_class": _per_class(h, h_adv, y_right, columns["z"].shape[1]),
        "calibration": {
            "clean": _reliability(columns["z"][finite], labels[finite]),
            "adv": _reliability(columns["z_adv"][finite], labels[finite]),
        },
    }


def _outputs(
    model: CountingModel, samples: Samples, threat: Threat, batch_size: int, progress: Progress
) -> tuple[dict[str, Tensor], str]:
    """The model's outputs on clean and adversarial samples, as float64 columns on the CPU, and the feature space."""
    parts: dict[str, list[Tensor]] = {}
    space, total = "logits", len(samples.y)
    for start in range(0, total, batch_size):
        batch = samples.take(slice(start, start + batch_size))
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
        progress("measuring features", min(start + batch_size, total), total)
    columns = {key: torch.cat(values) for key, values in parts.items()}
    y = samples.y.cpu()
    columns["margin"], columns["margin_adv"] = (-negative_margin(columns[key], y) for key in ("z", "z_adv"))
    return columns, space


def spread(values: Tensor) -> dict[str, float | None]:
    """Quantiles, each the value of one sample, so that infinite values do no harm.

    Args:
        values: (N,); NaN is left out.

    Returns:
        A dict of q10, q25, median, q75 and q90; None where the quantile is infinite, or there are no values.

    >>> spread(torch.tensor([1.0, 2.0, 3.0, 4.0, float("inf")]))
    {'q10': 1.0, 'q25': 2.0, 'median': 3.0, 'q75': 4.0, 'q90': None}
    """
    values = values.double()
    values = values[~values.isnan()]
    if len(values) == 0:
        return dict.fromkeys(QUANTILES)
    return {key: json_number(values.quantile(q, interpolation="nearest")) for key, q in QUANTILES.items()}


def _movement(h: Tensor, h_adv: Tensor, y: Tensor) -> dict[str, Any]:
    """``Movement`` as spreads and fractions."""
    if len(h) == 0:
        return {**{key: dict.fromkeys(QUANTILES) for key in Movement._fields}, **dict.fromkeys(STRAYED)}
    moves = movement(h, h_adv, y)
    several_classes = bool(moves.other_before.isfinite().all())
    fractions = {key: json_number(getattr(moves, key).double().mean()) if several_classes else None for key in STRAYED}
    return {**{key: spread(getattr(moves, key)) for key in moves._fields}, **fractions}


def _two_sample(h: Tensor, h_adv: Tensor) -> dict[str, float | None]:
    """The three two-sample statistics, and the reference values of the Frechet distance."""
    if len(h) < MIN_SAMPLES:
        return dict.fromkeys(("mmd2", "frechet", "frechet_chance", "frechet_relative", "auc"))
    distance = frechet(h, h_adv)
    scatter = float(h.var(0).sum())
    return {
        "mmd2": json_number(mmd2(h, h_adv)),
        "frechet": json_number(distance),
        "frechet_chance": json_number(frechet(h[::2], h[1::2])),
        "frechet_relative": json_number(distance / scatter) if scatter > 0 else None,
        "auc": json_number(auc(h, h_adv)),
    }


def _per_class(h: Tensor, h_adv: Tensor, y: Tensor, classes: int) -> dict[str, list[Any]]:
    """The two-sample statistics of each class, as lists."""
    members = [y == k for k in range(classes)]
    statistics = [_two_sample(h[rows], h_adv[rows]) for rows in members]
    return {
        "n": [int(rows.sum()) for rows in members],
        **{key: [one[key] for one in statistics] for key in ("mmd2", "frechet", "frechet_chance", "auc")},
    }


def _reliability(z: Tensor, y: Tensor) -> dict[str, Any] | None:
    return _mapped(json_number, reliability(z, y)) if len(y) else None


def _mapped(function: Callable[[float], Any], value: Any) -> Any:
    """The same structure with the function applied to each float in it."""
    if isinstance(value, dict):
        return {key: _mapped(function, part) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(function, part) for part in value]
    return function(value) if isinstance(value, float) else value


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measures of several networks (the folds of a cross-validation) as one dict.

    Counts are added, and figures are averaged over the networks that have one. Quantiles are averaged too, because the
    feature spaces of different networks cannot be pooled. Distances are concatenated, and bins of calibration are
    weighted by their samples.

    Args:
        results: what ``measure`` returned for each network.

    Returns:
        A dict with the same keys.

    >>> merge([{"n": 2, "auc": 0.5, "space": "logits"}, {"n": 3, "auc": None, "space": "logits"}])
    {'n': 5, 'auc': 0.5, 'space': 'logits'}
    """
    merged: dict[str, Any] = _merged(list(results))
    return merged


def _merged(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known or isinstance(known[0], str):
        return known[0] if known else None
    if isinstance(known[0], dict):
        merge_of: dict[str, Callable[[list[Any]], Any]] = {
            "distances": _concatenated, "bins": _pooled_bins, "dim": _first, "eps": _first, "s": _first,
        }  # fmt: skip
        return {key: merge_of.get(key, _merged)([one[key] for one in known]) for key in known[0]}
    if isinstance(known[0], list):
        return [_merged(list(items)) for items in zip(*known, strict=True)]
    return sum(known) if isinstance(known[0], int) else json_number(math.fsum(known) / len(known))


def _first(values: list[Any]) -> Any:
    return values[0]


def _concatenated(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Columns one after the other."""
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}


def _pooled_bins(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The calibration bins of the samples of all networks together."""
    counts = [part["n"] for part in parts]
    pooled: dict[str, Any] = {"n": [sum(bins) for bins in zip(*counts, strict=True)]}
    for key in ("confidence", "accuracy"):
        sums = [
            sum(n * (part[key][b] or 0.0) for n, part in zip(bins, parts, strict=True))
            for b, bins in enumerate(zip(*counts, strict=True))
        ]
        pooled[key] = [json_number(total / n) if n else None for total, n in zip(sums, pooled["n"], strict=True)]
    return pooled
