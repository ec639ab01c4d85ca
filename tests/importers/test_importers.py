"""A user's own network from Python code, torch.export, ONNX or memory, and the errors when it does not work."""

import ast
import copy
import io
import json
import pickle
import re
import sys
import textwrap
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from holdfast import importers
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.evaluation import evaluate
from holdfast.importers import ModelSource, code_hash, is_model_file, open_model, wrap
from holdfast.outputs import as_outputs, frozen_eval
from holdfast.run_folder import weights_hash
from holdfast.threat import Threat

NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=4):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Tanh(), nn.Dropout(0.5))
            self.head = nn.Linear(width, 3)

        def forward(self, x):
            return self.head(self.body(x).mean((2, 3)))

    def build():
        torch.manual_seed(0)
        return Net()

    net = build()
"""


def write(folder, text, name="mine.py"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def test_a_changed_file_is_another_network(tmp_path):
    path = write(tmp_path, NET)
    before = code_hash(ModelSource(f"{path}:build"))
    assert code_hash(ModelSource(f"{path}:net")) == before
    path.write_text(path.read_text().replace("0.5", "0.6"))
    assert code_hash(ModelSource(f"{path}:build")) != before


def test_out_of_memory_is_passed_on_so_that_evaluate_halves_the_batch(tmp_path):
    """The wrapper does not turn the allocator's error into a UserError."""
    sizes = []

    def small(x):
        if len(x) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        sizes.append(len(x))
        return torch.stack([x.flatten(1)[:, 0], 1 - x.flatten(1)[:, 0]], 1)

    pixel = torch.linspace(0.6, 0.9, 10).view(-1, 1, 1, 1)
    data = Data(pixel, torch.zeros(10, dtype=torch.int64), torch.arange(10))
    assert evaluate(wrap(small), data, Threat("linf", 0.05), "quick").robust.all()
    assert max(sizes) == 3 or max(sizes) == 2


@pytest.fixture
def x():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mine(tmp_path):
    return write(tmp_path / "nets", NET)


@pytest.fixture
def net(mine):
    """The same network, made here: its weights differ from what build() makes."""
    made = open_model(ModelSource(f"{mine}:build")).inner
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.25)
    return made


def refused(source, *words):
    with pytest.raises(UserError) as error:
        open_model(source)
    for word in words:
        assert word in str(error.value), str(error.value)
    return str(error.value)


def attacked(model, x):
    with frozen_eval(model), torch.no_grad():
        y = as_outputs(model(x)).logits.argmax(1)
    found = evaluate(model, Data(x, y, torch.arange(len(x))), Threat("linf", 0.5), suite="quick")
    assert found.clean.all()
    assert found.backwards > 0
    return found


# Where it comes from


def test_a_source_is_json(tmp_path):
    source = ModelSource("a.py:b", "w.safetensors", (0.0, 255.0), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert ModelSource(**json.loads(json.dumps(asdict(source)))) == source


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"input_range": (0.0,)}, "low < high"), ({"input_range": (1.0, 0.0)}, "low < high"),
        ({"input_range": (0.0, float("nan"))}, "finite"), ({"input_range": (0.0, float("inf"))}, "finite"),
        ({"mean": (0.5, 0.5), "std": (0.5,)}, "2 and 1"), ({"mean": (0.5,), "std": (0.0,)}, "> 0"),
        ({"mean": (0.5,), "std": (-1.0,)}, "> 0"), ({"mean": ("a",), "std": (1.0,)}, "numbers"),
        ({"mean": 0.5, "std": 0.5}, "lists? of numbers"),
    ],
)  # fmt: skip
def test_numbers_are_checked(settings, word):
    with pytest.raises(UserError, match=word):
        ModelSource("a.py:b", **settings)
    with pytest.raises(UserError, match=word):
        wrap(lambda x: x, **settings)


