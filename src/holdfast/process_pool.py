"""Independent jobs side by side: one process a core for small networks, so that no thread waits for another."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

Progress = Callable[[str, str, int, int], None]  # (job, what it does, units done, units)
_outbox: Any = None


def _enter(outbox: Any, parent: int, threads: int) -> None:
    """Once in each worker: few threads, no say in Ctrl-C (the parent decides), and the way to report."""
    global _outbox
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _outbox = outbox
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End with the parent, also when it was killed: what is on disk is whole, the next start goes on from it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _tell(job: str, what: str, done: int, total: int) -> None:
    _outbox.put((job, what, done, total))


def _work(function: Callable[..., Any], job: Any) -> Any:
    return function(job, _tell)


def run(
    function: Callable[[Any, Progress], Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    tell: Progress,
    finished: Callable[[Any], None],
) -> None:
    """Call ``function(job, tell)`` for every job, on ``workers`` processes (1: in this one, with its threads).

    tell: called with each job's reports, here; finished: called with each job as it ends, in any order.
    The first error stops the rest and is raised. On Ctrl-C the workers end at once.
    """
    jobs = list(jobs)
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            function(job, tell)
            finished(job)
        return
    context = multiprocessing.get_context("spawn")
    outbox: Any = context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    workers = min(workers, len(jobs))
    pool = ProcessPoolExecutor(workers, context, _enter, (outbox, os.getpid(), threads))
    waiting: dict[Future[Any], Any] = {pool.submit(_work, function, job): job for job in jobs}
    try:
        while waiting:
            done, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            _drain(outbox, tell)
            for future in done:
                job = waiting.pop(future)
                future.result()
                finished(job)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _drain(outbox: Any, tell: Progress) -> None:
    while True:
        try:
            tell(*outbox.get_nowait())
        except queue.Empty:
            return
