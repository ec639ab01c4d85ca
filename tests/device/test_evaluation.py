"""What is measured on the device is what the CPU measures: suites, audit, region, certificates, brackets, replay."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from tests.accelerator import is_real, synchronisations
from torch import nn

from holdfast import audit, evaluate, milp, models, region
from holdfast.bounds import cheaply_proved
from holdfast.bracket import bracket
from holdfast.data import Data
from holdfast.evaluation import cascade
from holdfast.evaluation.suites import PGD50, SUITES
from holdfast.importers import ModelSource, open_model
from holdfast.losses import LOSSES
from holdfast.replay import replay
from holdfast.threat import Threat

THREAT = Threat("linf", 0.1)
ROUNDING = 1 if is_real() else 0  # samples that may differ where rounding does


@pytest.fixture(scope="module")
def few(digits):
    """16 digits, eight of them with another label."""
    _, x, y = digits
    y = torch.where(torch.arange(16) % 8 == 0, (y[:16] + 1) % 10, y[:16])
    return Data(x[:16], y, torch.arange(16), classes=tuple("0123456789"))


@pytest.fixture(scope="module")
def evaluations(on_both, few):
    """The quick suite's evaluation on the CPU and on the device, with the number of waits."""
    net, there = on_both
    with synchronisations() as seen:
        away = evaluate(there, few, THREAT, "quick")
    return evaluate(net, few, THREAT, "quick"), away, seen


def shortened(stage):
    return stage if stage == PGD50 else replace(stage, settings={**stage.settings, "steps": 3})


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_gives_the_same_answer_for_every_sample(suite, on_both, few, monkeypatch):
    """Beside the attacks' own the host waits four times a batch: for its rows, what broke, NaNs, those off the grid."""
    batches = []  # of candidates: a stage that attacks several targets at once judges each by itself
    verify = cascade.verify_candidates
    monkeypatch.setattr(cascade, "verify_candidates", lambda *args: batches.append(1) or verify(*args))
    stages = tuple(shortened(stage) for stage in SUITES[suite])
    net, there = on_both
    with synchronisations() as seen:
        away = evaluate(there, few, THREAT, stages)
    attacks_own = sum(count for where, count in seen.items() if where.startswith("attacks/"))
    assert seen.total() - attacks_own <= 4 * len(batches) + 8 * len(stages) + 60, seen
    home = evaluate(net, few, THREAT, stages)
    assert int((away.robust != home.robust).sum()) <= ROUNDING
    if not is_real():
        assert torch.equal(away.clean, home.clean)
        torch.testing.assert_close(away.margin, home.margin)
        assert {name: int(right.sum()) for name, right in away.attack_correct.items()} == {
            name: int(right.sum()) for name, right in home.attack_correct.items()
        }


def test_one_more_batch_waits_three_times_more(unproved, on_both, few):
    """For what broke, for NaNs, and for those off the grid; here two stages take two more batches each."""
    stages = (replace(SUITES["quick"][0], settings={"steps": 3}),)
    counts = []
    for batch_size in (8, 4):
        with synchronisations() as seen:
            evaluate(on_both[1], few, THREAT, stages, batch_size=batch_size)
        counts.append(seen)
    assert counts[1].total() - counts[0].total() <= 2 * 2 * 3, counts[1] - counts[0]


def test_a_second_norm(on_both, few):
    stages = (replace(SUITES["quick"][0], settings={"steps": 3}),)
    home, away = (evaluate(net, few, "l2:0.5", stages) for net in on_both)
    assert int((away.robust != home.robust).sum()) <= ROUNDING


def test_an_evaluation_resumes_on_the_device(on_both, few, tmp_path, evaluations, monkeypatch):
    """From a checkpoint that the CPU wrote."""

    def stop(what, done, total):
        if "targets" in what:
            raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.io.SAVE_EVERY", 0.0)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        evaluate(on_both[0], few, THREAT, "quick", checkpoint=path, progress=stop)
    monkeypatch.setattr(cascade, "clean_pass", None)
    again = evaluate(on_both[1], few, THREAT, "quick", checkpoint=path)
    assert torch.equal(again.robust, evaluations[0].robust)


