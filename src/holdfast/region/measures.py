"""All measures of one network on one set of samples, as plain data; and those of several networks in one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attacks.base import predict, score_and_grad
from ..losses import negative_margin
from ..outputs import Model, fooled
from ..queries import CountingModel, default_batch_size
from ..threat import Threat
from .calibration import reliability
from .feature_shift import Movement, movement, scatter_ratio
from .margins import input_margin, local_lipschitz, share_within, smallest
from .misalignment import auc, frechet, mmd2
from .samples import Asked, asking, chosen, features_of, number, wide

QUANTILES = {"q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9}
LEAST = 10  # samples below which two distributions are not compared
STRAYED = ("strayed_before", "strayed_after")
WALKED = 256  # samples whose distance and local slope are looked for: most of the passes


def measure(
    model: Model,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    threat: Threat,
    *,
    s: float | None = None,
    index: Tensor | None = None,
    most: int = 512,
    steps: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
    keep: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, Any]:
    """The inference region of a network and how its features are misaligned under attack, ready for JSON.

    Args:
        model: images to logits or Outputs. x, x_adv: (N, C, H, W), uint8 or float in the threat's box, the images and
        what an evaluation made of them (``Evaluation.x_adv``); y: (N,).
        threat: of that evaluation. s: the inference information in units of the logits, None where there is no number.
        index: (N,), the samples' own numbers, default 0..N-1: they, and seed, choose the samples.
        most: samples looked at, classes in equal numbers; distances and slopes on the first 256 of them, with ``steps``
        of FMN. In all 3 passes a sample, and 2 (steps + 10) more for each of those 256.
        keep: called once with what FMN breaks within the threat though x_adv does not fool, as ``checks.absorb`` takes
        it: (rows, x_adv, margin, prediction).

    Returns (figures are floats or None, where there is none; a spread is a dict of q10, q25, median, q75, q90):
        n, right, not_finite: samples looked at, right ones of them, left out because an answer is no number.
        space, dim: "features", or "logits" of a model that tells none; how many there are.
        norm, eps, s: as given.
        margin, margin_adv: spreads of logit_y - largest other, clean and under attack.
        inference_region, inference_region_adv: shares with 0 < margin <= s, None without s.
        input_margin: spread over right samples of the first-order distance to the boundary (``input_margin``).
        distance: spread of the smallest perturbation found (``smallest``), wrong samples with 0.
        distances: index and distance of each such sample, None where nothing was found: robust accuracy over eps.
        missed: of these, how many FMN breaks within the threat though x_adv does not fool: not 0, the evaluation's
        robust accuracy is too high.
        lipschitz: spread over right ones of a lower bound of the margin's local Lipschitz constant.
        movement: spreads of moved, relative, own_before, own_after, other_before, other_after (``Movement``), and the
        shares strayed_before, strayed_after nearer to another class's center; over right samples, as all below are:
        of one that is wrong already there is no adversarial twin.
        scatter, scatter_adv: within over between classes (``scatter_ratio``).
        two_sample: mmd2 (chance: about 0), frechet, frechet_chance (of one half of the clean samples and the other:
        half as many, so more than chance does here), frechet_relative (over the clean features' own scatter: free of
        scale), auc (chance: about 0.5); None of fewer than 10.
        per_class: n, mmd2, frechet, frechet_chance, auc: lists with an entry a class.
        calibration: clean and adv: ece, brier, nll, bins (``reliability``).
        passes: forwards, backwards.

    Raises UserError for no samples, or columns of different length.
    """
    asked = chosen(model, x, y, x_adv, index, most, seed)
    size = batch_size or default_batch_size(asked.x)
    with asking(model) as counted:
        seen = _answers(counted, asked, threat, size)
        known, slope, broken = _walk(counted, asked.take(slice(WALKED)), threat, steps, size)
    if keep is not None:
        keep(*broken)
    labels, numbers = asked.y.cpu(), asked.numbers.tolist()
    finite = seen["finite"]
    right = finite & (seen["margin"] > 0)
    h, h_adv, y_right = (part[right] for part in (seen["h"], seen["h_adv"], labels))
    classes = seen["z"].shape[1]
    s = None if s is None else float(s)
    return {
        "n": len(labels),
        "right": int(right.sum()),
        "not_finite": int((~finite).sum()),
        "space": seen["space"],
        "dim": h.shape[1],
        "norm": threat.norm,
        "eps": float(threat.eps),
        "s": s,
        **{key: spread(seen[key][finite]) for key in ("margin", "margin_adv")},
        **{
            f"inference_region{end}": None if s is None else number(share_within(seen[f"margin{end}"][finite], s))
            for end in ("", "_adv")
        },
        "input_margin": spread(seen["input_margin"][right]),
        "distance": spread(known),
        "distances": {"index": numbers[: len(known)], "distance": [number(value) for value in known]},
        "missed": len(broken[0]),
        "lipschitz": spread(slope[right[: len(slope)]]),
        "movement": _movement(h, h_adv, y_right),
        "scatter": number(scatter_ratio(h, y_right)) if len(h) else None,
        "scatter_adv": number(scatter_ratio(h_adv, y_right)) if len(h) else None,
        "two_sample": _compared(h, h_adv),
        "per_class": _per_class(h, h_adv, y_right, classes),
        "calibration": {
            name: _reliability(z[finite], labels[finite]) for name, z in (("clean", seen["z"]), ("adv", seen["z_adv"]))
        },
        "passes": {"forwards": counted.forwards, "backwards": counted.backwards},
    }


def _answers(model: CountingModel, asked: Asked, threat: Threat, size: int) -> dict[str, Any]:
    """What the network says of the samples and of their twins: float64 columns on the CPU."""
    columns: dict[str, list[Tensor]] = {}
    space = "logits"
    for start in range(0, len(asked.y), size):
        part = asked.take(slice(start, start + size))
        out, height, grad = score_and_grad(model, part.x, negative_margin, part.y)
        out_adv = predict(model, part.x_adv)
        space = "logits" if out.features is None else "features"
        found = {
            "z": wide(out.logits),
            "z_adv": wide(out_adv.logits),
            "h": features_of(out),
            "h_adv": features_of(out_adv),
            "input_margin": input_margin(-wide(height), wide(grad), threat),
        }
        for key, value in found.items():
            columns.setdefault(key, []).append(value)
    seen: dict[str, Any] = {key: torch.cat(parts) for key, parts in columns.items()}
    y = asked.y.cpu()
    seen["finite"] = torch.stack([seen[key].isfinite().all(1) for key in ("z", "z_adv", "h", "h_adv")]).all(0)
    seen["margin"], seen["margin_adv"] = (-negative_margin(seen[key], y) for key in ("z", "z_adv"))
    return {**seen, "space": space}


def _walk(
    model: CountingModel, asked: Asked, threat: Threat, steps: int, size: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of each sample the smallest perturbation found and the steepest slope nearby; and what the evaluation missed."""
    none = asked.take(slice(0))
    sizes, slopes = [], []
    broken = [(none.rows, none.x.cpu(), none.x.new_zeros(0).cpu(), none.y.cpu())]
    for start in range(0, len(asked.y), size):
        x, x_adv, y, _, rows = asked.take(slice(start, start + size))
        nearest, far = smallest(model, x, y, threat, x_adv=x_adv, steps=steps)
        stood = ~fooled(predict(model, x_adv).logits, y)
        fell = stood & far.isfinite() & (threat.violation(nearest, x) == 0)
        if fell.any():
            points, margin, prediction = _witness(model, x[fell], nearest[fell], y[fell], threat)
            broken.append((rows[fell.cpu()], points.cpu(), margin.cpu(), prediction.cpu()))
        sizes.append(wide(far))
        slopes.append(wide(local_lipschitz(model, x, y, threat)))
    return torch.cat(sizes), torch.cat(slopes), [torch.cat(parts) for parts in zip(*broken, strict=True)]


