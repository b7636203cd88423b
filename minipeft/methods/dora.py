r"""DoRA: weight-decomposed low-rank adaptation.

LoRA, with the length of each row of the weight matrix trained apart from its direction: the low-rank update turns the
rows, and a magnitude vector says how long each of them is. In full fine-tuning a row often changes much in length and
little in direction, or the other way round. With LoRA alone both tend to change much, or both little.

    y = c * (x W^T + s * x A^T B^T) + bias
    c = m / ||W + s B A||

                x (batch, seq, in)
                |         \
         W (out, in)     A (r, in)         W is frozen
          frozen            |              by default A starts random, B at zero, m at ||W||:
                |        B (out, r)        step 0 is the base model, exactly
                |         /  * s
                +--------+
                |  * c (out,)              the norm in c counts as a constant; m gets a gradient
                |  + bias
                |
                y (batch, seq, out)

By hand: r = 1, s = 1, m = [5, 2], W = [[3, 4], [0, 2]], bias = [0, 1], A = [[1, 0]], B = [[-3], [0]], x = [1, 1] give
W + s B A = [[0, 4], [0, 2]], ||W + s B A|| = [4, 2], c = [1.25, 1], x W^T = [7, 2], x A^T B^T = [-3, 0], y = [5, 3].

Symbols
    x (batch, seq, in) the layer's input      y (batch, seq, out) its output      lora_alpha a number
    r the rank, at most the smaller of in and out      W (out, in) frozen; bias (out,) frozen, too, by default
    A (r, in) is lora_A.weight, B (out, r) is lora_B.weight, both trained
    m (out,) is lora_magnitude_vector, trained: how long each row of the adapted matrix is
    s = lora_alpha / r, a number; with use_rslora (rsLoRA) s = lora_alpha / sqrt(r)
    ||W + s B A|| (out,) the Euclidean length of each row      c (out,) stretches each row to the length that m says
    A row of zeros, or one shorter than float32's smallest normal number, has no direction to be stretched in: it stays
    as it is. c is 1 there, and m's gradient 0.
    With lora_dropout, in training only: y = x W^T + bias + (c - 1) * z W^T + c * s * z A^T B^T. Dropout acts on what
    DoRA adds, not on the base's own x W^T. z = dropout(x) (batch, seq, in): each number of x is set to 0 with
    probability lora_dropout, else divided by 1 - lora_dropout.
Trained
    A, B and m of each target, a linear layer that is adapted; a new classification head. By default the targets are all
    modules called c_attn. With `bias` "lora_only" the targets' biases too, with "all" every bias of the base, those of
    LayerNorms included.
Frozen
    Everything else: `inject`, which puts the method into a model, sets requires_grad to False. By default these are
    124,439,808 numbers, with `bias` "lora_only" 27,648 fewer, with "all" 102,144 fewer. The norm is computed in every
    forward pass, as A and B move, but without a gradient (section 4.3 of the paper).
At step 0
    DoraConfig()                                is the base model, bit for bit: B = 0 and m = ||W||, so c = 1; A is
                                                  uniform between -1 / sqrt(in) and 1 / sqrt(in)
    DoraConfig(init_lora_weights="gaussian")    is the base model, bit for bit: B = 0; A is normal, of deviation 1 / r
    DoraConfig(init_lora_weights="pissa")       is the base model, up to rounding: m = ||W||; PiSSA puts W's r largest
                                                  singular values into s B A, and W - s B A in W's place
    DoraConfig(init_lora_weights=False)         is not the base model: A is as by default, B uniform between
                                                  -1 / sqrt(r) and 1 / sqrt(r), and m = ||W + s B A||
    Both models, this one and the base, have the same new head here; it is random. While B = 0, A's gradient is 0 too:
    the first step learns B, m, the new head and trained biases, not A. With lora_alpha=0, and so s = 0, A's and B's
    gradients stay 0. With PiSSA, lora_dropout drops a part of s B A: then training does not start as the base model. On
    a half-precision base the new head is float32, and its logits equal the base's up to rounding.
Positions and mask
    Untouched. Each token is updated by itself; a text may have all 1,024 positions, as before; one with more is a
    ConfigError.
    KV cache. As large as the base's. It holds adapted keys and values: when the adapter changes, begin a new one.
    Pads. They are changed, too, but no real token sees a pad, on either side.
    Gradient checkpointing. All of this is a part of its block and is computed again with it.
Saved
    In adapter_model.safetensors:
    base_model.model.transformer.h.0.attn.c_attn.lora_A.weight (8, 768)
    base_model.model.transformer.h.0.attn.c_attn.lora_B.weight (2304, 8)
    base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector (2304,)
    base_model.model.score.weight (2, 768)
    and so A, B and m for every target. score.weight is (labels, 768); all totals here are for 2 labels. Tagging has
    classifier.weight (labels, 768) and classifier.bias (labels,) in its place, a language model nothing.
    adapter_config.json must say peft_type LORA, use_dora true and, where they are not the default, r, lora_alpha,
    target_modules, use_rslora, rank_pattern and alpha_pattern. `save_adapter` writes every setting; patterns and
    "all-linear" become full names of modules. For peft, Hugging Face's library, it adds lora_bias false and
    fan_in_fan_out true, as transformers stores GPT-2's matrices as (in, out). LoraConfig(use_dora=True) is the same
    method.
    With `bias` "lora_only" also the bias of every target, with "all" every bias of the base. In block 0, and last:
        base_model.model.transformer.h.0.attn.c_attn.base_layer.bias (2304,)
        base_model.model.transformer.h.0.ln_1.bias (768,)
        base_model.model.transformer.h.0.attn.c_proj.bias (768,)
        base_model.model.transformer.h.0.ln_2.bias (768,)
        base_model.model.transformer.h.0.mlp.c_fc.bias (3072,)
        base_model.model.transformer.h.0.mlp.c_proj.bias (768,)
        base_model.model.transformer.ln_f.bias (768,)
    Only the bias of a target has `base_layer` in its name. adapter_config.json must then say `bias`.
    With PiSSA it must say init_lora_weights pissa. The tensors are the trained A, B and m, not the frozen W - s B A of
    the start. Loading computes that again from the base's own W, then puts the saved A, B and m in. On another machine
    it agrees up to rounding.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too. Where several methods work under one name, each has a sub-folder with these three files, such
    as lora/ and bitfit/. A minipeft.json beside the sub-folders names them.
Merging
    W <- c * (W + s B A), row by row; the bias stays. Every target can be merged; dropout is not part of W. `merge`
    keeps the W it found, and `unmerge` puts it back, bit for bit. With PiSSA this is W - s B A of the start; `remove`
    and `disable_adapter` bring back the base's own W. Merged and unmerged outputs agree up to rounding. On a
    half-precision base A, B and m are float32; the product is rounded once, to W's type. Unmerged, x W^T + bias is
    rounded, and y again at the end.
    Order. `merge` folds in the active adapter. While it is merged, a second `merge`, `inject`, `load_adapter`,
    `set_adapter` and `disable_adapter` are an InjectionError, and `save_adapter` is an AdapterError; `remove` unmerges
    first. When nothing is merged, `unmerge` is an InjectionError.
    Several adapters. A second `inject` of the same method is an InjectionError. `load_adapter(model, folder, name)`
    adds a saved adapter, of this method or another, under another name. It becomes the active one, the one that
    computes. The others stay, switched off. The model is in eval mode then. `set_adapter(model, name)` makes another
    one active. Under one name other methods may work along that have other targets or none, such as BitFit or a prompt,
    but neither full nor head. Beside a bottleneck adapter, a prompt or a prefix `merge` is refused, and nothing is
    merged. Beside BitFit it merges, and the trained biases stay.
Cost
    r (in + out) + out parameters per target: 8 * (768 + 2304) + 2304 = 26,880 for a c_attn of GPT-2.
    In all 12 * 26,880 + 1,536 = 324,096 trained, with a new head's 2 * 768 = 1,536; a language model has no new head.
    DoraConfig(bias="lora_only")               trains 351,744: 12 * 2304 = 27,648 more
    DoraConfig(bias="all")                     trains 426,240: 12 * 8,448 + 768 = 102,144 more
    DoraConfig(target_modules="all-linear")    trains 1,264,128: c_attn, attn.c_proj, c_fc and mlp.c_proj of each block
                                                 have LoRA's 98,304 and 2304 + 768 + 3072 + 768 = 6,912 in m
    Forward: 2 r (in + out) operations per token and target, and for the norm the whole product B A once per forward
    pass: 2 r in out operations, as many as W takes for r tokens. Until the norm is there, s B A and W + s B A are in
    memory, both (out, in) in float32, on a half-precision base with a float32 copy of W. A model that writes text with
    a KV cache pays this for every token; merged, it pays nothing, but the kept W takes 4 * 1,769,472 = 7,077,888 bytes
    more per c_attn in float32. With lora_dropout, training multiplies by W twice: x W^T and z W^T.
    Backward: full fine-tuning computes the gradients of x and of W, 2 in out operations each; here the second is never
    computed. A and B take 4 r (in + out) per token and target: half for the gradient of x, half for their own. With
    lora_dropout the gradient of x passes through W twice. Kept, where without dropout z = x: z (batch, seq, in) and s z
    A^T (batch, seq, r); for m's gradient z W^T and s z A^T B^T, both (batch, seq, out); with dropout its mask, a byte
    per number of x. On a half-precision base z is a float32 copy, and with lora_dropout one of W is kept, too, for z's
    gradient. In all a block above the lowest keeps 17 C + r numbers per token, C = 768 channels: these, and 10 C of the
    block itself (the inputs of both LayerNorms 2 C, q, k, v 3 C, attention's output C, gelu's input 4 C). That is more
    than full fine-tuning's 16 C: DoRA saves gradients and AdamW's means. Optimizer: 8 bytes per trained parameter for
    AdamW's two means, 2,592,768 bytes; gradients take half of that. The optimizer's time, too, grows with the trained
    parameters alone. Weight decay acts on A, B and the head's matrix, not on m and biases.
Errors
    In this list the class of each error stands before its message. Most wrong values are found when the configuration
    is made, the others by `inject`, before it changes anything. `load_adapter` raises an AdapterError, and leaves the
    model as it was, in these cases. A file is missing, damaged or not the one whose digest minipeft.json holds. A
    tensor is missing, unexpected, of another shape, of integers or not finite; the message names it. minipeft.json has
    another base model's fingerprint; a base of another dtype is not compared. The folder is for another task. The
    peft_type is unknown. A setting in adapter_config.json that would change the numbers, and that minipeft does not
    implement, is a ConfigError. An adapter's name that is taken (`load_adapter`) or unknown (`set_adapter`, `remove`)
    is an InjectionError. A bad regular expression in a setting is a ConfigError when `inject` uses it.
    DoraConfig(r=0)
        ConfigError: r must be a positive integer, got 0
    DoraConfig(lora_dropout=1.0)
        ConfigError: lora_dropout must be a probability in [0, 1), got 1.0
    inject(model, DoraConfig(r=1024))
        ConfigError: r=1024 is larger than transformer.h.0.attn.c_attn's smaller side, 768
    inject(model, DoraConfig(target_modules=["wte"]))
        InjectionError: target transformer.wte is of class Embedding; only linear layers can be targeted: attn.c_attn,
        attn.c_proj, mlp.c_fc, mlp.c_proj
    inject(inject(model, LoraConfig()), DoraConfig())
        InjectionError: transformer.h.0.attn.c_attn already carries a LoRALinear: remove it first
Differs from the paper
    The paper writes the length of each column of W; here, as in peft, it is that of each row of W (out, in), one per
    output. By default only c_attn is adapted; the paper adapts the feed-forward matrices too. rsLoRA and PiSSA together
    with DoRA are peft's. With LoRA+ the learning rate of B is `loraplus_lr_ratio` times A's, here m's too, as in peft.
    From peft it differs as LoRA does, and in a row of zeros, where peft's division by 0 gives NaN.

Papers: Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen (2024), "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv
2402.09353. What it builds on is in lora.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods import lora
from minipeft.methods.injection import Plan
from minipeft.methods.layers import ReplacementLayer, to_dtype_of
from minipeft.methods.lora import LoraConfig, low_rank_pair
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.turn import without_autocast
from minipeft.model.dropout import Dropout
from minipeft.settings import setting


@dataclass
class DoraConfig(LoraConfig):
    """LoRA's settings, from r and lora_alpha to `bias`: DoRA has no other. LoraConfig(use_dora=True) means the same.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    use_dora: bool = setting(True, init=False)


