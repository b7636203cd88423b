"""minipeft compare as a user calls it: real processes, stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import SCRIPTS, read_json, write_tiny_model

from minipeft.commands.compare import command
from minipeft.files import is_locked
from minipeft.runs.budget import Cell
from minipeft.runs.cells import Job
from minipeft.runs.plan import Options


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory):
    """A tiny model with room for virtual tokens."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "roomy", n_positions=128)


def compare(model, *options):
    """scripts/compare.py in a process of its own, on films.csv."""
    command = [sys.executable, str(SCRIPTS / "compare.py"), "--datasets", "films.csv", "--model", str(model),
               "--precision", "fp32", "--workers", "2", *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_compare_runs_cells_in_processes_writes_the_comparison_and_runs_nothing_twice(roomy_model, folder):
    options = ("--methods", "baseline,ia3", "bitfit", "--no-tuning", "--epochs", 1, "--seeds", 2)
    first = compare(roomy_model, *options)
    said, errors = first.communicate(timeout=500)
    assert first.returncode == 0, errors
    assert "| ia3 | learning_rate 0.005 | " in said and "| zero-shot by prompt | - |" in said
    found = read_json("results/comparison.json")["datasets"]["films"]
    assert found["methods"].keys() == {"ia3", "bitfit"} and found["methods"]["ia3"]["seeds"] == [0, 1]
    left = {path.name.partition("-")[0] for path in folder.glob("checkpoints/cells/films/*-*")}
    assert left == {"ia3_seed0", "ia3_seed1", "bitfit_seed0", "bitfit_seed1"}
    assert not list(folder.glob("checkpoints/cells/films/costs/*")) and not list(folder.rglob("log.txt"))
    again = compare(roomy_model, *options)
    said, _ = again.communicate(timeout=500)
    assert again.returncode == 0 and "11 of them there" in said and "| ia3 | " in said


@pytest.mark.slow
@pytest.mark.kind("0: SIGTERM, SIGHUP and Ctrl-C save and end with 128 + signal")
def test_ctrl_c_stops_the_runs_of_a_comparison_which_save_and_go_on_with_the_next_start(roomy_model, folder):
    options = ("--methods", "lora", "--no-tuning", "--epochs", 60, "--batch-size", 4)
    running = compare(roomy_model, *options)

    def states():
        return list(folder.glob("checkpoints/cells/films/*/training_state/*.safetensors"))

    while not states():
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and errors.rstrip().endswith("interrupted")
    assert states() and not list(folder.rglob("*.error")) and not list(folder.rglob(".lock"))
    resumed = compare(roomy_model, *options)
    _, errors = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, errors
    (curve,) = read_json("results/comparison.json")["datasets"]["films"]["methods"]["lora"]["curves"]
    assert len(curve) == 2 * 60 and not states()


@pytest.mark.slow
def test_a_comparison_that_is_killed_takes_its_runs_with_it(roomy_model, folder):
    running = compare(roomy_model, "--methods", "lora", "--no-tuning", "--epochs", 4000)
    while not (locks := list(folder.glob("checkpoints/cells/films/*/.lock"))) or not locks[0].read_text():
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    running.kill()
    running.communicate()
    deadline = time.monotonic() + 300
    while any(is_locked(lock.parent) for lock in folder.rglob(".lock")):  # a claim's file stays, and holds nothing up
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(folder.glob("checkpoints/cells/films/*/training_state")) or not list(folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_two_starts_at_once_share_the_work(roomy_model, folder):
    options = ("--methods", "ia3,bitfit", "--no-tuning", "--epochs", 1, "--seeds", 2)
    both = [compare(roomy_model, *options) for _ in range(2)]
    said = []
    for running in both:
        output, errors = running.communicate(timeout=500)
        assert running.returncode == 0, errors
        said.append(output)
    assert said[0].partition("\nfilms\n")[2] == said[1].partition("\nfilms\n")[2] != ""
    assert len(list(folder.glob("results/cells/films/*.json"))) == 4 and not list(folder.rglob("*.error"))
    made = [path.stat().st_mtime_ns for path in folder.glob("results/cells/films/*.json")]
    assert compare(roomy_model, *options).wait(timeout=500) == 0
    assert [path.stat().st_mtime_ns for path in folder.glob("results/cells/films/*.json")] == made


# --- what runs a cell -------------------------------------------------------------------------------------------------

JOB = Job(Cell("films", "lora", 0, "final"), Options(), Path("cells", "x.json"), {})


def test_a_cells_process_imports_nothing_from_the_folder_it_is_started_in(folder):
    """Neither another program's data folder nor a stranger's download says what `import signal` means."""
    (folder / "signal.py").write_text("raise SystemExit('a stranger')")
    done = subprocess.run([*command(JOB)[:-2], "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: minipeft compare ")


def test_a_cells_process_imports_the_library_that_its_comparison_runs(folder, monkeypatch):
    """Also where that is a clone that is not installed, found by whatever way."""
    package = folder / "clone" / "minipeft"
    (package / "commands").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "commands" / "start.py").write_text("import sys\ndef main(): print(sys.argv)")
    monkeypatch.syspath_prepend(folder / "clone")
    done = subprocess.run(command(JOB), capture_output=True, text=True)
    assert done.stdout == f"{['minipeft', 'compare', '--cell', JOB.as_json()]}\n", done.stderr


def test_a_cells_process_is_known_by_its_command_line():
    assert " minipeft compare --cell {" in " ".join(command(JOB))


# --- what is refused --------------------------------------------------------------------------------------------------

def test_compare_refuses_what_is_wrong_in_one_line(script, tiny_model):
    for options, message in ((("--methods", "lora,lorra"), "unknown method 'lorra': use baseline, full"),
                             (("--train-size", "imdb=all"), "--train-size 'imdb=all' is neither a number nor"),
                             (("--train-size", "imdb=9"), "--train-size names imdb, which is not among --datasets"),
                             (("--model", tiny_model), "keeps 80 for virtual tokens"),
                             (("--workers", "0"), "--workers must be a positive integer, got 0")):
        outcome = script("compare.py", "--datasets", "films.csv", *options)
        assert outcome.code == 2 and len(outcome.error_lines) == 1 and message in outcome.err