def test_a_run_folder_is_no_model_file(tmp_path):
    (tmp_path / "odd.onnx").mkdir()
    assert not is_model_file(str(tmp_path / "odd.onnx"))
    assert not is_model_file(str(tmp_path))
    assert not is_model_file("out/isce_s=10_cosine-seed0-fold2")
    assert is_model_file("C:/nets/mine.py:build")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone.py:build", ["no file"]), ("gone.onnx", ["no ONNX file"]), ("gone.pt2", ["no file"]),
        ("weights.pth", ["weights", "build()"]), ("folder", ["mymodel.py:build", "model.onnx"]),
    ],
)  # fmt: skip
def test_paths_that_lead_nowhere(path, words):
    refused(ModelSource(path), *words)


def test_weights_for_what_holds_its_own():
    refused(ModelSource("a.onnx", weights="w.pth"), "its own weights", "w.pth")


# Python code


@pytest.mark.parametrize("name", ["build", "net", "Net"])
def test_a_function_a_module_or_a_class(name, mine, x):
    model = open_model(ModelSource(f"{mine}:{name}"))
    assert not any(module.training for module in model.modules())
    assert model(x).shape == (5, 3)
    assert len(weights_hash(model)) == 16
    attacked(model, x)


def test_preprocessing_is_inside(mine, x):
    inner = open_model(ModelSource(f"{mine}:net"))
    model = open_model(ModelSource(f"{mine}:build", input_range=(0.0, 255.0), mean=(100.0,), std=(50.0,)))
    torch.testing.assert_close(model(x), inner((255 * x - 100.0) / 50.0))
    signed = open_model(ModelSource(f"{mine}:build", input_range=(-1.0, 1.0)))
    torch.testing.assert_close(signed(x), inner(2 * x - 1))
    assert len({weights_hash(m) for m in (inner, model, signed)}) == 3  # what is done to images is part of the network
    assert torch.autograd.gradcheck(model.double(), (x[:1].double().requires_grad_(),))


def test_a_channel_too_few(mine, x):
    model = open_model(ModelSource(f"{mine}:build", mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0)))
    with pytest.raises(UserError, match=r"3 numbers.*\(5, 1, 8, 8\)"):
        model(x)


def test_siblings_are_found_and_namesakes_are_not_mixed(tmp_path, x):
    """Two folders with a helper of the same name: each network gets its own; the path is as before."""
    text = "from sibling import SCALE\ndef build():\n    import late\n"
    text += "    return lambda x: late.SIGN * SCALE * x.flatten(1)\n"
    for folder, scale in (("a", 1.0), ("b", 2.0)):
        write(tmp_path / folder, text)
        write(tmp_path / folder, f"SCALE = {scale}", "sibling.py")
        write(tmp_path / folder, "SIGN = -1.0", "late.py")
    before = list(sys.path)
    one, two = (open_model(ModelSource(f"{tmp_path}/{folder}/mine.py:build")) for folder in "ab")
    torch.testing.assert_close(one(x), -x.flatten(1))
    torch.testing.assert_close(two(x), -2 * x.flatten(1))
    again = open_model(ModelSource(f"{tmp_path}/a/mine.py:build"))
    torch.testing.assert_close(again(x), -x.flatten(1))
    assert sys.path == before


LATE = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        import part
        from deep.inner import SCALE
        return part.sign() * SCALE * x.flatten(1)

def build():
    return Net()
