"""Quantised ONNX networks: onnxruntime's answers, gradients straight through the rounding, no influence of batches."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.importers import ModelSource, load_onnx, open_model, wrap
from holdfast.threat import Threat

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
SIDE, CLASSES = 12, 6


def weights(*shape, seed=0):
    fan = np.prod(shape[1:]) if len(shape) > 1 else 50
    return (np.random.default_rng(seed).normal(size=shape) * np.sqrt(2 / fan)).astype(np.float32)


def saved(nodes, constants, path, shape, *, elem=1, opset=21, domains=()):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", elem, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), *[helper.make_opsetid(name, 1) for name in domains]]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def convnet(path, batch="n"):
    """Convolutions (one depthwise), a residual sum, pooling, a swish, dense layers: what a quantiser meets."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]), node("Relu", ["c0"], ["r0"]),
        node("Conv", ["r0", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], group=8),
        node("Clip", ["c1", "low", "six"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"]), node("Add", ["c2", "r0"], ["a"]),
        node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]), node("LeakyRelu", ["p"], ["l"], alpha=0.1),
        node("Conv", ["l", "w3", "b3"], ["c3"], strides=[2, 2]), node("Sigmoid", ["c3"], ["s"]),
        node("Mul", ["c3", "s"], ["m"]), node("GlobalAveragePool", ["m"], ["g"]), node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["h"], transB=1), node("Relu", ["h"], ["k"]),
        node("MatMul", ["k", "w5"], ["o"]), node("Add", ["o", "b5"], ["y"]),
    ]  # fmt: skip
    held = {
        "w0": weights(8, 3, 3, 3), "b0": weights(8), "w1": weights(8, 1, 3, 3), "b1": weights(8),
        "w2": weights(8, 8, 1, 1), "w3": weights(16, 8, 3, 3), "b3": weights(16), "w4": 2 * weights(12, 16),
        "b4": weights(12), "w5": 3 * weights(CLASSES, 12).T.copy(), "b5": weights(CLASSES),
        "low": np.float32(0), "six": np.float32(6),
    }  # fmt: skip
    return saved(nodes, held, path, (batch, 3, SIDE, SIDE), opset=17)


def pictures(n=60, seed=1):
    """8-bit images."""
    return (np.random.default_rng(seed).integers(0, 256, (n, 3, SIDE, SIDE)) / 255).astype(np.float32)


def quantised(folder, how, activations="QUInt8", kind="QInt8", per_channel=False, batch="n"):
    quantization = pytest.importorskip("onnxruntime.quantization")
    source, target = convnet(folder / "float.onnx", batch), folder / "int8.onnx"
    types = quantization.QuantType
    logging.disable(logging.WARNING)
    try:
        if how == "dynamic":
            quantization.quantize_dynamic(source, target, weight_type=types[kind], per_channel=per_channel)
        else:

            class Calibration(quantization.CalibrationDataReader):
                batches = iter([{"x": part} for part in np.split(pictures(32, seed=2), 2 if batch == 16 else 32)])

                def get_next(self):
                    return next(self.batches, None)

            quantization.quantize_static(
                source, target, Calibration(), quant_format=quantization.QuantFormat[how],
                activation_type=types[activations], weight_type=types[kind], per_channel=per_channel,
            )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    return target


