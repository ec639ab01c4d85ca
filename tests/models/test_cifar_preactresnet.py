"""preactresnet: its parameters counted by hand, its standardisation, and batch norms with two kinds of statistics."""

import math

import pytest
import torch
from torch import nn

from holdfast.checks import PGD50, ROBUST, Claim, audit, judge
from holdfast.data import pixels
from holdfast.errors import UserError
from holdfast.evaluation import Stage, evaluate
from holdfast.models import build, with_statistics
from holdfast.models.cifar_preactresnet import PerImageStandardised


@pytest.mark.parametrize("depth", [8, 32])
def test_parameters_by_hand(depth):
    n = (depth - 2) // 6
    by_hand = 3 * 9 * 16  # the stem, without a bias
    for width_in, width in ((16, 16), (16, 32), (32, 64)):
        blocks = [(width_in if i == 0 else width, width) for i in range(n)]
        by_hand += sum(2 * a + 9 * a * b + 2 * b + 9 * b * b for a, b in blocks)  # the shortcuts have none
    by_hand += 2 * 64 + (64 * 64 + 64) + (64 * 10 + 10)  # last batch norm, dense layer, head
    with torch.device("meta"):
        model = build(f"preactresnet:depth={depth}", (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == by_hand
    assert model.backbone.features == 64


def test_each_image_is_standardised_as_tensorflow_does_it():
    x = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = 0.5 + 1e-6 * (x[1] - 0.5)  # nearly constant: divided by 1 / sqrt(40), not by its deviation
    x[2] = 0.25
    x.requires_grad_()
    out = PerImageStandardised()(x)
    for image, standardised in zip(x.detach(), out.detach(), strict=True):
        std = max(float(image.std(correction=0)), 1 / math.sqrt(40))
        torch.testing.assert_close(standardised, (image - image.mean()) / std)
    assert out[2].abs().max() == 0
    (grad,) = torch.autograd.grad(out[:, 0, 0, 0].sum(), x)
    assert grad.isfinite().all()
    assert (grad.flatten(1).norm(dim=1) > 0).all()


def test_what_layer_0_does_to_all_pixels_alike_is_cancelled():
    """So of a mean image only its pattern is missing, and of one std per channel only their ratios remain."""
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, normalised = (
        build("preactresnet:depth=8", (3, 8, 8), 4, **few).eval()
        for few in ({}, {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)})
    )
    torch.testing.assert_close(plain(x).logits, normalised(x).logits, rtol=1e-4, atol=1e-5)


def test_the_shortcut_is_the_mean_of_two_by_two_pixels_between_channels_of_zeros():
    block = build("preactresnet:depth=8", (1, 8, 8), 4).backbone.blocks.blocks[1]
    x = torch.arange(16.0 * 16).view(1, 16, 4, 4)
    kept = block.shortcut(x)
    assert kept.shape == (1, 32, 2, 2)
    assert kept[0, :8].abs().max() == kept[0, 24:].abs().max() == 0
    assert torch.equal(kept[0, 8:24, 0, 0], x[0, :, :2, :2].mean((1, 2)))
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), kept)


def test_batch_statistics_are_those_of_the_current_batch_in_eval_mode_too(batch_statistics):
    net, split = batch_statistics
    x = pixels(split.test.x[:64])
    running = with_statistics(net, "running")
    with torch.no_grad():
        assert not torch.allclose(net(x).logits[:8], net(x[:8]).logits, atol=0.1)
        torch.testing.assert_close(running(x).logits[:8], running(x[:8]).logits)
        expected = running.train()(x).logits
        torch.testing.assert_close(net(x).logits, expected)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        net(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    again = build("preactresnet:depth=8", split.shape, 10).eval()
    again.load_state_dict(before)  # the weights of one are the weights of the other
    running = with_statistics(net, "running")
    with torch.no_grad():
        assert torch.equal(again(x).logits, running(x).logits)


def test_with_batch_statistics_the_measurement_is_void_with_running_ones_it_is_not(batch_statistics):
    net, split = batch_statistics
    test = split.test.take(slice(0, 16))
    suite = (Stage("apgd", "apgd", settings={"steps": 5}),)
    status = {}
    for statistics in ("batch", "running"):
        model = with_statistics(net, statistics)
        found = evaluate(model, test, "linf:0.02", suite, trained_with="isce_c")
        queried = audit(model, test, found, trained_with="isce_c")
        robust = queried.evaluation.robust.tolist()
        claims = [Claim(ROBUST, found.robust.tolist()), Claim(PGD50, found.pgd50.tolist())]
        status[statistics] = [judge(claim, robust, queried.findings).status for claim in claims]
    assert status["batch"] == ["void", "void"]
    assert "void" not in status["running"]


def test_what_it_refuses(digits):
    with pytest.raises(UserError, match=r"unknown statistics of model 'preactresnet' 'mean'.*Known: batch, running"):
        build("preactresnet:statistics=mean", (3, 32, 32), 10)
    with pytest.raises(UserError, match=r"depth of model 'preactresnet' must be 6n \+ 2"):
        build("preactresnet:depth=18", (3, 32, 32), 10)
    with pytest.raises(UserError, match="cannot be switched"):
        with_statistics(digits[0], "running")
    with pytest.raises(UserError, match="unknown statistics 'none'"):
        with_statistics(build("preactresnet:depth=8", (1, 8, 8), 3), "none")