def _witness(
    model: CountingModel, x: Tensor, nearest: Tensor, y: Tensor, threat: Threat
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_adv, margin, prediction): the nearest mistake, or what lies behind it at the threat's edge where that is
    decided more clearly, so that no rounding takes it back."""
    size = threat.size(nearest - x).clamp_min(1e-12).view(-1, *[1] * (x.ndim - 1))
    edge = (x + (nearest - x) * (0.999 * threat.eps / size)).clamp(threat.lo, threat.hi)
    logits, beyond = predict(model, nearest).logits, predict(model, edge).logits
    deeper = negative_margin(beyond, y) > negative_margin(logits, y)
    logits = torch.where(deeper[:, None], beyond, logits)
    x_adv = torch.where(deeper.view(size.shape), edge, nearest)
    return x_adv, -negative_margin(logits, y), logits.argmax(1)


def spread(values: Tensor) -> dict[str, float | None]:
    """Quantiles, each the value of one sample, so that infinite ones do no harm; None where that is no number, or none.

    >>> spread(torch.tensor([1.0, 2.0, 3.0, 4.0, float("inf")]))
    {'q10': 1.0, 'q25': 2.0, 'median': 3.0, 'q75': 4.0, 'q90': None}
    """
    values = values.double()
    values = values[~values.isnan()]
    if len(values) == 0:
        return dict.fromkeys(QUANTILES)
    return {key: number(values.quantile(q, interpolation="nearest")) for key, q in QUANTILES.items()}


def _movement(h: Tensor, h_adv: Tensor, y: Tensor) -> dict[str, Any]:
    if len(h) == 0:
        return {**{key: dict.fromkeys(QUANTILES) for key in Movement._fields}, **dict.fromkeys(STRAYED)}
    told = movement(h, h_adv, y)
    several = bool(told.other_before.isfinite().all())
    shares = {key: number(getattr(told, key).double().mean()) if several else None for key in STRAYED}
    return {**{key: spread(getattr(told, key)) for key in told._fields}, **shares}


def _compared(h: Tensor, h_adv: Tensor) -> dict[str, float | None]:
    """The three answers of kinds of their own, and what the Frechet distance is to be held against."""
    if len(h) < LEAST:
        return dict.fromkeys(("mmd2", "frechet", "frechet_chance", "frechet_relative", "auc"))
    far = frechet(h, h_adv)
    scatter = float(h.var(0).sum())
    return {
        "mmd2": number(mmd2(h, h_adv)),
        "frechet": number(far),
        "frechet_chance": number(frechet(h[::2], h[1::2])),
        "frechet_relative": number(far / scatter) if scatter > 0 else None,
        "auc": number(auc(h, h_adv)),
    }


def _per_class(h: Tensor, h_adv: Tensor, y: Tensor, classes: int) -> dict[str, list[Any]]:
    rows = [y == k for k in range(classes)]
    told = [_compared(h[mine], h_adv[mine]) for mine in rows]
    return {
        "n": [int(mine.sum()) for mine in rows],
        **{key: [one[key] for one in told] for key in ("mmd2", "frechet", "frechet_chance", "auc")},
    }


def _reliability(z: Tensor, y: Tensor) -> dict[str, Any] | None:
    return _mapped(number, reliability(z, y)) if len(y) else None


def _mapped(function: Callable[[float], Any], value: Any) -> Any:
    """The same structure with the function on each float in it."""
    if isinstance(value, dict):
        return {key: _mapped(function, part) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(function, part) for part in value]
    return function(value) if isinstance(value, float) else value


def merge(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One dict for the networks of several folds: counts added up, figures averaged over those that have one.

    Feature spaces of different networks cannot be pooled, so quantiles are averaged too. Distances are joined, and bins
    of calibration are weighted by their samples.

    >>> merge([{"n": 2, "auc": 0.5, "space": "logits"}, {"n": 3, "auc": None, "space": "logits"}])
    {'n': 5, 'auc': 0.5, 'space': 'logits'}
    """
    merged: dict[str, Any] = _merged(list(found))
    return merged


def _merged(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known or isinstance(known[0], str):
        return known[0] if known else None
    if isinstance(known[0], dict):
        ways: dict[str, Callable[[list[Any]], Any]] = {
            "distances": _strung, "bins": _weighted, "dim": _first, "eps": _first, "s": _first,
        }  # fmt: skip
        return {key: ways.get(key, _merged)([one[key] for one in known]) for key in known[0]}
    if isinstance(known[0], list):
        return [_merged(list(items)) for items in zip(*known, strict=True)]
    return sum(known) if isinstance(known[0], int) else number(math.fsum(known) / len(known))


def _first(values: list[Any]) -> Any:
    return values[0]


def _strung(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Columns one after the other."""
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}


def _weighted(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The bins of several networks as those of all their samples."""
    counts = [part["n"] for part in parts]
    whole: dict[str, Any] = {"n": [sum(bins) for bins in zip(*counts, strict=True)]}
    for key in ("confidence", "accuracy"):
        sums = [
            sum(n * (part[key][b] or 0.0) for n, part in zip(bins, parts, strict=True))
            for b, bins in enumerate(zip(*counts, strict=True))
        ]
        whole[key] = [number(total / n) if n else None for total, n in zip(sums, whole["n"], strict=True)]
    return whole
