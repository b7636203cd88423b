r"""Bottleneck adapters: small two-layer networks after or beside the sub-layers of each block.

A block has two sub-layers, attention and the feed-forward layer, and adds what each puts out to x, its residual stream.
An adapter narrows a vector of C channels to m, applies a nonlinearity, widens it again and adds the result. What a
task needs is learned in the bottleneck of m channels, while attention and feed-forward layers stay frozen.

    y = h + s * dropout(act(z W_down^T + b_down) W_up^T + b_up)

            z (batch, seq, C)       what the adapter reads
            |
        W_down (m, C), b_down       from C = 768 channels to m = 48; W_down starts random, b_down at 0
            |
           act                      relu by default
            |
        W_up (C, m), b_up           back to C channels; both start at 0: step 0 is the base model, exactly
            |  * s
            +------ h (batch, seq, C)      what the sub-layer puts out
            |
            y (batch, seq, C)       what the block adds to x instead of h

In a block x becomes x + attn(ln_1(x)), and this new x becomes x + mlp(ln_2(x)). Here attn is the attention, mlp the
feed-forward layer, ln_1 and ln_2 are the LayerNorms before them. `architecture` says which of the two get an adapter,
and what z is; `layers_to_transform` says in which blocks, by default in all:

    houlsby     after attention, h = z = attn(ln_1(x)), and after the feed-forward layer, h = z = mlp(ln_2(x))
    pfeiffer    after the feed-forward layer only, h = z = mlp(ln_2(x))
    parallel    beside the feed-forward layer, h = mlp(ln_2(x)) and z = ln_2(x), what went into it

By hand, with C = 2, m = 1, s = 2: h = z = (3, 1), W_down = (1, -1), b_down = 1 give 3 - 1 + 1 = 3, and relu keeps it.
W_up = (2, 3)^T, b_up = (0.5, -0.5) give (6.5, 8.5). So y = (3, 1) + 2 * (6.5, 8.5) = (16, 18). With h = z = (1, 3)
relu makes 0 of 1 - 3 + 1 = -1, and only b_up is left: y = (1, 3) + 2 * (0.5, -0.5) = (2, 2).

Symbols
    h (batch, seq, C) the sub-layer's output: c_proj's, in training after the sub-layer's own dropout
    z (batch, seq, C) the adapter's input, as above; with layer_norm=True z = LN(h), for parallel z = LN(ln_2(x)), where
    LN is a LayerNorm of the adapter's own                    y (batch, seq, C) what the sub-layer puts out in h's place
    W_down (m, C), b_down (m,) are down       W_up (C, m), b_up (C,) are up                all four trained
    m = bottleneck_size; where that is not given, C / reduction_factor, as Python's round rounds it: 2.5 to 2
    s = scaling, a number       C = n_embd, the channels
    act is non_linearity: relu(a) = max(a, 0), swish(a) = a / (1 + exp(-a)), none(a) = a, tanh, or the exact
    gelu(a) = a (1 + erf(a / sqrt(2))) / 2, which GPT-2's own gelu approximates
    dropout sets each number to 0 with the probability adapter_dropout, 0 by default, and divides the others by
    1 - adapter_dropout; in training only
    x (batch, seq, C) the residual stream: the block's input for ln_1, and for ln_2 that plus what attention added
Trained
    W_down, b_down, W_up and b_up of every adapter, in float32 whatever the base's dtype; with layer_norm=True LN's
    weight and bias, too; a new classification head, n C numbers for n labels, in tagging n C + n.
Frozen
    Everything else, 124,439,808 numbers, the base's own LayerNorms and biases among it: `inject`, which puts the method
    into a model, sets requires_grad to False, so no gradient is computed for it and the optimizer never sees it.
At step 0
    BottleneckConfig()                                            is the base model, bit for bit: W_up and b_up are 0
    BottleneckConfig(layer_norm=True)                             is the base model, bit for bit: for the same reason
    BottleneckConfig(architecture="parallel", scaling=4.0)        is the base model, bit for bit: for the same reason
    No setting changes that. On a half-precision base the new head is float32, and its logits equal the base's up to
    rounding. In training adapter_dropout draws random numbers, so that the base's own dropout drops other elements than
    without it. W_down starts uniform between -1 / sqrt(C) and 1 / sqrt(C), b_down at 0, and a LayerNorm with weight 1
    and bias 0. In the first step an adapter's gradient is 0 but for W_up and b_up: on its way further down it is
    multiplied by W_up, which is still zero. The new head has its gradient from the first step on.
    Both models, this one and the base, have the same new head here; it is random.
Positions and mask
    Untouched. An adapter changes each token's vector without a look at the others. It changes pads, too, but no real
    token sees a pad, on either side. A text may have all 1,024 positions.
    KV cache. As large as the base's. It holds adapted keys and values: when the adapter changes, begin a new one.
    Gradient checkpointing. An adapter is a part of its block and is computed again with it.
Saved
    In adapter_model.safetensors:
    base_model.model.transformer.h.0.attn.adapter.down.weight (48, 768)
    base_model.model.transformer.h.0.attn.adapter.down.bias (48,)
    base_model.model.transformer.h.0.attn.adapter.up.weight (768, 48)
    base_model.model.transformer.h.0.attn.adapter.up.bias (768,)
    base_model.model.transformer.h.0.mlp.adapter.down.weight (48, 768)
    base_model.model.transformer.h.0.mlp.adapter.down.bias (48,)
    base_model.model.transformer.h.0.mlp.adapter.up.weight (768, 48)
    base_model.model.transformer.h.0.mlp.adapter.up.bias (768,)
    base_model.model.score.weight (2, 768)
    and so for every adapted block. pfeiffer and parallel have `.mlp.adapter.` only. With layer_norm=True each adapter
    also has layer_norm.weight (768,) and layer_norm.bias (768,), such as
    base_model.model.transformer.h.0.mlp.adapter.layer_norm.weight. adapter_config.json must say peft_type
    MINIPEFT_BOTTLENECK, and each field that is not at its default. It need not say task_type: the head's name shows it.
    In a GPT2Model, the base alone, the names lack `transformer.` and there is no head. score is the new head; tagging
    has base_model.model.classifier.weight and .bias there, a language model nothing. Only this library reads the
    folder: peft, Hugging Face's library, has no such method.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too. Where several methods work under one name, each has a sub-folder with these three files, such
    as lora/ and bitfit/. A minipeft.json beside the sub-folders names them.
Merging
    Not possible: act stands between the two matrices, so no weight of the base can take in what is added. The adapters
    stay and are computed at each prediction. `merge` is refused with non_linearity none, too. There the adapter amounts
    to one matrix, W_up W_down, and a bias. Both, after a sub-layer and without LN, could be worked into c_proj, the
    sub-layer's last matrix; this library does not do that. A parallel one could not: its input is not c_proj's.
    Off: within `disable_adapter`, and for good after `remove`, the model is the base model, bit for bit, with the head
    from before training.
    Several adapters. A second `inject` of the same method is an InjectionError. `load_adapter(model, folder, name)`
    adds a saved adapter, of this method or another, under another name. It becomes the active one, the one that
    computes. The others stay, switched off. The model is in eval mode then. `set_adapter(model, name)` makes another
    one active. Under one name other methods may work along, such as a prompt, but neither full nor head, nor a second
    BottleneckConfig.
Cost
    2 C m + C + m parameters per adapter, 2 * 768 * 48 + 768 + 48 = 74,544; a LayerNorm has 2 C more. With A adapters
    that is A (2 C m + C + m), with LayerNorms A (2 C m + 3 C + m). Two adapters per block for houlsby,
    24 * 74,544 = 1,789,056, one for the others. In all 24 * 74,544 + 1,536 = 1,790,592 trained, the head's
    2 * 768 = 1,536 among them; with pfeiffer or parallel 12 * 74,544 + 1,536 = 896,064; houlsby with layer_norm
    24 * (74,544 + 1,536) + 1,536 = 1,827,456.
    Forward: 4 C m operations per token and adapter, 2 * 4 * 768 * 48 = 294,912 per block. That is 2.1 % of the
    2 * 12 * 768 * 768 = 14,155,776 of its four matrices; pfeiffer and parallel take half of it. The second of an
    adapter's two products waits for the first. A parallel adapter needs no h, but this code computes it after the
    sub-layer, too.
    Backward: from the loss down to the lowest adapter the gradient passes through the frozen matrices as in full
    fine-tuning. Of the three products that full fine-tuning takes per matrix (forward, the gradient of the matrix's
    input, the gradient of the matrix itself) the third is never computed for a frozen matrix. It alone needs the
    matrix's input, which is therefore not kept. Kept are, per token: in each adapter z and act's output, C + m numbers
    (gelu and swish m more, LN C more). In each block above that of the lowest adapter: the inputs of both LayerNorms,
    q, k, v, attention's output and gelu's input, (2 + 3 + 1 + 4) C. With houlsby also, in the lowest adapter's own
    block: ln_2's input and gelu's, (1 + 4) C. The softmax's shares themselves are not kept: attention computes them
    again. In training the base's dropout adds 2 C bytes per block and token. For dropout on attention's shares
    (attn_pdrop) a CPU keeps its mask, a byte per share, in place of attention's output; a GPU's fused attention keeps
    no mask. Adapter dropout adds C bytes per token and adapter. An adapter's own backward takes up to 8 C m operations
    per token, half of them for the gradients of its matrices.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 14,324,736 bytes; gradients take half of that. The
    optimizer's time, too, grows with the trained parameters alone. Weight decay acts on W_down, W_up and the head's
    matrix.
Errors
    In this list the class of each error stands before its message. Most wrong values are found when the configuration
    is made, the others by `inject`, before it changes anything. `load_adapter` raises an AdapterError, and leaves the
    model as it was, in these cases. A file is missing, damaged or not the one whose digest minipeft.json holds. A
    tensor is missing, unexpected, of another shape, of integers or not finite; the message names it. minipeft.json has
    another base model's fingerprint; a base of another dtype is not compared. The folder is for another task. The
    peft_type is unknown. A setting in adapter_config.json that would change the numbers, and that minipeft does not
    implement, is a ConfigError. An adapter's name that is taken (`load_adapter`) or unknown (`set_adapter`, `remove`)
    is an InjectionError. A text with more tokens than positions is a ConfigError when the model reads it; values of a
    caller's own position_ids are not checked. reduction_factor is compared with the width only where bottleneck_size is
    not given.
    BottleneckConfig(non_linearity="silu")
        ConfigError: non_linearity must be one of relu, gelu, swish, tanh, none, got 'silu'
    inject(model, BottleneckConfig(layers_to_transform=[12]))
        ConfigError: layers_to_transform=[12]: this model has the blocks 0 to 11
    inject(model, BottleneckConfig(reduction_factor=1000))
        ConfigError: reduction_factor must lie between 0 and the model's width 768, got 1000
    inject(inject(model, BottleneckConfig()), BottleneckConfig())
        InjectionError: this model already carries adapter, which does not combine with adapter: remove it, or start
        from a fresh model
    merge(inject(model, BottleneckConfig()))
        InjectionError: BottleneckAdapter cannot be merged: it is not a change of weights
Differs from the paper
    Houlsby et al. adapt BERT, whose LayerNorms follow the sub-layers, and train these LayerNorms, too; GPT-2's come
    before the sub-layers and stay frozen here. Their W_up starts near zero, here at zero. The adapter of Pfeiffer et
    al. reads what BERT's LayerNorm makes of the sum of the feed-forward layer's input and output; here it reads that
    layer's output alone, before the sum. He et al. set s = 4 for parallel, here s is 1 unless `scaling` says otherwise.
    Pfeiffer et al. go on to combine the adapters of several tasks by a trained attention, AdapterFusion, which is not
    in this file.

Papers: Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly (2019), "Parameter-Efficient
Transfer Learning for NLP", arXiv 1902.00751. Pfeiffer, Kamath, Rueckle, Cho, Gurevych (2020), "AdapterFusion:
Non-Destructive Task Composition for Transfer Learning", 2005.00247. He, Zhou, Ma, Berg-Kirkpatrick, Neubig (2021),
"Towards a Unified View of Parameter-Efficient Transfer Learning", 2110.04366.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan, base_of
from minipeft.methods.layers import AddedLayer, to_dtype_of
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.targets import base_modules, chosen_blocks
from minipeft.model.dropout import Dropout
from minipeft.model.linear import Linear
from minipeft.settings import FINITE, POSITIVE, POSITIVE_INTEGER, PROBABILITY, setting

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "swish": nn.SiLU, "tanh": nn.Tanh, "none": nn.Identity}
PLACES = {"houlsby": ("attn", "mlp"), "pfeiffer": ("mlp",), "parallel": ("mlp",)}


@dataclass
class BottleneckConfig(MethodConfig):
    """Shape and place of the adapters. peft has no such method: the files are this library's own.

    The command line starts from reduction_factor 8, which suits the bundled base: see runs/defaults.py.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    method: ClassVar[str] = "adapter"
    peft_type: ClassVar[str] = "MINIPEFT_BOTTLENECK"

    architecture: str = setting("houlsby", "where adapters stand", choices=tuple(PLACES))
    bottleneck_size: int | None = setting(
        None, "inner dimensions m; default n_embd / reduction_factor", POSITIVE_INTEGER)
    reduction_factor: float = setting(16, "n_embd / m, where m is not given", POSITIVE)
    non_linearity: str = setting("relu", "inner activation", choices=tuple(ACTIVATIONS))
    scaling: float = setting(1.0, "s, the factor on what the adapter adds", FINITE)
    layer_norm: bool = setting(False, "normalize the adapter's input")
    adapter_dropout: float = setting(0.0, "dropout on what the adapter adds", PROBABILITY)
    layers_to_transform: int | list[int] | None = setting(None, "numbers of the blocks to adapt; default all")


