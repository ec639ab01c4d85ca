"""The ONNX converter against onnxruntime: each operator alone, small networks, real architectures, any batch size."""

import glob
import os
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.importers import ModelSource, open_model, wrap
from holdfast.importers.onnx import OPERATORS, load_onnx
from holdfast.importers.onnx.quantized import QUANTIZED
from holdfast.run_folder import weights_hash
from holdfast.threat import Threat

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx.reference")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
IMAGE = (2, 4, 9, 8)


def build(nodes, shape=IMAGE, constants=(), opset=17, output="y", elem=onnx.TensorProto.FLOAT, wanted=None):
    """A model of nodes from "x" to "y"; constants: {name: array}."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", elem, shape)],
        [helper.make_tensor_value_info(output, wanted or elem, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(model, folder):
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


def truth(model, x):
    """onnxruntime's answer; that of the onnx package's own reference for the few forms that onnxruntime lacks."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except (ort.capi.onnxruntime_pybind11_state.NotImplemented, ort.capi.onnxruntime_pybind11_state.Fail):
        return onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0]
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def agrees(model, folder, x=None, tolerance=1e-5, **settings):
    x = noise(*IMAGE) if x is None else x
    net = load_onnx(saved(model, folder), strip_softmax=False, **settings)
    wanted = truth(model, x)
    found = net(torch.from_numpy(x).requires_grad_())
    scale = max(1.0, float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)))
    np.testing.assert_allclose(found.detach().numpy(), wanted.reshape(found.shape), rtol=0, atol=tolerance * scale)
    return net, found


def case(op, *constants, at=17, x=None, also=(), **attributes):
    """One node: x, then constants (None leaves an input out)."""
    return pytest.param(op, constants, at, x, also, attributes, id=f"{op}-{at}-{'-'.join(attributes) or 'plain'}")


def ints(*values):
    return np.array(values, dtype=np.int64)


