"""docs/security.md says what is so: its limits are the code's, and what it promises of strangers' files holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from holdfast import errors, io, models, run_folder, user_input
from holdfast.bracket import vnnlib
from holdfast.data import images, labels
from holdfast.errors import UserError
from holdfast.experiments.config import MOST_SEEDS
from holdfast.importers import load_onnx
from holdfast.importers.onnx import node
from holdfast.objectives.inner_attack import MOST_STEPS
from holdfast.results import remaining
from holdfast.train.config import MOST_SEED

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text()
LIMITS = {
    "an argument on the command line": [user_input.LONGEST_TEXT],
    "a path, a name in it": [user_input.LONGEST_PATH, user_input.LONGEST_NAME],
    "a whole number in a JSON file": [io.MOST_DIGITS],
    "pixels of an image file": [images.MAX_PIXELS],
    "images of a data set, decoded": [],
    "classes": [labels.MAX_CLASSES],
    "the size of a training seed": [MOST_SEED],
    "networks per loss, steps of an attack inside training": [MOST_SEEDS, MOST_STEPS],
    "predictions for each image that `replay` repeats": [remaining.MOST_VOTES],
    "values of an image for which config.json asks for a network": [run_folder.MOST_PIXELS],
    "parameters of a network that is built by name": [models.MOST_PARAMETERS],
    "values of a tensor that an ONNX file asks for by its size alone": [node.MOST_VALUES],
    "the size of a `.vnnlib` file, its nesting": [vnnlib.MOST_BYTES, vnnlib.MOST_DEPTH],
    "words of an assertion, cases of a `.vnnlib` file, numbers that these hold": [
        vnnlib.MOST_WORDS,
        vnnlib.MOST_CASES,
        vnnlib.MOST_VALUES,
    ],
    "what an error quotes": [errors.LONGEST_MESSAGE],
}


def test_the_limits_are_those_of_the_code():
    table = PAGE.partition("## Limits")[2].partition("##")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", table, re.MULTILINE))
    del rows["what"]
    found = {what: [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", most)] for what, most in rows.items()}
    assert found == LIMITS


def test_no_code_of_the_hub_is_asked_for():
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert "trust_remote_code" not in source
    assert re.findall(r"weights_only=(\w+)", source.replace("m = torch.load('{path}', weights_only=False)", "")) == [
        "True"
    ]


def test_the_page_loads_nothing_and_runs_its_own_script_alone():
    folder = ROOT / "src" / "holdfast" / "report"
    template, script = (folder / "report.html.j2").read_text(), (folder / "page.js").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src '{{ script.hash }}'" in template
    assert template.count("<script") == 1  # its text is page.js, which holds nothing of a results file
    assert "{{" not in script
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval",
        "Function(",
        "fetch",
        "import",
    ):
        assert word not in script, word


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname"])
def test_the_weights_of_an_onnx_file_lie_beside_it(place, tmp_path):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", place
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 4])],
        [helper.make_tensor_value_info("y", 1, [1, 4])],
        [weight],
    )
    (tmp_path / "secret").write_bytes(b"\0" * 16)
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "net.onnx"
    file.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    with pytest.raises(UserError, match="cannot be read as ONNX"):
        load_onnx(file)
