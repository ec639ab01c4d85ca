"""Heads: logits and distances against literal loops, gradients, golden centers, what they refuse."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.errors import UserError
from holdfast.losses import LOSSES
from holdfast.losses import heads as loss_heads
from holdfast.models.heads import (
    HEADS,
    Centers,
    Cosine,
    GaussianMixture,
    Linear,
    MaxMahalanobis,
    Orthogonal,
    max_mahalanobis_centers,
    squared_distances,
)
from holdfast.outputs import Outputs

# The same contract for the settings that take other paths.
TABLE = [(name, {}) for name in HEADS] + [
    ("gaussian", {"variances": True}),
    ("cosine", {"scale": 7.0}),
    ("mmc", {"radius": 2.0}),
]
every = pytest.mark.parametrize(("name", "few"), TABLE, ids=[f"{n}-{k}" if k else n for n, k in TABLE])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name, few, features=6, classes=4, seed=0):
    """A head in float64 with every parameter away from its first value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = HEADS[name](features, classes, **few).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64)
    return head


def features(n, d=6, seed=1):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def dot(a, b):
    return math.fsum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def apart(a, b, weights=None):
    weights = [1.0] * len(a) if weights is None else weights
    return math.fsum(float(w) * (float(p) - float(q)) ** 2 for p, q, w in zip(a, b, weights, strict=True))


def literal(head, h):
    """(logits, distances, features) in plain Python loops, by each head's own formula."""
    rows = []
    for row in h:
        if isinstance(head, (Linear, Centers)):
            w, b = head.linear.weight, head.linear.bias
            z = [dot(w[k], row) + float(b[k]) for k in range(len(w))]
            d = [apart(row, c) for c in head.centers] if isinstance(head, Centers) else None
        elif isinstance(head, Cosine):
            size = math.sqrt(dot(row, row))
            z = [head.scale * dot(w, row) / size / math.sqrt(dot(w, w)) for w in head.weight]
            d = None
        elif isinstance(head, Orthogonal):
            z = [head.scale * dot(w, row) for w in head.linear.weight]
            d = None
        elif isinstance(head, MaxMahalanobis):
            row = torch.tensor(
                [dot(w, row) + float(b) for w, b in zip(head.embed.weight, head.embed.bias, strict=True)]
            )
            d = [apart(row, c) for c in head.centers]
            z = [-value / 2 for value in d]
        elif isinstance(head, GaussianMixture):
            logs = head.log_variances if head.log_variances is not None else torch.zeros_like(head.centers)
            d = [apart(row, c, [math.exp(-v) for v in log]) for c, log in zip(head.centers, logs, strict=True)]
            z = [-value / 2 - math.fsum(log.tolist()) / 2 for value, log in zip(d, logs, strict=True)]
        else:
            raise AssertionError(f"{type(head).__name__} needs its formula here")
        rows.append((z, d, [float(v) for v in row]))
    return rows


@every
@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_shapes_of_what_comes_out(name, few, n):
    out = make(name, few)(features(n))
    assert isinstance(out, Outputs)
    assert out.logits.shape == (n, 4)
    assert out.features.shape == (n, 6)
    assert out.distances is None or out.distances.shape == (n, 4)
    assert all(t is None or t.dtype == torch.float64 for t in out)


@every
def test_logits_and_distances_are_the_formula(name, few):
    head, h = make(name, few), features(5)
    out = head(h)
    with torch.no_grad():
        rows = literal(head, h)
    for i, (z, d, seen) in enumerate(rows):
        assert out.logits[i].tolist() == pytest.approx(z, abs=1e-5 if name == "mmc" else 1e-9)
        assert out.features[i].tolist() == pytest.approx(seen, abs=1e-5 if name == "mmc" else 1e-12)
        assert (d is None) == (out.distances is None)
        if d is not None:
            assert out.distances[i].tolist() == pytest.approx(d, abs=1e-4 if name == "mmc" else 1e-9)
            assert (out.distances[i] >= 0).all()


@every
def test_gradients_are_right(name, few):
    head, h = make(name, few, features=4, classes=3), features(3, d=4).requires_grad_()
    parameters = list(head.parameters())

    def parts(h, *values):
        out = torch.func.functional_call(
            head, dict(zip([n for n, _ in head.named_parameters()], values, strict=True)), (h,)
        )
        return tuple(t for t in out if t is not None)

    assert torch.autograd.gradcheck(parts, (h, *parameters))


@every
def test_the_loss_that_names_a_head_gets_what_it_needs_from_it(name, few):
    head, h = make(name, few), features(6)
    y = torch.tensor([0, 0, 1, 1, 2, 3])
    for entry in LOSSES.values():
        if entry.head == name:
            loss = entry.loss(head(h), y)
            assert loss.shape == (6,)
            assert loss.isfinite().all()
            loss.sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@every
def test_a_feature_of_zeros_gives_numbers_and_gradients(name, few):
    h = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    out = make(name, few)(h)
    out.logits.sum().backward()
    assert out.logits.isfinite().all()
    assert h.grad.isfinite().all()


def test_every_loss_names_a_head_and_every_head_takes_features_and_classes():
    assert {entry.head for entry in LOSSES.values()} <= set(HEADS)
    for make_head in HEADS.values():
        assert isinstance(make_head(5, 3), nn.Module)


def test_only_the_centers_of_mmc_are_fixed():
    names = {name: {n for n, _ in make(name, few).named_parameters()} for name, few in TABLE if not few}
    assert names == {
        "linear": {"linear.weight", "linear.bias"},
        "cosine": {"weight"},
        "mmc": {"embed.weight", "embed.bias"},
        "center": {"linear.weight", "linear.bias", "centers"},
        "gaussian": {"centers"},
        "orthogonal": {"linear.free"},
    }
    assert "centers" in make("mmc", {}).state_dict()
    assert {n for n, _ in make("gaussian", {"variances": True}).named_parameters()} == {"centers", "log_variances"}


