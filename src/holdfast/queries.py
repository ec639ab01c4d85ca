"""Querying a model: every pass is counted, float32 is exact, and a randomised model is queried more than once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .data import Data
from .errors import UserError, type_of
from .losses import negative_margin
from .outputs import Model, Outputs, Queried, out_of_memory
from .threat import Threat

EOT_SAMPLES = 8  # outputs of a randomised model that an attack's step averages
VOTES = 32  # outputs of a randomised model that a majority vote counts
LOGIT_TOLERANCE = 1e-3  # two outputs agree if they differ by less than this fraction of the logits' range

OFF_DATA_TOLERANCE = 0.02  # the same at points of a threat

T = TypeVar("T")


class CountingModel(Queried):
    """A model that counts its forward and backward passes in samples, without waiting for the device.

    It is never queried about zero images: the output for an empty batch has the shapes of that for a blank image.

    Args:
        model: images to logits or Outputs.
        counter: another CountingModel that keeps the counts.
        channels_last: pass images in that memory format, which is faster for convolutions on a CPU.
        occurring: the labels that occur in the data, (M,). Where the first answer has logits of -inf at classes that
            never occur, these count as classes that are ruled out: in all answers they become finite, below all others.

    Attributes:
        forwards: samples that went forward.
        backwards: samples that a gradient was computed for.
        nonfinite: outputs with a NaN or infinite logit.

    Raises:
        UserError: the model cannot be called; when it is called and fails, with the model's own message.
    """

    def __init__(
        self,
        model: Model,
        counter: CountingModel | None = None,
        channels_last: bool = False,
        occurring: Tensor | None = None,
    ) -> None:
        if not callable(model) or isinstance(model, type):
            raise UserError(
                f"the model must be a torch module or a function from images to logits, got {type_of(model)}."
            )
        super().__init__(model)
        self.counter, self.channels_last = counter or self, channels_last
        self.has_answered = self.counter.has_answered and self.counter.model is model
        self.occurring: Tensor | None = occurring if counter is None else counter.occurring
        self.ruled_out: Tensor | None = None
        self.is_first = self.counter is self
        self.forwards, self.backwards = 0, 0
        self.nonfinite: Tensor | int = 0

    def __call__(self, x: Tensor) -> Outputs:
        if len(x) == 0:
            return self._empty(x)
        self.counter.forwards += len(x)
        x = x.clone()  # the model's own copy, and a new graph node: its gradient arrives once, whatever depends on it
        if x.requires_grad:
            x.register_hook(self._count_backward)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        try:
            out = self.query(x)
        except Exception as error:
            if isinstance(error, UserError) or out_of_memory(error):
                raise
            if "more than 1 value per channel" in str(error):
                raise UserError(
                    "the network's batch norm has no running statistics, so its answer to an image depends on the rest "
                    "of the batch, and one image alone has none. Train it with track_running_stats=True."
                ) from error
            raise UserError(
                f"the model cannot answer a batch of shape {tuple(x.shape)} on {x.device}: {type(error).__name__}: "
                f"{error} An evaluation asks for batches of any size from 1 up, on one device."
            ) from error
        out = self.counter._finite_where_ruled_out(out)
        self.counter.nonfinite = self.counter.nonfinite + (~out.logits.detach().isfinite().all(1)).sum()
        return out

    def _finite_where_ruled_out(self, out: Outputs) -> Outputs:
        """Logits of -inf at classes that no sample has, as finite ones below all others of their sample."""
        z = out.logits
        if self.is_first and self.occurring is not None:  # one look at values, which waits for the device
            never = torch.ones(z.shape[1], dtype=torch.bool, device=z.device)
            never[self.occurring[(self.occurring >= 0) & (self.occurring < z.shape[1])].to(z.device)] = False
            self.ruled_out = never if bool((z[:, never] == -torch.inf).any()) else None
        self.is_first = False
        if self.ruled_out is None:
            return out
        hidden = self.ruled_out & (z == -torch.inf)
        low, high = z.detach().masked_fill(hidden, torch.inf).amin(1, True), z.detach().amax(1, True)
        below = torch.nextafter(2 * low - high, torch.full_like(low, -torch.inf))
        return out._replace(logits=torch.where(hidden, below, z))

    def _empty(self, x: Tensor) -> Outputs:
        """Outputs for no images. A network that flattens its batch, as by ``view(len(x), -1)``, has none of its own."""
        with torch.no_grad():
            out = self.query(x.new_zeros(1, *x.shape[1:]))
        features, distances = (None if part is None else part[:0] for part in out[1:])
        return Outputs(out.logits[:0], features, distances)

    def _count_backward(self, grad: Tensor) -> None:
        self.counter.backwards += len(grad)


class EOTModel(Queried):
    """The mean of several outputs of a randomised model, for attacks (expectation over transformation).

    Args:
        model: the randomised model; it copies the images.
        samples: number of outputs, >= 1.

    Source: Athalye et al. 2018.
    """

    def __init__(self, model: CountingModel, samples: int) -> None:
        super().__init__(model)
        self.samples = samples

    def __call__(self, x: Tensor) -> Outputs:
        total = self.model(x).logits
        for _ in range(self.samples - 1):
            total = total + self.model(x).logits
        return Outputs(total / self.samples)


def majority_vote(model: CountingModel, x: Tensor, votes: int) -> tuple[Tensor, Tensor]:
    """The mean logits of several outputs, and the number of outputs that predict each class.

    An output with a NaN or infinite logit votes for no class; where the labels that occur are not known, -inf is
    taken for a class that is ruled out.

    Args:
        model: a randomised model.
        x: (N, ...).
        votes: number of outputs, >= 1.

    Returns:
        (mean logits (N, K), votes for each class (N, K)).
    """
    total, count = _vote(model, x)
    for _ in range(votes - 1):
        z, one = _vote(model, x)
        total, count = total + z, count + one
    return total / votes, count


def _vote(model: CountingModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and their vote, both (N, K)."""
    z = model(x).logits
    valid = z.isfinite().all(1, True) if model.counter.occurring is not None else z.amax(1, True).isfinite()
    return z, torch.zeros_like(z).scatter(1, z.argmax(1, keepdim=True), 1.0) * valid


