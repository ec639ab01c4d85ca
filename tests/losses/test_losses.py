"""Contracts over every entry of LOSSES, and what the SCE family and the scores promise beyond them."""

import inspect
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.losses import reference

from holdfast.errors import UserError
from holdfast.losses import (
    LOSSES,
    arcface,
    center,
    contrastive,
    cosface,
    dlr,
    isce,
    isce_b,
    lgm,
    mmc,
    negative_log_odds,
    negative_margin,
    sce,
    score_of,
    softplus,
    targeted,
    targeted_dlr,
    triplet,
)
from holdfast.outputs import Outputs, as_outputs, logits_of

N, K = 6, 5
FIELDS = ("logits", "features", "distances")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def labels(n, k, seed):
    """At least two samples of one class and two classes, so that no pair term is empty."""
    y = torch.randint(k, (n,), generator=generator(seed + 1))
    y[: min(n, 4)] = torch.tensor([0, 0, 1, 1])[: min(n, 4)]
    return y


# What each head returns. A new head needs a line here.
HEADS = {
    "linear": lambda n, k, r: (3 * r(n, k), r(n, 4), None),
    "cosine": lambda n, k, r: (15 * (2 * torch.sigmoid(2 * r(n, k)) - 1), r(n, 4), None),
    "center": lambda n, k, r: (3 * r(n, k), r(n, 4), 5 * r(n, k).square()),
    "mmc": lambda n, k, r: (lambda d: (-d / 2, r(n, 4), d))(5 * r(n, k).square() + 0.1),
    "gaussian": lambda n, k, r: (lambda d: (-d / 2 - 0.3 * r(1, k), r(n, 4), d))(5 * r(n, k).square() + 0.1),
}
# The settings that each loss is tried with; a tensor is made for the batch at hand. A new loss without a line is tried
# with its defaults.
SETTINGS = {
    "sce": [{}, {"smoothing": 0.1}, {"smoothing": 0.9}, {"smoothing": 0.1, "temperature": 0.3}, {"temperature": 10.0}],
    "isce": [
        {},
        {"s": 0.0},
        {"s": 10},
        {"s": lambda n, k, r: r(k).abs()},
        {"s": lambda n, k, r: 3 * r(n, 1).abs()},
        {"s": lambda n, k, r: 2 * r(n, k)},
        {"s": 2.0, "gamma": 5.0, "temperature": 0.75},
        {"s": lambda n, k, r: 2 * r(n, k), "gamma": 0.5, "temperature": 3.0},
    ],
    "isce_b": [{}, {"tau": 3.0}, {"tau": -20.0}, {"tau": -math.inf}],
    "isce_c": [{}, {"m": 0.0}, {"clip": False}, {"s": 2.0, "mask": "true"}, {"m": 0.5, "s": 0.5, "clip": False}],
    "contrastive": [{}, {"weight": 1.0, "separation": 3.0}],
    "triplet": [{}, {"weight": 0.5, "separation": 1.5}, {"separation": 0.0}],
    "center": [{}, {"weight": 1.0}],
    "lgm": [{}, {"ratio": 0.0, "weight": 0.0}, {"ratio": 0.3, "weight": 0.1}],
    "cosface": [{"scale": 15.0}, {"m": 0.2, "scale": 15.0}, {"m": 0.0, "scale": 30.0}],
    "arcface": [{"scale": 15.0}, {"m": 1.2, "scale": 15.0}, {"m": 0.0, "scale": 15.0}],
}
CASES = [
    pytest.param(name, settings, id=f"{name}-{i}")
    for name in LOSSES
    for i, settings in enumerate(SETTINGS.get(name, [{}]))
]
SCORES = {entry.score.__name__: entry.score for entry in LOSSES.values()}


