"""holdfast bracket: s_att <= s* <= s_cert; statuses, the sentence, the figure and the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import holdfast.bracket.measure as measuring
from holdfast import models
from holdfast.bracket import STATUS, Bracket, bracket, bracket_run, figure, save, sentence
from holdfast.cli import app
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.losses import negative_margin
from holdfast.noise import Noise
from holdfast.threat import Threat

THREAT = Threat("linf", 0.1)


@pytest.fixture
def brief(monkeypatch):
    """Short attacks, where nothing hangs on their strength: steps of eps/10 leave x for the wall in 10."""
    monkeypatch.setattr(measuring, "STEPS", 12)
    monkeypatch.setattr(measuring, "RESTARTS", 2)


def net(seed, *widths):
    """A fully connected ReLU network with random weights."""
    torch.manual_seed(seed)
    parts = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).requires_grad_(False)


def samples(model, n=6, shape=(1, 2, 2), seed=0):
    """Random images with the labels that the model gives them."""
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        z = model(x)
        return Data(x, z.argmax(1), torch.arange(n), classes=tuple(map(str, range(z.shape[1]))))


def made(**columns):
    """A bracket of given columns."""
    n = len(columns["margin"])
    columns = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    if "s_high" in columns:
        columns["solved"] = torch.tensor([True] * n)
    zeros = torch.zeros(n, dtype=torch.int64)
    return Bracket(THREAT, torch.arange(n), zeros, zeros + 1, **columns)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.sampled_from([0.01, 0.1, 0.4]))
def test_the_three_are_in_order_and_random_points_lie_below(brief, seed, eps):
    model, threat = net(seed, 4, 8, 8, 3), Threat("linf", eps)
    data = samples(model, 3, seed=seed)
    found = bracket(model, data, threat)
    assert found.solved.all()
    assert (found.s_att >= 0).all()
    assert (found.s_att <= found.s_low).all()
    assert (found.s_low <= found.s_high).all()
    assert (found.s_high <= found.s_cert).all()
    assert torch.equal(found.s_star, found.s_high)
    for draw in range(20):
        point = threat.random_start(data.x, Noise(draw, data.index))
        assert (negative_margin(model(point), data.y) + found.margin <= found.s_high).all()


def test_a_linear_network_has_nothing_between(brief):
    """Each gap rises by eps |w_j - w_y|_1; what is wrong already, or broken at once, is climbed to the end."""
    model = net(0, 4, 5)
    data = samples(model)
    data = dataclasses.replace(data, x=0.3 + 0.4 * data.x, y=torch.tensor([*data.y[:4], 0, 1]))
    found = bracket(model, data, Threat("linf", 0.3))
    z, weight = model(data.x).double(), model[1].weight.double()
    worst = z - z.gather(1, data.y[:, None]) + 0.3 * (weight[None] - weight[data.y][:, None]).abs().sum(2)
    truth = worst.scatter(1, data.y[:, None], -math.inf).amax(1) + found.margin
    assert (found.margin < truth).any()
    for column in (found.s_att, found.s_low, found.s_star, found.s_cert):
        assert torch.allclose(column, truth, atol=1e-4)


def test_a_network_without_an_exact_answer_has_attacks_and_bounds(brief, digits):
    model, x, y = digits
    data = Data(x[:8], y[:8], torch.arange(8))
    found = bracket(model, data, THREAT)
    assert found.s_star is found.s_low is found.s_high is found.solved is None
    assert (found.s_att < found.s_cert).all()
    assert set(found.status) <= {"certified", "unknown", "attacked"}
    plain = bracket(lambda x: model(x), data, THREAT)  # a function has no layers to bound
    assert plain.s_cert is None
    assert torch.equal(plain.s_att, found.s_att)
    assert "attacks reach" not in sentence(plain)
    assert torch.allclose(found.margin.float(), -negative_margin(model(data.x), data.y))


def test_other_norms_lie_in_their_box(brief):
    model = net(1, 4, 8, 3)
    data = samples(model)
    cube = bracket(model, data, THREAT, seconds=0)
    for norm in ("l2", "l1"):
        found = bracket(model, data, Threat(norm, 0.1))
        assert found.s_star is None
        # the cube's, but for what rounding may add to a size that is summed up
        assert (found.s_cert >= cube.s_cert).all()
        assert torch.allclose(found.s_cert, cube.s_cert, rtol=1e-4)
        assert (found.s_att <= cube.s_att + 1e-6).all()
    assert cube.s_star is None


def test_out_of_time_it_says_between_what_the_truth_lies(brief):
    model = net(3, 4, 30, 30, 3)
    data = samples(model)
    hasty, slow = (bracket(model, data, Threat("linf", 0.3), seconds=seconds) for seconds in (1e-9, 30))
    assert not hasty.solved.all()
    assert hasty.s_star.isnan().tolist() == (~hasty.solved).tolist()
    assert (hasty.s_low <= slow.s_high).all()
    assert (slow.s_low <= hasty.s_high).all()
    assert (hasty.s_high <= hasty.s_cert).all()


def test_a_status_is_the_first_thing_that_can_be_said():
    found = made(
        margin=[-1.0, 1.0, 2.0, 3.0, 5.0, 7.0, 4.0],
        s_att=[1.0, 1.0, 1.5, 2.0, 3.0, 3.0, 1.0],
        s_low=[1.0, 1.0, 2.0, 2.5, 3.0, 3.0, 1.0],
        s_high=[1.0, 1.0, 2.0, 3.5, 4.0, 4.0, 1.0],
        s_cert=[2.0, 4.0, 3.0, 4.0, 6.0, 6.0, 4.0],
    )
    assert found.status == ("misclassified", "attacked", "missed", "unknown", "robust", "certified", "robust")
    assert found.counts == dict(zip(STATUS, (1, 2, 1, 1, 1, 1), strict=True))
    assert made(margin=[1.0, 3.0], s_att=[1.0, 2.0]).status == ("attacked", "unknown")


def test_an_attack_above_a_proof_is_an_error(brief, monkeypatch):
    model = net(0, 4, 3)
    data = samples(model)
    monkeypatch.setattr(measuring, "worst_logit_difference", lambda *_: torch.full((6,), -9.0, dtype=torch.float64))
    with pytest.raises(
        UserError, match=r"sample 0: an attack reached a logit difference of .*, but the interval bound is at most -9"
    ):
        bracket(model, data, THREAT)


def test_what_was_stopped_goes_on(brief, tmp_path, monkeypatch):
    model = net(2, 4, 8, 3)
    data, checkpoint = samples(model), tmp_path / "checkpoint.safetensors"
    whole, calls, real = bracket(model, data, THREAT), [], measuring.maximize

    def tired(*given, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given, **settings)

    monkeypatch.setattr(measuring, "maximize", tired)
    with pytest.raises(KeyboardInterrupt):
        bracket(model, data, THREAT, checkpoint=checkpoint, key="a")
    told = []
    found = bracket(model, data, THREAT, checkpoint=checkpoint, key="a", progress=lambda *said: told.append(said))
    assert len(calls) == 4 + 3
    assert torch.equal(found.s_star, whole.s_star)
    assert told[:2] == [("attacks", 0, 6), ("attacks", 6, 6)]
    assert told[2:] == [("exact answers", done, 6) for done in (3, 4, 5, 6)]
    with pytest.raises(UserError, match="another bracket"):
        bracket(model, data, THREAT, checkpoint=checkpoint, key="b")


def test_it_says_what_it_cannot_take(brief):
    model = net(0, 4, 3)
    data = samples(model)
    broken = net(0, 4, 3)
    broken[1].bias.data[0] = math.nan
    for wrong, word in [
        ((model, data.take(slice(0, 0)), THREAT), "at least one"),
        ((model, dataclasses.replace(data, y=data.y + 3), THREAT), "labels"),
        ((model, dataclasses.replace(data, x=data.x - 1), THREAT), "box"),
        ((broken, data, THREAT), "finite"),
    ]:
        with pytest.raises(UserError, match=word):
            bracket(*wrong)
    with pytest.raises(UserError, match="seconds"):
        bracket(model, data, THREAT, seconds=-1)


COLUMNS = {"margin": [-1.0, 2.0, 3.0, 9.0], "s_att": [1.0, 2.5, 2.0, 2.0]}
TRUTH = {"s_low": [1.0, 2.5, 2.0, 2.5], "s_high": [1.0, 2.5, 2.0, 2.5], "s_cert": [3.0, 4.0, 5.0, 4.0]}


@pytest.mark.parametrize("steep", [1.0, 30.0])
@pytest.mark.parametrize("truth", [{}, TRUTH])
@pytest.mark.parametrize("s", [None, 2.2])
def test_the_figure_shows_what_there_is(steep, truth, s, tmp_path):
    found = made(**COLUMNS, **truth)
    cert = None if found.s_cert is None else steep * found.s_cert
    found = dataclasses.replace(found, s_cert=cert, trained_s=s)
    files = save(found, tmp_path, "mine")
    assert [file.name for file in files] == ["bracket.json", "bracket.svg", "bracket.png", "bracket.pdf"]
    svg = files[1].read_text()
    assert "mine, linf 0.1" in svg
    for words, there in (("s_att", True), ("s*, exact", truth), ("s_cert, proved", truth), ("s = 2.2 in training", s)):
        assert (words in svg) == bool(there), words
    for name, count in found.counts.items():
        assert (STATUS[name].replace(">", "&gt;") in svg) == bool(count), name
    assert figure(found).axes[0].get_yscale() == ("log" if truth and steep > 1 else "linear")
    told = json.loads(files[0].read_text(), parse_constant=pytest.fail)
    assert told["columns"]["margin"] == COLUMNS["margin"]
    assert told["counts"] == found.counts
    assert told["sentence"] == sentence(found)


def test_the_sentence_says_how_much_is_known():
    found = dataclasses.replace(made(**COLUMNS, **TRUTH), trained_s=2.2)
    said = sentence(found)
    assert said.startswith("Of 4 samples 1 certified, 1 robust (exact), 1 broken by an attack, 1 misclassified.")
    assert (
        "attacks reach 100.0% of the worst-case margin drop, and the certified bound is 1.60 times that drop." in said
    )
    assert said.endswith("Training used s = 2.2, which covers s* of 33.3% of the correctly classified samples.")
    late = dataclasses.replace(found, solved=torch.tensor([False] * 4))
    assert "attacks reach" not in sentence(late)
    assert json.loads(json.dumps(late.describe()))["columns"]["solved"] == [False] * 4


def test_the_command_line_brackets_a_run(brief, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    asked = ["train", "-o", "run", "--model", "linear", "--loss", "isce:s=3", "--epochs", "2", "--device", "cpu", "-q"]
    trained = run(app, asked)
    assert trained.exit_code == 0, trained.output
    same = ["bracket", "run", "--margins", "--threat", "linf:0.05", "--limit", "12", "--device", "cpu", "--quiet"]
    told = run(app, [*same, "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["samples"], found["trained_s"], found["threat"]["eps"]) == (12, 3.0, 0.05)
    folder = tmp_path / "run" / "margins-linf0.05"
    assert {"bracket.json", "bracket.svg", "bracket.png"} <= {path.name for path in folder.iterdir()}
    again = run(app, same)
    assert again.exit_code == 0, again.output
    assert again.stdout.strip() == found["sentence"]
    for wrong in (["bracket", "nowhere"], ["bracket", "run", "--margins", "--threat", "what"], [*same, "--limit", "5"]):
        assert isinstance(run(app, [*wrong, "--device", "cpu"]).exception, UserError)
    with pytest.raises(UserError, match="seconds"):
        bracket_run(tmp_path / "run", "linf:0.2", seconds=-1)
    assert not (tmp_path / "run" / "bracket-linf0.2").exists()


def test_a_classifier_is_read_as_it_is_asked(brief):
    """Normalisation, head and logit_scale are in the bounds and in the truth."""
    model = models.build("linear", (1, 2, 2), 3, mean=torch.tensor([0.4]), std=torch.tensor([0.2]))
    data = Data(torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), torch.arange(1))
    found = bracket(model, data, THREAT)
    model.logit_scale = 7.0
    scaled = bracket(model, data, THREAT)
    for name in ("margin", "s_att", "s_low", "s_high", "s_cert"):
        assert torch.allclose(getattr(scaled, name), 7 * getattr(found, name), rtol=1e-4), name


# A trained network, with attacks of full length.


@pytest.fixture(scope="module")
def subject(small):
    net, split = small
    return net, split.train.take(slice(0, 12))


@pytest.fixture(scope="module")
def found(subject):
    return bracket(*subject, Threat("linf", 0.05), seconds=10.0)


def test_what_attacks_reach_the_truth_and_what_is_proved_stand_in_order(found):
    slack = 1e-4 * found.margin.abs().max()
    assert (found.s_att <= found.s_high + slack).all()
    assert (found.s_low <= found.s_high + slack).all()
    assert (found.s_low <= found.s_cert + slack).all()
    assert (found.s_att <= found.s_cert + slack).all()
    assert (found.s_att >= -slack).all()


def test_a_status_is_what_the_margin_says(found):
    for status, margin, att, cert in zip(found.status, found.margin, found.s_att, found.s_cert, strict=True):
        if status == "certified":
            assert margin > cert
        if status == "broken":
            assert margin <= att
    assert sum(found.counts.values()) == len(found)


def test_it_is_written_whole_and_drawn(found, tmp_path):
    files = save(found, tmp_path, "digits")
    told = json.loads(files[0].read_text())
    assert told["sentence"] == sentence(found)
    assert all(path.stat().st_size > 1000 for path in files)
    assert {path.suffix for path in files} == {".json", ".svg", ".png", ".pdf"}


def test_without_the_truth_the_bracket_is_wide(found, subject):
    wide = bracket(*subject, Threat("linf", 0.05), seconds=0.0)
    assert wide.s_low is None or (wide.s_low <= wide.s_high).all()
    assert torch.allclose(wide.s_att, found.s_att, atol=1e-4)
