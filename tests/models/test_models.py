"""Networks: shape and range, counts from the literature, one seed one network, what they refuse."""

from __future__ import annotations

import copy
import itertools
import math
import time

import pytest
import torch
from torch import nn

from holdfast.errors import UserError
from holdfast.models import MODELS, Classifier, build, default_model, logits_only
from holdfast.models.fastconvnet import PatchWhitening
from holdfast.models.heads import HEADS
from holdfast.outputs import Outputs

SMALLEST = {
    "linear": 1, "mlp": 1, "lipmlp": 1, "smallconv": 4, "madry": 4, "lipconv": 4, "convnet": 8, "smallcnn": 16,
    "preactresnet": 8, "preactresnet8": 16, "preactresnet18": 16, "resnet": 16, "resnet18": 16, "wideresnet": 16,
    "densenet": 16, "inception": 16, "fractalnet": 16, "stepnet": 8, "fastconvnet": 16,
}  # fmt: skip
LIGHT = [name for name in MODELS if SMALLEST[name] <= 8]  # for the small images that most tests use
DEEP = {  # as small as their settings let them be: what is tested here does not grow with depth
    "preactresnet": "preactresnet:depth=8",
    "wideresnet": "wideresnet:depth=10,width=1",
    "densenet": "densenet:depth=10,growth=4",
    "fractalnet": "fractalnet:blocks=2,columns=2",
    "fastconvnet": "fastconvnet:width=4",
}
SHAPES = {
    "preactresnet": [(1, 8, 8), (3, 9, 11), (3, 16, 16)],
    "preactresnet8": [(3, 16, 16), (1, 17, 19)],
    "preactresnet18": [(3, 16, 16), (1, 17, 19)],
    "linear": [(1, 1, 1), (3, 5, 4)],
    "mlp": [(1, 1, 1), (3, 5, 4)],
    "smallconv": [(1, 4, 4), (1, 8, 8), (3, 5, 7), (2, 9, 6)],
    "stepnet": [(1, 8, 8), (1, 28, 28)],
    "convnet": [(1, 8, 8), (1, 28, 28), (3, 11, 9), (2, 10, 13)],
    "lipmlp": [(1, 1, 1), (3, 5, 4)],
    "lipconv": [(1, 4, 4), (1, 28, 28), (3, 7, 9)],
    "madry": [(1, 4, 4), (1, 28, 28)],
    "resnet18": [(3, 16, 16), (1, 17, 19)],
    "inception": [(3, 16, 16), (1, 17, 19)],
    "fractalnet": [(3, 16, 16), (1, 17, 19)],
    "fastconvnet": [(3, 16, 16), (1, 17, 19), (2, 18, 16)],
}
TABLE = [(name, shape) for name in MODELS for shape in SHAPES.get(name, [(1, 28, 28), (3, 32, 32)])]


def pixels(n, shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "shape"), TABLE)
def test_images_go_in_and_finite_logits_come_out(name, shape):
    model = build(DEEP.get(name, name), shape, 7).eval()
    x = torch.cat([pixels(2, shape), torch.zeros(1, *shape), torch.ones(1, *shape)])
    kept = x.clone()
    with torch.no_grad():
        out = model(x)
        one = model(x[:1])
    assert isinstance(out, Outputs)
    assert out.logits.shape == (4, 7)
    assert out.logits.isfinite().all()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        with torch.no_grad():  # a batch norm that has seen no batch norms nothing: the statistics of this one
            assert copy.deepcopy(model).train()(x).logits.abs().max() < 1e3
    else:
        assert out.logits.abs().max() < 1e3
    assert out.features.shape == (4, model.backbone.features)
    assert torch.equal(x, kept)
    assert torch.allclose(one.logits, out.logits[:1], rtol=1e-4, atol=1e-5)
    assert out.logits[:2].std(0).max() > 0, "the answer does not depend on the image"


@pytest.mark.parametrize(("name", "shape"), [(n, SHAPES.get(n, [(3, 32, 32)])[-1]) for n in MODELS])
def test_features_says_how_many_there_are(name, shape):
    backbone = build(DEEP.get(name, name), shape, 3).backbone.eval()
    assert isinstance(backbone, nn.Module)
    with torch.no_grad():
        h = backbone(pixels(2, shape))
    assert h.shape == (2, backbone.features)
    with torch.no_grad():
        assert backbone(pixels(0, shape)).shape == (0, backbone.features)


