"""Models of timm and transformers: their preprocessing, their classes, and what is said when they cannot be had.

timm is a stand-in here; transformers is the real one where it is installed, with tiny networks that were never trained.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from holdfast import data, models, run_folder
from holdfast.errors import UserError
from holdfast.experiments.evaluate_model import from_file
from holdfast.experiments.loss_spec import parse
from holdfast.importers import pretrained
from holdfast.importers.model_file import ModelSource, code_hash, is_model_file, open_model
from holdfast.importers.pretrained import Preprocessed, Preprocessing, open_backbone, open_pretrained, split_pretrained
from holdfast.results import load as load_results

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other libraries
MEAN, STD = (0.5, 0.25, 0.75), (0.25, 0.5, 1.0)


class Net(nn.Module):
    """What the fake timm makes: the mean of each channel, as features and through a linear layer."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.last = nn.Linear(3, num_classes) if num_classes else nn.Identity()
        self.num_features = 3

    def forward(self, x):
        assert x.shape[1:] == (3, 6, 6)
        return self.last(x.mean((2, 3)))


@pytest.fixture
def timm(monkeypatch):
    """A timm with one model, ``net``; ``asked`` holds how it was asked for."""
    module, its_data = types.ModuleType("timm"), types.ModuleType("timm.data")
    module.asked = []

    def create_model(name, pretrained=False, **settings):
        module.asked.append((name, pretrained, settings))
        if name != "net":
            raise RuntimeError(f"Unknown model ({name})")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Net(**settings).half()

    about = {"input_size": (3, 6, 6), "interpolation": "bicubic", "mean": MEAN, "std": STD, "crop_pct": 0.75}
    module.create_model, module.data = create_model, its_data
    its_data.resolve_model_data_config = lambda network: about
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setitem(sys.modules, "timm.data", its_data)
    return module


def test_timm_brings_weights_size_mean_and_std(timm):
    model = open_model(ModelSource("timm:net"))
    assert timm.asked == [("net", True, {})]
    assert model.notes == ("images are resized to 6 x 6 inside the network; the threat is on the data's pixels.",)
    x = torch.rand(2, 3, 6, 6)
    expected = Net().eval()
    expected.load_state_dict(model.inner.network.state_dict())
    normal = (x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    assert torch.allclose(model(x), expected(normal))
    assert next(model.parameters()).dtype == torch.float32
    larger = torch.rand(2, 3, 12, 9, requires_grad=True)
    model(larger).sum().backward()
    assert larger.grad.abs().sum() > 0, "gradients flow through the resize"
    with pytest.raises(UserError, match="--convert rgb"):
        model(torch.rand(2, 1, 6, 6))


def test_what_is_given_takes_the_place_of_its_own_numbers(timm, tmp_path):
    torch.save(Net(7).state_dict(), tmp_path / "net.pt")
    model = open_model(ModelSource("timm:net:num_classes=7", str(tmp_path / "net.pt"), mean=(0, 0, 0), std=(1, 1, 1)))
    assert timm.asked == [("net", False, {"num_classes": 7})]
    assert model(torch.rand(2, 3, 6, 6)).shape == (2, 7)
    assert not model.inner.mean.any()


def test_timm_is_a_backbone_for_other_classes(timm):
    model = models.build("timm:net", (3, 8, 8), 5, head="cosine", mean=torch.ones(3))
    assert timm.asked[-1] == ("net", True, {"num_classes": 0})
    out = model.train()(torch.rand(4, 3, 8, 8))
    assert out.logits.shape == (4, 5)
    assert out.features.shape == (4, 3)
    assert not model.mean.any(), "the data's own mean is not taken off as well"
    assert parse("sce+timm:net").model == "timm:net"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:", "alone is not enough"),
        ("timm:nett", r"timm:nett cannot be opened \(RuntimeError: Unknown model \(nett\)\)"),
        ("timm:net:depth=3", r"cannot be opened \(TypeError: .*depth"),
    ],
)
def test_what_timm_cannot_make_is_one_sentence(text, message, timm):
    with pytest.raises(UserError, match=message):
        open_model(ModelSource(text))


