"""On a small trained network every attack breaks about what FGSM breaks, and minimum-norm attacks break everything.

``digits`` is that of tests/conftest.py: a tiny network and 40 digits that it gets right.
"""

from __future__ import annotations

import pytest
from tests.helpers import noise_of, run_attack

from holdfast.attacks import ATTACKS, distances, fgsm, fooled
from holdfast.losses import negative_log_odds
from holdfast.threat import Threat

EPS = {"linf": 0.1, "l2": 0.5, "l1": 2.0}
FEW = {
    "fab": {"steps": 10, "targets": 3}, "deepfool": {"steps": 10}, "spsa": {"steps": 15, "pairs": 24, "chunk": 24},
    "jsma": {"steps": 40}, "md": {"steps": 20},
}  # fmt: skip
# How many fewer samples than FGSM it may break: the penalty of lbfgs is the l2 norm's, jsma moves few pixels, spsa
# estimates its gradient, and the least likely class is the farthest.
SLACK = {
    "fmn": {"linf": 2}, "cw": {"linf": 1}, "lbfgs": {"linf": 16, "l1": 12}, "spsa": {"linf": 6, "l2": 1},
    "jsma": {"linf": 10, "l2": 17, "l1": 11}, "least_likely": {"linf": 11, "l2": 8, "l1": 8},
}  # fmt: skip
NAMES = ("deepfool", "cw", "lbfgs", "fmn", "fab", "jsma", "spsa", "md", "least_likely")


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name in NAMES for norm in ATTACKS[name].norms])
def test_it_breaks_what_fgsm_breaks(digits, name, norm):
    net, x, y = digits
    threat = Threat(norm, EPS[norm])
    by_fgsm = int(fooled(net(fgsm(net, x, y, threat, score=negative_log_odds, noise=noise_of(40))), y).sum())
    assert 5 < by_fgsm < 36, "this case shows nothing"
    x_adv = run_attack(name, net, x, y, threat, score=negative_log_odds, **FEW.get(name, {}))
    assert (threat.violation(x_adv, x) == 0).all()
    assert int(fooled(net(x_adv), y).sum()) >= by_fgsm - SLACK.get(name, {}).get(norm, 0) > 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_with_room_enough_every_digit_falls(digits, norm):
    net, x, y = digits
    threat = Threat(norm, {"linf": 1.0, "l2": 8.0, "l1": 64.0}[norm])
    found = {}
    for name, few in {"deepfool": {"steps": 20}, "fmn": {}, "fab": {"steps": 10, "targets": 3}}.items():
        x_adv = run_attack(name, net, x, y, threat, **few)
        assert fooled(net(x_adv), y).all(), name
        found[name] = distances(x_adv, x, norm)
    assert found["fmn"].mean() < 1.1 * found["deepfool"].mean()
    assert found["fab"].mean() < 1.02 * found["deepfool"].mean()
