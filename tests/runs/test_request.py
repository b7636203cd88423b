"""request.py: what a run was asked for is noted, and no run takes the place of another request's unasked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, files_below, read_json, rows, write_csv, write_imdb, write_tiny_model

from minipeft import GPT2ForSequenceClassification, LoraConfig, inject, save_adapter
from minipeft.errors import OutputError
from minipeft.methods.injection import fingerprint
from minipeft.model.hub import MINI_FOLDER
from minipeft.runs import defaults
from minipeft.runs.baseline import baseline
from minipeft.runs.budget import BEST
from minipeft.runs.finetune import finetune
from minipeft.runs.plan import Options, choose
from minipeft.runs.request import differences, fingerprints_in, request_in, request_of, seed_in

# Results files on IMDb that the repository holds.
PUBLISHED = {method: ROOT / "results/cells/imdb" / f"{name}_seed0.json"
             for method, name in (("lora", "best_lora"), ("baseline", "baseline"))}


@pytest.fixture
def contents():
    """contents(*folders): every file below them with its bytes, to see that nothing has changed."""
    return lambda *folders: {file: Path(file).read_bytes() for file in files_below(*folders)}


@pytest.fixture
def refused(tmp_path, contents, no_work):
    """refused(function, options): it must refuse before it trains or tests, and change no file; returns the line."""
    def run(function, options):
        before = contents(tmp_path)
        with pytest.raises(OutputError) as error:
            function(options)
        assert contents(tmp_path) == before
        return str(error.value)

    return run


@pytest.fixture
def earlier(options, tmp_path):
    """What a run left: its adapter in output/lora, its results in results/."""
    return finetune(options(training_values={"epochs": 1}))


def again(options, **changes):
    return options(**{"training_values": {"epochs": 1, **changes.pop("training_values", {})}, **changes})


# --- noted ------------------------------------------------------------------------------------------------------------

def test_the_request_stands_in_the_results_and_beside_the_adapter(earlier, tiny_model, tmp_path):
    request = read_json(tmp_path / "output" / "lora" / "minipeft.json")["request"]
    assert request == earlier["request"] == read_json(tmp_path / "results" / "fine_tuned_lora_films_results.json")[
        "request"]
    base = fingerprint(GPT2ForSequenceClassification.from_pretrained(tiny_model))
    assert (request["method"], request["base_fingerprint"]) == ("lora", base)
    assert request["method_config"] == earlier["method_config"]
    assert request["training_config"] == earlier["training_config"]
    assert request["dataset"]["sizes"] == {"train": 32, "validation": 4, "test": 4}
    assert request["task"] == {"task": "classification", "label_names": ["negative", "positive"], "max_length": 48,
                               "truncation": "head_tail"}


@pytest.mark.parametrize("method", ["lora", "prefix", "baseline"])
def test_a_results_file_of_before_requests_were_noted_says_the_same_request(options, method):
    run = baseline if method == "baseline" else finetune
    results = run(options(method, max_length=None, training_values={"epochs": 1}))
    request = results.pop("request")
    old = request_in(results)
    old["dataset"]["fingerprints"] = request["dataset"]["fingerprints"]
    old["task"]["max_length"] = request["task"]["max_length"]  # it has what fitted
    assert differences(old, request) == []


def test_no_dropout_is_noted_as_0_and_is_the_same_where_an_earlier_version_noted_none(earlier):
    request = earlier["request"]
    assert request["dropout"] == 0.0
    for value in (0.0, None):
        assert differences(request | {"dropout": value}, request) == []
        assert differences(request | {"dropout": value}, request | {"dropout": 0.25}) == ["dropout 0.0, not 0.25"]


@pytest.mark.skipif(not (MINI_FOLDER / "model.safetensors").is_file(), reason="no bundled model")
@pytest.mark.parametrize("method", PUBLISHED)
def test_the_committed_results_are_of_the_request_that_their_command_makes(tmp_path, method, monkeypatch):
    """But for the data: the tests have no IMDb, so that its content and its sizes are another's."""
    write_imdb(tmp_path)
    monkeypatch.setattr(defaults, "FEW_EXAMPLES", 0)  # IMDb's are not
    results = read_json(PUBLISHED[method])
    values = {} if method == "baseline" else dict(BEST["imdb"][method])
    options = Options(method=method, model="mini", dataset="imdb", data_dir=tmp_path, precision="bf16", device="cpu",
                      full=True, max_length=values.pop("max_length", None), training_values=values)
    plan = choose(options, baseline=method == "baseline")
    found = differences(request_in(results), request_of(plan, results["base_model"]["fingerprint"]))
    assert "another content of imdb" in found
    others = {line.split()[0] for line in found if "content" not in line}
    assert others <= {"train_size", "validation_size", "test_size"}


