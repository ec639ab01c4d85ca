"""Models that make attacks fail or measurements lie: each wraps an honest classifier and takes a dose.

``LIARS[name].make(honest, dose)`` is a model again. Features and distances pass through where the classifier has them,
and but for those whose point it is, the same images get the same answer. What a liar keeps is in its ``answer``, so a
copy of it in float64 (``copy.deepcopy(liar).double()``) tells the same lie in float64.

To add one: a factory and a line in ``LIARS``, whose doses run from harmless to total.
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

Answer = Callable[[nn.Module, Tensor], Any]  # (honest, x) -> what the liar returns
FREQUENCY = 1e3  # of the shattered logits: radians for each unit of summed pixels


@dataclass(frozen=True)
class Liar:
    """make: (honest, dose) -> model; doses: from harmless to total; about: what it does and what the dose is;
    harmless: the doses at which it is the honest model, so that nothing may fire."""

    make: Callable[[nn.Module, float], nn.Module]
    doses: tuple[float, ...]
    about: str
    harmless: tuple[float, ...]


class Lie(nn.Module):
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


def logit_scale(honest: nn.Module, dose: float) -> nn.Module:
    """logits * dose."""
    return Lie(honest, _on_logits(lambda z: z * dose))


def temperature(honest: nn.Module, dose: float) -> nn.Module:
    """log softmax(z / T), computed as written, plus logsumexp(z / T): z / T, as long as no probability saturates."""

    def change(z: Tensor) -> Tensor:
        z = z / dose
        p = torch.softmax(z, 1)
        return p.clamp_min(torch.finfo(z.dtype).tiny).log() + z.logsumexp(1, keepdim=True)

    return Lie(honest, _on_logits(change))


def softmax_output(honest: nn.Module, dose: float) -> nn.Module:
    """Probabilities instead of logits."""
    return Lie(honest, _on_logits(lambda z: torch.softmax(z, 1) if dose else z))


def half_logits(honest: nn.Module, dose: float) -> nn.Module:
    """logits * dose through float16: gradients below 6e-8 vanish, logits beyond 65,504 are infinite."""
    return Lie(honest, _on_logits(lambda z: (z * dose).half().to(z.dtype) if dose else z))


class HalfNetwork(nn.Module):
    """The network with weights and activations of another type. A copy cast to float64 computes in float64."""

    def __init__(self, honest: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.honest = copy.deepcopy(honest).to(dtype)

    def forward(self, x: Tensor) -> Outputs:
        out = as_outputs(self.honest(x.to(next(self.honest.parameters()).dtype)))
        return Outputs(*(None if tensor is None else tensor.to(x.dtype) for tensor in out))


def half_network(honest: nn.Module, dose: float) -> nn.Module:
    """0: float32; 1: float16; 2: bfloat16."""
    return HalfNetwork(honest, (torch.float32, torch.float16, torch.bfloat16)[int(dose)])


def shattered(honest: nn.Module, dose: float) -> nn.Module:
    """A sinusoid of amplitude ``dose`` on each logit, of a phase that runs fast in a direction of its own."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        out = as_outputs(honest(x))
        if not dose:
            return out
        chance = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (out.logits.shape[1], *x.shape[1:]), generator=chance).to(x) * 2 - 1
        phase = FREQUENCY * (x[:, None] * signs).flatten(2).sum(2)  # a sum, not a product: the same for every batch
        return out._replace(logits=out.logits + dose * phase.sin())

    return Lie(honest, answer)


# --- pixels


def quantised_input(honest: nn.Module, dose: float) -> nn.Module:
    """Pixels rounded to ``dose`` levels, with the gradient that rounding has: none. 0: not rounded."""
    return Lie(honest, _on_pixels(lambda x: (x * (dose - 1)).round() / (dose - 1) if dose else x))


def noise(honest: nn.Module, dose: float) -> nn.Module:
    """Fresh Gaussian noise of deviation ``dose`` on every forward pass, from torch's own generator."""
    return Lie(honest, _on_pixels(lambda x: x + dose * torch.randn_like(x) if dose else x))


