"""How a model is asked: every pass counted, float32 that is float32, a randomised model more than once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from .data import Data
from .errors import UserError
from .outputs import Model, Outputs, as_outputs, out_of_memory

EOT_SAMPLES, VOTES = 8, 32  # answers of a randomised model: averaged for an attack's step, counted for a verdict
SAME = 1e-3  # two answers are the same if they differ by less than this share of the logits' spread


class CountingModel:
    """A model that counts, without reading the device: samples forward, gradients back, logits that are no numbers.

    ``into``: another one that keeps the counts; ``channels_last``: images are handed over in that memory order, which
    convolutions on a CPU like better. Raises UserError, with the model's own words, where it cannot answer.
    """

    def __init__(self, model: Model, into: CountingModel | None = None, channels_last: bool = False) -> None:
        self.model, self.counts, self.channels_last = model, into or self, channels_last
        self.forwards, self.backwards = 0, 0
        self.nonfinite: Tensor | int = 0

    def __call__(self, x: Tensor) -> Outputs:
        self.counts.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)  # a node of the graph: its gradient is seen once, however many outputs lead to it
            x.register_hook(self._returned)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        try:
            out = as_outputs(self.model(x))
        except Exception as error:
            if isinstance(error, UserError) or out_of_memory(error):
                raise
            shape = tuple(x.shape)
            raise UserError(
                f"the model cannot answer a batch of shape {shape} on {x.device}: {type(error).__name__}: {error} "
                "An evaluation asks for batches of any size from 1 up, on one device."
            ) from error
        if len(out.logits) != len(x) or out.logits.device != x.device:
            got = f"logits of shape {tuple(out.logits.shape)} on {out.logits.device}"
            raise UserError(f"the model answers a batch of shape {tuple(x.shape)} on {x.device} with {got}.")
        self.counts.nonfinite = self.counts.nonfinite + (~out.logits.detach().isfinite().all(1)).sum()
        return out

    def _returned(self, grad: Tensor) -> None:
        self.counts.backwards += len(grad)


class EOTModel:
    """The mean of several answers: what an attack climbs on a randomised model (expectation over transformation)."""

    def __init__(self, model: CountingModel, answers: int) -> None:
        self.model, self.answers = model, answers

    def __call__(self, x: Tensor) -> Outputs:
        total = self.model(x).logits
        for _ in range(self.answers - 1):
            total = total + self.model(x).logits
        return Outputs(total / self.answers)


def majority_vote(model: CountingModel, x: Tensor, votes: int) -> tuple[Tensor, Tensor]:
    """(mean logits (N, K), votes for each class (N, K)) of ``votes`` answers; one answer is its own mean and vote.

    An answer with a logit that is no number votes for nobody.
    """
    total, count = _vote(model, x)
    for _ in range(votes - 1):
        z, one = _vote(model, x)
        total, count = total + z, count + one
    return total / votes, count


def _vote(model: CountingModel, x: Tensor) -> tuple[Tensor, Tensor]:
    z = model(x).logits
    return z, torch.zeros_like(z).scatter(1, z.argmax(1, keepdim=True), 1.0) * z.isfinite().all(1, keepdim=True)


def is_misclassified(votes: Tensor, y: Tensor, asked: int) -> Tensor:
    """(N,) bool: most of the ``asked`` answers are wrong. votes: (N, K), as ``majority`` counts them."""
    return votes.sum(1) - votes.gather(1, y[:, None])[:, 0] > asked / 2


def logits_differ(a: Tensor, b: Tensor) -> Tensor:
    """(N,) bool: whether two answers to the same image differ by more than rounding; NaN counts as moved."""
    spread = (a.amax(1) - a.amin(1)).clamp_min(torch.finfo(a.dtype).tiny)
    return ~((a - b).abs().amax(1) <= SAME * spread)


def prefers_channels_last(model: CountingModel, x: Tensor, logits: Tensor) -> bool:
    """Whether the model's convolutions may be fed in channels_last order: on a CPU, and where its answers stay."""
    modules = model.model.modules() if isinstance(model.model, nn.Module) else iter(())
    wide = x.ndim == 4 and x.shape[1] > 1 and x.device.type == "cpu"
    if not wide or not any(isinstance(module, nn.Conv2d) for module in modules):
        return False
    try:
        again = CountingModel(model.model, model, channels_last=True)(x).logits
    except UserError:  # a view that asks for the plain order
        return False
    return not bool(logits_differ(logits, again).any())


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 that is float32: TF32 off on CUDA, no autocast; restored afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def device_of(model: Model, data: Data) -> torch.device:
    """Where the model's parameters and buffers are; the data's own device for a model without any."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    return next(tensors, data.x).device


def default_batch_size(x: Tensor) -> int:
    """A batch size for these images: on a CPU as many as its caches like, at least 64; elsewhere 512."""
    if x.device.type != "cpu":
        return 512
    return max(64, min(512, 200_000 // max(1, x[0].numel())))
