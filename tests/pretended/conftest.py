"""The process that has a pretended GPU: built once, started once for all tests that ask it something."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WRITTEN_FOR = "2.13."


@pytest.fixture(scope="session")
def guard(pytestconfig):
    """guard.cpp, compiled for this torch and kept in pytest's cache; made anew when either changes."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this build of torch knows GPUs, and has no room for a pretended one: see the tests marked cuda")
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("a pretended GPU needs Linux and g++")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    include, libraries, source = torch_folder / "include", torch_folder / "lib", HERE / "guard.cpp"
    made = pytestconfig.cache.mkdir("pretended") / f"guard-{torch.__version__}-{source.stat().st_mtime_ns}.so"
    if not made.exists():
        partly = made.with_suffix(f".{os.getpid()}")  # several workers may build at once
        done = subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{include}", source, "-o", partly,
                               f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"],
                              capture_output=True, text=True)
        if done.returncode and not torch.__version__.startswith(WRITTEN_FOR):
            pytest.skip(f"guard.cpp is written for torch {WRITTEN_FOR}*, this is {torch.__version__}")
        assert done.returncode == 0, done.stderr
        partly.replace(made)
    return made


@pytest.fixture(scope="session")
def pretended(guard, tmp_path_factory):
    """pretended(case, **arguments): what a function of cases.py finds on a GPU that is not there."""
    folder = tmp_path_factory.mktemp("pretended")
    log = folder / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, str(HERE / "worker.py"), str(guard), str(folder)],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)

    def ask(case, **arguments):
        process.stdin.write(json.dumps([case, arguments]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the process with the pretended GPU ended: {log.read_text()[-2000:]}"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["found"]

    yield ask
    process.stdin.close()
    process.wait(timeout=60)
