"""Networks: a backbone and a head behind one normalisation. images in [0, 1] -> Outputs.

A backbone is a module ``Backbone(shape, **settings)`` that maps (N, C, H, W) to (N, self.features). To add one: the
class and a line in ``MODELS``; or, without a change here, a function in a file of one's own, ``mymodel.py:backbone``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .. import spec
from ..errors import UserError, unknown
from ..importers.pretrained import is_pretrained, open_backbone, preprocessed, split_pretrained
from ..outputs import Outputs
from ..user_input import MOST, any_seed, typed, whole
from ..user_input import text as checked_text
from .cifar_preactresnet import CifarPreActResNet, with_statistics
from .convnets import ConvNet, Linear, Madry, Mlp, SmallCnn, SmallConvNet, StepNet
from .densenet import DenseNet
from .ensemble import Ensemble, ensemble
from .fastconvnet import FastConvNet
from .fractalnet import FractalNet
from .heads import HEADS
from .inception import Inception
from .lipschitz import LipConv, LipMlp
from .logits_only import LogitsOnly, logits_only
from .resnets import PreActResNet8, PreActResNet18, ResNet, ResNet18
from .user_backbone import is_own, measured, own_backbone, own_code_hash
from .wideresnet import WideResNet

__all__ = [
    "MODELS", "Classifier", "Ensemble", "LogitsOnly", "build", "check", "default_model", "ensemble", "is_own",
    "is_pretrained", "logits_only", "own_code_hash", "with_statistics",
]  # fmt: skip

MOST_PARAMETERS = 10**9  # 4 GB of weights, and three times that to train them
SMALLEST_COUNT = 10**5  # what each tensor counts at least: 10,000 tiny layers are too many too
MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "mlp": Mlp,
    "smallconv": SmallConvNet,
    "convnet": ConvNet,
    "stepnet": StepNet,
    "madry": Madry,
    "smallcnn": SmallCnn,
    "preactresnet": CifarPreActResNet,
    "preactresnet8": PreActResNet8,
    "preactresnet18": PreActResNet18,
    "resnet": ResNet,
    "resnet18": ResNet18,
    "wideresnet": WideResNet,
    "densenet": DenseNet,
    "inception": Inception,
    "fractalnet": FractalNet,
    "fastconvnet": FastConvNet,
    "lipmlp": LipMlp,
    "lipconv": LipConv,
}


class Classifier(nn.Module):
    """head(backbone((x - mean) / std)): images (N, C, H, W) in [0, 1] -> Outputs. Normalisation is layer 0.

    For tools that expect a tensor (foolbox, torchattacks, jit.trace, torch.export), see ``logits_only``.

    Args: backbone, head: modules; mean, std: (C,), of the training pixels.
    ``logit_scale`` multiplies the logits; set after training it changes no prediction, and many an attack.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))
        self.backbone = backbone
        self.head = head
        self.logit_scale = 1.0

    def forward(self, x: Tensor) -> Outputs:
        out: Outputs = self.head(self.backbone((x - self.mean) / self.std))
        return out if self.logit_scale == 1 else out._replace(logits=out.logits * self.logit_scale)


@typed
def default_model(shape: Sequence[int], device: str = "cuda") -> str:
    """The network for images of this size on this device: small images, and a CPU, get a small one.

    On one CPU core PreActResNet-18 takes 0.16 s for a step on one image of 32 x 32, and 0.43 s at 64 x 64; the convnet
    takes 1 to 2 ms.

    >>> default_model((1, 1, 2)), default_model((1, 8, 8)), default_model((1, 28, 28)), default_model((3, 32, 32))
    ('mlp', 'smallconv', 'convnet', 'preactresnet18')
    >>> default_model((3, 64, 64), "cpu")
    'convnet'
    """
    if len(shape) != 3:
        raise UserError(f"shape must be (channels, height, width) of the images, got {tuple(shape)}.")
    side = min(shape[1:])
    if side < 4:
        return "mlp"
    if side <= 16:
        return "smallconv"
    return "convnet" if shape[0] == 1 or side < 32 or device.startswith("cpu") else "preactresnet18"


