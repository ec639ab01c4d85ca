"""Independent jobs side by side: one process per core for small networks, so that no thread waits for another."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

from .progress import JobProgress

_reports: Any = None  # in a worker: the queue that its progress reports go to


def _start_worker(reports: Any, parent: int, threads: int) -> None:
    """Run once in each worker: set its threads, ignore Ctrl-C (the parent handles it), keep the report queue."""
    global _reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    _reports = reports
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent process is gone, killed or not: what is on disk is complete, and the next run resumes."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _report(job: str, what: str, done: int, total: int) -> None:
    _reports.put((job, what, done, total))


def _work(function: Callable[..., Any], job: Any) -> None:
    function(job, _report)  # its result stays in the worker: what a job did is on disk


def run(
    function: Callable[[Any, JobProgress], Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    progress: JobProgress,
    on_done: Callable[[Any], None] = lambda job: None,
) -> None:
    """Call ``function(job, progress)`` for every job, on several processes.

    Jobs start in the order they are given in, so a job may wait for a file that an earlier one writes.
    The first error stops the other jobs and is raised. On Ctrl-C, SIGTERM and SIGHUP the workers are terminated and
    waited for, and what they share with this process is released.

    Args:
        function: what does a job; a module-level function, since workers import it. Its return value is dropped.
        jobs: one object per job, which can be pickled.
        workers: processes; with 1, or a single job, everything runs in this process with all its threads.
        progress: called in this process with every job's reports.
        on_done: called in this process with each job when it is done, in any order.

    Raises:
        Exception: whatever the function raised first.
        SystemExit: on SIGTERM and SIGHUP, with the usual exit status 128 + the signal's number.
    """
    jobs = list(jobs)
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            function(job, progress)
            on_done(job)
        return
    with _signals_raise():
        _run_on_workers(function, jobs, workers, progress, on_done)


def _run_on_workers(
    function: Callable[[Any, JobProgress], Any],
    jobs: list[Any],
    workers: int,
    progress: JobProgress,
    on_done: Callable[[Any], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (reports, os.getpid(), threads))
    try:
        with _ctrl_c_waits():
            waiting: dict[Future[Any], Any] = {pool.submit(_work, function, job): job for job in jobs}
        while waiting:
            ended, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            _forward(reports, progress)
            for future in ended:
                job = waiting.pop(future)
                future.result()
                on_done(job)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        reports.close()
    pool.shutdown()


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C arrives after this block, and never in processes that begin in it.

    A terminal sends it to the workers as well. One that is still importing, seconds on a busy machine, does not ignore
    it yet: it would print a traceback. What is blocked here stays so in a new process, until it ignores Ctrl-C.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit here, where the default leaves workers and semaphores behind."""

    def leave(number: int, frame: object) -> None:
        for ending in handled:  # a second one, which service managers send, does not disturb the cleaning up
            signal.signal(ending, signal.SIG_IGN)
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [
        getattr(signal, name)
        for name in names
        if in_main_thread and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL
    ]
    for number in handled:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _forward(reports: Any, progress: JobProgress) -> None:
    while True:
        try:
            progress(*reports.get_nowait())
        except queue.Empty:
            return