@pytest.mark.parametrize("head", list(HEADS))
def test_every_backbone_takes_every_head(head):
    for name in LIGHT:
        shape = (1, 10, 10)
        model = build(name, shape, 3, head=head).train()
        out = model(pixels(4, shape))
        assert out.logits.shape == (4, 3)
        (out.logits.sum() + (0 if out.distances is None else out.distances.sum())).backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("linear", (1, 8, 8), 650),
        ("mlp", (1, 28, 28), 269322),
        ("convnet", (1, 28, 28), 166406),
        ("stepnet", (1, 28, 28), 166406),
        ("preactresnet8", (3, 32, 32), 77850),
        ("fastconvnet", (3, 32, 32), 457770),
        ("preactresnet18", (3, 32, 32), 11172170),
        ("resnet:depth=20", (3, 32, 32), 269722),
        ("resnet:depth=110", (3, 32, 32), 1727962),
        ("resnet18", (3, 32, 32), 11173962),
        ("wideresnet:depth=28,width=10", (3, 32, 32), 36479194),
        ("wideresnet:depth=34,width=10", (3, 32, 32), 46160474),
        ("densenet:depth=100,growth=12", (3, 32, 32), 769162),
        ("inception", (3, 32, 32), 6166250),
        ("fractalnet", (3, 32, 32), 33724618),  # by the paper's text; its table says 38.6M
    ],
)
def test_as_many_parameters_as_the_literature_counts(name, shape, parameters):
    with torch.device("meta"):  # shapes alone: nothing is drawn
        assert count(build(name, shape, 10)) == parameters


def test_fractal_columns_count_as_the_rule_says():
    """Column c has 2^c convolutions of each block; the first of each column reads what the block before wrote."""
    for columns in (1, 2, 4):
        widths, conv = [3, 64, 128, 256, 512, 512], 2**columns - 1
        by_hand = 512 * 10 + 10
        for a, b in itertools.pairwise(widths):
            by_hand += 9 * b * (columns * a + (conv - columns) * b) + conv * 2 * b
        with torch.device("meta"):
            assert count(build(f"fractalnet:columns={columns}", (3, 32, 32), 10)) == by_hand


@pytest.mark.parametrize("name", list(MODELS))
def test_the_parameter_count_in_the_docstring_is_the_count(name):
    import re

    found = re.search(r"([\d,]+) parameters on (28x28|three channels)", MODELS[name].__doc__ or "")
    if found:
        shape = (1, 28, 28) if found[2] == "28x28" else (3, 32, 32)
        with torch.device("meta"):
            assert count(build(name, shape, 10)) == int(found[1].replace(",", ""))


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("head", list(HEADS))
def test_one_seed_one_network_and_no_one_elses_numbers(name, head):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build(name, (1, 8, 8), 4, head=head, seed=3).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(77)
    again = build(name, (1, 8, 8), 4, head=head, seed=3).state_dict()
    assert list(first) == list(again)
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = build(name, (1, 8, 8), 4, head=head, seed=4).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_generator_is_left_alone_when_the_build_fails():
    state = torch.random.get_rng_state()
    with pytest.raises(UserError):
        build("mlp", (1, 8, 8), 4, head="cosine", head_settings={"scale": -1.0})
    assert torch.equal(state, torch.random.get_rng_state())


# ------------------------------------------------------------------------------------------------------- normalisation


def test_normalisation_is_layer_0():
    mean, std = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    shape = (3, 8, 8)
    plain, normalised = (build("smallconv", shape, 4, **few).eval() for few in ({}, {"mean": mean, "std": std}))
    x = pixels(3, shape)
    with torch.no_grad():
        by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
        assert torch.allclose(normalised(x).logits, plain(by_hand).logits, atol=1e-6)
        assert not torch.allclose(normalised(x).logits, plain(x).logits, atol=1e-3)
    seen = []
    normalised.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        normalised(x)
    assert torch.allclose(seen[0], by_hand, atol=1e-6)


def test_mean_and_std_travel_with_the_weights_and_are_not_trained():
    model = build("linear", (3, 2, 2), 2, mean=torch.full((3,), 0.5), std=torch.full((3,), 0.25))
    tensors = model.state_dict()
    assert tensors["mean"].flatten().tolist() == [0.5] * 3
    assert tensors["std"].flatten().tolist() == [0.25] * 3
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}
    bare = build("linear", (3, 2, 2), 2, seed=9)
    bare.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(bare(pixels(2, (3, 2, 2))).logits, model(pixels(2, (3, 2, 2))).logits)


