"""What a model may answer: read where one thing can be meant, refused in one sentence where it cannot."""

from __future__ import annotations

import re
import warnings
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from tests.helpers import SmallNet
from torch import nn

from holdfast.checks import audit
from holdfast.data import Data
from holdfast.errors import UserError
from holdfast.evaluation import Stage, evaluate
from holdfast.importers.wrapped import wrap
from holdfast.outputs import Outputs, as_outputs, own_dtype, tensor_fault
from holdfast.queries import CountingModel, majority_vote
from holdfast.threat import Threat

Z, H, IMAGE = torch.zeros(2, 3), torch.zeros(2, 8), torch.zeros(2, 4, 5, 5)
Answer = namedtuple("Answer", ["features", "logits"])
FEW = (Stage("apgd", "apgd", settings={"steps": 3}),)


@pytest.mark.parametrize(
    "answer",
    [
        (Z,),
        [Z, None],
        (IMAGE, Z),
        (torch.zeros(()), Z),
        (Z, torch.zeros(2, 5, dtype=torch.int64)),
        {"features": H, "logits": Z},
        {"out": Z, "aux": IMAGE},
        Answer(H, Z),
        SimpleNamespace(logits=Z),
        Outputs(Z, H),
    ],
)
def test_what_can_only_be_the_logits_is_read(answer):
    assert as_outputs(answer).logits is Z


@pytest.mark.parametrize("answer", [(H, Z), [Z, H], {"features": H, "scores": Z}, (Z, H, None)])
def test_two_possible_logits_are_a_choice(answer):
    with pytest.raises(UserError, match=r"returns 2 tensors .*\(2, 8\).*--output.*wrap\(model, output="):
        as_outputs(answer)


def test_the_choice_is_a_number_or_a_name():
    assert as_outputs((H, Z), 1).logits is as_outputs((H, Z), "1").logits is Z
    assert as_outputs({"features": H, "scores": Z}, "scores").logits is Z
    assert as_outputs({"features": H, "scores": Z}, 1).logits is Z
    assert as_outputs(SimpleNamespace(scores=Z), "scores").logits is Z
    for output in (2, "logits", -1, "features"):
        with pytest.raises(UserError, match=r"no output '.*': it returned 0: shape \(2, 8\), 1: shape"):
            as_outputs((H, Z), output)
    with pytest.raises(UserError, match=r"no output '1': it returned shape \(2, 3\)"):
        as_outputs(Z, 1)


@pytest.mark.parametrize(
    ("logits", "why"),
    [
        (Z.long(), r"torch.int64, not floats"),
        (Z.bool(), r"torch.bool, not floats"),
        (Z.to(torch.complex64), r"torch.complex64, not floats"),
        (Z.to_sparse(), r"a sparse tensor: .*to_dense"),
        (Z.to("meta"), r"on the device meta, which holds no values"),
        (Z.to(torch.float8_e4m3fn), r"torch.float8_e4m3fn: pass float32"),
        (torch.zeros(2, 0), r"shape \(2, 0\)"),
        (torch.zeros(2), r"shape \(2,\)"),
        (torch.zeros(2, 3, 1), r"shape \(2, 3, 1\)"),
    ],
)
@pytest.mark.parametrize("form", [lambda z: z, lambda z: Outputs(z), lambda z: {"logits": z}, lambda z: (z,)])
def test_what_are_no_logits(logits, why, form):
    with pytest.raises(UserError, match=rf"must return \(N, K\) logits.*{why}"):
        as_outputs(form(logits))


@pytest.mark.filterwarnings("ignore")  # torch warns of some of these when they are made
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda z: z.to_sparse_csr(), r"a sparse tensor: .*to_dense"),
        (lambda z: torch.quantize_per_tensor(z, 0.1, 0, torch.quint8), r"a quantized tensor: .*dequantize"),
        (lambda z: torch.nested.nested_tensor([z, z]), r"a nested tensor"),
        (lambda z: torch.nested.nested_tensor([z, z], layout=torch.jagged), r"a nested tensor"),
        (lambda z: torch.masked.masked_tensor(z, z == 0), r"a MaskedTensor, a tensor with arithmetic of its own"),
        (lambda z: z.to_mkldnn(), r"a tensor of layout"),
        (lambda z: z.numpy(), r"a ndarray"),
    ],
)
def test_what_is_no_dense_tensor_says_what_it_is(make, why):
    value = make(Z.clone())
    assert re.match(why, tensor_fault(value))
    with pytest.raises(UserError, match=why):
        as_outputs(value)


