"""(IA)^3: infused adapter by inhibiting and amplifying inner activations.

Learned vectors rescale the keys, the values and the feed-forward layer's inner activations, number by number; in GPT-2
the queries too, since c_attn makes all three at once. A block has few trained parameters, and they can be multiplied
into its weights.

    y = l * (x W^T + bias)    by default c_attn, and any target but those below: the output is rescaled
    y = (l * x) W^T + bias    by default mlp.c_proj, a target in feedforward_modules: the input is rescaled

               c_attn                               mlp.c_proj

                x (batch, seq, in)                   x (batch, seq, in)
                |                                    |  * l (in,)
         W (out, in)  frozen                  W (out, in)  frozen
                |  + bias (out,)  frozen             |  + bias (out,)  frozen
                |  * l (out,)                        |                        by default l starts at one:
                |                                    |                        step 0 is the base model, exactly
                y (batch, seq, out)                  y (batch, seq, out)

By hand: W = [[1, 2], [3, 4]], bias = [0, 1], l = [2, 0.5], x = [1, 1] give
x W^T + bias = [3, 8], y = [6, 4] where the output is rescaled; l * x = [2, 0.5], y = [3, 9] where the input is.

Symbols
    x (batch, seq, in) the layer's input      y (batch, seq, out) its output
    W (out, in), bias (out,) frozen
    l is ia3_l, trained. In the equation it is flat: (out,) where the output is rescaled, (in,) where the input is. On
    disk it is (out, 1), which scales the rows of W, or (1, in), which scales the columns.
    feedforward_modules says of which targets the input is rescaled. A list names any ending of a name, also without a
    dot: "proj" fits mlp.c_proj and attn.c_proj. A string is a regular expression for the whole name. By default it is
    mlp.c_proj alone: of c_fc and attn.c_proj, where they are targets, the output is rescaled. An entry that fits no
    target changes nothing. But where target_modules is a list, too, each entry must be in it word for word, as in peft,
    Hugging Face's library.
    A c_attn's output holds queries, keys and values, a third each. The input of mlp.c_proj is what comes out of GELU.
Trained
    l of each target, a linear layer that is adapted; a new classification head. By default the targets are all modules
    called c_attn and mlp.c_proj.
Frozen
    Everything else, W and bias first of all, 124,439,808 numbers: `inject`, which puts the method into a model, sets
    requires_grad to False.
At step 0
    IA3Config()                          is the base model, bit for bit: l = 1
    IA3Config(init_ia3_weights=False)    is not the base model: l is normal, with mean 0 and deviation 1
    Both models, this one and the base, have the same new head here; it is random. On a half-precision base it is
    float32, and its logits equal the base's up to rounding.
Positions and mask
    Untouched. Every token is rescaled by the same l; a text may have all 1,024 positions, as before; one with more is a
    ConfigError.
    KV cache. As large as the base's. It holds rescaled keys and values: when the adapter changes, begin a new one.
    Pads. They are changed, too, but no real token sees a pad, on either side.
    Gradient checkpointing. All of this is a part of its block and is computed again with it.
Saved
    In adapter_model.safetensors:
    base_model.model.transformer.h.0.attn.c_attn.ia3_l (2304, 1)
    base_model.model.transformer.h.0.mlp.c_proj.ia3_l (1, 3072)
    base_model.model.score.weight (2, 768)
    and so for every block. score.weight is (labels, 768); all totals here are for 2 labels. Tagging has
    classifier.weight (labels, 768) and classifier.bias (labels,) in its place, a language model nothing.
    adapter_config.json must say peft_type IA3 and, where they are not the defaults, target_modules and
    feedforward_modules. `save_adapter` always writes both, as full names, such as transformer.h.0.mlp.c_proj, and all
    of the second list are in the first, since peft compares them word for word. It writes the other settings, too, and
    for peft fan_in_fan_out true: transformers stores GPT-2's matrices as (in, out). Without feedforward_modules,
    loading takes the default, mlp.c_proj alone; an l of the other shape is then an AdapterError.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too. Where several methods work under one name, each has a sub-folder with these three files, such
    as lora/ and bitfit/. A minipeft.json beside the sub-folders names them.
Merging
    W <- l * W. As stored, l (out, 1) scales the rows and l (1, in) the columns. Where the output is rescaled, as in
    c_attn, bias <- l * bias too; the bias of mlp.c_proj stays. Every target can be merged. `merge` keeps the W and bias
    it found, and `unmerge` puts them back, bit for bit. Merged and unmerged outputs agree up to rounding. On a
    half-precision base l is float32; each product is rounded once, to W's type. Unmerged, l * x is rounded instead, or
    y, once before and once after it is rescaled.
    Order. `merge` folds in the active adapter. While it is merged, a second `merge`, `inject`, `load_adapter`,
    `set_adapter` and `disable_adapter` are an InjectionError, and `save_adapter` is an AdapterError; `remove` unmerges
    first. When nothing is merged, `unmerge` is an InjectionError.
    Several adapters. A second `inject` of the same method is an InjectionError. `load_adapter(model, folder, name)`
    adds a saved adapter, of this method or another, under another name. It becomes the active one, the one that
    computes. The others stay, switched off. The model is in eval mode then. `set_adapter(model, name)` makes another
    one active. Under one name other methods may work along that have other targets or none, such as BitFit or a prompt,
    but neither full nor head. Beside a bottleneck adapter, a prompt or a prefix `merge` is refused, and nothing is
    merged. Beside BitFit it merges, and the trained biases stay. Here a c_attn's trained bias becomes l * bias.
Cost
    out parameters for a c_attn, in for an mlp.c_proj: 2304 + 3072 = 5,376 per block of GPT-2, 12 * 5,376 = 64,512 in
    twelve. With the new head, which a language model lacks, 12 * 5,376 + 1,536 = 66,048 trained.
    IA3Config(feedforward_modules=[])         trains 38,400: l is (768, 1) for an mlp.c_proj, too
    IA3Config(target_modules=["c_attn"])      trains 29,184: keys, values and queries alone
    IA3Config(target_modules="all-linear")    trains 112,128: (2304 + 768 + 3072 + 3072) per block, and the head
    Forward: one multiplication per number that is rescaled, 5,376 per token and block, beside the 14,155,776 operations
    of the block's four matrices. At inference the same; merged, not one more, but the kept W takes in float32
    4 * 1,769,472 = 7,077,888 bytes more per c_attn and 4 * 2,359,296 = 9,437,184 per mlp.c_proj.
    Backward: full fine-tuning computes the gradients of x and of W, 2 in out operations each; here the second is never
    computed. Each rescaled number takes three operations: one multiplication for the gradient that is passed on, and
    for l's own a multiplication and an addition, into the sum over batch and seq. Kept for l's gradient: of c_attn
    x W^T + bias (batch, seq, 2304), of mlp.c_proj x (batch, seq, 3072). In all a block above the lowest keeps 17 C
    numbers per token, C = 768 channels: these 7 C, and 10 C of the block itself (the inputs of both LayerNorms 2 C, q,
    k, v 3 C, attention's output C, gelu's input 4 C). That is more than full fine-tuning's 16 C: (IA)^3 saves gradients
    and AdamW's means.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 528,384 bytes; gradients take half of that. The
    optimizer's time, too, grows with the trained parameters alone. Weight decay acts on the head's matrix alone.
Errors
    In this list the class of each error stands before its message. Most wrong values are found when the configuration
    is made, the others by `inject`, before it changes anything. `load_adapter` raises an AdapterError, and leaves the
    model as it was, in these cases. A file is missing, damaged or not the one whose digest minipeft.json holds. A
    tensor is missing, unexpected, of another shape, of integers or not finite; the message names it. minipeft.json has
    another base model's fingerprint; a base of another dtype is not compared. The folder is for another task. The
    peft_type is unknown. A setting in adapter_config.json that would change the numbers, and that minipeft does not
    implement, is a ConfigError. An adapter's name that is taken (`load_adapter`) or unknown (`set_adapter`, `remove`)
    is an InjectionError. A bad regular expression in a setting is a ConfigError when `inject` uses it.
    IA3Config(target_modules=["c_attn"], feedforward_modules=["mlp.c_proj"])
        ConfigError: feedforward_modules ['mlp.c_proj'] must be among the target_modules ['c_attn']
    IA3Config(init_ia3_weights="no")
        ConfigError: init_ia3_weights must be bool, got 'no'
    inject(model, IA3Config(target_modules=["ln_1"]))
        InjectionError: target transformer.h.0.ln_1 is of class LayerNorm; only linear layers can be targeted:
        attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
    inject(inject(model, LoraConfig()), IA3Config())
        InjectionError: transformer.h.0.attn.c_attn already carries a LoRALinear: remove it first
Differs from the paper
    The paper rescales keys, values and inner activations. GPT-2 has queries, keys and values in one matrix, c_attn, so
    here, as in peft, the queries are rescaled too. The paper's model, T0, answers in words and needs no new head, and
    its l was first trained on a mixture of other tasks. To the loss of the right answer the paper adds two: one makes
    wrong answers less likely (unlikelihood), one compares answers by their mean log-probability per token
    (length-normalized). Here the task's own loss is the only one.
    From peft it differs in that `unmerge` puts the kept W and bias back; peft's divides by l + 1e-8.

Paper: Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel (2022), "Few-Shot Parameter-Efficient Fine-Tuning is Better and
Cheaper than In-Context Learning", arXiv 2205.05638.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.layers import AdapterLayer, ReplacementLayer
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.targets import compiled, find_targets
from minipeft.settings import setting


@dataclass
class IA3Config(MethodConfig):
    """peft's IA3Config, as far as it changes GPT-2's numbers.

    Raises:
        ConfigError: a value of the wrong type, or a list feedforward_modules that is no part of a list target_modules.
    """

    method: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"

    target_modules: str | list[str] | None = setting(
        None, "module names, one regular expression, or all-linear; default c_attn and mlp.c_proj")
    exclude_modules: str | list[str] | None = setting(None, "modules to leave out")
    feedforward_modules: str | list[str] | None = setting(
        None, "targets whose input is rescaled, not their output; default mlp.c_proj")
    init_ia3_weights: bool = setting(True, "start at one; false: at random")

    def check(self) -> None:
        """Also refuse, as peft does, a list of feed-forward modules that is no part of a list of targets."""
        super().check()
        targets, feedforward = self.target_modules, self.feedforward_modules
        if all(isinstance(names, (list, tuple)) for names in (targets, feedforward)) \
                and not set(feedforward) <= set(targets):
            raise ConfigError(f"feedforward_modules {feedforward} must be among the target_modules {targets}")

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond, or other than, the fields above.

        Modules are written by their full names: peft wants each feed-forward entry among the targets, word for word.
        """
        return {"target_modules": list(layers), "fan_in_fan_out": True,
                "feedforward_modules": [name for name, layer in layers.items() if layer.feedforward]}


