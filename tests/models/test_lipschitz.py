"""1-Lipschitz networks: orthogonal matrices, no pair of images pushed apart, and a kept matrix that is never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from holdfast.errors import UserError
from holdfast.models import build
from holdfast.models.heads import HEADS
from holdfast.models.orthogonal import Orthogonal, OrthogonalConv, OrthogonalLinear, cayley

TABLE = [("lipmlp", (1, 1, 1)), ("lipmlp", (3, 5, 4)), ("lipconv", (1, 4, 4)), ("lipconv", (3, 7, 9))]
every = pytest.mark.parametrize(("name", "shape"), TABLE)
kept_or_not = pytest.mark.parametrize("grad", [False, True], ids=["kept", "with a graph"])  # two ways to Q


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def off(q):
    """How far a matrix is from orthonormal rows (wide) or columns (tall): the largest entry."""
    q = q.detach().double()
    gram = q @ q.T if len(q) <= q.shape[1] else q.T @ q
    return float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())


def owners(model):
    return [module for module in model.modules() if isinstance(module, Orthogonal)]


def move(model, size):
    """Away from the first values, as training would."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter += size * torch.randn(parameter.shape, generator=generator(seed))
    return model


# ------------------------------------------------------------------------------------------------------- orthogonality


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("columns", [1, 2, 7, 64])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 30.0])
def test_cayley_is_orthogonal_for_any_matrix(rows, columns, size):
    q = cayley(size * torch.randn(rows, columns, generator=generator(), dtype=torch.float64))
    assert q.shape == (rows, columns)
    assert off(q) < 1e-10


@kept_or_not
@every
@pytest.mark.parametrize("head", ["linear", "orthogonal"])
def test_every_matrix_of_the_network_is_orthogonal(name, shape, grad, head):
    for size in (0.0, 0.1):
        model = move(build(name, shape, 3, head=head), size)
        assert len(owners(model)) == (2 if name == "lipmlp" else 5) + (head == "orthogonal")
        with torch.set_grad_enabled(grad):
            assert max(off(layer.matrix) for layer in owners(model)) < 1e-5


def test_the_kept_matrix_is_orthogonal_however_far_training_went():
    layer = move(OrthogonalLinear(40, 30), 10.0)
    with torch.no_grad():
        assert off(layer.weight) < 1e-5


# ----------------------------------------------------------------------------------------------- no pair pushed apart


def apart_behind(f, x, other):
    """How far apart f takes them, less the rounding of numbers as large as f(x): 0 where that explains it."""
    a, b = f(x), f(other)
    return (a - b).norm(dim=1) - 4 * torch.finfo(a.dtype).eps * a.norm(dim=1)


def pairs(shape, dtype=torch.float32):
    """Pairs of images, anywhere and near each other, and how far apart they are."""
    x, other, step = (torch.rand(64, *shape, generator=generator(seed), dtype=dtype) for seed in range(3))
    for x2 in (other, x + 0.1 * (step - 0.5), x + 1e-3 * (step - 0.5)):
        yield x, x2, (x - x2).flatten(1).norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every
def test_no_pair_of_images_is_pushed_apart(name, shape, dtype):
    for size in (0.0, 0.1, 1.0):
        backbone = move(build(name, shape, 3, seed=4).backbone, size).to(dtype)
        for x, other, apart in pairs(shape, dtype):
            with torch.no_grad():
                assert (apart_behind(backbone, x, other) <= apart * (1 + 1e-5)).all()


@every
def test_nor_while_it_trains(name, shape):
    backbone = move(build(name, shape, 3, seed=4).backbone, 0.05).train()
    for x, other, apart in pairs(shape):
        assert (apart_behind(backbone, x, other) <= apart * (1 + 1e-5)).all()


@every
def test_the_worst_direction_is_not_steeper_either(name, shape):
    """Random pairs seldom meet the steepest direction: the Jacobian's largest singular value does."""
    backbone = move(build(name, shape, 3).backbone, 0.3).double()
    for x in torch.rand(3, 1, *shape, generator=generator(5), dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda x: backbone(x)[0], x).flatten(1)
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= 1 + 1e-9


