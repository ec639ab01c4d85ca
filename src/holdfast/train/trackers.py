"""Experiment trackers: the figures of training and evaluation go to TensorBoard, W&B or MLflow, through accelerate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_wandb_available

from ..errors import UserError, plain, type_of, unknown

TRACKERS: dict[str, Callable[[], bool]] = {  # name -> whether it is installed
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
}
PROJECT = "holdfast"


class TrackerWarning(UserWarning):
    """A tracker failed while a network was trained or evaluated; the work went on without it."""


def tracker_names(track: str | Sequence[str] | None) -> tuple[str, ...]:
    """Read which trackers are asked for, before any work.

    Args:
        track: names of TRACKERS, as a list or with commas between; None or "" for none.

    Returns:
        The names, each once.

    Raises:
        UserError: an unknown name, or a tracker that is not installed.

    >>> tracker_names(None)
    ()
    """
    if track is not None and not isinstance(track, str | Sequence):
        raise UserError(f"track must be names of trackers, got {type_of(track)}.")
    parts = track.split(",") if isinstance(track, str) else list(track or ())
    names = dict.fromkeys(str(part).strip().lower() for part in parts if str(part).strip())
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
        if not TRACKERS[name]():
            raise UserError(f"the tracker {name} is not installed: pip install {name}, or leave it out.")
    return tuple(names)


class Tracking:
    """The trackers of one network. Nothing is sent before ``open``, which the main process alone calls.

    Args:
        names: as ``tracker_names`` returns them.
        folder: the run folder. It names the run; TensorBoard writes to its subfolder tensorboard.
        settings: what the trackers store as the run's configuration, nested.
    """

    def __init__(self, names: Sequence[str], folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.names, self.folder, self.settings = tuple(names), folder, settings
        self.trackers: list[Any] = []
        if folder is None and "tensorboard" in self.names:
            raise UserError("TensorBoard writes to the run folder: give fit a folder with out=.")

    def open(self, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """Start the trackers, once.

        Args:
            history: lines of log.jsonl, of epochs that were trained before.

        Raises:
            UserError: a tracker cannot start, as without a login or a server.
        """
        if not self.names or self.trackers:
            return
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            PartialState()  # which accelerate's trackers need; in a group of processes fit has made it
        for name in self.names:
            try:
                tracker = _make(name, self.folder)
                self.trackers.append(tracker)
                tracker.store_init_configuration(dict(_flat(self.settings)))
            except Exception as error:
                self.close()
                raise UserError(
                    f"the tracker {name} could not start ({_reason(error)}): set it up, or leave it out."
                ) from error
        for line in history:
            self.epoch(line)

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Send figures; without effect before ``open``.

        Args:
            figures: numbers and texts by name; None is left out.
            step: the epoch.

        Warns:
            TrackerWarning: a tracker failed. It gets nothing more, since training matters more than its record.
        """
        known = {name: value for name, value in figures.items() if value is not None}
        texts = {name: value for name, value in known.items() if isinstance(value, str)}
        for tracker in list(self.trackers):
            try:
                if tracker.name == "mlflow":  # its metrics are numbers
                    tracker.log({name: value for name, value in known.items() if name not in texts}, step=step)
                    if texts:
                        tracker.store_init_configuration(texts)
                else:
                    tracker.log(known, step=step)
            except Exception as error:
                self.trackers.remove(tracker)
                failed = f"the tracker {tracker.name} failed and gets nothing more: {_reason(error)}"
                warnings.warn(failed, TrackerWarning, stacklevel=2)

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Send a line of log.jsonl."""
        self.log({name: value for name, value in line.items() if name != "epoch"}, int(line["epoch"]))

    def close(self) -> None:
        """End the trackers' runs."""
        trackers, self.trackers = self.trackers, []
        for tracker in trackers:
            try:
                tracker.finish()
            except Exception as error:
                warnings.warn(f"the tracker {tracker.name} failed: {_reason(error)}", TrackerWarning, stacklevel=2)


@contextmanager
def tracking(
    track: str | Sequence[str] | Tracking | None, folder: str | Path | None, settings: Mapping[str, Any]
) -> Iterator[Tracking]:
    """The trackers of a network, for a block; one that was made before is handed on, and not closed at the end.

    Args:
        track: as for ``tracker_names``, or a Tracking.
        folder: as for ``Tracking``.
        settings: as for ``Tracking``.

    Raises:
        UserError: as ``tracker_names`` does; or TensorBoard without a folder.
    """
    if isinstance(track, Tracking):
        yield track
        return
    made = Tracking(tracker_names(track), None if folder is None else Path(folder), settings)
    try:
        yield made
    finally:
        made.close()


def _make(name: str, folder: Path | None) -> Any:
    """Start accelerate's tracker of this name."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    kind = type(kind.__name__, (kind,), {"main_process_only": False})  # only the main process gets here
    run = folder.resolve().name if folder is not None else None
    if name == "tensorboard":  # a resumed run writes its epochs again: what an earlier one wrote is purged
        tracker = kind("tensorboard", str(folder), purge_step=0)
    elif name == "wandb":
        tracker = kind(PROJECT, name=run, **({} if folder is None else {"dir": str(folder)}))
    else:
        tracker = kind(PROJECT, run_name=run)
    if hasattr(tracker, "start"):  # of later versions of accelerate
        tracker.start()
    return tracker


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as name.name -> number or text."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value if isinstance(value, bool | int | float | str) else str(value)


def _reason(error: Exception) -> str:
    lines = plain(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.:')}" if lines else type(error).__name__
