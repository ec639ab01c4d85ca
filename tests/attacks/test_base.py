"""What every attack shares: what counts as fooled, and the most adversarial point seen for each sample."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.attacks import ATTACKS, MostAdversarial, fooled
from holdfast.errors import UserError
from holdfast.losses import dlr, negative_log_odds, negative_margin, targeted
from holdfast.noise import Noise
from holdfast.threat import Threat

TAKE_TARGETS = sorted(name for name, entry in ATTACKS.items() if "target" in inspect.signature(entry.attack).parameters)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fooled_wants_finite_logits(bad):
    z = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 5.0], [bad, 0.0, 0.0], [3.0, 1.0, bad]])
    assert fooled(z, torch.zeros(4, dtype=torch.int64)).tolist() == [True, False, False, False]


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=6), st.data())
def test_the_worst_point_is_a_maximum_over_all_that_was_seen(points, pick):
    """Against a literal search, whatever the order and whichever rows see a point; NaN and infinity included."""
    y = torch.tensor([0, 1, 0])
    x = torch.zeros(3, 1)
    worst, seen = MostAdversarial(x, y), [[] for _ in range(3)]
    for number, values in enumerate(points):
        z = torch.tensor([[v, -v] for v in values])
        broken = pick.draw(st.lists(st.sampled_from([0.0, math.nan, math.inf]), min_size=3, max_size=3))
        z[:, 0] += torch.tensor(broken)
        rows = torch.tensor(sorted(pick.draw(st.sets(st.integers(0, 2), min_size=1))))
        survives = worst.update(rows, torch.full((len(rows), 1), number + 1.0), z[rows])
        for k, row in enumerate(rows.tolist()):
            seen[row].append((bool(fooled(z[row : row + 1], y[row : row + 1])), float(number + 1)))
            assert bool(survives[k]) == (not any(f for f, _ in seen[row]))
    for row in range(3):
        hits = [number for f, number in seen[row] if f]
        assert not hits or float(worst.x[row]) in hits
        assert bool(worst.fooled[row]) == bool(hits)


@pytest.mark.parametrize("name", TAKE_TARGETS)
@pytest.mark.parametrize("score", [negative_margin, dlr, negative_log_odds])
def test_a_targeted_score_may_be_given_with_its_targets(name, score):
    """``target=`` makes a score targeted; one that is targeted already stays as it is."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 4, generator=generator)

    def model(x):
        return x.flatten(1) @ weight

    x = torch.rand(5, 1, 4, 4, generator=generator)
    y = model(x).argmax(1)
    settings = {"noise": Noise(0, torch.arange(5)), "target": (y + 1) % 4, "steps": 3}
    threat = Threat("linf", 0.2)
    found = ATTACKS[name].attack(model, x, y, threat, score=targeted(score), **settings)
    assert torch.equal(found, ATTACKS[name].attack(model, x, y, threat, score=score, **settings))


@pytest.mark.parametrize("name", TAKE_TARGETS)
def test_a_targeted_score_without_targets_is_an_error_that_says_so(name):
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    arguments = {"noise": Noise(0, torch.arange(2)), "steps": 2}
    for score in (targeted(negative_margin), targeted(dlr)):
        with pytest.raises(UserError, match="target="):
            ATTACKS[name].attack(lambda x: x.flatten(1), x, y, Threat("linf", 0.1), score=score, **arguments)
    with pytest.raises(UserError, match="target="):
        ATTACKS[name].attack(
            lambda x: x.flatten(1), x, (y, 1 - y), Threat("linf", 0.1), score=targeted(negative_margin), **arguments
        )


# -- a model that was not made for attacks


WEIGHT = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def plain(x):
    return (0.9 * x).flatten(1) @ WEIGHT


def in_place(x):
    return x.mul_(0.9).flatten(1) @ WEIGHT


def in_place_without_a_graph(x):
    with torch.no_grad():
        x.mul_(0.9)
    return x.flatten(1) @ WEIGHT


def float64_inside(x):
    return (0.9 * x).flatten(1) @ WEIGHT.double()


def run(name, model, **settings):
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y, before = plain(x).argmax(1), x.clone()
    settings = {"score": negative_margin, "noise": Noise(0, torch.arange(5)), **settings}
    if "steps" in inspect.signature(ATTACKS[name].attack).parameters:
        settings["steps"] = 3
    made = ATTACKS[name].attack(model, x, y, Threat("linf", 0.2), **settings)
    assert torch.equal(x, before)
    return made


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_model_that_edits_its_input_is_attacked_on_copies(name):
    expected = run(name, plain)
    assert torch.equal(run(name, in_place), expected)
    assert run(name, in_place_without_a_graph).shape == expected.shape  # its gradient lacks the factor 0.9


@pytest.mark.filterwarnings("ignore:the network is torch.float64")
@pytest.mark.parametrize("name", ["pgd", "fmn", "square"])
def test_a_model_of_another_type_is_attacked_in_its_own(name):
    assert torch.allclose(run(name, float64_inside), run(name, plain), atol=1e-4)


def test_a_backward_pass_that_fails_ends_in_a_sentence():
    def saved_then_edited(x):
        squared = x * x
        x.mul_(2)  # autograd kept x for the product
        return squared.flatten(1) @ WEIGHT

    for name in ("pgd", "fab"):
        with pytest.raises(UserError, match=r"no gradient with respect to the images: RuntimeError.*square, rays"):
            run(name, saved_then_edited)
    run("square", saved_then_edited)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.zeros(2, 1, 2, 2).to_sparse(), "x is a sparse tensor"),
        (torch.zeros(2, 1, 2, 2, device="meta"), "x is a tensor on the device meta"),
        (torch.zeros(2, 1, 2, 2).to(torch.float8_e5m2), "x is torch.float8_e5m2"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.complex64), "x is torch.complex64"),
    ],
)
def test_images_that_no_arithmetic_works_on(x, why):
    y, settings = torch.zeros(2, dtype=torch.int64), {"score": negative_margin, "noise": Noise(0, torch.arange(2))}
    with pytest.raises(UserError, match=why):
        ATTACKS["pgd"].attack(plain, x, y, Threat("linf", 0.1), **settings)
