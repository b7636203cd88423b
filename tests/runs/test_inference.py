"""inference.py: what training left is tested and predicts, without a script."""

from __future__ import annotations

import json

import pytest
from helpers import rows, write_csv
from parity_helpers import write_checkpoint

from minipeft.errors import ConfigError, DataError
from minipeft.runs.finetune import finetune
from minipeft.runs.inference import evaluate, load, predict, predict_table
from minipeft.runs.plan import Options


@pytest.fixture
def trained(options, tmp_path):
    """(a trained classifier, the results of its run)."""
    results = finetune(options())
    return load(tmp_path / "output" / "lora", Options(precision="fp32")), results


def test_a_test_after_loading_gives_the_metrics_of_the_run(trained, tmp_path):
    model, results = trained
    said = []
    found = evaluate(model, Options(dataset=str(tmp_path / "films.csv")), said.append)
    assert found.metrics == results["metrics"]["test"]
    assert (found.examples, found.available) == (4, 4)
    assert said == [f"dataset    {tmp_path / 'films.csv'} (asked for)",
                    "tested     the rows held out when the model was trained on the others"]
    assert evaluate(model, Options(dataset=found.dataset, test_size=2)).examples == 2


def test_without_a_dataset_a_file_of_ones_own_is_found_and_read_as_it_was_in_training(options, tmp_path):
    write_csv(tmp_path / "films.csv", rows(), header=("body", "verdict"))
    results = finetune(options(text_column="body", label_column="verdict", training_values={"epochs": 1}))
    model, said = load(tmp_path / "output" / "lora", Options(precision="fp32")), []
    found = evaluate(model, Options(), said.append)
    assert found.metrics == results["metrics"]["test"]
    assert said[0] == f"dataset    {tmp_path / 'films.csv'} (which the model was trained on)"
    write_csv(tmp_path / "films.csv", rows(21), header=("body", "verdict"))
    with pytest.raises(DataError, match=r"has changed since .* was trained on it: name it with --dataset"):
        evaluate(model, Options())


@pytest.mark.kind("7: whole files are tested")
def test_all_rows_of_another_file_are_tested_however_few_and_training_rows_are_told(options, trained, tmp_path):
    model, _ = trained
    few = write_csv(tmp_path / "few.csv", rows(1))
    said = []
    assert evaluate(model, Options(dataset=few), said.append).examples == 2 and said[1] == "tested     all rows"
    split = {"dataset": write_csv(tmp_path / "a.csv", rows(20)), "validation_file": few, "test_file": few}
    finetune(options(**split, output=str(tmp_path / "split"), training_values={"epochs": 1}))
    model = load(tmp_path / "split", Options(precision="fp32"))
    assert evaluate(model, Options(dataset=split["dataset"]), said.append).examples == 40
    assert said[-1] == "tested     all rows, which the model was trained on"
    assert evaluate(model, Options(), said.append).examples == 2


def test_of_the_training_file_held_out_rows_are_tested_also_where_another_split_had_a_file(options, tmp_path):
    films, few, said = str(tmp_path / "films.csv"), write_csv(tmp_path / "few.csv", rows(1)), []
    results = finetune(options(validation_file=few, training_values={"epochs": 1}))
    model = load(tmp_path / "output" / "lora", Options(precision="fp32"))
    found = evaluate(model, Options(dataset=films), said.append)
    assert (found.metrics, found.available) == (results["metrics"]["test"], 4)
    assert said[-1] == "tested     the rows held out when the model was trained on the others"
    write_csv(tmp_path / "other.csv", rows()[::-1])
    assert evaluate(model, Options(dataset=str(tmp_path / "other.csv")), said.append).available == 40
    assert said[-1].startswith("tested     all rows, most of which the model was trained on")
    finetune(options(test_file=few, output=str(tmp_path / "b"), training_values={"epochs": 1}, overwrite=True))
    model = load(tmp_path / "b", Options(precision="fp32"))
    assert evaluate(model, Options(dataset=films), said.append).available == 40
    assert said[-1] == "tested     all rows, which the model was trained on"
    assert evaluate(model, Options(dataset=few), said.append).available == 2 and said[-1] == "tested     all rows"


def test_without_a_dataset_it_is_tested_on_what_it_was_trained_on_if_that_has_a_name(trained, tmp_path):
    said, details = [], tmp_path / "output" / "lora" / "minipeft.json"
    details.write_text(json.dumps({**json.loads(details.read_text()), "dataset": "sample"}))
    assert evaluate(trained[0], Options(test_size=3), said.append).dataset == "sample"
    assert said == ["dataset    sample (which the model was trained on)",
                    "tested     its test split, which has changed since the model was trained"]


def test_without_a_dataset_a_model_that_does_not_say_what_it_was_trained_on_is_not_tested(trained, tmp_path):
    details = tmp_path / "output" / "lora" / "minipeft.json"
    content = json.loads(details.read_text())
    del content["dataset"], content["data"]
    details.write_text(json.dumps(content))
    with pytest.raises(DataError, match="lora does not say what it was trained on: name a dataset with --dataset"):
        evaluate(trained[0], Options())


