"""The pages say what is true: links, commands, figures and tables, and the code in them runs as it is printed."""

import json
import re
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from documents import (
    NOTEBOOKS,
    PAGES,
    README,
    ROOT,
    code_blocks,
    commands,
    dead_links,
    links,
    markdown_cells,
    own_text,
    results_changed,
)
from helpers import ScriptRunner, write_csv, write_tiny_model
from models import IDS, MASK, adapter_modules, assert_same_tensors, build, perturb, with_new_head
from tables import write_speed

from minipeft import (
    GPT2ForSequenceClassification,
    LoraConfig,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    unmerge,
)
from minipeft.errors import ConfigError
from minipeft.explain.memory import traffic_table
from minipeft.files import read_json_file
from minipeft.methods import METHODS, Method
from minipeft.methods.injection import fingerprint
from minipeft.model.config import GPT2Config
from minipeft.report.page import page as report_page
from minipeft.report.pictures import draw_comparison
from minipeft.report.tables import read_comparison, replace_tables
from minipeft.runs.defaults import DEFAULTS


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- what a default rests on ------------------------------------------------------------------------------------------

def test_without_the_bases_dropout_lora_came_out_better_with_each_seed():
    trials = read_json_file(ROOT / "results" / "dropout" / "tuning_lora.json")["trials"]
    found = {(row["trial"]["seed"], row["trial"]["dropout"]): row["validation"]["accuracy"] for row in trials}
    assert found.keys() == {(seed, dropout) for seed in range(3) for dropout in (0.0, 0.1)}
    assert all(found[seed, 0.0] > found[seed, 0.1] for seed in range(3))
    assert {row["trial"]["lora_dropout"] for row in trials} == {0.1} and trials[0]["sizes"]["train"] == 2000


# --- all pages --------------------------------------------------------------------------------------------------------

@each_page
def test_what_a_page_links_to_exists(page):
    assert not dead_links(page.read_text(encoding="utf-8"), page)


def test_every_page_is_in_the_index():
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - links(read("docs/README.md")) == {"README.md"}


