"""Random command lines, and files that were changed at random: an answer or one sentence, never a traceback.

The few cases of the default suite are always the same. ``FUZZ_CASES=2000 pytest -m slow tests/test_fuzz.py`` runs that
many, each time others. What fails becomes an ordinary test beside the code that it found.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers import places, put, write_parquet
from tests.results.factory import make_results, make_run

from holdfast import cli, data, errors, importers, outputs, results
from holdfast.cli.arguments import _options_of
from holdfast.errors import UserError
from holdfast.evaluation import load_x_adv
from holdfast.evaluation.suites import SUITES, Stage

CASES = int(os.environ.get("FUZZ_CASES", 2000))  # of the slow test, over all kinds
LONGEST = 30  # seconds of a case
COMMANDS = {
    one.name or one.callback.__name__.replace("_", "-"): _options_of(one.callback)
    for one in cli.app.registered_commands
}


class HangsError(BaseException):
    """A case took too long: no ``except Exception`` may catch it."""


@contextlib.contextmanager
def in_time():
    def late(*_):
        raise HangsError(f"more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def command(*words):
    """(status, stdout, stderr) of a command in this process; what it may not do is the test's failure."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), in_time():
        warnings.simplefilter("default")
        patch.setattr(sys, "argv", ["holdfast", *map(str, words)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                status = stop.code or 0
    said = out.getvalue() + err.getvalue()
    assert status in (0, 1, 2), (words, status)
    assert "Traceback" not in said, (words, said)
    assert errors.plain(said) == said, (words, said)
    if status == 2:
        assert out.getvalue() == "", words
        sentences = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1 or "╭" in said, (words, said)  # ours, or the parser's own box
        assert len(err.getvalue()) < 4000, words
    return status, out.getvalue(), err.getvalue()


def asked(call):
    """What a call answers, or None where it says in a sentence why not."""
    with in_time(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except UserError as error:
            said = str(error)
    assert said == errors.plain(said)
    assert "\n" not in said
    assert len(said) <= errors.LONGEST_MESSAGE
    return None


# -- what is changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, evaluated_run):
    """A folder with every file that is changed."""
    folder = tmp_path_factory.mktemp("fuzz")
    results.save(make_results([make_run("sce", n=12), make_run("isce:s=3", n=12)]), folder / "stored")
    write_parquet(folder / "table", 12, 6)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    torch.save(net.state_dict(), folder / "weights.pt")
    (folder / "mine.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    for name in ("run", "sound"):
        shutil.copytree(evaluated_run, folder / name)
    return folder


@pytest.fixture
def files(folder, monkeypatch):
    """The same as the working folder; work that takes long ends where it begins."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 1}),))

    def begins(*_, **__):
        raise UserError("here the work would begin")

    for name in (
        "data.hub",
        "experiments.pipeline.cached_audit",
        "bracket.measure._attack",
        "bracket.prove._attack",
        "train.loop._epoch",
        "process_pool.run",
    ):
        monkeypatch.setattr(f"holdfast.{name}", begins)
    return folder


def bytes_changed(draw, content):
    """A file with a few bytes or bits changed, cut off, put twice or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at, how = draw(st.integers(0, max(len(changed) - 1, 0))), draw(st.integers(0, 5))
        if how == 0 and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif how == 1 and changed:
            changed[at] = draw(st.integers(0, 255))
        elif how == 2:
            del changed[at:]
        elif how == 3:
            changed[at:at] = draw(st.binary(max_size=9))
        elif how == 4:
            changed[at:at] = changed[at : at + draw(st.integers(1, 200))]
        else:
            del changed[at : at + draw(st.integers(1, 200))]
    return bytes(changed)


ODD = [
    *(None, [], {}, "x", "", -1, 0, 1.5, True, 2**53, 10**40, -(10**300), 1e308, 5e-324, "nan", "~"),
    *("\x1b[2J\x1b]0;t\x07", "\u202e", "../../x", "/etc/passwd", "=1+1", "<script>", "x" * 10_000, "\ud800"),
    *({"a": {"b": []}}, [[[[]]]], [None] * 1000),
]


def json_changed(draw, content):
    """A JSON file with other values in a few places, or a text that JSON does not allow."""
    whole = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        every = list(places(whole))
        whole = put(whole, draw(st.sampled_from(every)), draw(st.sampled_from(ODD)))
    written = json.dumps(whole)
    how = draw(st.integers(0, 11))
    if how == 0:
        written = re.sub(r"\b\d+\b", "NaN", written, count=draw(st.integers(1, 5)))
    elif how == 1:
        written = written.replace("{", '{"n": 3, "n": 4, ', 1)
    elif how == 2:
        written = written.replace("[", "[" * 5000, 1)
    elif how == 3:
        written = re.sub(r"\b\d+\b", "9" * 400, written, count=1)
    return written.encode(errors="replace")


def changed(draw, path):
    content = path.read_bytes()
    is_json = path.suffix == ".json" and draw(st.booleans())
    return json_changed(draw, content) if is_json else bytes_changed(draw, content)


# -- the kinds of cases

TYPICAL = """
0 1 -1 3 1.5 1e999 nan inf -inf 1_0 0x10 1/255 linf:0.1 linf:8 l2:1 linf:0.1,l2:0.5 l3:1 linf: sce isce:s=3
sce,isce:s=10 isce:s=attack sce@ sce+ sce+interval sce+fit:epochs=1 sce:x=1 mmc@cosine standard adversarial:steps=2
fast trades:beta=-1 mart:x quick tiny paranoid explain per-attack val test digits moons table stored run
run/evaluation mine.py:build mine.py weights.pt stored/results.json nowhere / . .. ~ ~nobody-here linear mlp:width=2
mlp:width=-1 convnet adam sgd none crop:1 crop:1+flip crop:x best last cpu auto gpu cuda:99 meta rgb grey nchw flat
0,1 0,255 1,0 0.5,0.5,0.5 a,b class:3 gradient:0.5 mix:2 10min 1e3passes -1s label image logits -- - --help = %s {}
' "
"""
WORDS = [*TYPICAL.split(), "", " ", "a\x1b[2Jb", "\u202ex", "é漢", "9" * 19, "9" * 70, "x" * 300, "x" * 10_001]
FITTING = {  # values that lead further in than a random word
    "--data": "digits moons table", "--losses": "sce isce:s=3", "--loss": "sce isce:s=3", "--threat": "linf:0.1 l2:1",
    "--suite": "tiny", "--epochs": "1 2", "--limit": "2 8", "--limit-train": "40", "--model": "linear mlp:width=2",
    "--device": "cpu", "--seeds": "1 2", "--folds": "0 1", "--jobs": "1", "--seconds": "0",
}  # fmt: skip
FIRST = {
    "recipe": "digits mnist losses nothing", "evaluate": "run mine.py:build nowhere", "explain": "run mine.py:build",
    "bracket": "run mine.py:build", "curves": "run stored", "report": "stored run/evaluation table",
    "replay": "run/evaluation stored", "export": "run nowhere",
}  # fmt: skip
SMALL = {
    "train": "--limit-train 40 --device cpu --model linear", "evaluate": "--limit 4 --suite tiny --device cpu",
    "bracket": "--limit 2 --budget 5s --device cpu", "explain": "--limit 4 --device cpu",
    "compare": "--limit-train 40 --limit 4 --jobs 1 --device cpu",
    "recipe": "--limit-train 40 --limit 4 --jobs 1 --device cpu",
}  # fmt: skip


def a_command_line(draw, folder):
    """A command with some of its options; a value is one that fits, or any word."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    options, _ = COMMANDS[name]
    words = [name]
    if name in FIRST and draw(st.integers(0, 9)):
        words.append(
            draw(st.sampled_from(FIRST[name].split())) if draw(st.integers(0, 4)) else draw(st.sampled_from(WORDS))
        )
    words += SMALL.get(name, "").split()
    for option in draw(st.lists(st.sampled_from(sorted(options)), max_size=4)):
        known = FITTING[option].split() if option in FITTING and draw(st.booleans()) else WORDS
        if option in ("--out", "-o", "--figures"):
            known = ["made", "made/deeper", "stored", "mine.py", "", "/", "x" * 300]
        value = draw(st.sampled_from(known))
        if bool in options[option]:
            words.append(option)
        else:
            words += [f"{option}={value}"] if draw(st.booleans()) else [option, value]
    if name == "train" and "--out" not in " ".join(words):
        words += ["--out", "made"]
    try:
        status, out, _ = command(*words)
    finally:
        shutil.rmtree("made", ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
    assert status or out or {"-q", "--quiet"} & set(words), words


def a_results_file(draw, folder):
    """results.json: read, put into words and tables; where it is accepted, what comes out is safe and no NaN."""
    target = folder / "mutated"
    target.mkdir(exist_ok=True)
    (target / "results.json").write_bytes(changed(draw, folder / "stored" / "results.json"))
    loaded = asked(lambda: results.load(target))
    if loaded is None or draw(st.integers(0, 7)):
        command("report", target, "--json") if loaded is None else asked_of_results(loaded, target)
        return
    command("report", target, "--out", "page.html", "--figures", "figures")
    page = Path("page.html")
    if page.exists():
        assert "<script>" not in page.read_text()
        page.unlink()


def asked_of_results(loaded, target):
    from holdfast.io import understood
    from holdfast.report import finding

    def said():
        with understood(target):
            return [
                results.csv(loaded),
                results.markdown(loaded),
                str(results.table(loaded)),
                *results.doubts(loaded),
                finding(loaded),
            ]

    for text in asked(said) or ():
        assert not re.search(r"\bnan\b|\binf\b", text), text
        assert errors.plain(text) == text


def a_stored_run(draw, folder):
    """A file of a run or of an evaluation: what replay says to hold is what was measured."""
    run, kept = folder / "run", folder / "sound"
    name = draw(st.sampled_from(sorted(p.relative_to(kept) for p in kept.rglob("*") if p.is_file())))
    sound = (folder / "sound" / name).read_bytes()
    (run / name).write_bytes(changed(draw, folder / "sound" / name))
    try:
        if name.name == "log.jsonl":
            command("curves", "run", "--out", "made")
            return
        if name.name.startswith("evaluation") and name.suffix == ".safetensors":
            found = asked(lambda: load_x_adv(run / name))
            assert found is None or torch.equal(found, load_x_adv(folder / "sound" / name)), name
        status, _, _ = command("replay", "run/evaluation", "--device", "cpu")
        if status == 0:
            for a, b in zip(
                results.load(run / "evaluation").runs, results.load(folder / "sound" / "evaluation").runs, strict=True
            ):
                for figure in ("clean", "robust", "certified"):
                    one, other = getattr(a, figure), getattr(b, figure)
                    assert (one is None) == (other is None), (name, figure)
                    assert one is None or abs(one.value - other.value) < 0.5 / b.n, (name, figure)
    finally:
        (run / name).write_bytes(sound)
        shutil.rmtree("made", ignore_errors=True)


def a_table(draw, folder):
    """A parquet file: images in 0..255 with a label each, or a sentence."""
    target = folder / "mutated.parquet"
    target.write_bytes(bytes_changed(draw, (folder / "table" / "train.parquet").read_bytes()))
    split = asked(lambda: data.load(str(target), whole=True))
    if split is not None:
        assert split.test.x.dtype == torch.uint8
        assert len(split.test.x) == len(split.test.y)
        assert 0 <= int(split.test.y.min()) <= int(split.test.y.max()) < len(split.classes)


def some_weights(draw, folder):
    """A weights file: finite logits of the right shape or a sentence."""
    target = folder / "mutated.pt"
    target.write_bytes(bytes_changed(draw, (folder / "weights.pt").read_bytes()))
    model = asked(lambda: importers.open_model(importers.ModelSource("mine.py:build", weights=str(target))))
    if model is not None:
        assert asked(lambda: outputs.as_outputs(model(torch.zeros(2, 1, 8, 8))).logits.shape) == (2, 10)


def an_onnx_file(draw, folder):
    """An ONNX file: what onnxruntime answers, or a sentence."""
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    model = onnx.load(folder / "net.onnx") if (folder / "net.onnx").exists() else small_onnx(folder / "net.onnx")
    target, structural = folder / "mutated.onnx", draw(st.booleans())
    if structural:
        graph_changed(draw, model)
        target.write_bytes(model.SerializeToString())
    else:
        target.write_bytes(bytes_changed(draw, model.SerializeToString()))
    net = asked(lambda: importers.load_onnx(target, strip_softmax=False))
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if net is None:
        return
    wrapped = importers.wrap(net)
    found = asked(lambda: asked_once(wrapped, x))
    if found is None or not structural:
        return
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
        answer = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    except Exception:
        return  # onnxruntime refuses more than we do
    truth = torch.from_numpy(answer).float()
    if truth.shape == found.shape:
        assert torch.allclose(found, truth, atol=1e-4, rtol=1e-4, equal_nan=True), target


def asked_once(model, x):
    from holdfast.queries import CountingModel

    with torch.no_grad():
        return CountingModel(model)(x).logits


def small_onnx(path):
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(2, 1, 3, 3)).astype("float32"), "b": rng.normal(size=2).astype("float32"),
        "v": rng.normal(size=(18, 10)).astype("float32"), "c": rng.normal(size=10).astype("float32"),
        "shape": np.array([0, -1]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], strides=[2, 2], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "c"], ["y"], alpha=1.0),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", 1, ["n", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return model


def graph_changed(draw, model):
    """An ONNX graph with another operator, name, attribute, constant or version."""
    from onnx import helper, numpy_helper

    graph, how = model.graph, draw(st.integers(0, 6))
    node = graph.node[draw(st.integers(0, len(graph.node) - 1))]
    number = draw(st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 7, 100, 2**31, 2**62]))
    if how == 0:
        node.op_type = draw(
            st.sampled_from(
                [
                    "Relu",
                    "Sigmoid",
                    "Add",
                    "Softmax",
                    "Nothing",
                    "Conv",
                    "Gemm",
                    "Flatten",
                    "Identity",
                    "MaxPool",
                    "TopK",
                    "",
                ]
            )
        )
    elif how == 1:
        names = [*node.input, "x", "y", "w", "nothing", ""]
        node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from(names))
    elif how == 2:
        name = draw(
            st.sampled_from(
                [
                    "strides",
                    "pads",
                    "dilations",
                    "group",
                    "kernel_shape",
                    "alpha",
                    "beta",
                    "transA",
                    "transB",
                    "axis",
                    "auto_pad",
                    "allowzero",
                ]
            )
        )
        kept = [a for a in node.attribute if a.name != name]
        value = draw(
            st.sampled_from([number, [number], [number, number], [number] * 4, 0.5, "SAME_UPPER", float("nan")])
        )
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
    elif how == 3:
        tensor = graph.initializer[draw(st.integers(0, len(graph.initializer) - 1))]
        array = numpy_helper.to_array(tensor).copy()
        array.flat[draw(st.integers(0, array.size - 1))] = (
            number if array.dtype.kind == "i" else draw(st.sampled_from([0.0, 1e38, float("nan"), float("inf"), 1e-45]))
        )
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif how == 4:
        tensor = graph.initializer[draw(st.integers(0, len(graph.initializer) - 1))]
        del tensor.dims[:]
        tensor.dims.extend(draw(st.lists(st.sampled_from([number, 0, 1, 2, 3, 10, 18]), max_size=4)))
    elif how == 5:
        model.opset_import[0].version = draw(st.sampled_from([1, 6, 9, 12, 13, 25, 1000, 2**40]))
    else:
        kind = graph.input[0].type.tensor_type
        kind.elem_type = draw(st.sampled_from([0, 1, 2, 3, 6, 7, 8, 10, 11, 99]))
        kind.shape.dim[draw(st.integers(0, 3))].dim_value = draw(st.sampled_from([-1, 0, 1, 3, 8, 2**40]))


KINDS = [a_command_line, a_results_file, a_stored_run, a_table, some_weights, an_onnx_file]


def run(kind, folder, most, *, same):
    """Run cases of a kind; returns how many ran."""
    ran = 0

    @settings(
        max_examples=most, deadline=None, derandomize=same, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def cases(chosen):
        nonlocal ran
        ran += 1
        kind(chosen.draw, folder)

    cases()
    return ran


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_few_cases(kind, files):
    run(kind, files, 9, same=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_many_cases(kind, files):
    began = time.monotonic()
    ran = run(kind, files, -(-CASES // len(KINDS)), same=False)
    print(f"{kind.__name__}: {ran} cases in {time.monotonic() - began:.0f} s")
