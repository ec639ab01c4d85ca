"""VNN-LIB properties of ONNX networks: sat with what onnxruntime confirms, unsat where mixed-integer programs agree."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from holdfast.bracket import solve
from holdfast.bracket.solve import check_precision, check_property, image_shape
from holdfast.bracket.vnnlib import parse_property
from holdfast.cli import app
from holdfast.data import pixels
from holdfast.errors import UserError
from holdfast.importers import load_onnx

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def exported(layers, path, shape, *, softmax=False, dtype="float32", flatten=True):
    """The layers as an ONNX file."""
    kind = {"float32": onnx.TensorProto.FLOAT, "float64": onnx.TensorProto.DOUBLE}[dtype]
    nodes = [helper.make_node("Flatten" if flatten else "Identity", ["x"], ["h"])]
    constants, now = {}, "h"
    for place, layer in enumerate(layers):
        inputs = [now]
        if isinstance(layer, nn.Linear):
            constants[f"w{place}"] = layer.weight.detach().numpy().T.astype(dtype)
            constants[f"b{place}"] = layer.bias.detach().numpy().astype(dtype)
            nodes.append(helper.make_node("MatMul", [now, f"w{place}"], [f"m{place}"]))
            inputs = [f"m{place}", f"b{place}"]
        now = f"h{place}"
        op = {nn.Linear: "Add", nn.ReLU: "Relu", nn.Tanh: "Tanh"}[type(layer)]
        nodes.append(helper.make_node(op, inputs, [now]))
    nodes.append(
        helper.make_node("Softmax" if softmax else "Identity", [now], ["y"], **({"axis": -1} if softmax else {}))
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return load_onnx(path, strip_softmax=False)


def declared(n, k):
    return [f"(declare-const X_{i} Real)" for i in range(n)] + [f"(declare-const Y_{j} Real)" for j in range(k)]


def box(lo, hi):
    sides = enumerate(zip(lo, hi, strict=True))
    return [f"(assert (>= X_{i} {low!r}))\n(assert (<= X_{i} {high!r}))" for i, (low, high) in sides]


def text_of(n, k, sides, *asserted):
    return parse_property("\n".join([*declared(n, k), *box(*sides), *(f"(assert {one})" for one in asserted)]))


WHOLE = [-1.0, -1.0], [1.0, 1.0]


def robustness(x, y, eps, k=10):
    """Another class is at least as likely: the property of the competitions."""
    x = x.double().flatten()
    lo, hi = (x - eps).clamp_min(0).tolist(), (x + eps).clamp_max(1).tolist()
    others = " ".join(f"(and (>= Y_{j} Y_{y}))" for j in range(k) if j != y)
    return "\n".join([*declared(len(lo), k), *box(lo, hi), f"(assert (or {others}))"])


def holds(path, wanted, answer):
    """What the file answers to the counterexample, asked of onnxruntime here."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    x = np.array(answer.x, dtype="float32")
    shape = [size if isinstance(size, int) and size > 0 else 1 for size in entry.shape]
    [y] = session.run(None, {entry.name: x.reshape(shape)})
    y = y.flatten().astype("float64")
    assert np.allclose(y, answer.y)
    return any(
        (case.lo <= x).all() and (x <= case.hi).all() and (case.weights @ y + case.offsets <= 0).all()
        for case in wanted.cases
    )