def truth(path, x):
    """onnxruntime's answer to each image alone."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": image[None]})[0].reshape(1, -1) for image in x])


HOW = [
    *((how, activations, kind, per_channel) for how in ("QDQ", "QOperator") for activations, kind, per_channel in (
        ("QUInt8", "QInt8", False), ("QUInt8", "QInt8", True), ("QInt8", "QInt8", True), ("QUInt8", "QUInt8", False),
    )),
    ("dynamic", "", "QInt8", False), ("dynamic", "", "QUInt8", True), ("QDQ", "QInt16", "QInt8", False),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of the quantiser
@pytest.mark.parametrize(("how", "activations", "kind", "per_channel"), HOW)
def test_what_engineers_ship_answers_as_onnxruntime_does(how, activations, kind, per_channel, tmp_path):
    path = quantised(tmp_path, how, activations, kind, per_channel)
    net, x = load_onnx(path), pictures()
    assert net.quantised
    leaf = torch.from_numpy(x).requires_grad_()
    z, expected = net(leaf), truth(path, x)
    found, step = z.detach().numpy(), np.ptp(expected) / 255
    assert (found.argmax(1) == expected.argmax(1)).all()
    # A number in ten thousand lies so near to a rounding boundary that the last bit of float32 decides.
    assert (np.abs(found - expected).max(1) > 1e-3 * step).mean() < (0.5 if activations == "QInt16" else 0.05)
    assert np.abs(found - expected).max() < 1.5 * step
    alone = torch.cat([net(image[None]) for image in leaf[:20]])
    assert torch.equal(alone, z[:20])
    (grad,) = torch.autograd.grad(z.square().sum(), leaf)
    (smooth,) = torch.autograd.grad(load_onnx(tmp_path / "float.onnx")(leaf).square().sum(), leaf)
    assert torch.cosine_similarity(grad.flatten(), smooth.flatten(), dim=0) > 0.9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["QDQ", "QOperator", "dynamic"])
def test_an_attack_breaks_it_as_it_breaks_the_float_network(how, tmp_path):
    path = quantised(tmp_path, how)
    robust = {}
    for name in ("float", "int8"):
        net = open_model(ModelSource(str(tmp_path / f"{name}.onnx")))
        x = torch.from_numpy(pictures(40))
        data = Data(x, net(x).argmax(1), torch.arange(40))
        found = evaluate(net, data, Threat("linf", 4 / 255), suite="quick")
        assert found.clean.all()
        robust[name] = float(found.robust.float().mean())
        broken = found.broken_by >= 0
        answers = truth(path if name == "int8" else tmp_path / "float.onnx", found.x_adv[broken].numpy())
        assert (answers.argmax(1) != data.y[broken].numpy()).mean() > 0.95  # onnxruntime is fooled too
    assert robust["float"] < 0.9
    assert abs(robust["float"] - robust["int8"]) <= 0.15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["QDQ", "QOperator", "dynamic"])
@pytest.mark.parametrize("batch", [1, 16])
def test_a_fixed_batch_takes_any(how, batch, tmp_path):
    if how == "dynamic" and batch > 1:
        pytest.skip("its answer to an image depends on the fifteen others")
    net, x = load_onnx(quantised(tmp_path, how, batch=batch)), torch.from_numpy(pictures(19))
    z = net(x)
    torch.testing.assert_close(torch.cat([net(x[:1]), net(x[1:7]), net(x[7:])]), z)
    if batch == 1:
        assert (z.numpy().argmax(1) == truth(tmp_path / "int8.onnx", x.numpy()).argmax(1)).all()


def test_operators_of_one_product(tmp_path):
    """MatMulIntegerToFloat and DynamicQuantizeMatMul, which onnxruntime's optimiser writes."""
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (20, 5)).astype(np.int8)
    held = {"w": w, "ws": np.linspace(0.01, 0.02, 5).astype(np.float32), "wz": np.zeros(5, np.int8), "b": weights(5)}
    fused = [helper.make_node("DynamicQuantizeMatMul", ["x", "w", "ws", "wz", "b"], ["y"], domain="com.microsoft")]
    apart = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulIntegerToFloat", ["q", "w", "s", "ws", "z", "wz", "b"], ["y"], domain="com.microsoft"),
    ]
    x = weights(7, 20, seed=3)
    for name, nodes in (("fused", fused), ("apart", apart)):
        path = saved(nodes, held, tmp_path / f"{name}.onnx", ("n", 20), domains=("com.microsoft",), opset=17)
        np.testing.assert_allclose(load_onnx(path)(torch.from_numpy(x)).numpy(), truth(path, x), atol=1e-5)


@pytest.mark.parametrize("op", ["QLinearAveragePool", "QLinearConcat", "QLinearSoftmax", "QLinearWhere"])
def test_operators_of_onnxruntime(op, tmp_path):
    node, ms = helper.make_node, {"domain": "com.microsoft"}
    held = {"s": np.float32(0.02), "z": np.uint8(120), "t": np.float32(0.03), "u": np.uint8(100), "c": np.arange(6) < 3}
    middle = {
        "QLinearAveragePool": node(op, ["q", "s", "z", "t", "u"], ["m"], kernel_shape=[2, 2], **ms),
        "QLinearConcat": node(op, ["t", "u", "q", "s", "z", "q", "s", "z"], ["m"], axis=1, **ms),
        "QLinearSoftmax": node(op, ["q", "s", "z", "t", "u"], ["m"], axis=-1, opset=17, **ms),
        "QLinearWhere": node(op, ["c", "q", "s", "z", "q", "t", "u", "t", "u"], ["m"], **ms),
    }[op]
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]), middle, node("DequantizeLinear", ["m", "t", "u"], ["d"]),
        node("Flatten", ["d"], ["y"]),
    ]  # fmt: skip
    path = saved(nodes, held, tmp_path / "net.onnx", ("n", 2, 5, 6), opset=17, domains=("com.microsoft",))
    x = np.random.default_rng(0).normal(size=(8, 2, 5, 6)).astype(np.float32)
    found, expected = load_onnx(path)(torch.from_numpy(x)).numpy(), truth(path, x)
    assert np.abs(found - expected).max() < 0.031
    # onnxruntime's softmax sums a table of rounded exponentials.
    assert (np.abs(found - expected) > 1e-4).mean() < (0.1 if op == "QLinearSoftmax" else 0.01)