def made(name, settings, n=N, k=K, seed=0, dtype=torch.float64):
    """(loss with its settings, Outputs, y) for an entry of LOSSES."""
    rng = generator(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    out = Outputs(*HEADS[LOSSES[name].head](n, k, draw))
    settings = {key: value(n, k, draw) if callable(value) else value for key, value in settings.items()}
    return partial(LOSSES[name].loss, **settings), out, labels(n, k, seed)


def leaves(out):
    return Outputs(*(t.clone().requires_grad_() if t is not None else None for t in out))


def used(loss, out, y):
    """The names of the tensors that the loss depends on."""
    out = leaves(out)
    present = [name for name in FIELDS if getattr(out, name) is not None]
    grads = torch.autograd.grad(loss(out, y).sum(), [getattr(out, name) for name in present], allow_unused=True)
    return [name for name, grad in zip(present, grads, strict=True) if grad is not None]


def lists(value):
    return value.double().tolist() if isinstance(value, torch.Tensor) else value


def literal(name, loss, out, y):
    settings = {key: lists(value) for key, value in loss.keywords.items()}
    return reference.LOSSES[name](lists(out.logits), y.tolist(), lists(out.features), lists(out.distances), **settings)


def rows(out, index):
    return Outputs(*(t[index] if t is not None else None for t in out))


def per_sample(loss, index, n):
    """The loss with those of its settings that hold a row per sample cut to these samples."""
    cut = {
        key: value[index] if isinstance(value, torch.Tensor) and value.ndim == 2 and len(value) == n else value
        for key, value in loss.keywords.items()
    }
    return partial(loss.func, **cut)


# -- contracts of every entry


def test_every_loss_has_a_literal_twin_and_a_head():
    assert reference.LOSSES.keys() == LOSSES.keys()
    assert {entry.head for entry in LOSSES.values()} <= HEADS.keys()
    for entry in LOSSES.values():
        names = list(inspect.signature(entry.loss).parameters.values())
        assert [p.kind for p in names[:2]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not p.empty for p in names[2:])
        assert "reduction" not in inspect.signature(entry.loss).parameters
        assert entry.about


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize(("n", "k"), [(6, 5), (4, 2), (5, 3), (1, 4), (8, 10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_equals_its_literal_twin(name, settings, n, k, dtype):
    for seed in range(2):
        loss, out, y = made(name, settings, n, k, seed, dtype)
        value = loss(out, y)
        assert value.shape == (n,)
        assert value.dtype is dtype
        wanted = torch.tensor(literal(name, loss, out, y), dtype=torch.float64)
        rtol, atol = (1e-10, 1e-12) if dtype is torch.float64 else (2e-5, 1e-5)
        torch.testing.assert_close(value.double(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_gradients_of_both_orders_are_right(name, settings, k):
    loss, out, y = made(name, settings, n=4, k=k, seed=2)
    names = used(loss, out, y)
    assert names

    def call(*tensors):
        return loss(out._replace(**dict(zip(names, tensors, strict=True))), y)

    inputs = tuple(getattr(out, name).clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_torch_func_differentiates_every_loss(name, settings):
    """grad, jvp and hessian of torch.func, and vmap where a sample's loss is its own, as autograd has them."""
    loss, out, y = made(name, settings, n=4, k=5, seed=2)

    def total(z):
        return loss(out._replace(logits=z), y).sum()

    z = out.logits.clone().requires_grad_()
    if "logits" not in used(loss, out, y):
        return
    (expected,) = torch.autograd.grad(total(z), z)
    torch.testing.assert_close(torch.func.grad(total)(out.logits), expected)
    direction = torch.randn(z.shape, generator=generator(1), dtype=z.dtype)
    torch.testing.assert_close(torch.func.jvp(total, (out.logits,), (direction,))[1], (expected * direction).sum())
    whole = torch.autograd.functional.hessian(total, out.logits)
    torch.testing.assert_close(torch.func.hessian(total)(out.logits), whole)
    if name in ("sce", "isce", "isce_b", "cosface", "arcface", "negative_margin", "dlr"):

        def one(z, y, number):
            mine = per_sample(loss, number[None], 4) if settings else loss
            return mine(Outputs(z[None]), y[None])[0]

        rows = torch.vmap(torch.func.grad(one))(out.logits, y, torch.arange(4))
        torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("shape", [(K,), (N, 1), (N, K)])
def test_inference_information_may_be_differentiated_through(shape):
    _, out, y = made("isce", {})
    s = torch.rand(shape, generator=generator(5), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: isce(out.logits, y, s=s), (s,))
    (grad,) = torch.autograd.grad(isce(out.logits, y, s=s).sum(), s)
    if shape == (N, K):
        assert (grad.gather(1, y[:, None]) == 0).all()  # column y is taken as 0
        assert (grad.scatter(1, y[:, None], 1) > 0).all()


def extreme(name, case, dtype=torch.float32):
    rng = generator(case)
    n, k = 8, 5
    y = labels(n, k, case)
    if case == 0:  # every logit +-1e4
        z = (torch.randint(2, (n, k), generator=rng) * 2 - 1) * 1e4
    elif case == 1:  # all alike
        z = torch.full((n, k), 1e4)
    elif case == 2:  # as right as can be
        z = torch.full((n, k), -1e4).scatter(1, y[:, None], 1e4)
    elif case == 3:  # as wrong
        z = torch.full((n, k), 1e4).scatter(1, y[:, None], -1e4)
    else:
        z = torch.randn(n, k, generator=rng) * 1e4
    h = torch.randn(n, 4, generator=rng) * 1e2
    h[1] = h[0]  # two of one class at one place,
    h[3] = h[0]  # and two of different ones
    if case == 1:
        h = torch.zeros(n, 4)
    d = z.abs() if LOSSES[name].head in ("mmc", "gaussian", "center") else None
    if LOSSES[name].head in ("mmc", "gaussian"):
        z = -d / 2
    return leaves(Outputs(z.to(dtype), h.to(dtype), d.to(dtype) if d is not None else None)), y


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("case", range(5))
def test_values_and_gradients_are_finite_at_logits_of_ten_thousand(name, settings, case):
    loss, _, _ = made(name, settings, n=8, k=5, dtype=torch.float32)
    out, y = extreme(name, case)
    value = loss(out, y)
    assert value.isfinite().all()
    value.sum().backward()
    for field in out:
        assert field is None or field.grad is None or field.grad.isfinite().all()


@pytest.mark.parametrize(("name", "settings"), CASES)
@given(order=st.permutations(range(N)), seed=st.integers(0, 100))
def test_a_permuted_batch_gives_permuted_losses(name, settings, order, seed):
    loss, out, y = made(name, settings, seed=seed)
    order = torch.tensor(order)
    permuted = per_sample(loss, order, N)(rows(out, order), y[order])
    torch.testing.assert_close(permuted, loss(out, y)[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_loss_depends_on_its_batch_mates_only_if_it_says_so(name, settings):
    loss, out, y = made(name, settings)
    whole = loss(out, y)
    changed = False
    for i in range(N):
        alone = per_sample(loss, torch.tensor([i]), N)(rows(out, [i]), y[[i]])
        spoiled = Outputs(*(t.clone() if t is not None else None for t in out))
        for field in spoiled:
            if field is not None:
                field[torch.arange(N) != i] = math.nan
        beside = loss(spoiled, y)
        if LOSSES[name].coupled:
            changed |= not torch.allclose(alone[0], whole[i])
        else:
            torch.testing.assert_close(alone[0], whole[i], rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(beside[i], whole[i], rtol=1e-13, atol=1e-13)
    if not settings:  # with the defaults; triplet without separation may have no term at all
        assert changed == LOSSES[name].coupled


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_arguments_come_back_untouched_and_nothing_leaks(name, settings):
    loss, out, y = made(name, settings)
    given_ = [t for t in (*out, y, *loss.keywords.values()) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in given_]
    assert not loss(out, y).requires_grad
    tracked = leaves(out)
    value = loss(tracked, y)
    assert value.requires_grad
    assert all(t is None or t.grad is None for t in tracked)
    torch.autograd.grad(value.sum(), [t for t in tracked if t is not None], allow_unused=True)
    with torch.no_grad():
        assert not loss(tracked, y).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(given_, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tracked, out, strict=True) if a is not None)


@pytest.mark.parametrize(("name", "settings"), [c for c in CASES if LOSSES[c.values[0]].score is negative_log_odds])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_read_as_float32(name, settings, dtype):
    """As the fused cross-entropy does under autocast: what follows the logits is computed in float32."""
    loss, out, y = made(name, settings, dtype=torch.float32)
    short = out.logits.to(dtype)
    value = loss(out._replace(logits=short), y)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, loss(out._replace(logits=short.float()), y), rtol=1e-5, atol=1e-6)
    z = short.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(out._replace(logits=z), y).sum(), z)
    assert grad.dtype is dtype
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name, entry in LOSSES.items() if entry.head in ("linear", "cosine")])
def test_outputs_and_bare_logits_are_one_thing(name):
    loss, out, y = made(name, {})
    if LOSSES[name].coupled:
        return
    assert torch.equal(loss(out, y), loss(out.logits, y))


# -- golden values (shared/field/losses.md, section 6; computed apart from this project)

Z, Y0 = torch.tensor([[2.0, 1.0, 0.1]], dtype=torch.float64), torch.tensor([0])
COS = torch.tensor([[0.6, 0.8, 0.28]], dtype=torch.float64)
D = torch.tensor([[5.0, 8.0, 2.0]], dtype=torch.float64)  # h = (1, 2); centers (0, 0), (3, 0), (0, 3)
PAIR = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
APART = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
THREE = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
LOG2 = math.log(2)
GOLDEN = {
    "sce": (lambda: sce(Z, Y0), 0.417030016),
    "smoothing, e/K on every class": (lambda: sce(Z, Y0, smoothing=0.1), 0.513696683),
    "A, s=.5": (lambda: isce(Z, Y0, s=0.5), 0.616874819),
    "A, s=1": (lambda: isce(Z, Y0, s=1.0), 0.878202356),
    "A, s=5": (lambda: isce(Z, Y0, s=5.0), 4.354091318),
    "A, logit annealing": (lambda: isce(Z, Y0, s=2.0, gamma=5.0, temperature=0.75), 0.531097847),
    "B, tau=0": (lambda: isce_b(Z, Y0, tau=0.0), 0.502460742),
    "B, tau=2": (lambda: isce_b(Z, Y0, tau=2.0), 0.923245714),
    "margin": (lambda: negative_margin(Z, Y0), -1.0),
    "dlr": (lambda: dlr(Z, Y0), -0.526315789),
    "lgm 0": (lambda: lgm(Outputs(-D / 2, None, D), Y0, ratio=0.0, weight=0.0), 1.741311297),
    "lgm .1": (lambda: lgm(Outputs(-D / 2, None, D), Y0, ratio=0.1, weight=0.0), 1.951765469),
    "lgm .3": (lambda: lgm(Outputs(-D / 2, None, D), Y0, ratio=0.3, weight=0.0), 2.394261624),
    "lgm likelihood": (lambda: lgm(Outputs(-D / 2, None, D), Y0, ratio=0.1, weight=0.1), 1.951765469 + 0.25),
    "mmc": (lambda: mmc(Outputs(-D / 2, None, D), Y0), 2.5),
    "center": (lambda: center(Outputs(torch.zeros(1, 2), None, D), Y0, weight=1.0) - LOG2, 2.5),
    "cosface": (lambda: cosface(64 * COS, Y0, m=0.35, scale=64.0), 35.2),
    "arcface": (lambda: arcface(64 * COS, Y0, m=0.5, scale=64.0), 42.047417),
    "hypersphere embedding": (lambda: cosface(15 * COS, Y0, m=0.2, scale=15.0), 6.002884323),
    "contrastive, same": (
        lambda: contrastive(Outputs(Z[:, :2].expand(2, 2) * 0, PAIR), torch.tensor([0, 0]), weight=1.0) - LOG2,
        0.2,
    ),
    "contrastive, apart": (
        lambda: contrastive(Outputs(APART * 0, APART), torch.tensor([0, 1]), weight=1.0, separation=2.0) - LOG2,
        0.171572875,
    ),
    "triplet": (lambda: (triplet(Outputs(THREE * 0, THREE), torch.tensor([0, 0, 1])) - LOG2)[0], 0.0),
}


@pytest.mark.parametrize(("call", "value"), GOLDEN.values(), ids=GOLDEN)
def test_golden_values(call, value):
    assert call().flatten().tolist() == pytest.approx([value] * call().numel(), abs=2e-9, rel=1e-8)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5]))
def test_sce_is_the_cross_entropy_of_torch(seed, smoothing):
    _, out, y = made("sce", {}, seed=seed)
    wanted = F.cross_entropy(out.logits, y, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(sce(out, y, smoothing=smoothing), wanted)


@given(st.integers(0, 1000))
def test_triplet_takes_the_nearest_farther_negative_or_else_the_farthest(seed):
    """Against the literal twin on a circle with many equal distances, where ties and both branches occur."""
    rng = generator(seed)
    angle = torch.randint(12, (8,), generator=rng) * (math.pi / 6) + 1e-3 * torch.randn(8, generator=rng)
    h = torch.stack([angle.cos(), angle.sin()], 1).double() * (1 + torch.rand(8, 1, generator=rng))
    y = torch.randint(3, (8,), generator=rng)
    z = torch.zeros(8, 3, dtype=torch.float64)
    wanted = reference.triplet(lists(z), y.tolist(), lists(h), separation=0.5)
    torch.testing.assert_close(triplet(Outputs(z, h), y, separation=0.5), torch.tensor(wanted).double())


def test_a_negative_just_as_far_as_the_positive_is_not_farther():
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]])  # 2 to the positive, 2 and 4 to the negatives
    y = torch.tensor([0, 0, 1, 1])
    term = triplet(Outputs(torch.zeros(4, 2), h), y, separation=3.0)[0] - LOG2
    assert term.item() == pytest.approx(2 - 4 + 3)


