"""Two and three classes: every attack in every norm breaks what is breakable of a linear model, and nothing else."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from tests.helpers import LinearModel, boundary_distances, survivors

from holdfast.attacks import ATTACKS
from holdfast.losses import dlr, negative_log_odds
from holdfast.threat import Threat

FAR = {"lo": -30.0, "hi": 30.0}  # a box that no step comes near
N = 24
FEW = {
    "fgsm": {}, "noise": {"steps": 20}, "square": {"steps": 400}, "jsma": {"steps": 16}, "spsa": {"steps": 20},
    "cw": {"steps": 40, "searches": 5}, "lbfgs": {"steps": 10}, "fab": {"steps": 10}, "deepfool": {"steps": 10},
    "fmn": {"steps": 100},
}  # fmt: skip
# Sure to fall where eps is this many times what the sample needs; by default as if exact. Steps under l1 from x may go
# for a class that is not the nearest; jsma goes by saliency; lbfgs has l2's penalty whatever the norm is.
REACH = {
    "noise": math.inf, "jsma": 3.0, "lbfgs-linf": 1.5, "lbfgs-l1": 1.5, "lbfgs": 1.05, "deepfool": 1.03, "cw": 1.05,
    "fgsm-l1": 1.2, "bim-l1": 1.2, "mim-l1": 1.2, "fmn-l2": 1.2, "fmn-l1": 1.1, "square": 1.05, "spsa": 1.05,
    "least_likely-l2": 1.2, "rays-l2": 1.5,
}  # fmt: skip
# Towards the class that is least likely at x, which for two classes is the only one.
TOWARDS_ONE = ("least_likely",)
TABLE = [(name, norm) for name, entry in ATTACKS.items() for norm in entry.norms]


def case(classes, norm):
    """(model, x, y, needed, threat): needed is the distance to each class's boundary, (N, K), infinite at y."""
    model = LinearModel(classes, seed=classes, dtype=torch.float32)
    x = torch.randn(N, 1, 4, 4, generator=torch.Generator().manual_seed(classes + 9))
    with torch.no_grad():
        y = model(x).argmax(1)
    needed = boundary_distances(model, x, y, norm)
    radii = needed.amin(1).sort().values[N // 2 : 3 * N // 4]
    widest = int((radii[1:] - radii[:-1]).argmax())
    return model, x, y, needed, Threat(norm, float(radii[widest] + radii[widest + 1]) / 2, **FAR)


def breaks(name, model, x, y, threat, score, **settings):
    """(N,) bool: what the attack breaks; its points must lie in the threat."""
    return ~survivors(name, model, x, y, threat, score=score, **{**FEW.get(name, {"steps": 40}), **settings})


def reach(name, norm):
    return REACH.get(f"{name}-{norm}", REACH.get(name, 1.001))


@pytest.mark.parametrize(("name", "norm"), TABLE)
@pytest.mark.parametrize("classes", [2, 3])
def test_what_is_breakable_falls(name, norm, classes):
    """For two classes by either score. For more, DLR alone is no criterion: it may choose a farther class."""
    model, x, y, needed, threat = case(classes, norm)
    by_log_odds, by_dlr = (breaks(name, model, x, y, threat, score) for score in (negative_log_odds, dlr))
    broken = by_log_odds | by_dlr
    assert not broken[needed.amin(1) > threat.eps * (1 + 1e-5)].any(), "broke what cannot be broken"
    if name in TOWARDS_ONE and classes > 2:
        needed = needed.masked_fill(needed != needed.gather(1, model(x).argmin(1)[:, None]), math.inf)
    due = needed.amin(1) * reach(name, norm) < threat.eps
    assert by_log_odds[due].all()
    assert by_dlr[due].all() or classes > 2
    assert name in ("noise", "jsma") or due.any()


@pytest.mark.parametrize(
    ("name", "norm"), [case for case in TABLE if "target" in inspect.signature(ATTACKS[case[0]].attack).parameters]
)
@pytest.mark.parametrize("classes", [2, 3])
def test_towards_each_wrong_class_in_turn_what_is_breakable_falls(name, norm, classes):
    model, x, y, needed, threat = case(classes, norm)
    broken = torch.zeros(N, dtype=torch.bool)
    for step in range(1, classes):
        target = (y + step) % classes
        now = breaks(name, model, x, y, threat, dlr, target=target)
        broken |= now
    due = needed.amin(1) * reach(name, norm) < threat.eps
    assert broken[due].all()
    assert name == "jsma" or due.any()
    assert not broken[needed.amin(1) > threat.eps * (1 + 1e-5)].any()
