r"""P-tuning (v1): a prompt that a small network produces.

V learned vectors stand before every text, as in prompt tuning. Here they are not trained themselves. Trained are V
embeddings and a network, an MLP or an LSTM, that makes the V vectors from them. All V come out of the same network, so
a change of its weights moves all of them at once. After training only the vectors are kept.

    P = relu(relu(E W_1^T + b_1) W_2^T + b_2) W_3^T + b_3        MLP, the default
    x = [P; wte[ids]] + wpe[positions]      stacked along the sequence
    y = blocks(x)[V:]                       [V:] along the sequence: (batch, V + seq, C) -> (batch, seq, C)

                 E (V, C)      trained, starts standard normal
                 |
              encoder          3 linear layers with relu between (MLP), trained
                 |
                 P (V, C)      the same for every text
                 |
    position     0 ... 19      20     21     22     23     24         V = 20, a text of 5 tokens
    x            P_0 . P_19    The    film   was    very   good       each + wpe[position]
                 |     |       |      |      |      |      |
             the frozen blocks: each position sees itself and all to its left
                 |     |       |      |      |      |      |
    y            cut off ...   y_0    y_1    y_2    y_3    y_4        (batch, seq, C)

With encoder_reparameterization_type="LSTM" an LSTM, a recurrent network, reads E row by row, once forwards and once
backwards. Two linear layers follow: P = relu(lstm(E) W_1^T + b_1) W_2^T + b_2, where lstm(E) is (V, 2 h).

By hand, with V = 1, C = 2, h = 1: E = (1, 2), W_1 = (1, 1), b_1 = 1 give 1 + 2 + 1 = 4; W_2 = 2, b_2 = -1 give
2 * 4 - 1 = 7; W_3 = (1, -1)^T, b_3 = (0, 10) give P = (7, 3). relu changes nothing here. With E = (-3, 1) it does:
-3 + 1 + 1 = -1 becomes 0, then 2 * 0 - 1 = -1 becomes 0, and P = (0, 10). With P = (7, 3), wpe[0] = (0.1, 0),
wpe[1] = (0, 0.2) and a text of one token of embedding (3, 1), x = (7.1, 3), (3, 1.2); if the blocks changed nothing, y
would be the second vector, (3, 1.2).

Symbols
    E (V, C) is transformer.prompt_tuning.encoder.embedding.weight, not on disk
    h = encoder_hidden_size, the network's width, by default C
    W_1 (h, C), b_1 (h,), W_2 (h, h), b_2 (h,), W_3 (C, h), b_3 (C,) are weight and bias of encoder.mlp_head.0, .2 and
    .4. With the LSTM there are two linear layers, encoder.mlp_head.0 and .2: W_1 (2 h, 2 h), b_1 (2 h,), W_2 (C, 2 h),
    b_2 (C,). E, the W and the b are all trained, and so is the LSTM.
    lstm is encoder.lstm, PyTorch's nn.LSTM(C, h, encoder_num_layers, bidirectional=True). Each layer has for each
    direction weight_ih (4 h, C), above the first layer (4 h, 2 h), weight_hh (4 h, h), bias_ih (4 h,) and bias_hh
    (4 h,). Each direction goes from row to row with a state c (h,) and an output s (h,), both 0 at first. For a row e,
    the sum of weight_ih times e, bias_ih, weight_hh times s, and bias_hh is 4 h numbers: the first h of them are i, the
    next f, then g, then o. With sigmoid(a) = 1 / (1 + exp(-a)), c becomes sigmoid(f) c + sigmoid(i) tanh(g), and then s
    becomes sigmoid(o) tanh(c). Row i of the layer's output (V, 2 h) has both directions' s: in its first h columns that
    of the forward one, which has read rows 0 to i, in its last h that of the backward one, which has read rows V - 1
    down to i. Between two layers numbers are dropped with the probability encoder_dropout, in training. Where that is
    not 0 and the LSTM has one layer, nothing is dropped, and torch warns: "dropout option adds dropout after all but
    last recurrent layer, so non-zero dropout expects num_layers greater than 1".
    relu(x) = max(x, 0)       P (V, C) the prompt       V = num_virtual_tokens       C = n_embd, 768 in GPT-2 124M
    ids (batch, seq) the text's token ids       wte (vocabulary, C), wpe (n_positions, C) the frozen embeddings
    seq how many tokens the text has            [P; ...] (batch, V + seq, C): P before each text of the batch
    [V:] cuts the first V of the V + seq vectors of each text off; the batch stays whole
    positions 0 to V + seq - 1, (V + seq,); of a caller's position_ids (batch, V + seq), or (1, V + seq) for all texts
    x (batch, V + seq, C) what enters the blocks, in training after the base's own dropout
    blocks the base's L = n_layer blocks and ln_f, its last LayerNorm      y (batch, seq, C) what the head gets
Trained
    E and the network, in float32 whatever the base's dtype (P is brought to that of the text's embeddings before it is
    used); a new classification head, n C numbers for n labels, in tagging n C + n. A model that loads a saved adapter
    has P as a plain table: if it is trained further, then P itself is, as in prompt tuning.
Frozen
    Everything else, 124,439,808 numbers, wte first of all, the base's biases too: `inject`, which puts the method into
    a model, sets requires_grad to False, so no gradient is computed for it and the optimizer never sees it.
At step 0
    PromptEncoderConfig()                                          is not the base model: E and the network are random
    PromptEncoderConfig(encoder_reparameterization_type="LSTM")    is not the base model: for the same reason
    E starts standard normal. Matrix and bias of a linear layer with n inputs start uniform between -1 / sqrt(n) and
    1 / sqrt(n), all of the LSTM's tensors between -1 / sqrt(h) and 1 / sqrt(h).
    No setting starts as the base model: a text's tokens stand V positions later, and each spends a part of its
    attention on the prompt. An example: if all attention scores are equal, the text's first token sees 21 tokens and
    spends 20 of 21 shares of its attention on the prompt, and token number t spends V of V + t shares.
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
    Gradient checkpointing. The network runs before the first block, and only blocks are computed a second time.
    All of this is prompt.py's class Prompt; this file adds the network alone.
Saved
    In adapter_model.safetensors:
    prompt_embeddings (20, 768)
    base_model.score.weight (2, 768)
    The second is the new head; tagging has base_model.classifier.weight and .bias there, a language model nothing.
    P alone: E and the network are not kept, and P is made without dropout. adapter_config.json must say peft_type
    P_TUNING, task_type and num_virtual_tokens. task_type is SEQ_CLS for this classifier, TOKEN_CLS for tagging and
    CAUSAL_LM for a language model. token_dim 768, num_layers 12, num_attention_heads 12 and num_transformer_submodules
    1 are written for peft, Hugging Face's library. Each of these four that a file has must be the model's: "the adapter
    was made for another token_dim; this model's is 768".
    The encoder_* fields stay in a loaded configuration and change nothing: a table with P is in the network's place.
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
    V C + (C h + h) + (h^2 + h) + (h C + C) parameters: 20 * 768 + 3 * (768 * 768 + 768) = 1,787,136 by default.
    In all 1,787,136 + 1,536 = 1,788,672 trained, the head's 2 * 768 = 1,536 among them. Once saved and loaded,
    20 * 768 + 1,536 = 16,896. With the LSTM of two layers:
    layer 0     8 h (C + h + 2)               2 * (3072 * 768 + 3072 * 768 + 2 * 3072) = 9,449,472
    each more   8 h (3 h + 2)                 2 * (3072 * 1536 + 3072 * 768 + 2 * 3072) = 14,168,064
    W and b     4 h^2 + 2 h + 2 h C + C       (1536 * 1536 + 1536) + (768 * 1536 + 768) = 3,541,248
    N layers    8 h (C + h + 2) + (N - 1) 8 h (3 h + 2) + 4 h^2 + 2 h + 2 h C + C + V C, and the head
    in all      9,449,472 + 14,168,064 + 3,541,248 + 20 * 768 + 1,536 = 27,175,680, the head's among them
    Forward: V tokens more per text in every block. 256 tokens become 276: 8 % more in the matrices, and 16 % more
    attention scores, whose number grows by the square. 5 become 25: five times as much, and 25 times the scores. In the
    12 blocks' matrices, of 12 C^2 numbers each, a token takes 2 * 12 * 12 * 768 * 768 = 169,869,312 operations, the
    prompt 20 * 169,869,312 = 3,397,386,240. With a KV cache the V tokens are computed once per text, in its first call;
    later tokens still read their keys and values. The cache holds these 2 V L C numbers per text,
    4 * 2 * 20 * 12 * 768 = 1,474,560 bytes in float32. The network runs once in each call that puts the prompt in,
    whatever the number of texts, with 2 V operations per number in its matrices: 2 * 20 * 3 * 768 * 768 = 70,778,880
    for the MLP. The LSTM takes as many as the matrices of all blocks take for 6.4 tokens, 2 * 20 * (9,437,184 +
    14,155,776 + 3,538,944) = 1,085,276,160 in layer 0, layer 1 and W.
    Backward: the gradient passes through all blocks down to the input, and then through the network. Of the three
    products that full fine-tuning takes per matrix (forward, the gradient of the matrix's input, the gradient of the
    matrix itself) the third is never computed for a frozen matrix. It alone needs the matrix's input, which is
    therefore not kept. Kept are, per block and token, virtual or not, the inputs of both LayerNorms, q, k, v,
    attention's output and gelu's input, (2 + 3 + 1 + 4) C numbers. The softmax's shares themselves are not kept:
    attention computes them again. In training the base's dropout adds 2 C bytes per block and token. For dropout on
    attention's shares (attn_pdrop) a CPU keeps its mask, a byte per share, in place of attention's output; a GPU's
    fused attention keeps no mask. The MLP keeps both relus' outputs, 2 V h numbers per call; the LSTM its inputs, gates
    and states per row, layer and direction, and the one relu's output, 2 V h. The network's own backward takes twice
    its forward, with the MLP 2 * 70,778,880 = 141,557,760 operations.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 14,309,376 bytes; with the LSTM
    8 * 27,175,680 = 217,405,440 bytes. Gradients take half of that. The optimizer's time, too, grows with the trained
    parameters alone. Weight decay acts on the head's matrix and on W_1, W_2 and W_3; with the LSTM on W_1 and W_2, not
    on the LSTM itself; never on E, nor on the P of a loaded adapter.
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
    PromptEncoderConfig(encoder_reparameterization_type="GRU")
        ConfigError: encoder_reparameterization_type must be one of MLP, LSTM, got 'GRU'
    PromptEncoderConfig(num_virtual_tokens=0)
        ConfigError: num_virtual_tokens must be a positive integer, got 0
    inject(model, PromptEncoderConfig(num_virtual_tokens=1024))
        ConfigError: num_virtual_tokens=1024: this model has 1024 positions left, so between 1 and 1023 virtual tokens
        fit before a text
    inject(inject(model, PromptTuningConfig()), PromptEncoderConfig())
        InjectionError: this model already carries prompt, which does not combine with ptuning: remove it, or start from
        a fresh model
Differs from the paper
    Liu et al. place the vectors anywhere in a template, before, between and after the words, with single words of the
    task among them, and have the model fill in a word. Here, as in peft, all stand before the text, and a new head
    gives the label. They use the LSTM; peft's default, and this one, is the MLP. They report training the language
    model along with the prompt, too; here it is frozen.
    From peft it differs: a classifier takes the last real token, where peft takes the last position, pad or not; the
    virtual tokens' rows are cut off, where peft gives them out with a language model and in tagging; a caller's
    position_ids count, where peft drops them; P is saved without dropout, where peft saves it with encoder_dropout if
    the model is in training mode. And num_virtual_tokens need not be given.

Paper: Liu, Zheng, Du, Ding, Qian, Yang, Tang (2021), "GPT Understands, Too", arXiv 2103.10385.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods import prompt
from minipeft.methods.injection import Plan, base_of
from minipeft.methods.prompt import Prompt
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.turn import without_autocast
from minipeft.methods.virtual_tokens import VirtualTokensConfig, check_room, place_of
from minipeft.model.linear import Linear
from minipeft.settings import POSITIVE_INTEGER, PROBABILITY, setting


@dataclass
class PromptEncoderConfig(VirtualTokensConfig):
    """peft's PromptEncoderConfig. encoder_num_layers and encoder_dropout concern the LSTM; the MLP has neither.

    The dropout acts between two layers of the LSTM. With one layer there is no such place, and torch warns if it is not
    0.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    method: ClassVar[str] = "ptuning"
    peft_type: ClassVar[str] = "P_TUNING"

    num_virtual_tokens: int = setting(20, "V, tokens before the text", POSITIVE_INTEGER)
    encoder_reparameterization_type: str = setting("MLP", "network that makes the prompt", choices=("MLP", "LSTM"))
    encoder_hidden_size: int | None = setting(None, "h, its width; default n_embd", POSITIVE_INTEGER)
    encoder_num_layers: int = setting(2, "layers of the LSTM", POSITIVE_INTEGER)
    encoder_dropout: float = setting(0.0, "dropout between the LSTM's layers", PROBABILITY)