@pytest.mark.parametrize("loss", [contrastive, triplet])
def test_pair_terms_vanish_without_pairs(loss):
    z, h = torch.randn(3, 3, generator=generator(0)), 10 * torch.eye(3)
    one_each = torch.arange(3)
    assert torch.equal(loss(Outputs(z[:1], h[:1]), one_each[:1]), sce(z[:1], one_each[:1]))
    torch.testing.assert_close(loss(Outputs(z, h), one_each), sce(z, one_each))
    if loss is triplet:  # and one class alone has no negative
        torch.testing.assert_close(loss(Outputs(z, h), torch.zeros(3).long()), sce(z, torch.zeros(3).long()))


# -- the inference-softmax family


@given(
    st.integers(0, 10_000),
    st.floats(-3, 4),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0, 0.0, (K,), (N, 1), (N, K)]),
)
def test_isce_without_information_is_sce_bit_for_bit(seed, magnitude, dtype, s):
    z = (10**magnitude * torch.randn(N, K, generator=generator(seed))).to(dtype)
    y = labels(N, K, seed)
    s = torch.zeros(s, dtype=dtype) if isinstance(s, tuple) else s
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    first, second = isce(a, y, s=s), sce(b, y)
    assert torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(first.sum(), a)[0], torch.autograd.grad(second.sum(), b)[0])


