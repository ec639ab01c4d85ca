"""Contracts of fit: it learns, resumes bit for bit, refuses what it cannot do, and never loses a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from holdfast import io, losses, models, run_folder
from holdfast.attacks import pgd
from holdfast.data import Data, load, pixels, standardisation
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.noise import Noise
from holdfast.objectives import Objective, adversarial, free, standard
from holdfast.progress import silent
from holdfast.threat import Threat
from holdfast.train import (
    SCHEDULES,
    CollapseWarning,
    FitConfig,
    accuracy,
    fast_kernels,
    fit,
    initialise_for_bounds,
    loop,
    robust_accuracy,
)

VERSION = 2  # of the checkpoint
TINY = FitConfig(epochs=4, batch_size=50, lr=3e-3, checkpoint_seconds=0)


class Killed(BaseException):
    """Simulates kill -9 in this process: nothing catches it."""


@pytest.fixture(scope="module")
def split():
    return load("digits", limit_train=200)


def network(split, *, name="smallconv", head="linear", seed=0, classes=10):
    mean, std = standardisation(split.train)
    return models.build(name, split.shape, classes, head=head, mean=mean, std=std, seed=seed)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(history):
    return [{key: value for key, value in line.items() if key not in ("seconds", "val_seconds")} for line in history]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def fit_digits(split, model, *, objective=None, config=TINY, **settings):
    """fit on the CPU, by default with SCE and TINY."""
    return fit(model, split.train, split.val, objective or standard(losses.sce), config, device="cpu", **settings)


def kill_after(epoch):
    def progress(what, done, total):
        if done == epoch:
            raise Killed

    return progress


def poisoned(start, *, grad=False, at=None):
    """SCE that turns NaN from this share of the training on; with grad only its gradient does, its value stays."""

    def schedule(progress):
        bad = progress >= start if at is None else abs(progress - at) < 1e-9

        def outer(model, x, x_adv, y):
            each = losses.sce(model(x), y)
            if not bad:
                return each
            return each + 0 * (each - each.detach()).abs().sqrt() if grad else each * math.nan

        return Objective(lambda model, x, y, noise: x, outer)

    return schedule


CASES = {
    "adam": {},
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "schedule": "onecycle"},
    "sgd without momentum": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.0, "schedule": "step"},
    "ema": {"ema": 0.9},
    "augmented": {"pad": 1, "flip": True},
    "noise": {"noise_sigma": 0.3, "pad": 1},
    "for bounds": {"l1": 1e-4, "init": "interval", "precise_batch_norm": True, "ema": 0.5},
    "everything": {"ema": 0.8, "pad": 1, "flip": True, "weight_decay": 0.01, "schedule": "constant", "seed": 7},
    "adversarial": {},
    "free": {"ema": 0.8},
}


@pytest.mark.parametrize("case", CASES)
def test_four_epochs_are_two_and_two_bit_for_bit(case, split, tmp_path):
    config = dataclasses.replace(TINY, **CASES[case])
    objective = standard(losses.sce)
    if case == "adversarial":
        objective = adversarial(losses.sce, Threat("linf", 0.1), steps=2)
    if case == "free":
        objective = free(losses.sce, Threat("linf", 0.1), replays=2)
    whole = network(split)
    one = fit_digits(split, whole, objective=objective, config=config, out=tmp_path / "whole")

    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        fit_digits(split, network(split), objective=objective, config=config, out=broken, progress=kill_after(2))
    assert len(log(broken)) == 2
    assert not (broken / "model.safetensors").exists()
    again = network(split, seed=99)  # other weights: all of them must come from the checkpoint
    torch.randn(1000)
    two = fit_digits(split, again, objective=objective, config=config, out=broken)

    assert same(weights(whole), weights(again))
    assert timeless(one.history) == timeless(two.history) == timeless(log(broken))
    assert [line["epoch"] for line in log(broken)] == [1, 2, 3, 4]
    kept = [io.load_tensors(tmp_path / name / "model.safetensors", "model", 1)[0] for name in ("whole", "broken")]
    assert same(*kept)
    assert same(kept[0], weights(whole))
    ends = [
        io.load_tensors(tmp_path / name / "checkpoint.safetensors", "checkpoint", 2)[0] for name in ("whole", "broken")
    ]
    assert same(*ends)  # the optimiser's state too


def test_a_finished_run_is_not_trained_again(split, tmp_path, monkeypatch):
    first = network(split)
    done = fit_digits(split, first, out=tmp_path / "run")
    monkeypatch.setattr(loop, "_epoch", lambda *_: pytest.fail("trained again"))
    second = network(split, seed=5)
    again = fit_digits(split, second, out=tmp_path / "run")
    assert again.history == done.history
    assert same(weights(first), weights(second))


def test_it_learns_the_digits():
    whole = load("digits", limit_train=1000)
    model = network(whole)
    config = FitConfig(epochs=6, batch_size=50, lr=3e-3)
    done = fit(model, whole.train, whole.val, standard(losses.sce), config, device="cpu")
    assert accuracy(model, whole.test) > 0.9
    assert done.folder is None
    assert done.history[-1]["loss"] < done.history[0]["loss"] / 2


def test_adversarial_training_buys_robustness(split):
    """The objective does what it is for: a smaller loss on PGD's points than plain training has."""
    threat, found = Threat("linf", 0.1), {}
    config = dataclasses.replace(TINY, epochs=15)
    for name, objective in (("plain", standard(losses.sce)), ("robust", adversarial(losses.sce, threat, steps=5))):
        model = network(split)
        fit_digits(split, model, objective=objective, config=config)
        found[name] = evaluate(model, split.test, threat, ()).robust.float().mean()
    assert found["robust"] > found["plain"] + 0.05


