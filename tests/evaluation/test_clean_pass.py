"""The clean pass: what it refuses, how it finds out how to query the model, and the order of target classes."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from tests.evaluation.helpers import THREAT, Threshold, numbers, threshold
from tests.helpers import SmallNet
from torch import nn

from holdfast.attacks import ATTACKS, AttackEntry
from holdfast.bracket import bracket
from holdfast.checks import audit
from holdfast.data import Data, DataWarning, from_arrays, load
from holdfast.errors import UserError
from holdfast.evaluation import distributed, evaluate
from holdfast.evaluation.suites import Stage
from holdfast.importers.wrapped import wrap
from holdfast.threat import Threat

FEW = (Stage("apgd", "apgd", settings={"steps": 2}),)
CLASSES = tuple("abcd")


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="the data set is empty"):
        evaluate(Threshold(), numbers([]), THREAT, FEW)


@pytest.mark.parametrize("values", [[0.5, 1.2], [-0.3, 0.5], [float("nan"), 0.5], [0.5, float("inf")]])
def test_pixels_outside_the_box(values):
    with pytest.raises(UserError, match=r"box \[0, 1\].*got values from.*inside the model"):
        evaluate(Threshold(), numbers(values), THREAT, FEW)


def test_uint8_pixels_outside_a_smaller_box():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    samples = Data(x, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    with pytest.raises(UserError, match=r"box \[0, 0.5\].*got values from 0 to 1\b"):
        evaluate(Threshold(), samples, Threat("linf", 0.1, 0.0, 0.5), FEW)


@pytest.mark.parametrize("y", [[0, 2], [-1, 0]])
def test_labels_without_a_logit(y):
    with pytest.raises(UserError, match=rf"returns 2 logits, but the labels range from {min(y)} to {max(y)}"):
        evaluate(Threshold(), numbers([0.9, 0.8], y), THREAT, FEW)


def test_one_logit_is_no_classifier():
    with pytest.raises(UserError, match="returns 1 logits"):
        evaluate(lambda x: x.flatten(1)[:, :1], numbers([0.9, 0.8]), THREAT, FEW)


def labelled(n, labels, classes=(), source="", model=None):
    """Random images under labels 0..labels-1 in turn."""
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    return Data(x, torch.arange(n) % labels, torch.arange(n), classes, source)


def test_a_logit_for_each_class_that_the_data_names():
    model = SmallNet().eval()  # 4 logits
    for classes in (CLASSES[:3], (*CLASSES, "e")):
        n = len(classes)
        with pytest.raises(UserError, match=rf"returns 4 logits, but mine has {n} classes \(a, b, c.*class_order="):
            evaluate(model, labelled(6, 3, classes, "mine"), THREAT, FEW)
        with pytest.raises(UserError, match=rf"returns 4 logits, but the data has {n} classes"):
            bracket(model, labelled(6, 3, classes), THREAT, seconds=0)
    with pytest.raises(UserError, match=r"a label of data is 2, but it names 2 classes"):
        evaluate(model, labelled(6, 3, CLASSES[:2]), THREAT, FEW)
    with pytest.raises(UserError, match=r"classes of data must be a tuple of texts"):
        evaluate(model, labelled(6, 3, 4), THREAT, FEW)
    mapped = wrap(model, class_order=(3, 1, 2, 0))
    assert len(evaluate(mapped, labelled(6, 3, CLASSES[:3]), THREAT, FEW).y) == 6


def test_classes_stay_with_a_selection_that_lacks_some():
    """Nothing is said of a network that knows classes which this part of a data set does not hold."""
    split = from_arrays(labelled(20, 4).x, labelled(20, 4).y, classes=CLASSES, name="mine")
    some = split.test.take(split.test.y < 2).to("cpu")
    assert (some.classes, some.source) == (CLASSES, "mine")
    assert not evaluate(SmallNet().eval(), some, THREAT, FEW).y.gt(1).any()
    assert from_arrays(labelled(20, 4).x, labelled(20, 4).y).test.classes == ()  # what occurs need not be all there is
    assert load("digits").val.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("labels", "n", "said"),
    [
        ([0, 1], 40, True),  # half of the classes, which is no chance
        ([0, 1, 2], 9, True),  # 0, 1, 2 without a gap
        ([0, 2], 6, False),  # six of four classes may well miss one
        ([1], 40, False),  # one class, chosen on purpose
        ([0, 3], 40, False),  # the last one occurs: the labels are the network's
        ([0, 1, 2, 3], 40, False),
    ],
)
def test_unnamed_labels_that_miss_the_last_classes_are_said(labels, n, said):
    data = labelled(n, 1)
    data = replace(data, y=torch.tensor(labels)[torch.arange(n) % len(labels)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(SmallNet().eval(), data, THREAT, FEW)
    texts = [str(warning.message) for warning in caught]
    assert bool(texts) == said
    if said:
        predicted = int((SmallNet().eval()(data.x).argmax(1) > max(labels)).sum())
        assert f"4 logits, but no label is above {max(labels)}: {predicted} of {n} clean images" in texts[0]
        assert caught[0].category is DataWarning


def test_images_that_no_reader_has_looked_at_are_looked_at():
    y, model = torch.zeros(2, dtype=torch.int64), nn.Sequential(nn.Flatten(), nn.Identity())
    for x, note in [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "uint8 images hold 0 and 1 only"),
        (torch.full((2, 1, 4, 4), 0.05), "the largest value of x is 0.05, read in"),
        (torch.eye(4).expand(2, 1, 4, 4), "float images hold 0 and 1 only"),
        (torch.rand(2, 4, 4, 4), r"shape \(2, 4, 4, 4\), read as 4 channels of 4x4 pixels"),
        (torch.rand(2, 3, 9, 4), "read as 3 channels of 9x4 pixels"),
    ]:
        model[1] = nn.Linear(x[0].numel(), 2)
        with pytest.warns(DataWarning, match=note):
            evaluate(model, Data(x, y, torch.arange(2)), Threat("linf", 0.02), FEW)
        with pytest.warns(DataWarning, match=note):
            bracket(model, Data(x, y, torch.arange(2)), Threat("linf", 0.02), seconds=0)
    for quiet in (Data(x, y, torch.arange(2), source="read"), Data(x.flatten(1), y, torch.arange(2))):
        evaluate(model, quiet, Threat("linf", 0.02), FEW)
    evaluate(model, Data(x * 0 + 0.05, y, torch.arange(2)), Threat("linf", 0.02, -1, 1), FEW)  # not in [0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clean_logits_that_are_not_finite(bad):
    def model(x):
        z = torch.stack([x.flatten(1)[:, 0], 0 * x.flatten(1)[:, 0]], 1)
        return torch.where(x.flatten(1) > 0.7, bad, z)

    with pytest.raises(UserError, match="NaN or infinite on 2 of 3 samples"):
        evaluate(model, numbers([0.9, 0.8, 0.2]), THREAT, FEW)


class Convolution(nn.Module):
    def __init__(self, view):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.conv.weight.data = torch.randn(4, 3, 3, 3, generator=g)
        self.conv.bias.data.zero_()
        self.view, self.plain, self.last = view, 0, 0

    def forward(self, x):
        self.plain, self.last = self.plain + x.is_contiguous(), self.last + (not x.is_contiguous())
        h = self.conv(x).relu().mean((2, 3))
        return h + 0 * x.view(len(x), -1)[:, :4] if self.view else h


@pytest.mark.parametrize("view", [False, True])
def test_channels_last_is_used_where_the_model_can_take_it(view):
    model = Convolution(view)
    x = torch.rand(20, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    data = Data(x, model(x).argmax(1), torch.arange(20), classes=tuple("abcd"))
    model.plain = model.last = 0
    e = evaluate(model, data, Threat("linf", 0.02), "quick")
    assert model.last == 1 if view else model.last > 50, "one attempt, or every step of every attack"
    assert model.plain > (50 if view else 0), "candidates are verified in the plain order"
    assert e.clean.all()


def test_a_deterministic_model_is_queried_once():
    assert evaluate(threshold, numbers([0.9, 0.8]), THREAT, "quick").votes == 1


class Noisy(nn.Module):
    """A threshold under noise: the majority is right while the pixel is above one half."""

    def __init__(self, sigma):
        super().__init__()
        self.sigma = sigma

    def forward(self, x):
        return threshold(x + self.sigma * torch.randn(len(x), 1, 1, 1))


def test_a_lucky_output_of_a_randomised_model_is_no_success():
    """With sigma 0.15 one output in 6 is wrong at 0.65, and nearly half of them at the end of the threat, 0.55."""
    torch.manual_seed(0)
    data = numbers([0.56] * 30 + [0.68] * 30 + [0.9] * 30)
    e = evaluate(Noisy(0.15), data, THREAT, "quick")
    assert e.votes == 32
    kept = e.robust.view(3, 30).float().mean(1)
    assert kept[0] <= 0.1, "the majority changes sides at 0.46"
    assert kept[1] >= 0.85, "a lucky output is likely, a majority is not"
    assert kept[2] == 1.0
    audited = audit(Noisy(0.15), data, e)
    assert {finding.name: finding for finding in audited.findings}["outputs are repeatable"].fires
    assert audited.evaluation.robust.view(3, 30)[2].all()


def test_among_many_classes_targets_are_ranked_by_distance():
    """A class with a large logit but a tiny slope is farther away than one with a lower logit and a steep slope."""

    def model(x):
        p = x.flatten(1)[:, :1]
        z = torch.full((len(x), 12), -50.0)
        z = torch.cat([torch.zeros(len(x), 1), -1 + 0.01 * (0.5 - p), -2 + 30 * (0.5 - p), z[:, 3:]], 1)
        return z

    data = numbers([0.5, 0.52])
    e = evaluate(model, data, Threat("linf", 0.2), (Stage("t", "apgd", "margin", targets=1, settings={"steps": 3}),))
    assert not e.robust.any()
    assert e.prediction_adv.tolist() == [2, 2]


def test_targets_are_the_likeliest_wrong_classes_in_turn(monkeypatch):
    targets = []

    def probe(model, x, y, threat, *, score, noise, target):
        targets.append(target.tolist())
        return x

    monkeypatch.setitem(ATTACKS, "probe", AttackEntry(probe, "a test"))
    rows = torch.tensor([[9.0, 1.0, 3.0, 2.0], [1.0, 2.0, 9.0, 3.0]])
    x = numbers([0.25, 0.75], [0, 2])

    def model(x):
        return rows[(x.detach().flatten(1)[:, 0] > 0.5).long()]

    evaluate(model, x, THREAT, (Stage("probe", "probe", targets=2),))
    assert targets == [[2, 3], [3, 1]]
    targets.clear()
    every = (Stage("probe", "probe", targets=9),)  # as many as there are
    e = evaluate(model, x, THREAT, every, batch_size=2)
    assert targets == [[2, 3], [3, 1], [1, 0]]
    targets.clear()
    with_room = evaluate(model, x, THREAT, every, batch_size=4)
    assert targets == [[2, 3], [3, 1, 1, 0]], "further targets share a batch"
    monkeypatch.setattr(distributed.Processes, "current", staticmethod(lambda: distributed.Processes(0, 2)))
    monkeypatch.setattr(distributed.Processes, "gather", lambda self, value: [value])
    targets.clear()
    evaluate(model, x, THREAT, every, batch_size=4)
    assert targets == [[2, 3], [3, 1], [1, 0]], "memory may have run out on one process alone: steps would differ"
    for one in (e, with_room):
        assert (one.stages[-1].attacked, one.stages[-1].candidates) == (2, 6)
