"""Losses in the place of nn.CrossEntropyLoss: at s = 0 the same numbers, in every case that it knows."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast import losses
from holdfast.errors import UserError
from holdfast.losses import (
    ArcFaceLoss,
    CenterLoss,
    ContrastiveLoss,
    CosFaceLoss,
    ISCEBLoss,
    ISCECLoss,
    ISCELoss,
    LGMLoss,
    MMCLoss,
    TripletLoss,
)

D, K, N = 8, 5, 12
ON_LOGITS = {
    "isce": (ISCELoss(s=2.0), lambda out, y: losses.isce(out, y, s=2.0)),
    "isce focal": (ISCELoss(2.0, gamma=3.0), lambda out, y: losses.isce(out, y, s=2.0, gamma=3.0)),
    "isce by class": (
        ISCELoss(torch.arange(5.0)),
        lambda out, y: losses.isce(out, y, s=torch.arange(5.0, dtype=out.dtype)),
    ),
    "isce_b": (ISCEBLoss(tau=1.0), lambda out, y: losses.isce_b(out, y, tau=1.0)),
    "isce_b without mass": (ISCEBLoss(tau=-float("inf")), losses.sce),
    "isce_c": (ISCECLoss(), losses.isce_c),
    "isce_c true": (ISCECLoss(0.2, mask="true"), lambda out, y: losses.isce_c(out, y, m=0.2, mask="true")),
}
ON_FEATURES = {
    "cosface": (CosFaceLoss(D, K, m=0.2, scale=15.0), lambda out, y: losses.cosface(out, y, m=0.2, scale=15.0)),
    "arcface": (ArcFaceLoss(D, K, scale=16.0), lambda out, y: losses.arcface(out, y, scale=16.0)),
    "center": (CenterLoss(D, K, center_weight=0.3), lambda out, y: losses.center(out, y, weight=0.3)),
    "lgm": (
        LGMLoss(D, K, likelihood_weight=0.2, variances=True),
        lambda out, y: losses.lgm(out, y, weight=0.2),
    ),
    "mmc": (MMCLoss(D, K), losses.mmc),
    "contrastive": (ContrastiveLoss(D, K, pair_weight=0.5), lambda out, y: losses.contrastive(out, y, weight=0.5)),
    "triplet": (TripletLoss(D, K, separation=0.5), lambda out, y: losses.triplet(out, y, separation=0.5)),
}


def same(ours, theirs, z, target, **tolerance):
    """Values and gradients of both are equal."""
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    a, b = ours(one, target), theirs(two, target)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
    if a.isfinite().all():
        (ga,), (gb,) = torch.autograd.grad(a.sum(), one), torch.autograd.grad(b.sum(), two)
        torch.testing.assert_close(ga, gb, **tolerance)


@settings(max_examples=150, deadline=None)
@given(
    places=st.sampled_from([(), (1,), (7,), (3, 4), (2, 3, 2)]),
    soft=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    ignore=st.sampled_from([-100, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    classes=st.sampled_from([2, 5]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 10_000),
)
def test_at_s_0_it_is_cross_entropy(places, soft, weighted, reduction, smoothing, ignore, dtype, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (places[0], classes, *places[1:]) if places else (classes,)
    z = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64).to(dtype) + 0.1 if weighted else None
    if soft:
        ignore = -100
        target = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(1 if places else 0).to(dtype)
    else:
        target = torch.randint(classes, places, generator=generator)
        target = torch.where(torch.rand(places, generator=generator) < 0.3, ignore, target)
    common = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore}
    close = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 4e-2}[dtype]
    tolerance = {"rtol": close, "atol": close * max(1.0, scale) / (100 if dtype == torch.bfloat16 else 1)}
    if dtype == torch.bfloat16:
        tolerance["atol"] = 2e-2 * max(1.0, scale)
    same(ISCELoss(0.0, **common), nn.CrossEntropyLoss(**common), z, target, **tolerance)


def test_values_and_gradients_are_equal_to_1e_6_in_float32():
    z = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    for soft, smoothing, reduction in itertools.product((False, True), (0.0, 0.1), ("mean", "sum", "none")):
        target = z.roll(1, 0).softmax(1) if soft else z.roll(1, 0).argmax(1)
        common = {"label_smoothing": smoothing, "reduction": reduction}
        same(ISCELoss(0.0, **common), nn.CrossEntropyLoss(**common), z, target, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_FEATURES])
def test_each_module_is_the_mean_of_its_loss(name):
    module, loss = {**ON_LOGITS, **ON_FEATURES}[name]
    module = copy.deepcopy(module).double()
    x = torch.randn(N, K if name in ON_LOGITS else D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(N) % K
    out = x if module.head is None else module.head(x)
    torch.testing.assert_close(module(x, y), loss(out, y).mean())
    module.reduction = "none"
    torch.testing.assert_close(module(x, y), loss(out, y))
    if not module.coupled:
        torch.testing.assert_close(module(x, nn.functional.one_hot(y, K).double()), loss(out, y))
        half = (loss(out, y) + loss(out, (y + 1) % K)) / 2
        mixed = (nn.functional.one_hot(y, K) + nn.functional.one_hot((y + 1) % K, K)).double() / 2
        torch.testing.assert_close(module(x, mixed), half)
    with torch.no_grad():
        score = module.score(out, y)
    assert score.shape == (N,)


@pytest.mark.parametrize("name", ["contrastive", "triplet"])
def test_an_ignored_sample_is_in_no_pair(name):
    module, loss = ON_FEATURES[name]
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(3))
    y = torch.arange(N) % K
    masked = torch.where(torch.arange(N) < 4, -100, y)
    torch.testing.assert_close(module(x, masked), loss(module.head(x[4:]), y[4:]).mean())
    with pytest.raises(UserError, match="class indices"):
        module(x, torch.full((N, K), 1 / K))


def test_what_is_ignored_may_be_nan():
    z = torch.randn(4, K)
    z[1] = torch.nan
    z.requires_grad_()
    y = torch.tensor([0, -100, 2, 3])
    loss = ISCELoss(3.0)(z, y)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert not z.grad[1].any()


@pytest.mark.parametrize("name", list(ON_FEATURES))
def test_a_head_trains_with_its_loss_and_is_saved_with_it(name):
    torch.manual_seed(0)
    module = copy.deepcopy(ON_FEATURES[name][0])
    x = torch.randn(N, D)
    y = torch.arange(N) % K
    encoder = nn.Linear(D, D)
    optimizer = torch.optim.Adam([*encoder.parameters(), *module.parameters()], lr=0.03)
    first = module(encoder(x), y)
    for _ in range(30):
        optimizer.zero_grad()
        loss = module(encoder(x), y)
        loss.backward()
        optimizer.step()
    assert loss < first
    other = copy.deepcopy(ON_FEATURES[name][0])
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(encoder(x), y), module(encoder(x), y))


def test_under_autocast_it_computes_in_float32():
    layer = nn.Linear(6, K)
    x, y = torch.randn(9, 6), torch.arange(9) % K
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
        assert z.dtype == torch.bfloat16
        ours, theirs = ISCELoss(0.0)(z, y), nn.CrossEntropyLoss()(z, y)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["isce", "isce focal", "isce_b", "isce_c"])
def test_it_compiles_without_a_break(name, soft):
    module = ON_LOGITS[name][0]
    z, y = torch.randn(9, K), torch.arange(9) % K
    target = nn.functional.one_hot(y, K).float() * 0.8 + 0.04 if soft else y
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    same(compiled, module, z, target, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ISCELoss(s=-1.0), "s, the inference information"),
        (lambda: ISCELoss(gamma=-1.0), "gamma"),
        (lambda: ISCELoss(reduction="men"), "mean"),
        (lambda: ISCELoss(label_smoothing=1.0), "label_smoothing"),
        (lambda: ISCELoss(weight=[1.0, 2.0]), "weight"),
        (lambda: ISCELoss(ignore_index=0.5), "ignore_index"),
        (lambda: ISCECLoss(mask="best"), "mask"),
        (lambda: CosFaceLoss(D, K, scale=0.0), "scale"),
        (lambda: TripletLoss(D, K, label_smoothing=0.1), "label smoothing"),
        (lambda: CenterLoss(D, K, center_weight=-1.0), "weight"),
        (lambda: LGMLoss(D, K, ratio=-1.0), "ratio"),
        (lambda: MMCLoss(D, 1), "classes"),
        (lambda: ISCELoss()(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64)), "belong together"),
        (lambda: ISCELoss()(torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.int64)), "belong together"),
        (lambda: ISCELoss()(torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.int64)), "belong together"),
        (lambda: ISCELoss()(torch.zeros(4, 3), torch.zeros(4, 2)), "probabilities of 2 classes"),
        (lambda: ISCELoss()(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)), "belong"),
        (lambda: ISCELoss()(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)), "at least 2 classes"),
        (lambda: ISCELoss(ignore_index=1)(torch.zeros(4, 3), torch.zeros(4, 3)), "ignore_index"),
        (lambda: ISCELoss()([1.0], torch.zeros(4)), "tensors"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message):
    with pytest.raises(UserError, match=message):
        make()
