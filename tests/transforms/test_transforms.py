"""Rotations, patches and corruptions evaluated: against exhaustive search and closed forms, resumed, and as a user."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from holdfast import results
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.losses import negative_margin
from holdfast.noise import Noise
from holdfast.queries import CountingModel
from holdfast.results import corruption_tables, rows
from holdfast.threat import Threat
from holdfast.transforms import Corrupted, Patch, Spatial, corrupt, evaluate, move, parse, worst_move, worst_patch
from holdfast.transforms import evaluation as module
from holdfast.transforms.evaluation import corruption_noise
from holdfast.transforms.filters import gaussian_blur
from holdfast.transforms.patch import mask_of, places_of


def data_of(x, y):
    return Data(x, y, torch.arange(len(y)))


def test_texts():
    assert parse("rotation:30,translation:3") == parse(" Translation:3 , rotation:30") == (Spatial(30, 3),)
    assert parse("translation:1/2") == (Spatial(0, 0.5),)
    assert parse("patch:5") == parse("patch:5x5") == (Patch(5, 5),)
    assert [one.severity for one in parse("corruptions")] == [1, 2, 3, 4, 5]
    assert parse("fog:2") == (Corrupted(2, ("fog",)),)
    for wrong in (
        "rotation", "rotation:x", "patch:5x", "patch:ax5", "rotation:3,rotation:4", "patch:5,rotation:3", "fog:x",
        "corruptions:3,fog:2", "rotation:30,fog:3", "linf:0.1",
    ):  # fmt: skip
        with pytest.raises(UserError, match="cannot read the threat"):
            parse(wrong)
    for wrong in ("rotation:181", "translation:-1", "rotation:0", "patch:0", "corruptions:6", "fog:1.5"):
        with pytest.raises(UserError):
            parse(wrong)
    with pytest.raises(UserError, match="no norm ball"):
        Threat.parse("patch:5x5")


def test_a_rotation_by_quarter_turns_and_a_shift_by_whole_pixels_are_exact():
    x = torch.rand(2, 3, 7, 7)
    turned = move(x, torch.tensor([[90.0, 0, 0], [180.0, 0, 0]]))
    assert torch.allclose(turned[0], x[0].rot90(1, (1, 2)), atol=1e-4)
    assert torch.allclose(turned[1], x[1].rot90(2, (1, 2)), atol=1e-4)
    shifted = move(x, torch.tensor([[0.0, 2, 0], [0.0, 0, -3]]))
    assert torch.allclose(shifted[0, :, 2:], x[0, :, :-2], atol=1e-5)
    assert bool((shifted[0, :, :2] == 0).all())
    assert torch.allclose(shifted[1, :, :, :-3], x[1, :, :, 3:], atol=1e-5)


def test_gradient_steps_stay_in_the_threat_and_lose_nothing(digits):
    net, x, y = digits
    threat = Spatial(6, 0.4)

    def margins(found):
        with torch.no_grad():
            return -negative_margin(net(move(x, found)), y)

    coarse = {"angles": 3, "shifts": 3}
    grid, beyond = (worst_move(net, x, y, threat, steps=steps, **coarse) for steps in (0, 10))
    assert bool((beyond.abs() <= torch.tensor([6, 0.4, 0.4]) * (1 + 1e-6)).all())
    assert bool((margins(beyond) <= margins(grid) + 1e-4).all())


def test_gradient_steps_reach_what_lies_between_the_points_of_the_grid():
    """A network that is nearest to a mistake where the image is its own, turned by 7 degrees and moved by a part."""
    x = gaussian_blur(torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)), 1.5)
    hidden = torch.tensor([[7.0, 0.3, -0.6]])
    template = move(x, hidden)

    def net(x):
        return torch.stack([torch.ones(len(x)), -(x - template).square().flatten(1).sum(1)], 1)

    far, near = (
        worst_move(net, x, torch.zeros(1, dtype=torch.int64), Spatial(20, 1), angles=5, shifts=3, steps=steps)
        for steps in (0, 40)
    )
    assert float((far - hidden).abs().max()) > 2
    assert float((near - hidden).abs().max()) < 0.6


def test_the_worst_move_is_that_of_an_exhaustive_search(digits):
    net, x, y = digits
    found = worst_move(net, x, y, Spatial(20), angles=9, steps=0)
    with torch.no_grad():
        turns = [torch.tensor([[a, 0.0, 0.0]]).expand(len(x), 3) for a in range(-20, 21, 5)]
        every = torch.stack([negative_margin(net(move(x, turn)), y) for turn in turns])
        broken = negative_margin(net(move(x, found)), y) > 0
    assert broken.tolist() == (every.amax(0) > 0).tolist()
    assert broken.any()
    assert not broken.all()


def one_pixel(place):
    """A network that is wrong about class 0 where one pixel is above a half."""

    def net(x):
        value = x[:, 0, place[0], place[1]]
        return torch.stack([0.5 - value, value - 0.5], 1)

    return net


def test_a_patch_breaks_what_it_covers_and_nothing_else():
    x, y = torch.zeros(3, 1, 12, 12), torch.zeros(3, dtype=torch.int64)
    x_adv, place = worst_patch(one_pixel((7, 4)), x, y, Patch(3, 2), noise=Noise(0, torch.arange(3)))
    inside = mask_of(x, place, Patch(3, 2)) > 0
    assert inside.sum((1, 2, 3)).tolist() == [6, 6, 6]
    assert bool((x_adv == x)[~inside].all())
    assert bool((x_adv[:, 0, 7, 4] > 0.5).all())
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())


def test_two_pixels_far_apart_are_out_of_reach():
    def net(x):
        both = torch.minimum(x[:, 0, 0, 0], x[:, 0, 11, 11])
        return torch.stack([0.5 - both, both - 0.5], 1)

    x, y = torch.full((2, 1, 12, 12), 0.4), torch.zeros(2, dtype=torch.int64)
    assert evaluate(net, data_of(x, y), Patch(4, 4))[0].robust.all()
    assert not evaluate(one_pixel((5, 5)), data_of(x, y), Patch(4, 4))[0].robust.any()


def test_a_patch_is_as_strong_as_the_closed_form_for_a_linear_network():
    """Of a linear network, the worst values in each place are corners: what all of them gain is known."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(20, 1, 8, 8)
    weight = (net[1].weight[1] - net[1].weight[0]).detach().view(8, 8)
    with torch.no_grad():
        y = net(x).argmax(1)
        slope = torch.where(y == 0, 1.0, -1.0)[:, None, None] * weight
        gain = torch.where(slope > 0, slope * (1 - x[:, 0]), -slope * x[:, 0])
        reach = nn.functional.avg_pool2d(gain[:, None], 2, 1).flatten(1).amax(1) * 4
        wanted = reach + negative_margin(net(x), y) > 0
    found = evaluate(net, data_of(x, y), "patch:2x2")[0]
    assert wanted.any()
    assert not wanted.all()
    assert found.robust.tolist() == (~wanted).tolist()