@each_page
def test_the_commands_of_a_page_have_options_that_there_are(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = ScriptRunner(monkeypatch, capsys)
    for name, options in commands(page.read_text(encoding="utf-8")):
        outcome = script(name, *options, "--help")
        assert outcome.code == 0, outcome.err
        for option in options:
            assert not option.startswith("--") or re.search(rf"{option}\b", outcome.out), f"{name} has no {option}"


def test_the_make_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", read("README.md"), re.MULTILINE)) == {"train", "test"} <= targets


def test_all_python_on_the_pages_is_run_by_a_test():
    """README's by test_readme.py, those on symptoms by test_pages.py; here those of three pages, each by a test below.
    The chapters quote code only."""
    blocks = {str(page.relative_to(ROOT)): len(code_blocks(own_text(page.read_text(encoding="utf-8")), "python"))
              for page in PAGES if page != README}
    assert {name: number for name, number in blocks.items() if number} == {
        "docs/structure.md": 4, "docs/tasks.md": 1, "docs/troubleshooting.md": 16, "docs/usage.md": 2}


# --- figures ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", ["README.md", "results/README.md", "docs/choosing.md"])
def test_tables_are_what_the_results_files_say(page):
    if results_changed():
        pytest.skip(f"results were measured anew here; scripts/report.py --write {page} writes them into the page")
    assert replace_tables(read(page), ROOT / "results") == read(page)


def test_the_report_and_its_pictures_are_of_the_committed_comparison(tmp_path):
    if results_changed():
        pytest.skip("results were measured anew here; scripts/report.py --comparison draws them")
    found = read_comparison(ROOT / "results")
    assert report_page(*found) == read("results/report.html")
    names = draw_comparison(*found, tmp_path / "comparison")
    committed = {path.name for path in (ROOT / "results" / "comparison").iterdir()}
    assert committed == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        drawn = (tmp_path / "comparison" / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == read(f"results/comparison/{name}.svg"), name


def test_pages_say_that_results_are_of_another_base_as_long_as_they_are():
    """A run notes the fingerprint of its base, and mini has been another one."""
    measured = {read_json_file(path)["base_model"]["fingerprint"] for path in (ROOT / "results").glob("*_results.json")}
    others = measured - {fingerprint(GPT2ForSequenceClassification.from_pretrained("mini"))}
    for page in ("results/README.md", "docs/tasks.md"):
        assert ("commit 23237b1" in read(page)) == bool(others), page
    assert all(other in read("results/README.md") for other in others)
    (compared,) = [path for path in NOTEBOOKS if path.stem == "comparing_results"]
    assert ("first version of `mini`" in markdown_cells(compared)[0]) == bool(others)


def test_the_tables_on_speed_are_what_was_measured():
    if results_changed():
        pytest.skip("measured anew here; scripts/benchmark/benchmark.py --write writes it into docs/speed.md")
    text = read("docs/speed.md")
    assert write_speed(text, read_json_file(ROOT / "results/benchmark.json")) == text


def test_the_signatures_of_bleu_and_chrf_are_those_of_every_result():
    text = read("results/README.md")
    for path in (ROOT / "results").glob("fine_tuned_*_multi30k_results.json"):
        found = json.loads(path.read_text(encoding="utf-8"))["metrics"]["test"]
        assert f"`{found['bleu_signature']}`" in text and f"`{found['chrf_signature']}`" in text


def test_the_gain_from_cached_features_is_what_was_measured():
    once, each_epoch = (json.loads(read(f"results/head_features/{run}/fine_tuned_head_sst2_results.json"))
                        ["seconds"]["train_on_cores"] for run in ("once", "each_epoch"))
    for figure in (once, each_epoch, each_epoch / once):
        assert f"{figure:.1f}" in read("results/README.md")


def test_the_traffic_is_what_the_ledger_says():
    text, lines = read("docs/scale.md"), traffic_table(GPT2Config.official("gpt2")).splitlines()
    for line in lines[:2] + [line for line in lines if line.startswith(("| full |", "| lora |", "| ia3 |"))]:
        assert line in text.splitlines()
    full, lora = (float(re.search(rf"^\| {method} \| ([\d.]+) MB", text, re.MULTILINE).group(1))
                  for method in ("full", "lora"))
    assert f"LoRA sends {full / lora:.0f} times less" in text


@pytest.mark.slow
def test_the_memory_is_what_the_ledger_says(monkeypatch, capsys):
    (block,) = re.findall(r"^\$ python scripts/(anatomy.py) (--memory .*)\n((?:.+\n)+?)\.\.\.$", read("docs/scale.md"),
                          re.MULTILINE)
    outcome = ScriptRunner(monkeypatch, capsys)(block[0], *shlex.split(block[1]))
    assert outcome.code == 0 and outcome.out.startswith(block[2])


# --- code on the pages ------------------------------------------------------------------------------------------------

def test_the_example_of_a_new_task_trains_and_predicts_as_printed(tmp_path, monkeypatch, capsys):
    (content,) = code_blocks(read("docs/tasks.md"), "python")
    assert content.startswith("# truecase.py\n") and len(content.splitlines()) < 100
    (tmp_path / "truecase.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minipeft").symlink_to(ROOT / "minipeft")
    script = ScriptRunner(monkeypatch, capsys)
    quick = {"train.py": ("--epochs", 1, "--model", write_tiny_model(tmp_path / "tiny")), "predict.py": ()}
    shown = [(name, options) for name, options in commands(read("docs/tasks.md")) if "truecase.py" in options]
    assert [name for name, _ in shown] == list(quick)
    for name, options in shown:
        outcome = script(name, *options, *quick[name])
        assert outcome.code == 0, outcome.err
    assert outcome.out.lower() == "the film was shot in paris. i loved it.\n"


def test_the_examples_of_merging_and_of_several_adapters_run_as_printed(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("films", "books")):
        model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig()), seed=seed)
        save_adapter(model, f"checkpoints/{name}")
        if name == "films":
            films = model(IDS, MASK)
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig()), seed=9)
    before = model(IDS, MASK)
    merging, several = code_blocks(read("docs/usage.md"), "python")
    exec(merging, {"model": model})
    assert torch.equal(model(IDS, MASK), before) and "Linear" in capsys.readouterr().out
    exec(several, {"model": model})
    assert torch.equal(model(IDS, MASK), films)


# --- structure.md -----------------------------------------------------------------------------------------------------

STRUCTURE = read("docs/structure.md")


def test_the_picture_of_the_house_names_every_file():
    rows, wing = {}, None
    for line in code_blocks(STRUCTURE)[0].splitlines():
        wing = line[:12].strip() or wing
        rows.setdefault(wing, set()).update(line[12:78].split())  # before the captions
    base = {"settings", "files", "errors"}
    assert base <= rows["model/"]
    rows["model/"] -= base
    rows["scripts/"].remove("public")  # on the floor below the scripts
    assert {path.stem for path in (ROOT / "minipeft").glob("*.py")} - {"__init__", "__main__"} == base | {"public"}
    wings = {f"{path.parent.name}/": path.parent for path in (ROOT / "minipeft").glob("*/__init__.py")}
    assert rows.keys() == {*wings, "scripts/"}
    for wing, folder in {**wings, "scripts/": ROOT / "scripts"}.items():
        names = {word for word in rows[wing] if not word.endswith("/")}
        assert names == {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}, wing
        assert all((folder / word).is_dir() for word in rows[wing] - names), wing