def images(n=6, k=3):
    chance = torch.Generator().manual_seed(0)
    return Data(torch.rand(n, 1, 6, 6, generator=chance), torch.arange(n) % k, torch.arange(n))


class Flat(nn.Module):
    """A linear network, with its answer changed."""

    def __init__(self, k=3, change=lambda z: z, dtype=torch.float32):
        super().__init__()
        self.layer, self.change = nn.Linear(36, k).to(dtype), change
        nn.init.zeros_(self.layer.bias)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, x):
        return self.change(self.layer(x.flatten(1)))


def labelled(model, data):
    with torch.no_grad():
        return Data(data.x, as_outputs(model(data.x)).logits.argmax(1), data.index)


@pytest.mark.parametrize("change", [lambda z: z.long(), lambda z: z > 0, lambda z: (z, z), lambda z: z[:, :0]])
def test_an_evaluation_refuses_in_one_sentence(change):
    with pytest.raises(UserError) as error:
        evaluate(Flat(change=change), images(), Threat("linf", 0.1), FEW)
    assert "\n" not in str(error.value)
    assert "finfo" not in str(error.value)


def test_a_wrapped_network_with_two_outputs_answers_with_the_chosen_one():
    plain, both = Flat(), Flat(change=lambda z: (z * 0, z))
    data = labelled(plain, images())
    with pytest.raises(UserError, match="returns 2 tensors"):
        evaluate(wrap(both), data, Threat("linf", 0.05), FEW)
    a = evaluate(plain, data, Threat("linf", 0.05), FEW)
    b = evaluate(wrap(both, output=1), data, Threat("linf", 0.05), FEW)
    assert a.clean.all()
    assert torch.equal(a.robust, b.robust)
    assert torch.equal(a.margin, b.margin)


# -- another type


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_type_is_asked_in_its_own(dtype):
    model = Flat(dtype=dtype)
    assert own_dtype(model) == dtype
    x = images().x
    expected = model(x.to(dtype)).float()
    with pytest.warns(UserWarning, match=f"network is {dtype} throughout"):
        assert torch.equal(CountingModel(model)(x).logits, expected)
    wrapped = wrap(model)
    assert str(dtype) in wrapped.notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(CountingModel(wrapped)(x).logits, expected)
    assert torch.equal(wrapped(x.to(dtype)), model(x.to(dtype)))  # its own type is passed through


def asserts(self, x):
    assert x.dtype == torch.float64, "float64 only"
    return self.layer(x.flatten(1))


def raises(self, x):
    if x.dtype != torch.float64:
        raise TypeError("float64 only")
    return self.layer(x.flatten(1))


@pytest.mark.parametrize("forward", [asserts, raises])
def test_by_whatever_error_a_network_refuses_float32_it_is_asked_in_its_own_type(forward):
    model = Flat(dtype=torch.float64)
    model.forward = forward.__get__(model)
    x = images().x
    with pytest.warns(UserWarning, match="is torch.float64 throughout"):
        assert torch.equal(CountingModel(model)(x).logits, forward(model, x.double()).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["a function", "a buffer", "a parameter that is not used"])
def test_a_type_that_no_parameter_tells_is_found(kind, dtype):
    weight = torch.ones(16, 3, dtype=dtype)
    model = (lambda x: x.flatten(1) @ weight) if kind == "a function" else nn.Module()
    if kind != "a function":
        model.weight = weight
        model.unused = nn.Linear(1, 1) if "not used" in kind else None
        model.forward = lambda x: x.flatten(1) @ model.weight
    x, counted = torch.rand(2, 1, 4, 4), CountingModel(model)
    with pytest.warns(UserWarning, match=f"is {dtype} throughout"):
        first = counted(x).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was found is kept
        assert torch.equal(counted(x).logits, first)
    assert first.dtype == torch.float32
    assert torch.equal(first, (x.to(dtype).flatten(1) @ weight).float())


def test_float64_images_are_never_rounded_to_float32():
    """Else a check in float64 would believe a network that is float32 inside."""
    weight = torch.ones(16, 3)
    with pytest.raises(UserError, match="RuntimeError"):
        CountingModel(lambda x: x.flatten(1) @ weight)(torch.rand(2, 1, 4, 4, dtype=torch.float64))


