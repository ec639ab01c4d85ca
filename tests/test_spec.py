"""Contracts of specs: what a user writes is read once and exactly; every mistake names the nearest thing there is."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast import spec
from holdfast.errors import UserError
from holdfast.experiments import loss_spec
from holdfast.losses import LOSSES, cosface, isce, sce
from holdfast.models.heads import HEADS
from holdfast.outputs import Outputs

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
VALUES = (
    st.integers(-(10**9), 10**9)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.from_regex(r"[a-z][a-z_]{1,6}", fullmatch=True).filter(
        lambda w: w not in ("true", "false", "nan", "inf", "infinity")
    )
)
SETTINGS = st.dictionaries(NAMES, VALUES, max_size=4)


def written(name, settings):
    values = ",".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    )
    return f"{name}:{values}" if values else name


@given(NAMES, SETTINGS)
def test_parse_round_trip(name, settings):
    text = written(name, settings)
    found = spec.parse(text)
    assert found == (name, settings)
    assert [type(v) for v in found[1].values()] == [type(v) for v in settings.values()]
    assert spec.parse(f"  {text.replace(',', ' , ').replace('=', ' = ')}  ") == (name, settings)


@given(st.lists(st.tuples(NAMES, SETTINGS), min_size=1, max_size=5))
def test_split_round_trip(many):
    texts = [written(name, settings) for name, settings in many]
    assert spec.split(",".join(texts)) == texts
    assert spec.split(" , ".join(texts) + ",") == texts


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sce", ["sce"]),
        ("sce,mmc", ["sce", "mmc"]),
        ("isce:s=2@cosine:scale=10,sce", ["isce:s=2@cosine:scale=10", "sce"]),
        ("isce:s=2@cosine,cosface:m=0.2,scale=15", ["isce:s=2@cosine", "cosface:m=0.2,scale=15"]),
        ("isce:s=2@cosine:scale=15,lgm:ratio=0.1,weight=0.2@gaussian:variances=true,mmc",
         ["isce:s=2@cosine:scale=15", "lgm:ratio=0.1,weight=0.2@gaussian:variances=true", "mmc"]),
        ("mmc@mmc:radius=5,sce@linear", ["mmc@mmc:radius=5", "sce@linear"]),
    ],
)  # fmt: skip
def test_split_keeps_settings_with_their_loss(text, wanted):
    assert spec.split(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("isce:s={0,1, 10},sce", ["isce:s=0", "isce:s=1", "isce:s=10", "sce"]),
        ("isce:s={1,3}+adversarial:steps={2,5},ramp=0.3", [
            "isce:s=1+adversarial:steps=2,ramp=0.3", "isce:s=1+adversarial:steps=5,ramp=0.3",
            "isce:s=3+adversarial:steps=2,ramp=0.3", "isce:s=3+adversarial:steps=5,ramp=0.3"]),
        ("{sce,mmc}+fit:lr={1e-3,1/100}", [
            "sce+fit:lr=1e-3", "sce+fit:lr=1/100", "mmc+fit:lr=1e-3", "mmc+fit:lr=1/100"]),
        ("sce@{linear,cosine:scale=10}", ["sce@linear", "sce@cosine:scale=10"]),
    ],
)  # fmt: skip
def test_braces_hold_values_that_are_tried_in_turn(text, wanted):
    assert spec.split(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("isce:s={1,2", "do not close"), ("isce:s=1,2}", "do not close"), ("isce:s={{1,2}}", "do not close"),
        ("isce:s={}", "missing"), ("isce:s={1,,2}", "missing"),
        ("a:b={" + ",".join(map(str, range(40))) + "},c={" + ",".join(map(str, range(40))) + "}", "1,600 specs"),
    ],
)  # fmt: skip
def test_braces_that_hold_no_list_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        spec.split(text)


@pytest.mark.parametrize("text", ["", " ", ",", " , ,"])
def test_split_of_nothing_is_refused(text):
    with pytest.raises(UserError, match="no names"):
        spec.split(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-1", -1), ("0.5", 0.5), ("1e-3", 1e-3), ("1/4", 0.25), ("8/255", 8 / 255), ("-1/2", -0.5),
        ("true", True), ("False", False), ("last", "last"), ("1/0", "1/0"), ("a/b", "a/b"),
    ],
)  # fmt: skip
def test_values(text, value):
    found = spec.parse(f"x:k={text}")[1]["k"]
    assert found == value
    assert type(found) is type(value)


def test_names_are_read_in_any_case():
    assert spec.parse("ISCE:s=1") == ("isce", {"s": 1})
    assert loss_spec.parse("ISCE:s=1").head == "linear"


@pytest.mark.parametrize("text", ["isce:10", "isce:s=", "isce:=1", "isce:s", "isce:s=1,2", "isce:s:1"])
def test_what_cannot_be_read_is_quoted_with_an_example(text):
    with pytest.raises(UserError, match=r"cannot read '.*' in '.*': expected .*isce:s=10"):
        spec.parse(text)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_chosen_by_name_with_its_own_head(name):
    chosen = loss_spec.parse(name)
    entry = LOSSES[name]
    assert (chosen.text, chosen.head, chosen.score) == (name, entry.head, entry.score)
    assert chosen.loss is entry.loss
    defaults = inspect.signature(entry.loss).parameters
    wanted = {"scale": defaults["scale"].default} if entry.head == "cosine" else {}
    assert chosen.head_settings == wanted


@pytest.mark.parametrize("name", LOSSES)
def test_every_setting_of_every_loss_can_be_written(name):
    """Its default, written out, is the loss itself."""
    head = HEADS[LOSSES[name].head]
    torch.manual_seed(0)
    parameters = inspect.signature(LOSSES[name].loss).parameters
    settings = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    if not settings:
        with pytest.raises(UserError, match=r"\(none\)"):
            loss_spec.parse(f"{name}:s=1")
        return
    chosen = loss_spec.parse(written(name, settings))
    probe = head(6, 4, **chosen.head_settings)
    out, y = Outputs(*probe(torch.randn(5, 6))), torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(chosen.loss(out, y), LOSSES[name].loss(out, y))


def test_settings_reach_the_loss_and_the_head():
    z, y = torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0])
    assert torch.equal(loss_spec.parse("isce:s=5").loss(z, y), isce(z, y, s=5))
    assert torch.equal(loss_spec.parse("isce:s=1/4").loss(z, y), isce(z, y, s=0.25))
    assert torch.equal(loss_spec.parse("sce:smoothing=0.1").loss(z, y), sce(z, y, smoothing=0.1))
    chosen = loss_spec.parse("cosface:m=0.2,scale=15")
    assert torch.equal(chosen.loss(z, y), cosface(z, y, m=0.2, scale=15))
    assert chosen.head_settings == {"scale": 15}
    assert loss_spec.parse("mmc@mmc:radius=5").head_settings == {"radius": 5}
    assert loss_spec.parse("isce:s=2@cosine:scale=10").head_settings == {"scale": 10}
    assert loss_spec.parse("isce:s=2@cosine").head == "cosine"
    assert loss_spec.parse("lgm@gaussian:variances=true").head_settings == {"variances": True}
    assert loss_spec.parse("sce@mmc").head == "mmc"
    assert loss_spec.parse(" sce ").text == "sce"


@pytest.mark.parametrize(
    ("text", "s"),
    [("isce:s=10@cosine", 10), ("isce", 1), ("isce:s=0", 0), ("isce:s=10*0.5", 5), ("cosface:m=0.2,scale=15", 3),
     ("sce", None), ("mmc", None), ("isce:s=ibp", None)],
)  # fmt: skip
def test_the_constant_s_is_in_units_of_the_logits(text, s):
    assert loss_spec.parse(text).s == s


def test_one_choice_does_not_change_the_next():
    first = loss_spec.parse("cosface:m=0.2,scale=15")
    first.head_settings["scale"] = 1
    assert loss_spec.parse("cosface").head_settings == {"scale": 64.0}
    assert loss_spec.parse("cosface:m=0.2,scale=15").head_settings == {"scale": 15}


@pytest.mark.parametrize(
    "text", ["sce", "isce:s=3*2", "cosface:m=0.2,scale=15", "isce:s=attack+trades:beta=2+fit:lr=1"]
)
def test_a_parsed_spec_travels_to_another_process(text):
    """It holds functions and partials, so it is pickled as its text; equal texts are equal specs."""
    one = loss_spec.parse(text)
    again = pickle.loads(pickle.dumps(one))
    assert again == one
    assert hash(again) == hash(one)
    assert (again.s, again.head, again.source, again.objective, again.fit) == (
        one.s, one.head, one.source, one.objective, one.fit,
    )  # fmt: skip
    assert one != loss_spec.parse("mmc")


@pytest.mark.parametrize(
    ("text", "near"),
    [("icse", "isce"), ("isce_bb", "isce_b"), ("cosfaec", "cosface"), ("arc_face", "arcface"), ("centre", "center"),
     ("margin", "negative_margin"), ("tripet", "triplet"), ("mcm", "mmc")],
)  # fmt: skip
def test_an_unknown_loss_names_the_nearest(text, near):
    with pytest.raises(UserError, match=rf"unknown loss '{text}'\. Did you mean '{near}'\?") as error:
        loss_spec.parse(f"{text}:s=1")
    assert all(name in str(error.value) for name in LOSSES)


@pytest.mark.parametrize("text", ["", ":s=1", "xyzzyqwv"])
def test_a_loss_like_no_other_lists_what_there_is(text):
    with pytest.raises(UserError, match="unknown loss") as error:
        loss_spec.parse(text)
    assert "isce" in str(error.value)


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [("sce:smoothign=0.1", "smoothign", "smoothing"), ("cosface:scael=3", "scael", "scale"),
     ("lgm:ration=1", "ration", "ratio"), ("center:wieght=1", "wieght", "weight")],
)  # fmt: skip
def test_an_unknown_setting_names_the_nearest(text, key, near):
    with pytest.raises(UserError, match=rf"unknown setting of loss '\w+' '{key}'\. Did you mean '{near}'\?"):
        loss_spec.parse(text)


@pytest.mark.parametrize("text", ["isce:y=1", "isce:out=1", "isce:tau=1", "mmc:s=1"])
def test_settings_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="unknown setting"):
        loss_spec.parse(text)


def test_an_unknown_head_or_head_setting_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown head 'cosien'\. Did you mean 'cosine'\?"):
        loss_spec.parse("isce:s=1@cosien")
    with pytest.raises(UserError, match=r"unknown setting of head 'mmc' 'radios'\. Did you mean 'radius'\?"):
        loss_spec.parse("mmc@mmc:radios=3")
    with pytest.raises(UserError, match="unknown setting of head 'linear'"):
        loss_spec.parse("sce@linear:scale=3")


@pytest.mark.parametrize("s", ["-1", "-1e-9", "-1/2", "nan", "inf", "1e400"])
def test_s_must_be_a_finite_number_from_zero(s):
    with pytest.raises(UserError, match=r"s, the inference information, must be a finite number >= 0"):
        loss_spec.parse(f"isce:s={s}")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("isce:s=true", "s", "True"), ("sce:smoothing=a/b", "smoothing", "a/b"),
        ("cosface:m=wide", "m", "wide"), ("isce@cosine:scale=big", "scale", "big"),
        ("mmc@mmc:radius=true", "radius", "True"),
    ],
)  # fmt: skip
def test_text_is_no_number(text, key, value):
    with pytest.raises(UserError, match=rf"{key} of (loss|head) '\w+' must be a number, got '{value}'"):
        loss_spec.parse(text)


@pytest.mark.parametrize("value", ["yes", "2", "0.5"])
def test_a_switch_is_true_or_false(value):
    with pytest.raises(UserError, match="variances"):
        loss_spec.parse(f"lgm@gaussian:variances={value}")


@pytest.mark.parametrize(
    "text",
    [
        "sce:smoothing=1", "sce:smoothing=-0.1", "sce:smoothing=nan", "cosface:scale=0", "cosface:scale=-3",
        "cosface:m=-1", "arcface:m=-0.1", "arcface:m=3", "arcface:m=nan", "isce_b:tau=nan", "isce_b:tau=inf",
        "lgm:ratio=-1", "center:weight=-1", "lgm:weight=-1", "contrastive:weight=-1", "triplet:weight=-1",
        "contrastive:separation=-1", "triplet:separation=-1", "isce@cosine:scale=0", "isce@cosine:scale=nan",
        "mmc@mmc:radius=0", "mmc@mmc:radius=-1", "mmc@mmc:radius=nan", "cosface:m=nan", "cosface:scale=nan",
        "cosface:scale=inf", "lgm:ratio=nan", "center:weight=nan",
    ],
)  # fmt: skip
def test_a_value_out_of_its_range_is_refused_before_training(text):
    """Each range is the docstring's own."""
    with pytest.raises(UserError):
        loss_spec.parse(text)


