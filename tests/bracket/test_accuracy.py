"""bracket_accuracy: certified <= truth <= attacked, against mixed-integer programs; kill, resume, more time."""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ET

import pytest
import torch
from tests.helpers import right_ones
from torch import nn
from typer.testing import CliRunner

import holdfast.bracket.prove as proving
from holdfast.bounds import Certified, certify
from holdfast.bracket import bracket_accuracy, proof_figure
from holdfast.bracket.accuracy import sentence, table
from holdfast.cli import app
from holdfast.data import Data, pixels
from holdfast.errors import UserError
from holdfast.io import load_tensors
from holdfast.threat import Threat


@pytest.fixture(scope="module")
def found(truth):
    net, data, threat, _ = truth
    return bracket_accuracy(net, data, threat)


@pytest.fixture
def no_attacks(monkeypatch):
    monkeypatch.setitem(proving.SUITES, "quick", ())


def fallen(found):
    """Which samples are misclassified or broken."""
    return torch.tensor([status in ("misclassified", "broken") for status in found.status])


def held(found, net, data, threat):
    """Every adversarial example lies in the threat and is misclassified, asked one by one."""
    for row, x_adv in zip(found.rows.tolist(), found.x_adv, strict=True):
        assert threat.violation(x_adv[None], pixels(data.x[row : row + 1])) == 0
        assert net(x_adv[None]).argmax() != data.y[row]
    assert [found.status[row] for row in found.rows.tolist()] == ["broken"] * found.counts["broken"]


def test_nothing_lies_between_and_it_is_the_truth(truth, found):
    net, data, threat, broken = truth
    assert found.exact
    assert torch.equal(fallen(found), broken)
    held(found, net, data, threat)
    assert found.certified == found.attacked
    assert found.certified.value == float((~broken).double().mean())
    assert sum(found.proved_by.values()) == found.counts["proved"]
    assert sentence(found).startswith("Exact for these 40 samples: certified = attacked = ")
    assert [step.name for step in found.steps[:2]] == ["clean", "attack: sweep"]
    assert sum(step.broken for step in found.steps) == int(broken.sum())
    assert sum(step.proved for step in found.steps) == int((~broken).sum())


def test_branch_and_bound_alone_finds_the_same(truth, no_attacks):
    """No attack: what falls, falls by branch and bound, and a fresh forward pass confirms it."""
    net, data, threat, broken = truth
    alone = bracket_accuracy(net, data, threat)
    assert alone.exact
    assert torch.equal(fallen(alone), broken)
    held(alone, net, data, threat)
    assert {alone.by[row] for row in alone.rows.tolist()} == {"branch"}


def test_each_method_proves_what_the_cheaper_ones_prove(truth, found, no_attacks):
    net, data, threat, broken = truth
    before = torch.zeros(len(data), dtype=torch.bool)
    for method in ("interval", "linear", "crown", "alpha"):
        open_ = bracket_accuracy(net, data, threat, method=method)
        proved = open_.fate == proving.PROVED
        assert not (before & ~proved).any()
        assert not (proved & broken).any()
        assert not open_.exact
        assert open_.out_of_time == 0
        assert f"up to {method} leave them open" in sentence(open_)
        assert open_.certified.value <= found.certified.value <= open_.attacked.value
        before = proved


def test_a_counterexample_that_does_not_hold_breaks_nothing(truth, no_attacks, monkeypatch):
    net, data, threat, broken = truth
    real = proving.judge_candidates

    def doubtful(*given):
        judged = real(*given)
        return judged._replace(broken=torch.zeros_like(judged.broken))

    monkeypatch.setattr(proving, "judge_candidates", doubtful)
    few = data.take(broken.nonzero()[:4, 0])
    open_ = bracket_accuracy(net, few, threat)
    assert open_.counts["broken"] == 0
    assert open_.unconfirmed == open_.counts["between"] > 0
    assert "did not hold in a fresh forward pass" in sentence(open_)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", ["attack", "certify"])
