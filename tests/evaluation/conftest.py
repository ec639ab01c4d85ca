"""A small trained network and its evaluation, and checkpoints after every batch."""

from __future__ import annotations

import pytest
from tests.evaluation.helpers import CLOSE, small_mlp

from holdfast.evaluation import evaluate
from holdfast.evaluation.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def trained():
    return small_mlp()


@pytest.fixture(scope="session")
def mlp(trained):
    """A network with one hidden layer, trained on digits."""
    return trained[0]


@pytest.fixture(scope="session")
def test_set(trained):
    return trained[1].test


@pytest.fixture(scope="session")
def some(test_set):
    """90 test digits."""
    return test_set.take(slice(0, 90))


@pytest.fixture(scope="session")
def per_attack(mlp, some):
    """The evaluation of that network on them by the suite "per-attack"."""
    return evaluate(mlp, some, CLOSE, "per-attack")


@pytest.fixture
def save_every_batch(monkeypatch):
    """Checkpoints are written after every batch, not every few seconds."""
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, state, *, force=False: save(self, state, force=True))
