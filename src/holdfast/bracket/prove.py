"""Bracket a network's accuracy under a threat: attack every sample, then prove or break what the attacks left.

Attacks come first, since they are cheap and spare the proofs of what is broken. Then the methods of ``bounds.certify``
in their order, each on what is left. Proved samples leave, broken ones leave; a counterexample of branch and bound
counts as broken once a fresh float32 forward pass has confirmed it.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .. import __version__
from ..attacks import ATTACKS
from ..bounds import METHODS, CannotBound, ProofCache, certify
from ..data import Data
from ..data.arguments import AnyData, as_data, check_logits, note_assumptions
from ..errors import UserError, unknown
from ..evaluation import SUITES, Stage
from ..evaluation.proofs import LEAST_SHARE, MORE, STOPPED
from ..evaluation.suites import stage_scores
from ..io import load_tensors, next_save, save_tensors, understood
from ..losses import Loss, as_loss, loss_name, negative_margin
from ..noise import Noise
from ..outputs import Model, frozen_eval
from ..progress import Progress, as_progress
from ..queries import (
    CountingModel,
    default_batch_size,
    device_of,
    exact_float32,
    judge_candidates,
    logits_differ,
    margin_moved,
)
from ..threat import Threat, as_threat, check_images
from ..user_input import any_seed, number, typed
from .accuracy import FATES, AccuracyBracket, StepCost

KIND, VERSION = "accuracy bracket", 1
ATTACK_SHARE = 0.25  # of the budget, at most, that attacks may take
EARLY_SHARE = 0.75  # of what is left, at most, that the methods before branch and bound may take
# Which calls of certify make up the way to a method, and how many samples each takes at a time: a kill costs one call.
CALLS: dict[str, tuple[tuple[str, int], ...]] = {
    "interval": (("interval", 64),),
    "linear": (("linear", 64),),
    "crown": (("linear", 64), ("crown", 16)),
    "alpha": (("linear", 64), ("alpha", 16)),
    "branch": (("linear", 64), ("alpha", 16), ("branch", 1)),
}
BETWEEN, MISCLASSIFIED, BROKEN, PROVED = range(len(FATES))


@typed
def bracket_accuracy(
    model: Model,
    data: AnyData,
    threat: Threat | str,
    *,
    method: str = "branch",
    seconds: float = math.inf,
    trained_with: Loss | str | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> AccuracyBracket:
    """Bracket the accuracy under a threat: certified <= truth <= attacked.

    The attacks are those of the suite "quick", each on all that is left. They may take a quarter of the time. A sample
    that ``certify`` proves has no adversarial example within the threat, float32 rounding included.

    Args:
        model: images to logits or Outputs, deterministic. A network that no bound is known for is attacked alone.
        data: at least one sample; uint8, or float in the threat's box: Data, (x, y), a DataLoader, a data set or its
            name.
        threat: of any norm, or its text, such as "linf:2/255".
        method: the last method of ``bounds.METHODS`` that is tried on what is left.
        seconds: wall-clock time for all samples, that of interrupted runs included; shared out evenly among those that
            are left.
        trained_with: the loss the network was trained with, or its name: the attacks maximise its score.
        seed: of the attacks' noise.
        checkpoint: a file that is saved to and resumed from; the finished bracket is read back, and goes on where more
            time or a stronger method is allowed.
        key: what the checkpoint belongs to, weights and data.
        progress: called with (what is being done, samples decided, samples).

    Returns:
        The AccuracyBracket.

    Raises:
        UserError: an empty set; pixels outside the threat's box; labels without a logit; logits that are not finite; a
            network that answers the same image differently; a checkpoint of another bracket; a proof that an attack
            contradicts, because the network is not deterministic or a bound is wrong.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))     # right while x > 0
    >>> x = torch.tensor([0.05, 0.25, -0.5]).view(3, 1, 1, 1)
    >>> found = bracket_accuracy(net, Data(x, torch.zeros(3).long(), torch.arange(3)), Threat("linf", 0.1, -1, 1))
    >>> found.status, found.by, found.exact
    (('broken', 'proved', 'misclassified'), ('sweep', 'interval', 'clean'), True)
    """
    threat, report, trained_with = as_threat(threat), as_progress(progress), as_loss(trained_with)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if seconds != math.inf:
        number("seconds", seconds, 0, above=True)
    data = as_data(data)
    note_assumptions(data, unit_box=(threat.lo, threat.hi) == (0, 1))
    if not len(data):
        raise UserError("there is nothing to bracket: the data set is empty.")
    check_images(data.x, threat)
    data = data.to(device_of(model, data))
    work = _Work(
        CountingModel(model), data, threat, Noise(any_seed(seed), data.index), stage_scores(trained_with), method,
        seconds, report, ProofCache(),
    )  # fmt: skip
    identity = {
        "key": key, "threat": threat.describe(), "seed": seed, "n": len(data), "loss": loss_name(trained_with),
        "version": __version__,  # a proof is as good as the code that made it
    }  # fmt: skip
    with exact_float32(), frozen_eval(model):
        state = _State.load(checkpoint, identity, work) or _begun(work, checkpoint, identity)
        try:
            _attack(work, state)
            _prove(work, state)
        finally:
            state.save(force=True)
    return state.result(work)


@dataclass(frozen=True)
class _Work:
    """What is bracketed, and how."""

    model: CountingModel
    data: Data
    threat: Threat
    noise: Noise
    scores: dict[str, Loss]
    method: str
    seconds: float
    progress: Progress
    cache: ProofCache

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        there = rows.to(self.data.y.device)
        return self.data.pixels(there), self.data.y[there]


class _About(TypedDict):
    """What the checkpoint holds beside tensors."""

    identity: dict[str, Any]
    steps: list[StepCost]
    names: list[str]
    spent: float
    unconfirmed: int
    why_not: str


class _State:
    """How far a bracket has come: columns on the CPU, adversarial examples by sample number, costs by step."""

    def __init__(self, path: str | Path | None, identity: dict[str, Any], columns: dict[str, Tensor]) -> None:
        self.path, self.identity = None if path is None else Path(path), json.loads(json.dumps(identity))
        self.columns, self.x_adv = columns, {}  # type: dict[str, Tensor], dict[int, Tensor]
        self.names = [""]  # what decides samples; column "by" holds places
        self.steps: dict[str, StepCost] = {}
        self.spent, self.unconfirmed, self.why_not = 0.0, 0, ""
        self.ticked, self.next_save = time.monotonic(), next_save(time.perf_counter())

    @property
    def left(self) -> Tensor:
        """The numbers of the samples that lie between."""
        return (self.columns["fate"] == BETWEEN).nonzero()[:, 0]

    def tick(self) -> float:
        """Count the time since the last call. Returns it."""
        now = time.monotonic()
        since, self.ticked = now - self.ticked, now
        self.spent += since
        return since

    def count(self, step: str, **more: float) -> None:
        """Add to what a step did; its time is that since the last step."""
        cost = self.steps.get(step, StepCost(step))
        added = {name: getattr(cost, name) + value for name, value in {**more, "seconds": self.tick()}.items()}
        self.steps[step] = replace(cost, **added)

    def decide(self, rows: Tensor, fate: int, by: str) -> None:
        """Give samples that lie between a fate."""
        if by not in self.names:
            self.names.append(by)
        self.columns["fate"][rows], self.columns["by"][rows] = fate, self.names.index(by)

    def save(self, *, force: bool = False) -> None:
        """Write the state if the last checkpoint is old enough, or in any case with ``force``."""
        self.tick()
        began = time.perf_counter()
        if self.path is None or not (force or began > self.next_save):
            return
        rows = sorted(self.x_adv)
        tensors = {**self.columns, "broken": torch.tensor(rows, dtype=torch.int64)}
        if rows:
            tensors["x_adv"] = torch.stack([self.x_adv[row] for row in rows])
        about = {
            "identity": self.identity, "steps": [asdict(step) for step in self.steps.values()], "names": self.names,
            "spent": self.spent, "unconfirmed": self.unconfirmed, "why_not": self.why_not,
        }  # fmt: skip
        save_tensors(self.path, KIND, VERSION, tensors, about, packed=["x_adv"] if rows else [])
        self.next_save = next_save(began)

    @staticmethod
    def load(path: str | Path | None, identity: dict[str, Any], work: _Work) -> _State | None:
        """The saved state, after a few images were asked again; None if there is none."""
        if path is None or not Path(path).exists():
            return None
        tensors, about = load_tensors(path, KIND, VERSION, _About)
        if about["identity"] != json.loads(json.dumps(identity)):
            raise UserError(f"{path} belongs to another bracket. Name another folder.")
        with understood(path):
            broken = tensors.pop("broken").tolist()
            x_adv = tensors.pop("x_adv") if broken else torch.zeros(0)
            fresh = _columns(len(work.data))
            if {name: (c.shape, c.dtype) for name, c in tensors.items()} != {
                name: (c.shape, c.dtype) for name, c in fresh.items()
            }:
                raise ValueError("other columns")
            if broken and x_adv.shape[1:] != work.data.x.shape[1:]:
                raise ValueError("images of another shape")
            state = _State(path, identity, tensors)
            state.x_adv = dict(zip(broken, x_adv, strict=True))
            state.steps = {step.name: step for step in about["steps"]}
            state.names, state.spent = about["names"], about["spent"]
            state.unconfirmed, state.why_not = about["unconfirmed"], about["why_not"]
            if sorted(broken) != (tensors["fate"] == BROKEN).nonzero()[:, 0].tolist():
                raise ValueError("broken samples without an adversarial example")
            if not 0 <= int(tensors["by"].min()) <= int(tensors["by"].max()) < len(state.names):
                raise ValueError("names that are missing")
            if not 0 <= int(tensors["fate"].min()) <= int(tensors["fate"].max()) < len(FATES):
                raise ValueError("another fate")
        _asked_again(work, state)
        return state

    def result(self, work: _Work) -> AccuracyBracket:
        """The state as an AccuracyBracket."""
        c, rows = self.columns, sorted(self.x_adv)
        shape, unended = tuple(work.data.x.shape[1:]), c["ended"] == 0
        return AccuracyBracket(
            threat=work.threat, method=work.method, index=work.data.index.cpu(), y=work.data.y.cpu(), fate=c["fate"],
            by=tuple(self.names[number] for number in c["by"].tolist()), margin=c["margin"],
            margin_adv=c["margin_adv"], prediction_adv=c["prediction_adv"], bound=c["bound"], seconds=c["seconds"],
            rows=torch.tensor(rows, dtype=torch.int64),
            x_adv=torch.stack([self.x_adv[row] for row in rows]) if rows else torch.zeros(0, *shape),
            steps=tuple(self.steps.values()), spent=self.spent, budget=work.seconds,
            out_of_time=int(((c["fate"] == BETWEEN) & (unended | (c["calls"] < _rank(work.method)))).sum()),
            unconfirmed=self.unconfirmed, why_not=self.why_not,
        )  # fmt: skip


def _columns(n: int) -> dict[str, Tensor]:
    """The columns of n samples that nothing is known of."""
    zero = torch.zeros(n, dtype=torch.float64)
    whole = torch.zeros(n, dtype=torch.int64)
    return {
        "fate": whole.clone(), "by": whole.clone(), "margin": zero.clone(), "margin_adv": zero.clone(),
        "prediction_adv": whole.clone(), "bound": zero - math.inf, "seconds": zero.clone(),
        "attacks": whole.clone(),  # how many stages have attacked it
        "calls": whole.clone(),  # the last of METHODS that was tried on it, counted from 1
        "ended": whole.clone(),  # 1: the last call ran to its end; 0: time ran out first, or there was none
        "given": zero.clone(),  # seconds that branch and bound last had for it
    }  # fmt: skip


def _begun(work: _Work, path: str | Path | None, identity: dict[str, Any]) -> _State:
    """The clean pass: every image is asked once, a few twice."""
    state = _State(path, identity, _columns(len(work.data)))
    columns = state.columns
    for rows in torch.arange(len(work.data)).split(default_batch_size(work.data.x)):
        x, y = work.images(rows)
        with torch.no_grad():
            z = work.model(x).logits
            if int(rows[0]) == 0:
                check_logits(work.model.model, z, work.data)
                again = work.model(x).logits
                if bool((logits_differ(z, again) & z.isfinite().all(1)).any()):
                    raise UserError(
                        "the network answers the same image differently each time: a bracket is of one function. "
                        "`holdfast evaluate` judges randomised networks by majority."
                    )
        if not bool(z.isfinite().all()):
            raise UserError("the network's logits on clean images are not finite, so there is no margin.")
        margin = -negative_margin(z, y).double().cpu()
        columns["margin"][rows] = columns["margin_adv"][rows] = margin
        columns["prediction_adv"][rows] = z.argmax(1).cpu()
        state.decide(rows[(z.argmax(1) != y).cpu()], MISCLASSIFIED, "clean")
    wrong = int((columns["fate"] == MISCLASSIFIED).sum())
    state.count("clean", samples=len(work.data), broken=wrong)
    state.save(force=True)
    return state


def _asked_again(work: _Work, state: _State) -> None:
    """Before a stored bracket is believed, ask a batch of images again, clean and attacked."""
    rows = torch.arange(min(default_batch_size(work.data.x), len(work.data)))
    x, y = work.images(rows)
    with torch.no_grad():
        moved = margin_moved(work.model(x).logits, y, state.columns["margin"][rows])
    broken = torch.tensor(sorted(state.x_adv)[:64], dtype=torch.int64)
    held = 0
    if len(broken):
        x, y = work.images(broken)
        x_adv = torch.stack([state.x_adv[row] for row in broken.tolist()]).to(x)
        held = int(judge_candidates(work.model, x_adv, x, y, work.threat).broken.sum())
    if bool(moved.any()) or held < 0.9 * len(broken):  # rounding decides a few off the data
        raise UserError(
            f"the network answers otherwise than when {state.path} was written, with the same weights: code that it "
            "calls has changed, or its answers vary. Name another folder."
        )


def _judge(work: _Work, state: _State, rows: Tensor, x_adv: Tensor, by: str) -> int:
    """Ask the network at candidates, in float32, and keep what they break. Returns how many samples that is."""
    x, y = work.images(rows)
    judged = judge_candidates(work.model, x_adv.to(x), x, y, work.threat)
    columns, margin = state.columns, judged.margin.double().cpu()
    better = ((margin < columns["margin_adv"][rows]) & (judged.inside & judged.finite).cpu()) | judged.broken.cpu()
    columns["margin_adv"][rows] = torch.where(better, margin, columns["margin_adv"][rows])
    columns["prediction_adv"][rows] = torch.where(better, judged.prediction.cpu(), columns["prediction_adv"][rows])
    broken = judged.broken.cpu().nonzero()[:, 0]
    for place in broken.tolist():
        state.x_adv[int(rows[place])] = x_adv[place].detach().cpu().float()
    state.decide(rows[broken], BROKEN, by)
    return len(broken)


def _attack(work: _Work, state: _State) -> None:
    """The attacks of the suite "quick", each on all that is left, until their share of the time is spent."""
    limit = ATTACK_SHARE * work.seconds
    stages: list[tuple[int, Stage]] = [
        (place, stage) for place, stage in enumerate(SUITES["quick"]) if work.threat.norm in ATTACKS[stage.attack].norms
    ]
    size = default_batch_size(work.data.x)
    classes = int(work.model(work.images(torch.tensor([0]))[0]).logits.shape[1])
    for place, stage in stages:
        left = state.left
        for rows in left[state.columns["attacks"][left] <= place].split(size):
            if state.spent > limit:
                return
            broken = 0
            for target in range(stage.n_targets(classes)):
                some = rows[state.columns["fate"][rows] == BETWEEN]
                if len(some):
                    broken += _judge(work, state, some, _candidates(work, stage, place, some, target), stage.name)
            state.columns["attacks"][rows] = place + 1
            state.count(f"attack: {stage.name}", samples=len(rows), broken=broken)
            state.save()
            work.progress(f"attack {stage.name}", len(work.data) - len(state.left), len(work.data))


def _candidates(work: _Work, stage: Stage, place: int, rows: Tensor, target: int) -> Tensor:
    """What one attack returns for some samples; the targets are the likeliest wrong classes."""
    x, y = work.images(rows)
    more = {}
    if stage.targets:
        with torch.no_grad():
            z = work.model(x).logits.scatter(1, y[:, None], -math.inf)
        more["target"] = z.argsort(dim=1, descending=True, stable=True)[:, target]
    noise = work.noise[rows.to(y.device)].fold(place, target)
    found: Tensor = ATTACKS[stage.attack].attack(
        work.model, x, y, work.threat, score=work.scores[stage.score], noise=noise,
        **stage.keywords(work.threat.eps), **more,
    )  # fmt: skip
    return found


def _prove(work: _Work, state: _State) -> None:
    """The methods of proof in their order, each on what is left."""
    if not isinstance(work.model.model, nn.Module):
        state.why_not = "bounds need a torch module, and the model is a function."
    calls = CALLS[work.method]
    for place, (method, size) in enumerate(calls):
        share = EARLY_SHARE if place + 1 < len(calls) else 1.0
        until = state.spent + share * (work.seconds - state.spent)
        while state.spent < until and not state.why_not and len(todo := _waiting(state, method, until)):
            todo = todo[(-state.columns["bound"][todo]).argsort(stable=True)]  # the nearest to a proof first
            for turn, some in enumerate(todo.split(size)):
                if state.spent >= until or state.why_not:
                    break
                time_left = until - state.spent
                share = time_left / (len(todo) - turn) if method == "branch" else time_left
                _certify(work, state, method, some, min(time_left, max(share, _least_share(state, method))))
                state.save()
                work.progress(f"proof: {method}", len(work.data) - len(state.left), len(work.data))


def _rank(method: str) -> int:
    """The place of a method, from 1: the column "calls" holds it."""
    return METHODS.index(method) + 1


def _least_share(state: _State, method: str) -> float:
    """Seconds below which branch and bound of a sample comes to nothing: a few times what its bounds cost."""
    bounds = state.steps.get("proof: alpha")
    return 0.0 if method != "branch" or bounds is None else LEAST_SHARE * bounds.seconds / bounds.samples


def _waiting(state: _State, method: str, until: float) -> Tensor:
    """Samples for a method: once each; branch and bound again where a fair share is more than it had."""
    left, columns = state.left, state.columns
    waiting = columns["calls"][left] < _rank(method)
    if method == "branch":
        waiting |= MORE * columns["given"][left] < (until - state.spent) / max(1, len(left))
    return left[waiting]


def _certify(work: _Work, state: _State, method: str, rows: Tensor, seconds: float) -> None:
    """One call of certify, and what follows from it for these samples."""
    there = rows.to(work.data.y.device)
    some, began = replace(work.data.take(there), x=work.data.pixels(there)), time.monotonic()
    try:
        found = certify(work.model.model, some, work.threat, method=method, seconds=seconds, cache=work.cache)
    except CannotBound as error:
        state.why_not = str(error)
        return
    columns, took = state.columns, time.monotonic() - began
    bound = found.bound.cpu().double()
    _contradictions(work, rows, bound, columns["margin_adv"][rows])
    columns["bound"][rows] = torch.maximum(columns["bound"][rows], bound)
    columns["seconds"][rows] += found.seconds.cpu()
    stopped = torch.full_like(found.ended, method == "branch" and took < STOPPED * seconds, device="cpu")
    in_time = took < seconds
    columns["ended"][rows] = (stopped | (found.ended.cpu() & in_time)).long()
    if in_time or method == "branch":  # bounds that the end of the time cut short are tried again when there is more
        columns["calls"][rows] = torch.maximum(columns["calls"][rows], torch.tensor(_rank(method)))
    if method == "branch":
        columns["given"][rows] = math.inf if bool(stopped.all()) else seconds
    proved = found.proved.cpu().nonzero()[:, 0]
    for place in proved.tolist():
        state.decide(rows[place : place + 1], PROVED, found.by[place])
    broken = 0
    met = [place for place in sorted(found.x_adv) if not found.proved[place]]
    if met:
        at = torch.tensor(met, dtype=torch.int64)
        broken = _judge(work, state, rows[at], torch.stack([found.x_adv[place] for place in met]), method)
        state.unconfirmed += len(met) - broken
    state.count(f"proof: {method}", samples=len(rows), proved=len(proved), broken=broken)


def _contradictions(work: _Work, rows: Tensor, bound: Tensor, met: Tensor) -> None:
    """Raise UserError where a point of the threat has a smaller margin than is proved for all of them."""
    over = (bound > met + 1e-6 * met.abs()).nonzero()[:, 0]  # margins are differences in float32
    if len(over):
        row = int(rows[over[0]])
        raise UserError(
            f"sample {int(work.data.index[row])}: an attack found a margin of {float(met[over[0]]):.6g}, and at least "
            f"{float(bound[over[0]]):.6g} is proved. Either the network is not deterministic or the bound is wrong."
        )
