"""Models that make attacks fail or measurements wrong: each wraps an honest classifier and takes a severity.

``FAULTY[name].make(honest, severity)`` is a model again. Features and distances pass through where the classifier has
them. The same images get the same answer, except where that is the fault. Whatever a faulty model remembers is in its
``answer``, so a copy of it in float64 (``copy.deepcopy(model).double()``) has the same fault in float64.

To add one: a factory and a line in ``FAULTY``, whose severities run from harmless to total.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.outputs import Outputs, as_outputs

Answer = Callable[[nn.Module, Tensor], Any]  # (honest, x) -> what the faulty model returns
FREQUENCY = 1e3  # of the shattered logits: radians for each unit of summed pixels


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        make: (honest, severity) -> model.
        severities: from harmless to total.
        about: what the model does, and what the severity is.
        harmless: the severities at which it is the honest model, so that nothing may fire.
    """

    make: Callable[[nn.Module, float], nn.Module]
    severities: tuple[float, ...]
    about: str
    harmless: tuple[float, ...]


class FaultyModel(nn.Module):
    """A model that answers through a function of the honest one."""

    def __init__(self, honest: nn.Module, answer: Answer) -> None:
        super().__init__()
        self.honest, self.answer = honest, answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.honest, x)


def _on_logits(change: Callable[[Tensor], Tensor]) -> Answer:
    """The honest answer with other logits."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        out = as_outputs(honest(x))
        return out._replace(logits=change(out.logits))

    return answer


def _on_pixels(change: Callable[[Tensor], Tensor]) -> Answer:
    """The honest answer to another image."""
    return lambda honest, x: as_outputs(honest(change(x)))


def _share(shape: torch.Size, share: float, like: Tensor) -> Tensor:
    """(C, H, W) bool: a fixed random ``share`` of the pixels, the larger share a superset of the smaller."""
    order = torch.rand(shape, generator=torch.Generator().manual_seed(0)).flatten().argsort().argsort()
    return (order < round(share * order.numel())).view(shape).to(like.device)


# --- logits


def logit_scale(honest: nn.Module, severity: float) -> nn.Module:
    """logits * severity."""
    return FaultyModel(honest, _on_logits(lambda z: z * severity))


def temperature(honest: nn.Module, severity: float) -> nn.Module:
    """log softmax(z / T), computed as written, plus logsumexp(z / T): z / T, as long as no probability saturates."""

    def change(z: Tensor) -> Tensor:
        z = z / severity
        p = torch.softmax(z, 1)
        return p.clamp_min(torch.finfo(z.dtype).tiny).log() + z.logsumexp(1, keepdim=True)

    return FaultyModel(honest, _on_logits(change))


def softmax_output(honest: nn.Module, severity: float) -> nn.Module:
    """Probabilities instead of logits."""
    return FaultyModel(honest, _on_logits(lambda z: torch.softmax(z, 1) if severity else z))


def half_logits(honest: nn.Module, severity: float) -> nn.Module:
    """logits * severity through float16: gradients below 6e-8 vanish, logits beyond 65,504 are infinite."""
    return FaultyModel(honest, _on_logits(lambda z: (z * severity).half().to(z.dtype) if severity else z))


class HalfNetwork(nn.Module):
    """The network with weights and activations of another type. A copy cast to float64 computes in float64."""

    def __init__(self, honest: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.honest = copy.deepcopy(honest).to(dtype)

    def forward(self, x: Tensor) -> Outputs:
        out = as_outputs(self.honest(x.to(next(self.honest.parameters()).dtype)))
        return Outputs(*(None if tensor is None else tensor.to(x.dtype) for tensor in out))


def half_network(honest: nn.Module, severity: float) -> nn.Module:
    """0: float32; 1: float16; 2: bfloat16."""
    return HalfNetwork(honest, (torch.float32, torch.float16, torch.bfloat16)[int(severity)])


def shattered(honest: nn.Module, severity: float) -> nn.Module:
    """A sinusoid of amplitude ``severity`` on each logit, of a phase that runs fast in a direction of its own."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        out = as_outputs(honest(x))
        if not severity:
            return out
        chance = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (out.logits.shape[1], *x.shape[1:]), generator=chance).to(x) * 2 - 1
        phase = FREQUENCY * (x[:, None] * signs).flatten(2).sum(2)  # a sum, not a product: the same for every batch
        return out._replace(logits=out.logits + severity * phase.sin())

    return FaultyModel(honest, answer)


