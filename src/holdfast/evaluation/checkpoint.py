"""The checkpoint of an evaluation: an interrupted evaluation resumes after the last batch that was saved."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from ..errors import UserError
from ..io import RESTORE, content_hash, load_tensors, next_save, save_tensors, understood
from ..mapped import flush, is_mapped, opened
from ..queries import VOTES
from ..results import ProofCost
from ..user_input import typed
from .evaluation import StageCost
from .state import BRANCH, CANDIDATES, Columns, State, Task, add_extra_stages

NAME, VERSION = "evaluation checkpoint", 5


class Checkpoint:
    """Where an evaluation saves its state.

    Args:
        path: of the file; None saves nothing.
        task: the evaluation it belongs to.
        key: identifies model and data, which the file does not contain.
    """

    def __init__(self, path: Path | None, task: Task, key: str) -> None:
        self.path = path
        self.next_save = next_save(time.perf_counter())
        matched = task.scores["matched"]
        self.identity = {
            "key": key,
            "threat": task.threat.describe(),
            "stages": json.loads(json.dumps([asdict(stage) for stage in task.suite])),
            "matched": getattr(matched, "__name__", repr(matched)),
            "seed": task.noise.seed,
            "proofs": task.proofs,
            "precision": task.precision,
            "pgd50": task.pgd50,
            **({} if task.candidates is None else {"candidates": content_hash(task.candidates)}),
            "n": len(task.data),
        }

    def load(self, task: Task) -> State | None:
        """The saved state; None if there is none.

        Raises:
            UserError: if the file is damaged, of another version or belongs to another evaluation.
        """
        if self.path is None or not self.path.exists():
            return None
        tensors, about = load_tensors(self.path, NAME, VERSION, _About)
        if about["identity"] != self.identity:
            raise UserError(f"{self.path} belongs to another evaluation. Name another folder.")
        saved: dict[str, Any] = about["state"]
        device = task.data.y.device
        with understood(self.path):
            x_adv = _images(self.path, tensors, writable=True)
            if x_adv.shape != task.data.x.shape or any(len(t) != len(task.data) for t in tensors.values()):
                raise ValueError("columns of another length")
            x_adv = task.placed(x_adv)
            columns = Columns.from_tensors({name: t.to(device) for name, t in tensors.items()} | {"x_adv": x_adv})
            if columns.attack_correct.keys() != {stage.name for stage in task.suite if stage.individual}:
                raise ValueError("columns of other attacks")
            costs = [StageCost(**cost) for cost in saved.pop("costs")]
            saved["proofs"] = [ProofCost(**cost) for cost in saved.pop("proofs", [])]  # not of before they were counted
            saved["branch"] = StageCost(**saved.pop("branch", {"name": BRANCH}))
            saved["given"] = StageCost(**saved.pop("given", {"name": CANDIDATES}))
            state = State(columns, costs, list(task.stages(saved["differs_off_grid"])), **saved)
            add_extra_stages(task, state, len(costs) - 1)
        return state

    def save(self, state: State, *, force: bool = False) -> None:
        """Write the state if the last checkpoint is old enough, or in any case with ``force``."""
        began = time.perf_counter()
        if self.path is None or not (force or began > self.next_save):
            return
        saved = {
            "costs": [asdict(cost) for cost in state.costs],
            "channels_last": state.channels_last,
            "randomised": state.randomised,
            "differs_off_grid": state.differs_off_grid,
            "chosen_for": state.chosen_for,
            "n_rest": state.n_rest,
            "proved": state.proved and not state.cut,
            "proofs": [asdict(cost) for cost in state.proofs],
            "branch": asdict(state.branch),
            "given": asdict(state.given),
            "tried": state.tried,
            "settled": state.settled,
        }
        about = {"identity": self.identity, "state": saved}
        tensors, packed = state.columns.to_tensors(), ["x_adv"]
        if is_mapped(tensors["x_adv"]):  # written before the columns that are about it
            flush(tensors.pop(packed.pop()))
        save_tensors(self.path, NAME, VERSION, tensors, about, packed=packed)
        self.next_save = next_save(began)


class _About(TypedDict):
    """What the file holds beside tensors."""

    identity: dict[str, Any]
    state: dict[str, Any]


class CleanAnswers(NamedTuple):
    """What a model answered: the margin of each clean image and of its x_adv, and the number of votes."""

    margin: Tensor
    votes: int
    x_adv: Tensor
    margin_adv: Tensor


def load_clean_answers(checkpoint: Path) -> CleanAnswers:
    """What a checkpoint says of the clean images.

    Args:
        checkpoint: file written by ``evaluate``.

    Returns:
        Margins, and the number of outputs that each prediction is the majority of.

    Raises:
        UserError: if there is no such file, or it is damaged or of another version.
    """
    tensors, about = load_tensors(checkpoint, NAME, VERSION, _About)
    with understood(Path(checkpoint)):
        x_adv = _images(Path(checkpoint), tensors)
        if len({len(one) for one in (tensors["margin"], tensors["margin_adv"], x_adv)}) != 1:
            raise ValueError("columns of different lengths")
        votes = VOTES if about["state"]["randomised"] else 1
        return CleanAnswers(tensors["margin"], votes, x_adv, tensors["margin_adv"])


@typed
def load_x_adv(checkpoint: str | Path) -> Tensor:
    """The adversarial images in a checkpoint.

    Args:
        checkpoint: file written by ``evaluate``.

    Returns:
        ``Evaluation.x_adv``, (N, C, H, W).

    Raises:
        UserError: if there is no such file, or it is damaged or of another version.
    """
    tensors, _ = load_tensors(checkpoint, NAME, VERSION, _About)
    with understood(Path(checkpoint)):
        return _images(Path(checkpoint), tensors)


def images_file(checkpoint: Path) -> Path:
    """Where the adversarial images of a checkpoint are if they are not in it."""
    return checkpoint.with_suffix(".x_adv.npy")


def _images(checkpoint: Path, tensors: dict[str, Tensor], *, writable: bool = False) -> Tensor:
    """The adversarial images of a checkpoint: taken out of its tensors, or mapped from the file beside it."""
    if "x_adv" in tensors:
        return tensors.pop("x_adv")
    path = images_file(checkpoint)
    try:
        return opened(path, writable=writable)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}), and {checkpoint.name} needs it. {RESTORE}") from error