def test_a_kill_costs_what_checkpoint_seconds_says(split, tmp_path, monkeypatch):
    """A clock that gains 4 s an epoch: with checkpoint_seconds=10 a checkpoint is due at the end of epochs 3 and 6."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    plain = standard(losses.sce)(0.0)

    def ticking(progress):
        now[0] += 1.0  # 4 steps an epoch
        return plain

    config = dataclasses.replace(TINY, epochs=9, checkpoint_seconds=10.0)
    assert math.ceil(len(split.train) / config.batch_size) == 4
    for stop, kept in ((2, 0), (5, 3), (7, 6)):
        out = tmp_path / str(stop)
        with pytest.raises(Killed):
            fit_digits(split, network(split), objective=ticking, config=config, out=out, progress=kill_after(stop))
        lines = log(out) if (out / "log.jsonl").exists() else []
        assert len(lines) == kept
        lost = (stop - kept) * 4
        assert lost < config.checkpoint_seconds + 4  # and the epoch that was under way
    zero = dataclasses.replace(config, checkpoint_seconds=0)
    with pytest.raises(Killed):
        fit_digits(split, network(split), objective=ticking, config=zero, out=tmp_path / "z", progress=kill_after(5))
    assert len(log(tmp_path / "z")) == 5


def test_log_has_one_line_an_epoch_whatever_was_killed(split, tmp_path):
    config = dataclasses.replace(TINY, epochs=5)
    for epoch in (1, 2, 2, 4):
        with pytest.raises(Killed):
            fit_digits(
                split,
                network(split),
                config=config,
                out=tmp_path,
                progress=kill_after(max(epoch, len(log(tmp_path)) + 1 if (tmp_path / "log.jsonl").exists() else epoch)),
            )
        lines = log(tmp_path)
        assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    fit_digits(split, network(split), config=config, out=tmp_path)
    assert [line["epoch"] for line in log(tmp_path)] == [1, 2, 3, 4, 5]
    assert set(log(tmp_path)[0]) == {"epoch", "loss", "lr", "val", "seconds", "best_epoch"}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_any_write_leaves_a_folder_that_resumes_whole(moment, split, tmp_path, monkeypatch):
    """Dies at the k-th rename, for every k; afterwards weights, log and files are those of a whole run."""
    config, objective = dataclasses.replace(TINY, epochs=2), standard(losses.sce)
    whole = network(split)
    one = fit_digits(split, whole, objective=objective, config=config, out=tmp_path / "whole")
    real, names = os.replace, sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == [
        "checkpoint.safetensors",
        "config.json",
        "env.json",
        "log.jsonl",
        "model.safetensors",
    ]
    wrong = []
    for k in range(1, 50):
        count, written = [0], []

        def dying(source, target, *, k=k, count=count, written=written):
            count[0] += 1
            written.append(os.path.basename(target))
            if count[0] == k and moment == "before":
                raise Killed
            real(source, target)
            if count[0] == k:
                raise Killed

        monkeypatch.setattr(os, "replace", dying)
        out, died = tmp_path / f"run{k}", False
        try:
            fit_digits(split, network(split), objective=objective, config=config, out=out)
        except Killed:
            died = True
        monkeypatch.setattr(os, "replace", real)
        if not died:
            break
        # other weights, where a checkpoint brings the right ones
        again = network(split, seed=3 if (out / "checkpoint.safetensors").exists() else 0)
        two = fit_digits(split, again, objective=objective, config=config, out=out)
        assert same(weights(whole), weights(again)), written[-1]
        assert timeless(two.history) == timeless(one.history), written[-1]
        missing = [name for name in names if not (out / name).exists()]
        if missing:
            wrong.append(f"killed {moment} the rename of {written[-1]}: no {', '.join(missing)}")
        elif timeless(log(out)) != timeless(one.history):
            wrong.append(f"killed {moment} the rename of {written[-1]}: log.jsonl has {len(log(out))} of 2 lines")
    assert k > 5
    assert not wrong


def test_another_configuration_is_refused_by_name(split, tmp_path):
    def go(config=TINY, **about):
        return fit_digits(
            split, network(split), config=config, out=tmp_path / "run", about=about, progress=kill_after(1)
        )

    with pytest.raises(Killed):
        go(loss="sce", data="digits")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="differ in loss") as error:
        go(loss="isce:s=3", data="digits")
    assert str(tmp_path / "run") in str(error.value)
    assert "data" not in str(error.value).split("differ in")[1].split(")")[0]
    with pytest.raises(UserError, match="differ in fit"):
        go(dataclasses.replace(TINY, lr=1e-4), loss="sce", data="digits")
    with pytest.raises(UserError, match="data, loss"):
        go(loss="mmc")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_config_that_cannot_be_read_is_a_user_error(split, tmp_path):
    (tmp_path / "config.json").write_text('{"fit": {"epo')
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        fit_digits(split, network(split), out=tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"fit": {"epo'


@pytest.fixture
def stopped(split, tmp_path):
    """A run folder that was killed after its second epoch, and a way to go on."""
    out = tmp_path / "run"
    with pytest.raises(Killed):
        fit_digits(split, network(split), out=out, progress=kill_after(2))

    def resume(model=None, **settings):
        model = network(split) if model is None else model
        return model, fit_digits(split, model, out=out, **settings)

    return out, resume


def test_a_checkpoint_of_another_version_is_refused_and_kept(stopped):
    out, resume = stopped
    path = out / "checkpoint.safetensors"
    tensors, about = io.load_tensors(path, "checkpoint", 2)
    io.save_tensors(path, "checkpoint", 99, tensors, about)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"version 99.*reads version 2"):
        resume()
    assert path.read_bytes() == before


@pytest.mark.parametrize("other", [{"name": "mlp"}, {"head": "mmc"}, {"classes": 11}])
def test_a_checkpoint_of_another_network_is_refused_and_kept(other, stopped, split):
    out, resume = stopped
    before = (out / "checkpoint.safetensors").read_bytes()
    with pytest.raises(UserError, match="belongs to another network"):
        resume(network(split, **other))
    assert (out / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused_and_kept(share, stopped):
    out, resume = stopped
    path = out / "checkpoint.safetensors"
    cut = path.read_bytes()[: int(share * path.stat().st_size)]
    path.write_bytes(cut)
    with pytest.raises(UserError, match="cut short or damaged"):
        resume()
    assert path.read_bytes() == cut


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_keeps_the_last_checkpoint(failing, split, tmp_path, monkeypatch):
    whole = network(split)
    one = fit_digits(split, whole)
    real = getattr(os, failing)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_disk_after_two(done):
        if done == 2:
            monkeypatch.setattr(os, failing, full)

    out, kept = tmp_path / "run", {}

    def keep_a_copy(what, done, total):
        kept[done] = (out / "checkpoint.safetensors").read_bytes()
        fill_disk_after_two(done)

    with pytest.raises(UserError, match=r"could not write .*checkpoint\.safetensors.*No space left"):
        fit_digits(split, network(split), out=out, progress=keep_a_copy)
    monkeypatch.setattr(os, failing, real)
    assert (out / "checkpoint.safetensors").read_bytes() == kept[2]
    assert not list(out.glob(".*tmp"))
    again = network(split, seed=9)
    two = fit_digits(split, again, out=out)
    assert same(weights(whole), weights(again))
    assert timeless(one.history) == timeless(two.history)


def test_a_nan_loss_names_epoch_and_step_and_keeps_the_last_good_checkpoint(split, tmp_path):
    with pytest.raises(UserError, match=r"not finite in epoch 3, step 2\b") as error:
        fit_digits(split, network(split), objective=poisoned(9 / 16), out=tmp_path)
    assert str(tmp_path) in str(error.value)
    tensors, about = io.load_tensors(tmp_path / "checkpoint.safetensors", "checkpoint", 2)
    assert len(about["history"]) == len(log(tmp_path)) == 2
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    assert not (tmp_path / "model.safetensors").exists()
    model = network(split)
    fit_digits(split, model, out=tmp_path)
    assert all(tensor.isfinite().all() for tensor in weights(model).values())


def test_a_nan_loss_in_the_first_epoch_promises_no_checkpoint(split, tmp_path):
    with pytest.raises(UserError, match="epoch 1, step 1") as error:
        fit_digits(split, network(split), objective=poisoned(0), out=tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    assert "checkpoint is in" not in str(error.value)


def test_a_learning_rate_out_of_bounds_is_reported(split):
    config = dataclasses.replace(TINY, optimizer="sgd", lr=1e30)
    with pytest.raises(UserError, match="Lower the learning rate"):
        fit_digits(split, network(split), config=config)


@pytest.mark.parametrize("epoch", [2, 4])
def test_weights_that_turn_nan_at_the_last_step_of_an_epoch_are_never_kept(epoch, split, tmp_path):
    """The losses of that epoch are finite, the last update is not: neither checkpoint nor model may hold it."""
    at = (epoch - 1) / 4 + 3 / 16
    with pytest.raises(UserError, match="not finite"):
        fit_digits(split, network(split), objective=poisoned(0, grad=True, at=at), out=tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    tensors, about = io.load_tensors(tmp_path / "checkpoint.safetensors", "checkpoint", 2)
    assert len(about["history"]) == epoch - 1
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def test_an_empty_training_set_is_refused(split):
    empty = split.train.take(slice(0, 0))
    with pytest.raises(UserError, match="training set is empty"):
        fit(network(split), empty, split.val, standard(losses.sce), TINY, device="cpu")


def test_an_empty_validation_set_is_allowed(split, tmp_path):
    done = fit(
        network(split), split.train, split.val.take(slice(0, 0)), standard(losses.sce), TINY, out=tmp_path, device="cpu"
    )
    assert [line["val"] for line in done.history] == [None] * 4


def test_labels_beyond_the_head_are_refused(split, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"head has 5 logits, but labels go up to 9.*10 classes"):
        fit_digits(split, network(split, classes=5), out=out)
    assert not out.exists()


def test_negative_labels_are_refused(split):
    wrong = Data(split.train.x, split.train.y - 1, split.train.index)
    with pytest.raises(UserError, match="label"):
        fit(network(split), wrong, split.val, standard(losses.sce), TINY, device="cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", -1), ("batch_size", 0), ("batch_size", -5), ("optimizer", "rmsprop"),
        ("optimizer", "Adam"), ("lr", 0.0), ("lr", -1e-3), ("lr", math.inf), ("lr", math.nan), ("schedule", "linear"),
        ("weight_decay", -1e-4), ("weight_decay", math.nan), ("ema", -0.1), ("ema", 1.0), ("ema", math.nan),
        ("pad", -1), ("precision", "fp8"), ("precision", "float32"), ("momentum", -0.5), ("momentum", math.nan),
        ("noise_sigma", -0.1), ("noise_sigma", 25.0), ("l1", -1e-4), ("init", "shi"), ("precise_batch_norm", 1),
        ("checkpoint_seconds", -1.0), ("checkpoint_seconds", math.nan), ("checkpoint", "first"),
    ],
)  # fmt: skip
def test_every_bad_setting_is_named(name, value):
    with pytest.raises(UserError, match=rf"{name} must be .*{value}"):
        FitConfig(**{name: value})


def test_every_schedule_and_precision_is_accepted():
    for schedule in SCHEDULES:
        FitConfig(schedule=schedule)
        factors = [SCHEDULES[schedule](p / 100) for p in range(100)]
        assert all(0 < f <= 1 + 1e-12 for f in factors)
    for precision in ("no", "bf16"):
        FitConfig(precision=precision)


def test_precision_may_change_between_two_fits_of_one_process(split):
    """A notebook trains in float32, then tries bf16: the second fit is as good as the first."""
    config = dataclasses.replace(TINY, epochs=1)
    fit_digits(split, network(split), config=config)
    done = fit_digits(split, network(split), config=dataclasses.replace(config, precision="bf16"))
    assert math.isfinite(done.history[0]["loss"])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("head", ["linear", "cosine", "mmc", "center", "gaussian"])
def test_weight_decay_is_on_matrices_and_kernels_alone(head, optimizer, split):
    model = network(split, head=head)
    made = loop._optimizer(model, FitConfig(optimizer=optimizer, weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(decays) == len(named)
    for name, parameter in named.items():
        spared = name.endswith(("bias", "centers", "log_variances"))
        assert decays[id(parameter)] == (0.0 if spared else 0.1), name


@pytest.mark.parametrize(("optimizer", "moved"), [("sgd", 1.9 + 2.71), ("momentum", 1.0 + 1.9)])
def test_momentum_looks_ahead_or_does_not(optimizer, moved):
    """After two steps of lr 0.1 under the same gradient: v <- 0.9 v + g, then g + 0.9 v (Nesterov) or v."""
    model = nn.Linear(1, 1)
    before = model.weight.detach().clone()
    made = loop._optimizer(model, FitConfig(optimizer=optimizer, lr=0.1, momentum=0.9))
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
        made.step()
    torch.testing.assert_close(before - model.weight.detach(), torch.full((1, 1), 0.1 * moved))


def test_norms_and_variances_do_not_decay():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = models.HEADS["gaussian"](4, 3, variances=True)

    model = Head()
    made = loop._optimizer(model, FitConfig(weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if decays[id(p)]} == {"conv.weight"}


def test_weight_decay_does_what_it_says(split):
    """Decoupled: with a zero gradient AdamW shrinks a matrix by lr * decay a step and leaves a bias alone."""
    model = network(split)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)

    def still(progress):
        return Objective(lambda model, x, y, noise: x, lambda model, x, x_adv, y: 0 * model(x).logits.sum(1))

    config = FitConfig(epochs=1, batch_size=len(split.train), lr=0.1, weight_decay=0.5, schedule="constant")
    fit_digits(split, model, objective=still, config=config)
    for name, parameter in model.named_parameters():
        wanted = 1.0 if name.endswith("bias") else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, wanted))


def test_ema_is_the_average_of_the_weights_after_each_step(split):
    decay, seen = 0.7, []
    plain = standard(losses.sce)

    model = network(split)
    start = weights(model)

    def recording(progress):
        seen.append(weights(model))  # before the step: after the one before
        return plain(progress)

    config = dataclasses.replace(TINY, epochs=2, ema=decay)
    fit_digits(split, model, objective=recording, config=config)
    last = network(split)
    fit_digits(split, last, objective=plain, config=dataclasses.replace(config, ema=0.0))
    trail = [*seen[1:], weights(last)]  # averaging does not touch the training itself
    assert len(trail) == 8
    for name, mean in start.items():
        wanted = mean.double()
        for step in trail:
            wanted = decay * wanted + (1 - decay) * step[name].double()
        torch.testing.assert_close(model.state_dict()[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_with_ema_the_averaged_weights_are_validated_and_saved(split):
    config = dataclasses.replace(TINY, epochs=2, ema=0.98)
    model = network(split)
    done = fit_digits(split, model, config=config)
    assert done.history[-1]["val"] == accuracy(model, split.val)


def test_there_is_no_way_in_for_test_data():
    assert list(inspect.signature(fit).parameters) == [
        "model", "train", "val", "objective", "config", "val_threat", "out", "about", "progress",
        "track", "device",
    ]  # fmt: skip
    assert "test" not in {field.name for field in dataclasses.fields(FitConfig)}


@pytest.mark.parametrize("drop", [False, True])
def test_the_result_does_not_depend_on_torchs_generator(drop, split):
    """What random state the caller left behind changes nothing, not even dropout."""
    found = []
    for seed in (1, 2):
        model = network(split)
        if drop:
            model.backbone = nn.Sequential(model.backbone, nn.Dropout(0.5))
        torch.manual_seed(seed)
        torch.rand(seed * 10)
        fit_digits(split, model)
        found.append(weights(model))
    assert same(*found)


def test_the_seed_changes_the_order(split):
    found = []
    for seed in (0, 1):
        model = network(split)
        fit_digits(split, model, config=dataclasses.replace(TINY, epochs=1, seed=seed))
        found.append(weights(model))
    assert not same(*found)


def test_the_model_is_left_in_the_state_it_was_given_for(split, tmp_path):
    """Frozen parameters stay frozen and as they were; the rest is trained."""
    model = network(split)
    frozen = model.backbone.layers[0]
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    before, others = frozen.weight.clone(), model.head.linear.weight.detach().clone()
    fit_digits(split, model, out=tmp_path)
    assert torch.equal(frozen.weight, before)
    assert not frozen.weight.requires_grad
    assert not torch.equal(model.head.linear.weight, others)


def test_a_run_folder_loads_as_the_model_that_was_trained(split, tmp_path):
    mean, std = standardisation(split.train)
    built = {"name": "smallconv", "shape": split.shape, "classes": 10, "head": "mmc", "head_settings": {"radius": 5}}
    model = models.build(**built, mean=mean, std=std)
    fit_digits(
        split,
        model,
        objective=standard(losses.mmc),
        config=dataclasses.replace(TINY, epochs=1),
        out=tmp_path / "run",
        about={"model": {**built, "seed": 0}},
    )
    loaded, config = run_folder.load(tmp_path / "run")
    assert same(weights(model), weights(loaded))
    assert config["fit"]["epochs"] == 1
    assert not loaded.training
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert environment["torch"] == torch.__version__

    with pytest.raises(UserError, match=r"no config\.json"):
        run_folder.load(tmp_path)
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not finished"):
        run_folder.load(tmp_path / "run")


def test_a_damaged_run_folder_is_a_user_error(split, tmp_path):
    fit_digits(
        split,
        network(split),
        config=dataclasses.replace(TINY, epochs=1),
        out=tmp_path,
        about={"model": {"name": "smallconv", "shape": [1, 8, 8], "classes": 10}},
    )
    whole = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError):
        run_folder.load(tmp_path)
    (tmp_path / "config.json").write_text(whole.replace('"smallconv"', '"mlp"'))
    with pytest.raises(UserError):
        run_folder.load(tmp_path)


@pytest.mark.parametrize("settings", [{"val_threat": Threat("linf", 0.1)}, {"checkpoint": "best"}])
def test_without_validation_images_there_is_no_best_epoch_to_ask_for(settings, split):
    config = dataclasses.replace(TINY, checkpoint=settings.pop("checkpoint", "last"))
    with pytest.raises(UserError, match="no validation images"):
        fit(
            network(split), split.train, split.val.take(slice(0, 0)), standard(losses.sce), config,
            device="cpu", **settings,
        )  # fmt: skip


def test_robust_validation_is_logged_and_chooses_the_best_epoch(split, tmp_path):
    threat, model = Threat("linf", 0.05), network(split)
    done = fit_digits(split, model, val_threat=threat, out=tmp_path)
    figures = [line["val_robust"] for line in log(tmp_path)]
    assert figures == [line["val_robust"] for line in done.history]
    assert all(line["val_robust"] <= line["val"] for line in done.history)
    assert figures[-1] == robust_accuracy(model, split.val, threat, seed=TINY.seed)
    assert done.best_epoch == figures.index(max(figures)) + 1 == done.history[-1]["best_epoch"]
    assert done.kept_epoch == 4


def test_progress_reports_each_epochs_log_line_in_words(split):
    reports = []
    config = dataclasses.replace(TINY, epochs=2)
    done = fit_digits(
        split, network(split), config=config, val_threat=Threat("linf", 0.05), progress=lambda *r: reports.append(r)
    )
    assert reports == [
        (f"epoch {n}, loss {line['loss']:.4g}, validation {line['val']:.1%}, robust {line['val_robust']:.1%}", n, 2)
        for n, line in enumerate(done.history, 1)
    ]


def fix_validation(monkeypatch, accuracies):
    """From here on validation measures these robust accuracies, one epoch after the other."""
    remaining = iter(accuracies)
    monkeypatch.setattr(loop, "validate", lambda *_: {"val": 0.9, "val_robust": next(remaining), "val_seconds": 0.0})


ACCURACIES = (0.2, 0.5, 0.5, 0.4)  # the second epoch is the best, the earliest of equals


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_the_chosen_weights_are_the_models_and_the_checkpoint_keeps_the_others(
    checkpoint, split, tmp_path, monkeypatch
):
    fix_validation(monkeypatch, ACCURACIES)
    model, seen = network(split), {}
    done = fit_digits(
        split,
        model,
        config=dataclasses.replace(TINY, checkpoint=checkpoint),
        out=tmp_path,
        progress=lambda what, epoch, total: seen.update({epoch: weights(model)}),
    )
    assert [line["best_epoch"] for line in done.history] == [1, 2, 2, 2]
    assert (done.best_epoch, done.kept_epoch) == (2, 2 if checkpoint == "best" else 4)
    assert not same(seen[2], seen[4])
    kept = 2 if checkpoint == "best" else 4
    tensors, about = io.load_tensors(tmp_path / "model.safetensors", "model", 1)
    assert same(tensors, seen[kept])
    assert about["epoch"] == kept
    assert same(weights(model), seen[kept])
    kept_by = io.load_tensors(tmp_path / "checkpoint.safetensors", "checkpoint", 2)[0]
    for prefix, epoch in (("model.", 4), ("best.", 2)):
        part = {name.removeprefix(prefix): t for name, t in kept_by.items() if name.startswith(prefix)}
        assert same(part, seen[epoch])
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "checkpoint.safetensors",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("robust", "epochs"),
    [
        ((0.2, 0.5, 0.26, 0.4), ()),  # worse, but not half
        ((0.2, 0.5, 0.24, 0.1), (3,)),  # said once while it stays down
        ((0.5, 0.0, 0.4, 0.1), (2, 4)),
        ((0.19, 0.0, 0.19, 0.0), ()),
    ],
)
def test_a_collapse_of_robust_accuracy_is_said_when_it_happens(robust, epochs, split, tmp_path, monkeypatch):
    fix_validation(monkeypatch, robust)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit_digits(split, network(split), out=tmp_path / "mine")
    said = [str(one.message) for one in said if one.category is CollapseWarning]
    assert [int(re.search(r"in epoch (\d)", text)[1]) for text in said] == list(epochs)
    assert all(text.startswith("mine: robust") and "checkpoint=best" in text for text in said)


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_resumed_at_any_epoch_the_best_weights_are_the_same_bit_for_bit(ema, split, tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, checkpoint="best", ema=ema)

    def ends(folder):
        prefix = "ema." if ema else "model."
        last = io.load_tensors(folder / "checkpoint.safetensors", "checkpoint", 2)[0]
        return [
            io.load_tensors(folder / "model.safetensors", "model", 1)[0],
            {name.removeprefix(prefix): t for name, t in last.items() if name.startswith(prefix)},
        ]

    def go(folder, seed=0, progress=silent):
        return fit_digits(split, network(split, seed=seed), config=config, out=tmp_path / folder, progress=progress)

    fix_validation(monkeypatch, ACCURACIES)
    whole = go("whole")
    best, last = ends(tmp_path / "whole")
    assert not same(best, last)
    for epoch in (1, 2, 3, 4):
        fix_validation(monkeypatch, ACCURACIES)
        with pytest.raises(Killed):
            go(str(epoch), progress=kill_after(epoch))
        done = go(str(epoch), seed=9)
        assert (done.best_epoch, timeless(done.history)) == (2, timeless(whole.history))
        again = ends(tmp_path / str(epoch))
        assert same(again[0], best), epoch
        assert same(again[1], last), epoch


def test_a_nan_loss_names_the_samples(split):
    guilty = sorted(split.train.index[[3, 70, 140]].tolist())
    met = []

    def perturb(model, x, y, noise):
        met[:] = [noise.index]
        return x

    def outer(model, x, x_adv, y):
        wrong = torch.isin(met[0], torch.tensor(guilty))
        return losses.sce(model(x), y).where(~wrong, math.nan)

    config = dataclasses.replace(TINY, batch_size=1000)
    with pytest.raises(UserError, match=f"training samples {', '.join(map(str, guilty))}: look at them"):
        fit_digits(split, network(split), objective=lambda _: Objective(perturb, outer), config=config)
    guilty = guilty[:1]
    with pytest.raises(UserError, match=f"training sample {guilty[0]}: look at it"):
        fit_digits(split, network(split), objective=lambda _: Objective(perturb, outer), config=config)


@pytest.mark.parametrize("fails", [False, True])
def test_torchs_generator_is_left_as_it_was(fails, split):
    torch.manual_seed(5)
    torch.rand(3)
    before = torch.get_rng_state()
    objective = poisoned(0.5) if fails else adversarial(losses.sce, Threat("linf", 0.1), steps=1)
    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        fit_digits(split, network(split), objective=objective, val_threat=Threat("linf", 0.1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_norm_in_eval_mode_stays_frozen(split):
    frozen, free = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), frozen, nn.ReLU(), nn.Conv2d(4, 4, 3), free, nn.Flatten(), nn.LazyLinear(10)
    )
    model(torch.zeros(2, *split.shape))
    frozen.eval()
    before = {name: tensor.clone() for name, tensor in frozen.named_buffers()}
    other = free.running_mean.clone()
    objective = adversarial(losses.sce, Threat("linf", 0.1), steps=1)
    fit_digits(split, model, objective=objective, val_threat=Threat("linf", 0.1))
    assert (frozen.training, free.training, model.training) == (False, True, True)
    assert same(dict(frozen.named_buffers()), before)
    assert not torch.equal(free.running_mean, other)


def test_weight_context_is_entered_with_the_batch_and_left_before_the_step(split):
    model, events = network(split), []

    @contextlib.contextmanager
    def weight_context(net, x, x_adv, y):
        start = weights(net)
        events.append("enter")
        assert net is model
        assert torch.equal(x_adv, x + 1)
        assert x.shape == (len(y), *split.shape)
        yield
        events.append("leave")
        assert all(p.grad is not None for p in net.parameters())  # backward was inside
        assert same(weights(net), start)  # and the step was not

    def outer(net, x, x_adv, y):
        events.append("loss")
        return losses.sce(net(x), y)

    start = weights(model)
    fit_digits(
        split,
        model,
        objective=lambda _: Objective(lambda net, x, y, noise: x + 1, outer, weight_context),
        config=dataclasses.replace(TINY, epochs=1),
    )
    assert events == ["enter", "loss", "leave"] * 4
    assert not same(weights(model), start)


def test_free_training_takes_the_steps_that_are_written_by_hand(split):
    """Two batches of an epoch, three replays each: one backward pass moves the weights and x_adv."""
    model, threat = network(split), Threat("linf", 0.1)
    config = FitConfig(epochs=1, batch_size=100, optimizer="momentum", lr=0.05, momentum=0.9, schedule="constant")
    done = fit_digits(split, model, objective=free(losses.sce, threat, replays=3, step=0.5), config=config)
    by_hand, losses_by_hand = network(split), []
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    order = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(0))
    for rows in order.split(100):
        x, y = pixels(split.train.x[rows]), split.train.y[rows]
        x_adv = threat.random_start(x, Noise(0, split.train.index[rows]).fold(0))
        for _ in range(3):
            x_adv.requires_grad_()
            loss = nn.functional.cross_entropy(by_hand(x_adv).logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses_by_hand.append(loss.item())
            x_adv = torch.min(torch.max(x_adv.detach() + 0.05 * x_adv.grad.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    assert done.history[0]["loss"] == pytest.approx(sum(losses_by_hand) / len(losses_by_hand), rel=1e-4)
    for mine, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(mine, expected, atol=1e-4)
    assert losses_by_hand[1] != pytest.approx(losses_by_hand[0], rel=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["smallconv", "mlp"])
def test_the_quick_kernel_finds_the_same_points(name, norm, split, monkeypatch):
    model, data = network(split, name=name), split.val
    x, y, threat = pixels(data.x), data.y, Threat(norm, 0.5 if norm == "l2" else 0.1)
    taken, fits = [], fast_kernels._is_frozen_grey_convolution
    monkeypatch.setattr(fast_kernels, "_is_frozen_grey_convolution", lambda *a: taken.append(fits(*a)) or taken[-1])

    def attack():
        return pgd(model, x, y, threat, score=losses.sce, noise=Noise(0, data.index), steps=5)

    plain = attack()
    with fast_kernels.fast_input_gradients(torch.device("cpu")):
        quick = attack()
    assert any(taken) == (name == "smallconv")  # it was the other kernel
    torch.testing.assert_close(quick, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), ((1, 2), (2, 0), 2), (3, 2, 1)])
def test_the_quick_kernel_is_a_convolutions_gradient(stride, padding, dilation):
    made = torch.Generator().manual_seed(0)
    x, weight = torch.rand(3, 1, 11, 9, generator=made), torch.rand(4, 1, 3, 2, generator=made)
    bias, found = torch.rand(4, generator=made), []
    for context in (contextlib.nullcontext(), fast_kernels.fast_input_gradients(torch.device("cpu"))):
        leaf = x.clone().requires_grad_()
        with context:
            out = nn.functional.conv2d(leaf, weight, bias, stride, padding, dilation, 1)
            (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        found.append((out.detach(), grad))
    assert type(out.grad_fn).__name__ == "_GreyConvolutionBackward"
    torch.testing.assert_close(found[1], found[0])


def test_the_inner_attack_of_bf16_asks_a_network_in_bf16(split):
    asked = []

    def perturb(model, x, y, noise):
        with torch.autocast("cpu", enabled=False):  # as attacks do
            out = model(x)
        asked.append((out.logits.dtype, bool((out.logits == network_of(x)).all())))
        return x

    for precision in ("no", "bf16"):
        model = network(split)
        network_of = lambda x, model=model: model(x).logits  # noqa: E731
        fit_digits(
            split,
            model,
            objective=lambda _: Objective(perturb, lambda m, x, x_adv, y: losses.sce(m(x), y)),
            config=dataclasses.replace(TINY, epochs=1, batch_size=1000, precision=precision),
        )
    assert asked == [(torch.float32, True), (torch.float32, False)]


SCRIPT = """
import sys, json, torch
torch.set_num_threads(1)
from pathlib import Path
from holdfast import losses, models
from holdfast.data import load
from holdfast.objectives import adversarial
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit
split = load("digits", limit_train=110)  # 99 to train on: batches of 48, 48 and 3
model = models.build("smallconv", split.shape, 10)
config = FitConfig(epochs=2, batch_size=48, pad=1, weight_decay=1e-3, optimizer="sgd", lr=0.02, ema=float(sys.argv[2]))
objective = adversarial(losses.isce, Threat("l2", 0.5), steps=2)  # smooth: no sign to flip by rounding
fit(model, split.train, split.val, objective, config, out=Path(sys.argv[1]), device="cpu")
"""


def in_processes(count, script, out, ema):
    alone = [sys.executable]
    group = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--master_port=0",
             "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]  # fmt: skip
    done = subprocess.run(
        [*(alone if count == 1 else group), str(script), str(out), str(ema)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=240, cwd=script.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return io.load_tensors(out / "model.safetensors", "model", 1)[0], log(out)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return {count: in_processes(count, script, folder / f"by{count}", 0.5) for count in (1, 2)}


@pytest.mark.slow
def test_two_processes_train_the_network_of_one(sides):
    (one, _), (two, _) = sides[1], sides[2]
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)


DOUBLE_SCRIPT = SCRIPT.replace("epochs=2", "epochs=7").replace(
    "config =",
    """