# --- pixels


def quantised_input(honest: nn.Module, severity: float) -> nn.Module:
    """Pixels rounded to ``severity`` levels, with the gradient that rounding has: none. 0: not rounded."""
    return FaultyModel(honest, _on_pixels(lambda x: (x * (severity - 1)).round() / (severity - 1) if severity else x))


def noise(honest: nn.Module, severity: float) -> nn.Module:
    """Fresh Gaussian noise of deviation ``severity`` on every forward pass, from torch's own generator."""
    return FaultyModel(honest, _on_pixels(lambda x: x + severity * torch.randn_like(x) if severity else x))


def detached_graph(honest: nn.Module, severity: float) -> nn.Module:
    """A share of the pixels is cut from the graph; at 1 the logits have no graph at all."""

    def change(x: Tensor) -> Tensor:
        return x.detach() if severity == 1 else torch.where(_share(x.shape[1:], severity, x), x.detach(), x)

    return FaultyModel(honest, _on_pixels(change))


class _Turned(torch.autograd.Function):
    """x, with the sign of the gradient turned where the mask says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, -grads[0], grads[0]), None


def gradient_flip(honest: nn.Module, severity: float) -> nn.Module:
    """The gradient is negated on a share of the pixels; at 1 every ascent descends."""
    return FaultyModel(honest, _on_pixels(lambda x: _Turned.apply(x, _share(x.shape[1:], severity, x))))


def out_of_range_guard(honest: nn.Module, severity: float) -> nn.Module:
    """Pixels clamped to [severity, 1 - severity]: black and white have no gradient, short steps do nothing."""
    return FaultyModel(honest, _on_pixels(lambda x: x.clamp(severity, 1 - severity)))


def train_batch_norm(honest: nn.Module, severity: float) -> nn.Module:
    """Pixels normalised by statistics of the batch, mixed with those that a holdfast Classifier keeps; both as (C,).

    x <- (x - mean) / std * std_0 + mean_0, with mean and std from the kept ones (severity 0) to the batch's (1).
    """

    def answer(honest: Any, x: Tensor) -> Outputs:
        if not severity:
            return as_outputs(honest(x))
        mean_0, std_0 = honest.mean, honest.std
        mean, std = x.mean((0, 2, 3)).view_as(mean_0), x.std((0, 2, 3), correction=0).view_as(std_0)
        mean, std = torch.lerp(mean_0, mean, severity), torch.lerp(std_0, std, severity).clamp_min(1e-3)
        return as_outputs(honest((x - mean) / std * std_0 + mean_0))

    return FaultyModel(honest, answer)


# --- activations


class Winners(nn.Module):
    """k-winners-take-all: the largest ``share`` of a sample's activations stay, the others are zero."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, h: Tensor) -> Tensor:
        flat = h.relu().flatten(1)
        kept = max(1, round(self.share * flat.shape[1]))
        least = flat.topk(kept, dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, 0.0).view_as(h)