def test_the_audit_comes_to_the_same_findings(on_both, few, evaluations):
    home, away, _ = evaluations
    here, there = audit(on_both[0], few, home, size=8), audit(on_both[1], few, away, size=8)
    assert [(f.name, f.status) for f in there.findings] == [(f.name, f.status) for f in here.findings]
    assert there.verdict().status == here.verdict().status
    assert int((there.evaluation.robust != here.evaluation.robust).sum()) <= ROUNDING


def test_the_region_has_the_same_figures(few, evaluations, device):
    net = models.build("convnet:width=4", (1, 8, 8), 10).eval()
    x_adv = evaluations[0].x_adv
    for measured in (
        lambda model: region.measure(model, few.x, few.y, x_adv, THREAT, s=1.0, steps=6),
        lambda model: region.projection(model, few.x, few.y, x_adv, grid=5),
    ):
        there = copy.deepcopy(net).to(device)
        assert close(measured(there), measured(net)), "passes may differ, nothing else"


def close(a, b, key=""):
    """Whether two results are the same up to rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], k) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and key not in ("forwards", "backwards"):
        return a == pytest.approx(b, rel=1e-2, abs=1e-3)
    return key in ("forwards", "backwards") or a == b


@pytest.mark.parametrize("threat", [Threat("linf", 0.005), Threat("l2", 0.01)])
def test_certificates_are_the_same(threat, on_both, few, device):
    """And wait for no single image: as often for many of them as for few."""
    net, there = on_both
    x, y = few.x.to(device), few.y.to(device)
    waits = []
    for rows in (slice(0, 4), slice(None)):
        with synchronisations() as seen:
            proved = cheaply_proved(there, x[rows], y[rows], threat)
        waits.append(seen.total())
    assert abs(waits[1] - waits[0]) <= 4, (waits, seen)
    assert proved.device.type == device.type
    assert torch.equal(proved.cpu(), cheaply_proved(net, few.x, few.y, threat))


def test_exact_answers_and_brackets_are_the_same(few, device):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
    data = Data(few.x[:2], torch.tensor([0, 1]), torch.arange(2), classes=tuple("abc"))
    here, there = (bracket(model, data, Threat("linf", 0.02)) for model in (net, copy.deepcopy(net).to(device)))
    for column in ("margin", "s_att", "s_star", "s_cert"):
        torch.testing.assert_close(getattr(there, column), getattr(here, column), rtol=1e-4, atol=1e-5)
    away = copy.deepcopy(net).to(device)
    decided = milp.decide(milp.layers_of(away), data.x.to(device), data.y.to(device), Threat("linf", 0.02))
    assert decided.status == milp.decide(milp.layers_of(net), data.x, data.y, Threat("linf", 0.02)).status


def test_replay_recounts_on_the_device(evaluated_run, tmp_path, device):
    out = shutil.copytree(evaluated_run, tmp_path / "run") / "evaluation"
    (one,) = replay(out, device=str(device))
    assert one.holds, one.problems


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_the_same(name, device):
    """Loss and gradient, and the host never waits: losses check no values."""
    model = models.build("mlp:width=6", (1, 4, 4), 5, head=LOSSES[name].head)
    x, y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    there, x_there, y_there = copy.deepcopy(model).to(device), x.to(device), y.to(device)
    with synchronisations() as seen:
        value = LOSSES[name].loss(there(x_there), y_there)
        value.sum().backward()
    assert seen.total() == 0, seen
    expected = LOSSES[name].loss(model(x), y)
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_imported_networks_run_there(on_both, few, device, tmp_path):
    net = on_both[0]
    program = torch.export.export(net, (few.x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "net.pt2")
    there = open_model(ModelSource(str(tmp_path / "net.pt2")), device)
    torch.testing.assert_close(there(few.x.to(device)).cpu(), net(few.x), rtol=1e-4, atol=1e-4)
