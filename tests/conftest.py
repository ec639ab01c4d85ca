"""Hypothesis: few examples, no deadline, in CI the same ones every time. One thread: tiny tensors, shared cores.

And small trained networks that several files share: train here once what two files need.
"""

import os
import shutil
import sys

import pytest
import torch
from hypothesis import settings
from tests.helpers import on_digits, right_ones, shorten_audits
from torch import nn

from holdfast import cli, data
from holdfast.evaluation import proofs
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.experiments.config import Comparison, Job
from holdfast.experiments.evaluate_model import evaluate_model, from_run
from holdfast.experiments.training import train_network
from holdfast.models import build
from holdfast.objectives import standard
from holdfast.train import FitConfig, fit

settings.register_profile("here", deadline=None, max_examples=40)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

torch.set_num_threads(1)  # ten times faster here than two threads that wait for each other


SHORT_AUDITS = ("test_compare", "test_kill", "test_run_folder")  # where audits stand for work that is done once


@pytest.fixture(scope="module", autouse=True)
def short_measurements(request):
    """Fewer samples whose smallest perturbation is looked for, but where that is tested; and shorter audits.

    Every network that a test evaluates pays for both.
    """
    here = request.node.nodeid
    with pytest.MonkeyPatch.context() as patch:
        if "test_region" not in here and "WRITE_DOCS" not in os.environ:
            patch.setattr("holdfast.region.measures.N_DISTANCES", 24)
        if any(name in here for name in SHORT_AUDITS):
            shorten_audits(patch)
        yield


@pytest.fixture
def short_audits(monkeypatch):
    """A shorter audit, for a single test."""
    shorten_audits(monkeypatch)


@pytest.fixture(scope="session")
def digits():
    """(net, x, y): a tiny convolutional network and 40 test digits that it gets right."""
    net, split = on_digits(
        lambda: (
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
        ),
        lr=5e-3,
        epochs=6,
    )  # fmt: skip
    return net, *right_ones(net, split, 40)


@pytest.fixture(scope="session")
def batch_statistics():
    """(net, split): the pre-activation ResNet with batch statistics, trained with reading C on the digits."""
    split = data.load("digits", val=0.0)
    mean, std = data.standardisation(split.train)
    net = build("preactresnet:depth=8,statistics=batch", split.shape, 10, mean=mean, std=std)
    fit(net, split.train, split.val, standard("isce_c"),
        FitConfig(epochs=4, batch_size=64, optimizer="sgd", lr=0.1, schedule="step"))  # fmt: skip
    return net.eval().requires_grad_(False), split


TRAINED = {"sce": "sce", "isce": "isce:s=100", "cosface": "cosface:m=0.2,scale=15"}


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory):
    """A function from a key of TRAINED to a finished run folder on one fold of the digits. Copy it before you write."""
    folder = tmp_path_factory.mktemp("trained")

    def trained(name):
        fit = FitConfig(epochs=8, batch_size=64, lr=3e-3)
        comparison = Comparison(losses=(TRAINED[name],), folds=1, fit=fit).checked()
        train_network(Job(comparison, comparison.loss_specs[0], 0, 0, folder / name))
        return folder / name

    return trained


@pytest.fixture
def copied_run(trained_runs, tmp_path):
    """The same, copied to ``tmp_path / "run"``."""

    def copied(name):
        return shutil.copytree(trained_runs(name), tmp_path / "run")

    return copied


@pytest.fixture
def holdfast_(capsys, monkeypatch):
    """Runs a command as ``main`` does, in this process: (status, stdout, stderr). A traceback is the test's failure."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["holdfast", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture(scope="session")
def evaluated_run(trained_runs, tmp_path_factory):
    """A run folder with an evaluation of 12 samples in it, "evaluation". Copy it before you write."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained_runs("sce"), run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 3}),))
        evaluate_model(from_run(run, limit=12), "linf:0.1", "tiny", run / "evaluation")
    return run


@pytest.fixture
def unproved(monkeypatch):
    """No sample is proved, so that the attacks get all of them."""
    monkeypatch.setattr(proofs, "certified", lambda *args: None)
