"""Randomised smoothing: certificates against closed forms, attacks inside and outside of them, resuming, bad input."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import scipy.stats
import torch
from tests.helpers import LinearModel, boundary_distances
from torch import nn

import holdfast.bounds.votes as voting
from holdfast import models
from holdfast.bounds import ABSTAIN, certify_smoothed
from holdfast.bounds.smoothing import Smoothed
from holdfast.bounds.votes import Cost, Vote, outvoted, p_lower_bound, radius_of
from holdfast.data import Data, DataWarning, load
from holdfast.errors import UserError
from holdfast.losses import sce
from holdfast.noise import Noise
from holdfast.objectives import standard
from holdfast.outputs import Outputs
from holdfast.smoothing import ExpectedModel, SmoothedAccuracy, figure, radii_of, save, sentence, smooth, table
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

SIGMA = 0.5


@pytest.fixture(scope="module")
def linear():
    """(model, data, the true radius of each sample): under Gaussian noise a linear model of two classes is smoothed
    into itself, and its radius is the distance to the plane."""
    model = LinearModel(2, 16, dtype=torch.float32, center=0.5, bias=0.3).requires_grad_(False)
    x = torch.rand(300, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    return model, Data(x, y, torch.arange(300), ("a", "b"), "random"), boundary_distances(model, x, y, "l2").amin(1)


def test_the_bound_of_the_probability_is_that_of_scipy():
    for n in (1, 7, 1000):
        k = torch.tensor(sorted({0, 1, n // 2, n - 1, n}))
        for alpha in (0.3, 0.001):
            exact = [
                scipy.stats.binomtest(int(one), n, alternative="greater").proportion_ci(1 - alpha, "exact").low
                for one in k
            ]
            assert p_lower_bound(k, n, alpha).tolist() == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_certified_radii_lie_below_the_true_ones_and_tend_to_them(linear):
    model, data, truth = linear
    found = {n: certify_smoothed(model, data, SIGMA, n=n, alpha=1e-6) for n in (200, 5000)}
    assert (found[200].radius <= truth).all()
    assert (found[5000].radius <= truth).all()
    assert (found[5000].selected == data.y)[truth > SIGMA].all()
    near = truth < 2 * SIGMA  # beyond, no 5,000 votes can tell
    assert ((truth - found[5000].radius)[near].mean()) < 0.5 * (truth - found[200].radius)[near].mean()
    assert (truth - found[5000].radius)[near & (found[5000].radius > 0)].max() < 0.3 * SIGMA
    share = scipy.stats.norm.cdf((truth / SIGMA).numpy())  # of votes for y, exactly
    votes, right = found[5000].votes, found[5000].selected == data.y
    z = (votes.numpy() / 5000 - share) / (share * (1 - share) / 5000) ** 0.5
    assert abs(z[right.numpy() & (share < 0.999)]).max() < 4.5


def test_one_class_outvotes_another_no_more_often_than_alpha_says():
    """Exact: the chance, over Binomial(20, 1/2) votes of two classes that are equally probable."""
    for alpha in (0.3, 0.05, 0.001):
        k = torch.arange(21)
        chance = torch.from_numpy(scipy.stats.binom.pmf(k.numpy(), 20, 0.5))
        assert chance[outvoted(k, 20 - k, alpha)].sum() <= alpha
        assert outvoted(k, 20 - k, alpha)[20]
    assert not outvoted(torch.tensor([0, 5]), torch.tensor([0, 5]), 0.9).any()


def test_no_more_certificates_are_wrong_than_alpha_says(linear):
    model, data, truth = linear
    wrong = torch.stack([certify_smoothed(model, data, SIGMA, n=100, alpha=0.2, seed=seed).radius > truth
                         for seed in range(5)]).double().mean()  # fmt: skip
    assert 0.05 < wrong < 0.2 + 3 * math.sqrt(0.2 * 0.8 / (5 * len(data)))


def test_near_the_plane_and_with_few_votes_it_abstains(linear):
    model, data, truth = linear
    on_plane = data.take(truth.argsort()[:3])
    found = certify_smoothed(model, on_plane, 10.0, n=50)
    assert found.abstains.all()
    assert found.prediction.tolist() == [ABSTAIN] * 3
    assert found.radius.tolist() == [0.0] * 3
    assert not found.certified(0.0).any()
    assert found.certified_accuracy(0.0).value == 0
    few = certify_smoothed(model, data.take(slice(0, 4)), SIGMA, n=9)  # 0.001^(1/9) < 1/2
    assert few.abstains.all()
    assert few.vote.largest_radius == 0
    assert Vote(SIGMA, n=100).largest_radius == pytest.approx(SIGMA * scipy.stats.norm.ppf(0.001**0.01))


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("selected", "votes", "votes_y", "p_low", "radius", "index", "y")
    )


def test_neither_batches_nor_order_nor_uint8_change_a_vote(linear):
    model, data, _ = linear
    data = dataclasses.replace(data.take(slice(0, 12)), x=(255 * data.x[:12]).to(torch.uint8))
    whole = certify_smoothed(model, data, SIGMA, n=100, n0=10)
    for size in (1, 7, 10_000):
        assert same(whole, certify_smoothed(model, data, SIGMA, n=100, n0=10, batch_size=size))
    floats = dataclasses.replace(data, x=data.x.float() / 255)
    assert same(whole, certify_smoothed(model, floats, SIGMA, n=100, n0=10))
    part = certify_smoothed(model, data.take(torch.tensor([8, 3])), SIGMA, n=100, n0=10)
    assert part.votes.tolist() == whole.votes[[8, 3]].tolist()
    other = certify_smoothed(model, data, SIGMA, n=100, n0=10, seed=1)
    assert other.votes.tolist() != whole.votes.tolist()


def test_memory_that_runs_out_changes_nothing(linear):
    model, data, _ = linear
    data = data.take(slice(0, 8))

    def small(x):
        if len(x) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(x)

    assert same(certify_smoothed(small, data, SIGMA, n=60), certify_smoothed(model, data, SIGMA, n=60))


def killed_after(calls, model):
    """A model that is interrupted at that call."""
    done = []

    def run(x):
        done.append(1)
        if len(done) == calls:
            raise KeyboardInterrupt
        return model(x)

    return run


@pytest.mark.parametrize("calls", [8, 15, 28, 35])
def test_what_was_stopped_goes_on(calls, linear, tmp_path, monkeypatch):
    """Killed while votes are counted, while it attacks, and while votes are counted at what it found."""
    monkeypatch.setattr(voting, "next_save", lambda began: 0.0)  # after every batch
    model, data, truth = linear
    data = data.take(truth.argsort()[50:58])
    asked = {"n": 100, "n0": 20, "steps": 4, "copies": 8, "batch_size": 96}
    radii = [float(truth.sort().values[54])]
    whole = smooth(model, data, SIGMA, radii, **asked)
    with pytest.raises(KeyboardInterrupt):
        smooth(killed_after(calls, model), data, SIGMA, radii, **asked, folder=tmp_path, key="a")
    assert (tmp_path / "votes.safetensors").exists()
    told = []
    asked["batch_size"] = 50  # another batch size is the same work
    found = smooth(
        model, data, SIGMA, radii, **asked, folder=tmp_path, key="a", progress=lambda *said: told.append(said)
    )
    assert told[0][1] > 0
    assert same(found.smoothed, whole.smoothed)
    assert torch.equal(found.broken_at, whole.broken_at)
    assert found.smoothed.cost.forwards == whole.smoothed.cost.forwards
    for other in ({"key": "b"}, {"seed": 1}, {"n0": 10}):
        with pytest.raises(UserError, match="belongs to another certificate"):
            smooth(model, data, SIGMA, radii, **{**asked, "key": "a", **other}, folder=tmp_path)
    with pytest.raises(UserError, match="a network that answers otherwise"):
        smooth(lambda x: model(1 - x), data, SIGMA, radii, **asked, folder=tmp_path, key="a")
    with pytest.raises(UserError, match="belongs to another certificate"):
        smooth(model, dataclasses.replace(data, x=data.x.flip(2)), SIGMA, radii, **asked, folder=tmp_path, key="a")
    (tmp_path / "votes.safetensors").write_bytes(b"harmed")
    with pytest.raises(UserError, match="cut short or damaged"):
        smooth(model, data, SIGMA, radii, **asked, folder=tmp_path, key="a")


def test_no_attack_breaks_what_is_certified_and_attacks_break_what_they_can(linear):
    model, data, truth = linear
    few = data.take(slice(0, 60))
    radii = [float(truth[:60].quantile(q)) for q in (0.2, 0.5, 0.8)]
    found = smooth(model, few, SIGMA, radii, n=500, steps=10, copies=8)
    assert not found.conflicts.any()
    assert (found.broken_at >= truth[:60] - 1e-4).all()  # nothing nearer than the plane
    for radius in radii:
        certified, attacked = found.certified_accuracy(radius).value, found.attacked_accuracy(radius).value
        true = float((truth[:60] > radius).double().mean())
        assert certified <= true <= attacked
    # a step beyond the plane is seen by the votes where the box lets x_adv go there
    assert (found.broken_at <= radii[2])[truth[:60] < 0.5 * radii[2]].double().mean() > 0.8


def test_the_attacked_model_is_the_mean_over_copies(linear):
    model, data, _ = linear
    copies = SIGMA * Noise(3, torch.arange(5)).gaussian((1, 4, 4))
    expected = ExpectedModel(voting.CountingModel(model), copies)(data.x[:7]).logits
    each = torch.stack([model(data.x[:7] + copy).softmax(1) for copy in copies])
    assert torch.allclose(expected.exp(), each.mean(0), atol=1e-6)


def test_what_the_network_cannot_say_is_no_vote(linear):
    model, data, _ = linear

    def half(x):  # NaN, whatever the class, for half of all noisy images
        z = model(x)
        return torch.where(x.flatten(1)[:, :1] > 0.5, math.nan, z) if len(x) > 0 else z

    clean = dataclasses.replace(data, x=data.x.clone())
    clean.x[:, 0, 0, 0] = 0.5
    found = certify_smoothed(half, clean.take(slice(0, 20)), SIGMA, n=1000)
    assert found.votes.max() < 600
    assert not found.certified(0.0).any()


class Counted(nn.Module):
    """A network that changes its answer after so many images."""

    def __init__(self, model, most):
        super().__init__()
        self.model, self.most, self.seen = model, most, 0

    def forward(self, x):
        self.seen += len(x)
        z = self.model(x)
        return z if self.seen < self.most else z.flip(1)


def test_votes_that_are_not_of_one_classifier_prove_nothing(linear):
    model, data, _ = linear
    data = data.take(slice(0, 16))
    networks = {
        "noise": lambda x: model(x) + 3 * torch.randn(len(x), 2),
        "mates": lambda x: model(x) - model(x).mean(0),
        "large batches": lambda x: model(x) if len(x) < 100 else model(x).flip(1),
        "later": Counted(model, 1800),
    }
    for network in networks.values():
        with torch.random.fork_rng(), pytest.raises(UserError, match=r"noisy images otherwise"):
            certify_smoothed(network, data, SIGMA, n=100)


def test_it_leaves_the_network_as_it_was(linear):
    _, data, _ = linear
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Dropout(0.5))
    net.train()
    smooth(net, data.take(slice(0, 3)), SIGMA, 0.2, n=20, steps=2, copies=2)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_what_a_model_may_return(linear):
    model, data, _ = linear
    data = data.take(slice(0, 5))
    plain = certify_smoothed(model, data, SIGMA, n=50)
    assert same(plain, certify_smoothed(lambda x: Outputs(model(x)), data, SIGMA, n=50))
    assert same(plain, certify_smoothed(lambda x: {"logits": model(x), "aux": x}, data, SIGMA, n=50))


BAD = [
    ({"sigma": 0}, "sigma"), ({"sigma": -1.0}, "sigma"), ({"sigma": math.nan}, "sigma"), ({"sigma": "x"}, "sigma"),
    ({"sigma": 25}, "Did you mean 25/255"), ({"sigma": 1e-9}, "sigma must be 0.0001 to 10"),
    ({"n": 0}, "n, a number of votes"), ({"n": 10.5}, "n must be a whole"), ({"n": True}, "n must be a whole"),
    ({"n0": 0}, "n0, a number"), ({"alpha": 0.0}, "alpha"), ({"alpha": 1}, "alpha"), ({"alpha": -0.1}, "alpha"),
    ({"alpha": math.nan}, "alpha"), ({"seed": "0"}, "seed"), ({"batch_size": 0}, "batch_size"), ({"steps": 0}, "steps"),
    ({"copies": 0}, "copies"), ({"radii": "linf:8/255"}, r"certifies l2 and not linf: give the radius in l2"),
    ({"radii": Threat("l1", 0.1)}, "l2 and not l1"), ({"radii": "0.1,x"}, "got 'x'"), ({"radii": 0}, "a radius"),
    ({"radii": [0.1, -1]}, "a radius must be"), ({"radii": 4.0}, "covers all pixels"), ({"radii": [{}]}, "got a dict"),
    ({"radii": list(range(1, 200))}, "at most 100"), ({"progress": 3}, "progress"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "why"), BAD, ids=lambda part: str(part)[:40])
def test_bad_settings_are_one_sentence(wrong, why, linear):
    model, data, _ = linear
    with pytest.raises(UserError, match=why) as error:
        smooth(model, data.take(slice(0, 2)), **{"sigma": SIGMA, "radii": 0.1, "n": 20, **wrong})
    assert "\n" not in str(error.value)


def test_bad_data_is_one_sentence(linear):
    model, data, _ = linear
    few = data.take(slice(0, 3))
    for wrong, why in [
        (few.take(slice(0, 0)), "nothing to certify"),
        (dataclasses.replace(few, x=few.x * 255), r"x must lie in \[0, 1\]"),
        (dataclasses.replace(few, x=few.x * math.nan), r"x must lie in \[0, 1\]"),
        (dataclasses.replace(few, y=few.y + 2, classes=()), "labels"),
        (dataclasses.replace(few, classes=("a", "b", "c")), "2 logits"),
        (few.x, "must be Data"),
    ]:
        with pytest.raises(UserError, match=why):
            certify_smoothed(model, wrong, SIGMA, n=20)
    with pytest.warns(DataWarning, match="0 and 1 only"):
        certify_smoothed(model, Data((few.x > 0.5).byte(), few.y, few.index), SIGMA, n=20)
    with pytest.raises(UserError, match="radius must be"):
        certify_smoothed(model, few, SIGMA, n=20).certified(-1.0)


def test_radii_are_read_in_every_form():
    assert radii_of("0.5,64/255,l2:0.5") == (64 / 255, 0.5)
    assert radii_of([Threat("l2", 0.3), 1, "0.3"]) == (0.3, 1.0)
    assert radii_of(()) == ()


def made(n=4, broken=(0.0, 0.5, math.inf, math.inf), votes=(10, 600, 1000, 600), y=(1, 0, 0, 0)):
    """A result of given columns."""
    vote, votes = Vote(0.5, n=1000), torch.tensor(votes)
    p = p_lower_bound(votes, 1000, 0.001)
    smoothed = Smoothed(vote, torch.arange(n), torch.tensor(y), torch.zeros(n, dtype=torch.int64), votes, votes * 0, p,
                        radius_of(p, 0.5), 16, Cost(5, 0, 1.0))  # fmt: skip
    return SmoothedAccuracy(smoothed, (0.25, 0.5, 2.0), torch.tensor(broken, dtype=torch.float64), 3, 2, (Cost(),) * 3)


def test_every_sentence_says_what_is_certified_and_how_surely(tmp_path):
    found = made()
    said = sentence(found)
    assert "smoothed classifier" in said
    assert "not the network itself" in said
    assert "99.9%" in said
    assert "abstains on 1" in said
    assert "Nothing could be certified at 2" in said
    assert "1 of the samples were both" not in said
    assert [line[1] for line in table(found, "it").lines][-1] == "-"
    assert "smoothed classifier of it" in table(found, "it").caption
    files = save(found, tmp_path, "it", {"network": "it"})
    told = json.loads(files[0].read_text(), parse_constant=pytest.fail)
    assert told["columns"]["broken_at"] == [0.0, 0.5, None, None]
    assert told["columns"]["prediction"] == [-1, 0, 0, 0]
    assert told["norm"] == "l2"
    assert "not the network" in told["method"]
    assert "not the network" in files[1].read_text()
    assert figure(found).axes


def test_a_conflict_counts_as_broken_and_too_many_are_an_error():
    found = made(broken=(0.0, 0.25, math.inf, math.inf), votes=(10, 990, 1000, 600))
    assert found.conflicts.tolist() == [False, True, False, False]
    assert found.certified(0.25).tolist() == [False, False, True, False]
    assert "both certified and broken" in sentence(found)
    from holdfast.smoothing.measure import _check_conflicts

    _check_conflicts(found)
    with pytest.raises(UserError, match="more than chance"):
        _check_conflicts(made(broken=(0.0, 0.25, 0.25, 0.25), votes=(1000,) * 4, y=(0,) * 4))


def test_the_command_line_smooths_a_run_and_an_own_model(trained_runs, holdfast_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trained_runs("sce")
    words = ["smooth", run, "--sigma", "0.2", "--radius", "0.1,0.3", "--n", 200, "--limit", 20, "--steps", 3,
             "--copies", 4, "--device", "cpu", "--out", "o"]  # fmt: skip
    status, out, err = holdfast_(*words)
    assert (status, [line for line in err.splitlines() if "error" in line]) == (0, []), err
    assert "not the network itself" in out
    told = json.loads((tmp_path / "o" / "smoothing.json").read_text())
    assert told["samples"] == 20
    assert [one["radius"] for one in told["radii"]] == [0.0, 0.1, 0.3]
    for one in told["radii"]:
        assert one["certified"]["value"] <= one["attacked"]["value"]
    assert 0.5 < told["radii"][0]["certified"]["value"] <= 1
    status, again, _ = holdfast_(*words, "--json")
    assert status == 0
    assert json.loads(again)["columns"] == told["columns"]
    status, _, err = holdfast_(*words[:-2], "--out", "o", "--n", 100)
    assert (status, "another configuration" in err) == (2, True)
    for wrong, why in [
        (("--sigma", "0"), "sigma"), (("--sigma", "x"), "cannot read --sigma"), (("--alpha", "1"), "alpha"),
        (("--radius", "linf:8/255"), "l2 and not linf"), (("--radius", "9"), "covers"), (("--n", "0"), "n, a number"),
        (("--data", "digits"), "is a run folder"),
    ]:  # fmt: skip
        status, out, err = holdfast_("smooth", run, "--device", "cpu", "-q", "--out", "never", *wrong)
        assert (status, out) == (2, ""), wrong
        assert why in err
    assert not (tmp_path / "never").exists()
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    status, out, _ = holdfast_("smooth", "mine.py:build", "--data", "digits", "--n", 20, "--limit", 5, "--steps", 1,
                               "--copies", 2, "--device", "cpu", "--json")  # fmt: skip
    assert status == 0
    assert json.loads(out)["samples"] == 5


@pytest.mark.slow
def test_training_with_noise_is_what_certificates_need():
    split = load("digits", val=0.0)
    certified = {}
    for sigma in (0.0, 0.25):
        net = models.build("smallconv", split.shape, 10)
        fit(net, split.train, split.val, standard(sce),
            FitConfig(epochs=40, batch_size=64, lr=3e-3, noise_sigma=sigma), device="cpu")  # fmt: skip
        found = smooth(net, split.test.take(slice(0, 60)), 0.25, 0.5, n=2000, copies=8)
        assert not found.conflicts.any()
        assert found.certified_accuracy(0.5).value <= found.attacked_accuracy(0.5).value
        certified[sigma] = found.certified_accuracy(0.5).value
    assert certified[0.25] > 0.4
    assert certified[0.25] > certified[0.0] + 0.1
