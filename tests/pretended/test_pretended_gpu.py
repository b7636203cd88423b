"""On a GPU that is not there (device.py): all of a run's tensors lie where they should, products run in the format
asked for, a step of training waits for nothing, and a resumed run is the uninterrupted one.

LoRA for every task in every precision runs always; MINIPEFT_PRETEND=all runs every method.
"""

from __future__ import annotations

import os

import pytest

from minipeft.methods import METHODS

TASKS = ("classification", "tagging", "summarization", "translation")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
EVERYTHING = os.environ.get("MINIPEFT_PRETEND") == "all"
FOR_CLASSIFIERS_ONLY = {"head"}
RUNS = [(method, task, precision) for method in (METHODS if EVERYTHING else ("lora",)) for task in TASKS
        for precision in PRECISIONS if method not in FOR_CLASSIFIERS_ONLY or task in ("classification", "tagging")]


# --- whole runs -------------------------------------------------------------------------------------------------------

@pytest.mark.kind("8: fine-tunings on a pretended GPU")
@pytest.mark.parametrize(("method", "task", "precision"), RUNS)
def test_a_run_mixes_no_devices_and_no_step_of_it_waits(pretended, method, task, precision):
    found = pretended("fine_tuning", method=method, task=task, precision=precision)
    assert found["steps"] == 3 and found["waits_in_steps"] == [] and found["read_too_early"] == 0
    if method == "lora":
        assert list(found["products"]) == [PRECISIONS[precision]]
    if precision == "fp32":
        assert found["losses"] == pytest.approx(pretended("on_the_cpu", method=method, task=task), abs=2e-3)


@pytest.mark.parametrize("more", [{"training": {"class_weights": "balanced"}}, {"gradient_checkpointing": True}],
                         ids=lambda more: next(iter(more)))
def test_nor_does_a_run_with_more_options(pretended, more):
    found = pretended("fine_tuning", method="lora", task="classification", precision="fp16", **more)
    assert found["steps"] == 3 and found["waits_in_steps"] == [] and found["read_too_early"] == 0


@pytest.mark.kind("8: resuming on a pretended GPU, per precision")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_is_the_uninterrupted_one_with_the_gpus_own_dropout(pretended, precision):
    found = pretended("resuming", method="lora", task="classification", precision=precision)
    assert found["random_state_saved"]
    assert found["losses"][0] == found["losses"][1] and found["adapters"][0] == found["adapters"][1]


@pytest.mark.kind("8: the host waits once for each token that is written")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_writing_waits_once_per_token_and_writes_what_a_cpu_does(pretended, num_beams, padded):
    found = pretended("writing", num_beams=num_beams, padded=padded)
    by_line = sorted(count for _, _, count in found["waits"])
    tokens = found["tokens"]
    assert by_line == ([1, tokens] if num_beams == 1 else [1, 1, tokens]), found["waits"]  # texts go in and come out
    assert found["texts"][0] == found["texts"][1] and found["sampled"]


# --- what concerns a GPU alone ----------------------------------------------------------------------------------------

@pytest.mark.kind("8: out of memory is one line")
def test_out_of_memory_is_one_line_with_batch_size_length_and_checkpointing(pretended):
    assert pretended("out_of_memory") == (
        "cuda is out of memory: 4 texts of 16 tokens at once do not fit, without gradient checkpointing: use a smaller "
        "--batch-size, with as many times the --gradient-accumulation, a smaller --max-length, or "
        "--gradient-checkpointing")


@pytest.mark.kind("8: load_adapter leaves the GPU's generator alone")
def test_loading_an_adapter_leaves_the_gpus_random_state_as_it_was(pretended):
    found = pretended("loading_an_adapter")
    assert found["drawn_by_injecting"], "a prefix on the GPU starts random there, so that there is something to undo"
    assert found["kept"]


@pytest.mark.kind("8: the GPU's random state is asked only for a model on it")
def test_a_run_on_the_cpu_asks_nothing_of_a_gpu_that_is_there(pretended):
    assert pretended("a_model_on_the_cpu") == {"states_asked": 0}


# --- planted mistakes -------------------------------------------------------------------------------------------------

MIXED = ["ids stay on the CPU", "labels stay on the CPU", "positions are counted on the CPU",
         "the attention mask is made on the CPU", "a layer's tensor does not move", "a prefix lies on the CPU",
         "noise comes from the CPU's generator", "moments stay on the CPU"]
WAITS = {"the loss is read in each step": "_local_scalar_dense.default",
         "targets are chosen by a mask": "mask as index",
         "a batch is copied while the host waits": "copy from the host",
         "the gradients' norm is looked at": "_local_scalar_dense.default",
         "an index is made on the CPU": "index on the host"}


@pytest.mark.kind("8: planted device mistakes are caught")
@pytest.mark.parametrize("name", MIXED)
def test_a_tensor_or_a_generator_on_the_wrong_device_is_an_error(pretended, name):
    assert pretended("mistake", name=name)["error"].startswith("Mixed: aten.")


@pytest.mark.kind("8: planted device mistakes are caught")
@pytest.mark.parametrize("name", WAITS)
def test_what_a_step_waits_for_is_counted(pretended, name):
    found = pretended("mistake", name=name)["waits_in_steps"]
    assert WAITS[name] in {what for what, _, _ in found} and sum(count for _, _, count in found) >= 3  # in every step


@pytest.mark.kind("8: planted device mistakes are caught")
def test_values_read_before_they_have_come_are_noticed(pretended):
    assert pretended("mistake", name="logits are read before they have come")["read_too_early"] == 3


@pytest.mark.kind("8: planted device mistakes are caught")
def test_autocast_for_another_device_meets_weights_in_another_format(pretended):
    assert "must have the same dtype" in pretended("mistake", name="autocast is for another device")["error"]


@pytest.mark.kind("8: planted device mistakes are caught")
def test_a_forgotten_random_state_of_the_gpu_gives_another_run(pretended):
    found = pretended("mistake", name="the GPU's random state is forgotten")
    assert not found["random_state_saved"] and found["losses"][0] != found["losses"][1]