@settings(max_examples=30)
@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 7), st.floats(-3, 3), st.integers(0, 9))
def test_squared_distances_are_the_sum_of_squares(n, k, d, shift, seed):
    h = torch.randn(n, d, generator=generator(seed), dtype=torch.float64) + 10.0**shift
    c = torch.randn(k, d, generator=generator(seed + 1), dtype=torch.float64) + 10.0**shift
    found = squared_distances(h, c)
    assert found.shape == (n, k)
    assert (found >= 0).all()
    expected = (h[:, None] - c[None]).square().sum(2)
    size = float(h.square().sum(1).max() if n else 0) + float(c.square().sum(1).max())
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14 * size * d + 1e-12)


def test_a_feature_on_its_center_is_at_no_distance():
    c = max_mahalanobis_centers(10, 64)
    d = squared_distances(c, c)
    assert (d >= 0).all()
    assert d.diagonal().max() < 1e-3


# ------------------------------------------------------------------------------------------- max-Mahalanobis centers


def pairs(mu):
    return [(mu[i], mu[j]) for i, j in itertools.combinations(range(len(mu)), 2)]


def test_golden_centers():
    """Ten classes, radius 10: inner product -100/9, squared distance 2000/9."""
    mu = max_mahalanobis_centers(10, 512, 10.0)
    assert mu.shape == (10, 512)
    assert mu.dtype == torch.float32
    for a, b in pairs(mu.double()):
        assert float(a @ b) == pytest.approx(-11.1111, abs=1e-4)
        assert float((a - b).square().sum()) == pytest.approx(222.2222, abs=1e-4)


@settings(max_examples=30)
@given(st.integers(2, 24), st.integers(0, 8), st.floats(0.1, 50))
def test_centers_are_the_corners_of_a_simplex_from_k_minus_1_dimensions_on(classes, more, radius):
    mu = max_mahalanobis_centers(classes, classes - 1 + more, radius).double()
    assert mu.isfinite().all()
    assert mu.norm(dim=1).tolist() == pytest.approx([radius] * classes, rel=1e-6)
    for a, b in pairs(mu):
        assert float(a @ b) == pytest.approx(-(radius**2) / (classes - 1), rel=1e-5)
    assert mu.sum(0).abs().max() < 1e-5 * radius


def test_two_classes_are_opposite_on_a_line():
    assert max_mahalanobis_centers(2, 1, 3.0).tolist() == [[3.0], [-3.0]]
    assert max_mahalanobis_centers(2, 4, 3.0).tolist() == [[3.0, 0, 0, 0], [-3.0, 0, 0, 0]]


@pytest.mark.parametrize(("classes", "d"), [(20, 8), (5, 2)])
def test_too_few_dimensions_still_spread_the_centers(classes, d):
    """Better than the best of 200 random draws, and near what is possible."""

    def nearest(mu):
        return float((mu @ mu.T).masked_fill(torch.eye(len(mu), dtype=torch.bool), -math.inf).max())

    mu = max_mahalanobis_centers(classes, d, 2.0)
    assert mu.shape == (classes, d)
    assert mu.dtype == torch.float32
    assert mu.norm(dim=1).tolist() == pytest.approx([2.0] * classes, rel=1e-5)
    random = torch.nn.functional.normalize(torch.randn(200, classes, d, generator=generator()), dim=2)
    assert nearest(mu / 2) < min(nearest(draw) for draw in random) - 0.02
    if d == 2:  # a regular polygon
        assert nearest(mu / 2) == pytest.approx(math.cos(2 * math.pi / classes), abs=0.01)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_spreading_is_the_same_every_time_and_in_every_mode(monkeypatch, mode):
    """A network may be built where it is only evaluated: under no_grad."""
    monkeypatch.setattr(loss_heads, "_spread", partial(loss_heads._spread, rounds=20))
    state = torch.random.get_rng_state()
    first = max_mahalanobis_centers(6, 3)
    with mode():
        again = max_mahalanobis_centers(6, 3)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("classes", "d", "radius"),
    [(1, 4, 1.0), (0, 4, 1.0), (3, 1, 1.0), (3, 0, 1.0), (2, 0, 1.0), (4, 4, 0.0), (4, 4, -1.0)],
)
def test_centers_that_cannot_be(classes, d, radius):
    with pytest.raises(UserError, match=rf"classes >= 2.*radius > 0, got {classes}, {d}, {radius}"):
        max_mahalanobis_centers(classes, d, radius)


@pytest.mark.parametrize("radius", [math.nan, math.inf])
def test_a_radius_that_is_no_number(radius):
    with pytest.raises(UserError, match="radius"):
        max_mahalanobis_centers(4, 4, radius)


# ------------------------------------------------------------------------------------------------------------- cosine


@settings(max_examples=30)
@given(st.floats(0.1, 100), st.integers(0, 100), st.floats(-6, 6))
def test_cosine_logits_never_pass_the_scale_and_know_no_size(scale, seed, magnitude):
    head = Cosine(5, 4, scale=scale).double()
    h = features(6, d=5, seed=seed)
    z = head(h * 10.0**magnitude).logits
    assert (z.abs() <= scale * (1 + 1e-9)).all()
    assert torch.allclose(z, head(h).logits, rtol=1e-6, atol=1e-6 * scale)
    along = head(head.weight[:1].detach()).logits.detach()
    assert along[0, 0].item() == pytest.approx(scale)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_cannot_be(scale):
    with pytest.raises(UserError, match=r"scale.*> 0"):
        Cosine(5, 4, scale=scale)
