"""The stored reference cases: adapters that peft wrote once, with the logits it gave, read here and written back."""

import json

import pytest
import torch
from parity_helpers import TASKS, TOLERANCE, Batch, Pair, assert_close, load_theirs, logits_of, real_logits
from safetensors.torch import load_file

import minipeft
from minipeft import disable_adapter, load_adapter, save_adapter, trainable_parameters
from minipeft.methods.folder import CONFIG_FILE, TENSORS_FILE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on its own attributes

CASES = ["lora_lm", "lora_cls", "rslora_cls", "dora_cls", "ia3_cls", "prefix_lm", "prefix_cls", "prompt_lm"]
HEADS = {"lm": "CAUSAL_LM", "cls": "SEQ_CLS"}
cases = pytest.mark.parametrize("case", CASES)


class Case:
    """A reference case: what it is, and inputs and logits with and without padding."""

    def __init__(self, fixtures, name):
        self.base, self.folder = fixtures / "base", fixtures / name
        self.facts = json.loads((self.folder / "case.json").read_text())
        self.task = HEADS[self.facts["head"]]
        self.num_labels = {"num_labels": self.facts["num_labels"]} if self.task == "SEQ_CLS" else {}
        tensors = load_file(self.folder / "reference.safetensors")
        self.expected = [(Batch(tensors["input_ids"], tensors["attention_mask"]), tensors["logits"]),
                         (Batch(tensors["full_ids"], None), tensors["full_logits"])]

    def ours(self):
        """Our base model."""
        return getattr(minipeft, TASKS[self.task]).from_pretrained(self.base, **self.num_labels)

    def theirs(self):
        """transformers' base model; texts are padded with id 0."""
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, TASKS[self.task]).from_pretrained(
            self.base, pad_token_id=0, **self.num_labels).eval()

    def assert_reference(self, model):
        """The model gives the stored logits at every real token; virtual tokens' rows, stored first, are left out."""
        for batch, logits in self.expected:
            if self.task != "SEQ_CLS":
                logits = logits[:, -batch.ids.shape[1]:]
                logits = logits if batch.mask is None else logits[batch.mask.bool()]
            assert_close(real_logits(model, self.task, batch), logits)


@pytest.fixture
def reference(peft_fixtures, case):
    return Case(peft_fixtures, case)


def test_every_stored_case_is_among_the_tested_ones(peft_fixtures):
    assert sorted(path.parent.name for path in peft_fixtures.glob("*/case.json")) == sorted(CASES)


@cases
def test_a_stored_adapter_gives_the_stored_logits(reference):
    model = load_adapter(reference.ours(), reference.folder)
    reference.assert_reference(model)
    assert trainable_parameters(model).trainable == reference.facts["trainable_parameters"]


@cases
def test_a_stored_adapter_that_is_switched_off_gives_other_logits(reference):
    model = load_adapter(reference.ours(), reference.folder)
    batch, logits = reference.expected[1]
    with disable_adapter(model), torch.no_grad():
        base = logits_of(model, reference.task, batch)
    assert (base - logits[..., -base.shape[-2]:, :]).abs().max() > 100 * TOLERANCE


@cases
def test_a_stored_adapter_written_back_is_the_same_function_in_peft(reference, tmp_path):
    save_adapter(load_adapter(reference.ours(), reference.folder), tmp_path)
    model = load_theirs(Pair(reference.base, reference.ours(), reference.theirs()), tmp_path)
    reference.assert_reference(model)


@cases
def test_a_stored_adapter_written_back_holds_the_same_tensors_under_the_same_names(reference, tmp_path):
    save_adapter(load_adapter(reference.ours(), reference.folder), tmp_path)
    written, stored = (load_file(folder / TENSORS_FILE) for folder in (tmp_path, reference.folder))
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor), name
    kind, task = (json.loads((reference.folder / CONFIG_FILE).read_text())[key] for key in ("peft_type", "task_type"))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["task_type"]) == (kind, task)
