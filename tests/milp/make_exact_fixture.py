"""Ten small ReLU networks on the digits, and the exact truth about their test samples: tests/fixtures.

``python tests/milp/make_exact_fixture.py`` trains and proves what is not in the file yet, a sample at a time, so a run
that was stopped goes on; delete the file to begin again. It takes some ten minutes on a core of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from holdfast import data
from holdfast.data import Split, pixels, standardisation
from holdfast.io import load_tensors, save_tensors
from holdfast.losses import isce, sce
from holdfast.milp import decide, layers_of
from holdfast.models import Classifier
from holdfast.models.heads import Linear
from holdfast.objectives import adversarial, standard
from holdfast.threat import Threat
from holdfast.train import FitConfig, fit

FILE = Path(__file__).resolve().parents[1] / "fixtures" / "exact_digits.safetensors"
KIND, VERSION = "exact fixture", 1
STATUS = ("unknown", "robust", "broken")  # the file holds their numbers
SECONDS = 30.0  # at most for each sample


@dataclass(frozen=True)
class Plan:
    """A network, and the linf radius at which about half of its samples are robust.

    s: of I-SCE, 0 is SCE; at: eps of adversarial training, 0 is none; times: the logit_scale after
    training; samples: how many of the test samples that it has right.
    """

    name: str
    eps: float
    seed: int = 0
    s: float = 0.0
    at: float = 0.0
    weight_decay: float = 0.0
    times: float = 1.0
    samples: int = 40

    @property
    def loss(self) -> Callable[..., Tensor]:
        return partial(isce, s=self.s) if self.s else sce


PLANS = (
    Plan("sce-seed0", 0.1, samples=60),
    Plan("sce-seed1", 0.1, seed=1, samples=60),
    Plan("sce-seed2", 0.1, seed=2),
    Plan("isce-s10", 0.1, s=10.0),
    Plan("isce-s100-seed0", 0.1, s=100.0),
    Plan("isce-s100-seed1", 0.1, seed=1, s=100.0),
    Plan("at0.05", 0.1, at=0.05),
    Plan("at0.1", 0.12, at=0.1),
    Plan("sce-decay", 0.1, weight_decay=0.1),
    Plan("sce-times100", 0.1, seed=3, times=100.0),
)


@dataclass(frozen=True)
class Truth:
    """One network of the file: rows of the test set (N,), what is true of them, x_adv (N, 1, 8, 8), seconds (N,)."""

    plan: Plan
    model: Classifier
    rows: Tensor
    status: tuple[str, ...]
    x_adv: Tensor
    seconds: Tensor

    def __getattr__(self, name: str) -> Tensor:
        """``robust``, ``broken``, ``unknown``: (N,) bool."""
        if name not in STATUS:
            raise AttributeError(name)
        return torch.tensor([status == name for status in self.status])


def digits() -> Split:
    """The data that the networks were trained and are judged on."""
    return data.load("digits", fold=(0, 5))


def blank(seed: int = 0) -> Classifier:
    """64-32-32-10, before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        return Classifier(hidden, Linear(32, 10), torch.zeros(1), torch.ones(1)).eval()


def trained(plan: Plan, split: Split) -> Classifier:
    """The network of a plan, by holdfast's own training."""
    model = blank(plan.seed)
    mean, std = standardisation(split.train)
    model.mean.copy_(mean.view(-1, 1, 1))
    model.std.copy_(std.view(-1, 1, 1))
    objective = adversarial(plan.loss, Threat("linf", plan.at), steps=5) if plan.at else standard(plan.loss)
    config = FitConfig(epochs=40, batch_size=64, lr=3e-3, weight_decay=plan.weight_decay, seed=plan.seed)
    fit(model, split.train, split.val, objective, config, device="cpu")
    model.logit_scale = plan.times
    return model.eval()


def load(path: Path = FILE) -> list[Truth]:
    """What the file holds, in the order of PLANS."""
    tensors, about = load_tensors(path, KIND, VERSION)
    found = []
    for plan in (Plan(**kept) for kept in about["plans"]):
        mine = {name.split("/", 1)[1]: t for name, t in tensors.items() if name.split("/", 1)[0] == plan.name}
        model = blank()
        model.load_state_dict({name.removeprefix("model."): t for name, t in mine.items() if name.startswith("model.")})
        model.logit_scale = plan.times
        status = tuple(STATUS[code] for code in mine["status"].tolist())
        x_adv = pixels(digits().test.x[mine["rows"].long()])
        x_adv[torch.tensor([s == "broken" for s in status])] = mine["x_adv"]
        found.append(Truth(plan, model, mine["rows"].long(), status, x_adv, mine["seconds"]))
    return found


def begun(plan: Plan, split: Split) -> Truth:
    """The trained network, and nothing proved yet."""
    none = torch.zeros(0)
    return Truth(plan, trained(plan, split), none.long(), (), torch.zeros(0, *split.shape), none)


def proved(truth: Truth, split: Split) -> Truth:
    """One sample more: the next one that the network has right."""
    x, y = pixels(split.test.x), split.test.y
    with torch.no_grad():
        right = torch.nonzero(truth.model(x).logits.argmax(1) == y)[:, 0]
    row = right[len(truth.rows)][None]
    found = decide(layers_of(truth.model), x[row], y[row], Threat("linf", truth.plan.eps), seconds=SECONDS)
    return replace(
        truth,
        rows=torch.cat([truth.rows, row]),
        status=truth.status + found.status,
        x_adv=torch.cat([truth.x_adv, found.x_adv]),
        seconds=torch.cat([truth.seconds, found.seconds.float()]),
    )


def save(truths: list[Truth], path: Path = FILE) -> None:
    """All in one file; x_adv of the broken samples only."""
    tensors = {}
    for truth in truths:
        mine = {f"model.{name}": t for name, t in truth.model.state_dict().items()}
        mine |= {
            "rows": truth.rows.to(torch.int32),
            "status": torch.tensor([STATUS.index(status) for status in truth.status], dtype=torch.uint8),
            "x_adv": truth.x_adv[truth.broken],
            "seconds": truth.seconds,
        }
        tensors |= {f"{truth.plan.name}/{name}": t for name, t in mine.items()}
    save_tensors(path, KIND, VERSION, tensors, {"plans": [asdict(truth.plan) for truth in truths]})


def main() -> None:
    """Make what is not there yet."""
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    truths = {truth.plan: truth for truth in load()} if FILE.exists() else {}
    split = digits()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        whole = progress.add_task("networks", total=len(PLANS))
        one = progress.add_task("samples", total=1)
        for plan in sorted(PLANS, key=lambda p: (p.at == 0, p.s == 0)):
            truth = truths[plan] if plan in truths else begun(plan, split)
            progress.reset(one, description=plan.name, total=plan.samples, completed=len(truth.rows))
            while len(truth.rows) < plan.samples:
                truths[plan] = truth = proved(truth, split)
                progress.update(one, completed=len(truth.rows))
                save([truths[p] for p in PLANS if p in truths])
            counts = ", ".join(f"{int(getattr(truth, status).sum())} {status}" for status in STATUS[::-1])
            took = f"{truth.seconds.mean():.2f} s a sample, {truth.seconds.max():.1f} at most"
            progress.console.print(f"{plan.name} at linf {plan.eps:g}: {counts}; {took}")
            progress.advance(whole)


if __name__ == "__main__":
    main()
