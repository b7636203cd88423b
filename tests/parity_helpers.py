"""For comparisons with peft: one tiny base model in both libraries, every method's configuration in both, batches."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

import minipeft

TOLERANCE = 1e-4
PAD = 0                                                   # the id transformers' classifier looks for; in no text here
VOCAB_SIZE = 97
LENGTHS = [9, 6, 1]
# task_type -> the class, which has the same name in both libraries
TASKS = {"CAUSAL_LM": "GPT2LMHeadModel", "SEQ_CLS": "GPT2ForSequenceClassification",
         "TOKEN_CLS": "GPT2ForTokenClassification"}
INNER_SIZES = [None, 60]                                  # n_inner: the usual 4 * n_embd = 96, and another one


# --- methods ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Method:
    """One of the methods that both libraries have. A configuration's fields are the same in both.

    Attributes:
        config: name of the configuration class, the same in both.
        fixed: fields that make it this method.
        small: fields that make it small enough for the tiny model.
    """

    config: str
    fixed: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=lambda: {"r": 4})

    @property
    def is_virtual(self):
        """Virtual tokens: peft cannot load these to train them on."""
        return "num_virtual_tokens" in self.small

    @property
    def pools_last_position(self):
        """peft's classifier then takes the last position, whatever is there."""
        return self.config in ("PromptTuningConfig", "PromptEncoderConfig")

    def fields(self, chosen=None):
        """A configuration's fields: the chosen ones, and those that make it this method."""
        return {**(self.small if chosen is None else chosen), **self.fixed}

    def ours(self, chosen=None):
        """Our configuration."""
        return getattr(minipeft, self.config)(**self.fields(chosen))

    def theirs(self, task, chosen=None):
        """peft's configuration."""
        fields = copy.deepcopy(self.fields(chosen))       # peft keeps and edits what it is given
        if task == "TOKEN_CLS" and fields.get("target_modules") == "all-linear":
            fields["modules_to_save"] = ["classifier"]    # or peft would adapt the classifier and then fail to wrap it
        with silent():
            return getattr(pytest.importorskip("peft"), self.config)(task_type=task, **fields)


METHODS = {
    "LoRA": Method("LoraConfig"),
    "rsLoRA": Method("LoraConfig", {"use_rslora": True}),
    "DoRA": Method("LoraConfig", {"use_dora": True}),
    "PiSSA": Method("LoraConfig", {"init_lora_weights": "pissa"}),
    "(IA)^3": Method("IA3Config", small={}),
    "VeRA": Method("VeraConfig"),
    "prompt tuning": Method("PromptTuningConfig", small={"num_virtual_tokens": 5}),
    "P-tuning, MLP": Method("PromptEncoderConfig", {"encoder_reparameterization_type": "MLP"},
                            {"num_virtual_tokens": 5, "encoder_hidden_size": 11}),
    "P-tuning, LSTM": Method("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM"},
                             {"num_virtual_tokens": 5, "encoder_hidden_size": 7}),
    "prefix tuning": Method("PrefixTuningConfig", small={"num_virtual_tokens": 5}),
    "prefix tuning, projected": Method("PrefixTuningConfig", {"prefix_projection": True},
                                       {"num_virtual_tokens": 5, "encoder_hidden_size": 11}),
}


# --- models -----------------------------------------------------------------------------------------------------------

class Pair(NamedTuple):
    """The same base model in both libraries; to be copied before use, which the two methods do."""

    folder: Any
    our_model: torch.nn.Module
    their_model: torch.nn.Module

    def ours(self):
        """A fresh copy of our model."""
        return copy.deepcopy(self.our_model)

    def theirs(self):
        """A fresh copy of transformers' model."""
        return copy.deepcopy(self.their_model)


def write_pair(folder, task, **sizes):
    """A random model that transformers creates and saves and that we load; nothing in it is zero, one or dropped."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {"vocab_size": VOCAB_SIZE, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 3, "num_labels": 3,
              "initializer_range": 0.1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
              "classifier_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": PAD, **sizes}
    theirs = getattr(transformers, TASKS[task])(transformers.GPT2Config(**config)).eval()
    move(theirs, 0.1)
    theirs.save_pretrained(folder)
    return Pair(folder, getattr(minipeft, TASKS[task]).from_pretrained(folder), theirs)


@torch.no_grad()
def move(model, size=0.2, seed=3):
    """Move every trained tensor, head and biases included, away from where it starts; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def inject_ours(pair, method, chosen=None):
    """Our model with the method in it, trained tensors moved."""
    torch.manual_seed(1)
    return move(minipeft.inject(pair.ours(), METHODS[method].ours(chosen))).eval()


