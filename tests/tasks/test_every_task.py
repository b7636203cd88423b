"""One loop and one set of methods carry every task: each dataset with each method, from files to results and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import load, read_json, write_csv, write_datasets, write_tiny_model

from minipeft.data.datasets import KNOWN
from minipeft.errors import AdapterError, ConfigError, DataError
from minipeft.model.tokenizer import get_tokenizer
from minipeft.runs import defaults
from minipeft.runs.baseline import baseline
from minipeft.runs.finetune import finetune
from minipeft.runs.plan import Options
from minipeft.runs.trained import load_finetuned
from minipeft.tasks import TASKS, find_task, task_for, task_name

CPU = torch.device("cpu")
DATASETS = ("sst2", "wnut_17", "scitldr", "multi30k")
SMALL = {"prefix": {"num_virtual_tokens": 3}, "prompt": {"num_virtual_tokens": 3}, "adapter": {"reduction_factor": 4}}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", n_positions=128)


@pytest.fixture
def options(tiny_model, tmp_path, monkeypatch):
    """options(dataset, method, **changes): a run of a second, writing below tmp_path."""
    monkeypatch.delenv("MINIPEFT_DATA", raising=False)
    write_datasets(tmp_path / "data")

    def make(dataset, method="lora", **changes):
        return Options(**{"method": method, "model": str(tiny_model), "dataset": dataset, "precision": "fp32",
                          "data_dir": str(tmp_path / "data"), "max_length": 48, "output": str(tmp_path / "trained"),
                          "overwrite": True, "results_dir": str(tmp_path / "results"),
                          "method_values": SMALL.get(method, {}),
                          "training_values": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2}, **changes})

    return make


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt", "adapter", "ia3", "bitfit"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_trains_with_every_method_and_reloads_to_the_same_figures(options, tmp_path, dataset, method):
    results = finetune(options(dataset, method))
    assert read_json(tmp_path / "results" / f"fine_tuned_{method}_{dataset}_results.json") == results
    task = TASKS[KNOWN[dataset].task]
    assert results["task"] == task.name and task.headline in results["metrics"]["test"]
    assert task.best_by in results["metrics"]["best_validation"]
    assert results["dataset"]["sizes"] == {"train": 12, "validation": 4, "test": 4}
    model, loaded = load_finetuned(tmp_path / "trained")
    assert type(loaded) is task and type(model) is task.model_class
    test = load(dataset, tmp_path / "data").test
    assert loaded.test(model, test, CPU, torch.float32) == results["metrics"]["test"]


def test_parameters_are_counted_alike_in_every_precision(options):
    """In bfloat16 a frozen head that was tied to the embeddings becomes a matrix of its own."""
    counts = [finetune(options("multi30k", "lora", precision=precision))["parameters"]
              for precision in ("fp32", "bf16")]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("dataset", "names"), [
    ("sst2", {"most_frequent_label", "untrained_head", "zero_shot"}),
    ("wnut_17", {"untrained_head", "most_frequent_tag"}),
    ("scitldr", {"untrained_base", "lead_1"}), ("multi30k", {"untrained_base", "copy_source", "word_dictionary"})])
def test_every_dataset_has_its_baselines(options, tmp_path, dataset, names):
    said = []
    found = baseline(options(dataset), said.append)
    assert found["metrics"].keys() == names
    assert all(TASKS[KNOWN[dataset].task].headline in figures for figures in found["metrics"].values())
    assert read_json(tmp_path / "results" / f"baseline_{dataset}_results.json")["task"] == KNOWN[dataset].task
    assert any("95 % interval" in line for line in said)


@pytest.mark.parametrize("dataset", ["wnut_17", "multi30k"])
def test_an_interrupted_run_ends_as_one_that_was_not(options, tmp_path, dataset, monkeypatch):
    from minipeft.training import loop as training

    expected = finetune(options(dataset, output=str(tmp_path / "whole")))
    steps = []
    original = training.nn.utils.clip_grad_norm_

    def stop_in_the_second_step(*arguments, **named):
        steps.append(None)
        if len(steps) == 2:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **named)

    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", stop_in_the_second_step)
    with pytest.raises(KeyboardInterrupt):
        finetune(options(dataset, output=str(tmp_path / "cut")))
    resumed = finetune(options(dataset, output=str(tmp_path / "cut"), resume=True))
    assert resumed["metrics"] == expected["metrics"]
    assert [{**row, "seconds": 0} for row in resumed["curve"]] == [{**row, "seconds": 0} for row in expected["curve"]]


def test_a_known_dataset_has_one_task(options):
    with pytest.raises(DataError, match="multi30k is for translation, not for tagging"):
        finetune(options("multi30k", task="tagging"))


def test_an_unknown_task_is_refused_with_those_there_are(options, tmp_path):
    with pytest.raises(ConfigError, match="unknown task 'parsing': use classification, tagging, summarization"):
        finetune(options("multi30k", task="parsing"))
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.py"):
        find_task("nowhere.py")
    for content, message in (("x = 1 +", "cannot be imported: SyntaxError"), ("x = 1", "defines 0 complete tasks"),
                             ("from minipeft.tasks.tagging import Tagging", "defines 0 complete tasks")):
        (tmp_path / "task.py").write_text(content)
        with pytest.raises(ConfigError, match=message):
            find_task(str(tmp_path / "task.py"))


@pytest.mark.parametrize(("dataset", "asked", "name"), [
    ("imdb", None, "classification"), ("sample", None, "classification"), ("wnut_17", None, "tagging"),
    ("wnut_17", "tagging", "tagging"), ("scitldr", None, "summarization"), ("films.csv", None, "classification"),
    ("films.csv", "translation", "translation"), ("films.csv", "summarisation", "summarization"),
    ("scitldr", "summarisation", "summarization")])
def test_a_dataset_chooses_the_task(dataset, asked, name):
    assert task_for(dataset, asked) is TASKS[name]


@pytest.mark.parametrize(("dataset", "asked"), [
    ("imdb", "tagging"), ("sample", "summarisation"), ("multi30k", "tagging")])
def test_a_known_dataset_is_for_no_other_task(dataset, asked):
    with pytest.raises(DataError, match=f"{dataset} is for .*, not for {task_name(asked)}"):
        task_for(dataset, asked)


def test_the_british_name_of_a_task_means_the_same(options, tmp_path):
    """It stands in adapter folders and results files of earlier versions."""
    assert find_task("summarisation") is find_task("summarization") is TASKS["summarization"]
    assert task_name("summarisation") == task_name("summarization") == "summarization"
    assert task_name("my own") == "my own"
    finetune(options("scitldr"))
    details = tmp_path / "trained" / "minipeft.json"
    assert '"summarization"' in details.read_text()
    details.write_text(details.read_text().replace('"summarization"', '"summarisation"'))
    for asked in (None, "summarisation", "summarization"):
        assert load_finetuned(tmp_path / "trained", task=asked)[1].name == "summarization"
    pairs = write_csv(tmp_path / "pairs.csv", [(f"a {i}", f"b {i}") for i in range(40)], header=("source", "target"))
    assert finetune(options(pairs, task="summarisation"))["task"] == "summarization"


OWN = """
from minipeft.tasks.generation import Translation