class Double(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.double())

model = Double(model.double())
config =""",
)


@pytest.mark.slow
def test_in_float64_two_processes_train_the_network_of_one_to_ten_digits(tmp_path):
    """21 steps of adversarial training without batch norm: what differs is rounding alone."""
    script = tmp_path / "script.py"
    script.write_text(DOUBLE_SCRIPT)
    one, two = (in_processes(count, script, tmp_path / f"by{count}", 0)[0] for count in (1, 2))
    for name in one:
        assert one[name].dtype == torch.float64
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_two_processes_log_the_loss_of_one(sides):
    """The log tells the whole batch's loss, not the share of the process that writes it."""
    (_, one), (_, two) = sides[1], sides[2]
    assert [line["val"] for line in two] == [line["val"] for line in one]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_weights_are_perturbed_inside_and_restored_before_the_step(split):
    """AWP in the loop: it changes the training, and what is kept are weights that were stepped, not perturbed."""
    threat, ends = Threat("linf", 0.05), []
    for awp in (0.0, 0.01):
        model = network(split)
        done = fit_digits(
            split,
            model,
            objective=adversarial(losses.sce, threat, steps=2, awp=awp),
            config=dataclasses.replace(TINY, epochs=2),
        )
        assert done.history[-1]["loss"] > 0
        ends.append(weights(model))
    assert not same(*ends)