@pytest.mark.parametrize("stored", [{}, {"method": "lora"}, {"method": 5, "base_fingerprint": [], "dataset": "x"}, [1]])
def test_a_request_that_is_damaged_or_not_there_is_another_one(earlier, stored):
    assert differences(stored, earlier["request"]) == ["it does not say what it was asked for"]


MALFORMED = [None, [], 5, "x", {"dataset": None, "training_config": []},
             {"dataset": {"fingerprints": "zz"}, "training_config": {"seed": -1}},
             {"dataset": {"fingerprints": dict.fromkeys(("train", "validation", "test"), "zz")},
              "training_config": {"seed": "a"}}, {"dataset": {"fingerprints": {"train": "0" * 16}}},
             {"training_config": {"seed": True}}]


@pytest.mark.parametrize("request_noted", MALFORMED, ids=str)
def test_parts_of_a_request_that_are_malformed_count_as_absent(request_noted):
    assert fingerprints_in({"request": request_noted}) is None and seed_in({"request": request_noted}) == 0


def test_the_seed_and_the_fingerprints_are_those_that_are_noted(earlier):
    assert fingerprints_in(earlier) == earlier["request"]["dataset"]["fingerprints"]
    earlier["request"]["training_config"]["seed"] = 7
    assert seed_in(earlier) == 7 and seed_in({}) == 0 and fingerprints_in({}) is None


@pytest.mark.parametrize("request_noted", [None, [], 5])
def test_a_folder_or_file_that_notes_no_request_is_not_written_over(options, earlier, tmp_path, request_noted):
    folder, results = tmp_path / "output" / "lora", tmp_path / "results" / "fine_tuned_lora_films_results.json"
    for file in (folder / "minipeft.json", results):
        file.write_text(json.dumps({**read_json(file), "request": request_noted}))
    assert f"{folder} and {results} hold another run (it does not say" in refused_in(finetune, again(options))


@pytest.mark.parametrize("files", [5, [], None, "x"])
def test_a_damaged_list_of_files_is_as_none(options, earlier, tmp_path, files):
    account = tmp_path / "output" / "lora" / "minipeft.json"
    account.write_text(json.dumps({**read_json(account), "files": files}))
    assert finetune(again(options))["request"] == earlier["request"]


# --- the same request, and another one --------------------------------------------------------------------------------

@pytest.mark.kind("7: the same request replaces its results without asking")
def test_the_same_request_replaces_what_it_left(options, earlier, tmp_path):
    moved = write_csv(tmp_path / "moved" / "films.csv") if (tmp_path / "moved").mkdir() is None else None
    second = finetune(again(options, dataset=moved))  # the same content in another place
    assert second["metrics"] == earlier["metrics"] and second["request"] == earlier["request"]


CHANGES = {
    "a seed": ({"training_values": {"seed": 3}}, "(seed 0, not 3)"),
    "a size": ({"train_size": 8}, "(train_size 32, not 8)"),
    "a rank": ({"method_values": {"r": 2}}, "(r 8, not 2)"),
    "a length": ({"max_length": 20}, "(max_length 48, not 20)"),
    "a dropout": ({"dropout": 0.25}, "(dropout 0.0, not 0.25)"),
    "a matmul precision": ({"matmul_precision": "medium"}, "(matmul_precision None, not medium)"),
    "a precision": ({"precision": "bf16"}, "(precision float32, not bfloat16)"),
    "many": ({"training_values": {"seed": 3, "learning_rate": 0.5, "batch_size": 2}, "train_size": 8, "max_length": 20},
             "(train_size 32, not 8; max_length 48, not 20; batch_size 4, not 2; learning_rate 0.02, not 0.5; and 1 "
             "more)")}


@pytest.mark.kind("7: a results file or folder of another request is refused")
@pytest.mark.parametrize(("changes", "named"), CHANGES.values(), ids=CHANGES)
def test_another_request_is_refused_before_training_with_what_differs_and_the_ways_out(
        options, earlier, tmp_path, refused, changes, named):
    asked = again(options, **changes)
    folder, results = tmp_path / "output" / "lora", tmp_path / "results" / "fine_tuned_lora_films_results.json"
    assert refused(finetune, asked) == (
        f"{folder} and {results} hold another run {named}: give this one another --output and --results-dir, or "
        "replace that one with --overwrite")
    asked.output = str(tmp_path / "elsewhere")
    assert refused(finetune, asked) == (f"{results} holds another run {named}: give this one another --results-dir, or "
                                        "replace that one with --overwrite")