def detached_graph(honest: nn.Module, dose: float) -> nn.Module:
    """A share of the pixels is cut from the graph; at 1 the logits have no graph at all."""

    def change(x: Tensor) -> Tensor:
        return x.detach() if dose == 1 else torch.where(_share(x.shape[1:], dose, x), x.detach(), x)

    return Lie(honest, _on_pixels(change))


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


def gradient_flip(honest: nn.Module, dose: float) -> nn.Module:
    """The gradient is negated on a share of the pixels; at 1 every ascent descends."""
    return Lie(honest, _on_pixels(lambda x: _Turned.apply(x, _share(x.shape[1:], dose, x))))


def out_of_range_guard(honest: nn.Module, dose: float) -> nn.Module:
    """Pixels clamped to [dose, 1 - dose]: black and white have no gradient, and steps up to ``dose`` do nothing."""
    return Lie(honest, _on_pixels(lambda x: x.clamp(dose, 1 - dose)))


def train_batch_norm(honest: nn.Module, dose: float) -> nn.Module:
    """Pixels normalised by statistics of the batch, mixed with those that a holdfast Classifier keeps; both as (C,).

    x <- (x - mean) / std * std_0 + mean_0, where mean and std go from the kept ones (dose 0) to the batch's (dose 1).
    """

    def answer(honest: Any, x: Tensor) -> Outputs:
        if not dose:
            return as_outputs(honest(x))
        mean_0, std_0 = honest.mean, honest.std
        mean, std = x.mean((0, 2, 3)).view_as(mean_0), x.std((0, 2, 3), correction=0).view_as(std_0)
        mean, std = torch.lerp(mean_0, mean, dose), torch.lerp(std_0, std, dose).clamp_min(1e-3)
        return as_outputs(honest((x - mean) / std * std_0 + mean_0))

    return Lie(honest, answer)


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
        raise ValueError("this liar replaces ReLU modules, and the network has none.")
    for module, name in found:
        setattr(module, name, make())
    return network


def kwta(honest: nn.Module, dose: float) -> nn.Module:
    """Every ReLU becomes k-winners-take-all with this share kept."""
    return _with_activations(honest, partial(Winners, dose))


def dropout(honest: nn.Module, dose: float) -> nn.Module:
    """Every ReLU is followed by dropout of probability ``dose``, in eval mode too."""
    return _with_activations(honest, partial(LastingDropout, dose))


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


def nan_midway(honest: nn.Module, dose: float) -> nn.Module:
    """NaN logits from call number ``dose`` on, counted from 0; infinity: never."""

    def answer(honest: nn.Module, x: Tensor, calls: int) -> Outputs:
        out = as_outputs(honest(x))
        return out if calls < dose else out._replace(logits=out.logits * math.nan)

    return Lie(honest, lambda honest, x: as_outputs(honest(x))) if dose == math.inf else Counting(honest, answer)


def keeps_state(honest: nn.Module, dose: float) -> nn.Module:
    """Logits that drift by ``dose`` a call towards the last classes and away from the first."""

    def answer(honest: nn.Module, x: Tensor, calls: int) -> Outputs:
        out = as_outputs(honest(x))
        towards = torch.linspace(-1, 1, out.logits.shape[1]).to(out.logits)
        return out._replace(logits=out.logits + dose * calls * towards)

    return Counting(honest, answer) if dose else Lie(honest, lambda honest, x: as_outputs(honest(x)))