class LastingDropout(nn.Module):
    """ReLU, then dropout that does not stop in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(h.relu(), self.p, training=True) if self.p else h.relu()


def _with_activations(honest: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """A copy of the network with every ReLU replaced. Raises ValueError where there is none."""
    network = copy.deepcopy(honest)
    found = [
        (module, name) for module in network.modules() for name, c in module.named_children() if type(c) is nn.ReLU
    ]
    if not found:
        raise ValueError("this fault replaces ReLU modules, and the network has none.")
    for module, name in found:
        setattr(module, name, make())
    return network


def kwta(honest: nn.Module, severity: float) -> nn.Module:
    """Every ReLU becomes k-winners-take-all with this share kept."""
    return _with_activations(honest, partial(Winners, severity))


def dropout(honest: nn.Module, severity: float) -> nn.Module:
    """Every ReLU is followed by dropout of probability ``severity``, in eval mode too."""
    return _with_activations(honest, partial(LastingDropout, severity))


# --- state and shape


class Counting(nn.Module):
    """A model that answers through (honest, x, how often it was asked before). calls: a buffer, so that it is state."""

    calls: Tensor

    def __init__(self, honest: nn.Module, answer: Callable[[nn.Module, Tensor, int], Any]) -> None:
        super().__init__()
        self.honest, self.answer = honest, answer
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        before = int(self.calls)
        self.calls += 1
        return self.answer(self.honest, x, before)


def nan_midway(honest: nn.Module, severity: float) -> nn.Module:
    """NaN logits from call number ``severity`` on, counted from 0; infinity: never."""

    def answer(honest: nn.Module, x: Tensor, calls: int) -> Outputs:
        out = as_outputs(honest(x))
        return out if calls < severity else out._replace(logits=out.logits * math.nan)

    return (
        FaultyModel(honest, lambda honest, x: as_outputs(honest(x)))
        if severity == math.inf
        else Counting(honest, answer)
    )


def keeps_state(honest: nn.Module, severity: float) -> nn.Module:
    """Logits that drift by ``severity`` a call towards the last classes and away from the first."""

    def answer(honest: nn.Module, x: Tensor, calls: int) -> Outputs:
        out = as_outputs(honest(x))
        towards = torch.linspace(-1, 1, out.logits.shape[1]).to(out.logits)
        return out._replace(logits=out.logits + severity * calls * towards)

    return Counting(honest, answer) if severity else FaultyModel(honest, lambda honest, x: as_outputs(honest(x)))


def nan_off_grid(honest: nn.Module, severity: float) -> nn.Module:
    """NaN where a sample's pixels lie further than ``severity`` grey levels from whole ones, in the mean."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        out = as_outputs(honest(x))
        grey = x.detach() * 255
        off = (grey - grey.round()).abs().flatten(1).mean(1, keepdim=True) > severity
        return out._replace(logits=out.logits.masked_fill(off, math.nan))

    return FaultyModel(honest, answer)


def decoy_gradient(honest: nn.Module, severity: float) -> nn.Module:
    """One-hot labels in the place of logits, and a gradient that leads to where the honest model is surest."""

    def change(z: Tensor) -> Tensor:
        if not severity:
            return z
        label = F.one_hot(z.argmax(1), z.shape[1]).to(z)
        decoy = (z * label).sum(1, keepdim=True)
        return severity * label + (1 - label) * (decoy - decoy.detach())

    return FaultyModel(honest, _on_logits(change))


