"""One step of SGD, from the same weights on the same batch, leaves the same trained tensors here and in peft.

And before it: both train equally many parameters, drawn from the same distributions.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from parity_helpers import (
    METHODS,
    TASKS,
    batch,
    inject_ours,
    inject_theirs,
    load_theirs,
    logits_of,
    real_logits,
    save_theirs,
    silent,
    write_pair,
)
from safetensors.torch import load_file

from minipeft import GPT2Config, GPT2Model, LoraConfig, inject, load_adapter, save_adapter
from minipeft.methods.folder import TENSORS_FILE

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on its own attributes

LEARNING_RATE, TOLERANCE = 0.5, 1e-5
NO_LABEL = -100
tasks = pytest.mark.parametrize("task", TASKS)
REPARAMETRISED = [name for name, method in METHODS.items() if not method.is_virtual]
VIRTUAL = [name for name, method in METHODS.items() if method.is_virtual]
# More to train than the methods' defaults: every kind of target, biases too.
RICH = {
    "LoRA": {"r": 4, "target_modules": "all-linear", "bias": "all", "lora_alpha": 20},
    "rsLoRA": {"r": 4, "rank_pattern": {"h.1.attn.c_attn": 2}, "bias": "lora_only"},
    "DoRA": {"r": 4, "target_modules": "all-linear"},
    "PiSSA": {"r": 4, "target_modules": ["c_proj"], "layers_to_transform": [0, 2]},
    "(IA)^3": {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "feedforward_modules": ["c_fc"]},
    "VeRA": {"r": 6, "target_modules": "all-linear", "bias": "vera_only"},
}
CHOSEN = {f"{method}, {kind}": (method, RICH[method] if kind == "rich" else None)
          for method in REPARAMETRISED for kind in ("default", "rich")} | {
    "LoRA, one block": ("LoRA", {"r": 3, "target_modules": ["c_proj", "transformer.h.0.attn.c_attn"],
                                 "layers_to_transform": 1, "layers_pattern": "h"}),
    "LoRA, its biases": ("LoRA", {"r": 2, "bias": "lora_only", "lora_alpha": 10}),
    "rsLoRA everywhere, patterns": ("rsLoRA", {
        "r": 4, "target_modules": "all-linear", "rank_pattern": {"c_fc": 9, "c_attn": 1},
        "alpha_pattern": {"h.1.attn.c_proj": 20.5, "c_attn": 1}, "bias": "lora_only"}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """task -> the same base model in both libraries."""
    return {task: write_pair(tmp_path_factory.mktemp("base"), task) for task in TASKS}


@pytest.fixture
def pair(pairs, task):
    return pairs[task]


# --- a step -----------------------------------------------------------------------------------------------------------

def texts_and_labels(task):
    """Texts of mixed length, a label for each text or each real token.

    Padding is on the left where peft would pool a pad, and on the right where a pad would predict the first word.
    """
    texts = batch("left" if task == "SEQ_CLS" else "right")
    if task == "SEQ_CLS":
        return texts, torch.tensor([2, 0, 1])
    labels = (texts.ids if task == "CAUSAL_LM" else texts.ids % 3).masked_fill(texts.mask == 0, NO_LABEL)
    if task == "CAUSAL_LM":  # peft's last virtual token predicts the first word; ours gives no logits there
        labels[:, 0] = NO_LABEL
    return texts, labels


def our_loss(model, task):
    """The mean cross-entropy; a language model's label is the next token."""
    texts, labels = texts_and_labels(task)
    logits = logits_of(model, task, texts)
    if task == "CAUSAL_LM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=NO_LABEL)


def their_loss(model, task):
    """The loss that peft and transformers compute themselves. With a prompt, peft's token classifier fails at that."""
    if task == "TOKEN_CLS" and model.active_peft_config.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        return our_loss(model, task)
    texts, labels = texts_and_labels(task)
    with silent():
        return model(input_ids=texts.ids, attention_mask=texts.mask, labels=labels).loss