@typed
def check(text: str) -> None:
    """Raise UserError unless ``build`` knows this model: its name and settings, not yet their values. Opens no file.

    >>> check("wideresnet:depth=16,width=4")
    >>> check("wideresnet:dept=16")
    Traceback (most recent call last):
    holdfast.errors.UserError: unknown setting of model 'wideresnet' 'dept'. Did you mean 'depth'? Known: depth, width.
    """
    if is_pretrained(checked_text("the model", text)):
        split_pretrained(text)
    elif not is_own(text):
        _chosen(text)


def _chosen(text: str) -> Callable[..., nn.Module]:
    name, settings = spec.parse(text)
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    spec.accepts("model", name, MODELS[name], settings)
    return partial(MODELS[name], **settings)


def _check_size(text: str, shape: tuple[int, int, int], head: str, classes: int) -> None:
    """Refuse a network that would not fit in memory: it is built without memory first, and counted while it grows."""
    total = 0

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal total
        total += SMALLEST_COUNT if parameter is None else max(parameter.numel(), SMALLEST_COUNT)
        if total > MOST_PARAMETERS:
            raise UserError(
                f"the model '{text}' with {classes:,} classes has more than {MOST_PARAMETERS:,} parameters or too many "
                "layers: choose a smaller one."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            count(nn.Module(), head, torch.empty(int(_chosen(text)(shape).features), classes))  # type: ignore[arg-type]
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the model '{text}' cannot be built for images of shape {shape}: {reason}") from None
    finally:
        hook.remove()


@typed
def build(
    name: str,
    shape: Sequence[int],
    classes: int,
    *,
    head: str = "linear",
    head_settings: dict[str, Any] | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    seed: int = 0,
) -> Classifier:
    """A fresh network with weights drawn from ``seed`` alone (torch's own generator is left as it was).

    Args:
        name: a key of MODELS, with settings after a colon, as in wideresnet:depth=16,width=4; mymodel.py:backbone, a
            function of the shape that returns a module from images to (N, D) features (the file is executed); or
            timm:NAME, hf:NAME or hf:FOLDER, a pretrained classifier of these libraries without its last layer.
        shape: (C, H, W) of the images; classes: K >= 2.
        head: a key of HEADS; head_settings: its keyword arguments, such as scale or radius.
        mean, std: (C,), default 0 and 1: no normalisation, and none for a backbone whose ``normalised`` is False.

    Raises UserError for an unknown name, setting or head, a setting that the head does not take, fewer than two
    classes, images too small for the network, a file that does not make a backbone, or a library that is not there.

    >>> build("smallconv", (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).logits.shape
    torch.Size([2, 10])
    """
    check(name)
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    classes, seed = whole("classes", classes, -MOST), any_seed(seed)
    if classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, got {classes}.")
    if len(shape) != 3:
        raise UserError(f"shape must be (channels, height, width) of the images, got {tuple(shape)}.")
    channels, height, width = (whole("a size in shape", size, 1) for size in shape)
    for key, value in (("mean", mean), ("std", std)):
        if value is not None and value.numel() != channels:
            raise UserError(f"{key} must hold one number a channel ({channels}), got {value.numel()}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_pretrained(name):
            opened = open_backbone(name)
            backbone, features = measured(preprocessed(opened, name), (channels, height, width), name)
        elif is_own(name):
            backbone, features = own_backbone(name, (channels, height, width))
        else:
            _check_size(name, (channels, height, width), head, classes)
            backbone = _chosen(name)((channels, height, width))
            features = int(backbone.features)  # type: ignore[arg-type]
        try:
            top = HEADS[head](features, classes, **(head_settings or {}))
        except TypeError as error:
            raise UserError(f"head '{head}' does not take these settings: {head_settings}. {error}") from None
    zeros, ones = torch.zeros(channels), torch.ones(channels)
    if not getattr(backbone, "normalised", True):
        mean = std = None
    return Classifier(backbone, top, zeros if mean is None else mean, ones if std is None else std)