def batch1_raises(honest: nn.Module, severity: float) -> nn.Module:
    """An image alone is an error, as with a stray ``squeeze()``."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        if severity and len(x) == 1:
            raise RuntimeError("expected a batch of 2 or more.")
        return as_outputs(honest(x))

    return FaultyModel(honest, answer)


def wrong_shape(honest: nn.Module, severity: float) -> nn.Module:
    """1: logits of shape (N, K, 1); 2: of shape (K, N)."""

    def answer(honest: nn.Module, x: Tensor) -> Any:
        out = as_outputs(honest(x))
        return (out, out.logits[:, :, None], out.logits.T)[int(severity)]

    return FaultyModel(honest, answer)


# --- answers that depend on more than the image: all are the honest model on clean images


def _denoised(honest: nn.Module, x: Tensor) -> Outputs:
    """The honest answer to 8-bit images; to others that of their pixels rounded to 16 levels, with a gradient."""
    grey = x.detach() * 255
    off = (grey - grey.round()).abs().flatten(1).amax(1) > 1e-2
    rounded = (x.detach() * 16).round() / 16
    return as_outputs(honest(torch.where(off.view(-1, *[1] * (x.ndim - 1)), rounded, x.detach()) + (x - x.detach())))


class Remembering(nn.Module):
    """An image near one that it has seen gets the answer of that one, and its own gradient."""

    def __init__(self, honest: nn.Module, radius: float) -> None:
        super().__init__()
        self.honest, self.radius = honest, radius
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Outputs:
        image = x.detach()
        seen = image[:0] if self.seen is None else self.seen.to(image)
        known, near = image, torch.cdist(image.flatten(1), seen.flatten(1), p=math.inf) <= self.radius
        if len(seen):
            known = torch.where(near.any(1).view(-1, 1, 1, 1), seen[near.long().argmax(1)], image)
        self.seen = torch.cat([seen, image[~near.any(1)]])
        return as_outputs(self.honest(known + (x - image)))


def remembers(honest: nn.Module, severity: float) -> nn.Module:
    """Images within this distance (linf) of one that was seen before get its answer."""
    return Remembering(honest, severity) if severity else FaultyModel(honest, lambda honest, x: as_outputs(honest(x)))


def honest_alone(honest: nn.Module, severity: float) -> nn.Module:
    """The honest answer in batches of up to this size, another in larger ones."""
    return FaultyModel(honest, lambda honest, x: as_outputs(honest(x)) if len(x) <= severity else _denoised(honest, x))


def honest_at_first(honest: nn.Module, severity: float) -> nn.Module:
    """The honest answer in the first calls, another afterwards; the count is no buffer."""
    calls = [0]

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        calls[0] += 1
        return as_outputs(honest(x)) if calls[0] <= severity else _denoised(honest, x)

    return FaultyModel(honest, answer)


def gradient_mode(honest: nn.Module, severity: float) -> nn.Module:
    """1: another answer where gradients are recorded; 2: where they are not; 0: the honest one in both modes."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        mode = 1 if torch.is_grad_enabled() else 2
        return _denoised(honest, x) if mode == severity else as_outputs(honest(x))

    return FaultyModel(honest, answer)


