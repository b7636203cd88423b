r"""Prefix tuning: learned keys and values before the text, in every block.

For every block V keys and V values are learned. Attention reads them before the text's own, as it reads a key-value
cache; but no token produced them. A prompt's vectors enter at the bottom and pass through all blocks; a prefix acts on
every block directly and passes through none.

    o = softmax(q [P_k; k]^T / sqrt(D) + mask) [P_v; v]

                          learned                      from the text
                    +-----------------+      +-----+------+-----+------+------+
            keys    |       P_k       |  ;   |                k               |
            values  |       P_v       |  ;   |                v               |
                    +-----------------+      +-----+------+-----+------+------+
                          V = 20               The   film   was   very   good
            position      none                 20    21     22    23     24

            The sees      all V                x
            film sees     all V                x     x
            was sees      all V                x     x      x                    and so on

By hand, one head with D = 1 and V = 1: P_k = 0, P_v = 4, and one token of the text with q = 1, k = ln 3, v = 1. The
attention scores are 0 and ln 3, their exponentials 1 and 3, so o = 1/4 * 4 + 3/4 * 1 = 1.75. Without the prefix o = 1.

Symbols
    seq how many tokens the text has       q, k, v (batch, H, seq, D) their queries, keys, values in one block
    H heads of D = C / H = 64 make C = n_embd = 768    L = n_layer, the number of blocks    sqrt is the square root
    P_k, P_v (batch, H, V, D) that block's part of the table, the same for every text        V = num_virtual_tokens
    [P_k; k] stacks along the sequence: (batch, H, V + seq, D)
    mask (seq, V + seq), with pads on the left (batch, 1, seq, V + seq): 0 where a query sees a key, else -infinity
    The attention scores are what softmax gets, (batch, H, seq, V + seq). It makes shares of the V + seq scores of each
    query; they add up to 1. In training the base's dropout acts on them: it sets each share to 0 with the probability
    attn_pdrop and divides the others by 1 - attn_pdrop. o is then
    dropout(softmax(q [P_k; k]^T / sqrt(D) + mask)) [P_v; v].
    o (batch, H, seq, D): with the heads side by side, (batch, seq, C), it enters attention's last matrix, c_proj
    P (V, 2 L C) the table, trained, or made by a network if prefix_projection is true:
    P = tanh(E W_1^T + b_1) W_2^T + b_2, with E (V, C), W_1 (h, C), b_1 (h,), W_2 (2 L C, h), b_2 (2 L C,) trained and
    h = encoder_hidden_size, by default C
Trained
    P, called transformer.prefix_tuning.encoder.weight, in float32 whatever the base's dtype; before it is used it is
    brought to the dtype that the blocks compute in. A new classification head, n C numbers for n labels, in tagging
    n C + n.
    With prefix_projection E and the network instead of P. Below transformer.prefix_tuning.encoder E is
    embedding.weight, W_1 and b_1 are transform.0.weight and .bias, W_2 and b_2 transform.2.weight and .bias. A model
    that loads a saved adapter has P as a plain table, and trains that.
Frozen
    Everything else, 124,439,808 numbers, the base's biases too: `inject`, which puts the method into a model, sets
    requires_grad to False, so no gradient is computed for it and the optimizer never sees it.
At step 0
    PrefixTuningConfig()                            is not the base model: P is standard normal
    PrefixTuningConfig(init_weights="zero")         is not the base model: a key of zeros takes its share, see below
    PrefixTuningConfig(prefix_projection=True)      is not the base model: E and the network are random
    No setting starts as the base model. A key of zeros has the attention score 0 with every query, and exp(0) = 1. So V
    of them take V / (V + Z) of the softmax, where Z is the sum of exp(attention score) over the text's tokens that the
    query sees. An example: the text's fifth token sees five tokens of the text. If its attention scores with them are
    0, too, then Z = 5, and the prefix takes 20 of 25 shares. Its values are zeros, so a fifth of the base's attention
    output is left.
    E starts standard normal. W_1, b_1, W_2 and b_2 start uniform between -1 / sqrt(n) and 1 / sqrt(n), where n is how
    many numbers the matrix reads: C for W_1 and b_1, h for W_2 and b_2. With init_weights "zero" W_2 and b_2 start at
    0, so that P is zeros here, too; in the first step the gradients of E, W_1 and b_1 are then 0, as they are
    multiplied by W_2. Without prefix_projection encoder_hidden_size is not read.
    Both models, this one and the base, have the same new head here; it is random.
Positions and mask
    With V = 20 and a text of 5 tokens:
    Positions. The text stands at 20 to 24; 20 is added to a caller's position_ids, 0 to 4. Nothing stands at 0 to 19:
    P gets no position embedding (wpe). A text with its continuation may have 1,024 - 20 = 1,004 tokens. One more is
    refused when it is read: "1025 tokens do not fit this model: it has 1024 positions; truncate the text".
    Mask. A mask (batch, 5) gets 20 ones on its left: 1 1 1 0 0 becomes twenty 1, then 1 1 1 0 0. With a mask or
    without, a token of the text sees all 20 and the text up to itself. Pads, the tokens with 0 in the mask, are seen by
    no real token. With pads on the left, 0 0 1 1 1, position_ids 0 0 0 1 2 become 20 20 20 21 22; `generate` gives
    them. Without position_ids pads count, and this text starts at 22. The prefix has no queries, so attention puts out
    one vector per token of the text, and nothing is cut off.
    KV cache. Before the first call's tokens every block's cache is filled with the 20 keys and values; after them it
    holds 25. A later call with one token finds 25 in the cache and puts nothing in: the token gets position 25, a mask
    (batch, 6) becomes (batch, 26), and the cache then holds 26. In that call q is (batch, H, 1, D), [P_k; k] and
    [P_v; v] are (batch, H, 26, D), and the scores (batch, H, 1, 26). A call without a cache gets a temporary one: the
    blocks find the 20 there, and no later call reads it.
    Gradient checkpointing. A block is computed twice, the second time in the backward pass, until which the temporary
    cache stays. Both times it starts from the 20 keys and values alone: the 5 of the text are added to a copy, not to
    the cache itself.
Saved
    In adapter_model.safetensors:
    prompt_embeddings (20, 18432)
    base_model.score.weight (2, 768)
    The second is the new head; tagging has base_model.classifier.weight and .bias there, a language model nothing. The
    first is P, also with prefix_projection: E and the network are not kept. Row i is virtual token i. Its
    2 * 12 * 768 = 18,432 columns are, block after block, its key and then its value: 0 to 767 the key of block 0, 768
    to 1,535 the value of block 0, 1,536 to 2,303 the key of block 1. Within 768 the heads follow each other, 64 each.
    adapter_config.json must say peft_type PREFIX_TUNING, task_type and num_virtual_tokens. task_type is SEQ_CLS for
    this classifier, TOKEN_CLS for tagging and CAUSAL_LM for a language model. token_dim 768, num_layers 12,
    num_attention_heads 12 and num_transformer_submodules 1 are written for peft, Hugging Face's library. Each of these
    four that a file has must be the model's: "the adapter was made for another num_layers; this model's is 12".
    prefix_projection, encoder_hidden_size and init_weights stay in a loaded configuration. They say how P was made, and
    change nothing: loading builds what they say, and a table with the saved P takes its place.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too. Where several methods work under one name, each has a sub-folder with these three files, such
    as lora/ and bitfit/. A minipeft.json beside the sub-folders names them.
Merging
    Not possible: keys and values are a part of what attention reads, not a change of weights. They are put in before
    each text.
    `merge` is an InjectionError: "Prefix cannot be merged: it is not a change of weights".
    Off: within `disable_adapter`, and for good after `remove`, the model is the base model bit for bit: the text starts
    at position 0 again, all 1,024 are free, and the head is the one from before training. A KV cache keeps the prefix:
    start a new one.
    Several adapters. A second `inject` of the same method is an InjectionError. `load_adapter(model, folder, name)`
    adds a saved adapter, of this method or another, under another name. It becomes the active one, the one that
    computes. The others stay, switched off. The model is in eval mode then. `set_adapter(model, name)` makes another
    one active. Under one name other methods may work along, such as LoRA, but neither full nor head, nor a second one
    that puts something before the text.
Cost
    2 V L C parameters: 2 * 20 * 12 * 768 = 368,640. In all 2 * 20 * 12 * 768 + 1,536 = 370,176 trained, the head's
    2 * 768 = 1,536 among them. With prefix_projection V C + C h + h + 2 L C h + 2 L C and the head:
    20 * 768 + 768 * 768 + 768 + 18,432 * 768 + 18,432 + 1,536 = 14,781,696; once saved and loaded 370,176 again.
    Forward: not a token more. Each query has V attention scores more and adds V values more: 4 V C operations per token
    and block, 4 * 20 * 768 = 61,440, which is 0.4 % of what the block's four matrices (12 C^2 numbers) take,
    2 * 12 * 768 * 768 = 14,155,776. Attention is given a mask where the base needs none. The network, if there is one,
    runs once in each call that puts the prefix in, 2 V (C h + h 2 L C) operations:
    2 * 20 * (768 * 768 + 768 * 18,432) = 589,824,000, as many as the matrices of all blocks take for 3.5 tokens of
    text. A loaded adapter has no network. A KV cache holds 2 V L C numbers more per text, 4 * 368,640 = 1,474,560 bytes
    in float32.
    Backward: the gradient passes through all blocks down to the first one's attention. Of the three products that full
    fine-tuning takes per matrix (forward, the gradient of the matrix's input, the gradient of the matrix itself) the
    third is never computed for a frozen matrix. It alone needs the matrix's input, which is therefore not kept. Kept
    are, per block and token, the inputs of both LayerNorms, q, k, v, attention's output and gelu's input,
    (2 + 3 + 1 + 4) C numbers; in block 0 not ln_1's input, as nothing below it is trained. [P_k; k] and [P_v; v],
    copies, are kept as well: 2 C (V + seq) numbers per block and text. On a CPU in float32 each block also keeps a
    float32 copy of the mask, seq (V + seq) numbers, with pads on the left for each text; with attn_pdrop or in bfloat16
    all blocks share one mask, a byte per number. The text's own k and v stay in memory beside these copies: they and q
    are parts of one tensor, c_attn's output, and attention keeps q. The softmax's shares themselves are not kept:
    attention computes them again. In training the base's dropout adds 2 C bytes per block and token. For dropout on
    attention's shares (attn_pdrop) a CPU keeps its mask, a byte per share, in place of attention's output; a GPU's
    fused attention keeps no mask. The network keeps tanh's output, V h numbers per call; its own backward takes twice
    its forward, 2 * 589,824,000 = 1,179,648,000 operations.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 2,961,408 bytes; with prefix_projection
    8 * 14,781,696 = 118,253,568 bytes. Gradients take half of that. The optimizer's time, too, grows with the trained
    parameters alone. Weight decay acts on the head's matrix alone, with prefix_projection also on W_1 and W_2; never on
    P or E.
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
    checked.
    PrefixTuningConfig(init_weights="zeros")
        ConfigError: init_weights must be one of None, zero, got 'zeros'
    PrefixTuningConfig(num_virtual_tokens=0)
        ConfigError: num_virtual_tokens must be a positive integer, got 0
    inject(model, PrefixTuningConfig(num_virtual_tokens=1024))
        ConfigError: num_virtual_tokens=1024: this model has 1024 positions left, so between 1 and 1023 virtual tokens
        fit before a text
    inject(inject(model, PromptTuningConfig()), PrefixTuningConfig())
        InjectionError: this model already carries prompt, which does not combine with prefix: remove it, or start from
        a fresh model
Differs from the paper
    Li and Liang train the network, as they find the training of P alone unstable; peft's default, and this one, is P
    alone. With little data they start from the keys and values of real words; here P starts random or zero. They
    generate text and have no new head; a classifier's new head is trained along here.
    From peft it differs in gradient checkpointing, under which peft refuses a prefix, and in the default of
    num_virtual_tokens, which peft does not have.

Paper: Li, Liang (2021), "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods.injection import Plan, base_of
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.virtual_tokens import Table, VirtualTokens, VirtualTokensConfig, check_room, place_of
from minipeft.model.kv_cache import KVCache
from minipeft.model.linear import Linear, autocast_dtype
from minipeft.settings import POSITIVE_INTEGER, setting


@dataclass
class PrefixTuningConfig(VirtualTokensConfig):
    """peft's PrefixTuningConfig.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    method: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    num_virtual_tokens: int = setting(20, "V, keys and values before the text", POSITIVE_INTEGER)
    prefix_projection: bool = setting(False, "train a network that makes the prefix")
    encoder_hidden_size: int | None = setting(None, "h, its width; default n_embd", POSITIVE_INTEGER)
    init_weights: str | None = setting(None, "how the table starts: none: normal; zero; of a network W_2, b_2",
                                       choices=(None, "zero"))