def test_what_was_killed_goes_on(at, truth, found, tmp_path, monkeypatch):
    net, data, threat, _ = truth
    calls, name = [], {"attack": "_candidates", "certify": "certify"}[at]
    real = getattr(proving, name)

    def tired(*given, **settings):
        calls.append(given)
        if len(calls) == 2:
            raise Killed
        return real(*given, **settings)

    arguments = {"checkpoint": tmp_path / "a.safetensors", "key": "mine"}
    monkeypatch.setattr(proving, name, tired)
    with pytest.raises(Killed):
        bracket_accuracy(net, data, threat, **arguments)
    again = bracket_accuracy(net, data, threat, **arguments)
    assert again.status == found.status
    assert again.by == found.by
    assert torch.equal(again.x_adv, found.x_adv)
    once = {step.name: step.samples for step in found.steps}
    assert {step.name: step.samples for step in again.steps} == once  # nothing was done twice
    calls[:] = [None] * 10
    monkeypatch.setattr(proving, name, lambda *_, **__: pytest.fail("a finished bracket is read back"))
    assert bracket_accuracy(net, data, threat, **arguments).by == found.by


def test_a_checkpoint_belongs_to_one_bracket(truth, found, tmp_path):
    net, data, threat, _ = truth
    file = tmp_path / "a.safetensors"
    bracket_accuracy(net, data, threat, method="linear", checkpoint=file, key="mine")
    other = nn.Sequential(*net[:-1], nn.Linear(16, 10)).eval()
    for model, more, word in (
        (net, {"key": "yours"}, "another bracket"),
        (net, {"key": "mine", "seed": 1}, "another bracket"),
        (other, {"key": "mine"}, "answers otherwise than when"),
    ):
        with pytest.raises(UserError, match=word):
            bracket_accuracy(model, data, threat, **{"method": "linear", "checkpoint": file, **more})
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        bracket_accuracy(net, data, threat, method="linear", checkpoint=file, key="mine")


def test_more_time_goes_on_where_time_ran_out(truth, found, tmp_path):
    net, data, threat, _ = truth
    arguments = {"checkpoint": tmp_path / "a.safetensors", "key": "mine"}
    hasty = bracket_accuracy(net, data, threat, seconds=1e-3, **arguments)
    assert hasty.out_of_time == hasty.counts["between"] > 0
    assert "Time ran out" in sentence(hasty)
    assert hasty.certified.value <= found.certified.value <= hasty.attacked.value
    slow = bracket_accuracy(net, data, threat, **arguments)
    assert slow.status == found.status


def test_bounds_that_were_cut_short_are_tried_again(truth, found, no_attacks, monkeypatch, tmp_path):
    net, data, threat, broken = truth
    few, real = data.take(~broken), proving.certify
    arguments = {"method": "crown", "checkpoint": tmp_path / "a.safetensors", "key": "mine"}

    def cut(*given, method, seconds, cache):
        answer = real(*given, method="interval")
        proving.time.sleep(seconds if method == "crown" else 0)
        return answer

    monkeypatch.setattr(proving, "certify", cut)
    hasty = bracket_accuracy(net, few, threat, seconds=0.5, **arguments)
    assert hasty.out_of_time == hasty.counts["between"] > 0
    monkeypatch.setattr(proving, "certify", real)
    slow = bracket_accuracy(net, few, threat, **arguments)
    assert slow.out_of_time == 0
    assert slow.counts["proved"] > hasty.counts["proved"]