class BottleneckAdapter(AddedLayer):
    """One adapter, a child of the attention or feed-forward module whose output it changes.

    Args:
        width: C.
        bottleneck_size: m.
        like: a tensor on the device where the adapter's own shall be.
    """

    def __init__(self, width: int, bottleneck_size: int, config: BottleneckConfig, like: Tensor) -> None:
        super().__init__()
        self.parallel = config.architecture == "parallel"
        self.scaling = config.scaling
        self.activation = ACTIVATIONS[config.non_linearity]()
        self.layer_norm = nn.LayerNorm(width, device=like.device) if config.layer_norm else nn.Identity()
        self.down = Linear(width, bottleneck_size, device=like.device)
        self.up = Linear(bottleneck_size, width, device=like.device)
        self.dropout = Dropout(config.adapter_dropout)
        # U(-1 / sqrt(C), 1 / sqrt(C)). nn.Linear has drawn that already; all recorded results are of this second draw.
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of what is trained and saved: all of it."""
        return tuple(name for name, _ in self.named_parameters())

    def forward(self, z: Tensor) -> Tensor:
        """What is added to h, from z."""
        z = self.layer_norm(to_dtype_of(self.down.weight, z))                 # (batch, seq, C), float32 as the weights
        inner = self.activation(self.down(z))                                 # (batch, seq, C) -> (batch, seq, m)
        return self.scaling * self.dropout(self.up(inner))                    # (batch, seq, m) -> (batch, seq, C)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """After each call of the sub-layer, `module`: y, its output h with what the adapter adds."""
        z = args[0] if self.parallel else output                              # (batch, seq, C)
        return (output + self(z)).to(output.dtype)                            # in the base's dtype again


def plan(model: nn.Module, config: BottleneckConfig) -> Plan:
    """Add a bottleneck adapter to the chosen sub-layers of each chosen block.

    Raises:
        ConfigError: a block that the model does not have, or a reduction factor beyond its width.
    """
    base, size = base_of(model), config.bottleneck_size
    if size is None:
        if config.reduction_factor > base.config.n_embd:
            raise ConfigError(f"reduction_factor must lie between 0 and the model's width {base.config.n_embd}, got "
                              f"{config.reduction_factor}")
        size = round(base.config.n_embd / config.reduction_factor)
    prefix = "transformer." if base is not model else ""
    layers = {}
    for number in chosen_blocks(list(base_modules(model)), config.layers_to_transform):
        for place in PLACES[config.architecture]:
            layers[f"{prefix}h.{number}.{place}.adapter"] = BottleneckAdapter(base.config.n_embd, size, config,
                                                                              like=base.wte.weight)
    return Plan(layers)


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for at one adapter. h is what the sub-layer's last matrix puts out."""
    layer, sublayer = seen.layer, seen.place.rpartition(".")[0]
    return Symbols({"z": layer.layer_norm(seen.x), "h": seen.outputs[f"{sublayer}.c_proj"], "s": layer.scaling,
                    "W_down": layer.down.weight, "b_down": layer.down.bias, "act": layer.activation,
                    "W_up": layer.up.weight, "b_up": layer.up.bias, "dropout": layer.dropout,
                    "y": seen.outputs[sublayer]})
