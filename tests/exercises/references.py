"""Make minipeft/check/references.json, what the exercises' grader holds answers against last:

    python tests/exercises/references.py

Inputs are random and of two decimals. The outputs are peft's and transformers', where they have the method; otherwise
this library's own. Each case says in "by" which of them it was.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn as nn
import transformers
from torch import Tensor

from minipeft import BitFitConfig, BottleneckConfig, GPT2Config, GPT2Model, inject
from minipeft.check.bitfit import gpt2
from minipeft.check.references import FILE

IN, OUT, R, T = 4, 6, 2, 3


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Random numbers of two decimals."""
    return (torch.randn(shape, generator=generator) * 100).round() / 100


class Base(nn.Module):
    """One linear layer with a name that peft can target."""

    def __init__(self, W: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.c_attn = nn.Linear(W.shape[1], W.shape[0])
        self.c_attn.load_state_dict({"weight": W, "bias": bias})

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x)


@torch.no_grad()
def peft_layer(config: Any, tensors: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """peft's output and merged tensors for one linear layer.

    Args:
        tensors: a part of a parameter's name in peft -> its values.
    """
    model = peft.get_peft_model(Base(given["W"], given["bias"]), config).eval()
    for name, values in tensors.items():
        [target] = [parameter for key, parameter in model.named_parameters() if name in key]
        target.copy_(values.view_as(target))
    y = model(given["x"])
    layer = model.merge_and_unload().c_attn
    return {"y": y, "merged": layer.weight, "merged_bias": layer.bias}


def linear_cases() -> dict[str, dict[str, Any]]:
    """LoRA, DoRA and (IA)^3 of one linear layer."""
    generator = torch.Generator().manual_seed(1)
    given = {"W": numbers(generator, OUT, IN), "bias": numbers(generator, OUT), "x": numbers(generator, 1, T, IN)}
    pair = {"A": numbers(generator, R, IN), "B": numbers(generator, OUT, R)}
    m, rows, columns = (numbers(generator, size).abs() + 0.5 for size in (OUT, OUT, IN))
    lora = {"r": R, "lora_alpha": 5, "target_modules": ["c_attn"]}
    named = {"lora_A": pair["A"], "lora_B": pair["B"]}
    cases = {
        "lora": {**pair, "r": R, "lora_alpha": 5, **peft_layer(peft.LoraConfig(**lora), named, given)},
        "dora": {**pair, "m": m, "r": R, "lora_alpha": 5, **peft_layer(
            peft.LoraConfig(use_dora=True, **lora), {**named, "lora_magnitude_vector": m}, given)},
        "ia3": {"l": rows, **peft_layer(peft.IA3Config(
            target_modules=["c_attn"], feedforward_modules=[]), {"ia3_l": rows}, given)},
        "ia3_feedforward": {"l": columns, **peft_layer(peft.IA3Config(
            target_modules=["c_attn"], feedforward_modules=["c_attn"]), {"ia3_l": columns}, given)}}
    return {name: {"by": "peft", **given, **case} for name, case in cases.items()}


@torch.no_grad()
def adapter_case() -> dict[str, Any]:
    """A block with two bottleneck adapters: this library's, as peft has no such method."""
    generator = torch.Generator().manual_seed(2)
    config = GPT2Config(vocab_size=5, n_embd=4, n_head=2, n_layer=1, n_inner=4, n_positions=T)
    block = GPT2Model(config).eval().h[0]
    tensors = {name: numbers(generator, *tensor.shape) for name, tensor in block.named_parameters()}
    block.load_state_dict(tensors)
    holder = GPT2Model(config).eval()
    holder.h[0] = block
    inject(holder, BottleneckConfig(bottleneck_size=2, scaling=1.5))
    for place, adapter in (("first", block.attn.adapter), ("second", block.mlp.adapter)):
        for name, tensor in adapter.named_parameters():
            tensors[f"{place}.{name}"] = numbers(generator, *tensor.shape)
            tensor.copy_(tensors[f"{place}.{name}"])
    x = numbers(generator, 1, T, 4)
    return {"by": "minipeft", "scaling": 1.5, **tensors, "x": x, "y": block(x)}


def tiny_gpt2() -> transformers.GPT2Config:
    """Of transformers: two heads of two channels, two blocks, no dropout."""
    return transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=2, n_head=2, n_inner=4,
                                   resid_pdrop=0.0,
                                   embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")


@torch.no_grad()
def attention_case() -> dict[str, Any]:
    """transformers' attention module."""
    generator = torch.Generator().manual_seed(3)
    module = transformers.GPT2Model(tiny_gpt2()).eval().h[0].attn
    sizes = {"c_attn.weight": (12, 4), "c_attn.bias": (12,), "c_proj.weight": (4, 4), "c_proj.bias": (4,)}
    tensors = {name: numbers(generator, *shape) for name, shape in sizes.items()}
    for name, tensor in tensors.items():
        module.get_parameter(name).copy_(tensor.T if tensor.ndim == 2 else tensor)  # transformers' are (in, out)
    x = numbers(generator, 1, T, 4)
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    return {"by": "transformers", **tensors, "x": x, "y": module(x, attention_mask=mask)[0]}


@torch.no_grad()
def prefix_case() -> dict[str, Any]:
    """The keys and values that peft makes of a table, and what transformers' attention in block 1 makes of them."""
    generator = torch.Generator().manual_seed(4)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(tiny_gpt2()), config).eval()
    for tensor in model.parameters():
        tensor.copy_(numbers(generator, *tensor.shape))
    table = numbers(generator, 2, 16)
    model.prompt_encoder["default"].embedding.weight.copy_(table)
    layers = model.get_prompt(batch_size=1).layers
    case = {f"{name}.{number}": tensor for number, layer in enumerate(layers)
            for name, tensor in (("P_k", layer.keys), ("P_v", layer.values))}
    seen = {}

    def note(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in output.chunk(3, -1))
        seen.update(q=q, k=k, v=v)

    attention = model.base_model.transformer.h[1].attn
    attention.c_attn.register_forward_hook(note)
    attention.c_proj.register_forward_pre_hook(
        lambda module, arguments: seen.update(o=arguments[0].unflatten(-1, (2, 2)).transpose(1, 2)))
    model(torch.tensor([[1, 2, 3]]))
    return {"by": "peft", "table": table, **case, **seen}


