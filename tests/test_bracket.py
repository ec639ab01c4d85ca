"""The bracket s_att <= s* <= s_cert of small networks, where the truth is known."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from holdfast.bracket import bracket, save, sentence
from holdfast.threat import Threat
from small_nets import on_digits


def layers():
    return nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)


@pytest.fixture(scope="module")
def subject():
    net, split = on_digits(layers, lr=3e-3, epochs=10)
    return net.eval(), split.train.take(slice(0, 12))


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
    assert {path.suffix for path in files} == {".json", ".svg", ".png"}


def test_without_the_truth_the_bracket_is_wide(found, subject):
    wide = bracket(*subject, Threat("linf", 0.05), seconds=0.0)
    assert wide.s_low is None or (wide.s_low <= wide.s_high).all()
    assert torch.allclose(wide.s_att, found.s_att, atol=1e-4)
