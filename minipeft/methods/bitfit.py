"""BitFit: of the base, the bias terms alone are trained.

The weight matrices and the embeddings stay as they are; the bias vectors of linear layers and LayerNorms are trained.
The variant "layer_norm" trains the LayerNorms' gains and offsets instead. No layer is added or replaced.

    y = x W^T + b                                     linear layers
    y = g * (x - mean(x)) / sqrt(var(x) + eps) + b    LayerNorms

                x (batch, seq, in)
                |
         W (out, in)  frozen          in a LayerNorm: g (width,), frozen too, except with train="layer_norm"
                |
                |  + b (out,)         trained; with train="layer_norm" in LayerNorms alone
                |
                y (batch, seq, out)   b starts where pretraining left it: step 0 is the base model, exactly

By hand: W = [[1, 2], [3, 4]], b = [0, 1], x = [1, 1] give
x W^T = [3, 7], y = [3, 8].

Symbols
    x (batch, seq, in) the layer's input      y (batch, seq, out) its output      W (out, in) frozen
    b (out,) the layer's own `bias`, trained; with train="layer_norm" a linear layer's is frozen
    g (width,) a LayerNorm's own `weight`     mean(x), var(x) (batch, seq, 1), over the width     eps = 1e-5
    var(x) is the mean of (x - mean(x))^2: the sum is divided by the number of channels, width, not by width - 1
    sqrt the square root; in a LayerNorm in = out = width, 768 for GPT-2
Trained
    b of every linear layer and LayerNorm of the base; a new classification head. With train="layer_norm" instead g and
    b of the LayerNorms. Embeddings have no bias. On a half-precision base what is trained is float32.
Frozen
    Everything else, W first of all, 124,337,664 numbers: `inject`, which puts the method into a model, sets
    requires_grad to False. With train="layer_norm" 124,439,808 - 38,400 = 124,401,408 numbers.
At step 0
    BitFitConfig()                      is the base model, bit for bit: nothing is added, and nothing has moved yet
    BitFitConfig(train="layer_norm")    is the base model, bit for bit: for the same reason
    Both models, this one and the base, have the same new head here; it is random. On a half-precision base, where what
    is trained is float32, the logits are equal up to rounding.
Positions and mask
    Untouched. The same b is added to every token; a text may have all 1,024 positions, as before; one with more is a
    ConfigError.
    KV cache. As large as the base's. It holds adapted keys and values: when the adapter changes, begin a new one.
    Pads. They are changed, too, but no real token sees a pad, on either side.
    Gradient checkpointing. All of this is a part of its block and is computed again with it.
Saved
    In adapter_model.safetensors:
    base_model.model.transformer.h.0.ln_1.bias (768,)
    base_model.model.transformer.h.0.attn.c_attn.bias (2304,)
    base_model.model.transformer.h.0.attn.c_proj.bias (768,)
    base_model.model.transformer.h.0.ln_2.bias (768,)
    base_model.model.transformer.h.0.mlp.c_fc.bias (3072,)
    base_model.model.transformer.h.0.mlp.c_proj.bias (768,)
    base_model.model.transformer.ln_f.bias (768,)
    base_model.model.score.weight (2, 768)
    and so for every block: the trained vectors themselves, not what was added to the base's. With train="layer_norm"
    it is the head and, of ln_1, ln_2 and ln_f, weight (768,), which is g, and bias (768,). In place of
    score tagging has classifier.weight and classifier.bias, a language model nothing. adapter_config.json must say
    peft_type MINIPEFT_BITFIT and, where it is not bias, train. peft has no such method and cannot read the folder.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too. Where several methods work under one name, each has a sub-folder with these three files, such
    as lora/ and bitfit/. A minipeft.json beside the sub-folders names them.
Merging
    Not possible, and not needed: no layer is added, and the trained model costs at inference what the base does.
    What is trained is a copy, one per adapter. The base's own vectors are kept, and `disable_adapter` and `remove` put
    them back.
    Several adapters. A second `inject` of the same method is an InjectionError. `load_adapter(model, folder, name)`
    adds a saved adapter, of this method or another, under another name. It becomes the active one, the one that
    computes. The others stay, switched off. The model is in eval mode then. `set_adapter(model, name)` makes another
    one active. Under one name other methods may work along, such as LoRA, but neither full nor head. Beside LoRA, DoRA,
    VeRA or (IA)^3 `merge` folds in that method's layers, and the trained biases stay.
Cost
    Per block of GPT-2 768 + 2304 + 768 + 768 + 3072 + 768 = 8,448, and 768 of ln_f: 12 * 8,448 + 768 = 102,144. That is
    all in a language model. A new head has labels * 768 numbers, here 2 * 768 = 1,536, in tagging 2 * 768 + 2 = 1,538.
    With the head 102,144 + 1,536 = 103,680 trained. With train="layer_norm" (12 * 2 + 1) * 2 * 768 = 38,400, with the
    head 38,400 + 1,536 = 39,936.
    Forward: not one operation more. Backward: every linear layer's input in the base gets its gradient through the
    frozen W, 2 in out operations per token; W's own gradient, as many again, is never computed. The input of block 0's
    ln_1 needs no gradient. b's gradient is the sum of y's gradient over batch and seq. It needs no x, so a linear layer
    keeps nothing for the backward pass. LayerNorms, gelu and attention keep what the gradients of their own inputs
    need: 10 C numbers per token in a block above the lowest, full fine-tuning 16 C (C = 768 channels). Under autocast
    the cast copy of each float32 W is kept, too. With train="layer_norm" no more is kept: g's gradient needs the same.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 829,440 bytes, with train="layer_norm" 319,488;
    gradients take half of that. The base's own values of all that is trained, the head's included, are kept aside: 4 *
    103,680 = 414,720 bytes in float32, or 4 * 39,936 = 159,744. The optimizer's time, too, grows with the trained
    parameters alone. Weight decay acts on the head's matrix alone.
Errors
    In this list the class of each error stands before its message. Most wrong values are found when the configuration
    is made, the others by `inject`, before it changes anything. `load_adapter` raises an AdapterError, and leaves the
    model as it was, in these cases. A file is missing, damaged or not the one whose digest minipeft.json holds. A
    tensor is missing, unexpected, of another shape, of integers or not finite; the message names it. minipeft.json has
    another base model's fingerprint; a base of another dtype is not compared. The folder is for another task. The
    peft_type is unknown. A setting in adapter_config.json that would change the numbers, and that minipeft does not
    implement, is a ConfigError. An adapter's name that is taken (`load_adapter`) or unknown (`set_adapter`, `remove`)
    is an InjectionError.
    BitFitConfig(train="all")
        ConfigError: train must be one of bias, layer_norm, got 'all'
    inject(inject(model, BitFitConfig()), BitFitConfig(train="layer_norm"))
        InjectionError: this model already carries bitfit, which does not combine with bitfit: remove it, or start from
        a fresh model
    merge(inject(model, BitFitConfig()))
        InjectionError: there is nothing to merge: bitfit trains the model's own tensors
Differs from the paper
    The paper fine-tunes BERT, whose query, key and value have a bias each; in GPT-2 the three are one vector, that of
    c_attn. The paper also tries to train two biases per block only, the query's and that of the feed-forward layer's
    first matrix. Here all biases are trained. The variant "layer_norm" is from the second paper.

Papers: Ben Zaken, Ravfogel, Goldberg (2021), "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", arXiv 2106.10199. Qi, Ruan, Zuo, Li (2022), "Parameter-Efficient Tuning on Layer
Normalization for Pre-trained Language Models", 2211.08682, for the variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn as nn

from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.targets import base_modules, bias_names
from minipeft.settings import setting


@dataclass
class BitFitConfig(MethodConfig):
    """Which of the vectors to train. Its adapter files are this library's own: peft has no such method.

    Raises:
        ConfigError: an unknown choice.
    """

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "MINIPEFT_BITFIT"

    train: str = setting("bias", "what to train", choices=("bias", "layer_norm"))


def plan(model: nn.Module, config: BitFitConfig) -> Plan:
    """Train the base model's bias vectors, or its LayerNorms; no layer is replaced."""
    if config.train == "bias":
        return Plan(trained=bias_names(model))
    layer_norms = [name for name, module in base_modules(model).items() if isinstance(module, nn.LayerNorm)]
    return Plan(trained=[f"{name}.{tensor}" for name in layer_norms for tensor in ("weight", "bias")])


def symbols(seen: Seen) -> Symbols:
    """What the symbols stand for in one linear layer or LayerNorm: `minipeft anatomy --trace` computes with them."""
    layer = seen.layer
    found = {"x": seen.x, "b": layer.bias, "y": seen.y}
    if isinstance(layer, nn.Linear):
        return Symbols(found | {"W": layer.weight})
    return Symbols(found | {"g": layer.weight, "eps": layer.eps, "mean": lambda x: x.mean(dim=-1, keepdim=True),
                            "var": lambda x: x.var(dim=-1, keepdim=True, unbiased=False)})
