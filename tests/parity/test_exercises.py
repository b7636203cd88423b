"""The exercises' right answers inside a whole model, against the logits that peft has stored.

So what the grader takes for right is peft's, and the references in minipeft/check/references.json stand for it where
these files are not at hand.
"""

from __future__ import annotations

import json

import pytest
import torch
from documents import ROOT
from parity_helpers import assert_close
from safetensors.torch import load_file

from minipeft import GPT2ForSequenceClassification, GPT2LMHeadModel
from minipeft.check.answers import load
from minipeft.model.gpt2 import last_real_token

RIGHT = ROOT / "tests" / "exercises" / "right"


class Case:
    """A stored case: the base model, the adapter's tensors, the inputs and the logits."""

    def __init__(self, fixtures, name):
        folder = fixtures / name
        self.config = json.loads((folder / "adapter_config.json").read_text())
        self.tensors = load_file(folder / "adapter_model.safetensors")
        self.reference = load_file(folder / "reference.safetensors")
        facts = json.loads((folder / "case.json").read_text())
        if facts["head"] == "cls":
            self.model = GPT2ForSequenceClassification.from_pretrained(fixtures / "base",
                                                                       num_labels=facts["num_labels"])
            self.model.score.weight.data.copy_(next(t for name,
                                                    t in self.tensors.items() if name.endswith("score.weight")))
        else:
            self.model = GPT2LMHeadModel.from_pretrained(fixtures / "base")
        self.model.eval()

    def assert_reference(self, logits=None):
        ids, mask = self.reference["input_ids"], self.reference["attention_mask"]
        with torch.no_grad():
            assert_close((logits or self.model)(ids, mask), self.reference["logits"])
            assert_close((logits or self.model)(self.reference["full_ids"], None), self.reference["full_logits"])


def put(parameter, values):
    parameter.data.copy_(values.view_as(parameter))


@pytest.mark.parametrize(("case", "method"), [("lora_cls", "lora"), ("dora_cls", "dora"), ("ia3_cls", "ia3")])
@pytest.mark.parametrize("merged", [False, True], ids=["in the model", "merged"])
def test_layers(peft_fixtures, case, method, merged):
    case, answer = Case(peft_fixtures, case), load(RIGHT / f"{method}.py")
    prefix = "base_model.model."
    for name in sorted({key[len(prefix):].split(".lora_")[0].removesuffix(".ia3_l") for key in case.tensors
                        if ".lora_" in key or key.endswith(".ia3_l")}):
        linear, own = case.model.get_submodule(name), f"{prefix}{name}."
        if method == "ia3":
            layer = answer.IA3Linear(linear, case.config["feedforward_modules"] is not None and any(
                name.endswith(each) for each in case.config["feedforward_modules"]))
            put(layer.ia3_l, case.tensors[f"{own}ia3_l"])
        else:
            layer = getattr(answer, {"lora": "LoRALinear", "dora": "DoRALinear"}[method])(
                linear, case.config["r"], case.config["lora_alpha"])
            put(layer.lora_A, case.tensors[f"{own}lora_A.weight"]), put(layer.lora_B,
                                                                        case.tensors[f"{own}lora_B.weight"])
            if method == "dora":
                put(layer.magnitude, case.tensors[f"{own}lora_magnitude_vector"])
        if not merged:
            case.model.set_submodule(name, layer.eval())
        elif method == "ia3":
            weight, bias = layer.merged()
            put(linear.weight, weight), put(linear.bias, bias)
        else:
            put(linear.weight, layer.merged_weight())
    case.assert_reference()


@pytest.mark.parametrize("case", ["prefix_lm", "prefix_cls"])
def test_prefix(peft_fixtures, case):
    """Every block's attention is the answer's, with the queries, keys and values of the model's own c_attn."""
    case, answer = Case(peft_fixtures, case), load(RIGHT / "prefix.py")
    attention = load(RIGHT / "attention.py")
    base, config = case.model.transformer, case.model.config
    prefix = answer.Prefix(case.config["num_virtual_tokens"], config.n_layer, config.n_head, config.n_embd)
    put(prefix.table, case.tensors["prompt_embeddings"])

    def logits(ids, mask):
        x = base.wte(ids) + base.wpe(prefix.positions(ids.shape[1]))
        for number, block in enumerate(base.h):
            q, k, v = (attention.split_heads(part,
                                             config.n_head) for part in block.attn.c_attn(block.ln_1(x)).chunk(3, -1))
            x = x + block.attn.c_proj(attention.merge_heads(prefix.attend(number, q, k, v, mask)))
            x = x + block.mlp(block.ln_2(x))
        x = base.ln_f(x)
        if hasattr(case.model, "score"):
            return case.model.score(last_real_token(x, mask))
        return case.model.lm_head(x)

    with torch.no_grad():
        assert_close(logits(case.reference["full_ids"], None), case.reference["full_logits"])
        ids, mask = case.reference["input_ids"], case.reference["attention_mask"]
        got, stored = logits(ids, mask), case.reference["logits"]
        assert_close(*((got, stored) if got.ndim == 2 else (got[mask.bool()], stored[mask.bool()])))


def test_prompt_and_attention(peft_fixtures):
    """What the blocks read is the prompt's, and in every block attention is the answer's, too."""
    case, answer = Case(peft_fixtures, "prompt_lm"), load(RIGHT / "prompt.py")
    attention = load(RIGHT / "attention.py")
    base, config = case.model.transformer, case.model.config
    prompt = answer.Prompt(case.config["num_virtual_tokens"], base.wte, [0])
    put(prompt.prompt, case.tensors["prompt_embeddings"])
    own = []
    for block in base.h:
        own.append(attention.Attention(config.n_embd, config.n_head))
        own[-1].load_state_dict(block.attn.state_dict())

    def logits(ids, mask):
        x = prompt.embed(ids, base.wte, base.wpe)
        mask = None if mask is None else prompt.extend_mask(mask)
        for block, attend in zip(base.h, own):
            x = x + attend(block.ln_1(x), mask)
            x = x + block.mlp(block.ln_2(x))
        return case.model.lm_head(prompt.strip(base.ln_f(x)))

    T = case.reference["full_ids"].shape[1]
    with torch.no_grad():
        assert_close(logits(case.reference["full_ids"], None), case.reference["full_logits"][:, -T:])
        ids, mask = case.reference["input_ids"], case.reference["attention_mask"]
        assert_close(logits(ids, mask)[mask.bool()], case.reference["logits"][:, -ids.shape[1]:][mask.bool()])
