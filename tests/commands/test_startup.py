"""How a command starts: `--help` without torch, no import that is not used, Ctrl-C in one line, threads wait asleep."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from minipeft.commands.start import COMMANDS, SPINS, main
from minipeft.methods import METHODS

START = "from minipeft.commands.start import main; main()"
# Runs a command, and says last what is in sys.modules that Python did not bring and was not there before.
NOTING = """
import atexit, json, sys
def third_party():
    return {name for name, module in sys.modules.items()
            if "site-packages" in (getattr(module, "__file__", None) or "")}
before = third_party()
atexit.register(lambda: print("\\n" + json.dumps(sorted(third_party() - before))))
sys.argv = ["minipeft", *sys.argv[1:]]
from minipeft.commands.start import main
main()
"""


def run(code, *arguments, **environment):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "100", **environment})


def imported_by(*arguments):
    """The top-level packages that a command imports, and torch's parts by name."""
    done = run(NOTING, *arguments)
    assert done.returncode == 0, done.stderr
    return {name if name.startswith("torch.") else name.partition(".")[0]
            for name in json.loads(done.stdout.splitlines()[-1])}


# --- help -------------------------------------------------------------------------------------------------------------

@pytest.mark.kind("7: help is there before torch")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_but_python(name):
    assert imported_by(name, "--help") == set()


@pytest.mark.parametrize("arguments", [
    *((name,) for name in COMMANDS), *(("train", "--method", name) for name in (*METHODS, "baseline")),
    ("anatomy", "--method", "vera")], ids=" ".join)
def test_help_without_torch_says_the_same_as_with_it(arguments, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["minipeft", *arguments, "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "torch" in sys.modules
    assert run(START, *arguments, "--help").stdout == capsys.readouterr().out


def test_a_mistake_beside_help_is_one_line():
    done = run(START, "train", "--method", "lorra", "--help")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: unknown method 'lorra': use ")


def test_help_as_a_text_to_read_is_no_question(tmp_path):
    done = run(START, "predict", "--adapter", tmp_path, "--", "--help")
    assert done.returncode == 2 and "holds neither" in done.stderr


# --- imports ----------------------------------------------------------------------------------------------------------

def test_the_library_is_there_without_torch_until_a_name_is_asked_for():
    done = run("import sys, minipeft; before = 'torch' in sys.modules; minipeft.LoraConfig; "
               "print(before, 'torch' in sys.modules, minipeft.methods.lora.LoraConfig is minipeft.LoraConfig, "
               "set(minipeft.__all__) <= set(dir(minipeft)))")
    assert done.stdout.split() == ["False", "True", "True", "True"], done.stderr
    done = run("from minipeft import *; inject, METHODS, GPT2Model, generate; import minipeft; minipeft.nothing")
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'minipeft' has no attribute 'nothing'"


@pytest.mark.kind("7: predict imports what it uses")
def test_predict_imports_only_what_it_uses(script, tiny_model):
    assert script("train.py", "--model", tiny_model, "--dataset", "films.csv", "--epochs", 1).code == 0
    imported = imported_by("predict", "a good film")
    assert {"torch", "safetensors", "tiktoken"} <= imported
    assert not imported & {"datasets", "pandas", "matplotlib", "sklearn", "scipy", "sacrebleu", "rouge_score",
                           "seqeval", "huggingface_hub", "torch._dynamo", "sympy"}


@pytest.mark.slow
def test_help_and_predict_start_soon(script, tiny_model):
    """Seconds that the processor computes, so that a busy machine says the same; twice what was measured at least."""
    assert script("train.py", "--model", tiny_model, "--dataset", "films.csv", "--epochs", 1).code == 0
    for arguments, limit in (("train", "--help"), 1), (("predict", "a good film"), 5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(START, *arguments, OMP_NUM_THREADS="1").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < limit


# --- the environment and signals --------------------------------------------------------------------------------------

def with_torch_that(tmp_path, does):
    """A folder with a module called torch that does this when it is imported."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "torch.py").write_text(f"import os, signal, sys, time\n{does}\n", encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "first"), *sys.path])}


@pytest.mark.kind("7: Ctrl-C during imports is one line")
@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_ctrl_c_during_imports_is_one_line(tmp_path, signal):
    does = (f"try:\n    os.kill(os.getpid(), signal.{signal}); time.sleep(9)\n"
            "except BaseException: pass  # as some do\ntime.sleep(9)")
    done = run(START, "predict", "x", **with_torch_that(tmp_path, does))
    number = {"SIGINT": 2, "SIGTERM": 15}[signal]
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "interrupted\n")


@pytest.mark.kind("7: threads do not spin on a busy machine")
@pytest.mark.parametrize(("own", "expected"), [
    ({}, SPINS), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_soon_sleep_unless_the_user_says_otherwise(tmp_path, monkeypatch, own, expected):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    more = with_torch_that(tmp_path, "print(os.environ.get('GOMP_SPINCOUNT'), flush=True); os._exit(0)")
    assert run(START, "predict", "x", **more, **own).stdout == f"{expected}\n"


def test_the_library_itself_leaves_the_environment_alone():
    code = "import os; before = dict(os.environ); import minipeft; minipeft.inject; print(dict(os.environ) == before)"
    assert run(code).stdout == "True\n"