def test_with_overwrite_or_with_places_of_its_own_another_request_runs(options, earlier, tmp_path, contents):
    before = contents(tmp_path / "output", tmp_path / "results")
    asked = again(options, train_size=8, output=str(tmp_path / "more"), results_dir=str(tmp_path / "more"))
    finetune(asked)
    assert contents(tmp_path / "output", tmp_path / "results") == before
    results = finetune(again(options, train_size=8, overwrite=True))
    noted = read_json(tmp_path / "output" / "lora" / "minipeft.json")["request"]
    assert noted == results["request"] and noted["dataset"]["sizes"]["train"] == 8


@pytest.mark.kind("7: another dataset's or base's adapter folder is not overwritten")
def test_another_dataset_or_base_or_method_in_a_folder_is_refused(options, earlier, tmp_path, refused):
    other = write_csv(tmp_path / "other.csv", rows(21))
    assert "lora holds another run (dataset films, not other)" in refused(finetune, again(options, dataset=other))
    base = write_tiny_model(tmp_path / "base", seed=1)
    assert "hold another run (another base model)" in refused(finetune, again(options, model=str(base)))
    write_csv(tmp_path / "films.csv", rows(21))
    assert "hold another run (another content of films)" in refused(finetune, again(options))
    ia3 = options("ia3", output=str(tmp_path / "output" / "lora"), training_values={"epochs": 1})
    assert "(method lora, not ia3; another content of films)" in refused(finetune, ia3)


def test_a_baselines_results_are_kept_from_another_request_too(options):
    results = baseline(options("baseline"))
    assert baseline(options("baseline"))["metrics"] == results["metrics"]
    assert "(test_size 4, not 2)" in refused_in(baseline, options("baseline", test_size=2))
    assert baseline(options("baseline", test_size=2, overwrite=True))["dataset"]["sizes"]["test"] == 2


def refused_in(function, options):
    with pytest.raises(OutputError) as error:
        function(options)
    return str(error.value)


@pytest.mark.kind("7: committed results are not overwritten by a trial")
@pytest.mark.parametrize("method", PUBLISHED)
def test_committed_results_are_not_overwritten_by_a_trial_of_eight_rows(tiny_model, tmp_path, refused, method):
    write_imdb(tmp_path)
    name = "baseline" if method == "baseline" else f"fine_tuned_{method}"
    (tmp_path / "results").mkdir()
    shutil.copy(PUBLISHED[method], tmp_path / "results" / f"{name}_results.json")
    asked = Options(method=method, model=str(tiny_model), dataset="imdb", data_dir=str(tmp_path), train_size=8,
                    output=str(tmp_path / "output"), results_dir=str(tmp_path / "results"))
    line = refused(baseline if method == "baseline" else finetune, asked)
    assert f"{name}_results.json holds another run (another base model; another content of imdb): give" in line