def test_without_mean_and_std_the_pixels_go_in_as_they_are():
    model = build("linear", (1, 2, 2), 3)
    x = pixels(2, (1, 2, 2))
    with torch.no_grad():
        expected = x.flatten(1) @ model.head.linear.weight.T + model.head.linear.bias
        assert torch.allclose(model(x).logits, expected, atol=1e-6)
        assert torch.equal(model(x).features, x.flatten(1))


@pytest.mark.parametrize("key", ["mean", "std"])
def test_one_number_a_channel(key):
    """(3,) on one channel would broadcast to three, and the network would fail at its first image, or not at all."""
    with pytest.raises(UserError, match=key):
        build("linear", (1, 4, 4), 2, **{key: torch.full((3,), 0.5)})


# ---------------------------------------------------------------------------------------------- eval mode and gradients


@pytest.mark.parametrize("name", list(MODELS))
def test_eval_mode_is_a_function_of_each_image_alone(name):
    shape = SHAPES[name][0] if name in SHAPES else (3, 32, 32)
    model = build(DEEP.get(name, name), shape, 3).double().eval()
    x = pixels(4, shape).double()
    with torch.no_grad():
        z = model(x).logits
        assert torch.equal(z, model(x).logits)
        assert torch.allclose(z, torch.cat([model(row[None]).logits for row in x]), rtol=1e-9, atol=1e-9)
        assert torch.allclose(z.flip(0), model(x.flip(0)).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LIGHT)
def test_a_gradient_reaches_the_image_and_every_weight(name):
    model = build(name, (1, 8, 8), 3).double()
    x = pixels(3, (1, 8, 8)).double().requires_grad_()
    model(x).logits.square().sum().backward()
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad.norm() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LIGHT])
def test_a_deep_network_has_a_gradient_for_every_weight_in_train_mode(name):
    model = build(DEEP.get(name, name), (3, 16, 16), 3).train()
    torch.manual_seed(0)  # drop-path and dropout draw from torch's own generator
    out = model(pixels(4, (3, 16, 16)))
    assert out.logits.abs().max() < 1e3
    out.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_classifier_is_a_backbone_and_a_head():
    model = build("mlp", (1, 8, 8), 3, head="cosine", head_settings={"scale": 5.0})
    assert isinstance(model, Classifier)
    assert type(model.head) is HEADS["cosine"]
    assert model.head.scale == 5.0
    assert type(model.backbone) is MODELS["mlp"]
    assert {name.split(".")[0] for name in model.state_dict()} == {"mean", "std", "backbone", "head"}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_names_that_do_not_exist():
    with pytest.raises(UserError, match=r"unknown model 'resnet81'. Did you mean 'resnet18'.*Known:.*mlp"):
        build("resnet81", (3, 32, 32), 10)
    with pytest.raises(UserError, match=r"unknown head 'cosin'. Did you mean 'cosine'"):
        build("mlp", (1, 8, 8), 10, head="cosin")


@pytest.mark.parametrize("name", [name for name, side in SMALLEST.items() if side > 1])
def test_images_that_are_too_small(name):
    side = SMALLEST[name]
    for height, width in ((side - 1, side), (side, side - 1)):
        with pytest.raises(
            UserError, match=f"'{name}' needs images of at least {side}x{side}, got {height}x{width}. Try"
        ):
            build(name, (1, height, width), 10)


@pytest.mark.parametrize("classes", [1, 0, -1])
def test_fewer_than_two_classes(classes):
    with pytest.raises(UserError, match=f"at least 2 classes, got {classes}"):
        build("mlp", (1, 8, 8), classes)


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        ("linear", {"scale": 2.0}, "'linear' does not take these settings.*scale"),
        ("cosine", {"scal": 2.0}, "'cosine' does not take these settings.*scal"),
        ("cosine", {"scale": 0.0}, "scale.*> 0"),
        ("mmc", {"radius": -1.0}, "radius > 0"),
        ("mmc", {"radius": math.nan}, "radius"),
        ("gaussian", {"radius": 1.0}, "'gaussian' does not take"),
    ],
)
def test_settings_that_a_head_does_not_take(head, settings, message):
    with pytest.raises(UserError, match=message):
        build("mlp", (1, 8, 8), 4, head=head, head_settings=settings)


