"""The 8-bit grid: candidates are judged there too, and a model that answers otherwise there is attacked there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluation.helpers import LinearModel
from torch import nn

from holdfast.data import Data, pixels
from holdfast.evaluation import differs_off_grid, evaluate, is_8bit
from holdfast.evaluation.grid import to_grid
from holdfast.evaluation.suites import Stage, on_grid_too
from holdfast.noise import Noise
from holdfast.threat import Threat

pytestmark = pytest.mark.usefixtures("unproved")

THREAT, LEVELS = Threat("linf", 2.5 / 255), 2  # no multiple of a level: of two and a half, two can be used


def images(n=64, seed=1):
    """Grey 8-bit images far from the edges of the box, uint8."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(90, 160, (n, 1, 5, 6), generator=chance, dtype=torch.uint8)


def samples(model, n=64):
    x = pixels(images(n))
    with torch.no_grad():
        return Data(x, model(x).argmax(1), torch.arange(n))


class Planted(nn.Module):
    """Honest on the 8-bit grid; off it the label of the nearest image wins by far, with the honest gradient."""

    def __init__(self, honest, data):
        super().__init__()
        self.honest, self.x, self.y = honest, data.x, data.y

    def forward(self, x):
        z = self.honest(x)
        level = x.detach() * 255
        off = ((level - level.round()).abs() > 1e-3).flatten(1).any(1)
        label = self.y[torch.cdist(x.detach().flatten(1), self.x.flatten(1)).argmin(1)]
        return z + 100 * off[:, None] * nn.functional.one_hot(label, z.shape[1])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@given(seed=st.integers(0, 1000), eps=st.floats(0.2, 30.0))
@settings(max_examples=30, deadline=None)
def test_rounded_points_lie_on_the_grid_and_in_the_threat(norm, seed, eps):
    chance = torch.Generator().manual_seed(seed)
    x = pixels(torch.randint(0, 256, (4, 1, 3, 3), generator=chance, dtype=torch.uint8))
    threat = Threat(norm, eps / 255)
    for noise in (Noise(seed, torch.arange(4)), Noise(seed, torch.arange(4)).fold(1)):
        x_adv = threat.random_start(x, noise)
        rounded = to_grid(x_adv, x, threat)
        levels = (rounded * 255).round().to(torch.uint8)
        assert torch.equal(pixels(levels), rounded), "as pixels() would read it from a file"
        assert (threat.violation(rounded, x) == 0).all()
        assert ((rounded - x_adv).abs() <= 1.001 / 255).all()
        assert torch.equal(to_grid(rounded, x, threat), rounded)


def test_a_whole_number_of_levels_is_used_up():
    x = pixels(images(8))
    for number in (1, 4, 8):
        threat = Threat("linf", number / 255)
        corner = threat.project(x + 1, x)
        assert torch.equal((to_grid(corner, x, threat) * 255).round(), (x * 255).round() + number)


@pytest.mark.parametrize(
    ("x", "threat", "answer"),
    [
        (images(3), THREAT, True),
        (pixels(images(3)), THREAT, True),
        (pixels(images(3)) + 0.3 / 255, THREAT, False),
        (pixels(images(3)), Threat("linf", 0.1, -1.0, 1.0), False),
    ],
)
def test_which_images_are_8_bit(x, threat, answer):
    assert is_8bit(Data(x, torch.zeros(3, dtype=torch.int64), torch.arange(3)), threat) is answer


@pytest.mark.parametrize("suite", ["quick", "standard"])
def test_a_network_that_answers_otherwise_off_the_grid_is_broken_on_it(suite):
    honest = LinearModel(scale=2.0)
    data = samples(honest)
    model = Planted(honest, data)
    truth = honest.robust(data, LEVELS / 255)
    assert 0.1 < truth.float().mean() < 0.9
    found = evaluate(model, data, THREAT, suite)
    assert not (truth & ~found.robust).any()
    assert (found.robust & ~truth).sum() <= (1 if suite == "quick" else 0)
    assert found.pgd50.all(), "PGD-50 alone counts its own candidates"
    broken = ~found.robust
    levels = (found.x_adv[broken] * 255).round()
    assert torch.allclose(levels / 255, found.x_adv[broken], rtol=0, atol=1e-6)
    assert (THREAT.violation(found.x_adv, data.x) == 0).all()
    assert (model(found.x_adv).argmax(1) != data.y)[broken].all()


def test_a_gradient_that_is_right_on_the_grid_alone_is_followed_there():
    """Off the grid the logits are a decoy whose gradient leads away: rounding its candidates finds little."""
    honest = LinearModel(scale=2.0)
    data = samples(honest)

    def model(x):
        level = x.detach() * 255
        off = ((level - level.round()).abs() > 1e-3).flatten(1).any(1)
        z = honest(x)
        right = data.y[torch.cdist(x.detach().flatten(1), data.x.flatten(1)).argmin(1)]
        return torch.where(off[:, None], 100 * nn.functional.one_hot(right, 10) - z, z)

    found = evaluate(model, data, THREAT, "standard")
    truth = honest.robust(data, LEVELS / 255)
    assert torch.equal(found.robust, truth)
    assert any(stage.name.startswith("grid: ") and stage.broken for stage in found.stages)


def test_an_honest_network_has_no_more_stages_and_the_same_answers():
    honest = LinearModel(scale=2.0)
    data = samples(honest)
    found = evaluate(honest, data, THREAT, "quick")
    assert not any(stage.name.startswith("grid: ") for stage in found.stages)
    assert torch.equal(found.robust, honest.robust(data, THREAT.eps))
    assert not differs_off_grid(honest, data, THREAT, Noise(0, data.index)).any()
    assert differs_off_grid(Planted(honest, data), data, THREAT, Noise(0, data.index)).all()


def test_a_smooth_model_does_not_differ_off_the_grid_where_its_logits_follow_one_direction():
    """Two random points beside the grid agree by chance where the direction has its extremum: 7% of these samples."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2000, 1, 4, 4), generator=chance, dtype=torch.uint8)
    direction = 100 * torch.randn(16, generator=chance)

    def model(x):
        z = (x.flatten(1) - 0.5) @ direction
        return torch.stack([z.sin(), -z.sin()], 1)

    data = Data(x, torch.zeros(2000, dtype=torch.long), torch.arange(2000))
    assert differs_off_grid(model, data, THREAT, Noise(0, data.index)).float().mean() < 0.005


def test_no_point_off_the_grid_is_judged_where_images_are_not_8_bit():
    honest = LinearModel()
    beside, on = honest.data(20), samples(honest, 20)
    for data, judgements in ((beside, 1), (on, 2)):
        stages = (Stage("short", "apgd", settings={"steps": 3}), Stage("long", "apgd", settings={"steps": 20}))
        found = evaluate(honest, data, Threat("linf", 2.5e-5), stages)
        assert found.robust.all()
        assert found.stages[2].forwards == 20 * (4 + 1)  # a start, three steps, a judgement
        assert found.stages[3].forwards == 20 * (21 + judgements)


def test_individual_stages_run_once():
    stages = (Stage("a", "pgd", individual=True), Stage("b", "apgd"))
    assert [(stage.name, stage.on_grid) for stage in on_grid_too(stages)] == [
        ("a", False),
        ("b", False),
        ("grid: b", True),
    ]