class DoRALinear(ReplacementLayer):
    """A frozen linear layer whose rows are turned by a low-rank update and stretched by a magnitude vector."""

    trained = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    raised_rate = ("lora_B.weight", "lora_magnitude_vector")  # what LoRA+ trains at a higher learning rate

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, config: LoraConfig) -> None:
        super().__init__(base_layer)
        self.lora_dropout = Dropout(config.lora_dropout)
        self.scaling = config.scaling(r, lora_alpha)
        self.lora_A, self.lora_B = low_rank_pair(base_layer, r, config.init_lora_weights)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())           # (out,)

    @torch.no_grad()
    @without_autocast
    def row_norms(self) -> Tensor:
        """||W + s B A||, the length of each row, (out,): a constant to the backward pass, at least in float32."""
        exact = torch.promote_types(self.lora_B.weight.dtype, torch.float32)
        update = self.scaling * self.lora_B.weight.to(exact) @ self.lora_A.weight.to(exact)   # (out, r) (r, in)
        return (self.base_layer.weight.to(exact) + update).norm(dim=1)                        # (out, in) -> (out,)

    def stretch(self) -> Tensor:
        """m / ||W + s B A||, (out,), the factor on each row; 1 where a row is zero, so that it stays the zero row."""
        norms = self.row_norms()                                              # (out,)
        zero = norms < torch.finfo(norms.dtype).tiny
        return torch.where(zero, 1.0, self.lora_magnitude_vector / norms.masked_fill(zero, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)                                                # (batch, seq, in) -> (batch, seq, out)
        stretch = self.stretch()                                              # (out,)
        dropped = self.lora_dropout(to_dtype_of(self.lora_A.weight, x))       # z: float32 beside a half-precision W
        update = self.lora_B(self.lora_A(dropped) * self.scaling)             # -> (batch, seq, r) -> (batch, seq, out)
        # The stretch concerns x W^T without the bias; dropout, where it acts, leaves the base's own y alone.
        if self.lora_dropout.training and self.lora_dropout.p > 0:
            product = nn.functional.linear(dropped, self.base_layer.weight.to(dropped.dtype))     # (batch, seq, out)
        else:
            product = y if self.base_layer.bias is None else y - self.base_layer.bias
        return (y + (stretch - 1) * product + stretch * update).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        """m (W + s B A) / ||W + s B A||."""
        update = self.scaling * self.lora_B.weight @ self.lora_A.weight       # (out, in)
        stretch = self.stretch()[:, None]                                     # (out, 1)
        return {"weight": (stretch * (self.base_layer.weight + update)).to(self.base_layer.weight.dtype)}


def plan(model: nn.Module, config: LoraConfig) -> Plan:
    """Give every targeted linear layer a low-rank companion and a magnitude vector.

    Raises:
        ConfigError: an r larger than the smaller side of a target, PiSSA with a scale of 0 or less, or a block that the
            model does not have.
        InjectionError: nothing targeted, or a target that cannot be adapted.
    """
    return lora.plan(model, config, DoRALinear)


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for at one target: LoRA's, and m and c."""
    layer, found = seen.layer, lora.symbols(seen)
    stretch = layer.stretch()                                                 # (out,)
    found.values |= {"m": layer.lora_magnitude_vector, "c": stretch}
    found.merging = {"c": stretch[:, None]}                                   # (out, 1): row by row
    return found