LONG_SCRIPT = (
    SCRIPT.replace("epochs=2", "epochs=60").replace("ema=", "checkpoint_seconds=0, ema=")
    + """
print("done", len((Path(sys.argv[1]) / "log.jsonl").read_text().splitlines()))
"""
)


@pytest.mark.slow
def test_a_lost_worker_ends_the_others_with_a_word_and_a_checkpoint_to_go_on_from(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "run"
    mark = "import os, pathlib; pathlib.Path(f\"pid{os.environ['RANK']}\").write_text(str(os.getpid()))\n"
    script.write_text(mark + LONG_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
               "--rdzv_endpoint=127.0.0.1:0", str(script), str(out), "0"]  # fmt: skip
    settings = {
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        "cwd": tmp_path,
        "text": True,
    }
    group = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
    until = time.monotonic() + 120
    while not (out / "log.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    output, _ = group.communicate(timeout=120)
    assert group.returncode != 0
    assert "done" not in output
    assert re.search(r"another process of this fit was lost|was events to end \(SIGTERM\)", output), output[-3000:]
    assert re.search(r"The checkpoint in \S+ holds \d+ epochs: rerun the same command to resume", output)
    again = subprocess.run(command, capture_output=True, timeout=240, **settings)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "done 60" in again.stdout


def test_noise_is_seen_by_the_network_alone_and_not_clipped(split):
    """Attack and loss have x in the box; the network sees the same noise at x and x_adv, and another each epoch."""
    seen, asked = [], []

    class Looks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(split)

        def forward(self, x):
            seen.append(x.detach().clone())
            return self.net(x)

    def schedule(progress):
        def perturb(model, x, y, noise):
            asked.append(x.clone())
            return x + 0.25

        return Objective(perturb, lambda model, x, x_adv, y: losses.sce(model(x), y) + losses.sce(model(x_adv), y))

    train = split.train.take(slice(0, 32))
    config = FitConfig(epochs=2, batch_size=32, noise_sigma=0.5)
    fit(Looks(), train, train.take(slice(0, 0)), schedule, config, device="cpu")
    at_x, at_x_adv = (seen[-2] - asked[-1], seen[-1] - asked[-1] - 0.25)
    assert torch.allclose(at_x, at_x_adv, atol=1e-6)
    assert abs(float(at_x.std()) - 0.5) < 0.03
    assert seen[-1].min() < 0
    first = sorted((seen[-4] - asked[-2]).flatten(1).sum(1).tolist())
    assert first != sorted(at_x.flatten(1).sum(1).tolist())
    assert asked[-1].min() >= 0
    assert asked[-1].max() <= 1


def test_l1_drives_weights_to_zero_and_leaves_biases(split):
    plain, sparse = network(split), network(split)
    config = FitConfig(epochs=4, batch_size=50, optimizer="sgd", lr=0.05, momentum=0.0)
    fit_digits(split, plain, config=config)
    fit_digits(split, sparse, config=dataclasses.replace(config, l1=0.05))
    size = [sum(float(p.detach().abs().sum()) for p in net.parameters() if p.ndim > 1) for net in (plain, sparse)]
    assert size[1] < 0.8 * size[0]


def test_l1_leaves_centers_where_they_belong(split):
    far, near = network(split, head="center"), network(split, head="center")
    config = FitConfig(epochs=2, batch_size=50, optimizer="sgd", lr=0.05, momentum=0.0)
    before = far.head.centers.detach().clone()
    fit_digits(split, far, config=dataclasses.replace(config, l1=0.05))
    fit_digits(split, near, config=config)
    assert torch.equal(far.head.centers, before)  # SCE alone gives them no gradient
    assert torch.equal(near.head.centers, before)


def test_an_interval_start_has_radii_that_neither_grow_nor_shrink(split):
    sizes = [64, 300, 300, 300, 300, 10]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]

    def growth(model):
        radius = torch.full((1, 64), 0.1)
        for layer in model[1:-1:2]:
            radius = radius @ layer.weight.detach().abs().T
        return float(radius.mean()) / 0.1

    net = nn.Sequential(nn.Flatten(), *layers[:-1])
    assert growth(net) > 1000
    initialise_for_bounds(net, seed=3)
    assert 8 < growth(net) < 128  # a factor of 2 in each of five layers, which the ReLU between them halves
    first = net[1].weight.detach().clone()
    initialise_for_bounds(net, seed=3)
    assert torch.equal(first, net[1].weight)


def test_precise_batch_norm_has_the_statistics_of_all_images_under_the_last_weights(split):
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    net[3].eval()  # frozen: it keeps its statistics
    train = split.train.take(slice(0, 256))
    config = FitConfig(epochs=1, batch_size=64, precise_batch_norm=True)
    fit(net, train, train.take(slice(0, 0)), standard(losses.sce), config, device="cpu")
    assert float(net[0].running_mean) == pytest.approx(float(pixels(train.x).mean()), abs=1e-6)
    assert float(net[0].running_var) == pytest.approx(float(pixels(train.x).var()), rel=0.02)
    assert net[0].momentum == 0.1
    assert torch.equal(net[3].running_mean, torch.zeros(10))


def test_folders_of_runs_without_noise_are_what_they_were(split, tmp_path):
    fit_digits(split, network(split), config=dataclasses.replace(TINY, epochs=1), out=tmp_path / "plain")
    assert "noise_sigma" not in json.loads((tmp_path / "plain" / "config.json").read_text())["fit"]
    noisy = dataclasses.replace(TINY, epochs=1, noise_sigma=0.25)
    with pytest.raises(UserError, match="another configuration"):
        fit_digits(split, network(split), config=noisy, out=tmp_path / "plain")
