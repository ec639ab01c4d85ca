"""The bracket measured: attacks that look for the largest fall, bounds, and the exact answer where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..bounds import CannotBound, worst_logit_difference
from ..data import Data, pixels
from ..errors import UserError, at_least
from ..io import load_tensors, save_tensors
from ..losses import negative_margin
from ..milp import layers_of, maximize
from ..noise import Noise
from ..outputs import Model, Outputs, frozen_eval, logits_of
from ..queries import CountingModel, default_batch_size, device_of, exact_float32
from ..threat import Threat
from .result import Bracket

RECORD, RECORD_VERSION = "bracket record", 1
STEPS, RESTARTS = 50, 10  # of each attack; every competitor is climbed from two starts, their maximum from RESTARTS
Progress = Callable[[str, int, int], None]  # (what, samples done, samples)


def bracket(
    model: Model,
    data: Data,
    threat: Threat,
    *,
    seconds: float = 10.0,
    seed: int = 0,
    trained_s: float | None = None,
    record: Path | None = None,
    key: str = "",
    progress: Progress = lambda what, done, total: None,
) -> Bracket:
    """Bracket by how much each sample's margin can fall: attacks below, bounds above, the exact answer between.

    The scalar form S = max_j gap_j(x_adv) - max_j gap_j(x) is what is bracketed, not each gap's own rise: its largest
    value in the threat is what the margin is compared with, and s_att <= s* <= s_cert holds of it in every sample. A
    sample is robust iff margin > s*; broken by an attack iff margin <= s_att; certified iff margin > s_cert.

    s_att: PGD on each gap_j from x and from a random start, and on their maximum from ten; every point on the way
        counts, and no sample is left alone once it is fooled: what is sought is the largest rise, not a mistake.
    s*: ``milp.maximize``, for linf and for what ``layers_of`` can read; begun from the attacks' points.
    s_cert: ``bounds.logit_difference_bounds`` on the smallest box that holds the threat (exact for linf, loose for l2
        and l1), in float64, with slack for float32's rounding and for what ``Threat.violation`` forgives.

    Args:
        model: images to logits or Outputs, the same answer to the same image. data: at least one sample.
        seconds: on each sample's exact answer, 0 for none; where it is not enough s* lies in [s_low, s_high].
        seed: of the attacks' starts. trained_s: kept in the answer, as ``constant_s`` reads it off a loss.
        record: a file that exact answers are kept in as they come; key: what it belongs to, else it is an error.
        progress: called with ("attacks" or "exact answers", samples done, samples).

    Raises UserError for an empty set, pixels outside the threat's box, labels without a logit, logits that are not
    finite, and where an attack exceeds a proof: then the model's answers change, or a bound is wrong.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))               # margin 4 x - 1, which 4 eps takes away
    >>> _ = net[1].weight.data.copy_(torch.tensor([[2.0], [-2.0]])), net[1].bias.data.copy_(torch.tensor([-1.0, 0.0]))
    >>> data = Data(torch.tensor([0.5, 0.3]).view(2, 1, 1, 1), torch.tensor([0, 0]), torch.arange(2))
    >>> found = bracket(net, data, Threat("linf", 0.1))
    >>> [[round(float(v), 3) for v in column] for column in (found.margin, found.s_att, found.s_star, found.s_cert)]
    [[1.0, 0.2], [0.4, 0.4], [0.4, 0.4], [0.4, 0.4]]
    >>> found.status
    ('certified', 'attacked')
    """
    at_least("seconds", seconds)
    if not len(data):
        raise UserError("a bracket needs at least one sample.")
    data = data.to(device_of(model, data))
    x, y = pixels(data.x), data.y
    if not bool(((x >= threat.lo) & (x <= threat.hi)).all()):
        raise UserError(f"x must lie in the threat's box [{threat.lo}, {threat.hi}].")
    with exact_float32(), frozen_eval(model):
        clean, x_adv, worst, rival = _attacked(CountingModel(model), x, data, threat, seed, progress)
        cert = _certified(model, x, y, threat)
    margin = -clean
    low, high, solved = None, None, None
    layers = _readable(model) if seconds and threat.norm == "linf" else None
    if layers is not None:
        low, high, solved = _exact(layers, x, data, threat, x_adv, seconds, record, key, progress)
        _below(worst, high, data, "the exact answer")
        low = torch.maximum(low, worst)  # float32 and float64 measure the same point
        high = torch.maximum(high if cert is None else torch.minimum(high, cert), low)
    if cert is not None:
        _below(worst if low is None else low, cert, data, "the interval bound")
    low, high, cert = (None if gap is None else gap + margin for gap in (low, high, cert))
    return Bracket(threat, data.index.cpu(), y.cpu(), rival, margin, worst + margin, low, high, solved, cert, trained_s)


def _below(reached: Tensor, proved: Tensor, data: Data, what: str) -> None:
    """Raise UserError where a point exceeds what is proved of all points."""
    over = torch.nonzero(reached > proved)[:, 0]
    if len(over):
        i = int(over[0])
        raise UserError(
            f"sample {int(data.index[i])}: a gap of {float(reached[i]):.6g} was reached, and {what} says at most "
            f"{float(proved[i]):.6g}. The model gives the same image different logits, or the bound is wrong."
        )


class _Watched:
    """A model that keeps, for each sample, the point of all that it was asked about where the margin is smallest.

    It must be asked about all samples in order, as ``pgd`` with keep="last" does. gap: (N,), -margin at that point.
    """

    def __init__(self, model: Model, x: Tensor, y: Tensor) -> None:
        self.model, self.y = model, y
        self.x_adv, self.gap = x.clone(), torch.full(y.shape, -math.inf, device=x.device)

    def __call__(self, x: Tensor) -> Outputs:
        out: Outputs = self.model(x)
        gap = negative_margin(out.logits.detach(), self.y).to(self.gap.dtype)
        better = gap > self.gap  # NaN is never better
        self.x_adv[better], self.gap[better] = x.detach()[better], gap[better]
        return out


def _gap_to(target: Tensor, out: Outputs | Tensor, y: Tensor) -> Tensor:
    """gap_t of each sample's own t: what ``pgd`` climbs."""
    z = logits_of(out)
    return z.gather(1, target[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]


def _attacked(
    model: CountingModel, x: Tensor, data: Data, threat: Threat, seed: int, progress: Progress
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(largest gap at x, x_adv, largest gap there, strongest competitor at x), float64, on the CPU but for x_adv."""
    found, done = [], 0
    noise = Noise(seed, data.index)
    progress("attacks", 0, len(x))
    for rows in torch.arange(len(x), device=x.device).split(default_batch_size(x)):
        here, y, own = x[rows], data.y[rows], noise[rows]
        with torch.no_grad():
            z = model(here).logits
        if int(y.min()) < 0 or int(y.max()) >= z.shape[1]:
            raise UserError(f"labels must lie in 0 .. {z.shape[1] - 1}, the model's logits.")
        if not bool(z.isfinite().all()):
            raise UserError("the model's logits are not finite numbers at clean images: there is no margin.")
        order = z.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)[:, :-1]
        watched = _Watched(model, here, y)
        climb = partial(pgd, watched, here, y, threat, steps=STEPS, step_size=threat.eps / 10, keep="last")
        for k, target in enumerate(order.unbind(1)):
            for start in (False, True):
                climb(score=partial(_gap_to, target), noise=own.fold(0, k), random_start=start)
        for restart in range(RESTARTS):
            climb(score=negative_margin, noise=own.fold(1, restart))
        x_adv = threat.project(watched.x_adv, here)
        with torch.no_grad():
            gaps = torch.stack([negative_margin(model(point).logits, y) for point in (here, x_adv)])
        better = gaps[1] > gaps[0]  # x is a point of the threat too
        gaps = gaps.cpu().double()
        x_adv = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x_adv, here)
        found.append((gaps[0], x_adv, gaps.amax(0), order[:, 0].cpu()))
        done += len(rows)
        progress("attacks", done, len(x))
    clean, x_adv, worst, rival = (torch.cat(part) for part in zip(*found, strict=True))
    return clean, x_adv, worst, rival


def _certified(model: Model, x: Tensor, y: Tensor, threat: Threat) -> Tensor | None:
    """Upper bounds of the largest gap in the threat, (N,) float64; None where no bound is known."""
    if not isinstance(model, nn.Module):
        return None
    try:
        with torch.no_grad():
            return worst_logit_difference(model, x, y, threat).cpu()
    except CannotBound:
        return None


def _readable(model: Model) -> list[tuple[Tensor, Tensor]] | None:
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
    record: Path | None,
    key: str,
    progress: Progress,
) -> tuple[Tensor, Tensor, Tensor]:
    """(low, high, solved) of the largest gap, sample by sample; what the record holds is not done again."""
    low, high = (torch.zeros(len(x), dtype=torch.float64) for _ in range(2))
    solved, done = torch.zeros(len(x), dtype=torch.bool), 0
    if record is not None and record.exists():
        kept, about = load_tensors(record, RECORD, RECORD_VERSION)
        if about["key"] != key or len(kept["low"]) > len(x):
            raise UserError(f"{record} belongs to another bracket: name another folder, or delete it.")
        done = len(kept["low"])
        low[:done], high[:done], solved[:done] = kept["low"], kept["high"], kept["solved"]
    for i in range(done, len(x)):
        progress("exact answers", i, len(x))
        one = slice(i, i + 1)
        found = maximize(layers, x[one], data.y[one], threat, start=[x_adv[one]], seconds=seconds)
        others = torch.arange(found.low.shape[1]) != int(data.y[i])
        low[i], high[i], solved[i] = found.low[0, others].max(), found.high[0, others].max(), found.solved[0]
        if record is not None:
            columns = {"low": low[: i + 1], "high": high[: i + 1], "solved": solved[: i + 1]}
            save_tensors(record, RECORD, RECORD_VERSION, columns, {"key": key})
    progress("exact answers", len(x), len(x))
    return low, high, solved