def test_hard_samples_share_the_time(truth, no_attacks, monkeypatch):
    """Each open sample has its part; one that took all of its own is tried again with what the others left."""
    net, data, threat, broken = truth
    shares, few = [], data.take((~broken).nonzero()[:4, 0])
    clock, hard = [0.0], int(few.index[0])
    monkeypatch.setattr(proving.time, "monotonic", lambda: clock[0])

    def slow(model, data, threat, method, seconds, cache):
        n, easy, blank = len(data), data.index != hard, torch.zeros(len(data), dtype=torch.float64)
        if method != "branch":
            return Certified(blank.bool(), ("",) * n, blank - 1, {}, blank, ~blank.bool())
        shares.append((int(data.index[0]), seconds))
        took = 0.1 * seconds if bool(easy) else seconds
        clock[0] += took
        return Certified(easy, ("branch",), easy.double() - 0.5, {}, blank + took, easy)

    monkeypatch.setattr(proving, "certify", slow)
    open_ = bracket_accuracy(net, few, threat, seconds=8.0)
    assert [row for row, _ in shares] == [*few.index.tolist(), hard]
    assert [share for _, share in shares[:2]] == pytest.approx([2.0, 2.0])
    assert shares[4][1] == pytest.approx(8.0 - 2.0 - 0.1 * sum(share for _, share in shares[1:4]))
    assert open_.counts["proved"] == 3
    assert open_.out_of_time == open_.counts["between"] == 1
    assert open_.spent == pytest.approx(8.0)


def test_without_bounds_there_are_attacks(truth):
    net, data, threat, broken = truth
    plain = bracket_accuracy(lambda x: net(x), data, threat)
    assert plain.counts["proved"] == 0
    assert plain.why_not.startswith("bounds need a torch module")
    assert "Nothing could be proved, since bounds need a torch module" in sentence(plain)
    assert not (fallen(plain) & ~broken).any()
    steps = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    steps.forward = lambda x: nn.Sequential.forward(steps, x.round())
    few = dataclasses.replace(data.take(slice(0, 4)), classes=())
    few = dataclasses.replace(few, y=steps(pixels(few.x)).argmax(1))
    assert "operator round" in bracket_accuracy(steps, few, Threat("linf", 1e-6)).why_not


@pytest.mark.parametrize("layer", [nn.Identity, nn.GELU])
def test_networks_without_relus(layer, small):
    """Branch and bound has nothing to split in them: they stay open where bounds end, and no error is raised."""
    _, split = small
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), layer(), nn.Linear(4, 10)).eval()
    data = split.test.take(slice(0, 6))
    data = dataclasses.replace(data, y=net(pixels(data.x)).argmax(1))
    with torch.no_grad():
        z = net(pixels(data.x)).topk(2, 1).values
    for eps in (0.001, float((z[:, 0] - z[:, 1]).median()) / 10):
        some = bracket_accuracy(net, data, Threat("linf", eps))
        assert some.out_of_time == 0


def test_what_branch_and_bound_proves_is_a_sign(truth):
    """A bound of infinity would be above every margin."""
    net, data, threat, broken = truth
    bounds = certify(net, data.take(~broken), threat, method="branch").bound
    assert (bounds > 0).all()
    assert bounds.isfinite().all()


def test_a_proof_above_an_attack_is_an_error(truth, monkeypatch):
    net, data, threat, _ = truth

    def false(model, data, threat, **_):
        n, ones = len(data), torch.ones(len(data))
        return Certified(ones.bool(), ("interval",) * n, 99 * ones.double(), {}, ones.double(), ones.bool())

    monkeypatch.setattr(proving, "certify", false)
    with pytest.raises(UserError, match=r"sample \d+: an attack found a margin of .*, and at least 99 is proved"):
        bracket_accuracy(net, data, threat)