def test_blocks_and_axes_have_their_own_scales(tmp_path):
    """Opset 21: one scale per block of an axis; one per channel on any axis."""
    node = helper.make_node
    held = {
        "w": np.random.default_rng(0).integers(-8, 8, (12, 4)).astype(np.int8),
        "ws": np.linspace(0.1, 0.2, 12).astype(np.float32).reshape(3, 4), "wz": np.zeros((3, 4), np.int8),
        "s": np.linspace(0.01, 0.02, 12).astype(np.float32), "z": np.full(12, 3, np.int8),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=-1),
        node("DequantizeLinear", ["w", "ws", "wz"], ["v"], axis=0, block_size=4), node("MatMul", ["d", "v"], ["y"]),
    ]  # fmt: skip
    path = saved(nodes, held, tmp_path / "net.onnx", ("n", 12))
    x = weights(9, 12)
    np.testing.assert_allclose(load_onnx(path)(torch.from_numpy(x)).numpy(), truth(path, x), atol=1e-5)


def test_half_to_even_and_saturation(tmp_path):
    """Rounding and saturation of the 8-bit types, at the values where they decide."""
    for kind in (np.uint8, np.int8):
        held = {"s": np.float32(0.5), "z": kind(10)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ]
        path = saved(nodes, held, tmp_path / "net.onnx", ("n", 9))
        x = np.array([[-999, -69.25, -5.25, -0.25, 0, 0.25, 0.75, 58.75, 1e9]], np.float32)
        leaf = torch.from_numpy(x).requires_grad_()
        y = load_onnx(path)(leaf)
        np.testing.assert_array_equal(y.detach().numpy(), truth(path, x))
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        info = np.iinfo(kind)
        inside = (np.rint(x / 0.5) + 10 >= info.min) & (np.rint(x / 0.5) + 10 <= info.max)
        np.testing.assert_array_equal(grad.numpy() > 0, inside)


@pytest.mark.parametrize(
    ("elem", "shape"), [(2, ("n", SIDE, SIDE, 3)), (2, (1, 3, SIDE, SIDE)), (3, ("n", 3, SIDE, SIDE))]
)
def test_an_input_of_integers_takes_images(elem, shape, tmp_path):
    """uint8 or int8, channels first or last: images in [0, 1] are rescaled to the type's range and rounded."""
    last = shape[-1] == 3
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2] if last else [0, 1, 2, 3]),
        helper.make_node("Cast", ["t"], ["f"], to=1), helper.make_node("Mul", ["f", "k"], ["m"]),
        helper.make_node("Conv", ["m", "w"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["y"]),
    ]  # fmt: skip
    held = {"k": np.float32(1 / 255), "w": weights(CLASSES, 3, 3, 3)}
    path = saved(nodes, held, tmp_path / "net.onnx", shape, elem=elem, opset=17)
    model, x = open_model(ModelSource(str(path))), pictures(20)
    low = -128 if elem == 3 else 0
    whole = (np.rint(x * 255) + low).astype(np.int8 if elem == 3 else np.uint8)
    expected = truth(path, whole.transpose(0, 2, 3, 1) if last else whole)
    leaf = torch.from_numpy(x).requires_grad_()
    z = model(leaf)
    np.testing.assert_allclose(z.detach().numpy(), expected, atol=1e-5)
    nudged = model(torch.from_numpy(x + 0.3 / 255).clamp(0, 1))
    np.testing.assert_allclose(nudged.detach().numpy(), expected, atol=1e-5)  # it answers for the nearest 8-bit image
    assert torch.autograd.grad(z.sum(), leaf)[0].abs().sum() > 0
    stated = wrap(load_onnx(path), input_range=(low, low + 255))
    torch.testing.assert_close(stated(leaf), z)


def test_other_types_are_named(tmp_path):
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=onnx.TensorProto.INT4)
    nodes = [node, helper.make_node("DequantizeLinear", ["q", "s"], ["y"])]
    with pytest.raises(UserError, match="int8, uint8, int16"):
        load_onnx(saved(nodes, {"s": np.float32(1)}, tmp_path / "net.onnx", ("n", 4)))(torch.zeros(1, 4))
