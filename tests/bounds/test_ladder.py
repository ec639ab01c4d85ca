"""The methods one after another: each starts from what the one before it computed, in one call and in several."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from tests.bounds.helpers import attacked_margins
from tests.helpers import on_digits, right_ones
from torch import nn

from holdfast.bounds import METHODS, CannotBound, ProofCache, certify, ladder
from holdfast.bracket import bracket_accuracy
from holdfast.bracket import prove as proving
from holdfast.data import Data
from holdfast.evaluation import Budget, evaluate
from holdfast.threat import Threat

THREAT = Threat("linf", 0.06)


@pytest.fixture(scope="module")
def trained():
    """(net, data): a dense network of three layers of ReLUs and 30 digits, of which each method proves some."""
    net, split = on_digits(
        lambda: (
            nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(),
            nn.Linear(20, 10),
        ),
        lr=1e-2,
        epochs=12,
    )  # fmt: skip
    x, y = right_ones(net, split, 30)
    return net, Data(x, y, torch.arange(30))


@pytest.fixture
def counted(monkeypatch):
    """How often the network was read, and for how many images each pass was made."""
    counts = {"read": 0, "boxes": 0, "crown": 0, "alpha": 0, "linear": 0}
    module = importlib.import_module("holdfast.bounds.certify")  # whose name in the package is the function

    def count(where, name, what):
        real = getattr(where, name)

        def run(*args, **more):
            key, images = what(args, more)
            counts[key] += images
            return real(*args, **more)

        monkeypatch.setattr(where, name, run)

    def forward_of(args, more):
        method = "alpha" if more.get("iterations") else "crown" if more.get("refine") else "boxes"
        return method, len(args[1].center)

    count(module, "read", lambda args, more: ("read", 1))
    count(ladder, "forward", forward_of)
    linear = ladder.Ladder.linear
    monkeypatch.setattr(
        ladder.Ladder,
        "linear",
        lambda self, some, *rest: counts.update(linear=counts["linear"] + len(some)) or linear(self, some, *rest),
    )
    return counts


def unproved(net, data, method):
    return int((~certify(net, data, THREAT, method=method).proved).sum())


def test_a_call_computes_nothing_twice(trained, counted):
    net, data = trained
    left = [unproved(net, data, method) for method in METHODS[:-1]]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[1] > left[2] > left[3] > 0, "each method has something to prove"
    counted.update(dict.fromkeys(counted, 0))
    certify(net, data, THREAT, method="branch", seconds=60.0)
    assert counted == {
        "read": 1, "boxes": 30, "linear": left[0], "crown": left[1], "alpha": left[2],
    }  # fmt: skip


def test_calls_with_one_cache_compute_what_one_call_does(trained, counted):
    """Whatever the order and the number of samples of the later calls, mixed from several earlier ones; and they find
    the same."""
    net, data = trained
    alone = {method: certify(net, data, THREAT, method=method, seconds=60.0) for method in METHODS}
    counted.update(dict.fromkeys(counted, 0))
    worst = attacked_margins(net, data.x, data.y, THREAT)
    once = certify(net, data, THREAT, method="branch", seconds=60.0)
    expected = dict(counted)
    counted.update(dict.fromkeys(counted, 0))
    cache, rows, fate, mixed = ProofCache(), torch.arange(30), {}, torch.Generator().manual_seed(0)
    for method, size in (("interval", 30), ("linear", 12), ("crown", 5), ("alpha", 7), ("branch", 1)):
        for some in rows[torch.randperm(len(rows), generator=mixed)].split(size):
            found = certify(net, data.take(some), THREAT, method=method, seconds=60.0, cache=cache)
            for place, row in enumerate(some.tolist()):
                assert found.bound[place] <= worst[row]
                if found.proved[place]:
                    fate[row] = found.by[place]
                elif place in found.x_adv:
                    fate[row] = "broken"
            assert found.ended.all()
        rows = torch.tensor([row for row in rows.tolist() if row not in fate])
        assert sorted(row for row in fate if fate[row] != "broken") == alone[method].proved.nonzero()[:, 0].tolist()
    assert counted == expected
    assert {row for row in fate if fate[row] == "broken"} == set(once.x_adv)


def test_a_bracket_and_an_evaluation_read_the_network_once(trained, counted, monkeypatch):
    net, data = trained
    monkeypatch.setitem(proving.SUITES, "quick", ())
    left = [unproved(net, data, method) for method in METHODS[:-1]]
    counted.update(dict.fromkeys(counted, 0))
    found = bracket_accuracy(net, data, THREAT)
    assert found.exact
    assert counted == {
        "read": 1, "boxes": 30, "linear": left[0], "crown": left[1], "alpha": left[2],
    }  # fmt: skip
    counted.update(dict.fromkeys(counted, 0))
    e = evaluate(net, data, THREAT, (), proofs="branch", budget=Budget(seconds=60.0))
    assert torch.equal(e.certified, e.robust)
    assert counted["read"] == 1
    assert (counted["boxes"], counted["linear"]) == (30, left[0])
    assert counted["crown"] <= left[1]
    assert counted["alpha"] <= left[2]


def test_a_cache_is_of_one_network_and_of_these_images_labels_and_threats(trained, counted):
    """What belongs to others is computed again: a sample's number alone proves nothing."""
    net, data = trained
    cache = ProofCache()
    certify(net, data, THREAT, method="crown", cache=cache)
    for other, threat, model in (
        (data, Threat("linf", 0.07), net),
        (data, Threat("l2", 0.06), net),
        (Data(data.x.flip(0), data.y.flip(0), data.index), THREAT, net),
        (Data(data.x, (data.y + 1) % 10, data.index), THREAT, net),
        (data, THREAT, nn.Sequential(net, nn.Linear(10, 10))),
    ):
        counted.update(dict.fromkeys(counted, 0))
        mine = certify(model, other, threat, method="crown", cache=cache)
        assert counted["boxes"] == 30
        assert counted["read"] == (model is not net)
        fresh = certify(model, other, threat, method="crown")
        assert torch.equal(mine.proved, fresh.proved)
        assert torch.equal(mine.bound, fresh.bound)