def steep(margin, k, spread):
    """One row whose margin is exactly this: the competitors stand at 0, -spread, -2 spread, ..."""
    return torch.tensor([[float(margin), *(-spread * j for j in range(k - 1))]], dtype=torch.float32)


@pytest.mark.parametrize("s", [0, 1, 10, 100, 300])
@pytest.mark.parametrize(("k", "spread"), [(2, 0.0), (10, 0.0), (10, 0.5), (3, 40.0)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_isce_is_exact_in_float32_at_any_margin(s, k, spread, as_tensor):
    for margin in range(0, 501, 20):
        z = steep(margin, k, spread).requires_grad_()
        value = isce(z, Y0, s=torch.full((k,), float(s)) if as_tensor else float(s))
        (grad,) = torch.autograd.grad(value.sum(), z)
        rows_ = lists(z.detach())
        wanted = reference.isce(rows_, [0], s=float(s))[0]
        slope = reference.isce_gradient(rows_, [0], s=float(s))[0]
        # The one loss of digits that no order of operations avoids: u itself is rounded, and the loss is e^u below 0.
        rel = 1e-5 + (2**-23 * max(margin, s) if margin > s else 0)
        assert value.item() == pytest.approx(wanted, rel=rel, abs=1e-44)
        assert grad[0].tolist() == pytest.approx(slope, rel=rel, abs=1e-44)


def test_the_copy_free_shortcut_is_not_taken():
    """softplus(s + log(1 - p_y) - log p_y) from F.cross_entropy gives 0 in float32 here; the truth is above 75."""
    z = steep(25, 10, 0.0).requires_grad_()
    value = isce(z, Y0, s=100.0)
    assert value.item() > 75
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert grad[0, 0] == -1
    assert grad[0, 1:].tolist() == pytest.approx([1 / 9] * 9)
    log_p = -F.cross_entropy(z, Y0)
    shortcut = F.softplus(100 + torch.log1p(-log_p.exp()) - log_p)
    assert not shortcut > 75  # the trap is real


@pytest.mark.parametrize("offset", [-1e4, -300.0, 1e3, 1e4])
@pytest.mark.parametrize("margin", [1.0, 5.0, 10.0])
def test_a_common_offset_of_the_logits_costs_no_digits(offset, margin):
    """Logits that are exact in float32; the fused cross-entropy takes the largest off first and keeps every digit."""
    z = torch.tensor([[margin, 0.0, -0.5, -1.0, 0.0, 0.25]]) + offset
    wanted = reference.sce(lists(z), [0])[0]
    assert F.cross_entropy(z, Y0).item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert sce(z, Y0).item() == pytest.approx(wanted, rel=1e-5)
    assert negative_log_odds(z, Y0).item() == pytest.approx(reference.gap(lists(z), [0])[0], rel=1e-5, abs=1e-6)


def test_softplus_keeps_its_digits_on_both_sides():
    u = torch.tensor([-80.0, -30.0, -1.0, 0.0, 1.0, 19.0, 21.0, 30.0, 49.0, 51.0, 700.0], dtype=torch.float64)
    wanted = [float(reference.log(1 + reference.exp(value))) for value in u.tolist()]
    with_digits = [math.log1p(math.exp(v)) if v < 0 else v + math.log1p(math.exp(-v)) for v in u.tolist()]
    assert softplus(u).tolist() == pytest.approx(with_digits, rel=1e-15)
    assert softplus(u)[2:].tolist() == pytest.approx(wanted[2:], rel=1e-14)
    assert softplus(u.float()).tolist() == pytest.approx(with_digits, rel=1e-6)


@given(st.integers(0, 10_000), st.floats(-100, 100), st.floats(0, 50))
def test_reading_a_is_shift_invariant(seed, shift, s):
    _, out, y = made("isce", {}, seed=seed)
    torch.testing.assert_close(isce(out.logits + shift, y, s=s), isce(out.logits, y, s=s), rtol=1e-9, atol=1e-12)


def test_reading_b_is_not_and_is_raised_by_lowering_all_logits():
    _, out, y = made("isce_b", {})
    raised = isce_b(out.logits - 2, y) - isce_b(out.logits, y)
    assert (raised > 1e-3).all()
    torch.testing.assert_close(
        negative_log_odds(out.logits - 2, y), negative_log_odds(out.logits, y)
    )  # without nearing a mistake


@pytest.mark.parametrize("s", [0.5, 4.0, 30.0])
@pytest.mark.parametrize("k", [2, 3, 6])
def test_reading_a_is_the_worst_sce_over_a_logit_box(s, k):
    _, out, y = made("isce", {}, k=k)
    worst = isce(out, y, s=s)
    corners = torch.tensor(list(itertools.product([-s / 2, s / 2], repeat=k)), dtype=torch.float64)
    inside = (torch.rand(300, k, generator=generator(1), dtype=torch.float64) - 0.5) * s
    at = lambda moves: torch.stack([sce(out.logits + move, y) for move in moves])  # noqa: E731
    torch.testing.assert_close(at(corners).amax(0), worst, rtol=1e-12, atol=1e-12)
    assert (at(inside) < worst).all()


@pytest.mark.parametrize("settings", SETTINGS["isce"])
def test_the_logit_gradient_of_reading_a_sums_to_zero(settings):
    loss, out, y = made("isce", settings)
    z = out.logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(z, y).sum(), z)
    assert grad.sum(1).abs().max() < 1e-14
    assert (grad.gather(1, y[:, None]) < 0).all()


@given(st.integers(0, 1000), st.floats(-2, 4))
def test_reading_b_without_mass_is_sce_and_mass_only_adds(seed, magnitude):
    z = 10**magnitude * torch.randn(N, K, generator=generator(seed))
    y = labels(N, K, seed)
    assert torch.equal(isce_b(z, y, tau=-math.inf), sce(z, y))
    assert (isce_b(z, y, tau=0.0) >= sce(z, y)).all()
    assert (isce_b(z, y, tau=2.0) >= isce_b(z, y, tau=0.0)).all()


# -- errors

OUT3 = Outputs(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: isce(Z, Y0, s=-0.1), r"s, the inference information, must be a finite number >= 0.*got -0.1"),
        (lambda: isce(Z, Y0, s=math.nan), r"s, the inference information.*got nan"),
        (lambda: isce(Z, Y0, s=math.inf), r"s, the inference information.*got inf"),
        (lambda: sce(Z, Y0, smoothing=-0.1), r"smoothing must lie in \[0, 1\), got -0.1"),
        (lambda: sce(Z, Y0, smoothing=1.0), r"smoothing must lie in \[0, 1\), got 1.0"),
        (lambda: sce(Z, Y0, smoothing=math.nan), r"smoothing must lie in \[0, 1\), got nan"),
        (lambda: isce(Z, Y0, gamma=-1.0), r"gamma must be >= 0, got -1.0"),
        (lambda: isce(Z, Y0, temperature=0.0), r"temperature must be > 0, got 0.0"),
        (lambda: sce(Z, Y0, temperature=math.inf), r"temperature must be .*got inf"),
        (lambda: isce_b(Z, Y0, tau=math.nan), r"tau must be a number or -inf.*got nan"),
        (lambda: isce_b(Z, Y0, tau=math.inf), r"tau must be a number or -inf.*got inf"),
        (lambda: cosface(Z, Y0, scale=0.0), r"scale must be > 0, got 0.0"),
        (lambda: cosface(Z, Y0, scale=-3.0), r"scale must be > 0, got -3.0"),
        (lambda: cosface(Z, Y0, m=-0.1), r"must be .*>= 0"),
        (lambda: arcface(Z, Y0, scale=0.0), r"ArcFace needs scale > 0.*got scale=0.0"),
        (lambda: arcface(Z, Y0, scale=math.nan), r"ArcFace needs scale > 0.*got scale=nan"),
        (lambda: arcface(Z, Y0, m=-0.1), r"ArcFace needs .*m in \[0, pi/2\].*m=-0.1"),
        (lambda: arcface(Z, Y0, m=1.6), r"ArcFace needs .*m=1.6"),
        (lambda: arcface(Z, Y0, m=math.nan), r"ArcFace needs .*m=nan"),
        (lambda: lgm(Outputs(-D / 2, None, D), Y0, ratio=-0.1), r"ratio.* must be >= 0, got -0.1"),
        (lambda: lgm(Outputs(-D / 2, None, D), Y0, ratio=math.nan), r"ratio.* must be >= 0, got nan"),
        (lambda: center(OUT3, Y0), r"needs distances to centers.*Use head 'center', 'mmc' or 'gaussian'"),
        (lambda: lgm(OUT3, Y0), r"needs distances to centers"),
        (lambda: mmc(OUT3, Y0), r"needs distances to centers"),
        (lambda: center(Z, Y0), r"needs distances to centers"),
        (lambda: lgm(Z, Y0), r"needs distances to centers"),
        (lambda: mmc(Z, Y0), r"needs distances to centers"),
        (lambda: contrastive(OUT3, Y0), r"compares features.*return Outputs with features"),
        (lambda: triplet(OUT3, Y0), r"compares features"),
        (lambda: contrastive(Z, Y0), r"compares features"),
        (lambda: triplet(Z, Y0), r"compares features"),
        (lambda: score_of(F.cross_entropy), r"no score is known for the loss 'cross_entropy'.*negative_margin"),
        (lambda: score_of(partial(F.cross_entropy, reduction="none")), r"no score is known for the loss"),
        (lambda: score_of("icse"), r"no score is known"),
        (lambda: score_of(lambda out, y: y), r"no score is known for the loss '<lambda>'"),
    ],
)
def test_errors_say_what_was_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_outputs_are_wrapped_once_at_the_border():
    z = torch.zeros(2, 3)
    out = Outputs(z, z)
    assert as_outputs(out) is out
    assert as_outputs(z).logits is z
    assert as_outputs((z, "more")).logits is z
    assert as_outputs(type("Answer", (), {"logits": z})()).logits is z
    assert logits_of(out) is logits_of(z) is z
    for answer, message in [(torch.zeros(3), r"shape \(3,\)"), ((), "tuple"), (None, "NoneType"), ("z", "str")]:
        with pytest.raises(UserError, match=rf"must return \(N, K\) logits.*{message}"):
            as_outputs(answer)


