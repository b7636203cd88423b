"""The package as `pip install` makes it: a wheel with the bundled model in it, used from another folder."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from helpers import write_csv, write_tiny_model

from minipeft.commands.start import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "checkpoints" / "mini"

USE_IT = """
    from pathlib import Path

    import torch

    import minipeft
    from minipeft.data.datasets import load_dataset
    from minipeft.model.hub import MINI_FOLDER
    from minipeft.tasks import task_for

    model = minipeft.GPT2ForSequenceClassification.from_pretrained("mini")
    tokenizer = minipeft.get_tokenizer("mini")
    data = load_dataset("sample", task_for("sample"))
    logits = model(torch.tensor([tokenizer.encode(data.test.texts[0])]))
    print(Path(minipeft.__file__).parent, MINI_FOLDER, tokenizer.vocab_size, len(data.train), *logits.shape)
    """


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the repository, built from a copy, so that nothing of an earlier build gets into it.

    The build is setuptools' own, which pip would call, too: it needs no network.
    """
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "minipeft", source / "minipeft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(MINI, source / "checkpoints" / "mini")
    built = subprocess.run([sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')"],
                           cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    [path] = source.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_every_file_of_the_package(wheel):
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "minipeft").rglob("*")
             if path.is_file() and "__pycache__" not in path.parts}
    files |= {f"minipeft/mini/{path.name}": path for path in MINI.iterdir()}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files.keys()
    assert all(wheel.read(name) == path.read_bytes() for name, path in files.items())


@pytest.mark.slow
def test_an_installed_package_has_mini_and_the_sample_in_any_folder(wheel, tmp_path):
    wheel.extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    used = subprocess.run([sys.executable, "-c", textwrap.dedent(USE_IT)], cwd=tmp_path / "elsewhere",
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")}, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr[-3000:]
    package = tmp_path / "installed" / "minipeft"
    assert used.stdout.split() == [str(package), str(package / "mini"), "8192", "1068", "1", "2"]


def test_the_wheel_brings_the_minipeft_command(wheel):
    [entries] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert wheel.read(entries).decode().split("\n", 1)[1].strip() == "minipeft = minipeft.commands.start:main"


@pytest.mark.slow
@pytest.mark.kind("7: pip install gives a minipeft command")
def test_the_installed_command_trains_and_compares_in_any_folder(wheel, tmp_path):
    """As in pip's own script for it, the entry point's function is called. Its processes find the package, too."""
    wheel.extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    write_csv(tmp_path / "elsewhere" / "films.csv")
    tiny = write_tiny_model(tmp_path / "tiny", n_positions=128)  # with room for virtual tokens

    def minipeft(*arguments):
        code = "import sys; from minipeft.commands.start import main; sys.exit(main())"
        return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=tmp_path / "elsewhere", text=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")}, capture_output=True)

    shown = minipeft()
    assert shown.returncode == 0 and all(f"\n  {name} " in shown.stdout for name in COMMANDS)
    assert (minipeft("trian").returncode, minipeft("trian").stderr.count("\n")) == (2, 1)
    compared = minipeft("compare", "--methods", "bitfit", "--model", tiny, "--datasets", "films.csv", "--no-tuning")
    assert compared.returncode == 0, compared.stderr
    assert "| bitfit | " in compared.stdout
    (adapter,) = (tmp_path / "elsewhere").glob("checkpoints/cells/films/bitfit_*")
    asked = minipeft("evaluate", "--adapter", adapter, "--dataset", "films.csv")
    assert asked.returncode == 0 and "4 of 4 test examples" in asked.stdout, asked.stderr


# --- what it declares -------------------------------------------------------------------------------------------------

def normalized(distribution):
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared(wheel):
    """(distributions that an installation brings, those that only extras for users bring)."""
    [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    always, extras = set(), set()
    for requirement in message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
        name = normalized(re.match(r"[\w.-]+", requirement)[0])
        if "extra ==" not in requirement:
            always.add(name)
        elif not re.search(r"extra == ['\"]dev['\"]", requirement):
            extras.add(name)
    return always, extras


def imports(statements, at_top=True):
    """Each imported module's top-level name, and whether importing the file imports it."""
    for statement in statements:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue  # never imported
        if isinstance(statement, ast.Import):
            yield from ((alias.name.partition(".")[0], at_top) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
            yield statement.module.partition(".")[0], at_top
        inside = isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from imports(ast.iter_child_nodes(statement), at_top and not inside)


def third_party_imports():
    """(file, distributions that bring the module, whether at the file's top) of each import of the package."""
    distributions = packages_distributions()
    for path in sorted((ROOT / "minipeft").rglob("*.py")):
        for module, at_top in imports(ast.parse(path.read_text(encoding="utf-8")).body):
            if module != "minipeft" and module not in sys.stdlib_module_names:
                yield (path.relative_to(ROOT).as_posix(),
                       {normalized(name) for name in distributions.get(module, [module])}, at_top)


def test_every_import_is_a_declared_dependency(wheel):
    """At a file's top only what every installation has; inside a function also what an extra brings."""
    always, extras = declared(wheel)
    undeclared = [(file, *names) for file, names, at_top in third_party_imports()
                  if not names & (always if at_top else always | extras)]
    assert undeclared == []


def test_every_dependency_is_imported(wheel):
    always, _ = declared(wheel)
    assert always <= {name for _, names, _ in third_party_imports() for name in names}