def plateau(honest: nn.Module, severity: float) -> nn.Module:
    """One-hot logits of the honest prediction, plus a linear decoy of this size that has the only gradient."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        out = as_outputs(honest(x))
        if not severity:
            return out
        k = out.logits.shape[1]
        chance = torch.Generator().manual_seed(0)
        weights = torch.randn(x[0].numel(), k, generator=chance).to(x) / x[0].numel() ** 0.5
        return out._replace(logits=10 * F.one_hot(out.logits.argmax(1), k).to(x) + severity * x.flatten(1) @ weights)

    return FaultyModel(honest, answer)


def off_grid(honest: nn.Module, severity: float) -> nn.Module:
    """Images whose pixels are no multiples of 1/255 get another answer."""
    return FaultyModel(honest, _denoised if severity else lambda honest, x: as_outputs(honest(x)))


FAULTY: dict[str, Fault] = {
    "logit_scale": Fault(
        logit_scale,
        (1.0, 1e-2, 1e-4, 1e2, 1e4, 1e6),
        "logits times the severity: above 1 cross-entropy has no gradient, below 1 scores of all logits are flat",
        (1.0,),
    ),
    "temperature": Fault(
        temperature,
        (1.0, 1e1, 1e2, 1e3, 1e-1, 1e-2, 1e-3),
        "logits over the severity through a softmax and its logarithm: below 1 gradients are what rounding leaves",
        (1.0,),
    ),
    "softmax_output": Fault(softmax_output, (0.0, 1.0), "1: probabilities in the place of logits", (0.0,)),
    "half_logits": Fault(
        half_logits, (0.0, 1.0, 10.0, 100.0, 1000.0), "logits times the severity through float16; 0: not at all", (0.0,)
    ),
    "half_network": Fault(
        half_network, (0.0, 1.0, 2.0), "weights and activations in float16 (1) or bfloat16 (2)", (0.0,)
    ),
    "shattered": Fault(
        shattered, (0.0, 1e-4, 1e-3, 1e-2, 1e-1), "a fast sinusoid on the logits, the severity its amplitude", (0.0,)
    ),
    "quantised_input": Fault(
        quantised_input,
        (0.0, 256.0, 64.0, 16.0, 8.0, 4.0, 2.0),
        "pixels rounded to that many levels; 0: not rounded",
        (0.0,),
    ),
    "noise": Fault(
        noise,
        (0.0, 0.001, 0.01, 0.05, 0.2),
        "Gaussian noise on the pixels at every call, the severity its sigma",
        (0.0,),
    ),
    "detached_graph": Fault(
        detached_graph, (0.0, 0.25, 0.5, 0.75, 0.9, 1.0), "no gradient through that share of the pixels", (0.0,)
    ),
    "gradient_flip": Fault(
        gradient_flip, (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), "a negated gradient on that share of the pixels", (0.0,)
    ),
    "out_of_range_guard": Fault(
        out_of_range_guard, (0.0, 0.05, 0.1, 0.2, 0.3, 0.4), "pixels clamped to the box, less the severity", (0.0,)
    ),
    "train_batch_norm": Fault(
        train_batch_norm,
        (0.0, 0.01, 0.1, 0.5, 1.0),
        "pixels normalised by the batch, the severity its share in the statistics",
        (0.0,),
    ),
    "kwta": Fault(
        kwta,
        (1.0, 0.5, 0.3, 0.2, 0.1, 0.05),
        "k winners take all in the place of ReLU, the severity the share that wins",
        (1.0,),
    ),
    "dropout": Fault(dropout, (0.0, 0.01, 0.05, 0.1, 0.3, 0.5), "dropout of that probability in eval mode too", (0.0,)),
    "nan_midway": Fault(
        nan_midway, (math.inf, 300.0, 100.0, 30.0, 10.0, 3.0, 0.0), "NaN from that call on", (math.inf,)
    ),
    "keeps_state": Fault(
        keeps_state, (0.0, 1e-6, 1e-4, 1e-2, 1e-1), "logits that drift by the severity a call", (0.0,)
    ),
    "nan_off_grid": Fault(
        nan_off_grid,
        (0.5, 0.3, 0.2, 0.1, 0.01),
        "NaN for pixels further than the severity from whole grey levels",
        (0.5,),
    ),
    "decoy_gradient": Fault(
        decoy_gradient, (0.0, 1.0), "1: labels in the place of logits, and a gradient that leads nowhere near", (0.0,)
    ),
    "batch1_raises": Fault(batch1_raises, (0.0, 1.0), "1: an error for an image alone", (0.0,)),
    "remembers": Fault(remembers, (0.0, 0.21), "images this near to one seen before get its answer", (0.0,)),
    "honest_alone": Fault(
        honest_alone, (math.inf, 32.0, 1.0), "the honest answer in batches of up to this size", (math.inf,)
    ),
    "honest_at_first": Fault(
        honest_at_first, (math.inf, 300.0, 100.0, 10.0), "the honest answer in that many calls", (math.inf,)
    ),
    "gradient_mode": Fault(
        gradient_mode, (0.0, 1.0, 2.0), "another answer with (1) or without (2) recorded gradients", (0.0,)
    ),
    "plateau": Fault(plateau, (0.0, 0.1, 1.0), "one-hot logits plus a linear decoy of that size", (0.0,)),
    "off_grid": Fault(off_grid, (0.0, 1.0), "1: another answer to images that are not 8-bit", (0.0,)),
    "wrong_shape": Fault(wrong_shape, (0.0, 1.0, 2.0), "1: (N, K, 1); 2: (K, N)", (0.0,)),
}
