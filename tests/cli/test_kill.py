"""``kill -9`` at any moment: what was finished stays, what was not is done again, nobody is left behind."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.helpers import in_foreground, write_parquet

from holdfast import cli, results
from holdfast.checks import CHECKS
from holdfast.evaluation.suites import SUITES, Stage
from holdfast.experiments.compare import compare
from holdfast.experiments.config import Comparison
from holdfast.replay import replay
from holdfast.train import FitConfig

COLUMNS = [field.name for field in dataclasses.fields(results.Samples)]
KILLS = 50


def started(folder, words):
    """``holdfast`` in a session of its own, so that whoever is left of it can be found and ended."""
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "holdfast"), *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOLDFAST_CACHE": str(folder / "cache")},
    )  # fmt: skip


def members(session):
    """The processes of a session that are not zombies, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def left_after(session, seconds):
    """Who is left of a session after at most so long; they are ended, by their own ids, before this returns."""
    until = time.monotonic() + seconds
    while members(session) and time.monotonic() < until:
        time.sleep(0.1)
    left = members(session)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return left


def killed_at(folder, words, seconds):
    """Starts a command, ends it with -9 after that long. Returns (was it alive, who was left 10 s later)."""
    process = started(folder, words)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        alive = True
    else:
        alive = False
        assert process.returncode == 0, process.stderr.read().decode()
    process.stderr.close()
    return alive, left_after(process.pid, 10)


def whole(folder, words):
    process = started(folder, words)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    assert not left_after(process.pid, 10)


def assert_equal(a, b):
    one, two = results.load(a), results.load(b)
    assert [run.name for run in one.runs] == [run.name for run in two.runs]
    for mine, theirs in zip(one.runs, two.runs, strict=True):
        for column in COLUMNS:
            assert getattr(mine.samples, column) == getattr(theirs.samples, column), (mine.name, column)
        assert (mine.clean, mine.pgd50, mine.robust) == (theirs.clean, theirs.pgd50, theirs.robust)


def words_for(out, *, epochs, losses="sce,isce:s=10", jobs=2):
    return (
        "compare", "--data", "data", "--losses", losses, "--suite", "quick", "--epochs", epochs, "--batch-size", "32",
        "--jobs", jobs, "--device", "cpu", "--out", out,
    )  # fmt: skip


def in_this_process(folder, words, monkeypatch):
    """The same command without the seconds that a start takes."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOLDFAST_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys, "argv", ["holdfast", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def test_two_kills_cost_nothing_but_time(tmp_path, monkeypatch):
    """The first while the first network is trained, the second once it is done: networks one after the other."""
    write_parquet(tmp_path / "data", 100, 40)
    settings = {"epochs": 30, "jobs": 1}
    in_this_process(tmp_path, words_for("unbroken", **settings), monkeypatch)
    first, second = (f"broken/runs/{name}-seed0-fold0" for name in ("sce", "isce_s=10"))
    for sign in (f"{first}/config.json", f"{second}/config.json"):
        process = started(tmp_path, words_for("broken", **settings))
        wait_for(tmp_path / sign)
        assert process.poll() is None
        process.kill()
        process.wait()
        process.stderr.close()
        assert not left_after(process.pid, 10)
        assert not (tmp_path / "broken" / "results.json").exists()
    assert (tmp_path / first / "train.json").exists()
    in_this_process(tmp_path, words_for("broken", **settings), monkeypatch)
    assert_equal(tmp_path / "unbroken", tmp_path / "broken")


def script(folder, code):
    """A process of its own session that runs this code, told the folder; what it says on stderr is kept."""
    file = folder / "script.py"
    file.write_text(code)
    return subprocess.Popen(
        [sys.executable, str(file), str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=folder,
        preexec_fn=in_foreground, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(*files):
    """Until they exist, a minute at most."""
    until = time.monotonic() + 60
    while not all(file.exists() for file in files) and time.monotonic() < until:
        time.sleep(0.01)


ONE_IDLE = """
import sys, time
from pathlib import Path
from holdfast import process_pool

def work(job, progress):
    Path(sys.argv[1], f"began{job}").touch()
    while job:  # job 0 ends at once, and its worker waits for more that never comes
        progress(str(job), "works", 1, 2)
        time.sleep(0.1)

if __name__ == "__main__":
    ended = Path(sys.argv[1], "ended")
    process_pool.run(work, [0, 1], workers=2, progress=lambda *_: None, on_done=lambda job: ended.touch())
