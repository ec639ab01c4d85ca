"""The audit and the region's measures work in batches, so that large images fit in memory."""

import pytest
import torch
from torch import nn

from holdfast import evaluate, region
from holdfast.attacks import ATTACKS, AttackEntry
from holdfast.checks import Probe, audit
from holdfast.checks.strength import _towards_each
from holdfast.data import Data
from holdfast.losses import negative_margin
from holdfast.noise import AuditStream
from holdfast.queries import default_batch_size
from holdfast.threat import Threat


class Recording(nn.Module):
    """Two classes by the mean of the image; it and its copies remember how many images they were given at once."""

    most = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 64)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) / 100)
            self.conv.bias.copy_(torch.tensor([-61.44, 61.44]))

    def forward(self, x):
        Recording.most = max(Recording.most, len(x))
        return self.conv(x).flatten(1)


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_no_check_and_no_measure_passes_more_images_at_once_than_a_batch(shift, unproved):
    """So that large images fit in memory, whatever the number of samples that a check looks at; shift: some survive."""
    torch.manual_seed(0)
    y = torch.arange(2).repeat(40)
    middle = 0.495 + torch.where(y == 0, 0.005 + shift, -0.005 - shift)
    x = middle.view(-1, 1, 1, 1) + 0.01 * torch.rand(80, 3, 64, 64)
    data, model, Recording.most = Data(x, y, torch.arange(80)), Recording(), 0
    assert default_batch_size(x) == 16
    evaluation = evaluate(model, data, "linf:0.01", "quick")
    assert bool(evaluation.robust.any()) == bool(shift)
    audited = audit(model, data, evaluation, transfer_source=x + 0.001)
    assert sum(finding.status != "not run" for finding in audited.findings) > 20
    region.measure(model, x, y, evaluation.x_adv, evaluation.threat)
    assert Recording.most == 16


@pytest.fixture
def surviving(monkeypatch, unproved):
    """A probe of six samples that no attack has broken, and an attack that records its calls.

    Of each sample, class 2 is the likeliest wrong class, then 1, then 3, whatever the image. Where the pixel is above
    0.6, it is the prediction.
    """
    calls = []

    def model(x):
        p = x.flatten(1)[:, :1]
        return torch.cat([torch.full_like(p, 5.0), torch.full_like(p, 1.0), 10 * (p - 0.1), torch.zeros_like(p)], 1)

    def jump(model, x, y, threat, *, score, noise, target, steps, up):
        calls.append((target.tolist(), noise.uniform(()).tolist()))
        return (x + torch.where(up(target), 0.1, 0.0).view(-1, 1, 1, 1)).clamp(0, 1)

    x, y = torch.full((6, 1, 1, 1), 0.55), torch.zeros(6, dtype=torch.int64)
    data = Data(x, y, torch.arange(6))
    found = evaluate(model, data, Threat("linf", 0.1), (), pgd50=0)
    probe = Probe(model, data, found, None, 0, 64, None)
    assert len(probe.survivors) == 6

    def towards(up, targets=3):
        monkeypatch.setitem(ATTACKS, "jump", AttackEntry(lambda *a, **k: jump(*a, **k, up=up), "a test"))
        stream = AuditStream.MARGIN_DECOMPOSITION
        return _towards_each(probe, "jump", probe.survivors, negative_margin, stream, targets, steps=1)

    return probe, calls, towards


def test_where_the_first_target_breaks_all_there_is_no_second(surviving):
    _, calls, towards = surviving
    assert towards(lambda target: target == 2).all()
    assert [targets for targets, _ in calls] == [[2] * 6]


def test_further_targets_share_a_batch_with_noise_of_their_own(surviving):
    _, calls, towards = surviving
    assert not towards(lambda target: target < 0).any()
    assert [targets for targets, _ in calls] == [[2] * 6, [1] * 6 + [3] * 6]
    drawn = [number for _, numbers in calls for number in numbers]
    assert len(set(drawn)) == 18


def test_a_sample_that_two_targets_break_is_one_witness(surviving):
    probe, _, towards = surviving
    assert towards(lambda target: target != 2).all()
    assert sorted(row for one in probe.witnesses for row in one.rows.tolist()) == list(range(6))