@pytest.fixture(scope="module")
def digits(truth, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "digits.onnx"
    return path, exported(list(truth[0])[1:], path, (1, 1, 8, 8))


def test_the_answers_are_those_of_mixed_integer_programs(digits, truth):
    path, net = digits
    _, data, threat, broken = truth
    assert 0 < int(broken.sum()) < 40
    by = set()
    for row in range(0, 16, 2):
        wanted = parse_property(robustness(pixels(data.x[row]), int(data.y[row]), threat.eps))
        answer = check_property(net, wanted)
        assert answer.verdict == ("sat" if broken[row] else "unsat")
        assert answer.verdict == "unsat" or holds(path, wanted, answer)
        by.add(answer.by)
    assert {"attack", "linear"} <= by


def test_branch_and_bound_decides_what_attacks_and_lines_leave(digits, truth, monkeypatch):
    path, net = digits
    _, data, threat, broken = truth
    monkeypatch.setattr(solve._Work, "search", lambda *_: None)
    by = []
    for row in range(6):
        wanted = parse_property(robustness(pixels(data.x[row]), int(data.y[row]), threat.eps))
        answer = check_property(net, wanted)
        assert answer.verdict == ("sat" if broken[row] else "unsat")
        assert answer.verdict == "unsat" or holds(path, wanted, answer)
        by.append(answer.by)
    assert "branch" in by


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    """(path, net, points, outputs): a network of two inputs, and its answers on a fine grid."""
    torch.manual_seed(12)  # with it, no single inequality of the properties below is false everywhere
    layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    path = tmp_path_factory.mktemp("onnx") / "plane.onnx"
    points = torch.cartesian_prod(torch.linspace(-1, 1, 301), torch.linspace(-1, 1, 301))
    with torch.no_grad():
        return path, exported(list(layers), path, (1, 2)), points, layers(points)


@pytest.mark.parametrize(("above", "verdict"), [(0.01, "unsat"), (-0.002, "sat")])
@pytest.mark.parametrize("attacks", [True, False])
def test_conjunctions_and_disjunctions_of_them(above, verdict, attacks, plane, monkeypatch):
    """No single inequality is false everywhere: what refutes a case differs from place to place."""
    path, net, _, z = plane
    if not attacks:
        monkeypatch.setattr(solve._Work, "search", lambda *_: None)
    both = float(torch.minimum(z[:, 1] - z[:, 0], z[:, 2] - z[:, 0]).max()) + above
    least = float(torch.maximum(z[:, 1], z[:, 2]).min()) - above
    assert min(float((z[:, j] - z[:, 0]).max()) for j in (1, 2)) > both
    one, two = f"(>= (- Y_1 Y_0) {both!r}) (>= Y_2 (+ Y_0 {both!r}))", f"(<= Y_1 {least!r}) (<= Y_2 {least!r})"
    wanted = text_of(2, 3, WHOLE, f"(or (and {one}) (and {two}))")
    answer = check_property(net, wanted)
    assert answer.verdict == verdict
    assert verdict == "unsat" or holds(path, wanted, answer)


def test_a_conjunction_over_many_inputs(tmp_path):
    """y = +-(sum of x): neither Y_0 >= 1 nor Y_1 >= 1 is false everywhere, but both at once are: their mean is 0."""
    sums = nn.Linear(16, 2, bias=False)
    sums.weight.data.copy_(torch.stack([torch.ones(16), -torch.ones(16)]))
    sums.bias = nn.Parameter(torch.zeros(2))
    net = exported([sums], tmp_path / "net.onnx", (1, 16))
    sides = [-1.0] * 16, [1.0] * 16
    assert check_property(net, text_of(16, 2, sides, "(>= Y_0 1)", "(>= Y_1 1)")).verdict == "unsat"
    assert check_property(net, text_of(16, 2, sides, "(>= Y_0 1)", "(<= Y_1 -1)")).verdict == "sat"


def test_a_box_for_each_case(plane):
    """Where X_0 is low Y_0 may be anything, elsewhere it may not: the boxes of the cases differ."""
    path, net, points, z = plane
    right = points[:, 0] >= 0.5
    top, low = float(z[right, 0].max()), float(z[~right, 0].max())
    for bound, verdict in ((max(top, low) + 0.01, "unsat"), (top - 0.002, "sat")):
        cases = f"(and (>= X_0 0.5) (>= Y_0 {bound!r})) (and (<= X_0 0.5) (>= Y_0 {max(top, low) + 0.01!r}))"
        wanted = text_of(2, 3, WHOLE, f"(or {cases})")
        answer = check_property(net, wanted)
        assert answer.verdict == verdict
        if verdict == "sat":
            assert answer.x[0] >= 0.5
            assert holds(path, wanted, answer)


def test_a_point_is_a_box(plane):
    """0.1 is no float32: the point beside it is asked, and the proof holds for both."""
    _, net, *_ = plane
    with torch.no_grad():
        y = float(net(torch.tensor([[0.1, 0.7]]))[0, 1])
    for bound, verdict in ((y - 1e-4, "sat"), (y + 1e-4, "unsat")):
        head = [*declared(2, 3), *box([0.1, 0.7], [0.1, 0.7])]
        assert (
            check_property(net, parse_property("\n".join([*head, f"(assert (>= Y_1 {bound!r}))"]))).verdict == verdict
        )


@pytest.mark.parametrize(
    ("shape", "flatten"),
    [((1, 1, 4, 4), True), (("N", 16), True), ((1, 4, 2, 2), True), ((16,), False), ((1, 16), True)],
)
def test_inputs_of_any_shape(shape, flatten, tmp_path):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2))
    net = exported(list(layers), tmp_path / "net.onnx", shape, flatten=flatten)
    lo, hi = [0.1 * (i % 3) for i in range(16)], [0.1 * (i % 3) + 0.2 + 0.01 * i for i in range(16)]
    with torch.no_grad():
        x = torch.rand(4000, 16) * (torch.tensor(hi) - torch.tensor(lo)) + torch.tensor(lo)
        most = float(layers(x)[:, 0].max())
    for bound, verdict in ((most, "sat"), (most + 1.0, "unsat")):
        wanted = text_of(16, 2, (lo, hi), f"(>= Y_0 {bound!r})")
        answer = check_property(net, wanted)
        assert answer.verdict == verdict
        assert verdict == "unsat" or holds(tmp_path / "net.onnx", wanted, answer)