@pytest.mark.kind("7: the first command of a fresh clone is not refused by the published results")
@pytest.mark.parametrize("method", PUBLISHED)
def test_where_no_folder_is_named_a_trial_beside_published_results_has_its_own_in_results_mine(
        tiny_model, tmp_path, monkeypatch, contents, method):
    write_imdb(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    name = f"{'baseline' if method == 'baseline' else f'fine_tuned_{method}'}_results.json"
    shutil.copy(PUBLISHED[method], Path("results") / name)
    shutil.copy(ROOT / "results" / "README.md", "results")
    published, said = contents("results"), []
    asked = Options(method=method, model=str(tiny_model), dataset="imdb", data_dir=str(tmp_path), train_size=8,
                    validation_size=4, test_size=4, max_length=32, training_values={"epochs": 1})
    run = baseline if method == "baseline" else finetune
    results = run(asked, said.append)
    assert read_json(Path("results/mine") / name)["metrics"] == results["metrics"]
    assert "results    results/mine (results holds the published ones)" in said
    run(asked)                                                       # the same request again replaces its own
    if method == "lora":
        with pytest.raises(OutputError, match=r"lora_finetuned and results/mine/.* hold another run"):
            run(dataclasses.replace(asked, train_size=6))
        run(dataclasses.replace(asked, train_size=6, overwrite=True))
    (Path("results/mine") / name).unlink()
    assert contents("results") == published
    run(dataclasses.replace(asked, results_dir="results", overwrite=True))  # only where it is named
    assert not (Path("results/mine") / name).exists() and contents("results") != published


def test_in_a_clone_results_on_what_nothing_is_published_of_are_in_results_mine_too(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    (Path("results") / "README.md").write_text("published")
    said = []
    finetune(options(results_dir=None, training_values={"epochs": 1}), said.append)
    assert [path.name for path in Path("results").iterdir() if path.is_file()] == ["README.md"]
    assert Path("results/mine/fine_tuned_lora_films_results.json").is_file()
    assert "results    results/mine (results holds the published ones)" in said


def test_a_file_that_holds_no_results_is_not_taken_for_any(options, tmp_path, refused):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "fine_tuned_lora_films_results.json").write_text('{"a": 1}')
    assert "(it does not say what it was asked for)" in refused(finetune, options())


# --- what is not ours -------------------------------------------------------------------------------------------------

@pytest.mark.kind("7: the base model is not overwritten by --output")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_folder_with_a_base_model_is_refused_always(options, tiny_model, tmp_path, refused, method):
    shutil.copytree(tiny_model, tmp_path / "mini")
    for more in ({}, {"overwrite": True}, {"model": str(tmp_path / "mini")}):
        line = refused(finetune, options(method, output=str(tmp_path / "mini"), **more))
        assert line.startswith(f"{tmp_path / 'mini'} ") and line.endswith("choose another --output")
        assert ("is the base model of this run" if "model" in more else
                "holds config.json and model.safetensors, which no training here wrote") in line


def test_the_base_of_a_run_is_refused_also_where_a_training_wrote_it(options, tmp_path, refused_after_full):
    line = refused_after_full(options(model=str(tmp_path / "output" / "full"), output=str(tmp_path / "output" / "full"),
                                      overwrite=True))
    assert "is the base model of this run" in line


@pytest.fixture
def refused_after_full(options, tmp_path):
    finetune(options("full", training_values={"epochs": 1}))
    return lambda asked: refused_in(finetune, asked)


def test_an_adapter_that_no_training_here_wrote_is_refused(options, earlier, tiny_model, tmp_path, refused):
    account = tmp_path / "output" / "lora" / "minipeft.json"
    content = account.read_text()
    account.unlink()  # as peft leaves a folder
    line = refused(finetune, again(options, overwrite=True))
    assert "holds adapter_config.json and adapter_model.safetensors, which no training here wrote" in line
    account.write_text(content)
    shutil.copy(tiny_model / "model.safetensors", account.parent)
    assert "lora holds model.safetensors, which" in refused(finetune, again(options, overwrite=True))


def test_an_adapter_saved_by_hand_is_replaced_only_where_asked(options, tiny_model, tmp_path):
    model = GPT2ForSequenceClassification.from_pretrained(tiny_model)
    save_adapter(inject(model, LoraConfig()), tmp_path / "output" / "lora")
    assert "(it does not say what it was asked for)" in refused_in(finetune, again(options))
    assert finetune(again(options, overwrite=True))["request"] == json.loads(
        (tmp_path / "output" / "lora" / "minipeft.json").read_text())["request"]


def test_other_files_in_the_folder_are_no_obstacle_and_stay(options, tmp_path):
    (tmp_path / "output" / "lora").mkdir(parents=True)
    (tmp_path / "output" / "lora" / "notes.txt").write_text("mine")
    finetune(again(options))
    assert (tmp_path / "output" / "lora" / "notes.txt").read_text() == "mine"


# --- an interrupted run -----------------------------------------------------------------------------------------------

def test_a_state_without_an_adapter_is_of_a_request_too(options, earlier, tmp_path):
    """A run that is killed before its first validation leaves nothing else."""
    from minipeft.training.state import save_training_state
    folder = tmp_path / "output" / "lora"
    model = GPT2ForSequenceClassification.from_pretrained(options().model)
    other = json.loads(json.dumps(earlier["request"]))
    other["training_config"]["seed"] = 9
    import torch
    optimizer = torch.optim.AdamW(model.parameters())
    save_training_state(folder / "training_state", model, optimizer, 1, {"settings": other})
    for file in ("minipeft.json", "adapter_config.json", "adapter_model.safetensors"):
        (folder / file).unlink()
    assert "lora holds another run (seed 9, not 0)" in refused_in(finetune, again(options))
