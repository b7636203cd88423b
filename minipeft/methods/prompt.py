"""Prompt tuning: learned input vectors before the text.

The frozen model is given V vectors that are no words' embeddings, and reads them before the text. They are all that is
trained. On the way out the virtual positions are cut off: heads and losses see the text alone.

    x = [P; wte[ids]] + wpe[0 .. V + T - 1]        P (V, C) trained;        output: positions V .. V + T - 1

Paper: Lester, Al-Rfou, Constant (2021), "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.
Trained: P and the classification head.
Costs: V C parameters; every text is V tokens longer. GPT-2 at V = 20: 15,360. Not the base model at step 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.injection import Plan, base_of
from minipeft.methods.layers import AdapterLayer
from minipeft.methods.virtual_tokens import Table, VirtualTokens, VirtualTokensConfig, check_room, place_of
from minipeft.model.kv_cache import KVCache
from minipeft.model.tokenizer import get_tokenizer
from minipeft.settings import POSITIVE_INTEGER, setting


@dataclass
class PromptTuningConfig(VirtualTokensConfig):
    """peft's PromptTuningConfig.

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    method: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    harmless: ClassVar[tuple[str, ...]] = ("tokenizer_kwargs",)

    num_virtual_tokens: int = setting(20, "V, tokens before the text", POSITIVE_INTEGER)
    prompt_tuning_init: str = setting(
        "RANDOM", "RANDOM: normal; SAMPLE_VOCAB: words drawn at random; TEXT: a text's words",
        choices=("RANDOM", "SAMPLE_VOCAB", "TEXT"))
    prompt_tuning_init_text: str | None = setting(None, "the text for TEXT, repeated or cut to V tokens")
    tokenizer_name_or_path: str | None = setting(None, "whose vocabulary cuts the text; default the model's own")

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

    def put_into(self, call: dict[str, Any], module: nn.Module) -> None:
        V, positions = self.num_virtual_tokens, call["position_ids"]
        first = call["cache"] is None or call["cache"].length == 0  # later calls find the virtual tokens in the cache
        if positions is not None:
            positions = torch.atleast_2d(positions) + V                                  # (batch or 1, seq)
            virtual = torch.arange(V, device=positions.device).expand(len(positions), V)  # (batch or 1, V)
            call["position_ids"] = torch.cat((virtual, positions), dim=1) if first else positions
        if first:
            x = module.wte(call["input_ids"]) if call["inputs_embeds"] is None else call["inputs_embeds"]
            prompt = self.encoder().to(x.dtype).expand(len(x), -1, -1)                   # (batch, V, C)
            call["inputs_embeds"] = torch.cat((prompt, x), dim=1)                        # (batch, V + seq, C)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self._prompt_is_in(output, kwargs["cache"]):
            return output[:, self.num_virtual_tokens:]                                   # (batch, seq, C)
        return output

    @staticmethod
    def _prompt_is_in(output: Tensor, cache: KVCache | None) -> bool:
        """Whether this call was a text's first, which the prompt was put before.

        After the call a cache holds this call's tokens and those of calls before it. Where it holds no more than this
        call's, there was none before; and it holds none at all under gradient checkpointing, which uses copies of it.
        """
        return cache is None or cache.length == 0 or cache.length == output.shape[1]


def plan(model: nn.Module, config: PromptTuningConfig) -> Plan:
    """Put V learned vectors before every text.

    Raises:
        ConfigError: more virtual tokens than positions, or no text to start from.
    """
    check_room(model, config.num_virtual_tokens)
    prompt = Prompt(Table(_initial_rows(model, config)), config.num_virtual_tokens)
    return Plan({place_of(model, "prompt_tuning"): prompt})


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
