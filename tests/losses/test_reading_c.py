"""Reading C: its least values, what its head leaves as it is, and what it has to do with reading A."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from holdfast.attacks import matched_score
from holdfast.errors import UserError
from holdfast.losses import (
    as_loss,
    isce_c,
    negative_log_odds,
    negative_margin,
    reading_c_logits,
    sce,
    score_of,
    softplus,
)

K = 10


def at(t):
    """(1, 10) logits of unit norm with t at class 0; the rest is spread evenly."""
    rest = -math.sqrt((1 - t * t) / (K - 1))
    return torch.tensor([[t] + [rest] * (K - 1)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("m", "clip", "least", "where", "p"),
    [(0.0, True, 1.420, 0.949, 0.242), (0.1, True, 1.3515, 0.900, 0.259), (0.1, False, 1.345, 0.949, 0.2605)],
)
def test_the_least_loss(m, clip, least, where, p):
    ts = [i / 1000 for i in range(1, 1001)]
    losses = [float(isce_c(at(t), torch.tensor([0]), m=m, clip=clip)) for t in ts]
    assert min(losses) == pytest.approx(least, abs=5e-4)
    assert ts[losses.index(min(losses))] == pytest.approx(where, abs=1e-3)
    assert math.exp(-min(losses)) == pytest.approx(p, abs=5e-4)
    z = torch.randn(500, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (isce_c(z, z.argmax(1), m=m, clip=clip) >= min(losses) - 1e-9).all()  # whatever the others are


@pytest.mark.parametrize("m", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("clip", [True, False])
def test_the_head_changes_no_decision(m, clip):
    z = 30 * torch.randn(2000, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z[:100] -= 100  # all logits negative
    assert torch.equal(reading_c_logits(z, z.argmax(1), m=m, clip=clip).argmax(1), z.argmax(1))


def test_for_right_samples_it_is_reading_a_with_a_negative_s_on_logits_of_unit_norm():
    z = torch.randn(200, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = z.argmax(1)
    u = negative_log_odds(F.normalize(z, dim=1), y)
    torch.testing.assert_close(isce_c(z, y, m=0.3, clip=False), softplus(u - 0.3))
    wrong = (y + 1) % K
    assert (isce_c(z, wrong, m=0.3, clip=False) > sce(F.normalize(z, dim=1), wrong)).all()  # the winner is raised
    torch.testing.assert_close(isce_c(z, wrong, m=0.3, clip=False, mask="true"),
                               softplus(negative_log_odds(F.normalize(z, dim=1), wrong) - 0.3))  # fmt: skip


def test_beyond_the_clip_no_gradient_goes_through_the_winner():
    z = at(0.95).requires_grad_()
    out = reading_c_logits(z, torch.tensor([0]))
    assert out[0, 0] == 1
    (grad,) = torch.autograd.grad(out[0, 0], z)
    assert (grad == 0).all()


def test_attacks_climb_the_margin_of_the_raw_logits():
    """The head bounds the loss and hides the length of z; the score sees neither."""
    loss = partial(isce_c, m=0.1)
    assert score_of(loss) is negative_margin
    assert matched_score(loss) is negative_margin
    z, y = at(0.5), torch.tensor([0])
    assert isce_c(100 * z, y) == pytest.approx(float(isce_c(z, y)))
    assert negative_margin(100 * z, y) == pytest.approx(100 * float(negative_margin(z, y)))


def test_the_mask_of_a_spec():
    z, y = at(0.5), torch.tensor([3])
    assert as_loss("isce_c:mask=true")(z, y) == isce_c(z, y, mask="true") != isce_c(z, y)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"m": -0.1}, "m must be"), ({"m": math.nan}, "m must be"), ({"s": 0.0}, "s must be"),
     ({"mask": "label"}, "unknown mask 'label'"), ({"clip": 1}, "clip must be True or False")],
)  # fmt: skip
def test_settings_are_checked(settings, said):
    with pytest.raises(UserError, match=said):
        isce_c(at(0.5), torch.tensor([0]), **settings)