# -- scores: higher is nearer to a mistake, and never flat


def logits_and_labels(seed, k=K, n=40, spread=3.0):
    z = spread * torch.randn(n, k, generator=generator(seed), dtype=torch.float64)
    return z, torch.randint(k, (n,), generator=generator(seed + 1))


def raised(z, column, by):
    """z with one class per row raised."""
    return z.scatter_add(1, column[:, None], torch.full((len(z), 1), by, dtype=z.dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_an_entrys_score_is_what_score_of_finds(name):
    entry = LOSSES[name]
    for form in (name, entry.loss, partial(entry.loss, weight=1), partial(partial(entry.loss), s=100.0)):
        assert score_of(form) is entry.score


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].score is not dlr])
@pytest.mark.parametrize("k", [2, 3, 5])
@given(seed=st.integers(0, 10_000), by=st.floats(1e-3, 30))
def test_a_score_never_falls_when_a_competitor_rises_and_falls_when_the_true_logit_does(name, k, seed, by):
    score = LOSSES[name].score
    z, y = logits_and_labels(seed, k)
    before = score(z, y)
    assert before.shape == y.shape
    for step in range(1, k):
        other = (y + step) % k
        assert (score(raised(z, other, by), y) >= before - 1e-12).all()
    runner_up = z.scatter(1, y[:, None], -math.inf).argmax(1)
    assert (score(raised(z, runner_up, by), y) > before).all()
    assert (score(raised(z, y, by), y) < before).all()