class Noisy(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + torch.randn(len(x), 10)


def test_it_says_what_it_cannot_take(truth):
    net, data, threat, _ = truth
    nan = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nan[1].bias.data[0] = math.nan
    for model, some, more, word in (
        (net, data.take(slice(0, 0)), {}, "empty"),
        (net, data, {"method": "milp"}, "unknown method 'milp'"),
        (net, data, {"seconds": 0.0}, "seconds"),
        (net, data, {"seconds": math.nan}, "seconds"),
        (net, dataclasses.replace(data, x=pixels(data.x) + 2, source=""), {}, "box"),
        (Noisy(net), data, {}, "differently each time"),
        (nan, data, {}, "not finite"),
        (net, data, {"threat": "linf:8"}, "Did you mean 8/255"),
    ):
        with pytest.raises(UserError, match=word):
            bracket_accuracy(model, some, more.pop("threat", threat), **more)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms(norm, truth):
    net, data, _, _ = truth
    few = data.take(slice(0, 10))
    found = bracket_accuracy(net, few, Threat(norm, 0.05), method="alpha")
    assert found.counts["proved"] > 5
    held(found, net, few, Threat(norm, 0.05))


def test_the_table_and_the_file(found):
    told = json.loads(json.dumps(found.describe()), parse_constant=pytest.fail)
    assert told["counts"] == found.counts
    assert told["columns"]["status"] == list(found.status)
    assert told["budget"] is None
    assert (told["certified"]["value"], told["exact"]) == (found.certified.value, True)
    lines = table(found).splitlines()
    assert lines[0].split() == ["step", "samples", "broken", "proved", "seconds"]
    assert any(line.startswith("proof: linear") for line in lines)
    assert lines[-1].split() == ["between", "0", "samples"]
    assert max(map(len, lines[:-2])) <= 80


def test_the_command_line_brackets_any_classifier(small, tmp_path, monkeypatch):
    net, _ = small
    monkeypatch.chdir(tmp_path)
    torch.save(net.state_dict(), "w.pt")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), "
        "nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    run = CliRunner().invoke
    words = [
        "bracket", "mine.py:build", "--weights", "w.pt", "--data", "digits", "--threat", "linf:0.05", "--limit", "20",
        "--budget", "60s", "--device", "cpu", "-q",
    ]  # fmt: skip
    told = run(app, [*words, "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["samples"], found["budget"], found["exact"]) == (20, 60.0, True)
    folder = tmp_path / "out" / "mine-bracket-linf0.05"
    assert json.loads((folder / "accuracy.json").read_text()) == found
    tensors, about = load_tensors(folder / "witnesses.safetensors", "bracket witnesses", 1)
    assert len(tensors["x_adv"]) == found["counts"]["broken"]
    assert about["name"] == "mine.py:build"
    drawn = "".join(ET.parse(folder / "accuracy.svg").getroot().itertext())
    for method, count in found["proved_by"].items():
        assert f"{method}: {count} proved" in drawn
    assert f"attacked: at most {100 * found['attacked']['value']:.1f}%" in drawn
    assert (folder / "accuracy.png").stat().st_size > 10_000
    again = run(app, [*words[:-1], "--budget", "2min"])
    assert again.exit_code == 0
    assert run(app, [*words, "--method", "crown"]).exit_code == 0  # the same folder: what is proved stays
    assert "Exact for these 20 samples" in again.stdout
    assert "accuracy.json" in again.stdout
    for more, word in (
        (["--budget", "1e6passes"], "is a time"),
        (["--seconds", "3"], "--seconds needs --margins"),
        (["--margins"], "--margins takes no --budget"),
        (["--method", "milp"], "unknown method"),
        (["--seed", "1"], "differ in seed"),
        (["--vnnlib", "p.vnnlib"], "--vnnlib takes no"),
    ):
        assert word in str(run(app, [*words, *more]).exception), more


def test_a_correct_image_on_the_boundary_is_never_both(small):
    """Margins of zero: whatever decides, one fate each."""
    net, split = small
    x, y = right_ones(net, split, 6)
    even = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)).eval()
    even[1].weight.data.copy_(torch.stack([torch.ones(64), torch.ones(64)]))
    found = bracket_accuracy(even, Data(x, torch.zeros_like(y), torch.arange(6)), Threat("linf", 0.01))
    assert found.counts["proved"] == 0


def test_the_figure_ends_at_the_certified_share(found):
    axes = proof_figure(found, "mine").axes[0]
    highest = max(max(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("attacked"))
    assert highest == pytest.approx(100 * found.certified.value)
    [attacked] = [line for line in axes.lines if line.get_label().startswith("attacked")]
    assert attacked.get_ydata()[0] == pytest.approx(100 * found.attacked.value)
    assert proof_figure(dataclasses.replace(found, fate=torch.zeros_like(found.fate))) is None
