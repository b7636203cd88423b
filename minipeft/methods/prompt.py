r"""Prompt tuning: learned input vectors before the text.

The frozen model is given V vectors that are no words' embeddings, and reads them before the text. They are learned, and
every text gets the same ones. What the model puts out at their positions is cut off, so heads and losses see the text
alone.

    x = [P; wte[ids]] + wpe[positions]      stacked along the sequence
    y = blocks(x)[V:]                       [V:] along the sequence: (batch, V + seq, C) -> (batch, seq, C)

    position     0     1   ...   19     20     21     22     23     24         V = 20, a text of 5 tokens
    x            P_0   P_1 ...   P_19   The    film   was    very   good       each + wpe[position]
                 |     |         |      |      |      |      |      |
             the frozen blocks: each position sees itself and all to its left
                 |     |         |      |      |      |      |      |
    y            cut off ............   y_0    y_1    y_2    y_3    y_4        (batch, seq, C)

By hand, with C = 2, V = 1: P = (0.5, -1), wpe[0] = (0.1, 0), wpe[1] = (0, 0.2) and a text of one token of embedding
(3, 1) give x = (0.6, -1), (3, 1.2). If the blocks changed nothing, y would be the second vector, (3, 1.2). Without the
prompt the token would stand at position 0: x = (3.1, 1).

Symbols
    ids (batch, seq) the text's token ids       wte (vocabulary, C), wpe (n_positions, C) the frozen embeddings
    P (V, C) the prompt, trained                V = num_virtual_tokens       C = n_embd, 768 in GPT-2 124M
    seq how many tokens the text has            [P; ...] (batch, V + seq, C): P before each text of the batch
    [V:] cuts the first V of the V + seq vectors of each text off; the batch stays whole
    positions 0 to V + seq - 1, (V + seq,); of a caller's position_ids (batch, V + seq), or (1, V + seq) for all texts
    x (batch, V + seq, C) what enters the blocks, in training after the base's own dropout
    blocks the base's L = n_layer blocks and ln_f, its last LayerNorm      y (batch, seq, C) what the head gets
Trained
    P, a (V, C) table called transformer.prompt_tuning.encoder.weight, in float32 whatever the base's dtype; before it
    is used it is brought to that of the text's embeddings. A new classification head, n C numbers for n labels, in
    tagging n C + n.
Frozen
    Everything else, 124,439,808 numbers, wte first of all, the base's biases too: `inject`, which puts the method into
    a model, sets requires_grad to False, so no gradient is computed for it and the optimizer never sees it. A prompt
    that starts from words is a copy of their rows of wte: training it does not move the words.
At step 0
    PromptTuningConfig()                                      is not the base model: P is standard normal
    PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB")     is not the base model: P is V rows of wte, drawn at random
    With prompt_tuning_init="TEXT" P is the rows of prompt_tuning_init_text's tokens, repeated or cut to V: the base
    model with these words before each text, which is not the base model on the text either. No setting starts as the
    base model: a text's tokens stand V positions later, and each spends a part of its attention on the prompt. An
    example: if all attention scores are equal, the text's first token sees 21 tokens and spends 20 of 21 shares of its
    attention on the prompt, and token number t spends V of V + t shares.
    Both models, this one and the base, have the same new head here; it is random.
Positions and mask
    With V = 20 and a text of 5 tokens:
    Positions. The prompt stands at 0 to 19, the text at 20 to 24. 20 is added to a caller's position_ids, 0 to 4, and
    0 to 19 are put before them. A text with its continuation may have 1,024 - 20 = 1,004 tokens. One more is refused
    when it is read: "1025 tokens do not fit this model: it has 1024 positions; truncate the text".
    Mask. None stays None: each of the 25 tokens sees itself and all before it. A mask (batch, 5) gets 20 ones on its
    left: 1 1 1 0 0 becomes twenty 1, then 1 1 1 0 0. Virtual token i sees the virtual tokens 0 to i, a token of the
    text all 20 and the text up to itself. Pads, the tokens with 0 in the mask, are seen by no real token. On the left,
    0 0 1 1 1, they stand between prompt and text, and position_ids 0 0 0 1 2 become 20 20 20 21 22; `generate` gives
    them. Without position_ids pads count, and this text starts at 22.
    KV cache. After the first call every block holds 25 keys and values, 20 of the prompt and 5 of the text. A later
    call with one token finds the prompt there, so nothing is put in and nothing is cut off: the token gets position
    25, a mask (batch, 6) becomes (batch, 26), and the cache then holds 26.
    Gradient checkpointing. The prompt is put in before the first block, and only blocks are computed a second time.
Saved
    In adapter_model.safetensors:
    prompt_embeddings (20, 768)
    base_model.score.weight (2, 768)
    The second is the new head; tagging has base_model.classifier.weight and .bias there, a language model nothing.
    adapter_config.json must say peft_type PROMPT_TUNING, task_type and num_virtual_tokens. task_type is SEQ_CLS for
    this classifier, TOKEN_CLS for tagging and CAUSAL_LM for a language model. token_dim 768, num_layers 12,
    num_attention_heads 12 and num_transformer_submodules 1 are written for peft, Hugging Face's library. Each of these
    four that a file has must be the model's: "the adapter was made for another token_dim; this model's is 768". With
    prompt_tuning_init TEXT peft wants tokenizer_name_or_path, too: the file has the setting or, without one, the
    model's name or folder, or gpt2.
    In a loaded configuration prompt_tuning_init is RANDOM, whatever was saved: P comes from the file. tokenizer_kwargs,
    which peft may have written, is accepted and not used.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too. Where several methods work under one name, each has a sub-folder with these three files, such
    as lora/ and bitfit/. A minipeft.json beside the sub-folders names them.
Merging
    Not possible: the prompt is input, not a change of weights. It is read before each text.
    `merge` is an InjectionError: "Prompt cannot be merged: it is not a change of weights".
    Off: within `disable_adapter`, and for good after `remove`, the model is the base model bit for bit: the text starts
    at position 0 again, all 1,024 are free, and the head is the one from before training. A KV cache keeps the prompt:
    start a new one.
    Several adapters. A second `inject` of the same method is an InjectionError. `load_adapter(model, folder, name)`
    adds a saved adapter, of this method or another, under another name. It becomes the active one, the one that
    computes. The others stay, switched off. The model is in eval mode then. `set_adapter(model, name)` makes another
    one active. Under one name other methods may work along, such as LoRA, but neither full nor head, nor a second one
    that puts something before the text.
Cost
    V C parameters: 20 * 768 = 15,360. In all 20 * 768 + 1,536 = 16,896 trained, the head's 2 * 768 = 1,536 among them.
    Forward: V tokens more per text in every block. 256 tokens become 276: 8 % more in the matrices, and 16 % more
    attention scores, whose number grows by the square. 5 become 25: five times as much, and 25 times the scores. In the
    12 blocks' matrices, of 12 C^2 numbers each, a token takes 2 * 12 * 12 * 768 * 768 = 169,869,312 operations, the
    prompt 20 * 169,869,312 = 3,397,386,240. With a KV cache the V tokens are computed once per text, in its first call;
    later tokens still read their keys and values. The cache holds these 2 V L C numbers per text,
    4 * 2 * 20 * 12 * 768 = 1,474,560 bytes in float32.
    Backward: the gradient passes through all blocks down to the input. Of the three products that full fine-tuning
    takes per matrix (forward, the gradient of the matrix's input, the gradient of the matrix itself) the third is never
    computed for a frozen matrix. It alone needs the matrix's input, which is therefore not kept. Kept are, per block
    and token, virtual or not, the inputs of both LayerNorms, q, k, v, attention's output and gelu's input, (2 + 3 + 1 +
    4) C numbers. The softmax's shares themselves are not kept: attention computes them again. In training the base's
    dropout adds 2 C bytes per block and token. For dropout on attention's shares (attn_pdrop) a CPU keeps its mask, a
    byte per share, in place of attention's output; a GPU's fused attention keeps no mask.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 135,168 bytes; gradients take half of that. The
    optimizer's time, too, grows with the trained parameters alone. Weight decay acts on the head's matrix alone.
Errors
    In this list the class of each error stands before its message. Most wrong values are found when the configuration
    is made, the others by `inject`, before it changes anything. `load_adapter` raises an AdapterError, and leaves the
    model as it was, in these cases. A file is missing, damaged or not the one whose digest minipeft.json holds. A
    tensor is missing, unexpected, of another shape, of integers or not finite; the message names it. minipeft.json has
    another base model's fingerprint; a base of another dtype is not compared. The folder is for another task. The
    peft_type is unknown. A setting in adapter_config.json that would change the numbers, and that minipeft does not
    implement, is a ConfigError. An adapter's name that is taken (`load_adapter`) or unknown (`set_adapter`, `remove`)
    is an InjectionError. Other dimensions than the model's, such as token_dim, are a ConfigError. A text with more
    tokens than positions is a ConfigError when the model reads it; values of a caller's own position_ids are not
    checked. With TEXT `inject` raises a ConfigError if the text is missing, empty or blank, or has ids that the model
    does not have, and a WeightsError if the vocabulary is unknown or damaged, or GPT-2's neither cached nor to be
    downloaded.
    PromptTuningConfig(prompt_tuning_init="random")
        ConfigError: prompt_tuning_init must be one of RANDOM, SAMPLE_VOCAB, TEXT, got 'random'
    inject(model, PromptTuningConfig(prompt_tuning_init="TEXT"))
        ConfigError: prompt_tuning_init TEXT needs a prompt_tuning_init_text, and it is empty
    PromptTuningConfig(num_virtual_tokens=0)
        ConfigError: num_virtual_tokens must be a positive integer, got 0
    inject(model, PromptTuningConfig(num_virtual_tokens=1024))
        ConfigError: num_virtual_tokens=1024: this model has 1024 positions left, so between 1 and 1023 virtual tokens
        fit before a text
    inject(inject(model, PromptTuningConfig()), PrefixTuningConfig())
        InjectionError: this model already carries prompt, which does not combine with prefix: remove it, or start from
        a fresh model
Differs from the paper
    Lester et al. tune T5, which writes the label as a word and needs no new head. T5's positions are relative, so that
    a prompt uses none up; here, as in peft, virtual tokens have positions as words have. They start P from the labels'
    words, from frequent words, or uniform in [-0.5, 0.5]. peft's default, and this one, is standard normal: vectors
    several times as long as a word's. SAMPLE_VOCAB draws from the whole vocabulary. Their ensembles of prompts are not
    in this file.
    From peft it differs: a classifier takes the last real token, where peft takes the last position, pad or not; the
    virtual tokens' rows are cut off, where peft gives them out with a language model and in tagging; a caller's
    position_ids count, where peft drops them. And num_virtual_tokens and, with TEXT, tokenizer_name_or_path need not be
    given.

Paper: Lester, Al-Rfou, Constant (2021), "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.
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
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.virtual_tokens import Table, VirtualTokens, VirtualTokensConfig, check_room, place_of
from minipeft.model.kv_cache import KVCache
from minipeft.model.tokenizer import get_tokenizer
from minipeft.settings import POSITIVE_INTEGER, setting


@dataclass
class PromptTuningConfig(VirtualTokensConfig):
    """peft's PromptTuningConfig.

    The defaults are peft's; only for num_virtual_tokens peft has none. The command line starts from prompt_tuning_init
    SAMPLE_VOCAB, which suits the bundled base: see runs/defaults.py.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    method: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    harmless: ClassVar[tuple[str, ...]] = ("tokenizer_kwargs",)  # of TEXT's tokenizer; a file holds P itself

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
    """Vectors put before the text's embeddings, and cut off the output. `encoder()` gives them, P (V, C)."""

    def put_into(self, call: dict[str, Any], module: nn.Module) -> None:
        """Before each call of the base model, `module`: change its arguments, `call`; those not given are None there.

        The mask has its V ones already.
        """
        V, positions = self.num_virtual_tokens, call["position_ids"]
        first = call["cache"] is None or call["cache"].length == 0  # later calls find the prompt in the cache
        if positions is not None:
            positions = torch.atleast_2d(positions) + V                                  # (batch or 1, seq)
            virtual = torch.arange(V, device=positions.device).expand(positions.shape[0], V)   # (batch or 1, V)
            call["position_ids"] = torch.cat((virtual, positions), dim=1) if first else positions
            # The first call's are (batch or 1, V + seq).
        if first:
            # (batch, seq, C). The base model adds wpe, and reads inputs_embeds in place of input_ids.
            x = module.wte(call["input_ids"]) if call["inputs_embeds"] is None else call["inputs_embeds"]
            prompt = self.encoder().to(x.dtype).expand(x.shape[0], -1, -1)               # (batch, V, C)
            call["inputs_embeds"] = torch.cat((prompt, x), dim=1)                        # (batch, V + seq, C)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """After each call of the base model, with the arguments that `put_into` left: y."""
        if self._prompt_is_in(output, kwargs["cache"]):
            return output[:, self.num_virtual_tokens:]                                   # (batch, seq, C)
        return output                                                                    # already (batch, seq, C)

    @staticmethod
    def _prompt_is_in(output: Tensor, cache: KVCache | None) -> bool:
        """Whether the prompt was put before this call's tokens, as it is at a text's first call.

        Without a cache every call is a first one. With one, `cache.length` counts the tokens of this call and of all
        calls before. After the first call it is what this call put out, 25 and 25. Later it is more: 26 and 1.
        """
        return cache is None or cache.length == output.shape[1]


