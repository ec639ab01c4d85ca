"""Auto-PGD: the published loop, step by step, against a literal reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import SmallNet, island, noise_of, predicted_labels, random_images

from holdfast.attacks import apgd, fooled
from holdfast.attacks.apgd import _checkpoints
from holdfast.losses import negative_margin
from holdfast.outputs import Outputs
from holdfast.threat import Threat

EPS = {"linf": 0.15, "l2": 0.8}
FAR = {"lo": -1e3, "hi": 1e3}  # a box that no step comes near


def literal_apgd(model, x, y, threat, noise, steps, score):
    """Croce and Hein's loop for one sample, in plain Python, as field/attacks.md D1 writes it down."""
    length, ends, end = int(0.22 * steps), [], 0
    while end + length <= steps:
        end += length
        ends.append(end)
        length = max(length - max(int(0.03 * steps), 1), int(0.06 * steps), 1)

    def ask(point):
        point = point.detach().requires_grad_()
        value = score(model(point), y)
        return value.item(), torch.autograd.grad(value.sum(), point)[0]

    now = old = best = threat.random_start(x, noise)
    value, grad = ask(now)
    values, best_value, best_grad = [value], value, grad
    size, was_halved, judged, last = 2 * threat.eps, True, value, 0
    for i in range(1, steps + 1):
        z = threat.project(now + size * threat.ascent(grad), x)
        a = 1.0 if i == 1 else 0.75
        now, old = threat.project(now + a * (z - now) + (1 - a) * (now - old), x), now
        value, grad = ask(now)
        values.append(value)
        if value > best_value:
            best, best_value, best_grad = now, value, grad
        if i in ends:
            rose = sum(values[j] > values[j - 1] for j in range(last + 1, i + 1))
            if rose <= 0.75 * (i - last) or (not was_halved and best_value <= judged):
                size, was_halved = size / 2, True
                now, grad = best, best_grad
                values[-1] = best_value
            else:
                was_halved = False
            judged, last = best_value, i
    return best_value


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_is_the_published_loop(norm):
    """Every value on the path against a literal reference: 50 steps hold six periods and both reasons for halving."""
    net = SmallNet().double().eval()
    x, threat = random_images(4, dtype=torch.float64), Threat(norm, EPS[norm])
    y, noise = predicted_labels(net, x, wrong=False), noise_of(4)

    def lead(x):  # class y far ahead: nothing is fooled, so the loop runs to its end
        return net(x) * 3 + 50 * F.one_hot(y[: len(x)] if len(x) == 4 else y[row : row + 1], 4)

    row = 0
    x_adv = apgd(lead, x, y, threat, score=negative_margin, noise=noise, steps=50)
    reached = negative_margin(lead(x_adv), y)
    for row in range(4):
        one = slice(row, row + 1)
        start = noise.fold(0)[one]
        expected = literal_apgd(lead, x[one], y[one], threat, start, 50, negative_margin)
        assert reached[row].item() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.3, 0.95), st.sampled_from([20, 50]))
def test_apgd_walks_the_published_path_whatever_the_score_does(seed, rises, steps):
    """A scripted score: falls first, then rises without a new best, and all else that halves a step or does not."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.rand(steps + 1, generator=generator, dtype=torch.float64) < rises
    script = (torch.rand(steps + 1, generator=generator, dtype=torch.float64) * torch.where(up, 1.0, -3.0)).cumsum(0)
    pull = torch.randn(steps + 1, 1, 2, 2, generator=generator, dtype=torch.float64)
    threat, noise = Threat("l2", 1.0, **FAR), noise_of(1)
    x, y = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def walk(attack):
        points, turn = [], iter(range(steps + 1))

        def model(x):
            points.append(x.detach().clone())
            return Outputs(torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(len(x), 2), x)

        def score(out, y):
            k = next(turn)
            pulled = (out.features.flatten(1) * pull[k].flatten()).sum(1)
            return script[k] + pulled - pulled.detach()

        attack(model, score)
        return torch.cat(points)

    ours = walk(lambda model, score: apgd(model, x, y, threat, score=score, noise=noise, steps=steps))
    theirs = walk(lambda model, score: literal_apgd(model, x, y, threat, noise.fold(0), steps, score))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


def test_apgd_judges_progress_where_the_reference_does():
    assert _checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 5, 10, 20, 30, 50, 1000):
        ends = _checkpoints(steps)
        assert all(a < b for a, b in zip([0, *ends], ends, strict=False))
        assert all(end < steps for end in ends)


def test_apgd_judges_its_first_and_its_last_point():
    y, climb = torch.zeros(1, dtype=torch.int64), {"score": lambda out, y: out.features[:, 0]}
    for steps, where in ((1, (0.59, 0.61)), (5, (0.0, 0.5999))):
        x = torch.full((1, 1, 1, 1), 0.3)
        model, threat = island(*where), Threat("linf", 0.3)
        assert fooled(model(apgd(model, x, y, threat, noise=noise_of(1), steps=steps, **climb)).logits, y).all()