@pytest.mark.parametrize(("kind", "package"), [("timm", "timm"), ("hf", "transformers")])
def test_a_library_that_is_missing_or_broken_says_what_to_do(kind, package, monkeypatch, tmp_path, holdfast_):
    assert is_model_file(f"{kind}:resnet18")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for words in (["evaluate", f"{kind}:net", "--data", "digits"], ["train", "--model", f"{kind}:net", "--out", "run"]):
        status, out, err = holdfast_(*words)
        assert (status, out) == (2, "")
        assert f"needs the package {package}: pip install 'holdfast[{kind}]'" in " ".join(err.split())
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be imported here .*nms.*Install the torchvision that belongs"):
        open_model(ModelSource(f"{kind}:net"))


@pytest.mark.parametrize(
    ("size", "steps", "final"),
    [
        ((12, 12), Preprocessing(resize=(6, 6)), (6, 6)),
        ((12, 24), Preprocessing(resize=(6,)), (6, 12)),
        ((12, 24), Preprocessing(resize=(8,), crop=(6, 6)), (6, 6)),
        ((6, 6), Preprocessing(resize=(8,), crop=(6, 6)), (6, 6)),
        ((8, 8), Preprocessing(crop=(6, 4)), (6, 4)),
        ((8, 9), Preprocessing(), (8, 9)),
    ],
)
def test_images_get_the_size_that_the_network_takes(size, steps, final):
    x = torch.rand(2, 3, *size)
    fitted = Preprocessed(nn.Identity(), steps, "net")(x)
    assert fitted.shape[-2:] == final
    if size == final:
        assert torch.equal(fitted, x)


def test_an_image_that_is_smaller_than_its_crop_is_refused():
    with pytest.raises(UserError, match="these are smaller: give --resize"):
        Preprocessed(nn.Identity(), Preprocessing(crop=(6, 6)), "net")(torch.rand(1, 3, 4, 4))