def test_what_moved_is_where_the_page_says():
    rows = re.findall(r"^\| (.*(?:minipeft|scripts)/.*) \| (.*/.*) \|$", STRUCTURE, re.MULTILINE)
    assert len(rows) > 20
    for was, now in rows:
        for file in re.findall(r"`([^`]+)`", now):
            assert any((place / file).exists() for place in (ROOT, ROOT / "minipeft")), file
        if not was.startswith("parts of"):
            for file in re.findall(r"`([^`]+)`", was.partition(", parts of")[0]):
                assert not (ROOT / file).exists(), file


@pytest.fixture
def ssf(tmp_path, monkeypatch):
    """The new method of the page, in a file, in METHODS and in DEFAULTS, by the lines that the page shows."""
    _, content, in_methods, in_defaults = code_blocks(STRUCTURE, "python")
    assert len(content.splitlines()) < 70
    (tmp_path / "ssf.py").write_text(content, encoding="utf-8")
    spec = spec_from_file_location("ssf", tmp_path / "ssf.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ssf", module)
    spec.loader.exec_module(module)
    for table, line in ((METHODS, in_methods), (DEFAULTS, in_defaults)):
        ((name, row),) = eval(f"{{{line}}}", {"Method": Method, "ssf": module}).items()
        monkeypatch.setitem(table, name, row)
    return module


def train(model, steps=5):
    """A few steps on two texts; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(IDS, attention_mask=MASK), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_new_method_of_the_page_goes_all_the_way(ssf, tiny_config, tmp_path):
    model = build(GPT2ForSequenceClassification, tiny_config)
    values, logits = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(IDS, MASK)

    inject(model, ssf.SSFConfig())
    assert torch.equal(model(IDS, MASK), logits), "step 0 is the base model"
    assert {name.rpartition(".")[2] for name, p in model.named_parameters()
            if p.requires_grad and not name.startswith("score")} == {"ssf_gain", "ssf_shift"}
    assert len(adapter_modules(model)) == 2 * tiny_config.n_layer

    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model)
    assert losses[-1] < losses[0]
    assert_same_tensors({name: model.get_parameter(name) for name in frozen}, frozen)
    trained = model(IDS, MASK)
    assert not torch.allclose(trained, logits, atol=1e-3)

    save_adapter(model, tmp_path / "saved")
    fresh = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), tmp_path / "saved")
    assert torch.equal(fresh(IDS, MASK), trained)

    merge(model)
    assert not adapter_modules(model)
    assert torch.allclose(model(IDS, MASK), trained, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(IDS, MASK), trained)

    with disable_adapter(model):
        assert_same_tensors(model.state_dict(), values)
    assert torch.equal(model(IDS, MASK), trained)
    remove(model)
    assert_same_tensors(model.state_dict(), values)
    assert torch.equal(model(IDS, MASK), logits)


def test_the_new_method_refuses_a_bad_value(ssf):
    with pytest.raises(ConfigError, match="initial_gain must be a finite number, got inf"):
        ssf.SSFConfig(initial_gain=float("inf"))


def test_the_scripts_know_the_new_method(ssf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = ScriptRunner(monkeypatch, capsys)
    tiny, films = write_tiny_model(tmp_path / "tiny"), write_csv("films.csv")
    outcome = script("train.py", "--method", "ssf", "--dataset", films, "--model", tiny, "--epochs", 1,
                     "--initial-gain", 1.5)
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "results/fine_tuned_ssf_films_results.json").read_text())
    assert results["method_config"] == {"target_modules": None, "initial_gain": 1.5}
    assert script("predict.py", "--adapter", "checkpoints/ssf_films_finetuned", "a good film").code == 0
    assert "ssf_gain" in script("anatomy.py", "--method", "ssf", "--model", tiny).out
    traced = script("anatomy.py", "--method", "ssf", "--model", tiny, "--trace")
    assert traced.code == 0 and "y = gain * (x W^T + bias) + shift" in traced.out, traced.err
    assert script("anatomy.py", "--method", "ssf", "--model", tiny, "--trace-page", "ssf.html").code == 0
