"""Whatever a user gets wrong ends in exit code 2 and one line that says what, where and what to do; nothing is left
half-written. One test for each item of the list that the project promises, and for what came up beside it."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import sys

import pytest
import torch
from helpers import changed_by_hand, files_below, write_csv, write_imdb, write_parquet, write_tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minipeft import files
from minipeft.data import datasets as data
from minipeft.methods import saving as checkpoint
from minipeft.model import weights
from minipeft.runs import finetune
from minipeft.runs import trained as saved
from minipeft.runs.plan import Options

QUICK = ("--epochs", 1, "--batch-size", 4, "--precision", "fp32")
FULL_DISK = [OSError(errno.ENOSPC, "No space left on device"),
             SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")]


@pytest.fixture(scope="module")
def trained_adapter(tmp_path_factory, tiny_model):
    """An adapter folder as training leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    finetune.finetune(Options(
        model=str(tiny_model), dataset=write_csv(folder / "films.csv"), precision="fp32",
        output=str(folder / "adapter"), results_dir=str(folder), training_values={"epochs": 1}))
    return folder / "adapter"


@pytest.fixture
def refused(script, folder):
    """refused("train.py", *options): the script must end with code 2, one line and no new file; returns the line."""

    def run(name, *options):
        before = files_below(folder)
        outcome = script(name, *options)
        assert outcome.code == 2, outcome.out
        assert len(outcome.error_lines) == 1, outcome.err
        assert outcome.error_lines[0].startswith("error: ")
        assert "Traceback" not in outcome.err
        assert files_below(folder) == before
        return outcome.error_lines[0]

    return run


@pytest.fixture
def train(refused, tiny_model):
    """train(*options): a training run that must be refused."""

    def run(*options):
        return refused("train.py", "--model", tiny_model, "--dataset", "films.csv", *QUICK, *options)

    return run


@pytest.fixture
def adapter(trained_adapter, folder):
    """A copy of the trained adapter, to damage."""
    return shutil.copytree(trained_adapter, folder / "adapter")


@pytest.fixture
def model(tiny_model, folder):
    """A copy of the tiny model, to damage."""
    return shutil.copytree(tiny_model, folder / "model")


# --- unknown names ----------------------------------------------------------------------------------------------------

def test_an_unknown_method(train, refused):
    line = train("--method", "lorra")
    assert "'lorra'" in line and "baseline, full, head, bitfit, lora" in line
    assert "'lorra'" in refused("train.py", "--method", "lorra", "--help")


@pytest.mark.parametrize("name", ["gpt3", "openai-community/gpt3", "nowhere/model", ""])
def test_an_unknown_model(train, name):
    line = train("--model", name)
    assert repr(name) in line and "mini, gpt2, gpt2-medium" in line


@pytest.mark.parametrize("name", ["imbd", "films.txt", ""])
@pytest.mark.parametrize("script_name", ["train.py", "evaluate.py"])
def test_an_unknown_dataset(refused, adapter, tiny_model, name, script_name):
    options = ("--model", tiny_model) if script_name == "train.py" else ("--adapter", adapter)
    line = refused(script_name, *options, "--dataset", name)
    assert repr(name) in line and "sample, or the path of a .csv" in line


def test_a_dataset_file_that_is_not_there(train):
    assert "nowhere.csv" in train("--dataset", "nowhere.csv")


@pytest.mark.parametrize(("option", "column"), [("--text-column", "body"), ("--label-column", "stars")])
@pytest.mark.parametrize("script_name", ["train.py", "evaluate.py"])
def test_an_unknown_column(refused, adapter, tiny_model, option, column, script_name):
    options = ("--model", tiny_model) if script_name == "train.py" else ("--adapter", adapter)
    line = refused(script_name, *options, "--dataset", "films.csv", option, column)
    assert repr(column) in line and "text, label" in line and option in line


@pytest.mark.parametrize(("option", "meant"), [
    ("--rank", "--r"), ("--lora-alhpa", "--lora-alpha"), ("--lr", "--learning-rate"), ("-r", "--r"),
    ("--learningrate", "--learning-rate"), ("--learning", "--learning-rate"), ("--use-dora", "--method dora")])
def test_an_unknown_option(refused, option, meant):
    assert refused("train.py", option, "8") == f"error: unknown option {option}: did you mean {meant}?"
    assert refused("train.py", f"{option}=8") == f"error: unknown option {option}: did you mean {meant}?"


def test_an_unknown_option_that_is_like_none(refused):
    assert refused("train.py", "--xyzzy") == "error: unknown option --xyzzy: --help lists the options"
    assert refused("convert.py", "folder", "--lr", 3) == "error: unknown option --lr: --help lists the options"


@pytest.mark.parametrize("script_name", ["train.py", "tune.py", "anatomy.py"])
def test_an_option_of_another_method(refused, script_name):
    needed = ("--try", "{}") if script_name == "tune.py" else ()
    line = refused(script_name, "--method", "ia3", "--r", 4, *needed)
    assert line == "error: --r is an option of lora, dora, vera, not of ia3"