class PromptEncoder(nn.Module):
    """E, the V trained embeddings, and the network that turns them into P.

    Args:
        width: C.
        hidden: h.
    """

    def __init__(self, width: int, hidden: int, config: PromptEncoderConfig, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_virtual_tokens, width, device=device)
        self.lstm = None
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm = nn.LSTM(width, hidden, config.encoder_num_layers, dropout=config.encoder_dropout,
                                bidirectional=True, batch_first=True, device=device)
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
        layers = [layer for a, b in pairwise(sizes) for layer in (Linear(a, b, device=device), nn.ReLU())]
        self.mlp_head = nn.Sequential(*layers[:-1])  # no relu after the last

    def forward(self) -> Tensor:
        x = self.embedding.weight                                             # (V, C)
        if self.lstm is not None:
            x = self.both_ways(x)                                             # (V, 2 h)
        return self.mlp_head(x)                                               # (V, C)

    @without_autocast
    def both_ways(self, x: Tensor) -> Tensor:
        """The LSTM's outputs. Under autocast a GPU would compute it in float16, and some CPUs not at all."""
        return self.lstm(x[None])[0][0]                                       # (1, V, 2 h), a batch of one -> (V, 2 h)


def plan(model: nn.Module, config: PromptEncoderConfig) -> Plan:
    """Put V vectors, made by a trained network, before every text.

    Raises:
        ConfigError: as many virtual tokens as positions or more.
    """
    check_room(model, config.num_virtual_tokens)
    wte = base_of(model).wte.weight                                           # (vocab, C)
    hidden = config.encoder_hidden_size or wte.shape[1]
    encoder = PromptEncoder(wte.shape[1], hidden, config, wte.device)
    return Plan({place_of(model, "prompt_tuning"): Prompt(encoder, config.num_virtual_tokens)})


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for: the prompt's and, where there still is an MLP, what makes P."""
    found, encoder = prompt.symbols(seen), seen.layer.encoder
    if isinstance(encoder, PromptEncoder) and encoder.lstm is None:
        linears = [layer for layer in encoder.mlp_head if isinstance(layer, nn.Linear)]
        found.values |= {"E": encoder.embedding.weight} | {
            f"{key}_{number}": tensor for number, layer in enumerate(linears, start=1)
            for key, tensor in (("W", layer.weight), ("b", layer.bias))}
    return found