@pytest.mark.parametrize(
    "text", ["cosface:scale=15@cosine:scale=30", "cosface@cosine:scale=15", "arcface@cosine:scale=1"]
)
def test_two_scales_are_refused(text):
    with pytest.raises(UserError, match="two different scales: name it once, in the loss"):
        loss_spec.parse(text)


def test_the_same_scale_twice_is_one_scale():
    assert loss_spec.parse("cosface:m=0.1,scale=15@cosine:scale=15").head_settings == {"scale": 15}


@pytest.mark.parametrize("name", ["cosface", "arcface"])
@pytest.mark.parametrize("head", [name for name in HEADS if name != "cosine"])
def test_an_angular_loss_needs_cosines(name, head):
    with pytest.raises(UserError, match=f"loss '{name}' works on cosines: it needs head 'cosine', got '{head}'"):
        loss_spec.parse(f"{name}@{head}")


@pytest.mark.parametrize("name", ["mmc", "center", "lgm"])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_loss_of_distances_needs_centers(name, head):
    with pytest.raises(UserError, match="needs distances to centers"):
        loss_spec.parse(f"{name}@{head}")


def test_a_loss_that_is_not_per_sample_is_refused(monkeypatch):
    entry = LOSSES["sce"]

    def mean(out, y):
        return sce(out, y).mean()

    monkeypatch.setitem(LOSSES, "mean", type(entry)(mean, entry.score, "linear", "a mean"))
    with pytest.raises(UserError, match=r"loss 'mean' returned shape \(\) for 2 samples"):
        loss_spec.parse("mean")