@given(seed=st.integers(0, 10_000), by=st.floats(1e-3, 30))
def test_dlr_rises_with_the_nearest_competitor_and_falls_with_the_true_logit(seed, by):
    """Its ratio also moves with the third logit: the score that is not monotone in every competitor."""
    z, y = logits_and_labels(seed)
    margin, before = negative_margin(z, y), dlr(z, y)
    right = margin < 0
    runner_up = z.scatter(1, y[:, None], -math.inf).argmax(1)
    assert (dlr(raised(z, y, by), y) < before)[right].all()
    assert (dlr(raised(z, y, by), y) <= before + 1e-12).all()
    small = margin.abs().min().item() / 2
    assert (dlr(raised(z, runner_up, small), y) > before)[right].all()


def test_dlr_may_fall_when_the_third_logit_rises():
    z = torch.tensor([[2.0, 1.0, 0.1], [2.0, 1.0, 0.5]])
    y = torch.zeros(2).long()
    values = dlr(z, y)
    assert values[1] < values[0]
    assert negative_margin(z, y).tolist() == [-1.0, -1.0]


def test_dlr_lies_between_minus_one_and_zero_where_right_and_has_no_ceiling_where_wrong():
    z, y = logits_and_labels(3, n=2000)
    value, wrong = dlr(z, y), z.argmax(1) != y
    assert ((value >= -1 - 1e-9) & (value < 0))[~wrong].all()
    assert (value > 0)[wrong].all()
    assert dlr(torch.tensor([[3.0, 2.0, 1.0, -100.0]]), torch.tensor([3])).item() == pytest.approx(51.5)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@given(seed=st.integers(0, 10_000), shift=st.floats(-100, 100))
