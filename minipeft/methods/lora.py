r"""LoRA: low-rank adaptation.

A frozen weight matrix W gets a trained low-rank companion: the update to W is the product of two thin matrices. So a
task is learned in r (in + out) numbers instead of in * out, and after training the update can be added to W.

    y = x W^T + bias + s * dropout(x) A^T B^T

                x (batch, seq, in)
                |         \
         W (out, in)     A (r, in)         W is frozen
          frozen            |              by default A starts random, B at zero: step 0 is the base model, exactly
                |        B (out, r)
                |         /  * s
                +--------+
                |
                y (batch, seq, out)

By hand: r = 1, s = 2, W = [[1, 2], [3, 4]], bias = [0, 1], A = [[1, 2]], B = [[1], [0]], x = [1, 1] give
x W^T = [3, 7], x A^T = [3], s * x A^T B^T = [6, 0], y = [9, 8].

Symbols
    x (batch, seq, in) the layer's input      y (batch, seq, out) its output      lora_alpha a number
    r the rank, at most the smaller of in and out      W (out, in) frozen; bias (out,) frozen, too, by default
    A (r, in) is lora_A.weight, B (out, r) is lora_B.weight, both trained
    s = lora_alpha / r, a number; with use_rslora (rsLoRA) lora_alpha / sqrt(r): the update keeps its size as r grows
    dropout(x) is x; in training each number is set to 0 with probability lora_dropout, else divided by 1 - lora_dropout
Trained
    A and B of each target, a linear layer that is adapted; a new classification head. By default the targets are all
    modules called c_attn. With `bias` "lora_only" the targets' biases too, with "all" every bias of the base, those of
    LayerNorms included.
Frozen
    Everything else: `inject`, which puts the method into a model, sets requires_grad to False. By default these are
    124,439,808 numbers, with `bias` "lora_only" 27,648 fewer, with "all" 102,144 fewer. So no gradient is computed for
    W and the optimizer never sees it.
At step 0
    LoraConfig()                                is the base model, bit for bit: B = 0, so the update is 0; A is uniform
                                                  between -1 / sqrt(in) and 1 / sqrt(in)
    LoraConfig(init_lora_weights="gaussian")    is the base model, bit for bit: B = 0; A is normal, of deviation 1 / r
    LoraConfig(init_lora_weights="pissa")       is the base model, up to rounding: PiSSA puts W's r largest
                                                  singular values into s B A, and W - s B A in W's place
    LoraConfig(init_lora_weights=False)         is not the base model: A is uniform as by default, B is uniform between
                                                  -1 / sqrt(r) and 1 / sqrt(r)
    Both models, this one and the base, have the same new head here; it is random. While B = 0, A's gradient is 0 too:
    the first step learns B, the new head and trained biases, not A. With lora_alpha=0, and so s = 0, A's and B's
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
    base_model.model.score.weight (2, 768)
    and so A and B for every target. score.weight is (labels, 768); all totals here are for 2 labels. Tagging has
    classifier.weight (labels, 768) and classifier.bias (labels,) in its place, a language model nothing.
    adapter_config.json must say peft_type LORA and, where they are not the default, r, lora_alpha, target_modules,
    use_rslora, rank_pattern and alpha_pattern, as shapes and s depend on them. `save_adapter` writes every setting;
    patterns and "all-linear" become full names of modules. For peft, Hugging Face's library, it adds lora_bias false
    and fan_in_fan_out true, as transformers stores GPT-2's matrices as (in, out).
    With `bias` "lora_only" also the bias of every target, with "all" every bias of the base. In block 0, and last:
        base_model.model.transformer.h.0.attn.c_attn.base_layer.bias (2304,)
        base_model.model.transformer.h.0.ln_1.bias (768,)
        base_model.model.transformer.h.0.attn.c_proj.bias (768,)
        base_model.model.transformer.h.0.ln_2.bias (768,)
        base_model.model.transformer.h.0.mlp.c_fc.bias (3072,)
        base_model.model.transformer.h.0.mlp.c_proj.bias (768,)
        base_model.model.transformer.ln_f.bias (768,)
    Only the bias of a target has `base_layer` in its name. adapter_config.json must then say `bias`.
    With PiSSA it must say init_lora_weights pissa. The tensors are the trained A and B, not the frozen W - s B A of the
    start. Loading computes that again from the base's own W, then puts the saved A and B in. On another machine it
    agrees up to rounding.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too. Where several methods work under one name, each has a sub-folder with these three files, such
    as lora/ and bitfit/. A minipeft.json beside the sub-folders names them.
Merging
    W <- W + s B A, the layer's own `weight`; its bias stays. Every target can be merged; dropout is not part of W.
    `merge` keeps the W it found, and `unmerge` puts it back, bit for bit. With PiSSA this is W - s B A of the start;
    `remove` and `disable_adapter` bring back the base's own W. Merged and unmerged outputs agree up to rounding.
    On a half-precision base A and B are float32. The sum is rounded once, to W's type: an element of the update that is
    too small beside W's is lost. Unmerged, y is rounded before the update is added, and again after it.
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
    r (in + out) parameters per target: 8 * (768 + 2304) = 24,576 for a c_attn of GPT-2 beside 1,769,472 in its W.
    In all 12 * 24,576 + 1,536 = 296,448 trained, with a new head's 2 * 768 = 1,536; a language model has no new head.
    LoraConfig(bias="lora_only")               trains 324,096: 12 * 2304 = 27,648 more
    LoraConfig(bias="all")                     trains 398,592: 12 * 8,448 + 768 = 102,144 more
    LoraConfig(target_modules="all-linear")    trains 1,181,184: c_attn, attn.c_proj, c_fc and mlp.c_proj of each block
                                                 have 8 * (3072 + 1536 + 3840 + 3840) = 98,304
    Forward: 2 r (in + out) operations per token and target beside 2 in out, 1.4 % more for a c_attn at r = 8. At
    inference the same; merged, not one more, but the kept W takes 4 * 1,769,472 = 7,077,888 bytes more per c_attn in
    float32.
    Backward: full fine-tuning computes two gradients per matrix, that of x and that of W, at 2 in out operations each.
    Here W's gradient is never computed, so x is not kept for it. Below the first target nothing is trained, so in block
    0 the x of c_attn gets no gradient. A and B take 4 r (in + out) per token and target: half for the gradient of x,
    half for their own. Kept for these: dropout(x) (batch, seq, in), s dropout(x) A^T (batch, seq, r), and with dropout
    its mask, a byte per number of x. On a half-precision base dropout(x) is float32: 4 bytes per number, not 2. On a
    CPU, with a float32 base or under autocast, low_rank.py keeps x, and computes dropout(x) again from it and the mask.
    In all a block above the lowest keeps 11 C + r numbers per token, C = 768 channels: C for x, r for s dropout(x) A^T,
    and 10 C of the block itself (the inputs of both LayerNorms 2 C, q, k, v 3 C, attention's output C, gelu's input
    4 C). With all-linear it keeps 16 C + 4 r; full fine-tuning keeps 16 C.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 2,371,584 bytes; gradients take half of that. The
    optimizer's time, too, grows with the trained parameters alone. Weight decay acts on A, B and the head's matrix, not
    on biases.
Errors
    In this list the class of each error stands before its message. Most wrong values are found when the configuration
    is made, the others by `inject`, before it changes anything. `load_adapter` raises an AdapterError, and leaves the
    model as it was, in these cases. A file is missing, damaged or not the one whose digest minipeft.json holds. A
    tensor is missing, unexpected, of another shape, of integers or not finite; the message names it. minipeft.json has
    another base model's fingerprint; a base of another dtype is not compared. The folder is for another task. The
    peft_type is unknown. A setting in adapter_config.json that would change the numbers, and that minipeft does not
    implement, is a ConfigError. An adapter's name that is taken (`load_adapter`) or unknown (`set_adapter`, `remove`)
    is an InjectionError. A bad regular expression in a setting is a ConfigError when `inject` uses it.
    LoraConfig(r=0)
        ConfigError: r must be a positive integer, got 0
    LoraConfig(lora_dropout=1.0)
        ConfigError: lora_dropout must be a probability in [0, 1), got 1.0
    LoraConfig(init_lora_weights="pissa", lora_alpha=0)
        ConfigError: PiSSA divides by the scale: lora_alpha must be positive, got 0
    inject(model, LoraConfig(target_modules=["q_proj"]))
        InjectionError: target_modules 'q_proj' match nothing; nearest names: c_proj, mlp.c_proj, attn.c_proj
    inject(model, LoraConfig(r=1024))
        ConfigError: r=1024 is larger than transformer.h.0.attn.c_attn's smaller side, 768
    inject(model, LoraConfig(layers_to_transform=12))
        ConfigError: layers_to_transform=[12]: this model has the blocks 0 to 11
Differs from the paper
    The paper adapts the query and the value matrix; GPT-2 has query, key and value in one matrix, c_attn, which is
    adapted whole. A starts uniform, as in peft and loralib, not normal. Dropout on x is not in the paper's equation,
    but in its authors' code. rsLoRA, PiSSA and LoRA+ came later.
    rsLoRA: the same s as in its paper, but use_rslora is off by default.
    PiSSA: its paper has no s; here A and B start divided by sqrt(s), so that s B A is the same.
    LoRA+: a rule of the optimizer. B's learning rate is `loraplus_lr_ratio` times A's, a setting of the training and
    not of LoraConfig; the layer only names B, in `raised_rate`.
    From peft it differs in what comes back: peft's unmerge computes W with rounding, and its disable_adapter leaves
    trained biases and PiSSA's W - s B A in place. An r larger than a side of W is refused here.

Papers: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen (2021), "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685. Kalajdzievski (2023), "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2312.03732.
Meng, Wang, Zhang (2024), "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
2404.02948. Hayou, Ghosh, Yu (2024), "LoRA+: Efficient Low Rank Adaptation of Large Models", 2402.12354.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods import low_rank
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.layers import AdapterLayer, ReplacementLayer, to_dtype_of
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.targets import bias_names, find_targets, pattern_value, saved_targets
from minipeft.model.dropout import Dropout
from minipeft.model.linear import Linear
from minipeft.settings import FINITE, POSITIVE_INTEGER, PROBABILITY, setting


@dataclass
class LoraConfig(MethodConfig):
    """peft's LoraConfig, as far as it changes GPT-2's numbers. `use_dora=True` makes it DoRA (see dora.py).

    The defaults are peft's. The command line starts from others, which suit the bundled base: lora_alpha 16 and
    all-linear targets (runs/defaults.py).

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    peft_type: ClassVar[str] = "LORA"
    # Fields of peft's that a file may set and that change nothing here.
    harmless: ClassVar[tuple[str, ...]] = ("megatron_core", "qalora_group_size", "loftq_config", "eva_config",
                                           "use_qalora")

    r: int = setting(8, "rank of the update", POSITIVE_INTEGER)
    lora_alpha: float = setting(8, "scale of the update, divided by r, or by sqrt(r) with use_rslora", FINITE)
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", PROBABILITY)
    target_modules: str | list[str] | None = setting(
        None, "module names, one regular expression, or all-linear; default c_attn")
    exclude_modules: str | list[str] | None = setting(None, "modules to leave out")
    layers_to_transform: int | list[int] | None = setting(None, "numbers of the blocks to adapt; default all")
    layers_pattern: str | list[str] | None = setting(None, "name before the block number, GPT-2: h")
    rank_pattern: dict[str, int] = setting({}, "JSON: module name -> its own r", POSITIVE_INTEGER)
    alpha_pattern: dict[str, float] = setting({}, "JSON: module name -> its own lora_alpha", FINITE)
    bias: str = setting("none", "biases to train too", choices=("none", "lora_only", "all"))
    use_rslora: bool = setting(False, "divide lora_alpha by sqrt(r) instead of r")
    use_dora: bool = setting(False, "train each row's magnitude apart from its direction", option=False)
    init_lora_weights: bool | str = setting(
        True, "true: A uniform, B zero; gaussian: A normal, B zero; pissa: the matrix's own largest singular values; "
              "false: both random", choices=(True, False, "gaussian", "pissa"))

    @property
    def method(self) -> str:
        """Its name in METHODS."""
        return "dora" if self.use_dora else "lora"

    def scaling(self, r: int, lora_alpha: float) -> float:
        """s, the factor on the update of a module with this rank and lora_alpha."""
        return lora_alpha / math.sqrt(r) if self.use_rslora else lora_alpha / r

    def check(self) -> None:
        """Also refuse PiSSA with a scale that it cannot divide by."""
        super().check()
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if self.init_lora_weights == "pissa" and alpha <= 0:
                raise ConfigError(f"PiSSA divides by the scale: {name} must be positive, got {alpha!r}")

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond, or other than, the fields above.

        A pattern is written as one full name per module: readers of JSON may reorder keys, and of two patterns that
        match the first one counts.
        """
        ranks = {name: pattern_value(self.rank_pattern, name, self.r) for name in layers}
        alphas = {name: pattern_value(self.alpha_pattern, name, self.lora_alpha) for name in layers}
        return {"rank_pattern": {name: r for name, r in ranks.items() if r != self.r},
                "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != self.lora_alpha},
                "target_modules": saved_targets(self.target_modules, layers), "fan_in_fan_out": True,
                "lora_bias": False}

    @classmethod
    def from_saved(cls, values: dict[str, Any], model: nn.Module) -> LoraConfig:
        """A configuration from adapter_config.json's values.

        peft has further ways to start A and B (eva, orthogonal, mica) that leave W alone. They concern the start only:
        the saved A and B replace whatever stands there, so any start is right.
        """
        if values.get("init_lora_weights") in ("eva", "orthogonal", "mica"):
            values["init_lora_weights"] = True
        return cls(**values)


class LoRALinear(ReplacementLayer):
    """A frozen linear layer with its low-rank companion."""

    trained = ("lora_A.weight", "lora_B.weight")
    raised_rate = ("lora_B.weight",)  # what LoRA+ trains at a higher learning rate

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, config: LoraConfig) -> None:
        super().__init__(base_layer)
        self.lora_dropout = Dropout(config.lora_dropout)
        self.scaling = config.scaling(r, lora_alpha)
        self.lora_A, self.lora_B = low_rank_pair(base_layer, r, config.init_lora_weights)

    def forward(self, x: Tensor) -> Tensor:
        if low_rank.applies(x, self):  # on a CPU, for speed: computes the lines below, and their gradients, by hand
            return low_rank.low_rank(x, self)
        y = self.base_layer(x)                                         # (batch, seq, in) -> (batch, seq, out)
        x = self.lora_dropout(to_dtype_of(self.lora_A.weight, x))      # float32 beside a half-precision W
        # Scaled while it is r wide: that is out / r times less work than scaling the result.
        return (y + self.lora_B(self.lora_A(x) * self.scaling)).to(y.dtype)    # (batch, seq, r) -> (batch, seq, out)

    def merged(self) -> dict[str, Tensor]:
        """W + s B A."""
        update = self.scaling * self.lora_B.weight @ self.lora_A.weight       # (out, r) (r, in) -> (out, in)
        return {"weight": (self.base_layer.weight + update).to(self.base_layer.weight.dtype)}


def low_rank_pair(base_layer: nn.Linear, r: int, init: bool | str) -> tuple[nn.Linear, nn.Linear]:
    """A (r, in) and B (out, r) as they start; for PiSSA see `take_over_largest`."""
    # nn.Linear draws uniformly between -1/sqrt(k) and 1/sqrt(k), k being its number of inputs: `in` for A, r for B. So
    # peft starts A, and B too where init is False. Both are float32: half precision would lose most small steps.
    lora_A = Linear(base_layer.in_features, r, bias=False, device=base_layer.weight.device)
    lora_B = Linear(r, base_layer.out_features, bias=False, device=base_layer.weight.device)
    if init == "gaussian":
        nn.init.normal_(lora_A.weight, std=1 / r)
    if init is not False:
        nn.init.zeros_(lora_B.weight)
    return lora_A, lora_B


@torch.no_grad()
def take_over_largest(layer: LoRALinear) -> Tensor:
    """PiSSA: A and B take over W's r largest singular values. Returns what is left for W to be, (out, in).

        W = U S V^T        A = sqrt(S_r / s) V_r^T        B = U_r sqrt(S_r / s)        left: W - s B A

    What is left becomes the layer's frozen weight. The base's own W is kept in the record of the injection: it comes
    back when the adapter is switched off or removed.
    """
    weight, r = layer.base_layer.weight, layer.lora_A.out_features
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)          # (out, k), (k,), (k, in)
    root = (S[:r] / layer.scaling).sqrt()                                     # (r,)
    layer.lora_A.weight.copy_(root[:, None] * Vh[:r])                         # (r, in)
    layer.lora_B.weight.copy_(U[:, :r] * root)                                # (out, r)
    return (weight.float() - layer.scaling * layer.lora_B.weight @ layer.lora_A.weight).to(weight.dtype)


def plan(model: nn.Module, config: LoraConfig, layer_class: type[ReplacementLayer] = LoRALinear) -> Plan:
    """Give every targeted linear layer a low-rank companion.

    Args:
        layer_class: what to put around a linear layer: DoRA's differs.

    Raises:
        ConfigError: an r larger than the smaller side of a target, a bad regular expression, or a block that the model
            does not have.
        InjectionError: nothing targeted, or a target that cannot be adapted.
    """
    layers, replaced = {}, {}
    for target in find_targets(model, config, default=["c_attn"]):
        linear = model.get_submodule(target)
        r = pattern_value(config.rank_pattern, target, config.r)
        if r > min(linear.in_features, linear.out_features):
            raise ConfigError(f"r={r} is larger than {target}'s smaller side, {min(linear.weight.shape)}")
        lora_alpha = pattern_value(config.alpha_pattern, target, config.lora_alpha)
        layers[target] = layer_class(linear, r, lora_alpha, config)
        if config.init_lora_weights == "pissa":
            replaced[f"{target}.weight"] = take_over_largest(layers[target])
    biases = [] if config.bias == "none" else bias_names(model, among=None if config.bias == "all" else layers)
    return Plan(layers, biases, replaced)


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for at one target."""
    layer, base = seen.layer, seen.layer.base_layer
    return Symbols({"x": seen.x, "W": base.weight, "bias": base.bias, "A": layer.lora_A.weight,
                    "B": layer.lora_B.weight, "s": layer.scaling, "dropout": layer.lora_dropout, "y": seen.y})
