"""Prompt tuning: learned input vectors before the text.

The frozen model is given V vectors that are no words' embeddings, and reads them before the text. They are all that is
trained. On the way out the virtual positions are cut off: heads and losses see the text alone.

    x = [P; wte[ids]] + wpe[0 .. V + T - 1]        P (V, C) trained;        output: positions V .. V + T - 1

Paper: Lester, Al-Rfou, Constant (2021), "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.
Trained: P and the classification head.
Costs: V C parameters; every text is V tokens longer. GPT-2 at V = 20: 15,360. Not the base model at step 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.config import check_fields
from minipeft.methods.injection import AdapterLayer, base_of, begin, insert, record
from minipeft.methods.virtual_tokens import SavedAsPrompt, Table, VirtualTokens, check_room, place_of
from minipeft.model.tokenizer import get_tokenizer


@dataclass
class PromptTuningConfig(SavedAsPrompt):
    """peft's PromptTuningConfig.

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    harmless: ClassVar[tuple[str, ...]] = ("tokenizer_kwargs",)

    num_virtual_tokens: int = field(default=20, metadata={"help": "V, tokens before the text"})
    prompt_tuning_init: str = field(
        default="RANDOM", metadata={"help": "RANDOM: normal; SAMPLE_VOCAB: words drawn at random; TEXT: a text's words",
                                    "choices": ("RANDOM", "SAMPLE_VOCAB", "TEXT")})
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "the text for TEXT, repeated or cut to V tokens"})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "whose vocabulary cuts the text; default the model's own"})


    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond the fields above; with TEXT, peft insists on a tokenizer's name."""
        name = self.tokenizer_name_or_path
        if self.prompt_tuning_init == "TEXT":
            name = name or getattr(model, "name_or_path", None) or "gpt2"
        return super().to_saved(model, layers) | {"tokenizer_name_or_path": name}

    @classmethod
    def from_saved(cls, values: dict[str, Any], model: nn.Module) -> PromptTuningConfig:
        """A configuration from adapter_config.json's values; how the prompt started does not matter any more."""
        return super().from_saved({**values, "prompt_tuning_init": "RANDOM"}, model)


class Prompt(VirtualTokens):
    """Vectors put before the text's embeddings, and cut off the output."""

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        _, call = super().before(module, args, kwargs)
        V, cache, positions = self.num_virtual_tokens, call.get("cache"), call.get("position_ids")
        first = cache is None or cache.length == 0  # later steps find the virtual tokens in the cache
        if positions is not None:
            positions = torch.atleast_2d(positions) + V                                       # (B or 1, T)
            virtual = torch.arange(V, device=positions.device).expand(len(positions), V)      # (B or 1, V)
            call["position_ids"] = torch.cat((virtual, positions), dim=1) if first else positions
        if first:
            x = module.wte(call["input_ids"]) if call.get("inputs_embeds") is None else call["inputs_embeds"]
            prompt = self.encoder().to(x.dtype).expand(len(x), -1, -1)                        # (B, V, C)
            call["inputs_embeds"] = torch.cat((prompt, x), dim=1)                             # (B, V + T, C)
        return (), call

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        cache = kwargs.get("cache")
        first = cache is None or cache.length in (0, output.shape[1])  # checkpointing leaves the cache as it was
        return output[:, self.num_virtual_tokens:] if first else output                       # (B, T, C)


def inject(model: nn.Module, config: PromptTuningConfig, name: str = "default") -> nn.Module:
    """Put V learned vectors before every text.

    Raises:
        ConfigError: a bad value, or more virtual tokens than positions.
    """
    check_fields(config)
    check_room(model, config.num_virtual_tokens)
    start = _initial_rows(model, config)
    injection = begin(model, "prompt", config, name)
    insert(model, injection, place_of(model, "prompt_tuning"), Prompt(Table(start), config.num_virtual_tokens))
    return record(model, injection)


@torch.no_grad()
def _initial_rows(model: nn.Module, config: PromptTuningConfig) -> Tensor:
    """(V, C), float32."""
    wte, V = base_of(model).wte.weight, config.num_virtual_tokens
    if config.prompt_tuning_init == "RANDOM":
        return torch.randn(V, wte.shape[1], device=wte.device)
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return wte[torch.randint(len(wte), (V,), device=wte.device)].float().clone()
    if not (config.prompt_tuning_init_text or "").strip():
        raise ConfigError("prompt_tuning_init TEXT needs a prompt_tuning_init_text, and it is empty")
    tokenizer = get_tokenizer(config.tokenizer_name_or_path or getattr(model, "name_or_path", None))
    ids = tokenizer.encode(config.prompt_tuning_init_text)
    if max(ids) >= len(wte):
        raise ConfigError(f"the tokenizer gives ids up to {max(ids)}, the model has {len(wte)} words: name the model's "
                          "own tokenizer_name_or_path")
    return wte[(ids * V)[:V]].float().clone()