@pytest.mark.parametrize("noted", [None, {"dataset": {"fingerprints": "zz"}, "training_config": {"seed": "a"}}])
def test_a_request_that_is_damaged_is_as_none(trained, tmp_path, noted):
    details, said = tmp_path / "output" / "lora" / "minipeft.json", []
    details.write_text(json.dumps({**json.loads(details.read_text()), "request": noted}))
    found = evaluate(trained[0], Options(dataset=str(tmp_path / "films.csv"), test_size=2), said.append)
    assert (found.examples, found.available) == (2, 40) and said[-1] == "tested     all rows"


def test_a_dataset_with_other_labels_is_refused(trained, tmp_path):
    other = write_csv(tmp_path / "other.csv", [(f"film {i}", ("good", "poor")[i % 2]) for i in range(40)])
    with pytest.raises(DataError, match="label 'good' is none of negative, positive"):
        evaluate(trained[0], Options(dataset=other))


@pytest.fixture
def public(tiny_model, tmp_path):
    """public(num_labels): a classifier that transformers' Trainer left, which does not name its labels."""

    def make(num_labels=2):
        write_checkpoint(tmp_path / "checkpoint-8", tiny_model, "SEQ_CLS", num_labels=num_labels)
        return load(tmp_path / "checkpoint-8", Options(model=str(tiny_model), precision="fp32"))

    return make


@pytest.mark.kind("6: a trainer's folder is tested on a dataset whose labels it does not name")
def test_labels_that_an_adapter_does_not_name_are_the_dataset_s_in_their_order_and_that_is_said(public, tmp_path):
    films = write_csv(tmp_path / "films.csv")
    said = []
    found = evaluate(public(), Options(dataset=films), said.append)
    assert said[1] == ("labels     0 = negative, 1 = positive (in the dataset's order: the model's folder does not "
                       "name them)")
    write_csv(tmp_path / "numbers.csv", [(text, ("negative", "positive").index(label)) for text, label in rows()])
    numbers = evaluate(public(), Options(dataset=str(tmp_path / "numbers.csv")), said.append)
    assert len(said) == 5 and said[3].endswith("(asked for)") and said[4] == "tested     all rows"
    assert list(numbers.metrics.pop("by_label").values()) == list(found.metrics.pop("by_label").values())
    assert (numbers.metrics.pop("f1_label"), found.metrics.pop("f1_label")) == ("1", "positive")
    assert numbers.metrics == found.metrics


def test_a_dataset_with_another_number_of_labels_is_refused(public, tmp_path):
    films = write_csv(tmp_path / "films.csv")
    with pytest.raises(DataError, match=r"has the labels negative, positive, but .* was trained for 0, 1, 2"):
        evaluate(public(num_labels=3), Options(dataset=films))


def test_a_classifier_predicts_a_line_for_each_text_and_writes_none(trained):
    lines = list(predict(trained[0], ["a good film", "a bad film"]))
    assert [line.split("\t")[2] for line in lines] == ["a good film\n", "a bad film\n"]
    with pytest.raises(ConfigError, match="which writes no text: --num-beams means nothing to it"):
        predict(trained[0], ["a good film"], num_beams=2)


@pytest.mark.parametrize("ask", [lambda *request: list(predict(*request)), predict_table])
def test_texts_are_a_list_of_texts_of_which_none_is_empty(trained, ask):
    model, _ = trained
    assert len(ask(model, (text for text in ["a good film", "a bad film"]))) > 0
    assert ask(model, []) in ([], {"prediction": []})
    for texts, message in (("a film", "got one text"), (["a film", ""], "^text 2 of 2: the text is empty"),
                           ([None], "^text 1 of 1: the text is")):
        with pytest.raises(DataError, match=message):
            ask(model, texts)


def test_a_label_called_as_the_tables_column_is_refused_there(trained):
    model, _ = trained
    assert predict_table(model, ["a good film"]).keys() == {"prediction", "negative", "positive"}
    model.task.label_names = ["prediction", "positive"]
    with pytest.raises(DataError, match="one of the labels is called 'prediction'"):
        predict_table(model, ["a good film"])


def test_of_a_test_split_those_are_taken_that_the_training_took(options, tmp_path):
    write_csv(tmp_path / "many.csv", rows(60))
    results = finetune(options(dataset=str(tmp_path / "many.csv"), test_size=5,
                               training_values={"seed": 3, "epochs": 1}))
    model = load(tmp_path / "output" / "lora", Options(precision="fp32"))
    assert evaluate(model, Options(test_size=5)).metrics == results["metrics"]["test"]
    assert evaluate(model, Options(test_size=5, subset_seed=0)).metrics["loss"] != results["metrics"]["test"]["loss"]


def test_a_translator_samples_the_same_with_the_same_seed(options, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(f'{{"source": "a dog {i}", "target": "ein Hund"}}\n'
                                                  for i in range(40)))
    finetune(options(dataset=str(tmp_path / "pairs.jsonl"), task="translation", training_values={"epochs": 1}))
    model = load(tmp_path / "output" / "lora", Options(precision="fp32"))
    first, again, other = ("".join(predict(model, ["a dog"], top_k=50, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other and first.endswith("\n")
    with pytest.raises(ConfigError, match="--length-penalty is for beam search: add --num-beams"):
        predict_table(model, ["a dog"], length_penalty=3.0)
    for decoding, message in (({"seed": 3}, "--seed is for sampling"), ({"seed": -1}, "seed must be a number from 0"),
                              ({"max_new_tokens": 1}, "at least 2")):
        with pytest.raises(ConfigError, match=message):
            list(predict(model, ["a dog"], **decoding))