"""


def test_an_idle_worker_does_not_outlive_its_parent(tmp_path):
    """Towards the end of a comparison one worker has nothing left to do: a kill then must end it as well."""
    process = script(tmp_path, ONE_IDLE)
    try:
        wait_for(tmp_path / "ended", tmp_path / "began1")
        assert (tmp_path / "ended").exists()
        assert (tmp_path / "began1").exists()
        assert len(members(process.pid)) >= 3
    finally:
        process.kill()
        process.communicate()
        left = left_after(process.pid, 10)
    assert not left, f"{len(left)} processes waited for ever"


@pytest.mark.parametrize(("number", "everyone"), [("SIGTERM", False), ("SIGTERM", True), ("SIGHUP", False)])
def test_a_polite_end_leaves_nothing_behind(number, everyone, tmp_path):
    """No process, no warning of leaked semaphores, and the usual exit status; to the process alone, or to its group."""
    process = script(tmp_path, ONE_IDLE)
    number = getattr(signal, number)
    try:
        wait_for(tmp_path / "ended", tmp_path / "began1")
        (os.killpg if everyone else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
        left = left_after(process.pid, 10)
    assert not left
    assert "semaphore" not in err
    if not everyone:  # where the workers get it too, their end may be noticed first
        assert process.returncode == 128 + number
        assert err == ""


SLOW_TO_START = """
import sys, time
from pathlib import Path

if __name__ == "__mp_main__":  # a worker that is still importing: seconds on a busy machine
    Path(sys.argv[1], "starting").touch()
    time.sleep(3)

from holdfast import process_pool

if __name__ == "__main__":
    try:
        process_pool.run(print, [0, 1], workers=2, progress=lambda *_: None)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_ctrl_c_while_workers_start_leaves_no_traceback(tmp_path):
    """A terminal sends it to the whole group, also to workers that do not ignore it yet."""
    process = script(tmp_path, SLOW_TO_START)
    try:
        wait_for(tmp_path / "starting")
        workers = set(members(process.pid)) - {process.pid}
        for pid in workers:  # they first, so that the command cannot end them before they say anything
            os.kill(pid, signal.SIGINT)
        time.sleep(0.5)
        assert workers <= set(members(process.pid))
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
        left = left_after(process.pid, 10)
    assert not left
    assert (process.returncode, err) == (130, "")


def test_a_kill_at_any_write_of_a_comparison(tmp_path, monkeypatch):
    """What lies in the folder before each rename is what a kill leaves there: each is copied, and resumed from."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SUITES, "tiny", (Stage("apgd", "apgd", settings={"steps": 3}),))
    monkeypatch.setattr("holdfast.checks.CHECKS", CHECKS[:2])  # the audit is long, and its checks write nothing
    monkeypatch.setattr("holdfast.region.measures.N_DISTANCES", 4)
    data = str(write_parquet(tmp_path / "data", 60, 20))
    comparison = Comparison(
        data=data, losses=("sce",), suite="tiny", fit=FitConfig(epochs=2, batch_size=32, checkpoint_seconds=0)
    )
    out, real, left = tmp_path / "out", os.replace, []

    def watched(source, target):
        if out in Path(target).parents:
            left.append(shutil.copytree(out, tmp_path / f"left{len(left)}"))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        compare(comparison, out)
    left.append(out.rename(tmp_path / "whole"))  # after the last one
    wanted = sorted(str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*"))
    assert len(left) > 10
    for k, folder in enumerate(left):
        shutil.copytree(folder, out)
        compare(comparison, out)
        assert_equal(out, tmp_path / "whole")
        found = {str(path.relative_to(out)) for path in out.rglob("*") if not path.name.endswith(".tmp")}
        assert sorted(found) == wanted, k
        for run in (out / "runs").iterdir():
            assert len((run / "log.jsonl").read_text().splitlines()) == 2, k
        shutil.rmtree(out)


@pytest.mark.slow
def test_fifty_kills_at_random_moments(tmp_path, monkeypatch):
    """Each kill falls on a live command, at a moment drawn from its whole length; a finished one begins anew."""
    write_parquet(tmp_path / "data", 600, 400)
    settings = {"epochs": 12, "losses": "sce,isce:s=10,mmc"}
    began = time.monotonic()
    whole(tmp_path, words_for("unbroken", **settings))
    took = time.monotonic() - began
    chance = random.Random(0)
    kills, lives, orphans = 0, 0, []
    words = words_for("broken", **settings)
    while kills < KILLS:
        seconds = chance.uniform(0.05, 1.0) * took
        alive, left = killed_at(tmp_path, words, seconds)
        kills += alive
        if left:
            orphans.append((round(seconds, 2), len(left)))
        if not alive:  # it got to its end between two kills: judge it, and begin anew
            lives += 1
            assert_equal(tmp_path / "unbroken", tmp_path / "broken")
            shutil.rmtree(tmp_path / "broken")
    whole(tmp_path, words)
    assert_equal(tmp_path / "unbroken", tmp_path / "broken")
    monkeypatch.chdir(tmp_path)  # where the comparison's own --data leads
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    assert all(proof.holds for proof in replay(tmp_path / "broken"))
    litter = [path.name for path in (tmp_path / "broken").rglob(".*tmp")]
    print(
        f"{kills} kills over {lives + 1} lives of {took:.1f} s; {len(litter)} temporary files left; orphans {orphans}"
    )
    assert not orphans, f"workers outlived the command (moment, how many): {orphans}"
