"""Two and three classes: every attack in every norm breaks what is breakable of a linear model, and nothing else."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn

from holdfast.attacks import ATTACKS, fooled
from holdfast.losses import dlr, negative_log_odds
from holdfast.noise import Noise
from holdfast.threat import Threat

FAR = {"lo": -30.0, "hi": 30.0}  # a box that no step comes near
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
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
    "least_likely-l2": 1.2,
}  # fmt: skip
# Towards the class that is least likely at x, which for two classes is the only one.
TOWARDS_ONE = ("least_likely",)
TABLE = [(name, norm) for name, entry in ATTACKS.items() for norm in entry.norms]


class Plain(nn.Module):
    """A linear model, (N, 1, 4, 4) -> (N, K)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(classes)
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=chance))
        self.bias = nn.Parameter(torch.randn(classes, generator=chance))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


def case(classes, norm):
    """(model, x, y, needed, threat): needed is the distance to each class's boundary, (N, K), infinite at y."""
    model = Plain(classes)
    x = torch.randn(N, 1, 4, 4, generator=torch.Generator().manual_seed(classes + 9))
    with torch.no_grad():
        z = model(x)
        y = z.argmax(1)
        slope = (model.weight[y][:, None] - model.weight[None]).norm(p=DUAL[norm], dim=2)
        needed = ((z.gather(1, y[:, None]) - z) / slope).scatter(1, y[:, None], math.inf)
    radii = needed.amin(1).sort().values[N // 2 : 3 * N // 4]
    widest = int((radii[1:] - radii[:-1]).argmax())
    return model, x, y, needed, Threat(norm, float(radii[widest] + radii[widest + 1]) / 2, **FAR)


def strike(name, model, x, y, threat, score, **kept):
    settings = {**FEW.get(name, {"steps": 40}), **kept}
    x_adv = ATTACKS[name].attack(model, x, y, threat, score=score, noise=Noise(0, torch.arange(N)), **settings)
    assert (threat.violation(x_adv, x) == 0).all()
    with torch.no_grad():
        return fooled(model(x_adv), y)


def reach(name, norm):
    return REACH.get(f"{name}-{norm}", REACH.get(name, 1.001))


@pytest.mark.parametrize(("name", "norm"), TABLE)
@pytest.mark.parametrize("classes", [2, 3])
def test_what_is_breakable_falls(name, norm, classes):
    model, x, y, needed, threat = case(classes, norm)
    broken = strike(name, model, x, y, threat, negative_log_odds)
    assert not broken[needed.amin(1) > threat.eps * (1 + 1e-5)].any(), "broke what cannot be broken"
    if name in TOWARDS_ONE and classes > 2:
        needed = needed.masked_fill(needed != needed.gather(1, model(x).argmin(1)[:, None]), math.inf)
    due = needed.amin(1) * reach(name, norm) < threat.eps
    assert broken[due].all()
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
        now = strike(name, model, x, y, threat, dlr, target=target)
        broken |= now
    due = needed.amin(1) * reach(name, norm) < threat.eps
    assert broken[due].all()
    assert name == "jsma" or due.any()
    assert not broken[needed.amin(1) > threat.eps * (1 + 1e-5)].any()