def test_an_option_that_is_needed(refused):
    assert refused("tune.py") == "error: the following arguments are required: --try"


def test_names_without_commas_and_json_without_quotes(refused):
    line = refused("train.py", "--target-modules", "c_attn", "c_proj")
    assert line.startswith("error: unexpected 'c_proj' after --target-modules: separate by commas")
    assert "like '{\"c_attn\": 4}'" in refused("train.py", "--rank-pattern", "{c_attn:4}")


def test_a_word_that_no_option_takes(refused):
    assert refused("train.py", "sample") == "error: unexpected 'sample': --help lists what the command takes"


# --- model files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("missing", [["model.safetensors"], ["config.json"], ["config.json", "model.safetensors"]])
def test_a_model_folder_without_weights(train, model, missing):
    for file in missing:
        (model / file).unlink()
    line = train("--model", "model")
    assert line.startswith("error: model holds no ") and all(file in line for file in missing)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -8], ids=str)
def test_a_truncated_weights_file(train, model, kept):
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "model.safetensors is truncated or not a safetensors file" in train("--model", "model")


def test_a_corrupt_weights_file(train, model):
    (model / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 1000)
    assert "model.safetensors is truncated or not a safetensors file" in train("--model", "model")


def test_weights_of_other_shapes_than_the_configuration_says(train, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "n_embd": 32}))
    line = train("--model", "model")
    assert "does not fit its config.json" in line
    assert "transformer.h.0.attn.c_attn.weight is (16, 48), expected (32, 96)" in line


def test_weights_with_missing_and_unexpected_tensors(train, model):
    tensors = load_file(model / "model.safetensors")
    tensors["transformer.extra.weight"] = tensors.pop("transformer.h.1.mlp.c_fc.bias")
    save_file(tensors, model / "model.safetensors")
    line = train("--model", "model")
    assert "missing transformer.h.1.mlp.c_fc.bias" in line and "unexpected transformer.extra.weight" in line


def test_a_weights_file_that_is_not_gpt2(train, model):
    save_file({"bert.embeddings.weight": torch.zeros(2, 2)}, model / "model.safetensors")
    line = train("--model", "model")
    assert "is not a GPT-2" in line and "bert.embeddings.weight" in line


@pytest.mark.parametrize(("content", "message"), [
    ("", "not readable JSON"), ("{", "not readable JSON"), ("[1]", "not a JSON object")])
def test_an_unreadable_model_configuration(train, model, content, message):
    (model / "config.json").write_text(content)
    assert message in train("--model", "model")


@pytest.mark.parametrize(("field", "value"), [
    ("model_type", "bert"), ("n_embd", -1), ("n_embd", "wide"), ("n_head", 5), ("n_layer", 1.5), ("resid_pdrop", 2),
    ("layer_norm_epsilon", "small"), ("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True)])
def test_a_model_configuration_with_a_wrong_value(train, model, field, value):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, field: value}))
    line = train("--model", "model")
    assert field in line or repr(value) in line


@pytest.mark.parametrize("content", [b"", b"not a rank file", b"YQ== 0\n", b"\xff\xfe\n"])
def test_a_damaged_vocabulary(train, model, content):
    (model / "vocab.tiktoken").write_bytes(content)
    assert "vocab.tiktoken is not a tiktoken rank file" in train("--model", "model")


def test_a_vocabulary_larger_than_the_model(train, folder):
    write_tiny_model(folder / "small", vocab_size=100, bos_token_id=99, eos_token_id=99)
    line = train("--model", "small")
    assert "100" in line and "264" in line


# --- adapters ---------------------------------------------------------------------------------------------------------

def test_a_folder_without_an_adapter(refused):
    for name in ("predict.py", "evaluate.py"):
        line = refused(name, "--adapter", "nowhere", *(["text"] if name == "predict.py" else []))
        assert line.startswith("error: nowhere holds neither adapter_config.json nor config.json: train first")


@pytest.mark.parametrize("sizes", [{"seed": 1}, {"n_embd": 32}, {"n_layer": 1}, {"n_layer": 3}], ids=str)
def test_an_adapter_for_another_base(refused, adapter, folder, sizes):
    write_tiny_model(folder / "other", **sizes)
    line = refused("predict.py", "text", "--adapter", "adapter", "--model", "other")
    assert "was trained on another base model" in line


def test_an_adapter_whose_base_has_gone(refused, adapter):
    details = json.loads((adapter / "minipeft.json").read_text())
    (adapter / "minipeft.json").write_text(json.dumps({**details, "base_model": "gone/away"}))
    assert "gone/away" in refused("predict.py", "text", "--adapter", "adapter")


@pytest.mark.parametrize("kept", [0, 4, 0.5, -8], ids=str)
def test_a_truncated_adapter(refused, adapter, kept):
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "adapter_model.safetensors" in refused("predict.py", "text", "--adapter", "adapter")