ONE = np.array(0.7, np.float32)
CASES = [
    *(case(op) for op in (
        "Relu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Celu", "Erf", "Softplus", "Softsign",
        "LeakyRelu", "ThresholdedRelu", "Exp", "Neg", "Abs", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Identity",
        "GlobalAveragePool", "GlobalMaxPool", "LpNormalization", "Dropout", "Flatten", "Transpose", "Softmax",
        "LogSoftmax", "Reciprocal",
    )),
    case("Sqrt", x=np.abs(noise(*IMAGE))), case("Log", x=np.abs(noise(*IMAGE)) + 0.1),
    case("Mish", at=18), case("Gelu", at=20), case("Gelu", at=20, approximate="tanh"),
    case("HardSigmoid", alpha=0.3, beta=0.4), case("Elu", alpha=0.5), case("Selu", alpha=1.1, gamma=0.9),
    case("LeakyRelu", alpha=0.2), case("PRelu", noise(4, 1, 1)), case("PRelu", noise(1)), case("PRelu", noise(4), at=6),
    case("Clip"), case("Clip", -ONE, ONE), case("Clip", None, ONE), case("Clip", -ONE), case("Clip", at=6, max=0.5),
    case("Clip", at=6, min=-0.2, max=0.5),
    *(case(op, at=at, axis=axis) for op in ("Softmax", "LogSoftmax") for at in (11, 13) for axis in (1, 2, -1)),
    case("Softmax", at=11), case("LogSoftmax", at=11), case("LpNormalization", axis=1, p=1),
    *(case(op, noise(4, 1, 1) + 3) for op in ("Add", "Sub", "Mul", "Div")), case("Pow", np.float32(2.0)),
    case("Pow", np.float32(3.0)), case("Pow", ints(2)),
    case("Min", noise(*IMAGE, seed=1), ONE), case("Max", noise(*IMAGE, seed=1), ONE),
    case("Sum", noise(*IMAGE, seed=1), ONE), case("Mean", noise(*IMAGE, seed=1), ONE), case("Mod", ONE, fmod=1),
    case("MatMul", noise(8, 5)), case("MatMul", noise(2, 4, 8, 5)), case("Einsum", equation="nchw->nc"),
    case("Gemm", noise(8, 5), x=noise(3, 8)), case("Gemm", noise(5, 8), noise(5), x=noise(3, 8), transB=1),
    case("Gemm", noise(3, 5), noise(1, 5), x=noise(3, 8), transA=1, alpha=0.5, beta=2.0),
    *(case(op, at=at, **more) for at in (11, 17) for more in ({}, {"axes": [2, 3]}, {"axes": [-1], "keepdims": 0})
      for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd",
                 "ReduceLogSumExp")),
    *(case(op, ints(1, -1), at=18, keepdims=k) for k in (0, 1) for op in ("ReduceMean", "ReduceSum", "ReduceMax")),
    case("ReduceSum", at=11, axes=[1]), case("ReduceSum", at=13, noop_with_empty_axes=1),
    case("Conv", noise(6, 4, 3, 3)), case("Conv", noise(6, 4, 3, 3), noise(6), pads=[1, 1, 1, 1], strides=[2, 2]),
    case("Conv", noise(6, 2, 3, 2), noise(6), group=2, dilations=[2, 1], pads=[0, 1, 2, 0]),
    *(case("Conv", noise(6, 4, k, k), noise(6), auto_pad=auto, strides=[s, s], kernel_shape=[k, k])
      for auto in ("SAME_UPPER", "SAME_LOWER", "VALID") for k, s in ((3, 2), (2, 1), (4, 3))),
    case("Conv", noise(6, 4, 3), noise(6), x=noise(2, 4, 9), pads=[2, 1]),
    case("Conv", noise(4, 4, 2, 3, 3), x=noise(2, 4, 5, 6, 7), strides=[1, 2, 1]),
    case("ConvTranspose", noise(4, 3, 3, 3), noise(3), strides=[2, 2]),
    case("ConvTranspose", noise(4, 3, 3, 3), noise(3), strides=[3, 2], pads=[1, 0, 0, 1], output_padding=[2, 1]),
    case("ConvTranspose", noise(4, 3, 3, 3), noise(3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("ConvTranspose", noise(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER", group=2),
    case("ConvTranspose", noise(4, 3, 3, 3), strides=[2, 2], output_shape=[18, 16], dilations=[2, 1]),
    *(case("MaxPool", kernel_shape=[3, 2], **more) for more in (
        {}, {"strides": [2, 2]}, {"strides": [2, 3], "ceil_mode": 1}, {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        {"pads": [0, 1, 2, 0], "strides": [2, 1]}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, {"dilations": [2, 2]}, {"auto_pad": "VALID"},
        {"pads": [1, 0, 1, 0], "ceil_mode": 1, "strides": [3, 3]},
    )),
    case("MaxPool", kernel_shape=[3], x=noise(2, 4, 9), strides=[2]),
    *(case("AveragePool", kernel_shape=[3, 3], at=19, **more, count_include_pad=count) for count in (0, 1) for more in (
        {}, {"strides": [2, 2]}, {"strides": [2, 2], "pads": [1, 1, 1, 1]}, {"pads": [0, 1, 2, 1]},
        {"strides": [2, 2], "ceil_mode": 1}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, {"auto_pad": "VALID"},
        {"strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    )),
    case("LRN", size=3), case("LRN", size=4, alpha=0.1, beta=0.5, bias=2.0, x=noise(4, 4, 5, 6)),
    case("BatchNormalization", noise(4), noise(4, seed=1), noise(4, seed=2), np.abs(noise(4)) + 0.5, epsilon=1e-3),
    case("BatchNormalization", noise(4), noise(4), noise(4, seed=2), np.abs(noise(4)) + 0.5, at=9, x=noise(3, 4)),
    case("InstanceNormalization", noise(4), noise(4, seed=1), epsilon=1e-3),
    case("GroupNormalization", noise(4), noise(4, seed=1), at=21, num_groups=2),
    case("GroupNormalization", noise(2), noise(2, seed=1), at=18, num_groups=2),
    case("LayerNormalization", noise(8), noise(8, seed=1)), case("LayerNormalization", noise(9, 8), axis=-2),
    case("Reshape", ints(2, -1)), case("Reshape", ints(0, 0, -1)), case("Reshape", ints(2, 2, 2, 9, 8)),
    case("Flatten", axis=2), case("Flatten", axis=-1), case("Flatten", axis=0), case("Transpose", perm=[0, 2, 3, 1]),
    case("Concat", noise(2, 3, 9, 8), axis=1), case("Concat", noise(2, 4, 9, 1), axis=-1),
    case("Slice", ints(1, 2), ints(3, 100), ints(1, 2)), case("Slice", ints(-3), ints(-1), ints(3)),
    case("Slice", ints(8), ints(-100), ints(2), ints(-2)), case("Slice", ints(0), ints(9), ints(-2), ints(3)),
    case("Slice", at=9, starts=[1], ends=[-1], axes=[2]), case("Slice", ints(0, 1), ints(2, 3)),
    case("Gather", ints(2, 0, -1), axis=1), case("Gather", np.array(1), axis=2),
    case("Gather", np.array([[0, 1], [2, 3]]), axis=3),
    case("GatherElements", np.tile(ints(1, -1), (2, 4, 9, 1)), axis=3),
    case("Squeeze", x=noise(2, 1, 5, 1)), case("Squeeze", ints(-1), x=noise(2, 1, 5, 1)),
    case("Squeeze", at=11, axes=[1], x=noise(2, 1, 5, 1)), case("Unsqueeze", ints(0, -1)),
    case("Unsqueeze", at=11, axes=[1, 3]), case("Unsqueeze", ints(2)),
    *(case("Pad", ints(0, 0, 1, 2, 0, 0, 2, 3), mode=mode) for mode in ("constant", "reflect", "edge")),
    case("Pad", ints(0, 1, 0, 0, 0, 0, 0, 2), ONE), case("Pad", ints(0, 0, -1, 0, 0, 0, 0, -2)),
    case("Pad", ints(1, 2), ONE, ints(3), at=18), case("Pad", ints(0, 0, 3, 2, 0, 0, 2, 3), at=19, mode="wrap"),
    case("Pad", at=9, pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.5), case("Expand", ints(3, 2, 1, 9, 8)),
    case("Expand", ints(2, 4, 1, 8), x=noise(2, 4, 3, 1)), case("Tile", ints(1, 2, 1, 3)),
    case("DepthToSpace", blocksize=2), case("DepthToSpace", blocksize=2, mode="CRD"),
    case("SpaceToDepth", blocksize=2, x=noise(2, 3, 4, 6)), case("Cast", to=1), case("CastLike", ONE),
    *(case("Resize", np.zeros(0, np.float32), np.array([1, 1, a, b], np.float32), at=at, **more) for at in (11, 18)
      for a, b in ((2, 3), (0.5, 1.5)) for more in (
        {}, {"mode": "linear"}, {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
        {"mode": "nearest", "nearest_mode": "round_prefer_ceil"}, {"mode": "nearest", "nearest_mode": "ceil"})),
    case("Resize", None, None, ints(2, 4, 5, 13), mode="linear"), case("Resize", None, None, ints(2, 4, 18, 3)),
    case("Resize", None, None, ints(5, 13), at=18, mode="linear", axes=[2, 3]),
    case("Resize", np.array([1, 1, 2, 2], np.float32), at=10), case("Upsample", at=7, scales=[1.0, 1.0, 2.0, 2.0]),
    *(case("Upsample", np.array([1, 1, 2, 3], np.float32), at=9, mode=mode) for mode in ("nearest", "linear")),
]  # fmt: skip


@pytest.mark.parametrize(("op", "constants", "at", "x", "also", "attributes"), CASES)
def test_an_operator_computes_what_onnxruntime_computes(op, constants, at, x, also, attributes, tmp_path):
    names = [f"c{k}" for k in range(len(constants))]
    given_names = ["x", *("" if value is None else name for name, value in zip(names, constants, strict=True))]
    held = {name: value for name, value in zip(names, constants, strict=True) if value is not None}
    x = noise(*IMAGE) if x is None else x
    if op == "Pow":
        x = np.abs(x) if attributes else x
    model = build([helper.make_node(op, given_names, ["y"], **attributes)], x.shape, held, at)
    net, found = agrees(model, tmp_path, x)
    assert found.requires_grad
    assert not net.training


@pytest.mark.parametrize(
    ("op", "how"),
    [(op, how) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual") for how in ("one", "same")],
)
def test_comparisons_choose(op, how, tmp_path):
    other = noise(*IMAGE, seed=1) if how == "one" else noise(*IMAGE)
    nodes = [helper.make_node(op, ["x", "c"], ["b"]), helper.make_node("Where", ["b", "x", "d"], ["y"])]
    agrees(build(nodes, constants={"c": other, "d": np.float32(9)}), tmp_path)


def test_the_axis_of_the_oldest_arithmetic(tmp_path):
    """Before opset 7 an attribute says where the second one's axes begin; onnxruntime no longer knows."""
    node = helper.make_node("Add", ["x", "c"], ["y"], axis=1, broadcast=1)
    x, c = noise(*IMAGE), noise(4)
    found = load_onnx(saved(build([node], constants={"c": c}, opset=6), tmp_path))(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), x + c[:, None, None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic(op, tmp_path):
    nodes = [
        helper.make_node("Greater", ["x", "c"], ["a"]), helper.make_node("Not", ["a"], ["n"]),
        helper.make_node(op, ["n", "k"], ["b"]), helper.make_node("Where", ["b", "x", "c"], ["y"]),
    ]  # fmt: skip
    agrees(build(nodes, constants={"c": np.float32(0.1), "k": np.arange(8) % 2 == 0}), tmp_path)


def test_shapes_are_reckoned_with(tmp_path):
    """Shape, Gather, Concat, arithmetic and ConstantOfShape on integers, as PyTorch's exporter writes view(n, -1)."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Slice", ["s", "one", "far"], ["rest"]),
        helper.make_node("ReduceProd", ["rest"], ["p"], keepdims=1),
        helper.make_node("Div", ["p", "two"], ["half"]),
        helper.make_node("Concat", ["n1", "two", "half"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("ConstantOfShape", ["shape"], ["c"], value=numpy_helper.from_array(np.float32([0.5]))),
        helper.make_node("Add", ["r", "c"], ["y"]),
    ]
    held = {"zero": np.array(0), "axes": ints(0), "one": ints(1), "far": ints(99), "two": ints(2)}
    net, found = agrees(build(nodes, ("n", 4, 9, 8), held), tmp_path)
    assert found.shape == (2, 2, 144)
    assert net(torch.zeros(5, 4, 9, 8)).shape == (5, 2, 144)
    assert not dict(net.named_buffers())  # integers are no weights


def test_size_counts(tmp_path):
    nodes = [
        helper.make_node("Size", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["x", "f"], ["y"]),
    ]  # fmt: skip
    agrees(build(nodes), tmp_path)


def test_constants_in_nodes_range_and_casts(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["f"], value_float=2.5),
        helper.make_node("Constant", [], ["v"], value_floats=[1.0, 2.0, 3.0, 4.0]),
        helper.make_node("Constant", [], ["i"], value_ints=[1, 4, 1, 1]),
        helper.make_node("Reshape", ["v", "i"], ["w"]),
        helper.make_node("Shape", ["x"], ["s"], start=3),
        helper.make_node("Squeeze", ["s"], ["s0"]),
        helper.make_node("Constant", [], ["z"], value_int=0),
        helper.make_node("Constant", [], ["o"], value_int=1),
        helper.make_node("Range", ["z", "s0", "o"], ["r"]),
        helper.make_node("Cast", ["r"], ["rf"], to=1),
        helper.make_node("Mul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "rf"], ["b"]),
        helper.make_node("Div", ["b", "f"], ["y"]),
    ]
    agrees(build(nodes, ("n", 4, 9, 8)), tmp_path)


@pytest.mark.parametrize(("at", "sizes"), [(11, [1, 3]), (13, [3, 1]), (18, None), (11, None)])
def test_split(at, sizes, tmp_path):
    more = {"split": sizes} if sizes and at < 13 else {"num_outputs": 2} if at == 18 else {}
    held = {"k": np.array(sizes)} if sizes and at >= 13 else {}
    nodes = [
        helper.make_node("Split", ["x", *held], ["a", "b"], axis=1, **more),
        helper.make_node("Concat", ["b", "a"], ["y"], axis=1),
    ]
    agrees(build(nodes, constants=held, opset=at), tmp_path)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_arg_max(op, tmp_path):
    nodes = [helper.make_node(op, ["x"], ["i"], axis=1), helper.make_node("Cast", ["i"], ["f"], to=1),
             helper.make_node("Add", ["x", "f"], ["y"])]  # fmt: skip
    agrees(build(nodes), tmp_path)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot_of_the_largest(axis, tmp_path):
    """Not the gradient, but the answer: OneHot after ArgMax, with negative and too large numbers of classes."""
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=0), helper.make_node("Sub", ["i", "two"], ["j"]),
        helper.make_node("OneHot", ["j", "depth", "values"], ["h"], axis=axis),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=1), helper.make_node("Mul", ["s", "h"], ["y"]),
    ]  # fmt: skip
    held = {"two": np.int64(5), "depth": np.int64(4), "values": np.float32([-1, 2])}
    agrees(build(nodes, (7, 8), held), tmp_path, noise(7, 8))


def test_the_largest_few(tmp_path):
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=1), helper.make_node("Cast", ["i"], ["f"], to=1),
        helper.make_node("Concat", ["v", "f"], ["y"], axis=1),
    ]  # fmt: skip
    agrees(build(nodes, (5, 8), {"k": ints(3)}), tmp_path, noise(5, 8))


pairs = st.tuples(st.integers(0, 2), st.integers(0, 2))


@given(
    pairs, pairs, st.integers(1, 4), st.integers(1, 3), st.integers(1, 2),
    st.sampled_from(["Conv", "MaxPool", "AveragePool"]), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_windows_of_every_kind(tmp_path_factory, rows, columns, k, stride, dilation, op, ceil, include):
    """Pads before and after, strides, dilations, ceil_mode and count_include_pad in every mixture."""
    pads = [min(side, k - 1) for side in (rows[0], columns[0], rows[1], columns[1])]
    more = {"pads": pads, "strides": [stride, stride], "kernel_shape": [k, k]}
    more |= {"dilations": [dilation, dilation]} if op != "AveragePool" else {"count_include_pad": int(include)}
    more |= {"ceil_mode": int(ceil)} if op != "Conv" else {}
    names = ["x", "w"] if op == "Conv" else ["x"]
    model = build([helper.make_node(op, names, ["y"], **more)], constants={"w": noise(2, 4, k, k)}, opset=19)
    if op != "Conv":
        del model.graph.initializer[:]
    agrees(model, tmp_path_factory.mktemp("w"))


def small(n=None, softmax=True, opset=17):
    """x (n, 1, 8, 8) -> Conv, Relu, pooling, Reshape, Gemm: three classes; n is fixed in Reshape too."""
    nodes = [
        helper.make_node("Conv", ["x", "w.0", "b.0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Softplus", ["a"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["p", "shape"], ["f"]),
        helper.make_node("Gemm", ["f", "w.1", "b.1"], ["z"], transB=1),
        helper.make_node("Softmax" if softmax else "Identity", ["z"], ["y"]),
    ]
    held = {"w.0": noise(4, 1, 3, 3), "b.0": noise(4), "w.1": noise(3, 64), "b.1": noise(3)}
    held["shape"] = ints(n or -1, 64)
    return build(nodes, (n or "n", 1, 8, 8), held, opset)


@pytest.mark.parametrize("n", [None, 1, 2])
def test_any_batch_size(n, tmp_path):
    """A file of fixed batch size answers others, as its own size would one by one."""
    model = small(n, softmax=False)
    net = load_onnx(saved(model, tmp_path))
    assert net.batching == ("as exported" if n is None else "rescaled")
    for count in (1, 2, 3, 5):
        x = noise(count, 1, 8, 8, seed=count)
        padded = np.concatenate([x, x[-1:]]) if n == 2 and count % 2 else x
        step = n or count
        wanted = np.concatenate([truth(model, padded[k : k + step]) for k in range(0, len(padded), step)])[:count]
        np.testing.assert_allclose(net(torch.from_numpy(x)).numpy(), wanted, rtol=0, atol=2e-5)
    assert net(torch.zeros(0, 1, 8, 8)).shape == (0, 3)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), ("n", 6)])
@pytest.mark.parametrize("flat", [False, True])
def test_tabular_networks(shape, flat, tmp_path):
    """Six numbers, with an axis for the batch or without, or as a column; one that reckons with sizes as well."""
    nodes = [
        helper.make_node("Reshape", ["x", "row"], ["r"]), helper.make_node("Gemm", ["r", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["k"]), helper.make_node("MatMul", ["k", "v"], ["o"]),
        helper.make_node("Reshape", ["o", "end"], ["y"]),
    ]  # fmt: skip
    held = {
        "row": ints(-1, 6),
        "w": noise(6, 8),
        "b": noise(8),
        "v": noise(8, 3),
        "end": ints(3) if flat else ints(-1, 3),
    }
    if flat and "n" in shape:
        pytest.skip("it could not answer a batch")
    model = build(nodes, shape, held)
    net = wrap(load_onnx(saved(model, tmp_path)))
    x = noise(5, 1, 1, 6)
    one = [s if isinstance(s, int) else 1 for s in shape]
    wanted = np.concatenate([truth(model, image.reshape(one)).reshape(1, 3) for image in x])
    leaf = torch.from_numpy(x).requires_grad_()
    found = net(leaf)
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-5)
    assert torch.autograd.grad(found.sum(), leaf)[0].abs().min() > 0
    assert net(torch.from_numpy(x[:1])).shape == (1, 3)
    data = Data(leaf.detach().clamp(0, 1), net(leaf.detach().clamp(0, 1)).argmax(1), torch.arange(5))
    assert evaluate(net, data, Threat("linf", 0.5), suite="quick").backwards > 0


def test_an_image_at_a_time_by_hand(tmp_path):
    """A graph that vmap cannot run: its shapes depend on values."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=1), helper.make_node("Cast", ["m"], ["i"], to=7),
        helper.make_node("Sub", ["i", "i"], ["zero"]), helper.make_node("Add", ["zero", "six"], ["shape"]),
        helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]  # fmt: skip
    model = build(nodes, (6,), {"six": ints(6), "w": noise(6, 3)})
    net, x = load_onnx(saved(model, tmp_path)), noise(4, 6)
    wanted = np.stack([truth(model, row) for row in x])
    np.testing.assert_allclose(net(torch.from_numpy(x)).numpy(), wanted, atol=1e-6)
    assert net.vectorised is False


@pytest.mark.parametrize("shape", [("n", 8, 8, 1), (1, 64), (64,), (64, 1), (8, 8), (1, 8, 8), (1, 1, 64, 1), None])
def test_the_files_shape_says_how_images_are_laid_out(shape, tmp_path):
    flat = [helper.make_node("Reshape", ["x", "row"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
    model = build(flat, shape, {"row": ints(-1, 64), "w": noise(64, 3)})
    net, x = open_model(ModelSource(str(saved(model, tmp_path)))), noise(5, 1, 8, 8)
    np.testing.assert_allclose(net(torch.from_numpy(x)).numpy(), x.reshape(5, 64) @ noise(64, 3), atol=1e-5)


def test_colour_images_for_a_flat_network_are_asked_about(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = saved(build(nodes, ("n", 48), {"w": noise(48, 3)}), tmp_path)
    x, w = torch.from_numpy(noise(5, 3, 4, 4)), torch.from_numpy(noise(48, 3))
    with pytest.raises(UserError, match="flat-nhwc"):
        open_model(ModelSource(str(path)))(x)
    torch.testing.assert_close(open_model(ModelSource(str(path), input_layout="flat"))(x), x.flatten(1) @ w)
    last = x.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(open_model(ModelSource(str(path), input_layout="flat-nhwc"))(x), last @ w)


def test_a_batch_that_cannot_be_rescaled_goes_in_pieces(tmp_path):
    """The images' axis is moved behind another before the Reshape: rescaling would mix images, pieces never do."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2, 3]),
        helper.make_node("Reshape", ["t", "s"], ["r"]),
        helper.make_node("Transpose", ["r"], ["u"], perm=[1, 0]),
        helper.make_node("Reshape", ["u", "whole"], ["v"]),
        helper.make_node("Tanh", ["v"], ["y"]),
    ]
    net = load_onnx(saved(build(nodes, (1, 2, 3, 3), {"s": ints(2, 9), "whole": ints(1, 18)}), tmp_path))
    assert net.batching == "chunks"
    x = torch.from_numpy(noise(3, 2, 3, 3)).requires_grad_()
    found = net(x)
    torch.testing.assert_close(found, torch.cat([net(one[None]) for one in x]))
    found.sum().backward()
    assert x.grad.abs().min() > 0


def test_a_constant_beside_the_images(tmp_path):
    """A class token of one image, as a transformer's export with a fixed batch holds it."""
    nodes = [
        helper.make_node("Expand", ["token", "one"], ["t"]),
        helper.make_node("Concat", ["t", "x"], ["c"], axis=1),
        helper.make_node("ReduceMean", ["c"], ["y"], axes=[1], keepdims=0),
    ]
    net = load_onnx(saved(build(nodes, (1, 5, 6), {"token": noise(1, 1, 6), "one": ints(1, 1, 1)}), tmp_path))
    assert net.batching == "rescaled"
    assert net(torch.zeros(4, 5, 6)).shape == (4, 6)


@pytest.mark.parametrize("tail", ["", "Identity", "Reshape"])
@pytest.mark.parametrize("opset", [9, 13])
def test_a_last_softmax_is_left_out(tail, opset, tmp_path):
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p" if tail else "y"]),
    ]
    if tail:
        nodes.append(helper.make_node(tail, ["p", "s"] if tail == "Reshape" else ["p"], ["y"]))
    model = build(
        nodes, ("n", 6), {"w": noise(6, 3), "b": noise(3), **({"s": ints(-1, 3)} if tail == "Reshape" else {})}, opset
    )
    net, x = load_onnx(saved(model, tmp_path)), noise(4, 6)
    assert (net.last_operator, net.softmax_removed) == ("Softmax", True)
    np.testing.assert_allclose(torch.softmax(net(torch.from_numpy(x)), 1).numpy(), truth(model, x), atol=1e-6)
    kept, _ = agrees(model, tmp_path, x)
    assert (kept.last_operator, kept.softmax_removed) == ("Softmax", False)


def test_weights_are_buffers(tmp_path):
    net = load_onnx(saved(small(), tmp_path))
    assert sorted(net.state_dict()) == ["b_0", "b_1", "w_0", "w_1"]
    assert len(weights_hash(net)) == 16
    x = torch.from_numpy(noise(2, 1, 8, 8))
    wide = load_onnx(saved(small(), tmp_path)).double()
    torch.testing.assert_close(wide(x.double()).float(), net(x), atol=1e-5, rtol=0)
    net.b_1 += 1.0
    assert bool((net(x) - wide(x.double()).float() - 1.0).abs().max() < 1e-5)


def test_gradients_are_those_of_finite_differences(tmp_path):
    net = load_onnx(saved(small(), tmp_path)).double()
    x = torch.from_numpy(noise(1, 1, 8, 8)).double().requires_grad_()
    assert torch.autograd.gradcheck(net, (x,))


def test_half_precision_is_widened(tmp_path):
    held = {"w": noise(6, 3).astype(np.float16)}
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"])], (2, 6), held, elem=onnx.TensorProto.FLOAT16)
    net = load_onnx(saved(model, tmp_path))
    assert net.w.dtype == torch.float32
    x = torch.from_numpy(noise(2, 6))
    torch.testing.assert_close(net(x), x @ torch.from_numpy(held["w"]).float())


def test_an_attack_runs_on_it(tmp_path):
    net = load_onnx(saved(small(1), tmp_path))
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = Data(x, net(x).argmax(1), torch.arange(12))
    found = evaluate(net, data, Threat("linf", 0.2), suite="quick")
    assert found.clean.all()
    assert found.robust.sum() < 12
    assert found.backwards > 0


# What the user is told


def refused(model, folder, *words):
    with pytest.raises(UserError) as error:
        load_onnx(saved(model, folder))
    for word in words:
        assert word in str(error.value)


def test_all_unknown_operators_are_named_at_once(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Hardmax", ["a"], ["b"], name="hard"),
        helper.make_node("Hardmax", ["b"], ["b2"]), helper.make_node("Det", ["b2"], ["c"], name="determined"),
        helper.make_node("FusedConv", ["c"], ["y"], domain="com.microsoft"),
    ]  # fmt: skip
    refused(build(nodes), tmp_path, "Hardmax (node 'hard' and 1 more)", "'determined'", "com.microsoft.FusedConv",
            "mymodel.py:build", "Known: Abs")  # fmt: skip


def test_an_unknown_operator_that_the_output_does_not_need_is_none(tmp_path):
    nodes = [helper.make_node("Hardmax", ["x"], ["h"]), helper.make_node("Relu", ["x"], ["y"])]
    agrees(build(nodes), tmp_path)


def test_damaged_and_missing_files(tmp_path):
    path = saved(small(), tmp_path)
    whole = path.read_bytes()
    for kept in (0, 1, 10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=r"damaged|no network"):
            load_onnx(path)
    path.write_bytes(b"PK\x03\x04 no onnx at all" * 20)
    with pytest.raises(UserError):
        load_onnx(path)
    with pytest.raises(UserError, match="no ONNX file"):
        load_onnx(tmp_path / "none.onnx")
    big = build([helper.make_node("MatMul", ["x", "w"], ["y"])], (2, 600), {"w": noise(600, 9)})
    onnx.save(big, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    load_onnx(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(UserError, match=r"damaged"):
        load_onnx(path)


def test_graphs_that_are_no_classifiers(tmp_path):
    two = small()
    two.graph.input.append(helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, (1,)))
    refused(two, tmp_path, "2 inputs (x, mask)")
    tokens = build([helper.make_node("Cast", ["x"], ["y"], to=1)], (1, 4), elem=onnx.TensorProto.INT64, wanted=1)
    refused(tokens, tmp_path, "'x'", "neither floats nor integers of 8 or 16 bits")
    refused(build([helper.make_node("Relu", ["x"], ["y"])], ()), tmp_path, "'x'", "a single number")
    alone = build([helper.make_node("Relu", ["c"], ["y"])], constants={"c": noise(2)})
    refused(alone, tmp_path, "does not depend")
    refused(build([helper.make_node("Add", ["x", "gone"], ["y"])]), tmp_path, "'gone'", "damaged")
    refused(build([helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")], constants={"w": noise(7, 3)}), tmp_path,
            "MatMul (node 'mm')", "(7, 3)")  # fmt: skip
    cubic = helper.make_node("Resize", ["x", "", "s"], ["y"], mode="cubic", name="up")
    refused(build([cubic], constants={"s": np.float32([1, 1, 2, 2])}), tmp_path, "'up'", "cubic")


def test_initialisers_among_the_inputs_are_no_inputs(tmp_path):
    """Files of old exporters list their weights as inputs."""
    model = small(opset=9)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    agrees(model, tmp_path, noise(3, 1, 8, 8))


def test_images_of_another_shape(tmp_path):
    net = load_onnx(saved(small(), tmp_path))
    with pytest.raises(UserError, match=r"1 x 8 x 8, got 3 x 8 x 8"):
        net(torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match=r"1 x 8 x 8"):
        net(torch.zeros(2, 64))


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    path = saved(small(), tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'holdfast\[onnx\]'"):
        load_onnx(path)


def test_every_operator_is_tried_here():
    tried = {parameter.values[0] for parameter in CASES}
    elsewhere = {
        "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where", "And", "Or", "Xor", "Not", "Shape",
        "Constant", "ConstantOfShape", "Range", "Split", "ArgMax", "ArgMin", "Size", "OneHot", "TopK",
    }  # fmt: skip
    assert set(OPERATORS) == tried | elsewhere | set(QUANTIZED)


# Real architectures: the files of the onnx package hold no weights, so they are given some

LIGHT = sorted(glob.glob(os.path.join(os.path.dirname(onnx.__file__), "backend/test/data/light/*.onnx")))
QUICK = ("squeezenet", "shufflenet")


def revived(path):
    """The graph with random weights of a sensible size where the file makes constants."""
    model, source = onnx.load(path), np.random.default_rng(0)
    sizes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    variances = {node.input[4] for node in model.graph.node if node.op_type == "BatchNormalization"}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape, name = tuple(sizes[node.input[0]]), node.output[0]
        if len(shape) > 1:
            value = source.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            value = source.uniform(0.5, 1.5, shape) if name in variances else source.normal(size=shape) * 0.3
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=os.path.basename(path), marks=[] if any(q in path for q in QUICK) else pytest.mark.slow)
        for path in LIGHT
    ],
)
def test_real_architectures(path, tmp_path):
    model = revived(path)
    net = load_onnx(saved(model, tmp_path))
    x = noise(3, 3, 224, 224)
    leaf = torch.from_numpy(x).requires_grad_()
    z = net(leaf)
    raw = load_onnx(tmp_path / "net.onnx", strip_softmax=False)
    found = raw(torch.from_numpy(x)).detach().numpy()
    wanted = np.concatenate([truth(model, image[None]).reshape(1, -1) for image in x])
    assert wanted.std() > 0
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * scale)
    assert (z.argmax(1).numpy() == wanted.argmax(1)).all()
    (grad,) = torch.autograd.grad(z.square().sum(), leaf)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    assert net.batching in ("as exported", "rescaled")


@pytest.mark.parametrize(
    ("op", "constants"),
    [
        ("Tile", {"r": np.array([1, 1, 2**20, 2**20])}),
        ("Expand", {"r": np.array([2**30, 2, 4, 9, 8])}),
        ("Pad", {"r": np.array([0, 0, 2**40, 0, 0, 0, 0, 0])}),
        ("Resize", {"a": np.zeros(0, np.float32), "b": np.array([1, 1, 2**30, 2**30], np.float32)}),
    ],
)
def test_a_file_may_not_ask_for_any_size(op, constants, tmp_path):
    model = build([helper.make_node(op, ["x", *constants], ["y"])], constants=constants)
    with pytest.raises(UserError, match=r"at most 1,073,741,824 are made"):
        load_onnx(saved(model, tmp_path))


def test_an_input_may_not_have_any_size(tmp_path):
    model = build([helper.make_node("Relu", ["x"], ["y"])], shape=(1, 2**40, 9, 8))
    with pytest.raises(UserError, match=r"net.onnx: an input of [\d,]+ values is asked for"):
        load_onnx(saved(model, tmp_path))
    shape = {"s": np.array([2**20, 2**20])}
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])]
    with pytest.raises(UserError, match="at most"):
        load_onnx(saved(build(nodes, constants=shape), tmp_path))