class PrefixProjection(nn.Module):
    """E, the V trained embeddings, and the two layers that widen them to keys and values.

    Args:
        width: C.
        hidden: h.
        out: 2 L C.
    """

    def __init__(self, num_virtual_tokens: int, width: int, hidden: int, out: int, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_virtual_tokens, width, device=device)
        self.transform = nn.Sequential(Linear(width, hidden, device=device), nn.Tanh(),
                                       Linear(hidden, out, device=device))

    def forward(self) -> Tensor:
        return self.transform(self.embedding.weight)                          # (V, C) -> (V, h) -> (V, 2 L C)


class Prefix(VirtualTokens):
    """Keys and values that every block's attention finds in its cache before the first token.

    `encoder()` gives them as one table, P (V, 2 L C).
    """

    def __init__(self, encoder: nn.Module, num_virtual_tokens: int, n_layer: int, n_head: int) -> None:
        super().__init__(encoder, num_virtual_tokens)
        self.n_layer, self.n_head = n_layer, n_head

    def keys_and_values(self, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """P_k and P_v for every block, each (batch, H, V, D): the table, laid out as keys and values of tokens are."""
        # A row, one virtual token's, holds block after block its key and then its value, C columns each.
        table = self.encoder().to(dtype)                                                 # (V, 2 L C)
        table = table.view(self.num_virtual_tokens, self.n_layer, 2, self.n_head, -1)    # (V, L, 2, H, D)
        table = table.permute(1, 2, 3, 0, 4)                                             # (L, 2, H, V, D)
        table = table.unsqueeze(2).expand(-1, -1, batch, -1, -1, -1)                     # (L, 2, batch, H, V, D)
        return [(key, value) for key, value in table]                    # L pairs, each tensor (batch, H, V, D)

    def put_into(self, call: dict[str, Any], module: nn.Module) -> None:
        """Before each call of the base model, `module`: change its arguments, `call`; those not given are None there.

        The mask has its V ones already.
        """
        if call["position_ids"] is not None:
            call["position_ids"] = call["position_ids"] + self.num_virtual_tokens    # the same shape, V further on
        if call["cache"] is None:
            call["cache"] = KVCache(kept=False)  # for this call and its backward pass alone
        if call["cache"].length == 0:  # later calls find the prefix in the cache
            tokens = call["input_ids"] if call["inputs_embeds"] is None else call["inputs_embeds"]
            dtype = autocast_dtype(tokens) or module.wte.weight.dtype             # of the blocks' keys and values
            call["cache"].layers = self.keys_and_values(tokens.shape[0], dtype)


def plan(model: nn.Module, config: PrefixTuningConfig) -> Plan:
    """Put V learned keys and values before every text, in every block.

    Raises:
        ConfigError: as many virtual tokens as positions or more.
    """
    check_room(model, config.num_virtual_tokens)
    base, device = base_of(model).config, base_of(model).wte.weight.device
    shape = (config.num_virtual_tokens, 2 * base.n_layer * base.n_embd)
    if config.prefix_projection:
        hidden = config.encoder_hidden_size or base.n_embd
        encoder = PrefixProjection(config.num_virtual_tokens, base.n_embd, hidden, shape[1], device)
        if config.init_weights == "zero":
            for parameter in encoder.transform[-1].parameters():  # W_2 and b_2, as in peft: P is zeros then
                nn.init.zeros_(parameter)
    else:
        start = torch.zeros if config.init_weights == "zero" else torch.randn
        encoder = Table(start(shape, device=device))
    layer = Prefix(encoder, config.num_virtual_tokens, base.n_layer, base.n_head)
    return Plan({place_of(model, "prefix_tuning"): layer})


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for in one block. The mask is 0 where a query sees, else -infinity.

    It has all four dimensions here: of a tensor with three or more, a trace shows one token's row.
    """
    seq, V = seen.ids.shape[1], seen.layer.num_virtual_tokens
    q, k, v, o = (tensor.unflatten(2, (seen.layer.n_head, -1)).transpose(1, 2) for tensor in (     # (1, H, seq, D)
        *seen.outputs[f"{seen.block}.attn.c_attn"].chunk(3, dim=2), seen.inputs[f"{seen.block}.attn.c_proj"]))
    P_k, P_v = seen.layer.keys_and_values(1, q.dtype)[int(seen.block.rpartition(".")[2])]          # (1, H, V, D)
    mask = torch.full((1, 1, seq, V + seq), -torch.inf).triu(V + 1)
    return Symbols({"q": q, "k": k, "v": v, "P_k": P_k, "P_v": P_v, "D": q.shape[3], "mask": mask, "o": o})
