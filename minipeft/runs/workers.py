"""A queue of jobs, a process each, several at a time: what has ended decides what is to be run next.

A job's result is its file. What is there is never run again; what failed leaves its last line in an error file and
stops nothing else; what another start of the queue is at, by its lock, is waited for. There are two locks: the queue
claims a job before it starts the process, which locks the job's folder once it has imported. The operating system takes
both away when their process ends, also in a crash. Asked to stop, the queue lets its processes save their states.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minipeft.errors import InUseError
from minipeft.files import is_locked, locked, write_text_file
from minipeft.runs.budget import Cell
from minipeft.runs.cells import Job
from minipeft.runs.plan import Say
from minipeft.training.progress import progress_bar
from minipeft.training.stopping import Stopped, stop_between_steps

IN_USE = 75   # a process's exit code: another one is at its job
PAUSE = 0.2   # seconds between looks
AGAIN = 20    # seconds after which a process that was asked to stop is asked again: a library in C may lose a signal
ASKED = 15    # so many times, then it is killed
CLAIM = "claim"  # in a job's folder: the folder that a queue locks


@dataclass
class Running:
    """A process at its job."""

    job: Job
    process: subprocess.Popen
    claim: ExitStack  # to be closed when it has ended
    started: float = field(default_factory=time.monotonic)

    def share_done(self) -> float:
        """How far it is, by the last step that it printed."""
        for line in reversed(_tail(self.job.log_file)):
            word, _, steps = line.partition(" ")
            step, _, all_steps = steps.partition(":")[0].partition("/")
            if word == "step" and step.isdigit() and all_steps.isdigit():
                return int(step) / int(all_steps)
        return 0.0


class Queue:
    """Jobs and how they stand.

    Attributes:
        results: what the files of the jobs that have ended hold.
        failed: the last line of those that failed.
        running: by cell.
    """

    def __init__(self, job_of: Callable[[Cell], Job], wanted: Callable[[], Iterable[Cell]],
                 cost: Callable[[Cell], float], total: Callable[[], float], command: Callable[[Job], list[str]],
                 workers: int, threads: int, say: Say, retry: bool = False,
                 measuring: Path | None = None) -> None:
        """
        Args:
            wanted: the cells that are known by now; asked again whenever one has ended.
            cost: what a cell takes about, in core seconds; `total` of all there will be.
            command: what runs a job, in a process of its own.
            threads: of each process.
            retry: run again what has failed before.
            measuring: a folder; while another start has its lock, to measure costs, nothing is started.
        """
        self.job_of, self.wanted, self.cost, self.total, self.command = job_of, wanted, cost, total, command
        self.workers, self.threads, self.say, self.measuring = workers, threads, say, measuring
        self.results: dict[Cell, dict[str, Any]] = {}
        self.failed: dict[Cell, str] = {}
        self.running: dict[Cell, Running] = {}
        self._jobs: dict[Cell, Job] = {}
        self._retried: set[Cell] | None = set() if retry else None
        self._started_at, self._begun = time.monotonic(), 0.0

    def ended(self, cell: Cell) -> bool:
        """Whether a cell's file is there, or it has failed."""
        if cell not in self._jobs:
            self._jobs[cell] = self.job_of(cell)
        job = self._jobs[cell]
        if cell in self.results or cell in self.failed:
            return True
        if (found := job.found()) is not None:
            self.results[cell] = found
        elif job.error_file.is_file():
            if self._retried is not None and cell not in self._retried:
                self._retried.add(cell)
                job.error_file.unlink(missing_ok=True)
                return False
            self.failed[cell] = job.error_file.read_text(encoding="utf-8").strip()
        return cell in self.results or cell in self.failed

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What an ended cell's file holds; None of one that failed, or has not ended."""
        return self.results.get(cell) if self.ended(cell) else None

    def run(self) -> None:
        """Run all jobs that are wanted, to the end of the last.

        Raises:
            Stopped: a signal asked to; the processes have saved their states.
        """
        with stop_between_steps() as signal_that_came, self._no_process_left():
            list(map(self.ended, self.wanted()))
            self._begun = self._done()
            with progress_bar(1, "core s", "comparing") as bar:
                bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {postfix}"
                while not signal_that_came() and self._go_on(bar):
                    time.sleep(PAUSE)
            if signal_that_came():
                self._stop()
                raise Stopped(signal_that_came())

    def _go_on(self, bar: tqdm) -> bool:
        """Look after the processes once; whether anything is left to do."""
        for cell, running in list(self.running.items()):
            if running.process.poll() is not None:
                del self.running[cell]
                self._has_ended(running, bar)
        left = [cell for cell in self.wanted() if not self.ended(cell)]
        for cell in left if not self._has_to_wait() else ():
            if len(self.running) < self.workers and cell not in self.running:
                self._start(self._jobs[cell])
        self._show(bar)
        return bool(left or self.running)

    def _has_to_wait(self) -> bool:
        return self.measuring is not None and is_locked(self.measuring)

    def _start(self, job: Job) -> None:
        """Start a job's process, if no other start is at it. The claim comes before the looks: whoever measures costs
        takes that lock first, then looks for claims, so that one of the two always sees the other."""
        with suppress(InUseError), ExitStack() as claim:
            claim.enter_context(locked(job.folder / CLAIM))
            # A folder may be locked without a claim, if a queue has died and its process has not yet.
            if self._has_to_wait() or is_locked(job.folder) or job.found() is not None:
                return
            threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            with job.log_file.open("w", encoding="utf-8") as log:
                # A session of its own: Ctrl-C reaches this process alone, which asks the others. They notice by the
                # pipe to their standard input if it dies.
                process = subprocess.Popen(self.command(job), stdin=subprocess.PIPE, stdout=log, stderr=log,
                                           env={**os.environ, **threads}, start_new_session=True)
            self.running[job.cell] = Running(job, process, claim.pop_all())

    def _has_ended(self, running: Running, bar: tqdm) -> None:
        """Say how a process ended, and note if it failed."""
        job, code = running.job, running.process.returncode
        running.process.stdin.close()
        running.claim.close()
        if (found := job.found()) is not None:
            seconds = time.monotonic() - running.started
            self.ended(job.cell)
            bar.write(f"{job.cell}: {headline_of(found)} ({seconds:.0f} s; {self._time_left()})", file=sys.stdout)
            job.log_file.unlink(missing_ok=True)
            with suppress(OSError):
                job.folder.rmdir()
        elif code != IN_USE:
            lines = [line for line in _tail(job.log_file) if line.strip()]
            reason = lines[-1] if lines else f"ended with exit code {code}"
            if code < 0:  # its last line is of something else
                reason = f"killed by signal {-code}"
            write_text_file(job.error_file, f"{reason}\n")
            bar.write(f"{job.cell} failed: {reason}", file=sys.stdout)

    def _done(self) -> float:
        """Core seconds' worth of work that is done, of `total`."""
        ended = sum(self.cost(cell) for cell in (*self.results, *self.failed))
        return ended + sum(running.share_done() * self.cost(cell) for cell, running in self.running.items())

    def _time_left(self) -> str:
        """In words, at the pace of this start."""
        done = self._done()
        if done <= self._begun:
            return "time left not known yet"
        minutes = (self.total() - done) / (done - self._begun) * (time.monotonic() - self._started_at) / 60
        return f"{minutes / 60:.1f} h left" if minutes > 90 else f"{max(0.0, minutes):.0f} min left"

    def _show(self, bar: tqdm) -> None:
        """Move the bar, where there is one."""
        if not bar.disable:
            bar.total, bar.n = max(self.total(), 1), min(self._done(), self.total())
            runs = ", ".join(f"{cell} {running.share_done():.0%}" for cell, running in self.running.items())
            bar.set_postfix_str(f"{self._time_left()}: {runs}", refresh=True)

    def _stop(self) -> None:
        """Ask the processes to stop, and give them time to save."""
        for _ in range(ASKED):
            left = [running.process for running in self.running.values() if running.process.poll() is None]
            for process in left:
                process.terminate()
            until = time.monotonic() + AGAIN
            for process in left:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))

    @contextmanager
    def _no_process_left(self) -> Iterator[None]:
        """A block after which no process is left, however it ends."""
        try:
            yield
        finally:
            for running in self.running.values():
                running.process.kill()
                running.process.wait()
                running.claim.close()
            self.running.clear()


def headline_of(results: dict[str, Any]) -> str:
    """A cell's result in a few words."""
    if "validation" in results:
        by = results["best_by"]
        return f"validation {by} {results['validation'].get(by)}"
    if "metrics" not in results:
        return f"{results['costs']['core_seconds_per_1000_examples']:.1f} core seconds per 1,000 examples"
    name, tests = results["headline"], results["metrics"]
    found = {"": tests["test"]} if "test" in tests else tests
    return ", ".join(f"{f'{key} '.replace('_', ' ') if key else ''}{name} {metrics[name]}"
                     for key, metrics in found.items())


def _tail(path: Path, most: int = 4000) -> list[str]:
    """The last lines of a file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
