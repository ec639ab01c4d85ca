"""Adversarial examples of an ONNX network are shown to onnxruntime as well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from holdfast.checks import audit, with_later_witnesses
from holdfast.data import Data
from holdfast.evaluation import StageCost, add_witnesses, evaluate
from holdfast.evaluation.suites import Stage
from holdfast.importers.onnx import load_onnx, runtime_predictions
from holdfast.importers.wrapped import wrap
from holdfast.threat import Threat
from holdfast.witnesses import Witnesses

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
NAME = "witnesses hold in onnxruntime"
SHORT = (Stage("apgd", "apgd", "margin", settings={"steps": 10}),)


def linear(path, shape):
    """A linear network with a softmax, behind preprocessing."""
    chance = np.random.default_rng(0)
    weight = chance.normal(size=(16, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"], axis=1 if len(shape) == 4 else 0),
            helper.make_node("MatMul", ["flat", "w"], ["z"]),
            helper.make_node("Softmax", ["z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return wrap(load_onnx(path), input_range=(-1.0, 1.0)).eval()


@pytest.fixture(params=[None, 4])
def net(request, tmp_path):
    """For any batch or for batches of four."""
    return linear(tmp_path / "n.onnx", (request.param, 1, 4, 4))


def samples(net, n=30):
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Data(x, net(x).argmax(1), torch.arange(n))


def finding(net, data):
    audited = audit(net, data, evaluate(net, data, Threat("linf", 0.1), SHORT))
    return next(one for one in audited.findings if one.name == NAME), audited


def test_what_onnxruntime_confirms_is_counted(net):
    data = samples(net)
    assert torch.equal(runtime_predictions(net, data.x), data.y)
    found, audited = finding(net, data)
    assert (found.status, found.k) == ("holds", 0)
    assert found.n == int((~audited.evaluation.robust).sum()) > 5


def test_what_it_does_not_confirm_is_counted_apart(net):
    """Holdfast's copy of the network answers otherwise than the file: onnxruntime keeps the labels."""
    data = samples(net)
    answers_otherwise_off(net, data)
    audited = audit(net, data, evaluate(net, data, Threat("linf", 1e-3), SHORT))
    found = next(one for one in audited.findings if one.name == NAME)
    assert found.n == int((data.y != 1).sum())
    assert found.k > 0.8 * found.n
    assert found.status == "fires"
    assert "does not confirm" in found.why


def answers_otherwise_off(net, data):
    """Holdfast's copy answers class 1 wherever the images are not the clean ones; the file does not."""
    bonus = torch.tensor([0.0, 1e3, 0.0])

    def moved(module, given, out):
        known = (given[0][:, None] - (2 * data.x - 1)).abs().flatten(2).amax(2).amin(1) < 1e-5
        return out + bonus * ~known[:, None]

    net.inner.register_forward_hook(moved)


def test_what_the_audit_and_the_region_break_is_asked_as_well(net):
    """An evaluation that breaks nothing: all that counts is found later, and onnxruntime confirms none of it."""
    data = samples(net)
    answers_otherwise_off(net, data)
    evaluation = evaluate(net, data, Threat("linf", 1e-3), SHORT)
    kept = evaluation.broken_by < 0
    nothing = replace(
        evaluation, broken_by=evaluation.broken_by.clamp(max=-1), x_adv=data.x.clone(), margin_adv=evaluation.margin
    )
    assert not bool(kept.all())
    audited = audit(net, data, nothing)
    found = next(one for one in audited.findings if one.name == NAME)
    assert found.n == int((audited.evaluation.broken_by >= 0).sum()) > 0
    assert found.k > 0.8 * found.n

    clean = replace(audited, evaluation=nothing)  # now the region breaks what the audit did not
    cost = StageCost("region")
    rows = torch.nonzero(~kept)[:, 0]
    witnesses = Witnesses(rows, evaluation.x_adv[rows], evaluation.margin_adv[rows], evaluation.prediction_adv[rows])
    later = with_later_witnesses(clean, net, add_witnesses(nothing, [witnesses], cost))
    found = next(one for one in later.findings if one.name == NAME)
    assert found.n == len(rows)
    assert found.k > 0.8 * found.n
    assert found.status == "fires"


def test_onnxruntime_is_asked_in_the_order_of_the_datas_classes(tmp_path):
    """Behind --classes the module's class 0 is another logit of the file."""
    plain = linear(tmp_path / "n.onnx", (None, 1, 4, 4))
    ordered = wrap(plain.inner, input_range=(-1.0, 1.0), class_order=(2, 0, 1)).eval()
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(runtime_predictions(ordered, x), ordered(x).logits.argmax(1))
    assert not torch.equal(runtime_predictions(ordered, x), runtime_predictions(plain, x))


def test_a_graph_without_a_batch_axis_is_asked_one_image_at_a_time(tmp_path):
    net = linear(tmp_path / "n.onnx", (1, 4, 4))
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(runtime_predictions(net, x), net(x).argmax(1))


def test_another_network_has_no_file():
    torch.manual_seed(0)  # weights that predict every class: without the third one there is a warning
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    found, _ = finding(model, samples(model))
    assert (found.status, found.why) == ("not run", "the network does not come from an ONNX file")