def test_a_last_softmax_counts(tmp_path):
    """Outputs are those of the file: probabilities, not the logits that attacks on classifiers use."""
    torch.manual_seed(1)
    net = exported([nn.Linear(2, 2)], tmp_path / "net.onnx", (1, 2), softmax=True)
    answer = check_property(net, text_of(2, 2, WHOLE, "(<= Y_0 1.0)", "(>= Y_0 0.0)"))
    assert answer.verdict == "sat"
    assert sum(answer.y) == pytest.approx(1.0)
    assert check_property(net, text_of(2, 2, WHOLE, "(>= Y_0 1.1)"), seconds=20).verdict == "unsat"


def test_time_ends_it(digits, truth, monkeypatch):
    _, net = digits
    _, data, threat, broken = truth
    monkeypatch.setattr(solve._Work, "search", lambda *_: None)
    row = int(broken.nonzero()[0, 0])
    wanted = parse_property(robustness(pixels(data.x[row]), int(data.y[row]), 2 * threat.eps))
    assert check_property(net, wanted, seconds=1e-6).verdict == "timeout"


def test_without_onnxruntime_the_forward_pass_confirms_and_says_so(plane, monkeypatch):
    _, net, _, z = plane
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    answer = check_property(net, text_of(2, 3, WHOLE, f"(>= Y_0 {float(z[:, 0].max()) - 0.01!r})"))
    assert answer.verdict == "sat"
    assert "onnxruntime is not installed" in answer.why


def test_what_onnxruntime_does_not_confirm_is_no_counterexample(plane, monkeypatch):
    _, net, _, z = plane
    top = float(z[:, 0].max())
    wanted = text_of(2, 3, WHOLE, f"(>= Y_0 {top - 1e-5!r})")
    monkeypatch.setattr(solve, "runtime_outputs", lambda session, net, x, out: out - 1e-4 * top)
    answer = check_property(net, wanted, seconds=3)
    assert answer.verdict != "sat"
    monkeypatch.setattr(solve, "runtime_outputs", lambda session, net, x, out: out + 1)
    with pytest.raises(UserError, match="computes otherwise than onnxruntime"):
        check_property(net, wanted)


def test_what_does_not_fit_is_one_sentence(plane, tmp_path):
    _, net, *_ = plane
    other = text_of(3, 3, ([0.0] * 3, [1.0] * 3), "(<= Y_0 0)")
    with pytest.raises(UserError, match=r"3 inputs X, but the ONNX network takes 1 x 2"):
        check_property(net, other)
    other = text_of(2, 4, WHOLE, "(<= Y_0 0)")
    with pytest.raises(UserError, match="4 outputs Y, but the ONNX network returns 3"):
        check_property(net, other)
    exported([nn.Linear(2, 2)], tmp_path / "double.onnx", (1, 2), dtype="float64")
    with pytest.raises(UserError, match="is float64, which holdfast reads as float32"):
        check_precision(str(tmp_path / "double.onnx"))
    assert image_shape(net, 2) == (2,)


def test_the_command_line_answers_as_the_competition_does(digits, truth, tmp_path, monkeypatch):
    path, net = digits
    _, data, threat, broken = truth
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    for wanted, verdict, status in ((broken, "sat", 1), (~broken, "unsat", 0)):
        row = int(wanted.nonzero()[0, 0])
        (tmp_path / "p.vnnlib").write_text(robustness(pixels(data.x[row]), int(data.y[row]), threat.eps))
        words = ["bracket", str(path), "--vnnlib", "p.vnnlib", "--budget", "60s", "-q"]
        told = run(app, [*words, "--out", "answer.txt"])
        assert told.exit_code == status, told.output
        lines = told.stdout.splitlines()
        assert lines[0] == verdict
        assert (tmp_path / "answer.txt").read_text() == told.stdout
        if verdict == "sat":
            values = re.findall(r"\(([XY])_(\d+) (\S+?)\)", "".join(lines[1:]))
            assert [name for name, *_ in values] == ["X"] * 64 + ["Y"] * 10
            assert lines[1].startswith("((X_0 ")
            assert lines[-1].endswith("))")
            x = torch.tensor([float(value) for _, _, value in values[:64]]).view(1, 1, 8, 8)
            assert net(x).argmax() != data.y[row]
        found = run(app, [*words, "--json"])
        assert found.exit_code == status
        assert json.loads(found.stdout)["verdict"] == verdict
    for more, said in (
        (["--data", "digits"], "--vnnlib takes no --data"),
        (["--threat", "linf:0.2"], "--vnnlib takes no --threat"),
        (["--budget", "5"], "cannot read the budget"),
    ):
        assert said in str(run(app, [*words, *more]).exception)
    assert "needs an .onnx file" in str(run(app, ["bracket", "digits", "--vnnlib", "p.vnnlib"]).exception)
    (tmp_path / "p.vnnlib").write_text("(assert (<= Y_0 0))")
    assert "p.vnnlib: line 1: Y_0 is not declared" in str(run(app, words).exception)