def is_misclassified(votes: Tensor, y: Tensor, n_votes: int) -> Tensor:
    """Whether most outputs are wrong.

    Args:
        votes: (N, K), as ``majority_vote`` counts them.
        y: (N,) labels.
        n_votes: number of outputs.

    Returns:
        (N,) bool. Outputs that voted for no class count as correct.
    """
    return votes.sum(1) - votes.gather(1, y[:, None])[:, 0] > n_votes / 2


class Judgement(NamedTuple):
    """What a fresh query says of candidates; a column each, (N,).

    Attributes:
        broken: bool, inside the threat and misclassified.
        inside: bool, inside the threat.
        finite: bool, no logit is NaN or infinite.
        margin: of the logits, or of their mean over the votes.
        prediction: int64, the class predicted, or predicted most often.
    """

    broken: Tensor
    inside: Tensor
    finite: Tensor
    margin: Tensor
    prediction: Tensor


def judge_candidates(
    model: CountingModel, x_adv: Tensor, x: Tensor, y: Tensor, threat: Threat, votes: int = 1
) -> Judgement:
    """Query the model at candidates, which no attack judges itself.

    Args:
        model: what is attacked.
        x_adv: (N, ...), the candidates.
        x: (N, ...), their clean images.
        y: (N,) labels.
        threat: where the candidates must lie.
        votes: number of outputs whose majority decides.

    Returns:
        The Judgement. Candidates with a NaN or infinite logit are not misclassified.
    """
    with torch.no_grad():
        logits, counts = majority_vote(model, x_adv, votes)
    inside = threat.violation(x_adv, x) == 0
    return Judgement(
        broken=is_misclassified(counts, y, votes) & inside,
        inside=inside,
        finite=logits.isfinite().all(1),
        margin=-negative_margin(logits, y),
        prediction=counts.argmax(1),
    )