def test_places_are_all_or_a_grid_with_its_corners():
    assert len(places_of(Patch(3, 3), (8, 8))) == 36
    few = places_of(Patch(5, 5), (32, 28))
    assert len(few) <= 64
    for corner in ([0, 0], [27, 0], [0, 23], [27, 23]):
        assert corner in few.tolist()
    assert len(places_of(Patch(1, 1), (1, 1000))) <= 64
    assert len(places_of(Patch(1, 1), (8, 8), most=1)) == 1


def test_corrupted_accuracies_are_those_of_the_corrupted_images(digits):
    net, x, y = digits
    found = evaluate(net, data_of(x, y), "corruptions:4", seed=3)[0]
    noise, right = corruption_noise(3, torch.arange(len(x))), torch.ones_like(y, dtype=torch.bool)
    for kind, correct in found.correct.items():
        with torch.no_grad():
            wanted = net(corrupt(x, kind, 4, noise=noise)).argmax(1) == y
        assert correct.tolist() == wanted.tolist()
        right &= wanted
    assert found.robust.tolist() == right.tolist()
    assert 0 < int(found.robust.sum()) < len(y)
    assert found.mean_accuracy == pytest.approx(sum(float(c.double().mean()) for c in found.correct.values()) / 15)


@pytest.mark.parametrize("threat", ["corruptions:5", "rotation:25,translation:1", "patch:2x2"])
def test_what_was_found_is_made_again_and_fools(digits, threat):
    net, x, y = digits
    found = evaluate(net, data_of(x, y), threat)[0]
    broken = torch.nonzero(found.broken_by >= 0)[:, 0]
    assert len(broken)
    images = found.x_adv(x, broken)
    with torch.no_grad():
        assert net(images).argmax(1).tolist() == found.prediction_adv[broken].tolist()
    assert bool((found.prediction_adv[broken] != y[broken]).all())
    assert sum(stage.broken for stage in found.stages) == len(broken)


@pytest.mark.parametrize("threat", ["fog", "rotation:10", "patch:2x2"])
def test_batches_do_not_matter(digits, threat):
    net, x, y = digits
    one, other = (evaluate(net, data_of(x[:12], y[:12]), threat, batch_size=size)[0] for size in (12, 5))
    assert one.robust.tolist() == other.robust.tolist()
    assert torch.allclose(one.margin_adv, other.margin_adv, atol=1e-3)