@torch.no_grad()
def prompt_case() -> dict[str, Any]:
    """What the first block reads of peft's prompt tuning."""
    generator = torch.Generator().manual_seed(5)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    base = transformers.GPT2LMHeadModel(tiny_gpt2())
    given = {"wte": numbers(generator, 9, 4), "wpe": numbers(generator, 8, 4), "P": numbers(generator, 3, 4)}
    base.transformer.wte.weight.copy_(given["wte"]), base.transformer.wpe.weight.copy_(given["wpe"])
    model = peft.get_peft_model(base, config).eval()
    model.prompt_encoder["default"].embedding.weight.copy_(given["P"])
    seen = {}
    base.transformer.h[0].register_forward_pre_hook(lambda module, arguments: seen.update(x=arguments[0]))
    ids = torch.tensor([[1, 2, 3], [8, 0, 4]])
    model(ids)
    return {"by": "peft", **given, "input_ids": ids, **seen}


def bitfit_case() -> dict[str, Any]:
    """What this library trains of the grader's model, as peft has no such method."""
    model = inject(gpt2(), BitFitConfig())
    return {"by": "minipeft", "names": sorted(name for name, p in model.named_parameters() if p.requires_grad)}


def make() -> dict[str, Any]:
    """The whole content of the file."""
    cases = {**linear_cases(), "attention": attention_case(), "prefix": prefix_case(),
             "prompt": prompt_case(), "adapter": adapter_case(), "bitfit": bitfit_case()}
    plain = {name: {key: value.tolist() if isinstance(value, Tensor) else value for key, value in case.items()}
             for name, case in cases.items()}
    return {"made by": "tests/exercises/references.py",
            "versions": {name: version(name) for name in ("peft", "transformers", "torch")}, "cases": plain}


def rounded(value: Any) -> Any:
    """Floats to six decimals, in lists of any depth."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def write(path: Path = FILE) -> None:
    content = make()
    content["cases"] = {name: {key: rounded(value) for key, value in case.items()}
                        for name, case in content["cases"].items()}
    lines = [f'  {json.dumps(name)}: {json.dumps(case)}' for name, case in content.pop("cases").items()]
    head = json.dumps(content)[:-1]
    path.write_text(head + ', "cases": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write()