def test_choosing_a_loss_leaves_torchs_generator_as_it_was():
    """A spec is text: reading it must not move the random state of whoever reads it."""
    before = torch.get_rng_state()
    for name in LOSSES:
        loss_spec.parse(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_may_bring_its_own_objective_network_and_schedule():
    row = loss_spec.parse(
        "isce:s=3@cosine:scale=10+trades:beta=2,steps=5+wideresnet:depth=10,width=1+fit:epochs=3,lr=1e-2"
    )
    assert row.head == "cosine"
    assert row.objective == "trades:beta=2,steps=5"
    assert row.model == "wideresnet:depth=10,width=1"
    assert row.fit == {"epochs": 3, "lr": 0.01}
    assert spec.split("sce+adversarial:steps=5,ramp=0.3,isce:s=gradient:0.5") == [
        "sce+adversarial:steps=5,ramp=0.3",
        "isce:s=gradient:0.5",
    ]


@pytest.mark.parametrize("text", ["sce+trades+mart", "sce+convnet+mlp"])
def test_two_of_a_kind_are_refused(text):
    with pytest.raises(UserError, match="names two"):
        loss_spec.parse(text)


def test_a_word_for_s_must_be_a_source():
    with pytest.raises(UserError, match="unknown source of s 'ten'"):
        loss_spec.parse("isce:s=ten")


def test_augmentations_are_read_in_this_order_alone():
    assert spec.augmentation("noise:64/255") == {"pad": 0, "flip": False, "noise_sigma": 64 / 255}
    assert spec.augmentation("crop:4+noise:0.5") == {"pad": 4, "flip": False, "noise_sigma": 0.5}
    assert spec.augmentation("crop:4") == {"pad": 4, "flip": False, "noise_sigma": 0.0}
    assert spec.augmentation(None) == {}
    for wrong in ("", "+", "flip", "noise", "noise:", "noise:x", "noise:nan", "noise:0.5+crop:4",
                  "noise:0.5+noise:0.5", "crop:4noise:0.5", "none+noise:0.5", "+noise:0.5", "noise:0.5\n",
                  "crop:4+noise:0.5+flip"):  # fmt: skip
        with pytest.raises(UserError, match="cannot read the augmentation"):
            spec.augmentation(wrong)


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.2 %", 0.002), ("0.01", 0.01), ("100%", 1.0)])
def test_a_share_is_read(text, value):
    assert spec.share("precision", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["1", "0", "0%", "101%", "-1%", "1%%", "", "%", "nan", "few"])
def test_a_share_that_may_mean_two_things_is_refused(text):
    with pytest.raises(UserError, match=r"cannot read --precision .*such as 1% or 0\.01"):
        spec.share("precision", text)
