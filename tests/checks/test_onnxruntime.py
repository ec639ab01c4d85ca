"""Adversarial examples of an ONNX network are shown to onnxruntime as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.checks import audit
from holdfast.data import Data
from holdfast.evaluation import evaluate
from holdfast.evaluation.suites import Stage
from holdfast.importers.onnx import load_onnx, runtime_predictions
from holdfast.importers.wrapped import wrap
from holdfast.threat import Threat

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
NAME = "witnesses hold in onnxruntime"
SHORT = (Stage("apgd", "apgd", "margin", settings={"steps": 10}),)


@pytest.fixture(params=[None, 4])
def net(request, tmp_path):
    """A linear network with a softmax, for any batch or for batches of four, behind preprocessing."""
    chance = np.random.default_rng(0)
    weight = chance.normal(size=(16, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["z"]),
            helper.make_node("Softmax", ["z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (request.param, 1, 4, 4))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "n.onnx")
    return wrap(load_onnx(tmp_path / "n.onnx"), input_range=(-1.0, 1.0)).eval()


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
    bonus = torch.tensor([0.0, 1e3, 0.0])

    def moved(module, given, out):  # another class wherever the images are not the clean ones
        known = (given[0][:, None] - (2 * data.x - 1)).abs().flatten(2).amax(2).amin(1) < 1e-5
        return out + bonus * ~known[:, None]

    net.inner.register_forward_hook(moved)
    audited = audit(net, data, evaluate(net, data, Threat("linf", 1e-3), SHORT))
    found = next(one for one in audited.findings if one.name == NAME)
    assert found.n == int((data.y != 1).sum())
    assert found.k > 0.8 * found.n
    assert found.status == "fires"
    assert "does not confirm" in found.why


def test_another_network_has_no_file():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    found, _ = finding(model, samples(model))
    assert (found.status, found.why) == ("not run", "the network does not come from an ONNX file")