def test_a_float64_network_is_evaluated_and_audited_like_its_float32_copy():
    single = Flat()
    double = Flat(dtype=torch.float64)
    double.load_state_dict(single.state_dict())
    data, threat = labelled(single, images(40)), Threat("linf", 0.05)
    a, b = evaluate(single, data, threat, FEW), evaluate(wrap(double), data, threat, FEW)
    assert torch.equal(a.robust, b.robust)
    torch.testing.assert_close(a.margin, b.margin, rtol=1e-4, atol=1e-5)
    assert audit(wrap(double), data, b).findings


def test_a_network_that_converts_its_own_input_is_left_to_do_so():
    """Its images are not rounded to half precision before its own preprocessing."""
    model = Flat(dtype=torch.bfloat16)
    seen = []
    model.forward = lambda x: (seen.append(x.dtype), model.layer(x.flatten(1).to(torch.bfloat16)).float())[1]
    CountingModel(model)(images().x)
    assert seen == [torch.float32]


def test_another_error_is_the_networks_own():
    def broken(x):
        raise RuntimeError("shape trouble")

    model = Flat(dtype=torch.float64)
    model.forward = broken
    with pytest.raises(UserError, match="shape trouble"):
        CountingModel(model)(images().x)


# -- classes that are ruled out


def masked(z):
    return z.masked_fill(torch.tensor([False, True, False, False, True]), -torch.inf)


def test_classes_that_never_occur_may_have_no_logit():
    """The figures are those of the network without these classes."""
    model, few = Flat(5, masked), Flat(5, lambda z: z[:, [0, 2, 3]])
    data = labelled(model, images(40))
    renumbered = Data(data.x, torch.tensor([0, -1, 1, 2, -1])[data.y], data.index)
    threat = Threat("linf", 0.02)
    a, b = evaluate(model, data, threat, FEW), evaluate(few, renumbered, threat, FEW)
    assert 0 < int(b.robust.sum()) < 40
    assert torch.equal(a.clean, b.clean)
    assert torch.equal(a.robust, b.robust)
    assert torch.equal(a.margin, b.margin)
    assert a.votes == 1, "it is not called randomised"
    assert not any(stage.nonfinite for stage in a.stages)
    result = audit(model, data, a)
    assert result.findings[0].status == "holds"
    assert result.verdict().status != "void"


def test_a_class_that_occurs_needs_a_logit():
    model = Flat(5, masked)
    data = images(40, 5)
    with pytest.raises(UserError, match="NaN or infinite"):
        evaluate(model, data, Threat("linf", 0.02), FEW)


def test_a_logit_below_all_others_never_wins():
    ask = CountingModel(lambda x: masked(x.flatten(1)[:, :5] * 0 + 0.1), occurring=torch.tensor([0, 2, 3]))
    z = ask(torch.zeros(4, 1, 2, 3)).logits
    assert z.isfinite().all()
    assert set(z.argmax(1).tolist()) == {0}
    assert (z[:, [1, 4]] < 0.1).all()


def test_where_labels_are_not_known_minus_infinity_is_no_fault():
    """As when stored adversarial examples are replayed: a vote for a finite logit counts, NaN and infinity do not."""
    z = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0], [-torch.inf] * 3])
    votes = majority_vote(CountingModel(lambda x: z), torch.zeros(4, 1), 1)[1]
    assert votes.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_an_honest_network_is_asked_as_before():
    model, x = SmallNet().eval(), images().x
    assert torch.equal(CountingModel(model, occurring=torch.tensor([0]))(x).logits, as_outputs(model(x)).logits)


@pytest.mark.parametrize(
    ("features", "distances", "said"),
    [
        (torch.zeros(4), None, r"features in Outputs must be \(N, D\) with N = 4"),
        (torch.zeros(3, 5), None, r"with N = 4, got .*3, 5"),
        ("words", None, "features in Outputs"),
        (None, torch.zeros(4, 2), "distances in Outputs must have the shape of the logits"),
    ],
)
def test_features_and_distances_belong_to_the_logits(features, distances, said):
    with pytest.raises(UserError, match=said):
        as_outputs(Outputs(torch.zeros(4, 3), features, distances))


def test_feature_maps_are_read_as_vectors():
    out = as_outputs(Outputs(torch.zeros(4, 3), torch.zeros(4, 2, 5, 5), torch.zeros(4, 3)))
    assert out.features.shape == (4, 50)


def test_batch_norm_without_statistics_is_one_sentence():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(UserError, match=r"batch norm has no running statistics.*track_running_stats=True"):
        CountingModel(model)(torch.rand(1, 1, 2, 2))