def test_a_layer_that_widens_keeps_every_length():
    x, other = (torch.rand(16, 2, 4, 6, generator=generator(seed)) for seed in range(2))
    lengths = (x - other).flatten(1).norm(dim=1)
    for layer, flat in ((OrthogonalConv(2, 8, 2), False), (OrthogonalLinear(48, 60), True)):
        with torch.no_grad():
            a, b = (layer(z.flatten(1) if flat else z) for z in (x, other))
        assert torch.allclose((a - b).flatten(1).norm(dim=1), lengths, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_no_gap_of_logits_is_steeper_than_sqrt_2_scale(scale):
    shape = (1, 6, 6)
    model = move(build("lipmlp", shape, 4, head="orthogonal", head_settings={"scale": scale}), 0.1).double()
    for x, other, apart in pairs(shape, torch.float64):
        with torch.no_grad():
            change = model(x).logits - model(other).logits
        gap = change.amax(1) - change.amin(1)  # the gap that changes most
        assert (gap <= 2**0.5 * scale * apart * (1 + 1e-5)).all()


# ------------------------------------------------------------------------------------------ the kept matrix, not stale


def by_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.rand(4, 1, 6, 6, generator=generator(8))).logits.square().sum().backward()
    optimizer.step()


def by_loading(model):
    model.load_state_dict(build("lipmlp:width=8", (1, 6, 6), 3, head="orthogonal", seed=9).state_dict())


def by_assigning(model):
    model.load_state_dict(build("lipmlp:width=8", (1, 6, 6), 3, head="orthogonal", seed=9).state_dict(), assign=True)


def by_data(model):
    for layer in owners(model):
        layer.free.data.mul_(-2.0)


def by_replacing(model):
    for layer in owners(model):
        layer.free = nn.Parameter(layer.free.detach().flip(0))


@pytest.mark.parametrize("change", [by_step, by_loading, by_assigning, by_data, by_replacing, nn.Module.double])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_kept_matrix_is_never_stale(change, frozen):
    model = build("lipmlp:width=8", (1, 6, 6), 3, head="orthogonal")
    with torch.no_grad():
        before = [layer.matrix for layer in owners(model)]
        assert all(layer.matrix is q for layer, q in zip(owners(model), before, strict=True)), "nothing is kept"
    change(model)
    model.requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):  # frozen: a matrix without a graph even where gradients are on, as in attacks
        after = [layer.matrix for layer in owners(model)]
    for layer, old, new in zip(owners(model), before, after, strict=True):
        assert new.dtype == layer.free.dtype
        assert torch.allclose(new, cayley(layer.free.detach()), rtol=1e-5, atol=1e-5)
        assert change is nn.Module.double or not torch.allclose(new, old, atol=1e-3)
    if change is nn.Module.double:
        assert max(off(q) for q in after) < 1e-12  # made anew: not the float32 one, cast


def test_what_inference_mode_kept_serves_the_next_attack():
    model = build("lipconv", (1, 8, 8), 3, head="orthogonal").eval().requires_grad_(False)
    x = torch.rand(2, 1, 8, 8, generator=generator())
    with torch.inference_mode():
        model(x)
    x.requires_grad_()
    model(x).logits[:, 0].sum().backward()
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()


def test_what_is_kept_travels_in_no_state_and_copies_part_ways():
    model = build("lipmlp:width=8", (1, 6, 6), 3)
    keys = list(model.state_dict())
    with torch.no_grad():
        first = [layer.matrix.clone() for layer in owners(model)]
        other = move(copy.deepcopy(model), 0.5)
        assert list(model.state_dict()) == keys
        for q, here, there in zip(first, owners(model), owners(other), strict=True):
            assert torch.equal(here.matrix, q)
            assert not torch.allclose(there.matrix, q, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_more_classes_than_features():
    assert HEADS["orthogonal"](5, 5)(torch.zeros(2, 5)).logits.shape == (2, 5)
    with pytest.raises(UserError, match=r"'orthogonal' needs at least as many features as classes, got 5 for 6"):
        HEADS["orthogonal"](5, 6)
    with pytest.raises(UserError, match="got 4 for 10"):
        build("lipmlp:width=4", (1, 6, 6), 10, head="orthogonal")


@pytest.mark.parametrize("name", ["lipmlp", "lipconv"])
@pytest.mark.parametrize("width", [-2, 0, 1, 7])
def test_a_width_that_does_not_pair(name, width):
    with pytest.raises(UserError, match=f"width of model '{name}' must be even and >= 2.*got {width}"):
        build(f"{name}:width={width}", (1, 8, 8), 3)