def test_boxes_of_other_weights_are_not_taken(trained, counted):
    """They proved samples of a network that has trained on between two calls."""
    net = copy.deepcopy(trained[0])
    data = trained[1]
    changes = (
        lambda: net[1].weight.data[3, 5].add_(0.5),
        lambda: net[-1].bias.data.neg_(),
        lambda: setattr(net[3], "weight", nn.Parameter(-net[3].weight.data)),
        lambda: net.__setitem__(1, copy.deepcopy(net[1])) or net[1].weight.data.mul_(1.5),
    )
    for change in changes:
        cache = ProofCache()
        certify(net, data, THREAT, method="crown", cache=cache)
        change()
        counted.update(dict.fromkeys(counted, 0))
        mine = certify(net, data, THREAT, method="alpha", cache=cache)
        assert counted["read"] == 1
        assert counted["boxes"] == 30
        fresh = certify(net, data, THREAT, method="alpha")
        assert torch.equal(mine.proved, fresh.proved)
        assert torch.equal(mine.bound, fresh.bound)


def test_a_network_that_answers_otherwise_than_when_it_was_read_is_refused(trained):
    """By a hook, which no weight shows: the boxes that are known are not of what it computes now."""
    net = copy.deepcopy(trained[0])
    cache = ProofCache()
    certify(net, trained[1], THREAT, method="linear", cache=cache)
    net[2].register_forward_hook(lambda module, inputs, out: 2 * out)
    with pytest.raises(CannotBound, match="answers"):
        certify(net, trained[1], THREAT, method="alpha", cache=cache)


def test_a_network_in_half_precision_is_refused_with_a_cache_too(trained):
    net, data = copy.deepcopy(trained[0]), trained[1]
    cache = ProofCache()
    certify(net, data, THREAT, method="linear", cache=cache)
    with pytest.raises(CannotBound, match="precision"):
        certify(net.half(), data, THREAT, method="alpha", cache=cache)


def test_what_is_known_of_some_samples_of_a_call_is_taken(trained, counted):
    """The others begin anew beside them: among them those that another threat is known of."""
    net, data = trained
    cache, every = ProofCache(), torch.arange(30)
    certify(net, data.take(every[::2]), THREAT, method="crown", cache=cache)
    certify(net, data.take(every[1::4]), Threat("l2", THREAT.eps), method="crown", cache=cache)
    known = {int(number) for number in every[::2] if int(number) in cache._places}
    counted.update(dict.fromkeys(counted, 0))
    mixed = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    found = certify(net, data.take(mixed), THREAT, method="alpha", cache=cache)
    assert counted["boxes"] == 30 - len(known) < 30 - 5
    fresh = certify(net, data.take(mixed), THREAT, method="alpha")
    assert torch.equal(found.proved, fresh.proved)
    torch.testing.assert_close(found.bound, fresh.bound, rtol=0.05, atol=0.05)


def test_a_cache_without_room_computes_again(trained, counted):
    """The boxes of stronger methods come first; what has none is computed again, and the answers are the same."""
    net, data = trained
    sizes = ProofCache()
    certify(net, data, THREAT, method="linear", cache=sizes)
    [size] = {part.bytes for part, _ in sizes._places.values()}
    left = (~certify(net, data, THREAT, method="linear").proved).nonzero()[:, 0]
    cache = ProofCache(most=size // 2)
    certify(net, data, THREAT, method="linear", cache=cache)
    assert not cache._places
    whole = certify(net, data.take(left), THREAT, method="alpha")
    for some in left.split(4):
        certify(net, data.take(some), THREAT, method="linear", cache=cache)
    assert sum(part.bytes for part in {id(part): part for part, _ in cache._places.values()}.values()) <= cache.most
    found = [certify(net, data.take(some), THREAT, method="alpha", cache=cache) for some in left.split(4)]
    assert torch.equal(torch.cat([one.proved for one in found]), whole.proved)
    assert all(int(part.level.amin()) == METHODS.index("alpha") for part, _ in cache._places.values())


def test_bounds_may_take_half_of_the_time_before_branch_and_bound(trained, monkeypatch):
    """Slopes that take long are not begun for further images, and branch and bound has what is left."""
    net, data = trained
    clock, asked, slopes = [0.0], [], []
    for module in (importlib.import_module("holdfast.bounds.certify"), ladder):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def alpha(self, some, part, inside, until):
        slopes.append(until)
        clock[0] += 60.0
        return part

    def branch(steps, part, inside, rows, *, until, misclassified):
        asked.append(until - clock[0])
        return SimpleNamespace(point=None, ended=False, bound=-1.0)

    monkeypatch.setattr(ladder, "_share", lambda work: 4)
    monkeypatch.setattr(ladder.Ladder, "alpha", alpha)
    monkeypatch.setattr(ladder, "branch", branch)
    found = certify(net, data, THREAT, method="branch", seconds=100.0)
    assert slopes == [50.0]
    assert asked[0] == pytest.approx(40.0 / len(asked))
    assert not found.ended[~found.proved].any()
