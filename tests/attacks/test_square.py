"""Square attack: its own squares for every sample, on the sphere and in the threat, and no need of gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import PointRecorder, SmallNet, noise_of, random_images, survivors, unbreakable

from holdfast.attacks import random_noise, square
from holdfast.errors import UserError
from holdfast.losses import negative_log_odds, negative_margin
from holdfast.threat import Threat

EPS = {"linf": 0.15, "l2": 0.8, "l1": 3.0}
FAR = {"lo": -1e3, "hi": 1e3}  # a box that no step comes near


@pytest.mark.parametrize("first", [0.0, -0.5, 1.5])
def test_the_first_square_is_a_share_of_the_image(first):
    x, y = random_images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="p_init"):
        square(SmallNet(), x, y, Threat("linf", 0.1), score=negative_log_odds, noise=noise_of(2), p_init=first)


def test_square_says_what_it_is_defined_for():
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="linf and l2"):
        square(SmallNet(), random_images(2), y, Threat("l1", 1.0), score=negative_log_odds, noise=noise_of(2))
    with pytest.raises(UserError, match=r"images, got linf, \(2, 36\)"):
        square(
            SmallNet(), random_images(2).flatten(1), y, Threat("linf", 0.1), score=negative_log_odds, noise=noise_of(2)
        )


def quantised(net):
    """Four grey levels: a gradient that is zero everywhere, and hides nothing from one who asks for answers only."""
    return lambda x: net((x * 3).round() / 3)


def test_square_breaks_what_only_hides_its_gradient(many_digits):
    net, x, y = many_digits
    model, threat = quantised(net), Threat("linf", 0.2)
    with torch.no_grad():
        right = net((x * 3).round() / 3).argmax(1) == y
    x, y = x[right][:100], y[right][:100]
    by_pgd = survivors("pgd", model, x, y, threat, score=negative_log_odds, steps=20, random_start=False)
    by_square = survivors("square", model, x, y, threat, score=negative_margin, steps=120)
    assert by_pgd.all()
    assert int(by_square.sum()) < 60


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_gives_every_sample_its_own_squares(many_digits, norm):
    """AutoAttack draws one window for the whole batch; here two samples of a batch are as each alone."""
    net, x, y = many_digits
    # Far from any mistake, so that every query is asked.
    model = PointRecorder(lambda x: net(x) * 1e-2 + 10 * F.one_hot(y[:2][: len(x)], 10) if len(x) == 2 else alone(x))

    def alone(x):
        return net(x) * 1e-2 + 10 * F.one_hot(y[row : row + 1], 10)

    row, threat, noise, steps = 0, Threat(norm, 0.3), noise_of(2), 40
    both = square(model, x[:2], y[:2], threat, score=negative_margin, noise=noise, steps=steps)
    together = model.points
    assert [len(points) for points in together] == [2] * steps
    for row in range(2):
        model.points = []
        one = slice(row, row + 1)
        x_adv = square(model, x[one], y[one], threat, score=negative_margin, noise=noise[one], steps=steps)
        assert torch.allclose(x_adv, both[one], rtol=0, atol=1e-6)
        for points, mine in zip(together, model.points, strict=True):
            assert torch.allclose(points[one], mine, rtol=0, atol=1e-6)


def box_of(changed):
    """(top, bottom, left, right) of the true cells of (C, H, W)."""
    cells = torch.nonzero(changed.any(0))
    return (*cells.amin(0).tolist(), *cells.amax(0).tolist()) if len(cells) else None


def test_square_changes_one_square_of_the_best_point_and_keeps_only_rises():
    """Read off from what it asks: each proposal differs from the best so far in one square, or it had kept a fall."""
    side, steps = 12, 60
    x = torch.full((3, 2, side, side), 0.5)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * side * side, generator=generator)

    def rugged(x):
        z = (x.flatten(1) @ weight) + (17 * x.flatten(1)).sin().sum(1)
        return torch.stack([1e4 - z, z * 0], 1)

    model, threat = PointRecorder(rugged), Threat("linf", 0.2)
    y = torch.zeros(3, dtype=torch.int64)
    x_adv = square(model, x, y, threat, score=negative_margin, noise=noise_of(3), steps=steps, p_init=0.3)
    assert len(model.points) == steps
    values = [negative_margin(rugged(points), y) for points in model.points]
    boxes, kept = [], torch.zeros(3, dtype=torch.int64)
    for row in range(3):
        best, best_value, sizes = model.points[0][row], values[0][row], []
        for query in range(1, steps):
            proposed = model.points[query][row]
            box = box_of(proposed != best)
            share = 0.3 / 2 ** (int(query > 10) + int(query > 50))
            assert box is None or max(box[2] - box[0], box[3] - box[1]) + 1 <= round((share * side * side) ** 0.5)
            sizes.append(box)
            if values[query][row] > best_value:
                best, best_value = proposed, values[query][row]
                kept[row] += 1
        boxes.append(sizes)
        assert torch.equal(x_adv[row], best)
        assert torch.allclose((best - x[row]).abs(), torch.tensor(0.2))
    assert (kept > 3).all()
    assert (kept < steps - 10).all()
    same = sum(a == b for a, b in zip(boxes[0], boxes[1], strict=True))
    assert same < steps / 2, "samples share their windows"


@pytest.mark.parametrize("channels", [1, 3])
def test_square_stays_on_the_l2_sphere(channels):
    """With the box out of reach every query has size eps: what one square gives up another takes."""
    x, eps = torch.zeros(4, channels, 9, 11), 0.7
    model = PointRecorder(lambda x: torch.stack([1e3 + x.flatten(1).sum(1) * 0, x.flatten(1)[:, :40].sum(1)], 1))
    threat = Threat("l2", eps, **FAR)
    x_adv = square(
        model, x, torch.zeros(4, dtype=torch.int64), threat, score=negative_log_odds, noise=noise_of(4), steps=80
    )
    for points in [*model.points, x_adv]:
        assert torch.allclose(threat.size(points - x), torch.full((4,), eps), rtol=1e-4)
    first, last = (p.flatten(1)[:, :40].sum(1) for p in (model.points[0], x_adv))
    assert (last > first).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_query_of_square_and_noise_is_in_the_threat(norm):
    x, threat = random_images(4), Threat(norm, EPS[norm])
    for run in (square, random_noise):
        model = PointRecorder(unbreakable)
        run(model, x, torch.zeros(4, dtype=torch.int64), threat, score=negative_log_odds, noise=noise_of(4), steps=30)
        assert all((threat.violation(points, x) == 0).all() for points in model.points)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (3, 1, 7), (2, 5, 3)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_takes_images_of_any_size(shape, norm):
    x, threat = torch.full((2, *shape), 0.5), Threat(norm, 0.2)
    y = torch.zeros(2, dtype=torch.int64)
    x_adv = square(unbreakable, x, y, threat, score=negative_log_odds, noise=noise_of(2), steps=15)
    assert (threat.violation(x_adv, x) == 0).all()
    assert not torch.equal(x_adv, x)
