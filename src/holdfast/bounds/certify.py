"""Certificates: which samples are proved robust, by which method, and how large their margins are at least."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data, pixels
from ..errors import UserError, type_of, unknown
from ..outputs import Model, Queried, check_samples, frozen_eval
from ..progress import Progress, as_progress
from ..queries import Batches, copied
from ..results import ProofCost, total_proofs
from ..threat import Threat, as_threat
from ..user_input import typed
from .cache import ProofCache, Reading
from .chain import in_float64
from .graph import CannotBound, Graph, read
from .ladder import METHODS, ROWS, Asked, Certified, Work, certify_rows
from .regions import Allowed, check_allowed
from .steps import bind


@typed
def certify(
    model: Model,
    data: Data,
    threat: Threat | str | tuple[Tensor, Tensor],
    *,
    method: str = "alpha",
    seconds: float = math.inf,
    batch_size: int = ROWS,
    cache: ProofCache | None = None,
    progress: Progress | None = None,
) -> Certified:
    """Prove of each sample that no x_adv of the threat has another argmax than y.

    The network is read as a graph of primitive operators (``graph.read``), and bounded in float64 on its float32
    weights. What float32 rounding can do in each operator counts as bounded noise, and so does all that
    ``Threat.violation`` forgives: a proof speaks of the numbers that a computer gets, if it sums at float32 precision,
    in any order (no TF32, no FFT or Winograd kernels).

    Args:
        model: an nn.Module, images to logits or Outputs. It is evaluated in eval mode, without gradients.
        data: float images in the threat's box, or uint8; labels.
        threat: of any norm, or its text, such as "linf:8/255". Or a box of its own for each image, (lo, hi): float32
            tensors of the images' shape, lo <= x <= hi. All of the box counts, whatever pixels are valid elsewhere, and
            no pixel beyond it.
        method: the last one that is tried on what is left by those before it.
            Each starts from the boxes of the one before it.
            "interval": boxes, the last layers merged; and products of Lipschitz constants where the network is a chain.
            "linear": lines over these boxes, from the logits to the image (CROWN on the last layer).
            "crown": lines for the inputs of every non-affine operator too.
            "alpha": slopes of ReLUs optimised, also for every inner neuron that crown leaves undecided. Where the time
                ends first, the rest keeps crown's lines, and ``ended`` says so.
            "branch": branch and bound on the signs of ReLUs. It ends with a proof, an adversarial example, or the time.
        seconds: wall-clock time for all samples. Branch and bound shares it out evenly among those that are left; where
            it is to follow, the bounds before it take half of the time at most.
        batch_size: images that are bounded at a time, at most; fewer where the network is wide.
        cache: what earlier calls about the same network computed: the same cache for all calls with weaker and stronger
            methods spares repeating it.
        progress: is called with (what, done, total).

    Returns:
        The columns of ``Certified``.

    Raises:
        CannotBound: the network cannot be read, an operator has no rule, or the network's answers are not those of its
            graph (it answers by batch, by history or at random).
        UserError: images outside the threat's box, or a box without its image; a label without a logit; an unknown
            method.

    Source: Gowal et al. 2019 (interval); Zhang et al. 2018, Xu et al. 2021 (lines); Wang et al. 2021 (branch).

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # right while x > 0
    >>> x = torch.tensor([0.05, 0.25]).view(2, 1, 1, 1)
    >>> found = certify(net, Data(x, torch.tensor([0, 0]), torch.arange(2)), Threat("linf", 0.1, -1, 1))
    >>> found.proved.tolist(), found.by, [round(bound, 3) for bound in found.bound.tolist()]
    ([False, True], ('', 'interval'), [-0.1, 0.3])
    """
    allowed: Allowed = threat if isinstance(threat, tuple) else as_threat(threat)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    x, y = pixels(data.x), data.y
    _check(x, y, allowed)
    if not isinstance(model, nn.Module):
        raise CannotBound("bounds need a torch module, and the model is a function.")
    began = time.monotonic()
    until = began + seconds
    with frozen_eval(model), torch.no_grad():
        known, images, labels, allowed = _read(model, x, y, allowed, cache or ProofCache())
        if len(y) and int(y.max()) >= known.graph.classes:
            raise UserError(
                f"labels must be 0 .. K-1: the network returns {known.graph.classes} logits, a label is {y.max()}."
            )
        asked = Asked(known.network)
        work = Work(
            known.network, asked, known.graph, known.steps, images, labels, data.index.cpu(), allowed,
            METHODS.index(method), cache,
        )  # fmt: skip
        report = as_progress(progress)
        reading = ProofCost("interval", 0, 0, time.monotonic() - began)

        def certified(rows: Tensor) -> Certified:
            left = (until - time.monotonic()) * len(rows) / (len(y) - int(rows[0]))
            return certify_rows(work, rows, time.monotonic() + left, report)

        parts = Batches(min(work.rows, batch_size)).map(torch.arange(len(y)), certified)
    return replace(_joined(parts, reading), forwards=asked.forwards)


def _read(
    model: nn.Module, x: Tensor, y: Tensor, allowed: Allowed, cache: ProofCache
) -> tuple[Reading, Tensor, Tensor, Allowed]:
    """The network as the cache holds it or read now; and the samples, on a device that has float64."""
    network, images, labels = in_float64(model, x, y)
    if not isinstance(allowed, Threat):
        allowed = allowed[0].to(images.device), allowed[1].to(images.device)
    shape = tuple(images.shape[1:])
    known = cache.read(model, shape, images.device)
    if known is None:
        graph = read_network(network, shape, images.device)
        known = cache.reading = Reading(model, network, shape, graph, bind(graph, torch.float64))
    return known, images, labels, allowed


def _joined(parts: list[Certified], reading: ProofCost) -> Certified:
    """The columns of all batches."""
    x_adv = {number: image for part in parts for number, image in part.x_adv.items()}
    columns: dict[str, Any] = {
        name: torch.cat([torch.zeros(0, dtype=dtype), *(getattr(part, name) for part in parts)])
        for name, dtype in (
            ("proved", torch.bool), ("bound", torch.float64), ("seconds", torch.float64), ("ended", torch.bool),
        )
    }  # fmt: skip
    by = tuple(by for part in parts for by in part.by)
    costs = total_proofs([reading, *(cost for part in parts for cost in part.costs)])
    return Certified(by=by, x_adv=x_adv, costs=costs, **columns)


@typed
def cheaply_proved(model: Model, x: Tensor, y: Tensor, threat: Threat | str) -> Tensor | None:
    """Which samples the cheap methods prove, interval, Lipschitz and linear: (N,) bool; None if no bound is known.

    Args:
        model: as for ``certify``.
        x: (N, C, H, W) float32 images.
        y: (N,) int64 labels.
        threat: of any norm, or its text.

    Raises:
        UserError: images outside the threat's box, or not float; a label without a logit.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # right while x > 0
    >>> x, y = torch.tensor([0.05, 0.25]).view(2, 1, 1, 1), torch.tensor([0, 0])
    >>> cheaply_proved(net, x, y, Threat("linf", 0.1, -1, 1))
    tensor([False,  True])
    """
    threat = as_threat(threat)
    _check(x, y, threat)
    if not isinstance(model, nn.Module) or x.dtype != torch.float32:
        return None
    try:
        found = certify(model, Data(x, y.long(), torch.arange(len(y))), threat, method="linear")
    except CannotBound:
        return None
    return found.proved.to(x.device)


@typed
def worst_logit_difference(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Bound max_{j != y} logit_j - logit_y over the threat by the cheapest methods. Below zero it is a proof.

    Args:
        model: as for ``certify``.
        x: (N, C, H, W) float32 images.
        y: (N,) int64 labels.
        threat: of any norm.

    Returns:
        (N,) float64 upper bounds, infinite where there is none: -1 times the ``bound`` of ``certify`` by "interval".

    Raises:
        CannotBound: as ``certify`` does.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # logit_1 - logit_0 = -2 x
    >>> bound = worst_logit_difference(net, torch.tensor([[[[0.3]]]]), torch.tensor([0]), Threat("linf", 0.1))
    >>> print(f"{bound.item():.4f}")
    -0.4000
    """
    check_samples(x, y)
    return -certify(model, Data(x, y, torch.arange(len(y))), threat, method="interval").bound