def plan(model: nn.Module, config: PromptTuningConfig) -> Plan:
    """Put V learned vectors before every text.

    Raises:
        ConfigError: as many virtual tokens as positions or more, no text to start from, or one with ids that
            the model does not have.
        WeightsError: a damaged vocabulary file, or GPT-2's vocabulary neither cached nor to be downloaded.
    """
    check_room(model, config.num_virtual_tokens)
    prompt = Prompt(Table(_initial_rows(model, config)), config.num_virtual_tokens)
    return Plan({place_of(model, "prompt_tuning"): prompt})


@torch.no_grad()
def _initial_rows(model: nn.Module, config: PromptTuningConfig) -> Tensor:
    """P as it starts, (V, C) in float32: random, or copies of rows of wte."""
    wte, V = base_of(model).wte.weight, config.num_virtual_tokens
    if config.prompt_tuning_init == "RANDOM":
        return torch.randn(V, wte.shape[1], device=wte.device)
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return wte[torch.randint(len(wte), (V,), device=wte.device)].float().clone()
    if not (config.prompt_tuning_init_text or "").strip():
        raise ConfigError("prompt_tuning_init TEXT needs a prompt_tuning_init_text, and it is empty")
    tokenizer = get_tokenizer(config.tokenizer_name_or_path or getattr(model, "name_or_path", None) or "gpt2")
    ids = tokenizer.encode(config.prompt_tuning_init_text)
    if max(ids) >= len(wte):
        raise ConfigError(f"the tokenizer gives ids up to {max(ids)}, the model has {len(wte)} words: name the model's "
                          "own tokenizer_name_or_path")
    return wte[(ids * V)[:V]].float().clone()  # the text V times over, of which the first V tokens are taken


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for. positions are (1, V + seq): a trace then finds a token's row."""
    layer, base = seen.layer, base_of(seen.model)
    name, V = seen.place.rpartition(".")[0], layer.num_virtual_tokens
    return Symbols({"P": layer.encoder(), "wte": base.wte.weight, "ids": seen.ids, "wpe": base.wpe.weight,
                    "positions": torch.arange(V + seen.ids.shape[1])[None], "blocks": nn.Sequential(*base.h, base.ln_f),
                    "V": V, "x": seen.inputs[f"{name}.h.0".lstrip(".")], "y": seen.outputs[name]})