def nan_off_grid(honest: nn.Module, dose: float) -> nn.Module:
    """NaN where a sample's pixels lie further than ``dose`` grey levels from whole ones, in the mean."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        out = as_outputs(honest(x))
        grey = x.detach() * 255
        off = (grey - grey.round()).abs().flatten(1).mean(1, keepdim=True) > dose
        return out._replace(logits=out.logits.masked_fill(off, math.nan))

    return Lie(honest, answer)


def batch1_raises(honest: nn.Module, dose: float) -> nn.Module:
    """An image alone is an error, as with a stray ``squeeze()``."""

    def answer(honest: nn.Module, x: Tensor) -> Outputs:
        if dose and len(x) == 1:
            raise RuntimeError("expected a batch of 2 or more.")
        return as_outputs(honest(x))

    return Lie(honest, answer)


def wrong_shape(honest: nn.Module, dose: float) -> nn.Module:
    """1: logits of shape (N, K, 1); 2: of shape (K, N)."""

    def answer(honest: nn.Module, x: Tensor) -> Any:
        out = as_outputs(honest(x))
        return (out, out.logits[:, :, None], out.logits.T)[int(dose)]

    return Lie(honest, answer)


LIARS: dict[str, Liar] = {
    "logit_scale": Liar(
        logit_scale,
        (1.0, 1e-2, 1e-4, 1e2, 1e4, 1e6),
        "logits times the dose: above 1 cross-entropy has no gradient, below 1 no score of all logits has a favourite",
        (1.0,),
    ),
    "temperature": Liar(
        temperature,
        (1.0, 1e1, 1e2, 1e3, 1e-1, 1e-2, 1e-3),
        "logits over the dose through a softmax and its logarithm: below 1 gradients are what rounding leaves",
        (1.0,),
    ),
    "softmax_output": Liar(softmax_output, (0.0, 1.0), "1: probabilities in the place of logits", (0.0,)),
    "half_logits": Liar(
        half_logits, (0.0, 1.0, 10.0, 100.0, 1000.0), "logits times the dose through float16; 0: not at all", (0.0,)
    ),
    "half_network": Liar(
        half_network, (0.0, 1.0, 2.0), "weights and activations in float16 (1) or bfloat16 (2)", (0.0,)
    ),
    "shattered": Liar(
        shattered, (0.0, 1e-4, 1e-3, 1e-2, 1e-1), "a fast sinusoid on the logits, the dose its amplitude", (0.0,)
    ),
    "quantised_input": Liar(
        quantised_input,
        (0.0, 256.0, 64.0, 16.0, 8.0, 4.0, 2.0),
        "pixels rounded to that many levels; 0: not rounded",
        (0.0,),
    ),
    "noise": Liar(
        noise, (0.0, 0.001, 0.01, 0.05, 0.2), "Gaussian noise on the pixels at every call, the dose its sigma", (0.0,)
    ),
    "detached_graph": Liar(
        detached_graph, (0.0, 0.25, 0.5, 0.75, 0.9, 1.0), "no gradient through that share of the pixels", (0.0,)
    ),
    "gradient_flip": Liar(
        gradient_flip, (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), "a negated gradient on that share of the pixels", (0.0,)
    ),
    "out_of_range_guard": Liar(
        out_of_range_guard, (0.0, 0.05, 0.1, 0.2, 0.3, 0.4), "pixels clamped to the box, less the dose", (0.0,)
    ),
    "train_batch_norm": Liar(
        train_batch_norm,
        (0.0, 0.01, 0.1, 0.5, 1.0),
        "pixels normalised by the batch, the dose its share in the statistics",
        (0.0,),
    ),
    "kwta": Liar(
        kwta,
        (1.0, 0.5, 0.3, 0.2, 0.1, 0.05),
        "k winners take all in the place of ReLU, the dose the share that wins",
        (1.0,),
    ),
    "dropout": Liar(dropout, (0.0, 0.01, 0.05, 0.1, 0.3, 0.5), "dropout of that probability in eval mode too", (0.0,)),
    "nan_midway": Liar(
        nan_midway, (math.inf, 300.0, 100.0, 30.0, 10.0, 3.0, 0.0), "NaN from that call on", (math.inf,)
    ),
    "keeps_state": Liar(keeps_state, (0.0, 1e-6, 1e-4, 1e-2, 1e-1), "logits that drift by the dose a call", (0.0,)),
    "nan_off_grid": Liar(
        nan_off_grid,
        (0.5, 0.3, 0.2, 0.1, 0.01),
        "NaN for pixels further than the dose from whole grey levels",
        (0.5,),
    ),
    "batch1_raises": Liar(batch1_raises, (0.0, 1.0), "1: an error for an image alone", (0.0,)),
    "wrong_shape": Liar(wrong_shape, (0.0, 1.0, 2.0), "1: (N, K, 1); 2: (K, N)", (0.0,)),
}
