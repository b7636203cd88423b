"""plan.py: what a run chooses for its user, what it is told, and what it refuses before it reads any data."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import files_below, rows, write_csv, write_imdb

from minipeft import GPT2ForSequenceClassification, LoraConfig, PromptTuningConfig, inject
from minipeft.errors import ConfigError, DataError
from minipeft.runs import defaults
from minipeft.runs import plan as planning
from minipeft.runs.finetune import finetune
from minipeft.runs.plan import Options, check_options, choose, make_task

# --- choices ----------------------------------------------------------------------------------------------------------

def test_an_explicit_choice_is_never_replaced_and_is_told_from_a_default(options, monkeypatch, tmp_path):
    monkeypatch.setattr(planning, "choose_dataset", lambda *a: pytest.fail("chose a dataset although one was named"))
    monkeypatch.setitem(defaults.CPU_SIZES, "train", 4)
    said = []
    results = finetune(options(
        train_size=20, device="cpu", precision="bf16", max_length=33, truncation="head", dropout=0.0,
        method_values={"r": 2, "lora_alpha": 3.0, "target_modules": ["c_fc"]},
        training_values={"epochs": 1, "seed": 3, "weight_decay": 0.5}), said.append)
    assert results["choices"]["dataset"] == f"{tmp_path / 'films.csv'} (asked for)"
    assert results["choices"]["model"].endswith("(asked for)")
    assert results["choices"]["device"] == "cpu (asked for)"
    assert results["choices"]["precision"] == "bfloat16 (asked for)"
    assert results["precision"] == "bfloat16"
    assert results["dataset"]["sizes"]["train"] == 20
    assert (results["dataset"]["max_length"], results["dataset"]["truncation"]) == (33, "head")
    assert (results["method_config"]["r"], results["method_config"]["lora_alpha"]) == (2, 3.0)
    assert results["method_config"]["target_modules"] == ["c_fc"]
    training = results["training_config"]
    assert (training["epochs"], training["seed"], training["weight_decay"]) == (1, 3, 0.5)


def test_what_was_chosen_is_said_before_anything_else(options, monkeypatch):
    said = []
    monkeypatch.setattr(planning, "load_dataset", lambda *a, **k: pytest.fail("read data before saying which"))
    with pytest.raises(pytest.fail.Exception):
        finetune(options(device=None, precision="auto"), said.append)
    printed = "\n".join(said)
    for word in ("device", "precision", "model", "dataset", "asked for", "what this machine has", "best here"):
        assert word in printed


@pytest.mark.kind("8: float32 matmul precision is an option")
def test_how_exact_products_of_float32_are_is_said_where_it_was_asked_for(options):
    assert "matmul" not in choose(options()).choices
    for name in ("high", "highest"):
        said = []
        assert choose(options(matmul_precision=name), said.append).choices["matmul"] == f"{name} (asked for)"
        assert f"matmul     {name} (asked for)" in "\n".join(said)
    with pytest.raises(ConfigError, match="matmul_precision must be one of None, highest, high, medium, got 'tf32'"):
        options(matmul_precision="tf32")


@pytest.mark.parametrize(("cuda", "model"), [(False, "mini"), (True, "gpt2")])
def test_without_a_model_gpt2_is_taken_on_cuda_and_mini_on_a_cpu(options, monkeypatch, cuda, model):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    said = []

    def stop(name):
        said.append(name)
        raise DataError("far enough")

    monkeypatch.setattr(planning, "find", stop)
    with pytest.raises(DataError, match="far enough"):
        finetune(options(model=None, device=None))
    assert said == [model]


def test_on_a_cpu_a_subset_is_taken_unless_all_is_asked_for(options, monkeypatch, tmp_path):
    for split, size in (("train", 8), ("validation", 2), ("test", 2)):
        monkeypatch.setitem(defaults.CPU_SIZES, split, size)
    subset = finetune(options(training_values={"epochs": 1}))
    assert subset["dataset"]["sizes"] == {"train": 8, "validation": 2, "test": 2}
    assert "--full" in subset["choices"]["sizes"]
    everything = finetune(options(training_values={"epochs": 1}, full=True, overwrite=True))
    assert everything["dataset"]["sizes"] == {"train": 32, "validation": 4, "test": 4}
    assert "--full" not in everything["choices"]["sizes"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_split_of_any_size_can_be_asked_for(options, split, size):
    results = finetune(options(training_values={"epochs": 1}, **{f"{split}_size": size}))
    assert results["dataset"]["sizes"][split] == size


def test_imdb_is_found_in_the_data_folder_without_being_named(options, tmp_path):
    write_imdb(tmp_path, train=40, test=20)
    results = finetune(options(dataset=None, data_dir=str(tmp_path), training_values={"epochs": 1}))
    assert results["dataset"]["name"] == "imdb"
    assert f"found in {tmp_path}" in results["choices"]["dataset"]
    assert (tmp_path / "results" / "fine_tuned_lora_results.json").is_file()


def test_a_plan_is_complete_and_cannot_be_changed(options, tmp_path):
    said = []
    plan = choose(options(device="cpu", train_size=20, training_values={"seed": 3}), said.append)
    assert (plan.device.type, plan.precision, plan.sizes) == ("cpu", torch.float32, {
        "train": 20, "validation": 4, "test": 4})
    assert {split: len(getattr(plan.data, split)) for split in plan.sizes} == plan.sizes
    assert plan.method_config == LoraConfig(lora_alpha=16, target_modules="all-linear")
    assert (plan.training.seed, plan.training.epochs, plan.training.weight_decay) == (3, 3, 0.01)
    assert plan.folder == tmp_path / "output" / "lora"
    assert [line.split()[0] for line in "\n".join(said).splitlines()] == list(plan.choices)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.folder = None


def test_remarks_are_of_the_part_that_is_taken_and_name_the_split_that_lacks_a_label(options, tmp_path):
    write_csv(tmp_path / "films.csv", [(f"a {'bad' if i % 20 == 0 else 'good'} film {i}", "ok" if i % 20 else "fraud")
                                       for i in range(200)])
    whole, part = choose(options()).choices, choose(options(train_size=3)).choices
    assert "rare" not in whole and "'ok' 154, 'fraud' 8 rows" in whole["imbalance"]
    assert part["rare"] == "too few rows to be learned or judged: 'fraud' (2 rows) has none in train"
    assert "imbalance" not in part and part["sizes"].startswith("3 train")
    write_csv(tmp_path / "test.csv", [*rows()[:2], ("another", "positive")])
    write_csv(tmp_path / "films.csv")
    asked = {"test_file": str(tmp_path / "test.csv")}
    assert choose(options(**asked)).choices["repeated"] == "2 of 3 test texts are also in train"
    assert "repeated" not in choose(options(**asked, train_size=1, test_size=1)).choices


def test_on_little_data_more_epochs_are_taken_up_to_a_limit_unless_their_number_is_given(options):
    def epochs(**training):
        changes = options(training_values=training)
        if "epochs" not in training:
            del changes.training_values["epochs"]
        plan = choose(changes)
        return plan.training.epochs, plan.choices.get("epochs")

    assert epochs() == (10, "10, fewer if 3 validations in a row are no better")               # of 8 steps
    assert epochs(batch_size=1) == (6, "6, fewer if 3 validations in a row are no better")     # of 32 steps; 180 in all
    assert epochs(patience=5) == (10, "10")
    assert epochs(epochs=2) == (2, None)


KIND = pytest.mark.kind("7: few examples are not learned by heart")


@KIND
def test_on_few_examples_the_lowest_validation_loss_is_kept_in_smaller_steps_until_it_no_longer_falls(options):
    changes = options()
    changes.training_values = {}
    plan = choose(changes)
    assert (plan.best_by, plan.training.learning_rate, plan.training.patience) == ("loss", 6e-4, 3)
    assert plan.choices["best"] == "the lowest validation loss, as examples are few"
    changes.training_values = {"learning_rate": 0.1, "patience": 7, "epochs": 4}
    training = choose(changes).training
    assert (training.learning_rate, training.patience, training.epochs) == (0.1, 7, 4)
    changes.training_values = {"epochs": 4}
    assert choose(changes).training.patience is None, "so many epochs were asked for"


@KIND
def test_from_a_number_of_examples_on_the_table_alone_decides(options, monkeypatch):
    changes = options()
    changes.training_values = {}
    for limit, best_by in ((33, "loss"), (32, "accuracy")):
        monkeypatch.setattr(defaults, "FEW_EXAMPLES", limit)
        plan = choose(changes)
        assert plan.sizes["train"] == 32 and plan.best_by == best_by
    table = defaults.table("lora")["training"]
    assert (plan.training.patience, plan.training.learning_rate) == (None, table["learning_rate"])
    assert plan.training.epochs == 10 and plan.choices["epochs"] == "10"                       # 500 steps would be 250


def test_a_baselines_plan_has_a_seed_and_no_method(options):
    plan = choose(options("none", training_values={"seed": 4}), baseline=True)
    assert plan.method_config is None and plan.training.seed == 4 and "epochs" not in plan.choices


# --- length -----------------------------------------------------------------------------------------------------------

def test_a_text_length_beyond_the_models_positions_is_refused_not_replaced(options):
    with pytest.raises(ConfigError, match=r"max_length.*64"):
        finetune(options(max_length=500))


def test_the_default_text_length_fits_the_model(options):
    results = finetune(options(max_length=None, training_values={"epochs": 1}))
    assert results["dataset"]["max_length"] == 64


def test_virtual_tokens_leave_less_room_for_the_text_and_the_message_says_how_much(options):
    with pytest.raises(ConfigError, match="of which 20 hold virtual tokens: 44 tokens fit"):
        finetune(options("prompt"))


def test_the_default_length_makes_room_for_virtual_tokens(options):
    assert finetune(options("prefix", max_length=None))["dataset"]["max_length"] == 44


def test_a_task_is_made_for_the_model_that_it_will_read_with(options, tiny_model):
    plan = choose(options(max_length=None, truncation="head"))
    model = GPT2ForSequenceClassification.from_pretrained(tiny_model)
    assert (make_task(plan, model).max_length, make_task(plan, model).truncation) == (64, "head")
    inject(model, PromptTuningConfig(num_virtual_tokens=5))
    assert make_task(plan, model).max_length == 59


# --- refusals come before the work ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"method": "lore"}, ConfigError, "unknown method 'lore': use baseline, full, head"),
    ({"method_values": {"rank": 8}}, ConfigError, "LoraConfig has no field rank"),
    ({"method_values": {"r": 0}}, ConfigError, "r must be a positive integer"),
    ({"max_length": 0}, ConfigError, "max_length must be a positive integer, got 0"),
    ({"truncation": "tail"}, ConfigError, "truncation must be one of"),
    ({"test_size": 0}, ConfigError, "test_size must be a positive integer, got 0"),
    ({"training_values": {"seed": -1}}, ConfigError, "seed"),
    ({"dropout": 1.0}, ConfigError, "probability")])
def test_an_impossible_request_is_refused_before_anything_is_written(
        options, tmp_path, no_work, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(options(**changes))
    assert files_below(tmp_path) == [str(tmp_path / "films.csv")]
    assert not (tmp_path / "output").exists(), "an empty output folder was left behind"


@pytest.mark.parametrize("changes", [{"train_size": "many"}, {"full": "yes"}, {"training_values": [1]}, {"model": 2}])
def test_an_option_of_the_wrong_type_is_refused_by_its_name(changes):
    with pytest.raises(ConfigError, match=f"^{next(iter(changes))} must be "):
        Options(**changes)


def test_options_changed_after_they_were_made_are_checked_too(options):
    request = options()
    request.test_size = 0
    with pytest.raises(ConfigError, match="test_size must be a positive integer, got 0"):
        check_options(request)


def test_only_full_fine_tuning_can_be_sharded(options):
    with pytest.raises(ConfigError, match="--shard is for full fine-tuning"):
        choose(options("lora", shard=True))
    check_options(options("full", shard=True))


def test_a_training_value_that_there_is_not_is_refused_with_those_that_there_are(options):
    with pytest.raises(ConfigError, match="training has no epoch; it has epochs, batch_size, "):
        choose(options(training_values={"epoch": 1}))
