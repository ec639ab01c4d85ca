"""Measure a bracket: attacks for the largest margin drop, bounds, and the exact answer where there is one."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..bounds import CannotBound, worst_logit_difference
from ..data import Data, pixels
from ..data.arguments import AnyData, as_data, check_logits, note_assumptions
from ..errors import UserError, at_least
from ..io import load_tensors, save_tensors, understood
from ..losses import negative_margin
from ..milp import layers_of, maximize
from ..noise import BracketStream, Noise
from ..outputs import Model, Outputs, frozen_eval, logits_of
from ..progress import Progress, as_progress
from ..queries import CountingModel, default_batch_size, device_of, exact_float32
from ..threat import Threat, as_threat, column
from ..user_input import typed
from .result import Bracket

CHECKPOINT, CHECKPOINT_VERSION = "bracket checkpoint", 1
STEPS = 50  # of each attack
RESTARTS = 10  # of the attack on the largest difference; each single difference is attacked from two starts


@typed
def bracket(
    model: Model,
    data: AnyData,
    threat: Threat | str,
    *,
    seconds: float = 10.0,
    seed: int = 0,
    trained_s: float | None = None,
    checkpoint: str | Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> Bracket:
    """Bracket the worst-case margin drop of each sample: attacks below, bounds above, the exact answer between.

    What is bracketed is the largest S = max_j d_j(x_adv) - max_j d_j(x), with d_j = logit_j - logit_y, and not the rise
    of each d_j: the margin is compared with S. s_att <= s* <= s_cert holds for every sample. A sample is robust iff
    margin > s*, broken by an attack iff margin <= s_att, and certified iff margin > s_cert.

        s_att:  PGD on each d_j, from x and from a random start, and on max_j d_j from ten random starts. Every point on
                the way counts, and attacks go on after a mistake: they look for the largest drop.
        s*:     ``milp.maximize`` from the attacks' points, under linf, for networks that ``layers_of`` can read.
        s_cert: ``bounds.worst_logit_difference``, on the smallest box that holds the threat (exact for linf, loose for
                l2 and l1), in float64, with slack for float32's rounding and for what ``Threat.violation`` forgives.

    Args:
        model: Images to logits or Outputs, deterministic.
        data: At least one sample: Data, (x, y), a DataLoader, a data set or its name.
        threat: Of any norm, or its text.
        seconds: The time limit per sample for the exact answer, >= 0; 0 for none. A sample that is not solved in time
            has s* in [s_low, s_high].
        seed: Seed of the attacks' random starts.
        trained_s: ``LossSpec.s``, kept in the result.
        checkpoint: A file that exact answers are saved to as they come, and resumed from.
        key: What the checkpoint belongs to.
        progress: Called with ("attacks" or "exact answers", samples done, samples).

    Returns:
        The Bracket, on the CPU.

    Raises:
        UserError: An empty set; pixels outside the threat's box; labels without a logit; logits that are not finite; a
            checkpoint with another key; an attack that exceeds a proof, because the model is not deterministic or a
            bound is wrong.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))               # margin 4 x - 1, which 4 eps takes away
    >>> _ = net[1].weight.data.copy_(torch.tensor([[2.0], [-2.0]])), net[1].bias.data.copy_(torch.tensor([-1.0, 0.0]))
    >>> data = Data(torch.tensor([0.5, 0.3]).view(2, 1, 1, 1), torch.tensor([0, 0]), torch.arange(2))
    >>> result = bracket(net, data, Threat("linf", 0.1))
    >>> columns = result.margin, result.s_att, result.s_star, result.s_cert
    >>> [[round(float(value), 3) for value in column] for column in columns]
    [[1.0, 0.2], [0.4, 0.4], [0.4, 0.4], [0.4, 0.4]]
    >>> result.status
    ('certified', 'attacked')
    """
    at_least("seconds", seconds)
    data, threat, progress = as_data(data), as_threat(threat), as_progress(progress)
    note_assumptions(data, unit_box=(threat.lo, threat.hi) == (0, 1))
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if not len(data):
        raise UserError("a bracket needs at least one sample.")
    data = data.to(device_of(model, data))
    x, y = pixels(data.x), data.y
    if not bool(((x >= threat.lo) & (x <= threat.hi)).all()):
        raise UserError(f"x must lie in the threat's box [{threat.lo}, {threat.hi}].")
    with exact_float32(), frozen_eval(model):
        attacked = _attack(CountingModel(model), x, data, threat, seed, progress)
        cert = _upper_bound(model, x, y, threat)
    margin, worst = -attacked.clean, attacked.worst
    low, high, solved = None, None, None
    layers = _layers_or_none(model) if seconds and threat.norm == "linf" else None
    if layers is not None:
        low, high, solved = _exact(layers, x, data, threat, attacked.x_adv, seconds, checkpoint, key, progress)
        _check_order(worst, high, data, "the exact answer")
        low = torch.maximum(low, worst)  # float32 and float64 measure the same point
        high = torch.maximum(high if cert is None else torch.minimum(high, cert), low)
    if cert is not None:
        _check_order(worst if low is None else low, cert, data, "the interval bound")
    low, high, cert = (None if bound is None else bound + margin for bound in (low, high, cert))
    return Bracket(
        threat, data.index.cpu(), y.cpu(), attacked.rival, margin, worst + margin, low, high, solved, cert, trained_s
    )


def _check_order(reached: Tensor, proved: Tensor, data: Data, what: str) -> None:
    """Raise UserError if a point exceeds what is proved for all points."""
    over = torch.nonzero(reached > proved)[:, 0]
    if len(over):
        i = int(over[0])
        raise UserError(
            f"sample {int(data.index[i])}: an attack reached a logit difference of {float(reached[i]):.6g}, but {what} "
            f"is at most {float(proved[i]):.6g}. Either the model is not deterministic or the bound is wrong."
        )


class _SmallestMargin:
    """A model that keeps, of all points it evaluated, the one with the smallest margin of each sample.

    Every call must hold all samples in order, as those of ``pgd`` with iterate="last" do. worst: (N,), -margin there.
    """

    def __init__(self, model: Model, x: Tensor, y: Tensor) -> None:
        self.model, self.y = model, y
        self.x_adv, self.worst = x.clone(), torch.full(y.shape, -math.inf, device=x.device)

    def __call__(self, x: Tensor) -> Outputs:
        out: Outputs = self.model(x)
        worst = negative_margin(out.logits.detach(), self.y).to(self.worst.dtype)
        better = worst > self.worst  # NaN is never better
        self.x_adv = torch.where(column(better, x), x.detach(), self.x_adv)
        self.worst = torch.where(better, worst, self.worst)
        return out


def _difference_to(target: Tensor, out: Outputs | Tensor, y: Tensor) -> Tensor:
    """The score logit_t - logit_y, with a target t for each sample."""
    z = logits_of(out)
    return z.gather(1, target[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]


class _Attacked(NamedTuple):
    """What the attacks found: columns of N samples, on the CPU but x_adv.

    clean: the largest logit difference at x; worst: the same at x_adv; rival: the strongest other class at x.
    """

    clean: Tensor
    x_adv: Tensor
    worst: Tensor
    rival: Tensor


def _attack(model: CountingModel, x: Tensor, data: Data, threat: Threat, seed: int, progress: Progress) -> _Attacked:
    """Attack each logit difference and the largest one."""
    batches: list[tuple[Tensor, ...]] = []
    done = 0
    noise = Noise(seed, data.index)
    progress("attacks", 0, len(x))
    for rows in torch.arange(len(x), device=x.device).split(default_batch_size(x)):
        images, y, starts = x[rows], data.y[rows], noise[rows]
        with torch.no_grad():
            z = model(images).logits
        if not batches:
            check_logits(model.model, z, data)
        if not bool(z.isfinite().all()):
            raise UserError("the model's logits on clean images are not finite, so there is no margin.")
        order = z.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)[:, :-1]
        recorder = _SmallestMargin(model, images, y)
        attack = partial(pgd, recorder, images, y, threat, steps=STEPS, step_size=threat.eps / 10, iterate="last")
        for k, target in enumerate(order.unbind(1)):
            score, noise_k = partial(_difference_to, target), starts.fold(BracketStream.LOGIT_DIFFERENCE, k)
            for random_start in (False, True):
                attack(score=score, noise=noise_k, random_start=random_start)
        for restart in range(RESTARTS):
            attack(score=negative_margin, noise=starts.fold(BracketStream.MARGIN, restart))
        x_adv = threat.project(recorder.x_adv, images)
        with torch.no_grad():
            worst = torch.stack([negative_margin(model(point).logits, y) for point in (images, x_adv)])
        better = worst[1] > worst[0]  # x is a point of the threat too
        worst = worst.cpu().double()
        x_adv = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x_adv, images)
        batches.append((worst[0], x_adv, worst.amax(0), order[:, 0].cpu()))
        done += len(rows)
        progress("attacks", done, len(x))
    return _Attacked(*(torch.cat(part) for part in zip(*batches, strict=True)))


def _upper_bound(model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor | None:
    """Upper bounds of the largest logit difference over the threat, (N,) float64; None if no bound is known."""
    if not isinstance(model, nn.Module):
        return None
    try:
        with torch.no_grad():
            return worst_logit_difference(model, x, y, threat).cpu()
    except CannotBound:
        return None


def _layers_or_none(model: Model) -> list[tuple[Tensor, Tensor]] | None:
    """The layers for exact answers; None for a network that has none."""
    try:
        return layers_of(model) if isinstance(model, nn.Module) else None
    except UserError:
        return None


def _exact(
    layers: list[tuple[Tensor, Tensor]],
    x: Tensor,
    data: Data,
    threat: Threat,
    x_adv: Tensor,
    seconds: float,
    checkpoint: Path | None,
    key: str,
    progress: Progress,
) -> tuple[Tensor, Tensor, Tensor]:
    """(low, high, solved) of the largest logit difference; what the checkpoint holds is not computed again."""
    low, high = (torch.zeros(len(x), dtype=torch.float64) for _ in range(2))
    solved, done = torch.zeros(len(x), dtype=torch.bool), 0
    if checkpoint is not None and checkpoint.exists():
        kept, about = load_tensors(checkpoint, CHECKPOINT, CHECKPOINT_VERSION)
        with understood(checkpoint):
            done = len(kept["low"])
            if about["key"] != key or done > len(x):
                raise UserError("it belongs to another bracket. Name another folder.")
            low[:done], high[:done], solved[:done] = kept["low"], kept["high"], kept["solved"]
    for i in range(done, len(x)):
        progress("exact answers", i, len(x))
        one = slice(i, i + 1)
        worst = maximize(layers, x[one], data.y[one], threat, start=[x_adv[one]], seconds=seconds)
        others = torch.arange(worst.low.shape[1]) != int(data.y[i])
        low[i], high[i], solved[i] = worst.low[0, others].max(), worst.high[0, others].max(), worst.solved[0]
        if checkpoint is not None:
            columns = {"low": low[: i + 1], "high": high[: i + 1], "solved": solved[: i + 1]}
            save_tensors(checkpoint, CHECKPOINT, CHECKPOINT_VERSION, columns, {"key": key})
    progress("exact answers", len(x), len(x))
    return low, high, solved