class IA3Linear(ReplacementLayer):
    """A frozen linear layer whose output, or whose input if it is a feed-forward one, is rescaled."""

    trained = ("ia3_l",)

    def __init__(self, base_layer: nn.Linear, feedforward: bool, init_ia3_weights: bool) -> None:
        super().__init__(base_layer)
        self.feedforward = feedforward
        shape = (1, base_layer.in_features) if feedforward else (base_layer.out_features, 1)
        start = torch.ones if init_ia3_weights else torch.randn
        self.ia3_l = nn.Parameter(start(shape, device=base_layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.ia3_l.flatten()                                          # (in,) or (out,)
        if self.feedforward:
            return self.base_layer((x * scale).to(x.dtype))                   # (batch, seq, in) -> (batch, seq, out)
        y = self.base_layer(x)                                                # (batch, seq, out)
        return (y * scale).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        """l * W: rows rescaled, and the bias with them, or columns."""
        base, scale = self.base_layer, self.ia3_l                             # (out, 1) or (1, in) beside (out, in)
        tensors = {"weight": (base.weight * scale).to(base.weight.dtype)}
        if not self.feedforward and base.bias is not None:
            tensors["bias"] = (base.bias * scale.flatten()).to(base.bias.dtype)
        return tensors


def plan(model: nn.Module, config: IA3Config) -> Plan:
    """Rescale the activations of every targeted linear layer.

    Raises:
        InjectionError: nothing targeted, or a target that cannot be adapted.
    """
    feedforward = ["mlp.c_proj"] if config.feedforward_modules is None else config.feedforward_modules
    targets = find_targets(model, config, default=["c_attn", "mlp.c_proj"])
    return Plan({target: IA3Linear(model.get_submodule(target), _is_feedforward(target, feedforward),
                                   config.init_ia3_weights) for target in targets})


def _is_feedforward(name: str, feedforward: str | list[str]) -> bool:
    """Whether a target's input is rescaled. As in peft, an entry is any ending of a name, not only one after a dot."""
    if isinstance(feedforward, str):
        return compiled(feedforward, "feedforward_modules").fullmatch(name) is not None
    return any(name.endswith(entry) for entry in feedforward)


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for at one target, and which of its lines is meant."""
    layer, base = seen.layer, seen.layer.base_layer
    return Symbols({"x": seen.x, "W": base.weight, "bias": base.bias, "l": layer.ia3_l.flatten(), "y": seen.y},
                   remark=f"by default {'mlp.c_proj' if layer.feedforward else 'c_attn'}", merging={"l": layer.ia3_l})