def inject_theirs(pair, method, task, chosen=None):
    """peft's model with the method in it, trained tensors moved."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    with silent():
        return move(peft.get_peft_model(pair.theirs(), METHODS[method].theirs(task, chosen))).eval()


def load_theirs(pair, folder, trainable=False):
    """peft's model with the adapter of `folder`; that a tensor is missing or left over, of which peft only warns, is
    an error here."""
    peft = pytest.importorskip("peft")
    with silent():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        return peft.PeftModel.from_pretrained(pair.theirs(), folder, is_trainable=trainable).eval()


def save_theirs(model, folder, **how):
    """Write peft's adapter; returns the folder."""
    model.create_or_update_model_card = lambda folder: None   # a README, slow to write, that no test reads
    with silent():
        model.save_pretrained(folder, **how)
    return folder


@contextlib.contextmanager
def silent():
    """peft's and transformers' warnings concern neither these tests nor this library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- a trainer's folder -----------------------------------------------------------------------------------------------

def write_trainer_files(folder, model):
    """What transformers' Trainer leaves beside an adapter at a checkpoint."""
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    torch.save(transformers.TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True),
               folder / "training_args.bin")
    (folder / "trainer_state.json").write_text('{"global_step": 100}')
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")


def write_checkpoint(folder, base, task, method="LoRA", num_labels=2):
    """A checkpoint of transformers' Trainer: a pickled adapter for a base model on disk; returns peft's model."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    with silent():
        model = getattr(transformers, TASKS[task]).from_pretrained(base, num_labels=num_labels, pad_token_id=PAD)
        model = move(peft.get_peft_model(model, METHODS[method].theirs(task))).eval()
    save_theirs(model, folder, safe_serialization=False)
    write_trainer_files(folder, model)
    return model


# --- batches and logits -----------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """(B, T) token ids and their mask, which is None where nothing is padded."""

    ids: torch.Tensor
    mask: torch.Tensor | None


def batch(side, lengths=LENGTHS):
    """A batch of texts of mixed length, padded on one side."""
    T, generator = max(lengths), torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCAB_SIZE, (len(lengths), T), generator=generator)
    real = torch.tensor([[1] * n + [0] * (T - n) for n in lengths])
    real = real if side == "right" else real.flip(1)
    return Batch(ids.masked_fill(real == 0, PAD), real)


def batches(method, task):
    """Padded on the left, padded on the right, one text alone. Right padding is left out where peft pools a pad."""
    yield batch("left")
    if not (task == "SEQ_CLS" and METHODS[method].pools_last_position):
        yield batch("right")
    yield Batch(batch("right").ids[:1], None)


def logits_of(model, task, batch):
    """Logits of either library at each position of the text, (B, T, ...), or for each text, (B, K).

    In language models and token classifiers peft also gives out the virtual tokens' rows; they come first.
    """
    with silent():
        output = model(input_ids=batch.ids, attention_mask=batch.mask)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return logits if task == "SEQ_CLS" else logits[:, -batch.ids.shape[1]:]


@torch.no_grad()
def real_logits(model, task, batch):
    """Logits at the real tokens, (N, ...), or for each text, (B, K)."""
    logits = logits_of(model, task, batch)
    return logits if task == "SEQ_CLS" or batch.mask is None else logits[batch.mask.bool()]


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Equal within an absolute tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def assert_same_function(ours, theirs, base, method, task):
    """Our model and peft's give equal logits on every batch, and they are not the base model's."""
    for one in batches(method, task):
        actual, expected = real_logits(ours, task, one), real_logits(theirs, task, one)
        assert (expected - real_logits(base, task, one)).abs().max() > 1e-2
        assert_close(actual, expected)


# --- generation -------------------------------------------------------------------------------------------------------

def generate_theirs(model, ids, mask, new, eos=None, **how):
    """`new` tokens at most by transformers' generate, without sampling, in a model of theirs or of peft's."""
    model.generation_config.eos_token_id = eos
    with silent():
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask,
                              max_new_tokens=new, do_sample=False, eos_token_id=eos,
                              pad_token_id=PAD if eos is None else eos, **how)
