"""The commands as a user calls them, by scripts/: train, evaluate, predict, report, and their help."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    SCRIPTS,
    files_below,
    read_json,
    rows,
    write_csv,
    write_datasets,
    write_imdb,
)

from minipeft.commands import train as command
from minipeft.data import tables
from minipeft.explain.chapters import EQUATION
from minipeft.methods import METHODS
from minipeft.runs import defaults
from minipeft.runs.results import WRITER
from minipeft.tasks.task import Task

QUICK = ("--epochs", 3, "--batch-size", 4, "--learning-rate", 0.02, "--precision", "fp32")


@pytest.fixture
def train(script, tiny_model):
    """train(*options): a LoRA run of a second, unless the options say otherwise; it must succeed."""

    def run(*options):
        outcome = script("train.py", "--model", tiny_model, "--dataset", "films.csv", *QUICK, *options)
        assert outcome.code == 0, outcome.err
        return outcome

    return run


# --- from training to a prediction ------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lora", "full"])
def test_train_then_evaluate_then_predict(train, script, folder, method):
    trained = train("--method", method)
    adapter, file = f"checkpoints/{method}_films_finetuned", f"results/fine_tuned_{method}_films_results.json"
    assert f"wrote {adapter} and {file}" in trained.out
    results = read_json(file)

    evaluated = script("evaluate.py", "--adapter", adapter, "--dataset", "films.csv",
                       "--precision", "fp32", "--json", "metrics/all.json")
    assert evaluated.code == 0, evaluated.err
    assert "4 of 4 test examples" in evaluated.out
    assert f"accuracy {results['metrics']['test']['accuracy']:.4f} (95 % interval" in evaluated.out
    assert read_json("metrics/all.json")["metrics"] == results["metrics"]["test"]
    table = [line.split() for line in evaluated.out.splitlines()[-3:]]
    assert table[0] == ["true", "/", "predicted", "negative", "positive"]
    assert [[name, *map(int, counts)] for name, *counts in table[1:]] == [
        [name, *counts] for name, counts in zip(("negative", "positive"),
                                                results["metrics"]["test"]["confusion_matrix"])]

    predicted = script("predict.py", "--adapter", adapter, *(text for text, _ in rows(2)))
    assert predicted.code == 0, predicted.err
    lines = [line.split("\t") for line in predicted.out.splitlines()]
    assert [line[2] for line in lines] == [text for text, _ in rows(2)]
    assert [line[0] for line in lines] == [label for _, label in rows(2)]
    assert all(0.5 <= float(line[1]) <= 1 for line in lines)


def test_predictions_do_not_depend_on_what_else_is_asked(train, script):
    train()
    texts = ["a bad film", "a good film of some length, truly", "x"]

    def predict(*texts):
        return [line.split("\t") for line in script("predict.py", *texts, "--precision", "fp32").out.splitlines()]

    for (label, probability, _), text in zip(predict(*texts), texts):
        (alone, probability_alone, _), = predict(text)
        assert label == alone
        assert float(probability) == pytest.approx(float(probability_alone), abs=1.1e-4)


def test_predict_reads_lines_of_standard_input(train, script, monkeypatch):
    import io

    train()
    monkeypatch.setattr(sys, "stdin", io.StringIO("a good film\n\na bad film\n"))
    from_stdin = script("predict.py")
    assert from_stdin.out == script("predict.py", "a good film", "a bad film").out
    assert len(from_stdin.out.splitlines()) == 2


def test_predict_shows_a_long_text_on_one_line(train, script):
    train()
    line, = script("predict.py", "first line\nsecond\tline " + "x" * 500).out.splitlines()
    label, probability, text = line.split("\t")
    assert text.startswith("first line second line xxx") and len(text) <= 80
    assert label in ("negative", "positive") and re.fullmatch(r"[01]\.\d{4}", probability)


def test_baseline_trains_nothing_and_writes_its_results(train, folder):
    outcome = train("--method", "baseline")
    assert "untrained head: accuracy" in outcome.out and "zero shot: accuracy" in outcome.out
    assert read_json("results/baseline_films_results.json")["method"] == "baseline"
    assert not (folder / "checkpoints").exists()


def test_evaluate_takes_a_subset_on_a_cpu_and_everything_when_asked(train, script, monkeypatch):
    train()
    write_imdb(".", train=40, test=20)
    monkeypatch.setitem(defaults.CPU_SIZES, "test", 2)
    imdb = ("--dataset", "imdb", "--data-dir", ".")
    assert "2 of 20 test examples (--full takes all)" in script("evaluate.py", *imdb).out
    assert "20 of 20 test examples\n" in script("evaluate.py", *imdb, "--full").out
    assert "3 of 20 test examples\n" in script("evaluate.py", *imdb, "--test-size", 3).out
    assert "4 of 4 test examples\n" in script("evaluate.py", "--dataset", "films.csv").out  # a file of one's own: all


def test_a_model_trained_on_one_dataset_can_be_tested_on_another(train, script):
    train()
    write_imdb(".", train=40, test=20)
    outcome = script("evaluate.py", "--dataset", "imdb", "--data-dir", ".")
    assert outcome.code == 0 and "imdb, 20 of 20 test examples" in outcome.out


def test_ctrl_c_ends_with_code_130_says_how_to_go_on_and_resume_does(train, script, tiny_model, monkeypatch):
    original, calls = Task.loss_sum, []

    def pressing(logits, targets):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(logits, targets)

    monkeypatch.setattr(Task, "loss_sum", staticmethod(pressing))
    outcome = script("train.py", "--model", tiny_model, "--dataset", "films.csv", *QUICK)
    assert outcome.code == 130
    assert "--resume" in outcome.out and outcome.error_lines == ["interrupted"]
    assert script("predict.py", "a good film").code == 0
    assert read_json(train("--resume").out.split()[-1])["curve"][-1]["step"] == 24


def test_report_makes_a_table_of_the_results(train, script):
    train("--method", "baseline")
    train("--method", "lora")
    outcome = script("report.py", "--dataset", "films")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert len(lines) == 2 + 4
    assert "always the most frequent label" in outcome.out
    assert "untrained head" in outcome.out and "zero-shot" in outcome.out and lines[-1].startswith("| lora |")


def test_report_without_a_dataset_shows_each_that_there_are_results_on(train, script, folder):
    assert script("report.py").error_lines == [
        "error: results holds no results: train first, or name a folder with --results-dir"]
    train("--results-dir", "mine")
    write_csv("books.csv", rows())
    train("--dataset", "books.csv", "--results-dir", "mine")
    lines = script("report.py", "--results-dir", "mine").out.splitlines()
    assert [line for line in lines if not line.startswith("|")] == ["books", "", "", "films", ""]
    assert sum(line.startswith("| lora |") for line in lines) == 2


def test_report_says_which_of_several_pages_has_nothing_to_write_and_refuses_one_alone(script):
    start, end = EQUATION
    Path("method.py").write_text('"""A method.\n\n    y = x W^T\n\nSymbols\n    x\n"""\n')
    Path("page.md").write_text(f"{start.format('method.py', WRITER)}\n{end}\n")
    Path("plain.md").write_text("text")
    outcome = script("report.py", "--write", "plain.md", "page.md")
    assert outcome.code == 0 and outcome.out.startswith("plain.md: there is no <!-- results on"), outcome.err
    assert outcome.out.count("\n") == 1 and "y = x W^T" in Path("page.md").read_text()
    outcome = script("report.py", "--write", "plain.md")
    assert outcome.code == 2 and outcome.error_lines[0].startswith("error: there is no <!-- results on")


# --- tables of predictions --------------------------------------------------------------------------------------------

def read_table(path):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if str(path).endswith(".tsv") else ","))


@pytest.mark.kind("7: predict --input --output with all label probabilities")
def test_predict_writes_a_table_with_the_texts_own_columns_and_every_labels_probability(train, script):
    train("--method", "full")
    write_csv("texts.csv", [("007", "a good film, truly"), ("8", 'a "bad" film,\ntruly bad')], header=("id", "text"))
    outcome = script("predict.py", "--input", "texts.csv", "--output", "out/predictions.csv", "--precision", "fp32")
    assert outcome.code == 0 and outcome.out == "wrote 2 predictions to out/predictions.csv\n", outcome.err
    found = read_table("out/predictions.csv")
    assert list(found[0]) == ["id", "text", "prediction", "negative", "positive"]
    assert [row["id"] for row in found] == ["007", "8"] and found[1]["text"] == 'a "bad" film,\ntruly bad'
    printed = [line.split("\t") for line in script("predict.py", "--precision", "fp32", *(row["text"] for row in found))
               .out.splitlines()]
    for row, (label, probability, _) in zip(found, printed):
        assert row["prediction"] == label
        assert float(row[label]) == pytest.approx(float(probability), abs=1.1e-4)
        assert float(row["negative"]) + float(row["positive"]) == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("ending", ["tsv", "jsonl", "json", "parquet", "csv.gz"])
def test_a_table_of_any_kind_is_read_and_written(train, script, ending):
    train("--epochs", 1)
    write_csv("texts.csv", [(f"a good film {i}", str(i)) for i in range(20)], header=("body", "id"))
    for source, target in (("texts.csv", f"first.{ending}"), (f"first.{ending}", "second.csv")):
        options = ("--text-column", "body") if source == "texts.csv" else ("--text-column", "prediction")
        outcome = script("predict.py", "--input", source, "--output", target, *options)
        if source != "texts.csv":  # it holds predictions already
            assert outcome.code == 2 and f"{source} has a column 'prediction' already" in outcome.err
        else:
            assert outcome.code == 0, outcome.err
    again = tables.read_table(Path(f"first.{ending}"))
    assert again.names == ["body", "id", "prediction", "negative", "positive"]
    assert again.column("id") == [str(i) for i in range(20)] and set(again.column("prediction")) <= {
        "negative", "positive"}


def test_a_row_of_words_has_a_tag_for_each_word_of_its_own(script, tiny_model):
    rows = [{"tokens": ["Ada", "saw", "New York", "10\u00a0000"], "ner_tags": ["B-x", "O", "B-y", "O"]}] * 40
    Path("words.jsonl").write_text("".join(json.dumps({**row, "number": i}) + "\n" for i, row in enumerate(rows)))
    outcome = script("train.py", "--model", tiny_model, "--task", "tagging", "--dataset", "words.jsonl", "--epochs", 1)
    assert outcome.code == 0, outcome.err
    assert script("predict.py", "--input", "words.jsonl", "--output", "tagged.jsonl").code == 0
    tagged = [json.loads(line) for line in Path("tagged.jsonl").read_text().splitlines()]
    assert {(len(row["tokens"]), len(row["prediction"])) for row in tagged} == {(4, 4)}


def test_a_table_is_never_written_over_its_input_and_over_another_file_only_when_asked(train, script, folder):
    train("--epochs", 1)
    before = (folder / "films.csv").read_bytes()
    for more in ((), ("--overwrite",)):
        own = script("predict.py", "--input", "films.csv", "--output", "./films.csv", *more)
        assert own.code == 2 and own.error_lines == ["error: films.csv is the input itself: choose another --output"]
    assert (folder / "films.csv").read_bytes() == before
    (folder / "there.csv").write_text("mine")
    there = script("predict.py", "a film", "--output", "there.csv")
    assert there.code == 2 and "there.csv is there already" in there.err
    assert (folder / "there.csv").read_text() == "mine"
    assert script("predict.py", "a film", "--output", "there.csv", "--overwrite").code == 0
    assert [row["text"] for row in read_table("there.csv")] == ["a film"]


@pytest.mark.parametrize(("options", "said"), [
    (("--input", "films.csv", "a text"), "give either --input or texts, not both"),
    (("a text", "--text-column", "body"), "are for --input"),
    (("--input", "films.csv", "--output", "predictions.xlsx"), "should end in one of .csv, .tsv, .jsonl"),
    (("--input", "nowhere.csv", "--output", "predictions.csv"), "there is no file nowhere.csv"),
    (("--input", "films.csv", "--text-column", "body"), "no column 'body'; --text-column can be one of text, label"),
    (("--input", "films.csv", "--encoding", "utf9"), "encoding must be one that Python knows"),
    (("--input", "films.csv", "--delimiter", "tabs"), "delimiter must be one character"),
    (("--input", "empty.csv", "--output", "predictions.csv"), "empty.csv, row 2: the text is empty")])
def test_a_table_that_cannot_be_read_or_written_is_refused_in_one_line(train, script, folder, options, said):
    train("--epochs", 1)
    (folder / "empty.csv").write_text('text,id\nfine,1\n"",2\n')
    outcome = script("predict.py", *options)
    assert outcome.code == 2 and said in outcome.err and not (folder / "predictions.csv").exists()


def test_predict_reads_files_by_the_options_that_training_has(train, script, folder):
    train("--epochs", 1)
    (folder / "films.txt.csv").write_bytes("text\tid\nun caf\u00e9\t1\n".encode("cp1252"))
    outcome = script("predict.py", "--input", "films.txt.csv", "--delimiter", "tab", "--encoding", "cp1252")
    assert outcome.code == 0 and outcome.out.endswith("\tun caf\u00e9\n"), outcome.err


def test_columns_that_the_output_cannot_hold_are_told_before_the_work(train, script, folder, monkeypatch):
    train("--epochs", 1)
    (folder / "texts.jsonl").write_text('{"text": "a film", "other": 1}\n{"text": "a film", "other": "one"}\n')
    monkeypatch.setattr("minipeft.commands.predict.predict_table", lambda *a, **k: pytest.fail("only after the work"))
    outcome = script("predict.py", "--input", "texts.jsonl", "--output", "predictions.parquet")
    assert outcome.code == 2 and "predictions.parquet cannot hold these columns" in outcome.err


@pytest.mark.parametrize(("dataset", "column", "text"), [
    ("wnut_17", "tokens", "Ada saw Rome"), ("multi30k", "source", "a dog")])
def test_tables_of_other_tasks_hold_tags_or_texts(script, tiny_model, folder, dataset, column, text):
    write_datasets(folder)
    trained = script("train.py", "--model", tiny_model, "--dataset", dataset, "--data-dir", ".", "--epochs", 1,
                     "--max-length", 48, "--precision", "fp32")
    assert trained.code == 0, trained.err
    write_csv("texts.csv", [(text, 1), (text, 2)], header=(column, "id"))
    outcome = script("predict.py", "--input", "texts.csv", "--output", "found.csv", "--precision", "fp32")
    assert outcome.code == 0, outcome.err
    found = read_table("found.csv")
    assert list(found[0]) == [column, "id", "prediction"] and [row["id"] for row in found] == ["1", "2"]
    printed = script("predict.py", text, "--precision", "fp32").out.rstrip("\n")
    if dataset == "wnut_17":
        tags = found[0]["prediction"].split()
        words = [word if tag == "O" else f"{word}/{tag}" for word, tag in zip(text.split(), tags)]
        assert " ".join(words) == printed and len(tags) == 3
    else:
        assert found[0]["prediction"].split() == printed.split()


# --- what is said first -----------------------------------------------------------------------------------------------

def test_what_was_chosen_is_printed_first_with_the_reason(train, tiny_model):
    lines = train().out.splitlines()
    assert re.fullmatch(r"device +cpu \(what this machine has\)", lines[0])
    assert re.fullmatch(r"precision +float32 \(asked for\)", lines[1])
    assert re.fullmatch(rf"model +{tiny_model} \(asked for\)", lines[2])
    assert re.fullmatch(r"dataset +films\.csv \(asked for\)", lines[3])
    assert re.fullmatch(r"dropout +0 in the base \(its config\.json: 0\.1\)", lines[4])
    assert re.fullmatch(r"task +classification", lines[5])
    assert re.fullmatch(r"sizes +32 train, 4 validation, 4 test", lines[6])
    assert re.fullmatch(r"best +the lowest validation loss, as examples are few", lines[7])
    assert "trainable params: " in lines[8]


def test_a_dropout_that_is_what_the_base_has_is_not_worth_a_line(train):
    assert "dropout" not in train("--dropout", 0.1).out


def test_without_a_dataset_or_network_the_sample_is_used_and_the_reason_printed(script, tiny_model):
    outcome = script("train.py", "--model", tiny_model, *QUICK, "--epochs", 1, "--train-size", 20)
    assert outcome.code == 0, outcome.err
    assert re.search(r"^dataset +sample \(IMDb is not on this machine", outcome.out, re.MULTILINE)
    assert "20 train" in outcome.out


@pytest.mark.kind("7: evaluate without --dataset uses the adapter's own")
def test_evaluate_tests_on_what_the_model_was_trained_on_or_says_that_it_cannot(train, script, folder):
    train()
    outcome = script("evaluate.py")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[1:4] == [
        "dataset    films.csv (which the model was trained on)",
        "tested     the rows held out when the model was trained on the others", "films.csv, 4 of 4 test examples"]
    (folder / "films.csv").rename("other.csv")
    gone = script("evaluate.py")
    assert gone.code == 2 and gone.error_lines == ["error: there is no file films.csv"]


@pytest.mark.kind("7: whole files are tested")
def test_evaluate_tests_all_rows_of_a_file_but_of_the_training_file_those_held_out(train, script, folder):
    train()
    write_csv("more.csv", rows(6))
    whole = script("evaluate.py", "--dataset", "more.csv")
    assert whole.code == 0 and "tested     all rows\nmore.csv, 12 of 12 test examples\n" in whole.out, whole.err
    (folder / "films.csv").rename("renamed.csv")
    same = script("evaluate.py", "--dataset", "renamed.csv")
    assert "tested     the rows held out when the model was trained on the others\nrenamed.csv, 4 of 4" in same.out


@pytest.mark.kind("7: another dataset's or base's adapter folder is not overwritten")
def test_what_another_request_left_is_kept_and_overwritten_only_when_asked(train, script, tiny_model):
    train()
    train()  # the same request replaces itself
    adapter = files_below("checkpoints/lora_films_finetuned")
    refused = script("train.py", "--model", tiny_model, "--dataset", "films.csv", *QUICK, "--r", 2)
    assert refused.code == 2 and refused.error_lines == [
        "error: checkpoints/lora_films_finetuned and results/fine_tuned_lora_films_results.json hold another run (r 8, "
        "not 2): give this one another --output and --results-dir, or replace that one with --overwrite"]
    assert files_below("checkpoints/lora_films_finetuned") == adapter
    assert "wrote checkpoints/lora_films_finetuned" in train("--r", 2, "--overwrite").out
    assert read_json("results/fine_tuned_lora_films_results.json")["method_config"]["r"] == 2
    base = script("train.py", "--model", tiny_model, "--dataset", "films.csv", "--output", tiny_model, "--overwrite")
    assert base.code == 2 and "is the base model of this run: choose another --output" in base.err


# --- options reach the configuration ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "expected"), [
    (("--r", 2), {"r": 2}), (("--lora-alpha", 7.5), {"lora_alpha": 7.5}),
    (("--lora-dropout", 0.25), {"lora_dropout": 0.25}),
    (("--target-modules", "c_attn"), {"target_modules": ["c_attn"]}),
    (("--target-modules", "c_attn,mlp.c_fc"), {"target_modules": ["c_attn", "mlp.c_fc"]}),
    (("--target-modules", r".*\.h\.1\..*c_proj"), {"target_modules": r".*\.h\.1\..*c_proj"}),
    (("--target-modules", r".*h\.\d{1,2}\.mlp\.c_fc"), {"target_modules": r".*h\.\d{1,2}\.mlp\.c_fc"}),
    (("--target-modules", "all-linear"), {"target_modules": "all-linear"}),
    (("--exclude-modules", "c_proj"), {"exclude_modules": ["c_proj"]}),
    (("--target-modules", "c_attn", "--layers-to-transform", "0,1"), {"layers_to_transform": [0, 1]}),
    (("--target-modules", "c_attn", "--layers-to-transform", "1"), {"layers_to_transform": 1}),
    (("--target-modules", "c_attn", "--layers-to-transform", "1", "--layers-pattern", "h"), {"layers_pattern": ["h"]}),
    (("--rank-pattern", '{"c_attn": 3}'), {"rank_pattern": {"c_attn": 3}}),
    (("--alpha-pattern", '{"c_attn": 3.5}'), {"alpha_pattern": {"c_attn": 3.5}}),
    (("--bias", "lora_only"), {"bias": "lora_only"}), (("--use-rslora", "true"), {"use_rslora": True}),
    (("--init-lora-weights", "gaussian"), {"init_lora_weights": "gaussian"}),
    (("--init-lora-weights", "false"), {"init_lora_weights": False}),
    (("--init-lora-weights", "True"), {"init_lora_weights": True})],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_an_option_of_the_method_reaches_its_configuration(train, options, expected):
    train("--epochs", 1, *options)
    found = read_json("results/fine_tuned_lora_films_results.json")["method_config"]
    assert {key: found[key] for key in expected} == expected


def test_layers_can_be_chosen_without_naming_modules(train):
    train("--epochs", 1, "--layers-to-transform", "1")
    tensors = read_json("checkpoints/lora_films_finetuned/adapter_config.json")
    assert tensors["layers_to_transform"] in (1, [1]) or all(".h.1." in name for name in tensors["target_modules"])


def test_an_option_of_the_training_reaches_its_configuration(train):
    train("--epochs", 2, "--gradient-accumulation", 2, "--weight-decay", 0.3, "--warmup-ratio", 0.2, "--max-grad-norm",
          0.5, "--loraplus-lr-ratio", 4, "--evaluations-per-epoch", 1, "--class-weights", "balanced", "--seed", 11,
          "--patience", 4)
    found = read_json("results/fine_tuned_lora_films_results.json")
    assert found["training_config"] == {
        "epochs": 2, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 0.02, "weight_decay": 0.3,
        "warmup_ratio": 0.2, "max_grad_norm": 0.5, "loraplus_lr_ratio": 4.0, "evaluations_per_epoch": 1,
        "patience": 4, "class_weights": "balanced", "seed": 11}
    assert found["seed"] == 11 and len(found["curve"]) == 2


def test_what_is_not_given_comes_from_the_table_of_defaults(script, tiny_model, monkeypatch):
    monkeypatch.setattr(defaults, "FEW_EXAMPLES", 0)  # else a rate of its own
    script("train.py", "--model", tiny_model, "--dataset", "films.csv", "--epochs", 1)
    found = read_json("results/fine_tuned_lora_films_results.json")
    table = defaults.DEFAULTS["lora"]
    assert {key: found["method_config"][key] for key in table["method"]} == table["method"]
    assert found["training_config"]["learning_rate"] == table["training"]["learning_rate"]


def test_output_and_results_go_where_they_are_sent(train, folder):
    train("--output", "here/adapter", "--results-dir", "there")
    assert {os.path.relpath(file, folder) for file in files_below(folder)} == {
        "films.csv", "here/adapter/adapter_config.json", "here/adapter/adapter_model.safetensors",
        "here/adapter/minipeft.json", "there/fine_tuned_lora_films_results.json"}


def test_columns_of_ones_own_file_are_named_by_options(script, tiny_model):
    write_csv("other.csv", header=("review", "verdict"))
    outcome = script("train.py", "--model", tiny_model, "--dataset", "other.csv", "--text-column", "review",
                     "--label-column", "verdict", *QUICK)
    assert outcome.code == 0, outcome.err


def test_switches_reach_the_run(script, tiny_model, monkeypatch):
    received = {}

    def note(options, say):
        received.update(vars(options))
        return {"done": True}

    monkeypatch.setattr(command, "finetune", note)
    assert script("train.py", "--full", "--compile", "--gradient-checkpointing", "--resume", "--max-length", 9,
                  "--dropout", 0.3, "--device", "cpu", "--truncation", "head", "--test-size", 5).code == 0
    assert {"full": True, "compile": True, "gradient_checkpointing": True, "resume": True, "max_length": 9,
            "dropout": 0.3, "device": "cpu", "truncation": "head", "test_size": 5, "train_size": None,
            "model": None, "dataset": None, "method": "lora"}.items() <= received.items()
    assert script("train.py").code == 0
    assert not any(received[name] for name in ("full", "compile", "gradient_checkpointing", "resume"))


@pytest.mark.kind("7: American and British task names")
@pytest.mark.parametrize("name", ["summarization", "summarisation"])
def test_a_task_has_its_american_and_its_british_name(script, tiny_model, name):
    write_csv("pairs.csv", [(f"we study film number {i}", f"film {i}") for i in range(40)], header=("source", "target"))
    outcome = script("train.py", "--model", tiny_model, "--dataset", "pairs.csv", "--task", name, "--epochs", 1,
                     "--max-length", 32, "--max-new-tokens", 4)
    assert outcome.code == 0, outcome.err
    assert re.search(r"^task +summarization$", outcome.out, re.MULTILINE)


# --- help -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "groups"), [
    ("train.py", ["what to train", "method lora", "data", "length and size", "training", "machine", "output"]),
    ("evaluate.py", ["what to test", "data", "machine"]), ("predict.py", ["what to predict", "machine"]),
    ("pretraining/pretrain.py", ["where", "size", "recipe", "machine"]), ("report.py", [])])
def test_help_groups_the_options_and_shows_the_command(script, name, groups):
    outcome = script(name, "--help")
    assert outcome.code == 0 and not outcome.err
    for group in groups:
        assert re.search(rf"^{group}.*:$", outcome.out, re.MULTILINE), group
    assert f"python scripts/{name}" in outcome.out


def test_a_methods_help_shows_its_own_options_and_no_others(script):
    lora, full = (script("train.py", "--method", method, "--help").out for method in ("lora", "full"))
    for option in ("--lora-alpha", "--lora-dropout", "--target-modules", "--layers-to-transform", "--bias", "--r "):
        assert option in lora
        assert option not in full
    for option in ("--learning-rate", "--epochs", "--max-length"):
        assert option in lora and option in full


def test_help_shows_the_methods_defaults(script):
    table = defaults.DEFAULTS["lora"]
    text = " ".join(script("train.py", "--method", "lora", "--help").out.split())
    assert f"divided by r, or by sqrt(r) with use_rslora; default {table['method']['lora_alpha']}" in text
    assert f"peak learning rate; default {table['training']['learning_rate']}" in text


# --- in a process of their own ----------------------------------------------------------------------------------------

def call(*command, **more):
    """A script run as from a shell, somewhere else than in the repository, without its progress bars."""
    environment = {key: value for key, value in os.environ.items() if key != "MINIPEFT_DATA"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300,
                          env=environment | {"PYTHONWARNINGS": "ignore"}, **more)


def test_the_scripts_run_from_another_folder_as_processes(tiny_model, folder):
    done = call(SCRIPTS / "train.py", "--model", tiny_model, "--dataset", "films.csv", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no bars, as standard error is a pipe"
    assert len([line for line in done.stdout.splitlines() if line.startswith("step ")]) == 6  # one for each validation
    done = call(SCRIPTS / "predict.py", input="a good film\na bad film\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "adapter    checkpoints/lora_films_finetuned (the newest in checkpoints)\n"
    assert len(done.stdout.splitlines()) == 2


def test_a_users_mistake_is_one_line_and_code_2_also_in_a_process(folder):
    done = call(SCRIPTS / "predict.py", "text", "--adapter", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: nowhere holds neither .*\n", done.stderr)


def test_the_library_never_imports_transformers_or_peft(folder):
    code = ("import sys, runpy; sys.argv = ['train.py', '--help']\n"
            f"sys.path.insert(0, {str(SCRIPTS)!r})\n"
            f"try: runpy.run_path({str(SCRIPTS / 'train.py')!r}, run_name='__main__')\n"
            "except SystemExit: pass\n"
            "import minipeft\n"
            "assert not {'transformers', 'peft'} & set(sys.modules), 'imported'")
    done = call("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / "checkpoints" / "mini" / "model.safetensors").is_file(), reason="no bundled model")
def test_with_nothing_named_the_bundled_model_trains_and_predicts(script):
    outcome = script("train.py", "--train-size", 64, "--validation-size", 20, "--test-size", 20, "--epochs", 1,
                     "--max-length", 64, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert re.search(r"^model +mini \(default on cpu\)", outcome.out, re.MULTILINE)
    assert re.search(r"^dataset +sample ", outcome.out, re.MULTILINE)
    assert "64 train, 20 validation, 20 test" in outcome.out
    predicted = script("predict.py", "A film I will not forget.")
    assert predicted.code == 0 and predicted.out.endswith("\tA film I will not forget.\n")


# --- anatomy and tuning -----------------------------------------------------------------------------------------------

def test_anatomy_prints_the_tree_before_and_after_and_the_count(script, tiny_model):
    outcome = script("anatomy.py", "--model", tiny_model, "--method", "lora", "--target-modules", "c_attn")
    assert outcome.code == 0, outcome.err
    before, after = outcome.out.split(" with lora")
    assert "LoRALinear" not in before and "*" not in before
    assert "(c_attn) LoRALinear" in after and "trainable params: " in after


def test_anatomy_shows_a_method_in_chosen_blocks_without_modules_being_named(script, tiny_model):
    outcome = script("anatomy.py", "--model", tiny_model, "--method", "lora", "--layers-to-transform", 0)
    assert outcome.code == 0, outcome.err
    after = outcome.out.split(" with lora")[1]
    first, second = after.split("(0) Block")[1].split("(1) Block")
    assert first.count("LoRALinear") == 4 and "LoRALinear" not in second
    refused = script("anatomy.py", "--model", tiny_model, "--layers-to-transform", "0,99")
    assert refused.code == 2 and "layers_to_transform=[0, 99]: this model has the blocks 0 to 1" in refused.err


def test_anatomy_draws_one_picture_or_the_gallery_of_all(script, tiny_model, folder):
    pytest.importorskip("matplotlib")
    assert script("anatomy.py", "--model", tiny_model, "--picture", "block.svg").code == 0
    assert (folder / "block.svg").is_file()
    assert script("anatomy.py", "--model", tiny_model, "--all", "--output", "gallery").code == 0
    text = (folder / "gallery" / "README.md").read_text()
    assert {file.name for file in (folder / "gallery").iterdir()} == {"README.md", *(f"{m}.png" for m in METHODS)}
    assert all(f"({method}.png)" in text and f"| {method} |" in text for method in METHODS)


def test_tune_prints_a_line_for_each_trial_and_writes_them(script, tiny_model, folder):
    outcome = script("tune.py", "--model", tiny_model, "--dataset", "films.csv", "--max-length", 32,
                     "--try", '{"epochs": 1, "r": 2}', "--try", '{"epochs": 1, "r": 4}')
    assert outcome.code == 0, outcome.err
    assert ["{'epochs': 1, 'r': 2}" in outcome.out, "{'epochs': 1, 'r': 4}" in outcome.out] == [True, True]
    assert len(read_json(folder / "results" / "tuning_lora.json")["trials"]) == 2


@pytest.mark.parametrize("options", [
    ("--layers-to-transform", 0, "--try", '{"epochs": 1}'), ("--try", '{"epochs": 1, "layers_to_transform": [0]}')])
def test_tune_trains_chosen_blocks_without_modules_being_named(script, tiny_model, folder, options):
    outcome = script("tune.py", "--model", tiny_model, "--dataset", "films.csv", "--max-length", 32, *options)
    assert outcome.code == 0, outcome.err
    (trial,) = read_json(folder / "results" / "tuning_lora.json")["trials"]
    assert trial["method_config"]["target_modules"] == "all-linear"
    assert trial["method_config"]["layers_to_transform"] in (0, [0])
    refused = script("tune.py", "--model", tiny_model, "--dataset", "films.csv", "--layers-to-transform", 99, "--try",
                     "{}")
    assert refused.code == 2 and "this model has the blocks 0 to 1" in refused.err


def test_options_of_the_method_are_what_all_trials_share(script, tiny_model, folder):
    outcome = script("tune.py", "--model", tiny_model, "--dataset", "films.csv", "--method", "prefix",
                     "--num-virtual-tokens", 3, "--try", '{"epochs": 1}', "--try",
                     '{"epochs": 1, "num_virtual_tokens": 4}')
    assert outcome.code == 0, outcome.err
    trials = read_json(folder / "results" / "tuning_prefix.json")["trials"]
    assert [trial["method_config"]["num_virtual_tokens"] for trial in trials] == [3, 4]


@pytest.mark.parametrize(("method", "option", "other"), [
    ("prefix", "--prefix-projection", "--lora-alpha"), ("adapter", "--bottleneck-size", "--r VALUE"),
    ("dora", "--lora-alpha", "--use-dora"), ("head", "--recompute-features", "--r VALUE")])
def test_each_methods_help_lists_its_own_options(script, method, option, other):
    for name in ("train.py", "tune.py", "anatomy.py") if option != "--recompute-features" else ("train.py",):
        shown = script(name, "--method", method, "--help").out
        assert option in shown and other not in shown, name


# --- other tasks ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("dataset", "text", "shown"), [
    ("wnut_17", "Ada saw Rome", r"Ada\S* saw\S* Rome\S*\n"), ("scitldr", "We study films. All of them.", r"[^\n]*\n"),
    ("multi30k", "a dog", r"[^\n]*\n")])
def test_train_evaluate_and_predict_work_for_every_task(script, tiny_model, folder, dataset, text, shown):
    write_datasets(folder)
    trained = script("train.py", "--model", tiny_model, "--dataset", dataset, "--data-dir", ".", "--epochs", 1,
                     "--max-length", 48, "--precision", "fp32")
    assert trained.code == 0, trained.err
    tested = script("evaluate.py", "--dataset", dataset, "--data-dir", ".", "--precision", "fp32", "--json", "t.json")
    results = read_json(f"results/fine_tuned_lora_{dataset}_results.json")
    assert tested.code == 0 and read_json("t.json")["metrics"] == results["metrics"]["test"]
    assert f"{dataset}, 4 of 4 test examples" in tested.out
    predicted = script("predict.py", text)
    assert predicted.code == 0 and re.fullmatch(shown, predicted.out.replace("\r", " ").replace("\v", " "))


def test_a_translation_is_the_same_twice_with_a_seed_and_by_beams_at_once(script, tiny_model, folder):
    write_datasets(folder)
    script("train.py", "--model", tiny_model, "--dataset", "multi30k", "--data-dir", ".", "--epochs", 1,
           "--max-length", 48, "--precision", "fp32")
    sampled = [script("predict.py", "a dog", "--top-k", 9, "--seed", seed).out for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert script("predict.py", "a dog", "a cat", "--num-beams", 2).code == 0