def test_a_score_does_not_see_a_common_shift(score, seed, shift):
    z, y = logits_and_labels(seed)
    torch.testing.assert_close(score(z + shift, y), score(z, y), rtol=1e-8, atol=1e-9)
    t = (y + 1) % K
    torch.testing.assert_close(targeted(score)(z + shift, (y, t)), targeted(score)(z, (y, t)), rtol=1e-8, atol=1e-9)


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_dlr_does_not_see_a_common_scale(seed, scale):
    z, y = logits_and_labels(seed)
    t = (y + 1) % K
    torch.testing.assert_close(dlr(scale * z, y), dlr(z, y), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(targeted_dlr(scale * z, (y, t)), targeted_dlr(z, (y, t)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [2, 3, 5, 10])
@given(seed=st.integers(0, 10_000), spread=st.floats(0.01, 10))
def test_a_scores_sign_tells_mistakes(name, k, seed, spread):
    score = LOSSES[name].score
    z, y = logits_and_labels(seed, k, spread=spread)
    value, wrong = score(z, y), z.argmax(1) != y
    assert (value >= 0)[wrong].all()
    if score is negative_log_odds:
        assert wrong[value > math.log(k - 1)].all()
        assert not wrong[value < 0].any()
    else:
        assert torch.equal(value > 0, wrong)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].score is not dlr])
@pytest.mark.parametrize("k", [2, 3, 10])
def test_a_score_is_never_flat_where_its_loss_is(name, k):
    score = LOSSES[name].score
    for margin in (0.5, 17.0, 25.0, 104.0, 1e3, 1e4):
        z = steep(margin, k, 0.1).requires_grad_()
        (grad,) = torch.autograd.grad(score(z, Y0).sum(), z)
        assert grad[0, 0] == -1
        assert grad[0, 1:].sum().item() == pytest.approx(1, rel=1e-5)
        assert (grad[0, 1:] >= 0).all()
        if score is negative_log_odds and margin >= 104:  # the loss without smoothing has lost it all
            (flat,) = torch.autograd.grad(sce(z, Y0).sum(), z)
            assert flat.abs().max() < 1e-38