def step(model, loss, task):
    """One step of SGD on everything that is trained; returns the loss before it."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    before = loss(model, task)
    before.backward()
    optimizer.step()
    model.eval()
    return before.item()


def step_both(ours, theirs, task):
    """One step of each; the losses before it and the outputs after it agree."""
    before = step(ours, our_loss, task), step(theirs, their_loss, task)
    assert before[0] == pytest.approx(before[1], abs=TOLERANCE)
    texts, _ = texts_and_labels(task)
    torch.testing.assert_close(real_logits(ours, task, texts), real_logits(theirs, task, texts), rtol=0, atol=2e-4)


def assert_same_step(actual, expected, start):
    """Every trained tensor moved, by more than the tolerance, and to the same values; nothing else moved."""
    assert actual.keys() == expected.keys() == start.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)
        moved = (tensor - start[name]).abs().max()
        if name in ("base_model.vera_A", "base_model.vera_B"):  # VeRA's frozen projections
            assert moved == 0
        else:
            assert moved > 10 * TOLERANCE, name


# --- methods that change layers ---------------------------------------------------------------------------------------

def read_tensors(folder):
    """What an adapter file holds, without the two further copies of a token classifier's bias that peft writes with
    bias="all": as trained and as it was before."""
    tensors = load_file(folder / TENSORS_FILE)
    copies = {f"base_model.model.classifier.{kind}.bias" for kind in ("modules_to_save", "original_module")}
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


@tasks
@pytest.mark.parametrize(("method", "chosen"), CHOSEN.values(), ids=CHOSEN)
def test_a_step_from_an_adapter_of_peft_s_trains_the_same_tensors_to_the_same_values(
        pair, tmp_path, method, chosen, task):
    reference = inject_theirs(pair, method, task, chosen)
    start = read_tensors(save_theirs(reference, tmp_path / "start"))
    ours, theirs = load_adapter(pair.ours(), tmp_path / "start"), load_theirs(pair, tmp_path / "start", trainable=True)
    step_both(ours, theirs, task)
    save_adapter(ours, tmp_path / "ours")
    save_theirs(theirs, tmp_path / "theirs")
    assert_same_step(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs"), start)


# --- virtual tokens ---------------------------------------------------------------------------------------------------

def our_trained(model):
    """The trained tensors by peft's names of them: of the encoder, which makes the virtual tokens, and of the head."""
    trained = {name.rpartition("encoder.")[2]: p for name, p in model.named_parameters() if p.requires_grad}
    names = {name: name.replace("lstm.", "lstm_head.") for name in trained} | {"weight": "embedding.weight"}
    return {names[name]: p for name, p in trained.items()}


def their_trained(model):
    """The trained tensors by their names in the prompt encoder, and the head's by its own."""
    around = re.compile(r"prompt_encoder\.default\.|base_model\.|modules_to_save\.default\.")
    return {around.sub("", name): p for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step_from_our_weights(ours, theirs, task):
    """Copy our trained tensors into peft's model, and let both take a step."""
    actual, expected = our_trained(ours), their_trained(theirs)
    assert actual.keys() == expected.keys()
    start = {name: parameter.detach().clone() for name, parameter in actual.items()}
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(start[name])
    step_both(ours, theirs, task)
    assert_same_step(actual, expected, start)


@tasks
@pytest.mark.parametrize("method", VIRTUAL)
def test_a_step_from_our_virtual_tokens_trains_the_same_tensors_to_the_same_values(pair, method, task):
    """Also the networks that make them. peft loads none of these to train on, so our tensors are copied into its."""
    assert_same_step_from_our_weights(inject_ours(pair, method), inject_theirs(pair, method, task), task)


@tasks
@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_that_peft_wrote_can_be_trained_further(pair, tmp_path, method, task):
    """Only the table is stored: a step from it is one of the plain method, prompt tuning or prefix tuning."""
    save_theirs(inject_theirs(pair, method, task), tmp_path)
    ours = load_adapter(pair.ours(), tmp_path)
    plain = "prompt tuning" if METHODS[method].pools_last_position else "prefix tuning"
    assert_same_step_from_our_weights(ours, inject_theirs(pair, plain, task), task)


# --- where both start -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["TOKEN_CLS"])
def test_both_train_equally_many_parameters(pair, method, task):
    ours = inject(pair.ours(), METHODS[method].ours())
    theirs = inject_theirs(pair, method, task)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_lora_starts_from_the_same_distribution_in_both(init):
    """The same bounds and deviations, at a size where uniform, normal and zero can be told apart."""
    sizes = {"vocab_size": 97, "n_positions": 40, "n_embd": 192, "n_layer": 1, "n_head": 3}
    torch.manual_seed(0)
    ours = inject(GPT2Model(GPT2Config(**sizes)), LoraConfig(r=16, init_lora_weights=init)).h[0].attn.c_attn
    theirs = peft.get_peft_model(transformers.GPT2Model(transformers.GPT2Config(**sizes)), peft.LoraConfig(
        r=16, init_lora_weights=init, fan_in_fan_out=True)).base_model.model.h[0].attn.c_attn
    for mine, other in ((ours.lora_A.weight, theirs.lora_A["default"].weight),
                        (ours.lora_B.weight, theirs.lora_B["default"].weight)):
        assert mine.shape == other.shape
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05, abs=1e-9)
        if init != "gaussian":
            assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.01, abs=1e-9)