"""


def late_folder(folder, sign, scale):
    """A network that imports its parts when it answers; one of them imports another in turn."""
    write(folder, LATE)
    write(folder, "def sign():\n    from last import SIGN\n    return SIGN\n", "part.py")
    write(folder, f"SIGN = {sign}", "last.py")
    write(folder / "deep", "", "__init__.py")
    write(folder / "deep", "from .value import SCALE", "inner.py")
    write(folder / "deep", f"SCALE = {scale}", "value.py")
    return f"{folder}/mine.py:build"


def test_what_forward_imports_is_found_in_the_networks_folder(tmp_path, x):
    """When it answers, not when it is built; two networks at once, with parts of the same names, keep their own."""
    before = list(sys.path), list(sys.meta_path)
    one, two = (
        open_model(ModelSource(late_folder(tmp_path / name, *parts))) for name, *parts in [("a", -1, 2), ("b", 1, 3)]
    )
    for model, factor in ((one, -2), (two, 3), (one, -2), (copy.deepcopy(two), 3)):
        assert torch.equal(model(x), factor * x.flatten(1))
    assert (sys.path, sys.meta_path) == before
    x = x.clone().requires_grad_()
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda model: model(x), [one, two] * 8)]
    assert all(torch.equal(answer, factor * x.flatten(1)) for answer, factor in zip(answers, [-2, 3] * 8, strict=True))
    write(tmp_path / "a", "SIGN = 1", "last.py")
    assert torch.equal(open_model(ModelSource(f"{tmp_path}/a/mine.py:build"))(x), 2 * x.flatten(1))


def test_an_installed_module_of_the_same_name_is_not_taken(tmp_path, x, monkeypatch):
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    write(tmp_path, "SCALE = 5", "wave.py")  # of the standard library, which hardly anything imports
    net = "    def net(x):\n        import wave\n        return wave.SCALE * x.flatten(1)\n"
    path = write(tmp_path, f"def build():\n{net}    return net\n")
    assert torch.equal(open_model(ModelSource(f"{path}:build"))(x), 5 * x.flatten(1))


@pytest.mark.parametrize("file", ["part.py", "last.py", "deep/__init__.py", "deep/inner.py", "deep/value.py"])
def test_what_forward_imports_counts_in_the_key(file, tmp_path):
    """Before it was ever imported."""
    source = ModelSource(late_folder(tmp_path, 1, 1))
    before = code_hash(source)
    (tmp_path / file).write_text((tmp_path / file).read_text() + "\n# changed")
    assert code_hash(source) != before


def test_a_module_written_out_as_a_text_counts_in_the_key(tmp_path):
    path = write(tmp_path, "import importlib\ndef build():\n    return importlib.import_module('parts.first').net\n")
    write(tmp_path / "parts", "def net(x): return x.flatten(1)", "first.py")
    before = code_hash(ModelSource(f"{path}:build"))
    write(tmp_path / "parts", "def net(x): return -x.flatten(1)", "first.py")
    assert code_hash(ModelSource(f"{path}:build")) != before


def test_a_dataclass_in_the_file_works(tmp_path, x):
    path = write(
        tmp_path,
        """
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class Settings:
            scale: float = 3.0

        def build():
            settings = Settings()
            return lambda x: settings.scale * x.flatten(1)
        """,
    )
    torch.testing.assert_close(open_model(ModelSource(f"{path}:build"))(x), 3 * x.flatten(1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def build():\n    return 1 / 0", ["mine.py:build", "ZeroDivisionError", "division", "line 2"]),
        ("import nothing_of_this_name", ["importing mine.py", "ModuleNotFoundError", "nothing_of", "line 1"]),
        ("def build(:", ["SyntaxError", "line 1"]),
        ("import sys\nsys.exit(3)", ["SystemExit", "line 2"]),
        ("def biuld():\n    return 1", ["'build'", "Did you mean 'biuld'"]),
        ("def build(width):\n    return 1", ["(width)", "without any"]),
        ("build = 3", ["an int"]),
        ("def build():\n    return {}", ["returned a dict"]),
        ("def build():\n    return dict", ["returned a type"]),
        ("import torch\ndef build():\n    return torch.nn.Linear(2)", ["TypeError", "line 3"]),
    ],
)
def test_errors_of_the_users_code_name_the_line(text, words, tmp_path):
    refused(ModelSource(f"{write(tmp_path, text)}:build"), *words)


def test_a_file_without_a_name(mine):
    refused(ModelSource(str(mine)), "mine.py:build")
    refused(ModelSource(f"{mine}:"), "mine.py:build")


def test_an_error_while_it_runs_names_the_line(tmp_path, x):
    path = write(tmp_path, "def build():\n    def net(x):\n        return x @ x.new_zeros(3, 3)\n    return net")
    with pytest.raises(UserError, match=r"RuntimeError.*mine\.py, line 3"):
        open_model(ModelSource(f"{path}:build"))(x)


def test_a_device_that_is_none(mine):
    with pytest.raises(UserError, match=r"'nonsense'.*cpu"):
        open_model(ModelSource(f"{mine}:build"), "nonsense")


# Weights


def test_weights_of_every_kind(mine, net, x, tmp_path):
    state = net.state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    nested = {"epoch": 3, "state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items())}
    deep = {"model": {"state_dict": {f"module.model.{k}": v for k, v in state.items()}}, "lr": 0.1}
    for name, holds in (("plain.pt", state), ("nested.pth", nested), ("deep.bin", deep)):
        torch.save(holds, tmp_path / name)
    notes = {}
    for name in ("w.safetensors", "plain.pt", "nested.pth", "deep.bin"):
        model = open_model(ModelSource(f"{mine}:build", weights=str(tmp_path / name)))
        torch.testing.assert_close(model(x), net(x))
        notes[name] = model.notes
    assert notes["plain.pt"] == ()
    assert notes["nested.pth"] == ("took the entry 'state_dict'", "removed the prefix 'module.' from every name")
    assert len(notes["deep.bin"]) == 4


def test_a_network_whose_own_names_have_the_prefix(tmp_path, x):
    text = NET + "\n    def boxed():\n        return nn.ModuleDict({'model': Net()}).model and Box()\n"
    text += "\n    class Box(nn.Module):\n        def __init__(self):\n            super().__init__()\n"
    text += "            self.model = Net()\n        def forward(self, x):\n            return self.model(x)\n"
    path = write(tmp_path, text)
    box = open_model(ModelSource(f"{path}:boxed")).inner
    torch.save(box.state_dict(), tmp_path / "w.pt")
    torch.testing.assert_close(open_model(ModelSource(f"{path}:boxed", weights=f"{tmp_path}/w.pt"))(x), box(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("head")},
            ["missing in the file: 'head.weight' (2 in all)"],
        ),
        (lambda s: {**s, "more": torch.zeros(1)}, ["missing in the network: 'more' (1 in all)"]),
        (lambda s: {**s, "head.weight": torch.zeros(7, 4)}, ["'head.weight'", "(7, 4)", "(3, 4)"]),
        (lambda s: {"state_dict": {f"module.{k}x": v for k, v in s.items()}}, ["took the entry", "prefix 'module.'"]),
        (lambda s: {}, ["dict of tensors"]),
        (lambda s: [1], ["a list"]),
        (lambda s: {"lr": 0.1}, ["'lr' is a float"]),
    ],
)
def test_weights_that_do_not_fit(change, words, mine, net, tmp_path):
    torch.save(change(net.state_dict()), tmp_path / "w.pt")
    refused(ModelSource(f"{mine}:build", weights=str(tmp_path / "w.pt")), *words)


def test_pickled_objects_are_not_read(mine, net, tmp_path):
    torch.save(net, tmp_path / "whole.pt")
    refused(ModelSource(f"{mine}:build", weights=f"{tmp_path}/whole.pt"), "more than tensors", "save_file", "any code")
    torch.save({"model": net.state_dict(), "args": SimpleNamespace(lr=1)}, tmp_path / "args.pt")
    refused(ModelSource(f"{mine}:build", weights=f"{tmp_path}/args.pt"), "types.SimpleNamespace")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(SimpleNamespace()))
    refused(ModelSource(f"{mine}:build", weights=f"{tmp_path}/raw.bin"), "raw.bin")


def test_damaged_weights(mine, net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "w.pt")
    safetensors.torch.save_file(net.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        path = tmp_path / name
        whole = path.read_bytes()
        for kept in (0, 5, len(whole) // 2):
            path.write_bytes(whole[:kept])
            refused(ModelSource(f"{mine}:build", weights=str(path)), name)
    refused(ModelSource(f"{mine}:build", weights=f"{tmp_path}/gone.pt"), "no file", "gone.pt")


@pytest.mark.parametrize("name", ["w.pt", "net.pt2"])
def test_a_flipped_bit_in_a_file_of_torch_is_noticed(name, mine, net, tmp_path):
    """torch reads its own archives without their checksums: the bit would be another weight."""
    if name == "w.pt":
        torch.save(net.state_dict(), tmp_path / name)
        source = ModelSource(f"{mine}:build", weights=f"{tmp_path}/{name}")
    else:
        source = ModelSource(str(program_in(tmp_path)[0]))
    path = tmp_path / name
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        part = next(one for one in parts if re.search(r"data/0$|weights/weight_0$", one.filename))
        weights = whole.index(archive.read(part))
    open_model(source)
    for at in (weights, weights + part.file_size - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        refused(source, "is damaged: its part", part.filename, "Restore it from a copy")


def test_weights_for_a_plain_function(tmp_path):
    path = write(tmp_path, "def build():\n    return lambda x: x")
    refused(ModelSource(f"{path}:build", weights="w.pt"), "torch module", "a function")


# In memory


def test_a_plain_function(x):
    model = wrap(lambda x: x.flatten(1)[:, :3])
    assert not model.training
    assert model.state_dict() == {}
    assert weights_hash(model) == weights_hash(wrap(F.relu))  # nothing of a function can be told apart
    attacked(model, x)
    scaled = wrap(lambda x: x.flatten(1)[:, :3], mean=(0.5,), std=(0.25,))
    assert list(scaled.state_dict()) == ["mean", "std"]
    torch.testing.assert_close(scaled(x), (x.flatten(1)[:, :3] - 0.5) / 0.25)
    with pytest.raises(UserError, match="a dict"):
        wrap({})


def test_a_module_keeps_its_mode_and_its_answer(x):
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout(0.5))
    model = wrap(inner)
    assert model.training
    model.eval()
    assert not inner[2].training
    model.train()
    assert inner[2].training
    both = wrap(lambda x: SimpleNamespace(logits=x.flatten(1), loss=None))
    assert as_outputs(both(x)).logits.shape == (5, 64)
    assert next(model.parameters()) is inner[1].weight


# torch.export


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.conv(x)))).flatten(1))


def exported(path, n, *, dynamic=False, training=False):
    torch.manual_seed(0)
    net = Small().train(training)
    shapes = {"x": {0: dynamic if dynamic is not True else torch.export.Dim("batch")}} if dynamic else None
    torch.export.save(torch.export.export(net, (torch.rand(n, 1, 8, 8),), dynamic_shapes=shapes), path)
    return net.eval()


@pytest.mark.parametrize(
    ("n", "dynamic"),
    [(1, False), (3, False), (2, True), (4, torch.export.Dim("some", min=2, max=4))],
    ids=["one", "three", "any", "some"],
)
def test_an_exported_program_of_every_batch_size(n, dynamic, tmp_path, x):
    net = exported(tmp_path / "net.pt2", n, dynamic=dynamic)
    model = open_model(ModelSource(f"{tmp_path}/net.pt2", input_range=(-1.0, 1.0)))
    for count in (1, 2, 3, 4, 5):
        torch.testing.assert_close(model(x[:count]), net(2 * x[:count] - 1))
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    other = x.clone().requires_grad_()
    net(2 * other - 1).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert not any(module.training for module in model.train().eval().modules())
    with frozen_eval(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert weights_hash(model) != weights_hash(wrap(lambda x: x))
    attacked(model, x)


def test_programs_that_cannot_be_used(tmp_path, x):
    exported(tmp_path / "net.pt2", 2, training=True)
    refused(ModelSource(f"{tmp_path}/net.pt2"), "training mode", "model.eval()")
    (tmp_path / "net.pt2").write_bytes((tmp_path / "net.pt2").read_bytes()[:500])
    refused(ModelSource(f"{tmp_path}/net.pt2"), "cannot be read", "torch.export.save")


# ONNX


def test_an_onnx_file(tmp_path, x):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("n", 1, 8, 8))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ("n", 3))],
        [onnx.numpy_helper.from_array(weight.numpy(), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "net.onnx")
    model = open_model(ModelSource(f"{tmp_path}/net.onnx", input_range=(0.0, 255.0)))
    torch.testing.assert_close(model(x), 255 * x.flatten(1) @ weight)
    attacked(model, x)


def test_onnx_is_not_imported_with_the_module():
    """It is an optional package: only functions import it."""
    files = [*Path(importers.__file__).parent.rglob("*.py")]
    assert len(files) > 4
    for path in files:
        body = ast.parse(path.read_text()).body
        names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in body if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name.split(".")[0] for name in names} & {"onnx", "onnxruntime"}, path


# torch.export


def program_in(folder, shape=(4, 1, 8, 8), dynamic=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    where = ({0: torch.export.Dim("n")},) if dynamic else None
    torch.export.save(torch.export.export(net, (torch.zeros(shape),), dynamic_shapes=where), folder / "net.pt2")
    return folder / "net.pt2", net


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_program_is_given_images_as_its_shape_says(channels_last, tmp_path):
    path, net = program_in(tmp_path, (1, 8, 8, 1) if channels_last else (1, 64), dynamic=False)
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(open_model(ModelSource(path))(x), net(x.flatten(1)))


def test_a_program_for_one_image_takes_any_number(tmp_path):
    net = nn.Linear(64, 3).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(64),)), tmp_path / "net.pt2")
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(open_model(ModelSource(tmp_path / "net.pt2"))(x), net(x.flatten(1)))


def test_a_program_that_fails_when_it_is_built_ends_in_a_sentence(tmp_path, monkeypatch):
    path, _ = program_in(tmp_path)

    def fails(self, *arguments, **more):
        raise KeyError("a weight\nthat is not there")

    monkeypatch.setattr(torch.export.ExportedProgram, "module", fails)
    message = refused(ModelSource(str(path)), "cannot be run", "KeyError", "export it again")
    assert "\n" not in message


@pytest.mark.parametrize("what", ["empty", "nothing", "null", "cut"])
def test_a_damaged_program_ends_in_a_sentence_and_nothing_else(what, tmp_path, capfd):
    """Each part of the archive emptied or left out, words of its JSON replaced, the file cut: never a traceback."""
    path, _ = program_in(tmp_path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    changed = []
    if what == "cut":
        changed = [whole[:n] for n in (0, 10, len(whole) // 2, len(whole) - 30)]
    for name, content in parts.items() if what != "cut" else ():
        places = [b""]
        if what == "null":
            words = [match.span() for match in re.finditer(rb'"[a-z_]+"', content)][::9] if "json" in name else []
            places = [content[:start] + b"null" + content[end:] for start, end in words[:6]]
        for place in places:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for other, kept in parts.items():
                    if other != name or what != "nothing":
                        archive.writestr(other, place if other == name else kept)
            changed.append(buffer.getvalue())
    refusals = []
    for content in changed:
        path.write_bytes(content)
        try:
            open_model(ModelSource(str(path)))(torch.zeros(2, 1, 8, 8))
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) >= len(changed) // 2
    assert not [line for line in refusals if "warnings above" in line or "Traceback" in line]
    assert "Traceback" not in capfd.readouterr().err