class Shouting(Translation):
    name, separator, columns = "shouting", " !", ("source", "source")

    @classmethod
    def read(cls, texts, labels, where, label_names=None):
        return super().read(texts, [text.upper() for text in labels], where, label_names)
"""


def test_a_task_of_ones_own_that_writes_trains_and_reloads(options, tmp_path):
    (tmp_path / "task.py").write_text(OWN)
    (tmp_path / "own.jsonl").write_text("".join(f'{{"source": "a dog {i}"}}\n' for i in range(40)))
    results = finetune(options(str(tmp_path / "own.jsonl"), task=str(tmp_path / "task.py")))
    assert results["task"] == "shouting" and results["dataset"]["sizes"]["train"] == 32
    with pytest.raises(AdapterError, match="trained for the task 'shouting'"):
        load_finetuned(tmp_path / "trained")
    _, task = load_finetuned(tmp_path / "trained", task=str(tmp_path / "task.py"))
    assert task.separator == " !" and type(task).__name__ == "Shouting"


def test_a_task_of_ones_own_may_have_fields_of_any_type(tmp_path, tokenizer):
    (tmp_path / "task.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Any, Literal, Optional\n\n"
        "from minipeft.tasks.tagging import Tagging\n\n\n@dataclass\nclass Mine(Tagging):\n    name = 'mine'\n"
        "    words: tuple[str, ...] = ()\n    how: Any = None\n    side: Literal['left', 'right'] = 'left'\n"
        "    most: Optional[int] = None\n")
    mine = find_task(str(tmp_path / "task.py"))
    assert mine(tokenizer, ["O", "B-x"], words=("a", "b")).details()["words"] == ("a", "b")
    with pytest.raises(ConfigError, match="words must be"):
        mine(tokenizer, ["O", "B-x"], words="a")


@pytest.mark.parametrize(("line", "name"), [
    ('name, separator = "translation", " !"', "translation"), ('separator = " !"', "translation"),
    ('name, separator = "summarisation", " !"', "summarisation")])
def test_a_task_of_ones_own_needs_a_name_of_its_own(tmp_path, line, name):
    (tmp_path / "task.py").write_text(f"from minipeft.tasks.generation import Translation\n\n\n"
                                      f"class Mine(Translation):\n    {line}\n")
    with pytest.raises(ConfigError, match=f"'{name}' is taken"):
        find_task(str(tmp_path / "task.py"))


def test_a_task_of_ones_own_must_say_what_every_task_says(tmp_path):
    (tmp_path / "task.py").write_text("from minipeft.tasks.generation import Generation\n\n\nclass Mine(Generation):\n"
                                      "    name = 'mine'\n\n    def metrics(self, written, references):\n"
                                      "        return {}\n")
    with pytest.raises(ConfigError, match="Mine does not say its separator"):
        find_task(str(tmp_path / "task.py"))


def test_a_sharded_model_cannot_write(options):
    with pytest.raises(ConfigError, match="--shard is not for tasks that write"):
        finetune(options("multi30k", "full", shard=True))


def test_head_only_training_is_refused_where_there_is_no_head(options):
    from minipeft.errors import InjectionError
    with pytest.raises(InjectionError, match="GPT2LMHeadModel has no classification head"):
        finetune(options("multi30k", "head"))
    assert "f1" in finetune(options("wnut_17", "head"))["metrics"]["test"]


def test_an_adapter_folder_names_its_task_and_runs_no_code_for_it(options, tmp_path):
    finetune(options("wnut_17"))
    details = tmp_path / "trained" / "minipeft.json"
    details.write_text(details.read_text().replace('"tagging"', f'"{tmp_path}/evil.py"'))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(AdapterError, match=r"name the \.py file that defines it with --task"):
        load_finetuned(tmp_path / "trained")


def test_a_task_has_defaults_of_its_own_where_its_table_says_so(options, monkeypatch):
    monkeypatch.setitem(defaults.DEFAULTS["lora"]["rates"], "tagging", 0.5)
    monkeypatch.setattr(defaults, "FEW_EXAMPLES", 0)  # else a rate of its own
    rates = [finetune(options(dataset, training_values={"epochs": 1}))["training_config"]["learning_rate"]
             for dataset in ("wnut_17", "sst2")]
    assert rates == [0.5, defaults.DEFAULTS["lora"]["training"]["learning_rate"]]


# --- names of labels --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["good", "b\nad", "b\tad", "b\x1b[31mad", "b\x9bad", "b\u2028ad", "b\ud800ad"])
@pytest.mark.parametrize("task", ["classification", "tagging"])
def test_names_of_labels_are_told_apart_and_can_be_printed_in_a_line(task, name):
    with pytest.raises(DataError, match=r"^label_names: (two labels have the name 'good'|the label 'b.*' holds a)"):
        TASKS[task](get_tokenizer("mini"), ["good", name])
    kept = ["good", "schön", "\u093f", "\U0001f44d\U0001f3fd", "a\u00a0b", "\u200d"]
    assert TASKS[task](get_tokenizer("mini"), kept).label_names == kept


def test_labels_in_a_file_that_cannot_be_printed_in_a_line_are_refused_where_they_are_read():
    with pytest.raises(DataError, match=r"^films\.csv: the label 'b\\nad' holds a character that cannot be printed"):
        TASKS["classification"].read(["x", "y"], ["good", "b\nad"], "films.csv")
    with pytest.raises(DataError, match=r"^tags\.jsonl: the label 'B-\\x1b' holds a character that cannot be printed"):
        TASKS["tagging"].read([["x"]], [["B-\x1b"]], "tags.jsonl")


# --- example by example -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset", DATASETS)
def test_the_headline_of_all_examples_follows_from_what_each_of_them_adds(options, tmp_path, dataset):
    finetune(options(dataset, training_values={"epochs": 4, "batch_size": 4, "learning_rate": 1e-2}))
    model, task = load_finetuned(tmp_path / "trained")
    test = load(dataset, tmp_path / "data").test
    metrics, counts = task.test_each(model, test, CPU, torch.float32)
    assert metrics == task.test(model, test, CPU, torch.float32)
    assert len(counts) == len(test) and counts.min() >= 0 and counts.dtype.kind == "i"
    assert float(task.headline_of(counts.sum(axis=0), len(test))) == pytest.approx(metrics[task.headline], abs=1e-3)


def test_the_headline_of_several_selections_is_found_at_once():
    f1 = TASKS["tagging"].headline_of(np.array([[1, 2, 2], [0, 0, 0]]), 2)
    assert f1.tolist() == [0.5, 0.0]
    rouge = TASKS["summarization"](get_tokenizer("mini"), []).counts(["a bad film", "x"], [["a bad dog"], ["a"]])
    assert rouge.tolist() == [[66667], [0]] and TASKS["summarization"].headline_of(rouge.sum(axis=0), 2) == 33.3335
    counts = TASKS["translation"](get_tokenizer("mini"), []).counts(["ein Hund läuft schnell"], [["ein Hund läuft so"]])
    assert counts.tolist() == [[4, 4, 3, 2, 1, 0, 4, 3, 2, 1]]
    both = TASKS["translation"].headline_of(np.stack((counts[0], 3.0 * counts[0])), 1)
    assert both[0] == pytest.approx(59.46, abs=0.01) and both.shape == (2,)
