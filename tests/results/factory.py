"""Synthetic results whose counts, stages and intervals agree with each other, for every test that needs some."""

from __future__ import annotations

import base64
import dataclasses
import struct
import zlib

import numpy as np

from holdfast import results as R

THREAT = {"norm": "linf", "eps": 0.1, "lo": 0.0, "hi": 1.0}
STAGES = ("pgd-20", "pgd-100 on the score", "targeted", "square")


def png(pixels: np.ndarray) -> str:
    """A grey (H, W) uint8 picture as PNG in base64, by hand."""
    h, w = pixels.shape
    raw = b"".join(b"\x00" + row.tobytes() for row in pixels.astype(np.uint8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return base64.b64encode(whole).decode()


def make_check(name, status, k=0, n=0, why="") -> R.CheckResult:
    """A check of both figures."""
    value = k / n if n else None
    both = ("pgd50", "robust")
    return R.CheckResult(name, status, k, n, 0.05, why, False, both, "nobody", value=value, low=value)


def make_run(loss="sce", seed=0, n=200, clean=0.97, pgd50=0.4, robust=0.3, scale=8.0, status="tight", **more) -> R.Run:
    """One synthetic run: seeded columns whose counts, stages and intervals agree with each other."""
    rng = np.random.default_rng([seed or 0, len(loss), n, round(1000 * pgd50)])
    y = np.random.default_rng(n).integers(0, 10, n)  # every network sees the same samples
    order = rng.permutation(n)
    k = [round(n * share) for share in (clean, pgd50, robust)]
    correct, pgd50_correct, unbroken = (np.isin(np.arange(n), order[:m]) for m in k)
    stage = np.where(unbroken, -1, np.where(~correct, -2, np.where(~pgd50_correct, 0, rng.integers(1, len(STAGES), n))))
    margin = np.where(correct, 1, -0.2) * scale * rng.lognormal(0, 0.5, n)
    prediction = np.where(correct, y, (y + 1) % 10)
    stages, alive = [], k[0]
    for j, name in enumerate(STAGES):
        broken = int((stage == j).sum())
        stages.append(
            R.StageCost(name, alive, broken, alive * 20 * (j + 1), alive * (0 if name == "square" else 20), 1.5 * j)
        )
        alive -= broken
    pictures = []
    for i in np.flatnonzero(stage >= 0)[:8]:
        x = np.clip(rng.normal(100, 60, (12, 12)), 0, 255)
        delta = 25 * rng.choice([-1, 1], (12, 12))
        adv = np.clip(x + delta, 0, 255)
        pictures.append(R.Example(int(i), int(y[i]), int(y[i]), int(y[i] + 5) % 10, png(x), png(adv), png(delta + 128)))
    why = {"loose": "gradients vanish on 61% of samples", "refuted": "the score attack broke more, beyond chance"}
    verdict = R.Verdict(status, why.get(status, "attacks of three kinds agree" if status == "tight" else "NaN logits"))
    fields = {
        "name": f"{loss}-seed{seed}",
        "loss": loss,
        "seed": seed,
        "threat": dict(THREAT),
        "n": n,
        "clean": R.proportion(k[0], n),
        "attacks": {"pgd50": R.proportion(k[1], n)},
        "robust": None if status == "void" else R.proportion(k[2], n),
        "verdict": verdict,
        "checks": [
            make_check("gradients reach the input", "fires" if status == "loose" else "holds", 61, 100),
            make_check("more steps change nothing", "holds", 0, 100, "0 of 100 more broken"),
            make_check("transfer is not stronger", "not run", why="needs a second network"),
        ],
        "cost": R.Cost(sum(s.forwards for s in stages), sum(s.backwards for s in stages), 9.0),
        "stages": stages,
        "examples": pictures,
        "train": R.Training(epochs=10, accuracy=0.991, seconds=61.5),
        "samples": R.Samples(
            range(n), y, prediction, correct, pgd50_correct, unbroken, stage, margin, margin * 0.3 - 2
        ),
    }
    return R.Run(**{**fields, **more})


def make_region(**more) -> R.RegionMeasures:
    """Measures of four samples, few of which are known."""
    spread, nothing = R.Spread(), (None,) * 10
    fields = {
        "n": 4, "right": 3, "not_finite": 0, "space": "features", "dim": 8, "norm": "linf", "eps": 0.1, "s": 3.0,
        "margin": spread, "margin_adv": spread, "inference_region": 0.25, "inference_region_adv": 0.5,
        "input_margin": R.Spread(median=0.031), "distance": spread,
        "distances": R.Distances((0, 1, 2, 3), (0.05, 0.15, None, 0.0)), "lipschitz": spread,
        "movement": R.FeatureShift(), "scatter": None, "scatter_adv": None, "two_sample": R.TwoSample(0.01, auc=0.8),
        "per_class": R.TwoSamplePerClass((0,) * 10, *[nothing] * 4), "calibration": R.Calibration(None, None),
        "eps_checks": (), "passes": R.Passes(40, 30),
    }  # fmt: skip
    return R.RegionMeasures(**{**fields, **more})


def make_projection(**more) -> R.Projection:
    """Four points of ten classes in a plane."""
    points = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    grid = R.DecisionGrid((-0.5, 0.5, 1.5), (-0.5, 1.5), ((0, 1, 1), (1, 1, 0)), ((5.0, 1.0, None), (1.0, 9.0, 2.0)))
    fields = {
        "exact": False, "space": "features", "explained": 0.625, "s": 3.0, "classes": 10, "y": (0, 1, 2, 0),
        "prediction": (0, 1, 2, 0), "prediction_adv": (1, 1, 0, 0), "points": points, "points_adv": points[::-1],
        "centers": (None,) * 10, "grid": grid,
    }  # fmt: skip
    return R.Projection(**{**fields, **more})


def make_results(runs=None, classes=None, **more) -> R.Results:
    runs = runs or [
        make_run("sce"),
        make_run("isce:s=100", pgd50=0.79, robust=0.195, scale=130, status="refuted"),
        make_run("isce:s=4.6", pgd50=0.55, robust=0.41, scale=20, status="loose"),
    ]
    data = {"name": "digits", "classes": classes or list("0123456789"), "n": runs[0].n, "shape": [1, 12, 12]}
    fields = {
        "runs": runs,
        "data": {**data, "fingerprint": "9f2c41d0"},
        "command": "holdfast evaluate runs/digits --suite strong --eps 0.1",
        "created": "2026-01-02T03:04:05+00:00",
        "holdfast": "0.1.0",
        "settings": {"suite": "strong", "fit": {"epochs": 10, "lr": 0.001}},
        "environment": {"versions": {"python": "3.11", "torch": "2.6"}, "hardware": "2 CPU cores"},
    }
    return R.Results(**{**fields, **more})


EVIL = "<script>alert(1)</script>\"'&--><b>"
PROTOCOLS = {"pgd10": 0.55, "pgd10-targeted": 0.8, "pgd50": 0.4, "pgd50-targeted": 0.75, "cw": 0.41}


def proved(certified, run=None, **attacks):
    """A run with a certified accuracy, and accuracies under other attacks than PGD-50."""
    run = run or make_run()
    figures = {name: R.proportion(round(value * run.n), run.n) for name, value in attacks.items()}
    k = None if certified is None else R.proportion(round(certified * run.n), run.n)
    return dataclasses.replace(run, certified=k, attacks={**run.attacks, **figures})


def with_proofs(run=None, between=7, late=0):
    """A run of which all robust samples but these are certified: half by linear, half by alpha."""
    run = run or make_run()
    s = run.samples
    robust = [i for i, one in enumerate(s.robust) if one]
    by = {i: ("linear", "alpha")[place % 2] for place, i in enumerate(robust[between:])}
    names = tuple(by.get(i, "") for i in range(run.n))
    tried = {"interval": run.n, "linear": run.n, "crown": 40, "alpha": 40}
    costs = [
        R.ProofCost(name, n, names.count(name), 1.5, out_of_time=late * (name == "alpha")) for name, n in tried.items()
    ]
    samples = dataclasses.replace(s, certified=tuple(int(bool(name)) for name in names), proved_by=names)
    return dataclasses.replace(proved(len(by) / run.n, run), samples=samples, proofs=tuple(costs))