def logits_differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether two outputs for the same images differ by more than rounding: (N, K), (N, K) -> (N,) bool.

    NaN counts as a difference.
    """
    logit_range = (a.amax(1) - a.amin(1)).clamp_min(torch.finfo(a.dtype).tiny)
    return ~((a - b).abs().amax(1) <= LOGIT_TOLERANCE * logit_range)


def differs_off_data(a: Tensor, b: Tensor) -> Tensor:
    """Whether two outputs for the same points of a threat differ by more than rounding: (N, K), (N, K) -> (N,) bool.

    Off the data, rounding that flips one activation of a quantised or sparse network moves its logits a little, so the
    tolerance is wider than that of ``logits_differ``. Outputs that are not finite are not compared.
    """
    finite = a.isfinite().all(1) & b.isfinite().all(1)
    logit_range = torch.maximum(a.amax(1) - a.amin(1), b.amax(1) - b.amin(1))
    return finite & ((a - b).abs().amax(1) > OFF_DATA_TOLERANCE * logit_range)


def margin_moved(logits: Tensor, y: Tensor, before: Tensor, tolerance: float = LOGIT_TOLERANCE) -> Tensor:
    """(N,) bool: whether the margins of these logits are others than they were, beyond rounding.

    Args:
        logits: (N, K).
        y: (N,) labels.
        before: (N,) margins, stored earlier.
        tolerance: fraction of the logits' range.
    """
    margin, before = -negative_margin(logits, y), before.to(logits)
    spread = (logits.amax(1) - logits.amin(1)).clamp_min(torch.finfo(logits.dtype).tiny)
    same = (margin == before) | (margin.isnan() & before.isnan())  # infinite ones too
    return ~(same | ((margin - before).abs() <= tolerance * spread))


def prefers_channels_last(model: CountingModel, x: Tensor, logits: Tensor) -> bool:
    """Whether to pass images in channels_last format: for convolutions on a CPU, if the logits stay the same."""
    modules = model.model.modules() if isinstance(model.model, nn.Module) else iter(())
    multichannel = x.ndim == 4 and x.shape[1] > 1 and x.device.type == "cpu"
    if not multichannel or not any(isinstance(module, nn.Conv2d) for module in modules):
        return False
    try:
        channels_last = CountingModel(model.model, model, channels_last=True)(x).logits
    except UserError:  # e.g. a view that needs the contiguous format
        return False
    return not bool(logits_differ(logits, channels_last).any())


@contextmanager
def exact_float32() -> Iterator[None]:
    """Exact float32: TF32 off on CUDA, no autocast; both are restored afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def copied(model: Model) -> nn.Module | None:
    """A deep copy of a module; None for a function, whose state is out of reach, and where copying fails."""
    if not isinstance(model, nn.Module):
        return None
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a lock, an open session, a tensor with a graph: the module's own error
        if out_of_memory(error):
            raise
        return None


def device_of(model: Model, data: Data) -> torch.device:
    """The device of the model's parameters and buffers; the data's device for a model without any."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    return next(tensors, data.x).device


def default_batch_size(x: Tensor) -> int:
    """A batch size for these images: on a CPU 16 to 512, by the image size, to fit its caches; elsewhere 512.

    16 photographs of 224 x 224 take half the memory of 64, and no more time (benchmarks/bench_batch.py).
    """
    if x.device.type != "cpu":
        return 512
    return max(16, min(512, 200_000 // max(1, x[0].numel())))


def unlimited() -> float:
    """The limit of work that always has to be finished."""
    return math.inf


class Batches:
    """A batch size that is halved, for good, whenever memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def map(self, rows: Tensor, work: Callable[[Tensor], T], limit: Callable[[], float] = unlimited) -> list[T]:
        """work(batch) for each batch of rows, in order.

        Args:
            rows: (M,) int64.
            work: called with one batch of rows at a time; repeated with half the rows where it runs out of memory.
            limit: asked before each batch how many more samples may be processed; below 1, the rest is left out.

        Returns:
            One result per batch.

        Raises:
            UserError: if memory runs out on a single image.
        """
        results = []
        while len(rows):
            size = int(min(self.size, limit(), len(rows)))
            if size < 1:
                break
            try:
                results.append(work(rows[:size]))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(f"memory ran out on a single image: {error}") from error
                self.size = max(1, size // 2)
                if rows.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            rows = rows[size:]
        return results

    def cat(self, work: Callable[..., Tensor], *columns: Tensor) -> Tensor:
        """work(columns), computed a batch of rows at a time and catenated.

        Args:
            work: columns to a tensor with one row per sample, whatever the other samples of its batch are.
            columns: (N, ...) each, at least one.

        >>> Batches(2).cat(lambda x, y: x + y, torch.arange(3), torch.ones(3, dtype=torch.int64)).tolist()
        [1, 2, 3]
        """
        if len(columns[0]) == 0:
            return work(*columns)
        rows = torch.arange(len(columns[0]), device=columns[0].device)
        return torch.cat(self.map(rows, lambda some: work(*(column[some] for column in columns))))