def test_the_network_for_a_size_exists_and_takes_it():
    for shape in [
        (1, 4, 4),
        (1, 8, 8),
        (3, 16, 16),
        (1, 17, 17),
        (3, 28, 28),
        (1, 28, 28),
        (1, 64, 64),
        (3, 32, 32),
        (3, 9, 40),
    ]:
        name = default_model(shape)
        assert name in MODELS
        assert SMALLEST[name] <= min(shape[1:])


def test_a_cpu_gets_a_network_that_it_can_train():
    """PreActResNet-18 takes a core hours for what the convnet does in minutes; a GPU keeps it."""
    for side in (32, 64, 224):
        assert default_model((3, side, side), "cpu") == "convnet"
        assert default_model((3, side, side), "cuda:1") == "preactresnet18"
    assert default_model((1, 8, 8), "cpu") == default_model((1, 8, 8), "cuda") == "smallconv"


# Tools that know no Outputs


@pytest.fixture
def digits_net():
    return build("smallconv", (1, 8, 8), 10, head="cosine", mean=torch.tensor([0.3]), std=torch.tensor([0.4])).eval()


def test_logits_only_is_the_same_network(digits_net):
    x = torch.rand(3, 1, 8, 8)
    plain = logits_only(digits_net)
    assert torch.equal(plain(x), digits_net(x).logits)
    assert not plain.training
    assert next(plain.parameters()) is next(digits_net.parameters())
    assert logits_only(digits_net.train()).training
    assert torch.equal(logits_only(nn.Flatten())(x), x.flatten(1))
    with pytest.raises(UserError, match="torch module"):
        logits_only(lambda x: x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch about itself
def test_it_can_be_traced_exported_and_read_back(digits_net, tmp_path):
    from holdfast.importers import ModelSource, open_model

    x, plain = torch.rand(4, 1, 8, 8), logits_only(digits_net)
    torch.testing.assert_close(torch.jit.trace(plain, x)(x), plain(x))
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(plain, (x,), dynamic_shapes=({0: batch},)), tmp_path / "net.pt2")
    torch.testing.assert_close(open_model(ModelSource(str(tmp_path / "net.pt2")))(x), plain(x))
    torch.testing.assert_close(torch.func.functional_call(plain, dict(plain.named_parameters()), (x,)), plain(x))


@pytest.mark.filterwarnings("ignore")  # what these packages warn of is theirs
def test_foolbox_and_torchattacks_take_it(digits_net):
    foolbox, torchattacks = pytest.importorskip("foolbox"), pytest.importorskip("torchattacks")
    x, plain = torch.rand(4, 1, 8, 8), logits_only(digits_net)
    y = plain(x).argmax(1)
    assert torchattacks.PGD(plain, eps=0.3, alpha=0.1, steps=5)(x, y).shape == x.shape
    model = foolbox.PyTorchModel(plain, bounds=(0, 1))
    assert foolbox.attacks.LinfPGD(steps=5)(model, x, y, epsilons=0.3)[1].shape == x.shape


@pytest.mark.parametrize(
    "name",
    [
        "mlp:width=99999999999",
        "wideresnet:depth=6000000004",
        "fractalnet:columns=40",
        "densenet:growth=100000000",
        "lipmlp:width=99999999998",
        "mlp:width=1" + "0" * 40,
    ],
)
def test_a_network_too_large_for_memory_is_refused_before_it_is_built(name):
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"has more than 1,000,000,000 parameters|cannot be built for images"):
        build(name, (3, 32, 32), 10)
    assert time.perf_counter() - began < 60


def test_counting_its_parameters_changes_no_weight_and_no_random_state():
    before = torch.random.get_rng_state()
    a, b = build("convnet", (1, 28, 28), 10, seed=3), build("convnet", (1, 28, 28), 10, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        alone = MODELS["convnet"]((1, 28, 28))
    assert all(torch.equal(p, q) for p, q in zip(a.backbone.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_patch_whitening_loses_nothing_and_brings_every_component_to_variance_1(channels):
    whitening = PatchWhitening(channels).train()
    x = pixels(50, (channels, 9, 9))
    filters = whitening.filters.flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(4 * channels))  # orthonormal: a rotation of the patch
    positive, negative = whitening(x).chunk(2, 1)
    variances = positive.sub(negative).var((0, 2, 3), correction=0)
    torch.testing.assert_close(variances, torch.ones(4 * channels), rtol=1e-3, atol=0)
    assert positive.shape == (50, 4 * channels, 8, 8)
    assert (positive * negative == 0).all()
