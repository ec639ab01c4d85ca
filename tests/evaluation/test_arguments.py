"""The arguments of evaluate and audit: what is clear is read, the rest is refused in one sentence before any work."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from tests.helpers import SmallNet

from holdfast.checks import audit
from holdfast.data import Data, from_arrays
from holdfast.errors import UserError
from holdfast.evaluation import SUITES, Budget, Stage, evaluate
from holdfast.losses import isce
from holdfast.threat import Threat

X = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = Data(X, torch.arange(8) % 2, torch.arange(8), classes=tuple("abcd"))

THREAT = Threat("linf", 0.1)
FEW = (Stage("apgd", "apgd", settings={"steps": 2}),)
MODEL = SmallNet().eval()


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("clean", "robust", "margin_adv"))


def test_what_is_clear_is_read(tmp_path):
    plain = evaluate(MODEL, DATA, THREAT, FEW, trained_with=partial(isce, s=3.0))
    checkpoint = str(tmp_path / "evaluation.safetensors")
    y = DATA.y.to(torch.int32)
    written = evaluate(
        MODEL, Data(X, y, DATA.index, DATA.classes), "linf:0.1", list(FEW), trained_with="isce:s=3", seed=np.int64(0),
        checkpoint=checkpoint,
    )  # fmt: skip
    assert same(plain, written)
    assert (tmp_path / "evaluation.safetensors").is_file()
    assert audit(MODEL, DATA, written, trained_with="isce:s=3", size=4).findings


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"data": X}, r"data must be Data, .* got a Tensor: .*from_arrays"),
        ({"data": (X, DATA.y, DATA.index)}, r"data must be Data, .* got a tuple"),
        ({"data": Data(X, DATA.y.float(), DATA.index)}, r"y of data is torch.float32: expected integers"),
        ({"data": Data(X, DATA.y > 0, DATA.index)}, r"y of data is torch.bool"),
        ({"data": Data(X, DATA.y[:3], DATA.index)}, r"one label and one number per image, got the shapes"),
        ({"data": Data(X, DATA.y[:, None], DATA.index)}, r"one label and one number per image"),
        ({"data": Data(X.long(), DATA.y, DATA.index)}, r"x of data is torch.int64"),
        ({"data": Data(X.numpy(), DATA.y, DATA.index)}, r"x of data must be a tensor, got a ndarray"),
        ({"data": Data(X.to_sparse(), DATA.y, DATA.index)}, r"x of data is a sparse tensor: .*to_dense"),
        ({"data": Data(X, DATA.y.to_sparse(), DATA.index)}, r"y of data is a sparse tensor"),
        ({"data": Data(X.to("meta"), DATA.y, DATA.index)}, r"x of data is a tensor on the device meta"),
        ({"data": Data(X, DATA.y, DATA.index.to("meta"))}, r"index of data is a tensor on the device meta"),
        (
            {"data": Data(X.to(torch.float8_e4m3fn), DATA.y, DATA.index)},
            r"x of data is torch.float8_e4m3fn: pass",
        ),
        ({"data": Data(X.to(torch.complex64), DATA.y, DATA.index)}, r"x of data is torch.complex64, not floats"),
        ({"data": Data(X, DATA.y[0], DATA.index)}, r"one label and one number per image, got the shapes .*y \(\)"),
        ({"data": Data(X, DATA.y[0], DATA.index[0])}, r"one label and one number per image"),
        ({"data": Data(X[0, 0, 0, 0], DATA.y[0], DATA.index[0])}, r"one label and one number per image"),
        ({"data": Data(X, DATA.y.to(torch.complex64), DATA.index)}, r"y of data is torch.complex64"),
        ({"data": Data(X.numpy().astype(object), DATA.y, DATA.index)}, r"x of data must be a tensor, got a ndarray"),
        ({"threat": "linf"}, r"cannot read the threat 'linf'"),
        ({"threat": 0.1}, r"threat must be a Threat or a text .* got a float"),
        ({"threat": Threat("linf", 8)}, r"linf eps 8 covers all pixels in \[0, 1\].*Did you mean 8/255"),
        ({"threat": Threat("l2", 6.0)}, r"l2 eps 6 covers"),
        ({"threat": Threat("linf", 40, 0, 40)}, r"covers all pixels in \[0, 40\]"),
        ({"suite": ["quick", "standard"]}, r"suite must be one name .* got \['quick', 'standard'\]"),
        ({"suite": 5}, r"suite must be one name"),
        ({"suite": FEW[0]}, r"suite must be one name .*or a tuple of Stages"),
        ({"trained_with": "icse"}, r"unknown loss 'icse'.*'isce'"),
        ({"trained_with": "isce:t=1"}, r"unknown setting of loss 'isce' 't'"),
        ({"trained_with": 5}, r"a loss must be a function .* got an int"),
        ({"seed": "0"}, r"seed must be a whole number, got '0'"),
        ({"seed": True}, r"seed must be a whole number"),
        ({"batch_size": 1.5}, r"batch_size must be a whole number >= 1, got 1.5"),
        ({"batch_size": 0}, r"batch_size must be .*>= 1, got 0"),
        ({"budget": "10min"}, r"budget must be a Budget.*Budget.parse"),
        ({"checkpoint": ""}, r"checkpoint is empty"),
        ({"checkpoint": 5}, r"checkpoint must be a path"),
    ],
)
def test_what_is_not_clear_is_refused(changed, why):
    arguments = {"data": DATA, "threat": THREAT, "suite": FEW, **changed}
    with pytest.raises(UserError, match=why) as error:
        evaluate(MODEL, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # torch warns of some of these when they are made
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda x: torch.nested.nested_tensor(list(x)), r"a nested tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), r"a quantized tensor: .*dequantize"),
        (lambda x: torch.masked.masked_tensor(x, x > 0.5), r"a MaskedTensor"),
        (lambda x: x.to_sparse_csr() if x.ndim == 2 else x.flatten(1).to_sparse_csr(), r"a sparse tensor"),
        (lambda x: x.to_mkldnn(), r"a tensor of layout"),
    ],
)
def test_images_of_no_ordinary_kind_are_refused(make, why):
    with pytest.raises(UserError, match=f"x of data is {why}"):
        evaluate(MODEL, Data(make(X), DATA.y, DATA.index), THREAT, FEW)
    with pytest.raises(UserError, match=f"x of arrays is {why}"):
        from_arrays(make(X), DATA.y)


class Photographs(torch.Tensor):
    """A subclass without arithmetic of its own, as image libraries have them."""


def test_a_tensor_with_a_graph_or_a_name_of_its_own_is_read_as_what_it_holds():
    plain = evaluate(MODEL, DATA, THREAT, FEW)
    with torch.inference_mode():
        inferred = X.clone()
    for x in (X.clone().requires_grad_(), torch.nn.Parameter(X), X.as_subclass(Photographs), inferred):
        result = evaluate(MODEL, Data(x, DATA.y, DATA.index, DATA.classes), THREAT, FEW)
        assert same(plain, result)
        assert type(result.x_adv) is torch.Tensor


def test_audit_refuses_what_is_no_evaluation():
    result = evaluate(MODEL, DATA, THREAT, FEW)
    for changed, why in [
        ({"evaluation": None}, "evaluation must be what holdfast.evaluate returned"),
        ({"data": X}, "data must be Data"),
        ({"size": 0}, "size must be a whole number >= 1"),
        ({"size": 2.5}, "size must be a whole number"),
        ({"seed": "0"}, "seed must be a whole number"),
        ({"trained_with": "icse"}, "unknown loss"),
    ]:
        with pytest.raises(UserError, match=why):
            audit(MODEL, **{"data": DATA, "evaluation": result, **changed})


@pytest.mark.parametrize(
    "limit", [{"passes": -5}, {"seconds": 0}, {"passes": True}, {"seconds": "60"}, {"passes": math.nan}]
)
def test_a_budget_is_positive(limit):
    with pytest.raises(UserError, match=r"of a budget must be a positive finite number"):
        Budget(**limit)


@pytest.mark.parametrize(
    "text", ["1_000passes", "10 000 passes", "-5passes", "1e999passes", "x" * 10**5, "5\x1b[2Jmin"]
)
def test_a_budget_that_cannot_be_read(text):
    with pytest.raises(UserError) as error:
        Budget.parse(text)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"settings": {"stpes": 10}}, r"unknown setting of attack 'apgd' 'stpes'.*'steps'"),
        ({"settings": {"steps": 1.5}}, r"steps of attack 'apgd' must be a whole number"),
        ({"settings": {"steps": 0}}, r"steps of stage 'a' must be a whole number >= 1"),
        ({"settings": {"restarts": -1}}, r"restarts of stage 'a' must be a whole number >= 1"),
        ({"settings": [10]}, r"settings of stage 'a' must be a dict"),
        ({"settings": {"model": MODEL}}, r"settings of stage 'a' holds 'model', which an evaluation gives"),
        ({"settings": {"noise": None}}, r"holds 'noise'"),
        ({"settings": {"threat": THREAT}}, r"holds 'threat'"),
        ({"settings": {"score": "dlr"}}, r"holds 'score'.*score= of the Stage"),
        ({"settings": {"target": X}}, r"holds 'target'.*targets="),
        ({"settings": {"x": X, "y": X}}, r"holds 'x'"),
        ({"settings": {1: 2}}, r"settings of stage 'a' must have names as keys"),
        ({"settings": {"iterate": 5}, "attack": "pgd"}, r"iterate must be a text, got 5"),
        ({"settings": {"model": MODEL}, "attack": "fgsm"}, r"holds 'model'"),
        ({"targets": -1}, r"targets of stage 'a' must be a whole number >= 0, got -1"),
        ({"targets": 1.5}, r"targets of stage 'a' must be a whole number"),
        ({"fraction": True}, r"fraction of stage 'a' must be a finite number"),
        ({"step": -0.25}, r"step of stage 'a' must be a positive finite number"),
        ({"step": math.nan}, r"step of stage 'a'"),
        ({"round": -1}, r"round of stage 'a'"),
        ({"noise_stream": "x"}, r"noise_stream of stage 'a'"),
        ({"noise_stream": 10_000}, r"noise_stream of stage 'a' must be .* <= 9,999"),  # from there on, the audit's
        ({"individual": "yes"}, r"individual of stage 'a' must be True or False"),
        ({"name": 5}, r"name of a stage must be a text"),
        ({"name": "a\x1b[2J"}, r"control characters"),
    ],
)
def test_a_stage_says_what_is_wrong(changed, why):
    with pytest.raises(UserError, match=why):
        Stage(**{"name": "a", "attack": "apgd", **changed})


def test_the_stages_of_two_suites_are_a_suite():
    stages = (*SUITES["quick"], *SUITES["quick"])
    assert len(evaluate(MODEL, DATA, THREAT, stages).stages) == 2 + len(stages)
