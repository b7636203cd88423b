"""workers.py: a queue whose jobs are small programs, which end well, fail, wait, and are stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time

import pytest
from helpers import read_json

from minipeft.files import locked
from minipeft.runs.budget import Cell
from minipeft.runs.cells import Job
from minipeft.runs.plan import Options
from minipeft.runs.workers import IN_USE, Queue
from minipeft.training.stopping import Stopped

# What a job's process does, by its method; FILE and LOG are put in.
WRITE = ("import json, pathlib, os\nfile = pathlib.Path('FILE')\nfile.parent.mkdir(parents=True, exist_ok=True)\n"
         "assert not file.exists() or 'stale' in file.read_text()\n"
         "json.dump({'cell': CELL, 'best_by': 'loss', 'validation': {'loss': 1},"
         " 'threads': os.environ['OMP_NUM_THREADS']}, file.open('w'))\n")
PROGRAMS = {
    "well": WRITE,
    "slowly": f"import time\nprint('step 3/12: train loss', flush=True)\ntime.sleep(0.7)\n{WRITE}",
    "badly": "print('all went well until')\nraise ValueError('this')",
    "silently": "import sys; sys.exit(3)",
    "killed": "import os\nprint('step 3/12: all well', flush=True)\nos.kill(os.getpid(), 9)",
    "elsewhere": f"import sys; sys.exit({IN_USE})",
    "for_ever": "import pathlib, signal, sys, time\n"
                "def end(*_): pathlib.Path('FILE.saved').touch(); sys.exit(143)\n"
                "signal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\ntime.sleep(100)"}


@pytest.fixture
def queue(tmp_path):
    """queue(*methods, **options): a queue of a job each, what it started, and what it printed."""
    (tmp_path / "cells").mkdir()

    def make(*methods, wanted=None, workers=2, retry=False, measuring=None):
        names = [Cell("films", method, 0, "final") for method in methods]

        def command(job):
            made.started.append(job.cell.method)
            return [sys.executable, "-c", PROGRAMS[job.cell.method].replace("FILE", str(job.file)).replace(
                "CELL", repr(dataclasses.asdict(job.cell)))]

        made = Queue(lambda cell: Job(cell, Options(output=str(tmp_path / cell.method)),
                                      tmp_path / "cells" / f"{cell.method}.json", {}),
                     wanted or (lambda: names), lambda cell: 1.0, lambda: 4.0, command, workers, 1, print, retry,
                     measuring)
        made.started = []
        return made

    return make


def test_each_job_has_a_process_and_its_file_is_read(queue, capsys):
    work = queue("well", "slowly")
    work.run()
    assert work.started == ["well", "slowly"] and not work.failed and not work.running
    assert [found["threads"] for found in work.results.values()] == ["1", "1"]
    assert re.search(r"films/well_seed0: validation loss 1 \(\d+ s; \d+ min left\)", capsys.readouterr().out)


def test_no_more_processes_than_workers(queue):
    most = []
    work = queue("slowly", "well", workers=1)
    show = work._show
    work._show = lambda bar: (most.append(len(work.running)), show(bar))
    work.run()
    assert max(most) == 1 and len(work.results) == 2


def test_what_is_there_is_not_run_again(queue):
    queue("well").run()
    work = queue("well", "slowly")
    work.run()
    assert work.started == ["slowly"] and len(work.results) == 2


def test_a_failed_job_is_reported_once_and_stops_nothing_else(queue, tmp_path, capsys):
    work = queue("badly", "silently", "well", workers=1)
    work.run()
    reasons = {cell.method: reason for cell, reason in work.failed.items()}
    assert reasons == {"badly": "ValueError: this", "silently": "ended with exit code 3"}
    assert (tmp_path / "cells" / "badly.error").read_text() == "ValueError: this\n", "by the folder's name"
    assert "films/badly_seed0 failed: ValueError: this" in capsys.readouterr().out
    assert [cell.method for cell in work.results] == ["well"]
    again = queue("badly", "well")
    again.run()
    assert again.started == [] and list(again.failed.values()) == ["ValueError: this"]
    retried = queue("badly", "well", retry=True)
    retried.run()
    assert retried.started == ["badly"] and list(retried.failed.values()) == ["ValueError: this"]


def test_a_file_of_the_same_name_and_other_settings_is_not_taken_for_the_cells(queue, tmp_path):
    stale = dataclasses.replace(Cell("films", "well", 0, "final"), values=(("learning_rate", 0.5),))
    (tmp_path / "cells" / "well.json").write_text(json.dumps({"cell": dataclasses.asdict(stale), "stale": True}))
    work = queue("well")
    work.run()
    assert work.started == ["well"] and "stale" not in work.results[Cell("films", "well", 0, "final")]


def test_what_a_signal_killed_says_so(queue):
    work = queue("killed")
    work.run()
    assert list(work.failed.values()) == ["killed by signal 9"]


def test_what_is_wanted_may_depend_on_what_has_ended(queue):
    first, second = Cell("films", "well", 0, "final"), Cell("films", "slowly", 0, "final")
    work = queue(wanted=lambda: [first, second] if work.ended(first) else [first])
    work.run()
    assert work.started == ["well", "slowly"]


@pytest.mark.parametrize("place", ["well", "well/claim", "results"])
def test_a_job_waits_while_another_start_is_at_it_or_measures_costs(queue, tmp_path, place):
    """At it by its process, or by the claim of one that has not imported yet."""
    work, seen = queue("well", measuring=tmp_path / "results"), []
    held = threading.Event()

    def hold():
        with locked(tmp_path / place):
            held.set()
            time.sleep(1)
            seen.extend([*work.started, *tmp_path.rglob("log.txt")])

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    started = time.monotonic()
    work.run()
    other.join()
    assert time.monotonic() - started > 0.7 and not seen and work.started == ["well"]


def test_two_starts_never_run_the_same_job_and_leave_no_claim(queue, tmp_path):
    both = [queue("slowly", "well", workers=1) for _ in range(2)]
    others = [threading.Thread(target=work.run) for work in both]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert sorted(both[0].started + both[1].started) == ["slowly", "well"]
    assert not list(tmp_path.rglob(".lock")) and not list(tmp_path.rglob("claim"))


def test_a_claim_that_a_crash_left_behind_holds_nothing_up(queue, tmp_path):
    (tmp_path / "well" / "claim").mkdir(parents=True)
    (tmp_path / "well" / "claim" / ".lock").write_text("process 1 on nowhere")
    work = queue("well")
    work.run()
    assert work.started == ["well"] and not (tmp_path / "well" / "claim" / ".lock").exists()


def test_a_process_that_finds_another_one_at_its_job_has_not_failed(queue, tmp_path):
    work = queue("elsewhere")
    go_on = work._go_on

    def until_it_is_there(bar):
        if len(work.started) == 2:
            cell = dataclasses.asdict(Cell("films", "elsewhere", 0, "final"))
            (tmp_path / "cells" / "elsewhere.json").write_text(json.dumps(
                {"cell": cell, "best_by": "loss", "validation": {"loss": 1}}))
        return go_on(bar)

    work._go_on = until_it_is_there
    work.run()
    assert not work.failed and len(work.results) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_asks_its_processes_and_waits_until_they_have_saved(queue, tmp_path, number):
    work = queue("for_ever")

    def stop_when_it_runs():
        log = tmp_path / "for_ever" / "log.txt"
        while not (log.is_file() and log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_when_it_runs).start()
    with pytest.raises(Stopped) as stopped:
        work.run()
    assert stopped.value.number == number and (tmp_path / "cells" / "for_ever.json.saved").exists()
    assert not work.failed and not (tmp_path / "cells" / "for_ever.error").exists()


def test_how_far_a_job_is_follows_from_what_it_printed(queue):
    work = queue("slowly")
    shares = []
    show = work._show
    work._show = lambda bar: (shares.extend(running.share_done() for running in work.running.values()), show(bar))
    work.run()
    assert set(shares) == {0.0, 0.25}
    assert read_json(work._jobs[Cell("films", "slowly", 0, "final")].file)["threads"] == "1"