def test_dlr_is_never_flat_but_where_the_true_class_is_third():
    for margin in (0.5, 25.0, 104.0, 1e3, 1e4):
        z = steep(margin, 10, 0.1).requires_grad_()
        (grad,) = torch.autograd.grad(dlr(z, Y0).sum(), z)
        assert grad[0, 0] < 0
        assert grad[0, 1] > 0
    third = torch.tensor([[3.0, 2.0, 1.0, 0.0]], requires_grad=True)  # autoattack's issue 108: already wrong, harmless
    value = dlr(third, torch.tensor([2]))
    assert value.item() == pytest.approx(1)
    assert torch.autograd.grad(value.sum(), third)[0].abs().max() < 1e-6


@pytest.mark.parametrize("score", [s for s in SCORES.values() if s is not dlr], ids=[n for n in SCORES if n != "dlr"])
@pytest.mark.parametrize("k", [2, 3, 5])
@given(seed=st.integers(0, 10_000), by=st.floats(1e-3, 30))
def test_a_targeted_score_rises_with_its_target_alone(score, k, seed, by):
    z, y = logits_and_labels(seed, k)
    t = (y + 1) % k
    aim = targeted(score)
    before = aim(z, (y, t))
    assert before.shape == y.shape
    assert (aim(raised(z, t, by), (y, t)) > before).all()
    for step in range(1, k):
        assert (aim(raised(z, (t + step) % k, by), (y, t)) <= before + 1e-12).all()
    assert (before[z.argmax(1) == t] > -math.log(k - 1) - 1e-12).all()
    assert (z.argmax(1) == t)[before > 0].all()


@pytest.mark.parametrize("k", [2, 3, 4, 7])
@given(seed=st.integers(0, 10_000), by=st.floats(1e-3, 30))
def test_targeted_dlr_is_its_literal_twin_and_rises_with_the_target(k, seed, by):
    assert targeted(dlr) is targeted_dlr
    z, y = logits_and_labels(seed, k)
    t = (y + 1) % k
    before = targeted_dlr(z, (y, t))
    wanted = reference.targeted_dlr(lists(z), y.tolist(), t.tolist())
    torch.testing.assert_close(before, torch.tensor(wanted, dtype=torch.float64), rtol=1e-8, atol=1e-9)
    assert torch.equal(before > 0, z.gather(1, t[:, None])[:, 0] > z.gather(1, y[:, None])[:, 0])
    if k < 4:  # no plain anywhere, the lowest class included: a black box must see that it gets nearer
        nearer = z.scatter_add(1, t[:, None], torch.full((len(z), 1), by, dtype=z.dtype))
        assert (targeted_dlr(nearer, (y, t)) > before).all()
    second = z.topk(2, dim=1).indices
    leads = (second[:, 0] == y) & (second[:, 1] == t)  # from second place it nears the first
    small = -(z.gather(1, t[:, None]) - z.gather(1, y[:, None]))[:, 0][leads]
    if leads.any():
        lifted = z[leads].scatter_add(1, t[leads][:, None], (small / 2)[:, None])
        assert (targeted_dlr(lifted, (y[leads], t[leads])) > before[leads]).all()


@given(st.integers(0, 1000), st.sampled_from([2, 3, 5, 10]))
def test_gap_is_its_literal_twin(seed, k):
    z, y = logits_and_labels(seed, k)
    wanted = torch.tensor(reference.gap(lists(z), y.tolist()), dtype=torch.float64)
    torch.testing.assert_close(negative_log_odds(z, y), wanted, rtol=1e-12, atol=1e-12)


def test_the_loss_of_mmc_is_no_consistent_score():
    """Centers (-1, 0) and (1, 0): far to the left the loss is large and the answer safe, so the loss misranks them."""
    centers = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    h = torch.tensor([[-5.0, 0.0], [0.1, 0.0]])  # the first is right by a wide margin, the second a mistake
    d = (h[:, None] - centers).square().sum(2)
    out, y = Outputs(-d / 2, h, d), torch.zeros(2).long()
    assert out.logits.argmax(1).tolist() == [0, 1]
    assert mmc(out, y).tolist() == pytest.approx([8.0, 0.605])
    assert mmc(out, y)[0] > mmc(out, y)[1]  # climbing it leads away from the mistake
    score = score_of(mmc)(out, y)
    assert score[0] < 0 < score[1]
    assert score.tolist() == pytest.approx([-10.0, 0.2], rel=1e-5)


@pytest.mark.parametrize("name", ["lgm", "mmc"])
def test_the_score_of_a_center_head_is_half_the_difference_of_distances(name):
    d = 3 * torch.rand(20, 4, generator=generator(0))
    y = torch.randint(4, (20,), generator=generator(1))
    nearest = d.scatter(1, y[:, None], math.inf).amin(1)
    torch.testing.assert_close(
        score_of(name)(Outputs(-d / 2, None, d), y), (d.gather(1, y[:, None])[:, 0] - nearest) / 2
    )


@pytest.mark.parametrize("loss", ["sce", "isce", "isce_b", "cosface", "arcface"])
def test_probabilities_as_labels_are_refused_with_the_module_that_takes_them(loss):
    z = torch.randn(4, 5)
    with pytest.raises(UserError, match=r"class indices \(N,\), got torch.float32 of shape \(4, 5\).*losses.ISCELoss"):
        LOSSES[loss].loss(z, torch.softmax(z, 1))
