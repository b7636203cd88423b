"""Being stopped, and two runs at once: nothing is lost, and the exit code says what happened."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from helpers import SCRIPTS, files_below, read_json

pytestmark = pytest.mark.slow
STATE = ("checkpoints", "lora_films_finetuned", "training_state", "training_state.safetensors")


def train(tiny_model, *options):
    """scripts/train.py in a process of its own, on films.csv, long enough to be stopped."""
    command = [sys.executable, str(SCRIPTS / "train.py"), "--dataset", "films.csv", "--model", str(tiny_model),
               "--precision", "fp32", "--batch-size", "4", *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(path, process):
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.kind("0: SIGTERM, SIGHUP and Ctrl-C save and end with 128 + signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_the_state_and_the_adapter_and_resuming_goes_on(tiny_model, folder, number):
    running = train(tiny_model, "--epochs", 1000)
    wait_for(folder.joinpath(*STATE), running)
    running.send_signal(number)
    said, errors = running.communicate(timeout=100)
    assert running.returncode == 128 + number, errors
    assert "--resume goes on from here" in said and errors.rstrip().endswith("interrupted")
    left = {path.name for path in (folder / "checkpoints" / "lora_films_finetuned").iterdir()}
    assert left == {"adapter_config.json", "adapter_model.safetensors", "minipeft.json", "training_state"}
    resumed = train(tiny_model, "--epochs", 1000, "--resume")
    said, errors = "", ""
    time.sleep(6)
    resumed.send_signal(signal.SIGTERM)
    said, errors = resumed.communicate(timeout=100)
    assert resumed.returncode == 128 + signal.SIGTERM, errors


@pytest.mark.kind("0: SIGTERM, SIGHUP and Ctrl-C save and end with 128 + signal")
def test_a_signal_before_training_ends_the_run_with_its_code_and_leaves_nothing(tiny_model, folder):
    running = train(tiny_model, "--epochs", 1000)
    assert running.stdout.readline().startswith("device")
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=100)
    assert running.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert not [path for path in files_below(folder) if ".writing" in path or path.endswith(".lock")]


@pytest.mark.kind("0: the state is saved every few minutes")
def test_the_state_is_saved_now_and_then_also_without_a_validation(tiny_model, folder):
    running = train(tiny_model, "--epochs", 1, "--train-size", 32, "--batch-size", 1, "--evaluations-per-epoch", 1,
                    "--save-minutes", 1e-6)
    wait_for(folder.joinpath(*STATE), running)
    assert not (folder / "checkpoints" / "lora_films_finetuned" / "adapter_config.json").exists()  # no validation yet
    running.communicate(timeout=100)
    assert running.returncode == 0


@pytest.mark.kind("0: two runs in one output folder")
def test_of_two_runs_in_one_output_folder_the_second_is_refused_and_the_first_ends_well(tiny_model, folder):
    first = train(tiny_model, "--epochs", 60)
    wait_for(folder / "checkpoints" / "lora_films_finetuned" / ".lock", first)
    second = train(tiny_model, "--epochs", 1, "--seed", 1)
    _, errors = second.communicate(timeout=100)
    assert second.returncode == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert f"checkpoints/lora_films_finetuned is in use by another run (process {first.pid} on " in line
    _, errors = first.communicate(timeout=200)
    assert first.returncode == 0, errors
    assert read_json("results/fine_tuned_lora_films_results.json")["seed"] == 0


@pytest.mark.kind("0: leftovers of killed processes")
def test_a_killed_run_leaves_no_lock_and_the_next_run_clears_what_it_was_writing(tiny_model, folder):
    first = train(tiny_model, "--epochs", 1000)
    wait_for(folder.joinpath(*STATE), first)
    first.kill()
    first.wait()
    second = train(tiny_model, "--epochs", 1, "--resume")
    _, errors = second.communicate(timeout=100)
    assert second.returncode == 2 and "epochs" in errors  # other settings: the state was not lost
    second = train(tiny_model, "--epochs", 1)
    _, errors = second.communicate(timeout=100)
    assert second.returncode == 2 and "epochs 1000, not 1" in errors and "--overwrite" in errors
    second = train(tiny_model, "--epochs", 1, "--overwrite")
    _, errors = second.communicate(timeout=100)
    assert second.returncode == 0, errors
    assert not [path for path in files_below(folder) if ".writing" in path or path.endswith(".lock")]