def test_an_interrupted_evaluation_resumes(digits, tmp_path, monkeypatch):
    net, x, y = digits
    data, file = data_of(x, y), tmp_path / "work.safetensors"
    monkeypatch.setattr(module, "next_save", lambda began: 0.0)  # after each batch

    def stop(what, done, total):
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(net, data, "corruptions:5", batch_size=10, checkpoint=file, key="k", progress=stop)
    counted = CountingModel(net)
    resumed = evaluate(counted, data, "corruptions:5", batch_size=10, checkpoint=file, key="k")[0]
    whole = evaluate(net, data, "corruptions:5", batch_size=10)[0]
    assert resumed.robust.tolist() == whole.robust.tolist()
    assert resumed.parameters.tolist() == whole.parameters.tolist()
    assert [(s.attacked, s.broken, s.forwards) for s in resumed.stages] == [
        (s.attacked, s.broken, s.forwards) for s in whole.stages
    ]
    assert counted.forwards <= 20 * 16 + 2 * len(x)
    again = CountingModel(net)
    evaluate(again, data, "corruptions:5", checkpoint=file, key="k")
    assert again.forwards <= 2 * len(x)
    with pytest.raises(UserError, match="belongs to another evaluation"):
        evaluate(net, data, "corruptions:4", checkpoint=file, key="k")


def test_what_cannot_be_evaluated_is_refused(digits):
    net, x, y = digits
    data = data_of(x, y)
    for threat, why in (("patch:8x8", "covers"), ("patch:9x2", "does not fit"), ("translation:8", "all of it out")):
        with pytest.raises(UserError, match=why):
            evaluate(net, data, threat)
    with pytest.raises(UserError, match="at least 8x8"):
        evaluate(net, data_of(x[..., :4], y), "fog")
    with pytest.raises(UserError, match="empty"):
        evaluate(net, data_of(x[:0], y[:0]), "fog")
    with pytest.raises(UserError, match="answers the same image differently"):
        evaluate(lambda x: net(x) + torch.rand(len(x), 10), data, "fog")
    with pytest.raises(UserError, match="the threat must be a text"):
        evaluate(net, data, 3)
    with pytest.raises(UserError, match="box"):
        evaluate(net, data_of(2 * x, y), "fog")


def test_a_user_evaluates_reports_and_gates(holdfast_, copied_run, tmp_path, monkeypatch):
    copied_run("sce")
    monkeypatch.chdir(tmp_path)
    folders = []
    for threat, name in (("corruptions", "corruptions"), ("rotation:10,translation:0.5", "rotation10-translation0.5"),
                         ("patch:2x2", "patch2x2")):  # fmt: skip
        status, said, _ = holdfast_("evaluate", "run", "--threat", threat)
        assert status == 0
        assert "robust, 95%" in said
        folders.append(f"run/evaluation-{name}")
        stored = results.load(tmp_path / folders[-1])
        assert all(run.verdict is None and run.samples is not None for run in stored.runs)
        assert stored.runs[0].examples
    tables = corruption_tables(results.load(tmp_path / folders[0]))
    assert tables[0].severities == (1, 2, 3, 4, 5)
    assert len(tables[0].accuracy) == 15
    assert [row.threat for row in rows(results.load(tmp_path / folders[2]))] == ["patch 2x2"]
    status, said, _ = holdfast_("report", *folders, "--out", "all", "--figures", "figures")
    assert status == 0
    page = (tmp_path / "all" / "report.html").read_text()
    assert "<h2>Corruptions</h2>" in page
    assert "patch 2x2" in page
    assert (tmp_path / "figures" / "corruptions.svg").exists()
    assert "gaussian_noise" in (tmp_path / "figures" / "table.csv").read_text()
    status, _, _ = holdfast_("evaluate", "run", "--threat", "patch:2x2", "--require", "robust>=0.99", "-q")
    assert status == 3
    status, _, error = holdfast_("replay", folders[2])
    assert status == 2
    assert "evaluated under patch 2x2" in error


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--suite", "quick"), "--suite is for threats in a norm"),
        (("--budget", "1min"), "--budget is for threats in a norm"),
        (("--proofs", "crown"), "--proofs is for threats in a norm"),
        (("--attack", "fab"), "--attack is for threats in a norm"),
        (("--require", "certified>=0.1"), "measures no certified"),
        (("--require", "verdict=tight"), "measures no verdict"),
    ],
)
def test_options_of_norms_are_refused_before_anything_is_written(holdfast_, copied_run, tmp_path, words, why):
    run = tmp_path / "run"
    copied_run("sce")
    before = sorted(run.iterdir())
    status, _, error = holdfast_("evaluate", run, "--threat", "patch:2x2", *words)
    assert status == 2
    assert why in error
    assert sorted(run.iterdir()) == before


def test_json_on_stdout(holdfast_, copied_run, tmp_path):
    copied_run("sce")
    status, said, _ = holdfast_("evaluate", tmp_path / "run", "--threat", "fog:5", "--limit", "30", "--json")
    assert status == 0
    run = json.loads(said)["runs"][0]
    assert run["threat"]["text"] == "fog 5"
    assert set(run["attacks"]) == {"fog"}