# transformers, the real one.


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A folder with tiny networks of transformers: vit with names for its classes, resnet without."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
            patch_size=8, num_channels=1, num_labels=10, id2label={k: str(9 - k) for k in range(10)},
        )  # fmt: skip
        resnet = transformers.ResNetConfig(
            num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=7
        )
        for name, config in (("vit", vit), ("resnet", resnet)):
            transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder / name)
        transformers.AutoModel.from_config(vit).save_pretrained(folder / "headless")
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.25]).save_pretrained(folder / "vit")
    return folder


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}}, (24, 24)),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 14}}, (32, 32)),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, (100, 100)),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": {"height": 14, "width": 14}}, (24, 32)),
        ("EfficientNetImageProcessor", {"size": {"height": 16, "width": 16}, "rescale_offset": True}, (24, 24)),
        ("ViTImageProcessor", {"do_resize": False, "do_rescale": False, "image_mean": [9.0, 8, 7]}, (12, 12)),
        ("ViTImageProcessor", {"do_resize": False, "do_normalize": False, "rescale_factor": 1 / 127.5}, (12, 12)),
    ],
)
def test_the_preprocessing_is_that_of_the_processor(name, settings, size, tmp_path, hf):
    import transformers

    processor = getattr(transformers, name)(**settings)
    processor.save_pretrained(tmp_path)
    steps, _ = pretrained._hf_preprocessing(transformers, str(tmp_path), None)
    # Smooth images: processors round to 8 bits after the resize.
    waves = np.stack([np.add.outer(np.sin(np.arange(size[0]) / k), np.cos(np.arange(size[1]) / k)) for k in (5, 7, 9)])
    image = np.round((waves / 4 + 0.5) * 255).astype(np.uint8)
    expected = torch.as_tensor(np.asarray(processor(image, input_data_format="channels_first")["pixel_values"][0]))
    found = Preprocessed(nn.Identity(), steps, name)(torch.tensor(image)[None] / 255)[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 0.025 * float(expected.max() - expected.min())


def test_a_folder_is_opened_with_its_classes_in_the_order_of_the_data(hf, monkeypatch):
    monkeypatch.chdir(hf)
    subject = from_file(ModelSource("hf:vit"), "digits", limit=20)
    assert subject.name == "hf:vit"
    assert subject.about["model_file"]["class_order"] == tuple(range(9, -1, -1))
    x = data.pixels(subject.split.test.x[:5])
    inner = open_pretrained("hf:vit").network.network
    big = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = inner(pixel_values=(big - 0.5) / 0.25).logits
        assert torch.allclose(subject.model(x).logits, logits.flip(1), atol=1e-5)


def test_the_shell_evaluates_trains_and_replays_it(hf, tmp_path, monkeypatch, holdfast_):
    monkeypatch.chdir(tmp_path)
    small = ("--suite", "quick", "--device", "cpu", "-q")
    status, _, err = holdfast_("evaluate", f"hf:{hf / 'vit'}", "--data", "digits", "--limit", "12", *small)
    assert status == 0, err
    assert [run.loss for run in load_results("out/hf-vit-linf0.1-quick").runs] == ["hf:vit"]
    assert holdfast_("replay", "out/hf-vit-linf0.1-quick")[0] == 0
    words = ("train", "--model", f"hf:{hf / 'vit'}", "--epochs", "1", "--limit-train", "40", "--device", "cpu", "-q")
    assert holdfast_(*words, "--out", "run", "--freeze", "backbone.*")[0] == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["model"]["name"] == "hf:vit"
    assert config["paths"]["model"] == f"hf:{hf / 'vit'}"
    trained, _ = run_folder.load("run")
    begun = open_backbone(f"hf:{hf / 'vit'}").network.state_dict()
    assert all(torch.equal(value, begun[key]) for key, value in trained.backbone.network.state_dict().items())
    assert holdfast_("evaluate", "run", *small)[0] == 0
    assert holdfast_("replay", "run/evaluation-linf0.1-quick")[0] == 0


def test_a_folder_that_changed_is_not_taken_for_the_old_one(hf, tmp_path, monkeypatch, holdfast_):
    import shutil

    shutil.copytree(hf / "vit", tmp_path / "vit")
    reference = f"hf:{tmp_path / 'vit'}"
    was = pretrained.pretrained_hash(reference)
    words = ("train", "--model", reference, "--epochs", "1", "--limit-train", "40", "--device", "cpu", "-q")
    assert holdfast_(*words, "--out", tmp_path / "run")[0] == 0
    config = json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text())
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({**config, "image_mean": [0.1]}))
    now = pretrained.pretrained_hash(reference)
    assert (was[0] == now[0], was[1] == now[1]) == (False, True)
    assert code_hash(ModelSource(reference)) == now[0]
    with pytest.raises(UserError, match="has changed since it was trained"):
        run_folder.load(tmp_path / "run")
    assert "differ in code" in holdfast_(*words, "--out", tmp_path / "run")[2]


def test_another_number_of_classes_in_colour(hf):
    model = models.build(f"hf:{hf / 'resnet'}", (3, 24, 24), 4)
    assert model(torch.rand(2, 3, 24, 24)).logits.shape == (2, 4)
    assert not [name for name, _ in model.named_parameters() if "classifier" in name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", r"there is no folder \./nothing"),
        ("headless", r"no trained image classifier: its weights lack 'classifier"),
        (".", r"has no config\.json"),
        ("vit:depth=3", r"has settings, which models of transformers do not take"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(name, message, hf, monkeypatch):
    monkeypatch.chdir(hf)
    with pytest.raises(UserError, match=message):
        open_model(ModelSource(f"hf:{name}"))


def test_a_network_without_a_classifier_is_a_backbone(hf):
    assert models.build(f"hf:{hf / 'headless'}", (1, 8, 8), 3)(torch.rand(2, 1, 8, 8)).features.shape == (2, 16)


def test_a_damaged_folder_is_one_sentence(hf, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be opened \(\w+: "):
        open_model(ModelSource(f"hf:{tmp_path}"))
    assert split_pretrained(f"hf:{tmp_path}")[1] == str(tmp_path)