@typed
def why_not(model: Model, shape: tuple[int, ...]) -> str:
    """Why no bound is known for a model, in one sentence; "" where one is.

    Args:
        model: images to logits or Outputs.
        shape: (C, H, W) of an image.

    Returns:
        The sentence, or "".

    >>> why_not(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    ''
    >>> class Rounded(nn.Sequential):
    ...     def forward(self, x):
    ...         return super().forward(x.round())
    >>> why_not(Rounded(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    'no bound is known for the operator round.'
    """
    if not isinstance(model, nn.Module):
        return "bounds need a torch module, and the model is a function."
    try:
        with frozen_eval(model), torch.no_grad():
            device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
            bind(read_network(model, shape, device), torch.float64)
    except CannotBound as error:
        return str(error)
    return ""


def read_network(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Graph:
    """``graph.read``, of a network in float32."""
    if any(tensor.dtype != torch.float32 for tensor in model.parameters()):
        raise CannotBound("bounds know the rounding of float32, and the model has weights of another precision.")
    recorded = copied(model) or model  # code that keeps what it is shown keeps it in a copy
    return read(Queried(recorded), shape, device=device)


def _check(x: Tensor, y: Tensor, allowed: Allowed) -> None:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and y.shape == x.shape[:1]):
        raise UserError(f"certify expects tensors of images and of one label each, got {type_of(x)} and {type_of(y)}.")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or (len(y) and int(y.min()) < 0):
        raise UserError(f"labels must be integers >= 0, got {y.dtype}{f' from {y.min()}' if len(y) else ''}.")
    if not x.is_floating_point():
        raise UserError(f"certify expects float images in the threat's box, got {x.dtype}. Divide by 255 first.")
    check_allowed(x, allowed)
