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


@pytest.fixture(scope="session")
def guard(pytestconfig):
    """guard.cpp, compiled for this torch and kept in pytest's cache; made anew when either changes."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this build of torch knows GPUs, and has no room for a pretended one: see the tests marked cuda")
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("a pretended GPU needs Linux and g++")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    source = HERE / "guard.cpp"
    made = pytestconfig.cache.mkdir("pretended") / f"guard-{torch.__version__}-{source.stat().st_mtime_ns}.so"
    if not made.exists():
        partly = made.with_suffix(f".{os.getpid()}")  # several workers may build at once
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", source, "-o", partly,
                        f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"],
                       check=True)
        partly.replace(made)
    return made


@pytest.fixture(scope="session")
def pretended(guard, tmp_path_factory):
    """pretended(case, **arguments): what a function of cases.py finds on a GPU that is not there."""
    log = tmp_path_factory.mktemp("pretended") / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, str(HERE / "worker.py"), str(guard)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=errors, text=True)

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