def test_an_adapter_with_missing_misshapen_or_damaged_tensors(refused, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = sorted(tensors)
    tensors[names[0]] = torch.zeros(3, 3)
    tensors[names[1]] = torch.full_like(tensors[names[1]], float("nan"))
    del tensors[names[2]]
    save_file(tensors, adapter / "adapter_model.safetensors")
    changed_by_hand(adapter)
    line = refused("predict.py", "text", "--adapter", "adapter")
    assert f"{names[0]} is (3, 3)" in line and f"{names[1]} holds NaN" in line and f"missing {names[2]}" in line


@pytest.mark.parametrize("file", ["adapter_config.json", "minipeft.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_an_adapters_unreadable_json(refused, adapter, file, content):
    (adapter / file).write_text(content)
    assert file in refused("predict.py", "text", "--adapter", "adapter")


WRONG_FIELDS = [
    ("adapter_config.json", "r", "8"), ("adapter_config.json", "r", -1), ("adapter_config.json", "lora_alpha", "x"),
    ("adapter_config.json", "target_modules", 5), ("adapter_config.json", "rank_pattern", [1]),
    ("adapter_config.json", "rank_pattern", {"(": 2}), ("adapter_config.json", "alpha_pattern", "x"),
    ("adapter_config.json", "exclude_modules", 5), ("adapter_config.json", "bias", "some"),
    ("adapter_config.json", "peft_type", ["LORA"]), ("adapter_config.json", "peft_type", "XLORA"),
    ("adapter_config.json", "use_dora", True), ("adapter_config.json", "peft_type", "PREFIX_TUNING"),
    ("minipeft.json", "label_names", 5), ("minipeft.json", "label_names", []), ("minipeft.json", "label_names", {}),
    ("minipeft.json", "label_names", None), ("minipeft.json", "label_names", ["one", "two", "three"]),
    ("minipeft.json", "max_length", "x"), ("minipeft.json", "max_length", 0), ("minipeft.json", "max_length", None),
    ("minipeft.json", "max_length", 10**6), ("minipeft.json", "truncation", "tail"), ("minipeft.json", "base_model", 5),
    ("minipeft.json", "task", []), ("minipeft.json", "task", "parsing"), ("minipeft.json", "task", "tagging")]


@pytest.mark.parametrize(("file", "field", "value"), WRONG_FIELDS, ids=lambda value: str(value).replace("/", "_"))
def test_an_adapters_json_with_a_wrong_value(refused, adapter, file, field, value):
    changed_by_hand(adapter)
    content = json.loads((adapter / file).read_text())
    (adapter / file).write_text(json.dumps({**content, field: value}))
    text = "a text longer than the model has positions " * 5
    refused("predict.py", text, "--adapter", "adapter")


def test_a_dataset_with_other_labels_than_the_adapters(refused, adapter):
    write_csv("stars.csv", [(f"text {i}", i % 3) for i in range(60)])
    line = refused("evaluate.py", "--adapter", "adapter", "--dataset", "stars.csv")
    assert "label 2 is none of negative, positive" in line


# --- no network -------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["offline", "refused"])
def no_network(request, monkeypatch):
    if request.param == "refused":
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def test_no_network_for_a_model_says_which_files_to_put_where(train, no_network):
    line = train("--model", "gpt2")
    assert "cannot be reached" in line
    for part in ("config.json", "model.safetensors", "openai-community/gpt2", "folder"):
        assert part in line


def test_no_network_for_imdb_says_which_files_to_put_where(train, no_network):
    line = train("--dataset", "imdb")
    assert "cannot be reached" in line
    for part in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "--data-dir", "--dataset sample"):
        assert part in line


def test_no_network_for_gpt2s_vocabulary_says_where_to_put_it(train, model, monkeypatch):
    import tiktoken

    def fail(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    (model / "vocab.tiktoken").unlink()
    assert "holds no vocab.tiktoken, and its model has 264 words" in train("--model", "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 50257}))
    assert "TIKTOKEN_CACHE_DIR" in train("--model", "model")


def test_a_data_folder_without_imdb(train, folder):
    assert "imdb/train-*.parquet" in train("--dataset", "imdb", "--data-dir", folder)


# --- data -------------------------------------------------------------------------------------------------------------

BAD_DATA = {
    "an empty file": ("", "films.csv"), "a header and no rows": ("text,label\n", "no text"),
    "an empty review": ('text,label\nfine,0\n"",1\n', "row 2: the text is empty"),
    "a blank review": ('text,label\n"  \n ",1\nfine,0\n', "row 1: the text is empty"),
    "one label only": ("text,label\n" + "".join(f"film {i},good\n" for i in range(40)), "one label only ('good')"),
    "a missing label": ("text,label\nfine,0\nbad,\n", "row 2: the label is empty"),
    "few rows": ("text,label\nfine,0\nbad,1\n", "too few"),
    "a label a row": ("text,label\n" + "".join(f"film {i},a{i}\n" for i in range(90)), "90 different values"),
    "ragged rows": ("text,label\nfine,0\nbad,1,2,3\n", "not a readable .csv"),
    "a review of a million characters": ("text,label\nfine,0\n" + "x" * 1_000_000 + ",1\n",
                                         "row 2.*1,000,000 characters"),
    "two columns of one name": ("text,text,label\na,b,0\nc,d,1\n", "text"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_data(train, folder, case):
    content, message = BAD_DATA[case]
    (folder / "films.csv").write_text(content)
    line = train()
    assert "films.csv" in line
    assert re.search(message if "*" in message else re.escape(message), line)


def test_imdb_files_with_other_columns(train, folder):
    write_imdb(folder)
    write_parquet("imdb/train-00000-of-00001.parquet", review=["a"], stars=[1])
    assert "text" in train("--dataset", "imdb", "--data-dir", ".")


def test_a_damaged_parquet_file(train, folder):
    (folder / "films.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    assert "films.parquet" in train("--dataset", "films.parquet")


def test_an_error_of_several_lines_from_the_hubs_client_is_printed_as_one(train, monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise RuntimeError("first line\n  second line\n\nthird")

    monkeypatch.setattr(data, "_in_hub_cache", lambda repository: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "first line second line third" in train("--dataset", "imdb")


@pytest.mark.parametrize("texts", [[""], ["fine", "  "], ["x" * 1_000_000]], ids=["empty", "blank", "million"])
def test_a_text_that_cannot_be_predicted(refused, adapter, texts):
    line = refused("predict.py", "--adapter", "adapter", *texts)
    assert f"argument, row {len(texts)}" in line
    assert len(line) < 300


@pytest.mark.parametrize(("content", "message"), [
    ("", "no text at all"), ("\n \n\n", "no text at all"), ("fine\n" + "x" * 1_000_000, "row 2.*1,000,000 characters")],
    ids=["nothing", "blank lines", "million"])
def test_lines_that_cannot_be_predicted(refused, adapter, monkeypatch, content, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    line = refused("predict.py", "--adapter", "adapter")
    assert "standard input" in line and re.search(message, line)


def test_standard_input_that_is_not_utf_8(refused, adapter, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("un café".encode("latin-1")), encoding="utf-8"))
    assert "UTF-8" in refused("predict.py", "--adapter", "adapter").upper()


def test_no_text_and_no_pipe(refused, adapter, monkeypatch):
    terminal = io.StringIO("")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "give texts as arguments, or lines on standard input" in refused("predict.py", "--adapter", "adapter")


# --- the method's values ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "message"), [
    (("--r", 0), "r must be a positive integer, got 0"), (("--r", -1), "r must be a positive integer, got -1"),
    (("--r", 17), "r=17 is larger than transformer.h.0.attn.c_attn's smaller side, 16"),
    (("--rank-pattern", '{"c_fc": 99}'), "r=99 is larger than transformer.h.0.mlp.c_fc"),
    (("--rank-pattern", '{"c_fc": 0}'), "must be a positive integer, got 0"),
    (("--rank-pattern", '{"(": 4}'), "not a regular expression"),
    (("--alpha-pattern", '{"c_fc": "x"}'), "'x'"), (("--alpha-pattern", '{"[": 1}'), "not a regular expression"),
    (("--lora-alpha", "nan"), "lora_alpha"), (("--lora-alpha", "inf"), "lora_alpha"),
    (("--lora-dropout", 1), "lora_dropout"), (("--lora-dropout", -0.5), "lora_dropout"),
    (("--bias", "some"), "none, lora_only, all"), (("--init-lora-weights", "zeros"), "gaussian"),
    (("--target-modules", "("), "not a regular expression"), (("--exclude-modules", "("), "not a regular expression"),
    (("--exclude-modules", "c_attn,c_proj,c_fc"), "leave nothing of what target_modules 'all-linear' match"),
    (("--target-modules", "wte"), "only linear layers"), (("--target-modules", ""), "match nothing"),
    (("--target-modules", "score"), "match nothing"),
    (("--target-modules", "c_attn", "--layers-to-transform", 9), "[9]: this model has the blocks 0 to 1"),
    (("--layers-to-transform", "0,99"), "layers_to_transform=[0, 99]: this model has the blocks 0 to 1"),
    (("--target-modules", "c_attn", "--layers-to-transform", -1), "-1"),
    (("--layers-pattern", "h"), "layers_pattern needs layers_to_transform")],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_values_that_make_no_lora(train, options, message):
    assert message in train(*options)


@pytest.mark.parametrize(("wanted", "nearest"), [
    ("c_atn", "c_attn"), ("q_proj,v_proj", "c_proj"), ("attn.c_prj", "attn.c_proj"), ("mlp.fc", "mlp.c_fc"),
    ("query_key_value", "c_attn, c_fc, c_proj")])
def test_target_modules_that_match_nothing_list_the_nearest_names(train, wanted, nearest):
    line = train("--target-modules", wanted)
    assert "match nothing" in line
    names = line.split("nearest names: ")[1].split(", ")
    assert set(nearest.split(", ")) <= set(names)


@pytest.mark.parametrize(("option", "value"), [
    ("--r", "eight"), ("--lora-alpha", "x"), ("--rank-pattern", "c_fc=4"), ("--rank-pattern", "[1]"),
    ("--layers-to-transform", "first"), ("--layers-to-transform", "0,x"), ("--use-rslora", "maybe"),
    ("--epochs", "1.5"), ("--learning-rate", "fast"), ("--max-length", "long"), ("--truncation", "tail"),
    ("--test-size", "all")])
def test_a_value_of_the_wrong_kind(refused, option, value):
    line = refused("train.py", option, value)
    assert option in line and value in line


# --- numbers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("option", "value", "name"), [
    ("--epochs", 0, "epochs"), ("--epochs", -2, "epochs"), ("--batch-size", 0, "batch_size"),
    ("--gradient-accumulation", 0, "gradient_accumulation"), ("--evaluations-per-epoch", 0, "evaluations_per_epoch"),
    ("--learning-rate", -1, "learning_rate"), ("--learning-rate", 0, "learning_rate"),
    ("--learning-rate", "nan", "learning_rate"), ("--learning-rate", "inf", "learning_rate"),
    ("--weight-decay", -1, "weight_decay"), ("--weight-decay", "nan", "weight_decay"),
    ("--warmup-ratio", 2, "warmup_ratio"), ("--max-grad-norm", 0, "max_grad_norm"), ("--seed", -1, "seed"),
    ("--seed", 2**70, "seed"), ("--dropout", 1.5, "probability"), ("--dropout", "nan", "probability"),
    ("--max-length", 0, "max_length"), ("--max-length", -5, "max_length"), ("--train-size", 0, "train_size"),
    ("--validation-size", 0, "validation_size"), ("--test-size", 0, "test_size"), ("--test-size", -1, "test_size")])
def test_a_number_out_of_range(train, option, value, name):
    line = train(option, value)
    assert name in line and str(value) in line


@pytest.mark.parametrize("size", [0, -3])
def test_a_test_size_out_of_range_in_evaluate(refused, adapter, size):
    line = refused("evaluate.py", "--adapter", "adapter", "--dataset", "films.csv", "--test-size", size)
    assert str(size) in line


# --- the machine ------------------------------------------------------------------------------------------------------

def test_cuda_asked_for_and_absent(refused, tiny_model, adapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in (("train.py", "--model", tiny_model, "--dataset", "films.csv"),
                    ("train.py", "--method", "baseline", "--model", tiny_model, "--dataset", "films.csv"),
                    ("evaluate.py", "--adapter", "adapter"), ("predict.py", "--adapter", "adapter", "text")):
        assert "CUDA was asked for" in refused(*options, "--device", "cuda")


def test_an_unknown_device_or_precision(train):
    assert "use cpu or cuda" in train("--device", "tpu")
    assert "use auto, fp32, bf16, fp16" in train("--precision", "fp8")


# --- places that cannot be written ------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", ["films.csv", "films.csv/below", "films.csv/far/below"])
@pytest.mark.parametrize("option", ["--output", "--results-dir"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_output_folder_that_cannot_be_written(train, monkeypatch, place, option, method):
    monkeypatch.setattr(finetune, "train", lambda *a, **k: pytest.fail("found out only after the training"))
    assert "cannot write to films.csv" in train("--method", method, option, place)


def test_a_results_folder_that_cannot_be_written_by_the_baseline(train):
    assert "cannot write to films.csv" in train("--method", "baseline", "--results-dir", "films.csv/below")


@pytest.mark.parametrize("place", ["films.csv/metrics.json", "films.csv/far/metrics.json"])
def test_a_metrics_file_that_cannot_be_written(refused, adapter, place):
    line = refused("evaluate.py", "--adapter", "adapter", "--dataset", "films.csv", "--json", place)
    assert "cannot write to" in line and place.split("/")[0] in line


@pytest.mark.parametrize("place", [".", "/", "", "adapter"])
def test_a_metrics_file_that_is_a_folder(refused, adapter, monkeypatch, place):
    monkeypatch.setattr("minipeft.commands.evaluate.load", lambda *a: pytest.fail("found out only after the loading"))
    line = refused("evaluate.py", "--adapter", "adapter", "--dataset", "films.csv", "--json", place)
    assert line.startswith(f"error: --json {place or '.'} is a folder: name a file, such as ")


def partly_written(error):
    """A save_file that writes some bytes and then finds the disk full."""

    def save(tensors, path, metadata=None):
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(b"half of it")
        raise error

    return save


@pytest.mark.parametrize("error", FULL_DISK, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_disk_that_is_full_when_the_model_is_saved(train, monkeypatch, error, method):
    monkeypatch.setattr(checkpoint if method == "lora" else weights, "save_file", partly_written(error))
    assert "the disk is full" in train("--method", method)


def test_a_disk_that_is_full_leaves_the_earlier_adapter_whole(script, folder, tiny_model, monkeypatch):
    options = ("--model", tiny_model, "--dataset", "films.csv", *QUICK)
    assert script("train.py", *options).code == 0
    before = {file: open(file, "rb").read() for file in files_below(folder)}  # noqa: PTH123, SIM115
    monkeypatch.setattr(checkpoint, "save_file", partly_written(FULL_DISK[0]))
    assert script("train.py", *options, "--seed", 1).code == 2
    assert {file: open(file, "rb").read() for file in files_below(folder)} == before  # noqa: PTH123, SIM115


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_disk_that_is_full_when_the_last_file_of_a_model_is_written(train, folder, monkeypatch, method):
    write_json = files.write_json

    def full_at_the_details(path, content):
        if path.name == "minipeft.json":
            path.write_text('{"label_names": [')
            raise FULL_DISK[0]
        write_json(path, content)

    for module in (checkpoint, saved):
        monkeypatch.setattr(module, "write_json", full_at_the_details)
    assert "the disk is full" in train("--method", method)


@pytest.mark.parametrize("method", ["lora", "baseline"])
def test_a_disk_that_is_full_when_the_results_are_written(script, folder, tiny_model, monkeypatch, method):
    whole = files.Path.write_text

    def full(path, text, **more):
        if not path.name.startswith(".writing"):
            return whole(path, text, **more)
        whole(path, '{"accuracy": ')
        raise FULL_DISK[0]

    monkeypatch.setattr(files.Path, "write_text", full)
    outcome = script("train.py", "--method", method, "--model", tiny_model, "--dataset", "films.csv", *QUICK)
    assert outcome.code == 2
    assert [line.startswith("error: cannot write to results") for line in outcome.error_lines] == [True]
    assert "the disk is full" in outcome.err
    assert files_below(folder / "results") == []


# --- resuming ---------------------------------------------------------------------------------------------------------

def test_a_damaged_training_state(refused, tiny_model, folder):
    state = folder / "checkpoints" / "lora_films_finetuned" / "training_state"
    state.mkdir(parents=True)
    (state / "training_state.safetensors").write_bytes(b"half of it")
    line = refused("train.py", "--model", tiny_model, "--dataset", "films.csv", *QUICK, "--resume")
    assert "damaged training state" in line and "delete it" in line


def test_what_is_not_wrong_is_not_refused(script, tiny_model, adapter):
    """The same calls without a mistake succeed, or the tests above would prove nothing."""
    assert script("train.py", "--model", tiny_model, "--dataset", "films.csv", *QUICK).code == 0
    assert script("evaluate.py", "--adapter", "adapter", "--dataset", "films.csv").code == 0
    assert script("predict.py", "--adapter", "adapter", "text").code == 0


# --- the methods ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "said"), [
    (("--method", "prompt", "--num-virtual-tokens", 0), "num_virtual_tokens must be a positive integer, got 0"),
    (("--method", "prefix", "--num-virtual-tokens", 64), "between 1 and 63 virtual tokens fit"),
    (("--method", "prompt", "--prompt-tuning-init", "TEXT"), "prompt_tuning_init_text, and it is empty"),
    (("--method", "prompt", "--num-virtual-tokens", 20, "--max-length", 50), "44 tokens fit"),
    (("--method", "ptuning", "--encoder-hidden-size", -1), "encoder_hidden_size must be a positive integer"),
    (("--method", "adapter", "--bottleneck-size", 0), "bottleneck_size must be a positive integer"),
    (("--method", "adapter", "--non-linearity", "sigmoidal"), "non_linearity must be one of relu"),
    (("--method", "adapter", "--layers-to-transform", 7), "this model has the blocks 0 to 1"),
    (("--method", "vera", "--r", 0), "r must be a positive integer"),
    (("--method", "ia3", "--target-modules", "c_atn"), "nearest names"),
    (("--method", "dora", "--r", 17), "r=17 is larger than"),
    (("--method", "bitfit", "--train", "weights"), "train must be one of bias, layer_norm"),
    (("--method", "lora", "--loraplus-lr-ratio", 0), "loraplus_lr_ratio must be positive"),
])
def test_a_methods_impossible_values_are_refused_by_name(train, options, said):
    assert said in train(*options)


def test_an_adapter_of_another_method_cannot_be_taken_for_this_one(refused, adapter):
    changed_by_hand(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "task_type": config["task_type"]}))
    assert "does not fit this model: missing" in refused("predict.py", "--adapter", adapter, "a good film")


# --- anatomy and tuning -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "said"), [
    (("--method", "lorra"), "unknown method 'lorra': use full, head"),
    (("--model", "gpt5"), "model 'gpt5' is neither a folder nor one of"),
    (("--picture", "block.gif"), "a .png or a .svg file"),
    (("--method", "lora", "--target-modules", "nothing"), "match nothing"),
    (("--memory", "--batch-size", 0), "batch_size and length must be at least 1, got 0"),
    (("--memory", "--length", 513), "length=513 is more than the 512 tokens that fit mini with lora"),
    (("--memory", "--trace"), "--memory and --trace show different things: choose one"),
    (("--adapter", "nowhere", "--token", 3), "--adapter, --token: only with --trace or --trace-page"),
    (("--block", 0, "--memory"), "--block: only with --trace or --trace-page"),
    (("--batch-size", 16, "--length", 9), "--batch-size, --length: only with --memory"),
    (("--traffic", "--device", "cpu"), "--device: only with --memory"),
    (("--output", "pictures"), "--output: only with --all"),
    *(((*view, "--picture", "x.png"), "--picture: only with --spectrum or nothing else to show") for view in (
        ("--all",), ("--memory",), ("--traffic",), ("--trace",), ("--trace-page", "x.html"))),
])
def test_a_request_anatomy_cannot_meet_is_refused(refused, options, said):
    assert said in refused("anatomy.py", *options)


@pytest.mark.parametrize(("trial", "said"), [
    ("r=4", "is not JSON"), ("[4]", "is not a JSON object"), ('{"rank": 4}', "a trial cannot set 'rank'"),
    ('{"learning_rate": -1}', "learning_rate must be positive"),
])
def test_a_trial_that_cannot_be_tried_is_refused(refused, tiny_model, trial, said):
    assert said in refused("tune.py", "--model", tiny_model, "--dataset", "films.csv", "--try", trial)


# --- other tasks ------------------------------------------------------------------------------------------------------

def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


PAIRS = [{"source": f"a dog {i}", "target": f"ein Hund {i}"} for i in range(40)]
SENTENCES = [{"tokens": ["Ada", "ran"], "ner_tags": ["B-person", "O"]} for _ in range(40)]
BAD_TASK_DATA = {
    "ragged tags": ("tagging", [*SENTENCES, {"tokens": ["Ada", "ran"], "ner_tags": ["O"]}],
                    "row 41: 2 words have 1 tags"),
    "unknown tags": ("tagging", [*SENTENCES, {"tokens": ["Ada"], "ner_tags": ["PERSON"]}],
                     "row 41: tag 'PERSON' is neither O nor of the form B-type or I-type"),
    "only outside": ("tagging", [{"tokens": ["ran"], "ner_tags": ["O"]}] * 40, "all words have the tag O"),
    "no words": ("tagging", [*SENTENCES, {"tokens": [], "ner_tags": []}], "row 41: there is no word"),
    "a missing tags column": ("tagging", [{"tokens": ["a"]}], "no column 'ner_tags'; --label-column can be one of"),
    "a missing words column": ("tagging", [{"ner_tags": ["O"]}], "no column 'tokens'; --text-column can be one of"),
    "an empty target": ("translation", [*PAIRS, {"source": "a cat", "target": " "}], "the target is empty"),
    "a missing target": ("summarization", [*PAIRS, {"source": "a cat"}], "the target is empty"),
    "an empty source": ("translation", [*PAIRS, {"source": "", "target": "Hund"}], "row 41: the source is empty"),
    "a missing source column": ("translation", [{"english": "a", "target": "b"}], "no column 'source'; --text-column"),
    "a missing target column": ("summarization", [{"source": "a", "de": "b"}], "no column 'target'; --label-column"),
    "no rows": ("translation", PAIRS[:3], "3 rows are too few"),
}


@pytest.mark.parametrize("case", BAD_TASK_DATA)
def test_unusable_data_of_another_task(refused, tiny_model, folder, case):
    task, rows, message = BAD_TASK_DATA[case]
    (folder / "own.jsonl").write_text(as_jsonl(rows))
    line = refused("train.py", "--model", tiny_model, "--dataset", "own.jsonl", "--task", task, *QUICK)
    assert "own.jsonl" in line and message in line


def test_a_source_longer_than_the_context_is_cut_and_a_length_beyond_it_refused(script, refused, tiny_model, folder):
    (folder / "own.jsonl").write_text(as_jsonl([{"source": "a dog " * 99, "target": "Hund"} for _ in range(40)]))
    options = ("--model", tiny_model, "--dataset", "own.jsonl", "--task", "translation", *QUICK)
    assert "max_length=65 is more than the model's 64 positions" in refused("train.py", *options, "--max-length", 65)
    assert "no room for a source" in refused("train.py", *options, "--max-length", 4)
    assert "at least 2" in refused("train.py", *options, "--max-new-tokens", 1)
    assert "truncation means nothing to translation" in refused("train.py", *options, "--truncation", "head")
    assert script("train.py", *options).code == 0


def test_a_dataset_and_a_task_that_do_not_belong_together(refused, tiny_model, folder):
    options = ("train.py", "--model", tiny_model, *QUICK)
    assert "sample is for classification, not for tagging" in refused(*options, "--dataset", "sample", "--task",
                                                                      "tagging")
    assert "unknown task 'ner'" in refused(*options, "--dataset", "films.csv", "--task", "ner")
    assert "no file task.py" in refused(*options, "--dataset", "films.csv", "--task", "task.py")
    line = refused(*options, "--dataset", "wnut_17", "--data-dir", folder)
    assert "no folder wnut_17" in line and "wnut_17/validation-*.parquet" in line


@pytest.mark.parametrize(("options", "message"), [
    (("--temperature", 0.5), "--temperature means nothing to it"), (("--num-beams", 2), "--num-beams means nothing"),
    (("--seed", 1), "--seed means nothing to it"),
    (("--task", "tagging"), "was trained for classification, not for tagging")])
def test_asking_a_classifier_to_write(refused, adapter, options, message):
    line = refused("predict.py", "--adapter", adapter, "a film", *options)
    assert message in line


@pytest.fixture(scope="module")
def translator(tmp_path_factory, tiny_model):
    """An adapter folder of a translation as training leaves it."""
    folder = tmp_path_factory.mktemp("translator")
    (folder / "pairs.jsonl").write_text(as_jsonl(PAIRS))
    finetune.finetune(Options(
        model=str(tiny_model), dataset=str(folder / "pairs.jsonl"), task="translation", precision="fp32",
        output=str(folder / "adapter"), results_dir=str(folder), training_values={"epochs": 1}))
    return folder / "adapter"


@pytest.mark.parametrize(("options", "message"), [
    (("--temperature", -1), "temperature must be a finite number, 0 or above"),
    (("--top-k", 0), "top_k must be at least 1"),
    (("--top-p", 2), "top_p must lie in (0, 1]"), (("--num-beams", 0), "num_beams must be at least 1"),
    (("--num-beams", 2, "--temperature", 1), "beam search does not sample"),
    (("--max-new-tokens", 100), "no room for a source"), (("--length-penalty", 2), "add --num-beams"),
    (("--num-beams", 2, "--top-k", 3), "beam search does not sample"), (("--seed", 3), "--seed is for sampling"),
    (("--num-beams", 2, "--seed", 3), "--seed is for sampling"),
    (("--temperature", 0, "--top-k", 3), "give a temperature above 0"),
    (("--max-new-tokens", 1), "at least 2"), (("--num-beams", 2, "--length-penalty", 99), "must lie in [-10, 10]"),
    (("--seed", -1), "seed must be a number from 0"), (("--seed", 10**30), "seed must be a number from 0"),
    (("--task", "summarisation"), "was trained for translation, not for summarization")])
def test_bad_ways_of_writing(refused, translator, options, message):
    assert message in refused("predict.py", "--adapter", translator, "a dog", *options)


def test_testing_a_translator_of_ones_own_pairs_needs_the_pairs(refused, translator, folder):
    copy = shutil.copytree(translator, folder / "copy")
    pairs = translator.parent / "pairs.jsonl"
    content = pairs.read_text()
    pairs.write_text(content + content.splitlines()[0])
    assert "has changed since copy was trained on it: name it with --dataset" in refused(
        "evaluate.py", "--adapter", "copy")
    pairs.unlink()
    assert f"there is no file {pairs}" in refused("evaluate.py", "--adapter", "copy")
    pairs.write_text(content)
    account = json.loads((copy / "minipeft.json").read_text())
    del account["data"]  # as earlier versions left it
    (copy / "minipeft.json").write_text(json.dumps(account))
    assert "was trained on pairs, a file of your own: name it with --dataset" in refused(
        "evaluate.py", "--adapter", "copy")


def test_a_translator_is_not_tested_on_films(refused, translator):
    assert "is for classification, not for translation" in refused(
        "evaluate.py", "--adapter", translator, "--dataset", "sample")


@pytest.mark.parametrize("task", ["tagging", "summarization", "translation"])
def test_a_metric_that_is_not_installed_is_missed_before_training(refused, tiny_model, folder, monkeypatch, task):
    import importlib.util
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in (
        "seqeval", "rouge_score", "sacrebleu") else found(name, *more))
    (folder / "own.jsonl").write_text(as_jsonl(SENTENCES if task == "tagging" else PAIRS))
    line = refused("train.py", "--model", tiny_model, "--dataset", "own.jsonl", "--task", task, *QUICK)
    assert "which is not installed: pip install 'minipeft[metrics]'" in line


def test_films_labelled_in_other_words_are_not_compared(refused, adapter, folder):
    (folder / "other.csv").write_text("text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'poor'}\n"
                                                              for i in range(40)))
    assert "other.csv: label 'good' is none of negative, positive" in refused(
        "evaluate.py", "--adapter", adapter, "--dataset", "other.csv")


def test_an_argument_that_is_not_utf_8(refused, adapter):
    assert "argument, row 1: the text is not valid UTF-8" in refused("predict.py", "--adapter", adapter, "film \udcff")


def test_a_report_into_a_file_that_is_not_there_or_from_a_damaged_result(refused, folder):
    assert "no file nowhere.md" in refused("report.py", "--write", "nowhere.md")
    (folder / "results").mkdir()
    (folder / "results" / "fine_tuned_lora_results.json").write_text("{")
    assert "fine_tuned_lora_results.json is not readable JSON" in refused("report.py")
